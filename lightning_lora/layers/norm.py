"""Norms whose running statistics belong to the frozen base: normalisation layers, and ``spectral_norm`` of weights."""

from __future__ import annotations

from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.utils.parametrizations import _SpectralNorm
from torch.nn.utils.spectral_norm import SpectralNorm
from typing_extensions import override

from lightning_lora.layers.lora_layer import Swapped


class FrozenNorm(Swapped):
    """A norm that stays in eval mode whatever its parents are told.

    In train mode it would move its running statistics, and normalise by the batch: the frozen base would change.

    Attributes:
        asked_mode: The mode that the layer's parents last asked for; it takes effect when the layer is thawed.
    """

    class_prefix = "Frozen"
    asked_mode: bool

    @override
    def train(self, mode: bool = True) -> FrozenNorm:
        self.asked_mode = mode
        super().train(False)
        return self


def has_running_statistics(module: nn.Module) -> bool:
    """Return whether training moves buffers of this module by normalising its input or its weight."""
    if isinstance(module, _NormBase):
        return module.track_running_stats and module.running_mean is not None
    if isinstance(module, _SpectralNorm):
        return bool(module._buffers)  # a vector is normalised without any
    return bool(spectral_hooks(module))


def spectral_hooks(module: nn.Module) -> list[SpectralNorm]:
    """Return what ``torch.nn.utils.spectral_norm``, the older of the two, leaves on a layer: its buffers are there."""
    hooks = module._forward_pre_hooks
    return [hook for hook in hooks.values() if isinstance(hook, SpectralNorm)] if hooks else []
