"""``LoRACallback``: LoRA at the moments that Lightning's hooks give. Each hook calls rooms below; no mathematics."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.fabric.utilities.rank_zero import rank_zero_info, rank_zero_warn  # type: ignore[attr-defined]
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import (
    BaseFinetuning,
    LearningRateFinder,
    ModelPruning,
    StochasticWeightAveraging,
    WeightAveraging,
)
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import nn
from torch.optim import Optimizer
from typing_extensions import override

from lightning_lora import checks, load_guard
from lightning_lora.attachment import get_attachment, merges
from lightning_lora.config import LoRAConfig
from lightning_lora.freezing import freeze_norms
from lightning_lora.layers import lora_layers
from lightning_lora.optimizers import repair_optimizers, unpack_configured
from lightning_lora.option_types import PositiveFloat
from lightning_lora.state import adapter_tensors
from lightning_lora.strategies import install_adapter_checkpoints, trains_in_copies
from lightning_lora.surgery import attach, merge
from lightning_lora.targets import clean_name

_AVERAGING = (WeightAveraging, StochasticWeightAveraging)

load_guard.install()


class LoRACallback(Callback):
    """Fine-tunes any LightningModule with LoRA: add it to the Trainer's callbacks.

    It attaches adapters to the configured layers at the right moment, freezes everything else, makes the optimizers
    hold the adapter parameters only, saves and loads checkpoints that hold the adapter alone, and checks that every
    adapter really trains.

    Args:
        merge_on_teardown: Fold the adapters into the weights when a fit has succeeded, and leave an ordinary model.
        lr_ratio: Learning rate of ``B`` over that of ``A`` (LoRA+, Hayou et al. 2024, who recommend about 16); 1 means
            plain LoRA.
        **lora: The options of ``LoRAConfig``.

    Raises:
        TypeError: An option has the wrong type.
        ValueError: An option has a value that makes no sense.

    Example:
        >>> from lightning_lora import LoRACallback
        >>> LoRACallback(rank=8, target_modules=["q_proj", "v_proj"]).config.rank
        8
    """

    def __init__(self, *, merge_on_teardown: bool = False, lr_ratio: PositiveFloat = 1.0, **lora: Any) -> None:
        self.config = LoRAConfig(**lora)
        if not lr_ratio > 0:
            raise ValueError(f"LoRACallback.lr_ratio must be positive, got {lr_ratio!r}.")
        self.merge_on_teardown = merge_on_teardown
        self.lr_ratio = float(lr_ratio)
        self._wrapped: list[tuple[LightningModule, str]] = []
        self._load_hook: Any = None
        self._fit_succeeded = False
        self._checked_optimizers: set[int] = set()

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Called when fit, validate, test or predict begins: attach, or arrange to attach once the layers exist."""
        self._unwrap()
        self._fit_succeeded = False
        self._refuse_company(trainer)
        self._refuse_lost_training(trainer, pl_module, stage)
        try:
            install_adapter_checkpoints(trainer.strategy)
        except NotImplementedError as error:
            raise MisconfigurationException(str(error)) from error
        self._load_hook = pl_module.register_load_state_dict_post_hook(  # type: ignore[no-untyped-call]
            _allow_missing_base
        )
        if stage == TrainerFn.FITTING:
            self._wrap(pl_module, "configure_optimizers", self._repair_configured)
        elif merges(pl_module) and not lora_layers(pl_module):
            return  # evaluating a merged model: the adapter is in its weights
        self._attach_in_time(trainer, pl_module)

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Called when fit begins, after the optimizers exist: check that what will train is what was asked for."""
        freeze_norms(pl_module)  # sync_batchnorm makes new norm layers
        if get_attachment(pl_module) is None:
            raise MisconfigurationException("LoRACallback attached nothing to this module before fit began.")
        _refuse(checks.replaced_layers(pl_module))
        _refuse(checks.undeclared_training(pl_module))
        unheld = checks.unheld_parameters(pl_module, trainer.optimizers)
        if pl_module.automatic_optimization:
            _refuse(unheld)
        else:
            _warn(unheld)  # the module may step an optimizer that Lightning does not know

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Called when training begins."""
        self._checked_optimizers.clear()
        if self.lr_ratio != 1.0 and _has(trainer, LearningRateFinder):
            rank_zero_warn(
                "LearningRateFinder gives every parameter group the same learning rate, so "
                f"lr_ratio={self.lr_ratio} has no effect. Find the rate without lr_ratio first."
            )

    @override
    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Called before each optimizer step: at the first one, name the adapters that no gradient reached."""
        if id(optimizer) not in self._checked_optimizers:
            self._checked_optimizers.add(id(optimizer))
            message, affects_all = checks.unreached_adapters(pl_module, optimizer)
            if affects_all:
                _refuse(message)
            else:
                _warn(message)

    @override
    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Called when validation begins."""
        if trainer.state.fn != TrainerFn.FITTING:
            _warn(checks.untrained_adapters(pl_module))

    @override
    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Called when testing begins."""
        if trainer.state.fn != TrainerFn.FITTING:
            _warn(checks.untrained_adapters(pl_module))

    @override
    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Called when predicting begins."""
        if trainer.state.fn != TrainerFn.FITTING:
            _warn(checks.untrained_adapters(pl_module))

    @override
    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Called when fit has succeeded; not after an exception, and not when only a tuner ran."""
        self._fit_succeeded = True

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Called when a stage ends: merge if asked to, and take every wrap off the module."""
        self._unwrap()
        if self.merge_on_teardown and self._fit_succeeded:
            merge(pl_module)
            rank_zero_info("LoRA: adapters merged into the weights.")

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Called when a stage fails: adapters stay, since checkpoints of the exception are written after this."""
        self._unwrap()

    # --- attaching

    def _attach_in_time(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if is_overridden("configure_model", pl_module):
            self._wrap(pl_module, "configure_model", self._attach_after)
        elif is_overridden("setup", pl_module) and not _has(trainer, *_AVERAGING):
            # It may build layers or load base weights. (Averaging callbacks copy the module before it runs.)
            self._wrap(pl_module, "setup", self._attach_after)
        else:
            self._attach(pl_module)

    def _attach_after(self, pl_module: LightningModule, result: Any) -> None:
        self._attach(pl_module)

    def _attach(self, pl_module: LightningModule) -> None:
        before = get_attachment(pl_module)
        seed = before.seed if before is not None else int(os.environ.get("PL_GLOBAL_SEED", "0"))
        report = attach(pl_module, self.config, seed=seed)
        if before is None:
            rank_zero_info(f"{report}")

    # --- wrapping methods of the module, for as long as a stage lasts

    def _wrap(self, pl_module: LightningModule, name: str, afterwards: Callable[[LightningModule, Any], None]) -> None:
        """Have ``afterwards(module, result)`` run whenever this method of the module has run."""
        method = getattr(pl_module, name)

        @functools.wraps(method)  # keeps Lightning's is_overridden right
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            result = method(*args, **kwargs)
            afterwards(pl_module, result)
            return result

        setattr(pl_module, name, wrapper)
        self._wrapped.append((pl_module, name))

    def _unwrap(self) -> None:
        for pl_module, name in reversed(self._wrapped):
            wrapper = vars(pl_module).pop(name, None)
            method = getattr(wrapper, "__wrapped__", None)
            if method is not None and getattr(method, "__func__", None) is not getattr(type(pl_module), name, None):
                setattr(pl_module, name, method)  # it stood on the instance before, as LightningCLI's do
        self._wrapped.clear()
        if self._load_hook is not None:
            self._load_hook.remove()
            self._load_hook = None

    def _repair_configured(self, pl_module: LightningModule, configured: Any) -> None:
        optimizers, schedulers = unpack_configured(configured)
        if not optimizers:
            return
        try:
            repair_optimizers(pl_module, optimizers, schedulers, lr_ratio=self.lr_ratio)
        except ValueError as error:
            raise MisconfigurationException(str(error)) from error
        for index, optimizer in enumerate(optimizers):
            if not any(group["params"] for group in optimizer.param_groups):
                rank_zero_warn(
                    f"LoRA: optimizer {index} ({type(optimizer).__name__}) holds no trainable parameter now."
                )

    # --- checks

    def _refuse_company(self, trainer: Trainer) -> None:
        callbacks = _callbacks(trainer)
        for callback in callbacks[: callbacks.index(self)]:
            if isinstance(callback, _AVERAGING):
                raise MisconfigurationException(
                    f"{type(callback).__name__} is listed before LoRACallback, so it would average a copy without "
                    "adapters. List LoRACallback first."
                )
        for callback in callbacks:
            if isinstance(callback, LoRACallback) and callback is not self:
                raise MisconfigurationException("Two LoRACallbacks in one Trainer; put all targets into one.")
            if isinstance(callback, (BaseFinetuning, ModelPruning)):
                raise MisconfigurationException(
                    f"{type(callback).__name__} changes which parameters train, and so does LoRACallback. Remove one "
                    "of them; modules_to_save trains whole modules beside the adapters."
                )

    def _refuse_lost_training(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == TrainerFn.FITTING and trains_in_copies(trainer.strategy) and get_attachment(pl_module) is None:
            raise MisconfigurationException(
                "With this launcher (spawn, fork or a notebook's) the adapters would exist in the workers only and be "
                "lost. Call lightning_lora.attach(model, callback.config) before trainer.fit, or use strategy='ddp'."
            )


def _callbacks(trainer: Trainer) -> list[Callback]:
    return trainer.callbacks  # type: ignore[attr-defined, no-any-return]


def _has(trainer: Trainer, *kinds: type[Callback]) -> bool:
    return any(isinstance(callback, kinds) for callback in _callbacks(trainer))


def _refuse(message: str | None) -> None:
    if message is not None:
        raise MisconfigurationException(message)


def _warn(message: str | None) -> None:
    if message is not None:
        rank_zero_warn(message)


def _allow_missing_base(module: nn.Module, incompatible: Any) -> None:
    """Let an adapter-only state dict load into a module or a copy of it: base keys may be absent, nothing else.

    Averaging callbacks keep such copies, with ``module.`` before every name, and load them by themselves.
    """
    required = set(adapter_tensors(module))
    base = {clean_name(name) for name in module.state_dict()} - required
    missing = incompatible.missing_keys
    missing[:] = [name for name in missing if not {clean_name(name), clean_name(name).removeprefix("module.")} & base]
