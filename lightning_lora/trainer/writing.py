"""Checkpoint files that are there whole or not at all."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from lightning.pytorch.plugins.io import TorchCheckpointIO
from lightning.pytorch.strategies import Strategy

from lightning_lora.storage.atomic import ABANDONED
from lightning_lora.trainer.lightning_patches import with_twins

_PART = ".part"  # of a name while the file is being written


@contextmanager
def written_at_once(strategy: Strategy, filepath: Any) -> Iterator[Any]:
    """Yield a path beside ``filepath`` to write to, and rename what was written there in one step.

    Lightning writes to the system's temporary directory first. If that is another disk, moving is copying, and a
    process that is killed then leaves half a checkpoint under its final name.
    """
    path = Path(strategy.broadcast(filepath))
    if type(strategy.checkpoint_io) not in with_twins(TorchCheckpointIO) or "://" in str(filepath) or path.is_dir():
        yield filepath
        return
    place = path.with_name(f".{path.name}{_PART}")
    if strategy.is_global_zero:
        _remove_leftovers(path.parent)
    try:
        yield place
        if strategy.is_global_zero:
            with place.open("rb") as written:
                os.fsync(written.fileno())
            place.replace(path)
    except BaseException:
        if strategy.is_global_zero:
            with suppress(OSError):
                place.unlink()  # a full disk is not made fuller
        raise


def _remove_leftovers(folder: Path) -> None:
    """Remove parts of checkpoints that killed processes have left; a young one may be another run's, being written."""
    for part in folder.glob(f".*.ckpt{_PART}"):
        with suppress(OSError):
            if time.time() - part.stat().st_mtime > ABANDONED:
                part.unlink()
