"""How much two updates, or two factors, share: the overlap of the subspaces that their leading directions span.

``phi(i, j) = |V1_i.T @ V2_j|_F^2 / min(i, j)`` lies between 0, nothing shared, and 1, the smaller one inside the other.
Source: Hu et al. 2021, "LoRA", arXiv:2106.09685, section 7.2 and appendix G, equation 4.

The directions of ``A`` alone depend on how the update is split into its factors (``M A`` and ``B M^-1`` give the same
update); the paper looks at them, and so can you. Those of the update do not: prefer ``update_similarity`` for claims.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from lightning_lora.analysis.spectrum import ThinSVD, numerical_rank


class UpdateSimilarity(NamedTuple):
    """``phi`` of two updates: of their outputs' directions (``U``) and of their inputs' (``V``)."""

    outputs: Tensor
    inputs: Tensor


@torch.no_grad()
def subspace_similarity(A1: Tensor, A2: Tensor) -> Tensor:
    """Return ``phi`` of the leading right singular vectors of two factors, for all i and j at once.

    Args:
        A1: ``(r1, k)``; for the columns of a factor ``B``, give ``B.T``.
        A2: ``(r2, k)``.

    Returns:
        ``(r1, r2)``, float64: ``[i - 1, j - 1]`` is ``phi(i, j)``. Directions beyond a factor's numerical rank are
        arbitrary, and NaN here: a factor of zeros resembles nothing.

    Raises:
        ValueError: The factors have other numbers of columns.
    """
    if A1.ndim != 2 or A2.ndim != 2 or A1.shape[1] != A2.shape[1]:
        raise ValueError(f"The factors must be (r1, k) and (r2, k), got {tuple(A1.shape)} and {tuple(A2.shape)}.")
    (V1, rank1), (V2, rank2) = _right_directions(A1), _right_directions(A2)
    return _phi(V1, V2, rank1, rank2)


@torch.no_grad()
def update_similarity(one: ThinSVD, other: ThinSVD) -> UpdateSimilarity:
    """Return ``phi`` of two updates, which does not depend on how they are split into factors.

    Args:
        one: ``thin_svd`` of one update of ``(out, in)``, with ``q1`` directions.
        other: The same of the other, with ``q2``.

    Returns:
        Two tensors ``(q1, q2)``, with NaN beyond the numerical ranks.
    """
    if one.U.shape[0] != other.U.shape[0] or one.V.shape[0] != other.V.shape[0]:
        shapes = [(svd.U.shape[0], svd.V.shape[0]) for svd in (one, other)]
        raise ValueError(f"The updates must be of matrices of one shape, got {shapes[0]} and {shapes[1]}.")
    ranks = numerical_rank(one.values), numerical_rank(other.values)
    return UpdateSimilarity(_phi(one.U, other.U, *ranks), _phi(one.V, other.V, *ranks))


def random_baseline(rows: int, columns: int, dimension: int) -> Tensor:
    """Return the mean of ``phi`` over random subspaces: ``max(i, j) / dimension``.

    Args:
        rows: Largest i.
        columns: Largest j.
        dimension: Of the space that the subspaces are in: the number of columns of ``A``.

    Returns:
        ``(rows, columns)``, float64.
    """
    i, j = torch.arange(1, rows + 1), torch.arange(1, columns + 1)
    return torch.maximum(i.unsqueeze(1), j).double() / dimension


def above_baseline(phi: Tensor, dimension: int) -> Tensor:
    """Return ``(phi - baseline) / (1 - baseline)``: 0 is what chance gives, 1 is a subspace inside the other."""
    baseline = random_baseline(phi.shape[0], phi.shape[1], dimension)
    return (phi - baseline) / (1 - baseline)


def _right_directions(A: Tensor) -> tuple[Tensor, int]:
    # Of the r x r triangle: the vectors of a wide factor are found at the price of its rank.
    Q, R = torch.linalg.qr(A.cpu().double().T)
    U, values, _ = torch.linalg.svd(R, full_matrices=False)
    return Q @ U, numerical_rank(values)


def _phi(V1: Tensor, V2: Tensor, rank1: int, rank2: int) -> Tensor:
    shared = (V1.T @ V2).square().cumsum(0).cumsum(1)
    i, j = torch.arange(1, V1.shape[1] + 1), torch.arange(1, V2.shape[1] + 1)
    phi = shared / torch.minimum(i.unsqueeze(1), j)
    phi[rank1:], phi[:, rank2:] = torch.nan, torch.nan
    return phi
