"""What precision plugins do to the layers of a model, and when."""

from __future__ import annotations

from lightning.pytorch import LightningModule
from lightning.pytorch.plugins.precision import (
    DeepSpeedPrecision,
    FSDPPrecision,
    HalfPrecision,
    MixedPrecision,
    Precision,
)

from lightning_lora.layers import lora_layers
from lightning_lora.names import listed
from lightning_lora.trainer.import_names import with_twins

# What these do can wait, since factors keep their own precision. Float64 cannot: a checkpoint would lose bits before.
_CAN_WAIT = (DeepSpeedPrecision, FSDPPrecision, HalfPrecision, MixedPrecision, Precision)


def convert_layers(plugin: Precision, module: LightningModule) -> None:
    """Let a plugin that replaces layers, as those of bitsandbytes and TransformerEngine do, do so before adapters come.

    Lightning converts later, when the layers carry adapters, and these would be thrown away with them. Such plugins
    leave a converted module alone, so the second time changes nothing.

    Raises:
        NotImplementedError: The plugin replaces layers that carry adapters already. Nothing was changed.
    """
    if type(plugin) in with_twins(*_CAN_WAIT):
        return
    before = [(part, dict(part._modules)) for part in module.modules()]
    adapted = lora_layers(module)
    plugin.convert_module(module)
    there = set(module.modules())
    if lost := [name for name, layer in adapted.items() if layer not in there]:
        for part, children in before:
            part._modules.update(children)
        raise NotImplementedError(
            f"{type(plugin).__name__} replaces {listed(lost)}, which carry adapters already; they would be thrown "
            "away. Leave attaching to LoRACallback, which has the layers replaced first."
        )
