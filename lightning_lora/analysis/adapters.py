"""One reader for every place where an adapter can be."""

from __future__ import annotations

from os import PathLike
from pathlib import Path

from torch import nn

from lightning_lora.analysis.files import matrices_of_checkpoint, matrices_of_directory
from lightning_lora.analysis.matrices import AdapterMatrix, matrices_of_module


def read_matrices(
    source: nn.Module | str | PathLike[str], base: nn.Module | None = None, *, tokens: bool = False
) -> list[AdapterMatrix]:
    """Return the updates of an adapter, one matrix each.

    Args:
        source: An adapted module, a ``.ckpt`` written under a ``LoRACallback``, or a PEFT directory, whoever wrote it.
        base: The base model of a file, for the weights; it may carry adapters itself, and is left as it is. Without it
            the matrices have no weight.
        tokens: Whether to include trained rows of embeddings, as the change of those rows; needs the base. A directory
            or checkpoint of nothing else is empty without.

    Raises:
        ValueError: The source has no adapters, cannot be read or does not fit the base.
        FileNotFoundError: There is no such file.
        RuntimeError: The adapters are merged into the weights at the moment, or others were for good.
    """
    if isinstance(source, nn.Module):
        if base is not None:
            raise ValueError("An adapted module holds its base; leave base out.")
        return matrices_of_module(source, tokens=tokens)
    if tokens and base is None:
        raise ValueError("tokens=True needs the base: a file holds the trained rows, not how they changed.")
    if Path(source).is_dir():
        return matrices_of_directory(source, base, tokens=tokens)
    return matrices_of_checkpoint(source, base, tokens=tokens)
