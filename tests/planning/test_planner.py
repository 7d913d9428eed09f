"""Which layers a config reaches in a model, what it leaves out and why, and that every miss is said before a change."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from lightning_lora import AttachReport, LoRAConfig, LoRALayer, attach, lora_layers, merge
from tests.contract import assert_unchanged, raises_and_changes_nothing, snapshot, train_all


def reached(model: nn.Module, **options: object) -> list[str]:
    attach(model, LoRAConfig(**{"rank": 2, **options}))
    return list(lora_layers(model))


def report(model: nn.Module, **options: object) -> AttachReport:
    return attach(model, LoRAConfig(**{"rank": 2, **options}))


PROJECTIONS = ["blocks.0.q_proj", "blocks.0.v_proj", "blocks.1.q_proj", "blocks.1.v_proj"]


# --- which layers


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        ("all-linear", [*PROJECTIONS, "head"]),
        (["head"], ["head"]),
        (["q_proj", "embed"], ["embed", PROJECTIONS[0], PROJECTIONS[2]]),
        (["blocks.1.q_proj"], [PROJECTIONS[2]]),
        (["1.q_proj"], [PROJECTIONS[2]]),
        (["*_proj"], PROJECTIONS),
        (["blocks.0.*"], PROJECTIONS[:2]),
        (["*"], ["embed", *PROJECTIONS, "head"]),
        (r"blocks\.\d\.v_proj", [PROJECTIONS[1], PROJECTIONS[3]]),
        (r".*(q|v)_proj|head", [*PROJECTIONS, "head"]),
        (r".*", ["embed", *PROJECTIONS, "head"]),
    ],
)
def test_targets_reach_exactly_the_named_layers(targets, expected: list[str], tiny):
    assert reached(tiny, target_modules=targets) == expected


@pytest.mark.parametrize(
    ("excluded", "expected"),
    [
        (["head"], PROJECTIONS),
        (["blocks.1"], [*PROJECTIONS[:2], "head"]),
        (["blocks"], ["head"]),
        (["q_*"], [PROJECTIONS[1], PROJECTIONS[3], "head"]),
        (r"blocks\.1\..*", [*PROJECTIONS[:2], "head"]),
    ],
)
def test_exclude_modules_covers_descendants(excluded, expected: list[str], tiny):
    found = report(tiny, exclude_modules=excluded)
    assert [layer.name for layer in found.layers] == expected
    assert set(found.left_out.values()) == {"in exclude_modules"}
    assert sorted([*found.left_out, *expected]) == sorted([*PROJECTIONS, "head"])


def test_name_does_not_match_inside_a_word():
    model = nn.ModuleDict({"q": nn.Linear(8, 8), "freq": nn.Linear(8, 8), "q_norm": nn.Linear(8, 8)})
    assert reached(model, target_modules=["q"]) == ["q"]


def test_single_layer_model_is_adapted(rng):
    layer, x = nn.Linear(8, 8), torch.randn(3, 8, generator=rng)
    before = layer(x)
    assert reached(layer) == [""]
    assert torch.equal(layer(x), before)
    assert [name for name, p in layer.named_parameters() if p.requires_grad] == ["lora.A", "lora.B"]


def test_user_modules_with_adapter_like_names_stay_untouched(tiny):
    tiny.lora_head = nn.Linear(16, 16)
    tiny.lora = nn.Linear(16, 16)
    tiny.lora_A = nn.Linear(16, 16)
    report(tiny, target_modules=["q_proj", "lora_A"], modules_to_save=["lora_head"])
    assert list(lora_layers(tiny)) == [PROJECTIONS[0], PROJECTIONS[2], "lora_A"]
    trainable = {name for name, p in tiny.named_parameters() if p.requires_grad}
    assert {"lora_head.weight", "lora_head.bias", "lora_A.lora.A"} <= trainable
    assert not {"lora.weight", "lora.bias", "lora_A.weight"} & trainable


# --- modules with two names


def test_shared_module_is_adapted_once(tiny):
    tiny.alias = tiny.blocks[0]["q_proj"]
    found = report(tiny, target_modules=["alias", "q_proj"])
    assert [layer.name for layer in found.layers] == [PROJECTIONS[0], PROJECTIONS[2]]
    assert type(tiny.alias).__mro__.count(LoRALayer) == 1


def test_shared_module_is_reached_by_its_second_name(tiny):
    tiny.alias = tiny.blocks[0]["q_proj"]
    assert reached(tiny, target_modules=["alias"]) == [PROJECTIONS[0]]


def shared_between_body_and_head() -> nn.Module:
    shared = nn.Linear(8, 8)
    body = nn.ModuleDict({"shared": shared, "own": nn.Linear(8, 8)})
    return nn.ModuleDict({"body": body, "head": nn.ModuleDict({"shared": shared, "own": nn.Linear(8, 8)})})


def test_saved_module_with_aliased_part_trains_in_full():
    model = shared_between_body_and_head()
    attach(model, LoRAConfig(rank=2, modules_to_save=["head"]))
    assert list(lora_layers(model)) == ["body.own"]
    assert all(p.requires_grad for name, p in model["head"].named_parameters())


def test_excluded_module_with_aliased_part_is_left_out():
    model = shared_between_body_and_head()
    assert reached(model, exclude_modules=["head"]) == ["body.own"]


@pytest.mark.parametrize("option", ["rank_pattern", "alpha_pattern"])
def test_pattern_matches_any_name_of_a_shared_module(option: str):
    model = shared_between_body_and_head()
    found = report(model, target_modules=["head.shared", "own"], alpha=4.0, **{option: {"head.shared": 1}})
    [layer] = [layer for layer in found.layers if layer.name == "body.shared"]
    assert (layer.rank, layer.scaling) == {"rank_pattern": (1, 4.0), "alpha_pattern": (2, 0.5)}[option]


# --- ranks and scalings


def test_first_matching_pattern_sets_rank_and_alpha(tiny):
    found = report(
        tiny,
        rank=3,
        alpha=6.0,
        rank_pattern={"0.q_proj": 1, "q_proj": 2},
        alpha_pattern={r"blocks\.1\..*": 9.0, "v_proj": 12.0},
    )
    assert {layer.name: (layer.rank, layer.scaling) for layer in found.layers} == {
        "blocks.0.q_proj": (1, 6.0),
        "blocks.0.v_proj": (3, 4.0),
        "blocks.1.q_proj": (2, 4.5),
        "blocks.1.v_proj": (3, 3.0),
        "head": (3, 2.0),
    }
    for layer in found.layers:
        adapted = lora_layers(tiny)[layer.name]
        assert (adapted.rank, adapted.scaling) == (layer.rank, layer.scaling)
        assert (adapted.lora.A.shape[0], adapted.lora.B.shape[1]) == (layer.rank, layer.rank)


def test_rslora_divides_by_root_of_each_layers_rank(tiny):
    found = report(tiny, rank=2, alpha=8.0, use_rslora=True, rank_pattern={"head": 4}, alpha_pattern={"0.q_proj": 2.0})
    scaling = {layer.name: layer.scaling for layer in found.layers}
    assert scaling["head"] == pytest.approx(8.0 / 4**0.5)
    assert scaling["blocks.0.q_proj"] == pytest.approx(2.0 / 2**0.5)
    assert scaling["blocks.1.q_proj"] == pytest.approx(8.0 / 2**0.5)


def test_rank_above_weight_size_is_rejected(tiny):
    with raises_and_changes_nothing(tiny, ValueError, r"'head'.*rank 9 is above 8.*rank_pattern"):
        report(tiny, target_modules=["q_proj", "head"], rank=9)


def test_many_wasteful_adapters_give_one_warning():
    model = nn.Sequential(*[nn.Linear(4, 4) for _ in range(9)])
    with pytest.warns(UserWarning, match=r"5 \(rank 2.* and 3 more") as seen:
        report(model)
    assert len(seen) == 1


def test_all_linear_leaves_out_layers_too_small_for_the_rank(tiny):
    found = report(tiny, rank=9, exclude_modules=["blocks.1"], rank_pattern={"blocks.0.q_proj": 4, "v_proj": 4})
    assert "rank 9 is above 8" in found.left_out["head"]


def test_adapter_as_large_as_its_weight_warns():
    model = nn.ModuleDict({"small": nn.Linear(4, 4), "large": nn.Linear(40, 40)})
    with pytest.warns(
        UserWarning, match=r"not smaller than the weights they adapt: small \(rank 2, weight 4 x 4\)\."
    ) as seen:
        report(model)
    assert len(seen) == 1


def test_warning_raised_as_error_leaves_model_unchanged():
    model = nn.ModuleDict({"small": nn.Linear(4, 4)})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with raises_and_changes_nothing(model, UserWarning, "small"):
            report(model)


# --- requests that are refused, with the model as it was


@pytest.mark.parametrize("option", ["target_modules", "exclude_modules", "modules_to_save"])
@pytest.mark.parametrize(("entry", "near"), [("q_porj", "'q_proj'"), ("blocks.0.q_porj", "'blocks.0.q_proj'")])
def test_unmatched_name_suggests_near_names(option: str, entry: str, near: str, tiny):
    with raises_and_changes_nothing(tiny, ValueError, rf"{option}='{entry}' matched no module.*{near}"):
        report(tiny, **{option: ["head", entry]})


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


def test_container_is_rejected_with_how_to_name_its_layers(tiny):
    with raises_and_changes_nothing(tiny, ValueError, r"'blocks.0' is a ModuleDict that contains .*'blocks.0.\*'"):
        report(tiny, target_modules=["blocks.0"])


@pytest.mark.parametrize("part", [nn.GELU(), nn.LayerNorm(4), nn.ReLU(), nn.Dropout(), nn.BatchNorm1d(4)])
def test_unsupported_kind_lists_supported_kinds(part: nn.Module, tiny):
    tiny.part = part
    kind = type(part).__name__
    with raises_and_changes_nothing(tiny, ValueError, rf"'part' is a {kind}; .*nn.Linear.*Conv1D.*nn.Embedding"):
        report(tiny, target_modules=["head", "part"])


def test_model_without_linear_layers_is_rejected():
    with pytest.raises(ValueError, match="Sequential has no linear layer"):
        report(nn.Sequential(nn.Conv2d(3, 3, 1), nn.ReLU()))


@pytest.mark.parametrize("option", ["exclude_modules", "modules_to_save"])
def test_leaving_out_every_layer_is_rejected(option: str):
    model = nn.ModuleDict({"a": nn.Linear(8, 8), "b": nn.Linear(8, 8)})
    with raises_and_changes_nothing(model, ValueError, f"left out every layer.*a: in {option}, b: in {option}"):
        report(model, **{option: ["a", "b"]})


def test_forward_on_instance_is_rejected(tiny):
    tiny.head.forward = torch.sigmoid
    with raises_and_changes_nothing(tiny, ValueError, "'head'.*its forward was replaced on the instance"):
        report(tiny, target_modules=["head"])
    found = report(tiny)
    assert "forward was replaced" in found.left_out["head"]


@pytest.mark.parametrize("targets", ["all-linear", ["head", "lazy"]])
def test_lazy_layer_is_rejected_with_remedy(targets, tiny):
    tiny.lazy = nn.LazyLinear(8)
    try:
        found = report(tiny, target_modules=targets)
    except ValueError as error:
        refusal = str(error)
        assert lora_layers(tiny) == {}
    else:
        refusal = found.left_out["lazy"]
    assert "run one batch" in refusal


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


class TiedModel(nn.Module):
    """A language model's usual tie of output to input embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 16)
        self.mix = nn.Linear(16, 16)
        self.head = nn.Linear(16, 20, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.mix(self.embed(tokens)))


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


