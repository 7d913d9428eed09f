"""Starts from data inside ``fit``: computed before the first step, and without a trace in the training itself."""

from __future__ import annotations

import logging
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import EMAWeightAveraging, LearningRateFinder, StochasticWeightAveraging
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset
from torchmetrics import MeanMetric

from lightning_lora import (
    LoRACallback,
    LoRAConfig,
    active_adapter,
    adapter_names,
    adapter_state_dict,
    attach,
    calibrate,
    detach,
    load_adapter,
    lora_layers,
    preflight,
    save_adapter,
    set_adapter,
)
from lightning_lora.adapted_model import AdaptedModel
from lightning_lora.trainer.calibration import calibrate_fit
from tests.toys import trainer


class Rows(Dataset[tuple[int, Tensor]]):
    """Rows with their numbers; each is augmented by all three random generators."""

    def __init__(self) -> None:
        self.rows = torch.randn(24, 12, generator=torch.Generator().manual_seed(0))
        self.own = random.Random(3)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[int, Tensor]:
        noise = torch.randn(12) + random.random() + np.random.random() + self.own.random()
        return index, self.rows[index] + 0.01 * noise


class Module(LightningModule):
    """Notes what it trained on, and keeps all that training steps like to keep."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(12, 12), nn.BatchNorm1d(12), nn.Dropout(0.3), nn.Linear(12, 12))
        self.metric, self.outputs, self.steps = MeanMetric(), list[float](), 0
        self.seen, self.logged = list[list[int]](), list[int]()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        numbers, x = batch
        loss = self.net(x).square().mean()
        self.seen.append(numbers.tolist())
        self.outputs.append(float(loss.detach()))
        self.steps += 1
        self.metric.update(loss.detach())
        self.log("loss", loss)
        self.log_dict({"metric": self.metric.compute()})
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam([p for p in self.parameters() if p.requires_grad], 1e-2)


def data(**options: Any) -> DataLoader[Any]:
    return DataLoader(Rows(), batch_size=4, **({"shuffle": True} | options))


def fitted(callback: LoRACallback, loader: Any = None, module: Module | None = None, **options: Any) -> Module:
    seed_everything(1, verbose=False)
    module = module or Module()
    seed_everything(2, verbose=False)
    runner = trainer(callback, **({"max_epochs": 2, "max_steps": -1} | options))
    runner.fit(module, data() if loader is None else loader)
    return module


WORKERS = {"num_workers": 1, "persistent_workers": True, "multiprocessing_context": "fork"}


@pytest.mark.parametrize(
    ("start", "loader"),
    [
        *((start, {}) for start in ("eva", "corda", "lora_ga", "covariance", "pissa")),
        ("lora_ga", {"generator": True}),
        ("eva", WORKERS),
    ],
)
def test_training_is_that_of_the_same_start_without_calibration(start: str, loader: dict[str, Any]):
    if "generator" in loader:
        loader = {"generator": torch.Generator().manual_seed(5)}
    state = loader["generator"].get_state() if "generator" in loader else None
    with_it = fitted(LoRACallback(rank=2, init=start), data(**loader))

    seed_everything(1, verbose=False)
    module = Module()
    attach(module, LoRAConfig(rank=2, init=start), seed=2)
    started = fitted_start(with_it, start, loader, state)
    for name, tensor in AdaptedModel(module).trained.items():
        tensor.data.copy_(started[name])
    AdaptedModel(module).have_values()
    if state is not None:
        loader["generator"].set_state(state)
    without = fitted(LoRACallback(rank=2, init=start), data(**loader), module)
    assert with_it.seen == without.seen
    assert with_it.outputs == without.outputs  # dropout and augmentation included
    assert with_it.steps == without.steps == 12
    assert with_it.metric.compute() == without.metric.compute()
    for name, tensor in with_it.state_dict().items():
        assert torch.equal(tensor, without.state_dict()[name]), name


def fitted_start(module: Module, start: str, loader: dict[str, Any], state: Tensor | None) -> dict[str, Tensor]:
    """Return the start of a run, from another run that stops before the first step."""

    class Stop(LoRACallback):
        def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
            found.update({n: t.detach().clone() for n, t in AdaptedModel(pl_module).trained.items()})
            super().on_train_start(trainer, pl_module)

    found: dict[str, Tensor] = {}
    if state is not None:
        loader["generator"].set_state(state)
    fitted(Stop(rank=2, init=start), data(**loader))
    return found


def test_the_table_is_logged_and_the_record_holds_what_was_found(caplog: pytest.LogCaptureFixture, tmp_path: Path):
    with caplog.at_level(logging.INFO):
        fitted(
            LoRACallback(rank=2, init={"name": "eva", "batches": 3}),
            default_root_dir=tmp_path,
            enable_checkpointing=True,
        )
    assert "starts computed from 3 batches" in caplog.text
    [path] = tmp_path.rglob("*.ckpt")
    record = torch.load(path, weights_only=False)["lightning_lora"]
    [entry] = record["adapters"]
    assert entry["calibration"]["layers"].keys() == {"net.0", "net.3"}
    assert (entry["calibration"]["batches"], entry["calibration"]["tokens"]) == (3, 1.0)
    assert 0 < entry["calibration"]["layers"]["net.0"]["explained"] < 1


def test_resuming_does_not_calibrate_again(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    callback = LoRACallback(rank=2, init="eva")
    fitted(callback, default_root_dir=tmp_path, enable_checkpointing=True, max_epochs=1)
    [path] = tmp_path.rglob("*.ckpt")
    caplog.clear()
    with caplog.at_level(logging.INFO):
        seed_everything(1, verbose=False)
        module = Module()
        trainer(LoRACallback(rank=2, init="eva"), max_epochs=2, max_steps=-1).fit(module, data(), ckpt_path=path)
    assert "starts computed" not in caplog.text
    assert module.steps == 6


@pytest.mark.parametrize("start", ["eva", "covariance"])
def test_ranks_from_data_train_and_resume(start: str, tmp_path: Path):
    options: dict[str, Any] = {"rank": "auto", "rank_budget": 24 * 5, "init": start}
    module = fitted(LoRACallback(**options), default_root_dir=tmp_path, enable_checkpointing=True, max_epochs=1)
    ranks = {name: layer.rank for name, layer in lora_layers(module).items()}
    assert 0 < sum(ranks.values()) <= 5
    [path] = tmp_path.rglob("*.ckpt")
    seed_everything(1, verbose=False)
    resumed = Module()
    trainer(LoRACallback(**options), max_epochs=2, max_steps=-1).fit(resumed, data(), ckpt_path=path)
    assert {name: layer.rank for name, layer in lora_layers(resumed).items()} == ranks
    again = fitted(LoRACallback(**options), module=module)
    assert {name: layer.rank for name, layer in lora_layers(again).items()} == ranks


def test_ranks_from_data_of_one_of_several_adapters_train_and_resume(tmp_path: Path):
    options: dict[str, Any] = {"rank": "auto", "rank_budget": 24 * 5, "init": "eva", "save_adapters": "all"}
    alone = fitted(LoRACallback(**options), max_epochs=1)
    ranks = {name: layer.rank for name, layer in lora_layers(alone).items()}
    module = fitted(LoRACallback(adapter="a", rank=1), max_epochs=1)
    before = {name: tensor.clone() for name, tensor in adapter_state_dict(module).items()}
    again = {"default_root_dir": tmp_path, "enable_checkpointing": True, "max_epochs": 1}
    fitted(LoRACallback(adapter="b", **options), module=module, **again)
    assert {name: layer.rank for name, layer in lora_layers(module).items()} == ranks
    [path] = tmp_path.rglob("*.ckpt")
    seed_everything(1, verbose=False)
    resumed = Module()
    trainer(LoRACallback(adapter="b", **options), max_epochs=2, max_steps=-1).fit(resumed, data(), ckpt_path=path)
    assert (adapter_names(resumed), active_adapter(resumed)) == (["a", "b"], "b")
    assert {name: layer.rank for name, layer in lora_layers(resumed).items()} == ranks
    for model in (module, resumed):
        set_adapter(model, "a")
        assert all(torch.equal(tensor, before[name]) for name, tensor in adapter_state_dict(model).items())


class Headed(Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(12, 40), nn.Tanh(), nn.Linear(40, 40), nn.Tanh(), nn.Linear(40, 2))


def test_ranks_from_data_resume_and_go_on_with_heads_that_were_found(tmp_path: Path):
    options: dict[str, Any] = {"rank": "auto", "rank_budget": 400, "init": "eva", "modules_to_save": "auto"}
    seed_everything(1, verbose=False)
    saving: dict[str, Any] = {"default_root_dir": tmp_path, "enable_checkpointing": True, "max_epochs": 1}
    module = fitted(LoRACallback(**options), module=Headed(), **saving)
    ranks = {name: layer.rank for name, layer in lora_layers(module).items()}
    [path] = tmp_path.rglob("*.ckpt")
    seed_everything(1, verbose=False)
    resumed = Headed()
    trainer(LoRACallback(**options), max_epochs=2, max_steps=-1).fit(resumed, data(), ckpt_path=path)
    assert {name: layer.rank for name, layer in lora_layers(resumed).items()} == ranks
    again = fitted(LoRACallback(**options), module=module)
    assert {name: layer.rank for name, layer in lora_layers(again).items()} == ranks


FROM_DATA: list[dict[str, Any]] = [{"rank": 2, "init": "eva"}, {"rank": "auto", "rank_budget": 120, "init": "eva"}]


@pytest.mark.parametrize("options", FROM_DATA, ids=["rank", "auto"])
def test_starts_from_data_are_exported(options: dict[str, Any], tmp_path: Path):
    module = fitted(LoRACallback(export_dir=str(tmp_path / "peft"), **options))
    loaded = Module()
    load_adapter(loaded, tmp_path / "peft", check_base=False)
    found = adapter_state_dict(loaded)
    assert all(torch.equal(found[name], tensor) for name, tensor in adapter_state_dict(module).items())


def test_adapters_that_wait_for_their_start_can_be_previewed_but_not_exported(tmp_path: Path):
    module = Module()
    attach(module, LoRAConfig(rank=2, init="eva"))
    assert preflight(module).peft_accepts
    with pytest.raises(RuntimeError, match="wait for their start"):
        save_adapter(module, tmp_path / "peft")


@pytest.mark.parametrize("options", FROM_DATA, ids=["rank", "auto"])
@pytest.mark.parametrize(
    "other",
    [
        lambda: LearningRateFinder(num_training_steps=3, early_stop_threshold=None),
        lambda: StochasticWeightAveraging(1e-3, swa_epoch_start=1),
        EMAWeightAveraging,
    ],
    ids=["rate finder", "SWA", "EMA"],
)
def test_callbacks_that_copy_the_module_before_training_see_the_start(options: dict[str, Any], other: Any):
    class Tuned(Module):
        lr = 1e-2

    module, before = Tuned(), Tuned()
    before.load_state_dict(module.state_dict())
    runner = trainer(LoRACallback(**options), other(), max_epochs=3, max_steps=-1)
    runner.fit(module, data())
    assert [bool(layer.lora.B.any()) for layer in lora_layers(module).values()] == [True, True]
    detach(module)
    assert all(torch.equal(module.net.state_dict()[name], each) for name, each in before.net.state_dict().items())


def test_adapters_calibrated_before_the_fit_stay():
    module = Module()
    attach(module, LoRAConfig(rank=2, init="eva"))
    calibrate(module, [torch.randn(4, 12) for _ in range(4)], lambda x: module.net(x))
    before = {name: layer.lora.A.detach().clone() for name, layer in lora_layers(module).items()}
    seen = list[bool]()

    class Look(LoRACallback):
        def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
            seen.extend(torch.equal(layer.lora.A, before[name]) for name, layer in lora_layers(pl_module).items())
            super().on_train_start(trainer, pl_module)

    fitted(Look(rank=2, init="eva"), module=module)
    assert seen == [True, True]


def test_validating_an_uncalibrated_model_computes_the_base():
    class Validated(Module):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.log("val", self.net(batch[1]).mean())

    module = Validated()
    expected = module.eval().net(Rows().rows[:4]).mean()
    trainer(LoRACallback(rank=2, init="eva")).validate(module, data(shuffle=False), verbose=False)
    assert torch.isfinite(expected)


def test_the_best_checkpoint_of_a_calibrated_fit_is_exported(tmp_path: Path):
    module = fitted(LoRACallback(rank=2, init="lora_ga", export_dir=str(tmp_path / "peft")), root=tmp_path)
    other = Module()
    other.load_state_dict({k: v for k, v in module.state_dict().items() if ".lora." not in k}, strict=False)
    load_adapter(other, tmp_path / "peft")
    x = torch.randn(4, 12)
    torch.testing.assert_close(other.eval().net(x), module.eval().net(x))


class ReadsItsRate(Module):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        optimizer: Any = self.optimizers()
        self.log("rate", optimizer.param_groups[0]["lr"])
        return super().training_step(batch, batch_idx)


def test_a_step_may_read_its_optimizers():
    module = fitted(LoRACallback(rank=2, init="eva"), module=ReadsItsRate())
    assert module.steps == 12
    assert all(layer.lora.A.isfinite().all() for layer in lora_layers(module).values())


# --- what cannot be calibrated


def test_ranks_are_found_before_there_are_optimizers_to_read():
    with pytest.raises(MisconfigurationException, match=r"before there are optimizers.*param_groups"):
        fitted(LoRACallback(rank="auto", rank_budget=120, init="eva"), module=ReadsItsRate())


class Manual(Module):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:  # type: ignore[override]
        optimizer: Any = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(self.net(batch[1]).square().mean())
        optimizer.step()


class Detector(Module):
    """Returns losses by name in training only, as detection models do."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)
        return sum(({"box": loss} if self.training else [loss]).values())


