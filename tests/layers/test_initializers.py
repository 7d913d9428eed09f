"""Starts of the random factor: their distribution, and that they depend on nothing but seed, name and shape."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from lightning_lora import LoRAConfig, attach, lora_layers
from lightning_lora.layers.low_rank import INITIALIZERS, gaussian, kaiming, layer_seed, orthogonal, seeded
from tests.contract import assert_same_bits

every_init = pytest.mark.parametrize("init", INITIALIZERS)


def starts(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: layer.lora.A.detach().clone() for name, layer in lora_layers(model).items()}


def attached(model: nn.Module, *, seed: int = 0, **options: object) -> dict[str, torch.Tensor]:
    attach(model, LoRAConfig(**{"rank": 4, **options}), seed=seed)
    return starts(model)


@every_init
@pytest.mark.parametrize(("rank", "columns"), [(1, 1), (1, 7), (4, 4), (8, 100)])
def test_a_start_has_one_row_a_rank_and_one_column_an_input(init: str, rank: int, columns: int):
    A = INITIALIZERS[init](rank, columns, seeded(0))
    assert A.shape == (rank, columns)
    assert A.dtype == torch.float32
    assert A.isfinite().all()


def test_kaiming_is_torchs_own_default_for_a_linear_layer():
    expected = nn.init.kaiming_uniform_(torch.empty(8, 50), a=math.sqrt(5), generator=torch.Generator().manual_seed(3))
    assert torch.allclose(kaiming(8, 50, seeded(3)), expected, rtol=1e-6, atol=0)


def test_kaiming_fills_its_bounds():
    A, bound = kaiming(64, 400, seeded(0)), 1 / math.sqrt(400)
    assert A.abs().max() <= bound
    assert A.abs().max() > 0.99 * bound
    assert A.square().mean() == pytest.approx(bound**2 / 3, rel=0.02)  # 25,600 draws
    assert A.mean().abs() < 4 * bound / math.sqrt(3 * A.numel())


@pytest.mark.parametrize("rank", [2, 16])
def test_gaussian_has_a_standard_deviation_of_one_over_rank(rank: int):
    A = gaussian(rank, 20_000, seeded(0))
    assert A.std() == pytest.approx(1 / rank, rel=0.02)
    assert A.mean().abs() < 4 / rank / math.sqrt(A.numel())


@pytest.mark.parametrize(("rank", "columns"), [(1, 5), (8, 8), (8, 100)])
def test_orthogonal_has_orthogonal_rows_with_the_mean_square_of_kaiming(rank: int, columns: int):
    A = orthogonal(rank, columns, seeded(0)).double()
    assert torch.allclose(A @ A.T, torch.eye(rank, dtype=torch.float64) / 3, atol=1e-6)
    assert A.square().mean() == pytest.approx(1 / (3 * columns), rel=1e-5)


@every_init
def test_a_start_is_decided_by_the_state_of_its_generator(init: str):
    first, again, other = (INITIALIZERS[init](4, 30, seeded(seed)) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@every_init
def test_every_layer_and_every_seed_starts_differently(init: str, tiny):
    torch.manual_seed(1)
    other = type(tiny)()
    a, b = attached(tiny, init=init), attached(other, init=init, seed=1)
    square = [A for A in a.values() if A.shape == (4, 16)]
    assert len({A.sum().item() for A in square}) == len(square) == 5
    assert all(not torch.equal(a[name], b[name]) for name in a)


@every_init
def test_a_start_depends_neither_on_the_global_generator_nor_on_the_other_targets(init: str, tiny):
    torch.manual_seed(1)
    other = type(tiny)()
    everything = attached(tiny, init=init)
    torch.manual_seed(99)
    few = attached(other, init=init, target_modules=["1.v_proj", "head"])
    assert list(few) == ["blocks.1.v_proj", "head"]
    assert_same_bits(few, {name: everything[name] for name in few})


def test_a_start_does_not_depend_on_the_values_of_the_weights_nor_on_the_rank_of_others(tiny):
    other = type(tiny)()
    expected = attached(tiny)
    found = attached(other, rank_pattern={"q_proj": 2})
    assert torch.equal(found["head"], expected["head"])
    assert not torch.equal(tiny.head.weight, other.head.weight)


def test_attaching_leaves_the_global_generator_alone(tiny):
    before = torch.get_rng_state()
    attach(tiny, LoRAConfig(rank=4, init="orthogonal", target_modules=["embed", "head"]))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("target", ["head", "embed"])
def test_a_start_does_not_depend_on_the_default_dtype(dtype: torch.dtype, target: str, tiny):
    # Lightning calls configure_model under the precision's default dtype.
    other = type(tiny)()
    attach(tiny, LoRAConfig(rank=4, target_modules=[target]))
    previous = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        attach(other, LoRAConfig(rank=4, target_modules=[target]))
    finally:
        torch.set_default_dtype(previous)
    [mine], [its] = lora_layers(tiny).values(), lora_layers(other).values()
    assert_same_bits(its.lora.state_dict(), mine.lora.state_dict())


@pytest.mark.parametrize("target", ["head", "embed"])
def test_a_start_does_not_depend_on_the_default_device(target: str, tiny):
    # Lightning calls configure_model under the strategy's default device. Here the meta device stands in for a GPU.
    other = type(tiny)()
    attach(tiny, LoRAConfig(rank=4, target_modules=[target]))
    with torch.device("meta"):
        attach(other, LoRAConfig(rank=4, target_modules=[target]))
    [mine], [its] = lora_layers(tiny).values(), lora_layers(other).values()
    assert_same_bits(its.lora.state_dict(), mine.lora.state_dict())


@pytest.mark.parametrize("adapter_dtype", ["bfloat16", "float16", "float64"])
def test_a_start_in_another_precision_is_the_float32_start_rounded(adapter_dtype: str, tiny):
    other = type(tiny)()
    attach(tiny, LoRAConfig(rank=4))
    attach(other, LoRAConfig(rank=4, adapter_dtype=adapter_dtype))
    for name, A in starts(other).items():
        assert torch.equal(A, starts(tiny)[name].to(getattr(torch, adapter_dtype)))


def test_a_layer_is_seeded_by_the_run_its_full_name_and_the_full_shape_of_its_weight(tiny):
    attach(tiny.blocks, LoRAConfig(rank=2), seed=3)
    layers = lora_layers(tiny.blocks)
    assert layers
    for name, layer in layers.items():
        assert layer.lora.spec.seed == layer_seed(3, name, (16, 16))


def test_a_layers_seed_depends_on_run_name_and_shape():
    seeds = {
        layer_seed(0, "a", (4, 4)),
        layer_seed(1, "a", (4, 4)),
        layer_seed(0, "b", (4, 4)),
        layer_seed(0, "a", (4, 5)),
    }
    assert len(seeds) == 4
    assert layer_seed(0, "a", (4, 4)) == layer_seed(0, "a", torch.Size([4, 4]))
    assert all(0 <= seed < 2**63 for seed in seeds)
