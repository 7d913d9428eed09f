"""Numeric primitives against dense references."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from lightning_lora.analysis.spectrum import (
    above_baseline,
    effective_rank,
    energy_rank,
    intruder_dimensions,
    numerical_rank,
    own_projection,
    projection,
    random_baseline,
    random_projection,
    relate,
    stable_rank,
    subspace_similarity,
    thin_svd,
    update_similarity,
)
from tests.peft_format.models import peft

# --- singular values and ranks


def planted(
    values: list[float], rank: int, shape: tuple[int, int], generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Return factors of an update with these singular values, split by a random invertible matrix."""
    U = torch.linalg.qr(torch.randn(shape[0], rank, dtype=torch.float64, generator=generator))[0]
    V = torch.linalg.qr(torch.randn(shape[1], rank, dtype=torch.float64, generator=generator))[0]
    M = torch.randn(rank, rank, dtype=torch.float64, generator=generator)
    return torch.linalg.solve(M, V.T), U * torch.tensor(values, dtype=torch.float64) @ M


@pytest.mark.parametrize("shape", [(30, 40), (40, 30), (3, 40), (40, 3), (1, 1)])
def test_thin_svd_matches_dense_update(shape: tuple[int, int], rng: torch.Generator):
    A = torch.randn(5, shape[1], dtype=torch.float64, generator=rng)
    B = torch.randn(shape[0], 5, dtype=torch.float64, generator=rng)
    dense = -1.7 * B @ A
    svd = thin_svd(A, B, -1.7)
    count = min(5, *shape)
    torch.testing.assert_close(svd.values, torch.linalg.svdvals(dense)[:count], rtol=0, atol=1e-10)
    torch.testing.assert_close(svd.U * svd.values @ svd.V.T, dense, rtol=0, atol=1e-10)
    torch.testing.assert_close(svd.U.T @ svd.U, torch.eye(count).double(), rtol=0, atol=1e-10)
    torch.testing.assert_close(svd.V.T @ svd.V, torch.eye(count).double(), rtol=0, atol=1e-10)
    assert svd.norm == pytest.approx(float(torch.linalg.matrix_norm(dense)), rel=1e-12)


def test_thin_svd_is_invariant_to_factorization(rng: torch.Generator):
    for _ in range(3):
        A, B = planted([9.0, 3.0, 1.0, 0.5], 4, (50, 20), rng)
        torch.testing.assert_close(
            thin_svd(A, B).values, torch.tensor([9.0, 3.0, 1.0, 0.5]).double(), rtol=0, atol=1e-9
        )


def test_ranks_of_planted_spectrum(rng: torch.Generator):
    A, B = planted([4.0, 2.0, 1.0, 0.0], 4, (30, 20), rng)
    values = thin_svd(A, B).values
    p = [4 / 7, 2 / 7, 1 / 7]
    assert effective_rank(values) == pytest.approx(math.exp(-sum(x * math.log(x) for x in p)))
    assert stable_rank(values) == pytest.approx(21 / 16)
    assert numerical_rank(values) == 3
    assert [energy_rank(values, energy) for energy in (0.5, 16 / 21 + 1e-6, 0.99, 1.0)] == [1, 2, 3, 3]


def test_flat_spectrum_has_full_rank():
    assert effective_rank(torch.ones(6)) == pytest.approx(6)
    assert stable_rank(torch.ones(6)) == pytest.approx(6)
    assert energy_rank(torch.ones(6), 1.0) == 6


def test_zero_update_has_rank_zero():
    values = thin_svd(torch.randn(3, 8), torch.zeros(6, 3)).values
    assert (effective_rank(values), stable_rank(values), energy_rank(values), numerical_rank(values)) == (0, 0, 0, 0)
    assert len(thin_svd(torch.randn(3, 8), torch.zeros(6, 3)).significant().values) == 0


def test_energy_rank_keeps_energy(rng: torch.Generator):
    A, B = torch.randn(12, 30, generator=rng), torch.randn(40, 12, generator=rng)
    svd, dense = thin_svd(A, B), B.double() @ A.double()
    rank = energy_rank(svd.values, 0.9)
    for kept, is_enough in ((rank, True), (rank - 1, False)):
        part = svd.leading(kept)
        lost = torch.linalg.matrix_norm(dense - part.U * part.values @ part.V.T) ** 2
        assert bool(lost <= 0.1 * torch.linalg.matrix_norm(dense) ** 2) is is_enough


