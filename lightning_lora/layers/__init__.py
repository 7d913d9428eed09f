"""The adapted layers, one file per geometry, and the choice among them."""

from __future__ import annotations

import functools

from torch import nn

from lightning_lora.layers.base import Adapter, AdapterSpec, LoRALayer, Mode, base_parameter, base_weight
from lightning_lora.layers.conv import ConvAdapter, ConvTransposeAdapter
from lightning_lora.layers.embedding import EmbeddingAdapter
from lightning_lora.layers.linear import Conv1DAdapter, LinearAdapter
from lightning_lora.layers.norm import FrozenNorm, has_running_statistics
from lightning_lora.layers.swap import Swapped, swap_in, swap_out
from lightning_lora.layers.weight import AdapterGroup, ParameterAdapter, WeightLoRALayer, parameter_adapter, swapped_as
from lightning_lora.targets import clean_name, join

ADAPTERS: tuple[type[Adapter], ...] = (
    LinearAdapter,
    Conv1DAdapter,
    EmbeddingAdapter,
    ConvAdapter,
    ConvTransposeAdapter,
    ParameterAdapter,
)
SUPPORTED = (
    "nn.Linear and its subclasses, transformers' Conv1D, nn.Embedding, nn.EmbeddingBag, nn.Conv1d/2d/3d, "
    "nn.ConvTranspose1d/2d/3d, nn.MultiheadAttention, nn.LSTM/GRU/RNN and their cells, nn.Bilinear"
)


def adapter_type(module: nn.Module) -> type[Adapter] | None:
    """Return the adapter for this kind of module, or None if the kind cannot be adapted."""
    return next((adapter for adapter in ADAPTERS if adapter.accepts(module)), None)


_NEEDED = frozenset({"lora", "lora_mode", "lora_original", "rank", "scaling", "delta_weight"})


def taken_names(module: nn.Module) -> frozenset[str]:
    """Return the names of an adapted layer's own attributes that this module already uses for something else."""
    by_class = _taken_by_class(type(module))  # type: ignore[arg-type] # for mypy, Module's own hash
    places = (vars(module), module._parameters, module._buffers, module._modules)
    return by_class.union(*(place.keys() & _NEEDED for place in places if not place.keys().isdisjoint(_NEEDED)))


@functools.cache
def _taken_by_class(kind: type) -> frozenset[str]:
    return frozenset(name for name in _NEEDED if hasattr(kind, name))


def lora_layers(module: nn.Module) -> dict[str, LoRALayer]:
    """Return the adapted layers of a model by name; by type, so a user's ``lora_head`` is none."""
    return {clean_name(name): part for name, part in module.named_modules() if isinstance(part, LoRALayer)}


def all_adapters(module: nn.Module) -> dict[str, Adapter]:
    """Return every adapter by the name of its layer, with the parameter's name where the layer has several."""
    return {
        join(name, key) if isinstance(layer.lora, AdapterGroup) else name: adapter
        for name, layer in lora_layers(module).items()
        for key, adapter in layer.adapters().items()
    }


__all__ = [
    "SUPPORTED",
    "Adapter",
    "AdapterGroup",
    "AdapterSpec",
    "FrozenNorm",
    "LinearAdapter",
    "LoRALayer",
    "Mode",
    "ParameterAdapter",
    "Swapped",
    "WeightLoRALayer",
    "adapter_type",
    "all_adapters",
    "base_parameter",
    "base_weight",
    "has_running_statistics",
    "lora_layers",
    "parameter_adapter",
    "swap_in",
    "swap_out",
    "swapped_as",
    "taken_names",
]
