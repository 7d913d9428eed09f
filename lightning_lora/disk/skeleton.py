"""Skeletons: models without weights, made of the names and shapes in files, that carry adapters like a real model.

The modules of a skeleton compute nothing, and each parameter is a single zero, expanded to its shape, so it takes no
memory. The code that reads and merges adapters works on a skeleton as on a real model, so the results are the same. How
a layer is stored is known to its adapter class, which also makes the stand-in for it.
"""

from __future__ import annotations

import functools
import warnings
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import permutations, product, takewhile
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lightning_lora.adapted_model import AdaptedModel
from lightning_lora.disk.base_folder import WIDE, BaseFolder, Renaming, find_names, module_paths, open_base, sampled
from lightning_lora.fingerprint import END, Fingerprint, base_problems, differing_tensors
from lightning_lora.layers import adapter_of_kind
from lightning_lora.layers.adapter import row_numbers
from lightning_lora.loading import read_adapter
from lightning_lora.names import join, listed, selected
from lightning_lora.peft_format.config import KNOWN_ORDER
from lightning_lora.peft_format.directory import PeftFile
from lightning_lora.peft_format.importing import import_state, make_import
from lightning_lora.peft_format.names import without_wrappers
from lightning_lora.state import is_sound, mismatches, record_problems
from lightning_lora.storage.adapter_file import StoredLayer, damage_named
from lightning_lora.storage.checkpoint import CheckpointFile
from lightning_lora.storage.safetensors import Layout
from lightning_lora.surgery import attach, attach_entry

Layouts = Mapping[str, Layout]
Kinds = dict[str, str]  # path of a module -> the kind of its layer

_DEEPEST = 64
_MOST_ORDERS = 24
_EMBEDDINGS = ("wte", "wpe", "shared", "relative_attention_bias")
_HEADS = ("lm_head", "embed_out")
_ATTENTION = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")
_RECURRENT = ("weight_ih_l0", "weight_ih")  # of a layer, and of a cell
_TORCH_ATTENTION = "attention"  # a kind of module rather than of weight
# Models in transformers whose linear layers store their weights as (in, out).
_CONV1D_MODELS = ("gpt2", "openai-gpt", "imagegpt", "decision_transformer", "clvp", "trajectory_transformer")


