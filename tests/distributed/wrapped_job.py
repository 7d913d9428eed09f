"""Script of the processes in ``test_wrapped.py``: plain PyTorch with Fabric, and modules wrapped by hand.

Arguments: the results directory.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning.fabric import Fabric
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from lightning_lora import LoRAConfig, adapter_state_dict, attach, load_adapter_state_dict, save_adapter
from tests.toys import network

PROCESSES = 2


def adapted() -> nn.Module:
    model = network()
    attach(model, LoRAConfig(rank=2, modules_to_save=["4"]))
    return model


def step(model: nn.Module, optimizer: Any, backward: Any) -> None:
    """Train on rows that differ between the processes."""
    rows = torch.ones(4, model_width(model)) * (1 + dist.get_rank())
    for _ in range(2):
        optimizer.zero_grad()
        backward(model(rows).square().mean())
        optimizer.step()


def model_width(model: nn.Module) -> int:
    return next(part.in_features for part in model.modules() if isinstance(part, nn.Linear))


def by_hand(directory: Path, name: str, wrapped: nn.Module) -> dict[str, Any]:
    """Train, and return the state, and what loading zeros gives."""
    optimizer = torch.optim.SGD([p for p in wrapped.parameters() if p.requires_grad], 0.1)
    step(wrapped, optimizer, torch.Tensor.backward)
    return round_trip(directory, name, wrapped)


def round_trip(directory: Path, name: str, wrapped: nn.Module) -> dict[str, Any]:
    state = adapter_state_dict(wrapped)
    load_adapter_state_dict(wrapped, {key: torch.zeros_like(value) for key, value in state.items()})
    zeros = adapter_state_dict(wrapped)
    load_adapter_state_dict(wrapped, state)
    refused = None
    if dist.get_rank() == 0:
        try:
            save_adapter(wrapped, directory / name)
        except ValueError as error:
            refused = str(error)
    dist.barrier()
    return {"state": state, "zeros": zeros, "again": adapter_state_dict(wrapped), "refused": refused}


def main() -> None:
    directory, results = Path(sys.argv[1]), {}
    fabric = Fabric(accelerator="cpu", devices=PROCESSES, strategy="ddp")
    fabric.launch()
    model = adapted()
    wrapped, optimizer = fabric.setup(model, torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1))
    step(wrapped, optimizer, fabric.backward)
    results["fabric"] = round_trip(directory, "fabric", wrapped)
    results["ddp"] = by_hand(directory, "ddp", DistributedDataParallel(adapted()))
    model = adapted()
    for part in (*model.children(), model):
        if any(True for _ in part.parameters()):
            fully_shard(part, mesh=init_device_mesh("cpu", (PROCESSES,)))
    results["fsdp2"] = by_hand(directory, "fsdp2", model)
    torch.save(results, directory / f"rank{dist.get_rank()}.pt")
    dist.barrier()


if __name__ == "__main__":
    main()
