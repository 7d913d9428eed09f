"""The callback under one device: what a user's run does from attaching to teardown."""

from __future__ import annotations

import copy
import inspect
import pickle
import warnings
from typing import Any

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, seed_everything
from lightning.pytorch.callbacks import (
    BackboneFinetuning,
    Callback,
    EMAWeightAveraging,
    LearningRateFinder,
    ModelCheckpoint,
    StochasticWeightAveraging,
    WeightAveraging,
)
from lightning.pytorch.tuner import Tuner
from torch import Tensor, nn
from torch.optim.lr_scheduler import CosineAnnealingLR

from lightning_lora import LoRACallback, LoRAConfig, LoRALayer, attach, detach, load_adapter, lora_layers, merge
from lightning_lora.config import OPTIONS
from tests.toys import FEATURES, BuiltInConfigureModel, BuiltInSetup, Toy, digest, loader, network, snapshot, trainer

LAYERS = ["net.0", "net.2", "net.4"]


def adapters_moved(module: nn.Module) -> list[str]:
    return [name for name, layer in lora_layers(module).items() if layer.lora.B.any()]


class Held(Callback):
    """Notes which parameters the optimizers hold when training begins."""

    def on_train_start(self, trainer: Any, pl_module: LightningModule) -> None:
        names = {id(p): name for name, p in pl_module.named_parameters()}
        self.names = [[names[id(p)] for g in o.param_groups for p in g["params"]] for o in trainer.optimizers]


@pytest.mark.parametrize(
    ("wrong", "hint"),
    [
        ("r", "Did you mean 'rank'"),
        ("lora_alpha", "Did you mean 'alpha'"),
        ("lora_dropout", "Did you mean 'dropout'"),
        ("init_lora_weights", "Did you mean 'init'"),
        ("layers_to_transform", "Did you mean 'layers'"),
        ("target_module", "Did you mean 'target_modules'"),
        ("lr_ration", "Did you mean 'lr_ratio'"),
        ("xyz", "Options are adapter, adapter_dtype, allow_untrained, "),
    ],
)
def test_unknown_option_suggests_closest(wrong: str, hint: str) -> None:
    with pytest.raises(TypeError, match=f"LoRACallback has no option '{wrong}'. {hint}"):
        LoRACallback(**{wrong: 8})


@pytest.mark.parametrize(
    ("name", "advice"),
    [
        ("task_type", r"save_adapter\(\.\.\., task_type="),
        ("layers_pattern", r"blocks are found without it"),
        ("seed", r"seed_everything decides.*attach\(module, config, seed="),
    ],
)
def test_option_that_only_peft_has_gets_its_own_answer(name: str, advice: str) -> None:
    with pytest.raises(TypeError, match=f"no option '{name}'.*{advice}"):
        LoRACallback(**{name: "x"})


def test_signature_shows_every_option_with_its_default() -> None:
    shown = inspect.signature(LoRACallback).parameters
    plain = LoRAConfig()
    assert {name: shown[name].default for name in OPTIONS} == {name: getattr(plain, name) for name in OPTIONS}
    assert {"config", "export_dir", "lr_ratio"} <= shown.keys()
    assert not [each for each in shown.values() if each.kind == inspect.Parameter.VAR_KEYWORD]


def test_subclass_shows_a_signature_of_its_own() -> None:
    class Small(LoRACallback):
        def __init__(self, size: int) -> None:
            super().__init__(rank=size)

    class Same(LoRACallback):
        pass

    assert list(inspect.signature(Small).parameters) == ["size"]
    assert inspect.signature(Same) == inspect.signature(LoRACallback)


def test_config_is_taken_as_one_value() -> None:
    config = LoRAConfig(rank=3, target_modules=["head"])
    assert LoRACallback(config).config is LoRACallback(config=config, lr_ratio=2).config is config


def test_two_configs_are_refused() -> None:
    with pytest.raises(TypeError, match="LoRACallback got two configs"):
        LoRACallback(LoRAConfig(rank=3), config=LoRAConfig(rank=4))


