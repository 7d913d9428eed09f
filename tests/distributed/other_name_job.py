"""Script of the processes in ``test_other_name.py``: the job of ``test_every_strategy.py`` with ``pytorch_lightning``.

Arguments: the results directory, the number of processes, the checkpoint of a single process, and the modes.
"""

from __future__ import annotations

import sys
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from tests.other_name import under_the_other_name


def main() -> None:
    warnings.simplefilter("ignore")
    directory, processes, single, *modes = Path(sys.argv[1]), int(sys.argv[2]), *sys.argv[3:]
    under_the_other_name("tests.toys")
    under_the_other_name("tests.distributed.cpu_fsdp")
    job: Any = under_the_other_name("tests.distributed.strategy_job")
    results: dict[str, Any] = {}
    for mode in modes:
        results[mode] = {
            "whole": job.fit(directory, "whole", mode, processes, 2),
            "from single": job.fit(directory, "from_single", mode, processes, 2, single),
            "Trainer": job.trainer().__class__.__module__,
        }
    torch.save(results, directory / f"rank{results[modes[0]]['whole']['rank']}.pt")
    dist.barrier()


if __name__ == "__main__":
    main()
