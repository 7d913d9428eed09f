"""Names: the modules and parameters that the entries of a config match. Nothing here changes a model."""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from decimal import Decimal
from fnmatch import fnmatchcase
from typing import TypeVar

from torch import Tensor, nn

T = TypeVar("T")
ModuleNames = dict[str, tuple[nn.Module, tuple[str, ...]]]  # first name of a module -> it, and all its names

# Names that torch.compile, FSDP and activation checkpointing insert for the modules they wrap.
_WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")

# Modules that only hold others. They compute nothing, so none of them is a model.
CONTAINERS = (nn.ModuleDict, nn.ModuleList, nn.ParameterDict, nn.ParameterList)

# The child of a module with what it has under adapters that are not active (``named_adapters.py``).
OTHERS = "lora_others"

_DECIMAL = re.compile(r"(?<![\w.])(\d+\.\d*|\d*\.\d+|\d+(?=e))(e[-+]?\d+)?(?![\w.])")


def clean_name(name: str) -> str:
    """Return a module, parameter or buffer name without the parts that wrappers add."""
    for wrapper in _WRAPPERS:
        if wrapper in name:
            return ".".join(part for part in name.split(".") if part not in _WRAPPERS)
    return name


def join(path: str, key: str) -> str:
    """Return the dotted name of ``key`` in the module at ``path``; the root's path is empty."""
    return f"{path}.{key}" if path else key


def without_points(name: str) -> str:
    """Return a name with its decimal numbers written without points: ``lr=0.0003`` becomes ``lr=3e-4``.

    Names of modules, and so of adapters, have no points.
    """
    return _DECIMAL.sub(lambda found: _in_powers(Decimal(found[0])), name)


def _in_powers(number: Decimal) -> str:
    _, digits, exponent = number.normalize().as_tuple()
    if not isinstance(exponent, int) or exponent >= 0:
        return str(int(number))
    return f"{''.join(map(str, digits))}e{exponent}"


def is_glob(entry: str) -> bool:
    """Return whether a list entry is a glob instead of a name."""
    return any(character in entry for character in "*?[")


def sweeps(entries: str | Sequence[str], entry: str) -> bool:
    """Return whether an entry may cover modules that have no adapter, such as containers: globs and regexes do."""
    return isinstance(entries, str) or is_glob(entry)


def matches(entry: str, name: str) -> bool:
    """Return whether a list entry names a module: its full name, the end of it, or a glob over either."""
    if not is_glob(entry):
        return name == entry or name.endswith(f".{entry}")
    return fnmatchcase(name, entry) or fnmatchcase(name, f"*.{entry}")


def matches_pattern(key: str, name: str) -> bool:
    """Return whether a key of ``rank_pattern`` or ``alpha_pattern`` matches a layer.

    A key is an entry as in ``matches``, or a regular expression over the name or the end of it, as in PEFT.
    """
    if matches(key, name):
        return True
    try:
        return re.match(rf"(.*\.)?({key})$", name) is not None
    except re.error:  # a glob such as "*.fc1"
        return False


def first_match(patterns: Mapping[str, T], names: Sequence[str], default: T) -> T:
    """Return the value of the first pattern that names a layer known by these names."""
    if not patterns:
        return default
    return next((patterns[key] for key in patterns if any(matches_pattern(key, name) for name in names)), default)


def walk(module: nn.Module, *, every_name: bool = False) -> list[tuple[str, nn.Module]]:
    """Return a module and its descendants with clean names: ``named_modules`` in half of its time.

    Adapters that are not active are left out.

    Args:
        module: The root.
        every_name: Whether to list a submodule once for each path that reaches it.
    """
    found, seen, pending = [], set[nn.Module](), [("", module)]
    while pending:
        path, part = pending.pop()
        if not every_name:
            if part in seen:
                continue
            seen.add(part)
        found.append((path, part))
        for key, child in reversed(part._modules.items()):
            if child is not None and key != OTHERS:
                pending.append((path if key in _WRAPPERS else f"{path}.{key}" if path else key, child))
    return found


def parameters_of(module: nn.Module) -> list[nn.Parameter]:
    """Return a module's parameters, each once, without those of adapters that are not active."""
    parts = (part._parameters.values() for _, part in walk(module))
    return list(dict.fromkeys(each for own in parts for each in own if each is not None))


