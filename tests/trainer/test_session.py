"""Evaluating an adapter's checkpoint takes ``LoRACallback()`` and the file: the file says how it was made."""

from __future__ import annotations

import copy
import functools
import io
import logging
import math
import warnings
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from torch import nn
from torch.nn.utils.parametrizations import _SpectralNorm
from torch.utils.data import DataLoader

from lightning_lora import (
    LoRACallback,
    LoRAConfig,
    adapter_names,
    adapter_state_dict,
    add_adapter,
    attach,
    detach,
    load_adapter,
    lora_layers,
    merge,
    save_adapter,
    set_adapter,
)
from lightning_lora.attachment import get_attachment
from lightning_lora.storage.checkpoint import RECORD_KEY
from tests.contract import assert_same_bits, raises_and_changes_nothing
from tests.toys import FEATURES, BuiltInConfigureModel, BuiltInSetup, Toy, digest, loader, network, trainer
from tests.trainer.test_checkpoints import fitted, read

OPTIONS: dict[str, Any] = {"rank": 3, "alpha": 5.0, "target_modules": ["net.0", "net.2"], "modules_to_save": ["net.4"]}


class AttachesItself(BuiltInConfigureModel):
    """Attaches in ``configure_model``, as users of sharding strategies do."""

    def configure_model(self) -> None:
        if not hasattr(self, "net"):
            super().configure_model()
            attach(self)


@pytest.mark.filterwarnings("ignore:These adapters are not smaller")
@pytest.mark.parametrize("kind", [Toy, BuiltInSetup, BuiltInConfigureModel, AttachesItself])
@pytest.mark.parametrize("stage", ["validate", "test"])
def test_evaluation_gives_same_metrics_as_saving_run(
    stage: str, kind: type[Toy], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run, module, path = fitted(tmp_path, **OPTIONS)
    run.limit_val_batches = 4
    [expected] = getattr(run, stage)(module, loader(), verbose=False)
    fresh = kind()
    bare = trainer(LoRACallback(), limit_val_batches=4)
    with caplog.at_level(logging.INFO):
        [found] = getattr(bare, stage)(fresh, loader(), ckpt_path=path, verbose=False)
    assert found == expected
    assert get_attachment(fresh).config == get_attachment(module).config
    assert "all other options come from the checkpoint" in caplog.text
    assert "LoRA: 2 layers adapted" in caplog.text


def test_predictions_match_saving_run(tmp_path: Path) -> None:
    run, module, path = fitted(tmp_path, **OPTIONS)
    expected = torch.cat(run.predict(module, loader()))
    found = torch.cat(trainer(LoRACallback()).predict(Toy(), loader(), ckpt_path=path))
    assert torch.equal(found, expected)


def test_later_stage_keeps_loaded_adapter(tmp_path: Path) -> None:
    run, module, path = fitted(tmp_path, **OPTIONS)
    [expected] = run.test(module, loader(), verbose=False)
    fresh, bare = Toy(), trainer(LoRACallback())
    bare.predict(fresh, loader(), ckpt_path=path)
    [found] = trainer(LoRACallback()).test(fresh, loader(), verbose=False)
    assert found == expected


def test_targets_come_from_file(tmp_path: Path) -> None:
    class Convolutional(Toy):
        def build(self) -> None:
            torch.manual_seed(0)
            self.net = nn.Sequential(nn.Unflatten(1, (2, 4)), nn.Conv1d(2, 2, 3, padding=1), nn.Flatten())

    run, module, path = fitted(tmp_path, Convolutional(), rank=1, target_modules=["net.1"])
    [expected] = run.test(module, loader(), verbose=False)
    assert trainer(LoRACallback()).test(Convolutional(), loader(), ckpt_path=path, verbose=False) == [expected]


def test_checkpoint_with_foreign_objects_loads(tmp_path: Path) -> None:
    class Configured(Toy):
        def __init__(self, options: Namespace) -> None:
            super().__init__()
            self.save_hyperparameters()

    options = Namespace(kind=nn.Linear)
    run, module, path = fitted(tmp_path, Configured(options), **OPTIONS)
    [expected] = run.test(module, loader(), verbose=False)
    bare = trainer(LoRACallback())
    assert bare.test(Configured(options), loader(), ckpt_path=path, verbose=False, weights_only=False) == [expected]


def test_options_contradicting_file_are_refused(tmp_path: Path) -> None:
    _, _, path = fitted(tmp_path, **OPTIONS)
    with pytest.raises(ValueError, match=r"rank: net\.0: checkpoint 3, here 2"):
        trainer(LoRACallback(**OPTIONS | {"rank": 2})).test(Toy(), loader(), ckpt_path=path)


@pytest.mark.filterwarnings("ignore:These adapters are not smaller")
def test_resuming_uses_own_options_if_there_are_any(tmp_path: Path) -> None:
    _, _, path = fitted(tmp_path, rank=4)
    with pytest.raises(ValueError, match=r"rank: .*checkpoint 4, here 8"):
        trainer(LoRACallback(rank=8), max_steps=20).fit(Toy(), loader(), ckpt_path=path)


@pytest.mark.parametrize("kind", [Toy, BuiltInSetup, BuiltInConfigureModel, AttachesItself])
def test_resuming_without_options_goes_on_as_with_those_of_the_file(kind: type[Toy], tmp_path: Path) -> None:
    _, _, path = fitted(tmp_path, **OPTIONS)
    states = []
    for options in (OPTIONS, {}):
        module = kind()
        trainer(LoRACallback(**options), max_steps=20).fit(module, loader(), ckpt_path=path)
        states.append(adapter_state_dict(module))
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][name], value) for name, value in states[1].items())


