"""A rank schedule decides the same in two processes as in one, and resumes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_lora import load_adapter, lora_layers
from tests.distributed import ranks_job
from tests.distributed.strategy_job import Wide
from tests.processes import run_ranks
from tests.trainer.test_checkpoints import assert_same_bits, read

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

each_mode = pytest.mark.parametrize("mode", ["ddp", "fsdp2"])


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("ranks")


@pytest.fixture(scope="module")
def ranks(directory: Path) -> list[dict[str, Any]]:
    """Return the reports of two processes."""
    run_ranks(2, ranks_job.__file__, directory, 2, "ddp", "fsdp2")
    return [torch.load(directory / f"rank{rank}.pt", weights_only=False) for rank in range(2)]


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Train in one process on the joined batches."""
    return ranks_job.fit(tmp_path_factory.mktemp("single"), "single", 1)


@each_mode
def test_processes_decide_as_one(mode: str, ranks: list[dict[str, Any]], single: dict[str, Any]) -> None:
    for rank in ranks:
        assert rank[mode]["whole"]["masks"] == single["masks"]
        assert rank[mode]["whole"]["ranks"] == single["ranks"]
    assert len({str(masks) for masks in single["masks"]}) > 3
    mean = torch.tensor([rank[mode]["whole"]["losses"] for rank in ranks], dtype=torch.float64).mean(0)
    assert mean.tolist() == pytest.approx(single["losses"], abs=1e-9)


@each_mode
def test_a_resumed_training_is_the_same_bit_for_bit(mode: str, ranks: list[dict[str, Any]]) -> None:
    whole, resumed = (ranks[0][mode][name] for name in ("whole", "resumed"))
    assert resumed["masks"] == whole["masks"][5:]
    for key in ("state_dict", "optimizer_states", "lightning_lora", "lightning_lora_scores"):
        assert_same_bits(read(resumed["last"])[key], read(whole["last"])[key])


@each_mode
def test_what_is_exported_is_compact(mode: str, ranks: list[dict[str, Any]], directory: Path) -> None:
    module = Wide()
    load_adapter(module, directory / mode / "peft")
    found = {name: layer.rank for name, layer in lora_layers(module).items()}
    assert found == {name: rank for name, rank in ranks[0][mode]["whole"]["ranks"].items() if rank}


def test_energy_is_that_of_the_inputs_of_all_processes(ranks: list[dict[str, Any]], tmp_path: Path) -> None:
    expected = ranks_job.fit(tmp_path, "single", 1, score="energy")
    for rank in ranks:
        assert rank["energy"]["masks"] == expected["masks"]


def test_strategies_in_which_components_cannot_be_told_apart_are_refused(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        assert "under FSDPStrategy a process holds flat slices" in rank["refused"]["fsdp1"]
        assert "with parallelize_module divides each layer in its own way" in rank["refused"]["tp"]
