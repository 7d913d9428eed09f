"""Lightning has two import names, ``lightning.pytorch`` and ``pytorch_lightning``: the same classes, made twice."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.model_helpers import is_overridden
from typing_extensions import override

IMPORT_NAMES = ("lightning.pytorch", "pytorch_lightning")
_TWINS = {"lightning.pytorch": "pytorch_lightning", "lightning.fabric": "lightning_fabric"}


def with_twins(*kinds: type) -> tuple[type, ...]:
    """Return classes of Lightning, and their twins under the other name if a program has imported these."""
    return (*kinds, *(twin for kind in kinds if (twin := _twin(kind)) is not None))


def import_name(thing: object) -> str | None:
    """Return under which of the two names the class of a thing knows Lightning, or None."""
    places = [f"{kind.__module__}." for kind in type(thing).__mro__]
    return next((name for place in places for name in IMPORT_NAMES if place.startswith(f"{name}.")), None)


def overrides(module: LightningModule, method: str) -> bool:
    """Return whether a LightningModule defines a method of its own."""
    [parent] = [kind for kind in with_twins(LightningModule) if isinstance(module, kind)]
    return is_overridden(method, module, parent)


def change_both(place: str, change: Callable[[ModuleType], None]) -> None:
    """Change a module of ``lightning.pytorch``, and its twin now or when a program imports it."""
    first, second = (f"{name}.{place}" for name in IMPORT_NAMES)
    change(importlib.import_module(first))
    if second in sys.modules:
        change(sys.modules[second])
    else:
        sys.meta_path.insert(0, _Watch(second, change))


class _Watch(MetaPathFinder):
    """Changes a module when it is imported, once."""

    def __init__(self, name: str, change: Callable[[ModuleType], None]) -> None:
        self.name, self.change = name, change

    @override
    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != self.name:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_and_change(module: ModuleType) -> None:
                execute(module)
                self.change(module)

            spec.loader.exec_module = execute_and_change  # type: ignore[method-assign]
        return spec


def _twin(kind: type) -> type | None:
    for name, other in _TWINS.items():
        if kind.__module__.startswith(f"{name}."):
            place = sys.modules.get(other + kind.__module__.removeprefix(name))
            return getattr(place, kind.__name__, None)
    return None
