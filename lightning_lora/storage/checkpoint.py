"""The ``.ckpt`` files of a LoRACallback run: reading them with clear errors, and adapters back out of them."""

from __future__ import annotations

import pickle
import struct
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lightning_lora.attachment import AttachReport, get_attachment, named_tensors
from lightning_lora.config import LoRAConfig
from lightning_lora.fingerprint import Sample, from_plain
from lightning_lora.names import module_names
from lightning_lora.peft_format.directory import is_adapter_directory
from lightning_lora.peft_format.loading import load_directory
from lightning_lora.state import (
    FORMAT_VERSION,
    check_not_merged,
    copy_adapter_state,
    record_problems,
    refuse_other_base,
)
from lightning_lora.surgery import attach, detach

RECORD_KEY = "lightning_lora"

# What torch.load raises for files that are truncated, empty or something else altogether.
_UNREADABLE = (
    pickle.UnpicklingError,
    EOFError,
    RuntimeError,
    zipfile.BadZipFile,
    zlib.error,
    struct.error,
    LookupError,
    ValueError,
    OSError,
)


@contextmanager
def reading(path: object) -> Iterator[None]:
    """Turn whatever a reader raises for a file that is no checkpoint into one clear error.

    Raises:
        ValueError: The file cannot be read.
        FileNotFoundError: There is none.
    """
    try:
        _check_sums(path)
        yield
    except (FileNotFoundError, PermissionError):
        raise
    except _UNREADABLE as error:
        raise ValueError(
            f"{str(path)!r} cannot be read as a Lightning checkpoint; it may be truncated or something else. Nothing "
            f"was changed. The reader said: {type(error).__name__}: {error}"
        ) from error


def _check_sums(path: object) -> None:
    """Refuse a file with flipped bits: torch's reader takes tensors as they come, without looking at their sums."""
    file = Path(str(path))
    if file.is_file() and zipfile.is_zipfile(file):
        with zipfile.ZipFile(file) as archive:
            if (damaged := archive.testzip()) is not None:
                raise zipfile.BadZipFile(f"the bytes of {damaged!r} do not have the sum that they were written with")


def check_is_checkpoint(checkpoint: object, path: object) -> None:
    """Refuse what torch could read but Lightning did not write.

    Raises:
        ValueError: It has no state dict.
    """
    if not (isinstance(checkpoint, dict) and isinstance(checkpoint.get("state_dict"), dict)):
        raise ValueError(f"{str(path)!r} is no Lightning checkpoint: it has no 'state_dict'. Nothing was changed.")


def load_adapter(module: nn.Module, path: str | PathLike[str], *, check_base: bool = True) -> AttachReport:
    """Attach and load a saved adapter; the file alone says everything needed.

    Args:
        module: A base model of the trained kind with its pretrained weights, adapted in the same way or not at all.
        path: A ``.ckpt`` written under a ``LoRACallback``, or a directory written by ``save_adapter`` or by PEFT. The
            model that a directory's names are relative to is found in the module by those names.
        check_base: Refuse a base whose values are not those that the adapter was trained on, as far as the file says;
            another precision of the same is none.

    Returns:
        What was adapted.

    Raises:
        ValueError: The file is no such checkpoint, or does not fit the module, or its base. Nothing was changed.
        RuntimeError: Another adapter was merged into this module for good.
    """
    if is_adapter_directory(path):
        return load_directory(module, path, check_base=check_base)
    record, state = read_checkpoint(path)
    check_not_merged(module, record["merges"])
    if check_base:
        refuse_other_base(module, recorded_base(record))
    return _attach_and_load(module, record, state)


def read_checkpoint(path: str | PathLike[str]) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Return the record and the state of the adapter in a ``.ckpt``.

    Raises:
        ValueError: It cannot be read, or holds no adapter.
        FileNotFoundError: It is not there.
    """
    if not Path(path).exists():
        raise FileNotFoundError(
            f"{str(path)!r} is not there; name a PEFT directory, or the .ckpt of a LoRACallback run."
        )
    with reading(path):
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    check_is_checkpoint(checkpoint, path)
    record = checkpoint.get(RECORD_KEY)
    if record is None:
        raise ValueError(f"{str(path)!r} holds no adapter: it was not written under a LoRACallback.")
    check_record(record, path)
    return record, checkpoint["state_dict"]


def check_record(record: Any, path: object) -> None:
    """Refuse a record that this version cannot read.

    Raises:
        ValueError: It is of a newer format, or incomplete.
    """
    version = record.get("format_version", 0) if isinstance(record, dict) else 0
    if isinstance(version, int) and version > FORMAT_VERSION:
        raise ValueError(
            f"{str(path)!r} has format version {record['format_version']}; this lightning_lora reads up to "
            f"{FORMAT_VERSION}. Update it."
        )
    if not isinstance(record, dict) or not {"adapters", "layers", "merges"} <= record.keys():
        raise ValueError(f"The record of the adapter in {str(path)!r} is incomplete; the file was changed or damaged.")


def recorded_base(record: Mapping[str, Any]) -> dict[str, Sample]:
    """Return the fingerprint of the base that an adapter was trained on; empty if its record has none.

    Raises:
        ValueError: It makes no sense.
    """
    return from_plain(record.get("base", {}))


def saved_options(record: Mapping[str, Any] | None) -> tuple[LoRAConfig, int] | None:
    """Return the config and the seed of an adapter that was attached to the whole module, or None."""
    try:
        [entry] = record["adapters"] if record is not None else []
        return (LoRAConfig.from_dict(entry["config"]), int(entry["seed"])) if entry["root"] == "" else None
    except (KeyError, TypeError, ValueError):
        return None


def _attach_and_load(module: nn.Module, record: dict[str, Any], state: dict[str, torch.Tensor]) -> AttachReport:
    """Attach what the record says, or nothing at all."""
    with ExitStack() as undo:
        reports = [attach_entry(module, entry, undo) for entry in record["adapters"]]
        if problems := record_problems(module, record):
            raise ValueError("The checkpoint does not fit this model:\n" + "\n".join(f"  - {p}" for p in problems))
        known = named_tensors(module).keys()
        if not state.keys() <= known:  # states of metrics, say; walking all that a model would save takes longer
            known = module.state_dict().keys()
        copy_adapter_state(module, state, known=known)
        undo.pop_all()
    return reports[0]


def attach_entry(module: nn.Module, entry: dict[str, Any], undo: ExitStack) -> AttachReport:
    """Attach what one entry of a record says; ``undo`` takes it back.

    Raises:
        ValueError: It does not fit the module.
    """
    modules = module_names(module)
    if entry["root"] not in modules:
        raise ValueError(
            f"The adapter was attached to {entry['root']!r}, which {type(module).__name__} does not have. Load it "
            "into a module of the trained kind."
        )
    target = modules[entry["root"]][0]
    before = get_attachment(target)
    report = attach(
        target, LoRAConfig.from_dict(entry["config"]), seed=entry["seed"] if before is None else before.seed
    )
    if before is None:
        undo.callback(detach, target)
    return report
