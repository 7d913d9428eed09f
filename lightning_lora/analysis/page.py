"""One page of HTML that needs nothing else: words, tables and figures in one file, for the screen and for paper."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path

_SHORT = 25  # rows that stay together on paper
_STYLE = """
:root { color-scheme: light dark;
  --paper: #ffffff; --ink: #1c2127; --quiet: #5b6570; --line: #d5dae0; --soft: #f4f6f8; }
@media (prefers-color-scheme: dark) {
  :root { --paper: #14171a; --ink: #e6e9ec; --quiet: #a3adb8; --line: #3a4149; --soft: #1e2328; }
}
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 2rem 1.25rem 4rem; max-width: 70rem; background: var(--paper); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", "DejaVu Sans", sans-serif; }
h1 { font-size: 1.7rem; line-height: 1.25; margin: 0 0 .5rem; overflow-wrap: anywhere; }
h2 { font-size: 1.25rem; margin: 2.5rem 0 .5rem; padding-top: .5rem; border-top: 1px solid var(--line); }
p, li { max-width: 46rem; }
.lead { color: var(--quiet); overflow-wrap: anywhere; }
figure { margin: 1.25rem 0; }
figure svg { display: block; max-width: 100%; height: auto; }
figure svg text { font-family: system-ui, -apple-system, "Segoe UI", "DejaVu Sans", sans-serif !important; }
figcaption, caption { color: var(--quiet); font-size: .875rem; text-align: left; max-width: 46rem; }
figcaption { margin-top: .5rem; }
caption { padding-bottom: .5rem; caption-side: top; }
.figures { display: flex; flex-wrap: wrap; gap: 0 1rem; align-items: flex-start; }
.figures figure { flex: 0 1 auto; max-width: 100%; }
.wide { overflow-x: auto; margin: 1.25rem 0; }
table { min-width: min(100%, 30rem); border-collapse: collapse; font-size: .875rem;
  font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .7rem; text-align: right; white-space: nowrap; border-bottom: 1px solid var(--line); }
th:first-child, td:first-child { text-align: left; padding-left: 0; }
thead th { border-bottom: 2px solid var(--line); vertical-align: bottom; }
tbody th { font-weight: normal; }
pre { background: var(--soft); padding: .75rem 1rem; white-space: pre-wrap; font-size: .875rem; }
@page { margin: 1.6cm; }
@media print {
  :root { --paper: #ffffff; --ink: #000000; --quiet: #444444; --line: #bbbbbb; --soft: #ffffff; color-scheme: light; }
  * { print-color-adjust: exact; -webkit-print-color-adjust: exact; }
  body { font-size: 10.5pt; padding: 0; max-width: none; }
  h2 { break-after: avoid; }
  figure, pre, tr { break-inside: avoid; }
  .figures { display: block; }
  .wide { overflow: visible; }
  .short { break-inside: avoid; }
  caption { break-after: avoid; }
  table { font-size: 7.5pt; }
  th, td { padding: .12rem .45rem; }
  thead { display: table-header-group; }
  pre { border: 1px solid var(--line); }
}
"""


class Page:
    """A page under construction; what is added comes below what is there.

    Args:
        title: Its heading, and the name of the window.
        lead: A line below it.
    """

    def __init__(self, title: str, lead: str = "") -> None:
        self._title = title
        self._parts = [f"<h1>{escape(title)}</h1>"]
        if lead:
            self._parts.append(f'<p class="lead">{escape(lead)}</p>')

    def heading(self, text: str) -> None:
        """Begin a section."""
        self._parts.append(f"<h2>{escape(text)}</h2>")

    def text(self, text: str) -> None:
        """Add a paragraph."""
        self._parts.append(f"<p>{escape(text)}</p>")

    def points(self, texts: Iterable[str]) -> None:
        """Add a list."""
        self._parts.append("<ul>" + "".join(f"<li>{escape(text)}</li>" for text in texts) + "</ul>")

    def code(self, text: str) -> None:
        """Add lines that are read as they stand."""
        self._parts.append(f"<pre><code>{escape(text)}</code></pre>")

    def table(self, rows: Sequence[Sequence[str]], caption: str) -> None:
        """Add a table.

        Args:
            rows: A header first; the first cell of a row says what the row is about.
            caption: What it shows, said above it and to screen readers.
        """
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
        """Add figures, beside each other where there is room.

        Args:
            figures: The SVG of each, what it looks like in words for whoever does not see it, and its caption.
        """
        parts = [
            f"<figure{_width(svg)}>{_described(svg, words)}<figcaption>{escape(caption)}</figcaption></figure>"
            for svg, words, caption in figures
        ]
        self._parts.append(f'<div class="figures">{"".join(parts)}</div>')

    def html(self) -> str:
        """Return the page."""
        body = "\n".join(self._parts)
        return (
            '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
            '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
            '<meta name="color-scheme" content="light dark">\n'
            f"<title>{escape(self._title)}</title>\n<style>{_STYLE}</style>\n</head>\n"
            f"<body>\n<main>\n{body}\n</main>\n</body>\n</html>\n"
        )

    def write(self, path: Path) -> None:
        """Write the page to a file.

        Raises:
            OSError: It cannot be written.
        """
        path.write_text(self.html(), encoding="utf-8")


def _width(svg: str) -> str:
    """Return the style that makes a figure as wide as its picture, so that its caption is no wider."""
    found = re.search(r'<svg [^>]*\bwidth="([\d.]+)pt"', svg)
    return f' style="width: min(100%, {float(found[1]):.0f}pt)"' if found else ""


def _described(svg: str, words: str) -> str:
    return svg.replace("<svg ", f'<svg role="img" aria-label="{escape(words)}" ', 1)
