"""What differs between Lightning's strategies: one small class each, chosen once."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

from lightning.fabric.utilities.rank_zero import rank_zero_info  # type: ignore[attr-defined]
from lightning.pytorch import LightningModule
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy, SingleDeviceStrategy, Strategy
from lightning.pytorch.strategies.launchers.multiprocessing import _MultiProcessingLauncher
from torch import Tensor
from torchmetrics import Metric

from lightning_lora.checkpoint_file import RECORD_KEY, check_is_checkpoint, reading
from lightning_lora.layers import lora_layers
from lightning_lora.optimizers import optimizer_names
from lightning_lora.state import (
    adapter_tensors,
    check_not_merged,
    describe,
    mismatch_message,
    mismatches,
    record_problems,
)
from lightning_lora.targets import clean_name

_INSTALLED = "_lora_checkpoints"


class AdapterCheckpoints:
    """Makes a strategy whose processes each hold the whole model save and load adapters only.

    It stands in for the strategy's own methods, on the instance, so that everything that saves obeys: ModelCheckpoint
    in all its ways, an exception's checkpoint, the tuners' and ``trainer.save_checkpoint``. While the module has no
    adapters the strategy's own methods run.
    """

    _REPLACED = (
        "lightning_module_state_dict",
        "save_checkpoint",
        "load_checkpoint",
        "load_model_state_dict",
        "load_optimizer_state_dict",
    )

    def __init__(self, strategy: Strategy) -> None:
        self.strategy = strategy
        self.own = {name: getattr(strategy, name) for name in self._REPLACED}

    def install(self) -> None:
        """Take the place of the strategy's methods."""
        for name in self._REPLACED:
            setattr(self.strategy, name, getattr(self, name))
        setattr(self.strategy, _INSTALLED, self)

    @property
    def module(self) -> LightningModule:
        """The module that the strategy trains now."""
        assert self.strategy.lightning_module is not None
        return self.strategy.lightning_module

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Return the state to save: adapters, what trains in full, moving statistics and metric states."""
        state: dict[str, Any] = self.own["lightning_module_state_dict"]()
        return self._only_trained(state) if lora_layers(self.module) else state

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        """Add the record and write the file."""
        if lora_layers(self.module):
            # Callbacks such as WeightAveraging put whole models back in after the state dict was made.
            for key in ("state_dict", "current_model_state"):
                if key in checkpoint:
                    checkpoint[key] = self._only_trained(checkpoint[key])
            names = optimizer_names(self.module, self.strategy.optimizers)
            checkpoint[RECORD_KEY] = describe(self.module) | {"optimizers": names}
        self.own["save_checkpoint"](checkpoint, filepath, storage_options=storage_options)

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """Read the file; one clear error if it is no checkpoint."""
        with reading(checkpoint_path):
            checkpoint = self.own["load_checkpoint"](checkpoint_path, weights_only=weights_only)
        check_is_checkpoint(checkpoint, checkpoint_path)
        return cast(dict[str, Any], checkpoint)

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Load an adapter, strictly for its own keys; or a full checkpoint from before LoRA as the base."""
        try:
            self._load_model(checkpoint, strict)
        except Exception:
            # The Trainer keeps this dict, and would load it again in the next stage, even one without ckpt_path.
            cast(dict[str, Any], checkpoint).clear()
            raise

    def _load_model(self, checkpoint: Mapping[str, Any], strict: bool) -> None:
        module, state, record = self.module, checkpoint["state_dict"], checkpoint.get(RECORD_KEY)
        adapters = adapter_tensors(module)
        if record is None and not any(name in state for name in _factors(module)):
            if adapters:
                self._load_base(cast(dict[str, Any], checkpoint), strict)
            else:
                self.own["load_model_state_dict"](checkpoint, strict=strict)
            return
        check_not_merged(module, (record or {}).get("merges", {}))
        own = module.state_dict()
        problems = record_problems(module, record or {"layers": describe(module)["layers"]})
        problems += mismatches(adapters, state, known=own if strict else [*own, *state])
        problems += _other_shapes(own, state, adapters)
        if problems:
            raise ValueError(mismatch_message(type(module).__name__, problems))
        module.load_state_dict(state, strict=False)  # all was checked above

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Load optimizer states if they belong to the same parameters in the same order."""
        record = checkpoint.get(RECORD_KEY)
        mine = optimizer_names(self.module, self.strategy.optimizers)
        if record is not None and checkpoint["optimizer_states"] and record["optimizers"] != mine:
            raise ValueError(
                "The checkpoint's optimizers hold other parameters than this run's, so their moments would end up "
                f"at the wrong ones: {_shapes(record['optimizers'])} in the checkpoint, {_shapes(mine)} here. "
                "Use the same configure_optimizers and lr_ratio, or start from the weights alone."
            )
        self.own["load_optimizer_state_dict"](checkpoint)

    def _only_trained(self, state: Mapping[str, Any]) -> dict[str, Any]:
        keep = set(adapter_tensors(self.module))
        metrics = tuple(f"{name}." for name, part in self.module.named_modules() if isinstance(part, Metric))
        frozen = {clean_name(name) for name, _ in self.module.named_parameters()} - keep
        return {
            clean: value
            for name, value in state.items()
            if (clean := clean_name(name)) in keep or (metrics and clean.startswith(metrics) and clean not in frozen)
        }

    def _load_base(self, checkpoint: dict[str, Any], strict: bool) -> None:
        module, state = self.module, checkpoint["state_dict"]
        own, adapters = module.state_dict(), _factors(module)
        base = {name: value for name, value in own.items() if name not in adapters}
        problems = mismatches(base, state) if strict else _other_shapes(own, state, ())
        if problems:
            raise ValueError(
                f"The checkpoint holds no adapter, and as a base it does not fit {type(module).__name__}; nothing was "
                "changed:\n" + "\n".join(f"  - {problem}" for problem in problems)
            )
        module.load_state_dict(state, strict=False)
        # Loops, optimizers and callbacks of the full run do not apply to training an adapter on its result.
        checkpoint.update(optimizer_states=[], lr_schedulers=[], callbacks={})
        checkpoint.pop("loops", None)
        rank_zero_info(
            "LoRA: the checkpoint holds no adapter; its weights are the frozen base, and training starts anew."
        )


def install_adapter_checkpoints(strategy: Strategy) -> None:
    """Make a strategy save and load adapters only; safe to repeat.

    Raises:
        NotImplementedError: The strategy is not supported.
    """
    if hasattr(strategy, _INSTALLED):
        return
    if isinstance(strategy, DeepSpeedStrategy) or not isinstance(strategy, (SingleDeviceStrategy, DDPStrategy)):
        raise NotImplementedError(
            f"LoRACallback does not support {type(strategy).__name__} yet. Use a single device or strategy='ddp'."
        )
    AdapterCheckpoints(strategy).install()


def trains_in_copies(strategy: Strategy) -> bool:
    """Return whether workers train pickled copies of the module, as with ``ddp_spawn`` and in notebooks."""
    return isinstance(strategy.launcher, _MultiProcessingLauncher)


def _factors(module: LightningModule) -> set[str]:
    return {f"{name}.lora.{key}" for name, layer in lora_layers(module).items() for key in layer.lora.state_dict()}


def _other_shapes(own: Mapping[str, Tensor], state: Mapping[str, Any], skip: Any) -> list[str]:
    found = [
        f"{name}: file {tuple(value.shape)}, model {tuple(own[name].shape)}"
        for name, value in state.items()
        if name in own and name not in skip and isinstance(own[name], Tensor) and own[name].shape != value.shape
    ]
    return [f"other shapes: {', '.join(found)}"] if found else []


def _shapes(names: list[list[list[str]]]) -> str:
    return "; ".join(f"groups of {[len(group) for group in groups]}" for groups in names) or "none"
