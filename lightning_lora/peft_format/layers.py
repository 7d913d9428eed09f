"""The low-rank updates of a PEFT file: of which layers they are, and whether they fit."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import NamedTuple

from torch import Tensor, nn

from lightning_lora.layers import Adapter, ParameterAdapter, adapter_type, parameter_adapter
from lightning_lora.names import ModuleNames, join
from lightning_lora.peft_format.config import (
    LAST_KNOWN_PEFT,
    LAST_KNOWN_PEFT_TEXT,
    TIMES_PEFT_ADDS_OUT_PROJ,
    PeftConfig,
)
from lightning_lora.peft_format.factors import Factors, Geometry, from_file, shapes_in_file
from lightning_lora.peft_format.names import parameters_named, without_wrappers


class ImportedLayer(NamedTuple):
    """One update that a file brings.

    Attributes:
        name: The layer's name.
        parameter: What it updates.
        by_parameter: Whether ``target_parameters`` names it.
        label: What the adapter will be called.
        factors: The update.
    """

    name: str
    parameter: str
    by_parameter: bool
    label: str
    factors: Factors


class LayerReader:
    """Reads layer by layer, and collects what does not fit.

    Attributes:
        layers: What was read.
        problems: What does not fit.
    """

    def __init__(self, names: ModuleNames, config: PeftConfig, tensors: Mapping[str, Tensor]) -> None:
        self.config, self.tensors = config, tensors
        self.variant = {"use_dora": config.use_dora, "lora_bias": config.lora_bias}
        self.names = names
        self.modules = {alias: part for part, aliases in self.names.values() for alias in aliases}
        self.first = {alias: name for name, (_, aliases) in self.names.items() for alias in aliases}
        self.layers: list[ImportedLayer] = []
        self.problems: list[str] = []

    def read(self, path: str, keys: Collection[str]) -> None:
        """Read the layer at a path of the file, or note why it does not fit."""
        place = without_wrappers(path, self.modules)
        if place is None:
            self.problems.append(f"the model has no module {path!r}")
            return
        name, depth = self.first[place[0]], place[1]
        module = self.modules[name]
        chosen = self._chosen(name, module, depth, path)
        if isinstance(chosen, str):
            self.problems.append(f"{path}: {chosen}")
            return
        adapter, parameter, target = chosen
        if reason := adapter.peft_obstacle(module, parameter, **self.variant):
            self.problems.append(f"{path}: {reason}")
            return
        geometry = Geometry.of(adapter, module, parameter)
        expected = shapes_in_file(path, geometry, self.config.rank_of(target), **self.variant)
        problems = list(differences(expected, {key: self.tensors[key] for key in sorted(keys)}))
        problems = problems or list(self._differences_of_function(path, name, target))
        self.problems += problems
        if not problems:
            label = join(name, parameter) if issubclass(adapter, ParameterAdapter) else name
            factors = from_file(path, self.tensors, geometry, self._scaling(name, target, parameter))
            # PEFT allows more than the weight's own rank, which adds nothing to what can be computed.
            factors = factors.within(min(geometry.out_features, geometry.in_features))
            by_parameter = target == join(name, parameter)
            self.layers.append(ImportedLayer(name, parameter, by_parameter, label, factors))

    def _scaling(self, name: str, target: str, parameter: str) -> float:
        is_projection = target not in (name, join(name, parameter))
        return (TIMES_PEFT_ADDS_OUT_PROJ if is_projection else 1) * self.config.scaling_of(target)

    def _differences_of_function(self, path: str, name: str, target: str) -> Iterator[str]:
        """Yield why PEFT computes something else with this layer than we would."""
        aliases = self.names[name][1]
        if len(aliases) > 1:
            yield f"{path}: the model reaches it by {len(aliases)} names ({', '.join(aliases)}), and PEFT adapts one"
        parent, _, last = name.rpartition(".")
        if last == "out_proj" and isinstance(self.modules.get(parent), nn.MultiheadAttention):
            written = self.config.peft_version
            if target == name and self.tensors[f"{path}.lora_B.weight"].any():
                yield f"{path}: PEFT never applies an adapter of attention's output projection alone"
            elif target == parent and written > LAST_KNOWN_PEFT:
                yield (
                    f"{path}: PEFT up to {LAST_KNOWN_PEFT_TEXT} adds this update twice, and it is unknown whether "
                    f"{'.'.join(map(str, written))}, which wrote the file, still does"
                )

    def _chosen(self, name: str, module: nn.Module, depth: int, path: str) -> tuple[type[Adapter], str, str] | str:
        """Return the kind of adapter, the parameter and the name that patterns mean, or why there is none."""
        if parameters := parameters_named(name, module, self.config.target_parameters):
            if depth >= len(parameters):
                return f"there are more of them than the {len(parameters)} of target_parameters on this module"
            parameter = parameters[len(parameters) - 1 - depth]
            return parameter_adapter(module, parameter), parameter, join(name, parameter)
        adapter = adapter_type(module)
        if adapter is None or depth:
            return f"{name!r} is a {type(module).__name__}, which has no adapter of this kind"
        parent = self.modules.get(name.rpartition(".")[0])
        # Of attention PEFT adapts both projections, under the one name.
        of_attention = isinstance(parent, nn.MultiheadAttention) and path != name
        target = name.rpartition(".")[0] if of_attention else name
        return adapter, adapter.parameters_of(module)[0], target


def differences(
    expected: Mapping[str, tuple[int, ...]], found: Mapping[str, Tensor], like: Mapping[str, Tensor] | None = None
) -> Iterator[str]:
    """Yield how tensors differ from what they must be; ``like`` says which need not be in floating point."""
    for key in sorted(expected.keys() - found.keys()):
        yield f"{key}: missing from the file"
    for key, tensor in found.items():
        if key not in expected:
            yield f"{key}: not expected here; use_dora, lora_bias or the kind of layer says otherwise"
        elif tuple(tensor.shape) != expected[key]:
            yield f"{key}: file {shown(tensor)}, expected {expected[key]}"
        elif not tensor.is_floating_point() and (like is None or like[key].dtype != tensor.dtype):
            yield f"{key}: file {shown(tensor)}, expected floating point"


def shown(tensor: Tensor) -> str:
    """Return a tensor's shape and precision, for messages."""
    return f"{tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"
