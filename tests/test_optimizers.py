"""Optimizers end up with exactly the trainable parameters, whatever they held and however they were returned."""

from __future__ import annotations

import warnings
from bisect import bisect_right
from collections.abc import Callable
from typing import Any

import pytest
import torch
from lightning.pytorch.core.optimizer import LightningOptimizer
from torch import nn
from torch.optim import SGD, Adagrad, AdamW, Optimizer
from torch.optim.lr_scheduler import (
    ChainedScheduler,
    CosineAnnealingLR,
    CyclicLR,
    LambdaLR,
    LRScheduler,
    OneCycleLR,
    ReduceLROnPlateau,
    SequentialLR,
    StepLR,
)

from lightning_lora import LoRACallback, LoRAConfig, attach, lora_layers, parameter_groups
from lightning_lora.optimizers import (
    group_names,
    kept_schedulers,
    repair_optimizers,
    unheld_parameters,
    unpack_configured,
)
from tests.toys import FEATURES, network, snapshot

FACTORS = [f"{layer}.lora.{factor}" for layer in (0, 2, 4) for factor in "AB"]


def adapted(**lora: Any) -> nn.Sequential:
    model = network()
    attach(model, LoRAConfig(**({"rank": 4} | lora)))
    return model


def held(model: nn.Module, *optimizers: Optimizer) -> list[list[list[str]]]:
    return [group_names(model, optimizer.param_groups) for optimizer in optimizers]


def step(model: nn.Module, optimizer: Optimizer) -> None:
    optimizer.zero_grad()
    model(torch.ones(2, FEATURES)).square().sum().backward()
    optimizer.step()


# --- repairing


@pytest.mark.parametrize("factor", ["A", "B"])
def test_adapters_that_were_left_out_of_an_optimizer_are_named_and_added(factor: str) -> None:
    model = adapted()
    optimizer = AdamW([getattr(layer.lora, factor) for layer in lora_layers(model).values()])
    other = {"A": "B", "B": "A"}[factor]
    with pytest.warns(UserWarning, match=rf"hold 3 of 6 .*added, and train: 0\.lora\.{other}, .*requires_grad"):
        repair_optimizers(model, [optimizer])
    assert held(model, optimizer) == [[FACTORS]]


def test_adapters_that_are_frozen_stay_out_of_an_optimizer_without_a_word() -> None:
    model = adapted()
    for layer in lora_layers(model).values():
        layer.lora.A.requires_grad_(False)
    optimizer = AdamW([layer.lora.B for layer in lora_layers(model).values()])
    repair_optimizers(model, [optimizer])
    assert held(model, optimizer) == [[[name for name in FACTORS if name.endswith("B")]]]


def test_frozen_parameters_leave_optimizer() -> None:
    model = adapted()
    optimizer = AdamW(model.parameters(), lr=0.1, weight_decay=0.5)
    repair_optimizers(model, [optimizer])
    assert held(model, optimizer) == [[FACTORS]]
    base = {name: value for name, value in snapshot(model).items() if "lora" not in name}
    step(model, optimizer)
    assert all(torch.equal(model.state_dict()[name], value) for name, value in base.items())


@pytest.mark.parametrize(
    "make",
    [
        lambda p: AdamW(p, lr=0.1),
        lambda p: AdamW(p, lr=0.1, foreach=True),
        lambda p: AdamW(p, lr=0.1, fused=True),
        lambda p: SGD(p, lr=0.1, momentum=0.9),
        lambda p: Adagrad(p, lr=0.1),
        lambda p: torch.optim.LBFGS(p, lr=0.1),
    ],
)
def test_early_optimizer_adopts_adapters(make: Callable[[Any], Optimizer]) -> None:
    model = network()
    optimizer = make(model.parameters())
    attach(model, LoRAConfig(rank=4))
    repair_optimizers(model, [optimizer])
    assert held(model, optimizer) == [[FACTORS]]

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = model(torch.ones(2, FEATURES)).square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    assert all(layer.lora.B.any() for layer in lora_layers(model).values())
    assert all(parameter.requires_grad for parameter in optimizer.state if isinstance(parameter, torch.Tensor))


