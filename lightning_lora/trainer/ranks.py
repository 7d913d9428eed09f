"""A rank schedule inside ``fit``: the training's length, the hooks, and what a person sees of it."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from functools import partial
from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.fabric.utilities.rank_zero import rank_zero_info, rank_zero_warn  # type: ignore[attr-defined]
from lightning.pytorch import LightningModule, Trainer
from torch.optim import Optimizer

from lightning_lora.adapted_model import AdaptedModel
from lightning_lora.attachment import Attachment, is_same_request, settled
from lightning_lora.config import LoRAConfig
from lightning_lora.names import listed
from lightning_lora.option_checks import parse_budget
from lightning_lora.planning.obstacles import lowered_by
from lightning_lora.ranks.compaction import compact
from lightning_lora.ranks.controller import RankController, cost_of, scheduled
from lightning_lora.ranks.schedule import Plan, RankSchedule
from lightning_lora.trainer.checks import AVERAGING, callbacks_of
from lightning_lora.trainer.diagnostics import group_of

_OWNER = "LoRACallback.rank_schedule"


def schedule_of(
    asked: RankSchedule | None, record: Mapping[str, Any] | None, *, takes_any: bool
) -> RankSchedule | None:
    """Return the schedule of a run, from its options and from the record of the checkpoint that it resumes.

    Args:
        asked: The option.
        record: The record; None if no adapter is resumed.
        takes_any: Whether all options come from the checkpoint.

    Raises:
        MisconfigurationException: The run would go on otherwise than the checkpoint's.
    """
    if record is None:
        return asked
    saved = record.get("rank_schedule")
    if saved is None:
        if asked is not None:
            raise MisconfigurationException(
                f"{_OWNER}: the checkpoint's training had no rank_schedule, or its ranks are final. Leave "
                "rank_schedule out to go on with its ranks; or start a new training with init_from."
            )
        return None
    before = RankSchedule(**saved["options"])
    if asked is None and not takes_any:
        raise MisconfigurationException(
            f"{_OWNER}: the checkpoint's training has one, {before.changed()!r}, and this run has none. Give it, or "
            "resume with LoRACallback() to take all options from the checkpoint."
        )
    if asked is None:
        return before
    ours, theirs = ({**each.changed(), "total": None} for each in (asked, before))
    if changed := sorted(name for name in ours.keys() | theirs.keys() if ours.get(name) != theirs.get(name)):
        shown = [f"{name}={getattr(asked, name)!r} (there {getattr(before, name)!r})" for name in changed]
        raise MisconfigurationException(
            f"{_OWNER} differs from the one of the checkpoint: {listed(shown)}. Only total may change; set the others "
            "as they were."
        )
    return asked


def widened(schedule: RankSchedule | None, config: LoRAConfig) -> LoRAConfig:
    """Return the options to attach with.

    Raises:
        MisconfigurationException: The schedule does not go with them.
    """
    try:
        return config if schedule is None else schedule.widened(config)
    except ValueError as error:
        raise MisconfigurationException(str(error)) from error


def attaching(schedule: RankSchedule | None, config: LoRAConfig) -> AbstractContextManager[None]:
    """Have messages about layers too small for the first rank name the schedule's own option inside the block."""
    return nullcontext() if schedule is None else lowered_by(partial(schedule.for_small, config))


def check_undecided(before: Attachment, asked: LoRAConfig, wide: LoRAConfig) -> None:
    """Refuse to decide the ranks of adapters once more, after an earlier fit.

    Raises:
        MisconfigurationException: Its message says what to do.
    """
    if is_same_request(asked, before.asked) and before.config != settled(wide, before):
        raise MisconfigurationException(
            f"{_OWNER}: an earlier fit has decided the ranks of these adapters. Leave rank_schedule out to train on "
            "with them, or set fresh=True to start anew."
        )


