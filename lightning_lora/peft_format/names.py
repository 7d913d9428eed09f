"""Names in PEFT's files: which module they are relative to, and the ``base_layer`` that its wrappers put into them."""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from lightning_lora.layers import LoRALayer
from lightning_lora.names import CONTAINERS, OTHERS, clean_name, join, listed, module_names, near_names, walk

PREFIX = "base_model.model."
TOKENS_SUFFIX = ".token_adapter.trainable_tokens_delta"  # of the key of an embedding's trained rows
_WRAPPER = "base_layer"
_FACTORS = ("lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B", "lora_magnitude_vector")
PEFTS_OWN = (_WRAPPER, "lora_dropout", "lora_dropout.default", *_FACTORS)  # modules of its layers, while it loads

# While PEFT 0.21 loads an adapter of a transformers model, it adapts names of transformers 4 to version 5, whatever
# version wrote them (its ``transformers_weight_conversion``). In models whose experts became stacks, it takes entries
# of target_modules with these last parts for the experts', also where they mean a dense layer or a shared expert.
# Keys of tensors it renames like those of the base's checkpoints.
EXPERT_NAMES = {
    "mixtral": frozenset({"gate", "w1", "w2", "w3"}),
    "qwen2_moe": frozenset({"gate", "gate_proj", "up_proj", "down_proj"}),
}
_FACTOR = ".lora_A.default.weight"  # the end of a key while PEFT renames it


def chosen_root(module: nn.Module, export_root: str) -> tuple[str, nn.Module]:
    """Return the submodule of this name, with its name.

    Raises:
        ValueError: It does not exist.
    """
    for name, (part, aliases) in module_names(module).items():
        if export_root in aliases:
            return name, part
    near = near_names(export_root, (name for name, _ in module.named_modules()))
    hint = f" Closest names: {', '.join(map(repr, near))}." if near else ""
    raise ValueError(f"export_root={export_root!r} is not a module of {type(module).__name__}.{hint}")


def found_root(module: nn.Module, holds_all: Callable[[nn.Module], bool]) -> tuple[str, nn.Module]:
    """Return the model that PEFT would wrap, with its name: the one to which names in the files are relative.

    That is the one transformers model inside, or of a LightningModule the one child that holds everything, or the
    module itself. A list of modules is no model: it computes nothing, so nobody could wrap it.

    Args:
        module: The module.
        holds_all: Whether a submodule holds everything that must be named.

    Raises:
        ValueError: Several qualify.
    """
    models = likely_roots(module, holds_all)
    if len(models) > 1:
        raise ValueError(
            f"{type(module).__name__} holds several models: {listed([name for name, _ in models])}. "
            "Choose one with export_root."
        )
    return models[0] if models else ("", module)


def likely_roots(module: nn.Module, holds_all: Callable[[nn.Module], bool]) -> list[tuple[str, nn.Module]]:
    """Return the models inside a module that ``found_root`` chooses from, with their names."""
    models = list(_pretrained_models(module))
    if len(models) > 1:
        models = [(name, model) for name, model in models if holds_all(model)]
    if models or not is_lightning_module(module):
        return models
    children = [
        (name, child) for name, child in module.named_children() if not isinstance(child, (LoRALayer, *CONTAINERS))
    ]
    return [(name, child) for name, child in children if holds_all(child)]


def tails(name: str) -> list[str]:
    """Return a dotted name, and what is left of it without its first parts: ``a.b.c``, ``b.c``, ``c``."""
    parts = name.split(".")
    return [".".join(parts[start:]) for start in range(len(parts))]


