"""Find a better learning rate and rank than those of ``digits.py``: eight adapters in one fit, on one frozen base.

    python examples/digits_sweep.py

The base learns handwritten digits; then eight adapters learn inverted and rotated ones at once, from the same 200
images, each with its own learning rate and rank. After each validation those that lose are stopped. The best adapter is
compared with one of the settings of ``digits.py``, trained by itself, on 397 test images that no choice has seen.

It prints the table of the sweep, and writes ``sweep.html`` with its pictures to ``examples/output/sweep``.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import os
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from digits import BASE_RATE, LORA, LORA_RATE, OUTPUT, DigitClassifier, Digits, accuracy, quiet_lightning, train
from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor

from lightning_lora import LoRACallback, LoRASweep
from lightning_lora.cli import main as command

BASE_STEPS, STEPS, VALIDATIONS = 300, 300, 6
GRID = {"lr": [1e-3, 3e-3, 1e-2, 3e-2], "rank": [4, 16]}


class Sweepable(DigitClassifier):
    """The classifier, which also logs its loss on the validation images: a finer measure than counts of errors."""

    def validation_step(self, batch: tuple[Tensor, Tensor]) -> None:
        images, labels = batch
        self.log("val_loss", F.cross_entropy(self(images), labels))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=OUTPUT / "sweep", help="folder for the checkpoint and the page")
    parser.add_argument("--fast", action="store_true", help="train for fewer steps, with worse results")
    options = parser.parse_args()
    base_steps, steps = (30, 24) if options.fast else (BASE_STEPS, STEPS)
    quiet_lightning()
    seed_everything(0, verbose=False)
    started, data = time.perf_counter(), Digits("shifted", steps=steps)
    model = Sweepable()
    train(model, Digits("clean", steps=base_steps), BASE_RATE, options.output / "base")
    demo = copy.deepcopy(model)
    train(demo, data, LORA_RATE, options.output / "demo", LoRACallback(**LORA))

    sweep = LoRASweep(grid=GRID, monitor="val_loss", keep=0.6)
    best = ModelCheckpoint(options.output, filename="sweep", monitor="val_loss", enable_version_counter=False)
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=1,
        val_check_interval=max(1, steps // VALIDATIONS),
        logger=False,
        enable_model_summary=False,
        callbacks=[sweep, best],
    )
    trainer.fit(model, data)
    print(f"\n{sweep.table()}\n")
    for name, each in {sweep.best: model, f"digits.py (lr={LORA_RATE:g}, rank={LORA['rank']})": demo}.items():
        print(f"{name}: {100 * accuracy(each, data):.1f} % of the test images")
    page, pictures = options.output / "sweep.html", options.output / "pictures"
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        command(["report", best.best_model_path, "--out", f"{page}", "--pictures", f"{pictures}", "--overwrite"])
    print(f"{time.perf_counter() - started:.0f} seconds. Page: {page}")


if __name__ == "__main__":
    torch.set_num_threads(min(2, torch.get_num_threads()))
    main()
