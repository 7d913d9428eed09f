"""A checkpoint from before LoRA as the frozen base."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch
from torch import Tensor, nn

from lightning_lora.adapted_model import AdaptedModel
from lightning_lora.base_buffers import first_values
from lightning_lora.fingerprint import END, fingerprint, samples
from lightning_lora.layers import base_parameter
from lightning_lora.named_adapters import fill_buffers
from lightning_lora.names import clean_name, join, walk
from lightning_lora.sharding import copy_whole
from lightning_lora.state import extra_state_names, mismatches, other_shapes
from lightning_lora.trainer.metrics import load_states, metric_states
from lightning_lora.trainer.strategies.base import Layout


def load_base(layout: Layout, model: AdaptedModel, state: Mapping[str, Tensor], *, strict: bool) -> None:
    """Load the weights of a whole model as the frozen base; every process must call this.

    Args:
        layout: How the module's tensors are distributed.
        model: The adapted model; its adapters start anew.
        state: The whole tensors, in every process.
        strict: Whether the names must be exactly those of the base.

    Raises:
        ValueError: The state does not fit. Nothing was changed.
    """
    factors, first = factor_names(model), first_values(model)
    persistent = _persistent(model.module)
    base = {n: tensor for n, tensor in persistent.items() if n not in factors and first.get(n, tensor) is not None}
    known: Collection[str] = {*metric_states(model), *extra_state_names(model.module)}
    whole = layout.shapes(base)
    problems = mismatches(whole, state, known) if strict else other_shapes(whole, state)
    if not base.keys() & state.keys():
        problems.append("they share no name")
    if problems:
        raise ValueError(
            f"The checkpoint holds no adapter, and as a base it does not fit {type(model.module).__name__}; nothing "
            "was changed:\n" + "\n".join(f"  - {problem}" for problem in problems)
        )
    fill_buffers(model, {})  # what an earlier training has changed: this one starts anew
    base = {name: tensor for name, tensor in _persistent(model.module).items() if name in base}
    layout.fill(base, state)
    if layout.base is not None:
        loaded = {name: state[name] for name in model.base if name in state}
        ends = [name for name in layout.base if name.endswith(END)]
        layout.base = {**layout.base, **fingerprint(loaded), **samples(loaded, ends)}
    starts = _starts(model, state)
    layout.fill({name: model.trained[name] for name in starts}, starts)
    for root in model.roots:
        for name, value in (root.attachment.base_values | root.attachment.first_buffers).items():
            if (full := join(root.name, name)) in state and value is not None and value.shape == state[full].shape:
                copy_whole(value, state[full])
    load_states(model, state)


def factor_names(model: AdaptedModel) -> set[str]:
    """Return the names of the adapters' own tensors."""
    return {
        clean_name(f"{path}.lora.{key}")
        for path, layer in model.layers.items()
        for named in (layer.lora.named_parameters, layer.lora.named_buffers)
        for key, _ in named(remove_duplicate=False)
    }


def _persistent(module: nn.Module) -> dict[str, Tensor]:
    """Return the tensors that a whole checkpoint holds, by each of their names.

    ``state_dict`` would gather the whole model under FSDP, and return copies.
    """
    found: dict[str, Tensor] = {}
    for path, part in walk(module, every_name=True):
        fleeting = part._non_persistent_buffers_set
        found |= {
            join(path, key): tensor
            for key, tensor in (*part._parameters.items(), *part._buffers.items())
            if tensor is not None and key not in fleeting
        }
    return found


@torch.no_grad()
def _starts(model: AdaptedModel, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the values of adapter tensors that start from the base's, such as DoRA's magnitudes."""
    names, found = {id(tensor): name for name, tensor in model.trained.items()}, dict[str, Tensor]()
    for path, layer in model.layers.items():
        for adapter in layer.adapters().values():
            value, like = state.get(join(path, adapter.parameter)), base_parameter(layer, adapter.parameter)
            if value is not None:
                starts = adapter.starts(value.to(like.device, like.dtype))
                found |= {names[id(adapter._parameters[key])]: start for key, start in starts.items()}
    return found
