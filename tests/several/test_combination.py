"""Sums of adapters: the dense sums of what they change, in a model and from files alone."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_lora import (
    LoRAConfig,
    active_adapter,
    adapter_names,
    adapter_state_dict,
    add_adapter,
    attach,
    combine,
    combine_adapters,
    load_adapter,
    load_adapter_state_dict,
    lora_layers,
    merge,
    merged,
    parameter_groups,
    save_adapter,
    using,
)
from tests.contract import learn
from tests.files import files_of, run, write_checkpoint
from tests.peft_format.models import (
    CLOSE,
    QUIET,
    bert,
    distance,
    gpt2,
    in_peft,
    llama,
    logits,
    mixtral,
    trained,
    trained_by_peft,
    vit,
)
from tests.test_switching import CONFIGS, base, tokens
from tests.toys import Spectral

pytestmark = [*QUIET, pytest.mark.filterwarnings("ignore:These adapters are not smaller.*")]

EXACT = 1e-6  # relative to the largest change, as factors are float32
ROUNDING = 1e-12  # of float64


class Rich(nn.Module):
    """Attention, experts and a fused projection in one module; nothing runs."""

    def __init__(self) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(12, 2)
        self.qkv = nn.Linear(12, 36)
        self.bilinear = nn.Bilinear(6, 7, 8)
        self.experts = nn.Module()
        self.experts.up = nn.Parameter(torch.randn(3, 10, 12))
        self.conv = nn.ConvTranspose2d(8, 12, 3)


RICH = {
    "whole": LoRAConfig(rank=2, target_modules=["qkv", "attn", "conv"], target_parameters=["experts.up"]),
    "slices": LoRAConfig(rank=3, target_modules=["bilinear"], target_slices={"qkv": {"q": "0:12", "v": "24:36:2"}}),
    "same slices": LoRAConfig(
        rank=1, target_modules=[], target_slices={"qkv": {"q": "0:12"}, "attn": {"k": "12:24"}}, lora_bias=False
    ),
    "other slices": LoRAConfig(rank=2, target_modules=[], target_slices={"qkv": {"q": "6:18"}}, use_rslora=True),
    "attention's inputs": LoRAConfig(
        rank=4, alpha=3, target_modules=["attn"], exclude_modules=["out_proj"], target_parameters=["experts.up"]
    ),
}


def with_adapters(build: Callable[[], nn.Module], configs: dict[str, LoRAConfig], *names: str) -> nn.Module:
    """A float64 base with trained adapters, so that sums are exact but for rounding."""
    torch.manual_seed(5)
    module = build().double()
    for seed, name in enumerate(names):
        add_adapter(module, name, configs[name], seed=seed)
        with using(module, name):
            learn(module, seed)
    return module


def dense(module: nn.Module, name: str | None) -> dict[str, Tensor]:
    """The model's whole state with one adapter inside the weights."""
    with using(module, name):
        if name is None:
            return {key: value.clone() for key, value in module.state_dict().items() if "lora" not in key}
        with merged(module):
            return {key: value.detach().clone() for key, value in module.state_dict().items() if "lora" not in key}


def dense_sum(module: nn.Module, weights: dict[str, float]) -> dict[str, Tensor]:
    bare = dense(module, None)
    found = {key: value.double() for key, value in bare.items()}
    for name, weight in weights.items():
        for key, value in dense(module, name).items():
            found[key] = found[key] + weight * (value.double() - bare[key].double())
    return found


