"""LoRACallback(adapter=...): trains one of several adapters, and leaves the others as they are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_lora import (
    LoRACallback,
    active_adapter,
    adapter_names,
    adapter_state_dict,
    add_adapter,
    load_adapter,
    lora_layers,
    set_adapter,
    using,
)
from lightning_lora.callback import LoRAConfig
from tests.toys import BuiltInConfigureModel, BuiltInSetup, Toy, loader, trainer

OPTIONS: dict[str, Any] = {"rank": 2, "target_modules": ["net.0", "net.2"], "modules_to_save": ["net.4"]}


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
