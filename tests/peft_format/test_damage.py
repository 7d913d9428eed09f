"""Damaged and hostile PEFT directories: an error of ours, and a model that is what it was."""

from __future__ import annotations

import json
import random
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lightning_lora import LoRAConfig, attach, load_adapter, save_adapter
from tests.conftest import TinyModel
from tests.contract import raises_and_changes_nothing, train_all

PREFIX = "base_model.model."
Q = f"{PREFIX}blocks.0.q_proj"
OURS = (ValueError, FileNotFoundError)


@pytest.fixture
def directory(tiny: nn.Module, rng: torch.Generator, tmp_path: Path) -> Path:
    config = {"target_modules": ["embed", "q_proj"], "modules_to_save": ["head"], "rank_pattern": {"0.q_proj": 1}}
    attach(tiny, LoRAConfig(rank=2, alpha=3.0, bias="lora_only", **config))
    train_all(tiny, rng)
    with torch.no_grad():
        for tensor in (tiny.head.weight, tiny.blocks[0]["q_proj"].bias):
            tensor.add_(1.0)
    save_adapter(tiny, tmp_path / "adapter")
    return tmp_path / "adapter"


def base() -> TinyModel:
    """The model that the directory's adapter was trained on."""
    torch.manual_seed(0)
    return TinyModel()


def refuses(directory: Path, match: str | None = None) -> None:
    model = base()
    with raises_and_changes_nothing(model, OURS, match):  # type: ignore[arg-type]
        load_adapter(model, directory)


def change_tensors(directory: Path, change: Callable[[dict[str, Tensor]], Any]) -> None:
    tensors = load_file(directory / "adapter_model.safetensors")
    change(tensors)
    save_file(tensors, directory / "adapter_model.safetensors")


def change_config(directory: Path, **changes: Any) -> None:
    path = directory / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


# --- tensors

Change = Callable[[dict[str, Tensor]], Any]


def lose(key: str) -> Change:
    return lambda tensors: tensors.pop(PREFIX + key)


def put(key: str, *shape: int, dtype: torch.dtype = torch.float32) -> Change:
    return lambda tensors: tensors.update({PREFIX + key: torch.zeros(shape, dtype=dtype)})


def move(old: str, new: str) -> Change:
    return lambda tensors: tensors.update({PREFIX + new: tensors.pop(PREFIX + old)})


A = "blocks.0.q_proj.lora_A.weight"
DAMAGES: dict[str, tuple[Change, str]] = {
    "missing factor": (lose("blocks.0.q_proj.lora_B.weight"), r"q_proj\.lora_B\.weight: missing from the file"),
    "missing head": (lose("head.bias"), r"head\.bias: missing from the file"),
    "missing bias": (lose("blocks.0.q_proj.base_layer.bias"), r"missing from the state: blocks\.0\.q_proj\.bias"),
    "unknown layer": (put("tail.lora_A.weight", 2, 2), "no module 'tail'"),
    "unknown tensor": (put("tail.weight", 2), r"tail\.weight: the model has no such tensor"),
    "no prefix": (lambda tensors: tensors.update({A: torch.zeros(2, 16)}), "keys without the prefix"),
    "factor of another rank": (put(A, 2, 16), r"file \(2, 16\) float32, expected \(1, 16\)"),
    "factor of another width": (put(A, 1, 15), r"expected \(1, 16\)"),
    "flat factor": (put(A, 16), r"expected \(1, 16\)"),
    "whole numbers": (put(A, 1, 16, dtype=torch.int32), "expected floating point"),
    "complex numbers": (put(A, 1, 16, dtype=torch.complex64), "no adapter holds"),
    "embedding as linear": (
        move("embed.lora_embedding_A", "embed.lora_A.weight"),
        r"embed\.lora_A\.weight: not expected",
    ),
    "magnitude without DoRA": (put("blocks.0.q_proj.lora_magnitude_vector", 16), "lora_magnitude_vector: not expected"),
    "a container": (put("blocks.lora_A.weight", 2, 2), "which has no adapter of this kind"),
    "a wrapper too many": (put("blocks.1.q_proj.base_layer.lora_A.weight", 2, 16), "no adapter of this kind"),
    "a path": (put("../../etc.lora_A.weight", 2, 2), "no module"),
    "nothing": (lambda tensors: tensors.clear(), r"head\.weight: missing from the file"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_unfitting_tensors_are_refused(damage: str, directory: Path) -> None:
    change, message = DAMAGES[damage]
    change_tensors(directory, change)
    refuses(directory, message)


def test_file_without_adapter_is_refused(directory: Path) -> None:
    change_tensors(directory, lambda tensors: tensors.clear())
    change_config(directory, modules_to_save=None)
    refuses(directory, "the file holds no adapter")


def test_problems_are_listed_in_one_error(directory: Path) -> None:
    for name in ("missing factor", "missing head", "unknown layer", "no prefix"):
        change_tensors(directory, DAMAGES[name][0])
    model = TinyModel()
    with pytest.raises(ValueError, match="does not fit this TinyModel; nothing was changed") as caught:
        load_adapter(model, directory)
    assert len(str(caught.value).splitlines()) == 6


# --- configs


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"r": 10**9}, r"q_proj.lora_A.weight: file \(2, 16\) float32, expected \(1000000000, 16\)"),
        ({"r": 10**400}, "r must be a number in range, not 1000"),
        ({"r": 2.5}, r"r must be a number in range, not 2\.5"),
        ({"r": True}, r"r must be a number in range, not True"),
        ({"r": -1}, r"r must be a number in range, not -1"),
        ({"r": "8"}, r"r must be a number in range, not '8'"),
        ({"lora_alpha": float("nan")}, r"lora_alpha must be a number in range, not nan"),
        ({"lora_alpha": float("inf")}, r"lora_alpha must be a number in range, not inf"),
        ({"lora_alpha": None}, r"lora_alpha must be a number in range, not None"),
        ({"lora_alpha": 0}, r"lora_alpha must be a number in range, not 0"),
        ({"lora_dropout": 1.0}, r"lora_dropout must be a number in range, not 1\.0"),
        ({"rank_pattern": ["q"]}, "rank_pattern must map names"),
        ({"rank_pattern": {"q_proj": "2"}}, "rank_pattern"),
        ({"rank_pattern": {"(": 2}}, "is not a valid regular expression"),
        ({"alpha_pattern": {"(a+)+$": 2}}, "too complex a regular expression"),
        ({"alpha_pattern": {".*.*.*.*.*x": 2}}, "too complex a regular expression"),
        ({"alpha_pattern": {"a" * 5000: 2}}, "too complex a regular expression"),
        ({"use_dora": "yes"}, "use_dora must be true or false, not 'yes'"),
        ({"use_dora": True}, "lora_magnitude_vector: missing"),
        ({"lora_bias": True}, "lora_bias"),
        ({"bias": "some"}, "bias='some' must be one of"),
        ({"bias": "none"}, "frozen tensor has different values"),
        ({"modules_to_save": "head"}, "modules_to_save must be a list of names, not 'head'"),
        ({"modules_to_save": None}, "frozen tensor has different values"),
        ({"modules_to_save": [["head"]]}, "must be a list of names"),
        ({"modules_to_save": ["norm", "head"]}, "norm.weight: missing from the file"),
        ({"trainable_token_indices": [1, 1]}, "holds a token twice"),
        ({"trainable_token_indices": [-1]}, "must be a list of token numbers"),
        ({"trainable_token_indices": [1]}, "the file has no rows for it"),
        ({"trainable_token_indices": {"embed": "1"}}, "must be a list of token numbers"),
        ({"peft_type": ["LORA"]}, "only 'LORA' adapters"),
        ({"init_lora_weights": {"a": 1}}, "changes the base model"),
    ],
)  # fmt: skip
def test_invalid_option_is_refused(changes: dict[str, Any], message: str, directory: Path) -> None:
    change_config(directory, **changes)
    refuses(directory, message)


