"""Autocast: one copy in its precision for all layers that read the same tensor, and none where the numbers matter."""

from __future__ import annotations

import threading
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import TensorWeakRef  # knows that autograd may own a tensor that Python has let go


class _Latest(threading.local):
    """The last cast of this thread: of what, in which circumstances, and the result, as long as both live."""

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
    # Devices without autocast, such as meta, may not be asked; a compiler of torch 2.6 cannot ask which those are.
    known = torch.compiler.is_compiling() or torch.amp.is_autocast_available(device)
    return known and torch.is_autocast_enabled(device)


def without_autocast(device: str) -> AbstractContextManager[Any]:
    """Return a context in which torch computes in the precision of what it is given, in place too."""
    return torch.autocast(device, enabled=False) if is_autocast(device) else nullcontext()
