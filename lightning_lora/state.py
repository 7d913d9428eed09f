"""Adapter state in memory: copy it out of a model and into one, check that it fits, and describe it in a record."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import ExitStack
from typing import Any, cast

import torch
from torch import Tensor, nn

from lightning_lora.adapted_model import AdaptedModel, base_parameters, in_turn, replace_buffers
from lightning_lora.base_buffers import grown_buffers, own_values
from lightning_lora.fingerprint import (
    END,
    Fingerprint,
    Sample,
    base_problems,
    differing_tensors,
    fingerprint,
    samples,
)
from lightning_lora.layers import LoRALayer, LowRankAdapter, TokenAdapter
from lightning_lora.named_adapters import of_others
from lightning_lora.names import CONTAINERS, OTHERS, clean_name, join, listed, module_names, near_names, walk
from lightning_lora.sharding import copy_whole, local, unwrapped, whole

FORMAT_VERSION = 1
EXTRA_STATE = "_extra_state"  # the key of torch for what ``get_extra_state`` returns


@in_turn
def adapter_state_dict(module: nn.Module) -> dict[str, Tensor]:
    """Return a copy of everything that was trained: name -> tensor.

    Unlike ``nn.Module.state_dict`` it holds copies, so that it stays as it is when training goes on, and names without
    what wrappers such as Fabric's, DDP's and ``torch.compile``'s add. Tensors that ``fully_shard`` has divided over
    processes come whole; then every process must call this.

    Raises:
        ValueError: The module has no adapters, or it is a part of an adapted one and holds what that trains in full.
        RuntimeError: Adapted layers have been replaced or resized.
    """
    model = AdaptedModel(module)
    model.check_knows_all()
    model.check_unchanged()
    model.check_started()
    if not model.trained:
        model.check_adapted("adapter_state_dict")
    return {name: whole(tensor.detach()).clone() for name, tensor in model.trained.items()}


@in_turn
def load_adapter_state_dict(module: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Copy an adapter's state into an adapted module: swaps the task on one base.

    Raises:
        ValueError: Names or shapes do not fit, or the module has no adapters; one error lists all. Or the state holds
            NaN or infinity, or the module lies on the meta device. Nothing was changed.
        RuntimeError: Another adapter was merged into this module, for good or inside ``merged``. Nothing was changed.
    """
    check_not_merged(module, {})
    copy_adapter_state(AdaptedModel(module), state)


def copy_adapter_state(model: AdaptedModel, state: Mapping[str, Tensor], known: Collection[str] = ()) -> None:
    """Copy an adapter's state into a model, whatever was merged into its base.

    Args:
        model: The adapted model.
        state: The values.
        known: Other names that the state may hold.

    Raises:
        ValueError: Names or shapes do not fit, values are NaN or infinity, or the model cannot hold values. Nothing was
            changed.
        RuntimeError: The adapters are folded into the weights, inside ``merged``.
    """
    check_holds_values(model)
    model = with_masks(model, state)
    if folded := [name for name, layer in model.layers.items() if layer.lora_mode == "merged"]:
        raise RuntimeError(f"The adapters of {listed(folded)} are merged into their weights now; leave merged() first.")
    grown = grown_buffers(model, state)
    if problems := mismatches(model.trained | grown, state, known):
        raise ValueError(mismatch_message(type(model.module).__name__, problems))
    check_sound({name: state[name] for name in model.trained}, "was changed")
    replace_buffers(model.module, grown)
    with torch.no_grad():
        for name, tensor in model.trained.items():
            if name not in grown:
                copy_whole(tensor, state[name])
    model.have_values()


def check_holds_values(model: AdaptedModel) -> None:
    """Refuse to load an adapter into tensors on the meta device, where a copy leaves nothing behind.

    Raises:
        ValueError: It names them.
    """
    if on_meta := [name for name, tensor in model.trained.items() if local(tensor).is_meta]:
        raise ValueError(
            f"{listed(on_meta)} of this {type(model.module).__name__} {'is' if len(on_meta) == 1 else 'are'} on the "
            "meta device, which holds no values, so those of the adapter would be lost. Nothing was changed. First "
            "give the module the base's values: with to_empty(device=...) and load_state_dict(...), or, as long as it "
            "has no adapters, with load_state_dict(..., assign=True); with a Trainer, in configure_model. Then load "
            "the adapter."
        )


