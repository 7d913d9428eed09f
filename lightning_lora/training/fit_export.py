"""The adapter of a finished fit as a PEFT directory: the best checkpoint's, or the last state."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from os import PathLike
from pathlib import Path

import torch
from torch import nn

from lightning_lora.checkpoint_file import read_checkpoint
from lightning_lora.peft_format.files import exported, read_tensors, save_adapter
from lightning_lora.state import adapter_state_dict, copy_adapter_state


def refused_export(module: nn.Module) -> str | None:
    """Return what PEFT cannot express of a module's adapters, so that it is said before training; or None."""
    refused = exported(module).refused
    if not refused:
        return None
    reasons = "\n".join(f"  - {name}: {reason}" for name, reason in refused.items())
    return f"export_dir: PEFT cannot express these adapters, so nothing could be exported after training:\n{reasons}"


def export_fit(module: nn.Module, directory: str | PathLike[str], checkpoint: str | None) -> None:
    """Write the adapter of a checkpoint, or the module's own, and read it back; the module stays as it is.

    Raises:
        ValueError: PEFT cannot express it, or the checkpoint cannot be read. Nothing was written.
        RuntimeError: What was written is not what was to be written.
    """
    with _state_of(module, checkpoint):
        save_adapter(module, directory)
        _verify(module, Path(directory))


@contextmanager
def _state_of(module: nn.Module, checkpoint: str | None) -> Iterator[None]:
    if not checkpoint:
        yield
        return
    own = adapter_state_dict(module)
    _, state = read_checkpoint(checkpoint)
    copy_adapter_state(module, {name: tensor for name, tensor in state.items() if name in own})
    try:
        yield
    finally:
        copy_adapter_state(module, own)


def _verify(module: nn.Module, directory: Path) -> None:
    wanted, found = exported(module).tensors(), read_tensors(directory)
    if wanted.keys() != found.keys() or not all(
        torch.equal(found[key], tensor.cpu()) for key, tensor in wanted.items()
    ):
        raise RuntimeError(f"The adapter in {str(directory)!r} is not what was written; is the disk failing?")
