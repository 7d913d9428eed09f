"""Modes of an adapted model: adapters disabled or merged, and the exact weights restored afterwards."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any, cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn.utils.prune import BasePruningMethod
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from lightning_lora.adapted_model import AdaptedModel, Root, taking_turns
from lightning_lora.attachment import get_attachment, merge_count
from lightning_lora.layers import (
    Adapter,
    AdapterSpec,
    LoRALayer,
    LowRankAdapter,
    Mode,
    WeightLoRALayer,
    base_parameter,
    has_running_statistics,
    hold_statistics,
    release_statistics,
)
from lightning_lora.layers.weight import renew_weight_list
from lightning_lora.names import clean_name, join, listed, walk
from lightning_lora.ops.checkpointing import entered
from lightning_lora.ops.eager import without_autocast
from lightning_lora.sharding import copy_whole, is_sharded, local


@contextmanager
def merged(module: nn.Module, *, missing_ok: bool = False) -> Iterator[None]:
    """Compute with the adapters merged into the weights, and restore the exact weights afterwards.

    Keeps a copy of the adapted weights meanwhile. Disabled adapters stay disabled. What shares the weights with the
    module, such as its ``state_dict()`` or what ``torch.export`` and ``torch.jit.trace`` return, has the base's again
    afterwards: write files inside the block, or use ``merge``.

    Args:
        module: An adapted module.
        missing_ok: Accept a module without adapters, for code that serves both.

    Raises:
        ValueError: The module has no adapters, or they were merged for good; an adapter holds NaN or infinity, or its
            update is too large for the weight's precision; or the module lies on the meta device.
        RuntimeError: A weight cannot take an update.
    """
    with taking_turns(module):
        model = AdaptedModel(module)
        if not missing_ok:
            model.check_adapted("merged")
        layers = model.layers
        check_mergeable(layers)
        with _modes(layers, lambda mode: "merged" if mode == "active" else mode):
            yield


@contextmanager
def disabled(module: nn.Module, *, missing_ok: bool = False) -> Iterator[None]:
    """Compute with the bare base model, bit for bit, and switch the adapters back on afterwards.

    Modules trained in full are not affected. A backward pass after the block that computes layers again (activation
    checkpointing) does so without the adapters, too.

    Args:
        module: An adapted module.
        missing_ok: Accept a module without adapters, for code that serves both.

    Raises:
        ValueError: The module has no adapters, or they were merged, so that nothing could be switched off.
    """
    with taking_turns(module):
        if not missing_ok:
            AdaptedModel(module).check_adapted("disabled")
        with entered(partial(_switched_off, module)):
            yield


@contextmanager
def _switched_off(module: nn.Module) -> Iterator[None]:
    model = AdaptedModel(module)
    with _modes(model.layers, lambda _: "disabled"), _base_values(model):
        yield


@contextmanager
def scaled(module: nn.Module, factor: float) -> Iterator[None]:
    """Compute with the update times a factor; 0 is the base, bit for bit, and a negative factor subtracts the update.

    Modules trained in full are not affected; running statistics and buffers that training has moved have the base's
    values at 0 and the adapter's else. Inside the block, ``merge`` and ``merged`` fold the scaled update, and
    ``save_adapter`` writes it; at 0, ``merge`` raises. A backward pass after the block that computes layers again
    (activation checkpointing) does so with the same factor.

    Args:
        module: An adapted module; of several adapters, the active one is scaled.
        factor: Any finite number.

    Raises:
        ValueError: The factor is no finite number, the module has no adapters, or an update is not proportional to its
            scaling: DoRA's, and tokens and biases trained in full. Nothing was changed.
        RuntimeError: The adapters are merged into the weights now. Nothing was changed.
    """
    if not math.isfinite(factor):
        raise ValueError(f"scaled: the factor must be a finite number, got {factor!r}.")
    with taking_turns(module):
        model = AdaptedModel(module)
        model.check_adapted("scaled")
        if folded := [name for name, layer in model.layers.items() if layer.lora_mode == "merged"]:
            raise RuntimeError(
                f"The adapters of {listed(folded)} are merged into their weights now; leave merged() first."
            )
        odd = [n for n, each in model.adapters.items() if not isinstance(each, LowRankAdapter) or each.spec.use_dora]
        odd += [join(root.name, name) for root in model.roots for name in root.attachment.report.biases]
        if odd and factor not in (0, 1):
            raise ValueError(
                f"scaled: the update of {listed(odd)} is not proportional to its scaling (DoRA, or tokens and biases "
                "trained in full), so only 0 and 1 are possible. combine(module, {name: factor}, name=...) also scales "
                "tokens and biases."
            )
        with entered(partial(_multiplied, module, factor)), nullcontext() if factor else disabled(module):
            yield


_trained_specs = WeakKeyDictionary[Adapter, AdapterSpec]()  # of adapters that are scaled now


@contextmanager
def _multiplied(module: nn.Module, factor: float) -> Iterator[None]:
    before = [(adapter, adapter.spec) for adapter in AdaptedModel(module).adapters.values()]
    first = [adapter for adapter, _ in before if adapter not in _trained_specs]
    try:
        for adapter, spec in before:
            _trained_specs.setdefault(adapter, spec)
            adapter.spec = spec._replace(scaling=factor * spec.scaling)
        yield
    finally:
        for adapter, spec in before:
            adapter.spec = spec
        for adapter in first:
            del _trained_specs[adapter]


@contextmanager
def unscaled(module: nn.Module) -> Iterator[None]:
    """Have the active adapter as it trains, inside a block of ``scaled``, too."""
    now = [(adapter, adapter.spec) for adapter in AdaptedModel(module).adapters.values() if adapter in _trained_specs]
    for adapter, _ in now:
        adapter.spec = _trained_specs[adapter]
    try:
        yield
    finally:
        for adapter, spec in now:
            adapter.spec = spec


@torch.no_grad()
def set_mode(layer: LoRALayer, mode: Mode) -> None:
    """Switch one layer."""
    if layer.lora_mode == mode:
        return
    if layer.lora_mode == "merged":
        # The kept copy, not a subtraction: W + dW - dW is not W in floating point.
        for name, original in vars(layer).pop("lora_original").items():
            base_parameter(layer, name).copy_(original)
    if mode == "merged":
        originals = {name: base_parameter(layer, name).detach().clone() for name in layer.adapted_parameters()}
        vars(layer)["lora_original"] = originals
        fold(layer)
    if mode == "active":
        vars(layer).pop("lora_mode", None)  # that of the class
    else:
        layer.lora_mode = mode


@torch.no_grad()
def fold(layer: LoRALayer) -> None:
    """Add the updates to the weights: a float32 (or float64) sum and one rounding, at the end."""
    for name in layer.adapted_parameters():
        parameter = base_parameter(layer, name)
        with without_autocast(parameter.device.type):
            if not layer.fold(name, parameter):
                copy_whole(parameter, layer.combined(name).to(parameter.dtype))


def freeze_norms(module: nn.Module) -> None:
    """Hold the running statistics of frozen norms where the config says so, and no others; safe to repeat."""
    for root in AdaptedModel(module).roots:
        attachment, trained = root.attachment, {id(part) for part in root.trained_modules()}
        for name, norm in root.module.named_modules():
            if not has_running_statistics(norm):
                continue
            if id(norm) in trained:
                release_statistics(norm)
            elif attachment.config.frozen_norm == "eval":
                hold_statistics(norm)
            else:
                release_statistics(norm)
                for key, buffer in norm.named_buffers(recurse=False):
                    attachment.base_values.setdefault(join(clean_name(name), key), buffer.detach().clone())


def check_mergeable(layers: dict[str, LoRALayer]) -> None:
    """Reject updates that would damage a weight, before any weight changes."""
    for name, layer in layers.items():
        for parameter in layer.adapted_parameters():
            _check_parameter(name, layer, parameter)
        if not isinstance(layer, WeightLoRALayer) and not all(
            adapter.adds_to_output(layer) for adapter in layer.adapters().values()
        ):
            raise RuntimeError(
                f"The forward of {name!r} ({layer.base_class.__name__}) does more than apply its weight, so "
                "merging would change the result. Keep the adapter unmerged."
            )


def _check_parameter(name: str, layer: LoRALayer, parameter: str) -> None:
    if layer._parameters.get(parameter) is None:
        if parameter == "bias":
            raise RuntimeError(
                f"{name!r} has no bias to merge the adapter's bias into (lora_bias=True). Keep the adapter "
                "unmerged, or give the layer a bias before attaching."
            )
        raise RuntimeError(
            f"The weight of {name!r} is computed from other parameters, so nothing can be merged into it. "
            f"{_to_plain_weight(layer)}"
        )
    weight = base_parameter(layer, parameter)
    is_packed = bool(is_traceable_wrapper_subclass(cast(Any, weight))) and not is_sharded(weight)  # as torchao's are
    if weight.is_complex():
        raise RuntimeError(
            f"The weight of {name!r} is complex ({weight.dtype}) and its update is real, so nothing can be merged into "
            "it. Keep the adapter unmerged."
        )
    if is_packed or not weight.is_floating_point():
        kind = type(weight).__name__ if is_packed else weight.dtype
        raise RuntimeError(
            f"The weight of {name!r} is quantized ({kind}), so nothing can be merged into it. Keep the "
            "adapter unmerged, or merge into the model before quantizing it."
        )
    adapters = [adapter for adapter in layer.adapters().values() if parameter in (adapter.parameter, "bias")]
    factors = [factor for adapter in adapters for factor in adapter._parameters.values() if factor is not None]
    if on_meta := [each for each in (weight, *factors) if local(each).is_meta]:
        what = f"{'weight' if on_meta[0] is weight else 'adapter'} of {name!r}"
        raise ValueError(
            f"The {what} is on the meta device, which holds no values, so there is nothing to merge. Nothing was "
            "changed. Give the base its values first, then load the adapter, and merge."
        )
    largest = [
        [_largest(factor) for factor in adapter._parameters.values() if factor is not None] for adapter in adapters
    ]
    if not all(map(math.isfinite, itertools.chain(*largest))):
        raise ValueError(f"The adapter of {name!r} holds NaN or infinity; merging it would destroy the weight.")
    bounds = [_bound(adapter, factors) for adapter, factors in zip(adapters, largest, strict=True)]
    if _overflows(layer, parameter, max(bounds, default=0.0)):
        raise ValueError(
            f"The update of {name!r} is too large for its weight's precision ({weight.dtype}); merging it would "
            "leave infinities. Convert the model to a wider dtype first."
        )


def _to_plain_weight(layer: LoRALayer) -> str:
    """Return how the user makes a computed weight an ordinary one."""
    norms = {"WeightNorm": "weight_norm", "SpectralNorm": "spectral_norm"}
    for hook in layer._forward_pre_hooks.values():
        if (norm := norms.get(type(hook).__name__)) is not None:
            return f"Call torch.nn.utils.remove_{norm} on this layer first."
        if isinstance(hook, BasePruningMethod):
            return f"Call torch.nn.utils.prune.remove(layer, {hook._tensor_name!r}) on this layer first."
    return (
        "Keep adapter_state_dict(model), call detach(model), remove the parametrization "
        "(torch.nn.utils.parametrize.remove_parametrizations), attach again with the same config, call "
        "load_adapter_state_dict, and merge."
    )


@torch.no_grad()
def _overflows(layer: LoRALayer, parameter: str, bound: float) -> bool:
    """Return whether a sum exceeds the weight's precision, given a bound on the entries of the update."""
    weight = base_parameter(layer, parameter)
    limit = torch.finfo(weight.dtype).max
    # Less than half of the largest number's last digit is rounded away, whatever the weight holds.
    if bound < torch.finfo(weight.dtype).eps / 8 * limit or _largest(weight) + bound < limit:
        return False  # whatever the signs; spares forming the update
    with without_autocast(weight.device.type):
        return not all(bool((total.abs() <= limit).all()) for total in layer.sums(parameter))


