"""Match a PEFT directory with a model; everything is checked before the model is changed."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping

import torch
from torch import Tensor, nn

from lightning_lora.adapted_model import AdaptedModel
from lightning_lora.config import LoRAConfig
from lightning_lora.layers import (
    Adapter,
    LoRALayer,
    LowRankAdapter,
    ParameterAdapter,
    adapter_type,
    parameter_adapter,
    weight_readers,
)
from lightning_lora.layers.linear import LinearAdapter
from lightning_lora.layers.norm import weights_only_read
from lightning_lora.names import ModuleNames, clean_name, join, listed, module_names, parameter_names, tied_names
from lightning_lora.peft_format.config import (
    LAST_KNOWN_PEFT,
    LAST_KNOWN_PEFT_TEXT,
    TIMES_PEFT_ADDS_OUT_PROJ,
    numbers_for,
    targets_for,
)
from lightning_lora.peft_format.directory import PeftFile
from lightning_lora.peft_format.factors import Geometry, PeftLayer, from_file, shapes_in_file
from lightning_lora.peft_format.names import (
    PREFIX,
    expert_names,
    has_many_names,
    likely_roots,
    parameters_named,
    paths_in_model,
    tails,
    tensors_in_full,
    without_wrappers,
)
from lightning_lora.state import check_base_values, has_base_values
from lightning_lora.storage.adapter_file import StoredTokens


def import_into(module: nn.Module, file: PeftFile, *, check_base: bool = True) -> Import:
    """Match a file with the model inside a module that it is for.

    Args:
        module: The module that holds the model.
        file: The adapter.
        check_base: As in ``load_adapter``.

    Raises:
        ValueError: The file does not fit the module, or its base.
    """
    names_of = functools.cache(module_names)
    root = matching_root(module, file, names_of)
    names = names_of(root)
    try:
        with weights_only_read(part for part, _ in names.values()):
            content = make_import(root, file, names)
    except ValueError as error:
        raise ValueError(
            f"The adapter in {str(file.path)!r} does not fit this {type(root).__name__}; nothing was changed:\n{error}"
        ) from None
    if check_base:
        check_base_values(AdaptedModel(module), file.base, root)
    return content


def matching_root(
    module: nn.Module, file: PeftFile, names_of: Callable[[nn.Module], ModuleNames] = module_names
) -> nn.Module:
    """Return the model inside a module that a file is for: it has a module at each path, and the recorded values.

    If none has those values, or the file records none, the model is found by its recorded name, then as for an export.
    Of several that fit equally well, it is the one that has adapters, if only one has.

    Args:
        module: The module.
        file: The adapter.
        names_of: As ``module_names``.

    Raises:
        ValueError: Several models fit equally well.
    """

    @functools.cache
    def has_all(part: nn.Module) -> bool:
        names = {alias for _, aliases in names_of(part).values() for alias in aliases}
        return file.paths <= names or all(without_wrappers(path, names) for path in file.paths)

    inside = {alias: part for part, aliases in names_of(module).values() for alias in aliases}
    recorded = [(name, inside[name]) for name in tails(file.root) if name in inside] if file.root is not None else []
    likely, itself = likely_roots(module, has_all), ("", module)
    # Whoever wrote the file may have wrapped the model at another depth.
    ranked = [*([each] for each in recorded), likely, [itself], list(module.named_children())]
    best: list[tuple[str, nn.Module]] = []
    for parts in ranked:
        fitting = [(name, part) for name, part in parts if has_all(part)]
        if having := [(name, part) for name, part in fitting if file.base and has_base_values(part, file.base)]:
            best = having
            break
        best = best or fitting
        if best and not file.base:
            break
    best = best or [*likely, itself][:1]
    adapted = [(name, part) for name, part in best if AdaptedModel(part).layers] if len(best) > 1 else []
    best = adapted if len(adapted) == 1 else best
    if len(best) > 1:
        raise ValueError(
            f"The adapter in {str(file.path)!r} fits several parts of this {type(module).__name__}: "
            f"{listed([name for name, _ in best])}. Nothing was changed. Load it into one of them, as in "
            f"load_adapter(model.{best[0][0]}, ...), or give its layers their full names: lightning-lora import "
            f"DIRECTORY FILE.ckpt --root {best[0][0]}."
        )
    return best[0][1]


def make_import(root: nn.Module, file: PeftFile, names: ModuleNames | None = None) -> Import:
    """Return a file's content matched with a model.

    Args:
        root: The model to which the file's names are relative.
        file: The adapter.
        names: The root's ``module_names``, if already known.

    Raises:
        ValueError: They do not fit; one error lists all.
    """
    content = Import(root, file, module_names(root) if names is None else names)
    if content.problems:
        raise ValueError("\n".join(f"  - {problem}" for problem in content.problems))
    return content


class Import:
    """The content of a file, matched with a model.

    Attributes:
        root: The model.
        layers: The low-rank updates.
        tokens: Embedding -> its tokens in ascending order, and their rows.
        values: Name of a parameter or buffer that was trained in full -> its value.
        problems: The mismatches.
    """

    def __init__(self, root: nn.Module, file: PeftFile, names: ModuleNames) -> None:
        self.root, self.names = root, names
        self.modules = {alias: part for part, aliases in names.values() for alias in aliases}
        self.first = {alias: name for name, (_, aliases) in names.items() for alias in aliases}
        self.peft, self.tensors, self.paths = file.config, file.tensors, file.keys_by_path
        self.variant = {"use_dora": file.config.use_dora, "lora_bias": file.config.lora_bias}
        self.layers: list[PeftLayer] = []
        self.tokens: dict[str, tuple[tuple[int, ...], Tensor]] = {}
        self.values: dict[str, Tensor] = {}
        self.problems: list[str] = []
        self._read(file)

    def _read(self, file: PeftFile) -> None:
        if file.alien:
            self.problems.append(f"keys without the prefix {PREFIX!r}: {listed(file.alien)}")
        complex_factors = {key for key, tensor in self.tensors.items() if tensor.is_complex() and ".lora_" in key}
        if broken := [key for key, each in self.tensors.items() if each.is_quantized or key in complex_factors]:
            self.problems.append(f"complex or quantized tensors, which no adapter holds: {listed(broken)}")
        keys = set(self.tensors)
        for path, mine in sorted(file.keys_by_path.items()):
            self._read_layer(path, mine)
            keys -= set(mine)
        for name, stored in file.tokens.items():
            self._read_tokens(name, stored)
            keys.remove(stored.key)
        self._check_requested_tokens()
        keys -= self._read_saved_modules(keys)
        self.has_biases = self._read_the_rest(keys)
        if not (self.layers or self.tokens or self.problems):
            self.problems.append("the file holds no adapter")

    # --- the layers

    def _read_layer(self, path: str, keys: Collection[str]) -> None:
        place = without_wrappers(path, self.modules) or without_wrappers(self._loaded_paths[path], self.modules)
        if place is None:
            self.problems.append(f"the model has no module {path!r}")
            return
        name, depth = self.first[place[0]], place[1]
        module = self.modules[name]
        if (chosen := self._chosen(name, module, depth, path)) is None:
            return
        adapter, parameter, target = chosen
        if reason := adapter.peft_obstacle(module, parameter, **self.variant):
            self.problems.append(f"{path}: {reason}")
            return
        geometry = Geometry.of(adapter, module, parameter)
        expected = shapes_in_file(path, geometry, self.peft.rank_of(target), **self.variant)
        problems = list(_differences(expected, {key: self.tensors[key] for key in sorted(keys)}))
        problems = problems or list(self._other_functions(path, name, target))
        self.problems += problems
        if not problems:
            factors = from_file(path, self.tensors, geometry, self._scaling(name, target, parameter))
            # PEFT allows more than the weight's own rank, which adds nothing to what can be computed.
            factors = factors.within(min(geometry.out_features, geometry.in_features))
            if target == join(name, parameter) and not issubclass(adapter, ParameterAdapter):
                target = name
            self.layers.append(PeftLayer(name, target, module, adapter, parameter, factors))

    @functools.cached_property
    def _loaded_paths(self) -> dict[str, str]:
        return paths_in_model(self.root, self.paths)

    def _scaling(self, name: str, target: str, parameter: str) -> float:
        is_projection = target not in (name, join(name, parameter))
        return (TIMES_PEFT_ADDS_OUT_PROJ if is_projection else 1) * self.peft.scaling_of(target)

    def _other_functions(self, path: str, name: str, target: str) -> Iterator[str]:
        """Yield why PEFT computes something else with this layer than we would."""
        aliases = self.names[name][1]
        if len(aliases) > 1:
            yield f"{path}: {has_many_names(aliases)}"
        parent, _, last = name.rpartition(".")
        if last == "out_proj" and isinstance(self.modules.get(parent), nn.MultiheadAttention):
            written = self.peft.peft_version
            if target == name and self.tensors[f"{path}.lora_B.weight"].any():
                yield f"{path}: PEFT never applies an adapter of attention's output projection alone"
            elif target == parent and written > LAST_KNOWN_PEFT:
                yield (
                    f"{path}: PEFT up to {LAST_KNOWN_PEFT_TEXT} adds this update twice, and it is unknown whether "
                    f"{'.'.join(map(str, written))}, which wrote the file, still does"
                )

    def _chosen(self, name: str, module: nn.Module, depth: int, path: str) -> tuple[type[Adapter], str, str] | None:
        """Return the kind of adapter, the parameter and the name that patterns match; None after noting a problem."""
        if parameters := parameters_named(name, module, self.peft.target_parameters):
            if depth >= len(parameters):
                self.problems.append(f"{path}: target_parameters names only {len(parameters)} of this module")
                return None
            parameter = parameters[len(parameters) - 1 - depth]
            own = self._adapter_of_linear(name, module)
            return own or parameter_adapter(module, parameter), parameter, join(name, parameter)
        adapter = adapter_type(module)
        if adapter is None or depth:
            self.problems.append(f"{path}: {name!r} is a {type(module).__name__}, which has no adapter of this kind")
            return None
        parent = self.modules.get(name.rpartition(".")[0])
        # Of attention PEFT adapts both projections, under the one name.
        of_attention = isinstance(parent, nn.MultiheadAttention) and path != name
        target = name.rpartition(".")[0] if of_attention else name
        return adapter, adapter.parameters_of(module)[0], target

    def _adapter_of_linear(self, name: str, module: nn.Module) -> type[Adapter] | None:
        """Return the adapter of a linear layer that is named by its weight only because of PEFT's conversion."""
        adapter = adapter_type(module)
        is_linear = adapter is not None and issubclass(adapter, LinearAdapter)
        return adapter if is_linear and name.rpartition(".")[2] in expert_names(self.root) else None

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
                f"{key}: file {_shown(rows)}, expected {(len(wanted), module.embedding_dim)} for {len(wanted)} tokens"
            )
        else:
            order = sorted(range(len(wanted)), key=wanted.__getitem__)
            self.tokens[self.first[name]] = (tuple(sorted(wanted)), rows[torch.tensor(order)])

    def _check_requested_tokens(self) -> None:
        wanted = self.peft.trainable_token_indices
        entries = list(wanted) if isinstance(wanted, Mapping) else [""] * bool(wanted)
        for entry in entries:
            if not any(name.endswith(entry) for name in self.tokens) and not self.problems:
                self.problems.append(f"trainable_token_indices={entry or wanted!r}: the file has no rows for it")

    # --- what was trained in full

    def _saved_modules(self) -> dict[str, nn.Module]:
        """Return the modules that PEFT's ``modules_to_save`` names: by the ends of their names."""
        entries = self.peft.modules_to_save
        found = {name: part for name, (part, _) in self.names.items() if name and entries and name.endswith(entries)}
        return {name: part for name, part in found.items() if not any(name.startswith(f"{other}.") for other in found)}

    def _read_saved_modules(self, keys: Collection[str]) -> set[str]:
        used: set[str] = set()
        for name, part in self._saved_modules().items():
            # The model may have adapters where the file has whole layers; the file cannot hold those.
            layers = [clean_name(path) for path, each in part.named_modules(prefix=name) if isinstance(each, LoRALayer)]
            adapters = tuple(join(layer, "lora.") for layer in layers)
            in_full = tensors_in_full(name, part).items()
            expected = {key: tensor for key, tensor in in_full if not key.startswith(adapters)}
            found = {key: self.tensors[key] for key in keys if key in expected}
            # Beside bias="all" PEFT also writes the biases under the names that they have inside of its wrapper.
            used |= found.keys() | {
                key for key in keys if key.startswith((f"{name}.original_module.", f"{name}.modules_to_save."))
            }
            shapes = {key: tuple(tensor.shape) for key, tensor in expected.items()}
            problems = list(_differences(shapes, found, like=expected))
            self.problems += problems
            if not problems:
                self.values |= found
        return used

    def _read_the_rest(self, keys: Collection[str]) -> bool:
        """Read biases, and accept frozen tensors that equal the model's; return whether there are biases."""
        live, has_biases = AdaptedModel(self.root).tensors if keys else {}, False
        for key in sorted(keys):
            path, _, last = key.rpartition(".")
            place = without_wrappers(path, self.modules)
            name = join(place[0], last) if place else None
            value, tensor = live.get(name or ""), self.tensors[key]
            if name is None or value is None:
                self.problems.append(f"{key}: the model has no such tensor")
            elif problems := list(_differences({key: tuple(value.shape)}, {key: tensor}, like={key: value})):
                self.problems += problems
            elif "bias" in last and self.peft.bias != "none":
                self.values[name] = tensor
                has_biases = True
            elif not torch.equal(tensor.to(value.dtype), value.detach().cpu()):
                self.problems.append(f"{key}: the model's frozen tensor has different values; load that base")
        return has_biases

    # --- our config

    @functools.cached_property
    def config(self) -> LoRAConfig:
        """The config to attach; computed only if the model has no adapters yet."""
        dropout = self.peft.dropout
        if dropout and (carried := list(self._carried_by_weight())):
            # As in PEFT, which makes a dropout for attention and never applies it.
            warnings.warn(
                f"lora_dropout={dropout} is left out: the update of {listed(carried)} is in the weight.", stacklevel=5
            )
            dropout = 0.0
        numbers = numbers_for({layer.label: layer.factors for layer in self.layers}, use_rslora=self.peft.use_rslora)
        by_name = [layer.name for layer in self.layers if not layer.by_parameter]
        tied = tied_names(parameter_names(self.modules))
        return LoRAConfig(
            rank=numbers["r"],
            alpha=numbers["lora_alpha"],
            rank_pattern=numbers["rank_pattern"],
            alpha_pattern=numbers["alpha_pattern"],
            bias=self.peft.bias if self.has_biases else "none",
            dropout=dropout,
            lora_bias=self.peft.lora_bias,
            modules_to_save=sorted(self._saved_modules()),
            target_modules=targets_for(by_name, list(self.modules)),
            target_parameters=sorted(layer.label for layer in self.layers if layer.by_parameter),
            trainable_token_indices={name: tokens for name, (tokens, _) in sorted(self.tokens.items())},
            untie_weights=any(join(layer.name, layer.parameter) in tied for layer in self.layers),
            use_dora=self.peft.use_dora,
            use_rslora=self.peft.use_rslora,
        )

    def _carried_by_weight(self) -> Iterator[str]:
        readers = weight_readers(self.modules.values())
        for layer in self.layers:
            adapter = adapter_type(layer.module)
            if id(layer.module) in readers or layer.by_parameter or (adapter and adapter.needs_weight(layer.module)):
                yield layer.label


