"""Activation checkpointing: a block is computed again in the state in which its forward pass ran."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial
from itertools import takewhile
from operator import is_
from typing import Any, TypeAlias, cast

from torch.utils import checkpoint

Context: TypeAlias = Callable[[], AbstractContextManager[None]]
States: TypeAlias = Callable[[], Iterable[Context]]
_PATCHED = "_lora_patched"
# Torch's function that keeps a block without reentrant autograd: since torch 2.14, and before.
_GENERATORS = ("_checkpoint_without_reentrant_generator_impl", "_checkpoint_without_reentrant_generator")
_states: list[States] = []


@contextmanager
def entered(context: Context) -> Iterator[None]:
    """Run a block inside a context, and also what is computed again later of its forward passes."""
    restore_in_recomputation(_of_this_thread)
    inside = _here()
    with inside.exactly((*inside.entries, _Entry(context))):
        yield


class _Entry:
    """A context that can be left for a while."""

    def __init__(self, context: Context) -> None:
        self.context = context

    def enter(self) -> None:
        self.now = self.context()
        self.now.__enter__()

    def leave(self) -> None:
        self.now.__exit__(None, None, None)


class _Inside:
    """The contexts that a thread has entered, in their order."""

    entries: tuple[_Entry, ...] = ()

    @contextmanager
    def exactly(self, wanted: tuple[_Entry, ...]) -> Iterator[None]:
        """Be inside these alone for a while."""
        before = self.entries
        self._move_to(wanted)
        try:
            yield
        finally:
            self._move_to(before)

    def _move_to(self, wanted: tuple[_Entry, ...]) -> None:
        common = sum(1 for _ in takewhile(bool, map(is_, self.entries, wanted)))
        for entry in reversed(self.entries[common:]):
            entry.leave()
        self.entries = wanted[:common]
        for entry in wanted[common:]:
            entry.enter()
            self.entries = (*self.entries, entry)


_threads = threading.local()


def _here() -> _Inside:
    if not hasattr(_threads, "inside"):
        _threads.inside = _Inside()
    return cast(_Inside, _threads.inside)


def _of_this_thread() -> list[Context]:
    inside = _here()  # not of the thread that computes again: autograd has its own for a GPU
    return [partial(inside.exactly, inside.entries)]


def restore_in_recomputation(states: States, *, first: bool = False) -> None:
    """Have torch.utils.checkpoint compute a block again inside the contexts that held in its forward pass.

    Torch asks nobody at that moment, so its two functions that keep a block are replaced; safe to repeat.

    Args:
        states: Asked in each forward pass; returns functions that enter a context.
        first: Whether they are entered before all others.
    """
    if states not in _states:
        _states.insert(0 if first else len(_states), states)
    if hasattr(checkpoint, _PATCHED):
        return
    generator = next((name for name in _GENERATORS if hasattr(checkpoint, name)), _GENERATORS[0])
    keep, keep_reentrant = getattr(checkpoint, generator), checkpoint.CheckpointFunction

    def with_state(fn: Callable[..., Any]) -> Callable[..., Any]:
        contexts = [context for states in _states for context in states()]

        def run(*args: Any, **kwargs: Any) -> Any:
            with ExitStack() as stack:
                for context in contexts:
                    stack.enter_context(context())
                return fn(*args, **kwargs)

        return run

    def kept(fn: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return keep(with_state(fn), *args, **kwargs)

    class Kept(keep_reentrant):  # type: ignore[misc, valid-type]
        @classmethod
        def apply(cls, fn: Callable[..., Any], *args: Any) -> Any:
            return keep_reentrant.apply(with_state(fn), *args)  # type: ignore[no-untyped-call]

    setattr(checkpoint, generator, kept)
    checkpoint.CheckpointFunction = Kept  # type: ignore[misc]
    setattr(checkpoint, _PATCHED, True)
