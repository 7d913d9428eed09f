"""Files of the tests as if they had been written with Lightning's other import name."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType


def under_the_other_name(name: str) -> ModuleType:
    """Import a test file as if it were written with ``pytorch_lightning``."""
    spec = importlib.util.find_spec(name)
    assert spec is not None
    assert spec.origin is not None
    text = Path(spec.origin).read_text(encoding="utf-8")
    text = text.replace("lightning.pytorch", "pytorch_lightning").replace("lightning.fabric", "lightning_fabric")
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    exec(compile(text, spec.origin, "exec"), vars(module))
    return module
