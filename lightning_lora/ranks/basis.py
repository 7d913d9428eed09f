"""The basis of the components: ``B @ A`` equals ``(B @ T^-1) @ (T @ A)`` for any ``T``, and scores depend on it.

Those in use come first, so that the forward pass takes views of the factors: what is left out moves behind them.
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
    """A change of basis of the first ``r`` components.

    Attributes:
        forward: ``T``, ``(r, r)``, or a stack of them.
        backward: ``T^-1``.
    """

    forward: Tensor
    backward: Tensor

    def of_random(self, factor: Tensor, dimension: int) -> Tensor:
        """Return the factor that starts at random, or what has its basis, in the new basis."""
        return self._times(self.forward, factor, dimension)

    def of_zero(self, factor: Tensor, dimension: int) -> Tensor:
        """Return the factor that starts at zero, or what has its basis, in the new basis."""
        return self._times(self.backward.mT, factor, dimension)

    def _times(self, matrix: Tensor, factor: Tensor, dimension: int) -> Tensor:
        rows, count = factor.movedim(dimension, -2), matrix.shape[-1]
        turned = matrix.to(rows.device) @ rows.narrow(-2, 0, count).to(matrix.dtype)
        rest = rows.narrow(-2, count, rows.shape[-2] - count)
        return torch.cat([turned.to(rows.dtype), rest], -2).movedim(-2, dimension)


def to_singular_directions(adapter: LowRankAdapter, count: int) -> Turn | None:
    """Return the change that makes the first components singular directions, in descending order.

    None if rounding forbids it.

    The rows of ``A`` become orthogonal, of the mean length that they have, and the columns of ``B`` as long as the
    singular values then ask for. Of embeddings, it is the other way round. Every process must call this, and all get
    the same.
    """
    random, zero = (whole(factor.detach()).double() for factor in factors_by_start(adapter))
    if random.isfinite().all() and zero.isfinite().all():
        across = random if adapter.zero_factor() is adapter.B else random.mT  # (r, n)
        along = zero.mT if adapter.zero_factor() is adapter.B else zero  # (r, m)
        across, along = across.narrow(-2, 0, count), along.narrow(-2, 0, count)
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
            return Turn(*pair)
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
        for state in states_of(optimizer, factor, dimension):
            values = whole(state)
            part = values.narrow(dimension, 0, turn.forward.shape[-1])
            if bool((part >= 0).all()):  # squares, which do not transform
                part.fill_(part.mean())
            else:
                values = turned(values, dimension)
            copy_whole(state, values)


@torch.no_grad()
def reorder_factors(adapter: LowRankAdapter, order: Tensor) -> None:
    """Put the components of an adapter, or of an average of it, into another order, given by their numbers."""
    for factor in (adapter.A, adapter.B):
        copy_whole(factor, _reordered(factor.detach(), _dimension(adapter, factor), order))


@torch.no_grad()
def reorder_states(adapter: LowRankAdapter, order: Tensor, optimizer: Optimizer) -> None:
    """Put the states of an optimizer into another order of the components; codes of quantized states begin anew."""
    if not has_turnable_states(adapter, optimizer):  # blocks of codes share a scale, so they cannot be moved
        for factor in (adapter.A, adapter.B):
            optimizer.state.pop(factor, None)
    for factor in (adapter.A, adapter.B):
        dimension = _dimension(adapter, factor)
        for state in states_of(optimizer, factor, dimension):
            copy_whole(state, _reordered(state, dimension, order))


def _reordered(tensor: Tensor, dimension: int, order: Tensor) -> Tensor:
    values = whole(tensor)
    return values.index_select(dimension, order.to(values.device))


def states_of(optimizer: Optimizer, factor: nn.Parameter, dimension: int) -> list[Tensor]:
    """Return the states of a factor that have its components in a dimension, which of Adafactor one of two has."""
    return [
        state
        for state in optimizer.state.get(factor, {}).values()
        if isinstance(state, Tensor) and state.ndim == factor.ndim and state.shape[dimension] == factor.shape[dimension]
    ]


def has_turnable_states(adapter: LowRankAdapter, optimizer: Optimizer) -> bool:
    """Return whether an optimizer's states of the factors are numbers, not the codes of quantized ones."""
    factors = factors_by_start(adapter)
    return all(
        state.is_floating_point()
        for factor in factors
        for state in optimizer.state.get(factor, {}).values()
        if isinstance(state, Tensor) and state.numel() == factor.numel() > 1
    )
