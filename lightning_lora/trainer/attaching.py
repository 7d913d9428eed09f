"""The moment of attaching: at once or after the method that builds the layers; options may come from a checkpoint."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from typing import Any, TypeVar

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.fabric.utilities.rank_zero import rank_zero_info  # type: ignore[attr-defined]
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.plugins.precision import (
    DeepSpeedPrecision,
    FSDPPrecision,
    HalfPrecision,
    MixedPrecision,
    Precision,
)
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel

from lightning_lora.adapted_model import AdaptedModel
from lightning_lora.attachment import get_attachment, request
from lightning_lora.config import LoRAConfig
from lightning_lora.names import listed
from lightning_lora.sharding import is_fully_sharded
from lightning_lora.storage.checkpoint import saved_options
from lightning_lora.surgery import attach, detach
from lightning_lora.trainer.checks import has_averaging
from lightning_lora.trainer.hints import Coverage, coverage
from lightning_lora.trainer.lightning_patches import chosen_record, overrides, with_twins
from lightning_lora.trainer.strategies.base import Layout

Module = TypeVar("Module", bound=nn.Module)

# These convert later, since factors keep their own precision. Float64 cannot: a checkpoint would lose bits before.
_CONVERT_LATER = (DeepSpeedPrecision, FSDPPrecision, HalfPrecision, MixedPrecision, Precision)


class MethodWraps:
    """Wraps methods of modules until ``remove`` is called."""

    def __init__(self) -> None:
        self._wrapped: list[tuple[nn.Module, str]] = []

    def after(self, module: Module, name: str, afterwards: Callable[[Module, Any], None]) -> None:
        """Call ``afterwards(module, result)`` after each run of this method of the module."""
        method = getattr(module, name)

        @functools.wraps(method)  # keeps Lightning's is_overridden right
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            result = method(*args, **kwargs)
            afterwards(module, result)
            return result

        setattr(module, name, wrapper)
        self._wrapped.append((module, name))

    def remove(self) -> None:
        """Restore every method."""
        for module, name in reversed(self._wrapped):
            wrapper = vars(module).pop(name, None)
            method = getattr(wrapper, "__wrapped__", None)
            if method is not None and getattr(method, "__func__", None) is not getattr(type(module), name, None):
                setattr(module, name, method)  # it was set on the instance before, as LightningCLI does
        self._wrapped.clear()


class Attaching:
    """Attaches the callback's adapters: late enough for the module's layers, early enough for the strategy.

    Attributes:
        coverage: The result of ``hints.coverage`` while the module was whole: FSDP hides sizes.

    Args:
        config: What the callback asks for.
        layout: That of the strategy.
        begun: Called with the module when it has adapters for the first time.
        is_fit: Whether the run trains.
    """

    def __init__(
        self, config: LoRAConfig, layout: Layout, begun: Callable[[LightningModule], None], *, is_fit: bool
    ) -> None:
        self._config, self._seed = config, int(os.environ.get("PL_GLOBAL_SEED", "0"))  # of seed_everything
        self._layout, self._begun, self._is_fit = layout, begun, is_fit
        self.coverage: Coverage | None = None

    def arrange(self, trainer: Trainer, module: LightningModule, wraps: MethodWraps) -> None:
        """Attach now, or wrap the method of the module after which to attach."""
        model = AdaptedModel(module)
        if not self._is_fit and model.merges and not model.layers:
            return  # evaluating a merged model: the adapter is in its weights
        self._is_first = get_attachment(module) is None
        # Evaluating without options takes any adapters: those of the checkpoint, or those that are attached.
        self._takes_any = not self._is_fit and self._config == LoRAConfig()
        if self._takes_any:
            self._take_saved_options(trainer, module)
        request(module, *self._options(module))  # for attach(self) in configure_model
        self._layout.before_wrapping = None
        if overrides(module, "configure_model"):
            self._layout.before_wrapping = functools.partial(self._attach_before_wrapping, module)
            wraps.after(module, "configure_model", self._attach_after)
        elif overrides(module, "setup") and not has_averaging(trainer):
            wraps.after(module, "setup", self._attach_after)  # it may build layers or load base weights
        else:
            self._attach(module)

    def _take_saved_options(self, trainer: Trainer, module: LightningModule) -> None:
        """Take the options from the checkpoint that is about to be loaded, if there is one."""
        saved, before = saved_options(chosen_record(trainer)), get_attachment(module)
        if saved is None:
            return
        is_wrapped = any(is_fully_sharded(part) for part in module.modules())
        if before is not None and before.config == self._config != saved[0] and not is_wrapped:
            detach(module)  # what an earlier stage attached by default
        self._config, self._seed = saved
        rank_zero_info("LoRA: rank, targets and all other options come from the checkpoint.")

    def _options(self, module: LightningModule) -> tuple[LoRAConfig, int]:
        """Return the config and the seed to attach with: those of present adapters, if any will do."""
        before = get_attachment(module)
        if before is None:
            return self._config, self._seed
        return before.config if self._takes_any else self._config, before.seed

    def _attach_after(self, module: LightningModule, result: Any) -> None:  # noqa: ARG002
        self._attach(module)

    def _attach_before_wrapping(self, module: LightningModule) -> None:
        if get_attachment(module) is None:
            raise RuntimeError(
                f"{type(module).__name__}.configure_model wraps parts of itself before it has adapters; adapters that "
                "come later would not be synchronised between processes. Build all layers, call "
                "lightning_lora.attach(self), then wrap."
            )
        self._attach(module)

    def _attach(self, module: LightningModule) -> None:
        options, before = self._options(module), get_attachment(module)
        if before is not None and (before.config, before.seed) == options and _is_flattened(module):
            self._layout.attached(module)  # nothing more can be attached
            return
        convert_layers(module.trainer.precision_plugin, module)
        report = attach(module, options[0], seed=options[1])
        self.coverage = coverage(module)
        self._layout.attached(module)
        if self._is_first:
            self._is_first = False
            rank_zero_info(f"{report}")
            self._begun(module)


def _is_flattened(module: nn.Module) -> bool:
    """Return whether FSDP has made units in a module, so that its tensors cannot be read."""
    return any(isinstance(part, FullyShardedDataParallel) for part in module.modules())


def convert_layers(plugin: Precision, module: LightningModule) -> None:
    """Let plugins such as bitsandbytes and TransformerEngine replace layers before attaching.

    Lightning converts later, when the layers carry adapters, which would be lost. Such plugins leave a converted module
    alone, so the second time changes nothing.

    Raises:
        MisconfigurationException: The plugin replaces layers that carry adapters already. Nothing was changed.
    """
    if type(plugin) in with_twins(*_CONVERT_LATER):
        return
    before = [(part, dict(part._modules)) for part in module.modules()]
    adapted = AdaptedModel(module).layers
    plugin.convert_module(module)
    there = set(module.modules())
    if lost := [name for name, layer in adapted.items() if layer not in there]:
        for part, children in before:
            part._modules.update(children)
        raise MisconfigurationException(
            f"{type(plugin).__name__} replaces {listed(lost)}, which carry adapters already; the adapters would be "
            "lost. Leave attaching to LoRACallback, which has the layers replaced first."
        )
