"""The adapted layers, one file per geometry; ``adapter_type`` in ``adapter.py`` chooses among them.

A new kind is a file that is imported here and named in ``SUPPORTED``.
"""

from __future__ import annotations

from torch import nn

from lightning_lora.config import ALL_CONV, ALL_LINEAR, EVERYTHING
from lightning_lora.layers.adapter import (
    Adapter,
    AdapterSpec,
    adapter_of_kind,
    adapter_type,
    base_parameter,
    base_weight,
    register_adapter,
)
from lightning_lora.layers.conv import ConvAdapter, ConvTransposeAdapter
from lightning_lora.layers.embedding import EmbeddingAdapter, TokenAdapter, swapped_as_follower
from lightning_lora.layers.linear import Conv1DAdapter, LinearAdapter
from lightning_lora.layers.lora_layer import AdapterGroup, LoRALayer, Mode, Swapped, swap_in, swap_out, taken_names
from lightning_lora.layers.low_rank import LowRankAdapter
from lightning_lora.layers.norm import (
    NORMALIZING,
    FrozenNorm,
    has_running_statistics,
    hold_statistics,
    release_statistics,
    weights_only_read,
)
from lightning_lora.layers.readers import weight_readers
from lightning_lora.layers.weight import ParameterAdapter, WeightLoRALayer, parameter_adapter, swapped_as
from lightning_lora.names import walk
from lightning_lora.sharding import unwrapped

SUPPORTED = (
    "nn.Linear, its subclasses and layers that prove to compute the same, transformers' Conv1D, nn.Embedding, "
    "nn.EmbeddingBag, nn.Conv1d/2d/3d, nn.ConvTranspose1d/2d/3d, nn.MultiheadAttention, nn.LSTM/GRU/RNN and their "
    "cells, nn.Bilinear"
)


def family_of(adapter: type[Adapter], module: nn.Module) -> str:
    """Return the narrowest word of ``LoRAConfig.target_modules`` that means a module with this kind of adapter."""
    if adapter.in_all_linear(module):
        return ALL_LINEAR
    return ALL_CONV if issubclass(adapter, (ConvAdapter, ConvTransposeAdapter)) else EVERYTHING


def lora_layers(module: nn.Module) -> dict[str, LoRALayer]:
    """Return the adapted layers of a model by name; by type, so a user's ``lora_head`` is none."""
    return {name: part for name, part in walk(unwrapped(module)) if isinstance(part, LoRALayer)}


__all__ = [
    "NORMALIZING",
    "SUPPORTED",
    "Adapter",
    "AdapterGroup",
    "AdapterSpec",
    "Conv1DAdapter",
    "ConvAdapter",
    "ConvTransposeAdapter",
    "EmbeddingAdapter",
    "FrozenNorm",
    "LinearAdapter",
    "LoRALayer",
    "LowRankAdapter",
    "Mode",
    "ParameterAdapter",
    "Swapped",
    "TokenAdapter",
    "WeightLoRALayer",
    "adapter_of_kind",
    "adapter_type",
    "base_parameter",
    "base_weight",
    "family_of",
    "has_running_statistics",
    "hold_statistics",
    "lora_layers",
    "parameter_adapter",
    "register_adapter",
    "release_statistics",
    "swap_in",
    "swap_out",
    "swapped_as",
    "swapped_as_follower",
    "taken_names",
    "weight_readers",
    "weights_only_read",
]