class FitRanks:
    """Connects a rank schedule to a Trainer, from the beginning of training until ``close``.

    Args:
        schedule: The options.
        config: The options of the adapters as they were asked for: of the rank that is the average in the end.
        trainer: The Trainer, when training begins.
        module: The adapted module.
        saved: The state and the scores of the training that is resumed.

    Raises:
        MisconfigurationException: The schedule does not fit the training or its adapters.
    """

    def __init__(
        self,
        schedule: RankSchedule,
        config: LoRAConfig,
        trainer: Trainer,
        module: LightningModule,
        saved: tuple[Mapping[str, Any], Mapping[str, Any]] | None,
    ) -> None:
        self.schedule, self.trainer = schedule, trainer
        total = _total_steps(schedule, trainer, None if saved is None else int(saved[0]["total"]))
        try:
            self.controller = RankController(module, schedule, _plan(schedule, config, module, total))
        except ValueError as error:
            raise MisconfigurationException(f"LoRACallback: {error}") from error
        if saved is not None:
            self.controller.load(*saved)
        averages = (getattr(callback, "_average_model", None) for callback in callbacks_of(trainer, *AVERAGING))
        models = (getattr(each, "module", each) for each in averages if each is not None)
        self.controller.followers = [AdaptedModel(model) for model in models]
        self._hooks = [each.register_step_post_hook(self._after_step) for each in trainer.optimizers]
        self.controller.begin()
        plan = self.controller.plan
        rank_zero_info(
            f"LoRA: the ranks follow their need (score={schedule.score!r}): {self.controller.parameters():,} "
            f"parameters of the factors now, {plan.budget:,} from step {plan.last:,} of {plan.total:,} on."
        )
        self._log()

    def _after_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:  # noqa: ARG002 - as torch calls it
        self.controller.after_step(optimizer)

    def after_batch(self) -> None:
        """Count the step that a batch has made, and decide the ranks if it is time."""
        if self.controller.end_step(self.trainer.optimizers):
            self._log()

    def state(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """Return what a checkpoint holds: plain values and the averages of the scores."""
        return {"options": self.schedule.changed()} | self.controller.state(), self.controller.scores()

    def close(self) -> None:
        """Remove the hooks."""
        for hook in self._hooks:
            hook.remove()
        self.controller.close()

    def succeed(self) -> None:
        """Say that the training has ended before the ranks were final, if so; otherwise which layers lost theirs."""
        controller, plan = self.controller, self.controller.plan
        if not controller.is_done:
            rank_zero_warn(
                f"LoRA: training ended after {controller.steps:,} steps, before the ranks were final (step "
                f"{plan.last:,}): the factors have {controller.parameters():,} parameters, not {plan.budget:,}. Set "
                "rank_schedule's until lower, or total to the steps that you expect."
            )
        elif empty := [name for name, rank in controller.ranks().items() if not rank]:
            rank_zero_info(f"LoRA: rank_schedule has left no rank to {listed(empty)}; the base remains there.")

    def compact(self, module: LightningModule) -> None:
        """Give the adapters the shapes of the ranks in use, and record how these came about."""
        compact(module, self.trainer.optimizers)
        for root in AdaptedModel(module).roots:
            root.attachment.rank_history = asdict(self.controller.history)

    def _log(self) -> None:
        """Write to the loggers at once: ``self.log`` would skip steps that are no multiple of log_every_n_steps."""
        ranks, groups = self.controller.ranks(), defaultdict[str, list[int]](list)
        for name, rank in ranks.items():
            groups[group_of(name)].append(rank)
        metrics = {f"lora/rank/{group}": sum(each) / len(each) for group, each in groups.items()}
        metrics["lora/budget"] = float(self.controller.parameters())
        for logger in self.trainer.loggers:
            logger.log_metrics(metrics, step=self.trainer.fit_loop.epoch_loop._batches_that_stepped)


def _total_steps(schedule: RankSchedule, trainer: Trainer, before: int | None) -> int:
    """Return the optimizer steps of a training; those that were planned, where it is resumed."""
    if schedule.total is not None:
        return schedule.total
    total = trainer.estimated_stepping_batches
    if not 0 < total < math.inf:
        raise MisconfigurationException(
            f"{_OWNER} needs to know how long the training is, and this Trainer has no end. Set max_steps or "
            "max_epochs, or rank_schedule={'total': steps, ...}."
        )
    if before not in (None, int(total)):
        raise MisconfigurationException(
            f"{_OWNER}: the checkpoint's schedule was made for {before:,} optimizer steps, and this Trainer will have "
            f"made {int(total):,}. Say which you mean: rank_schedule={{'total': {before}, ...}} goes on as planned, "
            f"{{'total': {int(total)}, ...}} makes a new plan."
        )
    return int(total)


def _plan(schedule: RankSchedule, config: LoRAConfig, module: LightningModule, total: int) -> Plan:
    adapters, _ = scheduled(module)
    costs = {name: cost_of(adapter) for name, adapter in adapters.items()}
    full = sum(adapter.spec.rank * costs[name] for name, adapter in adapters.items())
    if schedule.budget is None:
        budget = config.first_rank * sum(costs.values())
    else:
        base = sum(root.attachment.report.base_parameters for root in AdaptedModel(module).roots)
        budget = parse_budget(schedule.budget, base)
    return Plan.of(schedule, total, full=full, budget=budget)
