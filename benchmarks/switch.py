"""Measure several adapters on one base: switching, and a routed batch against other ways to serve it.

    python benchmarks/switch.py

PEFT's way is its mixed batch (``adapter_names=[...]``). All ways are timed in turn in one process; medians.
"""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable

import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from lightning_lora import LoRAConfig, add_adapter, routed, set_adapter, using

WIDTH, DEPTH, RANK, BATCH, TOKENS = 512, 8, 16, 32, 64


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(torch.relu(self.up(x)))


def main() -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    print(f"{'switch among 2 adapters of rank 16 on 224 layers':58}{switching():8.2f} ms")
    for count in (2, 4, 16):
        for arrangement in ("sorted", "mixed"):
            times = serving(count, is_sorted=arrangement == "sorted")
            one = times["one adapter"]
            shown = ", ".join(f"{name} {value / one:.2f}" for name, value in times.items() if name != "one adapter")
            print(f"{count:2} adapters, {arrangement:6} batch of {BATCH} x {TOKENS} tokens, over one adapter: {shown}")


def switching() -> float:
    """Return the milliseconds of a switch."""
    model = nn.Sequential(*(nn.Linear(64, 64) for _ in range(224)))
    for name in ("a", "b"):
        add_adapter(model, name, LoRAConfig(rank=16))
    return 1000 * statistics.median(timed(lambda n=name: set_adapter(model, n)) for name in ("b", "a") * 30)


@torch.no_grad()
def serving(count: int, *, is_sorted: bool) -> dict[str, float]:
    """Return the seconds of one batch with each way to serve it."""
    base = nn.Sequential(*(Block() for _ in range(DEPTH)))
    theirs = copy.deepcopy(base)
    names = [f"n{i}" for i in range(count)]
    for name in names:
        add_adapter(base, name, LoRAConfig(rank=RANK))
    peft = get_peft_model(theirs, LoraConfig(r=RANK, target_modules=["up", "down"]), adapter_name=names[0]).eval()
    for name in names[1:]:
        peft.add_adapter(name, LoraConfig(r=RANK, target_modules=["up", "down"]))
    wanted = [names[i % count] for i in range(BATCH)]
    wanted = sorted(wanted) if is_sorted else wanted
    x = torch.randn(BATCH, TOKENS, WIDTH)

    def together() -> None:
        with routed(base, wanted):
            base(x)

    def apart() -> None:
        for name in names:
            rows = [i for i, each in enumerate(wanted) if each == name]
            with using(base, name):
                base(x[rows])

    ways: dict[str, Callable[[], object]] = {
        "one adapter": lambda: base(x),
        "routed": together,
        "one adapter after another": apart,
        "PEFT's mixed batch": lambda: peft(x, adapter_names=wanted),
    }
    for way in ways.values():
        way()
    rounds = [{name: timed(way) for name, way in ways.items()} for _ in range(9)]
    return {name: statistics.median(each[name] for each in rounds) for name in ways}


def timed(way: Callable[[], object]) -> float:
    started = time.perf_counter()
    way()
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
