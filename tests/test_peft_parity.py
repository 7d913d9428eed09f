"""Parity with PEFT: the same factors give the same function, the same options the same layers."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_lora import LoRAConfig, attach, lora_layers, merge
from tests.contract import KINDS, Case, Holder, error, raises_and_changes_nothing, train_all

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # about PEFT's optional dependencies
    peft = pytest.importorskip("peft")

pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning:peft.*"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]
CLOSE = 1e-5
OTHERS = ("own forward", "scaled embedding", "linear-like")  # convolutions are tested elsewhere
each_kind = pytest.mark.parametrize("kind", [k for k, spec in KINDS.items() if k not in OTHERS and not spec.image])


def peft_factors(layer: Any) -> tuple[Tensor, Tensor]:
    """Return PEFT's factors of a layer, A as (rank, in) and B as (out, rank)."""
    if "default" in layer.lora_A:
        return layer.lora_A["default"].weight, layer.lora_B["default"].weight
    return layer.lora_embedding_A["default"], layer.lora_embedding_B["default"]


def pair(base: nn.Module, rng: torch.Generator, **peft_options: Any) -> tuple[nn.Module, nn.Module]:
    """Return two adapted copies of a base, ours and PEFT's, with the same trained factors."""
    options = {"rank": 4, "alpha": 6.0, "target_modules": ["layer"]}
    names = {"rank": "r", "alpha": "lora_alpha"}
    ours, theirs = copy.deepcopy(base), copy.deepcopy(base)
    shared = {key: value for key, value in peft_options.items() if key != "fan_in_fan_out"}
    attach(ours, LoRAConfig(**options | shared))
    train_all(ours, rng)
    theirs = peft.inject_adapter_in_model(
        peft.LoraConfig(**{names.get(key, key): value for key, value in options.items()} | peft_options), theirs
    )
    with torch.no_grad():
        for name, layer in lora_layers(ours).items():
            A, B = peft_factors(theirs.get_submodule(name))
            A.copy_(layer.lora.A)
            B.copy_(layer.lora.B)
    return ours, theirs


@each_kind
@pytest.mark.parametrize("use_rslora", [False, True])
def test_forward_gradients_and_merge_match_peft(kind: str, use_rslora: bool, rng):
    case = Case(kind, torch.float32)
    fan = {"fan_in_fan_out": True} if kind == "conv1d" else {}
    ours, theirs = pair(case.base(), rng, use_rslora=use_rslora, **fan)
    x = case.inputs(rng)
    outputs = ours(x), theirs(x)
    assert error(*outputs) <= CLOSE
    assert ours.layer.scaling == theirs.layer.scaling["default"]
    cotangent = torch.randn(outputs[0].shape, generator=rng)
    for output in outputs:
        output.backward(cotangent)
    A, B = peft_factors(theirs.layer)
    assert error(ours.layer.lora.A.grad, A.grad) <= CLOSE
    assert error(ours.layer.lora.B.grad, B.grad) <= CLOSE
    merge(ours)
    theirs.layer.merge()
    assert error(ours.layer.weight, theirs.layer.get_base_layer().weight) <= CLOSE


@each_kind
def test_initial_values_match_peft(kind: str):
    case = Case(kind, torch.float32)
    ours = case.attached()
    fan = {"fan_in_fan_out": True} if kind == "conv1d" else {}
    theirs = peft.inject_adapter_in_model(peft.LoraConfig(r=4, target_modules=["layer"], **fan), case.base())
    for mine, its in zip((ours.layer.lora.A, ours.layer.lora.B), peft_factors(theirs.layer), strict=True):
        assert mine.shape == its.shape
        assert (mine.count_nonzero() == 0) == (its.count_nonzero() == 0)
        if its.count_nonzero():
            assert 0.7 < mine.std() / its.std() < 1.4  # 80 draws or more each


