"""Attach, detach, merge: the only code that changes what a model is made of."""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from typing import Any, cast

import torch
from torch import nn

from lightning_lora.adapted_model import AdaptedModel, Root, in_turn
from lightning_lora.attachment import (
    NONE_STORED,
    AdaptedLayer,
    Attachment,
    AttachReport,
    Stored,
    count_merge,
    get_attachment,
    keeps_starts,
    requested,
    set_attachment,
    settled,
)
from lightning_lora.config import LoRAConfig
from lightning_lora.layers import (
    Adapter,
    AdapterGroup,
    LoRALayer,
    base_parameter,
    release_statistics,
    swap_in,
    swap_out,
    swapped_as,
    swapped_as_follower,
    weights_only_read,
)
from lightning_lora.modes import check_mergeable, fold, freeze_norms, set_mode
from lightning_lora.named_adapters import adapter_names, forget, recorded, switch_to
from lightning_lora.names import clean_name, module_names, parameters_of, unmatched
from lightning_lora.planning.checks import check_plan, refuse_other_options
from lightning_lora.planning.plan import Plan, PlannedLayer, sizes_once
from lightning_lora.planning.planner import make_plan
from lightning_lora.probe import refuse_dead_adapters
from lightning_lora.sharding import shapes_shown
from lightning_lora.switching import beside, chosen, set_adapter

_RESIZE = "resize_token_embeddings"  # of transformers models


def attach(module: nn.Module, config: LoRAConfig | None = None, *, seed: int = 0, probe: object = None) -> AttachReport:
    """Add LoRA adapters to the configured layers of a module and freeze everything else.

    The model computes the same as before until the adapters are trained: ``B`` starts at zero. Base parameters keep
    their names and identity. Calling it again with the same config adapts only what is new.

    Args:
        module: Any module; it is changed in place.
        config: What to adapt and how. Defaults to the options and the seed of the running Trainer's LoRACallback, else
            to those of the adapter that the module has, else to ``LoRAConfig()``.
        seed: Seed of the random starts. Each layer's ``A`` depends on it, on the layer's name and on its shape only.
        probe: A batch on which every adapter must change the module's output, in training and in evaluation: a tensor,
            the entries of a tuple or list that ``forward`` requires, or those of a dict that it accepts; the dict
            itself if ``forward`` requires one argument, which is no entry of it. Costs a few forward passes and leaves
            the module as it was.

    Returns:
        A report of what was adapted and left out; ``print`` it for a table.

    Raises:
        TypeError: The config is no LoRAConfig.
        ValueError: The config and the model do not fit, the module is already adapted with another config, or the
            probe found adapters without effect. Nothing was changed.
        RuntimeError: The module is already wrapped for several processes. Nothing was changed.

    Source:
        Hu et al. 2021, "LoRA", arXiv:2106.09685, section 4.1.
    """
    old = get_attachment(module)
    if config is None:
        goes_on = (LoRAConfig(), seed) if old is None else (old.config, old.seed)
        config, seed, name, stored = requested(module) or (*goes_on, None, NONE_STORED)
        if name is not None:
            return attach_named(module, name, config, seed=seed, stored=stored)
    if not isinstance(config, LoRAConfig):
        raise TypeError(f"attach: config must be a LoRAConfig, got a {type(config).__name__}.")
    if old is not None:
        config = settled(config, old)
        refuse_other_options(module, old, config, seed)
    # Factors that were made in inference mode could never train.
    with (
        torch.inference_mode(False),
        _no_garbage_collection(),
        shapes_shown(module) if "deepspeed" in sys.modules else nullcontext(),
    ):
        plan = make_plan(module, config, seed)
        new = [layer for layer in plan.layers if not isinstance(layer.module, LoRALayer)]
        check_plan(plan, new, old)
        with weights_only_read(plan.normalizing.values()) if plan.normalizing else nullcontext():
            made = _make_adapters(new)
        with _undone_on_failure(module, plan, made, old):  # no line above changes the model
            for name in plan.untied:
                weight = plan.parameters[name]
                plan.parameters[name] = nn.Parameter(weight.detach().clone(), weight.requires_grad)
                _set_parameter(plan.modules, name, plan.parameters[name])
            for layer, adapters in made.items():
                _swap_in_adapters(layer, adapters)
            attachment = _record(plan, seed, old)
            set_attachment(module, attachment)
            _freeze_parameters(plan, attachment)
            if plan.norms:
                freeze_norms(module)
            _guard_resizing(plan.modules.values())
            if old is None and keeps_starts():
                attachment.starts = {name: each.detach().clone() for name, each in AdaptedModel(module).in_full.items()}
            if probe is not None:
                refuse_dead_adapters(module, probe)
    return attachment.report


