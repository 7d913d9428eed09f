"""Several adapters under every strategy: the trained one is that of one process, and the others stay bit-equal."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.contract import assert_same_bits
from tests.distributed import named_job
from tests.processes import run, run_ranks

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

has_deepspeed = importlib.util.find_spec("deepspeed") is not None
each_strategy = pytest.mark.parametrize("name", named_job.STRATEGIES + named_job.STAGES * has_deepspeed)
each_file = pytest.mark.parametrize("suffix", ["", " resumed"])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("named")
    run(named_job.__file__, place, "single")
    run_ranks(2, named_job.__file__, place, *named_job.STRATEGIES, "differ")
    if has_deepspeed:
        run_ranks(2, named_job.__file__, place, *named_job.STAGES)
    return place


def read(folder: Path, name: str) -> dict[str, Any]:
    found: dict[str, Any] = torch.load(folder / f"{name}.ckpt", weights_only=True)
    return found


@each_file
@each_strategy
def test_switching_in_a_fit_trains_the_same_adapter_as_one_process(name: str, suffix: str, folder: Path):
    expected, found = (read(folder, each + suffix)["state_dict"] for each in ("single", name))
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=1e-4, atol=1e-5)


@each_file
@each_strategy
def test_every_checkpoint_holds_the_other_adapters_bit_for_bit(name: str, suffix: str, folder: Path):
    module, found = named_job.several(), read(folder, name + suffix)
    others = ["a", "b", "headed"]
    assert found["lightning_lora"]["names"] == [*others, "mine"]
    for other in others:
        assert_same_bits(found["lightning_lora_others"][other], named_job.state(module, other))


@each_file
@each_strategy
def test_buffers_that_training_moves_belong_to_the_trained_adapter(name: str, suffix: str, folder: Path):
    record = read(folder, name + suffix)["lightning_lora"]
    assert record["buffers"] == {"steps": 5 if suffix else 3}
    assert [record["others"][other]["buffers"] for other in ("a", "b", "headed")] == [{}] * 3


@pytest.mark.parametrize("when", ["before", "start"])
def test_processes_that_switch_differently_all_raise_with_what_each_has(when: str, folder: Path):
    """They switch before the fit, or when training begins."""
    errors = [torch.load(folder / f"differ{rank}.pt", weights_only=True)[when] for rank in range(2)]
    assert errors[0] == errors[1]
    assert "rank 0: 'a' of ['a', 'b'], rank 1: 'b' of ['a', 'b']" in errors[0]


def test_processes_that_switch_differently_after_the_fit_save_what_was_trained(folder: Path):
    errors = [torch.load(folder / f"differ{rank}.pt", weights_only=True)["never"] for rank in range(2)]
    assert errors == ["", ""]
    file = read(folder, "never")
    assert file["lightning_lora"]["name"] == "a"
    assert all(tensor.any() for name, tensor in file["state_dict"].items() if name.endswith("lora.B"))
