"""Checks of a run: anything that would keep it from training raises, or warns if only a part is affected."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.fabric.utilities.rank_zero import rank_zero_info, rank_zero_warn  # type: ignore[attr-defined]
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import BaseFinetuning, ModelPruning, StochasticWeightAveraging, WeightAveraging
from lightning.pytorch.strategies import Strategy
from lightning.pytorch.strategies.launchers.multiprocessing import _MultiProcessingLauncher
from torch import nn
from torch.optim import Optimizer

from lightning_lora.adapted_model import AdaptedModel
from lightning_lora.attachment import get_attachment
from lightning_lora.layers import base_parameter
from lightning_lora.names import clean_name, join, listed
from lightning_lora.optimizers import unheld_parameters
from lightning_lora.sharding import anywhere, local
from lightning_lora.trainer.lightning_patches import import_name, with_twins
from lightning_lora.trainer.strategies.base import Layout, original_param_groups
from lightning_lora.trainer.strategies.deepspeed import gathered_parameters

AVERAGING = (WeightAveraging, StochasticWeightAveraging)  # they copy the module before its own ``setup`` runs

# --- before attaching: the Trainer and its other callbacks


def check_import_names(trainer: Trainer, module: LightningModule, lora: Callback) -> None:
    """Refuse a Trainer, module and callbacks that come from both ``lightning.pytorch`` and ``pytorch_lightning``."""
    others = [callback for callback in _callbacks(trainer) if not isinstance(callback, type(lora))]
    names = {type(part).__name__: import_name(part) for part in (trainer, module, *others)}
    strays = [f"{kind} from {name}" for kind, name in names.items() if name != import_name(trainer)]
    if strays:
        raise MisconfigurationException(
            f"This Trainer is from {import_name(trainer)}, but it was given {', '.join(strays)}. Each package defines "
            "its own copy of every class and does not recognise the other's. Import everything from one of them; "
            "LoRACallback works with either."
        )


def explain_mixed_import_names(
    exception: BaseException, trainer: Trainer, module: LightningModule, lora: Callback
) -> None:
    """Add to an error that the two packages are mixed, if they are."""
    try:
        check_import_names(trainer, module, lora)
    except MisconfigurationException as mixed:
        if str(mixed) not in str(exception):
            exception.args = (f"{exception}\n{mixed}",)


def check_other_callbacks(trainer: Trainer, lora: Callback) -> None:
    """Refuse callbacks that do not work beside ``LoRACallback``, and tell of copies of the base."""
    callbacks, averaging = _callbacks(trainer), callbacks_of(trainer, *AVERAGING)
    for callback in averaging:
        if callbacks.index(callback) < callbacks.index(lora):
            raise MisconfigurationException(
                f"{type(callback).__name__} is listed before LoRACallback, so it would average a copy without "
                "adapters. List LoRACallback first."
            )
    for callback in callbacks:
        if isinstance(callback, type(lora)) and callback is not lora:
            raise MisconfigurationException("This Trainer has two LoRACallbacks; combine them into one.")
        if isinstance(callback, with_twins(BaseFinetuning, ModelPruning)):
            raise MisconfigurationException(
                f"{type(callback).__name__} changes which parameters train, and so does LoRACallback. Remove one "
                "of them; modules_to_save trains whole modules beside the adapters."
            )
    if averaging:
        names = [type(callback).__name__ for callback in averaging]
        rank_zero_info(f"LoRA: {', '.join(names)} keeps a copy of the whole module, the frozen base included.")


def callbacks_of(trainer: Trainer, *kinds: type[Callback]) -> list[Callback]:
    """Return the Trainer's callbacks of these kinds."""
    return [callback for callback in _callbacks(trainer) if isinstance(callback, with_twins(*kinds))]


def check_launcher(strategy: Strategy, module: LightningModule) -> None:
    """Refuse launchers that train copies of a module without adapters, such as ``ddp_spawn``."""
    if get_attachment(module) is None and isinstance(strategy.launcher, with_twins(_MultiProcessingLauncher)):
        raise MisconfigurationException(
            "With this launcher (spawn, fork or notebook) the adapters would exist only in the workers and be lost. "
            "Call lightning_lora.attach(model, callback.config) before trainer.fit, or use strategy='ddp'."
        )


def _callbacks(trainer: Trainer) -> list[Callback]:
    return trainer.callbacks  # type: ignore[attr-defined, no-any-return]


# --- before the first step: adapters and optimizers


def check_before_training(module: LightningModule, layout: Layout, optimizers: list[Optimizer]) -> None:
    """Check that exactly what should train is attached, declared and held by an optimizer."""
    model = AdaptedModel(module)
    if get_attachment(module) is None:
        raise MisconfigurationException("LoRACallback attached nothing to this module before fit began.")
    _check_not_replaced(model)
    _check_declared(model)
    if any(root.attachment.config.adapter_dtype == "float16" for root in model.roots):
        rank_zero_warn(
            "adapter_dtype='float16': Adam's eps (1e-8) underflows to zero in float16, so its updates become NaN. Use "
            "'float32', which costs little, or an optimizer that does not divide by eps."
        )
    groups = [group for optimizer in optimizers for group in original_param_groups(layout, optimizer)]
    if unheld := unheld_parameters(module, groups):
        message = f"No optimizer holds {listed(unheld)}, so they would not train. Return one from configure_optimizers."
        if module.automatic_optimization:
            raise MisconfigurationException(message)
        rank_zero_warn(message)  # the module may step an optimizer that Lightning does not know


