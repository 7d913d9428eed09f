"""``LoRACallback``: LoRA at the moments that Lightning's hooks give. Each hook calls rooms below; no mathematics."""

from __future__ import annotations

from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.fabric.utilities.rank_zero import rank_zero_info, rank_zero_warn  # type: ignore[attr-defined]
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import LearningRateFinder
from lightning.pytorch.trainer.states import TrainerFn
from torch.optim import Optimizer
from typing_extensions import override

from lightning_lora.attachment import get_attachment, request
from lightning_lora.config import OPTIONS, LoRAConfig, NonNegativeInt, PositiveFloat, check_known, check_positive
from lightning_lora.layers import all_adapters, lora_layers
from lightning_lora.optimizers import repair_optimizers, unpack_configured
from lightning_lora.probe import dead_message
from lightning_lora.sharding import shapes_shown
from lightning_lora.state import allow_missing_base, merges
from lightning_lora.storage.checkpoint import read_checkpoint
from lightning_lora.surgery import freeze_norms
from lightning_lora.trainer import checks, coming_checkpoint
from lightning_lora.trainer import lightning_patches as load_guard
from lightning_lora.trainer.advice import explain
from lightning_lora.trainer.attaching import Attaching
from lightning_lora.trainer.checkpoints import adapter_checkpoints
from lightning_lora.trainer.company import bad_company, copies_of_the_base, has_callback, mixed_names
from lightning_lora.trainer.diagnostics import diagnostics_of
from lightning_lora.trainer.export import export_fit, refused_export
from lightning_lora.trainer.hints import questionable_settings
from lightning_lora.trainer.import_names import overrides, with_twins
from lightning_lora.trainer.method_wraps import MethodWraps
from lightning_lora.trainer.strategies.choice import lost_training
from lightning_lora.trainer.verdicts import as_misconfiguration, judge, refuse, warn
from lightning_lora.trainer.warm_start import start_from

load_guard.install()
coming_checkpoint.install()


