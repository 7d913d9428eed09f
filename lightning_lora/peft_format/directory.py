"""The files of a PEFT directory: a config, tensors, and the fingerprint of the base that they were trained on."""

from __future__ import annotations

import functools
import json
import pickle
import re
import warnings
import zipfile
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from lightning_lora.fingerprint import Fingerprint, Sample, from_plain, to_plain
from lightning_lora.names import listed
from lightning_lora.peft_format.config import (
    KNOWN_ORDER,
    LAST_KNOWN_PEFT,
    TIMES_PEFT_ADDS_OUT_PROJ,
    PeftConfig,
    parse_config,
)
from lightning_lora.peft_format.names import PREFIX, TOKENS_SUFFIX
from lightning_lora.storage.adapter_file import AdapterFile, StoredLayer, StoredTokens, StoredWeight
from lightning_lora.storage.atomic import read_directory_whole
from lightning_lora.storage.safetensors import Layout, TensorWriter, read_file

CONFIG_FILE = "adapter_config.json"
TENSORS_FILE = "adapter_model.safetensors"
PICKLED_FILE = "adapter_model.bin"
CARD_FILE = "README.md"
CARD_MARK = "<!-- written by lightning_lora; without this line the file is never replaced -->"
_BASE_KEY = "lightning_lora_base"
_ROOT_KEY = "lightning_lora_root"
_LARGEST_CONFIG = 64 * 2**20
_HUB_NAME = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")
_WRAPPER = ".base_layer"
_ATTENTION_OUTPUT = f"{_WRAPPER}.out_proj"
_SHORT = {
    **{".lora_A.weight": "A", ".lora_B.weight": "B", ".lora_B.bias": "bias"},
    **{".lora_embedding_A": "A", ".lora_embedding_B": "B", ".lora_magnitude_vector": "magnitude"},
}
_UNREADABLE = (pickle.UnpicklingError, EOFError, RuntimeError, zipfile.BadZipFile, LookupError, ValueError, OSError)


