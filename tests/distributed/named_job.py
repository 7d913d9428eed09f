"""Script of two processes: train one of three adapters under each strategy, switch, and save what came of it."""

from __future__ import annotations

import random
import sys

import torch
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy, Strategy
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader, DistributedSampler

from lightning_lora import LoRACallback, LoRAConfig, adapter_state_dict, add_adapter, attach, set_adapter, using
from tests.distributed.cpu_fsdp import CPUFSDPStrategy
from tests.toys import Toy, loader, trainer

STRATEGIES = ("single", "ddp", "fsdp", "fsdp2")
OPTIONS = {"rank": 2, "target_modules": ["net.0", "net.4"]}
OTHERS = {"a": {"rank": 1, "target_modules": ["net.0", "net.2"]}, "b": {"rank": 3, "use_dora": True}}


class Named(Toy):
    """Switches at random in each step, and shards itself where the strategy asks for it."""

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        for name in random.Random(batch_idx).choices(["a", "b", "mine", None], k=5):
            with using(self, name), torch.no_grad():
                self.net(batch[0])
        return super().training_step(batch, batch_idx)

    def configure_model(self) -> None:
        if isinstance(self.trainer.strategy, ModelParallelStrategy):
            attach(self)
            for layer in self.net:
                if isinstance(layer, nn.Linear):
                    fully_shard(layer, mesh=self.device_mesh["data_parallel"])
            fully_shard(self.net, mesh=self.device_mesh["data_parallel"])


def strategy(name: str) -> Strategy | str:
    if name == "single":
        return "auto"
    if name == "ddp":
        return DDPStrategy(process_group_backend="gloo")
    if name == "fsdp":
        return CPUFSDPStrategy(auto_wrap_policy={nn.Linear})
    return ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1, process_group_backend="gloo")


def main(name: str, folder: str) -> None:
    module = Named()
    for other, options in OTHERS.items():
        add_adapter(module, other, LoRAConfig(**options))
    before = {other: state(module, other) for other in OTHERS}
    processes, data = (1 if name == "single" else 2), loader().dataset
    run = trainer(
        LoRACallback(adapter="mine", **OPTIONS),
        strategy=strategy(name),
        devices=processes,
        max_steps=3,
        use_distributed_sampler=False,  # which shuffles
    )
    sampler = DistributedSampler(data, processes, run.global_rank, shuffle=False)
    run.fit(module, DataLoader(data, 8 // processes, sampler=sampler))
    run.save_checkpoint(f"{folder}/{name}.ckpt")
    if name != "fsdp":  # which leaves slices
        for other, was in before.items():
            set_adapter(module, other)
            now = adapter_state_dict(module)
            assert now.keys() == was.keys()
            assert all(torch.equal(value, now[key]) for key, value in was.items()), f"{other} has changed"


def state(module: nn.Module, name: str) -> dict[str, Tensor]:
    with using(module, name):
        return adapter_state_dict(module)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
