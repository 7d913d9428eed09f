"""``lightning-lora report``, ``compare`` and ``plan``: their output, files and errors."""

from __future__ import annotations

import io
import json
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from lightning_lora import LoRAConfig, attach, save_adapter
from lightning_lora.analysis import analyze, compare, layer_similarity
from tests.analysis.test_reports import Outline
from tests.contract import train_all
from tests.files import run
from tests.peft_format.models import QUIET, mixtral, trained

pytestmark = QUIET


def model() -> nn.Module:
    torch.manual_seed(0)
    blocks = (nn.ModuleDict({"up": nn.Linear(12, 20), "down": nn.Linear(20, 12)}) for _ in range(3))
    return nn.ModuleDict({"h": nn.ModuleList(blocks)})


def adapted(rank: int, seed: int) -> nn.Module:
    found = model()
    attach(found, LoRAConfig(rank=rank))
    train_all(found, torch.Generator().manual_seed(seed))
    return found


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """A folder with two adapters and their base."""
    save_adapter(adapted(2, 0), tmp_path / "one")
    save_adapter(adapted(3, 1), tmp_path / "other")
    save_file(dict(model().state_dict()), tmp_path / "base.safetensors")
    return tmp_path


def as_json(capsys: pytest.CaptureFixture[str], *arguments: object) -> dict[str, Any]:
    capsys.readouterr()
    assert run(*arguments, "--json") == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


# --- report


def test_report_matches_analyze(files: Path, capsys: pytest.CaptureFixture[str]):
    analysis = analyze(adapted(2, 0), intruders=True)
    found = as_json(capsys, "report", files / "one", "--base", files / "base.safetensors", "--intruders")
    assert found["rank_pattern"] == {"up": 2, "down": 2}
    by_name = {layer.name: layer for layer in analysis.layers}
    assert {layer["name"] for layer in found["layers"]} == by_name.keys()
    for layer in found["layers"]:
        expected = by_name[layer["name"]]
        assert layer["intruders"] == expected.intruders
        assert layer["relation"]["amplification"] == pytest.approx(expected.relation.amplification, rel=1e-6)
    assert run("report", files / "one", "--energy", "0.5") == 0
    said = capsys.readouterr().out
    assert "holds 50% of the squared norm" in said
    assert "- At rank 2, the median update uses" in said


def test_report_writes_page_and_pictures(files: Path, capsys: pytest.CaptureFixture[str]):
    pytest.importorskip("matplotlib")
    out = ("--out", files / "page.html", "--pictures", files / "new" / "pictures")
    assert run("report", files / "one", "--base", files / "base.safetensors", *out) == 0
    assert "wrote 9 pictures" in capsys.readouterr().err
    assert len(Outline((files / "page.html").read_text(encoding="utf-8")).named("svg")) == 9
    pictures = list((files / "new" / "pictures").iterdir())
    assert {"ratio.png", "amplification.png", "spectra.png", "energy.png"} <= {each.name for each in pictures}
    for picture in pictures:
        head = picture.read_bytes()[:24]
        assert head.startswith(b"\x89PNG")
        assert min(struct.unpack(">II", head[16:])) > 150


