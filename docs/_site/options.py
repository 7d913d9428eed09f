"""Shows the options of ``LoRAConfig`` where a callback takes them as ``**lora``; each is defined once."""

from __future__ import annotations

import dataclasses
import re
from contextlib import suppress
from importlib import import_module
from typing import Any

import griffe

WITH_OPTIONS = ("callback.LoRACallback", "sweep.callback.LoRASweep")
DATACLASSES = ("config.LoRAConfig", "config.InitOptions", "ranks.schedule.RankSchedule")


class OptionsOfConfig(griffe.Extension):
    """Puts in place of ``**lora`` the options that it stands for, and in place of names the values that they have."""

    def on_package(self, *, pkg: griffe.Module, **_: Any) -> None:
        """Called when the package was read."""
        if pkg.name == "lightning_lora":
            options = {name: _options(pkg[name]) for name in DATACLASSES}["config.LoRAConfig"]
            for name in WITH_OPTIONS:
                _show_options(pkg[name], options, pkg["config.LoRAConfig"].docstring.value)


def _options(of: griffe.Class) -> list[griffe.Parameter]:
    """Return the options of a dataclass, after writing out its types and defaults."""
    found = []
    for option in dataclasses.fields(getattr(import_module(of.module.path), of.name)):
        default = option.default if option.default_factory is dataclasses.MISSING else option.default_factory()
        attribute = of[option.name]
        attribute.annotation = _written_out(attribute.annotation, of.module)
        attribute.value = None if default is dataclasses.MISSING else repr(default)
        kind = griffe.ParameterKind.keyword_only
        found.append(griffe.Parameter(option.name, annotation=attribute.annotation, kind=kind, default=attribute.value))
    return found


def _written_out(annotation: str | griffe.Expr | None, module: griffe.Module) -> str | griffe.Expr | None:
    """Return a type in which names such as ``Bias`` are replaced by the values that they allow."""

    def values(found: re.Match[str]) -> str:
        value = ""
        with suppress(KeyError, AttributeError, griffe.AliasResolutionError):  # it is from elsewhere, or no constant
            value = str(module.members[found[0]].value)
        return value if value.startswith("Literal[") else found[0]

    text = re.sub(r"\b[A-Z]\w*", values, str(annotation))
    return annotation if text == str(annotation) else text


def _show_options(callback: griffe.Class, options: list[griffe.Parameter], explained: str) -> None:
    own = callback["__init__"].parameters
    for each in own:
        each.annotation = _written_out(each.annotation, callback.module)
        each.name = each.name.removeprefix("_")  # config, which no command line has
    first = [each for each in own if each.kind is griffe.ParameterKind.positional_or_keyword]
    rest = [each for each in own if each.kind is griffe.ParameterKind.keyword_only]
    callback["__init__"].parameters = griffe.Parameters(*first, *options, *rest)
    callback.docstring.value = _with_entries(callback.docstring.value, explained)


def _with_entries(text: str, explained: str) -> str:
    """Return a docstring that explains the options of the config first, as in their own docstring, not ``**lora``."""
    entries = re.search(r"^Args:\n(.*?)\n\n", explained, flags=re.M | re.S)
    text, count = re.subn(r"^    \*\*lora: .*(\n     .*)*\n", "", text, flags=re.M)
    assert entries is not None, "LoRAConfig explains no options"
    assert count == 1, "a callback does not explain **lora"
    return text.replace("Args:\n", f"Args:\n{entries[1]}\n", 1)
