"""Checks of options: each returns the value as it is kept, or raises an error that names the option and the value."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any, Literal, cast, get_args

from torch import nn

from lightning_lora.names import near_names, numbers_of_blocks, parse_slices

AUTO: Literal["auto"] = "auto"


def check_known(owner: str, names: Iterable[str], known: Collection[str]) -> None:
    """Reject unknown options and suggest the closest one (PEFT's spelling included)."""
    for name in names:
        if name not in known:
            near = [_ELSEWHERE[name]] if _ELSEWHERE.get(name) in known else near_names(name, known, 1)
            if name in _NOT_HERE:
                raise TypeError(f"{owner} has no option {name!r}. {_NOT_HERE[name]}")
            hint = f"Did you mean {near[0]!r}?" if near else f"Options are {', '.join(sorted(known))}."
            raise TypeError(f"{owner} has no option {name!r}. {hint}")


_ELSEWHERE = {  # how PEFT and others call it
    "r": "rank",
    "lora_alpha": "alpha",
    "lora_dropout": "dropout",
    "init_lora_weights": "init",
    "layers_to_transform": "layers",
    "learning_rate": "lr",  # of a sweep
}
_NOT_HERE = {
    "task_type": "The adapters do not depend on it; to record it in the files, call save_adapter(..., task_type=...).",
    "seed": "seed_everything decides on the start; attach(module, config, seed=...) takes a number of its own.",
    "layers_pattern": "The repeated blocks are found without it; layers=[0, 1] takes their numbers.",
}


def check_positive(name: str, value: float) -> None:
    """Reject numbers that are not positive and finite."""
    if not 0 < value < math.inf:
        raise ValueError(f"{name} must be positive and finite, got {value!r}.")


def rank(name: str, value: Any) -> int:
    """Return a rank, an integer of at least 1."""
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"LoRAConfig.{name} must be an integer, got {value!r}.")
    if value < 1:
        raise ValueError(f"LoRAConfig.{name} must be >= 1, got {value!r}.")
    return int(value)  # jsonargparse has types of its own, and checkpoints must hold none


def _number(name: str, value: Any) -> float:
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        raise TypeError(f"LoRAConfig.{name} must be a number, got {value!r}.")
    return float(value)


def alpha(name: str, value: Any) -> float:
    """Return a positive, finite number."""
    number = _number(name, value)
    check_positive(f"LoRAConfig.{name}", value)  # the update would vanish or explode
    return number


def dropout(name: str, value: Any) -> float:
    """Return a probability below 1."""
    if not 0.0 <= _number(name, value) < 1.0:
        raise ValueError(f"LoRAConfig.{name} must be in [0, 1), got {value!r}.")
    return float(value)


def flag(name: str, value: Any) -> bool:
    """Return True or False."""
    if not isinstance(value, bool):
        raise TypeError(f"LoRAConfig.{name} must be True or False, got {value!r}.")
    return value


def choice(name: str, value: Any, *, of: Any) -> str:
    """Return one of the values of a Literal type."""
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


def names(name: str, values: Any) -> tuple[str, ...]:
    """Return a list of names."""
    return check_names(f"LoRAConfig.{name}", values)


def regex_or_names(name: str, value: Any) -> str | tuple[str, ...]:
    """Return a list of names, or one regular expression."""
    if not isinstance(value, str):
        return names(name, value)
    try:
        re.compile(value)
    except re.error as error:
        raise ValueError(
            f"LoRAConfig.{name}={value!r} is not a valid regular expression ({error}). A string is read as a regex; "
            "pass names and globs as a list."
        ) from error
    return value


def names_or_auto(name: str, value: Any) -> str | tuple[str, ...]:
    """Return ``"auto"`` or a list of names."""
    if isinstance(value, str) and value != AUTO:
        raise TypeError(f"LoRAConfig.{name} must be {AUTO!r} or a list of names, got {value!r}.")
    return AUTO if value == AUTO else names(name, value)


