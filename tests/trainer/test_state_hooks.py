"""Hooks that drop or rename entries of ``state_dict``, as suits whole models: no file lacks any of an adapter."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint
from torch import Tensor, nn

from lightning_lora import LoRACallback, adapter_state_dict, load_adapter
from tests.contract import assert_same_bits
from tests.files import run
from tests.toys import FEATURES, Toy, digest, loader, network, snapshot, trainer

SAID = r"LoRA: on_save_checkpoint of \w+ removes, renames or exchanges net\.0\.lora\.A"


class Plain(Toy):
    """Has a head beside the network that hooks leave out or rename, and scores the first epoch best."""

    def build(self) -> None:
        self.net = network()
        self.head = nn.Linear(FEATURES, FEATURES)
        nn.init.eye_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def loss(self, batch: list[Tensor]) -> Tensor:
        return ((self.head(self.net(batch[0])) - batch[1]) ** 2).mean()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", float(self.current_epoch))


def renamed(state: dict[str, Any], old: str, new: str) -> dict[str, Any]:
    return {new + name.removeprefix(old) if name.startswith(old) else name: value for name, value in state.items()}


class Drops(Plain):
    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        state = checkpoint["state_dict"]
        for name in [name for name in state if name.startswith("net.")]:
            del state[name]


class DropsAndFillsIn(Drops):
    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        saved = checkpoint["state_dict"]
        own = {name: value for name, value in self.state_dict().items() if name.startswith("net.")}
        checkpoint["state_dict"] = saved | own


class Renames(Plain):
    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["state_dict"] = renamed(checkpoint["state_dict"], "net.", "backbone.")

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["state_dict"] = renamed(checkpoint["state_dict"], "backbone.", "net.")


class Prefixes(Plain):
    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["state_dict"] = renamed(checkpoint["state_dict"], "", "model.")

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["state_dict"] = {name.removeprefix("model."): v for name, v in checkpoint["state_dict"].items()}


class Strips(Plain):
    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["state_dict"] = renamed(checkpoint["state_dict"], "net.", "")

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        state = checkpoint["state_dict"]
        checkpoint["state_dict"] = {n if n.startswith("head.") else f"net.{n}": value for n, value in state.items()}


class LoadsBoth(Strips):
    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        before = dict(checkpoint["state_dict"])
        super().on_load_checkpoint(checkpoint)
        checkpoint["state_dict"] = before | checkpoint["state_dict"]


class Exchanges(Plain):
    """Has two layers of one shape under exchanged names in its files."""

    def build(self) -> None:
        super().build()
        self.other = nn.Linear(FEATURES, FEATURES)
        self.other.load_state_dict(self.head.state_dict())

    def loss(self, batch: list[Tensor]) -> Tensor:
        x, y = batch
        return ((self.head(self.net(x)) - y) ** 2).mean() + ((self.other(self.net(x)) - 2 * y) ** 2).mean()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        names = {"head": "other", "other": "head"}
        state = checkpoint["state_dict"].items()
        exchanged = {".".join([names.get((parts := name.split("."))[0], parts[0]), *parts[1:]]): v for name, v in state}
        checkpoint["state_dict"] = exchanged

    on_load_checkpoint = on_save_checkpoint


HOOKS = [Drops, DropsAndFillsIn, Renames, Prefixes, Strips, LoadsBoth, Exchanges]


def fitted(module: Plain, directory: Path, *callbacks: Callback, **lora: Any) -> tuple[str, str]:
    """Train for two epochs, of which the first scores best, and return the best checkpoint and the last one."""
    best = ModelCheckpoint(directory, filename="best", monitor="val_loss")
    last = ModelCheckpoint(directory, filename="last")
    callbacks = (LoRACallback(rank=2, **lora), *callbacks, best, last)
    options = {"max_epochs": 2, "max_steps": -1, "limit_val_batches": 1, "root": directory}
    trainer(*callbacks, **options).fit(module, loader(), loader())
    return best.best_model_path, last.best_model_path


@pytest.mark.filterwarnings("ignore:LoRA. on_save_checkpoint")
@pytest.mark.parametrize("options", [{}, {"modules_to_save": ["head"]}], ids=["factors", "head"])
@pytest.mark.parametrize("kind", HOOKS)
def test_no_hook_takes_tensors_of_the_adapter_out_of_its_files(
    kind: type[Plain], options: dict[str, Any], tmp_path: Path
) -> None:
    class Same(kind):  # the same layers without the hooks
        on_save_checkpoint = on_load_checkpoint = Plain.on_save_checkpoint

    true_best, true_last = fitted(Same(), tmp_path / "plain", **options)
    best_path, last_path = fitted(module := kind(), tmp_path / "hooks", export_dir=str(tmp_path / "peft"), **options)
    for path, true in ((best_path, true_best), (last_path, true_last)):
        state, wanted = (torch.load(each, weights_only=True)["state_dict"] for each in (path, true))
        assert_same_bits(state, wanted)
    assert_same_bits(adapter_state_dict(module), wanted)

    load_adapter(best := Same(), true_best)
    load_adapter(again := kind(), best_path)
    assert digest(again) == digest(best)
    trainer(LoRACallback()).test(tested := kind(), loader(), ckpt_path=best_path, verbose=False)
    assert digest(tested) == digest(best)
    started = LoRACallback(rank=2, init_from=best_path, allow_untrained=["*"], **options)
    trainer(started, max_epochs=0).fit(begun := kind(), loader())
    assert_same_bits(adapter_state_dict(begun), adapter_state_dict(best))
    load_adapter(exported := kind(), tmp_path / "peft")
    assert_same_bits(adapter_state_dict(exported), adapter_state_dict(best))
    assert run("export", best_path, tmp_path / "command") == 0

    resumed = Same(), kind()
    for each, saved in zip(resumed, (true_last, last_path), strict=True):
        callback = LoRACallback(rank=2, **options)
        trainer(callback, max_epochs=3, max_steps=-1).fit(each, loader(), ckpt_path=saved)
    assert digest(resumed[1]) == digest(resumed[0])
    assert resumed[1].losses == resumed[0].losses


def test_saving_says_once_which_tensors_hooks_could_not_remove(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match=SAID) as caught:
        fitted(Drops(), tmp_path)
    assert sum("on_save_checkpoint" in str(each.message) for each in caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        trainer(LoRACallback(rank=2)).fit(module := Plain(), loader(), loader())
        module.trainer.save_checkpoint(tmp_path / "plain.ckpt")


def test_no_callback_takes_tensors_of_the_adapter_out_of_its_files(tmp_path: Path) -> None:
    class Empties(Callback):
        def on_save_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
            del checkpoint["state_dict"]

    with pytest.warns(
        UserWarning, match=r"LoRA: on_save_checkpoint of a callback removes, renames or exchanges net\.0"
    ):
        path = fitted(module := Plain(), tmp_path, Empties())[1]
    load_adapter(again := Plain(), path)
    assert digest(again) == digest(module)


@pytest.mark.filterwarnings("ignore:LoRA. on_save_checkpoint")
@pytest.mark.parametrize("kind", [Drops, Renames, Exchanges])
def test_averages_are_restored_as_averages(kind: type[Plain], tmp_path: Path) -> None:
    class Same(kind):
        on_save_checkpoint = on_load_checkpoint = Plain.on_save_checkpoint

    states = []
    for each in (Same, kind):
        path = fitted(module := each(), tmp_path / each.__name__, EMAWeightAveraging(decay=0.5))[0]
        states.append(torch.load(path, weights_only=True)["state_dict"])
    assert_same_bits(states[1], states[0])
    assert not torch.equal(states[1]["net.0.lora.B"], adapter_state_dict(module)["net.0.lora.B"])


@pytest.mark.filterwarnings("ignore:LoRA. on_save_checkpoint")
def test_hooks_are_watched_only_while_a_checkpoint_is_made(tmp_path: Path) -> None:
    fitted(module := Drops(), tmp_path)
    module.trainer.save_checkpoint(tmp_path / "after.ckpt")
    assert "on_save_checkpoint" not in vars(module)
    assert (
        torch.load(tmp_path / "after.ckpt", weights_only=True)["state_dict"].keys() == adapter_state_dict(module).keys()
    )


def test_hooks_may_still_decide_about_a_head_in_full_on_loading(tmp_path: Path) -> None:
    class Doubles(Plain):
        def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
            checkpoint["state_dict"]["head.weight"] = 2 * checkpoint["state_dict"]["head.weight"]

    class Leaves(Plain):
        def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
            del checkpoint["state_dict"]["head.weight"]

    path = fitted(module := Plain(), tmp_path, modules_to_save=["head"])[1]
    trainer(LoRACallback()).test(doubled := Doubles(), loader(), ckpt_path=path, verbose=False)
    assert torch.equal(doubled.head.weight, 2 * module.head.weight)
    with pytest.raises(ValueError, match=r"missing from the state: head\.weight"):
        trainer(LoRACallback()).test(Leaves(), loader(), ckpt_path=path, verbose=False)


def test_export_of_a_checkpoint_that_lacks_tensors_names_them(tmp_path: Path) -> None:
    class Damages(Callback):
        def on_train_end(self, trainer: Any, pl_module: Any) -> None:
            path = trainer.checkpoint_callback.best_model_path
            checkpoint = torch.load(path, weights_only=False)
            del checkpoint["state_dict"]["net.2.lora.B"]
            torch.save(checkpoint, path)

    module = Plain()
    with pytest.raises(ValueError, match=r"best\.ckpt' lacks net\.2\.lora\.B, .*Nothing was written"):
        fitted(module, tmp_path / "files", Damages(), export_dir=str(tmp_path / "peft"))
    assert not (tmp_path / "peft").exists()
    assert snapshot(module)["net.2.lora.B"].any()


# --- what hooks add


class Adds(Plain):
    """Saves what no parameter or buffer holds, a queue and a copy of its head, and takes them back."""

    def __init__(self) -> None:
        super().__init__()
        self.queue, self.best = torch.zeros(3), torch.zeros(())

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.queue += 1
        return super().training_step(batch, batch_idx)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        state = checkpoint["state_dict"]
        state |= {"queue": self.queue.clone(), "net.0.best": state["net.0.lora.A"], "count": 7}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        state = checkpoint["state_dict"]
        self.queue, self.best, count = state.pop("queue"), state.pop("net.0.best"), state.pop("count")
        assert count == 7


ADDED = ["count", "net.0.best", "queue"]


@pytest.mark.parametrize("average", [[], [EMAWeightAveraging(decay=0.5)]], ids=["alone", "averaged"])
def test_hooks_take_back_what_they_have_added(average: list[Callback], tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "LoRA: on_save_checkpoint")
        path = fitted(module := Adds(), tmp_path, *average)[1]
    state = torch.load(path, weights_only=True)["state_dict"]
    assert sorted(state.keys() - adapter_state_dict(module).keys()) == ADDED
    assert torch.equal(state["queue"], module.queue)
    resumed = Adds()
    trainer(LoRACallback(rank=2), *average, max_epochs=3, max_steps=-1).fit(resumed, loader(), ckpt_path=path)
    assert torch.equal(resumed.queue, module.queue * 3 / 2)
    assert torch.equal(resumed.best, state["net.0.lora.A"])


def test_what_hooks_have_added_is_no_obstacle_to_readers_that_call_none(tmp_path: Path) -> None:
    path, last = fitted(module := Adds(), tmp_path / "files", export_dir=str(tmp_path / "peft"))
    for read in (last, tmp_path / "peft"):
        load_adapter(loaded := Plain(), read)
        if read == last:
            assert digest(loaded) == digest(module)
    started = LoRACallback(rank=2, init_from=last, allow_untrained=["*"])
    trainer(started, max_epochs=0).fit(begun := Adds(), loader())
    assert_same_bits(adapter_state_dict(begun), adapter_state_dict(module))
    for command in (["export", path, tmp_path / "command"], ["inspect", path]):
        assert run(*command) == 0


def test_what_no_hook_takes_back_is_unknown_unless_loading_is_not_strict(tmp_path: Path) -> None:
    path = fitted(module := Adds(), tmp_path)[1]
    with pytest.raises(ValueError, match=r"unknown to the model: queue, count, added by on_save_checkpoint"):
        trainer(LoRACallback()).test(Plain(), loader(), ckpt_path=path, verbose=False)
    loose = Plain()
    loose.strict_loading = False
    trainer(LoRACallback()).test(loose, loader(), ckpt_path=path, verbose=False)
    assert digest(loose) == digest(module)


def test_a_hook_may_load_what_it_has_added_in_the_place_of_a_trained_tensor(tmp_path: Path) -> None:
    class Better(Plain):
        def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
            checkpoint["state_dict"]["better"] = 2 * self.head.weight.detach()

        def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
            checkpoint["state_dict"]["head.weight"] = checkpoint["state_dict"].pop("better")

    path = fitted(module := Better(), tmp_path, modules_to_save=["head"])[1]
    trainer(LoRACallback()).test(again := Better(), loader(), ckpt_path=path, verbose=False)
    assert torch.equal(again.head.weight, 2 * module.head.weight)


def test_callbacks_may_add_entries_too(tmp_path: Path) -> None:
    class AddsMean(Callback):
        def on_save_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
            checkpoint["state_dict"]["mean"] = torch.ones(2)

    path = fitted(module := Plain(), tmp_path, AddsMean())[1]
    assert torch.equal(torch.load(path, weights_only=True)["state_dict"]["mean"], torch.ones(2))
    load_adapter(again := Plain(), path)
    assert digest(again) == digest(module)


def test_no_hook_adds_the_base_itself(tmp_path: Path) -> None:
    """Neither under its names, as a copy of the whole model, nor itself under other names: that is said."""

    class AddsAll(Plain):
        def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
            checkpoint["state_dict"] |= {name: each.clone() for name, each in self.state_dict().items()}
            if type(self).__name__ == "Twice":
                checkpoint["state_dict"] |= {f"teacher.{name}": each for name, each in self.state_dict().items()}

    class Twice(AddsAll):
        pass

    path = fitted(module := AddsAll(), tmp_path / "once")[1]
    wanted = adapter_state_dict(module)
    assert_same_bits(torch.load(path, weights_only=True)["state_dict"], wanted)
    with pytest.warns(UserWarning, match=r"on_save_checkpoint adds teacher\.net\.0\.weight.*add copies") as caught:
        path = fitted(module := Twice(), tmp_path / "twice")[1]
    assert sum("on_save_checkpoint adds" in str(each.message) for each in caught) == 1
    state, wanted = torch.load(path, weights_only=True)["state_dict"], adapter_state_dict(module)
    assert_same_bits(state, wanted | {f"teacher.{name}": value for name, value in wanted.items()})
