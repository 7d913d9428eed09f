"""Fine-tune a causal language model with LoRA and FSDP2, from a YAML file.

python examples/llm/train.py fit --config examples/llm/toy.yaml
"""

from __future__ import annotations

import warnings

from data import Text
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from model import CausalLM

warnings.filterwarnings("ignore", ".*LeafSpec.*is deprecated", FutureWarning)  # Lightning's use of a new torch


class CLI(LightningCLI):
    """Passes the model's tokenizer to the data."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.link_arguments("model.pretrained", "data.tokenizer")


if __name__ == "__main__":
    CLI(CausalLM, Text, seed_everything_default=0, save_config_callback=None)
