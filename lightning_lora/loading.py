"""Loading: an adapter on disk as one value, and into a model."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from contextlib import ExitStack
from os import PathLike
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from lightning_lora.adapted_model import AdaptedModel, in_turn
from lightning_lora.attachment import AttachReport, get_attachment
from lightning_lora.config import LoRAConfig
from lightning_lora.layers import Adapter, TokenAdapter
from lightning_lora.named_adapters import active_adapter, adapter_names, fill_buffers, recorded
from lightning_lora.names import listed
from lightning_lora.peft_format.directory import CONFIG_FILE, PeftFile, read_directory
from lightning_lora.peft_format.importing import Import, import_into, import_state
from lightning_lora.state import (
    check_base_values,
    check_not_merged,
    check_sound,
    copy_adapter_state,
    has_base_values,
    load_adapter_state_dict,
    record_problems,
)
from lightning_lora.storage.checkpoint import CheckpointFile, own_name, read_checkpoint
from lightning_lora.surgery import attach, attach_entry, detach
from lightning_lora.switching import beside


def read_adapter(
    path: str | PathLike[str], adapter: str | None = None, *, like: str | None = None
) -> PeftFile | CheckpointFile:
    """Read an adapter without its model: a ``.ckpt`` of a LoRACallback run, or a PEFT directory.

    Args:
        path: The file or the directory.
        adapter: Which of several in a ``.ckpt``.
        like: Which one, unless ``adapter`` says so, if there is one of this name; else the trained one.

    Raises:
        ValueError: It cannot be read, or holds no adapter, or none of this name.
        FileNotFoundError: It does not exist.
    """
    path = os.path.expanduser(path)  # Path would drop a slash of an address
    if not path:
        raise ValueError("The path is empty, as best_model_path is when a ModelCheckpoint has kept no file.")
    if Path(path).is_dir():
        if adapter is not None:
            raise ValueError(
                f"adapter={adapter!r}: {str(path)!r} is a directory, which holds one adapter; leave it out."
            )
        return read_directory(path)
    if Path(path).suffix == ".safetensors" and Path(path).is_file():
        raise ValueError(
            f"{str(path)!r} holds tensors alone. Name the directory with {CONFIG_FILE} that it belongs to, or a .ckpt "
            "of a LoRACallback run."
        )
    return read_checkpoint(path, adapter, like=like)


@in_turn
def add_adapter(
    module: nn.Module,
    name: str,
    source: LoRAConfig | str | PathLike[str] | Mapping[str, Tensor] | None = None,
    *,
    adapter: str | None = None,
    seed: int = 0,
    check_base: bool = True,
) -> AttachReport:
    """Add a named adapter beside those that a module has; the first one becomes the active one.

    Adapters may differ in every option. What one trains in full, such as a head, switches with it, so the base's own
    values are kept beside.

    Args:
        module: The base model; it may have adapters. One that ``attach`` or ``load_adapter`` gave it without a name is
            called ``"default"``.
        name: A new name, without ``"."``.
        source: The options of a fresh adapter; the path of a saved one, as in ``load_adapter``; or the result of
            ``adapter_state_dict`` for an adapter with the options of the active one. Defaults to ``LoRAConfig()``.
        adapter: Which adapter of a ``.ckpt`` that holds several; by default the one called ``name``, or, if there is
            none, the one that was trained.
        seed: Seed of a fresh adapter's random starts.
        check_base: As in ``load_adapter``.

    Returns:
        A report of what was adapted.

    Raises:
        ValueError: The name is in use or cannot be used, the source cannot be read or does not fit, or the base's own
            values of what an earlier adapter trains in full were not kept. Nothing was changed.
        RuntimeError: The module is wrapped for several processes, or the active adapter is merged or disabled now.
            Nothing was changed.
    """
    if adapter is not None and (source is None or isinstance(source, (LoRAConfig, Mapping))):
        raise ValueError(
            f"add_adapter(adapter={adapter!r}) chooses one of the adapters in a file, but source is a "
            f"{type(source).__name__}. Name a .ckpt, or leave adapter out."
        )
    active, is_first = AdaptedModel(module).roots, not adapter_names(module)
    with beside(module, name):
        if source is None or isinstance(source, LoRAConfig):
            return attach(module, source or LoRAConfig(), seed=seed)
        if not isinstance(source, Mapping):
            file = read_adapter(source, adapter, like=name)
            return _load(module, file, check_base=check_base, is_alone=is_first)
        if not active:
            raise ValueError(
                f"add_adapter(module, {name!r}, ...): tensors do not say their options, and no adapter is active whose "
                "options they could have. Pass a LoRAConfig first and call load_adapter_state_dict, or pass the path "
                "of a saved adapter."
            )
        with ExitStack() as undo:
            for root in active:
                report = attach(root.module, root.attachment.config, seed=root.attachment.seed)
                undo.callback(detach, root.module)
            load_adapter_state_dict(module, source)
            undo.pop_all()
        return report


@in_turn
def load_adapter(
    module: nn.Module,
    path: str | PathLike[str],
    *,
    adapter: str | None = None,
    name: str | None = None,
    check_base: bool = True,
) -> AttachReport:
    """Attach and load a saved adapter; the file alone says everything needed.

    Args:
        module: A base model of the trained kind with its pretrained weights, adapted in the same way or not at all.
        path: A ``.ckpt`` written under a ``LoRACallback``, or a directory written by ``save_adapter`` or by PEFT. The
            model that a directory's names are relative to is found in the module by those names.
        adapter: Name of the adapter to load from a ``.ckpt`` of ``LoRACallback(save_adapters="all")``; by default the
            one called ``name``, or, if there is none, the one that was trained.
        name: Add it beside the module's other adapters under this name, as ``add_adapter`` does, instead of loading
            into the active one.
        check_base: Reject a base whose values differ from those the adapter was trained on, if the file holds a
            fingerprint; the same values in another precision are accepted.

    Returns:
        A report of what was adapted.

    Raises:
        ValueError: The file cannot be read, holds no such adapter, or does not fit the module or its base; or the
            module has an adapter of its name, and another one is active. Nothing was changed.
        RuntimeError: Another adapter was merged into this module for good.
    """
    if name is not None:
        return add_adapter(module, name, path, adapter=adapter, check_base=check_base)
    file, active = read_adapter(path, adapter), active_adapter(module)
    own = own_name(file.record) if isinstance(file, CheckpointFile) else None
    names = adapter_names(module)
    if own != active and own in names:
        raise ValueError(
            f"{str(path)!r} holds {own!r}, which this {type(module).__name__} has beside {active!r}, the active one, "
            f"whose values would be lost. Nothing was changed. Call set_adapter(module, {own!r}) first to load into "
            f"{own!r}, or give a new name: load_adapter(module, path, name=...)."
        )
    if own not in (None, *names) and recorded(module) is not None:
        raise ValueError(
            f"{str(path)!r} holds {own!r}, and this {type(module).__name__} has {listed([*map(repr, names)])}, of "
            f"which {active!r} is active, whose values would be lost. Nothing was changed. Load it beside: "
            f"load_adapter(module, path, name={own!r})."
        )
    return _load(module, file, check_base=check_base, is_alone=len(names) < 2)


def _load(module: nn.Module, file: PeftFile | CheckpointFile, *, check_base: bool, is_alone: bool) -> AttachReport:
    if (model := AdaptedModel(module)).layers:
        module = model.module  # without its wrappers, which an unadapted one must not have
    check_not_merged(module, file.merges, lambda: not check_base or has_base_values(module, file.base))
    try:
        if isinstance(file, PeftFile):
            return _load_directory(module, file, check_base=check_base)
        return _load_checkpoint(module, file, check_base=check_base, is_alone=is_alone)
    except ValueError as error:
        if late := _late_hooks(module):
            raise ValueError(
                f"{error}\nIf {listed(late)} of {type(module).__name__} builds layers or loads their weights, call it "
                "before the adapter is loaded."
            ) from error
        raise


def _late_hooks(module: nn.Module) -> list[str]:
    """Return the hooks in which a LightningModule may build layers, and which run in a Trainer alone."""
    classes = type(module).__mro__
    own = next((classes[:at] for at, each in enumerate(classes) if each.__name__ == "LightningModule"), ())
    return [hook for hook in ("setup", "configure_model") if any(hook in vars(each) for each in own)]


def _load_checkpoint(module: nn.Module, file: CheckpointFile, *, check_base: bool, is_alone: bool) -> AttachReport:
    """Attach and load what the record says, or nothing at all."""
    if check_base:
        check_base_values(AdaptedModel(module), file.base)
    with ExitStack() as undo:
        reports = [attach_entry(module, entry, undo) for entry in file.record["adapters"]]
        if problems := record_problems(module, file.record):
            raise ValueError("The checkpoint does not fit this model:\n" + "\n".join(f"  - {p}" for p in problems))
        model = AdaptedModel(module)
        known = model.tensors.keys()
        if not file.tensors.keys() <= known:  # states of metrics, say; walking all that a model would save takes longer
            known = module.state_dict().keys()
        copy_adapter_state(model, file.tensors, known)
        fill_buffers(model, file.record.get("buffers", {}))
        if is_alone:
            file.load_extra_states(module)
        elif file.extra_states:
            warnings.warn(
                f"{str(file.path)!r} holds what get_extra_state has returned: {listed([*file.extra_states])}. That "
                "belongs to the module, not to one of its adapters, so it was left as it is here.",
                stacklevel=2,
            )
        undo.pop_all()
    return reports[0]


def _load_directory(module: nn.Module, file: PeftFile, *, check_base: bool) -> AttachReport:
    """Attach and load what the files say, or nothing at all."""
    check_sound(file.tensors, "was changed")
    content = import_into(module, file, check_base=check_base)
    root = content.root
    with ExitStack() as undo:
        before = AdaptedModel(root)
        if before.layers:
            _check_same_adapters(content, before.adapters)
        else:
            attach(root, content.config)
            undo.callback(detach, root)
        model = AdaptedModel(module)
        copy_adapter_state(model, import_state(content, model))
        fill_buffers(model, {})  # which a directory does not hold
        undo.pop_all()
    return (get_attachment(root) or model.roots[0].attachment).report


def _check_same_adapters(content: Import, adapters: Mapping[str, Adapter]) -> None:
    """Refuse a file whose adapters differ from those that the model already has."""
    wanted: dict[str, tuple[Any, ...]] = {
        layer.label: (layer.factors.rank, layer.factors.scaling) for layer in content.layers
    }
    wanted |= {name: tokens for name, (tokens, _) in content.tokens.items()}
    mine = {name: _described(adapter) for name, adapter in adapters.items()}
    if different := sorted(name for name in wanted.keys() | mine.keys() if wanted.get(name) != mine.get(name)):
        shown = [f"{name} (file {wanted.get(name)}, here {mine.get(name)})" for name in different]
        raise ValueError(
            f"This {type(content.root).__name__} already has adapters, and their layers, ranks or scalings differ from "
            f"the file's: {listed(shown)}. Nothing was changed. Call detach first."
        )


def _described(adapter: Adapter) -> tuple[Any, ...]:
    if isinstance(adapter, TokenAdapter):
        return tuple(adapter.index.tolist())
    spec = adapter.spec
    return (spec.rank, spec.scaling, *(spec.rows and ("slices",)))
