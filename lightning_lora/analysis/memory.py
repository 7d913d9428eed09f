"""The memory of a training step, with adapters and with full fine-tuning, before anything is trained."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from typing_extensions import override

from lightning_lora.adapted_model import AdaptedModel
from lightning_lora.analysis.budget import ADAM_BYTES, MEGA
from lightning_lora.attachment import table_lines
from lightning_lora.config import LoRAConfig
from lightning_lora.probe import RandomState, arguments_for, left_as_it_was, tensors_in
from lightning_lora.surgery import attach, detach

_PARTS = ("weights", "gradients", "optimizer", "activations")
_CURES = {
    "weights": "a base in bfloat16 or quantized, or weights sharded over processes, would help most",
    "gradients": "a lower rank or fewer targets would help most",
    "optimizer": "a lower rank or an optimizer with less state would help most",
    "activations": "activation checkpointing would help most, then a smaller batch",
}


@dataclass(frozen=True)
class MemoryUse:
    """The bytes that one way of training takes.

    Attributes:
        weights: Parameters, including adapters, and buffers.
        gradients: Gradients of the trained parameters, each in its parameter's precision.
        optimizer: Optimizer state.
        activations: What autograd saves of one batch for the backward pass, including the batch where needed; None
            without a batch.
    """

    weights: int
    gradients: int
    optimizer: int
    activations: int | None

    @property
    def total(self) -> int:
        """Bytes of all parts. The peak of a step is slightly lower: activations are freed as gradients arrive."""
        return self.weights + self.gradients + self.optimizer + (self.activations or 0)


@dataclass(frozen=True)
class MemoryForecast:
    """The memory of a training step; ``print(forecast)`` shows a table.

    Attributes:
        lora: With the adapters.
        full: With full fine-tuning of the same model on the same batch.
    """

    lora: MemoryUse
    full: MemoryUse

    @property
    def verdict(self) -> str:
        """One sentence: which part dominates with LoRA, and what would reduce it."""
        use = self.lora
        part = max(_PARTS, key=lambda part: getattr(use, part) or 0)
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
            rows.append((part, *("-" if value is None else f"{value / MEGA:,.1f}" for value in values)))
        return "\n".join(["Memory of a training step:", *table_lines(rows), self.verdict])


def forecast_memory(
    module: nn.Module,
    config: LoRAConfig | None = None,
    batch: object = None,
    *,
    step: Callable[[nn.Module, Any], object] | None = None,
    bytes_per_state: int = ADAM_BYTES,
) -> MemoryForecast:
    """Return the memory of a training step with LoRA and with full fine-tuning; activations are measured on a batch.

    The model runs forward twice in training mode, without adapters and with them; they are removed again. Parameters,
    buffers, gradients, modes and the random state stay as they were. Temporary memory of operators is not counted, nor
    what a loss outside of ``step`` saves.

    Args:
        module: The model without adapters; it may be on the meta device, with a batch on it.
        config: Which layers to adapt; ``LoRAConfig()`` by default.
        batch: A batch of the size to train with: a tensor; a tuple or list, from which ``forward`` gets the arguments
            it requires; or a dict, from which it gets those it accepts. Without it activations are unknown.
        step: Called with the module and the batch in place of ``forward``, and returns a loss; for autocast or a
            ``training_step``.
        bytes_per_state: Bytes of optimizer state per trained parameter: 8 for Adam, 0 for SGD, 2 for 8-bit Adam.

    Raises:
        ValueError: The module is already adapted, the config does not fit it, or it has no forward.
        TypeError: The forward pass or the step returned no tensor with a gradient.
    """
    if AdaptedModel(module).layers:
        raise ValueError("forecast_memory needs the model without adapters: call it before attach, or detach first.")
    run = None if batch is None else _runner(module, batch, step)
    with _all_training(module):
        full = _use(module, run, bytes_per_state)
    attach(module, config or LoRAConfig())
    try:
        lora = _use(module, run, bytes_per_state)
    finally:
        detach(module)
    return MemoryForecast(lora, full)


@contextmanager
def _all_training(module: nn.Module) -> Iterator[None]:
    """Let every parameter require a gradient temporarily, as full fine-tuning does."""
    before = [(parameter, parameter.requires_grad) for parameter in module.parameters()]
    try:
        for parameter, _ in before:
            parameter.requires_grad_(parameter.is_floating_point())
        yield
    finally:
        for parameter, required in before:
            parameter.requires_grad_(required)


def _use(module: nn.Module, run: Callable[[], object] | None, bytes_per_state: int) -> MemoryUse:
    weights = _storages([*module.parameters(), *module.buffers()])
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    activations = None
    if run is not None:
        with left_as_it_was(module), RandomState():
            module.train()
            activations = _saved_bytes(run, weights)
    stored = sum(storage.nbytes() for storage in weights.values())
    elements = sum(parameter.numel() for parameter in trained)
    return MemoryUse(stored, sum(p.nbytes for p in trained), elements * bytes_per_state, activations)


def _runner(module: nn.Module, batch: object, step: Callable[[nn.Module, Any], object] | None) -> Callable[[], object]:
    if step is None and getattr(module.forward, "__name__", "") == "_forward_unimplemented":
        raise ValueError(f"{type(module).__name__} has no forward to run a batch through. Pass step.")

    def run() -> list[Tensor]:
        args, kwargs = arguments_for(module, batch) if step is None else ((), {})
        found = list(tensors_in(module(*args, **kwargs) if step is None else step(module, batch)))
        if not any(tensor.requires_grad for tensor in found):
            what = type(module).__name__ if step is None else "step"
            raise TypeError(f"forecast_memory: {what} returned no tensor with a gradient, so nothing would train.")
        return found

    return run


# --- counting memory


def _storages(tensors: Iterable[Tensor]) -> dict[int, torch.UntypedStorage]:
    """Return the memory that tensors occupy, by its address; views of one another share theirs, and it counts once."""
    found = (inner.untyped_storage() for tensor in tensors for inner in _inner_tensors(tensor))
    return {storage._cdata: storage for storage in found}


def _saved_bytes(run: Callable[[], object], apart_from: Collection[int]) -> int:
    """Return the bytes that autograd saves for the backward pass of a computation, which does not run.

    Whatever checkpointing recomputes is not saved, and not counted; nor is the memory at the addresses ``apart_from``.
    """
    kept: dict[int, torch.UntypedStorage] = {}  # alive, so that no address is used again meanwhile

    def pack(tensor: Tensor) -> Tensor:
        kept.update(_storages([tensor]))
        return tensor

    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        run()
    return sum(storage.nbytes() for address, storage in kept.items() if address not in apart_from)


def _inner_tensors(tensor: Tensor) -> Iterator[Tensor]:
    """Yield the tensors that hold the values; a packed weight wraps several."""
    wrapper = cast(Any, tensor)
    if not is_traceable_wrapper_subclass(wrapper):
        yield tensor
        return
    for name in wrapper.__tensor_flatten__()[0]:
        yield from _inner_tensors(getattr(wrapper, name))