def attach_named(
    module: nn.Module, name: str, config: LoRAConfig, *, seed: int = 0, stored: Stored = NONE_STORED
) -> AttachReport:
    """Make the adapter of this name the active one, and attach it if the module does not have it yet.

    Args:
        module: The module.
        name: The adapter.
        config: Its options.
        seed: The seed of its random starts.
        stored: What the module shall have afterwards, in order, besides adapters that it has already.

    Raises:
        ValueError: One has other options, or the module cannot take it; those before it in order were added.
    """
    there = adapter_names(module)
    for other in there:
        _check_as_stored(module, other, () if other == name else stored.get(other, ()))
    for new in [each for each in dict.fromkeys([*stored, name]) if each not in there]:
        with beside(module, new), ExitStack() as undo:
            if new == name:
                attach(module, config, seed=seed)
            for entry in stored[new] if new != name else ():
                attach_entry(module, entry, undo)
            undo.pop_all()
    set_adapter(module, name)
    return attach(module, config, seed=seed)


def _check_as_stored(module: nn.Module, name: str, entries: Sequence[Mapping[str, Any]]) -> None:
    """Refuse an adapter whose options are not those of the entries of its record, if there are any."""
    several = recorded(module)
    roots = AdaptedModel(module).roots if several is None else several.adapters[name].roots
    before = {root.name: root for root in roots}
    for entry in entries:
        if (root := before.get(entry["root"])) is not None:
            config = settled(LoRAConfig.from_dict(entry["config"]), root.attachment)
            refuse_other_options(root.module, root.attachment, config, root.attachment.seed)


def attach_entry(module: nn.Module, entry: Mapping[str, Any], undo: ExitStack) -> AttachReport:
    """Attach what one entry of a record says; ``undo`` takes it back.

    Raises:
        ValueError: It does not fit the module.
    """
    modules = module_names(module)
    if entry["root"] not in modules:
        raise ValueError(
            f"The adapter was attached to {entry['root']!r}, which {type(module).__name__} does not have. Load it "
            "into a module of the trained kind."
        )
    target = modules[entry["root"]][0]
    before, config = get_attachment(target), LoRAConfig.from_dict(entry["config"])
    if excluded := config.exclude_modules:  # what is not there, such as the teacher of a training, needs no exclusion
        idle = unmatched(excluded, [names for _, names in module_names(target).values()])
        each = [excluded] if isinstance(excluded, str) else excluded
        config = replace(config, exclude_modules=[entry for entry in each if entry not in idle]) if idle else config
    report = attach(target, config, seed=entry["seed"] if before is None else before.seed)
    if before is None:
        undo.callback(detach, target)
    return report


@in_turn
def detach(module: nn.Module) -> None:
    """Remove every adapter and restore the exact base model, with its classes, keys and gradient flags.

    Modules trained in full get the base's own values back if these were kept: with ``LoRACallback(fresh=True)``, and
    with several adapters. Otherwise they keep what they learned.

    Raises:
        ValueError: The module has no adapters, or they were attached to a parent of it.
    """
    model = AdaptedModel(module)
    model.check_not_part()
    if (several := recorded(module)) is not None:
        switch_to(several, None)
        forget(several)
        _thaw(model, [root for adapter in several.adapters.values() for root in adapter.roots])
        return
    model.check_adapted("detach")
    for layer in model.layers.values():
        set_mode(layer, "disabled")
        restore_layer(layer)
    for root in model.roots:
        root.put(root.attachment.base_values | root.attachment.starts | root.attachment.first_buffers)
        _tie_again(root)
    _thaw(model, model.roots)