def test_saved_module_tied_elsewhere_is_rejected():
    model = TiedModel()
    with raises_and_changes_nothing(model, ValueError, r"modules_to_save: 'head.weight' is tied to \['embed.weight'\]"):
        report(model, modules_to_save=["head"])


def test_both_sides_of_a_tie_train_in_full():
    model = TiedModel()
    report(model, modules_to_save=["head", "embed"])
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {"embed.weight", "mix.lora.A", "mix.lora.B"}


# --- modules_to_save


def test_saved_modules_get_no_adapter(tiny):
    found = report(tiny, target_modules=["q_proj", "head"], modules_to_save=["head", "blocks.1"])
    assert [layer.name for layer in found.layers] == ["blocks.0.q_proj"]
    assert found.left_out == {"blocks.1.q_proj": "in modules_to_save", "head": "in modules_to_save"}
    assert found.saved == {"blocks.1": 16 * 16 * 2 + 16, "head": 16 * 8 + 8}


def test_named_saved_module_without_parameters_is_rejected(tiny):
    with raises_and_changes_nothing(tiny, ValueError, "modules_to_save: 'blocks.0.act' is a GELU without parameters"):
        report(tiny, modules_to_save=["act"])


def test_saving_glob_skips_modules_without_parameters(tiny):
    tiny.head = nn.Sequential(nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 8))
    report(tiny, modules_to_save=["head.*"])
    assert all(p.requires_grad for p in tiny.head.parameters())


