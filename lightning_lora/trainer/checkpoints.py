"""Checkpoints that hold the adapter alone: one small file, the same under every strategy."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from lightning.fabric.utilities.rank_zero import rank_zero_info  # type: ignore[attr-defined]
from lightning.pytorch import LightningModule
from lightning.pytorch.strategies import Strategy
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor
from torch.optim import Optimizer
from torchmetrics import Metric

from lightning_lora.attachment import named_tensors
from lightning_lora.fingerprint import Fingerprint, other_base, to_plain
from lightning_lora.layers import lora_layers
from lightning_lora.names import clean_name, walk
from lightning_lora.optimizers import optimizer_names, reordered_state
from lightning_lora.state import (
    adapter_tensors,
    check_not_merged,
    describe,
    mismatch_message,
    mismatches,
    other_shapes,
    record_problems,
)
from lightning_lora.storage.checkpoint import RECORD_KEY, check_is_checkpoint, reading, recorded_base
from lightning_lora.trainer.one_file import in_one_move
from lightning_lora.trainer.strategies.base import Layout
from lightning_lora.trainer.strategies.choice import layout_of
from lightning_lora.trainer.whole_checkpoint import factor_names, load_base

_INSTALLED = "_lora_checkpoints"


class AdapterCheckpoints:
    """Makes a strategy save and load adapters only, in the same small file whatever the strategy.

    It stands in for the strategy's own methods, on the instance, so that everything that saves obeys: ModelCheckpoint
    in all its ways, an exception's checkpoint, the tuners' and ``trainer.save_checkpoint``. While the module has no
    adapters the strategy's own methods run. Tensors are saved whole and optimizer states by the names of their
    parameters, so that any strategy can resume what another has saved.
    """

    _REPLACED = (
        "lightning_module_state_dict",
        "optimizer_state",
        "save_checkpoint",
        "load_checkpoint",
        "load_model_state_dict",
        "load_optimizer_state_dict",
    )

    def __init__(self, strategy: Strategy, layout: Layout) -> None:
        self.strategy, self.layout = strategy, layout
        self.check_base = True
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

    # --- saving

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Return the state to save: adapters, what trains in full, moving statistics and metric states."""
        if not lora_layers(self.module):
            state: dict[str, Any] = self.own["lightning_module_state_dict"]()
            return state
        return self.layout.trained() | self._metric_states()

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """Return an optimizer's state, whole."""
        optimizer = getattr(optimizer, "_optimizer", optimizer)  # inside a LightningOptimizer
        if not lora_layers(self.module):
            state: dict[str, Any] = self.own["optimizer_state"](optimizer)
            return state
        return self.layout.optimizer_state(optimizer)

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        """Add the record and write the file."""
        if lora_layers(self.module):
            # Callbacks such as WeightAveraging put whole models back in after the state dict was made.
            for key in ("state_dict", "current_model_state"):
                if key in checkpoint:
                    checkpoint[key] = self._only_trained(checkpoint[key])
            base = to_plain(self.layout.fingerprint())
            record = describe(self.module) | {"base": base, "optimizers": self._optimizer_names()}
            checkpoint[RECORD_KEY] = record
            with in_one_move(self.strategy, filepath) as place:
                # Past what strategies do of their own, such as writing directories of shards: an adapter is small.
                Strategy.save_checkpoint(self.strategy, checkpoint, place, storage_options=storage_options)
        else:
            self.own["save_checkpoint"](checkpoint, filepath, storage_options=storage_options)

    # --- loading

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """Read the file; one clear error if it is no checkpoint."""
        path = self.strategy.broadcast(checkpoint_path)
        if not lora_layers(self.module):
            read = self.own["load_checkpoint"]
        else:
            read = functools.partial(Strategy.load_checkpoint, self.strategy)
            if Path(path).is_dir():
                raise ValueError(
                    f"{str(path)!r} is a directory: a sharded checkpoint of a whole model, not an adapter's. Nothing "
                    "was changed. Make it one file and give that, which becomes the base: by `python -m "
                    "lightning.pytorch.utilities.consolidate_checkpoint`, or DeepSpeed's by "
                    "lightning.pytorch.utilities.deepspeed.convert_zero_checkpoint_to_fp32_state_dict. Or load it in "
                    "configure_model."
                )
        with reading(path):
            checkpoint = read(path, weights_only=weights_only)
        check_is_checkpoint(checkpoint, path)
        return cast(dict[str, Any], checkpoint)

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Load an adapter, strictly for its own keys; or a full checkpoint from before LoRA as the base."""
        try:
            self._load_model(checkpoint, strict)
            if self._must_load_optimizers():
                self.load_optimizer_state_dict(checkpoint)
        except Exception:
            # The Trainer keeps this dict, and would load it again in the next stage, even one without ckpt_path.
            cast(dict[str, Any], checkpoint).clear()
            raise

    def _load_model(self, checkpoint: Mapping[str, Any], strict: bool) -> None:
        module, state, record = self.module, checkpoint["state_dict"], checkpoint.get(RECORD_KEY)
        if record is not None or any(name in state for name in factor_names(module)):
            self._load_adapter(state, record, strict)
        elif lora_layers(module):
            self._load_base(cast(dict[str, Any], checkpoint), strict)
        else:
            self.own["load_model_state_dict"](checkpoint, strict=strict)

    def _load_adapter(self, state: Mapping[str, Any], record: Mapping[str, Any] | None, strict: bool) -> None:
        module = self.module
        check_not_merged(module, (record or {}).get("merges", {}))
        adapters, others = self.layout.trained(), self._others()
        problems = record_problems(module, record or {"layers": describe(module)["layers"]})
        known = [*others, *self._metric_states()]
        problems += mismatches(adapters, state, known=known if strict else [*known, *state])
        brought = {name: tensor for name, tensor in others.items() if name in state}
        problems += other_shapes(self.layout.shown(brought), state)
        problems += self._other_base(recorded_base(record or {}), state)
        if problems:
            raise ValueError(mismatch_message(type(module).__name__, problems))
        self.layout.fill(adapter_tensors(module), state)
        self.layout.fill_base(brought, state)
        self._load_metrics(state)

    def _other_base(self, recorded: Fingerprint, state: Mapping[str, Any]) -> list[str]:
        """Return how the base differs from the one that was trained on; what the file brings too will not."""
        names = [name for name in recorded if name not in state] if self.check_base else []
        message = other_base(recorded, self.layout.samples(names), type(self.module).__name__)
        return [message] if message else []

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Load optimizer states, each to the parameter of its name."""
        record, states = checkpoint.get(RECORD_KEY), checkpoint.get("optimizer_states")
        if states is None:
            raise KeyError(
                "The checkpoint holds weights only, so training cannot be resumed from it (it was saved with "
                "save_weights_only=True). Load it with lightning_lora.load_adapter and start anew."
            )
        if record is None or not states:
            self.own["load_optimizer_state_dict"](checkpoint)
            return
        mine = self._optimizer_names()
        if [[set(group) for group in groups] for groups in record["optimizers"]] != [
            [set(group) for group in groups] for groups in mine
        ]:
            raise ValueError(
                "The checkpoint's optimizers hold other parameters than this run's, so their moments would end up "
                f"at the wrong ones: {_shapes(record['optimizers'])} in the checkpoint, {_shapes(mine)} here. "
                "Use the same configure_optimizers and lr_ratio, or start from the weights alone."
            )
        for optimizer, state, theirs, ours in zip(
            self.strategy.optimizers, states, record["optimizers"], mine, strict=True
        ):
            names = [name for group in ours for name in group]
            self.layout.load_optimizer_state(optimizer, reordered_state(state, theirs, ours), names)

    def _must_load_optimizers(self) -> bool:
        """Return whether this is the moment to load them: Lightning leaves it to strategies that shard."""
        fits = self.module.trainer.state.fn == TrainerFn.FITTING
        return fits and not self.strategy.lightning_restore_optimizer and bool(lora_layers(self.module))

    def _optimizer_names(self) -> list[list[list[str]]]:
        return optimizer_names(self.module, self.layout.as_configured(self.strategy.optimizers))

    # --- parts of the state

    def _load_metrics(self, state: Mapping[str, Any]) -> None:
        for name, metric in self._metrics():
            prefix = f"{name}."
            own = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
            metric.load_state_dict(own, strict=False)

    def _metrics(self) -> list[tuple[str, Metric]]:
        return [(name, part) for name, part in walk(self.module) if isinstance(part, Metric)]

    def _metric_states(self) -> dict[str, Any]:
        """Return the persistent states of torchmetrics, but no frozen weights that a metric may hold."""
        metrics = self._metrics()
        frozen = {clean_name(name) for name, _ in self.module.named_parameters()} if metrics else set()
        return {
            key: value
            for name, metric in metrics
            for key, value in metric.state_dict(prefix=f"{name}.").items()
            if key not in frozen
        }

    def _others(self) -> dict[str, Tensor]:
        """Return the tensors that a checkpoint may hold besides what was trained."""
        trained = adapter_tensors(self.module)
        return {name: tensor for name, tensor in named_tensors(self.module).items() if name not in trained}

    def _only_trained(self, state: Mapping[str, Any]) -> dict[str, Any]:
        keep = {*adapter_tensors(self.module), *self._metric_states()}
        return {clean: value for name, value in state.items() if (clean := clean_name(name)) in keep}

    def _load_base(self, checkpoint: dict[str, Any], strict: bool) -> None:
        state = checkpoint["state_dict"]
        load_base(self.module, self.layout, state, strict=strict, known=self._metric_states())
        self._load_metrics(state)
        # Loops, optimizers and callbacks of the full run do not apply to training an adapter on its result.
        checkpoint.update(optimizer_states=[], lr_schedulers=[], callbacks={})
        checkpoint.pop("loops", None)
        rank_zero_info(
            "LoRA: the checkpoint holds no adapter; its weights are the frozen base, and training starts anew."
        )


def adapter_checkpoints(strategy: Strategy) -> AdapterCheckpoints:
    """Make a strategy save and load adapters only; safe to repeat.

    Raises:
        NotImplementedError: The strategy is not supported, or not as it is set up.
    """
    found: AdapterCheckpoints | None = vars(strategy).get(_INSTALLED)
    if found is None:
        found = AdapterCheckpoints(strategy, layout_of(strategy))
        found.install()
    return found


def _shapes(names: list[list[list[str]]]) -> str:
    return "; ".join(f"groups of {[len(group) for group in groups]}" for groups in names) or "none"
