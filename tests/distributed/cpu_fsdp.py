"""FSDP on the CPU: add what Lightning and torch lack for it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from lightning.pytorch.plugins.precision import FSDPPrecision
from lightning.pytorch.strategies import FSDPStrategy
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.fsdp.wrap import _ConfigAutoWrap


class _Event:
    """A stand-in for the stream events that FSDP records."""

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def record(self, *_: Any) -> None: ...

    def wait(self, *_: Any) -> None: ...

    def synchronize(self) -> None: ...

    def query(self) -> bool:
        return True


def add_cpu_events() -> None:
    if not hasattr(torch.cpu, "Event"):
        torch.cpu.Event = _Event  # type: ignore[misc,assignment]


class CPUFSDPStrategy(FSDPStrategy):
    """Lightning's strategy, except for the device index, which a CPU does not have."""

    def __init__(self, **options: Any) -> None:
        add_cpu_events()
        super().__init__(process_group_backend="gloo", **options)

    @contextmanager
    def model_sharded_context(self) -> Iterator[None]:
        with super().model_sharded_context():
            _ConfigAutoWrap.kwargs["device_id"] = torch.device("cpu")
            yield

    def _setup_model(self, model: torch.nn.Module) -> torch.nn.Module:
        if any(isinstance(part, FullyShardedDataParallel) for part in model.modules()):
            return super()._setup_model(model)
        return FullyShardedDataParallel(
            model,
            device_id=torch.device("cpu"),
            mixed_precision=self.mixed_precision_config,
            sharding_strategy=self.sharding_strategy,
            **self.kwargs,
        )


class DoubleFSDPPrecision(FSDPPrecision):
    """Float64, which Lightning does not offer for FSDP, to compare processes without rounding noise."""

    def __init__(self) -> None:
        super().__init__("32-true")
        self._desired_input_dtype = torch.float64

    @property
    def mixed_precision_config(self) -> None:
        return None