@pytest.mark.filterwarnings("ignore:These adapters are not smaller")
def test_fit_without_checkpoint_keeps_the_defaults(tmp_path: Path) -> None:
    _, _, path = fitted(tmp_path, rank=4)
    module, run = Toy(), trainer(LoRACallback(), max_steps=20)
    run.fit(module, loader(), ckpt_path=path)
    assert lora_layers(module)["net.0"].lora.spec.rank == 4
    other = Toy()
    with pytest.warns(UserWarning, match=r"no part of net\.0, net\.4 trains.*modules_to_save=\['net\.0', 'net\.4'\]"):
        trainer(LoRACallback()).fit(other, loader())
    assert lora_layers(other)["net.2"].lora.spec.rank == 16


def test_changed_dropout_is_said_on_resume(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    _, _, path = fitted(tmp_path, **OPTIONS, dropout=0.25)
    for dropout in (0.25, 0.5):
        caplog.clear()
        with caplog.at_level(logging.INFO):
            trainer(LoRACallback(**OPTIONS, dropout=dropout), max_steps=20).fit(Toy(), loader(), ckpt_path=path)
        said = "training goes on with dropout=0.5; until the checkpoint it was 0.25." in caplog.text
        assert said == (dropout != 0.25)


class Sized(Toy):
    def __init__(self, size: int) -> None:
        super().__init__()
        self.save_hyperparameters()


@pytest.mark.parametrize("module", [Toy(), Sized(3)], ids=["no hyper-parameters", "own hyper-parameters"])
def test_options_reach_the_hyper_parameters_of_csv_logger(module: Toy, tmp_path: Path) -> None:
    trainer(LoRACallback(**OPTIONS), logger=CSVLogger(tmp_path)).fit(module, loader())
    found = yaml.safe_load(next(tmp_path.rglob("hparams.yaml")).read_text())
    assert {name: found[f"lora/{name}"] for name in OPTIONS} == OPTIONS
    assert found["lora/parameters"] == sum(
        factor.numel() for layer in lora_layers(module).values() for factor in layer.lora.parameters()
    )
    assert found.get("size") == (3 if isinstance(module, Sized) else None)


class KeepingLogger(CSVLogger):
    """Refuses to change a parameter, as MLflow's does."""

    def log_hyperparams(self, params: Any = None) -> None:
        for name, value in params.items():
            if self.experiment.hparams.get(name, value) != value:
                raise ValueError(f"Changing param values is not allowed: {name}")
        super().log_hyperparams(params)


def test_logger_that_refuses_another_rank_does_not_stop_the_fit(tmp_path: Path) -> None:
    logger, module = KeepingLogger(tmp_path), Toy()
    trainer(LoRACallback(adapter="first", **OPTIONS), logger=logger).fit(module, loader())
    other = OPTIONS | {"rank": OPTIONS["rank"] + 1}
    with pytest.warns(UserWarning, match=r"KeepingLogger did not take the options.*Changing param.*own for each fit"):
        trainer(LoRACallback(adapter="second", **other), logger=logger).fit(module, loader())
    assert adapter_names(module) == ["first", "second"]


class Data(LightningDataModule):
    def __init__(self, rows: int) -> None:
        super().__init__()
        self.save_hyperparameters()

    def train_dataloader(self) -> DataLoader:
        return loader(self.hparams["rows"])


class Secretive(Toy):
    def __init__(self, secret: str) -> None:
        super().__init__()
        self.save_hyperparameters(logger=False)


@pytest.mark.parametrize("module", [Toy(), Sized(3), Secretive("x")], ids=lambda module: type(module).__name__)
@pytest.mark.parametrize("data", [None, Data(32)], ids=["loader", "datamodule"])
def test_tensorboard_shows_the_options_beside_what_lightning_logs(
    module: Toy, data: Data | None, tmp_path: Path
) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

    run = trainer(LoRACallback(**OPTIONS), logger=TensorBoardLogger(tmp_path))
    run.fit(module, datamodule=data, train_dataloaders=None if data else loader())
    run.logger.save()
    events = EventAccumulator(run.logger.log_dir).Reload()
    content = events.SummaryMetadata("_hparams_/session_start_info").plugin_data.content
    hparams = HParamsPluginData.FromString(content).session_start_info.hparams
    found = {name: value.string_value or value.number_value for name, value in hparams.items()}
    expected = {f"lora/{name}": str(value) if isinstance(value, list) else value for name, value in OPTIONS.items()}
    expected["lora/parameters"] = sum(
        factor.numel() for layer in lora_layers(module).values() for factor in layer.lora.parameters()
    )
    expected |= {"size": 3} if isinstance(module, Sized) else {}
    assert found == expected | ({"rows": 32} if data else {})
    assert yaml.safe_load((Path(run.logger.log_dir) / "hparams.yaml").read_text()).keys() == found.keys()


@pytest.mark.filterwarnings("ignore:These adapters are not smaller")
@pytest.mark.parametrize("entries", [None, [], [3], [{}], [{"root": "", "config": {"rank": "x"}, "seed": 0}]])
def test_unreadable_record_leaves_default_options(entries: Any, tmp_path: Path) -> None:
    _, _, path = fitted(tmp_path, rank=4)
    checkpoint = read(path)
    checkpoint[RECORD_KEY]["adapters"] = entries
    torch.save(checkpoint, tmp_path / "odd.ckpt")
    with pytest.raises(ValueError, match="checkpoint 4, here 16"):
        trainer(LoRACallback()).test(Toy(), loader(), ckpt_path=str(tmp_path / "odd.ckpt"))


@pytest.mark.filterwarnings("ignore:These adapters are not smaller")
def test_without_file_default_attaches_and_warns_untrained() -> None:
    module = Toy()
    with pytest.warns(UserWarning, match="bare base model"):
        trainer(LoRACallback()).test(module, loader(), verbose=False)
    assert {layer.lora.spec.rank for layer in lora_layers(module).values()} == {16}


@pytest.mark.filterwarnings("error:No LoRA adapter:UserWarning")
def test_evaluation_without_options_uses_what_was_loaded_from_a_directory(tmp_path: Path) -> None:
    trained = Toy()
    run = trainer(LoRACallback(rank=2, modules_to_save=["net.4"]), max_epochs=1)
    run.fit(trained, loader())
    save_adapter(trained, tmp_path / "saved")  # its names are relative to trained.net
    expected = run.test(trained, loader(), verbose=False)
    module = Toy()
    load_adapter(module, tmp_path / "saved")
    before = {name: value.clone() for name, value in module.state_dict().items()}
    assert trainer(LoRACallback()).test(module, loader(), verbose=False) == expected
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())


