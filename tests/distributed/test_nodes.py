"""Two machines, simulated by processes on one, started as in ``docs/strategies.md``."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from tests.distributed import deepspeed_job, nodes_job, strategy_job
from tests.distributed.ports import free_port
from tests.trainer.test_checkpoints import read

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

ROOT = Path(__file__).parents[2]
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


def run(directory: Path, commands: list[list[str]], environments: list[dict[str, str]], count: int) -> list[Report]:
    """Run a command per machine, and return the reports of their processes."""
    common = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path]), "OMP_NUM_THREADS": "1"}
    machines = [
        subprocess.Popen(command, env=common | environment, stderr=subprocess.PIPE, text=True)
        for command, environment in zip(commands, environments, strict=True)
    ]
    errors = [machine.communicate(timeout=300)[1] for machine in machines]
    assert [machine.returncode for machine in machines] == [0, 0], errors
    return [torch.load(directory / f"rank{rank}.pt", weights_only=False) for rank in range(count)]


def by_torchrun(directory: Path, script: list[str]) -> list[Report]:
    launcher = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "2"]
    meeting = ["--master-addr", "127.0.0.1", "--master-port", str(free_port())]
    commands = [[*launcher, *meeting, "--node-rank", str(rank), *script] for rank in range(2)]
    return run(directory, commands, [{}, {}], PROCESSES["torchrun"])


def by_slurm(directory: Path, script: list[str]) -> list[Report]:
    """Set the variables of ``srun --nodes=2 --ntasks-per-node=1``, and a requeue command that logs its calls."""
    (directory / "bin").mkdir()
    (directory / "bin/scontrol").write_text(f'#!/bin/sh\necho "$@" >> {directory}/scontrol.txt\n')
    (directory / "bin/scontrol").chmod(0o755)
    job = {"SLURM_JOB_ID": "4711", "SLURM_JOB_NAME": "train", "SLURM_NODELIST": "127.0.0.1,127.0.0.1"}
    job |= {"SLURM_NNODES": "2", "SLURM_NTASKS": "2", "SLURM_NTASKS_PER_NODE": "1", "SLURM_LOCALID": "0"}
    job |= {"PATH": f"{directory}/bin:{os.environ['PATH']}", "MASTER_PORT": str(free_port())}
    tasks = [job | {"SLURM_NODEID": str(rank), "SLURM_PROCID": str(rank)} for rank in range(2)]
    return run(directory, [[sys.executable, "-W", "ignore", *script]] * 2, tasks, PROCESSES["slurm"])


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {starter: tmp_path_factory.mktemp(starter) for starter in MODES}


@pytest.fixture(scope="module")
def reports(single: Single, single_in_float: Single, places: dict[str, Path]) -> dict[str, list[Report]]:
    """Return the reports of processes that resume a single process's checkpoint, by launcher."""
    halves = [single.half, single_in_float.half]
    starters = {"torchrun": by_torchrun, "slurm": by_slurm}
    return {
        name: start(places[name], [nodes_job.__file__, str(places[name]), *halves, *MODES[name], *STAGES])
        for name, start in starters.items()
    }


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
