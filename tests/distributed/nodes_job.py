"""What the processes do in ``test_nodes.py``, each started by the ``torchrun`` of its own "machine"."""

from __future__ import annotations

import os
import sys
import warnings
from pathlib import Path

import torch

from tests.distributed import deepspeed_job
from tests.distributed.strategy_job import fit

STAGES = {"deepspeed 2": "2", "deepspeed 3": "3"}


def main() -> None:
    warnings.simplefilter("ignore")
    directory, single, single_float, *modes = Path(sys.argv[1]), *sys.argv[2:]
    processes = int(os.environ["WORLD_SIZE"])
    results = {
        mode: fit(directory, "resumed", mode, processes, 2, single, nodes=2) for mode in modes if mode not in STAGES
    } | {
        mode: deepspeed_job.fit(directory, "resumed", stage, 2, single_float, processes=processes, nodes=2)
        for mode, stage in STAGES.items()
        if mode in modes
    }
    torch.save(results, directory / f"rank{os.environ['RANK']}.pt")


if __name__ == "__main__":
    main()
