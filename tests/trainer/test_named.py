"""LoRACallback(adapter=...): trains one of several adapters, and leaves the others as they are."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import LightningDataModule
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.tuner import Tuner
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_lora import (
    LoRACallback,
    active_adapter,
    adapter_names,
    adapter_state_dict,
    add_adapter,
    combine,
    detach,
    disabled,
    load_adapter,
    load_adapter_state_dict,
    lora_layers,
    merged,
    preflight,
    remove_adapter,
    routed,
    save_adapter,
    scaled,
    set_adapter,
    truncate_adapter,
    using,
)
from lightning_lora.adapted_model import AdaptedModel
from lightning_lora.analysis import analyze, compare
from lightning_lora.attachment import get_attachment
from lightning_lora.base_buffers import copied
from lightning_lora.callback import LoRAConfig
from lightning_lora.names import OTHERS
from tests.contract import assert_same_bits, raises_and_changes_nothing
from tests.toys import FEATURES, BuiltInConfigureModel, BuiltInSetup, Toy, loader, trainer

OPTIONS: dict[str, Any] = {"rank": 2, "target_modules": ["net.0", "net.2"], "modules_to_save": ["net.4"]}
HEADLESS: dict[str, Any] = OPTIONS | {"modules_to_save": []}


def state(module: Toy, name: str) -> dict[str, torch.Tensor]:
    with using(module, name):
        return adapter_state_dict(module)


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())


def fit(module: Toy, *callbacks: Any, path: str | None = None, **options: Any) -> Any:
    run = trainer(*callbacks, **options)
    run.fit(module, loader(), ckpt_path=path)
    return run


@pytest.mark.parametrize("kind", [Toy, BuiltInSetup, BuiltInConfigureModel])
def test_each_task_trains_as_it_does_alone(kind: type[Toy]):
    module = kind()
    tasks = {"first": OPTIONS, "second": OPTIONS | {"rank": 1, "modules_to_save": []}}
    for name, options in tasks.items():
        fit(module, LoRACallback(adapter=name, **options))
        assert active_adapter(module) == name
    for name, options in tasks.items():
        alone = kind()
        fit(alone, LoRACallback(**options))
        assert same(state(module, name), adapter_state_dict(alone))


@pytest.mark.parametrize("adapter", [None, "first"])
@pytest.mark.parametrize("name", [None, "first", "second"])
def test_a_trainer_evaluates_what_is_in_place_inside_using(name: str | None, adapter: str | None):
    module = Toy()
    for steps, each in enumerate(("first", "second"), 1):
        fit(module, LoRACallback(adapter=each, **OPTIONS), max_steps=steps)
    run = trainer(LoRACallback(adapter=adapter, **(OPTIONS if adapter else {})), limit_val_batches=1)
    with using(module, name):
        run.validate(module, loader(), verbose=False)
        assert active_adapter(module) == name
        with torch.no_grad():
            expected = module.loss(next(iter(loader())))
    assert run.callback_metrics == {"val_loss": expected}
    run.validate(module, loader(), verbose=False)
    with using(module, adapter or "second"), torch.no_grad():
        assert run.callback_metrics == {"val_loss": module.loss(next(iter(loader())))}


def test_a_module_that_was_copied_inside_using_is_evaluated_with_the_adapter_of_the_callback():
    module = Toy()
    for steps, each in enumerate(("first", "second"), 1):
        fit(module, LoRACallback(adapter=each, **OPTIONS), max_steps=steps)
    with using(module, "second"):
        copied = copy.deepcopy(module)
    for each in (module, copied):
        run = trainer(LoRACallback(adapter="first", **OPTIONS), limit_val_batches=1)
        run.validate(each, loader(), verbose=False)
        with using(each, "first"), torch.no_grad():
            assert run.callback_metrics == {"val_loss": each.loss(next(iter(loader())))}


def test_a_sum_trains_on_with_its_own_options():
    module, options = Toy(), HEADLESS | {"target_modules": ["net.0"]}
    for name in ("first", "second"):
        fit(module, LoRACallback(adapter=name, **options))
    combine(module, {"first": 0.5, "second": 0.5}, name="sum")
    before = state(module, "sum")
    fit(module, LoRACallback(adapter="sum", **options | {"rank": 4, "alpha": 4}))
    assert not same(state(module, "sum"), before)


def test_others_stay_bit_equal_and_outside_of_the_optimizer():
    module = Toy()
    add_adapter(module, "other", LoRAConfig(**OPTIONS))
    before = state(module, "other")
    run = fit(module, LoRACallback(adapter="mine", **OPTIONS))
    held = {id(p) for group in run.optimizers[0].param_groups for p in group["params"]}
    assert same(state(module, "other"), before)
    with using(module, "other"):
        theirs = {id(p) for layer in lora_layers(module).values() for p in layer.lora.parameters()}
        theirs |= {id(p) for p in module.net[4].parameters(recurse=False)}
        assert all(p.requires_grad for layer in lora_layers(module).values() for p in layer.lora.parameters())
    assert not held & theirs
    assert len(held) == 6  # two factors in each of two layers, weight and bias of the head


def test_one_trains_beside_another_that_was_loaded_from_a_directory(tmp_path: Path):
    source, module, alone = Toy(), Toy(), Toy()
    fit(source, LoRACallback(rank=1))
    save_adapter(source, tmp_path / "saved")  # its names are relative to source.net
    load_adapter(module, tmp_path / "saved")
    for each in (module, alone):
        fit(each, LoRACallback(adapter="second", **OPTIONS))
    assert same(state(module, "second"), state(alone, "second"))
    assert same(state(module, "default"), adapter_state_dict(source))
    with using(module, None):
        assert all(torch.equal(value, Toy().state_dict()[name]) for name, value in AdaptedModel(module).base.items())


def test_checkpoint_holds_the_trained_adapter_alone_and_resumes(tmp_path: Path):
    whole = Toy()
    add_adapter(whole, "other", LoRAConfig(rank=1))
    fit(whole, LoRACallback(adapter="mine", **OPTIONS), max_steps=8)

    module = Toy()
    add_adapter(module, "other", LoRAConfig(rank=1))
    saved = ModelCheckpoint(dirpath=tmp_path, every_n_train_steps=4, save_top_k=-1)
    fit(module, LoRACallback(adapter="mine", **OPTIONS), saved, max_steps=4, root=tmp_path)
    [path] = tmp_path.glob("*.ckpt")
    assert torch.load(path, weights_only=True)["state_dict"].keys() == state(module, "mine").keys()

    resumed = Toy()
    add_adapter(resumed, "other", LoRAConfig(rank=1))
    fit(resumed, LoRACallback(adapter="mine", **OPTIONS), path=str(path), max_steps=8)
    assert same(state(resumed, "mine"), state(whole, "mine"))

    loaded = Toy()
    load_adapter(loaded, path, name="from file")
    assert same(state(loaded, "from file"), state(module, "mine"))


def test_present_adapter_continues_and_fresh_starts_anew():
    module, twice = Toy(), Toy()
    add_adapter(module, "other", LoRAConfig(rank=1))
    for _ in range(2):
        fit(module, LoRACallback(adapter="mine", fresh=True, **OPTIONS))
        fit(twice, LoRACallback(adapter="mine", **OPTIONS))
    once = Toy()
    fit(once, LoRACallback(**OPTIONS))
    assert same(state(module, "mine"), adapter_state_dict(once))
    assert not same(state(twice, "mine"), adapter_state_dict(once))
    assert adapter_names(module) == ["other", "mine"]


def test_a_fit_without_a_name_trains_the_active_one():
    module = Toy()
    for name in ("a", "b"):
        add_adapter(module, name, LoRAConfig(**OPTIONS))
    set_adapter(module, "b")
    before = state(module, "a"), state(module, "b")
    fit(module, LoRACallback(**OPTIONS))
    assert same(state(module, "a"), before[0])
    assert not same(state(module, "b"), before[1])


def test_merge_on_teardown_merges_the_trained_one():
    module, alone = Toy(), Toy()
    add_adapter(module, "other", LoRAConfig(rank=1))
    fit(module, LoRACallback(adapter="mine", merge_on_teardown=True, **OPTIONS))
    fit(alone, LoRACallback(merge_on_teardown=True, **OPTIONS))
    assert same(module.state_dict(), alone.state_dict())


@pytest.mark.parametrize("name", ["", "a.b", "base", 3])
def test_a_name_that_cannot_be_used_is_refused_at_once(name: Any):
    with pytest.raises(ValueError, match="cannot name an adapter"):
        LoRACallback(adapter=name)


def test_other_options_for_a_present_name_are_refused():
    module = Toy()
    add_adapter(module, "mine", LoRAConfig(**OPTIONS))
    with pytest.raises(ValueError, match=r"rank: 2 -> 4.*for 'mine', or another name"):
        fit(module, LoRACallback(adapter="mine", **OPTIONS | {"rank": 4}))


@pytest.mark.filterwarnings("ignore:These adapters are not smaller", "ignore:LoRA. this run may learn little")
@pytest.mark.parametrize("way", ["cat", "svd"])
def test_a_callback_without_options_trains_a_present_adapter_with_its_own(way: str):
    """Such as a sum, whose options nobody has written."""
    module = Toy()
    for name, rank in (("one", 2), ("other", 3)):
        fit(module, LoRACallback(adapter=name, rank=rank))
    combine(module, {"one": 0.5, "other": 0.5}, name="sum", method=way, **({"rank": 4} if way == "svd" else {}))
    with using(module, "sum"):
        before = get_attachment(module)
        assert before is not None
        start, config = adapter_state_dict(module), before.config
    fit(module, LoRACallback(adapter="sum"))
    after = get_attachment(module)
    assert after is not None
    assert (active_adapter(module), after.config) == ("sum", config)
    assert not any(torch.equal(value, start[name]) for name, value in adapter_state_dict(module).items())
    fit(module, LoRACallback(adapter="sum", fresh=True))
    anew = get_attachment(module)
    assert anew is not None
    assert anew.config.rank == LoRAConfig().rank != config.rank


@pytest.mark.parametrize("names", [[None], ["one"], ["one", "other"]], ids=["unnamed", "named", "two"])
@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"rank": 64}, "rank 64 is above 8"),
        ({"target_modules": ["nope"]}, "matched no module"),
        ({"init_from": "nowhere.ckpt"}, "nowhere.ckpt"),
        ({"export_dir": "there"}, "there"),
    ],
    ids=["rank", "target", "init_from", "export_dir"],
)
def test_a_fresh_fit_that_is_refused_keeps_what_was_trained(
    names: list[str | None], options: dict[str, Any], match: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    module = Toy()
    for name in names:
        fit(module, LoRACallback(adapter=name, rank=2))
    save_adapter(module, "there")
    trained, before = adapter_state_dict(module), adapter_names(module)
    with pytest.raises((ValueError, OSError, MisconfigurationException), match=match):
        fit(module, LoRACallback(**({"adapter": names[-1], "rank": 2} | options), fresh=True))
    assert (adapter_names(module), active_adapter(module)) == (before, before[-1])
    assert_same_bits(adapter_state_dict(module), trained)


@pytest.mark.parametrize("names", [["one"], ["one", "other"]])
def test_a_fresh_fit_without_a_name_begins_the_active_adapter_anew(names: list[str]):
    module = Toy()
    for name in names:
        fit(module, LoRACallback(adapter=name, rank=2))
    others = {name: state(module, name) for name in names[:-1]}
    fit(module, LoRACallback(rank=2, fresh=True))
    fit(new := Toy(), LoRACallback(rank=2))
    assert adapter_names(module) == names
    assert_same_bits(state(module, names[-1]), adapter_state_dict(new))
    for name, trained in others.items():
        assert_same_bits(state(module, name), trained)


@pytest.mark.parametrize("strict", [True, False])
def test_a_trainer_without_the_callback_loads_no_file_into_adapters_that_are_there(strict: bool, tmp_path: Path):
    module = Toy()
    module.strict_loading = strict
    for name in ("one", "other"):
        fit(module, LoRACallback(adapter=name, rank=2)).save_checkpoint(tmp_path / f"{name}.ckpt")
    with raises_and_changes_nothing(module, RuntimeError, "the Trainer has no LoRACallback"):
        trainer().validate(module, loader(), ckpt_path=tmp_path / "one.ckpt", verbose=False)
    trainer().validate(module, loader(), verbose=False)


class ValidatesOtherwise(Toy):
    """Validates inside of a block that its hooks enter and leave; callbacks save before it is left."""

    def __init__(self, block: Any) -> None:
        super().__init__()
        self.block = block

    def on_validation_start(self) -> None:
        self.entered = ExitStack()
        self.entered.enter_context(self.block(self))

    def on_validation_end(self) -> None:
        self.entered.close()


@contextmanager
def set_for_a_while(module: nn.Module) -> Iterator[None]:
    set_adapter(module, "other")
    yield
    set_adapter(module, "mine")


BLOCKS: dict[str, Any] = {
    "other": lambda module: using(module, "other"),
    "base": lambda module: using(module, None),
    "scaled": lambda module: scaled(module, 0.5),
    "scaled twice": lambda module: twice_scaled(module),
    "set": set_for_a_while,
}
REFUSED_BLOCKS: dict[str, Any] = {
    "routed": lambda module: routed(module, ["mine", "other", None, None]),
    "disabled": disabled,
    "merged": merged,
}


@contextmanager
def twice_scaled(module: nn.Module) -> Iterator[None]:
    with scaled(module, 0.5), scaled(module, 0.5):
        yield


@pytest.mark.parametrize("save_adapters", ["trained", "all"])
@pytest.mark.parametrize("block", BLOCKS)
def test_a_checkpoint_holds_the_trained_adapter_whatever_validation_computes_with(
    block: str, save_adapters: str, tmp_path: Path
):
    options: dict[str, Any] = {"rank": 2, "target_modules": ["net.*"]}
    module = ValidatesOtherwise(BLOCKS[block])
    fit(module, LoRACallback(adapter="other", **options), max_steps=4, limit_val_batches=0)
    callback = LoRACallback(adapter="mine", save_adapters=save_adapters, export_dir=tmp_path / "exported", **options)
    saves = ModelCheckpoint(tmp_path, save_on_train_epoch_end=False, every_n_epochs=1)
    run = trainer(callback, saves, max_steps=8, limit_val_batches=1)
    run.fit(module, loader(), DataLoader(loader().dataset, 4))
    assert active_adapter(module) == "mine"
    trained = state(module, "mine")
    loaded, resumed = Toy(), ValidatesOtherwise(lambda _: nullcontext())
    load_adapter(loaded, saves.best_model_path)
    assert_same_bits(adapter_state_dict(loaded), trained)
    assert {layer.lora.spec.scaling for layer in lora_layers(loaded).values()} == {16.0}
    exported = Toy()
    load_adapter(exported, tmp_path / "exported")
    assert_same_bits(adapter_state_dict(exported), trained)
    fit(resumed, LoRACallback(), path=saves.best_model_path, max_steps=8)  # optimizer states fit, too
    assert_same_bits(state(resumed, "mine"), trained)


@pytest.mark.parametrize("block", REFUSED_BLOCKS)
def test_a_checkpoint_of_one_of_several_adapters_inside_other_blocks_is_refused(block: str, tmp_path: Path):
    options: dict[str, Any] = {"rank": 2, "target_modules": ["net.*"]}
    module = ValidatesOtherwise(REFUSED_BLOCKS[block])
    fit(module, LoRACallback(adapter="other", **options), max_steps=4)
    saves = ModelCheckpoint(tmp_path, save_on_train_epoch_end=False, every_n_epochs=1)
    run = trainer(LoRACallback(adapter="mine", **options), saves, max_steps=8, limit_val_batches=1)
    with pytest.raises(RuntimeError, match=rf"cannot be switched inside {block}\(.*\); leave it first"):
        run.fit(module, loader(), DataLoader(loader().dataset, 4))
    assert not list(tmp_path.glob("*.ckpt"))


def test_each_trainer_saves_what_it_has_trained_and_says_so_if_another_adapter_is_active(tmp_path: Path):
    module = Toy()
    runs = {name: fit(module, LoRACallback(adapter=name, rank=2)) for name in ("other", "mine")}
    runs["mine"].validate(module, loader(), verbose=False)
    set_adapter(module, "other")
    for name, run in runs.items():
        message = "holds the adapter 'mine', which this Trainer has trained, and not 'other', which is active"
        with pytest.warns(UserWarning, match=message) if name == "mine" else nullcontext():
            run.save_checkpoint(tmp_path / f"{name}.ckpt")
        load_adapter(loaded := Toy(), tmp_path / f"{name}.ckpt")
        assert_same_bits(adapter_state_dict(loaded), state(module, name))
    assert active_adapter(module) == "other"


class LeavesAnother(Toy):
    """Has hooks that switch to another adapter and leave it in place."""

    leaves_in = "on_train_end"
    breaks = False

    def on_train_end(self) -> None:
        if self.breaks:
            next(iter(lora_layers(self).values())).lora.B.data.fill_(float("nan"))
        self._leave("on_train_end")

    def on_validation_epoch_end(self) -> None:
        self._leave("on_validation_epoch_end")

    def _leave(self, hook: str) -> None:
        if hook == self.leaves_in and not self.trainer.sanity_checking:
            set_adapter(self, "other")


def test_the_end_of_a_fit_judges_and_exports_what_was_trained(tmp_path: Path):
    add_adapter(module := LeavesAnother(), "other", LoRAConfig(rank=2))  # untrained
    fit(module, LoRACallback(adapter="mine", rank=2, export_dir=tmp_path / "exported"))
    assert active_adapter(module) == "other"  # as the hook wanted it
    load_adapter(exported := Toy(), tmp_path / "exported")
    assert_same_bits(adapter_state_dict(exported), state(module, "mine"))


def test_the_end_of_a_fit_finds_what_is_not_finite_in_what_was_trained():
    add_adapter(module := LeavesAnother(), "other", LoRAConfig(rank=2))
    module.breaks = True
    with pytest.raises(MisconfigurationException, match=r"Training diverged: NaN or infinity in net\.0\.lora\.B"):
        fit(module, LoRACallback(adapter="mine", rank=2))


def test_an_adapter_that_a_hook_leaves_in_place_is_named_where_gradients_are_missing():
    add_adapter(module := LeavesAnother(), "other", LoRAConfig(rank=2))
    module.leaves_in = "on_validation_epoch_end"
    message = "the active adapter is 'other', which stays as it is in this fit; 'mine' trains"
    with pytest.raises(RuntimeError, match=message):
        trainer(LoRACallback(adapter="mine", rank=2), max_steps=12, limit_val_batches=1).fit(module, loader(), loader())


def test_a_trainer_whose_adapter_was_removed_saves_the_active_one(tmp_path: Path):
    module = Toy()
    runs = {name: fit(module, LoRACallback(adapter=name, rank=2)) for name in ("other", "mine")}
    remove_adapter(module, "other")
    with pytest.warns(UserWarning, match="has trained the adapter 'other', which the module no longer has"):
        runs["other"].save_checkpoint(tmp_path / "mine.ckpt")
    load_adapter(loaded := Toy(), tmp_path / "mine.ckpt")
    assert_same_bits(adapter_state_dict(loaded), state(module, "mine"))


def test_a_head_that_is_replaced_between_adapters_is_not_lost_without_a_word():
    module, options = Toy(), {"rank": 2, "target_modules": ["net.0"], "modules_to_save": ["net.4"]}
    fit(module, LoRACallback(adapter="one", **options))
    first, module.net[4] = module.net[4], nn.Linear(16, FEATURES)
    with raises_and_changes_nothing(module, RuntimeError, r"Linear of 'one'\. Keep the modules.*head of its own"):
        fit(module, LoRACallback(adapter="two", **options))
    module.net[4] = first
    trained = state(module, "one")
    fit(module, LoRACallback(adapter="two", **options))
    assert_same_bits(state(module, "one"), trained)
    module.net[4] = nn.Linear(16, FEATURES)
    for again in (lambda: fit(module, LoRACallback(adapter="two")), lambda: adapter_state_dict(module)):
        with pytest.raises((RuntimeError, MisconfigurationException), match=r"Linear of 'one', Linear of 'two'"):
            again()


# --- checkpoints of all adapters

SET: dict[str, dict[str, Any]] = {
    "plain": {"rank": 1, "target_modules": ["net.0"]},
    "headed": OPTIONS | {"rank": 3, "bias": "lora_only"},
    "dora": {"rank": 2, "use_dora": True, "init": "gaussian"},
}


def several(kind: type[Toy] = Toy) -> Toy:
    """Return a module with adapters before and behind the one that ``all_of`` trains, none of them as it started."""
    module = kind()
    generator = torch.Generator().manual_seed(3)
    for name in ("plain", "mine", "headed", "dora"):
        add_adapter(module, name, LoRAConfig(**SET.get(name, OPTIONS)))
        with using(module, name):
            values = {k: torch.randn(v.shape, generator=generator) for k, v in adapter_state_dict(module).items()}
            load_adapter_state_dict(module, values)
    return module


def all_of(**options: Any) -> LoRACallback:
    return LoRACallback(adapter="mine", save_adapters="all", **OPTIONS, **options)


def configs(module: Toy) -> dict[str, Any]:
    found = {}
    for name in adapter_names(module):
        with using(module, name):
            found[name] = AdaptedModel(module).roots[0].attachment.config.to_dict()
    return found


@pytest.fixture(scope="module")
def all_saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Toy, Path]:
    module, folder = several(), tmp_path_factory.mktemp("all")
    fit(module, all_of(), ModelCheckpoint(folder, every_n_train_steps=4, save_top_k=-1), max_steps=4, root=folder)
    [path] = folder.glob("*.ckpt")
    return module, path


def test_a_checkpoint_of_all_adapters_gives_back_the_whole_set_in_a_fresh_module(all_saved: tuple[Toy, Path]):
    module, path = all_saved
    for kind in (Toy, BuiltInSetup, BuiltInConfigureModel):
        for callback in (LoRACallback(), all_of()):
            resumed = kind()
            fit(resumed, callback, path=str(path), max_steps=4)  # no step is left
            assert adapter_names(resumed) == ["plain", "mine", "headed", "dora"]
            assert active_adapter(resumed) == "mine"
            assert configs(resumed) == configs(module)
            for name in adapter_names(module):
                assert same(state(resumed, name), state(module, name))


def test_training_goes_on_from_a_checkpoint_of_all_adapters_as_if_it_had_never_stopped(all_saved: tuple[Toy, Path]):
    _, path = all_saved
    whole, resumed = several(), Toy()
    fit(whole, all_of(), max_steps=8)
    fit(resumed, all_of(), path=str(path), max_steps=8)
    for name in adapter_names(whole):
        assert same(state(resumed, name), state(whole, name))
    with using(resumed, None):  # the base, with its head
        now = resumed.state_dict()
        assert all(torch.equal(now[name], value) for name, value in Toy().state_dict().items())


def test_resuming_puts_saved_values_into_adapters_that_are_there_already(all_saved: tuple[Toy, Path]):
    module, path = all_saved
    resumed = Toy()
    for name in ("extra", "dora", "mine"):
        add_adapter(resumed, name, LoRAConfig(**SET.get(name, OPTIONS)))
    extra = state(resumed, "extra")
    fit(resumed, all_of(), path=str(path), max_steps=4)
    assert adapter_names(resumed) == ["extra", "dora", "mine", "plain", "headed"]
    assert all(same(state(resumed, name), state(module, name)) for name in adapter_names(module))
    assert same(state(resumed, "extra"), extra)


def test_evaluation_restores_the_whole_set(all_saved: tuple[Toy, Path]):
    module, path = all_saved
    tested = Toy()
    run = trainer(LoRACallback())
    run.test(tested, loader(), ckpt_path=str(path), verbose=False)
    assert all(same(state(tested, name), state(module, name)) for name in adapter_names(module))


def test_an_adapter_with_other_options_than_in_the_checkpoint_is_refused(all_saved: tuple[Toy, Path]):
    module = Toy()
    add_adapter(module, "dora", LoRAConfig(**SET["dora"] | {"rank": 4}))
    with pytest.raises(ValueError, match=r"rank: 4 -> 2.*'dora'"):
        fit(module, all_of(), path=str(all_saved[1]), max_steps=4)
    assert adapter_names(module) == ["dora"]


def test_another_adapter_than_the_trained_one_cannot_resume(all_saved: tuple[Toy, Path]):
    with pytest.raises(MisconfigurationException, match=r"adapter='dora'.*trained 'mine'.*load_adapter"):
        fit(Toy(), LoRACallback(adapter="dora"), path=str(all_saved[1]), max_steps=4)


def test_damaged_tensors_of_another_adapter_are_refused_before_anything_changes(
    all_saved: tuple[Toy, Path], tmp_path: Path
):
    content = torch.load(all_saved[1], weights_only=True)
    content["lightning_lora_others"]["dora"].pop("net.0.lora.A")
    torch.save(content, tmp_path / "damaged.ckpt")
    module = several()
    before = {name: state(module, name) for name in adapter_names(module)}
    with pytest.raises(ValueError, match=r"missing from the state: .*dora.*net\.0\.lora\.A"):
        fit(module, all_of(), path=str(tmp_path / "damaged.ckpt"), max_steps=4)
    assert all(same(state(module, name), was) for name, was in before.items())


def test_saving_all_of_one_adapter_writes_the_same_bytes_as_saving_the_trained_one(tmp_path: Path):
    for choice in ("trained", "all"):
        fit(Toy(), LoRACallback(save_adapters=choice, **OPTIONS)).save_checkpoint(tmp_path / f"{choice}.ckpt")
    assert (tmp_path / "all.ckpt").read_bytes() == (tmp_path / "trained.ckpt").read_bytes()


def test_what_a_checkpoint_of_all_adapters_has_more_is_apart_from_the_trained_one(
    all_saved: tuple[Toy, Path], tmp_path: Path
):
    module, path = all_saved
    saved = ModelCheckpoint(tmp_path, every_n_train_steps=4, save_top_k=-1)
    fit(several(), LoRACallback(adapter="mine", **OPTIONS), saved, max_steps=4, root=tmp_path)
    one, all_ = (torch.load(each, weights_only=True) for each in (*tmp_path.glob("*.ckpt"), path))
    assert same(one["state_dict"], all_["state_dict"])
    assert all_["lightning_lora"].keys() - one["lightning_lora"].keys() == {"adapter", "names", "others"}
    assert {key: all_["lightning_lora"][key] for key in one["lightning_lora"]} == one["lightning_lora"]
    assert all(same(all_["lightning_lora_others"][name], state(module, name)) for name in SET)


def test_an_unknown_choice_of_adapters_to_save_is_refused():
    with pytest.raises(ValueError, match=r"save_adapters='every' is unknown; choose one of 'trained', 'all'"):
        LoRACallback(save_adapters="every")  # type: ignore[arg-type]


# --- one of the adapters in a file


@pytest.mark.parametrize("load", ["load_adapter", "load_adapter beside", "add_adapter"])
def test_each_adapter_of_a_checkpoint_loads_alone(load: str, all_saved: tuple[Toy, Path]):
    module, path = all_saved
    for name in (None, *adapter_names(module)):
        loaded = Toy()
        if load == "load_adapter":
            load_adapter(loaded, path, adapter=name)
        elif load == "add_adapter":
            add_adapter(loaded, "new", path, adapter=name)
        else:
            load_adapter(loaded, path, adapter=name, name="new")
        assert same(adapter_state_dict(loaded), state(module, name or "mine"))
        assert AdaptedModel(loaded).roots[0].attachment.config.to_dict() == configs(module)[name or "mine"]


@pytest.mark.parametrize("load", ["load_adapter", "add_adapter"])
def test_an_adapter_is_added_from_the_one_of_its_name(load: str, all_saved: tuple[Toy, Path]):
    module, path = all_saved
    for name in adapter_names(module):
        loaded = Toy()
        if load == "load_adapter":
            load_adapter(loaded, path, name=name)
        else:
            add_adapter(loaded, name, path)
        assert same(state(loaded, name), state(module, name))


@pytest.mark.parametrize(
    ("name", "source"), [("plain", "plain"), ("headed", "headed"), ("mine", "mine"), ("new", "mine"), (None, "mine")]
)
def test_a_warm_start_takes_the_adapter_of_its_name(
    name: str | None, source: str, all_saved: tuple[Toy, Path], caplog: pytest.LogCaptureFixture
):
    module, path = all_saved
    started = Toy()
    with caplog.at_level("INFO"):
        fit(started, LoRACallback(adapter=name, init_from=str(path), **SET.get(source, OPTIONS)), max_steps=0)
    assert same(adapter_state_dict(started), state(module, source))
    assert f"started from {path}: its adapter {source!r}: " in caplog.text


def test_an_adapter_of_a_checkpoint_loads_again_over_itself(all_saved: tuple[Toy, Path]):
    module, path = all_saved
    loaded = Toy()
    for _ in range(2):  # the second time the head that it trains is not the base's any more
        load_adapter(loaded, path, adapter="headed")
    assert same(adapter_state_dict(loaded), state(module, "headed"))


def test_an_adapter_of_a_checkpoint_is_not_loaded_into_another_base(all_saved: tuple[Toy, Path]):
    other = Toy()
    with torch.no_grad():
        other.net[0].weight.add_(1)
    with pytest.raises(ValueError, match="different base"):
        load_adapter(other, all_saved[1], adapter="dora")
    assert adapter_names(other) == []


def test_unknown_adapters_of_a_file_are_refused_with_those_that_it_holds(all_saved: tuple[Toy, Path], tmp_path: Path):
    module, path = all_saved
    with pytest.raises(
        ValueError, match=r"no adapter 'doro'. Did you mean 'dora'\? It holds 'plain', 'mine', .*trained"
    ):
        load_adapter(Toy(), path, adapter="doro")
    fit(Toy(), LoRACallback(**OPTIONS)).save_checkpoint(tmp_path / "one.ckpt")
    with pytest.raises(ValueError, match=r"no adapter 'mine'.*single one.*leave adapter out"):
        load_adapter(Toy(), tmp_path / "one.ckpt", adapter="mine")
    with using(module, "dora"):
        save_adapter(module, tmp_path / "directory")
    with pytest.raises(ValueError, match=r"adapter='dora'.*directory, which holds one"):
        load_adapter(Toy(), tmp_path / "directory", adapter="dora")
    with pytest.raises(ValueError, match=r"adapter='dora'.*source is a LoRAConfig"):
        add_adapter(Toy(), "new", LoRAConfig(), adapter="dora")


@pytest.mark.parametrize("damage", ["missing tensors", "missing options"])
def test_a_file_without_one_of_its_adapters_says_so(damage: str, all_saved: tuple[Toy, Path], tmp_path: Path):
    content = torch.load(all_saved[1], weights_only=True)
    place = content["lightning_lora_others"] if damage == "missing tensors" else content["lightning_lora"]["others"]
    del place["dora"]
    torch.save(content, tmp_path / "damaged.ckpt")
    with pytest.raises(ValueError, match="malformed"):
        load_adapter(Toy(), tmp_path / "damaged.ckpt", adapter="dora")
    with pytest.raises(ValueError, match="dora"):
        fit(Toy(), all_of(), path=str(tmp_path / "damaged.ckpt"), max_steps=4)


# --- what says which adapter it is about


def test_reports_name_the_adapter_that_they_are_about(all_saved: tuple[Toy, Path]):
    module, path = all_saved
    with using(module, "dora"):
        assert "adapter: 'dora'" in str(analyze(module))
        assert "the active adapter, 'dora'." in str(preflight(module))
        shown = str(compare(module, path))
        assert "the first: adapter 'dora'" in shown
        assert "the second: adapter 'mine'" in shown
    assert "adapter: 'mine'" in str(analyze(path))
    assert analyze(path).to_dict()["adapter"] == "mine"


def test_reports_say_nothing_of_the_only_adapter():
    module = Toy()
    add_adapter(module, "only", LoRAConfig(rank=1))
    for report in (analyze(module), preflight(module), compare(module, module)):
        assert "only'" not in str(report)
    assert not {"adapter", "adapters"} & {*analyze(module).to_dict(), *compare(module, module).to_dict()}


def test_exporting_and_merging_after_a_fit_name_the_adapter(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    with caplog.at_level("INFO"):
        fit(
            several(), LoRACallback(adapter="mine", export_dir=str(tmp_path / "out"), merge_on_teardown=True, **OPTIONS)
        )
    assert "adapter 'mine' exported to" in caplog.text
    assert "adapter 'mine' merged into the weights" in caplog.text


# --- a checkpoint of one, and a module that has several


@pytest.fixture(scope="module")
def two_saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Toy, dict[str, Path]]:
    """A module with two trained adapters of the same shapes, the second of which is active; and a file of each."""
    module, paths = Toy(), {name: tmp_path_factory.mktemp("two") / f"{name}.ckpt" for name in ("default", "second")}
    for name, callback in {
        "default": LoRACallback(**HEADLESS),
        "second": LoRACallback(adapter="second", **HEADLESS),
    }.items():
        fit(module, callback, max_steps=4).save_checkpoint(paths[name])
    return module, paths


@pytest.mark.parametrize("is_bare", [True, False])
@pytest.mark.parametrize("stage", ["test", "fit"])
def test_a_checkpoint_goes_into_the_adapter_that_it_was_saved_from(
    stage: str, is_bare: bool, two_saved: tuple[Toy, dict[str, Path]]
):
    module, paths = copy.deepcopy(two_saved[0]), two_saved[1]
    before = {name: state(module, name) for name in adapter_names(module)}
    callback = LoRACallback() if is_bare else LoRACallback(**HEADLESS)
    if stage == "test":
        trainer(callback).test(module, loader(), ckpt_path=str(paths["default"]), verbose=False)
        assert same(state(module, "default"), before["default"])
    else:
        fit(module, callback, path=str(paths["default"]), max_steps=8)
        assert not same(state(module, "default"), before["default"])
    assert active_adapter(module) == "default"
    assert same(state(module, "second"), before["second"])


def test_a_checkpoint_of_another_adapter_of_the_module_is_not_put_into_the_one_that_is_named(
    two_saved: tuple[Toy, dict[str, Path]],
):
    module, paths = copy.deepcopy(two_saved[0]), two_saved[1]
    before = {name: state(module, name) for name in adapter_names(module)}
    with pytest.raises(MisconfigurationException, match=r"has trained 'default' and holds it alone\. Leave adapter"):
        trainer(LoRACallback(adapter="second", **HEADLESS)).test(module, loader(), ckpt_path=str(paths["default"]))
    assert all(same(state(module, name), before[name]) for name in before)
    assert active_adapter(module) == "second"


def test_load_adapter_replaces_the_adapter_of_the_same_name_alone(two_saved: tuple[Toy, dict[str, Path]]):
    module, paths = copy.deepcopy(two_saved[0]), two_saved[1]
    before = {name: state(module, name) for name in adapter_names(module)}
    with pytest.raises(ValueError, match=r"holds 'default', which this Toy has beside 'second'.*set_adapter"):
        load_adapter(module, paths["default"])
    load_adapter(module, paths["second"])
    set_adapter(module, "default")
    load_adapter(module, paths["default"])
    assert all(same(state(module, name), before[name]) for name in before)


@pytest.mark.parametrize("reference", ["ref", None], ids=["named", "unnamed"])
@pytest.mark.parametrize("way", ["fit", "test", "load_adapter"])
def test_a_checkpoint_of_another_name_never_replaces_what_an_adapter_has_learned(
    way: str, reference: str | None, tmp_path: Path
):
    def with_reference() -> Toy:
        module = Toy()
        load_adapter(module, tmp_path / "ref.ckpt", **({"name": reference} if reference else {}))
        return module

    fit(Toy(), LoRACallback(rank=2), max_steps=4).save_checkpoint(tmp_path / "ref.ckpt")
    trained = with_reference()
    fit(trained, LoRACallback(adapter="policy", rank=2), max_steps=8).save_checkpoint(tmp_path / "policy.ckpt")
    module, name = with_reference(), reference or "default"
    kept = adapter_state_dict(module)
    if way == "fit":
        fit(module, LoRACallback(), max_steps=8, path=tmp_path / "policy.ckpt")
    elif way == "test":
        trainer(LoRACallback()).test(module, loader(), ckpt_path=tmp_path / "policy.ckpt", verbose=False)
    elif reference is None:
        load_adapter(module, tmp_path / "policy.ckpt")  # replaces what has no name, as was asked for
        return
    else:
        with raises_and_changes_nothing(module, ValueError, "has 'ref', of which 'ref' is active.*name='policy'"):
            load_adapter(module, tmp_path / "policy.ckpt")
        load_adapter(module, tmp_path / "policy.ckpt", name="policy")
    assert adapter_names(module) == [name, "policy"]
    with using(module, name):
        assert_same_bits(adapter_state_dict(module), kept)
    with using(module, "policy"):
        assert_same_bits(adapter_state_dict(module), adapter_state_dict(trained))


@pytest.mark.parametrize("way", ["fit", "test", "load_adapter"])
def test_a_checkpoint_without_a_name_never_replaces_a_named_adapter(way: str, tmp_path: Path):
    unnamed = Toy()
    fit(unnamed, LoRACallback(rank=2), max_steps=4).save_checkpoint(tmp_path / "unnamed.ckpt")
    module = Toy()
    fit(module, LoRACallback(adapter="german", rank=2), max_steps=8)
    kept = adapter_state_dict(module)
    if way == "fit":
        fit(module, LoRACallback(), max_steps=4, path=tmp_path / "unnamed.ckpt")
    elif way == "test":
        trainer(LoRACallback()).test(module, loader(), ckpt_path=tmp_path / "unnamed.ckpt", verbose=False)
    else:
        with raises_and_changes_nothing(module, ValueError, "holds 'default'.*'german' is active.*name='default'"):
            load_adapter(module, tmp_path / "unnamed.ckpt")
        load_adapter(module, tmp_path / "unnamed.ckpt", name="default")
    assert adapter_names(module) == ["german", "default"]
    with using(module, "german"):
        assert_same_bits(adapter_state_dict(module), kept)
    with using(module, "default"):
        assert_same_bits(adapter_state_dict(module), adapter_state_dict(unnamed))


def test_a_checkpoint_without_a_name_goes_into_the_adapter_that_the_callback_names(tmp_path: Path):
    unnamed, module = Toy(), Toy()
    fit(unnamed, LoRACallback(rank=2), max_steps=4).save_checkpoint(tmp_path / "unnamed.ckpt")
    fit(module, LoRACallback(adapter="german", rank=2), max_steps=4, path=tmp_path / "unnamed.ckpt")
    assert adapter_names(module) == ["german"]
    assert_same_bits(adapter_state_dict(module), adapter_state_dict(unnamed))


def test_an_adapter_resumes_under_its_own_name_in_a_fresh_module(tmp_path: Path):
    class Compared(Toy):
        """Compares with the bare base, for which a head's own values must be kept."""

        def loss(self, batch: list[Tensor]) -> Tensor:
            with torch.no_grad(), using(self, None):
                before = super().loss(batch)
            return super().loss(batch) + 0 * before

    options = {"rank": 2, "target_modules": ["net.0"], "modules_to_save": ["net.4"]}
    whole = Compared()
    fit(whole, LoRACallback(adapter="policy", **options), max_steps=8)
    saved = ModelCheckpoint(dirpath=tmp_path, every_n_train_steps=4)
    fit(Compared(), LoRACallback(adapter="policy", **options), saved, max_steps=4, root=tmp_path)
    resumed = Compared()
    fit(resumed, LoRACallback(), max_steps=8, path=saved.best_model_path)
    assert adapter_names(resumed) == ["policy"]
    assert_same_bits(adapter_state_dict(resumed), adapter_state_dict(whole))


