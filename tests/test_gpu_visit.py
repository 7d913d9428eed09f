"""Rehearse the visit to a GPU on the CPU: the script's parts with tiny sizes, and the script with another Python."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.processes import ROOT, run

FOLDER = ROOT / "benchmarks"
MEASURED = ["environment", "kernels", "layers", "profile", "trainer", "strategies", "sweep", "shared", "quantized"]
MEASURED += ["compile"]


def rows(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "visit.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_every_part_measures_and_writes_its_rows(tmp_path: Path) -> None:
    for needed in ("transformers", "sklearn", "bitsandbytes", "triton"):
        pytest.importorskip(needed)
    printed = run(FOLDER / "gpu_visit.py", "--smoke", *MEASURED, OUT=tmp_path, TRITON_INTERPRET=1)
    assert list(dict.fromkeys(row["part"] for row in rows(tmp_path))) == MEASURED
    assert [row["quantity"] for row in rows(tmp_path) if row["quantity"] not in printed] == []
    apart = [row["value"] for row in rows(tmp_path) if "relative difference" in row["quantity"]]
    assert max(apart) < 1e-5
    wrong = [row for row in rows(tmp_path) if row["part"] == "kernels" and row["value"] > (row["reach"] or math.inf)]
    assert wrong == []


@pytest.fixture
def visit(tmp_path: Path) -> Any:
    """Run the script with a Python that fails in one part, never ends in the next, and does nothing in the others."""
    python = tmp_path / "python"
    python.write_text(
        '#!/bin/sh\necho "$@ $LIGHTNING_LORA_KERNELS" >>"$OUT/calls"\n'
        'case "$*" in *layers) exit 3 ;; *profile) exec sleep 60 ;; esac\n'
    )
    python.chmod(0o755)

    def run_script(*arguments: str, budget: int = 100) -> dict[str, int]:
        more = {"OUT": str(tmp_path / "out"), "PYTHON": str(python), "BUDGET": str(budget)}
        subprocess.run([str(FOLDER / "gpu_visit.sh"), *arguments], env=os.environ | more, check=True, timeout=60)
        return {row["part"]: row["exit_code"] for row in rows(tmp_path / "out")}

    return run_script


def test_script_goes_on_after_a_failure_and_ends_with_its_budget(visit: Any) -> None:
    codes = visit(budget=2)
    assert {*codes} == {*MEASURED, "tests"}
    assert (codes.pop("environment"), codes.pop("kernels"), codes.pop("layers"), codes.pop("profile")) == (0, 0, 3, 124)
    assert {*codes.values()} == {-1}


def test_script_runs_the_parts_that_are_named(visit: Any) -> None:
    assert visit("--smoke", "sweep", "tests") == {"sweep": 0, "tests": 0}


@pytest.mark.parametrize(("part", "are_used"), [("kernels", True), ("layers", False)])
def test_script_uses_kernels_once_they_are_right(part: str, are_used: bool, visit: Any, tmp_path: Path) -> None:
    visit(part, "sweep")
    *_, last = (tmp_path / "out" / "calls").read_text().splitlines()
    assert last.split()[-2:] == (["sweep", "1"] if are_used else ["benchmarks/gpu_visit.py", "sweep"])


def test_limits_add_up_to_at_most_eight_minutes() -> None:
    lines = (FOLDER / "gpu_visit.sh").read_text().splitlines()
    budget = next(int(line.split("BUDGET:-")[1].split("}")[0]) for line in lines if "BUDGET:-" in line)
    assert 0 < budget <= 8 * 60 - 5  # timeout gives a part five more seconds to end


@pytest.fixture
def alias(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Import the alias package under a name that is still free here."""
    pytest.importorskip("pytorch_lightning")
    name, file = "lightning_twin", FOLDER / "lightning_alias" / "lightning" / "__init__.py"
    spec = importlib.util.spec_from_file_location(name, file, submodule_search_locations=[str(file.parent)])
    assert spec is not None
    assert spec.loader is not None
    monkeypatch.setattr(sys, "meta_path", [*sys.meta_path])
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, name, module)
    spec.loader.exec_module(module)
    yield name
    for each in [each for each in sys.modules if each.startswith(f"{name}.")]:
        del sys.modules[each]


def test_alias_gives_the_same_modules(alias: str) -> None:
    real = importlib.import_module("pytorch_lightning.callbacks.early_stopping")
    spec = real.__spec__
    assert importlib.import_module(f"{alias}.pytorch.callbacks.early_stopping") is real
    assert real.__spec__ is spec
    assert importlib.import_module(f"{alias}.fabric") is importlib.import_module("lightning_fabric")
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module(f"{alias}.elsewhere")
