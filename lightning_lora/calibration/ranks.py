"""Ranks per layer under a budget, from what each direction of each layer is worth."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from torch import Tensor


def allocate(
    spectra: Mapping[str, Sequence[float] | Tensor],
    costs: Mapping[str, int],
    budget: int,
    *,
    at_least: int = 1,
    at_most: int | None = None,
) -> dict[str, int]:
    """Return the ranks that take the most valuable directions of all layers for their number of parameters.

    Each layer first gets ``at_least``. The other directions are taken in the order of value per parameter, as long as
    the budget has room for them, equals by the names of their layers. A direction without value is not taken.

    With shares of variance as values, ``costs`` of 1, the sum of the ranks as budget and ``at_least=0``, this is the
    redistribution of EVA; its ``rho`` is ``at_most / rank``.

    Args:
        spectra: By name of the layer, the values of its directions in descending order. Values of different layers must
            be comparable.
        costs: By name, the parameters of one rank: ``out + in`` of a linear layer.
        budget: Parameters in all.
        at_least: Smallest rank; with 0, layers may go without an adapter.
        at_most: Largest rank; None for as many directions as a layer has.

    Returns:
        The rank of each layer, in the order of ``spectra``.

    Raises:
        ValueError: The budget does not suffice for ``at_least``, a layer has fewer directions, or values are not finite
            or not in descending order.

    Source:
        Paischer et al. 2024, arXiv:2410.07170, section 3.3, where every rank costs the same.
    """
    found = {name: [float(value) for value in values] for name, values in spectra.items()}
    _check(found, costs, budget, at_least, at_most)
    ranks = dict.fromkeys(found, at_least)
    left = budget - sum(at_least * costs[name] for name in found)
    candidates = [
        (-value / costs[name], name)
        for name, values in found.items()
        for value in values[at_least:at_most]
        if value > 0
    ]
    for _, name in sorted(candidates):
        if costs[name] <= left:  # if not, no later direction of this layer fits either
            ranks[name] += 1
            left -= costs[name]
    return ranks


def _check(
    spectra: Mapping[str, list[float]], costs: Mapping[str, int], budget: int, at_least: int, at_most: int | None
) -> None:
    if at_most is not None and at_most < at_least:
        raise ValueError(f"at_most={at_most!r} is below at_least={at_least!r}.")
    for name, values in spectra.items():
        if not all(map(math.isfinite, values)) or values != sorted(values, reverse=True):
            raise ValueError(f"The values of {name!r} must be finite and in descending order.")
        if len(values) < at_least:
            raise ValueError(f"{name!r} has {len(values)} directions, and at_least={at_least!r} asks for more.")
    needed = sum(at_least * costs[name] for name in spectra)
    if needed > budget:
        raise ValueError(
            f"Rank {at_least} in each of {len(spectra)} layers needs {needed:,} parameters, and the budget is "
            f"{budget:,}. Raise rank_budget or adapt fewer layers."
        )
