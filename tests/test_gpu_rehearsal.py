"""The tests for a GPU run through on the CPU, so that they are not found wrong when there is a GPU at last."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
def test_the_tests_for_a_gpu_pass_where_a_cpu_can_take_its_place() -> None:
    """FSDP and DeepSpeed are rehearsed by hand, with the same variable: other tests run them on CPUs already."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/gpu"]
    command += ["-k", "not fsdp] and not deepspeed"]
    environment = os.environ | {"REHEARSE_GPU_TESTS": "1"}
    process = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert process.returncode == 0, process.stdout[-5000:]
    counts = {outcome: int(count) for count, outcome in re.findall(r"(\d+) (passed|skipped)", process.stdout)}
    assert counts["passed"] > 2 * counts["skipped"]
