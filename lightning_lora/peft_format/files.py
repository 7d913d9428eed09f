"""PEFT directories: an adapter as ``adapter_config.json`` and ``adapter_model.safetensors``, written and read."""

from __future__ import annotations

import json
import pickle
import warnings
import zipfile
from collections.abc import Mapping
from contextlib import ExitStack
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_lora.attachment import attachments, get_attachment, merges, named_tensors
from lightning_lora.directories import replace_directory
from lightning_lora.layers import LowRankAdapter, TokenAdapter, all_adapters, lora_layers
from lightning_lora.peft_format.collect import make_export
from lightning_lora.peft_format.config import PeftConfig, parse_config, unknown_options_message
from lightning_lora.peft_format.exporting import Export
from lightning_lora.peft_format.importing import Import, adapted_paths, make_import
from lightning_lora.peft_format.names import chosen_root, found_root, without_wrappers
from lightning_lora.report import AttachReport
from lightning_lora.state import adapter_tensors, check_not_merged, copy_adapter_state
from lightning_lora.surgery import attach, detach
from lightning_lora.targets import listed, module_names

CONFIG_FILE = "adapter_config.json"
TENSORS_FILE = "adapter_model.safetensors"
_PICKLED_FILE = "adapter_model.bin"
_LARGEST_CONFIG = 64 * 2**20
_UNREADABLE = (pickle.UnpicklingError, EOFError, RuntimeError, zipfile.BadZipFile, LookupError, ValueError, OSError)


# --- writing


def save_adapter(
    module: nn.Module,
    directory: str | PathLike[str],
    *,
    export_root: str | None = None,
    base_model_name_or_path: str | None = None,
    uniform_rank: bool = False,
) -> None:
    """Write the adapter as a PEFT directory, which PEFT, vLLM and ``load_adapter`` read.

    The same adapter gives the same bytes. The directory is complete or not there: it is written beside its place and
    then renamed. Of several processes only one may call this.

    Args:
        module: An adapted module, such as a LightningModule.
        directory: Where to write; an adapter that is there is replaced, other files beside it stay.
        export_root: Name of the submodule that PEFT will wrap, to which the names in the files are relative. If left
            out it is the one transformers model inside, or of a LightningModule the one child that holds all
            adapters, or the module itself (``""``).
        base_model_name_or_path: What to record as the base model; the model's own ``name_or_path`` if left out.
        uniform_rank: Pad all layers with zeros to the highest rank and give them one scaling, for loaders such as vLLM
            that ignore patterns of ranks and alphas. The adapter computes the same.

    Raises:
        ValueError: PEFT cannot express what was trained; one error lists each layer with the reason. Or the directory
            holds something else. Nothing was written.
        RuntimeError: The adapters are folded into the weights, inside ``merged``.
        OSError: The files could not be written. An adapter that was there is as it was.
    """
    export = exported(module, export_root)
    if export.refused:
        reasons = "\n".join(f"  - {name}: {reason}" for name, reason in export.refused.items())
        raise ValueError(f"PEFT cannot express this adapter; nothing was written:\n{reasons}")
    if merged := merges(module):
        warnings.warn(
            f"This adapter belongs to a base with another adapter merged into {listed(list(merged))}; the files do not "
            "hold that. Save the merged base model too.",
            stacklevel=2,
        )
    for caveat in export.caveats():
        warnings.warn(caveat, stacklevel=2)
    if uniform_rank:
        export.uniform()
    config = export.config(base_model_name_or_path or _base_name(export.root))
    tensors = export.tensors()

    def write(new: Path) -> None:
        _write_tensors(tensors, new / TENSORS_FILE)
        (new / CONFIG_FILE).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")

    replace_directory(Path(directory), write, marker=CONFIG_FILE, stale=(_PICKLED_FILE,))


