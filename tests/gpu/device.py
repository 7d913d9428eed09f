"""Where these tests run: on one CUDA device, or not at all."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer

from tests.toys import trainer

ACCELERATOR, DEVICE = "gpu", "cuda"
needs_cuda = [
    pytest.mark.gpu,
    pytest.mark.filterwarnings("ignore"),  # what the many builds for CUDA warn of is not ours
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device; torch finds none"),
]


def on_device(*callbacks: Callback, **options: Any) -> Trainer:
    """A quiet Trainer on the device."""
    return trainer(*callbacks, **({"accelerator": ACCELERATOR, "max_epochs": 2, "max_steps": -1} | options))
