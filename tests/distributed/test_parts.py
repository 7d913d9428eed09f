"""Processes that each hold a part of an adapter agree on whether it was trained."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.distributed import parts_job
from tests.distributed.ports import free_port

ROOT = Path(__file__).parents[2]


@pytest.mark.distributed
@pytest.mark.slow
def test_process_without_part_of_b_does_not_warn(tmp_path: Path) -> None:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "MASTER_PORT": str(free_port())}
    command = [sys.executable, parts_job.__file__, str(tmp_path / "adapter.ckpt")]
    process = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert process.returncode == 0, process.stderr
    assert "rank 0 holds 0 numbers of B and said []" in process.stdout
    assert "rank 1 holds 2 numbers of B and said []" in process.stdout
