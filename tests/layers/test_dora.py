"""DoRA: every row of the updated weight has a trained norm, in every kind of layer it is defined for."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Mapping
from contextlib import nullcontext, suppress
from functools import partial
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

from lightning_lora import LoRAConfig, adapter_state_dict, attach, detach, load_adapter_state_dict, merge, merged
from lightning_lora.adapted_model import AdaptedModel
from lightning_lora.layers import base_parameter
from tests import contract
from tests.contract import SCALING, Holder, assert_same_bits, assert_unchanged, error, raises_and_changes_nothing
from tests.layers import test_low_rank as sliced
from tests.layers.test_linear import ScaledLinear
from tests.layers.test_low_rank import FEATURES, Attend, as_matrix, dense_weights, factors_of, plus_low_rank

SLICES = sliced.LAYOUTS["several pieces"]
GRAD_MODES = (nullcontext, torch.no_grad, torch.inference_mode)
SPEC = {"rank": contract.RANK, "alpha": contract.ALPHA, "use_dora": True}


class Cross(Holder):
    """A model whose layer is an attention to keys and values of other sizes."""

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x, x[..., :8], x[..., :12], need_weights=False)[0]


class First(Holder):
    """A model whose layer returns its states, too."""

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)[0]


class Twice(Holder):
    """A model whose layer takes two inputs."""

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x, x.flip(-1))


PLAIN = [kind for kind in contract.KINDS if not kind.startswith("transposed")]
MORE: Mapping[str, Callable[[], Holder]] = {
    "attention": lambda: Attend(nn.MultiheadAttention(FEATURES, 4, batch_first=True)),
    "cross attention": lambda: Cross(nn.MultiheadAttention(FEATURES, 4, kdim=8, vdim=12, batch_first=True)),
    "LSTM": lambda: First(nn.LSTM(FEATURES, 8, bidirectional=True)),
    "GRU": lambda: First(nn.GRU(FEATURES, 8, 2)),
    "RNN": lambda: First(nn.RNN(FEATURES, 16)),
    "bilinear": lambda: Twice(nn.Bilinear(FEATURES, FEATURES, 8)),
    **{f"slices of {kind}": build for kind, build in sliced.KINDS.items()},
}


def rescaled(W: Tensor, A: Tensor, B: Tensor, magnitude: Tensor, strength: float = 1.0, **_: Tensor) -> Tensor:
    """Return ``m * (W + scaling * B @ A) / n``; the update may count more or less for all but the norm."""
    norm = plus_low_rank(W, A, B).detach().square().sum(1).sqrt()
    return (magnitude / norm)[:, None] * plus_low_rank(W, A, strength * B)


class Case:
    """One kind of layer in one precision."""

    def __init__(self, kind: str, dtype: torch.dtype) -> None:
        self.kind, self.dtype = kind, dtype
        self.tolerance = contract.TOLERANCE[dtype] * (1 if kind in PLAIN else 4)
        self.slices = SLICES if kind.startswith("slices") else {}
        self.target = {"target_slices": {"layer": SLICES}, "target_modules": []} if self.slices else {}
        self.config = self.configured()

    def __str__(self) -> str:
        return f"{self.kind}-{str(self.dtype).removeprefix('torch.')}"

    def configured(self, **options: Any) -> LoRAConfig:
        return LoRAConfig(**SPEC | {"target_modules": ["layer"]} | self.target | options)

    def base(self) -> Holder:
        return (MORE[self.kind]() if self.kind in MORE else Holder(contract.KINDS[self.kind].build())).to(self.dtype)

    def trained(self, rng: torch.Generator, **options: Any) -> Holder:
        model = self.base()
        attach(model, self.configured(**options))
        train(model, rng)
        return model

    def inputs(self, rng: torch.Generator) -> Tensor:
        if self.kind in PLAIN:
            return contract.Case(self.kind, self.dtype).inputs(rng)
        return torch.randn(5, 6, FEATURES, generator=rng).to(self.dtype)

    def sites(self, model: Holder) -> sliced.Sites:
        """Return the weight and the rows that each adapter changes."""
        names, found = model.state_dict().keys(), {}
        for name in AdaptedModel(model).adapters:
            layer, _, last = name.rpartition(".")
            candidates = name, f"{name}.weight", f"{layer}.in_proj_weight", f"{layer}.weight"
            rows = sliced.rows_of(self.slices[last]) if last in self.slices else slice(None)
            found[name] = next(stored for stored in candidates if stored in names), rows
        return found

    def rows(self, model: Holder) -> Mapping[str, Tensor]:
        """Return what each adapter changes of the base as ``(out, in)``."""
        base, state = self.base(), model.state_dict()
        sites = self.sites(model).items()
        layers = {stored: base.get_submodule(stored.rpartition(".")[0]) for _, (stored, _) in sites}
        return {name: as_matrix(layers[stored], state[stored].double()).clone()[rows] for name, (stored, rows) in sites}

    def weights(
        self, model: Holder, factors: sliced.Factors | None = None, update: Callable[..., Tensor] = rescaled
    ) -> dict[str, Tensor]:
        base = self.base().double()
        return dense_weights(base, model, self.sites(model), factors or factors_of(model), update)

    def dense(self, model: Holder, x: Tensor, *args: Any) -> Tensor:
        inputs = x.double() if x.is_floating_point() else x
        return functional_call(self.base().double(), self.weights(model, *args), inputs)


CASES = [Case(kind, dtype) for kind in (*PLAIN, *MORE) for dtype in contract.TOLERANCE]
each_case = pytest.mark.parametrize("case", CASES, ids=str)
each_double = pytest.mark.parametrize("case", [case for case in CASES if case.dtype == torch.float64], ids=str)
pytestmark = pytest.mark.filterwarnings("ignore:These adapters are not smaller.*")


@torch.no_grad()
def train(model: nn.Module, rng: torch.Generator) -> None:
    contract.train_all(model, rng)
    for adapter in AdaptedModel(model).adapters.values():
        adapter.magnitude.mul_(1 + 0.3 * torch.randn(adapter.magnitude.shape, generator=rng))


@each_case
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("grad_mode", GRAD_MODES)
def test_attach_and_detach_keep_every_bit(case: Case, training: bool, grad_mode, rng):
    model, x = case.base().train(training), case.inputs(rng)
    # Without gradients torch projects batches with other bits when no weight is to be trained, as after attaching.
    model.requires_grad_(grad_mode is nullcontext)
    before, state = contract.snapshot(model), copy.deepcopy(model.state_dict())
    with grad_mode():
        output = model(x)
    attach(model, case.config)
    with grad_mode():
        assert torch.equal(model(x), output)
    with merged(model):
        assert_same_bits({name: model.state_dict()[name] for name in before["keys"]}, state)
    train(model, rng)
    model(x).sum().backward()
    detach(model)
    assert_unchanged(model, before)


@each_case
def test_forward_matches_rescaled_weight_in_every_mode(case: Case, rng):
    model, x = case.trained(rng), case.inputs(rng)
    truth, plain = case.dense(model, x), case.dense(model, x, None, lambda W, A, B, magnitude: plus_low_rank(W, A, B))
    assert error(plain, truth) > 0.05
    for training, grad_mode in product((True, False), GRAD_MODES):
        model.train(training)
        with grad_mode():
            found = model(x)
        assert found.dtype == case.dtype
        assert error(found, truth) <= case.tolerance


@each_case
def test_gradients_match_rescaled_weight_with_fixed_norm(case: Case, rng):
    model, x = case.trained(rng), case.inputs(rng)
    factors, twin = factors_of(model), x.double() if x.is_floating_point() else x
    if x.is_floating_point():
        x.requires_grad_()
        twin.requires_grad_()
    truth = case.dense(model, twin, factors)
    cotangent = torch.randn(truth.shape, generator=rng).to(case.dtype)
    truth.backward(cotangent.double())
    model(x).backward(cotangent)
    if x.is_floating_point():
        assert error(x.grad, twin.grad) <= case.tolerance
    for name, adapter in AdaptedModel(model).adapters.items():
        assert [key for key, _ in adapter.named_parameters()] == ["A", "B", "magnitude"]
        for key, factor in adapter.named_parameters():
            assert error(factor.grad, factors[name][key].grad) <= case.tolerance, (name, key)
    assert all((p.grad is not None) == p.requires_grad == (".lora." in name) for name, p in model.named_parameters())


@each_case
def test_merged_rows_have_magnitude_as_norm(case: Case, rng):
    model, x = case.trained(rng), case.inputs(rng)
    before, truth, weights = contract.snapshot(model), case.dense(model, x), case.weights(model)
    with merged(model):
        assert error(model(x), truth) <= case.tolerance
        rows = case.rows(model)
    assert_unchanged(model, before)
    for name, adapter in AdaptedModel(model).adapters.items():
        assert error(rows[name].square().sum(1).sqrt(), adapter.magnitude) <= case.tolerance
    merge(model)
    assert type(model.layer) is type(case.base().layer)
    assert error(model(x), truth) <= case.tolerance
    for name, tensor in model.state_dict().items():
        assert tensor.ndim == 1 or error(tensor, weights[name]) <= case.tolerance


@pytest.mark.parametrize("dtype", contract.TOLERANCE)
def test_norms_are_exact_where_update_cancels_weight(dtype: torch.dtype, rng):
    case, left, right = Case("linear", dtype), torch.randn(20, 4, generator=rng), torch.randn(4, 24, generator=rng)
    model, x = case.base(), case.inputs(rng)
    with torch.no_grad():
        model.layer.weight.copy_(left @ right)
        attach(model, case.config)
        model.layer.lora.A.copy_(right)
        model.layer.lora.B.copy_(-0.95 / SCALING * left)
    truth = case.dense(model, x)
    assert error(model(x), truth) <= 40 * case.tolerance  # a rounding error of the base counts twenty times
    with merged(model):
        assert error(model(x), truth) <= 40 * case.tolerance


@each_case
def test_magnitude_equal_to_norm_is_plain_lora(case: Case, rng):
    model, lora, x = case.trained(rng), case.base(), case.inputs(rng)
    lora.load_state_dict({name: model.state_dict()[name] for name in lora.state_dict()})
    attach(lora, case.configured(use_dora=False))
    with torch.no_grad():
        for (name, adapter), plain in zip(
            AdaptedModel(model).adapters.items(), AdaptedModel(lora).adapters.values(), strict=True
        ):
            plain.A.copy_(adapter.A)
            plain.B.copy_(adapter.B)
            adapter.magnitude.copy_(
                plus_low_rank(case.rows(model)[name], plain.A.double(), plain.B.double()).norm(dim=1)
            )
    assert error(model(x), lora(x)) <= case.tolerance


@each_case
def test_state_round_trip_includes_magnitudes(case: Case, rng):
    model, x = case.trained(rng), case.inputs(rng)
    state, output = adapter_state_dict(model), model(x)
    for name, W in case.rows(model).items():
        assert AdaptedModel(model).adapters[name].magnitude.shape == (len(W),)
    places = [f".{name}" for name in SLICES] if case.slices else [""]
    if case.slices or case.kind in PLAIN:
        assert list(state) == [f"layer.lora{place}.{key}" for place in places for key in ("A", "B", "magnitude")]
    fresh = case.base()
    fresh.load_state_dict({name: model.state_dict()[name] for name in fresh.state_dict()})
    attach(fresh, case.config, seed=9)
    load_adapter_state_dict(fresh, state)
    assert torch.equal(fresh(x), output)
    assert_same_bits(adapter_state_dict(fresh), state)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(x), output)


HAS_DROPOUT = ["linear", "linear without bias", "own forward", "conv1d", "convolution 1d", "convolution 2d"]
HAS_DROPOUT += ["convolution 3d", "slices of linear", "slices of own forward", "slices of conv1d"]


@pytest.mark.parametrize("case", [Case(kind, torch.float64) for kind in HAS_DROPOUT], ids=str)
def test_dropout_drops_adapter_input_only(case: Case, rng):
    """Where the input has one number that is not zero, the update is either missing or counts twice."""
    model, inputs = case.trained(rng, dropout=0.5), case.inputs(rng)
    shape = inputs.shape[1:] if case.kind.startswith("convolution") else inputs.shape[2:]
    x = torch.zeros(64, shape.numel(), dtype=torch.float64)
    x[range(64), torch.randint(shape.numel(), (64,), generator=rng)] = 1.0
    x = x.view(64, *shape)
    output, absent, twice = model(x), *(case.dense(model, x, None, partial(rescaled, strength=s)) for s in (0.0, 2.0))
    for _, rows in case.sites(model).values():
        is_absent, is_twice = ((output - t)[:, rows].flatten(1).abs().amax(1) < 1e-10 for t in (absent, twice))
        assert (is_absent | is_twice).all()
        assert (is_absent & ~is_twice).any()
        assert (is_twice & ~is_absent).any()
    assert error(model.eval()(x), case.dense(model, x)) <= case.tolerance


HAS_BIAS = [kind for kind in HAS_DROPOUT if kind != "linear without bias"]


@pytest.mark.parametrize("case", [Case(k, dtype) for k in HAS_BIAS for dtype in contract.TOLERANCE], ids=str)
def test_lora_bias_is_not_rescaled(case: Case, rng):
    model, x = case.trained(rng, lora_bias=True), case.inputs(rng)
    weights = case.weights(model)
    bias = weights["layer.bias"] = weights["layer.bias"].clone()
    for name, (_, rows) in case.sites(model).items():
        c = AdaptedModel(model).adapters[name].bias
        assert c.count_nonzero() == 0
        bias[rows] += SCALING * nn.init.normal_(c, generator=rng).detach().double()
    truth = functional_call(case.base().double(), weights, x.double())
    assert error(model(x), truth) <= case.tolerance
    merge(model)
    assert error(model(x), truth) <= case.tolerance
    assert error(model.layer.bias, bias) <= case.tolerance


@each_double
def test_zero_rows_stay_finite(case: Case, rng):
    model, x = case.base(), case.inputs(rng)
    for name, W in model.layer.named_parameters():
        if W.ndim > 1:
            layer = model.get_submodule(f"layer.{name}".rpartition(".")[0])
            nn.init.zeros_(as_matrix(layer, W.data)[1])
    output, state = model(x), copy.deepcopy(model.state_dict())
    attach(model, case.config)
    assert torch.equal(model(x), output)
    model(x).square().sum().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)
    merge(model)
    assert_same_bits(model.state_dict(), state)


def test_subclass_that_scales_output_merges_exactly_or_refuses(rng):
    model, x = Holder(ScaledLinear(FEATURES, 12)), torch.randn(3, FEATURES, generator=rng)
    attach(model, LoRAConfig(**SPEC, target_modules=["layer"]))
    train(model, rng)
    output = model(x)
    with suppress(RuntimeError):
        merge(model)
    assert error(model(x), output) <= 1e-5


def quantized() -> nn.Module:
    layer = nn.Linear(8, 8)
    layer.weight = nn.Parameter(torch.ones(8, 8, dtype=torch.int8), requires_grad=False)
    return layer


REFUSED: Mapping[str, tuple[Callable[[], nn.Module], str]] = {
    "transposed 1d": (lambda: nn.ConvTranspose1d(8, 12, 3), "layer"),
    "transposed 2d": (lambda: nn.ConvTranspose2d(8, 12, 3), "layer"),
    "transposed 3d": (lambda: nn.ConvTranspose3d(8, 12, 3), "layer"),
    "bag": (lambda: nn.EmbeddingBag(20, 6), "layer"),
    "experts": (lambda: nn.ParameterDict({"up": torch.randn(3, 6, 8)}), "layer.up"),
    "quantized": (quantized, "layer"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_layer_without_output_rows_refused(kind: str):
    build, name = REFUSED[kind]
    model = nn.ModuleDict({"layer": build(), "other": nn.Linear(16, 16)})
    where = "target_parameters" if kind == "experts" else "target_modules"
    config = LoRAConfig(**{"rank": 2, "use_dora": True, "target_modules": ["other"]} | {where: [name]})
    with raises_and_changes_nothing(model, ValueError, rf"{where}='{name}'.*use_dora"):
        attach(model, config)


def test_meta_weight_refused():
    model = nn.ModuleDict({"layer": nn.Linear(8, 8, device="meta"), "other": nn.Linear(8, 8)})
    with pytest.raises(ValueError, match=r"target_modules='layer'.*use_dora.*meta"):
        attach(model, LoRAConfig(rank=2, use_dora=True, target_modules=["layer", "other"]))
    assert {type(layer) for layer in model.values()} == {nn.Linear}
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_states_with_and_without_dora_do_not_mix():
    models = [Holder(nn.Linear(24, 20)) for _ in range(2)]
    for model, use_dora in zip(models, (True, False), strict=True):
        attach(model, LoRAConfig(rank=2, target_modules=["layer"], use_dora=use_dora))
    for model, other in (models, reversed(models)):
        with raises_and_changes_nothing(model, ValueError, "layer.lora.magnitude"):
            load_adapter_state_dict(model, adapter_state_dict(other))


@pytest.fixture
def parity() -> Any:
    """PEFT, and what the tests against it share."""
    from tests import test_peft_parity

    return test_peft_parity


def pair(base: Holder, rng: torch.Generator, parity: Any, **options: Any) -> tuple[Holder, Holder]:
    """Return two adapted copies of a base, ours and PEFT's, with the same trained factors and magnitudes."""
    fan = {"fan_in_fan_out": True} if type(base.layer).__name__ == "Conv1D" else {}
    peft_options = {"r": contract.RANK, "lora_alpha": contract.ALPHA, "use_dora": True, "target_modules": ["layer"]}
    ours, theirs = copy.deepcopy(base), copy.deepcopy(base)
    theirs = parity.peft.inject_adapter_in_model(parity.peft.LoraConfig(**peft_options | fan | options), theirs)
    attach(ours, LoRAConfig(**SPEC, target_modules=["layer"]))
    assert error(of_peft(theirs.layer, parity)[2].view(-1), ours.layer.lora.magnitude) <= parity.CLOSE
    train(ours, rng)
    with torch.no_grad():
        for its, mine in zip(of_peft(theirs.layer, parity), ours.layer.lora.parameters(), strict=True):
            its.copy_(mine.view_as(its))
    return ours, theirs


