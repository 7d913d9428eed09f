"""Two machines with one process each, played by two ``torchrun`` on one, as the README says."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed import nodes_job, strategy_job
from tests.distributed.ports import free_port

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

ROOT = Path(__file__).parents[2]
MODES = ["ddp", "fsdp1_policy", "fsdp2"]


@pytest.fixture(scope="module")
def nodes(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """What each machine reports of resuming a single process's checkpoint, and what one process would have done."""
    directory = tmp_path_factory.mktemp("nodes")
    half = strategy_job.fit(directory, "half", "single", 1, 1)
    whole = strategy_job.fit(directory, "whole", "single", 1, 2)
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    options = [
        "--nnodes",
        "2",
        "--nproc-per-node",
        "1",
        "--master-addr",
        "127.0.0.1",
        "--master-port",
        str(free_port()),
    ]
    script = [nodes_job.__file__, str(directory), half["last"], *MODES]
    machines = [
        subprocess.Popen(
            [
                sys.executable,
                "-W",
                "ignore",
                "-m",
                "torch.distributed.run",
                *options,
                "--node-rank",
                str(rank),
                *script,
            ],
            env=environment,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    errors = [machine.communicate(timeout=300)[1] for machine in machines]
    assert [machine.returncode for machine in machines] == [0, 0], errors
    return [torch.load(directory / f"rank{rank}.pt", weights_only=False) for rank in range(2)], whole


@pytest.mark.parametrize("mode", MODES)
def test_two_machines_train_as_one_process(mode: str, nodes: tuple[list[dict[str, Any]], dict[str, Any]]) -> None:
    reports, whole = nodes
    losses = torch.tensor([report[mode]["losses"] for report in reports], dtype=torch.float64)
    assert losses.mean(0).tolist() == pytest.approx(whole["losses"][2:], abs=1e-9)
    assert losses[0].tolist() != losses[1].tolist()
    for report in reports:
        torch.testing.assert_close(report[mode]["output"], whole["output"], rtol=0.0, atol=1e-9)
        assert Path(report[mode]["last"]).is_file()
