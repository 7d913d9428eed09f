"""The LoRA linear of many adapters as one operation: ``y_j = x_j W^T + b + s * x_j A_j^T B_j^T`` for every adapter j.

Inside ``vmap`` a layer sees one adapter; this operation says how all compute together, with fewer passes over the
activations than the composition. It keeps for backward x, h and the factors.

Letters: K adapters; x is ``(K, M, k)``, or ``(M, k)`` where all have the same; W ``(n, k)`` and frozen, b ``(n,)``, or
``(K, n)`` where each adapter trains its own, A ``(K, r, k)``, B ``(K, n, r)``; ``h = x A^T`` and ``g = dy B`` are
``(K, M, r)``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import override

from lightning_lora.adapted_model import AdaptedModel
from lightning_lora.layers.linear import LinearAdapter
from lightning_lora.ops.linear import compute_dtype


@contextmanager
def batched_linears(module: nn.Module) -> Iterator[None]:
    """Have the plain linear layers of a module compute by this operation, inside the block."""
    changed = []
    for layer in AdaptedModel(module).layers.values():
        for adapter in layer.adapters().values():
            is_plain = type(adapter) is LinearAdapter and adapter.is_plain and not adapter.spec.dropout
            if is_plain and not adapter._buffers and layer.lora is adapter and type(layer).base_class is nn.Linear:
                vars(adapter)["forward"] = partial(_forward, cast(LinearAdapter, adapter))
                changed.append(adapter)
    try:
        yield
    finally:
        for adapter in changed:
            del vars(adapter)["forward"]


def _forward(
    adapter: LinearAdapter, inputs: Tensor, output: Tensor | None, layer: Any, is_ours: bool = False
) -> Tensor:
    """Compute as the adapter does, in place of its own ``forward``."""
    W, b = layer._parameters["weight"], layer._parameters["bias"]
    is_frozen = W is not None and not W.requires_grad and not (b is not None and b.requires_grad)
    if output is not None or not is_frozen or not inputs.is_floating_point():
        return LinearAdapter.forward(adapter, inputs, output, layer, is_ours)
    return cast(Tensor, _One.apply(inputs, W, b, adapter.A, adapter.B, adapter.spec.scaling))  # type: ignore[no-untyped-call]


class _One(torch.autograd.Function):
    """The operation as one adapter sees it; mapped over adapters, it is ``_All``."""

    @staticmethod
    @override
    def forward(x: Tensor, W: Tensor, b: Tensor | None, A: Tensor, B: Tensor, scaling: float) -> Tensor:
        raise AssertionError("this runs inside vmap alone")

    @staticmethod
    @override
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None: ...

    @staticmethod
    @override
    def vmap(
        info: Any,
        in_dims: Sequence[int | None],
        x: Tensor,
        W: Tensor,
        b: Tensor | None,
        A: Tensor,
        B: Tensor,
        scaling: float,
    ) -> tuple[Tensor, int]:
        dtype = compute_dtype(x)
        A, B = (each if at == 0 else each.movedim(at, 0) for each, at in ((A, in_dims[3] or 0), (B, in_dims[4] or 0)))
        if in_dims[0] is not None:
            x = x.movedim(in_dims[0], 0)
        shape = x.shape[:-1] if in_dims[0] is not None else (info.batch_size, *x.shape[:-1])
        rows = x.reshape(info.batch_size, -1, x.shape[-1]) if in_dims[0] is not None else x.reshape(-1, x.shape[-1])
        is_shared = b is None or in_dims[2] is None
        with torch.autocast(x.device.type, enabled=False):
            y = _All.apply(rows.to(dtype), W, b if is_shared else None, A, B, scaling)  # type: ignore[no-untyped-call]
            if b is not None and not is_shared:  # each adapter trains its own
                y = y + b.movedim(in_dims[2] or 0, 0).to(dtype).unsqueeze(1)
        return cast(Tensor, y).view(*shape, -1), 0


class _All(torch.autograd.Function):
    @staticmethod
    @override
    def forward(ctx: Any, x: Tensor, W: Tensor, b: Tensor | None, A: Tensor, B: Tensor, scaling: float) -> Tensor:
        W, low_A, low_B = W.to(x.dtype), A.to(x.dtype), B.to(x.dtype)
        y = F.linear(x, W, None if b is None else b.to(x.dtype))
        if x.ndim == 2:  # the same for all: one product for the first factors of all
            h = (x @ low_A.flatten(0, 1).T).view(len(x), len(A), -1).transpose(0, 1)
            y = torch.baddbmm(y.expand(len(A), *y.shape), h, low_B.mT, alpha=scaling)
        else:
            h = torch.bmm(x, low_A.mT)
            y.baddbmm_(h, low_B.mT, alpha=scaling)
        ctx.save_for_backward(x, W, low_A, low_B, h)
        ctx.scaling, ctx.dtypes = scaling, (A.dtype, B.dtype)
        return y

    @staticmethod
    @override
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, W, A, B, h = ctx.saved_tensors
        scaling, (A_dtype, B_dtype) = ctx.scaling, ctx.dtypes
        g = torch.bmm(dy, B)
        is_shared, dx = x.ndim == 2, None
        if ctx.needs_input_grad[0]:
            dx = torch.matmul(dy, W).baddbmm_(g, A, alpha=scaling)
            dx = dx.sum(0) if is_shared else dx
        dA = (g.transpose(0, 1).flatten(1).T @ x).view_as(A) if is_shared else torch.bmm(g.mT, x)
        dB = torch.bmm(h.mT, dy).mT  # as (r, n), several times as fast on a CPU as (n, r)
        return dx, None, None, (scaling * dA).to(A_dtype), (scaling * dB).to(B_dtype), None
