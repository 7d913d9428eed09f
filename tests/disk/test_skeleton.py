"""``lightning-lora verify``: an adapter either fits its base, or the misfit is named."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_lora import LoRAConfig, adapter_state_dict, attach, merge
from lightning_lora.state import describe
from lightning_lora.storage.checkpoint import RECORD_KEY
from tests.files import FACTOR, change_tensors, run, tensors_of, write_checkpoint
from tests.peft_format.kinds import WARNED

pytestmark = WARNED


MISFITS: dict[str, tuple[Callable[[dict[str, Tensor]], Any], str]] = {
    "a layer that is not there": (
        lambda t: t.update({FACTOR.replace("q_", "k_"): t[FACTOR].clone()}),
        "has no modules blocks.0.k_proj",
    ),
    "another width": (lambda t: t.update({FACTOR: torch.zeros(2, 9)}), "expected (2, 16)"),
    "another rank": (lambda t: t.update({FACTOR: torch.zeros(5, 16)}), "expected (2, 16)"),
    "no number": (lambda t: t[FACTOR].fill_(torch.nan), "NaN or infinity in blocks.0.q_proj"),
    "half a layer": (lambda t: t.pop(FACTOR), "missing from the file"),
}


@pytest.mark.parametrize("misfit", MISFITS)
def test_verify_reports_misfit(misfit: str, files: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    change, expected = MISFITS[misfit]
    assert run("verify", *files) == 0
    assert "the adapter fits: 4 layers" in capsys.readouterr().out
    change_tensors(files[0], change)
    assert run("verify", *files) == 1
    assert expected in capsys.readouterr().err


def test_repeated_frozen_tensor_must_match_base(files: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    value = tensors_of(files[1])["embed.weight"]
    change_tensors(files[0], lambda tensors: tensors.update({"base_model.model.embed.weight": value}))
    assert run("verify", *files) == 0
    change_tensors(files[0], lambda tensors: tensors["base_model.model.embed.weight"].add_(1))
    assert run("verify", *files) == 1
    assert "load that base" in capsys.readouterr().err


def test_adapter_trained_on_merged_base_is_refused(
    tiny: nn.Module, files: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    merge(tiny)
    attach(tiny, LoRAConfig(rank=2, target_modules=["q_proj"]))
    write_checkpoint(tiny, tmp_path / "second.ckpt")
    assert run("verify", tmp_path / "second.ckpt", files[1]) == 1
    assert "another adapter merged into it" in capsys.readouterr().err


@pytest.mark.parametrize("part", ["adapters", "layers", "merges"])
@pytest.mark.parametrize("nonsense", [None, 3, "x", [3], {"x": 3}], ids=str)
@pytest.mark.parametrize("command", ["inspect", "verify"])
def test_damaged_record_gives_no_traceback(
    command: str, part: str, nonsense: Any, tiny: nn.Module, files: tuple[Path, Path], tmp_path: Path
) -> None:
    record = describe(tiny) | {part: nonsense}
    torch.save({"state_dict": adapter_state_dict(tiny), RECORD_KEY: record}, tmp_path / "odd.ckpt")
    assert run(command, tmp_path / "odd.ckpt", *[files[1]] * (command == "verify")) in (0, 1)