@in_turn
def merge(
    module: nn.Module,
    name: str | None = None,
    *,
    whole: Callable[[LoRALayer], AbstractContextManager[object]] = nullcontext,
) -> None:
    """Merge an adapter into its layers' weights permanently, leaving an ordinary model without extra inference cost.

    The sum is formed in float32 (float64 for float64) and rounded once. This cannot be undone: keep the adapter's file,
    or use ``merged`` to fold it temporarily. Loading an adapter into a merged model raises.

    Args:
        module: An adapted module.
        name: Which adapter, if the module has several. The others are removed, since they were trained on the base
            without it; save them first.
        whole: Context in which a layer's tensors are whole, for modules sharded by FSDP.

    Raises:
        ValueError: An adapter holds NaN, infinity or nothing (meta), or the module has none, or several and none named.
        RuntimeError: A weight cannot take the update, adapted layers have been replaced or resized, or this is inside
            ``scaled(module, 0)``. As after a ValueError, nothing was changed.
    """
    with chosen(module, name, "merge"):
        model = AdaptedModel(module)
        model.check_not_part()
        model.check_adapted("merge")
        model.check_unchanged()
        model.check_started()
        if not all(adapter.spec.scaling for adapter in model.adapters.values()):
            raise RuntimeError(
                "merge: scaled(module, 0) leaves nothing to merge. Leave the block first. Nothing was changed."
            )
        for path, layer in model.layers.items():
            with whole(layer):
                check_mergeable({path: layer})
    for layer in model.layers.values():
        with whole(layer):
            set_mode(layer, "active")
            fold(layer)
    for layer in model.layers.values():
        restore_layer(layer)
        count_merge(layer)
    if (several := recorded(module)) is not None:
        forget(several)
    _thaw(model, model.roots)


