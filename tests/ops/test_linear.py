"""The LoRA linear as one operation: the fast path is the composition, keeps less, and steps aside where it must."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call, grad, jvp, vmap
from torch.utils.checkpoint import checkpoint

from lightning_lora import LoRAConfig, attach
from lightning_lora.ops import linear as ops
from lightning_lora.ops.dropout import alive, dropped, random_bits
from lightning_lora.ops.linear import lora_add, lora_linear

K, N, R, S = 12, 10, 3, 1.5
SHAPES = [(5, K), (2, 3, K), (2, 1, 3, K), (0, K), (2, 0, K), (1, K)]
Call = Callable[..., Tensor]


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The paths that have been taken."""
    taken: list[str] = []
    is_fast = ops.is_fast

    def recorded(*args: Any) -> bool:
        taken.append("fast" if is_fast(*args) else "composed")
        return taken[-1] == "fast"

    monkeypatch.setattr(ops, "is_fast", recorded)
    return taken


@pytest.fixture
def small_masks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Packed masks for small inputs too, in several parts."""
    monkeypatch.setattr(ops, "_FEW_TO_DROP", 0)
    monkeypatch.setattr(ops, "_AT_ONCE_ON_CPU", 2 * K)


def tensors(*shape: int, dtype: torch.dtype = torch.float64, factors: torch.dtype | None = None) -> list[Tensor]:
    """Return x, W, b, A and B; the weight alone is frozen."""
    rng = torch.Generator().manual_seed(3)
    sizes = [shape or (5, K), (N, K), (N,), (R, K), (N, R)]
    made = [torch.randn(size, generator=rng, dtype=torch.float64).to(dtype) for size in sizes]
    made[3:] = [factor.to(factors or dtype) for factor in made[3:]]
    return [t.requires_grad_(i != 1) for i, t in enumerate(made)]


def dense(x: Tensor, W: Tensor, b: Tensor | None, A: Tensor, B: Tensor, mask: Tensor | float = 1.0) -> Tensor:
    return F.linear(x, W, b) + S * (x * mask) @ A.T @ B.T


def gradients(function: Call, inputs: list[Tensor]) -> list[Tensor]:
    wanted = [t for t in inputs if t.requires_grad]
    y = function(*inputs)
    return [y, *torch.autograd.grad(y, wanted, torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y).cos())]


def seed(value: int) -> None:
    """Seed the CPU alone: thousands of calls of ``torch.manual_seed`` take longer than what the tests compute."""
    torch.default_generator.manual_seed(value)


def lora(*inputs: Tensor, dropout: float = 0.0) -> Tensor:
    return lora_linear(*inputs, scaling=S, dropout=dropout)


def assert_near(found: list[Tensor], expected: list[Tensor], tolerance: float = 1e-12) -> None:
    for one, other in zip(found, expected, strict=True):
        assert one.shape == other.shape
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance, check_dtype=False)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("frozen", [(), (0,), (3,), (4,), (0, 3), (2,), (3, 4)], ids=str)
def test_gradients_match_dense_formula(shape, bias, frozen, runs):
    inputs = tensors(*shape)
    for index in frozen:
        inputs[index].requires_grad_(False)
    if not bias:
        inputs[2] = None
    wanted = [t for t in inputs if t is not None and t.requires_grad]
    found, expected = lora(*inputs), dense(*inputs)
    cotangent = torch.randn_like(expected)
    assert_near([found], [expected])
    assert_near(
        list(torch.autograd.grad(found, wanted, cotangent)), list(torch.autograd.grad(expected, wanted, cotangent))
    )
    assert runs == ["fast"]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gradcheck_and_gradgradcheck(shape, runs):
    inputs = tensors(*shape)
    assert torch.autograd.gradcheck(lora, inputs)
    assert torch.autograd.gradgradcheck(lora, inputs)
    assert set(runs) == {"fast"}


def seeded(dropout: float) -> Call:
    def call(*inputs: Tensor) -> Tensor:
        seed(5)
        return lora(*inputs, dropout=dropout)

    return call


def mask_of(shape: tuple[int, ...], dropout: float) -> Tensor:
    """Return the mask that ``seeded`` uses, read off a layer that shows it."""
    seed(5)
    zeros = torch.zeros(K, K, dtype=torch.float64)
    shown = lora_linear(
        torch.ones(shape).double(), zeros, None, *[torch.eye(K).double()] * 2, scaling=1.0, dropout=dropout
    )
    return shown.detach()


@pytest.mark.usefixtures("small_masks")
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dropout", [0.1, 0.5, 0.9])
def test_backward_uses_mask_of_forward(shape, dropout, runs):
    inputs = tensors(*shape)
    mask = mask_of(shape, dropout)
    assert_near(gradients(seeded(dropout), inputs), gradients(lambda *i: dense(*i, mask=mask), inputs))
    assert torch.autograd.gradcheck(seeded(dropout), inputs)
    assert torch.autograd.gradgradcheck(seeded(dropout), inputs)
    assert set(runs) == {"fast"}


@pytest.mark.parametrize("dropout", [0.1, 0.3, 0.5, 0.9])
def test_random_bits_have_right_frequency(dropout):
    bits = random_bits(torch.empty(4000, 13, dtype=torch.uint8), dropout)
    mask = alive(bits, 100, torch.float32)
    assert mask.shape == (4000, 100)
    assert set(mask.unique().tolist()) == {0.0, 1.0}
    keep, deviation = 1 - dropout, math.sqrt(dropout * (1 - dropout))
    assert abs(mask.mean().item() - keep) < 5 * deviation / math.sqrt(mask.numel()) + 2**-16
    assert (mask.mean(0) - keep).abs().max() < 5 * deviation / math.sqrt(4000)
    correlations = torch.corrcoef(mask.T) - torch.eye(100)
    assert correlations.abs().max() < 6 / math.sqrt(4000)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("width", [96, 100])
def test_dropped_elements_are_zero(width, dtype):
    x = torch.randn(40, 2 * width).to(dtype)[:, ::2]
    bits = random_bits(torch.empty(40, 13, dtype=torch.uint8), 0.3)[:, : (width + 7) // 8]
    assert torch.equal(dropped(x, bits), x * alive(bits, width, dtype))
    assert not dropped(torch.full_like(x, math.nan), torch.zeros_like(bits)).any()  # where a product keeps NaN


@pytest.mark.usefixtures("small_masks")
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointing_replays_mask(use_reentrant, runs):
    inputs = tensors()
    plain = gradients_by_backward(seeded(0.5), inputs)
    again = gradients_by_backward(lambda *i: checkpoint(seeded_once(0.5), *i, use_reentrant=use_reentrant), inputs)
    assert_near(again, plain, 0.0)
    assert runs == ["fast"] * 3


def seeded_once(dropout: float) -> Call:
    """Seed before the checkpoint, not in it."""
    torch.manual_seed(5)
    return lambda *inputs: lora(*inputs, dropout=dropout)


def gradients_by_backward(function: Call, inputs: list[Tensor]) -> list[Tensor]:
    for t in inputs:
        t.grad = None
    y = function(*inputs)
    torch.manual_seed(99)
    y.square().sum().backward()
    return [y.detach(), *(t.grad.clone() for t in inputs if t.requires_grad)]


# --- precision


@pytest.mark.parametrize("factors", [torch.float32, torch.bfloat16])
def test_autocast_matches_composition(factors, runs, monkeypatch):
    inputs = tensors(40, K, dtype=torch.float32, factors=factors)
    truth = gradients(dense, [t.detach().double().requires_grad_(t.requires_grad) for t in inputs])
    with torch.autocast("cpu", torch.bfloat16):
        found = gradients(lora, inputs)
        assert runs == ["fast"]
        base = F.linear(*inputs[:3])
        assert torch.equal(lora(*inputs[:4], torch.zeros_like(inputs[4])), base)
    assert [t.dtype for t in found] == [torch.bfloat16, torch.float32, torch.float32, factors, factors]
    for one, exact in zip(found, truth, strict=True):
        assert (one.double() - exact).abs().max() <= 5 * 2**-9 * exact.abs().max()


def test_backward_inside_autocast(runs):
    inputs = tensors(dtype=torch.float32)
    y = lora(*inputs)
    with torch.autocast("cpu", torch.bfloat16):
        y.sum().backward()
    expected = torch.autograd.grad(dense(*inputs).sum(), inputs[3:])
    assert_near([inputs[3].grad, inputs[4].grad], list(expected), 1e-5)


def test_factors_follow_input_dtype(runs):
    inputs = tensors(40, K, dtype=torch.bfloat16, factors=torch.float32)
    truth = gradients(dense, [t.detach().double().requires_grad_(t.requires_grad) for t in inputs])
    found = gradients(lora, inputs)
    assert [t.dtype for t in found] == [torch.bfloat16] * 3 + [torch.float32] * 2
    for one, exact in zip(found, truth, strict=True):
        assert (one.double() - exact).abs().max() <= 5 * 2**-9 * exact.abs().max()
    assert runs == ["fast"]


def test_dtype_mismatch_of_base_raises():
    x, *others = tensors()
    with pytest.raises(RuntimeError, match="dtype"):
        lora(x.float(), *others)


# --- memory


def saved_by(call: Callable[[], Any]) -> list[Tensor]:
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        call()
    return kept


@pytest.mark.usefixtures("small_masks")
@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("autocast", [False, True])
def test_backward_keeps_input_hidden_and_bits_only(dropout, autocast):
    width, rows = 64, 32
    x, W, b, A, B = (torch.randn(size) for size in [(4, 8, width), (width, width), (width,), (R, width), (width, R)])
    parameters = [A.requires_grad_(), B.requires_grad_(), W]
    x.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16) if autocast else nullcontext():
        kept = saved_by(lambda: [lora(x, W, b, A, B, dropout=dropout) for _ in range(3)])
    known = {t.untyped_storage().data_ptr() for t in [x, *parameters]}
    new = {t.untyped_storage().data_ptr(): t.nbytes for t in kept if t.untyped_storage().data_ptr() not in known}
    element = 2 if autocast else 4
    cast = rows * width * element if autocast else 0  # one for all three
    assert sum(new.values()) == cast + 3 * (rows * R * element + (rows * width // 8 if dropout else 0))
    assert len(kept) == 3 * (6 if dropout else 5)
    where = {t.untyped_storage().data_ptr() for t in kept}
    assert (x.untyped_storage().data_ptr() in where) is not autocast


def test_frozen_A_keeps_no_input(runs):
    x, W, b, A, B = tensors()
    kept = saved_by(lambda: lora(x, W, b, A.requires_grad_(False), B))
    assert x.data_ptr() not in {t.data_ptr() for t in kept}
    y = lora(x, W, b, A, B)
    with pytest.raises(RuntimeError, match=r"second derivative .* frozen lora.A"):
        torch.autograd.grad(y.sum(), B, create_graph=True)
    assert set(runs) == {"fast"}


@pytest.mark.parametrize("index", [0, 1, 3, 4], ids=["x", "W", "A", "B"])
def test_change_before_backward_raises(index):
    inputs = tensors()
    y = lora(*inputs)
    with torch.no_grad():
        inputs[index].add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_output_may_be_changed_in_place():
    inputs = tensors()
    assert_near(gradients(lambda *i: lora(*i).relu_(), inputs), gradients(lambda *i: dense(*i).relu(), inputs))


@pytest.mark.parametrize(
    "view",
    [
        lambda x: x.transpose(0, 1),
        lambda x: x[:, ::2],
        lambda x: x[..., :1].expand(-1, -1, K),
        lambda x: x.flip(-1).movedim(-1, 0).contiguous().movedim(0, -1),
    ],
)
@pytest.mark.parametrize("bias", [True, False])
def test_noncontiguous_inputs(view, bias, runs):
    inputs = tensors(4, 6, K)
    if not bias:
        inputs[2] = None

    def wanted(function: Call) -> list[Tensor]:
        y = function(view(inputs[0]), *inputs[1:])
        return [y, *torch.autograd.grad(y.transpose(0, 1).square().sum(), [inputs[0], *inputs[3:]])]

    assert_near(wanted(lora), wanted(dense))
    zero = torch.zeros_like(inputs[4])
    assert torch.equal(lora(view(inputs[0]), *inputs[1:4], zero), F.linear(view(inputs[0]), *inputs[1:3]))
    assert set(runs) == {"fast"}


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_no_grad_keeps_nothing(mode, dropout, small_masks):
    inputs = tensors()
    with mode():
        kept = saved_by(lambda: lora(*inputs, dropout=dropout))
        y = lora(*inputs)
    assert not kept
    assert_near([y], [dense(*inputs)])
    assert not y.requires_grad
    assert_near(gradients(lora, inputs), gradients(dense, inputs))  # what inference left behind does no harm


# --- added to what a layer has computed in its own way


class Dense(torch.autograd.Function):
    """A layer of unknown make: an autograd function of its own, that keeps nothing of its output."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, W: Tensor) -> Tensor:
        ctx.save_for_backward(W)
        return x.detach() @ W.T

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
        return dy @ ctx.saved_tensors[0], None


