"""The LoRA linear as one operation, ``y = x W^T + b + s * dropout(x) A^T B^T``: fast where possible, else composed.

The fast path keeps for backward what training needs and nothing else: x itself, h and a bit an element where there is
dropout. It makes no tensor of the size of x or y besides the results.

Letters: x is ``(..., k)``, W ``(n, k)`` and frozen, b ``(n,)``, A ``(r, k)``, B ``(n, r)``; ``h = dropout(x) A^T`` and
``g = dy B`` are ``(M, r)``, with M rows in x.
"""

from __future__ import annotations

import functools
import importlib.util
import math
import os
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad
from typing_extensions import override

from lightning_lora.ops.dropout import alive, dropped, kept, may_draw, random_bits
from lightning_lora.ops.eager import (
    add,
    functorch_is_active,
    get_tracing_state,
    is_autocast,
    is_traced,
    shared_cast,
    without_autocast,
)

_PLAIN = (Tensor, nn.Parameter)
_AUTOCAST_TAKES = (torch.float32, torch.float16, torch.bfloat16)
# Below this many elements of x, the composition is faster (docs/benchmarks.md): the fast path makes more Python calls,
# and packed masks need more operations.
_FEW, _FEW_TO_DROP = 1 << 14, 1 << 18
# Elements of x whose mask is unpacked at a time: on the CPU what fits its caches, elsewhere what keeps a GPU busy.
_AT_ONCE_ON_CPU, _AT_ONCE = 1 << 19, 1 << 24

# Off until a GPU has shown that they are right and faster; benchmarks/gpu_visit.sh turns them on (docs/decisions.md).
_MAY_USE_KERNELS = os.environ.get("LIGHTNING_LORA_KERNELS") == "1"


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
            a thousandth of itself and draws different numbers from ``F.dropout``.

    Returns:
        ``(..., n)``.
    """
    if not (is_fast(x, A, B, dropout) and _is_frozen_linear(x, W, b)):
        if _is_small_and_plain(x, W, b, A, B):
            return _in_place(x, W, b, A, B, scaling, dropout)
        y = F.linear(x, W, b)
        return y + lora_update(x, A, B, scaling=scaling, dropout=dropout).to(y.dtype)
    how = _How(scaling, dropout, compute_dtype(x))
    x = shared_cast(x, how.dtype)
    with without_autocast(x.device.type):
        if torch.is_grad_enabled():
            return cast(Tensor, _LoRALinear.apply(x, W, b, A, B, how))  # type: ignore[no-untyped-call]
        return _forward(x, W, b, A, B, how)[0]


def lora_add(
    y: Tensor, x: Tensor, A: Tensor, B: Tensor, *, scaling: float, dropout: float = 0.0, is_ours: bool = False
) -> Tensor:
    """Return ``y + s * dropout(x) A^T B^T`` for the output y of any layer.

    Args:
        y: Output of the layer, ``(..., n)``.
        x: Input of the layer, ``(..., k)``.
        A: First factor, ``(r, k)``.
        B: Second factor, ``(n, r)``.
        scaling: Factor of the update.
        dropout: As in ``lora_linear``.
        is_ours: Whether nothing else refers to y, so that the sum may be made in its memory.
    """
    if not (is_fast(x, A, B, dropout) and type(y) is Tensor and y.layout is torch.strided):
        return add(y, lora_update(x, A, B, scaling=scaling, dropout=dropout), is_ours)
    how = _How(scaling, dropout, compute_dtype(x))
    x = shared_cast(x, how.dtype)
    if not is_ours or y._is_view() or not y.is_contiguous():
        y = y.clone(memory_format=torch.contiguous_format)
    with without_autocast(x.device.type):
        if torch.is_grad_enabled():
            return cast(Tensor, _LoRAAdd.apply(y, x, A, B, how))  # type: ignore[no-untyped-call]
        _add_update(y, x, A, B, how)
        return y


def lora_update(x: Tensor, A: Tensor, B: Tensor, *, scaling: float, dropout: float = 0.0) -> Tensor:
    """Return the update alone, composed of torch's own operations; works under every transform that they know."""
    x = F.dropout(x, dropout) if dropout else x
    if A.dtype != x.dtype and not is_autocast(x.device.type):  # the factors adapt, they are small
        A, B = A.to(x.dtype), B.to(x.dtype)
    hidden = F.linear(x, A) * scaling  # (..., k) -> (..., r), the cheapest place to scale
    return F.linear(hidden, B)  # (..., r) -> (..., n)


