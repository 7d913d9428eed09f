"""Intruder dimensions: leading directions of the adapted weight that the weight itself has nowhere.

Shuttleworth et al. 2024, "LoRA vs full fine-tuning: an illusion of equivalence", arXiv:2410.21228, section 3: they come
with forgetting. The leading directions of ``W + s * B @ A`` are found without forming that sum, by a block Krylov
method; those of ``W`` are all needed, and cost a full decomposition of it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

_EXTRA = 8  # directions beyond those asked for, so that the last of them converges as well
_ACCURATE = 1e-8  # residual of a singular pair over the largest singular value


class Intruders(NamedTuple):
    """The intruders among the leading directions of an adapted weight.

    Attributes:
        indices: Which of the leading directions are intruders, from 0.
        similarity: For each leading direction the largest ``|cosine|`` with a left singular vector of the weight.
        values: Their singular values in the adapted weight.
    """

    indices: tuple[int, ...]
    similarity: Tensor
    values: Tensor


@torch.no_grad()
def intruder_dimensions(
    W: Tensor, A: Tensor, B: Tensor, scaling: float = 1.0, *, top_k: int = 10, threshold: float = 0.5
) -> Intruders:
    """Return which leading directions of ``W + scaling * B @ A`` resemble none of ``W``.

    Args:
        W: ``(out, in)``.
        A: ``(r, in)``.
        B: ``(out, r)``.
        scaling: Factor of ``B @ A``.
        top_k: How many leading directions to look at; 10 as in PEFT.
        threshold: The largest similarity of an intruder; 0.5 as in PEFT.

    Source:
        arXiv:2410.21228, algorithm 1; the same set as PEFT's ``reduce_intruder_dimension``.
    """
    W, A, B = W.double(), A.double().to(W.device), scaling * B.double().to(W.device)
    values, U = _leading(
        lambda X: W @ X + B @ (A @ X), lambda Y: W.T @ Y + A.T @ (B.T @ Y), W.shape, min(top_k, *W.shape), W.device
    )
    U_base = torch.linalg.svd(W, full_matrices=False)[0]
    similarity = (U.T @ U_base).abs().amax(1)
    return Intruders(tuple(torch.nonzero(similarity < threshold).flatten().tolist()), similarity, values)


def _leading(
    times: Callable[[Tensor], Tensor],
    transposed_times: Callable[[Tensor], Tensor],
    shape: torch.Size,
    count: int,
    device: torch.device,
) -> tuple[Tensor, Tensor]:
    """Return the leading singular values and left singular vectors of a matrix known by its products.

    The subspace grows by a block of products until the pairs asked for are exact, at the latest when it is everything.
    """
    generator = torch.Generator().manual_seed(0)
    width = min(count + _EXTRA, *shape)
    block = torch.randn(shape[1], width, dtype=torch.float64, generator=generator).to(device)
    basis = torch.linalg.qr(times(block))[0]
    while True:
        V, values, U_small = _small_svd(transposed_times(basis))
        U = basis @ U_small
        residual = torch.linalg.vector_norm(times(V[:, :count]) - U[:, :count] * values[:count], dim=0)
        room = min(shape) - basis.shape[1]
        if room <= 0 or bool((residual <= _ACCURATE * values[0]).all()):
            return values[:count], U[:, :count]
        fresh = times(transposed_times(basis[:, -width:]))
        for _ in range(2):  # once leaves rounding of the large directions in the small ones
            fresh = fresh - basis @ (basis.T @ fresh)
        basis = torch.linalg.qr(torch.cat([basis, torch.linalg.qr(fresh)[0][:, :room]], 1))[0]


def _small_svd(tall: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    left, values, right = torch.linalg.svd(tall, full_matrices=False)
    return left, values, right.T
