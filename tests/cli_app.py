"""A LightningCLI script as users write them; ``FORCED=1`` puts the callback's options at ``--lora.*``."""

from __future__ import annotations

import os
from typing import Any

from lightning.pytorch import LightningDataModule
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI

from lightning_lora import LoRACallback
from tests.toys import Toy, loader


class CliToy(Toy):
    """The module under test, with one option of its own."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()


class Data(LightningDataModule):
    def train_dataloader(self) -> Any:
        return loader()

    def val_dataloader(self) -> Any:
        return loader()

    def test_dataloader(self) -> Any:
        return loader()


class CLI(LightningCLI):
    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        if os.environ.get("FORCED"):
            parser.add_lightning_class_args(LoRACallback, "lora")


def main(args: list[str] | None = None) -> LightningCLI:
    return CLI(CliToy, Data, args=args, save_config_kwargs={"overwrite": True})


if __name__ == "__main__":
    main()
