from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from lightning_lora import LoRACallback, LoRAConfig, attach, lora_layers
from lightning_lora.analysis import adapter_size, plan_budget
from lightning_lora.disk.skeleton import model_of_shapes
from lightning_lora.storage.safetensors import StoredTensor
from tests.peft_format.kinds import Experts
from tests.peft_format.models import QUIET, bert, gpt2, llama, mixtral, t5, tied_llama, vit

# --- budgets


TABLE_5 = 18_874_368  # of the LoRA paper: "18M"


class Block(nn.Module):
    """The projections of one attention, and nothing else."""

    def __init__(self, size: int) -> None:
        super().__init__()
        for name in "qkvo":
            setattr(self, f"{name}_proj", nn.Linear(size, size, bias=False))


def blocks(count: int, size: int) -> nn.Module:
    return nn.ModuleList(Block(size) for _ in range(count))


@pytest.fixture(scope="module")
def gpt3() -> nn.Module:
    with torch.device("meta"):
        return blocks(96, 12288)


def test_table_5_of_paper(gpt3: nn.Module):
    plan = plan_budget(gpt3, LoRAConfig(adapter_dtype="bfloat16"), parameters=TABLE_5)
    found = {choice.targets: choice for choice in plan.choices}
    assert len(found) == 15
    for targets, rank in {
        ("q_proj",): 8,
        ("k_proj",): 8,
        ("v_proj",): 8,
        ("o_proj",): 8,
        ("q_proj", "k_proj"): 4,
        ("q_proj", "v_proj"): 4,
        ("q_proj", "k_proj", "v_proj", "o_proj"): 2,
    }.items():
        assert (found[targets].rank, found[targets].parameters) == (rank, TABLE_5)
        assert found[targets].file_bytes == 37_748_736
        assert found[targets].optimizer_bytes == 8 * TABLE_5
    assert plan.choices[0].targets == ("q_proj", "k_proj", "v_proj", "o_proj")


def test_adapter_size_inverts_budget(gpt3: nn.Module):
    for targets, rank in ((["q_proj"], 8), (["q_proj", "v_proj"], 4), (["q_proj", "k_proj", "v_proj", "o_proj"], 2)):
        choice = adapter_size(gpt3, LoRAConfig(rank=rank, target_modules=targets))
        assert choice.parameters == TABLE_5
        assert choice.share == pytest.approx(TABLE_5 / (96 * 4 * 12288**2))


@pytest.mark.parametrize("options", [{}, {"use_dora": True}, {"lora_bias": True}])
@pytest.mark.parametrize("budget", ["parameters", "file_bytes", "optimizer_bytes"])
def test_choice_matches_attach_and_is_maximal(options: dict[str, bool], budget: str):
    config = LoRAConfig(**options)
    limit = {"parameters": 4000, "file_bytes": 16000, "optimizer_bytes": 32000}[budget]
    for choice in plan_budget(blocks(2, 64), config, **{budget: limit}).choices:
        for more, fits in ((0, True), (1, False)):
            model = blocks(2, 64)
            made = attach(model, LoRAConfig(rank=choice.rank + more, target_modules=list(choice.targets), **options))
            assert (made.adapter_parameters <= 4000) is fits
            if fits:
                assert made.adapter_parameters == choice.parameters
                assert len(made.layers) == choice.layers


STARTS = [{}, {"init": "pissa"}, {"init": "pissa", "use_dora": True}, {"init": "lora_ga", "lora_bias": True}]


@pytest.mark.parametrize("options", STARTS, ids=str)
def test_bytes_are_those_of_memory_and_of_a_file(options: dict[str, Any]):
    config = LoRAConfig(rank=3, **options)
    attach(model := blocks(2, 64), config)
    tensors = [t for layer in lora_layers(model).values() for t in (*layer.lora.parameters(), *layer.lora.buffers())]
    assert adapter_size(blocks(2, 64), config).file_bytes == sum(tensor.nbytes for tensor in tensors)


@pytest.mark.parametrize("options", STARTS, ids=str)
def test_a_budget_in_bytes_counts_the_starts_that_are_kept(options: dict[str, Any]):
    config = LoRAConfig(**options)
    for choice in plan_budget(blocks(2, 64), config, file_bytes=16000).choices:
        targets = list(choice.targets)
        here, more = (
            adapter_size(blocks(2, 64), replace(config, rank=choice.rank + plus, target_modules=targets)).file_bytes
            for plus in (0, 1)
        )
        assert here == choice.file_bytes <= 16000 < more


