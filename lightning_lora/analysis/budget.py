"""Plan an adapter before attaching it: which layers at which rank a budget allows, and what a choice costs.

The LoRA paper's section 7.1 asks which weight matrices to adapt under one parameter budget. In its table 5, more kinds
of matrices at a lower rank do better than one kind at a higher rank; the tables here are in that order.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import combinations
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn
from typing_extensions import override

from lightning_lora.attachment import table_lines
from lightning_lora.config import LoRAConfig
from lightning_lora.disk import WIDE, BaseFolder, open_base
from lightning_lora.disk.skeleton import build_skeleton
from lightning_lora.names import listed
from lightning_lora.planning.plan import PlannedLayer
from lightning_lora.planning.planner import make_plan
from lightning_lora.storage.safetensors import Layout

ADAM_BYTES = 8  # per trained parameter: two averages in float32
_ALL_SUBSETS_UP_TO = 4
_MEGA = 1e6
_EMBEDDINGS = ("wte", "wpe", "shared", "relative_attention_bias")
_HEADS = ("lm_head", "embed_out")


@dataclass(frozen=True)
class Choice:
    """The cost of adapting some groups of layers at one rank.

    Attributes:
        targets: The groups, as entries for ``LoRAConfig.target_modules``.
        layers: Number of adapters; a stack of experts counts once.
        rank: The rank.
        parameters: Number of adapter parameters.
        file_bytes: Bytes of the factors, in memory and in a file.
        optimizer_bytes: Bytes of the optimizer state.
        share: The adapter parameters over those of the base model.
        capped: The layer whose size, rather than the budget, limits the rank.
    """

    targets: tuple[str, ...]
    layers: int
    rank: int
    parameters: int
    file_bytes: int
    optimizer_bytes: int
    share: float
    capped: tuple[str, ...] = ()


@dataclass(frozen=True)
class BudgetPlan:
    """The choices that a budget allows; ``print(plan)`` shows a table.

    Attributes:
        choices: The choices, those with the most groups first.
        too_small_for: Groups and combinations that exceed the budget even at rank 1.
        budget: The budget, in words.
        base_parameters: Number of parameters of the model without adapters.
    """

    choices: tuple[Choice, ...]
    too_small_for: tuple[tuple[str, ...], ...]
    budget: str
    base_parameters: int

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, for JSON."""
        return asdict(self)

    @override
    def __str__(self) -> str:
        header = ("targets", "layers", "rank", "parameters", "MB", "optimizer MB", "share")
        lines = [f"A budget of {self.budget} for a base of {self.base_parameters:,} parameters:"]
        rows = [_row(choice) for choice in self.choices]
        lines += table_lines([header, *rows, ("",) * len(header)])[:-2] if rows else ["nothing fits"]
        if self.too_small_for:
            names = [" + ".join(targets) for targets in self.too_small_for]
            lines.append(f"not enough for rank 1 of: {listed(names)}")
        if capped := list(dict.fromkeys(name for choice in self.choices for name in choice.capped)):
            lines.append(f"rank limited by the size of: {listed(capped)}")
        return "\n".join(lines)


def plan_budget(
    module: nn.Module,
    config: LoRAConfig | None = None,
    *,
    parameters: int | None = None,
    file_bytes: int | None = None,
    optimizer_bytes: int | None = None,
    rank: int | None = None,
    bytes_per_state: int = ADAM_BYTES,
    groups: Sequence[Sequence[str]] | None = None,
) -> BudgetPlan:
    """Return which groups of layers a budget can adapt, and the highest rank of each.

    Args:
        module: The model; it may be on the meta device.
        config: Which layers may be adapted, the precision of the factors, and whether DoRA or a bias is added; its rank
            is ignored. Every linear layer by default.
        parameters: Budget in parameters. Give exactly one budget.
        file_bytes: Budget in bytes of the factors.
        optimizer_bytes: Budget in bytes of the optimizer state.
        rank: Instead of a budget: what every choice costs at this rank, or at the highest that its layers allow.
        bytes_per_state: Bytes of optimizer state per trained parameter: 8 for Adam, 12 with a float32 copy.
        groups: The combinations to consider; by default all of them for up to four groups, otherwise each group alone,
            each pair, and all together.

    Raises:
        ValueError: Not exactly one budget was given, or a group does not exist.

    Source:
        Hu et al. 2021, "LoRA", arXiv:2106.09685, section 7.1, table 5.
    """
    config = config or LoRAConfig()
    budget = _only_budget(
        {"parameters": parameters, "file_bytes": file_bytes, "optimizer_bytes": optimizer_bytes, "rank": rank}
    )
    known, base_parameters = _groups(module, config)
    prices = _Prices(config.adapter_dtype, bytes_per_state, base_parameters)
    limit, words = prices.limit(*budget)
    chosen = [tuple(group) for group in groups] if groups is not None else list(_combinations(list(known)))
    if unknown := sorted({name for group in chosen for name in group} - known.keys()):
        raise ValueError(f"groups: the model has no {listed(unknown)}; its groups are {listed(list(known))}.")
    choices, too_small = [], []
    for targets in chosen:
        cost = sum((known[target] for target in targets), _Cost())
        highest = (limit - cost.fixed) // cost.per_rank if rank is None else rank
        if highest < 1:
            too_small.append(targets)
            continue
        at = min(highest, cost.highest_rank)
        capped = (cost.smallest,) if at == cost.highest_rank else ()
        choices.append(prices.choice(targets, cost.layers, at, cost.fixed + at * cost.per_rank, capped))
    ordered = sorted(choices, key=lambda choice: (-len(choice.targets), -choice.parameters))
    return BudgetPlan(tuple(ordered), tuple(too_small), words, base_parameters)