# --- the steps of attach and detach


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """Pause the garbage collector, which would walk the growing model again and again, taking half of the time."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            if not gc.get_freeze_count():  # else unfreeze would release objects that the user froze
                # Move the new modules to the oldest generation, or the collector would walk them all right now.
                gc.freeze()
                gc.unfreeze()
            gc.enable()


@contextmanager
def _undone_on_failure(
    module: nn.Module, plan: Plan, layers: Collection[nn.Module], old: Attachment | None
) -> Iterator[None]:
    """Take back everything that attaching to these layers has changed, whatever raises inside."""
    parameters = {name: (parameter, parameter.requires_grad) for name, parameter in plan.parameters.items()}
    kept = {} if old is None else dict(old.base_values)
    try:
        yield
    except BaseException:
        followers = [follower for layer in plan.layers for follower in layer.followers if layer.module in layers]
        for layer in (*layers, *followers):
            layer._modules.pop("lora", None)
            if isinstance(layer, LoRALayer):
                swap_out(layer)
        for name in plan.untied:
            _set_parameter(plan.modules, name, parameters[name][0])
        for parameter, requires_grad in parameters.values():
            parameter.requires_grad_(requires_grad)
        if old is None:
            for part in plan.modules.values():
                release_statistics(part)
                vars(part).pop(_RESIZE, None)
        else:
            old.base_values = kept
        set_attachment(module, old)
        raise


def _make_adapters(layers: list[PlannedLayer]) -> dict[nn.Module, list[tuple[PlannedLayer, Adapter]]]:
    """Build the adapters of each layer, without putting them in place."""
    made: dict[nn.Module, list[tuple[PlannedLayer, Adapter]]] = {}
    for layer in layers:
        adapter = layer.adapter(layer.module, layer.spec, layer.parameter)
        made.setdefault(layer.module, []).append((layer, adapter))
    return made


def _swap_in_adapters(module: nn.Module, made: list[tuple[PlannedLayer, Adapter]]) -> None:
    first, lora = made[0][0], cast(nn.Module, made[0][1])
    if first.key:
        lora = AdapterGroup({planned.key: adapter for planned, adapter in made}).train(module.training)
    if first.in_weight:
        swap_in(module, *swapped_as(module, [planned.parameter for planned, _ in made]))
    else:
        swap_in(module, LoRALayer)
    module._modules["lora"] = lora
    for follower, in_weight in first.followers.items():
        swap_in(follower, *swapped_as_follower(in_weight=in_weight))
        follower._modules["lora"] = lora


def restore_layer(layer: LoRALayer) -> None:
    """Make an adapted layer one of the base again."""
    del layer.lora
    vars(layer).pop("lora_mode", None)
    swap_out(layer)


def _tie_again(root: Root) -> None:
    if root.attachment.untied:
        model = AdaptedModel(root.module)
        for name, other in root.attachment.untied.items():
            _set_parameter(dict(model.parts), name, cast(nn.Parameter, model.tensors[other]))


def _set_parameter(modules: Mapping[str, nn.Module], name: str, parameter: nn.Parameter) -> None:
    owner, _, key = name.rpartition(".")
    modules[owner]._parameters[key] = parameter


def _record(plan: Plan, seed: int, old: Attachment | None) -> Attachment:
    """Return the record of an attach; it continues that of an earlier one."""
    config, layers = plan.config, []
    for each in plan.layers:
        spec = each.spec
        dtype = "float64" if spec.dtype is torch.float64 else config.adapter_dtype
        layers.append(AdaptedLayer(each.label, each.pattern, spec.rank, spec.scaling, each.size, dtype))
    report = AttachReport(
        layers=layers,
        saved=sizes_once({name: parameters_of(part) for name, part in plan.saved.items()}),
        left_out=plan.left_out,
        base_parameters=plan.base_parameters + sum(plan.parameters[name].numel() for name in plan.untied),
        norms=plan.norms,
        frozen_norm=config.frozen_norm,
        biases=plan.biases,
        untied=plan.untied,
        without_parameters=[name for name, part in plan.saved.items() if not parameters_of(part)],
    )
    if old is None:
        return Attachment(config, seed, report, untied=dict(plan.untied))
    return replace(old, config=config, seed=seed, report=report, untied=plan.untied | old.untied)


def _freeze_parameters(plan: Plan, record: Attachment) -> None:
    """Set ``requires_grad`` only on what trains, and record the earlier flags."""
    trained = set[int]()
    for name in plan.biases:
        record.base_values.setdefault(name, plan.parameters[name].detach().clone())
        trained.add(id(plan.parameters[name]))
    for part in plan.saved.values():
        trained.update(map(id, part.parameters()))
    before = {name: parameter.requires_grad for name, parameter in plan.parameters.items()}
    record.required_grad = before | record.required_grad  # first all: a tied weight has two names
    for parameter in plan.parameters.values():
        can_train = parameter.is_floating_point() or parameter.is_complex()
        wanted = id(parameter) in trained and can_train
        if parameter.requires_grad != wanted:
            parameter.requires_grad_(wanted)


def _guard_resizing(modules: Collection[nn.Module]) -> None:
    """Let transformers models refuse to resize adapted embeddings, which would lose the adapters or not fit them."""
    kinds = {kind for kind in set(map(type, modules)) if hasattr(kind, _RESIZE)}
    for part in modules if kinds else ():
        if type(part) in kinds:
            vars(part)[_RESIZE] = partial(_resize, part)


def _resize(
    model: Any, new_num_tokens: int | None = None, pad_to_multiple_of: int | None = None, **options: Any
) -> Any:
    ends = (model.get_input_embeddings(), model.get_output_embeddings())
    sizes = {len(base_parameter(end, "weight")) for end in ends if isinstance(end, LoRALayer)}
    if not sizes:
        return getattr(type(model), _RESIZE)(model, new_num_tokens, pad_to_multiple_of, **options)
    if new_num_tokens in {None, *sizes} and not any(size % (pad_to_multiple_of or 1) for size in sizes):
        return ends[0]  # not by the model's own method, which would freeze the adapters
    raise RuntimeError(
        f"resize_token_embeddings: the embeddings of this {type(model).__name__} carry LoRA adapters, which would be "
        "lost or no longer fit. Resize before attaching: in __init__, setup or configure_model; or call "
        "detach(module) first."
    )


def _thaw(model: AdaptedModel, roots: Sequence[Root]) -> None:
    """Undo freezing, and remove the records."""
    for _, part in model.parts:
        release_statistics(part)
        vars(part).pop(_RESIZE, None)
    for root in roots:
        for name, parameter in root.module.named_parameters():
            parameter.requires_grad_(root.attachment.required_grad.get(clean_name(name), parameter.requires_grad))
        set_attachment(root.module, None)
