"""Layers replaced by precision plugins, and quantized layers: adapted, trained, saved."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.precision import Precision
from torch import Tensor, nn

from lightning_lora import LoRACallback, LoRAConfig, LoRALayer, attach, detach, lora_layers, merge
from tests.contract import assert_same_bits, error, train_all
from tests.toys import FEATURES, BuiltInConfigureModel, BuiltInSetup, Toy, loader, trainer
from tests.trainer.test_checkpoints import read
from tests.trainer.test_precision import factors

LAYERS = ["net.0", "net.2", "net.4"]
Linear = nn.Linear  # torch's, even while a plugin has replaced nn.Linear


class EightBit(Linear):
    """A quantized layer like bitsandbytes': an nn.Linear with a byte weight and its own forward."""

    def __init__(self, in_features: int, out_features: int, bias: bool = True, **kwargs: Any) -> None:
        super().__init__(in_features, out_features, bias=bias, **kwargs)
        self.take(Linear(in_features, out_features))

    def take(self, linear: nn.Linear) -> None:
        weight = linear.weight.detach()
        self.register_buffer("step", weight.abs().max() / 127)
        self.weight = nn.Parameter((weight / self.step + 128).round().to(torch.uint8), requires_grad=False)
        self.bias = linear.bias

    def forward(self, input: Tensor) -> Tensor:
        weight = (self.weight.to(input.dtype) - 128) * self.step.to(input.dtype)
        return nn.functional.linear(input, weight, self.bias.to(input.dtype))


def eight_bit(linear: nn.Linear) -> nn.Linear:
    layer = EightBit(linear.in_features, linear.out_features)
    layer.take(linear)
    return layer


class Replaces(Precision):
    """Replaces each nn.Linear once, like BitsandbytesPrecision and TransformerEnginePrecision."""

    def convert_module(self, module: nn.Module) -> nn.Module:
        if not any(isinstance(part, EightBit) for part in module.modules()):
            for parent in list(module.modules()):
                for name, child in list(parent.named_children()):
                    if isinstance(child, Linear):
                        setattr(parent, name, eight_bit(child))
        return module


class StandsIn(Replaces):
    """Also replaces nn.Linear by its class inside ``configure_model``, as those do."""

    @contextmanager
    def module_init_context(self) -> Iterator[None]:
        with patch("torch.nn.Linear", EightBit):
            yield


@pytest.mark.parametrize("plugin", [Replaces, StandsIn])
@pytest.mark.parametrize("kind", [Toy, BuiltInSetup, BuiltInConfigureModel])
def test_plugin_replaces_layers_before_attaching(kind, plugin, tmp_path: Path) -> None:
    module, checkpoint = kind(), ModelCheckpoint(tmp_path, save_last=True)
    run = trainer(LoRACallback(rank=4), checkpoint, plugins=[plugin()], max_epochs=1, max_steps=-1)
    run.fit(module, loader())
    assert_adapted_once(module)
    assert all(layer.lora.B.any() for layer in lora_layers(module).values())
    assert set(read(checkpoint.last_model_path)["state_dict"]) == set(factors(module))
    fresh = kind()
    [found] = trainer(LoRACallback(rank=4), plugins=[plugin()]).test(
        fresh, loader(), ckpt_path=checkpoint.last_model_path, verbose=False
    )
    assert_adapted_once(fresh)
    assert [found] == run.test(module, loader(), verbose=False)
    trainer(LoRACallback(rank=4), plugins=[plugin()]).fit(module, loader())
    assert_adapted_once(module)


def test_plugin_keeps_existing_adapters(rng) -> None:
    module, callback = Toy(), LoRACallback(rank=4)
    attach(module, callback.config)
    train_all(module, rng)
    trained = {name: factor.detach().clone() for name, factor in factors(module).items()}
    try:
        trainer(callback, plugins=[Replaces()], max_steps=0).fit(module, loader())
    except (MisconfigurationException, ValueError, RuntimeError) as refusal:
        assert "net.0" in str(refusal)  # noqa: PT017 - attaching may also work
    assert_same_bits(factors(module), trained)


def assert_adapted_once(module: nn.Module) -> None:
    layers = lora_layers(module)
    assert list(layers) == LAYERS
    for layer in layers.values():
        assert type(layer).base_class is EightBit
        assert layer.weight.dtype == torch.uint8
        assert not any(isinstance(part, LoRALayer) for part in layer.lora.modules())


