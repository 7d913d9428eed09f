"""When diagnostics are measured during a fit, and how they reach the loggers."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lightning.fabric.utilities.rank_zero import rank_zero_info  # type: ignore[attr-defined]
from lightning.pytorch import LightningModule, Trainer
from torch.optim import Optimizer

from lightning_lora.names import listed
from lightning_lora.trainer.verdicts import refuse

if TYPE_CHECKING:
    from lightning_lora.analysis.diagnostics import Diagnostics

PREFIX = "lora"


class FitDiagnostics:
    """Every so many steps, measures the adapters and logs the numbers as the module would.

    Steps are those of the loggers, one for each batch after which an optimizer was stepped: ``_batches_that_stepped``
    counts them, as Lightning's own LearningRateMonitor does, and a checkpoint keeps it. Where a module steps its
    optimizers itself, the first batch with a step when the time has come is measured; if it does so past Lightning,
    without gradients. Gradients are those that the optimizer is about to use, accumulated, averaged over processes,
    unscaled and not yet clipped; the updates are those after the step.

    Args:
        every_n_steps: Steps between two measurements.
    """

    def __init__(self, every_n_steps: int) -> None:
        self.every_n_steps = every_n_steps
        self._diagnostics: Diagnostics | None = None
        self._is_noted = False
        self._periods = 0  # that were measured

    def start(self, trainer: Trainer, module: LightningModule) -> None:
        """Take the norms of the weights, and refuse what would measure or log nothing."""
        from lightning_lora.analysis.diagnostics import Diagnostics  # takes as long to import as all the rest

        option = f"diagnostics_every_n_steps={self.every_n_steps}"
        if trainer.barebones:
            refuse(f"{option}: a Trainer with barebones=True logs nothing. Leave one of them out.")
        self._diagnostics = Diagnostics(module)
        if not self._diagnostics.watched:
            refuse(f"{option}: there is no low-rank adapter to measure. Leave it out.")
        if unknown := self._diagnostics.unknown_weights:
            rank_zero_info(f"LoRA: no update_over_weight for {listed(unknown)}: their weights are quantized.")
        self._is_noted, self._periods = False, self._steps(trainer) // self.every_n_steps

    def before_step(self, trainer: Trainer, optimizer: Optimizer) -> None:
        """Note the gradients, if the time has come."""
        if self._diagnostics is not None and (self._steps(trainer) + 1) // self.every_n_steps > self._periods:
            self._diagnostics.note_gradients(optimizer)
            self._is_noted = True

    def after_batch(self, trainer: Trainer, module: LightningModule) -> None:
        """Log what was measured, once for all optimizers that this batch stepped."""
        periods = (self._steps(trainer) + 1) // self.every_n_steps
        is_past_lightning = not module.automatic_optimization and trainer.global_step == 0
        is_due = self._is_noted or (is_past_lightning and periods > self._periods)
        if self._diagnostics is None or not is_due:
            return
        self._is_noted, self._periods = False, periods
        metrics = {f"{PREFIX}/{name}": value for name, value in self._diagnostics.metrics().items()}
        # All processes have computed the same numbers, so none need to travel.
        module.log_dict(metrics, on_step=True, on_epoch=False, batch_size=1)

    def stop(self) -> None:
        """Let the module go."""
        self._diagnostics = None

    @staticmethod
    def _steps(trainer: Trainer) -> int:
        return trainer.fit_loop.epoch_loop._batches_that_stepped


def diagnostics_of(every_n_steps: object) -> FitDiagnostics | None:
    """Return what the callback's option asks for, or None if it is off.

    Raises:
        TypeError: The option is no integer.
        ValueError: It is negative.
    """
    if every_n_steps is None:
        return None
    option = "LoRACallback.diagnostics_every_n_steps"
    if not isinstance(every_n_steps, int) or isinstance(every_n_steps, bool):
        raise TypeError(f"{option} must be an integer or None, got {every_n_steps!r}.")
    if every_n_steps < 0:
        raise ValueError(f"{option} must be >= 0, got {every_n_steps!r}; 0 switches it off.")
    return FitDiagnostics(every_n_steps) if every_n_steps else None
