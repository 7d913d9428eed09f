"""Small LightningModules and Trainer runs that many tests share."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, Checkpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

FEATURES = 8


def network(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    """Return three linear layers with fixed weights, independent of the global seed."""
    with torch.random.fork_rng():
        torch.manual_seed(7)
        layers = [nn.Linear(FEATURES, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, FEATURES)]
        return nn.Sequential(*layers).to(dtype)


def loader(
    rows: int = 32, batch_size: int = 8, dtype: torch.dtype = torch.float32, shuffle: bool = False
) -> DataLoader:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(rows, FEATURES, generator=generator).to(dtype)
    return DataLoader(TensorDataset(x, x.flip(1)), batch_size=batch_size, shuffle=shuffle)


class Toy(LightningModule):
    """Learns to reverse a vector; records its losses."""

    def __init__(self) -> None:
        super().__init__()
        self.losses: list[float] = []
        self.build()

    def build(self) -> None:
        self.net = network()

    def loss(self, batch: list[Tensor]) -> Tensor:
        x, y = batch
        return ((self.net(x) - y) ** 2).mean()

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        loss = self.loss(batch)
        self.losses.append(loss.item())
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log("val_loss", self.loss(batch), sync_dist=True)

    def test_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log("test_loss", self.loss(batch), sync_dist=True)

    def predict_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return self.net(batch[0])

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=1e-2, weight_decay=0.1)


class BuiltInSetup(Toy):
    """Builds its layers in ``setup``."""

    def build(self) -> None: ...

    def setup(self, stage: str) -> None:
        if not hasattr(self, "net"):
            self.net = network()


class BuiltInConfigureModel(Toy):
    """Builds its layers in ``configure_model``."""

    def build(self) -> None: ...

    def configure_model(self) -> None:
        if not hasattr(self, "net"):
            self.net = network()


class SelfAttention(nn.Module):
    """Torch's attention with one input."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.MultiheadAttention(12, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x, x, x)[0]


def trainer(*callbacks: Callback, root: Path | str | None = None, **options: Any) -> Trainer:
    """Return a quiet CPU Trainer that saves checkpoints only with a checkpoint callback."""
    makes_checkpoints = any(isinstance(callback, Checkpoint) for callback in callbacks)
    defaults: dict[str, Any] = {
        "accelerator": "cpu",
        "devices": 1,
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": makes_checkpoints,
        "default_root_dir": root,
        "max_steps": 2,
        "limit_val_batches": 0,
    }
    return Trainer(callbacks=list(callbacks), **(defaults | options))


def digest(module: nn.Module) -> dict[str, str]:
    """Return a hash of the bits of every parameter and buffer."""
    tensors = [*module.named_parameters(), *module.named_buffers()]
    return {
        name: hashlib.sha256(t.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy()).hexdigest()
        for name, t in tensors
    }


def snapshot(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in module.state_dict().items()}


class Spectral(nn.Module):
    """Complex weights and statistics, as in Fourier neural operators, beside a layer to adapt."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(4)
            self.lin = nn.Linear(4, 4)
            self.spec = nn.Module()
            self.spec.weight = nn.Parameter(torch.randn(2, 2, 3, dtype=torch.complex64))
            self.spec.register_buffer("mean", torch.randn(3, dtype=torch.complex64))
