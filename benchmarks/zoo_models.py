"""How the models of each library are built for the zoo: tiny, at random, without any download."""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import sys
import types
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import zoo_transformers


class Library(NamedTuple):
    """A library of models: its package, the names of its models, and how to build one."""

    package: str
    names: Callable[[], list[str]]
    build: Callable[[str], tuple[Any, ...]]


LIBRARIES = {
    "transformers": Library("transformers", zoo_transformers.names, zoo_transformers.build),
}


def prepare() -> None:
    """Make a process ready for models: quiet, and with stand-ins for what cannot be imported."""
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    stand_in_operators()


def names(libraries: Sequence[str] | None = None) -> list[str]:
    """Return "library/name" of every model; a library that is not installed has none."""
    prepare()
    found = []
    for library in libraries or LIBRARIES:
        try:
            found += [f"{library}/{name}" for name in LIBRARIES[library].names()]
        except ImportError as error:
            print(f"{library} is left out: {error}", file=sys.stderr)
    return found


def examine(name: str, tell: Callable[[str], None]) -> dict[str, Any]:
    """Build a model and examine it."""
    from zoo_checks import Examination, Specimen, first_line  # imports Lightning, which imports torchvision

    library, _, inner = name.partition("/")
    tell("build")
    torch.manual_seed(0)
    try:
        specimen = Specimen(*LIBRARIES[library].build(inner))
    except Exception as error:
        return {"verdict": "unbuildable", "reason": f"{type(error).__name__}: {first_line(error)}"}
    return Examination(specimen, tell).result()


_OPERATORS: list[torch.library.Library] = []  # operators go when what holds them goes


def stand_in_operators() -> None:
    """Let the Python models of torchvision and torchaudio be imported where their compiled parts do not load."""
    if _OPERATORS:
        return
    library = torch.library.Library("torchvision", "FRAGMENT")
    _OPERATORS.append(library)
    with contextlib.suppress(ImportError, RuntimeError):  # RuntimeError: the operators are there
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor boxes, Tensor scores, float threshold) -> Tensor")
        import torchvision  # noqa: F401
    if importlib.util.find_spec("torchaudio"):
        compiled: Any = types.ModuleType("torchaudio._extension")
        compiled._IS_TORCHAUDIO_EXT_AVAILABLE = compiled._IS_ALIGN_AVAILABLE = False
        compiled.fail_if_no_align = lambda function: function
        sys.modules[compiled.__name__] = compiled
