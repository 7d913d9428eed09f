"""LoRASweep: every adapter trains as it would in a fit of its own."""

from __future__ import annotations

import warnings
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule
from lightning.pytorch.callbacks import Callback, EarlyStopping, ModelCheckpoint, StochasticWeightAveraging
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchmetrics import MeanMetric

from lightning_lora import (
    LoRACallback,
    LoRASweep,
    active_adapter,
    adapter_names,
    adapter_state_dict,
    load_adapter,
    lora_layers,
    using,
)
from lightning_lora.sweep import training
from lightning_lora.sweep.candidates import Candidate
from lightning_lora.sweep.checks import check_possible
from tests.toys import FEATURES, BuiltInConfigureModel, BuiltInSetup, Toy, loader, network, trainer

pytestmark = [
    pytest.mark.filterwarnings("ignore:These adapters are not smaller"),  # toys are small
]

State = dict[str, Tensor]
MODES = ("loop", "vmap", "meet")
FOUR = {
    "a": {"lr": 1e-2, "rank": 2},
    "b": {"lr": 1e-3, "rank": 4, "seed": 3},
    "c": {"lr": 3e-2, "rank": 8, "weight_decay": 0.5},
    "d": {"lr_multiplier": 0.2, "rank": 3, "alpha": 9.0, "lr_ratio": 4.0},
}
STEPS = 20
EXACT, CLOSE = 0.0, 1e-6  # relative; the second for factors that are stacked, whose products round otherwise


class Quiet(Toy):
    """A toy whose training step reads no value, so that every mode fits."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = self.loss(batch)
        self.log("train_loss", loss, on_epoch=True, on_step=False)
        return loss


class Rate:
    """Builds the optimizer of a toy with another learning rate and decay."""

    def __init__(self, candidate: Candidate) -> None:
        base = 1e-2
        self.lr = candidate.lr or base * candidate.lr_multiplier
        self.decay = 0.1 if candidate.weight_decay is None else candidate.weight_decay


def fit(module: LightningModule, *callbacks: Callback, path: Any = None, data: Any = None, **options: Any) -> Any:
    defaults = {"max_steps": STEPS, "max_epochs": 50, "limit_val_batches": 1.0}
    run = trainer(*callbacks, **(defaults | options))
    run.fit(module, data if data is not None else loader(), loader(8), ckpt_path=path)
    return run


def alone(kind: Callable[[], Toy], candidate: Candidate, **options: Any) -> State:
    """Return the adapter that a fit of its own trains."""
    return adapter_state_dict(module_alone(kind, candidate, **options))


def module_alone(kind: Callable[[], Toy], candidate: Candidate, **options: Any) -> Toy:
    module, rate = kind(), Rate(candidate)

    def configure_optimizers() -> Any:
        return torch.optim.AdamW(module.parameters(), lr=rate.lr, weight_decay=rate.decay)

    module.configure_optimizers = configure_optimizers  # type: ignore[method-assign]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PL_GLOBAL_SEED", str(candidate.seed or 0))
        fit(module, LoRACallback(candidate.config, lr_ratio=candidate.lr_ratio), **options)
    return module


def swept(**options: Any) -> LoRASweep:
    """Return a sweep of ranks that suit a toy."""
    return LoRASweep(**({"rank": 2} | options))


def state(module: LightningModule, name: str) -> State:
    with using(module, name):
        return adapter_state_dict(module)


def distance(found: State, expected: State) -> float:
    """Return the largest relative difference of two states' tensors."""
    assert found.keys() == expected.keys()
    return max(
        float((found[key].double() - each.double()).norm() / each.double().norm().clamp_min(1e-12))
        for key, each in expected.items()
    )


def assert_each_is_alone(
    kind: Callable[[], Toy], sweep: LoRASweep, module: LightningModule, close: float, **options: Any
) -> None:
    for name, candidate in sweep.candidates.items():
        assert distance(state(module, name), alone(kind, candidate, **options)) <= close, name


def test_its_text_names_the_adapters_and_what_is_not_a_default():
    sweep = LoRASweep(grid={"lr": [1e-3, 1e-2]}, rank=2, keep=1.0, mode="loop")
    expected = "adapters=['lr=1e-3', 'lr=1e-2'], rank=2, direction='min', keep=1.0, mode='loop'"
    assert repr(sweep) == f"LoRASweep({expected})"


# --- 1 to 3: equal to separate fits


@pytest.mark.parametrize(("mode", "close"), [("loop", EXACT), ("vmap", CLOSE), ("meet", CLOSE)])
def test_each_adapter_ends_as_in_a_fit_of_its_own(mode: Any, close: float):
    module, options = Quiet(), {"gradient_clip_val": 0.05, "accumulate_grad_batches": 2}
    sweep = swept(adapters=FOUR, mode=mode, keep=1.0)
    fit(module, sweep, **options)
    assert adapter_names(module) == list(FOUR)
    assert_each_is_alone(Quiet, sweep, module, close, **options)


