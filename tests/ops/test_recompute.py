"""Weights that hold their update are formed again for backward, and not kept: same gradients, nothing stale."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, jvp, vmap
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.checkpoint import checkpoint

from lightning_lora import LoRAConfig, attach, lora_layers
from lightning_lora.adapted_model import AdaptedModel
from lightning_lora.layers import weight
from lightning_lora.ops import recompute as recomputed
from tests.contract import train_all

pytestmark = pytest.mark.skipif(
    not hasattr(torch._C._autograd, "_top_saved_tensors_default_hooks"),
    reason="this torch, such as 2.7, cannot say whose hooks are set, so weights are kept",
)
E, T = 8, 5


class First(nn.Module):
    """A layer that returns several tensors, of which the first counts."""

    def __init__(self, layer: nn.Module, times: int = 1) -> None:
        super().__init__()
        self.layer, self.times = layer, times

    def forward(self, x: Tensor) -> Tensor:
        output = self.layer(*[x] * self.times)
        return output[0] if isinstance(output, tuple) else output


class Experts(nn.Module):
    """A stack of experts whose weights are read one by one."""

    is_transposed = False

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(3, 4, E))

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([torch.tanh(x @ self.part(expert)) for expert in range(3)])

    def part(self, expert: int) -> Tensor:
        return self.up[expert].T


class TransposedExperts(Experts):
    is_transposed = True

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(3, E, 4))

    def part(self, expert: int) -> Tensor:
        return self.up[expert]


class Bag(nn.Module):
    """A bag of embeddings with a weight for every token, whose gradient needs the vectors."""

    def __init__(self) -> None:
        super().__init__()
        self.bag = nn.EmbeddingBag(20, 6, mode="sum")

    def forward(self, x: Tensor) -> Tensor:
        return self.bag(torch.arange(x.numel()).view(-1, E) % 20, per_sample_weights=x.reshape(-1, E))


class Steps(nn.Module):
    """A cell that reads its weights at every step."""

    def __init__(self, cell: nn.Module) -> None:
        super().__init__()
        self.layer = cell

    def forward(self, x: Tensor) -> Tensor:
        state = None
        for step in x:
            state = self.layer(step, state)
        return state[0] if isinstance(state, tuple) else state


NAMED = {"target_modules": ["layer"]}
ALL = {"target_modules": "all-linear"}
STACK = {"target_modules": [], "target_parameters": ["layer.up"]}
SLICES = {"target_modules": [], "target_slices": {"layer": {"q": f"0:{E}", "v": f"-{E}:"}}}
CASES: dict[str, tuple[Callable[[], nn.Module], dict[str, Any]]] = {
    "attention": (lambda: First(nn.MultiheadAttention(E, 2), 3), NAMED),
    "slices of attention": (lambda: First(nn.MultiheadAttention(E, 2), 3), SLICES),
    "LSTM": (lambda: First(nn.LSTM(E, 6, 2, bidirectional=True)), NAMED),
    "GRU": (lambda: First(nn.GRU(E, 6)), NAMED),
    "LSTM cell": (lambda: Steps(nn.LSTMCell(E, 6)), NAMED),
    "bilinear": (lambda: First(nn.Bilinear(E, E, 6), 2), NAMED),
    "experts": (lambda: First(Experts()), STACK),
    "transposed experts": (lambda: First(TransposedExperts()), STACK),
    "bag of embeddings": (lambda: First(Bag()), {"target_modules": ["bag"]}),
    "encoder layer": (
        lambda: First(nn.TransformerEncoderLayer(E, 2, 12, dropout=0.0)),
        {"target_modules": "all-linear"},
    ),
}
each = pytest.mark.parametrize("case", CASES)


def build(case: str, dtype: torch.dtype = torch.float64) -> tuple[nn.Module, nn.Module, Tensor]:
    """Return the base, an adapted copy as if it had been trained, and an input that needs a gradient."""
    make, options = CASES[case]
    base = make().to(dtype)
    model = copy.deepcopy(base)
    attach(model, LoRAConfig(rank=2, alpha=3.0, **options))
    train_all(model, torch.Generator().manual_seed(3))
    return base.requires_grad_(False), model, torch.randn(T, 3, E, dtype=dtype).requires_grad_()


def factors(model: nn.Module) -> list[Tensor]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def dense(base: nn.Module, model: nn.Module) -> Callable[[Tensor], Tensor]:
    """Return the base with sums for weights, as functions of the model's factors."""

    def run(x: Tensor) -> Tensor:
        weights = dict(base.named_parameters())
        for name, adapter in AdaptedModel(model).adapters.items():
            own = [
                key for key in (name, f"{name}.weight", f"{name.rpartition('.')[0]}.in_proj_weight") if key in weights
            ]
            delta = 1.5 * adapter.B @ adapter.A
            delta = delta.mT if getattr(base.layer, "is_transposed", False) else delta
            if adapter.spec.rows:
                delta = torch.zeros_like(weights[own[0]]).index_add(0, adapter.index, delta)
            weights[own[0]] = weights[own[0]] + delta.reshape(weights[own[0]].shape)
        return functional_call(base, weights, (x,))

    return run


