"""Precision plugins that replace layers, which must happen before these carry adapters."""

from __future__ import annotations

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule
from lightning.pytorch.plugins.precision import (
    DeepSpeedPrecision,
    FSDPPrecision,
    HalfPrecision,
    MixedPrecision,
    Precision,
)

from lightning_lora.adapted_model import AdaptedModel
from lightning_lora.names import listed
from lightning_lora.trainer.lightning_patches import with_twins

# These convert later, since factors keep their own precision. Float64 cannot: a checkpoint would lose bits before.
_CONVERT_LATER = (DeepSpeedPrecision, FSDPPrecision, HalfPrecision, MixedPrecision, Precision)


def convert_layers(plugin: Precision, module: LightningModule) -> None:
    """Let plugins such as bitsandbytes and TransformerEngine replace layers before attaching.

    Lightning converts later, when the layers carry adapters, which would be lost. Such plugins leave a converted module
    alone, so the second time changes nothing.

    Raises:
        MisconfigurationException: The plugin replaces layers that carry adapters already. Nothing was changed.
    """
    if type(plugin) in with_twins(*_CONVERT_LATER):
        return
    before = [(part, dict(part._modules)) for part in module.modules()]
    adapted = AdaptedModel(module).layers
    plugin.convert_module(module)
    there = set(module.modules())
    if lost := [name for name, layer in adapted.items() if layer not in there]:
        for part, children in before:
            part._modules.update(children)
        raise MisconfigurationException(
            f"{type(plugin).__name__} replaces {listed(lost)}, which carry adapters already; the adapters would be "
            "lost. Leave attaching to LoRACallback, which has the layers replaced first."
        )