@pytest.mark.parametrize(("options", "words"), [({"rank": 4}, "rank=3.*rank=4"), ({"rank": 16}, "rank=3.*rank=16")])
def test_config_and_single_options_contradict(options: dict[str, Any], words: str) -> None:
    with pytest.raises(TypeError, match=f"config or single options, not both.*{words}"):
        LoRACallback(LoRAConfig(rank=3), **options)


def test_positional_argument_that_is_no_config_is_named() -> None:
    with pytest.raises(TypeError, match=r"LoRACallback\.config must be a LoRAConfig, got 8"):
        LoRACallback(8)  # type: ignore[arg-type]


def test_repr_is_the_call_that_makes_it() -> None:
    callback = LoRACallback(rank=8, target_modules=["q_proj"], lr_ratio=16, allow_untrained=["pooler"])
    assert repr(callback) == (
        "LoRACallback(rank=8, target_modules=['q_proj'], allow_untrained=('pooler',), lr_ratio=16.0)"
    )
    assert repr(eval(repr(callback))) == repr(callback)
    assert repr(LoRACallback()) == "LoRACallback()"


# --- attaching at the right moment


@pytest.mark.parametrize("kind", [Toy, BuiltInSetup, BuiltInConfigureModel])
def test_layers_are_adapted_wherever_built(kind: type[Toy]) -> None:
    module, held = kind(), Held()
    trainer(LoRACallback(rank=4), held).fit(module, loader())
    assert adapters_moved(module) == LAYERS
    assert held.names == [[f"{layer}.lora.{factor}" for layer in LAYERS for factor in "AB"]]


@pytest.mark.parametrize("kind", [Toy, BuiltInSetup, BuiltInConfigureModel])
def test_only_adapters_train(kind: type[Toy]) -> None:
    module, base = kind(), network()
    trainer(LoRACallback(rank=4), max_steps=20, max_epochs=-1).fit(module, loader())
    detach(module)
    assert digest(module.net) == digest(base)


@pytest.mark.parametrize("hook", ["setup", "configure_model"])
def test_lazy_layers_may_get_their_shapes_in_a_hook(hook: str) -> None:
    class Lazy(Toy):
        def build(self) -> None:
            self.net = nn.Sequential(nn.LazyLinear(16), nn.LazyBatchNorm1d(), nn.LazyLinear(FEATURES))

        def get_shapes(self, stage: str = "") -> None:
            if self.net[0].has_uninitialized_params():
                self.net(torch.zeros(2, FEATURES))

    setattr(Lazy, hook, Lazy.get_shapes)
    module = Lazy()
    trainer(LoRACallback(rank=4)).fit(module, loader())
    assert adapters_moved(module) == ["net.0", "net.2"]


def test_setup_may_load_base_weights() -> None:
    class Loads(Toy):
        def setup(self, stage: str) -> None:
            self.net.load_state_dict(snapshot(network()))

    module = Loads()
    trainer(LoRACallback(rank=4)).fit(module, loader())
    assert adapters_moved(module) == LAYERS


def test_unmatched_pattern_stops_run() -> None:
    module = BuiltInConfigureModel()
    with pytest.raises(ValueError, match=r"'net\.9' matched no module"):
        trainer(LoRACallback(rank=4, target_modules=["net.0", "net.9"])).fit(module, loader())
    assert not module.losses
    assert not lora_layers(module)


@pytest.mark.filterwarnings("ignore:This fit made no optimizer step")
def test_start_follows_seed_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    def first_factor() -> Tensor:
        module = Toy()
        trainer(LoRACallback(rank=4), max_steps=0).fit(module, loader())
        return lora_layers(module)["net.0"].lora.A.detach().clone()

    monkeypatch.delenv("PL_GLOBAL_SEED", raising=False)
    unseeded = first_factor()
    assert torch.equal(unseeded, first_factor())  # no seed is seed 0, not another start every time
    monkeypatch.setenv("PL_GLOBAL_SEED", "3")
    seed_everything(3, verbose=False)
    seeded = first_factor()
    assert not torch.equal(seeded, unseeded)
    reference = network()
    attach(nn.ModuleDict({"net": reference}), LoRAConfig(rank=4), seed=3)
    assert torch.equal(seeded, lora_layers(reference)["0"].lora.A)


