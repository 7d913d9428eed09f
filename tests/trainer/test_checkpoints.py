"""Checkpoints: what is in the file, whichever way Lightning saves, and what is refused when it is loaded."""

from __future__ import annotations

import copy
import os
import re
import time
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint, OnExceptionCheckpoint
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torchmetrics import MeanMetric

from lightning_lora import (
    LoRACallback,
    LoRAConfig,
    adapter_state_dict,
    attach,
    detach,
    load_adapter,
    load_adapter_state_dict,
    lora_layers,
    merge,
    save_adapter,
)
from lightning_lora.storage.checkpoint import RECORD_KEY
from lightning_lora.trainer.warm_start import start_from
from tests.contract import raises_and_changes_nothing
from tests.files import run
from tests.toys import FEATURES, BuiltInConfigureModel, Toy, digest, loader, network, snapshot, trainer

ADAPTER = {f"net.{layer}.lora.{factor}" for layer in (0, 2, 4) for factor in "AB"}


def read(path: Any) -> dict[str, Any]:
    return torch.load(path, map_location="cpu", weights_only=True)


def fitted(directory: Path, module: Toy | None = None, *, epochs: int = 2, **lora: Any) -> tuple[Trainer, Toy, str]:
    """Train a little and return the last checkpoint."""
    module = Toy() if module is None else module
    checkpoint = ModelCheckpoint(directory, save_last=True)
    run = trainer(LoRACallback(**({"rank": 4} | lora)), checkpoint, max_epochs=epochs, max_steps=-1, root=directory)
    run.fit(module, loader())
    return run, module, checkpoint.last_model_path


# --- saving


@pytest.mark.parametrize("weights_only", [False, True])
def test_model_checkpoint_saves_only_adapter(weights_only: bool, tmp_path: Path) -> None:
    checkpoint = ModelCheckpoint(
        tmp_path, monitor="val_loss", save_top_k=2, save_last=True, save_weights_only=weights_only
    )
    run = trainer(LoRACallback(rank=4), checkpoint, max_epochs=3, max_steps=-1, limit_val_batches=1)
    run.fit(Toy(), loader(), loader())
    files = list(tmp_path.glob("*.ckpt"))
    assert len(files) == 3  # two best, one last
    for file in files:
        saved = read(file)
        assert set(saved["state_dict"]) == ADAPTER
        assert RECORD_KEY in saved
        assert ("optimizer_states" in saved) is not weights_only


def test_save_checkpoint_saves_only_adapter(tmp_path: Path) -> None:
    class Saves(Callback):
        def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
            trainer.save_checkpoint(tmp_path / "during.ckpt")

    run = trainer(LoRACallback(rank=4), Saves())
    run.fit(Toy(), loader())
    run.save_checkpoint(tmp_path / "after.ckpt")
    run.save_checkpoint(tmp_path / "weights.ckpt", weights_only=True)
    for name in ("during", "after", "weights"):
        assert set(read(tmp_path / f"{name}.ckpt")["state_dict"]) == ADAPTER


@pytest.mark.filterwarnings("ignore:.*was called without a model.*", "ignore:.*no last checkpoint available.*")
def test_exception_checkpoint_saves_only_adapter(tmp_path: Path) -> None:
    class Fails(Callback):
        def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
            if trainer.global_step == 2:
                raise RuntimeError("boom")

    run = trainer(LoRACallback(rank=4), OnExceptionCheckpoint(tmp_path), Fails(), max_steps=4)
    with pytest.raises(RuntimeError, match="boom"):
        run.fit(Toy(), loader())
    assert set(read(tmp_path / "on_exception.ckpt")["state_dict"]) == ADAPTER


def test_checkpoint_holds_exactly_trained_tensors(tmp_path: Path) -> None:
    class Headed(Toy):
        def build(self) -> None:
            super().build()
            self.lora_head = nn.Linear(FEATURES, FEATURES)  # a name that looks like an adapter's, and is none
            self.head = nn.Sequential(nn.BatchNorm1d(FEATURES), nn.Linear(FEATURES, FEATURES))

        def loss(self, batch: list[Tensor]) -> Tensor:
            x, y = batch
            return ((self.head(self.lora_head(self.net(x))) - y) ** 2).mean()

    run, module, path = fitted(tmp_path, Headed(), exclude_modules=["lora_head"], modules_to_save=["head"])
    state = read(path)["state_dict"]
    trained = {name: p for name, p in module.named_parameters() if p.requires_grad}
    statistics = {f"head.0.{name}" for name in ("running_mean", "running_var", "num_batches_tracked")}
    assert set(state) == set(trained) | statistics
    saved_bytes = sum(state[name].nbytes for name in trained)
    assert saved_bytes == sum(p.nbytes for p in trained.values())
    del run


