"""Changes of basis: the product stays, and training goes on as in the other basis."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lightning_lora import LoRAConfig, attach
from lightning_lora.layers import LowRankAdapter
from lightning_lora.ranks.basis import (
    has_turnable_states,
    reorder_states,
    to_singular_directions,
    turn_factors,
    turn_states,
)
from lightning_lora.ranks.controller import scheduled


def adapter_of(module: nn.Module) -> LowRankAdapter:
    attach(module, LoRAConfig(rank=4, target_modules="all", adapter_dtype="float64"))
    [adapter] = scheduled(module)[0].values()
    nn.init.normal_(adapter.A)
    nn.init.normal_(adapter.B)
    return adapter


@pytest.mark.parametrize("module", [nn.Linear(9, 8), nn.Embedding(9, 8)], ids=["linear", "embedding"])
def test_components_become_singular_directions_and_their_sum_stays(module: nn.Module) -> None:
    adapter = adapter_of(module)
    product = (adapter.B @ adapter.A).detach()
    part = (adapter.B[:, :3] @ adapter.A[:3]).detach()
    out = adapter.A[3].clone(), adapter.B[:, 3].clone()
    turn = to_singular_directions(adapter, 3)
    assert turn is not None
    turn_factors(adapter, turn)
    assert torch.allclose(adapter.B @ adapter.A, product, atol=1e-12)
    assert torch.equal(adapter.A[3], out[0])
    assert torch.equal(adapter.B[:, 3], out[1])
    A, B = adapter.A[:3].detach(), adapter.B[:, :3].detach()
    for gram in (A @ A.T, B.T @ B):
        assert torch.allclose(gram, gram.diagonal().diag(), atol=1e-10)
    expected = torch.linalg.svdvals(part)[:3]
    assert torch.allclose(A.norm(dim=1) * B.norm(dim=0), expected)


def test_a_factor_without_full_rank_keeps_its_basis() -> None:
    adapter = adapter_of(nn.Linear(9, 8))
    with torch.no_grad():
        adapter.A[1] = adapter.A[0]
    assert to_singular_directions(adapter, 4) is None


def test_momentum_goes_on_as_in_the_other_basis() -> None:
    """A first-order step is the same function of the product in both: ``B m_A + m_B A`` stays."""
    adapter = adapter_of(nn.Linear(9, 8))
    optimizer = torch.optim.SGD([adapter.A, adapter.B], lr=0.1, momentum=0.9)
    gradient = torch.randn(8, 9, dtype=torch.float64)
    adapter.A.grad, adapter.B.grad = adapter.B.detach().T @ gradient, gradient @ adapter.A.detach().T
    optimizer.step()
    A, B = adapter.A.detach().clone(), adapter.B.detach().clone()
    turn = to_singular_directions(adapter, 4)
    assert turn is not None
    expected_A, expected_B = B.T @ gradient, gradient @ A.T  # gradients where the factors are now
    for factor, value in ((adapter.A, expected_A), (adapter.B, expected_B)):
        optimizer.state[factor]["momentum_buffer"].copy_(value)
    turn_factors(adapter, turn)
    turn_states(adapter, turn, optimizer)
    for factor, value in (
        (adapter.A, adapter.B.detach().T @ gradient),
        (adapter.B, gradient @ adapter.A.detach().T),
    ):
        assert torch.allclose(optimizer.state[factor]["momentum_buffer"], value, atol=1e-10)


def test_squares_of_gradients_become_their_mean() -> None:
    adapter = adapter_of(nn.Linear(9, 8))
    optimizer = torch.optim.Adam([adapter.A, adapter.B])
    for factor in (adapter.A, adapter.B):
        factor.grad = torch.randn_like(factor)
    optimizer.step()
    before = optimizer.state[adapter.B]["exp_avg_sq"].clone()
    turn = to_singular_directions(adapter, 2)
    assert turn is not None
    turn_states(adapter, turn, optimizer)
    after = optimizer.state[adapter.B]["exp_avg_sq"]
    assert torch.allclose(after[:, :2], before[:, :2].mean().expand(8, 2))
    assert torch.equal(after[:, 2:], before[:, 2:])
    assert optimizer.state[adapter.B]["step"] == 1


def test_codes_of_quantized_states_are_not_taken_for_numbers() -> None:
    adapter = adapter_of(nn.Linear(9, 8))
    optimizer = torch.optim.SGD([adapter.A, adapter.B], lr=0.1)
    assert has_turnable_states(adapter, optimizer)
    optimizer.state[adapter.B]["state1"] = torch.zeros(adapter.B.shape, dtype=torch.uint8)
    assert not has_turnable_states(adapter, optimizer)


def test_codes_of_quantized_states_begin_anew_in_another_order() -> None:
    adapter, other = adapter_of(nn.Linear(9, 8)), nn.Parameter(torch.ones(3))
    optimizer = torch.optim.SGD([adapter.A, adapter.B, other], lr=0.1)
    for parameter in (adapter.B, other):
        optimizer.state[parameter]["state1"] = torch.ones(parameter.shape, dtype=torch.uint8)
    reorder_states(adapter, torch.tensor([1, 0, 2, 3]), optimizer)
    assert list(optimizer.state) == [other]
