"""Pages that show an analysis or a comparison; with matplotlib they have figures, without it words and tables."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Mapping, Sequence

from lightning_lora.analysis.comparison import AdapterComparison, KindSimilarity
from lightning_lora.analysis.page import Page
from lightning_lora.analysis.report_figures import ABOVE, Figures
from lightning_lora.analysis.suggestions import RankSuggestion, findings, suggest_ranks
from lightning_lora.analysis.summary import AdapterAnalysis
from lightning_lora.names import listed

NO_PLOTS = "The pictures are left out: they need matplotlib, pip install 'lightning-lora[plots]'."

_COLUMNS = (
    "|dW| is the Frobenius norm of the update, |dW|/|W| over the weight's; effective is exp of the entropy of its "
    "singular values, stable its squared norm over the squared largest one, suggested the directions that hold the "
    "energy; amplification is |dW| over what the weight has in the update's directions; aligned is what the weight has "
    "there over what it has in random directions (Hu et al. 2021, section 7.3; Roy and Vetterli 2007)."
)


def analysis_page(
    analysis: AdapterAnalysis,
    name: str,
    *,
    similarities: Sequence[KindSimilarity] = (),
    facts: Sequence[str] = (),
    figures: Figures | None = None,
) -> Page:
    """Return the page of one adapter.

    Args:
        analysis: What ``analyze`` found.
        name: What to call the adapter.
        similarities: What ``layer_similarity`` found.
        facts: What to say of the files.
        figures: From ``analysis_figures``; None where there is no matplotlib.
    """
    page = Page(f"What {name} learned", ". ".join(facts))
    page.heading("In short")
    page.points(findings(analysis))
    if figures is None:
        page.text(NO_PLOTS)
    page.heading("Where and how much")
    related = any(layer.relation for layer in analysis.layers)
    if not related:
        page.text(
            "How the updates relate to the weights is told with the base: lightning-lora report ADAPTER --base BASE."
        )
    _add(page, figures, ("ratio", "norm", "amplification", "alignment"))
    page.heading("Which rank")
    _add(page, figures, ("effective_rank", "suggested_rank", "energy", "spectra"))
    suggestions = suggest_ranks(analysis)
    page.table(list(suggestion_rows(suggestions)), f"Ranks that hold {analysis.energy:.0%} of the squared norm")
    if pattern := rank_pattern(suggestions):
        page.text(
            "As options of the next run. Where the rank was used up, a higher one may do better; and as the scaling is "
            "alpha / rank, keep that quotient by alpha and alpha_pattern."
        )
        page.code(next_run(pattern))
    if similarities:
        _add_similarities(page, similarities, figures)
    page.heading("All updates")
    page.table(analysis.rows(), "Every update in numbers")
    page.text(_COLUMNS)
    return page


def comparison_page(comparison: AdapterComparison, names: tuple[str, str], *, figures: Figures | None = None) -> Page:
    """Return the page of two adapters.

    Args:
        comparison: What ``compare`` found.
        names: What to call them.
        figures: From ``comparison_figures``; None where there is no matplotlib.
    """
    page = Page("What two adapters share", f"First: {names[0]}. Second: {names[1]}.")
    page.heading("In short")
    page.points(likeness(comparison))
    if figures is None:
        page.text(NO_PLOTS)
    else:
        page.heading("Layer by layer")
        _add(page, figures, ("cosine", "inputs", "outputs"))
        page.heading("Direction by direction")
        page.text(
            "Each cell says how much the i leading directions of the first and the j leading directions of the second "
            "share: 1 if the smaller set lies inside the larger, max(i, j) over the width if both are random. "
            "Conclusions are safer from the updates' directions; those of the factors depend on how an update is split."
        )
        _add(page, figures, ("phi_inputs", "phi_outputs", "phi_factors"))
    page.heading("All layers")
    page.table(comparison.rows(), "Every layer in numbers; in and out are phi of the first and of all directions")
    return page


def layers_page(similarities: Sequence[KindSimilarity], name: str, *, figures: Figures | None = None) -> Page:
    """Return the page of the layers of one adapter.

    Args:
        similarities: What ``layer_similarity`` found.
        name: What to call the adapter.
        figures: From ``layers_figures``; None where there is no matplotlib.
    """
    page = Page(f"What the layers of {name} share")
    if figures is None:
        page.text(NO_PLOTS)
    _add_similarities(page, similarities, figures)
    return page


def _add_similarities(page: Page, similarities: Sequence[KindSimilarity], figures: Figures | None) -> None:
    page.heading("Layers like each other")
    _add(page, figures, ("blocks_inputs", "blocks_outputs"))
    page.table(list(similarity_rows(similarities)), f"Between two blocks, the median of all pairs. {ABOVE}")


def likeness(comparison: AdapterComparison) -> list[str]:
    """Return what a comparison says, a sentence for each question."""
    live = [layer for layer in comparison.layers if min(layer.ranks)]
    if not live:
        return ["No layer has two updates that are not zero: there is nothing to compare."]
    said = []
    for side, of in (("input", "of_inputs"), ("output", "of_outputs")):
        overlaps = [getattr(layer, of) for layer in live]
        first, every, chance = (statistics.median([each[at] for each in overlaps]) for at in range(3))
        said.append(
            f"Of the {side}, the leading directions share {first:.3f} and all directions {every:.3f}, where random "
            f"ones would share {chance:.3f} (medians over {len(live)} layers)."
        )
    cosines = {layer.name: layer.cosine for layer in live}
    middle, ordered = statistics.median(cosines.values()), sorted(cosines, key=cosines.__getitem__)
    least, most = ordered[0], ordered[-1]
    said.append(
        f"As vectors, the updates have a median cosine of {middle:.2f}: most alike is {most} ({cosines[most]:.2f}), "
        f"least {least} ({cosines[least]:.2f})."
    )
    for which, names in (("first", comparison.only_first), ("second", comparison.only_second)):
        said += [f"Only in the {which}: {listed(names)}."] if names else []
    return said


def rank_pattern(suggestions: Sequence[RankSuggestion]) -> dict[str, int]:
    """Return the suggested ranks as ``LoRAConfig.rank_pattern`` takes them, without kinds that learned nothing."""
    return {each.kind: each.suggested for each in suggestions if each.suggested}


def next_run(pattern: Mapping[str, int]) -> str:
    """Return ranks as a line of Python: the highest as the rank, lower ones as a pattern."""
    rank = max(pattern.values())
    lower = {kind: each for kind, each in pattern.items() if each < rank}
    return f"LoRACallback(rank={rank}, rank_pattern={lower!r})" if lower else f"LoRACallback(rank={rank})"


def suggestion_rows(suggestions: Sequence[RankSuggestion]) -> Iterator[tuple[str, ...]]:
    """Yield the rows of a table of suggestions, the header first and sums last."""
    yield (
        "kind of layer",
        "updates",
        "rank now",
        "median needed",
        "suggested",
        "parameters now",
        "suggested parameters",
    )
    for each in suggestions:
        counts = (str(each.updates), str(each.rank), f"{each.median:g}", str(each.suggested))
        yield (each.kind, *counts, f"{each.parameters:,}", f"{each.parameters_suggested:,}")
    now, then = (sum(getattr(each, key) for each in suggestions) for key in ("parameters", "parameters_suggested"))
    yield ("all", str(sum(each.updates for each in suggestions)), "", "", "", f"{now:,}", f"{then:,}")


def similarity_rows(similarities: Sequence[KindSimilarity]) -> Iterator[tuple[str, ...]]:
    """Yield the rows of a table of what layers share, the header first."""
    yield ("kind of layer", "blocks", "inputs", "outputs")
    for each in similarities:
        medians = []
        for table in (each.inputs, each.outputs):
            pairs = [float(table[at, to]) for at in range(len(table)) for to in range(at)]
            known = [value for value in pairs if not math.isnan(value)]
            medians.append(f"{round(statistics.median(known), 3) + 0.0:.3f}" if known else "-")
        yield (each.kind, str(len(each.blocks)), *medians)


def _add(page: Page, figures: Figures | None, names: Sequence[str]) -> None:
    if figures is None:
        return
    from lightning_lora.analysis.drawing import as_svg

    chosen = [(name, figures[name]) for name in names if name in figures]
    page.figures((as_svg(figure, name), words, caption) for name, (figure, words, caption) in chosen)
