"""Low-rank updates of slices, which leave every other row alone."""

from __future__ import annotations

import copy
import json
import pickle
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import replace
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

from lightning_lora import (
    LoRAConfig,
    adapter_state_dict,
    attach,
    detach,
    load_adapter_state_dict,
    merge,
    merged,
)
from lightning_lora.adapted_model import AdaptedModel
from tests.contract import (
    ALPHA,
    RANK,
    SCALING,
    TOLERANCE,
    CountingLinear,
    Holder,
    assert_same_bits,
    assert_unchanged,
    error,
    raises_and_changes_nothing,
    snapshot,
    train_all,
)

FEATURES, ROWS = 16, 48
pytestmark = pytest.mark.filterwarnings("ignore:These adapters are not smaller.*")


class Attend(Holder):
    """A model whose layer is an attention of the input to itself."""

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x, x, x, need_weights=False)[0]


KINDS: Mapping[str, Callable[[], Holder]] = {
    "linear": lambda: Holder(nn.Linear(FEATURES, ROWS)),
    "linear without bias": lambda: Holder(nn.Linear(FEATURES, ROWS, bias=False)),
    "own forward": lambda: Holder(CountingLinear(FEATURES, ROWS)),
    "conv1d": lambda: Holder(pytest.importorskip("transformers.pytorch_utils").Conv1D(ROWS, FEATURES)),
    "attention": lambda: Attend(nn.MultiheadAttention(FEATURES, 4, batch_first=True)),
}
LAYOUTS: Mapping[str, Mapping[str, str]] = {
    "query and value": {"q": "0:16", "v": "32:48"},
    "grouped queries": {"q": ":32", "k": "32:40", "v": "-8:"},
    "interleaved by a step": {"q": "0::3", "v": "2::3"},
    "several pieces": {"q": "0:4,24:28", "k": "12:16,36:40", "v": "20:24,44:48"},
    "pieces in another order": {"q": "40:48,0:4", "v": "20:12:-2"},
}


def rows_of(text: str) -> list[int]:
    """Return the output features that the slices mean in Python."""
    pieces = [[int(part) if part else None for part in piece.split(":")] for piece in text.split(",")]
    return [row for piece in pieces for row in range(ROWS)[slice(*piece)]]


def as_matrix(layer: nn.Module, W: Tensor) -> Tensor:
    """Return a stored weight as ``(out, in)``, and the other way round."""
    return W.T if isinstance(layer, nn.Embedding) or type(layer).__name__.endswith("Conv1D") else W.flatten(1)


Factors = Mapping[str, Mapping[str, Tensor]]
Sites = Mapping[str, tuple[str, Any]]  # of each adapter the name of its weight, and its rows


def factors_of(model: nn.Module) -> Factors:
    """Return float64 copies of all that trains, to be differentiated."""
    adapters = AdaptedModel(model).adapters.items()
    return {n: {k: p.detach().double().requires_grad_() for k, p in a.named_parameters()} for n, a in adapters}


def dense_weights(
    base: nn.Module, model: nn.Module, sites: Sites, factors: Factors, update: Callable[..., Tensor]
) -> dict[str, Tensor]:
    """Return the float64 state of the base with what ``update`` makes of the rows and factors of each adapter."""
    weights = {name: model.state_dict()[name].double() for name in base.state_dict()}
    for adapter, (stored, rows) in sites.items():
        layer, W = base.get_submodule(stored.rpartition(".")[0]), weights[stored]
        matrix = as_matrix(layer, W).clone()
        matrix[rows] = update(matrix[rows], **factors[adapter])
        weights[stored] = as_matrix(layer, matrix).reshape(W.shape)
    return weights


def plus_low_rank(W: Tensor, A: Tensor, B: Tensor) -> Tensor:
    return W + SCALING * B @ A


