from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from lightning_lora import LoRAConfig, attach, lora_layers
from lightning_lora.analysis import analyze
from tests.contract import train_all
from tests.peft_format.kinds import Experts


@pytest.fixture
def model(rng: torch.Generator) -> nn.Module:
    model = nn.ModuleDict({"body": nn.Linear(30, 20), "idle": nn.Linear(30, 20), "experts": Experts()})
    attach(model, LoRAConfig(rank=3, target_modules=["body", "idle"], target_parameters=["experts.up"]))
    train_all(model, rng)
    with torch.no_grad():
        lora_layers(model)["idle"].lora.B.zero_()
    return model


def test_each_row_is_that_of_the_formed_update(model: nn.Module):
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


def test_updates_that_learned_nothing_are_named(model: nn.Module):
    analysis = analyze(model)
    assert analysis.idle == ["idle"]
    assert "zero, as if never trained: idle" in str(analysis)


def test_the_table_has_a_row_for_each_and_the_medians(model: nn.Module):
    lines = str(analyze(model)).splitlines()
    assert lines[0] == "5 updates; the suggested rank holds 99% of the squared norm"
    assert lines[1].split()[:3] == ["layer", "shape", "rank"]
    assert [line.split()[0] for line in lines[3:8]] == ["body", "idle", *(f"experts.up[{e}]" for e in range(3))]
    assert lines[9].split()[:2] == ["median", "3"]
    assert max(map(len, lines)) <= 120


def test_json_holds_everything_in_plain_values(model: nn.Module):
    found = json.loads(json.dumps(analyze(model).to_dict(), allow_nan=False))
    assert found["idle"] == ["idle"]
    assert found["layers"][0]["shape"] == [20, 30]
    assert found["layers"][1]["relation"]["amplification"] is None
    assert found["layers"][0]["relation"]["amplification"] > 0


def test_intruders_are_counted_if_asked_for(model: nn.Module):
    assert analyze(model).layers[0].intruders is None
    analysis = analyze(model, intruders=True)
    assert [layer.intruders is not None for layer in analysis.layers] == [True] * 5
    assert analysis.layers[1].intruders == 0
    assert (analysis.layers[0].intruders or 0) > 0
    assert "intruder dimensions: body (" in str(analysis)


def test_without_weights_the_rest_is_there(model: nn.Module, tmp_path: Path):
    from lightning_lora import save_adapter

    save_adapter(model, tmp_path / "a")
    analysis = analyze(tmp_path / "a")
    assert all(layer.relation is None for layer in analysis.layers)
    assert sorted(layer.norm for layer in analysis.layers) == pytest.approx(
        sorted(layer.norm for layer in analyze(model).layers), rel=1e-5
    )
    with pytest.raises(ValueError, match="needs the weights"):
        analyze(tmp_path / "a", intruders=True)


def test_dora_is_said():
    model = nn.Sequential(nn.Linear(8, 8))
    attach(model, LoRAConfig(rank=2, use_dora=True))
    assert "rescaled by DoRA's magnitudes" in str(analyze(model))
