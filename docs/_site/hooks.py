"""What the site adds to MkDocs: parts of README.md, the repository's files that pages link to, and the command.

The pages are written for readers of the repository, too. So a link from a page to ``../examples/digits.py`` is right in
the repository; on the site it leads to a page that shows the file.
"""

from __future__ import annotations

import argparse
import json
import posixpath
import re
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[2]
OWN_PAGES = {
    "README.md": "index.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "examples/quickstart.ipynb": "tutorials/quickstart.md",
}
LANGUAGES = {".py": "python", ".yaml": "yaml", ".ipynb": "json", ".json": "json", ".tsv": "text", ".txt": "text"}
LARGEST_PAGE = 100_000  # bytes; a larger file is offered as it is
LINK = re.compile(r"(?<=\]\()(?![a-z]+:|#)([^)#\s]+)(#[^)\s]*)?(?=\))")
LABEL = re.compile(r"\[`[\w./]+\.md`\]\(([^)#\s]+)")  # a link that shows the path of its page
CODE = re.compile(r"(^ *```.*?^ *```[^\n]*$)", flags=re.M | re.S)
INCLUDE = re.compile(r"^<!-- README( text)?: (.+) -->$", flags=re.M)
NESTED = re.compile(r"^ {2,3}(?=\S)", flags=re.M)  # inside of a list
COMMAND = "<!-- the options of the command -->"

# How the search ranks pages: answers before records.
RECORDS = ("models.md", "quality.md", "benchmarks.md", "decisions.md", "changelog.md")
RANKING = {"reference/": 2.0} | dict.fromkeys(RECORDS, 0.3)

_source_of: dict[str, str] = {}  # page on the site -> file in the repository


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that come from files outside of ``docs``, and from the files that these link to in turn."""
    _source_of.clear()
    _source_of.update({file.src_uri: f"docs/{file.src_uri}" for file in files.documentation_pages()})
    for source, page in list(OWN_PAGES.items())[1:]:
        _add(source, page, files, config)
    waiting = list(_source_of)
    for page in waiting:
        source = _source_of.get(page, "")
        if not source.endswith(".md"):
            continue
        for linked in _links(with_readme((ROOT / source).read_text(), source), source):
            target = page_of(linked)
            if (ROOT / linked).is_file() and files.get_file_from_path(target) is None:
                _add(linked, target, files, config)
                waiting.append(target)
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Put in what a page includes, and point its links to pages of the site."""
    source = _source_of[page.file.src_uri]
    for start, boost in RANKING.items():
        if page.file.src_uri.startswith(start):
            page.meta["search"] = {"boost": boost}
    if source.endswith(".md"):
        markdown = with_titles(with_readme(markdown, source), source)
        markdown = with_links_of_site(markdown, source, page.file.src_uri)
        markdown = with_deep_lists(markdown)
    return markdown.replace(COMMAND, command_options()) if COMMAND in markdown else markdown


def page_of(path: str) -> str:
    """Return the page of the site, or the file on it, that shows a file of the repository."""
    if path in OWN_PAGES:
        return OWN_PAGES[path]
    if path.startswith("docs/"):
        return path.removeprefix("docs/")
    if path.endswith(".md") or not _is_shown(path):
        return f"repository/{path}"
    return f"repository/{path}.md"


def with_readme(markdown: str, source: str) -> str:
    """Replace each line ``<!-- README: Title -->`` by that section of README.md; ``README text``: without heading."""
    parts = re.split(r"^(?=## )", (ROOT / "README.md").read_text(), flags=re.M)
    sections = {part.partition("\n")[0].lstrip("# "): part for part in parts}

    def section(found: re.Match[str]) -> str:
        without_heading, title = found.groups()
        if title not in sections:
            raise PluginError(f"{source}: README.md has no section {title!r}; it has {', '.join(sections)}")
        text = sections[title].partition("\n")[2] if without_heading else sections[title]
        return with_links_of_site(text, "README.md", page_of(source), to=source).strip()

    return INCLUDE.sub(section, markdown)


def with_titles(markdown: str, source: str) -> str:
    """Return Markdown whose links to pages show their titles where they showed paths, which the site does not have."""

    def label(found: re.Match[str]) -> str:
        page = ROOT / _resolved(found[1], source)
        title = page.read_text().partition("\n")[0].lstrip("# ") if page.exists() else ""
        return f"[{title}]({found[1]}" if title and not title.startswith("<!--") else found[0]

    return _outside_code(lambda text: LABEL.sub(label, text), markdown)


