"""Saving an adapter as a PEFT directory, and what PEFT and vLLM will make of it."""

from __future__ import annotations

import json
import warnings
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import NamedTuple

from torch import Tensor, nn
from typing_extensions import override

from lightning_lora.adapted_model import AdaptedModel, base_parameters, in_turn
from lightning_lora.base_buffers import moved_buffers, unsaved_buffers
from lightning_lora.fingerprint import Fingerprint, fingerprint
from lightning_lora.named_adapters import active_adapter, adapter_names
from lightning_lora.names import listed
from lightning_lora.peft_format.config import anchored
from lightning_lora.peft_format.directory import (
    CARD_FILE,
    CARD_MARK,
    CONFIG_FILE,
    PICKLED_FILE,
    TENSORS_FILE,
    model_card,
    write_tensors,
)
from lightning_lora.peft_format.export import Export, ExportCollector
from lightning_lora.peft_format.factors import PeftLayer
from lightning_lora.peft_format.names import PREFIX, chosen_root, found_root, is_lightning_module
from lightning_lora.sharding import is_sharded
from lightning_lora.state import base_samples, check_sound
from lightning_lora.storage.atomic import replace_directory


@in_turn
def save_adapter(
    module: nn.Module,
    directory: str | PathLike[str],
    *,
    export_root: str | None = None,
    base_model_name_or_path: str | None = None,
    uniform_rank: bool = False,
    overwrite: bool = False,
    task_type: str | None = None,
    base: Fingerprint | None = None,
) -> None:
    """Write the adapter as a PEFT directory, which PEFT, vLLM and ``load_adapter`` read.

    The same adapter gives the same bytes. The directory is complete or not there: the files are moved into it when all
    are written. One that exists stays, also a mount point, with its mode and its other files. Of several processes only
    one may call this.

    Args:
        module: An adapted module, such as a LightningModule.
        directory: Where to write: a new or an empty directory.
        export_root: Name of the submodule that PEFT will wrap, to which the names in the files are relative. If left
            out it is the one transformers model inside, or of a LightningModule the one child that holds all
            adapters, or the module itself (``""``). What trains in full outside of a named one is left out, with a
            warning.
        base_model_name_or_path: Name of the base model to record; the model's own ``name_or_path`` if left out.
        uniform_rank: Pad all layers with zeros to the highest rank and give them one scaling, for loaders such as vLLM
            that ignore patterns of ranks and alphas. The adapter computes the same.
        overwrite: Replace an adapter that is in the directory; other files beside it stay.
        task_type: PEFT's name of the task, such as ``"CAUSAL_LM"``, for tools that ask for it. If left out, the files
            name the class of the base model, from which PEFT's ``AutoPeftModel`` loads them.
        base: The fingerprint of the module's base, where this process does not see the base's values.

    Raises:
        ValueError: PEFT cannot express what was trained; one error lists each layer with the reason. Or the adapter
            holds NaN or infinity, or the directory holds something else, or an adapter and ``overwrite`` is not set.
            Nothing was written.
        RuntimeError: The adapters are folded into the weights, inside ``merged``, or adapted layers have been replaced
            or resized. Nothing was written.
        OSError: The files could not be written. An adapter that was there is as it was.
    """
    _refuse_sharded(module)
    AdaptedModel(module).check_started()
    export = exported(module, export_root)
    if merged := AdaptedModel(module).merges:
        warnings.warn(
            f"This adapter belongs to a base with another adapter merged into {listed(list(merged))}; the files do not "
            "hold that. Save the merged base model too.",
            stacklevel=2,
        )
    name = base_model_name_or_path or _base_name(export.root)
    base = _fingerprint(module, export.root) if base is None else below(base, export.root_name)
    write_export(
        export,
        Path(directory).expanduser(),
        name,
        base,
        uniform_rank=uniform_rank,
        overwrite=overwrite,
        task_type=task_type,
    )


def write_export(
    export: Export,
    directory: Path,
    base_name: str | None,
    base: Fingerprint,
    *,
    uniform_rank: bool = False,
    overwrite: bool = False,
    task_type: str | None = None,
) -> None:
    """Write what ``exported`` gave, as ``save_adapter`` does.

    Raises:
        ValueError: PEFT cannot express it, it holds NaN or infinity, or the directory holds something else. Nothing was
            written.
        OSError: The files could not be written.
    """
    check_expressible(export)
    export.check_task(task_type)
    for caveat in export.caveats():
        warnings.warn(caveat, stacklevel=3)
    if uniform_rank:
        export.uniform()
    config, tensors = export.config(base_name, task_type), export.tensors()
    check_sound({name.removeprefix(PREFIX): tensor for name, tensor in tensors.items()}, "was written")

    def write(new: Path) -> None:
        write_tensors(tensors, new / TENSORS_FILE, base, export.recorded_root)
        (new / CONFIG_FILE).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        card = CARD_MARK
        with suppress(FileNotFoundError):  # also where another process is replacing it
            card = (directory / CARD_FILE).read_text("utf-8", errors="replace")
        if CARD_MARK in card:
            parameters = sum(map(Tensor.numel, tensors.values()))
            (new / CARD_FILE).write_text(model_card(config, parameters, export.recorded_root), encoding="utf-8")

    replace_directory(directory, write, marker=CONFIG_FILE, stale=(PICKLED_FILE,), overwrite=overwrite)