def exported(module: nn.Module, export_root: str | None = None) -> Export:
    """Return what a module's PEFT directory will hold, with the reasons against it.

    Raises:
        ValueError: The module has no adapters, or the model to export cannot be told.
        RuntimeError: The adapters are folded into the weights, inside ``merged``.
    """
    layers = lora_layers(module)
    if folded := [name for name, layer in layers.items() if layer.lora_mode == "merged"]:
        raise RuntimeError(f"The adapters of {listed(folded)} are merged into their weights now; leave merged() first.")
    tensors = adapter_tensors(module)
    if unmade := [name for name, tensor in tensors.items() if tensor.is_meta]:
        raise ValueError(f"{listed(unmade)} are on the meta device and have no values to save.")
    trained = {id(tensor) for tensor in tensors.values()}
    if not trained or not any(True for _ in attachments(module)):
        where = (
            "belong to a parent of it; name this part with export_root" if layers else "are missing; call attach first"
        )
        raise ValueError(f"{type(module).__name__} cannot be saved: its adapters {where}.")

    def holds_all(part: nn.Module) -> bool:
        return trained <= {id(tensor) for tensor in named_tensors(part).values()}

    root = found_root(module, holds_all) if export_root is None else chosen_root(module, export_root)
    return make_export(module, *root)


def _base_name(root: nn.Module) -> str | None:
    name = getattr(root, "name_or_path", None)
    return name if isinstance(name, str) and name else None


def _write_tensors(tensors: Mapping[str, Tensor], path: Path) -> None:
    from safetensors.torch import save_file

    save_file(dict(tensors), path, metadata={"format": "pt"})


# --- reading


def is_adapter_directory(path: str | PathLike[str]) -> bool:
    """Return whether there is a directory, which may hold an adapter as PEFT writes it."""
    return Path(path).is_dir()


def load_directory(module: nn.Module, directory: str | PathLike[str], export_root: str | None = None) -> AttachReport:
    """Attach and load the adapter of a PEFT directory, written by PEFT or by ``save_adapter``.

    Args:
        module: The base model, or a module that holds it; adapted in the same way or not at all.
        directory: The directory.
        export_root: Name of the submodule to which the names in the files are relative; found if left out.

    Returns:
        What was adapted.

    Raises:
        ValueError: The files cannot be read, use options that have no equal here, or do not fit the module. Nothing
            was changed.
        FileNotFoundError: They are not there.
        RuntimeError: Another adapter was merged into this module for good.
    """
    check_not_merged(module, {})
    root, content = _read(module, Path(directory), export_root)
    return _attach_and_load(module, root, content)


def imported(module: nn.Module, directory: str | PathLike[str]) -> tuple[str, Import]:
    """Return what a directory means for a module: the name of the model inside it, and what is for that.

    Raises:
        ValueError: The files cannot be read, use options that have no equal here, or do not fit the module.
        FileNotFoundError: They are not there.
    """
    root, content = _read(module, Path(directory), None)
    return next(name for name, part in module.named_modules() if part is root), content


def _read(module: nn.Module, path: Path, export_root: str | None) -> tuple[nn.Module, Import]:
    config, tensors = read_config(path / CONFIG_FILE), read_tensors(path)
    root = matching_root(module, adapted_paths(tensors), export_root)
    try:
        return root, make_import(root, config, tensors)
    except ValueError as error:
        raise ValueError(
            f"The adapter in {str(path)!r} does not fit this {type(root).__name__}; nothing was changed:\n{error}"
        ) from None


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
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    path = directory / TENSORS_FILE
    try:
        if path.is_file():
            return load_file(path)
        path = directory / _PICKLED_FILE
        if not path.is_file():
            raise FileNotFoundError(f"{str(directory)!r} holds neither {TENSORS_FILE} nor {_PICKLED_FILE}.")
        found = torch.load(path, map_location="cpu", weights_only=True)
    except (FileNotFoundError, PermissionError):
        raise
    except (SafetensorError, *_UNREADABLE) as error:
        raise ValueError(
            f"{str(path)!r} cannot be read; it may be truncated or something else. Nothing was changed. The reader "
            f"said: {type(error).__name__}: {error}"
        ) from error
    if isinstance(found, dict) and all(isinstance(k, str) and isinstance(v, Tensor) for k, v in found.items()):
        return found
    raise ValueError(f"{str(path)!r} holds no tensors by name. Nothing was changed.")


