"""``lightning-lora inspect`` and ``diff``."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lightning_lora import LoRACallback, LoRAConfig, attach, lora_layers, save_adapter
from lightning_lora.analysis import analyze
from tests.files import FACTOR, change_tensors, run, write_checkpoint
from tests.peft_format.kinds import KINDS, WARNED, seeded
from tests.peft_format.models import (
    trained,
)
from tests.toys import Spectral, Toy, loader, trainer

pytestmark = WARNED


@pytest.mark.parametrize("kind", [kind for kind in KINDS if "bias" not in kind and "slices" not in kind])
@pytest.mark.parametrize("form", ["directory", "checkpoint"])
def test_inspect_shows_ranks_scalings_and_norms(
    form: str, kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    build, _, options = KINDS[kind]
    model = trained(seeded(build), **({"target_modules": ["layer"]} | options | {"use_dora": False}))
    path = tmp_path / "adapter"
    (save_adapter if form == "directory" else write_checkpoint)(model, path)
    assert run("inspect", path, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    norms = [layer.delta_weight(key).norm() for layer in lora_layers(model).values() for key in adapted(layer)]
    if form == "directory" and kind.startswith("attention") and len(norms) == 1:
        norms.append(torch.zeros(()))  # PEFT adapts both projections
    if form == "directory" and kind == "transposed experts":  # of several ranks, in an order that the file lacks
        assert {layer["norm"] for layer in found["layers"]} == {None}
    else:
        assert sorted(layer["norm"] for layer in found["layers"]) == pytest.approx(sorted(map(float, norms)), rel=1e-5)
    assert run("inspect", path) == 0
    assert "norm of update" in capsys.readouterr().out


def adapted(layer: Any) -> list[str]:
    return [adapter.parameter for adapter in layer.adapters().values()]


@pytest.mark.parametrize("kind", ["linear", "conv2d", "experts"])
def test_inspect_shows_used_ranks(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    build, _, options = KINDS[kind]
    model = trained(seeded(build), **({"target_modules": ["layer"]} | options))
    save_adapter(model, tmp_path / "adapter")
    assert run("inspect", tmp_path / "adapter", "--json") == 0
    found = json.loads(capsys.readouterr().out)["layers"]
    matrices = analyze(model).layers
    for layer in found if kind != "experts" else []:
        [expected] = [each for each in matrices if each.name == layer["name"]]
        assert layer["effective_rank"] == pytest.approx(expected.effective_rank, rel=1e-5)
        assert layer["stable_rank"] == pytest.approx(expected.stable_rank, rel=1e-5)
        assert layer["suggested_rank"] == expected.suggested_rank
    mean = sum(layer["effective_rank"] for layer in found) / len(found)
    assert mean == pytest.approx(sum(each.effective_rank for each in matrices) / len(matrices), rel=1e-5)
    assert max(layer["suggested_rank"] for layer in found) == max(each.suggested_rank for each in matrices)


def test_inspect_fails_on_nonfinite_values(files: tuple[Path, Path]) -> None:
    assert run("inspect", files[0]) == 0
    change_tensors(files[0], lambda tensors: tensors[FACTOR].fill_(torch.inf))
    assert run("inspect", files[0]) == 1


def test_rank_that_the_tensors_do_not_have_is_refused(
    files: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    config = json.loads((files[0] / "adapter_config.json").read_text())
    (files[0] / "adapter_config.json").write_text(json.dumps(config | {"r": 2 * config["r"]}))
    for command in (("inspect", files[0]), ("diff", files[0], files[0]), ("verify", *files)):
        assert run(*command) == 1
    errors = capsys.readouterr().err
    assert errors.count(f"have rank {config['r']}, and adapter_config.json says {2 * config['r']}.") == 2


def test_diff_lists_differences(files: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = tmp_path / "other"
    shutil.copytree(files[0], other)
    assert run("diff", files[0], other) == 0
    assert capsys.readouterr().out == "the adapters are equal\n"
    change_tensors(other, lambda tensors: tensors[FACTOR].view(-1)[3:4].add_(0.5))
    config = json.loads((other / "adapter_config.json").read_text())
    (other / "adapter_config.json").write_text(json.dumps(config | {"alpha_pattern": {"blocks.1.v_proj": 12}}))
    v = "base_model.model.blocks.0.v_proj"
    change_tensors(other, lambda t: (t.pop(f"{v}.lora_A.weight"), t.pop(f"{v}.lora_B.weight")))
    assert run("diff", files[0], other) == 1
    assert capsys.readouterr().out.splitlines() == [
        "blocks.0.v_proj: layer only in the first",
        "blocks.0.q_proj.A: largest difference 0.5",
        "blocks.1.v_proj: scaling 1.5 and 6.0",
    ]


@pytest.mark.parametrize("bias", ["none", "all"])
@pytest.mark.parametrize("kind", [kind for kind in KINDS if "attention" not in kind and "expert" not in kind])
def test_an_adapter_does_not_differ_from_its_own_export(
    kind: str, bias: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    build, _, options = KINDS[kind]
    model = trained(seeded(build), **({"target_modules": ["layer"], "bias": bias} | options))
    write_checkpoint(model, tmp_path / "adapter.ckpt")
    save_adapter(model, tmp_path / "adapter")
    code = run("diff", tmp_path / "adapter.ckpt", tmp_path / "adapter")
    assert (code, capsys.readouterr().out) == (0, "the adapters are equal\n")


def test_checkpoints_that_load_into_different_modules_differ(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = trained(nn.Sequential(nn.Linear(4, 6)), target_modules=["0"])
    write_checkpoint(model, tmp_path / "one.ckpt")
    save_adapter(model, tmp_path / "adapter")
    assert run("import", tmp_path / "adapter", tmp_path / "other.ckpt", "--root", "net") == 0
    capsys.readouterr()
    assert run("diff", tmp_path / "one.ckpt", tmp_path / "other.ckpt") == 1
    assert capsys.readouterr().out.splitlines() == ["0: layer only in the first", "net.0: layer only in the second"]


def test_diff_sees_buffers_that_training_has_changed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    module = Toy()
    module.register_buffer("center", torch.zeros(3))
    (fit := trainer(LoRACallback(rank=2))).fit(module, loader())
    for name, value in {"one": 1.0, "other": 1.5}.items():
        module.center.fill_(value)
        fit.save_checkpoint(tmp_path / f"{name}.ckpt")
    capsys.readouterr()
    assert run("diff", tmp_path / "one.ckpt", tmp_path / "other.ckpt") == 1
    assert capsys.readouterr().out == "center: largest difference 0.5\n"


@pytest.mark.parametrize("part", ["real", "imag"])
def test_diff_sees_either_part_of_complex_numbers(
    part: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    module = Spectral()
    attach(module, LoRAConfig(rank=2, target_modules=["lin"], modules_to_save=["spec"]))
    for name in ("one", "other"):
        save_adapter(module, tmp_path / name)
    assert run("diff", tmp_path / "one", tmp_path / "other") == 0
    key = "base_model.model.spec.weight"
    change_tensors(tmp_path / "other", lambda tensors: getattr(tensors[key], part)[0].add_(0.5))
    capsys.readouterr()
    assert run("diff", tmp_path / "one", tmp_path / "other") == 1
    assert capsys.readouterr().out == "spec.weight: largest difference 0.5\n"