def test_tracked_statistics_are_saved(tmp_path: Path) -> None:
    class Normed(Toy):
        def build(self) -> None:
            self.net = nn.Sequential(*network()[:1], nn.BatchNorm1d(16), *network()[1:])

    _, module, path = fitted(tmp_path, Normed(), frozen_norm="track")
    fresh = Normed()
    trainer(LoRACallback(rank=4, frozen_norm="track")).test(fresh, loader(), ckpt_path=path, verbose=False)
    x = torch.randn(4, FEATURES)
    assert torch.equal(fresh.net.eval()(x), module.net.eval()(x))


def test_persistent_metric_states_are_saved(tmp_path: Path) -> None:
    class Counts(Toy):
        def build(self) -> None:
            super().build()
            self.metric = MeanMetric()
            self.metric.persistent(True)

        def loss(self, batch: list[Tensor]) -> Tensor:
            loss = super().loss(batch)
            self.metric.update(loss.detach())
            return loss

    _, _, path = fitted(tmp_path, Counts())
    state = read(path)["state_dict"]
    fresh = Counts()
    assert set(state) == ADAPTER | {f"metric.{name}" for name in fresh.metric.state_dict()}
    trainer(LoRACallback(rank=4), max_epochs=3, max_steps=-1).fit(fresh, loader(), ckpt_path=path)
    assert float(fresh.metric.weight) > float(state["metric.weight"]) > 0


class Centered(Toy):
    """Keeps a running mean and a growing queue by itself, as in self-supervised learning; other buffers stay."""

    def build(self) -> None:
        super().build()
        self.register_buffer("center", torch.zeros(FEATURES))
        self.register_buffer("queue", torch.zeros(1, FEATURES))
        self.register_buffer("constant", torch.ones(3))
        self.register_buffer("fleeting", torch.zeros(()), persistent=False)
        self.net[2].register_buffer("calls", torch.tensor(0))

    def loss(self, batch: list[Tensor]) -> Tensor:
        x, y = batch
        output = self.net(x)
        self.center.mul_(0.5).add_(output.detach().mean(0))
        self.queue = torch.cat([self.queue, output.detach()[:1]])
        self.fleeting += 1
        self.net[2].calls += 1
        return ((output - self.center + self.queue.mean(0) - y) ** 2).mean()


def kept(module: Centered) -> dict[str, str]:
    return {name: bits for name, bits in digest(module).items() if name != "fleeting"}


MOVED = {"center", "queue", "net.2.calls"}


