"""Whole tensors and their parts: what differs where a tensor's memory is spread over processes (``DTensor``)."""

from __future__ import annotations

import sys
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
