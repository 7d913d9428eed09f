"""Script of two FSDP processes, each with a part of the adapter: report the warnings of a good fit and evaluation."""

from __future__ import annotations

import sys
import warnings

import torch
from torch import Tensor, nn

from lightning_lora import LoRACallback
from tests.distributed.cpu_fsdp import CPUFSDPStrategy
from tests.toys import FEATURES, Toy, loader, trainer


class Narrowing(Toy):
    """``A`` is much larger than ``B``, so the first process holds nothing of ``B``."""

    def build(self) -> None:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.net = nn.Linear(FEATURES, 2)

    def loss(self, batch: list[Tensor]) -> Tensor:
        return self.net(batch[0]).square().mean()


def main(path: str) -> None:
    warnings.simplefilter("ignore")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for stage in ("fit", "validate"):
            strategy, module = CPUFSDPStrategy(auto_wrap_policy={nn.Linear}), Narrowing()
            run = trainer(LoRACallback(rank=1), strategy=strategy, devices=2, limit_val_batches=1)
            getattr(run, stage)(module, loader(32), **({"ckpt_path": path} if stage == "validate" else {}))
            if stage == "fit":
                run.save_checkpoint(path)
    said = [str(each.message) for each in caught if "at its start" in str(each.message)]
    print(f"rank {run.global_rank} holds {module.net.lora.B.numel()} numbers of B and said {said}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