def build_skeleton(layouts: Layouts, kinds: Mapping[str, str]) -> nn.Module:
    """Return a module with parameters of these names and shapes; modules without a kind are plain.

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
    shape = layouts[weight].shape if (weight := f"{path}.weight") in layouts else ()
    try:
        with torch.device("meta"):
            if kind == _TORCH_ATTENTION:
                size, *others = (layouts[name].shape[1] for key in _ATTENTION if (name := f"{path}.{key}") in layouts)
                return nn.MultiheadAttention(size, 1, 0.0, False, False, False, *others)  # kdim and vdim
            return adapter_of_kind(kind).stand_in(shape)
    except ValueError as error:
        _weight_shape(path, layouts)  # raises if there is none
        raise ValueError(f"{path}: a weight of the shape {shape} cannot take an adapter of this kind.") from error


def _register(module: nn.Module, key: str, layout: Layout) -> None:
    is_mask = "bias" in key and len(layout.shape) != 1  # GPT-2's attention has one of this name
    is_number = layout.dtype.is_floating_point or layout.dtype.is_complex
    if is_mask or not (is_number or key in module._parameters):
        module.register_buffer(key, _placeholder(layout))
    else:
        module.register_parameter(key, nn.Parameter(_placeholder(layout), requires_grad=False))


def _placeholder(layout: Layout) -> Tensor:
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
    model.have_values()
    for adapter in model.adapters.values():
        if adapter.spec.rows:
            adapter.index = row_numbers(adapter.spec.rows)


# --- an adapter on the skeleton of its base


@dataclass
class Fitted:
    """An adapter on the skeleton of a base.

    Attributes:
        root: The skeleton, with adapters that hold the trained values.
        names: Name of a tensor in the skeleton -> its name in the base; tied heads, which the files lack, included.
        values: Name of a tensor that was trained in full -> its value.
        added: Those of ``values`` that the base does not have -> what they will be called.
        ignored: Other tensors of the adapter, which have no place in the base.
        compared: Number of base tensors that match the adapter's fingerprint.
        aliases: As in ``CheckpointFile``: such modules are in the skeleton once, and may be in the base several times.
    """

    root: nn.Module
    names: dict[str, str]
    values: dict[str, Tensor]
    added: dict[str, str]
    ignored: list[str]
    compared: int = 0
    aliases: Mapping[str, str] = field(default_factory=dict)


def fit_adapter(path: Path, base: BaseFolder, name: str | None = None, *, check_base: bool = True) -> Fitted:
    """Put the adapter of a PEFT directory or a ``.ckpt``, of several the one of this name, on the skeleton of a base.

    Raises:
        ValueError: They do not fit each other, cannot be read, or the adapter was trained on a base with other values
            and ``check_base`` is set.
        FileNotFoundError: The adapter does not exist.
    """
    file, sample = read_adapter(path, name), functools.cache(partial(sampled, base))
    layouts: dict[str, Layout] = dict(base.tensors)
    layouts |= {head: layouts[source] for head, source in base.tied_heads.items()}

    def values(names: Mapping[str, str]) -> Fingerprint:
        """Return the fingerprint of the base under the names that the adapter uses."""
        owners = ((name, name.removesuffix(END)) for name in file.base)
        found = {name: sample(names[own], name != own) for name, own in owners if own in names}
        return {name: each for name, each in found.items() if each is not None}

    def compare(names: Mapping[str, str]) -> tuple[int, bool]:
        found = values(names)
        return len(found), not differing_tensors(file.base, found)

    with warnings.catch_warnings(), damage_named(path):
        warnings.filterwarnings("ignore", "These adapters are not smaller")  # too late to choose another rank
        if isinstance(file, PeftFile):
            renaming = find_names(file.paths, layouts, file.root, compare if file.base else None)
            fit = _fit_peft(file, base, layouts, renaming)
        else:
            _check_mergeable(file)
            renaming = find_names(file.paths, layouts, None, compare if file.base else None)
            fit = _fit_checkpoint(file, layouts, renaming)
    if check_base:
        found = values(fit.names)
        if problems := base_problems(file.base, found, "folder or file", override="--any-base"):
            raise ValueError(problems[0])
        fit.compared = sum(not name.endswith(END) for name in found)
    return fit


def _fit_peft(file: PeftFile, base: BaseFolder, layouts: Layouts, renaming: Renaming) -> Fitted:
    names = renaming.names
    mine = {name: layouts[each] for name, each in names.items()}
    added = _new_modules(file, mine)
    mine |= {name: Layout(file.tensors[name].dtype, tuple(file.tensors[name].shape)) for name in added}
    kinds, ordered = _kinds_of_peft(file, mine, base.config)
    skeleton = build_skeleton(ordered, kinds)
    # The import compares frozen values that the file repeats with the base's own.
    repeated = {name: base.tensors[names[name]] for name in file.tensors if names.get(name) in base.tensors}
    put(skeleton, {name: tensor.read() for name, tensor in repeated.items()})
    content = make_import(skeleton, file)
    put(skeleton, {name: _placeholder(mine[name]) for name in repeated})
    attach(skeleton, content.config)
    model = AdaptedModel(skeleton)
    state = import_state(content, model)
    return _fitted(skeleton, state, names, _names_of_added(added, renaming), [])


def _names_of_added(added: Sequence[str], renaming: Renaming) -> dict[str, str]:
    """Return what tensors that the base lacks will be called there; raise if it calls something else so.

    Of ``model.bert.``, which only the adapter's names have, ``model.classifier`` loses the part that it shares.
    """
    above = renaming.part if renaming.level < 0 else ""
    renamed = {name: above + name.removeprefix(_shared_parts(name, renaming.before)) for name in added}
    uses = Counter([*renaming.names.values(), *renamed.values()])
    if taken := [name for name, new in renamed.items() if uses[new] > 1]:
        raise ValueError(
            f"{listed(taken)}: trained in full and not in the base, where another tensor would have the same name; "
            "load the model and merge it in memory."
        )
    return renamed


def _shared_parts(name: str, before: str) -> str:
    """Return the modules that a name and a prefix have in common, from the outermost."""
    pairs = zip(name.split(".")[:-1], before.split(".")[:-1], strict=False)
    return "".join(f"{mine}." for mine, _ in takewhile(lambda pair: pair[0] == pair[1], pairs))


def _new_modules(file: PeftFile, mine: Collection[str]) -> list[str]:
    """Return the tensors of modules trained in full that the base lacks, such as those of a new head."""
    inside = (".original_module.", ".modules_to_save.", ".base_layer.")
    return [
        key
        for key in file.tensors
        if key not in mine and any(f".{entry}." in f".{key}" for entry in file.config.modules_to_save)
        if "lora_" not in key and not any(part in key for part in inside)
    ]


def _check_mergeable(file: CheckpointFile) -> None:
    if file.merges:
        raise ValueError("The adapter was trained on a base with another adapter merged into it; merge it in memory.")
    if not file.paths:
        raise ValueError("The checkpoint holds no adapter.")


def _fit_checkpoint(file: CheckpointFile, layouts: Layouts, renaming: Renaming) -> Fitted:
    names = renaming.names
    mine = {name: layouts[each] for name, each in names.items() if name.rpartition(".")[0] not in file.aliases}
    added = _new_modules_of_checkpoint(file, mine)
    mine |= {name: Layout(file.tensors[name].dtype, tuple(file.tensors[name].shape)) for name in added}
    skeleton = build_skeleton(mine, _kinds_of_checkpoint(file, mine))
    for entry in file.record["adapters"]:
        attach_entry(skeleton, entry, ExitStack())
    if problems := record_problems(skeleton, file.record) + _misfits(skeleton, file):
        raise ValueError("The checkpoint does not fit this base:\n" + "\n".join(f"  - {each}" for each in problems))
    known = {name: value for name, value in file.tensors.items() if ".lora." in name or name in mine}
    moved = file.record.get("buffers", {})  # such as running statistics that averaging the weights has set anew
    known |= {name: each for name, each in moved.items() if name in mine and mine[name].shape == tuple(each.shape)}
    ignored = sorted((file.tensors.keys() | moved.keys()) - known.keys())
    return replace(_fitted(skeleton, known, names, _names_of_added(added, renaming), ignored), aliases=file.aliases)


def _new_modules_of_checkpoint(file: CheckpointFile, mine: Collection[str]) -> list[str]:
    """Return the tensors of modules trained in full that the base lacks."""
    found = list[str]()
    for entry in file.record["adapters"]:
        root, saved = join(entry["root"], ""), entry["config"]["modules_to_save"]
        lacking = [name for name in file.tensors if name not in mine and ".lora." not in name and name.startswith(root)]
        found += [name for name in lacking if any(map(partial(_selects, saved), module_paths([name[len(root) :]])))]
    return found


def _selects(entries: str | Sequence[str], path: str) -> bool:
    return selected(entries, (path,)) is not None


def _misfits(skeleton: nn.Module, file: CheckpointFile) -> list[str]:
    model = AdaptedModel(skeleton)
    all_biases = any(entry["config"].get("bias") == "all" for entry in file.record["adapters"])
    # The files of a base do not tell which of its tensors called bias are parameters.
    wanted = {
        name: tensor
        for name, tensor in model.trained.items()
        if name in file.tensors or not (all_biases and "bias" in name.rpartition(".")[2])
    }
    wanted |= {name: model.tensors[name] for name in file.tensors if name in model.tensors}
    return mismatches(wanted, file.tensors, known=[name for name in file.tensors if ".lora." not in name])


def _fitted(
    skeleton: nn.Module, state: Mapping[str, Tensor], names: dict[str, str], added: dict[str, str], ignored: list[str]
) -> Fitted:
    """Give the adapters their values, and return everything together."""
    model = AdaptedModel(skeleton)
    factors = {name: state[name] for name in model.trained if name in state and name not in model.in_full}
    fill(skeleton, factors)
    values = {name: value for name, value in state.items() if name not in factors}
    own = {name: adapter.state_dict().values() for name, adapter in model.adapters.items()}
    broken = [name for name, each in own.items() if not all(is_sound(tensor, finite=True) for tensor in each)]
    if broken := broken + [name for name, value in values.items() if not is_sound(value, finite=False)]:
        raise ValueError(
            f"The adapter holds NaN or infinity in {listed(broken)}; merging it would destroy the weights."
        )
    return Fitted(skeleton, names, values, added, ignored)


# --- the kinds of the adapted layers, told from the shapes


def _kinds_of_peft(file: PeftFile, layouts: Layouts, config: Mapping[str, Any]) -> tuple[Kinds, Layouts]:
    """Return the kinds of the adapted layers, and the tensors in the order in which the model registers them."""
    modules, parameters, ordered = module_paths(layouts), file.config.target_parameters, dict(layouts)
    kinds: Kinds = {name: "embedding" for name in file.tokens if f"{name}.weight" in layouts}
    stacks: dict[str, dict[int, tuple[int, int]]] = {}
    is_transposed = config.get("model_type") in _CONV1D_MODELS or file.options.get("fan_in_fan_out") is True
    for path, keys in sorted(file.keys_by_path.items()):
        place = without_wrappers(path, modules)
        assert place is not None, "find_names resolves every path"
        name, depth = place
        _check_one_weight(name, layouts)
        A, B = (file.tensors.get(f"{path}.lora_{letter}.weight") for letter in "AB")
        # Sizes of zero fit nothing; the import will report what is missing.
        sizes = (len(B) if B is not None and B.ndim else 0, A.shape[-1] if A is not None and A.ndim else 0)
        if _targets(parameters, name, layouts):
            stacks.setdefault(name, {})[depth] = sizes
            continue
        shape = _weight_shape(name, layouts)
        if f"{path}.lora_embedding_A" in keys:
            kinds[name] = "embedding"
        elif A is not None and A.ndim > 2:
            kinds[name] = "conv"
        else:
            kinds[name] = _linear_kind(shape, sizes, is_transposed)
    for name, each in stacks.items():
        order, kind = _stack(name, {key: layouts[key].shape for key in _targets(parameters, name, layouts)}, each)
        ordered |= {key: ordered.pop(key) for key in order}
        kinds |= {name: kind} if kind != "parameter" else {}
    return kinds, ordered


def _kinds_of_checkpoint(file: CheckpointFile, layouts: Layouts) -> Kinds:
    """Return the kinds of the adapted layers, as the record states them."""
    kinds: Kinds = dict.fromkeys(file.tokens, "embedding")
    for layer in file.layers.values():
        name, _, inner = layer.keys[0].partition(".lora.")
        _check_one_weight(name, layouts)
        kind = layer.weight.kind or _unstated_kind(name, inner.rpartition(".")[0], layer, layouts)
        if kind != "parameter":
            kinds[name] = kind
    return kinds


def _unstated_kind(name: str, key: str, layer: StoredLayer, layouts: Layouts) -> str:
    """Return the kind of a layer that PEFT does not have, or that an early version wrote: the record says nothing."""
    is_parameter = join(name, key) in layouts
    shape = layouts[join(name, key)].shape if is_parameter else _weight_shape(name, layouts)
    if len(shape) == 3 if is_parameter else len(shape) == 2 and shape[0] == shape[1]:
        raise ValueError(f"{name}: the file does not state how its weight is stored; load the model and merge there.")
    if is_parameter:
        return "parameter"
    return "conv" if len(shape) > 2 else _linear_kind(shape, (layer.B.shape[-2], layer.A.shape[-1]), False)


def _linear_kind(shape: tuple[int, ...], sizes: tuple[int, int], is_transposed: bool) -> str:
    """Return the kind of a linear layer; of a square weight, only the base's config or the adapter can tell."""
    kinds = ("conv1d", "linear") if is_transposed else ("linear", "conv1d")
    return next((kind for kind in kinds if len(shape) == 2 and _fits(kind, shape, sizes)), "linear")


