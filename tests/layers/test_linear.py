"""Linear layers: subclasses keep their own forward, and transformers' Conv1D is one of them."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lightning_lora import LoRAConfig, adapter_state_dict, attach, lora_layers, merge, preflight
from lightning_lora.adapted_model import AdaptedModel
from lightning_lora.cli import main
from lightning_lora.fingerprint import fingerprint, to_plain
from lightning_lora.layers import adapter_type
from lightning_lora.layers.conv import ConvAdapter
from lightning_lora.layers.linear import Conv1DAdapter, LinearAdapter
from lightning_lora.state import describe
from lightning_lora.storage.checkpoint import RECORD_KEY
from tests.contract import IN, OUT, CountingLinear, LinearLike, train


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


def test_conv1d_is_recognized_without_transformers(rng):
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


# --- linear layers that are no nn.Linear


class Like(LinearLike):
    """A base for modules with the parameters of a linear layer."""

    def __init__(self, size: int = 8) -> None:
        super().__init__(size, size)


class Scaled(Like):
    def forward(self, x: Tensor) -> Tensor:
        return 1.001 * super().forward(x)


class Transposed(Like):
    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight + self.bias


class Quantizing(Like):
    def forward(self, x: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        return super().forward(x / scale), scale


class Noisy(Like):
    def forward(self, x: Tensor) -> Tensor:
        output = super().forward(x)
        return output + torch.randn_like(output) if self.training else output


class Normalizing(Like):
    def forward(self, x: Tensor) -> Tensor:
        return x @ nn.functional.normalize(self.weight).T + self.bias


class OverTheBatch(Like):
    def forward(self, x: Tensor) -> Tensor:
        output = super().forward(x)
        return output - output.mean(0)


class WithBuffer(Like):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("steps", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.steps += 1
        return super().forward(x)


NOT_LINEAR = [Scaled, Transposed, Quantizing, Noisy, Normalizing, OverTheBatch, WithBuffer]


@pytest.mark.parametrize("kind", NOT_LINEAR)
@pytest.mark.parametrize("values", ["trained", "zero", "meta"])
def test_modules_that_do_not_prove_linear_are_named_instead(kind: type[Like], values: str):
    with torch.device("meta" if values == "meta" else "cpu"):
        model = nn.ModuleDict({"fc": nn.Linear(8, 8), "other": kind(), "like": Like()})
    if values == "zero":
        nn.init.zeros_(model["other"].weight)
        nn.init.zeros_(model["like"].weight)
    report = attach(model, LoRAConfig(rank=2))
    assert list(lora_layers(model)) == ["fc", "like"]
    [(name, reason)] = report.left_out.items()
    assert name == "other.weight"
    assert "target_parameters" in reason
    assert "register_adapter" in reason
    assert "left out: other.weight (held by no layer of a known kind" in str(report)
    with pytest.raises(ValueError, match=f"'other' is a {kind.__name__}.*target_parameters"):
        attach(nn.ModuleDict({"other": kind()}), LoRAConfig(rank=2, target_modules=["other"]))


def test_proof_leaves_no_trace(rng):
    calls, state = [], torch.get_rng_state()
    model = nn.ModuleDict({"like": Like(), "noisy": Noisy()})
    torch.set_rng_state(state)
    for part in model.values():
        part.register_forward_hook(lambda *_: calls.append(1))
    attach(model, LoRAConfig(rank=2))
    assert torch.equal(torch.get_rng_state(), state)
    assert not calls
    assert model["noisy"].training


class Attention(nn.Module):
    """Holds its projections as parameters, as in many implementations from papers."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.heads = nn.Parameter(torch.randn(8, 8)), nn.Parameter(torch.randn(2, 8, 4))
        self.start, self.gain = nn.Parameter(torch.randn(1, 1, 8)), nn.Parameter(torch.ones(8))


def test_matrices_of_modules_without_adapters_are_named_unless_asked_for():
    def left_out(**options: Any) -> list[str]:
        model = nn.ModuleDict({"attention": Attention(), "fc": nn.Linear(8, 8)})
        return [*attach(model, LoRAConfig(rank=2, **options)).left_out]

    assert left_out() == ["attention.query", "attention.heads"]
    assert left_out(target_modules="all") == ["attention.query", "attention.heads"]
    assert left_out(target_parameters=["attention.query"]) == ["attention.heads"]
    assert left_out(target_modules=["fc"]) == []
    assert left_out(modules_to_save=["attention"]) == []
    with pytest.raises(ValueError, match=r"no linear layer\. Its matrices are 0\.query, 0\.heads; name them in"):
        attach(nn.Sequential(Attention()), LoRAConfig(rank=2))


def test_linear_like_checkpoint_merges_on_disk_and_attaches_again(tmp_path, rng):
    model, config = nn.Sequential(LinearLike(IN, OUT)), LoRAConfig(rank=4)
    first = attach(model, config)
    train(model[0], rng)
    assert attach(model, config).layers == first.layers
    assert (
        describe(model)["layers"]["0"] | {"kind": "linear-like", "shape": [OUT, IN]} == describe(model)["layers"]["0"]
    )
    assert [row.peft for row in preflight(model).rows] == ["PEFT has no adapter for LinearLike"]
    save_file(AdaptedModel(model).base, tmp_path / "base.safetensors")
    record = describe(model) | {"base": to_plain(fingerprint(AdaptedModel(model).base))}
    torch.save({"state_dict": adapter_state_dict(model), RECORD_KEY: record}, tmp_path / "last.ckpt")
    assert (
        main(["merge", str(tmp_path / "last.ckpt"), str(tmp_path / "base.safetensors"), str(tmp_path / "whole")]) == 0
    )
    merge(model)
    [whole] = (tmp_path / "whole").glob("*.safetensors")
    assert torch.equal(load_file(whole)["0.weight"], model[0].weight)
