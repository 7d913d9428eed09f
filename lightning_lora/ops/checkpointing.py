"""Activation checkpointing: a block is computed again in the state in which its forward pass ran."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, ExitStack
from typing import Any, TypeAlias

from torch.utils import checkpoint

Context: TypeAlias = Callable[[], AbstractContextManager[None]]
_PATCHED = "_lora_patched"


def restore_in_recomputation(states: Callable[[], Iterable[Context]]) -> None:
    """Have torch.utils.checkpoint compute a block again inside the contexts that held in its forward pass.

    Torch asks nobody at that moment, so its two functions that keep a block are replaced; safe to repeat.

    Args:
        states: Asked in each forward pass; returns functions that enter a context.
    """
    if hasattr(checkpoint, _PATCHED):
        return
    keep, keep_reentrant = checkpoint._checkpoint_without_reentrant_generator, checkpoint.CheckpointFunction

    def with_state(fn: Callable[..., Any]) -> Callable[..., Any]:
        contexts = list(states())

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

    checkpoint._checkpoint_without_reentrant_generator = kept
    checkpoint.CheckpointFunction = Kept  # type: ignore[misc]
    setattr(checkpoint, _PATCHED, True)