def test_training_on_what_was_loaded_from_a_directory_is_refused_with_the_way_to_do_it(tmp_path: Path) -> None:
    trained = Toy()
    attach(trained, LoRAConfig(rank=2))
    save_adapter(trained, tmp_path / "saved")
    loaded, named, other = Toy(), Toy(), Toy()
    load_adapter(loaded, tmp_path / "saved")
    with pytest.raises(ValueError, match=r"attached to its net.*init_from.*detach on that module"):
        trainer(LoRACallback(rank=2)).fit(loaded, loader())
    add_adapter(named, "saved", tmp_path / "saved")
    with pytest.raises(ValueError, match=r"attached to its net.*init_from"):
        trainer(LoRACallback(rank=2, adapter="saved")).fit(named, loader())
    add_adapter(other, "saved", LoRAConfig(rank=2))
    with pytest.raises(ValueError, match=r"rank: 2 -> 3.*init_from"):
        trainer(LoRACallback(rank=3, adapter="saved")).fit(other, loader())


# --- several fits of one module


def losses(module: Toy, run: Trainer) -> list[float]:
    module.losses.clear()
    run.fit(module, loader())
    return list(module.losses)


def test_second_fit_says_that_it_continues_and_shows_the_table(caplog: pytest.LogCaptureFixture) -> None:
    module = Toy()
    first = losses(module, trainer(LoRACallback(rank=2)))
    norm = math.sqrt(sum(float(layer.delta_weight().double().square().sum()) for layer in lora_layers(module).values()))
    with caplog.at_level(logging.INFO):
        assert losses(module, trainer(LoRACallback(rank=2))) != first
    assert f"continues from the adapters already attached (norm of the updates {norm:.3g})" in caplog.text
    assert "LoRA: 3 layers adapted" in caplog.text