class ComputedAgain(torch.autograd.Function):
    """Calls a network again in its backward pass, as adjoints of differential equations and reversible nets do."""

    @staticmethod
    def forward(ctx: Any, network: nn.Module, x: Tensor, *parameters: Tensor) -> Tensor:
        ctx.network = network
        ctx.save_for_backward(x, *parameters)
        with torch.no_grad():
            return network(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        x, *parameters = ctx.saved_tensors
        with torch.enable_grad():
            output = ctx.network(x)
        return None, None, *torch.autograd.grad(output, parameters, gradient, allow_unused=True)


class Adjoint(Quiet):
    def loss(self, batch: list[Tensor]) -> Tensor:
        x, y = batch
        trained = [parameter for parameter in self.net.parameters() if parameter.requires_grad]
        return (ComputedAgain.apply(self.net, x, *trained) - y).square().mean()


@pytest.mark.parametrize("mode", ["loop", "auto"])
def test_a_backward_pass_that_calls_the_network_again_has_its_own_adapter(mode: Any):
    module, sweep = Adjoint(), swept(adapters=FOUR, mode=mode, keep=1.0)
    fit(module, sweep, accumulate_grad_batches=2)
    assert_each_is_alone(Adjoint, sweep, module, EXACT, accumulate_grad_batches=2)


class WorksOnGradients(Quiet):
    """Normalizes, logs and clips gradients in hooks, which find them in three ways."""

    def on_after_backward(self) -> None:
        for layer in lora_layers(self).values():
            layer.lora.A.grad.div_(layer.lora.A.grad.norm() + 1e-3)

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        gradients = [parameter.grad for parameter in self.parameters() if parameter.grad is not None]
        norm = torch.stack([gradient.norm() for gradient in gradients]).norm()
        self.log("norm", norm)
        weights = torch.stack([each.detach().norm() for each in self.parameters() if each.requires_grad])
        for gradient in gradients:
            gradient.div_(1 + norm + weights.norm())

    def configure_gradient_clipping(self, optimizer: Any, *_: Any, **__: Any) -> None:
        for layer in lora_layers(self).values():
            layer.lora.B.grad.clamp_(-1e-3, 1e-3)
        held = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        held[0].mul_(len(held))


@pytest.mark.parametrize("mode", ["loop", "vmap"])
def test_hooks_that_see_gradients_run_for_each_adapter_with_its_own(mode: Any):
    module, sweep = WorksOnGradients(), swept(adapters=FOUR, mode=mode, keep=1.0)
    options = {"accumulate_grad_batches": 2, "max_steps": 8}
    run = fit(module, sweep, **options)
    assert_each_is_alone(WorksOnGradients, sweep, module, EXACT if mode == "loop" else CLOSE, **options)
    norms = {name: float(run.logged_metrics[f"norm/{name}"]) for name in FOUR}
    assert len(set(norms.values())) == len(FOUR)
    assert float(run.logged_metrics["norm"]) == norms[sweep.best]


@pytest.mark.parametrize("bias", ["lora_only", "all"])
@pytest.mark.parametrize("mode", MODES)
def test_biases_beside_dora_end_as_in_a_fit_of_their_own(mode: Any, bias: Any):
    module, sweep = Quiet(), swept(grid={"lr": [1e-2, 3e-2]}, use_dora=True, bias=bias, mode=mode, keep=1.0)
    fit(module, sweep, max_steps=8)
    assert_each_is_alone(Quiet, sweep, module, EXACT if mode == "loop" else CLOSE, max_steps=8)


@pytest.mark.parametrize(("mode", "close"), [("loop", EXACT), ("vmap", CLOSE), ("meet", CLOSE)])
def test_validation_changes_no_batches_that_training_draws(mode: Any, close: float):
    def seeded() -> Quiet:
        torch.manual_seed(5)  # of the order of the batches
        return Quiet()

    module, options = seeded(), {"max_epochs": 3, "max_steps": -1, "num_sanity_val_steps": 1}
    sweep = swept(grid={"lr": [1e-3, 1e-2, 3e-2]}, mode=mode, keep=1.0)
    fit(module, sweep, data=loader(shuffle=True), **options)
    assert_each_is_alone(seeded, sweep, module, close, data=loader(shuffle=True), **options)


@pytest.mark.parametrize("mode", MODES)
def test_adapters_are_in_training_mode_again_after_a_validation(mode: Any):
    modes: list[bool] = []

    class Modes(Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: LightningModule, *_: Any) -> None:
            for name in adapter_names(pl_module):
                with using(pl_module, name):
                    modes.extend(layer.lora.training for layer in lora_layers(pl_module).values())

        def on_validation_batch_end(self, trainer: Any, pl_module: LightningModule, *_: Any) -> None:
            modes.extend(not layer.lora.training for layer in lora_layers(pl_module).values())

    fit(Quiet(), swept(grid={"lr": [1e-3, 1e-2, 3e-2]}, dropout=0.5, mode=mode, keep=1.0), Modes(), max_epochs=3)
    assert modes
    assert all(modes)


class Normed(Quiet):
    """A toy with running statistics."""

    def build(self) -> None:
        self.net = network()
        self.net.append(nn.BatchNorm1d(FEATURES))


@pytest.mark.parametrize("options", [{"frozen_norm": "track"}, {"modules_to_save": ["net.5"]}], ids=["track", "full"])
@pytest.mark.parametrize("mode", ["loop", "meet", "auto"])
def test_each_adapter_has_running_statistics_of_its_own(
    mode: Any, options: dict[str, Any], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(training, "_WORTHWHILE", 10.0)  # so that arithmetic does not keep auto from vmap
    module = Normed()
    sweep = swept(grid={"lr": [1e-3, 3e-2]}, mode=mode, keep=1.0, **options)
    fit(module, sweep, max_steps=8)
    assert_each_is_alone(Normed, sweep, module, EXACT if mode != "meet" else CLOSE, max_steps=8)
    if mode == "auto":
        assert "vmap: training_step changes the buffers net.5." in caplog.text


def test_a_chosen_vmap_is_refused_where_statistics_move():
    with pytest.raises(MisconfigurationException, match=r"(?s)training_step changes the buffers net\.5.*mode='loop'"):
        fit(Normed(), swept(grid={"lr": [1e-2, 1e-3]}, mode="vmap", frozen_norm="track"))


class Centered(Quiet):
    """A toy whose own code moves a buffer in training."""

    def build(self) -> None:
        super().build()
        self.register_buffer("center", torch.zeros(FEATURES))

    def loss(self, batch: list[Tensor]) -> Tensor:
        if self.training:
            with torch.no_grad():
                self.center.mul_(0.9).add_(self.net(batch[0]).mean(0), alpha=0.1)
        return super().loss([batch[0] - self.center, batch[1]])


@pytest.mark.parametrize("mode", ["loop", "auto"])
def test_each_adapter_has_the_buffers_that_its_steps_move(mode: str, tmp_path: Path):
    module, sweep = Centered(), swept(adapters={"a": {"rank": 2}, "b": {"rank": 1, "lr": 1e-3}}, mode=mode, keep=1.0)
    run = fit(module, sweep, max_steps=8)
    assert_each_is_alone(Centered, sweep, module, EXACT, max_steps=8)
    run.save_checkpoint(tmp_path / "sweep.ckpt")
    trainer(LoRACallback()).validate(tested := Centered(), loader(), ckpt_path=tmp_path / "sweep.ckpt", verbose=False)
    single = module_alone(Centered, sweep.candidates["b"], max_steps=8)
    for each in (module, tested):
        with using(each, "b"):
            assert torch.equal(each.center, single.center)
        with using(each, None):
            assert not each.center.any()


def test_a_second_fit_goes_on_from_the_buffers_of_each_adapter():
    module, centers = Centered(), []
    for _ in range(2):
        sweep = swept(adapters={"a": {"rank": 2}, "b": {"rank": 1, "lr": 1e-3}}, mode="loop", keep=1.0)
        fit(module, sweep, max_steps=4)
        with using(module, "b"):
            centers.append(module.center.clone())
    single = module_alone(Centered, sweep.candidates["b"], max_steps=4)
    assert torch.equal(centers[0], single.center)
    assert not torch.equal(centers[1], centers[0])


class Penalized(Quiet):
    """Adds the squares of all that trains to its loss, in one of the ways to find it."""

    def loss(self, batch: list[Tensor]) -> Tensor:
        trained = [each for each in self.parameters() if each.requires_grad]
        names = [each for name, each in self.net.named_parameters() if "lora" in name]
        return super().loss(batch) + 0.1 * sum(each.square().sum() for each in trained + names)


@pytest.mark.parametrize("mode", ["loop", "auto"])
def test_a_step_that_looks_for_what_trains_finds_its_own_adapter(mode: Any):
    module, sweep = Penalized(), swept(adapters=FOUR, mode=mode, keep=1.0)
    fit(module, sweep, max_steps=8)
    assert_each_is_alone(Penalized, sweep, module, EXACT, max_steps=8)
    assert sum("lora_others" in name for name, _ in module.named_parameters()) == 6 * (len(FOUR) - 1)


@pytest.mark.parametrize("mode", ["vmap", "meet"])
def test_a_mode_that_was_chosen_is_proved_by_the_first_batch(mode: Any):
    message = rf"mode '{mode}' does not fit the training_step of Penalized: the loss of 'a' is .* instead of"
    with pytest.raises(MisconfigurationException, match=message):
        fit(Penalized(), swept(adapters=FOUR, mode=mode))


def test_a_weight_decay_is_of_the_adapter_that_asks_for_it():
    held: dict[str, float] = {}

    class Decays(Callback):
        def on_train_start(self, trainer: Any, *_: Any) -> None:
            held.update({group["name"]: group["weight_decay"] for group in trainer.optimizers[0].param_groups})

    adapters = {"a": {"weight_decay": 0.5}, "b": {}, "c": {"weight_decay": 0.0}, "d": {"lr_ratio": 2.0}}
    fit(Quiet(), swept(adapters=adapters, keep=1.0), Decays(), max_steps=1)
    assert held == {"a": 0.5, "b": 0.1, "c": 0.0, "d": 0.1, "d.2": 0.1}


class Counts(Quiet):
    """Trains more and more of its loss, by a count of its steps that begins anew with each epoch but the second."""

    count = 0
    said: tuple[int, ...] = ()

    def on_train_epoch_start(self) -> None:
        if self.current_epoch != 1:
            self.count = 0

    def loss(self, batch: list[Tensor]) -> Tensor:
        self.count += self.training
        self.said += (self.count,) if self.training else ()
        return super().loss(batch) * self.count / 4


class Averages(Quiet):
    """Divides its loss by a mean over its steps, and gradients by one over their norms."""

    scale: Any = None
    norm = 0.0

    def loss(self, batch: list[Tensor]) -> Tensor:
        loss = super().loss(batch)
        if self.training:
            self.scale = loss.detach() if self.scale is None else 0.9 * self.scale + 0.1 * loss.detach()
        return loss if self.scale is None else loss / self.scale

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        gradients = [parameter.grad for parameter in self.parameters() if parameter.grad is not None]
        self.norm = 0.9 * self.norm + 0.1 * float(torch.stack([each.norm() for each in gradients]).norm())
        for gradient in gradients:
            gradient.div_(self.norm)


@pytest.mark.parametrize(
    ("kind", "mode", "close"),
    [
        (Counts, "loop", EXACT),
        (Counts, "auto", CLOSE),
        (Counts, "vmap", CLOSE),
        (Averages, "loop", EXACT),
        (Averages, "auto", EXACT),
    ],
)
def test_each_adapter_has_the_attributes_that_its_steps_set(kind: type[Quiet], mode: Any, close: float):
    module, sweep = kind(), swept(adapters=FOUR, mode=mode, keep=1.0)
    fit(module, sweep, max_steps=12)
    assert_each_is_alone(kind, sweep, module, close, max_steps=12)
    if isinstance(module, Counts):
        assert module.said == (1, 2, 3, 4, 5, 6, 7, 8, 1, 2, 3, 4)


@pytest.mark.parametrize(("kind", "mode"), [(Counts, "meet"), (Averages, "meet"), (Averages, "vmap")])
def test_ways_in_which_adapters_would_share_attributes_are_refused(kind: type[Quiet], mode: Any):
    with pytest.raises(
        MisconfigurationException, match=r"training_step sets \w+.*, of which each adapter needs its own"
    ):
        fit(kind(), swept(adapters=FOUR, mode=mode))


class Ageing(Quiet):
    """Counts its epochs, once for all adapters, and computes with the number."""

    def build(self) -> None:
        super().build()
        self.register_buffer("epochs", torch.zeros(()))

    def on_train_epoch_start(self) -> None:
        self.epochs += 1

    def loss(self, batch: list[Tensor]) -> Tensor:
        return super().loss([batch[0] * self.epochs, batch[1]])


def test_what_hooks_change_is_changed_for_all_adapters():
    module, sweep = Ageing(), swept(adapters={"a": {"rank": 2}, "b": {"rank": 1, "lr": 1e-3}}, mode="loop", keep=1.0)
    fit(module, sweep, max_steps=8)
    assert_each_is_alone(Ageing, sweep, module, EXACT, max_steps=8)
    for name, epochs in {"a": 2, "b": 2, None: 0}.items():
        with using(module, name):
            assert module.epochs == epochs


DIFFERENT: dict[str, dict[str, Any]] = {
    "layers": {"a": {"target_modules": ["net.0"]}, "b": {"target_modules": ["net.2", "net.4"]}},
    "head": {"a": {"modules_to_save": ["net.4"]}, "b": {"target_modules": ["net.*"]}},
    "options": {"a": {"use_dora": True}, "b": {"lora_bias": True, "target_modules": ["net.2"]}},
}


@pytest.mark.parametrize("kind", DIFFERENT)
def test_adapters_of_a_single_optimizer_group_may_train_different_tensors(kind: str):
    module, sweep = Quiet(), swept(adapters=DIFFERENT[kind], mode="loop", keep=1.0)
    fit(module, sweep, max_steps=8)
    assert_each_is_alone(Quiet, sweep, module, EXACT, max_steps=8)


class Grouped(Quiet):
    """A toy whose optimizer has two groups."""

    def configure_optimizers(self) -> Any:
        own = [{"params": self.net[0].parameters()}, {"params": self.net[2:].parameters(), "lr": 1e-3}]
        return torch.optim.AdamW(own, lr=1e-2)


def test_adapters_of_several_groups_need_one_that_trains_all():
    with pytest.raises(MisconfigurationException, match=r"unclear which optimizer group.*give the optimizer a single"):
        fit(Grouped(), swept(adapters=DIFFERENT["layers"]))


class SumLoss(Quiet):
    def loss(self, batch: Any) -> Tensor:
        x, y = batch
        return ((self.net(x) - y) ** 2).sum()


class TokenMean(Quiet):
    """A mean over as many entries as each sample has, which is not the mean of the samples' means."""

    def loss(self, batch: Any) -> Tensor:
        x, y = batch
        counted = (torch.arange(x.shape[1]) < 1 + torch.arange(len(x)).unsqueeze(1) % 7).to(x)
        return (counted * (self.net(x) - y) ** 2).sum() / counted.sum()


class Contrastive(Quiet):
    """In-batch negatives: every sample's loss depends on all others."""

    def loss(self, batch: Any) -> Tensor:
        x, y = batch
        return F.cross_entropy(self.net(x) @ y.T, torch.arange(len(x)))


@pytest.mark.parametrize("kind", [SumLoss, TokenMean, Contrastive])
@pytest.mark.parametrize("mode", ["vmap", "meet"])
def test_losses_that_are_no_plain_means_give_the_same(mode: Any, kind: type[Toy]):
    module, sweep = (
        kind(),
        swept(adapters={"a": {"lr": 1e-2, "rank": 2}, "b": {"lr": 1e-3, "rank": 3}}, mode=mode, keep=1.0),
    )
    fit(module, sweep, max_steps=8)
    assert_each_is_alone(kind, sweep, module, CLOSE, max_steps=8)


@pytest.mark.parametrize("bias", ["all", "lora_only"])
@pytest.mark.parametrize(("mode", "close"), [("loop", EXACT), ("vmap", CLOSE)])
def test_biases_train_with_each_adapter(mode: Any, close: float, bias: Any):
    module, rates = Quiet(), [5e-2, 4e-2, 3e-2, 2e-2, 1e-2, 5e-3, 2e-3, 1e-3]
    # As many adapters as samples: the shapes of all biases fit those of the batch, too.
    sweep = swept(grid={"lr": rates}, mode=mode, bias=bias, target_modules=["net.0", "net.4"], keep=1.0)
    fit(module, sweep, max_steps=4)
    assert_each_is_alone(Quiet, sweep, module, close, max_steps=4)


@pytest.mark.parametrize("kind", [BuiltInSetup, BuiltInConfigureModel])
def test_layers_may_be_built_late(kind: type[Toy]):
    class Late(kind):  # type: ignore[misc,valid-type]
        training_step = Quiet.training_step

    module, sweep = Late(), swept(grid={"rank": [2, 3]}, mode="loop", keep=1.0)
    fit(module, sweep, max_steps=4)
    assert_each_is_alone(Late, sweep, module, EXACT, max_steps=4)


class TestTransformer:
    def test_a_model_with_the_loss_inside_its_forward(self):
        transformers = pytest.importorskip("transformers")
        config = transformers.BertConfig(
            vocab_size=32, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16,
            hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, num_labels=3,
        )  # fmt: skip

        class Bert(Quiet):
            def build(self) -> None:
                with torch.random.fork_rng():
                    torch.manual_seed(0)
                    self.net = transformers.BertForSequenceClassification(config)

            def loss(self, batch: Any) -> Tensor:
                return self.net(**batch).loss

        generator = torch.Generator().manual_seed(0)
        tokens = torch.randint(0, 32, (16, 6), generator=generator)
        mask = (torch.arange(6) < 2 + torch.arange(16).unsqueeze(1) % 5).long()
        rows = [
            {"input_ids": tokens[i], "attention_mask": mask[i], "labels": tokens[i, 0] % 3} for i in range(len(tokens))
        ]
        data = DataLoader(rows, batch_size=4)
        options: dict[str, Any] = {"target_modules": ["query", "value"]}
        both = {"a": {"lr": 1e-2, "rank": 2}, "b": {"lr": 1e-3, "rank": 4}}
        module, sweep = Bert(), swept(adapters=both, keep=1.0, monitor="train_loss", mode="vmap", **options)
        fit(module, sweep, data=data, limit_val_batches=0, max_steps=8)
        assert_each_is_alone(Bert, sweep, module, 1e-5, data=data, limit_val_batches=0, max_steps=8)


def said_mode(caplog: pytest.LogCaptureFixture) -> str:
    """Return what the sweep has said of its mode."""
    [said] = [record.getMessage() for record in caplog.records if "LoRASweep: mode" in record.getMessage()]
    return said


# --- 4 and 6: adapters that fail or stop


@pytest.mark.parametrize("mode", ["vmap", "loop"])
def test_an_adapter_that_diverges_leaves_the_others_bit_equal(mode: Any):
    sane = {"a": {"lr": 1e-2}, "b": {"lr": 1e-3}}
    without, beside = Quiet(), Quiet()
    fit(without, swept(adapters=sane, mode=mode, keep=1.0))
    sweep = swept(adapters={"wild": {"lr": 1e30}, **sane}, mode=mode, keep=1.0)
    with pytest.warns(UserWarning, match="'wild' diverged and stopped at step"):
        fit(beside, sweep, data=loader())
    assert all(distance(state(beside, name), state(without, name)) == EXACT for name in sane)
    assert [row["why"] for row in sweep.table()] == [None, None, "diverged"]
    assert all(value.isfinite().all() for value in state(beside, "wild").values())  # it made no step after that
    assert sweep.best == active_adapter(beside) == "a"


def test_a_fit_in_which_all_adapters_diverge_raises():
    with (
        pytest.raises(MisconfigurationException, match="every adapter has diverged"),
        pytest.warns(UserWarning, match="diverged"),
    ):
        fit(Quiet(), swept(grid={"lr": [1e30, 1e31]}, mode="loop"))


@pytest.mark.filterwarnings("ignore:Total length of")
def test_a_fit_without_a_batch_raises():
    with pytest.raises(MisconfigurationException, match=r"made no optimizer step.*Is the train_dataloader empty"):
        fit(Quiet(), swept(grid={"lr": [1e-3, 1e-2]}), data=loader(rows=0))


class Watch(Callback):
    """Keeps the adapters as they are at the end of each epoch."""

    def __init__(self) -> None:
        self.seen: list[dict[str, State]] = []

    def on_train_epoch_end(self, trainer: Any, pl_module: LightningModule) -> None:
        self.seen.append({name: state(pl_module, name) for name in adapter_names(pl_module)})


@pytest.mark.parametrize("mode", MODES)
def test_halving_stops_losers_which_never_move_again(mode: Any):
    grid, watch = {"lr": [3e-2, 1e-2, 1e-3, 1e-5]}, Watch()
    module, sweep = Quiet(), swept(grid=grid, mode=mode, keep=0.5)
    fit(module, sweep, watch, max_epochs=5, max_steps=-1)
    at = {row["name"]: row["stopped at"] for row in sweep.table()}
    assert sorted(step for step in at.values() if step is not None) == [4, 4, 8]
    assert at["lr=1e-5"] == at["lr=1e-3"] == 4
    for epoch in range(2, 5):
        for name, step in at.items():
            moved = distance(watch.seen[epoch][name], watch.seen[epoch - 1][name])
            assert (moved == 0) == (step is not None and step <= 4 * epoch), (name, epoch)
    assert sweep.table()[0]["name"] == sweep.best == active_adapter(module)


def test_no_adapter_stops_in_the_first_tenth_of_the_steps_or_at_the_end():
    module, sweep = Quiet(), swept(grid={"lr": [1e-2, 1e-4]}, keep=0.5)
    fit(module, sweep, max_epochs=1, max_steps=-1)  # its only validation is at the end
    assert all(row["stopped at"] is None for row in sweep.table())
    early = swept(grid={"lr": [1e-2, 1e-4]}, keep=0.5)
    fit(Quiet(), early, max_epochs=11, max_steps=44, val_check_interval=1)
    assert {row["stopped at"] for row in early.table()} == {None, 5}  # the first after 4.4 steps


# --- 5: checkpoints


class Resumable:
    """A loader that goes on, in a resumed run, with the batch after the last one."""

    def __init__(self) -> None:
        self.batches, self.done = list(loader()), 0

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Any:
        first, self.done = self.done % len(self), self.done % len(self)
        for batch in self.batches[first:]:
            self.done += 1
            yield batch

    def state_dict(self) -> dict[str, int]:
        return {"done": self.done}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.done = state["done"]


@pytest.mark.parametrize("init", ["eva", "pissa"])
def test_computed_starts_of_all_adapters_come_from_the_file(init: str, tmp_path: Path):
    grid, options = {"lr": [1e-2, 3e-2, 1e-3]}, {"mode": "loop", "keep": 1.0, "init": init}
    whole, sweep = Quiet(), swept(grid=grid, **options)
    fit(whole, sweep, data=Resumable(), max_steps=8)
    saves = ModelCheckpoint(tmp_path, every_n_train_steps=4, save_top_k=-1, filename="{step}")
    fit(Quiet(), swept(grid=grid, **options), saves, max_steps=4, data=Resumable())
    resumed = Quiet()
    fit(resumed, swept(grid=grid, **options), path=tmp_path / "step=4.ckpt", data=Resumable(), max_steps=8)
    assert all(distance(state(resumed, name), state(whole, name)) == EXACT for name in sweep.candidates)


@pytest.mark.parametrize(("mode", "close"), [("loop", EXACT), ("vmap", CLOSE), ("auto", CLOSE)])
def test_a_killed_run_resumes_in_the_middle_of_a_halving(mode: Any, close: float, tmp_path: Path):
    options: dict[str, Any] = {"mode": mode, "keep": 0.5}
    grid = {"lr": [1e-2, 3e-2, 1e-3, 1e-4]}
    whole, sweep = Quiet(), swept(grid=grid, **options)
    fit(whole, sweep, data=Resumable())
    broken = Quiet()
    saves = ModelCheckpoint(tmp_path, every_n_train_steps=6, save_top_k=-1, filename="{step}")
    fit(broken, swept(grid=grid, **options), saves, max_steps=6, data=Resumable())
    resumed, again = Quiet(), swept(grid=grid, **options)
    fit(resumed, again, path=tmp_path / "step=6.ckpt", data=Resumable())
    assert all(distance(state(resumed, name), state(whole, name)) <= close for name in sweep.candidates)
    assert {r["name"]: r["stopped at"] for r in again.table()} == {r["name"]: r["stopped at"] for r in sweep.table()}
    assert again.best == sweep.best
    assert again.table()[0]["steps"] == STEPS


def test_a_checkpoint_saved_by_hand_after_the_fit_resumes_the_sweep(tmp_path: Path):
    whole, sweep = Quiet(), swept(adapters=FOUR, keep=1, mode="loop")
    fit(whole, sweep)
    fit(Quiet(), swept(adapters=FOUR, keep=1, mode="loop"), max_steps=8).save_checkpoint(tmp_path / "half.ckpt")
    resumed, again = Quiet(), swept(adapters=FOUR, keep=1, mode="loop")
    fit(resumed, again, path=tmp_path / "half.ckpt")
    assert again.table() == sweep.table()
    assert all(distance(state(resumed, name), state(whole, name)) == EXACT for name in FOUR)


def test_a_checkpoint_holds_all_adapters_and_the_best_is_the_one_that_loads(tmp_path: Path):
    module, grid = Quiet(), {"lr": [1e-4, 0.03], "rank": [2]}
    sweep = swept(grid=grid, keep=1.0)
    saves = ModelCheckpoint(tmp_path, monitor="val_loss", filename="sweep")
    run = fit(module, sweep, saves)
    assert sweep.best == "lr=3e-2,rank=2"
    assert run.callback_metrics["val_loss"] == run.callback_metrics["val_loss/lr=3e-2,rank=2"]
    assert saves.best_model_score == min(value for _, value in sweep._standings.results[sweep.best].curve)  # type: ignore[union-attr]
    loaded = Quiet()
    load_adapter(loaded, tmp_path / "sweep.ckpt")
    assert distance(adapter_state_dict(loaded), state(module, sweep.best)) == 0
    other = Quiet()
    load_adapter(other, tmp_path / "sweep.ckpt", adapter="lr=0.0001,rank=2")
    assert distance(adapter_state_dict(other), state(module, "lr=1e-4,rank=2")) == 0


def test_a_checkpoint_of_another_sweep_is_refused(tmp_path: Path):
    saves = ModelCheckpoint(tmp_path, filename="sweep")
    fit(Quiet(), swept(grid={"lr": [1e-4, 1e-3]}), saves, max_steps=4)
    with pytest.raises(MisconfigurationException, match="compared other adapters; different are lr=1e-3, lr=1e-2"):
        fit(Quiet(), swept(grid={"lr": [1e-4, 1e-2]}), path=tmp_path / "sweep.ckpt")


def test_testing_a_checkpoint_tests_its_best_adapter(tmp_path: Path):
    module, sweep = Quiet(), swept(grid={"lr": [1e-4, 3e-2]}, keep=1.0)
    fit(module, sweep, ModelCheckpoint(tmp_path, filename="sweep"))
    expected = trainer(LoRACallback(rank=2)).test(module, loader(8), verbose=False)
    found = trainer(sweep).test(Quiet(), loader(8), ckpt_path=tmp_path / "sweep.ckpt", verbose=False)
    assert found == expected


# --- 7: FLOPs


def test_layers_before_the_first_adapted_one_compute_once():
    from torch.utils.flop_counter import FlopCounterMode

    def flops(adapters: int, mode: Any) -> int:
        counts = []
        for steps in (1, 2):  # the first one follows a proof
            sweep = swept(grid={"seed": list(range(adapters))}, mode=mode, keep=1.0, target_modules=["net.4"])
            with FlopCounterMode(display=False) as counter:
                fit(Quiet(), sweep, max_steps=steps)
            counts.append(counter.get_total_flops())
        return counts[1] - counts[0]

    prefix, adapted = 2 * 8 * (8 * 16 + 16 * 16), 2 * 8 * 16 * 8  # of a batch of 8: frozen layers have no backward pass
    saved = flops(4, "loop") - flops(4, "vmap")
    assert 3 * prefix < saved < 3 * (prefix + adapted)  # the adapted layer's own product is the same for all, too


@pytest.mark.parametrize(("layers", "mode"), [(["net.4"], "vmap"), (["net.0", "net.2", "net.4"], "loop")])
def test_on_a_cpu_adapters_train_together_only_where_that_saves_arithmetic(
    layers: list[str], mode: str, caplog: pytest.LogCaptureFixture
):
    sweep = swept(grid={"seed": [0, 1, 2, 3]}, keep=1.0, target_modules=layers)
    with caplog.at_level("INFO"):
        fit(Quiet(), sweep, max_steps=1)
    said = said_mode(caplog)
    assert f"mode {mode!r}" in said
    assert ("too many to be faster on a CPU" in said) == (mode == "loop")


# --- 8: what vmap cannot do


def test_a_step_that_reads_a_value_falls_back_and_names_the_line(caplog: pytest.LogCaptureFixture):
    both = {"a": {"lr": 1e-2}, "b": {"lr": 1e-3}}
    module, sweep = Toy(), swept(adapters=both, keep=1.0)
    with caplog.at_level("INFO"), pytest.warns(UserWarning, match=r"training_step changes losses in place\. All"):
        fit(module, sweep, max_steps=8)
    said = said_mode(caplog)
    assert "toys.py" in said
    assert "self.losses.append(loss.item())" in said
    assert len(module.losses) == 16  # the proof leaves no trace
    assert_each_is_alone(Toy, sweep, module, EXACT, max_steps=8)


def test_a_chosen_mode_that_does_not_fit_raises_and_names_the_line():
    with pytest.raises(MisconfigurationException, match=r"mode 'vmap' does not fit.*losses.append.*Use mode='loop'"):
        fit(Toy(), swept(grid={"lr": [1e-2, 1e-3]}, mode="vmap"))


class Counting(Quiet):
    """A toy whose training step updates a metric."""

    def build(self) -> None:
        super().build()
        self.mean = MeanMetric()

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = self.loss(batch)
        self.mean.update(loss)
        self.log("mean", self.mean, on_epoch=True, on_step=False)
        return loss


def test_each_adapter_has_metrics_of_its_own():
    module, sweep = Counting(), swept(adapters={"a": {"lr": 3e-2}, "b": {"lr": 1e-3}}, keep=1.0)
    run = fit(module, sweep, max_epochs=1, max_steps=-1)
    one = Counting()
    one.configure_optimizers = lambda: torch.optim.AdamW(one.parameters(), lr=3e-2, weight_decay=0.1)  # type: ignore[method-assign]
    expected = fit(one, LoRACallback(rank=2), max_epochs=1, max_steps=-1).callback_metrics["mean"]
    assert run.callback_metrics["mean/a"] == expected
    assert run.callback_metrics["mean/b"] != expected


# --- 9: memory


class Saved:
    """Counts the bytes that autograd keeps at one time."""

    def __init__(self) -> None:
        self.now = self.most = 0

    def pack(self, tensor: Tensor) -> Any:
        return _Held(self, tensor)


class _Held:
    def __init__(self, count: Saved, tensor: Tensor) -> None:
        self.count, self.tensor = count, tensor
        count.now += tensor.nbytes
        count.most = max(count.most, count.now)

    def __del__(self) -> None:
        self.count.now -= self.tensor.nbytes


def most_saved(adapters: int, mode: Any) -> int:
    count = Saved()
    sweep = swept(grid={"seed": list(range(adapters))}, mode=mode, keep=1.0)
    with torch.autograd.graph.saved_tensors_hooks(count.pack, lambda held: held.tensor):
        fit(Quiet(), sweep, max_steps=2)
    return count.most


def test_loop_keeps_the_activations_of_one_adapter_and_vmap_of_all():
    one = most_saved(1, "loop")
    assert most_saved(4, "loop") <= 1.05 * one
    assert most_saved(4, "vmap") <= 4 * most_saved(1, "vmap")


# --- 10: export


def test_the_export_loads_in_peft(tmp_path: Path):
    peft = pytest.importorskip("peft")

    class Inner(Quiet):
        def build(self) -> None:
            self.model = nn.Sequential(OrderedDict(net=network()))

        @property
        def net(self) -> nn.Module:  # type: ignore[override]
            return self.model.net

    module, sweep = Inner(), swept(grid={"lr": [1e-4, 3e-2]}, export_dir=str(tmp_path / "best"), keep=1.0)
    fit(module, sweep)
    [directory] = [path.parent for path in (tmp_path / "best").rglob("adapter_config.json")]
    x = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))
    loaded = peft.PeftModel.from_pretrained(nn.Sequential(OrderedDict(net=network())), directory)
    with torch.no_grad():
        assert torch.allclose(loaded(x), module.net(x), atol=1e-6)
    assert active_adapter(module) == sweep.best == "lr=3e-2"


