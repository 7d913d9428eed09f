"""What a calibration found, as values and as a table."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

from typing_extensions import override

from lightning_lora.attachment import table_lines
from lightning_lora.names import listed


class CalibratedLayer(NamedTuple):
    """What one adapter started from.

    Attributes:
        label: Its name.
        start: The start that it got.
        rank: Its rank.
        suggested: The rank that the data suggest; None if they do not tell.
        explained: The share of what the directions found are worth that those within the rank are.
        note: Why it did not get the start that was asked for; empty if it did.
    """

    label: str
    start: str
    rank: int
    suggested: int | None
    explained: float | None
    note: str = ""

    def plain(self) -> dict[str, Any]:
        """Return what is kept in records."""
        return {key: value for key, value in self._asdict().items() if key != "label" and value not in (None, "")}


@dataclass(frozen=True)
class CalibrationReport:
    """What ``calibrate`` found; ``print`` it for a table.

    Attributes:
        layers: One entry for each adapter.
        batches: Number of batches.
        tokens: Share of the tokens that were used; the others are padding.
    """

    layers: list[CalibratedLayer]
    batches: int = 0
    tokens: float = 1.0

    @override
    def __str__(self) -> str:
        header = ("layer", "start", "rank", "suggested", "explained")
        rows = [
            (
                each.label,
                each.start,
                str(each.rank),
                "" if each.suggested is None else str(each.suggested),
                "" if each.explained is None else f"{100 * each.explained:.0f} %",
            )
            for each in self.layers
        ]
        total = (f"{len(rows)} layers", "", str(sum(each.rank for each in self.layers)), "", "")
        seen = f" from {self.batches} batches, {100 * self.tokens:.0f} % of their tokens" if self.batches else ""
        notes: dict[str, list[str]] = {}
        for each in self.layers:
            if each.note:
                notes.setdefault(each.note, []).append(each.label)
        lines = [f"random start: {listed(names)} ({note})" for note, names in notes.items()]
        return "\n".join([f"LoRA: starts computed{seen}", *table_lines([header, *rows, total]), *lines])
