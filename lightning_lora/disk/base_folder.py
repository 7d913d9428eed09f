"""The folder of a base model as Hugging Face lays it out: safetensors in one file or several, and small files."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lightning_lora.names import listed
from lightning_lora.storage.safetensors import StoredTensor, TensorFile, read_table

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
CONFIG_FILE = "config.json"
_WEIGHTS = (".safetensors", ".index.json", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".onnx", ".gguf")
_LARGEST_JSON = 256 * 2**20


@dataclass(frozen=True)
class BaseFolder:
    """A base model on disk.

    Attributes:
        shards: Name of a file -> what it holds.
        index: What the index says, of several files.
        config: The model's config, if there is one.
        carried: The small files that belong to the model.
    """

    shards: Mapping[str, TensorFile]
    index: Mapping[str, Any] | None = None
    config: Mapping[str, Any] = field(default_factory=dict)
    carried: tuple[Path, ...] = ()

    @property
    def tensors(self) -> dict[str, StoredTensor]:
        """Every tensor by name."""
        return {name: tensor for shard in self.shards.values() for name, tensor in shard.tensors.items()}


def open_base(path: Path) -> BaseFolder:
    """Return what a folder, or a single file of safetensors, holds; no tensor is read.

    Raises:
        ValueError: The files cannot be read, contradict each other, or name files outside of the folder.
        FileNotFoundError: There are none.
    """
    if path.is_file():
        return BaseFolder({SINGLE_FILE: read_table(path)})
    if not path.is_dir():
        raise FileNotFoundError(f"{str(path)!r} is not there; name the folder of a model, or a file of safetensors.")
    index = read_json(path / INDEX_FILE) if (path / INDEX_FILE).is_file() else None
    if index is None and not (path / SINGLE_FILE).is_file():
        raise FileNotFoundError(
            f"{str(path)!r} holds neither {SINGLE_FILE} nor {INDEX_FILE}. Other formats are not read: save the model "
            "with save_pretrained(..., safe_serialization=True)."
        )
    names = [SINGLE_FILE] if index is None else _shard_names(path, index)
    shards = {name: read_table(path / name) for name in names}
    if index is not None:
        _check_index(index["weight_map"], shards)
    config = read_json(path / CONFIG_FILE) if (path / CONFIG_FILE).is_file() else {}
    carried = tuple(sorted(each for each in path.iterdir() if each.is_file() and not each.name.endswith(_WEIGHTS)))
    return BaseFolder(shards, index, config, carried)


def read_json(path: Path) -> dict[str, Any]:
    """Return the object of a JSON file.

    Raises:
        ValueError: It is no such file.
    """
    try:
        if path.stat().st_size > _LARGEST_JSON:
            raise ValueError(f"it has {path.stat().st_size:,} bytes")
        found = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{str(path)!r} cannot be read as JSON: {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{str(path)!r} holds a {type(found).__name__}, not an object.")
    return found


def _shard_names(folder: Path, index: Mapping[str, Any]) -> list[str]:
    where = index.get("weight_map")
    if not (isinstance(where, dict) and where and all(isinstance(name, str) for name in where.values())):
        raise ValueError(f"{str(folder / INDEX_FILE)!r} has no weight_map of names.")
    names = sorted(set(where.values()))
    # Both kinds of slashes, on every system: a folder made here is read elsewhere.
    hostile = [name for name in names if any(c in name for c in "/\\:\0") or not name.endswith(".safetensors")]
    if hostile:
        raise ValueError(f"{str(folder / INDEX_FILE)!r} names files that are none of this folder: {listed(hostile)}.")
    if missing := [name for name in names if not (folder / name).is_file()]:
        raise FileNotFoundError(f"{str(folder)!r} lacks {listed(missing)}, which its index names.")
    return names


def _check_index(where: Mapping[str, str], shards: Mapping[str, TensorFile]) -> None:
    stored = [(name, shard) for shard, table in shards.items() for name in table.tensors]
    if wrong := [name for name, shard in stored if where.get(name) != shard]:
        raise ValueError(f"The index of the base puts {listed(wrong)} elsewhere than where they are.")
    if missing := sorted(where.keys() - {name for name, _ in stored}):
        raise ValueError(f"The index of the base names tensors that its files do not hold: {listed(missing)}.")
