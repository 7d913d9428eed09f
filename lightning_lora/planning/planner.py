"""The planner: resolves a config against a model, and reports every problem in one error before any change."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from operator import methodcaller

import torch
from torch import nn

from lightning_lora.config import ALL_LINEAR, EVERYTHING, FAMILIES, LoRAConfig
from lightning_lora.layers import (
    NORMALIZING,
    SUPPORTED,
    Adapter,
    AdapterSpec,
    LoRALayer,
    ParameterAdapter,
    adapter_type,
    base_parameter,
    family_of,
    has_running_statistics,
    parameter_adapter,
    weights_only_read,
)
from lightning_lora.layers.starts import layer_seed
from lightning_lora.names import (
    any_below,
    block_of,
    first_match,
    is_below,
    is_glob,
    join,
    listed,
    module_names,
    numbers_of_blocks,
    parameter_names,
    rows_of_slices,
    selected,
    stacks_of_blocks,
    sweeps,
    tied_names,
)
from lightning_lora.option_checks import AUTO
from lightning_lora.planning.obstacles import (
    EXCLUDED,
    UNKNOWN_MATRIX,
    Obstacles,
    adapters_of_peft,
    missed_entries,
    other_kinds,
)
from lightning_lora.planning.other_trainables import heads, plan_biases, plan_saved_modules, plan_token_rows
from lightning_lora.planning.plan import Plan, PlannedLayer
from lightning_lora.sharding import is_sharded


def make_plan(module: nn.Module, config: LoRAConfig, seed: int = 0) -> Plan:
    """Resolve a config against a model without changing it.

    Args:
        module: The model.
        config: The request.
        seed: The seed of the starts.

    Raises:
        ValueError: Entries match nothing or name layers that cannot be adapted; one error lists them all.
    """
    planner = _Planner(module, config, seed)
    normalizing = planner.plan.normalizing.values()
    with weights_only_read(normalizing) if normalizing else nullcontext():
        return planner.planned()


class _Planner:
    def __init__(self, module: nn.Module, config: LoRAConfig, seed: int) -> None:
        self.config, self.seed = config, seed
        self.plan, self.problems = Plan(type(module).__name__, config), list[str]()
        found = module_names(module)
        own = set[int]()  # the adapters of an earlier attach are no targets
        for part, _ in found.values():
            if isinstance(part, LoRALayer):
                own.update(map(id, part.lora.modules()))
        for name, (part, names) in found.items():
            if id(part) not in own:
                self.plan.modules[name], self.plan.names[name] = part, names
                if part._forward_pre_hooks or isinstance(part, NORMALIZING):
                    self.plan.normalizing[name] = part
        self.plan.parameters = parameter_names(self.plan.modules)
        self.plan.tied = tied_names(self.plan.parameters)
        self.stacks = stacks_of_blocks(self.plan.parameters) if config.layers else {}
        self.reached, self.outside = set[str](), dict[str, str]()  # stacks with targets; pattern -> a layer not chosen
        if config.modules_to_save == AUTO:
            saved = [name for name in heads(self.plan) if self._is_chosen(block_of(name, self.stacks))]
            config = self.config = self.plan.config = replace(config, modules_to_save=saved)
        self.obstacles = Obstacles(self.plan)
        self.wants_matrices = not {ALL_LINEAR, EVERYTHING}.isdisjoint(config.families)
        self.families, self.named_targets = config.families, config.named_targets
        self.adapter_dtype: torch.dtype = getattr(torch, config.adapter_dtype)
        self.extras = config.use_dora + config.lora_bias  # numbers besides the factors, for each output feature

    def planned(self) -> Plan:
        plan, config = self.plan, self.config
        plan.base_parameters = self._count_parameters()
        self.problems += adapters_of_peft(plan)
        if config.modules_to_save:
            self.problems += plan_saved_modules(plan)
        self._add_target_modules()
        if config.target_parameters:
            self._add_target_parameters()
        if config.trainable_token_indices:
            self.problems += plan_token_rows(plan)
        if config.bias != "none":
            self.problems += plan_biases(plan)
        for name, part in plan.normalizing.items():
            plan.norms += has_running_statistics(part) and not is_below(name, plan.saved)
        if config.layers:
            self._check_layers()
        self.problems += missed_entries(plan)
        if not (plan.layers or self.problems):
            names: dict[str, list[str]] = {}
            for name, reason in plan.left_out.items():
                names.setdefault(reason, []).append(name)
            reasons = "; ".join(f"{listed(each, 3)}: {reason}" for reason, each in names.items())
            self.problems.append(
                f"target_modules={config.target_modules!r} left out every layer ({reasons}).{other_kinds(plan)}"
            )
        if self.problems:
            lines = "\n".join(f"  - {problem}" for problem in self.problems)
            raise ValueError(
                f"LoRA cannot be attached to {plan.root}; nothing was changed:\n{lines}\n"
                "lightning_lora.target_names(model) lists all names."
            )
        return plan

    def _count_parameters(self) -> int:
        plan, parameters = self.plan, self.plan.parameters
        if not self.obstacles.is_common:
            shapeless = [name for name, p in parameters.items() if isinstance(p, nn.UninitializedParameter)]
            if owners := list(dict.fromkeys(name.rpartition(".")[0] for name in shapeless)):
                raise ValueError(
                    f"The weights of {listed(owners)} have no shape yet. First, run one batch through the {plan.root}, "
                    "with a Trainer in its setup."
                )
        unique = {id(p): p for p in parameters.values()} if plan.tied else parameters
        return sum(map(methodcaller("numel"), unique.values()))

    # --- target_modules and target_slices

    def _add_target_modules(self) -> None:
        plan, config, excluded = self.plan, self.config, set[str]()
        if config.exclude_modules:
            excluded |= {name for name, names in plan.names.items() if selected(config.exclude_modules, names)}
        for name, module in plan.modules.items():
            names, adapter = plan.names[name], adapter_type(module)
            pattern = self._choosing_entry(names, module, adapter)
            key = self._slicing_key(names) if config.target_slices else None
            if pattern is None and key is None:
                if adapter is None and module._parameters:
                    self._name_parameters(module, names, excluded)
                continue
            if isinstance(module, LoRALayer) and not module.adapters():
                plan.left_out[name] = "it shares its weight with an embedding that has trained tokens"
            elif plan.saved and any_below(names, plan.saved):
                plan.left_out[name] = "in modules_to_save"
            elif excluded and any_below(names, excluded):
                plan.left_out[name] = EXCLUDED
            elif not self._in_chosen_block(name, pattern or f"target_slices={key!r}"):
                plan.left_out[name] = self._layers_option("not in ")
            else:
                self._add(names, module, adapter, pattern, key)

    def _layers_option(self, before: str = "") -> str:
        return f"{before}layers={list(self.config.layers)!r}"

    def _in_chosen_block(self, name: str, pattern: str) -> bool:
        if not self.config.layers:
            return True
        if (block := block_of(name, self.stacks)) is not None:
            self.reached.add(block[0])
            if self._is_chosen(block):
                return True
        self.outside.setdefault(pattern, name)
        return False

    def _is_chosen(self, block: tuple[str, int] | None) -> bool:
        """Return whether ``layers`` names a block; it says nothing of what is in none."""
        if block is None:
            return True
        stack, number = block
        return any(number in numbers_of_blocks(entry, self.stacks[stack])[0] for entry in self.config.layers)

    def _check_layers(self) -> None:
        """Record what is wrong with ``layers``, and names that it leaves without a layer."""
        if not self.reached:
            self.problems.append(f"{self._layers_option()}: no target lies in repeated blocks, such as 'layers.0'.")
            return
        blocks = [f"{path or self.plan.root} has {self.stacks[path]} blocks" for path in sorted(self.reached)]
        for entry in self.config.layers:
            if not any(numbers_of_blocks(entry, self.stacks[path])[1] for path in self.reached):
                quotes = " YAML reads 8:16 as 496; quote slices." if isinstance(entry, int) and entry > _MINUTE else ""
                self.problems.append(f"layers: {entry!r} is out of range; {listed(blocks)}, counted from 0.{quotes}")
        reached = {layer.pattern for layer in self.plan.layers}
        for pattern, name in self.outside.items():
            if pattern not in reached and pattern not in FAMILIES:
                option = _option(pattern)
                self.problems.append(f"{option} reaches no layer in {self._layers_option()}; {name!r} is not in these.")

    def _name_parameters(self, module: nn.Module, names: tuple[str, ...], excluded: set[str]) -> None:
        """Name parameters that no layer holds: matrices, which "all" may mean, and those that the user has made."""
        plan = self.plan
        is_own = not names[0] or isinstance(module, (nn.ParameterDict, nn.ParameterList))
        if not (self.wants_matrices or is_own) or any_below(names, plan.saved) or any_below(names, excluded):
            return
        for key, parameter in module._parameters.items():
            if parameter is None or not parameter.is_floating_point():
                continue
            full, is_matrix = join(names[0], key), parameter.ndim > 1 and min(parameter.shape) > 1
            if full in plan.tied or selected(self.config.target_parameters, [full]):
                continue
            if is_matrix and self.wants_matrices and names[0]:  # the model's own cannot be named
                plan.left_out[full] = UNKNOWN_MATRIX
            elif is_own and parameter.requires_grad:
                plan.left_out[full] = _OWN_PARAMETER

    def _choosing_entry(self, names: tuple[str, ...], module: nn.Module, adapter: type[Adapter] | None) -> str | None:
        pattern = selected(self.named_targets, names)
        # Globs and regular expressions sweep over containers and activations; only a name insists on its module.
        if pattern is not None and (adapter is not None or not sweeps(self.named_targets, pattern)):
            return pattern
        if adapter is None or not self.families:
            return None
        word = family_of(adapter, module)
        return word if word in self.families else EVERYTHING if EVERYTHING in self.families else None

    def _reaches_layers(self, pattern: str | None) -> bool:
        """Return whether an entry names a layer of a supported kind."""
        named = (name for name, names in self.plan.names.items() if pattern and selected((pattern,), names))
        return any(adapter_type(self.plan.modules[name]) is not None for name in named)

    def _slicing_key(self, names: tuple[str, ...]) -> str | None:
        keys = [key for key in self.config.target_slices if selected((key,), names)]
        if len(keys) > 1:
            self.problems.append(f"target_slices: {keys} all name {names[0]!r}; put all its slices under one of them.")
        return keys[0] if keys else None

    def _add(
        self,
        names: tuple[str, ...],
        module: nn.Module,
        adapter: type[Adapter] | None,
        pattern: str | None,
        key: str | None = None,
    ) -> None:
        if key is not None:
            self._add_slices(names, module, adapter, key)
        elif adapter is None:
            # Such as the nn.Identity that replaces the head of a backbone, beside the new head of the same name.
            is_empty = next(module.parameters(), None) is None
            if not (is_empty and self._reaches_layers(pattern)):
                self.problems.append(f"target_modules={pattern!r}: {_unsupported(names[0], module)}")
        else:
            for parameter in adapter.parameters_of(module):
                self._add_parameter(PlannedLayer(names, module, str(pattern), adapter, parameter))
        if pattern is not None and pattern not in FAMILIES and isinstance(module, nn.MultiheadAttention):
            projection = tuple(join(alias, "out_proj") for alias in names)
            left_alone = selected(self.config.exclude_modules, projection)
            if not (left_alone or self._choosing_entry(projection, module.out_proj, adapter_type(module.out_proj))):
                self._add(projection, module.out_proj, adapter_type(module.out_proj), pattern)

    def _add_slices(self, names: tuple[str, ...], module: nn.Module, adapter: type[Adapter] | None, key: str) -> None:
        option, name = f"target_slices={key!r}", names[0]
        parameter = None if adapter is None else adapter.sliced_parameter(module)
        if adapter is None or parameter is None:
            if not is_glob(key):
                self.problems.append(
                    f"{option}: {name!r} is a {type(module).__name__}; slices divide the output features of nn.Linear, "
                    "transformers' Conv1D and the packed projection of nn.MultiheadAttention."
                )
            return
        if is_sharded(base_parameter(module, parameter)):
            self.problems.append(f"{option}: {name!r} is sharded by tensor parallelism, so it cannot be sliced.")
            return
        features, taken = adapter.matrix_shape(module, parameter)[0], set[int]()
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
            self._add_parameter(PlannedLayer(names, module, option, adapter, parameter, part, rows))

    # --- target_parameters

    def _add_target_parameters(self) -> None:
        adapted = {layer.names[0] for layer in self.plan.layers}
        for name, module in self.plan.modules.items():
            names = self.plan.names[name]
            for key, parameter in module._parameters.items():
                entry = selected(self.config.target_parameters, [join(alias, key) for alias in names])
                if entry is None or parameter is None or (parameter.ndim < 2 and is_glob(entry)):
                    continue
                option, full = f"target_parameters={entry!r}", join(name, key)
                if parameter.ndim < 2:
                    self.problems.append(f"{option}: {full!r} has {parameter.ndim} dimension; LoRA needs two or more.")
                elif not name:
                    self.problems.append(f"{option}: {full!r} belongs to the model itself; move it into a module.")
                elif not self._in_chosen_block(name, option):
                    self.plan.left_out[full] = self._layers_option("not in ")
                elif name in adapted:
                    self.problems.append(f"{option}: target_modules adapts {name!r} already; exclude it there.")
                else:
                    self._add_parameter(PlannedLayer(names, module, option, parameter_adapter(module, key), key))

    # --- one adapter

    def _add_parameter(self, layer: PlannedLayer) -> None:
        """Plan one adapter, or record why it is impossible."""
        config, known_as = self.config, layer.names
        module, adapter, parameter = layer.module, layer.adapter, layer.parameter
        layer.key = layer.part or (parameter if issubclass(adapter, ParameterAdapter) else "")
        layer.label = known_as[0]
        if layer.key:
            layer.label = join(known_as[0], layer.key)
            known_as = (*known_as, *(join(alias, layer.key) for alias in known_as))
        out_features, in_features = adapter.matrix_shape(module, parameter)
        if layer.rows:
            out_features = sum(map(len, layer.rows))
        rank = first_match(config.rank_pattern, known_as, config.first_rank)
        reason = self.obstacles.of(layer, rank, (out_features, in_features))
        if reason is not None:
            self._leave_out(layer, reason)
            return
        size = rank * (out_features + in_features)
        layer.size = adapter.stack(module, parameter) * size + out_features * self.extras
        layer.in_weight = self.obstacles.carried_by_weight(layer) is not None
        layer.spec = self._spec(layer, rank, first_match(config.alpha_pattern, known_as, config.alpha))
        self.plan.layers.append(layer)
        if self.plan.tied:
            self._untie(join(layer.names[0], parameter))
        if size >= out_features * in_features:
            self.plan.wasteful.append(f"{layer.label} (rank {rank}, weight {out_features} x {in_features})")

    def _spec(self, layer: PlannedLayer, rank: int, alpha: float) -> AdapterSpec:
        config, weight = self.config, base_parameter(layer.module, layer.parameter)
        scaling = config.scaling(rank, alpha)
        # A float32 adapter would quietly lower the precision of a float64 layer.
        dtype = torch.float64 if weight.dtype.to_real() == torch.float64 else self.adapter_dtype
        seed = layer_seed(self.seed, layer.label, weight.shape)
        return AdapterSpec(
            rank, scaling, config.dropout, config.start.name, dtype, seed, config.use_dora, config.lora_bias, layer.rows
        )

    def _leave_out(self, layer: PlannedLayer, reason: str) -> None:
        if layer.pattern in FAMILIES:
            self.plan.left_out[layer.label] = reason
        else:
            self.problems.append(f"{_option(layer.pattern)}: {layer.label!r} cannot be adapted: {reason}.")

    def _untie(self, weight_name: str) -> None:
        if others := [other for other in self.plan.tied.get(weight_name, ()) if other not in self.plan.untied]:
            self.plan.untied[weight_name] = others[0]


_MINUTE = 60  # YAML's numbers may have colons, as times do
_OWN_PARAMETER = "held by no layer, so frozen; to train it, put it into a module and name that in modules_to_save"


def _option(pattern: str) -> str:
    """Return the option and the entry that chose a layer."""
    names_option = pattern.startswith(("target_parameters=", "target_slices="))
    return pattern if names_option else f"target_modules={pattern!r}"


def _unsupported(name: str, module: nn.Module) -> str:
    kind = type(module).__name__
    if any(True for _ in module.children()):
        return f"{name!r} is a {kind} that contains layers; name them, for example {f'{name}.*'!r}."
    return (
        f"{name!r} is a {kind}; adapters exist for {SUPPORTED}. target_parameters adapts any parameter of two or more "
        "dimensions; modules_to_save trains a module in full."
    )
