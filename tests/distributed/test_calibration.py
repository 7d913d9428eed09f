"""Calibration on several processes with different data is that of one process with all data."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.distributed import calibration_job
from tests.distributed.calibration_job import (
    RANKS,
    STARTS,
    all_batches,
    branching,
    calibrated,
    fit,
    losses,
    share,
    with_attention,
)
from tests.processes import run_ranks

STATES = (*STARTS, "attention", "shared inputs", "inputs shared by some", "ranks", "fit", "fit with ranks")


@pytest.fixture(scope="module", params=[2, 3])
def results(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each process found."""
    folder = tmp_path_factory.mktemp("calibration")
    run_ranks(request.param, calibration_job.__file__, folder)
    return [torch.load(folder / f"{rank}.pt") for rank in range(request.param)]


def test_all_processes_have_the_same_bits(results: list[dict[str, Any]]):
    first, *others = results
    for other in others:
        for what in STATES:
            state = first[what]
            assert state.keys() == other[what].keys()
            assert all(torch.equal(tensor, other[what][name]) for name, tensor in state.items())


@pytest.mark.parametrize("strategy", ["fsdp1", "fsdp2"])
def test_a_start_from_weights_trains_under_sharding_as_on_one_process(strategy: str, results: list[dict[str, Any]]):
    expected = losses("auto", "pissa")
    assert len(set(expected)) == 4
    assert results[0][strategy] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("start", STARTS)
def test_unequal_shares_give_the_start_of_all_data(start: str, results: list[dict[str, Any]]):
    expected = calibrated(all_batches(), init=start)
    assert expected.keys() == results[0][start].keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(results[0][start][name], tensor, rtol=1e-5, atol=1e-6)


def test_a_process_without_batches_gets_the_start_of_the_others(results: list[dict[str, Any]]):
    expected = with_attention([batch for rank in range(1, len(results)) for batch in share(rank, len(results))])
    for name, tensor in expected.items():
        torch.testing.assert_close(results[0]["attention"][name], tensor, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("what", ["shared inputs", "inputs shared by some"])
def test_layers_with_the_same_input_get_the_start_of_all_data(what: str, results: list[dict[str, Any]]):
    for name, tensor in branching(all_batches(), apart=True).items():
        torch.testing.assert_close(results[0][what][name], tensor, rtol=1e-5, atol=1e-6)


def test_unequal_shares_give_the_ranks_of_all_data(results: list[dict[str, Any]]):
    expected = calibrated(all_batches(), **RANKS)
    assert {name: tensor.shape for name, tensor in expected.items()} == {
        name: tensor.shape for name, tensor in results[0]["ranks"].items()
    }


@pytest.mark.parametrize(("what", "options"), [("fit", {"init": "eva"}), ("fit with ranks", RANKS)])
def test_a_fit_under_ddp_starts_like_a_fit_of_one_process(
    what: str, options: dict[str, Any], results: list[dict[str, Any]]
):
    expected = fit("auto", **options)
    for name, tensor in expected.items():
        torch.testing.assert_close(results[0][what][name], tensor, rtol=1e-5, atol=1e-6)
