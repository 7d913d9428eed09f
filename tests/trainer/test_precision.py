"""Every precision that Lightning has on a CPU: factors keep theirs, learn in it, and resume in any other."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.precision import MixedPrecision
from torch import Tensor, nn

from lightning_lora import LoRACallback, detach, lora_layers
from tests.contract import assert_same_bits, train_all
from tests.toys import Toy, digest, loader, network, trainer

BASE = {
    "32-true": torch.float32,
    "bf16-mixed": torch.float32,
    "16-mixed": torch.float32,
    "bf16-true": torch.bfloat16,
    "16-true": torch.float16,
    "64-true": torch.float64,
}
each_precision = pytest.mark.parametrize("precision", BASE)


def options(precision: str) -> dict[str, Any]:
    """Return the Trainer's arguments; given the name 16-mixed on a CPU, it would take bf16-mixed instead."""
    if precision == "16-mixed":
        return {"plugins": [MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=256.0))]}
    return {"precision": precision}


def kept(precision: str, adapter_dtype: str = "float32") -> torch.dtype:
    """Return the dtype of the factors: what was asked for, but a float64 layer has float64 factors."""
    return torch.float64 if precision == "64-true" else getattr(torch, adapter_dtype)


def factors(module: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in module.named_parameters() if ".lora." in name}


class Watches(Callback):
    """Notes the dtypes of factors, of their gradients and moments and of the base, whenever there is a hook."""

    def __init__(self) -> None:
        self.seen: dict[str, set[torch.dtype]] = {"factors": set(), "gradients": set(), "moments": set(), "base": set()}
        self.looks = 0

    def look(self, trainer: Any, module: Any, *_: Any, **__: Any) -> None:
        self.looks += 1
        own = factors(module).values()
        self.seen["factors"] |= {p.dtype for p in own}
        self.seen["gradients"] |= {p.grad.dtype for p in own if p.grad is not None}
        self.seen["base"] |= {p.dtype for name, p in module.named_parameters() if ".lora." not in name}
        states = [entry for optimizer in trainer.optimizers for entry in optimizer.state.values()]
        self.seen["moments"] |= {entry[key].dtype for entry in states for key in ("exp_avg", "exp_avg_sq")}

    on_fit_start = on_train_batch_start = on_train_batch_end = on_fit_end = teardown = look


@pytest.mark.parametrize("adapter_dtype", ["float32", "bfloat16"])
@each_precision
def test_factors_gradients_and_moments_keep_adapter_dtype(precision, adapter_dtype):
    module, watches = Toy(), Watches()
    callback = LoRACallback(rank=4, adapter_dtype=adapter_dtype)
    trainer(callback, watches, max_steps=3, **options(precision)).fit(module, loader())
    own = {kept(precision, adapter_dtype)}
    assert watches.looks == 1 + 3 + 3 + 1 + 1
    assert watches.seen == {"factors": own, "gradients": own, "moments": own, "base": {BASE[precision]}}
    assert {p.dtype for p in factors(module).values()} == own


@each_precision
def test_base_is_unchanged_but_for_dtype(precision):
    module = Toy()
    trainer(LoRACallback(rank=4), max_steps=4, **options(precision)).fit(module, loader())
    assert all(layer.lora.B.any() for layer in lora_layers(module).values())
    detach(module)
    assert digest(module.net) == digest(network().to(BASE[precision]))


class Clips(Callback):
    """Keeps the gradients before and after Lightning clips them."""

    def on_before_optimizer_step(self, trainer: Any, module: Any, optimizer: Any) -> None:
        self.before = self.gradients(module)

    def on_train_batch_end(self, trainer: Any, module: Any, *_: Any) -> None:
        self.after = self.gradients(module)

    def gradients(self, module: nn.Module) -> Tensor:
        return torch.cat([p.grad.double().flatten() for p in module.parameters() if p.grad is not None])


@pytest.mark.parametrize("by", ["norm", "value"])
@each_precision
def test_gradient_clipping_covers_all_adapters(precision: str, by: str) -> None:
    clips, limit = Clips(), 1e-3
    run = trainer(
        LoRACallback(rank=4), clips, gradient_clip_val=limit, gradient_clip_algorithm=by, **options(precision)
    )
    run.fit(Toy(), loader())
    before = clips.before
    assert before.norm() > 2 * limit
    assert before.abs().max() > 2 * limit
    truth = before * (limit / before.norm()) if by == "norm" else before.clamp(-limit, limit)
    torch.testing.assert_close(clips.after, truth, rtol=1e-4, atol=1e-12)


