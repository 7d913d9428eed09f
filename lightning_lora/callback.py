"""The Lightning callback: connects the hooks to the code in ``trainer/``."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any, ClassVar, Literal

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from torch.optim import Optimizer
from typing_extensions import override

from lightning_lora.config import (
    OPTIONS,
    LoRAConfig,
    NonNegativeInt,
    PositiveFloat,
    only_config,
    shown_options,
)
from lightning_lora.named_adapters import active_adapter, adapter_names, check_name
from lightning_lora.option_checks import check_choice, check_known, check_names, check_positive
from lightning_lora.ranks.schedule import Kind, RankSchedule, as_schedule
from lightning_lora.trainer import checks, lightning_patches, outcome
from lightning_lora.trainer.checkpoints import install_adapter_checkpoints
from lightning_lora.trainer.diagnostics import check_interval
from lightning_lora.trainer.hints import explain_torch_error
from lightning_lora.trainer.session import FitSession
from lightning_lora.trainer.signature import config_among, explain_names, signature_of

lightning_patches.install()


class LoRACallback(Callback):
    """Fine-tunes any LightningModule with LoRA: add it to the Trainer's callbacks.

    It attaches adapters to the configured layers at the right moment, freezes everything else, gives the optimizers
    only the adapter parameters, saves and loads checkpoints that hold only the adapter, and checks that every adapter
    really trains.

    Args:
        config: The options of ``LoRAConfig`` as one value, instead of giving them one by one.
        adapter: Name of the adapter to train, beside others that the module has; they stay as they are, bit for bit. By
            default the active one is trained, or the only one.
        save_adapters: What a checkpoint holds: the adapter that is ``"trained"``, or ``"all"``; resuming restores them.
        merge_on_teardown: When a fit has succeeded, fold the adapters of its last step into the weights, and leave an
            ordinary model; ``export_dir`` still writes the best checkpoint's. A fast dev run merges nothing.
        export_dir: Where to write the adapter as a PEFT directory when a fit has succeeded: the best checkpoint's, if
            a ModelCheckpoint kept one, else the last state. A fast dev run writes nothing.
        overwrite: Let ``export_dir`` replace an adapter that is there; otherwise one there is an error before training.
        init_from: A ``.ckpt`` of a LoRACallback run or a PEFT directory to start from, unless training resumes a
            checkpoint; of several adapters, the one called ``adapter``, or, if there is none, the one that was
            trained. Ranks may have grown, layers may have been added or removed; the log says what happened. If the
            module has an adapter that has learned something else, that is an error, unless ``fresh`` is set.
        fresh: Start every fit that resumes no checkpoint as on a new module, with adapters of the seed that
            ``seed_everything`` has set. Without it, a second fit continues from the adapters of the first. Wrong
            options are found before the adapters of the first are removed; an error in the module's own hooks is not.
        check_base: Reject a base whose values differ from those the adapter was trained on; the same values in another
            precision are accepted.
        probe: Prove on the first training batch that every adapter changes what ``forward`` returns for it, in training
            and in evaluation; costs a few passes.
        allow_untrained: Names or globs of adapters that may finish the fit without receiving a gradient. Without it, a
            fit raises if gradients reached no adapter, or not all that were named as targets, and warns of others.
        lr_ratio: Learning rate of ``B`` over that of ``A`` (LoRA+, Hayou et al. 2024, who recommend about 16); 1 means
            plain LoRA.
        diagnostics_every_n_steps: Log every so many steps, for each group of layers (``q_proj``), the norm of the
            update over the weight's, those of the gradients of ``A`` and ``B``, the effective rank, and the share of
            the rank that is dead. 0 or None, the default, costs nothing.
        rank_schedule: Let the rank of each layer follow its need in training, with ``rank`` as the average in the end:
            ``"cubic"``, or a mapping with options of ``RankSchedule`` such as ``{"max_rank": 12, "score": "energy"}``.
        **lora: The options of ``LoRAConfig``.

    Raises:
        TypeError: An option has the wrong type or is unknown, or options are given beside ``config``.
        ValueError: An option has an invalid value.

    Example:
        >>> from lightning_lora import LoRACallback
        >>> LoRACallback(rank=8, target_modules=["q_proj", "v_proj"]).config.rank
        8
    """

    __signature__: ClassVar[inspect.Signature | None]

    def __init__(
        self,
        _config: LoRAConfig | None = None,  # shown as ``config``; a command line has its options one by one
        *,
        adapter: str | None = None,
        save_adapters: Literal["trained", "all"] = "trained",
        merge_on_teardown: bool = False,
        export_dir: str | None = None,
        overwrite: bool = False,
        init_from: str | None = None,
        fresh: bool = False,
        check_base: bool = True,
        probe: bool = False,
        allow_untrained: Sequence[str] = (),
        lr_ratio: PositiveFloat = 1.0,
        diagnostics_every_n_steps: NonNegativeInt | None = None,
        rank_schedule: Kind | RankSchedule | None = None,
        **lora: Any,
    ) -> None:
        config = config_among(lora, _config)
        check_known("LoRACallback", lora, {*OPTIONS, *_OWN_OPTIONS})
        self.config = LoRAConfig(**lora)
        if config is not None:
            self.config = only_config(config, self.config, lora)
        check_positive("LoRACallback.lr_ratio", lr_ratio)
        check_interval(diagnostics_every_n_steps)
        self.allow_untrained = check_names("LoRACallback.allow_untrained", allow_untrained)
        if adapter is not None:
            check_name(adapter)
        self.adapter, self.merge_on_teardown = adapter, merge_on_teardown
        self.save_adapters = check_choice("LoRACallback.save_adapters", save_adapters, of=Literal["trained", "all"])
        self.export_dir, self.overwrite, self.init_from = export_dir, overwrite, init_from
        self.fresh, self.check_base, self.probe = fresh, check_base, probe
        self.lr_ratio, self.diagnostics_every_n_steps = float(lr_ratio), diagnostics_every_n_steps
        self.rank_schedule = as_schedule(rank_schedule)
        if self.rank_schedule is not None:
            self.rank_schedule.widened(self.config)  # raises if they do not go together
        self._session: FitSession | None = None
        self._ranks: dict[str, int] = {}
        self._was: tuple[str | None, list[str]] = None, []  # the adapters of the module before this run

    @override
    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        if "__init__" in vars(cls):
            cls.__signature__ = None  # it has one of its own

    @override
    def __repr__(self) -> str:
        own = {name: getattr(self, name) for name, default in _OWN_OPTIONS.items() if getattr(self, name) != default}
        return f"{type(self).__name__}({shown_options(self.config.changed() | own)})"

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Called when fit, validate, test or predict begins: attach, or arrange to attach once the layers exist."""
        self._close()
        checks.check_import_names(trainer, pl_module, self)
        checks.check_other_callbacks(trainer, self)
        is_fit = stage == TrainerFn.FITTING
        if is_fit:
            checks.check_launcher(trainer.strategy, pl_module, self.adapter, merges=self.merge_on_teardown)
        self._was = active_adapter(pl_module), adapter_names(pl_module)
        self._session = FitSession(self, trainer, pl_module, is_fit=is_fit)
        self._session.attach()

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Called when fit begins, after the optimizers exist: check that exactly what was asked for will train."""
        self._run.check_fit()

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Called when training begins."""
        self._run.start_training()

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Called before each training batch: at the first one, check that the adapters are as they were attached."""
        self._run.begin_batch(batch, batch_idx)

    @override
    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Called after each backward pass: with manual optimization, note which adapters it reaches."""
        self._run.gradients.after_backward()

    @override
    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Called before each optimizer step: note which adapters gradients reach, and name those that none reached."""
        self._run.gradients.before_step(optimizer)
        if self._run.diagnostics is not None:
            self._run.diagnostics.before_step(optimizer)
        if self._run.ranks is not None:
            self._run.ranks.controller.before_step(optimizer)

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Called after each batch: log diagnostics, and record gradients, and losses of manual optimization."""
        if self._run.diagnostics is not None:
            self._run.diagnostics.after_batch()
        if self._run.ranks is not None:
            self._run.ranks.after_batch()
        self._run.end_batch(outputs)

    @override
    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Called when validation begins: outside of a fit, warn of untrained adapters."""
        if trainer.state.fn != TrainerFn.FITTING:
            outcome.warn_if_untrained(self._run.layout, pl_module)

    @override
    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Called when testing begins."""
        outcome.warn_if_untrained(self._run.layout, pl_module)

    @override
    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Called when predicting begins."""
        outcome.warn_if_untrained(self._run.layout, pl_module)

    @override
    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Called when fit has succeeded, not after an exception or a tuner alone."""
        self._run.succeed()

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Called when a stage ends: remove all wrappers from the module; after a fit, export and merge if asked to."""
        if (session := self._close()) is not None:
            session.finish()

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Called when a stage fails: what has trained stays, since checkpoints of the exception are written later."""
        checks.explain_mixed_import_names(exception, trainer, pl_module, self)
        explain_torch_error(exception, pl_module)
        session = self._close()
        if session is not None and not session.has_values:
            outcome.take_back(pl_module, self._was)

    def ranks(self) -> dict[str, int]:
        """Return the rank of each adapter in use, as ``rank_schedule`` has decided last; empty without one."""
        now = self._session and self._session.ranks
        return now.controller.ranks() if now else dict(self._ranks)

    def _prepare_saving(self, trainer: Trainer) -> None:
        """Save adapters alone also where no stage has run, as in the main process of ``ddp_spawn``."""
        module = trainer.strategy._lightning_module
        if module is not None and adapter_names(module):
            install_adapter_checkpoints(trainer.strategy)

    @property
    def _run(self) -> FitSession:
        assert self._session is not None, "LoRACallback.setup was not called"
        return self._session

    def _close(self) -> FitSession | None:
        """End the run, if there is one, and return it."""
        self._ranks = self.ranks()
        session, self._session = self._session, None
        if session is not None:
            session.close()
        return session


_OWN_OPTIONS = dict(LoRACallback.__init__.__kwdefaults__ or {})


# Of the class alone: LightningCLI reads the one of __init__, whose ``**lora`` leads it to the explanations.
LoRACallback.__signature__ = signature_of(LoRACallback)
lightning_patches.derive_from_both(LoRACallback)
lightning_patches.explain_options(LoRACallback, lambda names: explain_names(names, _OWN_OPTIONS))
