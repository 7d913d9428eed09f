"""From what a PEFT directory holds to adapters in a model; everything is checked before the model is touched."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lightning_lora.attachment import named_tensors
from lightning_lora.config import LoRAConfig
from lightning_lora.layers import adapter_type
from lightning_lora.names import ModuleNames, join, listed, module_names, parameter_names, tied_names
from lightning_lora.peft_format.directory import PeftFile
from lightning_lora.peft_format.layers import ImportedLayer, LayerReader, differences, shown
from lightning_lora.peft_format.names import PREFIX, tensors_in_full, without_wrappers
from lightning_lora.peft_format.patterns import Scaled, lora_config, targets_for
from lightning_lora.planning.obstacles import weight_readers
from lightning_lora.storage.adapter_file import StoredTokens


@dataclass
class Import:
    """What a file brings to a model.

    Attributes:
        make_config: Gives ``config``.
        layers: The low-rank updates.
        tokens: Embedding -> its tokens in ascending order, and their rows.
        values: Name of a parameter or buffer that was trained in full -> its value.
    """

    make_config: Callable[[], LoRAConfig]
    layers: list[ImportedLayer] = field(default_factory=list)
    tokens: dict[str, tuple[tuple[int, ...], Tensor]] = field(default_factory=dict)
    values: dict[str, Tensor] = field(default_factory=dict)

    @functools.cached_property
    def config(self) -> LoRAConfig:
        """What to attach; not needed, and not made, where a model has such adapters already."""
        return self.make_config()


def make_import(root: nn.Module, file: PeftFile, names: ModuleNames | None = None) -> Import:
    """Return what a file means for a model.

    Args:
        root: The model to which the file's names are relative.
        file: The adapter.
        names: The root's ``module_names``, where they are at hand.

    Raises:
        ValueError: They do not fit; one error lists all.
    """
    reader = _Importer(root, file, module_names(root) if names is None else names)
    found = reader.read()
    if reader.problems:
        raise ValueError("\n".join(f"  - {problem}" for problem in reader.problems))
    return found


class _Importer:
    def __init__(self, root: nn.Module, file: PeftFile, names: ModuleNames) -> None:
        self.root, self.file, self.config, self.tensors = root, file, file.config, file.tensors
        self.problems: list[str] = []
        if file.alien:
            self.problems.append(f"keys that do not begin with {PREFIX!r}: {listed(file.alien)}")
        if broken := [key for key, tensor in self.tensors.items() if tensor.is_complex() or tensor.is_quantized]:
            self.problems.append(f"tensors of a kind that no adapter has: {listed(broken)}")
        self.reader = LayerReader(names, file.config, self.tensors)
        self.names, self.modules, self.first = self.reader.names, self.reader.modules, self.reader.first
        self.layers = self.reader.layers
        self.tokens: dict[str, tuple[tuple[int, ...], Tensor]] = {}
        self.values: dict[str, Tensor] = {}

    def read(self) -> Import:
        keys = set(self.tensors)
        for path, mine in sorted(self.file.keys_by_path.items()):
            self.reader.read(path, mine)
            keys -= set(mine)
        self.problems += self.reader.problems
        for name, stored in self.file.tokens.items():
            self._read_tokens(name, stored)
            keys.remove(stored.key)
        self._check_requested_tokens()
        keys -= self._read_saved_modules(keys)
        biases = self._read_the_rest(keys)
        if not (self.layers or self.tokens or self.problems):
            self.problems.append("the file holds no adapter")
        if self.problems:
            return Import(LoRAConfig)
        return Import(
            functools.partial(self._lora_config, has_biases=bool(biases)), self.layers, self.tokens, self.values
        )

    # --- tokens

    def _read_tokens(self, name: str, stored: StoredTokens) -> None:
        rows, wanted, _, key = stored
        module = self.modules.get(name)
        if not isinstance(module, nn.Embedding):
            self.problems.append(f"{key}: the model has no embedding {name!r}")
        elif wanted is None:
            self.problems.append(f"{key}: trainable_token_indices does not say which tokens these are")
        elif tuple(rows.shape) != (len(wanted), module.embedding_dim) or not rows.is_floating_point():
            self.problems.append(
                f"{key}: file {shown(rows)}, expected {(len(wanted), module.embedding_dim)} for {len(wanted)} tokens"
            )
        else:
            order = sorted(range(len(wanted)), key=wanted.__getitem__)
            self.tokens[self.first[name]] = (tuple(sorted(wanted)), rows[torch.tensor(order)])

    def _check_requested_tokens(self) -> None:
        wanted = self.config.trainable_token_indices
        entries = list(wanted) if isinstance(wanted, Mapping) else [""] * bool(wanted)
        for entry in entries:
            if not any(name.endswith(entry) for name in self.tokens) and not self.problems:
                self.problems.append(f"trainable_token_indices={entry or wanted!r}: the file has no rows for it")

    # --- what was trained in full

    def _saved_modules(self) -> dict[str, nn.Module]:
        """Return the modules that PEFT's ``modules_to_save`` names: by the ends of their names."""
        entries = self.config.modules_to_save
        found = {name: part for name, (part, _) in self.names.items() if name and entries and name.endswith(entries)}
        return {name: part for name, part in found.items() if not any(name.startswith(f"{other}.") for other in found)}

    def _read_saved_modules(self, keys: Collection[str]) -> set[str]:
        used: set[str] = set()
        for name, part in self._saved_modules().items():
            expected = tensors_in_full(name, part)
            found = {key: self.tensors[key] for key in keys if key in expected}
            # Beside bias="all" PEFT also writes the biases under the names that they have inside of its wrapper.
            used |= found.keys() | {
                key for key in keys if key.startswith((f"{name}.original_module.", f"{name}.modules_to_save."))
            }
            shapes = {key: tuple(tensor.shape) for key, tensor in expected.items()}
            problems = list(differences(shapes, found, like=expected))
            self.problems += problems
            if not problems:
                self.values |= found
        return used

    def _read_the_rest(self, keys: Collection[str]) -> set[str]:
        """Read biases, and let values of the frozen base pass that are what the model has."""
        live, biases = named_tensors(self.root) if keys else {}, set[str]()
        for key in sorted(keys):
            path, _, last = key.rpartition(".")
            place = without_wrappers(path, self.modules)
            name = join(place[0], last) if place else None
            value, tensor = live.get(name or ""), self.tensors[key]
            if name is None or value is None:
                self.problems.append(f"{key}: the model has no such tensor")
            elif problems := list(differences({key: tuple(value.shape)}, {key: tensor}, like={key: value})):
                self.problems += problems
            elif "bias" in last and self.config.bias != "none":
                self.values[name] = tensor
                biases.add(name)
            elif not torch.equal(tensor.to(value.dtype), value.detach().cpu()):
                self.problems.append(f"{key}: the file brings other values for this frozen tensor; it needs that base")
        return biases

    # --- our config

    def _lora_config(self, *, has_biases: bool) -> LoRAConfig:
        by_name = [layer.name for layer in self.layers if not layer.by_parameter]
        options: dict[str, Any] = {
            "bias": self.config.bias if has_biases else "none",
            "dropout": self.config.dropout,
            "modules_to_save": sorted(self._saved_modules()),
            "target_modules": targets_for(by_name, list(self.modules)),
            "target_parameters": sorted(layer.label for layer in self.layers if layer.by_parameter),
            "trainable_token_indices": {name: tokens for name, (tokens, _) in sorted(self.tokens.items())},
        }
        tied = tied_names(parameter_names(self.modules))
        options["untie_weights"] = any(join(layer.name, layer.parameter) in tied for layer in self.layers)
        if self.config.dropout and (carried := list(self._carried_by_weight())):
            # As in PEFT, which makes a dropout for attention and never applies it.
            warnings.warn(
                f"lora_dropout={self.config.dropout} is left out: the update of {listed(carried)} is in the weight.",
                stacklevel=8,
            )
            options["dropout"] = 0.0
        layers = [Scaled(layer.label, layer.factors.rank, layer.factors.scaling) for layer in self.layers]
        return lora_config(self.config, layers, **options)

    def _carried_by_weight(self) -> Iterator[str]:
        readers = weight_readers(self.modules.values())
        for layer in self.layers:
            module = self.modules[layer.name]
            adapter = adapter_type(module)
            if id(module) in readers or layer.by_parameter or (adapter and adapter.needs_weight(module)):
                yield layer.label
