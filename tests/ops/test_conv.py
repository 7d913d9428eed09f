"""The update of a convolution as one operation: the composition's gradients, and less kept."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import grad, jvp, vmap
from torch.utils.checkpoint import checkpoint

from lightning_lora import LoRAConfig, attach
from lightning_lora.ops import conv as conv_ops
from lightning_lora.ops import linear as ops
from lightning_lora.ops.dropout import alive, kept

KINDS: dict[str, Callable[[], nn.Module]] = {
    "1d": lambda: nn.Conv1d(4, 6, 3, padding=1),
    "2d": lambda: nn.Conv2d(4, 6, (3, 2), stride=2, padding=(1, 0), dilation=(1, 2)),
    "3d": lambda: nn.Conv3d(4, 6, 2),
    "grouped": lambda: nn.Conv2d(4, 6, 3, groups=2),
    "transposed": lambda: nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1, output_padding=1),
    "transposed, grouped": lambda: nn.ConvTranspose1d(4, 6, 3, groups=2),
}
each_kind = pytest.mark.parametrize("kind", KINDS)


@pytest.fixture(autouse=True)
def small_inputs_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops, "_FEW", 0)
    monkeypatch.setattr(ops, "_FEW_TO_DROP", 0)


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> list[Tensor | None]:
    """The bits of every call that took the one operation."""
    seen: list[Tensor | None] = []
    masked = conv_ops._masked
    monkeypatch.setattr(conv_ops, "_masked", lambda x, bits: (seen.append(bits), masked(x, bits))[1])
    return seen


def adapted(kind: str, dropout: float, dtype: torch.dtype = torch.float64) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(3)
    model = nn.Sequential(KINDS[kind]()).to(dtype)
    attach(model, LoRAConfig(rank=2, alpha=3.0, dropout=dropout, target_modules=["0"]))
    model.to(dtype)
    for factor in model[0].lora.parameters():
        nn.init.normal_(factor)
    dimensions = model[0].weight.ndim - 2
    return model, torch.randn(3, 4, *(7, 6, 5)[:dimensions], dtype=dtype)


def gradients(run: Callable[[Tensor], Tensor], model: nn.Module, x: Tensor) -> list[Tensor]:
    x = x.clone().requires_grad_()
    y = run(x)
    weights = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y).cos()
    return [y, *torch.autograd.grad(y, [x, *model[0].lora.parameters()], weights)]


def dense(model: nn.Module, mask: Tensor | float, A: Tensor | None = None) -> Callable[[Tensor], Tensor]:
    """Return the layer as one convolution with the frozen weight, and one of the masked input with the update."""
    layer = model[0]

    def run(x: Tensor) -> Tensor:
        delta = (layer.scaling * (layer.lora.B @ (layer.lora.A if A is None else A))).view(layer.weight.shape)
        convolve: Any = getattr(F, f"conv{'_transpose' if layer.transposed else ''}{layer.weight.ndim - 2}d")
        options: dict[str, Any] = {"stride": layer.stride, "padding": layer.padding, "dilation": layer.dilation}
        if layer.transposed:
            options["output_padding"] = layer.output_padding
        options["groups"] = layer.groups
        return convolve(x, layer.weight, layer.bias, **options) + convolve(x * mask, delta, **options)

    return run


def assert_near(found: list[Tensor], expected: list[Tensor], tolerance: float = 1e-12) -> None:
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)


@each_kind
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_gradients_match_dense_kernel(kind, dropout, taken):
    model, x = adapted(kind, dropout)
    torch.manual_seed(5)
    found = gradients(model, model, x)
    assert bool(taken) is bool(dropout)  # without it, and without autocast, the composition keeps as little
    mask = alive(taken[0], x[0].numel(), x.dtype).reshape(x.shape) / kept(dropout) if dropout else 1.0
    assert_near(found, gradients(dense(model, mask), model, x))


@each_kind
def test_gradcheck_and_gradgradcheck(kind, taken):
    model, x = adapted(kind, 0.5)
    A, B = (factor.detach().clone().requires_grad_() for factor in model[0].lora.parameters())

    def run(x: Tensor, A: Tensor, B: Tensor) -> Tensor:
        torch.manual_seed(5)
        return torch.func.functional_call(model, {"0.lora.A": A, "0.lora.B": B}, (x,))

    x = x[:1].clone().requires_grad_()
    assert torch.autograd.gradcheck(run, (x, A, B), fast_mode=True)
    assert torch.autograd.gradgradcheck(run, (x, A, B), fast_mode=True)
    assert taken


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_backward_keeps_input_hidden_and_bits_only(dropout, autocast):
    layer, x = nn.Conv2d(16, 16, 3, padding=1), torch.randn(4, 16, 8, 8)
    model = nn.Sequential(layer)
    attach(model, LoRAConfig(rank=2, dropout=dropout, target_modules=["0"]))
    seen: list[Tensor] = []
    with (
        torch.autograd.graph.saved_tensors_hooks(lambda t: seen.append(t) or t, lambda t: t),
        torch.autocast("cpu", torch.bfloat16) if autocast else nullcontext(),
    ):
        model(x)
    known = {t.untyped_storage().data_ptr() for t in (x, *model.parameters())}
    new = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in seen}
    size = sum(bytes_ for where, bytes_ in new.items() if where not in known)
    element, pixels = (2 if autocast else 4), 4 * 8 * 8
    exact = (pixels * 16 * 2 if autocast else 0) + pixels * 2 * element + (pixels * 16 // 8 if dropout else 0)
    assert exact <= size <= 1.01 * exact


@each_kind
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointing_replays_mask(kind, use_reentrant):
    model, x = adapted(kind, 0.5)

    def backward(run: Callable[[Tensor], Tensor]) -> list[Tensor]:
        torch.manual_seed(5)
        model.zero_grad()
        twin = x.clone().requires_grad_()
        y = run(twin)
        torch.manual_seed(99)
        y.square().sum().backward()
        return [y.detach(), twin.grad, *(factor.grad.clone() for factor in model[0].lora.parameters())]

    again = backward(lambda x: checkpoint(model, x, use_reentrant=use_reentrant))
    assert_near(again, backward(model), 0.0)


Call = Callable[[Tensor, Tensor], Tensor]  # of an input and A


def per_sample_gradients(call: Call, x: Tensor, A: Tensor) -> Tensor:
    return vmap(grad(lambda A, x: call(x[None], A).square().sum()), (None, 0))(A, x)


def forward_mode(call: Call, x: Tensor, A: Tensor) -> Tensor:
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(call(forward_ad.make_dual(x, torch.ones_like(x)), A)).tangent


TRANSFORMS: dict[str, Callable[[Call, Tensor, Tensor], Tensor]] = {
    "vmap": lambda call, x, A: vmap(lambda x: call(x[None], A))(x),
    "per-sample gradients": per_sample_gradients,
    "jvp by the input": lambda call, x, A: jvp(lambda x: call(x, A), (x,), (x.cos(),))[1],
    "jvp by a factor": lambda call, x, A: jvp(lambda A: call(x, A), (A,), (A.cos(),))[1],
    "forward mode": forward_mode,
    "compile": lambda call, x, A: torch.compile(call, backend="aot_eager", fullgraph=True)(x, A),
}


@pytest.mark.parametrize(
    ("transform", "kind"), [(t, k) for t in TRANSFORMS for k in KINDS if t != "compile" or k in ("2d", "transposed")]
)
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:There is a performance drop")
def test_transforms_use_composition(transform, kind, taken, monkeypatch):
    model, x = adapted(kind, 0.5)
    # Dropout that drops nothing: only a look at who watches keeps the one operation out.
    monkeypatch.setattr(F, "dropout", lambda x, *_: x)
    A = model[0].lora.A.detach()

    def lora(x: Tensor, A: Tensor) -> Tensor:
        return torch.func.functional_call(model, {"0.lora.A": A}, (x,))

    def truth(x: Tensor, A: Tensor) -> Tensor:
        return dense(model, 1.0, A)(x)

    assert_near([TRANSFORMS[transform](lora, x, A)], [TRANSFORMS[transform](truth, x, A)])
    assert not taken
    lora(x, A)
    assert taken