def rank_or_auto(name: str, value: Any) -> int | str:
    """Return a rank, or ``"auto"``."""
    return AUTO if value == AUTO else rank(name, value)


def budget(name: str, value: Any) -> int | str | None:  # noqa: ARG001 - the error of parsing says it
    """Return a budget as it was given; see ``parse_budget``."""
    if value is not None:
        try:
            parse_budget(value, base_parameters=10**12)
        except ValueError as error:
            raise ValueError(f"LoRAConfig.{error}") from None
    return int(value) if isinstance(value, int) else cast("str | None", value)  # none of jsonargparse's types


_UNITS = {"b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 2**10, "mib": 2**20, "gib": 2**30}
_BYTES = 4  # of a parameter in float32


def parse_budget(rank_budget: int | str, base_parameters: int) -> int:
    """Return a budget of ranks in parameters.

    Args:
        rank_budget: A number of parameters; ``"1%"`` of those of the base; or a size of the factors in float32, such as
            ``"20MB"`` (units: B, KB, MB, GB, KiB, MiB, GiB).
        base_parameters: Parameters of the base.

    Raises:
        ValueError: It is none of these, or less than one parameter.
    """
    amount, unit = _amount_and_unit(rank_budget)
    if unit == "%":
        parameters = amount / 100 * base_parameters
    elif unit:
        parameters = amount * _UNITS[unit] / _BYTES
    else:
        parameters = amount
    if not parameters >= 1:
        raise ValueError(f"rank_budget={rank_budget!r} is less than one parameter.")
    return int(parameters)


def _amount_and_unit(rank_budget: int | str) -> tuple[float, str]:
    if isinstance(rank_budget, int) and not isinstance(rank_budget, bool):
        return rank_budget, ""
    text = rank_budget.strip().lower() if isinstance(rank_budget, str) else ""
    match = re.fullmatch(r"(\d+)|(\d+(?:\.\d*)?|\.\d+)\s*(%|b|[kmg]i?b)", text)
    if match is None:
        raise ValueError(
            f"rank_budget={rank_budget!r} is not a budget: give a whole number of parameters, a share of the base such "
            'as "1%", or a size of the factors in float32 such as "20MB".'
        )
    return (int(match[1]), "") if match[1] else (float(match[2]), match[3])


def numbers_by_name(name: str, values: Any, *, check: Callable[[str, Any], float]) -> dict[str, float]:
    """Return a mapping from names to numbers."""
    if not isinstance(values, Mapping):
        raise TypeError(f"LoRAConfig.{name} must map names to numbers, got {values!r}.")
    kept = {}
    for key, value in values.items():
        kept[str(key)] = check(f"{name}[{key!r}]", value)
    return kept


def blocks(name: str, values: Any) -> tuple[int | str, ...]:
    """Return numbers and slices of blocks."""
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


def bytes_of(name: str, text: Any) -> int:
    """Return the number of bytes that a text such as ``"1.5GB"`` means.

    Raises:
        ValueError: It means none; the message names the option.
    """
    found = _SIZE.fullmatch(text.strip().lower()) if isinstance(text, str) else None
    if found is None or not float(found[1]):
        raise ValueError(f"{name} must be a size such as '500MB' or '2GB', got {text!r}.")
    return int(float(found[1]) * _UNITS[found[2]])


_SIZE = re.compile(r"(\d+(?:\.\d*)?|\.\d+)\s*(b|[kmg]i?b)")


def slices(name: str, values: Any) -> dict[str, dict[str, str]]:
    """Return the parts of layers: layer -> name -> slices."""
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


def tokens(name: str, values: Any) -> tuple[int, ...] | dict[str, tuple[int, ...]]:
    """Return the tokens in ascending order; no embedding is the same request as no token."""
    if isinstance(values, Mapping):
        if not values:
            return ()
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