def test_buffers_that_the_module_changes_itself_resume_bit_for_bit(tmp_path: Path) -> None:
    _, whole, _ = fitted(tmp_path / "whole", Centered(), epochs=4)
    _, _, path = fitted(tmp_path / "half", Centered(), epochs=2)
    assert set(read(path)[RECORD_KEY]["buffers"]) == MOVED
    resumed = Centered()
    checkpoint = ModelCheckpoint(tmp_path, save_last=True)
    trainer(LoRACallback(rank=4), checkpoint, max_epochs=4, max_steps=-1).fit(resumed, loader(), ckpt_path=path)
    assert resumed.losses == whole.losses[len(whole.losses) // 2 :]
    assert kept(resumed) == kept(whole)
    again = Centered()  # the file of a resumed run holds them, too
    load_adapter(again, checkpoint.last_model_path)
    assert kept(again) == kept(whole)


@pytest.mark.filterwarnings("always:Training has changed buffers")  # the command prints it
def test_saving_without_the_buffers_that_training_changed_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, module, path = fitted(tmp_path, Centered())
    load_adapter(again := Centered(), path)
    inside = "buffers of the base, for which PEFT has no place: center, net.2.calls, queue. "
    for each in (module, again):
        with pytest.warns(UserWarning, match=re.escape(inside)):
            save_adapter(each, tmp_path / "adapter", overwrite=True)
    assert run("export", path, tmp_path / "exported") == 0
    assert inside in capsys.readouterr().err


def test_merging_on_disk_writes_the_buffers_that_training_changed(tmp_path: Path) -> None:
    _, _, path = fitted(tmp_path, Centered())
    save_file(dict(Centered().state_dict()), tmp_path / "base.safetensors")
    assert run("merge", path, tmp_path / "base.safetensors", tmp_path / "whole") == 0
    load_adapter(expected := Centered(), path)
    merge(expected)
    found, state = load_file(tmp_path / "whole" / "model.safetensors"), expected.state_dict()
    assert {name for name in state if not torch.equal(found[name], state[name])} == {"queue"}  # it has grown


class Remembers(Toy):
    """A head that keeps what it has seen, as a Gaussian process keeps the inputs that it predicts from."""

    def build(self) -> None:
        super().build()
        head = self.net[4]
        head.register_buffer("inputs", torch.zeros(0, FEATURES))
        head.register_buffer("targets", None)

    def loss(self, batch: list[Tensor]) -> Tensor:
        x, y = batch
        head = self.net[4]
        head.inputs, head.targets = x.clone(), y.clone()
        return ((self.net(x) - y) ** 2).mean() + head.inputs.mean()


@pytest.mark.parametrize("way", ["load_adapter", "resume", "init_from"])
def test_buffers_of_a_head_in_full_may_have_grown(way: str, tmp_path: Path) -> None:
    options = {"rank": 4, "target_modules": ["net.0", "net.2"], "modules_to_save": ["net.4"]}
    whole, again, saved = Remembers(), Remembers(), ModelCheckpoint(tmp_path, filename="saved")
    trainer(LoRACallback(**options), saved, max_epochs=1, max_steps=-1).fit(whole, loader())
    before = digest(whole)
    if way == "load_adapter":
        load_adapter(again, saved.best_model_path)
    elif way == "resume":
        trainer(LoRACallback(), max_epochs=1, max_steps=-1).fit(again, loader(), ckpt_path=saved.best_model_path)
    else:
        attach(again, LoRAConfig(**options))
        start_from(again, saved.best_model_path)
    assert digest(again) == before
    assert again.net[4].inputs.shape == again.net[4].targets.shape


def test_parameters_and_statistics_of_other_shapes_are_refused_beside_buffers_that_have_grown() -> None:
    module = Remembers()
    module.net[4].register_module("norm", nn.BatchNorm1d(3, affine=False))
    attach(module, LoRAConfig(rank=2, target_modules=["net.0"], modules_to_save=["net.4"]))
    state = adapter_state_dict(module) | {"net.4.inputs": torch.ones(5, FEATURES), "net.4.targets": torch.ones(5)}
    load_adapter_state_dict(module, state)
    assert torch.equal(module.net[4].inputs, state["net.4.inputs"])
    before = digest(module)
    for name in ("net.4.norm.running_mean", "net.4.weight"):
        with pytest.raises(ValueError, match=re.escape(f"shape mismatch: {name}")):
            load_adapter_state_dict(module, state | {name: torch.ones(7), "net.4.inputs": torch.ones(9, FEATURES)})
    assert digest(module) == before


def test_fresh_fit_starts_with_the_first_buffers_of_a_head_in_full() -> None:
    module, shapes = Remembers(), []
    module.on_fit_start = lambda: shapes.append(module.net[4].inputs.shape)
    for _ in range(2):
        trainer(LoRACallback(rank=2, target_modules=["net.0"], modules_to_save=["net.4"], fresh=True)).fit(
            module, loader()
        )
    assert shapes == [(0, FEATURES)] * 2


def test_second_fit_still_saves_buffers_that_the_first_one_changed(tmp_path: Path) -> None:
    _, module, _ = fitted(tmp_path, Centered())
    module.loss = partial(Toy.loss, module)  # changes none
    _, _, path = fitted(tmp_path / "second", module)
    assert set(read(path)[RECORD_KEY]["buffers"]) == MOVED


def test_fresh_fit_starts_from_the_first_buffers() -> None:
    module, new = Centered(), Centered()
    for _ in range(2):
        module.losses.clear()
        trainer(LoRACallback(rank=4, fresh=True)).fit(module, loader())
    trainer(LoRACallback(rank=4, fresh=True)).fit(new, loader())
    assert module.losses == new.losses
    assert kept(module) == kept(new)


class Standardized(Centered):
    """Takes the mean of its inputs from the data before training begins, and changes no buffer in training."""

    def standardize(self, stage: str = "") -> None:
        self.center.copy_(loader().dataset[:][0].mean(0))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x - self.center)

    def loss(self, batch: list[Tensor]) -> Tensor:
        x, y = batch
        return ((self(x) - y) ** 2).mean()