def far(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    assert one.keys() == other.keys()
    return max(float((one[key].double() - other[key].double()).abs().max()) for key in one)


def state(module: nn.Module) -> dict[str, Tensor]:
    return {key: value.clone() for key, value in module.state_dict().items()}


SUMS: dict[str, tuple[Callable[[], nn.Module], dict[str, LoRAConfig], dict[str, float]]] = {
    "ranks, scalings, targets and a head": (base, CONFIGS, {"plain": 1.0, "head": -0.5}),
    "a head, a norm and a bias of B": (
        base,
        {
            "head": LoRAConfig(rank=4, target_modules=["fc", "conv"], modules_to_save=["head"]),
            "norm": LoRAConfig(rank=2, lora_bias=True, target_modules=["fc"], modules_to_save=["norm"]),
        },
        {"head": 0.3, "norm": 2.0},
    ),
    "token rows and statistics": (base, CONFIGS, {"rows": 0.5}),
    "biases": (
        base,
        {
            "all": LoRAConfig(rank=2, target_modules=["fc"], bias="all"),
            "own": LoRAConfig(rank=1, target_modules=["head"], bias="lora_only"),
        },
        {"all": 0.5, "own": -2.0},
    ),
    "two sets of tokens": (
        base,
        {
            "few": LoRAConfig(rank=2, target_modules=["fc"], trainable_token_indices=[1, 5]),
            "others": LoRAConfig(rank=3, target_modules=["conv"], trainable_token_indices=[5, 7, 0]),
        },
        {"few": 1.5, "others": -1.0},
    ),
    "tokens of an embedding that another adapts": (base, CONFIGS, {"plain": 0.7, "rows": -1.5}),
    "attention, experts and two dimensions": (Rich, RICH, {"whole": 1.0, "attention's inputs": 0.25}),
    "the same slices": (Rich, RICH, {"slices": -1.0, "same slices": 2.0}),
    "slices of a layer that another adapts whole": (Rich, RICH, {"whole": 1.0, "slices": 1.0, "same slices": 0.5}),
    "slices that overlap": (Rich, RICH, {"slices": 1.0, "other slices": -3.0}),
}


@pytest.mark.parametrize("method", ["cat", "svd"])
@pytest.mark.parametrize("case", SUMS)
def test_a_sum_changes_the_base_by_the_dense_sum(case: str, method: str):
    build, configs, weights = SUMS[case]
    module = with_adapters(build, configs, *weights)
    expected = dense_sum(module, weights)
    before = {name: dense(module, name) for name in weights}
    layers = combine(module, weights, name="sum", method=method)
    assert far(dense(module, "sum"), expected) <= ROUNDING * 1e3
    assert all(layer.error <= ROUNDING for layer in layers)
    assert {name: far(dense(module, name), own) for name, own in before.items()} == dict.fromkeys(weights, 0.0)


def test_float32_factors_hold_a_sum_up_to_their_rounding():
    module = with_adapters(base, CONFIGS, "plain", "head").float()
    weights = {"plain": 1.0, "head": -0.7}
    expected, bare = dense_sum(module.double(), weights), dense(module, None)
    combine(module.float(), weights, name="sum")
    assert far(dense(module.double(), "sum"), expected) <= EXACT * far(expected, bare)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("use_rslora", [False, True])
def test_the_weight_one_keeps_every_bit_of_a_single_adapter(dtype: str, use_rslora: bool):
    module = base()
    # Of alpha 13, a scaling of 13 / sqrt(3) follows, but from no alpha by plain division.
    config = LoRAConfig(rank=3, alpha=13, target_modules=["fc", "conv"], use_rslora=use_rslora, adapter_dtype=dtype)
    add_adapter(module, "one", config)
    learn(module, 0)
    combine(module, {"one": 1.0}, name="same")
    before, after = dense(module, "one"), dense(module, "same")
    assert all(torch.equal(after[key], value) for key, value in before.items())
    scaling = lora_layers(module)["fc"].lora.spec.scaling
    with using(module, "same"):
        assert {layer.lora.spec.scaling for layer in lora_layers(module).values()} == {scaling}
        assert {layer.lora.A.dtype for layer in lora_layers(module).values()} == {getattr(torch, dtype)}


def test_a_factor_rounds_no_factor():
    module = with_adapters(base, CONFIGS, "plain")
    combine(module, {"plain": -0.3}, name="less")
    one = {name: layer.lora for name, layer in lora_layers(module).items()}
    with using(module, "less"):
        for name, layer in lora_layers(module).items():
            assert torch.equal(layer.lora.A, one[name].A)
            assert torch.equal(layer.lora.B, -one[name].B)
            assert layer.lora.spec.scaling == pytest.approx(0.3 * one[name].spec.scaling)


# --- the best approximation


def update(module: nn.Module, name: str, weight: str = "fc.weight") -> Tensor:
    return (dense(module, name)[weight] - dense(module, None)[weight]).double()


@pytest.mark.parametrize("rank", [1, 3, 5])
def test_svd_is_the_best_approximation_of_its_rank(rank: int):
    module = with_adapters(base, CONFIGS, "plain", "head")
    weights = {"plain": 1.0, "head": -0.5}
    whole = dense_sum(module, weights)["fc.weight"] - dense(module, None)["fc.weight"]
    layers = {layer.name: layer for layer in combine(module, weights, name="cut", method="svd", rank=rank)}
    U, values, Vh = torch.linalg.svd(whole)
    best = U[:, :rank] * values[:rank] @ Vh[:rank]
    torch.testing.assert_close(update(module, "cut"), best, rtol=0, atol=EXACT)
    assert layers["fc"][1:3] == (6, rank)
    assert layers["fc"].error == pytest.approx(float(values[rank:].norm() / values.norm()))


@pytest.mark.parametrize("energy", [0.3, 0.8, 1.0])
def test_energy_is_the_least_rank_that_holds_it(energy: float):
    module = with_adapters(base, CONFIGS, "head")
    squares = torch.linalg.svdvals(update(module, "head")).square()
    held = squares.cumsum(0) / squares.sum()
    layers = {layer.name: layer for layer in combine(module, {"head": 1.0}, name="cut", method="svd", energy=energy)}
    assert layers["fc"].rank == int((held < energy - 1e-9).sum()) + 1
    assert layers["fc"].error ** 2 <= 1 - energy + 1e-9


def test_every_expert_of_a_stack_is_approximated_best():
    module = with_adapters(Rich, RICH, "whole", "attention's inputs")
    weights = {"whole": 1.0, "attention's inputs": 1.0}
    whole = dense_sum(module, weights)["experts.up"] - dense(module, None)["experts.up"]
    combine(module, weights, name="cut", method="svd", rank=2)
    U, values, Vh = torch.linalg.svd(whole, full_matrices=False)
    best = (U[..., :2] * values[..., None, :2]) @ Vh[:, :2]
    torch.testing.assert_close(update(module, "cut", "experts.up"), best, rtol=0, atol=EXACT)


def test_ranks_that_add_nothing_are_cut_without_an_error():
    module = with_adapters(base, CONFIGS, "plain")
    combine(module, {"plain": 1.0}, name="copy")
    layers = combine(module, {"plain": 1.0, "copy": 1.0}, name="twice", method="svd")
    assert {layer[1:3] for layer in layers} == {(4, 2)}
    assert far(dense(module, "twice"), dense_sum(module, {"plain": 2.0})) <= ROUNDING * 1e3


def test_ranks_never_exceed_those_of_the_weight():
    build = lambda: nn.ModuleDict({"fc": nn.Linear(6, 4)})  # noqa: E731
    config = LoRAConfig(rank=3, target_modules=["fc"])
    module = with_adapters(build, {"a": config, "b": config}, "a", "b")
    [layer] = combine(module, {"a": 1.0, "b": 0.5}, name="sum")
    assert layer[1:3] == (6, 4)
    assert far(dense(module, "sum"), dense_sum(module, {"a": 1.0, "b": 0.5})) <= ROUNDING * 1e3


def test_scalings_of_a_sum_are_one():
    module = with_adapters(base, CONFIGS, "plain", "head")
    combine(module, {"plain": 1.0, "head": 0.5}, name="sum")
    with using(module, "sum"):
        assert lora_layers(module)["fc"].lora.spec.scaling == 1.0


# --- what cancels


@pytest.mark.parametrize("method", ["cat", "svd"])
def test_layers_that_cancel_are_left_out(method: str):
    module = with_adapters(base, CONFIGS, "plain")
    combine(module, {"plain": 1.0}, name="copy")
    with using(module, "copy"), torch.no_grad():
        lora_layers(module)["fc"].lora.B.mul_(2)
    layers = combine(module, {"plain": 1.0, "copy": -1.0}, name="rest", method=method)
    assert {layer.name: layer.rank > 0 for layer in layers} == {"fc": True, "conv": False, "embed": False}
    with using(module, "rest"):
        assert [*lora_layers(module)] == ["fc"]


@pytest.mark.parametrize("method", ["cat", "svd"])
def test_a_sum_of_nothing_is_refused(method: str):
    module = with_adapters(base, CONFIGS, "plain")
    combine(module, {"plain": 1.0}, name="copy")
    for weights in ({"plain": 1.0, "copy": -1.0}, {"plain": 0.0}):
        with pytest.raises(ValueError, match="is zero in every layer"):
            combine(module, weights, name="none", method=method)
    assert adapter_names(module) == ["plain", "copy"]


@pytest.mark.parametrize("bias", ["none", "lora_only"])
def test_what_trains_in_full_stays_where_all_updates_cancel(bias: str):
    module = with_adapters(
        base, {"a": LoRAConfig(rank=2, target_modules=["fc"], modules_to_save=["head"], bias=bias)}, "a"
    )
    combine(module, {"a": 1.0}, name="b")
    with using(module, "b"):
        for group in parameter_groups(module, 1.0):
            for parameter in group["params"]:
                if parameter.shape in {module.head.weight.shape, module.fc.bias.shape}:
                    parameter.data.mul_(3)
    expected = dense_sum(module, {"a": 1.0, "b": -1.0})
    combine(module, {"a": 1.0, "b": -1.0}, name="rest")
    assert far(dense(module, "rest"), expected) <= ROUNDING * 1e3


def test_a_bias_stays_where_the_update_of_its_layer_cancels():
    module = with_adapters(base, {"a": LoRAConfig(rank=2, target_modules=["fc", "head"], bias="lora_only")}, "a")
    combine(module, {"a": 1.0}, name="b")
    with using(module, "b"):
        module.fc.bias.data.mul_(3)
        lora_layers(module)["head"].lora.B.data.mul_(2)
    expected = dense_sum(module, {"a": 1.0, "b": -1.0})
    combine(module, {"a": 1.0, "b": -1.0}, name="rest")
    assert far(dense(module, "rest"), expected) <= ROUNDING * 1e3


# --- the new adapter is one like any other


def test_the_active_adapter_and_the_flags_stay():
    module = with_adapters(base, CONFIGS, "plain", "head")
    flags = {name: p.requires_grad for name, p in module.named_parameters()}
    combine(module, {"plain": 1.0, "head": 1.0}, name="sum")
    assert active_adapter(module) == "plain"
    assert flags.items() <= {name: p.requires_grad for name, p in module.named_parameters()}.items()


def test_a_single_adapter_without_a_name_can_be_scaled():
    module = base()
    attach(module, LoRAConfig(rank=2, target_modules=["fc"]))
    learn(module, 0)
    combine(module, {"default": 0.5}, name="half")
    assert adapter_names(module) == ["default", "half"]
    torch.testing.assert_close(update(module, "half"), 0.5 * update(module, "default"), rtol=0, atol=EXACT)


def test_adapters_of_a_part_and_of_the_whole_add_up(tmp_path: Path):
    save_adapter(trained(base(), target_modules=["fc", "conv"]), tmp_path / "peft")
    module = nn.ModuleDict({"model": base(), "other": nn.Linear(4, 4)}).double()
    add_adapter(module, "part", tmp_path / "peft")
    add_adapter(module, "whole", LoRAConfig(rank=2, target_modules=["model.fc", "other"]))
    with using(module, "whole"):
        learn(module, 0)
    for weights in ({"part": -1.0}, {"part": 1.0, "whole": 0.5}):
        expected = dense_sum(module, weights)
        combine(module, weights, name=f"sum of {len(weights)}")
        assert far(dense(module, f"sum of {len(weights)}"), expected) <= EXACT


def test_a_sum_is_saved_and_loaded(tmp_path: Path):
    module = with_adapters(base, CONFIGS, "plain").float()
    add_adapter(module, "fc", LoRAConfig(rank=3, target_modules=["fc"], modules_to_save=["head"]))
    with using(module, "fc"):
        learn(module, 3)
    combine(module, {"plain": 1.0, "fc": -0.5}, name="sum")
    with using(module, "sum"):
        checkpoint = write_checkpoint(module, tmp_path / "sum.ckpt")
        save_adapter(module, tmp_path / "peft")
        expected = module.eval()(tokens())
    for path in (checkpoint, tmp_path / "peft"):
        again = base()
        load_adapter(again, path)
        torch.testing.assert_close(again.eval()(tokens()), expected)


# --- what is refused


@pytest.mark.parametrize(
    ("weights", "options", "error", "message"),
    [
        ({"plain": 1.0, "hed": 1.0}, {}, ValueError, "no adapter 'hed'. Did you mean 'head'"),
        ({}, {}, ValueError, "weights={} must give at least one adapter"),
        (["plain"], {}, ValueError, "must give at least one adapter"),
        ({"plain": float("nan")}, {}, ValueError, "the weight of 'plain' must be finite, got nan"),
        ({"plain": float("inf")}, {}, ValueError, "the weight of 'plain' must be finite, got inf"),
        ({"plain": "1"}, {}, TypeError, "the weight of 'plain' must be a number, got '1'"),
        ({"plain": 1.0}, {"method": "ties"}, ValueError, "method='ties' is unknown; choose 'cat' or 'svd'"),
        ({"plain": 1.0}, {"rank": 1}, ValueError, "rank=1 and energy=None cut the sum, and method='cat' keeps all"),
        ({"plain": 1.0}, {"method": "svd", "rank": 1, "energy": 0.5}, ValueError, "rank=1 and energy=0.5 are both set"),
        ({"plain": 1.0}, {"method": "svd", "rank": 3}, ValueError, "rank=3 is above 2, the highest rank"),
        ({"plain": 1.0}, {"method": "svd", "rank": 0}, ValueError, "rank must be >= 1, got 0"),
        ({"plain": 1.0}, {"method": "svd", "rank": 1.5}, TypeError, "rank must be an integer, got 1.5"),
        ({"plain": 1.0}, {"method": "svd", "energy": 0.0}, ValueError, "energy must be above 0 and at most 1, got 0.0"),
        ({"plain": 1.0}, {"method": "svd", "energy": 1.1}, ValueError, "energy must be above 0 and at most 1, got 1.1"),
        ({"plain": 1.0}, {"name": "head"}, ValueError, "There is an adapter 'head' already"),
        ({"plain": 1.0, "dora": 1.0}, {}, ValueError, "'dora' uses DoRA, whose magnitudes rescale"),
        ({"head": 1.0, "norm": 1.0}, {}, ValueError, "head is trained in full by 'head', and adapted by another"),
        ({"broken": 1.0}, {}, ValueError, "'broken' holds NaN or infinity in fc"),
    ],
)
def test_what_cannot_be_summed_is_refused_and_nothing_changes(
    weights: Any, options: dict[str, Any], error: type[Exception], message: str
):
    broken = {"broken": LoRAConfig(rank=1, target_modules=["fc"])}
    module = with_adapters(base, CONFIGS | broken, *CONFIGS, "broken")
    with using(module, "broken"):
        lora_layers(module)["fc"].lora.B.data[0] = float("nan")
    before, flags = state(module), {name: p.requires_grad for name, p in module.named_parameters()}
    with pytest.raises(error, match=r"(?s)" + message.replace("(", r"\(").replace("{}", r"\{\}")):
        combine(module, weights, **{"name": "sum"} | options)
    after = state(module)
    assert {key: torch.equal(value.nan_to_num(), after[key].nan_to_num()) for key, value in before.items()} == (
        dict.fromkeys(after, True)
    )
    assert flags == {name: p.requires_grad for name, p in module.named_parameters()}
    assert adapter_names(module) == [*CONFIGS, "broken"]
    assert active_adapter(module) == "plain"


def test_a_name_that_means_two_layers_is_refused_and_nothing_changes():
    module = nn.ModuleDict({"rnn": nn.GRU(4, 4), "below": nn.ModuleDict({"rnn": nn.GRU(4, 4)})})
    add_adapter(module, "outer", LoRAConfig(rank=1, target_modules=r"rnn"))  # a regular expression for one of them
    learn(module, 0)
    before = state(module)
    with pytest.raises(ValueError, match=r"exactly the layers of the result: below\.rnn\.weight_hh_l0"):
        combine(module, {"outer": 0.5}, name="half")
    assert {key: torch.equal(value, before[key]) for key, value in state(module).items()} == dict.fromkeys(before, True)
    with using(module, None):
        assert lora_layers(module) == {}


def test_nothing_is_added_inside_merged():
    module = with_adapters(base, CONFIGS, "plain", "head")
    with merged(module), pytest.raises(RuntimeError, match="merged"):
        combine(module, {"plain": 1.0}, name="sum")
    assert adapter_names(module) == ["plain", "head"]


# --- files alone


def inside(model: nn.Module) -> nn.Module:
    return nn.ModuleDict({"model": model})


def merged_state(module: nn.Module) -> dict[str, Tensor]:
    merge(module)
    return {name: value.detach().double() for name, value in module.state_dict().items()}


FILES: dict[str, tuple[Callable[[], nn.Module], dict[str, Any], dict[str, Any], tuple[float, float]]] = {
    "gpt2": (gpt2, {"target_modules": ["c_attn", "c_fc"], "use_rslora": True}, {"rank": 3}, (1.0, -0.5)),
    "gpt2, slices": (
        gpt2,
        {"target_modules": [], "target_slices": {"c_attn": {"q": "0:16", "v": "32:48"}}},
        {"target_modules": ["c_attn", "wpe"]},
        (0.5, 1.5),
    ),
    "llama": (
        llama,
        {"rank_pattern": {"*.0.*": 3}, "alpha_pattern": {"q_proj": 7}},
        {"target_modules": ["q_proj", "embed_tokens"], "rank": 4},
        (0.7, 0.7),
    ),
    "bert, a bias of B": (
        bert,
        {"target_modules": ["query"], "lora_bias": True},
        {"target_modules": ["value", "query"], "lora_bias": True},
        (1.0, -2.0),
    ),
    "llama, tokens": (
        llama,
        {"target_modules": ["q_proj"], "trainable_token_indices": {"model.embed_tokens": [2, 5]}},
        {"target_modules": ["q_proj", "v_proj"]},
        (1.0, 0.5),
    ),
    "bert, its heads averaged": (
        bert,
        {"target_modules": ["query"], "modules_to_save": ["classifier"], "bias": "all"},
        {"target_modules": ["dense"], "modules_to_save": ["classifier"], "bias": "all"},
        (0.25, 0.75),
    ),
    "vit": (vit, {"modules_to_save": ["classifier"]}, {"target_modules": ["q_proj"], "rank": 1}, (1.0, -1.0)),
    "mixtral, a stack each": (
        mixtral,
        {"target_modules": [], "target_parameters": ["experts.down_proj"]},
        {"target_modules": [], "target_parameters": ["experts.gate_up_proj"]},
        (-1.0, 2.0),
    ),
    "mixtral": (
        mixtral,
        {"target_modules": ["q_proj"], "target_parameters": ["experts.down_proj"]},
        {"target_modules": ["k_proj"], "target_parameters": ["experts.gate_up_proj", "experts.down_proj"]},
        (1.0, 0.5),
    ),
}


@pytest.mark.parametrize("method", ["cat", "svd"])
@pytest.mark.parametrize("case", FILES)
def test_a_sum_of_files_computes_in_peft_what_the_dense_sum_does(case: str, method: str, tmp_path: Path):
    make, one, other, weights = FILES[case]
    first, second = trained(inside(make()), **in_model(one)), trained(make(), **other)
    paths = [write_checkpoint(first, tmp_path / "one.ckpt"), tmp_path / "other"]
    save_adapter(second, paths[1])
    combine_adapters(paths, weights, tmp_path / "sum", method=method)
    merge(first)
    merge(second)
    states = [{n: value.double() for n, value in each.state_dict().items()} for each in (first["model"], second)]
    dense = make()
    with torch.no_grad():
        for name, value in dense.state_dict().items():
            moves = [w * (each[name] - value.double()) for w, each in zip(weights, states, strict=True)]
            value.copy_(value.double() + sum(moves))
    assert distance(logits(in_peft(make(), tmp_path / "sum")), logits(dense)) <= CLOSE
    again = make()
    load_adapter(again, tmp_path / "sum")
    assert distance(logits(again.eval()), logits(dense)) <= CLOSE


def in_model(options: dict[str, Any]) -> dict[str, Any]:
    tokens = options.get("trainable_token_indices", {})
    return options | {"trainable_token_indices": {f"model.{key}": value for key, value in tokens.items()}}


def test_one_adapter_with_the_weight_one_is_written_as_it_was(tmp_path: Path):
    save_adapter(trained(bert(), modules_to_save=["classifier"], use_rslora=True), tmp_path / "one")
    combine_adapters([tmp_path / "one"], [1.0], tmp_path / "same")
    one, same = files_of(tmp_path / "one"), files_of(tmp_path / "same")
    assert one["adapter_model.safetensors"] == same["adapter_model.safetensors"]


TOKENS = {"target_modules": ["query"], "trainable_token_indices": {"bert.embeddings.word_embeddings": [2, 5]}}


@pytest.mark.parametrize("is_checkpoint", [False, True])
@pytest.mark.parametrize("options", [{}, {"target_modules": ["query"], "lora_bias": True}, TOKENS])
def test_files_of_float64_keep_their_precision(options: dict[str, Any], is_checkpoint: bool, tmp_path: Path):
    module = trained(bert().double(), **options)
    load_adapter_state_dict(module, {name: value / 3 for name, value in adapter_state_dict(module).items()})
    source = write_checkpoint(module, tmp_path / "last.ckpt") if is_checkpoint else tmp_path / "peft"
    if not is_checkpoint:
        save_adapter(module, source)
    commands: dict[str, tuple[object, ...]] = {
        "same": ("combine", source, "--weights", "1"),
        "scaled": ("scale", source, "1"),
        "summed": ("combine", source, source, "--weights", "1.5,-0.5"),
    }
    if not options:  # a bias of B, and tokens, cannot be cut
        commands["cut"] = ("truncate", source, "--energy", "1.0")
    truth = merged_state(module)
    for name, command in commands.items():
        assert run(*command, "--out", tmp_path / name) == 0
        load_adapter(again := bert().double(), tmp_path / name)
        assert far(merged_state(again), truth) <= (0 if name in ("same", "scaled") else ROUNDING)


def test_adapters_of_peft_are_summed(tmp_path: Path):
    for number, options in enumerate(({"r": 2}, {"r": 4, "use_rslora": True, "rank_pattern": {"q_proj": 3}})):
        trained_by_peft(llama(), target_modules=["q_proj", "v_proj"], **options).save_pretrained(tmp_path / f"{number}")
    combine_adapters([tmp_path / "0", tmp_path / "1"], [1.0, -1.0], tmp_path / "sum")
    states = []
    for number in (0, 1):
        model = llama()
        load_adapter(model, tmp_path / f"{number}")
        states.append(merged_state(model))
    model = llama()
    load_adapter(model, tmp_path / "sum")
    bare = {name: value.double() for name, value in llama().state_dict().items()}
    expected = {name: value + states[0][name] - states[1][name] for name, value in bare.items()}
    assert far(merged_state(model), expected) <= EXACT


def refused_files(folder: Path) -> dict[str, Path]:
    changed = llama()
    with torch.no_grad():
        for parameter in changed.parameters():
            parameter.mul_(1.5)
    made = {
        "plain": trained(llama(), target_modules=["q_proj"]),
        "dora": trained(llama(), target_modules=["q_proj"], use_dora=True),
        "head": trained(llama(), target_modules=["q_proj"], modules_to_save=["lm_head"]),
        "embedding": trained(llama(), target_modules=["embed_tokens"]),
        "tokens": trained(llama(), target_modules=["q_proj"], trainable_token_indices=[1, 2]),
        "other base": trained(changed, target_modules=["q_proj"]),
        "other model": trained(bert(), target_modules=["query"]),
    }
    for name, module in made.items():
        save_adapter(module, folder / name)
    return {name: folder / name for name in made}


@pytest.mark.parametrize(
    ("names", "weights", "message"),
    [
        (["plain", "dora"], [1, 1], "dora' uses DoRA"),
        (["plain", "other base"], [1, 1], "plain' and '.*other base' were trained on different bases"),
        (["head", "head"], [1, 1], "lm_head.weight is trained in full .*weights of the adapters that have it add up"),
        (["plain", "head"], [1, 0.5], "lm_head.weight is trained in full"),
        (["embedding", "tokens"], [1, 1], "tokens' trains tokens of model.embed_tokens, which another adapter adapts"),
        (["plain", "plain"], [1], "must be two lists of the same length"),
        (["plain", "plain"], [1, -1], "is zero in every layer"),
        (["plain", "missing"], [1, 1], "missing"),
        ([], [], "must give at least one adapter"),
    ],
)
def test_files_that_cannot_be_summed_are_refused_and_nothing_is_written(
    names: list[str], weights: list[float], message: str, tmp_path: Path
):
    paths = refused_files(tmp_path)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        combine_adapters([paths.get(name, tmp_path / name) for name in names], weights, tmp_path / "sum")
    assert not (tmp_path / "sum").exists()


def test_a_weight_of_another_shape_is_refused(tmp_path: Path):
    for name, width in (("one", 6), ("other", 8)):
        save_adapter(trained(nn.ModuleDict({"fc": nn.Linear(width, 6)})), tmp_path / name, base={})
    with pytest.raises(ValueError, match=r"fc.weight: '.*one' adapts a weight .* shape \(6, 6\), '.*other' one"):
        combine_adapters([tmp_path / "one", tmp_path / "other"], [1, 1], tmp_path / "sum")


def test_a_directory_is_replaced_only_if_asked(tmp_path: Path):
    save_adapter(trained(llama(), target_modules=["q_proj"]), tmp_path / "one")
    before = files_of(tmp_path / "one")
    with pytest.raises(ValueError, match="exists already"):
        combine_adapters([tmp_path / "one"], [0.5], tmp_path / "one")
    assert files_of(tmp_path / "one") == before
    combine_adapters([tmp_path / "one"], [0.5], tmp_path / "one", overwrite=True)
    assert files_of(tmp_path / "one") != before


# --- commands


def test_commands_write_sums_multiples_and_approximations(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    for name, rank in (("a", 2), ("b", 3)):
        save_adapter(trained(llama(), target_modules=["q_proj", "v_proj"], rank=rank), tmp_path / name)
    a, b = tmp_path / "a", tmp_path / "b"
    assert run("combine", a, b, "--weights", "1,-0.5", "--out", tmp_path / "sum") == 0
    assert run("scale", a, "-0.5", "--out", tmp_path / "scaled") == 0
    assert "at most" in capsys.readouterr().out
    assert run("truncate", b, "--rank", "1", "--out", tmp_path / "cut", "--json") == 0
    layers = json.loads(capsys.readouterr().out)["layers"]
    assert {(layer["stacked"], layer["rank"]) for layer in layers} == {(3, 1)}
    assert all(0 < layer["error"] < 1 for layer in layers)
    for name, ranks in (("sum", {5}), ("scaled", {2}), ("cut", {1})):
        model = llama()
        load_adapter(model, tmp_path / name)
        assert {layer.lora.spec.rank for layer in lora_layers(model).values()} == ranks
    assert run("combine", a, "--weights", "1", "--rank", "1", "--out", tmp_path / "new") == 1
    assert run("truncate", b, "--rank", "1", "--out", tmp_path / "cut") == 1
    assert "exists already" in capsys.readouterr().err


# --- complex numbers


def spectral(*names: str) -> tuple[nn.Module, dict[str, dict[str, Tensor]]]:
    """Return a model with adapters that train complex values in full, and the values of each."""
    module, values, rng = Spectral(), {}, torch.Generator().manual_seed(2)
    for name in names:
        add_adapter(module, name, LoRAConfig(rank=2, target_modules=["lin"], modules_to_save=["spec"]))
        with using(module, name), torch.no_grad():
            for tensor in (module.spec.weight, module.spec.mean, module.lin.lora.B):
                tensor.copy_(torch.randn(tensor.shape, dtype=tensor.dtype, generator=rng))
            values[name] = of_spectrum(module)
    return module, values


def of_spectrum(module: nn.Module) -> dict[str, Tensor]:
    return {"weight": module.spec.weight.detach().clone(), "mean": module.spec.mean.clone()}


def assert_close(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value)


def test_a_sum_keeps_imaginary_parts():
    module, values = spectral("a", "b")
    base_values = of_spectrum(Spectral())
    combine(module, {"a": 0.5, "b": -1.5}, name="sum")
    expected = {
        key: value + 0.5 * (values["a"][key] - value) - 1.5 * (values["b"][key] - value)
        for key, value in base_values.items()
    }
    with using(module, "sum"):
        assert_close(of_spectrum(module), expected)


def test_the_commands_keep_imaginary_parts(tmp_path: Path):
    module, values = spectral("a", "b")
    for name in values:
        with using(module, name):
            save_adapter(module, tmp_path / name)
    a, b, scaled, cut, mean = (tmp_path / name for name in ("a", "b", "scaled", "cut", "mean"))
    assert run("scale", a, 1.0, "--out", scaled) == 0
    assert run("truncate", a, "--rank", 1, "--out", cut) == 0
    assert run("combine", a, b, "--weights", "0.25,0.75", "--out", mean) == 0
    averaged = {key: 0.25 * values["a"][key] + 0.75 * values["b"][key] for key in values["a"]}
    for folder, expected in ((scaled, values["a"]), (cut, values["a"]), (mean, averaged)):
        load_adapter(loaded := Spectral(), folder)
        assert_close(of_spectrum(loaded), expected)
