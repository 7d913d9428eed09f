"""Class swap: a module gains behaviour by changing its class, and keeps its identity, parameters and keys."""

from __future__ import annotations

from typing import Any, ClassVar, cast

from torch import nn
from typing_extensions import override


class Swapped(nn.Module):
    """Mixin of every class that ``swap_in`` makes; the module's own class comes next in the method order."""

    class_prefix: ClassVar[str]
    base_class: ClassVar[type[nn.Module]]
    mixin: ClassVar[type[Swapped]]

    @override
    def __reduce_ex__(self, protocol: Any) -> Any:
        # A class made at run time cannot be pickled by name: rebuild it from the two that can.
        _, arguments, *state = cast(tuple[Any, ...], super().__reduce_ex__(max(2, int(protocol))))
        return (_rebuild, (self.mixin, self.base_class, *arguments[1:]), *state)


_classes: dict[tuple[type, type], type[Swapped]] = {}


def swap_in(module: nn.Module, mixin: type[Swapped]) -> None:
    """Give ``module`` the mixin's behaviour on top of its own class."""
    # Past nn.Module.__setattr__, which would look for a parameter, a module and a buffer of that name.
    object.__setattr__(module, "__class__", _swapped_class(mixin, type(module)))


def swap_out(module: Swapped) -> None:
    """Give ``module`` its own class back."""
    object.__setattr__(module, "__class__", module.base_class)


def _swapped_class(mixin: type[Swapped], base: type[nn.Module]) -> type[Swapped]:
    key = (mixin, base)
    if key not in _classes:
        namespace = {
            # The base's module: TransformerEngine's plugin recognises its layers by it.
            "__module__": base.__module__,
            "__doc__": base.__doc__,
            "base_class": base,
            "mixin": mixin,
        }
        _classes[key] = type(f"{mixin.class_prefix}{base.__name__}", (mixin, base), namespace)
    return _classes[key]


def _rebuild(mixin: type[Swapped], base: type[nn.Module], *arguments: Any) -> Swapped:
    cls = _swapped_class(mixin, base)
    return cls.__new__(cls, *arguments)