class DetectorWithStep(Detector):
    def calibration_step(self, batch: Any, batch_idx: int) -> Any:
        return Module.training_step(self, batch, batch_idx)


def test_a_step_that_returns_something_else_in_evaluation_mode_is_told_of_its_own_step():
    message = r"(?s)AttributeError in training_step: 'list' object.*in evaluation mode.*define calibration_step\(self"
    with pytest.raises(MisconfigurationException, match=message):
        fitted(LoRACallback(rank=2, init="eva"), module=Detector())
    fitted(LoRACallback(rank=2, init="eva"), module=DetectorWithStep())


def test_a_step_that_fails_in_evaluation_mode_is_told_of_its_own_step():
    class OnlyInTraining(Module):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            x = batch[1].clone().requires_grad_()
            energy = self.net(x).square().sum()
            (forces,) = torch.autograd.grad(energy, x, create_graph=self.training)
            return energy + forces.square().mean()

    with pytest.raises(
        MisconfigurationException, match=r"(?s)in evaluation mode.*define calibration_step\(self, batch"
    ):
        fitted(LoRACallback(rank=2, init="lora_ga"), module=OnlyInTraining())


def test_manual_optimization_needs_a_step_of_its_own():
    with pytest.raises(MisconfigurationException, match=r"optimizes manually. Define calibration_step\(self, batch"):
        fitted(LoRACallback(rank=2, init="eva"), module=Manual())


