"""The LoRA linear as one operation, ``y = x W^T + b + s * dropout(x) A^T B^T``: fast where possible, else composed.

The fast path keeps for backward what training needs and nothing else: x itself, h and a bit an element where there is
dropout. It makes no tensor of the size of x or y besides the results.

Letters: x is ``(..., k)``, W ``(n, k)`` and frozen, b ``(n,)``, A ``(r, k)``, B ``(n, r)``; ``h = dropout(x) A^T`` and
``g = dy B`` are ``(M, r)``, with M rows in x.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad
from typing_extensions import override

from lightning_lora.dropout_bits import alive, random_bits

_PLAIN = (Tensor, nn.Parameter)
_AUTOCAST_TAKES = (torch.float32, torch.float16, torch.bfloat16)
# Elements of x below which the composition is sooner done (docs/benchmarks.md): the fast path has more calls from
# Python, and packed masks more operations.
_FEW, _FEW_TO_DROP = 1 << 14, 1 << 18
_MOST_DROPPED = 0.9  # above, rounding the probability would show in the mean
# Elements of x whose mask is unpacked at a time: on the CPU what fits its caches, elsewhere what keeps a GPU busy.
_AT_ONCE_ON_CPU, _AT_ONCE = 1 << 19, 1 << 24


def lora_linear(
    x: Tensor, W: Tensor, b: Tensor | None, A: Tensor, B: Tensor, *, scaling: float, dropout: float = 0.0
) -> Tensor:
    """Return what a linear layer computes with a LoRA update beside its weight.

    Args:
        x: Input, ``(..., k)``.
        W: The layer's weight, ``(n, k)``.
        b: The layer's bias, ``(n,)``.
        A: First factor, ``(r, k)``; computes in the precision of x, or in that of autocast.
        B: Second factor, ``(n, r)``; likewise.
        scaling: Factor of the update.
        dropout: Probability with which the update, and it alone, misses an element of x. The fast path rounds it to
            a multiple of 2**-16 and draws other numbers than ``F.dropout``.

    Returns:
        ``(..., n)``.
    """
    if not _is_fast(x, W, b, A, B, dropout):
        y = F.linear(x, W, b)
        return y + lora_update(x, A, B, scaling=scaling, dropout=dropout).to(y.dtype)
    device = x.device.type
    is_autocast = _is_autocast(device)
    how = _How(scaling, dropout, torch.get_autocast_dtype(device) if is_autocast else x.dtype)
    with _without_autocast(device):
        if torch.is_grad_enabled():
            return cast(Tensor, _LoRALinear.apply(x, W, b, A, B, how))  # type: ignore[no-untyped-call]
        return _forward(x, W, b, A, B, how)[0]


def lora_update(x: Tensor, A: Tensor, B: Tensor, *, scaling: float, dropout: float = 0.0) -> Tensor:
    """Return the update alone, composed of torch's own operations; works under every transform that they know."""
    x = F.dropout(x, dropout) if dropout else x
    if A.dtype != x.dtype and not _is_autocast(x.device.type):  # the factors adapt, they are small
        A, B = A.to(x.dtype), B.to(x.dtype)
    hidden = F.linear(x, A) * scaling  # (..., k) -> (..., r), the cheapest place to scale
    return F.linear(hidden, B)  # (..., r) -> (..., n)


class _How(NamedTuple):
    """What is no tensor: the factor of the update, the probability of dropping, the precision to compute in."""

    scaling: float
    dropout: float
    dtype: torch.dtype

    @property
    def alpha(self) -> float:
        return self.scaling / (1.0 - self.dropout)


def _is_fast(x: Tensor, W: Tensor, b: Tensor | None, A: Tensor, B: Tensor, dropout: float) -> bool:
    """Return whether the fast path computes the same, and sooner."""
    if _is_traced() or not all(type(t) in _PLAIN and t.layout is torch.strided for t in (x, W, A, B)):
        return False
    if x.ndim < 2 or x.numel() < (_FEW_TO_DROP if dropout else _FEW) or dropout > _MOST_DROPPED:
        return False
    if W.requires_grad and torch.is_grad_enabled():
        return False
    together = (x, W) if b is None else (x, W, b)
    if _is_autocast(x.device.type):
        return all(t.dtype in _AUTOCAST_TAKES for t in together)
    return x.is_floating_point() and all(t.dtype is x.dtype and type(t) in _PLAIN for t in together)


def _is_traced() -> bool:
    """Return whether somebody looks who knows torch's operations but not ours: a compiler, functorch, forward AD."""
    if torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None:
        return True
    transforms = getattr(torch._C, "_are_functorch_transforms_active", None)
    # Both are private: without them nothing is known, and the composition is always right.
    return transforms is None or transforms() or getattr(forward_ad, "_current_level", 0) >= 0


def _is_autocast(device: str) -> bool:
    # Devices without autocast, such as meta, may not be asked; a compiler of torch 2.6 cannot ask which those are.
    known = torch.compiler.is_compiling() or torch.amp.is_autocast_available(device)
    return known and torch.is_autocast_enabled(device)


def _without_autocast(device: str) -> AbstractContextManager[Any]:
    # In-place products are not cast by autocast, so all casts are explicit.
    return torch.autocast(device, enabled=False) if _is_autocast(device) else nullcontext()


