"""The fused LoRA linear operation on CUDA: equal to the dense float64 formula, with less memory."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_lora.ops import linear as ops
from lightning_lora.ops.dropout import random_bits
from lightning_lora.ops.linear import lora_linear, lora_update
from tests.gpu.device import DEVICE, needs_cuda, not_rehearsed

pytestmark = needs_cuda

M, K, N, R, S = 300, 264, 136, 8, 1.5  # not powers of two; a width that is not a multiple of 16
ROUNDING = {torch.float64: 1e-10, torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}


def tensors(dtype: torch.dtype, factors: torch.dtype) -> list[Tensor]:
    """Return x, W, b, A and B; only the weight is frozen."""
    rng = torch.Generator().manual_seed(3)
    sizes = [(M, K), (N, K), (N,), (R, K), (N, R)]
    made = [torch.randn(size, generator=rng, dtype=torch.float64) / size[-1] ** 0.5 for size in sizes]
    return [t.to(DEVICE, factors if index > 2 else dtype).requires_grad_(index != 1) for index, t in enumerate(made)]


def dense(x: Tensor, W: Tensor, b: Tensor, A: Tensor, B: Tensor, mask: Tensor | float = 1.0) -> Tensor:
    return F.linear(x, W, b) + S * (x * mask) @ A.T @ B.T


def results(function: Callable[..., Tensor], inputs: list[Tensor]) -> list[Tensor]:
    """Return the output and the gradients, in float64."""
    y = function(*inputs)
    cotangent = torch.linspace(-1, 1, y.numel(), dtype=torch.float64, device=DEVICE).view_as(y).cos().to(y.dtype)
    gradients = torch.autograd.grad(y, [t for t in inputs if t.requires_grad], cotangent)
    return [t.detach().double() for t in (y, *gradients)]


def assert_near(found: list[Tensor], expected: list[Tensor], rounding: float) -> None:
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0.0, atol=rounding * float(other.abs().max()))


def exact(inputs: list[Tensor]) -> list[Tensor]:
    return [t.detach().double().requires_grad_(t.requires_grad) for t in inputs]


@pytest.mark.parametrize("dtype", ROUNDING, ids=str)
def test_outputs_and_gradients_match_dense_formula(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops, "_FEW", 0)
    inputs = tensors(dtype, dtype)
    assert ops.is_fast(inputs[0], *inputs[3:], 0.0)
    found = results(lambda *i: lora_linear(*i, scaling=S), inputs)
    assert_near(found, results(dense, exact(inputs)), ROUNDING[dtype])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_casts_float32_factors(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops, "_FEW", 0)
    inputs = tensors(torch.float32, torch.float32)
    with torch.autocast(DEVICE, dtype):
        assert ops.is_fast(inputs[0], *inputs[3:], 0.0)
        y = lora_linear(*inputs, scaling=S)
    assert y.dtype == dtype
    found = [y.detach().double(), *torch.autograd.grad(y, inputs[3:], torch.ones_like(y))]
    truth = exact(inputs)
    z = dense(*truth)
    expected = [z.detach(), *torch.autograd.grad(z, truth[3:], torch.ones_like(z))]
    assert_near([t.double() for t in found], expected, ROUNDING[dtype])


@pytest.mark.parametrize("dropout", [0.1, 0.5])
def test_forward_and_backward_share_dropout_mask(dropout: float, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("_FEW", "_FEW_TO_DROP"):
        monkeypatch.setattr(ops, name, 0)

    def seeded(*inputs: Tensor) -> Tensor:
        torch.manual_seed(5)
        return lora_linear(*inputs, scaling=S, dropout=dropout)

    inputs = tensors(torch.float64, torch.float64)
    ones, eye = torch.ones(M, K, dtype=torch.float64, device=DEVICE), torch.eye(K, dtype=torch.float64, device=DEVICE)
    torch.manual_seed(5)
    mask = lora_linear(ones, torch.zeros_like(eye), None, eye, eye, scaling=1.0, dropout=dropout).detach()
    assert mask.unique().numel() == 2
    assert_near(results(seeded, inputs), results(lambda *i: dense(*i, mask=mask), inputs), ROUNDING[torch.float64])


@pytest.mark.parametrize("dropout", [0.1, 0.5])
def test_dropout_bits_have_requested_rate(dropout: float) -> None:
    bits = random_bits(torch.empty(1 << 16, 16, dtype=torch.uint8, device=DEVICE), dropout)
    elements = bits.numel() * 8
    kept = sum(int(((bits >> place) & 1).sum()) for place in range(8))
    deviation = (elements * dropout * (1 - dropout)) ** 0.5
    assert abs(kept - elements * (1 - dropout)) < 6 * deviation


@not_rehearsed
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_step_takes_less_memory_than_composed(dropout: float) -> None:
    rows, width, rank = 4096, 2048, 16
    x = torch.randn(rows, width, device=DEVICE, requires_grad=True)
    W = torch.randn(width, width, device=DEVICE)
    A, B = (torch.randn(shape, device=DEVICE, requires_grad=True) for shape in ((rank, width), (width, rank)))

    def composed() -> Tensor:
        return F.linear(x, W) + lora_update(x, A, B, scaling=S, dropout=dropout)

    def peak(function: Callable[[], Tensor]) -> int:
        function().sum().backward()  # warm up one-time allocations
        for tensor in (x, A, B):
            tensor.grad = None
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function().sum().backward()
        torch.cuda.synchronize()
        for tensor in (x, A, B):
            tensor.grad = None
        return torch.cuda.max_memory_allocated() - before

    assert ops.is_fast(x, A, B, dropout)
    fast = peak(lambda: lora_linear(x, W, None, A, B, scaling=S, dropout=dropout))
    assert fast <= peak(composed) - x.nbytes // 2
