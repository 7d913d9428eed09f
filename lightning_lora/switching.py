"""Adapters off, or folded into the weights, for a while or for good; the exact weights come back."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from lightning_lora.attachment import Attachment, attachments, get_attachment
from lightning_lora.layers import LinearAdapter, LoRALayer, Mode, base_weight, lora_layers


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
        base_weight(layer).copy_(vars(layer).pop("lora_original"))
    if mode == "merged":
        vars(layer)["lora_original"] = base_weight(layer).detach().clone()
        fold(layer)
    layer.lora_mode = mode


@torch.no_grad()
def fold(layer: LoRALayer) -> None:
    """Add the update to the weight: a float32 (or float64) sum and one rounding, at the end."""
    weight = base_weight(layer)
    weight.copy_(_folded(layer).to(weight.dtype))


def check_mergeable(layers: dict[str, LoRALayer]) -> None:
    """Refuse what would destroy a weight, before any weight is touched."""
    for name, layer in layers.items():
        if "weight" not in layer._parameters:
            raise RuntimeError(
                f"The weight of {name!r} is computed from other parameters, so nothing can be merged into it. "
                "Remove the parametrization first (torch.nn.utils.parametrize.remove_parametrizations)."
            )
        weight = base_weight(layer)
        if not weight.is_floating_point():
            raise RuntimeError(
                f"The weight of {name!r} is quantized ({weight.dtype}), so nothing can be merged into it. Keep the "
                "adapter beside it, or merge into the model before it was quantized."
            )
        if not all(bool(torch.isfinite(factor).all()) for factor in layer.lora.parameters()):
            raise ValueError(f"The adapter of {name!r} holds NaN or infinity; merging it would destroy the weight.")
        if isinstance(layer.lora, LinearAdapter) and _has_own_forward(layer) and not _computes_the_same_merged(layer):
            raise RuntimeError(
                f"The forward of {name!r} ({layer.base_class.__name__}) does more than apply the weight, so with "
                "the update inside the layer would compute something else. Keep the adapter beside it."
            )
        if _overflows(layer, weight):
            raise ValueError(
                f"The update of {name!r} is too large for its weight's precision ({weight.dtype}); merging it would "
                "leave infinities. Convert the model to a wider one first."
            )


def _has_own_forward(layer: LoRALayer) -> bool:
    return isinstance(layer, nn.Linear) and layer.base_class.forward is not nn.Linear.forward


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
def _folded(layer: LoRALayer) -> Tensor:
    weight, delta = base_weight(layer), layer.delta_weight()
    dtype = torch.promote_types(weight.dtype, delta.dtype)
    return weight.to(dtype) + delta.to(dtype)


@torch.no_grad()
def _overflows(layer: LoRALayer, weight: Tensor) -> bool:
    adapter, limit = layer.lora, torch.finfo(weight.dtype).max
    if weight.is_meta or not adapter.A.numel():
        return False
    largest = [float(tensor.abs().max()) for tensor in (adapter.A, adapter.B, weight)]
    if abs(layer.scaling) * layer.rank * largest[0] * largest[1] + largest[2] < limit:
        return False  # whatever the signs; spares forming the update
    return not bool((_folded(layer).abs() <= limit).all())


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
