"""What the tensors of a base on disk are called by an adapter, which may have seen the model inside another one."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from itertools import product

from lightning_lora.names import listed, near_names

_DEEPEST = 3


class Renaming:
    """From the names of the base to those of the adapter: without a first part, with other parts in front.

    A model with a head calls ``h.0`` of its body ``transformer.h.0``; a LightningModule calls it ``model.h.0``.
    """

    def __init__(self, without: str = "", before: str = "") -> None:
        self.without, self.before = without, before

    def __call__(self, name: str) -> str:
        """Return the adapter's name of a tensor of the base."""
        return self.before + name.removeprefix(self.without)

    def back(self, name: str) -> str:
        """Return the name in the base of a tensor that only the adapter has."""
        return name.removeprefix(self.before)


def find_renaming(
    paths: Collection[str], names: Collection[str], resolves: Callable[[str, Collection[str]], bool]
) -> Renaming:
    """Return how the base's names become the adapter's.

    Args:
        paths: The modules that the adapter names.
        names: The names of the base's tensors.
        resolves: Whether a path names one of some modules.

    Raises:
        ValueError: No renaming lets all paths name modules of the base.
    """
    best: tuple[int, list[str]] = (-1, [])
    for renaming in _candidates(paths, names):
        renamed = [renaming(name) for name in names]
        if len(set(renamed)) < len(renamed):
            continue
        modules = module_paths(renamed)
        unresolved = sorted(path for path in paths if not resolves(path, modules))
        if not unresolved:
            return renaming
        if len(paths) - len(unresolved) > best[0]:
            best = (len(paths) - len(unresolved), unresolved)
    near = near_names(best[1][0], module_paths(names))
    hint = f" Closest names: {', '.join(map(repr, near))}." if near else ""
    raise ValueError(
        f"The base has no modules {listed(best[1])}, which the adapter names.{hint} It is another model, or one whose "
        "names its library changes while it loads: then load it, and use lightning_lora.load_adapter and merge."
    )


def module_paths(names: Collection[str]) -> set[str]:
    """Return the paths of all modules that hold tensors of these names, or hold modules that do."""
    found: set[str] = set()
    for name in names:
        path = name.rpartition(".")[0]
        while path and path not in found:
            found.add(path)
            path = path.rpartition(".")[0]
    return found


def _candidates(paths: Collection[str], names: Collection[str]) -> Iterator[Renaming]:
    parts = min(paths, default="").split(".")
    before = ["", *(".".join(parts[:depth]) + "." for depth in range(1, min(_DEEPEST, len(parts) - 1) + 1))]
    without = ["", *sorted({name.partition(".")[0] + "." for name in names if "." in name})[:16]]
    for cut, put in sorted(product(without, before), key=lambda pair: (bool(pair[0]) + bool(pair[1]), pair)):
        yield Renaming(cut, put)


def invert(names: Collection[str], renaming: Renaming) -> Mapping[str, str]:
    """Return the adapter's name of every tensor -> its name in the base."""
    return {renaming(name): name for name in names}