def test_adopted_parameter_gets_initial_state() -> None:
    model = network()
    optimizer = Adagrad(model.parameters(), lr=0.1, initial_accumulator_value=0.25)
    attach(model, LoRAConfig(rank=4))
    repair_optimizers(model, [optimizer])
    for layer in lora_layers(model).values():
        assert torch.equal(optimizer.state[layer.lora.A]["sum"], torch.full_like(layer.lora.A, 0.25))


def test_adapters_join_group_of_layer_weight() -> None:
    model = network()
    decayed = [p for p in model.parameters() if p.ndim > 1]
    plain = [p for p in model.parameters() if p.ndim == 1]
    optimizer = AdamW([{"params": decayed, "weight_decay": 0.1}, {"params": plain, "weight_decay": 0.0}])
    attach(model, LoRAConfig(rank=4))
    repair_optimizers(model, [optimizer])
    assert held(model, optimizer) == [[FACTORS, []]]
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.0]


def test_adapters_join_optimizer_of_layer() -> None:
    model = network()
    first, second = SGD(model[0].parameters(), lr=0.1), SGD([*model[2].parameters(), *model[4].parameters()], lr=0.2)
    attach(model, LoRAConfig(rank=4))
    repair_optimizers(model, [first, second])
    assert held(model, first, second) == [[FACTORS[:2]], [FACTORS[2:]]]


def test_parameter_without_group_is_named() -> None:
    model = network()
    optimizers = [SGD(model[0].parameters(), lr=0.1), SGD(model[2].parameters(), lr=0.1)]
    attach(model, LoRAConfig(rank=4))
    with pytest.raises(ValueError, match=r"No optimizer holds the trainable 4\.lora\.A, 4\.lora\.B, and it is"):
        repair_optimizers(model, optimizers)


def test_param_names_stay_parallel() -> None:
    model = network()
    optimizer = AdamW(model.named_parameters(), lr=0.1)
    attach(model, LoRAConfig(rank=4))
    repair_optimizers(model, [optimizer], lr_ratio=4.0)
    for group in optimizer.param_groups:
        assert group["param_names"] == held(model, optimizer)[0][optimizer.param_groups.index(group)]


def test_order_does_not_depend_on_construction() -> None:
    model = adapted()
    backwards = AdamW(reversed(list(model.parameters())), lr=0.1)
    repair_optimizers(model, [backwards])
    assert held(model, backwards) == [[FACTORS]]


def test_optimizers_without_trainable_parameters_are_refused() -> None:
    model = adapted()
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    with pytest.raises(ValueError, match="No optimizer holds a trainable parameter"):
        repair_optimizers(model, [SGD(model.parameters(), lr=0.1)])


def test_unheld_parameters_are_found_by_identity() -> None:
    model = adapted()
    twin = lora_layers(model)["0"].lora.B.detach().clone().requires_grad_()  # as zero as every B
    assert unheld_parameters(model, SGD([twin], lr=0.1).param_groups) == FACTORS


# --- LoRA+


class WarmUpMultiStep(LRScheduler):
    """A schedule of a user's own, with as many milestones as the optimizer has groups."""

    def __init__(self, optimizer: Optimizer) -> None:
        self.milestones = [3, 6][: len(optimizer.param_groups)]
        super().__init__(optimizer)

    def get_lr(self) -> list[float]:
        factor = min(1.0, (self.last_epoch + 1) / 3) * 0.1 ** bisect_right(self.milestones, self.last_epoch)
        return [base * factor for base in self.base_lrs]


class WithoutTorch:
    """A schedule of a user's own that keeps the groups' learning rates under a name of its own, as timm's do."""

    def __init__(self, optimizer: Optimizer) -> None:
        self.optimizer, self.count = optimizer, 0
        self.base_values = [group.setdefault("initial_lr", group["lr"]) for group in optimizer.param_groups]
        for group in optimizer.param_groups:
            group["lr"] *= 0.1  # a warm-up begins

    def step(self) -> None:
        self.count += 1
        for group, base in zip(self.optimizer.param_groups, self.base_values, strict=True):
            group["lr"] = base / (1 + self.count)


