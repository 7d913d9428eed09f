"""Attach, detach, merge: the code that changes what a model is made of."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import cast

from torch import nn
from torch.nn.parallel import DistributedDataParallel

from lightning_lora.attachment import (
    AdaptedLayer,
    Attachment,
    AttachReport,
    attachments,
    copy_values,
    count_merge,
    get_attachment,
    requested,
    set_attachment,
)
from lightning_lora.config import LoRAConfig
from lightning_lora.freezing import freeze_norms, freeze_parameters, thaw, weights_only_read
from lightning_lora.layers import (
    Adapter,
    AdapterGroup,
    FrozenNorm,
    LoRALayer,
    lora_layers,
    swap_in,
    swap_out,
    swapped_as,
    swapped_as_follower,
)
from lightning_lora.modes import check_mergeable, fold, set_mode
from lightning_lora.names import listed, module_names
from lightning_lora.planning.plan import Plan, PlannedLayer
from lightning_lora.planning.planner import make_plan
from lightning_lora.probe import dead_message
from lightning_lora.sharding import is_fully_sharded, shapes_shown


def attach(module: nn.Module, config: LoRAConfig | None = None, *, seed: int = 0, probe: object = None) -> AttachReport:
    """Give the configured layers of a module LoRA adapters and freeze everything else.

    The model computes the same as before until the adapters are trained: ``B`` starts at zero. Base parameters keep
    their names and identity. Calling it again with the same config adapts only what is new.

    Args:
        module: Any module; it is changed in place.
        config: What to adapt and how; if left out, what the LoRACallback of the running Trainer asks for, with its
            seed, else ``LoRAConfig()``.
        seed: Seed of the random starts. Each layer's ``A`` depends on it, on the layer's name and on its shape only.
        probe: A batch on which every adapter must change the module's output, in training and in evaluation: a tensor,
            the entries of a tuple or list that ``forward`` requires, or those of a dict that it accepts. Costs a few
            passes; leaves no trace.

    Returns:
        What was adapted and what was left out; ``print`` it for a table.

    Raises:
        ValueError: The config and the model do not fit, the module is already adapted with another config, or the
            probe found adapters without effect. Nothing was changed.
        RuntimeError: The module is already wrapped for several processes. Nothing was changed.

    Source:
        Hu et al. 2021, "LoRA", arXiv:2106.09685, section 4.1.
    """
    if config is None:
        config, seed = requested(module) or (LoRAConfig(), seed)
    with _no_garbage_collection(), shapes_shown(module):
        modules = module_names(module)
        _refuse_other_adapters(module, (part for part, _ in modules.values()), config, seed)
        with weights_only_read(part for part, _ in modules.values()):
            plan = make_plan(module, modules, config, seed)
            _refuse_wrapped(module, plan)
            _refuse_untying_divided(plan)
            _warn_of_waste(plan)
            made = [
                (layer, layer.adapter(layer.module, layer.spec, layer.parameter))
                for layer in plan.layers
                if _is_new(layer)
            ]
        for name in plan.untied:
            plan.parameters[name] = _untie(plan.modules, name)
        for part, parameters in _by_layer(made).items():
            _swap_in_adapters(part, parameters)
        old = get_attachment(module)
        attachment = _noted(module, plan, config, seed)
        freeze_parameters(plan, attachment)
        if plan.norms:
            freeze_norms(module)
    if probe is not None:
        _refuse_dead(module, probe, is_new=old is None)
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
        copy_values(owner, attachment.base_values)
        modules = {path: part for path, (part, _) in module_names(owner).items()} if attachment.untied else {}
        for name, other in attachment.untied.items():
            _tie(modules, name, other)
    thaw(module)


def merge(module: nn.Module, *, whole: Callable[[LoRALayer], AbstractContextManager[object]] = nullcontext) -> None:
    """Fold every adapter into its layer's weight for good; an ordinary model without inference cost remains.

    The sum is made in float32 (float64 for float64) and rounded once. There is no way back: keep the adapter's file, or
    use ``merged`` for a while only. Loading an adapter into a merged model raises.

    Args:
        module: An adapted module.
        whole: Context in which the whole of a layer's tensors is at hand, for modules that FSDP has divided.

    Raises:
        ValueError: An adapter holds NaN or infinity, or there is none. Nothing was changed.
        RuntimeError: A weight cannot take the update. Nothing was changed.
    """
    _refuse_part(module)
    layers = lora_layers(module)
    if not layers:
        raise ValueError(f"merge: {type(module).__name__} has no adapters.")
    for name, layer in layers.items():
        with whole(layer):
            check_mergeable({name: layer})
    for layer in layers.values():
        with whole(layer):
            set_mode(layer, "active")
            fold(layer)
    for layer in layers.values():
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


def _refuse_dead(module: nn.Module, batch: object, *, is_new: bool) -> None:
    try:
        if message := dead_message(module, batch):
            raise ValueError(f"{message} Nothing was changed.")
    except BaseException:
        if is_new:
            detach(module)
        raise


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
    if not any(_is_new(layer) for layer in plan.layers):
        return
    for part in plan.modules.values():
        if isinstance(part, DistributedDataParallel) or is_fully_sharded(part):
            raise RuntimeError(
                f"{type(module).__name__} is already wrapped for several processes (by {type(part).__name__}). "
                "Adapters attached now would not be synchronised between them. Call attach first and wrap afterwards: "
                "in configure_model, lightning_lora.attach(self) before fully_shard takes the LoRACallback's options."
            )


def _refuse_untying_divided(plan: Plan) -> None:
    if names := [name for name in plan.untied if hasattr(plan.parameters[name], "ds_id")]:
        raise ValueError(
            f"untie_weights: {listed(names)} are divided by DeepSpeed's ZeRO-3 already, so they cannot be copied. "
            "Untie them where the model is built, or use ZeRO stage 2."
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
            if not gc.get_freeze_count():  # else the user froze objects, which unfreeze would give back
                # What was made stays: it goes to the old objects at once, or the collector would walk it all right now.
                gc.freeze()
                gc.unfreeze()
            gc.enable()


def _by_layer(made: list[tuple[PlannedLayer, Adapter]]) -> dict[nn.Module, list[tuple[PlannedLayer, Adapter]]]:
    layers: dict[nn.Module, list[tuple[PlannedLayer, Adapter]]] = {}
    for planned, adapter in made:
        layers.setdefault(planned.module, []).append((planned, adapter))
    return layers


def _swap_in_adapters(module: nn.Module, made: list[tuple[PlannedLayer, Adapter]]) -> None:
    first, lora = made[0][0], cast(nn.Module, made[0][1])
    if first.key:
        lora = AdapterGroup({planned.key: adapter for planned, adapter in made}).train(module.training)
    parameters = (planned.parameter for planned, _ in made)
    swap_in(module, *swapped_as(module, parameters, in_weight=first.in_weight))
    module._modules["lora"] = lora
    for follower in first.followers:
        swap_in(follower, *swapped_as_follower(follower))
        follower._modules["lora"] = lora


def _swap_out_adapter(layer: LoRALayer) -> None:
    del layer.lora
    vars(layer).pop("lora_mode", None)
    swap_out(layer)


def _untie(modules: Mapping[str, nn.Module], name: str) -> nn.Parameter:
    """Give a weight a copy of its own, and return it."""
    weight = _parameter_of(modules, name)
    copy = nn.Parameter(weight.detach().clone(), weight.requires_grad)
    _set_parameter(modules, name, copy)
    return copy


def _tie(modules: Mapping[str, nn.Module], name: str, other: str) -> None:
    """Make a weight another one again."""
    _set_parameter(modules, name, _parameter_of(modules, other))


def _parameter_of(modules: Mapping[str, nn.Module], name: str) -> nn.Parameter:
    owner, _, key = name.rpartition(".")
    return cast(nn.Parameter, modules[owner]._parameters[key])


def _set_parameter(modules: Mapping[str, nn.Module], name: str, parameter: nn.Parameter) -> None:
    owner, _, key = name.rpartition(".")
    modules[owner]._parameters[key] = parameter


def _noted(module: nn.Module, plan: Plan, config: LoRAConfig, seed: int) -> Attachment:
    dtype_names = {
        dtype: str(dtype).removeprefix("torch.") for dtype in {planned.spec.dtype for planned in plan.layers}
    }
    layers = [
        AdaptedLayer(
            planned.label,
            planned.pattern,
            planned.spec.rank,
            planned.spec.scaling,
            planned.size,
            dtype_names[planned.spec.dtype],
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
        biases={name: plan.parameters[name].numel() for name in plan.biases},
        untied=plan.untied,
    )
    attachment = Attachment(config, seed, report, tuple(plan.saved), untied=dict(plan.untied))
    if (old := get_attachment(module)) is not None:
        attachment.required_grad, attachment.base_values = old.required_grad, old.base_values
        attachment.untied |= old.untied
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