def test_report_is_logged_once_per_fit(caplog: pytest.LogCaptureFixture) -> None:
    module, callback = Toy(), LoRACallback(rank=4)
    with caplog.at_level("INFO"):
        for fits in (1, 2):
            trainer(callback).fit(module, loader())
            trainer(callback).test(module, loader(), verbose=False)
            assert sum("layers adapted" in record.getMessage() for record in caplog.records) == fits


# --- one callback, many runs


def test_callback_is_reusable() -> None:
    callback, first, second = LoRACallback(rank=4), Toy(), BuiltInConfigureModel()
    with pytest.warns(UserWarning, match="bare base model"):
        trainer(callback, limit_val_batches=1).validate(first, loader(), verbose=False)
    trainer(callback).fit(first, loader())
    before = snapshot(first)
    trainer(callback).test(first, loader(), verbose=False)
    assert all(torch.equal(value, before[name]) for name, value in first.state_dict().items())
    trainer(callback).fit(first, loader())
    assert adapters_moved(first) == LAYERS
    assert any(not torch.equal(value, before[name]) for name, value in first.state_dict().items())
    trainer(callback).fit(second, loader())
    assert adapters_moved(second) == LAYERS
    assert not any(
        isinstance(part, LoRALayer) for layer in lora_layers(second).values() for part in layer.lora.modules()
    )


def test_stage_leaves_no_wraps() -> None:
    module = BuiltInConfigureModel()
    own = set(vars(module))
    trainer(LoRACallback(rank=4)).fit(module, loader())
    assert not {name for name in set(vars(module)) - own if callable(vars(module)[name])}
    assert not module._load_state_dict_post_hooks
    copied = pickle.loads(pickle.dumps(copy.deepcopy(module)))
    x = torch.randn(3, FEATURES)
    assert torch.equal(copied.net(x), module.net(x))


class Fails(BuiltInConfigureModel):
    fails = True

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        if batch_idx == 1 and self.fails:
            raise RuntimeError("boom")
        return super().training_step(batch, batch_idx)


def test_exception_leaves_no_wraps_and_module_can_be_fitted_again() -> None:
    module, callback = Fails(), LoRACallback(rank=4, merge_on_teardown=True)
    base = snapshot(network())
    with pytest.raises(RuntimeError, match="boom"):
        trainer(callback, max_steps=4).fit(module, loader())
    assert not module._load_state_dict_post_hooks
    assert "configure_model" not in vars(module)
    assert all(torch.equal(module.net.state_dict()[name], value) for name, value in base.items())  # not merged
    pickle.dumps(module)
    module.fails = False
    trainer(LoRACallback(rank=4)).fit(module, loader())
    assert adapters_moved(module) == LAYERS


def test_instance_method_is_restored() -> None:
    module = Toy()
    module.configure_optimizers = lambda: torch.optim.SGD(module.parameters(), lr=0.1)
    own = module.configure_optimizers
    trainer(LoRACallback(rank=4)).fit(module, loader())
    assert module.configure_optimizers is own
    assert adapters_moved(module) == LAYERS


# --- no silent no-op


def test_optimizer_built_in_init_gets_adapters() -> None:
    class Early(Toy):
        def build(self) -> None:
            super().build()
            self.optimizer = torch.optim.Adam(self.parameters(), lr=1e-2)

        def configure_optimizers(self) -> Any:
            return self.optimizer

    module, held = Early(), Held()
    trainer(LoRACallback(rank=4), held).fit(module, loader())
    assert held.names == [[f"{layer}.lora.{factor}" for layer in LAYERS for factor in "AB"]]
    assert adapters_moved(module) == LAYERS


def test_module_without_optimizer_is_refused() -> None:
    class Idle(Toy):
        def configure_optimizers(self) -> Any:
            return None

    with (
        pytest.warns(UserWarning, match="no optimizer"),
        pytest.raises(MisconfigurationException, match="No optimizer holds"),
    ):
        trainer(LoRACallback(rank=4)).fit(Idle(), loader())


def test_layers_replaced_after_attaching_are_refused() -> None:
    class Replaces(Callback):
        def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
            pl_module.net[2] = nn.Linear(16, 16)

    with pytest.raises(MisconfigurationException, match=r"Replaced after LoRA was attached.*: net\.2"):
        trainer(LoRACallback(rank=4), Replaces()).fit(Toy(), loader())


