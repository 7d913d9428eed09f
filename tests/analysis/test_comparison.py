from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from torch import nn

from lightning_lora import LoRAConfig, adapter_state_dict, attach, lora_layers, save_adapter
from lightning_lora.analysis import compare, layer_similarity
from lightning_lora.analysis.spectrum import thin_svd, update_cosine
from lightning_lora.state import describe
from lightning_lora.storage.checkpoint import RECORD_KEY
from tests.contract import train_all
from tests.peft_format.kinds import Experts


def adapted(rank: int, seed: int, names: tuple[str, ...] = ("up", "down"), width: int = 24) -> nn.Module:
    blocks = (nn.ModuleDict({"up": nn.Linear(width, 40), "down": nn.Linear(40, width)}) for _ in range(3))
    model = nn.ModuleDict({"h": nn.ModuleList(blocks)})
    attach(model, LoRAConfig(rank=rank, target_modules=list(names)))
    train_all(model, torch.Generator().manual_seed(seed))
    return model


def dense(model: nn.Module, name: str) -> torch.Tensor:
    return lora_layers(model)[name].delta_weight().double()


def test_comparison_matches_dense_updates():
    one, other = adapted(2, 0), adapted(5, 1)
    found = compare(one, other)
    assert [layer.name for layer in found.layers] == [f"h.{b}.{n}" for b in range(3) for n in ("up", "down")]
    for layer in found.layers:
        first, second = dense(one, layer.name), dense(other, layer.name)
        svds = [torch.linalg.svd(each, full_matrices=False) for each in (first, second)]
        assert layer.ranks == (2, 5)
        assert layer.norms == pytest.approx((float(first.norm()), float(second.norm())), rel=1e-5)
        product = float((first * second).sum() / first.norm() / second.norm())
        assert layer.cosine == pytest.approx(product, abs=1e-6)
        for overlap, sides in ((layer.of_inputs, [s[2].T for s in svds]), (layer.of_outputs, [s[0] for s in svds])):
            V1, V2 = sides[0][:, :2], sides[1][:, :5]
            assert overlap.first == pytest.approx(float((V1[:, 0] @ V2[:, 0]) ** 2), abs=1e-5)
            assert overlap.all == pytest.approx(float((V1.T @ V2).norm() ** 2 / 2), abs=1e-5)
            assert overlap.chance == 5 / len(V1)
        A1, A2 = (lora_layers(model)[layer.name].lora.A.detach().double() for model in (one, other))
        spans = [torch.linalg.svd(A, full_matrices=False)[2].T for A in (A1, A2)]
        assert float(layer.factors[1, 4]) == pytest.approx(float((spans[0].T @ spans[1]).norm() ** 2 / 2), abs=1e-5)