class Centered(Toy):
    """Keeps a running mean of its inputs, and computes with it."""

    def build(self) -> None:
        super().build()
        self.register_buffer("center", torch.zeros(8))
        self.register_buffer("seen", None)

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            with torch.no_grad():
                self.center.lerp_(x.mean(0) + 1, 0.1)
                self.seen = x[:1].clone()
        return self.net(x - self.center if self.seen is None else x - self.center + self.seen)

    def loss(self, batch: list[Tensor]) -> Tensor:
        x, y = batch
        return ((self(x) - y) ** 2).mean()


X = torch.linspace(-1, 1, 24).reshape(3, 8)


def alone(module: nn.Module, adapter: str | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return what a module computes under an adapter, and its buffers."""
    with torch.no_grad(), using(module, adapter):
        module.eval()
        output = module(X)
        module.train()
        return output, module.center.clone(), module.seen


def assert_alike(found: tuple[Tensor | None, ...], expected: tuple[Tensor | None, ...]) -> None:
    for one, other in zip(found, expected, strict=True):
        assert one is other is None or torch.equal(one, other)


def test_buffers_that_training_moves_belong_to_the_adapter(tmp_path: Path):
    base = Centered().eval()
    bare = base(X).detach(), base.center, base.seen
    module = Centered()
    fit(module, LoRACallback(adapter="first", rank=2), max_steps=4).save_checkpoint(tmp_path / "first.ckpt")
    first = alone(module, "first")
    assert first[1].all()
    assert first[2] is not None
    fit(module, LoRACallback(adapter="second", rank=2), max_steps=8).save_checkpoint(tmp_path / "second.ckpt")
    fit(own := Centered(), LoRACallback(adapter="second", rank=2), max_steps=8)
    second = alone(own, "second")  # as if there had been no first
    assert_alike(alone(module, "second"), second)
    assert_alike(alone(module, "first"), first)
    assert_alike(alone(module, None), bare)
    added = Centered()
    for name in ("first", "second"):
        add_adapter(added, name, tmp_path / f"{name}.ckpt")
    add_adapter(added, "third", LoRAConfig(rank=1))
    for each in (module, added, copy.deepcopy(added)):
        assert_alike(alone(each, "second"), second)
        assert_alike(alone(each, "first"), first)
        assert_alike(alone(each, None), bare)
    assert_alike(alone(added, "third"), bare)
    remove_adapter(module, "first")
    detach(module)
    assert_alike((module.eval()(X).detach(), module.center, module.seen), bare)
    assert OTHERS not in module._modules


def test_buffers_of_all_adapters_are_in_a_checkpoint_of_all(tmp_path: Path):
    module = Centered()
    fit(module, LoRACallback(adapter="first", rank=2), max_steps=4)
    run = fit(module, LoRACallback(adapter="second", rank=2, save_adapters="all"), max_steps=8)
    run.save_checkpoint(path := tmp_path / "all.ckpt")
    expected = {name: alone(module, name) for name in ("first", "second", None)}
    trainer(LoRACallback()).validate(tested := Centered(), loader(), ckpt_path=path, verbose=False)
    for name, values in expected.items():
        assert_alike(alone(tested, name), values)
    for name in ("first", "second"):
        load_adapter(loaded := Centered(), path, adapter=name, name="a")
        assert_alike(alone(loaded, "a"), expected[name])


@pytest.mark.parametrize("way", ["add_adapter", "using", "detach"])
def test_a_base_beside_a_single_adapter_gets_its_buffers_back(way: str):
    module, bare = Centered(), Centered().eval()
    fit(module, LoRACallback(rank=2), max_steps=4)
    trained = alone(module, "default") if way != "detach" else None
    if way == "add_adapter":
        add_adapter(module, "other", LoRAConfig(rank=1))
        set_adapter(module, "other")
        assert_alike(alone(module, "default"), trained)
    elif way == "using":
        with using(module, None):
            assert torch.equal(module.eval()(X), bare(X))
        return
    else:
        detach(module)
    assert torch.equal(module.eval()(X), bare(X))
    assert_alike((module.center, module.seen), (bare.center, bare.seen))


class Compares(Centered):
    """Compares each step with the bare base, as DPO does."""

    def loss(self, batch: list[Tensor]) -> Tensor:
        x, y = batch
        output = self(x)
        with torch.no_grad(), self.reference():
            self.references.append(self.net(x - self.center))
            self.seen_there = self.seen
        return ((output - y) ** 2).mean()


@pytest.mark.parametrize("way", ["disabled", "using"])
def test_the_reference_of_a_step_has_the_buffers_of_the_base(way: str):
    module, base = Compares(), Centered()
    module.references = []
    module.reference = lambda: disabled(module) if way == "disabled" else using(module, None)
    fit(module, LoRACallback(rank=2, adapter="policy" if way == "using" else None), max_steps=4)
    assert len(module.references) == 4
    for reference, batch in zip(module.references, loader(), strict=False):
        assert torch.equal(reference, base.net(batch[0]))
    assert module.seen_there is None
    assert module.center.all()  # the adapter's own


class Measures(Toy):
    """Takes the mean of the task's inputs in setup."""

    mean = 0.0

    def build(self) -> None:
        super().build()
        self.register_buffer("center", torch.zeros(8))

    def setup(self, stage: str) -> None:
        self.center += self.mean

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x - self.center)


