"""When a module gets its adapters, at once or after what builds its layers; and which, if a checkpoint says so."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from typing import Any

from lightning.fabric.utilities.rank_zero import rank_zero_info  # type: ignore[attr-defined]
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn

from lightning_lora.attachment import get_attachment, request
from lightning_lora.config import LoRAConfig
from lightning_lora.sharding import is_fully_sharded
from lightning_lora.storage.checkpoint import saved_options
from lightning_lora.surgery import attach, detach
from lightning_lora.trainer import coming_checkpoint
from lightning_lora.trainer.company import AVERAGING, has_callback
from lightning_lora.trainer.hints import Coverage, coverage
from lightning_lora.trainer.import_names import overrides
from lightning_lora.trainer.method_wraps import MethodWraps
from lightning_lora.trainer.precision import convert_layers
from lightning_lora.trainer.strategies.base import Layout
from lightning_lora.trainer.verdicts import as_misconfiguration


class Attaching:
    """Attaches what a callback asks for, as late as the module's layers need and as early as the strategy allows.

    Attributes:
        coverage: What ``guidance.coverage`` said when the module was whole: FSDP hides sizes.

    Args:
        begun: Called with the module when its adapters are there for the first time.
    """

    def __init__(self, begun: Callable[[LightningModule], None]) -> None:
        self._begun = begun
        self.coverage = Coverage(0, 0, ())

    def arrange(
        self,
        trainer: Trainer,
        module: LightningModule,
        config: LoRAConfig,
        layout: Layout,
        wraps: MethodWraps,
    ) -> None:
        """Attach what is asked for now, or see to it that it happens in time."""
        self._layout, self._is_first = layout, get_attachment(module) is None
        self._config, self._seed = config, _global_seed()
        self._takes_any = trainer.state.fn != TrainerFn.FITTING and config == LoRAConfig()  # nothing was asked for
        if self._takes_any:
            self._ask_as_saved(trainer, module)
        request(module, *self._options(module))  # for attach(self) in configure_model
        if overrides(module, "configure_model"):
            self._layout.when_wrapping = functools.partial(self._attach_before_wrapping, module)
            wraps.after(module, "configure_model", self._attach_after)
        elif overrides(module, "setup") and not has_callback(trainer, *AVERAGING):
            # It may build layers or load base weights. (Averaging callbacks copy the module before it runs.)
            wraps.after(module, "setup", self._attach_after)
        else:
            self._attach(module)

    def _ask_as_saved(self, trainer: Trainer, module: LightningModule) -> None:
        """Ask for what the checkpoint holds that is about to be loaded, if there is one."""
        saved, before = saved_options(coming_checkpoint.record_of(trainer)), get_attachment(module)
        if saved is None:
            return
        if before is not None and before.config == self._config != saved[0] and not _is_wrapped(module):
            detach(module)  # what an earlier stage attached by default
        self._config, self._seed = saved
        rank_zero_info("LoRA: rank, targets and all other options are those of the checkpoint.")

    def _options(self, module: LightningModule) -> tuple[LoRAConfig, int]:
        """Return the config and the seed: those of adapters that are there already, where they may be any."""
        before = get_attachment(module)
        if before is None:
            return self._config, self._seed
        return before.config if self._takes_any else self._config, before.seed

    def _attach_after(self, module: LightningModule, result: Any) -> None:  # noqa: ARG002
        self._attach(module)

    def _attach_before_wrapping(self, module: LightningModule) -> None:
        if get_attachment(module) is None:
            raise RuntimeError(
                f"{type(module).__name__}.configure_model wraps a part of itself before it has adapters, which would "
                "not be synchronised between processes later. Build all layers, call lightning_lora.attach(self), and "
                "wrap then."
            )
        self._attach(module)

    def _attach(self, module: LightningModule) -> None:
        config, seed = self._options(module)
        before = get_attachment(module)
        with as_misconfiguration():
            if (
                before is not None
                and (before.config, before.seed) == (config, seed)
                and self._layout.is_divided(module)
            ):
                self._layout.attached(module)
                return
            convert_layers(module.trainer.precision_plugin, module)
            report = attach(module, config, seed=seed)
            self.coverage = coverage(module)
            self._layout.attached(module)
        if self._is_first:
            self._is_first = False
            rank_zero_info(f"{report}")
            self._begun(module)


def _global_seed() -> int:
    """Return that of ``seed_everything``."""
    return int(os.environ.get("PL_GLOBAL_SEED", "0"))


def _is_wrapped(module: LightningModule) -> bool:
    return any(is_fully_sharded(part) for part in module.modules())
