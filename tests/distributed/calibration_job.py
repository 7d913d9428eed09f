"""Script of the processes in ``test_calibration.py``: calibrate on a share of the data, in plain torch and in a fit.

Arguments: the results directory.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard

from lightning_lora import LoRACallback, LoRAConfig, adapter_state_dict, attach, calibrate
from tests.distributed.cpu_fsdp import CPUFSDPStrategy
from tests.toys import SelfAttention, trainer

STARTS = ("eva", "corda", "lora_ga", "covariance")
RANKS: dict[str, Any] = {"rank": "auto", "rank_budget": 150, "init": "eva"}


class Net(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 8))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: Tensor) -> Tensor:
        return self.net(batch).square().mean()

    def train_dataloader(self) -> Any:
        return torch.utils.data.DataLoader(torch.cat(all_batches()), batch_size=6)  # type: ignore[arg-type]

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.1)


def all_batches() -> list[Tensor]:
    generator = torch.Generator().manual_seed(7)
    return [torch.randn(6, 3, 12, generator=generator) for _ in range(8)]


def share(rank: int, world: int) -> list[Tensor]:
    """Return the batches of a process: the first has fewer than the others."""
    batches = all_batches()
    first = batches[:1]
    return first if rank == 0 else batches[1:][rank - 1 :: world - 1]


def calibrated(batches: list[Tensor], **options: Any) -> dict[str, Tensor]:
    model = Net()
    attach(model, LoRAConfig(**({"rank": 2} | options)))
    calibrate(model, batches, lambda batch: model(batch).square().mean())
    return adapter_state_dict(model)


def with_attention(batches: list[Tensor]) -> dict[str, Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 12), SelfAttention())
    attach(model, LoRAConfig(rank=2, init="covariance"))
    calibrate(model, batches, lambda batch: model(batch).square().mean())
    return adapter_state_dict(model)


class Branching(nn.Module):
    """Two layers that read the same tensor, or, if ``apart``, copies of it."""

    def __init__(self, *, apart: bool) -> None:
        super().__init__()
        self.apart, self.q, self.k = apart, nn.Linear(12, 12), nn.Linear(12, 12)

    def forward(self, x: Tensor) -> Tensor:
        return self.q(x) + self.k(x.clone() if self.apart else x)


def branching(batches: list[Tensor], *, apart: bool) -> dict[str, Tensor]:
    torch.manual_seed(0)
    model = Branching(apart=apart)
    attach(model, LoRAConfig(rank=2, init="eva"))
    calibrate(model, batches)
    return adapter_state_dict(model)


class Look(LoRACallback):
    state: dict[str, Tensor]

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.state = adapter_state_dict(pl_module)
        super().on_train_start(trainer, pl_module)


def fit(strategy: Any, **options: Any) -> dict[str, Tensor]:
    look = Look(**({"rank": 2} | options))
    trainer(look, strategy=strategy, devices=dist.get_world_size() if dist.is_initialized() else 1).fit(Net())
    return look.state


class Losses(Net):
    """Notes its losses, and shards itself under FSDP2; every process sees all data."""

    def __init__(self) -> None:
        super().__init__()
        self.losses = list[float]()

    def training_step(self, batch: Tensor) -> Tensor:
        loss = super().training_step(batch)
        self.losses.append(float(loss.detach()))
        return loss

    def configure_model(self) -> None:
        if isinstance(self.trainer.strategy, ModelParallelStrategy):
            attach(self)
            for layer in (self.net[0], self.net[2]):
                fully_shard(layer, mesh=self.device_mesh["data_parallel"])


def losses(strategy: Any, start: str) -> list[float]:
    module, processes = Losses(), dist.get_world_size() if dist.is_initialized() else 1
    options: dict[str, Any] = {"devices": processes, "max_steps": 4, "use_distributed_sampler": False}
    run = trainer(LoRACallback(rank=2, init=start), strategy=strategy, **options)
    run.fit(module)
    return module.losses


def main(folder: Path) -> None:
    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    found: dict[str, Any] = {start: calibrated(share(rank, world), init=start) for start in STARTS}
    found["attention"] = with_attention(share(rank, world) if rank else [])
    found["shared inputs"] = branching(share(rank, world), apart=False)
    found["inputs shared by some"] = branching(share(rank, world), apart=rank == 0)
    found["ranks"] = calibrated(share(rank, world), **RANKS)
    found["fit"] = fit(DDPStrategy(process_group_backend="gloo"), init="eva")
    found["fit with ranks"] = fit(DDPStrategy(process_group_backend="gloo"), **RANKS)
    found["fsdp1"] = losses(CPUFSDPStrategy(auto_wrap_policy={nn.Linear}), "pissa")
    found["fsdp2"] = losses(ModelParallelStrategy(data_parallel_size=world, tensor_parallel_size=1), "pissa")
    torch.save(found, folder / f"{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
