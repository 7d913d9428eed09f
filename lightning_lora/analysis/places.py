"""Where in a model a layer is, told from its name: which block, and what it is there."""

from __future__ import annotations

import re

from lightning_lora.names import join

_BLOCK = re.compile(r"(.*?(?:^|\.)\d+)\.(.+)$")


def place(name: str) -> tuple[str, str]:
    """Return the block that a layer is in, and what it is there: ``h.3.attn.q`` is ``attn.q`` of ``h.3``.

    A layer outside of blocks is in the block ``""``; experts keep their number, ``up[2]``.
    """
    name, _, expert = name.partition("[")
    found = _BLOCK.match(name)
    block, kind = found.groups() if found else ("", name)
    return block, kind + (f"[{expert}" if expert else "")


def kind_of(name: str) -> str:
    """Return what a layer is in its block, the same for all blocks and all experts of a stack.

    A layer that only has a number there goes by its full name: numbers name nothing.
    """
    block, kind = place(name.partition("[")[0])
    return join(block, kind) if kind.isdigit() else kind


def in_order(name: str) -> tuple[tuple[int, int, str], ...]:
    """Return a key that sorts names as people count: ``h.9`` comes before ``h.10``."""
    parts = re.findall(r"\d+|[^\d]+", name)
    return tuple((0, int(part), "") if part.isdecimal() else (1, 0, part) for part in parts)
