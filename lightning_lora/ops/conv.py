"""The update of a convolution as one operation, which keeps the input, the hidden channels and bits for backward.

Composed of torch's operations, dropout would keep a dropped copy of the input and a mask of its size, and autocast a
copy in its precision for every layer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from typing_extensions import override

from lightning_lora.ops.dropout import alive, kept, random_bits
from lightning_lora.ops.eager import shared_cast, without_autocast
from lightning_lora.ops.linear import compute_dtype, is_fast

_FUNCTIONS: dict[tuple[int, bool], Callable[..., Tensor]] = {
    **{(1, False): F.conv1d, (2, False): F.conv2d, (3, False): F.conv3d},
    **{(1, True): F.conv_transpose1d, (2, True): F.conv_transpose2d, (3, True): F.conv_transpose3d},
}


class Convolution(NamedTuple):
    """The options of one convolution; each sequence has a number for every dimension."""

    stride: Sequence[int]
    padding: Sequence[int] | str
    dilation: Sequence[int]
    groups: int
    is_transposed: bool = False
    output_padding: Sequence[int] = (0,)

    def of(self, x: Tensor, kernel: Tensor) -> Tensor:
        """Return the convolution of x."""
        return cast(Tensor, torch.ops.aten.convolution(x, kernel, None, *self._options()))

    def backward(self, dy: Tensor, x: Tensor, kernel: Tensor, for_x: bool, for_kernel: bool) -> list[Tensor | None]:
        """Return the gradients of x and of the kernel."""
        wanted = [for_x, for_kernel, False]
        dx, dkernel, _ = torch.ops.aten.convolution_backward(dy, x, kernel, None, *self._options(), wanted)
        return [dx, dkernel]

    def _options(self) -> tuple[Any, ...]:
        return self.stride, self.padding, self.dilation, self.is_transposed, self.output_padding, self.groups


def composed(x: Tensor, kernel: Tensor, options: Convolution) -> Tensor:
    """Return the convolution by torch's public function, which autocast and all transforms support."""
    function = _FUNCTIONS[kernel.ndim - 2, options.is_transposed]
    stride, padding, dilation, groups, _, more = options
    if options.is_transposed:
        return function(x, kernel, None, stride, padding, more, groups, dilation)
    return function(x, kernel, None, stride, padding, dilation, groups)


def pointwise(dimensions: int, groups: int) -> Convolution:
    """Return a convolution over channels alone."""
    return Convolution((1,) * dimensions, (0,) * dimensions, (1,) * dimensions, groups, False, (0,) * dimensions)


def keeps_less(x: Tensor, A: Tensor, B: Tensor, dropout: float, dimensions: int) -> bool:
    """Return whether ``conv_update`` applies and keeps less than the composition."""
    if x.ndim != dimensions + 2 or not (dropout or compute_dtype(x) is not x.dtype):
        return False
    return is_fast(x, A, B, dropout)  # with and without gradients: reentrant checkpointing runs both


def conv_update(
    x: Tensor,
    first: Tensor,
    second: Tensor,
    convolutions: tuple[Convolution, Convolution],
    *,
    scaling: float,
    dropout: float,
) -> Tensor:
    """Return ``second(scaling * first(dropout(x)))``.

    Args:
        x: ``(batch, channels, *sizes)``.
        first: Kernel of the first convolution.
        second: Kernel of the second.
        convolutions: The options of both.
        scaling: Factor of the update.
        dropout: Probability of dropping an element of x.
    """
    how = _How(*convolutions, scaling, dropout, compute_dtype(x))
    x = shared_cast(x, how.dtype)
    with without_autocast(x.device.type):
        return cast(Tensor, _ConvUpdate.apply(x, first, second, how))  # type: ignore[no-untyped-call]


class _How(NamedTuple):
    first: Convolution
    second: Convolution
    scaling: float
    dropout: float
    dtype: torch.dtype

    @property
    def alpha(self) -> float:
        return self.scaling / kept(self.dropout) if self.dropout else self.scaling


class _ConvUpdate(torch.autograd.Function):
    @staticmethod
    @override
    def forward(ctx: Any, x: Tensor, first: Tensor, second: Tensor, how: _How) -> Tensor:
        bits = None
        if how.dropout:
            width = x[0].numel()
            like = torch.empty(len(x), (width + 7) // 8, dtype=torch.uint8, device=x.device)
            bits = random_bits(like, how.dropout).clone()
        hidden = how.alpha * how.first.of(_masked(x, bits), first.to(how.dtype))
        ctx.save_for_backward(x, first, second, hidden, bits)
        ctx.how = how
        return how.second.of(hidden, second.to(how.dtype))

    @staticmethod
    @override
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, first, second, hidden, bits = ctx.saved_tensors
        for_x, for_first, for_second, _ = ctx.needs_input_grad
        how: _How = ctx.how
        with without_autocast(dy.device.type):
            dropped, down, up = _masked(x, bits), first.to(how.dtype), second.to(how.dtype)
            if torch.is_grad_enabled():
                hidden = how.alpha * how.first.of(dropped, down)  # a function of x again, for gradients of gradients
            dhidden, dsecond = how.second.backward(dy, hidden, up, for_x or for_first, for_second)
            dx = dfirst = None
            if dhidden is not None:
                dx, dfirst = how.first.backward(how.alpha * dhidden, dropped, down, for_x, for_first)
            dx = None if dx is None else _masked(dx, bits)
        return dx, _as(dfirst, first), _as(dsecond, second), None


def _masked(x: Tensor, bits: Tensor | None) -> Tensor:
    if bits is None:
        return x
    return x * alive(bits, x[0].numel(), x.dtype).reshape(x.shape)


def _as(gradient: Tensor | None, like: Tensor) -> Tensor | None:
    return None if gradient is None else gradient.to(like.dtype)