def test_targets_that_are_parameters_are_entries_of_target_parameters():
    model = nn.ModuleDict({"attention": nn.MultiheadAttention(16, 2), "lstm": nn.LSTM(16, 16)})
    keys = {name.rpartition(".")[2] for name, _ in model.named_parameters()}
    for targets in [c.targets for c in plan_budget(model, LoRAConfig(target_modules="all"), rank=2).choices[1:]]:
        names = [name for name in targets if name in keys]
        rest = [name for name in targets if name not in names]
        assert attach(copy.deepcopy(model), LoRAConfig(rank=2, target_modules=rest, target_parameters=names)).layers
    with pytest.raises(
        ValueError, match=r"'attention.in_proj_weight' is a parameter: name its layer.*target_parameters"
    ):
        attach(model, LoRAConfig(rank=2, target_modules=["in_proj_weight"]))


def test_experts_and_slices_are_counted():
    model = nn.ModuleDict({"experts": Experts(), "qkv": nn.Linear(8, 24)})
    config = LoRAConfig(
        rank=2,
        target_modules=[],
        target_parameters=["experts.up", "experts.down"],
        target_slices={"qkv": {"q": "0:8", "v": "16:24"}},
    )
    choice = adapter_size(model, config)
    assert choice.targets == ("q", "v", "up", "down")
    assert choice.parameters == 2 * (2 * (8 + 8) + 2 * 3 * (8 + 12))
    plan = plan_budget(model, config, parameters=2 * 60, groups=[["up"], ["q", "v"]])
    assert {c.targets: (c.rank, c.parameters) for c in plan.choices} == {("up",): (2, 120), ("q", "v"): (3, 96)}


def test_small_head_limits_no_rank_but_its_own():
    model = nn.ModuleDict({"head": nn.Linear(64, 2), "body": nn.Linear(64, 64)})
    plan = plan_budget(model, parameters=1280)
    assert {c.targets: (c.rank, c.capped) for c in plan.choices} == {("body",): (10, ()), ("head",): (2, ("head",))}
    assert plan.without == ("head",)
    assert "too small for the rank: head; train such layers with modules_to_save" in str(plan)
    assert plan_budget(model, parameters=2 * (66 + 128)).choices[0].targets == ("head", "body")  # it fits rank 2


def test_rank_of_given_groups_is_limited_by_their_smallest_layer():
    model = nn.ModuleDict({"head": nn.Linear(64, 2), "body": nn.Linear(64, 64)})
    plan = plan_budget(model, parameters=1280, groups=[["head", "body"]])
    assert [(c.rank, c.capped) for c in plan.choices] == [(2, ("head",))]
    assert "rank limited by the size of: head" in str(plan)


def test_small_layers_in_blocks_limit_the_rank_of_all():
    model = nn.ModuleList(nn.ModuleDict({"k": nn.Linear(64, 4), "q": nn.Linear(64, 64)}) for _ in range(2))
    found = {choice.targets: (choice.rank, choice.capped) for choice in plan_budget(model, parameters=8000).choices}
    assert found[("k", "q")] == (4, ("0.k",))


def test_many_groups_are_combined_in_pairs():
    model = nn.ModuleDict({name: nn.Linear(8, 8) for name in "abcdef"})
    assert len(plan_budget(model, parameters=1000).choices) == 6 + 15 + 1


def test_numbered_layers_keep_full_names():
    model = nn.ModuleDict({"net": nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))})
    found = {choice.targets for choice in plan_budget(model, parameters=100).choices}
    assert found == {("net.0", "net.2"), ("net.0",), ("net.2",)}


def test_budget_too_small_for_anything():
    plan = plan_budget(blocks(2, 16), parameters=10)
    assert plan.choices == ()
    assert "nothing fits" in str(plan)
    assert "q_proj + k_proj" in str(plan)


def test_table_and_json(gpt3: nn.Module):
    plan = plan_budget(gpt3, parameters=TABLE_5)
    lines = str(plan).splitlines()
    assert lines[0] == "A budget of 18,874,368 parameters for a base of 57,982,058,496 parameters:"
    assert " ".join(lines[3].split()) == "q_proj + k_proj + v_proj + o_proj 384 2 18,874,368 75.5 151.0 0.033%"
    assert json.loads(json.dumps(plan.to_dict()))["choices"][0]["rank"] == 2


def test_rank_instead_of_budget(gpt3: nn.Module):
    plan = plan_budget(gpt3, rank=4, groups=[["q_proj"], ["q_proj", "v_proj"]])
    assert str(plan).startswith("A budget of rank 4 for a base of")
    assert {choice.targets: choice.parameters for choice in plan.choices} == {
        ("all-linear",): 2 * TABLE_5,
        ("q_proj",): TABLE_5 // 2,
        ("q_proj", "v_proj"): TABLE_5,
    }


def test_layers_too_small_for_given_rank_are_in_no_choice():
    small = nn.ModuleDict({"head": nn.Linear(64, 2), "body": nn.Linear(64, 64), "neck": nn.Linear(64, 5)})
    plan = plan_budget(small, rank=5)
    ranks = {choice.targets: (choice.rank, choice.layers, choice.capped) for choice in plan.choices}
    assert ranks == {("all-linear",): (5, 2, ()), ("body",): (5, 1, ()), ("neck",): (5, 1, ())}
    assert plan.without == ("head",)
    with pytest.raises(ValueError, match="left out every layer"):
        plan_budget(small, rank=65)


