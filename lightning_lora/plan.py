"""From a config and a model to the exact list of changes; everything that can go wrong goes wrong here."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lightning_lora.config import ALL_LINEAR, LoRAConfig
from lightning_lora.initializers import layer_seed
from lightning_lora.layers import (
    SUPPORTED,
    Adapter,
    AdapterSpec,
    LoRALayer,
    ParameterAdapter,
    adapter_type,
    base_parameter,
    has_running_statistics,
    parameter_adapter,
)
from lightning_lora.misses import Modules, missed_entries
from lightning_lora.obstacles import Obstacles
from lightning_lora.targets import (
    first_match,
    is_below,
    is_glob,
    join,
    listed,
    selected,
    sweeps,
)


class PlannedLayer(NamedTuple):
    """One adapter to be: its layer, the entry of the config that chose it, the parameter it updates.

    Attributes:
        name: The layer's name.
        module: The layer.
        pattern: The entry that chose it.
        adapter: The kind of adapter.
        spec: All that decides the adapter.
        parameter: The parameter that it updates.
        in_weight: Whether the update must be read from the weight, not added to the output.
        label: The adapter's name: the layer's, with the parameter's where a layer has several.
        size: Number of the adapter's parameters.
    """

    name: str
    module: nn.Module
    pattern: str
    adapter: type[Adapter]
    spec: AdapterSpec
    parameter: str
    in_weight: bool
    label: str
    size: int


@dataclass
class Plan:
    """All that attaching will do.

    Attributes:
        layers: The layers to adapt.
        saved: The modules trained in full.
        left_out: Layers that the targets cover but that get no adapter, and why.
        wasteful: Adapters that are as large as the weights they adapt.
        modules: Every module of the base, by its first name.
        base_parameters: Parameters of the model without adapters.
        norms: Frozen normalisation layers that have running statistics.
    """

    layers: list[PlannedLayer] = field(default_factory=list)
    saved: dict[str, nn.Module] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)
    wasteful: list[str] = field(default_factory=list)
    modules: dict[str, nn.Module] = field(default_factory=dict)
    base_parameters: int = 0
    norms: int = 0


def make_plan(module: nn.Module, modules: Modules, config: LoRAConfig, seed: int) -> Plan:
    """Resolve a config against a model without changing it.

    Args:
        module: The model.
        modules: What ``module_names`` says of it.
        config: The request.
        seed: The seed of the starts.

    Raises:
        ValueError: Entries match nothing or name layers that cannot be adapted; one error lists them all.
    """
    return _Planner(module, modules, config, seed).plan()


class _Planner:
    def __init__(self, module: nn.Module, found: Modules, config: LoRAConfig, seed: int) -> None:
        self.module, self.config, self.seed = module, config, seed
        own = {id(part) for layer, _ in found.values() if isinstance(layer, LoRALayer) for part in layer.lora.modules()}
        self.modules = {name: entry for name, entry in found.items() if id(entry[0]) not in own} if own else found
        self.automatic = config.target_modules == ALL_LINEAR
        self.obstacles = Obstacles(module, config, [part for part, _ in self.modules.values()])
        self.problems: list[str] = []

    def plan(self) -> Plan:
        modules = {name: part for name, (part, _) in self.modules.items()}
        plan = Plan(modules=modules, base_parameters=self._count_parameters())
        for name, (submodule, names) in self.modules.items():
            entry = selected(self.config.modules_to_save, names)
            if entry is not None and not is_below(name, plan.saved):
                self._save(plan, name, submodule, entry)
        self._check_ties_of_saved(plan.saved)
        saved = set(plan.saved)
        excluded = {n for n, (_, names) in self.modules.items() if selected(self.config.exclude_modules, names)}
        for name, (submodule, names) in self.modules.items():
            adapter = adapter_type(submodule)
            pattern = self._choosing_pattern(adapter, submodule, names)
            if pattern is None:
                continue
            if any(is_below(alias, saved) for alias in names):
                plan.left_out[name] = "in modules_to_save"
            elif any(is_below(alias, excluded) for alias in names):
                plan.left_out[name] = "in exclude_modules"
            else:
                self._add(plan, names, submodule, pattern, adapter)
        self._add_target_parameters(plan)
        norms = [name for name, (part, _) in self.modules.items() if has_running_statistics(part)]
        plan.norms = sum(1 for name in norms if not is_below(name, saved))
        self._explain_misses(plan)
        if self.problems:
            raise ValueError(self._message())
        return plan

    def _count_parameters(self) -> int:
        unique = {p for part, _ in self.modules.values() for p in part._parameters.values()}  # a set goes by identity
        if any(isinstance(p, nn.UninitializedParameter) for p in unique):
            self._refuse_shapeless()
        return sum(p.numel() for p in unique if p is not None)

    def _refuse_shapeless(self) -> None:
        shapeless = [
            name
            for name, (part, _) in self.modules.items()
            if any(isinstance(p, nn.UninitializedParameter) for p in part._parameters.values())
        ]
        raise ValueError(
            f"The weights of {listed(shapeless)} have no shape yet; run one batch through the {self._root()} first."
        )

    def _choosing_pattern(
        self, adapter: type[Adapter] | None, submodule: nn.Module, names: tuple[str, ...]
    ) -> str | None:
        if self.automatic:
            return ALL_LINEAR if adapter is not None and adapter.in_all_linear(submodule) else None
        pattern = selected(self.config.target_modules, names)
        # Globs and regular expressions sweep over containers and activations; only a name insists on its module.
        insists = pattern is not None and not sweeps(self.config.target_modules, pattern)
        return pattern if adapter is not None or insists else None

    def _add(
        self,
        plan: Plan,
        names: tuple[str, ...],
        submodule: nn.Module,
        pattern: str,
        adapter: type[Adapter] | None,
    ) -> None:
        name = names[0]
        if adapter is None:
            self.problems.append(f"target_modules={pattern!r}: {self._unsupported(name, submodule)}")
            return
        for parameter in adapter.parameters_of(submodule):
            self._add_parameter(plan, names, submodule, pattern, adapter, parameter)
        if isinstance(submodule, nn.MultiheadAttention) and not self.automatic:
            projection = tuple(join(alias, "out_proj") for alias in names)
            left_alone = selected(self.config.exclude_modules, projection)
            if not (left_alone or selected(self.config.target_modules, projection)):
                self._add(plan, projection, submodule.out_proj, pattern, adapter_type(submodule.out_proj))

    def _add_target_parameters(self, plan: Plan) -> None:
        """Plan the parameters that are named by themselves."""
        if not self.config.target_parameters:
            return
        adapted = {layer.name for layer in plan.layers}
        for name, (submodule, names) in self.modules.items():
            for key, parameter in submodule._parameters.items():
                entry = selected(self.config.target_parameters, [join(alias, key) for alias in names])
                if entry is None or parameter is None or (parameter.ndim < 2 and is_glob(entry)):
                    continue
                option, full = f"target_parameters={entry!r}", join(name, key)
                if parameter.ndim < 2:
                    self.problems.append(f"{option}: {full!r} has {parameter.ndim} dimension; LoRA needs two or more.")
                elif not name:
                    self.problems.append(f"{option}: {full!r} belongs to the model itself; move it into a module.")
                elif name in adapted:
                    self.problems.append(f"{option}: target_modules adapts {name!r} already; exclude it there.")
                else:
                    self._add_parameter(plan, names, submodule, option, parameter_adapter(submodule, key), key)

    def _add_parameter(
        self,
        plan: Plan,
        names: tuple[str, ...],
        submodule: nn.Module,
        pattern: str,
        adapter: type[Adapter],
        parameter: str,
    ) -> None:
        name = names[0]
        label = join(name, parameter) if issubclass(adapter, ParameterAdapter) else name
        known_as = names if label == name else (*names, *(join(alias, parameter) for alias in names))
        shape = adapter.matrix_shape(submodule, parameter)
        rank = first_match(self.config.rank_pattern, known_as, self.config.rank)
        reason = self.obstacles.of(join(name, parameter), submodule, adapter, rank, shape)
        if reason is None:
            in_weight = adapter.needs_weight(submodule) or self.obstacles.is_read_by_parent(submodule)
            spec = self._spec(base_parameter(submodule, parameter), known_as, label, rank)
            size = adapter.stack(submodule, parameter) * rank * sum(shape)
            plan.layers.append(PlannedLayer(name, submodule, pattern, adapter, spec, parameter, in_weight, label, size))
            if rank * sum(shape) >= math.prod(shape):
                plan.wasteful.append(f"{label} (rank {rank}, weight {shape[0]} x {shape[1]})")
        elif pattern == ALL_LINEAR:
            plan.left_out[label] = reason
        else:
            option = pattern if pattern.startswith("target_parameters=") else f"target_modules={pattern!r}"
            self.problems.append(f"{option}: {label!r} cannot be adapted: {reason}.")

    def _spec(self, weight: Tensor, known_as: tuple[str, ...], label: str, rank: int) -> AdapterSpec:
        # A float32 adapter would quietly lower the precision of a float64 layer.
        dtype = weight.dtype if weight.dtype == torch.float64 else getattr(torch, self.config.adapter_dtype)
        return AdapterSpec(
            rank=rank,
            scaling=self.config.scaling(rank, first_match(self.config.alpha_pattern, known_as, self.config.alpha)),
            dropout=self.config.dropout,
            init=self.config.init,
            dtype=dtype,
            seed=layer_seed(self.seed, label, weight.shape),
        )

    def _unsupported(self, name: str, submodule: nn.Module) -> str:
        kind = type(submodule).__name__
        if any(True for _ in submodule.children()):
            return f"{name!r} is a {kind} that contains layers; name them, for example {f'{name}.*'!r}."
        return f"{name!r} is a {kind}; adapters exist for {SUPPORTED}. modules_to_save trains a module in full."

    def _save(self, plan: Plan, name: str, submodule: nn.Module, entry: str) -> None:
        if any(True for _ in submodule.parameters()):
            plan.saved[name] = submodule
        elif not is_glob(entry):
            self.problems.append(f"modules_to_save: {name!r} is a {type(submodule).__name__} without parameters.")

    def _check_ties_of_saved(self, saved: dict[str, nn.Module]) -> None:
        for name, submodule in saved.items():
            for key, _ in submodule.named_parameters():
                full = join(name, key)
                if outside := [other for other in self.obstacles.tied.get(full, ()) if not is_below(other, saved)]:
                    self.problems.append(
                        f"modules_to_save: {full!r} is tied to {outside}, which would change with it. Name the "
                        "modules on both sides, or untie them."
                    )

    def _explain_misses(self, plan: Plan) -> None:
        reached = [layer.label for layer in plan.layers]
        covered = [*reached, *plan.left_out]
        first_names = {layer.name for layer in plan.layers} | (plan.left_out.keys() & self.modules.keys())
        covered += [alias for name in first_names for alias in self.modules[name][1]]
        self.problems += missed_entries(
            self.config, self._root(), self.modules, reached=reached, covered=covered, saved=plan.saved
        )
        if not (plan.layers or self.problems):
            reasons = listed([f"{name}: {reason}" for name, reason in plan.left_out.items()])
            self.problems.append(f"target_modules={self.config.target_modules!r} left out every layer ({reasons}).")

    def _root(self) -> str:
        return type(self.module).__name__

    def _message(self) -> str:
        lines = "\n".join(f"  - {problem}" for problem in self.problems)
        return (
            f"LoRA cannot be attached to {self._root()}; nothing was changed:\n{lines}\n"
            "lightning_lora.targets.candidates(model) lists all names."
        )
