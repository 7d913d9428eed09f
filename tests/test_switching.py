"""Several named adapters on one base: each computes as it would alone, and switching changes nothing but which one."""

from __future__ import annotations

import copy
import pickle
import random
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter
from torch.utils.checkpoint import CheckpointFunction, checkpoint

from lightning_lora import (
    LoRAConfig,
    active_adapter,
    adapter_names,
    adapter_state_dict,
    add_adapter,
    attach,
    combine,
    detach,
    disabled,
    load_adapter,
    load_adapter_state_dict,
    lora_layers,
    merge,
    merged,
    parameter_groups,
    remove_adapter,
    routed,
    save_adapter,
    set_adapter,
    using,
)
from lightning_lora.ops import checkpointing
from lightning_lora.switching import others_hidden
from tests.contract import Case, each_case, learn, raises_and_changes_nothing, train_all

WIDTH = 48
Twin = Callable[[nn.Module], nn.Module]


class Mixed(nn.Module):
    """One layer of each way to carry an update, and a norm with running statistics."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(24, WIDTH)
        self.conv = nn.Conv1d(WIDTH, WIDTH, 3, padding=1)
        self.norm = nn.BatchNorm1d(WIDTH)
        self.rnn = nn.LSTM(WIDTH, WIDTH, batch_first=True)
        self.fc = nn.Linear(WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, 12)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.norm(self.conv(self.embed(tokens).transpose(1, 2))).transpose(1, 2)
        return self.head(torch.relu(self.fc(self.rnn(x)[0])))


CONFIGS = {
    "plain": LoRAConfig(rank=2, target_modules=["fc", "conv", "embed"]),
    "head": LoRAConfig(rank=4, use_rslora=True, target_modules=["fc", "rnn"], modules_to_save=["head"]),
    "dora": LoRAConfig(rank=3, use_dora=True, target_modules=["head", "fc"], bias="all"),
    "rows": LoRAConfig(rank=1, target_modules=["conv"], trainable_token_indices=[1, 5], frozen_norm="track"),
    "norm": LoRAConfig(rank=2, lora_bias=True, target_modules=["head"], modules_to_save=["norm"]),
}


def base() -> Mixed:
    torch.manual_seed(3)
    return Mixed()


def tokens() -> Tensor:
    return torch.arange(24).reshape(2, 12)


@pytest.fixture(scope="module")
def alone() -> dict[str, nn.Module]:
    """Each adapter on a base of its own."""
    found = {}
    for seed, (name, config) in enumerate(CONFIGS.items()):
        found[name] = base()
        attach(found[name], config, seed=seed)
        learn(found[name], seed)
    return found


@pytest.fixture
def model(alone: dict[str, nn.Module]) -> nn.Module:
    """All of them on one base."""
    module = base()
    for seed, (name, config) in enumerate(CONFIGS.items()):
        add_adapter(module, name, config, seed=seed)
        with using(module, name):
            load_adapter_state_dict(module, adapter_state_dict(alone[name]))
    return module


def base_bits(module: nn.Module) -> dict[str, Tensor]:
    with using(module, None):
        return {name: value.clone() for name, value in module.state_dict().items() if "lora" not in name}


def test_each_adapter_computes_as_it_does_alone(model: nn.Module, alone: dict[str, nn.Module]):
    for name in CONFIGS:
        set_adapter(model, name)
        for mode in (True, False):
            mine, own = copy.deepcopy(model), copy.deepcopy(alone[name])  # statistics move in training
            assert torch.equal(mine.train(mode)(tokens()), own.train(mode)(tokens()))


def test_random_switches_leave_the_base_and_the_adapters_bit_equal(model: nn.Module, alone: dict[str, nn.Module]):
    before, chooser = base_bits(model), random.Random(0)
    for _ in range(30):
        with using(model, chooser.choice([*CONFIGS, None])):
            model.eval()(tokens())
        set_adapter(model, chooser.choice([*CONFIGS]))
    bare = base().state_dict()
    assert {name: torch.equal(value, bare[name]) for name, value in before.items()} == dict.fromkeys(bare, True)
    after = base_bits(model)
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    for name in CONFIGS:
        with using(model, name):
            state, mine = adapter_state_dict(alone[name]), adapter_state_dict(model)
            assert mine.keys() == state.keys()
            assert all(torch.equal(mine[key], state[key]) for key in state)


@pytest.mark.parametrize("context", [merged, disabled])
def test_an_adapter_is_added_to_layers_that_were_merged_or_disabled_before(context: Callable[..., Any]):
    module = base()
    add_adapter(module, "one", CONFIGS["plain"])
    with context(module):
        pass
    add_adapter(module, "two", CONFIGS["plain"])
    assert adapter_names(module) == ["one", "two"]


def test_none_is_the_bare_base_of_its_own_classes(model: nn.Module):
    with using(model, None):
        assert active_adapter(model) is None
        assert lora_layers(model) == {}
        assert type(model.fc) is nn.Linear
        assert torch.equal(model.eval()(tokens()), base().eval()(tokens()))
    assert active_adapter(model) == "plain"


def test_uses_nest_and_survive_exceptions(model: nn.Module):
    with using(model, "dora"):
        with pytest.raises(KeyError), using(model, "rows"):  # noqa: PT012
            with using(model, None):
                assert active_adapter(model) is None
            assert active_adapter(model) == "rows"
            raise KeyError
        assert active_adapter(model) == "dora"
    assert active_adapter(model) == "plain"


def test_switching_keeps_parameters_and_their_gradient_flags(model: nn.Module):
    flags: dict[str, list[tuple[int, bool]]] = {}
    for _ in range(2):
        for name in CONFIGS:
            set_adapter(model, name)
            now = [(id(p), p.requires_grad) for group in parameter_groups(model, 1.0) for p in group["params"]]
            assert flags.setdefault(name, now) == now
            assert all(requires_grad for _, requires_grad in now)
    counts = [len(now) for now in flags.values()]
    assert len({p for now in flags.values() for p, _ in now}) == sum(counts)  # no parameter belongs to two


@pytest.mark.parametrize("context", [using, lambda model, name: routed(model, [name, None])])
def test_an_adapter_drops_as_its_layer_does_after_modes_were_put_back_by_name(context: Callable[..., Any]):
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH))
    for name in ("first", "second"):
        add_adapter(model, name, LoRAConfig(rank=2, dropout=0.5))
        set_adapter(model, name)
        learn(model, 1)
    modes = {name: part.training for name, part in model.named_modules()}  # as Lightning does around a validation
    model.eval()
    set_adapter(model, "first")
    for name, part in model.named_modules():
        part.training = modes.get(name, part.training)
    with context(model, "second"):
        x = torch.ones(2, WIDTH)
        assert not torch.equal(model(x)[0], model(x)[0])
        model.eval()
        assert torch.equal(model(x)[0], model(x)[0])


def test_training_one_adapter_leaves_the_others_bit_equal(model: nn.Module, alone: dict[str, nn.Module]):
    set_adapter(model, "head")
    optimizer = torch.optim.AdamW(parameter_groups(model, 0.1, weight_decay=0.1))
    for _ in range(3):
        optimizer.zero_grad()
        model.train()(tokens()).square().sum().backward()
        optimizer.step()
    changed = {
        name: not all(torch.equal(value, state[key]) for key, value in adapter_state_dict(alone[name]).items())
        for name in CONFIGS
        for state in [_state(model, name)]
    }
    assert changed == dict.fromkeys(CONFIGS, False) | {"head": True}
    assert torch.equal(base_bits(model)["head.weight"], base().head.weight)


def _state(module: nn.Module, name: str) -> dict[str, Tensor]:
    with using(module, name):
        return adapter_state_dict(module)


def test_a_graph_may_hold_several_adapters(model: nn.Module, alone: dict[str, nn.Module]):
    """A reference pass inside of a step, and backward afterwards: as in preference optimization."""
    set_adapter(model, "head")
    policy = model.eval()(tokens())
    with using(model, "plain"):
        reference = model(tokens())
    (policy * reference.detach()).sum().backward()
    twin = copy.deepcopy(alone["head"]).eval()
    (twin(tokens()) * copy.deepcopy(alone["plain"]).eval()(tokens()).detach()).sum().backward()
    assert torch.equal(model.head.weight.grad, twin.head.weight.grad)
    assert torch.equal(model.fc.lora.B.grad, twin.fc.lora.B.grad)


@pytest.mark.parametrize("twin", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["copied", "pickled"])
def test_a_copy_switches_by_itself(
    twin: Callable[[nn.Module], nn.Module], model: nn.Module, alone: dict[str, nn.Module]
):
    other = twin(model)
    for name in CONFIGS:
        set_adapter(other, name)
        assert torch.equal(other.eval()(tokens()), copy.deepcopy(alone[name]).eval()(tokens()))
    assert active_adapter(model) == "plain"


def test_the_module_moves_with_all_its_adapters(model: nn.Module):
    model.double()
    for name in (*CONFIGS, None):
        with using(model, name):
            assert model.eval()(tokens()).dtype is torch.float64


def test_state_dict_of_the_module_holds_all(model: nn.Module, alone: dict[str, nn.Module]):
    other = base()
    for name, config in CONFIGS.items():
        add_adapter(other, name, config)
    other.load_state_dict(model.state_dict())
    for name in CONFIGS:
        with using(other, name):
            assert torch.equal(other.eval()(tokens()), copy.deepcopy(alone[name]).eval()(tokens()))


# --- the first adapter, and adding


ALONE_REFUSED = {
    "an unknown name": lambda m: set_adapter(m, "x"),
    "an unknown name to use": lambda m: using(m, "x").__enter__(),
    "an unknown name to remove": lambda m: remove_adapter(m, "x"),
    "removing the only one": lambda m: remove_adapter(m, "default"),
    "merging an unknown one": lambda m: merge(m, "x"),
    "targets that match nothing": lambda m: add_adapter(m, "new", LoRAConfig(target_modules=["no"])),
    "routing to an unknown one": lambda m: routed(m, ["x", None]).__enter__(),
    "a sum with an unknown one": lambda m: combine(m, {"x": 1.0}, name="sum"),
    "a sum that is zero": lambda m: combine(m, {"default": 0.0}, name="sum"),
}


@pytest.mark.parametrize("what", ALONE_REFUSED)
def test_a_refused_call_leaves_a_single_adapter_without_a_name(what: str):
    module = base()
    attach(module, CONFIGS["plain"])
    with raises_and_changes_nothing(module, ValueError):
        ALONE_REFUSED[what](module)


def test_every_function_finds_an_adapter_that_is_named_by_a_number():
    module = base()
    for name in ("other", "lr=3e-4"):
        add_adapter(module, name, CONFIGS["plain"])
    learn(module, 0)
    assert combine(module, {"lr=0.0003": 1.0, "other": 1.0}, name="sum")
    remove_adapter(module, "lr=0.0003")
    assert adapter_names(module) == ["other", "sum"]


@pytest.mark.parametrize("first", [attach, lambda m, config: add_adapter(m, "first", config)])
def test_detach_thaws_a_tied_weight_after_several_adapters(first: Callable[..., Any]):
    module = nn.Sequential(nn.Embedding(8, 4), nn.Linear(4, 4), nn.Linear(4, 8))
    module[2].weight = module[0].weight
    config = LoRAConfig(rank=1, target_modules=["1"])
    first(module, config)
    add_adapter(module, "second", config)
    detach(module)
    assert all(parameter.requires_grad for parameter in module.parameters())


def test_an_adapter_without_a_name_is_the_default():
    module = base()
    assert (adapter_names(module), active_adapter(module)) == ([], None)
    attach(module, CONFIGS["plain"])
    assert (adapter_names(module), active_adapter(module)) == (["default"], "default")
    assert not any("lora_others" in name for name, _ in module.named_modules())
    set_adapter(module, "default")
    add_adapter(module, "second", CONFIGS["dora"])
    assert (adapter_names(module), active_adapter(module)) == (["default", "second"], "default")


def test_a_single_adapter_can_be_switched_off():
    module = base().eval()
    attach(module, CONFIGS["rows"])
    learn(module, 0)
    adapted = module(tokens())
    with using(module, None):
        assert torch.equal(module(tokens()), base().eval()(tokens()))
    assert torch.equal(module(tokens()), adapted)


def test_sources_are_options_files_directories_and_tensors(tmp_path: Path, alone: dict[str, nn.Module]):
    module = base()
    save_adapter(alone["plain"], tmp_path / "peft")
    report = add_adapter(module, "directory", tmp_path / "peft")
    assert [layer.name for layer in report.layers] == ["embed", "conv", "fc"]
    load_adapter(module, tmp_path / "peft", name="loaded")
    add_adapter(module, "tensors", adapter_state_dict(alone["plain"]))
    add_adapter(module, "fresh", CONFIGS["plain"], seed=0)
    add_adapter(module, "by default")
    expected = copy.deepcopy(alone["plain"]).eval()(tokens())
    for name in ("directory", "loaded", "tensors"):
        set_adapter(module, name)
        assert torch.equal(module.eval()(tokens()), expected)
    set_adapter(module, "fresh")
    assert torch.equal(module.fc.lora.A, attached(CONFIGS["plain"]).fc.lora.A)
    set_adapter(module, "by default")
    assert len(lora_layers(module)) == len(lora_layers(attached(LoRAConfig())))


def attached(config: LoRAConfig) -> Mixed:
    module = base()
    attach(module, config, seed=0)
    return module


def test_a_trained_head_is_not_taken_for_the_base(alone: dict[str, nn.Module]):
    module = base()
    add_adapter(module, "head", CONFIGS["head"])
    learn(module, 1)
    add_adapter(module, "second", LoRAConfig(rank=2, target_modules=["fc"], modules_to_save=["head"]))
    set_adapter(module, "second")
    assert torch.equal(module.head.weight, base().head.weight)


def test_removing_forgets_an_adapter_and_nothing_else(model: nn.Module, alone: dict[str, nn.Module]):
    remove_adapter(model, "head")
    assert adapter_names(model) == [name for name in CONFIGS if name != "head"]
    assert not any(".head." in name and "lora_others.head" in name for name in model.state_dict())
    for name in adapter_names(model):
        set_adapter(model, name)
        assert torch.equal(model.eval()(tokens()), copy.deepcopy(alone[name]).eval()(tokens()))


def test_detach_restores_the_base_of_all(model: nn.Module):
    set_adapter(model, "head")
    detach(model)
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert model.state_dict().keys() == base().state_dict().keys()
    assert all(torch.equal(value, base().state_dict()[name]) for name, value in model.state_dict().items())
    assert adapter_names(model) == []


def test_merge_of_one_drops_the_others(model: nn.Module, alone: dict[str, nn.Module]):
    merge(model, "head")
    assert adapter_names(model) == []
    assert model.state_dict().keys() == base().state_dict().keys()
    twin = copy.deepcopy(alone["head"])
    merge(twin)
    assert all(torch.equal(value, twin.state_dict()[name]) for name, value in model.state_dict().items())


def test_save_writes_the_active_adapter_alone(tmp_path: Path, model: nn.Module, alone: dict[str, nn.Module]):
    set_adapter(model, "plain")
    save_adapter(model, tmp_path / "mine")
    save_adapter(alone["plain"], tmp_path / "theirs")
    weights = "adapter_model.safetensors"
    assert (tmp_path / "mine" / weights).read_bytes() == (tmp_path / "theirs" / weights).read_bytes()


def test_a_head_that_trains_in_full_is_saved_without_the_others(tmp_path: Path):
    module = base()
    add_adapter(module, "one", LoRAConfig(rank=2, target_modules=["fc"], modules_to_save=["head"]))
    add_adapter(module, "two", LoRAConfig(rank=2, target_modules=["fc"], modules_to_save=["head"]))
    learn(module, 0)
    save_adapter(module, tmp_path / "one")
    other = base()
    load_adapter(other, tmp_path / "one")
    assert torch.equal(other.eval()(tokens()), module.eval()(tokens()))


# --- bad input: one error, nothing changed


REFUSED = {
    "an unknown name": (lambda m: set_adapter(m, "plian"), "no adapter 'plian'. Did you mean 'plain'"),
    "an unknown name to use": (lambda m: using(m, "x").__enter__(), "no adapter 'x'"),
    "a name in use": (lambda m: add_adapter(m, "dora", LoRAConfig()), "an adapter 'dora' already"),
    "a name with a dot": (lambda m: add_adapter(m, "a.b", LoRAConfig()), "without '.'"),
    "the name of the base": (lambda m: add_adapter(m, "base", LoRAConfig()), "'base'"),
    "no such file": (lambda m: add_adapter(m, "new", "nowhere"), "nowhere"),
    "targets that match nothing": (lambda m: add_adapter(m, "new", LoRAConfig(target_modules=["no"])), "no"),
    "tensors of other names": (lambda m: add_adapter(m, "new", {"x": torch.ones(1)}), "does not fit"),
    "removing the active adapter": (lambda m: remove_adapter(m, "plain"), "is the active adapter; call set_adapter"),
    "merging none in particular": (merge, "there are several adapters, 'plain', 'head'"),
    "merging an unknown one": (lambda m: merge(m, "x"), "no adapter 'x'"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_bad_input_is_named_and_changes_nothing(what: str, model: nn.Module):
    act, message = REFUSED[what]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    flags = [parameter.requires_grad for parameter in model.parameters()]
    with pytest.raises((ValueError, FileNotFoundError), match=message.replace(".", r"\.")):
        act(model)
    after = model.state_dict()
    assert [*after] == [*before]
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    assert [parameter.requires_grad for parameter in model.parameters()] == flags
    assert active_adapter(model) == "plain"


def test_merged_and_disabled_adapters_are_not_switched(model: nn.Module):
    remove_adapter(model, "head")
    for mode in (merged, disabled):
        with mode(model), pytest.raises(RuntimeError, match=f"inside {mode.__name__}"):
            set_adapter(model, "dora")
    set_adapter(model, "dora")


def test_adapters_can_be_added_after_the_active_one_was_off():
    module = base()
    attach(module, CONFIGS["plain"])
    with disabled(module):
        module(tokens())
    add_adapter(module, "second", CONFIGS["plain"])
    set_adapter(module, "second")
    assert type(module.fc).__name__ == "LoRALinear"


def test_other_bases_are_refused(tmp_path: Path, alone: dict[str, nn.Module]):
    save_adapter(alone["plain"], tmp_path / "plain")
    other = Mixed()
    add_adapter(other, "first", CONFIGS["dora"])
    with pytest.raises(ValueError, match="base"):
        add_adapter(other, "second", tmp_path / "plain")
    assert adapter_names(other) == ["first"]


def test_an_unnamed_head_whose_start_is_lost_is_refused():
    module = base()
    attach(module, CONFIGS["head"])
    with pytest.raises(ValueError, match=r"head\.weight, head\.bias train in full.*add_adapter"):
        add_adapter(module, "second", CONFIGS["plain"])
    assert adapter_names(module) == ["default"]


def test_attaching_inside_the_bare_base_is_refused(model: nn.Module):
    with using(model, None), pytest.raises(ValueError, match=r"inside using\(module, None\)"):
        attach(model, CONFIGS["plain"])


def test_a_part_of_the_module_is_refused():
    whole = nn.Sequential(base())
    for name in ("one", "two"):
        add_adapter(whole, name, CONFIGS["plain"])
    before = list(whole.state_dict())
    for act in (lambda: set_adapter(whole[0], "two"), lambda: using(whole[0], None).__enter__()):
        with pytest.raises(ValueError, match=r"attached to a parent of it; call this on the module"):
            act()
    assert list(whole.state_dict()) == before
    set_adapter(whole, "two")


@pytest.mark.parametrize("in_part", [["default"], ["plain", "rows"]], ids=["one", "several"])
def test_adapters_of_the_whole_live_beside_those_of_a_part(in_part: list[str], alone: dict[str, nn.Module]):
    whole = nn.Sequential(base())  # a directory's adapter belongs to the part that its names are relative to
    source = {"default": "plain"}
    if in_part == ["default"]:
        attach(whole[0], CONFIGS["plain"])
        load_adapter_state_dict(whole[0], adapter_state_dict(alone["plain"]))
    of_whole = [name for name in CONFIGS if name not in in_part]
    for name in (*(name for name in in_part if name != "default"), *of_whole):
        add_adapter(whole[0] if name in in_part else whole, name, CONFIGS[name])
        with using(whole, name):
            state = adapter_state_dict(alone[name])
            load_adapter_state_dict(whole, {f"0.{key}": value for key, value in state.items()})
    assert adapter_names(whole) == in_part + of_whole
    for name in [*reversed(adapter_names(whole)), *of_whole]:
        expected = copy.deepcopy(alone[source.get(name, name)]).eval()
        set_adapter(whole, name)
        assert torch.equal(whole.eval()(tokens()), expected(tokens()))
        assert [key.removeprefix("0.") for key in adapter_state_dict(whole)] == list(adapter_state_dict(expected))
    with using(whole, None):
        assert torch.equal(whole(tokens()), base().eval()(tokens()))
    set_adapter(whole, in_part[0])
    for name in of_whole:
        remove_adapter(whole, name)
    detach(whole)
    assert whole.state_dict().keys() == nn.Sequential(base()).state_dict().keys()
    assert torch.equal(whole(tokens()), base().eval()(tokens()))


def test_an_adapter_of_the_whole_that_cannot_be_added_leaves_those_of_a_part():
    whole = nn.Sequential(base())
    attach(whole[0], CONFIGS["plain"])
    before = whole.state_dict()
    with pytest.raises(ValueError, match="matched no module"):
        add_adapter(whole, "second", LoRAConfig(target_modules=["missing"]))
    assert adapter_names(whole[0]) == ["default"]
    assert all(torch.equal(value, before[name]) for name, value in whole.state_dict().items())
    set_adapter(whole[0], "default")


def test_a_module_without_adapters_is_named():
    with pytest.raises(ValueError, match="set_adapter: Mixed has no adapters"):
        set_adapter(base(), "a")


# --- activation checkpointing: a block is computed again with the adapter of its forward pass


class Checkpointed(nn.Module):
    def __init__(self, is_reentrant: bool | None) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.first, self.block = nn.Linear(WIDTH, WIDTH), nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh())
        self.is_reentrant = is_reentrant

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        if self.is_reentrant is None:
            return self.block(x)
        return checkpoint(self.block, x, use_reentrant=self.is_reentrant)


def checkpointed(is_reentrant: bool | None) -> nn.Module:
    module = Checkpointed(is_reentrant)
    for seed, name in enumerate(("a", "b")):
        add_adapter(module, name, LoRAConfig(rank=2 + seed), seed=seed)
        with using(module, name):
            learn(module, seed)
    return module


def gradients(module: nn.Module) -> dict[str, Tensor]:
    found = {}
    for name in ("a", "b"):
        with using(module, name):
            found |= {f"{name}.{key}": p.grad for key, p in module.named_parameters() if p.grad is not None}
    return found


@pytest.mark.parametrize("is_reentrant", [True, False])
@pytest.mark.parametrize("kind", ["reference with gradients", "backward elsewhere", "switched", "routed"])
def test_recomputation_uses_the_adapter_of_the_forward_pass(is_reentrant: bool, kind: str):
    results = {}
    for mode in (None, is_reentrant):
        module, x = copy.deepcopy(checkpointed(mode)), torch.linspace(-1, 1, 2 * WIDTH).reshape(2, WIDTH)
        if kind == "reference with gradients":
            policy = module(x)
            with using(module, "b"):
                (policy * module(x)).sum().backward()
        elif kind == "backward elsewhere":
            with using(module, "b"):
                loss = module(x).square().sum()
            loss.backward()
        elif kind == "switched":
            loss = module(x).square().sum()
            set_adapter(module, "b")
            loss.backward()
        else:
            with routed(module, ["b", "a"]):
                loss = module(x).square().sum()
            loss.backward()
        results[mode] = gradients(module)
    assert results[None].keys() == results[is_reentrant].keys()
    for name, gradient in results[None].items():
        torch.testing.assert_close(results[is_reentrant][name], gradient)


@pytest.mark.parametrize("takes_tuples", [False, True])
def test_recomputation_is_restored_in_older_and_newer_torch(takes_tuples: bool, monkeypatch: pytest.MonkeyPatch):
    """Torch 2.14 hands a block's inputs as a tuple and a dictionary to a function of another name."""
    newer, older = "_checkpoint_without_reentrant_generator_impl", "_checkpoint_without_reentrant_generator"
    kept = []

    def keep(function: Callable[..., Any], inputs: Any, named: Any) -> None:
        kept.append(lambda: function(*inputs, **named))

    known = SimpleNamespace(CheckpointFunction=CheckpointFunction)
    setattr(known, older, lambda function, *inputs, **named: keep(function, inputs, named))
    if takes_tuples:
        setattr(known, newer, keep)
    monkeypatch.setattr(checkpointing, "checkpoint", known)
    module = checkpointed(None)
    with using(module, "b"):
        called = getattr(known, newer if takes_tuples else older)
        called(lambda: active_adapter(module), *([(), {}] if takes_tuples else []))
    assert active_adapter(module) == "a"
    assert [block() for block in kept] == ["b"]


