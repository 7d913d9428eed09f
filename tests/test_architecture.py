"""The house: packages import downward only, only the trainer's rooms know Lightning, and none knows PEFT."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import lightning_lora

PACKAGE = Path(lightning_lora.__file__).parent

# Packages and the files beside them, from the ground up; those in one row may import each other, without a circle.
LEVELS = [
    {"names", "ops", "sharding"},
    {"option_checks"},
    {"config", "fingerprint", "layers"},
    {"adapted_model", "attachment", "base_buffers", "optimizers", "planning"},
    {"modes", "named_adapters", "probe", "surgery", "switching"},
    {"state", "ranks"},
    {"storage"},
    {"peft_format"},
    {"calibration", "loading"},
    {"disk", "trainer"},
    {"callback"},
    {"analysis", "several"},
    {"sweep"},
    {""},
    {"cli"},
    {"__main__"},
]
STILL_UPWARD: set[tuple[str, str]] = set()
CORE = set().union(*LEVELS[:9])
TOOLS = {"analysis", "cli", "disk"}
KNOWS_LIGHTNING = {"trainer", "callback", "sweep"}
LONGEST_FILE = 500


def modules() -> dict[str, Path]:
    """Return every module of the package by its name below the package; the package itself is ``""``."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        found[".".join(part for part in parts if part != "__init__")] = path
    return found


MODULES = modules()
ROOMS = sorted({name.partition(".")[0] for name in MODULES})


def imports(path: Path) -> Iterator[str]:
    """Yield the full name of everything that a file imports, wherever in it."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name} imports relatively"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def imported_modules(path: Path) -> set[str]:
    """Return the package's modules that a file imports."""
    found = set()
    for name in imports(path):
        if name.split(".")[0] == PACKAGE.name:
            inside = name.removeprefix(PACKAGE.name).removeprefix(".")
            found.add(inside if inside in MODULES else inside.rpartition(".")[0])
    return found


def imported_rooms(room: str) -> set[str]:
    """Return the other packages, or files beside them, that one imports."""
    own = [path for name, path in MODULES.items() if name.partition(".")[0] == room]
    return {name.partition(".")[0] for path in own for name in imported_modules(path)} - {room}


def outside(path: Path) -> set[str]:
    """Return the top names of the packages that a file imports."""
    return {name.split(".")[0] for name in imports(path)}


def level_of(room: str) -> int:
    return next(level for level, rooms in enumerate(LEVELS) if room in rooms)


def test_every_room_has_one_level():
    listed = [room for rooms in LEVELS for room in rooms]
    assert sorted(listed) == ROOMS


@pytest.mark.parametrize("room", ROOMS)
def test_imports_go_downward(room: str):
    upward = {(room, other) for other in imported_rooms(room) if level_of(other) > level_of(room)}
    assert upward <= STILL_UPWARD


def test_no_modules_import_each_other_in_a_circle():
    left = {name: imported_modules(path) - {name} for name, path in MODULES.items()}
    while free := [name for name, others in left.items() if not others & left.keys()]:
        for name in free:
            del left[name]
    assert left == {}


@pytest.mark.parametrize("room", sorted(CORE | {"callback", "trainer"}))
def test_the_core_and_the_callback_import_no_tool(room: str):
    assert {(room, tool) for tool in imported_rooms(room) & TOOLS} <= STILL_UPWARD


def test_imports_are_found():
    assert imported_rooms("surgery") >= {"planning", "layers", "attachment"}
    assert imported_modules(MODULES["surgery"]) >= {"planning.planner", "attachment"}
    assert "torch" in outside(MODULES["surgery"])


@pytest.mark.parametrize("module", MODULES)
def test_only_the_trainers_rooms_import_lightning(module: str):
    frameworks = {"lightning", "pytorch_lightning", "lightning_fabric", "torchmetrics"}
    if module.partition(".")[0] not in KNOWS_LIGHTNING:
        assert not outside(MODULES[module]) & frameworks


@pytest.mark.parametrize("module", MODULES)
def test_nothing_imports_peft_or_transformers(module: str):
    assert not outside(MODULES[module]) & {"peft", "transformers", "accelerate", "bitsandbytes"}


@pytest.mark.parametrize("module", MODULES)
def test_private_names_stay_in_their_file(module: str):
    own = [name for name in imports(MODULES[module]) if name.split(".")[0] == PACKAGE.name]
    assert not [name for name in own if name.rpartition(".")[2].startswith("_")]


def test_there_is_no_drawer_for_everything():
    drawers = {"utils", "util", "helpers", "common", "misc"}
    assert not [module for module in MODULES if drawers & set(module.split("."))]


@pytest.mark.parametrize("module", MODULES)
def test_no_file_is_too_long(module: str):
    assert len(MODULES[module].read_text().splitlines()) <= LONGEST_FILE


@pytest.mark.parametrize("module", sorted(MODULES.keys() - {"layers.lora_layer"}))
def test_only_the_class_swap_changes_the_class_of_a_module(module: str):
    assigned = [
        target.attr
        for node in ast.walk(ast.parse(MODULES[module].read_text()))
        if isinstance(node, ast.Assign)
        for target in node.targets
        if isinstance(target, ast.Attribute)
    ]
    assert "__class__" not in assigned


@pytest.mark.slow
def test_importing_after_lightning_brings_little_and_none_of_the_heavy_packages():
    script = """
import sys
import lightning.pytorch
before = set(sys.modules)
allowed = {"lightning_lora", "jsonargparse", "typeshed_client"}  # the types of the command line
import lightning_lora
lightning_lora.LoRACallback
new = {name for name in set(sys.modules) - before if name.partition(".")[0] not in allowed}
heavy = {"peft", "transformers", "triton", "safetensors", "torchao", "bitsandbytes", "matplotlib", "numpy"}
assert not {name.partition(".")[0] for name in new} & heavy, new
assert len(new) < 20, sorted(new)
assert "lightning_lora.analysis" not in sys.modules  # as much code as all the rest
"""
    outcome = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert outcome.returncode == 0, outcome.stderr


@pytest.mark.slow
def test_importing_the_package_and_adapting_a_model_needs_no_lightning():
    script = """
import sys
import torch
import lightning_lora
model = torch.nn.Sequential(torch.nn.Linear(8, 8))
lightning_lora.attach(model, lightning_lora.LoRAConfig(rank=1))
loaded = {name.partition(".")[0] for name in sys.modules}
assert not loaded & {"lightning", "pytorch_lightning", "transformers", "peft", "safetensors"}, loaded
assert lightning_lora.LoRACallback.__name__ == "LoRACallback"
assert "lightning" in sys.modules
"""
    outcome = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert outcome.returncode == 0, outcome.stderr