def schedulers(optimizer: Optimizer) -> dict[str, Any]:
    groups = len(optimizer.param_groups)
    return {
        "step": lambda: StepLR(optimizer, 2, 0.5),
        "lambda": lambda: LambdaLR(optimizer, [lambda epoch: 0.9**epoch] * groups),
        "cosine": lambda: CosineAnnealingLR(optimizer, 8),
        "cyclic": lambda: CyclicLR(optimizer, 0.01, 0.1, step_size_up=2, cycle_momentum=False),
        "one_cycle": lambda: OneCycleLR(optimizer, 0.1, total_steps=10),
        "sequential": lambda: SequentialLR(
            optimizer, [StepLR(optimizer, 1, 0.5), CosineAnnealingLR(optimizer, 5)], [3]
        ),
        "chained": lambda: ChainedScheduler([StepLR(optimizer, 1, 0.5), LambdaLR(optimizer, lambda e: 1 / (1 + e))]),
        "plateau": lambda: ReduceLROnPlateau(optimizer, factor=0.5, patience=0),
        "milestones": lambda: WarmUpMultiStep(optimizer),
        "without torch": lambda: WithoutTorch(optimizer),
    }


def test_whole_numbers_are_no_learning_rates_even_if_one_equals_them() -> None:
    model = network()
    attach(model, LoRAConfig(rank=4))
    optimizer = SGD(model.parameters(), lr=1)
    scheduler = WarmUpMultiStep(optimizer)
    scheduler.milestones = [1]
    repair_optimizers(model, [optimizer], [scheduler], lr_ratio=16.0)
    assert scheduler.milestones == [1]
    assert scheduler.base_lrs == [1, 16.0]


def test_what_wraps_an_optimizer_is_no_scheduler() -> None:
    model = network()
    optimizer = SGD(model.parameters(), lr=0.1)
    model.wrapped, model.schedule, model.returned = LightningOptimizer(optimizer), StepLR(optimizer, 1), None
    assert kept_schedulers(model, [optimizer], []) == {"schedule": model.schedule}
    assert kept_schedulers(model, [optimizer], [model.schedule]) == {}
    assert kept_schedulers(model, [SGD(model.parameters(), lr=0.1)], []) == {}


