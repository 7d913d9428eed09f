"""What reaches one adapter of a sweep alone is refused or named; done for each, it is what fits of their own do."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException

from lightning_lora import LoRASweep, adapter_names, lora_layers, using
from tests.sweep.test_callback import CLOSE, Quiet, assert_each_is_alone, fit
from tests.toys import Toy

pytestmark = pytest.mark.filterwarnings("ignore:These adapters are not smaller")
TWO = {"a": {"lr": 1e-2, "rank": 2}, "b": {"lr": 3e-2, "rank": 2}}


def sweep() -> LoRASweep:
    return LoRASweep(adapters=TWO, monitor="val_loss", keep=1.0, mode="loop")


def halve(module: Toy) -> None:
    for layer in lora_layers(module).values():
        layer.lora.A.register_hook(lambda gradient: 0.5 * gradient.sign())


class HooksOne(Quiet):
    def on_train_start(self) -> None:
        halve(self)


class HooksEach(Quiet):
    def on_train_start(self) -> None:
        for name in adapter_names(self):
            with using(self, name):
                halve(self)


class AccumulatesOne(Quiet):
    def on_train_start(self) -> None:
        lora_layers(self)["net.0"].lora.A.register_post_accumulate_grad_hook(lambda parameter: None)


class Shares(Quiet):
    def on_fit_start(self) -> None:
        layers = lora_layers(self)
        layers["net.4"].lora.A = layers["net.2"].lora.A


def constrain(module: Toy) -> None:
    for layer in lora_layers(module).values():
        layer.lora.B.data.clamp_(-1e-3, 1e-3)


class ConstrainsOne(Quiet):
    def on_train_batch_end(self, *_: Any) -> None:
        constrain(self)


class ConstrainsEach(Quiet):
    def on_train_batch_end(self, *_: Any) -> None:
        for name in adapter_names(self):
            with using(self, name):
                constrain(self)


@pytest.mark.parametrize(
    ("kind", "match"),
    [
        (HooksOne, r"net\.0\.lora\.A.* of 'a' have hooks on their gradients, and those of 'b' do not.*with using"),
        (AccumulatesOne, r"net\.0\.lora\.A of 'a' have hooks on their gradients"),
        (Shares, r"net\.4\.lora\.A of 'a' were replaced by others, and those of 'b' do not"),
    ],
)
def test_what_is_done_to_the_tensors_of_one_adapter_is_refused(kind: type[Quiet], match: str) -> None:
    with pytest.raises(MisconfigurationException, match=match):
        fit(kind(), sweep())


def test_a_hook_that_changes_one_adapter_is_named() -> None:
    with pytest.warns(UserWarning, match=r"on_train_batch_end of ConstrainsOne has changed 'a' and no other adapter"):
        fit(ConstrainsOne(), sweep(), max_steps=3)


@pytest.mark.parametrize("kind", [HooksEach, ConstrainsEach])
def test_what_is_done_for_each_is_what_fits_of_their_own_do(kind: type[Quiet]) -> None:
    module, chosen = kind(), sweep()
    fit(module, chosen)  # any warning would be an error
    assert_each_is_alone(kind, chosen, module, CLOSE)
    assert not torch.equal(*(adapter_values(module, name) for name in TWO))


def adapter_values(module: Toy, name: str) -> torch.Tensor:
    with using(module, name):
        return torch.cat([layer.lora.A.detach().flatten() for layer in lora_layers(module).values()])


class MovesBuffer(Quiet):
    """Moves a buffer after the step, as a running center does."""

    def build(self) -> None:
        super().build()
        self.register_buffer("center", torch.zeros(()))

    def on_train_batch_end(self, *_: Any) -> None:
        self.center += 1.0


def test_buffers_that_a_hook_moves_once_for_all_are_named() -> None:
    with pytest.warns(UserWarning, match=r"on_train_batch_end of MovesBuffer has changed the buffers center, once for"):
        fit(MovesBuffer(), sweep())
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*has changed the buffers")
        fit(ConstrainsEach(), sweep())
