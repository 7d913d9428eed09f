"""Settings that are allowed but rarely meant: rates, scalings and targets with which LoRA learns little or diverges."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from torch import nn
from torch.optim import Optimizer

from lightning_lora.layers import LoRALayer, LowRankAdapter, adapter_type, all_adapters
from lightning_lora.names import listed

# Full fine-tuning of large models runs below it, and LoRA wants about ten times those rates.
LOWEST_RATE = 5e-5
# The default is 2. Published set-ups lie from 0.25 (alpha 16, rank 64) to 32 (alpha 32, rank 1).
LOWEST_SCALING, HIGHEST_SCALING = 0.1, 32.0
HIGHEST_RATIO = 64.0  # LoRA+ recommends about 16
# The query and value projections of a model with grouped queries are 9 % of its linear layers.
SMALLEST_SHARE = 0.05
_RATES = ("lr", "initial_lr", "max_lr")  # of a group: while a schedule warms up, the first is no measure


class Coverage(NamedTuple):
    """How much of the weights that could carry adapters trains.

    Attributes:
        trained: Elements of the weights that carry an adapter or train in full.
        total: Elements of all weights that could carry one; embeddings are not counted, which rarely should.
        rest: Kinds of layers that have no adapter, those with most elements first.
    """

    trained: int
    total: int
    rest: tuple[str, ...]


def questionable_settings(
    module: nn.Module, optimizers: Sequence[Optimizer], schedulers: Iterable[object], lr_ratio: float, reach: Coverage
) -> str | None:
    """Return what looks wrong about the settings of a run, with the numbers and what to do, or None.

    Args:
        module: The adapted module.
        optimizers: Its optimizers, before the first step.
        schedulers: Their learning rate schedulers: what counts is the highest rate that is known.
        lr_ratio: Learning rate of ``B`` over that of ``A``.
        reach: What ``coverage`` found before the module was wrapped.

    Source:
        Schulman et al. 2025, "LoRA Without Regret" (rate, layers); Hayou et al. 2024, arXiv:2402.12354 (ratio);
        Kalajdzievski 2023, arXiv:2312.03732 (scaling and rank).
    """
    found = [*_rates(module, optimizers, list(schedulers)), *_scalings(module), *_ratio(lr_ratio), *_targets(reach)]
    if not found:
        return None
    return "LoRA: this run may learn little, or diverge:\n" + "\n".join(f"  - {each}" for each in found)


def coverage(module: nn.Module) -> Coverage:
    """Return how much of the weights that could carry adapters trains; nothing if there is no low-rank adapter."""
    if not any(isinstance(adapter, LowRankAdapter) for adapter in all_adapters(module).values()):
        return Coverage(0, 0, ())
    embeddings = {id(part._parameters.get("weight")) for part in module.modules() if isinstance(part, nn.Embedding)}
    trained, rest = 0, dict[str, int]()
    for part in module.modules():
        for name, size in _weights(part):
            parameter = part._parameters.get(name)
            if parameter is not None and id(parameter) in embeddings:
                continue
            if isinstance(part, LoRALayer) or (parameter is not None and parameter.requires_grad):
                trained += size
            else:
                rest[type(part).__name__] = rest.get(type(part).__name__, 0) + size
    return Coverage(trained, trained + sum(rest.values()), tuple(sorted(rest, key=lambda kind: -rest[kind])))


def _weights(part: nn.Module) -> Iterator[tuple[str, int]]:
    """Yield the names and sizes of the weights of one module that carry an adapter or could."""
    if isinstance(part, LoRALayer):
        adapters = [adapter for adapter in part.adapters().values() if isinstance(adapter, LowRankAdapter)]
        for name, adapter in {adapter.parameter: adapter for adapter in adapters}.items():
            yield name, math.prod(adapter.matrix_shape(part, name)) * adapter.stack(part, name)
        return
    kind = adapter_type(part)
    if kind is not None and not isinstance(part, (nn.Embedding, nn.EmbeddingBag)):
        for name in kind.parameters_of(part):
            yield name, math.prod(kind.matrix_shape(part, name))


def _rates(module: nn.Module, optimizers: Sequence[Optimizer], schedulers: list[Any]) -> Iterator[str]:
    factors = {id(parameter) for adapter in all_adapters(module).values() for parameter in adapter.parameters()}
    for optimizer in optimizers:
        kind = type(optimizer).__name__
        groups = [group for group in optimizer.param_groups if any(id(p) in factors for p in group["params"])]
        rates = [rate for group in groups for rate in _numbers(group.get(key) for key in _RATES)]
        if rates:
            rates += [rate for each in schedulers for rate in _peaks(each, optimizer)]
        if "adam" in kind.lower() and 0 < max(rates, default=0.0) < LOWEST_RATE:
            yield (
                f"the learning rate of {max(rates):g} ({kind}) looks like one of full fine-tuning. LoRA wants about "
                f"ten times such a rate: try {max(10 * max(rates), 2 * LOWEST_RATE):g}, or 2e-4 for a language model."
            )


def _peaks(scheduler: Any, optimizer: Optimizer) -> list[float]:
    """Return the rates that a scheduler will reach, where it says so."""
    inner = [rate for each in getattr(scheduler, "_schedulers", ()) for rate in _peaks(each, optimizer)]
    if getattr(scheduler, "optimizer", None) is not optimizer:
        return inner
    return inner + _numbers(rate for key in ("base_lrs", "max_lrs") for rate in getattr(scheduler, key, None) or ())


def _numbers(values: Iterable[Any]) -> list[float]:
    return [float(value) for value in values if value is not None]


def _scalings(module: nn.Module) -> Iterator[str]:
    extreme: dict[tuple[float, int], list[str]] = {}
    for name, adapter in all_adapters(module).items():
        scaling = adapter.spec.scaling
        if isinstance(adapter, LowRankAdapter) and not LOWEST_SCALING <= scaling <= HIGHEST_SCALING:
            extreme.setdefault((scaling, adapter.spec.rank), []).append(name)
    for (scaling, rank), names in extreme.items():
        how, cure = ("small", "Raise") if scaling < LOWEST_SCALING else ("large", "Lower")
        yield (
            f"the scaling of {scaling:g} at rank {rank} of {listed(names)} is {how}: 1 to 4 is usual. {cure} alpha, "
            "which is divided by the rank, or with use_rslora=True by its root."
        )


def _ratio(lr_ratio: float) -> Iterator[str]:
    if not 1.0 <= lr_ratio <= HIGHEST_RATIO:
        how = "slower than A" if lr_ratio < 1.0 else "much faster than A"
        yield f"lr_ratio={lr_ratio:g} trains B {how}: LoRA+ recommends about 16, and 1 is plain LoRA."


def _targets(reach: Coverage) -> Iterator[str]:
    if reach.trained < SMALLEST_SHARE * reach.total:
        yield (
            f"the adapters reach {reach.trained / reach.total:.1%} of the weights that could carry one; most of the "
            f"rest are in {listed(reach.rest, 2)} layers. Adapting all kinds of layers does better at the same size: "
            "add them to target_modules."
        )
