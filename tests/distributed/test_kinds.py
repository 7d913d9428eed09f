"""Every layer kind trains and merges in two processes as in one, under DDP, FSDP2 and FSDP."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.distributed import kinds_job
from tests.processes import run_ranks

pytestmark = [pytest.mark.distributed, pytest.mark.slow]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Return the reports of two processes, by layer kind."""
    directory = tmp_path_factory.mktemp("kinds")
    run_ranks(2, kinds_job.__file__, directory)
    return [torch.load(directory / f"rank{rank}.pt", weights_only=False) for rank in range(2)]


CASES = [
    (strategy, kind)
    for strategy in ("ddp", "fsdp2", "fsdp1")
    for kind in kinds_job.CASES
    if strategy != "fsdp1" or kind not in kinds_job.REFUSED_BY_FSDP1
]


@pytest.mark.parametrize(("strategy", "kind"), CASES)
@pytest.mark.filterwarnings("ignore:These adapters are not smaller")
def test_layer_kind_matches_one_process(strategy: str, kind: str, ranks: list[dict[str, Any]]) -> None:
    truth = kinds_job.train(kinds_job.CASES[kind])
    for rank in ranks:
        found = rank[strategy][kind]
        assert found.keys() == ({"output"} if strategy == "fsdp1" else truth.keys())
        for name, tensor in found.items():
            torch.testing.assert_close(tensor, truth[name], rtol=0.0, atol=1e-12)
    torch.testing.assert_close(truth["merged"], truth["output"], rtol=0.0, atol=1e-10)
