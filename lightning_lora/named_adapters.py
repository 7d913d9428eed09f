"""Several named adapters on one base, of which one is active.

All other code sees the active adapter alone. What a module has under another one is kept in its child
``lora_others.<name>``: the child ``lora`` with the factors, and the module's own tensors where that adapter trains them
in full. Switching exchanges these pointers. No value is copied, and no ``requires_grad`` changes::

    layer.lora                        # the factors of the active adapter
    layer.lora_others.german.lora     # those of another one
    head.weight                       # what the active adapter has trained in full
    head.lora_others.german.weight    # what another one has
    head.lora_others.base.weight      # the base's own value

The first adapter is called ``"default"`` unless it was named. A module with one adapter has no such children.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from lightning_lora.adapted_model import SEVERAL, AdaptedModel, Root, home_of
from lightning_lora.attachment import DEFAULT, get_attachment, set_attachment
from lightning_lora.base_buffers import (
    buffer_places,
    copied,
    first_values,
    moved_buffers,
    note_moved,
    take_back,
)
from lightning_lora.layers import LoRALayer, swap_in, swap_out
from lightning_lora.layers.lora_layer import Behavior
from lightning_lora.layers.weight import renew_weight_list
from lightning_lora.modes import freeze_norms
from lightning_lora.names import OTHERS, listed, near_names, without_points
from lightning_lora.ops.checkpointing import Context, restore_in_recomputation
from lightning_lora.sharding import is_fully_sharded

BASE = "base"  # in ``lora_others``, what a module has under no adapter
TABLES = ("_parameters", "_buffers")

T = TypeVar("T")


class Kept(nn.Module):
    """What one module has under an adapter that is not active.

    Attributes:
        behavior: How the module's class changes when the adapter is active; None if it has no child ``lora`` then.
    """

    behavior: Behavior | None = None

    @property
    def own(self) -> list[tuple[str, str]]:
        """The table and the key of each of the module's own tensors that belong to the adapter; None while in place."""
        return [(table, key) for table in TABLES for key in vars(self)[table]]


@dataclass
class Named:
    """One of several adapters: the records of its attach, and what it changes.

    Attributes:
        roots: The modules that it was attached to.
        kept: Each module that it changes -> where to keep what that has under this adapter.
    """

    roots: list[Root]
    kept: dict[nn.Module, Kept]


@dataclass(eq=False)
class Several:
    """The record on a module with several adapters.

    Attributes:
        home: That module.
        adapters: All of them by name, in the order in which they were added.
        active: Which one is in place; None for the bare base.
        base: Modules that an adapter trains in full -> where to keep the base's own tensors.
        again: Inside ``routed``, which forbids switching, the function that enters it.
        frozen: Adapters that stay as they are while another one trains.
        thread: The one that has switched last.
        blocks: How many blocks of ``using`` are open.
    """

    home: nn.Module
    adapters: dict[str, Named] = field(default_factory=dict)
    active: str | None = None
    base: dict[nn.Module, Kept] = field(default_factory=dict)
    again: Context | None = None
    frozen: set[str] = field(default_factory=set)
    thread: int = 0
    blocks: int = 0

    def __post_init__(self) -> None:
        _records[id(self)] = self
        # Or gradients would reach the adapter that is active by then. First, since no mode spans a switch.
        restore_in_recomputation(_states, first=True)

    def __setstate__(self, state: dict[str, Any]) -> None:  # of a copied or unpickled module
        vars(self).update(state, blocks=0)
        self.__post_init__()


# --- which adapters there are


def recorded(module: nn.Module) -> Several | None:
    """Return the record of a module's adapters, if it has one: on the module itself, or on a part of it."""
    return vars(home_of(module)).get(SEVERAL)


def several_of(module: nn.Module, caller: str) -> Several:
    """Return the record of a module's adapters, made now if it had only one so far.

    Raises:
        ValueError: It has none, they belong to a module above it, or the base's own values are unknown.
    """
    home = home_of(module)
    if (several := vars(home).get(SEVERAL)) is None:
        model = AdaptedModel(home)
        model.check_adapted(caller)
        model.check_not_part()
        several = Several(home)
        register(several, model, DEFAULT)
        vars(home)[SEVERAL] = several
    return several


