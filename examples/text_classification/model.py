"""A transformers classifier as a LightningModule. It does not know about LoRA."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import LightningModule
from pretrained import MINILM, find
from torch import Tensor
from torchmetrics.classification import MulticlassAccuracy
from transformers import AutoModelForSequenceClassification


class TextClassifier(LightningModule):
    """Any model that ``AutoModelForSequenceClassification`` loads, with a new head.

    Args:
        labels: Names of the classes; the command line takes them from the data.
        pretrained: A folder or a name on the Hugging Face Hub, or ``minilm``.
        learning_rate: Highest learning rate of the schedule.
        warmup: Share of all steps used for the warm-up.
    """

    def __init__(
        self, labels: list[str], pretrained: str = MINILM, learning_rate: float = 1e-3, warmup: float = 0.1
    ) -> None:
        super().__init__()
        self.save_hyperparameters()  # predict.py builds the base from them
        self.net = AutoModelForSequenceClassification.from_pretrained(
            find(pretrained), id2label=dict(enumerate(labels)), label2id={label: i for i, label in enumerate(labels)}
        )
        self.net.train()  # from_pretrained returns eval mode, and Lightning keeps modes
        self.val_accuracy = MulticlassAccuracy(len(labels), average="micro")
        self.test_accuracy = MulticlassAccuracy(len(labels), average="micro")

    def forward(self, batch: dict[str, Tensor]) -> Tensor:  # -> (batch, labels)
        return self.net(**{name: tensor for name, tensor in batch.items() if name != "labels"}).logits

    def training_step(self, batch: dict[str, Tensor]) -> Tensor:
        loss = torch.nn.functional.cross_entropy(self(batch), batch["labels"])
        self.log("loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: dict[str, Tensor]) -> None:
        self.val_accuracy(self(batch), batch["labels"])
        self.log("val_accuracy", self.val_accuracy, prog_bar=True)

    def test_step(self, batch: dict[str, Tensor]) -> None:
        self.test_accuracy(self(batch), batch["labels"])
        self.log("test_accuracy", self.test_accuracy)

    def configure_optimizers(self) -> dict[str, Any]:
        # All parameters, as without LoRA: the callback keeps those that train.
        optimizer = torch.optim.AdamW(self.parameters(), lr=self.hparams.learning_rate)
        steps = int(self.trainer.estimated_stepping_batches)
        schedule = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, self.hparams.learning_rate, total_steps=steps, pct_start=self.hparams.warmup
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}
