"""``init_from``: training starts from another adapter, and each layer's update is what it was there."""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

from lightning_lora import (
    LoRACallback,
    LoRAConfig,
    adapter_state_dict,
    add_adapter,
    attach,
    load_adapter,
    lora_layers,
    save_adapter,
)
from lightning_lora.trainer.warm_start import start_from
from tests.contract import raises_and_changes_nothing
from tests.toys import Toy, loader, trainer
from tests.trainer.test_checkpoints import fitted

pytestmark = pytest.mark.filterwarnings("ignore:These adapters are not smaller")


@pytest.fixture(params=["checkpoint", "directory"])
def source(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Toy, str]:
    """A trained module of rank 4, and where its adapter is."""
    _, module, path = fitted(tmp_path / "source")
    if request.param == "directory":
        save_adapter(module, tmp_path / "peft")
        path = str(tmp_path / "peft")
    return module, path


def updates(module: nn.Module) -> dict[str, torch.Tensor]:
    return {
        name: layer.scaling * layer.lora.B.detach().double() @ layer.lora.A.detach().double()
        for name, layer in lora_layers(module).items()
    }


def fresh(**options: Any) -> Toy:
    module = Toy()
    attach(module, LoRAConfig(**({"rank": 4} | options)))
    return module


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"rank": 6},
        {"rank_pattern": {"net.0": 7}, "alpha": 5.0},
        {"use_rslora": True, "rank": 8, "init": "orthogonal"},
    ],
)
def test_updates_are_unchanged(options: dict[str, Any], source: tuple[Toy, str]) -> None:
    module = fresh(**options)
    start_from(module, source[1])
    for name, update in updates(source[0]).items():
        assert update.any()
        torch.testing.assert_close(updates(module)[name], update, rtol=1e-6, atol=1e-7)


def test_grown_rank_can_learn(source: tuple[Toy, str]) -> None:
    module = fresh(rank=6)
    own = {name: layer.lora.A.detach().clone() for name, layer in lora_layers(module).items()}
    start = start_from(module, source[1])
    assert start.grown == ["net.0", "net.2", "net.4"]
    for name, layer in lora_layers(module).items():
        assert torch.equal(layer.lora.A[4:], own[name][4:])
        assert not layer.lora.B[:, 4:].any()


def test_added_and_removed_targets_are_reported(source: tuple[Toy, str]) -> None:
    module = Toy()
    module.other = nn.Linear(8, 8)
    attach(module, LoRAConfig(rank=4, target_modules=["net.2", "net.4", "other"]))
    text = str(start_from(module, source[1]))
    assert "2 as they were (net.2, net.4)" in text
    assert "1 new (other)" in text
    assert "2 dropped (net.0.lora.A, net.0.lora.B)" in text
    torch.testing.assert_close(updates(module)["net.4"], updates(source[0])["net.4"])
    assert not lora_layers(module)["other"].lora.B.any()


@pytest.mark.parametrize("kind", ["checkpoint", "directory"])
@pytest.mark.parametrize("here", [{}, {"exclude_modules": ["net.4"]}], ids=["adapted", "frozen"])
def test_a_head_that_trained_in_full_is_not_lost(kind: str, here: dict[str, Any], tmp_path: Path) -> None:
    """Its adapters were trained with that head, and are worth little with the base's."""
    _, module, path = fitted(tmp_path / "source", modules_to_save=["net.4"])
    if kind == "directory":
        save_adapter(module, tmp_path / "peft")
        path = str(tmp_path / "peft")
    other = fresh(**here)
    message = r"net\.4\.(weight|bias), net\.4\.(weight|bias): trained there, frozen here.*modules_to_save"
    with raises_and_changes_nothing(other, ValueError, message):
        start_from(other, path)
    same = fresh(modules_to_save=["net.4"])
    start_from(same, path)
    assert torch.equal(same.net[4].weight, module.net[4].weight)


KINDS: dict[str, dict[str, Any]] = {"plain": {}, "dora": {"use_dora": True}, "bias": {"lora_bias": True}}


