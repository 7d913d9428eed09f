"""The engine of a rank schedule: it scores components, decides which stay, and keeps the others out of the training."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_lora.adapted_model import AdaptedModel
from lightning_lora.layers import AdapterGroup, LoRALayer, LowRankAdapter
from lightning_lora.ranks.allocation import allocate
from lightning_lora.ranks.basis import (
    has_turnable_states,
    reorder_factors,
    reorder_states,
    states_of,
    to_singular_directions,
    turn_factors,
    turn_states,
)
from lightning_lora.ranks.history import History
from lightning_lora.ranks.schedule import Plan, RankSchedule
from lightning_lora.ranks.scores import scores_of
from lightning_lora.sharding import is_sharded, local, numbers_held

WINDOW = 10  # steps before an event in which forward passes are watched, and components out of use are computed


class RankController:
    """Lets the ranks of a module's adapters follow their need while it trains, without changing a shape.

    The components in use come first, so that the forward pass takes views. A decision moves the others behind them,
    with what the optimizers know. One that is out of use has a column of ``B`` (a row of ``A``, of embeddings) that is
    zero, and the forward pass leaves it out. Its optimizer states are zero, so that it stays so; the other factor keeps
    its values.

    Call ``before_step`` and ``after_step`` around each optimizer step, and ``end_step`` once all optimizers have made
    theirs. Every process must do so.

    Args:
        module: The adapted module, with adapters of the highest rank.
        schedule: The options.
        plan: The plan of this training.

    Raises:
        ValueError: The options do not fit the adapters.
    """

    def __init__(self, module: nn.Module, schedule: RankSchedule, plan: Plan) -> None:
        self.schedule, self.plan = schedule, plan
        self.adapters, self._layers = scheduled(module)
        self.costs = {name: cost_of(adapter) for name, adapter in self.adapters.items()}
        # A layer that is left out of the adapter would lose what else it has learned, and a part cannot be left out.
        has_biases = any(root.attachment.config.bias == "lora_only" for root in AdaptedModel(module).roots)
        self.floors = {
            name: max(schedule.min_rank, int(has_biases or not adapter.is_plain or self._is_part(name)))
            for name, adapter in self.adapters.items()
        }
        _check_budget(plan, self.costs, self.floors)
        self._scores = scores_of(schedule.score, self.adapters, regrows=schedule.regrow)
        self.steps, self.history = 0, History()
        self._has_stepped = self._has_noted = self._is_watching = False
        self._dropped: dict[str, int] = {}  # where the components begin, in this process's part, that are out of use
        self.followers: list[AdaptedModel] = []  # averages of the module, which must lose the same components
        for adapter in self.adapters.values():
            if "mask" not in adapter._buffers:
                adapter.keep(adapter.spec.rank)

    def _is_part(self, name: str) -> bool:
        return isinstance(self._layers[name].lora, AdapterGroup)

    @property
    def is_done(self) -> bool:
        """Whether the ranks are final."""
        return self.steps >= self.plan.last

    def begin(self) -> None:
        """Begin to train, or go on from a loaded state."""
        if not self.history.steps:
            self.history.add(self.steps, self.plan.budget_at(self.steps), self.ranks())
        self._apply([])
        self._watch_if_near(has_decided=True)

    def close(self) -> None:
        """Leave nothing but the masks on the module."""
        self._scores.rest()
        for adapter in self.adapters.values():
            adapter.have_values()  # and its mask in use

    # --- steps

    def before_step(self, optimizer: Optimizer) -> None:
        """Take the scores of this step from the gradients: accumulated, unscaled, and not yet clipped."""
        held = _held(optimizer)
        self._has_noted = True
        if not self.is_done:
            self._scores.note(held)
        for name, first in self._dropped.items():
            adapter = self.adapters[name]
            factor, dimension = _zero_factor(adapter)
            if adapter.kept is None and factor.grad is not None and id(factor) in held:  # it was computed in full
                _zero_from(factor.grad, dimension, first)

    @torch.no_grad()
    def after_step(self, optimizer: Optimizer) -> None:
        """Keep components that are out of use at zero, whatever the optimizer has made of them."""
        self._has_stepped = True
        held = _held(optimizer)
        for name, first in self._dropped.items():
            factor, dimension = _zero_factor(self.adapters[name])
            if id(factor) in held:
                _zero_from(factor, dimension, first)

    def end_step(self, optimizers: Iterable[Optimizer]) -> bool:
        """Count a step if one was made, and decide the ranks if it is time.

        Returns:
            Whether they were decided.

        Raises:
            RuntimeError: No score was taken, because optimizers were stepped without ``before_step``.
        """
        if not self._has_stepped:
            return False
        self._scores.commit()
        self.steps, self._has_stepped, optimizers = self.steps + 1, False, [*optimizers]
        is_event = self.plan.is_event(self.steps)
        if is_event:
            if not self._has_noted:
                raise RuntimeError(
                    "rank_schedule: optimizers were stepped past Lightning, so that no gradient was seen. Step those "
                    "that self.optimizers() returns."
                )
            self._decide(optimizers)
            self._apply(optimizers)
        if self._scores.needs_directions and (is_event or self.steps == self.plan.first):
            self._turn(optimizers)
        self._watch_if_near(has_decided=is_event)
        return is_event

    def _watch_if_near(self, *, has_decided: bool) -> None:
        event = self.plan.next_event(self.steps)
        is_near = event is not None and event - self.steps <= WINDOW
        if is_near == self._is_watching and not has_decided:
            return
        if is_near != self._is_watching:
            if is_near:
                self._scores.watch(self._layers)
            else:
                self._scores.rest()
        self._is_watching = is_near
        if self.schedule.regrow:
            for adapter in (self.adapters[name] for name in self._dropped):
                if is_near:
                    vars(adapter)["kept"] = None  # so that its components get gradients
                elif adapter.kept is None:
                    adapter.have_values()

    # --- events

    def _decide(self, optimizers: Sequence[Optimizer]) -> None:
        """Choose which components stay, the same in every process."""
        budget = self.plan.budget_at(self.steps)
        scores, order = self._scores.values(), dict[str, list[int]]()
        for name, adapter in self.adapters.items():
            usable = [n for n, used in enumerate(adapter.in_use.tolist()) if used or self.schedule.regrow]
            order[name] = sorted(usable, key=lambda number, own=scores[name]: (-own[number], number))  # type: ignore[misc]
        spectra = {name: [scores[name][number] for number in numbers] for name, numbers in order.items()}
        ranks = allocate(spectra, self.costs, budget, at_least=self.floors, takes_worthless=True)
        masks = {
            name: torch.zeros(adapter.spec.rank, dtype=torch.bool).index_fill_(
                0, torch.tensor(order[name][: ranks[name]], dtype=torch.long), True
            )
            for name, adapter in self.adapters.items()
        }
        for name, mask in _as_first_process(masks, self._device).items():
            self._put_first(name, mask, optimizers)
        self.history.add(self.steps, budget, self.ranks())

    def _put_first(self, name: str, mask: Tensor, optimizers: Sequence[Optimizer]) -> None:
        """Use the components of a mask, and move the others behind them; each part stays in its order."""
        used, out = mask.nonzero().squeeze(1), (~mask).nonzero().squeeze(1)
        self.adapters[name].keep(len(used))
        order = torch.cat([used, out])
        if torch.equal(order, order.sort().values):
            return
        for each in (self.adapters[name], *self._twins(name)):
            reorder_factors(each, order)
        for optimizer in optimizers:
            reorder_states(self.adapters[name], order, optimizer)
        self._scores.reorder(name, order)

    def _twins(self, name: str) -> list[LowRankAdapter]:
        return [cast(LowRankAdapter, model.adapters[name]) for model in self.followers]

    @torch.no_grad()
    def _apply(self, optimizers: Sequence[Optimizer]) -> None:
        """Make what is out of use zero, in the factors, in the optimizers' states and in averages."""
        self._dropped, known = {}, dict[Any, Tensor]()
        for name, adapter in self.adapters.items():
            for twin in self._twins(name):
                twin.keep(adapter.rank)
            if adapter.kept is None:
                continue
            factor, dimension = _zero_factor(adapter)
            first = self._dropped[name] = _held_before(factor, dimension, adapter.kept, known)
            _zero_from(factor, dimension, first)
            for optimizer in optimizers:
                for state in states_of(optimizer, factor, dimension):
                    if state.is_floating_point():  # codes of quantized states mean other numbers
                        _zero_from(state, dimension, first)
            for twin in self._twins(name):
                _zero_from(*_zero_factor(twin), adapter.kept)

    def _turn(self, optimizers: Sequence[Optimizer]) -> None:
        """Make the components in use singular directions, and value them anew."""
        for name, adapter in self.adapters.items():
            if not adapter.rank or not all(has_turnable_states(adapter, optimizer) for optimizer in optimizers):
                continue
            if (turn := to_singular_directions(adapter, adapter.rank)) is not None:
                for each in (adapter, *self._twins(name)):
                    turn_factors(each, turn)
                for optimizer in optimizers:
                    turn_states(adapter, turn, optimizer)
        self._scores.reset()

    @property
    def _device(self) -> torch.device:
        return next(iter(self.adapters.values())).mask.device

    def ranks(self) -> dict[str, int]:
        """Return the rank of each adapter that is in use."""
        return {name: int(adapter.in_use.sum()) for name, adapter in self.adapters.items()}

    def parameters(self) -> int:
        """Return the parameters of the factors that are in use."""
        return sum(rank * self.costs[name] for name, rank in self.ranks().items())

    # --- checkpoints

    def state(self) -> dict[str, Any]:
        """Return what a resumed training needs beside the masks: plain values."""
        return {"steps": self.steps, "total": self.plan.total, "history": asdict(self.history)}

    def scores(self) -> dict[str, Any]:
        """Return the averages of the scores, as tensors."""
        return self._scores.state()

    def load(self, state: Mapping[str, Any], scores: Mapping[str, Any]) -> None:
        """Go on from what ``state`` and ``scores`` returned."""
        self.steps, self.history = int(state["steps"]), History.of(state["history"])
        self._scores.load(scores)


