"""One run of ``LoRACallback``, from ``setup`` to ``teardown``."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection
from contextlib import ExitStack, nullcontext
from dataclasses import replace
from typing import Any, Protocol, cast

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.fabric.utilities.rank_zero import rank_zero_info, rank_zero_warn  # type: ignore[attr-defined]
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import LearningRateFinder

from lightning_lora.adapted_model import AdaptedModel, HeldAdapters
from lightning_lora.attachment import Attachment, Stored, get_attachment, is_same_request, request, settled
from lightning_lora.config import STARTS_FROM_DATA, STARTS_FROM_WEIGHTS, LoRAConfig
from lightning_lora.layers.norm import asked_modes_kept
from lightning_lora.modes import freeze_norms
from lightning_lora.named_adapters import active_adapter, adapter_names, recorded
from lightning_lora.names import listed
from lightning_lora.optimizers import repair_optimizers, unpack_configured
from lightning_lora.ranks.schedule import RankSchedule
from lightning_lora.sharding import is_flattened, is_fully_sharded
from lightning_lora.state import load_without_base
from lightning_lora.storage.checkpoint import own_name, saved_options, saved_request, stored_adapters
from lightning_lora.surgery import attach, attach_named, detach, merge
from lightning_lora.switching import others_frozen, remove_adapter, set_adapter, switched
from lightning_lora.trainer import export, hints
from lightning_lora.trainer.buffers import BufferWatch, watch
from lightning_lora.trainer.calibration import before_optimizers, calibrate_fit, check_ranks_can_change
from lightning_lora.trainer.checkpoints import install_adapter_checkpoints
from lightning_lora.trainer.checks import (
    AVERAGING,
    GradientCheck,
    callbacks_of,
    check_allowed,
    check_before_training,
    check_same_adapters,
    check_unchanged,
    goes_beside,
    probe_adapters,
)
from lightning_lora.trainer.diagnostics import FitDiagnostics
from lightning_lora.trainer.hyperparameters import log_options
from lightning_lora.trainer.lightning_patches import (
    MethodWraps,
    chosen_checkpoint,
    chosen_record,
    frozen_kept,
    overrides,
)
from lightning_lora.trainer.outcome import check_finite, check_trained, tell_of_moved_buffers
from lightning_lora.trainer.precision import convert_layers
from lightning_lora.trainer.ranks import FitRanks, attaching, check_undecided, schedule_of, widened
from lightning_lora.trainer.reads import ReadWatch
from lightning_lora.trainer.strategies.deepspeed import gathered_parameters
from lightning_lora.trainer.warm_start import begin_from, check_can_restart

_SEED = "PL_GLOBAL_SEED"  # where seed_everything leaves the seed


class Options(Protocol):
    """The options of a ``LoRACallback`` that a run reads."""

    config: LoRAConfig
    adapter: str | None
    save_adapters: str
    merge_on_teardown: bool
    export_dir: str | None
    overwrite: bool
    init_from: str | None
    fresh: bool
    check_base: bool
    probe: bool
    allow_untrained: tuple[str, ...]
    lr_ratio: float
    diagnostics_every_n_steps: int | None
    rank_schedule: RankSchedule | None


class FitSession:
    """The state of one run (fit, validate, test or predict), and its steps in the order of Lightning's hooks.

    Attributes:
        layout: How the strategy distributes what is trained.
        gradients: The check that gradients reach the adapters, made anew when a training begins.
        reads: What warns of code that reads the weight of an adapted layer.
        diagnostics: What measures the adapters, once training has begun and if asked for.
        ranks: What lets the ranks follow their need, likewise.

    Args:
        options: The callback.
        trainer: Its Trainer.
        module: The module to adapt; it gets a load hook until ``close``.
        is_fit: Whether the run trains.
        seed: Seed of random starts, in place of the one that ``seed_everything`` has set.

    Raises:
        MisconfigurationException: The strategy is not supported, or not with these settings.
    """

    def __init__(
        self, options: Options, trainer: Trainer, module: LightningModule, *, is_fit: bool, seed: int | None = None
    ) -> None:
        self.options, self.trainer, self.module, self._is_fit = options, trainer, module, is_fit
        self._checkpoints = install_adapter_checkpoints(trainer.strategy)
        self.layout = self._checkpoints.layout
        self.gradients, self.reads = GradientCheck(module, self.layout), ReadWatch(module)
        self.diagnostics: FitDiagnostics | None = None
        self._export_dir = export.export_place(options.export_dir)
        self._seed = int(os.environ.get(_SEED, "0")) if seed is None else seed
        self._name, self._stored = self._to_train()
        # Without options, a run takes those of the checkpoint, or of attached adapters; training, if they are named.
        goes_on = not options.fresh and options.adapter in adapter_names(module)
        is_free = goes_on or not is_fit or chosen_checkpoint(trainer) is not None
        self._takes_any = is_free and options.config == LoRAConfig()
        self._asked, self._calibration = cast("LoRAConfig | None", None), dict[str, Any]()
        self._has_saved_options, self._schedule = False, options.rank_schedule
        self.part: Callable[[Any], Any] | None = None  # of a batch, as in ``calibrate_fit``
        if is_fit:
            self._schedule = schedule_of(self._schedule, chosen_record(trainer), takes_any=self._takes_any)
        self._config = widened(options.rank_schedule, options.config)
        self.ranks: FitRanks | None = None
        keeps_all = options.save_adapters == "all"
        self._checkpoints.begin_run(is_fit=is_fit, check_base=options.check_base, keeps_all=keeps_all)
        self._bare = ExitStack()  # has hooks of the module set the base's buffers, and not those of another adapter
        if self._name is not None and self._name in adapter_names(module):
            set_adapter(module, self._name)
        elif self._name is not None and adapter_names(module):
            self._bare.enter_context(switched(module, None, "LoRACallback"))
        self._buffers = BufferWatch(module)
        self._is_first, self._is_trial = True, bool(vars(trainer).get("fast_dev_run"))
        self._others, self._averages = ExitStack(), ExitStack()  # keep others frozen, and the base where averaged
        self._is_new = self._before is None
        self._had = {} if self._is_new or options.fresh or chosen_checkpoint(trainer) else AdaptedModel(module).trained
        self._coverage: hints.Coverage | None = None  # from when the module was whole: FSDP hides sizes
        self._held: HeldAdapters | None = None  # from the first batch of a training on
        self._ratio: hints.RatioWatch
        self._has_start, self._has_succeeded, self._wraps = False, False, MethodWraps()
        self._load_hooks = load_without_base(module)

    def _to_train(self) -> tuple[str | None, Stored]:
        """Return the name of the adapter of this run, None for the active one; and all that a checkpoint holds."""
        name, names, record = self.options.adapter, adapter_names(self.module), chosen_record(self.trainer)
        if not self._is_fit and record is None and (several := recorded(self.module)) is not None and several.blocks:
            return None, {}  # evaluating inside using(...), which says with what
        (saved, stored), own = stored_adapters(record), own_name(record)
        if own in names and (name in names or (name is None and own != active_adapter(self.module))):
            saved = own  # never into another adapter that the module has
        elif name is None and goes_beside(self.module, own):
            saved = own
        if saved is not None and name not in (None, saved):
            there = "holds it too" if name in stored else f"holds {listed([*map(repr, stored)]) or 'it alone'}"
            raise MisconfigurationException(
                f"LoRACallback(adapter={name!r}): this run loads a checkpoint that has trained {saved!r} and {there}. "
                f"Leave adapter out to go on with {saved!r}, or load it by load_adapter(..., name=...), not ckpt_path."
            )
        before = get_attachment(self.module) if self.options.fresh else None  # which is to begin anew, as it is called
        return name or saved or (None if before is None else before.name), stored

    @property
    def _before(self) -> Attachment | None:
        """The record of the adapter of this run, if the module has it already."""
        return get_attachment(self.module) if self._name in (None, active_adapter(self.module)) else None

    # --- attaching: late enough for the module's layers, early enough for the strategy

    def attach(self) -> None:
        """Attach, or arrange to attach once the layers exist; to train, also prepare ``configure_optimizers``."""
        module = self.module
        for stage in ("validation", "test", "predict"):
            self._wraps.around(module, f"on_{stage}_model_eval", self._evaluate)
            self._wraps.after(self.trainer.strategy, f"{stage}_step", lambda _: self.reads.end())
        if self._is_fit:
            self._prepare_fit()
        model = AdaptedModel(module)
        is_bare = self._name is None and chosen_checkpoint(self.trainer) is None and bool(adapter_names(module))
        if not self._is_fit and not model.layers and (model.merges or is_bare):
            return  # evaluating a merged model, whose adapter is in its weights, or the base inside using(module, None)
        is_of_part = model.layers and self._before is None and self._name in (None, active_adapter(module))
        if is_of_part and self._takes_any and not self._is_fit and chosen_checkpoint(self.trainer) is None:
            return  # evaluating what load_adapter has read from a directory into a part of the module
        self._asked, self._calibration = saved_request(chosen_record(self.trainer))
        if self._takes_any or is_same_request(self.options.config, self._asked):
            self._take_saved_options()
        elif self._is_fit:
            hints.say_changed_dropout(saved_options(chosen_record(self.trainer)), self._config)
        request(module, *self._wanted(), self._name, self._stored)  # for attach(self) in configure_model
        self.layout.before_wrapping = None
        if overrides(module, "configure_model"):
            self.layout.before_wrapping = self._attach_before_wrapping
            self._wraps.after(module, "configure_model", self._attach_now)
        elif overrides(module, "setup") and not callbacks_of(self.trainer, *AVERAGING):
            self._wraps.after(module, "setup", self._attach_now)  # it may build layers or load base weights
        else:
            self._attach_now()
            if overrides(module, "setup"):
                self._wraps.after(module, "setup", lambda _: self._buffers.note_set())

    def _evaluate(self, hook: Callable[[], object]) -> None:
        asked_modes_kept(self.module, hook)
        self.reads.begin()

    def _prepare_fit(self) -> None:
        diagnostics = bool(self.options.diagnostics_every_n_steps)
        self.layout.check_fit(with_diagnostics=diagnostics, with_schedule=self._schedule is not None)
        if self.options.lr_ratio != 1.0 and callbacks_of(self.trainer, LearningRateFinder):
            hints.warn_of_rate_finder(self.options.lr_ratio)
        self._wraps.after(self.module, "configure_optimizers", self._repair_optimizers)
        # Before DDP and the optimizers see the parameters, and before a tuner saves them.
        if self._config.start.name in STARTS_FROM_DATA and chosen_checkpoint(self.trainer) is None:
            if self._config.has_ranks_from_data:
                check_ranks_can_change(self.options.init_from)
            self._wraps.after(self.trainer.strategy, "model_to_device", self._calibrate_early)
        if chosen_checkpoint(self.trainer) is None and (before := self._before) is not None:
            if self.options.fresh:
                self._start_anew()
            elif self._schedule is not None:
                check_undecided(before, self.options.config, self._config)

    def _start_anew(self) -> None:
        """Remove the adapters of an earlier fit, and put back what it trained in full."""
        module, before = self.module, self._before
        assert before is not None
        check_can_restart(module, before, self._config, self._seed, self.options.init_from)
        if self._export_dir is not None and not self._is_trial:
            export.check_export_dir(self.layout, self._export_dir, overwrite=self.options.overwrite)
        self._remove(before)
        self._buffers.begin_anew(before)
        self._is_new = True
        if _SEED not in os.environ:
            self._seed = before.seed

    def _remove(self, adapter: Attachment) -> None:
        """Remove the adapter of this run, and put back what it trained in full; others stay."""
        others = [name for name in adapter_names(self.module) if name != adapter.name]
        if adapter.name is None or not others:
            detach(self.module)
        else:
            set_adapter(self.module, others[0])
            remove_adapter(self.module, adapter.name)
            self._bare.enter_context(switched(self.module, None, "LoRACallback"))

    def _take_saved_options(self) -> None:
        """Take the options from the checkpoint that is about to be loaded, if there is one."""
        saved, before = saved_options(chosen_record(self.trainer)), self._before
        if saved is None:
            return
        is_wrapped = any(is_fully_sharded(part) for part in self.module.modules())
        if before is not None and before.config != saved[0] and not is_wrapped and self._is_ours(before):
            self._remove(before)  # what an earlier stage attached by default, or has decided
        (self._config, self._seed), self._has_saved_options = saved, True
        what = "rank, targets and all other options come" if self._takes_any else "the ranks of the layers come"
        rank_zero_info(f"LoRA: {what} from the checkpoint.")

    def _is_ours(self, before: Attachment) -> bool:
        """Return whether adapters were attached for the options of this run."""
        return before.config == self._config or is_same_request(self.options.config, before.asked)

    def _wanted(self) -> tuple[LoRAConfig, int]:
        """Return the config and the seed to attach with: those of present adapters, if any will do."""
        before = self._before
        if before is None:
            return self._config, self._seed
        has_decided = is_same_request(self.options.config, before.asked) and not self._has_saved_options
        return before.config if self._takes_any or has_decided else settled(self._config, before), before.seed

    def _attach_before_wrapping(self) -> None:
        if get_attachment(self.module) is None:
            raise RuntimeError(
                f"{type(self.module).__name__}.configure_model wraps parts of itself before it has adapters; adapters "
                "that come later would not be synchronized between processes. Build all layers, call "
                "lightning_lora.attach(self), then wrap."
            )
        self._attach_now()

    def _attach_now(self, result: Any = None) -> None:  # noqa: ARG002 - of the method after which this is called
        self._bare.close()
        module, (config, seed), before, name = self.module, self._wanted(), self._before, self._name
        if before is not None and (before.config, before.seed) == (config, seed) and is_flattened(module):
            self.layout.attached(module)  # nothing more can be attached
            return
        convert_layers(module.trainer.precision_plugin, module)
        with attaching(self._schedule, self.options.config):
            if name is None:
                report = attach(module, config, seed=seed)
            else:
                report = attach_named(module, name, config, seed=seed, stored=self._stored)
        self._others.close()
        self._others.enter_context(others_frozen(module))
        self._coverage = hints.coverage(module)
        self.layout.attached(module)
        self._remember_request(get_attachment(module))
        if self._is_first:
            self._is_first = False
            self._buffers.note_set()
            check_same_adapters(module)  # before the strategy compares parameters, and cannot say whose they are
            hints.warn_of_replaced(self._had, module)
            if self._is_new or self._is_fit:
                rank_zero_info(f"{report}")
            if self._is_fit and self._is_new:
                hints.warn_of_missing_heads(self._config, report)
            self._begin()

    def _remember_request(self, record: Attachment | None) -> None:
        """Write into the record what was asked for, where the ranks are decided later."""
        if record is None:
            return
        if self._asked is not None or self._calibration:
            record.asked, record.calibration = self._asked, self._calibration
        elif self.options.rank_schedule is not None and not self._has_saved_options:
            record.asked = replace(self.options.config, modules_to_save=record.config.modules_to_save)

    def _begin(self) -> None:
        """Start from another adapter, and refuse what could not be exported later."""
        module, path, resumed = self.module, self.options.init_from, chosen_checkpoint(self.trainer)
        if self.options.fresh and self._is_new and (attachment := get_attachment(module)) is not None:
            attachment.starts = {name: each.detach().clone() for name, each in AdaptedModel(module).in_full.items()}
        if self._is_fit:
            watch(module)  # a tuner trains before the callback hears of it
        if resumed is None and (self._is_fit or self._is_new):
            with gathered_parameters(module):
                begin_from(module, path, self._buffers, check_base=self.options.check_base, is_new=self._is_new)
            self._has_start = path is not None
        if self._is_fit and resumed is None and self._config.start.name in STARTS_FROM_WEIGHTS:
            self._calibrate()  # while the weights are whole
        if self._export_dir is not None and self._is_fit:
            export.check_exportable(module, self.layout)
            if not self._is_trial:
                export.check_export_place(self.layout, self._export_dir, self.trainer)
                export.check_export_dir(self.layout, self._export_dir, overwrite=self.options.overwrite)

    def _calibrate_early(self, result: Any) -> None:  # noqa: ARG002 - of the method after which this is called
        with before_optimizers(is_needed=self._config.has_ranks_from_data):  # else `check_fit` tries again, with them
            self._calibrate()

    def _calibrate(self) -> None:
        """Compute the starts that adapters wait for; those of a checkpoint have theirs."""
        model = AdaptedModel(self.module)
        if not any(adapter.is_waiting for adapter in model.adapters.values()):
            return
        record, start = get_attachment(self.module), self._config.start
        rank_zero_info(f"{calibrate_fit(self.trainer, self.module, start.name, start.batches, self.part)}")
        now = get_attachment(self.module)
        if now is not None and now is not record:  # with the ranks that the data ask for
            self.layout.attached(self.module)
            self._coverage = hints.coverage(self.module)
            for average in callbacks_of(self.trainer, *AVERAGING):  # their copies have the ranks of before
                average.setup(self.trainer, self.module, "fit")
            rank_zero_info(f"{now.report}")

    # --- training

    def _repair_optimizers(self, configured: Any) -> None:
        """Give the adapters to the optimizers that ``configure_optimizers`` has returned, and take the base away."""
        optimizers, schedulers = unpack_configured(configured)
        if not optimizers:
            return
        try:
            ratio, fresh = self.options.lr_ratio, self.options.fresh
            repair_optimizers(self.module, optimizers, schedulers, lr_ratio=ratio, fresh=fresh)
        except ValueError as error:
            raise MisconfigurationException(str(error)) from error
        self.layout.configured(self.module, optimizers)
        for index, optimizer in enumerate(optimizers):
            if not any(group["params"] for group in optimizer.param_groups):
                rank_zero_warn(
                    f"LoRA: optimizer {index} ({type(optimizer).__name__}) no longer holds a trainable parameter: "
                    "everything it trained is frozen and has no adapter. modules_to_save trains modules in full."
                )

    def check_fit(self) -> None:
        """Check that exactly what was asked for will train."""
        self._buffers.renew()  # anew, since a precision may have converted the module
        if self._export_dir is not None and not self._is_trial:
            export.check_export_place(self.layout, self._export_dir, self.trainer)  # callbacks know their folders now
        if not (chosen_checkpoint(self.trainer) and self.trainer.strategy.restore_checkpoint_after_setup):
            self._calibrate()
        self._averages.enter_context(frozen_kept(callbacks_of(self.trainer, *AVERAGING)))
        freeze_norms(self.module)  # sync_batchnorm makes new norm layers
        optimizers, ratio = self.trainer.optimizers, self.options.lr_ratio
        check_before_training(self.module, self.layout, optimizers)
        check_allowed(self.options.allow_untrained, AdaptedModel(self.module))
        log_options(self.trainer, self.module)
        schedulers = [config.scheduler for config in self.trainer.lr_scheduler_configs]
        hints.warn_of_suspicious_settings(self.module, optimizers, schedulers, ratio, self._coverage)

    def start_training(self, together: Collection[str] = ()) -> None:
        """Begin the checks and measurements of a training; a tuner's training comes before the real one.

        Args:
            together: The adapters that train at once, if it is not the active one alone.
        """
        if any(adapter.is_waiting for adapter in AdaptedModel(self.module).adapters.values()):
            strategy = type(self.trainer.strategy).__name__
            raise MisconfigurationException(
                f"LoRACallback: init={self._config.start.name!r} cannot be computed here, because the base's weights "
                f"come from ckpt_path after {strategy} has divided them. Load them in __init__ or configure_model, or "
                "use init='kaiming'."
            )
        before, self._held = self._checkpoints.untrained, None
        reached = set() if before is None else AdaptedModel(self.module).adapters.keys() - before()
        self.gradients = GradientCheck(self.module, self.layout, self.options.allow_untrained, reached)
        self._checkpoints.untrained = self.gradients.untrained
        self._others.enter_context(nullcontext() if together else others_frozen(self.module))  # of hooks, too
        self._buffers.start_training(together)
        if interval := self.options.diagnostics_every_n_steps:
            self.diagnostics = FitDiagnostics(interval, self.trainer, self.module)
        if self._schedule is not None and not self._is_trial:
            self._start_schedule(self._schedule)

    def _start_schedule(self, schedule: RankSchedule) -> None:
        if self.ranks is not None:
            self.ranks.close()
        record = get_attachment(self.module)
        asked = self.options.config if record is None or record.asked is None else record.asked
        self.ranks = FitRanks(schedule, asked, self.trainer, self.module, self._checkpoints.loaded_ranks)
        self._checkpoints.ranks = self.ranks.state

    def begin_batch(self, batch: Any, batch_idx: int) -> None:
        """Before each batch, check that the adapters are still there; before the first, probe them if asked to."""
        if self._held is not None:
            self._checkpoints.check_late()
            self._held.check(self.trainer.optimizers)
            self._ratio.check()
            if batch_idx == 0:
                self.reads.begin()
            return
        self._held = HeldAdapters(self.module, self.trainer.optimizers)
        ratio = 1.0 if callbacks_of(self.trainer, LearningRateFinder) else self.options.lr_ratio  # it sets one rate
        self._ratio = hints.RatioWatch(self.module, self.trainer.optimizers, ratio)
        self._checkpoints.note_base()
        check_same_adapters(self.module)
        check_unchanged(AdaptedModel(self.module), self.layout, self.trainer.optimizers)
        hints.warn_of_eval_mode(self.module)  # here, as hooks of the module may set modes until now
        if self.options.probe:
            probe_adapters(self.module, batch)
        self.gradients.watch(self.reads.begin(is_first=True))

    def end_batch(self, outputs: Any) -> None:
        """After each batch, record its gradients and its loss."""
        self.gradients.after_batch(outputs)
        if not self.gradients.awaits_step:
            self.reads.end()

    def succeed(self) -> None:
        """Record a successful fit; raise if it trained nothing, not all that was named, or to no number."""
        with self._checkpoints.as_trained():  # hooks may have left another adapter in place
            self._succeed()

    def _succeed(self) -> None:
        check_finite(self.layout, self.module, self.gradients.broken_at())
        self.gradients.finish()
        has_moved, options = self.gradients.has_moved(), self.options
        awaited = (options.export_dir is not None or options.merge_on_teardown) and not self._is_trial
        self._has_succeeded = check_trained(self.layout, self.trainer, self.module, has_moved, is_awaited=awaited)
        hints.warn_of_unfrozen(self.module)
        if self.ranks is not None:
            self.ranks.succeed()
        tell_of_moved_buffers(self.module)

    def close(self) -> None:
        """Remove every wrap, hook and request from the module."""
        self.has_values = self._held is not None or self._checkpoints.has_loaded or self._has_start  # trained, or read
        self._checkpoints.end_run()
        self._buffers.close()
        self._wraps.remove()
        self._bare.close()
        self._others.close()
        self._averages.close()
        self.reads.close()
        if self.ranks is not None:
            self.ranks.close()
        self._load_hooks.close()
        request(self.module, None)

    def finish(self) -> None:
        """Export and merge the adapters of a successful fit, if asked to."""
        with self._checkpoints.as_trained():
            self._finish()

    def _finish(self) -> None:
        if not self._has_succeeded:
            return
        if self._is_trial:
            rank_zero_info("LoRA: a fast dev run exports and merges nothing.")
            return
        named = f" {active_adapter(self.module)!r}" if len(adapter_names(self.module)) > 1 else ""
        if (directory := self._export_dir) is not None:
            among = self._checkpoints.saved if self._is_new and not self._checkpoints.has_loaded else None
            best = export.export_best(self.layout, self.trainer, directory, among, overwrite=self.options.overwrite)
            rank_zero_info(f"LoRA: adapter{named} exported to {directory} ({best or 'last state'}).")
        if self.ranks is not None and not self.layout.divides_weights:
            self.ranks.compact(self.module)
            self._checkpoints.ranks = None
        if self.options.merge_on_teardown:
            merge(self.module, active_adapter(self.module), whole=self.layout.gathered_layer)
            rank_zero_info(f"LoRA: adapter{named} merged into the weights.")
