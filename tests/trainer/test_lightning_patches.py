"""Changes to Lightning: adapter files are never taken for whole models, and both import names of Lightning work."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import lightning.pytorch
import pytest
import torch

from lightning_lora import LoRACallback, LoRAConfig, attach, detach, load_adapter, lora_layers, merge
from lightning_lora.trainer.writing import written_at_once
from tests.toys import FEATURES, Toy, digest, loader, network, trainer
from tests.trainer.test_checkpoints import fitted, read

other: Any = pytest.importorskip("pytorch_lightning")


@pytest.mark.parametrize("strict", [True, False])
def test_load_from_checkpoint_is_refused(strict: bool, tmp_path: Path) -> None:
    _, _, path = fitted(tmp_path)
    with pytest.raises(RuntimeError, match=r"lightning_lora\.load_adapter\(model, path\)"):
        Toy.load_from_checkpoint(path, strict=strict)


def test_ordinary_checkpoints_still_load(tmp_path: Path) -> None:
    run, module = trainer(), Toy()
    run.fit(module, loader())
    run.save_checkpoint(tmp_path / "plain.ckpt")
    loaded = Toy.load_from_checkpoint(tmp_path / "plain.ckpt")
    x = torch.randn(3, FEATURES)
    assert torch.equal(loaded.net(x), module.net(x))


def test_load_adapter_needs_only_file(tmp_path: Path) -> None:
    _, trained, path = fitted(tmp_path, rank=3, alpha=7.0, modules_to_save=["net.4"], use_rslora=True)
    fresh = Toy()
    load_adapter(fresh, path)
    x = torch.randn(3, FEATURES)
    assert torch.equal(fresh.net(x), trained.net(x))


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("stage", ["fit", "validate", "test", "predict"])
def test_trainer_without_callback_refuses_adapter(stage: str, strict: bool, tmp_path: Path) -> None:
    _, _, path = fitted(tmp_path)
    module = Toy()
    module.strict_loading = strict
    with pytest.raises(RuntimeError, match=r"this Toy has no adapters.*LoRACallback\(\) takes all options"):
        getattr(trainer(), stage)(module, loader(), ckpt_path=path)
    assert not module.losses


def test_trainer_without_callback_says_that_a_fit_of_an_adapted_module_is_no_full_fine_tuning(
    caplog: pytest.LogCaptureFixture,
) -> None:
    message = "3 layers of this Toy carry adapters, and the Trainer has no LoRACallback"
    module = Toy()
    with caplog.at_level(logging.INFO):
        trainer(LoRACallback(rank=4)).fit(module, loader())
        trainer().validate(module, loader(), verbose=False)
        assert message not in caplog.text
        (run := trainer()).fit(module, loader())
        assert message in caplog.text
        caplog.clear()
        detach(module)
        run.fit(module, loader())
    assert message not in caplog.text


@pytest.mark.parametrize("strict", [True, False])
def test_trainer_without_callback_refuses_merged_model(strict: bool, tmp_path: Path) -> None:
    _, merged, path = fitted(tmp_path)
    merge(merged)
    merged.strict_loading = strict
    run = trainer()
    with pytest.raises(RuntimeError, match="already merged"):
        run.test(merged, loader(), ckpt_path=path)
    run.test(merged, loader(), verbose=False)  # nothing of the file is left in the Trainer


def test_module_attaching_in_on_load_checkpoint_needs_no_callback(tmp_path: Path) -> None:
    class Attaches(Toy):
        strict_loading = False  # the base is not in the file

        def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
            attach(self, LoRAConfig(rank=4))

    _, trained, path = fitted(tmp_path, rank=4)
    module = Attaches()
    trainer().test(module, loader(), ckpt_path=path, verbose=False)
    x = torch.randn(3, FEATURES)
    assert torch.equal(module.net(x), trained.net(x))


# --- pytorch_lightning

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


def fit_with(name: Any, module: Any, *callbacks: Any, **options: Any) -> None:
    run = name.Trainer(callbacks=[LoRACallback(rank=4), *callbacks], **(QUIET | options))
    run.fit(module, loader())


@pytest.mark.parametrize("strategy", ["auto", "named"])
def test_pytorch_lightning_trains_identically(strategy: str, tmp_path: Path) -> None:
    checkpoint, module, reference = other.callbacks.ModelCheckpoint(tmp_path, save_last=True), OtherToy(), Toy()
    named = other.strategies.SingleDeviceStrategy("cpu")
    fit_with(other, module, checkpoint, strategy=named if strategy == "named" else "auto")
    fit_with(lightning.pytorch, reference, enable_checkpointing=False)
    assert set(read(checkpoint.last_model_path)["state_dict"]) == ADAPTER
    assert digest(module) == digest(reference)
    assert module.losses == reference.losses
    detach(module)
    assert digest(module.net) == digest(network())


@pytest.mark.parametrize("built_in", ["setup", "configure_model"])
def test_pytorch_lightning_attaches_to_late_layers(built_in: str) -> None:
    class Late(OtherToy):
        def __init__(self) -> None:
            super().__init__()
            del self.net

    def build(self: Any, **_: Any) -> None:
        if not hasattr(self, "net"):
            self.net = network()

    setattr(Late, built_in, build)
    module = Late()
    fit_with(other, module, enable_checkpointing=False)
    assert set(lora_layers(module)) == {"net.0", "net.2", "net.4"}


def test_pytorch_lightning_evaluates_without_options(tmp_path: Path) -> None:
    _, trained, path = fitted(tmp_path)
    module = OtherToy()
    run = other.Trainer(callbacks=[LoRACallback()], enable_checkpointing=False, **QUIET)
    [found] = run.test(module, loader(), ckpt_path=path, verbose=False)
    [expected] = lightning.pytorch.Trainer(**QUIET).test(trained, loader(), verbose=False)
    assert found == expected


@pytest.mark.parametrize("precision", ["64-true", "bf16-mixed", "16-true"])
def test_pytorch_lightning_precision_plugins(precision: str) -> None:
    module, reference = OtherToy(), Toy()
    fit_with(other, module, enable_checkpointing=False, precision=precision)
    fit_with(lightning.pytorch, reference, enable_checkpointing=False, precision=precision)
    assert digest(module) == digest(reference)


@pytest.mark.parametrize(("trainers", "callbacks"), [(lightning.pytorch, other), (other, lightning.pytorch)])
def test_mixed_import_names_are_refused(trainers: Any, callbacks: Any) -> None:
    module = Toy() if trainers is lightning.pytorch else OtherToy()
    with pytest.raises(Exception, match=rf"from {trainers.__name__}, .* EarlyStopping from {callbacks.__name__}\."):
        fit_with(trainers, module, callbacks.callbacks.EarlyStopping("train_loss"), enable_checkpointing=False)
    assert not module.losses
    assert not lora_layers(module)


@pytest.mark.parametrize("module", [Toy, OtherToy])
def test_lightning_refuses_module_of_other_package(module: Any, tmp_path: Path) -> None:
    name = other if module is Toy else lightning.pytorch
    run = name.Trainer(callbacks=[LoRACallback(rank=4)], enable_checkpointing=False, **QUIET)
    with pytest.raises(TypeError, match="must be a `LightningModule`"):
        run.fit(module(), loader())


@pytest.mark.parametrize("kind", ["EMAWeightAveraging", "StochasticWeightAveraging", "ModelPruning"])
def test_incompatible_callbacks_are_refused_in_both_packages(kind: str) -> None:
    options = {"StochasticWeightAveraging": {"swa_lrs": 1e-2}, "ModelPruning": {"pruning_fn": "l1_unstructured"}}
    messages = []
    for name, module in ((lightning.pytorch, Toy()), (other, OtherToy())):
        callbacks = [getattr(name.callbacks, kind)(**options.get(kind, {})), LoRACallback(rank=4)]
        run = name.Trainer(callbacks=callbacks, enable_checkpointing=False, **QUIET)
        with pytest.raises(Exception, match=kind) as caught:
            run.fit(module, loader())
        messages.append(str(caught.value))
    assert messages[0] == messages[1]


@pytest.mark.parametrize("strict", [True, False])
def test_pytorch_lightning_load_from_checkpoint_is_refused(strict: bool, tmp_path: Path) -> None:
    _, _, path = fitted(tmp_path)
    with pytest.raises(RuntimeError, match=r"lightning_lora\.load_adapter\(model, path\)"):
        OtherToy.load_from_checkpoint(path, strict=strict)


def test_adapter_loads_across_packages(tmp_path: Path) -> None:
    _, trained, path = fitted(tmp_path)
    module = OtherToy()
    load_adapter(module, path)
    x = torch.randn(3, FEATURES)
    assert torch.equal(module.net(x), trained.net(x))
    assert len(lora_layers(module)) == 3


@pytest.mark.parametrize("name", [lightning.pytorch, other])
def test_checkpoints_are_written_at_once_in_both_packages(name: Any, tmp_path: Path) -> None:
    run = name.Trainer(enable_checkpointing=False, **QUIET)
    with written_at_once(run.strategy, tmp_path / "last.ckpt") as place:
        assert place != tmp_path / "last.ckpt"
        place.write_bytes(b"whole")
    assert (tmp_path / "last.ckpt").read_bytes() == b"whole"