class Case:
    """One kind of layer, sliced in one way, in one precision."""

    def __init__(self, kind: str, layout: str, dtype: torch.dtype) -> None:
        self.kind, self.layout, self.dtype = kind, layout, dtype
        self.tolerance = TOLERANCE[dtype] * (4 if kind == "attention" else 1)
        self.slices = LAYOUTS[layout]
        self.stored = "layer.in_proj_weight" if kind == "attention" else "layer.weight"
        self.sites: Sites = {f"layer.{name}": (self.stored, rows_of(text)) for name, text in self.slices.items()}
        self.touched = [row for _, rows in self.sites.values() for row in rows]
        self.untouched = sorted(set(range(ROWS)) - set(self.touched))
        self.config = LoRAConfig(rank=RANK, alpha=ALPHA, target_modules=[], target_slices={"layer": self.slices})

    def __str__(self) -> str:
        return f"{self.kind}-{self.layout}-{str(self.dtype).removeprefix('torch.')}"

    def base(self) -> Holder:
        return KINDS[self.kind]().to(self.dtype)

    def trained(self, rng: torch.Generator) -> Holder:
        model = self.base()
        attach(model, self.config)
        train_all(model, rng)
        return model

    def inputs(self, rng: torch.Generator) -> Tensor:
        return torch.randn(5, 6, FEATURES, generator=rng).to(self.dtype)

    def dense_weights(self, model: Holder, factors: Factors | None = None) -> dict[str, Tensor]:
        return dense_weights(self.base().double(), model, self.sites, factors or factors_of(model), plus_low_rank)

    def dense(self, model: Holder, x: Tensor, factors: Factors | None = None) -> Tensor:
        return functional_call(self.base().double(), self.dense_weights(model, factors), x.double())


CASES = [Case(kind, layout, dtype) for kind in KINDS for layout in LAYOUTS for dtype in TOLERANCE]
each_case = pytest.mark.parametrize("case", CASES, ids=str)
each_kind = pytest.mark.parametrize("case", [c for c in CASES if c.layout == "query and value"], ids=str)


@each_case
def test_slices_match_dense_weight_in_every_mode(case: Case, rng):
    model, x, base = case.trained(rng), case.inputs(rng), case.base().double()
    base.load_state_dict(model.state_dict(), strict=False)
    truth = case.dense(model, x)
    assert error(base(x.double()), truth) > 10 * case.tolerance  # the adapters are what makes the difference
    for training, grad_mode in product((True, False), (nullcontext, torch.no_grad, torch.inference_mode)):
        model.train(training)
        with grad_mode():
            found = model(x)
        assert found.dtype == case.dtype
        assert error(found, truth) <= case.tolerance


@each_case
def test_gradients_of_slices_match_dense_weight(case: Case, rng):
    model, x = case.trained(rng), case.inputs(rng).requires_grad_()
    factors, twin = factors_of(model), x.detach().double().requires_grad_()
    truth = case.dense(model, twin, factors)
    cotangent = torch.randn(truth.shape, generator=rng).to(case.dtype)
    truth.backward(cotangent.double())
    model(x).backward(cotangent)
    assert error(x.grad, twin.grad) <= case.tolerance
    for name, adapter in AdaptedModel(model).adapters.items():
        for key, factor in adapter.named_parameters():
            assert error(factor.grad, factors[name][key].grad) <= case.tolerance, (name, key)
    with_gradient = {name for name, p in model.named_parameters() if p.grad is not None}
    assert with_gradient == {f"layer.lora.{name}.{key}" for name in case.slices for key in "AB"}


@each_case
def test_merging_slices_keeps_bits_of_other_rows(case: Case, rng):
    model, x = case.trained(rng), case.inputs(rng)
    before, truth, weights = snapshot(model), case.dense(model, x), case.dense_weights(model)
    with merged(model):
        assert error(model(x), truth) <= case.tolerance
    assert_unchanged(model, before)
    merge(model)
    assert type(model.layer) is type(case.base().layer)
    assert error(model(x), truth) <= case.tolerance
    now, was = (as_matrix(model.layer, bits) for bits in (model.state_dict()[case.stored], before["bits"][case.stored]))
    assert torch.equal(now[case.untouched], was[case.untouched])
    assert error(now, as_matrix(model.layer, weights[case.stored])) <= case.tolerance
    assert not (now[case.touched] == was[case.touched]).all(1).any()


@each_case
def test_features_outside_slices_keep_their_bits(case: Case, rng):
    model, x = case.base(), case.inputs(rng)
    read = (lambda: model.layer.in_proj_weight.T) if case.kind == "attention" else (lambda: model(x))
    before = read().clone()
    attach(model, case.config)
    train_all(model, rng)
    for training in (True, False):
        model.train(training)
        assert torch.equal(read()[..., case.untouched], before[..., case.untouched])
    assert not (read() == before)[..., case.touched].flatten(0, -2).all(0).any()


