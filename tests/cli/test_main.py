"""The ``lightning-lora`` command itself: usage, exit codes, errors and JSON."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lightning_lora import LoRACallback, LoRAConfig, add_adapter, attach
from lightning_lora.cli import main
from lightning_lora.cli.commands import COMMANDS
from tests.files import run, write_checkpoint
from tests.peft_format.kinds import WARNED
from tests.toys import Toy, loader, trainer

pytestmark = WARNED


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["unknown"],
        ["merge"],
        ["inspect"],
        ["merge", "a", "b", "c", "--dtype", "x"],
        ["plan", "base"],
        ["plan", "base", "--parameters", "1", "--rank", "1"],
        ["plan", "base", "--bytes", "3 apples"],
        ["plan", "base", "--rank", "0"],
        ["report"],
        ["report", "a", "--energy", "2"],
        ["compare"],
    ],
)
def test_wrong_usage_exits_with_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 2
    assert "usage: lightning-lora" in capsys.readouterr().err


@pytest.mark.parametrize(
    "command",
    [
        "inspect {missing}",
        "merge {missing} {base} {out}",
        "merge {adapter} {missing} {out}",
        "export {missing} {out}",
        "import {missing} {out}",
        "diff {adapter} {missing}",
        "verify {missing} {base}",
        "verify {adapter} {missing}",
        "report {missing}",
        "report {adapter} --base {missing}",
        "compare {adapter} {missing}",
        "plan {missing} --rank 4",
    ],
)
def test_missing_file_is_named_in_one_line(
    command: str, files: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    adapter, base = files
    places = {"adapter": adapter, "base": base, "missing": tmp_path / "missing.ckpt", "out": tmp_path / "out"}
    assert main([word.format(**places) for word in command.split()]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(f"lightning-lora: error: '{tmp_path / 'missing.ckpt'}")
    assert "does not exist" in err
    assert err.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("command", "answer"),
    [
        ("export {adapter} {out}", "is a directory, not a .ckpt; a PEFT directory needs no export"),
        (
            "export {checkpoint} {out} --root net",
            "root='net' holds nothing of the adapter, which trains blocks.0.q_proj",
        ),
        ("import {checkpoint} {out}", "is a file, not a PEFT directory"),
        (
            "inspect {adapter}/adapter_model.safetensors",
            "Name the directory with adapter_config.json that it belongs to",
        ),
        ("inspect {notes}", "The reader failed with UnpicklingError: Weights only load failed."),
        ("verify {checkpoint} {adapter}", "holds an adapter (adapter_config.json), not a base"),
        ("plan {base} --rank 9999", "blocks.0.q_proj, blocks.0.v_proj, blocks.1.q_proj and"),
    ],
)
def test_wrong_kind_of_input_is_explained_in_one_line(
    command: str, answer: str, files: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    adapter, base = files
    (tmp_path / "notes.ckpt").write_text("import this")
    assert run("import", adapter, tmp_path / "adapter.ckpt", "--root", "") == 0
    capsys.readouterr()
    places = {
        "adapter": adapter,
        "base": base,
        "checkpoint": tmp_path / "adapter.ckpt",
        "notes": tmp_path / "notes.ckpt",
    }
    assert main([word.format(**places, out=tmp_path / "out") for word in command.split()]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert answer in err
    assert err.count("\n") == 1
    assert "weights_only" not in err  # torch's advice to execute the file
    assert not (tmp_path / "out").exists()


def test_system_error_is_shown_without_number(
    files: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied", str(files[0]))

    monkeypatch.setattr("lightning_lora.loading.read_adapter", refuse)
    assert run("inspect", files[0]) == 1
    assert capsys.readouterr().err == f"lightning-lora: error: '{files[0]}': Permission denied.\n"


@pytest.mark.parametrize("command", COMMANDS)
def test_help_shows_options(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([command, "--help"]) == 0
    assert "--json" in capsys.readouterr().out


def test_json_output(files: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("merge", *files, tmp_path / "out", "--json", "--dtype", "bf16") == 0
    report = json.loads(capsys.readouterr().out)
    assert {entry["name"] for entry in report["merged"]} == {
        f"blocks.{i}.{part}.weight" for i in range(2) for part in ("q_proj", "v_proj")
    }
    assert all(0 < entry["rounding"] < 0.1 * entry["update"] for entry in report["merged"])
    assert run("verify", *files, "--json") == 0
    assert json.loads(capsys.readouterr().out)["fits"]
    assert run("diff", files[0], files[0], "--json") == 0
    assert json.loads(capsys.readouterr().out) == {"equal": True, "differences": []}


def test_commands_run_without_lightning(files: tuple[Path, Path]) -> None:
    script = f"""
