"""Script of the processes in ``test_ddp.py``."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy

from lightning_lora import LoRASweep, adapter_state_dict, using
from tests.toys import Toy, loader, trainer


class Half(Toy):
    """Sees every second row of each batch, so that two processes see the rows of one."""

    def loss(self, batch: Any) -> torch.Tensor:
        rank, world = self.global_rank, self.trainer.world_size
        return super().loss([part[rank::world].double() for part in batch])

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return self.loss(batch)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", self.loss(batch))  # not synchronized: the processes must agree all the same


def fit(directory: Path, mode: Any, devices: int, path: Any = None) -> dict[str, Any]:
    module = Half()
    lrs = {"a": 1e-2, "b": 3e-3, "c": 1e-4, "d": 1e-5, "wild": 1e300}
    adapters = {name: {"lr": lr, "rank": 1 + index % 2} for index, (name, lr) in enumerate(lrs.items())}
    sweep = LoRASweep(adapters=adapters, mode=mode, adapter_dtype="float64")
    run = trainer(
        sweep,
        ModelCheckpoint(directory / f"{mode}{devices}", filename="{step}", save_top_k=-1),
        max_steps=12,
        max_epochs=9,
        limit_val_batches=1.0,
        devices=devices,
        strategy=DDPStrategy(process_group_backend="gloo") if devices > 1 else "auto",
        precision="64-true",
        use_distributed_sampler=False,
        gradient_clip_val=0.5,
    )
    run.fit(module, loader(), loader(8), ckpt_path=path)
    states = {}
    for name in adapters:
        with using(module, name):
            states[name] = adapter_state_dict(module)
    table = [(row["name"], row["stopped at"], row["why"]) for row in sweep.table()]
    return {"states": states, "table": table, "best": sweep.best, "rank": run.global_rank}


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    folder = Path(sys.argv[1])
    found: dict[str, Any] = {}
    for mode in ("vmap", "loop"):
        found[mode] = fit(folder, mode, 2)
    found["resumed"] = fit(folder / "resumed", "vmap", 2, path=folder / "vmap2" / "step=4.ckpt")
    torch.save(found, folder / f"found{found['vmap']['rank']}.pt")
