"""Turns: what changes a model for a while is done by one thread after another."""

from __future__ import annotations

import itertools
import threading
import weakref
from collections.abc import Collection, Iterator
from contextlib import ExitStack, contextmanager
from operator import attrgetter

import torch
from torch import nn


class _Turn:
    """A lock that its thread may take again, and that another thread may release.

    A service may enter a block in one thread and leave it in another, which ``threading.RLock`` does not allow.
    """

    def __init__(self, number: int) -> None:
        self.number, self.lock, self.owner, self.depth = number, threading.Lock(), 0, 0

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


# Of every part of a model, since an adapter may belong to a part of the module that is named, and both may be named.
_turns: weakref.WeakKeyDictionary[nn.Module, _Turn] = weakref.WeakKeyDictionary()
_making, _numbers = threading.Lock(), itertools.count()


@contextmanager
def turn(module: nn.Module, leave_out: Collection[str]) -> Iterator[None]:
    """Have other threads wait that would enter such a block for this module, a part of it or one above it; nests.

    Args:
        module: The module.
        leave_out: Names of children that come and go meanwhile, so that no turn can depend on them.
    """
    # Autograd computes blocks again in a thread of its own, for which the one with the turn may be waiting.
    if torch.compiler.is_compiling() or torch._C._current_graph_task_id() != -1:
        yield
        return
    with ExitStack() as taken:
        for each in _turns_of(module, leave_out):  # in the same order in every thread
            each.take()
            taken.callback(each.release)
        yield


def _turns_of(module: nn.Module, leave_out: Collection[str]) -> list[_Turn]:
    """Return the turns of a module and its parts: one, unless parts have had blocks of their own before."""
    with _making:
        parts = _parts(module, leave_out)
        known = {part: mine for part in parts if (mine := _turns.get(part)) is not None}
        found = sorted({*known.values()}, key=attrgetter("number")) or [_Turn(next(_numbers))]
        for part in parts.keys() - known.keys():
            _turns[part] = found[0]
        return found


def _parts(module: nn.Module, leave_out: Collection[str]) -> dict[nn.Module, None]:
    """Return a module and its parts; another thread may be changing its adapters."""
    found, pending = dict[nn.Module, None](), [module]
    while pending:
        part = pending.pop()
        if part not in found:
            found[part] = None
            pending += [each for key, each in list(part._modules.items()) if each is not None and key not in leave_out]
    return found
