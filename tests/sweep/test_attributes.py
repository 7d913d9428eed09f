"""Each adapter has the plain attributes that its own blocks have set; a look at them leaves no trace."""

from __future__ import annotations

import warnings
from collections import deque
from typing import Any

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule
from torch import Tensor, nn

from lightning_lora.sweep.attributes import OwnAttributes
from tests.sweep.test_callback import (
    CLOSE,
    EXACT,
    FOUR,
    Centered,
    Manual,
    Quiet,
    alone_manually,
    assert_each_is_alone,
    distance,
    fit,
    state,
    swept,
)


class Counts(LightningModule):
    """Has two plain attributes, and may get more."""

    def __init__(self) -> None:
        super().__init__()
        self.count, self.scale = 0, torch.ones(())


def test_blocks_set_attributes_of_their_own():
    module = Counts()
    own = OwnAttributes(module, ["a", "b"])
    for name in ("a", "b", "a"):
        with own.of(name):
            module.count += 1
    for name, count in {"a": 2, "b": 1}.items():
        with own.of(name):
            assert module.count == count


def test_a_look_shows_the_adapters_values_and_leaves_no_trace():
    module = Counts()
    own = OwnAttributes(module, ["a", "b"])
    for name, count in {"a": 3, "b": 5}.items():
        with own.of(name):
            module.count = count
    before = dict(vars(module))
    with own.shown("a"):
        assert module.count == 3
        module.count, module.scale, module.new = 9, torch.zeros(()), 1.0
    assert vars(module) == before
    with own.of("a"):
        assert module.count == 3


# --- what the steps of a sweep keep in attributes


class Gathers(Quiet):
    """Keeps something of each step in an attribute."""

    kept: Any

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)
        self.keep(loss.detach())
        return loss

    def keep(self, loss: Tensor) -> None:
        raise NotImplementedError


class Appends(Gathers):
    def build(self) -> None:
        super().build()
        self.kept = deque([0], maxlen=1)

    def keep(self, loss: Tensor) -> None:
        self.kept.append(loss)


class SetsKeys(Gathers):
    def build(self) -> None:
        super().build()
        self.kept = {"last": None}

    def keep(self, loss: Tensor) -> None:
        self.kept["last"] = loss


class Adds(Gathers):
    def build(self) -> None:
        super().build()
        self.kept = torch.zeros(())

    def keep(self, loss: Tensor) -> None:
        self.kept += loss


class Meter:
    """A helper object, as in many training scripts."""

    def __init__(self) -> None:
        self.sum = 0.0


class Meters(Gathers):
    def build(self) -> None:
        super().build()
        self.kept = Meter()

    def keep(self, loss: Tensor) -> None:
        self.kept.sum += float(loss)


class AddsToBuffer(Adds):
    def build(self) -> None:
        super().build()
        del self.kept
        self.register_buffer("kept", torch.zeros(()))


class HasStatistics(Quiet):
    """Has computed something in inference mode, whose tensors count no changes."""

    def build(self) -> None:
        super().build()
        with torch.inference_mode():
            self.mean = torch.zeros(())


class CountsSteps(torch.optim.SGD):
    count = 0

    def step(self, closure: Any = None) -> Any:
        self.count += 1
        return super().step(closure)


class KeepsOptimizer(Manual):
    """Holds its optimizer in an attribute, and steps it in every batch."""

    def configure_optimizers(self) -> Any:
        self.kept = CountsSteps(self.parameters(), lr=self.lr)
        return self.kept

    def training_step(self, batch: Any, batch_idx: int) -> None:
        self.optimizers().zero_grad()
        self.manual_backward(self.loss(batch))
        self.optimizers().step()


class Replaces(Gathers):
    """Lets the step before decide on the loss, by a list that each step replaces."""

    def build(self) -> None:
        super().build()
        self.kept = [torch.ones(())]

    def loss(self, batch: list[Tensor]) -> Tensor:
        return super().loss(batch) * (1 + self.kept[0])

    def keep(self, loss: Tensor) -> None:
        self.kept = [loss]


class AppendsByHand(Appends, Manual):
    """The same with manual optimization."""


@pytest.mark.parametrize("kind", [Appends, SetsKeys, Adds, Meters, AppendsByHand])
def test_what_steps_change_in_place_and_share_is_named_once(kind: type[Gathers]):
    with pytest.warns(UserWarning, match=r"training_step changes kept in place\. All adapters share") as seen:
        fit(kind(), swept(grid={"lr": [1e-2, 1e-3]}, keep=1.0, mode="loop"), max_steps=4)
    assert sum("in place" in str(each.message) for each in seen) == 1


@pytest.mark.parametrize("kind", [Quiet, Manual, AddsToBuffer, Replaces, HasStatistics, KeepsOptimizer])
def test_what_each_adapter_has_for_itself_is_not_named(kind: type[Quiet]):
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*in place")
        fit(kind(), swept(grid={"lr": [1e-2, 1e-3]}, keep=1.0, mode="loop"), max_steps=4)


