"""How many bytes tensors take, each memory counted once, and which of them autograd keeps for the backward pass."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass


class Memory:
    """Memory that tensors lie in; views of one another share theirs.

    It holds on to the memory that it counts, so that none is freed and its address used again meanwhile.
    """

    def __init__(self, tensors: Iterable[Tensor] = ()) -> None:
        self._storages: dict[int, torch.UntypedStorage] = {}
        for tensor in tensors:
            self.add(tensor)

    @property
    def nbytes(self) -> int:
        """Bytes of all of it; on the meta device, what there would be."""
        return sum(storage.nbytes() for storage in self._storages.values())

    def add(self, tensor: Tensor, but: Memory | None = None) -> None:
        """Add the memory of a tensor, unless it is part of another."""
        for plain in _plain(tensor):
            storage = plain.untyped_storage()
            if but is None or storage._cdata not in but._storages:
                self._storages[storage._cdata] = storage


def saved_bytes(run: Callable[[], object], but: Memory) -> int:
    """Return the bytes that autograd keeps for the backward pass of a computation.

    What checkpointing recomputes is not kept, and not counted. Nothing is computed backward.

    Args:
        run: The forward pass; what it returns is dropped afterwards.
        but: Memory that does not count: the parameters and buffers, which are there anyway.
    """
    kept = Memory()

    def pack(tensor: Tensor) -> Tensor:
        kept.add(tensor, but)
        return tensor

    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        run()
    return kept.nbytes


def _plain(tensor: Tensor) -> Iterator[Tensor]:
    """Yield the tensors that hold the values: packed weights wrap several."""
    wrapper = cast(Any, tensor)
    if not is_traceable_wrapper_subclass(wrapper):
        yield tensor
        return
    for name in wrapper.__tensor_flatten__()[0]:
        yield from _plain(getattr(wrapper, name))
