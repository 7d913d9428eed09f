"""What a sweep will need, measured on its first batch: memory in each mode, and its arithmetic over that of fits."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from typing_extensions import override

from lightning_lora.names import parameters_of
from lightning_lora.sweep.optimizers import Parameters

_STATES = 2  # tensors that Adam keeps for each parameter
_MEGA, _GIGA = 1e6, 1e9


@dataclass(frozen=True)
class Forecast:
    """Bytes that a sweep needs beside what PyTorch itself takes, and its arithmetic.

    Attributes:
        adapters: Number of adapters.
        base: Bytes of the parameters that all share.
        trained: Bytes of all adapters' parameters, gradients and optimizer states, as Adam has them.
        kept: Bytes that the step of one adapter keeps for its backward pass.
        flops: Floating-point operations of a step over those of separate fits; None if that was not measured.
        limit: Bytes of memory of the device; None if unknown.
    """

    adapters: int
    base: int
    trained: int
    kept: int
    flops: float | None
    limit: int | None

    def bytes_of(self, *, one_by_one: bool) -> int:
        """Return the bytes that are needed, with one adapter's activations at a time or with all."""
        return self.base + self.trained + self.kept * (1 if one_by_one else self.adapters)

    def most(self, *, one_by_one: bool) -> int | None:
        """Return how many adapters like these fit on the device; None if its memory is unknown."""
        if self.limit is None:
            return None
        each = self.trained / self.adapters
        room = self.limit - self.base - (self.kept if one_by_one else 0)
        return max(0, int(room / (each if one_by_one else each + self.kept)))

    @override
    def __str__(self) -> str:
        parts = []
        for modes, one_by_one in (("loop", True), ("vmap and meet", False)):
            most = self.most(one_by_one=one_by_one)
            fits = "" if most is None else f", {most:,} adapters fit"
            parts.append(f"{_size(self.bytes_of(one_by_one=one_by_one))} in {modes}{fits}")
        flops = "" if self.flops is None else f" A step takes {self.flops:.2f} of the FLOPs of separate fits."
        return f"memory for {self.adapters} adapters, at most: {'; '.join(parts)}.{flops}"


def forecast(module: nn.Module, owned: Mapping[str, Parameters], kept: int, flops: float | None) -> Forecast:
    """Return what a sweep needs; ``kept`` and ``flops`` as in ``Forecast``."""
    trained = {id(parameter): parameter.nbytes for own in owned.values() for parameter in own.values()}
    base = [p for p in parameters_of(module) if id(p) not in trained]
    limit = _memory(base[0].device) if base else None
    return Forecast(len(owned), sum(p.nbytes for p in base), (2 + _STATES) * sum(trained.values()), kept, flops, limit)


@contextmanager
def bytes_kept(parameters: Sequence[nn.Parameter]) -> Iterator[list[int]]:
    """Count the bytes that autograd keeps, without the parameters themselves."""
    seen, total = {p.untyped_storage().data_ptr() for p in parameters}, [0]

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in seen:
            seen.add(storage.data_ptr())
            total[0] += storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield total


def _memory(device: torch.device) -> int | None:
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    if device.type == "cpu" and {"SC_PAGE_SIZE", "SC_PHYS_PAGES"} <= os.sysconf_names.keys():
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return None


def _size(count: float) -> str:
    return f"{count / _GIGA:.2f} GB" if count >= _GIGA else f"{count / _MEGA:.1f} MB"
