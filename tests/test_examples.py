"""Run the examples as a user does, in separate processes, and check what they print and write."""

from __future__ import annotations

import importlib
import json
import os
import re
import shlex
import statistics
import struct
import subprocess
import sys
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")
pytest.importorskip("jsonargparse")

import matplotlib
from matplotlib.figure import Figure

from lightning_lora.cli import main
from tests.analysis.test_plots import check_labels
from tests.processes import run

pytestmark = pytest.mark.slow

EXAMPLES = Path(__file__).parents[1] / "examples"


class Run(NamedTuple):
    folder: Path
    printed: str
    results: dict[str, Any]

    def row(self, method: str) -> dict[str, Any]:
        [row] = [row for row in self.results["table"] if row["method"] == method]
        return row


def execute(script: str, *arguments: str, folder: Path) -> str:
    """Run an example and return its output; relative paths in its options refer to the folder."""
    return run(EXAMPLES / script, *arguments, folder=folder, COLUMNS=120)


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("digits")
    command = [sys.executable, str(EXAMPLES / "digits.py"), "--fast", "--output", str(folder)]  # as `make demo` does
    environment = os.environ | {"OMP_NUM_THREADS": "1", "COLUMNS": "120"}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return Run(folder, done.stdout + done.stderr, json.loads((folder / "digits.json").read_text()))


def test_frozen_base_knows_only_old_domain(digits):
    base = digits.row("frozen base")
    assert base["old"] > 0.9
    assert base["new"] < 0.3


def test_lora_matches_full_fine_tuning_on_new_domain(digits):
    lora, full = digits.row("LoRA, switched on"), digits.row("full fine-tuning")
    assert lora["new"] > digits.row("frozen base")["new"] + 0.4
    assert lora["new"] > full["new"] - 0.1


def test_disabled_lora_has_base_accuracy(digits):
    off, base = digits.row("LoRA, switched off"), digits.row("frozen base")
    assert (off["old"], off["new"]) == (base["old"], base["new"])
    assert digits.row("full fine-tuning")["old"] < base["old"] - 0.2  # so there was something to forget


def test_lora_trains_and_stores_small_share(digits):
    lora, full = digits.row("LoRA, switched on"), digits.row("full fine-tuning")
    assert 0 < lora["trainable"] < full["trainable"] / 10
    assert lora["bytes"] == (digits.folder / "lora_shifted" / "last.ckpt").stat().st_size
    assert lora["bytes"] < full["bytes"] / 5


def test_each_adapter_solves_its_own_task(digits):
    swaps = digits.results["swaps"]
    assert swaps["shifted"]["shifted"] == digits.row("LoRA, switched on")["new"]
    assert swaps["shifted"]["shifted"] > swaps["parity"]["shifted"] + 0.4
    assert swaps["parity"]["parity"] > 0.8
    assert swaps["parity"]["parity"] > swaps["shifted"]["parity"] + 0.4


def test_one_batch_asks_both_tasks(digits):
    routed, swaps = digits.results["routed"], digits.results["swaps"]
    assert routed["images"] == 2 * 397
    both = (swaps["shifted"]["shifted"] + swaps["parity"]["parity"]) / 2
    assert routed["accuracy"] == pytest.approx(both, abs=1e-6)
    assert routed["largest_difference"] < 1e-4  # other batch sizes may be summed in another order


def test_swap_and_detach_are_exact(digits):
    assert digits.results["swap_is_exact"] is True
    assert digits.results["detach_is_exact"] is True
    assert digits.printed.count("bit for bit: yes") == 2


def test_merged_model_matches_adapted_model(digits):
    merged = digits.results["merged"]
    assert merged["lora_layers"] == 0
    assert merged["largest_difference"] < 1e-3
    assert merged["accuracy"] == pytest.approx(digits.row("LoRA, switched on")["new"], abs=0.005)


def test_table_shows_measured_numbers(digits):
    lora = digits.row("LoRA, switched on")
    [line] = [line for line in digits.printed.splitlines() if line.startswith("LoRA, switched on")]
    shown = line.removeprefix("LoRA, switched on").split()
    numbers = [f"{lora['old']:.1%}", f"{lora['new']:.1%}", f"{lora['trainable']:,}", f"{lora['bytes']:,}"]
    assert shown == [*numbers, f"{lora['step_ms']:.1f}", "ms"]


def test_output_has_progress_bars_and_no_warnings(digits):
    assert "150/150" in digits.printed
    assert not re.findall(r".*\.py:\d+: .*", digits.printed)  # the format of warnings in Lightning and Python


def test_picture_is_large_png(digits):
    head = (digits.folder / "digits.png").read_bytes()[:24]
    assert head.startswith(b"\x89PNG")
    width, height = struct.unpack(">II", head[16:])
    assert width > 1200
    assert height > 900


def test_no_label_of_the_picture_lies_on_another(digits, importable, monkeypatch):
    importable(EXAMPLES)
    images = torch.utils.data.TensorDataset(torch.rand(20, 8, 8), torch.arange(20) % 10)
    drawn = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, path: drawn.append(figure))
    with matplotlib.rc_context():
        importlib.import_module("digits_report").draw(digits.results, images, images, Path("unused"))
        check_labels(drawn[0])


def cli(command: str, *arguments: str, folder: Path) -> str:
    return execute("digits_cli.py", command, "--config", str(EXAMPLES / "digits.yaml"), *arguments, folder=folder)


