"""The public names, frozen: adding or removing one is a decision."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from pathlib import Path

import pytest

import lightning_lora
from lightning_lora import analysis

PUBLIC = [
    "AttachReport",
    "LoRACallback",
    "LoRAConfig",
    "LoRALayer",
    "LoRASweep",
    "Preflight",
    "active_adapter",
    "adapter_names",
    "adapter_state_dict",
    "add_adapter",
    "attach",
    "calibrate",
    "combine",
    "combine_adapters",
    "detach",
    "disabled",
    "load_adapter",
    "load_adapter_state_dict",
    "lora_layers",
    "merge",
    "merged",
    "parameter_groups",
    "preflight",
    "register_adapter",
    "remove_adapter",
    "routed",
    "save_adapter",
    "scaled",
    "set_adapter",
    "target_names",
    "truncate_adapter",
    "using",
]


def test_public_names_are_frozen():
    assert sorted(lightning_lora.__all__) == PUBLIC


@pytest.mark.parametrize("name", PUBLIC)
def test_public_name_is_documented(name: str):
    thing = getattr(lightning_lora, name)
    assert thing.__module__.startswith("lightning_lora.")
    assert inspect.getdoc(thing)
    assert vars(thing).get("__doc__") if inspect.isclass(thing) else thing.__doc__


@pytest.mark.parametrize("name", PUBLIC)
def test_public_methods_are_documented(name: str):
    thing = getattr(lightning_lora, name)
    methods = vars(thing).items() if inspect.isclass(thing) else ()
    own = [key for key, value in methods if callable(value) or isinstance(value, (property, classmethod))]
    undocumented = [key for key in own if not key.startswith("_") and not inspect.getdoc(getattr(thing, key))]
    assert undocumented == []


def test_config_options_are_documented():
    arguments = (lightning_lora.LoRAConfig.__doc__ or "").partition("Args:")[2]
    missing = [
        name for name in inspect.signature(lightning_lora.LoRAConfig).parameters if f" {name}: " not in arguments
    ]
    assert missing == []


def test_attach_options_are_keyword_only():
    attach = inspect.signature(lightning_lora.attach)
    assert [p.name for p in attach.parameters.values() if p.kind is p.POSITIONAL_OR_KEYWORD] == ["module", "config"]
    assert attach.parameters["seed"].kind is inspect.Parameter.KEYWORD_ONLY


def test_unknown_name_raises_attribute_error():
    with pytest.raises(AttributeError, match="nothing_like_it"):
        lightning_lora.nothing_like_it  # noqa: B018


def test_package_has_version():
    assert [int(part) for part in lightning_lora.__version__.split(".")[:2]]


def signatures() -> Iterator[str]:
    """Yield a line for each public name and each public method, with its signature."""
    for module in (lightning_lora, analysis):
        for name in sorted(module.__all__):
            thing = getattr(module, name)
            yield f"{module.__name__}.{name}{signature(thing)}"
            own = vars(thing).items() if inspect.isclass(thing) else ()
            for key, value in sorted(own):
                if not key.startswith("_") and inspect.isfunction(value):
                    yield f"{module.__name__}.{name}.{key}{signature(value)}"


def signature(thing: object) -> str:
    """Return the names, kinds and defaults of a callable's parameters; not the types, which tools spell differently."""
    if not callable(thing):
        return ""
    found = inspect.signature(thing)
    plain = [each.replace(annotation=each.empty) for each in found.parameters.values()]
    return str(found.replace(parameters=plain, return_annotation=found.empty))


def test_signatures_are_those_that_were_released() -> None:
    path = Path(__file__).parent / "public_api.txt"
    found = list(signatures())
    assert found == path.read_text().splitlines(), (
        "A public signature has changed. If that is meant, see Releases in CONTRIBUTING.md, and write the file anew: "
        "python -m tests.test_public_api"
    )


if __name__ == "__main__":
    (Path(__file__).parent / "public_api.txt").write_text("\n".join(signatures()) + "\n")