@pytest.mark.parametrize(
    "options",
    [{}, {"modules_to_save": ["net.4"]}, {"bias": "all"}, {"use_dora": True}],
    ids=lambda each: ",".join(each),
)
def test_fresh_fits_of_one_module_are_equal(options: dict[str, Any], caplog: pytest.LogCaptureFixture) -> None:
    module, callback = Toy(), LoRACallback(rank=2, fresh=True, **options)
    first = losses(module, trainer(callback))
    state = adapter_state_dict(module)
    with caplog.at_level(logging.INFO):
        assert losses(module, trainer(callback)) == first
    assert_same_bits(adapter_state_dict(module), state)
    assert "continues" not in caplog.text
    detach(module)
    if "modules_to_save" not in options:
        assert digest(module.net) == digest(network())


def test_fresh_fit_after_another_seed_is_that_of_a_new_module() -> None:
    module, found, expected = Toy(), [], []
    for seed in (1, 2):
        seed_everything(seed)
        found.append(losses(module, trainer(LoRACallback(rank=2, fresh=True))))
        expected.append(losses(Toy(), trainer(LoRACallback(rank=2))))
    assert found == expected
    assert found[0] != found[1]


def test_fresh_fit_without_a_seed_keeps_the_one_it_was_attached_with() -> None:
    module, other = Toy(), Toy()
    attach(module, LoRAConfig(rank=2), seed=5)
    attach(other, LoRAConfig(rank=2), seed=5)
    assert losses(module, trainer(LoRACallback(rank=2, fresh=True))) == losses(other, trainer(LoRACallback(rank=2)))


