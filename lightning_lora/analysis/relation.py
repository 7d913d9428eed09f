"""How an update relates to the weight that it changes: does it repeat what is there, amplify it, or bring news?

Letters: ``W`` the weight, ``(out, in)``; ``U`` and ``V`` the update's directions, one a column; ``r`` their number. The
weight is read in blocks of rows, each in float64 for a moment; nothing of its size is made besides.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_lora.analysis.spectrum import ThinSVD

_ROWS_AT_ONCE = 512  # more leave the processor's cache; of fewer, several threads mostly wait for each other


class Relation(NamedTuple):
    """The numbers of the LoRA paper's table 7 for one layer.

    Attributes:
        weight_norm: Frobenius norm of ``W``.
        update_norm: Frobenius norm of the update.
        ratio: The update's norm over the weight's.
        projection: ``|U.T @ W @ V|_F``: how much of the weight lies in the update's directions.
        random_projection: What random directions would catch: ``r |W|_F / sqrt(out * in)``.
        alignment: ``projection`` over ``random_projection``: 1 says that the update ignores what the weight does.
        amplification: The update's norm over ``projection``: by how much it amplifies those directions.
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
    """Return how an update relates to its weight; ratios with nothing below the line are NaN.

    Args:
        W: ``(out, in)``, in any precision.
        update: Its ``thin_svd``; directions beyond the numerical rank are left out.

    Source:
        Hu et al. 2021, "LoRA", arXiv:2106.09685, section 7.3 and table 7.
    """
    found = update.significant()
    _check(W, found)
    square, caught = 0.0, torch.zeros(len(found.values), len(found.values), dtype=torch.float64)
    for rows, block in _blocks(W):
        square += float(torch.linalg.vector_norm(block)) ** 2
        caught += found.U[rows].T @ (block @ found.V.to(block.device)).cpu()
    weight_norm, projection = math.sqrt(square), float(torch.linalg.matrix_norm(caught))
    norm, chance = float(torch.linalg.vector_norm(update.values)), random_projection(W.shape, len(found.values))
    return Relation(
        weight_norm=weight_norm,
        update_norm=norm,
        ratio=_ratio(norm, weight_norm),
        projection=projection,
        random_projection=chance * weight_norm,
        alignment=_ratio(projection, chance * weight_norm),
        amplification=_ratio(norm, projection),
    )


@torch.no_grad()
def projection(W: Tensor, U: Tensor, V: Tensor) -> float:
    """Return ``|U.T @ W @ V|_F``.

    Args:
        W: ``(out, in)``.
        U: ``(out, r)``, orthonormal columns.
        V: ``(in, r)``, orthonormal columns.
    """
    U, V = U.double().cpu(), V.double()
    caught = torch.zeros(U.shape[1], V.shape[1], dtype=torch.float64)
    for rows, block in _blocks(W):
        caught += U[rows].T @ (block @ V.to(block.device)).cpu()
    return float(torch.linalg.matrix_norm(caught))


def random_projection(shape: tuple[int, ...], rank: int) -> float:
    """Return what r random directions catch of a matrix of this shape, over its norm: ``r / sqrt(out * in)``."""
    return rank / math.sqrt(shape[0] * shape[1])


@torch.no_grad()
def own_projection(W: Tensor, rank: int) -> float:
    """Return ``|U.T @ W @ V|_F`` of the weight's own leading directions: the most that any of this rank can catch.

    It needs all singular values of the weight, which takes minutes for large ones.
    """
    values = torch.linalg.svdvals(W.double())
    return float(torch.linalg.vector_norm(values[:rank]))


def _blocks(W: Tensor) -> Iterator[tuple[slice, Tensor]]:
    for start in range(0, W.shape[0], _ROWS_AT_ONCE):
        rows = slice(start, start + _ROWS_AT_ONCE)
        yield rows, W[rows].double()


def _check(W: Tensor, update: ThinSVD) -> None:
    shape = (update.U.shape[0], update.V.shape[0])
    if tuple(W.shape) != shape:
        raise ValueError(f"The weight is {tuple(W.shape)} and the update {shape}; they must be of one shape.")


def _ratio(numerator: float, denominator: float) -> float:
    return numerator / denominator if denominator else math.nan
