from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from lightning_lora import LoRAConfig, attach, lora_layers
from lightning_lora.analysis import analyze, findings, suggest_ranks
from lightning_lora.analysis.reports import next_run, rank_pattern
from tests.contract import train_all
from tests.peft_format.kinds import Experts

# --- analyze


@pytest.fixture
def model(rng: torch.Generator) -> nn.Module:
    model = nn.ModuleDict({"body": nn.Linear(30, 20), "idle": nn.Linear(30, 20), "experts": Experts()})
    attach(model, LoRAConfig(rank=3, target_modules=["body", "idle"], target_parameters=["experts.up"]))
    train_all(model, rng)
    with torch.no_grad():
        lora_layers(model)["idle"].lora.B.zero_()
    return model


def test_numbers_match_dense_updates(model: nn.Module):
    analysis = analyze(model, energy=0.9)
    assert [layer.name for layer in analysis.layers] == ["body", "idle", *(f"experts.up[{e}]" for e in range(3))]
    dense = {
        "body": lora_layers(model)["body"].delta_weight(),
        **{f"experts.up[{e}]": part for e, part in enumerate(lora_layers(model)["experts"].delta_weight("up"))},
    }
    for layer in analysis.layers:
        if layer.name == "idle":
            continue
        values = torch.linalg.svdvals(dense[layer.name].double())
        p = values[:3] / values.sum()
        assert layer.singular_values == pytest.approx(values[:3].tolist(), rel=1e-5)
        assert layer.norm == pytest.approx(float(values.norm()), rel=1e-5)
        assert layer.effective_rank == pytest.approx(float((-p * p.log()).sum().exp()), rel=1e-5)
        assert layer.stable_rank == pytest.approx(float(values.norm() ** 2 / values[0] ** 2), rel=1e-5)
        held = values.square().cumsum(0) / values.square().sum()
        assert layer.suggested_rank == int((held < 0.9).sum()) + 1
        assert layer.numerical_rank == 3
    body = analysis.layers[0]
    assert body.relation is not None
    weight = model["body"].weight.detach()
    assert body.relation.ratio == pytest.approx(body.norm / float(weight.norm()), rel=1e-5)


def test_zero_updates_are_listed(model: nn.Module):
    analysis = analyze(model)
    assert analysis.idle == ["idle"]
    assert "zero, as if never trained: idle" in str(analysis)


def test_table_has_rows_and_medians(model: nn.Module):
    lines = str(analyze(model)).splitlines()
    assert lines[0] == "5 updates; the suggested rank holds 99% of the squared norm"
    assert lines[1].split()[:3] == ["layer", "shape", "rank"]
    assert [line.split()[0] for line in lines[3:8]] == ["body", "idle", *(f"experts.up[{e}]" for e in range(3))]
    assert lines[9].split()[:2] == ["median", "3"]
    assert max(map(len, lines)) <= 120


def test_to_dict_is_json(model: nn.Module):
    found = json.loads(json.dumps(analyze(model).to_dict(), allow_nan=False))
    assert found["idle"] == ["idle"]
    assert found["layers"][0]["shape"] == [20, 30]
    assert found["layers"][1]["relation"]["amplification"] is None
    assert found["layers"][0]["relation"]["amplification"] > 0


def test_intruders_are_counted_on_request(model: nn.Module):
    assert analyze(model).layers[0].intruders is None
    analysis = analyze(model, intruders=True)
    assert [layer.intruders is not None for layer in analysis.layers] == [True] * 5
    assert analysis.layers[1].intruders == 0
    assert (analysis.layers[0].intruders or 0) > 0
    assert "intruder dimensions: body (" in str(analysis)


def test_analysis_without_weights(model: nn.Module, tmp_path: Path):
    from lightning_lora import save_adapter

    save_adapter(model, tmp_path / "a")
    analysis = analyze(tmp_path / "a")
    assert all(layer.relation is None for layer in analysis.layers)
    assert sorted(layer.norm for layer in analysis.layers) == pytest.approx(
        sorted(layer.norm for layer in analyze(model).layers), rel=1e-5
    )
    with pytest.raises(ValueError, match="needs the weights"):
        analyze(tmp_path / "a", intruders=True)


def test_dora_is_mentioned():
    model = nn.Sequential(nn.Linear(8, 8))
    attach(model, LoRAConfig(rank=2, use_dora=True))
    assert "rescaled by DoRA's magnitudes" in str(analyze(model))


