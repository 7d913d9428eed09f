"""Several adapters on one base: switching, and a routed batch compared with one adapter and with PEFT's mixed batch.

    python benchmarks/switch.py

"One adapter" computes the whole batch with one of them; "one after another" computes each adapter's samples by
themselves.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable, Sequence

import measuring
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from lightning_lora import LoRAConfig, add_adapter, routed, set_adapter, using


class Block(nn.Module):
    """Two linear layers with adapters, beside a shortcut."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(torch.relu(self.up(x)))


def switching(args: argparse.Namespace) -> measuring.Row:
    """Return the milliseconds of a switch of all layers."""
    model = nn.Sequential(*(nn.Linear(64, 64) for _ in range(args.layers)))
    for name in ("a", "b"):
        add_adapter(model, name, LoRAConfig(rank=args.rank))

    def there_and_back() -> None:
        set_adapter(model, "b")
        set_adapter(model, "a")

    times = measuring.in_turn({"both": there_and_back}, 10 * args.rounds)["both"]
    return measuring.spread(f"switch {args.layers} layers, ms", [1e3 * each / 2 for each in times], 2.0)


@torch.no_grad()
def serving(count: int, args: argparse.Namespace, *, is_sorted: bool) -> list[measuring.Row]:
    """Return the times of one batch over that of one adapter, with each way to serve it."""
    base = nn.Sequential(*(Block(args.width) for _ in range(args.blocks)))
    options = {"r": args.rank, "target_modules": ["up", "down"]}
    names = [f"n{i}" for i in range(count)]
    peft = get_peft_model(copy.deepcopy(base), LoraConfig(**options), adapter_name=names[0]).eval()
    for name in names:
        add_adapter(base, name, LoRAConfig(rank=args.rank))
        if name != names[0]:
            peft.add_adapter(name, LoraConfig(**options))
    wanted = [names[i % count] for i in range(args.batch)]
    wanted = sorted(wanted) if is_sorted else wanted
    x = torch.randn(args.batch, args.tokens, args.width)

    def together() -> None:
        with routed(base, wanted):
            base(x)

    def apart() -> None:
        for name in names:
            with using(base, name):
                base(x[[i for i, each in enumerate(wanted) if each == name]])

    jobs: dict[str, Callable[[], object]] = {
        "one adapter": lambda: base(x),
        "routed": together,
        "one after another": apart,
        "PEFT": lambda: peft(x, adapter_names=wanted),
    }
    times = measuring.in_turn(jobs, args.rounds)
    batch = f"{count} adapters, {'sorted' if is_sorted else 'mixed'}"
    pairs = (("routed", "one adapter"), ("one after another", "one adapter"), ("routed", "PEFT"))
    return [measuring.ratio(times, a, b, quantity=f"{batch}: {a} / {b}") for a, b in pairs]


def main(argv: Sequence[str] | None = None) -> list[measuring.Row]:
    parser = measuring.parser(__doc__, rounds=9, layers=224, blocks=8, width=512, batch=32, tokens=64, rank=16)
    args = parser.parse_args(argv)
    if args.smoke:
        vars(args).update(rounds=2, layers=2, blocks=1, width=32, tokens=2, rank=2)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    rows = [switching(args)]
    for count in (2, 4, 16):
        for is_sorted in (True, False):
            rows += serving(count, args, is_sorted=is_sorted)
    return measuring.report(rows, args)


if __name__ == "__main__":
    main()
