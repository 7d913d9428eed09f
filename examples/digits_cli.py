"""The main example from a YAML file: LoRA needs no code of its own under LightningCLI either.

    python examples/digits_cli.py fit --config examples/digits.yaml
    python examples/digits_cli.py fit --config examples/digits.yaml --trainer.callbacks.rank=8 --data.task=parity
    python examples/digits_cli.py test --config examples/digits.yaml --ckpt_path examples/output/cli/last.ckpt

The base model comes from ``examples/output/base``; it is trained first if it is not there yet.
"""

from __future__ import annotations

from pathlib import Path

import torch
from digits import BASE_RATE, BASE_STEPS, LORA_RATE, OUTPUT, DigitClassifier, Digits, quiet_lightning, train
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.utilities.seed import isolate_rng


class PretrainedClassifier(DigitClassifier):
    """The classifier with the base's weights.

    Args:
        base: Folder of the base's checkpoint; trained and written there if missing.
        learning_rate: Highest rate of the schedule.
    """

    def __init__(self, base: Path = OUTPUT / "base", learning_rate: float = LORA_RATE) -> None:
        super().__init__(learning_rate)
        checkpoint = base / "last.ckpt"
        if not checkpoint.exists():
            with isolate_rng():  # the adapter's run must not depend on whether the base was there
                torch.manual_seed(0)  # the same base as the script's
                train(DigitClassifier(), Digits("clean", steps=BASE_STEPS), BASE_RATE, base)
        # Weights are loaded here and not in `setup`: a checkpoint of the adapter holds nothing of the base.
        self.load_state_dict(torch.load(checkpoint, weights_only=True)["state_dict"])


if __name__ == "__main__":
    quiet_lightning()
    LightningCLI(PretrainedClassifier, Digits, seed_everything_default=0, save_config_callback=None)
