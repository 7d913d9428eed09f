"""Layers that cannot be adapted and entries that match nothing: each is named, and the model stays as it was."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from lightning_lora import lora_layers, merge
from tests.contract import assert_unchanged, raises_and_changes_nothing, snapshot, train_all
from tests.planning.models import TiedModel, reached, report

# --- entries that match nothing


@pytest.mark.parametrize("option", ["target_modules", "exclude_modules", "modules_to_save"])
@pytest.mark.parametrize(("entry", "near"), [("q_porj", "'q_proj'"), ("blocks.0.q_porj", "'blocks.0.q_proj'")])
def test_unmatched_name_suggests_near_names(option: str, entry: str, near: str, tiny):
    with raises_and_changes_nothing(tiny, ValueError, rf"{option}='{entry}' matched no module.*{near}"):
        report(tiny, **{option: ["head", entry]})


@pytest.mark.parametrize("targets", ["all-conv", ["all-linear", "all-conv"]])
def test_word_for_a_missing_family_is_rejected(targets, tiny):
    with raises_and_changes_nothing(tiny, ValueError, "target_modules='all-conv': TinyModel has no convolution"):
        report(tiny, target_modules=targets)


def test_word_for_every_family_needs_a_layer():
    norm = nn.LayerNorm(4)
    with raises_and_changes_nothing(norm, ValueError, "'all': LayerNorm has no layer of these kinds"):
        report(norm, target_modules="all")


def test_misspelled_word_suggests_the_word(tiny):
    with raises_and_changes_nothing(tiny, ValueError, "'all_linear' matched no module.*'all-linear'"):
        report(tiny, target_modules="all_linear")


def test_a_parameter_is_no_module_to_save() -> None:
    model = nn.Sequential(nn.Linear(8, 8))
    model.log_variance = nn.Parameter(torch.zeros(1))
    inside = nn.ModuleDict({"clip": model, "head": nn.Linear(8, 8)})
    for each, name in ((model, "log_variance"), (inside, "clip.log_variance")):
        message = rf"'log_variance' matched no module .* '{name}' is a parameter, and modules_to_save takes modules"
        with raises_and_changes_nothing(each, ValueError, message):
            report(each, modules_to_save=["log_variance"])


@pytest.mark.parametrize("option", ["rank_pattern", "alpha_pattern"])
@pytest.mark.parametrize(("entry", "near"), [("q_porj", "'q_proj'"), ("blocks.0.q_porj", "'blocks.0.q_proj'")])
def test_unmatched_pattern_suggests_near_names(option: str, entry: str, near: str, tiny):
    with raises_and_changes_nothing(tiny, ValueError, rf"{option}='{entry}' matched no adapted layer.*{near}"):
        report(tiny, **{option: {"head": 2, entry: 2}})


@pytest.mark.parametrize("option", ["rank_pattern", "alpha_pattern"])
def test_pattern_for_unadapted_layer_is_rejected(option: str, tiny):
    with raises_and_changes_nothing(tiny, ValueError, rf"{option}='head'"):
        report(tiny, target_modules=["q_proj"], **{option: {"head": 2}})


def test_one_error_lists_every_miss(tiny):
    with raises_and_changes_nothing(tiny, ValueError, "nothing was changed") as caught:
        report(
            tiny,
            target_modules=["head", "q_porj", "v_porj"],
            exclude_modules=["blokcs"],
            modules_to_save=["embde"],
            rank_pattern={"haed": 2},
            alpha_pattern={"hade": 2.0},
        )
    message = str(caught.value)
    for entry, near in [("q_porj", "q_proj"), ("v_porj", "v_proj"), ("blokcs", "blocks"), ("embde", "embed")]:
        assert f"'{entry}'" in message
        assert f"'{near}'" in message
    assert "rank_pattern='haed'" in message
    assert "alpha_pattern='hade'" in message
    assert message.count("'head'") == 2
    assert "TinyModel" in message


@pytest.mark.parametrize("targets", [["zzz"], "zzz"])
def test_name_without_near_names_lists_layers(targets: str | list[str]):
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    with raises_and_changes_nothing(model, ValueError, r"'zzz' matched no module of \w+\. Its layers are 0, 2\."):
        report(model, target_modules=targets)


def test_unmatched_glob_is_rejected(tiny):
    with raises_and_changes_nothing(tiny, ValueError, r"target_modules='\*_porj' matched no module"):
        report(tiny, target_modules=["head", "*_porj"])


def test_unmatched_regex_suggests_a_list(tiny):
    with raises_and_changes_nothing(tiny, ValueError, r"target_modules='q_proj'.*regular expression.*list"):
        report(tiny, target_modules="q_proj")


@pytest.mark.parametrize("targets", [r".*norm", ["n*m"], ["*.act"]])
def test_sweep_over_unsupported_modules_lists_supported_kinds(targets, tiny):
    with raises_and_changes_nothing(tiny, ValueError, r"no layer of a supported kind.*nn.Linear.*Conv1D.*nn.Embedding"):
        report(tiny, target_modules=targets)


def test_model_without_linear_layers_is_rejected():
    with pytest.raises(ValueError, match="Sequential has no linear layer"):
        report(nn.Sequential(nn.Conv2d(3, 3, 1), nn.ReLU()))


# --- layers that cannot be adapted


def test_rank_above_weight_size_is_rejected(tiny):
    with raises_and_changes_nothing(tiny, ValueError, r"'head'.*rank 9 is above 8.*rank_pattern"):
        report(tiny, target_modules=["q_proj", "head"], rank=9)


def test_all_linear_leaves_out_layers_too_small_for_the_rank(tiny):
    found = report(tiny, rank=9, exclude_modules=["blocks.1"], rank_pattern={"blocks.0.q_proj": 4, "v_proj": 4})
    assert "rank 9 is above 8" in found.left_out["head"]


def test_forward_on_instance_is_rejected(tiny):
    tiny.head.forward = torch.sigmoid
    with raises_and_changes_nothing(tiny, ValueError, "'head'.*its forward was replaced on the instance"):
        report(tiny, target_modules=["head"])
    found = report(tiny)
    assert "forward was replaced" in found.left_out["head"]


@pytest.mark.parametrize("attribute", ["lora", "lora_mode", "rank", "scaling"])
@pytest.mark.parametrize("holder", ["layer", "class"])
def test_layer_with_clashing_attributes_works_or_is_rejected(attribute: str, holder: str, rng):
    class Own(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * getattr(self, attribute)

    layer = Own(8, 8)
    setattr(layer if holder == "layer" else Own, attribute, 0.5)
    model, x = nn.Sequential(layer), torch.ones(1, 8)
    before, output = snapshot(model), model(x)
    try:
        report(model, target_modules=["0"])
    except ValueError:
        assert_unchanged(model, before)
        return
    assert torch.equal(model(x), output)
    train_all(model, rng)
    assert not torch.equal(model(x), output)


# --- tied weights


@pytest.mark.parametrize(("name", "other"), [("head", "embed"), ("embed", "head")])
def test_named_tied_weight_is_rejected(name: str, other: str):
    model = TiedModel()
    with raises_and_changes_nothing(model, ValueError, f"'{name}' cannot be adapted.*tied to '{other}.weight'"):
        report(model, target_modules=["mix", name])


def test_all_linear_leaves_out_tied_head_and_merge_keeps_embedding(rng):
    model = TiedModel()
    embedding = model.embed.weight.clone()
    found = report(model)
    assert list(lora_layers(model)) == ["mix"]
    assert "tied to 'embed.weight'" in found.left_out["head"]
    train_all(model, rng)
    merge(model)
    assert torch.equal(model.embed.weight, embedding)
    assert model.head.weight is model.embed.weight


def test_tied_weight_of_root_layer_is_rejected():
    root = nn.Linear(8, 8)
    root.embed = nn.Embedding(8, 8)
    root.embed.weight = root.weight
    with raises_and_changes_nothing(root, ValueError, "tied to 'embed.weight'"):
        report(root)


# --- parents that read the weights of their children


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)
        self.encoder = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
        self.decoder = nn.TransformerDecoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
        self.out = nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(x, x, x)[0]
        return self.out(self.decoder(self.encoder(x), x))


def test_all_linear_adapts_attention_and_layers_read_by_parents(rng):
    model, x = Attention(), torch.randn(2, 3, 16, generator=rng)
    found = report(model)
    assert {layer.name for layer in found.layers} == {
        *(f"{a}.{w}" for a in ("attention", "encoder.self_attn") for w in ("in_proj_weight", "out_proj")),
        *(f"decoder.{a}.{w}" for a in ("self_attn", "multihead_attn") for w in ("in_proj_weight", "out_proj")),
        *(f"{part}.linear{i}" for part in ("encoder", "decoder") for i in (1, 2)),
        "out",
    }
    assert not found.left_out
    base = model.eval()(x)
    train_all(model, rng)
    trained = model.train()(x)
    with torch.inference_mode():
        assert torch.allclose(model.eval()(x), trained, atol=1e-5)
        assert not torch.allclose(model(x), base, atol=1e-2)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("attention.out_proj", "its parent, a MultiheadAttention, reads the weight"),
        ("encoder.linear1", "its parent, a TransformerEncoderLayer, reads the weight"),
        ("attention", "a MultiheadAttention has its own forward"),
    ],
)
def test_dropout_is_rejected_where_weight_carries_update(name: str, reason: str):
    model = Attention()
    with raises_and_changes_nothing(model, ValueError, f"{reason}.*dropout=0"):
        report(model, target_modules=["out", name], dropout=0.1)


# --- transformers


def _gpt2() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(GPT2Config(vocab_size=64, n_positions=16, n_embd=16, n_layer=2, n_head=2))


def _llama() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "num_key_value_heads": 1}
    return LlamaForCausalLM(LlamaConfig(vocab_size=64, num_hidden_layers=2, max_position_embeddings=16, **sizes))


def _bert() -> nn.Module:
    from transformers import BertConfig, BertForMaskedLM

    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "num_hidden_layers": 2}
    return BertForMaskedLM(BertConfig(vocab_size=64, max_position_embeddings=16, **sizes))


class Wrapped(nn.Module):
    """As a LightningModule holds a model."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model


