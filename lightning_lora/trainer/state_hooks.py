"""What the hooks of modules and callbacks may do to the ``state_dict`` of an adapter's checkpoint.

Hooks are written for whole models: ``on_save_checkpoint`` drops a frozen backbone or renames it, and
``on_load_checkpoint`` renames it back. Below the backbone are adapters, and whoever else reads the file, such as
``load_adapter`` or an export, calls no hook. So an adapter keeps its names in every file, and hooks decide only about
values, and about what they add under other names: it is in the file, and ``on_load_checkpoint`` takes it back. Readers
that call no hook leave it out, so the record names it.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from torch import Tensor

from lightning_lora.adapted_model import AdaptedModel, names_in_state
from lightning_lora.names import clean_name
from lightning_lora.state import address, extra_state_names
from lightning_lora.storage.checkpoint import RECORD_KEY
from lightning_lora.trainer.metrics import metric_states

TRAINING_KEY = "current_model_state"  # of WeightAveraging: what trains, where ``state_dict`` has the average


def with_clean_names(state: Mapping[str, Any]) -> dict[str, Any]:
    """Return a state under the names that wrappers do not change."""
    return {clean_name(name): value for name, value in state.items()}


def only_trained(model: AdaptedModel, state: Mapping[str, Any]) -> dict[str, Any]:
    """Return the entries of a state that an adapter's checkpoint holds, under the names that wrappers do not change."""
    keep = {*model.trained, *metric_states(model), *extra_state_names(model.module)}
    return {name: value for name, value in with_clean_names(state).items() if name in keep}


def added(model: AdaptedModel, state: Mapping[str, Any], base: Collection[str]) -> tuple[dict[str, Any], list[str]]:
    """Return what hooks have added to a state, and the names of what stays out: tensors of the frozen base itself.

    Callbacks such as WeightAveraging put whole models in, whose names are the model's own and nothing that was added.

    Args:
        model: The adapters.
        state: What the hooks have left.
        base: Names of the base's tensors, also of those that a process does not see.
    """
    kept = only_trained(model, state)
    others = {name: value for name, value in state.items() if clean_name(name) not in kept and name not in base}
    own = names_in_state(model.module) if others else set[str]()
    others = {name: value for name, value in others.items() if clean_name(name) not in own}
    frozen = {address(tensor) for name, tensor in model.tensors.items() if name not in model.trained} if others else ()
    left_out = [name for name, value in others.items() if isinstance(value, Tensor) and address(value) in frozen]
    return {name: value for name, value in others.items() if name not in left_out}, left_out


def as_hooks_left(moved: Mapping[str, Tensor], checkpoint: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return the buffers that training has changed with the values that hooks have put in the state, such as averages.

    Args:
        moved: Their names and values in the module.
        checkpoint: What the hooks have left.
    """
    state = with_clean_names(checkpoint.get("state_dict", {}))
    return {name: state.get(name, value) for name, value in moved.items()}


def complete_average(checkpoint: Mapping[str, Any]) -> None:
    """Give WeightAveraging, which reads the state next, the averages of the buffers that it has saved."""
    theirs = checkpoint.get(TRAINING_KEY, {})
    buffers = checkpoint.get(RECORD_KEY, {}).get("buffers", {})
    checkpoint["state_dict"].update({name: value for name, value in buffers.items() if name in theirs})


def names_restored(
    before: Mapping[str, Any],
    after: Mapping[str, Any],
    *,
    trained: Collection[str],
    needed: Collection[str],
    with_copies: bool = False,
) -> dict[str, Any]:
    """Return what a hook made of a state, but without its renaming, and with what it must not remove.

    An entry was renamed if its very value is under another name now.

    Args:
        before: What the hook was given.
        after: What it left.
        trained: Names of the tensors that train; a hook may put the value of another entry under one that was absent.
        needed: Names of the entries that must stay.
        with_copies: Whether a hook may put a value under a further name, beside its own.
    """
    left = with_clean_names(after)
    places: dict[int, set[str]] = {}
    for name, value in before.items():
        if isinstance(value, Tensor):  # small numbers are one object wherever they are
            places.setdefault(id(value), set()).add(name)

    def is_its_name(name: str, value: Any) -> bool:
        own = places.get(id(value), {name})
        is_copy = with_copies and name not in before and all(left.get(each) is value for each in own)
        return name in own or is_copy or (name in trained and name not in before)

    kept = {name: value for name, value in left.items() if is_its_name(name, value)}
    new = {id(value) for name, value in left.items() if name not in before}
    lost = {name for name in before.keys() - kept.keys() if name in needed or id(before[name]) in new}
    return {name: kept.get(name, before[name]) for name in before if name in kept or name in lost} | kept


def restored_names(before: Mapping[str, Any], after: Mapping[str, Any], result: Mapping[str, Any]) -> list[str]:
    """Return the names under which ``names_restored`` put back what a hook had removed, renamed or exchanged."""
    left = with_clean_names(after)
    return [name for name in before if name in result and (name not in left or left[name] is not result[name])]


def without_own(state: Mapping[str, Any], file: Mapping[str, Any], own: Mapping[str, Tensor]) -> dict[str, Any]:
    """Return a state with the file's values where a hook has filled in those that the module has anyway.

    This is how a hook completes a file from which another one has dropped the frozen backbone.

    Args:
        state: What the hook left.
        file: What was in the file.
        own: The module's tensors for which the file decides.
    """

    def is_own(name: str, value: Any) -> bool:
        tensor = own.get(name)
        is_other = tensor is not None and name in file and value is not file[name] and isinstance(value, Tensor)
        return is_other and tensor is not None and value.data_ptr() == tensor.data_ptr() != 0

    return {name: file[name] if is_own(name, value) else value for name, value in state.items()}
