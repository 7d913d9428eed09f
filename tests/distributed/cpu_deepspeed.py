"""DeepSpeed on the CPU: lift what Lightning restricts to GPUs."""

from __future__ import annotations

import os
from typing import Any

import torch
from lightning.fabric.utilities.seed import reset_seed
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy


class CPUDeepSpeedStrategy(DeepSpeedStrategy):
    """Lightning's strategy without its requirement of CUDA; DeepSpeed itself has a CPU accelerator."""

    def __init__(self, **options: Any) -> None:
        os.environ["DS_ACCELERATOR"] = "cpu"
        import deepspeed

        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # would first be compiled for half a minute
        super().__init__(process_group_backend="gloo", **options)
        # The layers of the tests are too small for stage 3 to shard by default.
        self.config["zero_optimization"]["stage3_param_persistence_threshold"] = 0

    @property
    def root_device(self) -> torch.device:
        return torch.device("cpu", 0)  # DeepSpeed needs the index

    def setup_environment(self) -> None:
        DDPStrategy.setup_environment(self)

    def setup_distributed(self) -> None:
        reset_seed()
        self.set_world_ranks()
        self._init_deepspeed_distributed()