def test_plugin_without_linear_layers_never_trains_bare_base() -> None:
    class Foreign(nn.Module):
        """A layer like TransformerEngine's: not an nn.Linear, but with its attribute names."""

        def __init__(self, linear: nn.Linear) -> None:
            super().__init__()
            self.in_features, self.out_features = linear.in_features, linear.out_features
            self.weight, self.bias = linear.weight, linear.bias

        def forward(self, inp: Tensor) -> Tensor:
            return nn.functional.linear(inp, self.weight, self.bias)

    class ReplacesAll(Precision):
        def convert_module(self, module: nn.Module) -> nn.Module:
            for index in (0, 2, 4):
                if not isinstance(module.net[index], Foreign):
                    module.net[index] = Foreign(module.net[index])
            return module

    module = Toy()
    try:
        trainer(LoRACallback(rank=4), plugins=[ReplacesAll()]).fit(module, loader())
    except (MisconfigurationException, ValueError) as refusal:
        assert "Toy has no linear layer" in str(refusal)  # noqa: PT017 - attaching may also work
        assert not module.losses
    else:
        assert all(isinstance(module.net[index], Foreign) for index in (0, 2, 4))
        assert list(lora_layers(module)) == LAYERS


def _four_bit(kind: str) -> Callable[[nn.Linear], nn.Module]:
    def quantize(linear: nn.Linear) -> nn.Module:
        bitsandbytes = pytest.importorskip("bitsandbytes")
        layer = bitsandbytes.nn.Linear4bit(linear.in_features, linear.out_features, quant_type=kind)
        layer.load_state_dict(linear.state_dict())
        return layer.to("cpu")

    return quantize


def _bitsandbytes_int8(linear: nn.Linear) -> nn.Module:
    bitsandbytes = pytest.importorskip("bitsandbytes")
    layer = bitsandbytes.nn.Linear8bitLt(linear.in_features, linear.out_features, has_fp16_weights=False)
    layer.load_state_dict(linear.state_dict())
    return layer.to("cpu")


def _torchao_int8(linear: nn.Linear) -> nn.Module:
    torchao = pytest.importorskip("torchao.quantization")
    torchao.quantize_(linear, torchao.Int8WeightOnlyConfig())
    return linear


QUANTIZERS = {
    "stand-in": eight_bit,
    "bitsandbytes nf4": _four_bit("nf4"),
    "bitsandbytes fp4": _four_bit("fp4"),
    "bitsandbytes int8": _bitsandbytes_int8,
    "torchao int8": _torchao_int8,
}
MIDDLE = {"rank": 4, "target_modules": ["net.2"]}
each_quantizer = pytest.mark.parametrize("quantize", QUANTIZERS.values(), ids=QUANTIZERS)


def quantized(quantize: Callable[[nn.Linear], nn.Module]) -> Toy:
    """Return a module with one large quantized layer; the toys' layers are too small for bitsandbytes."""
    module = Toy()
    with torch.random.fork_rng():
        torch.manual_seed(7)
        first, middle, last = nn.Linear(FEATURES, 64), nn.Linear(64, 64), nn.Linear(64, FEATURES)
    module.net = nn.Sequential(first, nn.Tanh(), quantize(middle), nn.Tanh(), last)
    return module


@each_quantizer
def test_update_is_added_to_quantized_output(quantize, rng):
    layer, x = quantize(nn.Linear(64, 32)), torch.randn(5, 64, generator=rng)
    base = layer(x).double()
    model = nn.ModuleDict({"layer": layer})
    attach(model, LoRAConfig(rank=4, alpha=6.0))
    assert torch.equal(layer(x).double(), base)
    train_all(model, rng)
    A, B = layer.lora.A.double(), layer.lora.B.double()
    assert A.dtype == B.dtype == torch.float64
    assert error(layer(x), base + 1.5 * (x.double() @ A.T) @ B.T) < 2e-6


@each_quantizer
def test_quantized_model_trains_saves_and_reloads(quantize, tmp_path: Path) -> None:
    module, checkpoint = quantized(quantize), ModelCheckpoint(tmp_path, save_last=True)
    run = trainer(LoRACallback(**MIDDLE), checkpoint, max_steps=60, max_epochs=-1)
    run.fit(module, loader())
    assert sum(module.losses[-4:]) < 0.6 * sum(module.losses[:4])
    assert {p.dtype for p in factors(module).values()} == {torch.float32}
    assert set(read(checkpoint.last_model_path)["state_dict"]) == set(factors(module))
    [expected] = run.test(module, loader(), verbose=False)
    [found] = trainer(LoRACallback(**MIDDLE)).test(
        quantized(quantize), loader(), ckpt_path=checkpoint.last_model_path, verbose=False
    )
    assert found == expected
    detach(module)
    x = torch.randn(4, FEATURES)
    with torch.no_grad():
        assert torch.equal(module.net.eval()(x), quantized(quantize).net.eval()(x))


@each_quantizer
def test_merge_into_quantized_weight_is_rejected(quantize, rng) -> None:
    module = quantized(quantize)
    attach(module, LoRAConfig(**MIDDLE))
    train_all(module, rng)
    x = torch.randn(4, FEATURES)
    before = module.net(x)
    with pytest.raises(RuntimeError, match=r"net\.2.*quantized"):
        merge(module)
    assert list(lora_layers(module)) == ["net.2"]
    assert torch.equal(module.net(x), before)
