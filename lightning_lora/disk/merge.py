"""Merging on disk: an adapter is merged into a base of any size, one tensor at a time."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import reduce
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lightning_lora.adapted_model import AdaptedModel
from lightning_lora.disk.base_folder import (
    INDEX_FILE,
    MODEL_CONFIG_FILE,
    TIE_OPTION,
    WIDE,
    BaseFolder,
    model_files,
    open_base,
)
from lightning_lora.disk.skeleton import Fitted, fit_adapter
from lightning_lora.layers import LoRALayer, TokenAdapter
from lightning_lora.names import join, listed
from lightning_lora.peft_format.directory import CONFIG_FILE
from lightning_lora.storage.atomic import check_apart, check_directory, replace_directory
from lightning_lora.storage.safetensors import Layout, TensorWriter

_AT_ONCE = 2**20


class MergedTensor(NamedTuple):
    """The effect of merging on one tensor.

    Attributes:
        name: Its name in the base.
        update: Norm of the update.
        rounding: Norm of the error from rounding the sum, once, to the stored precision.
        largest: The largest rounding error of an entry.
    """

    name: str
    update: float
    rounding: float
    largest: float


@dataclass
class MergeReport:
    """The outcome of a merge.

    Attributes:
        merged: The tensors that hold an update.
        replaced: Those that were trained in full.
        added: Those that the base does not have.
        ignored: Tensors of the adapter that have no place in the base.
        untied: Whether the output layer no longer shares its weight with the embedding.
        files: The safetensors files written.
        size: Their bytes.
        compared: Number of base tensors that match the adapter's fingerprint.
    """

    merged: list[MergedTensor] = field(default_factory=list)
    replaced: list[str] = field(default_factory=list)
    added: list[str] = field(default_factory=list)
    ignored: list[str] = field(default_factory=list)
    untied: bool = False
    files: list[str] = field(default_factory=list)
    size: int = 0
    compared: int = 0


def merge_files(
    adapter: Path,
    base: Path,
    out: Path,
    *,
    name: str | None = None,
    dtype: torch.dtype | None = None,
    check_base: bool = True,
    overwrite: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> MergeReport:
    """Write a base with an adapter merged into it: the same bits as loading both and calling ``merge``.

    ``name`` is that of one adapter in a ``.ckpt`` with several. Floating point tensors keep their own precision unless
    ``dtype`` is given. ``overwrite`` lets it replace a model in the folder, never the base or an adapter; other files
    there stay. ``progress`` is called with the bytes done and the total.

    Raises:
        ValueError: The files do not fit each other, cannot be merged without the model, or the adapter was trained on
            another base and ``check_base`` is set. Nothing was written.
        FileNotFoundError: A file does not exist.
        OSError: The folder could not be written; it was removed.
    """
    check_apart(out, adapter, base)
    if (out / CONFIG_FILE).exists():
        raise ValueError(
            f"{str(out)!r} holds an adapter ({CONFIG_FILE}), which libraries would apply to the merged model, too. "
            "Nothing was written. Choose another folder."
        )
    stale = model_files(out)
    marker = next(iter(stale), MODEL_CONFIG_FILE)  # a single file as the base has no config
    check_directory(out, marker=marker, overwrite=overwrite)
    folder = open_base(base)
    fitted = fit_adapter(adapter, folder, name, check_base=check_base)
    merger = _Merger(folder, fitted, dtype, progress)
    replace_directory(out, merger.write, marker=marker, stale=stale, overwrite=overwrite)
    return merger.report


class _Merger:
    """One merge; tensors go by the names that they have in the base."""

    def __init__(
        self, base: BaseFolder, fitted: Fitted, dtype: torch.dtype | None, progress: Callable[[int, int], None] | None
    ) -> None:
        self.base, self.dtype, self.progress = base, dtype, progress
        names, layers = fitted.names | fitted.added, AdaptedModel(fitted.root).layers
        self.trained = {names[name]: value for name, value in fitted.values.items() if name in names}
        adapted = {join(path, key): (each, key) for path, each in layers.items() for key in each.adapted_parameters()}
        self.adapted = {names[name]: each for name, each in adapted.items() if name in names}
        for name, stored in fitted.names.items():
            path, _, key = name.rpartition(".")
            first = names.get(join(fitted.aliases.get(path, path), key), stored)
            if first in self.trained:
                self.trained[stored] = self.trained[first]
            if first in self.adapted:
                self.adapted[stored] = self.adapted[first]
        self.added = list(fitted.added.values())
        # Tied output layers that will differ from the embedding.
        heads = base.tied_heads.items()
        self.heads = {head: source for head, source in heads if self._changes(head) or self._changes(source)}
        untied = bool(self.heads) or any(map(self._changes, base.tied_names))
        self.report = MergeReport(ignored=list(fitted.ignored), untied=untied, compared=fitted.compared)
        self.todo, self.done = sum(tensor.size for tensor in base.tensors.values()), 0
        self._check_ties()
        for path, layer in layers.items():
            _check_weights(path, layer)

    def _changes(self, name: str) -> bool:
        """Return whether a tensor will differ from those that are tied to it; trained tokens change all of them."""
        layer, _ = self.adapted.get(name, (None, ""))
        low_rank = layer and not all(isinstance(adapter, TokenAdapter) for adapter in layer.adapters().values())
        return bool(low_rank) or name in self.trained

    def _check_ties(self) -> None:
        tied = self.base.tied_names
        changed = [name for name in tied if self._changes(name)]
        rows = [name for name in tied if name in self.adapted and name not in changed]
        alone = changed if not (self.heads or "lm_head.weight" in tied) else []
        if alone or (rows and len(tied) > 1):
            raise ValueError(
                f"{listed(alone or rows)}: loading this base ties this weight to others, but the files do not say "
                "which. Load the model and merge it in memory."
            )

    @torch.no_grad()
    def write(self, folder: Path) -> None:
        """Write everything into an empty folder."""
        extra = [*self.heads, *self.added]
        where: dict[str, str] = {}
        for shard, table in self.base.shards.items():
            names = [*table.tensors, *(extra if shard == [*self.base.shards][-1] else ())]
            layouts = {name: self._layout(name) for name in names}
            with (folder / shard).open("wb") as file:
                writer = TensorWriter(file, layouts, table.metadata)
                for name, layout in layouts.items():
                    writer.write(name, self._value(name, layout.dtype))
                    self._count(name)
            self.report.size += sum(layout.size for layout in layouts.values())
            where |= dict.fromkeys(layouts, shard)
        self.report.files = list(self.base.shards)
        self._write_small_files(folder, where)

    def _layout(self, name: str) -> Layout:
        like = self.base.tensors.get(self.heads.get(name, name)) or self.trained[name]
        dtype = self.dtype if self.dtype is not None and like.dtype in WIDE else like.dtype
        return Layout(dtype, tuple(like.shape))

    def _value(self, name: str, dtype: torch.dtype) -> Tensor:
        stored = self.base.tensors.get(self.heads.get(name, name))
        if name in self.trained:
            (self.report.replaced if stored else self.report.added).append(name)
            return self.trained[name].to(dtype)
        assert stored is not None
        if name not in self.adapted:
            return stored.read().to(dtype)
        value, norms = _merged(*self.adapted[name], stored.read(), dtype)
        self.report.merged.append(MergedTensor(name, *norms))
        return value

    def _count(self, name: str) -> None:
        if name in self.base.tensors:
            self.done += self.base.tensors[name].size
        if self.progress:
            self.progress(self.done, self.todo)

    def _write_small_files(self, folder: Path, where: dict[str, str]) -> None:
        for path in self.base.carried:
            (folder / path.name).write_bytes(path.read_bytes())
        changes: dict[str, Any] = {TIE_OPTION: False} if self.report.untied else {}
        if self.dtype is not None:
            text = str(self.dtype).removeprefix("torch.")
            changes |= dict.fromkeys({"dtype", "torch_dtype"} & self.base.config.keys(), text)
        if changes and self.base.config:
            _write_json(folder / MODEL_CONFIG_FILE, dict(self.base.config) | changes)
        if self.base.index is not None:
            known = self.base.index.get("metadata")
            metadata = (known if isinstance(known, dict) else {}) | {"total_size": self.report.size}
            _write_json(folder / INDEX_FILE, {"metadata": metadata, "weight_map": dict(sorted(where.items()))})


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _check_weights(path: str, layer: LoRALayer) -> None:
    """Raise if a layer has a weight that cannot take an update."""
    for key in layer.adapted_parameters():
        parameter = layer._parameters.get(key)
        if parameter is None:
            raise ValueError(f"{path!r} has no {key} that could take the update.")
        if parameter.is_complex():
            raise ValueError(
                f"The weight of {path!r} is complex ({parameter.dtype}) and its update is real, so nothing can be "
                "merged into it. Load the adapter with load_adapter, and keep it unmerged."
            )
        if parameter.dtype not in WIDE:
            raise ValueError(
                f"The weight of {path!r} is quantized ({parameter.dtype}); merge into an unquantized base."
            )


def _merged(
    layer: LoRALayer, key: str, weight: Tensor, dtype: torch.dtype
) -> tuple[Tensor, tuple[float, float, float]]:
    """Return a weight with its update, in the precision to store, and the norms of the update and of the rounding."""
    factors = [factor.dtype for adapter in layer.adapters_of(key) for factor in adapter.parameters()]
    total = weight.to(reduce(torch.promote_types, factors, torch.promote_types(weight.dtype, torch.float32)), copy=True)
    # As in memory: in place where the weight has the sum's precision, else by parts from the weight.
    if not layer.fold(key, total if total.dtype == weight.dtype else weight, into=total):
        own = layer._parameters[key]
        layer._parameters[key] = nn.Parameter(weight, requires_grad=False)
        total = layer.combined(key)
        layer._parameters[key] = own
    found = torch.empty(total.shape, dtype=dtype)  # contiguous, as in a file
    found.copy_(total)
    update = rounding = largest = 0.0
    step = max(1, _AT_ONCE // max(1, math.prod(total.shape[1:])))
    for exact, rounded, before in zip(*(torch.split(each, step) for each in (total, found, weight)), strict=True):
        difference = rounded.to(exact.dtype) - exact
        update += float(torch.linalg.vector_norm(exact - before)) ** 2
        rounding += float(torch.linalg.vector_norm(difference)) ** 2
        largest = max(largest, float(torch.linalg.vector_norm(difference, torch.inf)))
        if not math.isfinite(rounding):
            raise ValueError(
                f"The sum of weight and update of {join(type(layer).__name__, key)} {tuple(found.shape)} is too large "
                f"for {dtype}, or the base holds NaN or infinity. Choose a wider precision with --dtype."
            )
    return found, (math.sqrt(update), math.sqrt(rounding), largest)
