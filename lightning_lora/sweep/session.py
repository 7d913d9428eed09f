"""One run of ``LoRASweep``, from ``setup`` to ``teardown``: the session of a ``LoRACallback`` with many adapters."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.fabric.utilities.rank_zero import rank_zero_info  # type: ignore[attr-defined]
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch.optim import Optimizer

from lightning_lora.adapted_model import AdaptedModel
from lightning_lora.config import STARTS_FROM_DATA, STARTS_FROM_WEIGHTS, LoRAConfig
from lightning_lora.loading import add_adapter
from lightning_lora.named_adapters import active_adapter, adapter_names, recorded
from lightning_lora.names import listed
from lightning_lora.optimizers import unpack_configured
from lightning_lora.ranks.schedule import RankSchedule
from lightning_lora.storage.checkpoint import SWEEP_KEY, adapters_in
from lightning_lora.sweep.candidates import Candidate
from lightning_lora.sweep.checks import (
    check_alike,
    check_direction,
    check_possible,
    check_same_sweep,
    one_sided_change_named,
)
from lightning_lora.sweep.optimizers import (
    Parameters,
    check_rates_differ,
    learning_rates,
    parameters_of_adapters,
    refuse_coupling,
    split_groups,
    warn_of_coupling,
)
from lightning_lora.sweep.standings import DIVERGED, LOST, Standings
from lightning_lora.sweep.training import Training
from lightning_lora.sweep.validation import Seen, Validation
from lightning_lora.switching import others_frozen, set_adapter, using
from lightning_lora.trainer.buffers import divide_buffers
from lightning_lora.trainer.calibration import before_optimizers, calibrate_fit
from lightning_lora.trainer.checkpoints import install_adapter_checkpoints
from lightning_lora.trainer.export import (
    check_export_dir,
    check_export_place,
    check_exportable,
    export_fit,
    export_place,
)
from lightning_lora.trainer.lightning_patches import MethodWraps, chosen_record, overrides, with_twins
from lightning_lora.trainer.outcome import check_finite, check_trained
from lightning_lora.trainer.session import FitSession

_WARM_UP = 0.1  # of the steps: before, small learning rates look bad, and large ones good


class Wanted(Protocol):
    """The options of a ``LoRASweep`` that a run reads."""

    candidates: dict[str, Candidate]
    monitor: str
    direction: str
    keep: float
    every_n_val: int
    mode: str
    export_dir: str | None
    overwrite: bool
    check_base: bool


@dataclass
class _Options:
    """The options of a ``LoRACallback`` that trains one adapter of the sweep."""

    config: LoRAConfig
    adapter: str | None
    check_base: bool
    save_adapters: str = "all"
    merge_on_teardown: bool = False
    export_dir: str | None = None
    overwrite: bool = False
    init_from: str | None = None
    fresh: bool = False
    probe: bool = False
    allow_untrained: tuple[str, ...] = ()
    lr_ratio: float = 1.0
    diagnostics_every_n_steps: int | None = None
    rank_schedule: RankSchedule | None = None


class SweepSession:
    """The state of one run, and its steps in the order of Lightning's hooks.

    Attributes:
        session: The session that attaches, freezes, saves, loads and checks, as for a single adapter.
        standings: What each adapter has reached.
        training: How the training step runs, once training has begun.

    Raises:
        MisconfigurationException: The run cannot train several adapters.
    """

    def __init__(self, wanted: Wanted, trainer: Trainer, module: LightningModule, *, is_fit: bool) -> None:
        self.wanted, self.trainer, self.module, self._is_fit = wanted, trainer, module, is_fit
        self.chosen, self._export_dir = wanted.candidates, export_place(wanted.export_dir)
        self.standings = Standings(self.chosen, wanted.direction)
        self.training: Training | None = None
        self.owned: dict[str, Parameters] = {}
        self._wraps, self._rates = MethodWraps(), dict[str, float]()
        self._seed = int(os.environ.get("PL_GLOBAL_SEED", "0"))  # where seed_everything leaves it
        self._watched: str | None = None  # the adapter that stands for all where gradients are checked
        self._has_begun = self._has_validated = self._has_succeeded = False
        self._is_single = isinstance(trainer.strategy, with_twins(SingleDeviceStrategy))
        record = chosen_record(trainer)
        self._saved: Mapping[str, Any] | None = None if record is None else record.get(SWEEP_KEY)
        if is_fit:
            check_possible(trainer, module, wanted.mode)
            check_direction(trainer, wanted.monitor, wanted.direction)
            check_same_sweep(self._saved, record, self.chosen)
        resumed = None if record is None else record.get("adapter", next(iter(self.chosen)))
        first = self.chosen.get(str(resumed)) or next(iter(self.chosen.values()))
        options = _Options(first.config, first.name if is_fit and record is None else None, wanted.check_base)
        if not is_fit:
            options.config = LoRAConfig()  # takes any
        self.session = FitSession(options, trainer, module, is_fit=is_fit, seed=first.seed)
        self.session.part = first.own_part
        self._checkpoints = install_adapter_checkpoints(trainer.strategy)
        self._checkpoints.sweep = None
        self._validation = Validation(
            trainer,
            module,
            lambda: self.standings.live or [self.best],
            self._judge,
            lambda name: nullcontext() if self.training is None else self.training.own_values(name),
            is_mean=self._has_tasks,
        )

    @property
    def best(self) -> str:
        """The adapter with the best latest value; before there is one, the first."""
        return self.standings.best or next(iter(self.standings.live), next(iter(self.chosen)))

    @property
    def _has_tasks(self) -> bool:
        return any(each.data is not None for each in self.chosen.values())

    # --- attaching

    def attach(self) -> None:
        """Attach all adapters, or arrange to attach them once the layers exist."""
        self.session.attach()
        if not self._is_fit:
            return
        for hook in ("setup", "configure_model"):
            if overrides(self.module, hook):
                self._wraps.after(self.module, hook, lambda _: self._attach_others())
        self._wraps.after(self.trainer.strategy, "model_to_device", lambda _: self._calibrate(early=True))
        self._wraps.around(self.module, "configure_optimizers", self._configure_optimizers)
        self._attach_others()

    def _attach_others(self) -> None:
        if not AdaptedModel(self.module).layers:
            return  # the layers come later
        before = active_adapter(self.module)
        for candidate in self.chosen.values():
            if candidate.name not in adapter_names(self.module):
                self._add(candidate)
        if before is not None:
            set_adapter(self.module, before)
        self.owned = parameters_of_adapters(self.module, list(self.chosen))
        if (several := recorded(self.module)) is not None:
            several.frozen -= self.chosen.keys()
        for own in self.owned.values():
            for parameter in own.values():
                parameter.requires_grad_(True)
        for name in self.chosen if self.wanted.export_dir is not None else ():
            with using(self.module, name):
                check_exportable(self.module, self.session.layout)

    def _add(self, candidate: Candidate) -> None:
        seed, start = self._seed if candidate.seed is None else candidate.seed, candidate.config.start.name
        try:
            add_adapter(self.module, candidate.name, candidate.config, seed=seed)
        except ValueError as error:
            raise MisconfigurationException(f"LoRASweep, adapter {candidate.name!r}: {error}") from error
        if start in STARTS_FROM_WEIGHTS and self._saved is None:
            with using(self.module, candidate.name):
                calibrate_fit(self.trainer, self.module, start, 0)

    def _calibrate(self, *, early: bool) -> None:
        """Compute the starts from data that adapters beside the first wait for."""
        for name, candidate in self.chosen.items():
            start = candidate.config.start
            if start.name not in STARTS_FROM_DATA or self._saved is not None:
                continue
            with using(self.module, name):
                if any(adapter.is_waiting for adapter in AdaptedModel(self.module).adapters.values()):
                    with before_optimizers(is_needed=False) if early else nullcontext():
                        calibrate_fit(self.trainer, self.module, start.name, start.batches, candidate.own_part)

    @property
    def _template(self) -> str:
        """The adapter that trains the most tensors, whose layers cover those of the others if any one's do."""
        return max(self.owned, key=lambda name: len(self.owned[name]))

    def _configure_optimizers(self, configure: Callable[[], Any]) -> Any:
        """Give each adapter its own groups in what the module configures for one."""
        template = self._template
        with using(self.module, template), others_frozen(self.module):
            configured = configure()
        optimizers, schedulers = unpack_configured(configured)
        refuse_coupling(self.module, optimizers, schedulers)
        warn_of_coupling(self.module, optimizers)
        split_groups(self.module, optimizers, schedulers, self.chosen, template)
        self._rates = learning_rates(optimizers, self.owned)
        for name, rate in learning_rates(optimizers, self.owned, peak=True).items():
            self.standings.results[name].lr = rate
        return configured

    # --- training

    def check_fit(self) -> None:
        """Check that exactly what was asked for will train, and take up where a checkpoint has stopped."""
        self._calibrate(early=False)
        self.session.check_fit()
        self._watched = active_adapter(self.module)
        self._wraps.around(self.trainer.fit_loop.epoch_loop.val_loop, "run", self._validation.run)
        if self._has_tasks and overrides(self.module, "validation_step"):
            self._wraps.around(self.module, "validation_step", self._validation_step)
        directory = self._export_dir
        if directory is not None and not vars(self.trainer).get("fast_dev_run"):
            for place in self._export_places(directory).values():
                check_export_place(self.session.layout, place, self.trainer)
                check_export_dir(self.session.layout, place, overwrite=self.wanted.overwrite)

    def start_training(self) -> None:
        """Begin the training: take over the steps of training and validation."""
        self.session.start_training(list(self.chosen))
        mode = self.wanted.mode
        if self._saved is not None:
            rates = {name: each.lr for name, each in self.standings.results.items()}
            self.standings.restore(self._saved)
            for name, result in self.standings.results.items():
                result.lr = rates[name]
            mode = self._saved["mode"] if mode == "auto" else mode
        self.training = Training(
            self.trainer,
            self.module,
            self.chosen,
            self.owned,
            self.standings,
            self._template,
            mode,
            is_single=self._is_single,
        )
        self.training.release()
        self._show()
        self._checkpoints.sweep = self._record
        self._wraps.around(self.module, "training_step", self.training.training_step)
        for hook in ("on_after_backward", "on_before_optimizer_step", "configure_gradient_clipping"):
            clips = hook == "configure_gradient_clipping" and bool(self.trainer.gradient_clip_val)
            if overrides(self.module, hook) or clips:
                self._wraps.around(self.module, hook, self.training.look_at_gradients)
        for hook in ("on_train_batch_start", "on_before_zero_grad", "on_train_batch_end"):
            if overrides(self.module, hook):
                self._wraps.around(self.module, hook, partial(self._run_once, hook))

    def _run_once(self, name: str, hook: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Run a hook that is for all adapters; ever more rarely, see whether it changes one of them alone."""
        step = self.trainer.global_step
        if step & (step - 1):
            return hook(*args, **kwargs)
        with one_sided_change_named(self.module, name, self.owned, self.standings.live):
            return hook(*args, **kwargs)

    def _record(self) -> dict[str, Any]:
        assert self.training is not None
        return self.standings.to_record() | {"mode": self.training.mode, "monitor": self.wanted.monitor}

    def begin_batch(self, batch: Any, batch_idx: int) -> None:
        """Before the first batch, check the adapters and choose how the step runs; later, look at losses."""
        self.session.begin_batch(batch, batch_idx)
        assert self.training is not None
        if not self._has_begun:
            self._has_begun = True
            check_alike(self.module, self.owned)
            step, arguments = self._own_step(batch, batch_idx)
            self.training.choose(step, arguments)
        elif self._has_validated:
            self._has_validated = False
            self.training.prove_again(*self._own_step(batch, batch_idx))
        elif self.training.is_time_to_look():
            self.training.look()

    def _own_step(self, batch: Any, batch_idx: int) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        step = self.module.training_step.__wrapped__  # type: ignore[attr-defined]
        loop = self.trainer.fit_loop.epoch_loop
        kwargs = loop._build_kwargs({}, batch, batch_idx)  # type: ignore[arg-type]
        return step, tuple(kwargs.values())

    def after_backward(self) -> None:
        """After a backward pass: add the gradients of earlier ones, which manual optimization has not postponed."""
        if self.training is not None:
            self.training.after_backward()
            self.session.gradients.after_backward()

    def before_step(self, optimizer: Optimizer) -> None:
        """Before an optimizer step: leave out what has stopped, and note gradients, once for all adapters."""
        assert self.training is not None
        self.training.drop_idle()
        if self.module.automatic_optimization or active_adapter(self.module) == self._watched:
            self.session.gradients.before_step(optimizer)

    def after_batch(self, outputs: Any) -> None:
        """After a batch: check that learning rates are still the adapters' own."""
        self.session.end_batch(outputs)
        if self.trainer.global_step in (1, 2):
            live = self.standings.live
            now = learning_rates(self.trainer.optimizers, self.owned)
            rates = {name: rate for name, rate in now.items() if name in live}
            check_rates_differ(self.module, rates, {name: self._rates[name] for name in rates})

    # --- validation

    def _validation_step(self, step: Callable[..., Any], batch: Any, *args: Any, **kwargs: Any) -> Any:
        """Validate an adapter that has data of its own on its part of the batch."""
        name = self._validation.adapter
        key = None if name is None else self.chosen[name].data
        if key is not None and isinstance(batch, Mapping) and key in batch:
            batch = batch[key]
            if batch is None:
                return None
            self.trainer._results.batch, self.trainer._results.batch_size = batch, None  # type: ignore[union-attr]
        return step(batch, *args, **kwargs)

    def _judge(self, seen: Seen) -> str:
        """Record what the validation has found, and stop those that lose; returns the best."""
        assert self.training is not None
        self.training.look()
        self._has_validated = True
        values = {name: self._monitored(metrics, name) for name, metrics in seen.items()}
        step = self.trainer.global_step
        self.standings.note(step, values)
        self.training.stop([name for name, value in values.items() if not _is_number(value)], DIVERGED)
        if self._is_time_to_halve(step):
            self.training.stop(self.standings.losers(self.wanted.keep), LOST)
        self._show()
        return self.best

    def _show(self) -> None:
        """Show in the progress bar how many adapters train, and which is the best."""
        shown = {"adapters": f"{len(self.standings.live)}/{len(self.chosen)}"}
        shown |= {} if self.standings.best is None else {"best": self.standings.best}
        self.trainer._logger_connector._progress_bar_metrics.update(shown)  # type: ignore[arg-type]

    def _monitored(self, metrics: Mapping[str, Any], name: str) -> float:
        monitor = self.wanted.monitor
        logged = self.trainer.callback_metrics
        value = metrics.get(monitor, logged.get(f"{monitor}/{name}"))
        if value is None:
            keys = dict.fromkeys(
                key.removesuffix(f"/{name}") for key in (*metrics, *logged) if key.endswith(f"/{name}")
            )
            raise MisconfigurationException(
                f"LoRASweep(monitor={monitor!r}): no metric of this name was logged; logged were "
                f"{listed(list({**metrics, **keys})) or 'none'}. Call self.log({monitor!r}, ...) in validation_step, "
                "or name another metric."
            )
        strategy = self.trainer.strategy
        return float(strategy.reduce(torch.as_tensor(value).float().to(strategy.root_device), reduce_op="mean"))

    def _is_time_to_halve(self, step: int) -> bool:
        """Return whether losers stop now: not while rates warm up, nor when all is done anyway."""
        if self.wanted.keep == 1 or self.standings.validations % self.wanted.every_n_val:
            return False
        total = self.trainer.estimated_stepping_batches
        return _WARM_UP * total <= step < total if total != float("inf") else True

    def end_epoch(self) -> None:
        """At the end of an epoch of a fit without validation, judge by what training has logged."""
        loop = self.trainer.fit_loop.epoch_loop.val_loop
        if not (loop._data_source.is_defined() and self.trainer.limit_val_batches):
            set_adapter(self.module, self._judge({name: {} for name in self.standings.live}))

    # --- the end

    def succeed(self) -> None:
        """Record a successful fit, and leave the best adapter in place."""
        if self.training is None:  # there was no batch
            check_trained(self.session.layout, self.trainer, self.module, None, is_awaited=False)
            return
        self.training.look()
        set_adapter(self.module, self.best)
        check_finite(self.session.layout, self.module, None)
        self.session.gradients.finish()
        awaited = self.wanted.export_dir is not None and not vars(self.trainer).get("fast_dev_run")
        self._has_succeeded = check_trained(self.session.layout, self.trainer, self.module, True, is_awaited=awaited)
        rank_zero_info(f"LoRASweep, by {self.wanted.monitor}:\n{self.standings.table()}")

    def close(self) -> None:
        """Remove every wrap, hook and request; checkpoints saved by hand after a fit still hold its results."""
        if self.training is not None:
            self.training.close()
        self._wraps.remove()
        record = self._record() if self._has_succeeded else {}
        self._checkpoints.sweep = record.copy if record else None
        divide_buffers(self.module)
        self.session.close()

    def finish(self) -> None:
        """Export the best adapter, or all if each has data of its own."""
        directory = self._export_dir
        if directory is None or not self._has_succeeded:
            return
        if vars(self.trainer).get("fast_dev_run"):
            rank_zero_info(f"LoRASweep: nothing is exported to {directory} in a fast dev run.")
            return
        for name, place in self._export_places(directory).items():
            name, checkpoint = (name, None) if name else self._best_state()
            with using(self.module, name):
                export_fit(self.session.layout, place, checkpoint, overwrite=self.wanted.overwrite)
            rank_zero_info(f"LoRASweep: {name!r} exported to {place} ({checkpoint or 'last state'}).")
        self.trainer.strategy.barrier()

    def _best_state(self) -> tuple[str, str | None]:
        """Return the adapter to export, and the checkpoint with its best state; None for the last one."""
        checkpoints = self.trainer.checkpoint_callback
        if getattr(checkpoints, "monitor", None) == self.wanted.monitor:
            path = getattr(checkpoints, "best_model_path", "")
            is_ours = path in self._checkpoints.saved or self._checkpoints.has_loaded  # and not of an earlier fit
            name, _ = adapters_in(Path(path)) if path and is_ours else (None, None)
            if name in self.chosen:
                return str(name), path
        return self.best, None

    def _export_places(self, directory: str) -> dict[str, str]:
        """Return where each adapter goes; the best one has no name yet."""
        return {name: str(Path(directory) / name) for name in self.chosen} if self._has_tasks else {"": directory}


def _is_number(value: float) -> bool:
    return value == value and abs(value) != float("inf")
