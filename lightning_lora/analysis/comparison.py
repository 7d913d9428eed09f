"""Compare two adapters of one model, or the layers of one adapter with each other.

The LoRA paper's section 7.2 compares ranks (figure 3) and seeds (figure 4) by what the factors ``A`` share. The updates
themselves are compared here too, which does not depend on how they are split into factors.
"""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from typing_extensions import override

from lightning_lora.analysis import spectrum
from lightning_lora.analysis.adapters import AdapterMatrix, kind_of, place, read_matrices, which_of_several
from lightning_lora.analysis.spectrum import known_median, plain, update_similarity
from lightning_lora.attachment import table_lines
from lightning_lora.names import listed, with_equal_roots

_ROUNDING = 1e-6  # relative, of float32 factors
_HEADER = ("layer", "ranks", "cosine", "in: first", "in: all", "chance", "out: first", "out: all", "chance")


# --- two adapters


class Overlap(NamedTuple):
    """Overlap of two sets of directions.

    Attributes:
        first: ``phi(1, 1)``: the squared cosine between the two leading directions.
        all: ``phi`` of all directions that the updates have: 1 if one set lies inside the other.
        chance: The value of ``all`` for random directions.
    """

    first: float
    all: float
    chance: float

    @property
    def above_chance(self) -> float:
        """``all`` rescaled so that 0 is chance and 1 the same directions; NaN where chance leaves no room."""
        return (self.all - self.chance) / (1 - self.chance) if self.chance < 1 else math.nan


def _overlap(phi: Tensor, ranks: Sequence[int], dimension: int) -> Overlap:
    if not min(ranks):
        return Overlap(math.nan, math.nan, math.nan)
    return Overlap(float(phi[0, 0]), float(phi[ranks[0] - 1, ranks[1] - 1]), max(ranks) / dimension)


@dataclass(frozen=True, kw_only=True, eq=False)
class LayerComparison:
    """Comparison of two updates of one weight.

    Attributes:
        name: The layer, as in ``AdapterMatrix``.
        shape: ``(out, in)``.
        ranks: The numerical ranks of the updates: how many directions each has.
        norms: Their Frobenius norms.
        cosine: Cosine of the angle between the updates as vectors: 1 the same, 0 nothing in common; NaN if one is zero.
        inputs: ``phi(i, j)`` of the input directions, ``(q1, q2)``; NaN beyond the numerical ranks.
        outputs: ``phi(i, j)`` of the output directions.
        factors: ``phi(i, j)`` of the factors ``A``, as in the paper; it depends on how the updates are split.
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
        """Overlap of the input directions."""
        return _overlap(self.inputs, self.ranks, self.shape[1])

    @property
    def of_outputs(self) -> Overlap:
        """Overlap of the output directions."""
        return _overlap(self.outputs, self.ranks, self.shape[0])

    @property
    def numbers(self) -> tuple[float, ...]:
        """The cosine and both overlaps, as in the table."""
        return (self.cosine, *self.of_inputs, *self.of_outputs)

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, for JSON; unknown ones are None."""
        phi = {"inputs": self.inputs, "outputs": self.outputs, "factors": self.factors}
        numbers = {key: value for key, value in vars(self).items() if key not in phi}
        found: dict[str, Any] = plain(
            numbers | {"of_inputs": self.of_inputs, "of_outputs": self.of_outputs, "phi": phi}
        )
        return found


