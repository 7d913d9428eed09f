"""What the hooks of modules and callbacks may do to the ``state_dict`` of an adapter's checkpoint.

Hooks are written for whole models: ``on_save_checkpoint`` drops a frozen backbone or renames it, and
``on_load_checkpoint`` renames it back. Below the backbone are adapters, and whoever else reads the file, such as
``load_adapter`` or an export, calls no hook. So an adapter keeps its names in every file, and hooks decide only about
values, and about what they add.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from torch import Tensor

from lightning_lora.names import clean_name


def names_restored(
    before: Mapping[str, Any], after: Mapping[str, Any], *, trained: Collection[str], needed: Collection[str]
) -> dict[str, Any]:
    """Return what a hook made of a state, but without its renaming, and with what it must not remove.

    An entry was renamed if its very value is under another name now.

    Args:
        before: What the hook was given.
        after: What it left.
        trained: Names of the tensors that train; a hook may put the value of another entry under one that was absent.
        needed: Names of the entries that must stay.
    """
    left = {clean_name(name): value for name, value in after.items()}
    places: dict[int, set[str]] = {}
    for name, value in before.items():
        if isinstance(value, Tensor):  # small numbers are one object wherever they are
            places.setdefault(id(value), set()).add(name)
    kept = {
        name: value
        for name, value in left.items()
        if name in places.get(id(value), {name}) or (name in trained and name not in before)
    }
    added = {id(value) for name, value in left.items() if name not in before}
    lost = {name for name in before.keys() - kept.keys() if name in needed or id(before[name]) in added}
    return {name: kept.get(name, before[name]) for name in before if name in kept or name in lost} | kept


def restored_names(before: Mapping[str, Any], after: Mapping[str, Any], result: Mapping[str, Any]) -> list[str]:
    """Return the names under which ``names_restored`` put back what a hook had removed, renamed or exchanged."""
    left = {clean_name(name): value for name, value in after.items()}
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
