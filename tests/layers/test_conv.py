"""Convolutions: every option gives the same forward, merged or not, and the layout is PEFT's for one group."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from torch import Tensor, nn

from lightning_lora import LoRAConfig, attach, disabled, lora_layers, merge, merged
from tests.contract import assert_unchanged, snapshot, train

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


def adapted(layer: nn.Module, rng: torch.Generator, **lora: object) -> nn.ModuleDict:
    model = nn.ModuleDict({"layer": layer.double()})
    attach(model, LoRAConfig(**{"rank": 1, "target_modules": ["layer"], **lora}))
    train(layer, rng)
    return model


def check(layer: nn.Module, x: Tensor, rng: torch.Generator) -> None:
    """Forward equals merged forward, has an effect, and gradients reach both factors."""
    model = adapted(layer, rng)
    output = layer(x)
    output.square().sum().backward()
    assert all(factor.grad.abs().max() > 0 for factor in layer.lora.parameters())
    with merged(model):
        torch.testing.assert_close(layer(x), output, rtol=0, atol=1e-10)
    with disabled(model):
        assert (layer(x) - output).abs().max() > 1e-3


CONV_OPTIONS = [
    (kernel, stride, padding, dilation, groups, mode)
    for kernel, stride, padding, dilation, groups, mode in itertools.product(
        (1, 3), (1, 2), (0, 1, "same", "valid"), (1, 2), (1, 2, 4), ("zeros", "reflect", "replicate", "circular")
    )
    if not (padding == "same" and stride > 1) and not (padding in (0, "valid") and mode != "zeros")
]


@pytest.mark.filterwarnings("ignore:These adapters are not smaller.*")
@pytest.mark.parametrize("dimensions", [1, 2, 3])
def test_merged_convolution_equals_adapted_for_all_options(dimensions: int, rng):
    assert len(CONV_OPTIONS) >= 60
    for kernel, stride, padding, dilation, groups, mode in CONV_OPTIONS:
        layer = CONVOLUTIONS[dimensions - 1](4, 8, kernel, stride, padding, dilation, groups, padding_mode=mode)
        x = torch.randn(2, 4, *[8] * dimensions, generator=rng, dtype=torch.float64)
        check(layer, x, rng)


@pytest.mark.filterwarnings("ignore:These adapters are not smaller.*")
@pytest.mark.parametrize("dimensions", [1, 2, 3])
def test_merged_transposed_convolution_equals_adapted_for_all_options(dimensions: int, rng):
    options = itertools.product((1, 3), (2, 3), (0, 1), (0, 1), (1, 2), (1, 2, 4))
    for kernel, stride, padding, output_padding, dilation, groups in options:
        if 2 * padding > dilation * (kernel - 1):
            continue
        layer = TRANSPOSED[dimensions - 1](4, 8, kernel, stride, padding, output_padding, groups, True, dilation)
        check(layer, torch.randn(2, 4, *[4] * dimensions, generator=rng, dtype=torch.float64), rng)


def test_update_follows_output_size(rng):
    layer = nn.ConvTranspose2d(4, 6, 3, stride=2)
    model, x = adapted(layer, rng), torch.randn(1, 4, 5, 5, generator=rng, dtype=torch.float64)
    for size in ([11, 11], [12, 11], [12, 12]):
        output = layer(x, output_size=size)
        assert list(output.shape[2:]) == size
        with merged(model):
            torch.testing.assert_close(layer(x, output_size=size), output, rtol=0, atol=1e-10)


@pytest.mark.parametrize("kernel", [(1, 5), (3, 1), (2, 3)])
def test_kernel_shapes(kernel: tuple[int, int], rng):
    x = torch.randn(2, 4, 9, 9, generator=rng, dtype=torch.float64)
    check(nn.Conv2d(4, 6, kernel, padding=(1, 2), dilation=(2, 1)), x, rng)


def test_depthwise_convolution_warns_of_wasteful_rank(rng):
    layer = nn.Conv2d(8, 8, 3, groups=8, padding=1)
    with pytest.warns(UserWarning, match=r"layer \(rank 9, weight 8 x 9\)|rank 5, weight 8 x 9"):
        adapted(layer, rng, rank=5)
    assert layer.lora.A.shape == (5, 9)
    with pytest.raises(ValueError, match="rank 10 is above 8"):
        attach(nn.ModuleDict({"layer": nn.Conv2d(8, 8, 3, groups=8)}), LoRAConfig(rank=10, target_modules=["layer"]))


def test_unbatched_input(rng):
    layer = nn.Conv2d(4, 6, 3, padding=1, padding_mode="circular")
    model, x = adapted(layer, rng), torch.randn(4, 7, 7, generator=rng, dtype=torch.float64)
    output = layer(x)
    merge(model)
    torch.testing.assert_close(layer(x), output, rtol=0, atol=1e-10)


class Standardized(nn.Conv2d):
    """A convolution that standardizes its kernel, as in some ResNets: a forward of its own."""

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return self._conv_forward(x, weight, self.bias)


class PadsItself(nn.Conv1d):
    """A convolution that pads on one side only, as causal ones do."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(nn.functional.pad(x, (2, 0)))


