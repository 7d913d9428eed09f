"""What kind of layer an adapter's layer is, told from the shapes of its factors and its weight."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from itertools import permutations, product
from typing import Any

from torch import Tensor

from lightning_lora.disk.base_folder import module_paths
from lightning_lora.names import join
from lightning_lora.peft_format.config import KNOWN_ORDER
from lightning_lora.peft_format.directory import keys_by_path
from lightning_lora.peft_format.names import PREFIX, TOKENS_SUFFIX, without_wrappers
from lightning_lora.storage.safetensors import Layout

# Models of transformers whose linear layers store their weights as (in, out).
_CONV1D_MODELS = ("gpt2", "openai-gpt", "imagegpt", "decision_transformer", "clvp", "trajectory_transformer")
_MOST_ORDERS = 24
_ATTENTION = ("in_proj_weight", "q_proj_weight")


def kinds_of_peft(
    tensors: Mapping[str, Tensor],
    parameters: Collection[str],
    layouts: Mapping[str, Layout],
    config: Mapping[str, Any],
    *,
    is_transposed: bool,
) -> tuple[dict[str, str], dict[str, Layout]]:
    """Return the kinds of the layers that a PEFT file adapts, path -> kind, and the tensors in the model's order.

    Args:
        tensors: The file's.
        parameters: Its ``target_parameters``.
        layouts: The base's tensors under the adapter's names.
        config: The base's config.
        is_transposed: What the file says of linear layers of which the shapes do not tell.

    Raises:
        ValueError: A kind cannot be told, or cannot be merged without the model's code.
    """
    known = {key.removeprefix(PREFIX): tensor for key, tensor in tensors.items()}
    modules, kinds = module_paths(layouts), dict[str, str]()
    tokens = {key.removesuffix(TOKENS_SUFFIX) for key in known if key.endswith(TOKENS_SUFFIX)}
    for name in tokens & modules:
        if f"{name}.weight" in layouts:
            kinds[name] = "embedding"
    stacks: dict[str, dict[int, tuple[int, int]]] = {}
    for path, keys in sorted(keys_by_path(known).items()):
        place = without_wrappers(path, modules)
        assert place is not None, "the renaming resolves every path"
        name = place[0]
        _refuse_attention(name, layouts)
        if any(_names(parameters, join(name, each)) for each in _own(name, layouts)):
            stacks.setdefault(name, {})[place[1]] = _sizes(known, path)
        elif any(key.endswith(".lora_embedding_A") for key in keys):
            kinds[name] = _weighted(name, layouts, "embedding")
        elif (A := known.get(f"{path}.lora_A.weight")) is not None and A.ndim > 2:
            kinds[name] = _weighted(name, layouts, "conv")
        else:
            _weighted(name, layouts, "linear")
            kinds[name] = _linear_kind(name, layouts, _sizes(known, path), _says(config, is_transposed))
    ordered = dict(layouts)
    for name, sizes in stacks.items():
        named = [each for each in _own(name, layouts) if _names(parameters, join(name, each))]
        order, transposed = _stack_choice(name, {each: layouts[join(name, each)].shape for each in named}, sizes)
        ordered |= {join(name, each): ordered.pop(join(name, each)) for each in order}
        kinds |= {name: "transposed stack"} if transposed else {}
    return kinds, ordered


def kinds_of_checkpoint(
    record: Mapping[str, Any], state: Mapping[str, Tensor], layouts: Mapping[str, Layout], config: Mapping[str, Any]
) -> dict[str, str]:
    """Return the kinds of the layers that a Lightning checkpoint adapts: path -> kind.

    Raises:
        ValueError: A kind cannot be told, or cannot be merged without the model's code.
    """
    options = [entry["config"] for entry in record["adapters"]]
    kinds: dict[str, str] = {}
    stacks: dict[str, list[bool | None]] = {}
    for key in sorted(state):
        name, is_adapter, inner = key.partition(".lora.")
        if not is_adapter:
            continue
        _refuse_attention(name, layouts)
        part, _, factor = inner.rpartition(".")
        if factor == "rows":
            kinds[name] = "embedding"
        elif factor == "A" and part and join(name, part) in layouts:
            shape = layouts[join(name, part)].shape
            if len(shape) == 3:
                votes = stacks.setdefault(name, [])
                votes.append(_one_is_transposed(shape, state[f"{name}.lora.{part}.B"], state[key]))
        elif factor == "A":
            B, shape = state[key[:-1] + "B"], layouts[_weight(name, layouts)].shape
            has_bias = key[:-1] + "bias" in state
            kinds[name] = _kind_in_checkpoint(name, shape, layouts, (state[key], B), options, config, has_bias)
    return kinds | {name: "transposed stack" for name, votes in stacks.items() if _voted(name, votes)}


def _kind_in_checkpoint(
    name: str,
    shape: tuple[int, ...],
    layouts: Mapping[str, Layout],
    factors: tuple[Tensor, Tensor],
    options: list[dict[str, Any]],
    config: Mapping[str, Any],
    has_bias: bool,
) -> str:
    A, B = factors
    if len(shape) > 2:
        return "conv"
    sliced = any(each.get("target_slices") for each in options)
    rows = shape[0] if A.shape[-1] == shape[1] else shape[1]  # of the whole weight; a slice's B has some of them
    sizes = (rows if sliced else B.shape[-2], A.shape[-1])
    kind = _linear_kind(name, layouts, sizes, _says(config, None))
    # Embeddings are transposed too; which of both a layer is makes a difference only for a bias of B.
    is_embedding = kind == "conv1d" and not has_bias and any(each.get("lora_bias") for each in options)
    return "embedding" if is_embedding else kind


def _says(config: Mapping[str, Any], file_says: bool | None) -> bool | None:
    if config.get("model_type") in _CONV1D_MODELS or file_says:
        return True
    return False if "model_type" in config else file_says


def _linear_kind(name: str, layouts: Mapping[str, Layout], sizes: tuple[int, int], otherwise: bool | None) -> str:
    shape = layouts[f"{name}.weight"].shape
    if shape == sizes and shape != sizes[::-1]:
        return "linear"
    if shape == sizes[::-1] and shape != sizes:
        return "conv1d"
    if otherwise is None and shape == sizes:
        raise ValueError(
            f"{name}: the weight is square, so it cannot be told which way it is stored. Put the model's config.json "
            "beside the base, or export the adapter with save_adapter and merge that."
        )
    return "conv1d" if otherwise and shape == sizes else "linear"


def _weight(name: str, layouts: Mapping[str, Layout]) -> str:
    if f"{name}.weight" not in layouts:
        raise ValueError(f"{name}: the base has no weight {name + '.weight'!r}.")
    return f"{name}.weight"


def _weighted(name: str, layouts: Mapping[str, Layout], kind: str) -> str:
    _weight(name, layouts)
    return kind


def _refuse_attention(name: str, layouts: Mapping[str, Layout]) -> None:
    above = name.rpartition(".")[0]
    if any(join(path, key) in layouts for path in (name, above) for key in _ATTENTION):
        raise ValueError(f"{name}: torch's attention cannot be merged on disk; load the model and merge it in memory.")


def _own(name: str, layouts: Mapping[str, Layout]) -> list[str]:
    depth = len(name) + 1
    return [each[depth:] for each in layouts if each.startswith(f"{name}.") and "." not in each[depth:]]


def _names(parameters: Collection[str], path: str) -> bool:
    return any(path == each or path.endswith(f".{each}") for each in parameters)


def _sizes(known: Mapping[str, Tensor], path: str) -> tuple[int, int]:
    """Return the rows of ``B`` and the columns of ``A``, or zeros that fit nothing: reading says what is wrong."""
    A, B = (known.get(f"{path}.lora_{factor}.weight") for factor in "AB")
    return (len(B) if B is not None and B.ndim else 0, A.shape[-1] if A is not None and A.ndim else 0)


def _stack_choice(
    name: str, shapes: Mapping[str, tuple[int, ...]], sizes: Mapping[int, tuple[int, int]]
) -> tuple[tuple[str, ...], bool]:
    """Return the order in which a model registers parameters, and whether its stacks are transposed.

    PEFT tells several parameters of one module apart by that order alone, which no file of tensors holds.

    Args:
        name: The module.
        shapes: Its adapted parameters.
        sizes: How many of PEFT's wrappers are left of a path -> the sizes of the factors there.

    Raises:
        ValueError: More than one choice fits the shapes.
    """
    orders = [KNOWN_ORDER] if set(shapes) == set(KNOWN_ORDER) else list(permutations(shapes))[:_MOST_ORDERS]
    turns = (False, True) if any(len(shape) == 3 for shape in shapes.values()) else (False,)
    fitting = [
        (order, turn)
        for order, turn in product(orders, turns)
        if all(depth < len(order) and _fits(shapes[order[-1 - depth]], each, turn) for depth, each in sizes.items())
    ]
    if len(fitting) > 1:
        raise ValueError(
            f"{name}: the shapes of {', '.join(shapes)} do not tell how the model reads them; load the model and merge "
            "in memory."
        )
    return fitting[0] if fitting else (orders[0], False)


def _fits(shape: tuple[int, ...], sizes: tuple[int, int], turn: bool) -> bool:
    if len(shape) == 3:
        return shape[1:] == (sizes[::-1] if turn else sizes)
    return shape == sizes


def _one_is_transposed(shape: tuple[int, ...], B: Tensor, A: Tensor) -> bool | None:
    sizes = (B.shape[-2], A.shape[-1])
    return None if sizes[0] == sizes[1] else shape[1:] == sizes[::-1]


def _voted(name: str, votes: list[bool | None]) -> bool:
    told = {vote for vote in votes if vote is not None}
    if len(told) != 1:
        raise ValueError(
            f"{name}: its parameters are square, so it cannot be told which way they are stored; merge in memory."
        )
    return told.pop()
