"""Run the benchmarks with tiny sizes."""

from __future__ import annotations

import importlib
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

FOLDER = Path(__file__).parent.parent / "benchmarks"
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Iterator[ModuleType]:
    pytest.importorskip("peft")
    monkeypatch.syspath_prepend(str(FOLDER))
    level = logging.getLogger("lightning.pytorch").level
    yield importlib.import_module(request.param)
    logging.getLogger("lightning.pytorch").setLevel(level)  # a benchmark may have changed it


@pytest.mark.parametrize(
    "benchmark",
    [
        "step",
        "memory",
        "weights",
        "attach",
        "merge",
        "checkpoint",
        "growth",
        "overhead",
        "scaling",
        "quality",
        "starts",
        "switch",
        "gpu",
    ],
    indirect=True,
)
def test_benchmark_runs_and_reports(benchmark, tmp_path, capsys):
    rows = benchmark.main(["--smoke", "--json", str(tmp_path / "rows.json")])
    printed, written = capsys.readouterr().out, json.loads((tmp_path / "rows.json").read_text())
    assert rows
    assert [row["quantity"] for row in written["rows"]] == [row.quantity for row in rows]
    assert all(row.quantity in printed for row in rows)


@pytest.mark.parametrize("benchmark", ["memory"], indirect=True)
def test_memory_for_backward_matches_formula(benchmark):
    rows = [row for row in benchmark.main(["--smoke"]) if row.quantity.endswith("ours / formula")]
    assert len(rows) == 4
    assert all(0.99 <= row.value <= row.reach for row in rows)


@pytest.mark.parametrize("benchmark", ["measuring"], indirect=True)
def test_row_shows_target(benchmark):
    row = benchmark.ratio({"a": [1.0, 2.0, 3.0], "b": [2.0, 2.0, 2.0]}, "a", "b", 0.9)
    assert (row.value, row.verdict) == (1.0, "missed")
    assert str(row) == "| a / b | 1.000 [0.500, 1.500] | 0.9 | missed |"
