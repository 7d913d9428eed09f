"""``LoRAConfig``: every option validates itself, and a config is a value that survives plain formats."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_lora import LoRAConfig, attach
from lightning_lora.config import InitOptions

OTHER_THAN_DEFAULT: dict[str, Any] = {
    "rank": "auto",
    "rank_budget": "1%",
    "alpha": 7.5,
    "dropout": 0.25,
    "target_modules": ["q_proj", "blocks.*.v_proj"],
    "exclude_modules": ["blocks.1"],
    "layers": [0, -1, "8:16"],
    "modules_to_save": ["head"],
    "target_parameters": ["experts.up"],
    "target_slices": {"c_attn": {"q": "0:768", "v": "1536:2304"}},
    "trainable_token_indices": {"embed": [3, 7]},
    "bias": "all",
    "use_dora": True,
    "lora_bias": True,
    "untie_weights": True,
    "rank_pattern": {"v_proj": 2},
    "alpha_pattern": {"q_proj": 1.5},
    "use_rslora": True,
    "init": {"name": "eva", "batches": 3},
    "adapter_dtype": "bfloat16",
    "frozen_norm": "track",
}

NO_NUMBERS = ["1", None, True, [1], 1j, torch.tensor(1.0)]
NO_NAMES = [None, 3, ["a", 3], {"a"}, {"a": 1}, b"a", [None]]
WRONG_TYPE = {
    "rank": [*NO_NUMBERS, 1.0, 2.5],
    "init": [{"batches": 3}],
    "alpha": NO_NUMBERS,
    "dropout": NO_NUMBERS,
    "target_modules": NO_NAMES,
    "exclude_modules": NO_NAMES,
    "layers": [None, 3, "8:16", [1.0], [True], [None], {0}, {"a": 1}],
    "modules_to_save": [*NO_NAMES, "head"],
    "target_parameters": [*NO_NAMES, "up"],
    "rank_pattern": [None, 3, "a", ["a"], {"a": "4"}, {"a": 2.0}, {"a": None}, {"a": True}],
    "alpha_pattern": [None, 3, "a", ["a"], {"a": "4"}, {"a": None}, {"a": True}],
    "target_slices": [None, 3, "a", ["a"], {"a": "0:3"}, {"a": None}],
    "trainable_token_indices": [None, 3, "a", [1.0], [True], ["1"], {"a": 3}, {"a": None}, {"a": [1.5]}],
    **{option: ["false", "no", 1, 0, None] for option in ("use_rslora", "use_dora", "lora_bias", "untie_weights")},
}
WRONG_VALUE = {
    "rank": [0, -1],
    "alpha": [0, 0.0, -1.0, math.inf, -math.inf, math.nan],
    "dropout": [-0.1, 1.0, 1.5, math.nan, math.inf],
    "target_modules": ["", [], (), ["a", ""], "(", "*", "a[", "q_proj)"],
    "exclude_modules": [[""], ["a", ""], "(", "*"],
    "layers": [["8"], ["8-16"], ["a:b"], [""], ["1:8:0"]],
    "modules_to_save": [[""]],
    "target_parameters": [[""]],
    "target_slices": [{"a": {}}, *({"a": {"q": text}} for text in ("", "3", ":,", "a:b", "0:4:0", "0:1:2:3"))],
    "trainable_token_indices": [[-1], [1, 1], {"a": []}, {"a": [-2]}, {"a": [3, 5, 3]}],
    "bias": ["", "lora", True],
    "rank_pattern": [{"a": 0}, {"a": -3}],
    "alpha_pattern": [{"a": 0}, {"a": math.nan}, {"a": math.inf}, {"a": -1.0}],
    "init": ["", "pisa", "Kaiming", 3, True],
    "rank_budget": [0, -1, True, 1.5, "0%", "-1%", "1 percent", "8XB", "0MB"],
    "adapter_dtype": ["", "fp32", "torch.float32", "int8", torch.float32],
    "frozen_norm": ["", "frozen", True],
}


def _pairs(table: dict[str, list[Any]]) -> Any:
    cases = [pytest.param(option, value, id=f"{option}={value!r}") for option in table for value in table[option]]
    return pytest.mark.parametrize(("option", "value"), cases)


def _shown(value: Any) -> str:
    """Return the part of a value that the message must show."""
    if isinstance(value, dict):
        [(key, inner)] = value.items()
        return _shown(inner) if isinstance(inner, dict) and inner else repr(inner if isinstance(key, str) else key)
    return "()" if value == [] else repr(value)


@_pairs(WRONG_TYPE)
def test_wrong_type_names_option_and_value(option: str, value: Any):
    with pytest.raises(TypeError, match=f"LoRAConfig.{option}.*{re.escape(_shown(value))}"):
        LoRAConfig(**{option: value})


@_pairs(WRONG_VALUE)
def test_invalid_value_names_option_and_value(option: str, value: Any):
    with pytest.raises(ValueError, match=f"LoRAConfig.{option}.*{re.escape(_shown(value))}"):
        LoRAConfig(**{option: value})


@pytest.mark.parametrize("option", [option.name for option in dataclasses.fields(LoRAConfig)])
def test_every_option_is_checked(option: str):
    with pytest.raises((TypeError, ValueError), match=option):
        LoRAConfig(**{option: object()})


@pytest.mark.parametrize("option", [each.name for each in dataclasses.fields(LoRAConfig) if each.default is not None])
def test_none_is_answered_by_leaving_the_option_out(option: str):
    with pytest.raises(TypeError, match=rf"LoRAConfig\.{option}=None is not possible; leave the option out instead"):
        LoRAConfig(**{option: None})


@pytest.mark.parametrize("option", ["rank_pattern", "alpha_pattern"])
def test_invalid_number_in_pattern_names_its_key(option: str):
    with pytest.raises(ValueError, match=rf"LoRAConfig.{option}\['q_proj'\].*-2"):
        LoRAConfig(**{option: {"v_proj": 2, "q_proj": -2}})


@pytest.mark.parametrize("option", ["init", "adapter_dtype", "frozen_norm"])
def test_unknown_choice_lists_choices(option: str):
    with pytest.raises(ValueError, match=f"'{getattr(LoRAConfig(), option)}'"):
        LoRAConfig(**{option: "unknown"})


def test_unknown_option_is_a_type_error():
    with pytest.raises(TypeError, match="rang"):
        LoRAConfig(rang=4)


def test_options_are_keyword_only():
    with pytest.raises(TypeError):
        LoRAConfig(8)


def test_examples_cover_every_option():
    names = {option.name for option in dataclasses.fields(LoRAConfig)}
    assert OTHER_THAN_DEFAULT.keys() == names
    assert WRONG_TYPE.keys() | WRONG_VALUE.keys() == names
    plain = LoRAConfig().to_dict()
    assert all(plain.get(name) != value for name, value in OTHER_THAN_DEFAULT.items())


def test_config_without_recent_options_is_written_as_before_them():
    names = {option.name for option in dataclasses.fields(LoRAConfig)}
    assert LoRAConfig(rank=3).to_dict().keys() == names - {"layers", "rank_budget"}
    assert LoRAConfig(layers=[0]).to_dict().keys() == names - {"rank_budget"}


@pytest.mark.parametrize("options", [{}, OTHER_THAN_DEFAULT, {"target_modules": r".*_proj", "exclude_modules": "a|b"}])
def test_config_round_trips_through_dict_and_json(options: dict[str, Any]):
    config = LoRAConfig(**options)
    plain = json.loads(json.dumps(config.to_dict()))
    assert plain == config.to_dict()
    assert plain.keys() | {"layers", "rank_budget"} == {option.name for option in dataclasses.fields(LoRAConfig)}
    assert plain | options == plain
    assert LoRAConfig.from_dict(plain) == config


def test_missing_options_take_defaults():
    assert LoRAConfig.from_dict({"rank": 2}) == LoRAConfig(rank=2)


def test_from_dict_names_unknown_keys():
    with pytest.raises(ValueError, match=r"\['dora', 'ranks'\]"):
        LoRAConfig.from_dict({"rank": 2, "ranks": 3, "dora": True})


def test_from_dict_validates():
    with pytest.raises(ValueError, match=r"LoRAConfig.rank"):
        LoRAConfig.from_dict({"rank": 0})


def test_config_is_frozen():
    config = LoRAConfig()
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.rank = 4


def test_replace_validates():
    assert dataclasses.replace(LoRAConfig(), rank=4).rank == 4
    with pytest.raises(ValueError, match="rank"):
        dataclasses.replace(LoRAConfig(), rank=0)


@pytest.mark.parametrize("option", ["target_modules", "exclude_modules", "modules_to_save", "target_parameters"])
def test_config_copies_lists(option: str):
    names = ["head"]
    config = LoRAConfig(**{option: names})
    names.append("embed")
    assert getattr(config, option) == ("head",)


@pytest.mark.parametrize("option", ["rank_pattern", "alpha_pattern"])
def test_config_copies_dicts(option: str):
    pattern = {"head": 2}
    config = LoRAConfig(**{option: pattern})
    pattern["embed"] = 0
    assert getattr(config, option) == {"head": 2}
    config.to_dict()[option]["embed"] = 0
    assert getattr(config, option) == {"head": 2}


def test_number_subclasses_become_plain_numbers():
    class Count(int):  # as jsonargparse's and numpy's
        pass

    class Share(float):
        pass

    config = LoRAConfig(rank=Count(4), alpha=Share(2), dropout=Share(0.5), rank_pattern={"a": Count(3)})
    assert [type(value) for value in (config.rank, config.alpha, config.dropout)] == [int, float, float]
    assert type(config.rank_pattern["a"]) is int
    starts = LoRAConfig(rank="auto", rank_budget=Count(9), init=InitOptions(name="eva", batches=Count(3), rho=Share(2)))
    others = [InitOptions(name="corda", power=Share(0.5)), InitOptions(name="lora_ga", gamma=Share(4))]
    kept = [starts.rank_budget, *(value for each in (starts.start, *others) for value in each.changed().values())]
    assert [type(value) for value in kept] == [int, int, float, float, float]


def test_no_embedding_and_no_token_are_the_same_request():
    assert LoRAConfig(trainable_token_indices={}) == LoRAConfig()


def test_lists_and_tuples_make_equal_configs():
    assert LoRAConfig(target_modules=["a"]) == LoRAConfig(target_modules=("a",))


@pytest.mark.parametrize(
    ("use_rslora", "expected"), [(False, 12.0 / 9), (True, 12.0 / math.sqrt(9))], ids=["alpha/r", "rslora"]
)
def test_scaling_is_alpha_over_rank_or_its_root(use_rslora: bool, expected: float):
    assert LoRAConfig(use_rslora=use_rslora).scaling(9, 12.0) == pytest.approx(expected, rel=1e-15)


def test_readme_states_the_defaults_and_the_scalings_of_a_rank_sweep():
    readme = " ".join((Path(__file__).parents[1] / "README.md").read_text().split())
    config = LoRAConfig()
    scalings = [f"{config.scaling(rank, config.alpha):g}" for rank in (1, 2, 4, 8)]
    assert f"The defaults are rank {config.rank} and alpha {config.alpha:g}." in readme
    assert f"ranks 1, 2, 4 and 8 give {', '.join(scalings[:-1])} and {scalings[-1]}" in readme


def test_defaults_attach(tiny):
    report = attach(tiny, LoRAConfig(rank=2))
    assert {layer.scaling for layer in report.layers} == {LoRAConfig().alpha / 2}


def test_repr_shows_what_differs_from_the_defaults():
    config = LoRAConfig(rank=3, target_modules=["a"])
    assert repr(config) == "LoRAConfig(rank=3, target_modules=['a'])"
    assert eval(repr(config)) == config
    assert eval(repr(LoRAConfig(**OTHER_THAN_DEFAULT))) == LoRAConfig(**OTHER_THAN_DEFAULT)


# --- a start with options


def test_a_start_without_options_of_its_own_is_kept_as_its_name():
    assert LoRAConfig(init={"name": "eva"}) == LoRAConfig(init="eva")
    assert LoRAConfig(init=InitOptions(name="eva")).init == "eva"
    assert LoRAConfig(init={"name": "eva", "batches": 3}).init == InitOptions(name="eva", batches=3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "kaiming", "batches": 3}, "'batches' is an option of 'eva'.* not of 'kaiming'"),
        ({"name": "eva", "power": 0.5}, "'power' is an option of 'corda'; not of 'eva'"),
        ({"name": "corda", "power": 2.0}, "init.power must be 0.5 or 1, got 2.0"),
        ({"name": "corda", "mode": "ppm"}, "init.mode.*'ppm'"),
        ({"name": "eva", "batches": 0}, "init.batches must be >= 1, got 0"),
        ({"name": "eva", "rho": 0.5}, "init.rho must be at least 1, got 0.5"),
        ({"name": "eva", "stats_budget": "1"}, "init.stats_budget must be a size such as '500MB'.*got '1'"),
        ({"name": "evaa"}, "'evaa' is unknown"),
    ],
)
def test_a_wrong_option_of_a_start_is_named_with_its_value(options: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        LoRAConfig(init=options)


@pytest.mark.parametrize("options", [{"init": "eva"}, {"rank_budget": "1%"}, {"init": "pissa", "rank_budget": "1%"}])
def test_ranks_from_data_need_a_budget_and_a_start_from_data(options: dict[str, Any]):
    with pytest.raises(ValueError, match="rank='auto' needs a rank_budget, such as '1%', and a start from data"):
        LoRAConfig(rank="auto", **options)


def test_a_rank_budget_needs_ranks_from_data():
    with pytest.raises(ValueError, match="rank_budget='1%' needs rank='auto', got rank=4"):
        LoRAConfig(rank=4, rank_budget="1%")
