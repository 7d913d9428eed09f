"""The tensor that stands for a weight with its update: read like any other, and closed to writing."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator
from typing import Any, cast

import torch
from torch import Tensor
from typing_extensions import override

_HARMLESS = frozenset({"requires_grad_", "detach_", "share_memory_"})
_VIEWS = frozenset(
    {"__getitem__", "chunk", "diagonal", "expand", "flatten", "movedim", "narrow", "permute", "reshape", "select"}
)
_VIEWS |= {"split", "squeeze", "t", "tensor_split", "transpose", "unbind", "unflatten", "unsqueeze", "view", "view_as"}
_WRITING = frozenset({"iadd", "iand", "ifloordiv", "ilshift", "imod", "imul", "ior", "ipow", "irshift", "isub"})
_WRITING |= {"itruediv", "setitem"}


class ComputedWeight(Tensor):
    """A weight that carries its adapter's update, so that it is computed anew at every read.

    A write to it would be lost without a word, so it raises unless it changes no value, also through ``data`` and
    through views that are taken by methods. What operations compute from it is an ordinary tensor, and so is what
    ``detach`` returns.
    """

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment] # as of nn.Parameter

    @property  # type: ignore[explicit-override]
    @override
    def data(self) -> Tensor:
        return super().data.as_subclass(ComputedWeight)

    @data.setter
    def data(self, value: Tensor) -> None:
        _refuse_change(self, value)

    @override
    def __iter__(self) -> Iterator[Any]:
        return iter(self.unbind(0))

    @override
    def __deepcopy__(self, memo: Any) -> Tensor:
        return copy.deepcopy(self.as_subclass(Tensor), memo)

    @override
    def __reduce_ex__(self, protocol: Any) -> Any:
        return cast(Any, self.as_subclass(Tensor)).__reduce_ex__(protocol)


def _refuse_change(weight: Tensor, written: Tensor) -> None:
    before = weight.detach()
    if written.requires_grad or written.shape != before.shape or not _same_values(written.to(before), before):
        raise RuntimeError(
            "This weight is written to, but it carries the update of an adapter, so it is computed anew each time it "
            "is read, and what is written would be lost. Train the layer in full with modules_to_save, which lets it "
            "hold what is written, or leave it out with exclude_modules."
        )


def _same_values(one: Tensor, other: Tensor) -> bool:
    return one.is_meta or bool(((one == other) | (one.isnan() & other.isnan())).all())


def _checking(name: str) -> Callable[..., Any]:
    """Return a method in place that writes to a copy, and raises if that differs from this weight afterwards."""
    method = getattr(Tensor, name)

    def write(self: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        copied = self.detach().clone()
        method(copied, *args, **kwargs)
        _refuse_change(self, copied)
        return self

    return write


def _closing(name: str) -> Callable[..., Any]:
    """Return a method that closes what it returns of this weight's memory."""
    method = getattr(Tensor, name)

    def view(self: Tensor, *args: Any, **kwargs: Any) -> Any:
        found = method(self, *args, **kwargs)
        return tuple(_part(self, each) for each in found) if isinstance(found, (tuple, list)) else _part(self, found)

    return view


def _part_of(attribute: Any, weight: Tensor) -> Any:
    return _part(weight, attribute.__get__(weight))


def _part(weight: Tensor, found: Any) -> Any:
    is_part = cast(Any, found.untyped_storage())._cdata == cast(Any, weight.untyped_storage())._cdata
    return found.as_subclass(ComputedWeight) if is_part else found


for _name in (*dir(Tensor), *(f"__{each}__" for each in _WRITING)):
    _is_in_place = _name.endswith("_") and not _name.startswith("_") and _name not in _HARMLESS
    if _is_in_place or _name.strip("_") in _WRITING:
        setattr(ComputedWeight, _name, _checking(_name))
for _name in _VIEWS:
    setattr(ComputedWeight, _name, _closing(_name))
for _name in ("T", "mT", "H", "mH"):
    setattr(ComputedWeight, _name, property(functools.partial(_part_of, getattr(Tensor, _name))))


def closed(weight: Any) -> Any:
    """Return a computed weight that cannot be written to; anything but a plain tensor is returned as it is."""
    return weight.as_subclass(ComputedWeight) if type(weight) is Tensor else weight
