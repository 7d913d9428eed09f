"""What the user asked for: one frozen value that validates itself."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal, get_args

from lightning_lora.option_types import PositiveFloat, PositiveInt, Probability

ALL_LINEAR = "all-linear"

Init = Literal["kaiming", "gaussian", "orthogonal"]
AdapterDtype = Literal["float32", "bfloat16", "float16", "float64"]
FrozenNorm = Literal["eval", "track"]


@dataclass(frozen=True, kw_only=True)
class LoRAConfig:
    """The options of one LoRA adaptation: ``W = W0 + scaling * B @ A`` with ``W0`` frozen.

    Names are dotted module paths, relative to the module that is adapted. An entry of a list names a module by its
    full path (``"net.head"``), by the end of its path (``"head"``), or by a glob over either (``"blocks.*.fc?"``).
    Every entry must match something, or attaching raises.

    Args:
        rank: Rank ``r`` of the update: ``A`` is ``(r, in)`` and ``B`` is ``(out, r)``.
        alpha: Numerator of the scaling: the update is multiplied by ``alpha / rank``.
        dropout: Probability in ``[0, 1)`` of dropping an element of the adapter's input while training; the frozen
            layer's own input is never dropped, nor are an embedding's token numbers.
        target_modules: Layers to adapt: ``"all-linear"``, a list of names, or one regular expression that must match
            the full name (as in PEFT).
        exclude_modules: Layers left out, with everything below them: a list of names or one regular expression.
        target_parameters: Parameters of two or more dimensions to adapt wherever they are: names, ends of names, globs.
            One of three is a stack of experts, ``(experts, out, in)``, and every expert gets factors of its own.
        modules_to_save: Modules trained in full and saved with the adapter, such as a new head.
        rank_pattern: Ranks of single layers, ``{name or regular expression: rank}``; the first match wins.
        alpha_pattern: Alphas of single layers, in the same way.
        use_rslora: Scale by ``alpha / sqrt(rank)`` (Kalajdzievski 2023, arXiv:2312.03732) instead of ``alpha / rank``.
        init: How ``A`` starts (``B`` is zero): ``"kaiming"`` uniform in ``+-1/sqrt(in)``, ``"gaussian"`` with standard
            deviation ``1/rank``, or ``"orthogonal"`` rows of norm ``1/sqrt(3)``. An embedding starts as in PEFT,
            whatever this says: ``A`` zero and ``B`` standard normal.
        adapter_dtype: Precision in which the factors are kept and updated, whatever the base's; the arithmetic follows
            the layer's input. A float64 layer has float64 factors.
        frozen_norm: What frozen normalisation layers with running statistics do while training: ``"eval"`` keeps the
            statistics fixed, ``"track"`` lets them move and saves them with the adapter.

    Raises:
        TypeError: An option has the wrong type.
        ValueError: An option has a value that makes no sense.

    Source:
        Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models", arXiv:2106.09685, eq. 3.
    """

    rank: PositiveInt = 16
    alpha: PositiveFloat = 32.0
    dropout: Probability = 0.0
    target_modules: str | Sequence[str] = ALL_LINEAR
    exclude_modules: str | Sequence[str] = ()
    target_parameters: Sequence[str] = ()
    modules_to_save: Sequence[str] = ()
    rank_pattern: Mapping[str, PositiveInt] = field(default_factory=dict)
    alpha_pattern: Mapping[str, PositiveFloat] = field(default_factory=dict)
    use_rslora: bool = False
    init: Init = "kaiming"
    adapter_dtype: AdapterDtype = "float32"
    frozen_norm: FrozenNorm = "eval"

    def __post_init__(self) -> None:
        _check_rank("rank", self.rank)
        _check_alpha("alpha", self.alpha)
        _check_number("dropout", self.dropout)
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"LoRAConfig.dropout must be in [0, 1), got {self.dropout!r}.")
        # Plain numbers, since jsonargparse hands over types of its own and checkpoints must hold none.
        for name, kind in (("rank", int), ("alpha", float), ("dropout", float)):
            self._set(name, kind(getattr(self, name)))
        for name in ("target_modules", "exclude_modules"):
            value = getattr(self, name)
            self._set(name, _regular_expression(name, value) if isinstance(value, str) else _names(name, value))
        for name in ("target_parameters", "modules_to_save"):
            if isinstance(getattr(self, name), str):
                raise TypeError(f"LoRAConfig.{name} must be a list of names, got {getattr(self, name)!r}.")
            self._set(name, _names(name, getattr(self, name)))
        if not (self.target_modules or self.target_parameters):
            raise ValueError(
                f"LoRAConfig.target_modules={self.target_modules!r} names nothing. Use {ALL_LINEAR!r} or names."
            )
        self._set("rank_pattern", _pattern("rank_pattern", self.rank_pattern, _check_rank, int))
        self._set("alpha_pattern", _pattern("alpha_pattern", self.alpha_pattern, _check_alpha, float))
        if not isinstance(self.use_rslora, bool):
            raise TypeError(f"LoRAConfig.use_rslora must be True or False, got {self.use_rslora!r}.")
        _check_choice("init", self.init, get_args(Init))
        _check_choice("adapter_dtype", self.adapter_dtype, get_args(AdapterDtype))
        _check_choice("frozen_norm", self.frozen_norm, get_args(FrozenNorm))

    def _set(self, name: str, value: object) -> None:
        object.__setattr__(self, name, value)

    def scaling(self, rank: int, alpha: float) -> float:
        """Return the factor of ``B @ A`` for a layer of this rank and alpha."""
        return alpha / (math.sqrt(rank) if self.use_rslora else rank)

    def to_dict(self) -> dict[str, Any]:
        """Return plain scalars, lists and dicts, fit for YAML, JSON and checkpoints."""
        return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}

    @classmethod
    def from_dict(cls, options: Mapping[str, Any]) -> LoRAConfig:
        """Build a config from what ``to_dict`` gave.

        Raises:
            ValueError: A key is no option of this version.
        """
        unknown = sorted(options.keys() - {option.name for option in fields(cls)})
        if unknown:
            raise ValueError(f"{unknown} are no options of LoRAConfig; was this written by a newer lightning_lora?")
        return cls(**options)


def _check_rank(name: str, value: object) -> None:
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"LoRAConfig.{name} must be an integer, got {value!r}.")
    if value < 1:
        raise ValueError(f"LoRAConfig.{name} must be >= 1, got {value!r}.")


def _check_number(name: str, value: object) -> None:
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        raise TypeError(f"LoRAConfig.{name} must be a number, got {value!r}.")


def _check_alpha(name: str, value: object) -> None:
    _check_number(name, value)
    assert isinstance(value, (int, float))
    if not (math.isfinite(value) and value > 0):
        raise ValueError(f"LoRAConfig.{name} must be a positive number, got {value!r}: the update would vanish.")


def _check_choice(name: str, value: object, choices: Sequence[str]) -> None:
    if value not in choices:
        raise ValueError(f"LoRAConfig.{name}={value!r} is unknown; choose one of {', '.join(map(repr, choices))}.")


def _regular_expression(name: str, value: str) -> str:
    try:
        re.compile(value)
    except re.error as error:
        raise ValueError(
            f"LoRAConfig.{name}={value!r} is no regular expression ({error}). A string is one; put names and globs "
            "into a list."
        ) from error
    return value


def _names(name: str, values: object) -> tuple[str, ...]:
    if not isinstance(values, Sequence) or not all(isinstance(value, str) for value in values):
        raise TypeError(f"LoRAConfig.{name} must be a list of names, got {values!r}.")
    if not all(values):
        raise ValueError(f"LoRAConfig.{name} holds an empty name: {list(values)!r}.")
    return tuple(values)


def _pattern(name: str, values: object, check: Callable[[str, object], None], kind: type) -> dict[str, Any]:
    if not isinstance(values, Mapping):
        raise TypeError(f"LoRAConfig.{name} must map names to numbers, got {values!r}.")
    for key, value in values.items():
        check(f"{name}[{key!r}]", value)
    return {str(key): kind(value) for key, value in values.items()}
