"""Which layers at which rank a budget buys, and what a choice costs, before anything is attached.

The LoRA paper's section 7.1 asks which weight matrices to adapt under one budget of parameters; its table 5 says that
more kinds of matrices at a lower rank do better than one kind at a higher one. The tables here are in that order.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import combinations
from typing import Any

import torch
from torch import nn
from typing_extensions import override

from lightning_lora.attachment import table_lines
from lightning_lora.config import LoRAConfig
from lightning_lora.names import listed, module_names
from lightning_lora.planning.plan import PlannedLayer
from lightning_lora.planning.planner import make_plan

ADAM_BYTES = 8  # of each trained parameter: two averages in float32
_ALL_SUBSETS_UP_TO = 4
_MEGA = 1e6


@dataclass(frozen=True)
class Choice:
    """What adapting some groups of layers at one rank costs.

    Attributes:
        targets: The groups, as entries for ``LoRAConfig.target_modules``.
        layers: How many adapters that makes; a stack of experts counts once.
        rank: The rank.
        parameters: Parameters of the adapters.
        file_bytes: Bytes of the factors, in memory and in a file.
        optimizer_bytes: Bytes of the optimizer's state.
        share: The parameters over those of the base model.
        capped: The layer whose size, and not the budget, keeps the rank from being higher.
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
        choices: The choices, those of most groups first.
        too_small_for: Groups and combinations for which the budget does not suffice at rank 1.
        budget: The budget, in words.
        base_parameters: Parameters of the model without adapters.
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
            lines.append(f"too little for rank 1 of: {listed(names)}")
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
    """Return which groups of layers a budget can adapt, and at which highest rank each.

    Args:
        module: The model; the meta device will do.
        config: Says which layers may be adapted, the factors' precision, and whether DoRA or a bias is on top; its rank
            is not used. If left out, every linear layer.
        parameters: Budget in parameters. Give exactly one budget.
        file_bytes: Budget in bytes of the factors.
        optimizer_bytes: Budget in bytes of the optimizer's state.
        rank: The other way round: what every choice costs at this rank, or at the highest that its layers can have.
        bytes_per_state: Bytes of optimizer state for each trained parameter: 8 for Adam, 12 with a float32 copy.
        groups: The combinations to look at; if left out, all of them for up to four groups, else every group alone,
            every pair, and all together.

    Raises:
        ValueError: Not exactly one budget was given, or a group does not exist.

    Source:
        Hu et al. 2021, "LoRA", arXiv:2106.09685, section 7.1, table 5.
    """
    config = config or LoRAConfig()
    budgets = {"parameters": parameters, "file_bytes": file_bytes, "optimizer_bytes": optimizer_bytes, "rank": rank}
    limit, words = _limit(config, budgets, bytes_per_state)
    found, base_parameters = _groups(module, config)
    chosen = [tuple(group) for group in groups] if groups is not None else list(_combinations(list(found)))
    if unknown := sorted({name for group in chosen for name in group} - found.keys()):
        raise ValueError(f"groups: {listed(unknown)} are none of the model's groups: {listed(list(found))}.")
    choices, too_small = [], []
    for targets in chosen:
        cost = sum((found[target] for target in targets), _Cost())
        wanted = (limit - cost.fixed) // cost.per_rank if rank is None else rank
        if wanted < 1:
            too_small.append(targets)
        else:
            highest = min(wanted, cost.highest_rank)
            choices.append(cost.choice(targets, highest, config, base_parameters, bytes_per_state))
    ordered = sorted(choices, key=lambda choice: (-len(choice.targets), -choice.parameters))
    return BudgetPlan(tuple(ordered), tuple(too_small), words, base_parameters)