def with_links_of_site(markdown: str, source: str, page: str, to: str | None = None) -> str:
    """Return Markdown of a file of the repository with its links as they are on the site, or as in the file ``to``."""
    folder = posixpath.dirname(page if to is None else to)

    def link(found: re.Match[str]) -> str:
        path = _resolved(found[1], source)
        target = path if to is not None else page_of(path)
        return posixpath.relpath(target, folder or ".") + (found[2] or "")

    return _outside_code(lambda text: LINK.sub(link, text), markdown)


def with_deep_lists(markdown: str) -> str:
    """Return Markdown with four spaces before what is inside of a list, as Python-Markdown wants it."""
    parts = CODE.split(markdown)
    for index, part in enumerate(parts):
        if index % 2 == 0:
            parts[index] = NESTED.sub("    ", part)
        elif NESTED.match(part):
            parts[index] = textwrap.indent(part, " " * (4 - len(part) + len(part.lstrip(" "))))
    return "".join(parts)


def command_options() -> str:
    """Return a section for each command of ``lightning-lora``, from its own parser."""
    from lightning_lora.cli import parser

    [commands] = [each for each in parser()._actions if isinstance(each, argparse._SubParsersAction)]
    return "\n\n".join(_command(name, parser) for name, parser in commands.choices.items())


def _command(name: str, parser: argparse.ArgumentParser) -> str:
    usage = parser.format_usage().removeprefix("usage: ").strip()
    usage = textwrap.fill(re.sub(r"\s+", " ", usage), 90, subsequent_indent="    ")
    rows = [f"- {_names(action)}: {_meaning(action)}" for action in parser._actions if action.dest != "help"]
    return "\n".join([f"## {name}", "", parser.description or "", "", "```text", usage, "```", "", *rows])


def _names(action: argparse.Action) -> str:
    metavar = action.metavar if isinstance(action.metavar, str) else action.dest.upper()
    if not action.option_strings:
        return f"`{metavar}`"
    takes = "" if action.nargs == 0 else f" {metavar}"
    return ", ".join(f"`{each}{takes}`" for each in action.option_strings)


def _meaning(action: argparse.Action) -> str:
    return (action.help or "") % vars(action) if "%" in (action.help or "") else action.help or ""


def _add(source: str, page: str, files: Files, config: MkDocsConfig) -> None:
    if not _is_shown(source) and not source.endswith(".md"):
        files.append(File.generated(config, page, abs_src_path=str(ROOT / source)))
        return
    text = (ROOT / source).read_text()
    if source.endswith(".ipynb"):
        text = "\n\n".join(_cell(cell) for cell in json.loads(text)["cells"])
    elif not source.endswith(".md"):
        language = LANGUAGES[Path(source).suffix]
        text = f"---\nsearch:\n  exclude: true\n---\n# {source}\n\n``````{language}\n{text}\n``````\n"
    files.append(File.generated(config, page, content=text))
    _source_of[page] = source


def _cell(cell: dict[str, Any]) -> str:
    text = "".join(cell["source"])
    if cell["cell_type"] == "markdown":
        return text
    shown = [f"```python\n{text}\n```"]
    for output in cell["outputs"]:
        if "text" in output:
            shown.append(f"```text\n{''.join(output['text'])}```")
        if picture := output.get("data", {}).get("image/png"):
            shown.append(f"![what the cell draws](data:image/png;base64,{picture})")
    return "\n\n".join(shown)


def _is_shown(path: str) -> bool:
    file = ROOT / path
    return Path(path).suffix in LANGUAGES and file.is_file() and file.stat().st_size <= LARGEST_PAGE


def _links(markdown: str, source: str) -> list[str]:
    text = "".join(CODE.split(markdown)[::2])
    return [_resolved(each[1], source) for each in LINK.finditer(text)]


def _resolved(link: str, source: str) -> str:
    return posixpath.normpath(posixpath.join(posixpath.dirname(source), link))


def _outside_code(change: Callable[[str], str], markdown: str) -> str:
    parts = CODE.split(markdown)
    return "".join(part if index % 2 else change(part) for index, part in enumerate(parts))