@pytest.mark.parametrize(
    ("hook", "fits", "others"),
    [
        ("setup", 1, []),
        ("setup", 2, []),
        ("setup", 1, [EMAWeightAveraging()]),  # its copies are made in its own setup, which comes before the module's
        ("on_fit_start", 1, []),
        ("on_train_start", 1, []),
    ],
)
def test_buffers_that_hooks_set_before_training_come_back_from_the_file(
    tmp_path: Path, hook: str, fits: int, others: list[Callback]
) -> None:
    module = type("Standardizes", (Standardized,), {hook: Standardized.standardize})()
    for _ in range(fits):
        (run := trainer(LoRACallback(rank=4, fresh=True), *others)).fit(module, loader())
    run.save_checkpoint(path := tmp_path / "adapter.ckpt")
    assert module.center.any()
    load_adapter(loaded := Standardized(), path)
    trainer(LoRACallback()).validate(tested := Standardized(), loader(), ckpt_path=path, weights_only=False)
    x = torch.ones(2, FEATURES)
    for each in (loaded, tested):
        assert torch.equal(each(x), module(x))


def test_resuming_without_what_trained_in_full_names_it(tmp_path: Path) -> None:
    *_, path = fitted(tmp_path, modules_to_save=["net.4"])
    run_again = trainer(LoRACallback(rank=4, exclude_modules=["net.4"]), max_epochs=3, max_steps=-1)
    with pytest.raises(ValueError, match=r"modules_to_save.*: net\.4\.weight, net\.4\.bias trained there, frozen here"):
        run_again.fit(Toy(), loader(), ckpt_path=path)


@pytest.mark.parametrize("options", [{"modules_to_save": ["net.4"]}, {"bias": "lora_only"}], ids=["head", "biases"])
@pytest.mark.parametrize("stage", ["validate", "test", "fit"])
def test_a_file_that_trained_more_in_full_than_the_adapter_here_changes_nothing(
    stage: str, options: dict[str, Any], tmp_path: Path
) -> None:
    layers = {"rank": 4, "target_modules": ["net.0", "net.2"]}
    *_, plain = fitted(tmp_path / "plain", **layers)
    *_, more = fitted(tmp_path / "more", **layers, **options)
    module = Toy()
    trainer(LoRACallback()).validate(module, loader(), ckpt_path=plain, verbose=False)
    with raises_and_changes_nothing(module, ValueError, r"trained there, frozen here\n.*call detach\(module\) first"):
        getattr(trainer(LoRACallback()), stage)(module, loader(), ckpt_path=more)
    detach(module)
    trainer(LoRACallback()).validate(module, loader(), ckpt_path=more, verbose=False)
    load_adapter(loaded := Toy(), more)
    assert_same_bits(adapter_state_dict(module), adapter_state_dict(loaded))


