"""Time of a training step: forward and backward, compared with PEFT, the frozen model and our composed path.

    python benchmarks/step.py [--rounds 15] [--layers 2] [--only fp32,bf16-true]

A Llama-style decoder with adapters on all seven projections of a block; CPU time of one thread. All variants take one
step each in turn in one process, because the speed of shared machines changes from minute to minute; the result is the
median of the rounds' ratios. Without PEFT installed, its column is missing.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from importlib.util import find_spec
from typing import Any
from unittest import mock

import measuring
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_lora import LoRAConfig, attach
from lightning_lora.ops import linear as ops

RANK, ALPHA, WARMUP = 8, 16.0, 3
TARGETS = {"q", "k", "v", "o", "gate", "up", "down"}
SIZES = {"rounds": 15, "layers": 2, "width": 512, "hidden": 1408, "batch": 4, "length": 256}
HAS_PEFT = find_spec("peft") is not None
REACH_OF_FROZEN = 1.12  # fp32 without dropout
REACH = {  # ours / PEFT at most, by precision and dropout
    ("fp32", 0.0): 0.90,
    ("fp32", 0.1): 0.86,
    ("bf16-true", 0.0): 0.70,
    ("bf16-true", 0.1): 0.65,
    ("bf16-mixed", 0.0): 0.88,
    ("bf16-mixed", 0.1): None,
}


class Block(nn.Module):
    def __init__(self, width: int, hidden: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.before, self.between = nn.LayerNorm(width), nn.LayerNorm(width)
        self.q, self.k, self.v, self.o = (nn.Linear(width, width, bias=False) for _ in range(4))
        self.gate, self.up = (nn.Linear(width, hidden, bias=False) for _ in range(2))
        self.down = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        seen = self.before(x)
        q, k, v = (part(seen).unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in (self.q, self.k, self.v))
        x = x + self.o(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        seen = self.between(x)
        return x + self.down(F.silu(self.gate(seen)) * self.up(seen))


def decoder(layers: int, width: int, hidden: int) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(*(Block(width, hidden, 8) for _ in range(layers)))


def ours(model: nn.Module, dropout: float) -> nn.Module:
    attach(model, LoRAConfig(rank=RANK, alpha=ALPHA, dropout=dropout, target_modules=sorted(TARGETS)))
    return model


def theirs(model: nn.Module, dropout: float, *, autocast_adapter: bool = True) -> nn.Module:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=RANK, lora_alpha=ALPHA, lora_dropout=dropout, target_modules=sorted(TARGETS))
    return get_peft_model(model, config, autocast_adapter_dtype=autocast_adapter)


def variants(base: nn.Module, dropout: float, *, has_peft: bool) -> dict[str, nn.Module]:
    """Return the variants to measure; ``composed`` is ours without the fast path."""
    found = {
        "ours": ours(copy.deepcopy(base), dropout),
        "composed": ours(copy.deepcopy(base), dropout),
        "frozen": copy.deepcopy(base).requires_grad_(False),
    }
    if has_peft:
        found["PEFT"] = theirs(copy.deepcopy(base), dropout)
        if next(base.parameters()).dtype == torch.bfloat16:
            found["PEFT, bf16 adapters"] = theirs(copy.deepcopy(base), dropout, autocast_adapter=False)
    return found


def never(*_: object) -> bool:
    return False


def step(model: nn.Module, x: Tensor, context: Callable[[], AbstractContextManager[object]]) -> None:
    for parameter in model.parameters():
        parameter.grad = None
    with context():
        y = model(x)
    y.float().square().mean().backward()


def composed_step(model: nn.Module, x: Tensor, context: Callable[[], AbstractContextManager[object]]) -> None:
    with mock.patch.object(ops, "is_fast", never):
        step(model, x, context)


def setting(precision: str, args: argparse.Namespace) -> tuple[nn.Module, Tensor, Callable[[], Any]]:
    """Return the base, an input and the context of a precision."""
    dtype = torch.bfloat16 if precision == "bf16-true" else torch.float32
    base = decoder(args.layers, args.width, args.hidden).to(dtype)
    # The input needs a gradient, so that every variant, even the frozen one, runs the same backward pass.
    x = torch.randn(args.batch, args.length, args.width).to(dtype).requires_grad_()
    mixed = precision == "bf16-mixed"
    return base, x, (lambda: torch.autocast("cpu", torch.bfloat16)) if mixed else nullcontext


def measure(precision: str, dropout: float, args: argparse.Namespace) -> measuring.Times:
    """Return the step times of all rounds by variant."""
    base, x, context = setting(precision, args)
    models = variants(base, dropout, has_peft=HAS_PEFT)
    jobs = {
        name: partial(composed_step if name == "composed" else step, model, x, context)
        for name, model in models.items()
    }
    return measuring.in_turn(jobs, args.rounds, warmup=WARMUP)


def main(argv: Sequence[str] | None = None) -> list[measuring.Row]:
    parser = measuring.parser(__doc__, **SIZES)
    parser.add_argument("--only", default="fp32,bf16-true,bf16-mixed")
    args = parser.parse_args(argv)
    if args.smoke:
        vars(args).update(rounds=2, layers=1, width=32, hidden=64, batch=2, length=16)
    torch.set_num_threads(1)
    rows = []
    for (precision, dropout), reach in REACH.items():
        if precision not in args.only.split(","):
            continue
        times = measure(precision, dropout, args)
        for other in [name for name in ("PEFT", "PEFT, bf16 adapters", "composed", "frozen") if name in times]:
            limit = reach if other == "PEFT" else None
            if other == "frozen" and (precision, dropout) == ("fp32", 0.0):
                limit = REACH_OF_FROZEN
            what = f"step, {precision}, dropout {dropout}: ours / {other}"
            rows.append(measuring.ratio(times, "ours", other, limit, what))
        rows.append(
            measuring.spread(f"step, {precision}, dropout {dropout}: ours, ms", [1e3 * t for t in times["ours"]])
        )
    return measuring.report(rows, args)


if __name__ == "__main__":
    main()
