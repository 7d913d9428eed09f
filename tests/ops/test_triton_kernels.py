"""Kernels in Triton's interpreter: equal to float64, whatever the shape, and chosen only where they are faster.

The environment variable that turns the interpreter on is set in conftest.py, because Triton reads it on import.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lightning_lora import LoRAConfig, add_adapter, attach, routed, using
from lightning_lora.ops import linear as ops
from lightning_lora.ops.dropout import alive, kept
from lightning_lora.ops.linear import lora_add, lora_linear

pytest.importorskip("triton.knobs")  # Triton 3.4
pytestmark = pytest.mark.skipif(
    torch.cuda.is_available(), reason="no interpreter beside a GPU; benchmarks/gpu_visit.sh checks the kernels there"
)

KEEP, ALPHA = 0.75, 1.5
ROUNDING = {torch.float32: 1e-6, torch.bfloat16: 6e-3, torch.float16: 6e-4}
# Rows, width, rank: less than a block, more than one, whole blocks, no rows, and the highest rank.
SHAPES = [(1, 5, 1), (37, 70, 3), (32, 64, 16), (0, 20, 4), (20, 40, 128)]


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The kernels with blocks so small that the tests' tensors have several."""
    from lightning_lora.ops import triton_kernels

    sizes = {"_ROWS": 32, "_COLUMNS": 32, "_CHUNK": 64, "_ADD_ROWS": 32, "_ADD_COLUMNS": 64}
    for name, size in sizes.items():
        monkeypatch.setattr(triton_kernels, name, size)
    monkeypatch.setattr(triton_kernels, "_choices", {})
    return triton_kernels


def random(*shape: int, dtype: torch.dtype = torch.float32, is_turned: bool = False) -> Tensor:
    """Return a matrix, or one of the same shape whose rows are not contiguous."""
    return (torch.randn(*reversed(shape)).T if is_turned else torch.randn(shape)).to(dtype)