def check_expressible(export: Export) -> None:
    """Raise if there is anything that PEFT cannot hold.

    Raises:
        ValueError: There is; one error lists all.
    """
    if export.refused:
        reasons = "\n".join(f"  - {name}: {reason}" for name, reason in export.refused.items())
        raise ValueError(f"PEFT cannot express this adapter; nothing was written:\n{reasons}")


def _refuse_sharded(module: nn.Module) -> None:
    if sharded := [name for name, tensor in AdaptedModel(module).trained.items() if is_sharded(tensor)]:
        raise ValueError(
            f"Sharded over processes by fully_shard: {listed(sharded)}. Call adapter_state_dict(module) on every "
            "process, load its result into an unwrapped copy of the model (load_adapter_state_dict), and save that."
        )


def exported(module: nn.Module, export_root: str | None = None) -> Export:
    """Return the content of a module's PEFT directory, with the reasons for everything that PEFT cannot hold.

    Raises:
        ValueError: The module has no adapters, or the model to export is ambiguous.
        RuntimeError: The adapters are folded into the weights, inside ``merged``, or adapted layers have been replaced
            or resized.
    """
    model = AdaptedModel(module)
    module = model.module
    model.check_unchanged()
    if folded := [name for name, layer in model.layers.items() if layer.lora_mode == "merged"]:
        raise RuntimeError(f"The adapters of {listed(folded)} are merged into their weights now; leave merged() first.")
    if unmade := [name for name, tensor in model.trained.items() if tensor.is_meta]:
        raise ValueError(f"On the meta device, without values to save: {listed(unmade)}.")
    trained = {id(tensor) for tensor in model.trained.values()}
    if not trained or not model.roots:
        model.check_adapted("save_adapter")
        raise ValueError(
            f"{type(module).__name__} cannot be saved: its adapters belong to a parent of it; name this part with "
            "export_root."
        )

    def holds_all(part: nn.Module) -> bool:
        return trained <= {id(tensor) for tensor in AdaptedModel(part).tensors.values()}

    root = found_root(module, holds_all) if export_root is None else chosen_root(module, export_root)
    export = ExportCollector(module, *root).collect()
    # Of a model that is saved by itself, nobody knows what it is called elsewhere.
    export.recorded_root = export.root_name if export.root_name or is_lightning_module(module) else None
    if export_root is not None:
        _leave_out(export, model)
    moved_buffers(model)  # so that their names are there
    export.moved = sorted(name for root in model.roots for name in root.attachment.moved)
    return export


def _leave_out(export: Export, model: AdaptedModel) -> None:
    """Export the named model without what trains in full elsewhere, such as the value head of a policy."""
    inside = {id(tensor) for tensor in AdaptedModel(export.root).tensors.values()}
    if outside := [name for name, tensor in model.in_full.items() if id(tensor) not in inside]:
        export.refused = {name: reason for name, reason in export.refused.items() if name not in outside}
        warnings.warn(
            f"The directory leaves out {listed(outside)}: trained in full, outside of export_root="
            f"{export.root_name!r}. A .ckpt holds everything.",
            stacklevel=4,
        )


def _base_name(root: nn.Module) -> str | None:
    name = getattr(root, "name_or_path", None)
    return name if isinstance(name, str) and name else None


def _fingerprint(module: nn.Module, root: nn.Module) -> Fingerprint:
    model = AdaptedModel(module)
    buffers = unsaved_buffers(model, root)
    # Reading values that are divided takes all processes, and here is one.
    if any(map(is_sharded, (base_parameters(root, model.trained) | buffers).values())):
        return {}
    return base_samples(model, root) | fingerprint(buffers)


def below(base: Fingerprint, root_name: str) -> Fingerprint:
    """Return the part of a module's fingerprint that is of a module inside, by the names that it has there."""
    start = f"{root_name}." if root_name else ""
    return {name.removeprefix(start): each for name, each in base.items() if name.startswith(start)}


