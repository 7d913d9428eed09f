"""Starts of the factors from statistics of calibration data, and from the weight.

Letters: ``W`` the weight, ``(out, in)``; ``x`` an input and ``g`` the gradient of the loss for the output, both of one
token; ``G = E[g x.T]`` the gradient of the weight; ``r`` the rank. Each direction has its largest entry positive, so
the same statistics lead to the same factors.

A start without ``B`` leaves the model as it was. One with ``B`` does so only if the layer subtracts the
``scaling * B @ A`` of the start.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Literal, NamedTuple, TypeVar

import torch
from torch import Tensor

from lightning_lora.calibration.spectrum import Spectrum, eigenpairs
from lightning_lora.calibration.statistics import EXACT_UP_TO, MatrixStatistics, Moments, Need
from lightning_lora.layers.starts import leading_svd, signs_of

NEEDS: dict[str, frozenset[Need]] = {
    "eva": frozenset({"inputs"}),
    "corda": frozenset({"inputs"}),
    "lora_ga": frozenset({"cross"}),
    "covariance": frozenset({"inputs", "gradients", "cross", "permuted"}),
}
_ZERO = {torch.float64: 1e-6, torch.float32: 1e-5}  # of the largest singular value: float32 data say no more
_PENALTIES = (0.0, *(10.0**power for power in range(-4, 4)))  # of the largest eigenvalue, on the roughest direction


class Start(NamedTuple):
    """The first values of one layer's factors.

    Attributes:
        A: ``(r, in)``, float32.
        B: ``(out, r)``, float32; None for zero.
        values: What the directions are worth, the best first: shares of the variance (``eva``), or singular values. In
            general there are more than ``r``, for ``ranks.allocation.allocate``.
        suggested_rank: How many directions stand out from chance; None if that is not known.
    """

    A: Tensor
    B: Tensor | None
    values: Tensor
    suggested_rank: int | None = None


class RankError(ValueError):
    """The data support fewer directions than a rank needs.

    Attributes:
        supported: How many they support.
    """

    def __init__(self, rank: int, supported: int, problem: str = "") -> None:
        super().__init__(
            problem or f"rank={rank} is above the {supported} directions that the calibration data support."
        )
        self.supported = supported


# --- from the inputs


@torch.no_grad()
def eva(statistics: MatrixStatistics, rank: int, *, normalize: bool = True) -> Start:
    """Return the principal directions of the inputs as the rows of ``A``.

    Args:
        statistics: With the inputs. If they have ``axes``, smooth directions are preferred, as far as they explain more
            of the variance in the half of the data that was not used to find them.
        rank: ``r``.
        normalize: Scale each row so that its feature has a third of the mean square of an input entry, as with the
            start ``"kaiming"``: learning rates then stay comparable. False leaves unit rows, as PEFT does.

    Raises:
        ValueError: The data vary in fewer than ``r`` directions, or there are none.

    Source:
        Paischer et al. 2024, "One initialization to rule them all: fine-tuning via explained variance adaptation",
        arXiv:2410.07170, section 3. The directions come from the exact covariance, not from incremental updates.
    """
    inputs = _required(statistics.inputs, "inputs")
    spectrum = inputs.spectrum(centre=True)
    found = _smoothed(inputs, statistics.axes, rank) if statistics.axes else spectrum
    _require_rank(rank, found.rank)
    V = found.vectors[:, :rank]
    A = (V * signs_of(V)).T
    if normalize:
        A = _with_feature_level(A, spectrum.along(A) + (A @ inputs.mean()).square(), inputs)
    return Start(_factor(A), None, found.values / inputs.trace(centre=True))


@torch.no_grad()
def corda(
    statistics: MatrixStatistics,
    weight: Tensor,
    rank: int,
    scaling: float,
    *,
    mode: Literal["ipm", "kpm"] = "ipm",
    power: float = 1.0,
    damping: float = 0.01,
) -> Start:
    """Return factors that hold the part of the weight that the data use most, or least.

    With ``C`` the second moment of the inputs, divided by its mean eigenvalue, and ``U`` left singular directions of
    ``W @ C^power``, the update is ``U @ U.T @ W``. The published form takes an inverse of ``C`` and leads to the same
    update. For white inputs it is that of ``pissa``.

    Args:
        statistics: With the inputs.
        weight: ``W``.
        rank: ``r``.
        scaling: Factor of ``B @ A`` in the layer.
        mode: ``"ipm"`` takes the leading directions, to adapt fast; ``"kpm"`` the last that the weight has, to preserve
            what the data show.
        power: 1 as published and in PEFT. With 0.5 and no damping, the outputs ``W @ x`` without the update are as
            close to those with it, in mean square, as removing ``r`` directions allows.
        damping: Added to the eigenvalues of ``C``: makes directions comparable that the data do not use. 0.01 as in
            PEFT, which doubles it while its inverse is inexact.

    Raises:
        ValueError: The data use fewer than ``r`` directions of the weight, or there are none.

    Source:
        Yang et al. 2024, "CorDA", arXiv:2406.05223, section 3; with power 0.5, the principal directions of the outputs.
    """
    inputs = _required(statistics.inputs, "inputs")
    raw = inputs.spectrum()
    _require_rank(rank, raw.rank)
    level = inputs.trace() / inputs.width
    moment = Spectrum(raw.values / level + damping, raw.vectors, raw.rest / level + damping)
    W = weight.to(moment.vectors)
    used = moment.power(power, W.T).T
    U, values, _ = _decomposed(used, rank if mode == "ipm" else min(used.shape))
    supported = _above_rounding(values)
    _require_rank(rank, supported)
    first = 0 if mode == "ipm" else supported - rank
    U, values = U[:, first : first + rank], values[first:supported]
    roots = (values[:rank] / scaling).sqrt()
    A = (U.T @ W.to(U)) / (scaling * roots).unsqueeze(1)
    return Start(_factor(A), _factor(U * roots), values)


# --- from the gradient


@torch.no_grad()
def lora_ga(statistics: MatrixStatistics, rank: int, *, gamma: float = 16.0) -> Start:
    """Return factors whose first step comes close to one of the whole weight along its gradient.

    With ``G = U @ diag(values) @ V.T``: ``A = V[:, :r].T`` and ``B = U[:, r:2 * r]``, both times
    ``out^(1/4) / sqrt(gamma)``.

    This is the authors' code. PEFT's ``"lora_ga"`` multiplies ``B`` by the singular values, scales ``B`` alone, and by
    default takes every other direction; the directions ``A`` of its ``"ArB2r"`` are these.

    Args:
        statistics: With the cross products.
        rank: ``r``.
        gamma: Inverse of the size of the start; 16 as published.

    Raises:
        ValueError: The gradient has a rank below ``2 * r``.

    Source:
        Wang et al. 2024, "LoRA-GA: low-rank adaptation with gradient approximation", arXiv:2407.05000, section 3.
    """
    G = _gradient(statistics)
    U, values, V = _decomposed(G, 2 * rank)
    if 2 * rank > (found := _above_rounding(values)):
        needs = f"rank={rank} needs {2 * rank} directions of the gradient, which has {found}."
        raise RankError(rank, found // 2, needs)
    scale = len(G) ** 0.25 / math.sqrt(gamma)
    return Start(_factor(scale * V[:, :rank].T), _factor(scale * U[:, rank : 2 * rank]), values)


# --- from both


@torch.no_grad()
def covariance(
    statistics: MatrixStatistics,
    rank: int,
    *,
    centre: bool = False,
    metric_out: Literal["full", "none"] = "full",
    shrinkage: float | None = None,
    normalize: bool = True,
) -> Start:
    """Return as rows of ``A`` the features of the inputs that vary most with what the loss asks of the outputs.

    With second moments ``Cx`` of the inputs and ``Cg`` of the gradients, ``Cg^(-1/2) @ G @ Cx^(-1/2) = U @ diag(c) @
    V.T`` and ``A = V[:, :r].T @ Cx^(-1/2)``. The features ``A @ x`` are uncorrelated. The rows span those of the
    rank-r natural gradient in the approximation of K-FAC.

    Second moments from few sequences are shrunk toward the identity, see ``Moments.shrinkage``. If the inputs have
    ``axes``, a roughness is added to ``Cx``, so that a rough direction must explain more.

    Args:
        statistics: With inputs and cross products; with gradients for ``metric_out="full"``; and with permuted cross
            products and gradients for ``suggested_rank``.
        rank: ``r``.
        centre: Subtract means. The shrinkage stays that of the moments about zero.
        metric_out: ``"none"`` leaves ``Cg`` out, which needs less memory.
        shrinkage: From 0 for none to 1 for the identity; None to estimate it.
        normalize: As for ``eva``.

    Returns:
        Its ``values`` are ``c``. Its ``suggested_rank`` counts the values of the centred products that are above
        chance, which the permuted products show. If there is nothing to find, about one layer in twenty still has one.

    Raises:
        ValueError: The data support fewer than ``r`` directions, there are none, or there is only one sequence.

    Source:
        Hotelling 1936, "Relations between two sets of variates"; Martens and Grosse 2015, "K-FAC", arXiv:1503.05671.
    """
    inputs = _required(statistics.inputs, "inputs")
    own = _shrunk(inputs, centre, shrinkage)
    metric = _roughened(inputs, own, statistics.axes, rank) if statistics.axes else own
    metric_g = None
    if metric_out == "full":
        metric_g = _shrunk(_required(statistics.gradients, "gradients"), centre, shrinkage)

    def whitened(product: Tensor) -> Tensor:
        product = metric.power(-0.5, product.to(own.vectors).T).T
        return product if metric_g is None else metric_g.power(-0.5, product.to(metric_g.vectors))

    G = _gradient(statistics)
    if centre:
        G = G - _product_of_means(statistics)
    _, values, V = _decomposed(whitened(G), 2 * rank)
    _require_rank(rank, _above_rounding(values))
    A = metric.power(-0.5, V[:, :rank].to(own.vectors)).T
    if normalize:
        level = own.along(A) + (A @ inputs.mean()).square() * centre
        A = _with_feature_level(A, level, inputs)
    return Start(_factor(A), None, values, _suggested_rank(statistics, whitened))


def _shrunk(moments: Moments, centre: bool, share: float | None) -> Spectrum:
    share = moments.shrinkage() if share is None else share
    return moments.spectrum(centre=centre).shrunk(share, moments.trace(centre=centre) / moments.width)


def _suggested_rank(statistics: MatrixStatistics, whitened: Callable[[Tensor], Tensor]) -> int | None:
    """Return how many values of the centred products are above chance."""
    if statistics.permuted is None or statistics.gradients is None or not statistics.pairs:
        return None
    means, n, pairs = _product_of_means(statistics), statistics.tokens, statistics.pairs
    # Sums over fewer tokens vary less, by the root of their number.
    chance = whitened((statistics.permuted - pairs * means) / math.sqrt(n * pairs))
    found = whitened(_gradient(statistics) - means)
    return int((_squared_values(found) > _largest_by_chance(_squared_values(chance))).sum())


def _squared_values(matrix: Tensor) -> Tensor:
    gram = matrix @ matrix.T if matrix.shape[0] <= matrix.shape[1] else matrix.T @ matrix
    squares: Tensor = torch.linalg.eigvalsh(gram)
    return squares


def _largest_by_chance(squares: Tensor) -> float:
    """Return what the largest squared singular value of another matrix of the same distribution rarely exceeds.

    The square of the largest singular value of a Gaussian matrix of side ``m`` is ``4 m + 2^(4/3) m^(1/3) T``, where
    ``T`` has the standard deviation 1.27; two standard deviations of the difference of two such are allowed. The
    effective ``m`` of a matrix is that with the same ``sum(squares)^2 / sum(squares^2)``, which is ``m / 2``. In
    simulations of correlated tokens and unequal variances, it was exceeded in 0 to 7 % of the cases.

    Source:
        Johnstone 2001, "On the distribution of the largest eigenvalue in principal components analysis", theorem 1.1.
    """
    total = float(squares.sum())
    if total <= 0:
        return 0.0
    side = 2 * total**2 / float(squares.square().sum())
    deviation = 1.27 * 2 ** (4 / 3) * math.pow(side, 1 / 3) / (4 * side)
    return float(squares.max()) * (1 + 2 * math.sqrt(2) * deviation)


# --- smoothness


def _smoothed(inputs: Moments, axes: tuple[int, ...], rank: int) -> Spectrum:
    """Return the covariance less a multiple of the roughness, by its eigenpairs; negative eigenvalues are zero.

    Source:
        Wang and Huang 2017, "Regularized principal component analysis for spatial data", arXiv:1501.03221, equation 3,
        without its penalty on sizes, and with second differences for the roughness.
    """
    covariance = inputs.second_moment(centre=True)
    values, V = eigenpairs(covariance - _chosen_penalty(inputs, axes, rank))
    return Spectrum(values.clamp(min=0), V, 0.0)


def _roughened(inputs: Moments, own: Spectrum, axes: tuple[int, ...], rank: int) -> Spectrum:
    """Return a second moment plus a multiple of the roughness.

    Source:
        Leurgans et al. 1993, "Canonical correlation analysis when the data are curves", section 3. The multiple is
        that of ``_smoothed``.
    """
    second = own.vectors * own.values @ own.vectors.T
    return Spectrum(*eigenpairs(second + _chosen_penalty(inputs, axes, rank)), 0.0)


def _chosen_penalty(inputs: Moments, axes: tuple[int, ...], rank: int) -> Tensor:
    """Return the multiple of the roughness with which one half of the data explains most variance of the other."""
    rough = _roughness(inputs.width, axes).to(inputs.mean())
    one, other = (half.second_moment(centre=True) for half in inputs.halves())
    largest = float(torch.linalg.eigvalsh(one + other)[-1]) / 2

    def explained(penalty: float) -> float:
        total = 0.0
        for train, test in ((one, other), (other, one)):
            V = eigenpairs(train - penalty * largest * rough)[1][:, :rank]
            total += float(((test @ V) * V).sum())
        return total

    return max(_PENALTIES, key=explained) * largest * rough


def _roughness(width: int, axes: tuple[int, ...]) -> Tensor:
    """Return the squared second differences along each axis, as a matrix ``(width, width)`` of norm 1 at most."""
    identity = partial(torch.eye, dtype=torch.float64)
    total = 0 * identity(math.prod(axes))
    for position, size in enumerate(axes):
        before, after = identity(math.prod(axes[:position])), identity(math.prod(axes[position + 1 :]))
        differences = identity(size).diff(n=2, dim=0)
        total += torch.kron(torch.kron(before, differences.T @ differences), after)
    return torch.kron(identity(width // len(total)), total / (16 * len(axes)))


# --- shared


def _decomposed(matrix: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the singular value decomposition, of a large matrix only the leading ``count`` directions."""
    side = min(matrix.shape)
    return leading_svd(matrix, side if side <= EXACT_UP_TO else min(count, side))


