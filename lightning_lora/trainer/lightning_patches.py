"""Lightning never takes an adapter's file for a whole model: ``load_from_checkpoint``, and Trainers without LoRA."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from types import ModuleType
from typing import Any

from torch import nn

from lightning_lora.layers import lora_layers
from lightning_lora.state import check_not_merged
from lightning_lora.storage.checkpoint import RECORD_KEY
from lightning_lora.trainer.import_names import change_both, overrides


def install() -> None:
    """Have ``load_from_checkpoint``, and Trainers without a LoRACallback, refuse adapter checkpoints with a remedy.

    Where loading is not strict, Lightning would drop the adapter without a word, and no hook of ours runs there: the
    module is the user's own class, and there is no Trainer, or none that knows of adapters.
    """
    change_both("core.saving", _guard)
    change_both("trainer.connectors.checkpoint_connector", _guard_trainers)


def _guard(saving: ModuleType) -> None:
    original = saving._load_state
    if hasattr(original, "_lora_guard"):
        return

    @functools.wraps(original)
    def load_state(cls: Any, checkpoint: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        if RECORD_KEY in checkpoint and hasattr(cls, "training_step"):  # not a LightningDataModule
            raise RuntimeError(
                f"This checkpoint holds an adapter without its base model, so {cls.__name__}.load_from_checkpoint "
                f"cannot rebuild the module. Build the base and load the adapter into it: model = {cls.__name__}(...); "
                "lightning_lora.load_adapter(model, path)."
            )
        return original(cls, checkpoint, *args, **kwargs)

    load_state._lora_guard = True  # type: ignore[attr-defined]
    saving._load_state = load_state  # type: ignore[attr-defined]


def _guard_trainers(connectors: ModuleType) -> None:
    original = connectors._CheckpointConnector.restore_model
    if hasattr(original, "_lora_guard"):
        return

    @functools.wraps(original)
    def restore_model(connector: Any) -> None:
        module, checkpoint = connector.trainer.lightning_module, connector._loaded_checkpoint
        try:
            if not overrides(module, "on_load_checkpoint"):  # which may attach
                _refuse_bare(module, checkpoint)
            original(connector)
            _refuse_bare(module, checkpoint)
        except Exception:
            checkpoint.clear()  # the Trainer keeps it, and would load it again in the next stage
            raise

    restore_model._lora_guard = True  # type: ignore[attr-defined]
    connectors._CheckpointConnector.restore_model = restore_model


def _refuse_bare(module: nn.Module, checkpoint: Mapping[str, Any]) -> None:
    if RECORD_KEY not in checkpoint or lora_layers(module):
        return
    check_not_merged(module, checkpoint[RECORD_KEY].get("merges", {}))
    raise RuntimeError(
        f"This checkpoint holds an adapter, and this {type(module).__name__} has none that could take it. Add the "
        "LoRACallback to the Trainer's callbacks: to evaluate, LoRACallback() takes all options from the file."
    )
