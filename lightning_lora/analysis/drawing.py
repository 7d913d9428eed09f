"""Figures, colours and ticks for ``plots``; the only file that imports matplotlib, the optional extra ``plots``.

Figures are made without ``pyplot``, so nothing global changes and no window opens. The ink is one unique colour, which
a page replaces by the colour of its own text, light or dark.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Sequence
from typing import Any

from torch import Tensor

INK = "#1c2127"
UNKNOWN = "#9aa0a6"
MOST_NUMBERS = 160  # with more cells, numbers do not fit into them
_SCALE = "viridis"
# Of medium lightness, to be visible on white, on black and in grey print.
_LINES = ("#3b7dd8", "#dd6b35", "#2a9d6f", "#a565c9", "#b98a12", "#d1495b")
_DOTS_PER_INCH = 130


def can_draw() -> bool:
    """Return whether matplotlib is installed."""
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError:
        return False
    return True


def new_figure(width: float, height: float, rows: int = 1, columns: int = 1) -> tuple[Any, Any]:
    """Return a figure and a ``(rows, columns)`` array of its axes.

    Args:
        width: In inches.
        height: In inches.
        rows: Rows of panels.
        columns: Columns of panels.

    Raises:
        ImportError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("Plots need matplotlib: pip install 'lightning-lora[plots]'. Tables do not.") from error
    figure = Figure(figsize=(width, height), dpi=_DOTS_PER_INCH, layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False)
    for axes in panels.flat:
        axes.tick_params(colors=INK, labelsize=8)
        for spine in axes.spines.values():
            spine.set_edgecolor(INK)
            spine.set_linewidth(0.6)
    return figure, panels


def title(axes: Any, text: str, *, size: float = 10) -> None:
    """Write the title of a panel."""
    axes.set_title(text, color=INK, fontsize=size)


def axis_names(axes: Any, across: str, down: str, *, size: float = 9) -> None:
    """Write the names of both axes."""
    axes.set_xlabel(across, color=INK, fontsize=size)
    axes.set_ylabel(down, color=INK, fontsize=size)


def legend(axes: Any, **options: Any) -> None:
    """Draw a legend without a frame."""
    axes.legend(frameon=False, labelcolor=INK, **options)


def heat_map(axes: Any, table: Tensor, *, lowest: float | None = None, highest: float | None = None) -> Any:
    """Draw a table as colours, with unknown cells in grey, and return the image.

    Args:
        axes: The axes to draw into.
        table: ``(rows, columns)``; NaN is unknown.
        lowest: The value of the darkest colour; by default the lowest of the table.
        highest: The value of the lightest colour; by default the highest of the table.
    """
    import matplotlib

    colours = matplotlib.colormaps[_SCALE].with_extremes(bad=UNKNOWN)
    cells = table.detach().cpu().double().numpy()
    return axes.imshow(cells, cmap=colours, vmin=lowest, vmax=highest, aspect="auto", interpolation="nearest")


def colour_bar(figure: Any, image: Any, panels: Any, name: str = "") -> None:
    """Draw the colour scale of one or several heat maps."""
    bar = figure.colorbar(image, ax=panels, pad=0.02)
    bar.set_label(name, color=INK, fontsize=9)
    bar.ax.tick_params(colors=INK, labelsize=8)
    bar.outline.set_edgecolor(INK)
    bar.outline.set_linewidth(0.6)


def hue(at: int) -> str:
    """Return the colour of a line."""
    return _LINES[at % len(_LINES)]


def dash(at: int) -> str:
    """Return the dash pattern of a line, which changes when the colours repeat."""
    return ("-", "--", ":")[at // len(_LINES) % 3]


def count_ticks(axis: Any, count: int, *, first: int, most: int) -> None:
    """Number the cells of an axis from ``first``, at most so many of them."""
    name_ticks(axis, [str(first + at) for at in range(count)], most=most)


def name_ticks(axis: Any, names: Sequence[str], *, most: int) -> None:
    """Name the cells of an axis, at most so many of them, evenly spaced."""
    step = max(1, math.ceil(len(names) / most))
    axis.set_ticks(range(0, len(names), step), [names[at] for at in range(0, len(names), step)])


def slanted(axes: Any) -> None:
    """Rotate the names below the axes, so that they do not overlap."""
    axes.tick_params(axis="x", rotation=30)
    for label in axes.get_xticklabels():
        label.set_horizontalalignment("right")
        label.set_rotation_mode("anchor")


def write_numbers(axes: Any, image: Any, table: Tensor, decimals: int | None = None) -> None:
    """Write its number into each known cell, in an ink that stands out from the cell's colour.

    Args:
        axes: The axes of the heat map.
        image: The heat map.
        table: Its numbers.
        decimals: How many to write; by default three significant digits.
    """
    for row in range(table.shape[0]):
        for column in range(table.shape[1]):
            value = float(table[row, column])
            if not math.isnan(value):
                ink = "white" if float(image.norm(value)) < 0.6 else "black"
                text = _short(value) if decimals is None else f"{round(value, decimals) + 0.0:.{decimals}f}"
                axes.text(column, row, text, ha="center", va="center", fontsize=6.5, color=ink)


def _short(value: float) -> str:
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"


def as_svg(figure: Any, name: str) -> str:
    """Return a figure as SVG for a page: text stays text, and the ink takes the colour of the page's text.

    Args:
        figure: Any figure of this package.
        name: A name that is unique on the page; the ids of the figure's parts begin with it.
    """
    import matplotlib

    file = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        no_metadata = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(file, format="svg", transparent=True, metadata=no_metadata)
    svg = file.getvalue()
    svg = svg[svg.index("<svg") :].strip()
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.S)
    svg = re.sub(r'\bid="', f'id="{name}-', svg)
    svg = re.sub(r"url\(#", f"url(#{name}-", svg)
    svg = re.sub(r'href="#', f'href="#{name}-', svg)
    return svg.replace(INK, "currentColor")
