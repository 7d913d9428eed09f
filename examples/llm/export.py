"""Convert a checkpoint to a PEFT directory, in one process on the CPU.

python examples/llm/export.py examples/output/llm/last.ckpt examples/output/llm/peft
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from model import CausalLM

from lightning_lora import load_adapter, save_adapter


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path, help="checkpoint written by train.py")
    parser.add_argument("directory", type=Path, help="output folder")
    options = parser.parse_args()
    hyperparameters = torch.load(options.checkpoint, weights_only=True)["hyper_parameters"]
    hyperparameters.pop("_instantiator", None)  # added by LightningCLI
    model = CausalLM(**hyperparameters)
    torch.set_default_dtype(torch.bfloat16)  # the precision used in training, half the memory of float32
    model.build()  # only the base; nothing is sharded here
    print(load_adapter(model, options.checkpoint))
    save_adapter(model, options.directory)
    print(f"Adapter written to {options.directory}")


if __name__ == "__main__":
    main()
