"""Loading: an adapter on disk as one value, and into a model."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from os import PathLike
from pathlib import Path
from typing import Any

from torch import nn

from lightning_lora.attachment import AttachReport, get_attachment, named_tensors
from lightning_lora.config import LoRAConfig
from lightning_lora.names import module_names
from lightning_lora.peft_format.directory import PeftFile, read_directory
from lightning_lora.peft_format.loading import load_directory
from lightning_lora.state import check_not_merged, copy_adapter_state, record_problems, refuse_other_base
from lightning_lora.storage.checkpoint import CheckpointFile, checkpoint_file
from lightning_lora.surgery import attach, detach


def read_adapter(path: str | PathLike[str]) -> PeftFile | CheckpointFile:
    """Read an adapter without its model: a ``.ckpt`` of a LoRACallback run, or a PEFT directory.

    Raises:
        ValueError: It cannot be read, or holds no adapter.
        FileNotFoundError: It does not exist.
    """
    return read_directory(path) if Path(path).is_dir() else checkpoint_file(path)


def load_adapter(module: nn.Module, path: str | PathLike[str], *, check_base: bool = True) -> AttachReport:
    """Attach and load a saved adapter; the file alone says everything needed.

    Args:
        module: A base model of the trained kind with its pretrained weights, adapted in the same way or not at all.
        path: A ``.ckpt`` written under a ``LoRACallback``, or a directory written by ``save_adapter`` or by PEFT. The
            model that a directory's names are relative to is found in the module by those names.
        check_base: Refuse a base with other values than those that the adapter was trained on, if the file holds a
            fingerprint; the same values in another precision are accepted.

    Returns:
        What was adapted.

    Raises:
        ValueError: The file cannot be read, or does not fit the module or its base. Nothing was changed.
        RuntimeError: Another adapter was merged into this module for good.
    """
    file = read_adapter(path)
    check_not_merged(module, file.merges)
    if isinstance(file, PeftFile):
        return load_directory(module, file, check_base=check_base)
    if check_base:
        refuse_other_base(module, file.base)
    return _attach_and_load(module, file)


def _attach_and_load(module: nn.Module, file: CheckpointFile) -> AttachReport:
    """Attach what the record says, or nothing at all."""
    with ExitStack() as undo:
        reports = [attach_entry(module, entry, undo) for entry in file.record["adapters"]]
        if problems := record_problems(module, file.record):
            raise ValueError("The checkpoint does not fit this model:\n" + "\n".join(f"  - {p}" for p in problems))
        known = named_tensors(module).keys()
        if not file.tensors.keys() <= known:  # states of metrics, say; walking all that a model would save takes longer
            known = module.state_dict().keys()
        copy_adapter_state(module, file.tensors, known=known)
        undo.pop_all()
    return reports[0]


def attach_entry(module: nn.Module, entry: Mapping[str, Any], undo: ExitStack) -> AttachReport:
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