def test_what_setup_measures_for_a_task_belongs_to_its_adapter():
    module = Measures()
    for name, module.mean in {"first": 1.0, "second": 10.0}.items():
        fit(module, LoRACallback(adapter=name, rank=2), max_steps=2)
    for name, mean in {"first": 1.0, "second": 10.0}.items():
        with using(module, name):
            assert torch.equal(module.center, torch.full((8,), mean))


class Batches(LightningDataModule):
    batch_size = 4

    def train_dataloader(self) -> Any:
        return loader(batch_size=self.batch_size)

    val_dataloader = train_dataloader


@pytest.mark.parametrize("tuner", ["lr_find", "scale_batch_size"])
def test_a_tuner_leaves_no_buffer_moved(tuner: str, tmp_path: Path):
    tuned, plain = Centered(), Centered()
    for module in (tuned, plain):
        run = trainer(LoRACallback(rank=2), root=tmp_path, max_steps=4)
        if module is tuned and tuner == "lr_find":
            Tuner(run).lr_find(module, loader(), num_training=8, update_attr=False, early_stop_threshold=None)
        elif module is tuned:
            Tuner(run).scale_batch_size(module, datamodule=Batches(), max_trials=2)
        run.fit(module, loader())
    assert tuned.losses[-4:] == plain.losses
    assert_alike(alone(tuned, "default"), alone(plain, "default"))


