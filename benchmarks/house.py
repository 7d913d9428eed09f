"""The size and structure of the code: how much there is, and how much of it one simple use runs through.

    python benchmarks/house.py [--package FOLDER]

Uses only the standard library: lines and imports are counted in the source, calls by ``sys.setprofile``. It can also
measure the package of another checkout, for comparison.
"""

from __future__ import annotations

import argparse
import ast
import json
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

NAME = "lightning_lora"
OWN = Path(__file__).parents[1] / NAME


class Figure(NamedTuple):
    """One row of the table: the quantity, its value and its target, an upper bound."""

    quantity: str
    value: int
    reach: int | None = None

    @property
    def verdict(self) -> str:
        """Whether the target is reached."""
        if self.reach is None:
            return ""
        return "reached" if self.value <= self.reach else "missed"


# --- the source


def sources(package: Path) -> dict[str, ast.Module]:
    """Return the parsed source of every file by module name."""
    found = {}
    for path in sorted(package.rglob("*.py")):
        parts = [NAME, *path.relative_to(package).with_suffix("").parts]
        found[".".join(part for part in parts if part != "__init__")] = ast.parse(path.read_text(), str(path))
    return found


def imported(tree: ast.Module, modules: Sequence[str]) -> set[str]:
    """Return the given modules that a source imports, at any place."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                found.add(full if full in modules else node.module)
    return found & set(modules)


def _lines(package: Path) -> dict[Path, int]:
    return {path: len(path.read_text().splitlines()) for path in package.rglob("*.py")}


def _methods(trees: dict[str, ast.Module], suffix: str, name: str) -> int:
    """Count the methods and properties of a class in the first module whose name ends like this."""
    for module, tree in trees.items():
        for node in tree.body:
            if module.endswith(suffix) and isinstance(node, ast.ClassDef) and node.name == name:
                own = [each.name for each in node.body if isinstance(each, ast.FunctionDef)]
                return len([each for each in own if each != "__init__"])
    return 0


def _own_imports(tree: ast.Module) -> int:
    """Count the import statements of the package's own modules at the top level of a source."""
    return sum(1 for node in tree.body if isinstance(node, ast.ImportFrom) and (node.module or "").startswith(NAME))


def _exports(tree: ast.Module) -> int:
    """Count the names in ``__all__``."""
    for node in tree.body:
        if isinstance(node, ast.Assign) and any(isinstance(t, ast.Name) and t.id == "__all__" for t in node.targets):
            return len(ast.literal_eval(node.value))
    return 0


def _sentences(trees: dict[str, ast.Module]) -> list[str]:
    """Return the functions outside planning that return a sentence or None for the caller to raise."""
    return [
        f"{module.removeprefix(f'{NAME}.')}.{node.name}"
        for module, tree in trees.items()
        if not module.startswith(f"{NAME}.planning")
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef) and node.returns is not None
        if ast.unparse(node.returns) in ("str | None", "tuple[str | None, bool]")
    ]


def source_figures(package: Path) -> list[Figure]:
    """Return the figures of the source."""
    trees, lines = sources(package), _lines(package)
    users = {module: sum(module in imported(tree, list(trees)) for tree in trees.values()) for module in trees}
    callback = trees[f"{NAME}.callback"]
    layout = max(_methods(trees, ".base", "Layout"), _methods(trees, ".layouts", "Layout"))
    return [
        Figure("files", len(lines), 80),
        Figure("lines", sum(lines.values()), 15_000),
        Figure("files of at most 65 lines", sum(1 for count in lines.values() if count <= 65), 8),
        Figure("files with exactly one importer", sum(1 for count in users.values() if count == 1), 12),
        Figure("lines of callback.py", lines[package / "callback.py"], 250),
        Figure("imports of its own in callback.py", _own_imports(callback), 10),
        Figure("methods of Layout", layout, 10),
        Figure("names that lightning_lora.analysis exports", _exports(trees[f"{NAME}.analysis"]), 14),
        Figure("functions that return a sentence or None, outside planning", len(_sentences(trees))),
    ]


# --- what runs


class Calls(NamedTuple):
    """The package's calls in order, as (file, function)."""

    calls: list[tuple[str, str]]

    @property
    def functions(self) -> int:
        """Number of distinct functions."""
        return len(set(self.calls))

    @property
    def files(self) -> int:
        """Number of files they are in."""
        return len({file for file, _ in self.calls})


def calls_of(package: Path, run: Callable[[], Any]) -> Calls:
    """Return the calls of the package's functions, including comprehensions and generator expressions."""
    found: list[tuple[str, str]] = []

    def note(frame: Any, event: str, _: Any) -> None:
        code = frame.f_code
        if event == "call" and code.co_filename.startswith(str(package)):
            found.append((code.co_filename, f"{code.co_name}:{code.co_firstlineno}"))

    before = sys.getprofile()
    sys.setprofile(note)
    try:
        run()
    finally:
        sys.setprofile(before)
    return Calls(found)


def run_figures(package: Path) -> list[Figure]:
    """Return the figures of attaching, a forward pass and ``LoRACallback.setup``."""
    sys.path.insert(0, str(package.parent))
    import torch
    from torch import nn

    import lightning_lora
    from lightning_lora import LoRACallback, LoRAConfig, attach

    assert Path(lightning_lora.__file__).parent == package, lightning_lora.__file__
    attaching = calls_of(package, lambda: attach(nn.Sequential(nn.Linear(8, 8)), LoRAConfig(rank=2)))
    model, inputs = nn.Sequential(nn.Linear(8, 8)), torch.randn(2, 8)
    attach(model, LoRAConfig(rank=2))
    model(inputs)
    forward = calls_of(package, lambda: model(inputs))
    callback = LoRACallback(rank=2)
    trainer, module = _trainer_with(callback)
    setup = calls_of(package, lambda: callback.setup(trainer, module, "fit"))
    return [
        Figure("functions that attach one nn.Linear", attaching.functions, 60),
        Figure("files that they are in", attaching.files, 10),
        Figure("calls of one forward pass of a small nn.Linear", len(forward.calls), 8),
        Figure("files that they are in", forward.files, 3),
        Figure("files that LoRACallback.setup passes through", setup.files, 12),
    ]


def _trainer_with(callback: Any) -> tuple[Any, Any]:
    import logging

    from lightning.pytorch import LightningModule, Trainer
    from torch import nn

    class Small(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(8, 8)

    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    module = Small()
    options = {"logger": False, "enable_checkpointing": False, "accelerator": "cpu", "devices": 1}
    trainer = Trainer(callbacks=[callback], enable_progress_bar=False, enable_model_summary=False, **options)
    trainer.strategy._lightning_module = module
    trainer.state.fn = "fit"
    module._trainer = trainer
    return trainer, module


def main(argv: Sequence[str] | None = None) -> list[Figure]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--package", type=Path, default=OWN, help="the package of another checkout")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    args = parser.parse_args(argv)
    package = args.package.resolve()
    figures = [*source_figures(package), *run_figures(package)]
    if args.json:
        print(json.dumps([figure._asdict() | {"verdict": figure.verdict} for figure in figures], indent=2))
        return figures
    print("| quantity | number | at most | |\n|---|---|---|---|")
    for each in figures:
        print(
            f"| {each.quantity} | {each.value:,} | {'' if each.reach is None else f'{each.reach:,}'} | {each.verdict} |"
        )
    return figures


if __name__ == "__main__":
    main()