def test_undeclared_trainable_parameters_are_refused() -> None:
    class Unfreezes(Callback):
        def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
            pl_module.net[2].bias.requires_grad_(True)

    with pytest.raises(MisconfigurationException, match=r"would train but not be saved.*: net\.2\.bias\."):
        trainer(LoRACallback(rank=4), Unfreezes()).fit(Toy(), loader())


@pytest.mark.parametrize("hook", ["on_fit_start", "on_train_start"])
def test_a_head_that_comes_too_late_to_be_named_is_told_where_to_be_made(hook: str) -> None:
    class Probe(Callback): ...

    def make(self: Any, trainer: Any, pl_module: Any) -> None:
        pl_module.probe = nn.Linear(16, 2)

    setattr(Probe, hook, make)
    with pytest.raises(MisconfigurationException, match=r"probe\.weight.*__init__, setup or configure_model"):
        trainer(Probe(), LoRACallback(rank=4)).fit(Toy(), loader())
    with pytest.raises(ValueError, match=r"modules_to_save='probe' matched no module"):
        trainer(Probe(), LoRACallback(rank=4, modules_to_save=["probe"])).fit(Toy(), loader())


def test_evaluating_untrained_adapters_warns() -> None:
    for stage in ("validate", "test", "predict"):
        with pytest.warns(UserWarning, match="No LoRA adapter has been trained yet"):
            getattr(trainer(LoRACallback(rank=4), limit_val_batches=1), stage)(Toy(), loader())


# --- heads, norms, precision


class StepsNothing(Toy):
    """Manual optimization that forgets to step."""

    automatic_optimization = False

    def training_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.optimizers().zero_grad()


@pytest.mark.filterwarnings("ignore:Total length of:UserWarning")
@pytest.mark.parametrize(("kind", "rows"), [(Toy, 0), (StepsNothing, 32)])
def test_fit_without_step_fails(kind: type[Toy], rows: int, tmp_path: Any) -> None:
    module = kind()
    base = digest(module.net)
    callback = LoRACallback(rank=4, merge_on_teardown=True, export_dir=str(tmp_path / "adapter"))
    with pytest.raises(MisconfigurationException, match="no optimizer step, so no LoRA adapter was trained"):
        trainer(callback, max_steps=-1, max_epochs=1).fit(module, loader(rows))
    assert list(lora_layers(module)) == (LAYERS if rows else [])  # a fit without a batch leaves the base
    assert base.items() <= digest(module.net).items()
    assert not (tmp_path / "adapter").exists()


@pytest.mark.parametrize("none", [{"max_steps": 0}, {"max_epochs": 0}, {"limit_train_batches": 0}])
def test_fit_told_to_make_no_step_warns(none: dict[str, int]) -> None:
    with pytest.warns(UserWarning, match="no optimizer step, so no LoRA adapter was trained"):
        trainer(LoRACallback(rank=4), **none).fit(Toy(), loader())


def test_zero_learning_rate_warns() -> None:
    class NoRate(Toy):
        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.0)

    with pytest.warns(UserWarning, match="No LoRA adapter was trained in 2 steps. Was the learning rate zero"):
        trainer(LoRACallback(rank=4)).fit(NoRate(), loader())


def test_resuming_finished_run(tmp_path: Any) -> None:
    run = trainer(LoRACallback(rank=4))
    run.fit(Toy(), loader())
    run.save_checkpoint(tmp_path / "done.ckpt")
    module = Toy()
    trainer(LoRACallback(rank=4)).fit(module, loader(), ckpt_path=tmp_path / "done.ckpt")
    assert adapters_moved(module) == LAYERS


def test_modules_to_save_train_in_full() -> None:
    module, held = Toy(), Held()
    base = network()
    trainer(LoRACallback(rank=4, modules_to_save=["net.4"]), held).fit(module, loader())
    assert held.names[0][-2:] == ["net.4.weight", "net.4.bias"]
    assert not torch.equal(module.net[4].weight, base[4].weight)
    assert torch.equal(module.net[2].weight, base[2].weight)


