"""``AdapterFile``: a checkpoint and a PEFT directory of one adapter say the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_lora import LoRAConfig, attach, save_adapter
from lightning_lora.adapted_model import AdaptedModel
from lightning_lora.fingerprint import to_plain
from lightning_lora.loading import read_adapter
from lightning_lora.state import adapter_state_dict, base_samples, describe
from lightning_lora.storage.adapter_file import AdapterFile, StoredLayer
from lightning_lora.storage.checkpoint import RECORD_KEY
from tests.contract import train_all
from tests.peft_format.kinds import KINDS, WARNED, Holder, seeded

pytestmark = WARNED


def saved(model: nn.Module, folder: Path) -> tuple[AdapterFile, AdapterFile]:
    """Return the adapter of a model as read from a checkpoint and from a PEFT directory."""
    record = describe(model) | {"base": to_plain(base_samples(AdaptedModel(model)))}
    torch.save({"state_dict": adapter_state_dict(model), RECORD_KEY: record}, folder / "adapter.ckpt")
    save_adapter(model, folder / "peft", export_root="")
    return read_adapter(folder / "adapter.ckpt"), read_adapter(folder / "peft")


def adapted(kind: str) -> nn.Module:
    build, _, options = KINDS[kind]
    model = seeded(build)
    attach(model, LoRAConfig(**{"rank": 2, "alpha": 3.0, "target_modules": ["layer"]} | options))
    train_all(model, torch.Generator().manual_seed(0))
    return model


def update(layer: StoredLayer) -> Tensor:
    assert layer.scaling is not None
    return (layer.scaling * layer.B.double() @ layer.A.double()).squeeze(0)  # no directory tells one expert from none


TWO_RANKS = {"transposed experts"}  # only the model tells which parameter of a directory has which rank
UNLIKE = TWO_RANKS | {kind for kind in KINDS if kind.startswith("attention")}


@pytest.mark.parametrize("kind", sorted(KINDS.keys() - UNLIKE))
def test_both_formats_hold_the_same_layers(kind: str, tmp_path: Path) -> None:
    checkpoint, directory = saved(adapted(kind), tmp_path)
    mine, theirs = (
        {layer.weight.name or layer.label: layer for layer in file.layers.values()} for file in (checkpoint, directory)
    )
    assert len(mine) == len(theirs)
    updates = sorted((update(each) for each in mine.values()), key=lambda update: float(update.norm()))
    others = sorted((update(each) for each in theirs.values()), key=lambda update: float(update.norm()))
    for one, other in zip(updates, others, strict=True):
        torch.testing.assert_close(one, other)
    for name in mine.keys() & theirs.keys():
        one, other = mine[name], theirs[name]
        assert (one.rank, one.scaling) == (other.rank, other.scaling)
        assert one.weight.kind in (other.weight.kind, "transposed stack")
        assert sorted(one.weight.shape)[-2:] == sorted(other.weight.shape)[-2:]
        assert one.factors.keys() == other.factors.keys()
    assert len(checkpoint.others) == len(directory.others)
    assert checkpoint.base == directory.base != {}
    assert checkpoint.size == directory.size


@pytest.mark.parametrize("kind", ["attention", "attention, of two ranks and scalings"])
def test_attention_has_the_update_that_peft_applies(kind: str, tmp_path: Path) -> None:
    files = saved(adapted(kind), tmp_path)
    mine, theirs = ({layer.label: layer for layer in file.layers.values()} for file in files)
    assert mine.keys() == theirs.keys() == {"layer.in_proj_weight", "layer.out_proj"}
    for name, layer in mine.items():
        torch.testing.assert_close(update(theirs[name]), update(layer))


def test_rank_is_unknown_where_parameters_of_one_module_differ(tmp_path: Path) -> None:
    checkpoint, directory = saved(adapted("transposed experts"), tmp_path)
    assert {layer.rank for layer in checkpoint.layers.values()} == {2, 3}
    assert {(layer.rank, layer.scaling) for layer in directory.layers.values()} == {(None, None)}


def test_tokens_and_tensors_in_full_are_apart_from_the_layers(tmp_path: Path) -> None:
    model = Holder(nn.Embedding(20, 8))
    options: dict[str, Any] = {"target_modules": [], "trainable_token_indices": {"layer": [7, 3]}}
    attach(model, LoRAConfig(rank=2, alpha=3.0, modules_to_save=["side"], **options))
    for file in saved(model, tmp_path):
        assert not file.layers
        assert file.paths == {"layer"}
        assert file.others.keys() == {"side.weight", "side.bias"}
        [(name, stored)] = file.tokens.items()
        assert name == "layer"
        assert torch.equal(stored.rows, model.layer.lora.rows)
        assert stored.weight[:2] == ("layer.weight", "embedding")


def test_incomplete_update_is_refused(tmp_path: Path) -> None:
    model = adapted("linear")
    state = adapter_state_dict(model)
    del state["layer.lora.B"]
    torch.save({"state_dict": state, RECORD_KEY: describe(model)}, tmp_path / "adapter.ckpt")
    with pytest.raises(ValueError, match="holds no factors of 'layer'"):
        print(read_adapter(tmp_path / "adapter.ckpt").layers)