def of_peft(layer: Any, parity: Any) -> tuple[Tensor, ...]:
    return *parity.peft_factors(layer), layer.lora_magnitude_vector["default"].weight


PARITY: Mapping[str, Callable[[], nn.Module]] = {
    **{kind: contract.KINDS[kind].build for kind in PLAIN[:6] if kind != "own forward"},
    "convolution 1d": lambda: nn.Conv1d(8, 12, 3, stride=2, padding=1),
    "convolution 2d": lambda: nn.Conv2d(8, 12, (3, 2), padding=1),
    "convolution 3d": lambda: nn.Conv3d(8, 12, (2, 2, 3), padding=(0, 0, 1)),
}


@pytest.mark.parametrize("kind", PARITY)
def test_forward_gradients_and_merge_match_peft(kind: str, parity, rng):
    ours, theirs = pair(Holder(PARITY[kind]()), rng, parity)
    x = Case(kind, torch.float32).inputs(rng)
    outputs = ours(x), theirs(x)
    assert error(*outputs) <= parity.CLOSE
    cotangent = torch.randn(outputs[0].shape, generator=rng)
    for output in outputs:
        output.backward(cotangent)
    for mine, its in zip(ours.layer.lora.parameters(), of_peft(theirs.layer, parity), strict=True):
        assert error(mine.grad, its.grad.view_as(mine)) <= parity.CLOSE
    merge(ours)
    theirs.layer.merge()
    assert error(ours.layer.weight, theirs.layer.get_base_layer().weight) <= parity.CLOSE


