"""Layers whose weight itself must carry the update, because something else than the layer's kind decides its use."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from lightning_lora.layers.base import LoRALayer, base_weight


class WeightLoRALayer(LoRALayer):
    """An adapted layer whose ``weight`` reads as base plus update; its own forward runs unchanged.

    Exact for any forward that reads the weight, at the price of forming the update at every read. The base stays in
    place under its own key.
    """

    @property
    def weight(self) -> Tensor:
        """The weight that the layer computes with: the very value that merging would leave."""
        base = base_weight(self)
        if self.lora_mode != "active":
            return base
        delta = self.lora.delta_weight()
        dtype = torch.promote_types(base.dtype, delta.dtype)
        return (base.to(dtype) + delta.to(dtype)).to(base.dtype)

    @override
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return super(LoRALayer, self).forward(*args, **kwargs)