def test_fresh_resumes_a_checkpoint(tmp_path: Path) -> None:
    _, module, path = fitted(tmp_path)
    resumed, run = Toy(), trainer(LoRACallback(rank=4, fresh=True), max_epochs=3, max_steps=-1)
    run.fit(resumed, loader(), ckpt_path=path)
    again = trainer(LoRACallback(rank=4, fresh=True), max_epochs=3, max_steps=-1)
    assert len(losses(module, again)) == 3 * len(loader())
    module.losses.clear()
    once_more = trainer(LoRACallback(rank=4, fresh=True), max_epochs=3, max_steps=-1)
    once_more.fit(module, loader(), ckpt_path=path)
    assert module.losses == resumed.losses
    assert len(module.losses) == len(loader())


def test_fresh_needs_the_first_values_of_what_trains_in_full() -> None:
    module = Toy()
    trainer(LoRACallback(rank=2, modules_to_save=["net.4"])).fit(module, loader())
    with pytest.raises(MisconfigurationException, match=r"first values of net\.4 were not kept"):
        trainer(LoRACallback(rank=2, modules_to_save=["net.4"], fresh=True)).fit(module, loader())


def test_detach_after_a_fresh_fit_puts_back_what_trained_in_full() -> None:
    module, base = Toy(), digest(Toy())
    trainer(LoRACallback(rank=2, modules_to_save=["net.4"], fresh=True)).fit(module, loader())
    detach(module)
    assert digest(module) == base


class AtEpoch(Callback):
    """Does something to the module at the end of an epoch."""

    def __init__(self, epoch: int, act: Callable[[LightningModule], object]) -> None:
        self.epoch, self.act = epoch, act

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.current_epoch == self.epoch:
            self.act(pl_module)


def merge_and_attach(module: LightningModule) -> None:
    merge(module)
    attach(module, LoRAConfig(rank=2))


@pytest.mark.parametrize("act", [merge, detach, merge_and_attach])
def test_adapters_that_go_while_a_fit_runs_end_it(act: Callable[[LightningModule], object]) -> None:
    run = trainer(LoRACallback(rank=2), AtEpoch(0, act), max_epochs=3, max_steps=-1)
    with pytest.raises(RuntimeError, match="merged or detached while it trains"):
        run.fit(Toy(), loader())


def unfreeze(module: LightningModule) -> None:
    module.net[0].requires_grad_(True)


def train(module: LightningModule) -> None:
    module.trainer.optimizers[0].add_param_group({"params": [module.net[0].weight, module.net[0].bias]})


def replace_optimizer(module: LightningModule) -> None:
    module.trainer.optimizers = [torch.optim.SGD(module.parameters(), lr=1e-3)]


@pytest.mark.parametrize("add", [train, replace_optimizer])
@pytest.mark.parametrize("is_first", [True, False])
def test_base_that_begins_to_train_while_a_fit_runs_ends_it(
    is_first: bool, add: Callable[[LightningModule], object]
) -> None:
    hooks = [AtEpoch(0, add), AtEpoch(0 if is_first else 1, unfreeze)]
    run = trainer(LoRACallback(rank=2), *hooks, max_epochs=4, max_steps=-1)
    with pytest.raises(RuntimeError, match=r"net\.0\.weight, net\.0\.bias were unfrozen and .*modules_to_save"):
        run.fit(module := Toy(), loader())
    assert torch.equal(module.net[0].weight, Toy().net[0].weight)


def test_optimizer_may_be_replaced_while_a_fit_runs() -> None:
    module, base = Toy(), Toy().state_dict()
    trainer(LoRACallback(rank=2), AtEpoch(0, replace_optimizer), max_epochs=2, max_steps=-1).fit(module, loader())
    assert_same_bits({name: module.state_dict()[name] for name in base}, base)


def test_frozen_layers_that_are_unfrozen_in_vain_while_a_fit_runs_are_named() -> None:
    run = trainer(LoRACallback(rank=2), AtEpoch(0, unfreeze), max_epochs=2, max_steps=-1)
    with pytest.warns(UserWarning, match=r"net\.0\.weight, net\.0\.bias were unfrozen .*modules_to_save"):
        run.fit(Toy(), loader())