def test_loading_an_earlier_state_takes_back_what_has_moved_since(tmp_path: Path):
    module, best = Centered(), Centered()
    module.eval()  # moves nothing
    run = fit(module, LoRACallback(rank=2), max_steps=4)
    run.save_checkpoint(path := tmp_path / "early.ckpt")
    load_adapter(best, path)
    module.train()
    run = trainer(LoRACallback(rank=2), max_steps=8)
    run.fit(module, loader())
    assert module.center.all()
    run.validate(module, loader(), ckpt_path=path, verbose=False)
    assert_alike(alone(module, "default"), alone(best, "default"))


@pytest.mark.parametrize("way", ["load_adapter", "validate", "init_from"])
def test_buffers_go_from_file_to_file(way: str, tmp_path: Path):
    module, again = Centered(), Centered()
    fit(module, LoRACallback(rank=2), max_steps=4).save_checkpoint(one := tmp_path / "one.ckpt")
    run = trainer(LoRACallback(rank=2, init_from=one if way == "init_from" else None), limit_train_batches=0)
    if way == "init_from":
        run = trainer(LoRACallback(rank=2, init_from=one), max_steps=1)
        again.on_train_start = lambda: run.save_checkpoint(tmp_path / "two.ckpt")
        run.fit(again, loader())
    else:
        if way == "load_adapter":
            load_adapter(again, one)
        run.validate(again, loader(), ckpt_path=one if way == "validate" else None, verbose=False)
        run.save_checkpoint(tmp_path / "two.ckpt")
    load_adapter(last := Centered(), tmp_path / "two.ckpt")
    assert_alike(alone(last, "default"), alone(module, "default"))


