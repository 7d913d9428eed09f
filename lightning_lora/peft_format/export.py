"""From an adapted model to what its PEFT directory holds, with the reason for everything that PEFT cannot hold."""

from __future__ import annotations

import inspect
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn

from lightning_lora.adapted_model import AdaptedModel
from lightning_lora.config import Bias
from lightning_lora.layers import (
    Adapter,
    LoRALayer,
    LowRankAdapter,
    ParameterAdapter,
    TokenAdapter,
    adapter_type,
    base_parameter,
    weight_readers,
)
from lightning_lora.layers.linear import Conv1DAdapter, LinearAdapter
from lightning_lora.names import CONTAINERS, is_below, join, listed, module_names
from lightning_lora.peft_format.config import (
    HEADS_OF_TASKS,
    LAST_KNOWN_PEFT_TEXT,
    TIMES_PEFT_ADDS_OUT_PROJ,
    numbers_for,
    targets_for,
)
from lightning_lora.peft_format.factors import Factors, Geometry, PeftLayer, factors_of, placed, to_file
from lightning_lora.peft_format.names import (
    PEFTS_OWN,
    PREFIX,
    TOKENS_SUFFIX,
    expert_names,
    has_many_names,
    live_path,
    model_type,
    paths_in_file,
    tensors_in_full,
)

_FUSED_IN_EVAL = "TransformerEncoderLayer"  # calls its layers whenever gradients flow


