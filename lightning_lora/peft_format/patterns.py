"""Resolved ranks, scalings and names as the options from which PEFT, and ``LoRAConfig``, resolve them again."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

from lightning_lora.config import LoRAConfig
from lightning_lora.peft_format.config import PeftConfig


class Scaled(NamedTuple):
    """A layer's or parameter's resolved rank and scaling."""

    name: str
    rank: int
    scaling: float


def numbers_for(layers: Sequence[Scaled], *, use_rslora: bool) -> dict[str, Any]:
    """Return the options from which PEFT resolves exactly these ranks and scalings.

    The most common rank and alpha are the defaults; layers that differ get a pattern that matches them alone.
    """
    alphas = {layer.name: alpha_for(layer.scaling, layer.rank, use_rslora=use_rslora) for layer in layers}
    rank = _most_common([layer.rank for layer in layers], 8)
    alpha = _most_common(list(alphas.values()), 8)
    return {
        "r": rank,
        "lora_alpha": _plain(alpha),
        "use_rslora": use_rslora,
        "rank_pattern": {anchored(layer.name): layer.rank for layer in layers if layer.rank != rank},
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


def lora_config(config: PeftConfig, layers: Sequence[Scaled], **options: Any) -> LoRAConfig:
    """Return our config for layers of these ranks and scalings, with the options that both sides share.

    Raises:
        ValueError: A value makes no sense here.
    """
    numbers = numbers_for(layers, use_rslora=config.use_rslora)
    return LoRAConfig(
        rank=numbers["r"],
        alpha=numbers["lora_alpha"],
        rank_pattern=numbers["rank_pattern"],
        alpha_pattern=numbers["alpha_pattern"],
        use_rslora=config.use_rslora,
        use_dora=config.use_dora,
        lora_bias=config.lora_bias,
        **options,
    )