def test_the_sum_of_adapters_has_the_sum_of_their_buffers():
    module = Centered()
    for name, steps in {"first": 2, "second": 6}.items():
        fit(module, LoRACallback(adapter=name, rank=2), max_steps=steps)
        module.seen = None
    centers = {name: alone(module, name)[1] for name in ("first", "second")}
    combine(module, {"first": 0.75, "second": 0.5}, name="sum")
    expected = 0.75 * centers["first"] + 0.5 * centers["second"]
    torch.testing.assert_close(alone(module, "sum")[1], expected)
    fit(module, LoRACallback(adapter="first", rank=2), max_steps=2)  # has seen
    module._buffers["seen"] = torch.ones(2, 8)
    fit(module, LoRACallback(adapter="second", rank=2), max_steps=2)
    with raises_and_changes_nothing(module, ValueError, "the buffer 'seen', which has other shapes under"):
        combine(module, {"first": 0.75, "second": 0.5}, name="other")


def test_what_is_measured_after_a_fit_belongs_to_its_adapter(tmp_path: Path):
    module = Measures()
    for name, center in {"first": 3.0, "second": 5.0}.items():
        run = fit(module, LoRACallback(adapter=name, rank=2), max_steps=2)
        module.center.fill_(center)  # such as a quantile for conformal prediction
        run.save_checkpoint(tmp_path / f"{name}.ckpt")
    for name, center in {"first": 3.0, "second": 5.0}.items():
        load_adapter(loaded := Measures(), tmp_path / f"{name}.ckpt")
        assert torch.equal(loaded.center, torch.full((8,), center))
        with using(module, name):
            assert torch.equal(module.center, loaded.center)
    with using(module, None):
        assert not module.center.any()