def gradients(run: Callable[[Tensor], Tensor], model: nn.Module, x: Tensor) -> list[Tensor]:
    y = run(x)
    cotangent = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y).cos()
    return [y.detach(), *torch.autograd.grad(y, [x, *factors(model)], cotangent)]


def assert_near(found: list[Tensor], expected: list[Tensor], tolerance: float = 1e-12) -> None:
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[StorageWeakRef]:
    """The memory of every weight that was formed."""
    seen: list[StorageWeakRef] = []
    formed = weight._formed

    def watched(*args: Any) -> Tensor:
        found = formed(*args)
        seen.append(StorageWeakRef(found.untyped_storage()))
        return found

    monkeypatch.setattr(weight, "_formed", watched)
    return seen


@each
def test_gradients_match_dense_weights(case, made):
    base, model, x = build(case)
    found = gradients(model, model, x)
    assert_near(found, gradients(dense(base, model), model, x))
    weights = 1 if case.startswith("slices") else len(AdaptedModel(model).adapters)
    calls = T if case == "LSTM cell" else 1
    assert len(made) == weights * (calls + 1)  # once for each call and once for backward, however often it was read


@each
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_keeps_no_more_than_trained_weight(case, dtype, made):
    base, model, x = build(case, dtype)
    assert new_bytes(model, x) == new_bytes(trained(base, model), x)
    y = model(x)
    assert made
    assert all(memory.expired() for memory in made)
    y.float().sum().backward(retain_graph=True)
    assert all(memory.expired() for memory in made)


def trained(base: nn.Module, model: nn.Module) -> nn.Module:
    """Return the base with those weights trained in full that the model adapts: torch keeps the inputs for them."""
    for name, layer in lora_layers(model).items():
        for parameter in layer.adapted_parameters():
            base.get_submodule(name)._parameters[parameter].requires_grad_()
    return base


