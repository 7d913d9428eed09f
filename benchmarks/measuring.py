"""Shared by all benchmarks: jobs in turn in one process, medians of ratios, a table with targets, and JSON.

The speed of shared machines changes by half from minute to minute. So every job runs once per round, and the result is
the median of the rounds' ratios; the quartiles show how reliable it is.
"""

from __future__ import annotations

import argparse
import gc
import json
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

import torch

Times = dict[str, list[float]]


@dataclass(frozen=True)
class Row:
    """One line of a table.

    Attributes:
        quantity: Name of the quantity.
        value: The median, or the number itself.
        low: First quartile, if there are rounds.
        high: Third quartile.
        reach: Target, as an upper bound, if there is one.
    """

    quantity: str
    value: float
    low: float | None = None
    high: float | None = None
    reach: float | None = None

    @property
    def verdict(self) -> str:
        """Whether the target is reached."""
        if self.reach is None:
            return ""
        return "reached" if self.value <= self.reach else "missed"

    def __str__(self) -> str:
        spread = "" if self.low is None else f" [{self.low:.3f}, {self.high:.3f}]"
        reach = "" if self.reach is None else f"{self.reach:g}"
        return f"| {self.quantity} | {self.value:.3f}{spread} | {reach} | {self.verdict} |"


def spread(quantity: str, values: Sequence[float], reach: float | None = None) -> Row:
    """Return the median and the quartiles of some values."""
    if len(values) < 2:
        return Row(quantity, values[0], reach=reach)
    low, _, high = statistics.quantiles(values, n=4)
    return Row(quantity, statistics.median(values), low, high, reach)


def ratio(times: Times, above: str, below: str, reach: float | None = None, quantity: str = "") -> Row:
    """Return the median of the rounds' ratios of two jobs."""
    values = [a / b for a, b in zip(times[above], times[below], strict=True)]
    return spread(quantity or f"{above} / {below}", values, reach)


def cpu_seconds(job: Callable[[], object]) -> float:
    """Return the CPU time of one run."""
    started = time.process_time()
    job()
    return time.process_time() - started


def wall_seconds(job: Callable[[], object]) -> float:
    """Return the wall time of one run."""
    started = time.perf_counter()
    job()
    return time.perf_counter() - started


def in_turn(
    jobs: Mapping[str, Callable[[], object]],
    rounds: int,
    *,
    warmup: int = 2,
    clock: Callable[[Callable[[], object]], float] = cpu_seconds,
) -> Times:
    """Run every job once per round, and return the times of all rounds by job."""
    times: Times = {name: [] for name in jobs}
    for turn in range(warmup + rounds):
        gc.collect()
        names = [*jobs]
        first = turn % len(names)  # each job comes first equally often: after a pause, the caches are cold
        for name in names[first:] + names[:first]:
            taken = clock(jobs[name])
            if turn >= warmup:
                times[name].append(taken)
    return times


def saved_bytes(call: Callable[[], object], known: Sequence[torch.Tensor]) -> int:
    """Return the bytes that a call keeps for backward, each storage counted once, without the known tensors."""
    seen: dict[int, int] = {}
    alive = []  # so that no memory is reused in the meantime

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        seen[storage.data_ptr()] = storage.nbytes()
        alive.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        alive.append(call())  # type: ignore[arg-type]
    own = {tensor.untyped_storage().data_ptr() for tensor in known}
    return sum(size for where, size in seen.items() if where not in own)


def parser(description: str | None, **sizes: int) -> argparse.ArgumentParser:
    """Return a parser with the options shared by all benchmarks, and one per size."""
    found = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in sizes.items():
        found.add_argument(f"--{name}", type=int, default=default)
    found.add_argument("--smoke", action="store_true", help="run with tiny sizes, only to test the script")
    found.add_argument("--json", help="file to write the rows to")
    return found


def versions() -> str:
    """Return the date, the versions and the device."""
    there = [name for name in ("torch", "lightning", "peft") if find_spec(name)]
    found = [f"Python {platform.python_version()}", *(f"{name} {metadata.version(name)}" for name in there)]
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{torch.get_num_threads()} CPU thread(s)"
    return ", ".join([time.strftime("%d %B %Y"), *found, device])


def report(rows: Sequence[Row], args: argparse.Namespace, **more: object) -> list[Row]:
    """Print a table, write the JSON if requested, with more entries if given, and return the rows."""
    print(f"{versions()}\n\n| quantity | median [quartiles] | reach | |\n|---|---|---|---|")
    for row in rows:
        print(row)
    if args.json:
        write(rows, Path(args.json), **more)
    return list(rows)


def write(rows: Sequence[Row], file: Path, **more: object) -> None:
    content = {"versions": versions(), "rows": [asdict(row) for row in rows], **more}
    file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
