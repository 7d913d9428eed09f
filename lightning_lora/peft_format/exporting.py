"""What a PEFT directory holds of one model: layers, tokens, modules and biases, as a config and as tensors."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import Tensor, nn

from lightning_lora.config import Bias
from lightning_lora.layers import Adapter, TokenAdapter, lora_layers
from lightning_lora.layers.linear import Conv1DAdapter
from lightning_lora.names import listed, module_names
from lightning_lora.peft_format.config import LAST_KNOWN_PEFT_TEXT
from lightning_lora.peft_format.factors import Factors, Geometry, to_file
from lightning_lora.peft_format.names import PREFIX, TOKENS_SUFFIX, live_path, tensors_in_full
from lightning_lora.peft_format.patterns import Scaled, numbers_for, targets_for


class ExportedLayer(NamedTuple):
    """One update as PEFT sees it.

    Attributes:
        name: The layer's name.
        target: The name that PEFT's patterns are matched with: the layer's, or the parameter's.
        module: The layer.
        adapter: The kind of adapter.
        parameter: What it updates.
        by_parameter: Whether ``target_parameters`` names it.
        geometry: What decides its shapes.
        factors: The update.
    """

    name: str
    target: str
    module: nn.Module
    adapter: type[Adapter]
    parameter: str
    by_parameter: bool
    geometry: Geometry
    factors: Factors


@dataclass
class Export:
    """Everything that was trained, under names relative to the exported model.

    Attributes:
        root: The exported model.
        root_name: Its name in the module that was given.
        layers: The low-rank updates.
        tokens: Embeddings of which rows train.
        saved: Modules trained in full.
        biases: Biases of the base that train, by the names of their parameters.
        refused: Name -> why PEFT cannot hold it.
        is_partial: Whether the model has other modules, so that only full names mean these.
    """

    root: nn.Module
    root_name: str
    layers: list[ExportedLayer] = field(default_factory=list)
    tokens: dict[str, TokenAdapter] = field(default_factory=dict)
    saved: dict[str, nn.Module] = field(default_factory=dict)
    biases: dict[str, Tensor] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)
    is_partial: bool = False
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
        layers = {
            layer.target: Scaled(layer.target, layer.factors.rank, layer.factors.scaling) for layer in self.layers
        }
        return numbers_for([layers[name] for name in sorted(layers)], use_rslora=self.use_rslora)

    def targets(self) -> list[str]:
        """Return the names of the layers that ``target_modules`` names."""
        return sorted({layer.target for layer in self.layers if not layer.by_parameter})

    def config(self, base_model_name_or_path: str | None) -> dict[str, Any]:
        """Return what ``adapter_config.json`` says."""
        parameters = sorted(layer.target for layer in self.layers if layer.by_parameter)
        tokens = {name: [int(token) for token in adapter.index] for name, adapter in sorted(self.tokens.items())}
        return self.numbers() | {
            "base_model_name_or_path": base_model_name_or_path,
            "bias": self.bias if self.biases else "none",
            "fan_in_fan_out": any(issubclass(layer.adapter, Conv1DAdapter) for layer in self.layers),
            "inference_mode": True,
            "init_lora_weights": True,
            "lora_bias": self.lora_bias,
            "lora_dropout": self.dropout,
            "modules_to_save": sorted(self.saved) or None,
            "peft_type": "LORA",
            "peft_version": LAST_KNOWN_PEFT_TEXT,
            "target_modules": self.targets()
            if self.is_partial
            else targets_for(self.targets(), _base_names(self.root)),
            "target_parameters": parameters or None,
            "task_type": None,
            "trainable_token_indices": tokens or None,
            "use_dora": self.use_dora,
        }

    def caveats(self) -> list[str]:
        """Return what is right in the files and yet may surprise with some PEFT."""
        by_name = {layer.name: layer for layer in self.layers}
        doubled = [layer.name for layer in self.layers if layer.name != layer.target and not layer.by_parameter]
        found = []
        if any(by_name[name].factors.B.count_nonzero() for name in doubled):
            found.append(
                f"PEFT up to {LAST_KNOWN_PEFT_TEXT} adds the update of attention's output projection twice, so the "
                f"files hold half of it; a PEFT that adds it once computes something else ({listed(doubled)})."
            )
        encoders = {name for name, part in self.root.named_modules() if isinstance(part, nn.TransformerEncoderLayer)}
        if inside := [name for name in by_name if name.rpartition(".")[0] in encoders]:
            found.append(
                f"In eval mode torch's fused encoder reads the weights past PEFT's adapters of {listed(inside)}; call "
                "PEFT's merge_and_unload before using them."
            )
        return found

    def tensors(self) -> dict[str, Tensor]:
        """Return what ``adapter_model.safetensors`` holds, in the order of the keys."""
        wrappers = self._wrappers()
        found: dict[str, Tensor] = {}
        for layer, wrapped in self._by_depth(wrappers):
            found |= to_file(wrapped, layer.factors, layer.geometry)
        for name, adapter in self.tokens.items():
            found[name + TOKENS_SUFFIX] = adapter.rows
        for name, module in self.saved.items():
            found |= tensors_in_full(name, module)
        found |= {live_path(name, wrappers): tensor for name, tensor in self.biases.items()}
        # Copies, since a file cannot hold one tensor twice.
        return {PREFIX + key: found[key].detach().cpu().clone().contiguous() for key in sorted(found)}

    def _wrappers(self) -> dict[str, int]:
        """Return how often PEFT will have wrapped each module."""
        count: dict[str, int] = {}
        for layer in self.layers:
            count[layer.name] = count.get(layer.name, 0) + 1
        return count

    def _by_depth(self, wrappers: Mapping[str, int]) -> Iterator[tuple[ExportedLayer, str]]:
        """Yield each update with its place: of several on one module, PEFT wraps the first registered innermost."""
        left = dict(wrappers)
        for layer in self.layers:
            left[layer.name] -= 1
            yield layer, live_path(layer.name, wrappers) + ".base_layer" * left[layer.name]


def _base_names(root: nn.Module) -> list[str]:
    """Return the first names of all modules of the base, without the adapters."""
    own = {id(part) for layer in lora_layers(root).values() for part in layer.lora.modules()}
    return [name for name, (part, _) in module_names(root).items() if name and id(part) not in own]