@pytest.mark.parametrize("name", [None, "first"])
def test_a_truncated_adapter_keeps_its_buffers(name: str | None):
    module, bare = Centered(), Centered()
    fit(module, LoRACallback(adapter=name, rank=2), max_steps=4)
    before = alone(module, name or "default")
    truncate_adapter(module, energy=1.0)
    output, *buffers = alone(module, name or "default")
    assert_alike(tuple(buffers), before[1:])
    torch.testing.assert_close(output, before[0])
    detach(module)
    assert_alike((module.center, module.seen), (bare.center, bare.seen))


@pytest.mark.parametrize("name", [None, "first"])
def test_ranks_from_data_keep_what_setup_has_measured(name: str | None, tmp_path: Path):
    module = Measures()
    module.mean = 2.0
    run = fit(module, LoRACallback(adapter=name, rank="auto", rank_budget=200, init="eva"), max_steps=2)
    assert torch.equal(module.center, torch.full((8,), 2.0))
    run.save_checkpoint(tmp_path / "auto.ckpt")
    load_adapter(loaded := Measures(), tmp_path / "auto.ckpt")
    assert torch.equal(loaded.center, module.center)


def test_a_directory_has_none_of_the_buffers_of_before(tmp_path: Path):
    module, bare = Centered(), Centered()
    fit(module, LoRACallback(rank=2), max_steps=4)
    with pytest.warns(UserWarning, match="has no place: center, seen"):
        save_adapter(module, tmp_path / "adapter")
    load_adapter(fresh := Centered(), tmp_path / "adapter")
    load_adapter(module, tmp_path / "adapter")
    assert_alike(alone(module, "default"), alone(fresh, "default"))
    assert_alike((module.center, module.seen), (bare.center, bare.seen))


