"""Code that computes with the weight of a layer whose update lies beside it is named, whenever it runs."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_lora import LoRACallback, lora_layers, merge
from tests.toys import FEATURES, Toy, loader, trainer
from tests.trainer.test_checks import Pooled, ReadsWeight, weight_of

pytestmark = pytest.mark.filterwarnings("ignore:These adapters are not smaller.*")


class CallsAndReads(ReadsWeight):
    """Calls the layer, too, so that gradients reach its adapter."""

    def loss(self, batch: list[Tensor]) -> Tensor:
        return super().loss(batch) + 0.1 * self.mixer(batch[0]).square().mean()


@pytest.mark.parametrize("read", [weight_of, lambda module: module.get_parameter("mixer.weight")], ids=["", "by name"])
def test_a_layer_that_is_called_and_whose_weight_is_read_elsewhere_is_named(read: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr("tests.trainer.test_checks.weight_of", read)
    where = r"The weight of mixer is read by .*\(test_(checks|reads).py:.*target_parameters=\['mixer.weight'\]"
    with pytest.warns(UserWarning, match=where):
        trainer(LoRACallback(rank=2, target_modules=["net.*", "mixer"])).fit(CallsAndReads(), loader())


def test_a_hook_of_a_layer_that_computes_with_its_weight_is_named() -> None:
    module = Toy()
    module.net[0].register_forward_hook(lambda layer, _, output: output / layer.weight.norm())
    with pytest.warns(UserWarning, match=r"The weight of net\.0 is read by .*test_reads.py"):
        trainer(LoRACallback(rank=2)).fit(module, loader())


def test_remedy_for_a_layer_that_is_called_and_read_computes_with_the_update_in_both_places() -> None:
    module = CallsAndReads()
    options: dict[str, Any] = {"target_modules": ["net.*"], "target_parameters": ["mixer.weight"]}
    trainer(LoRACallback(rank=2, **options)).fit(module, loader())  # any warning would be an error
    batch = next(iter(loader()))
    with torch.no_grad():
        adapted = module.loss(batch)
        merge(module)
        torch.testing.assert_close(module.loss(batch), adapted)


def test_a_hook_that_looks_at_weights_and_a_layer_that_reads_its_own_are_not_named() -> None:
    class Scaled(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return F.linear(x, weight_of_own(self), self.bias)

    class Toy3(Pooled):
        def build(self) -> None:
            super().build()
            self.pooler = Scaled(FEATURES, FEATURES)

        def loss(self, batch: list[Tensor]) -> Tensor:
            x, y = batch
            return super().loss([self.pooler(x + self.pooler.weight.new_zeros(1)), y])

        def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
            assert self.pooler.weight.norm() > 0

    trainer(LoRACallback(rank=2, target_modules=["net.*"], target_parameters=[])).fit(Toy3(), loader())
    trainer(LoRACallback(rank=2, target_modules=["net.*", "pooler"])).fit(Toy3(), loader())


def weight_of_own(layer: nn.Linear) -> Tensor:
    return getattr(layer, "wei" + "ght")


# --- outside of the first batch


class Index:
    """A plain object that computes with the weight of a layer."""

    def __init__(self, layer: nn.Linear) -> None:
        self.layer = layer

    def scores(self, x: Tensor) -> Tensor:
        return x @ self.layer.weight.T


class ReadsAt(Toy):
    """Calls a layer in every step, and has a helper read its weight in some."""

    where = ""

    def build(self) -> None:
        super().build()
        self.index = Index(self.net[4])

    def read(self, where: str, batch: list[Tensor]) -> Tensor:
        x, _ = batch
        hidden = self.net[:4](x)
        return self.index.scores(hidden).mean() if self.where == where else hidden.mean()

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        epoch = f"epoch {self.current_epoch}" if batch_idx == 0 else f"batch {self.global_step}"
        return super().training_step(batch, batch_idx) + self.read(epoch, batch)

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.read("validation", batch)

    def test_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.read("test", batch)

    def predict_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return self.read("prediction", batch)


def found(module: ReadsAt) -> list[str]:
    """Return what a fit, a test and a prediction warn of reads."""
    run = trainer(LoRACallback(rank=2), max_epochs=3, max_steps=-1, limit_val_batches=2)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        run.fit(module, loader(), loader())
        run.test(module, loader(), verbose=False)
        run.predict(module, loader())
    return [message for each in seen if "is read by" in (message := str(each.message))]


@pytest.mark.parametrize("where", ["epoch 0", "epoch 2", "validation", "test", "prediction"])
def test_a_helper_that_reads_a_weight_is_named_once_wherever_it_runs(where: str) -> None:
    module = ReadsAt()
    module.where = where
    [message] = found(module)
    assert "The weight of net.4 is read by Index.scores (test_reads.py:" in message
    assert "target_parameters=['net.4.weight']" in message


def test_nothing_is_said_where_nothing_reads() -> None:
    assert not found(ReadsAt())


def test_other_batches_are_not_watched() -> None:
    open_at = list[tuple[str, int]]()

    class Counts(ReadsAt):
        def read(self, where: str, batch: list[Tensor]) -> Tensor:
            layer = lora_layers(self)["net.4"]
            open_at.append((where, len(layer._forward_pre_hooks) + len(layer._forward_hooks)))
            return super().read(where, batch)

    found(Counts())
    watched = [where for where, hooks in open_at if hooks]
    assert watched == [
        "validation",
        *(each for epoch in range(3) for each in (f"epoch {epoch}", "validation")),
        "test",
        "prediction",
    ]


def test_a_resumed_training_is_watched_although_gradients_have_reached_everything(tmp_path: Any) -> None:
    run = trainer(LoRACallback(rank=2), max_epochs=1, max_steps=-1)
    run.fit(ReadsAt(), loader())
    run.save_checkpoint(tmp_path / "saved.ckpt")
    module = ReadsAt()
    module.where = "epoch 1"
    with pytest.warns(UserWarning, match="is read by Index.scores"):
        trainer(LoRACallback(rank=2), max_epochs=2, max_steps=-1).fit(
            module, loader(), ckpt_path=tmp_path / "saved.ckpt"
        )