# --- optimizers


class Scheduled(Quiet):
    """A toy with a schedule."""

    kind: Any = torch.optim.lr_scheduler.LambdaLR
    schedule: dict[str, Any] = {"lr_lambda": lambda step: min(1.0, (step + 1) / 4)}

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=1e-2, weight_decay=0.1)
        return [optimizer], [{"scheduler": self.kind(optimizer, **self.schedule), "interval": "step"}]


@pytest.mark.parametrize(
    ("kind", "schedule"),
    [
        (torch.optim.lr_scheduler.LambdaLR, {"lr_lambda": lambda step: min(1.0, (step + 1) / 4)}),
        (torch.optim.lr_scheduler.CosineAnnealingLR, {"T_max": STEPS, "eta_min": 1e-4}),
        (torch.optim.lr_scheduler.StepLR, {"step_size": 3, "gamma": 0.5}),
        (torch.optim.lr_scheduler.LinearLR, {"start_factor": 0.1, "total_iters": 6}),
    ],
)
def test_schedules_act_as_on_an_optimizer_of_the_adapters_own(kind: Any, schedule: dict[str, Any]):
    rates: dict[str, list[float]] = {"a": [], "b": []}

    class Rates(Callback):
        def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
            for group in trainer.optimizers[0].param_groups:
                rates[group["name"]].append(group["lr"])

    module, expected = Scheduled(), list[float]()
    module.kind, module.schedule = kind, schedule
    fit(module, swept(adapters={"a": {"lr": 3e-3}, "b": {}}, keep=1.0, mode="loop"), Rates())
    [parameter] = [nn.Parameter(torch.zeros(1))]
    optimizer = torch.optim.AdamW([parameter], lr=3e-3)
    scheduler = kind(optimizer, **schedule)
    for _ in range(STEPS):
        expected.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    assert rates["a"] == expected
    assert rates["b"] != expected