def _check_not_replaced(model: AdaptedModel) -> None:
    """Refuse adapted layers that plugins or model surgery have replaced."""
    expected = [join(root.name, layer.name) for root in model.roots for layer in root.attachment.report.layers]
    if lost := [name for name in expected if name not in model.adapters]:
        raise MisconfigurationException(
            f"Replaced after LoRA was attached, so their adapters are gone: {listed(lost)}. Replace layers earlier: in "
            "__init__ or configure_model."
        )


def _check_declared(model: AdaptedModel) -> None:
    """Refuse parameters that would train but not be saved."""
    trainable = [clean_name(name) for name, p in model.module.named_parameters() if p.requires_grad]
    if undeclared := [name for name in trainable if name not in model.trained]:
        raise MisconfigurationException(
            f"Parameters that would train but not be saved, because they belong to no adapter: {listed(undeclared)}. "
            "Name their modules in modules_to_save, or leave them frozen."
        )


# --- the first step: gradients


class GradientCheck:
    """Checks at the first step of each optimizer that every adapter it holds has received a gradient.

    Under manual optimization a module may step an optimizer that Lightning does not know; then the gradients of the
    first batch are checked at its end.
    """

    def __init__(self, module: LightningModule, layout: Layout) -> None:
        self.module, self.layout = module, layout
        self._checked: set[int] = set()  # optimizers
        self._reached: set[str] | None = None  # adapters, by any backward pass so far

    def after_backward(self) -> None:
        """Record which adapters received gradients, if the optimizer may be stepped without Lightning."""
        if not self.module.automatic_optimization and not self._checked:
            self._reached = (self._reached or set()) | reached_adapters(self.module, self.layout)

    def before_step(self, optimizer: Optimizer) -> None:
        """Check the adapters of an optimizer before its first step."""
        if id(optimizer) not in self._checked:
            self._checked.add(id(optimizer))
            held = {id(p) for group in original_param_groups(self.layout, optimizer) for p in group["params"]}
            adapters = AdaptedModel(self.module).adapters.items()
            names = [name for name, adapter in adapters if any(id(p) in held for p in adapter.parameters())]
            _check_reached(names, reached_adapters(self.module, self.layout))

    def after_batch(self) -> None:
        """Check all adapters after a first batch that no known optimizer has stepped."""
        if self._reached is not None and not self._checked:
            self._checked.add(0)
            _check_reached(AdaptedModel(self.module).adapters, self._reached)


def reached_adapters(module: nn.Module, layout: Layout) -> set[str]:
    """Return the names of the adapters that have a gradient in any process; every process must call this."""
    noted, adapters = layout.noted_gradients, AdaptedModel(module).adapters
    flags = [
        any(id(p) in noted if noted is not None else _has_gradient(p) for p in adapter.parameters())
        for adapter in adapters.values()
    ]
    # A process may hold a part of an adapter, or nothing of it, so they have to agree.
    agreed = anywhere(flags, layout.strategy.root_device)  # offloaded parameters lie elsewhere
    return {name for name, is_reached in zip(adapters, agreed, strict=True) if is_reached}


def _check_reached(names: Collection[str], reached: Collection[str]) -> None:
    """Raise if no gradient reached any of these adapters, warn if none reached some."""
    if not (silent := [name for name in names if name not in reached]):
        return
    message = (
        f"No gradient reached the adapters of {listed(silent)} in the first step. Are these layers used in the loss? "
        "Reentrant activation checkpointing over frozen inputs also cuts gradients: set use_reentrant=False."
    )
    if len(silent) == len(names):
        raise MisconfigurationException(message)
    rank_zero_warn(message)


def _has_gradient(parameter: Any) -> bool:
    return parameter.grad is not None and bool(torch.any(local(parameter.grad) != 0))


# --- afterwards, and before evaluating: adapters that were never trained


def warn_if_untrained(layout: Layout, module: LightningModule) -> None:
    """Warn of evaluating a model whose adapters are untrained; every process must call this."""
    if _is_untrained(module, layout):
        rank_zero_warn(
            "No LoRA adapter has been trained yet, so this evaluates the bare base model. Pass the checkpoint of a "
            "trained adapter as ckpt_path."
        )


def check_trained(layout: Layout, trainer: Trainer, module: LightningModule) -> None:
    """Refuse a fit that left all adapters untrained, or warn if it was meant to; every process must call this."""
    if not _is_untrained(module, layout):
        return
    if trainer.global_step:
        rank_zero_warn(f"No LoRA adapter was trained in {trainer.global_step} steps. Was the learning rate zero?")
        return
    message = (
        "This fit made no optimizer step, so no LoRA adapter was trained. Is the train_dataloader empty, or "
        "limit_train_batches, max_steps or max_epochs zero? With manual optimization, step the optimizers."
    )
    if 0 not in (trainer.max_steps, trainer.max_epochs, trainer.limit_train_batches):
        raise MisconfigurationException(message)
    rank_zero_warn(message)


def _is_untrained(module: LightningModule, layout: Layout) -> bool:
    """Return whether all adapters are at their start, so that the model computes what the base does."""
    layers = AdaptedModel(module).layers.values()
    if not layers:
        return False
    with gathered_parameters(module):
        is_trained = any(
            adapter.has_effect(base_parameter(layer, adapter.parameter))
            for layer in layers
            for adapter in layer.adapters().values()
        )
    return not any(anywhere([is_trained], layout.strategy.root_device))  # a process may hold nothing of any B