@pytest.mark.parametrize("is_saved", [True, False])
def test_saving_names_once_what_code_of_the_module_has_moved_in_the_base(
    is_saved: bool, tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    class WithMean(Toy):
        def build(self) -> None:
            super().build()
            self.teacher = nn.Linear(8, 8)
            self.register_buffer("count", torch.zeros(1))

        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            self.count += 1  # a buffer is saved, so it is none of these
            with torch.no_grad():
                self.teacher.weight.lerp_(self.net[0].weight[:8], 0.1)
            return super().training_step(batch, batch_idx) + 0 * self.teacher(batch[0]).mean()

    warnings.simplefilter("always")
    fitted(tmp_path, WithMean(), **{"modules_to_save" if is_saved else "exclude_modules": ["teacher"]})
    found = [str(each.message) for each in recwarn if "has changed the base" in str(each.message)]
    assert len(found) == (0 if is_saved else 1)
    assert all("training began: teacher.weight. Checkpoints hold" in each for each in found)


def test_student_trained_beside_an_excluded_teacher_loads_without_it(tmp_path: Path) -> None:
    class Distilled(Toy):
        def build(self) -> None:
            super().build()
            self.teacher = network()

    for excluded in (["teacher"], r"teacher.*"):
        module = Distilled()
        (run := trainer(LoRACallback(rank=4, exclude_modules=excluded))).fit(module, loader())
        run.save_checkpoint(path := tmp_path / "adapter.ckpt")
        load_adapter(student := Toy(), path, check_base=False)
        x = torch.ones(2, FEATURES)
        assert torch.equal(student.net(x), module.net(x))


def test_file_of_an_adapted_module_that_was_fitted_without_the_callback_is_told_apart(tmp_path: Path) -> None:
    _, module, _ = fitted(tmp_path)
    (run := trainer()).fit(module, loader())
    run.save_checkpoint(path := tmp_path / "whole.ckpt")
    with pytest.raises(ValueError, match="holds the weights of an adapter, but not its options"):
        load_adapter(Toy(), path)
    attach(loaded := Toy(), LoRAConfig(rank=4))
    loaded.load_state_dict(torch.load(path, weights_only=True)["state_dict"])
    x = torch.ones(2, FEATURES)
    assert torch.equal(loaded.net(x), module.net(x))


def test_loading_without_buffers_that_were_set_before_the_fit_warns_of_them(tmp_path: Path) -> None:
    module = Standardized()
    module.standardize()
    (run := trainer(LoRACallback(rank=4))).fit(module, loader())
    run.save_checkpoint(path := tmp_path / "adapter.ckpt")
    with pytest.warns(UserWarning, match="other values in the buffers center of this Standardized"):
        load_adapter(Standardized(), path)
    (right := Standardized()).standardize()
    load_adapter(right, path)
    assert torch.equal(right(x := torch.ones(2, FEATURES)), module(x))
    with pytest.warns(UserWarning, match="other values in the buffers center"):
        trainer(LoRACallback()).validate(Standardized(), loader(), ckpt_path=path, weights_only=False)


def test_running_statistics_that_a_forward_pass_before_the_fit_moved_are_found_at_loading(tmp_path: Path) -> None:
    class Normed(Toy):
        def build(self) -> None:
            self.net = nn.Sequential(nn.Linear(FEATURES, 16), nn.BatchNorm1d(16), nn.Linear(16, FEATURES))

    module = copy.deepcopy(base := Normed())
    module.net(torch.ones(2, FEATURES))  # a look at the shape, in training mode
    _, _, path = fitted(tmp_path, module)
    with pytest.warns(UserWarning, match=r"net\.1\.running_mean.*every forward pass in training mode: call eval\(\)"):
        load_adapter(base, path)


def test_statistics_of_norms_in_weights_that_setup_loads_belong_to_the_base(tmp_path: Path) -> None:
    class Pretrained(Toy):
        def build(self) -> None:
            self.net = nn.Sequential(nn.Linear(FEATURES, 16), nn.BatchNorm1d(16), nn.Linear(16, FEATURES))

        def setup(self, stage: str) -> None:
            self.net[1].running_mean.fill_(2.0)

    _, _, path = fitted(tmp_path, Pretrained())
    assert "buffers" not in read(path)[RECORD_KEY]


def test_unchanged_buffers_are_not_saved_even_if_written_to(tmp_path: Path) -> None:
    class Rewrites(Centered):
        def loss(self, batch: list[Tensor]) -> Tensor:
            self.constant.copy_(self.constant.clone())  # as DDP does at every step
            return Toy.loss(self, batch)

    _, _, path = fitted(tmp_path, Rewrites())
    assert "buffers" not in read(path)[RECORD_KEY]


def test_file_size_follows_adapter_not_base(tmp_path: Path) -> None:
    class Large(Toy):
        def build(self) -> None:
            self.net = nn.Sequential(nn.Linear(FEATURES, 1024), nn.Linear(1024, 1024), nn.Linear(1024, FEATURES))

    _, module, path = fitted(tmp_path, Large(), target_modules=["net.1"])
    base_bytes = sum(p.nbytes for p in network().parameters()) + sum(p.nbytes for p in module.parameters())
    assert Path(path).stat().st_size < 0.05 * base_bytes  # moments and trainer state included


def test_strategy_saves_whole_model_after_detach(tmp_path: Path) -> None:
    run, module, _ = fitted(tmp_path)
    detach(module)
    run.save_checkpoint(tmp_path / "base.ckpt")
    saved = read(tmp_path / "base.ckpt")
    assert set(saved["state_dict"]) == set(module.state_dict())
    assert RECORD_KEY not in saved


# --- loading


def test_evaluation_needs_only_callback_and_file(tmp_path: Path) -> None:
    run, module, path = fitted(tmp_path)
    [expected] = run.test(module, loader(), verbose=False)
    for kind in (Toy, BuiltInConfigureModel):
        fresh = kind()
        [metrics] = trainer(LoRACallback(rank=4)).test(fresh, loader(), ckpt_path=path, verbose=False)
        assert metrics == expected


@pytest.mark.parametrize("word", ["best", "last"])
def test_best_and_last_load(word: str, tmp_path: Path) -> None:
    run, module, _ = fitted(tmp_path)
    trained = snapshot(module)
    with torch.no_grad():
        for layer in lora_layers(module).values():
            layer.lora.B.zero_()
    run.test(module, loader(), ckpt_path=word, verbose=False)
    assert all(torch.equal(value, trained[name]) for name, value in module.state_dict().items())


def edited(path: str, edit: Any) -> str:
    checkpoint = read(path)
    edit(checkpoint)
    target = str(Path(path).with_name("edited.ckpt"))
    torch.save(checkpoint, target)
    return target


def refused(path: str, match: str, module: Toy | None = None, stage: str = "test", **lora: Any) -> None:
    """Loading raises one error that says so, and leaves the module as it was."""
    module = Toy() if module is None else module
    run = trainer(LoRACallback(**({"rank": 4} | lora)), max_steps=20)
    with raises_and_changes_nothing(module.net, ValueError, match) as error:
        getattr(run, stage)(module, loader(), ckpt_path=path)
    assert "nothing was changed" in str(error.value).lower()


@pytest.mark.parametrize("stage", ["test", "fit"])
@pytest.mark.parametrize(
    ("lora", "match"),
    [
        ({"rank": 2}, "rank: net.0: checkpoint 4, here 2"),
        ({"alpha": 8.0}, r"alpha or use_rslora \(scaling\): net.0: checkpoint 8, here 2"),
        ({"target_modules": ["net.0"]}, "target_modules: 3 layers adapted in the checkpoint, 1 here.*net.2, net.4"),
        ({"modules_to_save": ["net.4"]}, "missing from the state: net.4.weight, net.4.bias"),
    ],
)
def test_other_config_is_refused(lora: Any, match: str, stage: str, tmp_path: Path) -> None:
    _, _, path = fitted(tmp_path)
    refused(path, match, stage=stage, **lora)


def test_missing_or_unknown_key_is_refused(tmp_path: Path) -> None:
    _, _, path = fitted(tmp_path)

    def drop(checkpoint: dict[str, Any]) -> None:
        del checkpoint["state_dict"]["net.2.lora.B"]

    refused(edited(path, drop), r"missing from the state: net\.2\.lora\.B")

    def add(checkpoint: dict[str, Any]) -> None:
        checkpoint["state_dict"]["net.7.lora.B"] = torch.zeros(1)

    refused(edited(path, add), r"unknown to the model: net\.7\.lora\.B \(closest: 'net\.\d\.lora\.B'\)")


@pytest.mark.parametrize("stage", ["validate", "test", "predict", "fit"])
@pytest.mark.parametrize(("name", "value"), [("net.2.lora.B", torch.inf), ("net.4.bias", torch.nan)])
def test_a_checkpoint_of_a_diverged_run_is_refused(name: str, value: float, stage: str, tmp_path: Path) -> None:
    _, _, path = fitted(tmp_path, modules_to_save=["net.4"])

    def diverge(checkpoint: dict[str, Any]) -> None:
        checkpoint["state_dict"][name][0] = value

    refused(edited(path, diverge), f"NaN or infinity in {name}.*diverged", stage=stage, modules_to_save=["net.4"])


def test_strict_loading_false_allows_only_unknown_keys(tmp_path: Path) -> None:
    _, trained, path = fitted(tmp_path)

    def add(checkpoint: dict[str, Any]) -> None:
        checkpoint["state_dict"]["old.weight"] = torch.zeros(1)

    module = Toy()
    module.strict_loading = False
    trainer(LoRACallback(rank=4)).test(module, loader(), ckpt_path=edited(path, add), verbose=False)
    assert all(torch.equal(value, trained.state_dict()[name]) for name, value in module.state_dict().items())
    assert module.strict_loading is False

    def drop(checkpoint: dict[str, Any]) -> None:
        del checkpoint["state_dict"]["net.2.lora.B"]

    module = Toy()
    module.strict_loading = False
    refused(edited(path, drop), "missing from the state", module)


def test_base_keys_are_allowed(tmp_path: Path) -> None:
    _, trained, path = fitted(tmp_path)

    def add_base(checkpoint: dict[str, Any]) -> None:
        checkpoint["state_dict"] = {**trained.state_dict()}
        del checkpoint[RECORD_KEY]

    module = Toy()
    trainer(LoRACallback(rank=4)).test(module, loader(), ckpt_path=edited(path, add_base), verbose=False)
    assert digest(module) == digest(trained)


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", None])
@pytest.mark.parametrize("stage", ["test", "fit"])
def test_unreadable_file_is_refused(content: bytes | None, stage: str, tmp_path: Path) -> None:
    _, _, path = fitted(tmp_path)
    broken = tmp_path / "broken.ckpt"
    broken.write_bytes(Path(path).read_bytes()[:-2000] if content is None else content)
    refused(str(broken), "cannot be read as a Lightning checkpoint", stage=stage)


def test_file_without_state_dict_is_refused(tmp_path: Path) -> None:
    torch.save(torch.zeros(3), tmp_path / "tensor.pt")
    refused(str(tmp_path / "tensor.pt"), "not a Lightning checkpoint: it has no 'state_dict'")


def test_full_checkpoint_becomes_base(tmp_path: Path) -> None:
    class Before(Toy):
        def build(self) -> None:
            self.net = network()

    full = Before()
    checkpoint = ModelCheckpoint(tmp_path / "full", save_last=True)
    trainer(checkpoint, max_epochs=3, max_steps=-1).fit(full, loader())
    path = checkpoint.last_model_path

    module = Toy()
    with pytest.warns(UserWarning, match="bare base model"):
        trainer(LoRACallback(rank=4)).test(module, loader(), ckpt_path=path, verbose=False)
    detach(module)
    assert digest(module.net) == digest(full.net)

    adapted = Toy()
    run = trainer(LoRACallback(rank=4), max_epochs=2, max_steps=-1)
    run.fit(adapted, loader(), ckpt_path=path)
    assert run.global_step == 8  # training started anew instead of continuing the full run's
    assert all(layer.lora.B.any() for layer in lora_layers(adapted).values())
    detach(adapted)
    assert digest(adapted.net) == digest(full.net)


class Reads(Toy):
    """Reads tokens."""

    def build(self) -> None:
        with torch.random.fork_rng():
            torch.manual_seed(5)
            self.embed = nn.Embedding(20, FEATURES)
            self.net = network()

    def loss(self, batch: list[Any]) -> Any:
        tokens = (10 * batch[0]).long().abs() % 20
        return ((self.net(self.embed(tokens)).mean(1) - batch[1]) ** 2).mean()


@pytest.mark.filterwarnings("ignore:These adapters are not smaller")
@pytest.mark.parametrize(
    "options", [{"use_dora": True}, {"bias": "all"}, {"trainable_token_indices": {"embed": [3, 7]}}], ids=str
)
def test_base_dependent_tensors_start_from_loaded_base(options: dict[str, Any], tmp_path: Path) -> None:
    full = Reads()
    with torch.no_grad():
        for parameter in full.parameters():
            parameter.mul_(1.5)
    run = trainer(max_steps=1)
    run.fit(full, loader())
    run.save_checkpoint(tmp_path / "full.ckpt")
    expected = full.loss(next(iter(loader()))).item()

    module = Reads()
    trainer(LoRACallback(rank=2, **options), max_steps=1).fit(module, loader(), ckpt_path=tmp_path / "full.ckpt")
    assert module.losses == [pytest.approx(expected, rel=1e-6)]
    assert digest(module) != digest(full)
    detach(module)
    assert digest(module) == digest(full)


@pytest.mark.parametrize("strict", [True, False])
def test_checkpoint_of_other_model_is_refused_as_base(strict: bool, tmp_path: Path) -> None:
    class Other(Toy):
        def build(self) -> None:
            self.other = network()

        def loss(self, batch: list[Any]) -> Any:
            return self.other(batch[0]).mean()

    run = trainer()
    run.fit(Other(), loader())
    run.save_checkpoint(tmp_path / "other.ckpt")
    module = Toy()
    module.strict_loading = strict
    refused(str(tmp_path / "other.ckpt"), "they share no name", module)


def test_sharded_checkpoint_is_refused_with_remedy(tmp_path: Path) -> None:
    refused(str(tmp_path), "is a directory: a sharded checkpoint of a whole model.*convert it to one file")


def test_base_of_other_shape_is_refused(tmp_path: Path) -> None:
    class Wider(Toy):
        def build(self) -> None:
            self.net = nn.Sequential(nn.Linear(FEATURES, 24), nn.Tanh(), nn.Linear(24, FEATURES))

    checkpoint = ModelCheckpoint(tmp_path, save_last=True)
    trainer(checkpoint).fit(Wider(), loader())
    refused(checkpoint.last_model_path, r"as a base it does not fit Toy.*\n.*missing from the state: net\.4")


# --- resuming


class Scheduled(Toy):
    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=1e-2, weight_decay=0.1)
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 16)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


