"""Two processes with ``pytorch_lightning`` give the numbers of ``lightning.pytorch``."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed import other_name_job, strategy_job
from tests.distributed.test_every_strategy import TRAINED, losses
from tests.processes import ROOT, free_port
from tests.trainer.test_checkpoints import read

pytest.importorskip("pytorch_lightning")
pytestmark = [pytest.mark.distributed, pytest.mark.slow]

MODES = ["ddp", "fsdp1_policy", "fsdp2"]
Runs = dict[str, list[dict[str, Any]]]

each_mode = pytest.mark.parametrize("mode", MODES)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("other_name")


@pytest.fixture(scope="module")
def single(directory: Path) -> dict[str, Any]:
    """Train in one process with ``lightning.pytorch``: the whole run, and half of it."""
    return {
        name: strategy_job.fit(directory, name, "single", 1, epochs) for name, epochs in (("whole", 2), ("half", 1))
    }


@pytest.fixture(scope="module")
def runs(directory: Path, single: dict[str, Any]) -> Runs:
    place = directory / "two"
    place.mkdir()
    # New interpreters, because forked processes have imported the usual name.
    command = [sys.executable, other_name_job.__file__, str(place), "2", single["half"]["last"], *MODES]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "MASTER_PORT": str(free_port())}
    process = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert process.returncode == 0, process.stdout[-5000:] + process.stderr[-5000:]
    ranks = [torch.load(place / f"rank{rank}.pt", weights_only=False) for rank in range(2)]
    return {mode: [rank[mode] for rank in ranks] for mode in MODES}


@each_mode
def test_trainer_comes_from_pytorch_lightning(mode: str, runs: Runs) -> None:
    assert {rank["Trainer"] for rank in runs[mode]} == {"pytorch_lightning.trainer.trainer"}


@each_mode
def test_losses_match_lightning_pytorch(mode: str, runs: Runs, single: dict[str, Any]) -> None:
    assert losses(runs[mode], "whole") == pytest.approx(single["whole"]["losses"], abs=1e-9)


@each_mode
def test_resumes_checkpoint_of_lightning_pytorch(mode: str, runs: Runs, single: dict[str, Any]) -> None:
    assert losses(runs[mode], "from single") == pytest.approx(single["whole"]["losses"][2:], abs=1e-9)


@each_mode
def test_checkpoint_holds_only_adapter(mode: str, runs: Runs) -> None:
    assert set(read(runs[mode][0]["whole"]["last"])["state_dict"]) == TRAINED
