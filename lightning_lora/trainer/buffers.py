"""Watching what is no parameter while a Trainer runs: buffers that hooks set, or training changes, and other states."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from typing import TypeVar

from lightning.fabric.utilities.rank_zero import rank_zero_warn  # type: ignore[attr-defined]
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from lightning_lora.adapted_model import AdaptedModel
from lightning_lora.attachment import Attachment
from lightning_lora.base_buffers import (
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
from lightning_lora.names import listed
from lightning_lora.state import extra_state_names, extra_states
from lightning_lora.trainer.metrics import load_states, metric_states

T = TypeVar("T")


class BufferWatch:
    """Finds the buffers that hooks of a module set, such as the mean of the data, and those that training changes.

    Both belong to the adapter. During the fit the base has what the hooks have set, too, for a reference that computes
    without the adapter; afterwards it has what it had before.

    Args:
        module: The module, before hooks run; adapters may come later.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self._unset: dict[str, Tensor | None] = {}  # values from before hooks had set them
        self._together: Collection[str] = ()
        self.renew()

    def renew(self, changed: Collection[str] = ()) -> None:
        """Compare with the values of now from here on.

        Args:
            changed: Buffers that count as set, whatever hooks do.
        """
        model, self._changed = AdaptedModel(self.module), changed
        self._before, self._parts = values_now(model), {part for _, part in model.parts}
        self._versions = {each: _version(each) for each in self.module.parameters()}

    def begin_anew(self, before: Attachment) -> None:
        """Put back the states that the first training of an adapter began with, and compare from here on.

        Args:
            before: The record of the adapter, which has been removed.
        """
        if before.states is None and (names := extra_state_names(self.module)):
            rank_zero_warn(
                f"LoRACallback(fresh=True): {listed(sorted(names))} could not be copied when the first fit began, so "
                "what get_extra_state returns goes on as the last fit has left it."
            )
        load_states(AdaptedModel(self.module), copy.deepcopy(before.states or {}))
        self.renew(before.moved)

    def note_set(self) -> None:
        """Count what hooks have set as changed by training, so that it is saved.

        New buffers come with the layers that are built, others with the weights that are loaded, as do the statistics
        of norms: these belong to the base.
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
            known = {*root.attachment.buffers, *self._unset}
            self._unset |= {} if has_loaded else {name: value for name, value in found.items() if name not in known}

    @property
    def set_by_hooks(self) -> Collection[str]:
        """Names of the buffers that hooks have set in this run."""
        return self._unset.keys()

    def start_training(self, together: Collection[str] = ()) -> None:
        """From now on, let what changes be the active adapter's alone.

        Args:
            together: Adapters that train at once instead. They share what hooks of the module change, once for all.
        """
        self.note_set()
        self._together = together
        if together:
            set_by_hooks = {name for root in AdaptedModel(self.module).roots[:1] for name in root.attachment.moved}
            self._of_those_in_training(lambda part: watch(part, set_by_hooks))
        else:
            watch(self.module)
            claim_buffers(self.module, buffer_places(AdaptedModel(self.module)))
            _keep_states(self.module)

    def close(self) -> None:
        """Give the base back what hooks had set for the fit."""
        if self._unset:
            self._of_those_in_training(self._give_back)

    def _give_back(self, module: nn.Module) -> None:
        model, several = AdaptedModel(module), recorded(module)
        places = buffer_places(model)
        for root in model.roots[:1]:
            for name in self._unset.keys() & places.keys():
                root.attachment.buffers[name] = self._unset[name]
                if several is not None:
                    own_buffer(several, *places[name], self._unset[name])

    def _of_those_in_training(self, change: Callable[[nn.Module], None]) -> None:
        if self._together:
            _of_all(self.module, lambda part: change(part) if active_adapter(part) in self._together else None)
        else:
            change(self.module)


def _keep_states(module: nn.Module) -> None:
    """Keep the extra states and persistent metrics that the adapter's first training begins with."""
    model = AdaptedModel(module)
    for root in model.roots[:1]:
        if root.attachment.states is None:
            with suppress(Exception):  # of what cannot be copied, which only a fit that starts anew would miss
                root.attachment.states = copy.deepcopy(extra_states(model)[0] | metric_states(model))


def _version(tensor: Tensor) -> int | None:
    return None if is_lazy(tensor) or tensor.is_inference() else tensor._version


def watch(module: nn.Module, changed: Collection[str] = ()) -> None:
    """Keep the values that the base's buffers have now, to see what changes while the active adapter trains.

    Args:
        module: The module.
        changed: Buffers that count as changed already.
    """
    model = AdaptedModel(module)
    moved_buffers(model)  # also what was set by hand since an earlier fit
    for root in model.roots[:1]:
        root.attachment.watched = values_now(model)
        root.attachment.moved |= {*changed}


def claim_buffers(module: nn.Module, names: Collection[str]) -> None:
    """Let the active adapter, if it is one of several, have these buffers of the base for itself from now on."""
    several, model = recorded(module), AdaptedModel(module)
    if several is None or several.active is None:
        return
    places, first = buffer_places(model), first_values(model)
    for name in names:
        if name in first:
            own_buffer(several, *places[name], first[name])


@contextmanager
def own_buffers(module: nn.Module, name: str) -> Iterator[None]:
    """Let the buffers of the base that the block changes be those of an adapter alone; others keep what there was.

    Args:
        module: The module, with this adapter in place.
        name: One of several adapters.
    """
    before = values_now(AdaptedModel(module))
    yield
    several, model = recorded(module), AdaptedModel(module)
    if several is None or several.active != name:
        return
    mine, places = several.adapters[name].kept, buffer_places(model)
    for path, now in base_buffers(model).items():
        part, key = places[path]
        is_own = part in mine and key in mine[part]._buffers
        if path in before and not is_own and not is_same(before[path], now):
            own_buffer(several, part, key, before[path])


def own_buffer_count(module: nn.Module) -> int:
    """Return how many buffers adapters have for themselves."""
    several = recorded(module)
    adapters = [] if several is None else several.adapters.values()
    return sum(len(place._buffers) for adapter in adapters for place in adapter.kept.values())


def divide_buffers(module: nn.Module) -> None:
    """After a training of several adapters, let each have for itself what hooks have changed for all of them."""
    moved = _of_all(module, lambda part: moved_values(AdaptedModel(part)))
    _of_all(module, lambda part: fill_buffers(AdaptedModel(part), moved[active_adapter(part)]))


def _of_all(module: nn.Module, read: Callable[[nn.Module], T]) -> dict[str | None, T]:
    """Return what a function finds while each adapter is in place."""
    found: dict[str | None, T] = {active_adapter(module): read(module)}
    return found | of_others(module, read)
