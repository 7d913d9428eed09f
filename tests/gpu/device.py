"""The device of these tests: a CUDA device, or skip.

With ``REHEARSE_GPU_TESTS=1`` they run on the CPU, to check the tests themselves.
"""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer

from tests.toys import trainer

REHEARSAL = "REHEARSE_GPU_TESTS" in os.environ
ACCELERATOR, DEVICE = ("cpu", "cpu") if REHEARSAL else ("gpu", "cuda")
needs_cuda = [
    pytest.mark.gpu,
    pytest.mark.filterwarnings("ignore"),  # CUDA builds emit many warnings of their own
    pytest.mark.skipif(not (torch.cuda.is_available() or REHEARSAL), reason="needs a CUDA device; torch finds none"),
]
not_rehearsed = pytest.mark.skipif(REHEARSAL, reason="what this asks for, a CPU does not have")


def on_device(*callbacks: Callback, **options: Any) -> Trainer:
    """Return a quiet Trainer on the device."""
    return trainer(*callbacks, **({"accelerator": ACCELERATOR, "max_epochs": 2, "max_steps": -1} | options))
