"""Peak memory and time of ``lightning-lora merge`` on a generated base of about 2 GB, and whether the bits are right.

    python benchmarks/merge.py [folder for about 5 GB]

The base has the layers of a Llama of 0.9 B parameters in bfloat16, in four shards. The command runs in a process of its
own; its peak is compared with that of a process that only imports what it needs. Then every merged weight is compared
with what ``merge`` gives in memory, layer by layer.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from lightning_lora import LoRAConfig, attach, lora_layers, merge

WIDTH, HIDDEN, LAYERS, VOCABULARY, RANK, SHARDS = 2048, 5632, 16, 32000, 16, 4
LINEAR = {
    **{f"self_attn.{name}_proj": (WIDTH, WIDTH) for name in "qkvo"},
    **{"mlp.gate_proj": (HIDDEN, WIDTH), "mlp.up_proj": (HIDDEN, WIDTH), "mlp.down_proj": (WIDTH, HIDDEN)},
}
MEASURED = """
import sys
from lightning_lora.cli import main
code = main(sys.argv[1:]) if len(sys.argv) > 1 else 0
import torch, lightning_lora.disk.streaming
with open("/proc/self/status") as status:  # getrusage would count the parent's memory at the fork
    print(next(line.split()[1] for line in status if line.startswith("VmHWM")), file=sys.stderr)
sys.exit(code)
"""


def write_base(folder: Path) -> int:
    """Write a base of random weights, and return the size of its largest shard."""
    folder.mkdir()
    where: dict[str, str] = {}
    for shard in range(SHARDS):
        tensors = {}
        if shard in (0, SHARDS - 1):
            name = "model.embed_tokens.weight" if shard == 0 else "lm_head.weight"
            tensors[name] = torch.randn(VOCABULARY, WIDTH, dtype=torch.bfloat16) / 50
        for layer in range(shard * LAYERS // SHARDS, (shard + 1) * LAYERS // SHARDS):
            for name, shape in LINEAR.items():
                tensors[f"model.layers.{layer}.{name}.weight"] = torch.randn(shape, dtype=torch.bfloat16) / 50
        file = f"model-{shard + 1:05}-of-{SHARDS:05}.safetensors"
        save_file(tensors, folder / file, metadata={"format": "pt"})
        where |= dict.fromkeys(tensors, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "tie_word_embeddings": False}))
    return max(path.stat().st_size for path in folder.glob("*.safetensors"))


def write_adapter(folder: Path) -> None:
    """Write a PEFT directory that adapts every linear layer."""
    folder.mkdir()
    tensors = {}
    for layer in range(LAYERS):
        for name, (out_features, in_features) in LINEAR.items():
            prefix = f"base_model.model.model.layers.{layer}.{name}"
            tensors[f"{prefix}.lora_A.weight"] = torch.randn(RANK, in_features) / 50
            tensors[f"{prefix}.lora_B.weight"] = torch.randn(out_features, RANK) / 50
    save_file(tensors, folder / "adapter_model.safetensors")
    targets = [name.rpartition(".")[2] for name in LINEAR]
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": 2 * RANK, "target_modules": targets}
    (folder / "adapter_config.json").write_text(json.dumps(config))


def peak(*arguments: object) -> tuple[int, float]:
    """Return the peak memory of a command in bytes, and its seconds."""
    started = time.perf_counter()
    command = [sys.executable, "-c", MEASURED, *map(str, arguments)]
    outcome = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, check=True)
    return int(outcome.stderr.split()[-1]) * 1024, time.perf_counter() - started


@torch.no_grad()
def differing(base: Path, adapter: Path, out: Path) -> int:
    """Return how many tensors differ from what merging in memory gives."""
    factors, wrong = load_file(adapter / "adapter_model.safetensors"), 0
    for path in sorted(base.glob("*.safetensors")):
        with safe_open(path, "pt") as before, safe_open(out / path.name, "pt") as after:
            for name in before.keys():  # noqa: SIM118 - a file is no dict
                expected, prefix = before.get_tensor(name), f"base_model.model.{name.removesuffix('.weight')}"
                if f"{prefix}.lora_A.weight" in factors:
                    model = nn.Sequential(nn.Linear(*expected.shape[::-1], bias=False, dtype=torch.bfloat16))
                    model[0].weight.copy_(expected)
                    attach(model, LoRAConfig(rank=RANK, alpha=2.0 * RANK))
                    lora = lora_layers(model)["0"].lora
                    lora.A.copy_(factors[f"{prefix}.lora_A.weight"])
                    lora.B.copy_(factors[f"{prefix}.lora_B.weight"])
                    merge(model)
                    expected = model[0].weight
                wrong += not torch.equal(expected, after.get_tensor(name))
    return wrong


def main() -> None:
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory(dir=sys.argv[1] if len(sys.argv) > 1 else None) as folder:
        base, adapter, out = (Path(folder) / name for name in ("base", "adapter", "out"))
        shard = write_base(base)
        write_adapter(adapter)
        total = sum(path.stat().st_size for path in base.iterdir())
        idle, _ = peak()
        used, seconds = peak("merge", adapter, base, out)
        print(f"base {total / 1e6:.0f} MB, largest shard {shard / 1e6:.0f} MB, {SHARDS} shards")
        print(f"peak of importing alone  {idle / 1e6:8.0f} MB")
        print(f"peak of merging          {used / 1e6:8.0f} MB, {(used - idle) / 1e6:.0f} MB more")
        print(f"time                     {seconds:8.1f} s, {total / seconds / 1e6:.0f} MB/s")
        print(f"tensors that differ from merging in memory: {differing(base, adapter, out)}")


if __name__ == "__main__":
    main()
