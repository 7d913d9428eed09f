"""The layers that a config reaches in a model, their ranks and scalings, and those that it leaves out."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable

import pytest
import torch
from torch import nn

from lightning_lora import LoRAConfig, LoRALayer, attach, lora_layers
from lightning_lora.planning.plan import originals
from tests.contract import raises_and_changes_nothing
from tests.peft_format.kinds import Experts
from tests.planning.models import reached, report

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


def stacked(**counts: int) -> nn.Module:
    """Return a model with stacks of blocks, an embedding and a head."""
    stacks = {
        name: nn.ModuleList(nn.ModuleDict({"q": nn.Linear(8, 8), "v": nn.Linear(8, 8)}) for _ in range(count))
        for name, count in counts.items()
    }
    return nn.ModuleDict({"embed": nn.Embedding(8, 8), **stacks, "head": nn.Linear(8, 8)})


@pytest.mark.parametrize(
    ("layers", "blocks"),
    [
        ([0, 2], [0, 2]),
        ([-1], [5]),
        (["2:4", 0], [0, 2, 3]),
        (["::3"], [0, 3]),
        (["-2:"], [4, 5]),
        ([1, "0:2"], [0, 1]),
    ],
)
@pytest.mark.parametrize("targets", ["all-linear", ["q", "v"], r".*(q|v)", ["h.*"]], ids=str)
def test_layers_choose_blocks(layers: list[int | str], blocks: list[int], targets):
    assert reached(stacked(h=6), target_modules=targets, layers=layers) == [
        f"h.{at}.{n}" for at in blocks for n in "qv"
    ]


def test_layers_choose_blocks_of_every_stack():
    found = reached(stacked(encoder=2, decoder=4), target_modules=["q"], layers=[-1, "2:3"])
    assert found == ["encoder.1.q", "decoder.2.q", "decoder.3.q"]


def test_layers_choose_among_parameters_and_slices():
    model = nn.ModuleList(nn.ModuleDict({"inner": Experts(), "qkv": nn.Linear(8, 24)}) for _ in range(3))
    options = {"target_parameters": ["inner.up"], "target_slices": {"qkv": {"q": "0:8"}}, "target_modules": []}
    assert sorted(layer.name for layer in report(model, **options, layers=[1]).layers) == ["1.inner.up", "1.qkv.q"]


def test_layers_outside_of_chosen_blocks_are_reported(tiny):
    left_out = report(tiny, layers=[0]).left_out
    assert left_out == dict.fromkeys([*PROJECTIONS[2:], "head"], "not in layers=[0]")


def test_small_layers_of_other_blocks_are_no_heads():
    blocks = (nn.ModuleDict({"q": nn.Linear(16, 16), "router": nn.Linear(16, 2)}) for _ in range(3))
    model = nn.ModuleDict({"h": nn.ModuleList(blocks), "head": nn.Linear(16, 2)})
    made = report(model, rank=4, layers=[1], modules_to_save="auto")
    assert (list(made.saved), [layer.name for layer in made.layers]) == (["h.1.router", "head"], ["h.1.q"])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"layers": [6]}, "layers: 6 is out of range; h has 6 blocks, counted from 0"),
        ({"layers": [-7]}, "layers: -7 is out of range; h has 6 blocks"),
        ({"layers": [496]}, "YAML reads 8:16 as 496; quote slices"),
        ({"layers": [0, "4:8"]}, "layers: '4:8' is out of range; h has 6 blocks"),
        ({"layers": [0, "3:3"]}, "layers: '3:3' is out of range"),
        ({"layers": [0], "target_modules": ["head"]}, r"layers=\[0\]: no target lies in repeated blocks"),
        ({"layers": [0], "target_modules": ["q", "head"]}, r"target_modules='head' reaches no layer in layers=\[0\]"),
        ({"layers": [0], "target_modules": ["q", "h.1.v"]}, r"target_modules='h.1.v' reaches no layer in layers=\[0\]"),
    ],
)
def test_wrong_layers_are_named(options, words: str):
    model = stacked(h=6)
    with raises_and_changes_nothing(model, ValueError, words):
        attach(model, LoRAConfig(rank=2, **options))


def test_attaching_again_finds_the_same_blocks():
    model = nn.ModuleDict({"net": nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)), "h": stacked(h=3)["h"]})
    config = LoRAConfig(rank=2, layers=[1])
    first = [layer.name for layer in attach(model, config).layers]
    assert first == ["h.1.q", "h.1.v"]
    assert [layer.name for layer in attach(model, config).layers] == first
    with pytest.raises(ValueError, match=r"other options \(layers: \[1\] -> None\)"):
        attach(model, LoRAConfig(rank=2))


def one_layer_of_each_family() -> nn.Module:
    layers = {"embed": nn.Embedding(9, 8), "conv": nn.Conv1d(8, 8, 3), "up": nn.ConvTranspose2d(8, 8, 2)}
    layers |= {"norm": nn.BatchNorm1d(8), "rnn": nn.LSTM(8, 8), "fc": nn.Linear(8, 8), "head": nn.Linear(8, 8)}
    return nn.ModuleDict({**layers, "attention": nn.MultiheadAttention(8, 2)})


LINEAR, CONVOLUTIONS = ["fc", "head", "attention", "attention.out_proj"], ["conv", "up"]


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        ("all-linear", LINEAR),
        ("all-conv", CONVOLUTIONS),
        (["all-linear", "all-conv"], [*CONVOLUTIONS, *LINEAR]),
        (["all-conv", "head"], [*CONVOLUTIONS, "head"]),
        (["all-linear", "e*"], ["embed", *LINEAR]),
        ("all", ["embed", *CONVOLUTIONS, "rnn", *LINEAR]),
        (["all"], ["embed", *CONVOLUTIONS, "rnn", *LINEAR]),
    ],
)
def test_words_reach_whole_families_and_combine_with_names(targets, expected: list[str]):
    model = one_layer_of_each_family()
    found = report(model, target_modules=targets)
    assert list(lora_layers(model)) == expected
    assert attach(model, LoRAConfig(rank=2, target_modules=targets)).layers == found.layers


@pytest.mark.parametrize("family", ["all-linear", "all-conv", "all"])
def test_words_leave_out_what_a_name_insists_on(family: str):
    model = nn.ModuleDict({"fc": nn.Linear(8, 8), "conv": nn.Conv1d(8, 8, 3), "tiny": nn.Linear(8, 1)})
    model["small"] = nn.Conv1d(1, 1, 1)
    found = report(model, target_modules=[family])
    assert {**found.left_out} == {
        name: "rank 2 is above 1, the highest rank of its weight; lower it with rank_pattern, or use modules_to_save"
        for name, families in (("tiny", ("all-linear", "all")), ("small", ("all-conv", "all")))
        if family in families
    }


def test_name_beside_a_word_insists_on_its_layer():
    model = nn.ModuleDict({"fc": nn.Linear(8, 8), "tiny": nn.Linear(8, 1)})
    with raises_and_changes_nothing(model, ValueError, "'tiny' cannot be adapted: rank 2 is above 1"):
        report(model, target_modules=["all-linear", "tiny"])


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


def test_many_wasteful_adapters_give_one_warning():
    model = nn.Sequential(*[nn.Linear(4, 4) for _ in range(9)])
    with pytest.warns(UserWarning, match=r"5 \(rank 2.* and 3 more") as seen:
        report(model)
    assert len(seen) == 1


def test_adapter_as_large_as_its_weight_warns():
    model = nn.ModuleDict({"small": nn.Linear(4, 4), "large": nn.Linear(40, 40)})
    with pytest.warns(
        UserWarning, match=r"not smaller than the weights they adapt: small \(rank 2, weight 4 x 4\)\."
    ) as seen:
        report(model)
    assert len(seen) == 1


# --- modules that were frozen beforehand


def gan_with_frozen_critic() -> nn.Module:
    critic = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8)).requires_grad_(False)
    model = nn.ModuleDict({"generator": nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)), "critic": critic})
    model["generator"][1].requires_grad_(False)
    return model


def test_frozen_modules_that_get_adapters_are_named_once_with_two_remedies():
    with pytest.warns(UserWarning, match=r"frozen.*'all-linear' reaches them: generator.1, critic\.") as seen:
        report(model := gan_with_frozen_critic())
    assert len(seen) == 1
    assert len(lora_layers(model)) == 4
    report(model)  # again, without a warning
    remedies = [
        {"exclude_modules": ["generator.1", "critic"]},
        {"target_modules": ["all-linear", "generator.1", "critic.*"]},
    ]
    for count, options in zip((1, 4), remedies, strict=True):
        [(option, value)] = options.items()
        assert f"{option}={value}" in str(seen[0].message)
        assert len(reached(gan_with_frozen_critic(), **options)) == count


class Follower(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.student = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8))
        self.teacher = copy.deepcopy(self.student).requires_grad_(False)


def test_a_frozen_copy_is_named_with_the_way_to_have_it_follow():
    with pytest.warns(
        UserWarning, match=r"copies: teacher \(of student\).*setup, after lightning_lora\.attach"
    ) as seen:
        report(Follower())
    assert len(seen) == 1


def moved(model: Follower) -> None:
    with torch.no_grad():
        model.teacher[2].bias[0] += 1e-3


def test_modules_without_values_are_no_copies():
    """As before DeepSpeed ZeRO-3 gathers them."""
    modules = {name: nn.ParameterList([torch.empty(0)]) for name in ("one", "other")}
    assert originals(["one"], modules) == {}
    assert originals(["one"], {name: nn.Identity() for name in modules}) == {}


def test_copies_are_of_modules_beside_them():
    layer = nn.Linear(4, 4)
    modules = {name: copy.deepcopy(layer) for name in ("one", "other", "third")}
    assert originals(["one", "other"], modules) == {"one": "third", "other": "third"}
    del modules["third"]
    assert originals(["one", "other"], modules) == {}


def test_a_name_that_contains_lora_is_not_an_adapters():
    modules = {
        name: nn.ModuleDict({"first": nn.Linear(1, 1), "explorator": nn.Linear(4, 4)}) for name in ("one", "other")
    }
    modules["other"]["first"].load_state_dict(modules["one"]["first"].state_dict())
    assert originals(["one"], modules) == {}


OTHERS: dict[str, Callable[[Follower], object]] = {
    "other values": moved,
    "no values": lambda model: model.to("meta"),
    "another precision": lambda model: model.teacher.double(),
    "another layer": lambda model: model.teacher.append(nn.Linear(8, 8)),
    "another class": lambda model: setattr(model, "teacher", nn.ModuleList(model.teacher)),
}


@pytest.mark.parametrize("other", OTHERS)
def test_a_frozen_module_with_something_else_is_no_copy(other: str):
    model = Follower()
    OTHERS[other](model)
    model.teacher.requires_grad_(False)
    with pytest.warns(UserWarning, match=r"without this warning\.$"):
        report(model)


def test_frozen_modules_are_no_surprise_if_all_are_frozen_named_or_left_alone():
    assert len(reached(gan_with_frozen_critic().requires_grad_(False))) == 4
    assert len(reached(gan_with_frozen_critic(), target_modules=["critic.*"])) == 2
    assert len(reached(gan_with_frozen_critic(), modules_to_save=["critic"], exclude_modules=["generator.1"])) == 1


def test_integer_parameters_do_not_count_as_frozen():
    model = nn.ModuleDict({"fc": nn.Linear(8, 8)})
    model["fc"].codes = nn.Parameter(torch.ones(3, dtype=torch.uint8), requires_grad=False)
    assert reached(model) == ["fc"]


def test_warning_raised_as_error_leaves_model_unchanged():
    model = nn.ModuleDict({"small": nn.Linear(4, 4)})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with raises_and_changes_nothing(model, UserWarning, "small"):
            report(model)


# --- requests that are refused, with the model as it was


def test_container_is_rejected_with_how_to_name_its_layers(tiny):
    with raises_and_changes_nothing(tiny, ValueError, r"'blocks.0' is a ModuleDict that contains .*'blocks.0.\*'"):
        report(tiny, target_modules=["blocks.0"])


@pytest.mark.parametrize("part", [nn.GELU(), nn.LayerNorm(4), nn.ReLU(), nn.Dropout(), nn.BatchNorm1d(4)])
def test_unsupported_kind_lists_supported_kinds(part: nn.Module, tiny):
    tiny.part = part
    kind = type(part).__name__
    with raises_and_changes_nothing(tiny, ValueError, rf"'part' is a {kind}; .*nn.Linear.*Conv1D.*nn.Embedding"):
        report(tiny, target_modules=["head", "part"])


def test_target_name_skips_modules_without_parameters_of_the_same_name(tiny):
    tiny.body = nn.ModuleDict({"head": nn.Identity()})  # as of a backbone whose own head was taken off
    assert reached(tiny, target_modules=["head"]) == ["head"]


def test_target_name_of_an_unsupported_kind_is_rejected_beside_a_layer_of_the_same_name(tiny):
    tiny.body = nn.ModuleDict({"head": nn.LayerNorm(4)})
    with raises_and_changes_nothing(tiny, ValueError, "'body.head' is a LayerNorm"):
        report(tiny, target_modules=["head"])


@pytest.mark.parametrize("option", ["exclude_modules", "modules_to_save"])
def test_leaving_out_every_layer_is_rejected(option: str):
    model = nn.ModuleDict({"a": nn.Linear(8, 8), "b": nn.Linear(8, 8)})
    with raises_and_changes_nothing(model, ValueError, f"left out every layer.*a, b: in {option}"):
        report(model, **{option: ["a", "b"]})


@pytest.mark.parametrize(
    ("body", "targets", "remedy"),
    [
        (nn.LSTM(8, 8), "all-linear", "fit body, too: set target_modules='all'"),
        (nn.Conv1d(8, 8, 3), "all-linear", r"fit body, too: set target_modules=\['all-linear', 'all-conv'\]"),
        (nn.LSTM(8, 8), ["all-conv", "all-linear"], "fit body, too: set target_modules='all'"),
    ],
)
def test_when_a_word_leaves_out_every_layer_others_that_can_be_adapted_are_named(body: nn.Module, targets, remedy: str):
    model = nn.ModuleDict({"body": body, "head": nn.Linear(8, 2), "stem": nn.Conv1d(2, 8, 1)})
    with raises_and_changes_nothing(model, ValueError, remedy):
        report(model, target_modules=targets, rank=4, exclude_modules=["stem"])


@pytest.mark.parametrize("option", ["exclude_modules", "modules_to_save"])
def test_layers_that_the_options_leave_out_are_not_suggested(option: str):
    model = nn.ModuleDict({"body": nn.ModuleDict({"rnn": nn.LSTM(8, 8)}), "head": nn.Linear(8, 2)})
    with pytest.raises(ValueError, match="left out every layer") as caught:
        report(model, rank=4, **{option: ["body"]})
    assert "Adapters fit" not in str(caught.value)


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


class Scaled(nn.Module):
    """A model with parameters of its own: some in a ParameterDict, one of them frozen, one of a layer's norm."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8))
        self.temperature = nn.Parameter(torch.ones(()))
        self.positions = nn.Parameter(torch.zeros(5, 8))
        self.still = nn.Parameter(torch.ones(3), requires_grad=False)
        self.shifts = nn.ParameterDict({"first": nn.Parameter(torch.zeros(8)), "second": nn.Parameter(torch.zeros(8))})


@pytest.mark.parametrize("targets", ["all", "all-linear", ["body.0"]])
def test_parameters_of_the_module_itself_are_said_to_stay_frozen(targets: str | list[str]):
    report = attach(model := Scaled(), LoRAConfig(rank=2, target_modules=targets))
    assert list(report.left_out) == ["temperature", "positions", "shifts.first", "shifts.second"]
    assert not any(model.get_parameter(name).requires_grad for name in report.left_out)
    assert "left out: temperature, positions, shifts.first, shifts.second (held by no layer, so frozen" in str(report)


def test_parameters_that_train_or_are_excluded_are_not_said_to_be_left_out():
    config = LoRAConfig(rank=2, modules_to_save=["shifts"])
    assert list(attach(Scaled(), config).left_out) == ["temperature", "positions"]
    assert list(attach(Scaled(), LoRAConfig(rank=2, exclude_modules=["shifts"])).left_out) == [
        "temperature",
        "positions",
    ]
