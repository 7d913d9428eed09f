"""The options of an adaptation, their types and their checks.

The number types are plain in code; on the command line jsonargparse checks their ranges, so ``--lora.rank=0`` is a
one-line usage error. ``LoRAConfig`` checks the same ranges everywhere else.

A new option is a field, its entry under ``Args`` and a row in ``_CHECKS``; the callback, ``--help``, YAML and the
record follow. If it changes the arithmetic, it also goes through ``planning/planner.py`` into ``AdapterSpec``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from functools import cached_property, partial
from typing import Any, Literal

from typing_extensions import override

from lightning_lora import option_checks
from lightning_lora.option_checks import check_known

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

Init = Literal["kaiming", "gaussian", "orthogonal", "pissa", "olora", "eva", "corda", "lora_ga", "covariance"]
STARTS_FROM_WEIGHTS = ("pissa", "olora")
STARTS_FROM_DATA = ("eva", "corda", "lora_ga", "covariance")
_USUAL_RANK = 16
AdapterDtype = Literal["float32", "bfloat16", "float16", "float64"]
FrozenNorm = Literal["eval", "track"]
Bias = Literal["none", "lora_only", "all"]


@dataclass(frozen=True, kw_only=True)
class InitOptions:
    """A start of the factors with its options; an option of another start is an error.

    Args:
        name: The start, as in ``LoRAConfig.init``.
        batches: How many training batches ``eva``, ``corda``, ``lora_ga`` and ``covariance`` look at.
        stats_budget: Memory for the sums over these batches, such as ``"1GB"``. The widest layers are summarized by
            random projections where all sums together would not fit, and those above 8192 features in any case.
        normalize: Scale ``eva``'s and ``covariance``'s ``A`` such that each feature ``a @ x`` has the mean square that
            ``kaiming`` gives it, so that the same learning rates fit.
        rho: How far the ranks of layers may differ, at an equal number of parameters (``eva``, ``covariance``): up to
            ``rho`` times the rank, where the data ask for it (Paischer et al. 2024, section 3.3). 1 keeps them equal.
        mode: ``corda``'s choice: ``"ipm"`` trains the directions that the data use most, ``"kpm"`` those that they use
            least, which forgets less.
        power: ``corda``'s weight of the data: 1 as in the paper, or 0.5, which keeps most of the layer's output.
        gamma: Divides ``lora_ga``'s factors by its root.
        centre: Subtract the means of inputs and gradients (``covariance``; ``eva`` always does).
        smooth: Prefer directions that are smooth along the positions of a convolution's kernel, as far as they explain
            more of data that were not used to find them (``eva``, ``covariance``).

    Raises:
        TypeError: An option has the wrong type.
        ValueError: An option has an invalid value, or none for this start.
    """

    name: Init
    batches: PositiveInt = 16
    stats_budget: str = "1GB"
    normalize: bool = True
    rho: PositiveFloat = 1.0
    mode: Literal["ipm", "kpm"] = "ipm"
    power: PositiveFloat = 1.0
    gamma: PositiveFloat = 16.0
    centre: bool = False
    smooth: bool = False

    def __post_init__(self) -> None:
        option_checks.choice("init", self.name, of=Init)
        kept: dict[str, float] = {"batches": option_checks.rank("init.batches", self.batches)}
        kept |= {name: option_checks.alpha(f"init.{name}", getattr(self, name)) for name in ("rho", "power", "gamma")}
        for name, value in kept.items():
            object.__setattr__(self, name, value)
        for name in ("normalize", "centre", "smooth"):
            option_checks.flag(f"init.{name}", getattr(self, name))
        option_checks.choice("init.mode", self.mode, of=Literal["ipm", "kpm"])
        if self.power not in (0.5, 1.0):
            raise ValueError(f"LoRAConfig.init.power must be 0.5 or 1, got {self.power!r}.")
        if self.rho < 1:
            raise ValueError(f"LoRAConfig.init.rho must be at least 1, got {self.rho!r}.")
        option_checks.bytes_of("LoRAConfig.init.stats_budget", self.stats_budget)
        foreign = [name for name in self.changed() if self.name not in _READ_BY[name]]
        if foreign:
            starts = ", ".join(map(repr, _READ_BY[foreign[0]]))
            raise ValueError(f"LoRAConfig.init: {foreign[0]!r} is an option of {starts}; not of {self.name!r}.")

    def changed(self) -> dict[str, Any]:
        """Return the options that differ from the defaults."""
        own = ((option.name, getattr(self, option.name), option.default) for option in fields(self)[1:])
        return {name: value for name, value, default in own if value != default}


_READ_BY = {
    **dict.fromkeys(("batches", "stats_budget"), STARTS_FROM_DATA),
    **dict.fromkeys(("normalize", "rho"), ("eva", "covariance")),
    **dict.fromkeys(("mode", "power"), ("corda",)),
    **{"gamma": ("lora_ga",), "smooth": ("eva", "covariance"), "centre": ("covariance",)},
}


@dataclass(frozen=True, kw_only=True)
class LoRAConfig:
    """The options of one LoRA adaptation: ``W = W0 + scaling * B @ A`` with ``W0`` frozen.

    Names are dotted module paths, relative to the module that is adapted. An entry of a list names a module by its
    full path (``"net.head"``), by the end of its path (``"head"``), or by a glob over either (``"blocks.*.fc?"``).
    Every entry must match something, or attaching raises.

    Args:
        rank: Rank ``r`` of the update: ``A`` is ``(r, in)`` and ``B`` is ``(out, r)``. ``"auto"`` gives each layer the
            rank that the data ask for, within ``rank_budget``; it needs a start from data (``init``).
        rank_budget: What ``rank="auto"`` may spend: a share of the base's parameters (``"1%"``), a number of
            parameters, or a size (``"8MB"`` of float32).
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
            ``"auto"`` for the linear layers that are too small for the rank, or for rank 16 if the data decide it, and
            the task heads of transformers models.
        bias: Biases of the base to train and save with the adapter: ``"none"``, ``"lora_only"`` for those of adapted
            layers, or ``"all"``.
        rank_pattern: Ranks of single layers, ``{name or regular expression: rank}``; the first match wins.
        alpha_pattern: Alphas of single layers, as in ``rank_pattern``.
        use_rslora: Scale by ``alpha / sqrt(rank)`` (Kalajdzievski 2023, arXiv:2312.03732) instead of ``alpha / rank``.
        use_dora: Rescale each row of the updated weight to a trained norm (Liu et al. 2024, arXiv:2402.09353).
        lora_bias: Give ``B`` a bias, which is scaled with it.
        untie_weights: Give a named layer whose weight is tied a copy of its own instead of rejecting it.
        init: Start of ``A`` (``B`` is zero): ``"kaiming"`` uniform in ``+-1/sqrt(in)``, ``"gaussian"`` with standard
            deviation ``1/rank``, or ``"orthogonal"`` rows of norm ``1/sqrt(3)``. From the weights: ``"pissa"`` and
            ``"olora"``. From training batches: ``"eva"``, ``"corda"``, ``"lora_ga"`` and ``"covariance"``. Either a
            name, or a mapping with options such as ``{"name": "eva", "batches": 32}``: see ``InitOptions`` and
            ``docs/initialization.md``. An embedding always starts as in PEFT: ``A`` zero and ``B`` standard normal.
        adapter_dtype: Precision in which the factors are stored and updated, independent of the base's; the arithmetic
            follows the layer's input. A float64 or complex128 layer has float64 factors; all factors are real.
        frozen_norm: Behavior in training of frozen normalization layers with running statistics, and of
            ``spectral_norm``: ``"eval"`` keeps the statistics fixed, ``"track"`` updates them and saves them with the
            adapter.

    Raises:
        TypeError: An option has the wrong type.
        ValueError: An option has an invalid value.

    Source:
        Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models", arXiv:2106.09685, eq. 3.
    """

    rank: PositiveInt | Literal["auto"] = _USUAL_RANK
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
    rank_budget: str | PositiveInt | None = None
    init: Init | InitOptions = "kaiming"
    adapter_dtype: AdapterDtype = "float32"
    frozen_norm: FrozenNorm = "eval"

    def __post_init__(self) -> None:
        for option in fields(self):
            value = getattr(self, option.name)
            if value is not option.default:  # defaults need no check
                if value is None:
                    raise TypeError(f"LoRAConfig.{option.name}=None is not possible; leave the option out instead.")
                object.__setattr__(self, option.name, _CHECKS[option.name](option.name, value))
        if not (self.target_modules or self.target_parameters or self.target_slices or self.trainable_token_indices):
            raise ValueError(
                f"No target given (LoRAConfig.target_modules={self.target_modules!r}): set target_modules, "
                "target_parameters, target_slices or trainable_token_indices. To train only a head, without adapters, "
                "leave LoRA out and freeze the rest of the model."
            )
        if self.is_auto and (self.rank_budget is None or self.start.name not in STARTS_FROM_DATA):
            raise ValueError(
                "LoRAConfig.rank='auto' needs a rank_budget, such as '1%', and a start from data, such as init='eva'; "
                f"got rank_budget={self.rank_budget!r}, init={self.start.name!r}."
            )
        if self.rank_budget is not None and not self.is_auto:
            raise ValueError(f"LoRAConfig.rank_budget={self.rank_budget!r} needs rank='auto', got rank={self.rank!r}.")

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

    @property
    def is_auto(self) -> bool:
        """Whether the ranks of the layers are yet to be found."""
        return self.rank == option_checks.AUTO

    @property
    def has_ranks_from_data(self) -> bool:
        """Whether data decide the ranks of the layers."""
        return self.is_auto or self.start.rho > 1

    @property
    def first_rank(self) -> int:
        """The rank to attach with: 1 until the data say which."""
        return 1 if self.rank == option_checks.AUTO else self.rank

    @property
    def expected_rank(self) -> int:
        """The rank of most layers; the usual one until the data say which."""
        return _USUAL_RANK if self.rank == option_checks.AUTO else self.rank

    @cached_property
    def start(self) -> InitOptions:
        """The start of the factors, with all its options."""
        return self.init if isinstance(self.init, InitOptions) else InitOptions(name=self.init)

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
        """Return plain scalars, lists and dicts, suitable for YAML, JSON and checkpoints; recent options if given."""
        # Earlier versions, which do not know the option, read what they can do.
        found = {key: _plain(value) for key, value in asdict(self).items() if value or key not in _LATER_OPTIONS}
        if isinstance(self.init, InitOptions):
            found["init"] = {"name": self.init.name} | self.init.changed()
        return found

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


_LATER_OPTIONS = ("layers", "rank_budget")
OPTIONS = frozenset(option.name for option in fields(LoRAConfig))


def shown_options(options: Mapping[str, Any]) -> str:
    """Return options as they are written in a call."""
    return ", ".join(f"{name}={value!r}" for name, value in options.items())


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(inner) for key, inner in value.items()}
    return list(value) if isinstance(value, tuple) else value


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


def _init(name: str, value: Any) -> str | InitOptions:
    """Return a start as its name alone, if that says everything."""
    if isinstance(value, Mapping):
        known = {option.name for option in fields(InitOptions)}
        check_known(f"LoRAConfig.{name}", value, known)
        if "name" not in value:
            raise TypeError(f"LoRAConfig.{name} needs a name, such as {{'name': 'eva', 'batches': 32}}; got {value!r}.")
        value = InitOptions(**value)
    if isinstance(value, InitOptions):
        return value if value.changed() else value.name
    return option_checks.choice(name, value, of=Init)


_CHECKS: dict[str, Callable[[str, Any], object]] = {
    "rank": option_checks.rank_or_auto,
    "rank_budget": option_checks.budget,
    "alpha": option_checks.alpha,
    "dropout": option_checks.dropout,
    "target_modules": option_checks.regex_or_names,
    "exclude_modules": option_checks.regex_or_names,
    "layers": option_checks.blocks,
    "target_parameters": option_checks.names,
    "target_slices": option_checks.slices,
    "trainable_token_indices": option_checks.tokens,
    "modules_to_save": option_checks.names_or_auto,
    "bias": partial(option_checks.choice, of=Bias),
    "rank_pattern": partial(option_checks.numbers_by_name, check=option_checks.rank),
    "alpha_pattern": partial(option_checks.numbers_by_name, check=option_checks.alpha),
    "use_rslora": option_checks.flag,
    "use_dora": option_checks.flag,
    "lora_bias": option_checks.flag,
    "untie_weights": option_checks.flag,
    "init": _init,
    "adapter_dtype": partial(option_checks.choice, of=AdapterDtype),
    "frozen_norm": partial(option_checks.choice, of=FrozenNorm),
}
