"""How a checkpoint becomes one file, whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lightning.pytorch.plugins.io import TorchCheckpointIO
from lightning.pytorch.strategies import Strategy


@contextmanager
def in_one_move(strategy: Strategy, filepath: Any) -> Iterator[Any]:
    """Give a place beside a file to write to, and move what was written there in one step.

    Lightning writes to the system's temporary folder first. Where that is another disk, moving is copying, and a
    process that is killed then leaves half a checkpoint under its final name.
    """
    path = Path(strategy.broadcast(filepath))
    if type(strategy.checkpoint_io) is not TorchCheckpointIO or "://" in str(filepath) or path.is_dir():
        yield filepath
        return
    place = path.with_name(f".{path.name}.part")
    yield place
    if strategy.is_global_zero:
        with place.open("rb") as written:
            os.fsync(written.fileno())
        place.replace(path)


@contextmanager
def one_file(strategy: Strategy) -> Iterator[None]:
    """Have a strategy that can write directories of shards write one file: an adapter is small."""
    ways = {"_state_dict_type": "full", "_save_distributed_checkpoint": False}
    before = {name: vars(strategy)[name] for name in ways if name in vars(strategy)}
    vars(strategy).update({name: ways[name] for name in before})
    try:
        yield
    finally:
        vars(strategy).update(before)
