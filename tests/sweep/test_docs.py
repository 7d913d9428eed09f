"""The code blocks of docs/sweep.md, run in order and unchanged, do what the page says."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from torch import nn

from lightning_lora import active_adapter, adapter_state_dict, using
from tests.sweep.test_callback import Quiet
from tests.toys import loader

PAGE = (Path(__file__).parents[2] / "docs" / "sweep.md").read_text()

pytestmark = [
    pytest.mark.filterwarnings("ignore:These adapters are not smaller"),
    pytest.mark.filterwarnings("ignore:.*val_loader.*", "ignore:.*validation_step.*but have no"),
    pytest.mark.filterwarnings("ignore:.*ambiguous collection.*"),
]


def test_the_page_does_what_it_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    quiet = {"logger": False, "enable_progress_bar": False, "accelerator": "cpu", "enable_model_summary": False}

    class QuietTrainer(Trainer):
        def __init__(self, **options: Any) -> None:
            super().__init__(**(quiet | options))

    monkeypatch.setattr("lightning.pytorch.Trainer", QuietTrainer)
    names: dict[str, Any] = {
        "LitModel": Quiet,
        "train_loader": loader(),
        "val_loader": loader(8),
        "english_loader": loader(),
        "german_loader": loader(16, 4),
    }
    blocks = re.findall(r"```python\n(.*?)```", PAGE, flags=re.S)
    exec(blocks[0], names)
    sweep, model = names["sweep"], names["model"]
    assert sweep.best == active_adapter(model) == "lr=1e-2,rank=4"
    assert [row["stopped at"] is None for row in sweep.table()].count(True) == 2
    assert (tmp_path / "best" / "adapter_config.json").exists()
    exec(blocks[1], names)
    few: nn.Module = Quiet()
    names["Trainer"](max_epochs=1, callbacks=[names["sweep"]], enable_checkpointing=False).fit(few, loader(), loader(8))
    with using(few, "few"):
        assert list(adapter_state_dict(few)) == ["net.4.lora.A", "net.4.lora.B"]
    exec(blocks[2], names)
    with using(model, "lr=1e-3,rank=2"):
        expected = adapter_state_dict(model)
    assert all(torch.equal(value, expected[key]) for key, value in adapter_state_dict(names["other"]).items())
    block = blocks[3].replace(
        'trainer.fit(LitModel(), {"en": english_loader, "de": german_loader})',
        'trainer.fit(LitModel(), {"en": english_loader, "de": german_loader}, val_loader)',
    )
    exec(block, names)
    assert names["tasks"].best in ("en", "de")
    assert len(blocks) == 4
