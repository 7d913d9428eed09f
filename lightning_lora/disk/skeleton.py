"""A model of which nothing is known but the names and shapes of its tensors: enough to attach adapters to it.

Its modules compute nothing, and each parameter is one zero that is seen many times, so that it takes no memory. What
reads adapters and merges them works on it as on a real model, so merging on disk cannot differ from merging in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from lightning_lora.storage.safetensors import Layout

_DEEPEST = 64


class StoredConv1D(nn.Module):
    """Stands for transformers' ``Conv1D``, by the two attributes by which such a layer is known."""

    weight: Tensor

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.nx, self.nf = shape[0], shape[-1]


class TransposedStack(nn.Module):
    """Stands for experts of which each weight is stored as (in, out)."""

    is_transposed = True


def _linear(shape: tuple[int, ...]) -> nn.Module:
    return nn.Linear(shape[1], shape[0], bias=False, device="meta")


def _embedding(shape: tuple[int, ...]) -> nn.Module:
    return nn.Embedding(shape[0], shape[1], device="meta")


def _conv(shape: tuple[int, ...]) -> nn.Module:
    kind: Callable[..., nn.Module] = {3: nn.Conv1d, 4: nn.Conv2d, 5: nn.Conv3d}[len(shape)]
    return kind(shape[1], shape[0], shape[2:], bias=False, device="meta")


def _transposed_stack(shape: tuple[int, ...]) -> nn.Module:  # noqa: ARG001 - one signature for all kinds
    return TransposedStack()


KINDS: dict[str, tuple[tuple[int, ...], Callable[[tuple[int, ...]], nn.Module]]] = {
    "linear": ((2,), _linear),
    "conv1d": ((2,), StoredConv1D),
    "embedding": ((2,), _embedding),
    "conv": ((3, 4, 5), _conv),
    "transposed stack": ((), _transposed_stack),
}


def build_skeleton(layouts: Mapping[str, Layout], kinds: Mapping[str, str]) -> nn.Module:
    """Return a module with parameters of these names and shapes.

    Args:
        layouts: Name -> shape and precision.
        kinds: Path of a module -> what it is, one of ``KINDS``; all others are plain modules.

    Raises:
        ValueError: A name cannot be that of a parameter, or a weight has not the dimensions of its kind.
    """
    modules: dict[str, nn.Module] = {"": nn.Module()}
    for path, kind in kinds.items():
        dimensions, _ = KINDS[kind]
        shape = layouts[f"{path}.weight"].shape if dimensions else ()
        if dimensions and len(shape) not in dimensions:
            raise ValueError(f"{path}: a weight of the shape {shape} cannot take an adapter of this kind.")
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
        made = nn.Module() if kind is None else KINDS[kind][1](_weight_shape(path, layouts))
        _module_at(above, modules, layouts, kinds).add_module(last, made)
        modules[path] = made
    return modules[path]


def _weight_shape(path: str, layouts: Mapping[str, Layout]) -> tuple[int, ...]:
    layout = layouts.get(f"{path}.weight")
    return layout.shape if layout else ()


def _put(module: nn.Module, key: str, layout: Layout) -> None:
    tensor = torch.zeros((), dtype=layout.dtype).expand(layout.shape)
    is_mask = "bias" in key and len(layout.shape) != 1  # GPT-2's attention has one of this name
    if is_mask or not (layout.dtype.is_floating_point or key in module._parameters):
        module.register_buffer(key, tensor)
    elif key in module._parameters or (isinstance(module, StoredConv1D) and key == "weight"):
        module._parameters[key] = nn.Parameter(tensor, requires_grad=False)
    else:
        module.register_parameter(key, nn.Parameter(tensor, requires_grad=False))