def _forward(
    x: Tensor, W: Tensor, b: Tensor | None, A: Tensor, B: Tensor, how: _How
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return y, h and the mask's bits."""
    x, W, A, B = (t.to(how.dtype) for t in (x, W, A, B))
    rows = x.flatten(0, -2)
    h, bits = _dropped_product(rows, A, how.dropout) if how.dropout else (rows @ A.T, None)
    # As the layer itself computes it, so that a new adapter leaves its output as it was, bit for bit.
    y = F.linear(x, W, None if b is None else b.to(how.dtype)).contiguous()
    y.flatten(0, -2).addmm_(h, B.T, alpha=how.alpha)
    return y, h, bits


class _LoRALinear(torch.autograd.Function):
    @staticmethod
    @override
    def forward(ctx: Any, x: Tensor, W: Tensor, b: Tensor | None, A: Tensor, B: Tensor, how: _How) -> Tensor:
        y, h, bits = _forward(x, W, b, A, B, how)
        for_x, _, _, for_A, for_B, _ = ctx.needs_input_grad
        # All by reference but h and the bits: x is shared with other layers, W is not copied by autocast.
        ctx.save_for_backward(x if for_A else None, W if for_x else None, A, B, h if for_B else None, bits)
        ctx.how, ctx.shape, ctx.x_dtype, ctx.b_dtype = how, x.shape, x.dtype, None if b is None else b.dtype
        return y

    @staticmethod
    @override
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, W, A, B, h, bits = ctx.saved_tensors
        for_x, _, for_b, for_A, for_B, _ = ctx.needs_input_grad
        how: _How = ctx.how
        with _without_autocast(dy.device.type):
            dy = dy.reshape(math.prod(ctx.shape[:-1]), dy.shape[-1])  # old vmap cannot flatten
            rows = None if x is None else x.flatten(0, -2).to(how.dtype)
            dx = dA = dB = None
            if for_B:
                if torch.is_grad_enabled():
                    h = _hidden_again(rows, A.to(how.dtype), h, bits, for_x)
                # As (r, n), six times as fast on a CPU as (n, r).
                dB = how.alpha * (h.T @ dy).T.to(B.dtype)
            if for_x or for_A:
                g = (B.to(how.dtype).T @ dy.T).T  # likewise, twice as fast
                dx = dy @ W.to(how.dtype) if for_x else None
                dA = _through_first(g, A, rows if for_A else None, dx, bits, how)
            db = dy.sum(0).to(ctx.b_dtype) if for_b else None
            dx = None if dx is None else dx.view(ctx.shape).to(ctx.x_dtype)
        return dx, None, db, dA, dB, None


def _through_first(
    g: Tensor, A: Tensor, x: Tensor | None, dx: Tensor | None, bits: Tensor | None, how: _How
) -> Tensor | None:
    """Add ``s * g A``, masked, to dx in place; return ``dA = s * g^T dropout(x)``; each only where there is one."""
    compute = A.to(how.dtype)
    if bits is None:
        if dx is not None:
            dx.addmm_(g, compute, alpha=how.alpha)
        return None if x is None else how.alpha * (g.T @ x).to(A.dtype)
    # In float32 at least: a sum of many parts would be rounded once for each.
    dA = torch.zeros_like(A, dtype=torch.promote_types(torch.float32, how.dtype))
    for part in _parts(bits, A.shape[1]):
        mask = alive(bits[part], A.shape[1], how.dtype)
        if dx is not None:
            dx[part].addcmul_(g[part] @ compute, mask, value=how.alpha)
        if x is not None:
            dA = dA + g[part].T @ (mask * x[part])
    return None if x is None else (how.alpha * dA).to(A.dtype)


def _dropped_product(x: Tensor, A: Tensor, dropout: float) -> tuple[Tensor, Tensor]:
    """Return ``mask(x) A^T``, not scaled, and the mask's bits."""
    rows, width = x.shape
    h = x.new_empty(rows, A.shape[0])
    bits = torch.empty(rows, (width + 7) // 8, dtype=torch.uint8, device=x.device)
    for part in _parts(bits, width):
        bits[part] = random_bits(bits[part], dropout)
        torch.mm(alive(bits[part], width, x.dtype).mul_(x[part]), A.T, out=h[part])
    return h, bits


def _hidden_again(x: Tensor | None, A: Tensor, h: Tensor, bits: Tensor | None, depends_on_x: bool) -> Tensor:
    """Return h as a function of x and A, for gradients of gradients; the saved one is a constant."""
    if x is None:
        if depends_on_x:
            raise RuntimeError(
                "A second derivative was asked of a LoRA layer with a frozen lora.A, whose input is not kept. Set "
                "requires_grad of lora.A to True."
            )
        return h
    return (x if bits is None else x * alive(bits, A.shape[1], x.dtype)) @ A.T


def _parts(bits: Tensor, width: int) -> Iterator[slice]:
    """Yield slices of rows, few enough at a time for their mask to take little memory."""
    step = max(1, (_AT_ONCE_ON_CPU if bits.is_cpu else _AT_ONCE) // max(width, 1))
    for start in range(0, bits.shape[0], step):
        yield slice(start, start + step)
