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

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from torch import Tensor, nn

from lightning_lora.adapted_model import AdaptedModel, Root
from lightning_lora.attachment import DEFAULT, get_attachment, keeping_starts, set_attachment
from lightning_lora.layers import LoRALayer, release_statistics, swap_in, swap_out
from lightning_lora.layers.lora_layer import Behavior
from lightning_lora.modes import freeze_norms
from lightning_lora.names import OTHERS, listed, near_names, parameters_of, walk
from lightning_lora.ops.checkpointing import Context, restore_in_recomputation
from lightning_lora.sharding import is_fully_sharded, unwrapped

BASE = "base"  # in ``lora_others``, what a module has under no adapter
_SEVERAL = "_lora_several"
_TABLES = ("_parameters", "_buffers")


class Kept(nn.Module):
    """What one module has under an adapter that is not active.

    Attributes:
        behavior: How the module's class changes when the adapter is active; None if it has no child ``lora`` then.
    """

    behavior: Behavior | None = None

    @property
    def own(self) -> list[tuple[str, str]]:
        """The table and the key of each of the module's own tensors that belong to the adapter; None while in place."""
        return [(table, key) for table in _TABLES for key in vars(self)[table]]


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
    """

    home: nn.Module
    adapters: dict[str, Named] = field(default_factory=dict)
    active: str | None = None
    base: dict[nn.Module, Kept] = field(default_factory=dict)
    again: Context | None = None

    def __post_init__(self) -> None:
        _records.add(self)
        restore_in_recomputation(_states)  # or gradients would reach the adapter that is active by then

    def __setstate__(self, state: dict[str, Any]) -> None:  # of a copied or unpickled module
        vars(self).update(state)
        self.__post_init__()


# --- what users call


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


def set_adapter(module: nn.Module, name: str) -> None:
    """Make another adapter the active one, which computes, trains, is saved and is merged.

    Exchanges pointers: nothing is copied, and no ``requires_grad`` changes. Which adapters train is decided by the
    parameters that an optimizer holds.

    Args:
        module: An adapted module.
        name: The adapter's name, as in ``adapter_names``.

    Raises:
        ValueError: The module has no adapter of this name. Nothing was changed.
        RuntimeError: The active adapter is merged or disabled now, or samples are being routed, or it trains modules
            in full that FSDP has flattened. Nothing was changed.
    """
    several = several_of(module, "set_adapter")
    switch_to(several, checked(several, name, "set_adapter"))


@contextmanager
def using(module: nn.Module, name: str | None) -> Iterator[None]:
    """Compute with another adapter, or with the bare base, and switch back afterwards, however the block ends; nests.

    A frozen adapter serves as the reference of DPO or GRPO beside the one that is trained. What a module trained in
    full switches with its adapter.

    Threads share the active adapter: let them take turns, or use ``routed``. A backward pass after the block that
    computes layers again (activation checkpointing) does so with the adapter of their forward pass.

    Args:
        module: An adapted module.
        name: The adapter's name; None for the bare base, bit for bit.

    Raises:
        ValueError: The module has no adapter of this name, or the base's own values of what trains in full were not
            kept. Nothing was changed.
        RuntimeError: As in ``set_adapter``.
    """
    several = several_of(module, "using")
    before = several.active
    switch_to(several, None if name is None else checked(several, name, "using"))
    try:
        yield
    finally:
        is_there = before is None or before in several.adapters
        if is_there and vars(several.home).get(_SEVERAL) is several:  # not removed, merged or detached meanwhile
            switch_to(several, before)


@contextmanager
def chosen(module: nn.Module, name: str | None, caller: str) -> Iterator[None]:
    """Make the adapter that a function was called for the active one; if the block raises, take that back.

    Raises:
        ValueError: There are several, and none was named, or none of this name. Nothing was changed.
    """
    names = adapter_names(module)
    if name is None and len(names) > 1:
        raise ValueError(f"{caller}: there are several adapters, {listed([*map(repr, names)])}; say which one.")
    several = None if name is None or name == active_adapter(module) else several_of(module, caller)
    before = None if several is None else several.active
    if several is not None:
        switch_to(several, checked(several, name, caller))
    try:
        yield
    except BaseException:
        if several is not None:
            switch_to(several, before)
        raise


def remove_adapter(module: nn.Module, name: str) -> None:
    """Remove an adapter that is not active, with everything it has learned.

    Raises:
        ValueError: The module has no adapter of this name, or it is the active one. Nothing was changed.
    """
    several = several_of(module, "remove_adapter")
    checked(several, name, "remove_adapter")
    if name == several.active:
        others = [other for other in several.adapters if other != name]
        now = f"call set_adapter(module, {others[0]!r}) first" if others else "call detach(module) to remove the last"
        raise ValueError(f"remove_adapter: {name!r} is the active adapter; {now}. Nothing was changed.")
    for part in several.adapters.pop(name).kept:
        del part._modules[OTHERS]._modules[name]  # type: ignore[union-attr]


# --- the record


def recorded(module: nn.Module) -> Several | None:
    """Return the record of a module's adapters, if it has one: on the module itself, or on a part of it."""
    return vars(_home(module)).get(_SEVERAL)