@contextmanager
def undone_on_failure(module: nn.Module) -> Iterator[None]:
    """Let a module that had one adapter without a name be as it was if the block raises."""
    home = home_of(module)
    had_record = SEVERAL in vars(home)
    try:
        yield
    except BaseException:
        several = vars(home).get(SEVERAL)
        if not had_record and several is not None and list(several.adapters) == [DEFAULT]:
            switch_to(several, DEFAULT)
            forget(several)
            for root in AdaptedModel(home).roots:
                root.attachment.name = None
        raise


def checked(several: Several, name: str | None, caller: str) -> str:
    """Return the name of an adapter.

    Raises:
        ValueError: There is none of that name.
    """
    if isinstance(name, str) and name not in several.adapters:
        name = without_points(name)  # as LoRASweep writes numbers in names
    if name not in several.adapters:
        near = near_names(name, several.adapters, 1) if isinstance(name, str) else []
        hint = f"Did you mean {near[0]!r}? " if near else ""
        raise ValueError(
            f"{caller}: there is no adapter {name!r}. {hint}The adapters are {listed([*map(repr, several.adapters)])}. "
            "Nothing was changed."
        )
    return name


def adapter_names(module: nn.Module) -> list[str]:
    """Return the names of a module's adapters, in the order in which they were added; empty if it has none."""
    several = recorded(module)
    if several is not None:
        return list(several.adapters)
    return [DEFAULT] if AdaptedModel(module).layers else []


def active_adapter(module: nn.Module) -> str | None:
    """Return the name of the active adapter; None inside ``using(module, None)``, and if there is no adapter."""
    several = recorded(module)
    if several is not None:
        return several.active
    return DEFAULT if AdaptedModel(module).layers else None


def check_name(name: object) -> None:
    """Refuse what cannot name an adapter.

    Raises:
        ValueError: It is no text, is empty, holds a dot, or means the base.
    """
    if not isinstance(name, str) or not name or "." in name or name == BASE:
        raise ValueError(
            f"{name!r} cannot name an adapter: use a non-empty text without '.', which separates names of modules, "
            f"other than {BASE!r}, which means no adapter."
        )


def forget(several: Several) -> None:
    """Remove every adapter that is not active, and the record; the active one becomes the only one."""
    for part in {*several.base, *(part for adapter in several.adapters.values() for part in adapter.kept)}:
        part._modules.pop(OTHERS, None)
    del vars(several.home)[SEVERAL]


def take_out(adapter: Named, name: str) -> None:
    """Remove the places of an adapter that is not active from the modules that it changes."""
    for part in adapter.kept:
        others = _others(part)
        del others[name]
        if not others:
            del part._modules[OTHERS]


def put_back(adapter: Named, name: str) -> None:
    """Undo ``take_out``."""
    for part, place in adapter.kept.items():
        _others(part)[name] = place


# --- what an adapter changes


def register(several: Several, model: AdaptedModel, name: str) -> None:
    """Record the adapter that is in place, and not recorded yet, as the active one.

    Raises:
        ValueError: The base's own values of what it trains in full were not kept. Nothing was changed.
    """
    originals = _originals(model)
    own = [
        (part, table, key)
        for _, part in model.parts
        for table in TABLES
        for key, tensor in vars(part)[table].items()
        if id(tensor) in originals
    ]
    if unknown := [path for path, tensor in model.in_full.items() if id(tensor) not in originals]:
        raise ValueError(
            f"{listed(unknown)} train in full, and the base's own values were not kept, which other adapters need. Add "
            f"the first adapter to a fresh base by add_adapter(module, {name!r}, ...), too, or train it by "
            f"LoRACallback(adapter={name!r}). Nothing was changed."
        )
    several.adapters[name], several.active = Named(list(model.roots), {}), name
    for root in model.roots:
        root.attachment.name = name
    for layer in model.layers.values():
        _place_of(several, layer)
    for part, table, key in own:
        _own(several, part, table, key, originals[id(vars(part)[table][key])])


def _originals(model: AdaptedModel) -> dict[int, Tensor | None]:
    """Return what the base has in place of each tensor that belongs to the adapter without being a factor, if known.

    Returns:
        Identity of the tensor -> the base's own; None for a buffer that it has not got yet.
    """
    found: dict[int, Tensor | None] = {}
    for root in model.roots:
        attachment = root.attachment
        found |= root.originals(attachment.starts | attachment.base_values | attachment.first_buffers)
        tensors = AdaptedModel(root.module).tensors if attachment.untied else {}
        found |= {id(tensors[name]): tensors[other] for name, other in attachment.untied.items()}
    return found


