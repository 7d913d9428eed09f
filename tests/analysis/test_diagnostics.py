"""The numbers of live diagnostics equal a dense computation, whatever the layers are."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from lightning_lora import LoRAConfig, attach, lora_layers
from lightning_lora.analysis import diagnostics, read_matrices
from lightning_lora.analysis.diagnostics import DEAD, Diagnostics, factor_grams, group_of, singular_values
from lightning_lora.analysis.spectrum import effective_rank
from tests.contract import train_all
from tests.peft_format.kinds import Experts


class Mixed(nn.Module):
    """Two blocks of linear layers, and one layer of each other geometry."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.ModuleDict({"q_proj": nn.Linear(12, 8), "v_proj": nn.Linear(12, 8)}) for _ in range(2)
        )
        self.conv = nn.Conv2d(3, 6, 3)
        self.qkv = nn.Linear(8, 24)
        self.embed = nn.Embedding(20, 8)
        self.experts = Experts()
        self.attention = nn.MultiheadAttention(8, 2)


def mixed(rng: torch.Generator) -> nn.Module:
    model = Mixed()
    config = LoRAConfig(
        rank=3,
        target_modules=["q_proj", "v_proj", "conv", "embed", "attention"],
        target_parameters=["experts.up"],
        target_slices={"qkv": {"q": "0:8", "v": "16:24"}},
        rank_pattern={"v_proj": 2},
    )
    attach(model, config)
    train_all(model, rng)
    return model


@pytest.fixture
def model(rng: torch.Generator) -> nn.Module:
    return mixed(rng)


def dense_spectra(model: nn.Module) -> dict[str, list[tuple[Tensor, Tensor]]]:
    """Return by group the singular values of each update, padded to its rank, and the weight."""
    found: dict[str, list[tuple[Tensor, Tensor]]] = {}
    for matrix in read_matrices(model):
        assert matrix.weight is not None
        values = torch.linalg.svdvals(matrix.scaling * matrix.B.double() @ matrix.A.double())[: matrix.rank]
        found.setdefault(group_of(matrix.name.partition("[")[0]), []).append((values, matrix.weight.double()))
    return found


def test_every_number_equals_a_dense_computation(model: nn.Module):
    metrics, truth = Diagnostics(model).metrics(), dense_spectra(model)
    assert {"q_proj", "v_proj", "conv", "embed", "in_proj_weight", "up", "q", "v"} <= truth.keys()
    for group, parts in truth.items():
        update = math.sqrt(sum(float(values.square().sum()) for values, _ in parts))
        weight = math.sqrt(sum(float(W.square().sum()) for _, W in parts))
        ranks = [effective_rank(values) for values, _ in parts]
        assert metrics[f"{group}/update_over_weight"] == pytest.approx(update / weight, rel=1e-5)
        assert metrics[f"{group}/effective_rank"] == pytest.approx(sum(ranks) / len(ranks), rel=1e-5)
        assert metrics[f"{group}/dead_share"] == 0.0
    assert {name.partition("/")[0] for name in metrics} == truth.keys()


def test_nothing_depends_on_how_the_update_is_split_into_factors(model: nn.Module, rng: torch.Generator):
    before = Diagnostics(model).metrics()
    for layer in lora_layers(model).values():
        for adapter in layer.adapters().values():
            rank = adapter.A.shape[-2]
            M = torch.eye(rank) + 0.3 * torch.randn(rank, rank, generator=rng)
            adapter.A.data = M @ adapter.A.data
            adapter.B.data = adapter.B.data @ torch.linalg.inv(M)
    assert Diagnostics(model).metrics() == pytest.approx(before, rel=1e-4)


def test_before_the_first_step_all_is_dead():
    model = Mixed()
    attach(model, LoRAConfig(rank=3, target_modules=["q_proj", "conv"]))
    metrics = Diagnostics(model).metrics()
    assert {value for name, value in metrics.items() if name.endswith("dead_share")} == {1.0}
    assert {value for name, value in metrics.items() if not name.endswith("dead_share")} == {0.0}


def test_a_direction_is_dead_at_a_hundredth_of_the_largest(rng: torch.Generator):
    model = nn.Sequential(nn.Linear(10, 10))
    attach(model, LoRAConfig(rank=4, alpha=4))
    U, V = (torch.linalg.qr(torch.randn(10, 4, generator=rng))[0] for _ in range(2))
    adapter = lora_layers(model)["0"].lora
    adapter.A.data = V.T.contiguous()
    for weakest, dead in ((1.1 * DEAD, 0.25), (0.9 * DEAD, 0.5)):
        adapter.B.data = U * torch.tensor([5.0, 2.0, 5.0 * weakest, 0.0])
        assert Diagnostics(model).metrics()["0/dead_share"] == dead


