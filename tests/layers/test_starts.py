"""The starts of the factors: their distribution, and what they depend on."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from lightning_lora import LoRAConfig, attach, lora_layers
from lightning_lora.layers import starts as module
from lightning_lora.layers.starts import (
    INITIALIZERS,
    gaussian,
    kaiming,
    layer_seed,
    leading_svd,
    olora,
    orthogonal,
    pissa,
    seeded,
    signs_of,
)
from tests.contract import assert_same_bits

# --- from a seed: their distribution, and that they depend on nothing but seed, name and shape


every_init = pytest.mark.parametrize("init", INITIALIZERS)


def starts(model: nn.Module) -> dict[str, Tensor]:
    return {name: layer.lora.A.detach().clone() for name, layer in lora_layers(model).items()}


def attached(model: nn.Module, *, seed: int = 0, **options: object) -> dict[str, Tensor]:
    attach(model, LoRAConfig(**{"rank": 4, **options}), seed=seed)
    return starts(model)


@every_init
@pytest.mark.parametrize(("rank", "columns"), [(1, 1), (1, 7), (4, 4), (8, 100)])
def test_start_is_rank_by_columns(init: str, rank: int, columns: int):
    A = INITIALIZERS[init](rank, columns, seeded(0))
    assert A.shape == (rank, columns)
    assert A.dtype == torch.float32
    assert A.isfinite().all()


def test_kaiming_matches_torch_default():
    expected = nn.init.kaiming_uniform_(torch.empty(8, 50), a=math.sqrt(5), generator=torch.Generator().manual_seed(3))
    assert torch.allclose(kaiming(8, 50, seeded(3)), expected, rtol=1e-6, atol=0)


def test_kaiming_fills_its_bounds():
    A, bound = kaiming(64, 400, seeded(0)), 1 / math.sqrt(400)
    assert A.abs().max() <= bound
    assert A.abs().max() > 0.99 * bound
    assert A.square().mean() == pytest.approx(bound**2 / 3, rel=0.02)  # 25,600 draws
    assert A.mean().abs() < 4 * bound / math.sqrt(3 * A.numel())


@pytest.mark.parametrize("rank", [2, 16])
def test_gaussian_std_is_one_over_rank(rank: int):
    A = gaussian(rank, 20_000, seeded(0))
    assert A.std() == pytest.approx(1 / rank, rel=0.02)
    assert A.mean().abs() < 4 / rank / math.sqrt(A.numel())


@pytest.mark.parametrize(("rank", "columns"), [(1, 5), (8, 8), (8, 100)])
def test_orthogonal_rows_have_mean_square_of_kaiming(rank: int, columns: int):
    A = orthogonal(rank, columns, seeded(0)).double()
    assert torch.allclose(A @ A.T, torch.eye(rank, dtype=torch.float64) / 3, atol=1e-6)
    assert A.square().mean() == pytest.approx(1 / (3 * columns), rel=1e-5)


@every_init
def test_start_follows_generator(init: str):
    first, again, other = (INITIALIZERS[init](4, 30, seeded(seed)) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@every_init
def test_layers_and_seeds_start_differently(init: str, tiny):
    torch.manual_seed(1)
    other = type(tiny)()
    a, b = attached(tiny, init=init), attached(other, init=init, seed=1)
    square = [A for A in a.values() if A.shape == (4, 16)]
    assert len({A.sum().item() for A in square}) == len(square) == 5
    assert all(not torch.equal(a[name], b[name]) for name in a)


@every_init
def test_start_ignores_global_generator_and_other_targets(init: str, tiny):
    torch.manual_seed(1)
    other = type(tiny)()
    everything = attached(tiny, init=init)
    torch.manual_seed(99)
    few = attached(other, init=init, target_modules=["1.v_proj", "head"])
    assert list(few) == ["blocks.1.v_proj", "head"]
    assert_same_bits(few, {name: everything[name] for name in few})


def test_start_ignores_weight_values_and_other_ranks(tiny):
    other = type(tiny)()
    expected = attached(tiny)
    found = attached(other, rank_pattern={"q_proj": 2})
    assert torch.equal(found["head"], expected["head"])
    assert not torch.equal(tiny.head.weight, other.head.weight)


def test_attach_leaves_global_generator_alone(tiny):
    before = torch.get_rng_state()
    attach(tiny, LoRAConfig(rank=4, init="orthogonal", target_modules=["embed", "head"]))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("target", ["head", "embed"])
def test_start_ignores_default_dtype(dtype: torch.dtype, target: str, tiny):
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
def test_start_ignores_default_device(target: str, tiny):
    # Lightning calls configure_model under the strategy's default device. Here the meta device stands in for a GPU.
    other = type(tiny)()
    attach(tiny, LoRAConfig(rank=4, target_modules=[target]))
    with torch.device("meta"):
        attach(other, LoRAConfig(rank=4, target_modules=[target]))
    [mine], [its] = lora_layers(tiny).values(), lora_layers(other).values()
    assert_same_bits(its.lora.state_dict(), mine.lora.state_dict())


@pytest.mark.parametrize("adapter_dtype", ["bfloat16", "float16", "float64"])
def test_low_precision_start_is_float32_start_rounded(adapter_dtype: str, tiny):
    other = type(tiny)()
    attach(tiny, LoRAConfig(rank=4))
    attach(other, LoRAConfig(rank=4, adapter_dtype=adapter_dtype))
    for name, A in starts(other).items():
        assert torch.equal(A, starts(tiny)[name].to(getattr(torch, adapter_dtype)))


def test_layer_is_seeded_by_run_name_and_shape(tiny):
    attach(tiny.blocks, LoRAConfig(rank=2), seed=3)
    layers = lora_layers(tiny.blocks)
    assert layers
    for name, layer in layers.items():
        assert layer.lora.spec.seed == layer_seed(3, name, (16, 16))


def test_layer_seed_depends_on_run_name_and_shape():
    seeds = {
        layer_seed(0, "a", (4, 4)),
        layer_seed(1, "a", (4, 4)),
        layer_seed(0, "b", (4, 4)),
        layer_seed(0, "a", (4, 5)),
    }
    assert len(seeds) == 4
    assert layer_seed(0, "a", (4, 4)) == layer_seed(0, "a", torch.Size([4, 4]))
    assert all(0 <= seed < 2**63 for seed in seeds)


# --- from the weight


SHAPES = [(15, 30), (30, 15), (20, 20)]
every_shape = pytest.mark.parametrize("shape", SHAPES)


@pytest.fixture(params=["exact", "iterated"])
def either_way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Decompose small matrices exactly, or as large ones."""
    if request.param == "iterated":
        monkeypatch.setattr(module, "_EXACT_BELOW", 0)
        monkeypatch.setattr(module, "_OVERSAMPLING", 0)


