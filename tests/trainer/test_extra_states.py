"""What ``get_extra_state`` of a module's parts returns comes back from a checkpoint, as in plain Lightning."""

from __future__ import annotations

import os
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torchmetrics import MeanMetric

from lightning_lora import (
    LoRACallback,
    LoRAConfig,
    adapter_state_dict,
    add_adapter,
    attach,
    load_adapter,
    set_adapter,
)
from tests.contract import assert_same_bits
from tests.files import run
from tests.toys import Toy, digest, loader, network, trainer

LEFT_OUT = r"get_extra_state returns tensors of the frozen base in stage\._extra_state, so checkpoints leave"


class WarmUp(nn.Module):
    """Halves its input until it has seen six batches."""

    def __init__(self) -> None:
        super().__init__()
        self.seen = 0

    def forward(self, x: Tensor) -> Tensor:
        self.seen += self.training
        return x if self.seen > 6 else x / 2

    def get_extra_state(self) -> Any:
        return {"seen": self.seen}

    def set_extra_state(self, state: Any) -> None:
        self.seen = state["seen"]


class AsTensor(WarmUp):
    def get_extra_state(self) -> Any:
        return torch.tensor([self.seen])

    def set_extra_state(self, state: Any) -> None:
        self.seen = int(state)


class Seen:
    def __init__(self, count: int) -> None:
        self.count = count


class AsObject(WarmUp):
    def get_extra_state(self) -> Any:
        return {"seen": Seen(self.seen)}

    def set_extra_state(self, state: Any) -> None:
        self.seen = state["seen"].count


class HoldsBase(WarmUp):
    """Returns a frozen weight with its counter."""

    weight: Tensor

    def get_extra_state(self) -> Any:
        return {"seen": self.seen, "base": [self.weight]}


class Warm(Toy):
    """Has such a part below, twice by two names, and counts batches itself."""

    stage_type: type[WarmUp] = WarmUp

    def build(self) -> None:
        self.net = network()
        self.stage = self.stage_type()
        self.again = self.stage
        self.batches = 0

    def loss(self, batch: list[Tensor]) -> Tensor:
        self.batches += self.training
        return ((self.stage(self.net(batch[0])) - batch[1]) ** 2).mean()

    def get_extra_state(self) -> Any:
        return self.batches

    def set_extra_state(self, state: Any) -> None:
        self.batches = state


class WarmTensor(Warm):
    stage_type = AsTensor


class WarmObject(Warm):
    stage_type = AsObject


class WarmBase(Warm):
    stage_type = HoldsBase

    def build(self) -> None:
        super().build()
        self.stage.weight = self.net[0].weight.detach()


def fitted(module: Toy, directory: Path, *, epochs: int = 2, **lora: Any) -> str:
    """Train for some epochs of four batches and return the last checkpoint."""
    saved = ModelCheckpoint(directory)
    callback = LoRACallback(rank=2, **lora)
    trainer(callback, saved, max_epochs=epochs, max_steps=-1, root=directory).fit(module, loader())
    return saved.best_model_path


def state_of(path: str) -> dict[str, Any]:
    return torch.load(path, weights_only=True)["state_dict"]


@pytest.mark.parametrize("kind", [Warm, WarmTensor])
@pytest.mark.parametrize("options", [{}, {"modules_to_save": ["stage"]}], ids=["", "in full"])
def test_extra_states_come_back_and_resuming_is_bit_exact(
    kind: type[Warm], options: dict[str, Any], tmp_path: Path
) -> None:
    path = fitted(module := kind(), tmp_path / "half", **options)
    assert (module.stage.seen, module.batches) == (8, 8)
    assert {"stage._extra_state", "_extra_state"} <= state_of(path).keys()

    trainer(LoRACallback()).test(tested := kind(), loader(), ckpt_path=path, verbose=False)
    load_adapter(loaded := kind(), path)
    trainer(LoRACallback(rank=2, init_from=path, allow_untrained=["*"], **options), max_epochs=0).fit(
        begun := kind(), loader()
    )
    for each in (tested, loaded, begun):
        assert (each.stage.seen, each.batches) == (8, 8)
        assert digest(each) == digest(module)

    fitted(whole := kind(), tmp_path / "whole", epochs=3, **options)
    callback = LoRACallback(rank=2, **options)
    trainer(callback, max_epochs=3, max_steps=-1).fit(resumed := kind(), loader(), ckpt_path=path)
    assert digest(resumed) == digest(whole)
    assert resumed.losses == whole.losses[8:]
    assert (resumed.stage.seen, resumed.batches) == (12, 12)
    assert run("inspect", path) == 0
    assert options or run("export", path, tmp_path / "peft") == 0


def test_file_without_extra_states_leaves_them_as_they_are(tmp_path: Path) -> None:
    checkpoint = torch.load(fitted(module := Warm(), tmp_path), weights_only=False)
    for name in ("stage._extra_state", "_extra_state"):
        del checkpoint["state_dict"][name]
    torch.save(checkpoint, path := tmp_path / "old.ckpt")
    trainer(LoRACallback()).test(tested := Warm(), loader(), ckpt_path=path, verbose=False)
    load_adapter(loaded := Warm(), path)
    for each in (tested, loaded):
        assert each.stage.seen == 0
        assert_same_bits({"": each.net[0].lora.B}, {"": module.net[0].lora.B})