@pytest.mark.parametrize("energy", [0.0, -1.0, 1.1])
def test_invalid_energy_raises(energy: float):
    with pytest.raises(ValueError, match="above 0 and at most 1"):
        energy_rank(torch.ones(2), energy)


def test_mismatched_factors_raise():
    with pytest.raises(ValueError, match=r"\(3, 8\) and \(6, 4\)"):
        thin_svd(torch.ones(3, 8), torch.ones(6, 4))


# --- similarity


def by_definition(V1: Tensor, V2: Tensor, i: int, j: int) -> float:
    return float(torch.linalg.matrix_norm(V1[:, :i].T @ V2[:, :j]) ** 2 / min(i, j))


def random_update(rng: torch.Generator, rank: int = 4) -> tuple[Tensor, Tensor]:
    factors = torch.randn(rank, 30, generator=rng), torch.randn(20, rank, generator=rng)
    return factors[0].double(), factors[1].double()


def test_subspace_similarity_matches_definition(rng: torch.Generator):
    A1, A2 = torch.randn(3, 25, generator=rng).double(), torch.randn(6, 25, generator=rng).double()
    V1, V2 = (torch.linalg.svd(A, full_matrices=False)[2].T for A in (A1, A2))
    found = subspace_similarity(A1, A2)
    assert found.shape == (3, 6)
    for i in range(3):
        for j in range(6):
            assert float(found[i, j]) == pytest.approx(by_definition(V1, V2, i + 1, j + 1), abs=1e-12)
    torch.testing.assert_close(subspace_similarity(A2, A1), found.T)


def test_identical_and_orthogonal_subspaces(rng: torch.Generator):
    A = torch.randn(4, 25, generator=rng)
    torch.testing.assert_close(subspace_similarity(A, A).diagonal(), torch.ones(4).double())
    rows = torch.linalg.qr(torch.randn(25, 8, generator=rng).double())[0].T
    assert subspace_similarity(rows[:4], rows[4:]).abs().max() < 1e-25


def test_nested_subspace_has_similarity_one(rng: torch.Generator):
    A = torch.randn(6, 25, generator=rng).double()
    assert float(subspace_similarity(A[:2], A)[1, 5]) == pytest.approx(1)


def test_random_baseline_matches_random_subspaces(rng: torch.Generator):
    draws = [
        subspace_similarity(torch.randn(4, 32, generator=rng), torch.randn(6, 32, generator=rng)) for _ in range(300)
    ]
    mean, baseline = torch.stack(draws).mean(0), random_baseline(4, 6, 32)
    assert float(baseline[1, 4]) == 5 / 32
    assert float((mean.mean() - baseline.mean()).abs() / baseline.mean()) < 0.05
    assert float((mean[3, 5] - baseline[3, 5]).abs() / baseline[3, 5]) < 0.05
    assert above_baseline(mean, 32).abs().max() < 0.02
    assert float(above_baseline(torch.ones(4, 6), 32).min()) == 1.0


def test_zero_directions_are_nan():
    A = torch.randn(3, 10)
    assert subspace_similarity(A, torch.zeros(2, 10)).isnan().all()
    flat = subspace_similarity(A, torch.cat([A[:1], A[:1]]))
    assert not flat[:, 0].isnan().any()
    assert flat[:, 1].isnan().all()


def test_update_similarity_is_invariant_to_factorization(rng: torch.Generator):
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


def test_update_similarity_matches_dense_updates(rng: torch.Generator):
    (A1, B1), (A2, B2) = random_update(rng), random_update(rng, 3)
    found = update_similarity(thin_svd(A1, B1, 2.0), thin_svd(A2, B2, 0.5))
    one, other = (torch.linalg.svd(B @ A, full_matrices=False) for A, B in ((A1, B1), (A2, B2)))
    assert float(found.outputs[1, 2]) == pytest.approx(by_definition(one[0], other[0], 2, 3))
    assert float(found.inputs[3, 1]) == pytest.approx(by_definition(one[2].T, other[2].T, 4, 2))


