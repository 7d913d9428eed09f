"""One training step for all adapters of a sweep, in one of three ways that mean the same.

Each adapter gets exactly the gradient of its own loss. ``loop`` runs the module's ``training_step`` once for each
adapter. ``vmap`` runs it once, mapped over stacked factors. ``meeting.py`` has the third way.
"""

from __future__ import annotations

import functools
import inspect
import linecache
import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import lightning
import torch
import torchmetrics
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torchmetrics import Metric, MetricCollection

from lightning_lora.adapted_model import AdaptedModel
from lightning_lora.layers import LowRankAdapter
from lightning_lora.names import join
from lightning_lora.sweep.batched import batched_linears
from lightning_lora.switching import others_hidden, using

Step = Callable[..., Any]
Call = tuple[tuple[Any, ...], dict[str, Any]]  # arguments of training_step


class UnfitError(Exception):
    """A way of running the step does not fit this module; the message says why."""


@dataclass
class Outcome:
    """What one adapter's step gave.

    Attributes:
        loss: Its loss; None where the step skips the batch.
        extra: What it returned beside the loss.
        logged: Calls of ``self.log``: name, value, options.
    """

    loss: Tensor | None
    extra: dict[str, Any] = field(default_factory=dict)
    logged: list[tuple[str, Any, dict[str, Any]]] = field(default_factory=list)


def outcome_of(returned: Any, logged: list[tuple[str, Any, dict[str, Any]]]) -> Outcome:
    """Return what a step returned in one form."""
    if isinstance(returned, Mapping):
        extra = {key: value for key, value in returned.items() if key != "loss"}
        return Outcome(returned.get("loss"), extra, logged)
    return Outcome(returned, {}, logged)


_signature_of = functools.cache(inspect.signature)


@contextmanager
def recorded_logs(module: LightningModule) -> Iterator[list[tuple[str, Any, dict[str, Any]]]]:
    """Record calls of ``self.log`` inside the block instead of making them."""
    calls: list[tuple[str, Any, dict[str, Any]]] = []
    before = vars(module).get("log")
    signature = _signature_of(type(module).log)

    def log(*args: Any, **kwargs: Any) -> None:
        given = dict(signature.bind(module, *args, **kwargs).arguments)
        given.pop("self")
        value = given.pop("value")
        calls.append((given.pop("name"), value.detach() if isinstance(value, Tensor) else value, given))

    vars(module)["log"] = log
    try:
        yield calls
    finally:
        if before is None:
            vars(module).pop("log", None)
        else:
            vars(module)["log"] = before


# --- loop: one adapter after the other


class OwnMetrics:
    """Copies of a module's metrics for every adapter but the first, so that a step updates no other's.

    A hook that runs once for all adapters, and resets a metric, resets it for all.

    Args:
        module: The module.
        names: The adapters.
    """

    def __init__(self, module: LightningModule, names: Sequence[str]) -> None:
        self._module, self._names = module, names
        self._places = [
            (part, key, metric, join(path, key))
            for path, part in module.named_modules()
            if not isinstance(part, (Metric, MetricCollection))
            for key, metric in part._modules.items()
            if isinstance(metric, (Metric, MetricCollection))
        ]
        self._copies: dict[str, list[nn.Module]] = {}
        self._counts: list[int] = []  # of updates, as the last block has left them

    @contextmanager
    def of(self, name: str) -> Iterator[None]:
        """Put an adapter's metrics in place inside the block."""
        self._reset_like_the_first()
        try:
            with self._in_place(name):
                yield
        finally:
            self._counts = [_updates(metric) for _, _, metric, _ in self._places]

    def _reset_like_the_first(self) -> None:
        for index, before in enumerate(self._counts):
            if _updates(self._places[index][2]) < before:
                for own in self._copies.values():
                    cast(Any, own[index]).reset()

    @contextmanager
    def _in_place(self, name: str) -> Iterator[None]:
        for other in self._names[1:] if self._places and not self._copies else ():  # now, before the first changes its
            self._copies[other] = [cast(Any, metric).clone() for _, _, metric, _ in self._places]
        if name not in self._copies:
            yield
            return
        for (part, key, _, _), own in zip(self._places, self._copies[name], strict=True):
            part._modules[key] = own
        self._module._metric_attributes = None  # what Lightning remembers of the names of metrics
        try:
            yield
        finally:
            for part, key, metric, _ in self._places:
                part._modules[key] = metric
            self._module._metric_attributes = None

    @contextmanager
    def unchanged(self) -> Iterator[None]:
        """Refuse updates inside the block, where one step runs for several adapters.

        Raises:
            UnfitError: A metric was updated.
        """
        metrics = [(name, part) for _, _, held, name in self._places for part in held.modules()]
        counts = [getattr(part, "_update_count", 0) for _, part in metrics]
        yield
        for (name, part), count in zip(metrics, counts, strict=True):
            if getattr(part, "_update_count", 0) != count:
                raise UnfitError(f"training_step updates the metric {name!r}, of which each adapter needs its own")

    def attribute_of(self, metric: Metric) -> str | None:
        """Return the name of the attribute that holds a metric or the original of a copy."""
        for index, (_, _, original, name) in enumerate(self._places):
            held = [original, *(own[index] for own in self._copies.values())]
            for each in held:
                if each is metric:
                    return name
                if isinstance(each, MetricCollection):
                    for key, inner in each.items(keep_base=True, copy_state=False):
                        if inner is metric:
                            return f"{name}.{key}"
        return None


