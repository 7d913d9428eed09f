"""Merging on disk: an adapter into a base of any size, one tensor at a time."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import reduce
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lightning_lora.disk.adapter_fit import Fitted, fit_adapter
from lightning_lora.disk.base_folder import INDEX_FILE, MODEL_CONFIG_FILE, TIE_OPTION, BaseFolder, open_base
from lightning_lora.layers import LoRALayer, TokenAdapter
from lightning_lora.names import join, listed
from lightning_lora.storage.atomic import replace_directory
from lightning_lora.storage.safetensors import Layout, StoredTensor, TensorWriter

_AT_ONCE = 2**20
_WIDE = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class MergedTensor(NamedTuple):
    """What merging did to one tensor.

    Attributes:
        name: The tensor, as the base calls it.
        update: Norm of the update.
        rounding: Norm of what the one rounding, to the stored precision, took from or added to the sum.
        largest: The largest rounding of an entry.
    """

    name: str
    update: float
    rounding: float
    largest: float


@dataclass
class MergeReport:
    """What was written.

    Attributes:
        merged: The tensors that hold an update.
        replaced: Those that were trained in full.
        added: Those that the base does not have.
        ignored: What the adapter brings that has no place in the base.
        untied: Whether the output layer has a weight of its own now.
        files: The files of tensors.
        size: Their bytes.
        compared: How many tensors of the base were found to be those that the adapter was trained on.
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
    dtype: torch.dtype | None = None,
    check_base: bool = True,
    progress: Callable[[int, int], None] | None = None,
) -> MergeReport:
    """Write a base with an adapter merged into it: the very bits that loading both and ``merge`` would give.

    Args:
        adapter: A PEFT directory, or the ``.ckpt`` of a LoRACallback run.
        base: A model's folder, or one file of safetensors.
        out: The folder to write; it must not hold anything.
        dtype: Precision of the floating point tensors; each keeps its own if left out.
        check_base: Refuse a base of other values than those that the adapter was trained on.
        progress: Called with the bytes done and the bytes to do.

    Raises:
        ValueError: The files do not fit, or cannot be merged without the model's code. Nothing was written.
        FileNotFoundError: One is not there.
        OSError: The folder could not be written; it is not there.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{str(out)!r} exists already and holds something. Name a new folder.")
    folder = open_base(base)
    fitted = fit_adapter(adapter, folder, check_base=check_base)
    merger = _Merger(folder, fitted, dtype, progress or (lambda _done, _all: None))
    replace_directory(out, merger.write, marker=MODEL_CONFIG_FILE, stale=())
    return merger.report


class _Merger:
    def __init__(
        self, base: BaseFolder, fitted: Fitted, dtype: torch.dtype | None, progress: Callable[[int, int], None]
    ) -> None:
        self.base, self.fitted, self.dtype, self.progress = base, fitted, dtype, progress
        self.stored = base.tensors
        self.mine = {mine: name for name, mine in fitted.names.items()}
        self.modules = dict(fitted.root.named_modules())
        self.heads = self._heads_to_write()
        self.report = MergeReport(ignored=list(fitted.ignored), untied=self._unties(), compared=fitted.compared)
        self._check()
        self.todo, self.done = sum(tensor.size for tensor in self.stored.values()), 0

    # --- what changes

    def _layer(self, mine: str) -> tuple[LoRALayer, str] | None:
        """Return the layer of which a tensor holds an update."""
        path, _, key = self.mine.get(mine, "").rpartition(".")
        layer = self.modules.get(path)
        return (layer, key) if isinstance(layer, LoRALayer) and key in layer.adapted_parameters() else None

    def _changes(self, mine: str) -> bool:
        """Return whether a tensor becomes another one than those that are tied to it."""
        found = self._layer(mine)
        low_rank = found and not all(isinstance(each, TokenAdapter) for each in found[0].adapters().values())
        return bool(low_rank) or self.mine.get(mine) in self.fitted.values

    def _heads_to_write(self) -> dict[str, str]:
        """Return the tied output layers that will be others than the embedding -> the embedding's tensor."""
        return {
            head: source
            for head, source in self.base.tied_heads.items()
            if self._changes(head) or self._changes(source)
        }

    def _unties(self) -> bool:
        tied = self.base.tied_names
        return bool(self.heads) or any(self._changes(name) for name in tied)

    def _check(self) -> None:
        tied = self.base.tied_names
        changed = [name for name in tied if self._changes(name)]
        rows = [name for name in tied if self._layer(name) and name not in changed]
        alone = changed if not (self.heads or "lm_head.weight" in tied) else []
        if alone or (rows and len(tied) > 1):
            raise ValueError(
                f"{listed(alone or rows)}: loading this base ties the weight to others, and its files do not say to "
                "which. Load the model and merge it in memory."
            )
        for path, layer in self.modules.items():
            for key in layer.adapted_parameters() if isinstance(layer, LoRALayer) else ():
                parameter = layer._parameters.get(key)
                if parameter is None:
                    raise ValueError(f"{path!r} has no {key} that could take the update.")
                if parameter.dtype not in _WIDE:
                    raise ValueError(
                        f"The weight of {path!r} is quantized ({parameter.dtype}); merge into an unquantized base."
                    )

    # --- writing

    @torch.no_grad()
    def write(self, folder: Path) -> None:
        """Write everything into an empty folder."""
        extra = [*self.heads, *self.fitted.added.values()]
        where: dict[str, str] = {}
        for index, name in enumerate(self.base.shards):
            more = extra if index == len(self.base.shards) - 1 else []
            where |= dict.fromkeys(self._write_shard(folder / name, name, more), name)
        self.report.files = list(self.base.shards)
        self._write_small_files(folder, where)

    def _write_shard(self, path: Path, name: str, extra: list[str]) -> list[str]:
        shard = self.base.shards[name]
        layouts = {each: self._layout(each) for each in (*shard.tensors, *extra)}
        with path.open("wb") as file:
            writer = TensorWriter(file, layouts, shard.metadata)
            for each, layout in layouts.items():
                self._write_tensor(writer, each, layout)
        self.report.size += sum(layout.size for layout in layouts.values())
        return list(layouts)

    def _layout(self, mine: str) -> Layout:
        source = self.stored.get(self.heads.get(mine, mine))
        like: Any = source or next(self.fitted.values[key] for key, new in self.fitted.added.items() if new == mine)
        dtype = self.dtype if self.dtype is not None and like.dtype in _WIDE else like.dtype
        return Layout(dtype, tuple(like.shape))

    def _write_tensor(self, writer: TensorWriter, mine: str, layout: Layout) -> None:
        stored = self.stored.get(self.heads.get(mine, mine))
        value = self._trained(mine)
        if value is not None:
            (self.report.replaced if stored else self.report.added).append(mine)
            writer.write(mine, value.to(layout.dtype))
        elif (found := self._layer(mine)) is not None:
            assert stored is not None
            merged, entry = _merged(*found, stored, layout.dtype)
            self.report.merged.append(MergedTensor(mine, *entry))
            writer.write(mine, merged)
        else:
            assert stored is not None
            writer.write(mine, stored.read().to(layout.dtype))
        self.done += stored.size if stored and mine in self.stored else 0
        self.progress(self.done, self.todo)

    def _trained(self, mine: str) -> Tensor | None:
        new = next((key for key, name in self.fitted.added.items() if name == mine), None)
        return self.fitted.values.get(new or self.mine.get(mine, ""))

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