@dataclass
class Export:
    """Everything that was trained, under names relative to the exported model.

    Attributes:
        root: The exported model.
        root_name: Its name in the module that was given.
        layers: The low-rank updates.
        tokens: Embeddings whose rows train.
        saved: Modules trained in full.
        namesakes: Those of them that are frozen, and only have names that end like another's.
        biases: Biases of the base that train, by the names of their parameters.
        refused: Name -> why PEFT cannot hold it.
        is_partial: Whether the model has other modules, so that only full names mean these.
        spellings: The path in PEFT's model -> the path in the files from which PEFT makes it.
        moved: Buffers of the base that training has changed by itself.
        recorded_root: As ``PeftFile.root``.
    """

    root: nn.Module
    root_name: str
    layers: list[PeftLayer] = field(default_factory=list)
    tokens: dict[str, TokenAdapter] = field(default_factory=dict)
    saved: dict[str, nn.Module] = field(default_factory=dict)
    namesakes: list[str] = field(default_factory=list)
    biases: dict[str, Tensor] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)
    is_partial: bool = False
    spellings: dict[str, str] = field(default_factory=dict)
    moved: list[str] = field(default_factory=list)
    recorded_root: str | None = None
    use_rslora: bool = False
    use_dora: bool = False
    lora_bias: bool = False
    bias: Bias = "none"
    dropout: float = 0.0

    def uniform(self) -> None:
        """Give every layer the highest rank and one scaling; the updates stay the same."""
        if not self.layers:
            return
        rank = max(layer.factors.rank for layer in self.layers)
        scaling = max(layer.factors.scaling for layer in self.layers)
        self.layers = [layer._replace(factors=layer.factors.padded(rank).rescaled(scaling)) for layer in self.layers]

    def numbers(self) -> dict[str, Any]:
        """Return the options that decide ranks and scalings."""
        return numbers_for({layer.target: layer.factors for layer in self.layers}, use_rslora=self.use_rslora)

    def targets(self) -> list[str]:
        """Return the names of the layers that ``target_modules`` names."""
        return sorted({layer.target for layer in self.layers if not layer.by_parameter})

    def by_weight(self) -> list[str]:
        """Return the linear layers that PEFT adapts right only as parameters."""
        return [layer.name for layer in self.layers if layer.by_parameter and layer.label == layer.name]

    def config(self, base_model_name_or_path: str | None, task_type: str | None = None) -> dict[str, Any]:
        """Return what ``adapter_config.json`` says."""
        parameters = sorted(layer.target for layer in self.layers if layer.by_parameter)
        tokens = {name: [int(token) for token in adapter.index] for name, adapter in sorted(self.tokens.items())}
        return self.numbers() | {
            "auto_mapping": None if task_type else self._auto_mapping(),
            "base_model_name_or_path": base_model_name_or_path,
            "bias": self.bias if self.biases else "none",
            "fan_in_fan_out": any(issubclass(layer.adapter, Conv1DAdapter) for layer in self.layers),
            "inference_mode": True,
            "init_lora_weights": True,
            "lora_bias": self.lora_bias,
            "lora_dropout": 0.0 if parameters else self.dropout,  # PEFT raises for dropout with parameters
            "modules_to_save": sorted(self.saved) or None,
            "peft_type": "LORA",
            "peft_version": LAST_KNOWN_PEFT_TEXT,
            "target_modules": self.targets()
            if self.is_partial
            else targets_for(self.targets(), _base_names(self.root)),
            "target_parameters": parameters or None,
            "task_type": task_type,
            "trainable_token_indices": tokens or None,
            "use_dora": self.use_dora,
        }

    def _auto_mapping(self) -> dict[str, str] | None:
        """Return the class from which PEFT's ``AutoPeftModel`` makes the base; unknown where only a file was read."""
        kind = type(self.root)
        return None if self.is_partial else {"base_model_class": kind.__name__, "parent_library": kind.__module__}

    def check_task(self, task_type: str | None) -> None:
        """Reject a task of PEFT's that is unknown, or for which PEFT would skip an adapted head.

        Raises:
            ValueError: Its message says which.
        """
        if task_type not in {None, *HEADS_OF_TASKS}:
            known = ", ".join(map(repr, HEADS_OF_TASKS))
            raise ValueError(f"task_type={task_type!r} is unknown to PEFT; choose one of {known}.")
        heads = HEADS_OF_TASKS.get(task_type or "", ())
        if skipped := [layer.name for layer in self.layers if set(layer.name.split(".")) & set(heads)]:
            raise ValueError(
                f"task_type={task_type!r}: PEFT trains modules named {' and '.join(heads)} in full for this task, and "
                f"would skip the adapters of {listed(skipped)}. Leave task_type out, or name them in modules_to_save."
            )

    def caveats(self) -> list[str]:
        """Return warnings about correct files that some PEFT versions apply differently."""
        by_name = {layer.name: layer for layer in self.layers}
        doubled = [layer.name for layer in self.layers if layer.name != layer.target and not layer.by_parameter]
        found = []
        if self.moved:
            found.append(
                f"Training has changed buffers of the base, for which PEFT has no place: {listed(self.moved)}. On the "
                "base as it was, the adapter may compute something else; a .ckpt holds them."
            )
        if any(by_name[name].factors.B.count_nonzero() for name in doubled):
            found.append(
                f"PEFT up to {LAST_KNOWN_PEFT_TEXT} adds the update of attention's output projection twice, so the "
                f"files hold half of it; a PEFT that adds it once computes something else ({listed(doubled)})."
            )
        if self.dropout and (linear := self.by_weight()):
            found.append(
                f"The files say lora_dropout=0, not {self.dropout:g}: PEFT adapts {listed(linear)} as parameters, "
                "without dropout. That matters only for further training in PEFT."
            )
        if self.namesakes:
            found.append(
                f"The files also hold {listed(self.namesakes)}, with the base's values: PEFT matches modules_to_save "
                "by the ends of names. Further training in PEFT would train them."
            )
        readers = weight_readers(list(self.root.modules()))
        if fused := [name for name, layer in by_name.items() if readers.get(id(layer.module)) == _FUSED_IN_EVAL]:
            found.append(
                f"In eval mode torch's fused encoder bypasses PEFT's adapters of {listed(fused)}; call "
                "PEFT's merge_and_unload before using them."
            )
        return found

    def _wrappers(self) -> Counter[str]:
        """Return how often PEFT will have wrapped each module."""
        return Counter(layer.name for layer in self.layers)

    def paths(self) -> list[str]:
        """Return the layers' paths in PEFT's model."""
        wrappers, left, found = self._wrappers(), self._wrappers(), list[str]()
        for layer in self.layers:  # of several on one module, PEFT wraps the first registered innermost
            left[layer.name] -= 1
            found.append(live_path(layer.name, wrappers) + ".base_layer" * left[layer.name])
        return found

    def tensors(self) -> dict[str, Tensor]:
        """Return what ``adapter_model.safetensors`` holds, in the order of the keys."""
        found: dict[str, Tensor] = {}
        for layer, path in zip(self.layers, self.paths(), strict=True):
            geometry = Geometry.of(layer.adapter, layer.module, layer.parameter)
            found |= to_file(self.spellings.get(path, path), layer.factors, geometry)
        for name, adapter in self.tokens.items():
            found[name + TOKENS_SUFFIX] = adapter.rows
        for name, module in self.saved.items():
            found |= tensors_in_full(name, module)
        found |= {live_path(name, self._wrappers()): tensor for name, tensor in self.biases.items()}
        # Copies, since a file cannot hold one tensor twice.
        return {PREFIX + key: found[key].detach().cpu().clone().contiguous() for key in sorted(found)}