class Words(nn.Module):
    """Names that are easy to confuse."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.ModuleDict({"q": nn.Linear(8, 8), "freq": nn.Linear(8, 8), "v": nn.Linear(8, 8)}) for _ in range(3)
        )
        self.q_out = nn.Linear(8, 8)
        self.embed = nn.Embedding(30, 8)


def adapted_by_peft(**options: Any) -> dict[str, tuple[int, float]]:
    model = peft.inject_adapter_in_model(peft.LoraConfig(**{"r": 2, "lora_alpha": 3, **options}), Words())
    layers = {name: part for name, part in model.named_modules() if isinstance(part, peft.tuners.lora.LoraLayer)}
    return {name: (part.r["default"], part.scaling["default"]) for name, part in layers.items()}


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": ["q"]},
        {"target_modules": ["q", "embed"]},
        {"target_modules": ["blocks.1.q", "2.v"]},
        {"target_modules": r".*\.(q|v)"},
        {"target_modules": r"blocks\.[01]\.freq|q_out"},
        {"target_modules": ["q", "v"], "exclude_modules": ["blocks.0.q"]},
        {"target_modules": ["q", "v"], "exclude_modules": r".*\.1\..*"},
        {"target_modules": ["q", "v"], "rank_pattern": {"0.q": 1, "q": 3, "blocks.2.v": 1}},
        {"target_modules": ["q", "v"], "rank_pattern": {r"blocks\.[12]\.q": 1}, "alpha_pattern": {"q": 8, "0.q": 9}},
        {"target_modules": ["q", "freq"], "rank_pattern": {"q": 1}, "use_rslora": True},
        {"target_modules": ["q", "freq"], "alpha_pattern": {".*q": 1}},
    ],
    ids=str,
)
def test_names_and_patterns_select_same_layers_as_peft(options: dict[str, Any]):
    model = Words()
    attach(model, LoRAConfig(**{"rank": 2, "alpha": 3.0, **options}))
    found = {name: (layer.rank, layer.scaling) for name, layer in lora_layers(model).items()}
    assert found == adapted_by_peft(**options)


def test_all_linear_selects_same_layers_as_peft():
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "num_key_value_heads": 1}
    config = transformers.LlamaConfig(vocab_size=64, num_hidden_layers=2, max_position_embeddings=16, **sizes)
    ours, theirs = (transformers.LlamaForCausalLM(config) for _ in range(2))
    attach(ours, LoRAConfig(rank=2))
    theirs = peft.get_peft_model(theirs, peft.LoraConfig(r=2, target_modules="all-linear")).base_model.model
    names = [name for name, part in theirs.named_modules() if isinstance(part, peft.tuners.lora.LoraLayer)]
    assert list(lora_layers(ours)) == names


def test_contract_model_is_the_one_peft_wraps(rng):
    ours, theirs = pair(Holder(nn.Linear(24, 20)), rng)
    assert not torch.equal(ours.layer.weight, theirs.layer.get_delta_weight("default"))
    assert error(ours.layer.delta_weight(), theirs.layer.get_delta_weight("default")) <= CLOSE


@pytest.mark.parametrize("injected", [False, True])
def test_model_with_adapters_of_peft_is_rejected(injected: bool):
    model: Any = nn.ModuleDict({"teacher": nn.Sequential(nn.Linear(8, 8)), "student": nn.Linear(8, 8)})
    config = peft.LoraConfig(r=2, target_modules=["0"])
    if injected:
        peft.inject_adapter_in_model(config, model)["student"].requires_grad_(True)
    else:
        model["teacher"] = peft.get_peft_model(model["teacher"], config)
    for targets in ("all-linear", ["student"]):
        with raises_and_changes_nothing(model, ValueError, r"adapters of PEFT.*'teacher.*merge_and_unload"):
            attach(model, LoRAConfig(rank=2, target_modules=targets))
    attach(model, LoRAConfig(rank=2, exclude_modules=["teacher"]))
    assert list(lora_layers(model)) == ["student"]


def test_model_merged_by_peft_is_adapted():
    model = peft.get_peft_model(nn.Sequential(nn.Linear(8, 8)), peft.LoraConfig(r=2, target_modules=["0"]))
    attach(merged := model.merge_and_unload(), LoRAConfig(rank=2))
    assert list(lora_layers(merged)) == ["0"]
