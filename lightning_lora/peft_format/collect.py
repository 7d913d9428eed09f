"""From an adapted model to its export, with the reason for everything that PEFT cannot hold."""

from __future__ import annotations

from typing import cast

import torch
from torch import nn

from lightning_lora.attachment import attachments, named_tensors
from lightning_lora.layers import (
    Adapter,
    LoRALayer,
    LowRankAdapter,
    ParameterAdapter,
    TokenAdapter,
    base_parameter,
    lora_layers,
)
from lightning_lora.layers.linear import Conv1DAdapter
from lightning_lora.names import join, module_names
from lightning_lora.peft_format.config import TIMES_PEFT_ADDS_OUT_PROJ
from lightning_lora.peft_format.exporting import Export, ExportedLayer
from lightning_lora.peft_format.factors import Factors, Geometry, factors_of, no_update, placed
from lightning_lora.peft_format.support import name_problems
from lightning_lora.state import adapter_tensors


def make_export(module: nn.Module, root_name: str, root: nn.Module) -> Export:
    """Return what an adapted module's PEFT directory will hold.

    Args:
        module: The module that holds all that was trained.
        root_name: The name in it of the model to which names are relative.
        root: That model.
    """
    return _Collector(module, root_name, root).collect()


class _Collector:
    def __init__(self, module: nn.Module, root_name: str, root: nn.Module) -> None:
        self.module, self.root = module, root
        self.result = Export(root, root_name)
        self.names = module_names(root)
        self.layers = lora_layers(root)
        self.place = {id(tensor): name for name, tensor in reversed(named_tensors(root).items())}
        self.done: set[int] = set()

    def collect(self) -> Export:
        self._read_options()
        for name, (part, _) in self.names.items():
            if isinstance(part, nn.MultiheadAttention):
                self._add_attention(name, part)
            elif isinstance(part, LoRALayer) and name not in self._projections():
                self._add_layer(name, part)
        self._add_what_trains_in_full()
        self._refuse_what_is_left()
        self._refuse_unclear_names()
        self.result.layers.sort(key=lambda layer: layer.name)  # stable: parameters of one module keep their order
        return self.result

    def _read_options(self) -> None:
        configs = [attachment.config for _, _, attachment in attachments(self.module)]
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

    def _projections(self) -> set[str]:
        return {
            join(name, "out_proj") for name, (part, _) in self.names.items() if isinstance(part, nn.MultiheadAttention)
        }

    def _add_layer(self, name: str, layer: LoRALayer) -> None:
        adapters = layer.adapters()
        self._mark(layer.lora)
        if not adapters:
            return  # it follows an embedding whose rows train
        token_adapter = next(iter(adapters.values()))
        if isinstance(token_adapter, TokenAdapter):
            self._add_tokens(name, layer, token_adapter)
            return
        for parameter in _in_order(layer):
            adapter = type(_adapters_of(layer, parameter)[0])
            by_parameter = issubclass(adapter, ParameterAdapter)
            if reason := self._obstacle(layer, adapter, parameter):
                self._refuse(join(name, parameter) if by_parameter else name, reason)
                continue
            target = join(name, parameter) if by_parameter else name
            geometry = Geometry.of(adapter, layer, parameter)
            factors = _whole_update(layer, parameter)
            self.result.layers.append(
                ExportedLayer(name, target, layer, adapter, parameter, by_parameter, geometry, factors)
            )

    def _obstacle(self, layer: nn.Module, adapter: type[Adapter], parameter: str) -> str | None:
        options = {"use_dora": self.result.use_dora, "lora_bias": self.result.lora_bias}
        return adapter.peft_obstacle(layer, parameter, **options)

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
        if reason := self._obstacle(attention, ParameterAdapter, others[0] if others else parameter):
            self._refuse(name, reason)
            return
        updates = {place: _whole_update(part, place[1]) for place, part in adapted.items()}
        for place, factors in updates.items():
            if place[0] != name:
                updates[place] = factors._replace(scaling=factors.scaling / TIMES_PEFT_ADDS_OUT_PROJ)
        first, rank = next(iter(updates.values())), max(factors.rank for factors in updates.values())
        for (path, parameter), projection in parts.items():
            geometry = Geometry(*base_parameter(projection, parameter).shape)
            factors = updates.get((path, parameter)) or no_update(geometry, rank, first.scaling, first.A)
            factors = factors.padded(rank).rescaled(first.scaling)
            self.result.layers.append(
                ExportedLayer(path, name, projection, ParameterAdapter, parameter, False, geometry, factors)
            )

    def _add_tokens(self, name: str, layer: LoRALayer, adapter: TokenAdapter) -> None:
        followers = [other for other, each in self.layers.items() if each.lora is adapter and other != name]
        config = getattr(self.root, "config", None)
        is_input = hasattr(self.root, "get_input_embeddings") and self.root.get_input_embeddings() is layer  # type: ignore[operator]
        if followers and not (is_input and getattr(config, "tie_word_embeddings", False)):
            self._refuse(
                name, f"PEFT would train the rows of the embedding alone, not of {followers}, which is tied to it"
            )
        self.result.tokens[name] = adapter

    # --- what trains in full, and what is left

    def _mark(self, module: nn.Module) -> None:
        self.done |= {id(tensor) for tensor in (*module.parameters(), *module.buffers())}

    def _add_what_trains_in_full(self) -> None:
        first_names = {id(part): name for name, (part, _) in self.names.items()}
        for _, owner, attachment in attachments(self.module):
            modules = module_names(owner)
            for name in attachment.saved_modules:
                part = modules[name][0]
                if id(part) in first_names:
                    self.result.saved[first_names[id(part)]] = part
                    self._mark(part)
            tensors = named_tensors(owner) if attachment.base_values else {}
            for name in attachment.base_values:
                tensor = tensors[name]
                if isinstance(tensor, nn.Parameter) and id(tensor) in self.place:
                    self.result.biases[self.place[id(tensor)]] = tensor
                    self.done.add(id(tensor))

    def _refuse_what_is_left(self) -> None:
        for name, tensor in adapter_tensors(self.module).items():
            if id(tensor) in self.done:
                continue
            if id(tensor) not in self.place:
                self._refuse(
                    name,
                    f"it lies outside of the exported model, {self.result.root_name!r}; choose another export_root",
                )
            else:
                self._refuse(name, "PEFT saves no running statistics of frozen norms (frozen_norm='track')")

    def _refuse_unclear_names(self) -> None:
        all_names = [alias for _, aliases in self.names.values() for alias in aliases]
        requests = dict.fromkeys((layer.name for layer in self.result.layers), "target_modules")
        requests |= dict.fromkeys(self.result.tokens, "trainable_token_indices")
        requests |= dict.fromkeys(self.result.saved, "modules_to_save")
        for name, option in requests.items():
            aliases = self.names[name][1] if name else (name,)
            for reason in name_problems(
                name, aliases, option=option, all_names=all_names, targets=self.result.targets()
            ):
                self._refuse(name, reason)
        self._refuse_unclear_parameters()

    def _refuse_unclear_parameters(self) -> None:
        mine = [layer for layer in self.result.layers if layer.by_parameter]
        every = [join(name, key) for name, (part, _) in self.names.items() for key in part._parameters]
        has_conv1d = any(issubclass(layer.adapter, Conv1DAdapter) for layer in self.result.layers)
        for layer in mine:
            if other := next((each for each in every if each.endswith(f".{layer.target}")), None):
                self._refuse(
                    layer.target, f"PEFT lets target_parameters match the ends of names, and {other!r} ends so too"
                )
            if has_conv1d:
                self._refuse(layer.target, "PEFT combines no parameters with transformers' Conv1D (fan_in_fan_out)")
            for name in self.result.saved:
                if name.startswith(f"{layer.name}."):
                    self._refuse(name, f"PEFT wraps {layer.name!r} first, and then finds no module of this name")


def _in_order(layer: LoRALayer) -> list[str]:
    """Return the adapted weights of a layer in the order in which they are registered."""
    adapted = {adapter.parameter for adapter in layer.adapters().values()}
    registered = [name for name in layer._parameters if name in adapted]
    return registered + sorted(adapted - set(registered))


def _adapters_of(layer: LoRALayer, parameter: str) -> list[LowRankAdapter]:
    found = [adapter for adapter in layer.adapters().values() if adapter.parameter == parameter]
    return cast(list[LowRankAdapter], found)


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
