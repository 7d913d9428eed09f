"""Trained base biases (``bias``) and the bias on ``B`` (``lora_bias``)."""

from __future__ import annotations

import copy
import pickle
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_lora import LoRAConfig, adapter_state_dict, attach, detach, disabled, merge, merged, parameter_groups
from lightning_lora import load_adapter_state_dict as load
from lightning_lora.adapted_model import AdaptedModel
from tests import contract
from tests.contract import ALPHA, IN, KINDS, OUT, RANK, SCALING, TOLERANCE, Case, Holder, error
from tests.contract import raises_and_changes_nothing as refuses
from tests.layers.test_embedding import train_everything

pytestmark = pytest.mark.filterwarnings("ignore:These adapters are not smaller.*")


class Net(nn.Module):
    """Layers with biases of every name, without biases, and with names that only look like a bias."""

    def __init__(self) -> None:
        super().__init__()
        self.position_bias = nn.Parameter(torch.randn(8))
        self.linear, self.plain = nn.Linear(8, 8), nn.Linear(8, 8, bias=False)
        self.norm, self.biases = nn.LayerNorm(8), nn.Linear(8, 8, bias=False)
        self.attention, self.lstm = nn.MultiheadAttention(8, 2, batch_first=True), nn.LSTM(8, 8, batch_first=True)
        self.conv, self.head = nn.Conv1d(8, 8, 1), nn.Linear(8, 4)
        self.register_buffer("bias_table", torch.ones(8))

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.plain(torch.tanh(self.linear(x)))) + self.position_bias * self.bias_table
        x = x + self.attention(x, x, x, need_weights=False)[0]
        x = self.conv((x + self.lstm(x)[0]).transpose(1, 2)).transpose(1, 2)
        return self.head(torch.tanh(self.biases(x)))


INNER = {"linear": ["bias"], "plain": [], "attention": ["in_proj_bias", "out_proj.bias"], "conv": ["bias"]}
INNER |= {"lstm": ["bias_ih_l0", "bias_hh_l0"], "norm": ["bias"], "head": ["bias"], "biases": []}
OF = {layer: {f"{layer}.{name}" for name in names} for layer, names in INNER.items()}
EVERY = {"position_bias"}.union(*OF.values())
ADAPTED = ["linear", "plain", "lstm", "conv"]  # without attention, whose bits depend on what trains
SLICES = {"target_modules": [], "target_slices": {"linear": {"q": "0:4"}, "attention": {"v": "-8:"}}}


def make(dtype: torch.dtype = torch.float64, **options: Any) -> tuple[nn.Module, nn.Module, Tensor]:
    """Return a base that does not train, an adapted copy, and an input."""
    base = Net().to(dtype)
    model = copy.deepcopy(base)
    attach(model, LoRAConfig(**{"rank": 2, "alpha": 3.0, "target_modules": ADAPTED} | options))
    return base.requires_grad_(False), model, torch.randn(3, 5, 8).to(dtype)


def assert_base(model: nn.Module, base: nn.Module, x: Tensor) -> None:
    """Check that a model has the bits of the base and computes the same; kernels depend on what trains."""
    state = model.state_dict()
    contract.assert_same_bits({name: state[name] for name in base.state_dict()}, dict(base.state_dict()))
    assert error(model(x), base(x)) <= TOLERANCE[x.dtype]


def training(model: nn.Module) -> set[str]:
    return {name for name, p in model.named_parameters() if p.requires_grad and ".lora." not in name}


each_mode = pytest.mark.parametrize("bias", ["none", "lora_only", "all"])