class HasNorm(Toy):
    """Has a batch norm."""

    def build(self) -> None:
        self.net = nn.Sequential(*network()[:1], nn.BatchNorm1d(16), *network()[1:])

    def predict_step(self, batch: list[torch.Tensor], batch_idx: int) -> torch.Tensor:
        return self.net(batch[0])


@pytest.mark.parametrize("was", [True, False])
@pytest.mark.parametrize("run", ["fit", "validate", "test", "predict"])
def test_a_frozen_norm_is_in_its_own_mode_again_after_a_run_and_detach(run: str, was: bool) -> None:
    module = HasNorm()
    module.net[1].train(was)
    each = trainer(LoRACallback(rank=2, target_modules=["net.0"]), limit_val_batches=1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of evaluating what is untrained
        each.fit(module, loader(), loader()) if run == "fit" else getattr(each, run)(module, loader())
    detach(module)
    assert module.net[1].training is was
    assert module.net[0].training


class UnfreezesInVain(Toy):
    """Calls ``freeze`` and ``unfreeze`` around validation, the sanity check included."""

    def on_validation_start(self) -> None:
        self.freeze()

    def on_validation_end(self) -> None:
        self.unfreeze()


class UnfreezesAtStart(Toy):
    """Calls ``unfreeze`` when its optimizer is made already."""

    def on_fit_start(self) -> None:
        self.unfreeze()


@pytest.mark.parametrize("kind", [UnfreezesInVain, UnfreezesAtStart])
def test_a_base_that_hooks_unfreeze_in_vain_stays_as_it_is(kind: type[Toy]) -> None:
    module, plain, options = kind(), Toy(), {"limit_val_batches": 1, "num_sanity_val_steps": 1}
    with pytest.warns(UserWarning, match=r"net\.0\.weight, .* were unfrozen .*modules_to_save"):
        trainer(LoRACallback(rank=2), **options).fit(module, loader(), loader())
    trainer(LoRACallback(rank=2), **options).fit(plain, loader(), loader())
    assert digest(module) == digest(plain)


def test_adapters_may_be_merged_after_the_last_step() -> None:
    merged_inside, merged_after = Toy(), Toy()
    trainer(LoRACallback(rank=2), AtEpoch(1, merge), max_epochs=2, max_steps=-1).fit(merged_inside, loader())
    trainer(LoRACallback(rank=2), max_epochs=2, max_steps=-1).fit(merged_after, loader())
    merge(merged_after)
    assert_same_bits(merged_inside.state_dict(), merged_after.state_dict())


def test_adapters_may_be_switched_while_a_fit_runs() -> None:
    def there_and_back(module: LightningModule) -> None:
        add_adapter(module, "two", LoRAConfig(rank=4))
        set_adapter(module, "two")
        set_adapter(module, "one")

    switched, plain = Toy(), Toy()
    trainer(LoRACallback(rank=2, adapter="one"), AtEpoch(0, there_and_back), max_steps=8).fit(switched, loader())
    trainer(LoRACallback(rank=2, adapter="one"), max_steps=8).fit(plain, loader())
    assert_same_bits(adapter_state_dict(switched), adapter_state_dict(plain))


@pytest.mark.parametrize("run", ["fit", "test"])
def test_a_checkpoint_that_is_missing_is_named_before_anything_is_attached(run: str) -> None:
    module, call = Toy(), trainer(LoRACallback())
    with pytest.raises(FileNotFoundError, match=r"ckpt_path='.*missing.ckpt' does not exist"):
        getattr(call, run)(module, loader(), ckpt_path="missing.ckpt")
    assert not lora_layers(module)


class RebuildsHead(Toy):
    """Builds a part of itself anew at every stage."""

    def build(self) -> None:
        self.body = network()

    def setup(self, stage: str) -> None:
        with torch.random.fork_rng():
            torch.manual_seed(1)
            self.head = nn.Linear(FEATURES, FEATURES)

    @property
    def net(self) -> Any:
        return lambda x: self.head(self.body(x))


@pytest.mark.parametrize("stage", ["validate", "test", "fit"])
@pytest.mark.parametrize("options", [{}, {"modules_to_save": ["head"]}], ids=["adapted", "in full"])
def test_a_stage_that_replaces_trained_layers_says_what_is_lost(
    options: dict[str, Any], stage: str, tmp_path: Path
) -> None:
    module, callback = RebuildsHead(), LoRACallback(rank=2, **options)
    run = trainer(callback, limit_val_batches=1)
    run.fit(module, loader())
    run.save_checkpoint(tmp_path / "trained.ckpt")
    with pytest.warns(UserWarning, match=r"hooks of RebuildsHead have replaced head since .* is lost.*ckpt_path"):
        getattr(trainer(callback, limit_val_batches=1), stage)(module, loader())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of resuming within an epoch
        warnings.filterwarnings("error", message=".*replaced")
        path = tmp_path / "trained.ckpt"
        getattr(trainer(callback, limit_val_batches=1, max_steps=4), stage)(module, loader(), ckpt_path=path)
        if stage == "fit":
            fit_anew = LoRACallback(rank=2, fresh=True, **options)
            trainer(fit_anew).fit(RebuildsHead(), loader())


@pytest.mark.parametrize(("kind", "hook"), [(BuiltInSetup, "setup"), (BuiltInConfigureModel, "configure_model")])
def test_loading_into_a_module_that_is_not_built_yet_names_the_hook_that_builds_it(
    kind: type[Toy], hook: str, tmp_path: Path
) -> None:
    _, _, path = fitted(tmp_path, **OPTIONS)
    with pytest.raises(ValueError, match=rf"If {hook} of {kind.__name__} builds layers .* call it before"):
        load_adapter(kind(), path)
    with pytest.raises(ValueError, match="Linear") as error:
        load_adapter(nn.Linear(2, 2), path)
    assert "builds layers" not in str(error.value)


@pytest.mark.parametrize(
    "options", [{}, {"init": "eva"}, {"use_dora": True, "rank_schedule": "cubic"}, {"init": "olora"}]
)
def test_a_fit_computes_normalized_weights_in_forward_passes_alone(
    options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each reading of such a weight in train mode is a power iteration, which moves its state."""
    module, counts = Toy(), {"iterations": 0, "passes": 0}
    module.net = nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 8))
    for parameter in module.parameters():
        parameter.data.mul_(3).add_(0.1)  # or they would look untrained, and nothing would ask which ones are new
    nn.utils.parametrizations.spectral_norm(module.net[2])
    iterate = _SpectralNorm._power_method

    def counted(*args: Any) -> None:
        counts["iterations"] += 1
        iterate(*args)

    def passed(part: nn.Module, _: Any) -> None:
        counts["passes"] += part.training

    monkeypatch.setattr(_SpectralNorm, "_power_method", counted)
    module.net[2].register_forward_pre_hook(passed)
    callback = LoRACallback(rank=2, target_modules=["net.0", "net.4"], modules_to_save=["net.2"], **options)
    run = trainer(callback, max_steps=8, limit_val_batches=1)
    run.fit(module, loader(), loader())
    run.save_checkpoint(tmp_path / "saved.ckpt")
    assert counts["iterations"] == counts["passes"] >= 8


class Copies(Callback):
    """Copies the module, by copying or by pickling, at two moments of a fit."""

    def __init__(self, copied: Callable[[Any], Any]) -> None:
        self.copied, self.copies = copied, list[Any]()

    def on_train_start(self, trainer: Any, module: Any) -> None:
        self.copies.append(self.copied(module))

    def on_train_end(self, trainer: Any, module: Any) -> None:
        self.copies.append(self.copied(module))


class Rated(Toy):
    lr = 1e-2

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=self.lr)


def saved_and_loaded(thing: Any) -> Any:
    file = io.BytesIO()
    torch.save(thing, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("copied", [copy.deepcopy, saved_and_loaded])
@pytest.mark.parametrize("index", [0, 1])
def test_a_copy_that_is_made_during_a_fit_is_a_module_of_its_own(copied: Callable[[Any], Any], index: int) -> None:
    copies = Copies(copied)
    trainer(LoRACallback(rank=2), copies).fit(module := Rated(), loader())
    twin, before = copies.copies[index], adapter_state_dict(module)
    twin.lr = 1e-3
    run = trainer(LoRACallback(rank=2))
    run.fit(twin, loader())
    [group] = run.optimizers[0].param_groups
    assert group["lr"] == 1e-3
    assert {*group["params"]} == {each for each in twin.parameters() if each.requires_grad}
    assert_same_bits(adapter_state_dict(module), before)


def sgd_of(module: nn.Module) -> Any:
    return torch.optim.SGD(module.parameters(), lr=1e-4)


@pytest.mark.parametrize("copied", [copy.deepcopy, saved_and_loaded])
def test_a_copy_keeps_a_method_that_was_set_on_the_module(copied: Callable[[Any], Any]) -> None:
    module, copies = Rated(), Copies(copied)
    module.configure_optimizers = functools.partial(sgd_of, module)  # type: ignore[method-assign]
    trainer(LoRACallback(rank=2), copies).fit(module, loader())
    for twin in copies.copies:
        optimizer = twin.configure_optimizers()
        assert isinstance(optimizer, torch.optim.SGD)
        assert {*optimizer.param_groups[0]["params"]} == {*twin.parameters()}


@pytest.mark.parametrize("copied", [copy.deepcopy, saved_and_loaded])
def test_a_copied_trainer_saves_the_module_that_it_trains(copied: Callable[[Any], Any], tmp_path: Path) -> None:
    run = trainer(LoRACallback(rank=2))
    run.fit(Rated(), loader())
    run.save_checkpoint(tmp_path / "first.ckpt")
    twin = copied(run)
    twin.fit_loop.epoch_loop.max_steps = 6
    twin.fit(twin.lightning_module, loader())
    twin.save_checkpoint(tmp_path / "twin.ckpt")
    for each, name in ((run, "first"), (twin, "twin")):
        load_adapter(loaded := Rated(), tmp_path / f"{name}.ckpt")
        assert_same_bits(adapter_state_dict(loaded), adapter_state_dict(each.lightning_module))
    assert twin.global_step == 6


class LacksARate(Toy):
    """Has an error of its own."""

    def configure_optimizers(self) -> torch.optim.Optimizer:
        raise ValueError("no learning rate")


@pytest.mark.parametrize(
    ("kind", "options", "match"),
    [
        (Toy, {"export_dir": "there"}, "there.*overwrite=True"),
        (Toy, {"allow_untrained": ["nope"]}, "nope"),
        (LacksARate, {}, "no learning rate"),
    ],
    ids=["export_dir", "allow_untrained", "own"],
)
def test_a_first_fit_that_is_refused_leaves_the_base(
    kind: type[Toy], options: dict[str, Any], match: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    attach(other := Toy(), LoRAConfig(rank=2))
    save_adapter(other, "there")
    module = kind()
    with raises_and_changes_nothing(module.net, (ValueError, OSError, MisconfigurationException), match):
        trainer(LoRACallback(rank=2, **options)).fit(module, loader())


def test_a_refused_resume_leaves_a_merged_module_as_it_is(tmp_path: Path) -> None:
    module, kept = Toy(), ModelCheckpoint(tmp_path)
    trainer(LoRACallback(rank=2, merge_on_teardown=True), kept).fit(module, loader())
    path = kept.best_model_path
    with raises_and_changes_nothing(module.net, RuntimeError, "merged"):
        trainer(LoRACallback(rank=2), max_steps=9).fit(module, loader(), ckpt_path=path)