@pytest.mark.parametrize("kind", ["convolution 1d", "convolution 3d"])
def test_dense_reference_holds_where_peft_crashes(kind: str, parity, rng):
    """PEFT's branch has no dilation, and merging takes every kernel (1, 1, n) for one of two dimensions."""
    case = Case(kind, torch.float32)
    ours, theirs = pair(case.base(), rng, parity)
    x = case.inputs(rng)
    with pytest.raises(RuntimeError, match="must match the size"):
        _ = theirs(x), theirs.layer.merge()
    assert error(ours(x), case.dense(ours, x)) <= case.tolerance


def test_dropout_spares_base_unlike_peft(parity, rng):
    case = Case("linear", torch.float32)
    ours, theirs = pair(case.base(), rng, parity, lora_dropout=0.5)
    x = torch.eye(24)
    for strength in (0.0, 2.0):
        truth = case.dense(ours, x, None, partial(rescaled, strength=strength))
        assert ((theirs.train()(x) - truth).abs().amax(1) > 1e-3).all()
    assert error(theirs.eval()(x), ours(x)) <= parity.CLOSE


@pytest.mark.parametrize(
    ("layer", "shape"),
    [(nn.Linear(6, 5), (4, 3, 6)), (nn.Conv2d(6, 5, 3), (4, 6, 7, 7))],
    ids=["linear", "convolution"],
)
def test_trained_bias_gets_output_gradient(layer: nn.Module, shape: tuple[int, ...]):
    model = nn.Sequential(copy.deepcopy(layer)).double()
    attach(model, LoRAConfig(rank=2, use_dora=True, bias="lora_only", target_modules=["0"]))
    with torch.no_grad():
        for parameter in model[0].lora.parameters():
            parameter.add_(torch.rand_like(parameter))
    output = model(torch.randn(shape, dtype=torch.float64))
    weights = torch.randn_like(output)
    (output * weights).sum().backward()
    features = 1 if isinstance(layer, nn.Conv2d) else -1
    torch.testing.assert_close(model[0].bias.grad, weights.movedim(features, 0).flatten(1).sum(1))


@pytest.mark.parametrize("kind", [nn.Linear, lambda n, _: nn.MultiheadAttention(n, 2)], ids=["linear", "attention"])
def test_norms_stay_float32_under_autocast(kind, rng):
    model = nn.Sequential(kind(16, 16))
    attach(model, LoRAConfig(rank=2, use_dora=True, target_modules=["0"]))
    contract.train_all(model, rng)
    [adapter, *_] = AdaptedModel(model).adapters.values()
    weight = base_parameter(model[0], adapter.parameter)
    expected = (weight.double() + adapter.spec.scaling * adapter.B.double() @ adapter.A.double()).norm(dim=1)
    with torch.autocast("cpu", torch.bfloat16):
        norms = adapter.row_norms(weight)
    torch.testing.assert_close(norms.double(), expected.detach(), rtol=1e-5, atol=0)
