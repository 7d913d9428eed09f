"""Lightning's own callbacks beside LoRACallback do what they do without it, on the adapter alone."""

from __future__ import annotations

import copy
import logging
import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import (
    BatchSizeFinder,
    DeviceStatsMonitor,
    EarlyStopping,
    EMAWeightAveraging,
    GradientAccumulationScheduler,
    LearningRateFinder,
    ModelCheckpoint,
    ModelSummary,
    OnExceptionCheckpoint,
    StochasticWeightAveraging,
    WeightAveraging,
)
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_lora import LoRACallback, detach, load_adapter, lora_layers
from tests.contract import assert_same_bits
from tests.toys import FEATURES, Toy, digest, loader, network, snapshot, trainer
from tests.trainer.test_checkpoints import read


def factors(module: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in module.named_parameters() if ".lora." in name}


class Keeps(Callback):
    """Keeps the factors after every step and before every epoch."""

    def __init__(self) -> None:
        self.steps: list[dict[str, Tensor]] = []
        self.epochs: list[dict[str, Tensor]] = []

    def on_train_batch_end(self, trainer: Any, module: Any, *_: Any) -> None:
        self.steps.append(factors(module))

    def on_train_epoch_start(self, trainer: Any, module: Any) -> None:
        self.epochs.append(factors(module))


class Centered(Toy):
    """Keeps a running mean of what it returns, and takes it off."""

    def build(self) -> None:
        super().build()
        self.register_buffer("center", torch.zeros(FEATURES))

    def loss(self, batch: list[Tensor]) -> Tensor:
        x, y = batch
        output = self.net(x)
        if self.training:
            self.center.lerp_(output.detach().mean(0), 0.1)
        return ((output - self.center - y) ** 2).mean()


class Normed(Toy):
    """Has a batch norm, and its batch size and rate as attributes, where the tuners find them."""

    lr, batch_size = 1e-2, 2

    def build(self) -> None:
        self.net = nn.Sequential(*network()[:1], nn.BatchNorm1d(16), *network()[1:])

    def train_dataloader(self) -> DataLoader:
        return loader(64, self.batch_size)

    def val_dataloader(self) -> DataLoader:
        return loader()

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=self.lr)


# --- averages


def test_ema_averages_factors(tmp_path: Path) -> None:
    module, keeps, checkpoint = Toy(), Keeps(), ModelCheckpoint(tmp_path, save_last=True)
    averaging = EMAWeightAveraging(decay=0.5)
    trainer(LoRACallback(rank=4), averaging, keeps, checkpoint, max_epochs=2, max_steps=-1).fit(module, loader())
    truth = {name: value.double() for name, value in keeps.steps[0].items()}
    for step in keeps.steps[1:]:
        truth = {name: 0.5 * truth[name] + 0.5 * value.double() for name, value in step.items()}
    for found in (factors(module), read(checkpoint.last_model_path)["state_dict"]):
        assert found.keys() == truth.keys()
        for name, value in truth.items():
            torch.testing.assert_close(found[name].double(), value, rtol=1e-5, atol=1e-7)
    detach(module)
    assert digest(module.net) == digest(network())


class KeepsCenter(Callback):
    """Keeps the running mean after every step."""

    def __init__(self) -> None:
        self.steps: list[Tensor] = []

    def on_train_batch_end(self, trainer: Any, module: Any, *_: Any) -> None:
        self.steps.append(module.center.double())


@pytest.mark.parametrize("way", ["load_adapter", "validate"])
def test_a_checkpoint_of_ema_holds_the_average_of_a_buffer_beside_that_of_the_factors(way: str, tmp_path: Path) -> None:
    keeps, checkpoint = KeepsCenter(), ModelCheckpoint(tmp_path)
    callbacks = LoRACallback(rank=4), keeps, EMAWeightAveraging(decay=0.5), checkpoint
    run = trainer(*callbacks, max_epochs=2, max_steps=-1, limit_val_batches=1)
    run.fit(Centered(), loader(), loader())
    truth = keeps.steps[0]
    for step in keeps.steps[1:]:
        truth = 0.5 * truth + 0.5 * step
    again = Centered()
    if way == "load_adapter":
        load_adapter(again, checkpoint.best_model_path)
    else:
        second = trainer(LoRACallback(), limit_val_batches=1)
        second.validate(again, loader(), ckpt_path=checkpoint.best_model_path, verbose=False)
        assert torch.equal(second.callback_metrics["val_loss"], run.callback_metrics["val_loss"])
    torch.testing.assert_close(again.center.double(), truth, rtol=1e-5, atol=1e-7)
    assert not torch.equal(again.center.double(), keeps.steps[-1])


