"""A pass of a model that leaves no trace: how to call it with a batch, and how to put back what the pass changes."""

from __future__ import annotations

import inspect
import random
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_lora.layers import all_adapters

_MODES = ("training", "asked_mode")  # the second is that of a frozen norm


def arguments_for(module: nn.Module, batch: object) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return how ``forward`` is to be called with a batch."""
    parameters = inspect.signature(module.forward).parameters.values()
    if isinstance(batch, Mapping):
        takes_all = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters)
        accepted = {parameter.name for parameter in parameters}
        return (), {key: value for key, value in batch.items() if takes_all or key in accepted}
    if not isinstance(batch, (tuple, list)):
        return (batch,), {}
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    required = [p for p in parameters if p.kind in positional and p.default is p.empty]
    if any(parameter.kind is parameter.VAR_POSITIONAL for parameter in parameters):
        return tuple(batch), {}
    return tuple(batch[: max(1, len(required))]), {}


@torch.no_grad()
def put_back(tensors: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    """Copy values into tensors."""
    for tensor, value in zip(tensors, values, strict=True):
        tensor.copy_(value)


def tensors_in(value: Any) -> Iterator[Tensor]:
    """Yield the floating point tensors in whatever a module returned."""
    if isinstance(value, Tensor):
        if value.is_floating_point():
            yield value
        return
    if isinstance(value, Mapping):
        value = value.values()
    elif is_dataclass(value):
        value = [getattr(value, each.name) for each in fields(value)]
    elif not isinstance(value, (tuple, list)):
        return
    for each in value:
        yield from tensors_in(each)


@contextmanager
def left_as_it_was(module: nn.Module) -> Iterator[None]:
    """Put back the adapters, the buffers and the modes of a module at the end; gradients must not be touched."""
    modes = [(vars(part), {key: vars(part)[key] for key in _MODES if key in vars(part)}) for part in module.modules()]
    trained = [parameter for adapter in all_adapters(module).values() for parameter in adapter.parameters()]
    tensors = [*trained, *module.buffers()]
    kept = [tensor.detach().clone() for tensor in tensors]
    try:
        yield
    finally:
        put_back(tensors, kept)
        for own, mode in modes:
            own.update(mode)


class RandomState:
    """The state of the random generators: the same for every pass, and put back at the end."""

    def __enter__(self) -> RandomState:
        self._fork = torch.random.fork_rng()
        self._fork.__enter__()
        self._numpy = sys.modules.get("numpy")  # a model that draws from it has imported it
        self._python, self._numpys = random.getstate(), self._numpy.random.get_state() if self._numpy else None
        return self

    def repeated(self, run: Callable[[], list[Tensor]]) -> list[Tensor]:
        """Return what a pass returns that draws the same numbers as all others."""
        torch.manual_seed(0)
        self._restore()
        return run()

    def __exit__(self, *error: Any) -> None:
        self._fork.__exit__(*error)
        self._restore()

    def _restore(self) -> None:
        random.setstate(self._python)
        if self._numpy:
            self._numpy.random.set_state(self._numpys)