def decaying(shape: tuple[int, int], generator: torch.Generator) -> Tensor:
    """Return a matrix whose singular values decay, as those of weights do."""
    U, values, Vh = torch.linalg.svd(torch.randn(shape, generator=generator), full_matrices=False)
    return U * values * 0.9 ** torch.arange(len(values)) @ Vh


def truncated(weight: Tensor, rank: int) -> Tensor:
    U, values, Vh = torch.linalg.svd(weight.double(), full_matrices=False)
    return U[:, :rank] * values[:rank] @ Vh[:rank]


@every_shape
@pytest.mark.parametrize("scaling", [0.5, 2.0])
def test_pissa_product_is_the_best_approximation(shape, scaling: float, either_way, rng):
    weight = decaying(shape, rng)
    A, B = pissa(weight, 3, scaling)
    assert (A.shape, B.shape) == ((3, shape[1]), (shape[0], 3))
    update, best = scaling * B.double() @ A.double(), truncated(weight, 3)
    assert (weight - update).norm() <= (1 + 1e-3) * (weight - best).norm()
    assert torch.allclose(A.norm(dim=1), B.norm(dim=0), rtol=1e-4)  # the values are shared equally


@pytest.mark.filterwarnings("ignore::UserWarning:peft.*", "ignore::DeprecationWarning", "ignore::FutureWarning")
def test_pissa_equals_peft(rng):
    peft = pytest.importorskip("peft")
    weight = torch.randn(10, 14, generator=rng)
    layer = nn.Linear(14, 10)
    layer.weight.data.copy_(weight)
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["0"], init_lora_weights="pissa")
    theirs = peft.get_peft_model(nn.Sequential(layer), config).base_model.model[0]
    A, B = pissa(weight, 4, scaling=2.0)
    expected = theirs.lora_B["default"].weight @ theirs.lora_A["default"].weight
    assert torch.allclose(B @ A, expected, atol=1e-5)
    assert torch.allclose(weight - 2 * B @ A, theirs.base_layer.weight, atol=1e-5)


