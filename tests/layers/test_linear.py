"""Linear layers: subclasses keep their own forward, and transformers' Conv1D is one of them."""

from __future__ import annotations

from contextlib import suppress

import pytest
import torch
from torch import Tensor, nn

from lightning_lora import LoRAConfig, attach, merge
from lightning_lora.layers import adapter_type
from lightning_lora.layers.conv import ConvAdapter
from lightning_lora.layers.linear import Conv1DAdapter, LinearAdapter
from tests.contract import IN, OUT, CountingLinear, train


def test_subclass_forward_runs_once_per_call(rng):
    model = nn.Sequential(CountingLinear(IN, OUT))
    attach(model, LoRAConfig(rank=4))
    model(torch.randn(2, IN, generator=rng))
    assert model[0].calls == 1


class WithExtras(nn.Linear):
    """A subclass with state of its own, a submodule and more arguments."""

    def __init__(self, *sizes: int) -> None:
        super().__init__(*sizes)
        self.inner = nn.LayerNorm(sizes[1])
        self.register_buffer("offset", torch.ones(sizes[1]))

    def forward(self, x: Tensor, shift: float = 0.0) -> Tensor:
        return super().forward(x) + self.offset * shift


def test_subclass_keeps_submodules_buffers_and_arguments(rng):
    layer, x = WithExtras(IN, OUT), torch.randn(2, IN, generator=rng)
    before = layer(x, shift=2.0)
    attach(layer, LoRAConfig(rank=4))
    assert torch.equal(layer(x, shift=2.0), before)
    assert torch.equal(layer(x=x, shift=2.0), before)
    assert not layer.inner.weight.requires_grad
    train(layer, rng)
    assert torch.allclose(layer(x, shift=2.0) - layer(x), torch.tensor(2.0), atol=1e-5)


class ScaledLinear(nn.Linear):
    """A subclass whose output is not the product with its weight."""

    def forward(self, x: Tensor) -> Tensor:
        return 3.0 * super().forward(x)


def test_subclass_that_scales_output_merges_exactly_or_refuses(rng):
    model, x = nn.Sequential(ScaledLinear(IN, OUT)), torch.randn(2, IN, generator=rng)
    attach(model, LoRAConfig(rank=4))
    train(model[0], rng)
    output = model(x)
    with suppress(RuntimeError):
        merge(model)
    assert torch.allclose(model(x), output, atol=1e-4)


@pytest.mark.parametrize(
    ("module", "expected"),
    [
        (nn.Linear(4, 4), LinearAdapter),
        (CountingLinear(4, 4), LinearAdapter),
        (nn.Conv1d(4, 4, 1), ConvAdapter),
        (nn.LayerNorm(4), None),
        (nn.Identity(), None),
    ],
    ids=lambda value: getattr(value, "__name__", type(value).__name__),
)
def test_adapter_type_of_layers(module: nn.Module, expected: type | None):
    assert adapter_type(module) is expected


def test_conv1d_is_recognised_without_transformers(rng):
    class Conv1D(nn.Module):
        def __init__(self, nf: int, nx: int) -> None:
            super().__init__()
            self.nf = nf
            self.weight, self.bias = nn.Parameter(torch.randn(nx, nf)), nn.Parameter(torch.zeros(nf))

        def forward(self, x: Tensor) -> Tensor:
            return x @ self.weight + self.bias

    layer, x = Conv1D(OUT, IN), torch.randn(2, IN, generator=rng)
    assert adapter_type(layer) is Conv1DAdapter
    attach(layer, LoRAConfig(rank=4))
    assert layer.lora.A.shape == (4, IN)
    assert layer.lora.B.shape == (OUT, 4)
    train(layer, rng)
    output = layer(x)
    merge(layer)
    assert torch.allclose(layer(x), output, atol=1e-4)


def test_conv_layer_named_conv1d_is_a_convolution():
    class Conv1D(nn.Conv1d):
        pass

    assert adapter_type(Conv1D(4, 4, 1)) is ConvAdapter
