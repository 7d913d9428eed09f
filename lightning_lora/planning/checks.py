"""What ``attach`` refuses or warns of, once it has a plan and before it changes anything."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterable, Mapping
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from lightning_lora.attachment import Attachment, get_attachment, keeps_starts, kept_aside
from lightning_lora.config import LoRAConfig
from lightning_lora.layers import LoRALayer
from lightning_lora.names import OTHERS, listed
from lightning_lora.planning.plan import Plan, PlannedLayer, originals
from lightning_lora.sharding import is_fully_sharded

_APART = (
    "A part that is a model by itself, such as a teacher, keeps what it computes after merge(part), or outside of the "
    "module: object.__setattr__(self, 'teacher', teacher)."
)


def refuse_other_options(module: nn.Module, old: Attachment, config: LoRAConfig, seed: int) -> None:
    """Refuse to attach to an adapted module with options that its adapter does not have.

    Raises:
        ValueError: Its message names them.
    """
    before, after = old.config.to_dict() | {"seed": old.seed}, config.to_dict() | {"seed": seed}
    changed = [
        f"{key}: {before.get(key)!r} -> {after.get(key)!r}"
        for key in {**before, **after}
        if _without_order(before.get(key)) != _without_order(after.get(key))
    ]
    if changed:
        remedy = "Call detach(module) first, which removes what they have learned, or use the same config."
        if old.name is not None:  # detach would remove the others too
            remedy = f"Use the same config for {old.name!r}, or another name; remove_adapter(module, name) removes one."
        remedy += " LoRACallback(init_from=...) goes on from a saved adapter with other options."
        remedy += " A Trainer without the callback evaluates what is attached."
        raise ValueError(
            f"{type(module).__name__} already carries adapters with other options ({'; '.join(changed)}). {remedy}"
        )


def _without_order(option: Any) -> Any:
    """Return an option with a list of names in the order of the alphabet: theirs has no meaning."""
    return sorted(option, key=str) if isinstance(option, list) else option


def check_plan(plan: Plan, new: list[PlannedLayer], old: Attachment | None) -> None:
    """Reject models that cannot take the planned adapters, and warn about wasteful and surprising ones.

    Args:
        plan: All that attaching will do.
        new: The layers without adapters so far.
        old: The record of an earlier attach to the same module.

    Raises:
        ValueError: Adapters are in the way, or layers come too late.
        RuntimeError: The model is wrapped for several processes.
    """
    if old is None:
        _refuse_adapters_of_others(plan)
    elif new and old.name is not None:
        raise ValueError(
            f"{plan.root} has several adapters, and layers that {old.name!r} does not know: "
            f"{listed([layer.label for layer in new])}. Build all layers before the first adapter is added."
        )
    if new and torch.distributed.is_available() and torch.distributed.is_initialized():
        _refuse_wrapped(plan.root, plan.modules.values())
    if plan.untied and (divided := [name for name in plan.untied if hasattr(plan.parameters[name], "ds_id")]):
        raise ValueError(
            f"untie_weights cannot copy weights that DeepSpeed ZeRO-3 has already sharded: {listed(divided)}. "
            "Untie them where the model is built, or use ZeRO stage 2."
        )
    if plan.wasteful:
        warnings.warn(
            f"These adapters are not smaller than the weights they adapt: {listed(plan.wasteful)}. Lower their ranks "
            "with rank_pattern, or a schedule's with max_rank, or train the layers in full with modules_to_save.",
            stacklevel=3,
        )
    if old is None:
        _warn_of_thawed(plan)


def _refuse_adapters_of_others(plan: Plan) -> None:
    """Refuse a model in which adapters were attached to another module, or wait in another's record."""
    names = [name for name, part in plan.modules.items() if isinstance(part, LoRALayer)]
    if names:
        owners = [name for name, part in plan.modules.items() if get_attachment(part) is not None]
        where = f"its {listed(owners)}, as load_adapter does with a directory" if owners else "a module above it"
        raise ValueError(
            f"{len(names)} layers of {plan.root} already carry adapters, such as {names[0]!r}, attached to {where}. To "
            "go on from a saved adapter, let LoRACallback(init_from=...) load it instead. To evaluate what is loaded, "
            "use a Trainer without the callback. To start anew, call detach on that module first, which removes what "
            f"it has learned. {_APART}"
        )
    for name, part in kept_aside().items():
        if {*part.modules()}.isdisjoint([*(layer.module for layer in plan.layers), *plan.saved.values()]):
            raise ValueError(
                f"{name!r} has adapters of its own, and the new adapter leaves all of it out. One adapter of a model "
                f"is in place at a time, so {name!r} would compute without its own. {_APART}"
            )
    if not keeps_starts() and any(OTHERS in part._modules for part in plan.modules.values()):
        raise ValueError(
            f"{plan.root} has several adapters, and is the bare base now, inside using(module, None). Leave that "
            "first, or call add_adapter(module, name, config)."
        )


def _refuse_wrapped(kind: str, modules: Iterable[nn.Module]) -> None:
    for part in modules:
        if isinstance(part, DistributedDataParallel) or is_fully_sharded(part):
            raise RuntimeError(
                f"{kind} is already wrapped for several processes (by {type(part).__name__}). Adapters attached now "
                "would not be synchronized between them. Call attach first and wrap afterwards: in configure_model, "
                "call lightning_lora.attach(self) before fully_shard; it uses the LoRACallback's options. An adapter "
                "that a later fit is to train must be there by then, too: call add_adapter(self, name, config) after "
                "it, or build the module anew."
            )


def _warn_of_thawed(plan: Plan) -> None:
    if thawed := plan.thawed():
        excluded, targets = plan.config.exclude_modules, plan.config.target_modules
        kept = [*(() if isinstance(excluded, str) else excluded), *thawed]
        named = [*((targets,) if isinstance(targets, str) else targets)]
        named += [f"{name}.*" if plan.modules[name]._modules else name for name in thawed]
        warnings.warn(
            f"These modules were frozen, and now train adapters because target_modules={targets!r} reaches them: "
            f"{listed(thawed)}. exclude_modules={kept} leaves them as they were; target_modules={named} adapts them "
            f"without this warning.{copies_named(thawed, plan.modules)}",
            stacklevel=4,
        )


def copies_named(names: Collection[str], modules: Mapping[str, nn.Module]) -> str:
    """Return advice for modules that are copies of others and may have to follow these; empty if there are none."""
    found = listed([f"{name} (of {original})" for name, original in originals(names, modules).items()])
    if not found:
        return ""
    return (
        f" These are copies: {found}. To follow, as a momentum teacher, an EMA or a target network does, copy in "
        "setup, after lightning_lora.attach(self), so that both start with equal adapters."
    )
