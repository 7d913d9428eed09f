"""The commands that turn a checkpoint into a PEFT directory, and back."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

Result = tuple[dict[str, Any], list[str]]


def add_export(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``export``."""
    parser.add_argument("checkpoint", type=Path, metavar="CKPT", help="the .ckpt of a LoRACallback run")
    parser.add_argument("directory", type=Path, metavar="DIR", help="where to write; an adapter there is replaced")
    parser.add_argument(
        "--root",
        metavar="NAME",
        help="the attribute of the LightningModule that holds the model, to which names become relative "
        "(default: the one that holds all adapters)",
    )
    parser.add_argument("--base-name", metavar="NAME", help="the name of the base model to record")
    parser.add_argument(
        "--uniform-rank", action="store_true", help="pad all layers to one rank, for loaders that ignore patterns"
    )


def add_import(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``import``."""
    parser.add_argument("directory", type=Path, metavar="DIR", help="a PEFT directory")
    parser.add_argument("checkpoint", type=Path, metavar="CKPT", help="the .ckpt to write; it must not exist")
    parser.add_argument(
        "--root",
        default="model",
        metavar="NAME",
        help='the attribute of the LightningModule that holds the model (default: model); "" if it is the module',
    )


def run_export(options: argparse.Namespace) -> Result:
    """Convert, and say what was written."""
    from lightning_lora.disk.conversion import export_checkpoint

    layers = export_checkpoint(
        options.checkpoint,
        options.directory,
        root=options.root,
        base_model_name_or_path=options.base_name,
        uniform_rank=options.uniform_rank,
    )
    return _said(options.directory, layers)


def run_import(options: argparse.Namespace) -> Result:
    """Convert, and say what was written."""
    from lightning_lora.disk.conversion import import_directory

    return _said(options.checkpoint, import_directory(options.directory, options.checkpoint, root=options.root))


def _said(path: Path, layers: list[str]) -> Result:
    from lightning_lora.names import listed

    return {"wrote": str(path), "layers": layers}, [f"wrote {path}: {len(layers)} layers ({listed(layers, 3)})"]


COMMANDS: dict[str, tuple[str, Callable[[argparse.ArgumentParser], None], Callable[[argparse.Namespace], Result]]] = {
    "export": ("turn a .ckpt into a PEFT directory, from the file alone", add_export, run_export),
    "import": ("turn a PEFT directory into a .ckpt, from the files alone", add_import, run_import),
}
