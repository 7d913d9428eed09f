"""The current state of torch: tracing, autocast, and whether a tensor may be changed in place."""

from __future__ import annotations

import functools
import sys
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils.weak import TensorWeakRef  # knows that autograd may own a tensor that Python has let go


def _unknown() -> bool:
    return True


# Private in torch. If it is missing, assume that functorch is active: the composition is always right.
functorch_is_active: Callable[[], bool] = getattr(torch._C, "_are_functorch_transforms_active", _unknown)
get_tracing_state: Callable[[], object] = torch._C._get_tracing_state


def is_traced() -> bool:
    """Return whether something runs that knows only torch's own operations: a compiler, functorch, forward AD."""
    if torch.compiler.is_compiling() or get_tracing_state() is not None:
        return True
    return functorch_is_active() or getattr(forward_ad, "_current_level", 0) >= 0


def is_unheld(tensor: Any) -> bool:
    """Return whether only the caller's variable refers to a tensor and its memory, so that it may be changed.

    A layer of unknown make may keep its output, return its input or a view, or need the output for its backward pass.
    Each of these holds a reference more than a new tensor has.
    """
    if is_traced() or type(tensor) is not Tensor or tensor._is_view():
        return False
    alone = _references_of_new()
    return alone is not None and _references(tensor, sys.getrefcount(tensor)) == alone


def add(y: Tensor, update: Tensor, is_ours: bool) -> Tensor:
    """Return the sum in the precision of y, made in y's memory if that is allowed."""
    update = update.to(y.dtype)
    # Hooks for full backward passes hand on views that must not be changed.
    return y.add_(update) if is_ours and not y._is_view() else y + update


def _references(tensor: Tensor, count: int) -> tuple[int, ...]:
    """Return how often Python, autograd and other tensors refer to a tensor or its memory; the last two are private."""
    storage: Any = tensor.untyped_storage()
    return count, tensor._use_count(), torch._C._storage_Use_Count(storage._cdata)  # type: ignore[attr-defined]


@functools.cache
def _references_of_new() -> tuple[int, ...] | None:
    """Return the counts of a new tensor; measured, because they depend on the versions of Python and torch."""
    try:
        # Multiplied, as layers do it: the result has a history, and memory that it shares with nothing. The hooks hide
        # what this saves from activation checkpointing, which would miss it when it computes the layer again.
        with torch.autograd.graph.saved_tensors_hooks(lambda saved: saved, lambda saved: saved):
            output = torch.ones(1, 1, requires_grad=True) @ torch.ones(1, 1)
        return _count_as_unheld_does(output)
    except (AttributeError, RuntimeError):
        return None


def _count_as_unheld_does(tensor: Tensor) -> tuple[int, ...]:
    return _references(tensor, sys.getrefcount(tensor))


# --- autocast


class _Latest(threading.local):
    """The last cast of this thread: its input, its settings and its result, while both are alive."""

    key: tuple[Any, ...] = ()
    source: TensorWeakRef | None = None
    made: TensorWeakRef | None = None


_latest = _Latest()


def shared_cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Return x in another precision, as a differentiable function of it.

    Under autocast each of the layers that read x (query, key and value, say) would cast it anew and keep its copy. What
    was cast last is known here and given again, as long as somebody holds it and x has not changed.
    """
    if x.dtype is dtype or not torch.is_grad_enabled():
        return x.to(dtype)
    key = (dtype, x._version, x.requires_grad)
    if _latest.key == key and _latest.source is not None and _latest.source() is x:
        made: Tensor | None = _latest.made() if _latest.made is not None else None
        if made is not None:
            return made
    made = x.to(dtype)
    _latest.key, _latest.source, _latest.made = key, TensorWeakRef(x), TensorWeakRef(made)
    return made


def is_autocast(device: str) -> bool:
    """Return whether autocast is on for this type of device."""
    # Asking a device without autocast, such as meta, raises; the compiler of torch 2.6 cannot check for that.
    known = torch.compiler.is_compiling() or torch.amp.is_autocast_available(device)
    return known and torch.is_autocast_enabled(device)


def without_autocast(device: str) -> AbstractContextManager[Any]:
    """Return a context without autocast, in which torch computes in the precision of its inputs."""
    return torch.autocast(device, enabled=False) if is_autocast(device) else nullcontext()