@pytest.mark.parametrize("there", KINDS)
@pytest.mark.parametrize("here", KINDS)
@pytest.mark.parametrize("kind", ["checkpoint", "directory"])
def test_what_the_options_compute_stays_or_is_refused(there: str, here: str, kind: str, tmp_path: Path) -> None:
    _, module, path = fitted(tmp_path / "source", **KINDS[there])
    if kind == "directory":
        save_adapter(module, tmp_path / "peft")
        path = str(tmp_path / "peft")
    other, x = fresh(**KINDS[here]), torch.randn(5, 8, generator=torch.Generator().manual_seed(0))
    if there not in ("plain", here):
        option = "use_dora" if there == "dora" else "lora_bias"
        with raises_and_changes_nothing(other, ValueError, f"part of the update there; set {option} here, too"):
            start_from(other, path)
        return
    start = start_from(other, path)
    torch.testing.assert_close(other.net(x), module.net(x), rtol=1e-5, atol=1e-6)
    assert str(start) == "3 as they were (net.0, net.2, net.4)"


@pytest.mark.parametrize(
    ("options", "message"),
    [({"rank": 3}, r"net\.0\.lora\.A: \(4, 8\) there, \(3, 8\) here"), ({"use_dora": False, "rank": 2}, "there")],
)
def test_misfit_changes_nothing(options: dict[str, Any], message: str, source: tuple[Toy, str]) -> None:
    module = fresh(**options)
    with raises_and_changes_nothing(module, ValueError, message):
        start_from(module, source[1])


class Labelled(Toy):
    """A body, and a head with one output for each label."""

    labels = 3

    def build(self) -> None:
        super().build()
        self.net = self.net[:4]
        self.head = nn.Linear(16, self.labels)

    def loss(self, batch: list[torch.Tensor]) -> torch.Tensor:
        return self.head(self.net(batch[0])).square().mean()


class LabelledAnew(Labelled):
    labels = 5


def test_a_head_for_other_labels_is_refused_with_the_way_to_start_from_the_rest(tmp_path: Path) -> None:
    options = {"rank": 2, "target_modules": ["net.0", "net.2"], "modules_to_save": ["head"]}
    run = trainer(LoRACallback(**options))
    run.fit(first := Labelled(), loader())
    run.save_checkpoint(path := tmp_path / "first.ckpt")
    attach(module := LabelledAnew(), LoRAConfig(**options))
    with raises_and_changes_nothing(module, ValueError, r"head.weight: \(3, 16\) there.*save_adapter.*export_root"):
        start_from(module, path)
    load_adapter(again := Labelled(), path)
    with pytest.warns(UserWarning, match="leaves out head"):
        save_adapter(again, tmp_path / "rest", export_root="net")
    start_from(module, tmp_path / "rest")
    for name, update in updates(first).items():
        torch.testing.assert_close(updates(module)[name], update)


class OtherHead(Labelled):
    """Has the same network below a head of another name."""

    def build(self) -> None:
        super().build()
        self.classifier = self.head
        del self.head

    def loss(self, batch: list[torch.Tensor]) -> torch.Tensor:
        return self.classifier(self.net(batch[0])).square().mean()


def test_what_the_source_trained_and_this_module_does_not_train_is_warned_of(tmp_path: Path) -> None:
    run = trainer(LoRACallback(rank=2, target_modules=["net.0", "net.2"], modules_to_save=["head"]))
    run.fit(Labelled(), loader())
    run.save_checkpoint(path := tmp_path / "first.ckpt")
    options = {"rank": 4, "target_modules": ["net.0"], "modules_to_save": ["classifier"]}
    with pytest.warns(UserWarning, match=r"leaves out net.2.lora.A, net.2.lora.B, head.weight, head.bias: trained"):
        trainer(LoRACallback(**options, init_from=path)).fit(OtherHead(), loader())


def test_source_without_common_tensors_is_refused(tmp_path: Path) -> None:
    _, _, path = fitted(tmp_path)
    other = nn.Sequential(nn.Linear(4, 4))
    attach(other, LoRAConfig(rank=1))
    with raises_and_changes_nothing(other, ValueError, "it shares no tensor with this Sequential"):
        start_from(other, path)


def test_init_from_starts_training_and_is_logged(source: tuple[Toy, str], caplog: pytest.LogCaptureFixture) -> None:
    module = Toy()
    with caplog.at_level(logging.INFO):
        run = trainer(LoRACallback(rank=6, init_from=source[1]), max_steps=0)
        run.fit(module, loader())
    for name, update in updates(source[0]).items():
        torch.testing.assert_close(updates(module)[name], update)
    assert f"LoRA: started from {source[1]}: 3 of grown rank (net.0, net.2, net.4)" in caplog.text


