"""Watching the buffers of the base while a Trainer runs: what hooks set, and what training changes."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import TypeVar

from torch import Tensor, nn

from lightning_lora.adapted_model import AdaptedModel
from lightning_lora.base_buffers import (
    First,
    base_buffers,
    buffer_places,
    first_values,
    is_same,
    moved_buffers,
    moved_values,
    values_now,
)
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
        model = AdaptedModel(module)
        self._before, self._parts = values_now(model), {part for _, part in model.parts}
        self._versions = {each: _version(each) for each in module.parameters()}

    def note_set(self) -> First:
        """Count them as changed by training, so that they are saved.

        New buffers come with the layers that are built, and the statistics of norms with weights that are loaded: these
        belong to the base.

        Returns:
            What they were before; empty if the hooks have loaded weights, with which buffers come.
        """
        model = AdaptedModel(self.module)
        places, now = buffer_places(model), {each: _version(each) for each in self.module.parameters()}
        has_loaded = any(now.get(each, -1) != version for each, version in self._versions.items())
        found: dict[str, Tensor | None] = {}
        for name, buffer in base_buffers(model).items():
            part, before = places[name][0], self._before.get(name)
            if has_running_statistics(part):
                continue
            is_new = before is None and (name in self._before or (part in self._parts and not has_loaded))
            if is_new or not (before is None or before.is_meta or is_same(before, buffer)):
                found[name] = before
        for root in model.roots[:1]:
            root.attachment.moved |= {*self._changed, *found}
            found = {name: before for name, before in found.items() if name not in root.attachment.buffers}
        return {} if has_loaded else found


def _version(tensor: Tensor) -> int | None:
    return None if tensor.is_inference() else tensor._version


# --- during training


def watch_buffers(module: nn.Module) -> None:
    """Keep the values that the base's buffers have now, to see what changes while the active adapter trains."""
    model = AdaptedModel(module)
    moved_buffers(model)  # also what was set by hand since an earlier fit
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
    places, first = buffer_places(model), first_values(model)
    for name in names:
        if name in first:
            own_buffer(several, *places[name], first[name])


def divide_buffers(module: nn.Module) -> None:
    """After a training of several adapters, let each have for itself what hooks have changed for all of them."""
    moved = _of_all(module, lambda part: moved_values(AdaptedModel(part)))
    _of_all(module, lambda part: fill_buffers(AdaptedModel(part), moved[active_adapter(part)]))


def _of_all(module: nn.Module, read: Callable[[nn.Module], T]) -> dict[str | None, T]:
    """Return what a function finds while each adapter is in place."""
    found: dict[str | None, T] = {active_adapter(module): read(module)}
    return found | of_others(module, read)


def give_back(module: nn.Module, before: First, together: Collection[str]) -> None:
    """Give the base the values from before hooks had set them, once a fit has ended, in which it needed them.

    Args:
        module: The module.
        before: What ``HookWatch`` has found.
        together: The adapters that have trained at once, if it was not the active one alone.
    """

    def of_one(part: nn.Module) -> None:
        model, several = AdaptedModel(part), recorded(part)
        places = buffer_places(model)
        for root in model.roots[:1]:
            for name in before.keys() & places.keys():
                root.attachment.buffers[name] = before[name]
                if several is not None:
                    own_buffer(several, *places[name], before[name])

    if before:
        _of_all(module, lambda part: of_one(part) if not together or active_adapter(part) in together else None)
