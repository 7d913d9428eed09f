from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lightning_lora.analysis import (
    above_baseline,
    random_baseline,
    subspace_similarity,
    thin_svd,
    update_similarity,
)


def by_definition(V1: Tensor, V2: Tensor, i: int, j: int) -> float:
    return float(torch.linalg.matrix_norm(V1[:, :i].T @ V2[:, :j]) ** 2 / min(i, j))


def random_update(rng: torch.Generator, rank: int = 4) -> tuple[Tensor, Tensor]:
    factors = torch.randn(rank, 30, generator=rng), torch.randn(20, rank, generator=rng)
    return factors[0].double(), factors[1].double()


def test_phi_is_the_papers_for_every_i_and_j(rng: torch.Generator):
    A1, A2 = torch.randn(3, 25, generator=rng).double(), torch.randn(6, 25, generator=rng).double()
    V1, V2 = (torch.linalg.svd(A, full_matrices=False)[2].T for A in (A1, A2))
    found = subspace_similarity(A1, A2)
    assert found.shape == (3, 6)
    for i in range(3):
        for j in range(6):
            assert float(found[i, j]) == pytest.approx(by_definition(V1, V2, i + 1, j + 1), abs=1e-12)
    torch.testing.assert_close(subspace_similarity(A2, A1), found.T)


def test_a_subspace_is_itself_and_nothing_of_an_orthogonal_one(rng: torch.Generator):
    A = torch.randn(4, 25, generator=rng)
    torch.testing.assert_close(subspace_similarity(A, A).diagonal(), torch.ones(4).double())
    rows = torch.linalg.qr(torch.randn(25, 8, generator=rng).double())[0].T
    assert subspace_similarity(rows[:4], rows[4:]).abs().max() < 1e-25


def test_a_subspace_inside_another_is_one(rng: torch.Generator):
    A = torch.randn(6, 25, generator=rng).double()
    assert float(subspace_similarity(A[:2], A)[1, 5]) == pytest.approx(1)


def test_random_subspaces_share_what_the_baseline_says(rng: torch.Generator):
    draws = [
        subspace_similarity(torch.randn(4, 32, generator=rng), torch.randn(6, 32, generator=rng)) for _ in range(300)
    ]
    mean, baseline = torch.stack(draws).mean(0), random_baseline(4, 6, 32)
    assert float(baseline[1, 4]) == 5 / 32
    assert float((mean.mean() - baseline.mean()).abs() / baseline.mean()) < 0.05
    assert float((mean[3, 5] - baseline[3, 5]).abs() / baseline[3, 5]) < 0.05
    assert above_baseline(mean, 32).abs().max() < 0.02
    assert float(above_baseline(torch.ones(4, 6), 32).min()) == 1.0


def test_directions_of_zeros_resemble_nothing():
    A = torch.randn(3, 10)
    assert subspace_similarity(A, torch.zeros(2, 10)).isnan().all()
    flat = subspace_similarity(A, torch.cat([A[:1], A[:1]]))
    assert not flat[:, 0].isnan().any()
    assert flat[:, 1].isnan().all()


def test_similarity_of_updates_does_not_depend_on_their_factors(rng: torch.Generator):
    (A1, B1), (A2, B2) = random_update(rng), random_update(rng, 3)
    M = torch.randn(4, 4, generator=rng).double()
    other_A, other_B = M @ A1, B1 @ torch.linalg.inv(M)
    before = update_similarity(thin_svd(A1, B1), thin_svd(A2, B2))
    after = update_similarity(thin_svd(other_A, other_B), thin_svd(A2, B2))
    torch.testing.assert_close(after, before)
    # All of A spans the same either way; its leading directions do not.
    by_factor = subspace_similarity(A1, A2), subspace_similarity(other_A, A2)
    assert float((by_factor[0][0] - by_factor[1][0]).abs().max()) > 1e-3
    torch.testing.assert_close(by_factor[0][-1, -1], by_factor[1][-1, -1])


def test_similarity_of_updates_is_that_of_the_formed_ones(rng: torch.Generator):
    (A1, B1), (A2, B2) = random_update(rng), random_update(rng, 3)
    found = update_similarity(thin_svd(A1, B1, 2.0), thin_svd(A2, B2, 0.5))
    one, other = (torch.linalg.svd(B @ A, full_matrices=False) for A, B in ((A1, B1), (A2, B2)))
    assert float(found.outputs[1, 2]) == pytest.approx(by_definition(one[0], other[0], 2, 3))
    assert float(found.inputs[3, 1]) == pytest.approx(by_definition(one[2].T, other[2].T, 4, 2))


def test_the_columns_of_b_are_compared_transposed(rng: torch.Generator):
    (_, B1), (_, B2) = random_update(rng), random_update(rng)
    U1, U2 = (torch.linalg.svd(B, full_matrices=False)[0] for B in (B1, B2))
    assert float(subspace_similarity(B1.T, B2.T)[1, 3]) == pytest.approx(by_definition(U1, U2, 2, 4))


def test_other_spaces_are_refused(rng: torch.Generator):
    with pytest.raises(ValueError, match=r"\(2, 5\) and \(2, 6\)"):
        subspace_similarity(torch.ones(2, 5), torch.ones(2, 6))
    one, other = thin_svd(torch.ones(1, 5), torch.ones(4, 1)), thin_svd(torch.ones(1, 6), torch.ones(4, 1))
    with pytest.raises(ValueError, match="one shape"):
        update_similarity(one, other)
