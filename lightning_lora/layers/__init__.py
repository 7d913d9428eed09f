"""The adapted layers, one file per geometry, and the choice among them."""

from __future__ import annotations

from torch import nn

from lightning_lora.layers.base import Adapter, AdapterSpec, LoRALayer, Mode, base_weight
from lightning_lora.layers.embedding import EmbeddingAdapter
from lightning_lora.layers.linear import Conv1DAdapter, LinearAdapter
from lightning_lora.layers.norm import FrozenNorm, has_running_statistics
from lightning_lora.layers.swap import Swapped, swap_in, swap_out

ADAPTERS: tuple[type[Adapter], ...] = (LinearAdapter, Conv1DAdapter, EmbeddingAdapter)
SUPPORTED = "nn.Linear and its subclasses, transformers' Conv1D, nn.Embedding"


def adapter_type(module: nn.Module) -> type[Adapter] | None:
    """Return the adapter for this kind of module, or None if the kind cannot be adapted."""
    return next((adapter for adapter in ADAPTERS if adapter.accepts(module)), None)


__all__ = [
    "SUPPORTED",
    "Adapter",
    "AdapterSpec",
    "FrozenNorm",
    "LoRALayer",
    "Mode",
    "Swapped",
    "adapter_type",
    "base_weight",
    "has_running_statistics",
    "swap_in",
    "swap_out",
]
