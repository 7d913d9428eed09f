"""Plain attributes that a training step sets, such as a counter: each adapter of a sweep has its own."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from lightning.pytorch import LightningModule
from torch import Tensor, nn

Place = tuple[nn.Module, str]  # a module and the name of its attribute

_PLAIN = (bool, int, float, complex, str, tuple, type(None), Tensor)
_OF_LIBRARIES = ("torch.", "torchmetrics.", "lightning_lora.")  # modules whose attributes no step sets
_RESERVED = {*vars(nn.Module()), *vars(LightningModule())}
_ABSENT = object()


class OwnAttributes:
    """Gives each adapter the values that its own steps have set, as buffers that steps move are each adapter's own.

    What hooks set that run once for all adapters is set for all. Lists and other containers are shared, and so are
    tensors that a step changes in place without being buffers.

    Args:
        module: The module.
        names: The adapters.
    """

    def __init__(self, module: nn.Module, names: Sequence[str]) -> None:
        self._parts = own_parts(module)
        self._own: dict[str, dict[Place, Any]] = {name: {} for name in names}
        self._left: dict[Place, Any] = {}  # what the last step has left in place

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
        before = plain_attributes(self._parts)
        for place in self._left:
            _write(place, self._own[name][place])
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
    return [part for part in module.modules() if not type(part).__module__.startswith(_OF_LIBRARIES)]


def plain_attributes(parts: Iterable[nn.Module]) -> dict[Place, Any]:
    """Return the attributes of modules that hold plain values or tensors of their own."""
    return {
        (part, key): value
        for part in parts
        for key, value in vars(part).items()
        if key not in _RESERVED and isinstance(value, _PLAIN) and not key.startswith(("lora", "_lora"))
    }


def changed_attributes(before: Mapping[Place, Any], after: Mapping[Place, Any]) -> list[Place]:
    """Return the places that have other values than before."""
    return [place for place, value in after.items() if before.get(place, _ABSENT) is not value]


def _read(place: Place) -> Any:
    part, key = place
    return vars(part).get(key, _ABSENT)


def _write(place: Place, value: Any) -> None:
    part, key = place
    if value is _ABSENT:
        vars(part).pop(key, None)
    else:
        vars(part)[key] = value
