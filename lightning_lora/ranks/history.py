"""The decisions of a rank schedule, as they are recorded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass
class History:
    """What was decided so far: an entry for the beginning, and one for each decision.

    Attributes:
        steps: Optimizer steps before it.
        budgets: Parameters of the factors that could be in use.
        ranks: By name of the adapter, its rank.
    """

    steps: list[int] = field(default_factory=list)
    budgets: list[int] = field(default_factory=list)
    ranks: dict[str, list[int]] = field(default_factory=dict)

    def add(self, step: int, budget: int, ranks: Mapping[str, int]) -> None:
        """Add an entry."""
        self.steps.append(step)
        self.budgets.append(budget)
        for name, rank in ranks.items():
            self.ranks.setdefault(name, []).append(rank)

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> History:
        """Return a copy of what ``asdict`` returned."""
        ranks = {str(name): [int(rank) for rank in each] for name, each in values["ranks"].items()}
        return cls([*map(int, values["steps"])], [*map(int, values["budgets"])], ranks)


def history_of(record: Mapping[str, Any]) -> History | None:
    """Return the decisions in the record of an adapter, of a training that has ended or goes on; None without any."""
    running = record.get("rank_schedule", {}).get("history")
    ended = [entry["rank_history"] for entry in record.get("adapters", []) if entry.get("rank_history")]
    found = running or (ended[0] if ended else None)
    return None if found is None else History.of(found)
