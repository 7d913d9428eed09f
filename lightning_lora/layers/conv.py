"""Convolutions of one to three dimensions, also transposed: the update is a low-rank update of the kernel.

Letters: ``g`` groups, ``r`` rank, ``K`` kernel sizes. A kernel is read as a matrix by flattening all but its first
dimension, so the update of a grouped kernel is a grouped kernel, and merges. Source: the factorization of the kernel is
that of loralib and PEFT for one group; for several, ``A`` is shared by the groups.
"""

from __future__ import annotations

import inspect
import math
from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from typing_extensions import override

from lightning_lora.layers.adapter import base_weight, register_adapter
from lightning_lora.layers.lora_layer import reads_weight
from lightning_lora.layers.low_rank import LowRankAdapter, as_computed
from lightning_lora.ops.conv import Convolution, composed, conv_update, keeps_less, pointwise

_LAYERS: dict[int, Callable[..., nn.Module]] = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}


_PATCHES_AT_ONCE = 4096  # of a batch: more would say little that is new, since patches overlap


def _batched(images: Tensor, dimensions: int) -> Tensor:
    """Return ``(channels, ...)`` as a batch of one."""
    return images.unsqueeze(0) if images.ndim == dimensions + 1 else images


class _KernelAdapter(LowRankAdapter):
    """The common base of both: two convolutions for the update, and the kernel read as a matrix."""

    is_explicit = True  # the options describe the convolution completely

    @override
    def prepare(self, module: nn.Module, parameter: str) -> None:
        assert isinstance(module, _ConvNd)
        self.kernel = tuple(base_weight(module).shape)
        self.kernel_shape = self.kernel[1:]
        self.stride, self.dilation, self.groups = module.stride, module.dilation, module.groups
        self.padding = module.padding
        self.trailing_dimensions = len(self.kernel) - 2

    def for_groups(self, A: Tensor) -> Tensor:
        """Return A as a kernel that every group has, ``(g * r, channels, *K)``."""
        kernel = A.view(-1, *self.kernel[1:])
        return kernel if self.groups == 1 else kernel.repeat(self.groups, *[1] * (kernel.ndim - 1))

    @abstractmethod
    def convolutions(self, inputs: Tensor, output: Tensor) -> tuple[Convolution, Convolution]:
        """Return the options of both convolutions."""

    @abstractmethod
    def kernels(self, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
        """Return the kernels of both convolutions."""

    def padded(self, inputs: Tensor) -> Tensor:
        """Return the inputs with the padding that a convolution's options cannot express."""
        return inputs

    @override
    def update(self, inputs: Tensor, output: Tensor) -> Tensor:
        first, second = self.convolutions(inputs, output)
        dropout, scaling = self.dropout_now(), self.spec.scaling
        A, B = self.factors()
        if self.rank == 0:  # a convolution needs a channel; in the graph, so that gradients are zero and not missing
            return (A.sum() + B.sum()).to(output.dtype).expand_as(output)
        if self.is_explicit and keeps_less(inputs, A, B, dropout, self.trailing_dimensions):
            down, up = self.kernels(A, B)
            return conv_update(inputs, down, up, (first, second), scaling=scaling, dropout=dropout)
        inputs = self.padded(self.dropped(inputs))
        down, up = self.kernels(*as_computed(A, B, inputs))
        return composed(composed(inputs, down, first) * scaling, up, second)

    @override
    def record(self, layer: nn.Module) -> dict[str, Any]:
        found = super().record(layer)
        if found["kind"] is None:  # what else would tell how to read the factors
            found |= {"kernel": list(self.kernel_shape), "writes_kernel": self.writes_kernel}
        return found

    @override
    def as_matrix(self, weight: Tensor) -> Tensor:
        return weight.flatten(1)

    @override
    def as_stored(self, matrix: Tensor) -> Tensor:
        return matrix.view(self.kernel)


class ConvAdapter(_KernelAdapter):
    """``y += scaling * B @ conv(dropout(x), A)``: a convolution to ``r`` channels a group, then a 1x1 one.

    ``A`` is ``(r, in/g * prod(K))`` and ``B`` is ``(out, r)``.
    """

    kind = "conv"
    takes_bias = True

    @classmethod
    @override
    def needs_weight(cls, module: nn.Module) -> bool:
        return _has_own_forward(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d))

    @override
    def prepare(self, module: nn.Module, parameter: str) -> None:
        super().prepare(module, parameter)
        self.padding_mode = cast(_ConvNd, module).padding_mode
        self.padding_by_side = tuple(cast(Any, module)._reversed_padding_repeated_twice)
        self.is_explicit = self.padding_mode == "zeros" and not isinstance(self.padding, str)

    @override
    def convolutions(self, inputs: Tensor, output: Tensor) -> tuple[Convolution, Convolution]:
        none = (0,) * self.trailing_dimensions
        padding = self.padding if self.padding_mode == "zeros" else none
        first = Convolution(self.stride, padding, self.dilation, self.groups, False, none)
        return first, pointwise(self.trailing_dimensions, self.groups)

    @override
    def padded(self, inputs: Tensor) -> Tensor:
        if self.padding_mode == "zeros":
            return inputs
        return F.pad(inputs, self.padding_by_side, mode=self.padding_mode)  # as the layer does it

    @override
    def tokens_in(self, layer: nn.Module, inputs: Sequence[Any]) -> Tensor | None:
        """Return the patches under the kernel, of every group; of large images, at regular distances."""
        found, size = _batched(inputs[0], self.trailing_dimensions), self.kernel[2:]
        found = F.pad(found, self.padding_by_side) if self.padding_mode == "zeros" else self.padded(found)
        for dimension, (taps, step, gap) in enumerate(zip(size, self.stride, self.dilation, strict=True), 2):
            found = found.unfold(dimension, (taps - 1) * gap + 1, step)[..., ::gap]
        found = self._some_places(found)  # (n, channels, *places, *K)
        places = [*range(2, 2 + self.trailing_dimensions)]
        kernel = [each + self.trailing_dimensions for each in places]
        found = found.reshape(len(found), self.groups, -1, *found.shape[2:])  # (n, g, channels / g, *places, *K)
        found = found.permute(0, *(each + 1 for each in places), 1, 2, *(each + 1 for each in kernel))
        patches: Tensor = found.reshape(len(found), -1, math.prod(self.kernel[1:]))
        return patches

    @override
    def tokens_out(self, output: Tensor) -> Tensor | None:
        if self.groups > 1:
            return None  # a patch of one group says nothing of the outputs of another
        return self._some_places(_batched(output, self.trailing_dimensions)).flatten(2).transpose(1, 2)

    def _some_places(self, tensor: Tensor) -> Tensor:
        """Return every so many places of a feature map: as many as do for a batch."""
        places = tensor.shape[2 : 2 + self.trailing_dimensions]
        step = math.ceil((len(tensor) * math.prod(places) / _PATCHES_AT_ONCE) ** (1 / self.trailing_dimensions))
        for dimension in range(2, 2 + self.trailing_dimensions if step > 1 else 2):
            every = torch.arange(0, tensor.shape[dimension], step, device=tensor.device)
            tensor = tensor.index_select(dimension, every)
        return tensor

    @override
    def kernels(self, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
        return self.for_groups(A), B.view(*B.shape, *[1] * self.trailing_dimensions)  # (out, r, 1...)

    @override
    def recorded_shape(self, layer: nn.Module) -> Sequence[int] | None:
        return None if _differs_from_plain(cast(_ConvNd, layer)) or reads_weight(layer, type(self)) else self.kernel

    @classmethod
    @override
    def stand_in(cls, shape: Sequence[int]) -> nn.Module:
        layer_class = _LAYERS.get(len(shape) - 2)
        if layer_class is None:
            raise ValueError(f"A kernel has three to five dimensions, not {len(shape)}.")
        return layer_class(shape[1], shape[0], tuple(shape[2:]), bias=False)

    @classmethod
    @override
    def peft_obstacle(cls, layer: nn.Module, parameter: str, *, use_dora: bool, lora_bias: bool) -> str | None:
        if why := _differs_from_plain(cast(_ConvNd, layer)):
            return why
        if reads_weight(layer, cls):
            return "it has a custom forward, which PEFT's adapter for convolutions ignores"
        kind, plain = getattr(layer, "base_class", type(layer)), cast(_ConvNd, layer)
        try:  # as PEFT makes its A
            sizes = (plain.in_channels, 1, plain.kernel_size, plain.stride, plain.padding)
            inspect.signature(kind).bind(*sizes, bias=False)
        except TypeError:
            return f"PEFT calls {kind.__name__} with the arguments of torch's convolutions, which it does not take"
        return None


def _differs_from_plain(layer: _ConvNd) -> str | None:
    """Return the first option that PEFT's adapter for convolutions does not support, or None."""
    if layer.groups > 1:
        return f"groups={layer.groups}: PEFT's factors mix the groups and do not give an update of the kernel"
    if any(step > 1 for step in layer.dilation):
        return f"dilation={layer.dilation}: PEFT's adapter leaves it out"
    if layer.padding_mode != "zeros":
        return f"padding_mode={layer.padding_mode!r}: PEFT's adapter pads with zeros"
    return None


class ConvTransposeAdapter(_KernelAdapter):
    """``y += scaling * conv_transpose(B.T @ dropout(x), A)``: a 1x1 convolution to ``r`` channels a group first.

    The kernel is ``(in, out/g, *K)``, so ``B`` is ``(in, r)`` and ``A`` is ``(r, out/g * prod(K))``.
    """

    has_output_rows = False
    writes_kernel = True

    @classmethod
    @override
    def peft_obstacle(cls, layer: nn.Module, parameter: str, *, use_dora: bool, lora_bias: bool) -> str | None:
        return "PEFT has no adapter for transposed convolutions"

    @classmethod
    @override
    def needs_weight(cls, module: nn.Module) -> bool:
        return _has_own_forward(module, (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d))

    @override
    def convolutions(self, inputs: Tensor, output: Tensor) -> tuple[Convolution, Convolution]:
        more = self._output_padding(inputs, output)
        second = Convolution(self.stride, self.padding, self.dilation, self.groups, True, more)
        return pointwise(self.trailing_dimensions, self.groups), second

    @override
    def kernels(self, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
        # (in, r) -> (g * r, in/g, 1...): the inputs of each group to its own r channels
        down = B.view(self.groups, -1, B.shape[1]).transpose(1, 2).reshape(-1, self.kernel[0] // self.groups)
        return down.view(*down.shape, *[1] * self.trailing_dimensions), self.for_groups(A)

    def _output_padding(self, inputs: Tensor, output: Tensor) -> list[int]:
        """Return the padding that made this output: the layer's own, or what a call's ``output_size`` asked for."""
        dimensions = self.trailing_dimensions
        sizes = zip(inputs.shape[-dimensions:], output.shape[-dimensions:], self.kernel[2:], strict=True)
        options = zip(self.stride, cast(tuple[int, ...], self.padding), self.dilation, strict=True)
        return [
            out - ((into - 1) * stride - 2 * padding + dilation * (kernel - 1) + 1)
            for (into, out, kernel), (stride, padding, dilation) in zip(sizes, options, strict=True)
        ]


def _has_own_forward(module: nn.Module, kinds: tuple[type[nn.Module], ...]) -> bool:
    """Return whether a subclass has a custom forward, which may pad or standardize the kernel, for example."""
    methods = [name for name in ("forward", "_conv_forward") if hasattr(kinds[0], name)]
    return not any(all(getattr(type(module), m) is getattr(kind, m) for m in methods) for kind in kinds)


register_adapter(_ConvNd, ConvAdapter)
register_adapter(_ConvTransposeNd, ConvTransposeAdapter)
