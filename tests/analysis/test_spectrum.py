from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from lightning_lora.analysis import effective_rank, energy_rank, numerical_rank, stable_rank, thin_svd, update_norm


def planted(
    values: list[float], rank: int, shape: tuple[int, int], generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Return factors of an update with these singular values, split by a random invertible matrix."""
    U = torch.linalg.qr(torch.randn(shape[0], rank, dtype=torch.float64, generator=generator))[0]
    V = torch.linalg.qr(torch.randn(shape[1], rank, dtype=torch.float64, generator=generator))[0]
    M = torch.randn(rank, rank, dtype=torch.float64, generator=generator)
    return torch.linalg.solve(M, V.T), U * torch.tensor(values, dtype=torch.float64) @ M


@pytest.mark.parametrize("shape", [(30, 40), (40, 30), (3, 40), (40, 3), (1, 1)])
def test_thin_svd_is_that_of_the_formed_update(shape: tuple[int, int], rng: torch.Generator):
    A = torch.randn(5, shape[1], dtype=torch.float64, generator=rng)
    B = torch.randn(shape[0], 5, dtype=torch.float64, generator=rng)
    dense = -1.7 * B @ A
    svd = thin_svd(A, B, -1.7)
    count = min(5, *shape)
    torch.testing.assert_close(svd.values, torch.linalg.svdvals(dense)[:count], rtol=0, atol=1e-10)
    torch.testing.assert_close(svd.U * svd.values @ svd.V.T, dense, rtol=0, atol=1e-10)
    torch.testing.assert_close(svd.U.T @ svd.U, torch.eye(count).double(), rtol=0, atol=1e-10)
    torch.testing.assert_close(svd.V.T @ svd.V, torch.eye(count).double(), rtol=0, atol=1e-10)
    assert update_norm(A, B, -1.7) == pytest.approx(float(torch.linalg.matrix_norm(dense)), rel=1e-12)


def test_planted_singular_values_are_found_however_the_update_is_split(rng: torch.Generator):
    for _ in range(3):
        A, B = planted([9.0, 3.0, 1.0, 0.5], 4, (50, 20), rng)
        torch.testing.assert_close(
            thin_svd(A, B).values, torch.tensor([9.0, 3.0, 1.0, 0.5]).double(), rtol=0, atol=1e-9
        )


def test_ranks_of_a_planted_spectrum(rng: torch.Generator):
    A, B = planted([4.0, 2.0, 1.0, 0.0], 4, (30, 20), rng)
    values = thin_svd(A, B).values
    p = [4 / 7, 2 / 7, 1 / 7]
    assert effective_rank(values) == pytest.approx(math.exp(-sum(x * math.log(x) for x in p)))
    assert stable_rank(values) == pytest.approx(21 / 16)
    assert numerical_rank(values) == 3
    assert [energy_rank(values, energy) for energy in (0.5, 16 / 21 + 1e-6, 0.99, 1.0)] == [1, 2, 3, 3]


def test_equal_singular_values_have_the_full_effective_rank():
    assert effective_rank(torch.ones(6)) == pytest.approx(6)
    assert stable_rank(torch.ones(6)) == pytest.approx(6)
    assert energy_rank(torch.ones(6), 1.0) == 6


def test_no_update_has_no_rank():
    values = thin_svd(torch.randn(3, 8), torch.zeros(6, 3)).values
    assert (effective_rank(values), stable_rank(values), energy_rank(values), numerical_rank(values)) == (0, 0, 0, 0)
    assert len(thin_svd(torch.randn(3, 8), torch.zeros(6, 3)).significant().values) == 0


def test_the_suggested_rank_keeps_the_energy(rng: torch.Generator):
    A, B = torch.randn(12, 30, generator=rng), torch.randn(40, 12, generator=rng)
    svd, dense = thin_svd(A, B), B.double() @ A.double()
    rank = energy_rank(svd.values, 0.9)
    for kept, is_enough in ((rank, True), (rank - 1, False)):
        part = svd.leading(kept)
        lost = torch.linalg.matrix_norm(dense - part.U * part.values @ part.V.T) ** 2
        assert bool(lost <= 0.1 * torch.linalg.matrix_norm(dense) ** 2) is is_enough


@pytest.mark.parametrize("energy", [0.0, -1.0, 1.1])
def test_a_share_is_a_share(energy: float):
    with pytest.raises(ValueError, match="above 0 and at most 1"):
        energy_rank(torch.ones(2), energy)


def test_factors_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"\(3, 8\) and \(6, 4\)"):
        thin_svd(torch.ones(3, 8), torch.ones(6, 4))
