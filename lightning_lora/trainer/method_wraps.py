"""Methods of a module that do something more for a while."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

from torch import nn

Module = TypeVar("Module", bound=nn.Module)


class MethodWraps:
    """Wraps on instances of modules, taken off again for good and in the right order."""

    def __init__(self) -> None:
        self._wrapped: list[tuple[nn.Module, str]] = []

    def after(self, module: Module, name: str, afterwards: Callable[[Module, Any], None]) -> None:
        """Have ``afterwards(module, result)`` run whenever this method of the module has run."""
        method = getattr(module, name)

        @functools.wraps(method)  # keeps Lightning's is_overridden right
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            result = method(*args, **kwargs)
            afterwards(module, result)
            return result

        setattr(module, name, wrapper)
        self._wrapped.append((module, name))

    def remove(self) -> None:
        """Take every wrap off."""
        for module, name in reversed(self._wrapped):
            wrapper = vars(module).pop(name, None)
            method = getattr(wrapper, "__wrapped__", None)
            if method is not None and getattr(method, "__func__", None) is not getattr(type(module), name, None):
                setattr(module, name, method)  # it stood on the instance before, as LightningCLI's do
        self._wrapped.clear()
