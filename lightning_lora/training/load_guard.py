"""``LightningModule.load_from_checkpoint`` never returns a bare base model from an adapter's file."""

from __future__ import annotations

import functools
from types import ModuleType
from typing import Any

from lightning_lora.checkpoint_file import RECORD_KEY
from lightning_lora.training.import_names import change_both


def install() -> None:
    """Have ``load_from_checkpoint`` refuse adapter checkpoints with a remedy.

    With ``strict=False`` Lightning would drop the adapter without a word, and no hook of ours runs there: the module is
    the user's own class, and there is no Trainer.
    """
    change_both("core.saving", _guard)


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
