"""Vectors of which every process holds a slice: their lengths, and the whole of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

Key = TypeVar("Key")
Group = dist.ProcessGroup | None


def told_by_all(value: Any, group: Group) -> list[Any]:
    """Return what every process says, in the order of the ranks; every process must call this."""
    everywhere: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(everywhere, value, group)
    return everywhere


def slices_of_all(slices: Mapping[Key, Tensor], device: torch.device, group: Group) -> dict[Key, list[Tensor]]:
    """Return the slices that every process holds, in the order of the ranks; every process must call this.

    Args:
        slices: Vectors; a process may have nothing of one that others have.
        device: Where they travel.
        group: The processes.
    """
    told = told_by_all({key: (len(vector), vector.dtype) for key, vector in slices.items()}, group)
    dtypes = {key: dtype for each in told for key, (_, dtype) in each.items()}
    found: dict[Key, list[Tensor]] = {}
    for dtype in sorted(set(dtypes.values()), key=str):
        keys = [key for key in dtypes if dtypes[key] == dtype]
        lengths = [[each[key][0] if key in each else 0 for key in keys] for each in told]
        mine = [torch.empty(0, dtype=dtype, device=device), *(slices[key] for key in keys if key in slices)]
        vectors = _exchanged(torch.cat(mine), [sum(each) for each in lengths], group)
        split = [torch.split(vector, sizes) for vector, sizes in zip(vectors, lengths, strict=True)]
        found |= {key: [parts[index] for parts in split] for index, key in enumerate(keys)}
    return found


def _exchanged(vector: Tensor, lengths: list[int], group: Group) -> list[Tensor]:
    """Return the vectors of all processes, whose lengths may differ."""
    padded = torch.cat([vector, vector.new_zeros(max(lengths) - len(vector))])
    everywhere = [torch.empty_like(padded) for _ in lengths]
    dist.all_gather(everywhere, padded, group)
    return [each[:length] for each, length in zip(everywhere, lengths, strict=True)]