def _base_names(root: nn.Module) -> list[str]:
    """Return the first names of all modules of the base, without the adapters."""
    own = {id(part) for layer in AdaptedModel(root).layers.values() for part in layer.lora.modules()}
    return [name for name, (part, _) in module_names(root).items() if name and id(part) not in own]


class ExportCollector:
    """Collects what an adapted module's PEFT directory will hold.

    Args:
        module: The module that holds all that was trained.
        root_name: The name in it of the model to which names are relative.
        root: That model.
    """

    def __init__(self, module: nn.Module, root_name: str, root: nn.Module) -> None:
        self.model, self.root = AdaptedModel(module), root
        self.result, self.readers = Export(root, root_name), weight_readers(list(root.modules()))
        self.names = module_names(root)
        inside = AdaptedModel(root)
        self.layers, self.done = inside.layers, set[int]()
        self.place = {id(tensor): name for name, tensor in reversed(inside.tensors.items())}
        self.model_type, self.expert_names = model_type(root), expert_names(root)

    def collect(self) -> Export:
        """Return it, with the reason for everything that PEFT cannot hold."""
        self._read_options()
        attentions = [name for name, (part, _) in self.names.items() if isinstance(part, nn.MultiheadAttention)]
        projections = {join(name, "out_proj") for name in attentions}
        for name, (part, _) in self.names.items():
            if isinstance(part, nn.MultiheadAttention):
                self._add_attention(name, part)
            elif isinstance(part, LoRALayer) and name not in projections:
                self._add_layer(name, part)
        self._add_what_trains_in_full()
        self._refuse_what_is_left()
        self._add_namesakes()
        self._refuse_unclear_names()
        self.result.layers.sort(key=lambda layer: layer.name)  # stable: parameters of one module keep their order
        self._spell_paths()
        return self.result

    def _read_options(self) -> None:
        configs = [root.attachment.config for root in self.model.roots]
        result = self.result
        result.use_rslora = all(config.use_rslora for config in configs)
        result.dropout = max(config.dropout for config in configs)
        for option in ("use_dora", "lora_bias", "bias"):
            values = {getattr(config, option) for config in configs}
            if len(values) > 1:
                result.refused[option] = f"PEFT has one value for all layers, and these have {sorted(values)}"
            setattr(result, option, max(values))

    def _refuse(self, name: str, reason: str) -> None:
        self.result.refused.setdefault(name or type(self.root).__name__, reason)

    # --- layers

    def _add_layer(self, name: str, layer: LoRALayer) -> None:
        self._mark(layer.lora)
        if (first := next(iter(layer.adapters().values()), None)) is None:
            return  # it follows an embedding whose rows train
        if not first.spec.scaling and (self.result.use_dora or isinstance(first, TokenAdapter)):
            self._refuse(name, "scaled(module, 0) has switched it off, and PEFT has no form for that; leave the block")
        if isinstance(first, TokenAdapter):
            self._add_tokens(name, layer, first)
            return
        for parameter in _in_order(layer):
            adapter = type(_adapters_of(layer, parameter)[0])
            target = join(name, parameter) if issubclass(adapter, ParameterAdapter) else name
            if reason := self._obstacle(layer, adapter, parameter) or self._obstacle_to_loading(
                name, layer, adapter, parameter
            ):
                self._refuse(target, reason)
                continue
            if name.rpartition(".")[2] in self.expert_names:
                target = join(name, parameter)
            if (factors := _whole_update(layer, parameter)).rank:
                self.result.layers.append(PeftLayer(name, target, layer, adapter, parameter, factors))

    def _obstacle(self, layer: nn.Module, adapter: type[Adapter], parameter: str) -> str | None:
        reader = self.readers.get(id(layer))
        if reader not in {None, _FUSED_IN_EVAL}:
            return (
                f"PEFT adds the update to the layer's output, but its parent, a {reader}, reads its weight; leave it "
                "out with exclude_modules, or merge the adapter"
            )
        options = {"use_dora": self.result.use_dora, "lora_bias": self.result.lora_bias}
        return adapter.peft_obstacle(layer, parameter, **options)

    def _obstacle_to_loading(self, name: str, layer: nn.Module, adapter: type[Adapter], parameter: str) -> str | None:
        """Return why PEFT cannot load an adapter that it could have made, or None."""
        last, kind = name.rpartition(".")[2], self.model_type
        if last in self.expert_names and not issubclass(adapter, ParameterAdapter):
            is_linear = issubclass(adapter, LinearAdapter) and not issubclass(adapter, Conv1DAdapter)
            if self.result.use_dora or self.result.lora_bias or not is_linear:
                return (
                    f"while PEFT loads adapters of {kind} models, it takes {last!r} in target_modules for experts, and "
                    "as a parameter it adapts only linear layers, without DoRA and lora_bias; leave it out with "
                    "exclude_modules, or merge the adapter"
                )
        own = adapter_type(layer) if issubclass(adapter, ParameterAdapter) else None
        if own and not issubclass(own, ParameterAdapter) and not self._obstacle(layer, own, parameter):
            return (
                "PEFT applies the update of a parameter only while the layer itself runs, not where its parent reads "
                "the parameter; name the layer in target_modules if it runs, or merge the adapter"
            )
        return None

    def _add_attention(self, name: str, attention: nn.MultiheadAttention) -> None:
        """PEFT adapts both projections at one rank and scaling; one that is not adapted gets an update of zero."""
        parts = {(name, "in_proj_weight"): attention, (join(name, "out_proj"), "weight"): attention.out_proj}
        adapted = {place: part for place, part in parts.items() if isinstance(part, LoRALayer)}
        for part in adapted.values():
            self._mark(part.lora)
        if not adapted:
            return
        others = [key for key in _in_order(self.layers[name]) if key != "in_proj_weight"] if name in self.layers else []
        parameter = "in_proj_weight" if attention._parameters.get("in_proj_weight") is not None else "q_proj_weight"
        reason = self._obstacle(attention, ParameterAdapter, others[0] if others else parameter)
        if reason := reason or _obstacle_of_parent(self.root, name):
            self._refuse(name, reason)
            return
        updates = {place: _whole_update(part, place[1]) for place, part in adapted.items()}
        for place, factors in updates.items():
            if place[0] != name:
                updates[place] = factors._replace(scaling=factors.scaling / TIMES_PEFT_ADDS_OUT_PROJ)
        first, rank = next(iter(updates.values())), max(factors.rank for factors in updates.values())
        for (path, parameter), projection in parts.items() if rank else ():
            height, width = base_parameter(projection, parameter).shape
            zero = Factors(first.A.new_zeros(rank, width), first.A.new_zeros(height, rank), first.scaling)
            factors = updates.get((path, parameter), zero).padded(rank).rescaled(first.scaling)
            self.result.layers.append(PeftLayer(path, name, projection, ParameterAdapter, parameter, factors))
        if rank and self.result.bias == "lora_only" and (bias := attention.out_proj.bias) is not None:
            self.result.biases[self.place[id(bias)]] = bias  # PEFT trains and saves it, whatever was adapted here

    def _add_tokens(self, name: str, layer: LoRALayer, adapter: TokenAdapter) -> None:
        followers = [other for other, each in self.layers.items() if each.lora is adapter and other != name]
        config = getattr(self.root, "config", None)
        is_input = hasattr(self.root, "get_input_embeddings") and self.root.get_input_embeddings() is layer  # type: ignore[operator]
        if followers and not (is_input and getattr(config, "tie_word_embeddings", False)):
            self._refuse(name, f"PEFT would train the rows of the embedding alone, not of {followers}, tied to it")
        self.result.tokens[name] = adapter

    # --- what trains in full, and what is left

    def _mark(self, module: nn.Module) -> None:
        self.done |= {id(tensor) for tensor in (*module.parameters(), *module.buffers())}

    def _add_what_trains_in_full(self) -> None:
        first_names = {id(part): name for name, (part, _) in self.names.items()}
        for _, owner, attachment in self.model.roots:
            modules = module_names(owner)
            for name in attachment.report.saved:
                part = modules[name][0]
                if id(part) in first_names:
                    self.result.saved[first_names[id(part)]] = part
                    self._mark(part)
            tensors = AdaptedModel(owner).tensors if attachment.base_values else {}
            for tensor in map(tensors.__getitem__, attachment.base_values):
                if isinstance(tensor, nn.Parameter) and id(tensor) in self.place:
                    self.result.biases[self.place[id(tensor)]] = tensor
                    self.done.add(id(tensor))

    def _add_namesakes(self) -> None:
        """PEFT also wraps modules whose names end as those of saved ones do: frozen ones keep the base's values."""
        saved, trained = tuple(self.result.saved), {id(tensor) for tensor in self.model.trained.values()}
        for name, (part, aliases) in self.names.items():
            own = {id(tensor) for tensor in (*part.parameters(), *part.buffers())}
            is_like = bool(saved) and name.endswith(saved) and not is_below(name, saved)
            if is_like and len(aliases) == 1 and not own & trained and not isinstance(part, CONTAINERS):
                self.result.saved[name] = part
                self.result.namesakes.append(name)

    def _refuse_what_is_left(self) -> None:
        for name, tensor in ((name, each) for name, each in self.model.trained.items() if id(each) not in self.done):
            if id(tensor) not in self.place:
                self._refuse(
                    name,
                    f"it is outside the exported model, {self.result.root_name!r}; choose another export_root, which "
                    "leaves out what trains in full elsewhere",
                )
            else:
                self._refuse(name, "PEFT does not save running statistics of frozen norms (frozen_norm='track')")

    def _spell_paths(self) -> None:
        paths = self.result.paths()
        spellings = paths_in_file(self.root, paths)
        self.result.spellings = {path: spelling for path, spelling in spellings.items() if spelling}
        for layer, path in zip(self.result.layers, paths, strict=True):
            if not spellings[path]:
                self._refuse(
                    layer.target,
                    f"while PEFT loads adapters of {self.model_type} models, it renames this layer, and then does not "
                    "find it; leave it out with exclude_modules, or merge the adapter",
                )

    def _refuse_unclear_names(self) -> None:
        requests = dict.fromkeys((layer.name for layer in self.result.layers), "target_modules")
        requests |= dict.fromkeys(self.result.tokens, "trainable_token_indices")
        requests |= dict.fromkeys(self.result.saved, "modules_to_save")
        for name, option in requests.items():
            for reason in self._name_problems(name, option):
                self._refuse(name, reason)
        self._refuse_unclear_parameters()

    def _name_problems(self, name: str, option: str) -> Iterator[str]:
        """Yield why PEFT would misunderstand a name in an option."""
        part, known_as = self.names[name]
        yield from [has_many_names(known_as)] if len(known_as) > 1 else ()
        if option == "modules_to_save" and isinstance(part, CONTAINERS):
            yield f"PEFT wraps no {type(part).__name__}; name the modules in it, or put its parameters into a module"
        if option == "target_modules" and not self.expert_names:
            return  # a regular expression can say it, of which PEFT keeps only last parts in models with experts
        wrapped = PEFTS_OWN if self.result.layers and option != "target_modules" else ()
        every = (*wrapped, *(alias for _, aliases in self.names.values() for alias in aliases))
        fine = {name, *(self.result.saved if option == "modules_to_save" else ())}
        if other := next((each for each in every if each.endswith(name) and each not in fine), None):
            own = "its own " if other in wrapped else ""
            yield f"PEFT matches {option} by the ends of names, and {own}{other!r} has the same ending"
        # PEFT leaves such layers out of target_modules.
        if option == "modules_to_save" and any(f".{name}." in f".{target}." for target in self.result.targets()):
            yield "layers inside it, or with its name, are adapted, and PEFT would skip them"

    def _refuse_unclear_parameters(self) -> None:
        mine = [layer for layer in self.result.layers if layer.by_parameter]
        every = [join(name, key) for name, (part, _) in self.names.items() for key in part._parameters]
        has_conv1d = any(issubclass(layer.adapter, Conv1DAdapter) for layer in self.result.layers)
        wrapped = {layer.name for layer in mine}
        for layer in mine:
            if outer := next((name for name in wrapped if layer.name.startswith(f"{name}.")), None):
                self._refuse(
                    layer.target, f"PEFT wraps {outer!r} for a parameter of it, and then does not find this one"
                )
            if other := next((each for each in every if each.endswith(f".{layer.target}")), None):
                self._refuse(
                    layer.target, f"PEFT matches target_parameters by the ends of names, and {other!r} ends the same"
                )
            if has_conv1d:
                self._refuse(layer.target, "PEFT cannot combine parameters with transformers' Conv1D (fan_in_fan_out)")
            for name in self.result.saved:
                if name.startswith(f"{layer.name}."):
                    self._refuse(name, f"PEFT wraps {layer.name!r} first, and then does not find this module")


