"""A look into a checkpoint: plain values as they are, whatever else is in it, and nothing runs."""

from __future__ import annotations

import collections
import io
import zipfile
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lightning_lora.storage.checkpoint import plain_values

PLAIN = {"texts": ["a", "b"], "numbers": [1, -2.5, True, None], "nested": {"rows": [[0, 4, 1]]}}
OTHERS: dict[str, Any] = {
    "state_dict": collections.OrderedDict(weight=torch.ones(3), half=torch.ones(2, dtype=torch.bfloat16)),
    "parameter": nn.Parameter(torch.ones(2)),
    "hyper_parameters": Namespace(path=Path("here"), dtype=torch.float16),
    "set": {1, 2},
    "bytes": b"bytes",
    "module": nn.Linear(2, 2),
}


def written(content: object) -> io.BytesIO:
    stream = io.BytesIO()
    torch.save(content, stream)
    return stream


def test_plain_values_round_trip() -> None:
    found = plain_values(written({"record": PLAIN} | OTHERS))
    assert found["record"] == PLAIN
    assert found.keys() == {"record", *OTHERS}


def test_plain_values_run_no_code() -> None:
    class Trap:
        def __reduce__(self) -> Any:
            return exec, ("raise SystemExit",)

    assert plain_values(written({"record": PLAIN, "trap": Trap()}))["record"] == PLAIN


def test_plain_values_read_only_the_index() -> None:
    class Counting(io.BytesIO):
        count = 0

        def read(self, size: int | None = -1) -> bytes:
            found = super().read(size)
            self.count += len(found)
            return found

    stream = Counting(written({"record": PLAIN, "large": torch.zeros(2**18)}).getvalue())
    assert plain_values(stream)["record"] == PLAIN
    assert stream.count < 2**18  # a fourth of the file: its directory is looked for in the last 64 kB


def test_damaged_file_has_no_plain_values() -> None:
    whole = written({"record": PLAIN}).getvalue()
    start = whole.index(b"texts")
    assert plain_values(io.BytesIO(whole[:start] + b"wrong" + whole[start + 5 :])) == {}
    for content in (b"", b"something else", whole[: len(whole) // 2], written([1]).getvalue()):
        assert plain_values(io.BytesIO(content)) == {}


@pytest.mark.parametrize("length", [1, 3, 50])
def test_garbage_index_has_no_plain_values(length: int) -> None:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        archive.writestr("archive/data.pkl", bytes(range(40, 40 + length)))
    assert plain_values(stream) == {}
