"""Which checkpoint a run is about to load: known here before its module is built, not only when it is wrapped."""

from __future__ import annotations

import functools
from types import ModuleType
from typing import Any

from lightning.fabric.utilities.cloud_io import get_filesystem
from lightning.pytorch import Trainer

from lightning_lora.storage.checkpoint import RECORD_KEY
from lightning_lora.storage.checkpoint_record import plain_values
from lightning_lora.trainer.import_names import change_both

_CHOSEN = "_lora_chosen"


def install() -> None:
    """Have Trainers remember the path that they have chosen.

    Lightning chooses it before anything else, keeps it to itself, and under strategies that shard it reads the file
    when the module is wrapped already and nothing can be attached any more.
    """
    change_both("trainer.connectors.checkpoint_connector", _remember)


def _remember(connectors: ModuleType) -> None:
    original = getattr(connectors._CheckpointConnector, "_select_ckpt_path", None)
    if original is None or hasattr(original, _CHOSEN):
        return

    @functools.wraps(original)
    def select(connector: Any, *args: Any, **kwargs: Any) -> Any:
        path = original(connector, *args, **kwargs)
        setattr(connector, _CHOSEN, path)
        return path

    setattr(select, _CHOSEN, True)
    connectors._CheckpointConnector._select_ckpt_path = select


def path_of(trainer: Trainer) -> str | None:
    """Return the path of what this run will load, or None; every process must call this."""
    path = getattr(trainer._checkpoint_connector, _CHOSEN, None)
    path = trainer.strategy.broadcast(path)
    return None if path is None else str(path)


def record_of(trainer: Trainer) -> Any:
    """Return the record of the adapter in what this run will load, or None; every process must call this."""
    path = path_of(trainer)
    if path is None:
        return None
    files = get_filesystem(path)
    if not files.isfile(path):
        return None  # a directory of shards; or nothing, which loading it will say
    with files.open(path, "rb") as stream:
        return plain_values(stream).get(RECORD_KEY)
