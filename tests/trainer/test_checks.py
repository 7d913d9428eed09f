"""Evidence that adapters train: gathered over the steps, judged at step 50 or at the end of a shorter fit."""

from __future__ import annotations

import copy
import logging
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lightning_lora import (
    LoRACallback,
    LoRAConfig,
    adapter_state_dict,
    attach,
    detach,
    lora_layers,
    merge,
    save_adapter,
)
from lightning_lora.storage.checkpoint import RECORD_KEY
from lightning_lora.trainer.checks import JUDGED_AT
from tests.toys import FEATURES, Spectral, Toy, loader, network, trainer
from tests.trainer.test_checkpoints import read

pytestmark = pytest.mark.filterwarnings("ignore:These adapters are not smaller.*")
ADAPTED = ["net.0", "net.2", "net.4"]


class ZeroHead(Toy):
    """Ends in a head of zeros, as torchvision's vision transformer does."""

    def build(self) -> None:
        super().build()
        self.head = nn.Linear(FEATURES, FEATURES)
        nn.init.zeros_(self.head.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.net(x))

    def loss(self, batch: list[Tensor]) -> Tensor:
        x, y = batch
        return ((self(x) - y) ** 2).mean()


class Pooled(Toy):
    """Has a pooler that the loss does not use."""

    def build(self) -> None:
        super().build()
        self.pooler = network()[0]


class ReadsWeight(Toy):
    """Computes with the weight of a layer that it never calls, by a way that no scan of its source shows."""

    def build(self) -> None:
        super().build()
        self.mixer = nn.Linear(FEATURES, FEATURES)

    def loss(self, batch: list[Tensor]) -> Tensor:
        x, y = batch
        return ((F.linear(self.net(x), weight_of(self)) - y) ** 2).mean()


def weight_of(module: nn.Module) -> Tensor:
    return getattr(module, "mix" + "er").weight


class LooksAtWeight(Pooled):
    """Asks for the type and shape of a weight that it does not compute with."""

    def loss(self, batch: list[Tensor]) -> Tensor:
        x, y = batch
        features = self.pooler.weight.shape[1] - self.pooler.weight.size(1)
        return super().loss([x.to(self.pooler.weight.device, self.pooler.weight.dtype) + features, y])


class Cut(Toy):
    """Runs its first layers in a way that cuts their gradients."""

    def build(self) -> None:
        super().build()
        self.head = nn.Linear(FEATURES, FEATURES)

    def loss(self, batch: list[Tensor]) -> Tensor:
        x, y = batch
        return ((self.head(self.features(x)) - y) ** 2).mean()

    def features(self, x: Tensor) -> Tensor:
        raise NotImplementedError


