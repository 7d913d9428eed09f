"""Buffers of the base that training changes by itself, such as a queue of negatives, or a running mean of the data.

They belong to the adapter in training: checkpoints hold them, they switch with it, and without it they have the values
from before. Which these are cannot be declared: they are found, by comparing with the values from before. Buffers that
are not persistent are left out, as from every checkpoint.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping

import torch
from torch import Tensor, nn

from lightning_lora.adapted_model import AdaptedModel, Root
from lightning_lora.layers.norm import has_running_statistics
from lightning_lora.names import clean_name, is_below, join

First = Mapping[str, Tensor | None]  # name -> the value from before training; None for a buffer that was not there yet


def base_buffers(model: AdaptedModel) -> dict[str, Tensor]:
    """Return the persistent buffers that belong to no adapter, nor to what trains in full."""
    return {
        name: buffer
        for name, (part, key) in buffer_places(model).items()
        if name not in model.trained and type(buffer := part._buffers[key]) is Tensor
    }


def unsaved_buffers(model: AdaptedModel, part: nn.Module | None = None) -> dict[str, Tensor]:
    """Return the persistent buffers of the base that are not saved, since training has not changed them.

    Args:
        model: The model.
        part: The part of it to look at, to which names are then relative; all of it if left out.
    """
    moved = {name for root in model.roots for name in root.attachment.moved}
    found = {name: buffer for name, buffer in base_buffers(model).items() if name not in moved}
    if part is None:
        return found
    known = {id(buffer) for buffer in found.values()}
    own = part.named_buffers(remove_duplicate=False)
    return {clean_name(name): buffer for name, buffer in own if id(buffer) in known}


def own_values(model: AdaptedModel, part: nn.Module | None = None) -> dict[str, Tensor]:
    """Return the same with what the base has itself of those that training has changed, as far as it is known."""
    first = first_values(model if part is None else AdaptedModel(part))
    return unsaved_buffers(model, part) | {name: value for name, value in first.items() if value is not None}


def grown_buffers(model: AdaptedModel, state: Mapping[str, object]) -> dict[str, Tensor]:
    """Return the values in a state for buffers of what trains in full that have another shape in the model, or none.

    Such a buffer holds what its module has seen, as the inputs that a Gaussian process predicts from, and may have
    grown in training. The statistics of a norm cannot.
    """
    whole = {id(part) for root in model.roots for part in root.trained_modules()}
    return {
        name: value
        for name, (part, key) in (buffer_places(model).items() if whole else ())
        if id(part) in whole and isinstance(value := state.get(name), Tensor) and not has_running_statistics(part)
        if (buffer := part._buffers[key]) is None or buffer.shape != value.shape
    }


def buffer_places(model: AdaptedModel, *, are_saved: bool = True) -> dict[str, tuple[nn.Module, str]]:
    """Return where the buffers are that are persistent, or those that no checkpoint holds: name -> module and key."""
    return {
        join(path, key): (part, key)
        for path, part in model.parts
        for key in part._buffers
        if (key not in part._non_persistent_buffers_set) == are_saved
    }


# --- which ones training has changed


def moved_buffers(model: AdaptedModel) -> dict[str, Tensor]:
    """Return the buffers of the base that have changed since the active adapter began to train, and record them.

    Values are compared, because DDP writes even to buffers that stay the same.
    """
    buffers = base_buffers(model)
    for root in model.roots[:1]:
        if (first := root.attachment.watched) is not None:
            moved = [name for name, now in buffers.items() if not is_same(first.get(name), now)]
            root.attachment.moved.update(moved)
            note_moved(model, {name: first[name] for name in moved if name in first})
    known = {name for root in model.roots for name in root.attachment.moved}
    return {name: buffer for name, buffer in buffers.items() if name in known}


def moved_values(model: AdaptedModel) -> dict[str, Tensor]:
    """Return copies of the same, to put them under another adapter by ``fill_buffers``."""
    return {name: buffer.detach().clone() for name, buffer in moved_buffers(model).items()}


def is_same(first: Tensor | None, now: Tensor) -> bool:
    """Return whether a buffer has the value that it had, bit for bit."""
    if first is None or first.shape != now.shape:
        return False
    if now.is_meta or now.is_quantized or now.layout is not torch.strided:
        return True
    return torch.equal(_octets(first.to(now)), _octets(now))  # NaN is the same as NaN


def _octets(tensor: Tensor) -> Tensor:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)


# --- their values from before


@torch.inference_mode(False)  # it may be part of a training later
def copied(buffer: Tensor | None) -> Tensor | None:
    """Return a copy of what is registered as a buffer."""
    return None if buffer is None else buffer.detach().clone()


def first_values(model: AdaptedModel) -> dict[str, Tensor | None]:
    """Return the values from before training of buffers that training has changed, or may have."""
    return {join(root.name, name): each for root in model.roots for name, each in root.attachment.first_buffers.items()}


def values_now(model: AdaptedModel) -> dict[str, Tensor | None]:
    """Return copies of all buffers of the base, to be compared with later."""
    places = buffer_places(model)
    absent: dict[str, Tensor | None] = {n: None for n, (part, key) in places.items() if part._buffers[key] is None}
    return absent | {name: copied(buffer) for name, buffer in base_buffers(model).items()}


def note_moved(model: AdaptedModel, first: First) -> None:
    """Record that the active adapter has values of its own for these buffers, and the base's, unless they are known."""
    for root in model.roots[:1]:
        root.attachment.moved |= first.keys()
    for root in model.roots:
        for own, name in _names_in(root, first).items():
            root.attachment.buffers.setdefault(own, first[name])


def take_back(model: AdaptedModel, names: Collection[str]) -> None:
    """Give the active adapter the base's own values of these buffers, as far as they are known."""
    for root in model.roots:
        own, first = _names_in(root, names), root.attachment.first_buffers
        known = own.keys() & first.keys()
        root.put({name: first[name] for name in known})
        model.roots[0].attachment.moved -= {own[name] for name in known}


def _names_in(root: Root, names: Iterable[str]) -> dict[str, str]:
    """Return those of a model's names that lie in the module of a root: the name there -> the name in the model."""
    if not root.name:
        return {name: name for name in names}
    return {name.removeprefix(f"{root.name}."): name for name in names if is_below(name, (root.name,))}
