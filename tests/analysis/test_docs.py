"""The code of docs/analysis.md runs, in order, as it stands there."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from lightning_lora import LoRAConfig, adapter_state_dict, attach, save_adapter
from lightning_lora.cli import main
from lightning_lora.state import describe
from lightning_lora.storage.checkpoint import RECORD_KEY
from tests.analysis.test_budget import blocks
from tests.contract import train_all

PAGE = (Path(__file__).parents[2] / "docs" / "analysis.md").read_text()


def base() -> nn.Module:
    torch.manual_seed(0)
    return blocks(2, 64)


def adapted(seed: int) -> nn.Module:
    model = base()
    attach(model, LoRAConfig(rank=4), seed=seed)
    train_all(model, torch.Generator().manual_seed(seed))
    return model


def test_python_blocks_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    pytest.importorskip("matplotlib")
    monkeypatch.chdir(tmp_path)
    planning, *rest = re.findall(r"```python\n(.*?)```", PAGE, flags=re.S)
    for seed in (0, 1):
        model = adapted(seed)
        torch.save({"state_dict": adapter_state_dict(model), RECORD_KEY: describe(model)}, f"seed{seed}.ckpt")
    names = {"LoRAConfig": LoRAConfig, "Path": Path, "model": blocks(2, 64)}
    exec(planning, names)
    promised, *_ = re.findall(r"```text\n(.*?)\.\.\.", PAGE, flags=re.S)
    said = capsys.readouterr().out
    assert said.startswith(promised)
    assert said.splitlines()[-1] == "4096"
    names |= {"model": adapted(0), "pretrained": nn.Sequential(nn.Linear(64, 64)), "batch": torch.randn(2, 64)}
    for block in rest:
        exec(block, names)
    said = capsys.readouterr().out
    assert said.startswith("Memory of a training step:")
    assert "8 updates; the suggested rank holds 99% of the squared norm" in said
    assert len(re.findall(r"^1\.o_proj \S+ tensor", said, flags=re.M)) == 1
    assert "At rank 4, the median update uses" in said
    assert {path.stem for path in tmp_path.glob("*.png")} == {"layers", "spectra", "energy", "phi", "cosine"}
    assert "What my adapter learned" in (tmp_path / "page.html").read_text(encoding="utf-8")


def test_commands_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.chdir(tmp_path)
    Path("base").mkdir()
    save_file(dict(base().state_dict()), "base/model.safetensors")
    for seed, name in enumerate(("adapter", "other")):
        save_adapter(adapted(seed), name)
    [commands] = re.findall(r"```bash\n(.*?)```", PAGE, flags=re.S)
    for line in commands.splitlines():
        program, *arguments = shlex.split(line, comments=True)
        assert (program, main(arguments)) == ("lightning-lora", 0)
    assert Path("page.html").stat().st_size > 1000
