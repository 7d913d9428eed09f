"""Analyze what an adapter learned, layer by layer, and suggest ranks for the next run."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from os import PathLike
from typing import Any

from torch import nn
from typing_extensions import override

from lightning_lora.adapted_model import AdaptedModel
from lightning_lora.analysis import spectrum
from lightning_lora.analysis.adapters import (
    AdapterMatrix,
    Progress,
    evenly,
    kind_of,
    read_matrices,
    stored_matrices,
    which_of_several,
)
from lightning_lora.analysis.components import Component, component_rows, components_of, loadings_of
from lightning_lora.analysis.spectrum import Relation, known_median, plain
from lightning_lora.attachment import table_lines
from lightning_lora.calibration.report import CalibrationReport, start_in
from lightning_lora.names import listed
from lightning_lora.ranks.history import History, history_of
from lightning_lora.storage.adapter_file import damage_named
from lightning_lora.storage.checkpoint import plain_record

_HEADER = ("layer", "shape", "rank", "|dW|", "|dW|/|W|", "effective", "stable", "suggested", "amplification", "aligned")
_MOST_NAMED = 3
_MOST_READ = 12  # updates whose leading direction is shown in words
_USED_UP = 0.8  # of the rank: an update that uses this much may benefit from more
_BEYOND_CHANCE = 1.5  # times the projection on random directions


@dataclass(frozen=True, kw_only=True)
class LayerAnalysis:
    """The numbers of one update.

    Attributes:
        name: Its name, as in ``AttachReport``; an expert of a stack has its number in brackets.
        shape: ``(out, in)``.
        rank: Rank of its factors.
        scaling: Factor of ``B @ A``.
        norm: Frobenius norm of the update.
        singular_values: Singular values of the update, in descending order.
        effective_rank: ``exp`` of their entropy.
        stable_rank: Squared norm over the squared largest singular value.
        numerical_rank: Number of nonzero singular values.
        suggested_rank: Number of directions that hold the requested energy.
        relation: Relation to the weight, if that is known.
        intruders: Number of the adapted weight's 10 leading directions that are absent from the weight, if requested.
        is_rescaled: Whether DoRA also rescales the rows of the sum, which no number here includes.
        components: What the leading directions read and write. Of an update that is zero, only those of a start from
            data.
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
    components: tuple[Component, ...] = ()


METRICS = ("rank", "norm", "ratio", "effective_rank", "stable_rank", "suggested_rank", "amplification", "alignment")


def metric_of(layer: LayerAnalysis, metric: str) -> float:
    """Return a metric of a layer by its name; NaN where unknown."""
    return float(getattr(layer, metric, getattr(layer.relation, metric, math.nan)))


