"""A sweep in a report: its table, the curves of all adapters, and the learning rate against the result."""

from __future__ import annotations

import math
from typing import Any

from lightning_lora.analysis.plots import HUES, as_svg, can_draw, new_figure
from lightning_lora.analysis.reports import Page
from lightning_lora.sweep.standings import DIVERGED, LOST, Result, Standings

_MOST_NAMES = 16  # lines that a legend can hold
_FAINT = 0.35
_OUTLIER = 3.0  # times the distance from the best first to the median: what is beyond is cut off


def add_sweep(page: Page, standings: Standings, monitor: str) -> None:
    """Add a sweep to a page."""
    page.heading("The sweep")
    rows = standings.table().rows()
    best = standings.best
    if best is not None:
        page.text(
            f"{len(rows) - 1} adapters were compared by {monitor}; {best} is the best, and the one described here."
        )
    if can_draw():
        figures = {
            "sweep_curves": (
                plot_curves(standings, monitor),
                f"{monitor} at each validation; a cross is where an adapter was stopped, the thick line the best.",
            )
        }
        if len({each.lr for each in standings.results.values()}) > 1:
            caption = f"Latest {monitor} by learning rate, for each rank; hollow where the adapter was stopped early."
            figures["sweep_rates"] = (plot_rates(standings, monitor), caption)
        page.pictures |= {name: figure for name, (figure, _) in figures.items()}
        page.figures((as_svg(figure, name), f"Lines. {text}", text) for name, (figure, text) in figures.items())
    page.table(rows, f"All adapters, by {monitor}")


def plot_curves(standings: Standings, monitor: str) -> Any:
    """Return the metric of every adapter over the steps, and where each was stopped."""
    names = [name for name in standings.ranked() if standings.results[name].curve]
    with new_figure(6.6, 3.8) as (figure, panels):
        axes = panels[0, 0]
        for at, name in enumerate(names):
            result = standings.results[name]
            steps, values = zip(*result.curve, strict=True)
            is_named = len(names) <= _MOST_NAMES
            line = {"color": HUES[at % len(HUES)], "linestyle": ("-", "--", ":")[at // len(HUES) % 3]}
            style = {"linewidth": 2.4} if name == standings.best else {"linewidth": 1.0}
            axes.plot(steps, values, marker=".", markersize=4, label=name if is_named else None, **line, **style)
            if result.stopped_at is not None:
                axes.plot(steps[-1], values[-1], marker="x", markersize=7, color=line["color"])
        _cut_off(axes, standings)
        if names and len(names) <= _MOST_NAMES:
            axes.legend(fontsize=7, handlelength=3, loc="upper left", bbox_to_anchor=(1.01, 1.0), borderaxespad=0.0)
        axes.set(xlabel="step", ylabel=monitor)
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(True, alpha=_FAINT)
    return figure


def plot_rates(standings: Standings, monitor: str) -> Any:
    """Return the latest value of the metric against the learning rate, a line for each rank."""
    groups: dict[str, list[Result]] = {}
    for result in standings.results.values():
        if result.lr is not None and math.isfinite(result.last) and result.why != DIVERGED:
            groups.setdefault(f"rank {result.rank}", []).append(result)
    with new_figure(5.0, 3.8) as (figure, panels):
        axes = panels[0, 0]
        for color, (label, results) in zip(HUES * len(groups), groups.items(), strict=False):
            results.sort(key=lambda each: each.lr or 0.0)
            rates, values = [each.lr for each in results], [each.last for each in results]
            axes.plot(rates, values, color=color, linewidth=1.0, label=label)
            for rate, value, result in zip(rates, values, results, strict=True):
                fill = "none" if result.why == LOST else color
                axes.plot(rate, value, marker="o", markersize=6, color=color, markerfacecolor=fill)
        _cut_off(axes, standings)
        axes.set(xscale="log", xlabel="learning rate", ylabel=monitor)
        if len(groups) > 1:
            axes.legend(fontsize=8)
        axes.grid(True, alpha=_FAINT)
    return figure


def _cut_off(axes: Any, standings: Standings) -> None:
    """Leave values out of sight that are so bad that nothing else could be seen."""
    values = sorted(v for each in standings.results.values() for _, v in each.curve if math.isfinite(v))
    if standings.direction == "max":
        values = [-value for value in reversed(values)]
    if len(values) < 4:
        return
    best, median = values[0], values[len(values) // 2]
    limit = median + _OUTLIER * (median - best)
    if values[-1] > limit > best:
        axes.set(**({"ylim": (None, limit)} if standings.direction == "min" else {"ylim": (-limit, None)}))
