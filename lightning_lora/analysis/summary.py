"""What an adapter learned, layer by layer, as a value and as a table."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from os import PathLike
from typing import Any

import torch
from torch import nn
from typing_extensions import override

from lightning_lora.analysis.adapters import read_matrices
from lightning_lora.analysis.intruders import intruder_dimensions
from lightning_lora.analysis.matrices import AdapterMatrix
from lightning_lora.analysis.relation import Relation, relate
from lightning_lora.analysis.spectrum import effective_rank, energy_rank, numerical_rank, stable_rank
from lightning_lora.analysis.stored import stored_matrices
from lightning_lora.attachment import table_lines
from lightning_lora.names import listed

_HEADER = ("layer", "shape", "rank", "|dW|", "|dW|/|W|", "effective", "stable", "suggested", "amplification", "aligned")


@dataclass(frozen=True, kw_only=True)
class LayerAnalysis:
    """What one update is like.

    Attributes:
        name: Its name, as in ``AttachReport``; an expert of a stack has its number in brackets.
        shape: ``(out, in)``.
        rank: Rank of its factors.
        scaling: Factor of ``B @ A``.
        norm: Frobenius norm of the update.
        singular_values: Those of the update, in descending order.
        effective_rank: ``exp`` of their entropy.
        stable_rank: Squared norm over the squared largest one.
        numerical_rank: How many are not zero.
        suggested_rank: How many hold the energy that was asked for.
        relation: How it relates to its weight, where that is known.
        intruders: How many of the adapted weight's 10 leading directions the weight has nowhere, if asked for.
        is_rescaled: Whether DoRA rescales the rows of the sum besides, which none of the numbers see.
    """

    name: str
    shape: tuple[int, int]
    rank: int
    scaling: float
    norm: float
    singular_values: tuple[float, ...]
    effective_rank: float
    stable_rank: float
    numerical_rank: int
    suggested_rank: int
    relation: Relation | None = None
    intruders: int | None = None
    is_rescaled: bool = False

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, for JSON; what cannot be told is None."""
        plain = {key: list(value) if isinstance(value, tuple) else value for key, value in vars(self).items()}
        numbers = None if self.relation is None else self.relation._asdict()
        plain["relation"] = numbers and {k: None if math.isnan(v) else v for k, v in numbers.items()}
        return plain


