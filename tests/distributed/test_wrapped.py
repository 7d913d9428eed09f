"""Attaching to an already wrapped module is rejected: its adapters would not be synchronised."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from lightning_lora import LoRAConfig, attach, lora_layers
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
