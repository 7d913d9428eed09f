"""Which adapters of a sweep still train, what each has reached, and which is the best: plain values, no tensors."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from typing_extensions import override

from lightning_lora.attachment import table_lines
from lightning_lora.storage.adapter_file import damage_named
from lightning_lora.storage.checkpoint import RECORD_KEY, SWEEP_KEY, plain_values
from lightning_lora.sweep.candidates import Candidate

LOST, DIVERGED = "lost", "diverged"


@dataclass
class Result:
    """What one adapter has reached.

    Attributes:
        given: Its options, as they were written.
        rank: The rank of most of its layers.
        curve: Step and value of the metric at each validation.
        losses: Step and training loss, thinned out.
        lr: Its learning rate: the largest of its optimizer groups, at the peak of a cycle.
        stopped_at: The step after which it stopped; None while it trains.
        why: ``"lost"`` or ``"diverged"`` if it stopped.
    """

    given: Mapping[str, Any]
    rank: int
    curve: list[tuple[int, float]] = field(default_factory=list)
    losses: list[tuple[int, float]] = field(default_factory=list)
    lr: float | None = None
    stopped_at: int | None = None
    why: str | None = None

    @property
    def last(self) -> float:
        """The metric's latest value, which belongs to the adapter as it is now; NaN if there is none."""
        return self.curve[-1][1] if self.curve else math.nan


class Table(list[dict[str, Any]]):
    """The results of a sweep as rows, best first; shown as a table."""

    def rows(self) -> list[tuple[str, ...]]:
        """Return the table as texts, the header first."""
        header = tuple(self[0]) if self else ()
        return [header, *(tuple(_cell(row[key]) for key in header) for row in self)]

    @override
    def __repr__(self) -> str:
        rows = self.rows()
        return "\n".join(table_lines([*rows, ("",) * len(rows[0])])[:-2])


class Standings:
    """The results of all adapters, and the order among them.

    Args:
        chosen: The adapters.
        direction: Whether a smaller value of the metric is better (``"min"``) or a larger one (``"max"``).
    """

    def __init__(self, chosen: Mapping[str, Candidate], direction: str) -> None:
        self.direction = direction
        self.results = {name: Result(each.given, int(each.config.first_rank)) for name, each in chosen.items()}
        self.validations = 0
        self._curve_stride = 1

    @property
    def live(self) -> list[str]:
        """Names of the adapters that train, in order."""
        return [name for name, result in self.results.items() if result.stopped_at is None]

    @property
    def best(self) -> str | None:
        """The adapter with the best latest value; None before the first validation."""
        ranked = [name for name in self.ranked() if not math.isnan(self._key(name))]
        return ranked[0] if ranked else None

    def ranked(self, names: Iterable[str] | None = None) -> list[str]:
        """Return names from the best to the worst; those without a value, or with NaN, come last."""

        def key(name: str) -> tuple[bool, float]:
            value = self._key(name)
            return math.isnan(value), value

        return sorted(self.results if names is None else names, key=key)

    def _key(self, name: str) -> float:
        result = self.results[name]
        if result.why == DIVERGED or math.isinf(result.last):
            return math.nan
        return result.last if self.direction == "min" else -result.last

    def note(self, step: int, values: Mapping[str, float]) -> None:
        """Record the metric of the adapters that were validated."""
        self.validations += 1
        for name, value in values.items():
            self.results[name].curve.append((step, value))

    def note_losses(self, step: int, losses: Mapping[str, float]) -> None:
        """Record training losses, at most some hundreds of each adapter."""
        if step % self._curve_stride:
            return
        for name, loss in losses.items():
            self.results[name].losses.append((step, loss))
        if max(len(each.losses) for each in self.results.values()) > _MOST_LOSSES:
            self._curve_stride *= 2
            for result in self.results.values():
                result.losses = [entry for entry in result.losses if entry[0] % self._curve_stride == 0]

    def stop(self, names: Collection[str], step: int, why: str) -> None:
        """Record that adapters train no further."""
        for name in names:
            self.results[name].stopped_at, self.results[name].why = step, why

    def losers(self, keep: float) -> list[str]:
        """Return the adapters that successive halving stops now: all but the best ``keep`` of those that train."""
        live = self.live
        count = max(1, math.ceil(keep * len(live)))
        broken = {name for name in live if not math.isfinite(self.results[name].last)}
        kept = [name for name in self.ranked(live) if name not in broken][:count]
        return [name for name in live if name not in kept and name not in broken]

    def table(self) -> Table:
        """Return one row for each adapter, the best first."""
        options = list(dict.fromkeys(key for each in self.results.values() for key in each.given))
        rows = Table()
        for name in self.ranked():
            result = self.results[name]
            values = [value for _, value in result.curve if not math.isnan(value)]
            choose = min if self.direction == "min" else max
            row = {"name": name} | {key: result.given.get(key) for key in options}
            row |= {} if "lr" in options else {"lr": result.lr}
            row |= {} if "rank" in options else {"rank": result.rank}
            row |= {
                "value": None if math.isnan(result.last) else result.last,
                "best value": choose(values) if values else None,
                "steps": max([step for step, _ in (*result.curve, *result.losses)], default=0),
                "stopped at": result.stopped_at,
                "why": result.why,
            }
            rows.append(row)
        return rows

    # --- in a checkpoint

    def to_record(self) -> dict[str, Any]:
        """Return plain values."""
        return {
            "direction": self.direction,
            "validations": self.validations,
            "stride": self._curve_stride,
            "results": {name: _described(each) for name, each in self.results.items()},
        }

    def restore(self, record: Mapping[str, Any]) -> None:
        """Take up what a checkpoint's record says of adapters of the same names."""
        self.validations, self._curve_stride = int(record["validations"]), int(record["stride"])
        for name, said in record["results"].items():
            self.results[name] = _result(said)


_MOST_LOSSES = 400


def _described(result: Result) -> dict[str, Any]:
    return {
        "given": dict(result.given),
        "rank": result.rank,
        "curve": [list(entry) for entry in result.curve],
        "losses": [list(entry) for entry in result.losses],
        "lr": result.lr,
        "stopped_at": result.stopped_at,
        "why": result.why,
    }


def _result(said: Mapping[str, Any]) -> Result:
    curves: dict[str, Any] = {
        key: [(int(step), float(value)) for step, value in said[key]] for key in ("curve", "losses")
    }
    plain: dict[str, Any] = {key: said[key] for key in ("given", "rank", "lr", "stopped_at", "why")}
    return Result(**plain, **curves)


def standings_of(record: Mapping[str, Any]) -> Standings:
    """Return the standings that a checkpoint's record holds."""
    standings = Standings({}, record["direction"])
    standings.restore(record)
    return standings


def sweep_in(path: Path) -> tuple[Standings, str] | None:
    """Return what a checkpoint says of its sweep, and the metric that decided; None if it holds no sweep."""
    if not path.is_file():
        return None
    with path.open("rb") as stream:
        record = plain_values(stream).get(RECORD_KEY)
    said = record.get(SWEEP_KEY) if isinstance(record, Mapping) else None
    if said is None:
        return None
    with damage_named(path):
        return standings_of(said), str(said["monitor"])


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
