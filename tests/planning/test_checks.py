"""A part with adapters of its own: what is refused, and the ways that the message names."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from lightning_lora import (
    LoRACallback,
    LoRAConfig,
    adapter_names,
    add_adapter,
    attach,
    detach,
    lora_layers,
    merge,
    using,
)
from tests.contract import raises_and_changes_nothing, train_all
from tests.toys import FEATURES, Toy, loader, network, trainer

CONFIG = LoRAConfig(rank=2)
STUDENT = LoRAConfig(rank=2, exclude_modules=["teacher"])
INPUT = torch.linspace(-1, 1, 4 * FEATURES).view(4, FEATURES)


class Student(Toy):
    """Learns from a model that has been adapted itself."""

    def __init__(self, teacher: nn.Module) -> None:
        super().__init__()
        self.teacher = teacher

    def loss(self, batch: Any) -> Any:
        return (self.net(batch[0]) - self.teacher(batch[0]).detach()).square().mean()


@pytest.fixture
def teacher(rng: torch.Generator) -> nn.Module:
    attach(model := network(), CONFIG)
    train_all(model, rng)
    return model


LEFT_OUT = "such as a teacher, keeps what it computes after merge"


@pytest.mark.parametrize("kind", ["a part", "a part with a name", "two parts"])
def test_a_part_with_adapters_of_its_own_that_the_new_one_leaves_out_is_refused(kind: str, teacher: nn.Module) -> None:
    module = Student(teacher)
    if kind == "two parts":
        attach(another := network(), CONFIG)
        module.teacher = nn.ModuleList([teacher, another])
    elif kind == "a part with a name":
        detach(teacher)
        add_adapter(teacher, "mine", CONFIG)
        with using(teacher, None):  # switching leaves its marks
            pass
    with raises_and_changes_nothing(module, ValueError, LEFT_OUT):
        attach(module, STUDENT)
    with raises_and_changes_nothing(module, ValueError, f"the new adapter leaves all of it out.*{LEFT_OUT}"):
        add_adapter(module, "student", STUDENT)
    if kind != "two parts":
        with using(teacher, None), raises_and_changes_nothing(module, ValueError, "is the bare base now"):
            attach(module, STUDENT)


WAYS: dict[str, Callable[[Student, nn.Module], None]] = {
    "merged": lambda _, teacher: merge(teacher),
    "outside": lambda module, teacher: _take_outside(module, teacher),
}


def _take_outside(module: Student, teacher: nn.Module) -> None:
    del module.teacher
    object.__setattr__(module, "teacher", teacher)


@pytest.mark.parametrize("adapter", [None, "student"])
@pytest.mark.parametrize("way", WAYS)
def test_the_ways_that_the_message_names_train_the_student_alone(
    way: str, adapter: str | None, teacher: nn.Module
) -> None:
    expected = teacher(INPUT).detach()
    module = Student(teacher)
    WAYS[way](module, teacher)
    targets = ["net.*"] if way == "outside" else "all-linear"
    left_out = [] if way == "outside" else ["teacher"]
    callback = LoRACallback(rank=2, target_modules=targets, exclude_modules=left_out, adapter=adapter)
    trainer(callback).fit(module, loader())
    torch.testing.assert_close(module.teacher(INPUT), expected, rtol=1e-5, atol=1e-6)
    assert list(lora_layers(module)) == ["net.0", "net.2", "net.4"]
    assert all(layer.lora.B.any() for layer in lora_layers(module).values())


def test_an_adapter_of_the_whole_that_covers_the_part_goes_beside_that_of_the_part(teacher: nn.Module) -> None:
    module = Student(teacher)
    add_adapter(module, "student", CONFIG)
    assert adapter_names(module) == ["default", "student"]
