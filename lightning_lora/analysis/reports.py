"""HTML pages that show an analysis or a comparison; pictures need matplotlib, words and tables do not."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from html import escape
from pathlib import Path
from string import Template
from typing import Any, get_args

from lightning_lora.analysis import plots
from lightning_lora.analysis.adapters import evenly
from lightning_lora.analysis.comparison import AdapterComparison, KindSimilarity, likeness, similarity_rows
from lightning_lora.analysis.plots import as_svg, can_draw
from lightning_lora.analysis.summary import AdapterAnalysis, RankSuggestion, findings, suggest_ranks
from lightning_lora.calibration.report import CalibrationReport
from lightning_lora.names import listed
from lightning_lora.ranks.history import History
from lightning_lora.storage.atomic import check_new, replace_file

NO_PLOTS = "Pictures are left out: they need matplotlib, pip install 'lightning-lora[plots]'."

_COLUMNS = (
    "|dW| is the Frobenius norm of the update, |dW|/|W| that norm over the weight's; effective is exp of the entropy "
    "of the update's singular values, stable its squared norm over its squared largest singular value, suggested the "
    "number of directions that hold the energy; amplification is |dW| over the norm of the weight in the update's "
    "directions; aligned is that norm over the norm of the weight in random directions (Hu et al. 2021, section 7.3; "
    "Roy and Vetterli 2007)."
)
_ABOVE_CHANCE = "0 is chance, 1 means the same directions; gray is unknown."
_MOST_PANELS = 12
_MOST_KERNELS = 8
_MOST_HISTORIES = 40
_LEADING = 2  # directions of an update in the table of what they read
_STARTS = {
    "explained": "Explained is the share of the variance of the layer's inputs that lies in the chosen directions.",
    "suggested": "Suggested is the number of directions that stand out from chance.",
}
_COMPONENTS = (
    "An update is a sum of components: each reads one direction of the layer's inputs and writes one of its outputs. "
    "The numbers are those of features, of convolutions those of channels, and of embeddings' inputs those of tokens; "
    "in brackets the feature's share of the direction. An update that is still zero writes nothing."
)
_Figure = tuple[str, Any, str, str]  # name of a file, figure, its description, its caption


# --- the page of one adapter


def analysis_page(
    analysis: AdapterAnalysis, name: str, *, similarities: Sequence[KindSimilarity] = (), facts: Sequence[str] = ()
) -> Page:
    """Return the page of one adapter; ``facts`` are about its files."""
    related = any(layer.relation for layer in analysis.layers)
    page = Page(f"What {name} learned", ". ".join(facts))
    page.heading("In short")
    page.points(findings(analysis))
    _mention_missing_pictures(page)
    page.heading("Where and how much")
    if not related:
        page.text(
            "To see how the updates relate to the weights, give the base: lightning-lora report ADAPTER --base BASE."
        )
    _add(page, _metric_figures(analysis, ("ratio", "amplification", "alignment") if related else ("norm",)))
    page.heading("Which rank")
    _add(page, _metric_figures(analysis, ("effective_rank", "suggested_rank")), _curve_figures(analysis))
    suggestions = suggest_ranks(analysis)
    page.table(list(_suggestion_rows(suggestions)), f"Ranks that hold {analysis.energy:.0%} of the squared norm")
    if pattern := rank_pattern(suggestions):
        page.text(
            "As options of the next run. Where the rank is used up, a higher one may do better. The scaling is alpha / "
            "rank: keep that quotient by setting alpha and alpha_pattern."
        )
        page.code(next_run(pattern))
    if analysis.ranks is not None:
        _add_ranks(page, analysis.ranks)
    if analysis.start is not None:
        _add_start(page, analysis.start)
    _add_components(page, analysis)
    if similarities:
        _add_similarities(page, similarities)
    page.heading("All updates")
    page.table(analysis.rows(), "Every update in numbers")
    page.text(_COLUMNS)
    return page


def _add_ranks(page: Page, history: History) -> None:
    page.heading("How the ranks came about")
    page.text(
        f"A rank schedule decided {len(history.steps) - 1} times, the last time after step {history.steps[-1]:,}. The "
        f"factors could have {history.budgets[0]:,} parameters at first and {history.budgets[-1]:,} then."
    )
    which = f", {_MOST_HISTORIES} of {len(history.ranks)} layers" if len(history.ranks) > _MOST_HISTORIES else ""
    caption = f"Rank in use of each layer after each decision{which}."
    if can_draw():
        figure = plots.plot_ranks(history, _MOST_HISTORIES)
        _add(page, [("ranks", figure, f"Heat map. {caption}", caption)])
    ends = {name: ranks[-1] for name, ranks in history.ranks.items()}
    if empty := [name for name, rank in ends.items() if not rank]:
        page.text(f"Without an adapter in the end: {listed(empty, _MOST_PANELS)}.")


def _add_start(page: Page, start: CalibrationReport) -> None:
    page.heading("Where it started")
    rows = start.rows()
    page.table(rows, start.title.capitalize())
    if said := [text for column, text in _STARTS.items() if column in rows[0]]:
        page.text(" ".join(said))
    if notes := start.notes():
        page.points(notes)


def _add_components(page: Page, analysis: AdapterAnalysis) -> None:
    known = [layer for layer in analysis.layers if layer.components]
    if not known:
        return
    page.heading("What it reads and writes")
    _add(page, _loading_figures(analysis))
    shown = f"{_MOST_PANELS} of the {len(known)} updates, evenly spaced" if len(known) > _MOST_PANELS else "All updates"
    page.table(
        analysis.component_rows(_MOST_PANELS, leading=_LEADING),
        f"{shown}: the features that the leading directions read and write most",
    )
    page.text(_COMPONENTS)


def _loading_figures(analysis: AdapterAnalysis) -> Iterator[_Figure]:
    count = len(plots.with_pictures(analysis))
    if not count:
        return
    which = f", in {_MOST_KERNELS} of {count} layers" if count > _MOST_KERNELS else ""
    caption = (
        f"What the leading directions look for in the kernels of convolutions{which}: red against blue, white is zero. "
        "Several channels are shown by the pattern that they share most, three by their colors, where gray is zero. "
        "Above each is its share of the update's squared norm, once there is one."
    )
    yield (
        "loadings",
        plots.plot_loadings(analysis, _MOST_KERNELS),
        f"A row of small pictures per layer. {caption}",
        caption,
    )


def _metric_figures(analysis: AdapterAnalysis, metrics: Sequence[plots.Metric]) -> Iterator[_Figure]:
    captions: dict[plots.Metric, str] = {
        "ratio": "Relative size of each update: its Frobenius norm over that of the weight.",
        "norm": "Frobenius norm of each update.",
        "amplification": "How much larger each update is than the weight in the update's own directions.",
        "alignment": "Norm of the weight in the update's directions over that in random ones; 1 is chance.",
        "effective_rank": "How many directions each update uses: exp of the entropy of its singular values.",
        "suggested_rank": f"How many directions hold {analysis.energy:.0%} of the squared norm of each update.",
    }
    for metric in metrics:
        caption = captions[metric]
        description = f"Heat map by block and kind of layer. {caption} The table of all updates has the numbers."
        yield metric, plots.plot_layers(analysis, metric), description, caption


def _curve_figures(analysis: AdapterAnalysis) -> Iterator[_Figure]:
    caption = "Share of the squared norm in the leading directions; the dotted line is what a suggested rank holds."
    yield "energy", plots.plot_energy(analysis), f"Rising curves. {caption}", caption
    caption = "Singular values of the updates, largest first."
    yield "spectra", plots.plot_spectra(analysis), f"Falling curves on a logarithmic scale. {caption}", caption


def rank_pattern(suggestions: Sequence[RankSuggestion]) -> dict[str, int]:
    """Return the suggested ranks as a ``LoRAConfig.rank_pattern``, without kinds that learned nothing."""
    return {each.kind: each.suggested for each in suggestions if each.suggested}


def next_run(pattern: Mapping[str, int]) -> str:
    """Return ranks as a line of Python: the highest as the rank, lower ones as a pattern."""
    rank = max(pattern.values())
    lower = {kind: each for kind, each in pattern.items() if each < rank}
    return f"LoRACallback(rank={rank}, rank_pattern={lower!r})" if lower else f"LoRACallback(rank={rank})"


def _suggestion_rows(suggestions: Sequence[RankSuggestion]) -> Iterator[tuple[str, ...]]:
    counts = ("kind of layer", "updates", "rank now", "median needed", "suggested")
    yield (*counts, "parameters now", "suggested parameters")
    for each in suggestions:
        counts = (each.kind, str(each.updates), str(each.rank), f"{each.median:g}", str(each.suggested))
        yield (*counts, f"{each.parameters:,}", f"{each.parameters_suggested:,}")
    now, then = (sum(getattr(each, key) for each in suggestions) for key in ("parameters", "parameters_suggested"))
    yield ("all", str(sum(each.updates for each in suggestions)), "", "", "", f"{now:,}", f"{then:,}")


# --- the page of two adapters


def comparison_page(comparison: AdapterComparison, names: tuple[str, str]) -> Page:
    """Return the page of two adapters, by their names."""
    page = Page("What two adapters share", f"First: {names[0]}. Second: {names[1]}.")
    page.heading("In short")
    page.points(likeness(comparison))
    _mention_missing_pictures(page)
    if can_draw():
        page.heading("Layer by layer")
        _add(page, _likeness_figures(comparison))
        page.heading("Direction by direction")
        page.text(
            "Each cell shows how much the i leading directions of the first and the j leading directions of the second "
            "overlap: 1 if the smaller set lies inside the larger, max(i, j) over the width if both are random. Base "
            "conclusions on the directions of the updates; those of the factors depend on how an update is split."
        )
        _add(page, _phi_figures(comparison))
    page.heading("All layers")
    page.table(comparison.rows(), "Every layer in numbers; in and out are phi of the first and of all directions")
    return page


def _likeness_figures(comparison: AdapterComparison) -> Iterator[_Figure]:
    captions: dict[plots.Likeness, str] = {
        "cosine": "Cosine between the two updates of each layer as vectors: 1 is the same update, 0 nothing in common.",
        "inputs": f"Overlap of all input directions in each layer. {_ABOVE_CHANCE}",
        "outputs": f"Overlap of all output directions in each layer. {_ABOVE_CHANCE}",
    }
    for of, caption in captions.items():
        description = f"Heat map by block and kind of layer. {caption} The table of all layers has the numbers."
        yield of, plots.plot_comparison(comparison, of), description, caption


def _phi_figures(comparison: AdapterComparison) -> Iterator[_Figure]:
    shown = evenly([layer for layer in comparison.layers if min(layer.ranks)], _MOST_PANELS)
    which = "" if len(shown) == len(comparison.layers) else f", {len(shown)} of the {len(comparison.layers)} layers"
    sides = {
        "inputs": "the updates' input directions",
        "outputs": "the updates' output directions",
        "factors": "the factors A, as in figures 3 and 4 of the LoRA paper",
    }
    for side, directions in sides.items() if shown else ():
        caption = f"phi(i, j) of {directions}{which}: the overlap of the i and the j leading directions."
        phis = {layer.name: getattr(layer, side) for layer in shown}
        figure = plots.plot_similarities(phis, labels=("i (first)", "j (second)"))
        yield f"phi_{side}", figure, f"One heat map per layer, on one scale from 0 to 1. {caption}", caption


# --- the page of the layers of one adapter


def layers_page(similarities: Sequence[KindSimilarity], name: str) -> Page:
    """Return the page of the layers of one adapter."""
    page = Page(f"What the layers of {name} share")
    _mention_missing_pictures(page)
    _add_similarities(page, similarities)
    return page


def _add_similarities(page: Page, similarities: Sequence[KindSimilarity]) -> None:
    page.heading("Similarity between layers")
    _add(page, _block_figures(similarities))
    page.table(list(similarity_rows(similarities)), f"Median over all pairs of blocks. {_ABOVE_CHANCE}")


def _block_figures(similarities: Sequence[KindSimilarity]) -> Iterator[_Figure]:
    for side in get_args(plots.Side):
        caption = f"Overlap of {side[:-1]} directions between blocks, for each kind of layer. {_ABOVE_CHANCE}"
        figure = plots.plot_blocks(similarities[:_MOST_PANELS], side)
        yield f"blocks_{side}", figure, f"One heat map, block by block, per kind of layer. {caption}", caption


# --- pictures


def _mention_missing_pictures(page: Page) -> None:
    if not can_draw():
        page.text(NO_PLOTS)


def _add(page: Page, *figures: Iterable[_Figure]) -> None:
    """Draw figures into a page, if matplotlib is installed."""
    if can_draw():
        drawn = [each for group in figures for each in group]
        page.pictures |= {name: figure for name, figure, _, _ in drawn}
        page.figures((as_svg(figure, name), description, caption) for name, figure, description, caption in drawn)


# --- HTML

_SHORT = 25  # rows of a table that is kept together in print
_PAGE = Path(__file__).with_name("page.html")


class Page:
    """One HTML page under construction; it needs no other file, on screen or in print.

    Args:
        title: Its heading, and the title of the window.
        lead: A line below the heading.

    Attributes:
        pictures: The figures that were drawn into the page, by names for files.
    """

    def __init__(self, title: str, lead: str = "") -> None:
        self.pictures: dict[str, Any] = {}
        self._title = title
        self._parts = [f"<h1>{escape(title)}</h1>"]
        if lead:
            self._parts.append(f'<p class="lead">{escape(lead)}</p>')

    def heading(self, text: str) -> None:
        """Start a section."""
        self._parts.append(f"<h2>{escape(text)}</h2>")

    def text(self, text: str) -> None:
        """Add a paragraph."""
        self._parts.append(f"<p>{escape(text)}</p>")

    def points(self, texts: Iterable[str]) -> None:
        """Add a list."""
        self._parts.append("<ul>" + "".join(f"<li>{escape(text)}</li>" for text in texts) + "</ul>")

    def code(self, text: str) -> None:
        """Add preformatted text."""
        self._parts.append(f"<pre><code>{escape(text)}</code></pre>")

    def table(self, rows: Sequence[Sequence[str]], caption: str) -> None:
        """Add a table: the header first, and the first cell of each row names it."""
        header, *body = rows
        head = "".join(f'<th scope="col">{escape(cell)}</th>' for cell in header)
        kind = "wide short" if len(body) <= _SHORT else "wide"
        lines = [
            f'<tr><th scope="row">{escape(row[0])}</th>'
            + "".join(f"<td>{escape(cell)}</td>" for cell in row[1:])
            + "</tr>"
            for row in body
        ]
        self._parts.append(
            f'<div class="{kind}" role="region" tabindex="0" aria-label="{escape(caption)}"><table>'
            f"<caption>{escape(caption)}</caption><thead><tr>{head}</tr></thead>"
            f"<tbody>{''.join(lines)}</tbody></table></div>"
        )

    def figures(self, figures: Iterable[tuple[str, str, str]]) -> None:
        """Add figures, side by side where there is room: SVG, description for screen readers, and caption of each."""
        parts = [
            f"<figure{_width(svg)}>{_labeled(svg, description)}<figcaption>{escape(caption)}</figcaption></figure>"
            for svg, description, caption in figures
        ]
        self._parts.append(f'<div class="figures">{"".join(parts)}</div>')

    def html(self) -> str:
        """Return the page."""
        page = Template(_PAGE.read_text(encoding="utf-8"))
        return page.substitute(title=escape(self._title), body="\n".join(self._parts))

    def write(self, path: Path, *, overwrite: bool = False) -> None:
        """Write the page to a file.

        Raises:
            ValueError: The file exists and ``overwrite`` is not set.
        """
        check_new(path, overwrite=overwrite)
        content = self.html()
        replace_file(path, lambda place: place.write_text(content, encoding="utf-8"))


def _width(svg: str) -> str:
    """Return the style that keeps a figure, with its caption, as wide as its picture."""
    found = re.search(r'<svg [^>]*\bwidth="([\d.]+)pt"', svg)
    return f' style="width: min(100%, {float(found[1]):.0f}pt)"' if found else ""


def _labeled(svg: str, description: str) -> str:
    return svg.replace("<svg ", f'<svg role="img" aria-label="{escape(description)}" ', 1)
