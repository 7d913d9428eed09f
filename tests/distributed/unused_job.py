"""Script of two DDP processes with an adapted layer that never runs."""

from __future__ import annotations

import warnings

from lightning.pytorch.strategies import DDPStrategy
from torch import nn

from lightning_lora import LoRACallback
from tests.toys import Toy, loader, trainer


class Idle(Toy):
    """Has a layer that it does not use."""

    def build(self) -> None:
        super().build()
        self.idle = nn.Linear(8, 8)


def main() -> None:
    warnings.simplefilter("ignore")
    run = trainer(LoRACallback(rank=2), strategy=DDPStrategy(process_group_backend="gloo"), devices=2)
    try:
        run.fit(Idle(), loader(32))
    except RuntimeError as error:
        print(f"caught in rank {run.global_rank}: {error}", flush=True)


if __name__ == "__main__":
    main()
