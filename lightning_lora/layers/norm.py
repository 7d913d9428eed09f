"""Norms whose running statistics belong to the frozen base: normalization layers, and ``spectral_norm`` of weights."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import cast

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.utils.parametrizations import _SpectralNorm
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm
from typing_extensions import override

from lightning_lora.layers.lora_layer import Swapped, swap_in, swap_out

NORMALIZING = (_NormBase, _SpectralNorm)  # these, and layers with hooks, may have running statistics
_ASKED_ITERATIONS = "_lora_asked_iterations"


class FrozenNorm(Swapped):
    """A norm that stays in eval mode, whatever mode its parents are in.

    In train mode it would move its running statistics, and normalize by the batch: the frozen base would change.

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


class FrozenStatistics(FrozenNorm):
    """A normalization layer that keeps its running statistics even where all others begin theirs anew."""

    @override
    def train(self, mode: bool = True) -> FrozenStatistics:
        """Stay in eval mode; say so to whoever asks this very layer, and not one around it, for another."""
        if mode and sys._getframe(1).f_code is not nn.Module.train.__code__:
            warnings.warn(
                "A frozen norm stays in eval mode, since its running statistics are those of the pretrained model. Set "
                "its attribute training = True to normalize by the batch all the same, as in test-time adaptation; "
                "frozen_norm='track' trains with the batch, and lets the statistics move.",
                stacklevel=2,
            )
        super().train(mode)
        return self

    def reset_running_stats(self) -> None:
        """Keep them, and say so: ``torch.optim.swa_utils.update_bn`` would compute new ones in train mode."""
        warnings.warn(
            "Running statistics of frozen norms are those of the pretrained model and stay, so nothing was reset; "
            "frozen_norm='track' lets them move.",
            stacklevel=2,
        )

    def reset_parameters(self) -> None:
        """Begin with new values everywhere, as after the meta device."""
        super().reset_running_stats()  # type: ignore[misc]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            super().reset_parameters()  # type: ignore[misc]


def has_running_statistics(module: nn.Module) -> bool:
    """Return whether training moves buffers of this module by normalizing its input or its weight."""
    if isinstance(module, _NormBase):
        return module.track_running_stats and module.running_mean is not None
    if isinstance(module, _SpectralNorm):
        return bool(module._buffers)  # a vector is normalized without any
    return bool(spectral_hooks(module))


def spectral_hooks(module: nn.Module) -> list[SpectralNorm]:
    """Return what ``torch.nn.utils.spectral_norm``, the older of the two, leaves on a layer: its buffers are there."""
    hooks = module._forward_pre_hooks
    return [hook for hook in hooks.values() if isinstance(hook, SpectralNorm)] if hooks else []


def hold_statistics(norm: nn.Module) -> None:
    """Keep a norm's statistics fixed; safe to repeat."""
    hooks = spectral_hooks(norm)
    for hook in hooks:  # its mode is that of its layer, whose adapter must know it
        if _ASKED_ITERATIONS not in vars(hook):
            vars(hook)[_ASKED_ITERATIONS], hook.n_power_iterations = hook.n_power_iterations, 0
    if not hooks and not isinstance(norm, FrozenNorm):
        swap_in(norm, FrozenStatistics if isinstance(norm, _NormBase) else FrozenNorm)
        FrozenNorm.train(cast(FrozenNorm, norm), norm.training)


def asked_modes_kept(module: nn.Module, evaluate: Callable[[], object]) -> None:
    """Let a call of ``eval`` leave no trace in frozen norms: Lightning puts modes back without a call of ``train``."""
    asked = [(norm, norm.asked_mode) for norm in module.modules() if isinstance(norm, FrozenNorm)]
    evaluate()
    for norm, mode in asked:
        norm.asked_mode = mode


def release_statistics(part: nn.Module) -> None:
    """Undo ``hold_statistics`` on any module; a norm gets the mode last set."""
    for hook in spectral_hooks(part):
        hook.n_power_iterations = vars(hook).pop(_ASKED_ITERATIONS, hook.n_power_iterations)
    if isinstance(part, FrozenNorm):
        mode = part.asked_mode
        swap_out(part)
        del part.asked_mode
        part.train(mode)


@torch.no_grad()
def _compute_by_hooks(part: nn.Module) -> None:
    for hook in part._forward_pre_hooks.values():
        if isinstance(hook, SpectralNorm):
            setattr(part, hook.name, hook.compute_weight(part, do_power_iteration=False))
        elif isinstance(hook, WeightNorm):
            setattr(part, hook.name, hook.compute_weight(part))


@contextmanager
def weights_only_read(parts: Iterable[nn.Module]) -> Iterator[None]:
    """Read weights computed by ``spectral_norm`` without moving its statistics, as a read in train mode would.

    Those that hooks compute before each forward pass are computed now: loading has left them as they were.
    """
    parts = list(parts)
    for part in parts:
        _compute_by_hooks(part)
    moving = [part for part in parts if isinstance(part, _SpectralNorm) and part.training]
    try:
        for part in moving:
            part.training = False
        yield
    finally:
        for part in moving:
            part.training = True
