"""An adapter on disk as one value, whatever wrote it: a checkpoint of a LoRACallback run, or a PEFT directory."""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from lightning_lora.fingerprint import Fingerprint


class StoredWeight(NamedTuple):
    """The weight that an adapter updates, as far as the file describes it.

    Attributes:
        name: Its name; None where only the model can tell.
        kind: The kind of its layer, by the name that the adapter classes give it; None where the file is not enough.
        shape: Its shape; empty if unknown.
        order: Its place among the parameters of its module.
        kernel: What the matrix of a convolution flattens, ``(channels, *positions)``, where there is no shape.
        writes_kernel: Whether these are of the layer's outputs, as in a transposed convolution.
    """

    name: str | None = None
    kind: str | None = None
    shape: tuple[int, ...] = ()
    order: int = 0
    kernel: tuple[int, ...] = ()
    writes_kernel: bool = False


class StoredLayer(NamedTuple):
    """The update of one layer.

    Attributes:
        label: The layer's name, or the parameter's, as the model spells it.
        A: ``(rank, in)``, of a stack ``(experts, rank, in)``.
        B: ``(out, rank)``, of a stack ``(experts, out, rank)``.
        rank: The rank; None where only the model can tell which of several ranks applies.
        scaling: The factor of ``B @ A``; None likewise.
        magnitude: The magnitudes of DoRA.
        bias: The bias of ``B``.
        weight: What the update is for.
        rows: The updated rows of the weight as ``[start, stop, step]``; empty means all.
        keys: The names of these tensors in the file.
    """

    label: str
    A: Tensor
    B: Tensor
    rank: int | None
    scaling: float | None
    magnitude: Tensor | None = None
    bias: Tensor | None = None
    weight: StoredWeight = StoredWeight()
    rows: tuple[tuple[int, ...], ...] = ()
    keys: tuple[str, ...] = ()

    @property
    def factors(self) -> dict[str, Tensor]:
        """The tensors of the update, by their short names."""
        named = {"A": self.A, "B": self.B, "magnitude": self.magnitude, "bias": self.bias}
        return {name: tensor for name, tensor in named.items() if tensor is not None}


class StoredTokens(NamedTuple):
    """The trained rows of an embedding.

    Attributes:
        rows: Their values.
        tokens: Which rows these are, in the order of the values; None if the file does not say.
        weight: The embedding's weight.
        key: The name of the values in the file.
    """

    rows: Tensor
    tokens: tuple[int, ...] | None
    weight: StoredWeight
    key: str


@dataclass(frozen=True)
class AdapterFile(ABC):
    """An adapter on disk, read without its model; the parts beyond the tensors are parsed when they are asked for.

    Attributes:
        path: The file or the directory.
        tensors: Every tensor, by its name relative to the model that was trained.
        options: The config, as the file spells it.
        merges: How many adapters had been merged into each layer of the base.
    """

    path: Path
    tensors: Mapping[str, Tensor]
    options: Mapping[str, Any]
    merges: Mapping[str, int]

    @property
    @abstractmethod
    def paths(self) -> set[str]:
        """The paths of all adapted modules, as the file spells them."""

    @property
    @abstractmethod
    def base(self) -> Fingerprint:
        """The fingerprint of the base that the adapter was trained on; empty if the file has none.

        Raises:
            ValueError: It is damaged.
        """

    @property
    @abstractmethod
    def layers(self) -> Mapping[str, StoredLayer]:
        """The low-rank updates, by their names in the file.

        Raises:
            ValueError: An update is incomplete or damaged.
        """

    @property
    @abstractmethod
    def tokens(self) -> Mapping[str, StoredTokens]:
        """The trained rows, by the names of their embeddings."""

    @property
    def adapter(self) -> str | None:
        """The name of this adapter, if the file holds several."""
        return None

    @property
    def adapters(self) -> Sequence[str]:
        """The names of all adapters in the file, if there are several."""
        return ()

    @functools.cached_property
    def others(self) -> dict[str, Tensor]:
        """Everything else that was trained: name -> tensor."""
        used = {key for layer in self.layers.values() for key in layer.keys} | {
            each.key for each in self.tokens.values()
        }
        return {name: tensor for name, tensor in self.tensors.items() if name not in used}

    @property
    def size(self) -> int:
        """The bytes of all tensors."""
        return sum(tensor.nbytes for tensor in self.tensors.values())


@contextmanager
def damage_named(path: object) -> Iterator[None]:
    """Turn the errors that damaged content causes into one that names the file.

    Raises:
        ValueError: The content is malformed.
    """
    try:
        yield
    except (KeyError, TypeError, AttributeError, IndexError, RuntimeError) as error:
        raise ValueError(
            f"The adapter in {str(path)!r} is malformed; the file may have been edited or damaged: "
            f"{type(error).__name__}: {error}"
        ) from error
