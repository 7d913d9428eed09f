"""Script of one process on one GPU in ``test_strategies.py``: ``python strategy_job.py DIRECTORY MODE``."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from torch import nn
from torch.distributed.fsdp import FSDPModule, fully_shard

from lightning_lora import LoRACallback, attach, lora_layers
from tests.distributed.cpu_deepspeed import CPUDeepSpeedStrategy
from tests.distributed.cpu_fsdp import CPUFSDPStrategy
from tests.gpu.device import REHEARSAL, on_device
from tests.toys import Toy, loader, network

MODES = ("single", "fsdp", "fsdp2", "deepspeed 1", "deepspeed 2", "deepspeed 3")
CONFIGURED = {"rank": 4, "modules_to_save": ["net.4"]}


class Built(Toy):
    def build(self) -> None: ...

    def configure_model(self) -> None:
        if not hasattr(self, "net"):
            self.net = network()


class Sharded(Built):
    def configure_model(self) -> None:
        super().configure_model()
        if isinstance(self.net, FSDPModule):
            return
        attach(self)
        for layer in (self.net[0], self.net[2]):
            fully_shard(layer, mesh=self.device_mesh["data_parallel"])
        fully_shard(self.net, mesh=self.device_mesh["data_parallel"])


def strategy(mode: str) -> Any:
    if mode == "fsdp":
        return (CPUFSDPStrategy if REHEARSAL else FSDPStrategy)(auto_wrap_policy={nn.Linear})
    if mode == "fsdp2":
        backend = "gloo" if REHEARSAL else None
        return ModelParallelStrategy(data_parallel_size=1, tensor_parallel_size=1, process_group_backend=backend)
    if mode.startswith("deepspeed"):
        return (CPUDeepSpeedStrategy if REHEARSAL else DeepSpeedStrategy)(stage=int(mode[-1]))
    return "auto"


def fit(directory: Path, mode: str, name: str, epochs: int, ckpt_path: str | None = None, **lora: Any) -> Any:
    # FSDP2 also shards over a mesh of one process.
    module = Sharded() if mode == "fsdp2" else Built()
    checkpoint = ModelCheckpoint(directory / mode / name, save_last=True)
    options = {**CONFIGURED, "export_dir": str(directory / mode / name / "peft"), **lora}
    run = on_device(
        LoRACallback(**options), checkpoint, max_epochs=epochs, strategy=strategy(mode), use_distributed_sampler=False
    )
    run.fit(module, loader(), ckpt_path=ckpt_path)
    return {"losses": module.losses, "last": checkpoint.last_model_path, "adapters": len(lora_layers(module))}


def main() -> None:
    warnings.simplefilter("ignore")
    directory, mode = Path(sys.argv[1]), sys.argv[2]
    results = {"whole": fit(directory, mode, "whole", 2), "half": fit(directory, mode, "half", 1)}
    results["resumed"] = fit(directory, mode, "resumed", 2, results["half"]["last"], merge_on_teardown=True)
    torch.save(results, directory / f"{mode}.pt")


if __name__ == "__main__":
    main()
