"""Normalisation layers whose running statistics belong to the frozen base."""

from __future__ import annotations

from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from typing_extensions import override

from lightning_lora.layers.swap import Swapped


class FrozenNorm(Swapped):
    """A normalisation layer that stays in eval mode whatever its parents are told.

    In train mode it would normalise by the batch and move its running statistics: the frozen base would change.

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
    """Return whether training moves buffers of this normalisation layer."""
    return isinstance(module, _NormBase) and module.track_running_stats and module.running_mean is not None