def check_sound(state: Mapping[str, Tensor], done: str) -> None:
    """Reject the state of an adapter that holds NaN, or infinity in its factors.

    What trains in full may hold infinity, as masks do.

    Args:
        state: Its tensors, under the names of a checkpoint or of PEFT.
        done: What has not been done: "was changed" or "was written".

    Raises:
        ValueError: It names the tensors.
    """
    factors = {name for name in state if ".lora." in name or "lora_" in name}
    if broken := [name for name, tensor in state.items() if not is_sound(tensor, finite=name in factors)]:
        raise ValueError(
            f"The adapter holds NaN or infinity in {listed(broken)}; nothing {done}. Its training has diverged, or the "
            "file is damaged: use an earlier checkpoint, or train anew with a lower learning rate."
        )


def is_sound(tensor: Tensor, *, finite: bool) -> Tensor:
    """Return whether no number is NaN, or infinite where it must not be, on the tensor's device."""
    if not (tensor.is_floating_point() or tensor.is_complex()):  # codes of quantized numbers always are
        return torch.ones((), dtype=torch.bool, device=tensor.device)
    return tensor.isfinite().all() if finite else ~tensor.isnan().any()


def with_masks(model: AdaptedModel, state: Mapping[str, Tensor]) -> AdaptedModel:
    """Give adapters masks, which change nothing yet, where a state has some; return the model with them."""
    places = {id(tensor): name.removesuffix("A") for name, tensor in model.trained.items()}
    masked = [
        adapter
        for adapter in model.adapters.values()
        if isinstance(adapter, LowRankAdapter)
        and f"{places.get(id(adapter.A), '')}mask" in state
        and "mask" not in adapter._buffers
    ]
    for adapter in masked:
        adapter.keep(adapter.spec.rank)
    return AdaptedModel(model.module) if masked else model


def wide(tensor: Tensor) -> Tensor:
    """Return values in float64, or complex128, in which sums and differences of what was trained are exact enough."""
    return tensor.to(torch.complex128 if tensor.is_complex() else torch.float64)


def mismatches(tensors: Mapping[str, Tensor], state: Mapping[str, Tensor], known: Collection[str] = ()) -> list[str]:
    """Return the problems that keep a state from being loaded: missing, unknown and wrongly shaped entries.

    Args:
        tensors: The tensors to fill.
        state: The values.
        known: Other names that the state may hold.
    """
    if not tensors:
        return ["the module has no adapters; call attach with the adapter's config first"]
    missing = [name for name in tensors if name not in state]
    unknown = [name for name in state if name not in tensors and name not in known]
    problems = []
    if missing:
        problems.append(f"missing from the state: {listed(missing)}")
    if unknown:
        near = near_names(unknown[0], tensors)
        problems.append(f"unknown to the model: {listed(unknown)}" + (f" (closest: {near[0]!r})" if near else ""))
    return problems + other_shapes(tensors, state)


def other_shapes(own: Mapping[str, Tensor], state: Mapping[str, Any]) -> list[str]:
    """Return the problems of entries whose shapes differ from those of the tensors with their names."""
    found = [
        f"{name}: file {tuple(value.shape)}, model {tuple(own[name].shape)}"
        for name, value in state.items()
        if name in own and own[name].shape != value.shape
    ]
    return [f"shape mismatch: {listed(found)}"] if found else []


def mismatch_message(what: str, problems: Iterable[str]) -> str:
    """Return the one error for a state that does not fit."""
    lines = "\n".join(f"  - {problem}" for problem in problems)
    return (
        f"The adapter state does not fit this {what}; nothing was changed:\n{lines}\nAttach with the adapter's config; "
        "to resume or evaluate in a Trainer, LoRACallback() without options takes it from the file, unless the module "
        "has another adapter: call detach(module) first, or give each a name."
    )