@pytest.mark.parametrize(
    ("build", "layers", "head", "reason"),
    [
        (_gpt2, 2 * 4, "lm_head", "tied to 'transformer.wte.weight'"),
        (_llama, 2 * 7, "lm_head", "output embedding"),
        (_bert, 2 * 6 + 1, "cls.predictions.decoder", "tied to 'bert.embeddings.word_embeddings.weight'"),
    ],
    ids=["gpt2", "llama", "bert"],
)
@pytest.mark.parametrize("wrapped", [False, True])
def test_all_linear_skips_output_embedding_of_language_model(
    build: Callable[[], nn.Module], layers: int, head: str, reason: str, wrapped: bool, rng
):
    pytest.importorskip("transformers")
    inner = build().eval()
    model = Wrapped(inner) if wrapped else inner
    tokens = torch.randint(64, (2, 8), generator=rng)
    before = inner(input_ids=tokens).logits
    found = report(model)
    [(name, why)] = found.left_out.items()
    prefix = "model." if wrapped else ""
    assert name == f"{prefix}{head}"
    assert reason.replace("'", f"'{prefix}", 1) in why
    assert len(lora_layers(model)) == layers
    assert torch.equal(inner(input_ids=tokens).logits, before)
    train_all(model, rng)
    inner(input_ids=tokens).logits.square().mean().backward()
    assert all(p.grad.count_nonzero() > 0 for layer in lora_layers(model).values() for p in layer.lora.parameters())
    trained = inner(input_ids=tokens).logits
    assert not torch.allclose(trained, before, atol=1e-2)
    merge(model)
    assert torch.allclose(inner(input_ids=tokens).logits, trained, atol=1e-4)


def test_output_embedding_can_be_named():
    pytest.importorskip("transformers")
    assert reached(_llama(), target_modules=["lm_head"]) == ["lm_head"]
