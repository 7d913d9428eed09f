"""What of the base trains besides the adapters: modules in full, and biases."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from lightning_lora.config import LoRAConfig
from lightning_lora.names import is_below, is_glob, join, listed, selected
from lightning_lora.planning.misses import Modules
from lightning_lora.planning.plan import Plan

Ties = Mapping[str, tuple[str, ...]]  # parameter -> those that share its memory


def plan_saved_modules(plan: Plan, modules: Modules, config: LoRAConfig, tied: Ties) -> Iterator[str]:
    """Plan what ``modules_to_save`` names, and yield what is wrong with it."""
    for name, (submodule, names) in modules.items():
        entry = selected(config.modules_to_save, names)
        if entry is None or is_below(name, plan.saved):
            continue
        if any(True for _ in submodule.parameters()) or (not is_glob(entry) and submodule.state_dict()):
            plan.saved[name] = submodule
        elif not is_glob(entry):
            yield f"modules_to_save: {name!r} is a {type(submodule).__name__} without parameters and buffers to save."
    for name, submodule in plan.saved.items():
        for key, _ in submodule.named_parameters():
            full = join(name, key)
            if outside := [other for other in tied.get(full, ()) if not is_below(other, plan.saved)]:
                yield (
                    f"modules_to_save: {full!r} is tied to {outside}, which would change with it. Name the modules on "
                    "both sides, or untie them."
                )


def plan_biases(plan: Plan, config: LoRAConfig, tied: Ties) -> Iterator[str]:
    """Plan the biases that train, and yield what is wrong with that.

    A bias is a parameter whose own name says so, as in PEFT: ``bias``, ``in_proj_bias``, ``bias_ih_l0``.
    """
    if config.bias == "none":
        return
    adapted = {id(layer.module) for layer in plan.layers}
    found = {
        join(name, key): parameter
        for name, part in plan.modules.items()
        if (config.bias == "all" or id(part) in adapted) and not is_below(name, plan.saved)
        for key, parameter in part._parameters.items()
        if parameter is not None and "bias" in key
    }
    plan.biases += found
    if on_meta := [name for name, parameter in found.items() if parameter.is_meta]:
        yield (
            f"bias={config.bias!r}: {listed(on_meta)} are on the meta device and have no values that could be put back "
            "by detach; attach when the weights are there."
        )
    if not plan.biases and plan.layers:
        where = "The model has" if config.bias == "all" else "The adapted layers have"
        yield f"bias={config.bias!r}: {where} no bias to train. Use bias='none'."
    for name in plan.biases:
        if outside := [other for other in tied.get(name, ()) if other not in plan.biases]:
            yield f"bias={config.bias!r}: {name!r} is tied to {outside}, which would change with it."
