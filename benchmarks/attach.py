"""How long attaching takes: 2,000 linear layers, beside drawing their starts, a bare ``nn.Module()`` and PEFT.

    python benchmarks/attach.py

Prints medians of CPU time per layer, one thread, all measured in turn in one process, because the speed of shared
machines changes from minute to minute.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable

import torch
from torch import nn

from lightning_lora import LoRAConfig, attach, detach
from lightning_lora.initializers import kaiming, seeded

LAYERS, WIDTH, RANK, ROUNDS = 2000, 64, 16, 7


class Stack(nn.Module):
    """Linear layers and nothing else."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(LAYERS))


def microseconds(job: Callable[[], object]) -> float:
    """Return the CPU time of one run, per layer."""
    gc.collect()
    started = time.process_time()
    job()
    return (time.process_time() - started) / LAYERS * 1e6


def peft_attach(model: nn.Module) -> None:
    """Do the same with PEFT."""
    from peft import LoraConfig, inject_adapter_in_model

    inject_adapter_in_model(LoraConfig(r=RANK, target_modules=r"layers\.\d+"), model)


def main() -> None:
    torch.set_num_threads(1)
    names = ("attach", "drawing A", "attach beyond drawing A", "nn.Module()", "PEFT")
    times: dict[str, list[float]] = {name: [] for name in names}
    model, config = Stack(), LoRAConfig(rank=RANK)
    for _ in range(ROUNDS):
        times["attach"].append(microseconds(lambda: attach(model, config)))
        detach(model)
        times["drawing A"].append(microseconds(lambda: [kaiming(RANK, WIDTH, seeded(i)) for i in range(LAYERS)]))
        times["attach beyond drawing A"].append(times["attach"][-1] - times["drawing A"][-1])
        times["nn.Module()"].append(microseconds(lambda: [nn.Module() for _ in range(LAYERS)]))
        other = Stack()
        times["PEFT"].append(microseconds(lambda other=other: peft_attach(other)))
    for name, values in times.items():
        low, _, high = statistics.quantiles(values, n=4)
        print(f"{name:24} {statistics.median(values):8.1f} us a layer  [{low:.1f}, {high:.1f}]")
    ratios = [ours / theirs for ours, theirs in zip(times["attach"], times["PEFT"], strict=True)]
    print(f"attach / PEFT            {statistics.median(ratios):8.3f}")


if __name__ == "__main__":
    main()
