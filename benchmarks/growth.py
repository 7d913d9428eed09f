"""Time of saving an adapter as the base grows: the same adapter with 4 and 16 times the weights.

    python benchmarks/growth.py

CPU time of ``trainer.save_checkpoint`` with AdamW's states, relative to the smallest base; the disk, which gets the
same file, is excluded. The base grows by wider layers without adapters, also under FSDP2 in two processes, or by more
layers.
"""

from __future__ import annotations

import argparse
import os
import socket
import tempfile
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import measuring
import step
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, multiprocessing
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader

from lightning_lora import LoRACallback, attach

FACTORS = (1, 4, 16)
REACH = 1.1


class Module(LightningModule):
    def __init__(self, layers: int, width: int, hidden: int) -> None:
        super().__init__()
        self.model = step.decoder(layers, width, hidden)

    def configure_model(self) -> None:
        if self.device_mesh is not None:
            attach(self)
            for block in self.model:
                fully_shard(block, mesh=self.device_mesh["data_parallel"])
            fully_shard(self.model, mesh=self.device_mesh["data_parallel"])

    def training_step(self, batch: Tensor, *_: Any) -> Tensor:
        return self.model(batch).square().mean()

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


def wider(factor: int, args: argparse.Namespace) -> Module:
    """Return a base with this many times the weights; all additional ones are in layers without adapters."""
    attention = 4 * args.width**2
    block = factor * (attention + 3 * args.width * args.hidden)
    return Module(args.layers, args.width, (block - attention) // (3 * args.width))


def deeper(factor: int, args: argparse.Namespace) -> Module:
    return Module(args.layers * factor, args.width, args.hidden)


def fitted(
    module: Module, args: argparse.Namespace, *, devices: int = 1, strategy: Callable[[], Any] = lambda: "auto"
) -> Trainer:
    targets = [f"model.{layer}.[qkvo]" for layer in range(args.layers)]
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    callback = LoRACallback(rank=step.RANK, alpha=step.ALPHA, target_modules=targets)
    trainer = Trainer(
        accelerator="cpu", strategy=strategy(), devices=devices, max_steps=1, callbacks=[callback], **quiet
    )
    trainer.fit(module, DataLoader(torch.randn(2, 8, args.width)))
    return trainer


def times_of_saving(
    grown: Callable[[int, argparse.Namespace], Module], args: argparse.Namespace, folder: str, **options: Any
) -> measuring.Times:
    trainers = {factor: fitted(grown(factor, args), args, **options) for factor in FACTORS}
    jobs = {
        str(factor): (lambda trainer=trainer, factor=factor: trainer.save_checkpoint(f"{folder}/{factor}.ckpt"))
        for factor, trainer in trainers.items()
    }
    return measuring.in_turn(jobs, args.rounds)


def rows(times: measuring.Times, how: str) -> list[measuring.Row]:
    smallest = str(FACTORS[0])
    return [
        measuring.ratio(times, str(factor), smallest, REACH, f"save beside {factor} times the base, {how}")
        for factor in FACTORS[1:]
    ]


def _worker(rank: int, world: int, port: int, folder: str, args: argparse.Namespace, results: Any) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world), "MASTER_PORT": str(port)}
    os.environ |= {"GROUP_RANK": "0", "LOCAL_WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1"}
    os.environ["TORCHELASTIC_RUN_ID"] = "growth"
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    sizes = {"data_parallel_size": world, "tensor_parallel_size": 1}
    options = {"devices": world, "strategy": lambda: ModelParallelStrategy(process_group_backend="gloo", **sizes)}
    times = times_of_saving(wider, args, folder, **options)
    if rank == 0:
        results.append(times)


def sharded(args: argparse.Namespace, folder: str, world: int = 2) -> measuring.Times:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with multiprocessing.Manager() as manager:
        results = manager.list()
        multiprocessing.spawn(_worker, (world, port, folder, args, results), nprocs=world)
        return dict(results[0])


def main(argv: Sequence[str] | None = None) -> list[measuring.Row]:
    args = measuring.parser(__doc__, rounds=15, layers=4, width=128, hidden=128).parse_args(argv)
    if args.smoke:
        vars(args).update(rounds=2, layers=1, width=32, hidden=32)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = rows(times_of_saving(wider, args, folder), "in wider layers")
        if not args.smoke:
            found += rows(sharded(args, folder), "in wider layers, FSDP2")
        found += rows(times_of_saving(deeper, args, folder), "in more layers")
    return measuring.report(found, args)


if __name__ == "__main__":
    main()