def _obstacle_of_parent(root: nn.Module, name: str) -> str | None:
    """Return why PEFT's wrapper of an attention would not do for its parent, or None."""
    path, _, child = name.rpartition(".")
    kind = type(root.get_submodule(path))
    try:
        source = inspect.getsource(kind.forward)
    except (OSError, TypeError):
        return None
    own = rf"self\.{re.escape(child)}\b"
    if name and re.search(rf"isinstance\(\s*{own}|{own}\.(in_proj|out_proj|[qkv]_proj)_?", source):
        return (
            f"{kind.__name__} reads the weights or checks the class of this attention, and PEFT wraps it in another "
            "class that applies its update only when called; merge the adapter"
        )
    return None


def _in_order(layer: LoRALayer) -> list[str]:
    """Return the adapted weights of a layer in the order in which they are registered."""
    adapted = {adapter.parameter for adapter in layer.adapters().values()}
    registered = [name for name in layer._parameters if name in adapted]
    return registered + sorted(adapted - set(registered))


def _adapters_of(layer: LoRALayer, parameter: str) -> list[LowRankAdapter]:
    return cast(list[LowRankAdapter], [each for each in layer.adapters().values() if each.parameter == parameter])


@torch.no_grad()
def _whole_update(layer: LoRALayer, parameter: str) -> Factors:
    """Return the update of a whole weight, from one adapter or from those of its slices."""
    adapters = _adapters_of(layer, parameter)
    first = adapters[0]
    if not first.spec.rows:
        return factors_of(first)
    weight = first.as_matrix(base_parameter(layer, parameter).detach()).to(
        torch.promote_types(first.A.dtype, torch.float32)
    )
    norms = torch.linalg.vector_norm(weight, dim=1) if first.spec.use_dora else None
    return placed([(adapter.index, factors_of(adapter)) for adapter in adapters], weight.shape[0], norms)
