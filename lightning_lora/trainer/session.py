"""One run of ``LoRACallback``, from ``setup`` to ``teardown``."""

from __future__ import annotations

from typing import Any, Protocol

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.fabric.utilities.rank_zero import rank_zero_info, rank_zero_warn  # type: ignore[attr-defined]
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import LearningRateFinder

from lightning_lora.attachment import request
from lightning_lora.config import LoRAConfig
from lightning_lora.optimizers import repair_optimizers, unpack_configured
from lightning_lora.probe import DeadAdapterError, refuse_dead_adapters
from lightning_lora.state import allow_missing_base
from lightning_lora.surgery import freeze_norms, merge
from lightning_lora.trainer.attaching import Attaching, MethodWraps
from lightning_lora.trainer.checkpoints import adapter_checkpoints
from lightning_lora.trainer.checks import GradientCheck, check_before_training, check_trained, has_callback
from lightning_lora.trainer.diagnostics import FitDiagnostics
from lightning_lora.trainer.export import check_exportable, export_fit
from lightning_lora.trainer.hints import warn_of_suspicious_settings
from lightning_lora.trainer.lightning_patches import chosen_checkpoint, overrides
from lightning_lora.trainer.strategies.deepspeed import gathered_parameters
from lightning_lora.trainer.warm_start import start_from


class Options(Protocol):
    """The options of a ``LoRACallback`` that a run reads."""

    config: LoRAConfig
    merge_on_teardown: bool
    export_dir: str | None
    init_from: str | None
    check_base: bool
    lr_ratio: float
    diagnostics_every_n_steps: int | None


class FitSession:
    """The state of one run (fit, validate, test or predict), and its steps in the order of Lightning's hooks.

    Attributes:
        layout: How the strategy distributes what is trained.
        gradients: The check of the first step, once training has begun.
        diagnostics: What measures the adapters, once training has begun and if asked for.
        is_probed: Whether the probe has run.

    Args:
        options: The callback.
        trainer: Its Trainer.
        module: The module to adapt; it gets a load hook until ``close``.
        is_fit: Whether the run trains.

    Raises:
        MisconfigurationException: The strategy is not supported, or not with these settings.
    """

    def __init__(self, options: Options, trainer: Trainer, module: LightningModule, *, is_fit: bool) -> None:
        self.options, self.trainer, self.module, self._is_fit = options, trainer, module, is_fit
        checkpoints = adapter_checkpoints(trainer.strategy)
        checkpoints.check_base = options.check_base
        self.layout = checkpoints.layout
        self.gradients: GradientCheck | None = None
        self.diagnostics: FitDiagnostics | None = None
        self.is_probed = False
        self._has_succeeded = False
        self._attaching = Attaching(options.config, self.layout, self._begin, is_fit=is_fit)
        self._wraps = MethodWraps()
        self._load_hook: Any = module.register_load_state_dict_post_hook(  # type: ignore[no-untyped-call]
            allow_missing_base
        )

    def attach(self) -> None:
        """Attach, or arrange to attach once the layers exist; to train, also prepare ``configure_optimizers``."""
        if self._is_fit:
            self.layout.check_fit(with_diagnostics=bool(self.options.diagnostics_every_n_steps))
            self._wraps.after(self.module, "configure_optimizers", self._repair_optimizers)
        self._attaching.arrange(self.trainer, self.module, self._wraps)

    def _begin(self, module: LightningModule) -> None:
        """Start from another adapter, and refuse what could not be exported later."""
        path = self.options.init_from
        if path is not None and chosen_checkpoint(self.trainer) is None:
            with gathered_parameters(module):
                start = start_from(module, path, check_base=self.options.check_base)
            rank_zero_info(f"LoRA: started from {path}: {start}")
        if self.options.export_dir is not None and self._is_fit:
            check_exportable(module, self.layout)

    def _repair_optimizers(self, module: LightningModule, configured: Any) -> None:
        """Give the adapters to the optimizers that ``configure_optimizers`` has returned, and take the base away."""
        optimizers, schedulers = unpack_configured(configured)
        if not optimizers:
            return
        try:
            repair_optimizers(module, optimizers, schedulers, lr_ratio=self.options.lr_ratio)
        except ValueError as error:
            raise MisconfigurationException(str(error)) from error
        self.layout.configured(module, optimizers)
        for index, optimizer in enumerate(optimizers):
            if not any(group["params"] for group in optimizer.param_groups):
                rank_zero_warn(
                    f"LoRA: optimizer {index} ({type(optimizer).__name__}) no longer holds a trainable parameter: "
                    "everything it trained is frozen and has no adapter. modules_to_save trains modules in full."
                )

    def check_fit(self) -> None:
        """Check that exactly what was asked for will train."""
        freeze_norms(self.module)  # sync_batchnorm makes new norm layers
        optimizers, ratio = self.trainer.optimizers, self.options.lr_ratio
        check_before_training(self.module, self.layout, optimizers)
        schedulers = [config.scheduler for config in self.trainer.lr_scheduler_configs]
        warn_of_suspicious_settings(self.module, optimizers, schedulers, ratio, self._attaching.coverage)

    def start_training(self) -> None:
        """Begin the checks and measurements of a training; a tuner's training comes before the real one."""
        self.gradients, self.is_probed = GradientCheck(self.module, self.layout), False
        if interval := self.options.diagnostics_every_n_steps:
            self.diagnostics = FitDiagnostics(interval, self.trainer, self.module)
        if self.options.lr_ratio != 1.0 and has_callback(self.trainer, LearningRateFinder):
            rank_zero_warn(
                "LearningRateFinder sets one learning rate for all parameter groups, so "
                f"lr_ratio={self.options.lr_ratio} has no effect. Find the rate without lr_ratio first."
            )

    def probe(self, batch: Any) -> None:
        """Prove on the first batch of a training that every adapter has an effect."""
        if self.is_probed:
            return
        self.is_probed = True
        if not overrides(self.module, "forward"):
            raise MisconfigurationException(
                f"LoRACallback.probe=True calls {type(self.module).__name__}.forward with the first batch, but forward "
                "is not defined. Define it, or leave probe out."
            )
        try:
            refuse_dead_adapters(self.module, batch)
        except DeadAdapterError as error:
            raise MisconfigurationException(str(error)) from error

    def succeed(self) -> None:
        """Record a successful fit; raise if it trained nothing."""
        check_trained(self.layout, self.trainer, self.module)
        self._has_succeeded = True

    def close(self) -> None:
        """Remove every wrap, hook and request from the module."""
        self._wraps.remove()
        self._load_hook.remove()
        request(self.module, None)

    def finish(self) -> None:
        """Export and merge the adapters of a successful fit, if asked to."""
        if not self._has_succeeded:
            return
        if (directory := self.options.export_dir) is not None:
            checkpoint = getattr(self.trainer.checkpoint_callback, "best_model_path", None) or None
            export_fit(self.layout, directory, checkpoint)
            rank_zero_info(f"LoRA: adapter exported to {directory} ({checkpoint or 'last state'}).")
            self.trainer.strategy.barrier()
        if self.options.merge_on_teardown:
            merge(self.module, whole=self.layout.gathered_layer)
            rank_zero_info("LoRA: adapters merged into the weights.")