PEAKS: dict[str, Callable[[Any, float], Any]] = {
    "OneCycleLR": lambda optimizer, peak: torch.optim.lr_scheduler.OneCycleLR(optimizer, peak, STEPS + 1),
    "CyclicLR": lambda optimizer, peak: torch.optim.lr_scheduler.CyclicLR(optimizer, peak / 8, peak, 6),
    "CyclicLR behind another": lambda optimizer, peak: torch.optim.lr_scheduler.SequentialLR(
        optimizer,
        [
            torch.optim.lr_scheduler.CyclicLR(optimizer, peak / 8, peak, 3, cycle_momentum=False),
            torch.optim.lr_scheduler.StepLR(optimizer, 3),
        ],
        milestones=[8],
    ),
}


class WarmUpMultiStep(torch.optim.lr_scheduler.LRScheduler):
    """A schedule of a user's own, whose list is as long as that of the optimizer's groups."""

    def __init__(self, optimizer: Any) -> None:
        self.milestones = [8]
        super().__init__(optimizer)

    def get_lr(self) -> Any:
        passed = bisect_right(self.milestones, self.last_epoch)
        return [base * min(1.0, (self.last_epoch + 1) / 4) * 0.1**passed for base in self.base_lrs]


@pytest.mark.parametrize("mode", ["loop", "vmap"])
def test_a_schedule_of_ones_own_acts_on_each_adapter_as_alone(mode: Any):
    class Stepped(Quiet):
        def __init__(self, lr: float = 1e-2) -> None:
            super().__init__()
            self.lr, self.rates = lr, list[list[float]]()

        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.AdamW(self.parameters(), lr=self.lr)
            return [optimizer], [{"scheduler": WarmUpMultiStep(optimizer), "interval": "step"}]

        def on_train_batch_start(self, *_: Any) -> None:
            self.rates.append([group["lr"] for group in self.optimizers().param_groups])

    fit(together := Stepped(), swept(grid={"lr": [1e-3, 1e-2, 1e-1]}, mode=mode, keep=1.0))
    for index, lr in enumerate((1e-3, 1e-2, 1e-1)):
        fit(own := Stepped(lr), LoRACallback(rank=2))
        assert [rates[index] for rates in together.rates] == pytest.approx([rate for (rate,) in own.rates], rel=1e-12)


