"""Lightning has two import names, whose classes are not each other's: both work, or the mix is refused in words."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch
import pytest
import torch

from lightning_lora import LoRACallback, detach, load_adapter, lora_layers
from tests.toys import FEATURES, Toy, digest, loader, network
from tests.training.test_adapter_checkpoints import fitted, read

other: Any = pytest.importorskip("pytorch_lightning")

QUIET = {
    "accelerator": "cpu",
    "devices": 1,
    "logger": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "max_epochs": 1,
    "limit_val_batches": 0,
}
ADAPTER = {f"net.{layer}.lora.{factor}" for layer in (0, 2, 4) for factor in "AB"}


class OtherToy(other.LightningModule):
    """The toy of the tests under the other name."""

    def __init__(self) -> None:
        super().__init__()
        self.losses: list[float] = []
        self.net = network()

    loss = Toy.loss
    training_step = Toy.training_step
    test_step = Toy.test_step
    configure_optimizers = Toy.configure_optimizers


def says_which_name(message: str) -> bool:
    return "pytorch_lightning" in message and "lightning.pytorch" in message


def trains_or_says_why(name: Any, module: Any, directory: Path, *callbacks: Any, **options: Any) -> bool:
    """Check that a fit is what it is under one name, or refused with both names before it starts."""
    checkpoint = name.callbacks.ModelCheckpoint(directory, save_last=True)
    run = name.Trainer(callbacks=[LoRACallback(rank=4), checkpoint, *callbacks], **(QUIET | options))
    try:
        run.fit(module, loader())
    except Exception as refusal:
        assert says_which_name(str(refusal)), refusal  # noqa: PT017 - it may also work
        assert not module.losses
        return False
    reference = Toy()
    truth = lightning.pytorch.Trainer(callbacks=[LoRACallback(rank=4)], enable_checkpointing=False, **QUIET)
    truth.fit(reference, loader())
    assert set(read(checkpoint.last_model_path)["state_dict"]) == ADAPTER
    assert digest(module) == digest(reference)
    assert module.losses == reference.losses
    detach(module)
    assert digest(module.net) == digest(network())
    return True


def test_all_under_the_name_that_lightning_lora_imports_works(tmp_path: Path) -> None:
    assert trains_or_says_why(lightning.pytorch, Toy(), tmp_path)


def test_all_under_the_other_name_works_or_is_refused_with_the_reason(tmp_path: Path) -> None:
    trains_or_says_why(other, OtherToy(), tmp_path)


def test_a_strategy_under_the_other_name_works_or_is_refused_with_the_reason(tmp_path: Path) -> None:
    trains_or_says_why(other, OtherToy(), tmp_path, strategy=other.strategies.SingleDeviceStrategy("cpu"))


@pytest.mark.parametrize("module", [Toy, OtherToy])
def test_lightning_itself_refuses_a_module_under_another_name_than_the_trainers(module: Any, tmp_path: Path) -> None:
    name = other if module is Toy else lightning.pytorch
    run = name.Trainer(callbacks=[LoRACallback(rank=4)], enable_checkpointing=False, **QUIET)
    with pytest.raises(TypeError, match="must be a `LightningModule`"):
        run.fit(module(), loader())


@pytest.mark.parametrize("kind", ["EMAWeightAveraging", "StochasticWeightAveraging", "BackboneFinetuning"])
def test_callbacks_under_the_other_name_are_recognised_or_refused(kind: str) -> None:
    """These are refused under the one name, for reasons that hold under the other as well."""
    options = {"StochasticWeightAveraging": {"swa_lrs": 1e-2}}.get(kind, {})
    messages = []
    for name in (lightning.pytorch, other):
        callback = getattr(name.callbacks, kind)(**options)
        callbacks = [callback, LoRACallback(rank=4)]
        run = lightning.pytorch.Trainer(callbacks=callbacks, enable_checkpointing=False, **QUIET)
        with pytest.raises(Exception) as caught:  # noqa: PT011 - the message is what counts
            run.fit(Toy(), loader())
        messages.append(str(caught.value))
    expected, found = messages
    assert found == expected or says_which_name(found)


@pytest.mark.parametrize("strict", [True, False])
def test_load_from_checkpoint_of_the_other_name_never_returns_a_bare_base_model(strict: bool, tmp_path: Path) -> None:
    _, _, path = fitted(tmp_path)
    with pytest.raises(RuntimeError, match=r"lightning_lora\.load_adapter\(model, path\)"):
        OtherToy.load_from_checkpoint(path, strict=strict)


def test_an_adapter_of_one_name_loads_into_a_module_of_the_other(tmp_path: Path) -> None:
    _, trained, path = fitted(tmp_path)
    module = OtherToy()
    load_adapter(module, path)
    x = torch.randn(3, FEATURES)
    assert torch.equal(module.net(x), trained.net(x))
    assert len(lora_layers(module)) == 3
