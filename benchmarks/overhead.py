"""Overhead of the package: importing it, ``lightning-lora --help``, and the callback's hooks in every training step.

    python benchmarks/overhead.py

Importing and the help are timed in fresh processes, after lightning or torch. The callback's share is the step time
of a fit with it, minus that of a fit of the same adapted module without it.
"""

from __future__ import annotations

import logging
import subprocess
import sys
import time
import warnings
from collections.abc import Sequence
from typing import Any

import measuring
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_lora import LoRACallback, LoRAConfig, attach

STEP = 10e-3  # seconds per step, of which the callback's share should be small
IMPORT = """
import time, lightning.pytorch
started = time.process_time()
import lightning_lora
package = time.process_time() - started
lightning_lora.LoRACallback
print(package, time.process_time() - started)
"""
HELP = """
import time, torch
started = time.process_time()
from lightning_lora.cli import main
main(["--help"])
print(time.process_time() - started)
"""


class Module(LightningModule):
    def __init__(self, layers: int) -> None:
        super().__init__()
        self.net = nn.Sequential(*(nn.Linear(4, 4) for _ in range(layers)))

    def training_step(self, batch: Tensor, *_: Any) -> Tensor:
        return self.net(batch).sum()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=0.0)


class Clock(Callback):
    """Records when each batch ends."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_train_batch_end(self, *_: Any) -> None:
        self.ends.append(time.process_time())


def step_times(layers: int, steps: int, *, with_callback: bool) -> list[float]:
    """Return the CPU time of each step of a fit, without the first ones."""
    module, clock = Module(layers), Clock()
    callback = LoRACallback(rank=2, target_modules="all-linear")
    if not with_callback:
        attach(module, LoRAConfig(rank=2))
    options = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = Trainer(
        accelerator="cpu",
        max_steps=steps,
        enable_model_summary=False,
        callbacks=[*([callback] if with_callback else []), clock],
        **options,
    )
    trainer.fit(module, DataLoader(torch.randn(steps, 4)))
    return [after - before for before, after in zip(clock.ends[5:], clock.ends[6:])]  # noqa: B905 - one shorter


def import_times() -> tuple[float, float]:
    """Return the milliseconds of importing the package, and of importing it with the callback."""
    package, callback = _printed(IMPORT)[-2:]
    return 1e3 * float(package), 1e3 * float(callback)


def help_time() -> float:
    """Return the milliseconds of ``lightning-lora --help``, without those of importing torch."""
    return 1e3 * float(_printed(HELP)[-1])


def _printed(script: str) -> list[str]:
    return subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout.split()


def main(argv: Sequence[str] | None = None) -> list[measuring.Row]:
    args = measuring.parser(__doc__, rounds=11, layers=24, steps=200).parse_args(argv)
    if args.smoke:
        vars(args).update(rounds=0, layers=2, steps=20)
    torch.set_num_threads(1)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    shares = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for _ in range(max(1, args.rounds)):
            with_it, without = (
                sorted(step_times(args.layers, args.steps, with_callback=each)) for each in (True, False)
            )
            shares.append((with_it[len(with_it) // 2] - without[len(without) // 2]) / STEP)
    rows = [measuring.spread("callback's share of a step of 10 ms", shares, 0.01)]
    if args.rounds:
        package, callback = zip(*(import_times() for _ in range(args.rounds)), strict=True)
        rows.append(measuring.spread("import after lightning, ms of CPU time", package, 50.0))
        rows.append(measuring.spread("the same with LoRACallback, ms of CPU time", callback))
        helps = [help_time() for _ in range(args.rounds)]
        rows.append(measuring.spread("lightning-lora --help after torch, ms of CPU time", helps, 300.0))
    return measuring.report(rows, args)


if __name__ == "__main__":
    main()
