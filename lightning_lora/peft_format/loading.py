"""PEFT directories: reading them, whoever wrote them, into a model."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from lightning_lora.attachment import AttachReport, attachments, get_attachment, named_tensors
from lightning_lora.layers import Adapter, LowRankAdapter, TokenAdapter, all_adapters, lora_layers, weights_only_read
from lightning_lora.names import ModuleNames, listed, module_names
from lightning_lora.peft_format.directory import PeftFile
from lightning_lora.peft_format.importing import Import, make_import
from lightning_lora.peft_format.names import found_root, without_wrappers
from lightning_lora.state import adapter_tensors, copy_adapter_state, refuse_other_base
from lightning_lora.surgery import attach, detach


def load_directory(module: nn.Module, file: PeftFile, *, check_base: bool = True) -> AttachReport:
    """Attach and load the adapter of a PEFT directory, as ``load_adapter`` does."""
    tensors = adapter_tensors(module)
    root, content = _import_into(module, file, tensors if check_base else None)
    return _attach_and_load(module, root, content, tensors)


def imported(module: nn.Module, file: PeftFile, *, check_base: bool = True) -> tuple[str, Import]:
    """Return what a directory means for a module: the name of the model inside it, and what is for that.

    Raises:
        ValueError: The file does not fit the module.
    """
    root, content = _import_into(module, file, adapter_tensors(module) if check_base else None)
    return next(name for name, part in module.named_modules() if part is root), content


def _import_into(module: nn.Module, file: PeftFile, apart: Mapping[str, Tensor] | None) -> tuple[nn.Module, Import]:
    """Return the model to which a directory's names are relative, and what is for it.

    Args:
        module: The module that holds the model.
        file: The directory.
        apart: What of the module is no base to be compared; None compares nothing.
    """
    names_of = functools.cache(module_names)
    root = matching_root(module, file.paths, names_of)
    names = names_of(root)
    try:
        with weights_only_read(part for part, _ in names.values()):
            content = make_import(root, file, names)
    except ValueError as error:
        raise ValueError(
            f"The adapter in {str(file.path)!r} does not fit this {type(root).__name__}; nothing was changed:\n{error}"
        ) from None
    if apart is not None:
        refuse_other_base(root, file.base, apart.values())
    return root, content


def matching_root(
    module: nn.Module,
    paths: set[str],
    names_of: Callable[[nn.Module], ModuleNames] = module_names,
) -> nn.Module:
    """Return the model in which all these paths of a file name modules; ValueError if several may be meant."""

    @functools.cache
    def has_all(part: nn.Module) -> bool:
        names = {alias for _, aliases in names_of(part).values() for alias in aliases}
        return paths <= names or all(without_wrappers(path, names) for path in paths)

    _, found = found_root(module, has_all)
    if has_all(found):
        return found
    # Whoever wrote the file may have wrapped the model at another depth.
    others = [part for part in (module, *module.children()) if has_all(part)]
    return others[0] if len(others) == 1 else found


def _attach_and_load(
    module: nn.Module, root: nn.Module, content: Import, tensors: Mapping[str, Tensor]
) -> AttachReport:
    """Attach what the files say, or nothing at all; ``tensors`` are what the module has of adapters before."""
    with ExitStack() as undo:
        adapters = all_adapters(root)
        if adapters or lora_layers(root):
            _check_same_adapters(root, content, adapters)
        else:
            attach(root, content.config)
            undo.callback(detach, root)
            tensors, adapters = adapter_tensors(module), all_adapters(root)
        copy_adapter_state(module, import_state(root, content, tensors, adapters), tensors=tensors)
        undo.pop_all()
    attachment = get_attachment(root) or next(note for _, _, note in attachments(module))
    return attachment.report


def _check_same_adapters(root: nn.Module, content: Import, adapters: Mapping[str, Adapter]) -> None:
    """Refuse a file whose adapters are others than those that the model has already."""
    wanted: dict[str, tuple[Any, ...]] = {
        layer.label: (layer.factors.rank, layer.factors.scaling) for layer in content.layers
    }
    wanted |= {name: tokens for name, (tokens, _) in content.tokens.items()}
    mine = {name: _described(adapter) for name, adapter in adapters.items()}
    if different := sorted(name for name in wanted.keys() | mine.keys() if wanted.get(name) != mine.get(name)):
        shown = [f"{name} (file {wanted.get(name)}, here {mine.get(name)})" for name in different]
        raise ValueError(
            f"This {type(root).__name__} already carries adapters of other layers, ranks or scalings than the file's: "
            f"{listed(shown)}. Nothing was changed. Call detach first."
        )


def _described(adapter: Adapter) -> tuple[Any, ...]:
    if isinstance(adapter, TokenAdapter):
        return tuple(adapter.index.tolist())
    spec = adapter.spec
    return (spec.rank, spec.scaling, *(spec.rows and ("slices",)))


def import_state(
    root: nn.Module, content: Import, tensors: Mapping[str, Tensor], adapters: Mapping[str, Adapter]
) -> dict[str, Tensor]:
    """Return a file's values under the names of a module's own state.

    Args:
        root: The model that the file is for.
        content: The file.
        tensors: The module's ``adapter_tensors``.
        adapters: The model's adapters.
    """
    live = named_tensors(root) if content.values else {}
    values: dict[int, Tensor] = {}
    for layer in content.layers:
        adapter, factors = adapters[layer.label], layer.factors
        assert isinstance(adapter, LowRankAdapter)
        for key, tensor in adapter._parameters.items():
            if (value := getattr(factors, key)) is not None:
                values[id(tensor)] = value
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
