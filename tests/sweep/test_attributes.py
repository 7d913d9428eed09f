"""Each adapter has the plain attributes that its own blocks have set; a look at them leaves no trace."""

from __future__ import annotations

import torch
from lightning.pytorch import LightningModule

from lightning_lora.sweep.attributes import OwnAttributes


class Counts(LightningModule):
    """Has two plain attributes, and may get more."""

    def __init__(self) -> None:
        super().__init__()
        self.count, self.scale = 0, torch.ones(())


def test_blocks_set_attributes_of_their_own():
    module = Counts()
    own = OwnAttributes(module, ["a", "b"])
    for name in ("a", "b", "a"):
        with own.of(name):
            module.count += 1
    for name, count in {"a": 2, "b": 1}.items():
        with own.of(name):
            assert module.count == count


def test_a_look_shows_the_adapters_values_and_leaves_no_trace():
    module = Counts()
    own = OwnAttributes(module, ["a", "b"])
    for name, count in {"a": 3, "b": 5}.items():
        with own.of(name):
            module.count = count
    before = dict(vars(module))
    with own.shown("a"):
        assert module.count == 3
        module.count, module.scale, module.new = 9, torch.zeros(()), 1.0
    assert vars(module) == before
    with own.of("a"):
        assert module.count == 3
