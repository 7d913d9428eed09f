"""The options that commands declare, and the values that these take."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable
from operator import methodcaller
from pathlib import Path
from typing import Any

Option = Callable[[argparse._ActionsContainer], object]  # adds itself to a parser


def option(*names: str, **settings: Any) -> Option:
    """Return an option, declared as for ``add_argument``."""
    return methodcaller("add_argument", *names, **settings)


def one_of(*options: Option) -> Option:
    """Return options of which exactly one must be given."""

    def add(parser: argparse._ActionsContainer) -> None:
        group = parser.add_mutually_exclusive_group(required=True)
        for each in options:
            each(group)

    return add


# --- the values of options


def name_list(text: str) -> list[str]:
    """Return names that are divided by commas, plus signs or spaces."""
    return [name for name in re.split(r"[,+\s]+", text) if name]


def share(text: str) -> float:
    """Return a number above 0 and at most 1."""
    found = float(text)
    if not 0 < found <= 1:
        raise argparse.ArgumentTypeError(f"must be greater than 0 and at most 1, got {text}")
    return found


def number_list(text: str) -> list[float]:
    """Return numbers that are divided by commas."""
    return [float(number) for number in text.split(",")]


def count(text: str) -> int:
    """Return an amount, such as 4.7M."""
    return _amount(text, {"": 1, "k": 1e3, "m": 1e6, "g": 1e9, "b": 1e9, "t": 1e12})


def whole_number(text: str) -> int:
    """Return a whole number of at least 1."""
    if not (text.isdecimal() and int(text)):
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, got {text!r}")
    return int(text)


def size(text: str) -> int:
    """Return an amount of bytes, such as 35MB."""
    return _amount(text, {"": 1, "b": 1, "kb": 1e3, "mb": 1e6, "gb": 1e9, "kib": 2**10, "mib": 2**20, "gib": 2**30})


def _amount(text: str, units: dict[str, float]) -> int:
    found = re.fullmatch(r"([\d.,_]+(?:e\d+)?)\s*([a-z]*)", text.strip().lower())
    try:
        amount = float(found[1].replace(",", "").replace("_", "")) * units[found[2]] if found else 0
    except (ValueError, KeyError):
        amount = 0
    if amount < 1:
        known = ", ".join(each for each in units if each)
        raise argparse.ArgumentTypeError(f"{text!r} is not an amount of at least 1, such as 4.7M; units: {known}")
    return round(amount)


def dtype_name(text: str) -> str:
    """Return the name of a precision, which may be short, such as bf16."""
    return {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16", "fp64": "float64"}.get(text, text)


# --- options of several commands


DTYPES = ("float32", "bfloat16", "float16")
AN_ADAPTER, A_BASE = "a PEFT directory or a .ckpt", "a model folder with safetensors, or one such file"
ADAPTER = option("adapter", type=Path, metavar="ADAPTER", help=AN_ADAPTER)
NAMED = option("--adapter", dest="named", metavar="NAME", help="one of several in a .ckpt (default: the trained one)")
BASE = option("base", type=Path, metavar="BASE", help=A_BASE)
ANY_BASE = option(
    "--any-base",
    dest="check_base",
    action="store_false",
    help="accept a base whose values differ from those that the adapter was trained on",
)
ROOT = option(
    "--root",
    metavar="NAME",
    help="for a .ckpt and a PEFT directory: attribute of the LightningModule that holds the directory's model "
    "(default: found by the names)",
)
OUT = option("--out", type=Path, metavar="PAGE", help="write a self-contained HTML page")
OVERWRITE = option("--overwrite", action="store_true", help="replace what is there")
PICTURES = option("--pictures", type=Path, metavar="FOLDER", help="write each picture as a PNG into this folder")
