"""Script of the processes of two "machines" in ``test_nodes.py``, started by ``torchrun`` or as in SLURM."""

from __future__ import annotations

import os
import signal
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback

from lightning_lora import LoRACallback
from tests.distributed import deepspeed_job
from tests.distributed.strategy_job import LORA, Wide, fit, strategy
from tests.toys import loader, trainer

STAGES = {"deepspeed 2": "2", "deepspeed 3": "3"}


class Requeued(Callback):
    """Sends the signal that SLURM sends before the time limit."""

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        os.kill(os.getpid(), signal.SIGUSR1)


def losses_before_and_after_a_requeue(directory: Path) -> list[float]:
    """Train one epoch, let SLURM requeue the job at its end, and train another as the new job."""
    losses = []
    for epochs, callbacks in ((1, [Requeued()]), (2, [])):
        module = Wide()
        run = trainer(
            LoRACallback(**LORA),
            *callbacks,
            root=directory,
            max_epochs=epochs,
            max_steps=-1,
            strategy=strategy("ddp", 2),
            num_nodes=2,
            use_distributed_sampler=False,
        )
        run.fit(module, loader(16))
        losses += module.losses
    return losses


def resumed(directory: Path, mode: str, processes: int, single: str, single_float: str) -> dict[str, Any]:
    """Resume from the checkpoint of a single process."""
    if mode in STAGES:
        return deepspeed_job.fit(directory, "resumed", STAGES[mode], 2, single_float, processes=processes, nodes=2)
    return fit(directory, "resumed", mode, processes, 2, single, nodes=2)


def main() -> None:
    warnings.simplefilter("ignore")
    directory, single, single_float, *modes = Path(sys.argv[1]), *sys.argv[2:]
    is_slurm = "SLURM_PROCID" in os.environ
    processes = int(os.environ["SLURM_NTASKS" if is_slurm else "WORLD_SIZE"])
    results: dict[str, Any] = {mode: resumed(directory, mode, processes, single, single_float) for mode in modes}
    if is_slurm:
        results["requeued"] = {"losses": losses_before_and_after_a_requeue(directory)}
    torch.save(results, directory / f"rank{os.environ['SLURM_PROCID' if is_slurm else 'RANK']}.pt")


if __name__ == "__main__":
    main()
