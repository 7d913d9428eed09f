"""Leaving out what a schedule has left out: adapters of the ranks that are in use, in a module and in a checkpoint."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_lora.adapted_model import AdaptedModel, Root
from lightning_lora.config import LoRAConfig
from lightning_lora.layers import LowRankAdapter
from lightning_lora.layers.low_rank import components
from lightning_lora.names import is_below, join
from lightning_lora.ranks.allocation import with_ranks
from lightning_lora.surgery import restore_layer

MASK = "mask"


# --- in a module


@torch.no_grad()
def compact(module: nn.Module, optimizers: Iterable[Optimizer] = ()) -> None:
    """Give the adapters of a module the shapes of the ranks in use; layers of rank 0 become layers of the base again.

    Parameters keep their identity, so optimizers go on with them, and their states are cut in the same way.

    Args:
        module: An adapted module, whose factors are not divided over processes.
        optimizers: What trains them.
    """
    model = AdaptedModel(module)
    masked = {n: a for n, a in model.adapters.items() if isinstance(a, LowRankAdapter) and MASK in a._buffers}
    for root in model.roots:
        _record_ranks(root, masked)
    for adapter in masked.values():
        if (kept := adapter.kept) is not None:
            for optimizer in optimizers:
                _cut_states(optimizer, adapter.A, -2, kept)
                _cut_states(optimizer, adapter.B, -1, kept)
            adapter.A.grad = adapter.B.grad = None
            adapter.A.data, adapter.B.data = _copies(adapter.A, adapter.B, kept)
        adapter.spec = adapter.spec._replace(rank=adapter.rank)
        adapter.forget_mask()
    gone = {id(adapter): adapter for adapter in masked.values() if not adapter.spec.rank}
    for optimizer in optimizers:
        _forget(optimizer, [parameter for adapter in gone.values() for parameter in adapter.parameters()])
    for layer in model.layers.values():
        if id(layer.lora) in gone:
            restore_layer(layer)


def _record_ranks(root: Root, masked: Mapping[str, LowRankAdapter]) -> None:
    """Write the ranks in use into the record of an attach."""
    attachment = root.attachment
    names = {layer.name: join(root.name, layer.name) for layer in attachment.report.layers}
    own = {short: masked[name] for short, name in names.items() if name in masked}
    ranks = {name: adapter.rank for name, adapter in own.items()}
    if not ranks:
        return
    scalings = {name: adapter.spec.scaling for name, adapter in own.items()}
    attachment.config = _compact_config(attachment.config, ranks, scalings)
    layers = [
        layer._replace(rank=ranks[layer.name], parameters=layer.parameters * ranks[layer.name] // layer.rank)
        if layer.name in ranks and own[layer.name].is_plain
        else layer
        for layer in attachment.report.layers
        if ranks.get(layer.name, 1)
    ]
    attachment.report = replace(attachment.report, layers=layers)


def _compact_config(config: LoRAConfig, ranks: Mapping[str, int], scalings: Mapping[str, float]) -> LoRAConfig:
    if all(rank == config.first_rank for rank in ranks.values()):
        return config
    return with_ranks(config, config.first_rank, ranks, scalings)


def _cut_states(optimizer: Optimizer, factor: nn.Parameter, dimension: int, kept: int) -> None:
    state = optimizer.state.get(factor, {})
    for key, value in state.items():
        is_cut = isinstance(value, Tensor) and value.ndim == factor.ndim
        if is_cut and value.shape[dimension] == factor.shape[dimension]:
            state[key] = value.narrow(dimension, 0, kept).clone(memory_format=torch.contiguous_format)


def _copies(A: Tensor, B: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Return the factors of the first components, in memory of their own."""
    A, B = components(A, B, count)
    return A.clone(), B.clone(memory_format=torch.contiguous_format)


def _forget(optimizer: Optimizer, parameters: Iterable[nn.Parameter]) -> None:
    gone = {id(parameter) for parameter in parameters}
    for group in optimizer.param_groups:
        group["params"] = [parameter for parameter in group["params"] if id(parameter) not in gone]
    for parameter in [parameter for parameter in optimizer.state if id(parameter) in gone]:
        del optimizer.state[parameter]


# --- in a checkpoint


def compacted(record: Mapping[str, Any], state: Mapping[str, Any]) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
    """Return the record of an adapter and its tensors as they are without what its masks leave out.

    Raises:
        KeyError: The record is damaged.
    """
    places = {name: place for name in record["layers"] if (place := _place_of(name, state)) is not None}
    if not places:
        return record, state
    kept = {name: int(state[place + MASK].count_nonzero()) for name, place in places.items()}
    gone = [place.removesuffix(".") for name, place in places.items() if not kept[name]]
    found = {key: value for key, value in state.items() if not is_below(key, gone)}
    for name, place in places.items():
        found.pop(place + MASK, None)
        if kept[name]:
            found[f"{place}A"], found[f"{place}B"] = _copies(state[f"{place}A"], state[f"{place}B"], kept[name])
    layers = {
        name: {**said, "rank": kept[name]} if name in kept else said
        for name, said in record["layers"].items()
        if kept.get(name, 1)
    }
    adapters = [_compact_entry(entry, record["layers"], kept) for entry in record["adapters"]]
    return {**record, "layers": layers, "adapters": adapters}, found


def _place_of(name: str, state: Mapping[str, Any]) -> str | None:
    """Return the beginning of the names of an adapter's tensors, if it has a mask."""
    above, _, last = name.rpartition(".")
    places = (f"{name}.lora.", join(above, f"lora.{last}."))
    return next((place for place in places if place + MASK in state), None)


def _compact_entry(
    entry: Mapping[str, Any], layers: Mapping[str, Mapping[str, Any]], kept: Mapping[str, int]
) -> Mapping[str, Any]:
    begin = f"{entry['root']}." if entry["root"] else ""
    own = {name.removeprefix(begin): name for name in kept if name.startswith(begin)}
    if not own:
        return entry
    ranks = {short: kept[name] for short, name in own.items()}
    scalings = {short: float(layers[name]["scaling"]) for short, name in own.items()}
    return {**entry, "config": _compact_config(LoRAConfig.from_dict(entry["config"]), ranks, scalings).to_dict()}
