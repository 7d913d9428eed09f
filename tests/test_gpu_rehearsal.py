"""Run the GPU tests on the CPU, so that they work once there is a GPU."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
def test_gpu_tests_pass_on_cpu() -> None:
    """Other tests already run FSDP and DeepSpeed on the CPU, so these are excluded."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/gpu"]
    command += ["-k", "not fsdp] and not deepspeed"]
    environment = os.environ | {"REHEARSE_GPU_TESTS": "1"}
    process = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert process.returncode == 0, process.stdout[-5000:]
    counts = {outcome: int(count) for count, outcome in re.findall(r"(\d+) (passed|skipped)", process.stdout)}
    assert counts["passed"] > 2 * counts["skipped"]
