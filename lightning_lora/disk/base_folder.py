"""A base model on disk: its files, the names that an adapter uses for its tensors, and weights that loading ties."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from itertools import groupby, product
from pathlib import Path
from typing import Any, NamedTuple

import torch

from lightning_lora.fingerprint import SAMPLED, Sample, places, sample
from lightning_lora.names import listed, near_names
from lightning_lora.peft_format.directory import CONFIG_FILE
from lightning_lora.peft_format.names import tails, without_wrappers
from lightning_lora.storage.safetensors import StoredTensor, TensorFile, read_table

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
MODEL_CONFIG_FILE = "config.json"
TIE_OPTION = "tie_word_embeddings"
WIDE = (torch.float16, torch.bfloat16, torch.float32, torch.float64)  # other real weights are quantized
_WEIGHTS = (".safetensors", ".index.json", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".onnx", ".gguf")
_SHARD = re.compile(r"model-\d+-of-\d+\.safetensors")  # as transformers calls them
_LARGEST_JSON = 256 * 2**20
_MOST_PARTS = 3  # of a prefix

_HEAD = "lm_head.weight"
_CAUSAL = ("ForCausalLM", "LMHeadModel")
_OTHER_HEADS = ("ForConditionalGeneration", "ForMaskedLM", "ForPreTraining", "DoubleHeadsModel")
_EMBEDDINGS = ("embed_tokens.weight", "wte.weight", "word_embeddings.weight", "embed_in.weight")


@dataclass(frozen=True)
class BaseFolder:
    """A base model on disk: safetensors in one file or several, as Hugging Face lays them out.

    Attributes:
        shards: File name -> table of its tensors.
        index: The index of the shards, if there is one.
        config: The model's config, if there is one.
        carried: The small files that belong to the model.
    """

    shards: Mapping[str, TensorFile]
    index: Mapping[str, Any] | None = None
    config: Mapping[str, Any] = field(default_factory=dict)
    carried: tuple[Path, ...] = ()

    @cached_property
    def tensors(self) -> dict[str, StoredTensor]:
        """Every tensor by name."""
        return {name: tensor for shard in self.shards.values() for name, tensor in shard.tensors.items()}

    @property
    def is_tied(self) -> bool:
        """Whether loading this base ties an output layer to the embedding."""
        return bool(self.config.get(TIE_OPTION, True)) and self._has_head((*_CAUSAL, *_OTHER_HEADS))

    @property
    def tied_heads(self) -> dict[str, str]:
        """The output layer that the loaded model has and the files lack -> the embedding that it is tied to."""
        found = [name for name in self.tensors if f".{name}".endswith(tuple(f".{each}" for each in _EMBEDDINGS))]
        if self.is_tied and self._has_head(_CAUSAL) and len(found) == 1 and _HEAD not in self.tensors:
            return {_HEAD: found[0]}
        return {}

    @property
    def tied_names(self) -> set[str]:
        """The tensors that become one when the model is loaded."""
        ends = tuple(f".{each}" for each in (*_EMBEDDINGS, "shared.weight", _HEAD))
        return {name for name in self.tensors if f".{name}".endswith(ends)} if self.is_tied else set()

    def _has_head(self, kinds: tuple[str, ...]) -> bool:
        kind = self.config.get("architectures")
        return isinstance(kind, list) and any(isinstance(each, str) and each.endswith(kinds) for each in kind)


def sampled(base: BaseFolder, name: str, of_end: bool) -> Sample | None:
    """Return the sample of a tensor of a base, or of its last row; None if it is missing, or no plain numbers."""
    if (tensor := base.tensors.get(name)) is None or tensor.dtype not in SAMPLED:
        return None
    values = tensor.read()[-1] if of_end else tensor.read()
    return sample(values.shape, tensor.dtype, values.reshape(-1)[places(values.shape)])


def open_base(path: Path) -> BaseFolder:
    """Open a model folder, or a single safetensors file; no tensor is read.

    Raises:
        ValueError: The files cannot be read, contradict each other, or name files outside the folder.
        FileNotFoundError: They do not exist.
    """
    if path.is_file():
        if path.suffix in _WEIGHTS and path.suffix != ".safetensors":
            raise ValueError(
                f"{str(path)!r} is a {path.suffix} file, and only safetensors are read. Load the base, write it with "
                "safetensors.torch.save_model(model, 'base.safetensors') or, if it is a model of transformers, with "
                "save_pretrained, and name that."
            )
        return BaseFolder({SINGLE_FILE: read_table(path)})
    if not path.is_dir():
        raise FileNotFoundError(f"{str(path)!r} does not exist; name a model folder, or a safetensors file.")
    index = read_json(path / INDEX_FILE) if (path / INDEX_FILE).is_file() else None
    if index is None and not (path / SINGLE_FILE).is_file() and (path / CONFIG_FILE).is_file():
        raise FileNotFoundError(f"{str(path)!r} holds an adapter ({CONFIG_FILE}), not a base; name the model's folder.")
    if index is None and not (path / SINGLE_FILE).is_file():
        raise FileNotFoundError(
            f"{str(path)!r} holds neither {SINGLE_FILE} nor {INDEX_FILE}, and only safetensors are read: save a model "
            "of transformers with save_pretrained(..., safe_serialization=True), or name the safetensors file itself."
        )
    names = [SINGLE_FILE] if index is None else _shard_names(path, index)
    shards = {name: read_table(path / name) for name in names}
    if index is not None:
        _check_index(index["weight_map"], shards)
    config = read_json(path / MODEL_CONFIG_FILE) if (path / MODEL_CONFIG_FILE).is_file() else {}
    # Without the config of an adapter beside the model, which libraries would apply to the merged model, too.
    skipped = (*_WEIGHTS, CONFIG_FILE)
    carried = tuple(sorted(each for each in path.iterdir() if each.is_file() and not each.name.endswith(skipped)))
    return BaseFolder(shards, index, config, carried)


def model_files(folder: Path) -> tuple[str, ...]:
    """Return the names of the files in a folder that hold a model's tensors, or list them."""
    found = {SINGLE_FILE, INDEX_FILE} | {path.name for path in folder.glob("model-*") if _SHARD.fullmatch(path.name)}
    with suppress(ValueError, OSError):
        found |= {*_shard_names(folder, read_json(folder / INDEX_FILE))}
    return tuple(sorted(name for name in found if (folder / name).is_file()))


