"""First values of the factors: random ones, and those taken from the weight.

What is taken from data as well is in ``calibration/``.
"""

from __future__ import annotations

import hashlib
import math
import threading
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

# --- from a seed: ``B`` starts at zero, so the model starts unchanged

Initializer: TypeAlias = Callable[[int, int, torch.Generator], Tensor]

# Independent of the defaults: Lightning calls configure_model with the strategy's device and precision as defaults.
_PLACE: dict[str, Any] = {"dtype": torch.float32, "device": torch.device("cpu")}


def kaiming(rank: int, columns: int, generator: torch.Generator) -> Tensor:
    """Return ``(rank, columns)`` uniform in ``+-1/sqrt(columns)``, the start of loralib and PEFT.

    It equals ``kaiming_uniform_(a=sqrt(5))``, so each feature ``a @ x`` has a third of the mean square of x.
    """
    bound = columns**-0.5
    return torch.empty(rank, columns, **_PLACE).uniform_(-bound, bound, generator=generator)


def gaussian(rank: int, columns: int, generator: torch.Generator) -> Tensor:
    """Return ``(rank, columns)`` normal with standard deviation ``1/rank``, as PEFT's ``"gaussian"``."""
    return torch.empty(rank, columns, **_PLACE).normal_(0.0, 1.0 / rank, generator=generator)


def orthogonal(rank: int, columns: int, generator: torch.Generator) -> Tensor:
    """Return ``(rank, columns)`` orthogonal rows with the mean square of ``kaiming``: norm ``1/sqrt(3)``."""
    directions, triangle = torch.linalg.qr(standard_normal(columns, rank, generator))
    signs = triangle.diagonal().sign()  # makes the factorization, and so the start, unique
    rows: Tensor = (directions * signs).T
    return rows / math.sqrt(3.0)


def standard_normal(rows: int, columns: int, generator: torch.Generator) -> Tensor:
    """Return independent standard normal entries."""
    return torch.empty(rows, columns, **_PLACE).normal_(generator=generator)


def zeros(rows: int, columns: int) -> Tensor:
    """Return the start of the factor that keeps the model unchanged."""
    return torch.zeros(rows, columns, **_PLACE)


INITIALIZERS: dict[str, Initializer] = {"kaiming": kaiming, "gaussian": gaussian, "orthogonal": orthogonal}
DIFFERENCES = ("pissa", "olora", "corda", "lora_ga")  # starts at which B @ A is not zero


def random_start(name: str) -> Initializer:
    """Return the initializer of this name, or the one in whose place another start is computed later."""
    return INITIALIZERS.get(name, kaiming)


class _OfThread(threading.local):
    def __init__(self) -> None:
        self.generator = torch.Generator(device="cpu")  # kept: making one costs more than seeding one


_of_thread = _OfThread()


def seeded(seed: int) -> torch.Generator:
    """Return a CPU generator in the state of ``seed``; valid until the next call in this thread."""
    return _of_thread.generator.manual_seed(seed)


def layer_seed(seed: int, name: str, shape: Sequence[int]) -> int:
    """Return the seed of one layer's start.

    It depends on the run's seed, the layer's qualified name and the full shape of its weight alone, so every rank,
    world size and choice of other targets draws the same ``A``.
    """
    text = f"{seed}:{name}:{tuple(shape)}"
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=7).digest(), "big")


# --- from the weight: the model starts unchanged only if the caller subtracts ``scaling * B @ A``

_EXACT_BELOW = 1024  # the smaller side of a matrix whose complete decomposition takes at most seconds
_ITERATIONS = 8  # each multiplies the gap between what is kept and what is left out, by its square
_OVERSAMPLING = 16


@torch.no_grad()
def pissa(weight: Tensor, rank: int, scaling: float) -> tuple[Tensor, Tensor]:
    """Return the factors whose update ``scaling * B @ A`` is the best approximation of the weight at this rank.

    With ``weight = U @ diag(values) @ V.T``, they are ``A = sqrt(values / scaling) * V.T`` and
    ``B = U * sqrt(values / scaling)``, both cut to ``rank``. The weight is decomposed exactly if its smaller side is at
    most 1024, and by subspace iteration otherwise.

    Args:
        weight: ``(out, in)``.
        rank: At most the rank of the weight: further rows of ``A`` and columns of ``B`` would both be zero, and never
            learn.
        scaling: Factor of ``B @ A`` in the layer.

    Returns:
        ``A``, ``(rank, in)``, and ``B``, ``(out, rank)``, in at least float32, on the weight's device.

    Raises:
        ValueError: The weight is not finite, or its rank is too small.

    Source:
        Meng et al. 2024, "PiSSA", arXiv:2404.02948, section 3; as PEFT's ``"pissa"``.
    """
    _require_rank(weight, rank)
    U, values, V = leading_svd(weight, rank)
    if found := int((values <= values[0] * torch.finfo(torch.float32).eps).sum()):
        raise ValueError(f"rank={rank} is above the rank of the weight, {rank - found}.")
    roots = (values / scaling).sqrt()
    return _as_factor((V * roots).T, weight), _as_factor(U * roots, weight)