def test_comparison_is_invariant_to_factorization():
    one, other = adapted(3, 0), adapted(3, 0)
    with torch.no_grad():
        for layer in lora_layers(other).values():
            M = torch.randn(3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
            layer.lora.B.copy_(layer.lora.B.double() @ torch.linalg.inv(M))
            layer.lora.A.copy_(M @ layer.lora.A.double())
    for layer in compare(one, other).layers:
        assert layer.cosine == pytest.approx(1, abs=1e-5)
        assert layer.of_inputs[:2] == pytest.approx((1, 1), abs=1e-4)
        assert layer.of_outputs[:2] == pytest.approx((1, 1), abs=1e-4)
        assert float(layer.factors[0, 0]) < 0.99  # the paper's measure sees the split


def test_cosine_of_negated_and_orthogonal_updates(rng: torch.Generator):
    A, B = torch.randn(2, 9, generator=rng), torch.randn(7, 2, generator=rng)
    svd = thin_svd(A, B)
    assert update_cosine(svd, thin_svd(A, B, -3.0)) == pytest.approx(-1)
    rows = torch.linalg.qr(torch.randn(9, 4, generator=rng))[0].T
    assert abs(update_cosine(thin_svd(rows[:2], B), thin_svd(rows[2:], B))) < 1e-6
    assert math.isnan(update_cosine(svd, thin_svd(A, torch.zeros(7, 2))))


def test_compare_reads_files_and_modules_alike(tmp_path: Path):
    one, other = adapted(2, 0), adapted(2, 1)
    save_adapter(one, tmp_path / "one")
    torch.save({"state_dict": adapter_state_dict(other), RECORD_KEY: describe(other)}, tmp_path / "other.ckpt")
    by_file, by_module = compare(tmp_path / "one", str(tmp_path / "other.ckpt")), compare(one, other)
    cosines = [{layer.name: layer.cosine for layer in each.layers} for each in (by_file, by_module)]
    assert cosines[0] == pytest.approx(cosines[1], abs=1e-6)


def test_layers_of_only_one_adapter_are_listed():
    found = compare(adapted(2, 0, ("up",)), adapted(2, 1, ("h.0.up", "down")))
    assert found.only_first == ("h.1.up", "h.2.up")
    assert found.only_second == ("h.0.down", "h.1.down", "h.2.down")
    assert "only in the first: h.1.up, h.2.up" in str(found)


def test_table_and_json():
    found = compare(adapted(2, 0), adapted(3, 1))
    lines = str(found).splitlines()
    assert lines[0].startswith("6 updates in both")
    layer = found.layers[0]
    assert lines[3].split() == [
        *(layer.name, "2,", "3", f"{layer.cosine:.3f}"),
        *(f"{value:.3f}" for value in (*layer.of_inputs, *layer.of_outputs)),
    ]
    plain = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert plain["layers"][0]["phi"]["inputs"][1][2] == pytest.approx(layer.of_inputs.all, abs=1e-4)


def test_zero_update_has_no_similarity():
    one, other = adapted(2, 0), adapted(2, 1)
    with torch.no_grad():
        lora_layers(other)["h.0.up"].lora.B.zero_()
    found = compare(one, other)
    assert math.isnan(found.layers[0].cosine)
    assert found.to_dict()["layers"][0]["of_inputs"] == {"first": None, "all": None, "chance": None}
    assert " - " in str(found).splitlines()[3]


def test_adapters_of_different_models_raise():
    model = nn.ModuleDict({"other": nn.Linear(24, 40)})
    attach(model, LoRAConfig(rank=2))
    with pytest.raises(ValueError, match=r"no layer in common: they update h.0.up, .* and other"):
        compare(adapted(2, 0), model)
    with pytest.raises(ValueError, match=r"different models: .* h.0.up is \(40, 24\) and \(40, 28\)"):
        compare(adapted(2, 0), adapted(2, 0, width=28))


# --- between layers


def test_layer_similarity_matches_dense_updates():
    model = adapted(2, 0)
    with torch.no_grad():  # block 2 repeats block 0 up to its outputs
        lora_layers(model)["h.2.up"].lora.A.copy_(lora_layers(model)["h.0.up"].lora.A)
    up, down = layer_similarity(model)
    assert (up.kind, up.blocks, down.kind) == ("up", ("h.0", "h.1", "h.2"), "down")
    torch.testing.assert_close(up.inputs, up.inputs.T)
    torch.testing.assert_close(up.inputs.diagonal(), torch.ones(3).double())
    assert float(up.inputs[0, 2]) == pytest.approx(1)
    V0, V1 = (torch.linalg.svd(dense(model, f"h.{b}.up"))[2][:2].T for b in (0, 1))
    phi = float((V0.T @ V1).norm() ** 2 / 2)
    assert float(up.inputs[0, 1]) == pytest.approx((phi - 2 / 24) / (1 - 2 / 24), abs=1e-5)
    U0, U2 = (torch.linalg.svd(dense(model, f"h.{b}.up"))[0][:, :2] for b in (0, 2))
    phi = float((U0.T @ U2).norm() ** 2 / 2)
    assert float(up.outputs[0, 2]) == pytest.approx((phi - 2 / 40) / (1 - 2 / 40), abs=1e-5)


def test_layer_similarity_skips_single_layers_and_experts():
    model = nn.ModuleDict({"head": nn.Linear(8, 8), "experts": Experts()})
    attach(model, LoRAConfig(rank=2, target_modules=["head"], target_parameters=["experts.up"]))
    assert layer_similarity(model) == []