def module_names(module: nn.Module) -> ModuleNames:
    """Return every submodule once, by its first name, with all its names."""
    first: dict[nn.Module, str] = {}
    found: ModuleNames = {}
    for name, part in walk(module, every_name=True):
        if part in first:
            found[first[part]] = (part, (*found[first[part]][1], name))
        else:
            first[part], found[name] = name, (part, (name,))
    return found


def parameter_names(modules: Mapping[str, nn.Module]) -> dict[str, nn.Parameter]:
    """Return the parameters of named modules by name; a parameter in two modules has two names."""
    found = {}
    for path, part in modules.items():
        for key, parameter in part._parameters.items():
            if parameter is not None:
                found[f"{path}.{key}" if path else key] = parameter
    return found


def is_below(name: str, roots: Collection[str]) -> bool:
    """Return whether a name is one of the roots or lies below one."""
    return bool(roots) and any(name == root or name.startswith(f"{root}.") for root in roots)


def any_below(names: Sequence[str], roots: Collection[str]) -> bool:
    """Return whether one of a module's names is one of the roots or lies below one."""
    return any(is_below(name, roots) for name in names)


def selected(entries: str | Sequence[str], names: Sequence[str]) -> str | None:
    """Return the entry that selects a module known by these names, or None; a string is one regular expression."""
    if not entries:
        return None
    if isinstance(entries, str):
        return entries if any(re.fullmatch(entries, name) for name in names) else None
    return next((entry for entry in entries if any(matches(entry, name) for name in names)), None)


def unmatched(entries: str | Sequence[str], all_names: Iterable[Sequence[str]]) -> list[str]:
    """Return the entries that select none of the modules."""
    queries = [(entries, entries)] if isinstance(entries, str) else [(entry, (entry,)) for entry in entries]
    pool = list(all_names)
    return [entry for entry, query in queries if not any(selected(query, names) for names in pool)]


def parse_slices(text: object) -> list[slice]:
    """Parse slices such as ``"0:64, 192:256"`` or ``"::3"``.

    Raises:
        ValueError: The text is malformed.
    """
    found = []
    for part in text.split(",") if isinstance(text, str) else [""]:
        numbers = part.strip().split(":")
        if not 2 <= len(numbers) <= 3 or not all(re.fullmatch(r"\s*(-?\d+)?\s*", number) for number in numbers):
            raise ValueError(f"{text!r} is not a slice; write 'start:stop' or 'start:stop:step', joined by commas.")
        found.append(slice(*(int(number) if number.strip() else None for number in numbers)))
    if any(part.step == 0 for part in found):
        raise ValueError(f"{text!r} has step 0; a step must not be zero.")
    return found


def rows_of_slices(text: str, count: int) -> tuple[range, ...]:
    """Return the rows out of ``count`` that slices select.

    Raises:
        ValueError: The slices reach beyond the rows, select none, or select one twice.
    """
    rows = []
    for part in parse_slices(text):
        if any(edge is not None and not -count <= edge <= count for edge in (part.start, part.stop)):
            raise ValueError(f"{text!r} reaches beyond its {count} output features")
        rows.append(range(*part.indices(count)))
    chosen = [row for part in rows for row in part]
    if not all(rows):
        raise ValueError(f"{text!r} selects none of its {count} output features")
    if len(set(chosen)) < len(chosen):
        raise ValueError(f"{text!r} selects an output feature twice")
    return tuple(rows)


def stacks_of_blocks(parameters: Iterable[str]) -> dict[str, int]:
    """Return the paths of repeated blocks, such as ``model.layers``, with how many blocks each has.

    Blocks are the numbered parts of one module, if two or more of them have the same parameters, and some of these in
    modules of their own: not so the layers of an ``nn.Sequential``. Names alone decide, so that a model and its files
    have the same blocks.
    """
    inside: dict[str, dict[int, set[str]]] = {}
    for name in parameters:
        parts = name.split(".")
        for at, part in enumerate(parts[:-1]):
            if part.isdecimal():
                block = inside.setdefault(".".join(parts[:at]), {}).setdefault(int(part), set())
                block.add(".".join(parts[at + 1 :]))
    found = {}
    for path, blocks in inside.items():
        kinds = [frozenset(names) for names in blocks.values() if any("." in name for name in names)]
        if len(set(kinds)) < len(kinds):
            found[path] = max(blocks) + 1
    return found


