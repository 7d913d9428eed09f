"""Script of the processes in ``test_ranks.py``: a rank schedule under several strategies, whole and resumed.

Arguments: the results directory, the number of processes, and the modes.
"""

from __future__ import annotations

import sys
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_lora import LoRACallback
from tests.distributed import strategy_job
from tests.toys import loader

STEPS = 12


class Watch(Callback):
    """Records after each step which components are in use."""

    def __init__(self) -> None:
        self.masks: list[dict[str, list[float]]] = []

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, *_: Any) -> None:
        buffers = pl_module.named_buffers()
        self.masks.append({name: mask.tolist() for name, mask in buffers if name.endswith(".mask")})


def fit(directory: Path, mode: str, processes: int, resumed: str | None = None, **options: Any) -> dict[str, Any]:
    module, watch = strategy_job.module_of(mode), Watch()
    checkpoint = ModelCheckpoint(directory / mode, "{step}", every_n_train_steps=1, save_top_k=-1)
    schedule = {"max_rank": 4, "every": 0.1, **options}
    lora = LoRACallback(rank=2, rank_schedule=schedule, export_dir=str(directory / mode / "peft"), overwrite=True)
    run = strategy_job.run_of(mode, processes, lora, watch, checkpoint, max_steps=STEPS, max_epochs=-1)
    run.fit(module, loader(8), ckpt_path=resumed)
    saved = directory / mode / f"step={STEPS}.ckpt"
    return {"masks": watch.masks, "losses": module.losses, "ranks": lora.ranks(), "last": str(saved)}


def refused(mode: str, processes: int) -> str:
    """Return the error of a fit."""
    run = strategy_job.run_of(mode, processes, LoRACallback(rank=2, rank_schedule="cubic"), max_steps=STEPS)
    try:
        run.fit(strategy_job.module_of(mode), loader(8))
    except MisconfigurationException as error:
        return str(error)
    return "nothing"


def main() -> None:
    warnings.simplefilter("ignore")
    directory, processes, *modes = Path(sys.argv[1]), int(sys.argv[2]), *sys.argv[3:]
    results: dict[str, Any] = {}
    for mode in modes:
        whole = fit(directory, mode, processes)
        half = directory / mode / "step=5.ckpt"
        results[mode] = {"whole": whole, "resumed": fit(directory / "again", mode, processes, str(half))}
    results["energy"] = fit(directory / "energy", "ddp", processes, score="energy")
    results["refused"] = {mode: refused(mode, processes) for mode in ("fsdp1", "tp")}
    torch.save(results, directory / f"rank{dist.get_rank()}.pt")


if __name__ == "__main__":
    main()
