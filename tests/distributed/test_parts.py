"""Processes that each hold a part of an adapter agree on whether it was trained."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.distributed import parts_job
from tests.processes import run_ranks


@pytest.mark.distributed
@pytest.mark.slow
def test_process_without_part_of_b_does_not_warn(tmp_path: Path) -> None:
    printed = run_ranks(2, parts_job.__file__, tmp_path / "adapter.ckpt")
    assert "rank 0 holds 0 numbers of B and said []" in printed
    assert "rank 1 holds 2 numbers of B and said []" in printed
