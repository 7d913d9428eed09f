"""Plan an adapter before attaching it: which layers at which rank a budget allows, and the memory that a step takes.

The LoRA paper's section 7.1 asks which weight matrices to adapt under one parameter budget. In its table 5, more kinds
of matrices at a lower rank do better than one kind at a higher rank; the tables here are in that order.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from itertools import combinations
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from typing_extensions import override

from lightning_lora.adapted_model import AdaptedModel
from lightning_lora.analysis.adapters import place
from lightning_lora.attachment import table_lines
from lightning_lora.config import LoRAConfig
from lightning_lora.names import listed
from lightning_lora.planning.plan import PlannedLayer
from lightning_lora.planning.planner import make_plan
from lightning_lora.probe import RandomState, arguments_for, left_as_it_was, tensors_in
from lightning_lora.surgery import attach, detach

ADAM_BYTES = 8  # per trained parameter: two averages in float32
_ALL_SUBSETS_UP_TO = 4
_ALTERNATIVES_SHOWN = 2
_MEGA = 1e6


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
    affordable = _Affordable(known, limit, rank)
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
        choices.append(
            prices.choice(targets, len(costs), at, sum(cost.fixed + at * cost.per_rank for cost in costs), capped)
        )
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


class _Cost(NamedTuple):
    """Parameters of one adapter, ``fixed + rank * per_rank``, and the full rank of its layer."""

    label: str
    fixed: int
    per_rank: int
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
    rows, columns = layer.adapter.matrix_shape(layer.module, layer.parameter)
    rows = sum(map(len, layer.spec.rows)) or rows
    per_rank = layer.adapter.stack(layer.module, layer.parameter) * (rows + columns)
    return _Cost(layer.label, layer.size - per_rank, per_rank, min(rows, columns))


def _group(layer: PlannedLayer) -> str:
    """Return the last part of a layer's name, which all blocks share; a number names nothing."""
    last = layer.label.rpartition(".")[2]
    return layer.label if last.isdigit() else last


class _Affordable(NamedTuple):
    """What a limit in parameters allows of groups of layers; a given rank allows itself, whatever it costs."""

    known: Mapping[str, Sequence[_Cost]]
    limit: int
    rank: int | None

    def costs(self, targets: Sequence[str]) -> list[_Cost]:
        return [cost for target in targets for cost in self.known[target]]

    def highest(self, targets: Sequence[str]) -> int:
        """Return the highest rank, whatever the sizes of the layers."""
        if self.rank is not None:
            return self.rank
        costs = self.costs(targets)
        return (self.limit - sum(cost.fixed for cost in costs)) // sum(cost.per_rank for cost in costs)

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
    return f"{size / _MEGA:,.1f}" if size >= _MEGA else f"{size / _MEGA:.3f}"


# --- the memory of a training step

_PARTS = ("weights", "gradients", "optimizer", "activations")
_CURES = {
    "weights": "a base in bfloat16 or quantized, or weights sharded over processes, would help most",
    "gradients": "a lower rank or fewer targets would help most",
    "optimizer": "a lower rank or an optimizer with less state would help most",
    "activations": "activation checkpointing would help most, then a smaller batch",
}


@dataclass(frozen=True)
class MemoryUse:
    """The bytes that one way of training takes.

    Attributes:
        weights: Parameters, including adapters, and buffers.
        gradients: Gradients of the trained parameters, each in its parameter's precision.
        optimizer: Optimizer state.
        activations: What autograd saves of one batch for the backward pass, including the batch where needed; None
            without a batch.
    """

    weights: int
    gradients: int
    optimizer: int
    activations: int | None

    @property
    def total(self) -> int:
        """Bytes of all parts. The peak of a step is slightly lower: activations are freed as gradients arrive."""
        return self.weights + self.gradients + self.optimizer + (self.activations or 0)


