from __future__ import annotations

import math

import pytest
import torch

from lightning_lora.analysis import own_projection, projection, random_projection, relate, thin_svd


@pytest.mark.parametrize("rows", [40, 2100])
def test_the_relation_is_that_of_the_formed_update(rows: int, rng: torch.Generator):
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


def test_random_directions_catch_what_the_baseline_says(rng: torch.Generator):
    W = torch.randn(40, 25, generator=rng).double()
    squares = []
    for _ in range(400):
        svd = thin_svd(torch.randn(4, 25, generator=rng), torch.randn(40, 4, generator=rng))
        squares.append(projection(W, svd.U, svd.V) ** 2)
    expected = random_projection((40, 25), 4) * float(torch.linalg.matrix_norm(W))
    assert math.sqrt(sum(squares) / len(squares)) == pytest.approx(expected, rel=0.05)


def test_an_update_along_the_weight_is_aligned_as_far_as_can_be(rng: torch.Generator):
    W = torch.randn(40, 25, generator=rng).double()
    U, values, Vh = torch.linalg.svd(W, full_matrices=False)
    found = relate(W, thin_svd(Vh[:2], U[:, :2] * values[:2], 0.1))
    assert found.projection == pytest.approx(own_projection(W, 2))
    assert found.amplification == pytest.approx(0.1)
    assert found.alignment > 5


def test_the_papers_random_projections_follow():
    # Table 7: r = 4 and 64 for W_q of GPT-3, whose norm is 61.95.
    assert round(61.95 * random_projection((12288, 12288), 4), 2) == 0.02
    assert round(61.95 * random_projection((12288, 12288), 64), 2) == pytest.approx(0.33, abs=0.011)


def test_no_update_has_no_ratios():
    found = relate(torch.randn(6, 8), thin_svd(torch.randn(2, 8), torch.zeros(6, 2)))
    assert (found.ratio, found.projection) == (0, 0)
    assert math.isnan(found.alignment)
    assert math.isnan(found.amplification)


def test_the_factors_do_not_matter_and_bfloat16_weights_are_read(rng: torch.Generator):
    W = torch.randn(20, 30, generator=rng).bfloat16()
    A, B = torch.randn(3, 30, generator=rng).double(), torch.randn(20, 3, generator=rng).double()
    M = torch.randn(3, 3, generator=rng).double()
    one, other = relate(W, thin_svd(A, B)), relate(W, thin_svd(M @ A, B @ torch.linalg.inv(M)))
    assert tuple(one) == pytest.approx(tuple(other), rel=1e-8)
    assert one.weight_norm == pytest.approx(float(torch.linalg.matrix_norm(W.double())), rel=1e-12)


def test_a_weight_of_another_shape_is_refused():
    with pytest.raises(ValueError, match="one shape"):
        relate(torch.ones(8, 6), thin_svd(torch.ones(1, 8), torch.ones(6, 1)))