def test_ckpt_path_overrides_init_from(source: tuple[Toy, str], tmp_path: Path) -> None:
    _, resumed, path = fitted(tmp_path / "resumed", epochs=3)
    module = Toy()
    trainer(LoRACallback(rank=4, init_from=source[1]), max_steps=0).fit(module, loader(), ckpt_path=path)
    for name, update in updates(resumed).items():
        assert torch.equal(updates(module)[name], update)


@pytest.mark.parametrize("name", [None, "ours"])
def test_init_from_also_starts_an_adapter_that_is_there_already(source: tuple[Toy, str], name: str | None) -> None:
    module, options = Toy(), {"rank": 4, "adapter": name}
    if name is None:
        attach(module, LoRAConfig(rank=4))
    else:
        add_adapter(module, name, LoRAConfig(rank=4))
    trainer(LoRACallback(init_from=source[1], **options), max_steps=0).fit(module, loader())
    for layer, update in updates(source[0]).items():
        assert torch.equal(updates(module)[layer], update)
    with pytest.raises((ValueError, FileNotFoundError), match="missing"):
        trainer(LoRACallback(init_from="missing", **options)).fit(module, loader())


def test_init_from_replaces_nothing_that_was_learned_since(source: tuple[Toy, str]) -> None:
    module = Toy()
    run = trainer(LoRACallback(rank=4, init_from=source[1]))
    run.validate(module, loader(), verbose=False)
    run.fit(module, loader())  # the values are those of the file: nothing is lost
    assert not torch.equal(updates(module)["net.0"], updates(source[0])["net.0"])
    run.test(module, loader(), verbose=False)  # with what the fit has learned
    again = trainer(LoRACallback(rank=4, init_from=source[1]))
    with raises_and_changes_nothing(module, ValueError, "has an adapter already.*fresh=True"):
        again.fit(module, loader())
    trainer(LoRACallback(rank=4, init_from=source[1], fresh=True), max_steps=0).fit(module, loader())
    assert torch.equal(updates(module)["net.0"], updates(source[0])["net.0"])


