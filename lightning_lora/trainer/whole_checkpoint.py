"""A checkpoint from before LoRA, which holds a whole model: its weights become the frozen base."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn

from lightning_lora.attachment import attachments
from lightning_lora.layers import base_parameter, lora_layers
from lightning_lora.names import clean_name, join
from lightning_lora.sharding import copy_whole
from lightning_lora.state import adapter_tensors, mismatches, other_shapes
from lightning_lora.trainer.strategies.base import Layout


def load_base(
    module: LightningModule, layout: Layout, state: Mapping[str, Tensor], *, strict: bool, known: Collection[str] = ()
) -> None:
    """Load the weights of a whole model under the adapters, which start anew on it; every process must call this.

    Args:
        module: An adapted module.
        layout: How its tensors are spread over processes.
        state: The whole tensors, in every process.
        strict: Whether the names must be exactly those of the base.
        known: Names that may be in the state besides.

    Raises:
        ValueError: The state does not fit. Nothing was changed.
    """
    factors = factor_names(module)
    base = {name: tensor for name, tensor in _persistent(module).items() if name not in factors}
    shown = layout.shown(base)
    problems = mismatches(shown, state, known) if strict else other_shapes(shown, state)
    if not base.keys() & state.keys():
        problems.append("they share no name")
    if problems:
        raise ValueError(
            f"The checkpoint holds no adapter, and as a base it does not fit {type(module).__name__}; nothing was "
            "changed:\n" + "\n".join(f"  - {problem}" for problem in problems)
        )
    layout.fill_base(base, state)
    layout.base_loaded(state)
    trained = adapter_tensors(module)
    starts = _starts(module, trained, state)
    layout.fill({name: trained[name] for name in starts}, starts)
    for root, _, attachment in attachments(module):
        for name, value in attachment.base_values.items():
            if (full := join(root, name)) in state:
                copy_whole(value, state[full])


def factor_names(module: nn.Module) -> set[str]:
    """Return the names of the adapters' own parameters."""
    return {
        clean_name(f"{path}.lora.{key}")
        for path, layer in lora_layers(module).items()
        for key, _ in layer.lora.named_parameters(remove_duplicate=False)
    }


def _persistent(module: nn.Module) -> dict[str, Tensor]:
    """Return the tensors that a whole checkpoint holds, by each of their names.

    Not from ``state_dict``, which gathers the whole model under FSDP, and returns copies.
    """
    found: dict[str, Tensor] = {}
    for path, part in module.named_modules(remove_duplicate=False):
        fleeting = part._non_persistent_buffers_set
        found |= {
            clean_name(join(path, key)): tensor
            for key, tensor in (*part._parameters.items(), *part._buffers.items())
            if tensor is not None and key not in fleeting
        }
    return found


@torch.no_grad()
def _starts(module: nn.Module, trained: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return what of the adapters starts from the base's values."""
    names, found = {id(tensor): name for name, tensor in trained.items()}, dict[str, Tensor]()
    for path, layer in lora_layers(module).items():
        for adapter in layer.adapters().values():
            value, like = state.get(join(path, adapter.parameter)), base_parameter(layer, adapter.parameter)
            if value is not None:
                starts = adapter.starts(value.to(like.device, like.dtype))
                found |= {names[id(adapter._parameters[key])]: start for key, start in starts.items()}
    return found
