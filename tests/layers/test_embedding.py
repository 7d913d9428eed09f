"""Embeddings: trained tokens, low-rank updates, padding, max_norm, and subclasses that scale what they look up."""

from __future__ import annotations

import copy
import pickle
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_lora import (
    LoRAConfig,
    adapter_state_dict,
    attach,
    detach,
    disabled,
    load_adapter_state_dict,
    lora_layers,
    merge,
    merged,
)
from lightning_lora.adapted_model import AdaptedModel
from tests.contract import (
    KINDS,
    PADDING,
    TOKENS,
    TOLERANCE,
    assert_same_bits,
    assert_unchanged,
    error,
    raises_and_changes_nothing,
    snapshot,
    train,
)

WIDTH = 20
CHOSEN = [1, 7, 39]
OTHERS = [token for token in range(TOKENS) if token not in CHOSEN]
ROWS = "embed.lora.rows"
CONFIG = LoRAConfig(target_modules=[], trainable_token_indices={"embed": CHOSEN})
EMBEDDINGS = [kind for kind, spec in KINDS.items() if spec.takes_tokens]


class Words(nn.Module):
    """Tokens to scores of tokens, with a weight of its own for each."""

    def __init__(self, kind: str = "embedding") -> None:
        super().__init__()
        self.embed, self.mix = KINDS[kind].build(), nn.Linear(WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, TOKENS)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(torch.tanh(self.mix(self.embed(tokens))))


class Tied(Words):
    """The same with one weight for both."""

    def __init__(self, kind: str = "embedding") -> None:
        super().__init__(kind)
        self.head.weight = self.embed.weight


class Sides(Words):
    """An embedding whose weight other layers than a head have, too: embeddings of a decoder and of bags."""

    def __init__(self) -> None:
        super().__init__()
        self.decoder, self.bag = nn.Embedding(TOKENS, WIDTH), nn.EmbeddingBag(TOKENS, WIDTH)
        self.decoder.weight = self.bag.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return super().forward(tokens) + self.head(self.decoder(tokens)) + self.head(self.bag(tokens))[:, None]


MODELS: dict[str, Any] = {kind: lambda kind=kind: Words(kind) for kind in EMBEDDINGS}
MODELS |= {f"tied {kind}": lambda kind=kind: Tied(kind) for kind in EMBEDDINGS} | {"tied to many": Sides}
each = pytest.mark.parametrize("model", MODELS)
each_type = pytest.mark.parametrize("dtype", TOLERANCE, ids=lambda dtype: str(dtype).removeprefix("torch."))