class LoRACallback(Callback):
    """Fine-tunes any LightningModule with LoRA: add it to the Trainer's callbacks.

    It attaches adapters to the configured layers at the right moment, freezes everything else, makes the optimizers
    hold the adapter parameters only, saves and loads checkpoints that hold the adapter alone, and checks that every
    adapter really trains.

    Args:
        merge_on_teardown: Fold the adapters into the weights when a fit has succeeded, and leave an ordinary model.
        export_dir: Where to write the adapter as a PEFT directory when a fit has succeeded: that of the best
            checkpoint, if a ModelCheckpoint kept one, else the last state.
        init_from: A ``.ckpt`` of a LoRACallback run or a PEFT directory that training starts from, unless it resumes
            a checkpoint. Ranks may be higher than there, and layers may come or go; what happened is logged.
        check_base: Refuse to load an adapter into a base whose values are not those that it was trained on; another
            precision of the same is none.
        probe: Prove on the first training batch that every adapter changes what ``forward`` returns for it, in training
            and in evaluation; costs a few passes.
        lr_ratio: Learning rate of ``B`` over that of ``A`` (LoRA+, Hayou et al. 2024, who recommend about 16); 1 means
            plain LoRA.
        diagnostics_every_n_steps: Log every so many steps, for each group of layers (``q_proj``), the norm of the
            update over the weight's, the norms of the gradients of ``A`` and ``B``, the effective rank, and the share
            of the rank that is dead. 0 or None, the default, costs nothing.
        **lora: The options of ``LoRAConfig``.

    Raises:
        TypeError: An option has the wrong type.
        ValueError: An option has a value that makes no sense.

    Example:
        >>> from lightning_lora import LoRACallback
        >>> LoRACallback(rank=8, target_modules=["q_proj", "v_proj"]).config.rank
        8
    """

    def __init__(
        self,
        *,
        merge_on_teardown: bool = False,
        export_dir: str | None = None,
        init_from: str | None = None,
        check_base: bool = True,
        probe: bool = False,
        lr_ratio: PositiveFloat = 1.0,
        diagnostics_every_n_steps: NonNegativeInt | None = None,
        **lora: Any,
    ) -> None:
        check_known("LoRACallback", lora, {*OPTIONS, *(LoRACallback.__init__.__kwdefaults__ or ())})
        self.config = LoRAConfig(**lora)
        check_positive("LoRACallback.lr_ratio", lr_ratio)
        self.merge_on_teardown = merge_on_teardown
        self.export_dir, self.init_from = export_dir, init_from
        self.check_base, self.probe = check_base, probe
        self.lr_ratio = float(lr_ratio)
        self.diagnostics_every_n_steps = diagnostics_every_n_steps
        self._diagnostics = diagnostics_of(diagnostics_every_n_steps)
        self._attaching = Attaching(self._start)
        self._wraps = MethodWraps()
        self._load_hook: Any = None
        self._fit_succeeded = False
        self._probed = False
        self._checked_optimizers: set[int] = set()
        self._reached: set[str] | None = None

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Called when fit, validate, test or predict begins: attach, or arrange to attach once the layers exist."""
        self._unhook()
        self._fit_succeeded = False
        refuse(mixed_names(trainer, pl_module, self))
        refuse(bad_company(trainer, self))
        if message := copies_of_the_base(trainer):
            rank_zero_info(message)
        if stage == TrainerFn.FITTING and get_attachment(pl_module) is None:
            refuse(lost_training(trainer.strategy))
        with as_misconfiguration():
            checkpoints = adapter_checkpoints(trainer.strategy)
        self._layout, checkpoints.check_base = checkpoints.layout, self.check_base
        self._layout.when_wrapping = None
        self._load_hook = pl_module.register_load_state_dict_post_hook(  # type: ignore[no-untyped-call]
            allow_missing_base
        )
        if stage == TrainerFn.FITTING:
            refuse(self._layout.refused_training())
            if self._diagnostics is not None:
                refuse(self._layout.refused_diagnostics())
            self._wraps.after(pl_module, "configure_optimizers", self._repair_configured)
        elif merges(pl_module) and not lora_layers(pl_module):
            return  # evaluating a merged model: the adapter is in its weights
        self._attaching.arrange(trainer, pl_module, self.config, self._layout, self._wraps)

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Called when fit begins, after the optimizers exist: check that what will train is what was asked for."""
        freeze_norms(pl_module)  # sync_batchnorm makes new norm layers
        if get_attachment(pl_module) is None:
            raise MisconfigurationException("LoRACallback attached nothing to this module before fit began.")
        refuse(checks.replaced_layers(pl_module))
        refuse(checks.undeclared_training(pl_module))
        warn(checks.fragile_factors(pl_module))
        unheld = checks.unheld_parameters(pl_module, self._layout.as_configured(trainer.optimizers))
        if pl_module.automatic_optimization:
            refuse(unheld)
        else:
            warn(unheld)  # the module may step an optimizer that Lightning does not know
        schedulers = [config.scheduler for config in trainer.lr_scheduler_configs]
        warn(questionable_settings(pl_module, trainer.optimizers, schedulers, self.lr_ratio, self._attaching.coverage))

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Called when training begins."""
        self._checked_optimizers.clear()
        self._reached = None
        self._probed = False
        if self._diagnostics is not None:
            self._diagnostics.start(trainer, pl_module)
        if self.lr_ratio != 1.0 and has_callback(trainer, LearningRateFinder):
            rank_zero_warn(
                "LearningRateFinder gives every parameter group the same learning rate, so "
                f"lr_ratio={self.lr_ratio} has no effect. Find the rate without lr_ratio first."
            )

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Called before each training batch: at the first one, prove that every adapter has an effect, if asked to."""
        if self.probe and not self._probed:
            self._probed = True
            if not overrides(pl_module, "forward"):
                raise MisconfigurationException(
                    f"LoRACallback.probe=True calls {type(pl_module).__name__}.forward with the first batch, but there "
                    "is none. Define forward, or leave probe out."
                )
            refuse(dead_message(pl_module, batch))

    @override
    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Called after each backward pass: with manual optimization, note what the first batch reaches."""
        if not pl_module.automatic_optimization and not self._checked_optimizers:
            self._reached = (self._reached or set()) | self._layout.reached()

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Called after each batch: log diagnostics; judge the first one, if it was stepped past Lightning."""
        if self._diagnostics is not None:
            self._diagnostics.after_batch(trainer, pl_module)
        if self._reached is not None and not self._checked_optimizers:
            self._checked_optimizers.add(0)
            judge(*checks.unreached_message(list(all_adapters(pl_module)), self._reached))

    @override
    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Called before each optimizer step: at the first one, name the adapters that no gradient reached."""
        if id(optimizer) not in self._checked_optimizers:
            self._checked_optimizers.add(id(optimizer))
            [stand_in] = self._layout.as_configured([optimizer])
            judge(*checks.unreached_message(checks.held_adapters(pl_module, stand_in), self._layout.reached()))
        if self._diagnostics is not None:
            self._diagnostics.before_step(trainer, optimizer)

    @override
    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Called when validation begins."""
        if trainer.state.fn != TrainerFn.FITTING:
            self._warn_of_untrained(pl_module)

    @override
    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Called when testing begins."""
        if trainer.state.fn != TrainerFn.FITTING:
            self._warn_of_untrained(pl_module)

    @override
    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Called when predicting begins."""
        if trainer.state.fn != TrainerFn.FITTING:
            self._warn_of_untrained(pl_module)

    @override
    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Called when fit has succeeded, not after an exception or a tuner alone: unless it trained nothing."""
        is_idle = 0 in (trainer.max_steps, trainer.max_epochs, trainer.limit_train_batches)
        device = trainer.strategy.root_device
        with self._layout.at_hand():
            judge(*checks.untrained_fit(pl_module, device, trainer.global_step, is_wanted=is_idle))
        self._fit_succeeded = True

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Called when a stage ends: merge if asked to, and take every wrap off the module."""
        self._unhook()
        request(pl_module, None)
        if self.export_dir is not None and self._fit_succeeded:
            self._export(trainer, pl_module)
        if self.merge_on_teardown and self._fit_succeeded:
            self._layout.merge()
            rank_zero_info("LoRA: adapters merged into the weights.")

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Called when a stage fails: adapters stay, since checkpoints of the exception are written after this."""
        explain(exception, pl_module, mixed_names(trainer, pl_module, self))
        self._unhook()
        request(pl_module, None)

    # --- parts

    def _start(self, pl_module: LightningModule) -> None:
        """Start from another adapter, and refuse now what could not be exported later."""
        trainer = pl_module.trainer
        if self.init_from is not None and coming_checkpoint.path_of(trainer) is None:
            with self._layout.at_hand():
                start = start_from(pl_module, self.init_from, check_base=self.check_base)
            rank_zero_info(f"LoRA: started from {self.init_from}: {start}")
        if self.export_dir is not None and trainer.state.fn == TrainerFn.FITTING:
            refuse(self._layout.refused_export(pl_module))
            with self._layout.at_hand(), shapes_shown(pl_module):
                refuse(refused_export(pl_module))

    def _export(self, trainer: Trainer, pl_module: LightningModule) -> None:
        checkpoint = getattr(trainer.checkpoint_callback, "best_model_path", None)
        state, base = {} if checkpoint else self._layout.trained(), self._layout.fingerprint()
        if trainer.is_global_zero:
            state = read_checkpoint(checkpoint)[1] if checkpoint else state
            export_fit(pl_module, str(self.export_dir), state, self._layout.hidden_shapes(), base)
            rank_zero_info(f"LoRA: adapter exported to {self.export_dir} ({checkpoint or 'last state'}).")
        trainer.strategy.barrier()

    def _unhook(self) -> None:
        self._wraps.remove()
        if self._diagnostics is not None:
            self._diagnostics.stop()
        if self._load_hook is not None:
            self._load_hook.remove()
            self._load_hook = None

    # --- optimizers

    def _repair_configured(self, pl_module: LightningModule, configured: Any) -> None:
        optimizers, schedulers = unpack_configured(configured)
        if not optimizers:
            return
        try:
            repair_optimizers(pl_module, optimizers, schedulers, lr_ratio=self.lr_ratio)
        except ValueError as error:
            raise MisconfigurationException(str(error)) from error
        with as_misconfiguration():
            self._layout.configured(pl_module, optimizers)
        for index, optimizer in enumerate(optimizers):
            if not any(group["params"] for group in optimizer.param_groups):
                rank_zero_warn(
                    f"LoRA: optimizer {index} ({type(optimizer).__name__}) holds no trainable parameter now: "
                    "what it trained is frozen and has no adapter. modules_to_save trains modules in full."
                )

    # --- checks

    def _warn_of_untrained(self, pl_module: LightningModule) -> None:
        with self._layout.at_hand():
            warn(checks.untrained_adapters(pl_module, self._layout.strategy.root_device))


# The command line of pytorch_lightning takes callbacks of its own make only; it has been imported before this then.
LoRACallback.__bases__ = with_twins(Callback)