class Centered(nn.Module):
    """Subtracts an average that it follows while training, as the codebooks of vector quantization do."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("average", torch.zeros(FEATURES))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.average.lerp_(x.detach().mean(0), 0.5)
        return x - self.average


def test_modules_to_save_keeps_buffers(tmp_path: Any) -> None:
    class Centring(Toy):
        def build(self) -> None:
            self.net = nn.Sequential(Centered(), *network())

    module, fresh, run = Centring(), Centring(), trainer(LoRACallback(rank=4, modules_to_save=["net.0"]))
    run.fit(module, loader())
    run.save_checkpoint(tmp_path / "adapter.ckpt")
    load_adapter(fresh, tmp_path / "adapter.ckpt")
    x = torch.ones(2, FEATURES)
    assert module.net[0].average.any()
    assert torch.equal(fresh.eval().net(x), module.eval().net(x))


class Normed(Toy):
    def build(self) -> None:
        self.net = nn.Sequential(*network()[:1], nn.BatchNorm1d(16), *network()[1:])


def test_frozen_norms_keep_statistics() -> None:
    module = Normed()
    before = digest(module.net[1])
    run = trainer(LoRACallback(rank=4), max_steps=8, limit_val_batches=1, val_check_interval=2)
    run.fit(module, loader(), loader())
    assert digest(module.net[1]) == before


def test_sync_batchnorm_norms_keep_statistics() -> None:
    class Synchronizes(Callback):
        def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
            pl_module.net = nn.SyncBatchNorm.convert_sync_batchnorm(pl_module.net)  # as the strategy does later

        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            pl_module.train()

    module = Normed()
    before = digest(module.net[1])
    trainer(LoRACallback(rank=4), Synchronizes(), max_steps=4).fit(module, loader())
    assert isinstance(module.net[1], nn.SyncBatchNorm)
    assert digest(module.net[1]) == before


def test_tracked_norms_move() -> None:
    module = Normed()
    before = digest(module.net[1])
    trainer(LoRACallback(rank=4, frozen_norm="track"), max_steps=4).fit(module, loader())
    after = digest(module.net[1])
    assert {name for name in after if after[name] != before[name]} == {
        "running_mean",
        "running_var",
        "num_batches_tracked",
    }


@pytest.mark.filterwarnings("ignore:LoRA. this run may learn little")  # at this rate, on purpose
@pytest.mark.parametrize("precision", ["bf16-true", "bf16-mixed", "32-true"])
def test_factors_stay_float32_and_move(precision: str) -> None:
    class Slow(Toy):
        def configure_optimizers(self) -> Any:
            return torch.optim.AdamW(self.parameters(), lr=1e-5, weight_decay=0.0)

        def on_train_start(self) -> None:
            for layer in lora_layers(self).values():
                nn.init.normal_(layer.lora.B)  # both factors get gradients from the first step on
            self.before = snapshot(self)

    module = Slow()
    trainer(LoRACallback(rank=4), precision=precision, max_steps=20, max_epochs=-1).fit(module, loader())
    moved = total = 0
    for layer in lora_layers(module).values():
        for name, factor in layer.lora.named_parameters():
            assert factor.dtype == torch.float32
            full = f"{next(n for n, m in module.named_modules() if m is layer)}.lora.{name}"
            moved += int((factor != module.before[full]).sum())
            total += factor.numel()
    assert moved > 0.95 * total


def test_double_precision_reaches_the_factors() -> None:
    module = Toy()
    trainer(LoRACallback(rank=4), precision="64-true").fit(module, loader())
    assert {p.dtype for layer in lora_layers(module).values() for p in layer.lora.parameters()} == {torch.float64}


# --- merging


def test_merge_on_teardown_leaves_equal_plain_model() -> None:
    class Remembers(Callback):
        def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
            self.output = pl_module.net.eval()(x)

    x = torch.randn(5, FEATURES)
    module, remembers = Toy(), Remembers()
    callback = LoRACallback(rank=4, merge_on_teardown=True)
    run = trainer(callback, remembers, max_steps=8, max_epochs=-1)
    run.fit(module, loader())
    assert not lora_layers(module)
    assert type(module.net[0]) is nn.Linear
    torch.testing.assert_close(module.net(x), remembers.output)
    assert all(p.requires_grad for p in module.parameters())
    before = snapshot(module)
    run.test(module, loader(), verbose=False)  # evaluates the merged weights, with no adapters on top
    assert not lora_layers(module)
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())


def test_checkpoint_into_merged_model_is_refused(tmp_path: Any) -> None:
    module = Toy()
    checkpoint = ModelCheckpoint(tmp_path, monitor="val_loss")
    run = trainer(
        LoRACallback(rank=4, merge_on_teardown=True), checkpoint, max_epochs=3, max_steps=-1, limit_val_batches=1
    )
    run.fit(module, loader(), loader())
    before = snapshot(module)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="already merged"):
            run.test(module, loader(), ckpt_path="best", verbose=False)
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    run.test(module, loader(), verbose=False)  # the refused checkpoint does not haunt the next stage


def test_best_checkpoint_evaluates_as_saved(tmp_path: Any) -> None:
    checkpoint = ModelCheckpoint(tmp_path, monitor="val_loss")
    run = trainer(LoRACallback(rank=4), checkpoint, max_epochs=3, max_steps=-1, limit_val_batches=1.0)
    run.fit(Toy(), loader(), loader())
    fresh = trainer(LoRACallback(rank=4), limit_val_batches=1.0)
    for _ in range(2):
        [metrics] = fresh.validate(Toy(), loader(), ckpt_path=checkpoint.best_model_path, verbose=False)
        assert metrics["val_loss"] == pytest.approx(float(checkpoint.best_model_score), rel=1e-6)


def test_merged_model_can_be_adapted_again(tmp_path: Any) -> None:
    module = Toy()
    trainer(LoRACallback(rank=4, merge_on_teardown=True)).fit(module, loader())
    checkpoint = ModelCheckpoint(tmp_path, save_last=True)
    trainer(LoRACallback(rank=4), checkpoint).fit(module, loader())
    trainer(LoRACallback(rank=4)).test(module, loader(), ckpt_path=checkpoint.last_model_path, verbose=False)
    with pytest.raises(RuntimeError, match="trained on a base with another adapter merged"):
        trainer(LoRACallback(rank=4)).test(Toy(), loader(), ckpt_path=checkpoint.last_model_path, verbose=False)


def test_adapter_on_a_merged_base_loads_onto_the_saved_merged_weights(tmp_path: Any) -> None:
    module = Toy()
    trainer(LoRACallback(rank=4, merge_on_teardown=True)).fit(module, loader())
    torch.save(module.state_dict(), tmp_path / "merged.pt")
    second = trainer(LoRACallback(rank=4))
    second.fit(module, loader())
    second.save_checkpoint(path := tmp_path / "second.ckpt")
    x = torch.randn(3, FEATURES)

    def merged_base() -> Toy:
        base = Toy()
        base.load_state_dict(torch.load(tmp_path / "merged.pt"))
        return base

    load_adapter(loaded := merged_base(), path)
    assert torch.equal(loaded.net(x), module.net(x))
    trainer(LoRACallback()).test(tested := merged_base(), loader(), ckpt_path=path, verbose=False)
    assert torch.equal(tested.net(x), module.net(x))
    trainer(LoRACallback(rank=4, init_from=path), max_steps=1).fit(merged_base(), loader())
    with pytest.raises(RuntimeError, match="trained on a base with another adapter merged"):
        load_adapter(Toy(), path)
    load_adapter(Toy(), path, check_base=False)


# --- other callbacks


@pytest.mark.parametrize("other", [WeightAveraging, EMAWeightAveraging, lambda: StochasticWeightAveraging(1e-2)])
def test_averaging_callback_listed_first_is_refused(other: Any) -> None:
    with pytest.raises(MisconfigurationException, match="List LoRACallback first"):
        trainer(other(), LoRACallback(rank=4)).fit(Toy(), loader())


def test_finetuning_and_second_lora_callbacks_are_refused() -> None:
    with pytest.raises(MisconfigurationException, match="BackboneFinetuning changes which parameters train"):
        trainer(LoRACallback(rank=4), BackboneFinetuning()).fit(Toy(), loader())
    with pytest.raises(MisconfigurationException, match="two LoRACallbacks"):
        trainer(LoRACallback(rank=4), _Other(rank=2)).fit(Toy(), loader())


class _Other(LoRACallback):
    @property
    def state_key(self) -> str:
        return "other"


@pytest.mark.parametrize("kind", [Toy, BuiltInConfigureModel])
def test_averaging_keeps_base_and_resumes(kind: type[Toy], tmp_path: Any) -> None:
    def run(epochs: int, ckpt_path: str | None = None) -> tuple[Toy, ModelCheckpoint, Any]:
        module, checkpoint = kind(), ModelCheckpoint(tmp_path / str(epochs), save_last=True)
        fitter = trainer(
            LoRACallback(rank=4), EMAWeightAveraging(decay=0.5), checkpoint, max_epochs=epochs, max_steps=-1
        )
        fitter.fit(module, loader(), ckpt_path=ckpt_path)
        return module, checkpoint, fitter

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*configure_model.*")
        whole, *_ = run(3)
        _, checkpoint, _ = run(2)
        saved = torch.load(checkpoint.last_model_path, weights_only=True)
        resumed, _, _ = run(3, checkpoint.last_model_path)
    names = {f"{layer}.lora.{factor}" for layer in LAYERS for factor in "AB"}
    assert set(saved["state_dict"]) == set(saved["current_model_state"]) == names
    assert resumed.losses == whole.losses[8:]
    detach(resumed)
    assert digest(resumed.net) == digest(network())


def test_averaging_with_module_setup() -> None:
    class Prepares(Toy):
        def setup(self, stage: str) -> None:
            self.prepared = True

    module = Prepares()
    trainer(LoRACallback(rank=4), EMAWeightAveraging(decay=0.5)).fit(module, loader())
    assert adapters_moved(module) == LAYERS


def test_swa_averages_adapter() -> None:
    module = Toy()
    swa = StochasticWeightAveraging(1e-2, swa_epoch_start=1)
    trainer(LoRACallback(rank=4), swa, max_epochs=4, max_steps=-1).fit(module, loader())
    assert adapters_moved(module) == LAYERS
    detach(module)
    assert digest(module.net) == digest(network())


@pytest.mark.parametrize("frozen_norm", ["eval", "track"])
def test_learning_rate_finder_leaves_no_trace(frozen_norm: str, tmp_path: Any) -> None:
    class Finds(Normed):
        lr = 1e-2

        def configure_optimizers(self) -> Any:
            return torch.optim.AdamW(self.parameters(), lr=self.lr)

    class Compares(Callback):
        def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
            self.before = snapshot(pl_module)

        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            if trainer.fit_loop.epoch_loop.max_steps != 6:  # not the finder's own training
                self.after = snapshot(pl_module)

    module, compares = Finds(), Compares()
    finder = LearningRateFinder(num_training_steps=6, min_lr=1e-5, early_stop_threshold=None)
    trainer(LoRACallback(rank=4, frozen_norm=frozen_norm), compares, finder, max_steps=2, root=tmp_path).fit(
        module, loader(64)
    )
    assert all(torch.equal(compares.after[name], value) for name, value in compares.before.items())
    assert adapters_moved(module)


@pytest.mark.parametrize("way", ["tuner", "callback"])
def test_a_search_for_the_rate_with_lr_ratio_warns_once(way: str, tmp_path: Any, recwarn: Any) -> None:
    class Finds(Toy):
        lr = 1e-2

        def configure_optimizers(self) -> Any:
            return torch.optim.AdamW(self.parameters(), lr=self.lr)

    options: dict[str, Any] = {"num_training_steps": 6, "early_stop_threshold": None}
    if way == "callback":
        run = trainer(LoRACallback(rank=4, lr_ratio=16.0), LearningRateFinder(**options), root=tmp_path)
        run.fit(Finds(), loader(64))
    else:
        run = trainer(LoRACallback(rank=4, lr_ratio=16.0), root=tmp_path)
        Tuner(run).lr_find(Finds(), loader(64), num_training=6, early_stop_threshold=None)
    [found] = [str(each.message) for each in recwarn if "lr_ratio" in str(each.message)]
    assert "lr_ratio=16 has no effect while they search" in found


# --- several optimizers


class Duel(LightningModule):
    """Two optimizers, stepped by hand, each for its own half, as in a GAN."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.left, self.right = network(), network()

    def training_step(self, batch: list[Tensor], batch_idx: int) -> None:
        for half, optimizer in zip((self.left, self.right), self.optimizers(), strict=True):
            self.toggle_optimizer(optimizer)
            loss = ((half(batch[0]) - batch[1]) ** 2).mean()
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()
            self.untoggle_optimizer(optimizer)

    def configure_optimizers(self) -> Any:
        return [torch.optim.Adam(half.parameters(), lr=1e-2) for half in (self.left, self.right)]