def test_one_cycle_of_several_groups_takes_ratios_to_its_last_step():
    class Grouped(Quiet):
        def configure_optimizers(self) -> Any:
            matrices, vectors = ([p for p in self.parameters() if (p.ndim > 1) == is_matrix] for is_matrix in (1, 0))
            optimizer = torch.optim.AdamW([{"params": matrices}, {"params": vectors, "weight_decay": 0.0}])
            scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, total_steps=STEPS)
            return [optimizer], [{"scheduler": scheduler, "interval": "step"}]

    sweep = swept(grid={"lr_ratio": [4.0, 16.0]}, keep=1.0)
    assert fit(Grouped(), sweep).global_step == STEPS


@pytest.mark.parametrize("kind", PEAKS)
def test_a_learning_rate_is_the_peak_of_a_cycle(kind: str):
    rates: dict[str, list[float]] = {"a": [], "b": []}

    class Cycled(Quiet):
        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.SGD(self.parameters(), lr=1e-2, momentum=0.9)
            return [optimizer], [{"scheduler": PEAKS[kind](optimizer, 1e-2), "interval": "step"}]

    class Rates(Callback):
        def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
            for group in trainer.optimizers[0].param_groups:
                rates[group["name"]].append(group["lr"])

    sweep = swept(adapters={"a": {"lr": 3e-3}, "b": {}}, keep=1.0, mode="loop")
    fit(Cycled(), sweep, Rates())
    for name, peak in {"a": 3e-3, "b": 1e-2}.items():
        optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1e-2, momentum=0.9)
        scheduler, expected = PEAKS[kind](optimizer, peak), list[float]()
        for _ in range(STEPS):
            expected.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            scheduler.step()
        assert rates[name] == pytest.approx(expected, rel=1e-9)
        assert max(expected) == pytest.approx(peak, rel=0.02)


