"""The files of a PEFT directory: a config, tensors, and the fingerprint of the base that they were trained on."""

from __future__ import annotations

import json
import pickle
import warnings
import zipfile
from collections.abc import Mapping
from os import PathLike
from pathlib import Path

import torch
from torch import Tensor

from lightning_lora.fingerprint import Fingerprint, Sample, from_plain, to_plain
from lightning_lora.peft_format.config import PeftConfig, parse_config, unknown_options_message
from lightning_lora.storage.safetensors import Layout, TensorWriter, read_table

CONFIG_FILE = "adapter_config.json"
TENSORS_FILE = "adapter_model.safetensors"
PICKLED_FILE = "adapter_model.bin"
_BASE_KEY = "lightning_lora_base"
_LARGEST_CONFIG = 64 * 2**20
_UNREADABLE = (pickle.UnpicklingError, EOFError, RuntimeError, zipfile.BadZipFile, LookupError, ValueError, OSError)


def is_adapter_directory(path: str | PathLike[str]) -> bool:
    """Return whether there is a directory, which may hold an adapter as PEFT writes it."""
    return Path(path).is_dir()


def read_config(path: Path) -> PeftConfig:
    """Return the config of a PEFT directory.

    Raises:
        ValueError: It cannot be read, or uses options that have no equal here.
        FileNotFoundError: It is not there.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{str(path)!r} is not there; a PEFT directory holds {CONFIG_FILE} and {TENSORS_FILE}.")
    try:
        if path.stat().st_size > _LARGEST_CONFIG:
            raise ValueError(f"it has {path.stat().st_size:,} bytes")
        config, unknown = parse_config(json.loads(path.read_bytes()))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{str(path)!r} is no config that can be loaded: {error}. Nothing was changed.") from error
    if unknown:
        warnings.warn(unknown_options_message(unknown), stacklevel=4)
    return config


def read_tensors(directory: Path) -> dict[str, Tensor]:
    """Return the tensors of a PEFT directory, under the names that they have in the file.

    Raises:
        ValueError: They cannot be read.
        FileNotFoundError: They are not there.
    """
    return read_contents(directory)[0]


def read_contents(directory: Path) -> tuple[dict[str, Tensor], str]:
    """Return the tensors of a PEFT directory, as ``read_tensors``, and the text that ``parse_base`` reads."""
    path = directory / TENSORS_FILE
    if path.is_file():
        table = read_table(path)
        return table.mapped(), table.metadata.get(_BASE_KEY, "")
    path = directory / PICKLED_FILE
    if not path.is_file():
        raise FileNotFoundError(f"{str(directory)!r} holds neither {TENSORS_FILE} nor {PICKLED_FILE}.")
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except PermissionError:
        raise
    except _UNREADABLE as error:
        raise ValueError(
            f"{str(path)!r} cannot be read; it may be truncated or something else. Nothing was changed. The reader "
            f"said: {type(error).__name__}: {error}"
        ) from error
    if isinstance(found, dict) and all(isinstance(k, str) and isinstance(v, Tensor) for k, v in found.items()):
        return found, ""
    raise ValueError(f"{str(path)!r} holds no tensors by name. Nothing was changed.")


def read_base(directory: Path) -> dict[str, Sample]:
    """Return the fingerprint of the base in a PEFT directory; empty if it has none, as those that PEFT wrote.

    Raises:
        ValueError: It makes no sense.
    """
    path = directory / TENSORS_FILE
    return parse_base(read_table(path).metadata.get(_BASE_KEY, ""), directory) if path.is_file() else {}


def parse_base(text: str, directory: Path) -> dict[str, Sample]:
    """Return the fingerprint that a PEFT directory holds as text.

    Raises:
        ValueError: It makes no sense.
    """
    try:
        return from_plain(json.loads(text)) if text else {}
    except (RecursionError, ValueError) as error:
        raise ValueError(f"{str(directory / TENSORS_FILE)!r} has a damaged fingerprint of its base: {error}") from error


def write_tensors(tensors: Mapping[str, Tensor], path: Path, base: Fingerprint) -> None:
    """Write the tensors, with the base's fingerprint; the same ones always give the same bytes."""
    # Not in the config: PEFT warns of options that it does not know, and reads no metadata.
    known = {_BASE_KEY: json.dumps(to_plain(base), separators=(",", ":"))} if base else {}
    # As the library orders them, so that each lies at a multiple of its size; but it shuffles the metadata.
    names = sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))
    layouts = {name: Layout(tensors[name].dtype, tuple(tensors[name].shape)) for name in names}
    with path.open("wb") as file:
        writer = TensorWriter(file, layouts, {"format": "pt"} | known)
        for name in names:
            writer.write(name, tensors[name])
