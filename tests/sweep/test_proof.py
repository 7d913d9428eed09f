"""The proof that a faster way of running a batch gives every adapter its own loss and gradients."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import nn

from lightning_lora import LoRAConfig, add_adapter
from lightning_lora.sweep.proof import Proof
from lightning_lora.sweep.steps import Call, Outcome, Step, UnfitError, run_one
from tests.toys import Toy, loader

pytestmark = pytest.mark.filterwarnings("ignore:These adapters are not smaller")


class Phased(Toy):
    """A toy whose loss depends on a complex weight."""

    def build(self) -> None:
        super().build()
        self.phase = nn.Parameter(torch.ones(3, dtype=torch.complex64))

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self.loss(batch) + self.phase.abs().square().sum()


@pytest.mark.parametrize("part", ["real", "imag"])
def test_wrong_gradient_of_either_part_of_a_complex_weight_is_seen(part: str):
    module = Phased()
    add_adapter(module, "a", LoRAConfig(rank=2, target_modules=["net.*"]))
    module.phase.requires_grad_(True)
    calls: dict[str, Call] = {"a": ((next(iter(loader())), 0), {})}

    def way(step: Step, calls: Mapping[str, Call], error: float = 0.0) -> dict[str, Outcome]:
        found = run_one(module, step, calls["a"], "a")
        extra = getattr(module.phase, part).sum()
        found.loss = found.loss + error * (extra - extra.detach())  # the loss stays as it is
        return {"a": found}

    proof = Proof(module, module.training_step, calls, {"a": {"phase": module.phase}}, lambda _: nullcontext())
    proof.check(way)
    with pytest.raises(UnfitError, match="the gradients of 'a' are not those of its own loss"):
        proof.check(lambda step, calls: way(step, calls, error=0.5))
