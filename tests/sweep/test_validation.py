"""The validation of a sweep: what it reports of each adapter, and leaves with it, is that of a fit of its own."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule
from torchmetrics import MaxMetric, MinMetric

from lightning_lora import LoRACallback, LoRASweep, active_adapter, load_adapter, using
from tests.sweep.test_callback import Quiet
from tests.toys import FEATURES, loader, trainer

pytestmark = pytest.mark.filterwarnings("ignore:These adapters are not smaller")

RATES = [1e-3, 3e-2, 1e-2]


class CallsTraining(Quiet):
    """Validates by its training step, as many modules do."""

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", self.training_step(batch, batch_idx))


class Remembers(Quiet):
    """Keeps in a metric, an attribute and a buffer what its validations have found."""

    best, seen, rounds = float("inf"), 0, 0

    def build(self) -> None:
        super().build()
        self.lowest = MinMetric()
        self.register_buffer("threshold", torch.tensor(0.0))
        self.register_buffer("offset", torch.zeros(FEATURES))

    def setup(self, stage: str) -> None:
        if stage == "fit":
            self.offset.fill_(0.25)  # as the mean of the data

    def loss(self, batch: Any) -> torch.Tensor:
        x, y = batch
        return ((self.net(x - self.offset) - y) ** 2).mean()

    def on_validation_epoch_start(self) -> None:
        self.losses_now: list[torch.Tensor] = []

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.losses_now.append(self.loss(batch))

    def on_validation_epoch_end(self) -> None:
        now = torch.stack(self.losses_now).mean()
        self.lowest.update(now)
        self.best, self.seen = min(self.best, float(now)), self.seen + 1
        self.threshold.copy_(now)
        found = {"val_loss": now, "lowest": self.lowest.compute(), "best": self.best, "seen": float(self.seen)}
        self.log_dict(found | {"threshold": self.threshold.clone(), "rounds": float(self.rounds)})
        with using(self, None):
            self.log("base", self.threshold.clone())

    def on_validation_end(self) -> None:
        self.rounds += 1


class LogsMetric(Remembers):
    """Gives the logger the metric itself."""

    def on_validation_epoch_end(self) -> None:
        now = torch.stack(self.losses_now).mean()
        self.lowest.update(now)
        self.log("val_loss", now)
        self.log("lowest", self.lowest)


class WeighsByLastLoss(Quiet):
    """Uses in training what the end of a validation has found, from the second on."""

    found, weight = 0, 1.0

    def build(self) -> None:
        super().build()
        self.register_buffer("shift", torch.zeros(()))

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return (self.weight * super().training_step(batch, batch_idx) - self.shift).abs()

    def on_validation_start(self) -> None:
        self.sum = 0.0

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.sum += float(self.loss(batch))
        self.log("val_loss", self.loss(batch))

    def on_validation_end(self) -> None:
        self.found += 1
        if self.found > 1:
            self.weight, self.shift = self.sum, 0.1 * self.trainer.callback_metrics["val_loss"]


@pytest.mark.parametrize("mode", ["loop", "vmap", "meet"])
def test_what_validation_finds_may_be_used_in_training(mode: Any):
    sweep, module = LoRASweep(grid={"lr": RATES}, rank=2, monitor="val_loss", keep=1.0, mode=mode), WeighsByLastLoss()
    told = pytest.warns(UserWarning, match="From here on it is mode 'loop'") if mode != "loop" else nullcontext()
    with told:
        run = fitted(module, sweep, max_epochs=4)
    for name, candidate in sweep.candidates.items():
        alone = with_rate(WeighsByLastLoss, candidate.lr or 0.0)
        expected = fitted(alone, LoRACallback(rank=2), max_epochs=4).callback_metrics["val_loss"]
        torch.testing.assert_close(run.callback_metrics[f"val_loss/{name}"], expected, rtol=1e-5, atol=1e-6)


class ResetsAtEpoch(Quiet):
    """Begins its metric anew in a hook that runs once for all adapters."""

    def build(self) -> None:
        super().build()
        self.highest = MaxMetric()

    def on_train_epoch_start(self) -> None:
        self.highest.reset()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.highest.update(self.loss(batch))
        self.log("val_loss", self.loss(batch))

    def on_validation_epoch_end(self) -> None:
        self.log("highest", self.highest.compute())


def test_a_metric_that_a_hook_resets_for_all_begins_anew_for_each():
    sweep = LoRASweep(grid={"lr": RATES}, rank=2, monitor="val_loss", keep=1.0)
    run = fitted(ResetsAtEpoch(), sweep)
    for name in sweep.candidates:  # the losses fall, so the highest of all epochs is another
        assert run.callback_metrics[f"highest/{name}"] == run.callback_metrics[f"val_loss/{name}"]


def test_the_trainer_of_a_sweep_validates_afterwards_also_where_buffers_are_replaced():
    class Replaces(Remembers):
        def on_validation_epoch_end(self) -> None:
            super().on_validation_epoch_end()
            self.threshold = self.threshold + 1.0

    run = fitted(module := Replaces(), LoRASweep(grid={"lr": RATES}, rank=2, monitor="val_loss", keep=1.0))
    before = run.callback_metrics["val_loss"]
    run.validate(module, loader(8), verbose=False)
    torch.testing.assert_close(run.callback_metrics["val_loss"], before)


def with_rate(kind: type[Quiet], rate: float) -> Quiet:
    module = kind()
    module.configure_optimizers = lambda: torch.optim.AdamW(module.parameters(), lr=rate, weight_decay=0.1)  # type: ignore[method-assign]
    return module


def fitted(module: LightningModule, callback: Any, **options: Any) -> Any:
    defaults = {"max_epochs": 3, "max_steps": -1, "limit_val_batches": 1.0, "num_sanity_val_steps": 0}
    run = trainer(callback, **(defaults | options))
    run.fit(module, loader(), loader(8))
    return run


@pytest.mark.parametrize("mode", ["loop", "vmap", "auto"])
@pytest.mark.parametrize("rates", [RATES, RATES[::-1]], ids=["up", "down"])
@pytest.mark.parametrize("kind", [CallsTraining, Remembers, LogsMetric])
def test_metrics_of_each_adapter_are_those_of_a_fit_of_its_own(kind: type[Quiet], rates: list[float], mode: Any):
    sweep = LoRASweep(grid={"lr": rates}, rank=2, monitor="val_loss", keep=1.0, mode=mode)
    run = fitted(kind(), sweep)
    for name, candidate in sweep.candidates.items():
        alone = fitted(with_rate(kind, candidate.lr or 0.0), LoRACallback(rank=2)).callback_metrics
        for key in alone.keys() - {"train_loss"}:
            torch.testing.assert_close(run.callback_metrics[f"{key}/{name}"], alone[key], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("sanity", [0, 2])
@pytest.mark.parametrize("rates", [RATES, RATES[::-1]], ids=["up", "down"])
def test_buffers_that_setup_and_validation_set_are_each_adapters_own(rates: list[float], sanity: int, tmp_path: Path):
    sweep, module = LoRASweep(grid={"lr": rates}, rank=2, monitor="val_loss", keep=1.0), Remembers()
    run = fitted(module, sweep, num_sanity_val_steps=sanity)
    run.save_checkpoint(tmp_path / "last.ckpt")
    for name, candidate in sweep.candidates.items():
        alone = with_rate(Remembers, candidate.lr or 0.0)
        fitted(alone, LoRACallback(rank=2), num_sanity_val_steps=sanity)
        load_adapter(loaded := Remembers(), tmp_path / "last.ckpt", adapter=name)
        for each in (module, loaded):
            with using(each, name if each is module else active_adapter(each)):
                torch.testing.assert_close(each.threshold, alone.threshold)
                assert torch.equal(each.offset, alone.offset)
    with using(module, None):
        assert torch.equal(module.offset, torch.zeros(FEATURES))
        assert module.threshold == 0.0
