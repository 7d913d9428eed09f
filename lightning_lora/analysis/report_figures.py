"""The figures of the pages, with what they show in words; they need matplotlib, the optional extra ``plots``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, get_args

from lightning_lora.analysis import plots
from lightning_lora.analysis.comparison import AdapterComparison, KindSimilarity
from lightning_lora.analysis.summary import AdapterAnalysis

ABOVE = "0 is what random directions share, 1 the same directions; grey cannot be told."
_MOST_PANELS = 12

Figures = dict[str, tuple[Any, str, str]]  # name of a file -> figure, what it looks like, its caption


def analysis_figures(analysis: AdapterAnalysis, similarities: Sequence[KindSimilarity] = ()) -> Figures:
    """Return the figures of an analysis: name -> figure, what it looks like in words, its caption.

    Args:
        analysis: What ``analyze`` found.
        similarities: What ``layer_similarity`` found.

    Raises:
        ImportError: There is no matplotlib.
    """
    captions = {
        "ratio": "How much each update changes its weight: Frobenius norm over that of the weight.",
        "norm": "Frobenius norm of each update.",
        "amplification": "How much larger each update is than the weight in the update's own directions.",
        "alignment": "What the weight has in the update's directions over what it has in random ones; 1 is chance.",
        "effective_rank": "How many directions each update uses: exp of the entropy of its singular values.",
        "suggested_rank": f"How many directions hold {analysis.energy:.0%} of the squared norm of each update.",
    }
    related = any(layer.relation for layer in analysis.layers)
    shown = [name for name in captions if related or name not in ("ratio", "amplification", "alignment")]
    shown = [name for name in shown if not (related and name == "norm")]
    found: Figures = {}
    for name in shown:
        metric: Any = name
        words = f"Heat map by block and kind of layer. {captions[name]} The numbers are in the table of all updates."
        found[name] = plots.plot_layers(analysis, metric), words, captions[name]
    caption = "Singular values of the updates, largest first."
    found["spectra"] = plots.plot_spectra(analysis), f"Falling curves on a logarithmic scale. {caption}", caption
    caption = "Squared norm in the leading directions; where a curve reaches the dotted line, the rank is enough."
    found["energy"] = plots.plot_energy(analysis), f"Rising curves. {caption}", caption
    return found | (layers_figures(similarities) if similarities else {})


def layers_figures(similarities: Sequence[KindSimilarity]) -> Figures:
    """Return the figures of a comparison within one adapter: name -> figure, what it looks like, its caption.

    Args:
        similarities: What ``layer_similarity`` found.

    Raises:
        ImportError: There is no matplotlib.
    """
    found: Figures = {}
    for side in get_args(plots.Side):
        caption = f"What the updates of one kind share between blocks, directions of the {side}. {ABOVE}"
        figure = plots.plot_blocks(similarities[:_MOST_PANELS], side)
        found[f"blocks_{side}"] = figure, f"One heat map, block by block, of each kind of layer. {caption}", caption
    return found


def comparison_figures(comparison: AdapterComparison, names: tuple[str, str] = ("first", "second")) -> Figures:
    """Return the figures of a comparison: name -> figure, what it looks like in words, its caption.

    Args:
        comparison: What ``compare`` found.
        names: What to call the adapters.

    Raises:
        ImportError: There is no matplotlib.
    """
    captions = {
        "cosine": "Cosine between the two updates of each layer as vectors: 1 is the same update, 0 nothing in common.",
        "inputs": f"What all directions of the input share in each layer. {ABOVE}",
        "outputs": f"What all directions of the output share in each layer. {ABOVE}",
    }
    found: Figures = {}
    for of in get_args(plots.Likeness):
        words = f"Heat map by block and kind of layer. {captions[of]} The numbers are in the table of all layers."
        found[of] = plots.plot_comparison(comparison, of), words, captions[of]
    shown = evenly([layer for layer in comparison.layers if min(layer.ranks)], _MOST_PANELS)
    which = "" if len(shown) == len(comparison.layers) else f", of {len(shown)} of the {len(comparison.layers)} layers"
    labels = (f"i ({names[0]})", f"j ({names[1]})")
    for what, said in (
        ("inputs", "the updates' directions of the input"),
        ("outputs", "the updates' directions of the output"),
        ("factors", "the factors A, as in figures 3 and 4 of the LoRA paper"),
    ):
        if shown:
            caption = f"phi(i, j) of {said}{which}: what the i and the j leading directions share."
            figure = plots.plot_similarities({layer.name: getattr(layer, what) for layer in shown}, labels=labels)
            found[f"phi_{what}"] = figure, f"One heat map of each layer, on one scale from 0 to 1. {caption}", caption
    return found


def evenly(items: Sequence[Any], most: int) -> list[Any]:
    """Return at most so many of the items, from the first to the last in even steps."""
    if len(items) <= most:
        return list(items)
    return [items[round(at * (len(items) - 1) / (most - 1))] for at in range(most)]
