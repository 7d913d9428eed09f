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
from torch.distributed.launcher.api import elastic_launch
from torch.distributed.run import config_from_args, parse_args

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


def train(*arguments: str) -> None:
    warnings.simplefilter("ignore")
    directory, single, single_float, *modes = Path(arguments[0]), *arguments[1:]
    is_slurm = "SLURM_PROCID" in os.environ
    processes = int(os.environ["SLURM_NTASKS" if is_slurm else "WORLD_SIZE"])
    results: dict[str, Any] = {mode: resumed(directory, mode, processes, single, single_float) for mode in modes}
    if is_slurm:
        results["requeued"] = {"losses": losses_before_and_after_a_requeue(directory)}
    torch.save(results, directory / f"rank{os.environ['SLURM_PROCID' if is_slurm else 'RANK']}.pt")


def torchrun(command: list[str]) -> None:
    """Do what the command does, but fork its processes from this one, so that they need not import everything again."""
    options = parse_args(command)
    config, _, _ = config_from_args(options)
    config.start_method = "fork"
    elastic_launch(config, train)(*options.training_script_args)


if __name__ == "__main__":
    if "SLURM_PROCID" in os.environ:
        train(*sys.argv[1:])
    else:
        torchrun(sys.argv[1:])
