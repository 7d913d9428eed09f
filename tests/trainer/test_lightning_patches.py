"""An adapter's file where a whole model is expected, and ``load_adapter``, which is right instead."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_lora import LoRAConfig, attach, load_adapter, merge
from tests.toys import FEATURES, Toy, loader, trainer
from tests.trainer.test_checkpoints import fitted


@pytest.mark.parametrize("strict", [True, False])
def test_load_from_checkpoint_is_refused(strict: bool, tmp_path: Path) -> None:
    _, _, path = fitted(tmp_path)
    with pytest.raises(RuntimeError, match=r"lightning_lora\.load_adapter\(model, path\)"):
        Toy.load_from_checkpoint(path, strict=strict)


def test_ordinary_checkpoints_still_load(tmp_path: Path) -> None:
    run, module = trainer(), Toy()
    run.fit(module, loader())
    run.save_checkpoint(tmp_path / "plain.ckpt")
    loaded = Toy.load_from_checkpoint(tmp_path / "plain.ckpt")
    x = torch.randn(3, FEATURES)
    assert torch.equal(loaded.net(x), module.net(x))


def test_load_adapter_needs_only_file(tmp_path: Path) -> None:
    _, trained, path = fitted(tmp_path, rank=3, alpha=7.0, modules_to_save=["net.4"], use_rslora=True)
    fresh = Toy()
    load_adapter(fresh, path)
    x = torch.randn(3, FEATURES)
    assert torch.equal(fresh.net(x), trained.net(x))


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("stage", ["fit", "validate", "test", "predict"])
def test_trainer_without_callback_refuses_adapter(stage: str, strict: bool, tmp_path: Path) -> None:
    _, _, path = fitted(tmp_path)
    module = Toy()
    module.strict_loading = strict
    with pytest.raises(RuntimeError, match=r"this Toy has no adapters.*LoRACallback\(\) takes all options"):
        getattr(trainer(), stage)(module, loader(), ckpt_path=path)
    assert not module.losses


@pytest.mark.parametrize("strict", [True, False])
def test_trainer_without_callback_refuses_merged_model(strict: bool, tmp_path: Path) -> None:
    _, merged, path = fitted(tmp_path)
    merge(merged)
    merged.strict_loading = strict
    run = trainer()
    with pytest.raises(RuntimeError, match="already merged"):
        run.test(merged, loader(), ckpt_path=path)
    run.test(merged, loader(), verbose=False)  # nothing of the file is left in the Trainer


def test_module_attaching_in_on_load_checkpoint_needs_no_callback(tmp_path: Path) -> None:
    class Attaches(Toy):
        strict_loading = False  # the base is not in the file

        def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
            attach(self, LoRAConfig(rank=4))

    _, trained, path = fitted(tmp_path, rank=4)
    module = Attaches()
    trainer().test(module, loader(), ckpt_path=path, verbose=False)
    x = torch.randn(3, FEATURES)
    assert torch.equal(module.net(x), trained.net(x))