@pytest.mark.filterwarnings("ignore:Total length of")
@pytest.mark.parametrize("is_wanted", [True, False])
def test_a_fit_without_a_step_exports_nothing_and_raises_unless_wanted(
    is_wanted: bool, source: tuple[Toy, str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    target = tmp_path / "exported"
    trainer(LoRACallback(rank=4, export_dir=str(target))).fit(Toy(), loader())
    before = {file.name: file.read_bytes() for file in target.iterdir()}
    again = LoRACallback(rank=4, init_from=source[1], export_dir=str(target), overwrite=True, merge_on_teardown=True)
    run, module = trainer(again, **({"max_epochs": 0, "max_steps": -1} if is_wanted else {"max_steps": 4})), Toy()
    message = r"made no optimizer step.*Is the train_dataloader empty"
    if is_wanted:
        with caplog.at_level(logging.INFO):
            run.fit(module, loader())
        assert re.search(f"{message}.*Nothing is exported or merged", caplog.text)
    else:
        with pytest.raises(MisconfigurationException, match=message):
            run.fit(module, loader(rows=0))
    assert lora_layers(module)
    assert {file.name: file.read_bytes() for file in target.iterdir()} == before


@pytest.mark.parametrize("awaited", [{}, {"merge_on_teardown": True}, {"export_dir": "peft"}], ids=str)
def test_a_start_that_does_not_move_is_no_training(
    awaited: dict[str, Any], source: tuple[Toy, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Still(Toy):
        def configure_optimizers(self) -> Any:
            return torch.optim.AdamW(self.parameters(), lr=0.0)

    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    run = trainer(LoRACallback(rank=4, init_from=source[1], **awaited), max_steps=3)
    message = "No LoRA adapter was trained in 3 steps. Was the learning rate zero"
    if awaited:
        with pytest.raises(MisconfigurationException, match=f"{message}.*Nothing is exported or merged"):
            run.fit(Still(), loader())
        assert not any(Path().iterdir())
    else:
        with pytest.warns(UserWarning, match=message):
            run.fit(Still(), loader())


# --- export_dir


def test_export_writes_best_checkpoint(tmp_path: Path) -> None:
    from lightning.pytorch.callbacks import ModelCheckpoint

    module, checkpoint = Toy(), ModelCheckpoint(tmp_path, monitor="train_loss", mode="max")
    run = trainer(LoRACallback(rank=4, export_dir=str(tmp_path / "peft")), checkpoint, max_epochs=3, max_steps=-1)
    run.fit(module, loader())
    best, exported = Toy(), Toy()
    load_adapter(best, checkpoint.best_model_path)
    load_adapter(exported, tmp_path / "peft")
    for name, update in updates(best).items():
        torch.testing.assert_close(updates(exported)[name], update)
    assert checkpoint.best_model_path.endswith("epoch=0-step=4.ckpt")
    assert not torch.allclose(updates(module)["net.0"], updates(best)["net.0"])


def test_export_writes_last_state_without_checkpoints(tmp_path: Path) -> None:
    module, target = Toy(), tmp_path / "peft"
    callback = LoRACallback(rank=4, export_dir=str(target), merge_on_teardown=True)
    trainer(callback, max_steps=6).fit(module, loader())
    exported = Toy()
    load_adapter(exported, target)
    x = torch.ones(2, 8)
    assert not lora_layers(module)
    torch.testing.assert_close(exported.net(x), module.net(x))


def test_diverged_adapter_is_not_exported(tmp_path: Path) -> None:
    class Diverges(Toy):
        def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
            return super().training_step(batch, batch_idx) * float("nan")

    target = tmp_path / "peft"
    with pytest.raises(MisconfigurationException, match=r"diverged: NaN or infinity in net\.0\.lora\.A"):
        trainer(LoRACallback(rank=4, export_dir=str(target))).fit(Diverges(), loader())
    assert not target.exists()


def test_unexportable_adapter_is_refused_before_training(tmp_path: Path) -> None:
    class Recurrent(Toy):
        def build(self) -> None:
            super().build()
            self.lstm = nn.LSTM(8, 8)

    module = Recurrent()
    callback = LoRACallback(rank=4, target_modules=["lstm"], export_dir=str(tmp_path / "peft"))
    with pytest.raises(MisconfigurationException, match=r"(?s)nothing could be exported after training.*lstm"):
        trainer(callback).fit(module, loader())
    assert not module.losses


def test_failed_fit_exports_nothing(tmp_path: Path) -> None:
    class Fails(Toy):
        def training_step(self, *args: Any) -> torch.Tensor:
            raise KeyError("boom")

    with pytest.raises(KeyError, match="boom"):
        trainer(LoRACallback(rank=4, export_dir=str(tmp_path / "peft"))).fit(Fails(), loader())
    assert not (tmp_path / "peft").exists()


def test_init_from_is_read_only_without_ckpt_path(tmp_path: Path) -> None:
    _, _, path = fitted(tmp_path / "earlier")
    run = trainer(LoRACallback(rank=4, init_from=str(tmp_path / "missing")), max_steps=0)
    run.fit(Toy(), loader(), ckpt_path=path)
    with pytest.raises((ValueError, FileNotFoundError), match="missing"):
        run.fit(Toy(), loader())


def test_meta_module_does_not_start_from_an_adapter(source: tuple[Toy, str]) -> None:
    module = fresh().to("meta")
    with pytest.raises(ValueError, match=r"net\.0\.lora\.A.* on the meta device.*Nothing was changed"):
        start_from(module, source[1])


class Centers(Toy):
    """Takes the mean of its data in ``setup``, and computes with it."""

    mean = 0.0

    def build(self) -> None:
        super().build()
        self.register_buffer("center", torch.zeros(()))

    def setup(self, stage: str) -> None:
        self.center.fill_(self.mean)

    def loss(self, batch: list[Tensor]) -> Tensor:
        x, y = batch
        return super().loss([x - self.center, y])


@pytest.mark.parametrize("name", [None, "second"])
def test_what_setup_has_set_in_this_run_stays(name: str | None, tmp_path: Path):
    first, second = Centers(), Centers()
    first.mean, second.mean = 100.0, 50.0
    run = trainer(LoRACallback(rank=2))
    run.fit(first, loader())
    run.save_checkpoint(tmp_path / "first.ckpt")
    trainer(LoRACallback(rank=2, adapter=name, init_from=tmp_path / "first.ckpt")).fit(second, loader())
    assert second.center == 50
    assert not torch.equal(adapter_state_dict(second)["net.0.lora.B"], adapter_state_dict(first)["net.0.lora.B"])
