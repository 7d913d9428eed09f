"""What frozen means: no gradients for base parameters, and no moving statistics in frozen norms."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from torch import nn
from torch.nn.utils.parametrizations import _SpectralNorm

from lightning_lora.attachment import Attachment, attachments, fully_trained, set_attachment
from lightning_lora.layers import FrozenNorm, has_running_statistics, spectral_hooks, swap_in, swap_out
from lightning_lora.names import clean_name, join
from lightning_lora.planning.plan import Plan

_ASKED_ITERATIONS = "_lora_asked_iterations"


def freeze_parameters(plan: Plan, attachment: Attachment) -> None:
    """Leave gradients to the adapters and to what trains in full, and note in the attachment what required one."""
    for name in plan.biases:
        attachment.base_values.setdefault(name, plan.parameters[name].detach().clone())
    trained = {id(plan.parameters[name]) for name in plan.biases}
    trained |= {id(parameter) for part in plan.saved.values() for parameter in part.parameters()}
    for name, parameter in plan.parameters.items():
        before, wanted = parameter.requires_grad, id(parameter) in trained and parameter.is_floating_point()
        attachment.required_grad.setdefault(name, before)
        if before != wanted:
            parameter.requires_grad_(wanted)


def freeze_norms(module: nn.Module) -> None:
    """Fix the running statistics of frozen norms where the config says so; safe to repeat."""
    for _, owner, attachment in attachments(module):
        for name, norm in _frozen_norms(owner, attachment):
            if attachment.config.frozen_norm == "eval":
                _hold(norm)
            else:
                for key, buffer in norm.named_buffers(recurse=False):
                    attachment.base_values.setdefault(join(name, key), buffer.detach().clone())


@contextmanager
def weights_only_read(parts: Iterable[nn.Module]) -> Iterator[None]:
    """Have weights that ``spectral_norm`` computes read without moving its statistics, as in train mode it would."""
    moving = [part for part in parts if isinstance(part, _SpectralNorm) and part.training]
    try:
        for part in moving:
            part.training = False
        yield
    finally:
        for part in moving:
            part.training = True


@contextmanager
def all_training(module: nn.Module) -> Iterator[None]:
    """Let every parameter require a gradient for a while, as full fine-tuning does."""
    before = [(parameter, parameter.requires_grad) for parameter in module.parameters()]
    try:
        for parameter, _ in before:
            parameter.requires_grad_(parameter.is_floating_point())
        yield
    finally:
        for parameter, required in before:
            parameter.requires_grad_(required)


def thaw(module: nn.Module) -> None:
    """Undo freezing, and forget that the module was adapted."""
    for part in module.modules():
        _release(part)
    for _, owner, attachment in list(attachments(module)):
        for name, parameter in owner.named_parameters():
            parameter.requires_grad_(attachment.required_grad.get(clean_name(name), parameter.requires_grad))
        set_attachment(owner, None)


def _hold(norm: nn.Module) -> None:
    """Keep a norm's statistics as they are; safe to repeat."""
    hooks = spectral_hooks(norm)
    for hook in hooks:  # its mode is that of its layer, whose adapter must know it
        if _ASKED_ITERATIONS not in vars(hook):
            vars(hook)[_ASKED_ITERATIONS], hook.n_power_iterations = hook.n_power_iterations, 0
    if not hooks and not isinstance(norm, FrozenNorm):
        swap_in(norm, FrozenNorm)
        norm.train(norm.training)


def _release(part: nn.Module) -> None:
    """Undo ``_hold``; a norm gets the mode that it was last told."""
    for hook in spectral_hooks(part):
        hook.n_power_iterations = vars(hook).pop(_ASKED_ITERATIONS, hook.n_power_iterations)
    if isinstance(part, FrozenNorm):
        mode = part.asked_mode
        swap_out(part)
        del part.asked_mode
        part.train(mode)


def _frozen_norms(owner: nn.Module, attachment: Attachment) -> Iterator[tuple[str, nn.Module]]:
    trained = fully_trained(owner, attachment)
    for name, part in owner.named_modules():
        if has_running_statistics(part) and id(part) not in trained:
            yield clean_name(name), part