def _with_feature_level(A: Tensor, squares: Tensor, inputs: Moments) -> Tensor:
    """Scale rows whose features have these mean squares to the level of the start ``"kaiming"``."""
    level = inputs.trace() / (3 * inputs.width)
    return A * (level / squares).sqrt().unsqueeze(1)


def _factor(factor: Tensor) -> Tensor:
    return factor.float().contiguous()


def _gradient(statistics: MatrixStatistics) -> Tensor:
    cross = _required(statistics.cross, "cross")
    if not statistics.tokens:
        raise ValueError("No token was counted: no data were added, or the mask excludes all of them.")
    if not cross.isfinite().all():
        raise ValueError("The calibration data led to values that are not finite (NaN, or above float32's range).")
    return cross / statistics.tokens


def _product_of_means(statistics: MatrixStatistics) -> Tensor:
    g, x = _required(statistics.gradients, "gradients").mean(), _required(statistics.inputs, "inputs").mean()
    return torch.outer(g, x.to(g))


_Kept = TypeVar("_Kept", Moments, Tensor)


def _required(part: _Kept | None, need: Need) -> _Kept:
    if part is None:
        raise ValueError(f"This start needs {need!r} among the needs of MatrixStatistics.")
    return part


def _above_rounding(values: Tensor) -> int:
    """Return how many singular values are more than rounding."""
    return int((values > _ZERO[values.dtype] * values[:1]).sum())


def _require_rank(rank: int, supported: int) -> None:
    if rank > supported:
        raise RankError(rank, supported)
