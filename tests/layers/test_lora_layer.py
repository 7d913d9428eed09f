"""The adapted layer: precision, dropout, modes, its repr, and the class swap that makes it."""

from __future__ import annotations

import copy
import math
import pickle

import pytest
import torch
from torch import nn

from lightning_lora import LoRAConfig, attach, detach, disabled, merge, merged
from lightning_lora.layers import Swapped, swap_in, swap_out
from tests.contract import (
    CountingLinear,
    assert_same_bits,
    assert_unchanged,
    error,
    raises_and_changes_nothing,
    snapshot,
    train,
    train_all,
)


def adapted(layer: nn.Module, **options: object) -> nn.Module:
    """Return a layer with an adapter of rank 2 and scaling 1.5."""
    attach(layer, LoRAConfig(**{"rank": 2, "alpha": 3.0, **options}))
    return layer


@pytest.mark.parametrize("adapter_dtype", ["float32", "bfloat16", "float16", "float64"])
@pytest.mark.parametrize("base_dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_factors_keep_adapter_dtype_and_output_keeps_base_dtype(adapter_dtype: str, base_dtype, rng):
    layer = adapted(nn.Linear(24, 20).to(base_dtype), adapter_dtype=adapter_dtype)
    kept = torch.float64 if base_dtype == torch.float64 else getattr(torch, adapter_dtype)
    assert {factor.dtype for factor in layer.lora.parameters()} == {kept}
    train(layer, rng)
    x = torch.randn(5, 24, generator=rng).to(base_dtype)
    output = layer(x)
    output.sum().backward()
    assert output.dtype == base_dtype
    assert layer.lora.A.grad.dtype == kept
    A, B = layer.lora.A.double(), layer.lora.B.double()
    truth = nn.functional.linear(x.double(), layer.weight.double() + 1.5 * B @ A, layer.bias.double())
    coarsest = max(torch.finfo(dtype).eps for dtype in (base_dtype, layer.lora.A.dtype))
    assert error(output, truth) <= 8 * coarsest


def test_factors_keep_update_below_bfloat16_precision():
    layer = adapted(nn.Linear(24, 20).bfloat16())
    before = layer.lora.A.detach().clone()
    with torch.no_grad():
        layer.lora.A.mul_(1 + 2.0**-12)
    assert (before != layer.lora.A).all()


@pytest.mark.parametrize("layer", [nn.Linear(24, 20), nn.Embedding(24, 20)], ids=["linear", "embedding"])
def test_autocast_decides_compute_dtype(layer: nn.Module, rng):
    attach(layer, LoRAConfig(rank=2, alpha=3.0, target_modules=".*"))
    train(layer, rng)
    tokens = isinstance(layer, nn.Embedding)
    x = torch.arange(24) if tokens else torch.randn(5, 24, generator=rng)
    exact = layer(x)
    with torch.autocast("cpu", torch.bfloat16):
        output = layer(x)
        output.float().square().sum().backward()
        with merged(layer):
            merged_output = layer(x)
    assert output.dtype == (torch.float32 if tokens else torch.bfloat16)
    assert merged_output.dtype == output.dtype
    assert error(output, exact) < 0.03
    assert {factor.grad.dtype for factor in layer.lora.parameters()} == {torch.float32}


# --- dropout: with W = 0 and A = B = I the output is the scaled input of the adapter


def visible_dropout(p: float) -> nn.Linear:
    layer = nn.Linear(64, 64)
    with pytest.warns(UserWarning, match="not smaller"):
        attach(layer, LoRAConfig(rank=64, alpha=128.0, dropout=p))
    with torch.no_grad():
        for tensor in (layer.weight, layer.bias):
            tensor.zero_()
        layer.lora.A.copy_(torch.eye(64))
        layer.lora.B.copy_(torch.eye(64))
    return layer


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_dropout_zeroes_adapter_input_and_rescales(p: float):
    layer = visible_dropout(p)
    output = layer.train()(torch.ones(2000, 64))
    kept = output != 0
    assert torch.allclose(output[kept], torch.tensor(2.0 / (1 - p)))
    deviation = math.sqrt(p * (1 - p) / output.numel())
    assert abs(kept.double().mean().item() - (1 - p)) < 5 * deviation
    assert kept.double().mean(0).min() > 0  # of every element, not of whole rows


def test_dropout_is_off_in_eval():
    assert (visible_dropout(0.9).eval()(torch.ones(3, 64)) == 2.0).all()


def test_dropout_leaves_base_alone(rng):
    layer, x = nn.Linear(24, 20), torch.randn(5, 24, generator=rng)
    before = layer(x)
    adapted(layer, dropout=0.9)
    assert torch.equal(layer.train()(x), before)
    train(layer, rng)
    with disabled(layer):
        assert torch.equal(layer(x), before)
    with merged(layer):
        assert torch.equal(layer(x), layer(x))


def test_mean_over_dropout_is_output_without(rng):
    layer, x = adapted(nn.Linear(24, 20), dropout=0.5), torch.randn(24, generator=rng)
    train(layer, rng)
    exact = layer.eval()(x)
    samples = layer.train()(x.expand(20_000, 24)).double()
    assert ((samples.mean(0) - exact).abs() < 5 * samples.std(0) / math.sqrt(len(samples))).all()


def test_dropout_draws_anew_and_only_if_set(rng):
    x = torch.randn(5, 24, generator=rng)
    layer = adapted(nn.Linear(24, 20), dropout=0.5)
    train(layer, rng)
    assert not torch.equal(layer(x), layer(x))
    plain, before = adapted(nn.Linear(24, 20)), torch.get_rng_state()
    plain(x)
    assert torch.equal(torch.get_rng_state(), before)


# --- calls and switches


def test_input_as_keyword_argument(rng):
    layer, x = adapted(nn.Linear(24, 20)), torch.randn(5, 24, generator=rng)
    train(layer, rng)
    assert torch.equal(layer(input=x), layer(x))


@pytest.mark.parametrize("shape", [(24,), (1, 24), (2, 3, 4, 24), (0, 24)])
def test_any_number_of_leading_dimensions(shape: tuple[int, ...], rng):
    layer, x = adapted(nn.Linear(24, 20)), torch.randn(shape, generator=rng)
    train(layer, rng)
    W = layer.weight + 1.5 * layer.lora.B @ layer.lora.A
    assert torch.allclose(layer(x), x @ W.T + layer.bias, atol=1e-5)


def test_reset_parameters_restores_start(rng):
    layer = adapted(nn.Linear(24, 20))
    start = {name: factor.clone() for name, factor in layer.lora.state_dict().items()}
    train(layer, rng)
    layer.lora.reset_parameters()
    assert_same_bits(layer.lora.state_dict(), start)
    assert all(factor.requires_grad for factor in layer.lora.parameters())


def test_repr_shows_rank_scaling_and_dropout():
    layer = adapted(nn.Linear(24, 20), dropout=0.25)
    assert (layer.rank, layer.scaling) == (2, 1.5)
    assert "LoRALinear" in repr(layer)
    assert "rank=2, scaling=1.5, dropout=0.25" in repr(layer)


def test_functional_call_and_per_sample_gradients(rng):
    layer, x = adapted(nn.Linear(24, 20)), torch.randn(5, 24, generator=rng)
    train(layer, rng)
    factors = {f"lora.{name}": p.detach() for name, p in layer.lora.named_parameters()}

    def loss(values: dict[str, torch.Tensor], row: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(layer, values, row).square().sum()

    per_sample = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(factors, x)
    layer(x).square().sum().backward()
    assert torch.allclose(per_sample["lora.A"].sum(0), layer.lora.A.grad, rtol=1e-4, atol=1e-4)
    assert torch.allclose(per_sample["lora.B"].sum(0), layer.lora.B.grad, rtol=1e-4, atol=1e-4)


def test_gradcheck(rng):
    layer, x = adapted(nn.Linear(6, 5).double()), torch.randn(3, 6, generator=rng, dtype=torch.float64)
    train(layer, rng)

    def output(A: torch.Tensor, B: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(layer, {"lora.A": A, "lora.B": B}, x)

    factors = tuple(factor.detach().clone().requires_grad_() for factor in (layer.lora.A, layer.lora.B))
    assert torch.autograd.gradcheck(output, factors)


# --- the class swap


class Loud(Swapped):
    """A behavior to mix in."""

    class_prefix = "Loud"

    def forward(self, *args):
        return -super().forward(*args)


def test_swapped_module_keeps_its_identity():
    layer = nn.Linear(4, 4)
    before = snapshot(layer)
    swap_in(layer, Loud)
    assert isinstance(layer, nn.Linear)
    assert isinstance(layer, Loud)
    assert type(layer).__name__ == "LoudLinear"
    assert type(layer).__module__ == nn.Linear.__module__
    assert type(layer).__doc__ == nn.Linear.__doc__
    swap_out(layer)
    assert_unchanged(layer, before)


def test_one_swapped_class_per_base_class():
    layers = [nn.Linear(4, 4), nn.Linear(5, 5), CountingLinear(4, 4)]
    for layer in layers:
        swap_in(layer, Loud)
    assert type(layers[0]) is type(layers[1]) is not type(layers[2])


def test_base_classes_of_same_name_are_distinct():
    def make() -> type[nn.Linear]:
        class Twin(nn.Linear):
            pass

        return Twin

    one, two = make()(4, 4), make()(4, 4)
    kinds = type(one), type(two)
    for layer in (one, two):
        swap_in(layer, Loud)
        swap_out(layer)
    assert (type(one), type(two)) == kinds


def test_swapped_module_copies_and_pickles():
    layer = CountingLinear(4, 4)
    layer.calls = 3
    swap_in(layer, Loud)
    copies = [pickle.loads(pickle.dumps(layer, protocol)) for protocol in range(2, pickle.HIGHEST_PROTOCOL + 1)]
    for twin in [*copies, copy.copy(layer), copy.deepcopy(layer)]:
        assert type(twin) is type(layer)
        assert twin.calls == 3
        assert twin.weight.equal(layer.weight)
        swap_out(twin)
        assert type(twin) is CountingLinear


def test_swaps_stack_and_come_off_in_reverse():
    class Louder(Loud):
        class_prefix = "Louder"

    layer = nn.Linear(4, 4)
    swap_in(layer, Loud)
    swap_in(layer, Louder)
    swap_out(layer)
    assert type(layer).__name__ == "LoudLinear"
    swap_out(layer)
    assert type(layer) is nn.Linear


# --- what torch offers for other layers


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:.*quantize", "ignore::torch.jit.TracerWarning")
def test_scripting_raises_with_the_remedy_and_tracing_works(rng):
    model, x = nn.Sequential(nn.Linear(8, 8)), torch.randn(3, 8, generator=rng)
    attach(model, LoRAConfig(rank=2))
    train_all(model, rng)
    with pytest.raises(RuntimeError, match=r"merge\(model\) first, or use torch.jit.trace"):
        torch.jit.script(model)
    assert torch.equal(torch.jit.trace(model, x)(x), model(x))
    merge(model)
    assert torch.equal(torch.jit.script(model)(x), model(x))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:.*quantize", "ignore::torch.jit.TracerWarning")
def test_quantizing_an_adapted_model_raises_instead_of_skipping_its_layers(rng):
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    attach(model, LoRAConfig(rank=2))
    train_all(model, rng)
    with raises_and_changes_nothing(model, RuntimeError, r"merge\(model\) first, or quantize before"):
        torch.ao.quantization.quantize_dynamic(model)
    merge(model)
    assert type(torch.ao.quantization.quantize_dynamic(model)[0]) is not nn.Linear


def test_layer_prepared_for_quantization_is_adapted():
    model = nn.Sequential(nn.Linear(8, 8))
    model[0].qconfig = "a user's"
    attach(model, LoRAConfig(rank=2))
    assert copy.deepcopy(model)[0].qconfig == "a user's"
    detach(model)
    assert model[0].qconfig == "a user's"