@dataclass(frozen=True)
class MemoryForecast:
    """The memory of a training step; ``print(forecast)`` shows a table.

    Attributes:
        lora: With the adapters.
        full: With full fine-tuning of the same model on the same batch.
    """

    lora: MemoryUse
    full: MemoryUse

    @property
    def verdict(self) -> str:
        """One sentence: which part dominates with LoRA, and what would reduce it."""
        use = self.lora
        part = max(_PARTS, key=lambda part: getattr(use, part) or 0)
        share = getattr(use, part) / use.total if use.total else 0.0
        verb = "dominates" if part == "optimizer" else "dominate"
        known = "" if use.activations is not None else " of what is known without a batch"
        return f"{part} {verb} ({share:.0%}{known}): {_CURES[part]}."

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, for JSON."""
        uses = {"lora": self.lora, "full": self.full}
        return {name: asdict(use) | {"total": use.total} for name, use in uses.items()} | {"verdict": self.verdict}

    @override
    def __str__(self) -> str:
        rows: list[tuple[str, ...]] = [("MB", "LoRA", "full fine-tuning")]
        for part in (*_PARTS, "total"):
            values = [getattr(use, part) for use in (self.lora, self.full)]
            rows.append((part, *("-" if value is None else f"{value / _MEGA:,.1f}" for value in values)))
        return "\n".join(["Memory of a training step:", *table_lines(rows), self.verdict])


def forecast_memory(
    module: nn.Module,
    config: LoRAConfig | None = None,
    batch: object = None,
    *,
    step: Callable[[nn.Module, Any], object] | None = None,
    bytes_per_state: int = ADAM_BYTES,
) -> MemoryForecast:
    """Return the memory of a training step with LoRA and with full fine-tuning; activations are measured on a batch.

    The model runs forward twice in training mode, without adapters and with them; they are removed again. Parameters,
    buffers, gradients, modes and the random state stay as they were. Temporary memory of operators is not counted, nor
    what a loss outside of ``step`` saves.

    Args:
        module: The model without adapters; it may be on the meta device, with a batch on it.
        config: Which layers to adapt; ``LoRAConfig()`` by default.
        batch: A batch of the size to train with: a tensor; a tuple or list, from which ``forward`` gets the arguments
            it requires; or a dict, from which it gets those it accepts. Without it activations are unknown.
        step: Called with the module and the batch in place of ``forward``, and returns a loss; for autocast or a
            ``training_step``.
        bytes_per_state: Bytes of optimizer state per trained parameter: 8 for Adam, 0 for SGD, 2 for 8-bit Adam.

    Raises:
        ValueError: The module is already adapted, the config does not fit it, or it has no forward.
        TypeError: The forward pass or the step returned no tensor with a gradient.
    """
    if AdaptedModel(module).layers:
        raise ValueError("forecast_memory needs the model without adapters: call it before attach, or detach first.")
    run = None if batch is None else _runner(module, batch, step)
    with _all_training(module):
        full = _use(module, run, bytes_per_state)
    attach(module, config or LoRAConfig())
    try:
        lora = _use(module, run, bytes_per_state)
    finally:
        detach(module)
    return MemoryForecast(lora, full)


@contextmanager
def _all_training(module: nn.Module) -> Iterator[None]:
    """Let every parameter require a gradient temporarily, as full fine-tuning does."""
    before = [(parameter, parameter.requires_grad) for parameter in module.parameters()]
    try:
        for parameter, _ in before:
            parameter.requires_grad_(parameter.is_floating_point())
        yield
    finally:
        for parameter, required in before:
            parameter.requires_grad_(required)


def _use(module: nn.Module, run: Callable[[], object] | None, bytes_per_state: int) -> MemoryUse:
    weights = _storages([*module.parameters(), *module.buffers()])
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    activations = None
    if run is not None:
        with left_as_it_was(module), RandomState():
            module.train()
            activations = _saved_bytes(run, weights)
    stored = sum(storage.nbytes() for storage in weights.values())
    elements = sum(parameter.numel() for parameter in trained)
    return MemoryUse(stored, sum(p.nbytes for p in trained), elements * bytes_per_state, activations)


def _runner(module: nn.Module, batch: object, step: Callable[[nn.Module, Any], object] | None) -> Callable[[], object]:
    if step is None and getattr(module.forward, "__name__", "") == "_forward_unimplemented":
        raise ValueError(f"{type(module).__name__} has no forward to run a batch through. Pass step.")

    def run() -> list[Tensor]:
        args, kwargs = arguments_for(module, batch) if step is None else ((), {})
        found = list(tensors_in(module(*args, **kwargs) if step is None else step(module, batch)))
        if not any(tensor.requires_grad for tensor in found):
            what = type(module).__name__ if step is None else "step"
            raise TypeError(f"forecast_memory: {what} returned no tensor with a gradient, so nothing would train.")
        return found

    return run


# --- counting memory


def _storages(tensors: Iterable[Tensor]) -> dict[int, torch.UntypedStorage]:
    """Return the memory that tensors occupy, by its address; views of one another share theirs, and it counts once."""
    found = (inner.untyped_storage() for tensor in tensors for inner in _inner_tensors(tensor))
    return {storage._cdata: storage for storage in found}


def _saved_bytes(run: Callable[[], object], apart_from: Collection[int]) -> int:
    """Return the bytes that autograd saves for the backward pass of a computation, which does not run.

    Whatever checkpointing recomputes is not saved, and not counted; nor is the memory at the addresses ``apart_from``.
    """
    kept: dict[int, torch.UntypedStorage] = {}  # alive, so that no address is used again meanwhile

    def pack(tensor: Tensor) -> Tensor:
        kept.update(_storages([tensor]))
        return tensor

    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        run()
    return sum(storage.nbytes() for address, storage in kept.items() if address not in apart_from)


def _inner_tensors(tensor: Tensor) -> Iterator[Tensor]:
    """Yield the tensors that hold the values; a packed weight wraps several."""
    wrapper = cast(Any, tensor)
    if not is_traceable_wrapper_subclass(wrapper):
        yield tensor
        return
    for name in wrapper.__tensor_flatten__()[0]:
        yield from _inner_tensors(getattr(wrapper, name))
