"""Layers whose weights carry the update: exact in training, evaluation, fused paths, copies and merges."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_lora import (
    LoRAConfig,
    adapter_state_dict,
    attach,
    detach,
    disabled,
    load_adapter_state_dict,
    merge,
    merged,
)
from lightning_lora.adapted_model import AdaptedModel
from tests.contract import assert_unchanged, raises_and_changes_nothing, snapshot, train_all

E = 16


def tokens(rng: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=rng, dtype=torch.float64)


def attention(**options: Any) -> nn.Module:
    return nn.MultiheadAttention(E, 4, **options)


def attend(module: nn.Module, rng: torch.Generator, **options: Any) -> Tensor:
    query = tokens(rng, 5, 3, E)
    key, value = (tokens(rng, 7, 3, size or E) for size in (module.kdim, module.vdim))
    if module._qkv_same_embed_dim and not options.get("cross"):
        key = value = query
    options.pop("cross", None)
    if module.batch_first:
        query, key, value = (t.transpose(0, 1) for t in (query, key, value))
    return module(query, key, value, **options)[0]


def encode(module: nn.Module, rng: torch.Generator) -> Tensor:
    return module(tokens(rng, 3, 5, E))


def decode(module: nn.Module, rng: torch.Generator) -> Tensor:
    return module(tokens(rng, 3, 5, E), tokens(rng, 3, 7, E))


def recur(module: nn.Module, rng: torch.Generator) -> Tensor:
    return module(tokens(rng, 5, 3, 8))[0]


def step(module: nn.Module, rng: torch.Generator) -> Tensor:
    state = tokens(rng, 3, 6)
    output = module(tokens(rng, 3, 8), (state, state) if isinstance(module, nn.LSTMCell) else state)
    return output[0] if isinstance(output, tuple) else output


def encoder_layer() -> nn.Module:
    return nn.TransformerEncoderLayer(E, 4, 24, dropout=0.0, batch_first=True)


Run = Callable[[nn.Module, torch.Generator], Tensor]
CASES: dict[str, tuple[Callable[[], nn.Module], Run, set[str]]] = {
    "attention": (attention, attend, {"in_proj_weight", "out_proj"}),
    "attention, batch first": (lambda: attention(batch_first=True), attend, {"in_proj_weight", "out_proj"}),
    "attention without bias": (
        lambda: attention(bias=False),
        attend,
        {"in_proj_weight", "out_proj"},
    ),
    "cross attention": (attention, lambda m, r: attend(m, r, cross=True), {"in_proj_weight", "out_proj"}),
    "attention weights left out": (
        attention,
        lambda m, r: attend(m, r, need_weights=False),
        {"in_proj_weight", "out_proj"},
    ),
    "masked attention": (
        attention,
        lambda m, r: attend(m, r, attn_mask=torch.triu(torch.ones(5, 5, dtype=torch.bool), 1)),
        {"in_proj_weight", "out_proj"},
    ),
    "attention of other keys and values": (
        lambda: attention(kdim=8, vdim=12),
        attend,
        {"q_proj_weight", "k_proj_weight", "v_proj_weight", "out_proj"},
    ),
    "LSTM": (
        lambda: nn.LSTM(8, 6, 2, bidirectional=True),
        recur,
        {f"weight_{part}_l{i}{way}" for part in ("ih", "hh") for i in (0, 1) for way in ("", "_reverse")},
    ),
    "LSTM with projections": (
        lambda: nn.LSTM(8, 6, proj_size=4),
        recur,
        {"weight_ih_l0", "weight_hh_l0", "weight_hr_l0"},
    ),
    "GRU": (lambda: nn.GRU(8, 6), recur, {"weight_ih_l0", "weight_hh_l0"}),
    "RNN": (lambda: nn.RNN(8, 6), recur, {"weight_ih_l0", "weight_hh_l0"}),
    "LSTM cell": (lambda: nn.LSTMCell(8, 6), step, {"weight_ih", "weight_hh"}),
    "GRU cell": (lambda: nn.GRUCell(8, 6), step, {"weight_ih", "weight_hh"}),
    "bilinear": (lambda: nn.Bilinear(8, 8, 6), lambda m, r: m(tokens(r, 3, 8), tokens(r, 3, 8)), {"weight"}),
    "bag of embeddings": (
        lambda: nn.EmbeddingBag(20, 6, mode="sum", padding_idx=1),
        lambda m, r: m(torch.randint(20, (3, 4), generator=r)),
        {"weight"},
    ),
}
each = pytest.mark.parametrize("case", CASES)


def build(case: str, rng: torch.Generator | None = None, **lora: Any) -> tuple[nn.ModuleDict, Callable[[], Tensor]]:
    """Return a model with an adapted layer, trained if a generator is given, and a call of it on fixed inputs."""
    make, run, _ = CASES[case]
    model = nn.ModuleDict({"layer": make().double()})
    attach(model, LoRAConfig(**({"rank": 2, "alpha": 3.0, "target_modules": ["layer"]} | lora)))
    if rng is not None:
        train_all(model, rng)
    return model, lambda model=model: run(model["layer"], torch.Generator().manual_seed(5))


@each
def test_naming_module_adapts_all_its_weights(case: str):
    model, _ = build(case)
    assert set(AdaptedModel(model).adapters) == {f"layer.{name}" for name in CASES[case][2]}


@each
def test_starts_as_base_and_acts_in_every_mode(case: str, rng):
    model, run = build(case)
    with disabled(model):
        base = run()
    torch.testing.assert_close(run(), base, rtol=0, atol=0)
    train_all(model, rng)
    trained = run()
    assert (trained - base).abs().max() > 1e-3
    model.eval()
    torch.testing.assert_close(run(), trained, rtol=0, atol=1e-10)
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            torch.testing.assert_close(run(), trained, rtol=0, atol=1e-10)


@each
def test_output_matches_dense_weight_and_merged_model(case: str, rng):
    model, run = build(case, rng)
    output = run()
    dense = CASES[case][0]().double()
    state = {name.removeprefix("layer."): value.clone() for name, value in model.state_dict().items()}
    for name, adapter in AdaptedModel(model).adapters.items():
        key = name.removeprefix("layer.")
        key = key if key in state else f"{key}.weight"
        delta = 1.5 * adapter.B.detach().double() @ adapter.A.detach().double()
        state[key] = state[key] + delta.view(state[key].shape)
    dense.load_state_dict({name: state[name] for name in dense.state_dict()})
    expected = CASES[case][1](dense, torch.Generator().manual_seed(5))
    torch.testing.assert_close(output, expected, rtol=0, atol=1e-10)
    before = snapshot(model)
    with merged(model):
        torch.testing.assert_close(run(), output, rtol=0, atol=1e-10)
    assert_unchanged(model, before)
    merge(model)
    assert type(model["layer"]) is type(dense)
    torch.testing.assert_close(run(), output, rtol=0, atol=1e-10)


@each
def test_gradients_reach_factors_only(case: str, rng):
    model, run = build(case, rng)
    run().square().sum().backward()
    for name, parameter in model.named_parameters():
        if ".lora." in name:
            assert parameter.grad.abs().max() > 0, name
        else:
            assert parameter.grad is None, name


@each
def test_detach_restores_every_bit(case: str, rng):
    model = nn.ModuleDict({"layer": CASES[case][0]().double()})
    before = snapshot(model)
    attach(model, LoRAConfig(rank=2, target_modules=["layer"]))
    train_all(model, rng)
    model.double()  # moves everything, as trainers do
    detach(model)
    if isinstance(model["layer"], nn.RNNBase):
        layer = model["layer"]
        for weight, name in zip(layer._flat_weights, layer._flat_weights_names, strict=True):
            assert weight is getattr(layer, name)
    assert_unchanged(model, before)


@each
def test_a_state_can_be_assigned_to_an_adapted_layer_on_the_meta_device(case: str, rng):
    model, run = build(case, rng)
    output, state = run(), copy.deepcopy(model.state_dict())
    model.to("meta").load_state_dict(state, assign=True)
    torch.testing.assert_close(run(), output, rtol=0, atol=0)


@each
def test_copies_pickles_and_states_carry_adapters(case: str, rng):
    model, run = build(case, rng)
    output = run()
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        torch.testing.assert_close(run(twin), output, rtol=0, atol=0)
    fresh, run_fresh = build(case)
    base = {name: value for name, value in model.state_dict().items() if ".lora." not in name}
    fresh.load_state_dict(base, strict=False)
    load_adapter_state_dict(fresh, adapter_state_dict(model))
    torch.testing.assert_close(run_fresh(), output, rtol=0, atol=0)


@pytest.mark.parametrize("layers", ["layer", "encoder", "decoder"])
def test_adapter_acts_in_fused_transformer_path(layers: str, rng):
    if layers == "decoder":
        model, run = nn.TransformerDecoderLayer(E, 4, 24, dropout=0.0, batch_first=True).double(), decode
    else:
        model, run = encoder_layer().double(), encode
    if layers == "encoder":
        model = nn.TransformerEncoder(model, 2, enable_nested_tensor=True)
    attach(model, LoRAConfig(rank=2))
    with torch.inference_mode():
        base = run(model.eval(), torch.Generator().manual_seed(5))
    train_all(model, rng)
    trained = run(model.train(), torch.Generator().manual_seed(5))
    with torch.inference_mode():
        evaluated = run(model.eval(), torch.Generator().manual_seed(5))
    torch.testing.assert_close(evaluated, trained, rtol=0, atol=1e-9)
    assert (evaluated - base).abs().max() > 1e-2
    merge(model)
    with torch.inference_mode():
        torch.testing.assert_close(run(model, torch.Generator().manual_seed(5)), evaluated, rtol=0, atol=1e-9)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype stage.*")
def test_adapter_acts_in_nested_tensor_path(rng):
    model = nn.TransformerEncoder(encoder_layer(), 2, enable_nested_tensor=True)
    attach(model, LoRAConfig(rank=2))
    train_all(model, rng)
    x, padding = torch.randn(3, 5, E, generator=rng), torch.zeros(3, 5, dtype=torch.bool)
    padding[0, 3:] = True
    trained = model.train()(x, src_key_padding_mask=padding)
    with torch.inference_mode():
        evaluated = model.eval()(x, src_key_padding_mask=padding)
    torch.testing.assert_close(evaluated[~padding], trained[~padding], rtol=0, atol=1e-4)


def test_single_projection_of_attention(rng):
    model = nn.ModuleDict({"layer": attention()})
    attach(model, LoRAConfig(rank=2, target_modules=["layer.out_proj"]))
    assert list(AdaptedModel(model).adapters) == ["layer.out_proj"]
    query = torch.randn(5, 3, E, generator=rng)
    model["layer"](query, query, query)[0].sum().backward()
    assert model["layer"].out_proj.lora.B.grad.abs().max() > 0


def test_excluded_projection_stays_out():
    model = nn.ModuleDict({"layer": attention()})
    attach(model, LoRAConfig(rank=2, target_modules=["layer"], exclude_modules=["out_proj"]))
    assert list(AdaptedModel(model).adapters) == ["layer.in_proj_weight"]


def test_rank_of_single_weight():
    model = nn.ModuleDict({"layer": nn.LSTM(8, 6)})
    attach(model, LoRAConfig(rank=2, target_modules=["layer"], rank_pattern={"weight_hh_l0": 1}))
    assert {name: a.spec.rank for name, a in AdaptedModel(model).adapters.items()} == {
        "layer.weight_ih_l0": 2,
        "layer.weight_hh_l0": 1,
    }


@pytest.mark.parametrize("options", [{"max_norm": 1.0}, {"sparse": True}])
def test_embedding_bag_that_changes_its_weight_refused(options: dict[str, Any]):
    model = nn.ModuleDict({"layer": nn.EmbeddingBag(20, 6, **options)})
    with raises_and_changes_nothing(model, ValueError, "max_norm or sparse=True"):
        attach(model, LoRAConfig(rank=2, target_modules=["layer"]))


def test_dropout_refused():
    model = nn.ModuleDict({"layer": nn.LSTM(8, 6)})
    with raises_and_changes_nothing(model, ValueError, "a LSTM has its own forward.*dropout=0"):
        attach(model, LoRAConfig(rank=2, dropout=0.1, target_modules=["layer"]))


# --- parameters named by themselves


class Experts(nn.Module):
    """A mixture of experts with stacked weights, in either layout."""

    def __init__(self, is_transposed: bool) -> None:
        super().__init__()
        self.is_transposed = is_transposed
        self.up = nn.Parameter(torch.randn(3, 6, 8).double())
        self.down = nn.Parameter(torch.randn(3, 8, 6).double())
        self.scale = nn.Parameter(torch.ones(3).double())

    def forward(self, x: Tensor) -> Tensor:
        up, down = (w.transpose(1, 2) if self.is_transposed else w for w in (self.up, self.down))
        if self.is_transposed:
            up, down = down, up
        hidden = torch.tanh(torch.einsum("bi,eoi->beo", x, up)) * self.scale[:, None]
        return torch.einsum("bei,eoi->bo", hidden, down)


@pytest.mark.parametrize("is_transposed", [False, True])
def test_every_expert_has_own_factors(is_transposed: bool, rng):
    model = nn.ModuleDict({"experts": Experts(is_transposed)})
    base = copy.deepcopy(model)
    config = LoRAConfig(rank=2, alpha=3.0, target_modules=[], target_parameters=["experts.up", "*.down"])
    report = attach(model, config)
    layer = model["experts"]
    assert report.adapter_parameters == sum(p.numel() for p in layer.lora.parameters()) == 2 * 3 * 2 * (6 + 8)
    into, out = (6, 8) if is_transposed else (8, 6)
    assert layer.lora["up"].A.shape == (3, 2, into)
    assert layer.lora["up"].B.shape == (3, out, 2)
    assert not torch.equal(layer.lora["up"].A[0], layer.lora["up"].A[1])
    x = torch.randn(4, 8, generator=rng, dtype=torch.float64)
    assert torch.equal(layer(x), base["experts"](x))
    train_all(model, rng)
    output = layer(x)
    with torch.no_grad():
        for name in ("up", "down"):
            adapter = layer.lora[name]
            for expert in range(3):
                delta = 1.5 * adapter.B[expert] @ adapter.A[expert]
                getattr(base["experts"], name)[expert] += delta.T if is_transposed else delta
    torch.testing.assert_close(output, base["experts"](x), rtol=0, atol=1e-10)
    merge(model)
    torch.testing.assert_close(layer(x), output, rtol=0, atol=1e-10)


def test_target_parameters_beside_target_modules(rng):
    class Mixer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mix = nn.Parameter(torch.eye(8))

        def forward(self, x: Tensor) -> Tensor:
            return x @ self.mix

    model = nn.Sequential(nn.Linear(8, 8), Mixer())
    attach(model, LoRAConfig(rank=2, target_modules=["0"], target_parameters=["mix"]))
    assert list(AdaptedModel(model).adapters) == ["0", "1.mix"]
    train_all(model, rng)
    x = torch.randn(3, 8, generator=rng)
    output = model(x)
    state = adapter_state_dict(model)
    assert set(state) == {"0.lora.A", "0.lora.B", "1.lora.mix.A", "1.lora.mix.B"}
    merge(model)
    torch.testing.assert_close(model(x), output, rtol=0, atol=1e-5)


class Rescaled(nn.Module):
    """Computes with half of its layer's weight."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return torch.func.functional_call(self.layer, {"weight": self.layer.weight * 0.5}, (x,))


