"""Class swap: behaviour comes and goes, the module stays."""

from __future__ import annotations

import copy
import pickle

from torch import nn

from lightning_lora.layers import Swapped, swap_in, swap_out
from tests.contract import CountingLinear, assert_unchanged, snapshot


class Loud(Swapped):
    """A behaviour to mix in."""

    class_prefix = "Loud"

    def forward(self, *args):
        return -super().forward(*args)


def test_a_swapped_module_is_itself_with_more_behaviour():
    layer = nn.Linear(4, 4)
    before = snapshot(layer)
    swap_in(layer, Loud)
    assert isinstance(layer, nn.Linear)
    assert isinstance(layer, Loud)
    assert type(layer).__name__ == "LoudLinear"
    assert type(layer).__module__ == nn.Linear.__module__
    assert type(layer).__doc__ == nn.Linear.__doc__
    swap_out(layer)
    assert_unchanged(layer, before)


def test_one_class_is_made_for_each_base_class():
    layers = [nn.Linear(4, 4), nn.Linear(5, 5), CountingLinear(4, 4)]
    for layer in layers:
        swap_in(layer, Loud)
    assert type(layers[0]) is type(layers[1]) is not type(layers[2])


def test_classes_of_the_same_name_are_kept_apart():
    def make() -> type[nn.Linear]:
        class Twin(nn.Linear):
            pass

        return Twin

    one, two = make()(4, 4), make()(4, 4)
    kinds = type(one), type(two)
    for layer in (one, two):
        swap_in(layer, Loud)
        swap_out(layer)
    assert (type(one), type(two)) == kinds


def test_a_swapped_module_can_be_copied_and_pickled_under_every_protocol():
    layer = CountingLinear(4, 4)
    layer.calls = 3
    swap_in(layer, Loud)
    copies = [pickle.loads(pickle.dumps(layer, protocol)) for protocol in range(2, pickle.HIGHEST_PROTOCOL + 1)]
    for twin in [*copies, copy.copy(layer), copy.deepcopy(layer)]:
        assert type(twin) is type(layer)
        assert twin.calls == 3
        assert twin.weight.equal(layer.weight)
        swap_out(twin)
        assert type(twin) is CountingLinear


def test_swaps_stack_and_come_off_in_reverse():
    class Louder(Loud):
        class_prefix = "Louder"

    layer = nn.Linear(4, 4)
    swap_in(layer, Loud)
    swap_in(layer, Louder)
    swap_out(layer)
    assert type(layer).__name__ == "LoudLinear"
    swap_out(layer)
    assert type(layer) is nn.Linear
