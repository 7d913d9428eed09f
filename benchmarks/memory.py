"""Memory kept for backward beyond the frozen model: ours compared with PEFT and with the formula.

    python benchmarks/memory.py

Bytes are counted, not sampled: each block of memory that autograd keeps, once, without parameters. The formula is ``x``
once per distinct input, ``h`` per layer, and with dropout one bit per element of ``x``. Attention keeps its output, the
input of ``o``, anyway.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from unittest import mock

import measuring
import step
from torch import nn

from lightning_lora.ops import linear as ops

REACH = {
    ("fp32", 0.0): 1.00,
    ("fp32", 0.1): 0.30,
    ("bf16-true", 0.0): 0.25,
    ("bf16-true", 0.1): 0.15,
    ("bf16-mixed", 0.0): 0.10,
    ("bf16-mixed", 0.1): 0.06,
}


def formula(precision: str, dropout: float, args: argparse.Namespace) -> int:
    """Return the bytes that the seven adapters per block must keep."""
    tokens, element = args.batch * args.length, 4 if precision == "fp32" else 2
    inputs = 2 * args.width + args.hidden  # of q, k and v; of gate and up; of down
    bits = (6 * ((args.width + 7) // 8) + (args.hidden + 7) // 8) if dropout else 0
    return args.layers * tokens * ((inputs + 7 * step.RANK) * element + bits)


def kept(model: nn.Module, precision: str, args: argparse.Namespace) -> int:
    _, x, context = step.setting(precision, args)
    # Both bounds are zero, so that the fast path is always taken.
    with context(), mock.patch.multiple(ops, _FEW=0, _FEW_TO_DROP=0):
        return measuring.saved_bytes(lambda: model(x), [x, *model.parameters()])


def main(argv: Sequence[str] | None = None) -> list[measuring.Row]:
    args = measuring.parser(__doc__, **step.SIZES).parse_args(argv)
    if args.smoke:
        vars(args).update(layers=1, width=64, hidden=160, batch=1, length=512)
    rows = []
    for (precision, dropout), reach in REACH.items():
        base, _, _ = step.setting(precision, args)
        found = {
            name: kept(model, precision, args)
            for name, model in step.variants(base, dropout, has_peft=step.HAS_PEFT).items()
            if name != "composed"
        }
        above = {name: size - found["frozen"] for name, size in found.items()}
        what = f"kept above frozen, {precision}, dropout {dropout}"
        if step.HAS_PEFT:
            rows.append(measuring.Row(f"{what}: ours / PEFT", above["ours"] / above["PEFT"], reach=reach))
        if precision != "bf16-mixed":  # where the frozen model keeps copies of its weights and ours does not
            exact = formula(precision, dropout, args)
            rows.append(measuring.Row(f"{what}: ours / formula", above["ours"] / exact, reach=1.01))
        rows.append(measuring.Row(f"{what}: ours, MiB", above["ours"] / 2**20))
    return measuring.report(rows, args)


if __name__ == "__main__":
    main()