@each_kind
@pytest.mark.parametrize("training", [True, False])
def test_attaching_and_detaching_slices_keep_every_bit(case: Case, training: bool, rng):
    model, x = case.base().train(training), case.inputs(rng)
    model.neighbor.bias.requires_grad_(False)
    before, output = snapshot(model), model(x)
    attach(model, case.config)
    assert torch.equal(model(x), output)
    train_all(model, rng)
    model(x).sum().backward()
    detach(model)
    assert torch.equal(model(x), output)
    assert_unchanged(model, before)


@each_case
def test_state_round_trip_of_slices(case: Case, rng):
    model, x = case.trained(rng), case.inputs(rng)
    state = adapter_state_dict(model)
    shapes = {f"layer.lora.{name}.A": (RANK, FEATURES) for name in case.slices}
    shapes |= {f"layer.lora.{name}.B": (len(rows_of(text)), RANK) for name, text in case.slices.items()}
    assert {name: tuple(tensor.shape) for name, tensor in state.items()} == shapes
    fresh = case.base()
    fresh.load_state_dict({name: model.state_dict()[name] for name in fresh.state_dict()})
    attach(fresh, case.config, seed=9)
    assert not torch.equal(fresh(x), model(x))
    load_adapter_state_dict(fresh, state)
    assert torch.equal(fresh(x), model(x))
    assert_same_bits(adapter_state_dict(fresh), state)


@each_kind
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_copy_with_slices_is_independent(case: Case, copied, rng):
    model, x = case.trained(rng), case.inputs(rng)
    twin, output = copied(model), model(x)
    assert torch.equal(twin(x), output)
    train_all(twin, rng)
    assert not torch.equal(twin(x), output)
    assert torch.equal(model(x), output)


@each_kind
def test_start_of_slice_ignores_other_slices(case: Case):
    both, alone = case.base(), case.base()
    attach(both, case.config)
    attach(alone, replace(case.config, target_slices={"layer": {"v": case.slices["v"]}}))
    assert torch.equal(both.layer.lora["v"].A, alone.layer.lora["v"].A)
    assert not torch.equal(both.layer.lora["v"].A, both.layer.lora["q"].A)
    for name in case.slices:
        assert both.layer.lora[name].B.count_nonzero() == 0
        assert both.layer.lora[name].A.count_nonzero() == RANK * FEATURES


@each_case
def test_slices_equal_one_block_diagonal_adapter(case: Case, rng):
    model, whole, x = case.trained(rng), case.base(), case.inputs(rng)
    whole.load_state_dict({name: model.state_dict()[name] for name in whole.state_dict()})
    count, adapters = len(case.slices), [model.layer.lora[name] for name in case.slices]
    attach(whole, LoRAConfig(rank=RANK * count, alpha=ALPHA * count, target_modules=["layer"]))
    adapter, *_ = AdaptedModel(whole).adapters.values()  # an output projection of attention stays as it starts
    with torch.no_grad():
        adapter.A.copy_(torch.cat([part.A for part in adapters]))
        adapter.B.zero_()
        for i, (part, (_, rows)) in enumerate(zip(adapters, case.sites.values(), strict=True)):
            adapter.B[rows, i * RANK : (i + 1) * RANK] = part.B
    assert error(model(x), whole(x)) <= case.tolerance


class Block(nn.ModuleDict):
    def __init__(self) -> None:
        super().__init__({"c_attn": nn.Linear(FEATURES, ROWS), "c_proj": nn.Linear(FEATURES, FEATURES)})


def sliced(slices: Mapping[str, Mapping[str, str]], **options: Any) -> LoRAConfig:
    return LoRAConfig(**{"rank": 2, "target_modules": [], "target_slices": slices} | options)


@pytest.mark.parametrize(
    ("key", "target_modules", "names"),
    [
        ("0.c_attn", [], ["0.c_attn.q", "0.c_attn.v"]),
        ("c_attn", [], ["0.c_attn.q", "0.c_attn.v", "1.c_attn.q", "1.c_attn.v"]),
        ("?.c_a*", ["c_attn"], ["0.c_attn.q", "0.c_attn.v", "1.c_attn.q", "1.c_attn.v"]),
        ("1.c_attn", ["c_attn"], ["0.c_attn", "1.c_attn.q", "1.c_attn.v"]),
        ("0.*", ["1.c_proj"], ["0.c_attn.q", "0.c_attn.v", "0.c_proj.q", "0.c_proj.v", "1.c_proj"]),
        ("0.c_attn", "all-linear", ["0.c_attn.q", "0.c_attn.v", "0.c_proj", "1.c_attn", "1.c_proj"]),
    ],
)
def test_sliced_layer_is_adapted_by_slices_alone(key: str, target_modules: Any, names: list[str]):
    model = nn.Sequential(Block(), Block())
    attach(model, sliced({key: {"q": "0:8", "v": "8:16"}}, target_modules=target_modules))
    assert list(AdaptedModel(model).adapters) == names


