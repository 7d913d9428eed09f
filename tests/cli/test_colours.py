"""Colours go to terminals alone, and to none whose user said no."""

from __future__ import annotations

import io
import subprocess
import sys
from pathlib import Path

import pytest

from lightning_lora.cli import main
from lightning_lora.cli.text import BAD, highlighted, painted, wants_colours


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture(autouse=True)
def _plain_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("NO_COLOR", "TERM"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize(
    ("environment", "wanted"),
    [
        ({}, True),
        ({"NO_COLOR": "1"}, False),
        ({"NO_COLOR": ""}, True),
        ({"TERM": "dumb"}, False),
        ({"TERM": "xterm"}, True),
    ],
)
def test_the_environment_decides_on_a_terminal(
    environment: dict[str, str], wanted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert wants_colours(Terminal()) == wanted
    assert not wants_colours(io.StringIO())


def test_what_stands_out_is_painted_and_nothing_else() -> None:
    line = "blocks.0  2  not finite"
    assert highlighted(line, Terminal()) == f"blocks.0  2  \x1b[{BAD}mnot finite\x1b[0m"
    for same in ("blocks.0  2  0.5", "- one", "-1"):
        assert highlighted(same, Terminal()) == same
    assert highlighted(line, io.StringIO()) == line


def test_errors_are_red_on_a_terminal(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    assert main(["inspect", str(tmp_path / "nothing")]) == 1
    assert painted("error:", BAD, terminal) in terminal.getvalue()
    monkeypatch.setenv("NO_COLOR", "1")
    assert main(["inspect", str(tmp_path / "nothing")]) == 1
    assert terminal.getvalue().count("\x1b[") == 2


@pytest.mark.slow
def test_the_command_is_there_soon_after_torch() -> None:
    script = """
import time, torch
started = time.process_time()
from lightning_lora.cli import main
main(["--help"])
print("seconds", time.process_time() - started)
"""
    runs = [
        subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True) for _ in range(3)
    ]
    assert min(float(run.stdout.split()[-1]) for run in runs) < 0.3
