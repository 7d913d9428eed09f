"""Files of safetensors: tables, tensors and metadata, whatever wrote the file."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from lightning_lora.storage.safetensors import Layout, TensorWriter, read_file, read_table


def tensors_of_all_kinds() -> dict[str, Tensor]:
    numbers = torch.arange(12).reshape(3, 4)
    kinds = (torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.uint8, torch.complex64)
    found = {str(dtype): numbers.to(dtype) for dtype in kinds}
    return found | {"bool": numbers > 5, "scalar": torch.tensor(1.5), "empty": torch.empty(0, 4), "last": torch.ones(3)}


def write(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    layouts = {name: Layout(tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    with path.open("wb") as file:
        writer = TensorWriter(file, layouts, metadata)
        for name, tensor in tensors.items():
            writer.write(name, tensor)


def test_library_reads_what_is_written(tmp_path: Path) -> None:
    path, tensors = tmp_path / "some.safetensors", tensors_of_all_kinds()
    write(path, tensors, {"format": "pt", "base": "text"})
    found = load_file(path)
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor)


def test_table_lists_tensors_in_file_order_unread(tmp_path: Path) -> None:
    path, tensors = tmp_path / "some.safetensors", tensors_of_all_kinds()
    write(path, tensors, {"format": "pt", "base": "text"})
    table = read_table(path)
    assert list(table.tensors) == list(tensors)
    assert table.metadata == {"format": "pt", "base": "text"}
    for name, stored in table.tensors.items():
        assert (stored.dtype, stored.shape) == (tensors[name].dtype, tuple(tensors[name].shape))
        assert stored.size == tensors[name].nbytes
        assert torch.equal(stored.read(), tensors[name])


def test_written_files_have_the_same_bytes_in_every_process(tmp_path: Path) -> None:
    write(tmp_path / "some.safetensors", {"a": torch.zeros(2)}, {"format": "pt", "base": "text", "another": ""})
    header = (tmp_path / "some.safetensors").read_bytes()[8:]
    assert header.startswith(b'{"__metadata__":{"format":"pt","base":"text","another":""},"a":{"dtype":"F32"')


def test_writing_to_a_read_tensor_leaves_the_file_alone(tmp_path: Path) -> None:
    path = tmp_path / "some.safetensors"
    save_file({"a": torch.ones(3)}, path)
    read_file(path)[0]["a"].zero_()
    read_table(path).tensors["a"].read().zero_()
    assert torch.equal(load_file(path)["a"], torch.ones(3))


def test_file_without_tensors(tmp_path: Path) -> None:
    path = tmp_path / "none.safetensors"
    save_file({}, path, metadata={"format": "pt"})
    assert read_file(path) == ({}, {"format": "pt"})


@pytest.mark.parametrize("content", [b"", b"\xff" * 8, b"\x02" + b"\0" * 7 + b"[]", b"\x08" + b"\0" * 7 + b'{"a":{}}'])
@pytest.mark.parametrize("read", [read_file, read_table])
def test_damaged_file_is_refused_by_name(content: bytes, read: Any, tmp_path: Path) -> None:
    path = tmp_path / "some.safetensors"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"some\.safetensors' cannot be read as safetensors"):
        read(path)


def test_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="missing"):
        read_table(tmp_path / "missing.safetensors")


def test_unknown_precision_is_refused(tmp_path: Path) -> None:
    text = json.dumps({"a": {"dtype": "F4", "shape": [2], "data_offsets": [0, 1]}}).encode()
    path = tmp_path / "some.safetensors"
    path.write_bytes(struct.pack("<Q", len(text)) + text + b"\0")
    with pytest.raises(ValueError, match=r"'a' has the unknown precision 'F4'"):
        read_table(path)
