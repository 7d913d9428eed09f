"""The notebook runs from top to bottom, and what is stored in it is what it prints."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")

import matplotlib

NOTEBOOK = Path(__file__).parents[1] / "examples" / "quickstart.ipynb"
CELLS = [cell for cell in json.loads(NOTEBOOK.read_text())["cells"] if cell["cell_type"] == "code"]


def outline(text: str) -> tuple[str, int]:
    """Return the first line without its numbers, which depend on the machine, and how many lines there are."""
    lines = text.splitlines() or [""]
    return " ".join(re.sub(r"[\d.%]+", "#", lines[0]).split()), len(lines)


def stored(cell: dict[str, Any]) -> str:
    return "".join("".join(output["text"]) for output in cell["outputs"] if output["output_type"] == "stream")


@pytest.fixture
def _level_of_the_log() -> Iterator[None]:
    log = logging.getLogger("lightning.pytorch")
    level = log.level
    yield
    log.setLevel(level)


@pytest.mark.slow
@pytest.mark.usefixtures("_level_of_the_log")
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_notebook_prints_what_it_stores(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PL_GLOBAL_SEED", "0")  # the notebook changes it
    matplotlib.use("Agg")
    names: dict[str, Any] = {"__name__": "__main__"}
    for cell in CELLS:
        exec("".join(cell["source"]), names)
        assert outline(capsys.readouterr().out) == outline(stored(cell))
    matplotlib.pyplot.close("all")
    turned, upright = (names["accuracy"](names["model"], names[data]) for data in ("turned", "images"))
    assert turned > 0.6  # merged
    assert upright < turned


def test_notebook_stores_results_and_a_picture() -> None:
    assert [cell["execution_count"] for cell in CELLS] == [*range(1, len(CELLS) + 1)]
    pictures = [output for cell in CELLS for output in cell["outputs"] if "image/png" in output.get("data", {})]
    assert len(pictures) == 1
    assert not any(output["output_type"] == "error" for cell in CELLS for output in cell["outputs"])