def added(is_ours: bool, dropout: float = 0.0) -> Call:
    def call(x: Tensor, W: Tensor, b: Tensor, A: Tensor, B: Tensor) -> Tensor:
        seed(5)
        y = Dense.apply(x, W)
        before, memory = y.clone(), y.data_ptr()
        found = lora_add(y, x, A, B, scaling=S, dropout=dropout, is_ours=is_ours)
        assert (found.data_ptr() == memory) is is_ours
        assert is_ours or torch.equal(y, before)
        return found + b

    return call


@pytest.mark.usefixtures("small_masks")
@pytest.mark.parametrize("shape", SHAPES[:3], ids=str)
@pytest.mark.parametrize("is_ours", [True, False])
@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("frozen", [(), (0,), (3,), (4,)], ids=str)
def test_added_update_gradients_match_dense_formula(shape, is_ours, dropout, frozen, runs):
    inputs = tensors(*shape)
    for index in frozen:
        inputs[index].requires_grad_(False)
    mask = mask_of(shape, dropout) if dropout else 1.0
    assert_near(gradients(added(is_ours, dropout), inputs), gradients(lambda *i: dense(*i, mask=mask), inputs))
    if not frozen:
        assert torch.autograd.gradcheck(added(is_ours, dropout), inputs)
        assert torch.autograd.gradgradcheck(added(is_ours, dropout), inputs)
    assert set(runs) == {"fast"}


