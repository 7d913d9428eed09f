"""Files of safetensors: what the library reads in them is what is read here."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from lightning_lora.storage.safetensors import read_table


def tensors_of_all_kinds() -> dict[str, Tensor]:
    numbers = torch.arange(12).reshape(3, 4)
    kinds = (torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.uint8, torch.complex64)
    found = {str(dtype): numbers.to(dtype) for dtype in kinds}
    return found | {"bool": numbers > 5, "scalar": torch.tensor(1.5), "empty": torch.empty(0, 4), "last": torch.ones(3)}


def with_header_of(path: Path, more: int) -> None:
    """Let a file's header be longer, so that its tensors begin elsewhere."""
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = content[8 : 8 + length] + b" " * more
    path.write_bytes(struct.pack("<Q", len(header)) + header + content[8 + length :])


@pytest.mark.parametrize("more", [0, 1, 4])
@pytest.mark.parametrize("kind", ["all kinds", "float32", "bool"])
def test_every_tensor_is_what_the_library_reads_wherever_it_lies(kind: str, more: int, tmp_path: Path) -> None:
    path, tensors = tmp_path / "some.safetensors", tensors_of_all_kinds()
    if kind != "all kinds":
        tensors = {name: tensor.bool().to(getattr(torch, kind)) for name, tensor in tensors.items()}
    save_file(tensors, path)
    with_header_of(path, more)
    expected, found = load_file(path), read_table(path).mapped()
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor)


def test_what_is_written_to_a_mapped_tensor_stays_out_of_the_file(tmp_path: Path) -> None:
    path = tmp_path / "some.safetensors"
    save_file({"a": torch.ones(3)}, path)
    read_table(path).mapped()["a"].zero_()
    assert torch.equal(load_file(path)["a"], torch.ones(3))


def test_a_file_without_tensors_has_none(tmp_path: Path) -> None:
    path = tmp_path / "none.safetensors"
    save_file({}, path, metadata={"format": "pt"})
    assert read_table(path).mapped() == {}


def test_an_empty_tensor_may_be_named_after_the_one_that_begins_where_it_lies(tmp_path: Path) -> None:
    entries = {"a": ([2], [0, 8]), "b": ([3], [8, 20]), "empty": ([0], [8, 8])}
    header = {name: {"dtype": "F32", "shape": shape, "data_offsets": at} for name, (shape, at) in entries.items()}
    text = json.dumps(header).encode()
    path = tmp_path / "some.safetensors"
    path.write_bytes(struct.pack("<Q", len(text)) + text + torch.arange(5.0).numpy().tobytes())
    expected, found = load_file(path), read_table(path).mapped()
    assert {name: tensor.tolist() for name, tensor in found.items()} == {n: t.tolist() for n, t in expected.items()}
