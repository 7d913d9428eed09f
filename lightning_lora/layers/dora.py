"""DoRA: each row of ``W + scaling * B @ A`` is rescaled to a trained norm ``m``, as ``m * (W + scaling * B @ A) / n``.

``n`` is the row's current norm; it gets no gradient. Source: Liu et al. 2024, "DoRA", arXiv:2402.09353, eq. 5 and
section 4.3.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, cast

import torch
from torch import Tensor
from typing_extensions import override

from lightning_lora.layers.adapter import at_once
from lightning_lora.ops.eager import is_traced, without_autocast
from lightning_lora.sharding import is_sharded


def norms(matrix: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the norms of the rows of a matrix, computed in a given precision: the start of the magnitudes."""
    return _roots(_squares(matrix, dtype))


@torch.no_grad()
def norms_of_sum(matrix: Tensor, A: Tensor, B: Tensor, scaling: float, index: Tensor | None = None) -> Tensor:
    """Return the rows' current norms, those of ``matrix + scaling * B @ A``, without forming that sum; no gradient.

    ``LowRankAdapter`` calls this in every forward pass, for the divisor ``n``.

    Args:
        matrix: The weight's rows that are adapted; with an ``index``, all of its rows.
        A: ``(rank, in)``, float32 or better.
        B: ``(out, rank)``, likewise.
        scaling: Factor of the update.
        index: Numbers of the adapted rows.
    """
    with without_autocast(matrix.device.type):
        return _roots(torch.cat([*_squared_norms(matrix, A, B, scaling, index)]))


def _squared_norms(matrix: Tensor, A: Tensor, B: Tensor, scaling: float, index: Tensor | None) -> Iterator[Tensor]:
    """Yield the squares of the norms, for some rows at a time."""
    gram = A @ A.T
    step = B.shape[0] if is_traced() or is_sharded(matrix) else at_once(matrix) // max(1, matrix.shape[1])
    for start in range(0, B.shape[0], max(1, step)):
        here = slice(start, start + step)
        rows = matrix[here] if index is None else matrix.index_select(0, index[here])
        # In float32: where the update cancels most of a row, bfloat16 would leave nothing but rounding.
        crossed = ((rows.to(A.dtype) @ A.T) * B[here]).sum(1)
        update = ((B[here] @ gram) * B[here]).sum(1)
        yield _squares(rows, A.dtype) + 2 * scaling * crossed + scaling**2 * update


def _squares(matrix: Tensor, dtype: torch.dtype) -> Tensor:
    return cast(Tensor, torch.linalg.vector_norm(matrix, dim=1, dtype=dtype)).square()


def _roots(squares: Tensor) -> Tensor:
    return squares.clamp_min(torch.finfo(squares.dtype).tiny).sqrt()  # a row of zeros has no direction to rescale


def rescaled(total: Tensor, ratio: Tensor, bias: Tensor | None) -> Tensor:
    """Return a layer's output with every feature rescaled, except for the layer's bias.

    Args:
        total: Output of the layer with its update.
        ratio: ``m / n`` of every feature, shaped to multiply the output.
        bias: The layer's own bias, shaped likewise.
    """
    # Backward keeps one tensor of the output's size: the product of input and summed weight.
    if bias is None:
        return (total * ratio).to(total.dtype)
    bias = bias.to(total.dtype)
    # Added as a change, which is zero at the start: a new magnitude keeps the output bit for bit.
    if is_traced():
        return (total + (ratio - 1.0) * (total - bias)).to(total.dtype)
    arguments = total.detach(), total - bias.detach(), ratio, bias
    return cast(Tensor, _Rescaled.apply(*arguments))  # type: ignore[no-untyped-call]


class _Rescaled(torch.autograd.Function):
    """``ratio * product + bias`` as ``total + (ratio - 1) * product``, where the product is the total less the bias.

    Gradients go to the product, through which they reach the total and with it the bias: ``ratio`` times the output's,
    since that of a sum of 1 and ``ratio - 1`` would be rounded twice. The bias, which may train, lacks the rest.
    """

    @staticmethod
    @override
    def forward(ctx: Any, total: Tensor, product: Tensor, ratio: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(product, ratio)
        ctx.bias_shape, ctx.bias_dtype = bias.shape, bias.dtype
        return (total + (ratio - 1.0) * product).to(total.dtype)

    @staticmethod
    @override
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        product, ratio = ctx.saved_tensors
        scaled, dbias = dy * ratio, None
        if ctx.needs_input_grad[3]:
            dbias = (dy - scaled).sum_to_size(ctx.bias_shape).to(ctx.bias_dtype)
        return None, scaled.to(product.dtype), (dy * product).to(ratio.dtype).sum_to_size(ratio.shape), dbias
