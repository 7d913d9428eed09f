"""The forecast of a sweep: memory in each mode, how many adapters fit, and the arithmetic over that of fits."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lightning_lora.sweep.forecast import Forecast, bytes_kept, forecast


def test_memory_is_the_base_once_four_times_what_trains_and_the_activations():
    module = nn.Linear(10, 10, bias=False).requires_grad_(False)
    owned = {name: {"A": nn.Parameter(torch.zeros(5, 10))} for name in "abc"}
    found = forecast(module, owned, 1000, None)
    assert found.bytes_of(one_by_one=True) == 400 + 3 * 4 * 200 + 1000
    assert found.bytes_of(one_by_one=False) == 400 + 3 * 4 * 200 + 3 * 1000


@pytest.mark.parametrize("one_by_one", [True, False])
def test_the_number_that_fits_is_the_largest_that_does(one_by_one: bool):
    limit = 100_000
    most = Forecast(1, 400, 800, 1000, None, limit).most(one_by_one=one_by_one)
    assert most is not None
    needed = [Forecast(n, 400, 800 * n, 1000, None, limit).bytes_of(one_by_one=one_by_one) for n in (most, most + 1)]
    assert needed[0] <= limit < needed[1]
    assert Forecast(1, 400, 800, 1000, None, None).most(one_by_one=one_by_one) is None


def test_bytes_kept_are_those_of_the_activations_each_once_without_parameters():
    weight, x = nn.Parameter(torch.ones(4, 4)), torch.ones(8, 4)
    with bytes_kept([weight]) as kept:
        y = (x @ weight).exp()
        (y * y).sum().backward()
    assert kept[0] == x.nbytes + y.nbytes
