"""A sum of adapters as an adapter itself: the config that describes it, its attachment and its values."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from functools import reduce
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lightning_lora.adapted_model import AdaptedModel
from lightning_lora.base_buffers import base_buffers
from lightning_lora.config import LoRAConfig
from lightning_lora.layers import LowRankAdapter, TokenAdapter
from lightning_lora.names import listed, module_names
from lightning_lora.peft_format.config import numbers_for, targets_for
from lightning_lora.several.summand import Summand, Update, merged_options
from lightning_lora.state import wide
from lightning_lora.surgery import attach, detach

_SMALLEST_REST = 1e-9  # of the base's values in a sum: below it, the weights were meant to add up to 1


class CombinedLayer(NamedTuple):
    """One layer of a sum.

    Attributes:
        name: The adapter's name, as in ``AttachReport``.
        stacked: Rank of the stacked factors, before anything was cut.
        rank: Rank of the result; 0 if the updates cancel, and the layer was left out.
        error: Norm of what was cut, relative to that of the exact sum.
    """

    name: str
    stacked: int
    rank: int
    error: float


class Layer(NamedTuple):
    """The sum of the updates of one layer: itself, where it is named, and what became of its rank."""

    update: Update
    summary: CombinedLayer


def attach_sum(
    target: nn.Module,
    layers: Mapping[str, Layer],
    summands: Sequence[Summand],
    caller: str,
    undo: ExitStack,
    *,
    is_exact: bool,
) -> None:
    """Attach adapters of the ranks and scalings of a sum; ``undo`` takes it back.

    Raises:
        ValueError: One config cannot express them.
    """
    config = _config(target, layers, summands, is_exact=is_exact)
    wanted = _in_place(layers, summands, config.bias)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "These adapters are not smaller")  # the ranks follow from the adapters
            attach(target, config)
    except ValueError as error:
        raise ValueError(f"{caller}: no single adapter can hold the result: {error}") from error
    undo.callback(detach, target)
    made = {name: each for name, each in AdaptedModel(target).adapters.items() if isinstance(each, LowRankAdapter)}
    numbers = {name: (layer.update.factors.rank, layer.update.factors.scaling) for name, layer in wanted.items()}
    wrong = [
        name
        for name in sorted(made.keys() | wanted.keys())
        if name not in made or name not in wanted or not _is_like(made[name], *numbers[name])
    ]
    if wrong:
        raise ValueError(
            f"{caller}: no single config means exactly the layers of the result: {listed(wrong)} would be adapted "
            "otherwise, because a name is also the end of another one."
        )


def _is_like(adapter: LowRankAdapter, rank: int, scaling: float) -> bool:
    return adapter.spec.rank == rank and math.isclose(adapter.spec.scaling, scaling, rel_tol=1e-12)


def _in_place(layers: Mapping[str, Layer], summands: Sequence[Summand], bias: str) -> dict[str, Layer]:
    """Return the layers to adapt: without those that cancel, unless a config could not name what else is trained."""
    left = {name: layer for name, layer in layers.items() if layer.summary.rank}
    needs_all = bias == "lora_only" or not (left or any(each.tokens for each in summands))
    return dict(layers) if needs_all else left


def _config(
    target: nn.Module, layers: Mapping[str, Layer], summands: Sequence[Summand], *, is_exact: bool
) -> LoRAConfig:
    """Return the options with which exactly these layers get these ranks and scalings."""
    options = reduce(merged_options, [each.config for each in summands])
    found = _in_place(layers, summands, options.bias)
    is_one = len(summands) == 1 and is_exact  # then scalings and precision are those of the adapter
    numbers = numbers_for(
        {name: layer.update.factors for name, layer in found.items()}, use_rslora=is_one and options.use_rslora
    )
    slices: dict[str, dict[str, str]] = {}
    for update in (layer.update for layer in found.values()):
        if update.rows:
            slices.setdefault(update.path, {})[update.part] = update.slices_text
    whole = [layer.update for layer in found.values() if not layer.update.rows]
    by_name = [update.path for update in whole if not update.parameter]
    every = [alias for _, aliases in module_names(target).values() for alias in aliases]
    tokens: dict[str, set[int]] = {}
    for each in summands:
        for name, rows in each.tokens.items():
            tokens.setdefault(name, set()).update(rows)
    return LoRAConfig(
        rank=numbers["r"],
        alpha=numbers["lora_alpha"],
        rank_pattern=numbers["rank_pattern"],
        alpha_pattern=numbers["alpha_pattern"],
        use_rslora=numbers["use_rslora"],
        target_modules=targets_for(by_name, every),
        target_parameters=sorted(update.whole for update in whole if update.parameter),
        target_slices=slices,
        trainable_token_indices={name: sorted(numbers) for name, numbers in sorted(tokens.items())},
        modules_to_save=sorted({name for each in summands for name in each.saved}),
        bias=options.bias,
        lora_bias=options.lora_bias,
        untie_weights=options.untie_weights,
        dropout=options.dropout,
        frozen_norm=options.frozen_norm,
        adapter_dtype=_precision(summands, exact=is_one),
    )


def _precision(summands: Sequence[Summand], *, exact: bool) -> Any:
    """Return the name of the precision of the sum's factors: as it was if ``exact``, else float32 at least."""
    tensors = [update.factors.A for each in summands for update in each.updates.values()]
    tensors += [row for each in summands for rows in each.tokens.values() for row in rows.values()]
    kinds = {tensor.dtype for tensor in tensors} | (set() if exact and tensors else {torch.float32})
    return str(reduce(torch.promote_types, kinds)).removeprefix("torch.")


