"""The digits example from a YAML file: LoRA needs no code with LightningCLI.

    python examples/digits_cli.py fit --config examples/digits.yaml
    python examples/digits_cli.py fit --config examples/digits.yaml --trainer.callbacks.rank=8 --data.task=parity
    python examples/digits_cli.py test --config examples/digits.yaml --ckpt_path examples/output/cli/last.ckpt

The base model is loaded from ``examples/output/base``, or trained first if that does not exist.
"""

from __future__ import annotations

from pathlib import Path

import torch
from digits import BASE_RATE, BASE_STEPS, LORA_RATE, OUTPUT, DigitClassifier, Digits, quiet_lightning, train
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.utilities.seed import isolate_rng


class PretrainedClassifier(DigitClassifier):
    """The classifier with pretrained weights.

    Args:
        base: Folder of the base's checkpoint. If it is missing, the base is trained and saved there.
        learning_rate: Highest learning rate of the schedule.
    """

    def __init__(self, base: Path = OUTPUT / "base", learning_rate: float = LORA_RATE) -> None:
        super().__init__(learning_rate)
        checkpoint = base / "last.ckpt"
        if not checkpoint.exists():
            with isolate_rng():  # the adapter must not depend on whether the base existed
                torch.manual_seed(0)  # the same base as in digits.py
                train(DigitClassifier(), Digits("clean", steps=BASE_STEPS), BASE_RATE, base)
        # Load the weights here: the adapter's checkpoint does not hold the base.
        self.load_state_dict(torch.load(checkpoint, weights_only=True)["state_dict"])


if __name__ == "__main__":
    quiet_lightning()
    LightningCLI(PretrainedClassifier, Digits, seed_everything_default=0, save_config_callback=None)
