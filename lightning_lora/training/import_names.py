"""Lightning has two import names, ``lightning.pytorch`` and ``pytorch_lightning``: the same classes, made twice."""

from __future__ import annotations

import sys

from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.model_helpers import is_overridden

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


def _twin(kind: type) -> type | None:
    for name, other in _TWINS.items():
        if kind.__module__.startswith(f"{name}."):
            place = sys.modules.get(other + kind.__module__.removeprefix(name))
            return getattr(place, kind.__name__, None)
    return None