def several_of(module: nn.Module, caller: str) -> Several:
    """Return the record of a module's adapters, made now if it had only one so far.

    Raises:
        ValueError: It has none, they belong to a module above it, or the base's own values are unknown.
    """
    home = _home(module)
    if (several := vars(home).get(_SEVERAL)) is None:
        model = AdaptedModel(home)
        model.check_adapted(caller)
        model.check_not_part()
        several = Several(home)
        _register(several, model, DEFAULT)
        vars(home)[_SEVERAL] = several
    return several


def checked(several: Several, name: str | None, caller: str) -> str:
    """Return the name of an adapter.

    Raises:
        ValueError: There is none of that name.
    """
    if name not in several.adapters:
        near = near_names(name, several.adapters, 1) if isinstance(name, str) else []
        hint = f"Did you mean {near[0]!r}? " if near else ""
        raise ValueError(
            f"{caller}: there is no adapter {name!r}. {hint}The adapters are {listed([*map(repr, several.adapters)])}. "
            "Nothing was changed."
        )
    return name


def _home(module: nn.Module) -> nn.Module:
    """Return the module that has the record, or would have it: the one with the adapters if they are in one part."""
    module = unwrapped(module)
    if _SEVERAL in vars(module):
        return module
    found = [part for _, part in walk(module) if _SEVERAL in vars(part)]
    found = found or [root.module for root in AdaptedModel(module).roots]
    return found[0] if len(found) == 1 else module


def _register(several: Several, model: AdaptedModel, name: str) -> None:
    """Record the adapter that is in place, and not recorded yet, as the active one.

    Raises:
        ValueError: The base's own values of what it trains in full were not kept. Nothing was changed.
    """
    originals = _originals(model)
    own = [
        (part, table, key)
        for _, part in model.parts
        for table in _TABLES
        for key, tensor in vars(part)[table].items()
        if id(tensor) in originals
    ]
    if unknown := [path for path, tensor in originals.values() if tensor is None]:
        raise ValueError(
            f"{listed(unknown)} train in full, and the base's own values were not kept, which other adapters need. Add "
            f"the first adapter to a fresh base by add_adapter(module, {name!r}, ...), too, or train it by "
            f"LoRACallback(adapter={name!r}). Nothing was changed."
        )
    kept = {part: Kept() for part in [p for _, p in model.parts if isinstance(p, LoRALayer)] + [p for p, _, _ in own]}
    several.adapters[name], several.active = Named(list(model.roots), kept), name
    for root in model.roots:
        root.attachment.name = name
    for part, place in kept.items():
        _others(part)[name] = place
    for part, table, key in own:
        base = several.base.setdefault(part, Kept())
        _others(part)[BASE] = base
        vars(base)[table][key] = originals[id(vars(part)[table][key])][1]
        vars(kept[part])[table][key] = None  # it is in place


def _originals(model: AdaptedModel) -> dict[int, tuple[str, Tensor | None]]:
    """Return what the base has in place of each tensor that belongs to the adapter without being a factor.

    Returns:
        Identity of the tensor -> its name, and the base's own; None if that is unknown.
    """
    found: dict[int, tuple[str, Tensor | None]] = {id(own): (name, None) for name, own in model.in_full.items()}
    for root in model.roots:
        tensors, attachment = AdaptedModel(root.module).tensors, root.attachment
        for name, value in (attachment.starts | attachment.base_values).items():
            own, copy = tensors[name], value.detach().clone().to(tensors[name].device)
            found[id(own)] = (name, nn.Parameter(copy, False) if isinstance(own, nn.Parameter) else copy)
        for name, other in attachment.untied.items():
            found[id(tensors[name])] = (name, tensors[other])
    return found


