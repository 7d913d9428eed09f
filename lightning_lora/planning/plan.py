"""What attaching will do, as a value."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import nn

from lightning_lora.layers import Adapter, AdapterSpec


@dataclass(slots=True)  # made by the thousand: half the time of a NamedTuple
class PlannedLayer:
    """One adapter to be: its layer, the entry of the config that chose it, the parameter it updates.

    Attributes:
        name: The layer's name.
        module: The layer.
        pattern: The entry that chose it.
        adapter: The kind of adapter.
        spec: All that decides the adapter.
        parameter: The parameter that it updates.
        key: Its name in the layer's group of adapters; empty where the layer has one.
        in_weight: Whether the update must be read from the weight, not added to the output.
        label: The adapter's name: the layer's, with the key where there is one.
        size: Number of the adapter's parameters.
        followers: Layers that share the adapter, because they share the weight.
    """

    name: str
    module: nn.Module
    pattern: str
    adapter: type[Adapter]
    spec: AdapterSpec
    parameter: str
    key: str
    in_weight: bool
    label: str
    size: int
    followers: tuple[nn.Module, ...] = ()


@dataclass
class Plan:
    """All that attaching will do.

    Attributes:
        layers: The layers to adapt.
        saved: The modules trained in full.
        biases: Names of the base's biases that train.
        untied: Weights that get a copy of their own -> what they are tied to.
        left_out: Layers that the targets cover but that get no adapter, and why.
        wasteful: Adapters that are as large as the weights they adapt.
        modules: Every module of the base, by its first name.
        parameters: Every parameter of the base, by the name of its module; one in two modules has two names.
        base_parameters: Parameters of the model without adapters.
        norms: Frozen normalisation layers that have running statistics.
    """

    layers: list[PlannedLayer] = field(default_factory=list)
    saved: dict[str, nn.Module] = field(default_factory=dict)
    biases: list[str] = field(default_factory=list)
    untied: dict[str, str] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)
    wasteful: list[str] = field(default_factory=list)
    modules: dict[str, nn.Module] = field(default_factory=dict)
    parameters: dict[str, nn.Parameter] = field(default_factory=dict)
    base_parameters: int = 0
    norms: int = 0