@pytest.mark.parametrize("text", ["", "[]", "null", "{", '{"peft_type": "LORA"', "\ufeff{}", "[" * 100_000, '"LORA"'])
def test_config_that_is_not_an_object_is_refused(text: str, directory: Path) -> None:
    (directory / "adapter_config.json").write_text(text, encoding="utf-8")
    refuses(directory, r"adapter_config.json' cannot be loaded as a config")


# --- files


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_missing_file_is_named(name: str, directory: Path) -> None:
    (directory / name).unlink()
    refuses(directory, name)


@pytest.mark.parametrize("share", [0.0, 0.01, 0.3, 0.9, 0.999])
def test_truncated_file_is_refused_by_name(share: float, directory: Path) -> None:
    path = directory / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    refuses(directory, r"adapter_model.safetensors' cannot be read")


def test_huge_header_is_refused_without_allocating(directory: Path) -> None:
    header = json.dumps({f"{Q}.lora_A.weight": {"dtype": "F32", "shape": [2**40, 16], "data_offsets": [0, 2**46]}})
    path = directory / "adapter_model.safetensors"
    path.write_bytes(struct.pack("<Q", len(header)) + header.encode())
    refuses(directory, "cannot be read")


def test_malicious_bin_file_is_refused_without_running(directory: Path, tmp_path: Path) -> None:
    class Payload:
        def __reduce__(self) -> tuple[Any, tuple[Path]]:
            return (Path.mkdir, (tmp_path / "run",))

    (directory / "adapter_model.safetensors").unlink()
    torch.save({"key": Payload()}, directory / "adapter_model.bin")
    refuses(directory, r"adapter_model.bin' cannot be read")
    assert not (tmp_path / "run").exists()
    torch.save([1, 2], directory / "adapter_model.bin")
    refuses(directory, r"adapter_model.bin' does not contain a mapping of names to tensors")


@pytest.mark.filterwarnings("ignore:adapter_config.json has unknown options.*")
@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(1, 5))])
def test_random_damage_is_refused_or_harmless(seed: int, directory: Path) -> None:
    """Flipped, lost and doubled bytes anywhere: of the numbers only a checksum could tell, of the rest we do."""
    draw = random.Random(seed)
    files = {name: (directory / name).read_bytes() for name in ("adapter_config.json", "adapter_model.safetensors")}
    loaded = 0
    for _ in range(500):
        name = draw.choice(list(files))
        (directory / name).write_bytes(damaged(files[name], draw))
        model = base()
        try:
            load_adapter(model, directory)
        except OURS:
            assert not any("lora" in key for key in model.state_dict())
        else:
            loaded += 1
            assert sum(".lora." in key for key in model.state_dict()) == 6
        (directory / name).write_bytes(files[name])
    assert 50 < loaded < 450


def damaged(content: bytes, draw: random.Random) -> bytes:
    data, at = bytearray(content), draw.randrange(len(content))
    kind = draw.choice(["flip", "lose", "double", "fill"])
    if kind == "flip":
        data[at] ^= 1 << draw.randrange(8)
    elif kind == "lose":
        del data[at : at + draw.randrange(1, 20)]
    elif kind == "double":
        data[at:at] = data[at : at + draw.randrange(1, 20)]
    else:
        data[at : at + 4] = draw.choice([b"\x00" * 4, b"\xff" * 4, b"9999", b"null", b'"": '])
    return bytes(data)
