"""Files of safetensors: tensor by tensor in the memory of one for a whole model, and all at once for an adapter.

The safetensors library maps a file into memory when it reads, and wants all tensors at once when it writes; for models
that do not fit into memory both is too much, and for an adapter's many small tensors it takes twice as long. The
format: eight bytes with the length of a header, the header as JSON, and the tensors one after another.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, cast

import torch
from torch import Tensor

_DTYPES = {
    "BOOL": torch.bool,
    **{f"I{bits}": getattr(torch, f"int{bits}") for bits in (8, 16, 32, 64)},
    **{f"U{bits}": getattr(torch, f"uint{bits}") for bits in (8, 16, 32, 64)},
    **{"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64},
    **{"F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "C64": torch.complex64},
}
_CODES = {dtype: code for code, dtype in _DTYPES.items()}
_LARGEST_HEADER = 100_000_000  # as in the library
_AT_ONCE = 8 * 2**20


class StoredTensor(NamedTuple):
    """Where a tensor lies in a file."""

    path: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    size: int

    def read(self) -> Tensor:
        """Return the tensor."""
        tensor = torch.empty(self.shape, dtype=self.dtype)
        if self.size:
            with self.path.open("rb") as file:
                file.seek(self.start)
                count = file.readinto(_bytes_of(tensor))
            if count != self.size:
                raise ValueError(f"{str(self.path)!r} has become shorter while it was read.")
        return tensor

    def elements(self, places: Sequence[int]) -> Tensor:
        """Return the elements at these places of the flattened tensor, and read no others."""
        found = bytearray()
        with self.path.open("rb") as file:
            for place in places:
                file.seek(self.start + place * self.dtype.itemsize)
                found += file.read(self.dtype.itemsize)
        if len(found) != len(places) * self.dtype.itemsize:
            raise ValueError(f"{str(self.path)!r} has become shorter while it was read.")
        return torch.frombuffer(found, dtype=self.dtype) if found else torch.empty(0, dtype=self.dtype)

    def blocks(self) -> Iterator[bytes]:
        """Yield the tensor's bytes as they are stored."""
        with self.path.open("rb") as file:
            file.seek(self.start)
            left = self.size
            while left:
                block = file.read(min(left, _AT_ONCE))
                if not block:
                    raise ValueError(f"{str(self.path)!r} has become shorter while it was read.")
                left -= len(block)
                yield block


def _bytes_of(tensor: Tensor) -> memoryview:
    return memoryview(cast(Any, tensor.view(-1).view(torch.uint8).numpy()))


class Layout(NamedTuple):
    """What a tensor in a file will be."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """Its bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class TensorFile:
    """The table of contents of a file.

    Attributes:
        tensors: Name -> where it lies, in the order of the file.
        metadata: The texts that the file carries.
    """

    tensors: Mapping[str, StoredTensor]
    metadata: Mapping[str, str]

    def mapped(self) -> dict[str, Tensor]:
        """Return all tensors as views of the file, mapped into memory; what is written to them stays out of it."""
        stored = [*self.tensors.values()]
        if not stored:
            return {}
        begin, end = stored[0].start, stored[-1].start + stored[-1].size
        whole = torch.from_file(str(stored[0].path), shared=False, size=end, dtype=torch.uint8)
        dtypes = {each.dtype for each in stored}
        dtype = dtypes.pop() if len(dtypes) == 1 and not begin % stored[0].dtype.itemsize else torch.uint8
        sizes = [each.size // dtype.itemsize for each in stored]
        parts = torch.split_with_sizes(whole[begin:].view(dtype), sizes)
        return {
            name: _typed(part, each).view(each.shape)
            for (name, each), part in zip(self.tensors.items(), parts, strict=True)
        }


def _typed(part: Tensor, stored: StoredTensor) -> Tensor:
    if part.dtype == stored.dtype:
        return part
    return (part.clone() if stored.start % stored.dtype.itemsize else part).view(stored.dtype)


def read_table(path: Path) -> TensorFile:
    """Return what a file holds, without reading any tensor.

    Raises:
        ValueError: It is no file of safetensors, or a damaged one.
        FileNotFoundError: There is none.
    """
    size = path.stat().st_size
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > min(size - 8, _LARGEST_HEADER):
                raise ValueError("its header is longer than the file, or than any header may be")
            return _table(path, json.loads(file.read(length)), 8 + length, size)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        reason = error if type(error) is ValueError else f"its header makes no sense ({type(error).__name__})"
        raise ValueError(
            f"{str(path)!r} cannot be read as safetensors; it may be truncated or something else: {reason}"
        ) from error


def _table(path: Path, header: dict[str, Any], begin: int, size: int) -> TensorFile:
    metadata = header.pop("__metadata__", None) or {}
    # By both ends: an empty tensor may lie where another begins.
    entries = sorted(header.items(), key=lambda item: item[1]["data_offsets"])
    found, at = {}, 0
    for name, entry in entries:
        dtype, shape = _DTYPES.get(entry["dtype"]), tuple(entry["shape"])
        start, end = entry["data_offsets"]
        if dtype is None:
            raise ValueError(f"{name!r} is of the unknown precision {entry['dtype']!r}")
        if any(type(number) is not int or not 0 <= number < 2**62 for number in (*shape, start, end)):
            raise ValueError(f"the shape or the place of {name!r} makes no sense")
        if start != at or end - start != math.prod(shape) * dtype.itemsize:
            raise ValueError(f"the place of {name!r} does not fit its shape, or overlaps another tensor's")
        found[name] = StoredTensor(path, dtype, shape, begin + start, end - start)
        at = end
    if begin + at != size:
        raise ValueError(f"its tensors need {begin + at:,} bytes, and it has {size:,}")
    return TensorFile(found, {str(key): str(value) for key, value in metadata.items()})


class TensorWriter:
    """Writes a file whose tensors come one after another, in the order of the layouts."""

    def __init__(self, file: BinaryIO, layouts: Mapping[str, Layout], metadata: Mapping[str, str]) -> None:
        self._file, self._left = file, dict(layouts)
        header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
        at = 0
        for name, layout in layouts.items():
            offsets = [at, at + layout.size]
            header[name] = {"dtype": _CODES[layout.dtype], "shape": list(layout.shape), "data_offsets": offsets}
            at += layout.size
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)  # tensors begin at multiples of eight
        file.write(struct.pack("<Q", len(text)) + text)

    def write(self, name: str, tensor: Tensor) -> None:
        """Write the next tensor."""
        layout = self._next(name)
        assert (tensor.dtype, tuple(tensor.shape)) == (layout.dtype, layout.shape)
        if layout.size:
            self._file.write(_bytes_of(tensor.detach().contiguous()))

    def copy(self, name: str, stored: StoredTensor) -> None:
        """Write the next tensor as another file has it."""
        layout = self._next(name)
        assert (stored.dtype, stored.shape) == (layout.dtype, layout.shape)
        for block in stored.blocks():
            self._file.write(block)

    def _next(self, name: str) -> Layout:
        assert name == next(iter(self._left)), "tensors come in the order of the header"
        return self._left.pop(name)