class Mixed(nn.Module):
    """A layer that reads its weight twice."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Parameter(torch.randn(E, E))

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.tanh(x @ self.mix) @ self.mix


def test_backward_holds_one_weight_at_a_time(made, monkeypatch):
    model = nn.Sequential(*(Mixed() for _ in range(4))).double()
    attach(model, LoRAConfig(rank=2, target_modules=[], target_parameters=["*.mix"]))
    there, formed = [], weight._formed
    monkeypatch.setattr(
        weight, "_formed", lambda *args: (there.append(sum(not each.expired() for each in made)), formed(*args))[1]
    )
    y = model(torch.randn(T, E, dtype=torch.float64).requires_grad_())
    there.clear()
    y.sum().backward(retain_graph=True)
    assert there == [0] * 4


def new_bytes(model: nn.Module, x: Tensor) -> int:
    """Return the bytes that are kept for backward and belong to neither the model nor the input, each memory once."""
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        model(x)
    known = {t.untyped_storage().data_ptr() for t in [x, *model.parameters(), *model.buffers()]}
    new = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in kept}
    return sum(size for where, size in new.items() if where not in known)


@pytest.mark.parametrize("case", ["attention", "bilinear", "transposed experts", "LSTM cell"])
def test_gradcheck_and_gradgradcheck(case):
    _, model, x = build(case)
    x = x[:2, :1].detach().clone().requires_grad_()
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad][:2]
    inputs = [x, *(model.get_parameter(name) for name in names)]

    def run(x: Tensor, *_: Tensor) -> Tensor:  # the factors are the model's own, changed in place
        return model(x)

    assert torch.autograd.gradcheck(run, inputs, fast_mode=True)
    assert torch.autograd.gradgradcheck(run, inputs, fast_mode=True)


@each
def test_graph_can_be_retained(case):
    _, model, x = build(case)
    y = model(x)
    first = torch.autograd.grad(y.sum(), [x, *factors(model)], retain_graph=True)
    again = torch.autograd.grad(y.sum(), [x, *factors(model)])
    assert_near(list(first), list(again), 0.0)
    with pytest.raises(RuntimeError, match="second time"):
        y.sum().backward()


@pytest.mark.parametrize("case", ["attention", "LSTM", "experts"])
@pytest.mark.parametrize("which", ["A", "B", "weight", "input"])
def test_change_before_backward_raises(case, which):
    _, model, x = build(case)
    read = x * 1.0
    y = model(read)
    adapter = next(iter(AdaptedModel(model).adapters.values()))
    frozen = next(p for p in model.layer.parameters() if not p.requires_grad and p.ndim > 1)
    with torch.no_grad():
        {"A": adapter.A, "B": adapter.B, "weight": frozen, "input": read}[which].mul_(2.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_replaced_weight_is_ignored_in_backward():
    base, model, x = build("bilinear")
    y, truth = model(x), gradients(dense(base, model), model, x)
    model.layer.weight_before = model.layer._parameters["weight"].detach()
    model.layer._parameters["weight"].data = torch.zeros(
        6, E, E, dtype=x.dtype
    )  # as who swaps weights for a while does
    cotangent = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y).cos()
    assert_near(list(torch.autograd.grad(y, x, cotangent)), truth[1:2])


def test_partial_backward_releases_weights(made):
    _, model, x = build("experts")
    parts = model(x)
    parts[0].sum().backward(retain_graph=True)  # the other two experts never ask
    assert all(memory.expired() for memory in made)


def summed(layer: nn.Module) -> Tensor:
    [adapter] = AdaptedModel(layer).adapters.values()
    return layer._parameters["up"] + 1.5 * adapter.B @ adapter.A


class Changes(Experts):
    """A layer that changes the weight that it reads."""

    def forward(self, x: Tensor) -> Tensor:
        first = x @ self.up[0].T
        read = self.up
        if read.grad_fn is not None:  # not the frozen one itself
            torch.flatten(read).mul_(2.0)
        return first + x @ read[1].T + x @ self.up[2].T


def test_changed_weight_is_formed_anew():
    model = First(Changes()).double()
    attach(model, LoRAConfig(rank=2, alpha=3.0, **STACK))
    train_all(model, torch.Generator().manual_seed(3))
    x = torch.randn(T, E, dtype=torch.float64).requires_grad_()

    def truth(x: Tensor) -> Tensor:
        up = summed(model.layer)
        return x @ up[0].T + 2.0 * x @ up[1].T + x @ up[2].T

    assert_near(gradients(model, model, x), gradients(truth, model, x))


# --- with the hooks of others


class Checkpointed(Experts):
    """A layer that reads its weight before, in and after a part that runs again in backward."""

    def __init__(self, use_reentrant: bool) -> None:
        super().__init__()
        self.use_reentrant = use_reentrant

    def forward(self, x: Tensor) -> Tensor:
        before = x @ self.part(0)
        inside = checkpoint(lambda x: torch.tanh(x @ self.part(1)), x, use_reentrant=self.use_reentrant)
        return torch.tanh(before) + inside + x @ self.part(2)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_part_of_layer_checkpointed(use_reentrant):
    model = First(Checkpointed(use_reentrant)).double()
    attach(model, LoRAConfig(rank=2, alpha=3.0, **STACK))
    train_all(model, torch.Generator().manual_seed(3))
    x = torch.randn(T, E, dtype=torch.float64).requires_grad_()

    def run(x: Tensor) -> list[Tensor]:
        model.zero_grad()
        x.grad = None
        y = model(x)
        y.square().sum().backward()
        return [y.detach(), x.grad, *(factor.grad for factor in factors(model))]

    def truth(x: Tensor) -> Tensor:
        up = summed(model.layer)
        return torch.tanh(x @ up[0].T) + torch.tanh(x @ up[1].T) + x @ up[2].T

    y = truth(x)
    expected = [y.detach(), *torch.autograd.grad(y.square().sum(), [x, *factors(model)])]
    assert_near(run(x), expected)


@each
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_layer_checkpointed(case, use_reentrant):
    base, model, x = build(case)
    expected = gradients(dense(base, model), model, x)
    y = checkpoint(model, x, use_reentrant=use_reentrant)
    y.backward(torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y).cos())
    assert_near([y.detach(), x.grad, *(factor.grad for factor in factors(model))], expected)


@each
def test_outer_hooks_get_all_but_weights(case):
    base, model, x = build(case)
    seen: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: seen.append(t) or t.numpy().copy(), torch.from_numpy):
        found = gradients(model, model, x)
    assert_near(found, gradients(dense(base, model), model, x))
    shapes = {tuple(a.B.shape[:-1]) + tuple(a.A.shape[-1:]) for a in AdaptedModel(model).adapters.values()}
    own = {t.untyped_storage().data_ptr() for t in model.parameters()}
    assert not [t for t in seen if t.shape in shapes and t.numel() > 200 and t.untyped_storage().data_ptr() not in own]


def test_weight_is_kept_if_hooks_are_disabled(made):
    base, model, x = build("bilinear")
    with torch.autograd.graph.disable_saved_tensors_hooks("not here"):
        found = gradients(model, model, x)
    assert len(made) == 1
    assert_near(found, gradients(dense(base, model), model, x))


@pytest.mark.usual_paths
def test_small_weight_is_kept(made):
    base, model, x = build("bilinear")
    found = gradients(model, model, x)
    assert len(made) == 1
    assert_near(found, gradients(dense(base, model), model, x))
    assert model.layer.weight.numel() < recomputed._FEW


# --- where it steps aside


def per_sample(run: Callable[..., Tensor], A: Tensor, x: Tensor) -> Tensor:
    return vmap(grad(lambda A, x: run(A, x[:, None]).square().sum()), (None, 1))(A, x)


TRANSFORMS: dict[str, Callable[..., Tensor]] = {
    "vmap": lambda run, A, x: vmap(lambda x: run(A, x[:, None]), 1)(x),
    "per-sample gradients": per_sample,
    "jvp": lambda run, A, x: jvp(lambda A: run(A, x), (A,), (torch.ones_like(A),))[1],
}


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("case", ["attention", "bilinear", "experts"])
@pytest.mark.filterwarnings("ignore:There is a performance drop", "ignore:`torch.jit.script` is deprecated")
def test_transforms_match_dense_weights(transform, case, monkeypatch):
    monkeypatch.setattr(recomputed, "_Recipe", None)
    base, model, x = build(case)
    name, A = next((name, p.detach()) for name, p in model.named_parameters() if name.endswith("A"))

    def lora(A: Tensor, x: Tensor) -> Tensor:
        return functional_call(model, {name: A}, (x,))

    def truth(A: Tensor, x: Tensor) -> Tensor:
        adapter = model.get_submodule(name.removesuffix(".A"))
        before = adapter._parameters["A"]
        adapter._parameters["A"] = A
        try:
            return dense(base, model)(x)
        finally:
            adapter._parameters["A"] = before

    assert_near([TRANSFORMS[transform](lora, A, x.detach())], [TRANSFORMS[transform](truth, A, x.detach())])


def test_computed_factors_pass_gradients_on():
    base, model, x = build("attention")
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    roots = {name: (model.get_parameter(name).detach() / 2.0).requires_grad_() for name in names}
    y = functional_call(model, {name: 2.0 * root for name, root in roots.items()}, (x,))
    found = torch.autograd.grad(y.cos().sum(), [*roots.values()])
    expected = torch.autograd.grad(dense(base, model)(x).cos().sum(), [model.get_parameter(name) for name in names])
    assert_near(list(found), [2.0 * each for each in expected])


# --- precision


@pytest.mark.parametrize("case", ["attention", "experts", "LSTM"])
def test_autocast_keeps_no_more_than_trained_weight(case):
    base, model, x = build(case, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        assert new_bytes(model, x) <= new_bytes(trained(base, model), x)


def test_autocast_does_not_round_weight():
    base, model, x = build("bag of embeddings", torch.float32)
    expected = gradients(dense(base, model), model, x)

    def run(x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return model(x)

    assert_near(gradients(run, model, x), expected, 1e-5)


def test_backward_inside_autocast():
    base, model, x = build("bag of embeddings", torch.float32)
    y, expected = model(x), gradients(dense(base, model), model, x)
    with torch.autocast("cpu", torch.bfloat16):
        found = torch.autograd.grad(y, x, torch.linspace(-1, 1, y.numel()).view_as(y).cos())
    assert_near(list(found), expected[1:2], 1e-5)
