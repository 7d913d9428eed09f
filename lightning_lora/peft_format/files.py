"""PEFT directories: writing an adapter as ``adapter_config.json`` and ``adapter_model.safetensors``."""

from __future__ import annotations

import json
import warnings
from os import PathLike
from pathlib import Path

from torch import nn

from lightning_lora.attachment import attachments, named_tensors
from lightning_lora.fingerprint import Fingerprint, fingerprint
from lightning_lora.layers import lora_layers
from lightning_lora.names import clean_name, listed
from lightning_lora.peft_format.collect import make_export
from lightning_lora.peft_format.directory import (
    CONFIG_FILE,
    PICKLED_FILE,
    TENSORS_FILE,
    write_tensors,
)
from lightning_lora.peft_format.exporting import Export
from lightning_lora.peft_format.names import chosen_root, found_root
from lightning_lora.sharding import is_sharded
from lightning_lora.state import (
    adapter_tensors,
    base_tensors,
    merges,
)
from lightning_lora.storage.atomic import replace_directory


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
