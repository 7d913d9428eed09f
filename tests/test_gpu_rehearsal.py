"""Run the GPU tests on the CPU, so that they work once there is a GPU."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.processes import run


@pytest.mark.slow
def test_gpu_tests_pass_on_cpu() -> None:
    """Other tests already run FSDP and DeepSpeed on the CPU, so these are excluded."""
    options = ["-q", "-p", "no:cacheprovider", "-k", "not fsdp] and not deepspeed"]
    options += ["-W", "ignore::pytest.PytestAssertRewriteWarning"]  # the process has imported plugins before
    printed = run(Path(pytest.__file__).with_name("__main__.py"), *options, "tests/gpu", REHEARSE_GPU_TESTS=1)
    counts = {outcome: int(count) for count, outcome in re.findall(r"(\d+) (passed|skipped)", printed)}
    assert counts["passed"] > 2 * counts["skipped"]