@each_mode
@pytest.mark.parametrize(
    ("options", "only"),
    [
        ({"target_modules": ADAPTED}, OF["linear"] | OF["lstm"] | OF["conv"]),
        ({"target_modules": ["attention", "plain"]}, OF["attention"]),
        ({"target_modules": ["attention.out_proj"]}, {"attention.out_proj.bias"}),
        ({"target_modules": [], "target_parameters": ["lstm.weight_hh_l0"]}, OF["lstm"]),
        (SLICES, {"linear.bias", "attention.in_proj_bias"}),
        ({"target_modules": ["conv"], "modules_to_save": ["head"]}, OF["conv"]),
    ],
    ids=lambda value: "" if isinstance(value, set) else str(value),
)
def test_bias_mode_selects_trained_and_saved_biases(bias: str, options: dict[str, Any], only: set[str]):
    _, model, _ = make(bias=bias, **options)
    head = {"head.weight", "head.bias"} if "modules_to_save" in options else set()
    expected = {"none": set(), "lora_only": only, "all": EVERY}[bias] | head
    assert training(model) == expected
    assert {name for name in adapter_state_dict(model) if ".lora." not in name} == expected
    grouped = [p for group in parameter_groups(model, lr=1e-3, lr_ratio=4.0) for p in group["params"]]
    assert {id(p) for p in grouped} == {id(p) for p in model.parameters() if p.requires_grad}
    assert len(grouped) == len({id(p) for p in grouped})


@each_mode
def test_trained_biases_match_dense_model(bias: str, rng):
    _, model, x = make(bias=bias)
    train_everything(model, rng)
    (output := model(x)).square().sum().backward()
    dense = Net().double()
    state = {name: model.state_dict()[name].clone() for name in dense.state_dict()}
    for name, adapter in AdaptedModel(model).adapters.items():
        name = name if name in state else f"{name}.weight"
        state[name] += 1.5 * (adapter.B.detach() @ adapter.A.detach()).view(state[name].shape)
    dense.load_state_dict(state)
    (truth := dense(x)).square().sum().backward()
    assert error(output, truth) <= 1e-10
    for name in training(model):
        assert error(model.get_parameter(name).grad, dense.get_parameter(name).grad) <= 1e-10


@each_mode
@pytest.mark.parametrize("change", [lambda model: model, nn.Module.double, nn.Module.bfloat16], ids=["", "up", "down"])
def test_disable_and_detach_restore_base_biases(bias: str, change, rng):
    base, model, x = make(torch.float32, bias=bias)
    assert error(model(x), base(x)) <= 1e-6
    train_everything(model, rng)
    trained, x = contract.snapshot(change(model)), x.to(change(base).head.weight.dtype)
    for _ in range(2):
        with disabled(model), disabled(model):
            assert_base(model, base, x)
        contract.assert_unchanged(model, trained)
    with pytest.raises(RuntimeError, match="inside"), disabled(model):
        raise RuntimeError("inside")
    contract.assert_unchanged(model, trained)
    assert error(model(x), base(x)) > 0.1
    detach(model)
    assert_base(model, base, x)


@each_mode
def test_detach_leaves_no_trace(bias: str, rng):
    model = Net()
    model.norm.bias.requires_grad_(False)
    before = contract.snapshot(model)
    attach(model, LoRAConfig(rank=2, bias=bias))
    train_everything(model, rng)
    detach(model)
    contract.assert_unchanged(model, before)


@each_mode
def test_merge_keeps_trained_biases(bias: str, rng):
    base, model, x = make(bias=bias)
    train_everything(model, rng)
    output, before = model(x), contract.snapshot(model)
    with merged(model):
        assert error(model(x), output) <= 1e-10
    contract.assert_unchanged(model, before)
    merge(model)
    assert list(model.state_dict()) == list(base.state_dict())
    assert error(model(x), output) <= 1e-10
    biases = {"none": set(), "lora_only": OF["linear"] | OF["lstm"] | OF["conv"], "all": EVERY}[bias]
    weights = {name for name in base.state_dict() if name.partition(".")[0] in ADAPTED and "weight" in name}
    state = model.state_dict()
    assert {n for n, t in base.state_dict().items() if not torch.equal(t, state[n])} == biases | weights
    contract.assert_same_bits({n: state[n] for n in sorted(biases)}, {n: before["bits"][n] for n in sorted(biases)})


