"""When the rank budget shrinks, and to what: the options of ``rank_schedule``, and the plan of one training."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

from lightning_lora import option_checks
from lightning_lora.config import MYPY, LoRAConfig

if MYPY:
    PositiveInt = int
    NonNegativeInt = int
    Fraction = float
else:
    from lightning_lora.config import NonNegativeInt, PositiveInt

    try:
        from jsonargparse.typing import ClosedUnitInterval as Fraction
    except ImportError:  # the command line is an extra
        Fraction = float

Score = Literal["gate", "adalora", "energy"]
Kind = Literal["cubic"]


@dataclass(frozen=True, kw_only=True)
class RankSchedule:
    """The options of a training in which the ranks of the layers follow their need.

    Every layer starts with ``max_rank`` components. At regular events a budget, which shrinks by a cubic curve, is
    spent on the components with the highest scores per parameter; the others leave the update. No shape changes.

    Args:
        kind: The curve of the budget between the first event and the last: ``"cubic"`` falls fast and ends slowly.
        max_rank: Rank to start with. Defaults to twice the rank.
        min_rank: Lowest rank of a layer; with 0, a layer may lose its adapter.
        budget: Parameters of the factors in the end: a number, a share of the base's (``"1%"``), or a size (``"8MB"``
            of float32). Defaults to what all layers would have at the rank.
        every: Steps between two events, as a share of the training's.
        warmup: Share of the training before the budget begins to shrink.
        until: Share of the training at which the ranks are final.
        score: What a component is worth: ``"gate"``, how much the loss depends on it, ``|b @ dL/db|`` for its column
            ``b`` of ``B``, which equals the derivative by a factor of 1 before it; ``"adalora"``, sensitivity times
            uncertainty of each of its elements (Zhang et al. 2023, eq. 8 to 11); or ``"energy"``, the mean square of
            what it adds to the layer's output, which needs no loss.
        regrow: Let components come back whose gradient has grown (with ``"gate"``). The last ten steps before each
            event then compute all components.
        total: Optimizer steps of the training, if not those that the Trainer will make, as in a run that resumes with
            another ``max_epochs``.

    Raises:
        TypeError: An option has the wrong type.
        ValueError: An option has an invalid value.

    Source:
        Zhang et al. 2023, "AdaLoRA", arXiv:2303.10512, eq. 12 (the curve).
    """

    kind: Kind = "cubic"
    max_rank: PositiveInt | None = None
    min_rank: NonNegativeInt = 0
    budget: str | PositiveInt | None = None
    every: Fraction = 0.05
    warmup: Fraction = 0.1
    until: Fraction = 0.7
    score: Score = "gate"
    regrow: bool = False
    total: PositiveInt | None = None

    def __post_init__(self) -> None:
        option_checks.check_choice(f"{_OWNER}.kind", self.kind, of=Kind)
        option_checks.check_choice(f"{_OWNER}.score", self.score, of=Score)
        for name in ("max_rank", "min_rank", "total"):
            self._keep(name, _integer(name, getattr(self, name), at_least=0 if name == "min_rank" else 1))
        for name in ("every", "warmup", "until"):
            self._keep(name, _share(name, getattr(self, name)))
        if self.every == 0 or self.warmup >= self.until:
            raise ValueError(
                f"{_OWNER}: every must be above 0 and warmup below until; got every={self.every:g}, "
                f"warmup={self.warmup:g}, until={self.until:g}."
            )
        if not isinstance(self.regrow, bool):
            raise TypeError(f"{_OWNER}.regrow must be True or False, got {self.regrow!r}.")
        if self.regrow and self.score != "gate":
            raise ValueError(f"{_OWNER}.regrow=True needs score='gate', got score={self.score!r}.")
        if self.budget is not None:
            try:
                option_checks.parse_budget(self.budget, base_parameters=10**12)
            except ValueError as error:
                raise ValueError(f"{_OWNER}.budget: {error}") from None
        if self.max_rank is not None and self.min_rank > self.max_rank:
            raise ValueError(f"{_OWNER}.min_rank={self.min_rank} is above max_rank={self.max_rank}.")

    def _keep(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)

    def changed(self) -> dict[str, Any]:
        """Return the options that differ from the defaults."""
        own = ((option.name, getattr(self, option.name), option.default) for option in fields(self))
        return {name: value for name, value, default in own if value != default}

    def start_rank(self, config: LoRAConfig) -> int:
        """Return the rank that every layer starts with."""
        return self.max_rank or 2 * config.first_rank

    def widened(self, config: LoRAConfig) -> LoRAConfig:
        """Return the options to attach with: of the rank to start with, with the scalings of the config's own rank.

        Raises:
            ValueError: Another option decides the ranks as well, or there is nothing to decide.
        """
        if config.has_ranks_from_data or config.rank_pattern:
            other = f"rank_pattern={dict(config.rank_pattern)!r}" if config.rank_pattern else "ranks from data"
            raise ValueError(f"{_OWNER} decides the ranks of the layers, and so does {other}. Leave one of them out.")
        if config.start.name in _DIFFERENCES:
            raise ValueError(
                f"{_OWNER} does not go with init={config.start.name!r}, whose update is a difference of two products: "
                "no component of it can be left out alone. Use another init."
            )
        rank = self.start_rank(config)
        if rank < config.first_rank or (rank == config.first_rank and self.budget is None):
            raise ValueError(
                f"{_OWNER}.max_rank={rank} leaves nothing to decide with rank={config.first_rank}, the average in the "
                "end; raise max_rank."
            )
        ratio = config.scaling(config.first_rank, 1.0) / config.scaling(rank, 1.0)
        alphas = {name: ratio * alpha for name, alpha in config.alpha_pattern.items()}
        return replace(config, rank=rank, alpha=ratio * config.alpha, alpha_pattern=alphas)

    def for_small(self, config: LoRAConfig, limit: int) -> str:
        """Return what to set for a layer to take part whose weight has at most this rank."""
        # Without a budget, a schedule must start with more than the rank.
        rank = min(config.first_rank, limit - (self.budget is None))
        if rank < 1:
            return "leave it out with exclude_modules"
        lower = "" if rank == config.first_rank else f"rank={rank} and "
        return f"set {lower}rank_schedule={{'max_rank': {limit}}}"


_OWNER = "LoRACallback.rank_schedule"
_DIFFERENCES = ("pissa", "olora", "corda", "lora_ga")


def as_schedule(value: Any) -> RankSchedule | None:
    """Return the schedule that an option means: a name, a mapping with options, or a ``RankSchedule``; or None."""
    if value is None or isinstance(value, RankSchedule):
        return value
    if isinstance(value, Mapping):
        option_checks.check_known(_OWNER, value, {option.name for option in fields(RankSchedule)})
        return RankSchedule(**value)
    if not isinstance(value, str):
        raise TypeError(f"{_OWNER} must be 'cubic', a mapping with options, or None; got {value!r}.")
    return RankSchedule(kind=value)  # type: ignore[arg-type]


@dataclass(frozen=True)
class Plan:
    """The events of one training.

    Attributes:
        total: Optimizer steps of the training.
        first: Steps after which the budget begins to shrink.
        last: Steps after which the ranks are final.
        every: Steps between two events.
        full: Parameters of the factors with all components.
        budget: Parameters in the end.
    """

    total: int
    first: int
    last: int
    every: int
    full: int
    budget: int

    @classmethod
    def of(cls, schedule: RankSchedule, total: int, *, full: int, budget: int) -> Plan:
        """Return the plan of a training of ``total`` steps.

        Raises:
            ValueError: The training is too short for a single event.
        """
        first, last = round(schedule.warmup * total), min(total, round(schedule.until * total))
        if last <= first:
            raise ValueError(
                f"{_OWNER}: a training of {total} steps is too short for it: with warmup={schedule.warmup:g} and "
                f"until={schedule.until:g} no step lies between the beginning and the end. Train longer, or move them "
                "apart."
            )
        return cls(total, first, last, max(1, round(schedule.every * total)), full, budget)

    def is_event(self, step: int) -> bool:
        """Return whether ranks are decided after this many steps."""
        return self.first < step <= self.last and ((step - self.first) % self.every == 0 or step == self.last)

    def next_event(self, step: int) -> int | None:
        """Return the steps after which the ranks are decided next, or None if they are final."""
        if step >= self.last:
            return None
        return min(self.last, self.first + self.every * max(1, math.floor((step - self.first) / self.every) + 1))

    def budget_at(self, step: int) -> int:
        """Return the parameters that may be in use after this many steps."""
        if step <= self.first:
            return self.full
        if step >= self.last:
            return self.budget
        left = 1.0 - (step - self.first) / (self.last - self.first)
        return int(self.budget + (self.full - self.budget) * left**3)


def _integer(name: str, value: Any, *, at_least: int) -> int | None:
    if value is None:
        return None
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{_OWNER}.{name} must be an integer, got {value!r}.")
    if value < at_least:
        raise ValueError(f"{_OWNER}.{name} must be >= {at_least}, got {value!r}.")
    return int(value)


def _share(name: str, value: Any) -> float:
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        raise TypeError(f"{_OWNER}.{name} must be a number, got {value!r}.")
    if not 0 <= value <= 1:
        raise ValueError(f"{_OWNER}.{name} is a share of the training, from 0 to 1; got {value!r}.")
    return float(value)
