"""LoRA on handwritten digits: adapt one small vision transformer to two new tasks, with 200 images each.

    python examples/digits.py

1. A base model learns scikit-learn's 8x8 digits.
2. The input changes: the digits are now inverted and rotated by 90 degrees. The frozen base fails.
3. LoRA adapts it with one callback, compared with training all weights.
4. A second adapter on the same base answers another question, "odd or even?". Both stay in memory: switching takes no
   time, and one batch can ask both questions.
5. Detaching restores the exact base; merging gives an ordinary model for the new domain.

It prints a table and writes ``digits.json`` and the picture ``digits.png`` to ``examples/output``. All accuracies are
measured on 397 test images that were never used for training; the learning rates were chosen on other images.
"""

from __future__ import annotations

import argparse
import copy
import json
import logging
import statistics
import time
import warnings
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from digits_report import draw, print_report
from lightning.fabric.utilities.warnings import disable_possible_user_warnings
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.utils.data import DataLoader, RandomSampler, TensorDataset

from lightning_lora import (
    LoRACallback,
    adapter_names,
    detach,
    disabled,
    load_adapter,
    lora_layers,
    merge,
    routed,
    set_adapter,
)

OUTPUT = Path(__file__).parent / "output"
LORA = {"rank": 4, "alpha": 8.0}  # on every linear layer; all other options keep their defaults
BASE_STEPS, STEPS = 600, 300
# LoRA needs a higher rate than full training. Each is the best of 1e-3, 3e-3 and 1e-2 on the validation images.
LORA_RATE, FULL_RATE, BASE_RATE = 1e-2, 3e-3, 2e-3

Task = Literal["clean", "shifted", "parity"]


# --- data


class Digits(LightningDataModule):
    """Scikit-learn's 1797 handwritten digits of 8x8 pixels: 1000 for the base, 400 for adaptation, 397 for testing.

    Args:
        task: ``"clean"``: which digit? ``"shifted"``: which digit, inverted and rotated? ``"parity"``: odd or even?
        shots: Labeled images per digit to adapt with; the remaining adaptation images are for validation. The clean
            task uses all thousand images of the base instead.
        steps: Training steps; training is one epoch of this many random batches.
        batch_size: Images per batch.
    """

    def __init__(self, task: Task = "shifted", shots: int = 20, steps: int = STEPS, batch_size: int = 32) -> None:
        super().__init__()
        self.steps, self.batch_size = steps, batch_size
        digits = load_digits()
        images = torch.tensor(digits.images / 16, dtype=torch.float32)  # (images, 8, 8); 1 is ink
        labels = torch.tensor(digits.target)
        base, rest = split(torch.arange(len(labels)), labels, 1000)
        pool, test = split(rest, labels, 400)
        if task == "shifted":
            images = torch.rot90(1 - images, dims=(1, 2))
        few = torch.cat([pool[labels[pool] == digit][:shots] for digit in range(10)])
        others = pool[~torch.isin(pool, few)]
        if task == "parity":
            labels = labels % 2  # classes 0 and 1 of the same ten-way head
        parts = (base if task == "clean" else few, others, test)
        self.train, self.validation, self.test = (TensorDataset(images[part], labels[part]) for part in parts)

    def train_dataloader(self) -> DataLoader:
        generator = torch.Generator().manual_seed(0)
        draws = RandomSampler(
            self.train, replacement=True, num_samples=self.steps * self.batch_size, generator=generator
        )
        return DataLoader(self.train, self.batch_size, sampler=draws)

    def val_dataloader(self) -> DataLoader:
        return DataLoader(self.validation, batch_size=200)

    def test_dataloader(self) -> DataLoader:
        return DataLoader(self.test, batch_size=200)


def split(indices: Tensor, labels: Tensor, size: int) -> tuple[Tensor, Tensor]:
    first, second = train_test_split(indices.numpy(), train_size=size, stratify=labels[indices], random_state=0)
    return torch.from_numpy(first), torch.from_numpy(second)


# --- model