def test_detach_gives_back_the_base_that_a_checkpoint_held(tmp_path: Path):
    other, module = Centered(), Centered()
    other.center += 5
    run = trainer(max_steps=0)
    run.fit(other, loader())
    run.save_checkpoint(tmp_path / "base.ckpt")
    fit(module, LoRACallback(rank=2), max_steps=2)  # has moved it already
    fit(module, LoRACallback(rank=2), path=tmp_path / "base.ckpt", max_steps=2)
    assert not torch.equal(module.center, other.center)
    detach(module)
    assert torch.equal(module.center, other.center)


class Fills(Toy):
    """Takes the mean of its inputs from the data in a hook, unless it has one, in one of the ways that users write."""

    hook, way = "setup", "copy"

    def build(self) -> None:
        super().build()
        if self.way != "registered":
            self.register_buffer("center", None if self.way == "none" else torch.zeros(8))

    def fill(self, stage: str = "") -> None:
        value = torch.arange(8.0).roll(self.shift) + 1
        if self.way == "copy":
            self.center.copy_(value)
        elif self.way == "none":
            self.center = value
        elif self.way == "registered":
            self.register_buffer("center", value)
        else:
            self.center.data.copy_(value)

    shift = 0

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x - self.center)

    def loss(self, batch: list[Tensor]) -> Tensor:
        return ((self(batch[0]) - batch[1]) ** 2).mean()


@pytest.mark.parametrize("way", ["copy", "none", "registered", "data"])
@pytest.mark.parametrize("hook", ["setup", "on_fit_start", "on_train_start"])
def test_what_a_hook_sets_comes_back_however_it_is_set(hook: str, way: str, tmp_path: Path):
    kind = type("Kind", (Fills,), {"way": way, hook: Fills.fill})
    fit(module := kind(), LoRACallback(rank=2), max_steps=2).save_checkpoint(tmp_path / "a.ckpt")
    load_adapter(loaded := type("Kind", (Fills,), {"way": way})(), tmp_path / "a.ckpt")
    assert torch.equal(loaded.center, torch.arange(8.0) + 1)
    assert torch.equal(loaded(X), module(X))