def _bound(adapter: Adapter, largest: Sequence[float]) -> float:
    """Return a bound on the entries of an update, given the largest value of each of its factors."""
    if not isinstance(adapter, LowRankAdapter) or not adapter.is_plain or adapter.is_difference:
        return math.inf
    return abs(adapter.spec.scaling) * adapter.spec.rank * math.prod(largest)


def _largest(tensor: Tensor) -> float:
    """Return the largest absolute value, or NaN if there is one."""
    if is_sharded(tensor):
        return float(tensor.abs().max())
    if not tensor.numel():
        return 0.0
    low, high = (float(end) for end in tensor.detach().aminmax())  # makes no tensor of its size
    return max(-low, high) if low <= high else math.nan


@contextmanager
def _modes(layers: dict[str, LoRALayer], choose: Callable[[Mode], Mode]) -> Iterator[None]:
    """Switch layers and restore their modes, however the block ends; nests."""
    before = [(layer, layer.lora_mode) for layer in layers.values()]
    try:
        for layer, mode in before:
            set_mode(layer, choose(mode))
        yield
    finally:
        for layer, mode in before:
            if isinstance(layer, LoRALayer):  # not merged for good or detached meanwhile
                set_mode(layer, mode)


@contextmanager
def _base_values(model: AdaptedModel) -> Iterator[None]:
    """Have the base's own biases, running statistics and other buffers in place of those that training has changed.

    Pointers are exchanged, so that no gradient of the block reaches what trains, and nothing that is kept for a
    backward pass changes.
    """
    merges = _merges(model)
    held = [place for root in model.roots for place in _moved_places(root)]
    if sharded := [key for *_, key, own, _ in held if is_sharded(own)]:
        raise RuntimeError(
            f"The base's own {listed(sharded)} cannot be put in place of what training has changed, since fully_shard "
            "manages them. Train without bias=..., or compute with the base before the module is sharded."
        )
    for _, part, table, key, _, original in held:
        table[key] = original
        renew_weight_list(part)
    try:
        yield
    finally:
        for root, part, table, key, own, _ in held:
            if get_attachment(root.module) is None and _merges(model) == merges:
                own.data = table[key].data  # detached meanwhile
            table[key] = own
            renew_weight_list(part)


def _moved_places(root: Root) -> Iterator[tuple[Root, nn.Module, dict[str, Any], str, Tensor, Tensor | None]]:
    """Yield where a module has what training changes besides factors and heads: table, key, value, the base's own."""
    originals = root.originals(root.attachment.base_values | root.attachment.first_buffers)
    for _, part in walk(root.module) if originals else ():
        tables: tuple[dict[str, Any], dict[str, Any]] = part._parameters, part._buffers
        for table in tables:
            for key, own in table.items():
                if own is not None and id(own) in originals:
                    yield root, part, table, key, own, originals[id(own)]


def _merges(model: AdaptedModel) -> int:
    return sum(merge_count(part) for _, part in model.parts)
