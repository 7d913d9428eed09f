"""Several adapters under every strategy: the trained one is that of one process, and the others stay bit-equal."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.distributed import named_job
from tests.processes import run, run_ranks

pytestmark = [pytest.mark.distributed, pytest.mark.slow]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("named")
    for name in named_job.STRATEGIES:
        (run_ranks if name != "single" else run)(*([2] if name != "single" else []), named_job.__file__, name, place)
    return place


def trained(folder: Path, name: str) -> dict[str, Tensor]:
    return torch.load(folder / f"{name}.ckpt", weights_only=True)["state_dict"]


@pytest.mark.parametrize("name", named_job.STRATEGIES[1:])
def test_switching_in_a_fit_trains_the_same_adapter_as_one_process(name: str, folder: Path):
    expected, found = trained(folder, "single"), trained(folder, name)
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=1e-4, atol=1e-5)
