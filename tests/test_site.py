"""The documentation site builds strictly, shows every public name and option, and needs no other host."""

from __future__ import annotations

import inspect
import json
import re
import subprocess
import sys
from html import unescape
from pathlib import Path

import pytest

import lightning_lora
from lightning_lora import LoRACallback, LoRAConfig, LoRASweep, analysis
from lightning_lora.cli.commands import COMMANDS

pytest.importorskip("mkdocs")
pytest.importorskip("mkdocstrings")

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
PUBLIC = [f"lightning_lora.{name}" for name in lightning_lora.__all__]
PUBLIC += [f"lightning_lora.analysis.{name}" for name in analysis.__all__]
PUBLIC += [f"lightning_lora.layers.{name}" for name in ("Adapter", "LowRankAdapter", "LinearAdapter")]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of the built site; any warning, such as one of a broken link or anchor, ends the build."""
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-5000:]
    return folder


def lines_of(page: Path) -> str:
    """Return what a page says, without tags."""
    return unescape(re.sub(r"<[^>]+>", "", page.read_text()))


def text_of(page: Path) -> str:
    """Return what a page says, without tags and line breaks."""
    return " ".join(lines_of(page).split())


def test_every_public_name_has_a_place(site: Path) -> None:
    pages = "".join(page.read_text() for page in (site / "reference").rglob("*.html"))
    places = set(re.findall(r'<h[23][^>]* id="([^"]+)"', pages))
    assert [name for name in PUBLIC if name not in places] == []


@pytest.mark.parametrize(("page", "shown"), [("callback", LoRACallback), ("config", LoRAConfig), ("sweep", LoRASweep)])
def test_every_option_has_type_default_and_meaning(page: str, shown: type, site: Path) -> None:
    text = text_of(site / "reference" / page / "index.html")
    default_config = LoRAConfig()
    for option in inspect.signature(shown).parameters.values():
        found = re.search(f" {option.name}" r" \(([^\u2013]+?), default: ([^\u2013]+?) ?\) \u2013 (\S+ \S+)", text)
        assert found is not None, option.name
        kind, default, _meaning = found.groups()
        assert kind not in ("", "Any"), option.name
        expected = getattr(default_config, option.name, option.default)
        assert eval(default) == expected, option.name


def test_every_command_and_its_options_are_shown(site: Path) -> None:
    text = text_of(site / "reference" / "command" / "index.html")
    for name, (run, _) in COMMANDS.items():
        assert f"{name}¶ {run.__doc__}" in text
        assert f"lightning-lora {name} [-h]" in text


def test_every_section_of_the_readme_is_shown_whole(site: Path) -> None:
    pages = [site / page / "index.html" for page in ("", "tour", "how_it_works")]
    text, lines = ("".join(read(page) for page in pages) for read in (text_of, lines_of))
    for section in re.split(r"^## ", (ROOT / "README.md").read_text(), flags=re.M)[1:]:
        title = section.partition("\n")[0]
        if title not in ("How it works", "More"):
            assert f" {title}\u00b6 " in text
        for code in re.findall(r"```\w+\n(.*?)```", section, flags=re.S):
            assert code.strip() in lines, title


def test_site_needs_no_other_host(site: Path) -> None:
    for page in site.rglob("*.html"):
        loaded = re.findall(r'<(?:script|img|link|iframe)\b[^>]*(?:src|href)="?(?:https?:)?//[^>]*', page.read_text())
        assert loaded == [], page
    for style in site.rglob("*.css"):
        assert not re.search(r"url\([\"']?(https?:)?//", style.read_text()), style


def test_search_knows_every_page(site: Path) -> None:
    known = {entry["location"] for entry in json.loads((site / "search" / "search_index.json").read_text())["docs"]}
    built = [f"{page.parent.relative_to(site)}/".removeprefix("./") for page in site.rglob("index.html")]
    unknown = [page for page in built if page not in known and not page.startswith("repository/")]
    assert unknown == []


def test_files_that_pages_link_to_are_shown(site: Path) -> None:
    page = text_of(site / "repository" / "examples" / "digits.py" / "index.html")
    assert "class DigitClassifier(LightningModule):" in page
    assert (site / "repository" / "benchmarks" / "zoo.json").exists()
