"""Every kind of layer that PEFT has travels from here to PEFT and back, and from PEFT to here."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from lightning_lora import load_adapter, preflight, save_adapter
from lightning_lora.layers import LoRALayer
from tests.peft_format.kinds import KINDS, WARNED, output, seeded, sequences, vectors
from tests.peft_format.models import CLOSE, distance, in_peft, trained, trained_by_peft

pytestmark = WARNED


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_round_trips_through_peft(kind: str, tmp_path: Path) -> None:
    build, inputs, options = KINDS[kind]
    ours = trained(seeded(build), **({"target_modules": ["layer"]} | options))
    expected = output(ours, inputs)
    assert distance(expected, output(seeded(build), inputs)) > 100 * CLOSE
    save_adapter(ours, tmp_path / "ours")
    theirs = in_peft(seeded(build), tmp_path / "ours")
    assert distance(output(theirs, inputs), expected) <= CLOSE
    theirs.save_pretrained(tmp_path / "theirs")
    # PEFT trains and loads the bias of attention's inputs, but does not save it.
    for name in ("ours", *(["theirs"] if "bias" not in options else [])):
        back = seeded(build)
        load_adapter(back, tmp_path / name)
        assert distance(output(back, inputs), expected) <= CLOSE
    assert preflight(ours).peft_accepts


@pytest.mark.parametrize("kind", [kind for kind in KINDS if "slices" not in kind and "output alone" not in kind])
def test_every_kind_written_by_peft_loads(kind: str, tmp_path: Path) -> None:
    build, inputs, options = KINDS[kind]
    names = {"target_modules": ["layer"]} | {k: v for k, v in options.items() if k != "exclude_modules"}
    theirs = trained_by_peft(seeded(build), **names)
    expected = output(theirs, inputs)
    theirs.save_pretrained(tmp_path)
    ours = seeded(build)
    load_adapter(ours, tmp_path)
    if names.get("bias") == "all":  # without the bias that PEFT did not save
        expected = output(in_peft(seeded(build), tmp_path), inputs)
    assert distance(output(ours, inputs), expected) <= CLOSE


class Nested(nn.Module):
    """Names that are ends of each other."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.block = nn.Linear(8, 8), nn.ModuleDict({"q": nn.Linear(8, 8), "base_layer": nn.Linear(8, 8)})

    def forward(self, x: Tensor) -> Tensor:
        return self.block["base_layer"](torch.tanh(self.block["q"](torch.tanh(self.q(x)))))


@pytest.mark.parametrize("exclude", [["q"], ["block"], ["block.q"]])
def test_names_that_end_other_names_are_exact(exclude: list[str], tmp_path: Path) -> None:
    wanted = {"q", "block.q", "block.base_layer"} - {each for each in ("q", "block.q") if each in exclude}
    wanted -= {"block.q", "block.base_layer"} if exclude == ["block"] else set()
    wanted -= {"block.q"} if exclude == ["q"] else set()
    regex = "|".join(sorted(each.replace(".", r"\.") for each in wanted))
    ours = trained(seeded(Nested), target_modules=regex, rank_pattern={"^q": 3} if "q" in wanted else {})
    save_adapter(ours, tmp_path)
    for back in (in_peft(seeded(Nested), tmp_path), seeded(Nested)):
        if isinstance(back, Nested):
            load_adapter(back, tmp_path)
        assert distance(output(back, vectors), output(ours, vectors)) <= CLOSE


# --- what of PEFT the files have to allow for; these fail when PEFT changes


def test_peft_adds_output_projection_twice(tmp_path: Path) -> None:
    build = KINDS["attention"][0]
    ours = trained(seeded(build), target_modules=["layer.out_proj"])
    with pytest.warns(UserWarning, match="adds the update of attention's output projection twice"):
        save_adapter(ours, tmp_path)
    projection = in_peft(seeded(build), tmp_path).base_model.model.layer.base_layer.out_proj
    assert distance(2 * projection.get_delta_weight("default"), ours.layer.out_proj.delta_weight()) <= CLOSE


def test_peft_ignores_output_projection_alone(tmp_path: Path) -> None:
    build, inputs, _ = KINDS["attention"]
    theirs = trained_by_peft(seeded(build), target_modules=["layer.out_proj"])
    assert distance(output(theirs, inputs), output(seeded(build), inputs)) == 0
    theirs.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"layer\.out_proj: PEFT never applies"):
        load_adapter(seeded(build), tmp_path)


def test_attention_of_unknown_peft_version_is_refused(tmp_path: Path) -> None:
    build = KINDS["attention"][0]
    save_adapter(trained(seeded(build), target_modules=["layer"]), tmp_path)
    config = tmp_path / "adapter_config.json"
    config.write_text(config.read_text().replace("0.21.2", "0.22.0"))
    with pytest.raises(ValueError, match=r"unknown whether 0\.22\.0"):
        load_adapter(seeded(build), tmp_path)


def test_fused_encoder_needs_peft_merge(tmp_path: Path) -> None:
    def build() -> nn.Module:
        return nn.Sequential(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True))

    ours = trained(seeded(build), target_modules=["0.linear1", "0.linear2"])
    with pytest.warns(UserWarning, match=r"bypasses PEFT's adapters of 0\.linear1, 0\.linear2"):
        save_adapter(ours, tmp_path)
    theirs = in_peft(seeded(build), tmp_path)
    assert distance(output(theirs, sequences), output(seeded(build), sequences)) == 0
    assert distance(output(theirs.merge_and_unload(), sequences), output(ours, sequences)) <= CLOSE


def test_layers_named_like_factors_keep_biases(tmp_path: Path) -> None:
    def build() -> nn.Module:
        return nn.ModuleDict({"A": nn.Linear(4, 4), "B": nn.Linear(4, 4)})

    ours = trained(seeded(build), target_modules=["A"], bias="all")
    with torch.no_grad():
        ours["B"].bias.add_(1.0)
    save_adapter(ours, tmp_path)
    back = seeded(build)
    load_adapter(back, tmp_path)
    assert torch.equal(back["B"].bias, ours["B"].bias)
    assert isinstance(back["A"], LoRALayer)
    assert not isinstance(back["B"], LoRALayer)
