"""Two machines, simulated by processes on one, started as in ``docs/strategies.md``."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from tests.distributed import deepspeed_job, nodes_job, strategy_job
from tests.processes import Job, free_port, succeeded
from tests.trainer.test_checkpoints import read

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

PROCESSES = {"torchrun": 4, "slurm": 2}  # of both machines
MODES = {
    "torchrun": ["ddp", "fsdp1_policy", "fsdp2", "tp", "tp_fsdp2"],
    "slurm": ["ddp", "fsdp1_wrapped", "fsdp2", "tp"],
}
STAGES = list(nodes_job.STAGES) if importlib.util.find_spec("deepspeed") else []
SHARES = {"tp": 1, "tp_fsdp2": 2}  # of a batch's rows among processes; by default one each

Report = dict[str, Any]


class Single(NamedTuple):
    """Train in one process, and record the middle and the end."""

    half: str
    whole: Report


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory) -> Single:
    directory = tmp_path_factory.mktemp("single")
    half = strategy_job.fit(directory, "half", "single", 1, 1)["last"]
    return Single(half, strategy_job.fit(directory, "whole", "single", 1, 2))


@pytest.fixture(scope="module")
def single_in_float(tmp_path_factory: pytest.TempPathFactory) -> Single:
    """Train in one process in float32, like DeepSpeed."""
    directory = tmp_path_factory.mktemp("single_in_float")
    half = deepspeed_job.fit(directory, "half", "single", 1)["last"]
    return Single(half, deepspeed_job.fit(directory, "whole", "single", 2))


def by_torchrun(directory: Path, *arguments: object) -> list[Report]:
    meeting = ["--nnodes=2", "--nproc-per-node=2", "--master-addr=127.0.0.1", f"--master-port={free_port()}"]
    script = nodes_job.__file__
    return reports_of(
        directory, *(Job(script, *meeting, f"--node-rank={rank}", script, *arguments) for rank in range(2))
    )


def by_slurm(directory: Path, *arguments: object) -> list[Report]:
    """Set the variables of ``srun --nodes=2 --ntasks-per-node=1``, and a requeue command that logs its calls."""
    (directory / "bin").mkdir()
    (directory / "bin/scontrol").write_text(f'#!/bin/sh\necho "$@" >> {directory}/scontrol.txt\n')
    (directory / "bin/scontrol").chmod(0o755)
    job = {"SLURM_JOB_ID": "4711", "SLURM_JOB_NAME": "train", "SLURM_NODELIST": "127.0.0.1,127.0.0.1"}
    job |= {"SLURM_NNODES": "2", "SLURM_NTASKS": "2", "SLURM_NTASKS_PER_NODE": "1", "SLURM_LOCALID": "0"}
    job |= {"PATH": f"{directory}/bin:{os.environ['PATH']}", "MASTER_PORT": str(free_port())}
    tasks = [{"SLURM_NODEID": str(rank), "SLURM_PROCID": str(rank)} for rank in range(2)]
    return reports_of(directory, *(Job(nodes_job.__file__, *arguments, **job, **task) for task in tasks))


def reports_of(directory: Path, *machines: Job) -> list[Report]:
    """Wait for a job per machine, and return the reports of their processes."""
    succeeded(*machines)
    return [torch.load(file, weights_only=False) for file in sorted(directory.glob("rank*.pt"))]


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {starter: tmp_path_factory.mktemp(starter) for starter in MODES}


@pytest.fixture(scope="module")
def reports(single: Single, single_in_float: Single, places: dict[str, Path]) -> dict[str, list[Report]]:
    """Return the reports of processes that resume a single process's checkpoint, by launcher."""
    halves = [single.half, single_in_float.half]
    starters = {"torchrun": by_torchrun, "slurm": by_slurm}
    found = {
        name: start(places[name], places[name], *halves, *MODES[name], *STAGES) for name, start in starters.items()
    }
    assert {name: len(reports) for name, reports in found.items()} == PROCESSES
    return found


def losses(reports: list[Report], mode: str) -> torch.Tensor:
    """Return the losses of each process; their mean is the loss of the whole batch."""
    return torch.tensor([report[mode]["losses"] for report in reports], dtype=torch.float64)


def assert_equal_to_one_process(reports: list[Report], mode: str, whole: Report, tolerance: float) -> None:
    found = losses(reports, mode)
    assert found.mean(0).tolist() == pytest.approx(whole["losses"][2:], abs=tolerance)
    assert len(found.unique(dim=0)) == SHARES.get(mode, len(reports))
    for report in reports:
        torch.testing.assert_close(report[mode]["output"], whole["output"], rtol=0.0, atol=tolerance)
        assert Path(report[mode]["last"]).is_file()


@pytest.mark.parametrize(("starter", "mode"), [(starter, mode) for starter in MODES for mode in MODES[starter]])
def test_two_machines_match_one_process(
    starter: str, mode: str, reports: dict[str, list[Report]], single: Single
) -> None:
    assert_equal_to_one_process(reports[starter], mode, single.whole, 1e-9)


@pytest.mark.parametrize("mode", STAGES)
@pytest.mark.parametrize("starter", MODES)
def test_two_machines_match_one_process_under_deepspeed(
    starter: str, mode: str, reports: dict[str, list[Report]], single_in_float: Single
) -> None:
    assert_equal_to_one_process(reports[starter], mode, single_in_float.whole, 1e-5)


def test_requeued_slurm_job_continues(
    places: dict[str, Path], reports: dict[str, list[Report]], single: Single
) -> None:
    assert losses(reports["slurm"], "requeued").mean(0).tolist() == pytest.approx(single.whole["losses"], abs=1e-9)
    assert (places["slurm"] / "scontrol.txt").read_text() == "requeue 4711\n"
    expected = read(single.whole["last"])["state_dict"].keys()
    assert read(str(places["slurm"] / "hpc_ckpt_1.ckpt"))["state_dict"].keys() == expected