class Block(nn.Module):
    """A transformer block of plain linear layers, so LoRA can target each by its own name."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.q, self.k, self.v, self.proj = (nn.Linear(width, width) for _ in range(4))
        self.fc1, self.fc2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:  # (batch, tokens, width) throughout
        y = self.norm1(x)
        # four heads: (batch, 4, tokens, width / 4)
        q, k, v = (layer(y).unflatten(-1, (4, -1)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        x = x + self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + self.fc2(F.gelu(self.fc1(self.norm2(x))))


class DigitClassifier(LightningModule):
    """A vision transformer for 8x8 images: 16 overlapping patches of 4x4 pixels, two blocks, no LoRA code."""

    def __init__(self, learning_rate: float = LORA_RATE, width: int = 64, depth: int = 2) -> None:
        super().__init__()
        self.learning_rate = learning_rate
        self.embed = nn.Linear(4 * 4, width)
        self.position = nn.Parameter(0.02 * torch.randn(16, width))
        self.blocks = nn.Sequential(*(Block(width) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 10)

    def forward(self, images: Tensor) -> Tensor:  # (batch, 8, 8) -> (batch, 10)
        patches = F.unfold(images.unsqueeze(1), kernel_size=4, stride=2, padding=1)  # (batch, 4 * 4, 16)
        tokens = self.embed(patches.transpose(1, 2)) + self.position
        return self.head(self.norm(self.blocks(tokens)).mean(dim=1))

    def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        images, labels = batch
        loss = F.cross_entropy(self(images), labels)
        self.log("loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor]) -> None:
        self._log_accuracy("val_acc", batch)

    def test_step(self, batch: tuple[Tensor, Tensor]) -> None:
        self._log_accuracy("test_acc", batch)

    def _log_accuracy(self, name: str, batch: tuple[Tensor, Tensor]) -> None:
        images, labels = batch
        self.log(name, (self(images).argmax(dim=1) == labels).float().mean(), prog_bar=True)

    def configure_optimizers(self) -> dict[str, Any]:
        # All parameters, as without LoRA: the callback keeps those that train.
        optimizer = torch.optim.AdamW(self.parameters(), lr=self.learning_rate)
        steps = int(self.trainer.estimated_stepping_batches)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, self.learning_rate, total_steps=steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


# --- training and measuring


class StepTimer(Callback):
    """Measures each training step: forward, backward and optimizer, without loading data."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_train_batch_start(self, *_: Any) -> None:
        self.started = time.perf_counter()

    def on_train_batch_end(self, *_: Any) -> None:
        self.seconds.append(time.perf_counter() - self.started)


def train(model: DigitClassifier, data: Digits, rate: float, directory: Path, *callbacks: Callback) -> dict[str, Any]:
    """Train, save a checkpoint, and return the cost."""
    print(f"\n{directory.name}: {len(data.train)} labeled images, {data.steps} steps", flush=True)
    model.learning_rate = rate
    timer = StepTimer()
    checkpoint = ModelCheckpoint(directory, save_last=True, save_top_k=0, enable_version_counter=False)
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=1,
        logger=False,
        enable_model_summary=False,
        callbacks=[timer, checkpoint, *callbacks],
    )
    trainer.fit(model, data)
    return {
        "trainable": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "bytes": Path(checkpoint.last_model_path).stat().st_size,
        "step_ms": 1000 * statistics.median(timer.seconds),
    }


@torch.no_grad()
def logits(model: nn.Module, data: Digits) -> Tensor:
    return model(data.test.tensors[0])  # the model computes the same in train and eval mode


def accuracy(model: nn.Module, data: Digits) -> float:
    return (logits(model, data).argmax(dim=1) == data.test.tensors[1]).float().mean().item()


# --- the job


def run(output: Path, base_steps: int, steps: int) -> dict[str, Any]:
    tasks = {"clean": Digits("clean", steps=base_steps)}
    tasks |= {task: Digits(task, steps=steps) for task in ("shifted", "parity")}
    model = DigitClassifier()
    cost = train(model, tasks["clean"], BASE_RATE, output / "base")
    base = row("frozen base", model, tasks, {**cost, "trainable": 0, "step_ms": None})
    base_logits = {task: logits(model, data) for task, data in tasks.items()}
    table = [base, *compare(model, tasks, output)]
    updates = {
        name: (part.delta_weight().norm() / part.weight.norm()).item() for name, part in lora_layers(model).items()
    }
    swaps = swap(model, tasks, output)
    detach(model)
    detach_is_exact = all(torch.equal(logits(model, data), base_logits[task]) for task, data in tasks.items())
    results = {"table": table, "updates": updates, **swaps, "detach_is_exact": detach_is_exact}
    results["answers"]["base"] = base_logits["shifted"].argmax(dim=1).tolist()
    return {**results, "merged": load_and_merge(model, tasks["shifted"], output / "lora_shifted" / "last.ckpt")}