def compiled_graphs(ranks: tuple[int, ...], *, with_gradients: bool) -> int:
    """Switch a compiled model back and forth, compare it with the model, and return how many graphs that took."""
    module = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Conv1d(3, 3, 1), nn.Linear(WIDTH, WIDTH))
    names = [f"rank {rank}" for rank in ranks]
    for seed, (name, rank) in enumerate(zip(names, ranks, strict=True)):
        add_adapter(module, name, LoRAConfig(rank=rank, target_modules=["0", "3"]))  # their scalings differ, too
        with using(module, name):
            learn(module, seed)
    torch.compiler.reset()
    graphs, x = CompileCounter(), torch.linspace(-1, 1, 3 * WIDTH).reshape(3, WIDTH)
    compiled = torch.compile(module, backend=graphs, fullgraph=True)
    with torch.set_grad_enabled(with_gradients):
        for turn in range(10):
            set_adapter(compiled, names[turn % len(names)])
            outputs = compiled(x), module(x)
            torch.testing.assert_close(*outputs)
            if with_gradients:
                factors = [factor for group in parameter_groups(module, 1.0) for factor in group["params"]]
                torch.testing.assert_close(*(torch.autograd.grad(each.sum(), factors) for each in outputs))
    return graphs.frame_count


@pytest.mark.parametrize("with_gradients", [False, True])
def test_compiled_model_has_one_graph_for_each_rank(with_gradients: bool):
    assert compiled_graphs((2, 8, 16), with_gradients=with_gradients) == 3