import sys
from lightning_lora.cli import main
assert main(["inspect", {str(files[0])!r}]) == 0
assert main(["verify", {str(files[0])!r}, {str(files[1])!r}]) == 0
loaded = {{name.partition(".")[0] for name in sys.modules}}
assert not loaded & {{"lightning", "pytorch_lightning", "transformers", "peft"}}, loaded
"""
    outcome = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert outcome.returncode == 0, outcome.stderr


@pytest.mark.skipif(sys.platform == "win32", reason="pipes of POSIX")
def test_closed_pipe_gives_no_traceback(files: tuple[Path, Path]) -> None:
    command = [sys.executable, "-m", "lightning_lora", "inspect", str(files[0])]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait() == 128 + signal.SIGPIPE


def test_package_runs_command() -> None:
    outcome = subprocess.run([sys.executable, "-m", "lightning_lora"], capture_output=True, text=True, check=False)
    assert outcome.returncode == 2
    assert outcome.stderr.startswith("usage: lightning-lora")


def test_help_loads_no_tool_of_any_command() -> None:
    """How long it takes is measured by ``benchmarks/overhead.py``; what it takes the time for is known here."""
    script = """
import sys
from lightning_lora.cli import main
assert main(["--help"]) == 0
assert main(["plan", "--help"]) == 0
rooms = {name.split(".")[1] for name in sys.modules if name.startswith("lightning_lora.")}
tools = {"analysis", "calibration", "disk", "loading", "peft_format", "several", "storage", "trainer"}
others = {name.partition(".")[0] for name in sys.modules}
loaded = rooms & tools | others & {"lightning", "pytorch_lightning", "safetensors"}
assert not loaded, loaded
"""
    outcome = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert outcome.returncode == 0, outcome.stderr


# --- checkpoints of several adapters


@pytest.fixture(scope="module")
def several(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a checkpoint of two adapters, of which 'second' was trained."""
    path, module = tmp_path_factory.mktemp("several") / "several.ckpt", Toy()
    add_adapter(module, "first", LoRAConfig(rank=3))
    run_of = trainer(LoRACallback(adapter="second", save_adapters="all", rank=2), max_steps=1)
    run_of.fit(module, loader())
    run_of.save_checkpoint(path)
    return path


def test_inspect_lists_the_adapters_of_a_checkpoint(several: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("inspect", several) == 0
    assert "adapters in it: 'first', 'second'; this is 'second'\n" in capsys.readouterr().out
    assert run("inspect", several, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["adapter"], found["adapters"]) == ("second", ["first", "second"])
    assert {layer["rank"] for layer in found["layers"]} == {2}


@pytest.mark.parametrize("command", ["diff", "combine", "export", "report", "scale", "truncate"])
def test_commands_say_which_adapter_of_a_checkpoint_they_are_about(
    command: str, several: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more: dict[str, list[object]] = {
        "diff": [several],
        "combine": ["--weights", "1", "--out", tmp_path / "out"],
        "export": [tmp_path / "out"],
        "scale": ["2", "--out", tmp_path / "out"],
        "truncate": ["--energy", "0.9", "--out", tmp_path / "out"],
    }
    assert run(command, several, *more.get(command, [])) == 0
    assert f"{several} holds the adapters 'first', 'second'; this is about 'second'" in capsys.readouterr().err


def test_one_of_several_adapters_is_chosen_by_name(
    several: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.manual_seed(0)
    save_file(Toy().state_dict(), tmp_path / "base.safetensors")
    chosen = ("--adapter", "first")
    assert run("inspect", several, *chosen, "--json") == 0
    assert {layer["rank"] for layer in json.loads(capsys.readouterr().out)["layers"]} == {3}
    assert run("inspect", several, *chosen) == 0
    assert "adapters in it: 'first', 'second'; this is 'first'\n" in capsys.readouterr().out
    assert run("export", several, tmp_path / "peft", *chosen) == 0
    assert json.loads((tmp_path / "peft" / "adapter_config.json").read_text())["r"] == 3
    assert run("verify", several, tmp_path / "base.safetensors", *chosen, "--any-base") == 0
    assert run("merge", several, tmp_path / "base.safetensors", tmp_path / "out", *chosen, "--any-base") == 0
    assert "this is about" not in capsys.readouterr().err
    assert load_file(tmp_path / "out" / "model.safetensors").keys() == Toy().state_dict().keys()
    for command in (("inspect",), ("export", tmp_path / "other")):
        assert run(command[0], several, *command[1:], "--adapter", "third") == 1
        assert "'third'" in capsys.readouterr().err


def test_commands_say_nothing_of_a_single_adapter(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    module = Toy()
    attach(module, LoRAConfig(rank=2))
    path = write_checkpoint(module, tmp_path / "one.ckpt")
    assert run("inspect", path) == run("diff", path, path) == 0
    shown = capsys.readouterr()
    assert "adapters in it" not in shown.out
    assert not shown.err


def test_a_process_without_output_streams_ends_as_any_other(
    files: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdout", None)
    monkeypatch.setattr(sys, "stderr", None)
    assert main(["inspect", str(files[0])]) == 0
    assert main(["verify", *map(str, files)]) == 0
    assert main(["report", str(files[0]), "--base", str(files[1])]) == 0
    assert main(["inspect", "nowhere"]) == 1
