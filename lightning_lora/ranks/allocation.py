"""Ranks per layer under a budget, from what each direction of each layer is worth."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace

from torch import Tensor

from lightning_lora.config import LoRAConfig


def allocate(
    spectra: Mapping[str, Sequence[float] | Tensor],
    costs: Mapping[str, int],
    budget: int,
    *,
    at_least: int | Mapping[str, int] = 1,
    at_most: int | None = None,
    takes_worthless: bool = False,
) -> dict[str, int]:
    """Return the ranks that take the most valuable directions of all layers for their number of parameters.

    Each layer first gets ``at_least``. The other directions are taken in the order of value per parameter, as long as
    the budget has room for them, equals by the names of their layers.

    With shares of variance as values, ``costs`` of 1, the sum of the ranks as budget and ``at_least=0``, this is the
    redistribution of EVA; its ``rho`` is ``at_most / rank``.

    Args:
        spectra: By name of the layer, the values of its directions in descending order. Values of different layers must
            be comparable.
        costs: By name, the parameters of one rank: ``out + in`` of a linear layer.
        budget: Parameters in all.
        at_least: Smallest rank, of all or by name; with 0, layers may go without an adapter.
        at_most: Largest rank; None for as many directions as a layer has.
        takes_worthless: Whether directions of no value are taken, too, after all others.

    Returns:
        The rank of each layer, in the order of ``spectra``.

    Raises:
        ValueError: The budget does not suffice for ``at_least``, a layer has fewer directions, or values are not finite
            or not in descending order.

    Source:
        Paischer et al. 2024, arXiv:2410.07170, section 3.3, where every rank costs the same.
    """
    found = {name: [float(value) for value in values] for name, values in spectra.items()}
    ranks = {name: at_least if isinstance(at_least, int) else at_least[name] for name in found}
    _check(found, costs, budget, ranks, at_most)
    left = budget - sum(rank * costs[name] for name, rank in ranks.items())
    candidates = [
        (-value / costs[name], name)
        for name, values in found.items()
        for value in values[ranks[name] : at_most]
        if value > 0 or takes_worthless
    ]
    for _, name in sorted(candidates):
        if costs[name] <= left:  # if not, no later direction of this layer fits either
            ranks[name] += 1
            left -= costs[name]
    return ranks


def with_ranks(config: LoRAConfig, uniform: int, ranks: Mapping[str, int], scalings: Mapping[str, float]) -> LoRAConfig:
    """Return a config with these ranks, in which a layer of rank 0 is left out.

    Args:
        config: The config.
        uniform: The rank that it says.
        ranks: Name of the adapter -> its rank.
        scalings: Name of the adapter -> its scaling, which stays as it is.
    """
    kept = {name: ranks[name] for name in sorted(ranks, key=lambda name: (-len(name), name)) if ranks[name]}
    alphas = {name: scalings[name] * (rank**0.5 if config.use_rslora else rank) for name, rank in kept.items()}
    return replace(
        config,
        rank=uniform,
        rank_budget=None,
        rank_pattern={**kept, **config.rank_pattern},
        alpha_pattern={**alphas, **config.alpha_pattern},
        exclude_modules=_excluding(config, [name for name, rank in ranks.items() if not rank]),
    )


def _check(
    spectra: Mapping[str, list[float]],
    costs: Mapping[str, int],
    budget: int,
    at_least: Mapping[str, int],
    at_most: int | None,
) -> None:
    for name, values in spectra.items():
        if at_most is not None and at_most < at_least[name]:
            raise ValueError(f"at_most={at_most!r} is below at_least={at_least[name]!r}.")
        if not all(map(math.isfinite, values)) or values != sorted(values, reverse=True):
            raise ValueError(f"The values of {name!r} must be finite and in descending order.")
        if len(values) < at_least[name]:
            raise ValueError(f"{name!r} has {len(values)} directions, and at_least={at_least[name]!r} asks for more.")
    needed = sum(at_least[name] * costs[name] for name in spectra)
    if needed > budget:
        raise ValueError(
            f"Rank {max(at_least.values())} in each of {len(spectra)} layers needs {needed:,} parameters, and the "
            f"budget is {budget:,}. Raise rank_budget or adapt fewer layers."
        )


def _excluding(config: LoRAConfig, names: list[str]) -> str | tuple[str, ...]:
    """Return ``exclude_modules`` with more modules, by their full names."""
    excluded = config.exclude_modules
    if not names:
        return excluded if isinstance(excluded, str) else tuple(excluded)
    return "|".join([f"({excluded})", *map(re.escape, names)]) if isinstance(excluded, str) else (*excluded, *names)