def own_buffer(several: Several, part: nn.Module, key: str, base: Tensor | None) -> None:
    """Let the active adapter have what is in place of a buffer for itself.

    Args:
        several: The record.
        part: The module that has the buffer.
        key: The buffer's name there.
        base: The base's own value.
    """
    _own(several, part, "_buffers", key, copied(base))


def fill_buffers(model: AdaptedModel, values: Mapping[str, Tensor]) -> None:
    """Make these the values of the buffers that the active adapter has for itself; they may have grown since.

    The base's own values are kept, for ``detach``, ``disabled`` and other adapters. They come back where the adapter
    had a value so far and gets none.
    """
    model = AdaptedModel(model.module)
    take_back(model, moved_buffers(model).keys() - values.keys())
    _make_places(model, values)
    places, several = buffer_places(model) if values else {}, recorded(model.module)
    saved = {name: value for name, value in values.items() if name in places}  # others were left out of this module
    note_moved(model, {name: copied(places[name][0]._buffers[places[name][1]]) for name in saved})
    first, device = first_values(model), next((each.device for each in model.module.parameters()), torch.device("cpu"))
    for name, value in saved.items():
        part, key = places[name]
        if several is not None and several.active is not None:
            own_buffer(several, part, key, first.get(name))
        buffer = part._buffers[key]
        if buffer is not None and buffer.shape == value.shape and not buffer.is_inference():
            with torch.no_grad():
                buffer.copy_(value)
        else:
            part._buffers[key] = value.to(device if buffer is None else buffer).clone()


def _make_places(model: AdaptedModel, names: Collection[str]) -> None:
    """Register buffers that hooks of the module would register later."""
    parts = dict(model.parts)
    for owner, _, key in (name.rpartition(".") for name in names):
        if owner in parts and not hasattr(parts[owner], key):
            parts[owner].register_buffer(key, None)


def _own(several: Several, part: nn.Module, table: str, key: str, base: Tensor | None) -> None:
    place = several.base.setdefault(part, Kept())
    _others(part)[BASE] = place
    vars(place)[table][key] = base
    vars(_place_of(several, part))[table][key] = None  # it is in place


def _place_of(several: Several, part: nn.Module) -> Kept:
    """Return where the active adapter keeps what a module has under it."""
    name = several.active or ""
    place = several.adapters[name].kept.setdefault(part, Kept())
    _others(part)[name] = place
    return place


def _others(part: nn.Module) -> dict[str, nn.Module | None]:
    """Return the table of what a module has under adapters that are not active."""
    if part._modules.get(OTHERS) is None:
        part._modules[OTHERS] = nn.Module()
    return part._modules[OTHERS]._modules  # type: ignore[union-attr]


# --- the exchange


def switch_to(several: Several, name: str | None) -> None:
    """Put another adapter in place, or none.

    Args:
        several: The record.
        name: One of its names; None for the bare base.

    Raises:
        RuntimeError: As in ``set_adapter``. Nothing was changed.
    """
    if name == several.active:
        return
    before = None if several.active is None else several.adapters[several.active]
    after = None if name is None else several.adapters[name]
    _check_not_flattened(several, before, after)
    _exchange(several, name)
    if after is not None and _norms_of(before) != _norms_of(after):
        freeze_norms(several.home)


@contextmanager
def buffers_kept(several: Several) -> Iterator[None]:
    """Keep the buffers of the base, or of an adapter that stays as it is, whatever the block computes in training mode.

    Only buffers that some adapter has for itself can differ; the block gets copies of them.
    """
    active = several.active
    if active is not None and active not in several.frozen:
        yield
        return
    held = [(part, key, part._buffers.get(key)) for part, place in several.base.items() for key in place._buffers]
    for part, key, buffer in held:
        part._buffers[key] = copied(buffer)
    try:
        yield
    finally:
        if several.active == active:
            for part, key, buffer in held:
                part._buffers[key] = buffer


