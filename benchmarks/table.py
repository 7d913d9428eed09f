"""Every quantity with a target, measured and judged in one table; the other scripts show the details.

    python benchmarks/table.py

Takes some minutes on a CPU. With a GPU, ``gpu.py`` adds its rows.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable, Sequence

import attach
import checkpoint
import gpu
import growth
import measuring
import memory
import merge
import overhead
import step
import torch


def quietly(main: Callable[[Sequence[str]], list[measuring.Row]], argv: list[str]) -> list[measuring.Row]:
    """Return the rows with a target."""
    with contextlib.redirect_stdout(io.StringIO()):
        return [row for row in main(argv) if row.reach is not None]


def main(argv: Sequence[str] | None = None) -> list[measuring.Row]:
    args = measuring.parser(__doc__, rounds=7).parse_args(argv)
    few = ["--smoke"] if args.smoke else ["--rounds", str(args.rounds)]
    rows = []
    mains = (step.main, memory.main, attach.main, merge.main, checkpoint.main, growth.main, overhead.main)
    for each in mains:
        rows += quietly(each, few)
    if torch.cuda.is_available() and not args.smoke:
        rows += quietly(gpu.main, [])
    else:
        print("No GPU: the rows of gpu.py are missing.")
    return measuring.report(rows, args)


if __name__ == "__main__":
    main()
