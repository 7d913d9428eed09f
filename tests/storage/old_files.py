"""Writes the files in ``tests/storage/old_files``, which later versions must read: run it with the version to keep.

python -m tests.storage.old_files
"""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_lora import LoRACallback, adapter_state_dict, save_adapter

FOLDER = Path(__file__).with_suffix("")
OPTIONS = {
    "rank": 2,
    "alpha": 6.0,
    "target_modules": ["fc", "qkv", "conv"],
    "target_slices": {"qkv": {"q": "0:8", "v": "16:24"}},
    "target_parameters": ["experts.weight"],
    "trainable_token_indices": {"embed": [1, 3]},
    "modules_to_save": ["head"],
    "rank_pattern": {"conv": 3},
    "alpha_pattern": {"experts.weight": 4.0},
    "use_rslora": True,
    "bias": "lora_only",
}


class Experts(nn.Module):
    """A stack of two matrices."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(2, 6, 8))

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("bi,eoi->bo", x, self.weight)


class Net(nn.Module):
    """One layer of each kind, with weights that are the same everywhere."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(6, 8)
        self.qkv, self.fc = nn.Linear(8, 24), nn.Linear(24, 8)
        self.conv = nn.Conv1d(8, 4, 3, padding=1)
        self.experts = Experts()
        self.head = nn.Linear(6, 3)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(torch.linspace(-0.5, 0.5, parameter.numel()).view(parameter.shape))

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.fc(torch.tanh(self.qkv(self.embed(tokens))))
        x = x.mean(1) + self.conv(x.transpose(1, 2)).mean((1, 2)).unsqueeze(1)
        return self.head(self.experts(x))


class Module(LightningModule):
    """Trains the net on numbers that mean nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.net = Net()

    def forward(self, tokens: Tensor) -> Tensor:
        return self.net(tokens)

    def training_step(self, batch: list[Tensor], _: int) -> Tensor:
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), 0.05)


def tokens() -> Tensor:
    return torch.arange(30).view(6, 5) % 6


def write() -> None:
    """Train, and write a checkpoint, a PEFT directory, and the values that must come out of them."""
    shutil.rmtree(FOLDER, ignore_errors=True)
    FOLDER.mkdir()
    torch.manual_seed(0)
    module, callback = Module(), LoRACallback(**OPTIONS)
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = Trainer(max_steps=4, callbacks=[callback], accelerator="cpu", devices=1, **quiet)
    trainer.fit(module, DataLoader(TensorDataset(tokens(), torch.arange(6) % 3), 3))
    trainer.save_checkpoint(FOLDER / "adapter.ckpt")
    torch.save(adapter_state_dict(module), FOLDER / "values.pt")
    save_adapter(module, FOLDER / "peft")


if __name__ == "__main__":
    write()