def adapter_size(module: nn.Module, config: LoRAConfig | None = None, *, bytes_per_state: int = ADAM_BYTES) -> Choice:
    """Return what a config costs on a model, without attaching anything.

    Args:
        module: The model; it may be on the meta device.
        config: The config, with its rank and patterns.
        bytes_per_state: Bytes of optimizer state per trained parameter.
    """
    config = config or LoRAConfig()
    plan = make_plan(module, config)
    names = dict.fromkeys(_group(layer) for layer in plan.layers)
    size, ranks = sum(layer.size for layer in plan.layers), [layer.spec.rank for layer in plan.layers]
    prices = _Prices(config.adapter_dtype, bytes_per_state, plan.base_parameters)
    return prices.choice(tuple(names), len(ranks), max(ranks), size)


# --- costs


class _Prices(NamedTuple):
    """Cost of an adapter's parameters: bytes in a file and in the optimizer, and their share of the base."""

    adapter_dtype: str
    bytes_per_state: int
    base_parameters: int

    @property
    def itemsize(self) -> int:
        dtype: torch.dtype = getattr(torch, self.adapter_dtype)
        return dtype.itemsize

    def choice(
        self, targets: tuple[str, ...], layers: int, rank: int, size: int, capped: tuple[str, ...] = ()
    ) -> Choice:
        share = size / self.base_parameters if self.base_parameters else math.nan
        return Choice(targets, layers, rank, size, size * self.itemsize, size * self.bytes_per_state, share, capped)

    def limit(self, name: str, budget: int) -> tuple[int, str]:
        """Return a budget in parameters, and in words; a rank allows any number of parameters."""
        if name == "parameters":
            return budget, f"{budget:,} parameters"
        if name == "file_bytes":
            return budget // self.itemsize, f"{budget / _MEGA:,.1f} MB of factors in {self.adapter_dtype}"
        if name == "optimizer_bytes":
            return budget // self.bytes_per_state, f"{budget / _MEGA:,.1f} MB of optimizer state"
        return 0, f"rank {budget}"


@dataclass(frozen=True)
class _Cost:
    """Parameters of a group's adapters, ``fixed + rank * per_rank``, and the highest rank that all its layers allow."""

    layers: int = 0
    fixed: int = 0
    per_rank: int = 0
    highest_rank: int = 2**62
    smallest: str = ""

    def __add__(self, other: _Cost) -> _Cost:
        smaller = min(self, other, key=lambda cost: cost.highest_rank)
        return _Cost(
            self.layers + other.layers,
            self.fixed + other.fixed,
            self.per_rank + other.per_rank,
            smaller.highest_rank,
            smaller.smallest,
        )


def _only_budget(budgets: Mapping[str, int | None]) -> tuple[str, int]:
    given = {name: budget for name, budget in budgets.items() if budget is not None}
    if len(given) != 1:
        raise ValueError(f"plan_budget needs exactly one of {', '.join(budgets)}; got {listed(list(given)) or 'none'}.")
    [(name, budget)] = given.items()
    if budget < 1:
        raise ValueError(f"{name} must be at least 1, got {budget!r}.")
    return name, budget


