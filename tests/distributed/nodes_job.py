"""What the processes do in ``test_nodes.py``, each started by the ``torchrun`` of its own "machine"."""

from __future__ import annotations

import os
import sys
import warnings
from pathlib import Path

import torch

from tests.distributed.strategy_job import fit


def main() -> None:
    warnings.simplefilter("ignore")
    directory, single, *modes = Path(sys.argv[1]), *sys.argv[2:]
    results = {mode: fit(directory, "resumed", mode, 2, 2, single, nodes=2) for mode in modes}
    torch.save(results, directory / f"rank{os.environ['RANK']}.pt")


if __name__ == "__main__":
    main()