def check_not_merged(
    module: nn.Module, merged_before: Mapping[str, int], is_its_base: Callable[[], bool] = lambda: False
) -> None:
    """Refuse to load an adapter over one that is already in the weights.

    Args:
        module: The module to load into.
        merged_before: The merges that the adapter was trained on top of.
        is_its_base: Says whether a module without merges holds the merged weights nevertheless, such as from a file.

    Raises:
        RuntimeError: The module has other merges.
    """
    found = AdaptedModel(module).merges
    if found == dict(merged_before) or (not found and is_its_base()):
        return
    if found:
        raise RuntimeError(
            f"An adapter is already merged into {listed(list(found))} of this {type(module).__name__}; loading one now "
            "would apply it on top. Load it into a fresh base model."
        )
    raise RuntimeError(
        f"This adapter was trained on a base with another adapter merged into {listed(list(merged_before))}, and this "
        f"{type(module).__name__} has none. Load the merged weights as the base first, or train without merging."
    )


def base_samples(model: AdaptedModel, part: nn.Module | None = None) -> dict[str, Sample]:
    """Return the fingerprint of the base, with the last rows of embeddings, unless an adapter trains these.

    Args:
        model: The model; where its tensors are sharded over processes, every one must call this.
        part: The part of it to look at, to which names are then relative; all of it if left out.
    """
    tensors = model.base if part is None else base_parameters(part, model.trained)
    return fingerprint(tensors) | samples(tensors, end_names(model.module if part is None else part))


def end_names(module: nn.Module) -> list[str]:
    """Return the names that the last rows of embeddings have in a fingerprint, of those that no adapter trains."""
    found = []
    for path, embedding in walk(module):
        if isinstance(embedding, nn.Embedding):
            adapters = embedding.adapters().values() if isinstance(embedding, LoRALayer) else ()
            rows = {int(row) for each in adapters if isinstance(each, TokenAdapter) for row in each.index}
            found += [join(path, f"weight{END}")] if embedding.num_embeddings - 1 not in rows else []
    return found


def has_base_values(module: nn.Module, recorded: Fingerprint) -> bool:
    """Return whether a module holds the values of a fingerprint, which must not be empty.

    Where the tensors are sharded over processes, every one must call this.
    """
    found = samples(AdaptedModel(module).base, recorded)
    return bool(found) and not differing_tensors(recorded, found)


def check_base_values(model: AdaptedModel, recorded: Fingerprint, part: nn.Module | None = None) -> None:
    """Reject an adapter that was trained on a different base.

    Args:
        model: The model to load into; where its tensors are sharded over processes, every one must call this.
        recorded: The fingerprint in the adapter's file.
        part: The part of the model to which the names in the fingerprint are relative; all of it if left out.

    Raises:
        ValueError: The base has different values.
    """
    if recorded:
        base = model.base if part is None else base_parameters(part, model.trained)
        if problems := base_problems(recorded, samples(base, recorded), type(part or model.module).__name__):
            raise ValueError(f"{problems[0]} Nothing was changed.")
        warn_of_other_buffers(model, recorded, part)


def warn_of_other_buffers(model: AdaptedModel, recorded: Fingerprint, part: nn.Module | None = None) -> None:
    """Warn if buffers of the base, which no adapter's file holds, are not those that an adapter was trained with."""
    if differing := differing_tensors(recorded, samples(own_values(model, part), recorded)):
        moves = " Running statistics move in every forward pass in training mode: call eval() to try the base."
        warnings.warn(
            f"The adapter was trained with other values in the buffers {listed(differing)} of this "
            f"{type(model.module).__name__}, so it may compute something else. Buffers that are set before fit belong "
            "to the base and are in no adapter's file: set them before loading, too, or set them in setup, whose "
            f"changes are saved.{moves if any('running_' in name for name in differing) else ''}",
            stacklevel=2,
        )


def describe(module: nn.Module) -> dict[str, Any]:
    """Return the plain record that is saved with an adapter: everything needed to understand and load it."""
    model = AdaptedModel(module)
    # None of them can be the model that an export of the file is about.
    containers = [name for name, part in module.named_children() if isinstance(part, CONTAINERS)]
    optional = {"containers": containers, "aliases": _aliases(model)}
    return {
        "format_version": FORMAT_VERSION,
        "adapters": [
            {"root": name, "config": attachment.config.to_dict(), "seed": attachment.seed}
            | ({"calibration": attachment.calibration} if attachment.calibration else {})
            | ({"rank_history": attachment.rank_history} if attachment.rank_history else {})
            | ({"asked": attachment.asked.to_dict()} if attachment.asked is not None else {})
            for name, _, attachment in model.roots
        ],
        "layers": _described_layers(model),
        "merges": model.merges,
    } | {key: value for key, value in optional.items() if value}


