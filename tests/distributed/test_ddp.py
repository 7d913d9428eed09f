"""Two DDP processes equal one process on the joined batch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed import ddp_job
from tests.processes import run
from tests.trainer.test_checkpoints import assert_same_bits, read

pytestmark = pytest.mark.distributed

ADAPTER = {f"net.{layer}.lora.{factor}" for layer in (0, 2, 4) for factor in "AB"}


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Return the reports of two processes, one started by Lightning: a whole run, half a run and its resumption."""
    directory = tmp_path_factory.mktemp("ddp")
    run(ddp_job.__file__, directory)
    return [torch.load(directory / f"rank{rank}.pt", weights_only=False) for rank in range(2)]


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Run the same training in this process, on the joined batches."""
    return ddp_job.fit(tmp_path_factory.mktemp("single"), "whole", 2, devices=1)


def test_ranks_stay_bit_identical(ranks: list[dict[str, Any]]) -> None:
    first, second = (rank["whole"] for rank in ranks)
    assert_same_bits(first["start"], second["start"])
    assert_same_bits(first["state"], second["state"])
    assert first["losses"] != second["losses"]  # they see different data


def test_initial_values_do_not_depend_on_world_size(ranks: list[dict[str, Any]], single: dict[str, Any]) -> None:
    assert_same_bits(ranks[0]["whole"]["start"], single["start"])


def test_two_processes_match_one(ranks: list[dict[str, Any]], single: dict[str, Any]) -> None:
    both = ranks[0]["whole"]["state"]
    assert any(both[name].any() for name in both if name.endswith("lora.B"))
    for name, value in single["state"].items():
        torch.testing.assert_close(both[name], value, rtol=0, atol=1e-10)


def test_only_adapter_gradients_are_synchronized(ranks: list[dict[str, Any]]) -> None:
    assert ranks[0]["whole"]["bucket_bytes"] == ranks[0]["whole"]["adapter_bytes"] > 0


def test_checkpoint_holds_only_adapter(ranks: list[dict[str, Any]]) -> None:
    assert set(read(ranks[0]["whole"]["last"])["state_dict"]) == ADAPTER


def test_resume_is_bit_exact(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        assert rank["half"]["losses"] + rank["resumed"]["losses"] == rank["whole"]["losses"]
        assert len(rank["whole"]["losses"]) == 4
        assert_same_bits(rank["resumed"]["state"], rank["whole"]["state"])
    whole, resumed = read(ranks[0]["whole"]["last"]), read(ranks[0]["resumed"]["last"])
    for key in ("state_dict", "optimizer_states", "lr_schedulers", "global_step"):
        assert_same_bits(resumed[key], whole[key])


def test_checkpoint_resumes_in_one_process(ranks: list[dict[str, Any]], tmp_path: Path) -> None:
    resumed = ddp_job.fit(tmp_path, "resumed", 2, ranks[0]["half"]["last"], devices=1)
    for name, value in ranks[0]["whole"]["state"].items():
        torch.testing.assert_close(resumed["state"][name], value, rtol=0, atol=1e-10)