def test_gradient_norms_are_those_of_all_factors_of_a_group(model: nn.Module, rng: torch.Generator):
    q, v = ([model.blocks[i][name].lora for i in range(2)] for name in ("q_proj", "v_proj"))
    for adapter in (*q, *v):
        adapter.A.grad, adapter.B.grad = (torch.randn(p.shape, generator=rng) for p in (adapter.A, adapter.B))
    measured = Diagnostics(model)
    measured.note_gradients(torch.optim.SGD([p for adapter in q for p in adapter.parameters()], lr=0.1))
    metrics = measured.metrics()
    for factor in "AB":
        all_of_q = torch.cat([getattr(adapter, factor).grad.flatten() for adapter in q])
        assert metrics[f"q_proj/grad_norm_{factor}"] == pytest.approx(float(all_of_q.norm()))
    assert "v_proj/grad_norm_A" not in metrics  # another optimizer's
    assert not [name for name in measured.metrics() if "grad" in name]  # forgotten


def test_weights_are_read_once_and_each_layer_once_a_measurement(model: nn.Module, monkeypatch: pytest.MonkeyPatch):
    counts = {"_weight_square": 0, "factor_grams": 0, "singular_values": 0}
    for name in counts:
        own = getattr(diagnostics, name)

        def counting(*arguments: object, own=own, name=name) -> object:
            counts[name] += 1
            return own(*arguments)

        monkeypatch.setattr(diagnostics, name, counting)
    measured, adapters = Diagnostics(model), len(list(diagnostics._watched(model)))
    for _ in range(3):
        measured.metrics()
    assert counts == {"_weight_square": adapters, "factor_grams": 3 * adapters, "singular_values": 3 * 2}  # two ranks


def test_nothing_of_a_weights_size_is_made(monkeypatch: pytest.MonkeyPatch):
    class Largest(torch.utils._python_dispatch.TorchDispatchMode):
        elements = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            if isinstance(result, Tensor) and not result._is_view():
                self.elements = max(self.elements, result.numel())
            return result

    monkeypatch.setattr(diagnostics, "_BLOCK", 1000)
    model = nn.Sequential(nn.Linear(200, 300), nn.Linear(300, 200))
    attach(model, LoRAConfig(rank=2, target_modules=["0"], target_slices={"1": {"q": "50:150"}}))
    with Largest() as largest:
        Diagnostics(model).metrics()
    assert largest.elements <= 1000


def test_a_quantized_weight_has_no_norm_and_says_so(model: nn.Module):
    model.blocks[0]["q_proj"].weight = nn.Parameter(torch.ones(8, 12, dtype=torch.uint8), requires_grad=False)
    measured = Diagnostics(model)
    metrics = measured.metrics()
    assert measured.unknown_weights == ["blocks.0.q_proj"]
    assert "q_proj/update_over_weight" not in metrics
    assert "v_proj/update_over_weight" in metrics
    assert metrics["q_proj/effective_rank"] > 1


def test_factors_that_are_not_finite_give_nan_and_leave_the_rest(model: nn.Module):
    expected = Diagnostics(model).metrics()
    model.blocks[1]["q_proj"].lora.B.data[0, 0] = math.nan
    metrics = Diagnostics(model).metrics()
    for name in ("update_over_weight", "effective_rank", "dead_share"):
        assert math.isnan(metrics[f"q_proj/{name}"])
        assert metrics[f"conv/{name}"] == expected[f"conv/{name}"]


def test_grams_give_the_singular_values(model: nn.Module):
    adapter = model.blocks[0]["q_proj"].lora
    gram_A, gram_B = factor_grams(adapter)
    truth = torch.linalg.svdvals(adapter.spec.scaling * adapter.B.double() @ adapter.A.double())[:3]
    torch.testing.assert_close(singular_values(gram_A, gram_B)[0], truth, rtol=1e-10, atol=0)


@pytest.mark.parametrize(
    ("name", "group"),
    [
        ("net.blocks.11.attn.q_proj", "q_proj"),
        ("blocks.0.mlp.2", "mlp.2"),
        ("qkv.q", "q"),
        ("net.0", "net.0"),
        ("3", "3"),
        ("0.1", "0.1"),
    ],
)
def test_layers_of_one_kind_are_one_group(name: str, group: str):
    assert group_of(name) == group
