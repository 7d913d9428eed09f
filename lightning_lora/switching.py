"""Adapters off, or folded into the weights, for a while or for good; the exact weights come back."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from lightning_lora.attachment import Attachment, attachments, get_attachment
from lightning_lora.layers import Adapter, LoRALayer, Mode, WeightLoRALayer, base_parameter, base_weight, lora_layers


@contextmanager
def merged(module: nn.Module) -> Iterator[None]:
    """Compute with the adapters folded into the weights, and restore the exact weights afterwards.

    Needs a copy of the adapted weights meanwhile. Disabled adapters stay disabled.

    Raises:
        ValueError: An adapter holds NaN or infinity, or its update is too large for the weight's precision.
        RuntimeError: A weight cannot take an update.
    """
    layers = lora_layers(module)
    check_mergeable(layers)
    with _modes(layers, lambda mode: "merged" if mode == "active" else mode):
        yield


@contextmanager
def disabled(module: nn.Module) -> Iterator[None]:
    """Compute with the bare base model, bit for bit, and switch the adapters back on afterwards.

    Modules trained in full are not affected.
    """
    with _modes(lora_layers(module), lambda _: "disabled"), _base_statistics(module):
        yield


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
        originals = {name: base_parameter(layer, name).detach().clone() for name in layer.adapters()}
        vars(layer)["lora_original"] = originals
        fold(layer)
    layer.lora_mode = mode


@torch.no_grad()
def fold(layer: LoRALayer) -> None:
    """Add the updates to the weights: a float32 (or float64) sum and one rounding, at the end."""
    for name, adapter in layer.adapters().items():
        weight = base_parameter(layer, name)
        weight.copy_(_folded(weight, adapter).to(weight.dtype))


def check_mergeable(layers: dict[str, LoRALayer]) -> None:
    """Refuse what would destroy a weight, before any weight is touched."""
    for name, layer in layers.items():
        for parameter, adapter in layer.adapters().items():
            _check_parameter(name, layer, parameter, adapter)
        if _has_own_forward(layer) and not _computes_the_same_merged(layer):
            raise RuntimeError(
                f"The forward of {name!r} ({layer.base_class.__name__}) does more than apply the weight, so with "
                "the update inside the layer would compute something else. Keep the adapter beside it."
            )


def _check_parameter(name: str, layer: LoRALayer, parameter: str, adapter: Adapter) -> None:
    if parameter not in layer._parameters:
        raise RuntimeError(
            f"The weight of {name!r} is computed from other parameters, so nothing can be merged into it. "
            "Remove the parametrization first (torch.nn.utils.parametrize.remove_parametrizations)."
        )
    weight = base_parameter(layer, parameter)
    if not weight.is_floating_point():
        raise RuntimeError(
            f"The weight of {name!r} is quantized ({weight.dtype}), so nothing can be merged into it. Keep the "
            "adapter beside it, or merge into the model before it was quantized."
        )
    if not all(bool(torch.isfinite(factor).all()) for factor in adapter.parameters()):
        raise ValueError(f"The adapter of {name!r} holds NaN or infinity; merging it would destroy the weight.")
    if _overflows(weight, adapter):
        raise ValueError(
            f"The update of {name!r} is too large for its weight's precision ({weight.dtype}); merging it would "
            "leave infinities. Convert the model to a wider one first."
        )


def _has_own_forward(layer: LoRALayer) -> bool:
    adds_to_output = isinstance(layer, nn.Linear) and not isinstance(layer, WeightLoRALayer)
    return adds_to_output and layer.base_class.forward is not nn.Linear.forward


@torch.no_grad()
def _computes_the_same_merged(layer: LoRALayer) -> bool:
    """Try a layer whose forward is not ours to know, on one row: does merging leave what the adapter adds?"""
    weight, mode, training = base_weight(layer), layer.lora_mode, layer.training
    generator = torch.Generator().manual_seed(0)
    row = torch.randn(1, weight.shape[-1], generator=generator).to(weight)
    outputs: dict[Mode, Tensor] = {}
    modes: tuple[Mode, ...] = ("disabled", "active", "merged")
    try:
        layer.eval()  # dropout would differ from call to call
        for each in modes:
            set_mode(layer, each)
            outputs[each] = layer(row).double()
    except (TypeError, ValueError, RuntimeError):
        return False  # its forward wants something else than one row, so nothing is known
    finally:
        set_mode(layer, mode)
        layer.train(training)
    update = (outputs["active"] - outputs["disabled"]).norm()
    rounding = 16 * torch.finfo(weight.dtype).eps * outputs["active"].norm()
    return bool((outputs["merged"] - outputs["active"]).norm() <= 0.01 * update + rounding)


@torch.no_grad()
def _folded(weight: Tensor, adapter: Adapter) -> Tensor:
    delta = adapter.delta_weight()
    dtype = torch.promote_types(weight.dtype, delta.dtype)
    return weight.to(dtype) + delta.to(dtype)


@torch.no_grad()
def _overflows(weight: Tensor, adapter: Adapter) -> bool:
    limit = torch.finfo(weight.dtype).max
    if weight.is_meta or not adapter.A.numel():
        return False
    largest = [float(tensor.abs().max()) for tensor in (adapter.A, adapter.B, weight)]
    if abs(adapter.spec.scaling) * adapter.spec.rank * largest[0] * largest[1] + largest[2] < limit:
        return False  # whatever the signs; spares forming the update
    return not bool((_folded(weight, adapter).abs() <= limit).all())


@contextmanager
def _modes(layers: dict[str, LoRALayer], choose: Callable[[Mode], Mode]) -> Iterator[None]:
    """Switch layers and put back what was found, however the block ends; nests."""
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
def _base_statistics(module: nn.Module) -> Iterator[None]:
    """Put back the running statistics that training moved, for a while."""
    moved: list[tuple[nn.Module, Attachment, Tensor, Tensor]] = []
    for _, owner, attachment in attachments(module):
        buffers = dict(owner.named_buffers())
        for name, value in attachment.base_buffers.items():
            moved.append((owner, attachment, buffers[name], buffers[name].clone()))
            buffers[name].copy_(value)
    try:
        yield
    finally:
        for owner, attachment, buffer, value in moved:
            if get_attachment(owner) is attachment:  # not detached meanwhile
                buffer.copy_(value)
