"""How a checkpoint becomes one file, whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from lightning.pytorch.plugins.io import TorchCheckpointIO
from lightning.pytorch.strategies import Strategy

from lightning_lora.trainer.import_names import with_twins


@contextmanager
def in_one_move(strategy: Strategy, filepath: Any) -> Iterator[Any]:
    """Give a place beside a file to write to, and move what was written there in one step.

    Lightning writes to the system's temporary folder first. Where that is another disk, moving is copying, and a
    process that is killed then leaves half a checkpoint under its final name.
    """
    path = Path(strategy.broadcast(filepath))
    if type(strategy.checkpoint_io) not in with_twins(TorchCheckpointIO) or "://" in str(filepath) or path.is_dir():
        yield filepath
        return
    place = path.with_name(f".{path.name}.part")
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
