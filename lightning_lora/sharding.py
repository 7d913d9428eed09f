"""Whole tensors and their parts: what differs where a tensor's memory is spread over processes (``DTensor``)."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn


def is_sharded(tensor: Tensor) -> bool:
    """Return whether this is a ``DTensor``, of which each process holds a part or a replica."""
    module = sys.modules.get("torch.distributed.tensor")  # importing it for a look would take half a second
    return module is not None and isinstance(tensor, module.DTensor)


def whole(tensor: Tensor) -> Tensor:
    """Return all of a tensor; every process must call this for a ``DTensor``."""
    return cast(Any, tensor).full_tensor() if is_sharded(tensor) else tensor


def laid_out_like(value: Tensor, like: Tensor) -> Tensor:
    """Return a whole tensor, which every process has, laid out over the processes as another one is."""
    if not is_sharded(like):
        return value
    placed: Any = like
    return _distributed(value, placed.device_mesh, placed.placements)


@torch.no_grad()
def copy_whole(target: Tensor, value: Tensor) -> None:
    """Copy a whole tensor, which every process has, into one that may be spread over them."""
    target.copy_(laid_out_like(value.to(target.device), target))


def place_factors(A: Tensor, B: Tensor, matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Lay out the factors as tensor parallelism has laid out their weight.

    A weight divided by rows has ``B`` divided so and all of ``A`` everywhere; one divided by columns has ``A`` divided
    so. Nothing more needs to travel than for the weight itself.

    Args:
        A: ``(rank, in)``, whole.
        B: ``(out, rank)``, whole.
        matrix: The weight, a ``DTensor``, read as ``(out, in)``.
    """
    from torch.distributed.tensor import Replicate

    placed: Any = matrix
    for_A = [placement if placement.is_shard(1) else Replicate() for placement in placed.placements]
    for_B = [placement if placement.is_shard(0) else Replicate() for placement in placed.placements]
    return _distributed(A, placed.device_mesh, for_A), _distributed(B, placed.device_mesh, for_B)


def anywhere(flags: list[bool], device: torch.device) -> list[bool]:
    """Return for each flag whether it is set in any process; every process must call this."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return flags
    found = torch.tensor(flags, dtype=torch.int32, device=device)
    torch.distributed.all_reduce(found, torch.distributed.ReduceOp.MAX)
    return [bool(flag) for flag in found.tolist()]


def local(tensor: Tensor) -> Tensor:
    """Return the part that this process holds."""
    return cast(Any, tensor).to_local() if is_sharded(tensor) else tensor


def is_divided(parameter: Tensor) -> bool:
    """Return whether DeepSpeed's ZeRO-3 has divided this parameter, so that what it shows is empty."""
    status = getattr(parameter, "ds_status", None)
    return status is not None and bool(status.name == "NOT_AVAILABLE")


@contextmanager
def gathered(tensors: Iterable[Tensor], *, to_write: bool = False) -> Iterator[None]:
    """Have the whole of parameters that ZeRO-3 has divided, for a while; every process must call this.

    Args:
        tensors: Any; what is whole stays as it is.
        to_write: Whether what is written to them stays; every process must write the same.
    """
    managed = [tensor for tensor in tensors if hasattr(tensor, "ds_id")]
    if not managed:
        yield
        return
    shown = [(tensor, tensor.data) for tensor in managed if is_divided(tensor)]
    zero = importlib.import_module("deepspeed").zero
    with zero.GatheredParameters(managed, modifier_rank=0 if to_write else None):
        yield
    for tensor, data in shown:
        tensor.data = data


@contextmanager
def shapes_shown(module: nn.Module) -> Iterator[None]:
    """Let parameters that ZeRO-3 has divided show the shape of their whole for a while, though not its values.

    Vectors, such as biases, are gathered; matrices are zeros that take no memory.
    """
    if "deepspeed" not in sys.modules:
        yield
        return
    divided = [parameter for parameter in module.parameters() if is_divided(parameter)]
    vectors = [parameter for parameter in divided if len(cast(Any, parameter).ds_shape) < 2]
    matrices = [parameter for parameter in divided if len(cast(Any, parameter).ds_shape) >= 2]
    before = [parameter.data for parameter in matrices]
    with gathered(vectors):
        for parameter in matrices:
            parameter.data = parameter.new_zeros(()).expand(cast(Any, parameter).ds_shape)
        try:
            yield
        finally:
            for parameter, data in zip(matrices, before, strict=True):
                parameter.data = data


def is_fully_sharded(module: nn.Module) -> bool:
    """Return whether ``fully_shard`` or FSDP has taken this module's parameters over."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    return fsdp is not None and isinstance(module, (fsdp.FullyShardedDataParallel, fsdp.FSDPModule))


def unwrapped(module: nn.Module) -> nn.Module:
    """Return what FSDP, activation checkpointing or ``torch.compile`` has wrapped, or the module itself."""
    for key in ("_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_orig_mod"):
        while (inner := module._modules.get(key)) is not None:
            module = inner
    return module


def _distributed(value: Tensor, mesh: Any, placements: Any) -> Tensor:
    from torch.distributed.tensor import distribute_tensor

    # src_data_rank=None: every process takes its part of what it has, and nothing travels.
    return distribute_tensor(value, mesh, placements, src_data_rank=None)
