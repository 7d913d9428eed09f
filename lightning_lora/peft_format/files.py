"""PEFT directories: an adapter as ``adapter_config.json`` and ``adapter_model.safetensors``, written and read."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from contextlib import ExitStack
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_lora.attachment import attachments, get_attachment, merges, named_tensors
from lightning_lora.directories import replace_directory
from lightning_lora.fingerprint import Fingerprint, fingerprint
from lightning_lora.layers import LowRankAdapter, TokenAdapter, all_adapters, lora_layers
from lightning_lora.peft_format.collect import make_export
from lightning_lora.peft_format.directory import (
    CONFIG_FILE,
    PICKLED_FILE,
    TENSORS_FILE,
    read_base,
    read_config,
    read_tensors,
    write_tensors,
)
from lightning_lora.peft_format.exporting import Export
from lightning_lora.peft_format.importing import Import, adapted_paths, make_import
from lightning_lora.peft_format.names import chosen_root, found_root, without_wrappers
from lightning_lora.report import AttachReport
from lightning_lora.sharding import is_sharded
from lightning_lora.state import (
    adapter_tensors,
    base_tensors,
    check_not_merged,
    copy_adapter_state,
    refuse_other_base,
)
from lightning_lora.surgery import attach, detach
from lightning_lora.targets import clean_name, listed, module_names

# --- writing


def save_adapter(
    module: nn.Module,
    directory: str | PathLike[str],
    *,
    export_root: str | None = None,
    base_model_name_or_path: str | None = None,
    uniform_rank: bool = False,
    base: Fingerprint | None = None,
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
        base: The fingerprint of the module's base, where this process does not see the base's values.

    Raises:
        ValueError: PEFT cannot express what was trained; one error lists each layer with the reason. Or the directory
            holds something else. Nothing was written.
        RuntimeError: The adapters are folded into the weights, inside ``merged``.
        OSError: The files could not be written. An adapter that was there is as it was.
    """
    export = exported(module, export_root)
    if merged := merges(module):
        warnings.warn(
            f"This adapter belongs to a base with another adapter merged into {listed(list(merged))}; the files do not "
            "hold that. Save the merged base model too.",
            stacklevel=2,
        )
    name = base_model_name_or_path or _base_name(export.root)
    base = _fingerprint(module, export.root) if base is None else _below(base, module, export.root)
    write_export(export, Path(directory), name, base, uniform_rank=uniform_rank)


def write_export(
    export: Export, directory: Path, base_name: str | None, base: Fingerprint, *, uniform_rank: bool = False
) -> None:
    """Write what ``exported`` gave, as ``save_adapter`` does.

    Raises:
        ValueError: PEFT cannot express it, or the directory holds something else. Nothing was written.
        OSError: The files could not be written.
    """
    if export.refused:
        reasons = "\n".join(f"  - {name}: {reason}" for name, reason in export.refused.items())
        raise ValueError(f"PEFT cannot express this adapter; nothing was written:\n{reasons}")
    for caveat in export.caveats():
        warnings.warn(caveat, stacklevel=3)
    if uniform_rank:
        export.uniform()
    config, tensors = export.config(base_name), export.tensors()

    def write(new: Path) -> None:
        write_tensors(tensors, new / TENSORS_FILE, base)
        (new / CONFIG_FILE).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")

    replace_directory(directory, write, marker=CONFIG_FILE, stale=(PICKLED_FILE,))


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


def _fingerprint(module: nn.Module, root: nn.Module) -> Fingerprint:
    tensors = base_tensors(root, trained=adapter_tensors(module).values())
    # Reading values that are divided takes all processes, and here is one.
    return {} if any(map(is_sharded, tensors.values())) else fingerprint(tensors)


def _below(base: Fingerprint, module: nn.Module, root: nn.Module) -> Fingerprint:
    """Return the part of a module's fingerprint that is of a module inside, by the names that it has there."""
    path = next(clean_name(name) for name, part in module.named_modules() if part is root)
    start = f"{path}." if path else ""
    return {name.removeprefix(start): each for name, each in base.items() if name.startswith(start)}


# --- reading


def load_directory(
    module: nn.Module, directory: str | PathLike[str], export_root: str | None = None, *, check_base: bool = True
) -> AttachReport:
    """Attach and load the adapter of a PEFT directory, written by PEFT or by ``save_adapter``.

    Args:
        module: The base model, or a module that holds it; adapted in the same way or not at all.
        directory: The directory.
        export_root: Name of the submodule to which the names in the files are relative; found if left out.
        check_base: As in ``load_adapter``.

    Returns:
        What was adapted.

    Raises:
        ValueError: The files cannot be read, use options that have no equal here, or do not fit the module. Nothing
            was changed.
        FileNotFoundError: They are not there.
        RuntimeError: Another adapter was merged into this module for good.
    """
    check_not_merged(module, {})
    root, content = _read(module, Path(directory), export_root, check_base=check_base)
    return _attach_and_load(module, root, content)


def imported(module: nn.Module, directory: str | PathLike[str], *, check_base: bool = True) -> tuple[str, Import]:
    """Return what a directory means for a module: the name of the model inside it, and what is for that.

    Raises:
        ValueError: The files cannot be read, use options that have no equal here, or do not fit the module.
        FileNotFoundError: They are not there.
    """
    root, content = _read(module, Path(directory), None, check_base=check_base)
    return next(name for name, part in module.named_modules() if part is root), content


def _read(module: nn.Module, path: Path, export_root: str | None, *, check_base: bool) -> tuple[nn.Module, Import]:
    config, tensors = read_config(path / CONFIG_FILE), read_tensors(path)
    root = matching_root(module, adapted_paths(tensors), export_root)
    try:
        content = make_import(root, config, tensors)
    except ValueError as error:
        raise ValueError(
            f"The adapter in {str(path)!r} does not fit this {type(root).__name__}; nothing was changed:\n{error}"
        ) from None
    if check_base:
        refuse_other_base(root, read_base(path))
    return root, content


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