def _fits(kind: str, shape: tuple[int, ...], sizes: tuple[int, int]) -> bool:
    """Return whether factors for a matrix of these sizes fit a weight of this kind and shape."""
    return adapter_of_kind(kind).matrix_of(shape) == sizes


def _stack(
    name: str, shapes: Mapping[str, tuple[int, ...]], sizes: Mapping[int, tuple[int, int]]
) -> tuple[tuple[str, ...], str]:
    """Return the order in which a module registers its adapted parameters, and the kind of its stacks.

    PEFT tells several parameters of one module apart by that order alone, and no tensor file holds it. ``sizes`` are
    those of the factors, by the number of PEFT's wrappers that are left of their path.
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
        raise ValueError(
            f"{name}: the base has no {name + '.weight'!r}; a parametrization may compute it from other tensors, which "
            "takes the model. Load it, and use load_adapter and merge in memory."
        )
    return layouts[f"{name}.weight"].shape


def _check_one_weight(name: str, layouts: Layouts) -> None:
    """Refuse layers of several weights, which a skeleton has no module for."""
    above = name.rpartition(".")[0]
    if any(join(path, key) in layouts for path in (name, above) for key in _ATTENTION):
        raise ValueError(f"{name}: torch's attention cannot be merged on disk; load the model and merge it in memory.")
    if any(join(name, key) in layouts for key in _RECURRENT):
        raise ValueError(f"{name}: recurrent layers cannot be merged on disk; load the model and merge it in memory.")


def _targets(parameters: Collection[str], name: str, layouts: Layouts) -> list[str]:
    """Return the parameters of a module that ``target_parameters`` names."""
    if not parameters:
        return []
    own = [each for each in layouts if each.rpartition(".")[0] == name]
    return [each for each in own if any(f".{each}".endswith(f".{entry}") for entry in parameters)]


# --- a model from the headers of its files


class ShapedModel(NamedTuple):
    """A model without values, to plan with.

    Attributes:
        module: Modules with the base's names and shapes.
        heads: The output layers of language models, which ``"all-linear"`` leaves out of a loaded model.
        experts: Number of its linear layers that are experts; some libraries stack them while loading.
    """

    module: nn.Module
    heads: tuple[str, ...]
    experts: int = 0


def model_of_shapes(path: Path) -> ShapedModel:
    """Return a base as far as its files describe it without its code; no tensor is read.

    A weight of two dimensions counts as a linear layer, unless its name, or a row for each word of the vocabulary,
    marks it as an embedding or an output layer. Whether a layer is stored transposed does not change its size. Complex
    weights of more dimensions are spectral ones, not convolutions.

    Raises:
        ValueError: The files cannot be read, or are quantized.
        FileNotFoundError: The files do not exist.
    """
    base = open_base(path)
    kinds = dict(_kinds_by_shape(base.tensors))
    weights = {name: base.tensors[f"{name}.weight"] for name, kind in kinds.items() if kind != _TORCH_ATTENTION}
    if quantized := [name for name, weight in weights.items() if not (weight.dtype in WIDE or weight.dtype.is_complex)]:
        raise ValueError(
            f"The weights of {listed(quantized)} are quantized and do not have the shapes of their layers; give the "
            "unquantized base."
        )
    linear, words = [name for name, kind in kinds.items() if kind == "linear"], base.config.get("vocab_size")
    heads = tuple(name for name in linear if name.rpartition(".")[2] in _HEADS or weights[name].shape[0] == words)
    return ShapedModel(build_skeleton(base.tensors, kinds), heads, sum(".experts." in name for name in linear))


def _kinds_by_shape(layouts: Layouts) -> Iterator[tuple[str, str]]:
    for name, layout in layouts.items():
        path, _, key = name.rpartition(".")
        if path and key in _ATTENTION[:2] and len(layout.shape) == 2:
            yield path, _TORCH_ATTENTION
        if key != "weight" or not path:
            continue
        last = path.rpartition(".")[2]
        if len(layout.shape) == 2:
            is_embedding = last in _EMBEDDINGS or ("embed" in last and last not in _HEADS)
            yield path, "embedding" if is_embedding else "linear"
        elif 3 <= len(layout.shape) <= 5 and not layout.dtype.is_complex:
            yield path, "conv"
