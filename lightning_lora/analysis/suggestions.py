"""Which rank another run should have, told from what this one used, and what to say of it in words."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from lightning_lora.analysis.places import kind_of
from lightning_lora.analysis.summary import AdapterAnalysis, LayerAnalysis
from lightning_lora.names import listed

_MOST_NAMED = 3
_USED_UP = 0.8  # of the rank: an update that fills so much of it may want more
_BEYOND_CHANCE = 1.5  # times what random directions catch


@dataclass(frozen=True, kw_only=True)
class RankSuggestion:
    """The rank that one kind of layer needs.

    Attributes:
        kind: What the layers are in their blocks; as an entry of ``LoRAConfig.rank_pattern`` it names all of them.
        updates: How many there are.
        rank: The highest rank that their factors have.
        median: Median of the ranks that hold the energy.
        suggested: The highest of those, which is enough for all; 0 if no update of the kind learned anything.
        parameters: Of their factors ``A`` and ``B``.
        parameters_suggested: The same at the suggested rank.
    """

    kind: str
    updates: int
    rank: int
    median: float
    suggested: int
    parameters: int
    parameters_suggested: int

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, for JSON."""
        return asdict(self)


def suggest_ranks(analysis: AdapterAnalysis) -> list[RankSuggestion]:
    """Return the rank that each kind of layer needs to hold the energy of its updates.

    It tells how much of a rank was used, not what a higher one would have given: where the rank is used up, a higher
    one may do better.

    Args:
        analysis: What ``analyze`` found.
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


def findings(analysis: AdapterAnalysis) -> list[str]:
    """Return what the numbers say, a sentence or two for each question.

    Args:
        analysis: What ``analyze`` found.
    """
    live = [layer for layer in analysis.layers if layer.numerical_rank]
    if not live:
        return ["Every update is zero: this adapter was never trained, or learned nothing."]
    said = [*_of_ranks(live, analysis), *_of_sizes(live), *_of_directions(live), *_of_intruders(live)]
    if analysis.idle:
        share = f"{len(analysis.idle)} of {len(analysis.layers)} updates are"
        said.append(f"{share} zero, as if never trained: {listed(analysis.idle)}.")
    if rescaled := sum(layer.is_rescaled for layer in analysis.layers):
        said.append(f"DoRA's magnitudes rescale {rescaled} of the weights besides; no number here counts that.")
    return said


def _of_ranks(live: Sequence[LayerAnalysis], analysis: AdapterAnalysis) -> Iterator[str]:
    rank = statistics.median(layer.rank for layer in live)
    used = statistics.median(layer.effective_rank for layer in live)
    needed = statistics.median(layer.suggested_rank for layer in live)
    most = max(live, key=lambda layer: layer.suggested_rank)
    yield (
        f"Of rank {rank:g}, the median update uses {used:.1f} directions (effective rank); {needed:g} of them hold "
        f"{analysis.energy:.0%} of its squared norm. {most.name} needs the most: {most.suggested_rank}."
    )
    full = [layer.name for layer in live if layer.effective_rank > _USED_UP * layer.rank]
    if 2 * len(full) > len(live):
        share = f"{len(full)} of {len(live)} updates"
        yield f"{share} use more than {_USED_UP:.0%} of their rank: a higher one may do better."
    suggestions = suggest_ranks(analysis)
    now, then = (sum(getattr(each, key) for each in suggestions) for key in ("parameters", "parameters_suggested"))
    if then < now:
        saved = f"{then:,} parameters instead of {now:,}"
        yield f"With the suggested rank for each kind of layer, A and B would have {saved}."


def _of_sizes(live: Sequence[LayerAnalysis]) -> Iterator[str]:
    ratios = {layer.name: layer.relation.ratio for layer in live if layer.relation}
    known = {name: ratio for name, ratio in ratios.items() if not math.isnan(ratio)}
    if known:
        largest = sorted(known, key=lambda name: -known[name])[:_MOST_NAMED]
        named = listed([f"{name} ({known[name]:.2g})" for name in largest])
        yield (
            f"The median update has {statistics.median(known.values()):.2g} of its weight's norm; the largest are "
            f"{named}."
        )
    else:
        largest_norms = sorted(live, key=lambda layer: -layer.norm)[:_MOST_NAMED]
        named = listed([f"{layer.name} ({layer.norm:.3g})" for layer in largest_norms])
        yield f"The largest updates by norm: {named}. How they relate to the weights is not known without the base."


def _of_directions(live: Sequence[LayerAnalysis]) -> Iterator[str]:
    amplification = _known_median(live, lambda layer: layer.relation and layer.relation.amplification)
    alignment = _known_median(live, lambda layer: layer.relation and layer.relation.alignment)
    if amplification is None or alignment is None:
        return
    yield (
        f"In its own directions the median update is {amplification:.2g} times as large as the weight (amplification; "
        "the LoRA paper finds 21.5 for GPT-3 at rank 4 and 1.9 at rank 64)."
    )
    if alignment >= _BEYOND_CHANCE:
        what = "so the updates amplify what the weights already do"
    elif alignment > 1 / _BEYOND_CHANCE:
        what = "about as much: the updates go their own way"
    else:
        what = "so the updates avoid what the weights do"
    yield f"The weight has {alignment:.2g} times as much there as in random directions (median), {what}."


def _of_intruders(live: Sequence[LayerAnalysis]) -> Iterator[str]:
    counted = [layer for layer in live if layer.intruders is not None]
    found = [f"{layer.name} ({layer.intruders})" for layer in counted if layer.intruders]
    if found:
        yield (
            f"{len(found)} of {len(counted)} adapted weights have intruder dimensions, which come with forgetting: "
            f"{listed(found)}."
        )
    elif counted:
        yield "No adapted weight has intruder dimensions."


def _known_median(layers: Sequence[LayerAnalysis], of: Callable[[LayerAnalysis], float | None]) -> float | None:
    values = [value for layer in layers if (value := of(layer)) is not None and not math.isnan(value)]
    return statistics.median(values) if values else None