def test_whole_checkpoint_from_before_brings_its_extra_states(tmp_path: Path) -> None:
    saved = ModelCheckpoint(tmp_path)
    trainer(saved, max_epochs=2, max_steps=-1).fit(Warm(), loader())
    assert {"stage._extra_state", "again._extra_state"} <= state_of(saved.best_model_path).keys()
    adapted = Warm()
    trainer(LoRACallback(rank=2), max_epochs=1, max_steps=-1).fit(adapted, loader(), ckpt_path=saved.best_model_path)
    assert (adapted.stage.seen, adapted.batches) == (12, 12)


@pytest.mark.parametrize("kind", [Warm, WarmTensor])
def test_model_that_lacks_the_part_loads_the_adapter_without_its_state(kind: type[Warm], tmp_path: Path) -> None:
    path = fitted(module := kind(), tmp_path)
    load_adapter(bare := Toy(), path)
    assert torch.equal(bare.net[0].lora.B, module.net[0].lora.B)
    with pytest.raises(ValueError, match=r"unknown to the model: .*stage\._extra_state"):
        trainer(LoRACallback()).test(Toy(), loader(), ckpt_path=path, verbose=False)


def test_objects_that_only_executing_the_file_would_read_are_named(tmp_path: Path) -> None:
    path = fitted(module := WarmObject(), tmp_path)
    with pytest.raises(ValueError, match=r"such as tests\.trainer\.test_extra_states\.Seen.*weights_only=False"):
        trainer(LoRACallback()).test(WarmObject(), loader(), ckpt_path=path, verbose=False)
    trusting = WarmObject()
    trainer(LoRACallback()).test(trusting, loader(), ckpt_path=path, verbose=False, weights_only=False)
    assert trusting.stage.seen == 8
    loaded = WarmObject()
    with pytest.warns(UserWarning, match=r"beyond tensors and plain values in stage\._extra_state"):
        load_adapter(loaded, path)
    assert (loaded.stage.seen, loaded.batches) == (0, 8)
    assert digest(loaded) == digest(module)


def test_states_with_tensors_of_the_frozen_base_are_left_out(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match=LEFT_OUT) as caught:
        path = fitted(WarmBase(), tmp_path)
    assert sum("frozen base in" in str(each.message) for each in caught) == 1
    assert {name for name in state_of(path) if name.endswith("_extra_state")} == {"_extra_state"}
    assert os.path.getsize(path) < 40_000


def test_further_adapter_leaves_the_state_of_the_module(tmp_path: Path) -> None:
    path = fitted(Warm(), tmp_path)
    add_adapter(first := Warm(), "first", path)
    assert first.stage.seen == 8
    attach(second := Warm(), LoRAConfig(rank=2))
    with pytest.warns(UserWarning, match=r"belongs to the module, not to one of its adapters"):
        add_adapter(second, "second", path)
    set_adapter(second, "second")
    assert second.stage.seen == 0


def test_metrics_with_extra_states_load_them_once(tmp_path: Path) -> None:
    class Counts(MeanMetric):
        loads = 0

        def get_extra_state(self) -> Any:
            return 5

        def set_extra_state(self, state: Any) -> None:
            self.loads += state

    class Measured(Toy):
        def build(self) -> None:
            super().build()
            self.metric = Counts()
            self.metric.persistent(True)

    path = fitted(Measured(), tmp_path)
    trainer(LoRACallback()).test(module := Measured(), loader(), ckpt_path=path, verbose=False)
    assert module.metric.loads == 5


class Measured(Warm):
    """Has a metric that its checkpoints hold, and divides its loss by it."""

    def build(self) -> None:
        super().build()
        self.scale = MeanMetric()
        self.scale.persistent(True)

    def loss(self, batch: list[Tensor]) -> Tensor:
        loss = super().loss(batch)
        self.scale.update(loss.detach())
        return loss / self.scale.compute()


@pytest.mark.parametrize("names", [[None], ["one", "two"]], ids=["an adapter", "one of two"])
def test_a_fit_that_starts_anew_begins_with_the_first_states(names: list[str | None], tmp_path: Path) -> None:
    module, options = Measured(), {"fresh": True, "modules_to_save": ["net.4"]}
    for name in names:
        fitted(module, tmp_path / "first", adapter=name, **options)
        trainer(LoRACallback(adapter=name)).validate(module, loader(), verbose=False)
    for _ in range(2):
        fitted(module, tmp_path / "again", epochs=3, adapter=names[0], **options)
    fitted(new := Measured(), tmp_path / "new", epochs=3, **options)
    assert (module.stage.seen, module.batches) == (new.stage.seen, new.batches) == (12, 12)
    assert torch.equal(module.scale.compute(), new.scale.compute())
    assert_same_bits(adapter_state_dict(module), adapter_state_dict(new))


class CannotBeCopied(Warm):
    def get_extra_state(self) -> Any:
        return [self.batches, threading.Lock()]

    def set_extra_state(self, state: Any) -> None:
        self.batches = state[0]


def test_a_state_that_cannot_be_copied_is_named_where_it_goes_on() -> None:
    module = CannotBeCopied()
    trainer(LoRACallback(rank=2, fresh=True)).fit(module, loader())
    with pytest.warns(
        UserWarning, match=r"fresh=True\): _extra_state, .* could not be copied when the first fit began"
    ):
        trainer(LoRACallback(rank=2, fresh=True)).fit(module, loader())