@pytest.mark.parametrize("options", [{}, {"use_dora": True}, {"rank_pattern": {"head": 2}}], ids=str)
def test_first_choice_at_rank_is_what_callback_does(options: dict[str, Any]):
    def build() -> nn.Module:
        return nn.ModuleDict({"body": blocks(2, 16), "pooler": nn.Linear(16, 16), "head": nn.Linear(16, 2)})

    made = attach(build(), LoRAConfig(rank=4, **options))
    first = plan_budget(build(), LoRAConfig(**options), rank=4).choices[0]
    assert first.is_default
    assert (first.targets, first.layers, first.parameters) == (
        ("all-linear",),
        len(made.layers),
        made.adapter_parameters,
    )
    line = str(plan_budget(build(), LoRAConfig(**options), rank=4)).splitlines()[3]
    assert line.startswith("all-linear, as LoRACallback(rank=4)")


def test_choices_that_cost_the_same_share_a_line():
    model = nn.ModuleDict({name: nn.Linear(8, 8) for name in "abcdef"})
    lines = str(plan_budget(model, rank=2)).splitlines()[3:]
    assert [line.partition("  ")[0] for line in lines] == [
        "all-linear, as LoRACallback(rank=2)",
        "a + b or a + c or 13 more",
        "a or b or 4 more",
    ]


def test_invalid_budgets_raise():
    with pytest.raises(ValueError, match="got parameters, rank"):
        plan_budget(blocks(1, 8), parameters=1, rank=1)
    with pytest.raises(ValueError, match="rank must be at least 1, got 0"):
        plan_budget(blocks(1, 8), rank=0)
    with pytest.raises(ValueError, match="exactly one"):
        plan_budget(blocks(1, 8))
    with pytest.raises(ValueError, match="exactly one"):
        plan_budget(blocks(1, 8), parameters=1, file_bytes=1)
    with pytest.raises(ValueError, match="q_porj"):
        plan_budget(blocks(1, 8), parameters=100, groups=[["q_porj"]])


# --- a model from the headers of its files


pytestmark = QUIET


@pytest.mark.parametrize("make", [gpt2, llama, tied_llama, bert, t5, vit], ids=lambda make: make.__name__)
def test_shapes_on_disk_cost_same_as_loaded_model(
    make: Callable[[], nn.Module], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    model = make()
    model.save_pretrained(tmp_path, max_shard_size="6KB")
    monkeypatch.setattr(StoredTensor, "read", None)  # no weight is read
    found = model_of_shapes(tmp_path)
    for rank in (2, 8):
        by_shapes = plan_budget(found.module, LoRAConfig(exclude_modules=found.heads), rank=rank)
        assert by_shapes.base_parameters == plan_budget(model, rank=rank).base_parameters
        report = attach(make(), LoRACallback(rank=rank).config)
        first = by_shapes.choices[0]
        assert (first.parameters, first.layers) == (report.adapter_parameters, len(report.layers))
        assert {layer.rank for layer in report.layers} == {first.rank} == {rank}


@pytest.mark.parametrize("sizes", [{}, {"kdim": 12, "vdim": 20}], ids=["packed", "separate"])
def test_torch_attention_on_disk_costs_same_as_loaded(sizes: dict[str, int], tmp_path: Path):
    model = nn.ModuleDict({"attention": nn.MultiheadAttention(16, 2, **sizes), "fc": nn.Linear(16, 8)})
    save_file(dict(model.state_dict()), tmp_path / "model.safetensors")
    first = plan_budget(model_of_shapes(tmp_path).module, rank=4).choices[0]
    report = attach(model, LoRACallback(rank=4).config)
    assert (first.layers, first.parameters) == (len(report.layers), report.adapter_parameters)


def test_output_layers_by_name_or_vocabulary(tmp_path: Path):
    weights = {"embed_tokens.weight": (50, 8), "blocks.0.q.weight": (8, 8), "unembed_out.weight": (50, 8)}
    tensors = {name: torch.zeros(shape) for name, shape in weights.items()}
    save_file(tensors | {"lm_head.weight": torch.zeros(49, 8)}, tmp_path / "model.safetensors")
    assert model_of_shapes(tmp_path).heads == ("lm_head",)
    tensors["output.weight"] = torch.zeros(50, 8)
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text('{"vocab_size": 50}')
    assert model_of_shapes(tmp_path).heads == ("output",)


def test_experts_on_disk_are_counted(tmp_path: Path):
    mixtral().save_pretrained(tmp_path)
    found = model_of_shapes(tmp_path)
    assert found.experts == sum(".experts." in name for name, _ in found.module.named_parameters()) > 0


def test_quantized_base_raises(tmp_path: Path):
    save_file({"layer.weight": torch.zeros(8, 8, dtype=torch.uint8)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="layer are quantized"):
        model_of_shapes(tmp_path)