@pytest.mark.parametrize("with_gradients", [False, True])
def test_compiled_model_with_symbolic_ranks_has_two_graphs(with_gradients: bool):
    names = ("force_parameter_static_shapes", "force_nn_module_property_static_shapes")
    with torch._dynamo.config.patch(dict.fromkeys(names, False)):
        assert compiled_graphs((2, 4, 8, 16), with_gradients=with_gradients) == 2


def test_saving_inside_the_bare_base_says_where_it_is(tmp_path: Path) -> None:
    model = base()
    add_adapter(model, "plain", CONFIGS["plain"])
    with using(model, None):
        with pytest.raises(ValueError, match="save_adapter: Mixed has no adapters; it is the bare base here"):
            save_adapter(model, tmp_path / "saved")
        with pytest.raises(ValueError, match="adapter_state_dict: Mixed has no adapters; it is the bare base here"):
            adapter_state_dict(model)


@each_case
def test_every_kind_of_layer_takes_a_second_adapter(case: Case, rng: torch.Generator):
    bare, x, outputs, states = case.base().eval(), case.inputs(rng), {}, {}
    model = copy.deepcopy(bare)
    for seed, name in enumerate(("a", "b")):
        alone = copy.deepcopy(bare)
        attach(alone, case.config, seed=seed)
        train_all(alone, rng)
        outputs[name], states[name] = alone(x), adapter_state_dict(alone)
        add_adapter(model, name, case.config, seed=seed)
        with using(model, name):
            load_adapter_state_dict(model, states[name])
    for name in ("a", "b", "a"):
        with using(model, name):
            assert torch.equal(model(x), outputs[name])
    with using(model, None):
        assert torch.equal(model(x), bare(x))


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.rnn, self.up = nn.LSTM(6, 5, batch_first=True), nn.Linear(5, 7)

    def forward(self, x: Tensor) -> Tensor:
        return self.up(self.rnn(x)[0])


