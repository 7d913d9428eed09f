"""Which of several named adapters is active, for good or for a while; adding one and removing one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from lightning_lora.adapted_model import SEVERAL, AdaptedModel, home_of, in_turn, taking_turns
from lightning_lora.attachment import keeping_starts
from lightning_lora.base_buffers import moved_values
from lightning_lora.layers import release_statistics
from lightning_lora.modes import freeze_norms
from lightning_lora.named_adapters import (
    Several,
    active_adapter,
    adapter_names,
    buffers_kept,
    check_name,
    checked,
    fill_buffers,
    forget,
    put_back,
    recorded,
    register,
    several_of,
    switch_to,
    take_out,
    undone_on_failure,
)
from lightning_lora.names import OTHERS, listed, walk
from lightning_lora.sharding import unwrapped

# --- what users call


@in_turn
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
    with undone_on_failure(module):
        several = several_of(module, "set_adapter")
        switch_to(several, checked(several, name, "set_adapter"))


@contextmanager
def using(module: nn.Module, name: str | None) -> Iterator[None]:
    """Compute with another adapter, or with the bare base, and switch back afterwards, however the block ends; nests.

    A frozen adapter serves as the reference of DPO or GRPO beside the one that is trained. What a module trained in
    full switches with its adapter.

    Blocks of several threads take turns, those of ``routed``, ``disabled``, ``scaled`` and ``merged`` included, so a
    service enters one for each request or batch; a forward pass outside of a block must not run meanwhile. A backward
    pass after the block that computes layers again (activation checkpointing) does so with the adapter of their
    forward pass.

    Args:
        module: An adapted module.
        name: The adapter's name; None for the bare base, bit for bit.

    Raises:
        ValueError: The module has no adapter of this name, or the base's own values of what trains in full were not
            kept. Nothing was changed.
        RuntimeError: As in ``set_adapter``.
    """
    with taking_turns(module), switched(module, name, "using") as several, buffers_kept(several):
        several.blocks += 1
        try:
            yield
        finally:
            several.blocks -= 1


@in_turn
def remove_adapter(module: nn.Module, name: str) -> None:
    """Remove an adapter that is not active, with everything it has learned.

    Raises:
        ValueError: The module has no adapter of this name, or it is the active one. Nothing was changed.
    """
    with undone_on_failure(module):
        several = several_of(module, "remove_adapter")
        name = checked(several, name, "remove_adapter")
        if name == several.active:
            others = [other for other in several.adapters if other != name]
            first = f"set_adapter(module, {others[0]!r}) first" if others else "detach(module) to remove the last"
            raise ValueError(f"remove_adapter: {name!r} is the active adapter; call {first}. Nothing was changed.")
    take_out(several.adapters.pop(name), name)


# --- while something else is done


@contextmanager
def switched(module: nn.Module, name: str | None, caller: str) -> Iterator[Several]:
    """Have another adapter in place, or none, in whichever thread; what the block computes may move its buffers."""
    with undone_on_failure(module):
        several = several_of(module, caller)
        before = several.active
        switch_to(several, None if name is None else checked(several, name, caller))
    try:
        yield several
    finally:
        is_there = before is None or before in several.adapters
        if is_there and vars(several.home).get(SEVERAL) is several:  # not removed, merged or detached meanwhile
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
    if name is None or name == active_adapter(module):
        yield
        return
    with undone_on_failure(module):
        several = several_of(module, caller)
        before = several.active
        switch_to(several, checked(several, name, caller))
        try:
            yield
        except BaseException:
            switch_to(several, before)
            raise


@contextmanager
def beside(module: nn.Module, name: str) -> Iterator[None]:
    """Have what is attached inside the block become an adapter of this name, beside those that the module has.

    Inside, the module is the bare base. Afterwards the earlier adapter is active again; the first one becomes active.

    Raises:
        ValueError: The name cannot be used, or nothing can be added. Nothing was changed.
    """
    with undone_on_failure(module), _beside(module, name):
        yield


@contextmanager
def _beside(module: nn.Module, name: str) -> Iterator[None]:
    home = home_of(module)
    _check_new_name(adapter_names(home), name)
    own = {} if SEVERAL in vars(unwrapped(module)) else {root.name: root.module for root in AdaptedModel(module).roots}
    is_first = SEVERAL not in vars(home) and not AdaptedModel(home).layers
    several = Several(home) if is_first else several_of(home, "add_adapter")
    if gone := AdaptedModel(home).gone(several):
        raise RuntimeError(gone)
    before = several.active
    flags = [(parameter, parameter.requires_grad) for parameter in home.parameters()]  # of all adapters
    switch_to(several, None)
    _thaw_base(several)
    vars(home).pop(SEVERAL, None)
    try:
        with keeping_starts({name: part for name, part in own.items() if name}):
            yield
        if len((whole := AdaptedModel(module)).roots) > len(AdaptedModel(home).roots):  # the earlier ones are in a part
            several.home = whole.module
        register(several, AdaptedModel(several.home), name)
    except BaseException:
        several.home = home
        for parameter, requires_grad in flags:
            parameter.requires_grad_(requires_grad)
        raise
    finally:
        if several.adapters:
            vars(several.home)[SEVERAL] = several
        if before is not None:
            switch_to(several, before)
            freeze_norms(several.home)


@contextmanager
def in_place_of(module: nn.Module, name: str) -> Iterator[None]:
    """Have what is attached inside the block replace an adapter of a module with names; it becomes the active one.

    Inside, the module is the bare base. If the block raises, the adapter is there as before. Buffers that training has
    changed stay as they are under the adapter.
    """
    several = several_of(module, "in_place_of")
    order, before = list(several.adapters), several.active
    with using(module, name):
        moved = moved_values(AdaptedModel(module))
    flags = [(parameter, parameter.requires_grad) for parameter in several.home.parameters()]
    switch_to(several, None)
    _thaw_base(several)
    old = several.adapters.pop(name)
    take_out(old, name)
    try:
        with beside(module, name):
            yield
        before = name
    except BaseException:
        several.adapters[name] = old
        put_back(old, name)
        for parameter, requires_grad in flags:
            parameter.requires_grad_(requires_grad)
        raise
    finally:
        several.adapters = {each: several.adapters[each] for each in order}
        vars(several.home)[SEVERAL] = several
        switch_to(several, before)
    fill_buffers(AdaptedModel(module), moved)


@contextmanager
def replacing(module: nn.Module, caller: str) -> Iterator[None]:
    """Have what is attached inside the block replace a module's only adapter, named or not; it keeps name and seed.

    Inside, the module is the bare base, where what trains in full has the values that it was trained to if the base's
    own were not kept. If the block raises, the adapter is there as before.
    """
    home = home_of(module)
    [root] = AdaptedModel(home).roots
    old, was_named = root.attachment, recorded(home) is not None
    starts = old.starts
    if not was_named:
        trained = AdaptedModel(root.module).in_full
        old.starts = {name: tensor.detach().clone() for name, tensor in trained.items() if name not in starts} | starts
    try:
        [name] = several_of(home, caller).adapters
        with in_place_of(home, name):
            yield
    finally:
        old.starts = starts
        if not was_named and (several := recorded(home)) is not None:
            forget(several)
            old.name = None
    [root] = AdaptedModel(home).roots
    new = root.attachment
    new.seed = old.seed
    if not was_named:
        new.name, new.starts = None, starts


def _thaw_base(several: Several) -> None:
    """Give the bare base the gradient flags and the normalization layers that it had before any adapter."""
    for adapter in several.adapters.values():
        for root in adapter.roots:
            for name, tensor in AdaptedModel(root.module).tensors.items():
                tensor.requires_grad_(root.attachment.required_grad.get(name, tensor.requires_grad))
            for _, part in walk(root.module):
                release_statistics(part)


def _check_new_name(names: list[str], name: str) -> None:
    check_name(name)
    if name in names:
        raise ValueError(
            f"There is an adapter {name!r} already. Choose another name, or call remove_adapter(module, {name!r}) "
            "first. Nothing was changed."
        )


@contextmanager
def others_frozen(module: nn.Module) -> Iterator[None]:
    """Take the adapters that are not active out of training, as DDP demands of parameters that get no gradient."""
    several = recorded(module)
    adapters = () if several is None else several.adapters.values()
    flags = [(p, p.requires_grad) for each in adapters for kept in each.kept.values() for p in kept.parameters()]
    for parameter, _ in flags:
        parameter.requires_grad_(False)
    if several is not None:
        before, several.frozen = several.frozen, {*several.adapters} - {several.active}
    try:
        yield
    finally:
        if several is not None:
            several.frozen = before
        for parameter, requires_grad in flags:
            parameter.requires_grad_(requires_grad)


@contextmanager
def others_hidden(module: nn.Module) -> Iterator[None]:
    """Have the module contain what it would with the active adapter alone, for code that looks through its parts."""
    several = recorded(module)
    adapters = () if several is None else several.adapters.values()
    parts = dict.fromkeys(part for adapter in adapters for part in adapter.kept)
    hidden = [(part, part._modules.pop(OTHERS)) for part in parts if OTHERS in part._modules]
    try:
        yield
    finally:
        for part, others in hidden:
            added = part._modules.get(OTHERS)
            part._modules[OTHERS] = others
            if added is not None and others is not None:
                others._modules.update(added._modules)