def _aliases(model: AdaptedModel) -> dict[str, list[str]]:
    """Return the other names of the modules that train something and that the model reaches by several names."""
    paths = model.layers.keys() | {name.rpartition(".")[0] for name in model.in_full}
    every = ((name, names[1:]) for name, (_, names) in module_names(model.module).items() if len(names) > 1)
    return {name: list(others) for name, others in every if name in paths}


def _described_layers(model: AdaptedModel) -> dict[str, dict[str, Any]]:
    owners = {
        id(adapter): (path, layer)
        for path, layer in reversed(model.layers.items())
        for adapter in layer.adapters().values()
    }
    found = {}
    for name, adapter in model.adapters.items():
        path, layer = owners[id(adapter)]
        numbers = {"rank": adapter.spec.rank, "scaling": adapter.spec.scaling}
        place = {"weight": join(path, adapter.parameter)} | adapter.record(layer)
        rows = [[part.start, part.stop, part.step] for part in adapter.spec.rows]
        found[name] = numbers | place | ({"rows": rows} if rows else {})
    return found


def tensors_of_others(module: nn.Module) -> dict[str, Tensor]:
    """Return everything that adapters that are not active have trained, under names that no other tensor has."""
    found = of_others(module, lambda part: AdaptedModel(part).trained)
    return {other_name(name, key): tensor for name, own in found.items() for key, tensor in own.items()}


def other_name(adapter: str, name: str) -> str:
    """Return the name of a tensor of an adapter that is not active, from the one that it has under that adapter."""
    return f"{OTHERS}.{adapter}.{name}"


def record_problems(module: nn.Module, record: Mapping[str, Any]) -> list[str]:
    """Return how a saved adapter's record contradicts the adapters of a module."""
    if record.get("format_version", 0) > FORMAT_VERSION:
        return [f"format version {record['format_version']}; this lightning_lora reads up to {FORMAT_VERSION}"]
    mine, theirs = _described_layers(AdaptedModel(module)), record.get("layers", {})
    problems = []
    if other := sorted(mine.keys() ^ theirs.keys()):
        problems.append(
            f"target_modules: {len(theirs)} layers adapted in the checkpoint, {len(mine)} here; "
            f"only on one side: {listed(other)}{_how_to_place(mine, theirs)}"
        )
    for key in ("rank", "scaling"):
        differing = [
            f"{name}: checkpoint {theirs[name][key]:g}, here {layer[key]:g}"
            for name, layer in mine.items()
            if name in theirs and theirs[name][key] != layer[key]
        ]
        if differing:
            problems.append(f"{'alpha or use_rslora (scaling)' if key == 'scaling' else key}: {listed(differing)}")
    moved = [name for name, layer in mine.items() if name in theirs and theirs[name].get("rows") != layer.get("rows")]
    if moved:
        problems.append(f"target_slices or trainable_token_indices: different rows for {listed(moved)}")
    return problems


def trains_otherwise(model: AdaptedModel, record: Mapping[str, Any]) -> bool:
    """Return whether a record's options ask for something else in full; or its file holds more than was trained."""
    mine = {root.name: root.attachment.config.to_dict() for root in model.roots}
    pairs = [(mine[entry["root"]], entry["config"]) for entry in record.get("adapters", ()) if entry["root"] in mine]
    keys = ("modules_to_save", "bias", "frozen_norm")
    return any(own[key] != theirs.get(key, own[key]) for own, theirs in pairs for key in keys)


def _how_to_place(mine: Collection[str], theirs: Collection[str]) -> str:
    """Say where a checkpoint belongs if it is of a module that holds this one, or of a part of this one."""
    if (place := _place_of(mine, theirs)) is not None:
        return (
            f". The checkpoint's module holds this one as {place!r}: `lightning-lora export` writes a directory that "
            "loads into either"
        )
    if (place := _place_of(theirs, mine)) is not None:
        return f". The checkpoint belongs to the part {place!r} of this module: load it there"
    if {*mine} > {*theirs}:  # the options take layers that the base has got since
        return (
            ". To leave these out, resume with the options of the file and exclude_modules; LoRACallback(init_from=...)"
            " starts from the others, and what `lightning-lora export` writes loads by names"
        )
    return ""


