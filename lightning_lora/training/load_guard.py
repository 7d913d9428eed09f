"""``LightningModule.load_from_checkpoint`` never returns a bare base model from an adapter's file."""

from __future__ import annotations

import functools
import importlib.util
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import lightning.pytorch.core.saving  # noqa: F401 - so that it is there to be guarded
from typing_extensions import override

from lightning_lora.checkpoint_file import RECORD_KEY

_PLACES = ("lightning.pytorch.core.saving", "pytorch_lightning.core.saving")  # Lightning has two import names


def install() -> None:
    """Have ``load_from_checkpoint`` refuse adapter checkpoints with a remedy; safe to repeat.

    With ``strict=False`` Lightning would drop the adapter without a word, and no hook of ours runs there: the module is
    the user's own class, and there is no Trainer.
    """
    for place in _PLACES:
        if place in sys.modules:
            _guard(sys.modules[place])
        elif not any(isinstance(finder, _Watch) for finder in sys.meta_path):
            sys.meta_path.insert(0, _Watch())


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


class _Watch(MetaPathFinder):
    """Guards the other name's loader when a program imports it later."""

    @override
    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname not in _PLACES:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_and_guard(module: ModuleType) -> None:
                execute(module)
                _guard(module)

            spec.loader.exec_module = execute_and_guard  # type: ignore[method-assign]
        return spec
