"""Layers whose weight carries the update: memory kept for backward, and the time of a step.

    python benchmarks/weights.py [--rounds 15]

The weight is formed again in backward instead of being kept; *kept* is the same model without this. Bytes are counted
beyond the frozen model, each block of memory once; they include the inputs that a trained weight needs.
"""

from __future__ import annotations

import argparse
import copy
import sys
from collections.abc import Callable, Sequence
from functools import partial
from unittest import mock

import measuring
import torch
from torch import Tensor, nn

from lightning_lora import LoRAConfig, attach
from lightning_lora.ops import recompute as recomputed

RANK = 8


class First(nn.Module):
    """A layer that returns several tensors; only the first is used."""

    def __init__(self, layer: nn.Module, times: int = 1) -> None:
        super().__init__()
        self.layer, self.times = layer, times

    def forward(self, x: Tensor) -> Tensor:
        output = self.layer(*[x] * self.times)
        return output[0] if isinstance(output, tuple) else output


class Steps(nn.Module):
    """A cell that is called at every step."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layer = nn.LSTMCell(width, width)

    def forward(self, x: Tensor) -> Tensor:
        state = None
        for step in x.unbind(0):
            state = self.layer(step, state)
        return state[0]


class Experts(nn.Module):
    """Eight experts, each with its share of the rows."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(8, width, width) / width**0.5)

    def forward(self, x: Tensor) -> Tensor:
        parts = x.flatten(0, 1).chunk(8)
        return torch.cat([part @ self.up[expert].T for expert, part in enumerate(parts)])


KINDS: dict[str, Callable[[int], nn.Module]] = {
    "attention": lambda width: First(nn.MultiheadAttention(width, 8), 3),
    "LSTM": lambda width: First(nn.LSTM(width, width)),
    "LSTM cell": Steps,
    "bilinear": lambda width: First(nn.Bilinear(width // 4, width // 4, width // 4), 2),
    "experts": lambda width: First(Experts(width)),
}


def adapted(base: nn.Module) -> nn.Module:
    model = copy.deepcopy(base)
    targets = (
        {"target_modules": [], "target_parameters": ["*.up"]}
        if isinstance(getattr(base, "layer", None), Experts)
        else {"target_modules": ["layer"]}
    )
    attach(model, LoRAConfig(rank=RANK, **targets))
    return model


def step(model: nn.Module, x: Tensor) -> None:
    for parameter in model.parameters():
        parameter.grad = None
    model(x).square().mean().backward()


def kept_step(model: nn.Module, x: Tensor) -> None:
    with mock.patch.object(recomputed, "_FEW", sys.maxsize):
        step(model, x)


def rows_of(kind: str, args: argparse.Namespace) -> list[measuring.Row]:
    torch.manual_seed(0)
    base = KINDS[kind](args.width).requires_grad_(False)
    model = adapted(base)
    width = args.width // 4 if kind == "bilinear" else args.width
    x = torch.randn(args.length, args.batch, width).requires_grad_()

    def bytes_of(part: nn.Module) -> int:
        return measuring.saved_bytes(lambda: part(x), [x, *part.parameters()])

    with mock.patch.object(recomputed, "_FEW", 0):
        now = bytes_of(model)
    with mock.patch.object(recomputed, "_FEW", sys.maxsize):
        before = bytes_of(model)
    times = measuring.in_turn(
        {"ours": partial(step, model, x), "kept": partial(kept_step, model, x), "frozen": partial(step, base, x)},
        args.rounds,
    )
    frozen = bytes_of(base)
    return [
        measuring.Row(f"{kind}: kept above frozen, MiB", (now - frozen) / 2**20),
        measuring.Row(f"{kind}: the same with the weights kept, MiB", (before - frozen) / 2**20),
        measuring.ratio(times, "ours", "kept", quantity=f"{kind}: step, ours / weights kept"),
        measuring.ratio(times, "ours", "frozen", quantity=f"{kind}: step, ours / frozen"),
        measuring.spread(f"{kind}: step, ms", [1e3 * each for each in times["ours"]]),
    ]


def main(argv: Sequence[str] | None = None) -> list[measuring.Row]:
    parser = measuring.parser(__doc__, rounds=15, width=512, length=64, batch=8)
    parser.add_argument("--only", default=",".join(KINDS))
    parser.add_argument("--always", action="store_true", help="also form small weights again")
    args = parser.parse_args(argv)
    if args.smoke:
        vars(args).update(rounds=2, width=32, length=4, batch=8)
    torch.set_num_threads(1)
    with mock.patch.object(recomputed, "_FEW", 0 if args.always else recomputed._FEW):
        rows = [row for kind in args.only.split(",") for row in rows_of(kind, args)]
    return measuring.report(rows, args)


if __name__ == "__main__":
    main()
