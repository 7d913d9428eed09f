"""Two machines with two processes each, played by two ``torchrun`` on one, as the README says."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed import deepspeed_job, nodes_job, strategy_job
from tests.distributed.ports import free_port

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

ROOT = Path(__file__).parents[2]
EACH = 2  # processes
MODES = ["ddp", "fsdp1_policy", "fsdp2", "tp", "tp_fsdp2"]
STAGES = list(nodes_job.STAGES) if importlib.util.find_spec("deepspeed") else []

Report = dict[str, Any]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("nodes")


@pytest.fixture(scope="module")
def whole(directory: Path) -> Report:
    """What one process does."""
    return strategy_job.fit(directory, "whole", "single", 1, 2)


@pytest.fixture(scope="module")
def whole_in_float(directory: Path) -> Report:
    """What one process does in float32, as DeepSpeed."""
    return deepspeed_job.fit(directory / "float", "whole", "single", 2)


@pytest.fixture(scope="module")
def nodes(directory: Path) -> list[Report]:
    """What each process reports of resuming a single process's checkpoint, in every mode."""
    half = strategy_job.fit(directory, "half", "single", 1, 1)["last"]
    half_in_float = deepspeed_job.fit(directory / "float", "half", "single", 1)["last"]
    python_path = os.pathsep.join([str(ROOT), *sys.path])
    environment = os.environ | {"PYTHONPATH": python_path, "OMP_NUM_THREADS": "1"}
    torchrun = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--nnodes", "2"]
    torchrun += ["--nproc-per-node", str(EACH), "--master-addr", "127.0.0.1", "--master-port", str(free_port())]
    job = [nodes_job.__file__, str(directory), half, half_in_float, *MODES, *STAGES]
    machines = [
        subprocess.Popen(
            [*torchrun, "--node-rank", str(rank), *job], env=environment, stderr=subprocess.PIPE, text=True
        )
        for rank in range(2)
    ]
    errors = [machine.communicate(timeout=300)[1] for machine in machines]
    assert [machine.returncode for machine in machines] == [0, 0], errors
    return [torch.load(directory / f"rank{rank}.pt", weights_only=False) for rank in range(2 * EACH)]


def assert_equal_to_one_process(reports: list[Report], whole: Report, tolerance: float) -> None:
    losses = torch.tensor([report["losses"] for report in reports], dtype=torch.float64)
    assert losses.mean(0).tolist() == pytest.approx(whole["losses"][2:], abs=tolerance)
    for report in reports:
        torch.testing.assert_close(report["output"], whole["output"], rtol=0.0, atol=tolerance)
        assert Path(report["last"]).is_file()


@pytest.mark.parametrize("mode", MODES)
def test_two_machines_train_as_one_process(mode: str, nodes: list[Report], whole: Report) -> None:
    reports = [report[mode] for report in nodes]
    assert_equal_to_one_process(reports, whole, 1e-9)
    shares = {"tp": 1, "tp_fsdp2": 2}.get(mode, 2 * EACH)  # of the rows, which processes see
    assert len({tuple(report["losses"]) for report in reports}) == shares


@pytest.mark.parametrize("mode", STAGES)
def test_two_machines_train_as_one_process_under_deepspeed(
    mode: str, nodes: list[Report], whole_in_float: Report
) -> None:
    assert_equal_to_one_process([report[mode] for report in nodes], whole_in_float, 1e-5)
