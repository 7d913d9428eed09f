"""From a config and a model to the exact list of changes; everything that can go wrong goes wrong here."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import nn

from lightning_lora.config import ALL_LINEAR, LoRAConfig
from lightning_lora.initializers import layer_seed
from lightning_lora.layers import (
    SUPPORTED,
    Adapter,
    AdapterSpec,
    LoRALayer,
    adapter_type,
    base_weight,
    has_running_statistics,
    taken_names,
)
from lightning_lora.targets import (
    first_match,
    is_below,
    is_glob,
    join,
    listed,
    matches_pattern,
    module_names,
    near_names,
    output_embeddings,
    selected,
    tied_names,
    unmatched,
)

# Parents that read their children's weights instead of calling them, so that an adapted child would do nothing.
_WEIGHT_READERS: dict[type[nn.Module], tuple[str, ...]] = {
    nn.MultiheadAttention: ("out_proj",),
    nn.TransformerEncoderLayer: ("linear1", "linear2"),
}


class PlannedLayer(NamedTuple):
    """One layer to adapt: where it is, which entry of the config chose it, and its adapter."""

    name: str
    module: nn.Module
    pattern: str
    adapter: type[Adapter]
    spec: AdapterSpec
    parameters: int


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


def make_plan(module: nn.Module, config: LoRAConfig, seed: int) -> Plan:
    """Resolve a config against a model without changing it.

    Raises:
        ValueError: Entries match nothing or name layers that cannot be adapted; one error lists them all.
    """
    return _Planner(module, config, seed).plan()


class _Planner:
    def __init__(self, module: nn.Module, config: LoRAConfig, seed: int) -> None:
        self.module, self.config, self.seed = module, config, seed
        found = module_names(module)
        own = {id(part) for layer, _ in found.values() if isinstance(layer, LoRALayer) for part in layer.lora.modules()}
        self.modules = {name: entry for name, entry in found.items() if id(entry[0]) not in own} if own else found
        self.automatic = config.target_modules == ALL_LINEAR
        self.tied = tied_names(module)
        self.heads = {id(head) for head in output_embeddings(module)}
        self.weight_readers = {
            id(getattr(parent, child)): type(parent).__name__
            for parent, _ in self.modules.values()
            for kind, children in _WEIGHT_READERS.items()
            if isinstance(parent, kind)
            for child in children
        }
        self.problems: list[str] = []

    def plan(self) -> Plan:
        self._refuse_shapeless()
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
            pattern = self._choosing_pattern(adapter, names)
            if pattern is None:
                continue
            if any(is_below(alias, saved) for alias in names):
                plan.left_out[name] = "in modules_to_save"
            elif any(is_below(alias, excluded) for alias in names):
                plan.left_out[name] = "in exclude_modules"
            else:
                self._add(plan, names, submodule, pattern, adapter)
        norms = [name for name, (part, _) in self.modules.items() if has_running_statistics(part)]
        plan.norms = sum(1 for name in norms if not is_below(name, saved))
        self._explain_misses(plan)
        if self.problems:
            raise ValueError(self._message())
        return plan

    def _count_parameters(self) -> int:
        unique = {p for part, _ in self.modules.values() for p in part._parameters.values()}  # a set goes by identity
        return sum(p.numel() for p in unique if p is not None)

    def _refuse_shapeless(self) -> None:
        shapeless = [
            name
            for name, (part, _) in self.modules.items()
            if any(isinstance(p, nn.UninitializedParameter) for p in part._parameters.values())
        ]
        if shapeless:
            raise ValueError(
                f"The weights of {listed(shapeless)} have no shape yet; run one batch through the {self._root()} first."
            )

    def _choosing_pattern(self, adapter: type[Adapter] | None, names: tuple[str, ...]) -> str | None:
        if self.automatic:
            return ALL_LINEAR if adapter is not None and adapter.is_linear else None
        pattern = selected(self.config.target_modules, names)
        # Globs and regular expressions sweep over containers and activations; only a name insists on its module.
        insists = pattern is not None and not self._sweeps(pattern)
        return pattern if adapter is not None or insists else None

    def _sweeps(self, pattern: str) -> bool:
        return isinstance(self.config.target_modules, str) or is_glob(pattern)

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
        rank = first_match(self.config.rank_pattern, names, self.config.rank)
        reason = self._obstacle(name, submodule, adapter, rank)
        if reason is None:
            plan.layers.append(self._planned(names, submodule, pattern, adapter, rank))
            out_features, in_features = adapter.matrix_shape(submodule)
            if rank * (out_features + in_features) >= out_features * in_features:
                plan.wasteful.append(f"{name} (rank {rank}, weight {out_features} x {in_features})")
        elif self.automatic:
            plan.left_out[name] = reason
        else:
            self.problems.append(f"target_modules={pattern!r}: {name!r} cannot be adapted: {reason}.")

    def _planned(
        self, names: tuple[str, ...], submodule: nn.Module, pattern: str, adapter: type[Adapter], rank: int
    ) -> PlannedLayer:
        name = names[0]
        weight = base_weight(submodule)
        # A float32 adapter would quietly lower the precision of a float64 layer.
        dtype = weight.dtype if weight.dtype == torch.float64 else getattr(torch, self.config.adapter_dtype)
        spec = AdapterSpec(
            rank=rank,
            scaling=self.config.scaling(rank, first_match(self.config.alpha_pattern, names, self.config.alpha)),
            dropout=self.config.dropout,
            init=self.config.init,
            dtype=dtype,
            seed=layer_seed(self.seed, name, weight.shape),
        )
        return PlannedLayer(name, submodule, pattern, adapter, spec, rank * sum(adapter.matrix_shape(submodule)))

    def _obstacle(self, name: str, submodule: nn.Module, adapter: type[Adapter], rank: int) -> str | None:
        """Return why this layer cannot be adapted, or None."""
        if reason := adapter.obstacle(submodule) or self._obstacle_of_instance(submodule):
            return reason
        if reader := self.weight_readers.get(id(submodule)):
            return f"its parent, a {reader}, reads the weight without calling the layer, so an adapter would never run"
        if others := self.tied.get(join(name, "weight")):
            return f"its weight is tied to {', '.join(map(repr, others))}, which would change with it"
        if self.automatic and id(submodule) in self.heads:
            return "output embedding of a transformers model"
        limit = min(adapter.matrix_shape(submodule))
        if rank > limit:
            return f"rank {rank} is above {limit}, the highest rank of its weight; give it less with rank_pattern"
        if self.config.dropout and adapter.drops_input and adapter.needs_weight(submodule):
            kind = type(submodule).__name__
            return f"a {kind} has a forward of its own, so its weight must carry the update; that needs dropout=0"
        return None

    def _obstacle_of_instance(self, submodule: nn.Module) -> str | None:
        if "forward" in vars(submodule):
            return "its forward was replaced on the instance, so an adapter would never run"
        if not isinstance(submodule, LoRALayer) and (taken := taken_names(submodule)):
            return f"it has attributes of its own named {sorted(taken)}, which an adapted layer needs"
        return None

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
                if outside := [other for other in self.tied.get(full, ()) if not is_below(other, saved)]:
                    self.problems.append(
                        f"modules_to_save: {full!r} is tied to {outside}, which would change with it. Name the "
                        "modules on both sides, or untie them."
                    )

    def _explain_misses(self, plan: Plan) -> None:
        everything = [names for _, names in self.modules.values()]
        reached = [layer.name for layer in plan.layers]
        covered = [name for first in [*reached, *plan.left_out] for name in self.modules[first][1]]
        self._explain_missed_targets(plan, everything)
        for option in ("exclude_modules", "modules_to_save"):
            for entry in unmatched(getattr(self.config, option), everything):
                self._miss(option, entry, everything)
        self._explain_empty_saves(plan)
        for option in ("rank_pattern", "alpha_pattern"):
            for key in getattr(self.config, option):
                if not any(matches_pattern(key, name) for name in covered):
                    self._miss(option, key, [(name,) for name in reached])
        if not (plan.layers or self.problems):
            reasons = listed([f"{name}: {reason}" for name, reason in plan.left_out.items()])
            self.problems.append(f"target_modules={self.config.target_modules!r} left out every layer ({reasons}).")

    def _explain_empty_saves(self, plan: Plan) -> None:
        """A glob may sweep over what has no parameters, but it must reach something that has."""
        for entry in filter(is_glob, self.config.modules_to_save):
            found = [name for name, (_, names) in self.modules.items() if selected((entry,), names)]
            if found and not any(is_below(name, plan.saved) for name in found):
                self.problems.append(f"modules_to_save={entry!r} matched no module with parameters: {listed(found)}.")

    def _explain_missed_targets(self, plan: Plan, everything: list[tuple[str, ...]]) -> None:
        if self.automatic:
            if not (plan.layers or plan.left_out):
                self.problems.append(f"target_modules={ALL_LINEAR!r}: {self._root()} has no linear layer.")
            return
        adaptable = [names for submodule, names in self.modules.values() if adapter_type(submodule)]
        unknown = unmatched(self.config.target_modules, everything)
        for entry in unmatched(self.config.target_modules, adaptable):
            if entry in unknown:
                self._miss("target_modules", entry, everything)
            elif self._sweeps(entry):
                self.problems.append(
                    f"target_modules={entry!r} matched no layer of a kind that has an adapter: {SUPPORTED}."
                )

    def _miss(self, option: str, entry: str, pool: list[tuple[str, ...]]) -> None:
        near = near_names(entry, (name for names in pool for name in names))
        hint = f" Closest names: {', '.join(map(repr, near))}." if near else ""
        if option == "target_modules" and self.config.target_modules == entry:
            hint += " A string is one regular expression over full names; put a name into a list."
        what = "adapted layer" if option.endswith("pattern") else "module"
        self.problems.append(f"{option}={entry!r} matched no {what} of {self._root()}.{hint}")

    def _root(self) -> str:
        return type(self.module).__name__

    def _message(self) -> str:
        lines = "\n".join(f"  - {problem}" for problem in self.problems)
        return (
            f"LoRA cannot be attached to {self._root()}; nothing was changed:\n{lines}\n"
            "lightning_lora.targets.candidates(model) lists all names."
        )
