"""The code blocks of docs/initialization.md, run as they stand."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_lora import LoRACallback, detach, lora_layers
from tests.toys import trainer

PAGE = (Path(__file__).parents[2] / "docs" / "initialization.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE, flags=re.S)
QUIET: dict[str, Any] = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "devices": 1}


class Model(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(128, 128), nn.Tanh(), nn.Linear(128, 128))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return (self(batch[0]) - batch[1]).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam([p for p in self.parameters() if p.requires_grad], 1e-2)


def data() -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(256, 128, generator=generator)
    return DataLoader(TensorDataset(x, 5.0 * x[:, :1].expand(-1, 128)), batch_size=16)


def run(block: str, **names: Any) -> dict[str, Any]:
    names |= {"model": Model(), "train_loader": data(), "batches": data(), "loss": nn.functional.mse_loss}
    exec(block, names)
    return names


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)

    class QuietTrainer(Trainer):
        def __init__(self, **options: Any) -> None:
            super().__init__(**(QUIET | {"accelerator": "cpu", "enable_checkpointing": False} | options))

    monkeypatch.setattr("lightning.pytorch.Trainer", QuietTrainer)


def test_the_first_block_trains_from_directions_of_the_data(caplog: pytest.LogCaptureFixture):
    with caplog.at_level("INFO"):
        model = run(BLOCKS[0])["model"]
    assert "starts computed from 16 batches, 100 % of their tokens" in caplog.text
    assert all(layer.lora.B.any() for layer in lora_layers(model).values())


def test_calibrate_reports_what_it_found(capsys: pytest.CaptureFixture[str]):
    run(BLOCKS[1])
    assert "covariance" in capsys.readouterr().out


def test_ranks_stay_within_the_budget():
    callback, model = run(BLOCKS[2])["callback"], Model()
    trainer(callback).fit(model, data())
    used = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert 0 < used <= 0.01 * sum(parameter.numel() for parameter in Model().parameters())


def test_a_start_from_one_device_is_taken_over():
    names = run(BLOCKS[3])
    model, callback = names["model"], names["callback"]
    A = {name: layer.lora.A.detach().clone() for name, layer in lora_layers(model).items()}
    detach(model)
    seen = list[bool]()

    class Look(LoRACallback):
        def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
            seen.extend(torch.equal(layer.lora.A, A[name]) for name, layer in lora_layers(pl_module).items())
            super().on_train_start(trainer, pl_module)

    trainer(Look(rank=8, init_from=callback.init_from)).fit(model, data())
    assert seen == [True, True]
