"""An adapter on disk and a base on disk, brought together without the model's code."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_lora.adapted_model import AdaptedModel
from lightning_lora.attachment import named_tensors
from lightning_lora.disk.base_folder import BaseFolder, find_names
from lightning_lora.disk.skeleton import build_skeleton
from lightning_lora.disk.skeleton_kinds import kinds_of_checkpoint, kinds_of_peft
from lightning_lora.fingerprint import Fingerprint, Sample, other_base, places, sample
from lightning_lora.layers import Adapter, all_adapters
from lightning_lora.layers.adapter import row_numbers
from lightning_lora.loading import attach_entry, read_adapter
from lightning_lora.names import listed
from lightning_lora.peft_format.directory import read_directory
from lightning_lora.peft_format.importing import import_state, make_import
from lightning_lora.peft_format.names import PREFIX, without_wrappers
from lightning_lora.state import record_problems
from lightning_lora.storage.checkpoint import read_checkpoint
from lightning_lora.storage.safetensors import Layout, StoredTensor
from lightning_lora.surgery import attach


@dataclass
class Fitted:
    """An adapter on the skeleton of a base.

    Attributes:
        root: The skeleton, with adapters that hold the trained values.
        names: Name of a tensor in the skeleton -> its name in the base.
        values: Name of a tensor that was trained in full -> its value.
        added: Tensors of ``values`` that the base does not have -> what they will be called.
        heads: Tensors of the skeleton that the base's files lack, because they are tied -> their names in the base.
        ignored: What the adapter brings besides that has no place in the base.
        compared: How many tensors of the base were found to be those that the adapter was trained on.
    """

    root: nn.Module
    names: dict[str, str]
    values: dict[str, Tensor] = field(default_factory=dict)
    added: dict[str, str] = field(default_factory=dict)
    heads: dict[str, str] = field(default_factory=dict)
    ignored: list[str] = field(default_factory=list)
    compared: int = 0


def fit_adapter(path: Path, base: BaseFolder, *, check_base: bool = True) -> Fitted:
    """Return the adapter of a PEFT directory or a ``.ckpt``, on the skeleton of a base.

    Args:
        path: The adapter.
        base: The base.
        check_base: Refuse a base of other values than those that the adapter was trained on.

    Raises:
        ValueError: They do not fit, or cannot be read.
        FileNotFoundError: The adapter is not there.
    """
    heads = base.tied_heads
    stored = base.tensors
    layouts = {name: Layout(tensor.dtype, tensor.shape) for name, tensor in stored.items()}
    layouts |= {name: layouts[source] for name, source in heads.items()}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "These adapters are not smaller")  # too late to choose another rank
        fit = _fit_peft if path.is_dir() else _fit_checkpoint
        fitted = fit(path, base, layouts)
    fitted.heads = {name: mine for name, mine in fitted.names.items() if mine in heads}
    fitted.names = {name: mine for name, mine in fitted.names.items() if mine in stored}
    if check_base:
        fitted.compared = _compared(read_fingerprint(path), {name: stored[m] for name, m in fitted.names.items()})
    return fitted


def read_fingerprint(path: Path) -> dict[str, Sample]:
    """Return the fingerprint of the base in a PEFT directory or a ``.ckpt``; empty if there is none."""
    return dict(read_adapter(path).base)


def _compared(recorded: Fingerprint, stored: Mapping[str, StoredTensor]) -> int:
    """Return how many tensors are those that a fingerprint says, or refuse the base."""
    found = {
        name: sample(tensor.shape, tensor.dtype, tensor.read().reshape(-1)[places(tensor.shape)])
        for name in recorded
        if (tensor := stored.get(name)) is not None and tensor.dtype.is_floating_point and tensor.dtype.itemsize > 1
    }
    if message := other_base(recorded, found, "folder or file", override="--any-base"):
        raise ValueError(message)
    return len(found)


# --- a PEFT directory


def _fit_peft(path: Path, base: BaseFolder, layouts: Mapping[str, Layout]) -> Fitted:
    file = read_directory(path)
    config, paths = file.config, file.paths
    tensors = {PREFIX + key: tensor for key, tensor in file.tensors.items()}
    is_transposed = file.options.get("fan_in_fan_out") is True

    def resolves(path: str, modules: Collection[str]) -> bool:
        return without_wrappers(path, modules) is not None

    names, before = find_names(paths, layouts, resolves)
    mine = {name: layouts[each] for name, each in names.items()}
    added = _new_modules(tensors, config.modules_to_save, mine, before)
    mine |= {name: _layout(tensors[PREFIX + name]) for name in added}
    kinds, mine = kinds_of_peft(tensors, config.target_parameters, mine, base.config, is_transposed=is_transposed)
    skeleton = build_skeleton(mine, kinds)
    # Values of the frozen base that the file repeats must be the base's own: there they are compared.
    with _real_values(skeleton, base, {name: names[name] for name in names if PREFIX + name in tensors}):
        content = make_import(skeleton, file)
    attach(skeleton, content.config)
    state = import_state(skeleton, content, AdaptedModel(skeleton).trained, all_adapters(skeleton))
    return _fitted(skeleton, names, state, added)


def _new_modules(
    tensors: Mapping[str, Tensor], saved: Collection[str], mine: Collection[str], before: str
) -> dict[str, str]:
    """Return the tensors of modules trained in full that the base lacks, such as a new head's."""
    keys = [key.removeprefix(PREFIX) for key in tensors if key.startswith(PREFIX)]
    found = [
        key
        for key in keys
        if key not in mine and any(f".{entry}." in f".{key}" for entry in saved) and "lora_" not in key
        if not any(part in key for part in (".original_module.", ".modules_to_save.", ".base_layer."))
    ]
    return {key: key.removeprefix(before) for key in found}