def _groups(module: nn.Module, config: LoRAConfig) -> tuple[Mapping[str, _Cost], int]:
    """Return the cost of each group of layers, by an entry that names exactly its layers, and the model's size."""
    at_rank_one = replace(config, rank=1, rank_pattern={}, alpha_pattern={}, trainable_token_indices=())
    plan = make_plan(module, at_rank_one)
    groups: dict[str, _Cost] = {}
    for layer in plan.layers:
        groups[_group(layer)] = groups.get(_group(layer), _Cost()) + _cost(layer)
    return groups, plan.base_parameters


def _cost(layer: PlannedLayer) -> _Cost:
    rows, columns = layer.adapter.matrix_shape(layer.module, layer.parameter)
    rows = sum(map(len, layer.spec.rows)) or rows
    per_rank = layer.adapter.stack(layer.module, layer.parameter) * (rows + columns)
    return _Cost(1, layer.size - per_rank, per_rank, min(rows, columns), layer.label)


def _group(layer: PlannedLayer) -> str:
    """Return the last part of a layer's name, which all blocks share; a number names nothing."""
    last = layer.label.rpartition(".")[2]
    return layer.label if last.isdigit() else last


def _combinations(names: Sequence[str]) -> Iterator[tuple[str, ...]]:
    sizes: Iterable[int] = range(1, len(names) + 1)
    if len(names) > _ALL_SUBSETS_UP_TO:
        sizes = (1, 2, len(names))
    for size in sizes:
        yield from combinations(names, size)


def _row(choice: Choice) -> tuple[str, ...]:
    sizes = (f"{choice.parameters:,}", _megabytes(choice.file_bytes), _megabytes(choice.optimizer_bytes))
    return (" + ".join(choice.targets), str(choice.layers), str(choice.rank), *sizes, f"{choice.share:.3%}")


def _megabytes(size: int) -> str:
    return f"{size / _MEGA:,.1f}" if size >= _MEGA else f"{size / _MEGA:.3f}"


# --- a model from the headers of its files


class ShapedModel(NamedTuple):
    """A model without values, to plan with.

    Attributes:
        module: Modules with the base's names and shapes.
        heads: The output layers of language models, which ``"all-linear"`` leaves out of a loaded model.
        experts: Number of its linear layers that are experts; some libraries stack them while loading.
    """

    module: nn.Module
    heads: tuple[str, ...]
    experts: int = 0


def model_of_shapes(path: Path) -> ShapedModel:
    """Return a base as far as its files describe it without its code; no tensor is read.

    A weight of two dimensions counts as a linear layer, unless its name, or a row for each word of the vocabulary,
    marks it as an embedding or an output layer. Whether a layer is stored transposed does not change its size.

    Args:
        path: A model's folder, or one safetensors file.

    Raises:
        ValueError: The files cannot be read, or are quantized.
        FileNotFoundError: The files do not exist.
    """
    base = open_base(path)
    layouts = {name: Layout(tensor.dtype, tensor.shape) for name, tensor in base.tensors.items()}
    kinds = dict(_kinds(layouts))
    if quantized := [name for name in kinds if layouts[f"{name}.weight"].dtype not in WIDE]:
        raise ValueError(
            f"The weights of {listed(quantized)} are quantized and do not have the shapes of their layers; give the "
            "unquantized base."
        )
    heads = tuple(name for name, kind in kinds.items() if kind == "linear" and _is_head(name, base, layouts))
    experts = sum(kind == "linear" and ".experts." in name for name, kind in kinds.items())
    return ShapedModel(build_skeleton(layouts, kinds), heads, experts)


def _kinds(layouts: Mapping[str, Layout]) -> Iterator[tuple[str, str]]:
    for name, layout in layouts.items():
        path, _, key = name.rpartition(".")
        if key != "weight" or not path:
            continue
        if len(layout.shape) == 2:
            yield path, "embedding" if _is_embedding(path) else "linear"
        elif 3 <= len(layout.shape) <= 5:
            yield path, "conv"


def _is_embedding(path: str) -> bool:
    last = path.rpartition(".")[2]
    return last in _EMBEDDINGS or ("embed" in last and last not in _HEADS)


def _is_head(path: str, base: BaseFolder, layouts: Mapping[str, Layout]) -> bool:
    words = base.config.get("vocab_size")
    return path.rpartition(".")[2] in _HEADS or layouts[f"{path}.weight"].shape[0] == words