def test_pictures_need_matplotlib_and_text_does_not(
    files: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert run("report", files / "one", "--out", files / "page.html") == 0
    assert "without pictures: they need pip install 'lightning-lora[plots]'" in capsys.readouterr().err
    found = Outline((files / "page.html").read_text(encoding="utf-8"))
    assert found.named("table")
    assert not found.named("svg")
    assert run("compare", files / "one", files / "other", "--pictures", files / "pictures") == 1
    assert "pip install 'lightning-lora[plots]'" in capsys.readouterr().err
    assert not (files / "pictures").exists()


# --- compare


def test_compare_matches_analysis(files: Path, capsys: pytest.CaptureFixture[str]):
    expected = {layer.name: layer for layer in compare(adapted(2, 0), adapted(3, 1)).layers}
    found = as_json(capsys, "compare", files / "one", files / "other")
    assert {layer["name"] for layer in found["layers"]} == expected.keys()
    for layer in found["layers"]:
        assert layer["cosine"] == pytest.approx(expected[layer["name"]].cosine, abs=1e-6)
        assert layer["of_inputs"]["all"] == pytest.approx(expected[layer["name"]].of_inputs.all, abs=1e-6)
    assert run("compare", files / "one", files / "other", "--out", files / "page.html") == 0
    assert "- The leading input directions overlap by" in capsys.readouterr().out
    assert "What two adapters share" in (files / "page.html").read_text(encoding="utf-8")


def test_compare_of_one_adapter_compares_layers(files: Path, capsys: pytest.CaptureFixture[str]):
    expected = layer_similarity(adapted(2, 0))
    found = as_json(capsys, "compare", files / "one")
    assert [kind["kind"] for kind in found["kinds"]] == ["down", "up"]
    up = next(each for each in expected if each.kind == "up")
    assert found["kinds"][1]["inputs"][0][1] == pytest.approx(float(up.inputs[0, 1]), abs=1e-4)
    assert run("compare", files / "one", "--out", files / "page.html") == 0
    assert capsys.readouterr().out.splitlines()[1].split() == ["kind", "of", "layer", "blocks", "inputs", "outputs"]
    alone = nn.ModuleDict({"layer": nn.Linear(12, 20)})
    attach(alone, LoRAConfig(rank=2))
    save_adapter(alone, files / "alone")
    assert run("compare", files / "alone") == 1
    assert "at least two layers of the same kind" in capsys.readouterr().err


@pytest.mark.parametrize("command", [("report", "one"), ("compare", "one", "other"), ("compare", "one")])
def test_pages_and_pictures_are_replaced_only_if_asked(
    command: tuple[str, ...], files: Path, capsys: pytest.CaptureFixture[str]
):
    pytest.importorskip("matplotlib")
    name, *adapters = command
    folder, page = files / "pictures", files / "page.html"
    arguments = (name, *(files / each for each in adapters))
    folder.mkdir()
    for old, option, place in (
        (page, "--out", page),
        (folder / "mine.png", "--pictures", folder),
    ):
        old.write_text("mine", encoding="utf-8")
        assert run(*arguments, option, place) == 1
        out, err = capsys.readouterr()
        assert out == ""
        assert f"{old.name}' exists already; nothing was written" in err
        assert "--overwrite" in err
        assert old.read_text(encoding="utf-8") == "mine"
    assert list(folder.iterdir()) == [folder / "mine.png"]
    assert run(*arguments, "--out", page, "--pictures", folder, "--overwrite") == 0
    assert "<html" in page.read_text(encoding="utf-8")
    assert len(list(folder.iterdir())) > 1


@pytest.mark.parametrize("command", [("report", "one"), ("compare", "other", "one"), ("compare", "one")])
def test_page_never_replaces_what_is_read(command: tuple[str, ...], files: Path, capsys: pytest.CaptureFixture[str]):
    name, *adapters = command
    written = files / "one.ckpt"
    (files / "folder").mkdir()
    assert run("import", files / "one", written, "--root", "") == 0
    before = written.read_bytes()
    read = [written if each == "one" else files / each for each in adapters]
    assert run(name, *read, "--out", files / "folder" / ".." / written.name, "--overwrite") == 1
    assert "is read here and would be lost" in capsys.readouterr().err
    assert written.read_bytes() == before


# --- plan


def test_plan_reads_base_files(files: Path, capsys: pytest.CaptureFixture[str]):
    found = as_json(capsys, "plan", files / "base.safetensors", "--rank", 2)
    costs = {tuple(choice["targets"]): choice["parameters"] for choice in found["choices"]}
    assert costs == {("all-linear",): 2 * 3 * 2 * 32, ("down",): 2 * 3 * 32, ("up",): 2 * 3 * 32}
    assert found["base_parameters"] == sum(p.numel() for p in model().parameters())
    assert run("plan", files / "base.safetensors", "--parameters", "0.2k", "--group", "up") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("A budget of 200 parameters")
    assert lines[3].split()[:4] == ["up", "3", "2", "192"]


@pytest.mark.parametrize(
    ("option", "words"),
    [
        (("--parameters", "4.7M"), "4,700,000 parameters"),
        (("--parameters", "18,874,368"), "18,874,368 parameters"),
        (("--bytes", "35MB"), "35.0 MB of factors in float32"),
        (("--bytes", "1MiB", "--dtype", "bfloat16"), "1.0 MB of factors in bfloat16"),
        (("--optimizer-bytes", "1e6"), "1.0 MB of optimizer state"),
    ],
)
def test_budget_accepts_units(option: tuple[str, ...], words: str, files: Path, capsys: pytest.CaptureFixture[str]):
    assert run("plan", files / "base.safetensors", *option) == 0
    assert capsys.readouterr().out.startswith(f"A budget of {words} for")


def test_plan_names_heads_it_leaves_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    names = ("layers.0.q", "layers.0.v", "lm_head")
    save_file({f"{name}.weight": torch.zeros(16, 16) for name in names}, tmp_path / "model.safetensors")
    assert as_json(capsys, "plan", tmp_path, "--rank", 2)["left_out"] == ["lm_head"]
    found = as_json(capsys, "plan", tmp_path, "--rank", 2, "--targets", "q,lm_head")
    assert found["choices"][0]["targets"] == ["q", "lm_head"]
    assert found["left_out"] == []
    assert run("plan", tmp_path, "--rank", 2) == 0
    assert "left out, as output layers: lm_head" in capsys.readouterr().out


# --- errors


def test_problem_is_one_line_and_exits_with_1(files: Path, capsys: pytest.CaptureFixture[str]):
    for arguments, said in (
        (("report", files / "nowhere"), "nowhere"),
        (("report", files / "one", "--intruders"), "give --base"),
        (("report", files / "one", "--out", files), "must be a file in a folder that exists"),
        (("report", files / "one", "--pictures", files / "base.safetensors"), "is a file; name a folder"),
        (("report", files / "one", "--base", files / "nowhere"), "does not exist"),
        (("plan", files / "nowhere", "--rank", "2"), "does not exist"),
        (("plan", files / "base.safetensors", "--rank", "2", "--group", "upp"), "the model has no upp; its groups are"),
        (("plan", files / "base.safetensors", "--rank", "2", "--targets", "upp"), "Closest names: 'up'"),
    ):
        assert run(*arguments) == 1
        out, err = capsys.readouterr()
        assert out == ""
        assert err.startswith("lightning-lora: error: ")
        assert err.count("\n") == 1
        assert said in err


def test_layer_with_nan_is_named(files: Path, capsys: pytest.CaptureFixture[str]):
    tensors = load_file(files / "one" / "adapter_model.safetensors")
    tensors["base_model.model.h.1.up.lora_B.weight"][0, 0] = torch.nan
    save_file(tensors, files / "one" / "adapter_model.safetensors")
    for command in (("report", files / "one"), ("compare", files / "other", files / "one"), ("compare", files / "one")):
        assert run(*command) == 1
        assert "The factors of 'h.1.up' contain NaN or infinity" in capsys.readouterr().err
    assert run("inspect", files / "one") == 1
    assert "not finite" in capsys.readouterr().out
    assert run("inspect", files / "one", "--json") == 1
    out = capsys.readouterr().out
    found = json.loads(out, parse_constant=lambda constant: pytest.fail(f"{constant} is no JSON"))
    assert {layer["name"]: layer["norm"] is None for layer in found["layers"]}["h.1.up"]


def test_report_of_ambiguous_experts_needs_base(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    model = mixtral()
    save_file(dict(model.state_dict()), tmp_path / "base.safetensors")
    names = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    trained(model, target_modules=["q_proj"], target_parameters=names, rank_pattern={"*.down_proj": 3})
    save_adapter(model, tmp_path / "adapter")
    out = ("--base", tmp_path / "base.safetensors", "--out", tmp_path / "page.html")
    assert run("report", tmp_path / "adapter", *out) == 0
    assert "layers are not compared with each other" in capsys.readouterr().err
    assert run("report", tmp_path / "adapter") == 1
    assert "Give the model as base" in capsys.readouterr().err


def test_progress_is_drawn_on_terminal(
    files: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    watched = Terminal()
    monkeypatch.setattr(sys, "stderr", watched)
    assert run("report", files / "one", "--base", files / "base.safetensors") == 0
    assert watched.getvalue().endswith("100 %  6 of 6\n")
    assert "\ranalyzing [" in watched.getvalue()


def test_analysis_commands_run_without_matplotlib(files: Path):
    script = f"""
import sys
from lightning_lora.cli import main
assert main(["report", {str(files / "one")!r}, "--base", {str(files / "base.safetensors")!r}]) == 0
assert main(["compare", {str(files / "one")!r}, {str(files / "other")!r}]) == 0
assert main(["plan", {str(files / "base.safetensors")!r}, "--rank", "2"]) == 0
loaded = {{name.partition(".")[0] for name in sys.modules}}
assert not loaded & {{"lightning", "pytorch_lightning", "transformers", "peft", "matplotlib"}}, loaded
"""
    outcome = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert outcome.returncode == 0, outcome.stderr


def test_report_refuses_other_base_unless_allowed(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_file({name: tensor + 1 for name, tensor in model().state_dict().items()}, files / "second.safetensors")
    assert run("report", files / "one", "--base", files / "second.safetensors") == 1
    assert "was trained on a different base" in capsys.readouterr().err
    assert run("report", files / "one", "--base", files / "second.safetensors", "--any-base") == 0