def test_a_list_that_steps_replace_is_each_adapters_own():
    module, sweep = Replaces(), swept(adapters={name: FOUR[name] for name in "ab"}, keep=1)
    fit(module, sweep)
    assert sweep.mode == "auto"
    assert_each_is_alone(Replaces, sweep, module, EXACT)
    with pytest.raises(MisconfigurationException, match=r"mode 'vmap' does not fit.*sets kept, of which each adapter"):
        fit(Replaces(), swept(grid={"lr": [1e-2, 1e-3]}, mode="vmap"))


class Fleeting(Centered):
    """Moves a buffer that no checkpoint holds."""

    def build(self) -> None:
        super().build()
        self.register_buffer("center", self.center, persistent=False)


class FleetingByHand(Fleeting, Manual):
    """The same with manual optimization."""


def test_buffers_that_no_checkpoint_holds_are_each_adapters_own():
    module, sweep = Fleeting(), swept(adapters={name: FOUR[name] for name in "ab"}, keep=1)
    fit(module, sweep)
    assert_each_is_alone(Fleeting, sweep, module, EXACT)
    module, sweep = FleetingByHand(), swept(adapters={name: FOUR[name] for name in "ab"}, keep=1)
    fit(module, sweep)
    for name, candidate in sweep.candidates.items():
        assert distance(state(module, name), alone_manually(candidate, FleetingByHand)) == EXACT


class UsesRate(Quiet):
    """Weighs its loss with the learning rate, and halves that where a validation is little better than the best."""

    best, halved = float("inf"), 0

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        rate = self.optimizers().param_groups[0]["lr"]
        self.log("rate", rate)
        return super().training_step(batch, batch_idx) * (1 + 10 * rate)

    def on_validation_epoch_end(self) -> None:
        now = float(self.trainer.callback_metrics["val_loss"])
        if now > 0.9 * self.best:
            self.halved += 1
            for group in self.optimizers().param_groups:
                group["lr"] *= 0.5
        self.best = min(self.best, now)


def test_steps_and_hooks_of_a_validation_see_and_set_the_adapters_own_rates():
    module, sweep = UsesRate(), swept(adapters={name: FOUR[name] for name in ("a", "b", "d")}, keep=1)
    run, expected = fit(module, sweep), {"a": 1e-2, "b": 1e-3, "d": 2e-3}
    assert_each_is_alone(UsesRate, sweep, module, EXACT)
    halvings = {name: expected[name] / float(run.callback_metrics[f"rate/{name}"]) for name in expected}
    assert len({round(each) for each in halvings.values()}) > 1  # each at its own time


@pytest.mark.parametrize("mode", ["vmap", "meet"])
def test_ways_in_which_adapters_would_see_the_rate_of_the_first_are_refused(mode: Any):
    with pytest.raises(MisconfigurationException, match=f"mode '{mode}' does not fit.*the loss of 'lr=1e-1' is"):
        fit(UsesRate(), swept(grid={"lr": [1e-3, 1e-1]}, mode=mode))


class Lists(Quiet):
    """Gathers losses, as modules do that log their mean at the end of the epoch."""

    def build(self) -> None:
        super().build()
        self.outputs: list[Tensor] = []

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)
        self.outputs.append(loss.detach())
        return loss

    def on_train_epoch_end(self) -> None:
        self.log("mean", torch.stack(self.outputs).mean())
        self.outputs.clear()


@pytest.mark.filterwarnings("ignore:LoRASweep. training_step changes outputs in place")
def test_a_step_that_puts_tensors_in_a_list_is_not_mapped():
    with pytest.raises(
        MisconfigurationException, match=r"mode 'vmap' does not fit.*sets outputs, of which each adapter"
    ):
        fit(Lists(), swept(grid={"lr": [1e-2, 1e-3]}, mode="vmap"))
    fit(Lists(), swept(grid={"lr": [1e-2, 1e-3]}, mode="meet", keep=1.0))


class CountsOnContainer(Quiet):
    """Counts its steps on a part that is an instance of a class of torch."""

    def build(self) -> None:
        super().build()
        self.box = nn.Module()
        self.box.steps = 0

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.box.steps += 1
        return super().training_step(batch, batch_idx) / self.box.steps


def test_attributes_of_bare_containers_are_each_adapters_own():
    module, sweep = CountsOnContainer(), swept(adapters={name: FOUR[name] for name in "ab"}, keep=1)
    fit(module, sweep)
    assert_each_is_alone(CountsOnContainer, sweep, module, EXACT)


class SkipsLarge(Quiet):
    """Leaves out every second batch if its loss is large, which depends on the adapter."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)
        return None if batch_idx % 2 and loss.item() > 0.7 else loss


@pytest.mark.filterwarnings("ignore:.*training_step.* returned .None")
@pytest.mark.parametrize("accumulated", [1, 2])
@pytest.mark.parametrize("mode", ["loop", "meet"])
def test_an_adapter_without_a_loss_stays_as_it_is_in_that_step(mode: Any, accumulated: int):
    options = {"accumulate_grad_batches": accumulated, "max_epochs": 5, "max_steps": -1}
    module, sweep = SkipsLarge(), swept(adapters={name: FOUR[name] for name in "ab"}, keep=1, mode=mode)
    fit(module, sweep, **options)
    assert_each_is_alone(SkipsLarge, sweep, module, EXACT if mode == "loop" else CLOSE, **options)
