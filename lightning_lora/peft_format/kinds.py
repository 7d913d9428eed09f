"""What a checkpoint says of each adapter's layer, so that a PEFT directory can be made of it without the model."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from lightning_lora.layers import Adapter, LinearAdapter, LoRALayer, ParameterAdapter, WeightLoRALayer
from lightning_lora.layers.conv import ConvAdapter
from lightning_lora.layers.embedding import EmbeddingAdapter
from lightning_lora.layers.linear import Conv1DAdapter
from lightning_lora.layers.weight import ExpertsAdapter

_OWN_WAYS = (nn.MultiheadAttention, nn.RNNBase, nn.RNNCellBase, nn.Bilinear, nn.EmbeddingBag)


def file_kind(layer: LoRALayer, adapter: Adapter) -> dict[str, Any]:
    """Return the kind of an adapter's layer and the shape of its weight; the kind is None where files do not suffice.

    From attributes, not from the weight itself: FSDP hides its shape, and quantisation packs it.

    Returns:
        ``kind``, and unless it is None ``shape``; of a parameter also ``order``, its place among those of its module.
    """
    if isinstance(adapter, ParameterAdapter):
        return _parameter(layer, adapter)
    shape = _shape(layer, adapter)
    if shape is None:
        return {"kind": None}
    kinds = {Conv1DAdapter: "conv1d", LinearAdapter: "linear", ConvAdapter: "conv"}
    kind = next((name for each, name in kinds.items() if isinstance(adapter, each)), "embedding")
    return {"kind": kind, "shape": list(shape)}


def _shape(layer: Any, adapter: Adapter) -> tuple[int, ...] | None:
    if isinstance(adapter, Conv1DAdapter):
        return (layer.nx, layer.nf) if hasattr(layer, "nx") else None
    if isinstance(adapter, LinearAdapter):
        return None if isinstance(layer, NonDynamicallyQuantizableLinear) else (layer.out_features, layer.in_features)
    if isinstance(adapter, ConvAdapter):
        plain = layer.groups == 1 and layer.padding_mode == "zeros" and not any(step > 1 for step in layer.dilation)
        return adapter.kernel if plain and not isinstance(layer, WeightLoRALayer) else None
    if not isinstance(layer, nn.Embedding):
        return None
    own_way = isinstance(layer, WeightLoRALayer) and not hasattr(layer, "embed_scale")
    return None if own_way and isinstance(adapter, EmbeddingAdapter) else (layer.num_embeddings, layer.embedding_dim)


def _parameter(layer: LoRALayer, adapter: ParameterAdapter) -> dict[str, Any]:
    if isinstance(layer, _OWN_WAYS):
        return {"kind": None}
    turned = isinstance(adapter, ExpertsAdapter) and adapter.is_transposed
    order = list(layer._parameters).index(adapter.parameter) if adapter.parameter in layer._parameters else 0
    kind = "transposed stack" if turned else "parameter"
    return {"kind": kind, "shape": list(adapter.parameter_shape), "order": order}
