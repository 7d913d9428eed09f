"""Plan an adapter before attaching it: which layers at which rank a budget allows.

The LoRA paper's section 7.1 asks which weight matrices to adapt under one parameter budget. In its table 5, more kinds
of matrices at a lower rank do better than one kind at a higher rank; the tables here are in that order.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import combinations
from typing import Any, NamedTuple

import torch
from torch import nn
from typing_extensions import override

from lightning_lora.analysis.adapters import place
from lightning_lora.attachment import table_lines
from lightning_lora.config import LoRAConfig
from lightning_lora.layers import LowRankAdapter
from lightning_lora.layers.starts import DIFFERENCES
from lightning_lora.names import listed
from lightning_lora.planning.plan import PlannedLayer
from lightning_lora.planning.planner import make_plan

ADAM_BYTES = 8  # per trained parameter: two averages in float32
_ALL_SUBSETS_UP_TO = 4
_ALTERNATIVES_SHOWN = 2
MEGA = 1e6


@dataclass(frozen=True)
class Choice:
    """The cost of adapting some groups of layers at one rank.

    Attributes:
        targets: The groups, as entries for ``LoRAConfig.target_modules``; the names of parameters among them, such as
            ``"in_proj_weight"``, for ``target_parameters``.
        layers: Number of adapters; a stack of experts counts once.
        rank: The rank.
        parameters: Number of adapter parameters.
        file_bytes: Bytes of the factors, in memory and in a file, with those that they start from where ``init`` keeps
            these.
        optimizer_bytes: Bytes of the optimizer state.
        share: The adapter parameters over those of the base model.
        capped: The layer whose size, rather than the budget, limits the rank.
        is_default: Whether this is exactly what ``LoRACallback`` adapts with the config at this rank.
    """

    targets: tuple[str, ...]
    layers: int
    rank: int
    parameters: int
    file_bytes: int
    optimizer_bytes: int
    share: float
    capped: tuple[str, ...] = ()
    is_default: bool = False


@dataclass(frozen=True)
class BudgetPlan:
    """The choices that a budget allows; ``print(plan)`` shows a table.

    Attributes:
        choices: The choices, those with the most groups first; at a given rank, what ``LoRACallback`` does before them.
        too_small_for: Groups and combinations that exceed the budget even at rank 1.
        budget: The budget, in words.
        base_parameters: Number of parameters of the model without adapters.
        without: Groups with a layer that is too small for the rank of a choice, and therefore left out of it.
    """

    choices: tuple[Choice, ...]
    too_small_for: tuple[tuple[str, ...], ...]
    budget: str
    base_parameters: int
    without: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, for JSON."""
        return asdict(self)

    @override
    def __str__(self) -> str:
        header = ("targets", "layers", "rank", "parameters", "MB", "optimizer MB", "share")
        lines = [f"A budget of {self.budget} for a base of {self.base_parameters:,} parameters:"]
        alike: dict[tuple[str, ...], list[str]] = {}  # numbers of a row -> what costs that
        for choice in self.choices:
            alike.setdefault(_numbers(choice), []).append(_targets(choice))
        rows = [(_alternatives(targets), *numbers) for numbers, targets in alike.items()]
        lines += table_lines([header, *rows, ("",) * len(header)])[:-2] if rows else ["nothing fits"]
        if self.too_small_for:
            names = [" + ".join(targets) for targets in self.too_small_for]
            lines.append(f"not enough for rank 1 of: {listed(names)}")
        if self.without:
            lines.append(f"too small for the rank: {listed(self.without)}; train such layers with modules_to_save")
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
        rank: Instead of a budget: what every choice costs at this rank.
        bytes_per_state: Bytes of optimizer state per trained parameter: 8 for Adam, 12 with a float32 copy.
        groups: The combinations to consider, each at most at the highest rank that its layers allow. By default all of
            them for up to four groups, otherwise each group alone, each pair, and all together; without the groups that
            are too small for the rank, such as a classifier of two classes.

    Raises:
        ValueError: Not exactly one budget was given, or a group does not exist.

    Source:
        Hu et al. 2021, "LoRA", arXiv:2106.09685, section 7.1, table 5.
    """
    config = config or LoRAConfig()
    budget = _only_budget(
        {"parameters": parameters, "file_bytes": file_bytes, "optimizer_bytes": optimizer_bytes, "rank": rank}
    )
    plan = make_plan(module, replace(config, rank=1, rank_pattern={}, alpha_pattern={}, trainable_token_indices=()))
    known: dict[str, list[_Cost]] = {}
    for layer in plan.layers:
        known.setdefault(_group(layer), []).append(_cost(layer))
    prices = _Prices(config.adapter_dtype, bytes_per_state, plan.base_parameters)
    limit, words = prices.limit(*budget)
    affordable = _Affordable(known, limit, rank, counts_kept=budget[0] == "file_bytes")
    chosen, without = affordable.combinations() if groups is None else ([tuple(group) for group in groups], [])
    if unknown := sorted({name for group in chosen for name in group} - known.keys()):
        raise ValueError(f"groups: the model has no {listed(unknown)}; its groups are {listed(list(known))}.")
    choices, too_small = [], []
    for targets in chosen:
        if (highest := affordable.highest(targets)) < 1:
            too_small.append(targets)
            continue
        costs = affordable.costs(targets)
        smallest = min(costs, key=lambda cost: cost.full_rank)
        at = min(highest, smallest.full_rank)
        capped = (smallest.label,) if at < highest else ()
        size, kept = (
            sum(each) for each in zip(*((c.fixed + at * c.per_rank, at * c.kept_per_rank) for c in costs), strict=True)
        )
        choices.append(prices.choice(targets, len(costs), at, size, kept, capped))
    ordered = sorted(choices, key=lambda choice: (-len(choice.targets), -choice.parameters))
    if rank is not None and config.families:
        default = adapter_size(module, replace(config, rank=rank), bytes_per_state=bytes_per_state)
        # No part of the groups has as many layers as all of them.
        ordered = [c for c in ordered if (c.layers, c.parameters) != (default.layers, default.parameters)]
        ordered.insert(0, replace(default, targets=(*config.families, *config.named_targets), is_default=True))
    return BudgetPlan(tuple(ordered), tuple(too_small), words, plan.base_parameters, tuple(without))


def adapter_size(module: nn.Module, config: LoRAConfig | None = None, *, bytes_per_state: int = ADAM_BYTES) -> Choice:
    """Return what the adapters of a config cost, without biases and heads that train in full; attaches nothing.

    Args:
        module: The model; it may be on the meta device.
        config: The config, with its rank and patterns.
        bytes_per_state: Bytes of optimizer state per trained parameter.
    """
    config = config or LoRAConfig()
    plan = make_plan(module, config)
    names = dict.fromkeys(_group(layer) for layer in plan.layers)
    size, ranks = sum(layer.size for layer in plan.layers), [layer.spec.rank for layer in plan.layers]
    kept = sum(layer.spec.rank * _per_rank(layer) for layer in plan.layers if _keeps_start(layer))
    prices = _Prices(config.adapter_dtype, bytes_per_state, plan.base_parameters)
    return prices.choice(tuple(names), len(ranks), max(ranks), size, kept)


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
        self, targets: tuple[str, ...], layers: int, rank: int, size: int, kept: int, capped: tuple[str, ...] = ()
    ) -> Choice:
        share, stored = size / self.base_parameters if self.base_parameters else math.nan, (size + kept) * self.itemsize
        return Choice(targets, layers, rank, size, stored, size * self.bytes_per_state, share, capped)

    def limit(self, name: str, budget: int) -> tuple[int, str]:
        """Return a budget in parameters, and in words; a rank allows any number of parameters."""
        if name == "parameters":
            return budget, f"{budget:,} parameters"
        if name == "file_bytes":
            return budget // self.itemsize, f"{budget / MEGA:,.1f} MB of factors in {self.adapter_dtype}"
        if name == "optimizer_bytes":
            return budget // self.bytes_per_state, f"{budget / MEGA:,.1f} MB of optimizer state"
        return 0, f"rank {budget}"


class _Cost(NamedTuple):
    """Parameters of one adapter, ``fixed + rank * per_rank``, numbers kept beside, and the full rank of its layer."""

    label: str
    fixed: int
    per_rank: int
    kept_per_rank: int
    full_rank: int


def _only_budget(budgets: Mapping[str, int | None]) -> tuple[str, int]:
    given = {name: budget for name, budget in budgets.items() if budget is not None}
    if len(given) != 1:
        raise ValueError(f"plan_budget needs exactly one of {', '.join(budgets)}; got {listed(list(given)) or 'none'}.")
    [(name, budget)] = given.items()
    if budget < 1:
        raise ValueError(f"{name} must be at least 1, got {budget!r}.")
    return name, budget


def _cost(layer: PlannedLayer) -> _Cost:
    """Return the cost of a layer that was planned at rank 1."""
    per_rank = _per_rank(layer)
    kept = per_rank if _keeps_start(layer) else 0
    return _Cost(layer.label, layer.size - per_rank, per_rank, kept, min(_shape(layer)))


def _shape(layer: PlannedLayer) -> tuple[int, int]:
    rows, columns = layer.adapter.matrix_shape(layer.module, layer.parameter)
    return sum(map(len, layer.spec.rows)) or rows, columns


def _per_rank(layer: PlannedLayer) -> int:
    return layer.adapter.stack(layer.module, layer.parameter) * sum(_shape(layer))


def _keeps_start(layer: PlannedLayer) -> bool:
    """Return whether the update is a difference to factors that are kept, in memory and in checkpoints."""
    return layer.spec.init in DIFFERENCES and issubclass(layer.adapter, LowRankAdapter) and layer.adapter.takes_starts


def _group(layer: PlannedLayer) -> str:
    """Return the last part of a layer's name, which all blocks share; a number names nothing."""
    last = layer.label.rpartition(".")[2]
    return layer.label if last.isdigit() else last