def block_of(name: str, stacks: Collection[str]) -> tuple[str, int] | None:
    """Return the outermost stack that a module lies in, with the number of its block, or None."""
    parts = name.split(".")
    numbered = ((".".join(parts[:at]), part) for at, part in enumerate(parts) if part.isdecimal())
    return next(((path, int(part)) for path, part in numbered if path in stacks), None)


def numbers_of_blocks(entry: int | str, count: int) -> tuple[set[int], bool]:
    """Return which of ``count`` blocks a number or slices mean, and whether all that they mean is there."""
    if isinstance(entry, int):
        fits = -count <= entry < count
        return ({entry % count} if fits else set()), fits
    found, fits = set[int](), True
    for part in parse_slices(entry):
        numbers = range(*part.indices(count))
        found.update(numbers)
        fits = fits and bool(numbers)
        fits = fits and all(edge is None or -count <= edge <= count for edge in (part.start, part.stop))
    return found, fits


def near_names(entry: str, names: Iterable[str], limit: int = 4) -> list[str]:
    """Return the names closest to a misspelled entry, whole or by their last part."""
    names = [name for name in names if name]
    if "." in entry:
        return difflib.get_close_matches(entry, names, limit, 0.5)
    tails = sorted({name.rpartition(".")[2] for name in names})
    return difflib.get_close_matches(entry, [tail for tail in tails if not tail.isdigit()], limit, 0.5)


def listed(names: Sequence[str], limit: int = 6) -> str:
    """Return the first names and the number of further ones, for messages."""
    more = len(names) - limit
    return ", ".join(names[:limit]) + (f" and {more} more" if more > 0 else "")


def with_equal_roots(
    first: Mapping[str, T], second: Mapping[str, T], root: str | None, inner: tuple[bool, bool]
) -> tuple[dict[str, T], dict[str, T]]:
    """Return values of two adapters by names that are relative to the same module.

    The names of a checkpoint are relative to the LightningModule, and those of a PEFT directory to the model inside.

    Args:
        first: Values of the one adapter, by name.
        second: Those of the other.
        root: The attribute of the LightningModule that holds the model; found by the names if None.
        inner: Whether the names are relative to the model inside, for each.

    Raises:
        ValueError: The root does not fit: both adapters have names of the same kind, or no name lies below it.
    """
    if root is None:
        return _without_root(first, second), _without_root(second, first)
    if inner[0] == inner[1]:
        kind = "PEFT directories" if inner[0] else "relative to a LightningModule"
        raise ValueError(f"root={root!r} is for a checkpoint and a PEFT directory, but both adapters are {kind}.")
    outer = second if inner[0] else first
    if root and not any(is_below(name, (root,)) for name in outer):
        raise ValueError(f"root={root!r} holds no layer of the checkpoint: its layers are {listed([*outer], 3)}.")
    one, other = (
        {join(root, name) if is_inner else name: value for name, value in values.items()}
        for values, is_inner in zip((first, second), inner, strict=True)
    )
    return one, other


def _without_root(values: Mapping[str, T], others: Collection[str]) -> dict[str, T]:
    """Return values by names without the root that stands before them and not before others of the same model."""
    roots = {name.removesuffix(end) for name in values for each in others if name.endswith(end := f".{each}")}
    if not roots or {*values} & {*others}:
        return dict(values)
    root = max(roots, key=lambda each: (sum(f"{each}.{other}" in values for other in others), -len(each)))
    shorter = {name.removeprefix(f"{root}."): value for name, value in values.items()}
    return shorter if len(shorter) == len(values) else dict(values)


def target_names(module: nn.Module) -> dict[str, str]:
    """Return every module name that ``LoRAConfig`` can use, with the name of its class."""
    return {name: type(submodule).__name__ for name, (submodule, _) in module_names(module).items() if name}


def tied_names(parameters: Mapping[str, Tensor]) -> dict[str, tuple[str, ...]]:
    """Return the parameters that share memory with another one: name -> the other names.

    A module that is reached by two paths is one module: that alone does not tie its parameters.
    """
    owners: dict[int, list[str]] = {}
    for name, parameter in parameters.items():
        try:
            memory = parameter.data_ptr() or id(parameter)  # tensors without memory, as on the meta device, have 0
        except (RuntimeError, ValueError):  # tensor subclasses without an address, and parameters without a shape yet
            memory = id(parameter)
        owners.setdefault(memory, []).append(name)
    if len(owners) == len(parameters):
        return {}
    groups = [group for group in owners.values() if len(group) > 1]
    return {name: tuple(other for other in group if other != name) for group in groups for name in group}
