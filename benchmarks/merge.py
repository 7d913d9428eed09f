"""Merging: in memory compared with PEFT, and with ``--disk`` on a generated base of about 2 GB.

    python benchmarks/merge.py [--disk [--folder PLACE FOR ABOUT 5 GB]]

In memory, it measures the CPU time of one thread and the largest tensor created. On disk, the base has the layers of a
Llama of 1 B parameters in bfloat16, in four shards. ``lightning-lora merge`` runs in its own process, and its peak is
compared with that of a process that only imports the same. Then every merged weight is compared with the result of
``merge`` in memory, layer by layer.
"""

from __future__ import annotations

import argparse
import copy
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import measuring
import step
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from lightning_lora import LoRAConfig, attach, lora_layers, merge

WIDTH, HIDDEN, LAYERS, VOCABULARY, RANK, SHARDS = 2048, 5632, 18, 32000, 16, 4
LINEAR = {
    **{f"self_attn.{name}_proj": (WIDTH, WIDTH) for name in "qkvo"},
    **{"mlp.gate_proj": (HIDDEN, WIDTH), "mlp.up_proj": (HIDDEN, WIDTH), "mlp.down_proj": (WIDTH, HIDDEN)},
}
MEASURED = """
import sys
from lightning_lora.cli import main
code = main(sys.argv[1:]) if len(sys.argv) > 1 else 0
import torch, lightning_lora.disk.merge
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
    """Count the tensors that differ from the result of merging in memory."""
    factors, wrong = load_file(adapter / "adapter_model.safetensors"), 0
    for path in sorted(base.glob("*.safetensors")):
        with safe_open(path, "pt") as before, safe_open(out / path.name, "pt") as after:
            for name in before.keys():  # noqa: SIM118 - a file is not a dict
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


def on_disk(folder_for_all: str | None) -> list[measuring.Row]:
    """Merge on disk, and return the measurements."""
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory(dir=folder_for_all) as folder:
        base, adapter, out = (Path(folder) / name for name in ("base", "adapter", "out"))
        shard = write_base(base)
        write_adapter(adapter)
        total = sum(path.stat().st_size for path in base.iterdir())
        idle, _ = peak()
        used, seconds = peak("merge", adapter, base, out)
        return [
            measuring.Row(
                f"on disk, base of {total / 1e6:.0f} MB: peak memory above importing, MB",
                (used - idle) / 1e6,
                reach=shard / 1e6 + 200,
            ),
            measuring.Row("on disk: s", seconds),
            measuring.Row(
                "on disk: tensors that differ from merging in memory", differing(base, adapter, out), reach=0
            ),
        ]


def trained(model: nn.Module) -> nn.Module:
    for name, parameter in model.named_parameters():
        if "lora" in name:
            nn.init.normal_(parameter, std=0.02)
    return model


def merge_jobs(base: nn.Module) -> dict[str, Callable[[], object]]:
    """Return fresh models to merge, for one round."""
    ours = trained(step.ours(copy.deepcopy(base), 0.0))
    jobs: dict[str, Callable[[], object]] = {"ours": lambda: merge(ours)}
    if step.HAS_PEFT:
        one, other = (trained(step.theirs(copy.deepcopy(base), 0.0)) for _ in range(2))
        jobs["PEFT"] = one.merge_and_unload
        jobs["PEFT, safe_merge"] = lambda: other.merge_and_unload(safe_merge=True)
    return jobs


def largest_made(model: nn.Module) -> int:
    """Return the bytes of the largest tensor that merging creates."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as seen:
        merge(model)
    return max(event.self_cpu_memory_usage for event in seen.events())


def in_memory(args: argparse.Namespace) -> list[measuring.Row]:
    """Merge models in memory, and return the measurements."""
    rows = []
    for dtype in (torch.float32, torch.bfloat16):
        base = step.decoder(args.layers, args.width, args.hidden).to(dtype)
        times: measuring.Times = {}
        for turn in range(args.rounds + 1):
            for name, job in merge_jobs(base).items():
                taken = measuring.cpu_seconds(job)
                if turn:
                    times.setdefault(name, []).append(taken)
        name = str(dtype).removeprefix("torch.")
        for other, reach in (("PEFT", 0.45), ("PEFT, safe_merge", None)):
            if other in times:
                rows.append(measuring.ratio(times, "ours", other, reach, f"merge, {name}: ours / {other}"))
        rows.append(measuring.spread(f"merge, {name}: ours, ms", [1e3 * t for t in times["ours"]]))
        made = largest_made(trained(step.ours(copy.deepcopy(base), 0.0)))
        rows.append(measuring.Row(f"merge, {name}: largest tensor made, MiB", made / 2**20, reach=16.0))
    return rows


def main(argv: Sequence[str] | None = None) -> list[measuring.Row]:
    parser = measuring.parser(__doc__, rounds=7, layers=12, width=768, hidden=2048)
    parser.add_argument("--disk", action="store_true")
    parser.add_argument("--folder")
    args = parser.parse_args(argv)
    if args.smoke:
        vars(args).update(rounds=2, layers=1, width=32, hidden=64)
    torch.set_num_threads(1)
    return measuring.report(in_memory(args) + (on_disk(args.folder) if args.disk else []), args)


if __name__ == "__main__":
    main()