@pytest.mark.parametrize(
    ("layer", "shape"), [(Standardized(4, 6, 3), (2, 4, 7, 7)), (PadsItself(4, 6, 3), (2, 4, 9))], ids=["2d", "1d"]
)
def test_subclass_with_own_forward_is_exact(layer: nn.Module, shape: tuple[int, ...], rng):
    check(copy.deepcopy(layer), torch.randn(shape, generator=rng, dtype=torch.float64), rng)


def test_dropout_refused_if_weight_carries_update():
    model = nn.ModuleDict({"layer": Standardized(4, 6, 3)})
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"Standardized has its own forward.*dropout=0"):
        attach(model, LoRAConfig(rank=1, dropout=0.1, target_modules=["layer"]))
    assert_unchanged(model, before)


def test_dropout_drops_adapter_input_only(rng):
    layer = nn.Conv2d(4, 6, 3).double()
    base, x = copy.deepcopy(layer), torch.randn(2, 4, 7, 7, generator=rng, dtype=torch.float64)
    model = adapted(layer, rng, dropout=0.5)
    assert not torch.equal(layer.train()(x), layer(x))
    with torch.no_grad():
        layer.lora.B.zero_()
    assert torch.equal(layer(x), base(x))
    assert lora_layers(model)


def test_all_linear_excludes_convolutions():
    model = nn.Sequential(nn.Conv2d(4, 6, 3), nn.Flatten(), nn.Linear(54, 40))
    attach(model, LoRAConfig(rank=2))
    assert list(lora_layers(model)) == ["2"]


@pytest.mark.parametrize("kind", CONVOLUTIONS)
def test_forward_gradients_and_merge_match_peft_for_one_group(kind: type[nn.Module], rng):
    peft = pytest.importorskip("peft")
    dimensions = CONVOLUTIONS.index(kind) + 1
    ours = nn.ModuleDict({"layer": kind(4, 6, 3, stride=2, padding=1)})
    theirs = peft.get_peft_model(
        nn.Sequential(copy.deepcopy(ours["layer"])), peft.LoraConfig(r=2, lora_alpha=6, target_modules=["0"])
    )
    attach(ours, LoRAConfig(rank=2, alpha=6.0, target_modules=["layer"]))
    layer, wrapped = ours["layer"], theirs.base_model.model[0]
    train(layer, rng)
    with torch.no_grad():
        wrapped.lora_A.default.weight.copy_(layer.lora.A.view_as(wrapped.lora_A.default.weight))
        wrapped.lora_B.default.weight.copy_(layer.lora.B.view_as(wrapped.lora_B.default.weight))
    x = torch.randn(2, 4, *[7] * dimensions, generator=rng)
    outputs = layer(x), wrapped(x)
    torch.testing.assert_close(*outputs, rtol=0, atol=1e-5)
    for output in outputs:
        output.square().mean().backward()
    for mine, its in ((layer.lora.A, wrapped.lora_A), (layer.lora.B, wrapped.lora_B)):
        torch.testing.assert_close(mine.grad, its.default.weight.grad.view_as(mine), rtol=0, atol=1e-5)
    merge(ours)
    wrapped.merge()
    torch.testing.assert_close(layer.weight, wrapped.base_layer.weight, rtol=0, atol=1e-5)


def test_dense_reference_holds_where_peft_differs(rng):
    """PEFT drops padding_mode from its branch, so its merged layer computes something else than its forward."""
    peft = pytest.importorskip("peft")
    layer = nn.Conv1d(4, 6, 3, padding=1, padding_mode="reflect")
    theirs = peft.get_peft_model(
        nn.Sequential(copy.deepcopy(layer)), peft.LoraConfig(r=2, lora_alpha=6, target_modules=["0"])
    )
    wrapped = theirs.base_model.model[0]
    nn.init.normal_(wrapped.lora_B.default.weight, generator=rng)
    x = torch.randn(2, 4, 9, generator=rng)
    before = wrapped(x).detach()
    wrapped.merge()
    assert (wrapped(x) - before).abs().max() > 1e-2
    check(layer, x.double(), rng)