def _pretrained_models(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield the outermost models of transformers or diffusers; by structure, so that neither need be installed."""
    found: list[str] = []
    parts = walk(module)
    kinds = {type(part) for _, part in parts}  # far fewer than modules
    kinds = {kind for kind in kinds if hasattr(kind, "save_pretrained") or hasattr(kind, "get_input_embeddings")}
    for name, part in parts:
        if type(part) not in kinds or any(not outer or name.startswith(f"{outer}.") for outer in found):
            continue
        if hasattr(part, "config") and not is_lightning_module(part):
            found.append(name)
            yield name, part


def is_lightning_module(module: nn.Module) -> bool:
    """Return whether a module is made to be trained by a Trainer."""
    return hasattr(type(module), "training_step") and hasattr(type(module), "configure_optimizers")


def live_path(name: str, wrappers: Mapping[str, int]) -> str:
    """Return the name of a module or tensor after PEFT has wrapped some of the modules above it.

    Args:
        name: Its name in the model.
        wrappers: Name of a wrapped module -> how often PEFT wraps it.
    """
    parts: list[str] = []
    path = ""
    for part in name.split("."):
        parts += [_WRAPPER] * wrappers.get(path, 0) if path else []
        path = join(path, part)
        parts.append(part)
    return ".".join(parts)


def without_wrappers(path: str, names: Collection[str]) -> tuple[str, int] | None:
    """Return the module at a path of a file, and the number of wrappers left of it; None if no module matches.

    Args:
        path: The path, with ``base_layer`` where PEFT wraps a module.
        names: All names of the model's modules; one of them may really be called ``base_layer``.
    """
    if path in names:
        return path, 0
    name, depth = "", 0
    for part in path.split("."):
        if join(name, part) in names:
            name, depth = join(name, part), 0
        elif part == _WRAPPER and name:
            depth += 1
        else:
            return None
    return name, depth


def parameters_named(name: str, module: nn.Module, targets: Sequence[str]) -> list[str]:
    """Return the module's parameters that PEFT's ``target_parameters`` names, in the order in which PEFT wraps them."""
    if not targets:
        return []
    full = {key: join(name, key) for key, parameter in module._parameters.items() if parameter is not None}
    return [key for key, path in full.items() if any(path == each or path.endswith(f".{each}") for each in targets)]


def tensors_in_full(name: str, module: nn.Module) -> dict[str, Tensor]:
    """Return the parameters and persistent buffers of a module that is trained in full, by their full names."""
    state = module.state_dict().items()
    own = [
        (clean_name(key), value) for key, value in state if isinstance(value, Tensor) and OTHERS not in key.split(".")
    ]
    return {join(name, key): value for key, value in own}


# --- what PEFT makes of names while it loads


def model_type(root: nn.Module) -> str:
    """Return the kind of a transformers model, by which PEFT decides; empty for other models."""
    kind = getattr(getattr(root, "config", None), "model_type", None)
    return kind if isinstance(kind, str) else ""


def expert_names(root: nn.Module) -> Collection[str]:
    """Return the last parts of names that PEFT takes for names of experts in ``target_modules`` of this model."""
    patterns = {"mixtral": "mixtral", **getattr(_conversions(), "_MODEL_TO_CONVERSION_PATTERN", {})}
    return EXPERT_NAMES.get(patterns.get(model_type(root), ""), ())


def paths_in_model(root: nn.Module, paths: Iterable[str]) -> dict[str, str]:
    """Return the layers of the model to which PEFT loads the factors that a file has under these paths."""
    # PEFT takes a renaming back that only removes the beginning, or seems to: its prefix counts too.
    return {
        path: path if f"{PREFIX}{path}".endswith(new) else new
        for path, new in _renamed(paths, _renamings(root)).items()
    }


def paths_in_file(root: nn.Module, paths: Collection[str]) -> dict[str, str | None]:
    """Return the paths under which a file must have factors for PEFT to load them to these layers, or None."""
    moved = [path for path, loaded in paths_in_model(root, paths).items() if loaded != path]
    if not moved:
        return {path: path for path in paths}
    # Back to the names in the model's checkpoints, as transformers writes them: not to older ones.
    steps = [step.reverse_transform() for step in reversed(_renamings(root, add_legacy=False))]
    before = _renamed(moved, steps)
    loaded = paths_in_model(root, before.values())
    spelled = {path: name if loaded[name] == path else None for path, name in before.items()}
    return {path: spelled.get(path, path) for path in paths}


def _conversions() -> Any:
    """Return the module in which transformers 5 keeps them; whoever has one of its models has loaded it."""
    return sys.modules.get("transformers.conversion_mapping")


def _renamings(root: nn.Module, **options: bool) -> list[Any]:
    """Return the renamings of a model's checkpoints; fresh ones, because some of them remember what they met."""
    module, kind = _conversions(), model_type(root)
    if not (module and kind and hasattr(root, "base_model_prefix") and module.get_checkpoint_conversion_mapping(kind)):
        return []
    return [step for step in module.get_model_conversion_mapping(root, **options) if not hasattr(step, "operations")]


def _renamed(paths: Iterable[str], steps: Sequence[Any]) -> dict[str, str]:
    found = {}
    for path in sorted(paths):
        key = path + _FACTOR
        for step in steps:
            key, _ = step.rename_source_key(key)
        found[path] = key.removesuffix(_FACTOR)
    return found


def has_many_names(names: Sequence[str]) -> str:
    """Return why PEFT cannot adapt a layer that a model holds in several places."""
    return f"the model reaches it by {len(names)} names ({', '.join(names)}), and PEFT adapts one"
