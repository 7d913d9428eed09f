"""The frozen norm: eval mode whatever it is told, and the mode it was told remembered."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from lightning_lora.layers import FrozenNorm, has_running_statistics, swap_in, swap_out


@pytest.mark.parametrize(
    ("norm", "expected"),
    [
        (nn.BatchNorm1d(4), True),
        (nn.BatchNorm2d(4, affine=False), True),
        (nn.SyncBatchNorm(4), True),
        (nn.InstanceNorm2d(4, track_running_stats=True), True),
        (nn.BatchNorm1d(4, track_running_stats=False), False),
        (nn.InstanceNorm1d(4), False),
        (nn.LayerNorm(4), False),
        (nn.GroupNorm(2, 4), False),
        (nn.Linear(4, 4), False),
        (nn.utils.spectral_norm(nn.Linear(4, 4)), True),
        (nn.utils.parametrizations.spectral_norm(nn.Linear(4, 4)).parametrizations.weight[0], True),
        (nn.utils.parametrizations.spectral_norm(nn.Linear(4, 4), name="bias").parametrizations.bias[0], False),
        (nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)).parametrizations.weight[0], False),
    ],
    ids=lambda value: type(value).__name__,
)
def test_running_statistics_are_recognised(norm: nn.Module, expected: bool):
    assert has_running_statistics(norm) is expected


def frozen() -> nn.BatchNorm1d:
    norm = nn.BatchNorm1d(4)
    swap_in(norm, FrozenNorm)
    norm.train()
    return norm


def test_frozen_norm_stays_in_eval():
    norm = frozen()
    for mode in (True, False, True):
        assert norm.train(mode) is norm
        assert not norm.training
        assert norm.asked_mode is mode
    assert norm.eval() is norm
    assert norm.asked_mode is False


def test_frozen_statistics_do_not_move():
    norm, before = frozen(), nn.BatchNorm1d(4).state_dict()
    norm(torch.randn(8, 4) + 5)
    assert all(torch.equal(tensor, before[name]) for name, tensor in norm.state_dict().items())


def test_copy_of_frozen_norm_is_frozen():
    twin = copy.deepcopy(frozen())
    assert twin.asked_mode is True
    assert not twin.train().training
    swap_out(twin)
    assert twin.train().training
