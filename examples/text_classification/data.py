"""Labeled sentences from a TSV file, split and tokenized."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningDataModule
from pretrained import MINILM, find
from torch.utils.data import DataLoader, Subset, random_split
from transformers import AutoTokenizer

SENTENCES = Path(__file__).with_name("sentences.tsv")


class Sentences(LightningDataModule):
    """Sentences with labels: 60 % to train on, 20 % to choose the best epoch, 20 % for the final test.

    Args:
        file: UTF-8 text with one ``sentence<TAB>label`` per line. Labels are any words.
        pretrained: Model whose tokenizer is used; the command line passes the model's.
        batch_size: Sentences per batch.
        max_tokens: Longer sentences are truncated.
        split_seed: Seed of the split.
    """

    def __init__(
        self,
        file: Path = SENTENCES,
        pretrained: str = MINILM,
        batch_size: int = 16,
        max_tokens: int = 128,
        split_seed: int = 0,
    ) -> None:
        super().__init__()
        self.batch_size, self.max_tokens = batch_size, max_tokens
        rows = read(file)
        self.labels = sorted({label for _, label in rows})
        self.tokenizer = AutoTokenizer.from_pretrained(find(pretrained))
        generator = torch.Generator().manual_seed(split_seed)
        self.train, self.validation, self.test = random_split(rows, (0.6, 0.2, 0.2), generator)

    def train_dataloader(self) -> DataLoader:
        return self._loader(self.train, shuffle=True)

    def val_dataloader(self) -> DataLoader:
        return self._loader(self.validation)

    def test_dataloader(self) -> DataLoader:
        return self._loader(self.test)

    def _loader(self, part: Subset, shuffle: bool = False) -> DataLoader:
        return DataLoader(part, self.batch_size, shuffle=shuffle, collate_fn=self.collate)

    def collate(self, rows: list[tuple[str, str]]) -> dict[str, Any]:
        """Return the model's inputs, padded to the longest sentence of the batch."""
        sentences, labels = zip(*rows, strict=True)
        batch = self.tokenizer(
            list(sentences), padding=True, truncation=True, max_length=self.max_tokens, return_tensors="pt"
        )
        return {**batch, "labels": torch.tensor([self.labels.index(label) for label in labels])}


def read(file: Path) -> list[tuple[str, str]]:
    """Return the sentences with their labels.

    Raises:
        ValueError: A line has no label, or all labels are the same.
    """
    rows = []
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), start=1):
        sentence, _, label = line.rpartition("\t")
        if not (sentence.strip() and label.strip()):
            raise ValueError(f"{file}, line {number}: expected sentence<TAB>label, found {line!r}.")
        rows.append((sentence.strip(), label.strip()))
    if len({label for _, label in rows}) < 2:
        raise ValueError(f"{file}: expected at least two different labels, found {len(rows)} lines with one or none.")
    return rows