# --- before saving

YES = "yes"


class PreflightRow(NamedTuple):
    """One layer, module or option: its kind, and whether PEFT and vLLM accept it: ``"yes"``, or the reason why not."""

    name: str
    kind: str
    rank: int | None
    scaling: float | None
    peft: str
    vllm: str


@dataclass(frozen=True)
class Preflight:
    """The parts of an adapter that PEFT and vLLM accept; ``print`` shows a table.

    Attributes:
        root: Name of the model that would be exported; the names in the rows are relative to it.
        rows: Layers, modules and options.
        notes: Other remarks.
    """

    root: str
    rows: Sequence[PreflightRow]
    notes: Sequence[str] = ()

    @property
    def peft_accepts(self) -> bool:
        """Whether ``save_adapter`` can write it."""
        return all(row.peft == YES for row in self.rows)

    @property
    def vllm_accepts(self) -> bool:
        """Whether vLLM can serve it, if it serves the model and these of its layers with LoRA at all."""
        return all(row.vllm == YES for row in self.rows)

    @override
    def __str__(self) -> str:
        groups: dict[tuple[str, ...], list[str]] = {}
        for row in self.rows:
            rank = "-" if row.rank is None else str(row.rank)
            scaling = "-" if row.scaling is None else f"{row.scaling:g}"
            groups.setdefault((row.kind, rank, scaling, row.peft, row.vllm), []).append(row.name)
        table: list[tuple[str, ...]] = [("layers", "kind", "rank", "scaling", "PEFT", "vLLM")]
        table += [(listed(names, 2), *what) for what, names in groups.items()]
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        lines = [
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in table
        ]
        rule = "  ".join("-" * width for width in widths)
        peft, vllm = (YES if accepts else "no" for accepts in (self.peft_accepts, self.vllm_accepts))
        head = f"Export of {repr(self.root) if self.root else 'the module itself'}: PEFT {peft}, vLLM {vllm}"
        return "\n".join([head, lines[0], rule, *lines[1:], *self.notes])


def preflight(module: nn.Module, *, export_root: str | None = None) -> Preflight:
    """Report for each layer and option of an adapted module whether PEFT and vLLM accept it.

    Args:
        module: An adapted module.
        export_root: As in ``save_adapter``.

    Raises:
        ValueError: The module has no adapters, or the model to export is ambiguous.
        RuntimeError: The adapters are folded into the weights, inside ``merged``.
    """
    export = exported(module, export_root)
    rows = [*_layer_rows(export), *_other_rows(export)]
    rows += [PreflightRow(name, "-", None, None, reason, "not in the files") for name, reason in export.refused.items()]
    names = adapter_names(module)
    named = [f"This is about the active adapter, {active_adapter(module)!r}."] if len(names) > 1 else []
    return Preflight(export.root_name, rows, [*named, *_notes(export)])


def _layer_rows(export: Export) -> list[PreflightRow]:
    numbers = export.numbers()
    patterns = numbers["rank_pattern"].keys() | numbers["alpha_pattern"].keys()
    rows = []
    for layer in export.layers:
        vllm = _vllm_verdict(export, layer, like_default=anchored(layer.target) not in patterns)
        kind = getattr(layer.module, "base_class", type(layer.module)).__name__
        name = layer.target if layer.by_parameter else layer.name
        if not {name, layer.name} & export.refused.keys():
            rows.append(PreflightRow(name, kind, layer.factors.rank, layer.factors.scaling, YES, vllm))
    return rows


def _other_rows(export: Export) -> list[PreflightRow]:
    others = [(name, "modules_to_save", "no modules_to_save") for name in export.saved]
    others += [(name, "trained tokens", "no trainable tokens") for name in export.tokens]
    others += [(name, "bias of the base", "no biases") for name in export.biases]
    return [
        PreflightRow(name, kind, None, None, YES, reason) for name, kind, reason in others if name not in export.refused
    ]


def _notes(export: Export) -> list[str]:
    ranks = [layer.factors.rank for layer in export.layers]
    notes = [f"vLLM needs max_lora_rank >= {max(ranks)}."] if ranks else []
    return notes + export.caveats()


def _vllm_verdict(export: Export, layer: PeftLayer, *, like_default: bool) -> str:
    """Return ``"yes"``, or why vLLM would refuse this layer or compute another function with it."""
    if export.use_dora:
        return "no DoRA"
    if export.lora_bias:
        return "no bias in lora_B"
    if not layer.adapter.vllm_takes:
        return f"no adapter for {getattr(layer.module, 'base_class', type(layer.module)).__name__}"
    return YES if like_default else "ignores patterns: save with uniform_rank=True"