def test_optimizers_that_may_couple_adapters_are_named():
    class Whole(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:
            return super().step(closure)

    class Own(Quiet):
        def configure_optimizers(self) -> Any:
            return Whole(self.parameters(), lr=1e-2)

    class Steps(Quiet):
        def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
            super().optimizer_step(*args, **kwargs)

    class ByHand(Manual):
        def configure_optimizers(self) -> Any:
            return [Whole(part.parameters(), lr=1e-2) for part in (self.net[0], self.net[1:])]

        def lr_schedulers(self) -> Any:
            return [torch.optim.lr_scheduler.ConstantLR(each) for each in self.trainer.optimizers]

    for kind, match in ((Own, "step of Whole"), (Steps, "optimizer_step of Steps")):
        with pytest.warns(UserWarning, match=f"{match} runs once for all adapters.*automatic_optimization = False"):
            fit(kind(), swept(grid={"lr": [1e-2, 1e-3]}), max_steps=2)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*runs once for all adapters")
        fit(ByHand(), swept(grid={"lr": [1e-2, 1e-3]}), max_steps=2)
        fit(Quiet(), swept(grid={"lr": [1e-2, 1e-3]}), max_steps=2)


def test_what_couples_adapters_is_refused():
    class Plateau(Quiet):
        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.SGD(self.parameters(), lr=1e-2)
            scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "monitor": "val_loss"}}

    class Whole(Quiet):
        def configure_optimizers(self) -> Any:
            return torch.optim.LBFGS(self.parameters())

    class Leveling(Quiet):
        def on_train_batch_start(self, *_: Any) -> None:
            for group in self.optimizers().param_groups:
                group["lr"] = 0.5

    class Kept(Manual):
        def configure_optimizers(self) -> Any:
            optimizers, schedulers = super().configure_optimizers()
            self.returned, self.schedule = schedulers[0], schedulers[1]
            return optimizers, schedulers[:1]

    refusals = {Plateau: "ReduceLROnPlateau", Whole: "LBFGS", Leveling: "own ones have no effect"}
    refusals[Kept] = r"self\.schedule, a CosineAnnealingLR that configure_optimizers does not return"
    for kind, message in refusals.items():
        with pytest.raises(MisconfigurationException, match=message):
            fit(kind(), swept(grid={"lr": [1e-2, 1e-3]}))
    grid = {"lr": [1e-2, 1e-3]}
    with pytest.raises(MisconfigurationException, match="StochasticWeightAveraging treats all adapters"):
        fit(Quiet(), swept(grid=grid), StochasticWeightAveraging(1e-2))
    with pytest.raises(MisconfigurationException, match="a LoRASweep and a LoRACallback"):
        fit(Quiet(), LoRACallback(), swept(grid=grid))


