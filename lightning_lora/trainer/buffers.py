"""Watching the buffers of the base while a Trainer runs: what hooks set, and what training changes."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import TypeVar

import torch
from torch import Tensor, nn

from lightning_lora.adapted_model import AdaptedModel
from lightning_lora.base_buffers import base_buffers, buffer_places, moved_values, values_now
from lightning_lora.layers.norm import has_running_statistics
from lightning_lora.named_adapters import active_adapter, fill_buffers, of_others, own_buffer, recorded

T = TypeVar("T")

# --- before training


class HookWatch:
    """Finds the buffers that hooks of the module set before training begins, such as the mean of the data.

    Args:
        module: The module, before hooks run; adapters may come later.
        changed: The buffers that had changed beside earlier adapters of the module.
    """

    def __init__(self, module: nn.Module, changed: Collection[str] = ()) -> None:
        self.module, self._changed = module, changed
        buffers = base_buffers(AdaptedModel(module))
        self._before = {name: (buffer, _version(buffer), checksum(buffer)) for name, buffer in buffers.items()}

    def note_set(self) -> None:
        """Count them as changed by training, so that they are saved.

        New buffers come with the layers that are built, and the statistics of norms with weights that are loaded: these
        belong to the base.
        """
        model = AdaptedModel(self.module)
        places = buffer_places(model)
        for root in model.roots[:1]:
            root.attachment.moved |= set(self._changed) | {
                name
                for name, buffer in base_buffers(model).items()
                if name in self._before and not self._before[name][0].is_meta
                if not has_running_statistics(places[name][0])
                if not self._is_same(name, buffer)
            }

    def _is_same(self, name: str, buffer: Tensor) -> bool:
        before, version, known = self._before[name]
        is_untouched = before is buffer and version is not None and version == _version(buffer)
        return is_untouched or known == checksum(buffer)


def _version(tensor: Tensor) -> int | None:
    return None if tensor.is_inference() else tensor._version


def checksum(tensor: Tensor) -> tuple[object, ...]:
    """Return what differs between two values of a tensor, without a copy of it."""
    if tensor.is_meta or tensor.is_quantized or tensor.layout is not torch.strided or not tensor.numel():
        return tuple(tensor.shape), tensor.dtype
    octets = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
    # Alternating parts, so that an exchange of values is seen.
    sums = [int(octets[start::3].sum(dtype=torch.int64)) for start in range(3)]
    return tuple(tensor.shape), tensor.dtype, *sums


# --- during training


def watch_buffers(module: nn.Module) -> None:
    """Keep the values that the base's buffers have now, to see what changes while the active adapter trains."""
    model = AdaptedModel(module)
    for root in model.roots[:1]:
        root.attachment.watched = values_now(model)


def watch_training(module: nn.Module, together: Collection[str] = ()) -> None:
    """Do the same as training begins, and let what changes from now on be the active adapter's alone.

    Args:
        module: The adapted module.
        together: Adapters that train at once instead. They share what hooks of the module change, once for all.
    """
    if together:
        _of_all(module, lambda part: watch_buffers(part) if active_adapter(part) in together else None)
    else:
        watch_buffers(module)
        claim_buffers(module, buffer_places(AdaptedModel(module)))


def claim_buffers(module: nn.Module, names: Collection[str]) -> None:
    """Let the active adapter, if it is one of several, have these buffers of the base for itself from now on."""
    several, model = recorded(module), AdaptedModel(module)
    if several is None or several.active is None:
        return
    places, now = buffer_places(model), values_now(model)
    for name in names:
        if name in now:
            own_buffer(several, *places[name], now[name])


def divide_buffers(module: nn.Module) -> None:
    """After a training of several adapters, let each have for itself what hooks have changed for all of them."""
    moved = _of_all(module, lambda part: moved_values(AdaptedModel(part)))
    _of_all(module, lambda part: fill_buffers(AdaptedModel(part), moved[active_adapter(part)]))


def _of_all(module: nn.Module, read: Callable[[nn.Module], T]) -> dict[str | None, T]:
    """Return what a function finds while each adapter is in place."""
    found: dict[str | None, T] = {active_adapter(module): read(module)}
    return found | of_others(module, read)
