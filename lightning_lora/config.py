"""What the user asked for: one frozen value that validates itself."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal, get_args

from lightning_lora.option_checks import (
    check_alpha,
    check_choice,
    check_number,
    check_rank,
    names_of,
    numbers_by_name,
    regular_expression,
    slices_by_layer,
    tokens_of,
)
from lightning_lora.option_types import PositiveFloat, PositiveInt, Probability

ALL_LINEAR = "all-linear"

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
        alpha: Numerator of the scaling: the update is multiplied by ``alpha / rank``.
        dropout: Probability in ``[0, 1)`` of dropping an element of the adapter's input while training; the frozen
            layer's own input is never dropped, nor are an embedding's token numbers.
        target_modules: Layers to adapt: ``"all-linear"``, a list of names, or one regular expression that must match
            the full name (as in PEFT).
        exclude_modules: Layers left out, with everything below them: a list of names or one regular expression.
        target_parameters: Parameters of two or more dimensions to adapt wherever they are: names, ends of names, globs.
            One of three is a stack of experts, ``(experts, out, in)``, and every expert gets factors of its own.
        target_slices: Output features of fused layers to adapt, ``{layer: {name: slices}}``, each part with factors of
            its own: ``{"c_attn": {"q": "0:768", "v": "1536:2304"}}``. Slices are Python's, several joined by commas.
        trainable_token_indices: Rows of an embedding that train while all others stay, for new tokens: a list for the
            input embedding, or ``{embedding: list}``. Layers tied to it use the same rows.
        modules_to_save: Modules trained in full and saved with the adapter, such as a new head.
        bias: Biases of the base that train and are saved with the adapter: ``"none"``, ``"lora_only"`` for those of
            adapted layers, or ``"all"``.
        rank_pattern: Ranks of single layers, ``{name or regular expression: rank}``; the first match wins.
        alpha_pattern: Alphas of single layers, in the same way.
        use_rslora: Scale by ``alpha / sqrt(rank)`` (Kalajdzievski 2023, arXiv:2312.03732) instead of ``alpha / rank``.
        use_dora: Rescale each row of the updated weight to a trained norm (Liu et al. 2024, arXiv:2402.09353).
        lora_bias: Give ``B`` a bias, which is scaled with it.
        untie_weights: Give a layer that is named, and whose weight is tied to another's, a copy of its own instead of
            refusing it.
        init: How ``A`` starts (``B`` is zero): ``"kaiming"`` uniform in ``+-1/sqrt(in)``, ``"gaussian"`` with standard
            deviation ``1/rank``, or ``"orthogonal"`` rows of norm ``1/sqrt(3)``. An embedding starts as in PEFT,
            whatever this says: ``A`` zero and ``B`` standard normal.
        adapter_dtype: Precision in which the factors are kept and updated, whatever the base's; the arithmetic follows
            the layer's input. A float64 layer has float64 factors.
        frozen_norm: What frozen normalisation layers with running statistics, and ``spectral_norm``, do while training:
            ``"eval"`` keeps the statistics fixed, ``"track"`` lets them move and saves them with the adapter.

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
    target_slices: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    trainable_token_indices: Sequence[int] | Mapping[str, Sequence[int]] = ()
    modules_to_save: Sequence[str] = ()
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
        check_rank("rank", self.rank)
        check_alpha("alpha", self.alpha)
        check_number("dropout", self.dropout)
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"LoRAConfig.dropout must be in [0, 1), got {self.dropout!r}.")
        # Plain numbers, since jsonargparse hands over types of its own and checkpoints must hold none.
        for name, kind in (("rank", int), ("alpha", float), ("dropout", float)):
            self._set(name, kind(getattr(self, name)))
        self._check_targets()
        self._set("rank_pattern", numbers_by_name("rank_pattern", self.rank_pattern, check_rank, int))
        self._set("alpha_pattern", numbers_by_name("alpha_pattern", self.alpha_pattern, check_alpha, float))
        for name in ("use_rslora", "use_dora", "lora_bias", "untie_weights"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"LoRAConfig.{name} must be True or False, got {getattr(self, name)!r}.")
        for name, choices in (
            ("bias", Bias),
            ("init", Init),
            ("adapter_dtype", AdapterDtype),
            ("frozen_norm", FrozenNorm),
        ):
            check_choice(name, getattr(self, name), get_args(choices))

    def _check_targets(self) -> None:
        for name in ("target_modules", "exclude_modules"):
            value = getattr(self, name)
            self._set(name, regular_expression(name, value) if isinstance(value, str) else names_of(name, value))
        for name in ("target_parameters", "modules_to_save"):
            if isinstance(getattr(self, name), str):
                raise TypeError(f"LoRAConfig.{name} must be a list of names, got {getattr(self, name)!r}.")
            self._set(name, names_of(name, getattr(self, name)))
        self._set("target_slices", slices_by_layer(self.target_slices))
        self._set("trainable_token_indices", tokens_of(self.trainable_token_indices))
        if not (self.target_modules or self.target_parameters or self.target_slices or self.trainable_token_indices):
            raise ValueError(
                f"LoRAConfig.target_modules={self.target_modules!r} names nothing. Use {ALL_LINEAR!r} or names."
            )

    def _set(self, name: str, value: object) -> None:
        object.__setattr__(self, name, value)

    def scaling(self, rank: int, alpha: float) -> float:
        """Return the factor of ``B @ A`` for a layer of this rank and alpha."""
        return alpha / (math.sqrt(rank) if self.use_rslora else rank)

    def to_dict(self) -> dict[str, Any]:
        """Return plain scalars, lists and dicts, fit for YAML, JSON and checkpoints."""
        return {key: _plain(value) for key, value in asdict(self).items()}

    @classmethod
    def from_dict(cls, options: Mapping[str, Any]) -> LoRAConfig:
        """Build a config from what ``to_dict`` gave.

        Raises:
            ValueError: A key is no option of this version.
        """
        unknown = sorted(options.keys() - OPTIONS)
        if unknown:
            raise ValueError(f"{unknown} are no options of LoRAConfig; was this written by a newer lightning_lora?")
        return cls(**options)


OPTIONS = frozenset(option.name for option in fields(LoRAConfig))


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(inner) for key, inner in value.items()}
    return list(value) if isinstance(value, tuple) else value
