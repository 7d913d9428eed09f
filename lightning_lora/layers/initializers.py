"""Starts of the random factor ``A`` that need no data. ``B`` is zero, so the model starts unchanged."""

from __future__ import annotations

import functools
import hashlib
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Initializer = Callable[[int, int, torch.Generator], Tensor]


def kaiming(rank: int, columns: int, generator: torch.Generator) -> Tensor:
    """Return ``(rank, columns)`` uniform in ``+-1/sqrt(columns)``, the start of loralib and PEFT.

    It equals ``kaiming_uniform_(a=sqrt(5))``, so each feature ``a @ x`` has a third of x's mean square.
    """
    bound = columns**-0.5
    return _empty(rank, columns).uniform_(-bound, bound, generator=generator)


def gaussian(rank: int, columns: int, generator: torch.Generator) -> Tensor:
    """Return ``(rank, columns)`` normal with standard deviation ``1/rank``, as PEFT's ``"gaussian"``."""
    return _empty(rank, columns).normal_(0.0, 1.0 / rank, generator=generator)


def orthogonal(rank: int, columns: int, generator: torch.Generator) -> Tensor:
    """Return ``(rank, columns)`` orthogonal rows with the mean square of ``kaiming``: norm ``1/sqrt(3)``."""
    tall = _empty(columns, rank).normal_(generator=generator)
    directions, triangle = torch.linalg.qr(tall)
    signs = triangle.diagonal().sign()  # makes the factorisation, and so the start, unique
    rows: Tensor = (directions * signs).T
    return rows / math.sqrt(3.0)


# Whatever the default device and dtype: Lightning calls configure_model under the strategy's and the precision's.
_CPU = torch.device("cpu")


def _empty(rows: int, columns: int) -> Tensor:
    return torch.empty(rows, columns, dtype=torch.float32, device=_CPU)


def zeros(rows: int, columns: int) -> Tensor:
    """Return the start of the factor that keeps the model unchanged."""
    return torch.zeros(rows, columns, dtype=torch.float32, device=_CPU)


def standard_normal(rows: int, columns: int, generator: torch.Generator) -> Tensor:
    """Return independent standard normal entries."""
    return _empty(rows, columns).normal_(generator=generator)


_generator = torch.Generator(device="cpu")  # shared: making one costs more than seeding one


def seeded(seed: int) -> torch.Generator:
    """Return a CPU generator in the state of ``seed``; valid until the next call."""
    return _generator.manual_seed(seed)


INITIALIZERS: dict[str, Initializer] = {"kaiming": kaiming, "gaussian": gaussian, "orthogonal": orthogonal}


@functools.cache  # a model has thousands of layers and a handful of shapes
def _as_text(shape: Sequence[int]) -> str:
    return str(tuple(shape))


def layer_seed(seed: int, name: str, shape: Sequence[int]) -> int:
    """Return the seed of one layer's start.

    It depends on nothing but the run's seed, the layer's qualified name and the full shape of its weight, so every
    rank, world size and choice of other targets draws the same ``A``.
    """
    text = f"{seed}:{name}:{_as_text(shape)}"
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=7).digest(), "big")
