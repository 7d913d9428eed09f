"""Adapters and bases in files, and the command that works on them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lightning_lora import adapter_state_dict
from lightning_lora.adapted_model import AdaptedModel
from lightning_lora.cli import main
from lightning_lora.fingerprint import to_plain
from lightning_lora.state import base_samples, describe
from lightning_lora.storage.checkpoint import RECORD_KEY

FACTOR = "base_model.model.blocks.0.q_proj.lora_A.weight"  # in the adapter of the fixture `files`


def run(*arguments: object) -> int:
    return main([str(each) for each in arguments])


def write_checkpoint(module: nn.Module, path: Path) -> Path:
    record = describe(module) | {"base": to_plain(base_samples(AdaptedModel(module)))}
    torch.save({"state_dict": adapter_state_dict(module), RECORD_KEY: record}, path)
    return path


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def tensors_of(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


def change_tensors(adapter: Path, change: Callable[[dict[str, Tensor]], Any]) -> None:
    tensors = load_file(adapter / "adapter_model.safetensors")
    change(tensors)
    save_file(tensors, adapter / "adapter_model.safetensors")