@pytest.mark.parametrize("options", [{}, {"lr_ratio": 16.0, "modules_to_save": ["net.4"], "use_rslora": True}])
def test_resume_is_bit_exact(options: Any, tmp_path: Path) -> None:
    def run(name: str, epochs: int, ckpt_path: str | None = None) -> tuple[Scheduled, dict[str, Any], str]:
        module, checkpoint = Scheduled(), ModelCheckpoint(tmp_path / name, save_last=True)
        fitter = trainer(LoRACallback(rank=4, **options), checkpoint, max_epochs=epochs, max_steps=-1)
        fitter.fit(module, loader(16), ckpt_path=ckpt_path)  # two steps an epoch
        return module, read(checkpoint.last_model_path), checkpoint.last_model_path

    whole, at_end, _ = run("whole", 2)
    half, _, path = run("half", 1)
    resumed, resumed_at_end, _ = run("resumed", 2, path)
    assert half.losses + resumed.losses == whole.losses
    assert len(whole.losses) == at_end["global_step"] == 4
    for key in ("state_dict", "optimizer_states", "lr_schedulers", "global_step", RECORD_KEY):
        assert_same_bits(resumed_at_end[key], at_end[key])


def assert_same_bits(left: Any, right: Any) -> None:
    assert type(left) is type(right)
    if isinstance(left, Tensor):
        assert torch.equal(left, right)
    elif isinstance(left, dict):
        assert left.keys() == right.keys()
        for key in left:
            assert_same_bits(left[key], right[key])
    elif isinstance(left, (list, tuple)):
        assert len(left) == len(right)
        for one, other in zip(left, right, strict=True):
            assert_same_bits(one, other)
    else:
        assert left == right


