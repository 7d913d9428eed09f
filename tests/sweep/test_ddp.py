"""A sweep under DDP: processes agree, and every adapter ends as on one device."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.processes import run_ranks
from tests.sweep.ddp_job import fit

pytestmark = [pytest.mark.distributed, pytest.mark.filterwarnings("ignore:LoRASweep.*diverged")]
CLOSE = 1e-9  # in float64; two processes add in another order


def distance(found: dict[str, Any], expected: dict[str, Any]) -> float:
    return max(
        float((found[name][key] - each).norm() / each.norm().clamp_min(1e-12))
        for name, own in expected.items()
        for key, each in own.items()
        if name != "wild"
    )


def test_two_processes_train_stop_and_resume_as_one_does(tmp_path: Path):
    run_ranks(2, Path(__file__).parent / "ddp_job.py", tmp_path)
    zero, one = (torch.load(tmp_path / f"found{rank}.pt", weights_only=False) for rank in range(2))
    expected = fit(tmp_path / "single", "loop", 1)
    assert [why for _, _, why in expected["table"]].count("lost") == 3
    for run in ("vmap", "loop", "resumed"):
        assert zero[run]["table"] == one[run]["table"]
        assert {n: why for n, _, why in zero[run]["table"]} == {n: why for n, _, why in expected["table"]}
        assert zero[run]["best"] == expected["best"]
        assert all(
            torch.equal(each, one[run]["states"][name][key])
            for name, own in zero[run]["states"].items()
            for key, each in own.items()
            if name != "wild"
        )
        assert distance(zero[run]["states"], expected["states"]) < CLOSE
