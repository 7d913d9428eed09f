"""Saving and loading: sizes, and times compared with a full checkpoint and with PEFT.

    python benchmarks/checkpoint.py

The run is a Lightning fit of one step with AdamW. The full checkpoint is what the Trainer saves for the same run
without the callback: every weight and the same optimizer states, by Lightning's own writer. Our save waits for the
disk (``fsync``) and Lightning's does not, so two more rows measure the full one with waiting, and with ``torch.save``
alone. Files are written to a temporary folder.
"""

from __future__ import annotations

import argparse
import copy
import os
import tempfile
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import measuring
import step
import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_lora import LoRACallback, adapter_state_dict, load_adapter, save_adapter


class Module(LightningModule):
    def __init__(self, args: argparse.Namespace) -> None:
        super().__init__()
        self.model = step.decoder(args.layers, args.width, args.hidden)

    def training_step(self, batch: Tensor, *_: Any) -> Tensor:
        return self.model(batch).square().mean()

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


def fitted(args: argparse.Namespace) -> Trainer:
    data = DataLoader(torch.randn(1, 8, args.width))
    options = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = Trainer(
        accelerator="cpu",
        max_steps=1,
        enable_model_summary=False,
        callbacks=[LoRACallback(rank=step.RANK, alpha=step.ALPHA, target_modules=sorted(step.TARGETS))],
        **options,
    )
    trainer.fit(Module(args), data)
    return trainer


def main(argv: Sequence[str] | None = None) -> list[measuring.Row]:
    args = measuring.parser(__doc__, rounds=7, layers=12, width=768, hidden=2304).parse_args(argv)
    if args.smoke:
        vars(args).update(rounds=2, layers=1, width=32, hidden=64)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return measuring.report(rows(args, Path(folder)), args)


def on_disk(write: Callable[[Path], object], path: Path) -> None:
    """Write a file and flush it to disk."""
    write(path)
    with path.open("rb") as file:
        os.fsync(file.fileno())


def rows(args: argparse.Namespace, folder: Path) -> list[measuring.Row]:
    trainer = fitted(args)
    module: Any = trainer.lightning_module
    mine, theirs = folder / "ours", folder / "PEFT"
    trainer.save_checkpoint(folder / "warm.ckpt")
    trainer.save_checkpoint(folder / "weights.ckpt", weights_only=True)
    full = torch.load(folder / "warm.ckpt", weights_only=True) | {"state_dict": module.state_dict()}
    write = trainer.strategy.checkpoint_io.save_checkpoint
    saving = {
        "adapter": lambda: save_adapter(module, mine, overwrite=True),
        "adapter and optimizer": lambda: trainer.save_checkpoint(folder / "adapter.ckpt"),
        "full checkpoint": lambda: write(full, folder / "full.ckpt"),
        "full, on the disk": lambda: on_disk(lambda path: write(full, path), folder / "flushed.ckpt"),
        "full, by torch": lambda: torch.save(full, folder / "torch.ckpt"),
    }
    loading = {
        "ours": lambda: load_adapter(module, mine),
        "ours, .ckpt": lambda: load_adapter(module, folder / "adapter.ckpt"),
        "ours, weights": lambda: load_adapter(module, folder / "weights.ckpt"),
    }
    if step.HAS_PEFT:
        other = step.theirs(copy.deepcopy(step.decoder(args.layers, args.width, args.hidden)), 0.0)
        saving["PEFT"] = lambda: other.save_pretrained(theirs)
        loading["PEFT"] = lambda: other.load_adapter(theirs, "default")
    saved = measuring.in_turn(saving, args.rounds, clock=measuring.wall_seconds)
    loaded = measuring.in_turn(loading, args.rounds)
    raw = sum(tensor.nbytes for tensor in adapter_state_dict(module).values())
    file = (mine / "adapter_model.safetensors").stat().st_size
    sizes = [(folder / name).stat().st_size for name in ("adapter.ckpt", "full.ckpt")]
    found = [
        measuring.Row("adapter file / raw bytes", file / raw, reach=None if args.smoke else 1.01),
        measuring.ratio(
            saved, "adapter and optimizer", "full checkpoint", 0.05, "save with optimizer / full, wall time"
        ),
        measuring.ratio(saved, "adapter and optimizer", "full, on the disk", None, "the same, both on the disk"),
        measuring.ratio(saved, "adapter and optimizer", "full, by torch", None, "the same, full by torch.save alone"),
        measuring.Row("save with optimizer / full, bytes", sizes[0] / sizes[1]),
    ]
    if step.HAS_PEFT:
        found.append(measuring.ratio(saved, "adapter", "PEFT", None, "save / PEFT, wall time"))
        found.append(measuring.ratio(loaded, "ours", "PEFT", 0.45, "load / PEFT, CPU time"))
        found.append(measuring.ratio(loaded, "ours, .ckpt", "PEFT", None, "load a .ckpt / PEFT, CPU time"))
        found.append(measuring.ratio(loaded, "ours, weights", "PEFT", None, "the same, without the optimizer's states"))
    return found


if __name__ == "__main__":
    main()
