"""Script of the processes in ``test_kinds.py``: train every layer kind under DDP, FSDP2 and FSDP."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from lightning_lora import LoRAConfig, attach, merge
from lightning_lora.layers import Adapter
from lightning_lora.ops import linear as ops
from lightning_lora.ops import recompute as recomputed
from tests.distributed.cpu_fsdp import add_cpu_events

ROWS = 4


def tokens() -> Tensor:
    return torch.arange(ROWS * 6).view(ROWS, 6) % 20


def vectors() -> Tensor:
    return torch.linspace(-1, 1, ROWS * 5 * 16, dtype=torch.float64).view(ROWS, 5, 16).sin()


def images() -> Tensor:
    return torch.linspace(-2, 2, ROWS * 8 * 6 * 6, dtype=torch.float64).view(ROWS, 8, 6, 6).cos()


class First(nn.Module):
    """Returns the first output of a layer; recurrent layers and attention return several."""

    def __init__(self, layer: nn.Module, inputs: int) -> None:
        super().__init__()
        self.layer, self.inputs = layer, inputs

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(*[x] * self.inputs)[0]


class Tied(nn.Module):
    """An embedding and a head that share a weight."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.middle, self.head = nn.Embedding(20, 16), nn.Linear(16, 16), nn.Linear(16, 20, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.middle(self.embed(x)).tanh())


@dataclass(frozen=True)
class Case:
    """A model, its inputs and its options."""

    build: Callable[[], nn.Module]
    inputs: Callable[[], Tensor]
    options: dict[str, Any] = field(default_factory=dict)


REFUSED_BY_FSDP1 = {"tied tokens", "attention", "encoder", "lstm"}


def _linear() -> nn.Module:
    return nn.Sequential(nn.Linear(16, 12), nn.Tanh(), nn.Linear(12, 16))


CASES = {
    "linear": Case(_linear, vectors),
    "linear with DoRA": Case(_linear, vectors, {"use_dora": True}),
    "linear with a bias on B": Case(_linear, vectors, {"lora_bias": True}),
    "linear with its biases": Case(_linear, vectors, {"bias": "all"}),
    "slices": Case(_linear, vectors, {"target_modules": [], "target_slices": {"0": {"a": "0:3", "b": "8::2"}}}),
    "embedding": Case(lambda: nn.Sequential(nn.Embedding(20, 16)), tokens, {"target_modules": ["0"]}),
    "tied tokens": Case(Tied, tokens, {"target_modules": ["middle"], "trainable_token_indices": [3, 7]}),
    "convolution": Case(
        lambda: nn.Sequential(nn.Conv2d(8, 12, 3, 2, 1, groups=2)), images, {"target_modules": ["0"], "rank": 2}
    ),
    "attention": Case(lambda: First(nn.MultiheadAttention(16, 2, batch_first=True), 3), vectors),
    "encoder": Case(lambda: nn.TransformerEncoderLayer(16, 2, 24, dropout=0.0, batch_first=True), vectors),
    "lstm": Case(lambda: First(nn.LSTM(16, 8, 2, batch_first=True), 1), vectors, {"target_modules": ["layer"]}),
}


def train(
    case: Case, wrap: Callable[[nn.Module], nn.Module] = lambda model: model, rank: int = 0, world: int = 1
) -> dict[str, Tensor]:
    """Train two steps on this process's rows and return the adapter, the output and the merged output, whole."""
    torch.manual_seed(3)
    model = case.build().double()
    attach(model, LoRAConfig(**({"rank": 2, "alpha": 3.0} | case.options)))
    model = wrap(model)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    inputs = case.inputs()
    for step in range(2):
        model(inputs[rank::world]).sub(0.1 * step).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    with torch.no_grad():
        found = {"output": _whole(model(inputs))}
        if isinstance(model, FullyShardedDataParallel):
            return found  # its tensors cannot be read without FSDP's own tools
        if isinstance(model, DistributedDataParallel):
            model = model.module
        found |= {name: _whole(p) for name, p in model.named_parameters() if p.requires_grad}
        merge(model)
        found["merged"] = _whole(model(inputs))
    return found


def fully_sharded(model: nn.Module, mesh: DeviceMesh) -> nn.Module:
    for part in model.children():
        if any(True for _ in part.parameters()) and not isinstance(model, Tied):
            fully_shard(part, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def flattened(model: nn.Module) -> nn.Module:
    policy = ModuleWrapPolicy({Adapter})
    return FullyShardedDataParallel(model, auto_wrap_policy=policy, device_id=torch.device("cpu"), use_orig_params=True)


def _whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor().clone() if isinstance(tensor, DTensor) else tensor.detach().clone()


def main() -> None:
    ops._FEW = recomputed._FEW = 0  # take the paths of large layers for small ones too
    rank, world, path = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), sys.argv[1]
    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (world,))
    add_cpu_events()
    results: dict[str, Any] = {
        "ddp": {name: train(case, DistributedDataParallel, rank, world) for name, case in CASES.items()},
        "fsdp2": {name: train(case, lambda m: fully_sharded(m, mesh), rank, world) for name, case in CASES.items()},
        "fsdp1": {name: train(CASES[name], flattened, rank, world) for name in CASES if name not in REFUSED_BY_FSDP1},
    }
    torch.save(results, f"{path}/rank{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