def test_resume_with_any_parameter_order(tmp_path: Path) -> None:
    class Filters(Toy):
        def configure_optimizers(self) -> Any:
            return torch.optim.AdamW(filter(lambda p: p.requires_grad, self.parameters()), lr=1e-2, weight_decay=0.1)

    class Early(Toy):
        def build(self) -> None:
            super().build()
            self.optimizer = torch.optim.AdamW(self.parameters(), lr=1e-2, weight_decay=0.1)

        def configure_optimizers(self) -> Any:
            return self.optimizer

    _, whole, _ = fitted(tmp_path / "whole", epochs=3)
    _, _, path = fitted(tmp_path / "half", epochs=2)
    for kind in (Toy, Filters, Early):
        resumed = kind()
        trainer(LoRACallback(rank=4), max_epochs=3, max_steps=-1).fit(resumed, loader(), ckpt_path=path)
        assert resumed.losses == whole.losses[8:]


def test_moments_of_other_parameters_are_refused(tmp_path: Path) -> None:
    _, _, path = fitted(tmp_path)
    with pytest.raises(ValueError, match=r"groups of \[6\] in the checkpoint, groups of \[3, 3\] here"):
        trainer(LoRACallback(rank=4, lr_ratio=4.0), max_steps=20).fit(Toy(), loader(), ckpt_path=path)


