"""Skeletons: models without weights, made of the names and shapes in files, that carry adapters like a real model.

The modules of a skeleton compute nothing, and each parameter is a single zero, expanded to its shape, so it takes no
memory. The code that reads and merges adapters works on a skeleton as on a real model, so the results are the same. How
a layer is stored is known to its adapter class, which also makes the stand-in for it.
"""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import permutations, product
from typing import Any

import torch
from torch import Tensor, nn

from lightning_lora.adapted_model import AdaptedModel
from lightning_lora.config import LoRAConfig
from lightning_lora.disk.base_folder import module_paths
from lightning_lora.layers import adapter_of_kind
from lightning_lora.layers.adapter import row_numbers
from lightning_lora.names import join, listed, matches
from lightning_lora.peft_format.config import KNOWN_ORDER
from lightning_lora.peft_format.directory import PeftFile
from lightning_lora.peft_format.names import without_wrappers
from lightning_lora.storage.adapter_file import AdapterFile, StoredLayer, StoredWeight
from lightning_lora.storage.checkpoint import CheckpointFile
from lightning_lora.storage.safetensors import Layout
from lightning_lora.surgery import attach

Layouts = Mapping[str, Layout]
Kinds = dict[str, str]  # path of a module -> the kind of its layer

_DEEPEST = 64
_MOST_ORDERS = 24
_ATTENTION = ("in_proj_weight", "q_proj_weight")
# Models in transformers whose linear layers store their weights as (in, out).
_CONV1D_MODELS = ("gpt2", "openai-gpt", "imagegpt", "decision_transformer", "clvp", "trajectory_transformer")
REMEDY = "Load the model, load the file into it with load_adapter, and save it from there."


def build_skeleton(layouts: Layouts, kinds: Mapping[str, str]) -> nn.Module:
    """Return a module with parameters of these names and shapes.

    Args:
        layouts: Name -> shape and precision.
        kinds: Path of a module -> the kind of its layer; all others are plain modules.

    Raises:
        ValueError: A name cannot be that of a parameter, or a weight does not have the dimensions of its kind.
    """
    modules: dict[str, nn.Module] = {"": nn.Module()}
    for name, layout in layouts.items():
        path, _, key = name.rpartition(".")
        try:
            _register(_module_at(path, modules, layouts, kinds), key, layout)
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"The base holds a tensor with the impossible name {name!r}.") from error
    return modules[""]


def _module_at(path: str, modules: dict[str, nn.Module], layouts: Layouts, kinds: Mapping[str, str]) -> nn.Module:
    if path.count(".") > _DEEPEST:
        raise KeyError(path)
    if path not in modules:
        above, _, last = path.rpartition(".")
        made = _stand_in(path, kinds[path], layouts) if path in kinds else nn.Module()
        _module_at(above, modules, layouts, kinds).add_module(last, made)
        modules[path] = made
    return modules[path]


def _stand_in(path: str, kind: str, layouts: Layouts) -> nn.Module:
    layout = layouts.get(f"{path}.weight")
    shape, adapter = layout.shape if layout else (), adapter_of_kind(kind)
    try:
        with torch.device("meta"):
            return adapter.stand_in(shape)
    except ValueError as error:
        raise ValueError(f"{path}: a weight of the shape {shape} cannot take an adapter of this kind.") from error


def _register(module: nn.Module, key: str, layout: Layout) -> None:
    is_mask = "bias" in key and len(layout.shape) != 1  # GPT-2's attention has one of this name
    if is_mask or not (layout.dtype.is_floating_point or key in module._parameters):
        module.register_buffer(key, placeholder(layout))
    elif key in module._parameters:
        module._parameters[key] = nn.Parameter(placeholder(layout), requires_grad=False)
    else:
        module.register_parameter(key, nn.Parameter(placeholder(layout), requires_grad=False))


def placeholder(layout: Layout) -> Tensor:
    """Return a tensor of this shape and precision that takes no memory."""
    return torch.zeros((), dtype=layout.dtype).expand(layout.shape)


def put(skeleton: nn.Module, values: Mapping[str, Tensor]) -> None:
    """Replace tensors of a skeleton, by their names."""
    for name, value in values.items():
        path, _, key = name.rpartition(".")
        owner = skeleton.get_submodule(path)
        if key in owner._buffers:
            owner._buffers[key] = value
        else:
            owner._parameters[key] = nn.Parameter(value, requires_grad=False)


