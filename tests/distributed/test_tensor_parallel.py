"""Tensor parallelism: where the factors lie, and what is refused; one process is enough for both."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from lightning_lora import LoRAConfig, attach, lora_layers
from tests.contract import raises_and_changes_nothing
from tests.toys import network

pytestmark = [
    pytest.mark.distributed,
    pytest.mark.filterwarnings("ignore:These adapters are not smaller"),
]


@pytest.fixture(autouse=True)
def process_group() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def parallel(model: nn.Module, **plan: Any) -> nn.Module:
    return parallelize_module(model, init_device_mesh("cpu", (1,)), {f"{name[1:]}": how for name, how in plan.items()})


def placements(tensor: torch.Tensor) -> tuple[Any, ...]:
    assert isinstance(tensor, DTensor)
    return tensor.placements


def test_factors_are_divided_as_their_weight_is() -> None:
    model = parallel(network(), _0=ColwiseParallel(), _2=RowwiseParallel())
    attach(model, LoRAConfig(rank=2))
    layers = lora_layers(model)
    assert placements(layers["0"].lora.A) == (Replicate(),)
    assert placements(layers["0"].lora.B) == (Shard(0),)
    assert placements(layers["2"].lora.A) == (Shard(1),)
    assert placements(layers["2"].lora.B) == (Replicate(),)
    assert not isinstance(layers["4"].lora.A, DTensor)


def test_factors_start_as_without_parallelism() -> None:
    model, plain = parallel(network(), _0=ColwiseParallel(), _2=RowwiseParallel()), network()
    for each in (model, plain):
        attach(each, LoRAConfig(rank=2))
    for name in ("0", "2"):
        assert torch.equal(lora_layers(model)[name].lora.A.full_tensor(), lora_layers(plain)[name].lora.A)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"use_dora": True}, "use_dora and lora_bias are not supported"),
        ({"lora_bias": True}, "use_dora and lora_bias are not supported"),
        ({"target_modules": [], "target_slices": {"0": {"q": "0:4"}}}, "divided by tensor parallelism"),
        ({"target_modules": [], "target_parameters": ["0.weight"]}, "only nn.Linear with its own forward"),
    ],
)
def test_what_tensor_parallelism_cannot_do_is_refused_by_name(options: dict[str, Any], reason: str) -> None:
    model = parallel(network(), _0=ColwiseParallel())
    with raises_and_changes_nothing(model, ValueError, reason) as caught:
        attach(model, LoRAConfig(**({"rank": 2, "target_modules": ["0"]} | options)))
    assert "'0" in str(caught.value)
