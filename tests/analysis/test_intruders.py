from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from lightning_lora.analysis import intruder_dimensions
from tests.peft_format.models import QUIET, peft


def dense_similarity(W: Tensor, delta: Tensor) -> tuple[Tensor, Tensor]:
    U = torch.linalg.svd(W, full_matrices=False)[0]
    adapted = torch.linalg.svd(W + delta, full_matrices=False)
    return (adapted[0].T @ U).abs().amax(1), adapted[1]


@pytest.mark.parametrize("shape", [(120, 90), (90, 120), (12, 200), (200, 12)])
@pytest.mark.parametrize("scaling", [0.02, 0.3])
def test_intruders_are_those_of_the_formed_sum(shape: tuple[int, int], scaling: float, rng: torch.Generator):
    W = torch.randn(*shape, generator=rng).double()
    A, B = torch.randn(4, shape[1], generator=rng).double(), torch.randn(shape[0], 4, generator=rng).double()
    similarity, values = dense_similarity(W, scaling * B @ A)
    found = intruder_dimensions(W, A, B, scaling)
    torch.testing.assert_close(found.values, values[:10], rtol=1e-10, atol=0)
    torch.testing.assert_close(found.similarity, similarity[:10], rtol=0, atol=1e-5)
    assert found.indices == tuple(torch.nonzero(similarity[:10] < 0.5).flatten().tolist())


def test_large_random_updates_intrude_and_small_ones_do_not(rng: torch.Generator):
    W = torch.randn(200, 150, generator=rng) * torch.linspace(3, 0.1, 150)
    A, B = torch.randn(4, 150, generator=rng), torch.randn(200, 4, generator=rng)
    assert intruder_dimensions(W, A, B, 1.0).indices == (0, 1, 2, 3)
    assert intruder_dimensions(W, A, B, 1e-4).indices == ()


def test_a_weight_of_low_rank_is_no_trouble(rng: torch.Generator):
    W = torch.randn(60, 2, generator=rng).double() @ torch.randn(2, 50, generator=rng).double()
    A, B = torch.randn(1, 50, generator=rng).double(), torch.randn(60, 1, generator=rng).double()
    found = intruder_dimensions(W, A, B, 1.0, top_k=3)
    similarity, values = dense_similarity(W, B @ A)
    torch.testing.assert_close(found.values, values[:3], rtol=1e-8, atol=0)
    torch.testing.assert_close(found.similarity[0], similarity[0], rtol=0, atol=1e-5)


@pytest.mark.filterwarnings("ignore")
def test_peft_finds_the_same_number(rng: torch.Generator):
    intruders = pytest.importorskip("peft.tuners.lora.intruders")
    base = nn.Sequential(nn.Linear(90, 120))
    model = peft.get_peft_model(base, peft.LoraConfig(r=4, lora_alpha=2, target_modules=["0"]))
    layer = model.base_model.model[0]
    with torch.no_grad():
        layer.lora_B.default.weight.copy_(torch.randn(120, 4, generator=rng))
    W, A, B = layer.base_layer.weight, layer.lora_A.default.weight, layer.lora_B.default.weight
    found = intruder_dimensions(W, A, B, 0.5)
    said: list[str] = []
    intruders.reduce_intruder_dimension(model, logging_sink=said.append)
    assert len(found.indices) > 0
    assert f"0: Intruders: {len(found.indices)}" in said[0]


pytestmark = QUIET
