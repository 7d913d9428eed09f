"""Fine-tune a text classifier with LoRA, from a YAML file.

python examples/text_classification/train.py fit --config examples/text_classification/lora.yaml
"""

from __future__ import annotations

import warnings

from data import Sentences
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from model import TextClassifier

warnings.filterwarnings("ignore", ".*LeafSpec.*is deprecated", FutureWarning)  # Lightning's use of a new torch


class CLI(LightningCLI):
    """Links the options of model and data, and tests the best checkpoint after a fit."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.link_arguments("model.pretrained", "data.pretrained")
        parser.link_arguments("data.labels", "model.labels", apply_on="instantiate")

    def after_fit(self) -> None:
        self.trainer.test(self.model, self.datamodule, ckpt_path="best")


def build(args: list[str] | None = None, run: bool = True) -> CLI:
    """Read the options and, unless ``run`` is False, run their command."""
    return CLI(TextClassifier, Sentences, seed_everything_default=0, save_config_callback=None, args=args, run=run)


if __name__ == "__main__":
    build()