def of_others(module: nn.Module, read: Callable[[nn.Module], T]) -> dict[str, T]:
    """Return what a function finds in a module while each adapter that is not active now is in place.

    The function must not compute with the module: the parameters may be in no state for that, as under FSDP.
    """
    found: dict[str, T] = {}
    if (several := recorded(module)) is not None:
        active = several.active
        try:
            for name in [name for name in several.adapters if name != active]:
                _exchange(several, name)
                found[name] = read(module)
        finally:
            _exchange(several, active)
    return found


def _exchange(several: Several, name: str | None) -> None:
    if several.again is not None:
        raise RuntimeError("The adapters cannot be switched inside routed(...); leave it first.")
    before = None if several.active is None else several.adapters[several.active]
    for part in before.kept if before is not None else ():
        if (mode := vars(part).get("lora_mode", "active")) != "active":
            raise RuntimeError(f"The adapters cannot be switched inside {mode}(module); leave it first.")
    if before is not None:
        _put_away(several.base, before)
    if name is not None:
        _put_in_place(several.base, several.adapters[name])
    several.active, several.thread = name, threading.get_ident()


def _check_not_flattened(several: Several, before: Named | None, after: Named | None) -> None:
    places = [item for adapter in (before, after) if adapter is not None for item in adapter.kept.items()]
    full = [part for part, place in places if place._parameters]
    if full and any(map(is_fully_sharded, several.home.modules())):
        raise RuntimeError(
            f"The adapters cannot be switched: one of them trains a {type(full[0]).__name__} in full, and FSDP manages "
            "its parameters. Switch before the module is wrapped, or keep such modules out of modules_to_save."
        )


def _put_away(base: dict[nn.Module, Kept], adapter: Named) -> None:
    for part, place in adapter.kept.items():
        for table, key in place.own:
            vars(place)[table][key], vars(part)[table][key] = vars(part)[table][key], vars(base[part])[table][key]
            vars(base[part])[table][key] = None
        if isinstance(part, LoRALayer):
            place.behavior = part.mixin, part.computed
            place._modules["lora"] = part._modules.pop("lora")
            swap_out(part)
        if place.own:
            renew_weight_list(part)
    # Attaching again has made new records.
    adapter.roots = [root._replace(attachment=get_attachment(root.module) or root.attachment) for root in adapter.roots]
    for root in adapter.roots:
        set_attachment(root.module, None)


def _put_in_place(base: dict[nn.Module, Kept], adapter: Named) -> None:
    for part, place in adapter.kept.items():
        for table, key in place.own:
            vars(base[part])[table][key], vars(part)[table][key] = vars(part)[table][key], vars(place)[table][key]
            vars(place)[table][key] = None
        if place.behavior is not None:
            swap_in(part, *place.behavior)
            part._modules["lora"] = in_mode_of(part, place._modules.pop("lora"))
        if place.own:
            renew_weight_list(part)
    for root in adapter.roots:
        set_attachment(root.module, root.attachment)


def in_mode_of(part: nn.Module, lora: T) -> T:
    """Put what a layer has under an adapter in the mode of the layer, and return it.

    Whoever puts modes back by the names of modules, as Lightning does after a validation, misses adapters that were
    switched in between.
    """
    if isinstance(lora, nn.Module) and lora.training != part.training:
        lora.train(part.training)
    return lora


def _norms_of(adapter: Named | None) -> set[tuple[str, ...]]:
    """Return what decides which normalization layers are held under an adapter."""
    attachments = [root.attachment for root in adapter.roots] if adapter is not None else []
    return {(each.config.frozen_norm, *each.report.saved) for each in attachments if each.report.norms}


# --- activation checkpointing

_records: weakref.WeakValueDictionary[int, Several] = weakref.WeakValueDictionary()


def _states() -> list[Context]:
    """Return contexts in which the adapters are in place that are in place now."""
    records = [record for reference in _records.valuerefs() if (record := reference()) is not None]
    return [partial(_as_it_was, each, each.active, each.again, threading.get_ident()) for each in records]


@contextmanager
def _as_it_was(record: Several, name: str | None, again: Context | None, thread: int) -> Iterator[None]:
    if (record.again is again and record.active == name) or record.thread != thread:  # that one's model is its own
        yield
    elif again is not None:
        with again():
            yield
    else:
        before = record.active
        switch_to(record, name)
        try:
            with buffers_kept(record):
                yield
        finally:
            switch_to(record, before)
            record.thread = thread  # and not that of autograd
