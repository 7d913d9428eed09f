"""The checks of single options: each error names the option and the value."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

from torch import nn

from lightning_lora.names import near_names, parse_slices

_IN_PEFT = {"r": "rank", "lora_alpha": "alpha", "lora_dropout": "dropout", "init_lora_weights": "init"}


def check_known(owner: str, names: Iterable[str], known: Collection[str]) -> None:
    """Refuse names that are no options, with the one that may be meant, by PEFT's name of it too."""
    for name in names:
        if name not in known:
            near = [_IN_PEFT[name]] if name in _IN_PEFT else near_names(name, known, 1)
            hint = f" Did you mean {near[0]!r}?" if near else f" There are {', '.join(sorted(known))}."
            raise TypeError(f"{owner} has no option {name!r}.{hint}")


def check_rank(name: str, value: object) -> None:
    """Refuse what is no rank."""
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"LoRAConfig.{name} must be an integer, got {value!r}.")
    if value < 1:
        raise ValueError(f"LoRAConfig.{name} must be >= 1, got {value!r}.")


def check_number(name: str, value: object) -> None:
    """Refuse what is no number."""
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        raise TypeError(f"LoRAConfig.{name} must be a number, got {value!r}.")


def check_alpha(name: str, value: object) -> None:
    """Refuse an alpha with which the update would vanish or explode."""
    check_number(name, value)
    assert isinstance(value, (int, float))
    check_positive(f"LoRAConfig.{name}", value)


def check_positive(name: str, value: float) -> None:
    """Refuse what is not positive, or infinite."""
    if not 0 < value < math.inf:
        raise ValueError(f"{name} must be positive and finite, got {value!r}.")


def check_choice(name: str, value: object, choices: Sequence[str]) -> None:
    """Refuse what is none of the choices."""
    if value not in choices:
        raise ValueError(f"LoRAConfig.{name}={value!r} is unknown; choose one of {', '.join(map(repr, choices))}.")


def regular_expression(name: str, value: str) -> str:
    """Return a regular expression, or say what is wrong with it."""
    try:
        re.compile(value)
    except re.error as error:
        raise ValueError(
            f"LoRAConfig.{name}={value!r} is no regular expression ({error}). A string is one; put names and globs "
            "into a list."
        ) from error
    return value


def names_of(name: str, values: object) -> tuple[str, ...]:
    """Return a list of names as a tuple, or say what is wrong with it."""
    if not isinstance(values, Sequence) or not all(isinstance(value, str) for value in values):
        raise TypeError(f"LoRAConfig.{name} must be a list of names, got {values!r}.")
    if not all(values):
        raise ValueError(f"LoRAConfig.{name} holds an empty name: {list(values)!r}.")
    return tuple(values)


def numbers_by_name(name: str, values: object, check: Callable[[str, object], None], kind: type) -> dict[str, Any]:
    """Return a mapping from names to numbers as a plain dict, or say what is wrong with it."""
    if not isinstance(values, Mapping):
        raise TypeError(f"LoRAConfig.{name} must map names to numbers, got {values!r}.")
    for key, value in values.items():
        check(f"{name}[{key!r}]", value)
    return {str(key): kind(value) for key, value in values.items()}


def slices_by_layer(values: object) -> dict[str, dict[str, str]]:
    """Return ``target_slices`` as plain dicts, or say what is wrong with it."""
    if not isinstance(values, Mapping) or not all(isinstance(parts, Mapping) for parts in values.values()):
        raise TypeError(f"LoRAConfig.target_slices must map layers to {{name: slices}}, got {values!r}.")
    for layer, parts in values.items():
        if not parts:
            raise ValueError(f"LoRAConfig.target_slices[{layer!r}] names no slice, got {parts!r}.")
        for part, text in parts.items():
            if not (isinstance(part, str) and part.isidentifier()) or hasattr(nn.ModuleDict(), part):
                raise ValueError(f"LoRAConfig.target_slices[{layer!r}]: {part!r} cannot name a slice; choose another.")
            try:
                parse_slices(text)
            except ValueError as error:
                raise ValueError(f"LoRAConfig.target_slices[{layer!r}][{part!r}]: {error}") from None
    return {str(layer): dict(parts) for layer, parts in values.items()}


def tokens_of(values: object) -> tuple[int, ...] | dict[str, tuple[int, ...]]:
    """Return ``trainable_token_indices`` in ascending order, or say what is wrong with it."""
    if isinstance(values, Mapping):
        return {str(name): _token_list(f"[{name!r}]", tokens) for name, tokens in values.items()}
    return _token_list("", values) if values != () else ()


def _token_list(key: str, tokens: object) -> tuple[int, ...]:
    option = f"LoRAConfig.trainable_token_indices{key}"
    if not isinstance(tokens, Sequence) or not all(type(token) is int for token in tokens):
        raise TypeError(f"{option} must be a list of token numbers, got {tokens!r}.")
    if not tokens and key:
        raise ValueError(f"{option} names no token, got {tokens!r}.")
    if min(tokens, default=0) < 0 or len(set(tokens)) < len(tokens):
        raise ValueError(f"{option} must hold different numbers from 0 on, got {tokens!r}.")
    return tuple(sorted(tokens))
