"""Tensor parallelism: placement of the factors, and rejected options; one process is enough."""

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
from lightning_lora.trainer.hints import explain_torch_error
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


def test_factors_are_sharded_like_weight() -> None:
    model = parallel(network(), _0=ColwiseParallel(), _2=RowwiseParallel())
    attach(model, LoRAConfig(rank=2))
    layers = lora_layers(model)
    assert placements(layers["0"].lora.A) == (Replicate(),)
    assert placements(layers["0"].lora.B) == (Shard(0),)
    assert placements(layers["2"].lora.A) == (Shard(1),)
    assert placements(layers["2"].lora.B) == (Replicate(),)
    assert not isinstance(layers["4"].lora.A, DTensor)


def test_initial_values_match_unsharded() -> None:
    model, plain = parallel(network(), _0=ColwiseParallel(), _2=RowwiseParallel()), network()
    for each in (model, plain):
        attach(each, LoRAConfig(rank=2))
    for name in ("0", "2"):
        assert torch.equal(lora_layers(model)[name].lora.A.full_tensor(), lora_layers(plain)[name].lora.A)


def test_bias_gradients_match_one_process() -> None:
    model, plain = parallel(network(), _0=ColwiseParallel(), _2=RowwiseParallel()), network()
    x = torch.linspace(-1, 1, 24).view(3, 8).to(plain[0].weight.dtype)
    for each in (model, plain):
        attach(each, LoRAConfig(rank=2, target_modules=["0", "2"], bias="lora_only"))
        each(x).square().sum().backward()
    for layer, like in zip(model[0:3:2], plain[0:3:2], strict=True):
        torch.testing.assert_close(layer.bias.grad.full_tensor(), like.bias.grad)
        assert like.bias.grad.count_nonzero()


def test_tokens_of_sharded_embedding_are_rejected() -> None:
    model = parallel(nn.Sequential(nn.Embedding(6, 4), nn.Linear(4, 4)), _0=ColwiseParallel())
    with raises_and_changes_nothing(model, ValueError, "its weight is sharded by tensor parallelism"):
        attach(model, LoRAConfig(rank=2, target_modules=["1"], trainable_token_indices={"0": [2]}))


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"use_dora": True}, "use_dora and lora_bias are not supported"),
        ({"lora_bias": True}, "use_dora and lora_bias are not supported"),
        ({"target_modules": [], "target_slices": {"0": {"q": "0:4"}}}, "sharded by tensor parallelism"),
        ({"target_modules": [], "target_parameters": ["0.weight"]}, "only a plain nn.Linear can be adapted"),
    ],
)
def test_unsupported_option_is_rejected(options: dict[str, Any], reason: str) -> None:
    model = parallel(network(), _0=ColwiseParallel())
    with raises_and_changes_nothing(model, ValueError, reason) as caught:
        attach(model, LoRAConfig(**({"rank": 2, "target_modules": ["0"]} | options)))
    assert "'0" in str(caught.value)


def test_dividing_layers_that_carry_adapters_is_explained() -> None:
    model = network()
    attach(model, LoRAConfig(rank=2))
    with pytest.raises(KeyError) as caught:
        parallel(model, _0=ColwiseParallel())
    explain_torch_error(caught.value, model)
    assert "after it" in str(caught.value)
    assert "parallelize_module" in str(caught.value)
