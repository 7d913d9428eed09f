"""What would make a run finish green without having trained: each check returns the sentence to say, or None."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch
from torch import nn
from torch.optim import Optimizer

from lightning_lora.attachment import attachments
from lightning_lora.layers import all_adapters, base_parameter, lora_layers
from lightning_lora.names import clean_name, listed
from lightning_lora.optimizers import homeless_parameters
from lightning_lora.sharding import anywhere, local
from lightning_lora.state import adapter_tensors


def replaced_layers(module: nn.Module) -> str | None:
    """Adapted layers that were thrown away after attaching, as plugins and model surgery do."""
    there = set(all_adapters(module))
    lost = [
        full
        for root, _, attachment in attachments(module)
        for layer in attachment.report.layers
        if (full := f"{root}.{layer.name}" if root else layer.name) not in there
    ]
    if not lost:
        return None
    return (
        f"{listed(lost)} were replaced after LoRA was attached, with their adapters. Replace layers before that: in "
        "__init__ or configure_model."
    )


def fragile_factors(module: nn.Module) -> str | None:
    """Factors in a precision in which Adam's divisor vanishes."""
    if not any(attachment.config.adapter_dtype == "float16" for _, _, attachment in attachments(module)):
        return None
    return (
        "adapter_dtype='float16': Adam's eps of 1e-8 is zero in float16, so its steps become NaN. Use 'float32', which "
        "costs little, or an optimizer without such a divisor."
    )


def undeclared_training(module: nn.Module) -> str | None:
    """Parameters that would train and not be saved."""
    declared = adapter_tensors(module)
    stray = [clean_name(name) for name, parameter in module.named_parameters() if parameter.requires_grad]
    stray = [name for name in stray if name not in declared]
    if not stray:
        return None
    return (
        f"{listed(stray)} would train but not be saved: they belong to no adapter. Name their modules in "
        "modules_to_save, or leave them frozen."
    )


def unheld_parameters(module: nn.Module, optimizers: Sequence[Optimizer]) -> str | None:
    """Trainable parameters that no optimizer would move."""
    homeless = homeless_parameters(module, optimizers)
    if not homeless:
        return None
    return (
        f"{listed(homeless)} are held by no optimizer, so they would not train. Return one from configure_optimizers."
    )


def held_adapters(module: nn.Module, optimizer: Optimizer) -> list[str]:
    """Return the names of the adapters of which an optimizer holds a parameter."""
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    return [
        name
        for name, adapter in all_adapters(module).items()
        if any(id(factor) in held for factor in adapter.parameters())
    ]


def reached_adapters(module: nn.Module, device: torch.device) -> set[str]:
    """Return the names of the adapters that have a gradient, in any process; every process must call this.

    Args:
        module: The adapted module.
        device: Where processes talk to each other; offloaded parameters lie elsewhere.
    """
    adapters = all_adapters(module)
    # A process may hold a part of an adapter, or none of it, so they have to agree.
    flags = anywhere([_has_gradient(adapter) for adapter in adapters.values()], device)
    return {name for name, is_reached in zip(adapters, flags, strict=True) if is_reached}


def unreached_message(names: Sequence[str], reached: Collection[str]) -> tuple[str | None, bool]:
    """Return what is to be said of those that were not reached, and whether that is all of them."""
    silent = [name for name in names if name not in reached]
    if not silent:
        return None, False
    message = (
        f"No gradient reached the adapters of {listed(silent)} in the first step. Are these layers used in the loss? "
        "Reentrant activation checkpointing over frozen inputs also cuts gradients: set use_reentrant=False."
    )
    return message, len(silent) == len(names)


def untrained_adapters(module: nn.Module, device: torch.device) -> str | None:
    """A model whose adapters are all at their start: it computes what the base does. Every process must call this.

    Args:
        module: The adapted module.
        device: Where processes talk to each other.
    """
    layers = lora_layers(module).values()
    is_trained = any(
        adapter.has_effect(base_parameter(layer, adapter.parameter))
        for layer in layers
        for adapter in layer.adapters().values()
    )
    # A process may hold nothing of any B.
    if not layers or any(anywhere([is_trained], device)):
        return None
    return (
        "Every LoRA adapter is still at its start, so this evaluates the bare base model. Pass the checkpoint of a "
        "trained adapter as ckpt_path."
    )


def untrained_fit(module: nn.Module, device: torch.device, steps: int, *, is_wanted: bool) -> tuple[str | None, bool]:
    """Return what is to be said of a fit that left all adapters at their start, and whether it failed by that.

    Args:
        module: The adapted module.
        device: Where processes talk to each other.
        steps: How many optimizer steps the Trainer counted.
        is_wanted: Whether the Trainer was told to make none.
    """
    if untrained_adapters(module, device) is None:
        return None, False
    if steps:
        message = f"Every LoRA adapter is still at its start after {steps} steps. Was the learning rate zero?"
        return message, False
    message = (
        "This fit made no optimizer step, so every LoRA adapter is still at its start. Is the train_dataloader empty, "
        "or limit_train_batches, max_steps or max_epochs zero? With manual optimization, step the optimizers."
    )
    return message, not is_wanted


def _has_gradient(adapter: nn.Module) -> bool:
    return any(p.grad is not None and bool(torch.any(local(p.grad) != 0)) for p in adapter.parameters())
