"""What frozen means: no gradients for base parameters, and no moving statistics in frozen norms."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from lightning_lora.attachment import Attachment, attachments, fully_trained, set_attachment
from lightning_lora.layers import FrozenNorm, has_running_statistics, swap_in, swap_out
from lightning_lora.planning.planned import Plan
from lightning_lora.targets import clean_name, join


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
                if not isinstance(norm, FrozenNorm):
                    swap_in(norm, FrozenNorm)
                    norm.train(norm.training)
            else:
                for key, buffer in norm.named_buffers(recurse=False):
                    attachment.base_values.setdefault(join(name, key), buffer.detach().clone())


def thaw(module: nn.Module) -> None:
    """Undo freezing, and forget that the module was adapted."""
    for norm in [part for part in module.modules() if isinstance(part, FrozenNorm)]:
        mode = norm.asked_mode
        swap_out(norm)
        del norm.asked_mode
        norm.train(mode)
    for _, owner, attachment in list(attachments(module)):
        for name, parameter in owner.named_parameters():
            parameter.requires_grad_(attachment.required_grad.get(clean_name(name), parameter.requires_grad))
        set_attachment(owner, None)


def _frozen_norms(owner: nn.Module, attachment: Attachment) -> Iterator[tuple[str, nn.Module]]:
    trained = fully_trained(owner, attachment)
    for name, part in owner.named_modules():
        if has_running_statistics(part) and id(part) not in trained:
            yield clean_name(name), part
