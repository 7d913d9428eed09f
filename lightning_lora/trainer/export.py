"""The adapter of a finished fit as a PEFT directory, wherever the module's own tensors are."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from os import PathLike
from pathlib import Path

import torch
from torch import Tensor, nn

from lightning_lora.fingerprint import Fingerprint
from lightning_lora.names import clean_name, join, listed
from lightning_lora.peft_format.directory import TENSORS_FILE
from lightning_lora.peft_format.files import exported, save_adapter
from lightning_lora.storage.safetensors import read_file


def refused_export(module: nn.Module) -> str | None:
    """Return what PEFT cannot express of a module's adapters, so that it is said before training; or None."""
    refused = exported(module).refused
    if not refused:
        return None
    reasons = "\n".join(f"  - {name}: {reason}" for name, reason in refused.items())
    return f"export_dir: PEFT cannot express these adapters, so nothing could be exported after training:\n{reasons}"


def export_fit(
    module: nn.Module,
    directory: str | PathLike[str],
    state: Mapping[str, Tensor],
    shapes: Mapping[str, torch.Size],
    base: Fingerprint,
) -> None:
    """Write an adapter of a module and read it back; the module stays as it is.

    Args:
        module: The adapted module, whose own tensors may be spread over processes.
        directory: Where to write.
        state: What was trained, whole: name -> tensor.
        shapes: Shapes of the base parameters that this process does not see whole.
        base: The fingerprint of the module's base.

    Raises:
        ValueError: It holds NaN or infinity, or PEFT cannot express it. Nothing was written.
        RuntimeError: What was written is not what was to be written.
    """
    if broken := [name for name, tensor in state.items() if not tensor.isfinite().all()]:
        raise ValueError(
            f"export_dir={str(directory)!r}: {listed(broken)} hold NaN or infinity, so training diverged. Nothing was "
            "written."
        )
    hidden = {name: torch.zeros(()).expand(shape) for name, shape in shapes.items()}  # their values are not asked for
    with _in_their_place(module, {**hidden, **state}):
        save_adapter(module, directory, base=base)
        _verify(module, Path(directory))


@contextmanager
def _in_their_place(module: nn.Module, tensors: Mapping[str, Tensor]) -> Iterator[None]:
    """Put other tensors in the place of a module's parameters and buffers for a while."""
    before = [
        (table, key, tensor, name)
        for path, part in module.named_modules()
        for table in (part._parameters, part._buffers)
        for key, tensor in table.items()
        if tensor is not None and (name := clean_name(join(path, key))) in tensors
    ]
    others: dict[int, Tensor] = {}  # tied ones stay tied
    for table, key, old, name in before:
        table[key] = others.setdefault(id(old), _as_kind(tensors[name], old))
    try:
        yield
    finally:
        for table, key, old, _ in before:
            table[key] = old


def _as_kind(new: Tensor, old: Tensor) -> Tensor:
    return nn.Parameter(new, old.requires_grad) if isinstance(old, nn.Parameter) else new


def _verify(module: nn.Module, directory: Path) -> None:
    wanted, (found, _) = exported(module).tensors(), read_file(directory / TENSORS_FILE)
    if wanted.keys() != found.keys() or not all(
        torch.equal(found[key], tensor.cpu()) for key, tensor in wanted.items()
    ):
        raise RuntimeError(f"The adapter in {str(directory)!r} is not what was written; is the disk failing?")
