"""Ranks under a budget: against exhaustive search and EVA's rule, and budgets as a user writes them."""

from __future__ import annotations

from collections import Counter
from itertools import product

import pytest
import torch

from lightning_lora.option_checks import parse_budget
from lightning_lora.ranks.allocation import allocate

SPECTRA = {"a": [9.0, 4.0, 1.0], "b": [8.0, 7.0, 0.5], "c": [2.0, 1.0, 0.0]}
COSTS = {"a": 10, "b": 20, "c": 5}


def spent(ranks: dict[str, int], costs: dict[str, int] = COSTS) -> int:
    return sum(costs[name] * rank for name, rank in ranks.items())


def test_most_valuable_directions_per_parameter_come_first():
    # Per parameter: a .9 .4 .1, b .4 .35 .025, c .4 .2 0.
    order = ["a", "a", "b", "c", "b", "c", "a", "b"]
    for count in range(len(order) + 1):
        expected = {name: order[:count].count(name) for name in SPECTRA}
        assert allocate(SPECTRA, COSTS, spent(expected), at_least=0) == expected


def test_two_cheap_directions_come_before_an_expensive_one():
    ranks = allocate({"wide": [3.0], "narrow": [2.0, 2.0]}, {"wide": 20, "narrow": 10}, 20, at_least=0)
    assert ranks == {"wide": 0, "narrow": 2}


def test_directions_without_value_are_not_taken():
    assert allocate(SPECTRA, COSTS, 10**6, at_least=0) == {"a": 3, "b": 3, "c": 2}


@pytest.mark.parametrize("budget", range(35, 120, 5))
def test_budget_is_never_exceeded_and_nothing_that_fits_is_left_out(budget: int):
    ranks = allocate(SPECTRA, COSTS, budget)
    left = budget - spent(ranks)
    assert left >= 0
    for name, values in SPECTRA.items():
        assert ranks[name] >= 1
        assert ranks[name] == len(values) or values[ranks[name]] == 0 or COSTS[name] > left


@pytest.mark.parametrize("budget", range(9))
def test_with_equal_costs_no_other_ranks_hold_more_value(budget: int):
    def value(ranks: dict[str, int]) -> float:
        return sum(sum(SPECTRA[name][:rank]) for name, rank in ranks.items())

    ones = dict.fromkeys(SPECTRA, 1)
    every = (dict(zip(SPECTRA, ranks, strict=True)) for ranks in product(range(4), repeat=3))
    best = max(value(ranks) for ranks in every if sum(ranks.values()) <= budget)
    assert value(allocate(SPECTRA, ones, budget, at_least=0)) == best


def test_equal_costs_and_variance_ratios_are_the_redistribution_of_eva(rng):
    rank, rho = 4, 2
    spectra = {f"layer{i}": torch.rand(20, generator=rng).sort(descending=True).values for i in range(6)}
    pooled = [(float(value), name) for name, values in spectra.items() for value in values[: rho * rank]]
    expected = Counter(name for _, name in sorted(pooled, reverse=True)[: rank * len(spectra)])
    found = allocate(spectra, dict.fromkeys(spectra, 1), rank * len(spectra), at_least=0, at_most=rho * rank)
    assert found == {name: expected[name] for name in spectra}


def test_equals_are_taken_by_name_whatever_the_order():
    names = ["b", "a", "c"]
    ranks = allocate({name: [1.0, 1.0] for name in names}, dict.fromkeys(names, 1), 3, at_least=0)
    assert ranks == {"a": 2, "b": 1, "c": 0}
    assert list(ranks) == names


def test_ranks_stay_within_their_limits():
    assert allocate(SPECTRA, COSTS, 10**6, at_least=1, at_most=2) == {"a": 2, "b": 2, "c": 2}
    assert allocate(SPECTRA, COSTS, 70, at_least=2, at_most=2) == {"a": 2, "b": 2, "c": 2}
    assert allocate(SPECTRA, COSTS, 105, at_least=3) == {"a": 3, "b": 3, "c": 3}


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"budget": 34}, "Rank 1 in each of 3 layers needs 35 parameters, and the budget is 34"),
        ({"at_least": 4}, "'a' has 3 directions, and at_least=4 asks for more"),
        ({"at_least": 3, "at_most": 2}, "at_most=2 is below at_least=3"),
        ({"spectra": SPECTRA | {"b": [1.0, 2.0]}}, "'b' must be finite and in descending order"),
        ({"spectra": SPECTRA | {"b": [2.0, float("nan")]}}, "'b' must be finite and in descending order"),
    ],
)
def test_what_cannot_be_allocated_is_refused(options: dict, match: str):
    with pytest.raises(ValueError, match=match):
        allocate(**{"spectra": SPECTRA, "costs": COSTS, "budget": 1000, **options})


# --- budgets


@pytest.mark.parametrize(
    ("text", "parameters"),
    [
        (1, 1),
        (250_000, 250_000),
        ("250000", 250_000),
        ("1%", 70_000),
        ("0.5 %", 35_000),
        (".1%", 7_000),
        ("20MB", 5_000_000),
        ("20 mb", 5_000_000),
        ("1.5GB", 375_000_000),
        ("1KiB", 256),
        ("6B", 1),
    ],
)
def test_budget_is_read(text: int | str, parameters: int):
    assert parse_budget(text, base_parameters=7_000_000) == parameters


@pytest.mark.parametrize(
    "text", ["", "x", "1 x", "%", "1%%", "-1", "1e6", "20 TB", "20ib", "1,000", "MB", 1.5, True, None]
)
def test_budget_that_is_none_is_refused(text: object):
    with pytest.raises(ValueError, match=r"rank_budget=.* is not a budget: give a whole number"):
        parse_budget(text, base_parameters=7_000_000)


@pytest.mark.parametrize("text", [0, -5, "0", "0%", "0.000001%", "3B", "0MB"])
def test_budget_below_one_parameter_is_refused(text: int | str):
    with pytest.raises(ValueError, match=r"rank_budget=.* is less than one parameter"):
        parse_budget(text, base_parameters=7_000_000)