def moved_share(precision: str, adapter_dtype: str) -> float:
    """Return which share of the entries 20 small steps move, where both factors get gradients from the start."""

    class Slow(Toy):
        def configure_optimizers(self) -> Any:
            return torch.optim.AdamW(self.parameters(), lr=1e-5, weight_decay=0.0)

        def on_train_start(self) -> None:
            for layer in lora_layers(self).values():
                nn.init.normal_(layer.lora.B)
            self.before = {name: p.detach().clone() for name, p in factors(self).items()}

    module = Slow()
    callback = LoRACallback(rank=4, adapter_dtype=adapter_dtype)
    trainer(callback, max_steps=20, max_epochs=-1, **options(precision)).fit(module, loader())
    moved = [(p != module.before[name]).flatten() for name, p in factors(module).items()]
    return torch.cat(moved).double().mean().item()


@pytest.mark.filterwarnings("ignore:LoRA. this run may learn little")  # at this rate, on purpose
@pytest.mark.parametrize("precision", ["bf16-true", "16-true", "16-mixed"])
def test_small_steps_need_float32_factors(precision: str) -> None:
    assert moved_share(precision, "float32") > 0.95
    assert moved_share(precision, "bfloat16") < 0.1


@each_precision
def test_adamw_losses_are_finite_and_fall(precision: str) -> None:
    module = Toy()
    trainer(LoRACallback(rank=4), max_steps=60, max_epochs=-1, **options(precision)).fit(module, loader())
    assert all(map(math.isfinite, module.losses))
    assert sum(module.losses[-4:]) < 0.6 * sum(module.losses[:4])
    assert all(p.isfinite().all() for p in factors(module).values())


class Resumed(Callback):
    """Keeps factors and moments as they are when training goes on."""

    def on_train_start(self, trainer: Any, module: Any) -> None:
        self.step = trainer.global_step
        own = factors(module)
        self.factors = {name: p.detach().clone() for name, p in own.items()}
        [optimizer] = trainer.optimizers
        self.moments = {name: optimizer.state[p]["exp_avg"].clone() for name, p in own.items()}


@pytest.mark.parametrize("first", BASE)
def test_checkpoint_resumes_in_any_precision(first: str, tmp_path: Path) -> None:
    module, checkpoint = Toy(), ModelCheckpoint(tmp_path, save_last=True)
    run = trainer(LoRACallback(rank=4), checkpoint, max_epochs=1, max_steps=-1, **options(first))
    run.fit(module, loader())
    saved, [optimizer] = factors(module), run.optimizers
    for second in BASE:
        resumed, resumes = Toy(), Resumed()
        run = trainer(LoRACallback(rank=4), resumes, max_epochs=2, max_steps=-1, **options(second))
        run.fit(resumed, loader(), ckpt_path=checkpoint.last_model_path)
        assert (resumes.step, run.global_step, len(resumed.losses)) == (4, 8, 4)
        assert all(map(math.isfinite, resumed.losses))
        dtype = kept(second)
        assert_same_bits(resumes.factors, {name: p.detach().to(dtype) for name, p in saved.items()})
        assert_same_bits(resumes.moments, {name: optimizer.state[p]["exp_avg"].to(dtype) for name, p in saved.items()})


@pytest.mark.parametrize("precision", ["bf16-true", "16-true", "32-true"])
def test_merge_rounds_once(precision: str) -> None:
    class Remembers(Callback):
        def on_fit_end(self, trainer: Any, module: Any) -> None:
            train_all(module, torch.Generator().manual_seed(0))
            self.truth = {
                name: layer.state_dict()["weight"].double() + 2.0 * layer.lora.B.double() @ layer.lora.A.double()
                for name, layer in lora_layers(module).items()
            }

    module, remembers = Toy(), Remembers()
    callback = LoRACallback(rank=4, alpha=8.0, merge_on_teardown=True)
    trainer(callback, remembers, **options(precision)).fit(module, loader())
    digits = torch.finfo(BASE[precision]).eps
    for name, truth in remembers.truth.items():
        weight = module.get_submodule(name).weight
        assert weight.dtype == BASE[precision]
        half_a_step = 2.0 ** truth.abs().log2().floor() * digits / 2
        summing = 16 * torch.finfo(torch.float32).eps * truth.abs().max()  # the float32 sum before the rounding
        assert ((weight.double() - truth).abs() <= half_a_step + summing).all()


def test_float16_factors_warn() -> None:
    with (
        pytest.warns(UserWarning, match="Adam's eps .1e-8. underflows to zero in float16"),
        pytest.raises(MisconfigurationException, match="Training diverged: NaN or infinity in"),
    ):
        trainer(LoRACallback(rank=2, adapter_dtype="float16"), max_steps=1).fit(Toy(), loader())