class _How(NamedTuple):
    """The options that are not tensors: scaling, dropout probability, precision."""

    scaling: float
    dropout: float
    dtype: torch.dtype

    @property
    def alpha(self) -> float:
        return self.scaling / kept(self.dropout) if self.dropout else self.scaling


def is_fast(x: Tensor, A: Tensor, B: Tensor, dropout: float) -> bool:
    """Return whether the fast path applies to this update and is faster."""
    if torch.compiler.is_compiling():  # first: a question about sizes would bind what is exported to them
        return False
    if x.ndim < 2 or x.numel() < (_FEW_TO_DROP if dropout else _FEW) or is_traced():
        return False
    if not (type(x) in _PLAIN and type(A) in _PLAIN and type(B) in _PLAIN and x.layout is torch.strided):
        return False
    if x.is_nested:  # which has no sizes, and is of no other class or layout
        return False
    if dropout and not may_draw(dropout):
        return False
    return x.dtype in _AUTOCAST_TAKES if is_autocast(x.device.type) else x.is_floating_point()


def _is_frozen_linear(x: Tensor, W: Tensor, b: Tensor | None) -> bool:
    """Return whether the layer itself is a plain product with a frozen weight, in one known precision."""
    if type(W) not in _PLAIN or W.layout is not torch.strided or W.requires_grad:
        return False  # with and without gradients: reentrant checkpointing runs both, and must draw the same mask
    if is_autocast(x.device.type):
        return W.dtype in _AUTOCAST_TAKES and (b is None or b.dtype in _AUTOCAST_TAKES)
    return W.dtype is x.dtype and (b is None or (b.dtype is x.dtype and type(b) in _PLAIN))


def _is_small_and_plain(x: Tensor, W: Tensor, b: Tensor | None, A: Tensor, B: Tensor) -> bool:
    """Return whether torch's own operations may add in place, which saves two of them."""
    if torch.compiler.is_compiling() or x.ndim < 2 or x.numel() >= _FEW_TO_DROP or not x.is_contiguous():
        return False
    if x.is_nested:
        return False
    for tensor in (x, W, A, B) if b is None else (x, W, A, B, b):
        if type(tensor) not in _PLAIN or tensor.dtype is not x.dtype or tensor.layout is not torch.strided:
            return False
    # is_traced() and is_autocast(), inlined: in a small layer, every Python call counts.
    if get_tracing_state() is not None or functorch_is_active():
        return False
    device = x.device.type
    is_autocast_on = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    return not is_autocast_on and getattr(forward_ad, "_current_level", 0) < 0


def _in_place(x: Tensor, W: Tensor, b: Tensor | None, A: Tensor, B: Tensor, scaling: float, dropout: float) -> Tensor:
    """Return the sum, composed of torch's own operations, with the update added to the layer's output in place."""
    shape = (*x.shape[:-1], W.shape[0])
    x = x.flatten(0, -2)
    y = F.linear(x, W, b)
    y.addmm_(F.linear(F.dropout(x, dropout) if dropout else x, A), B.T, alpha=scaling)
    return y if y.shape == shape else y.view(shape)


def compute_dtype(x: Tensor) -> torch.dtype:
    """Return the precision in which a layer computes with x."""
    return torch.get_autocast_dtype(x.device.type) if is_autocast(x.device.type) else x.dtype