@pytest.mark.parametrize(
    ("name", "age", "stays"),
    [(".old.ckpt.part", 7200, False), (".young.ckpt.part", 60, True), ("mine.ckpt.part", 7200, True)],
)
def test_parts_that_a_killed_run_left_are_removed_at_the_next_save(
    name: str, age: int, stays: bool, tmp_path: Path
) -> None:
    part = tmp_path / name
    part.write_text("half")
    before = time.time() - age
    os.utime(part, (before, before))
    _, _, path = fitted(tmp_path, rank=2)
    assert Path(path).is_file()
    assert part.exists() == stays


@pytest.mark.filterwarnings("ignore:Attribute 'head' is an instance of `nn.Module`")  # Lightning's advice
@pytest.mark.parametrize("stage", ["fit", "test"])
def test_file_with_modules_among_its_hyper_parameters_says_how_to_read_it(stage: str, tmp_path: Path) -> None:
    class Takes(Toy):
        def __init__(self, head: nn.Module) -> None:
            super().__init__()
            self.save_hyperparameters()

    _, trained, path = fitted(tmp_path, Takes(nn.Linear(2, 2)))
    said = (
        r"such as torch\.nn\.modules\.linear\.Linear, .*Nothing was changed.*trainer\.test\(\.\.\., weights_only=False"
    )
    module, again = Takes(nn.Linear(2, 2)), trainer(LoRACallback(), max_epochs=2, max_steps=-1)
    with pytest.raises(ValueError, match=said):
        getattr(again, stage)(module, loader(), ckpt_path=path)
    getattr(again, stage)(module, loader(), ckpt_path=path, weights_only=False)
    assert digest(module) == digest(trained)