@torch.no_grad()
def test_recurrent_layer_without_an_adapter_computes_with_the_biases_of_the_active_one() -> None:
    x = torch.randn(2, 3, 6, generator=torch.Generator().manual_seed(0))
    base, model = Recurrent(), Recurrent()
    biases = [name for name, _ in base.named_parameters() if "bias" in name]
    expected = {}
    for name in ("one", "two"):
        add_adapter(model, name, LoRAConfig(rank=2, bias="all"))
        set_adapter(model, name)
        for key in biases:
            parameter = model.get_parameter(key)
            parameter.data += len(expected) + 1.0
        plain = Recurrent()
        for key in biases:
            plain.get_parameter(key).data += len(expected) + 1.0
        expected[name] = plain(x)
    for name, output in expected.items():
        with using(model, name):
            torch.testing.assert_close(model(x), output)
    for _ in range(2):  # the second time, the adapter was in place without a forward pass
        with using(model, None):
            assert torch.equal(model.rnn(x)[0], base.rnn(x)[0])
    with (
        pytest.raises(ValueError, match="routed: rnn carries the update in its weight, or holds tensors"),
        routed(model, ["one", "two"]),
    ):
        model(x)


def test_hidden_adapters_come_back_beside_one_that_was_added_meanwhile(model: nn.Module) -> None:
    names = adapter_names(model)
    with others_hidden(model):
        assert not any("lora_others" in name for name, _ in model.named_modules())
        add_adapter(model, "new", LoRAConfig(rank=2))
    held = {name.split("lora_others.")[1].split(".")[0] for name, _ in model.named_modules() if "lora_others." in name}
    assert held >= {*names, "new"} - {active_adapter(model)}