@dataclass(frozen=True)
class PeftFile(AdapterFile):
    """A PEFT directory, read without its model; names are relative to the model that PEFT wrapped.

    Attributes:
        config: The parsed options.
        alien: Names in the file that do not begin as PEFT's do.
        base_text: The fingerprint of the base, as the file holds it.
        root: Name, in the module that was saved, of the model that the names are relative to; None if unknown.
    """

    config: PeftConfig
    alien: tuple[str, ...] = ()
    base_text: str = ""
    root: str | None = None

    @functools.cached_property
    @override
    def base(self) -> dict[str, Sample]:
        try:
            return from_plain(json.loads(self.base_text)) if self.base_text else {}
        except (RecursionError, ValueError) as error:
            place = self.path / TENSORS_FILE
            raise ValueError(f"{str(place)!r} has a damaged fingerprint of its base: {error}") from error

    @functools.cached_property
    def keys_by_path(self) -> dict[str, list[str]]:
        """The names of the factors, by the paths of their layers; a path holds ``base_layer`` where PEFT wraps."""
        found: dict[str, list[str]] = {}
        for key in self.tensors:
            path, mark, last = key.rpartition(".lora_")
            if mark and f"{mark}{last}" in _SHORT:
                found.setdefault(path, []).append(key)
        return found

    @functools.cached_property
    @override
    def paths(self) -> set[str]:
        tokens = (key.removesuffix(TOKENS_SUFFIX) for key in self.tensors if key.endswith(TOKENS_SUFFIX))
        return {*self.keys_by_path, *tokens}

    @functools.cached_property
    @override
    def others(self) -> dict[str, Tensor]:
        """As in the base class, by the names that the model has without PEFT's wrappers."""
        wrapped = {path.replace(_WRAPPER, "") for path in self.paths}
        found = {}
        for name, tensor in super().others.items():
            plain = name.replace(_WRAPPER, "")
            found[plain if plain.rpartition(".")[0] in wrapped else name] = tensor
        return found

    @functools.cached_property
    @override
    def tokens(self) -> dict[str, StoredTokens]:
        found = {}
        for key in sorted(key for key in self.tensors if key.endswith(TOKENS_SUFFIX)):
            name, rows = key.removesuffix(TOKENS_SUFFIX), self.tensors[key]
            tokens = self.config.tokens_of(name)
            shape = (max(tokens) + 1, rows.shape[-1]) if tokens and rows.ndim else ()
            found[name] = StoredTokens(rows, tokens, StoredWeight(f"{name}.weight", "embedding", shape), key)
        return found

    @functools.cached_property
    @override
    def layers(self) -> dict[str, StoredLayer]:
        return {path: self._layer(path, keys) for path, keys in sorted(self.keys_by_path.items())}

    def _layer(self, path: str, keys: Collection[str]) -> StoredLayer:
        found = {_SHORT[key[len(path) :]]: self.tensors[key] for key in keys}
        if not {"A", "B"} <= found.keys() or min(found["A"].ndim, found["B"].ndim) < 2:
            raise ValueError(f"{str(self.path)!r}: the update of {path!r} is incomplete.")
        rank, scaling = self._numbers(path)
        A, B = self._matrices(found["A"].flatten(1), found["B"].flatten(1), rank)
        if A.shape[-2] != B.shape[-1]:
            raise ValueError(f"{str(self.path)!r}: the factors of {path!r} do not fit each other.")
        if rank not in (None, A.shape[-2]):
            raise ValueError(
                f"{str(self.path)!r}: the factors of {path!r} have rank {A.shape[-2]}, and {CONFIG_FILE} says {rank}."
            )
        weight = self._weight(path, f"{path}.lora_embedding_A" in keys, found["A"], found["B"])
        label = path.replace(_ATTENTION_OUTPUT, ".out_proj")
        if f"{path}{_ATTENTION_OUTPUT}" in self.keys_by_path:
            label = f"{path}.in_proj_weight"
        elif weight.kind == "parameter" and weight.name is not None:
            label = weight.name
        magnitude = found["magnitude"].flatten() if "magnitude" in found else None
        return StoredLayer(label, A, B, rank, scaling, magnitude, found.get("bias"), weight, keys=tuple(keys))

    def _numbers(self, path: str) -> tuple[int | None, float | None]:
        """Return the rank and the scaling of a layer, or None where the file does not determine them."""
        module, is_inside, _ = path.partition(f"{_WRAPPER}.")
        module = module if is_inside else _unwrapped(path)  # of attention's output, patterns match the attention's name
        names = self.config.parameters_of(module) or [module]
        names += [f"{module}.{entry}" for entry in self.config.target_parameters if "." not in entry]
        found = {(self.config.rank_of(each), self.config.scaling_of(each)) for each in names}
        if len(found) != 1:
            return None, None
        rank, scaling = found.pop()
        if not path.endswith(_ATTENTION_OUTPUT):
            return rank, scaling
        is_known = self.config.peft_version <= LAST_KNOWN_PEFT
        return rank, TIMES_PEFT_ADDS_OUT_PROJ * scaling if is_known else None

    def _matrices(self, A: Tensor, B: Tensor, rank: int | None) -> tuple[Tensor, Tensor]:
        """Return the factors as matrices, or of experts as stacks of them."""
        experts = len(A) // rank if rank and self.config.target_parameters else 1
        if rank and experts > 1 and len(A) == experts * rank == B.shape[1]:
            return A.reshape(experts, rank, -1), B.reshape(len(B), rank, experts).permute(2, 0, 1)
        return A, B

    def _weight(self, path: str, is_embedding: bool, A: Tensor, B: Tensor) -> StoredWeight:
        if _ATTENTION_OUTPUT in path or f"{path}{_ATTENTION_OUTPUT}" in self.keys_by_path:
            return StoredWeight()
        module = _unwrapped(path)
        if parameters := self.config.parameters_of(module):
            names = _registered(parameters)
            index = len(names) - 1 - path.count(_WRAPPER)  # PEFT wraps the first registered innermost
            if not 0 <= index < len(names):
                return StoredWeight()
            experts = len(A) // self.config.rank_of(names[index])
            shape = (len(B), A.shape[1]) if experts <= 1 else (experts, len(B), A.shape[1])
            return StoredWeight(names[index], "parameter", shape, index)
        name = f"{module}.weight"
        if is_embedding:
            return StoredWeight(name, "embedding", (A.shape[1], len(B)))
        if A.ndim > 2:
            return StoredWeight(name, "conv", (len(B), *A.shape[1:]))
        if self.options.get("fan_in_fan_out") is True:
            return StoredWeight(name, "conv1d", (A.shape[1], len(B)))
        return StoredWeight(name, "linear", (len(B), A.shape[1]))


def _unwrapped(path: str) -> str:
    while path.endswith(_WRAPPER):
        path = path.removesuffix(_WRAPPER)
    return path


def _registered(names: list[str]) -> list[str]:
    """Return the parameters of one module in the order in which it registers them; empty if that is unknown."""
    by_key = {name.rpartition(".")[2]: name for name in names}
    if len(names) > 1:
        return [by_key[key] for key in KNOWN_ORDER] if by_key.keys() == {*KNOWN_ORDER} else []
    return names


