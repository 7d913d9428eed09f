"""Compare a frozen encoder, LoRA and full fine-tuning on the same sentences, in one table.

    python examples/text_classification/compare.py --config examples/text_classification/lora.yaml

It takes the options of ``train.py``. Each method is evaluated once on the test sentences, with the epoch or the
strength of regularization that was best on the validation sentences.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import torch
from sklearn.linear_model import LogisticRegression
from torch import Tensor
from train import CLI, build

from lightning_lora import LoRACallback

FULL_RATE = 5e-5  # LoRA needs a higher rate; this did better on the validation sentences than 1e-4
ROW = "{:18}  {:>13}  {:>11}  {:>16}  {:>7}"


def frozen(cli: CLI) -> dict[str, Any]:
    """Evaluate the pretrained encoder as it is: logistic regression on the mean of each sentence's token vectors."""
    data = cli.datamodule
    train, validation, test = (
        features(cli.model.net.base_model, loader)
        for loader in (data.train_dataloader(), data.val_dataloader(), data.test_dataloader())
    )
    tries = [LogisticRegression(C=C, max_iter=10_000).fit(*train) for C in (0.01, 0.1, 1, 10, 100)]
    best = max(tries, key=lambda classifier: classifier.score(*validation))
    weights = best.coef_.size + best.intercept_.size
    return {"accuracy": best.score(*test), "trainable": weights, "bytes": 4 * weights}


@torch.no_grad()
def features(encoder: torch.nn.Module, loader: Any) -> tuple[Tensor, Tensor]:
    encoder.eval()
    vectors, labels = [], []
    for batch in loader:
        labels.append(batch.pop("labels"))
        mask = batch["attention_mask"].unsqueeze(-1)  # (sentences, tokens, 1): 0 for padding
        vectors.append((encoder(**batch).last_hidden_state * mask).sum(1) / mask.sum(1))
    return torch.cat(vectors), torch.cat(labels)


def lora(cli: CLI) -> dict[str, Any]:
    return fine_tune(cli)


def full(cli: CLI) -> dict[str, Any]:
    cli.trainer.callbacks = [part for part in cli.trainer.callbacks if not isinstance(part, LoRACallback)]
    cli.model.hparams.learning_rate = FULL_RATE
    return fine_tune(cli)


def fine_tune(cli: CLI) -> dict[str, Any]:
    cli.trainer.fit(cli.model, cli.datamodule)
    [metrics] = cli.trainer.test(cli.model, cli.datamodule, ckpt_path="best", verbose=False)
    return {
        "accuracy": metrics["test_accuracy"],
        "trainable": sum(parameter.numel() for parameter in cli.model.parameters() if parameter.requires_grad),
        "bytes": Path(cli.trainer.checkpoint_callback.best_model_path).stat().st_size,
    }


def main() -> None:
    rows = []
    for name, method in {"frozen encoder": frozen, "LoRA": lora, "full fine-tuning": full}.items():
        print(f"\n{name}", flush=True)
        cli = build(sys.argv[1:], run=False)
        for part in cli.trainer.callbacks:
            if isinstance(part, LoRACallback):
                part.export_dir = None  # keep the export of train.py
        cli.trainer.checkpoint_callback.dirpath += f"/compare/{method.__name__}"
        started = time.perf_counter()
        found = method(cli)
        seconds = time.perf_counter() - started
        rows.append(
            (name, f"{found['accuracy']:.1%}", f"{found['trainable']:,}", f"{found['bytes']:,}", f"{seconds:.0f} s")
        )
    print(f"\n{len(cli.datamodule.test)} test sentences")
    for row in [("", "test accuracy", "trainable", "checkpoint bytes", "time"), *rows]:
        print(ROW.format(*row))


if __name__ == "__main__":
    main()