@torch.no_grad()
def olora(weight: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return the factors ``B = Q[:, :rank]`` and ``A = R[:rank]`` of the decomposition ``weight = Q @ R``.

    They are not divided by the layer's scaling, as in PEFT's ``"olora"``, but the diagonal of ``R`` is positive, which
    makes them unique.

    Args:
        weight: ``(out, in)``.
        rank: At most the smaller side of the weight.

    Returns:
        ``A``, ``(rank, in)``, and ``B``, ``(out, rank)``, in at least float32, on the weight's device.

    Raises:
        ValueError: The weight is not finite, or too small for the rank.

    Source:
        Büyükakyüz 2024, "OLoRA", arXiv:2406.01775, algorithm 1.
    """
    _require_rank(weight, rank)
    Q, R = torch.linalg.qr(weight.to(torch.promote_types(weight.dtype, torch.float32)))
    signs = torch.where(R.diagonal() < 0, -1.0, 1.0)[:rank].to(Q.dtype)
    return _as_factor(signs.unsqueeze(1) * R[:rank], weight), _as_factor(Q[:, :rank] * signs, weight)


def leading_svd(matrix: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the leading singular directions and values of a matrix, the same in every call.

    A matrix whose smaller side is at most 1024 is decomposed exactly, in float64. A larger one keeps its precision, at
    least float32; if few directions are asked for, they are found by subspace iteration from a fixed start: Halko et
    al. 2011, arXiv:0909.4061, algorithm 4.4.

    Args:
        matrix: ``(rows, columns)``.
        count: ``q``, at most the smaller side.

    Returns:
        ``U``, ``(rows, q)``; the values in descending order, ``(q,)``; and ``V``, ``(columns, q)``. The largest entry
        of each column of ``V`` is positive.
    """
    side, width = min(matrix.shape), count + max(count, _OVERSAMPLING)
    matrix = matrix.to(torch.promote_types(matrix.dtype, torch.float64 if side <= _EXACT_BELOW else torch.float32))
    if side <= _EXACT_BELOW or 2 * width > side:
        U, values, Vh = torch.linalg.svd(matrix, full_matrices=False)
    else:
        U, values, Vh = _by_subspace_iteration(matrix, width)
    signs = signs_of(Vh.T)
    return (U * signs)[:, :count], values[:count], (Vh.T * signs)[:, :count]


def signs_of(directions: Tensor) -> Tensor:
    """Return the sign of the largest entry of each column; with it, a direction no longer depends on the library."""
    if not directions.numel():
        return directions.new_ones(directions.shape[1])
    largest = directions.gather(0, directions.abs().argmax(0, keepdim=True))[0]
    return torch.where(largest < 0, -1.0, 1.0).to(directions.dtype)


def _by_subspace_iteration(matrix: Tensor, width: int) -> tuple[Tensor, Tensor, Tensor]:
    Q = torch.linalg.qr(matrix @ standard_normal(matrix.shape[1], width, seeded(0)).to(matrix))[0]
    for _ in range(_ITERATIONS):
        Q = torch.linalg.qr(matrix.T @ Q)[0]
        Q = torch.linalg.qr(matrix @ Q)[0]
    U, values, Vh = torch.linalg.svd(Q.T @ matrix, full_matrices=False)
    return Q @ U, values, Vh


def _require_rank(weight: Tensor, rank: int) -> None:
    if rank > min(weight.shape):
        raise ValueError(f"rank={rank} is above the smaller side of the weight of shape {tuple(weight.shape)}.")
    if not weight.isfinite().all():
        raise ValueError("The weight holds values that are not finite.")


def _as_factor(factor: Tensor, weight: Tensor) -> Tensor:
    return factor.to(torch.promote_types(weight.dtype, torch.float32)).contiguous()
