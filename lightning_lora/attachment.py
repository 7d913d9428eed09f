"""The note that attaching leaves on a module: what was done, so that it can be saved, checked and undone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from lightning_lora.config import LoRAConfig
from lightning_lora.names import clean_name, module_names, walk
from lightning_lora.report import AttachReport

_ATTACHMENT = "_lora_attachment"
_MERGES = "_lora_merges"
_REQUEST = "_lora_request"


@dataclass
class Attachment:
    """What ``attach`` did to the module that holds this note.

    Attributes:
        config: What was asked for.
        seed: The seed that the starts derive from.
        report: What was found.
        saved_modules: Names of the modules trained in full.
        required_grad: Parameter name -> whether it required a gradient before.
        base_values: What of the base training changes, as it was: running statistics of frozen norms, and biases,
            where the config lets them move.
        untied: Weights that got a copy of their own -> what they were tied to.
    """

    config: LoRAConfig
    seed: int
    report: AttachReport
    saved_modules: tuple[str, ...]
    required_grad: dict[str, bool] = field(default_factory=dict)
    base_values: dict[str, Tensor] = field(default_factory=dict)
    untied: dict[str, str] = field(default_factory=dict)


def get_attachment(module: nn.Module) -> Attachment | None:
    """Return the note on exactly this module."""
    return vars(module).get(_ATTACHMENT)


def set_attachment(module: nn.Module, attachment: Attachment | None) -> None:
    """Leave, replace or remove the note."""
    if attachment is None:
        vars(module).pop(_ATTACHMENT, None)
    else:
        vars(module)[_ATTACHMENT] = attachment


def request(module: nn.Module, config: LoRAConfig | None, seed: int = 0) -> None:
    """Leave word with a module of what ``attach`` without a config is to do, or take it back."""
    if config is None:
        vars(module).pop(_REQUEST, None)
    else:
        vars(module)[_REQUEST] = (config, seed)


def requested(module: nn.Module) -> tuple[LoRAConfig, int] | None:
    """Return the config and the seed that were left with a module."""
    return vars(module).get(_REQUEST)


def attachments(module: nn.Module) -> Iterator[tuple[str, nn.Module, Attachment]]:
    """Yield every note in a model: the name of the module that holds it, the module, the note."""
    for name, submodule in walk(module):
        if (attachment := get_attachment(submodule)) is not None:
            yield name, submodule, attachment


@torch.no_grad()
def copy_values(module: nn.Module, values: Mapping[str, Tensor]) -> None:
    """Copy values into the parameters and buffers of these names."""
    tensors = named_tensors(module) if values else {}
    for name, value in values.items():
        tensors[name].copy_(value)


def named_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Return the parameters and buffers of a module by their names."""
    named = (*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False))
    return {clean_name(name): tensor for name, tensor in named}


def fully_trained(owner: nn.Module, attachment: Attachment) -> set[int]:
    """Return the identities of the modules that train in full, by any of their names."""
    if not attachment.saved_modules:
        return set()
    modules = module_names(owner)
    return {id(part) for name in attachment.saved_modules for part in modules[name][0].modules()}


def merge_count(layer: nn.Module) -> int:
    """Return how many adapters were merged for good into exactly this layer."""
    return int(vars(layer).get(_MERGES, 0))


def count_merge(layer: nn.Module) -> None:
    """Note that an adapter was merged into this layer for good."""
    vars(layer)[_MERGES] = merge_count(layer) + 1
