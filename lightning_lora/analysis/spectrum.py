"""The singular values and directions of an update, from its factors alone, and what they say of its rank.

Letters: ``r`` rank, ``s`` scaling, ``q`` the smaller of the rank and the update's own dimensions. The update
``s * B @ A`` is never formed. Everything is computed in float64: some of the values are small.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

NUMERICAL_ZERO = 1e-6  # of the largest singular value: float32 factors say nothing below


class ThinSVD(NamedTuple):
    """``s * B @ A = U @ diag(values) @ V.T``.

    Attributes:
        values: Singular values in descending order, ``(q,)``.
        U: Directions of the output, one a column, ``(out, q)``.
        V: Directions of the input, one a column, ``(in, q)``.
    """

    values: Tensor
    U: Tensor
    V: Tensor

    def leading(self, count: int) -> ThinSVD:
        """Return the first directions alone."""
        return ThinSVD(self.values[:count], self.U[:, :count], self.V[:, :count])

    def significant(self) -> ThinSVD:
        """Return the directions that the update has; those of singular values of zero are arbitrary."""
        return self.leading(numerical_rank(self.values))


@torch.no_grad()
def thin_svd(A: Tensor, B: Tensor, scaling: float = 1.0) -> ThinSVD:
    """Return the singular value decomposition of ``scaling * B @ A``, in ``O((out + in) r^2)``.

    ``B = Q_B R_B`` and ``A.T = Q_A R_A`` leave the r x r matrix ``s * R_B @ R_A.T`` to decompose.

    Args:
        A: ``(r, in)``.
        B: ``(out, r)``.
        scaling: ``s``.

    Raises:
        ValueError: The factors do not fit each other.
    """
    if A.ndim != 2 or B.ndim != 2 or A.shape[0] != B.shape[1]:
        raise ValueError(f"A must be (rank, in) and B (out, rank), got {tuple(A.shape)} and {tuple(B.shape)}.")
    Q_B, R_B = torch.linalg.qr(B.cpu().double())
    Q_A, R_A = torch.linalg.qr(A.cpu().double().T)
    U, values, V = torch.linalg.svd(scaling * R_B @ R_A.T, full_matrices=False)
    return ThinSVD(values, Q_B @ U, Q_A @ V.T)


@torch.no_grad()
def update_norm(A: Tensor, B: Tensor, scaling: float = 1.0) -> float:
    """Return the Frobenius norm of ``scaling * B @ A``, which is that of its singular values."""
    return float(torch.linalg.vector_norm(thin_svd(A, B, scaling).values))


def effective_rank(values: Tensor) -> float:
    """Return ``exp`` of the entropy of the singular values as shares of their sum: 1 to their number; 0 for no update.

    Source:
        Roy and Vetterli 2007, "The effective rank: a measure of effective dimensionality", definition 1.
    """
    total = values.sum()
    if not total > 0:
        return 0.0
    return float(torch.special.entr(values.double() / total).sum().exp())


def stable_rank(values: Tensor) -> float:
    """Return the squared Frobenius norm over the squared largest singular value; 0 for no update."""
    if not (values.numel() and values[0] > 0):
        return 0.0
    return float((values.double() / values[0]).square().sum())


def energy_rank(values: Tensor, energy: float = 0.99) -> int:
    """Return how many directions hold this share of the squared norm; 0 for no update.

    It is the rank to suggest for another run: truncated to it, the update keeps ``sqrt(energy)`` of its norm.

    Raises:
        ValueError: The share is not above 0 and at most 1.
    """
    if not 0 < energy <= 1:
        raise ValueError(f"energy must be above 0 and at most 1, got {energy!r}.")
    squares = values.double().square()
    if not squares.sum() > 0:
        return 0
    held = squares.cumsum(0) / squares.sum()
    # Of a share of 1, rounding in the sum must not ask for directions that hold nothing.
    return min(int((held < energy - 1e-12).sum()) + 1, len(values))


def numerical_rank(values: Tensor, tolerance: float = NUMERICAL_ZERO) -> int:
    """Return how many singular values are above ``tolerance`` times the largest."""
    return int((values > tolerance * values.max()).sum()) if values.numel() else 0
