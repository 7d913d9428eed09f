"""Which other callbacks of a Trainer go together with LoRA, and in which order."""

from __future__ import annotations

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import BaseFinetuning, ModelPruning, StochasticWeightAveraging, WeightAveraging

AVERAGING = (WeightAveraging, StochasticWeightAveraging)


def foreign(trainer: object, module: object) -> str | None:
    """Return what is wrong where the Trainer or the module come from Lightning's other package, or None."""
    ours = isinstance(trainer, Trainer) and isinstance(module, LightningModule)
    if ours and all(isinstance(callback, Callback) for callback in trainer.callbacks):  # type: ignore[attr-defined]
        return None
    return (
        "LoRACallback belongs to lightning.pytorch, and this Trainer, module or another callback to pytorch_lightning, "
        "whose classes are not the same. Import all of them from lightning.pytorch."
    )


def bad_company(trainer: Trainer, lora: Callback) -> str | None:
    """Return what is wrong with the callbacks beside a LoRACallback, or None."""
    callbacks = _callbacks(trainer)
    for callback in callbacks[: callbacks.index(lora)]:
        if isinstance(callback, AVERAGING):
            return (
                f"{type(callback).__name__} is listed before LoRACallback, so it would average a copy without "
                "adapters. List LoRACallback first."
            )
    for callback in callbacks:
        if isinstance(callback, type(lora)) and callback is not lora:
            return "Two LoRACallbacks in one Trainer; put all targets into one."
        if isinstance(callback, (BaseFinetuning, ModelPruning)):
            return (
                f"{type(callback).__name__} changes which parameters train, and so does LoRACallback. Remove one "
                "of them; modules_to_save trains whole modules beside the adapters."
            )
    return None


def copies_of_the_base(trainer: Trainer) -> str | None:
    """Return what is to be said of callbacks that keep a copy of the module, or None."""
    names = [type(callback).__name__ for callback in _callbacks(trainer) if isinstance(callback, AVERAGING)]
    if not names:
        return None
    return f"LoRA: {', '.join(names)} keeps a copy of the whole module, the frozen base included."


def has_callback(trainer: Trainer, *kinds: type[Callback]) -> bool:
    """Return whether a callback of one of these kinds is there."""
    return any(isinstance(callback, kinds) for callback in _callbacks(trainer))


def _callbacks(trainer: Trainer) -> list[Callback]:
    return trainer.callbacks  # type: ignore[attr-defined, no-any-return]
