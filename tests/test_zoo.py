"""The zoo tells apart what it is for: right, wrong, refused, and a model's own fault."""

from __future__ import annotations

import importlib
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn

FOLDER = Path(__file__).parent.parent / "benchmarks"
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]


@pytest.fixture
def checks(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    pytest.importorskip("peft")
    monkeypatch.syspath_prepend(str(FOLDER))
    logger = logging.getLogger("lightning.pytorch")
    level = logger.level
    yield importlib.import_module("zoo_checks")
    logger.setLevel(level)  # the zoo silences it


@pytest.fixture
def zoo(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(FOLDER))
    return importlib.import_module("zoo")


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 16), nn.Linear(16, 4)

    def forward(self, x):
        return self.second(torch.relu(self.first(x)))


class LooksAtClass(Net):
    def forward(self, x):
        return super().forward(x) * (1.0 if type(self.first) is nn.Linear else 2.0)


class Broken(Net):
    def forward(self, x):
        raise KeyError("gone")


class Norms(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(8)

    def forward(self, x):
        return self.norm(x)


def examined(checks: ModuleType, model: nn.Module) -> dict[str, Any]:
    phases: list[str] = []
    result = checks.Examination(checks.Specimen(model, (torch.randn(3, 8),)), phases.append).result()
    assert phases[0] == "build"
    return json.loads(json.dumps(result))


def test_a_model_that_is_fine_passes_every_check(checks):
    result = examined(checks, Net())
    assert (result["verdict"], result["adapters"], result["precision"]) == ("ok", 2, "float64"), result
    assert {"identity", "reload", "merge", "PEFT", "training and evaluation"} <= result["numbers"].keys()
    assert result["numbers"]["moved"] == 2
    assert result["numbers"]["effect"] > 0.1


def test_a_difference_is_wrong_and_has_a_number(checks):
    result = examined(checks, LooksAtClass())
    assert result["verdict"] == "wrong"
    assert "identity" in [each["check"] for each in result["problems"]]
    assert result["numbers"]["identity"] > 0.1


def test_a_model_that_does_not_run_is_its_own_fault(checks):
    result = examined(checks, Broken())
    assert result["verdict"] == "unbuildable"
    assert "gone" in result["reason"]


def test_an_error_in_words_of_the_package_is_a_refusal(checks):
    result = examined(checks, Norms())
    assert result["verdict"] == "refused"
    assert result["problems"][0]["check"] == "attach"


def test_the_page_counts_and_lists_what_is_not_ok(zoo, tmp_path):
    problem = {"check": "merging", "verdict": "wrong", "reason": "outputs differ by 1 of their size", "where": ""}
    results = {
        "lib/kind/good": {"verdict": "ok", "problems": [], "numbers": {"PEFT": 0.0}, "notes": []},
        "lib/kind/bad": {"verdict": "wrong", "problems": [problem], "numbers": {}, "notes": []},
        "lib/kind/none": {"verdict": "unbuildable", "reason": "ValueError: no"},
    }
    file = tmp_path / "zoo.json"
    file.write_text(json.dumps({"date": "today", "versions": {"torch": "2"}, "results": results}), encoding="utf-8")
    page = zoo.page([file])
    assert "| lib | 2 | 1 | 0 | 1 | 1 | 0 |" in page
    assert "## Wrong" in page
    assert "`lib/kind/bad` | merging: outputs differ by 1" in page
