"""How the options of ``LoRACallback`` look in an editor, and what is said of those that it does not have."""

from __future__ import annotations

import inspect
from collections.abc import Collection
from typing import Any

from lightning_lora.config import OPTIONS, LoRAConfig
from lightning_lora.option_checks import check_known


def explain_names(names: Collection[str], own: Collection[str]) -> None:
    """Raise if one of these names on a command line is no option.

    Args:
        names: The names.
        own: The options of the callback beside those of ``LoRAConfig``.
    """
    if "config" in names:
        raise TypeError("LoRACallback.config is for Python. In flags and in YAML, give its options one by one.")
    check_known("LoRACallback", names, {*OPTIONS, *own})


def config_among(options: dict[str, Any], first: LoRAConfig | None) -> LoRAConfig | None:
    """Return the config, given first or by its name, and take it from the options."""
    if first is not None and "config" in options:
        raise TypeError("LoRACallback got two configs, the first argument and config=; give one.")
    config: LoRAConfig | None = options.pop("config", first)  # in __init__ itself, this would make it a flag
    return config


def signature_of(callback: type) -> inspect.Signature:
    """Return the signature of its constructor with every option of ``LoRAConfig``, in place of ``**lora``."""
    _, first, *own, _ = inspect.signature(callback.__init__).parameters.values()  # type: ignore[misc]
    default, options = LoRAConfig(), inspect.signature(LoRAConfig).parameters.values()
    shown = [option.replace(default=getattr(default, option.name)) for option in options]
    return inspect.Signature([first.replace(name="config"), *shown, *own])
