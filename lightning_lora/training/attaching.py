"""When a module gets its adapters: at once, after what builds its layers, or when a checkpoint says which."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Mapping
from typing import Any

from lightning.fabric.utilities.rank_zero import rank_zero_info  # type: ignore[attr-defined]
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn

from lightning_lora.attachment import get_attachment, request
from lightning_lora.checkpoint_file import saved_options
from lightning_lora.config import LoRAConfig
from lightning_lora.surgery import attach, detach
from lightning_lora.training.adapter_checkpoints import AdapterCheckpoints
from lightning_lora.training.company import AVERAGING, has_callback
from lightning_lora.training.guidance import Coverage, coverage
from lightning_lora.training.import_names import overrides
from lightning_lora.training.method_wraps import MethodWraps
from lightning_lora.training.precision import convert_layers
from lightning_lora.training.strategies import is_restored_late
from lightning_lora.training.verdicts import as_misconfiguration


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
        checkpoints: AdapterCheckpoints,
        wraps: MethodWraps,
    ) -> None:
        """Attach what the config asks for now, or see to it that it happens in time."""
        self._config, self._layout, self._is_first = config, checkpoints.layout, get_attachment(module) is None
        request(module, self._config, _seed(module))  # for attach(self) in configure_model
        is_evaluated = trainer.state.fn != TrainerFn.FITTING
        if is_evaluated and self._config == LoRAConfig() and not is_restored_late(trainer.strategy):
            # Nothing was asked for: a checkpoint knows what it holds, and comes before the strategy is set up.
            checkpoints.attach_late = functools.partial(self._attach_as_saved, module)
        elif overrides(module, "configure_model"):
            self._layout.when_wrapping = functools.partial(self._attach_before_wrapping, module)
            wraps.after(module, "configure_model", self._attach_after)
        elif overrides(module, "setup") and not has_callback(trainer, *AVERAGING):
            # It may build layers or load base weights. (Averaging callbacks copy the module before it runs.)
            wraps.after(module, "setup", self._attach_after)
        else:
            self._attach(module, self._config, _seed(module))

    def _attach_after(self, module: LightningModule, result: Any) -> None:  # noqa: ARG002
        self._attach(module, self._config, _seed(module))

    def _attach_before_wrapping(self, module: LightningModule) -> None:
        if get_attachment(module) is None:
            raise RuntimeError(
                f"{type(module).__name__}.configure_model wraps a part of itself before it has adapters, which would "
                "not be synchronised between processes later. Build all layers, call lightning_lora.attach(self), and "
                "wrap then."
            )
        self._attach(module, self._config, _seed(module))

    def _attach_as_saved(self, module: LightningModule, record: Mapping[str, Any] | None) -> None:
        """Attach what a checkpoint holds, else what the module has already, else the default."""
        saved, before = saved_options(record), get_attachment(module)
        if saved is not None and before is not None and before.config == self._config != saved[0]:
            detach(module)  # what configure_model attached by default
        elif saved is None and before is not None:
            saved = before.config, before.seed
        self._attach(module, *(saved or (self._config, _seed(module))))
        if record is not None and saved is not None:
            rank_zero_info("LoRA: rank, targets and all other options are those of the checkpoint.")

    def _attach(self, module: LightningModule, config: LoRAConfig, seed: int) -> None:
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


def _seed(module: LightningModule) -> int:
    """Return the seed of the starts: that of adapters that are there already, else that of ``seed_everything``."""
    before = get_attachment(module)
    return before.seed if before is not None else int(os.environ.get("PL_GLOBAL_SEED", "0"))