def test_subspace_similarity_of_b_columns(rng: torch.Generator):
    (_, B1), (_, B2) = random_update(rng), random_update(rng)
    U1, U2 = (torch.linalg.svd(B, full_matrices=False)[0] for B in (B1, B2))
    assert float(subspace_similarity(B1.T, B2.T)[1, 3]) == pytest.approx(by_definition(U1, U2, 2, 4))


def test_mismatched_spaces_raise(rng: torch.Generator):
    with pytest.raises(ValueError, match=r"\(2, 5\) and \(2, 6\)"):
        subspace_similarity(torch.ones(2, 5), torch.ones(2, 6))
    one, other = thin_svd(torch.ones(1, 5), torch.ones(4, 1)), thin_svd(torch.ones(1, 6), torch.ones(4, 1))
    with pytest.raises(ValueError, match="same shape"):
        update_similarity(one, other)


# --- relation to the weight


@pytest.mark.parametrize("rows", [40, 2100])
def test_relation_matches_dense_update(rows: int, rng: torch.Generator):
    W = torch.randn(rows, 30, generator=rng).double()
    A, B = torch.randn(3, 30, generator=rng).double(), torch.randn(rows, 3, generator=rng).double()
    dense = 0.3 * B @ A
    U, values, Vh = torch.linalg.svd(dense, full_matrices=False)
    inside = float(torch.linalg.matrix_norm(U[:, :3].T @ W @ Vh[:3].T))
    weight_norm, norm = float(torch.linalg.matrix_norm(W)), float(torch.linalg.vector_norm(values))
    found = relate(W, thin_svd(A, B, 0.3))
    expected = {
        "weight_norm": weight_norm,
        "update_norm": norm,
        "ratio": norm / weight_norm,
        "projection": inside,
        "random_projection": 3 * weight_norm / math.sqrt(rows * 30),
        "alignment": inside / (3 * weight_norm / math.sqrt(rows * 30)),
        "amplification": norm / inside,
    }
    assert found._asdict() == pytest.approx(expected, rel=1e-10)
    assert projection(W, U[:, :3], Vh[:3].T) == pytest.approx(inside, rel=1e-10)


def test_random_projection_matches_random_directions(rng: torch.Generator):
    W = torch.randn(40, 25, generator=rng).double()
    squares = []
    for _ in range(400):
        svd = thin_svd(torch.randn(4, 25, generator=rng), torch.randn(40, 4, generator=rng))
        squares.append(projection(W, svd.U, svd.V) ** 2)
    expected = random_projection((40, 25), 4) * float(torch.linalg.matrix_norm(W))
    assert math.sqrt(sum(squares) / len(squares)) == pytest.approx(expected, rel=0.05)


def test_update_along_weight_reaches_own_projection(rng: torch.Generator):
    W = torch.randn(40, 25, generator=rng).double()
    U, values, Vh = torch.linalg.svd(W, full_matrices=False)
    found = relate(W, thin_svd(Vh[:2], U[:, :2] * values[:2], 0.1))
    assert found.projection == pytest.approx(own_projection(W, 2))
    assert found.amplification == pytest.approx(0.1)
    assert found.alignment > 5


def test_random_projections_of_paper():
    # Table 7: r = 4 and 64 for W_q of GPT-3, whose norm is 61.95.
    assert round(61.95 * random_projection((12288, 12288), 4), 2) == 0.02
    assert round(61.95 * random_projection((12288, 12288), 64), 2) == pytest.approx(0.33, abs=0.011)


def test_zero_update_has_no_ratios():
    found = relate(torch.randn(6, 8), thin_svd(torch.randn(2, 8), torch.zeros(6, 2)))
    assert (found.ratio, found.projection) == (0, 0)
    assert math.isnan(found.alignment)
    assert math.isnan(found.amplification)


def test_relation_is_invariant_to_factorization_and_reads_bfloat16(rng: torch.Generator):
    W = torch.randn(20, 30, generator=rng).bfloat16()
    A, B = torch.randn(3, 30, generator=rng).double(), torch.randn(20, 3, generator=rng).double()
    M = torch.randn(3, 3, generator=rng).double()
    one, other = relate(W, thin_svd(A, B)), relate(W, thin_svd(M @ A, B @ torch.linalg.inv(M)))
    assert tuple(one) == pytest.approx(tuple(other), rel=1e-8)
    assert one.weight_norm == pytest.approx(float(torch.linalg.matrix_norm(W.double())), rel=1e-12)


