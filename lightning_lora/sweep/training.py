"""The training step of a sweep inside ``fit``: the way it runs, backward passes, losses that are not finite, logs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, suppress
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.fabric.utilities.rank_zero import rank_zero_info, rank_zero_warn  # type: ignore[attr-defined]
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from torchmetrics import Metric

from lightning_lora.adapted_model import AdaptedModel
from lightning_lora.base_buffers import buffer_places
from lightning_lora.names import listed
from lightning_lora.ops.eager import without_autocast
from lightning_lora.sweep.attributes import OwnAttributes, changed_in_place, contents, own_parts
from lightning_lora.sweep.candidates import Candidate
from lightning_lora.sweep.forecast import forecast
from lightning_lora.sweep.meeting import Meeting
from lightning_lora.sweep.optimizers import (
    Parameters,
    Turns,
    drop_gradients,
    only_gradients_of,
    own_groups,
    step_together,
)
from lightning_lora.sweep.proof import Proof, Sample, Way
from lightning_lora.sweep.standings import DIVERGED, Standings
from lightning_lora.sweep.steps import (
    Call,
    Mapped,
    Outcome,
    OwnMetrics,
    Step,
    UnfitError,
    failure,
    recorded_logs,
    run_one,
)
from lightning_lora.switching import others_hidden, using
from lightning_lora.trainer.buffers import claim_buffers, own_buffer_count

LOOP, VMAP, MEET = "loop", "vmap", "meet"
_WORTHWHILE = 0.75  # of the FLOPs; stacked factors compute slower than single ones (docs/benchmarks.md)
_LOOK_EVERY = 50  # steps: how often a GPU is waited for, to see whether losses are finite


class Training:
    """Runs ``training_step`` for all adapters that train.

    Args:
        trainer: The Trainer.
        module: Its module.
        chosen: The adapters.
        owned: What each trains.
        standings: Which of them still train.
        template: The adapter whose layers cover those of all.
        mode: How to run the step; ``"auto"`` until the first batch has shown what fits.
        is_single: Whether one process trains, so that ``loop`` may free one adapter's activations before the next.

    Attributes:
        mode: How the step runs.
        why: Why other ways were left out, by their names.
    """

    def __init__(
        self,
        trainer: Trainer,
        module: LightningModule,
        chosen: Mapping[str, Candidate],
        owned: Mapping[str, Parameters],
        standings: Standings,
        template: str,
        mode: str,
        *,
        is_single: bool,
    ) -> None:
        self.trainer, self.module, self.chosen, self.owned = trainer, module, chosen, owned
        self.standings, self.template, self.mode, self.is_single = standings, template, mode, is_single
        self.why: dict[str, str] = {}
        self._metrics = OwnMetrics(module, list(chosen))
        self._waiting: dict[Tensor, Tensor] = {}  # gradients from before Lightning clears them
        self._last = ExitStack()  # has the last adapter in place until its backward pass has ended
        self._broken: dict[str, Tensor] = {}  # whether a loss has not been finite since the last look
        self._mapped: Mapped | None = None
        self._attributes = OwnAttributes(module, list(chosen))
        self._sample = Sample()
        self._has_looked = False
        self._with_loss = set[str]()  # adapters that had a loss in a batch of this optimizer step
        self._own = 0  # attributes and buffers that are each adapter's own because of their steps

    # --- which way

    def choose(self, step: Step, args: tuple[Any, ...]) -> None:
        """Decide how the step runs, by the first batch, and say what it needs; every process must call this."""
        if not self.module.automatic_optimization:  # a trial would step the optimizers
            self.mode = LOOP
            model = AdaptedModel(self.module)
            places = [*buffer_places(model), *buffer_places(model, are_saved=False)]
            self._divide(places)  # whichever its step may change
            rank_zero_info(f"LoRASweep: mode {LOOP!r}, since {type(self.module).__name__} optimizes manually.")
            return
        proof = self._proof(step, args)
        with self.trainer.precision_plugin.train_step_context():
            with suppress(Exception):  # of a module that cannot be measured, or that fails anyway
                self._sample = proof.sample()
            self._divide(self._sample.shared)
            if self.mode == "auto":
                self._choose(proof)
            elif self.mode != LOOP:
                self._prove(proof)
            if self._sample.kept is not None:
                flops = proof.flops if self.mode == VMAP else None
                rank_zero_info(f"LoRASweep: {forecast(self.module, self.owned, self._sample.kept, flops)}")
        self._mapped, self._own = None, self._attributes.places + own_buffer_count(self.module)
        if self.mode != LOOP:  # which alone promises equal bits
            step_together(self.trainer.optimizers)

    def _proof(self, step: Step, args: tuple[Any, ...]) -> Proof:
        return Proof(self.module, step, self._calls(args, {}), self.owned, self._shown)

    def prove_again(self, step: Step, args: tuple[Any, ...]) -> None:
        """After a validation, see whether the way still fits if validations give adapters values of their own."""
        if self.mode == LOOP or self._attributes.places + own_buffer_count(self.module) == self._own:
            return
        why = ""
        try:
            with self.trainer.precision_plugin.train_step_context():
                self._proof(step, args).check(self._way(self.mode))
        except Exception as error:
            why = failure(error)
        if self._anywhere(bool(why)):
            rank_zero_warn(
                f"LoRASweep: training_step uses what hooks of the validation have set, of which each adapter has its "
                f"own, and mode {self.mode!r} does not know that: {why or 'in another process'}. From here on it is "
                f"mode {LOOP!r}."
            )
            self.mode, self._mapped = LOOP, None

    def _divide(self, shared: Sequence[str]) -> None:
        """Give each adapter buffers of its own in place of those that the step would change for all of them."""
        fleeting = buffer_places(AdaptedModel(self.module), are_saved=False)
        self._attributes.claim(fleeting[name] for name in shared if name in fleeting)
        for name in self.chosen if shared else ():
            with using(self.module, name):
                claim_buffers(self.module, shared)
        if shared and not self.is_single:
            rank_zero_warn(
                f"LoRASweep: training_step changes the buffers {listed(shared)}. Each adapter has its own, but DDP "
                "keeps only those of the first equal in all processes, so others end a little off fits of their own."
            )

    def _choose(self, proof: Proof) -> None:
        on_cpu = self.trainer.strategy.root_device.type == "cpu"  # where one forward pass for all saves no time
        for mode in () if len(self.chosen) == 1 else (VMAP,) if on_cpu else (VMAP, MEET):
            try:
                self._check_possible(mode)
                proof.check(self._way(mode))
                self._check_worthwhile(proof)
            except Exception as error:  # whatever the module's own code raises under a transform
                self.why[mode] = failure(error)
            if not self._anywhere(mode in self.why):
                self.mode = mode
                break
            self.why.setdefault(mode, "it does not fit in another process")
        else:
            self.mode = LOOP
        reasons = "".join(f" {mode}: {reason}." for mode, reason in self.why.items())
        what = "which always fits" if self.mode == LOOP else "which the first batch has proved"
        rank_zero_info(f"LoRASweep: mode {self.mode!r}, {what}.{reasons}")

    def _prove(self, proof: Proof) -> None:
        """Refuse a way that was asked for if the first batch shows that it computes something else."""
        try:
            proof.check(self._way(self.mode))
        except MisconfigurationException:
            raise
        except Exception as error:
            raise self._unfit(error) from error

    def _unfit(self, error: Exception) -> MisconfigurationException:
        return MisconfigurationException(
            f"LoRASweep: mode {self.mode!r} does not fit the training_step of {type(self.module).__name__}: "
            f"{failure(error)}. Use mode='loop', which always fits, or 'auto', which tries before training."
        )

    def _way(self, mode: str) -> Way:
        return lambda step, calls: self._together(mode, step, calls)

    def _check_possible(self, mode: str) -> None:
        if torch.is_anomaly_enabled():
            raise UnfitError("detect_anomaly=True must not see an adapter whose loss is not finite")
        if mode == VMAP and any(each.data is not None for each in self.chosen.values()):
            raise UnfitError("every adapter has data of its own")

    def _check_worthwhile(self, proof: Proof) -> None:
        """Refuse a way that has no less to compute where computing takes the time, and not launching kernels."""
        if self.trainer.strategy.root_device.type == "cpu" and (proof.flops or 0) > _WORTHWHILE:
            raise UnfitError(f"it takes {proof.flops:.2f} of the FLOPs of {LOOP!r}, too many to be faster on a CPU")

    def _anywhere(self, flag: bool) -> bool:
        strategy = self.trainer.strategy
        found = strategy.reduce(torch.tensor(float(flag), device=strategy.root_device), reduce_op="sum")
        return bool(found > 0)

    # --- the step

    def training_step(self, step: Step, *args: Any, **kwargs: Any) -> Any:
        """Run the step for every adapter that trains; called in place of the module's own."""
        if not self.trainer.training:  # called by a validation_step, for the adapter in place
            return step(*args, **kwargs)
        with self._naming_what_is_shared():
            return self._training_step(step, self._calls(args, kwargs))

    def _training_step(self, step: Step, calls: Mapping[str, Call]) -> Any:
        if not self.module.automatic_optimization:
            outcomes = self._manually(step, calls)
        elif self.mode == LOOP:
            outcomes = self._in_turn(step, calls)
        else:
            try:
                outcomes = self._together(self.mode, step, calls)
            except MisconfigurationException:
                raise
            except Exception as error:
                raise self._unfit(error) from error
        self._log(outcomes, calls)
        losses = {name: each.loss for name, each in outcomes.items() if each.loss is not None}
        if self._is_first_of_step():
            self._with_loss.clear()
        self._with_loss.update(losses)
        if not losses:
            return None
        self._note(losses)
        shown = next((name for name in self.standings.ranked(outcomes) if name in losses), next(iter(losses)))
        loss = self._total(losses) if self.module.automatic_optimization else losses[shown]
        return {"loss": loss, **outcomes[shown].extra} if outcomes[shown].extra else loss

    @contextmanager
    def _naming_what_is_shared(self) -> Iterator[None]:
        """In the first batch, warn of what the steps of all adapters change together."""
        if self._has_looked or len(self.chosen) == 1:
            yield
            return
        self._has_looked, parts = True, own_parts(self.module)
        before = contents(parts)
        yield
        if changed := changed_in_place(before, contents(parts)):
            rank_zero_warn(
                f"LoRASweep: training_step changes {listed([key for _, key in changed])} in place. All adapters share "
                "such attributes, so what is computed from them mixes adapters. Log the values, or register tensors as "
                "buffers: both are each adapter's own."
            )

    def _calls(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Call]:
        """Return the arguments of the step for each adapter: its own part of the batch, if it has one."""
        calls = {}
        for name in self.standings.live:
            candidate = self.chosen[name]
            own = args if candidate.data is None else (candidate.own_part(args[0]), *args[1:])
            if candidate.data is None or own[0] is not None:
                calls[name] = (own, kwargs)
        return calls

    def _together(self, mode: str, step: Step, calls: Mapping[str, Call]) -> dict[str, Outcome]:
        with self._metrics.unchanged():
            self._check_stays(mode)
            if mode == MEET:
                return Meeting(self.module, list(self.chosen)).run(step, calls)
            if self._mapped is None:
                self._mapped = Mapped(self.module, list(self.chosen), self.template)
            return self._mapped.run(step, calls)

    def _check_stays(self, mode: str) -> None:
        """Refuse a way in which adapters would share, or not get, what their steps change."""
        sample = self._sample
        buffers = [*sample.own, *sample.shared] if mode == VMAP else sample.shared
        if buffers:
            raise UnfitError(f"training_step changes the buffers {listed(buffers)}, which stay the same in it")
        if attributes := [*sample.tensors, *(sample.gathered if mode == VMAP else sample.plain)]:
            raise UnfitError(f"training_step sets {listed(attributes)}, of which each adapter needs its own")

    def _manually(self, step: Step, calls: Mapping[str, Call]) -> dict[str, Outcome]:
        """Run a step that steps the optimizers itself with each adapter."""
        outcomes, turns = dict[str, Outcome](), Turns(self.trainer, self.owned)
        for name, call in calls.items():
            with turns.of(name), self.own_values(name):
                outcomes[name] = run_one(self.module, step, call, name)
        return outcomes

    def _in_turn(self, step: Step, calls: Mapping[str, Call]) -> dict[str, Outcome]:
        """Run the step with each adapter, and on a single device its backward pass before the next one's step."""
        outcomes: dict[str, Outcome] = {}
        pending = ""
        self.close()
        if self.is_single:
            self._waiting.clear()
        for name, call in calls.items():
            if pending:
                self._backward(pending, outcomes[pending])
                pending = ""
            with self.own_values(name):
                outcomes[name] = outcome = run_one(self.module, step, call, name)
            if self.is_single and outcome.loss is not None:
                if outcome.loss.requires_grad and (outcome.loss.device.type != "cpu" or outcome.loss.isfinite()):
                    pending = name
                else:
                    outcome.loss = outcome.loss.detach()
        if pending:
            self._last.enter_context(using(self.module, pending))  # its backward pass is Lightning's
        return outcomes

    @contextmanager
    def own_values(self, name: str) -> Iterator[None]:
        """Have an adapter's metrics, plain attributes and groups in place, as its own steps have left them."""
        with self._metrics.of(name), self._attributes.of(name), self._groups_of(name):
            yield

    @contextmanager
    def _shown(self, name: str) -> Iterator[None]:
        with self._attributes.shown(name), self._groups_of(name):
            yield

    def _groups_of(self, name: str) -> AbstractContextManager[None]:
        if not self.module.automatic_optimization:  # whose steps step schedulers, which count the groups
            return nullcontext()
        return own_groups(self.trainer.optimizers, self.owned[name])

    def close(self) -> None:
        """Put back the adapter that was in place before the backward pass of the last one."""
        self._last.close()

    def _backward(self, name: str, outcome: Outcome) -> None:
        """Compute an adapter's gradients, and keep them until Lightning has cleared those of the step before."""
        parameters = list(self.owned[name].values())
        before = [parameter.grad for parameter in parameters]
        accumulated, is_first = self.trainer.accumulate_grad_batches, self._is_first_of_step()
        for parameter in parameters:
            parameter.grad = None
        assert outcome.loss is not None
        # A backward pass may compute parts of the module anew. Lightning's autocast ends with the step.
        with using(self.module, name), without_autocast(outcome.loss.device.type):
            self.module.backward(outcome.loss / accumulated)
        for parameter, old in zip(parameters, before, strict=True):
            if parameter.grad is not None:
                self._waiting[parameter] = parameter.grad
            parameter.grad = None if is_first else old
        outcome.loss = outcome.loss.detach()

    def _is_first_of_step(self) -> bool:
        """Return whether gradients begin anew with this batch."""
        return self.trainer.fit_loop.epoch_loop.batch_idx % self.trainer.accumulate_grad_batches == 0

    def after_backward(self) -> None:
        """Add the gradients that have waited."""
        self.close()
        for parameter, gradient in self._waiting.items():
            parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient
        self._waiting.clear()

    def look_at_gradients(self, hook: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
        """Run a hook that sees gradients for every adapter, with its own alone; called in place of the module's."""
        if not self.module.automatic_optimization:  # its step has that adapter in place
            hook(*args, **kwargs)
            return
        outcomes = dict[str, Outcome]()
        for name in self.standings.live:
            with ExitStack() as own:
                own.enter_context(using(self.module, name))
                own.enter_context(others_hidden(self.module))
                own.enter_context(only_gradients_of(self.owned, name))
                own.enter_context(self.own_values(name))
                logged = own.enter_context(recorded_logs(self.module))
                hook(*args, **kwargs)
            outcomes[name] = Outcome(None, logged=logged)
        self._log(outcomes, {})

    def _total(self, losses: Mapping[str, Tensor]) -> Tensor:
        """Return the sum of the losses that are finite; its gradient is that of every adapter's own loss."""
        stacked = torch.stack([loss.float() if loss.dtype != torch.float64 else loss for loss in losses.values()])
        total = torch.where(stacked.isfinite(), stacked, torch.zeros_like(stacked)).sum()
        idle: list[Tensor] = []
        if not self.is_single:  # DDP expects a gradient for each parameter that it has seen
            idle += [p for name in self.owned if name not in losses for p in self.owned[name].values()]
        elif not total.requires_grad:  # the last loss was not finite, and the others have had their backward passes
            idle += [*self.owned[next(iter(losses))].values()][:1]
        return total + sum(0 * parameter.nan_to_num(0.0, 0.0, 0.0).sum() for parameter in idle)

    # --- losses

    def _note(self, losses: Mapping[str, Tensor]) -> None:
        step = self.trainer.global_step
        for name, loss in losses.items():
            is_broken = ~loss.detach().isfinite()
            self._broken[name] = is_broken if name not in self._broken else self._broken[name] | is_broken
        if self.is_single and next(iter(losses.values())).device.type == "cpu":
            self.look()
        every: int = self.trainer.log_every_n_steps  # type: ignore[attr-defined]
        if step % max(1, every) == 0:
            shown = {name: float(loss.detach()) for name, loss in losses.items()}
            self.standings.note_losses(step, shown)

    def look(self) -> None:
        """Stop the adapters whose loss has not been finite; every process must call this."""
        if not self._broken:
            return
        names = list(self._broken)
        flags = torch.stack([self._broken[name].float() for name in names])
        flags = flags if self.is_single else self.trainer.strategy.reduce(flags, reduce_op="sum")
        self._broken.clear()
        if broken := [name for name, flag in zip(names, flags.tolist(), strict=True) if flag]:
            self.stop(broken, DIVERGED)

    def is_time_to_look(self) -> bool:
        """Return whether this step is one of those in which processes and devices are waited for."""
        return self.trainer.global_step % _LOOK_EVERY == 0

    def stop(self, names: Sequence[str], why: str) -> None:
        """Train these adapters no further."""
        names = [name for name in names if name in self.standings.live]
        if not names:
            return
        step = self.trainer.global_step
        self.standings.stop(names, step, why)
        self.release()
        if why == DIVERGED:
            rank_zero_warn(f"LoRASweep: {listed([*map(repr, names)])} diverged and stopped at step {step}.")
            if not self.standings.live and not any(each.curve for each in self.standings.results.values()):
                raise MisconfigurationException(
                    f"LoRASweep: every adapter has diverged by step {step}: {listed(list(self.owned))}. Lower the "
                    "learning rates, clip gradients, or use a wider precision."
                )
            if not self.standings.live:
                self.trainer.should_stop = True
        else:
            rank_zero_info(
                f"LoRASweep: {listed([*map(repr, names)])} stopped at step {step}; "
                f"{listed([*map(repr, self.standings.live)])} train on."
            )

    def release(self) -> None:
        """Take adapters that have stopped out of the training."""
        live = self.standings.live
        for name, own in self.owned.items():
            for parameter in own.values() if name not in live else ():
                self._waiting.pop(parameter, None)
        self.drop_idle()

    def drop_idle(self) -> None:
        """Leave adapters that have stopped, or had no loss, out of the optimizer step, weight decay included."""
        steps = {*self.standings.live}
        if self.module.automatic_optimization and self.mode != LOOP:  # where all that ran together have gradients
            steps &= self._with_loss
        for name, own in self.owned.items():
            if name not in steps:
                drop_gradients(own)

    # --- logs

    def _log(self, outcomes: Mapping[str, Outcome], calls: Mapping[str, Call]) -> None:
        """Log what each adapter has logged under its own name, and the best one's also as it is."""
        shown, results = self.standings.ranked(outcomes)[:1], self.trainer._results
        for name, outcome in outcomes.items():
            if self.chosen[name].data is not None and name in calls and results is not None:
                results.batch, results.batch_size = calls[name][0][0], None  # whose size weighs means
            for key, value, options in outcome.logged:
                if isinstance(value, Metric):
                    options = options | {"metric_attribute": self._metrics.attribute_of(value)}
                self.module.log(f"{key}/{name}", value, **(options | {"prog_bar": False}))
                if name in shown:
                    self.module.log(key, value, **options)
