"""A model that only has shapes, from the headers of a base's files: enough to plan with."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

from lightning_lora.disk.base_folder import BaseFolder, open_base
from lightning_lora.disk.skeleton import build_skeleton
from lightning_lora.names import listed
from lightning_lora.storage.safetensors import Layout

_EMBEDDINGS = ("wte", "wpe", "shared", "relative_attention_bias")
_HEADS = ("lm_head", "embed_out")
_WIDE = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class ShapedModel(NamedTuple):
    """A model without values.

    Attributes:
        module: Modules of the base's names and shapes.
        heads: The output layers of language models, which ``"all-linear"`` leaves out of a loaded model.
        experts: How many of its linear layers are experts; some libraries make stacks of them while loading.
    """

    module: nn.Module
    heads: tuple[str, ...]
    experts: int = 0


def model_of_shapes(path: Path) -> ShapedModel:
    """Return a base as far as its files tell it without its code: no tensor is read.

    A weight of two dimensions is taken for a linear layer, unless its name, or a row for each word of the vocabulary,
    says that it is an embedding or an output layer. Which way round a layer is stored makes no difference for its size.

    Args:
        path: A model's folder, or one file of safetensors.

    Raises:
        ValueError: The files cannot be read, or are quantized.
        FileNotFoundError: There are none.
    """
    base = open_base(path)
    layouts = {name: Layout(tensor.dtype, tensor.shape) for name, tensor in base.tensors.items()}
    kinds = dict(_kinds(layouts))
    if quantized := [name for name in kinds if layouts[f"{name}.weight"].dtype not in _WIDE]:
        raise ValueError(
            f"The weights of {listed(quantized)} are quantized, and have other shapes than their layers; give the "
            "unquantized base."
        )
    heads = tuple(name for name, kind in kinds.items() if kind == "linear" and _is_head(name, base, layouts))
    experts = sum(kind == "linear" and ".experts." in name for name, kind in kinds.items())
    return ShapedModel(build_skeleton(layouts, kinds), heads, experts)


def _kinds(layouts: dict[str, Layout]) -> Iterator[tuple[str, str]]:
    for name, layout in layouts.items():
        path, _, key = name.rpartition(".")
        if key != "weight" or not path:
            continue
        if len(layout.shape) == 2:
            yield path, "embedding" if _is_embedding(path) else "linear"
        elif 3 <= len(layout.shape) <= 5:
            yield path, "conv"


def _is_embedding(path: str) -> bool:
    last = path.rpartition(".")[2]
    return last in _EMBEDDINGS or ("embed" in last and last not in _HEADS)


def _is_head(path: str, base: BaseFolder, layouts: dict[str, Layout]) -> bool:
    words = base.config.get("vocab_size")
    return path.rpartition(".")[2] in _HEADS or layouts[f"{path}.weight"].shape[0] == words
