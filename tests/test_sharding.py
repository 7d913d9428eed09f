"""Parameters sharded by ZeRO-3, with a stand-in for DeepSpeed; the real one is in ``tests/distributed``."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from lightning_lora.sharding import gathered


@contextmanager
def gathered_parameters(parameters: Iterable[Tensor], modifier_rank: int | None = None) -> Iterator[None]:
    """Act like DeepSpeed on values: whole inside, empty afterwards, even after an exception."""
    parameters = list(parameters)
    for parameter in parameters:
        parameter.data = torch.ones(2, 3)
    try:
        yield
    finally:
        for parameter in parameters:
            parameter.data = torch.empty(0)


def test_gathered_shape_is_restored_after_exception(monkeypatch: pytest.MonkeyPatch) -> None:
    zero = SimpleNamespace(GatheredParameters=gathered_parameters)
    monkeypatch.setitem(sys.modules, "deepspeed", SimpleNamespace(zero=zero))
    parameter = nn.Parameter(torch.zeros(()).expand(2, 3))
    parameter.ds_id, parameter.ds_status = 0, SimpleNamespace(name="NOT_AVAILABLE")
    with pytest.raises(ValueError, match="all of it is 6"), gathered([parameter]):
        raise ValueError(f"all of it is {parameter.sum():.0f}")
    assert parameter.shape == (2, 3)
