"""Results as text: tables, colors and the progress bar."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, TextIO

from lightning_lora.attachment import table_lines
from lightning_lora.fingerprint import digest
from lightning_lora.names import listed

if TYPE_CHECKING:
    from lightning_lora.cli.inspection import Summary
    from lightning_lora.disk.merge import MergeReport
    from lightning_lora.several.sum_as_adapter import CombinedLayer

_BAR = 30
_SHOWN_OPTIONS = 8
BAD, WARNING, GOOD, FAINT = "31;1", "33;1", "32", "2"
_MARKS = (
    (re.compile(r"\bnot finite\b"), BAD),
    (re.compile(r"^(?:the adapter fits|the adapters are equal|wrote)\b"), GOOD),
    (re.compile(r"^-[- ]*$"), FAINT),
)


def is_terminal(stream: TextIO | None) -> bool:
    """Return whether a stream is a terminal; a process may have been started without it."""
    return stream is not None and stream.isatty()


def wants_colors(stream: TextIO | None) -> bool:
    """Return whether a stream is a terminal whose user wants colors.

    Source:
        https://no-color.org: ``NO_COLOR``, if set to anything, disables them.
    """
    return is_terminal(stream) and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def painted(text: str, style: str, stream: TextIO | None) -> str:
    """Return a text in a color, if the stream wants colors."""
    return f"\x1b[{style}m{text}\x1b[0m" if wants_colors(stream) else text


def say(label: str, style: str, text: object) -> None:
    """Print an error or a warning to the standard error stream."""
    print(f"lightning-lora: {painted(label, style, sys.stderr)} {text}", file=sys.stderr)


def highlighted(line: str, stream: TextIO | None) -> str:
    """Return a line with its important words in color."""
    for pattern, style in _MARKS:
        line = pattern.sub(lambda match, style=style: painted(match[0], style, stream), line)  # type: ignore[misc]
    return line


def summary_lines(summary: Summary) -> list[str]:
    """Return the contents of an adapter file as text: one line about it, a table of the layers, the options."""
    rows = [
        (
            layer.name,
            _number(layer.rank),
            _number(layer.scaling),
            _number(layer.norm) if layer.finite else "not finite",
            *(_number(each) if layer.finite else "-" for each in layer[-3:]),
            f"{layer.parameters:,}",
            layer.dtype,
        )
        for layer in summary.layers
    ]
    total = ("all", "", "", "", "", "", "", f"{sum(layer.parameters for layer in summary.layers):,}", "")
    file = summary.file
    lines = [f"{file.path}: {summary.kind}, {summary.parameters:,} parameters, {_size(file.size)}"]
    if file.adapters:
        lines.append(f"adapters in it: {listed([*map(repr, file.adapters)])}; this is {file.adapter!r}")
    header = ("layer", "rank", "scaling", "norm of update", "effective", "stable", "suggested", "parameters", "dtype")
    lines += table_lines([header, *rows, total])
    lines += [
        f"in full: {name} {tuple(tensor.shape)}, {str(tensor.dtype).removeprefix('torch.')}"
        for name, tensor in summary.others.items()
    ]
    if file.base:
        lines.append(f"base: fingerprint {digest(file.base)}, of {len(file.base)} tensors")
    if summary.sweep:
        lines += [
            "",
            f"a sweep of {len(summary.sweep)} adapters, the best first:",
            *repr(summary.sweep).splitlines(),
            "",
        ]
    said = {key: value for key, value in sorted(file.options.items()) if value not in (None, False, "", [], {}, ())}
    return lines + [f"{key}: {_shortened(value)}" for key, value in said.items()]


def merge_lines(report: MergeReport) -> list[str]:
    """Return the report of a merge as text: a table of the updates and their rounding errors."""
    rows = [
        (m.name, f"{m.update:.4g}", f"{m.rounding:.3g}", f"{100 * m.rounding / m.update:.2g} %" if m.update else "-")
        for m in report.merged
    ]
    last = (f"{len(report.merged)} merged", "", "", "")
    lines = table_lines([("tensor", "norm of update", "of rounding", "ratio"), *rows, last])
    named = {"replaced": report.replaced, "added": report.added, "ignored, not in the base": report.ignored}
    lines += [f"{what}: {listed(names)}" for what, names in named.items() if names]
    if report.untied:
        lines.append("the output layer is now untied: config.json has tie_word_embeddings=false")
    lines.append(about_base(report.compared))
    return [*lines, f"wrote {len(report.files)} tensor files, {_size(report.size)}"]


def sum_lines(layers: Sequence[CombinedLayer]) -> list[str]:
    """Return the layers of a sum of adapters as a table: their ranks and what was cut."""
    if not layers:
        return []
    rows = [(each.name, str(each.stacked), str(each.rank), f"{100 * each.error:.3g} %") for each in layers]
    worst = max(each.error for each in layers)
    last = ("at most", *(str(max(ranks)) for ranks in ([e.stacked for e in layers], [e.rank for e in layers])))
    return table_lines([("layer", "rank before", "after", "relative error"), *rows, (*last, f"{100 * worst:.3g} %")])


def about_base(compared: int) -> str:
    """Return the outcome of comparing the base with the adapter's fingerprint."""
    if compared:
        return f"the base is the one that the adapter was trained on, judging by samples of {compared} tensors"
    return "unknown whether the adapter was trained on this base: no values were compared"


def progress_bar(
    stream: TextIO, doing: str = "merging", shown: Callable[[int], str] | None = None
) -> Callable[[int, int], None]:
    """Return a function that draws a progress bar, given the amount done and the total, in bytes unless ``shown``."""
    write = shown or _size
    drawn = -1

    def draw(done: int, todo: int) -> None:
        nonlocal drawn
        percent = 100 * done // max(1, todo)
        if percent > drawn:
            drawn = percent
            bar = "#" * (_BAR * percent // 100)
            end = "\n" if done >= todo else ""
            stream.write(f"\r{doing} [{bar:<{_BAR}}] {percent:3d} %  {write(done)} of {write(todo)}{end}")
            stream.flush()

    return draw


def _number(number: float | None) -> str:
    return "unknown" if number is None else f"{number:.4g}"


def _size(count: int) -> str:
    for unit in ("bytes", "kB", "MB"):
        if count < 1000:
            return f"{count:.3g} {unit}" if unit != "bytes" else f"{count} bytes"
        count /= 1000  # type: ignore[assignment]
    return f"{count:,.2f} GB"


def _shortened(value: object) -> str:
    if isinstance(value, (list, tuple)):
        return listed([str(each) for each in value], _SHOWN_OPTIONS)
    text = str(value)
    return text if len(text) <= 100 else f"{text[:97]}..."
