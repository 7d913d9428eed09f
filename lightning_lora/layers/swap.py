"""Class swap: a module gains behaviour by changing its class, and keeps its identity, parameters and keys."""

from __future__ import annotations

from typing import Any, ClassVar, TypeAlias, cast

from torch import nn
from typing_extensions import override


class Swapped(nn.Module):
    """Mixin of every class that ``swap_in`` makes; the module's own class comes next in the method order."""

    class_prefix: ClassVar[str]
    base_class: ClassVar[type[nn.Module]]
    mixin: ClassVar[type[Swapped]]
    computed: ClassVar[tuple[str, ...]] = ()  # attributes that the class computes: `read` gives their values

    @override
    def __reduce_ex__(self, protocol: Any) -> Any:
        # A class made at run time cannot be pickled by name: rebuild it from the two that can.
        _, arguments, *state = cast(tuple[Any, ...], super().__reduce_ex__(max(2, int(protocol))))
        return (_rebuild, (self.mixin, self.base_class, self.computed, *arguments[1:]), *state)

    def read(self, name: str) -> Any:
        """Return the value of a computed attribute."""
        raise NotImplementedError

    def restored(self) -> None:
        """Put right what the base class keeps besides its parameters; called when it has its own class again."""


Behaviour: TypeAlias = tuple[type[Swapped], tuple[str, ...]]  # a mixin, and the attributes that it computes

_classes: dict[tuple[type, type, tuple[str, ...]], type[Swapped]] = {}


def swap_in(module: nn.Module, mixin: type[Swapped], computed: tuple[str, ...] = ()) -> None:
    """Give ``module`` the mixin's behaviour on top of its own class.

    Args:
        module: Changed in place.
        mixin: The behaviour.
        computed: Attributes whose values ``mixin.read`` computes from now on.
    """
    # Past nn.Module.__setattr__, which would look for a parameter, a module and a buffer of that name.
    object.__setattr__(module, "__class__", _swapped_class(mixin, type(module), computed))


def swap_out(module: Swapped) -> None:
    """Give ``module`` its own class back."""
    cls = type(module)
    object.__setattr__(module, "__class__", _without(cls))
    cls.restored(module)


def _without(cls: type[Swapped]) -> type[nn.Module]:
    """Return a swapped class without its mixin, also where ``fully_shard`` has made a class of its own on top."""
    if "base_class" in vars(cls):
        return cls.base_class
    bases = tuple(_without(base) if issubclass(base, Swapped) else base for base in cls.__bases__)
    return type(cls.__name__.replace(cls.class_prefix, "", 1), bases, dict(vars(cls)))


def _swapped_class(mixin: type[Swapped], base: type[nn.Module], computed: tuple[str, ...]) -> type[Swapped]:
    key = (mixin, base, computed)
    if key not in _classes:
        namespace: dict[str, Any] = {name: _computed(name) for name in computed}
        namespace |= {
            # The base's module: TransformerEngine's plugin recognises its layers by it.
            "__module__": base.__module__,
            "__doc__": base.__doc__,
            "base_class": base,
            "mixin": mixin,
            "computed": computed,
        }
        _classes[key] = type(f"{mixin.class_prefix}{base.__name__}", (mixin, base), namespace)
    return _classes[key]


def _computed(name: str) -> property:
    return property(lambda self: self.read(name))


def _rebuild(mixin: type[Swapped], base: type[nn.Module], computed: tuple[str, ...], *arguments: Any) -> Swapped:
    cls = _swapped_class(mixin, base, computed)
    return cls.__new__(cls, *arguments)