def _layout(tensor: Tensor) -> Layout:
    return Layout(tensor.dtype, tuple(tensor.shape))


@contextmanager
def _real_values(skeleton: nn.Module, base: BaseFolder, names: Mapping[str, str]) -> Iterator[None]:
    """Let some tensors of the skeleton have the base's values, for a while."""
    stored, owners = base.tensors, []
    for name, mine in names.items():
        path, _, key = name.rpartition(".")
        if mine in stored and key in (table := skeleton.get_submodule(path)._parameters):
            owners.append((table, key, table[key]))
            table[key] = nn.Parameter(stored[mine].read(), requires_grad=False)
    try:
        yield
    finally:
        for table, key, before in owners:
            table[key] = before


# --- a Lightning checkpoint


def _fit_checkpoint(path: Path, base: BaseFolder, layouts: Mapping[str, Layout]) -> Fitted:
    file = read_checkpoint(path)
    record, state = file.record, file.tensors
    try:
        return _fit_record(record, state, base, layouts)
    except (KeyError, TypeError, AttributeError, IndexError) as error:
        raise ValueError(
            f"The record of the adapter in {str(path)!r} makes no sense; the file was changed or damaged: "
            f"{type(error).__name__}: {error}"
        ) from error


def _fit_record(
    record: Mapping[str, Any], state: Mapping[str, Tensor], base: BaseFolder, layouts: Mapping[str, Layout]
) -> Fitted:
    if record["merges"]:
        raise ValueError("The adapter was trained on a base with another adapter merged into it; merge it in memory.")
    paths = {key.partition(".lora.")[0] for key in state if ".lora." in key}
    if not paths:
        raise ValueError("The checkpoint holds no adapter.")
    names, _ = find_names(paths, layouts, lambda path, modules: path in modules)
    mine = {name: layouts[each] for name, each in names.items()}
    kinds = kinds_of_checkpoint(record, state, mine, base.config)
    skeleton = build_skeleton(mine, kinds)
    with ExitStack() as undo:
        for entry in record["adapters"]:
            attach_entry(skeleton, entry, undo)
        undo.pop_all()
    problems = record_problems(skeleton, record) + list(_shape_problems(skeleton, state, record["adapters"]))
    if problems:
        raise ValueError("The checkpoint does not fit this base:\n" + "\n".join(f"  - {p}" for p in problems))
    known = {name: state[name] for name in state if ".lora." in name or name in mine}
    ignored = sorted(name for name in state if name not in known)
    return _fitted(skeleton, names, known, {}, ignored)


def _shape_problems(
    skeleton: nn.Module, state: Mapping[str, Tensor], entries: Collection[Mapping[str, Any]]
) -> Iterator[str]:
    trained, all_biases = AdaptedModel(skeleton).trained, any(entry["config"].get("bias") == "all" for entry in entries)
    live = trained | named_tensors(skeleton)
    for name in trained:
        # The files of a base do not say which of its tensors called bias are parameters.
        if name not in state and not (all_biases and "bias" in name.rpartition(".")[2]):
            yield f"{name}: missing from the file"
    for name, value in state.items():
        if ".lora." in name and name not in live:
            yield f"{name}: not expected"
        elif name in live and value.shape != live[name].shape:
            yield f"{name}: file {tuple(value.shape)}, base {tuple(live[name].shape)}"


# --- both


def _fitted(
    skeleton: nn.Module,
    names: Mapping[str, str],
    state: Mapping[str, Tensor],
    added: Mapping[str, str],
    ignored: Collection[str] = (),
) -> Fitted:
    """Give the adapters their values, and return everything together."""
    live, adapters = AdaptedModel(skeleton).trained, all_adapters(skeleton)
    by_identity = {id(tensor): state[name] for name, tensor in live.items() if name in state}
    owned = {id(p) for adapter in adapters.values() for p in adapter.parameters()}
    for adapter in adapters.values():
        _fill(adapter, by_identity)
    values = {name: value for name, value in state.items() if name not in live or id(live[name]) not in owned}
    _check_finite(adapters, values)
    return Fitted(skeleton, dict(names), values, dict(added), ignored=list(ignored))


def _fill(adapter: Adapter, values: Mapping[int, Tensor]) -> None:
    for key, parameter in list(adapter._parameters.items()):
        if parameter is not None:
            value = values[id(parameter)].to(parameter.dtype).clone(memory_format=torch.contiguous_format)
            adapter._parameters[key] = nn.Parameter(value, requires_grad=False)
    if adapter.spec.rows:
        adapter.index = row_numbers(adapter.spec.rows)


def _check_finite(adapters: Mapping[str, Adapter], values: Mapping[str, Tensor]) -> None:
    found = [name for name, each in adapters.items() if not all(map(_is_finite, each.parameters()))]
    found += [name for name, value in values.items() if not _is_finite(value)]
    if found:
        raise ValueError(f"The adapter holds NaN or infinity in {listed(found)}; merging it would destroy the weights.")


def _is_finite(tensor: Tensor) -> bool:
    return bool(torch.isfinite(tensor).all()) if tensor.is_floating_point() else True
