"""``load_from_checkpoint`` on an adapter's file, and ``load_adapter``, which is right instead."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lightning_lora import load_adapter
from tests.toys import FEATURES, Toy, loader, trainer
from tests.training.test_adapter_checkpoints import fitted


@pytest.mark.parametrize("strict", [True, False])
def test_load_from_checkpoint_never_returns_a_bare_base_model(strict: bool, tmp_path: Path) -> None:
    _, _, path = fitted(tmp_path)
    with pytest.raises(RuntimeError, match=r"lightning_lora\.load_adapter\(model, path\)"):
        Toy.load_from_checkpoint(path, strict=strict)


def test_ordinary_checkpoints_load_as_ever(tmp_path: Path) -> None:
    run, module = trainer(), Toy()
    run.fit(module, loader())
    run.save_checkpoint(tmp_path / "plain.ckpt")
    loaded = Toy.load_from_checkpoint(tmp_path / "plain.ckpt")
    x = torch.randn(3, FEATURES)
    assert torch.equal(loaded.net(x), module.net(x))


def test_load_adapter_needs_the_file_alone(tmp_path: Path) -> None:
    _, trained, path = fitted(tmp_path, rank=3, alpha=7.0, modules_to_save=["net.4"], use_rslora=True)
    fresh = Toy()
    load_adapter(fresh, path)
    x = torch.randn(3, FEATURES)
    assert torch.equal(fresh.net(x), trained.net(x))
