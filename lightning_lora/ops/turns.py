"""Turns: what changes a model for a while is done by one thread after another."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


class _Turn:
    """A lock that its thread may take again, and that another thread may release.

    A service may enter a block in one thread and leave it in another, which ``threading.RLock`` does not allow.
    """

    def __init__(self) -> None:
        self.lock, self.owner, self.depth = threading.Lock(), 0, 0

    def take(self) -> None:
        if self.owner != threading.get_ident():
            self.lock.acquire()
            self.owner = threading.get_ident()
        self.depth += 1

    def release(self) -> None:
        self.depth -= 1
        if not self.depth:
            self.owner = 0
            self.lock.release()


_turns: weakref.WeakKeyDictionary[nn.Module, _Turn] = weakref.WeakKeyDictionary()
_making = threading.Lock()


@contextmanager
def turn(module: nn.Module) -> Iterator[None]:
    """Have other threads wait that would enter such a block for this module; nests."""
    # Autograd computes blocks again in a thread of its own, for which the one with the turn may be waiting.
    if torch.compiler.is_compiling() or torch._C._current_graph_task_id() != -1:
        yield
        return
    with _making:
        mine = _turns.setdefault(module, _Turn())
    mine.take()
    try:
        yield
    finally:
        mine.release()
