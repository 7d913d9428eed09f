"""The options of a rank schedule, and the budget over a training."""

from __future__ import annotations

import re
from typing import Any

import pytest

from lightning_lora import LoRACallback, LoRAConfig
from lightning_lora.ranks.schedule import Plan, RankSchedule, as_schedule


def plan(total: int = 100, **options: Any) -> Plan:
    return Plan.of(RankSchedule(**options), total, full=1000, budget=200)


def test_budget_falls_by_the_cubic_curve_of_adalora() -> None:
    found = plan(warmup=0.1, until=0.7)
    for step in range(101):
        share = min(1.0, max(0.0, (step - 10) / 60))
        assert found.budget_at(step) == pytest.approx(200 + 800 * (1 - share) ** 3, abs=1)
    assert found.budget_at(70) == found.budget_at(100) == 200


def test_events_come_regularly_and_the_last_one_when_the_ranks_are_final() -> None:
    found = plan(warmup=0.1, until=0.7, every=0.08)
    events = [step for step in range(101) if found.is_event(step)]
    assert events == [18, 26, 34, 42, 50, 58, 66, 70]
    for step in range(101):
        assert found.next_event(step) == next((event for event in events if event > step), None)


@pytest.mark.parametrize("total", [2, 3, 7, 19, 1000])
def test_every_training_that_has_a_plan_reaches_the_final_budget(total: int) -> None:
    found = plan(total)
    assert found.is_event(found.last)
    assert found.last <= total
    assert found.budget_at(found.last) == 200


def test_a_training_of_one_step_is_too_short() -> None:
    with pytest.raises(ValueError, match=r"a training of 1 steps is too short for it: with warmup=0.6 and until=0.9"):
        plan(1, warmup=0.6, until=0.9)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"every": 0.0}, "every must be above 0 and warmup below until"),
        ({"warmup": 0.7}, "every must be above 0 and warmup below until"),
        ({"until": 1.5}, "LoRACallback.rank_schedule.until is a share of the training, from 0 to 1; got 1.5"),
        ({"max_rank": 0}, "LoRACallback.rank_schedule.max_rank must be >= 1, got 0"),
        ({"max_rank": 2, "min_rank": 3}, "min_rank=3 is above max_rank=2"),
        ({"score": "loss"}, "rank_schedule.score='loss' is unknown; choose one of 'gate', 'adalora', 'energy'"),
        ({"kind": "linear"}, "rank_schedule.kind='linear' is unknown"),
        ({"regrow": True, "score": "energy"}, "regrow=True needs score='gate', got score='energy'"),
        ({"budget": "much"}, "rank_schedule.budget: rank_budget='much' is not a budget"),
    ],
)
def test_invalid_values_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        as_schedule(options)


@pytest.mark.parametrize("value", [3, True, ["cubic"]])
def test_other_types_are_named(value: Any) -> None:
    with pytest.raises(TypeError, match=r"LoRACallback.rank_schedule must be 'cubic', a mapping with options, or None"):
        LoRACallback(rank_schedule=value)


def test_unknown_options_get_the_nearest_name() -> None:
    with pytest.raises(TypeError, match=r"no option 'max_ranks'. Did you mean 'max_rank'"):
        LoRACallback(rank_schedule={"max_ranks": 3})


@pytest.mark.parametrize("use_rslora", [False, True])
def test_layers_start_with_more_rank_and_the_scaling_of_their_own(use_rslora: bool) -> None:
    config = LoRAConfig(rank=4, alpha=8.0, alpha_pattern={"head": 2.0}, use_rslora=use_rslora)
    wide = RankSchedule(max_rank=16).widened(config)
    assert wide.rank == 16
    assert wide.scaling(16, wide.alpha) == pytest.approx(config.scaling(4, 8.0))
    assert wide.scaling(16, wide.alpha_pattern["head"]) == pytest.approx(config.scaling(4, 2.0))
    assert RankSchedule().widened(config).rank == 8


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank_pattern": {"head": 2}}, "so does rank_pattern={'head': 2}"),
        ({"rank": "auto", "rank_budget": "1%", "init": "eva"}, "so does ranks from data"),
        ({"init": {"name": "eva", "rho": 2.0}}, "so does ranks from data"),
        ({"init": "pissa"}, "does not go with init='pissa', whose update is a difference"),
        ({"rank": 32}, "max_rank=32 leaves nothing to decide with rank=32"),
    ],
)
def test_options_that_decide_the_ranks_as_well_are_refused_at_once(options: dict[str, Any], message: str) -> None:
    schedule = {"max_rank": 32} if options.get("rank") == 32 else "cubic"
    with pytest.raises(ValueError, match=re.escape(message)):
        LoRACallback(rank_schedule=schedule, **options)
