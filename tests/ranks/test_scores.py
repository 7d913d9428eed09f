"""Scores of components, against derivatives, PEFT's AdaLoRA, and dense means."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from lightning_lora import LoRAConfig, attach
from lightning_lora.layers import LowRankAdapter
from lightning_lora.ranks import scores
from lightning_lora.ranks.allocation import allocate
from lightning_lora.ranks.controller import scheduled
from lightning_lora.ranks.scores import BETA, AdaLoRAScores, EnergyScores, GateScores

peft = pytest.importorskip("peft")


def adapted(seed: int = 0) -> tuple[nn.Module, dict[str, LowRankAdapter]]:
    """Return two linear layers in float64 with adapters of rank 3 that do something."""
    torch.manual_seed(seed)
    module = nn.Sequential(nn.Linear(15, 17), nn.Tanh(), nn.Linear(17, 14)).double()
    attach(module, LoRAConfig(rank=3, alpha=6.0))
    adapters, _ = scheduled(module)
    for adapter in adapters.values():
        nn.init.normal_(adapter.B)
    return module, adapters


def held(module: nn.Module) -> set[int]:
    return {id(parameter) for parameter in module.parameters()}


def test_gate_is_the_derivative_by_a_factor_of_one_before_a_component() -> None:
    module, adapters = adapted()
    x = torch.randn(6, 15).double()
    module(x).square().sum().backward()
    scores = GateScores(adapters)
    scores.note(held(module))
    scores.commit()
    gates = {name: torch.ones(3, dtype=torch.float64, requires_grad=True) for name in adapters}
    h = x
    for name in ("0", "2"):
        layer, adapter = module.get_submodule(name), adapters[name]
        down = (h @ adapter.A.detach().T) * gates[name]
        h = h @ layer.weight.T + layer.bias + adapter.spec.scaling * down @ adapter.B.detach().T
        h = h.tanh() if name == "0" else h
    h.square().sum().backward()
    for name, gate in gates.items():
        expected = (1 - BETA) * gate.grad.abs()  # type: ignore[union-attr]
        assert torch.tensor(scores.values()[name]) == pytest.approx(expected, rel=1e-4)


def test_an_adapter_without_a_gradient_keeps_its_score_whatever_torchs_default_precision_is() -> None:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        module, adapters = adapted()
        scores = GateScores(adapters)
        module[0](torch.randn(6, 15)).square().sum().backward()  # the second layer is skipped
        scores.note(held(module))
        scores.commit()
    finally:
        torch.set_default_dtype(before)
    values = scores.values()
    assert min(values["0"]) > 0
    assert list(values["2"]) == [0.0, 0.0, 0.0]


def test_averages_are_running_means_and_what_is_not_finite_does_not_count() -> None:
    module, adapters = adapted()
    scores = GateScores(adapters)
    seen: dict[str, list[Tensor]] = {name: [] for name in adapters}
    for step in range(4):
        for adapter in adapters.values():
            adapter.B.grad = torch.randn_like(adapter.B)
        if step == 2:
            adapters["0"].B.grad[:, 1] = torch.inf  # type: ignore[index]
        scores.note(held(module))
        scores.commit()
        for name, adapter in adapters.items():
            seen[name].append((adapter.B * adapter.B.grad).sum(0).detach().abs())
    for name, values in scores.values().items():
        for number, value in enumerate(values):
            mean = 0.0
            for each in seen[name]:
                mean = mean if not each[number].isfinite() else BETA * mean + (1 - BETA) * float(each[number])
            assert value == pytest.approx(mean, rel=1e-4)


@pytest.mark.parametrize("kind", [GateScores, AdaLoRAScores])
def test_scores_go_on_from_a_state_without_changing_it(kind: type[GateScores | AdaLoRAScores]) -> None:
    module, adapters = adapted()
    scores = kind(adapters)
    state = scores.state()
    before = copy.deepcopy(state)
    scores.load(state)
    for adapter in adapters.values():
        adapter.A.grad, adapter.B.grad = torch.randn_like(adapter.A), torch.randn_like(adapter.B)
    scores.note(held(module))
    scores.commit()
    assert any(any(values) for values in scores.values().values())
    for one, other in zip(tree_leaves(before), tree_leaves(state), strict=True):
        assert torch.equal(one, other)


def test_steps_of_another_optimizer_leave_the_averages_alone() -> None:
    module, adapters = adapted()
    scores = GateScores(adapters)
    for parameters in (held(module), {id(p) for p in module[0].parameters()}):
        for adapter in adapters.values():
            adapter.B.grad = torch.ones_like(adapter.B)
        scores.note(parameters)
        scores.commit()
    once = (1 - BETA) * adapters["2"].B.sum(0).abs()
    assert torch.tensor(scores.values()["2"]) == pytest.approx(once.detach(), rel=1e-4)
    assert torch.tensor(scores.values()["0"]) == pytest.approx(
        (1 + BETA) * (1 - BETA) * adapters["0"].B.detach().sum(0).abs(), rel=1e-4
    )


def test_energy_is_the_mean_square_of_what_a_component_adds() -> None:
    module, adapters = adapted()
    scores = EnergyScores(adapters)
    batches = [torch.randn(6, 15).double(), torch.randn(3, 15).double()]
    module.train()
    with torch.no_grad():
        module(torch.randn(50, 15).double())  # validation: not watched, and without gradients
    scores.watch(scheduled(module)[1])
    for batch in batches:
        module(batch)
        with torch.no_grad():
            module(100 * batch)
        scores.commit()
    scores.rest()
    module(torch.randn(50, 15).double())
    scores.commit()
    x, found = torch.cat(batches), scores.values()
    for name in ("0", "2"):
        adapter = adapters[name]
        expected = [
            (adapter.spec.scaling * (x @ adapter.A[i]).outer(adapter.B[:, i])).square().sum(1).mean() for i in range(3)
        ]
        assert found[name] == pytest.approx([each.item() for each in expected], rel=1e-4)
        with torch.no_grad():
            x = module[1](module[0](x)) if name == "0" else x


def test_energy_names_layers_whose_inputs_it_cannot_see() -> None:
    module = nn.LSTM(4, 4, batch_first=True)
    attach(module, LoRAConfig(rank=2, target_modules="all"))
    adapters, layers = scheduled(module)
    scores = EnergyScores(adapters)
    scores.watch(layers)
    module(torch.randn(2, 3, 4))
    with pytest.raises(ValueError, match=r"score='energy' cannot see the inputs of .*weight_hh_l0.*Use score='gate'"):
        scores.values()


@pytest.mark.parametrize("score", ["adalora", "energy"])
def test_scores_that_need_whole_factors_are_refused_where_processes_have_parts(
    score: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, adapters = adapted()
    monkeypatch.setattr(scores, "is_sharded", lambda tensor: True)
    with pytest.raises(ValueError, match=f"score='{score}' .* parts of.*Use score='gate'"):
        scores.scores_of(score, adapters, regrows=False)


def test_adalora_scores_give_the_masks_of_peft_for_fifty_steps() -> None:
    """PEFT trains; its tensors and gradients are scored here, and every decision must be its own."""
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8))
    config = peft.AdaLoraConfig(
        target_modules=["0", "2"], init_r=6, target_r=2, tinit=5, tfinal=10, deltaT=3, total_step=50, lora_alpha=32
    )
    model = peft.get_peft_model(base, config)
    layers = {name: model.base_model.model[int(name)] for name in ("0", "2")}
    mine = {
        name: SimpleNamespace(A=each.lora_A["default"], B=each.lora_B["default"], E=each.lora_E["default"])
        for name, each in layers.items()
    }
    scores = AdaLoRAScores(mine, lambda a: ((a.A, 0), (a.B, 1), (a.E, 0)))
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=0.02)
    x = torch.randn(64, 8)
    y, decisions = x.flip(1), 0
    for step in range(50):
        optimizer.zero_grad()
        (model(x) - y).square().mean().backward()
        optimizer.step()
        scores.note(held(model))
        scores.commit()
        budget, pattern = model.base_model.rankallocator.update_and_allocate(model, step)
        if pattern is None:
            continue
        decisions += 1
        ranked = {name: sorted(values, reverse=True) for name, values in scores.values().items()}
        ranks = allocate(ranked, dict.fromkeys(ranked, 1), budget, at_least=0, takes_worthless=True)
        for name, values in scores.values().items():
            order = sorted(range(6), key=lambda number, own=values: -own[number])  # type: ignore[misc]
            kept = [number in order[: ranks[name]] for number in range(6)]
            assert kept == (mine[name].E.detach().flatten() != 0).tolist()
    assert decisions > 8
    assert budget == 4