def test_a_sweep_finds_settings_and_draws_its_page(tmp_path):
    printed = execute("digits_sweep.py", "--fast", "--output", str(tmp_path), folder=tmp_path)
    table, results = printed.partition("% of the test images")[::2]
    assert table.count("rank=16") > 3
    assert "digits.py (lr=0.01, rank=4)" in results
    assert "The sweep" in (tmp_path / "sweep.html").read_text()
    assert (tmp_path / "pictures" / "sweep_rates.png").exists()


def test_yaml_trains_adapter_for_second_run(digits, tmp_path):
    base = f"--model.base={digits.folder / 'base'}"
    printed = cli("fit", base, "--data.steps=150", folder=tmp_path)
    assert re.search(r"all-linear +14 +4 ", printed)  # 14 layers of rank 4
    assert not re.findall(r".*\.py:\d+: .*", printed)
    printed = cli("test", base, "--ckpt_path=examples/output/cli/last.ckpt", folder=tmp_path)
    accuracy = float(re.search(r"test_acc\D+(\d\.\d+)", printed)[1])
    assert accuracy > digits.row("frozen base")["new"] + 0.4


def test_flags_override_yaml(digits, tmp_path):
    base = f"--model.base={digits.folder / 'base'}"
    flags = ("--data.steps=2", "--trainer.callbacks.rank=2", "--trainer.callbacks.target_modules=[q,v]")
    printed = cli("fit", base, *flags, folder=tmp_path)
    assert re.search(r"q +2 +2 ", printed)  # two layers of rank 2
    assert re.search(r"v +2 +2 ", printed)


def test_cli_trains_missing_base(tmp_path):
    printed = cli("fit", "--model.base=new/base", "--data.steps=2", folder=tmp_path)
    assert "base: 1000 labeled images" in printed
    assert (tmp_path / "new" / "base" / "last.ckpt").is_file()


@pytest.fixture(scope="module")
def section7(tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("section7")
    printed = execute("paper_section7.py", "--quick", "--output", str(folder), folder=folder)
    return Run(folder, printed, json.loads((folder / "section7.json").read_text()))


def test_section7_spends_one_budget(section7):
    rows = section7.results["7.1 matrices"]
    assert [(row["targets"], row["rank"]) for row in rows] == [
        (["q"], 16),
        (["q", "v"], 8),
        (["q", "k", "v", "proj"], 4),
    ]
    assert {row["parameters"] for row in rows} == {section7.results["budget"]}
    assert len({score for row in rows for score in row["accuracies"]}) > 3
    shared = [row for row in rows if row["targets"] == ["q", "v"]]
    assert shared == [row for row in section7.results["7.2 ranks"] if row["rank"] == 8]  # trained once


def test_section7_findings_come_from_numbers(section7):
    found = section7.results["findings"]
    assert [finding["section"] for finding in found] == ["7.1", "7.1", "7.2", "7.2", "7.2", "7.3", "7.3"]
    rows = section7.results["7.3 relation"]
    low, high = (statistics.median(row["amplification"] for row in rows if row["rank"] == rank) for rank in (8, 32))
    assert f"{low:.1f} at rank 8 and {high:.1f} at rank 32" in found[-1]["found"]
    assert (found[-1]["verdict"] == "It shows here.") is (low > max(2.0, high))
    for finding in found:
        assert finding["found"] in section7.printed


def test_section7_page_is_one_file_with_pictures(section7):
    html = (section7.folder / "section7.html").read_text(encoding="utf-8")
    pictures = {path.stem for path in section7.folder.glob("*.png")}
    assert pictures == {
        "budget",
        "ranks",
        "phi_ranks",
        "phi_seeds",
        "effective_rank",
        "ratio",
        "amplification",
        "alignment",
    }
    assert html.count("<svg ") == len(pictures)
    for finding in section7.results["findings"]:
        assert escape(finding["found"]) in html
    assert not re.findall(r".*\.py:\d+: .*", section7.printed)
    assert "9/9" in section7.printed  # the base, three groups and one more rank, from two seeds


def test_readme_commands_run_on_example_output(digits, tmp_path, monkeypatch, capsys):
    import torch
    from safetensors.torch import load_file, save_file

    monkeypatch.chdir(tmp_path)
    (tmp_path / "base").mkdir()
    base = torch.load(next((digits.folder / "base").glob("*.ckpt")), weights_only=True)["state_dict"]
    save_file(base, tmp_path / "base" / "model.safetensors")
    (tmp_path / "base" / "config.json").write_text('{"model_type": "digits"}')
    for name, source in (("adapter.ckpt", "lora_shifted"), ("other.ckpt", "lora_shifted")):
        (tmp_path / name).write_bytes((digits.folder / source / "last.ckpt").read_bytes())
    readme = (EXAMPLES.parent / "README.md").read_text()
    lines = [line for line in readme.splitlines() if re.match(r"lightning-lora [a-z]+ .*(adapter\.ckpt|tuned)", line)]
    assert len(lines) >= 6
    for line in lines:
        assert main(shlex.split(line, comments=True)[1:]) == 0, capsys.readouterr().err
    assert "the one that the adapter was trained on" in capsys.readouterr().out
    merged = load_file(tmp_path / "whole" / "model.safetensors")
    assert [name for name in base if not torch.equal(merged[name], base[name])]
