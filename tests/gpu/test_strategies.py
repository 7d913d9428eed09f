"""FSDP, FSDP2 and DeepSpeed on one GPU match a single device."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_lora import load_adapter
from tests.gpu import strategy_job
from tests.gpu.device import needs_cuda
from tests.processes import run as run_script
from tests.toys import Toy
from tests.trainer.test_checkpoints import read

pytestmark = [*needs_cuda, pytest.mark.slow]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("gpu")


def run(directory: Path, mode: str) -> dict[str, Any]:
    """Return the report of a separate process, because strategies leave process groups behind."""
    if mode.startswith("deepspeed") and not importlib.util.find_spec("deepspeed"):
        pytest.skip("DeepSpeed is not installed")
    place = directory / f"{mode}.pt"
    if not place.exists():
        run_script(strategy_job.__file__, directory, mode)
    found: dict[str, Any] = torch.load(place, weights_only=False)
    return found


@pytest.mark.parametrize("mode", strategy_job.MODES[1:])
def test_strategy_matches_single_device(mode: str, directory: Path) -> None:
    single, found = run(directory, "single"), run(directory, mode)
    assert found["whole"]["losses"] == pytest.approx(single["whole"]["losses"], rel=1e-2)
    assert found["half"]["losses"] + found["resumed"]["losses"] == pytest.approx(found["whole"]["losses"], rel=1e-5)
    assert (found["whole"]["adapters"], found["resumed"]["adapters"]) == (2, 0)
    files = [read(each["whole"]["last"]) for each in (found, single)]
    assert files[0]["state_dict"].keys() == files[1]["state_dict"].keys()
    assert files[0]["optimizer_states"][0]["state"].keys() == files[1]["optimizer_states"][0]["state"].keys()
    exported, expected = Toy(), Toy()
    load_adapter(exported, directory / mode / "whole" / "peft")
    load_adapter(expected, found["whole"]["last"])
    x = torch.ones(2, 8)
    torch.testing.assert_close(exported.net(x), expected.net(x))
