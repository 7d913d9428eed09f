"""What errors of torch about gradients mean for adapters: which ones, and what to do."""

from __future__ import annotations

from torch import nn

from lightning_lora.layers import all_adapters
from lightning_lora.names import listed

_UNUSED = "Expected to have finished reduction in the prior iteration"
_TWICE = "mark a variable ready only once"
_CUT = "does not require grad and does not have a grad_fn"


def explain(exception: BaseException, module: nn.Module, suspicion: str | None = None) -> None:
    """Let an error about gradients say which adapters it is about and what helps; others stay as they are.

    Args:
        exception: Whatever ended the run.
        module: The adapted module.
        suspicion: What is known to be wrong anyway, and may be the reason.
    """
    text = str(exception)
    if suspicion and suspicion not in text:
        exception.args = (f"{text}\n{suspicion}",)
    elif _UNUSED in text:
        silent = [
            name
            for name, adapter in all_adapters(module).items()
            if any(parameter.grad is None for parameter in adapter.parameters())
        ]
        if silent:  # in the place of torch's words, which Lightning would replace by others
            exception.args = (
                f"DDP waits for gradients that do not come: none reached the adapters of {listed(silent)}. Leave "
                "layers that do not always run out with exclude_modules, or use "
                "strategy='ddp_find_unused_parameters_true'.",
            )
    elif _TWICE in text:
        adapted = listed(list(all_adapters(module)))
        exception.args = (
            f"{text}\nLoRA: an adapter, of {adapted}, was used in several backward passes of one step. With activation "
            "checkpointing set use_reentrant=False; with layers that run several times use "
            "DDPStrategy(static_graph=True).",
        )
    elif _CUT in text and all_adapters(module):
        exception.args = (
            f"{text}\nLoRA: the loss depends on no adapter. If all that it depends on is frozen, as one of two nets "
            "may be, adapt a part of that, train it in full with modules_to_save, or leave this loss out. Reentrant "
            "activation checkpointing over frozen inputs also cuts gradients: set use_reentrant=False, or let the "
            "first block's input require a gradient.",
        )
