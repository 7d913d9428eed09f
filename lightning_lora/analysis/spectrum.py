"""Numeric primitives: the spectrum of an update, what two updates share, and how an update relates to its weight.

Letters: ``W`` weight, ``r`` rank, ``s`` scaling, ``U`` and ``V`` the update's output and input directions, one per
column, ``q`` their number. The update ``s * B @ A`` is never formed. Everything is computed in float64, because some of
the values are small.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable
from dataclasses import is_dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

NUMERICAL_ZERO = 1e-6  # of the largest singular value: float32 factors say nothing below it
_ROWS_AT_ONCE = 512  # larger blocks leave the processor's cache; with smaller ones, threads mostly wait for each other


# --- singular values and ranks


class ThinSVD(NamedTuple):
    """The decomposition ``s * B @ A = U @ diag(values) @ V.T``.

    Attributes:
        values: Singular values in descending order, ``(q,)``.
        U: Output directions, one per column, ``(out, q)``.
        V: Input directions, one per column, ``(in, q)``.
    """

    values: Tensor
    U: Tensor
    V: Tensor

    @property
    def norm(self) -> float:
        """Frobenius norm of the update."""
        return float(torch.linalg.vector_norm(self.values))

    def leading(self, count: int) -> ThinSVD:
        """Return the first ``count`` directions."""
        return ThinSVD(self.values[:count], self.U[:, :count], self.V[:, :count])

    def significant(self) -> ThinSVD:
        """Return the directions with nonzero singular values; the others are arbitrary."""
        return self.leading(numerical_rank(self.values))


@torch.no_grad()
def thin_svd(A: Tensor, B: Tensor, scaling: float = 1.0) -> ThinSVD:
    """Return the singular value decomposition of ``scaling * B @ A``, in ``O((out + in) r^2)``.

    With ``B = Q_B R_B`` and ``A.T = Q_A R_A``, only the r x r matrix ``s * R_B @ R_A.T`` is decomposed.

    Args:
        A: ``(r, in)``.
        B: ``(out, r)``.
        scaling: ``s``.

    Raises:
        ValueError: The shapes of the factors do not match.
    """
    if A.ndim != 2 or B.ndim != 2 or A.shape[0] != B.shape[1]:
        raise ValueError(f"A must be (rank, in) and B (out, rank), got {tuple(A.shape)} and {tuple(B.shape)}.")
    Q_B, R_B = torch.linalg.qr(B.cpu().double())
    Q_A, R_A = torch.linalg.qr(A.cpu().double().T)
    U, values, V = torch.linalg.svd(scaling * R_B @ R_A.T, full_matrices=False)
    return ThinSVD(values, Q_B @ U, Q_A @ V.T)


def effective_rank(values: Tensor) -> float:
    """Return ``exp`` of the entropy of the normalized singular values: from 1 to their number; 0 for a zero update.

    Source:
        Roy and Vetterli 2007, "The effective rank: a measure of effective dimensionality", definition 1.
    """
    total = values.sum()
    if not total > 0:
        return 0.0
    return float(torch.special.entr(values.double() / total).sum().exp())


def stable_rank(values: Tensor) -> float:
    """Return the squared Frobenius norm over the squared largest singular value; 0 for a zero update."""
    if not (values.numel() and values[0] > 0):
        return 0.0
    return float((values.double() / values[0]).square().sum())


def energy_rank(values: Tensor, energy: float = 0.99) -> int:
    """Return how many directions hold this share of the squared norm; 0 for a zero update.

    This is the rank to suggest for another run: truncated to it, the update keeps ``sqrt(energy)`` of its norm.

    Raises:
        ValueError: ``energy`` is outside (0, 1].
    """
    if not 0 < energy <= 1:
        raise ValueError(f"energy must be above 0 and at most 1, got {energy!r}.")
    squares = values.double().square()
    if not squares.sum() > 0:
        return 0
    held = squares.cumsum(0) / squares.sum()
    # With energy=1, rounding in the sum must not ask for directions that hold nothing.
    return min(int((held < energy - 1e-12).sum()) + 1, len(values))


def numerical_rank(values: Tensor, tolerance: float = NUMERICAL_ZERO) -> int:
    """Return how many singular values are above ``tolerance`` times the largest."""
    return int((values > tolerance * values.max()).sum()) if values.numel() else 0


def known_median(values: Iterable[float]) -> float:
    """Return the median of the values that are not NaN; NaN if there are none."""
    known = [value for value in values if not math.isnan(value)]
    return statistics.median(known) if known else math.nan


def plain(found: Any) -> Any:
    """Return results as plain values, for JSON: unknown numbers are None, tensors are lists with four decimals."""
    if isinstance(found, Tensor):
        return plain([plain(row) for row in found] if found.ndim > 1 else [round(value, 4) for value in found.tolist()])
    if isinstance(found, tuple) and hasattr(found, "_asdict"):
        return plain(found._asdict())
    if is_dataclass(found):
        return plain(vars(found))
    if isinstance(found, dict):
        return {key: plain(value) for key, value in found.items()}
    if isinstance(found, (list, tuple)):
        return [plain(value) for value in found]
    return None if isinstance(found, float) and math.isnan(found) else found


# --- similarity of two updates, or of two factors
#
# phi(i, j) = |V1_i.T @ V2_j|_F^2 / min(i, j) compares the spans of the i and the j leading directions: 0 if they share
# nothing, 1 if the smaller lies inside the larger. Source: Hu et al. 2021, "LoRA", arXiv:2106.09685, section 7.2 and
# appendix G, equation 4. The paper compares the directions of A alone, which depend on how the update is split into
# factors (M @ A and B @ M^-1 give the same update). Those of the update do not: base claims on `update_similarity`.


class UpdateSimilarity(NamedTuple):
    """``phi`` of two updates: of their output directions (``U``) and of their input directions (``V``)."""

    outputs: Tensor
    inputs: Tensor


@torch.no_grad()
def subspace_similarity(A1: Tensor, A2: Tensor) -> Tensor:
    """Return ``phi`` of the leading right singular vectors of two factors, for all i and j at once.

    Args:
        A1: ``(r1, k)``; for the columns of a factor ``B``, pass ``B.T``.
        A2: ``(r2, k)``.

    Returns:
        ``(r1, r2)``, float64: ``[i - 1, j - 1]`` is ``phi(i, j)``. Directions beyond a factor's numerical rank are
        arbitrary, and NaN here.

    Raises:
        ValueError: The factors differ in their number of columns.
    """
    if A1.ndim != 2 or A2.ndim != 2 or A1.shape[1] != A2.shape[1]:
        raise ValueError(f"The factors must be (r1, k) and (r2, k), got {tuple(A1.shape)} and {tuple(A2.shape)}.")
    one, other = (thin_svd(A, torch.eye(len(A))) for A in (A1, A2))
    return _phi(one.V, other.V, numerical_rank(one.values), numerical_rank(other.values))


@torch.no_grad()
def update_similarity(one: ThinSVD, other: ThinSVD) -> UpdateSimilarity:
    """Return ``phi`` of two updates, which does not depend on how they are split into factors.

    Args:
        one: ``thin_svd`` of one update of ``(out, in)``, with ``q1`` directions.
        other: That of the other, with ``q2`` directions.

    Returns:
        Two tensors ``(q1, q2)``, NaN beyond the numerical ranks.

    Raises:
        ValueError: The updates differ in shape.
    """
    if one.U.shape[0] != other.U.shape[0] or one.V.shape[0] != other.V.shape[0]:
        shapes = [(svd.U.shape[0], svd.V.shape[0]) for svd in (one, other)]
        raise ValueError(f"The updates must have the same shape, got {shapes[0]} and {shapes[1]}.")
    ranks = numerical_rank(one.values), numerical_rank(other.values)
    return UpdateSimilarity(_phi(one.U, other.U, *ranks), _phi(one.V, other.V, *ranks))


@torch.no_grad()
def update_cosine(one: ThinSVD, other: ThinSVD) -> float:
    """Return the cosine of the angle between two updates as vectors, without forming them; NaN if one is zero."""
    scale = one.norm * other.norm
    # <U1 S1 V1', U2 S2 V2'> = sum over i, j of s1_i s2_j (U1'U2)_ij (V1'V2)_ij
    shared = (one.U.T @ other.U) * (one.V.T @ other.V)
    return float(one.values @ shared @ other.values) / scale if scale else math.nan


def random_baseline(rows: int, columns: int, dimension: int) -> Tensor:
    """Return the mean of ``phi`` over random subspaces of a space: ``max(i, j) / dimension``, ``(rows, columns)``."""
    i, j = torch.arange(1, rows + 1), torch.arange(1, columns + 1)
    return torch.maximum(i.unsqueeze(1), j).double() / dimension


def above_baseline(phi: Tensor, dimension: int) -> Tensor:
    """Return ``(phi - baseline) / (1 - baseline)``: 0 is chance, 1 is one subspace inside the other."""
    baseline = random_baseline(phi.shape[0], phi.shape[1], dimension)
    return (phi - baseline) / (1 - baseline)


def _phi(V1: Tensor, V2: Tensor, rank1: int, rank2: int) -> Tensor:
    shared = (V1.T @ V2).square().cumsum(0).cumsum(1)
    i, j = torch.arange(1, V1.shape[1] + 1), torch.arange(1, V2.shape[1] + 1)
    phi = shared / torch.minimum(i.unsqueeze(1), j)
    phi[rank1:], phi[:, rank2:] = torch.nan, torch.nan
    return phi


# --- relation of an update to its weight


class Relation(NamedTuple):
    """The numbers of the LoRA paper's table 7 for one layer.

    Attributes:
        weight_norm: Frobenius norm of ``W``.
        update_norm: Frobenius norm of the update.
        ratio: The update's norm over the weight's.
        projection: ``|U.T @ W @ V|_F``: how much of the weight lies in the update's directions.
        random_projection: The same for random directions: ``r |W|_F / sqrt(out * in)``.
        alignment: ``projection`` over ``random_projection``; 1 means that the update is unrelated to the weight.
        amplification: The update's norm over ``projection``: how much it amplifies those directions.
    """

    weight_norm: float
    update_norm: float
    ratio: float
    projection: float
    random_projection: float
    alignment: float
    amplification: float


@torch.no_grad()
def relate(W: Tensor, update: ThinSVD) -> Relation:
    """Return how an update relates to its weight; ratios with a zero denominator are NaN.

    Args:
        W: ``(out, in)``, in any precision.
        update: ``thin_svd`` of the update; directions beyond its numerical rank are left out.

    Raises:
        ValueError: The weight and the update differ in shape.

    Source:
        Hu et al. 2021, "LoRA", arXiv:2106.09685, section 7.3 and table 7.
    """
    shape = (update.U.shape[0], update.V.shape[0])
    if tuple(W.shape) != shape:
        raise ValueError(f"The weight and the update must have the same shape, got {tuple(W.shape)} and {shape}.")
    found = update.significant()
    weight_norm, inside = _norms(W, found.U, found.V)
    by_chance = random_projection(W.shape, len(found.values)) * weight_norm
    return Relation(
        weight_norm=weight_norm,
        update_norm=update.norm,
        ratio=_ratio(update.norm, weight_norm),
        projection=inside,
        random_projection=by_chance,
        alignment=_ratio(inside, by_chance),
        amplification=_ratio(update.norm, inside),
    )


@torch.no_grad()
def projection(W: Tensor, U: Tensor, V: Tensor) -> float:
    """Return ``|U.T @ W @ V|_F``.

    Args:
        W: ``(out, in)``.
        U: ``(out, r)``, orthonormal columns.
        V: ``(in, r)``, orthonormal columns.
    """
    return _norms(W, U.double().cpu(), V.double())[1]


def random_projection(shape: tuple[int, ...], rank: int) -> float:
    """Return the expected projection on ``rank`` random directions, over the norm: ``r / sqrt(out * in)``."""
    return rank / math.sqrt(shape[0] * shape[1])


@torch.no_grad()
def own_projection(W: Tensor, rank: int) -> float:
    """Return ``|U.T @ W @ V|_F`` for the weight's own leading directions: the upper limit at this rank.

    This takes all singular values of the weight: minutes for a large one.
    """
    values = torch.linalg.svdvals(W.double())
    return float(torch.linalg.vector_norm(values[:rank]))


def _norms(W: Tensor, U: Tensor, V: Tensor) -> tuple[float, float]:
    """Return ``|W|_F`` and ``|U.T @ W @ V|_F``; the weight is read once, in blocks of rows in float64."""
    square, inside = 0.0, torch.zeros(U.shape[1], V.shape[1], dtype=torch.float64)
    for start in range(0, W.shape[0], _ROWS_AT_ONCE):
        rows = slice(start, start + _ROWS_AT_ONCE)
        block = W[rows].double()
        square += float(torch.linalg.vector_norm(block)) ** 2
        inside += U[rows].T @ (block @ V.to(block.device)).cpu()
    return math.sqrt(square), float(torch.linalg.matrix_norm(inside))


def _ratio(numerator: float, denominator: float) -> float:
    return numerator / denominator if denominator else math.nan


# --- intruder dimensions


class Intruders(NamedTuple):
    """The intruder dimensions among the leading directions of an adapted weight.

    Attributes:
        indices: Positions of the intruders among the leading directions, from 0.
        similarity: For each leading direction, the largest ``|cosine|`` with a left singular vector of the weight.
        values: The singular values of the leading directions in the adapted weight.
    """

    indices: tuple[int, ...]
    similarity: Tensor
    values: Tensor


@torch.no_grad()
def intruder_dimensions(
    W: Tensor, A: Tensor, B: Tensor, scaling: float = 1.0, *, top_k: int = 10, threshold: float = 0.5
) -> Intruders:
    """Return the leading directions of ``W + scaling * B @ A`` that are absent from ``W``; they come with forgetting.

    The weight is decomposed in full, and the sum through the smaller of its two Gram matrices.

    Args:
        W: ``(out, in)``.
        A: ``(r, in)``.
        B: ``(out, r)``.
        scaling: Factor of ``B @ A``.
        top_k: Number of leading directions to examine; 10 as in PEFT.
        threshold: Largest similarity of an intruder; 0.5 as in PEFT.

    Source:
        Shuttleworth et al. 2024, "LoRA vs full fine-tuning: an illusion of equivalence", arXiv:2410.21228, section 3
        and algorithm 1; the same set as PEFT's ``reduce_intruder_dimension``.
    """
    W = W.double()
    adapted = torch.addmm(W, B.double().to(W.device), A.double().to(W.device), alpha=scaling)
    is_tall = W.shape[0] > W.shape[1]
    squares, directions = torch.linalg.eigh(adapted.T @ adapted if is_tall else adapted @ adapted.T)
    values, directions = squares.flip(0)[:top_k].clamp(min=0).sqrt(), directions.flip(1)[:, :top_k]
    U = adapted @ directions / values if is_tall else directions
    U_base = torch.linalg.svd(W, full_matrices=False)[0]
    similarity = (U.T @ U_base).abs().amax(1)
    return Intruders(tuple(torch.nonzero(similarity < threshold).flatten().tolist()), similarity, values)