def read_json(path: Path) -> dict[str, Any]:
    """Read the object in a JSON file.

    Raises:
        ValueError: The file does not hold a JSON object.
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
        raise ValueError(f"{str(folder / INDEX_FILE)!r} has no weight_map from tensors to files.")
    names = sorted(set(where.values()))
    # Both kinds of slashes on every system: folders travel.
    hostile = [name for name in names if any(c in name for c in "/\\:\0") or not name.endswith(".safetensors")]
    if hostile:
        raise ValueError(f"{str(folder / INDEX_FILE)!r} names files outside this folder: {listed(hostile)}.")
    if missing := [name for name in names if not (folder / name).is_file()]:
        raise FileNotFoundError(f"{str(folder)!r} lacks {listed(missing)}, which its index names.")
    return names


def _check_index(where: Mapping[str, str], shards: Mapping[str, TensorFile]) -> None:
    stored = [(name, shard) for shard, table in shards.items() for name in table.tensors]
    if wrong := [name for name, shard in stored if where.get(name) != shard]:
        raise ValueError(f"The index of the base lists {listed(wrong)} under the wrong files.")
    if missing := sorted(where.keys() - {name for name, _ in stored}):
        raise ValueError(f"The index of the base lists tensors that its files do not hold: {listed(missing)}.")


# --- names


class Renaming(NamedTuple):
    """One way to read the names of a base as an adapter's.

    Attributes:
        names: The adapter's name of every tensor -> its name in the base; of the part alone if the file names it.
        before: The prefix that only the adapter uses.
        part: The prefix that only the base uses.
        level: How many of the two are not empty; -1 for the part that the adapter's file names.
    """

    names: dict[str, str]
    before: str
    part: str
    level: int


def find_names(
    paths: Collection[str],
    names: Collection[str],
    root: str | None = None,
    compare: Callable[[Mapping[str, str]], tuple[int, bool]] | None = None,
) -> Renaming:
    """Return how to read the names of a base as the adapter's.

    An adapter may have been trained on the base inside another module: a model with a head calls ``h.0`` of its body
    ``transformer.h.0``, and a LightningModule calls it ``model.h.0``. So names may lose a first part and gain others.
    A base may also hold several models alike, such as an encoder and a decoder: then the values decide.

    Args:
        paths: The adapted modules.
        names: The base's tensors.
        root: What the adapter's file calls the model that its names are relative to, as ``PeftFile.root``.
        compare: How many values of a base so renamed can be compared with those that the adapter was trained with, and
            whether all are equal; None if these are unknown.

    Raises:
        ValueError: No renaming finds all paths in the base, or several equally simple ones do.
    """
    most, missing, found, proven = -1, list[str](), list[Renaming](), 0
    for _, equally_simple in groupby(_affixes(paths, names, root), key=_simplicity):
        alike = list[Renaming]()
        for level, without, before in equally_simple:
            inside = [name for name in names if level >= 0 or name.startswith(without)]
            renamed = {before + name.removeprefix(without): name for name in inside}
            if len(renamed) < len(inside):
                continue
            modules = module_paths(renamed)
            unresolved = sorted(path for path in paths if without_wrappers(path, modules) is None)
            if not unresolved:
                alike.append(Renaming(renamed, before, without, level))
            elif len(paths) - len(unresolved) > most:
                most, missing = len(paths) - len(unresolved), unresolved
        found = found or alike
        if compare is None and found:
            break
        compared = [(each, *compare(each.names)) for each in alike] if compare is not None else []
        # Leaving a part out, as one that differs, proves less than other names do.
        proven = max([proven, *(count for _, count, _ in compared)])
        if having := [each for each, count, are_equal in compared if are_equal and count == proven > 0]:
            found = having
            break
    if not found:
        raise ValueError(_no_modules(missing, names))
    if len(found) > 1:
        raise ValueError(_several_parts([each.part.removesuffix(".") for each in found]))
    return found[0]


def _simplicity(affixes: tuple[int, str, str]) -> tuple[int, str]:
    """Return what equally simple ways to read names have in common; a name that the file records stands alone."""
    level, without, _ = affixes
    return level, without if level < 0 else ""


def _several_parts(parts: Sequence[str]) -> str:
    return (
        f"The adapter fits several parts of the base: {listed(parts)}. Neither names nor values tell for which one "
        "it was trained. Give its layers their full names with lightning-lora import DIRECTORY FILE.ckpt --root "
        f"{parts[0]}, and use that file; of a .ckpt, lightning-lora export writes the directory."
    )


def _no_modules(missing: Sequence[str], names: Collection[str]) -> str:
    near = near_names(missing[0], module_paths(names))
    hint = f" Closest names: {', '.join(map(repr, near))}." if near else ""
    return (
        f"The base has no modules {listed(missing)}, which the adapter targets.{hint} Either it is a different "
        "model, or its library renames tensors on loading; in that case load the model, then use "
        "lightning_lora.load_adapter and merge."
    )


def module_paths(names: Collection[str]) -> set[str]:
    """Return the paths of all modules that hold tensors of these names, directly or below."""
    found: set[str] = set()
    for name in names:
        path = name.rpartition(".")[0]
        while path and path not in found:
            found.add(path)
            path = path.rpartition(".")[0]
    return found


def _affixes(paths: Collection[str], names: Collection[str], root: str | None) -> Iterator[tuple[int, str, str]]:
    """Yield a level, what to take from the front of the base's names, and what to put there; the simplest first."""
    parts = min(paths, default="").split(".")
    before = ["", *(".".join(parts[:depth]) + "." for depth in range(1, min(_MOST_PARTS, len(parts) - 1) + 1))]
    without = ["", *sorted({name.partition(".")[0] + "." for name in names if "." in name})[:16]]
    yield from ((-1, f"{name}.", "") for name in tails(root or "") if name)
    yield from sorted((bool(mine) + bool(theirs), mine, theirs) for mine, theirs in product(without, before))
