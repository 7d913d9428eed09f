"""What may be done in plain eager mode alone: own autograd functions, and writing into tensors that nobody holds."""

from __future__ import annotations

import functools
import sys
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad


def is_traced() -> bool:
    """Return whether somebody looks who knows torch's operations but not ours: a compiler, functorch, forward AD."""
    if torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None:
        return True
    transforms = getattr(torch._C, "_are_functorch_transforms_active", None)
    # Both are private: without them nothing is known, and the composition is always right.
    return transforms is None or transforms() or getattr(forward_ad, "_current_level", 0) >= 0


def is_unheld(tensor: Any) -> bool:
    """Return whether the caller's variable is all that refers to a tensor and its memory, so that it may be changed.

    A layer of unknown make may keep its output, return its input or a view, or need the output for its backward pass.
    Each of these holds a reference more than a new tensor has.
    """
    if is_traced() or type(tensor) is not Tensor or tensor._is_view():
        return False
    alone = _references_of_new()
    return alone is not None and _references(tensor, sys.getrefcount(tensor)) == alone


def add(y: Tensor, update: Tensor, is_ours: bool) -> Tensor:
    """Return the sum in the precision of y, in y's own memory if it may be."""
    update = update.to(y.dtype)
    # Hooks for full backward passes hand on views that must not be changed.
    return y.add_(update) if is_ours and not y._is_view() else y + update


def _references(tensor: Tensor, count: int) -> tuple[int, ...]:
    """Return how often Python, autograd and other tensors refer to a tensor or its memory; the last two are private."""
    storage: Any = tensor.untyped_storage()
    return count, tensor._use_count(), torch._C._storage_Use_Count(storage._cdata)  # type: ignore[attr-defined]


@functools.cache
def _references_of_new() -> tuple[int, ...] | None:
    """Return what a new tensor has; counted, since it depends on the versions of Python and torch."""
    try:
        # Multiplied, as layers do it: the result has a history, and memory that it shares with nothing.
        output = torch.ones(1, 1, requires_grad=True) @ torch.ones(1, 1)
        return _count_as_unheld_does(output)
    except (AttributeError, RuntimeError):
        return None


def _count_as_unheld_does(tensor: Tensor) -> tuple[int, ...]:
    return _references(tensor, sys.getrefcount(tensor))