@each_mode
def test_state_copy_and_pickle_include_biases(bias: str, rng):
    base, model, x = make(bias=bias)
    fresh = copy.deepcopy(base)
    attach(fresh, LoRAConfig(rank=2, alpha=3.0, target_modules=ADAPTED, bias=bias))
    train_everything(model, rng)
    load(fresh, adapter_state_dict(model))
    for twin in (fresh, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(x), model(x))
        contract.assert_same_bits(adapter_state_dict(twin), adapter_state_dict(model))
        detach(twin)
        assert_base(twin, base, x)


@each_mode
def test_loading_full_state_sets_trained_biases_only(bias: str, rng):
    base, model, x = make(bias=bias)
    fresh = copy.deepcopy(model)
    train_everything(model, rng)
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(fresh(x), model(x))
    detach(fresh)
    assert_base(fresh, base, x)


def test_meta_device_biases_are_rejected():
    with torch.device("meta"):
        model = Net()
    with pytest.raises(ValueError, match="meta device"):
        attach(model, LoRAConfig(rank=2, target_modules=["linear"], bias="all"))


def test_bias_shared_with_other_layer_is_rejected():
    model = Net()
    model.conv.bias = model.linear.bias
    with refuses(model, ValueError, r"'linear.bias' is tied to \['conv.bias'\]"):
        attach(model, LoRAConfig(rank=2, target_modules=["linear"], bias="lora_only"))


# --- a bias on B


UNFIT = [nn.MultiheadAttention(8, 2), nn.LSTM(8, 8), nn.GRUCell(8, 8), nn.Bilinear(8, 8, 8), nn.EmbeddingBag(9, 8)]
SUM = ("A", "B", "bias")
PLAIN = [kind for kind, spec in KINDS.items() if not spec.takes_tokens and not kind.startswith("transposed")]
each_case = pytest.mark.parametrize("case", [Case(kind, dtype) for kind in PLAIN for dtype in TOLERANCE], ids=str)


def with_bias(case: Case, base: nn.Module | None = None) -> nn.Module:
    """Return a model whose layer is adapted with a bias on B."""
    model = base or case.base()
    attach(model, LoRAConfig(**case.config.to_dict() | {"lora_bias": True}))
    return model


def dense(case: Case, layer: nn.Module, x: Tensor, A: Tensor, B: Tensor, c: Tensor) -> Tensor:
    """Return W x + b + s (B A x + c) in float64."""
    W = contract.stored_weight(layer).double() + case.stored(layer, SCALING * B.double() @ A.double())
    output, features = case.spec.function(layer, x.double(), W), 1 if case.spec.image else -1
    return (output.movedim(features, -1) + SCALING * c.double()).movedim(-1, features)


@each_case
def test_lora_bias_starts_at_zero_and_travels_with_adapter(case: Case, rng):
    base, x = case.base(), case.inputs(rng)
    model, fresh, output = with_bias(case, copy.deepcopy(base)), copy.deepcopy(base), base(x)
    assert [name for name, start in model.layer.lora.state_dict().items() if start.any()] == ["A"]
    assert torch.equal(model(x), output)
    train_everything(model, rng)
    with disabled(model):
        assert torch.equal(model(x), output)
    state = adapter_state_dict(model)
    assert list(state) == [f"layer.lora.{name}" for name in SUM]
    assert state["layer.lora.bias"].shape == model.layer.lora.B.shape[:1]
    load(with_bias(case, fresh), state)
    assert torch.equal(fresh(x), model(x))
    detach(model)
    assert torch.equal(model(x), output)


