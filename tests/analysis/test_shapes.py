"""What the headers of a base's files say is what the loaded model says."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from lightning_lora import LoRAConfig
from lightning_lora.analysis import plan_budget
from lightning_lora.analysis.shapes import model_of_shapes
from lightning_lora.storage.safetensors import StoredTensor
from tests.peft_format.models import QUIET, bert, gpt2, llama, mixtral, t5, tied_llama, vit

pytestmark = QUIET


@pytest.mark.parametrize("make", [gpt2, llama, tied_llama, bert, t5, vit], ids=lambda make: make.__name__)
def test_a_rank_costs_what_it_costs_the_loaded_model(
    make: Callable[[], nn.Module], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    model = make()
    model.save_pretrained(tmp_path, max_shard_size="6KB")
    monkeypatch.setattr(StoredTensor, "read", None)  # no weight is read
    found = model_of_shapes(tmp_path)
    by_shapes = plan_budget(found.module, LoRAConfig(exclude_modules=found.heads), rank=2)
    loaded = plan_budget(model, rank=2)
    assert by_shapes.base_parameters == loaded.base_parameters
    assert by_shapes.choices[0].parameters == loaded.choices[0].parameters


def test_output_layers_are_told_by_name_or_by_the_vocabulary(tmp_path: Path):
    weights = {"embed_tokens.weight": (50, 8), "blocks.0.q.weight": (8, 8), "unembed_out.weight": (50, 8)}
    tensors = {name: torch.zeros(shape) for name, shape in weights.items()}
    save_file(tensors | {"lm_head.weight": torch.zeros(49, 8)}, tmp_path / "model.safetensors")
    assert model_of_shapes(tmp_path).heads == ("lm_head",)
    tensors["output.weight"] = torch.zeros(50, 8)
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text('{"vocab_size": 50}')
    assert model_of_shapes(tmp_path).heads == ("output",)


def test_experts_are_counted(tmp_path: Path):
    mixtral().save_pretrained(tmp_path)
    found = model_of_shapes(tmp_path)
    assert found.experts == sum(".experts." in name for name, _ in found.module.named_parameters()) > 0


def test_a_quantized_base_is_refused(tmp_path: Path):
    save_file({"layer.weight": torch.zeros(8, 8, dtype=torch.uint8)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="layer are quantized"):
        model_of_shapes(tmp_path)
