"""PEFT's options: ``adapter_config.json`` read, and resolved ranks, scalings and names as options again."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast, get_args

from lightning_lora.config import Bias
from lightning_lora.peft_format.factors import Factors

# Options under which PEFT computes something else than LoRA does, or changes the base model while it loads.
_OTHER_METHODS = (
    "alora_invocation_tokens",
    "arrow_config",
    "ensure_weight_tying",
    "kasa_config",
    "layer_replication",
    "megatron_config",
    "monteclora_config",
    "use_bdlora",
    "use_qalora",
    "velora_config",
)
# Options that decide where PEFT adapts and how it starts: the tensors say where, and they replace the start.
_WITHOUT_MEANING_HERE = {
    *("auto_mapping", "base_model_name_or_path", "corda_config", "eva_config", "exclude_modules", "fan_in_fan_out"),
    *("inference_mode", "layers_pattern", "layers_to_transform", "loftq_config", "lora_ga_config", "megatron_core"),
    *("qalora_group_size", "revision", "runtime_config", "target_modules", "task_type"),
}
_STARTS_THAT_LEAVE_THE_BASE = (None, True, False, "gaussian", "eva", "orthogonal", "mica")

# A pattern that repeats groups, or repeats often, can take the regular expression engine for ever.
_REPEATED_GROUP = re.compile(r"\)[*+{]")
_REPEATS = re.compile(r"(?<!\\)[*+{]")
_MOST_REPEATS, _LONGEST_PATTERN = 4, 1000

# PEFT's MultiheadAttention folds the update of the output projection into the weight itself, and then has the
# projection's own adapter do it again: in training, in evaluation and when merging. Measured up to this version.
TIMES_PEFT_ADDS_OUT_PROJ = 2
LAST_KNOWN_PEFT = (0, 21, 2)
LAST_KNOWN_PEFT_TEXT = ".".join(map(str, LAST_KNOWN_PEFT))
KNOWN_ORDER = ("gate_up_proj", "down_proj")  # of the stacks in transformers' models with experts

# PEFT's tasks, with the ends of names that it adds to modules_to_save for them.
HEADS_OF_TASKS = {
    **dict.fromkeys(("CAUSAL_LM", "SEQ_2_SEQ_LM", "FEATURE_EXTRACTION"), ()),
    **dict.fromkeys(("SEQ_CLS", "TOKEN_CLS"), ("classifier", "score")),
    "QUESTION_ANS": ("qa_outputs",),
}

Tokens = tuple[int, ...] | dict[str, tuple[int, ...]]


@dataclass(frozen=True, kw_only=True)
class PeftConfig:
    """The options of a PEFT directory that decide the function that its adapter computes.

    Attributes:
        rank: ``r``, the rank of every layer without a pattern.
        alpha: ``lora_alpha``, likewise.
        rank_pattern: Ranks by regular expression; the first match wins.
        alpha_pattern: Alphas in the same way.
        use_rslora: Whether alpha is divided by the root of the rank.
        use_dora: Whether each row has a magnitude.
        lora_bias: Whether ``B`` has a bias.
        bias: Which biases of the base the file holds.
        dropout: Dropout of the adapter's input while training.
        target_parameters: Parameters adapted by their own name.
        modules_to_save: Ends of the names of modules that were trained in full.
        trainable_token_indices: Tokens of the input embedding, or of embeddings by the ends of their names.
        peft_version: The PEFT that wrote it, if it says so.
    """

    rank: int
    alpha: float
    rank_pattern: Mapping[str, int]
    alpha_pattern: Mapping[str, float]
    use_rslora: bool
    use_dora: bool
    lora_bias: bool
    bias: Bias
    dropout: float
    target_parameters: tuple[str, ...]
    modules_to_save: tuple[str, ...]
    trainable_token_indices: Tokens
    peft_version: tuple[int, ...]

    def rank_of(self, name: str) -> int:
        """Return the rank of a layer or parameter."""
        return cast(int, _first_match(self.rank_pattern, name, self.rank))

    def alpha_of(self, name: str) -> float:
        """Return the alpha of a layer or parameter."""
        return _first_match(self.alpha_pattern, name, self.alpha)

    def scaling_of(self, name: str) -> float:
        """Return the factor of ``B @ A`` of a layer or parameter."""
        rank = self.rank_of(name)
        return self.alpha_of(name) / (math.sqrt(rank) if self.use_rslora else rank)

    def tokens_of(self, name: str) -> tuple[int, ...] | None:
        """Return the tokens of an embedding whose rows were trained, or None if the options do not say."""
        wanted = self.trainable_token_indices
        if isinstance(wanted, Mapping):
            return next((tokens for entry, tokens in wanted.items() if name.endswith(entry)), None)
        return wanted or None

    def parameters_of(self, module: str) -> list[str]:
        """Return the full names of those of ``target_parameters`` that a module of this name may hold."""
        named = [entry.rpartition(".") for entry in self.target_parameters]
        return [f"{module}.{key}" for owner, _, key in named if owner and f".{module}".endswith(f".{owner}")]


def _first_match(patterns: Mapping[str, float], name: str, default: float) -> float:
    if not patterns:
        return default
    found = (value for key, value in patterns.items() if re.match(rf"(.*\.)?({key})$", name))
    return next(found, default)


def parse_config(options: object) -> tuple[PeftConfig, list[str]]:
    """Return a config as PEFT wrote it, and the names of its unknown options.

    Raises:
        ValueError: It is not the config of a LoRA adapter, holds invalid values, or uses unsupported options; one
            error lists all.
    """
    if not isinstance(options, dict):
        raise ValueError(f"it holds a {type(options).__name__}, not an object of options")
    reader = _Reader(options)
    if (kind := reader.take("peft_type")) != "LORA":
        raise ValueError(f"peft_type={kind!r}; only 'LORA' adapters can be loaded")
    config = reader.config()
    others = {name: value for name in _OTHER_METHODS if (value := reader.take(name))}
    reader.problems += [f"{name}={value!r} is not supported by lightning_lora" for name, value in others.items()]
    start = reader.take("init_lora_weights")
    if not any(start is known or start == known for known in _STARTS_THAT_LEAVE_THE_BASE):
        reader.problems.append(
            f"init_lora_weights={start!r} changes the base model when PEFT loads the adapter; convert it to plain LoRA "
            "first (PEFT's save_pretrained with path_initial_model_for_weight_conversion)"
        )
    if reader.problems:
        raise ValueError("; ".join(reader.problems))
    return config, sorted(name for name, value in reader.left.items() if value and name not in _WITHOUT_MEANING_HERE)


class _Reader:
    """Takes options one by one and collects the problems; ``left`` are those that nothing has asked for."""

    def __init__(self, options: Mapping[str, Any]) -> None:
        self.left = dict(options)
        self.problems: list[str] = []

    def take(self, name: str, default: Any = None) -> Any:
        return self.left.pop(name, default)

    def config(self) -> PeftConfig:
        bias = self.take("bias", "none")
        if bias not in get_args(Bias):
            self.problems.append(f"bias={bias!r} must be one of {', '.join(map(repr, get_args(Bias)))}")
        return PeftConfig(
            rank=int(self._number("r", self.take("r", 8), whole=True)),
            alpha=self._number("lora_alpha", self.take("lora_alpha", 8)),
            rank_pattern={k: int(v) for k, v in self._pattern("rank_pattern", whole=True)},
            alpha_pattern=dict(self._pattern("alpha_pattern", whole=False)),
            use_rslora=self._flag("use_rslora"),
            use_dora=self._flag("use_dora"),
            lora_bias=self._flag("lora_bias"),
            bias=bias,
            dropout=self._number("lora_dropout", self.take("lora_dropout", 0.0), least=0.0, below=1.0),
            target_parameters=self._names("target_parameters"),
            modules_to_save=self._names("modules_to_save"),
            trainable_token_indices=self._tokens("trainable_token_indices"),
            peft_version=_version(self.take("peft_version")),
        )

    def _number(
        self, name: str, value: object, *, whole: bool = False, least: float | None = None, below: float = math.inf
    ) -> float:
        kinds = (int,) if whole else (int, float)
        if isinstance(value, kinds) and not isinstance(value, bool):
            number = min(value, 2**63) if isinstance(value, int) else value  # a larger one overflows as a float
            if (number > 0 if least is None else number >= least) and number < min(below, 2**31):
                return number
        self.problems.append(f"{name} must be a number in range, not {_shown(value)}")
        return 1

    def _flag(self, name: str) -> bool:
        value = self.take(name, False)
        if not isinstance(value, bool):
            self.problems.append(f"{name} must be true or false, not {_shown(value)}")
        return bool(value)

    def _names(self, name: str) -> tuple[str, ...]:
        value = self.take(name) or ()
        if isinstance(value, list) and all(isinstance(entry, str) and entry for entry in value):
            return tuple(sorted(value))
        if value:
            self.problems.append(f"{name} must be a list of names, not {_shown(value)}")
        return ()

    def _pattern(self, name: str, *, whole: bool) -> Iterator[tuple[str, float]]:
        value = self.take(name) or {}
        if not isinstance(value, dict):
            self.problems.append(f"{name} must map names to numbers, not {_shown(value)}")
            return
        for key, number in value.items():
            if reason := _pattern_problem(key):
                self.problems.append(f"{name}: {_shown(key)} {reason}")
            else:
                yield key, self._number(f"{name}[{key!r}]", number, whole=whole)

    def _tokens(self, name: str) -> Tokens:
        value = self.take(name) or ()
        if isinstance(value, dict):
            return {str(key): self._token_list(f"{name}[{key!r}]", tokens) for key, tokens in value.items()}
        return self._token_list(name, value) if value else ()

    def _token_list(self, name: str, tokens: object) -> tuple[int, ...]:
        if isinstance(tokens, list) and all(type(token) is int and token >= 0 for token in tokens):
            if len(set(tokens)) == len(tokens):
                return tuple(tokens)
            self.problems.append(f"{name} holds a token twice")
        else:
            self.problems.append(f"{name} must be a list of token numbers, not {_shown(tokens)}")
        return ()


def _version(text: object) -> tuple[int, ...]:
    numbers = re.match(r"(\d{1,6})\.(\d{1,6})(?:\.(\d{1,6}))?", text) if isinstance(text, str) else None
    return tuple(int(number or 0) for number in numbers.groups()) if numbers else ()


def _pattern_problem(key: str) -> str | None:
    if len(key) > _LONGEST_PATTERN or _REPEATED_GROUP.search(key) or len(_REPEATS.findall(key)) > _MOST_REPEATS:
        return "is too complex a regular expression to evaluate safely"
    try:
        re.compile(key)
    except (re.error, OverflowError, RecursionError) as error:
        return f"is not a valid regular expression ({error})"
    return None


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


# --- resolved numbers and names as options


def numbers_for(layers: Mapping[str, Factors], *, use_rslora: bool) -> dict[str, Any]:
    """Return the options from which PEFT resolves exactly these ranks and scalings.

    The most common rank and alpha are the defaults; layers that differ get a pattern that matches them alone.
    """
    alphas = {name: alpha_for(each.scaling, each.rank, use_rslora=use_rslora) for name, each in layers.items()}
    rank = _most_common([each.rank for each in layers.values()], 8)
    alpha = _most_common(list(alphas.values()), 8)
    return {
        "r": rank,
        "lora_alpha": _plain(alpha),
        "use_rslora": use_rslora,
        "rank_pattern": {anchored(name): each.rank for name, each in layers.items() if each.rank != rank},
        "alpha_pattern": {anchored(name): _plain(each) for name, each in alphas.items() if each != alpha},
    }


def alpha_for(scaling: float, rank: int, *, use_rslora: bool) -> float:
    """Return the alpha from which this scaling follows, to the last bit where there is one."""
    divisor = math.sqrt(rank) if use_rslora else rank
    alpha = scaling * divisor
    nearby = (round(alpha, 6), alpha, math.nextafter(alpha, math.inf), math.nextafter(alpha, 0.0))
    return next((each for each in nearby if each / divisor == scaling), alpha)


def anchored(name: str) -> str:
    """Return the pattern that matches this full name and no other; PEFT lets a plain one match the end of a name."""
    return f"^{re.escape(name)}"


def targets_for(names: Collection[str], all_names: Collection[str]) -> str | list[str]:
    """Return ``target_modules`` that name exactly these of all modules, for PEFT and for ``LoRAConfig``.

    The last parts of the names where they say it, such as ``["q_proj", "v_proj"]``; else full names; else, where one
    of them is the end of another module's, one regular expression.
    """
    tails = {name.rpartition(".")[2] for name in names}
    for entries in (tails, set(names)):
        ends = tuple(f".{entry}" for entry in entries)
        meant = {name for name in all_names if name in entries or name.endswith(ends)}
        if meant == set(names) and not any(entry.isdigit() for entry in entries - set(names)):
            return sorted(entries)
    return "|".join(re.escape(name) for name in sorted(names))


def _most_common(values: Sequence[Any], default: Any) -> Any:
    """Return the most frequent value; of equally frequent ones the largest, whatever their order."""
    counts = Counter(values)
    return max(counts, key=lambda value: (counts[value], value)) if counts else default


def _plain(number: float) -> float:
    return int(number) if float(number).is_integer() else number