@every_shape
def test_olora_product_is_the_start_of_the_decomposition(shape, rng):
    weight = torch.randn(shape, generator=rng)
    A, B = olora(weight, 5)
    Q, R = torch.linalg.qr(weight.double())
    assert torch.allclose(B.double() @ A.double(), Q[:, :5] @ R[:5], atol=1e-5)
    assert torch.allclose(B.T @ B, torch.eye(5), atol=1e-5)
    assert (A.diagonal() > 0).all()


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [(torch.bfloat16, torch.float32), (torch.float32, torch.float32), (torch.float64, torch.float64)],
)
def test_starts_from_the_weight_have_at_least_float32(dtype: torch.dtype, expected: torch.dtype, rng):
    weight = torch.randn(8, 6, generator=rng).to(dtype)
    for factor in (*pissa(weight, 2, 1.0), *olora(weight, 2)):
        assert factor.dtype == expected
        assert factor.is_contiguous()


def test_starts_from_the_weight_are_repeatable_and_draw_nothing(either_way, rng):
    weight = torch.randn(20, 30, generator=rng)
    state = torch.get_rng_state()
    first, again = pissa(weight, 4, 1.0), pissa(weight, 4, 1.0)
    assert torch.equal(first[0], again[0])
    assert torch.equal(first[1], again[1])
    assert torch.equal(torch.get_rng_state(), state)


def test_largest_entry_of_each_direction_is_positive(either_way, rng):
    matrix = decaying((20, 30), rng)
    U, values, V = leading_svd(matrix, 6)
    assert (signs_of(V) == 1).all()
    assert (values.diff() <= 0).all()
    assert torch.allclose(matrix.to(V) @ V, U * values, atol=1e-3 * float(values[0]))
    flipped = leading_svd(-matrix, 6)
    assert torch.allclose(flipped[2], V, atol=1e-4)
    assert torch.allclose(flipped[0], -U, atol=1e-4)


@pytest.mark.parametrize("start", [lambda weight, rank: pissa(weight, rank, 1.0), olora])
def test_start_from_the_weight_rejects_what_it_cannot_use(start, rng):
    weight = torch.randn(4, 6, generator=rng)
    with pytest.raises(ValueError, match=r"rank=5 is above the smaller side of the weight of shape \(4, 6\)"):
        start(weight, 5)
    weight[1, 2] = torch.nan
    with pytest.raises(ValueError, match="not finite"):
        start(weight, 2)


@pytest.mark.parametrize("rank", [0, 1, 2])
def test_pissa_rejects_a_rank_above_that_of_the_weight(rank: int, rng):
    weight = torch.randn(8, rank, generator=rng) @ torch.randn(rank, 6, generator=rng)
    with pytest.raises(ValueError, match=f"rank=3 is above the rank of the weight, {rank}"):
        pissa(weight, 3, 1.0)
