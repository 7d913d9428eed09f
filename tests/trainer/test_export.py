"""``export_dir``: a fit that has succeeded has exported, and what stood there before is never lost without a word."""

from __future__ import annotations

import enum
import functools
from argparse import Namespace
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn

from lightning_lora import LoRACallback, adapter_state_dict, load_adapter
from lightning_lora.cli import main
from lightning_lora.trainer import export
from tests.contract import assert_same_bits
from tests.toys import Toy, loader, trainer


class Color(enum.Enum):
    RED = 1


@dataclass
class Options:
    """Hyper-parameters as users write them: nothing in here is a plain type."""

    @dataclass
    class Inner:
        rate: float = 0.1

    path: Path = Path("here")
    color: Color = Color.RED
    inner: Inner = field(default_factory=Inner)
    size: Any = field(default_factory=lambda: np.float32(0.5))
    call: Any = field(default_factory=lambda: functools.partial(int, base=2))
    space: Any = field(default_factory=lambda: Namespace(rate=0.1))
    counts: Any = field(default_factory=lambda: defaultdict(list, a=[1]))
    tags: Any = field(default_factory=lambda: {"a", "b"})
    head: Any = field(default_factory=lambda: nn.Linear(2, 2))


class WithOptions(Toy):
    def __init__(self, options: Options) -> None:
        super().__init__()
        self.save_hyperparameters()


def test_hyper_parameters_of_any_type_leave_the_checkpoint_readable(tmp_path: Path) -> None:
    checkpoint, target = ModelCheckpoint(tmp_path, monitor="train_loss", mode="max"), tmp_path / "peft"
    callback = LoRACallback(rank=4, export_dir=str(target))
    run = trainer(callback, checkpoint, max_epochs=2, max_steps=-1)
    run.fit(WithOptions(Options()), loader())
    path, exported, loaded, started = checkpoint.best_model_path, Toy(), Toy(), Toy()
    load_adapter(exported, target)
    load_adapter(loaded, path)
    trainer(LoRACallback(rank=4, init_from=path, allow_untrained=["*"]), max_epochs=0).fit(started, loader())
    saved = torch.load(path, weights_only=False)["state_dict"]
    for module in (exported, loaded, started):
        assert_same_bits(adapter_state_dict(module), saved)
    assert main(["inspect", path]) == 0


def test_export_takes_the_best_checkpoint_from_memory_if_it_is_the_last_state(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "peft"
    monkeypatch.setattr(export, "read_checkpoint", lambda path: pytest.fail(f"read {path}"))
    module = Toy()
    run = trainer(LoRACallback(rank=4, export_dir=str(target)), ModelCheckpoint(tmp_path), max_epochs=2, max_steps=-1)
    run.fit(module, loader())
    exported = Toy()
    load_adapter(exported, target)
    assert_same_bits(adapter_state_dict(exported), adapter_state_dict(module))
