"""Which names an entry means: exact, suffix, glob, regular expression; names behind wrappers; tied parameters."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lightning_lora import names as targets
from lightning_lora.names import block_of, numbers_of_blocks, parse_slices, stacks_of_blocks


@pytest.mark.parametrize(
    ("entry", "name", "expected"),
    [
        ("q", "q", True),
        ("q", "blocks.0.q", True),
        ("q", "freq", False),
        ("q", "blocks.0.freq", False),
        ("q", "q.inner", False),
        ("0.q", "blocks.0.q", True),
        ("0.q", "blocks.10.q", False),
        ("blocks.0.q", "blocks.0.q", True),
        ("blocks.0.q", "decoder.blocks.0.q", True),
        ("decoder.blocks.0.q", "blocks.0.q", False),
        ("Q", "q", False),
        ("a.b", "a_b", False),
        ("q*", "blocks.0.q_proj", True),
        ("*q", "freq", True),
        ("?_proj", "blocks.0.q_proj", True),
        ("?_proj", "blocks.0.qk_proj", False),
        ("[qv]_proj", "blocks.0.v_proj", True),
        ("[qv]_proj", "blocks.0.k_proj", False),
        ("blocks.*.q", "blocks.0.q", True),
        ("blocks.*.q", "model.blocks.0.q", True),
        ("blocks.*.q", "blocks.0.freq", False),
        ("blocks.*.q", "myblocks.0.q", False),
    ],
)
def test_list_entry_matches_name_suffix_or_glob(entry: str, name: str, expected: bool):
    assert targets.matches(entry, name) is expected


@pytest.mark.parametrize(
    ("expression", "name", "expected"),
    [
        (r".*\.q", "blocks.0.q", True),
        (r"q", "blocks.0.q", False),
        (r"blocks\.\d+\.q", "blocks.12.q", True),
        (r"blocks\.\d+\.q", "blocks.12.qk", False),
        (r"blocks\.\d+\.q", "model.blocks.12.q", False),
    ],
)
def test_string_is_a_regex_over_the_full_name(expression: str, name: str, expected: bool):
    assert (targets.selected(expression, [name]) is not None) is expected


@pytest.mark.parametrize(
    ("key", "name", "expected"),
    [
        ("q", "blocks.0.q", True),
        ("q", "freq", False),
        ("blocks.0.q", "model.blocks.0.q", True),
        (r"blocks\.[01]\.q", "blocks.1.q", True),
        (r"blocks\.[01]\.q", "blocks.2.q", False),
        (r"\d\.q", "blocks.1.q", True),
        (r"q|v", "blocks.1.v", True),
        (r"q|v", "blocks.1.vq", False),
        (r".*q", "freq", True),
        ("*.q", "blocks.1.q", True),
        ("blocks.*.q", "blocks.1.q", True),
    ],
)
def test_pattern_key_is_an_entry_or_a_suffix_regex(key, name, expected):
    assert targets.matches_pattern(key, name) is expected


@pytest.mark.parametrize(
    ("name", "clean"),
    [
        ("_orig_mod.layer.weight", "layer.weight"),
        ("layer._orig_mod.weight", "layer.weight"),
        ("layer._orig_mod", "layer"),
        ("_orig_mod", ""),
        ("_fsdp_wrapped_module.a._checkpoint_wrapped_module.b", "a.b"),
        ("a._checkpoint_wrapped_module", "a"),
        ("layer.weight", "layer.weight"),
        ("my_orig_mod.weight", "my_orig_mod.weight"),
        ("my_orig_module", "my_orig_module"),
    ],
)
def test_clean_names_drop_wrappers(name: str, clean: str):
    assert targets.clean_name(name) == clean


def test_shared_module_appears_once_with_all_names(tiny):
    tiny.alias = tiny.blocks[0]["q_proj"]
    names = targets.module_names(tiny)
    assert names["blocks.0.q_proj"] == (tiny.alias, ("blocks.0.q_proj", "alias"))
    assert "alias" not in names


@pytest.mark.parametrize(
    ("entry", "near"),
    [("q_porj", "q_proj"), ("blocks.0.q_porj", "blocks.0.q_proj"), ("haed", "head"), ("q_projj", "q_proj")],
)
def test_misspelled_name_suggests_near_names(entry: str, near: str, tiny):
    assert near in targets.near_names(entry, targets.target_names(tiny))


def test_target_names_lists_every_module_with_its_class(tiny):
    found = targets.target_names(tiny)
    assert found["blocks.1.v_proj"] == "Linear"
    assert found["embed"] == "Embedding"
    assert found.keys() == {name for name, _ in tiny.named_modules() if name}


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated")  # torch's own, on import
@pytest.mark.parametrize("every_name", [False, True])
def test_walk_matches_named_modules(every_name: bool, tiny):
    tiny.alias = tiny.blocks
    tiny.blocks[0]["q_proj"] = torch.compile(tiny.blocks[0]["q_proj"])
    tiny.register_module("nothing", None)
    for root in (tiny, torch.compile(tiny)):
        expected = [(targets.clean_name(n), m) for n, m in root.named_modules(remove_duplicate=not every_name)]
        assert targets.walk(root, every_name=every_name) == expected


@pytest.mark.parametrize(
    ("name", "roots", "expected"),
    [("a.b", ["a"], True), ("a", ["a"], True), ("ab", ["a"], False), ("b.a", ["a"], False), ("a", [], False)],
)
def test_is_below_includes_the_root(name: str, roots: list[str], expected: bool):
    assert targets.is_below(name, roots) is expected


def tied(model: nn.Module) -> dict[str, tuple[str, ...]]:
    """Return the ties among all parameters of a model."""
    return targets.tied_names(targets.parameter_names(dict(model.named_modules())))


def test_ties_by_identity_and_memory_are_found():
    model = nn.ModuleDict({"a": nn.Linear(4, 4), "b": nn.Linear(4, 4), "c": nn.Linear(4, 4), "d": nn.Linear(4, 4)})
    model["b"].weight = model["a"].weight
    model["c"].weight = nn.Parameter(model["a"].weight.detach())  # another Parameter on the same memory
    assert tied(model) == {
        "a.weight": ("b.weight", "c.weight"),
        "b.weight": ("a.weight", "c.weight"),
        "c.weight": ("a.weight", "b.weight"),
    }


def test_ties_on_meta_device_are_found():
    with torch.device("meta"):
        model = nn.ModuleDict({"a": nn.Linear(4, 4), "b": nn.Linear(4, 4), "c": nn.Linear(4, 4)})
    model["b"].weight = model["a"].weight
    assert tied(model) == {"a.weight": ("b.weight",), "b.weight": ("a.weight",)}


def test_module_with_two_names_is_not_tied_to_itself(tiny):
    tiny.alias = tiny.head
    assert tied(tiny) == {}


def test_empty_parameters_are_not_tied():
    model = nn.ModuleDict({"a": nn.Module(), "b": nn.Module()})
    for part in model.values():
        part.weight = nn.Parameter(torch.empty(0, 4))
    assert tied(model) == {}


def test_listed_counts_the_rest():
    assert targets.listed(["a", "b"]) == "a, b"
    assert targets.listed(list("abcdefgh")) == "a, b, c, d, e, f and 2 more"


@pytest.mark.parametrize(
    ("parameters", "expected"),
    [
        (["layers.0.q.weight", "layers.1.q.weight"], {"layers": 2}),
        (["0.q.weight", "1.q.weight", "2.q.weight"], {"": 3}),
        (["h.0.q.weight", "h.1.q.weight", "h.1.extra.weight", "h.2.q.weight"], {"h": 3}),  # one of them differs
        (["net.0.weight", "net.2.weight"], {}),  # layers, not blocks
        (["net.0.q.weight", "net.1.v.weight"], {}),  # nothing is repeated
        (["h.0.q.weight"], {}),
        ([f"{stack}.h.{at}.q.weight" for stack in "ab" for at in range(2)], {"a.h": 2, "b.h": 2}),
    ],
)
def test_repeated_blocks_are_found_by_their_parameters(parameters: list[str], expected: dict[str, int]):
    assert stacks_of_blocks(parameters) == expected


def test_outermost_stack_counts():
    stacks = stacks_of_blocks(f"layers.{at}.experts.{e}.up.weight" for at in range(4) for e in range(3))
    assert stacks["layers.1.experts"] == 3
    assert block_of("layers.2.experts.1.up", stacks) == ("layers", 2)
    assert block_of("head", stacks) is None


@pytest.mark.parametrize("count", [1, 4, 9])
@pytest.mark.parametrize("text", [":", "1:3", "-2:", "::2", "0:2,3:4", "3:1", "::-1"])
def test_numbers_of_blocks_are_those_of_python(text: str, count: int):
    numbers = list(range(count))
    expected = {n for part in parse_slices(text) for n in numbers[part]}
    assert numbers_of_blocks(text, count)[0] == expected


@pytest.mark.parametrize(
    ("entry", "fits"), [(3, True), (4, False), (-4, True), (-5, False), ("0:4", True), ("0:5", False), ("2:2", False)]
)
def test_number_that_no_block_has_does_not_fit(entry: int | str, fits: bool):
    assert numbers_of_blocks(entry, 4)[1] is fits
