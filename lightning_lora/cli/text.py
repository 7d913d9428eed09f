"""Results as text: tables, colours and the progress bar."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from lightning_lora.attachment import table_lines
from lightning_lora.fingerprint import digest, to_plain
from lightning_lora.names import listed

if TYPE_CHECKING:
    from lightning_lora.cli.inspection import Summary
    from lightning_lora.disk.merge import MergeReport

_BAR = 30
_SHOWN_OPTIONS = 8
BAD, WARNING, GOOD, FAINT = "31;1", "33;1", "32", "2"
_MARKS = (
    (re.compile(r"\bnot finite\b"), BAD),
    (re.compile(r"^(?:the adapter fits|the adapters are equal|wrote)\b"), GOOD),
    (re.compile(r"^-[- ]*$"), FAINT),
)


def wants_colours(stream: TextIO) -> bool:
    """Return whether a stream is a terminal whose user wants colours.

    Source:
        https://no-color.org: ``NO_COLOR``, if set to anything, disables them.
    """
    return stream.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def painted(text: str, style: str, stream: TextIO) -> str:
    """Return a text in a colour, if the stream wants colours."""
    return f"\x1b[{style}m{text}\x1b[0m" if wants_colours(stream) else text


def say(label: str, style: str, text: object) -> None:
    """Print an error or a warning to the standard error stream."""
    print(f"lightning-lora: {painted(label, style, sys.stderr)} {text}", file=sys.stderr)


def highlighted(line: str, stream: TextIO) -> str:
    """Return a line with its important words in colour."""
    for pattern, style in _MARKS:
        line = pattern.sub(lambda match, style=style: painted(match[0], style, stream), line)  # type: ignore[misc]
    return line


def summary_object(summary: Summary) -> dict[str, Any]:
    """Return a summary as JSON shows it."""
    return {
        "kind": summary.kind,
        "bytes": summary.size,
        "parameters": _parameters(summary),
        "layers": [layer._asdict() for layer in summary.layers],
        "trained_in_full": {name: list(tensor.shape) for name, tensor in sorted(summary.others.items())},
        "base": {"fingerprint": digest(summary.base), "tensors": to_plain(summary.base)} if summary.base else None,
        "config": summary.config,
    }


def summary_lines(path: Path, summary: Summary) -> list[str]:
    """Return a summary as text: a line of what it is, a table of the layers, the options."""
    rows = [
        (
            layer.name,
            _number(layer.rank),
            _number(layer.scaling),
            _number(layer.norm) if layer.finite else "not finite",
            *(_number(each) if layer.finite else "-" for each in (layer.effective_rank, layer.stable_rank)),
            _number(layer.suggested_rank) if layer.finite else "-",
            f"{layer.parameters:,}",
            layer.dtype,
        )
        for layer in summary.layers
    ]
    total = ("all", "", "", "", "", "", "", f"{sum(layer.parameters for layer in summary.layers):,}", "")
    lines = [f"{path}: {summary.kind}, {_parameters(summary):,} parameters, {_size(summary.size)}"]
    header = ("layer", "rank", "scaling", "norm of update", "effective", "stable", "suggested", "parameters", "dtype")
    lines += table_lines([header, *rows, total])
    lines += [
        f"in full: {name} {tuple(tensor.shape)}, {str(tensor.dtype).removeprefix('torch.')}"
        for name, tensor in sorted(summary.others.items())
    ]
    if summary.base:
        lines.append(f"base: fingerprint {digest(summary.base)}, of {len(summary.base)} tensors")
    said = {key: value for key, value in sorted(summary.config.items()) if value not in (None, False, "", [], {}, ())}
    return lines + [f"{key}: {_shortened(value)}" for key, value in said.items()]


def merge_lines(report: MergeReport) -> list[str]:
    """Return what merging did as text: a table of updates and of what rounding lost."""
    rows = [
        (m.name, f"{m.update:.4g}", f"{m.rounding:.3g}", f"{100 * m.rounding / m.update:.2g} %" if m.update else "-")
        for m in report.merged
    ]
    last = (f"{len(report.merged)} merged", "", "", "")
    lines = table_lines([("tensor", "norm of update", "of rounding", "ratio"), *rows, last])
    for what, names in (("replaced", report.replaced), ("added", report.added)):
        lines += [f"{what}: {listed(names)}"] if names else []
    if report.ignored:
        lines.append(f"ignored, without a place in the base: {listed(report.ignored)}")
    if report.untied:
        lines.append("the output layer has a weight of its own now: config.json says tie_word_embeddings=false")
    lines.append(about_base(report.compared))
    return [*lines, f"wrote {len(report.files)} files of tensors, {_size(report.size)}"]


def about_base(compared: int) -> str:
    """Return what comparing the base with the one that the adapter was trained on has shown."""
    if compared:
        return f"the base is the one that the adapter was trained on, by samples of {compared} tensors"
    return "whether the adapter was trained on this base is unknown: no values were compared"


def progress_bar(
    stream: TextIO, doing: str = "merging", shown: Callable[[int], str] | None = None
) -> Callable[[int, int], None]:
    """Return a function that draws a bar from what is done and what is to do.

    Args:
        stream: Where.
        doing: What is being done.
        shown: How to write an amount; as a size in bytes if left out.
    """
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


def _parameters(summary: Summary) -> int:
    return sum(layer.parameters for layer in summary.layers) + sum(t.numel() for t in summary.others.values())


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