def scheduled(module: nn.Module) -> tuple[dict[str, LowRankAdapter], dict[str, LoRALayer]]:
    """Return the adapters whose rank a schedule decides, and their layers, by the names of the adapters.

    Raises:
        ValueError: There is none.
    """
    model = AdaptedModel(module)
    owners = {id(adapter): layer for layer in reversed(model.layers.values()) for adapter in layer.adapters().values()}
    adapters = {name: adapter for name, adapter in model.adapters.items() if isinstance(adapter, LowRankAdapter)}
    if not adapters:
        raise ValueError("rank_schedule: the module has no low-rank adapter, so there is no rank to decide.")
    return adapters, {name: owners[id(adapter)] for name, adapter in adapters.items()}


def cost_of(adapter: LowRankAdapter) -> int:
    """Return the parameters of one component: ``out + in`` of a matrix, times the matrices of a stack."""
    return (adapter.A.numel() + adapter.B.numel()) // adapter.spec.rank


def _check_budget(plan: Plan, costs: Mapping[str, int], floors: Mapping[str, int]) -> None:
    least = sum(floors[name] * cost for name, cost in costs.items())
    if plan.budget < max(least, min(costs.values())):
        raise ValueError(
            f"rank_schedule: budget={plan.budget:,} parameters is too small: the lowest ranks need "
            f"{max(least, min(costs.values())):,}. Raise it, or lower min_rank."
        )
    if plan.budget >= plan.full:
        raise ValueError(
            f"rank_schedule: budget={plan.budget:,} parameters leaves nothing to decide, since all components together "
            f"have {plan.full:,}. Lower it, or raise max_rank."
        )


def _held(optimizer: Optimizer) -> Collection[int]:
    return {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}


def _zero_factor(adapter: LowRankAdapter) -> tuple[nn.Parameter, int]:
    """Return the factor that starts at zero, and which of its dimensions counts the components."""
    factor = adapter.zero_factor()
    return factor, -2 if factor is adapter.A else -1


def _held_before(factor: Tensor, dimension: int, number: int, known: dict[Any, Tensor]) -> int:
    """Return how many of the components before a number this process's part of a factor has."""
    if not is_sharded(factor):
        return number
    return int((numbers_held(factor, dimension % factor.ndim, known) < number).sum())


def _zero_from(tensor: Tensor, dimension: int, first: int) -> None:
    """Make this process's components zero from one on."""
    part = local(tensor.detach())
    part.narrow(dimension, first, part.shape[dimension] - first).zero_()


def _as_first_process(masks: dict[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return masks
    together = torch.cat([*masks.values()]).to(torch.uint8).to(device)
    torch.distributed.broadcast(together, 0)
    parts = torch.split(together.bool(), [len(mask) for mask in masks.values()])
    return dict(zip(masks, parts, strict=True))