def _updates(metric: nn.Module) -> int:
    return sum(getattr(part, "_update_count", 0) for part in metric.modules())


def run_one(module: LightningModule, step: Step, call: Call, name: str) -> Outcome:
    """Run the step with one adapter in place."""
    args, kwargs = call
    with using(module, name), others_hidden(module), recorded_logs(module) as logged:
        return outcome_of(step(*args, **kwargs), logged)


# --- vmap: all adapters in one mapped call


@dataclass
class _Slot:
    """One trained tensor of the adapter in place, and what the others have there.

    Attributes:
        places: Tables of modules and keys that hold it.
        rank_dimension: Where its rank is, to be padded with zeros; None if all shapes must be equal.
        values: The tensor of each adapter, by name; None if it does not adapt this layer.
        factors: What each is multiplied with, so that the scaling of the adapter in place fits all.
    """

    places: list[tuple[dict[str, Any], str]]
    rank_dimension: int | None
    values: dict[str, Tensor | None] = field(default_factory=dict)
    factors: dict[str, float] = field(default_factory=dict)

    def stacked(self, names: Sequence[str], template: str) -> Tensor:
        """Return the tensors of some adapters as one, ``(adapters, ...)``, differentiable."""
        like = cast(Tensor, self.values[template])
        parts = [self._scaled(name, like) for name in names]
        if self.rank_dimension is not None:
            rank = max(part.shape[self.rank_dimension] for part in parts)
            parts = [_padded(part, self.rank_dimension, rank) for part in parts]
        return torch.stack(parts)

    def _scaled(self, name: str, like: Tensor) -> Tensor:
        value, factor = self.values[name], self.factors[name]
        if value is None:
            return torch.zeros_like(like)
        return value if factor == 1 else value * factor


def _padded(tensor: Tensor, dimension: int, size: int) -> Tensor:
    """Return a factor with zeros up to a higher rank; no gradient ever reaches them, and they never contribute."""
    missing = size - tensor.shape[dimension]
    if not missing:
        return tensor
    shape = list(tensor.shape)
    shape[dimension] = missing
    return torch.cat([tensor, tensor.new_zeros(shape)], dimension)


class Mapped:
    """Runs the step once, mapped over the stacked factors of all adapters.

    Layers before the first adapted one compute once for all. Ranks are padded with zeros, which changes nothing.

    Args:
        module: The adapted module.
        names: The adapters.
        template: The one whose layers cover those of all; its modules compute.

    Raises:
        UnfitError: The adapters differ in more than ranks, scalings and values.
    """

    def __init__(self, module: LightningModule, names: Sequence[str], template: str) -> None:
        self.module, self.template = module, template
        with using(module, template):
            model = AdaptedModel(module)
            trained, kinds = model.trained, _kinds(model)
            identities = {id(tensor): key for key, tensor in trained.items()}
            self.slots = {key: _Slot([], kinds.get(key, (None, None, None))[0]) for key in trained}
            for _, part in model.parts:
                for table in (part._parameters, part._buffers):
                    for key, tensor in table.items():
                        if (owner := identities.get(id(tensor))) is not None:
                            self.slots[owner].places.append((cast(Any, table), key))
        for name in names:
            self._add(name, kinds)

    def _add(self, name: str, template: Mapping[str, tuple[int | None, float | None, Any]]) -> None:
        with using(self.module, name):
            model = AdaptedModel(self.module)
            trained, kinds = model.trained, _kinds(model)
        if unknown := [key for key in trained if key not in self.slots]:
            raise UnfitError(
                f"{name!r} trains {unknown[0]!r}, which {self.template!r} does not; one adapter must cover all layers"
            )
        for key, slot in self.slots.items():
            value = trained.get(key)
            if value is None and key not in template:
                raise UnfitError(f"{self.template!r} trains {key!r} in full, and {name!r} does not")
            if value is not None and key in template and kinds[key][2] != template[key][2]:
                raise UnfitError(f"{name!r} and {self.template!r} have different options in {key!r} (dropout, DoRA)")
            own, other = (kinds[key][1], template[key][1]) if key in kinds else (None, None)
            slot.values[name] = value
            slot.factors[name] = own / other if own is not None and other else 1.0

    def run(self, step: Step, calls: Mapping[str, Call]) -> dict[str, Outcome]:
        """Run the step for these adapters, whose arguments are the same."""
        names = list(calls)
        args, kwargs = calls[names[0]]
        slots = list(self.slots.values())
        shapes: dict[str, Any] = {}

        def one(values: list[Tensor]) -> Any:
            with _in_place(slots, values), recorded_logs(self.module) as logged:
                outcome = outcome_of(step(*args, **kwargs), logged)
            shapes["outcome"] = outcome
            loss = torch.zeros(()) if outcome.loss is None else outcome.loss
            held = [value for _, value, _ in logged if isinstance(value, Tensor)]
            extra = [value for value in outcome.extra.values() if isinstance(value, Tensor)]
            return loss, held, extra

        with using(self.module, self.template), batched_linears(self.module):
            stacks = [slot.stacked(names, self.template) for slot in slots]
            with warnings.catch_warnings():  # of operations that run once for each adapter: slower, not wrong
                warnings.filterwarnings("ignore", "There is a performance drop")
                losses, held, extra = torch.func.vmap(one, randomness="different")(stacks)
        return {name: _nth(shapes["outcome"], losses, held, extra, index) for index, name in enumerate(names)}


