"""The adapted layer: what every kind of layer has in common."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from typing_extensions import override

from lightning_lora.layers.adapter import Adapter, InBlocks, base_parameter, blocks
from lightning_lora.layers.swap import Swapped
from lightning_lora.ops.inplace import is_traced, is_unheld
from lightning_lora.sharding import unwrapped, whole

Mode = Literal["active", "disabled", "merged"]


class AdapterGroup(nn.ModuleDict):
    """The adapters of a layer that has several, by the names of the parameters or of the slices that they update."""

    def __init__(self, adapters: Mapping[str, Adapter]) -> None:
        super().__init__(dict(adapters))

    def computes_base(self, layer: nn.Module) -> bool:  # noqa: ARG002 - asked as an Adapter is
        """Return False: each adapter adds to the output of those before it."""
        return False

    @override
    def forward(self, inputs: Tensor, output: Tensor, layer: nn.Module, is_ours: bool = False) -> Tensor:
        for adapter in self._modules.values():
            output = cast(Adapter, adapter)(inputs, output, layer, is_ours)
            is_ours = not is_traced()  # a sum that nobody else has seen
        return output


class LoRALayer(Swapped):
    """A layer that carries a LoRA update; ``isinstance(module, LoRALayer)`` is how anything finds adapted layers.

    Attributes:
        lora: The adapter, with the factors ``lora.A`` and ``lora.B``, or a group of adapters.
        lora_mode: ``"active"`` adds the update in ``forward``, ``"disabled"`` leaves it out, ``"merged"`` means that
            the weight holds it for now (inside ``merged()``).
    """

    class_prefix = "LoRA"
    lora: Any  # an Adapter or an AdapterGroup
    lora_mode: Mode = "active"

    @override
    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        if self.lora_mode != "active":
            return cast(Tensor, super().forward(*args, **kwargs))
        inputs = args[0] if args else next(iter(kwargs.values()))
        lora = self.lora
        if lora.computes_base(self):
            return cast(Tensor, lora(inputs, None, self))
        output = super().forward(*args, **kwargs)
        return cast(Tensor, lora(inputs, output, self, is_unheld(output)))

    def adapters(self) -> dict[str, Adapter]:
        """Return the adapters of this layer by the parameter or the slice that each updates."""
        lora = unwrapped(self.lora)
        if isinstance(lora, AdapterGroup):
            return {key: cast(Adapter, unwrapped(part)) for key, part in lora.items()}
        return {"weight": cast(Adapter, lora)}

    def adapters_of(self, parameter: str) -> list[Adapter]:
        """Return the adapters that update a parameter as a matrix, in their order."""
        return [adapter for adapter in self.adapters().values() if adapter.parameter == parameter]

    def adapted_parameters(self) -> list[str]:
        """Return the names of this layer's parameters that hold the update after merging."""
        adapters = self.adapters().values()
        names = dict.fromkeys(adapter.parameter for adapter in adapters)
        return [*names, "bias"] if any(adapter.spec.lora_bias for adapter in adapters) else list(names)

    def fold(self, parameter: str, value: Tensor, into: Tensor | None = None) -> bool:
        """Add the updates of a parameter to a value of it; return False if that cannot be done. Without gradients.

        Args:
            parameter: Which one.
            value: The parameter as stored: its precision decides how much is summed at once, and so the last bits.
            into: Where the sum goes, laid out as the value; into the value itself if left out.
        """
        parts = sums(value, self.adapters_of(parameter), copied=into is not None and into is not value)
        for part, total in parts or ():
            target = part if into is None else _same_part(into, part, value)
            if total is not target:
                target.copy_(total)
        return parts is not None

    def sums(self, parameter: str) -> Iterable[Tensor]:
        """Return a parameter with the updates in it in parts, which may be small; to be taken without gradients."""
        parts = sums(base_parameter(self, parameter), self.adapters_of(parameter), copied=True)
        return [self.combined(parameter)] if parts is None else (total for _, total in parts)

    def combined(self, parameter: str) -> Tensor:
        """Return a parameter with the updates in it, whole and in its shape; float32, or float64 if either is."""
        value = updated(whole(base_parameter(self, parameter)), self.adapters_of(parameter))
        for adapter in self.adapters().values() if parameter == "bias" else ():
            if (delta := adapter.bias_delta()) is not None:
                value = value.to(torch.promote_types(value.dtype, delta.dtype))
                value = value.index_add(0, adapter.index, delta.to(value.dtype)) if adapter.spec.rows else value + delta
        return value

    @property
    def rank(self) -> int:
        """Rank of the update, of a layer with one."""
        return cast(Adapter, self.lora).spec.rank

    @property
    def scaling(self) -> float:
        """Factor of ``B @ A``, of a layer with one update."""
        return cast(Adapter, self.lora).spec.scaling

    def delta_weight(self, parameter: str = "weight") -> Tensor:
        """Return the update this layer adds to a base weight, in the weight's shape.

        Args:
            parameter: Which weight, of a layer with several.

        Returns:
            Tensor of the weight's shape, float32, or float64 if the factors are.

        Source:
            Hu et al. 2021, arXiv:2106.09685, eq. 3.
        """
        with torch.no_grad():
            weight = whole(base_parameter(self, parameter))
            found = self.adapters_of(parameter)
            if not found:
                raise ValueError(f"{parameter!r} is not adapted; of this layer are {self.adapted_parameters()}.")
            return torch.stack([adapter.delta_weight(weight) for adapter in found]).sum(0)


def updated(weight: Tensor, adapters: Iterable[Adapter]) -> Tensor:
    """Return a weight with the updates of adapters in it; float32, or float64 if either is."""
    for adapter in adapters:
        weight = adapter.combined(weight)
    return weight


def sums(
    weight: Tensor, adapters: Sequence[Adapter], *, copied: bool = False
) -> Iterator[tuple[Tensor, Tensor]] | None:
    """Return a weight's blocks, each with its sum with the updates of adapters; None if it has to be summed whole.

    A sum is that of all updates, in float32 or better, to be rounded once; the next may take its memory. To be taken
    without gradients.

    Args:
        weight: The weight as it is stored.
        adapters: Those that update it.
        copied: Whether no sum may be made in the weight's own memory, as it is where the weight has its precision.
    """
    updates = [adapter.in_blocks(weight) for adapter in adapters]  # all before anything changes
    if not updates or any(update is None for update in updates):
        return None
    return _sums(cast("list[InBlocks]", updates), copied)


def _sums(updates: list[InBlocks], copied: bool) -> Iterator[tuple[Tensor, Tensor]]:
    matrix, scratch = updates[0].matrix, None
    dtype = functools.reduce(torch.promote_types, (update.dtype for update in updates))
    in_one_pass = dtype is matrix.dtype and len(updates) == 1 and updates[0].in_one_pass
    for block in blocks(matrix, in_one_pass=in_one_pass):
        part = total = block.of(matrix)
        if copied or dtype is not matrix.dtype:
            scratch = torch.empty_like(part, dtype=dtype) if scratch is None else scratch
            total = scratch.narrow(1 if block.by_columns else 0, 0, block.length).copy_(part)
        for update in updates:
            update.add(total, block)
        yield part, total


def _same_part(tensor: Tensor, part: Tensor, whole: Tensor) -> Tensor:
    """Return what lies in a tensor where a part lies in a whole of the same layout."""
    place = tensor.storage_offset() + part.storage_offset() - whole.storage_offset()
    return tensor.as_strided(part.shape, part.stride(), place)