@pytest.mark.parametrize("kind", list(schedulers(SGD([torch.zeros(1)], lr=1.0))))
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("place", ["returned", "attribute"])
def test_lr_ratio_survives_every_scheduler(kind: str, groups: int, place: str) -> None:
    model = network()
    parts = [[*model[0].parameters()], [*model[2].parameters(), *model[4].parameters()]]
    parts = [parts[0] + parts[1]] if groups == 1 else parts
    optimizer = SGD([{"params": part} for part in parts], lr=0.1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        scheduler = schedulers(optimizer)[kind]()
    alone = SGD([{"params": [torch.zeros(1, requires_grad=True)]} for _ in range(groups)], lr=0.1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        reference = schedulers(alone)[kind]()
    attach(model, LoRAConfig(rank=4))
    if place == "attribute":
        model.schedule = scheduler
    repair_optimizers(model, [optimizer], [scheduler] if place == "returned" else [], lr_ratio=16.0)
    assert len(optimizer.param_groups) == 2 * groups
    for _ in range(8):
        step(model, optimizer)
        alone.step()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            for each in (scheduler, reference):
                each.step(1.0) if kind == "plateau" else each.step()
        rates = [group["lr"] for group in optimizer.param_groups]
        assert rates[:groups] == pytest.approx([alone.param_groups[0]["lr"]] * groups)
        assert rates[groups:] == pytest.approx([16.0 * rate for rate in rates[:groups]])


def test_lora_plus_groups_hold_B_and_have_names() -> None:
    model = adapted(modules_to_save=["4"])
    optimizer = AdamW(model.parameters(), lr=0.1, weight_decay=0.3)
    repair_optimizers(model, [optimizer], lr_ratio=16.0)
    slow, fast = held(model, optimizer)[0]
    assert fast == ["0.lora.B", "2.lora.B"]
    assert slow == ["0.lora.A", "2.lora.A", "4.weight", "4.bias"]
    assert optimizer.param_groups[1]["name"] == "lora_B"
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.3, 0.3]


def test_lora_plus_skips_random_embedding_factor() -> None:
    model = nn.Sequential(nn.Embedding(10, 8), nn.Linear(8, 8))
    attach(model, LoRAConfig(rank=2, target_modules=["0", "1"]))
    groups = parameter_groups(model, 1e-3, lr_ratio=16.0)
    assert [id(p) for p in groups[1]["params"]] == [id(lora_layers(model)["1"].lora.B)]


def test_parameter_groups_hold_all_trainable_once() -> None:
    model = adapted(modules_to_save=["4"])
    groups = parameter_groups(model, 1e-3, lr_ratio=8.0, weight_decay=0.1)
    assert [(g["name"], g["lr"], g["weight_decay"]) for g in groups] == [
        ("lora", 1e-3, 0.1),
        ("lora_B", pytest.approx(8e-3), 0.1),
    ]
    assert sorted(id(p) for g in groups for p in g["params"]) == sorted(
        id(p) for p in model.parameters() if p.requires_grad
    )
    [single] = parameter_groups(model, 1e-3)
    assert len(single["params"]) == 6
    assert AdamW([single], weight_decay=0.2).param_groups[0]["weight_decay"] == 0.2
    AdamW(groups)


@pytest.mark.parametrize("ratio", [0.0, -1.0, float("nan"), float("inf")])
def test_invalid_ratio_is_refused(ratio: float) -> None:
    with pytest.raises(ValueError, match="lr_ratio must be positive and finite"):
        parameter_groups(adapted(), 1e-3, lr_ratio=ratio)
    with pytest.raises(ValueError, match="lr_ratio must be positive and finite"):
        LoRACallback(lr_ratio=ratio)


def test_module_without_adapters_is_refused() -> None:
    model = network().requires_grad_(False)
    with pytest.raises(ValueError, match="call attach first"):
        parameter_groups(model, 1e-3)


# --- the forms of configure_optimizers


def test_unpack_every_configured_form() -> None:
    one, two = SGD([torch.zeros(1)], lr=1.0), SGD([torch.zeros(1)], lr=1.0)
    first, second = StepLR(one, 1), StepLR(two, 1)
    config = {"scheduler": first, "interval": "step"}
    forms: list[tuple[Any, tuple[list[Any], list[Any]]]] = [
        (None, ([], [])),
        (one, ([one], [])),
        ([one, two], ([one, two], [])),
        ((one, two), ([one, two], [])),
        (([one], [first]), ([one], [first])),
        (([one, two], [config, second]), ([one, two], [first, second])),
        (([one], first), ([one], [first])),
        ({"optimizer": one}, ([one], [])),
        ({"optimizer": one, "lr_scheduler": first, "monitor": "loss"}, ([one], [first])),
        ({"optimizer": one, "lr_scheduler": config}, ([one], [first])),
        (({"optimizer": one, "lr_scheduler": config}, {"optimizer": two}), ([one, two], [first])),
    ]
    for form, expected in forms:
        assert unpack_configured(form) == expected


def test_tensors_of_no_module_that_an_optimizer_trains_are_named():
    class Delegates(nn.Module):
        """Holds its network where torch does not see it, and returns its parameters all the same."""

        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(FEATURES, FEATURES)
            object.__setattr__(self, "held", nn.Linear(FEATURES, 3))

        def parameters(self, recurse: bool = True) -> Any:
            return [*super().parameters(recurse), *self.held.parameters()]

    attach(module := Delegates(), LoRAConfig(rank=2))
    optimizer = AdamW(module.parameters())
    with pytest.warns(UserWarning, match=r"hold 2 tensors that are no parameters of Delegates.* \(3, 8\), \(3,\):"):
        repair_optimizers(module, [optimizer])
    for parameter in module.held.parameters():
        parameter.requires_grad_(False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        repair_optimizers(module, [AdamW(module.parameters())])
