"""One adapter of a sum: what it has learned, by names relative to the module that the sum is attached to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import reduce
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import one_hot

from lightning_lora.adapted_model import AdaptedModel
from lightning_lora.base_buffers import moved_values
from lightning_lora.config import LoRAConfig
from lightning_lora.layers import LowRankAdapter, ParameterAdapter, TokenAdapter, parameter_adapter
from lightning_lora.layers.adapter import row_numbers
from lightning_lora.names import is_below, join, listed
from lightning_lora.peft_format.factors import Factors, factors_of, placed
from lightning_lora.peft_format.importing import Import

_SUMMED = ("A", "B", "bias", "magnitude")  # the last is refused with the reason


class Update(NamedTuple):
    """The low-rank update of a layer, of one parameter, or of a slice of either, and how a config names it.

    Attributes:
        factors: The update.
        path: The layer.
        parameter: The parameter, where ``target_parameters`` names it; else empty.
        part: The name of the slice; empty for the whole.
        rows: The rows of the slice.
        height: The rows of the whole weight, if this is a slice.
    """

    factors: Factors
    path: str
    parameter: str = ""
    part: str = ""
    rows: tuple[range, ...] = ()
    height: int = 0

    @property
    def whole(self) -> str:
        """The name of what it is an update of, slice or not."""
        return join(self.path, self.parameter) if self.parameter else self.path

    @property
    def slices_text(self) -> str:
        """The rows of the slice as ``target_slices`` names them."""
        return ",".join(f"{part.start}:{part.stop if part.stop >= 0 else ''}:{part.step}" for part in self.rows)


@dataclass
class Summand:
    """One adapter of a sum, with names relative to the module that the sum is attached to.

    Attributes:
        name: What messages call it.
        weight: Its factor.
        config: Its options.
        updates: The low-rank updates, by the names of their adapters.
        tokens: Embedding -> token -> its row.
        values: What was trained in full: name -> value.
        saved: The modules that were trained in full.
        buffers: The buffers of the base that training has changed by itself: name -> value.
    """

    name: str
    weight: float
    config: LoRAConfig
    updates: dict[str, Update] = field(default_factory=dict)
    tokens: dict[str, dict[int, Tensor]] = field(default_factory=dict)
    values: dict[str, Tensor] = field(default_factory=dict)
    saved: set[str] = field(default_factory=set)
    buffers: dict[str, Tensor] = field(default_factory=dict)


def summand_of_module(target: nn.Module, name: str, weight: float, caller: str) -> Summand:
    """Return copies of what the active adapter of a module has learned."""
    model = AdaptedModel(target)
    model.check_unchanged()
    model.check_started()
    configs = [root.attachment.config for root in model.roots]
    found = Summand(name, weight, reduce(merged_options, configs))
    for label, adapter in model.adapters.items():
        if isinstance(adapter, TokenAdapter):
            found.tokens[label] = dict(zip(adapter.index.tolist(), adapter.rows.detach().cpu().clone(), strict=True))
        elif isinstance(adapter, LowRankAdapter) and {key for key, _ in adapter.named_parameters()} <= {*_SUMMED}:
            found.updates[label] = _update_of(label, adapter, model)
        else:
            raise ValueError(
                f"{caller}: {label!r} of {name} has a {type(adapter).__name__}, which learns more than factors and a "
                "bias: its changes do not add up, nor can they be cut."
            )
    found.values = {key: tensor.detach().cpu().clone() for key, tensor in model.in_full.items()}
    found.buffers = {key: buffer.cpu() for key, buffer in moved_values(model).items()}
    found.saved = {join(root.name, key) for root in model.roots for key in root.attachment.report.saved}
    return found


def _update_of(label: str, adapter: LowRankAdapter, model: AdaptedModel) -> Update:
    factors = factors_of(adapter)
    path = label if label in model.layers else label.rpartition(".")[0]
    layer, parameter = model.layers[path], ""
    # A layer that reads its parameter as the config would read it by its name, of attention without the projection.
    if isinstance(adapter, ParameterAdapter) and parameter_adapter(layer, adapter.parameter) is type(adapter):
        parameter = adapter.parameter
    if not (rows := adapter.spec.rows):
        return Update(factors, path, parameter)
    height = adapter.matrix_shape(layer, adapter.parameter)[0]
    return Update(factors, path, parameter, label.rpartition(".")[2], rows, height)


def summand_of_file(content: Import, name: str, weight: float) -> Summand:
    """Return what a PEFT directory holds, matched with a skeleton."""
    updates = {
        layer.label: Update(
            layer.factors, layer.name, layer.parameter if issubclass(layer.adapter, ParameterAdapter) else ""
        )
        for layer in content.layers
    }
    tokens = {key: dict(zip(numbers, rows, strict=True)) for key, (numbers, rows) in content.tokens.items()}
    config = content.config
    return Summand(name, weight, config, updates, tokens, content.values, set(config.modules_to_save))


def merged_options(one: LoRAConfig, other: LoRAConfig) -> LoRAConfig:
    """Return options for two adapters, as far as ``_config`` asks for them."""
    return LoRAConfig(
        use_dora=one.use_dora or other.use_dora,
        lora_bias=one.lora_bias or other.lora_bias,
        use_rslora=one.use_rslora and other.use_rslora,
        untie_weights=one.untie_weights or other.untie_weights,
        dropout=one.dropout if one.dropout == other.dropout else 0.0,
        bias=min(one.bias, other.bias),  # "all", "lora_only", "none"
        frozen_norm=max(one.frozen_norm, other.frozen_norm),  # "track", "eval"
    )


def tokens_as_updates(summands: Sequence[Summand], base: nn.Module) -> None:
    """Turn rows of tokens into low-rank updates, of a rank for each token, where other summands adapt the embedding.

    A row of ``A`` picks a token, and the column of ``B`` is what its row differs by from the base's.
    """
    adapted = {label for each in summands for label in each.updates}
    for each in summands:
        for label in adapted & each.tokens.keys():
            rows = each.tokens.pop(label)
            weight = base.get_submodule(label).get_parameter("weight").detach().cpu()
            numbers, dtype = torch.tensor([*rows]), torch.promote_types(weight.dtype, torch.float32)
            changes = torch.stack([*rows.values()]).to(dtype) - weight[numbers].to(dtype)
            A = one_hot(numbers, len(weight)).to(dtype)
            each.updates[label] = Update(Factors(A, changes.T.contiguous(), 1.0), label)


# --- what cannot be summed


def check_summable(adapter: Summand, caller: str, *, alone: bool = False) -> None:
    """Raise if the changes of an adapter do not add up or, of an adapter alone, cannot be cut; or are not finite.

    Raises:
        ValueError: Its message says why.
    """
    if adapter.config.use_dora:
        reason = "whose magnitudes rescale the base's own rows: its changes do not add up. Leave it out"
        if alone:
            reason = (
                "which rescales each row of W + scaling * B @ A by its norm: a cut of B @ A would change the norms, "
                "and with them the base's own share of each row. Train it anew with a lower rank"
            )
        raise ValueError(f"{caller}: {adapter.name} uses DoRA, {reason}, or merge it into the base.")
    factors = {label: update.factors for label, update in adapter.updates.items()}
    tensors = {label: [each.A, each.B, *([] if each.bias is None else [each.bias])] for label, each in factors.items()}
    tensors |= {name: list(rows.values()) for name, rows in adapter.tokens.items()}
    tensors |= {name: [value] for name, value in adapter.values.items()}
    broken = [name for name, each in tensors.items() if not all(bool(torch.isfinite(t).all()) for t in each)]
    if broken:
        raise ValueError(f"{caller}: {adapter.name} holds NaN or infinity in {listed(broken)}.")


def check_conflicts(summands: Sequence[Summand], caller: str) -> None:
    """Raise if an adapter trains in full what another one adapts, or tokens of it whose base rows are unknown.

    Raises:
        ValueError: Its message names the layers.
    """
    for each in summands:
        names = {name for other in summands for name in (*other.updates, *other.tokens)}
        if inside := sorted(name for name in names if is_below(name, each.saved)):
            raise ValueError(
                f"{caller}: {listed(inside)} is trained in full by {each.name}, and adapted by another adapter; one "
                "adapter cannot hold both."
            )
        if both := sorted(each.tokens.keys() & {name for other in summands for name in other.updates}):
            raise ValueError(
                f"{caller}: {each.name} trains tokens of {listed(both)}, which another adapter adapts. Their sum needs "
                "the base's own rows, which no file holds. Load the adapters into the model with add_adapter, and call "
                "combine."
            )


# --- slices


def align_slices(summands: Sequence[Summand]) -> None:
    """Give adapters that divide a layer into different slices, or not at all, one update of the whole layer each."""
    paths = {update.path for each in summands for update in each.updates.values() if update.rows}
    for path in paths:
        own = [{label: u for label, u in each.updates.items() if u.path == path} for each in summands]
        if not _agree([{update.part: update.rows for update in each.values()} for each in own]):
            for each, updates in zip(summands, own, strict=True):
                _make_whole(each, updates)


def _agree(divisions: Sequence[Mapping[str, tuple[range, ...]]]) -> bool:
    """Return whether slices of the same name are of the same rows, and others apart; a whole layer has no name."""
    known: dict[str, tuple[range, ...]] = {}
    for division in divisions:
        if "" in division or any(known.get(part, rows) != rows for part, rows in division.items()):
            return False
        known |= division
    taken = [row for rows in known.values() for part in rows for row in part]
    return len(taken) == len({*taken})


def _make_whole(adapter: Summand, slices: Mapping[str, Update]) -> None:
    parts = [(row_numbers(each.rows), each.factors) for each in slices.values() if each.rows]
    if not parts:
        return
    for label in slices:
        del adapter.updates[label]
    first = next(iter(slices.values()))
    factors = placed(parts, first.height, None)
    adapter.updates[first.whole] = Update(factors, first.path, first.parameter)
