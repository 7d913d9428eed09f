from __future__ import annotations

import pytest
import torch
from torch import nn

from lightning_lora import LoRAConfig, attach, lora_layers
from lightning_lora.analysis import analyze, findings, suggest_ranks
from lightning_lora.analysis.reports import next_run, rank_pattern
from tests.contract import train_all


@pytest.fixture
def model() -> nn.Module:
    """Blocks whose updates are of rank 1 and 3 for ``up``, 2 and 2 for ``down``, and 0 for the head."""
    model = nn.ModuleDict(
        {
            "h": nn.ModuleList(nn.ModuleDict({"up": nn.Linear(20, 30), "down": nn.Linear(30, 20)}) for _ in range(2)),
            "head": nn.Linear(20, 9),
        }
    )
    attach(model, LoRAConfig(rank=4))
    train_all(model, torch.Generator().manual_seed(0))
    ranks = {"h.0.up": 1, "h.1.up": 3, "h.0.down": 2, "h.1.down": 2, "head": 0}
    with torch.no_grad():
        for name, rank in ranks.items():
            lora = lora_layers(model)[name].lora
            lora.A.copy_(torch.linalg.qr(lora.A.T)[0].T)
            lora.B.copy_(torch.linalg.qr(lora.B)[0] * (torch.arange(4) < rank))
    return model


def test_each_kind_gets_what_its_neediest_layer_needs(model: nn.Module):
    up, down, head = suggest_ranks(analyze(model))
    assert (up.kind, up.updates, up.rank, up.median, up.suggested) == ("up", 2, 4, 2, 3)
    assert (up.parameters, up.parameters_suggested) == (2 * 4 * 50, 2 * 3 * 50)
    assert (down.kind, down.suggested, down.parameters_suggested) == ("down", 2, 2 * 2 * 50)
    assert (head.kind, head.suggested, head.parameters_suggested) == ("head", 0, 0)


def test_the_pattern_gives_those_ranks_to_another_run(model: nn.Module):
    pattern = rank_pattern(suggest_ranks(analyze(model)))
    assert pattern == {"up": 3, "down": 2}
    assert next_run(pattern) == "LoRACallback(rank=3, rank_pattern={'down': 2})"
    assert next_run({"up": 3}) == "LoRACallback(rank=3)"
    fresh = nn.ModuleDict({"h": nn.ModuleList([nn.ModuleDict({"up": nn.Linear(20, 30), "down": nn.Linear(30, 20)})])})
    made = attach(fresh, LoRAConfig(rank=3, target_modules=["up", "down"], rank_pattern={"down": 2}))
    assert [layer.rank for layer in made.layers] == [3, 2]


def test_findings_say_the_numbers(model: nn.Module):
    analysis = analyze(model)
    said = "\n".join(findings(analysis))
    live = [layer for layer in analysis.layers if layer.name != "head"]
    assert "Of rank 4, the median update uses 2.0 directions" in said
    assert "h.1.up needs the most: 3." in said
    assert "would have 500 parameters instead of 916" in said
    ratios = {layer.name: layer.relation.ratio for layer in live if layer.relation}
    assert f"the largest are {max(ratios, key=lambda name: ratios[name])} (" in said
    assert "1 of 5 updates are zero, as if never trained: head." in said
    assert "intruder" not in said
    assert "intruder" in "\n".join(findings(analyze(model, intruders=True)))


def test_alignment_is_put_into_words(model: nn.Module):
    with torch.no_grad():
        for layer in lora_layers(model).values():
            U, _, Vh = torch.linalg.svd(layer._parameters["weight"].detach(), full_matrices=False)
            layer.lora.A.copy_(Vh[:4])
            layer.lora.B.copy_(U[:, :4])
    assert "so the updates amplify what the weights already do" in "\n".join(findings(analyze(model)))
    with torch.no_grad():
        for layer in lora_layers(model).values():
            U, _, Vh = torch.linalg.svd(layer._parameters["weight"].detach(), full_matrices=False)
            layer.lora.A.copy_(Vh[-4:])
            layer.lora.B.copy_(U[:, :4])
    assert "so the updates avoid what the weights do" in "\n".join(findings(analyze(model)))


def test_a_rank_that_is_used_up_is_said():
    model = nn.ModuleDict({"layer": nn.Linear(20, 20)})
    attach(model, LoRAConfig(rank=2))
    with torch.no_grad():
        lora = lora_layers(model)["layer"].lora
        lora.A.copy_(torch.eye(20)[:2])
        lora.B.copy_(torch.eye(20)[:, :2])
    assert "1 of 1 updates use more than 80% of their rank" in "\n".join(findings(analyze(model)))


def test_an_untrained_adapter_is_said_to_be_one():
    model = nn.ModuleDict({"layer": nn.Linear(20, 20)})
    attach(model, LoRAConfig(rank=2))
    assert findings(analyze(model)) == ["Every update is zero: this adapter was never trained, or learned nothing."]
