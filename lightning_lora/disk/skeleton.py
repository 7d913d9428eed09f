"""A model of which nothing is known but the names and shapes of its tensors: enough to attach adapters to it.

Its modules compute nothing, and each parameter is one zero that is seen many times, so that it takes no memory. What
reads adapters and merges them works on it as on a real model, so merging on disk cannot differ from merging in memory.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from lightning_lora.layers import adapter_of_kind
from lightning_lora.storage.safetensors import Layout

_DEEPEST = 64


def build_skeleton(layouts: Mapping[str, Layout], kinds: Mapping[str, str]) -> nn.Module:
    """Return a module with parameters of these names and shapes.

    Args:
        layouts: Name -> shape and precision.
        kinds: Path of a module -> the kind of its layer, as its adapter states it; all others are plain modules.

    Raises:
        ValueError: A name cannot be that of a parameter, or a weight has not the dimensions of its kind.
    """
    modules: dict[str, nn.Module] = {"": nn.Module()}
    for name, layout in layouts.items():
        path, _, key = name.rpartition(".")
        try:
            _put(_module_at(path, modules, layouts, kinds), key, layout)
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"The base holds a tensor of the impossible name {name!r}.") from error
    return modules[""]


def _module_at(
    path: str, modules: dict[str, nn.Module], layouts: Mapping[str, Layout], kinds: Mapping[str, str]
) -> nn.Module:
    if path.count(".") > _DEEPEST:
        raise KeyError(path)
    if path not in modules:
        above, _, last = path.rpartition(".")
        kind = kinds.get(path)
        made = nn.Module() if kind is None else _stand_in(path, kind, layouts)
        _module_at(above, modules, layouts, kinds).add_module(last, made)
        modules[path] = made
    return modules[path]


def _stand_in(path: str, kind: str, layouts: Mapping[str, Layout]) -> nn.Module:
    layout = layouts.get(f"{path}.weight")
    shape, adapter = layout.shape if layout else (), adapter_of_kind(kind)
    try:
        with torch.device("meta"):
            return adapter.stand_in(shape)
    except ValueError as error:
        raise ValueError(f"{path}: a weight of the shape {shape} cannot take an adapter of this kind.") from error


def _put(module: nn.Module, key: str, layout: Layout) -> None:
    tensor = torch.zeros((), dtype=layout.dtype).expand(layout.shape)
    is_mask = "bias" in key and len(layout.shape) != 1  # GPT-2's attention has one of this name
    if is_mask or not (layout.dtype.is_floating_point or key in module._parameters):
        module.register_buffer(key, tensor)
    elif key in module._parameters:
        module._parameters[key] = nn.Parameter(tensor, requires_grad=False)
    else:
        module.register_parameter(key, nn.Parameter(tensor, requires_grad=False))
