"""Embeddings: padding, max_norm, sparse gradients, and subclasses that scale what they look up."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from lightning_lora import LoRAConfig, attach, disabled, merge
from tests.contract import error, raises_and_changes_nothing, train

V, D = 40, 20


def adapted(layer: nn.Module, rng: torch.Generator | None = None, **options: object) -> nn.ModuleDict:
    """Return a model with an adapted embedding, trained if a generator is given."""
    model = nn.ModuleDict({"embed": layer})
    attach(model, LoRAConfig(**{"rank": 4, "alpha": 6.0, "target_modules": ["embed"], **options}))
    if rng is not None:
        train(layer, rng)
    return model


def test_all_linear_does_not_adapt_an_embedding(tiny):
    report = attach(tiny, LoRAConfig(rank=2))
    assert "embed" not in [layer.name for layer in report.layers]
    assert not tiny.embed.weight.requires_grad


def test_a_token_that_never_occurs_keeps_its_vector(rng):
    layer = nn.Embedding(V, D)
    model, before = adapted(layer), layer.weight.detach().clone()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    seen = torch.arange(10)
    for _ in range(3):
        optimizer.zero_grad()
        layer(seen).square().sum().backward()
        optimizer.step()
    after = layer(torch.arange(V))
    assert torch.equal(after[10:], before[10:])
    assert (after[:10] != before[:10]).any(1).all()


@pytest.mark.parametrize("padding_idx", [0, 3, -1])
def test_the_padding_token_never_learns(padding_idx: int):
    layer = nn.Embedding(V, D, padding_idx=padding_idx)
    model = adapted(layer)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        (layer(torch.arange(V)) - 1).square().sum().backward()
        optimizer.step()
    pad = torch.tensor([padding_idx % V])
    assert torch.equal(layer(pad), torch.zeros(1, D))
    merge(model)
    assert torch.equal(layer.weight[pad], torch.zeros(1, D))


def test_max_norm_is_refused_with_the_reason():
    model = nn.ModuleDict({"embed": nn.Embedding(V, D, max_norm=1.0)})
    with raises_and_changes_nothing(model, ValueError, r"max_norm=1.0 rescales the frozen weight.*set it to None"):
        attach(model, LoRAConfig(rank=4, target_modules=["embed"]))


@pytest.mark.parametrize("option", ["sparse", "scale_grad_by_freq"])
def test_gradients_of_the_factors_are_dense_whatever_the_options(option: str, rng):
    layer = nn.Embedding(V, D, **{option: True})
    adapted(layer, rng)
    layer(torch.tensor([1, 2, 2, 2])).sum().backward()
    assert not layer.lora.A.grad.is_sparse
    assert not layer.lora.B.grad.is_sparse
    one, three = layer.lora.A.grad[:, 1], layer.lora.A.grad[:, 2]
    assert torch.allclose(three, one if option == "scale_grad_by_freq" else 3 * one)


def test_dropout_does_not_drop_tokens(rng):
    layer = nn.Embedding(V, D)
    adapted(layer, rng, dropout=0.9)
    x = torch.arange(V)
    assert torch.equal(layer.train()(x), layer.eval()(x))


class Scaled(nn.Embedding):
    """As Bart's, Gemma's and others' in transformers."""

    embed_scale = 3.0

    def forward(self, tokens: Tensor) -> Tensor:
        return super().forward(tokens) * self.embed_scale


def _scaled(name: str, module: str) -> nn.Module:
    kind = getattr(pytest.importorskip(f"transformers.models.{module}"), name)
    return kind(V, D, 0, embed_scale=3.0)


@pytest.mark.parametrize(
    "build",
    [
        lambda: Scaled(V, D),
        lambda: _scaled("BartScaledWordEmbedding", "bart.modeling_bart"),
        lambda: _scaled("Gemma3TextScaledWordEmbedding", "gemma3.modeling_gemma3"),
    ],
    ids=["own", "bart", "gemma3"],
)
def test_an_embedding_that_scales_its_vectors_scales_the_update_too(build, rng):
    layer, x = build(), torch.arange(V)
    base = layer.weight.detach().clone()  # the layer's weight will read as base plus update
    model = adapted(layer, rng)
    truth = 3.0 * (base.double() + 1.5 * (layer.lora.B.double() @ layer.lora.A.double()).T)
    with disabled(model):
        assert error(layer(x), truth) > 0.1
    assert error(layer(x), truth) <= 2e-6
    merge(model)
    assert error(layer(x), truth) <= 2e-6
