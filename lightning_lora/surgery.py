"""Attach, detach, merge, switch: the only code that changes a model."""

from __future__ import annotations

import gc
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from lightning_lora.attachment import Attachment, attachments, count_merge, get_attachment, set_attachment
from lightning_lora.config import LoRAConfig
from lightning_lora.freezing import freeze_norms, freeze_parameters, thaw
from lightning_lora.layers import Adapter, LoRALayer, Mode, base_weight, swap_in, swap_out
from lightning_lora.plan import Plan, PlannedLayer, make_plan
from lightning_lora.report import AdaptedLayer, AttachReport
from lightning_lora.targets import clean_name, listed


def lora_layers(module: nn.Module) -> dict[str, LoRALayer]:
    """Return the adapted layers of a model by name; by type, so a user's ``lora_head`` is none."""
    return {clean_name(name): part for name, part in module.named_modules() if isinstance(part, LoRALayer)}


def attach(module: nn.Module, config: LoRAConfig | None = None, *, seed: int = 0) -> AttachReport:
    """Give the configured layers of a module LoRA adapters and freeze everything else.

    The model computes the same as before until the adapters are trained: ``B`` starts at zero. Base parameters keep
    their names and identity. Calling it again with the same config adapts only what is new.

    Args:
        module: Any module; it is changed in place.
        config: What to adapt and how; ``LoRAConfig()`` if left out.
        seed: Seed of the random starts. Each layer's ``A`` depends on it, on the layer's name and on its shape only.

    Returns:
        What was adapted and what was left out; ``print`` it for a table.

    Raises:
        ValueError: The config and the model do not fit, or the module is already adapted with another config. Nothing
            was changed.
        RuntimeError: The module is already wrapped for several processes. Nothing was changed.

    Source:
        Hu et al. 2021, "LoRA", arXiv:2106.09685, section 4.1.
    """
    config = LoRAConfig() if config is None else config
    _refuse_other_adapters(module, config, seed)
    _refuse_wrapped(module)
    with _no_garbage_collection():
        plan = make_plan(module, config, seed)
        adapters = [(layer.module, layer.adapter(layer.module, layer.spec)) for layer in plan.layers if _is_new(layer)]
        for part, adapter in adapters:
            _swap_in_adapter(part, adapter)
        attachment = _noted(module, plan, config, seed)
        freeze_parameters(module, attachment)
        freeze_norms(module)
    if plan.wasteful:
        warnings.warn(
            f"These adapters are not smaller than the weights they adapt: {listed(plan.wasteful)}. Lower their ranks "
            "with rank_pattern, or train the layers in full with modules_to_save.",
            stacklevel=2,
        )
    return attachment.report


def detach(module: nn.Module) -> None:
    """Remove every adapter: the exact base model is back, with its classes, keys and gradient flags.

    Modules trained in full keep what they learned.

    Raises:
        ValueError: The adapters were attached to a parent of this module.
    """
    _refuse_part(module)
    for layer in lora_layers(module).values():
        _set_mode(layer, "disabled")
        _swap_out_adapter(layer)
    for _, owner, attachment in attachments(module):
        buffers = dict(owner.named_buffers())
        for name, value in attachment.base_buffers.items():
            buffers[name].copy_(value)
    thaw(module)


def merge(module: nn.Module) -> None:
    """Fold every adapter into its layer's weight for good; an ordinary model without inference cost remains.

    The sum is made in float32 (float64 for float64) and rounded once. There is no way back: keep the adapter's file, or
    use ``merged`` for a while only. Loading an adapter into a merged model raises.

    Raises:
        ValueError: An adapter holds NaN or infinity, or there is none. Nothing was changed.
        RuntimeError: A weight cannot take the update. Nothing was changed.
    """
    _refuse_part(module)
    layers = lora_layers(module)
    if not layers:
        raise ValueError(f"merge: {type(module).__name__} has no adapters.")
    _check_mergeable(layers)
    for layer in layers.values():
        _set_mode(layer, "active")
        fold(layer)
        _swap_out_adapter(layer)
        count_merge(layer)
    thaw(module)


@contextmanager
def merged(module: nn.Module) -> Iterator[None]:
    """Compute with the adapters folded into the weights, and restore the exact weights afterwards.

    Needs a copy of the adapted weights meanwhile. Disabled adapters stay disabled.
    """
    layers = lora_layers(module)
    _check_mergeable(layers)
    with _modes(layers, lambda mode: "merged" if mode == "active" else mode):
        yield


@contextmanager
def disabled(module: nn.Module) -> Iterator[None]:
    """Compute with the bare base model, bit for bit, and switch the adapters back on afterwards.

    Modules trained in full are not affected.
    """
    base_buffers = [
        (buffers[name], value)
        for _, owner, attachment in attachments(module)
        for buffers in [dict(owner.named_buffers())]
        for name, value in attachment.base_buffers.items()
    ]
    tracked = [buffer.clone() for buffer, _ in base_buffers]
    with _modes(lora_layers(module), lambda _: "disabled"):
        try:
            for buffer, value in base_buffers:
                buffer.copy_(value)
            yield
        finally:
            for (buffer, _), value in zip(base_buffers, tracked, strict=True):
                buffer.copy_(value)


