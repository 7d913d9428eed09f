"""The tensor that stands for a weight with its update: read like any other, and closed to writing."""

from __future__ import annotations

import copy
from typing import Any, NoReturn, cast

import torch
from torch import Tensor
from typing_extensions import override

_HARMLESS = frozenset({"requires_grad_", "detach_", "share_memory_"})
_OPERATORS = ("iadd", "iand", "ifloordiv", "ilshift", "imod", "imul", "ior", "ipow", "irshift", "isub", "itruediv")


class ComputedWeight(Tensor):
    """A weight that carries its adapter's update, so that it is computed anew at every read.

    A write to it would be lost without a word, so it raises, also through ``data`` and parts of it. What operations
    return is an ordinary tensor.
    """

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment] # as of nn.Parameter

    @property  # type: ignore[explicit-override]
    @override
    def data(self) -> Tensor:
        return super().data.as_subclass(ComputedWeight)

    @data.setter
    def data(self, _: Tensor) -> NoReturn:
        _refuse()

    @override
    def __getitem__(self, index: Any) -> Tensor:
        part = super().__getitem__(index)
        return part.as_subclass(ComputedWeight) if part._is_view() else part

    @override
    def __setitem__(self, index: Any, value: Any) -> NoReturn:
        _refuse()

    @override
    def __deepcopy__(self, memo: Any) -> Tensor:
        return copy.deepcopy(self.as_subclass(Tensor), memo)

    @override
    def __reduce_ex__(self, protocol: Any) -> Any:
        return cast(Any, self.as_subclass(Tensor)).__reduce_ex__(protocol)


def _refuse(*_: Any, **__: Any) -> NoReturn:
    raise RuntimeError(
        "This weight is written to, but it carries the update of an adapter, so it is computed anew each time it is "
        "read, and what is written would be lost. Train the layer in full with modules_to_save, which lets it hold "
        "what is written, or leave it out with exclude_modules."
    )


for _name in (*dir(Tensor), *(f"__{each}__" for each in _OPERATORS)):
    _is_in_place = _name.endswith("_") and not _name.startswith("_") and _name not in _HARMLESS
    if _is_in_place or _name.strip("_") in _OPERATORS:
        setattr(ComputedWeight, _name, _refuse)


def closed(weight: Any) -> Any:
    """Return a computed weight that cannot be written to; anything but a plain tensor is returned as it is."""
    return weight.as_subclass(ComputedWeight) if type(weight) is Tensor else weight
