"""``LightningModule.load_from_checkpoint`` never returns a bare base model from an adapter's file."""

from __future__ import annotations

import functools
from typing import Any

from lightning.pytorch import LightningModule
from lightning.pytorch.core import saving

from lightning_lora.checkpoint_file import RECORD_KEY


def install() -> None:
    """Have ``load_from_checkpoint`` refuse adapter checkpoints with a remedy; safe to repeat.

    With ``strict=False`` Lightning would drop the adapter without a word, and no hook of ours runs there: the module is
    the user's own class, and there is no Trainer.
    """
    original = saving._load_state
    if hasattr(original, "_lora_guard"):
        return

    @functools.wraps(original)
    def load_state(cls: Any, checkpoint: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        if RECORD_KEY in checkpoint and issubclass(cls, LightningModule):
            raise RuntimeError(
                f"This checkpoint holds an adapter without its base model, so {cls.__name__}.load_from_checkpoint "
                f"cannot rebuild the module. Build the base and load the adapter into it: model = {cls.__name__}(...); "
                "lightning_lora.load_adapter(model, path)."
            )
        return original(cls, checkpoint, *args, **kwargs)

    load_state._lora_guard = True  # type: ignore[attr-defined]
    saving._load_state = load_state
