"""What a training step will take of memory, with LoRA and in full, and which part of it dominates."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor, nn
from typing_extensions import override

from lightning_lora.analysis.budget import ADAM_BYTES
from lightning_lora.analysis.saved import Memory, saved_bytes
from lightning_lora.attachment import table_lines
from lightning_lora.config import LoRAConfig
from lightning_lora.freezing import all_training
from lightning_lora.layers import all_adapters
from lightning_lora.surgery import attach, detach
from lightning_lora.trial import RandomState, arguments_for, left_as_it_was, tensors_in

_MEGA = 1e6
_PARTS = ("weights", "gradients", "optimizer", "activations")
_CURES = {
    "weights": "a base in bfloat16 or quantized, or weights sharded over processes, would help most",
    "gradients": "a lower rank or fewer targets would help most",
    "optimizer": "a lower rank or an optimizer with less state would help most",
    "activations": "activation checkpointing would help most, then a smaller batch",
}


@dataclass(frozen=True)
class MemoryUse:
    """The bytes of one way to train.

    Attributes:
        weights: Parameters, adapters included, and buffers.
        gradients: Gradients of what trains, each in its parameter's precision.
        optimizer: State of the optimizer.
        activations: What autograd keeps of one batch for the backward pass, the batch itself where it is needed; None
            if no batch was given.
    """

    weights: int
    gradients: int
    optimizer: int
    activations: int | None

    @property
    def total(self) -> int:
        """Bytes of all parts. The peak of a step is a little lower, as activations go while gradients come."""
        return self.weights + self.gradients + self.optimizer + (self.activations or 0)

    @property
    def largest(self) -> str:
        """Name of the largest part."""
        return max(_PARTS, key=lambda part: getattr(self, part) or 0)


@dataclass(frozen=True)
class MemoryForecast:
    """What a training step takes; ``print(forecast)`` shows a table.

    Attributes:
        lora: With the adapters.
        full: With full fine-tuning of the same model on the same batch.
    """

    lora: MemoryUse
    full: MemoryUse

    @property
    def verdict(self) -> str:
        """What dominates with LoRA and what would help, in one sentence."""
        part, use = self.lora.largest, self.lora
        share = getattr(use, part) / use.total if use.total else 0.0
        verb = "dominates" if part == "optimizer" else "dominate"
        known = "" if use.activations is not None else " of what is known without a batch"
        return f"{part} {verb} ({share:.0%}{known}): {_CURES[part]}."

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, for JSON."""
        uses = {"lora": self.lora, "full": self.full}
        return {name: asdict(use) | {"total": use.total} for name, use in uses.items()} | {"verdict": self.verdict}

    @override
    def __str__(self) -> str:
        rows: list[tuple[str, ...]] = [("MB", "LoRA", "full fine-tuning")]
        for part in (*_PARTS, "total"):
            values = [getattr(use, part) for use in (self.lora, self.full)]
            rows.append((part, *("-" if value is None else f"{value / _MEGA:,.1f}" for value in values)))
        return "\n".join(["Memory of a training step:", *table_lines(rows), self.verdict])


def forecast_memory(
    module: nn.Module,
    config: LoRAConfig | None = None,
    batch: object = None,
    *,
    step: Callable[[nn.Module, Any], object] | None = None,
    bytes_per_state: int = ADAM_BYTES,
) -> MemoryForecast:
    """Return what a training step takes with LoRA and with full fine-tuning, activations measured on a batch.

    The model is run forward twice in training mode, once without adapters and once with them, which are removed again.
    Parameters, buffers, gradients, modes and the random state are left as they were. What operators need for a moment
    is not seen, nor what a loss keeps that is not part of ``step``.

    Args:
        module: The model without adapters; the meta device will do, with a batch on it.
        config: What to adapt; if left out, ``LoRAConfig()``.
        batch: A batch of the size to train with: a tensor, the entries of a tuple or list that ``forward`` requires, or
            those of a dict that it accepts. Without it activations are unknown.
        step: What to run instead of ``forward``: it is given the module and the batch, and returns a loss; autocast
            and a ``training_step`` go here.
        bytes_per_state: Bytes of optimizer state for each trained parameter: 8 for Adam, 0 for SGD, 2 for an Adam of 8
            bits.

    Raises:
        ValueError: The module is adapted already, the config does not fit it, or there is nothing to run.
        TypeError: What was run returned no tensor with a gradient.
    """
    if all_adapters(module):
        raise ValueError("forecast_memory needs the model without adapters: call it before attach, or detach first.")
    run = None if batch is None else _runner(module, batch, step)
    with all_training(module):
        full = _use(module, run, bytes_per_state)
    attach(module, config or LoRAConfig())
    try:
        lora = _use(module, run, bytes_per_state)
    finally:
        detach(module)
    return MemoryForecast(lora, full)


def _use(module: nn.Module, run: Callable[[], object] | None, bytes_per_state: int) -> MemoryUse:
    there = Memory([*module.parameters(), *module.buffers()])
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    activations = None
    if run is not None:
        with left_as_it_was(module), RandomState():
            module.train()
            activations = saved_bytes(run, there)
    elements = sum(parameter.numel() for parameter in trained)
    return MemoryUse(there.nbytes, sum(p.nbytes for p in trained), elements * bytes_per_state, activations)


def _runner(module: nn.Module, batch: object, step: Callable[[nn.Module, Any], object] | None) -> Callable[[], object]:
    if step is None and getattr(module.forward, "__name__", "") == "_forward_unimplemented":
        raise ValueError(f"{type(module).__name__} has no forward to run a batch through. Give step.")

    def run() -> list[Tensor]:
        args, kwargs = arguments_for(module, batch) if step is None else ((), {})
        found = list(tensors_in(module(*args, **kwargs) if step is None else step(module, batch)))
        if not any(tensor.requires_grad for tensor in found):
            what = type(module).__name__ if step is None else "step"
            raise TypeError(f"forecast_memory: {what} returned no tensor that has a gradient, so nothing would train.")
        return found

    return run