def test_a_fit_with_ema_of_a_buffer_resumes_as_if_it_had_gone_on(tmp_path: Path) -> None:
    def fitted(epochs: int, path: Any = None) -> tuple[Tensor, Centered]:
        module, checkpoint = Centered(), ModelCheckpoint(tmp_path, save_last=True, enable_version_counter=False)
        run = trainer(
            LoRACallback(rank=2), EMAWeightAveraging(decay=0.5), checkpoint, max_epochs=epochs, max_steps=-1,
            limit_val_batches=1,
        )  # fmt: skip
        run.fit(module, loader(), loader(), ckpt_path=path)
        return run.callback_metrics["val_loss"], module

    fitted(2)
    (loss, resumed), (expected, whole) = fitted(4, tmp_path / "last.ckpt"), fitted(4)
    assert torch.equal(loss, expected)
    assert digest(resumed) == digest(whole)
    assert resumed.losses == whole.losses[-len(resumed.losses) :]


def test_swa_averages_factors_at_epoch_start() -> None:
    module, keeps = Toy(), Keeps()
    averaging = StochasticWeightAveraging(1e-2, swa_epoch_start=2)  # counted from one
    trainer(LoRACallback(rank=4), averaging, keeps, max_epochs=4, max_steps=-1).fit(module, loader())
    for name, found in factors(module).items():
        truth = torch.stack([epoch[name].double() for epoch in keeps.epochs[1:]]).mean(0)
        torch.testing.assert_close(found.double(), truth, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("monitor", [None, "train_loss"])
def test_the_average_of_swa_is_exported_unless_a_metric_chooses(monitor: str | None, tmp_path: Path) -> None:
    module, target = Toy(), tmp_path / "peft"
    checkpoint = ModelCheckpoint(tmp_path / "saved", monitor=monitor)
    averaging = StochasticWeightAveraging(1e-2, swa_epoch_start=2)
    options = {"max_epochs": 4, "max_steps": -1}
    trainer(LoRACallback(rank=4, export_dir=str(target)), averaging, checkpoint, **options).fit(module, loader())
    load_adapter(exported := Toy(), target)
    best = read(checkpoint.best_model_path)["state_dict"]
    truth = factors(module) if monitor is None else {name: value for name, value in best.items() if ".lora." in name}
    for name, value in factors(exported).items():
        assert torch.equal(value, truth[name])
    assert any(not torch.equal(value, best[name]) for name, value in factors(module).items())


@pytest.mark.parametrize("kind", [WeightAveraging, lambda: StochasticWeightAveraging(1e-2, swa_epoch_start=1)])
def test_averaging_shares_base_or_reports_copy(kind: Any, caplog: pytest.LogCaptureFixture) -> None:
    class Wide(Toy):
        def build(self) -> None:
            self.net = nn.Sequential(nn.Linear(FEATURES, 256), nn.Linear(256, FEATURES))

    class Measures(Callback):
        def on_train_end(self, trainer: Any, module: Any) -> None:
            copied = averaging._average_model
            own = {p.data_ptr() for p in module.parameters()}
            frozen = [p for name, p in copied.named_parameters() if ".lora." not in name]
            self.copied_bytes = sum(p.nbytes for p in frozen if p.data_ptr() not in own)

    averaging, measures = kind(), Measures()
    with caplog.at_level(logging.INFO), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer(LoRACallback(rank=2), measures, averaging, max_epochs=2, max_steps=-1).fit(Wide(), loader())
    said = [str(each.message) for each in caught] + [record.getMessage() for record in caplog.records]
    if measures.copied_bytes:
        assert any("copy" in line and type(averaging).__name__ in line for line in said)


def off_by_a_rounding(average: Tensor, current: Tensor, count: Any) -> Tensor:
    return 0.9 * average + 0.1 * current


def all_off_by_a_rounding(averages: Any, currents: Any, count: Any) -> None:
    for average, current in zip(averages, currents, strict=True):
        average.copy_(off_by_a_rounding(average, current, count))


INEXACT = {
    "EMA": lambda: EMAWeightAveraging(decay=0.9),
    "average": lambda: WeightAveraging(avg_fn=off_by_a_rounding),
    "average of lists": lambda: WeightAveraging(multi_avg_fn=all_off_by_a_rounding),
    "SWA": lambda: StochasticWeightAveraging(1e-2, swa_epoch_start=1, avg_fn=off_by_a_rounding),
}


@pytest.mark.parametrize("kind", INEXACT)
def test_averaging_changes_no_bit_of_base_whatever_the_average_rounds(kind: str, tmp_path: Path) -> None:
    module, checkpoint = Normed(), ModelCheckpoint(tmp_path, save_last=True)
    before = digest(module)
    for _ in range(2):  # of the second fit, too; a callback of Lightning's that is used again averages nothing
        trainer(LoRACallback(rank=4), INEXACT[kind](), checkpoint, max_epochs=4, max_steps=-1).fit(module, loader())
    # The fit's own file fits the module that it left, which a changed base would not.
    trainer(LoRACallback()).test(module, loader(), ckpt_path=checkpoint.last_model_path, verbose=False)
    detach(module)
    assert digest(module) == before


class NormedHead(Normed):
    """Has a second norm, which trains in full."""

    def build(self) -> None:
        super().build()
        self.net[3].register_module("norm", nn.BatchNorm1d(16))
        self.net[3].register_forward_pre_hook(lambda part, inputs: part.norm(*inputs))


@pytest.mark.parametrize("in_full", [[], ["net.3.norm"]], ids=["all frozen", "one trained"])
def test_swa_leaves_statistics_of_frozen_norms_alone_and_computes_those_that_train(in_full: list[str]) -> None:
    module, keeps = NormedHead(), Keeps()
    frozen, trained = module.net[1], module.net[3].norm
    for norm in frozen, trained:
        norm(3 + 2 * torch.randn(64, 16))
    before, first = copy.deepcopy(frozen.state_dict()), trained.running_mean.clone()
    averaging = StochasticWeightAveraging(1e-2, swa_epoch_start=1)
    callbacks = [LoRACallback(rank=2, modules_to_save=in_full), averaging, keeps]
    trainer(*callbacks, max_epochs=3, max_steps=-1).fit(module, loader())
    assert_same_bits(frozen.state_dict(), before)
    if in_full:
        assert not torch.equal(trained.running_mean, first)
        assert trained.num_batches_tracked == len(loader())
    else:
        assert torch.equal(trained.running_mean, first)
        assert len(keeps.epochs) == 3  # no pass over the data that computes nothing
    assert not {"pl_module_contains_batch_norm", "reset_batch_norm_and_save_state"} & vars(averaging).keys()


# --- tuners


class Compares(Callback):
    """Keeps the whole module before a tuner ran and when the real training starts."""

    def __init__(self, steps: int) -> None:
        self.steps = steps

    def setup(self, trainer: Any, module: Any, stage: str) -> None:
        self.before = snapshot(module)

    def on_train_start(self, trainer: Any, module: Any) -> None:
        if trainer.fit_loop.epoch_loop.max_steps == self.steps:  # not the tuner's own training
            self.after = snapshot(module)
            self.moments = [state for optimizer in trainer.optimizers for state in optimizer.state.values()]


@pytest.mark.parametrize("mode", ["power", "binsearch"])
@pytest.mark.parametrize("frozen_norm", ["eval", "track"])
def test_batch_size_finder_changes_only_batch_size(frozen_norm: Any, mode: str, tmp_path: Path) -> None:
    module, compares = Normed(), Compares(steps=7)
    finder = BatchSizeFinder(mode=mode, steps_per_trial=2, init_val=2, max_trials=3)
    run = trainer(LoRACallback(rank=4, frozen_norm=frozen_norm), compares, finder, max_steps=7, root=tmp_path)
    run.fit(module)
    assert module.batch_size > 2
    assert_same_bits(compares.after, compares.before)
    assert not compares.moments
    assert run.global_step == 7 or run.current_epoch == 1
    assert all(layer.lora.B.any() for layer in lora_layers(module).values())
    assert not list(tmp_path.glob(".scale_batch_size*"))


def test_both_tuners_leave_module_unchanged(tmp_path: Path) -> None:
    module, compares = Normed(), Compares(steps=7)
    tuners = [
        BatchSizeFinder(steps_per_trial=2, max_trials=2),
        LearningRateFinder(num_training_steps=5, early_stop_threshold=None),
    ]
    callback = LoRACallback(rank=4, frozen_norm="track")
    trainer(callback, compares, *tuners, max_steps=7, root=tmp_path).fit(module)
    assert_same_bits(compares.after, compares.before)
    assert all(layer.lora.B.any() for layer in lora_layers(module).values())


# --- the loop


def test_gradient_accumulation_matches_large_batches() -> None:
    class Plain(Toy):
        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    module, reference = Plain().double(), Plain().double()
    callback = LoRACallback(rank=4, adapter_dtype="float64")
    scheduler = GradientAccumulationScheduler({0: 4, 1: 2})
    run = trainer(callback, scheduler, max_epochs=2, max_steps=-1, accelerator="cpu")
    run.fit(module, loader(dtype=torch.float64))
    assert run.global_step == 1 + 2
    batches = list(loader(dtype=torch.float64))
    joined = [batches, batches[:2], batches[2:]]  # what each step saw
    steps = [[torch.cat(part) for part in zip(*some, strict=True)] for some in joined]
    trainer(callback, max_epochs=1, max_steps=-1).fit(reference, DataLoader(steps, batch_size=None))
    assert any(value.any() for name, value in factors(module).items() if name.endswith("B"))
    for name, value in factors(reference).items():
        torch.testing.assert_close(factors(module)[name], value, rtol=1e-10, atol=1e-12)


def test_early_stopping_resumes_patience(tmp_path: Path) -> None:
    def run(name: str, epochs: int, ckpt_path: str | None = None) -> tuple[Any, EarlyStopping, str]:
        stopping = EarlyStopping("train_loss", patience=3, mode="max", min_delta=100.0)  # nothing is good enough
        checkpoint = ModelCheckpoint(tmp_path / name, save_last=True)
        fitter = trainer(LoRACallback(rank=4), stopping, checkpoint, max_epochs=epochs, max_steps=-1)
        fitter.fit(Toy(), loader(), ckpt_path=ckpt_path)
        return fitter, stopping, checkpoint.last_model_path

    whole, _, _ = run("whole", 20)
    _, half, path = run("half", 2)
    resumed, _, _ = run("resumed", 20, path)
    assert half.wait_count == 1
    assert whole.current_epoch == resumed.current_epoch == 4


def test_model_summary_counts_trainable(caplog: pytest.LogCaptureFixture) -> None:
    module = Toy()
    with caplog.at_level(logging.INFO):
        trainer(LoRACallback(rank=4), ModelSummary(max_depth=-1), enable_model_summary=True).fit(module, loader())
    [table] = [record.getMessage() for record in caplog.records if "Trainable params" in record.getMessage()]
    adapter = sum(4 * (layer.in_features + layer.out_features) for layer in lora_layers(module).values())
    base = sum(p.numel() for p in network().parameters())
    [trainable] = re.findall(r"^(\d+)\s+Trainable params", table, re.MULTILINE)
    [frozen] = re.findall(r"^(\d+)\s+Non-trainable params", table, re.MULTILINE)
    assert (int(trainable), int(frozen)) == (adapter, base)


@pytest.mark.filterwarnings("ignore:.*was called without a model.*", "ignore:.*no last checkpoint available.*")
def test_fit_resumes_from_exception_checkpoint(tmp_path: Path) -> None:
    class Fails(Callback):
        def on_train_epoch_end(self, trainer: Any, module: Any) -> None:
            if trainer.current_epoch == 1:
                self.at_failure = factors(module)
                raise RuntimeError("boom")

    class Starts(Callback):
        def on_train_start(self, trainer: Any, module: Any) -> None:
            self.factors = factors(module)

    fails, starts = Fails(), Starts()
    run = trainer(LoRACallback(rank=4), OnExceptionCheckpoint(tmp_path), fails, max_epochs=3, max_steps=-1)
    with pytest.raises(RuntimeError, match="boom"):
        run.fit(Toy(), loader())
    again = trainer(LoRACallback(rank=4), starts, max_epochs=3, max_steps=-1)
    again.fit(Toy(), loader(), ckpt_path=str(tmp_path / "on_exception.ckpt"))
    assert_same_bits(starts.factors, fails.at_failure)
    assert again.global_step == 12


def test_device_monitor_does_not_change_run(tmp_path: Path) -> None:
    modules = Toy(), Toy()
    monitors: list[list[Callback]] = [[], [DeviceStatsMonitor(cpu_stats=False)]]
    for module, monitor in zip(modules, monitors, strict=True):
        logger = CSVLogger(tmp_path)
        trainer(LoRACallback(rank=4), *monitor, logger=logger, log_every_n_steps=1, max_steps=4).fit(module, loader())
    assert digest(modules[0]) == digest(modules[1])
    assert modules[0].losses == modules[1].losses


def test_a_fit_with_ema_of_a_compiled_part_resumes_as_if_it_had_gone_on(tmp_path: Path) -> None:
    class Compiled(Toy):
        def build(self) -> None:
            self.net = torch.compile(network(), backend="eager")

    def fitted(epochs: int, path: Any = None) -> Toy:
        module = Compiled()
        # Saved within the fit, since the average takes the place of the trained values at its end.
        callbacks = LoRACallback(rank=2), EMAWeightAveraging(decay=0.5), ModelCheckpoint(tmp_path, save_last=True)
        run = trainer(*callbacks, max_epochs=epochs, max_steps=-1)
        run.fit(module, loader(), ckpt_path=path)
        return module

    fitted(2)
    resumed, whole = snapshot(fitted(4, tmp_path / "last.ckpt")), snapshot(fitted(4))
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(value, resumed[name]) for name, value in whole.items())