def _others(part: nn.Module) -> dict[str, nn.Module | None]:
    """Return the table of what a module has under adapters that are not active."""
    if part._modules.get(OTHERS) is None:
        part._modules[OTHERS] = nn.Module()
    return part._modules[OTHERS]._modules  # type: ignore[union-attr]


# --- switching


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
    exchange(several, name)
    if after is not None and _norms_of(before) != _norms_of(after):
        freeze_norms(several.home)


def exchange(several: Several, name: str | None) -> None:
    """Do as ``switch_to``, even where nothing can be computed with the result: to look at it, and change back.

    Raises:
        RuntimeError: The active adapter is merged or disabled, or samples are being routed. Nothing was changed.
    """
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
    several.active = name


def _check_not_flattened(several: Several, before: Named | None, after: Named | None) -> None:
    places = [item for adapter in (before, after) if adapter is not None for item in adapter.kept.items()]
    if (full := [part for part, place in places if place.own]) and any(map(is_fully_sharded, several.home.modules())):
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
            vars(part).pop("lora_mode", None)  # left by disabled and merged; the bare base has none
            place._modules["lora"] = part._modules.pop("lora")
            swap_out(part)
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
            part._modules["lora"] = place._modules.pop("lora")
    for root in adapter.roots:
        set_attachment(root.module, root.attachment)


def _norms_of(adapter: Named | None) -> set[tuple[str, ...]]:
    """Return what decides which normalization layers are held under an adapter."""
    attachments = [root.attachment for root in adapter.roots] if adapter is not None else []
    return {(each.config.frozen_norm, *each.report.saved) for each in attachments if each.report.norms}


# --- adding


@contextmanager
def beside(module: nn.Module, name: str) -> Iterator[None]:
    """Have what is attached inside the block become an adapter of this name, beside those that the module has.

    Inside, the module is the bare base. Afterwards the earlier adapter is active again; the first one becomes active.

    Raises:
        ValueError: The name cannot be used, or nothing can be added. Nothing was changed.
    """
    home = _home(module)
    _check_new_name(adapter_names(home), name)
    is_first = _SEVERAL not in vars(home) and not AdaptedModel(home).layers
    several = Several(home) if is_first else several_of(home, "add_adapter")
    before = several.active
    flags = [(parameter, parameter.requires_grad) for parameter in parameters_of(home)]
    switch_to(several, None)
    _thaw_base(several)
    vars(home).pop(_SEVERAL, None)
    try:
        with keeping_starts():
            yield
        _register(several, AdaptedModel(home), name)
    except BaseException:
        for parameter, requires_grad in flags:
            parameter.requires_grad_(requires_grad)
        raise
    finally:
        if several.adapters:
            vars(home)[_SEVERAL] = several
        if before is not None:
            switch_to(several, before)
            freeze_norms(home)


def _thaw_base(several: Several) -> None:
    """Give the bare base the gradient flags and the normalization layers that it had before any adapter."""
    for adapter in several.adapters.values():
        for root in adapter.roots:
            for name, tensor in AdaptedModel(root.module).tensors.items():
                tensor.requires_grad_(root.attachment.required_grad.get(name, tensor.requires_grad))
            for _, part in walk(root.module):
                release_statistics(part)


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


def _check_new_name(names: list[str], name: str) -> None:
    check_name(name)
    if name in names:
        raise ValueError(
            f"There is an adapter {name!r} already. Choose another name, or call remove_adapter(module, {name!r}) "
            "first. Nothing was changed."
        )


# --- activation checkpointing

_records: weakref.WeakSet[Several] = weakref.WeakSet()


def _states() -> list[Context]:
    """Return contexts in which the adapters are in place that are in place now."""
    return [partial(_as_it_was, record, record.active, record.again) for record in _records]


@contextmanager
def _as_it_was(record: Several, name: str | None, again: Context | None) -> Iterator[None]:
    if record.again is again and record.active == name:
        yield
    elif again is not None:
        with again():
            yield
    else:
        before = record.active
        switch_to(record, name)
        try:
            yield
        finally:
            switch_to(record, before)


def forget(several: Several) -> None:
    """Remove every adapter that is not active, and the record; the active one becomes the only one."""
    for part in {*several.base, *(part for adapter in several.adapters.values() for part in adapter.kept)}:
        part._modules.pop(OTHERS, None)
    del vars(several.home)[_SEVERAL]
