"""Modules wrapped by hand: adapters must come first, and their state has the names of the bare module."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from lightning_lora import LoRAConfig, adapter_state_dict, attach, load_adapter, lora_layers, save_adapter
from tests.distributed import wrapped_job
from tests.distributed.wrapped_job import PROCESSES, adapted, model_width
from tests.processes import run_ranks
from tests.toys import network

pytestmark = pytest.mark.distributed


@pytest.fixture
def process_group() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def fully_sharded(model: nn.Module) -> nn.Module:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    return fully_shard(model, mesh=init_device_mesh("cpu", (1,)))


@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize("wrap", [DistributedDataParallel, fully_sharded])
def test_wrapped_module_is_rejected(wrap: Callable[[nn.Module], nn.Module]) -> None:
    wrapped = wrap(network())
    for module in (wrapped, nn.Sequential(wrapped)):
        with pytest.raises(RuntimeError, match="Call attach first and wrap afterwards"):
            attach(module, LoRAConfig(rank=2))
        assert not lora_layers(module)
        assert all(parameter.requires_grad for parameter in module.parameters())


KINDS = ["fabric", "ddp", "fsdp2"]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("wrapped")
    run_ranks(PROCESSES, wrapped_job.__file__, place)
    return place


@pytest.fixture(scope="module")
def ranks(directory: Path) -> list[dict[str, dict[str, Any]]]:
    return [torch.load(directory / f"rank{rank}.pt", weights_only=True) for rank in range(PROCESSES)]


def trained_alone() -> dict[str, torch.Tensor]:
    """Return the adapter that one process gets from the rows of both."""
    model = adapted()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1)
    rows = torch.cat([torch.ones(4, model_width(model)) * (1 + rank) for rank in range(PROCESSES)])
    for _ in range(2):
        optimizer.zero_grad()
        model(rows).square().mean().backward()
        optimizer.step()
    return adapter_state_dict(model)


@pytest.mark.parametrize("kind", KINDS)
def test_state_of_a_wrapped_module_is_that_of_the_bare_module(kind: str, ranks: list[Any]) -> None:
    expected = trained_alone()
    for rank in ranks:
        assert rank[kind]["state"].keys() == expected.keys()
        for name, value in expected.items():
            torch.testing.assert_close(rank[kind]["state"][name], value)


@pytest.mark.parametrize("kind", KINDS)
def test_state_loads_into_a_wrapped_module(kind: str, ranks: list[Any]) -> None:
    for rank in ranks:
        assert not any(value.any() for value in rank[kind]["zeros"].values())
        assert all(torch.equal(value, rank[kind]["again"][name]) for name, value in rank[kind]["state"].items())


@pytest.mark.parametrize("kind", ["fabric", "ddp"])
def test_wrapped_module_saves_a_peft_directory(kind: str, directory: Path, ranks: list[Any]) -> None:
    model = network()
    load_adapter(model, directory / kind)
    for name, value in adapter_state_dict(model).items():
        torch.testing.assert_close(value, ranks[0][kind]["state"][name])


def test_divided_adapter_is_not_saved_by_one_process(directory: Path, ranks: list[Any]) -> None:
    assert "Call adapter_state_dict(module) on every process" in ranks[0]["fsdp2"]["refused"]
    assert not (directory / "fsdp2").exists()


def test_compiled_module_has_plain_names(tmp_path: Path) -> None:
    model = adapted()
    compiled = torch.compile(model, backend="eager")
    assert adapter_state_dict(compiled).keys() == adapter_state_dict(model).keys()
    save_adapter(compiled, tmp_path / "adapter")
    load_adapter(compiled, tmp_path / "adapter")
