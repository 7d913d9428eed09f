"""Fitting an adapter on disk to a base on disk, without the model's code."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from lightning_lora.adapted_model import AdaptedModel
from lightning_lora.disk.base_folder import BaseFolder, find_names
from lightning_lora.disk.skeleton import Layouts, build_skeleton, fill, kinds_in_base, placeholder, put
from lightning_lora.fingerprint import Fingerprint, other_base, places, sample
from lightning_lora.loading import attach_entry, read_adapter
from lightning_lora.names import listed
from lightning_lora.peft_format.directory import PeftFile
from lightning_lora.peft_format.importing import import_state, make_import
from lightning_lora.peft_format.names import without_wrappers
from lightning_lora.state import mismatches, record_problems
from lightning_lora.storage.adapter_file import damage_named
from lightning_lora.storage.checkpoint import CheckpointFile
from lightning_lora.storage.safetensors import Layout, StoredTensor
from lightning_lora.surgery import attach


@dataclass
class Fitted:
    """An adapter on the skeleton of a base.

    Attributes:
        root: The skeleton, with adapters that hold the trained values.
        names: Name of a tensor in the skeleton -> its name in the base; tied heads, which the files lack, included.
        values: Name of a tensor that was trained in full -> its value.
        added: Those of ``values`` that the base does not have -> what they will be called.
        ignored: Other tensors of the adapter, which have no place in the base.
        compared: Number of base tensors that match the adapter's fingerprint.
    """

    root: nn.Module
    names: dict[str, str]
    values: dict[str, Tensor] = field(default_factory=dict)
    added: dict[str, str] = field(default_factory=dict)
    ignored: list[str] = field(default_factory=list)
    compared: int = 0


def fit_adapter(path: Path, base: BaseFolder, *, check_base: bool = True) -> Fitted:
    """Put the adapter of a PEFT directory or a ``.ckpt`` on the skeleton of a base.

    Args:
        path: The adapter.
        base: The base.
        check_base: Raise if the base's values differ from those that the adapter was trained on.

    Raises:
        ValueError: They do not fit each other, or cannot be read.
        FileNotFoundError: The adapter does not exist.
    """
    file = read_adapter(path)
    layouts = {name: Layout(tensor.dtype, tensor.shape) for name, tensor in base.tensors.items()}
    layouts |= {head: layouts[source] for head, source in base.tied_heads.items()}
    with warnings.catch_warnings(), damage_named(path):
        warnings.filterwarnings("ignore", "These adapters are not smaller")  # too late to choose another rank
        fit = _fit_peft(file, base, layouts) if isinstance(file, PeftFile) else _fit_checkpoint(file, base, layouts)
    if check_base:
        fit.compared = _compared(file.base, {n: base.tensors[b] for n, b in fit.names.items() if b in base.tensors})
    return fit


def _compared(recorded: Fingerprint, stored: Mapping[str, StoredTensor]) -> int:
    """Return how many tensors match a fingerprint; raise if any does not."""
    found = {
        name: sample(tensor.shape, tensor.dtype, tensor.read().reshape(-1)[places(tensor.shape)])
        for name in recorded
        if (tensor := stored.get(name)) is not None and tensor.dtype.is_floating_point and tensor.dtype.itemsize > 1
    }
    if message := other_base(recorded, found, "folder or file", override="--any-base"):
        raise ValueError(message)
    return len(found)


def _fit_peft(file: PeftFile, base: BaseFolder, layouts: Layouts) -> Fitted:
    names, before = find_names(file.paths, layouts, lambda path, modules: without_wrappers(path, modules) is not None)
    mine = {name: layouts[each] for name, each in names.items()}
    added = _new_modules(file, mine)
    mine |= {name: Layout(file.tensors[name].dtype, tuple(file.tensors[name].shape)) for name in added}
    kinds, ordered = kinds_in_base(file, mine, base.config)
    skeleton = build_skeleton(ordered, kinds)
    # The import compares frozen values that the file repeats with the base's own.
    repeated = {name: base.tensors[names[name]] for name in file.tensors if names.get(name) in base.tensors}
    put(skeleton, {name: tensor.read() for name, tensor in repeated.items()})
    content = make_import(skeleton, file)
    put(skeleton, {name: placeholder(mine[name]) for name in repeated})
    attach(skeleton, content.config)
    model = AdaptedModel(skeleton)
    state = import_state(skeleton, content, model.trained, model.adapters)
    return _fitted(skeleton, state, names, added={name: name.removeprefix(before) for name in added})


def _new_modules(file: PeftFile, mine: Collection[str]) -> list[str]:
    """Return the tensors of modules trained in full that the base lacks, such as those of a new head."""
    inside = (".original_module.", ".modules_to_save.", ".base_layer.")
    return [
        key
        for key in file.tensors
        if key not in mine and any(f".{entry}." in f".{key}" for entry in file.config.modules_to_save)
        if "lora_" not in key and not any(part in key for part in inside)
    ]


def _fit_checkpoint(file: CheckpointFile, base: BaseFolder, layouts: Layouts) -> Fitted:
    if file.merges:
        raise ValueError("The adapter was trained on a base with another adapter merged into it; merge it in memory.")
    if not file.paths:
        raise ValueError("The checkpoint holds no adapter.")
    names, _ = find_names(file.paths, layouts, lambda path, modules: path in modules)
    mine = {name: layouts[each] for name, each in names.items()}
    kinds, _ = kinds_in_base(file, mine, base.config)
    skeleton = build_skeleton(mine, kinds)
    for entry in file.record["adapters"]:
        attach_entry(skeleton, entry, ExitStack())
    if problems := record_problems(skeleton, file.record) + _misfits(skeleton, file):
        raise ValueError("The checkpoint does not fit this base:\n" + "\n".join(f"  - {each}" for each in problems))
    known = {name: value for name, value in file.tensors.items() if ".lora." in name or name in mine}
    return _fitted(skeleton, known, names, ignored=sorted(file.tensors.keys() - known.keys()))


def _misfits(skeleton: nn.Module, file: CheckpointFile) -> list[str]:
    model = AdaptedModel(skeleton)
    all_biases = any(entry["config"].get("bias") == "all" for entry in file.record["adapters"])
    # The files of a base do not tell which of its tensors called bias are parameters.
    wanted = {
        name: tensor
        for name, tensor in model.trained.items()
        if name in file.tensors or not (all_biases and "bias" in name.rpartition(".")[2])
    }
    wanted |= {name: model.tensors[name] for name in file.tensors if name in model.tensors}
    return mismatches(wanted, file.tensors, known=[name for name in file.tensors if ".lora." not in name])


def _fitted(
    skeleton: nn.Module,
    state: Mapping[str, Tensor],
    names: Mapping[str, str],
    *,
    added: Mapping[str, str] | None = None,
    ignored: Collection[str] = (),
) -> Fitted:
    """Give the adapters their values, and return everything together."""
    model = AdaptedModel(skeleton)
    owned = {id(parameter) for adapter in model.adapters.values() for parameter in adapter.parameters()}
    factors = {name: state[name] for name, tensor in model.trained.items() if id(tensor) in owned and name in state}
    fill(skeleton, factors)
    values = {name: value for name, value in state.items() if name not in factors}
    _check_finite(model, values)
    return Fitted(skeleton, dict(names), values, dict(added or {}), ignored=list(ignored))


def _check_finite(model: AdaptedModel, values: Mapping[str, Tensor]) -> None:
    found = [name for name, adapter in model.adapters.items() if not all(map(_is_finite, adapter.parameters()))]
    found += [name for name, value in values.items() if not _is_finite(value)]
    if found:
        raise ValueError(f"The adapter holds NaN or infinity in {listed(found)}; merging it would destroy the weights.")


def _is_finite(tensor: Tensor) -> bool:
    return bool(torch.isfinite(tensor).all()) if tensor.is_floating_point() else True