# --- precision


class FullHead(Quiet):
    """Computes its last layer and the loss in float32."""

    def loss(self, batch: list[Tensor]) -> Tensor:
        x, y = batch
        hidden = self.net[:4](x)
        with torch.autocast(hidden.device.type, enabled=False):
            return ((self.net[4](hidden.float()) - y) ** 2).mean()


@pytest.mark.usual_paths  # small layers compute by composition, which obeys autocast in the backward pass too
@pytest.mark.parametrize(("kind", "mode"), [(Quiet, "vmap"), (Quiet, "meet"), (Quiet, "loop"), (FullHead, "loop")])
def test_in_bfloat16_autocast_each_adapter_trains_as_alone_within_rounding(kind: type[Quiet], mode: Any):
    module, sweep = kind(), swept(adapters={name: FOUR[name] for name in "ab"}, keep=1, mode=mode)
    fit(module, sweep, precision="bf16-mixed")
    for name, candidate in sweep.candidates.items():
        own = alone(kind, candidate, precision="bf16-mixed")
        moved = distance(own, alone(kind, candidate, precision="bf16-mixed", max_steps=1))
        assert distance(state(module, name), own) <= (EXACT if mode == "loop" else 0.1 * moved), (name, moved)


# --- manual optimization


class Manual(Quiet):
    """A toy with two optimizers and schedules, that gathers gradients over two batches and steps them itself."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.lr, self.decay = 1e-2, 0.1

    def configure_optimizers(self) -> Any:
        parts = self.net[0], self.net[1:]
        optimizers = [torch.optim.AdamW(p.parameters(), lr=self.lr, weight_decay=self.decay) for p in parts]
        return optimizers, [torch.optim.lr_scheduler.CosineAnnealingLR(each, 100) for each in optimizers]

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = self.loss(batch) / 2
        self.manual_backward(loss)
        if batch_idx % 2:
            for optimizer, scheduler in zip(self.optimizers(), self.lr_schedulers(), strict=True):
                self.clip_gradients(optimizer, gradient_clip_val=0.05)
                optimizer.step()
                optimizer.zero_grad()
                scheduler.step()
        self.log("train_loss", loss, on_epoch=True, on_step=False)
        return loss


class ManualCounts(Manual):
    steps = 0

    def loss(self, batch: list[Tensor]) -> Tensor:
        self.steps += self.training
        return super().loss(batch) * min(1.0, self.steps / 8)


class ManualCentered(Centered, Manual):
    """Moves a buffer, and writes gradients to all that its optimizers hold."""

    def manual_backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        super().manual_backward(loss, *args, **kwargs)
        for optimizer in self.optimizers():
            for parameter in (each for group in optimizer.param_groups for each in group["params"]):
                parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad / 2


def alone_manually(candidate: Candidate, kind: type[Manual] = Manual, **options: Any) -> State:
    rate = Rate(candidate)
    module = kind()
    module.lr, module.decay = rate.lr, rate.decay
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PL_GLOBAL_SEED", str(candidate.seed or 0))
        fit(module, LoRACallback(candidate.config, lr_ratio=candidate.lr_ratio), **options)
    return adapter_state_dict(module)


@pytest.mark.parametrize("kind", [Manual, ManualCounts, ManualCentered])
def test_manual_optimization_trains_each_adapter_bit_for_bit_as_alone(kind: type[Manual]):
    module, sweep = kind(), swept(adapters=FOUR, keep=1)
    run = fit(module, sweep)
    assert run.global_step == STEPS  # as in a fit of one adapter: a step of either optimizer counts
    for name, candidate in sweep.candidates.items():
        assert distance(state(module, name), alone_manually(candidate, kind)) == EXACT, name


@pytest.mark.filterwarnings("ignore:Using ModelCheckpoint with manual optimization")
def test_manual_optimization_resumes_bit_for_bit_and_losers_stay_as_they_stopped(tmp_path):
    whole, sweep = Manual(), swept(adapters=FOUR, keep=0.5)
    fit(whole, sweep, data=Resumable())
    saves = ModelCheckpoint(tmp_path, every_n_train_steps=6, filename="{step}")
    fit(Manual(), swept(adapters=FOUR, keep=0.5), saves, max_steps=6, data=Resumable())
    resumed, again = Manual(), swept(adapters=FOUR, keep=0.5)
    fit(resumed, again, path=tmp_path / "step=6.ckpt", data=Resumable())
    assert again.best == sweep.best
    assert [row["steps"] for row in again.table()] == [row["steps"] for row in sweep.table()] != [STEPS] * len(FOUR)
    for name in FOUR:
        assert distance(state(resumed, name), state(whole, name)) == EXACT, name


def test_manual_optimization_runs_one_adapter_after_the_other_or_is_refused():
    for mode in ("vmap", "meet"):
        with pytest.raises(MisconfigurationException, match=f"mode='{mode}'.*Manual, which optimizes manually"):
            fit(Manual(), swept(grid={"lr": [1e-2, 1e-3]}, mode=mode))
    with pytest.raises(MisconfigurationException, match=r"under DDPStrategy.*Use one device"):
        check_possible(trainer(strategy="ddp"), Manual(), "auto")


# --- validation and other callbacks


@pytest.mark.parametrize("has_index", [True, False])
def test_metrics_of_several_loaders_are_each_adapters_own(has_index: bool, tmp_path: Path):
    data = [loader(8), loader(16)]

    class TwoLoaders(Quiet):
        def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
            loss = self.loss(batch)
            self.log("loss" if has_index else f"loss_{dataloader_idx}", loss, add_dataloader_idx=has_index)

        def on_validation_epoch_end(self) -> None:
            self.log("sum", sum(lora.B.square().sum() for lora in (layer.lora for layer in lora_layers(self).values())))

    keys = [f"loss/dataloader_idx_{index}" if has_index else f"loss_{index}" for index in (0, 1)]
    sweep = swept(adapters=FOUR, monitor=keys[1], direction="min", keep=1.0)
    logger = CSVLogger(tmp_path)
    run = trainer(sweep, limit_val_batches=1.0, max_steps=8, logger=logger)
    run.fit(module := TwoLoaders(), loader(), data)
    losses = dict[str, float]()
    for name in FOUR:
        with using(module, name), torch.no_grad():
            expected = {
                key: torch.stack([module.loss(each) for each in part]).mean()
                for key, part in zip(keys, data, strict=True)
            }
            expected["sum"] = sum(layer.lora.B.square().sum() for layer in lora_layers(module).values())
        losses[name] = float(expected[keys[1]])
        for key, value in expected.items():
            torch.testing.assert_close(run.callback_metrics[f"{key}/{name}"], value)
            assert run.logged_metrics[f"{key}/{name}"] == run.callback_metrics[f"{key}/{name}"]
    assert active_adapter(module) == min(losses, key=lambda name: losses[name])


def test_validation_hooks_of_callbacks_run_once_and_metrics_are_each_adapters_own():
    calls: list[str] = []

    class Hooks(Callback):
        def on_validation_start(self, *_: Any) -> None:
            calls.append("start")

        def on_validation_end(self, trainer: Any, *_: Any) -> None:
            calls.append("end")
            if trainer.sanity_checking:
                return
            assert float(trainer.callback_metrics["val_loss"]) == min(
                float(value) for key, value in trainer.callback_metrics.items() if key.startswith("val_loss/")
            )

    module, sweep = Quiet(), swept(grid={"lr": [1e-4, 3e-2, 1e-2]}, keep=1.0)
    run = fit(module, sweep, Hooks(), max_epochs=2, max_steps=-1)
    assert calls == ["start", "end"] * 3  # the first of the sanity check
    [batch] = list(loader(8))
    for name in sweep.candidates:
        with using(module, name), torch.no_grad():
            assert float(run.callback_metrics[f"val_loss/{name}"]) == pytest.approx(float(module.loss(batch)))


def test_early_stopping_watches_the_best():
    stop = EarlyStopping("val_loss", patience=1, min_delta=100.0)
    run = fit(Quiet(), swept(grid={"lr": [1e-3, 1e-2]}, keep=1.0), stop)
    assert stop.stopped_epoch == 1
    assert run.global_step == 8


def test_a_metric_that_nobody_logs_is_an_error_that_lists_the_others():
    with pytest.raises(MisconfigurationException, match=r"monitor='val_acc'.*logged were val_loss"):
        fit(Quiet(), swept(grid={"lr": [1e-2, 1e-3]}, monitor="val_acc", direction="max"))


class Scored(Quiet):
    """A toy with a metric of which larger values are better."""

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_score", -self.loss(batch))


def test_a_metric_that_is_no_loss_needs_a_direction():
    with pytest.raises(ValueError, match=r"monitor='val_score'.*direction='max'"):
        swept(grid={"lr": [1e-2, 1e-3]}, monitor="val_score")


def test_the_largest_value_wins_where_larger_is_better():
    sweep = swept(grid={"lr": [1e-4, 1e-2]}, monitor="val_score", direction="max")
    fit(Scored(), sweep)
    assert sweep.best == "lr=1e-2"


@pytest.mark.parametrize("kind", [ModelCheckpoint, EarlyStopping])
@pytest.mark.parametrize("metric", ["val_score", "val_score/lr=1e-2"])
def test_a_callback_that_prefers_the_opposite_values_is_refused(kind: Any, metric: str):
    sweep = swept(grid={"lr": [1e-2, 1e-3]}, monitor="val_score", direction="min")
    with pytest.raises(MisconfigurationException, match=rf"direction='min'.*{kind.__name__}.*mode='max'"):
        fit(Scored(), sweep, kind(monitor=metric, mode="max"))


# --- tasks


class Tasks(Quiet):
    pass


class Tolerant(Tasks):
    """Takes whole batches of several tasks, too, from which no start may be computed."""

    def loss(self, batch: Any) -> Tensor:
        return super().loss(batch["de"] if isinstance(batch, dict) else batch)


@pytest.mark.parametrize("kind", [Tasks, Tolerant])
@pytest.mark.parametrize("init", ["eva", "lora_ga", "pissa"])
def test_each_task_starts_from_its_own_batches(init: str, kind: type[Toy]):
    parts = {"en": loader(32, 8), "de": loader(16, 4)}
    module, options = kind(), {"rank": 2, "init": init}
    sweep = swept(adapters={"en": {"data": "en"}, "de": {"data": "de"}}, mode="loop", monitor="train_loss", **options)
    trainer(sweep, max_epochs=3, max_steps=-1).fit(module, parts)
    for name, data in parts.items():
        assert distance(state(module, name), alone(kind, sweep.candidates[name], data=data, max_steps=12)) == EXACT


@pytest.mark.parametrize("mode", ["loop", "meet", "auto"])
def test_each_task_trains_on_its_own_batches(mode: Any):
    parts = {"en": loader(32, 8), "de": loader(16, 4)}
    module = Tasks()
    sweep = swept(adapters={"en": {"data": "en"}, "de": {"data": "de", "rank": 3}}, mode=mode)
    run = trainer(sweep, max_epochs=3, max_steps=-1, limit_val_batches=1.0)
    from lightning.pytorch.utilities import CombinedLoader

    held = {name: loader(8) for name in parts}
    run.fit(module, parts, CombinedLoader(held, "max_size"))
    for name, data in parts.items():
        expected = alone(Tasks, sweep.candidates[name], data=data, max_steps=12)
        assert distance(state(module, name), expected) <= CLOSE
    mean = torch.stack([run.callback_metrics[f"val_loss/{name}"] for name in parts]).mean()
    assert torch.allclose(run.callback_metrics["val_loss"], mean)