def _place_of(inner: Collection[str], outer: Collection[str]) -> str | None:
    first = min(inner, default="")
    places = [name.removesuffix(f".{first}") for name in outer if name.endswith(f".{first}")]
    return next((place for place in places if {f"{place}.{name}" for name in inner} == {*outer}), None)


def load_without_base(module: nn.Module) -> ExitStack:
    """Let adapter-only state dicts load into a module, and into copies of it made meanwhile, until the stack closes."""
    hooks, register = ExitStack(), cast(Any, module)
    hooks.callback(register.register_load_state_dict_pre_hook(_take_clean_names).remove)
    hooks.callback(register.register_load_state_dict_post_hook(_allow_missing_base).remove)
    return hooks


def _take_clean_names(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """Rename what a file holds under clean names to the names that a module has, such as those of compiled parts."""
    for name in module.state_dict():
        own, clean = prefix + name, prefix + clean_name(name)
        if own != clean and own not in state and clean in state:
            state[own] = state.pop(clean)


def _allow_missing_base(module: nn.Module, incompatible: Any) -> None:
    """Let an adapter-only state dict load into a module or a copy of it: base keys may be absent, nothing else.

    Averaging callbacks keep such copies, with ``module.`` before every name, and load them by themselves.
    """
    required = AdaptedModel(module).trained.keys()
    base = {clean_name(name) for name in module.state_dict()} - required
    missing = incompatible.missing_keys
    missing[:] = [name for name in missing if not {clean_name(name), clean_name(name).removeprefix("module.")} & base]


# --- what ``get_extra_state`` of parts of the module returns


def is_extra_state(name: str) -> bool:
    """Return whether an entry of a state is what ``get_extra_state`` of a module has returned."""
    return name.rpartition(".")[2] == EXTRA_STATE


def extra_states(model: AdaptedModel) -> tuple[dict[str, Any], list[str]]:
    """Return the extra states of a module's parts, such as counters, and the names of those that are left out.

    An adapter's file has no place for states that hold tensors of the frozen base itself.
    """
    parts = {join(path, EXTRA_STATE): part for path, part in model.parts if _overrides(part, "get_extra_state")}
    states = {name: part.get_extra_state() for name, part in parts.items()}
    frozen = (
        {address(tensor) for name, tensor in model.tensors.items() if name not in model.trained} if states else set()
    )
    left_out = [name for name, state in states.items() if any(address(t) in frozen for t in _tensors_in(state))]
    return {name: state for name, state in states.items() if name not in left_out}, left_out


def extra_state_names(module: nn.Module) -> set[str]:
    """Return the names of extra states, each of those by which a part is reached, as in a whole checkpoint."""
    parts = walk(unwrapped(module), every_name=True)
    return {join(path, EXTRA_STATE) for path, part in parts if _overrides(part, "get_extra_state")}


def load_extra_states(module: nn.Module, states: Mapping[str, Any]) -> None:
    """Give the parts of a module their extra states; one that ``states`` lacks stays as it is."""
    done = set[nn.Module]()
    for path, part in walk(unwrapped(module), every_name=True):
        name = join(path, EXTRA_STATE)
        if name in states and part not in done and _overrides(part, "set_extra_state"):
            done.add(part)
            part.set_extra_state(states[name])


def _overrides(part: nn.Module, method: str) -> bool:
    return getattr(type(part), method) is not getattr(nn.Module, method)


def _tensors_in(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        yield from _tensors_in(list(value.values()))
    elif isinstance(value, (list, tuple, set)):
        for each in value:
            yield from _tensors_in(each)


def address(tensor: Tensor) -> int:
    """Return where a tensor's values are, the same for each view of it that begins there."""
    is_plain = type(tensor) in (Tensor, nn.Parameter) and tensor.layout is torch.strided and not tensor.is_meta
    return (tensor.data_ptr() if is_plain else 0) or id(tensor)
