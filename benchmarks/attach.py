"""Time of attaching: 2,000 linear layers, compared with drawing ``A``, a bare ``nn.Module()`` and PEFT.

    python benchmarks/attach.py

CPU time of one thread in microseconds per layer, measured in turn.
"""

from __future__ import annotations

import argparse
import gc
from collections.abc import Callable, Sequence

import measuring
import step
import torch
from torch import nn

from lightning_lora import LoRAConfig, attach, detach
from lightning_lora.layers.starts import kaiming, seeded

RANK = 16


class Stack(nn.Module):
    """Only linear layers."""

    def __init__(self, layers: int, width: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(layers))


def peft_attach(model: nn.Module) -> None:
    """Attach with PEFT."""
    from peft import LoraConfig, inject_adapter_in_model

    inject_adapter_in_model(LoraConfig(r=RANK, target_modules=r"layers\.\d+"), model)


def measured(args: argparse.Namespace) -> measuring.Times:
    """Return the microseconds per layer of every job and round, without the first round, which imports."""
    times: measuring.Times = {}

    def measure(name: str, job: Callable[[], object]) -> None:
        gc.collect()
        times.setdefault(name, []).append(measuring.cpu_seconds(job) / args.layers * 1e6)

    model, config = Stack(args.layers, args.width), LoRAConfig(rank=RANK)
    for _ in range(1 + args.rounds):
        measure("attach", lambda: attach(model, config))
        detach(model)
        measure("drawing A", lambda: [kaiming(RANK, args.width, seeded(i)) for i in range(args.layers)])
        measure("nn.Module()", lambda: [nn.Module() for _ in range(args.layers)])
        if step.HAS_PEFT:
            other = Stack(args.layers, args.width)
            measure("PEFT", lambda other=other: peft_attach(other))
    return {name: values[1:] for name, values in times.items()}


def main(argv: Sequence[str] | None = None) -> list[measuring.Row]:
    args = measuring.parser(__doc__, rounds=7, layers=2000, width=64).parse_args(argv)
    if args.smoke:
        vars(args).update(rounds=2, layers=20)
    torch.set_num_threads(1)
    times = measured(args)
    beyond = [whole - drawing for whole, drawing in zip(times["attach"], times["drawing A"], strict=True)]
    rows = [measuring.spread(f"{name}, microseconds a layer", values) for name, values in times.items()]
    rows.append(measuring.spread("attach beyond drawing A, microseconds a layer", beyond))
    # The target refers to the fastest round: all rounds do the same work, so slower ones measure the machine.
    fastest = min(times["attach"]) - min(times["drawing A"])
    rows.append(measuring.Row("the same, fastest rounds", fastest, reach=None if args.smoke else 25))
    if step.HAS_PEFT:
        rows.append(measuring.ratio(times, "attach", "PEFT", 0.03))
    return measuring.report(rows, args)


if __name__ == "__main__":
    main()