def state_of_sum(model: AdaptedModel, layers: Mapping[str, Layer], summands: Sequence[Summand]) -> dict[str, Tensor]:
    """Return the values of a sum for the adapters just attached for it, where what trains in full has the base's."""
    place = {id(tensor): name for name, tensor in model.trained.items()}
    state = dict[str, Tensor]()
    for name, adapter in model.adapters.items():
        if isinstance(adapter, TokenAdapter):
            rows = zip(adapter.index.tolist(), adapter.rows.detach(), strict=True)
            state[place[id(adapter.rows)]] = torch.stack([_moved(row, _rows(summands, name, t)) for t, row in rows])
            continue
        for key, tensor in adapter.named_parameters():
            value = getattr(layers[name].update.factors, key)
            state[place[id(tensor)]] = torch.zeros_like(tensor) if value is None else value
    return state | {name: _moved(tensor, _values(summands, name)) for name, tensor in model.in_full.items()}


def buffers_of_sum(model: AdaptedModel, summands: Sequence[Summand], caller: str) -> dict[str, Tensor]:
    """Return the sum of the buffers of the base that training has changed.

    Raises:
        ValueError: The adapters, or the base, have other shapes of one, so that they cannot be added.
    """
    base, found = base_buffers(model), dict[str, Tensor]()
    for name in dict.fromkeys(name for each in summands for name in each.buffers):
        terms = [(each.weight, each.buffers[name]) for each in summands if name in each.buffers]
        value = base.get(name, terms[0][1])
        if len({tensor.shape for _, tensor in terms} | ({value.shape} if _share_of_base(terms) else set())) > 1:
            owners = [each.name for each in summands if name in each.buffers]
            raise ValueError(
                f"{caller}: training has changed the buffer {name!r}, which has other shapes under {listed(owners)} or "
                "in the base, so its values cannot be added. Nothing was changed."
            )
        found[name] = _moved(value, terms)
    return found


def _rows(summands: Sequence[Summand], name: str, token: int) -> list[tuple[float, Tensor]]:
    return [(each.weight, each.tokens[name][token]) for each in summands if token in each.tokens.get(name, ())]


def _values(summands: Sequence[Summand], name: str) -> list[tuple[float, Tensor]]:
    return [(each.weight, each.values[name]) for each in summands if name in each.values]


def _share_of_base(terms: Sequence[tuple[float, Tensor]]) -> float:
    """Return the factor of the base's own value in ``v + sum of w_i * (v_i - v)``."""
    rest = 1.0 - math.fsum(weight for weight, _ in terms)
    return 0.0 if abs(rest) < _SMALLEST_REST else rest


def _moved(base: Tensor, terms: Sequence[tuple[float, Tensor]]) -> Tensor:
    parts = [weight * wide(value) for weight, value in terms]
    if rest := _share_of_base(terms):
        parts.append(rest * wide(base.detach().cpu()))
    total = torch.stack(parts).sum(0)
    return total if base.is_floating_point() or base.is_complex() else total.round()


def check_needs_no_base(model: AdaptedModel, summands: Sequence[Summand], caller: str) -> None:
    """Raise if a sum depends on values of the base, which no file of an adapter holds.

    Raises:
        ValueError: It does, in what trains in full.
    """
    terms = {name: [_values(summands, name)] for name in model.in_full}
    for name, adapter in model.adapters.items():
        if isinstance(adapter, TokenAdapter):
            terms[name] = [_rows(summands, name, token) for token in adapter.index.tolist()]
    if needed := [name for name, each in terms.items() if any(map(_share_of_base, each))]:
        owners = [each.name for each in summands if needed[0] in each.values or needed[0] in each.tokens]
        raise ValueError(
            f"{caller}: {listed(needed)} is trained in full ({needed[0]!r} by {listed(owners)}). Its sum needs the "
            "base's own values, which no file holds, unless the weights of the adapters that have it add up to 1. "
            "Load the adapters into the model with add_adapter, and call combine."
        )
