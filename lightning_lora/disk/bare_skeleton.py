"""The skeleton of a model as far as an adapter's own files tell it: the adapted layers, and what trained in full."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from lightning_lora.adapted_model import AdaptedModel
from lightning_lora.attachment import attachments
from lightning_lora.config import LoRAConfig
from lightning_lora.disk.skeleton import build_skeleton
from lightning_lora.layers import adapter_of_kind, all_adapters
from lightning_lora.layers.adapter import row_numbers
from lightning_lora.names import join, listed, matches
from lightning_lora.peft_format.config import KNOWN_ORDER, PeftConfig
from lightning_lora.peft_format.directory import keys_by_path
from lightning_lora.peft_format.names import PREFIX, TOKENS_SUFFIX
from lightning_lora.state import mismatches, record_problems
from lightning_lora.storage.safetensors import Layout
from lightning_lora.surgery import attach

_REMEDY = "Load the model, load_adapter the file into it, and save it from there."
_STATISTICS = ("running_mean", "running_var", "num_batches_tracked", "._u", "._v", ".weight_u", ".weight_v")


# --- from a checkpoint


def skeleton_of_checkpoint(record: Mapping[str, Any], state: Mapping[str, Tensor]) -> nn.Module:
    """Return a skeleton that carries a checkpoint's adapters with their values.

    Raises:
        ValueError: The record does not say enough, or does not fit the tensors.
        KeyError, TypeError, AttributeError: It makes no sense.
    """
    layers, configs = record["layers"], [LoRAConfig.from_dict(entry["config"]) for entry in record["adapters"]]
    if reason := _refusal(record, configs, state):
        raise ValueError(reason)
    layouts, kinds = dict[str, Layout](), dict[str, str]()
    for name, said in sorted(layers.items(), key=lambda item: int(item[1].get("order", 0))):
        layouts[said["weight"]] = _layout(name, said, state)
        if said["kind"] != "parameter":
            kinds[said["weight"].rpartition(".")[0]] = said["kind"]
    for name, value in state.items():
        if ".lora." not in name and any(_trains(name, config) for config in configs):
            layouts[name] = Layout(value.dtype, tuple(value.shape))
    skeleton = build_skeleton(layouts, kinds)
    for entry, config in zip(record["adapters"], configs, strict=True):
        attach_bare(skeleton.get_submodule(entry["root"]), config, entry["seed"])
    known = {name: value for name, value in state.items() if ".lora." in name or name in layouts}
    if problems := record_problems(skeleton, record) + mismatches(AdaptedModel(skeleton).trained, known):
        raise ValueError("The record and the tensors of the file contradict each other: " + "; ".join(problems))
    fill(skeleton, known)
    return skeleton


def _refusal(record: Mapping[str, Any], configs: Sequence[LoRAConfig], state: Mapping[str, Tensor]) -> str | None:
    layers = record["layers"]
    if record["merges"]:
        return f"The adapter was trained on a base with another one merged into it. {_REMEDY}"
    if unknown := [name for name, said in layers.items() if said.get("kind") is None]:
        return f"The file does not tell what kind of layer these are: {listed(unknown)}. {_REMEDY}"
    if any(said.get("rows") for said in layers.values()) and any(config.use_dora for config in configs):
        return f"DoRA of slices needs the norms of the base's other rows. {_REMEDY}"
    if any(config.frozen_norm == "track" for config in configs) and any(name.endswith(_STATISTICS) for name in state):
        return "PEFT saves no running statistics of frozen norms (frozen_norm='track')."
    return None


def _layout(name: str, said: Mapping[str, Any], state: Mapping[str, Tensor]) -> Layout:
    """Return the layout of a weight, which must fit the factors: nothing larger than the file says is ever made."""
    shape = said["shape"]
    if not (isinstance(shape, list) and 1 < len(shape) < 6 and all(type(s) is int and 0 < s < 2**31 for s in shape)):
        raise ValueError(f"The record of {name!r} holds the shape {shape!r}; the file was damaged.")
    above, _, last = name.rpartition(".")
    for begin in (f"{name}.lora.", join(above, f"lora.{last}.")):
        if f"{begin}A" in state:
            found = (state[f"{begin}B"].shape[-2], state[f"{begin}A"].shape[-1])
            rows, columns = adapter_of_kind(said["kind"]).matrix_of(shape)
            if found[1] != columns or (found[0] != rows and not said.get("rows")):
                raise ValueError(f"{name}: a weight of the shape {tuple(shape)} does not fit factors of {found}.")
    return Layout(torch.float32, tuple(shape))


def _trains(name: str, config: LoRAConfig) -> bool:
    parts = name.split(".")
    above = [".".join(parts[:depth]) for depth in range(1, len(parts))]
    saved = any(matches(entry, path) for entry in config.modules_to_save for path in above)
    return saved or (config.bias != "none" and "bias" in parts[-1])


# --- from a PEFT directory


def skeleton_of_peft(config: PeftConfig, tensors: Mapping[str, Tensor], root: str, *, is_transposed: bool) -> nn.Module:
    """Return a skeleton without adapters that has a place for all that a PEFT directory brings.

    Args:
        config: The directory's config.
        tensors: Its tensors.
        root: The name of the model inside the skeleton.
        is_transposed: Whether the config says that linear layers store their weights so.

    Raises:
        ValueError: The files do not tell what the layers are.
    """
    if bare := [entry for entry in config.target_parameters if "." not in entry]:
        raise ValueError(f"target_parameters names {listed(bare)} without the modules that they are in. {_REMEDY}")
    known = {key.removeprefix(PREFIX): tensor for key, tensor in tensors.items()}
    layouts, kinds = dict[str, Layout](), dict[str, str]()
    stacks: dict[str, dict[int, str]] = {}
    by_path = keys_by_path(known)
    for path in sorted(by_path):
        name = _without_wrappers(path)
        if _parameters(name, config):
            stacks.setdefault(name, {})[path.count(".base_layer")] = path
        else:
            kinds[name], shape = _kind_and_shape(path, known, is_transposed=is_transposed)
            layouts[f"{name}.weight"] = Layout(torch.float32, shape)
    for name, places in stacks.items():
        layouts |= _stack_layouts(name, places, known, config)
    repeated = dict[str, Tensor]()
    for key in sorted(known.keys() - {key for keys in by_path.values() for key in keys}):
        if key.endswith(TOKENS_SUFFIX):
            name = key.removesuffix(TOKENS_SUFFIX)
            layouts[f"{name}.weight"] = Layout(torch.float32, (_last_token(name, config) + 1, known[key].shape[-1]))
            kinds[name] = "embedding"
        elif not any(part in f".{key}." for part in (".original_module.", ".modules_to_save.")):
            repeated[key.replace(".base_layer.", ".")] = known[key]
    layouts |= {name: Layout(value.dtype, tuple(value.shape)) for name, value in repeated.items()}
    full = {join(root, name): layout for name, layout in layouts.items()}
    skeleton = build_skeleton(full, {join(root, name): kind for name, kind in kinds.items()})
    # Weights of the base that the file repeats are compared with the model's: here with themselves.
    _put(skeleton, {join(root, name): value for name, value in repeated.items()})
    return skeleton


def _without_wrappers(path: str) -> str:
    while path.endswith(".base_layer"):
        path = path.removesuffix(".base_layer")
    if ".base_layer." in path:
        raise ValueError(f"{path!r} belongs to torch's attention, of which files say too little. {_REMEDY}")
    return path


def _kind_and_shape(path: str, known: Mapping[str, Tensor], *, is_transposed: bool) -> tuple[str, tuple[int, ...]]:
    A = known.get(f"{path}.lora_embedding_A", known.get(f"{path}.lora_A.weight"))
    B = known.get(f"{path}.lora_embedding_B", known.get(f"{path}.lora_B.weight"))
    if A is None or B is None or min(A.ndim, B.ndim) < 2:
        raise ValueError(f"The update of {path!r} is incomplete.")
    if f"{path}.lora_embedding_A" in known:
        return "embedding", (A.shape[1], B.shape[0])
    if A.ndim > 2:
        return "conv", (B.shape[0], *A.shape[1:])
    return ("conv1d", (A.shape[1], B.shape[0])) if is_transposed else ("linear", (B.shape[0], A.shape[1]))


def _parameters(name: str, config: PeftConfig) -> list[str]:
    entries = [entry.rpartition(".") for entry in config.target_parameters]
    return [key for module, _, key in entries if name == module or name.endswith(f".{module}")]


def _stack_layouts(
    name: str, places: Mapping[int, str], known: Mapping[str, Tensor], config: PeftConfig
) -> Iterator[tuple[str, Layout]]:
    keys = _parameters(name, config)
    if len(keys) > 1 and set(keys) != set(KNOWN_ORDER):
        raise ValueError(f"{name}: the file does not tell which of its parameters is which ({listed(keys)}). {_REMEDY}")
    order = list(KNOWN_ORDER) if len(keys) > 1 else keys
    for index, key in enumerate(order):
        path = places.get(len(order) - 1 - index)  # PEFT wraps the first registered innermost
        A, B = (known.get(f"{path}.lora_{factor}.weight") for factor in "AB")
        if A is None or B is None or min(A.ndim, B.ndim) < 2:
            raise ValueError(f"The update of {name!r} is incomplete.")
        experts = A.shape[0] // config.rank_of(join(name, key))
        shape = (B.shape[0], A.shape[1]) if experts <= 1 else (experts, B.shape[0], A.shape[1])
        yield join(name, key), Layout(torch.float32, shape)


def _last_token(name: str, config: PeftConfig) -> int:
    wanted = config.trainable_token_indices
    found = wanted if not isinstance(wanted, Mapping) else next((w for n, w in wanted.items() if name.endswith(n)), ())
    if not found or max(found) >= 2**31:
        raise ValueError(f"trainable_token_indices does not say which tokens of {name!r} these are.")
    return max(found)


# --- both


def attach_bare(module: nn.Module, config: LoRAConfig, seed: int = 0) -> None:
    """Attach to a skeleton that has nothing but what is adapted."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "These adapters are not smaller")  # too late to choose another rank
        attach(module, replace(config, exclude_modules=(), untie_weights=False), seed=seed)
    note = next(attachment for _, owner, attachment in attachments(module) if owner is module)
    note.config = config


def fill(skeleton: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Give all that trained its values, in place of the zeros that a skeleton has."""
    _put(skeleton, {name: state[name].to(tensor.dtype) for name, tensor in AdaptedModel(skeleton).trained.items()})
    for adapter in all_adapters(skeleton).values():
        if adapter.spec.rows:
            adapter.index = row_numbers(adapter.spec.rows)


def _put(skeleton: nn.Module, values: Mapping[str, Tensor]) -> None:
    for name, value in values.items():
        path, _, key = name.rpartition(".")
        owner = skeleton.get_submodule(path)
        if key in owner._buffers:
            owner._buffers[key] = value.detach().clone()
        else:
            owner._parameters[key] = nn.Parameter(value.detach().clone(), requires_grad=False)
