"""From a config and a model to the exact list of changes; everything that can go wrong goes wrong here."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lightning_lora.config import ALL_LINEAR, LoRAConfig
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
from lightning_lora.layers.initializers import layer_seed
from lightning_lora.names import (
    any_below,
    first_match,
    is_below,
    is_glob,
    join,
    listed,
    parameter_names,
    rows_of_slices,
    selected,
    sweeps,
    tied_names,
)
from lightning_lora.planning.misses import Modules, missed_entries
from lightning_lora.planning.obstacles import Obstacles
from lightning_lora.planning.plan import Plan, PlannedLayer
from lightning_lora.planning.token_rows import plan_token_rows
from lightning_lora.planning.trainables import plan_biases, plan_saved_modules
from lightning_lora.sharding import is_sharded


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
        self.parts = {name: part for name, (part, _) in self.modules.items()}
        self.parameters = parameter_names(self.parts)
        tied = tied_names(self.parameters)
        self.obstacles = Obstacles(config, self.parts.values(), self.parameters.values(), tied)
        self.adapter_dtype: torch.dtype = getattr(torch, config.adapter_dtype)
        self.extras = config.use_dora + config.lora_bias  # numbers besides the factors, for each output feature
        self.problems: list[str] = []

    def plan(self) -> Plan:
        plan = Plan(modules=self.parts, parameters=self.parameters, base_parameters=self._count_parameters())
        tied = self.obstacles.tied
        self.problems += plan_saved_modules(plan, self.modules, self.config, tied)
        self._add_target_modules(plan)
        self._add_target_parameters(plan)
        self.problems += plan_token_rows(plan, self.modules, self.config, self.obstacles)
        self.problems += plan_biases(plan, self.config, tied)
        norms = [name for name, part in self.parts.items() if has_running_statistics(part)]
        plan.norms = sum(1 for name in norms if not is_below(name, plan.saved))
        self._explain_misses(plan)
        if self.problems:
            raise ValueError(self._message())
        return plan

    def _count_parameters(self) -> int:
        parameters = self.parameters.values()
        if any(issubclass(kind, nn.UninitializedParameter) for kind in set(map(type, parameters))):
            self._refuse_shapeless()
        unique = {id(p): p for p in parameters}.values() if self.obstacles.tied else parameters
        return sum(p.numel() for p in unique)

    def _refuse_shapeless(self) -> None:
        shapeless = [
            n.rpartition(".")[0] for n, p in self.parameters.items() if isinstance(p, nn.UninitializedParameter)
        ]
        raise ValueError(
            f"The weights of {listed(list(dict.fromkeys(shapeless)))} have no shape yet; run one batch through the "
            f"{self._root()} first."
        )

    # --- target_modules and target_slices

    def _add_target_modules(self, plan: Plan) -> None:
        excluded = {n for n, (_, names) in self.modules.items() if selected(self.config.exclude_modules, names)}
        for name, (submodule, names) in self.modules.items():
            adapter = adapter_type(submodule)
            pattern = self._choosing_pattern(adapter, submodule, names)
            key = self._slicing_key(names)
            if pattern is None and key is None:
                continue
            if isinstance(submodule, LoRALayer) and not submodule.adapters():
                plan.left_out[name] = "it shares its weight with an embedding that has trained tokens"
                continue
            if any_below(names, plan.saved):
                plan.left_out[name] = "in modules_to_save"
            elif any_below(names, excluded):
                plan.left_out[name] = "in exclude_modules"
            else:
                self._add(plan, names, submodule, pattern, adapter, key)

    def _choosing_pattern(
        self, adapter: type[Adapter] | None, submodule: nn.Module, names: tuple[str, ...]
    ) -> str | None:
        if self.automatic:
            return ALL_LINEAR if adapter is not None and adapter.in_all_linear(submodule) else None
        pattern = selected(self.config.target_modules, names)
        # Globs and regular expressions sweep over containers and activations; only a name insists on its module.
        insists = pattern is not None and not sweeps(self.config.target_modules, pattern)
        return pattern if adapter is not None or insists else None

    def _slicing_key(self, names: tuple[str, ...]) -> str | None:
        if not self.config.target_slices:
            return None
        keys = [key for key in self.config.target_slices if selected((key,), names)]
        if len(keys) > 1:
            self.problems.append(
                f"target_slices: {names[0]!r} is named by {keys}; put all its slices under one of them."
            )
        return keys[0] if keys else None

    def _add(
        self,
        plan: Plan,
        names: tuple[str, ...],
        submodule: nn.Module,
        pattern: str | None,
        adapter: type[Adapter] | None,
        key: str | None = None,
    ) -> None:
        if key is not None:
            self._add_slices(plan, names, submodule, key, adapter)
        elif adapter is None:
            self.problems.append(f"target_modules={pattern!r}: {self._unsupported(names[0], submodule)}")
        else:
            for parameter in adapter.parameters_of(submodule):
                self._add_parameter(plan, names, submodule, str(pattern), adapter, parameter)
        if not self.automatic and pattern is not None and isinstance(submodule, nn.MultiheadAttention):
            projection = tuple(join(alias, "out_proj") for alias in names)
            left_alone = selected(self.config.exclude_modules, projection)
            if not (left_alone or selected(self.config.target_modules, projection)):
                self._add(plan, projection, submodule.out_proj, pattern, adapter_type(submodule.out_proj))

    def _add_slices(
        self, plan: Plan, names: tuple[str, ...], submodule: nn.Module, key: str, adapter: type[Adapter] | None
    ) -> None:
        option, name = f"target_slices={key!r}", names[0]
        parameter = None if adapter is None else adapter.sliced_parameter(submodule)
        if adapter is None or parameter is None:
            if not is_glob(key):
                self.problems.append(
                    f"{option}: {name!r} is a {type(submodule).__name__}; slices divide the output features of "
                    "nn.Linear, transformers' Conv1D and the packed projection of nn.MultiheadAttention."
                )
            return
        if is_sharded(base_parameter(submodule, parameter)):
            self.problems.append(f"{option}: {name!r} is divided by tensor parallelism, which target_slices cannot be.")
            return
        features, taken = adapter.matrix_shape(submodule, parameter)[0], set[int]()
        for part, text in self.config.target_slices[key].items():
            try:
                rows = rows_of_slices(text, features)
            except ValueError as error:
                self.problems.append(f"{option}: {part!r} of {name!r}: {error}.")
                continue
            chosen = {row for piece in rows for row in piece}
            if taken & chosen:
                self.problems.append(f"{option}: {part!r} of {name!r} overlaps with another slice.")
            taken |= chosen
            self._add_parameter(plan, names, submodule, option, adapter, parameter, part, rows)

    # --- target_parameters

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

    # --- one adapter

    def _add_parameter(
        self,
        plan: Plan,
        names: tuple[str, ...],
        submodule: nn.Module,
        pattern: str,
        adapter: type[Adapter],
        parameter: str,
        part: str = "",
        rows: tuple[range, ...] = (),
    ) -> None:
        """Plan one adapter: of a whole parameter, or of the rows of it that are called ``part``."""
        name = names[0]
        key = part or (parameter if issubclass(adapter, ParameterAdapter) else "")
        label = join(name, key) if key else name
        known_as = (*names, *(join(alias, key) for alias in names)) if key else names
        shape = adapter.matrix_shape(submodule, parameter)
        if rows:
            shape = sum(map(len, rows)), shape[1]
        rank = first_match(self.config.rank_pattern, known_as, self.config.rank)
        weight_name = join(name, parameter)
        reason = self.obstacles.of(weight_name, submodule, adapter, rank, shape, named=pattern != ALL_LINEAR)
        if reason is None:
            size = rank * (shape[0] + shape[1])
            plan.layers.append(
                PlannedLayer(
                    name=name,
                    module=submodule,
                    pattern=pattern,
                    adapter=adapter,
                    spec=self._spec(base_parameter(submodule, parameter), known_as, label, rank, rows),
                    parameter=parameter,
                    key=key,
                    in_weight=adapter.needs_weight(submodule) or self.obstacles.is_read_by_parent(submodule),
                    label=label,
                    size=adapter.stack(submodule, parameter) * size + shape[0] * self.extras,
                )
            )
            if self.obstacles.tied:
                self._untie(plan, weight_name)
            if size >= shape[0] * shape[1]:
                plan.wasteful.append(f"{label} (rank {rank}, weight {shape[0]} x {shape[1]})")
        elif pattern == ALL_LINEAR:
            plan.left_out[label] = reason
        else:
            option = pattern if pattern.startswith(_OPTIONS) else f"target_modules={pattern!r}"
            self.problems.append(f"{option}: {label!r} cannot be adapted: {reason}.")

    def _untie(self, plan: Plan, weight_name: str) -> None:
        others = [other for other in self.obstacles.tied.get(weight_name, ()) if other not in plan.untied]
        if others:
            plan.untied[weight_name] = others[0]

    def _spec(
        self, weight: Tensor, known_as: tuple[str, ...], label: str, rank: int, rows: tuple[range, ...]
    ) -> AdapterSpec:
        config = self.config
        scaling = config.scaling(rank, first_match(config.alpha_pattern, known_as, config.alpha))
        # A float32 adapter would quietly lower the precision of a float64 layer.
        dtype = weight.dtype if weight.dtype == torch.float64 else self.adapter_dtype
        seed = layer_seed(self.seed, label, weight.shape)
        return AdapterSpec(
            rank, scaling, config.dropout, config.init, dtype, seed, config.use_dora, config.lora_bias, rows
        )

    # --- errors

    def _unsupported(self, name: str, submodule: nn.Module) -> str:
        kind = type(submodule).__name__
        if any(True for _ in submodule.children()):
            return f"{name!r} is a {kind} that contains layers; name them, for example {f'{name}.*'!r}."
        return (
            f"{name!r} is a {kind}; adapters exist for {SUPPORTED}. target_parameters adapts any parameter of two or "
            "more dimensions, modules_to_save trains a module in full."
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
            "lightning_lora.target_names(model) lists all names."
        )


_OPTIONS = ("target_parameters=", "target_slices=")  # what a pattern says by itself if it is not of target_modules
