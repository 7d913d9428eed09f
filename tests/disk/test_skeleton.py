"""``lightning-lora verify``: an adapter either fits its base, or the misfit is named."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from lightning_lora import LoRAConfig, adapter_state_dict, attach, load_adapter, merge, save_adapter
from lightning_lora.disk.skeleton import model_of_shapes
from lightning_lora.state import describe
from lightning_lora.storage.checkpoint import RECORD_KEY
from tests.files import FACTOR, change_tensors, run, tensors_of, write_checkpoint
from tests.peft_format.kinds import WARNED
from tests.peft_format.models import trained
from tests.toys import Spectral

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


@pytest.mark.parametrize("prefix", ["", "model."])
def test_part_that_is_not_adapted_is_compared(prefix: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = nn.ModuleDict({"body": nn.Linear(16, 16), "head": nn.Linear(16, 4)})
    save_file(model.state_dict(), base := tmp_path / "base.safetensors")
    module = nn.ModuleDict({"model": model}) if prefix else model
    attach(module, LoRAConfig(rank=2, target_modules=[f"{prefix}body"]))
    adapter = write_checkpoint(module, tmp_path / "adapter.ckpt")
    assert run("verify", adapter, base) == 0
    assert "samples of 4 tensors" in capsys.readouterr().out
    save_file(load_file(base) | {"head.weight": torch.zeros(4, 16)}, base)
    assert run("verify", adapter, base) == 1
    assert f"1 of 4 compared tensors differ, first {prefix}head.weight" in capsys.readouterr().err


# --- complex weights


@pytest.fixture(params=["checkpoint", "directory"])
def spectral(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, Path]:
    """An adapter that trains complex weights in full, by a glob, and its base."""
    module, adapter, base = Spectral(), tmp_path / "adapter", tmp_path / "base.safetensors"
    save_file(module.state_dict(), base)
    attach(module, LoRAConfig(rank=2, target_modules=["lin"], modules_to_save=["sp*"]))
    with torch.no_grad():
        module.lin.lora.B.add_(1)
        module.spec.weight.mul_(1j)
        module.spec.mean.mul_(1j)
    if request.param == "directory":
        save_adapter(module, adapter)
    else:
        write_checkpoint(module, adapter)
    return adapter, base


def test_complex_weights_are_verified_merged_and_converted(spectral: tuple[Path, Path], tmp_path: Path) -> None:
    adapter, base = spectral
    before = load_file(base)
    assert run("verify", *spectral) == 0
    assert run("report", adapter, "--base", base) == 0
    assert run("merge", *spectral, tmp_path / "merged") == 0
    folder, back = tmp_path / "peft", tmp_path / "back.ckpt"
    if adapter.is_file():
        assert run("export", adapter, folder) == 0
    else:
        assert run("import", adapter, back, "--root", "") == 0
        assert run("export", back, folder) == 0
    load_adapter(loaded := Spectral(), folder)
    merged = tensors_of(tmp_path / "merged")
    for key in ("spec.weight", "spec.mean"):
        assert torch.equal(merged[key], before[key] * 1j)
        assert torch.equal(loaded.state_dict()[key], before[key] * 1j)


def test_other_complex_base_is_refused(spectral: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    adapter, base = spectral
    module = Spectral()
    attach(module, LoRAConfig(rank=2, target_modules=["lin"]))
    write_checkpoint(module, adapter.with_name("frozen.ckpt"))
    tensors = load_file(base)
    tensors["spec.weight"].imag.add_(1)
    save_file(tensors, base)
    assert run("verify", adapter, base) == 0  # it trains them itself
    assert run("verify", adapter.with_name("frozen.ckpt"), base) == 1
    assert "1 of 3 compared tensors differ, first spec.weight" in capsys.readouterr().err


@pytest.mark.parametrize("part", ["real", "imag"])
def test_complex_number_that_is_not_finite_is_found(
    part: str, spectral: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    adapter, base = spectral
    if adapter.is_dir():
        change_tensors(adapter, lambda t: getattr(t["base_model.model.spec.mean"], part).fill_(torch.nan))
    else:
        content = torch.load(adapter)
        getattr(content["state_dict"]["spec.mean"], part).fill_(torch.nan)
        torch.save(content, adapter)
    assert run("verify", adapter, base) == 1
    assert "NaN or infinity in spec.mean" in capsys.readouterr().err


def test_plan_counts_complex_weights_as_parameters_and_as_no_convolution(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    module = Spectral()
    module.turn = nn.Linear(4, 4, dtype=torch.complex64)
    save_file(module.state_dict(), base := tmp_path / "base.safetensors")
    assert run("plan", base, "--rank", 1, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["base_parameters"] == sum(tensor.numel() for tensor in module.state_dict().values())
    assert max(choice["layers"] for choice in found["choices"]) == 2
    shaped = model_of_shapes(base).module
    assert type(shaped.get_submodule("spec")) is nn.Module


def test_update_of_complex_weight_is_not_called_quantized(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    module, adapter, base = (
        nn.Sequential(nn.Linear(4, 4, dtype=torch.complex64)),
        tmp_path / "a",
        tmp_path / "b.safetensors",
    )
    save_file(module.state_dict(), base)
    attach(module, LoRAConfig(rank=1, target_modules=["0"]))
    write_checkpoint(module, adapter)
    assert run("merge", adapter, base, tmp_path / "out") == 1
    assert "'0' is complex (torch.complex64) and its update is real" in capsys.readouterr().err
    assert run("report", adapter, "--base", base) == 1
    assert "complex in 0.weight" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["checkpoint", "directory"])
def test_a_weight_that_the_model_computes_is_named(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = nn.Sequential(nn.Linear(4, 4), weight_norm(nn.Linear(4, 4)))
    save_file({name: value.clone() for name, value in model.state_dict().items()}, tmp_path / "base.safetensors")
    trained(model, target_modules=["0", "1"])
    if kind == "checkpoint":
        adapter = write_checkpoint(model, tmp_path / "last.ckpt")
    else:
        save_adapter(model, adapter := tmp_path / "peft")
    assert run("verify", adapter, tmp_path / "base.safetensors") == 1
    assert "1: the base has no '1.weight'; a parametrization may compute it" in capsys.readouterr().err
