"""What a sweep cannot do: refused before anything has changed, or named where it happens."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.fabric.utilities.rank_zero import rank_zero_warn  # type: ignore[attr-defined]
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import BatchSizeFinder, EarlyStopping, LearningRateFinder, ModelCheckpoint
from lightning.pytorch.plugins.precision import HalfPrecision, MixedPrecision
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy, SingleDeviceStrategy
from torch import nn

from lightning_lora.named_adapters import active_adapter
from lightning_lora.names import listed
from lightning_lora.sweep.candidates import Candidate
from lightning_lora.sweep.optimizers import Parameters, parameters_of_adapters
from lightning_lora.trainer.checks import AVERAGING, callbacks_of
from lightning_lora.trainer.lightning_patches import with_twins


def check_possible(trainer: Trainer, module: LightningModule, mode: str) -> None:
    """Refuse strategies, precisions, modules and callbacks with which adapters would not train independently."""
    strategy, precision = trainer.strategy, trainer.precision_plugin
    is_known = isinstance(strategy, with_twins(SingleDeviceStrategy, DDPStrategy))
    if not is_known or isinstance(strategy, with_twins(DeepSpeedStrategy)):
        raise MisconfigurationException(
            f"LoRASweep does not train under {type(strategy).__name__}, which divides or copies what trains. Use one "
            "device or strategy='ddp', or one LoRACallback after the other."
        )
    if isinstance(precision, with_twins(HalfPrecision, MixedPrecision)) and precision.precision.startswith("16"):
        raise MisconfigurationException(
            "LoRASweep does not train in float16: where the gradients of one adapter overflow, the scaler skips the "
            "step of all. Use precision='bf16-mixed' or '32-true'."
        )
    if not module.automatic_optimization:
        _check_manual(trainer, module, mode)
    if others := callbacks_of(trainer, *AVERAGING, LearningRateFinder, BatchSizeFinder):
        raise MisconfigurationException(
            f"{type(others[0]).__name__} treats all adapters of a LoRASweep as one. Remove it from the callbacks."
        )


def _check_manual(trainer: Trainer, module: LightningModule, mode: str) -> None:
    """Refuse what a step that steps the optimizers itself does not fit: it can only run for each adapter in turn."""
    if mode not in ("auto", "loop"):
        raise MisconfigurationException(
            f"LoRASweep(mode={mode!r}) does not fit {type(module).__name__}, which optimizes manually: its "
            "training_step has to run for each adapter. Use mode='loop', or leave it out."
        )
    if not isinstance(trainer.strategy, with_twins(SingleDeviceStrategy)):
        raise MisconfigurationException(
            f"LoRASweep does not train {type(module).__name__}, which optimizes manually, under "
            f"{type(trainer.strategy).__name__}: each of its backward passes reaches one adapter, and all processes "
            "would wait for the others. Use one device, or automatic optimization."
        )


def check_direction(trainer: Trainer, monitor: str, direction: str) -> None:
    """Refuse a callback that watches the sweep's metric and takes the opposite values for the better ones."""
    for each in callbacks_of(trainer, ModelCheckpoint, EarlyStopping):
        watched, mode = str(getattr(each, "monitor", None)), getattr(each, "mode", direction)
        if (watched == monitor or watched.startswith(f"{monitor}/")) and mode != direction:
            raise MisconfigurationException(
                f"LoRASweep(monitor={monitor!r}, direction={direction!r}) and "
                f"{type(each).__name__}(monitor={watched!r}, mode={mode!r}) disagree on which values are better. Set "
                f"direction={mode!r}, or mode={direction!r}."
            )


def check_same_sweep(
    saved: Mapping[str, Any] | None, record: Mapping[str, Any] | None, chosen: Mapping[str, Candidate]
) -> None:
    """Refuse to resume a checkpoint of another sweep, or of none.

    Args:
        saved: What the checkpoint says of its sweep.
        record: Its record, if there is a checkpoint to resume.
        chosen: The adapters of this sweep.
    """
    if record is None:
        return
    if saved is None:
        raise MisconfigurationException(
            "LoRASweep: the checkpoint was not written by a sweep, so it cannot be resumed by one. Leave ckpt_path "
            "out, or resume it with LoRACallback."
        )
    before = {name: dict(each["given"]) for name, each in saved["results"].items()}
    given = {name: dict(each.given) for name, each in chosen.items()}
    if different := [name for name in {**before, **given} if before.get(name) != given.get(name)]:
        raise MisconfigurationException(
            f"LoRASweep: the checkpoint has compared other adapters; different are {listed(different)}. Give the same "
            "grid or adapters to resume it."
        )


_EACH = "Do it for each adapter: `for name in adapter_names(self):` and `with using(self, name):`"


def check_alike(module: LightningModule, owned: Mapping[str, Parameters]) -> None:
    """Refuse hooks on gradients, and tensors put in the place of others, that only some of the adapters have."""
    now = parameters_of_adapters(module, list(owned))
    hooked = {name: [key for key, p in own.items() if _has_hooks(p)] for name, own in now.items()}
    replaced = {name: [key for key, p in own.items() if p is not owned[name].get(key)] for name, own in now.items()}
    for what, found in {"have hooks on their gradients": hooked, "were replaced by others": replaced}.items():
        for name, keys in found.items():
            others = [repr(each) for each in now if any(key in now[each] and key not in found[each] for key in keys)]
            if others:
                raise MisconfigurationException(
                    f"LoRASweep: {listed(keys)} of {name!r} {what}, and those of {listed(others)} do not, "
                    f"so the adapters would not train alike. {_EACH}, in on_train_start."
                )


def _has_hooks(parameter: nn.Parameter) -> bool:
    return bool(parameter._backward_hooks or getattr(parameter, "_post_accumulate_grad_hooks", None))


@contextmanager
def one_sided_change_named(
    module: LightningModule, hook: str, owned: Mapping[str, Parameters], live: Sequence[str]
) -> Iterator[None]:
    """Warn of a hook of the module, run once for all adapters, that changes the one in place alone, or buffers."""
    before = {name: [parameter.detach().clone() for parameter in owned[name].values()] for name in live}
    buffers = {name: buffer.clone() for name, buffer in module.named_buffers()}
    yield
    moved = [name for name, now in module.named_buffers() if not torch.equal(now, buffers.get(name, now))]
    if len(live) > 1 and moved:
        rank_zero_warn(
            f"LoRASweep: {hook} of {type(module).__name__} has changed the buffers {listed(moved)}, once for all "
            "adapters. If they follow what an adapter computes, change them in training_step, which runs for each."
        )
    changed = [
        name
        for name in live
        if not all(torch.equal(p, was) for p, was in zip(owned[name].values(), before[name], strict=True))
    ]
    if len(live) > 1 and changed == [active_adapter(module)]:
        rank_zero_warn(
            f"LoRASweep: {hook} of {type(module).__name__} has changed {changed[0]!r} and no other adapter. This hook "
            f"runs once for all of them. {_EACH}; or in on_before_optimizer_step, which runs for each."
        )