def test_manual_optimization_with_a_step_of_its_own_is_calibrated():
    class WithStep(Manual):
        def calibration_step(self, batch: Any, batch_idx: int) -> Tensor:
            return self.net(batch[1]).square().mean()

    module = fitted(LoRACallback(rank=2, init="lora_ga"), module=WithStep())
    assert all(layer.lora.is_difference for layer in lora_layers(module).values())


@pytest.mark.parametrize("strategy", [FSDPStrategy, ModelParallelStrategy, DeepSpeedStrategy])
def test_strategies_that_divide_the_weights_are_refused_by_name(strategy: Any):
    module, run = Module(), trainer()
    run.strategy.__class__ = strategy  # the check comes before anything of the strategy is used
    with pytest.raises(MisconfigurationException, match=f"under {strategy.__name__}, which divides the weights or"):
        calibrate_fit(run, module, "eva", 3)


class Stream(IterableDataset[Tensor]):
    def __init__(self) -> None:
        self.rows = iter((i, row) for i, row in enumerate(torch.randn(24, 12)))

    def __iter__(self) -> Iterator[Any]:
        return self.rows


def test_a_stream_that_would_lose_batches_is_refused():
    with pytest.raises(MisconfigurationException, match="goes on where it was: the training would miss the batches"):
        fitted(LoRACallback(rank=2, init="eva"), DataLoader(Stream(), batch_size=4))


def test_a_dataset_that_opens_its_stream_anew_is_fine_however_short():
    class Reopened(IterableDataset[Any]):
        def __iter__(self) -> Iterator[Any]:
            generator = torch.Generator().manual_seed(0)
            return iter([(i, torch.randn(12, generator=generator)) for i in range(12)])

    module = fitted(LoRACallback(rank=2, init="eva"), DataLoader(Reopened(), batch_size=4))
    assert module.seen == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]] * 2


def test_values_that_are_not_finite_end_the_fit_before_training():
    class Broken(Module):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            self.seen.append(batch[0].tolist())
            return self.net(batch[1] * torch.nan).mean()

    module = Broken()
    with pytest.raises(MisconfigurationException, match=r"init='eva' of 'net.0': .*not finite"):
        fitted(LoRACallback(rank=2, init="eva"), module=module)
    assert not module.seen


def test_ranks_from_data_do_not_go_with_what_needs_them_earlier(tmp_path: Path):
    options: dict[str, Any] = {"rank": "auto", "rank_budget": 100, "init": "eva"}
    with pytest.raises(MisconfigurationException, match="do not go with init_from"):
        fitted(LoRACallback(**options, init_from=str(tmp_path)))
