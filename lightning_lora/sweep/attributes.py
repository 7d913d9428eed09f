"""Plain attributes that a training step sets, such as a counter: each adapter of a sweep has its own."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from lightning.pytorch import LightningModule
from torch import Tensor, nn

Place = tuple[nn.Module, str]  # a module and the name of its attribute

_CONTAINERS = (list, dict, set, deque)
_PLAIN = (bool, int, float, complex, str, tuple, type(None), Tensor, *_CONTAINERS)
_BARE = (nn.Module, nn.Sequential, nn.ModuleList, nn.ModuleDict, nn.Identity)  # which may carry a user's attributes
_OF_LIBRARIES = ("torch.", "torchmetrics.", "lightning_lora.")  # modules whose attributes no step sets
_LIBRARIES = (*_OF_LIBRARIES, "lightning", "pytorch_lightning", "transformers")
_RESERVED = {*vars(nn.Module()), *vars(LightningModule())}
_ABSENT = object()


class OwnAttributes:
    """Gives each adapter the values that its own steps have set, as buffers that steps move are each adapter's own.

    What hooks set that run once for all adapters is set for all. Containers that a step changes in place are shared,
    and so are tensors that are no buffers; ``changed_in_place`` names them.

    Args:
        module: The module.
        names: The adapters.
    """

    def __init__(self, module: nn.Module, names: Sequence[str]) -> None:
        self._parts = own_parts(module)
        self._own: dict[str, dict[Place, Any]] = {name: {} for name in names}
        self._left: dict[Place, Any] = {}  # what the last step has left in place

    def claim(self, places: Iterable[Place]) -> None:
        """Give each adapter copies of buffers that no checkpoint holds, and that steps may change in place."""
        for place in places:
            self._left[place] = _read(place)
            for own in self._own.values():
                own[place] = _copied(self._left[place])

    @contextmanager
    def of(self, name: str) -> Iterator[None]:
        """Have an adapter's values in place inside the block, and note what the block sets."""
        for place, left in self._left.items():
            if (now := _read(place)) is not left:
                for own in self._own.values():
                    own[place] = now
            _write(place, self._own[name][place])
        before = plain_attributes(self._parts)
        try:
            yield
        finally:
            for place in changed_attributes(before, plain_attributes(self._parts)):
                if place not in self._left:
                    for own in self._own.values():
                        own[place] = before.get(place, _ABSENT)
                    self._left[place] = _ABSENT
            for place in self._left:
                self._left[place] = self._own[name][place] = _read(place)

    @contextmanager
    def shown(self, name: str) -> Iterator[None]:
        """Have an adapter's values in place inside the block, and leave no trace of it."""
        before = plain_attributes(self._parts) | {place: _read(place) for place in self._left}
        for place in self._left:
            _write(place, _copied(self._own[name][place]))  # the block may change it in place
        try:
            yield
        finally:
            for place in {*changed_attributes(before, plain_attributes(self._parts)), *self._left}:
                _write(place, before.get(place, _ABSENT))

    @property
    def places(self) -> int:
        """How many attributes are each adapter's own."""
        return len(self._left)


def own_parts(module: nn.Module) -> list[nn.Module]:
    """Return a module and those of its parts that may have attributes that steps set."""
    parts = module.modules()
    return [part for part in parts if type(part) in _BARE or not type(part).__module__.startswith(_OF_LIBRARIES)]


def plain_attributes(parts: Iterable[nn.Module]) -> dict[Place, Any]:
    """Return the attributes of modules that hold plain values, containers, or tensors of their own."""
    return {
        (part, key): value
        for part in parts
        for key, value in vars(part).items()
        if key not in _RESERVED and isinstance(value, _PLAIN) and not key.startswith(("lora", "_lora"))
    }


def changed_attributes(before: Mapping[Place, Any], after: Mapping[Place, Any]) -> list[Place]:
    """Return the places that have other values than before."""
    return [place for place, value in after.items() if before.get(place, _ABSENT) is not value]


def holds_tensors(value: Any) -> bool:
    """Return whether an attribute is a tensor, or a tuple or container of some."""
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, (tuple, *_CONTAINERS)) else ()
    return isinstance(value, Tensor) or any(isinstance(each, Tensor) for each in parts)


def contents(parts: Iterable[nn.Module]) -> dict[Place, Any]:
    """Return what tells whether containers, tensors and helper objects in attributes have been changed in place."""
    every = ((part, key, value) for part in parts for key, value in vars(part).items() if key not in _RESERVED)
    return {(part, key): _content(value) for part, key, value in every if _may_change(value)}


def _may_change(value: Any) -> bool:
    is_helper = hasattr(value, "__dict__") and not type(value).__module__.startswith(_LIBRARIES)
    return isinstance(value, (*_CONTAINERS, Tensor)) or (
        is_helper and not hasattr(type(value), "step")
    )  # as optimizers do


def changed_in_place(before: Mapping[Place, Any], after: Mapping[Place, Any]) -> list[Place]:
    """Return the attributes that hold the same container, tensor or object with another content."""
    kept = {place: then for place, then in before.items() if place in after and after[place][0] == then[0]}
    return [place for place, then in kept.items() if after[place] != then]


def _content(value: Any) -> tuple[int, Any]:
    if isinstance(value, Tensor):
        return id(value), 0 if value.is_inference() else value._version  # the first cannot be changed in training
    values = value if isinstance(value, _CONTAINERS) else vars(value)
    return id(value), [id(each) for each in ([*values, *values.values()] if isinstance(values, Mapping) else values)]


def _copied(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value


def _read(place: Place) -> Any:
    values, key = _values(place)
    return values.get(key, _ABSENT)


def _write(place: Place, value: Any) -> None:
    values, key = _values(place)
    if value is _ABSENT:
        values.pop(key, None)
    else:
        values[key] = value


def _values(place: Place) -> tuple[dict[str, Any], str]:
    part, key = place
    return (part._buffers if key in part._buffers else vars(part)), key