@torch.no_grad()
def train_everything(model: nn.Module, rng: torch.Generator) -> None:
    """Move everything that is to be trained, as if it had been; the factor of a padding token never does."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=rng))
    for adapter in AdaptedModel(model).adapters.values():
        if getattr(adapter, "padding_idx", None) is not None and hasattr(adapter, "A"):
            adapter.A[:, adapter.padding_idx] = 0.0


def inputs(rng: torch.Generator) -> Tensor:
    """Return tokens with every chosen one among them, some of them twice."""
    some = torch.randint(TOKENS, (22,), generator=rng)
    return torch.cat([torch.tensor([*CHOSEN, *CHOSEN, PADDING, 0]), some]).view(5, 6)


def is_tied(model: nn.Module) -> bool:
    """Say whether both sides store one parameter, also where a weight reads as something else."""
    stored = dict(model.named_parameters(remove_duplicate=False))
    return stored["head.weight"] is stored["embed.weight"]


def pair(model: str, rng: torch.Generator, dtype: torch.dtype = torch.float64) -> tuple[nn.Module, nn.Module]:
    """Return a model with trained rows, and the float64 base with those rows written into its weight."""
    adapted = MODELS[model]().to(dtype)
    dense = copy.deepcopy(adapted).double()
    attach(adapted, CONFIG)
    train_everything(adapted, rng)
    with torch.no_grad():
        dense.embed.weight[CHOSEN] = adapted.embed.lora.rows.double()
    return adapted, dense


@each
@each_type
@pytest.mark.parametrize("training", [True, False])
def test_trained_rows_start_as_frozen_and_others_never_change(model: str, dtype, training, rng):
    module, x = MODELS[model]().to(dtype).train(training), inputs(rng)
    frozen, hidden = module.state_dict()["embed.weight"].clone(), module.embed(x).detach()
    embedded, logits = module.embed(x), module.head(hidden)
    attach(module, CONFIG)
    assert torch.equal(module.embed.lora.rows.to(dtype), frozen[CHOSEN])
    assert torch.equal(module.embed(x), embedded)
    assert error(module.head(hidden), logits) <= TOLERANCE[dtype]  # the product with the rows may round otherwise
    train_everything(module, rng)
    chosen = torch.isin(x, torch.tensor(CHOSEN))
    assert torch.equal(module.embed(x)[~chosen], embedded[~chosen])
    assert not (module.embed(x) == embedded)[chosen].any()
    assert torch.equal(module.head(hidden)[..., OTHERS], logits[..., OTHERS])
    assert (module.head(hidden) == logits)[..., CHOSEN].all() == (not is_tied(module))


@each
@each_type
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("grad_mode", [nullcontext, torch.no_grad, torch.inference_mode])
def test_tokens_match_dense_weight_in_every_mode(model: str, dtype, training, grad_mode, rng):
    (module, dense), x = pair(model, rng, dtype), inputs(rng)
    module.train(training)
    truth, embedded = dense(x), dense.embed(x)
    with grad_mode(), disabled(module):
        base = module(x)
    with grad_mode():
        found = module(x)
        assert found.dtype == dtype
        assert error(module.embed(x), embedded) <= TOLERANCE[dtype]
    assert error(found, truth) <= TOLERANCE[dtype]
    assert error(base, truth) > 10 * TOLERANCE[dtype]  # the rows are what makes the difference


@each
def test_gradients_of_rows_match_dense_weight(model: str, rng):
    (module, dense), x = pair(model, rng), inputs(rng)
    for part in (module, dense):
        part(x).square().sum().backward()
    assert [name for name, p in module.named_parameters() if p.requires_grad] == [ROWS]
    assert [name for name, p in module.named_parameters() if p.grad is not None] == [ROWS]
    assert error(module.embed.lora.rows.grad, dense.embed.weight.grad[CHOSEN]) <= 1e-10


@pytest.mark.parametrize("option", ["sparse", "scale_grad_by_freq"])
def test_gradients_follow_embedding_options(option: str, rng):
    model, x = nn.ModuleDict({"embed": nn.Embedding(TOKENS, WIDTH, **{option: True})}), inputs(rng)
    dense = copy.deepcopy(model)
    attach(model, CONFIG)
    cotangent = torch.randn(*x.shape, WIDTH, generator=rng)
    for part in (model, dense):
        part["embed"](x).backward(cotangent)
    assert error(model["embed"].lora.rows.grad, dense["embed"].weight.grad.to_dense()[CHOSEN]) <= 1e-6


@each
def test_weight_decay_leaves_other_rows_alone(model: str, rng):
    module, x = MODELS[model](), inputs(rng)
    before = copy.deepcopy(module.state_dict())
    attach(module, CONFIG)
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.1, weight_decay=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        module(x).square().sum().backward()
        optimizer.step()
    assert_same_bits({name: module.state_dict()[name] for name in before}, before)
    merge(module)
    weight, start = module.embed.weight, before["embed.weight"]
    assert torch.equal(weight[OTHERS], start[OTHERS])
    assert not (weight[CHOSEN] == start[CHOSEN]).all(1).any()


@each
@each_type
def test_merging_rows_keeps_tie(model: str, dtype, rng):
    (module, dense), x = pair(model, rng, dtype), inputs(rng)
    before, output = snapshot(module), module(x)
    with merged(module):
        inside = module(x)
    assert_unchanged(module, before)
    assert torch.equal(module(x), output)
    merge(module)
    assert torch.equal(module(x), inside)
    assert is_tied(module) == ("tied" in model and model != "tied to many")
    assert [type(part) for part in module.modules()] == [type(part) for part in dense.modules()]
    assert_same_bits(dict(module.state_dict()), {name: t.to(dtype) for name, t in dense.state_dict().items()})


@each
def test_disabling_and_detaching_tokens_restore_base(model: str, rng):
    module, x = MODELS[model](), inputs(rng)
    module.mix.bias.requires_grad_(False)
    before, base = snapshot(module), module(x)
    attach(module, CONFIG)
    train_everything(module, rng)
    adapted, output = snapshot(module), module(x)
    with disabled(module):
        assert torch.equal(module(x), base)
    assert_unchanged(module, adapted)
    assert torch.equal(module(x), output)
    detach(module)
    assert_unchanged(module, before)
    assert torch.equal(module(x), base)


@each
def test_state_round_trip_of_tokens(model: str, rng):
    module, x = MODELS[model](), inputs(rng)
    fresh = copy.deepcopy(module)
    attach(module, CONFIG)
    train_everything(module, rng)
    state = adapter_state_dict(module)
    assert {name: tuple(tensor.shape) for name, tensor in state.items()} == {ROWS: (len(CHOSEN), WIDTH)}
    attach(fresh, CONFIG, seed=9)
    assert not torch.equal(fresh(x), module(x))
    load_adapter_state_dict(fresh, state)
    assert torch.equal(fresh(x), module(x))
    assert_same_bits(adapter_state_dict(fresh), state)


@each
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_copy_with_tokens_keeps_tie(model: str, copied, rng):
    (module, _), x = pair(model, rng), inputs(rng)
    twin, output = copied(module), module(x)
    assert is_tied(twin) == is_tied(module)
    assert torch.equal(twin(x), output)
    dense = copy.deepcopy(twin)
    detach(dense)
    train_everything(twin, rng)
    assert torch.equal(module(x), output)
    with torch.no_grad():
        dense.embed.weight[CHOSEN] = twin.embed.lora.rows
    assert error(twin(x), dense(x)) <= 1e-10  # what is tied moves with the rows of the copy
    merge(twin)
    assert is_tied(twin) == is_tied(module)


def test_mapping_gives_each_embedding_its_tokens(rng):
    model, x = nn.ModuleDict({name: nn.Embedding(9, 4) for name in ("word", "place", "kind")}), torch.arange(9)
    dense = copy.deepcopy(model)
    attach(model, LoRAConfig(target_modules=[], trainable_token_indices={"word": [8, 2], "?lace": [0]}))
    train_everything(model, rng)
    for name, tokens in {"word": [2, 8], "place": [0], "kind": []}.items():
        assert (model[name](x) != dense[name](x)).all(1).nonzero().flatten().tolist() == tokens
    assert sorted(model["word"](x)[[2, 8]].tolist()) == sorted(model["word"].lora.rows.tolist())


@pytest.mark.parametrize("says", [True, False])
def test_list_means_input_embedding(says: bool):
    class Model(nn.ModuleList):
        if says:

            def get_input_embeddings(self) -> nn.Module:
                return self[1]

    model = Model([nn.Linear(4, 4), *[nn.Embedding(9, 4) for _ in range(1 + says)]])
    attach(model, LoRAConfig(target_modules=[], trainable_token_indices=[8, 2]))
    assert list(lora_layers(model)) == ["1"]


@pytest.mark.parametrize("target_modules", [["mix"], "all-linear"])
def test_tokens_train_beside_other_adapters(target_modules: Any, rng):
    model, x = Tied(), inputs(rng)
    dense = copy.deepcopy(model).double()
    attach(model, LoRAConfig(rank=2, alpha=3.0, target_modules=target_modules, trainable_token_indices=CHOSEN))
    assert list(adapter_state_dict(model)) == [ROWS, "mix.lora.A", "mix.lora.B"]
    train_everything(model, rng)
    with torch.no_grad():
        dense.embed.weight[CHOSEN] = model.embed.lora.rows.double()
        dense.mix.weight += 1.5 * model.mix.lora.B.double() @ model.mix.lora.A.double()
    assert error(model(x), dense(x)) <= 4e-6


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"trainable_token_indices": [2, 40]}, "40"),
        ({"trainable_token_indices": [2, -1]}, "-1"),
        ({"trainable_token_indices": [2, 5, 2]}, "2, 5, 2"),
        ({"trainable_token_indices": {"embde": [2]}}, "'embde' matched no"),
        ({"trainable_token_indices": {"mix": [2]}}, "'mix' is a Linear"),
        ({"trainable_token_indices": {"bag": [2]}}, "'bag' is a EmbeddingBag"),
        ({"trainable_token_indices": [2], "target_modules": ["embed"]}, "'embed'"),
        ({"trainable_token_indices": [2], "target_parameters": ["embed.weight"]}, "'embed'"),
        ({"trainable_token_indices": [2], "modules_to_save": ["embed"]}, "'embed'"),
        ({"trainable_token_indices": [2, PADDING]}, f"{PADDING}.*padding"),
    ],
    ids=str,
)
def test_invalid_tokens_refused(options: dict[str, Any], match: str):
    model = Words("padded embedding")
    model.bag = nn.EmbeddingBag(TOKENS, WIDTH)
    with raises_and_changes_nothing(model, ValueError, match):
        attach(model, LoRAConfig(**{"rank": 2, "target_modules": []} | options))


def test_list_refused_without_single_embedding():
    for model in (nn.ModuleList([nn.Embedding(9, 4), nn.Embedding(9, 4)]), nn.Sequential(nn.Linear(4, 4))):
        with raises_and_changes_nothing(model, ValueError, "trainable_token_indices"):
            attach(model, LoRAConfig(target_modules=[], trainable_token_indices=[2]))


def test_weight_shared_with_non_layer_refused():
    model = Words()
    model.shared = model.embed.weight  # a product with it would leave the rows out
    with raises_and_changes_nothing(model, ValueError, "'embed'.*shared"):
        attach(model, CONFIG)


# --- low-rank updates


V, D = 40, 20


def adapted(layer: nn.Module, rng: torch.Generator | None = None, **options: object) -> nn.ModuleDict:
    """Return a model with an adapted embedding, trained if a generator is given."""
    model = nn.ModuleDict({"embed": layer})
    attach(model, LoRAConfig(**{"rank": 4, "alpha": 6.0, "target_modules": ["embed"], **options}))
    if rng is not None:
        train(layer, rng)
    return model


def test_all_linear_excludes_embedding(tiny):
    report = attach(tiny, LoRAConfig(rank=2))
    assert "embed" not in [layer.name for layer in report.layers]
    assert not tiny.embed.weight.requires_grad


def test_absent_token_keeps_its_vector(rng):
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
def test_padding_token_never_learns(padding_idx: int):
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


def test_max_norm_refused():
    model = nn.ModuleDict({"embed": nn.Embedding(V, D, max_norm=1.0)})
    with raises_and_changes_nothing(model, ValueError, r"max_norm=1.0 rescales the frozen weight.*set it to None"):
        attach(model, LoRAConfig(rank=4, target_modules=["embed"]))


@pytest.mark.parametrize("option", ["sparse", "scale_grad_by_freq"])
def test_factor_gradients_are_dense(option: str, rng):
    layer = nn.Embedding(V, D, **{option: True})
    adapted(layer, rng)
    layer(torch.tensor([1, 2, 2, 2])).sum().backward()
    assert not layer.lora.A.grad.is_sparse
    assert not layer.lora.B.grad.is_sparse
    one, three = layer.lora.A.grad[:, 1], layer.lora.A.grad[:, 2]
    assert torch.allclose(three, one if option == "scale_grad_by_freq" else 3 * one)


def test_dropout_has_no_effect(rng):
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
def test_scaled_embedding_scales_update(build, rng):
    layer, x = build(), torch.arange(V)
    base = layer.weight.detach().clone()  # the layer's weight will read as base plus update
    model = adapted(layer, rng)
    truth = 3.0 * (base.double() + 1.5 * (layer.lora.B.double() @ layer.lora.A.double()).T)
    with disabled(model):
        assert error(layer(x), truth) > 0.1
    assert error(layer(x), truth) <= 2e-6
    merge(model)
    assert error(layer(x), truth) <= 2e-6
