"""Base folders: damaged files give one line of error and nothing is written."""

from __future__ import annotations

import json
import random
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_model
from torch import nn

from lightning_lora import LoRAConfig, attach, save_adapter
from tests.files import run
from tests.peft_format.kinds import WARNED

pytestmark = WARNED


def change_index(base: Path, name: str, file: str) -> None:
    path = base / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"][name] = file
    path.write_text(json.dumps(index))


def put_header(path: Path, header: object, data: bytes = b"") -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


HUGE = {"dtype": "F32", "shape": [2**40, 2**20], "data_offsets": [0, 2**62]}
WRONG = {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}
UNREADABLE = "cannot be read as safetensors"
DAMAGES: dict[str, tuple[Callable[[Path, Path], Any], str]] = {
    "a shard elsewhere": (lambda a, b: change_index(b, "head.bias", "../b.safetensors"), "outside this folder"),
    "a shard at the root": (lambda a, b: change_index(b, "head.bias", "/b.safetensors"), "outside this folder"),
    "a shard of windows": (lambda a, b: change_index(b, "head.bias", "..\\b.safetensors"), "outside this folder"),
    "a shard of pickles": (lambda a, b: change_index(b, "head.bias", "b.bin"), "outside this folder"),
    "a missing shard": (lambda a, b: (b / "b.safetensors").unlink(), "which its index names"),
    "a name in the wrong shard": (lambda a, b: change_index(b, "head.bias", "a.safetensors"), "under the wrong files"),
    "a name in no shard": (lambda a, b: change_index(b, "head.more", "a.safetensors"), "do not hold"),
    "an index of nothing": (lambda a, b: (b / "model.safetensors.index.json").write_text("[]"), "not an object"),
    "an index that is cut": (lambda a, b: (b / "model.safetensors.index.json").write_text("{"), "as JSON"),
    "an empty shard": (lambda a, b: (b / "a.safetensors").write_bytes(b""), UNREADABLE),
    "a cut shard": (
        lambda a, b: (b / "a.safetensors").write_bytes((b / "a.safetensors").read_bytes()[:-1]),
        UNREADABLE,
    ),
    "a long header": (lambda a, b: (b / "a.safetensors").write_bytes(b"\xff" * 9), UNREADABLE),
    "a header of nothing": (lambda a, b: put_header(b / "a.safetensors", b"[]"), UNREADABLE),
    "a deep header": (lambda a, b: put_header(b / "a.safetensors", b"[" * 100_000), UNREADABLE),
    "a huge tensor": (lambda a, b: put_header(b / "a.safetensors", {"x": HUGE}), UNREADABLE),
    "a tensor of another size": (
        lambda a, b: put_header(b / "a.safetensors", {"x": WRONG}, b"1234"),
        UNREADABLE,
    ),
    "no config": (lambda a, b: (a / "adapter_config.json").unlink(), "does not exist"),
    "a cut adapter": (lambda a, b: (a / "adapter_model.safetensors").write_bytes(b"1234"), "truncated"),
    "no base": (lambda a, b: shutil.rmtree(b), "does not exist"),
    "no adapter": (lambda a, b: shutil.rmtree(a), "does not exist"),
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("command", ["merge", "verify"])
def test_damaged_files_give_one_line_error(
    command: str, damage: str, files: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    do, expected = DAMAGES[damage]
    do(*files)
    assert run(command, *files, *[tmp_path / "out"] * (command == "merge")) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("lightning-lora: error: ")
    assert err.count("\n") == 1
    assert expected in err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["a.safetensors", "model.safetensors.index.json", "config.json"])
def test_changed_bytes_give_no_traceback(
    name: str, files: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    path, draw = files[1] / name, random.Random(1)
    if name == "config.json":
        config = {"architectures": ["ToyForCausalLM"], "tie_word_embeddings": True, "model_type": "toy"}
        path.write_text(json.dumps(config))
    original = path.read_bytes()
    for _ in range(150):
        changed = bytearray(original)
        for _ in range(draw.randint(1, 4)):
            at = draw.randrange(min(len(changed), 700))  # of a shard, the header
            changed[at : at + draw.randint(0, 2)] = draw.choice([b"0", b"9", b"[", b'"', b"{}", b"\xff", b"-", b"null"])
        path.write_bytes(changed)
        assert run("verify", *files) in (0, 1)
    assert "Traceback" not in capsys.readouterr().err


@pytest.mark.parametrize("suffix", [".bin", ".pt", ".ckpt"])
def test_base_in_another_format_gets_the_way_to_safetensors(
    suffix: str, files: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save({}, base := files[1] / f"base{suffix}")
    assert run("verify", files[0], base) == 1
    assert f"is a {suffix} file, and only safetensors are read. Load the base, write it" in capsys.readouterr().err


def test_base_that_was_written_as_the_message_says_is_read(tiny: nn.Module, tmp_path: Path) -> None:
    save_model(tiny, str(tmp_path / "base.safetensors"))
    attach(tiny, LoRAConfig(rank=2, target_modules=["q_proj"]))
    save_adapter(tiny, tmp_path / "adapter")
    assert run("verify", tmp_path / "adapter", tmp_path / "base.safetensors") == 0
