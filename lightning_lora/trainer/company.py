"""Which other callbacks of a Trainer go together with LoRA, and in which order."""

from __future__ import annotations

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import BaseFinetuning, ModelPruning, StochasticWeightAveraging, WeightAveraging

from lightning_lora.trainer.import_names import import_name, with_twins

AVERAGING = (WeightAveraging, StochasticWeightAveraging)


def mixed_names(trainer: Trainer, module: LightningModule, lora: Callback) -> str | None:
    """Return what is wrong where Trainer, module and callbacks come from both of Lightning's packages, or None."""
    others = [callback for callback in _callbacks(trainer) if not isinstance(callback, type(lora))]
    names = {type(part).__name__: import_name(part) for part in (trainer, module, *others)}
    strays = [f"{kind} from {name}" for kind, name in names.items() if name != import_name(trainer)]
    if not strays:
        return None
    return (
        f"This Trainer is from {import_name(trainer)}, and with it go {', '.join(strays)}. The two packages hold the "
        "same classes, made twice, so Lightning would not know these for what they are. Import all from one; "
        "LoRACallback goes with either."
    )


def bad_company(trainer: Trainer, lora: Callback) -> str | None:
    """Return what is wrong with the callbacks beside a LoRACallback, or None."""
    callbacks = _callbacks(trainer)
    for callback in callbacks[: callbacks.index(lora)]:
        if isinstance(callback, with_twins(*AVERAGING)):
            return (
                f"{type(callback).__name__} is listed before LoRACallback, so it would average a copy without "
                "adapters. List LoRACallback first."
            )
    for callback in callbacks:
        if isinstance(callback, type(lora)) and callback is not lora:
            return "Two LoRACallbacks in one Trainer; put all targets into one."
        if isinstance(callback, with_twins(BaseFinetuning, ModelPruning)):
            return (
                f"{type(callback).__name__} changes which parameters train, and so does LoRACallback. Remove one "
                "of them; modules_to_save trains whole modules beside the adapters."
            )
    return None


def copies_of_the_base(trainer: Trainer) -> str | None:
    """Return what is to be said of callbacks that keep a copy of the module, or None."""
    averaging = with_twins(*AVERAGING)
    names = [type(callback).__name__ for callback in _callbacks(trainer) if isinstance(callback, averaging)]
    if not names:
        return None
    return f"LoRA: {', '.join(names)} keeps a copy of the whole module, the frozen base included."


def has_callback(trainer: Trainer, *kinds: type[Callback]) -> bool:
    """Return whether a callback of one of these kinds is there."""
    return any(isinstance(callback, with_twins(*kinds)) for callback in _callbacks(trainer))


def _callbacks(trainer: Trainer) -> list[Callback]:
    return trainer.callbacks  # type: ignore[attr-defined, no-any-return]