def test_each_optimizer_keeps_its_adapters() -> None:
    module, held = Duel(), Held()
    trainer(LoRACallback(rank=4), held, max_steps=4).fit(module, loader())
    left, right = held.names
    assert all(name.startswith("left.") for name in left)
    assert all(name.startswith("right.") for name in right)
    assert len(left) == len(right) == 6
    assert len(adapters_moved(module)) == 6
    detach(module)
    assert digest(module.left) == digest(module.right) == digest(network())


def test_empty_optimizer_warns() -> None:
    module = Duel()
    callback = LoRACallback(rank=4, target_modules=["left.0"])
    module.training_step = lambda batch, batch_idx: _step_left(module, batch)
    with pytest.warns(UserWarning, match=r"optimizer 1 \(Adam\) no longer holds a trainable parameter"):
        trainer(callback).fit(module, loader())
    assert adapters_moved(module) == ["left.0"]


def _step_left(module: Duel, batch: list[Tensor]) -> None:
    optimizer, idle = module.optimizers()
    optimizer.zero_grad()
    module.manual_backward(((module.left(batch[0]) - batch[1]) ** 2).mean())
    optimizer.step()
    idle.step()


def test_schedulers_drive_lora_plus() -> None:
    class Scheduled(Toy):
        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.AdamW(self.parameters(), lr=1e-2)
            return [optimizer], [{"scheduler": CosineAnnealingLR(optimizer, 8), "interval": "step"}]

        def on_train_batch_end(self, *args: Any) -> None:
            self.rates = [group["lr"] for group in self.optimizers().param_groups]
            self.ratios = [*getattr(self, "ratios", []), self.rates[1] / self.rates[0]]

    module = Scheduled()
    trainer(LoRACallback(rank=4, lr_ratio=16.0), max_steps=6, max_epochs=-1).fit(module, loader())
    assert module.rates[0] < 1e-2
    assert module.ratios == pytest.approx([16.0] * 6)