def adapter_size(module: nn.Module, config: LoRAConfig | None = None, *, bytes_per_state: int = ADAM_BYTES) -> Choice:
    """Return what a config costs on a model, without attaching anything.

    Args:
        module: The model; the meta device will do.
        config: The config, with its rank and patterns.
        bytes_per_state: Bytes of optimizer state for each trained parameter.
    """
    config = config or LoRAConfig()
    plan = make_plan(module, module_names(module), config, 0)
    names = dict.fromkeys(_group(layer) for layer in plan.layers)
    size, ranks = sum(layer.size for layer in plan.layers), [layer.spec.rank for layer in plan.layers]
    return _choice(tuple(names), len(ranks), max(ranks), size, config, plan.base_parameters, bytes_per_state)


@dataclass
class _Cost:
    """Parameters of a group's adapters: ``fixed + rank * per_rank``; the highest rank that all its layers can have."""

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

    def choice(
        self, targets: tuple[str, ...], rank: int, config: LoRAConfig, base_parameters: int, bytes_per_state: int
    ) -> Choice:
        size = self.fixed + rank * self.per_rank
        capped = (self.smallest,) if rank == self.highest_rank else ()
        return _choice(targets, self.layers, rank, size, config, base_parameters, bytes_per_state, capped)


def _choice(
    targets: tuple[str, ...],
    layers: int,
    rank: int,
    size: int,
    config: LoRAConfig,
    base_parameters: int,
    bytes_per_state: int,
    capped: tuple[str, ...] = (),
) -> Choice:
    share = size / base_parameters if base_parameters else math.nan
    return Choice(targets, layers, rank, size, size * _itemsize(config), size * bytes_per_state, share, capped)


def _groups(module: nn.Module, config: LoRAConfig) -> tuple[Mapping[str, _Cost], int]:
    """Return what each group of layers costs, by an entry that names exactly its layers, and the model's size."""
    at_rank_one = replace(config, rank=1, rank_pattern={}, alpha_pattern={}, trainable_token_indices=())
    plan = make_plan(module, module_names(module), at_rank_one, 0)
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
    """Return the last part of a layer's name, which names its like in all blocks; numbers name nothing."""
    last = layer.label.rpartition(".")[2]
    return layer.label if last.isdigit() else last


def _combinations(names: Sequence[str]) -> Iterator[tuple[str, ...]]:
    sizes: Iterable[int] = range(1, len(names) + 1)
    if len(names) > _ALL_SUBSETS_UP_TO:
        sizes = (1, 2, len(names))
    for size in sizes:
        yield from combinations(names, size)


def _limit(config: LoRAConfig, budgets: Mapping[str, int | None], bytes_per_state: int) -> tuple[int, str]:
    """Return a budget in parameters, and in words; a rank allows any number of parameters."""
    given = {name: budget for name, budget in budgets.items() if budget is not None}
    if len(given) != 1:
        raise ValueError(f"plan_budget needs exactly one of {', '.join(budgets)}; got {listed(list(given)) or 'none'}.")
    [(name, budget)] = given.items()
    if budget < 1:
        raise ValueError(f"{name} must be at least 1, got {budget!r}.")
    if name == "parameters":
        return budget, f"{budget:,} parameters"
    if name == "file_bytes":
        return budget // _itemsize(config), f"{budget / _MEGA:,.1f} MB of factors in {config.adapter_dtype}"
    if name == "optimizer_bytes":
        return budget // bytes_per_state, f"{budget / _MEGA:,.1f} MB of optimizer state"
    return 0, f"rank {budget}"


def _itemsize(config: LoRAConfig) -> int:
    dtype: torch.dtype = getattr(torch, config.adapter_dtype)
    return dtype.itemsize


def _row(choice: Choice) -> tuple[str, ...]:
    return (
        " + ".join(choice.targets),
        str(choice.layers),
        str(choice.rank),
        f"{choice.parameters:,}",
        _megabytes(choice.file_bytes),
        _megabytes(choice.optimizer_bytes),
        f"{choice.share:.3%}",
    )


def _megabytes(size: int) -> str:
    return f"{size / _MEGA:,.1f}" if size >= _MEGA else f"{size / _MEGA:.3f}"