def _differences(
    expected: Mapping[str, tuple[int, ...]], found: Mapping[str, Tensor], like: Mapping[str, Tensor] | None = None
) -> Iterator[str]:
    """Yield how tensors differ from what they must be; ``like`` says which need not be in floating point."""
    for key in sorted(expected.keys() - found.keys()):
        yield f"{key}: missing from the file"
    for key, tensor in found.items():
        if key not in expected:
            yield f"{key}: not expected for this kind of layer with these use_dora and lora_bias"
        elif tuple(tensor.shape) != expected[key]:
            yield f"{key}: file {_shown(tensor)}, expected {expected[key]}"
        elif not tensor.is_floating_point() and (like is None or like[key].dtype != tensor.dtype):
            yield f"{key}: file {_shown(tensor)}, expected floating point"


def _shown(tensor: Tensor) -> str:
    """Return a tensor's shape and precision, for messages."""
    return f"{tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"


# --- into a module's state


def import_state(content: Import, model: AdaptedModel) -> dict[str, Tensor]:
    """Return a file's values under the names of an adapted module's own state.

    Args:
        content: The file.
        model: The module that holds the model that the file is for, or that model; it has the file's adapters.
    """
    root = model if model.module is content.root else AdaptedModel(content.root)
    live = root.tensors if content.values else {}
    values: dict[int, Tensor] = {}
    for layer in content.layers:
        adapter, factors = root.adapters[layer.label], layer.factors
        assert isinstance(adapter, LowRankAdapter)
        for key, tensor in adapter._parameters.items():
            if (value := getattr(factors, key)) is not None:
                values[id(tensor)] = value
    values |= {id(root.adapters[name].rows): rows for name, (_, rows) in content.tokens.items()}
    for name, value in content.values.items():
        before = values.setdefault(id(live[name]), value)
        if before is not value and not torch.equal(before, value):  # NaN differs from itself
            raise ValueError(f"{name!r} is tied to a tensor for which the file has a different value.")
    state = {name: values[id(tensor)] for name, tensor in model.trained.items() if id(tensor) in values}
    # PEFT trains the biases of attention's and recurrent layers' own kind, but does not save them.
    return {name: tensor for name, tensor in _unsaved_biases(model.trained).items() if name not in state} | state


def _unsaved_biases(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {
        name: tensor.detach().clone()
        for name, tensor in tensors.items()
        if "bias" in (last := name.rpartition(".")[2]) and last != "bias"
    }
