"""Why an entry of a config reached nothing: each miss in one sentence, with near names."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence

from torch import nn

from lightning_lora.config import ALL_LINEAR, LoRAConfig
from lightning_lora.layers import SUPPORTED, adapter_type
from lightning_lora.names import (
    is_below,
    is_glob,
    join,
    listed,
    matches_pattern,
    near_names,
    selected,
    sweeps,
    unmatched,
)

Modules = Mapping[str, tuple[nn.Module, tuple[str, ...]]]  # first name -> module, all its names


def missed_entries(
    config: LoRAConfig,
    root: str,
    modules: Modules,
    *,
    reached: Sequence[str],
    covered: Collection[str],
    saved: Collection[str],
) -> Iterator[str]:
    """Yield what is to be said of every entry that did nothing.

    Args:
        config: The request.
        root: What to call the model.
        modules: Its modules.
        reached: Names of the adapters that will be.
        covered: All names of the layers that the targets cover, adapted or left out.
        saved: Names of the modules to be trained in full.
    """
    everything = [names for _, names in modules.values()]
    yield from _missed_targets(config, root, modules, everything, covered)
    requests = {
        "exclude_modules": config.exclude_modules,
        "modules_to_save": config.modules_to_save,
        "target_slices": tuple(config.target_slices),
    }
    for option, entries in requests.items():
        for entry in unmatched(entries, everything):
            yield _miss(config, root, option, entry, everything)
    if config.target_parameters:
        parameters = [[join(n, key) for n in names] for part, names in modules.values() for key in part._parameters]
        for entry in unmatched(config.target_parameters, parameters):
            yield _miss(config, root, "target_parameters", entry, parameters)
    yield from _empty_saves(config, modules, saved)
    for option in ("rank_pattern", "alpha_pattern"):
        for key in getattr(config, option):
            if not any(matches_pattern(key, name) for name in covered):
                yield _miss(config, root, option, key, [(name,) for name in reached])


def _empty_saves(config: LoRAConfig, modules: Modules, saved: Collection[str]) -> Iterator[str]:
    """A glob may sweep over what has no parameters, but it must reach something that has."""
    for entry in filter(is_glob, config.modules_to_save):
        found = [name for name, (_, names) in modules.items() if selected((entry,), names)]
        if found and not any(is_below(name, saved) for name in found):
            yield f"modules_to_save={entry!r} matched no module with parameters: {listed(found)}."


def _missed_targets(
    config: LoRAConfig, root: str, modules: Modules, everything: list[tuple[str, ...]], covered: Collection[str]
) -> Iterator[str]:
    if config.target_modules == ALL_LINEAR:
        if not (covered or config.target_parameters or config.trainable_token_indices):
            yield f"target_modules={ALL_LINEAR!r}: {root} has no linear layer."
        return
    adaptable = [names for submodule, names in modules.values() if adapter_type(submodule)]
    unknown = unmatched(config.target_modules, everything)
    for entry in unmatched(config.target_modules, adaptable):
        if entry in unknown:
            yield _miss(config, root, "target_modules", entry, everything, [names[0] for names in adaptable])
        elif sweeps(config.target_modules, entry):
            yield f"target_modules={entry!r} matched no layer of a kind that has an adapter: {SUPPORTED}."


def _miss(
    config: LoRAConfig,
    root: str,
    option: str,
    entry: str,
    pool: Sequence[Sequence[str]],
    layers: Sequence[str] = (),
) -> str:
    near = near_names(entry, (name for names in pool for name in names))
    hint = f" Closest names: {', '.join(map(repr, near))}." if near else ""
    if layers and not near:
        hint = f" Its layers are {listed(layers)}."
    if option == "target_modules" and config.target_modules == entry:
        hint += " A string is one regular expression over full names; put a name into a list."
    what = {"rank_pattern": "adapted layer", "alpha_pattern": "adapted layer", "target_parameters": "parameter"}
    return f"{option}={entry!r} matched no {what.get(option, 'module')} of {root}.{hint}"