def compare(model: DigitClassifier, tasks: dict[str, Digits], output: Path) -> list[dict[str, Any]]:
    """Adapt the base to the new domain: all weights, then LoRA, which is one additional callback."""
    full = copy.deepcopy(model)
    full_cost = train(full, tasks["shifted"], FULL_RATE, output / "full")
    cost = train(model, tasks["shifted"], LORA_RATE, output / "lora_shifted", LoRACallback(adapter="shifted", **LORA))
    table = [row("full fine-tuning", full, tasks, full_cost), row("LoRA, switched on", model, tasks, cost)]
    with disabled(model):  # the base is unchanged
        return [*table, row("LoRA, switched off", model, tasks, cost)]


def row(method: str, model: nn.Module, tasks: dict[str, Digits], cost: dict[str, Any]) -> dict[str, Any]:
    return {"method": method, "old": accuracy(model, tasks["clean"]), "new": accuracy(model, tasks["shifted"]), **cost}


def swap(model: DigitClassifier, tasks: dict[str, Digits], output: Path) -> dict[str, Any]:
    """Learn a second task beside the first on the same base, switch between the two, and ask both at once."""
    trained = {"shifted": logits(model, tasks["shifted"])}
    train(model, tasks["parity"], LORA_RATE, output / "lora_parity", LoRACallback(adapter="parity", **LORA))
    trained["parity"] = logits(model, tasks["parity"])
    swaps, exact = {}, []
    for name in adapter_names(model):
        set_adapter(model, name)  # no file, no training, no copy: only pointers change
        swaps[name] = {task: accuracy(model, tasks[task]) for task in trained}
        exact.append(torch.equal(logits(model, tasks[name]), trained[name]))
    answers = {name: trained[name].argmax(dim=1).tolist() for name in trained}
    return {"swaps": swaps, "swap_is_exact": all(exact), "answers": answers, "routed": route(model, tasks, trained)}


@torch.no_grad()
def route(model: DigitClassifier, tasks: dict[str, Digits], trained: dict[str, Tensor]) -> dict[str, Any]:
    """Ask about all test images of both tasks in one batch, each image with the adapter of its task."""
    counts = {name: len(tasks[name].test) for name in trained}
    with routed(model, [name for name, count in counts.items() for _ in range(count)]):
        together = model(torch.cat([tasks[name].test.tensors[0] for name in trained]))
    labels = torch.cat([tasks[name].test.tensors[1] for name in trained])
    return {
        "images": len(labels),
        "accuracy": (together.argmax(dim=1) == labels).float().mean().item(),
        "largest_difference": (together - torch.cat([*trained.values()])).abs().max().item(),
    }


def load_and_merge(model: DigitClassifier, data: Digits, path: Path) -> dict[str, Any]:
    """Load an adapter from its file and merge it into the weights."""
    load_adapter(model, path)  # attaches as well: the file holds rank, targets and all other options
    before = logits(model, data)
    merge(model)
    return {
        "accuracy": accuracy(model, data),
        "lora_layers": len(lora_layers(model)),
        "largest_difference": (logits(model, data) - before).abs().max().item(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=OUTPUT, help="folder for checkpoints, numbers and the picture")
    parser.add_argument("--fast", action="store_true", help="train for fewer steps, with worse results")
    options = parser.parse_args()
    quiet_lightning()
    seed_everything(0, verbose=False)
    started = time.perf_counter()
    results = run(options.output, *((200, 150) if options.fast else (BASE_STEPS, STEPS)))
    results["seconds"] = time.perf_counter() - started
    print_report(results)
    (options.output / "digits.json").write_text(json.dumps(results, indent=2))
    draw(results, Digits("clean").test, Digits("shifted").test, options.output / "digits.png")
    print(f"\n{results['seconds']:.0f} seconds. Picture: {options.output / 'digits.png'}")


def quiet_lightning() -> None:
    """Silence hints that do not matter for data in memory on a CPU; keep real warnings and LoRA's report."""
    notes = logging.getLogger("lightning.pytorch.utilities.rank_zero")  # devices, tips for other products
    notes.addFilter(lambda record: record.levelno > logging.INFO or record.getMessage().startswith("LoRA"))
    disable_possible_user_warnings()  # "does not have many workers"
    warnings.filterwarnings("ignore", ".*LeafSpec.*is deprecated", FutureWarning)  # Lightning's use of a new torch


if __name__ == "__main__":
    main()