def test_analysis_is_invariant_to_factorization(model: nn.Module, rng: torch.Generator):
    before = analyze(model, intruders=True).to_dict()
    with torch.no_grad():
        for layer in lora_layers(model).values():
            for adapter in layer.adapters().values():
                M = torch.randn(3, 3, generator=rng).double()
                adapter.B.copy_(adapter.B.double() @ torch.linalg.inv(M))
                adapter.A.copy_(M @ adapter.A.double())
    after = analyze(model, intruders=True).to_dict()
    for old, new in zip(before["layers"], after["layers"], strict=True):
        related = [{k: v or 0.0 for k, v in each["relation"].items()} for each in (old, new)]
        assert related[1] == pytest.approx(related[0], rel=1e-3)
        assert new["singular_values"] == pytest.approx(old["singular_values"], rel=1e-3, abs=1e-6)
        for key in ("suggested_rank", "numerical_rank", "intruders"):
            assert new[key] == old[key]
        for key in ("norm", "effective_rank", "stable_rank"):
            assert new[key] == pytest.approx(old[key], rel=1e-3)


# --- suggestions and findings


@pytest.fixture
def trained() -> nn.Module:
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


def test_suggestion_covers_every_layer_of_kind(trained: nn.Module):
    up, down, head = suggest_ranks(analyze(trained))
    assert (up.kind, up.updates, up.rank, up.median, up.suggested) == ("up", 2, 4, 2, 3)
    assert (up.parameters, up.parameters_suggested) == (2 * 4 * 50, 2 * 3 * 50)
    assert (down.kind, down.suggested, down.parameters_suggested) == ("down", 2, 2 * 2 * 50)
    assert (head.kind, head.suggested, head.parameters_suggested) == ("head", 0, 0)


def test_rank_pattern_applies_to_next_run(trained: nn.Module):
    pattern = rank_pattern(suggest_ranks(analyze(trained)))
    assert pattern == {"up": 3, "down": 2}
    assert next_run(pattern) == "LoRACallback(rank=3, rank_pattern={'down': 2})"
    assert next_run({"up": 3}) == "LoRACallback(rank=3)"
    fresh = nn.ModuleDict({"h": nn.ModuleList([nn.ModuleDict({"up": nn.Linear(20, 30), "down": nn.Linear(30, 20)})])})
    made = attach(fresh, LoRAConfig(rank=3, target_modules=["up", "down"], rank_pattern={"down": 2}))
    assert [layer.rank for layer in made.layers] == [3, 2]


def test_findings_contain_numbers(trained: nn.Module):
    analysis = analyze(trained)
    said = "\n".join(findings(analysis))
    live = [layer for layer in analysis.layers if layer.name != "head"]
    assert "At rank 4, the median update uses 2.0 directions" in said
    assert "h.1.up needs the most: 3." in said
    assert "A and B have 500 parameters instead of 916" in said
    ratios = {layer.name: layer.relation.ratio for layer in live if layer.relation}
    assert f"the largest are {max(ratios, key=lambda name: ratios[name])} (" in said
    assert "1 of 5 updates are zero, as if never trained: head." in said
    assert "intruder" not in said
    assert "intruder" in "\n".join(findings(analyze(trained, intruders=True)))


def test_findings_describe_alignment(trained: nn.Module):
    with torch.no_grad():
        for layer in lora_layers(trained).values():
            U, _, Vh = torch.linalg.svd(layer._parameters["weight"].detach(), full_matrices=False)
            layer.lora.A.copy_(Vh[:4])
            layer.lora.B.copy_(U[:, :4])
    assert "the updates amplify what the weights already do" in "\n".join(findings(analyze(trained)))
    with torch.no_grad():
        for layer in lora_layers(trained).values():
            U, _, Vh = torch.linalg.svd(layer._parameters["weight"].detach(), full_matrices=False)
            layer.lora.A.copy_(Vh[-4:])
            layer.lora.B.copy_(U[:, :4])
    assert "the updates avoid what the weights do" in "\n".join(findings(analyze(trained)))


def test_findings_mention_used_up_rank():
    model = nn.ModuleDict({"layer": nn.Linear(20, 20)})
    attach(model, LoRAConfig(rank=2))
    with torch.no_grad():
        lora = lora_layers(model)["layer"].lora
        lora.A.copy_(torch.eye(20)[:2])
        lora.B.copy_(torch.eye(20)[:, :2])
    assert "The update uses more than 80% of the rank" in "\n".join(findings(analyze(model)))


def test_findings_of_untrained_adapter():
    model = nn.ModuleDict({"layer": nn.Linear(20, 20)})
    attach(model, LoRAConfig(rank=2))
    assert findings(analyze(model)) == ["Every update is zero: this adapter was never trained, or learned nothing."]
