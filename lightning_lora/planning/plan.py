"""The plan of an attach: all changes as a value, before the first one is made."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from lightning_lora.config import FAMILIES, LoRAConfig
from lightning_lora.layers import Adapter, AdapterSpec


@dataclass(slots=True)  # made by the thousand: half the time of a NamedTuple
class PlannedLayer:
    """An adapter that the config asks for; the planner resolves the rest, or finds an obstacle.

    Attributes:
        names: All names of the layer; the first one counts.
        module: The layer.
        pattern: The entry of the config that chose it.
        adapter: The kind of adapter.
        parameter: The parameter that it updates.
        part: The name of a slice of that parameter; empty for all of it.
        rows: The rows of that slice.
        followers: Layers that share the adapter with the weight -> whether they read the update from the weight.
        spec: Everything that decides the adapter.
        key: Its name in the layer's group of adapters; empty where the layer has one.
        label: The adapter's name: the layer's, with the key where there is one.
        in_weight: Whether the update is read from the weight instead of being added to the output.
        size: Number of the adapter's parameters.
    """

    names: tuple[str, ...]
    module: nn.Module
    pattern: str
    adapter: type[Adapter]
    parameter: str
    part: str = ""
    rows: tuple[range, ...] = ()
    followers: dict[nn.Module, bool] = field(default_factory=dict)
    spec: AdapterSpec = field(init=False)
    key: str = field(init=False)
    label: str = field(init=False)
    in_weight: bool = field(init=False)
    size: int = field(init=False)


@dataclass
class Plan:
    """Everything that attaching will do.

    Attributes:
        root: The name of the model's class.
        config: The request.
        modules: Every module of the base, by its first name.
        names: First name of a module -> all its names.
        parameters: Every parameter of the base, by the name of its module; one in two modules has two names.
        tied: Parameters that share memory with others -> the others.
        base_parameters: Number of parameters without adapters.
        layers: The layers to adapt.
        saved: The modules to train in full.
        biases: Biases of the base that train -> their sizes; a shared one has its size under its first name.
        untied: Weights that get a copy of their own -> what they are tied to.
        left_out: Layers that the targets cover but that get no adapter -> the reason.
        wasteful: Adapters that are at least as large as the weights they adapt.
        normalizing: Modules that may have running statistics.
        norms: Number of frozen modules that have running statistics.
    """

    root: str
    config: LoRAConfig
    modules: dict[str, nn.Module] = field(default_factory=dict)
    names: dict[str, tuple[str, ...]] = field(default_factory=dict)
    parameters: dict[str, nn.Parameter] = field(default_factory=dict)
    tied: dict[str, tuple[str, ...]] = field(default_factory=dict)
    base_parameters: int = 0
    layers: list[PlannedLayer] = field(default_factory=list)
    saved: dict[str, nn.Module] = field(default_factory=dict)
    biases: dict[str, int] = field(default_factory=dict)
    untied: dict[str, str] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)
    wasteful: list[str] = field(default_factory=list)
    normalizing: dict[str, nn.Module] = field(default_factory=dict)
    norms: int = 0

    def thawed(self) -> list[str]:
        """Return the outermost modules that were frozen although their layers get adapters without being named.

        None if the whole model was frozen. Quantized parameters do not count: they never require a gradient.
        """
        still = {name: parameter for name, parameter in self.parameters.items() if not parameter.requires_grad}
        frozen = {name for name, p in still.items() if type(p) is nn.Parameter and p.is_floating_point()}
        if not frozen or len(still) == len(self.parameters):
            return []
        moving = {prefix for name in self.parameters.keys() - frozen for prefix in _prefixes(name)}
        reached = [layer.names[0] for layer in self.layers if layer.pattern in FAMILIES]
        outermost = (next((prefix for prefix in _prefixes(name) if prefix not in moving), None) for name in reached)
        return list(dict.fromkeys(name for name in outermost if name is not None))


def originals(names: Collection[str], modules: Mapping[str, nn.Module]) -> dict[str, str]:
    """Return which of the other modules some are copies of so far, adapters aside, as a teacher is of its student."""
    marks, found = defaultdict[Any, list[str]](list), dict[str, str]()
    for other in modules.keys() - names:
        marks[_mark(modules[other])].append(other)
    for name in names:
        alike = (other for other in marks.get(_mark(modules[name]), ()) if _is_copy(modules[name], modules[other]))
        if (original := min(alike, default=None)) is not None:
            found[name] = original
    return found


def _base(module: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters of a module that are no adapter's."""
    return {key: parameter for key, parameter in module.named_parameters() if "lora" not in key.split(".")}


def _mark(module: nn.Module) -> Any:
    """Return what copies have in common and other modules rarely, so that few need to be compared as a whole."""
    base = _base(module)
    some = next(
        (p.detach().flatten()[:2].tolist() for p in base.values() if type(p) is nn.Parameter and not p.is_meta), []
    )
    return type(module), *((key, parameter.shape, parameter.dtype) for key, parameter in base.items()), *some


def _is_copy(one: nn.Module, other: nn.Module) -> bool:
    """Return whether two modules with the same mark hold equal values, each its own."""
    pairs = [*zip(_base(one).values(), _base(other).values(), strict=True)]
    is_apart = all(a is not b and type(a) is type(b) is nn.Parameter and a.numel() for a, b in pairs)
    return is_apart and bool(pairs) and all(not a.is_meta and torch.equal(a, b.to(a.device)) for a, b in pairs)


def sizes_once(groups: Mapping[str, Iterable[nn.Parameter]]) -> dict[str, int]:
    """Return the number of elements under each name; a parameter that several names share counts for the first."""
    counted: set[nn.Parameter] = set()
    sizes = {}
    for name, parameters in groups.items():
        new = [each for each in parameters if each not in counted]
        sizes[name] = sum(each.numel() for each in new)
        counted |= set(new)
    return sizes


def _prefixes(name: str) -> Iterator[str]:
    """Yield the names of the modules around a module, from the outermost one, and its own name."""
    parts = name.split(".")
    return (".".join(parts[:count]) for count in range(1, len(parts) + 1))