def test_a_hook_that_moves_values_of_equal_sums_is_seen(tmp_path: Path):
    module = type("Kind", (Fills,), {"setup": Fills.fill})()
    module.center.copy_(torch.arange(8.0) + 1)
    module.shift = 3
    fit(module, LoRACallback(rank=2), max_steps=2).save_checkpoint(tmp_path / "a.ckpt")
    load_adapter(loaded := Fills(), tmp_path / "a.ckpt")
    assert torch.equal(loaded.center, (torch.arange(8.0) + 1).roll(3))


class MeasuresOnce(Measures):
    """Takes the mean of the task's inputs unless it has one already."""

    def setup(self, stage: str) -> None:
        if not self.center.any():
            self.center += self.mean


class MeasuresAtFitStart(MeasuresOnce):
    setup = Toy.setup

    def on_fit_start(self) -> None:
        MeasuresOnce.setup(self, "fit")


@pytest.mark.parametrize("kind", [MeasuresOnce, MeasuresAtFitStart])
def test_each_task_and_each_fold_measures_anew(kind: type[Measures]):
    module, folds = kind(), kind()
    for name, module.mean in {"first": 1.0, "second": 10.0}.items():
        fit(module, LoRACallback(adapter=name, rank=2), max_steps=2)
        with using(module, None):
            assert not module.center.any()
    for folds.mean in (1.0, 10.0):
        fit(folds, LoRACallback(rank=2, fresh=True), max_steps=2)
        assert torch.equal(folds.center, torch.full((8,), folds.mean))
    for name, mean in {"first": 1.0, "second": 10.0}.items():
        with using(module, name):
            assert torch.equal(module.center, torch.full((8,), mean))
    for each in (module, folds):
        detach(each)
        assert not each.center.any()


def test_a_reference_inside_a_fit_has_what_setup_has_set():
    class Compares(Measures):
        def loss(self, batch: list[Tensor]) -> Tensor:
            with torch.no_grad():
                for reference in (disabled(self), using(self, None)):
                    with reference:
                        assert torch.equal(self.center, torch.full((8,), 2.0))
            return super().loss(batch)

    module = Compares()
    module.mean = 2.0
    fit(module, LoRACallback(adapter="policy", rank=2), max_steps=2)


def test_buffers_that_come_with_weights_in_setup_belong_to_the_base():
    class Loads(Measures):
        def setup(self, stage: str) -> None:
            with torch.no_grad():
                self.net[0].weight.fill_(0.25)
            self.center.fill_(3.0)

    module = Loads()
    fit(module, LoRACallback(rank=2), max_steps=2)
    detach(module)
    assert torch.equal(module.center, torch.full((8,), 3.0))


def test_what_is_set_after_a_fit_outlives_the_next_one(tmp_path: Path):
    module = Measures()
    fit(module, LoRACallback(adapter="first", rank=2), max_steps=2)
    module.center.fill_(3.0)
    fit(module, LoRACallback(adapter="first", rank=2), max_steps=2).save_checkpoint(tmp_path / "a.ckpt")
    load_adapter(loaded := Measures(), tmp_path / "a.ckpt")
    for each in (module, loaded):
        assert torch.equal(each.center, torch.full((8,), 3.0))
    with using(module, None):
        assert not module.center.any()


class Referred(Centered):
    """Has a norm with running statistics, and computes with the base and with a frozen adapter in each step."""

    refers = True

    def build(self) -> None:
        super().build()
        self.norm = nn.BatchNorm1d(8)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(super().forward(x))

    def loss(self, batch: list[Tensor]) -> Tensor:
        for name in (None, "frozen") if self.refers else ():
            with torch.no_grad(), using(self, name):
                self(batch[0])
        return super().loss(batch)


@pytest.mark.parametrize("options", [{"modules_to_save": ["norm"]}, {"frozen_norm": "track"}], ids=["full", "track"])
def test_computing_with_another_adapter_in_a_step_moves_none_of_its_buffers(options: dict[str, Any]):
    module, single = Referred(), Referred()
    single.refers = False
    bare = alone_with_norm(module, None)
    for each in (module, single):
        add_adapter(each, "frozen", LoRAConfig(rank=2, **options))
    frozen = alone_with_norm(module, "frozen")
    for each in (module, single):
        fit(each, LoRACallback(adapter="trained", rank=2, **options), max_steps=4)
    assert_alike(alone_with_norm(module, "trained"), alone_with_norm(single, "trained"))
    assert_alike(alone_with_norm(module, "frozen"), frozen)
    with using(module, None):
        assert_alike(alone_with_norm(module, None), bare)
    detach(module)
    assert_alike(alone_with_norm(module, None), bare)


class AddsLate(Referred):
    """Adds the adapter that it refers to only when the fit has begun."""

    def on_fit_start(self) -> None:
        add_adapter(self, "frozen", LoRAConfig(rank=2, frozen_norm="track"))
        self.first = alone_with_norm(self, "frozen")


@pytest.mark.parametrize("name", ["trained", None])
def test_computing_with_an_adapter_that_a_hook_has_added_moves_none_of_its_buffers(name: str | None):
    module = AddsLate()
    fit(module, LoRACallback(adapter=name, rank=2, frozen_norm="track"), max_steps=4)
    assert_alike(alone_with_norm(module, "frozen"), module.first)
    module.train()
    with using(module, "frozen"):  # after the fit, none is frozen
        module(X)
    assert module.norm.num_batches_tracked > 0
    with using(module, "frozen"):
        assert not torch.equal(module.norm.running_mean, module.first[1])


def alone_with_norm(module: Referred, name: str | None) -> tuple[Tensor | None, ...]:
    with using(module, name) if adapter_names(module) else nullcontext(), torch.no_grad():
        module.eval()
        output = module(X)
        module.train()
        return output, *map(copied, (module.norm.running_mean, module.norm.running_var, module.center, module.seen))


@pytest.mark.parametrize("kind", [MeasuresOnce, MeasuresAtFitStart])
def test_a_fresh_fit_beside_another_adapter_measures_anew(kind: type[Measures]):
    module = kind()
    for name, module.mean, fresh in (("first", 1.0, False), ("second", 10.0, False), ("first", 4.0, True)):
        fit(module, LoRACallback(adapter=name, rank=2, fresh=fresh), max_steps=2)
    for name, mean in {"first": 4.0, "second": 10.0, None: 0.0}.items():
        with using(module, name):
            assert torch.equal(module.center, torch.full((8,), mean))
    detach(module)
    assert not module.center.any()


@pytest.mark.parametrize("stage", ["fit", "validate"])
@pytest.mark.parametrize("name", [None, "mine"])
def test_a_refused_checkpoint_leaves_the_adapters_as_they_were(name: str | None, stage: str, tmp_path: Path):
    other = Toy()
    with torch.no_grad():
        other.net[0].weight += 1  # another base
    fit(other, LoRACallback(adapter="other", rank=2)).save_checkpoint(tmp_path / "other.ckpt")
    module = Toy()
    fit(module, LoRACallback(adapter=name, rank=2))
    before, names, active = module.net(X), adapter_names(module), active_adapter(module)
    with pytest.raises(ValueError, match="nothing was changed"):
        getattr(trainer(LoRACallback()), stage)(module, loader(), ckpt_path=tmp_path / "other.ckpt")
    assert (adapter_names(module), active_adapter(module)) == (names, active)
    assert torch.equal(module.net(X), before)