def test_a_weight_that_functional_call_replaces_gets_the_update_once(rng):
    model, x = Rescaled().double(), torch.randn(3, 6, generator=rng, dtype=torch.float64)
    attach(model, LoRAConfig(rank=2))
    train_all(model, rng)
    with pytest.raises(RuntimeError, match=r"another 'weight' for this Linear, and not its adapter's.*F\.linear"):
        model(x)
    halved = {name: 0.5 * tensor for name, tensor in model.layer.named_parameters()}
    base, A, B = (halved[name] for name in ("weight", "lora.A", "lora.B"))
    expected = F.linear(x, base + model.layer.lora.spec.scaling * B @ A, halved["bias"])
    torch.testing.assert_close(torch.func.functional_call(model.layer, halved, (x,)), expected)
    same = dict(model.layer.named_parameters())
    assert torch.equal(torch.func.functional_call(model.layer, same, (x,)), model.layer(x))
    frozen = {name: tensor for name, tensor in same.items() if not tensor.requires_grad}
    assert torch.equal(torch.func.functional_call(model.layer, frozen, (x,)), model.layer(x))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"target_parameters": ["1.weigth"]}, r"target_parameters='1.weigth' matched no parameter.*'1.weight'"),
        ({"target_parameters": ["0.bias"]}, r"'0.bias' has 1 dimension; LoRA needs two or more"),
        ({"target_parameters": ["0.weight"]}, r"target_modules adapts '0' already"),
        ({"target_parameters": ["top"]}, r"'top' belongs to the model itself"),
        ({"target_parameters": ["1.weight"], "dropout": 0.1}, r"needs dropout=0"),
        ({"target_parameters": ["1.weight"], "rank": 9}, r"rank 9 is above 8"),
    ],
)
def test_unsupported_parameter_refused(config: dict[str, Any], message: str):
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    model.top = nn.Parameter(torch.zeros(4, 4))
    with raises_and_changes_nothing(model, ValueError, message):
        attach(model, LoRAConfig(**({"rank": 2, "target_modules": ["0"]} | config)))
