"""Cost of the base's fingerprint, compared with loading a base of 1.1 billion parameters.

    python benchmarks/fingerprint.py [folder for 2.2 GB]

The base has the layers of a Llama in bfloat16. Loading means the fastest way: reading safetensors from the disk cache
into new memory.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from lightning_lora import LoRAConfig, attach
from lightning_lora.adapted_model import AdaptedModel
from lightning_lora.fingerprint import base_problems, fingerprint, samples

WIDTH, HIDDEN, LAYERS, VOCABULARY, ROUNDS = 2048, 5632, 22, 32000, 9


def block() -> nn.Module:
    """Return the linear layers and norms of one block, with key and value projections of an eighth of the width."""
    sizes = {"q": (WIDTH, WIDTH), "k": (WIDTH, WIDTH // 8), "v": (WIDTH, WIDTH // 8), "o": (WIDTH, WIDTH)}
    sizes |= {"gate": (WIDTH, HIDDEN), "up": (WIDTH, HIDDEN), "down": (HIDDEN, WIDTH)}
    parts: dict[str, nn.Module] = {name: nn.Linear(*size, bias=False) for name, size in sizes.items()}
    return nn.ModuleDict(parts | {"norm1": nn.RMSNorm(WIDTH), "norm2": nn.RMSNorm(WIDTH)})


def base() -> nn.Module:
    """Return the model on the meta device."""
    with torch.device("meta"):
        ends = {"embed": nn.Embedding(VOCABULARY, WIDTH), "head": nn.Linear(WIDTH, VOCABULARY, bias=False)}
        return nn.ModuleDict(ends | {"layers": nn.ModuleList(block() for _ in range(LAYERS))}).bfloat16()


def seconds(run: Callable[[], object]) -> float:
    """Return the median time of several runs."""
    times = []
    for _ in range(ROUNDS):
        started = time.perf_counter()
        run()
        times.append(time.perf_counter() - started)
    return median(times)


def main() -> None:
    torch.set_num_threads(1)
    model = base()
    with tempfile.TemporaryDirectory(dir=sys.argv[1] if len(sys.argv) > 1 else None) as folder:
        file = Path(folder) / "model.safetensors"
        values = {name: torch.full(p.shape, 0.01, dtype=p.dtype) for name, p in model.named_parameters()}
        save_file(values, file)
        del values

        def load() -> None:
            state = {name: tensor.clone() for name, tensor in load_file(file).items()}
            model.load_state_dict(state, assign=True)

        loading = seconds(load)
    recorded = fingerprint(AdaptedModel(model).base)
    comparing = seconds(lambda: base_problems(recorded, samples(AdaptedModel(model).base, recorded), "model"))
    attach(model, LoRAConfig(rank=16))
    taking = seconds(lambda: fingerprint(AdaptedModel(model).base))
    tensors = AdaptedModel(model).base
    print(f"base of {sum(p.numel() for p in tensors.values()):,} parameters in {len(tensors)} tensors")
    print(f"loading the base           {1e3 * loading:9.1f} ms")
    print(f"comparing, at a load       {1e3 * comparing:9.1f} ms, {100 * comparing / loading:.2f} % of loading")
    print(f"taking it, at a save       {1e3 * taking:9.1f} ms, {100 * taking / loading:.2f} % of loading")


if __name__ == "__main__":
    main()
