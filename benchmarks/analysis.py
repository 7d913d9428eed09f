"""Time and peak memory of analyzing an adapter of a 7B model: 224 layers, rank 16, from files.

    python benchmarks/analysis.py [folder for about 2 GB]

The adapter is a PEFT directory with random factors in the shapes of Llama 7B and a decaying spectrum. Each job runs in
its own process, and its peak is compared with that of a process that only imports. With a base, the weights are read
from disk one at a time; four of the 32 blocks are enough to measure the cost per gigabyte.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import save_file

WIDTH, HIDDEN, LAYERS, RANK, BASE_LAYERS = 4096, 11008, 32, 16, 4
LINEAR = {
    **{f"self_attn.{name}_proj": (WIDTH, WIDTH) for name in "qkvo"},
    **{"mlp.gate_proj": (HIDDEN, WIDTH), "mlp.up_proj": (HIDDEN, WIDTH), "mlp.down_proj": (WIDTH, HIDDEN)},
}
PREAMBLE = """
import sys
from pathlib import Path
from lightning_lora.analysis import analyze, compare, layer_similarity
import lightning_lora.cli
"""
PEAK = """
with open("/proc/self/status") as status:  # getrusage would count the parent's memory at the fork
    print(next(line.split()[1] for line in status if line.startswith("VmHWM")), file=sys.stderr)
"""


def write_adapter(folder: Path, layers: int, seed: int) -> Path:
    """Write a PEFT directory that adapts every linear layer."""
    folder.mkdir(parents=True)
    generator, tensors = torch.Generator().manual_seed(seed), {}
    falling = 0.8 ** torch.arange(RANK)
    for layer in range(layers):
        for name, (out_features, in_features) in LINEAR.items():
            prefix = f"base_model.model.model.layers.{layer}.{name}"
            tensors[f"{prefix}.lora_A.weight"] = torch.randn(RANK, in_features, generator=generator) / 50
            B = torch.randn(out_features, RANK, generator=generator) * falling
            tensors[f"{prefix}.lora_B.weight"] = B / (50 + layer)
    save_file(tensors, folder / "adapter_model.safetensors")
    targets = [name.rpartition(".")[2] for name in LINEAR]
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": 2 * RANK, "target_modules": targets}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def write_base(path: Path) -> Path:
    """Write the blocks of a base in bfloat16, and return the file."""
    tensors = {
        f"model.layers.{layer}.{name}.weight": (torch.randn(shape) / 50).bfloat16()
        for layer in range(BASE_LAYERS)
        for name, shape in LINEAR.items()
    }
    save_file(tensors, path)
    return path


def measured(code: str) -> tuple[float, float]:
    """Return the seconds and the peak megabytes of a process that runs the code."""
    started = time.perf_counter()
    command = [sys.executable, "-c", PREAMBLE + code + PEAK]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}  # more threads would wait for each other on shared cores
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
    return time.perf_counter() - started, int(done.stderr.split()[-1]) / 1e3


def main() -> None:
    with tempfile.TemporaryDirectory(dir=sys.argv[1] if len(sys.argv) > 1 else None) as name:
        folder = Path(name)
        adapter, other = (write_adapter(folder / f"adapter{seed}", LAYERS, seed) for seed in (0, 1))
        small, base = write_adapter(folder / "small", BASE_LAYERS, 0), write_base(folder / "model.safetensors")
        jobs = {
            "importing alone": "",
            "analyze(adapter)": f"print(analyze({str(adapter)!r}))",
            "compare(adapter, other)": f"print(compare({str(adapter)!r}, {str(other)!r}))",
            "layer_similarity(adapter)": f"layer_similarity({str(adapter)!r})",
            "lightning-lora inspect": f"lightning_lora.cli.main(['inspect', {str(adapter)!r}])",
            f"analyze(four blocks, base of {base.stat().st_size / 1e9:.1f} GB)": (
                f"print(analyze({str(small)!r}, {str(base)!r}))"
            ),
        }
        print(f"torch {torch.__version__}, one thread")
        for job, code in jobs.items():
            seconds, peak = measured(code)
            print(f"{job:45}  {seconds:5.1f} s  {peak:6,.0f} MB", flush=True)


if __name__ == "__main__":
    main()