@each_case
@pytest.mark.parametrize("training", [True, False])
def test_lora_bias_matches_dense_model(case: Case, training: bool, rng):
    model, x = with_bias(case).train(training), case.inputs(rng)
    train_everything(model, rng)
    lora = model.layer.lora
    twins = [getattr(lora, name).detach().double().requires_grad_() for name in SUM]
    truth, without = dense(case, model.layer, x, *twins), dense(case, model.layer, x, *twins[:2], torch.zeros(1))
    found, cotangent = model(x), torch.randn(truth.shape, generator=rng).to(case.dtype)
    assert found.dtype == case.dtype
    assert error(found, truth) <= case.tolerance
    assert error(without, truth) > 3 * case.tolerance
    with torch.inference_mode():
        assert error(model(x), truth) <= case.tolerance
    truth.backward(cotangent.double())
    found.backward(cotangent)
    for name, twin in zip(SUM, twins, strict=True):
        assert error(getattr(lora, name).grad, twin.grad) <= case.tolerance


@each_case
def test_merge_adds_lora_bias_or_rejects_layer_without_bias(case: Case, rng):
    model, x = with_bias(case), case.inputs(rng)
    train_everything(model, rng)
    lora, before = model.layer.lora, contract.snapshot(model)
    truth = dense(case, model.layer, x, lora.A, lora.B, lora.bias)
    if case.kind == "linear without bias":
        for change in (merge, lambda model: merged(model).__enter__()):
            with refuses(model, RuntimeError, "'layer' has no bias"):
                change(model)
        return
    folded = before["bits"]["layer.bias"].double() + SCALING * before["bits"]["layer.lora.bias"].double()
    with merged(model):
        assert error(model(x), truth) <= case.tolerance
        assert error(model.layer.bias, folded) <= case.tolerance
    contract.assert_unchanged(model, before)
    merge(model)
    assert error(model(x), truth) <= case.tolerance
    assert error(model.layer.bias, folded) <= case.tolerance


@pytest.mark.parametrize(
    ("name", "make"),
    [(kind, spec.build) for kind, spec in KINDS.items() if kind not in PLAIN]
    + [(type(layer).__name__, lambda layer=layer: layer) for layer in UNFIT],
)
def test_lora_bias_rejects_weight_adapters(name: str, make: Any):
    model = nn.ModuleDict({"odd": make(), "linear": nn.Linear(8, 8)})
    with refuses(model, ValueError, "'odd.*lora_bias"):
        attach(model, LoRAConfig(rank=1, target_modules=["odd"], lora_bias=True))
    attach(model, LoRAConfig(rank=1, lora_bias=True))
    assert list(AdaptedModel(model).adapters) == ["linear"]


@pytest.mark.parametrize("kind", ["linear", "conv1d", "Conv2d"])
def test_lora_bias_matches_peft(kind: str, rng):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about PEFT's optional dependencies
        peft = pytest.importorskip("peft")
    base = Holder(nn.Conv2d(IN, OUT, (3, 2)) if kind == "Conv2d" else KINDS[kind].build())
    x = torch.randn(2, *((IN, 5, 4) if kind == "Conv2d" else (6, IN)), generator=rng)
    ours = with_bias(Case("linear", torch.float32), copy.deepcopy(base))
    train_everything(ours, rng)
    options = {"r": RANK, "lora_alpha": ALPHA, "lora_bias": True, "fan_in_fan_out": kind == "conv1d"}
    theirs = peft.inject_adapter_in_model(peft.LoraConfig(target_modules=["layer"], **options), base)
    A, B, lora = theirs.layer.lora_A["default"], theirs.layer.lora_B["default"], ours.layer.lora
    with torch.no_grad():
        for target, factor in ((A.weight, lora.A), (B.weight, lora.B), (B.bias, lora.bias)):
            target.copy_(factor.view(target.shape))
    assert error(ours(x), theirs(x)) <= 1e-5
    merge(ours), theirs.layer.merge()
    assert error(ours.layer.weight, theirs.layer.get_base_layer().weight) <= 1e-5
    assert error(ours.layer.bias, theirs.layer.get_base_layer().bias) <= 1e-5