def _nth(seen: Outcome, losses: Tensor, held: Sequence[Tensor], extra: Sequence[Tensor], index: int) -> Outcome:
    """Return one adapter's share of a mapped call."""
    values, extras = iter(held), iter(extra)
    logged = [
        (name, next(values)[index] if isinstance(value, Tensor) else value, kwargs)
        for name, value, kwargs in seen.logged
    ]
    others = {key: next(extras)[index] if isinstance(value, Tensor) else value for key, value in seen.extra.items()}
    return Outcome(None if seen.loss is None else losses[index], others, logged)


@contextmanager
def _in_place(slots: Sequence[_Slot], values: Sequence[Tensor]) -> Iterator[None]:
    """Put other tensors where the trained ones are, inside the block."""
    before = [[table[key] for table, key in slot.places] for slot in slots]
    for slot, value in zip(slots, values, strict=True):
        for table, key in slot.places:
            table[key] = value
    try:
        yield
    finally:
        for slot, own in zip(slots, before, strict=True):
            for (table, key), tensor in zip(slot.places, own, strict=True):
                table[key] = tensor


def _kinds(model: AdaptedModel) -> dict[str, tuple[int | None, float | None, Any]]:
    """Return of each adapter's tensor: the dimension of its rank, its scaling, and what must be equal to share code."""
    names = {id(tensor): name for name, tensor in model.trained.items()}
    found: dict[str, tuple[int | None, float | None, Any]] = {}
    for adapter in model.adapters.values():
        spec = adapter.spec
        options = (spec.dropout, spec.use_dora, spec.lora_bias, spec.rows, type(adapter), adapter.is_difference)
        for key, tensor in (*adapter._parameters.items(), *adapter._buffers.items()):
            if id(tensor) not in names:
                continue
            dimension = {"A": -2, "A0": -2, "B": -1, "B0": -1}.get(key) if isinstance(adapter, LowRankAdapter) else None
            scaling = spec.scaling if key in ("B", "B0", "bias") else None
            found[names[id(tensor)]] = (dimension, scaling, options)
    return found


# --- which line a way fails at


def failure(error: BaseException) -> str:
    """Return why a way failed, with the line of the user's code that it failed at."""
    if isinstance(error, UnfitError):
        return str(error)
    what = str(error).strip().partition("\n")[0].partition(". ")[0] or type(error).__name__
    return f"{what}{_where(error)}"


_PACKAGES = (torch.__file__, lightning.__file__, torchmetrics.__file__, str(Path(__file__).parent))
_NOT_THE_USERS = tuple(f"{Path(file).parent}{os.sep}" for file in _PACKAGES)


def _where(error: BaseException) -> str:
    place, trace = "", error.__traceback__
    while trace is not None:
        code, line = trace.tb_frame.f_code, trace.tb_lineno
        name = code.co_filename
        if not name.startswith(_NOT_THE_USERS) and not name.startswith("<"):
            text = linecache.getline(name, line).strip()
            place = f" ({os.path.basename(name)}:{line}: `{text}`)" if text else f" ({os.path.basename(name)}:{line})"
        trace = trace.tb_next
    return place
