"""Colours in the command's output: on a terminal, unless the user does not want any."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import TextIO

BAD, WARNING, GOOD, FAINT = "31;1", "33;1", "32", "2"

# What stands out in a line of text.
_MARKS = (
    (re.compile(r"\bnot finite\b"), BAD),
    (re.compile(r"^(?:the adapter fits|the adapters are equal|wrote)\b"), GOOD),
    (re.compile(r"^-[- ]*$"), FAINT),
)


def wants_colours(stream: TextIO, environment: Mapping[str, str] = os.environ) -> bool:
    """Return whether to colour what goes to a stream.

    Source:
        https://no-color.org: ``NO_COLOR``, if set to anything, means none.
    """
    return stream.isatty() and not environment.get("NO_COLOR") and environment.get("TERM") != "dumb"


def painted(text: str, style: str, stream: TextIO) -> str:
    """Return a text in a colour, if the stream wants that."""
    return f"\x1b[{style}m{text}\x1b[0m" if wants_colours(stream) else text


def highlighted(line: str, stream: TextIO) -> str:
    """Return a line with what stands out in it in colours."""
    for pattern, style in _MARKS:
        line = pattern.sub(lambda match, style=style: painted(match[0], style, stream), line)  # type: ignore[misc]
    return line