@dataclass(frozen=True)
class AdapterAnalysis:
    """Analysis of an adapter; ``print(analysis)`` shows a table.

    Attributes:
        layers: One entry for each matrix.
        energy: The share of the squared norm that a suggested rank holds.
        adapter: The adapter's name, if the source has several.
        start: What the data or the weights said of its start, if they decided it and the source has a record of that.
        ranks: The decisions of a rank schedule, if one decided the ranks and the source has a record of that.
    """

    layers: tuple[LayerAnalysis, ...]
    energy: float
    adapter: str | None = None
    start: CalibrationReport | None = None
    ranks: History | None = None

    @property
    def idle(self) -> list[str]:
        """Names of the updates that are zero: never trained, or nothing learned."""
        return [layer.name for layer in self.layers if not layer.numerical_rank]

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, for JSON."""
        named = {} if self.adapter is None else {"adapter": self.adapter}
        start = {} if self.start is None else {"start": self.start.plain()}
        ranks = {} if self.ranks is None else {"rank_history": asdict(self.ranks)}
        return {**named, **start, **ranks, "energy": self.energy, "idle": self.idle, "layers": plain(self.layers)}

    def rows(self) -> list[tuple[str, ...]]:
        """Return the table as text: a header, a row for each update, and the medians."""
        medians = ("median", "", *(_cell(_median(self.layers, metric)) for metric in METRICS))
        return [_HEADER, *(_row(layer) for layer in self.layers), medians]

    def component_rows(self, most: int = _MOST_READ, *, leading: int = 1) -> list[tuple[str, ...]]:
        """Return what the leading directions of the updates read and write as text, of at most so many updates."""
        shown = evenly([layer for layer in self.layers if layer.components], most)
        return list(component_rows([(layer.name, layer.components) for layer in shown], leading))

    @override
    def __str__(self) -> str:
        count = len(self.layers)
        lines = [f"{count} update{'s' * (count != 1)}; the suggested rank holds {self.energy:.0%} of the squared norm"]
        lines += [] if self.adapter is None else [f"adapter: {self.adapter!r}"]
        lines += table_lines(self.rows())
        if self.idle:
            lines.append(f"zero, as if never trained: {listed(self.idle)}")
        if found := [f"{layer.name} ({layer.intruders})" for layer in self.layers if layer.intruders]:
            lines.append(f"intruder dimensions: {listed(found)}")
        if rescaled := [layer.name for layer in self.layers if layer.is_rescaled]:
            lines.append(f"also rescaled by DoRA's magnitudes, which is not included here: {listed(rescaled)}")
        header, *rows = self.component_rows()
        if rows:
            of = "" if len(rows) == count else f"; of {len(rows)} of the {count} updates"
            lines += ["", f"the features that the leading direction reads and writes most, and their shares of it{of}"]
            lines += table_lines([header, *rows, ("",) * len(header)])[:-2]
        lines += [] if self.start is None else ["", str(self.start)]
        return "\n".join(lines)


def analyze(
    source: nn.Module | str | PathLike[str],
    base: nn.Module | str | PathLike[str] | None = None,
    *,
    energy: float = 0.99,
    tokens: bool = False,
    intruders: bool = False,
    progress: Progress | None = None,
    check_base: bool = True,
) -> AdapterAnalysis:
    """Return what an adapter learned, layer by layer.

    Args:
        source: An adapted module, a ``.ckpt`` written under a ``LoRACallback``, or a PEFT directory.
        base: The base of an adapter in a file, to relate the updates to its weights: a model, or a folder with
            safetensors or one such file on disk, which is read one weight at a time.
        energy: The share of the squared norm that a suggested rank must hold.
        tokens: Whether to include trained embedding rows, as the change of those rows.
        intruders: Whether to count intruder dimensions; this decomposes every weight in full.
        progress: Called with the number of adapters done and their total, for a base on disk.
        check_base: Reject a base on disk whose values differ from those that the adapter was trained on.

    Raises:
        ValueError: The source has no adapters, cannot be read or does not fit the base; the factors are not finite; or
            intruders are requested without weights.
        FileNotFoundError: The file does not exist.
    """
    if base is None or isinstance(base, nn.Module):
        matrices: Iterable[AdapterMatrix] = read_matrices(source, base, tokens=tokens)
    elif isinstance(source, nn.Module):
        raise ValueError("An adapted module contains its base; leave base out.")
    else:
        matrices = stored_matrices(source, base, tokens=tokens, progress=progress, check_base=check_base)
    start = start_in(source)
    told = {each.label for each in start.layers if not each.note} if start is not None else set()
    layers = tuple(_analyzed(matrix, energy, intruders, is_told=matrix.name in told) for matrix in matrices)
    return AdapterAnalysis(layers, energy, which_of_several(source), start, _rank_history(source))


def _rank_history(source: nn.Module | str | PathLike[str]) -> History | None:
    if isinstance(source, nn.Module):
        entries = [{"rank_history": root.attachment.rank_history} for root in AdaptedModel(source).roots]
        return history_of({"adapters": entries})
    with damage_named(source):
        return history_of(plain_record(source))


def _analyzed(matrix: AdapterMatrix, energy: float, intruders: bool, *, is_told: bool) -> LayerAnalysis:
    weight, svd = matrix.weight, matrix.svd()
    rank = spectrum.numerical_rank(svd.values)
    count = None
    if intruders:
        if weight is None:
            raise ValueError("intruders=True needs the weights: give the base model, not on the meta device.")
        count = len(spectrum.intruder_dimensions(weight, matrix.A, matrix.B, matrix.scaling).indices)
    return LayerAnalysis(
        name=matrix.name,
        shape=matrix.shape,
        rank=matrix.rank,
        scaling=matrix.scaling,
        norm=svd.norm,
        singular_values=tuple(svd.values.tolist()),
        effective_rank=spectrum.effective_rank(svd.values),
        stable_rank=spectrum.stable_rank(svd.values),
        numerical_rank=rank,
        suggested_rank=spectrum.energy_rank(svd.values, energy),
        relation=None if weight is None else spectrum.relate(weight, svd),
        intruders=count,
        is_rescaled=matrix.is_rescaled,
        components=components_of(loadings_of(matrix, svd)) if rank or is_told else (),
    )


def _row(layer: LayerAnalysis) -> tuple[str, ...]:
    ratio, amplification, alignment = (
        _cell(metric_of(layer, each)) for each in ("ratio", "amplification", "alignment")
    )
    ranks = (f"{layer.effective_rank:.2f}", f"{layer.stable_rank:.2f}", str(layer.suggested_rank))
    shape = f"{layer.shape[0]} x {layer.shape[1]}"
    return (layer.name, shape, str(layer.rank), f"{layer.norm:.3g}", ratio, *ranks, amplification, alignment)


def _cell(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.3g}"


def _median(layers: Iterable[LayerAnalysis], metric: str) -> float:
    return known_median(metric_of(layer, metric) for layer in layers)


# --- ranks for the next run


@dataclass(frozen=True, kw_only=True)
class RankSuggestion:
    """The rank that one kind of layer needs.

    Attributes:
        kind: The name of the layers within their blocks; in ``LoRAConfig.rank_pattern`` it matches all of them.
        updates: Number of updates of this kind.
        rank: The highest rank of their factors.
        median: Median of the ranks that hold the energy.
        suggested: The highest of those, which is enough for all; 0 if no update of this kind learned anything.
        parameters: Number of parameters of their factors ``A`` and ``B``.
        parameters_suggested: That number at the suggested rank.
    """

    kind: str
    updates: int
    rank: int
    median: float
    suggested: int
    parameters: int
    parameters_suggested: int


def suggest_ranks(analysis: AdapterAnalysis) -> list[RankSuggestion]:
    """Return the rank that each kind of layer needs to hold the energy of its updates.

    A suggestion shows how much of the rank was used, not what a higher one would have achieved: where the rank is used
    up, a higher one may do better.
    """
    groups: dict[str, list[LayerAnalysis]] = {}
    for layer in analysis.layers:
        groups.setdefault(kind_of(layer.name), []).append(layer)
    return [_suggestion(kind, layers) for kind, layers in groups.items()]


def _suggestion(kind: str, layers: Sequence[LayerAnalysis]) -> RankSuggestion:
    needed = [layer.suggested_rank for layer in layers]
    return RankSuggestion(
        kind=kind,
        updates=len(layers),
        rank=max(layer.rank for layer in layers),
        median=statistics.median(needed),
        suggested=max(needed),
        parameters=sum(layer.rank * sum(layer.shape) for layer in layers),
        parameters_suggested=sum(max(needed) * sum(layer.shape) for layer in layers),
    )


# --- the numbers in words


def findings(analysis: AdapterAnalysis) -> list[str]:
    """Return what the numbers mean, in a sentence or two for each question."""
    live = [layer for layer in analysis.layers if layer.numerical_rank]
    if not live:
        return ["Every update is zero: this adapter was never trained, or learned nothing."]
    lines = [*_of_ranks(live, analysis), *_of_sizes(live), *_of_directions(live), *_of_intruders(live)]
    if analysis.idle:
        share = f"{len(analysis.idle)} of {len(analysis.layers)} updates are"
        lines.append(f"{share} zero, as if never trained: {listed(analysis.idle)}.")
    if rescaled := sum(layer.is_rescaled for layer in analysis.layers):
        lines.append(f"DoRA's magnitudes also rescale {rescaled} of the weights; no number here includes that.")
    return lines


def _of_ranks(live: Sequence[LayerAnalysis], analysis: AdapterAnalysis) -> Iterator[str]:
    rank, used, needed = (_median(live, metric) for metric in ("rank", "effective_rank", "suggested_rank"))
    yield (
        f"At rank {rank:g}, {_the_median(live)} uses {used:.1f} directions (effective rank); {needed:g} of them hold "
        f"{analysis.energy:.0%} of its squared norm.{_of_the_neediest(live)}"
    )
    full = [layer.name for layer in live if layer.effective_rank > _USED_UP * layer.rank]
    if 2 * len(full) > len(live):
        who = f"{len(full)} of {len(live)} updates use" if len(live) > 1 else "The update uses"
        yield f"{who} more than {_USED_UP:.0%} of the rank: a higher one may do better."
    suggestions = suggest_ranks(analysis)
    now, then = (sum(getattr(each, key) for each in suggestions) for key in ("parameters", "parameters_suggested"))
    if then < now:
        yield f"At the suggested rank of each kind of layer, A and B have {then:,} parameters instead of {now:,}."


def _the_median(live: Sequence[LayerAnalysis]) -> str:
    return "the median update" if len(live) > 1 else "the update"


def _of_the_neediest(live: Sequence[LayerAnalysis]) -> str:
    """Return a sentence about the updates that need the highest rank, unless all need the same."""
    most = max(layer.suggested_rank for layer in live)
    names = [layer.name for layer in live if layer.suggested_rank == most]
    if len(names) == len(live):
        return " All updates need as many." if len(live) > 1 else ""
    return f" {listed(names, _MOST_NAMED)} need{'s' * (len(names) == 1)} the most: {most}."


def _of_sizes(live: Sequence[LayerAnalysis]) -> Iterator[str]:
    ratios = {layer.name: metric_of(layer, "ratio") for layer in live}
    known = {name: ratio for name, ratio in ratios.items() if not math.isnan(ratio)}
    if known:
        largest = f"; the largest are {_largest(known, '.2g')}" if len(known) > 1 else ""
        middle = statistics.median(known.values())
        yield f"The norm of {_the_median(live)} is {_times(middle)} times its weight's{largest}."
    else:
        named = _largest({layer.name: layer.norm for layer in live}, ".3g")
        yield f"The largest updates by norm: {named}. Their relation to the weights is unknown without the base."


def _times(factor: float) -> str:
    return f"{factor:,.0f}" if factor >= 100 else f"{factor:.2g}"


def _largest(numbers: dict[str, float], precision: str) -> str:
    names = sorted(numbers, key=lambda name: -numbers[name])[:_MOST_NAMED]
    return listed([f"{name} ({numbers[name]:{precision}})" for name in names])


def _of_directions(live: Sequence[LayerAnalysis]) -> Iterator[str]:
    amplification, alignment = (_median(live, metric) for metric in ("amplification", "alignment"))
    if math.isnan(amplification) or math.isnan(alignment):
        return
    yield (
        f"In its own directions {_the_median(live)} is {_times(amplification)} times as large as the weight "
        "(amplification; the LoRA paper finds 21.5 for GPT-3 at rank 4 and 1.9 at rank 64)."
    )
    if alignment >= _BEYOND_CHANCE:
        meaning = "the updates amplify what the weights already do"
    elif alignment > 1 / _BEYOND_CHANCE:
        meaning = "the updates are unrelated to what the weights do"
    else:
        meaning = "the updates avoid what the weights do"
    middle = " (median)" if len(live) > 1 else ""
    yield f"There the weight is {_times(alignment)} times as large as in random directions{middle}: {meaning}."


def _of_intruders(live: Sequence[LayerAnalysis]) -> Iterator[str]:
    counted = [layer for layer in live if layer.intruders is not None]
    found = [f"{layer.name} ({layer.intruders})" for layer in counted if layer.intruders]
    if found:
        share = f"{len(found)} of {len(counted)} adapted weights"
        yield f"{share} have intruder dimensions, which come with forgetting: {listed(found)}."
    elif counted:
        yield "No adapted weight has intruder dimensions."
