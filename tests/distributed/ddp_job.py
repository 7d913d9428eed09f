"""Script of the processes in ``test_ddp.py``."""

from __future__ import annotations

import os
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy

from lightning_lora import LoRACallback, lora_layers
from tests.toys import Toy, loader, snapshot, trainer

DOUBLE = {"precision": "64-true", "use_distributed_sampler": False}


class Half(Toy):
    """Sees every second row of each batch, so two processes see the rows of one; plain SGD in float64."""

    def training_step(self, batch: list[torch.Tensor], batch_idx: int) -> torch.Tensor:
        rank, world = self.global_rank, self.trainer.world_size
        return super().training_step([part[rank::world].double() for part in batch], batch_idx)

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=1e-2, weight_decay=0.1)


class Unequal(Half):
    """Draws different random numbers in each process before the adapters are attached."""

    def build(self) -> None:
        super().build()
        torch.manual_seed(dist.get_rank() if dist.is_initialized() else int("LOCAL_RANK" in os.environ))
        torch.rand(7)


class Records(Callback):
    """Records the initial adapters, the reducer's bucket bytes and the collectives during a save."""

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self.start = {name: value for name, value in snapshot(pl_module).items() if ".lora." in name}
        reducer = trainer.strategy.model
        logged = reducer._get_ddp_logging_data() if hasattr(reducer, "_get_ddp_logging_data") else {}
        self.bucket_bytes = logged.get("total_parameter_size_bytes", 0)


def fit(directory: Path, name: str, epochs: int, ckpt_path: str | None = None, devices: int = 2) -> dict[str, Any]:
    module, records = Unequal(), Records()
    checkpoint = ModelCheckpoint(directory / name, save_last=True)
    strategy = DDPStrategy(process_group_backend="gloo") if devices > 1 else "auto"
    run = trainer(
        LoRACallback(rank=4, adapter_dtype="float64"),
        checkpoint,
        records,
        max_epochs=epochs,
        max_steps=-1,
        strategy=strategy,
        devices=devices,
        **DOUBLE,
    )
    run.fit(module, loader(16), ckpt_path=ckpt_path)
    return {
        "state": snapshot(module),
        "losses": module.losses,
        "start": records.start,
        "bucket_bytes": records.bucket_bytes,
        "adapter_bytes": sum(p.nbytes for layer in lora_layers(module).values() for p in layer.lora.parameters()),
        "last": checkpoint.last_model_path,
        "rank": module.global_rank,
    }


def main() -> None:
    warnings.simplefilter("ignore")
    directory = Path(sys.argv[1])
    results = {"whole": fit(directory, "whole", 2), "half": fit(directory, "half", 1)}
    results["resumed"] = fit(directory, "resumed", 2, results["half"]["last"])
    torch.save(results, directory / f"rank{results['whole']['rank']}.pt")
    dist.barrier()


if __name__ == "__main__":
    main()