@dataclass(frozen=True)
class AdapterAnalysis:
    """What an adapter learned; ``print(analysis)`` shows a table.

    Attributes:
        layers: One entry for each matrix.
        energy: The share of the squared norm that a suggested rank holds.
    """

    layers: tuple[LayerAnalysis, ...]
    energy: float

    @property
    def idle(self) -> list[str]:
        """Names of the updates that are zero: they were never trained, or learned nothing."""
        return [layer.name for layer in self.layers if not layer.numerical_rank]

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, for JSON."""
        return {"energy": self.energy, "idle": self.idle, "layers": [layer.to_dict() for layer in self.layers]}

    def rows(self) -> list[tuple[str, ...]]:
        """Return the table as text: a header, a row for each update, and the medians."""
        return [_HEADER, *(_row(layer) for layer in self.layers), self._medians()]

    @override
    def __str__(self) -> str:
        count = len(self.layers)
        lines = [f"{count} update{'s' * (count != 1)}; the suggested rank holds {self.energy:.0%} of the squared norm"]
        lines += table_lines(self.rows())
        if self.idle:
            lines.append(f"zero, as if never trained: {listed(self.idle)}")
        if found := [f"{layer.name} ({layer.intruders})" for layer in self.layers if layer.intruders]:
            lines.append(f"intruder dimensions: {listed(found)}")
        if rescaled := [layer.name for layer in self.layers if layer.is_rescaled]:
            lines.append(f"rescaled by DoRA's magnitudes besides, which is not counted here: {listed(rescaled)}")
        return "\n".join(lines)

    def _medians(self) -> tuple[str, ...]:
        def median(of: Callable[[LayerAnalysis], float | None]) -> str:
            values = [value for layer in self.layers if (value := of(layer)) is not None and not math.isnan(value)]
            return f"{statistics.median(values):.3g}" if values else "-"

        numbers = (
            lambda layer: layer.rank,
            lambda layer: layer.norm,
            lambda layer: layer.relation and layer.relation.ratio,
            lambda layer: layer.effective_rank,
            lambda layer: layer.stable_rank,
            lambda layer: layer.suggested_rank,
            lambda layer: layer.relation and layer.relation.amplification,
            lambda layer: layer.relation and layer.relation.alignment,
        )
        return ("median", "", *map(median, numbers))


def analyze(
    source: nn.Module | str | PathLike[str],
    base: nn.Module | str | PathLike[str] | None = None,
    *,
    energy: float = 0.99,
    tokens: bool = False,
    intruders: bool = False,
    progress: Callable[[int, int], None] | None = None,
    check_base: bool = True,
) -> AdapterAnalysis:
    """Return what an adapter learned, layer by layer.

    Args:
        source: An adapted module, a ``.ckpt`` written under a ``LoRACallback``, or a PEFT directory.
        base: The base model of a file, for what the update is to its weights; or where it is on disk, a folder with
            safetensors or one such file: then one weight at a time is in memory.
        energy: The share of the squared norm that a suggested rank must hold.
        tokens: Whether to include trained rows of embeddings, as the change of those rows.
        intruders: Whether to count intruder dimensions; it takes a full decomposition of every weight.
        progress: Called with the adapters done and their number, where the base is on disk.
        check_base: Refuse a base on disk of other values than those that the adapter was trained on.

    Raises:
        ValueError: The source has no adapters, cannot be read or does not fit the base; factors are not finite; or
            there are no weights to find intruders in.
        FileNotFoundError: There is no such file.
    """
    return AdapterAnalysis(
        tuple(_layers(_matrices(source, base, tokens, progress, check_base), energy, intruders)), energy
    )


def _matrices(
    source: nn.Module | str | PathLike[str],
    base: nn.Module | str | PathLike[str] | None,
    tokens: bool,
    progress: Callable[[int, int], None] | None,
    check_base: bool,
) -> Iterable[AdapterMatrix]:
    if base is None or isinstance(base, nn.Module):
        return read_matrices(source, base, tokens=tokens)
    if isinstance(source, nn.Module):
        raise ValueError("An adapted module holds its base; leave base out.")
    return stored_matrices(source, base, tokens=tokens, progress=progress, check_base=check_base)


def _layers(matrices: Iterable[AdapterMatrix], energy: float, intruders: bool) -> Iterator[LayerAnalysis]:
    for matrix in matrices:
        if intruders and matrix.weight is None:
            raise ValueError("intruders=True needs the weights: give the base model, not on the meta device.")
        svd = matrix.svd()
        yield LayerAnalysis(
            name=matrix.name,
            shape=matrix.shape,
            rank=matrix.rank,
            scaling=matrix.scaling,
            norm=float(torch.linalg.vector_norm(svd.values)),
            singular_values=tuple(svd.values.tolist()),
            effective_rank=effective_rank(svd.values),
            stable_rank=stable_rank(svd.values),
            numerical_rank=numerical_rank(svd.values),
            suggested_rank=energy_rank(svd.values, energy),
            relation=None if matrix.weight is None else relate(matrix.weight, svd),
            intruders=_intruders(matrix) if intruders else None,
            is_rescaled=matrix.is_rescaled,
        )


def _intruders(matrix: AdapterMatrix) -> int:
    assert matrix.weight is not None
    return len(intruder_dimensions(matrix.weight, matrix.A, matrix.B, matrix.scaling).indices)


def _row(layer: LayerAnalysis) -> tuple[str, ...]:
    known = layer.relation
    related = (known.ratio, known.amplification, known.alignment) if known else (math.nan,) * 3
    ratio, amplification, alignment = ("-" if math.isnan(value) else f"{value:.3g}" for value in related)
    ranks = (f"{layer.effective_rank:.2f}", f"{layer.stable_rank:.2f}", str(layer.suggested_rank))
    shape = f"{layer.shape[0]} x {layer.shape[1]}"
    return (layer.name, shape, str(layer.rank), f"{layer.norm:.3g}", ratio, *ranks, amplification, alignment)