@torch.no_grad()
def fold(layer: LoRALayer) -> None:
    """Add the update to the weight: a float32 (or float64) sum and one rounding, at the end."""
    weight, delta = base_weight(layer), layer.delta_weight()
    dtype = torch.promote_types(weight.dtype, delta.dtype)
    weight.copy_(weight.to(dtype) + delta.to(dtype))


def _is_new(layer: PlannedLayer) -> bool:
    return not isinstance(layer.module, LoRALayer)


def _refuse_other_adapters(module: nn.Module, config: LoRAConfig, seed: int) -> None:
    own = get_attachment(module)
    if own is not None and (own.config, own.seed) != (config, seed):
        before, after = own.config.to_dict() | {"seed": own.seed}, config.to_dict() | {"seed": seed}
        changed = [f"{key}: {before[key]!r} -> {after[key]!r}" for key in after if before[key] != after[key]]
        raise ValueError(
            f"{type(module).__name__} already carries adapters with other options ({'; '.join(changed)}). "
            "Call detach(module) first, or use the same config."
        )
    if own is None and any(isinstance(part, LoRALayer) for part in module.modules()):
        layers = lora_layers(module)
        raise ValueError(
            f"{len(layers)} layers of {type(module).__name__} already carry adapters, such as {next(iter(layers))!r}, "
            "attached to another module. Call detach on that module first."
        )


def _refuse_wrapped(module: nn.Module) -> None:
    kinds: list[type] = [DistributedDataParallel]
    if fsdp := sys.modules.get("torch.distributed.fsdp"):  # importing it for a look would take a second
        kinds += [fsdp.FullyShardedDataParallel, fsdp.FSDPModule]
    wrappers = tuple(kinds)
    for part in module.modules():
        if isinstance(part, wrappers):
            raise RuntimeError(
                f"{type(module).__name__} is already wrapped for several processes (by {type(part).__name__}). Adapters "
                "attached now would not be synchronised between them. Call attach first and wrap afterwards."
            )


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """Thousands of new modules would have the collector walk the whole model again and again: half the time."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _swap_in_adapter(module: nn.Module, adapter: Adapter) -> None:
    swap_in(module, LoRALayer)
    if not module.training:
        adapter.training = False
    module.lora = adapter


def _swap_out_adapter(layer: LoRALayer) -> None:
    del layer.lora
    vars(layer).pop("lora_mode", None)
    swap_out(layer)


def _noted(module: nn.Module, plan: Plan, config: LoRAConfig, seed: int) -> Attachment:
    layers = [
        AdaptedLayer(
            name=planned.name,
            pattern=planned.pattern,
            rank=planned.spec.rank,
            scaling=planned.spec.scaling,
            parameters=planned.parameters,
            dtype=str(planned.spec.dtype).removeprefix("torch."),
        )
        for planned in plan.layers
    ]
    report = AttachReport(
        layers=layers,
        saved={name: sum(p.numel() for p in part.parameters()) for name, part in plan.saved.items()},
        left_out=plan.left_out,
        base_parameters=plan.base_parameters,
        norms=plan.norms,
        frozen_norm=config.frozen_norm,
    )
    old = get_attachment(module)
    attachment = Attachment(
        config, seed, report, tuple(plan.saved), *(() if old is None else (old.required_grad, old.base_buffers))
    )
    set_attachment(module, attachment)
    return attachment


def _refuse_part(module: nn.Module) -> None:
    covered = {id(layer) for _, owner, _ in attachments(module) for layer in lora_layers(owner).values()}
    for name, layer in lora_layers(module).items():
        if id(layer) not in covered:
            raise ValueError(
                f"The adapter of {name!r} was attached to a parent of this {type(module).__name__}; "
                "call this on the module that was given to attach."
            )


def _check_mergeable(layers: dict[str, LoRALayer]) -> None:
    for name, layer in layers.items():
        if "weight" not in layer._parameters:
            raise RuntimeError(
                f"The weight of {name!r} is computed from other parameters, so nothing can be merged into it. "
                "Remove the parametrization first (torch.nn.utils.parametrize.remove_parametrizations)."
            )
        if not all(bool(torch.isfinite(factor).all()) for factor in layer.lora.parameters()):
            raise ValueError(f"The adapter of {name!r} holds NaN or infinity; merging it would destroy the weight.")


@torch.no_grad()
def _set_mode(layer: LoRALayer, mode: Mode) -> None:
    if layer.lora_mode == mode:
        return
    if layer.lora_mode == "merged":
        # The kept copy, not a subtraction: W + dW - dW is not W in floating point.
        base_weight(layer).copy_(vars(layer).pop("lora_original"))
    if mode == "merged":
        vars(layer)["lora_original"] = base_weight(layer).detach().clone()
        fold(layer)
    layer.lora_mode = mode


@contextmanager
def _modes(layers: dict[str, LoRALayer], choose: Callable[[Mode], Mode]) -> Iterator[None]:
    """Switch layers and put back what was found, however the block ends; nests."""
    before = [(layer, layer.lora_mode) for layer in layers.values()]
    try:
        for layer, mode in before:
            _set_mode(layer, choose(mode))
        yield
    finally:
        for layer, mode in before:
            if isinstance(layer, LoRALayer):  # not merged for good or detached meanwhile
                _set_mode(layer, mode)
