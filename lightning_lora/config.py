"""The options of an adaptation, their types and their checks.

The number types are plain in code; on the command line jsonargparse checks their ranges, so ``--lora.rank=0`` is a
one-line usage error. ``LoRAConfig`` checks the same ranges everywhere else.

A new option is a field, its entry under ``Args`` and a row in ``_CHECKS``; the callback, ``--help``, YAML and the
record follow. If it changes the arithmetic, it also goes through ``planning/planner.py`` into ``AdapterSpec``.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from functools import partial
from typing import Any, Literal, get_args

from torch import nn
from typing_extensions import override

from lightning_lora.names import near_names, numbers_of_blocks, parse_slices

MYPY = False  # not TYPE_CHECKING, whose block jsonargparse would run for the types
if MYPY:
    NonNegativeInt = int
    PositiveInt = int
    PositiveFloat = float
    Probability = float
else:
    try:
        from jsonargparse.typing import NonNegativeInt, PositiveFloat, PositiveInt, restricted_number_type

        Probability = restricted_number_type("Probability", float, [(">=", 0.0), ("<", 1.0)])
    except ImportError:  # the command line is an extra
        NonNegativeInt, PositiveInt, PositiveFloat, Probability = int, int, float, float

ALL_LINEAR, ALL_CONV, EVERYTHING = "all-linear", "all-conv", "all"
FAMILIES = (ALL_LINEAR, ALL_CONV, EVERYTHING)  # the words of target_modules that mean kinds of layers, not names

AUTO: Literal["auto"] = "auto"

Init = Literal["kaiming", "gaussian", "orthogonal"]
AdapterDtype = Literal["float32", "bfloat16", "float16", "float64"]
FrozenNorm = Literal["eval", "track"]
Bias = Literal["none", "lora_only", "all"]


@dataclass(frozen=True, kw_only=True)
class LoRAConfig:
    """The options of one LoRA adaptation: ``W = W0 + scaling * B @ A`` with ``W0`` frozen.

    Names are dotted module paths, relative to the module that is adapted. An entry of a list names a module by its
    full path (``"net.head"``), by the end of its path (``"head"``), or by a glob over either (``"blocks.*.fc?"``).
    Every entry must match something, or attaching raises.

    Args:
        rank: Rank ``r`` of the update: ``A`` is ``(r, in)`` and ``B`` is ``(out, r)``.
        alpha: Numerator of the scaling: the update is multiplied by ``alpha / rank``. With a fixed alpha a higher rank
            therefore has a smaller scaling.
        dropout: Probability in ``[0, 1)`` of dropping an element of the adapter's input in training. The frozen layer's
            own input and an embedding's token numbers are never dropped.
        target_modules: Layers to adapt: ``"all-linear"``, ``"all-conv"``, ``"all"`` (every layer of a supported kind),
            a list of names and of these words, or one regular expression that must match the full name (as in PEFT).
        exclude_modules: Modules to leave out, with everything below them: a list of names or one regular expression.
        layers: Which of the model's repeated blocks to adapt, as with PEFT's ``layers_to_transform``: numbers, from 0
            or negative from the end, and slices such as ``"8:16"``. Of several stacks of blocks, such as an encoder and
            a decoder, each is meant. Layers outside of blocks are left out. By default all layers are adapted.
        target_parameters: Parameters of two or more dimensions to adapt, in any module: names, ends of names, globs.
            A three-dimensional parameter is treated as a stack of experts, ``(experts, out, in)``; every expert gets
            its own factors.
        target_slices: Output features of fused layers to adapt, ``{layer: {name: slices}}``, each part with its own
            factors: ``{"c_attn": {"q": "0:768", "v": "1536:2304"}}``. Slices are Python's, joined by commas.
        trainable_token_indices: Rows of an embedding to train, for new tokens: a list for the input embedding, or
            ``{embedding: list}``. Layers tied to it use the same rows.
        modules_to_save: Modules to train in full and save with the adapter, such as a new head: a list of names, or
            ``"auto"`` for the linear layers that are too small for the rank and the task heads of transformers models.
        bias: Biases of the base to train and save with the adapter: ``"none"``, ``"lora_only"`` for those of adapted
            layers, or ``"all"``.
        rank_pattern: Ranks of single layers, ``{name or regular expression: rank}``; the first match wins.
        alpha_pattern: Alphas of single layers, as in ``rank_pattern``.
        use_rslora: Scale by ``alpha / sqrt(rank)`` (Kalajdzievski 2023, arXiv:2312.03732) instead of ``alpha / rank``.
        use_dora: Rescale each row of the updated weight to a trained norm (Liu et al. 2024, arXiv:2402.09353).
        lora_bias: Give ``B`` a bias, which is scaled with it.
        untie_weights: Give a named layer whose weight is tied a copy of its own instead of rejecting it.
        init: Start of ``A`` (``B`` is zero): ``"kaiming"`` uniform in ``+-1/sqrt(in)``, ``"gaussian"`` with standard
            deviation ``1/rank``, or ``"orthogonal"`` rows of norm ``1/sqrt(3)``. An embedding always starts as in PEFT:
            ``A`` zero and ``B`` standard normal.
        adapter_dtype: Precision in which the factors are stored and updated, independent of the base's; the arithmetic
            follows the layer's input. A float64 layer has float64 factors.
        frozen_norm: Behavior in training of frozen normalization layers with running statistics, and of
            ``spectral_norm``: ``"eval"`` keeps the statistics fixed, ``"track"`` updates them and saves them with the
            adapter.

    Raises:
        TypeError: An option has the wrong type.
        ValueError: An option has an invalid value.

    Source:
        Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models", arXiv:2106.09685, eq. 3.
    """

    rank: PositiveInt = 16
    alpha: PositiveFloat = 32.0
    dropout: Probability = 0.0
    target_modules: str | Sequence[str] = ALL_LINEAR
    exclude_modules: str | Sequence[str] = ()
    layers: Sequence[str | int] = ()  # str first: jsonargparse would read "8:16" as the number 8 * 60 + 16
    target_parameters: Sequence[str] = ()
    target_slices: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    trainable_token_indices: Sequence[int] | Mapping[str, Sequence[int]] = ()
    modules_to_save: Literal["auto"] | Sequence[str] = ()
    bias: Bias = "none"
    rank_pattern: Mapping[str, PositiveInt] = field(default_factory=dict)
    alpha_pattern: Mapping[str, PositiveFloat] = field(default_factory=dict)
    use_rslora: bool = False
    use_dora: bool = False
    lora_bias: bool = False
    untie_weights: bool = False
    init: Init = "kaiming"
    adapter_dtype: AdapterDtype = "float32"
    frozen_norm: FrozenNorm = "eval"

    def __post_init__(self) -> None:
        for option in fields(self):
            value = getattr(self, option.name)
            if value is not option.default:  # defaults need no check
                object.__setattr__(self, option.name, _CHECKS[option.name](option.name, value))
        if not (self.target_modules or self.target_parameters or self.target_slices or self.trainable_token_indices):
            raise ValueError(
                f"No target given (LoRAConfig.target_modules={self.target_modules!r}): set target_modules, "
                "target_parameters, target_slices or trainable_token_indices."
            )

    @property
    def families(self) -> tuple[str, ...]:
        """The words of ``target_modules`` that mean all layers of some kinds."""
        targets = self.target_modules
        return tuple(word for word in ((targets,) if isinstance(targets, str) else targets) if word in FAMILIES)

    @property
    def named_targets(self) -> str | tuple[str, ...]:
        """The rest of ``target_modules``: names and globs, or one regular expression."""
        if isinstance(self.target_modules, str):
            return () if self.families else self.target_modules
        return tuple(entry for entry in self.target_modules if entry not in FAMILIES)

    def scaling(self, rank: int, alpha: float) -> float:
        """Return the scaling of ``B @ A`` for a layer of this rank and alpha."""
        return alpha / (math.sqrt(rank) if self.use_rslora else rank)

    def changed(self) -> dict[str, Any]:
        """Return the options that differ from the defaults."""
        default = LoRAConfig().to_dict()
        return {name: value for name, value in self.to_dict().items() if value != default.get(name)}

    @override
    def __repr__(self) -> str:
        return f"LoRAConfig({shown_options(self.changed())})"

    def to_dict(self) -> dict[str, Any]:
        """Return plain scalars, lists and dicts, suitable for YAML, JSON and checkpoints; ``layers`` only if given."""
        # Earlier versions, which do not know the option, read what they can do.
        return {key: _plain(value) for key, value in asdict(self).items() if value or key != "layers"}

    @classmethod
    def from_dict(cls, options: Mapping[str, Any]) -> LoRAConfig:
        """Build a config from the result of ``to_dict``.

        Raises:
            ValueError: This version does not know an option.
        """
        unknown = sorted(options.keys() - OPTIONS)
        if unknown:
            raise ValueError(f"LoRAConfig has no options {unknown}. Was this written by a newer lightning_lora?")
        return cls(**options)


OPTIONS = frozenset(option.name for option in fields(LoRAConfig))


def shown_options(options: Mapping[str, Any]) -> str:
    """Return options as they are written in a call."""
    return ", ".join(f"{name}={value!r}" for name, value in options.items())


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(inner) for key, inner in value.items()}
    return list(value) if isinstance(value, tuple) else value


# --- checks: each returns the value as it is kept, or raises an error that names the option and the value


def check_known(owner: str, names: Iterable[str], known: Collection[str]) -> None:
    """Reject unknown options and suggest the closest one (PEFT's spelling included)."""
    for name in names:
        if name not in known:
            near = [_IN_PEFT[name]] if name in _IN_PEFT else near_names(name, known, 1)
            if name in _NOT_HERE:
                raise TypeError(f"{owner} has no option {name!r} of PEFT's. {_NOT_HERE[name]}")
            hint = f"Did you mean {near[0]!r}?" if near else f"Options are {', '.join(sorted(known))}."
            raise TypeError(f"{owner} has no option {name!r}. {hint}")


def only_config(config: LoRAConfig, single: LoRAConfig, given: Collection[str]) -> LoRAConfig:
    """Return the config; reject options beside it that say something else."""
    if not isinstance(config, LoRAConfig):
        raise TypeError(f"LoRACallback.config must be a LoRAConfig, got {config!r}.")
    if others := [name for name in given if getattr(single, name) != getattr(config, name)]:
        raise TypeError(
            f"LoRACallback takes a config or single options, not both: config has {others[0]}="
            f"{getattr(config, others[0])!r}, and {others[0]}={getattr(single, others[0])!r} was given beside it. Use "
            "dataclasses.replace to change a config."
        )
    return config


_IN_PEFT = {
    "r": "rank",
    "lora_alpha": "alpha",
    "lora_dropout": "dropout",
    "init_lora_weights": "init",
    "layers_to_transform": "layers",
}
_NOT_HERE = {
    "task_type": "The adapters do not depend on it; to record it in the files, call save_adapter(..., task_type=...).",
    "layers_pattern": "The repeated blocks are found without it; layers=[0, 1] takes their numbers.",
}


def check_positive(name: str, value: float) -> None:
    """Reject numbers that are not positive and finite."""
    if not 0 < value < math.inf:
        raise ValueError(f"{name} must be positive and finite, got {value!r}.")


def _rank(name: str, value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"LoRAConfig.{name} must be an integer, got {value!r}.")
    if value < 1:
        raise ValueError(f"LoRAConfig.{name} must be >= 1, got {value!r}.")
    return int(value)  # jsonargparse has types of its own, and checkpoints must hold none


def _number(name: str, value: Any) -> float:
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        raise TypeError(f"LoRAConfig.{name} must be a number, got {value!r}.")
    return float(value)


def _alpha(name: str, value: Any) -> float:
    number = _number(name, value)
    check_positive(f"LoRAConfig.{name}", value)  # the update would vanish or explode
    return number


def _dropout(name: str, value: Any) -> float:
    if not 0.0 <= _number(name, value) < 1.0:
        raise ValueError(f"LoRAConfig.{name} must be in [0, 1), got {value!r}.")
    return float(value)


def _flag(name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise TypeError(f"LoRAConfig.{name} must be True or False, got {value!r}.")
    return value


def _choice(name: str, value: Any, *, of: Any) -> str:
    return check_choice(f"LoRAConfig.{name}", value, of=of)


def check_choice(name: str, value: Any, *, of: Any) -> str:
    """Return one of a ``Literal``'s values; reject anything else."""
    if value not in get_args(of):
        raise ValueError(f"{name}={value!r} is unknown; choose one of {', '.join(map(repr, get_args(of)))}.")
    return str(value)


def check_names(name: str, values: Any) -> tuple[str, ...]:
    """Return a list of names as it is kept; reject anything else."""
    is_list = isinstance(values, Sequence) and not isinstance(values, str)
    if not is_list or not all(isinstance(value, str) for value in values):
        raise TypeError(f"{name} must be a list of names, got {values!r}.")
    if not all(values):
        raise ValueError(f"{name} holds an empty name: {list(values)!r}.")
    return tuple(values)


def _names(name: str, values: Any) -> tuple[str, ...]:
    return check_names(f"LoRAConfig.{name}", values)


def _regex_or_names(name: str, value: Any) -> str | tuple[str, ...]:
    if not isinstance(value, str):
        return _names(name, value)
    try:
        re.compile(value)
    except re.error as error:
        raise ValueError(
            f"LoRAConfig.{name}={value!r} is not a valid regular expression ({error}). A string is read as a regex; "
            "pass names and globs as a list."
        ) from error
    return value


def _names_or_auto(name: str, value: Any) -> str | tuple[str, ...]:
    if isinstance(value, str) and value != AUTO:
        raise TypeError(f"LoRAConfig.{name} must be {AUTO!r} or a list of names, got {value!r}.")
    return AUTO if value == AUTO else _names(name, value)


def _numbers_by_name(name: str, values: Any, *, check: Callable[[str, Any], float]) -> dict[str, float]:
    if not isinstance(values, Mapping):
        raise TypeError(f"LoRAConfig.{name} must map names to numbers, got {values!r}.")
    kept = {}
    for key, value in values.items():
        kept[str(key)] = check(f"{name}[{key!r}]", value)
    return kept


def _blocks(name: str, values: Any) -> tuple[int | str, ...]:
    is_list = isinstance(values, Sequence) and not isinstance(values, str)
    if not is_list or not all(type(value) is int or isinstance(value, str) for value in values):
        raise TypeError(
            f"LoRAConfig.{name} must be a list of block numbers and slices, such as [0, -1, '8:16'], got {values!r}."
        )
    try:
        for value in values:
            numbers_of_blocks(value, 1)
    except ValueError as error:
        raise ValueError(f"LoRAConfig.{name}={list(values)!r}: {error}") from None
    return tuple(values)


def _slices(name: str, values: Any) -> dict[str, dict[str, str]]:
    kept, wrong = {}, TypeError(f"LoRAConfig.{name} must map layers to {{name: slices}}, got {values!r}.")
    if not isinstance(values, Mapping):
        raise wrong
    for layer, parts in values.items():
        if not isinstance(parts, Mapping):
            raise wrong
        if not parts:
            raise ValueError(f"LoRAConfig.{name}[{layer!r}] names no slice, got {parts!r}.")
        for part, text in parts.items():
            if not (isinstance(part, str) and part.isidentifier()) or hasattr(nn.ModuleDict(), part):
                raise ValueError(
                    f"LoRAConfig.{name}[{layer!r}]: {part!r} is not a valid slice name: use a Python identifier that "
                    "is not an attribute of nn.ModuleDict."
                )
            try:
                parse_slices(text)
            except ValueError as error:
                raise ValueError(f"LoRAConfig.{name}[{layer!r}][{part!r}]: {error}") from None
        kept[str(layer)] = dict(parts)
    return kept


def _tokens(name: str, values: Any) -> tuple[int, ...] | dict[str, tuple[int, ...]]:
    """Return the tokens in ascending order."""
    if isinstance(values, Mapping):
        for key, tokens in values.items():
            if isinstance(tokens, Sequence) and not tokens:
                raise ValueError(f"LoRAConfig.{name}[{key!r}] names no token, got {tokens!r}.")
        return {str(key): _token_list(f"{name}[{key!r}]", tokens) for key, tokens in values.items()}
    return _token_list(name, values)


def _token_list(name: str, tokens: Any) -> tuple[int, ...]:
    if not isinstance(tokens, Sequence) or not all(type(token) is int for token in tokens):
        raise TypeError(f"LoRAConfig.{name} must be a list of token IDs, got {tokens!r}.")
    if min(tokens, default=0) < 0 or len(set(tokens)) < len(tokens):
        raise ValueError(f"LoRAConfig.{name} must contain distinct token IDs, each at least 0, got {tokens!r}.")
    return tuple(sorted(tokens))


_CHECKS: dict[str, Callable[[str, Any], object]] = {
    "rank": _rank,
    "alpha": _alpha,
    "dropout": _dropout,
    "target_modules": _regex_or_names,
    "exclude_modules": _regex_or_names,
    "layers": _blocks,
    "target_parameters": _names,
    "target_slices": _slices,
    "trainable_token_indices": _tokens,
    "modules_to_save": _names_or_auto,
    "bias": partial(_choice, of=Bias),
    "rank_pattern": partial(_numbers_by_name, check=_rank),
    "alpha_pattern": partial(_numbers_by_name, check=_alpha),
    "use_rslora": _flag,
    "use_dora": _flag,
    "lora_bias": _flag,
    "untie_weights": _flag,
    "init": partial(_choice, of=Init),
    "adapter_dtype": partial(_choice, of=AdapterDtype),
    "frozen_norm": partial(_choice, of=FrozenNorm),
}
