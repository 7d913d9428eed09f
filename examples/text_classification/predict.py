"""Classify sentences with a fine-tuned adapter, and check that PEFT computes the same from its export.

python examples/text_classification/predict.py "What a lovely day." "I want my money back."
python examples/text_classification/predict.py --peft examples/output/text_classification/peft
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import torch
from data import SENTENCES, read
from model import TextClassifier
from pretrained import find
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from lightning_lora import load_adapter

OUTPUT = Path("examples/output/text_classification")
TOLERANCE = 1e-5


def load(path: Path) -> TextClassifier:
    """Build the base that a checkpoint names, and load the adapter into it."""
    options: dict[str, Any] = torch.load(path, weights_only=True)["hyper_parameters"]
    options.pop("_instantiator", None)  # added by LightningCLI
    model = TextClassifier(**options)
    load_adapter(model, path)  # attaches as well: the file holds rank, targets and all other options
    return model


def load_in_peft(directory: Path, options: dict[str, Any]) -> nn.Module:
    """Load the export with PEFT alone, without Lightning or this package."""
    from peft import PeftModel

    base = AutoModelForSequenceClassification.from_pretrained(
        find(options["pretrained"]), num_labels=len(options["labels"])
    )
    return PeftModel.from_pretrained(base, str(directory))


@torch.no_grad()
def logits(model: nn.Module, tokenizer: Any, sentences: list[str]) -> Tensor:
    model.eval()
    batches = [sentences[start : start + 32] for start in range(0, len(sentences), 32)]
    tokens = (tokenizer(batch, padding=True, truncation=True, return_tensors="pt") for batch in batches)
    return torch.cat([model(**batch).logits for batch in tokens])  # (sentences, labels)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sentences", nargs="*", help="sentences to classify")
    parser.add_argument("--checkpoint", type=Path, default=OUTPUT / "best.ckpt", help="checkpoint written by train.py")
    parser.add_argument("--peft", type=Path, metavar="DIR", help="load this export in PEFT and compare")
    parser.add_argument("--file", type=Path, default=SENTENCES, help="sentences to compare on")
    options = parser.parse_args()

    model = load(options.checkpoint)
    tokenizer = AutoTokenizer.from_pretrained(find(model.hparams["pretrained"]))
    if options.sentences:
        for sentence, row in zip(options.sentences, logits(model.net, tokenizer, options.sentences), strict=True):
            share, label = row.softmax(0).max(0)
            print(f"{model.hparams['labels'][label]:12}  {share:6.1%}  {sentence}")
    if options.peft:
        sentences = [sentence for sentence, _ in read(options.file)]
        ours = logits(model.net, tokenizer, sentences)
        theirs = logits(load_in_peft(options.peft, model.hparams), tokenizer, sentences)
        difference = (ours - theirs).abs().max().item()
        print(f"PEFT, {len(sentences)} sentences: logits differ by at most {difference:.0e}")
        if difference > TOLERANCE:
            sys.exit(f"That is more than {TOLERANCE:.0e}: {options.peft} is not the export of {options.checkpoint}.")


if __name__ == "__main__":
    main()
