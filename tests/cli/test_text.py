"""Colors and the progress bar."""

from __future__ import annotations

import io
import sys
from pathlib import Path

import pytest

from lightning_lora.cli import main
from lightning_lora.cli.text import BAD, highlighted, painted, progress_bar, wants_colors


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
def test_environment_decides_about_colors(
    environment: dict[str, str], wanted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert wants_colors(Terminal()) == wanted
    assert not wants_colors(io.StringIO())


def test_only_important_words_are_colored() -> None:
    line = "blocks.0  2  not finite"
    assert highlighted(line, Terminal()) == f"blocks.0  2  \x1b[{BAD}mnot finite\x1b[0m"
    for same in ("blocks.0  2  0.5", "- one", "-1"):
        assert highlighted(same, Terminal()) == same
    assert highlighted(line, io.StringIO()) == line


def test_errors_are_red_on_terminal(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    assert main(["inspect", str(tmp_path / "nothing")]) == 1
    assert painted("error:", BAD, terminal) in terminal.getvalue()
    monkeypatch.setenv("NO_COLOR", "1")
    assert main(["inspect", str(tmp_path / "nothing")]) == 1
    assert terminal.getvalue().count("\x1b[") == 2


def test_progress_bar_reaches_end() -> None:
    stream = io.StringIO()
    draw = progress_bar(stream)
    for done in range(0, 2001):
        draw(done, 2000)
    assert stream.getvalue().count("\r") == 101
    assert stream.getvalue().endswith("100 %  2 kB of 2 kB\n")
