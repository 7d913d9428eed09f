"""Two adapters of one model, layer by layer: of other seeds, ranks, data or moments of a training.

The LoRA paper's section 7.2 compares ranks (figure 3) and seeds (figure 4) by what their factors ``A`` share. Here the
updates themselves are compared besides, so that it does not matter how they are split into factors.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from os import PathLike
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from typing_extensions import override

from lightning_lora.analysis.adapters import read_matrices
from lightning_lora.analysis.matrices import AdapterMatrix
from lightning_lora.analysis.places import kind_of, place
from lightning_lora.analysis.similarity import above_baseline, subspace_similarity, update_similarity
from lightning_lora.analysis.spectrum import ThinSVD, numerical_rank
from lightning_lora.attachment import table_lines
from lightning_lora.names import listed

_HEADER = ("layer", "ranks", "cosine", "in: first", "in: all", "chance", "out: first", "out: all", "chance")


class Overlap(NamedTuple):
    """How much two sets of directions share.

    Attributes:
        first: ``phi(1, 1)``: the squared cosine of the two leading directions.
        all: ``phi`` of all directions that the updates have: 1 if one set lies inside the other.
        chance: What ``all`` would be of random directions.
    """

    first: float
    all: float
    chance: float


@dataclass(frozen=True, kw_only=True, eq=False)
class LayerComparison:
    """What two updates of one weight share.

    Attributes:
        name: The layer, as in ``AdapterMatrix``.
        shape: ``(out, in)``.
        ranks: The numerical ranks of the updates: how many directions each has.
        norms: Their Frobenius norms.
        cosine: Of the angle between the updates as vectors: 1 the same, 0 nothing in common; NaN if one is zero.
        inputs: ``phi(i, j)`` of the directions of the input, ``(q1, q2)``; NaN beyond the numerical ranks.
        outputs: The same of the output.
        factors: The same of the factors ``A``, as in the paper; it depends on how the updates are split.
    """

    name: str
    shape: tuple[int, int]
    ranks: tuple[int, int]
    norms: tuple[float, float]
    cosine: float
    inputs: Tensor
    outputs: Tensor
    factors: Tensor

    @property
    def of_inputs(self) -> Overlap:
        """What the directions of the input share."""
        return self._overlap(self.inputs, self.shape[1])

    @property
    def of_outputs(self) -> Overlap:
        """What the directions of the output share."""
        return self._overlap(self.outputs, self.shape[0])

    def _overlap(self, phi: Tensor, dimension: int) -> Overlap:
        if not min(self.ranks):
            return Overlap(math.nan, math.nan, math.nan)
        last = phi[self.ranks[0] - 1, self.ranks[1] - 1]
        return Overlap(float(phi[0, 0]), float(last), max(self.ranks) / dimension)

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, for JSON; what cannot be told is None."""
        return {
            "name": self.name,
            "shape": list(self.shape),
            "ranks": list(self.ranks),
            "norms": list(self.norms),
            "cosine": _plain(self.cosine),
            "of_inputs": {key: _plain(value) for key, value in self.of_inputs._asdict().items()},
            "of_outputs": {key: _plain(value) for key, value in self.of_outputs._asdict().items()},
            "phi": {what: _rows(getattr(self, what)) for what in ("inputs", "outputs", "factors")},
        }


