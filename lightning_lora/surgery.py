"""Attach, detach, merge: the code that changes what a model is made of."""

from __future__ import annotations

import gc
import sys
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import cast

from torch import nn
from torch.nn.parallel import DistributedDataParallel

from lightning_lora.attachment import Attachment, attachments, count_merge, get_attachment, set_attachment
from lightning_lora.config import LoRAConfig
from lightning_lora.freezing import freeze_norms, freeze_parameters, thaw
from lightning_lora.layers import (
    Adapter,
    AdapterGroup,
    FrozenNorm,
    LoRALayer,
    ParameterAdapter,
    lora_layers,
    swap_in,
    swap_out,
    swapped_as,
)
from lightning_lora.plan import Plan, PlannedLayer, make_plan
from lightning_lora.report import AdaptedLayer, AttachReport
from lightning_lora.switching import check_mergeable, fold, set_mode
from lightning_lora.targets import listed, module_names


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
    with _no_garbage_collection():
        modules = module_names(module)
        _refuse_other_adapters(module, (part for part, _ in modules.values()), config, seed)
        plan = make_plan(module, modules, config, seed)
        _refuse_wrapped(module, plan)
        _warn_of_waste(plan)
        made = [
            (layer, layer.adapter(layer.module, layer.spec, layer.parameter)) for layer in plan.layers if _is_new(layer)
        ]
        for part, parameters in _by_layer(made).items():
            _swap_in_adapters(part, parameters)
        attachment = _noted(module, plan, config, seed)
        freeze_parameters(plan.modules, attachment)
        if plan.norms:
            freeze_norms(module)
    return attachment.report


def detach(module: nn.Module) -> None:
    """Remove every adapter: the exact base model is back, with its classes, keys and gradient flags.

    Modules trained in full keep what they learned.

    Raises:
        ValueError: The adapters were attached to a parent of this module.
    """
    _refuse_part(module)
    for layer in lora_layers(module).values():
        set_mode(layer, "disabled")
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
    check_mergeable(layers)
    for layer in layers.values():
        set_mode(layer, "active")
        fold(layer)
        _swap_out_adapter(layer)
        count_merge(layer)
    thaw(module)


def _warn_of_waste(plan: Plan) -> None:
    if plan.wasteful:
        warnings.warn(
            f"These adapters are not smaller than the weights they adapt: {listed(plan.wasteful)}. Lower their ranks "
            "with rank_pattern, or train the layers in full with modules_to_save.",
            stacklevel=4,
        )


def _is_new(layer: PlannedLayer) -> bool:
    return not isinstance(layer.module, LoRALayer)


def _refuse_other_adapters(module: nn.Module, parts: Iterable[nn.Module], config: LoRAConfig, seed: int) -> None:
    own = get_attachment(module)
    if own is not None and (own.config, own.seed) != (config, seed):
        before, after = own.config.to_dict() | {"seed": own.seed}, config.to_dict() | {"seed": seed}
        changed = [f"{key}: {before[key]!r} -> {after[key]!r}" for key in after if before[key] != after[key]]
        raise ValueError(
            f"{type(module).__name__} already carries adapters with other options ({'; '.join(changed)}). "
            "Call detach(module) first, or use the same config."
        )
    if own is None and any(isinstance(part, LoRALayer) for part in parts):
        layers = lora_layers(module)
        raise ValueError(
            f"{len(layers)} layers of {type(module).__name__} already carry adapters, such as {next(iter(layers))!r}, "
            "attached to another module. Call detach on that module first."
        )


def _refuse_wrapped(module: nn.Module, plan: Plan) -> None:
    kinds: list[type] = [DistributedDataParallel]
    if fsdp := sys.modules.get("torch.distributed.fsdp"):  # importing it for a look would take a second
        kinds += [fsdp.FullyShardedDataParallel, fsdp.FSDPModule]
    wrappers = tuple(kinds)
    for part in plan.modules.values():
        if isinstance(part, wrappers):
            raise RuntimeError(
                f"{type(module).__name__} is already wrapped for several processes (by {type(part).__name__}). "
                "Adapters attached now would not be synchronised between them. Call attach first and wrap afterwards."
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


def _by_layer(made: list[tuple[PlannedLayer, Adapter]]) -> dict[nn.Module, list[tuple[PlannedLayer, Adapter]]]:
    layers: dict[nn.Module, list[tuple[PlannedLayer, Adapter]]] = {}
    for planned, adapter in made:
        layers.setdefault(planned.module, []).append((planned, adapter))
    return layers


def _swap_in_adapters(module: nn.Module, made: list[tuple[PlannedLayer, Adapter]]) -> None:
    first, lora = made[0][0], cast(nn.Module, made[0][1])
    if isinstance(lora, ParameterAdapter):
        lora = AdapterGroup({planned.parameter: adapter for planned, adapter in made})
    swap_in(module, **swapped_as(module, tuple(planned.parameter for planned, _ in made), in_weight=first.in_weight))
    if not module.training:
        lora.eval()
    module._modules["lora"] = lora


def _swap_out_adapter(layer: LoRALayer) -> None:
    del layer.lora
    vars(layer).pop("lora_mode", None)
    swap_out(layer)


def _noted(module: nn.Module, plan: Plan, config: LoRAConfig, seed: int) -> Attachment:
    dtype_names = {
        dtype: str(dtype).removeprefix("torch.") for dtype in {planned.spec.dtype for planned in plan.layers}
    }
    layers = [
        AdaptedLayer(
            name=planned.label,
            pattern=planned.pattern,
            rank=planned.spec.rank,
            scaling=planned.spec.scaling,
            parameters=planned.size,
            dtype=dtype_names[planned.spec.dtype],
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
    covered = {id(part) for _, owner, _ in attachments(module) for part in owner.modules()}
    for part in module.modules():
        if isinstance(part, (LoRALayer, FrozenNorm)) and id(part) not in covered:
            raise ValueError(
                f"This {type(module).__name__} holds a {type(part).__name__} that was attached to a parent of it; call "
                "this on the module that was given to attach."
            )
