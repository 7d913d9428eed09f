"""Which layout belongs to which of Lightning's strategies: chosen once."""

from __future__ import annotations

from lightning.pytorch.strategies import (
    DDPStrategy,
    DeepSpeedStrategy,
    FSDPStrategy,
    ModelParallelStrategy,
    SingleDeviceStrategy,
    Strategy,
)
from lightning.pytorch.strategies.launchers.multiprocessing import _MultiProcessingLauncher

from lightning_lora.trainer.import_names import with_twins
from lightning_lora.trainer.strategies.base import Layout
from lightning_lora.trainer.strategies.deepspeed import DeepSpeedLayout
from lightning_lora.trainer.strategies.fsdp import FSDPLayout
from lightning_lora.trainer.strategies.model_parallel import ModelParallelLayout


def layout_of(strategy: Strategy) -> Layout:
    """Return the layout of a strategy, and prepare the strategy for adapters.

    Raises:
        NotImplementedError: The strategy is not supported, or not as it is set up.
    """
    for known, kind in reversed(_SUPPORTED.items()):  # DeepSpeedStrategy is a DDPStrategy, too
        if isinstance(strategy, with_twins(known)):
            layout = kind(strategy)
            layout.prepare()
            return layout
    others = [kind.__name__ for kind in _SUPPORTED if kind is not SingleDeviceStrategy]
    raise NotImplementedError(
        f"LoRACallback does not support {type(strategy).__name__} yet. Supported are a single device and "
        f"{', '.join(others)}."
    )


def lost_training(strategy: Strategy) -> str | None:
    """Return why training a module without adapters would be lost, or None; ``ddp_spawn`` trains copies of it."""
    if not isinstance(strategy.launcher, with_twins(_MultiProcessingLauncher)):
        return None
    return (
        "With this launcher (spawn, fork or a notebook's) the adapters would exist in the workers only and be lost. "
        "Call lightning_lora.attach(model, callback.config) before trainer.fit, or use strategy='ddp'."
    )


_SUPPORTED: dict[type[Strategy], type[Layout]] = {
    SingleDeviceStrategy: Layout,
    DDPStrategy: Layout,
    FSDPStrategy: FSDPLayout,
    ModelParallelStrategy: ModelParallelLayout,
    DeepSpeedStrategy: DeepSpeedLayout,
}
