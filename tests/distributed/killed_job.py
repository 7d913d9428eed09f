"""Script of the processes in ``test_damage.py`` until they are killed: ``python killed_job.py DIRECTORY MOMENT``."""

from __future__ import annotations

import errno
import os
import signal
import sys
import warnings
from contextlib import ExitStack
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest.mock import patch

from fsspec.implementations.local import LocalFileOpener
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy

from lightning_lora import LoRACallback
from tests.toys import Toy, loader, trainer

EPOCHS, STEPS = 4, 4  # steps of each epoch
DEADLY_STEP = 10  # in the third epoch
DEADLY_SAVE = 3  # in the third epoch
PATIENCE = 20  # seconds before a process gives up waiting


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


class DiesInTraining(Callback):
    def __init__(self, rank: int = 0) -> None:
        self.rank = rank

    def on_before_optimizer_step(self, trainer: Trainer, *_: Any) -> None:
        if trainer.global_step == DEADLY_STEP and trainer.global_rank == self.rank:
            die()


class DyingSaves:
    """Kills the process while it writes its third checkpoint, at the given moment."""

    def __init__(self, moment: str) -> None:
        self.moment, self.saves = moment, 0
        self.write, self.commit, self.replace = LocalFileOpener.write, LocalFileOpener.commit, Path.replace

    def is_now(self, moment: str) -> bool:
        return self.saves == DEADLY_SAVE and self.moment == moment

    def dying_write(self, file: Any, data: bytes) -> Any:
        self.saves += 1
        if self.is_now("half written"):
            self.write(file, data[: len(data) // 2])
            file.f.flush()
            die()
        return self.write(file, data)

    def dying_commit(self, file: Any) -> None:
        if self.is_now("written"):
            die()
        self.commit(file)
        if self.is_now("committed"):
            die()

    def dying_copy(self, source: str, target: str, **_: Any) -> str:
        data = Path(source).read_bytes()
        if self.is_now("half moved"):
            Path(target).write_bytes(data[: len(data) // 2])
            die()
        Path(target).write_bytes(data)
        return target

    def dying_replace(self, source: Path, target: Path) -> Path:
        moved = self.replace(source, target)
        if self.is_now("moved"):
            die()
        return moved

    def patches(self) -> ExitStack:
        stack = ExitStack()
        stack.enter_context(patch.object(LocalFileOpener, "write", lambda file, data: self.dying_write(file, data)))
        stack.enter_context(patch.object(LocalFileOpener, "commit", lambda file: self.dying_commit(file)))
        stack.enter_context(patch.object(Path, "replace", lambda source, target: self.dying_replace(source, target)))
        if self.moment == "half moved":
            stack.enter_context(patch("os.rename", other_device))
            stack.enter_context(patch("shutil.copyfile", self.dying_copy))
        return stack


def other_device(source: str, target: str) -> None:
    raise OSError(errno.EXDEV, "the folder for temporary files is on another device")


def fit(directory: Path, *callbacks: Callback, ckpt_path: str | None = None, **options: Any) -> tuple[Toy, Trainer]:
    module, checkpoint = Toy(), ModelCheckpoint(directory, filename="{epoch}", save_top_k=-1)
    defaults: dict[str, Any] = {"max_epochs": EPOCHS, "max_steps": -1, "root": directory}
    run = trainer(LoRACallback(rank=4), checkpoint, *callbacks, **(defaults | options))
    run.fit(module, loader(), ckpt_path=ckpt_path)
    return module, run


def main() -> None:
    warnings.simplefilter("ignore")
    directory, moment = Path(sys.argv[1]), sys.argv[2]
    if moment.startswith("rank"):
        rank = int(os.environ.get("LOCAL_RANK", "0"))
        (directory / f"pid{rank}").write_text(str(os.getpid()))
        strategy = DDPStrategy(process_group_backend="gloo", timeout=timedelta(seconds=PATIENCE))
        deadly = DiesInTraining(int(moment.removeprefix("rank")))
        fit(directory, deadly, strategy=strategy, devices=2, use_distributed_sampler=False)
    elif moment == "training":
        fit(directory, DiesInTraining())
    else:
        with DyingSaves(moment).patches():
            fit(directory)


if __name__ == "__main__":
    main()
