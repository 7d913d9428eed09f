"""The adapters that a sweep compares: their names, and the options of each."""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from lightning_lora.config import OPTIONS, LoRAConfig
from lightning_lora.named_adapters import check_name
from lightning_lora.names import listed, without_points
from lightning_lora.option_checks import check_known

_RATES = ("lr", "lr_multiplier", "weight_decay", "lr_ratio")
_OWN = (*_RATES, "seed", "data")


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """One adapter of a sweep.

    Attributes:
        name: Its name among the module's adapters.
        config: The options of the adapter itself.
        given: All options that it was given, as they were written, for tables and records.
        lr: Learning rate in place of the optimizer's; None keeps that.
        lr_multiplier: Multiplies the optimizer's learning rates.
        weight_decay: Weight decay in place of the optimizer's; None keeps that.
        lr_ratio: Learning rate of ``B`` over that of ``A`` (LoRA+).
        seed: Seed of its random start; None for the run's.
        data: Key of its part of every batch, if each adapter has data of its own.
    """

    name: str
    config: LoRAConfig
    given: Mapping[str, Any]
    lr: float | None = None
    lr_multiplier: float = 1.0
    weight_decay: float | None = None
    lr_ratio: float = 1.0
    seed: int | None = None
    data: str | None = None

    def own_part(self, batch: Any) -> Any:
        """Return its part of a batch: all of it, unless each adapter has data of its own.

        Raises:
            MisconfigurationException: The batch is not divided so.
        """
        if self.data is None:
            return batch
        if not isinstance(batch, Mapping) or self.data not in batch:
            # Late, since the command reads a sweep's table without Lightning.
            from lightning.fabric.utilities.exceptions import MisconfigurationException

            found = (
                f"has {listed([*map(repr, batch)])}" if isinstance(batch, Mapping) else f"is a {type(batch).__name__}"
            )
            raise MisconfigurationException(
                f"LoRASweep: an adapter's data is {self.data!r}, and the batch {found}. Train with a mapping of "
                f"dataloaders, such as {{{self.data!r}: loader}} or CombinedLoader({{{self.data!r}: loader}}, "
                "'max_size_cycle')."
            )
        return batch[self.data]


def candidates(
    config: LoRAConfig,
    adapters: Mapping[str, Mapping[str, Any]] | None,
    grid: Mapping[str, Sequence[Any]] | None,
    lr_ratio: float,
) -> dict[str, Candidate]:
    """Return the adapters of a sweep by name.

    Args:
        config: The options that all share.
        adapters: The options of each, by its name.
        grid: The values of each option; every combination is one adapter.
        lr_ratio: That of adapters that have none of their own.

    Raises:
        TypeError: Both or none of the two were given, or an option is unknown or of the wrong type.
        ValueError: An option has an invalid value, or nothing would be compared.
    """
    if (adapters is None) == (grid is None):
        how = "got both" if adapters is not None else "got none"
        raise TypeError(
            f"LoRASweep needs adapters={{name: options}} or grid={{option: values}}, {how}. Example: "
            "grid={'lr': [1e-4, 1e-3], 'rank': [4, 16]}."
        )
    found = _from_grid(grid) if adapters is None else _from_mapping(adapters)
    made = {name: _candidate(name, config, options, lr_ratio) for name, options in found.items()}
    with_data = [name for name, each in made.items() if each.data is not None]
    if with_data and len(with_data) < len(made):
        without = next(name for name in made if name not in with_data)
        raise ValueError(
            f"LoRASweep.adapters: {with_data[0]!r} has data of its own, and {without!r} has none. Give 'data' to every "
            "adapter, or to none."
        )
    if starts := [each.name for each in made.values() if each.config.has_ranks_from_data]:
        raise ValueError(
            f"LoRASweep: {starts[0]!r} has ranks that data decide (rank='auto' or rho), and each adapter would get "
            "other ones. Give a number for rank; LoRACallback does the other."
        )
    return made


def _from_grid(grid: Mapping[str, Sequence[Any]] | None) -> dict[str, dict[str, Any]]:
    if not isinstance(grid, Mapping) or not len(grid):
        raise TypeError(f"LoRASweep.grid must be a mapping from options to lists of values, got {grid!r}.")
    check_known("LoRASweep.grid", grid, {*OPTIONS, *_OWN} - {"data"})
    for key, values in dict[str, Any](grid).items():
        if isinstance(values, (str, bytes)) or not isinstance(values, Sequence) or not values:
            raise TypeError(f"LoRASweep.grid[{key!r}] must be a list of values, got {values!r}.")
    found: dict[str, dict[str, Any]] = {}
    for values in itertools.product(*grid.values()):
        options = dict(zip(grid, values, strict=True))
        name = ",".join(f"{key}={_shown(value)}" for key, value in options.items())
        if name in found:
            raise ValueError(f"LoRASweep.grid holds {name!r} twice; give every value once.")
        found[name] = options
    return found


def _from_mapping(adapters: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    if not adapters or not isinstance(adapters, Mapping):
        raise TypeError(f"LoRASweep.adapters must be a mapping from names to options, got {adapters!r}.")
    for name, options in adapters.items():
        check_name(name)
        if not isinstance(options, Mapping):
            raise TypeError(f"LoRASweep.adapters[{name!r}] must be a mapping of options, got {options!r}.")
        check_known(f"LoRASweep.adapters[{name!r}]", options, {*OPTIONS, *_OWN})
    return {name: dict(options) for name, options in adapters.items()}


def _candidate(name: str, config: LoRAConfig, options: Mapping[str, Any], lr_ratio: float) -> Candidate:
    where = f"LoRASweep, adapter {name!r}"
    own = {key: value for key, value in options.items() if key in _OWN}
    if own.get("lr") is not None and "lr_multiplier" in own:
        raise ValueError(f"{where}: lr and lr_multiplier both set the learning rate; give one.")
    for key in _RATES:
        if key in own and not (key == "lr" and own[key] is None):
            own[key] = _rate(where, key, own[key])
    if (seed := own.get("seed")) is not None and (isinstance(seed, bool) or not isinstance(seed, int) or seed < 0):
        raise ValueError(f"{where}: seed must be an integer of at least 0, got {seed!r}.")
    if (data := own.get("data")) is not None and not isinstance(data, str):
        raise TypeError(f"{where}: data must be a key of the batch, got {data!r}.")
    try:
        config = replace(config, **{key: value for key, value in options.items() if key in OPTIONS})
    except (TypeError, ValueError) as error:
        raise type(error)(f"{where}: {error}") from error
    return Candidate(name=name, config=config, given=_plain(options), **({"lr_ratio": lr_ratio} | own))


def _rate(where: str, key: str, value: Any) -> float:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    least = "at least 0" if key == "weight_decay" else "greater than 0"
    if not is_number or not (0 <= value < float("inf")) or (value == 0 and key != "weight_decay"):
        raise ValueError(f"{where}: {key} must be a number {least}, got {value!r}.")
    return float(value)


def _shown(value: Any) -> str:
    """Return a value as it stands in a name, which has no points."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        text = value if isinstance(value, str) else repr(value)
        return re.sub(r"[^\w+*-]+", "_", text).strip("_")
    return without_points(repr(value))


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(inner) for key, inner in value.items()}
    return [_plain(each) for each in value] if isinstance(value, (list, tuple)) else value