def test_mismatched_weight_raises():
    with pytest.raises(ValueError, match="same shape"):
        relate(torch.ones(8, 6), thin_svd(torch.ones(1, 8), torch.ones(6, 1)))


# --- intruder dimensions


def dense_similarity(W: Tensor, delta: Tensor) -> tuple[Tensor, Tensor]:
    U = torch.linalg.svd(W, full_matrices=False)[0]
    adapted = torch.linalg.svd(W + delta, full_matrices=False)
    return (adapted[0].T @ U).abs().amax(1), adapted[1]


@pytest.mark.parametrize("shape", [(120, 90), (90, 120), (12, 200), (200, 12)])
@pytest.mark.parametrize("scaling", [0.02, 0.3])
def test_intruders_match_dense_sum(shape: tuple[int, int], scaling: float, rng: torch.Generator):
    W = torch.randn(*shape, generator=rng).double()
    A, B = torch.randn(4, shape[1], generator=rng).double(), torch.randn(shape[0], 4, generator=rng).double()
    similarity, values = dense_similarity(W, scaling * B @ A)
    found = intruder_dimensions(W, A, B, scaling)
    torch.testing.assert_close(found.values, values[:10], rtol=1e-10, atol=0)
    torch.testing.assert_close(found.similarity, similarity[:10], rtol=0, atol=1e-5)
    assert found.indices == tuple(torch.nonzero(similarity[:10] < 0.5).flatten().tolist())


def test_only_large_random_updates_intrude(rng: torch.Generator):
    W = torch.randn(200, 150, generator=rng) * torch.linspace(3, 0.1, 150)
    A, B = torch.randn(4, 150, generator=rng), torch.randn(200, 4, generator=rng)
    assert intruder_dimensions(W, A, B, 1.0).indices == (0, 1, 2, 3)
    assert intruder_dimensions(W, A, B, 1e-4).indices == ()


def test_intruders_of_low_rank_weight(rng: torch.Generator):
    W = torch.randn(60, 2, generator=rng).double() @ torch.randn(2, 50, generator=rng).double()
    A, B = torch.randn(1, 50, generator=rng).double(), torch.randn(60, 1, generator=rng).double()
    found = intruder_dimensions(W, A, B, 1.0, top_k=3)
    similarity, values = dense_similarity(W, B @ A)
    torch.testing.assert_close(found.values, values[:3], rtol=1e-8, atol=0)
    torch.testing.assert_close(found.similarity[0], similarity[0], rtol=0, atol=1e-5)


@pytest.mark.filterwarnings("ignore")
def test_intruders_match_peft(rng: torch.Generator):
    intruders = pytest.importorskip("peft.tuners.lora.intruders")
    base = nn.Sequential(nn.Linear(90, 120))
    model = peft.get_peft_model(base, peft.LoraConfig(r=4, lora_alpha=2, target_modules=["0"]))
    layer = model.base_model.model[0]
    with torch.no_grad():
        layer.lora_B.default.weight.copy_(torch.randn(120, 4, generator=rng))
    W, A, B = layer.base_layer.weight, layer.lora_A.default.weight, layer.lora_B.default.weight
    found = intruder_dimensions(W, A, B, 0.5)
    said: list[str] = []
    intruders.reduce_intruder_dimension(model, logging_sink=said.append)
    assert len(found.indices) > 0
    assert f"0: Intruders: {len(found.indices)}" in said[0]
    # PEFT does not tell which ones, but what it makes of them does: a quarter of each is gone.
    delta = 0.5 * (B @ A).double()
    U, values, Vh = torch.linalg.svd(W.double() + delta, full_matrices=False)
    chosen = list(found.indices)
    less = delta - 0.25 * U[:, chosen] * values[chosen] @ Vh[chosen]
    U, values, Vh = torch.linalg.svd(less, full_matrices=False)
    expected = U[:, :4] * values[:4] @ Vh[:4]
    torch.testing.assert_close(layer.get_delta_weight("intruder_reduced").double(), expected, rtol=0, atol=1e-4)
