"""Plain text in blocks of tokens."""

from __future__ import annotations

from pathlib import Path

import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import AutoTokenizer

TEXT = Path(__file__).with_name("text.txt")


class Text(LightningDataModule):
    """A text file split into blocks of equal length; the last tenth is for validation.

    Args:
        file: UTF-8 text.
        tokenizer: A folder or a name on the Hugging Face Hub; ``toy`` for bytes. The command line passes the model's.
        block: Tokens per block, the model's context length.
        batch_size: Blocks per batch and process.
    """

    def __init__(self, file: Path = TEXT, tokenizer: str = "toy", block: int = 64, batch_size: int = 4) -> None:
        super().__init__()
        self.batch_size = batch_size
        tokens = tokenize(file.read_text(encoding="utf-8"), tokenizer)
        blocks = tokens.unfold(0, block + 1, block)  # adjacent blocks share one token
        held_out = max(1, len(blocks) // 10)
        if len(blocks) - held_out < batch_size:
            raise ValueError(f"{file} has {len(tokens)} tokens; {batch_size=} with {block=} needs a longer text.")
        self.train, self.validation = blocks[:-held_out], blocks[-held_out:]

    # Lightning gives each process its share of the blocks.
    def train_dataloader(self) -> DataLoader:
        return DataLoader(self.train, self.batch_size, shuffle=True, drop_last=True)

    def val_dataloader(self) -> DataLoader:
        return DataLoader(self.validation, self.batch_size)


def tokenize(text: str, tokenizer: str) -> Tensor:
    if tokenizer == "toy":
        return torch.frombuffer(bytearray(text, "utf-8"), dtype=torch.uint8).long()
    return torch.tensor(AutoTokenizer.from_pretrained(tokenizer)(text)["input_ids"])
