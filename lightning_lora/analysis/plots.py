"""Pictures of an analysis; matplotlib, the optional extra ``plots``, is needed here and nowhere else.

Every function draws into one figure and returns it; nothing is shown or saved. Scales of one hue say "more"; the colour
for "cannot be told" is grey.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from lightning_lora.analysis.summary import AdapterAnalysis, LayerAnalysis

Metric = Literal["effective_rank", "stable_rank", "suggested_rank", "norm", "ratio", "amplification", "alignment"]

_METRICS: dict[str, tuple[str, Callable[[LayerAnalysis], float | None]]] = {
    "effective_rank": ("effective rank of the update", lambda layer: layer.effective_rank),
    "stable_rank": ("stable rank of the update", lambda layer: layer.stable_rank),
    "suggested_rank": ("suggested rank", lambda layer: layer.suggested_rank),
    "norm": ("norm of the update", lambda layer: layer.norm),
    "ratio": ("norm of the update over the weight's", lambda layer: layer.relation and layer.relation.ratio),
    "amplification": ("amplification factor", lambda layer: layer.relation and layer.relation.amplification),
    "alignment": ("alignment with the weight (1 = chance)", lambda layer: layer.relation and layer.relation.alignment),
}
_SCALE, _UNKNOWN = "viridis", "#d0d0d0"
_MOST_NUMBERS = 120  # cells that are still large enough to be written into
_MOST_NAMES = 12  # lines that a legend can tell apart
_MOST_TICKS = 16


def plot_similarity(phi: Tensor, *, title: str = "", labels: tuple[str, str] = ("i", "j")) -> Any:
    """Return a heat map of ``phi(i, j)``, as in figures 3 and 4 of the LoRA paper.

    Args:
        phi: ``(r1, r2)`` from ``subspace_similarity`` or ``update_similarity``.
        title: What is compared.
        labels: Names of the rows and the columns.
    """
    figure, axes = _figure(5.2, 4.4)
    image = axes.imshow(_cells(phi), cmap=_colours(), vmin=0.0, vmax=1.0, aspect="auto", interpolation="nearest")
    _count_ticks(axes.yaxis, phi.shape[0])
    _count_ticks(axes.xaxis, phi.shape[1])
    axes.set_ylabel(labels[0])
    axes.set_xlabel(labels[1])
    axes.set_title(title or "subspace similarity")
    figure.colorbar(image, ax=axes, label="$\\phi(i, j)$")
    return figure


def plot_spectra(analysis: AdapterAnalysis) -> Any:
    """Return the singular values of every update over their index, on a logarithmic scale.

    Up to a dozen updates have a line and a name each; of more there are the median, the middle half and the range.
    """
    figure, axes = _figure(6.4, 4.2)
    layers = [layer for layer in analysis.layers if layer.numerical_rank]
    if len(layers) <= _MOST_NAMES:
        for at, layer in enumerate(layers):
            values = layer.singular_values[: layer.numerical_rank]
            line = ("-", "--", ":")[at // 6]
            axes.plot(
                range(1, len(values) + 1), values, line, marker="o", markersize=3, color=_hue(at), label=layer.name
            )
        if layers:
            axes.legend(
                fontsize=7,
                handlelength=3.5,
                loc="upper left",
                bbox_to_anchor=(1.01, 1.0),
                borderaxespad=0.0,
                frameon=False,
            )
    else:
        _draw_ranges(axes, layers)
    axes.set_yscale("log")
    axes.set_xlabel("index of the singular value")
    axes.set_ylabel("singular value of the update")
    axes.set_title(f"spectra of {len(layers)} update{'s' * (len(layers) != 1)}")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.grid(True, alpha=0.25)
    return figure


def plot_layers(analysis: AdapterAnalysis, metric: Metric = "effective_rank") -> Any:
    """Return a heat map of one number: a row for each block, a column for each kind of layer in it.

    Args:
        analysis: What ``analyze`` found.
        metric: Which number.

    Raises:
        ValueError: There is no such metric.
    """
    if metric not in _METRICS:
        raise ValueError(f"metric={metric!r} is none of {', '.join(_METRICS)}.")
    title, of = _METRICS[metric]
    places = [_place(layer.name) for layer in analysis.layers]
    rows, columns = list(dict.fromkeys(row for row, _ in places)), list(dict.fromkeys(column for _, column in places))
    table = torch.full((len(rows), len(columns)), math.nan, dtype=torch.float64)
    for (row, column), layer in zip(places, analysis.layers, strict=True):
        value = of(layer)
        table[rows.index(row), columns.index(column)] = math.nan if value is None else value
    figure, axes = _figure(2.5 + 0.75 * max(3, len(columns)), 1.8 + 0.28 * max(4, len(rows)))
    image = axes.imshow(_cells(table), cmap=_colours(), aspect="auto", interpolation="nearest")
    _name_ticks(axes.yaxis, rows)
    _name_ticks(axes.xaxis, columns, every=True)
    axes.tick_params(axis="x", rotation=30)
    for label in axes.get_xticklabels():
        label.set_horizontalalignment("right")
    axes.set_title(title)
    figure.colorbar(image, ax=axes)
    if table.numel() <= _MOST_NUMBERS:
        _write_numbers(axes, image, table)
    return figure


def _place(name: str) -> tuple[str, str]:
    """Return the block that a layer is in, and what it is there: ``h.3.attn.q`` is ``attn.q`` of ``h.3``."""
    name, _, expert = name.partition("[")
    found = re.match(r"(.*?(?:^|\.)\d+)\.(.+)$", name)
    block, kind = found.groups() if found else ("", name)
    return block, kind + (f"[{expert}" if expert else "")


def _figure(width: float, height: float) -> tuple[Any, Any]:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("Plots need matplotlib: pip install 'lightning-lora[plots]'. Tables do without.") from error
    figure = Figure(figsize=(width, height), dpi=120, layout="constrained")  # no pyplot: nothing global, no window
    return figure, figure.add_subplot()


def _colours() -> Any:
    import matplotlib

    return matplotlib.colormaps[_SCALE].with_extremes(bad=_UNKNOWN)


def _hue(at: int) -> Any:
    import matplotlib

    # From a scale that stays apart for the colour-blind and in print; without its lightest end.
    return matplotlib.colormaps[_SCALE](0.85 * (at % 6) / 5)


def _cells(table: Tensor) -> Any:
    return table.detach().cpu().double().numpy()


def _count_ticks(axis: Any, count: int) -> None:
    step = max(1, math.ceil(count / _MOST_TICKS))
    axis.set_ticks(range(0, count, step), [str(at + 1) for at in range(0, count, step)])


def _name_ticks(axis: Any, names: Sequence[str], *, every: bool = False) -> None:
    step = 1 if every else max(1, math.ceil(len(names) / (2 * _MOST_TICKS)))
    axis.set_ticks(range(0, len(names), step), [names[at] for at in range(0, len(names), step)], fontsize=8)


def _draw_ranges(axes: Any, layers: Sequence[LayerAnalysis]) -> None:
    longest = max(layer.numerical_rank for layer in layers)
    quantiles = []
    for at in range(longest):
        values = [layer.singular_values[at] for layer in layers if layer.numerical_rank > at]
        quantiles.append(
            torch.tensor(values, dtype=torch.float64).quantile(torch.tensor([0, 0.25, 0.5, 0.75, 1]).double())
        )
    lowest, lower, middle, upper, highest = torch.stack(quantiles, 1).tolist()
    index = range(1, longest + 1)
    axes.fill_between(index, lowest, highest, color=_hue(3), alpha=0.2, linewidth=0, label="all")
    axes.fill_between(index, lower, upper, color=_hue(2), alpha=0.35, linewidth=0, label="the middle half")
    axes.plot(index, middle, color=_hue(0), marker="o", markersize=3, label="median")
    axes.legend(fontsize=8, frameon=False)


def _write_numbers(axes: Any, image: Any, table: Tensor) -> None:
    for row in range(table.shape[0]):
        for column in range(table.shape[1]):
            value = float(table[row, column])
            if not math.isnan(value):
                is_dark = float(image.norm(value)) < 0.6
                ink = "white" if is_dark else "black"
                axes.text(column, row, f"{value:.3g}", ha="center", va="center", fontsize=7, color=ink)
