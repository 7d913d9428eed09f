"""The basis of the components: ``B @ A`` equals ``(B @ T^-1) @ (T @ A)`` for any ``T``, and scores depend on it.

Before they are compared, the components in use become the singular directions of their product. Then each of them is
needed as little by the others as possible: a rank that would do is not spread over more components than it has.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_lora.layers import LowRankAdapter
from lightning_lora.sharding import copy_whole, whole

_WORST = 1e6  # condition of the random factor; above it, the rounding of T would show


class Turn(NamedTuple):
    """A change of basis of some components.

    Attributes:
        numbers: The components.
        forward: ``T``, ``(r, r)``, or a stack of them.
        backward: ``T^-1``.
    """

    numbers: Tensor
    forward: Tensor
    backward: Tensor

    def of_random(self, factor: Tensor, dimension: int) -> Tensor:
        """Return the factor that starts at random, or what has its basis, in the new basis."""
        return self._times(self.forward, factor, dimension)

    def of_zero(self, factor: Tensor, dimension: int) -> Tensor:
        """Return the factor that starts at zero, or what has its basis, in the new basis."""
        return self._times(self.backward.mT, factor, dimension)

    def _times(self, matrix: Tensor, factor: Tensor, dimension: int) -> Tensor:
        rows = factor.movedim(dimension, -2)
        turned = matrix.to(rows.device) @ rows.index_select(-2, self.numbers).to(matrix.dtype)
        return rows.index_copy(-2, self.numbers, turned.to(rows.dtype)).movedim(-2, dimension)


def to_singular_directions(adapter: LowRankAdapter, numbers: Tensor) -> Turn | None:
    """Return the change that makes components singular directions, in descending order; None if rounding forbids it.

    The rows of ``A`` become orthogonal, of the mean length that they have, and the columns of ``B`` as long as the
    singular values then ask for. Of embeddings, it is the other way round. Every process must call this, and all get
    the same.
    """
    random, zero = (whole(factor.detach()).double() for factor in factors_by_start(adapter))
    if random.isfinite().all() and zero.isfinite().all():
        across = random if adapter.zero_factor() is adapter.B else random.mT  # (r, n)
        along = zero.mT if adapter.zero_factor() is adapter.B else zero  # (r, m)
        across, along = across.index_select(-2, numbers), along.index_select(-2, numbers)
        r = torch.linalg.qr(across.mT).R
        product = torch.linalg.qr(along.mT).R @ r.mT
        _, _, V = torch.linalg.svd(product)
        length = across.norm(dim=-1).mean(-1)[..., None, None]
        if float(torch.linalg.cond(r).max()) < _WORST:
            forward = length * torch.linalg.solve_triangular(r.mT, V, upper=False, left=False)
            backward = r.mT @ V.mT / length
            pair = torch.stack([forward, backward])
            if torch.distributed.is_available() and torch.distributed.is_initialized():
                torch.distributed.broadcast(pair, 0)  # decompositions may differ in their last bits
            return Turn(numbers, *pair)
    return None


def factors_by_start(adapter: LowRankAdapter) -> tuple[nn.Parameter, nn.Parameter]:
    """Return the factor that starts at random, and the one that starts at zero."""
    zero = adapter.zero_factor()
    return (adapter.B if zero is adapter.A else adapter.A), zero


def _dimension(adapter: LowRankAdapter, factor: Tensor) -> int:
    return -2 if factor is adapter.A else -1


@torch.no_grad()
def turn_factors(adapter: LowRankAdapter, turn: Turn) -> None:
    """Put the factors of an adapter, or of an average of it, into the new basis."""
    random, zero = factors_by_start(adapter)
    copy_whole(random, turn.of_random(whole(random.detach()), _dimension(adapter, random)))
    copy_whole(zero, turn.of_zero(whole(zero.detach()), _dimension(adapter, zero)))


@torch.no_grad()
def turn_states(adapter: LowRankAdapter, turn: Turn, optimizer: Optimizer) -> None:
    """Put the states of an optimizer into the new basis: what is linear in gradients exactly, their squares as a mean.

    Gradients of one factor transform as the other factor does.
    """
    random, zero = factors_by_start(adapter)
    for factor, turned in ((random, turn.of_zero), (zero, turn.of_random)):
        dimension = _dimension(adapter, factor)
        for state in optimizer.state.get(factor, {}).values():
            has_components = isinstance(state, Tensor) and state.ndim == factor.ndim
            if not has_components or state.shape[dimension] != factor.shape[dimension]:
                continue
            values = whole(state)
            part = values.index_select(dimension, turn.numbers)
            if bool((part >= 0).all()):  # squares, which do not transform
                values = values.index_copy(dimension, turn.numbers, part.mean().expand_as(part))
            else:
                values = turned(values, dimension)
            copy_whole(state, values)


def has_turnable_states(adapter: LowRankAdapter, optimizer: Optimizer) -> bool:
    """Return whether an optimizer's states of the factors are numbers, not the codes of quantized ones."""
    factors = factors_by_start(adapter)
    return all(
        state.is_floating_point()
        for factor in factors
        for state in optimizer.state.get(factor, {}).values()
        if isinstance(state, Tensor) and state.numel() == factor.numel() > 1
    )
