"""The batched LoRA linear equals the layer of each adapter, forward and backward."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from lightning_lora import LoRAConfig, attach
from lightning_lora.sweep.batched import batched_linears

ADAPTERS, SAMPLES, IN, OUT, RANK, SCALING = 3, 5, 6, 4, 2, 4.0


@pytest.mark.parametrize("is_shared", [True, False])
@pytest.mark.parametrize("has_bias", [True, False])
def test_it_computes_what_every_adapter_does_alone(is_shared: bool, has_bias: bool, rng: torch.Generator):
    layer = nn.Linear(IN, OUT, bias=has_bias, dtype=torch.float64)
    model = nn.Sequential(layer)
    attach(model, LoRAConfig(rank=RANK, alpha=RANK * SCALING, adapter_dtype="float64"))
    shapes = {"x": (SAMPLES, 2, IN), "A": (ADAPTERS, RANK, IN), "B": (ADAPTERS, OUT, RANK)}
    if not is_shared:
        shapes["x"] = (ADAPTERS, *shapes["x"])
    drawn = {key: torch.randn(shape, generator=rng, dtype=torch.float64) for key, shape in shapes.items()}
    weights = torch.randn(ADAPTERS, SAMPLES, 2, OUT, generator=rng, dtype=torch.float64)

    def mapped(x: Tensor, A: Tensor, B: Tensor) -> Tensor:
        own = model[0].lora._parameters
        kept, own["A"], own["B"] = dict(own), A, B
        try:
            return model(x)
        finally:
            own.update(kept)

    mine = {key: value.clone().requires_grad_() for key, value in drawn.items()}
    with batched_linears(model):
        found = torch.func.vmap(mapped, in_dims=(None if is_shared else 0, 0, 0))(mine["x"], mine["A"], mine["B"])
    theirs = {key: value.clone().requires_grad_() for key, value in drawn.items()}
    for index in range(ADAPTERS):
        x = theirs["x"] if is_shared else theirs["x"][index]
        weight = layer.weight + SCALING * theirs["B"][index] @ theirs["A"][index]
        expected = nn.functional.linear(x, weight, layer.bias)
        torch.testing.assert_close(found[index], expected)
        (expected * weights[index]).sum().backward()
    (found * weights).sum().backward()
    for key, value in theirs.items():
        torch.testing.assert_close(mine[key].grad, value.grad)
    assert "forward" not in vars(model[0].lora)


@pytest.mark.parametrize("is_shared", [True, False])
@pytest.mark.parametrize("samples", [SAMPLES, ADAPTERS])
def test_each_adapter_may_have_a_bias_of_its_own(samples: int, is_shared: bool, rng: torch.Generator):
    """Also where there are as many samples as adapters, so that the shapes would fit the other way, too."""
    layer = nn.Linear(IN, OUT, dtype=torch.float64)
    model = nn.Sequential(layer)
    attach(model, LoRAConfig(rank=RANK, alpha=RANK * SCALING, adapter_dtype="float64", bias="all"))
    shape = (samples, IN) if is_shared else (ADAPTERS, samples, IN)
    shapes = {"x": shape, "A": (ADAPTERS, RANK, IN), "B": (ADAPTERS, OUT, RANK), "bias": (ADAPTERS, OUT)}
    drawn = {key: torch.randn(shape, generator=rng, dtype=torch.float64) for key, shape in shapes.items()}
    weights = torch.randn(ADAPTERS, samples, OUT, generator=rng, dtype=torch.float64)

    def mapped(x: Tensor, A: Tensor, B: Tensor, bias: Tensor) -> Tensor:
        own, table = model[0].lora._parameters, model[0]._parameters
        kept, before = dict(own), table["bias"]
        own["A"], own["B"], table["bias"] = A, B, bias
        try:
            return model(x)
        finally:
            own.update(kept)
            table["bias"] = before

    mine = {key: value.clone().requires_grad_() for key, value in drawn.items()}
    with batched_linears(model):
        found = torch.func.vmap(mapped, in_dims=(None if is_shared else 0, 0, 0, 0))(*mine.values())
    theirs = {key: value.clone().requires_grad_() for key, value in drawn.items()}
    for index in range(ADAPTERS):
        x = theirs["x"] if is_shared else theirs["x"][index]
        weight = layer.weight + SCALING * theirs["B"][index] @ theirs["A"][index]
        expected = nn.functional.linear(x, weight, theirs["bias"][index])
        torch.testing.assert_close(found[index], expected)
        (expected * weights[index]).sum().backward()
    (found * weights).sum().backward()
    for key, value in theirs.items():
        torch.testing.assert_close(mine[key].grad, value.grad)
