"""What a fit has achieved: whether its adapters were trained, and to finite numbers."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.fabric.utilities.rank_zero import rank_zero_info, rank_zero_warn  # type: ignore[attr-defined]
from lightning.pytorch import LightningModule, Trainer
from torch import nn

from lightning_lora.adapted_model import AdaptedModel
from lightning_lora.base_buffers import moved_buffers
from lightning_lora.layers import Adapter, base_parameter
from lightning_lora.named_adapters import active_adapter, adapter_names
from lightning_lora.names import listed
from lightning_lora.sharding import anywhere, is_fully_sharded, is_sharded, local, whole
from lightning_lora.state import is_sound
from lightning_lora.surgery import detach
from lightning_lora.switching import remove_adapter, set_adapter
from lightning_lora.trainer.diagnostics import to_floats
from lightning_lora.trainer.strategies.base import Layout
from lightning_lora.trainer.strategies.deepspeed import gathered_parameters


def warn_if_untrained(layout: Layout, module: LightningModule) -> None:
    """Warn of evaluating a model whose adapters are untrained; every process must call this."""
    if _is_untrained(module, layout):
        rank_zero_warn(
            "No LoRA adapter has been trained yet, so this evaluates the bare base model. Pass the checkpoint of a "
            "trained adapter as ckpt_path."
        )


def check_finite(layout: Layout, module: LightningModule, broken_at: int | None) -> None:
    """Refuse a fit that ended with NaN or infinity in what was trained; every process must call this."""
    trained = AdaptedModel(module).trained
    with gathered_parameters(module):
        # Buffers of what trains in full may hold infinity, as masks do.
        sound = [is_sound(local(t), finite=isinstance(t, nn.Parameter)) for t in trained.values()]
        broken = anywhere([not each for each in to_floats(sound)], layout.strategy.root_device)
    if names := [name for name, is_broken in zip(trained, broken, strict=True) if is_broken]:
        since = "" if broken_at is None else f" The loss was first not finite in batch {broken_at} of this fit."
        raise MisconfigurationException(
            f"Training diverged: NaN or infinity in {listed(names)}.{since} Lower the learning rate, clip gradients, "
            "or use a wider precision. Nothing was merged or exported; an earlier checkpoint may be sound."
        )


def check_trained(
    layout: Layout, trainer: Trainer, module: LightningModule, has_moved: bool | None, *, is_awaited: bool
) -> bool:
    """Refuse a fit that left all adapters untrained, or warn if it was meant to; every process must call this.

    Args:
        layout: How the strategy distributes what is trained.
        trainer: The Trainer.
        module: The adapted module.
        has_moved: As of ``GradientCheck``: adapters from elsewhere have an effect without any training.
        is_awaited: Whether the result is to be exported or merged.

    Returns:
        Whether there is something to export and to merge.
    """
    steps, nothing = trainer.global_step, "Nothing is exported or merged."
    is_untrained = _is_untrained(module, layout) or (has_moved is False and bool(AdaptedModel(module).layers))
    if steps and is_untrained:
        message = f"No LoRA adapter was trained in {steps} steps. Was the learning rate zero? {nothing}"
        if is_awaited and has_moved is not None:
            raise MisconfigurationException(message)
        rank_zero_warn(message)
    if steps or not (is_untrained or (has_moved is None and AdaptedModel(module).layers)):
        return not is_untrained
    message = (
        "This fit made no optimizer step, so no LoRA adapter was trained. Is the train_dataloader empty, or "
        "limit_train_batches, max_steps or max_epochs zero? With manual optimization, step the optimizers."
    )
    if 0 not in (trainer.max_steps, trainer.max_epochs, trainer.limit_train_batches):
        raise MisconfigurationException(message)
    say = rank_zero_warn if is_untrained else rank_zero_info
    say(f"{message} {nothing}")
    return False


def tell_of_moved_buffers(module: LightningModule) -> None:
    """Say which buffers of the base a fit has changed, and to whom they belong now."""
    if moved := moved_buffers(AdaptedModel(module)):
        rank_zero_info(
            f"LoRA: training has changed buffers of the base: {listed(list(moved))}. They belong to the adapter: "
            "checkpoints hold them, and disabled, detach and other adapters see the base's own. PEFT directories have "
            "no place for them, unless modules that hold them are named in modules_to_save."
        )


def _is_untrained(module: LightningModule, layout: Layout) -> bool:
    """Return whether all adapters are at their start, so that the model computes what the base does."""
    model = AdaptedModel(module)
    if not model.layers:
        return False
    names = {id(tensor): name for name, tensor in model.trained.items()}
    with gathered_parameters(module):
        found = [
            _has_moved(adapter, names, layout)
            if adapter.is_difference
            else adapter.has_effect(base_parameter(layer, adapter.parameter))
            for layer in model.layers.values()
            for adapter in layer.adapters().values()
        ]  # of all, since some are gathered from all processes
    return not any(anywhere([any(found)], layout.strategy.root_device))  # a process may hold nothing of any B


def _has_moved(adapter: Adapter, names: Mapping[int, str], layout: Layout) -> bool:
    """Return whether this process's part of the factors differs from where they started."""
    pairs = [(getattr(adapter, key), whole(getattr(adapter, f"{key}0"))) for key in ("A", "B")]
    parts = [
        (now, start if now.shape == start.shape and not is_sharded(now) else layout.part(start, names[id(now)], now))
        for now, start in pairs
    ]
    moved = [bool(torch.any(now != start)) for now, start in parts]  # of both: every process takes part
    return any(moved)


def take_back(module: LightningModule, was: tuple[str | None, list[str]]) -> None:
    """After a run that failed before its adapter had values, leave the adapters that there were before.

    Args:
        module: The module.
        was: The active adapter and all names, from before the run.
    """
    (active, names), now = was, adapter_names(module)
    if was == (active_adapter(module), now) or any(map(is_fully_sharded, module.modules())):
        return
    if not names:
        detach(module)
    elif active in now:  # ``fresh`` may have removed it
        set_adapter(module, active)
        for name in [name for name in now if name not in names]:
            remove_adapter(module, name)