def matching_root(module: nn.Module, paths: set[str], export_root: str | None = None) -> nn.Module:
    """Return the model in which all these paths of a file name modules; ValueError if several may be meant."""
    if export_root is not None:
        return chosen_root(module, export_root)[1]

    def has_all(part: nn.Module) -> bool:
        names = {alias for _, aliases in module_names(part).values() for alias in aliases}
        return all(without_wrappers(path, names) for path in paths)

    _, found = found_root(module, has_all)
    if has_all(found):
        return found
    # Whoever wrote the file may have wrapped the model at another depth.
    others = [part for part in (module, *module.children()) if has_all(part)]
    return others[0] if len(others) == 1 else found


def _attach_and_load(module: nn.Module, root: nn.Module, content: Import) -> AttachReport:
    """Attach what the files say, or nothing at all."""
    with ExitStack() as undo:
        if lora_layers(root):
            _check_same_adapters(root, content)
        else:
            attach(root, content.config)
            undo.callback(detach, root)
        tensors = adapter_tensors(module)
        copy_adapter_state(module, import_state(module, root, content, tensors), tensors=tensors)
        undo.pop_all()
    attachment = get_attachment(root) or next(note for _, _, note in attachments(module))
    return attachment.report


def _check_same_adapters(root: nn.Module, content: Import) -> None:
    """Refuse a file whose adapters are others than those that the model has already."""
    wanted: dict[str, tuple[Any, ...]] = {
        layer.label: (layer.factors.rank, layer.factors.scaling) for layer in content.layers
    }
    wanted |= {name: tokens for name, (tokens, _) in content.tokens.items()}
    mine = {name: _described(adapter) for name, adapter in all_adapters(root).items()}
    if different := sorted(name for name in wanted.keys() | mine.keys() if wanted.get(name) != mine.get(name)):
        shown = [f"{name} (file {wanted.get(name)}, here {mine.get(name)})" for name in different]
        raise ValueError(
            f"This {type(root).__name__} already carries adapters of other layers, ranks or scalings than the file's: "
            f"{listed(shown)}. Nothing was changed. Call detach first."
        )


def _described(adapter: Any) -> tuple[Any, ...]:
    if isinstance(adapter, TokenAdapter):
        return tuple(adapter.index.tolist())
    spec = adapter.spec
    return (spec.rank, spec.scaling, *(spec.rows and ("slices",)))


def import_state(
    module: nn.Module, root: nn.Module, content: Import, tensors: Mapping[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """Return the file's values under the names of the module's own state, its ``adapter_tensors``."""
    tensors = adapter_tensors(module) if tensors is None else tensors
    adapters, live = all_adapters(root), named_tensors(root) if content.values else {}
    values: dict[int, Tensor] = {}
    for layer in content.layers:
        adapter = adapters[layer.label]
        assert isinstance(adapter, LowRankAdapter)
        values |= {
            id(tensor): value
            for key, tensor in adapter.named_parameters()
            if (value := getattr(layer.factors, key)) is not None
        }
    values |= {id(adapters[name].rows): rows for name, (_, rows) in content.tokens.items()}
    for name, value in content.values.items():
        before = values.setdefault(id(live[name]), value)
        if not torch.equal(before, value):
            raise ValueError(f"{name!r} shares its memory with a tensor to which the file gives another value.")
    state = {name: values[id(tensor)] for name, tensor in tensors.items() if id(tensor) in values}
    # PEFT trains the biases of attention's and recurrent layers' own kind, but does not save them.
    return {name: tensor for name, tensor in _unsaved_biases(tensors).items() if name not in state} | state


def _unsaved_biases(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {
        name: tensor.detach().clone()
        for name, tensor in tensors.items()
        if "bias" in (last := name.rpartition(".")[2]) and last != "bias"
    }