def _forward(
    x: Tensor, W: Tensor, b: Tensor | None, A: Tensor, B: Tensor, how: _How
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return y, h and the mask's bits."""
    # As the layer itself computes it, so that a new adapter leaves its output as it was, bit for bit.
    y = F.linear(x, W.to(how.dtype), None if b is None else b.to(how.dtype)).contiguous()
    if y._is_view():  # of a matrix that nobody sees; a function's view may not be changed in place by those who get it
        y = torch.ops.aten._unsafe_view(y, y.shape)
    return (y, *_add_update(y, x, A, B, how))


def _add_update(y: Tensor, x: Tensor, A: Tensor, B: Tensor, how: _How) -> tuple[Tensor, Tensor | None]:
    """Add the update to y in place; return h and the mask's bits."""
    rows, A = x.flatten(0, -2), A.to(how.dtype)
    h, bits = _dropped_product(rows, A, how.dropout) if how.dropout else (rows @ A.T, None)
    # The factor goes into sums and small results, never into h or g: one rounding less in bfloat16.
    seen, B = y.flatten(0, -2), B.to(how.dtype)
    if y.dtype is not how.dtype:
        seen.add_(h @ B.T, alpha=how.alpha)
    elif _uses_kernels(seen, h) and _adds(seen, h, B):
        _kernels().add_product(seen, h, B.T, how.alpha)
    else:
        seen.addmm_(h, B.T, alpha=how.alpha)
    return h, bits


class _LoRALinear(torch.autograd.Function):
    @staticmethod
    @override
    def forward(ctx: Any, x: Tensor, W: Tensor, b: Tensor | None, A: Tensor, B: Tensor, how: _How) -> Tensor:
        y, h, bits = _forward(x, W, b, A, B, how)
        for_x, _, _, for_A, for_B, _ = ctx.needs_input_grad
        # All by reference but h and the bits: x is shared with other layers, W is not copied by autocast.
        ctx.save_for_backward(x if for_A else None, W if for_x else None, A, B, h if for_B else None, bits)
        ctx.how, ctx.shape, ctx.b_dtype = how, x.shape, None if b is None else b.dtype
        return y

    @staticmethod
    @override
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, W, A, B, h, bits = ctx.saved_tensors
        for_x, _, for_b, for_A, for_B, _ = ctx.needs_input_grad
        with without_autocast(dy.device.type):
            dy = dy.reshape(math.prod(ctx.shape[:-1]), dy.shape[-1])  # old vmap cannot flatten
            frozen = (lambda: dy @ W.to(ctx.how.dtype)) if for_x else None
            dx, dA, dB = _Backward(ctx.how, x, A, B, h, bits).of(dy, frozen, for_x, for_A, for_B)
            db = dy.sum(0).to(ctx.b_dtype) if for_b else None
            return None if dx is None else dx.view(ctx.shape), None, db, dA, dB, None


class _LoRAAdd(torch.autograd.Function):
    @staticmethod
    @override
    def forward(ctx: Any, y: Tensor, x: Tensor, A: Tensor, B: Tensor, how: _How) -> Tensor:
        h, bits = _add_update(y, x, A, B, how)
        _, _, for_A, for_B, _ = ctx.needs_input_grad
        ctx.save_for_backward(x if for_A else None, A, B, h if for_B else None, bits)
        ctx.how, ctx.shape = how, x.shape
        ctx.mark_dirty(y)
        return y

    @staticmethod
    @override
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, A, B, h, bits = ctx.saved_tensors
        _, for_x, for_A, for_B, _ = ctx.needs_input_grad
        with without_autocast(dy.device.type):
            rows = dy.reshape(math.prod(ctx.shape[:-1]), dy.shape[-1]).to(ctx.how.dtype)
            dx, dA, dB = _Backward(ctx.how, x, A, B, h, bits).of(rows, None, for_x, for_A, for_B)
            return dy, None if dx is None else dx.view(ctx.shape), dA, dB, None


class _Backward(NamedTuple):
    """The part of backward that belongs to the update."""

    how: _How
    x: Tensor | None
    A: Tensor
    B: Tensor
    h: Tensor | None
    bits: Tensor | None

    def of(
        self, dy: Tensor, frozen: Callable[[], Tensor] | None, for_x: bool, for_A: bool, for_B: bool
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Return dx, dA and dB, each where it is asked for; ``frozen`` makes the dx that ``g A`` is added to."""
        dtype = self.how.dtype
        if torch.is_grad_enabled() and self.bits is not None and self.bits.dtype is torch.int64:
            # Autograd cannot look into kernels, so gradients of gradients see the mask itself.
            bits = _kernels().mask_bits((dy.shape[0], self.A.shape[1]), dtype, kept(self.how.dropout), self.bits)
            return self._replace(bits=bits).of(dy, frozen, for_x, for_A, for_B)
        A, x = self.A.to(dtype), None if self.x is None else self.x.flatten(0, -2)
        dx = dA = dB = None
        g, B = None, self.B.to(dtype)
        if for_B:
            h = self._hidden_again(A, x, for_x) if torch.is_grad_enabled() else self.h
            assert h is not None
            if (for_x or for_A) and not torch.is_grad_enabled() and _uses_kernels(dy, h) and _pairs(dy, B, h):
                g, dB = _kernels().gradients(dy, B, h)
                dB = (self.how.alpha * dB).to(self.B.dtype)
            else:
                dB = self.how.alpha * (h.T @ dy).T.to(self.B.dtype)  # (r, n): on a CPU several times as fast as (n, r)
        if for_x or for_A:
            g = dy @ B if g is None else g
            dx = None if frozen is None else frozen()  # now, so that it is in the caches when it is added to
            x = x if for_A else None
            if self.bits is not None:
                dx = dy.new_zeros(dy.shape[0], A.shape[1]) if for_x and dx is None else dx
                through = self._through_seed if self.bits.dtype is torch.int64 else self._through_mask
                dA = through(g, A, x, dx, self.bits)
            else:
                if for_x:
                    dx = self.how.alpha * (g @ A) if dx is None else dx.addmm_(g, A, alpha=self.how.alpha)
                dA = None if x is None else self.how.alpha * (g.T @ x).to(self.A.dtype)
        return dx, dA, dB

    def _through_mask(self, g: Tensor, A: Tensor, x: Tensor | None, dx: Tensor | None, bits: Tensor) -> Tensor | None:
        # In float32 at least: a sum of many parts would be rounded once for each.
        dA = torch.zeros_like(A, dtype=torch.promote_types(torch.float32, A.dtype))
        for part in _parts(bits, A.shape[1]):
            mask = alive(bits[part], A.shape[1], A.dtype)
            if dx is not None:
                dx[part].addcmul_(g[part] @ A, mask, value=self.how.alpha)
            if x is not None:
                seen = mask * x[part] if torch.is_grad_enabled() else mask.mul_(x[part])
                dA = dA + g[part].T @ seen
        return None if x is None else (self.how.alpha * dA).to(self.A.dtype)

    def _through_seed(self, g: Tensor, A: Tensor, x: Tensor | None, dx: Tensor | None, seed: Tensor) -> Tensor | None:
        """Do the same with the mask that a kernel makes from its seed."""
        kernels, keep = _kernels(), kept(self.how.dropout)
        if dx is not None:
            kernels.add_product(dx, g, A, self.how.alpha, keep, seed)
        return None if x is None else (self.how.alpha * kernels.factor_gradient(g, x, keep, seed)).to(self.A.dtype)

    def _hidden_again(self, A: Tensor, x: Tensor | None, depends_on_x: bool) -> Tensor | None:
        """Return h as a function of x and A, for gradients of gradients; the saved one is a constant."""
        if x is None:
            if depends_on_x:
                raise RuntimeError(
                    "A second derivative was requested through a LoRA layer with a frozen lora.A, whose input is not "
                    "kept. Set requires_grad of lora.A to True."
                )
            return self.h
        x = x if self.bits is None else x * alive(self.bits, A.shape[1], x.dtype)
        return x @ A.T


def _dropped_product(x: Tensor, A: Tensor, dropout: float) -> tuple[Tensor, Tensor]:
    """Return ``mask(x) A^T``, not scaled, and the mask's bits, or the seed from which a kernel made it."""
    if _uses_kernels(x, A.T) and _drops(x, A, dropout):
        seed = _kernels().new_seed(x)
        return _kernels().dropped_product(x, A, kept(dropout), seed), seed
    return _composed_dropped_product(x, A, dropout)


def _composed_dropped_product(x: Tensor, A: Tensor, dropout: float) -> tuple[Tensor, Tensor]:
    rows, width = x.shape
    h = x.new_empty(rows, A.shape[0])
    bits = torch.empty(rows, (width + 7) // 8, dtype=torch.uint8, device=x.device)
    for part in _parts(bits, width):
        bits[part] = random_bits(bits[part], dropout)
        torch.mm(dropped(x[part], bits[part]), A.T, out=h[part])
    return h, bits


def _parts(bits: Tensor, width: int) -> Iterator[slice]:
    """Yield slices of rows, few enough at a time for their mask to take little memory."""
    step = max(1, (_AT_ONCE_ON_CPU if bits.is_cpu else _AT_ONCE) // max(width, 1))
    for start in range(0, bits.shape[0], step):
        yield slice(start, start + step)


# --- kernels


def _kernels() -> ModuleType:
    from lightning_lora.ops import triton_kernels

    return triton_kernels


def _uses_kernels(large: Tensor, thin: Tensor) -> bool:
    """Return whether kernels may be used for these tensors at all."""
    if not (_MAY_USE_KERNELS and large.is_cuda and _has_triton()):
        return False
    return large.dtype in _kernels().DTYPES and thin.shape[1] <= _kernels().HIGHEST_RANK


@functools.cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None and importlib.util.find_spec("triton.knobs") is not None


def _drops(x: Tensor, A: Tensor, dropout: float) -> bool:
    """Return whether dropout is faster with a mask from a seed, forward and backward together."""
    keep, how = kept(dropout), _How(1.0, dropout, x.dtype)

    def with_kernels() -> None:
        seed = _kernels().new_seed(x)
        h = _kernels().dropped_product(x, A, keep, seed)
        _Backward(how, x, A, A, h, seed)._through_seed(h, A, x, torch.empty_like(x), seed)

    def composed() -> None:
        h, bits = _composed_dropped_product(x, A, dropout)
        _Backward(how, x, A, A, h, bits)._through_mask(h, A, x, torch.empty_like(x), bits)

    return bool(_kernels().is_faster("dropout", x, A.shape[0], with_kernels, composed))


def _pairs(dy: Tensor, B: Tensor, h: Tensor) -> bool:
    """Return whether g and dB are faster in one read of dy."""
    return bool(
        _kernels().is_faster(
            "pair", dy, h.shape[1], lambda: _kernels().gradients(dy, B, h), lambda: (dy @ B, (h.T @ dy).T)
        )
    )


def _adds(y: Tensor, h: Tensor, B: Tensor) -> bool:
    """Return whether the update is added to y faster by a kernel than by cuBLAS."""

    def place() -> Tensor:  # a measurement must leave y as it is, and once it is made nothing is allocated
        return torch.empty_like(y)

    return bool(
        _kernels().is_faster(
            "add", y, h.shape[1], lambda: _kernels().add_product(place(), h, B.T, 1.0), lambda: place().addmm_(h, B.T)
        )
    )
