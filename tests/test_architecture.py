"""The house: imports go strictly downward, only its upper rooms know Lightning, and none knows transformers or PEFT."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import lightning_lora

PACKAGE = Path(lightning_lora.__file__).parent

# A room may import rooms of a lower level only. A new room gets its place here first.
_BOTTOM_UP = [
    {
        "analysis.drawing",
        "analysis.intruders",
        "analysis.page",
        "analysis.saved",
        "analysis.spectrum",
        "casts",
        "checkpoint_record",
        "cli.colours",
        "cli.options",
        "directories",
        "disk",
        "disk.tensor_files",
        "dropout_bits",
        "eager",
        "initializers",
        "layers.adapter",
        "layers.swap",
        "option_types",
        "peft_format",
        "planning",
        "sharding",
        "targets",
        "training",
        "training.import_names",
        "training.method_wraps",
        "training.process_slices",
        "training.verdicts",
    },
    {
        "analysis.places",
        "analysis.relation",
        "analysis.similarity",
        "disk.base_folder",
        "disk.base_names",
        "disk.skeleton",
        "fingerprint",
        "layers.base",
        "layers.low_rank",
        "layers.norm",
        "ops",
        "option_checks",
        "recomputed",
        "report",
        "training.company",
        "training.one_file",
    },
    {"analysis.shapes", "config", "conv_ops", "disk.tied_heads", "layers.embedding", "layers.linear", "layers.weight"},
    {"attachment", "layers.conv", "layers.tokens", "peft_format.config"},
    {"layers", "peft_format.directory", "peft_format.patterns"},
    {
        "analysis.diagnostics",
        "analysis.matrices",
        "optimizers",
        "peft_format.factors",
        "peft_format.kinds",
        "peft_format.names",
        "peft_format.support",
        "planning.misses",
        "planning.obstacles",
        "planning.planned",
        "switching",
        "training.advice",
        "training.fsdp_units",
        "training.guidance",
        "training.precision",
        "trial",
    },
    {
        "freezing",
        "peft_format.exporting",
        "peft_format.layers",
        "planning.token_rows",
        "planning.trainables",
        "probe",
        "state",
        "training.fit_diagnostics",
    },
    {"disk.skeleton_kinds", "peft_format.collect", "peft_format.importing", "planning.plan", "training.checks"},
    {"analysis.budget", "surgery"},
    {"analysis.memory", "disk.bare_skeleton", "peft_format.files", "peft_format.loading", "training.layouts"},
    {
        "checkpoint_file",
        "peft_format.preflight",
        "training.deepspeed_layout",
        "training.fit_export",
        "training.fsdp",
        "training.model_parallel",
        "training.whole_checkpoint",
    },
    {
        "analysis.files",
        "cli.inspection",
        "disk.adapter_fit",
        "disk.conversion",
        "training.coming_checkpoint",
        "training.load_guard",
        "training.strategies",
        "warm_start",
    },
    {"analysis.adapters", "analysis.stored", "cli.convert", "disk.streaming", "training.adapter_checkpoints"},
    {"analysis.comparison", "analysis.summary", "cli.text", "training.attaching"},
    {"analysis.plots", "analysis.suggestions", "callback"},
    {"", "analysis", "analysis.report_figures"},
    {"analysis.reports"},
    {"cli.analysis"},
    {"cli"},
    {"__main__"},
]
LEVELS = {room: level for level, together in enumerate(_BOTTOM_UP) for room in together}
KNOWS_LIGHTNING = {
    "training.import_names",
    "training.attaching",
    "training.coming_checkpoint",
    "training.company",
    "training.one_file",
    "training.precision",
    "training.layouts",
    "training.fsdp",
    "training.deepspeed_layout",
    "training.model_parallel",
} | {
    "training.strategies",
    "training.adapter_checkpoints",
    "training.whole_checkpoint",
    "callback",
    "training.verdicts",
    "training.fit_diagnostics",
}


def rooms() -> dict[str, Path]:
    """Return every module of the package by its name below the package; the package itself is ``""``."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        found[".".join(part for part in parts if part != "__init__")] = path
    return found


ROOMS = rooms()


def imports(path: Path) -> Iterator[str]:
    """Yield the full name of everything that a file imports, wherever in it."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name} imports relatively"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def imported_rooms(path: Path) -> set[str]:
    """Return the rooms that a file imports."""
    found = set()
    for name in imports(path):
        if name.split(".")[0] == PACKAGE.name:
            inside = name.removeprefix(PACKAGE.name).removeprefix(".")
            found.add(inside if inside in ROOMS else inside.rpartition(".")[0])
    return found


def outside(path: Path) -> set[str]:
    """Return the top names of the packages that a file imports."""
    return {name.split(".")[0] for name in imports(path)}


def test_every_room_has_a_level_and_every_level_a_room():
    assert LEVELS.keys() == ROOMS.keys()


@pytest.mark.parametrize("room", ROOMS)
def test_imports_go_strictly_downward(room: str):
    upward = {other for other in imported_rooms(ROOMS[room]) if LEVELS[other] >= LEVELS[room]}
    assert upward == set()


def test_imports_are_found():
    assert imported_rooms(ROOMS["surgery"]) >= {"planning.plan", "freezing", "layers", "attachment"}
    assert imported_rooms(ROOMS["layers"]) >= {"layers.base", "layers.embedding", "layers.linear", "layers.norm"}
    assert "torch" in outside(ROOMS["surgery"])


@pytest.mark.parametrize("room", ROOMS)
def test_only_the_upper_rooms_import_lightning(room: str):
    frameworks = {"lightning", "pytorch_lightning", "lightning_fabric", "torchmetrics"}
    if room not in KNOWS_LIGHTNING:
        assert not outside(ROOMS[room]) & frameworks


@pytest.mark.parametrize("room", ROOMS)
def test_no_room_imports_peft_or_transformers_or_their_files(room: str):
    assert not outside(ROOMS[room]) & {"peft", "transformers", "accelerate", "bitsandbytes", "safetensors"}


@pytest.mark.parametrize("room", ROOMS)
def test_a_rooms_private_names_stay_in_it(room: str):
    own = [name for name in imports(ROOMS[room]) if name.split(".")[0] == PACKAGE.name]
    assert not [name for name in own if name.rpartition(".")[2].startswith("_")]


def test_there_is_no_drawer_for_everything():
    drawers = {"utils", "util", "helpers", "common", "misc"}
    assert not [room for room in ROOMS if drawers & set(room.split("."))]


@pytest.mark.parametrize("room", ROOMS)
def test_no_file_has_outgrown_its_room(room: str):
    assert len(ROOMS[room].read_text().splitlines()) <= 320


@pytest.mark.parametrize("room", sorted(ROOMS.keys() - {"surgery", "layers.swap"}))
def test_only_surgery_changes_a_class_of_a_module(room: str):
    assigned = [
        target.attr
        for node in ast.walk(ast.parse(ROOMS[room].read_text()))
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