def fill(skeleton: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Give the trained tensors of a skeleton copies of their values."""
    model = AdaptedModel(skeleton)
    trained = {name: tensor for name, tensor in model.trained.items() if name in state}
    values = {name: state[name].detach().to(tensor.dtype) for name, tensor in trained.items()}
    put(skeleton, {name: value.clone(memory_format=torch.contiguous_format) for name, value in values.items()})
    for adapter in model.adapters.values():
        if adapter.spec.rows:
            adapter.index = row_numbers(adapter.spec.rows)


# --- from an adapter and its base: the kinds of the adapted layers, told from the shapes


def kinds_in_base(
    file: PeftFile | CheckpointFile, layouts: Layouts, config: Mapping[str, Any]
) -> tuple[Kinds, Layouts]:
    """Return the kinds of the adapted layers, and the tensors in the order in which the model registers them.

    Args:
        file: The adapter.
        layouts: The base's tensors, under the adapter's names.
        config: The base's config.

    Raises:
        ValueError: A kind is ambiguous, or cannot be merged without the model.
    """
    if isinstance(file, PeftFile):
        return _kinds_of_peft(file, layouts, config)
    return _kinds_of_checkpoint(file, layouts, config), layouts


def _kinds_of_peft(file: PeftFile, layouts: Layouts, config: Mapping[str, Any]) -> tuple[Kinds, Layouts]:
    modules, parameters, ordered = module_paths(layouts), file.config.target_parameters, dict(layouts)
    kinds: Kinds = {name: "embedding" for name in file.tokens if f"{name}.weight" in layouts}
    stacks: dict[str, dict[int, tuple[int, int]]] = {}
    is_transposed = _is_transposed(config, file.options.get("fan_in_fan_out") is True)
    for path, keys in sorted(file.keys_by_path.items()):
        place = without_wrappers(path, modules)
        assert place is not None, "find_names resolves every path"
        name, depth = place
        _check_not_attention(name, layouts)
        A, B = (file.tensors.get(f"{path}.lora_{letter}.weight") for letter in "AB")
        # Sizes of zero fit nothing; the import will report what is missing.
        sizes = (len(B) if B is not None and B.ndim else 0, A.shape[-1] if A is not None and A.ndim else 0)
        if _targets(parameters, name, layouts):
            stacks.setdefault(name, {})[depth] = sizes
        elif f"{path}.lora_embedding_A" in keys:
            _weight_shape(name, layouts)
            kinds[name] = "embedding"
        elif A is not None and A.ndim > 2:
            _weight_shape(name, layouts)
            kinds[name] = "conv"
        else:
            kinds[name] = _linear_kind(name, _weight_shape(name, layouts), sizes, is_transposed)
    for name, each in stacks.items():
        order, kind = _stack(name, {key: layouts[key].shape for key in _targets(parameters, name, layouts)}, each)
        ordered |= {key: ordered.pop(key) for key in order}
        kinds |= {name: kind} if kind != "parameter" else {}
    return kinds, ordered


def _kinds_of_checkpoint(file: CheckpointFile, layouts: Layouts, config: Mapping[str, Any]) -> Kinds:
    options = [entry["config"] for entry in file.record["adapters"]]
    kinds: Kinds = dict.fromkeys(file.tokens, "embedding")
    votes: dict[str, set[bool]] = {}
    for layer in file.layers.values():
        name, _, inner = layer.keys[0].partition(".lora.")
        _check_not_attention(name, layouts)
        parameter, sizes = join(name, inner.rpartition(".")[0]), (layer.B.shape[-2], layer.A.shape[-1])
        if parameter not in layouts:
            kinds[name] = _kind_in_checkpoint(name, _weight_shape(name, layouts), layer, options, config)
        elif len(shape := layouts[parameter].shape) == 3:
            is_plain, is_turned = (_fits(kind, shape, sizes) for kind in ("parameter", "transposed stack"))
            votes.setdefault(name, set()).update(() if is_plain and is_turned else (is_turned,))
    for name, told in votes.items():
        if len(told) != 1:
            raise ValueError(f"{name}: its parameters are square, so their orientation is ambiguous; merge in memory.")
        kinds |= {name: "transposed stack"} if told == {True} else {}
    return kinds


def _kind_in_checkpoint(
    name: str,
    shape: tuple[int, ...],
    layer: StoredLayer,
    options: Sequence[Mapping[str, Any]],
    config: Mapping[str, Any],
) -> str:
    if len(shape) > 2:
        return "conv"
    rows, columns = layer.B.shape[-2], layer.A.shape[-1]
    if any(each.get("target_slices") for each in options):  # the B of a slice has some of the weight's rows
        rows = shape[0] if columns == shape[1] else shape[1]
    kind = _linear_kind(name, shape, (rows, columns), _is_transposed(config, None))
    # Embeddings are transposed too; only a bias of B tells the two apart, and only for it does the difference matter.
    is_embedding = kind == "conv1d" and layer.bias is None and any(each.get("lora_bias") for each in options)
    return "embedding" if is_embedding else kind


def _is_transposed(config: Mapping[str, Any], option: bool | None) -> bool | None:
    """Return whether a base stores linear weights as (in, out), as its config or the adapter says; None if unknown."""
    if config.get("model_type") in _CONV1D_MODELS or option:
        return True
    return False if "model_type" in config else option


def _linear_kind(name: str, shape: tuple[int, ...], sizes: tuple[int, int], is_transposed: bool | None) -> str:
    fitting = [kind for kind in ("linear", "conv1d") if len(shape) == 2 and _fits(kind, shape, sizes)]
    if len(fitting) == 2 and is_transposed is None:
        raise ValueError(
            f"{name}: the weight is square, so its orientation is ambiguous. Put the model's config.json next to the "
            "base, or export the adapter with save_adapter and merge that."
        )
    if len(fitting) == 2:
        return "conv1d" if is_transposed else "linear"
    return fitting[0] if fitting else "linear"


def _fits(kind: str, shape: tuple[int, ...], sizes: tuple[int, int]) -> bool:
    """Return whether factors for a matrix of these sizes fit a weight of this kind and shape."""
    return adapter_of_kind(kind).matrix_of(shape) == sizes


def _stack(
    name: str, shapes: Mapping[str, tuple[int, ...]], sizes: Mapping[int, tuple[int, int]]
) -> tuple[tuple[str, ...], str]:
    """Return the order in which a module registers its adapted parameters, and the kind of its stacks.

    PEFT tells several parameters of one module apart by that order alone, and no tensor file holds it.

    Args:
        name: The module.
        shapes: The shapes of its adapted parameters.
        sizes: How many of PEFT's wrappers are left of a path -> the sizes of the factors there.

    Raises:
        ValueError: Several choices fit the shapes.
    """
    known = tuple(join(name, key) for key in KNOWN_ORDER)
    orders = [known] if set(shapes) == set(known) else list(permutations(shapes))[:_MOST_ORDERS]
    has_stack = any(len(shape) == 3 for shape in shapes.values())
    kinds = ("parameter", "transposed stack") if has_stack else ("parameter",)
    fitting = [choice for choice in product(orders, kinds) if _stack_fits(*choice, shapes, sizes)]
    if len(fitting) > 1:
        names = ", ".join(key.rpartition(".")[2] for key in shapes)
        raise ValueError(
            f"{name}: the shapes of {names} do not tell how the model reads them; load the model and merge in memory."
        )
    return fitting[0] if fitting else (orders[0], "parameter")


def _stack_fits(
    order: Sequence[str], kind: str, shapes: Mapping[str, tuple[int, ...]], sizes: Mapping[int, tuple[int, int]]
) -> bool:
    for depth, each in sizes.items():
        if depth >= len(order):
            return False
        shape = shapes[order[-1 - depth]]  # PEFT wraps the first registered innermost
        if not _fits(kind if len(shape) == 3 else "parameter", shape, each):
            return False
    return True


def _weight_shape(name: str, layouts: Layouts) -> tuple[int, ...]:
    if f"{name}.weight" not in layouts:
        raise ValueError(f"{name}: the base has no weight {name + '.weight'!r}.")
    return layouts[f"{name}.weight"].shape


def _check_not_attention(name: str, layouts: Layouts) -> None:
    above = name.rpartition(".")[0]
    if any(join(path, key) in layouts for path in (name, above) for key in _ATTENTION):
        raise ValueError(f"{name}: torch's attention cannot be merged on disk; load the model and merge it in memory.")


def _targets(parameters: Collection[str], name: str, layouts: Layouts) -> list[str]:
    """Return the parameters of a module that ``target_parameters`` names."""
    if not parameters:
        return []
    own = [each for each in layouts if each.rpartition(".")[0] == name]
    return [each for each in own if any(f".{each}".endswith(f".{entry}") for entry in parameters)]


# --- from an adapter alone: the adapted layers, and the tensors trained in full


def bare_skeleton(file: PeftFile | CheckpointFile, root: str = "") -> nn.Module:
    """Return a skeleton without adapters that has a place for all that an adapter file brings.

    Args:
        file: The adapter.
        root: Name of the model inside the skeleton.

    Raises:
        ValueError: The file does not describe its layers well enough.
    """
    weights = {label: layer.weight for label, layer in file.layers.items()}
    weights |= {label: tokens.weight for label, tokens in file.tokens.items()}
    _check_described(file, weights)
    found = [(weight.name or "", weight.kind or "", weight) for weight in weights.values()]
    kinds = {name.rpartition(".")[0]: kind for name, kind, _ in found if kind != "parameter"}
    # Modules that only hold parameters come last, and the parameters of a module as it registers them.
    found.sort(key=lambda each: (each[0].rpartition(".")[0] not in kinds, each[2].order))
    layouts = {name: Layout(torch.float32, weight.shape) for name, _, weight in found}
    for label, layer in file.layers.items():
        _check_factors(label, layer)
    others = dict(_others(file))
    layouts |= {name: Layout(value.dtype, tuple(value.shape)) for name, value in others.items()}
    full = {join(root, name): layout for name, layout in layouts.items()}
    skeleton = build_skeleton(full, {join(root, name): kind for name, kind in kinds.items()})
    if isinstance(file, PeftFile):  # an import compares repeated weights of the base with the model's: here, with these
        put(skeleton, {join(root, name): value for name, value in others.items()})
    return skeleton


def _check_described(file: AdapterFile, weights: Mapping[str, StoredWeight]) -> None:
    if isinstance(file, PeftFile) and (bare := [entry for entry in file.config.target_parameters if "." not in entry]):
        raise ValueError(f"target_parameters names {listed(bare)} without the modules that hold them. {REMEDY}")
    if unknown := [label for label, weight in weights.items() if weight.kind is None]:
        raise ValueError(f"The file does not describe the layers {listed(unknown)} well enough. {REMEDY}")
    for label, each in file.tokens.items():
        if not each.weight.shape or max(each.weight.shape) >= 2**31:
            raise ValueError(f"The file does not tell which tokens of {label!r} were trained.")


def _check_factors(label: str, layer: StoredLayer) -> None:
    """Raise if a weight does not fit its factors: nothing larger than the file describes is ever made."""
    kind, shape, found = layer.weight.kind, layer.weight.shape, (layer.B.shape[-2], layer.A.shape[-1])
    rows, columns = adapter_of_kind(kind or "").matrix_of(shape)
    if found[1] != columns or (found[0] != rows and not layer.rows):
        raise ValueError(f"{label}: a weight of the shape {shape} does not fit factors for {found}.")


def _others(file: PeftFile | CheckpointFile) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors besides the adapters that the model must have."""
    if isinstance(file, PeftFile):
        for name, value in file.others.items():
            if not any(part in f".{name}." for part in (".original_module.", ".modules_to_save.")):
                yield name.replace(".base_layer.", "."), value
        return
    configs = [LoRAConfig.from_dict(entry["config"]) for entry in file.record["adapters"]]
    for name, value in file.others.items():
        if any(_trains(name, config) for config in configs):
            yield name, value


def _trains(name: str, config: LoRAConfig) -> bool:
    """Return whether a config trains a tensor of this name in full."""
    parts = name.split(".")
    above = [".".join(parts[:depth]) for depth in range(1, len(parts))]
    saved = any(matches(entry, path) for entry in config.modules_to_save for path in above)
    return saved or (config.bias != "none" and "bias" in parts[-1])


def attach_bare(module: nn.Module, config: LoRAConfig, seed: int = 0) -> None:
    """Attach to a bare skeleton, which holds nothing that a config could exclude or tie."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "These adapters are not smaller")  # too late to choose another rank
        attach(module, replace(config, exclude_modules=(), untie_weights=False), seed=seed)
    next(root for root in AdaptedModel(module).roots if root.module is module).attachment.config = config