def test_slice_with_own_rank_and_alpha(rng):
    model, x = Block(), torch.randn(3, FEATURES, generator=rng)
    pattern = {"rank_pattern": {"c_attn.q": 1}, "alpha_pattern": {"c_attn.q": 5.0}}
    attach(model, sliced({"c_attn": {"q": "0:8", "v": "8:16"}}, alpha=3.0, **pattern))
    base = model["c_attn"](x)
    train_all(model, rng)
    q, v = (model["c_attn"].lora[name] for name in "qv")
    assert (q.A.shape, v.A.shape) == ((1, FEATURES), (2, FEATURES))
    update = torch.cat([5.0 * x @ q.A.T @ q.B.T, 1.5 * x @ v.A.T @ v.B.T], 1)
    torch.testing.assert_close(model["c_attn"](x)[:, :16], base[:, :16] + update)


@pytest.mark.parametrize("name", ["weight", "bias", "A", "B", "lora", "adapters", "magnitude", "class"])
def test_slice_names(name: str, rng):
    model, x = Block(), torch.randn(3, FEATURES, generator=rng)
    attach(model, sliced({"c_attn": {name: "0:8"}}))
    train_all(model, rng)
    output, state = model["c_attn"](x), adapter_state_dict(model)
    assert list(state) == [f"c_attn.lora.{name}.A", f"c_attn.lora.{name}.B"]
    detach(model)
    attach(model, sliced({"c_attn": {name: "0:8"}}))
    load_adapter_state_dict(model, state)
    assert torch.equal(model["c_attn"](x), output)


@pytest.mark.parametrize(
    ("slices", "match"),
    [
        *(({"c_attn": {"q": text}}, f"'c_attn'.*'{text}'.*48") for text in ("40:49", "-49:4", "90:99", "8:8", "9:3")),
        *(({"c_attn": {"q": text}}, f"'{text}' ") for text in ("", "3", "a:b", "0:4:0", "0:1:2:3", "0:4,,8:9", "0;1")),
        *(({"c_attn": {name: "0:8"}}, f"'{name}'") for name in ("", "q-k", "1", "a.b", "q k")),
        *(({"c_attn": {name: "0:8"}}, f"'{name}'") for name in ("keys", "forward", "training")),
        *(({name: {"q": "0:4"}}, f"'{name}'") for name in ("conv", "lstm", "embed", "norm", "cross", "c_atn")),
        ({"c_attn": {"q": "0:8"}, "c_atn": {"q": "0:8"}}, "'c_atn'.*'c_attn'"),
        ({"c_attn": {"q": "0:8", "v": "7:16"}}, "'v'.*overlap"),
        ({"c_attn": {"q": "0::2", "v": "1::3"}}, "'v'.*overlap"),
        ({"c_attn": {"q": "0:8,4:12"}}, "'0:8,4:12'.*twice"),
    ],
    ids=str,
)
def test_invalid_slices_refused(slices: Mapping[str, Mapping[str, str]], match: str):
    model = Block()
    model.update({"conv": nn.Conv2d(4, ROWS, 3), "lstm": nn.LSTM(8, 12), "embed": nn.Embedding(9, ROWS)})
    model.update({"norm": nn.LayerNorm(ROWS), "cross": nn.MultiheadAttention(FEATURES, 4, kdim=8, vdim=8)})
    with raises_and_changes_nothing(model, ValueError, match):
        attach(model, sliced(slices))


def test_config_with_slices_survives_json():
    config = sliced({"c_attn": {"q": "0:8", "v": "8:16,-4:"}, "*.qkv": {"k": "::3"}})
    assert json.loads(json.dumps(config.to_dict())) == config.to_dict()
    assert LoRAConfig.from_dict(config.to_dict()) == config
    assert config != sliced({"c_attn": {"q": "0:8", "v": "8:16,-5:"}, "*.qkv": {"k": "::3"}})