@dataclass(frozen=True, eq=False)
class AdapterComparison:
    """Comparison of two adapters; ``print(comparison)`` shows a table.

    Attributes:
        layers: One entry for each matrix that both update.
        only_first: Names of the matrices that only the first updates.
        only_second: Names of the matrices that only the second updates.
        adapters: The names of the two, of one whose source has several.
    """

    layers: tuple[LayerComparison, ...]
    only_first: tuple[str, ...] = ()
    only_second: tuple[str, ...] = ()
    adapters: tuple[str | None, str | None] = (None, None)

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, for JSON."""
        layers = [layer.to_dict() for layer in self.layers]
        named = {"adapters": [*self.adapters]} if any(self.adapters) else {}
        return {**named, "only_first": [*self.only_first], "only_second": [*self.only_second], "layers": layers}

    def rows(self) -> list[tuple[str, ...]]:
        """Return the table as text: a header, a row for each layer, and the medians."""
        rows = [(each.name, f"{each.ranks[0]}, {each.ranks[1]}", *map(_cell, each.numbers)) for each in self.layers]
        medians = (known_median(layer.numbers[at] for layer in self.layers) for at in range(len(_HEADER) - 2))
        return [_HEADER, *rows, ("median", "", *map(_cell, medians))]

    @override
    def __str__(self) -> str:
        count = len(self.layers)
        lines = [f"{count} update{'s' * (count != 1)} in both; 1 is the same, chance is what random directions share"]
        lines += [f"the {w}: adapter {n!r}" for w, n in zip(("first", "second"), self.adapters, strict=True) if n]
        lines += table_lines(self.rows())
        for which, names in (("first", self.only_first), ("second", self.only_second)):
            lines += [f"only in the {which}: {listed(names)}"] if names else []
        return "\n".join(lines)


def compare(
    one: nn.Module | str | PathLike[str],
    other: nn.Module | str | PathLike[str],
    *,
    tokens: bool = False,
    root: str | None = None,
) -> AdapterComparison:
    """Return what two adapters of one model share, layer by layer.

    Args:
        one: An adapted module, a ``.ckpt`` written under a ``LoRACallback``, or a PEFT directory.
        other: Another adapter of the same model, of any ranks.
        tokens: Whether to include trained embedding rows; modules only, since files do not contain the change.
        root: Where one is a PEFT directory and the other is not: the attribute of the LightningModule that holds the
            directory's model, ``""`` if it is the module itself. By default it is found by the names.

    Raises:
        ValueError: An adapter cannot be read or is not finite, the two share no layer or are of different models, or
            the root does not fit.
        FileNotFoundError: A file does not exist.

    Source:
        Hu et al. 2021, "LoRA", arXiv:2106.09685, section 7.2 and appendix H.
    """
    first, second = ({each.name: each for each in read_matrices(source, tokens=tokens)} for source in (one, other))
    is_first, is_second = (not isinstance(each, nn.Module) and Path(each).is_dir() for each in (one, other))
    first, second = with_equal_roots(first, second, root, (is_first, is_second))
    both = [name for name in first if name in second]
    if not both:
        found = f"{listed(list(first), 3)} and {listed(list(second), 3)}"
        raise ValueError(f"The two adapters have no layer in common: they update {found}.")
    if differing := [name for name in both if first[name].shape != second[name].shape]:
        name = differing[0]
        raise ValueError(
            f"The adapters are of different models: the shapes of {listed(differing)} differ; {name} is "
            f"{first[name].shape} and {second[name].shape}."
        )
    return AdapterComparison(
        tuple(_compared(name, first[name], second[name]) for name in both),
        tuple(name for name in first if name not in second),
        tuple(name for name in second if name not in first),
        (which_of_several(one), which_of_several(other)),
    )


def _compared(name: str, one: AdapterMatrix, other: AdapterMatrix) -> LayerComparison:
    first, second = one.svd(), other.svd()
    similarity = update_similarity(first, second)
    return LayerComparison(
        name=name,
        shape=one.shape,
        ranks=(spectrum.numerical_rank(first.values), spectrum.numerical_rank(second.values)),
        norms=(first.norm, second.norm),
        cosine=spectrum.update_cosine(first, second),
        inputs=similarity.inputs,
        outputs=similarity.outputs,
        factors=spectrum.subspace_similarity(one.A, other.A),
    )


def likeness(comparison: AdapterComparison) -> list[str]:
    """Return what a comparison means, in a sentence for each question."""
    live = [layer for layer in comparison.layers if min(layer.ranks)]
    if not live:
        return ["No layer has two nonzero updates: there is nothing to compare."]
    if all(_are_equal(layer) for layer in live):
        lines = [f"The two adapters are the same in {_all_of(live)}, up to rounding."]
    else:
        lines = [*_of_directions(live), _of_cosines(live)]
    for which, names in (("first", comparison.only_first), ("second", comparison.only_second)):
        lines += [f"Only in the {which}: {listed(names)}."] if names else []
    return lines


def _are_equal(layer: LayerComparison) -> bool:
    """Return whether two updates are the same up to the rounding of float32 factors."""
    return layer.cosine > 1 - _ROUNDING and math.isclose(*layer.norms, rel_tol=_ROUNDING)


def _all_of(layers: Sequence[LayerComparison]) -> str:
    return layers[0].name if len(layers) == 1 else f"all {len(layers)} layers"


def _of_directions(live: Sequence[LayerComparison]) -> Iterator[str]:
    over = _all_of(live) if len(live) == 1 else f"medians over {len(live)} layers"
    for side, of in (("input", "of_inputs"), ("output", "of_outputs")):
        overlaps = [getattr(layer, of) for layer in live]
        first, every, chance = (statistics.median([each[at] for each in overlaps]) for at in range(3))
        yield (
            f"The leading {side} directions overlap by {first:.3f}, all of them by {every:.3f}, random ones "
            f"by {chance:.3f} ({over})."
        )


def _of_cosines(live: Sequence[LayerComparison]) -> str:
    cosines = {layer.name: layer.cosine for layer in live}
    middle, ordered = statistics.median(cosines.values()), sorted(cosines, key=cosines.__getitem__)
    least, most = ordered[0], ordered[-1]
    if f"{cosines[least]:.2f}" == f"{cosines[most]:.2f}":
        return f"As vectors, the updates have a cosine of {middle:.2f} in {_all_of(live)}."
    return (
        f"As vectors, the updates have a median cosine of {middle:.2f}: {most} is most alike ({cosines[most]:.2f}), "
        f"{least} least ({cosines[least]:.2f})."
    )


# --- the layers of one adapter


class KindSimilarity(NamedTuple):
    """Similarity of the updates of one layer kind between blocks.

    Attributes:
        kind: The name of the layers within their blocks.
        blocks: The blocks, in their order.
        inputs: ``(blocks, blocks)``: ``phi`` of all input directions above chance: 0 is chance, 1 the same directions.
            NaN where an update is zero.
        outputs: The same for the output directions.
    """

    kind: str
    blocks: tuple[str, ...]
    inputs: Tensor
    outputs: Tensor


def layer_similarity(source: nn.Module | str | PathLike[str]) -> list[KindSimilarity]:
    """Return how much the updates of the same kind of layer share between the blocks of a model.

    Args:
        source: An adapted module, a ``.ckpt`` written under a ``LoRACallback``, or a PEFT directory.

    Returns:
        One entry for each kind of layer that several blocks have with the same shape, without experts.
    """
    groups: dict[tuple[str, tuple[int, int]], list[AdapterMatrix]] = {}
    for matrix in read_matrices(source):
        if place(matrix.name)[0] and not matrix.name.endswith("]"):
            groups.setdefault((kind_of(matrix.name), matrix.shape), []).append(matrix)
    return [_between(kind, alike) for (kind, _), alike in groups.items() if len(alike) > 1]


def _between(kind: str, alike: Sequence[AdapterMatrix]) -> KindSimilarity:
    found = [each.svd().significant() for each in alike]
    tables = torch.empty(2, len(found), len(found), dtype=torch.float64)
    for at, one in enumerate(found):
        for to, other in enumerate(found[: at + 1]):
            both = update_similarity(one, other)
            for table, phi, size in zip(tables, (both.inputs, both.outputs), alike[at].shape[::-1], strict=True):
                table[at, to] = table[to, at] = _overlap(phi, phi.shape, size).above_chance
    blocks = tuple(place(each.name)[0] for each in alike)
    return KindSimilarity(kind, blocks, tables[0], tables[1])


def kind_names(similarities: Sequence[KindSimilarity]) -> list[str]:
    """Return the name of each kind; those of several widths also tell their first block."""
    counts = Counter(each.kind for each in similarities)
    return [each.kind if counts[each.kind] == 1 else f"{each.kind}, from {each.blocks[0]}" for each in similarities]


def similarity_rows(similarities: Sequence[KindSimilarity]) -> Iterator[tuple[str, ...]]:
    """Yield the rows of a table of what layers share, the header first."""
    yield ("kind of layer", "blocks", "inputs", "outputs")
    for name, each in zip(kind_names(similarities), similarities, strict=True):
        pairs = ([float(t[at, to]) for at in range(len(t)) for to in range(at)] for t in (each.inputs, each.outputs))
        yield (name, str(len(each.blocks)), *(_cell(known_median(values)) for values in pairs))


# --- showing numbers


def _cell(value: float) -> str:
    return "-" if math.isnan(value) else f"{round(value, 3) + 0.0:.3f}"  # no minus before a zero
