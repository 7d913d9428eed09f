"""The ``.ckpt`` files of a LoRACallback run: reading them with clear errors, and adapters back out of them."""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from os import PathLike
from typing import Any

import torch
from torch import nn

from lightning_lora.attachment import get_attachment
from lightning_lora.config import LoRAConfig
from lightning_lora.report import AttachReport
from lightning_lora.state import check_not_merged, load_adapter_state_dict, record_problems
from lightning_lora.surgery import attach, detach

RECORD_KEY = "lightning_lora"

# What torch.load raises for files that are truncated, empty or something else altogether.
_UNREADABLE = (pickle.UnpicklingError, EOFError, RuntimeError, zipfile.BadZipFile, LookupError, ValueError, OSError)


@contextmanager
def reading(path: object) -> Iterator[None]:
    """Turn whatever a reader raises for a file that is no checkpoint into one clear error.

    Raises:
        ValueError: The file cannot be read.
        FileNotFoundError: There is none.
    """
    try:
        yield
    except (FileNotFoundError, PermissionError):
        raise
    except _UNREADABLE as error:
        raise ValueError(
            f"{str(path)!r} cannot be read as a Lightning checkpoint; it may be truncated or something else. Nothing "
            f"was changed. The reader said: {type(error).__name__}: {error}"
        ) from error


def check_is_checkpoint(checkpoint: object, path: object) -> None:
    """Refuse what torch could read but Lightning did not write.

    Raises:
        ValueError: It has no state dict.
    """
    if not (isinstance(checkpoint, dict) and isinstance(checkpoint.get("state_dict"), dict)):
        raise ValueError(f"{str(path)!r} is no Lightning checkpoint: it has no 'state_dict'. Nothing was changed.")


def load_adapter(module: nn.Module, path: str | PathLike[str]) -> AttachReport:
    """Attach and load the adapter that a LoRACallback run saved; the file alone says everything needed.

    Args:
        module: A base model of the trained kind with its pretrained weights, adapted in the same way or not at all.
        path: A ``.ckpt`` written under a ``LoRACallback``.

    Returns:
        What was adapted.

    Raises:
        ValueError: The file is no such checkpoint, or does not fit the module. Nothing was changed.
        RuntimeError: Another adapter was merged into this module for good.
    """
    with reading(path):
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    check_is_checkpoint(checkpoint, path)
    record = checkpoint.get(RECORD_KEY)
    if record is None:
        raise ValueError(f"{str(path)!r} holds no adapter: it was not written under a LoRACallback.")
    check_not_merged(module, record["merges"])
    return _attach_and_load(module, record, checkpoint["state_dict"])


def _attach_and_load(module: nn.Module, record: dict[str, Any], state: dict[str, torch.Tensor]) -> AttachReport:
    [entry] = record["adapters"]
    target = module.get_submodule(entry["root"])
    was_attached = get_attachment(target) is not None
    report = attach(target, LoRAConfig.from_dict(entry["config"]), seed=entry["seed"])
    try:
        if problems := record_problems(module, record):
            raise ValueError("The checkpoint does not fit this model:\n" + "\n".join(f"  - {p}" for p in problems))
        load_adapter_state_dict(module, state)
    except ValueError:
        if not was_attached:
            detach(target)
        raise
    return report
