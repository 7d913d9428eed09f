"""Errors of torch about gradients name the adapters and the remedy."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from lightning_lora import LoRAConfig, attach
from lightning_lora.trainer.hints import explain_torch_error
from tests.distributed import unused_job
from tests.distributed.ports import free_port
from tests.toys import network

ROOT = Path(__file__).parents[2]


@pytest.mark.distributed
@pytest.mark.slow
def test_ddp_names_layers_that_never_run() -> None:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "MASTER_PORT": str(free_port())}
    command = [sys.executable, unused_job.__file__]
    process = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert process.returncode == 0, process.stderr
    for rank in range(2):
        assert f"caught in rank {rank}: DDP waits for gradients that never come" in process.stdout
    assert process.stdout.count("none reached the adapters of idle. Use exclude_modules") == 2


def adapted() -> nn.Module:
    model = network()
    attach(model, LoRAConfig(rank=2))
    return model


def test_parameter_ready_twice_suggests_remedy() -> None:
    # The words of torch/csrc/distributed/c10d/reducer.cpp.
    error = RuntimeError("Expected to mark a variable ready only once. This error is caused by one of ...")
    explain_torch_error(error, adapted())
    assert str(error).startswith("Expected to mark a variable ready only once.")
    assert "an adapter, one of 0, 2, 4, was used in several backward passes" in str(error)
    assert "use_reentrant=False" in str(error)


def test_loss_without_gradient_suggests_remedy() -> None:
    model = adapted()
    with pytest.raises(RuntimeError) as caught:
        model(torch.ones(1, 8)).sum().detach().backward()
    explain_torch_error(caught.value, model)
    assert "element 0 of tensors does not require grad" in str(caught.value)
    assert "the loss depends on no adapter" in str(caught.value)
    assert "modules_to_save" in str(caught.value)
    assert "use_reentrant=False" in str(caught.value)


@pytest.mark.parametrize("message", ["CUDA out of memory", "", "Expected to have finished reduction"])
def test_other_errors_are_unchanged(message: str) -> None:
    error = RuntimeError(message)
    explain_torch_error(error, adapted())
    assert error.args == (message,)


def test_ddp_error_about_other_parameters_is_unchanged() -> None:
    model, message = adapted(), "Expected to have finished reduction in the prior iteration before starting a new one."
    for parameter in model.parameters():
        parameter.grad = parameter.detach().clone()
    error = RuntimeError(message)
    explain_torch_error(error, model)
    assert error.args == (message,)