def read_directory(directory: str | PathLike[str]) -> PeftFile:
    """Return the adapter in a PEFT directory.

    Raises:
        ValueError: The files cannot be read, or use unsupported options.
        FileNotFoundError: They do not exist.
    """
    path = Path(directory)
    (options, config), (tensors, metadata) = read_directory_whole(
        path, CONFIG_FILE, lambda: (_read_config(path / CONFIG_FILE), _read_tensors(path))
    )
    alien = tuple(key for key in tensors if not key.startswith(PREFIX))
    named = {key.removeprefix(PREFIX): tensor for key, tensor in tensors.items()}
    base, root = metadata.get(_BASE_KEY, ""), metadata.get(_ROOT_KEY)
    return PeftFile(path, named, options, {}, config, alien, base, root)


def _read_config(path: Path) -> tuple[dict[str, Any], PeftConfig]:
    if not path.is_file():
        raise FileNotFoundError(f"{str(path)!r} does not exist; a PEFT directory has {CONFIG_FILE}, {TENSORS_FILE}.")
    try:
        if path.stat().st_size > _LARGEST_CONFIG:
            raise ValueError(f"it has {path.stat().st_size:,} bytes")
        options = json.loads(path.read_bytes())
        config, unknown = parse_config(options)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{str(path)!r} cannot be loaded as a config: {error}. Nothing was changed.") from error
    if unknown:
        warnings.warn(
            f"adapter_config.json has unknown options, which are ignored: {listed(unknown)}. If they change what the "
            "adapter computes, its output differs here.",
            stacklevel=4,
        )
    return options, config


def _read_tensors(directory: Path) -> tuple[dict[str, Tensor], Mapping[str, str]]:
    """Return the tensors under the names that they have in the file, and the file's metadata."""
    path = directory / TENSORS_FILE
    if path.is_file():
        return read_file(path)
    path = directory / PICKLED_FILE
    if not path.is_file():
        raise FileNotFoundError(f"{str(directory)!r} holds neither {TENSORS_FILE} nor {PICKLED_FILE}.")
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except PermissionError:
        raise
    except _UNREADABLE as error:
        raise ValueError(
            f"{str(path)!r} cannot be read; it may be truncated or in another format. Nothing was changed. The reader "
            f"failed with {type(error).__name__}: {error}"
        ) from error
    if isinstance(found, dict) and all(isinstance(k, str) and isinstance(v, Tensor) for k, v in found.items()):
        return found, {}
    raise ValueError(f"{str(path)!r} does not contain a mapping of names to tensors. Nothing was changed.")


def write_tensors(tensors: Mapping[str, Tensor], path: Path, base: Fingerprint, root: str | None = None) -> None:
    """Write the tensors, with the base's fingerprint and the root; the same ones always give the same bytes."""
    # Not in the config: PEFT warns of options that it does not know, and reads no metadata.
    known = {_BASE_KEY: json.dumps(to_plain(base), separators=(",", ":"))} if base else {}
    known |= {} if root is None else {_ROOT_KEY: root}
    # As the library orders them, so that each lies at a multiple of its size.
    names = sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))
    layouts = {name: Layout(tensors[name].dtype, tuple(tensors[name].shape)) for name in names}
    with path.open("wb") as file:
        writer = TensorWriter(file, layouts, {"format": "pt"} | known)
        for name in names:
            writer.write(name, tensors[name])


def model_card(options: Mapping[str, Any], parameters: int, root: str | None = None) -> str:
    """Return the model card that the users of a hub expect: the base, the options, and how to load the adapter.

    Args:
        options: The content of ``adapter_config.json``.
        parameters: The number of trained parameters.
        root: As ``PeftFile.root``.
    """
    base, kind = options["base_model_name_or_path"], options["auto_mapping"] or {}
    head = ["library_name: peft", "tags:", "- lora", "- lightning-lora"]
    if base and _HUB_NAME.fullmatch(base):
        head.insert(0, f"base_model: {base}")
    shown = ("r", "lora_alpha", "lora_dropout", "target_modules", "target_parameters", "modules_to_save", "bias")
    rows = [f"| `{name}` | `{options[name]}` |" for name in shown if options[name]]
    rows += [f"| `{name}` | `{options[name]}` |" for name in ("use_rslora", "use_dora", "lora_bias") if options[name]]
    base_text = f"`{base}`" if base else kind.get("base_model_class", "unknown; add its name here")
    lines = ["---", *head, "---", "", CARD_MARK, "", "# LoRA adapter", "", f"Base model: {base_text}", ""]
    lines += ["| option | value |", "| --- | --- |", *rows, f"| parameters | {parameters:,} |", "", "## Loading", ""]
    what = f"the module `{root}` of what was trained" if root else "the base model"
    lines += [f"With {what} as `model`:", "", "```python", "from peft import PeftModel", ""]
    lines += ['model = PeftModel.from_pretrained(model, "path/to/this/folder")', "```", "", "or", "", "```python"]
    lines += ["from lightning_lora import load_adapter", "", 'load_adapter(model, "path/to/this/folder")', "```", ""]
    return "\n".join(lines)