@pytest.mark.usefixtures("small_masks")
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_added_update_keeps_input_hidden_and_bits_only(dropout):
    x, W, _, A, B = tensors(32, 64)[:1] + [torch.randn(s).double() for s in [(64, 64), (64,), (R, 64), (64, R)]]
    A.requires_grad_(), B.requires_grad_()
    y = Dense.apply(x, W)
    kept = saved_by(lambda: lora_add(y, x, A, B, scaling=S, dropout=dropout, is_ours=True))
    known = {t.untyped_storage().data_ptr() for t in (x, A, B)}
    new = [t for t in kept if t.untyped_storage().data_ptr() not in known]
    assert sum(t.nbytes for t in new) == 32 * R * 8 + (32 * 64 // 8 if dropout else 0)


@pytest.mark.usefixtures("small_masks")
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointing_replays_mask_of_added_update(use_reentrant):
    inputs = tensors()
    plain = gradients_by_backward(added(True, 0.5), inputs)
    again = gradients_by_backward(lambda *i: checkpoint(added(True, 0.5), *i, use_reentrant=use_reentrant), inputs)
    assert_near(again, plain, 0.0)


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
def test_added_update_keeps_output_dtype(kind):
    x, W, _, A, B = tensors(dtype=torch.float32)
    y = F.linear(x, W).to(kind)
    found = lora_add(y, x, A, B, scaling=S, is_ours=True)
    assert found.dtype == kind
    truth = dense(x.double(), W.double(), None, A.double(), B.double())
    assert (found - truth).abs().max() <= 3 * torch.finfo(kind).eps * truth.abs().max()


def test_update_is_added_in_place_only_to_unheld_output(runs):
    class Holds(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            self.seen = F.linear(x, self._parameters["weight"])
            return self.seen

    class Needs(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return torch.tanh(F.linear(x, self._parameters["weight"]))

    x = torch.randn(4, K)
    for kind in (Holds, Needs, Own):
        layer = layer_of(nn.Sequential(kind(K, N)))[0]
        torch.nn.init.normal_(layer.lora.B)
        frozen = kind(K, N)
        frozen.load_state_dict({name: layer.state_dict()[name] for name in ("weight", "bias")})
        twin = x.clone().requires_grad_()
        truth = frozen(twin) + layer.scaling * twin @ layer.lora.A.detach().T @ layer.lora.B.detach().T
        truth.sum().backward()
        y = layer(mine := x.clone().requires_grad_())
        y.sum().backward()
        torch.testing.assert_close(y, truth, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(mine.grad, twin.grad, rtol=1e-5, atol=1e-5)
        if kind is Holds:
            assert torch.equal(layer.seen, F.linear(x, layer.weight))


@pytest.mark.filterwarnings("ignore:These adapters are not smaller")
@pytest.mark.parametrize("bias", [True, False])
def test_dora_keeps_one_output_sized_tensor(bias):
    width, rows = 64, 128
    model, x = layer_of(nn.Sequential(nn.Linear(width, width, bias=bias)), use_dora=True), torch.randn(rows, width)
    kept = saved_by(lambda: model(x))
    known = {t.untyped_storage().data_ptr() for t in [x, *model.parameters()]}
    new = {t.untyped_storage().data_ptr(): t.nbytes for t in kept if t.untyped_storage().data_ptr() not in known}
    formula = 4 * (rows * width + rows * R)
    assert formula <= sum(new.values()) <= formula + 4 * 3 * width  # ratio, norm and their quotient


# --- where it steps aside


def per_sample(x: Tensor, W: Tensor, b: Tensor, A: Tensor, B: Tensor, function: Call) -> Tensor:
    return vmap(grad(lambda A, x: function(x[None], W, b, A, B).square().sum()), (None, 0))(A, x)


def forward_mode(x: Tensor, W: Tensor, b: Tensor, A: Tensor, B: Tensor, function: Call) -> Tensor:
    with forward_ad.dual_level():
        y = function(forward_ad.make_dual(x.detach(), torch.ones_like(x)), W, b, A, B)
        return forward_ad.unpack_dual(y).tangent


TRANSFORMS: dict[str, Callable[..., Tensor]] = {
    "vmap": lambda x, W, b, A, B, f: vmap(lambda row: f(row[None], W, b, A, B))(x),
    "per-sample gradients": per_sample,
    "jvp": lambda x, W, b, A, B, f: jvp(lambda A: f(x, W, b, A, B), (A,), (torch.ones_like(A),))[1],
    "forward mode": forward_mode,
    "compile": lambda *i: torch.compile(i[-1], backend="aot_eager", fullgraph=True)(*i[:-1]),
    "compile with other factors": lambda x, W, b, A, B, f: torch.compile(f, backend="aot_eager", fullgraph=True)(
        x, W, b, A.float().detach(), B.float().detach()
    ),
    "jit": lambda *i: torch.jit.trace(i[-1], [t.detach() for t in i[:-1]])(*[t.detach() for t in i[:-1]]),
    "one vector": lambda x, W, b, A, B, f: f(x[0], W, b, A, B),
    "no inputs": lambda x, W, b, A, B, f: f(x[:, :0], W[:, :0], b, A[:, :0], B),
    "a subclass": lambda x, W, b, A, B, f: f(x.as_subclass(Marked), W, b, A, B).as_subclass(Tensor),
    "a subclassed factor": lambda x, W, b, A, B, f: f(x, W, b, A.as_subclass(Marked), B).as_subclass(Tensor),
    "a trained weight": lambda x, W, b, A, B, f: torch.autograd.grad(
        f(x, w := W.clone().requires_grad_(), b, A, B).sum(), w
    )[0],
}
STILL_FAST = {"no inputs"}


class Marked(Tensor):
    """A user's kind of tensor."""


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_transforms_use_composition(transform, monkeypatch):
    monkeypatch.setattr(ops._LoRALinear, "apply", None)
    if transform in STILL_FAST:
        monkeypatch.undo()
    inputs = tensors()
    found = TRANSFORMS[transform](*inputs, lora)
    dense_in_double = lambda x, W, b, A, B: dense(x, W, b, A.to(x.dtype), B.to(x.dtype))  # noqa: E731
    assert_near([found], [TRANSFORMS[transform](*inputs, dense_in_double)])


def test_batched_cotangents(runs):
    inputs = tensors()
    many = torch.randn(4, 5, N, dtype=torch.float64)

    def batched(function: Call) -> list[Tensor]:
        y = function(*inputs)
        return list(torch.autograd.grad(y, [inputs[0], *inputs[2:]], many, is_grads_batched=True))

    assert_near(batched(lora), batched(dense))
    assert runs == ["fast"]


def test_small_inputs_are_composed(runs, monkeypatch):
    monkeypatch.undo()

    def is_fast(rows: int, dropout: float) -> bool:
        x, _, _, A, B = tensors(rows, K)
        return ops.is_fast(x, A, B, dropout)

    assert not is_fast(8, 0.0)
    assert is_fast(2000, 0.0)
    assert not is_fast(2000, 0.1)
    assert is_fast(40000, 0.1)
    assert not is_fast(40000, 1e-9)  # more digits than are drawn


@pytest.mark.usual_paths
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("frozen", [(), (0,), (3,), (4,)], ids=str)
def test_small_inputs_add_in_place_with_dense_gradients(shape, bias, frozen, monkeypatch):
    monkeypatch.setattr(ops, "is_fast", lambda *_: False)
    inputs = tensors(*shape)
    for index in frozen:
        inputs[index].requires_grad_(False)
    if not bias:
        inputs[2] = None
    wanted = [t for t in inputs if t is not None and t.requires_grad]

    def run(function: Call) -> list[Tensor]:
        y = function(*inputs)
        return [y, *torch.autograd.grad(y.square().sum(), wanted)]

    assert ops._is_small_and_plain(*inputs)
    assert_near(run(lora), run(dense))
    zero = torch.zeros_like(inputs[4])
    assert torch.equal(lora(*inputs[:4], zero), F.linear(*inputs[:3]))
    assert_near([lora(*inputs).relu_()], [dense(*inputs).relu()])  # whoever gets it may change it
    if bias and not frozen:
        assert torch.autograd.gradcheck(lora, inputs)
        assert torch.autograd.gradgradcheck(lora, inputs)


@pytest.mark.parametrize("factors", [torch.float32, torch.float64])
def test_device_without_autocast(factors, runs):
    inputs = [t.detach().to("meta").requires_grad_(t.requires_grad) for t in tensors(factors=factors)]
    found = gradients_by_backward(lora, inputs)
    assert [t.shape for t in found] == [(5, N), *(t.shape for t in inputs if t.requires_grad)]
    assert runs == ["fast"]


# --- in a layer


def layer_of(base: nn.Module, **options: Any) -> nn.Module:
    attach(base, LoRAConfig(rank=R, **options))
    return base


class Renamed(nn.Linear):
    """A subclass that computes as its parent."""


class Own(nn.Linear):
    """A subclass that does not: its weight carries the update."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + 1.0


@pytest.mark.filterwarnings("ignore:These adapters are not smaller")
@pytest.mark.parametrize(
    ("build", "options", "expected"),
    [
        (nn.Linear, {}, ["fast"]),
        (Renamed, {}, ["fast"]),
        (Own, {}, []),
        (nn.Linear, {"use_dora": True}, ["fast"]),
        (nn.Linear, {"lora_bias": True}, ["fast"]),
        (nn.Linear, {"target_modules": [], "target_slices": {"0": {"a": "0:3"}}}, ["fast"]),
    ],
)
def test_layers_take_fast_path(build, options, expected, runs):
    model = nn.Sequential(build(K, N))
    layer_of(model, **options)
    model(torch.randn(4, K))
    assert runs == expected


def test_hooks_run_once():
    model, seen = layer_of(nn.Sequential(nn.Linear(K, N))), []
    for name, part in (("layer", model[0]), ("lora", model[0].lora)):
        part.register_forward_pre_hook(lambda m, i, name=name: seen.append(f"{name} before"))
        part.register_forward_hook(lambda m, i, o, name=name: seen.append(f"{name} after"))
        part.register_full_backward_hook(lambda m, i, o, name=name: seen.append(f"{name} backward"))
    model[0].lora.A.register_hook(lambda g: seen.append("A"))
    model(torch.randn(4, K, requires_grad=True)).sum().backward()
    assert seen[:4] == ["layer before", "lora before", "lora after", "layer after"]
    assert sorted(seen[4:]) == ["A", "layer backward", "lora backward"]


@pytest.fixture
def patched(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Somebody has replaced the forward of all linear layers."""
    seen, original = [], nn.Linear.forward
    monkeypatch.setattr(nn.Linear, "forward", lambda self, x: (seen.append("patched"), original(self, x))[1])
    return seen


def test_patched_linear_forward_is_called(patched):
    layer_of(nn.Sequential(nn.Linear(K, N)))(torch.randn(4, K))
    assert patched == ["patched"]


def test_parametrized_weight_trains():
    class Doubled(nn.Module):
        def forward(self, W: Tensor) -> Tensor:
            return 2.0 * W

    model, x = layer_of(nn.Sequential(nn.Linear(K, N))), torch.randn(4, K)
    before = model(x)
    nn.utils.parametrize.register_parametrization(model[0], "weight", Doubled())
    bias = model[0].bias
    assert torch.allclose(model(x) - bias, 2.0 * (before - bias), atol=1e-6)


def test_trained_weight_gets_gradient():
    model, x = layer_of(nn.Sequential(nn.Linear(K, N))), torch.randn(4, K)
    model[0].weight.requires_grad_()
    model(x).sum().backward()
    assert torch.allclose(model[0].weight.grad, x.sum(0).expand(N, K), atol=1e-5)


def test_functional_call_uses_given_parameters():
    model, x = layer_of(nn.Sequential(nn.Linear(K, N))), torch.randn(4, K)
    other = {name: torch.randn_like(p) for name, p in model.named_parameters()}
    W, b, A, B = (other[f"0.{name}"] for name in ("weight", "bias", "lora.A", "lora.B"))
    found = functional_call(model, other, (x,))
    expected = F.linear(x, W, b) + model[0].scaling * x @ A.T @ B.T
    assert torch.allclose(found, expected, atol=1e-5)


def test_a_compiler_is_asked_nothing_about_sizes(monkeypatch):
    """An answer would become a guard, and what is exported would take no other sizes."""

    class Sizeless(torch.Tensor):
        def numel(self) -> int:
            raise AssertionError("asked for its size")

    x, A, B = (torch.zeros(2, 2).as_subclass(Sizeless) for _ in range(3))
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    for dropout in (0.0, 0.5):
        ops.lora_linear(x, torch.zeros(2, 2), None, A, B, scaling=1.0, dropout=dropout)
        ops.lora_add(torch.zeros(2, 2), x, A, B, scaling=1.0, dropout=dropout)
