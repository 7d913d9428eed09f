"""Whole tensors and their parts, for tensors sharded over processes (``DTensor``, ZeRO-3)."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn


def is_sharded(tensor: Tensor) -> bool:
    """Return whether this is a ``DTensor``."""
    module = sys.modules.get("torch.distributed.tensor")  # importing it for a look would take half a second
    return module is not None and isinstance(tensor, module.DTensor)


def whole(tensor: Tensor) -> Tensor:
    """Return all of a tensor; every process must call this for a ``DTensor``."""
    return cast(Any, tensor).full_tensor() if is_sharded(tensor) else tensor


def laid_out_like(value: Tensor, like: Tensor) -> Tensor:
    """Distribute a whole tensor, which every process has, over the processes as another one is."""
    if not is_sharded(like):
        return value
    placed: Any = like
    return _distributed(value, placed.device_mesh, placed.placements)


@torch.no_grad()
def copy_whole(target: Tensor, value: Tensor) -> None:
    """Copy a whole tensor, which every process has, into one that may be sharded."""
    target.copy_(laid_out_like(value.to(target.device), target) if is_sharded(target) else value)


@torch.no_grad()
def elements(chosen: Mapping[str, tuple[Tensor, tuple[Tensor, ...]]]) -> dict[str, Tensor]:
    """Return some elements of tensors that are distributed over processes; every process must call this.

    Each process looks up those that it holds, and only these few numbers are communicated.

    Args:
        chosen: Name -> a ``DTensor``, and the indices of the elements, one vector for each dimension.

    Returns:
        Name -> the elements, float64, on the CPU; of complex numbers the real and the imaginary part in turn.
    """
    numbers: dict[Any, Tensor] = {}
    held = [_held(tensor, index, numbers) for tensor, index in chosen.values()]
    together = torch.cat(held)
    meshes = dict.fromkeys(cast(Any, tensor).device_mesh for tensor, _ in chosen.values())
    groups = {group: mesh.device_type for mesh in meshes for group in mesh.get_all_groups()}
    for group, device in groups.items():
        traveling = together.to(device)
        torch.distributed.all_reduce(traveling, torch.distributed.ReduceOp.MAX, group=group)
        together = traveling.cpu()
    parts = torch.split(together, [len(each) for each in held])
    return dict(zip(chosen, parts, strict=True))


def _held(tensor: Tensor, index: tuple[Tensor, ...], numbers: dict[Any, Tensor]) -> Tensor:
    """Return those elements that this process holds, and minus infinity for the others."""
    part = in_parts(local(tensor.detach()))
    if not tensor.ndim:
        return part.reshape(-1).cpu().double()
    is_here, at = torch.ones(len(index[0]), dtype=torch.bool), []
    for dimension, wanted in enumerate(index):
        held = numbers_held(tensor, dimension, numbers)  # ascending, since dividing keeps the order
        place = torch.searchsorted(held, wanted)
        place[place == len(held)] = 0
        is_here &= held[place] == wanted if len(held) else False
        at.append(place)
    found = torch.full((len(is_here), *part.shape[tensor.ndim :]), -torch.inf, dtype=torch.float64)
    found[is_here] = torch.nan_to_num(part[tuple(each[is_here] for each in at)].cpu().double(), posinf=0.0, neginf=0.0)
    return found.flatten()


def in_parts(tensor: Tensor) -> Tensor:
    """Return complex numbers as pairs of their real and imaginary parts, in one more dimension; others as they are."""
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor


def numbers_held(tensor: Tensor, dimension: int, known: dict[Any, Tensor]) -> Tensor:
    """Return which rows, columns and so on of the whole tensor this process holds, on the CPU."""
    from torch.distributed.tensor import Replicate

    placed: Any = tensor
    # By the dimension, not by the class: what both FSDP and tensor parallelism divide has placements of another kind.
    placements = [each if getattr(each, "dim", None) == dimension else Replicate() for each in placed.placements]
    key = (placed.device_mesh, tuple(placements), dimension, tensor.shape[dimension])
    if key not in known:
        alone = [1] * tensor.ndim
        alone[dimension] = -1
        counted = torch.arange(tensor.shape[dimension], device=placed.device_mesh.device_type).view(alone)
        known[key] = local(_distributed(counted, placed.device_mesh, placements)).flatten().cpu()
    return known[key]


def place_factors(A: Tensor, B: Tensor, matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Shard the factors as tensor parallelism has sharded their weight.

    If the weight is divided by rows, so is ``B``, and every process has all of ``A``; if by columns, ``A`` is divided.
    Nothing more is communicated than for the weight itself.

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
    """Return whether DeepSpeed ZeRO-3 has sharded this parameter, which then reads as empty."""
    status = getattr(parameter, "ds_status", None)
    return status is not None and bool(status.name == "NOT_AVAILABLE")


@contextmanager
def gathered(tensors: Iterable[Tensor], *, to_write: bool = False) -> Iterator[None]:
    """Gather parameters sharded by ZeRO-3 inside the block; every process must call this.

    Args:
        tensors: Any tensors; whole ones stay as they are.
        to_write: Whether changes to them stay; every process must make the same.
    """
    managed = [tensor for tensor in tensors if hasattr(tensor, "ds_id")]
    if not managed:
        yield
        return
    shown = [(tensor, tensor.data) for tensor in managed if is_divided(tensor)]
    zero = importlib.import_module("deepspeed").zero
    try:
        with zero.GatheredParameters(managed, modifier_rank=0 if to_write else None):
            yield
    finally:
        for tensor, data in shown:
            tensor.data = data


@contextmanager
def shapes_shown(module: nn.Module) -> Iterator[None]:
    """Show the full shape, but not the values, of parameters sharded by ZeRO-3 inside the block.

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
    """Return whether ``fully_shard`` or FSDP manages this module's parameters."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    return fsdp is not None and isinstance(module, (fsdp.FullyShardedDataParallel, fsdp.FSDPModule))


def is_flattened(module: nn.Module) -> bool:
    """Return whether FSDP has made units in a module, so that its tensors cannot be read."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    return fsdp is not None and any(isinstance(part, fsdp.FullyShardedDataParallel) for part in module.modules())


def unwrapped(module: nn.Module) -> nn.Module:
    """Return the module inside wrappers of Fabric, DDP, FSDP, activation checkpointing and ``torch.compile``."""
    while (inner := _inside(module)) is not None:
        module = inner
    return module


def _inside(module: nn.Module) -> nn.Module | None:
    if isinstance(module, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
        return cast(nn.Module, module.module)
    keys = ("_original_module", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_orig_mod")  # the first: Fabric
    return next((inner for key in keys if (inner := module._modules.get(key)) is not None), None)


def _distributed(value: Tensor, mesh: Any, placements: Any) -> Tensor:
    from torch.distributed.tensor import distribute_tensor

    # src_data_rank=None: every process takes its part of what it has, and nothing travels.
    return distribute_tensor(value, mesh, placements, src_data_rank=None)
