"""The differences between Lightning's strategies: one ``Layout`` each, chosen here."""

from __future__ import annotations

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.strategies import (
    DDPStrategy,
    DeepSpeedStrategy,
    FSDPStrategy,
    ModelParallelStrategy,
    SingleDeviceStrategy,
    Strategy,
)

from lightning_lora.trainer.lightning_patches import with_twins
from lightning_lora.trainer.strategies.base import Layout, ModelParallelLayout
from lightning_lora.trainer.strategies.deepspeed import DeepSpeedLayout
from lightning_lora.trainer.strategies.fsdp import FSDPLayout

# A subclass comes after its base class: `layout_of` takes the last entry that fits.
_SUPPORTED: dict[type[Strategy], type[Layout]] = {
    SingleDeviceStrategy: Layout,
    DDPStrategy: Layout,
    FSDPStrategy: FSDPLayout,
    ModelParallelStrategy: ModelParallelLayout,
    DeepSpeedStrategy: DeepSpeedLayout,
}


def layout_of(strategy: Strategy) -> Layout:
    """Return the layout of a strategy, and prepare the strategy for adapters.

    Raises:
        MisconfigurationException: The strategy is not supported, or not with these settings.
    """
    for known, kind in reversed(_SUPPORTED.items()):
        if isinstance(strategy, with_twins(known)):
            return kind(strategy)
    others = [kind.__name__ for kind in _SUPPORTED if kind is not SingleDeviceStrategy]
    raise MisconfigurationException(
        f"LoRACallback does not support {type(strategy).__name__} yet. Supported are a single device and "
        f"{', '.join(others)}."
    )
