"""Precision plugins on a GPU: float32 factors, loss scaling, clipping, exact resumption."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn

from lightning_lora import LoRACallback, lora_layers, merge
from tests.gpu.device import DEVICE, needs_cuda, not_rehearsed, on_device
from tests.toys import Toy, loader
from tests.trainer.test_checkpoints import read

pytestmark = needs_cuda

PRECISIONS = ["32-true", "16-mixed", "bf16-mixed", "bf16-true"]


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step")
def test_precision_trains_float32_factors_and_resumes(precision: str, tmp_path: Path) -> None:
    def fit(name: str, epochs: int, ckpt_path: str | None = None, precision: str = precision) -> tuple[Toy, str]:
        module, checkpoint = Toy(), ModelCheckpoint(tmp_path / name, save_last=True)
        run = on_device(LoRACallback(rank=4), checkpoint, max_epochs=epochs, precision=precision, gradient_clip_val=1.0)
        run.fit(module, loader(), ckpt_path=ckpt_path)
        return module, checkpoint.last_model_path

    whole, last = fit("whole", 2)
    exact, _ = fit("float32", 2, precision="32-true")
    assert whole.losses == pytest.approx(exact.losses, rel=0.05)
    assert {p.dtype for layer in lora_layers(whole).values() for p in layer.lora.parameters()} == {torch.float32}
    assert all(layer.lora.B.any() for layer in lora_layers(whole).values())
    resumed, resumed_last = fit("resumed", 2, fit("half", 1)[1])
    assert len(resumed.losses) == 4
    for name, tensor in read(last)["state_dict"].items():
        torch.testing.assert_close(read(resumed_last)["state_dict"][name], tensor)


@not_rehearsed
def test_float16_loss_scale_is_saved(tmp_path: Path) -> None:
    module, checkpoint = Toy(), ModelCheckpoint(tmp_path, save_last=True)
    run = on_device(LoRACallback(rank=4), checkpoint, precision="16-mixed")
    run.fit(module, loader())
    assert run.precision_plugin.scaler.is_enabled()
    assert any("scale" in str(value) for value in read(checkpoint.last_model_path)["MixedPrecision"])


@not_rehearsed
@pytest.mark.parametrize("mode", ["nf4", "int8"])
def test_bitsandbytes_trains_saves_and_reloads(mode: str, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    from lightning.pytorch.plugins import BitsandbytesPrecision

    def plugin() -> BitsandbytesPrecision:
        return BitsandbytesPrecision(mode, dtype=torch.float16 if mode == "int8" else torch.bfloat16)

    class Built(Toy):
        """Quantized layers need sizes that are multiples of 64."""

        def build(self) -> None:
            with torch.random.fork_rng():
                torch.manual_seed(7)
                self.net = nn.Sequential(nn.Linear(8, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 8))

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=1e-2)

    module, checkpoint = Built(), ModelCheckpoint(tmp_path, save_last=True)
    run = on_device(LoRACallback(rank=4, target_modules=["net.2"]), checkpoint, plugins=[plugin()])
    run.fit(module, loader())
    layer = lora_layers(module)["net.2"]
    assert layer.base_class is not nn.Linear
    assert layer.lora.B.dtype == torch.float32
    assert layer.lora.B.any()
    assert set(read(checkpoint.last_model_path)["state_dict"]) == {"net.2.lora.A", "net.2.lora.B"}
    fresh = Built()
    again = on_device(LoRACallback(rank=4, target_modules=["net.2"]), plugins=[plugin()])
    [found] = again.test(fresh, loader(), ckpt_path=checkpoint.last_model_path, verbose=False)
    [expected] = run.test(module, loader(), verbose=False)
    assert found["test_loss"] == pytest.approx(expected["test_loss"], rel=1e-2)
    with pytest.raises(RuntimeError, match=r"net\.2"):
        merge(module)


@pytest.mark.parametrize("before", [True, False])
def test_inductor_matches_eager(before: bool) -> None:
    pytest.importorskip("triton")
    from lightning_lora import LoRAConfig, attach

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 64)).to(DEVICE)
    x = torch.randn(32, 64, device=DEVICE)
    compiled = torch.compile(model, fullgraph=True) if before else None
    attach(model, LoRAConfig(rank=4))
    compiled = compiled or torch.compile(model, fullgraph=True)
    with torch.no_grad():
        for layer in lora_layers(model).values():
            layer.lora.B.normal_()
    expected = model(x)
    expected.square().mean().backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    found = compiled(x)
    found.square().mean().backward()
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)
    assert gradients.keys() == {f"{i}.lora.{factor}" for i in (0, 2) for factor in "AB"}
    for name, p in model.named_parameters():
        if name in gradients:
            torch.testing.assert_close(p.grad, gradients[name], rtol=1e-3, atol=1e-3)