class _Affordable(NamedTuple):
    """What a limit in parameters allows of groups of layers; a given rank allows itself, whatever it costs."""

    known: Mapping[str, Sequence[_Cost]]
    limit: int
    rank: int | None
    counts_kept: bool  # the limit is one of files

    def costs(self, targets: Sequence[str]) -> list[_Cost]:
        return [cost for target in targets for cost in self.known[target]]

    def highest(self, targets: Sequence[str]) -> int:
        """Return the highest rank, whatever the sizes of the layers."""
        if self.rank is not None:
            return self.rank
        costs = self.costs(targets)
        per_rank = sum(cost.per_rank + (cost.kept_per_rank if self.counts_kept else 0) for cost in costs)
        return (self.limit - sum(cost.fixed for cost in costs)) // per_rank

    def combinations(self) -> tuple[list[tuple[str, ...]], list[str]]:
        """Return the combinations to consider, and the groups that are left out where they would limit the rank."""
        names = list(self.known)
        if self.rank is not None:
            fitting = [name for name in names if self._full_rank(name) >= self.rank]
            return list(_combinations(fitting)), [name for name in names if name not in fitting]
        found = {targets: self._without_limiting(targets) for targets in _combinations(names)}
        left_out = {name for targets, kept in found.items() for name in targets if name not in kept}
        return list(dict.fromkeys(found.values())), [name for name in names if name in left_out]

    def _without_limiting(self, targets: tuple[str, ...]) -> tuple[str, ...]:
        """Return the groups without those outside of blocks that allow a lower rank than the others and the limit."""
        least = min(map(self._full_rank, targets))
        rest = tuple(target for target in targets if self._full_rank(target) > least)
        in_blocks = any(place(cost.label)[0] for cost in self.costs(targets) if cost.full_rank == least)
        if not rest or in_blocks or least >= self.highest(targets):
            return targets
        return self._without_limiting(rest)

    def _full_rank(self, name: str) -> int:
        return min(cost.full_rank for cost in self.known[name])


def _combinations(names: Sequence[str]) -> Iterator[tuple[str, ...]]:
    for size in range(1, len(names) + 1) if len(names) <= _ALL_SUBSETS_UP_TO else (1, 2, len(names)):
        yield from combinations(names, size)


def _numbers(choice: Choice) -> tuple[str, ...]:
    sizes = (f"{choice.parameters:,}", _megabytes(choice.file_bytes), _megabytes(choice.optimizer_bytes))
    return (str(choice.layers), str(choice.rank), *sizes, f"{choice.share:.3%}")


def _targets(choice: Choice) -> str:
    return " + ".join(choice.targets) + (f", as LoRACallback(rank={choice.rank})" if choice.is_default else "")


def _alternatives(targets: Sequence[str]) -> str:
    """Return targets that cost the same as one cell."""
    more = len(targets) - _ALTERNATIVES_SHOWN
    return " or ".join(targets[:_ALTERNATIVES_SHOWN]) + (f" or {more} more" if more > 0 else "")


def _megabytes(size: int) -> str:
    return f"{size / MEGA:,.1f}" if size >= MEGA else f"{size / MEGA:.3f}"