def test_saving_glob_without_any_parameters_is_rejected(tiny):
    with raises_and_changes_nothing(tiny, ValueError, r"modules_to_save.*'\*.act'"):
        report(tiny, modules_to_save=["*.act"])


def test_parameter_of_two_saved_modules_is_counted_once(tiny):
    tiny.head = nn.Sequential(nn.Linear(16, 8), nn.Linear(8, 8))
    found = report(tiny, modules_to_save=["head", "head.0"])
    assert found.trainable_parameters == sum(p.numel() for p in tiny.parameters() if p.requires_grad)


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


# --- wrappers


compiling = pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated")  # torch's own, on import


@compiling
def test_compiled_layer_keeps_its_name():
    model = nn.ModuleDict({"a": nn.Linear(8, 8), "b": nn.Linear(8, 8)})
    plain = nn.ModuleDict({"a": nn.Linear(8, 8), "b": nn.Linear(8, 8)})
    model["a"] = torch.compile(model["a"])
    assert reached(model) == reached(plain) == ["a", "b"]
    assert torch.equal(lora_layers(model)["a"].lora.A, lora_layers(plain)["a"].lora.A)


@compiling
def test_compiled_model_keeps_its_names(tiny):
    assert reached(torch.compile(tiny), target_modules=["blocks.0.q_proj", "head"]) == ["blocks.0.q_proj", "head"]