def _merged(
    layer: LoRALayer, key: str, stored: StoredTensor, dtype: torch.dtype
) -> tuple[Tensor, tuple[float, float, float]]:
    """Return a tensor with its update, in the precision to store, and what the rounding did."""
    weight = stored.read()
    factors = [factor.dtype for adapter in layer.adapters_of(key) for factor in adapter.parameters()]
    total = weight.to(reduce(torch.promote_types, factors, torch.promote_types(weight.dtype, torch.float32)), copy=True)
    # As in memory: in place where the weight has the sum's precision, else by parts from the weight.
    if not layer.fold(key, total if total.dtype == weight.dtype else weight, into=total):
        before = layer._parameters[key]
        layer._parameters[key] = nn.Parameter(weight, requires_grad=False)
        total = layer.combined(key)
        layer._parameters[key] = before
    found = torch.empty(total.shape, dtype=dtype)  # the order of the dimensions in a file is that of the shape
    found.copy_(total)
    update = rounding = largest = 0.0
    for rows in _row_blocks(total):
        exact = total[rows]
        difference = found[rows].to(exact.dtype) - exact
        update += float(torch.linalg.vector_norm(exact - weight[rows])) ** 2
        rounding += float(torch.linalg.vector_norm(difference)) ** 2
        largest = max(largest, float(torch.linalg.vector_norm(difference, torch.inf)))
        if not math.isfinite(rounding):
            raise ValueError(
                f"The sum of weight and update of {join(type(layer).__name__, key)} {tuple(found.shape)} is too large "
                f"for {dtype}, or the base holds NaN or infinity. Choose a wider precision with --dtype."
            )
    return found, (math.sqrt(update), math.sqrt(rounding), largest)


def _row_blocks(tensor: Tensor) -> Iterator[slice]:
    step = max(1, _AT_ONCE // max(1, math.prod(tensor.shape[1:])))
    for start in range(0, tensor.shape[0] if tensor.ndim else 0, step):
        yield slice(start, start + step)