@dataclass(frozen=True, eq=False)
class AdapterComparison:
    """What two adapters share; ``print(comparison)`` shows a table.

    Attributes:
        layers: One entry for each matrix that both update.
        only_first: Names of those that only the first updates.
        only_second: Names of those that only the second updates.
    """

    layers: tuple[LayerComparison, ...]
    only_first: tuple[str, ...] = ()
    only_second: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, for JSON."""
        layers = [layer.to_dict() for layer in self.layers]
        return {"only_first": list(self.only_first), "only_second": list(self.only_second), "layers": layers}

    def rows(self) -> list[tuple[str, ...]]:
        """Return the table as text: a header, a row for each layer, and the medians."""
        rows = [(each.name, f"{each.ranks[0]}, {each.ranks[1]}", *map(_cell, _numbers(each))) for each in self.layers]
        medians = [_median([_numbers(layer)[at] for layer in self.layers]) for at in range(len(_HEADER) - 2)]
        return [_HEADER, *rows, ("median", "", *map(_cell, medians))]

    @override
    def __str__(self) -> str:
        count = len(self.layers)
        lines = [f"{count} update{'s' * (count != 1)} in both; 1 is the same, chance is what random directions share"]
        lines += table_lines(self.rows())
        for which, names in (("first", self.only_first), ("second", self.only_second)):
            lines += [f"only in the {which}: {listed(names)}"] if names else []
        return "\n".join(lines)


def compare(
    one: nn.Module | str | PathLike[str], other: nn.Module | str | PathLike[str], *, tokens: bool = False
) -> AdapterComparison:
    """Return what two adapters of one model share, layer by layer.

    Args:
        one: An adapted module, a ``.ckpt`` written under a ``LoRACallback``, or a PEFT directory.
        other: Another one: of the same model, whatever its ranks.
        tokens: Whether to include trained rows of embeddings; modules only, since files do not say what changed.

    Raises:
        ValueError: One has no adapters, cannot be read or is not finite, they share no layer, or are of other models.
        FileNotFoundError: There is no such file.

    Source:
        Hu et al. 2021, "LoRA", arXiv:2106.09685, section 7.2 and appendix H.
    """
    first, second = ({each.name: each for each in read_matrices(source, tokens=tokens)} for source in (one, other))
    both = [name for name in first if name in second]
    if not both:
        found = f"{listed(list(first), 3)} and {listed(list(second), 3)}"
        raise ValueError(f"The two adapters have no layer in common: they update {found}.")
    if other_shapes := [name for name in both if first[name].shape != second[name].shape]:
        name = other_shapes[0]
        raise ValueError(
            f"The adapters are of two models: {listed(other_shapes)} have other shapes, of {name} "
            f"{first[name].shape} and {second[name].shape}."
        )
    return AdapterComparison(
        tuple(_compared(first[name], second[name]) for name in both),
        tuple(name for name in first if name not in second),
        tuple(name for name in second if name not in first),
    )


@torch.no_grad()
def update_cosine(one: ThinSVD, other: ThinSVD) -> float:
    """Return the cosine of the angle between two updates as vectors, without forming them; NaN if one is zero.

    Args:
        one: ``thin_svd`` of one update of ``(out, in)``.
        other: The same of the other.
    """
    scale = float(torch.linalg.vector_norm(one.values) * torch.linalg.vector_norm(other.values))
    # <U1 S1 V1', U2 S2 V2'> = sum over i, j of s1_i s2_j (U1'U2)_ij (V1'V2)_ij
    shared = (one.U.T @ other.U) * (one.V.T @ other.V)
    return float(one.values @ shared @ other.values) / scale if scale else math.nan


def _compared(one: AdapterMatrix, other: AdapterMatrix) -> LayerComparison:
    first, second = one.svd(), other.svd()
    similarity = update_similarity(first, second)
    return LayerComparison(
        name=one.name,
        shape=one.shape,
        ranks=(numerical_rank(first.values), numerical_rank(second.values)),
        norms=(float(torch.linalg.vector_norm(first.values)), float(torch.linalg.vector_norm(second.values))),
        cosine=update_cosine(first, second),
        inputs=similarity.inputs,
        outputs=similarity.outputs,
        factors=subspace_similarity(one.A, other.A),
    )


# --- between the layers of one adapter


class KindSimilarity(NamedTuple):
    """What the updates of one kind of layer share from block to block.

    Attributes:
        kind: What the layers are in their blocks.
        blocks: The blocks, in their order.
        inputs: ``(blocks, blocks)``: ``phi`` of all directions of the input, with chance taken off: 0 is chance,
            1 the same. NaN where an update is zero.
        outputs: The same of the output.
    """

    kind: str
    blocks: tuple[str, ...]
    inputs: Tensor
    outputs: Tensor

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, for JSON; what cannot be told is None."""
        tables = {"inputs": _rows(self.inputs), "outputs": _rows(self.outputs)}
        return {"kind": self.kind, "blocks": list(self.blocks)} | tables


def layer_similarity(source: nn.Module | str | PathLike[str]) -> list[KindSimilarity]:
    """Return how much the updates of the same kind of layer share between the blocks of a model.

    Args:
        source: An adapted module, a ``.ckpt`` written under a ``LoRACallback``, or a PEFT directory.

    Returns:
        One entry for each kind of layer that is in several blocks with one shape, experts left out.
    """
    groups: dict[tuple[str, tuple[int, int]], list[AdapterMatrix]] = {}
    for matrix in read_matrices(source):
        if place(matrix.name)[0] and not matrix.name.endswith("]"):
            groups.setdefault((kind_of(matrix.name), matrix.shape), []).append(matrix)
    return [_between(kind, alike) for (kind, _), alike in groups.items() if len(alike) > 1]


def _between(kind: str, alike: Sequence[AdapterMatrix]) -> KindSimilarity:
    found = [each.svd().significant() for each in alike]
    tables = torch.full((2, len(found), len(found)), math.nan, dtype=torch.float64)
    for at, one in enumerate(found):
        for to, other in enumerate(found[: at + 1]):
            if len(one.values) and len(other.values):
                both = update_similarity(one, other)
                pair = [_above(both.inputs, alike[at].shape[1]), _above(both.outputs, alike[at].shape[0])]
                tables[:, at, to] = tables[:, to, at] = torch.tensor(pair, dtype=torch.float64)
    blocks = tuple(place(each.name)[0] for each in alike)
    return KindSimilarity(kind, blocks, tables[0], tables[1])


def _above(phi: Tensor, dimension: int) -> float:
    # Two sets that fill the space are the same by necessity: nothing can be above chance.
    return float(above_baseline(phi, dimension)[-1, -1]) if max(phi.shape) < dimension else math.nan


# --- showing


def _numbers(layer: LayerComparison) -> tuple[float, ...]:
    return (layer.cosine, *layer.of_inputs, *layer.of_outputs)


def _median(values: Sequence[float]) -> float:
    known = [value for value in values if not math.isnan(value)]
    return statistics.median(known) if known else math.nan


def _cell(value: float) -> str:
    return "-" if math.isnan(value) else f"{round(value, 3) + 0.0:.3f}"  # no minus before a zero


def _plain(value: float) -> float | None:
    return None if math.isnan(value) else value


def _rows(phi: Tensor) -> list[list[float | None]]:
    return [[_plain(round(value, 4)) for value in row] for row in phi.tolist()]
