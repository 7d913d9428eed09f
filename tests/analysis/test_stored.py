"""An adapter and a base on disk give the numbers that the model in memory gives, one weight at a time."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from lightning_lora import adapter_state_dict, save_adapter
from lightning_lora.analysis import analyze, read_matrices
from lightning_lora.analysis.stored import stored_matrices
from lightning_lora.state import describe
from lightning_lora.storage.checkpoint import RECORD_KEY
from tests.peft_format.kinds import KINDS, WARNED, seeded
from tests.peft_format.models import gpt2, tied_llama, trained

pytestmark = WARNED


def written(model: nn.Module, folder: Path, form: str) -> Path:
    if form == "directory":
        save_adapter(model, folder / "adapter")
        return folder / "adapter"
    torch.save({"state_dict": adapter_state_dict(model), RECORD_KEY: describe(model)}, folder / "last.ckpt")
    return folder / "last.ckpt"


# Of experts, a directory does not hold the order, and is refused as merging refuses it.
@pytest.mark.parametrize(
    ("kind", "form"),
    [("experts", "checkpoint")]
    + [
        (kind, form)
        for kind in ("linear", "conv2d", "padded embedding", "conv2d with DoRA")
        for form in ("directory", "checkpoint")
    ],
)
def test_each_kind_has_the_numbers_of_the_model(kind: str, form: str, tmp_path: Path):
    build, _, options = KINDS[kind]
    model = seeded(build)
    save_file(dict(model.state_dict()), tmp_path / "model.safetensors")
    trained(model, **({"target_modules": ["layer"]} | options))
    found = analyze(written(model, tmp_path, form), tmp_path / "model.safetensors")
    assert_same_numbers(found.to_dict(), analyze(model).to_dict())


@pytest.mark.parametrize("options", [{}, {"target_modules": ["lm_head", "q_proj"], "untie_weights": True}], ids=str)
def test_a_tied_model_in_shards(options: dict[str, Any], tmp_path: Path):
    model = tied_llama()
    model.save_pretrained(tmp_path / "base", max_shard_size="6KB")
    save_adapter(trained(model, **options), tmp_path / "adapter")
    found = analyze(tmp_path / "adapter", str(tmp_path / "base"))
    assert_same_numbers(found.to_dict(), analyze(model).to_dict())


def assert_same_numbers(found: dict[str, Any], expected: dict[str, Any]) -> None:
    ours, theirs = ({layer["name"]: layer for layer in each["layers"]} for each in (found, expected))
    assert ours.keys() == theirs.keys()
    for name, layer in theirs.items():
        assert layer["relation"] is not None
        assert ours[name].pop("relation") == pytest.approx(layer.pop("relation"), rel=1e-9)
        assert ours[name].pop("singular_values") == pytest.approx(layer.pop("singular_values"), rel=1e-9)
        assert {k: round(v, 8) if isinstance(v, float) else v for k, v in ours[name].items()} == {
            k: round(v, 8) if isinstance(v, float) else v for k, v in layer.items()
        }


def test_tokens_are_the_change_of_their_rows(tmp_path: Path):
    model = gpt2()
    model.save_pretrained(tmp_path / "base")
    options = {"target_modules": ["c_attn"], "trainable_token_indices": {"transformer.wte": [5, 2]}}
    save_adapter(trained(model, **options), tmp_path / "adapter")
    found = {each.name: each for each in stored_matrices(tmp_path / "adapter", tmp_path / "base", tokens=True)}
    rows = next(each for each in read_matrices(model, tokens=True) if each.name == "transformer.wte")
    torch.testing.assert_close(found["transformer.wte"].A, rows.A)
    assert "transformer.wte" not in {each.name for each in stored_matrices(tmp_path / "adapter", tmp_path / "base")}


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path]:
    model = nn.ModuleList(nn.ModuleDict({"up": nn.Linear(12, 20), "down": nn.Linear(20, 12)}) for _ in range(2))
    save_file(dict(model.state_dict()), tmp_path / "model.safetensors")
    return written(trained(model), tmp_path, "directory"), tmp_path / "model.safetensors"


def test_one_weight_is_held_at_a_time_and_progress_is_told(files: tuple[Path, Path]):
    steps: list[tuple[int, int]] = []
    seen: list[torch.Tensor] = []
    for matrix in stored_matrices(*files, progress=lambda done, todo: steps.append((done, todo))):
        assert matrix.weight is not None
        seen.append(matrix.weight)
    assert steps == [(done, 4) for done in range(5)]
    assert len({weight.data_ptr() for weight in seen}) == 4
    assert all(float(weight.std()) > 0 for weight in seen)


def test_a_base_that_does_not_fit_is_refused_before_anything(files: tuple[Path, Path], tmp_path: Path):
    adapter, _ = files
    with pytest.raises(FileNotFoundError, match="is not there"):
        stored_matrices(adapter, tmp_path / "nowhere")
    other = {f"{block}.{name}.weight": torch.ones(20, 20) for block in range(2) for name in ("up", "down")}
    save_file(other, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="expected"):
        stored_matrices(adapter, tmp_path / "other.safetensors")
    whole = {"up": (20, 12), "down": (12, 20)}
    quantized = {f"{b}.{n}.weight": torch.ones(*s, dtype=torch.int8) for b in range(2) for n, s in whole.items()}
    save_file(quantized, tmp_path / "small.safetensors")
    with pytest.raises(ValueError, match="quantized"):
        stored_matrices(adapter, tmp_path / "small.safetensors")


def test_a_module_is_not_read_with_a_base_on_disk(files: tuple[Path, Path]):
    with pytest.raises(ValueError, match="leave base out"):
        analyze(trained(nn.ModuleDict({"layer": nn.Linear(12, 20)})), files[1])


def test_intruders_are_found_in_the_weights_on_disk(files: tuple[Path, Path]):
    found = analyze(*files, intruders=True)
    assert all(layer.intruders is not None for layer in found.layers)
    assert not math.isnan(json.loads(json.dumps(found.to_dict()))["layers"][0]["relation"]["amplification"])
