"""What a calibration found, as values and as a table."""

from __future__ import annotations

from dataclasses import dataclass
from os import PathLike
from typing import Any, NamedTuple

from torch import nn
from typing_extensions import override

from lightning_lora.adapted_model import AdaptedModel
from lightning_lora.attachment import table_lines
from lightning_lora.names import listed
from lightning_lora.storage.adapter_file import damage_named
from lightning_lora.storage.checkpoint import plain_record


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

    @property
    def title(self) -> str:
        """How the starts were computed, in words."""
        seen = f" from {self.batches} batches, {100 * self.tokens:.0f} % of their tokens" if self.batches else ""
        return f"starts computed{seen}"

    def rows(self) -> list[tuple[str, ...]]:
        """Return the table as text: a header, a row for each adapter, and a total; without columns that are empty."""
        rows = [("layer", "start", "rank", "suggested", "explained")]
        for each in self.layers:
            suggested = "" if each.suggested is None else str(each.suggested)
            explained = "" if each.explained is None else f"{100 * each.explained:.0f} %"
            rows.append((each.label, each.start, str(each.rank), suggested, explained))
        kept = [at for at in range(len(rows[0])) if any(row[at] for row in rows[1:])]
        total = (f"{len(self.layers)} layers", "", str(sum(each.rank for each in self.layers)), "", "")
        return [tuple(row[at] for at in kept) for row in (*rows, total)]

    def notes(self) -> list[str]:
        """Return which adapters kept their random start, and why."""
        notes: dict[str, list[str]] = {}
        for each in self.layers:
            if each.note:
                notes.setdefault(each.note, []).append(each.label)
        return [f"random start: {listed(names)} ({note})" for note, names in notes.items()]

    def plain(self) -> dict[str, Any]:
        """Return what is kept in records."""
        layers = {each.label: each.plain() for each in self.layers}
        return {"batches": self.batches, "tokens": self.tokens, "layers": layers}

    @override
    def __str__(self) -> str:
        return "\n".join([f"LoRA: {self.title}", *table_lines(self.rows()), *self.notes()])


def start_in(source: nn.Module | str | PathLike[str]) -> CalibrationReport | None:
    """Return what a calibration found of the starts of an adapter, its active or its trained one, if it is recorded.

    Args:
        source: A module, or a file.

    Raises:
        ValueError: The record in the file is damaged.
    """
    if isinstance(source, nn.Module):
        entries = [root.attachment.calibration for root in AdaptedModel(source).roots]
    else:
        with damage_named(source):
            entries = [each.get("calibration") for each in plain_record(source).get("adapters", [])]
    found = [each for each in entries if each]
    if not found:
        return None
    with damage_named(source):
        labels = {name: said for each in found for name, said in each["layers"].items()}
        layers = [CalibratedLayer(**{**_UNKNOWN, **said, "label": name}) for name, said in labels.items()]
        return CalibrationReport(layers, found[0]["batches"], found[0]["tokens"])


_UNKNOWN = {"suggested": None, "explained": None}