def test_merge_after_fit() -> None:
    module = Toy()
    trainer(LoRACallback(rank=4), max_steps=8, max_epochs=-1).fit(module, loader())
    x = torch.randn(3, FEATURES)
    expected = module.net(x)
    merge(module)
    torch.testing.assert_close(module.net(x), expected)


class MadeInInit(Toy):
    """Makes its optimizer before any adapter is there."""

    kind: Any = torch.optim.AdamW

    def build(self) -> None:
        super().build()
        self.made = self.kind(self.parameters(), lr=1e-2)

    def configure_optimizers(self) -> Any:
        return self.made


@pytest.mark.parametrize("options", [{"fresh": True}, {"lr_ratio": 4.0}])
def test_an_optimizer_that_a_fit_has_used_is_refused_where_that_would_count(options: dict[str, Any]) -> None:
    module = MadeInInit()
    trainer(LoRACallback(rank=2, **options)).fit(module, loader())
    [option] = options
    with pytest.raises(
        MisconfigurationException,
        match=rf"AdamW that an earlier fit has used.*new one for {option}.*not in __init__",
    ):
        trainer(LoRACallback(rank=2, **options)).fit(module, loader())


@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.Adam, torch.optim.Adagrad, torch.optim.SGD])
def test_an_optimizer_of_init_goes_on_in_a_second_fit_and_takes_another_adapter(kind: Any) -> None:
    module = type("Made", (MadeInInit,), {"kind": kind})()
    for name in ("one", "one", "two"):
        run = trainer(LoRACallback(adapter=name, rank=2))
        run.fit(module, loader())
    held = {*run.optimizers[0].param_groups[0]["params"]}
    assert held >= {factor for layer in lora_layers(module).values() for factor in layer.lora.parameters()}
    assert all(layer.lora.B.any() for layer in lora_layers(module).values())
