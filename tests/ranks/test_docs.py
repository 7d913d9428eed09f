"""The code blocks of docs/dynamic_rank.md, run as they stand."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_lora import lora_layers
from lightning_lora.ranks.schedule import RankSchedule
from tests.toys import Toy

PAGE = (Path(__file__).parents[2] / "docs" / "dynamic_rank.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE, flags=re.S)
QUIET: dict[str, Any] = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "devices": 1}


class Wide(Toy):
    """Layers that can have the ranks of the page."""

    def build(self) -> None:
        self.net = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 64))


def data() -> DataLoader[Any]:
    x = torch.randn(32, 64, generator=torch.Generator().manual_seed(0))
    return DataLoader(TensorDataset(x, x.flip(1)), batch_size=8)


def test_every_block_runs(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    class QuietTrainer(Trainer):
        def __init__(self, **options: Any) -> None:
            super().__init__(**(QUIET | {"accelerator": "cpu", "enable_checkpointing": False} | options))

    monkeypatch.setattr("lightning.pytorch.Trainer", QuietTrainer)
    names: dict[str, Any] = {"model": Wide(), "train_loader": data()}
    first, second = BLOCKS
    exec(first, names)
    assert str(names["callback"].ranks()) in capsys.readouterr().out
    assert {name: layer.rank for name, layer in lora_layers(names["model"]).items()} == names["callback"].ranks()
    exec(second, names)
    QuietTrainer(max_epochs=10, callbacks=[names["callback"]]).fit(Wide(), data())
    assert min(names["callback"].ranks().values()) >= 1


def test_the_page_says_the_defaults() -> None:
    default = RankSchedule()
    assert f"at {100 * default.until:.0f} %" in PAGE
    assert default.warmup == 0.1
    assert "first tenth" in PAGE
    assert f"each of {(default.until - default.warmup) / default.every:.0f} decisions" in PAGE