def assert_near(found: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    assert found.shape == expected.shape
    assert float((found.double() - expected).norm()) <= ROUNDING[dtype] * float(expected.norm())


def mask_of(kernels: ModuleType, x: Tensor, seed: Tensor) -> Tensor:
    return alive(kernels.mask_bits(x.shape, x.dtype, KEEP, seed), x.shape[1], torch.float64)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", ROUNDING, ids=str)
def test_kernels_match_float64(kernels: ModuleType, dtype: torch.dtype, shape: tuple[int, int, int]) -> None:
    rows, width, rank = shape
    is_turned = dtype is torch.float32
    x, A = random(rows, width, dtype=dtype, is_turned=is_turned), random(rank, width, dtype=dtype)
    B, g = random(width, rank, dtype=dtype, is_turned=is_turned), random(rows, rank, dtype=dtype)
    seed = kernels.new_seed(x)
    mask = mask_of(kernels, x, seed)
    dropped = x.double() * mask
    assert_near(kernels.dropped_product(x, A, KEEP, seed), dropped @ A.double().T, dtype)
    assert_near(kernels.factor_gradient(g, x, KEEP, seed), g.double().T @ dropped, dtype)
    for found, expected in zip(kernels.gradients(x, B, g), (x.double() @ B.double(), x.double().T @ g.double())):  # noqa: B905
        assert_near(found, expected, dtype)
    y = random(rows, width, dtype=dtype, is_turned=is_turned)
    for options, kept_part in (((), torch.ones_like(mask)), ((KEEP, seed), mask)):
        expected = y.double() + ALPHA * kept_part * (g.double() @ A.double())
        assert kernels.add_product(y, g, A, ALPHA, *options) is y
        assert_near(y, expected, dtype)


def test_mask_has_the_requested_rate_and_is_independent_of_the_blocks(
    kernels: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = torch.zeros(64, 128)
    seed = kernels.new_seed(x)
    mask = mask_of(kernels, x, seed)
    deviation = (KEEP * (1 - KEEP) / x.numel()) ** 0.5
    assert abs(float(mask.mean()) - KEEP) < 5 * deviation
    for each in (mask.mean(0), mask.mean(1)):
        assert float(each.std()) < 2 * (KEEP * (1 - KEEP) / (x.numel() / len(each))) ** 0.5  # no stripes
    assert not torch.equal(mask, mask_of(kernels, x, kernels.new_seed(x)))
    monkeypatch.setattr(kernels, "_ADD_COLUMNS", 32)
    assert torch.equal(mask, mask_of(kernels, x, seed))


# --- in the operations


@pytest.fixture
def used(kernels: ModuleType, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Use kernels wherever they exist; the operations that they do."""
    asked: list[str] = []

    def is_faster(what: str, *_: object) -> bool:
        asked.append(what)
        return True

    monkeypatch.setattr(kernels, "is_faster", is_faster)
    monkeypatch.setattr(ops, "_uses_kernels", lambda *_: True)
    monkeypatch.setattr(ops, "_FEW_TO_DROP", 0)
    return asked


def inputs_of(rows: int = 18, width: int = 20, out: int = 24, rank: int = 3) -> list[Tensor]:
    """Return x, W, b, A and B; only the weight is frozen."""
    sizes = [(2, rows // 2, width), (out, width), (out,), (rank, width), (out, rank)]
    return [torch.randn(size).requires_grad_(index != 1) for index, size in enumerate(sizes)]


def operation(dropout: float) -> Callable[..., Tensor]:
    return lambda x, W, b, A, B: lora_linear(x, W, b, A, B, scaling=ALPHA, dropout=dropout)


def addition(dropout: float) -> Callable[..., Tensor]:
    return lambda x, W, b, A, B: lora_add(F.linear(x, W, b), x, A, B, scaling=ALPHA, dropout=dropout)


def mask_drawn(function: Callable[..., Tensor], inputs: list[Tensor]) -> Tensor:
    """Return the scaled mask that this seed gives, from the output for ones, with a zero weight and unit factors."""
    x = inputs[0]
    eye = torch.eye(x.shape[-1])
    torch.default_generator.manual_seed(7)
    update: Tensor = function(torch.ones_like(x), torch.zeros_like(eye), None, eye, eye)
    return update.detach().double() / ALPHA


@pytest.mark.parametrize("make", [operation, addition])
@pytest.mark.parametrize("dropout", [0.0, 0.25])
def test_gradients_match_float64(make: Callable[[float], Any], dropout: float, used: list[str]) -> None:
    inputs, function = inputs_of(), make(dropout)
    mask = mask_drawn(function, inputs) if dropout else 1.0
    torch.default_generator.manual_seed(7)
    y = function(*inputs)
    trained = [t for t in inputs if t.requires_grad]
    found = [y, *torch.autograd.grad(y, trained, torch.ones_like(y))]
    x, W, b, A, B = exact = [t.detach().double().requires_grad_(t.requires_grad) for t in inputs]
    z = F.linear(x, W, b) + ALPHA * (x * mask) @ A.T @ B.T
    expected = [z, *torch.autograd.grad(z, [t for t in exact if t.requires_grad], torch.ones_like(z))]
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one.double(), other, rtol=1e-5, atol=1e-4)
    assert {*used} == {"add", "pair"} | ({"dropout"} if dropout else set())


def test_gradients_of_gradients_see_the_same_mask(used: list[str]) -> None:
    inputs, function = inputs_of(), operation(0.25)
    mask = mask_drawn(function, inputs)

    def second(x: Tensor, A: Tensor, B: Tensor, y: Tensor) -> tuple[Tensor, ...]:
        (first,) = torch.autograd.grad(y.square().sum(), [A], create_graph=True)
        return torch.autograd.grad(first.square().sum(), [x, B])

    torch.default_generator.manual_seed(7)
    found = second(inputs[0], *inputs[3:], function(*inputs))
    x, W, b, A, B = (t.detach().double().requires_grad_(t.requires_grad) for t in inputs)
    expected = second(x, A, B, F.linear(x, W, b) + ALPHA * (x * mask) @ A.T @ B.T)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one.double(), other, rtol=1e-4, atol=1e-4 * float(other.abs().max()))
    assert "dropout" in used


def test_activation_checkpointing_replays_the_mask(used: list[str]) -> None:
    inputs, function = inputs_of(), operation(0.25)
    trained, found = [t for t in inputs if t.requires_grad], []
    for call in (function, lambda *i: checkpoint(function, *i, use_reentrant=False)):
        torch.default_generator.manual_seed(7)
        found.append(torch.autograd.grad(call(*inputs).square().sum(), trained))
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)
    assert "dropout" in used


def test_a_routed_batch_uses_kernels_for_the_samples_of_each_adapter(used: list[str]) -> None:
    layer, x = nn.Linear(20, 24), torch.randn(3, 9, 20)
    model = nn.Sequential(layer)
    attach(model, LoRAConfig(rank=3, alpha=3 * ALPHA, target_modules="0"))
    add_adapter(model, "b", LoRAConfig(rank=5, alpha=5 * ALPHA, target_modules="0"))
    expected = F.linear(x, layer.weight, layer.bias).detach().double()
    names = ["b", None, "default"]
    for sample, name in enumerate(names):
        if name is not None:
            with using(model, name):
                nn.init.normal_(layer.lora.B)
                expected[sample] += ALPHA * x[sample].double() @ (layer.lora.B @ layer.lora.A).double().T
    with routed(model, names):
        found = model(x)
    assert_near(found.detach(), expected.detach(), torch.float32)
    assert used.count("add") == 2


# --- which path


@pytest.fixture
def times(kernels: ModuleType, monkeypatch: pytest.MonkeyPatch) -> dict[Any, float]:
    """What the timer says of a job, by the job; each is one second otherwise."""
    said: dict[Any, float] = {}
    monkeypatch.setattr(kernels, "_seconds", lambda job: (job(), said.get(job, 1.0))[1])
    return said


def fast() -> None:
    torch.rand(3)  # as a path with dropout does


def slow() -> None: ...


def test_faster_path_is_chosen_and_measured_once(kernels: ModuleType, times: dict[Any, float]) -> None:
    x = torch.zeros(4, 6)
    times.update({fast: 0.5, slow: 2.0})
    assert kernels.is_faster("a", x, 3, fast, slow)
    assert not kernels.is_faster("b", x, 3, slow, fast)
    assert not kernels.is_faster("c", x, 3, fast, fast)  # no gain, no kernel
    times.update({fast: 2.0, slow: 0.5})
    assert kernels.is_faster("a", x, 3, fast, slow)  # remembered
    for other in (x.half(), torch.zeros(5, 6), torch.zeros(6, 4).T):
        assert not kernels.is_faster("a", other, 3, fast, slow)
    assert not kernels.is_faster("a", x, 4, fast, slow)


def test_measurement_draws_no_numbers(kernels: ModuleType, times: dict[Any, float]) -> None:
    before = torch.get_rng_state()
    kernels.is_faster("a", torch.zeros(4, 6), 3, fast, slow)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("moment", ["is_compiling", "is_current_stream_capturing"])
def test_nothing_is_measured_inside_a_graph(
    moment: str, kernels: ModuleType, times: dict[Any, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    times.update({fast: 0.5})
    with monkeypatch.context() as inside:
        inside.setattr(torch.cuda, "is_available", lambda: True)
        inside.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
        inside.setattr(torch.compiler if moment == "is_compiling" else torch.cuda, moment, lambda: True)
        assert not kernels.is_faster("a", torch.zeros(4, 6), 3, fast, slow)
    assert kernels.is_faster("a", torch.zeros(4, 6), 3, fast, slow)  # the refusal was not kept


def test_measured_jobs_change_no_input(kernels: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    def is_faster(what: str, like: Tensor, rank: int, *jobs: Callable[[], object]) -> bool:
        for job in jobs:
            job()
        return True

    monkeypatch.setattr(kernels, "is_faster", is_faster)
    # The jobs add to memory that nothing has filled. NumPy, which interprets, warns where that holds infinities.
    monkeypatch.setattr(torch, "empty_like", torch.zeros_like)
    x, A, B, h = random(18, 20), random(3, 20), random(20, 3), random(18, 3)
    before = [t.clone() for t in (x, A, B, h)]
    assert all((ops._drops(x, A, 0.25), ops._pairs(x, B, h), ops._adds(x, h, B)))
    assert all(torch.equal(one, other) for one, other in zip((x, A, B, h), before, strict=True))


def test_kernels_are_off_by_default_and_for_what_they_do_not_know(
    kernels: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    class OnGPU:
        is_cuda, dtype = True, torch.bfloat16

    large: Any = OnGPU()
    assert not ops._uses_kernels(large, random(4, 3))
    monkeypatch.setattr(ops, "_MAY_USE_KERNELS", True)
    assert ops._uses_kernels(large, random(4, 3))
    assert not ops._uses_kernels(random(4, 4), random(4, 3))
    assert not ops._uses_kernels(large, random(4, kernels.HIGHEST_RANK + 1))
    large.dtype = torch.float64
    assert not ops._uses_kernels(large, random(4, 3))


@pytest.mark.parametrize(("missing", "has"), [("nothing", True), ("triton", False), ("triton.knobs", False)])
def test_kernels_need_triton_as_new_as_they_are(missing: str, has: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == missing else "found")
    assert ops._has_triton.__wrapped__() is has


def test_rate_of_the_mask_is_that_of_the_scaling(kernels: ModuleType) -> None:
    for dropout in (0.1, 0.5, 0.001):
        assert kernels._threshold(kept(dropout)) == kept(dropout) * 2**32
