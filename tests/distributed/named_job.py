"""Script of the processes in ``test_named.py``: train one of several adapters, switch, save all, and resume.

Arguments: the results directory, and the strategies to use one after another.
"""

from __future__ import annotations

import random
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy, Strategy
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.utils.data import DataLoader, DistributedSampler

from lightning_lora import (
    LoRACallback,
    LoRAConfig,
    adapter_state_dict,
    add_adapter,
    attach,
    load_adapter_state_dict,
    set_adapter,
    using,
)
from tests.distributed.cpu_fsdp import CPUFSDPStrategy
from tests.toys import Toy, loader, trainer

STRATEGIES = ("ddp", "fsdp", "fsdp2", "tensor")
STAGES = ("zero1", "zero2", "zero3")
OPTIONS: dict[str, Any] = {"rank": 2, "target_modules": ["net.0", "net.4"]}
SWITCHED: dict[str, dict[str, Any]] = {
    "a": {"rank": 1, "target_modules": ["net.0", "net.2"]},
    "b": {"rank": 3, "use_dora": True, "target_modules": ["net.4"]},  # divided layers take no DoRA
}
HEADED: dict[str, Any] = {"rank": 1, "target_modules": ["net.2"], "modules_to_save": ["net.4"]}  # FSDP cannot switch it


class Named(Toy):
    """Switches at random in each step, counts its steps, and shards itself where the strategy asks for it."""

    adds_late = False  # adapters come after tensor parallelism has divided their layers

    def build(self) -> None:
        super().build()
        self.register_buffer("steps", torch.zeros(()))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        self.steps += 1
        for name in random.Random(batch_idx).choices(["a", "b", "mine", None], k=5):
            with using(self, name), torch.no_grad():
                self.net(batch[0])
                assert self.steps == (self.global_step + 1 if name == "mine" else 0), name
        return super().training_step(batch, batch_idx)

    def configure_model(self) -> None:
        if not isinstance(self.trainer.strategy, ModelParallelStrategy):
            return
        mesh = self.device_mesh
        if mesh["tensor_parallel"].size() > 1:
            parallelize_module(self.net, mesh["tensor_parallel"], {"0": ColwiseParallel(), "2": RowwiseParallel()})
            if self.adds_late:
                add_others(self)
            attach(self)
            return
        attach(self)
        for layer in self.net:
            if isinstance(layer, nn.Linear):
                fully_shard(layer, mesh=mesh["data_parallel"])
        fully_shard(self.net, mesh=mesh["data_parallel"])


def strategy(name: str) -> Strategy | str:
    if name == "single":
        return "auto"
    if name == "ddp":
        return DDPStrategy(process_group_backend="gloo")
    if name == "fsdp":
        return CPUFSDPStrategy(auto_wrap_policy={nn.Linear})
    if name in STAGES:
        from tests.distributed.cpu_deepspeed import CPUDeepSpeedStrategy

        return CPUDeepSpeedStrategy(stage=int(name[-1]))
    sizes = {"data_parallel_size": 2, "tensor_parallel_size": 1}
    if name == "tensor":
        sizes = {"data_parallel_size": 1, "tensor_parallel_size": 2}
    return ModelParallelStrategy(process_group_backend="gloo", **sizes)


def several() -> Named:
    """Return a module with adapters that have learned something."""
    module = Named()
    add_others(module)
    return module


def add_others(module: Named) -> None:
    generator = torch.Generator().manual_seed(0)
    for other, options in (SWITCHED | {"headed": HEADED}).items():
        add_adapter(module, other, LoRAConfig(**options))
        with using(module, other):
            shapes = {key: value.shape for key, value in adapter_state_dict(module).items()}
            values = {key: torch.randn(shape, generator=generator) for key, shape in shapes.items()}
            load_adapter_state_dict(module, values)


def fit(name: str, module: Named, callback: LoRACallback, steps: int, path: Path, resumed: Path | None = None) -> None:
    copies = 1 if name in ("single", "tensor") else 2  # of the model, each with its part of the data
    run = trainer(
        callback,
        strategy=strategy(name),
        devices=1 if name == "single" else 2,
        max_steps=steps,
        use_distributed_sampler=False,  # which shuffles
    )
    data = loader().dataset
    sampler = DistributedSampler(data, copies, run.global_rank % copies, shuffle=False)
    run.fit(module, DataLoader(data, 8 // copies, sampler=sampler), ckpt_path=resumed)
    run.save_checkpoint(path)


def train_and_resume(name: str, folder: Path) -> None:
    module = several()
    before = {other: state(module, other) for other in SWITCHED}
    if name == "tensor":
        module = Named()
        module.adds_late = True
    saved = folder / f"{name}.ckpt"
    fit(name, module, LoRACallback(adapter="mine", save_adapters="all", **OPTIONS), 3, saved)
    if name not in ("fsdp", "zero3"):  # which leave slices: what is in the file is compared
        for other, was in before.items():
            set_adapter(module, other)
            now = adapter_state_dict(module)
            assert now.keys() == was.keys()
            assert all(torch.equal(value, now[key]) for key, value in was.items()), f"{other} has changed"
    fit(name, Named(), LoRACallback(save_adapters="all"), 5, folder / f"{name} resumed.ckpt", saved)


def state(module: nn.Module, name: str) -> dict[str, Tensor]:
    with using(module, name):
        return adapter_state_dict(module)


class Differs(Toy):
    """Switches in one process alone, at the start of the fit or after it."""

    switches_at = "never"

    def on_train_start(self) -> None:
        if self.switches_at == "start":
            set_adapter(self, "ab"[self.global_rank])


def raised(module: Differs, run: Any, path: Path) -> str:
    """Return the error of a fit and a save in which the processes have different adapters."""
    try:
        run.fit(module, loader())
        set_adapter(module, "ab"[run.global_rank])
        run.save_checkpoint(path)
    except RuntimeError as error:
        return str(error)
    return ""


def differ(folder: Path) -> None:
    found = {}
    for when in ("before", "start", "never"):
        module = Differs()
        module.switches_at = when
        for name in "ab":
            add_adapter(module, name, LoRAConfig(rank=2))
        run = trainer(LoRACallback(rank=2), strategy=strategy("ddp"), devices=2, max_steps=1)
        if when == "before":
            set_adapter(module, "ab"[run.global_rank])
        found[when] = raised(module, run, folder / "never.ckpt")
    torch.save(found, folder / f"differ{dist.get_rank()}.pt")


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    place = Path(sys.argv[1])
    for each in sys.argv[2:]:
        differ(place) if each == "differ" else train_and_resume(each, place)
