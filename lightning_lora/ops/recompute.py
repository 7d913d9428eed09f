"""Recomputation: tensors that are computed again in backward instead of being kept by autograd.

A layer whose weight is read with its update in it hands a new tensor of the weight's size to torch's operations, and
these keep it: for every such layer of a model, where the frozen model keeps its weights by reference. While
``recomputing`` is on, a recipe is kept in its place.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, cast
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn

from lightning_lora.ops.eager import is_traced

# Elements below which a tensor is kept: the calls from Python take up to a fifth of the step of such a layer, and
# nothing that can be measured of a larger one's (docs/benchmarks.md).
_FEW = 1 << 15


class _Recipe:
    """A recipe for a tensor, computed once per backward pass for all who need it.

    Attributes:
        alive: How many views of it autograd keeps.
        waiting: How many of these have not asked yet; the tensor is held until all have, or the pass is over.
        turn: How often all have.
    """

    def __init__(self, sources: Sequence[Tensor], compute: Callable[[], Tensor]) -> None:
        self.versions = [(source.detach(), source._version) for source in sources]
        self.compute = compute
        self.alive = self.waiting = self.turn = 0
        self.made: Tensor | None = None

    def is_current(self, sources: Sequence[Tensor]) -> bool:
        """Return whether these are the tensors that it computes from, unchanged."""
        return all(
            source._version == version and source.data_ptr() == seen.data_ptr()
            for source, (seen, version) in zip(sources, self.versions, strict=True)
        )

    def serve(self) -> Tensor:
        for source, version in self.versions:
            _check(source, version)
        if self.made is not None:
            return self.made
        with torch.no_grad():
            made = self.compute()
        if self.waiting > 1 and _at_the_end_of_backward(self.let_go):
            self.made = made
        return made

    def let_go(self) -> None:
        self.made = None

    def one_less(self) -> None:
        self.waiting -= 1
        if self.waiting <= 0:
            self.made, self.waiting = None, self.alive
            self.turn += 1


class _View:
    """The stand-in that autograd keeps for a recomputable tensor or a view of one."""

    def __init__(self, recipe: _Recipe, tensor: Tensor) -> None:
        self.recipe, self.turn = recipe, recipe.turn
        self.layout: Any = tensor.size(), tensor.stride(), tensor.storage_offset()
        recipe.alive += 1
        recipe.waiting += 1

    def unpack(self) -> Tensor:
        tensor = self.recipe.serve().as_strided(*self.layout)
        self._leave()
        return tensor

    def __del__(self) -> None:
        self.recipe.alive -= 1
        self._leave()

    def _leave(self) -> None:
        if self.turn == self.recipe.turn:
            self.turn += 1
            self.recipe.one_less()


class _Kept(NamedTuple):
    """Any other tensor, with its version, which hooks must check themselves."""

    tensor: Tensor
    version: int


class _Made(NamedTuple):
    """A computed tensor, its version, and how to compute it again."""

    tensor: Tensor
    version: int
    recipe: _Recipe

    def is_as_made(self) -> bool:
        return self.tensor._version == self.version  # else a reader has changed it


class _Scope:
    """The tensors made since ``recomputing`` began, and the hooks that recognize them."""

    def __init__(self, outer: tuple[Callable[[Tensor], Any], Callable[[Any], Tensor]] | None) -> None:
        self.outer = outer  # of torch's hooks only the innermost are called
        self.by_key: dict[Hashable, _Made] = {}
        self.by_memory: dict[int, _Made] = {}
        self.pack = self._pack  # one object, by which it is known again

    def _pack(self, tensor: Tensor) -> Any:
        recipe = self._recipe_of(tensor)
        if recipe is not None:
            return _View(recipe, tensor)
        return self.outer[0](tensor) if self.outer else _Kept(tensor, tensor._version)

    def unpack(self, packed: Any) -> Tensor:
        if isinstance(packed, _View):
            return packed.unpack()
        if isinstance(packed, _Kept):
            _check(*packed)
            return packed.tensor
        assert self.outer is not None
        return self.outer[1](packed)

    def _recipe_of(self, tensor: Tensor) -> _Recipe | None:
        if not _is_plain(tensor) or tensor.layout is not torch.strided or tensor.is_nested:
            return None
        made = self.by_memory.get(_memory(tensor))
        return made.recipe if made is not None and made.is_as_made() and made.tensor.dtype is tensor.dtype else None


class _Active(threading.local):
    scope: _Scope | None = None


_active = _Active()
# While their graphs live: a cell that is called at every step computes its weights once for the whole backward pass.
_recipes: WeakValueDictionary[Hashable, _Recipe] = WeakValueDictionary()


@contextmanager
def recomputing() -> Iterator[None]:
    """Have autograd keep a recipe for each tensor that ``recomputed`` makes inside the block.

    Composes with other hooks, such as those of ``save_on_cpu`` and activation checkpointing. Does nothing without
    gradients and under transforms.
    """
    if not _may_set_hooks():
        yield
        return
    before, scope = _active.scope, _Scope(_hooks())
    with torch.autograd.graph.saved_tensors_hooks(scope.pack, scope.unpack):
        _active.scope = scope
        try:
            yield
        finally:
            _active.scope = before
            scope.by_key.clear()  # autograd holds the hooks, and would hold these with them
            scope.by_memory.clear()


def recomputed(
    key: Hashable, sources: Sequence[Tensor], compute: Callable[[], Tensor], again: Callable[[], Callable[[], Tensor]]
) -> Tensor:
    """Return ``compute()``, or what it gave while the sources were the same.

    Args:
        key: What it is, among all that is computed.
        sources: The tensors that it is computed from; the first has its size.
        compute: Computes it, as a function of the sources that autograd knows.
        again: Returns how to compute it again from the values that the sources have now, without gradients.
    """
    scope = _active.scope
    # Inside another's hooks, as a checkpoint's, it is computed anew: their second pass will find nothing shared here.
    if scope is None or (_hooks() or (None,))[0] is not scope.pack or not _can_be_sources(sources):
        return compute()
    known = scope.by_key.get((key, torch.is_grad_enabled()))
    if known is not None and known.is_as_made() and known.recipe.is_current(sources):
        return known.tensor
    tensor = compute()
    if type(tensor) is Tensor and not any(_memory(tensor) == _memory(source) for source in sources):
        recipe = _recipes.get(key)
        if recipe is None or not recipe.is_current(sources):
            _recipes[key] = recipe = _Recipe(sources, again())
        made = _Made(tensor, tensor._version, recipe)
        scope.by_key[key, torch.is_grad_enabled()] = scope.by_memory[_memory(tensor)] = made
    return tensor


def _may_set_hooks() -> bool:
    private: Any = torch._C._autograd  # without both functions nothing is known of the hooks of others
    names = ("_top_saved_tensors_default_hooks", "_saved_tensors_hooks_is_enabled")
    if not torch.is_grad_enabled() or is_traced() or not all(hasattr(private, name) for name in names):
        return False
    return bool(private._saved_tensors_hooks_is_enabled())


def _hooks() -> tuple[Callable[[Tensor], Any], Callable[[Any], Tensor]] | None:
    """Return the innermost hooks for saved tensors."""
    found: Any = torch._C._autograd._top_saved_tensors_default_hooks(True)
    return cast("tuple[Callable[[Tensor], Any], Callable[[Any], Tensor]] | None", found)


def _at_the_end_of_backward(callback: Callable[[], None]) -> bool:
    """Call a function at the end of the current backward pass; return False if there is none."""
    try:
        cast(Any, torch.autograd.Variable)._execution_engine.queue_callback(callback)
    except RuntimeError:
        return False
    return True


def _can_be_sources(sources: Sequence[Tensor]) -> bool:
    """Return whether these are a module's own parameters, whose memory and versions torch alone manages."""
    return sources[0].numel() >= _FEW and all(
        type(source) is nn.Parameter
        and not source.is_inference()
        and source.layout is torch.strided
        and not hasattr(source, "ds_id")  # DeepSpeed takes its memory away between forward and backward
        for source in sources
    )


def _is_plain(tensor: Tensor) -> bool:
    """Return whether a tensor is one for torch's operations: one of torch's own class, or as inert as a Parameter."""
    return type(tensor) is Tensor or type(tensor).__torch_function__ is torch._C._disabled_torch_function_impl


def _memory(tensor: Tensor) -> int:
    return cast(int, cast(Any, tensor.untyped_storage())._cdata)


def _check(tensor: Tensor, version: int) -> None:
    """Raise the error that torch raises without hooks, if a tensor was changed in place."""
    if tensor._version != version:
        raise RuntimeError(
            "one of the variables needed for gradient computation has been modified by an inplace operation: a tensor "
            f"of shape {tuple(tensor.shape)} and {tensor.dtype} is at version {tensor._version}; expected version "
            f"{version}. Change it after the backward pass."
        )
