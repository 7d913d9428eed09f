"""Files of safetensors: read by the library, tensor by tensor, and written in the memory of one tensor.

The library's writer wants all tensors of a file at once, which a model larger than memory does not allow, and it
shuffles the entries of the metadata from process to process; so the header is put together here.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

import torch
from torch import Tensor

from lightning_lora.names import listed

_DTYPES = {
    "BOOL": torch.bool,
    **{f"I{bits}": getattr(torch, f"int{bits}") for bits in (8, 16, 32, 64)},
    **{f"U{bits}": getattr(torch, f"uint{bits}") for bits in (8, 16, 32, 64)},
    **{"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64},
    **{"F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "C64": torch.complex64},
}
_CODES = {dtype: code for code, dtype in _DTYPES.items()}


@dataclass(frozen=True)
class Layout:
    """Precision and shape of a tensor in a file."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """Its bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class StoredTensor(Layout):
    """A tensor in a file, unread."""

    path: Path
    name: str

    def read(self) -> Tensor:
        """Return the tensor, mapped into memory; writing to it leaves the file unchanged."""
        with _opened(self.path) as file:
            tensor: Tensor = file.get_tensor(self.name)
        return tensor


@dataclass(frozen=True)
class TensorFile:
    """The table of contents of a file.

    Attributes:
        tensors: Every tensor by its name, in the order of the file.
        metadata: The texts that the file carries.
    """

    tensors: Mapping[str, StoredTensor]
    metadata: Mapping[str, str]


def read_table(path: Path) -> TensorFile:
    """Return a file's table of contents, without reading any tensor.

    Raises:
        ValueError: It is not a file of safetensors, or is damaged.
        FileNotFoundError: It does not exist.
    """
    with _opened(path) as file:
        names = file.offset_keys()
        return TensorFile({name: _stored(path, name, file) for name in names}, file.metadata() or {})


def _stored(path: Path, name: str, file: Any) -> StoredTensor:
    found = file.get_slice(name)
    if (dtype := _DTYPES.get(found.get_dtype())) is None:
        raise ValueError(f"{name!r} has the unknown precision {found.get_dtype()!r}")
    return StoredTensor(dtype, tuple(found.get_shape()), path, name)


def read_file(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return all tensors of a file, mapped into memory, and its metadata.

    Raises:
        ValueError: It is not a file of safetensors, or is damaged.
        FileNotFoundError: It does not exist.
    """
    with _opened(path) as file:
        return {name: file.get_tensor(name) for name in file.offset_keys()}, file.metadata() or {}


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    from safetensors import SafetensorError, safe_open  # late: importing the package stays quick

    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (SafetensorError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"{str(path)!r} cannot be read as safetensors; it may be truncated or in another format: {error}"
        ) from error


class TensorWriter:
    """Writes a file whose tensors come one after another, in the order of the layouts."""

    def __init__(self, file: BinaryIO, layouts: Mapping[str, Layout], metadata: Mapping[str, str]) -> None:
        self._file, self._left = file, dict(layouts)
        if homeless := {name: layout.dtype for name, layout in layouts.items() if layout.dtype not in _CODES}:
            found = [f"{name} ({str(dtype).removeprefix('torch.')})" for name, dtype in homeless.items()]
            raise ValueError(f"safetensors has no such precision: {listed(found)}. A .ckpt can hold it.")
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
        assert name == next(iter(self._left)), "tensors come in the order of the header"
        layout = self._left.pop(name)
        assert (tensor.dtype, tuple(tensor.shape)) == (layout.dtype, layout.shape)
        if layout.size:
            self._file.write(memoryview(cast(Any, tensor.detach().contiguous().view(-1).view(torch.uint8).numpy())))