class NoGrad(Cut):
    def features(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            return self.net(x)


class Detached(Cut):
    def features(self, x: Tensor) -> Tensor:
        return self.net(x).detach()


class Reentrant(Cut):
    def features(self, x: Tensor) -> Tensor:
        return checkpoint(self.net, x, use_reentrant=True)


def warned(callback: LoRACallback, module: Toy, **options: Any) -> list[str]:
    """Return the warnings of a fit that are about gradients."""
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        trainer(callback, **options).fit(module, loader())
    return [str(each.message) for each in found if "No gradient reached" in str(each.message)]


def refused(callback: LoRACallback, module: Toy, **options: Any) -> str:
    with pytest.raises(MisconfigurationException) as error:
        warned(callback, module, **options)
    return str(error.value)


def moved(module: nn.Module) -> list[str]:
    return [name for name, layer in lora_layers(module).items() if bool(layer.lora.B.any())]


# --- a head of zeros


@pytest.mark.parametrize("options", [{}, {"modules_to_save": ["head"]}, {"modules_to_save": ["head"], "probe": True}])
def test_head_of_zeros_lets_every_adapter_train(options: dict[str, Any]) -> None:
    module = ZeroHead()
    [first] = warned(LoRACallback(rank=2, target_modules=[*ADAPTED, "*ead"], **options), module, max_steps=4)
    assert "adapters of net.0, net.2, net.4 in the first step" in first
    assert "exactly zero, as behind a weight of zero, and these are zero: head.weight." in first
    assert moved(module)[:3] == ADAPTED


def test_head_of_zeros_that_stays_frozen_is_named() -> None:
    message = refused(LoRACallback(rank=2, target_modules=["net.*"]), ZeroHead(), max_steps=4)
    assert "adapters of net.0, net.2, net.4 in 4 steps" in message
    assert "these are zero: head.weight. Train them (modules_to_save" in message


def test_probe_names_frozen_weights_of_zero() -> None:
    message = refused(LoRACallback(rank=2, target_modules=["net.*"], probe=True), ZeroHead())
    assert "Frozen weights of zero let nothing through: head.weight." in message


def test_probe_leaves_head_of_zeros_as_it_was() -> None:
    module = ZeroHead()
    attach(module, LoRAConfig(rank=2, modules_to_save=["head"]), probe=torch.ones(2, FEATURES))
    assert not module.head.weight.any()


# --- the verdict


def test_named_adapter_without_gradient_is_refused_before_export_and_merge(tmp_path: Path) -> None:
    module, target = Pooled(), tmp_path / "adapter"
    callback = LoRACallback(rank=2, target_modules=["net.*", "pooler"], merge_on_teardown=True, export_dir=str(target))
    message = refused(callback, module, max_steps=3)
    assert "No gradient reached the adapters of pooler in 3 steps, so they are untrained" in message
    assert "never called in the first batch. Use these layers, or leave them out with exclude_modules." in message
    assert "allow_untrained=['pooler']" in message
    assert list(lora_layers(module)) == [*ADAPTED, "pooler"]
    assert not target.exists()


@pytest.mark.parametrize("allowed", ["pooler", "pool*"])
def test_allowed_adapter_may_stay_untrained(allowed: str) -> None:
    callback = LoRACallback(rank=2, target_modules=["net.*", "pooler"], allow_untrained=[allowed])
    assert not warned(callback, Pooled(), max_steps=3)


def test_all_adapters_may_be_allowed_to_stay_untrained() -> None:
    callback = LoRACallback(rank=2, target_modules=["net.*"], modules_to_save=["head"], allow_untrained=["*"])
    assert not warned(callback, NoGrad(), max_steps=3)


def test_unknown_name_in_allow_untrained_is_refused() -> None:
    message = refused(LoRACallback(rank=2, allow_untrained=["net.3"]), Pooled())
    assert message.startswith("allow_untrained=['net.3'] matched no adapter. Closest names: net.")


@pytest.mark.parametrize("wrong", ["pooler", [1]])
def test_allow_untrained_takes_a_list_of_names(wrong: Any) -> None:
    with pytest.raises(TypeError, match=r"LoRACallback\.allow_untrained must be a list of names"):
        LoRACallback(allow_untrained=wrong)


def test_swept_adapter_without_gradient_is_warned_of_once_and_marked(tmp_path: Path) -> None:
    run = trainer(LoRACallback(rank=2), max_steps=3)
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        run.fit(Pooled(), loader())
    [verdict] = [str(each.message) for each in found if "adapters were trained" in str(each.message)]
    assert verdict.startswith("LoRA: 3 of 4 adapters were trained. No gradient reached those of pooler in 3 steps:")
    assert "never called in the first batch" in verdict
    run.save_checkpoint(tmp_path / "last.ckpt")
    assert read(tmp_path / "last.ckpt")[RECORD_KEY]["untrained"] == ["pooler"]


def test_long_fit_is_judged_at_step_50_and_the_warning_repeated_at_its_end(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        found = warned(LoRACallback(rank=2), Pooled(), max_steps=JUDGED_AT + 2, max_epochs=-1)
    assert ["in the first step" in text for text in found] == [True, False]
    assert "those of pooler in 50 steps" in found[1]
    assert "those of pooler in 52 steps" in caplog.text


def test_named_adapter_is_refused_at_step_50() -> None:
    module = Pooled()
    callback = LoRACallback(rank=2, target_modules=["net.*", "pooler"])
    assert "pooler in 50 steps" in refused(callback, module, max_steps=JUDGED_AT + 9, max_epochs=-1)
    assert len(module.losses) == JUDGED_AT


def test_gradient_at_a_later_step_counts() -> None:
    class Late(Pooled):
        def loss(self, batch: list[Tensor]) -> Tensor:
            x, y = batch
            x = self.pooler(x)[:, :FEATURES] if len(self.losses) == 5 else x
            return super().loss([x, y])

    callback = LoRACallback(rank=2, target_modules=["net.*", "pooler"])
    [first] = warned(callback, Late(), max_steps=8, max_epochs=-1)
    assert "in the first step" in first


def test_what_was_reached_before_resuming_counts(tmp_path: Path) -> None:
    class Early(Pooled):
        def loss(self, batch: list[Tensor]) -> Tensor:
            x, y = batch
            return super().loss([self.pooler(x)[:, :FEATURES] if self.trainer.global_step < 2 else x, y])

    callback = LoRACallback(rank=2, target_modules=["net.*", "pooler"])
    run = trainer(callback, max_steps=4)
    run.fit(Early(), loader())
    run.save_checkpoint(tmp_path / "four.ckpt")
    trainer(callback, max_steps=6, max_epochs=-1).fit(Early(), loader(), ckpt_path=tmp_path / "four.ckpt")


class StepsInBackward(Pooled):
    """Steps each parameter as soon as its gradient is there, and clears it, as is done to save memory."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def on_train_start(self) -> None:
        for parameter in self.parameters():
            if parameter.requires_grad:
                optimizer = torch.optim.SGD([parameter], lr=0.1)
                parameter.register_post_accumulate_grad_hook(partial(self.step, optimizer))

    def step(self, optimizer: torch.optim.Optimizer, parameter: Tensor) -> None:
        optimizer.step()
        optimizer.zero_grad()

    def training_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.manual_backward(self.loss(batch))

    def configure_optimizers(self) -> None: ...


@pytest.mark.filterwarnings(
    "ignore:No optimizer holds", "ignore:`LightningModule.configure_optimizers` returned `None`"
)
def test_steps_inside_of_backward_train() -> None:
    module = StepsInBackward()
    trainer(LoRACallback(rank=2, target_modules=["net.*"]), max_steps=-1, max_epochs=1).fit(module, loader())
    assert moved(module) == ["net.0", "net.2", "net.4"]
    unused = LoRACallback(rank=2, target_modules=["net.*", "pooler"])
    assert "reached the adapters of pooler" in refused(unused, StepsInBackward(), max_steps=-1, max_epochs=1)


class KeepsTensor(Toy):
    """Computes with a head's weight by a reference that it has kept from the beginning."""

    def build(self) -> None:
        super().build()
        self.head = nn.Linear(FEATURES, FEATURES, bias=False)
        self.kept = [self.head.weight]

    def loss(self, batch: list[Tensor]) -> Tensor:
        x, y = batch
        return ((F.linear(self.net(x), self.kept[0]) - y) ** 2).mean()


def test_what_should_train_in_full_and_does_not_change_is_named() -> None:
    options: dict[str, Any] = {"rank": 2, "target_modules": ["net.*"]}
    unused = LoRACallback(modules_to_save=["pooler"], **options)
    with pytest.warns(
        UserWarning, match=r"pooler\.weight, pooler\.bias should train in full, and did not change in 2 steps"
    ):
        trainer(unused).fit(Pooled(), loader())
    module = KeepsTensor()
    trainer(LoRACallback(adapter="one", modules_to_save=["head"], **options)).fit(module, loader())
    with pytest.warns(UserWarning, match=r"head\.weight should train in full.*read module\.weight each time"):
        trainer(LoRACallback(adapter="other", modules_to_save=["head"], **options)).fit(module, loader())


def test_weight_decay_alone_is_no_training() -> None:
    class Decays(Pooled):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch: list[Tensor], batch_idx: int) -> None:
            optimizer = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(self.loss(batch) + 0.0 * self.pooler(batch[0]).sum())
            optimizer.step()

    message = refused(LoRACallback(rank=2, target_modules=["net.*", "pooler"]), Decays())
    assert "reached the adapters of pooler" in message
    assert "the gradient is exactly zero" in message


def test_run_that_diverged_is_refused_with_the_batch() -> None:
    class Diverges(Toy):
        def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
            return super().training_step(batch, batch_idx) * (float("nan") if batch_idx == 2 else 1.0)

    message = refused(LoRACallback(rank=2), Diverges(), max_steps=4)
    assert message.startswith("Training diverged: NaN or infinity in net.0.lora.A, net.0.lora.B")
    assert "The loss was first not finite in batch 3 of this fit." in message


@pytest.mark.parametrize("part", ["real", "imag"])
def test_complex_statistics_that_diverged_are_named(part: str) -> None:
    class Diverges(Toy):
        def build(self) -> None:
            super().build()
            self.spectral = Spectral()

        def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
            getattr(self.spectral.spec.mean, part).fill_(torch.nan)
            return super().training_step(batch, batch_idx)

    callback = LoRACallback(rank=2, target_modules=["net.*"], modules_to_save=["spectral.spec"])
    assert refused(callback, Diverges(), max_steps=2).startswith(
        "Training diverged: NaN or infinity in spectral.spec.mean"
    )


# --- likely causes


def test_weight_read_past_its_layer_is_named_with_the_place() -> None:
    message = refused(LoRACallback(rank=2, target_modules=["net.*", "mixer"]), ReadsWeight())
    assert "never called in the first batch; the weight is read instead, by weight_of (test_checks.py:" in message
    assert 'return getattr(module, "mix" + "er").weight)' in message
    assert "target_parameters=['mixer.weight']" in message
    assert "checkpoint" not in message


def test_remedy_for_a_weight_read_past_its_layer_trains_it() -> None:
    module = ReadsWeight()
    assert not warned(LoRACallback(rank=2, target_modules=["net.*"], target_parameters=["mixer.weight"]), module)
    assert bool(module.mixer.lora.weight.B.any())


def test_looking_at_the_type_of_a_weight_is_not_reading_it() -> None:
    message = refused(LoRACallback(rank=2, target_modules=["net.*", "pooler"]), LooksAtWeight())
    assert "pooler: never called in the first batch. Use" in message


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@pytest.mark.parametrize(
    ("kind", "cause"),
    [
        (NoGrad, "called only without gradients (torch.no_grad or inference mode). Call them with gradients."),
        (Detached, "called, but the loss does not depend on the output: it is unused, detached or out of the graph."),
        (
            Reentrant,
            "called only inside reentrant activation checkpointing, none of whose inputs needs a gradient.",
        ),
    ],
)
def test_cut_gradients_are_told_apart(kind: type[Cut], cause: str) -> None:
    message = refused(LoRACallback(rank=2, target_modules=["net.*"], modules_to_save=["head"]), kind())
    assert f"net.0, net.2, net.4: {cause}" in message
    assert ("checkpointing" in message) == (kind is Reentrant)


class Averaged(Toy):
    """Keeps a copy of its network, which averages it and is called nowhere in training."""

    def build(self) -> None:
        super().build()
        self.average = copy.deepcopy(self.net)


def test_a_copy_that_trains_nothing_is_named_with_the_way_to_have_it_follow() -> None:
    warning, *_ = warned(LoRACallback(rank=2), Averaged())
    assert "average.0, average.2, average.4: never called" in warning
    assert (
        "These are copies: average.0 (of net.0), average.2 (of net.2), average.4 (of net.4). To follow, as" in warning
    )
    other = Averaged()
    with torch.no_grad():
        other.average[0].weight += 1.0
    warning, *_ = warned(LoRACallback(rank=2), other)
    assert "These are copies: average.2 (of net.2), average.4 (of net.4)." in warning


def test_adapters_that_an_earlier_freeze_has_frozen_are_told_apart() -> None:
    module, options = Toy(), {"rank": 2, "target_modules": ["net.0", "net.2"], "modules_to_save": ["net.4"]}
    trainer(LoRACallback(**options)).fit(module, loader())
    module.freeze()
    assert "net.0, net.2: frozen, as after freeze(). Call unfreeze()" in refused(LoRACallback(**options), module)
    module.unfreeze()
    trainer(LoRACallback(**options)).fit(module, loader())
    assert not module.net[0].weight.requires_grad


def test_watching_ends_with_the_first_batch() -> None:
    class Looks(Callback):
        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
            layer = pl_module.net[0]
            watched.append(bool(layer._forward_pre_hooks) or "weight" in vars(type(layer)))

    watched: list[bool] = []
    trainer(LoRACallback(rank=2), Looks(), max_steps=2).fit(Toy(), loader())
    assert watched == [True, False]


def test_compiled_models_are_not_watched() -> None:
    class Compiled(Pooled):
        def build(self) -> None:
            super().build()
            self.net.compile(backend="eager")

    message = refused(LoRACallback(rank=2, target_modules=["net.*", "pooler"]), Compiled())
    assert "calls are not watched in a compiled model" in message


# --- layers replaced or resized after attaching


class Replaces(Callback):
    """Puts a new layer in the place of an adapted one, after the check when fit begins."""

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        pl_module.net[2] = nn.Linear(16, 16).requires_grad_(False)


def test_layer_replaced_when_training_starts_is_refused_at_the_first_step() -> None:
    module = Toy()
    with pytest.raises(MisconfigurationException, match=r"Replaced after LoRA was attached.*: net\.2\. .*__init__"):
        trainer(LoRACallback(rank=2), Replaces()).fit(module, loader())
    assert not module.losses


def test_layer_replaced_while_training_is_refused_at_the_next_save(tmp_path: Path) -> None:
    class ReplacesLater(Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
            pl_module.net[2] = nn.Linear(16, 16).requires_grad_(False)

    saves = ModelCheckpoint(tmp_path, every_n_train_steps=1)
    with pytest.raises(RuntimeError, match=r"Replaced after LoRA was attached.*: net\.2\."):
        trainer(LoRACallback(rank=2), ReplacesLater(), saves, max_steps=3).fit(Toy(), loader())
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("use", [merge, adapter_state_dict, lambda module: save_adapter(module, "never written")])
@pytest.mark.parametrize("resizes", [False, True])
def test_changed_layers_are_refused_at_merge_and_export(use: Any, resizes: bool) -> None:
    module = Toy()
    attach(module, LoRAConfig(rank=2))
    if resizes:
        module.net[2].weight = nn.Parameter(torch.zeros(20, 16))
    else:
        module.net[2] = nn.Linear(16, 16)
    with pytest.raises(RuntimeError, match=rf"{'Resized' if resizes else 'Replaced'} after LoRA was attached.*net\.2"):
        use(module)


def test_detach_forgets_replaced_layers() -> None:
    module = Toy()
    attach(module, LoRAConfig(rank=2))
    module.net[2] = nn.Linear(16, 16)
    detach(module)
    attach(module, LoRAConfig(rank=2))
    assert len(adapter_state_dict(module)) == 2 * len(ADAPTED)


# --- norms that should move


@pytest.mark.parametrize("mode", [True, False])
def test_tracked_norms_in_eval_mode_give_a_warning(mode: bool, recwarn: pytest.WarningsRecorder) -> None:
    class Normed(Toy):
        def build(self) -> None:
            self.net = nn.Sequential(*network()[:1], nn.BatchNorm1d(16), *network()[1:])

    warnings.simplefilter("always")
    module = Normed().train(mode)
    trainer(LoRACallback(rank=4, frozen_norm="track")).fit(module, loader())
    said = any("moves no statistics of net.1, which are in eval mode" in str(each.message) for each in recwarn)
    assert said is not mode
    assert bool(module.net[1].num_batches_tracked) is mode


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.filterwarnings("ignore:Found .* module.* in eval mode")
def test_dropout_that_eval_mode_switches_off_is_named(mode: str, recwarn: pytest.WarningsRecorder) -> None:
    module = Toy()
    module.net[2].train(mode == "train")
    trainer(LoRACallback(rank=4, dropout=0.5)).fit(module, loader())
    layer, x = lora_layers(module)["net.2"], torch.ones(1, 16)
    drops = not torch.equal(layer(x), layer(x))
    said = any("dropout=0.5 drops nothing in the adapters of net.2, which" in str(each.message) for each in recwarn)
    assert drops == (not said) == (mode == "train")
