"""Read an adapter as a list of low-rank matrices: from a module, a checkpoint or a PEFT directory."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lightning_lora.adapted_model import AdaptedModel
from lightning_lora.analysis.spectrum import ThinSVD, thin_svd
from lightning_lora.config import LoRAConfig
from lightning_lora.disk.adapter_fit import Fitted, fit_adapter
from lightning_lora.disk.base_folder import BaseFolder, open_base
from lightning_lora.layers import Adapter, LoRALayer, LowRankAdapter, TokenAdapter, base_parameter
from lightning_lora.loading import read_adapter
from lightning_lora.names import join, listed, module_names
from lightning_lora.peft_format.directory import PeftFile
from lightning_lora.peft_format.importing import make_import
from lightning_lora.peft_format.names import matching_root
from lightning_lora.planning.plan import PlannedLayer
from lightning_lora.planning.planner import make_plan
from lightning_lora.sharding import whole
from lightning_lora.state import check_not_merged
from lightning_lora.storage.checkpoint import CheckpointFile
from lightning_lora.storage.safetensors import StoredTensor

WIDE = (torch.float16, torch.bfloat16, torch.float32, torch.float64)  # any other precision of a weight is quantized
_BLOCK = re.compile(r"(.*?(?:^|\.)\d+)\.(.+)$")

Progress = Callable[[int, int], None]


@dataclass(frozen=True, eq=False)
class AdapterMatrix:
    """One update ``scaling * B @ A`` of one weight matrix.

    Kernels are flattened to matrices over all dimensions but the first. Each slice is a matrix of its own, and so is
    each expert of a stack, named ``layer[expert]``.

    Attributes:
        name: The adapter's name, as in ``AttachReport``.
        A: ``(rank, in)``.
        B: ``(out, rank)``.
        scaling: Factor of ``B @ A``.
        weight: The frozen matrix, ``(out, in)``, or None if unknown; it shares memory with the model.
        is_rescaled: Whether DoRA also rescales the rows of the sum, which the factors do not show.
    """

    name: str
    A: Tensor
    B: Tensor
    scaling: float
    weight: Tensor | None = None
    is_rescaled: bool = False

    @property
    def shape(self) -> tuple[int, int]:
        """Shape of the update, ``(out, in)``."""
        return self.B.shape[0], self.A.shape[1]

    @property
    def rank(self) -> int:
        """Rank of the factors."""
        return self.A.shape[0]

    def svd(self) -> ThinSVD:
        """Return the decomposition of the update.

        Raises:
            ValueError: The factors contain NaN or infinity.
        """
        if not (bool(torch.isfinite(self.A).all()) and bool(torch.isfinite(self.B).all())):
            raise ValueError(f"The factors of {self.name!r} contain NaN or infinity; the training diverged.")
        return thin_svd(self.A, self.B, self.scaling)


def read_matrices(
    source: nn.Module | str | PathLike[str], base: nn.Module | None = None, *, tokens: bool = False
) -> list[AdapterMatrix]:
    """Return the updates of an adapter, one matrix each.

    Args:
        source: An adapted module, a ``.ckpt`` written under a ``LoRACallback``, or a PEFT directory from any writer.
        base: The base model of a file, for the weights; it may carry adapters itself, and is not changed. Without it
            the matrices have no weights.
        tokens: Whether to include trained embedding rows, as the change of those rows; requires the base.

    Raises:
        ValueError: The source has no adapters, cannot be read or does not fit the base.
        FileNotFoundError: The file does not exist.
        RuntimeError: The adapters are merged into the weights for now, or others were merged for good.
    """
    if isinstance(source, nn.Module):
        if base is not None:
            raise ValueError("An adapted module contains its base; leave base out.")
        return _of_module(source, tokens=tokens)
    if tokens and base is None:
        raise ValueError("tokens=True needs the base: a file holds the trained rows, not how they changed.")
    file = read_adapter(source)
    if base is None:
        return _of_file(file, {}, tokens=False)
    check_not_merged(base, file.merges)
    if isinstance(file, PeftFile):
        return _of_directory(file, base, tokens=tokens)
    return _of_file(file, _recorded_weights(base, file.record), tokens=tokens)


# --- names


def place(name: str) -> tuple[str, str]:
    """Return the block of a layer and its name within it: ``h.3.attn.q`` is ``attn.q`` of ``h.3``.

    The block of a layer outside of blocks is ``""``; experts keep their number, ``up[2]``.
    """
    name, _, expert = name.partition("[")
    found = _BLOCK.match(name)
    block, kind = found.groups() if found else ("", name)
    return block, kind + (f"[{expert}" if expert else "")


def kind_of(name: str) -> str:
    """Return the name of a layer within its block, the same for all blocks and all experts of a stack.

    A layer that has only a number there keeps its full name, as numbers name nothing.
    """
    block, kind = place(name.partition("[")[0])
    return join(block, kind) if kind.isdigit() else kind


def in_order(name: str) -> tuple[tuple[int, int, str], ...]:
    """Return a key that sorts names by their numbers: ``h.9`` comes before ``h.10``."""
    parts = re.findall(r"\d+|[^\d]+", name)
    return tuple((0, int(part), "") if part.isdecimal() else (1, 0, part) for part in parts)


# --- a module


class _Placed(NamedTuple):
    """An adapter, with the name of its layer and the layer."""

    adapter: Adapter
    path: str
    layer: LoRALayer


@torch.no_grad()
def _of_module(module: nn.Module, *, tokens: bool) -> list[AdapterMatrix]:
    placed = _placed(module)
    if not placed:
        raise ValueError(f"{type(module).__name__} has no adapters; call attach or load_adapter first.")
    _refuse_merged(module)
    return [matrix for name, each in placed.items() for matrix in _of_adapter(name, each, tokens=tokens)]


def _placed(module: nn.Module) -> dict[str, _Placed]:
    """Return every adapter of a module by its name."""
    view = AdaptedModel(module)
    paths = {id(adapter): path for path, layer in view.layers.items() for adapter in layer.adapters().values()}
    return {
        name: _Placed(adapter, path := paths[id(adapter)], view.layers[path]) for name, adapter in view.adapters.items()
    }


@torch.no_grad()
def _of_adapter(name: str, placed: _Placed, *, tokens: bool) -> Iterator[AdapterMatrix]:
    adapter = placed.adapter
    if isinstance(adapter, LowRankAdapter):
        weight = _frozen_matrix(adapter, placed.layer)
        factors = whole(adapter.A).detach(), whole(adapter.B).detach()
        yield from _matrices(name, *factors, adapter.spec.scaling, weight, is_rescaled=adapter.spec.use_dora)
    elif isinstance(adapter, TokenAdapter) and tokens:
        yield from _changed_rows(name, whole(adapter.rows).detach(), _frozen_matrix(adapter, placed.layer))


def _refuse_merged(module: nn.Module) -> None:
    """Reject a module inside ``merged()``: its weights are not the base's."""
    if merged := [name for name, layer in AdaptedModel(module).layers.items() if layer.lora_mode == "merged"]:
        raise RuntimeError(f"The adapters of {listed(merged)} are merged into their weights; leave merged() first.")


@torch.no_grad()
def _frozen_matrix(adapter: Adapter, module: nn.Module) -> Tensor | None:
    """Return the adapted rows of a base weight as ``(out, in)`` or ``(experts, out, in)``; None on the meta device."""
    weight = whole(base_parameter(module, adapter.parameter)).detach()
    if weight.is_meta:
        return None
    matrix = adapter.as_matrix(weight) if isinstance(adapter, LowRankAdapter) else weight
    return matrix.index_select(0, adapter.index) if adapter.spec.rows else matrix


def _matrices(
    name: str, A: Tensor, B: Tensor, scaling: float, weight: Tensor | None = None, *, is_rescaled: bool = False
) -> Iterator[AdapterMatrix]:
    """Yield the update of plain factors, or those of each expert of a stack.

    Args:
        name: Name of the adapter.
        A: ``(rank, in)`` or ``(experts, rank, in)``.
        B: ``(out, rank)`` or ``(experts, out, rank)``.
        scaling: Factor of ``B @ A``.
        weight: ``(out, in)`` or ``(experts, out, in)``.
        is_rescaled: Whether DoRA rescales the sum.

    Raises:
        ValueError: The weight and the update differ in shape.
    """
    shape = (*B.shape[:-1], A.shape[-1])
    if weight is not None and tuple(weight.shape) != shape:
        raise ValueError(f"{name}: the update is {shape}, the model's weight {tuple(weight.shape)}.")
    if A.ndim == 2:
        yield AdapterMatrix(name, A, B, scaling, weight, is_rescaled)
        return
    for expert in range(A.shape[0]):
        part = None if weight is None else weight[expert]
        yield AdapterMatrix(f"{name}[{expert}]", A[expert], B[expert], scaling, part, is_rescaled)


def _changed_rows(name: str, rows: Tensor, weight: Tensor | None) -> Iterator[AdapterMatrix]:
    """Yield the change of an embedding's trained rows, ``(tokens, features)``, if the rows before it are known."""
    if weight is not None:
        dtype = torch.promote_types(rows.dtype, torch.float32)
        change = rows.to(weight.device, dtype) - weight.to(dtype)
        yield AdapterMatrix(name, change, torch.eye(len(rows), dtype=dtype, device=weight.device), 1.0, weight)


# --- a file


def _of_file(
    file: PeftFile | CheckpointFile, weights: Mapping[str, Tensor | None], *, tokens: bool
) -> list[AdapterMatrix]:
    names = sorted(file.layers, key=in_order) if isinstance(file, PeftFile) else file.layers
    found: list[AdapterMatrix] = []
    for layer in (file.layers[name] for name in names):
        if layer.scaling is None:
            raise ValueError(
                f"The rank or the scaling of {layer.label!r} depends on the model: patterns match parameters that the "
                "file does not name, or the PEFT that wrote it is unknown. Give the model as base."
            )
        is_rescaled = layer.magnitude is not None
        found += _matrices(
            layer.label, layer.A, layer.B, layer.scaling, weights.get(layer.label), is_rescaled=is_rescaled
        )
    for name, stored in file.tokens.items() if tokens else ():
        found += _changed_rows(name, stored.rows, weights.get(name))
    return found


def _of_directory(file: PeftFile, base: nn.Module, *, tokens: bool) -> list[AdapterMatrix]:
    root = matching_root(base, file.paths)
    prefix = next(name for name, (part, _) in module_names(base).items() if part is root)
    content = make_import(root, file)
    weights = _planned_weights(root, content.config)
    _check_known([layer.label for layer in content.layers], weights, base)
    found: list[AdapterMatrix] = []
    for layer in content.layers:
        f, name = layer.factors, join(prefix, layer.label)
        found += _matrices(name, f.A, f.B, f.scaling, weights[layer.label], is_rescaled=f.magnitude is not None)
    for label, (_, rows) in content.tokens.items() if tokens else ():
        found += _changed_rows(join(prefix, label), rows, weights[label])
    return found


# --- the weights of a base in memory


def _recorded_weights(base: nn.Module, record: Mapping[str, Any]) -> dict[str, Tensor | None]:
    """Return the frozen matrices that the configs in a checkpoint's record adapt, by the adapters' names."""
    modules, found = module_names(base), dict[str, Tensor | None]()
    for entry in record["adapters"]:
        root = entry["root"]
        if root not in modules:
            raise ValueError(f"The adapter was attached to {root!r}, which {type(base).__name__} does not have.")
        weights = _planned_weights(modules[root][0], LoRAConfig.from_dict(entry["config"]))
        found |= {join(root, label): weight for label, weight in weights.items()}
    _check_known(record["layers"], found, base)
    return found


def _planned_weights(root: nn.Module, config: LoRAConfig) -> dict[str, Tensor | None]:
    """Return the frozen matrices that this config would adapt, by the adapters' names."""
    _refuse_merged(root)
    return {layer.label: _planned_weight(layer) for layer in make_plan(root, config).layers}


def _planned_weight(layer: PlannedLayer) -> Tensor | None:
    spec = layer.spec
    if not issubclass(layer.adapter, TokenAdapter):
        # The smallest adapter of the kind, never attached: only it knows how the kind stores its weight.
        spec = spec._replace(rank=1, use_dora=False, lora_bias=False)
    return _frozen_matrix(layer.adapter(layer.module, spec, layer.parameter), layer.module)


def _check_known(labels: Collection[str], weights: Mapping[str, Any], base: nn.Module) -> None:
    if unknown := [label for label in labels if label not in weights]:
        raise ValueError(f"{type(base).__name__} is not the model that was adapted: it has no {listed(unknown)}.")


# --- the weights of a base on disk


def stored_matrices(
    adapter: str | PathLike[str],
    base: str | PathLike[str],
    *,
    tokens: bool = False,
    progress: Progress | None = None,
    check_base: bool = True,
) -> Iterator[AdapterMatrix]:
    """Return an iterator over the updates of an adapter on disk; only one weight is in memory at a time.

    The adapter is put on a skeleton of the base, as ``lightning-lora merge`` does, so that both read it alike.

    Args:
        adapter: A PEFT directory, or the ``.ckpt`` of a LoRACallback run.
        base: A model's folder, or one safetensors file.
        tokens: Whether to include trained embedding rows.
        progress: Called with the number of adapters done and their total.
        check_base: Reject a base whose values differ from those that the adapter was trained on.

    Raises:
        ValueError: The files do not fit each other, or the base is quantized. Nothing was yielded yet.
        FileNotFoundError: The adapter or the base does not exist.
    """
    folder = open_base(Path(base))
    fitted = fit_adapter(Path(adapter), folder, check_base=check_base)
    placed = _placed(fitted.root)
    weights = _stored_weights(placed, fitted, folder)
    return _one_by_one(placed, weights, tokens, progress or (lambda _done, _all: None))


def _stored_weights(placed: Mapping[str, _Placed], fitted: Fitted, base: BaseFolder) -> dict[str, StoredTensor]:
    """Return where the weight of each adapter lies, by the adapter's name."""
    stored_as = {name: base.tied_heads.get(stored, stored) for name, stored in fitted.names.items()}
    names = {name: join(each.path, each.adapter.parameter) for name, each in placed.items()}
    if missing := [own for own in names.values() if stored_as.get(own) not in base.tensors]:
        raise ValueError(f"The base does not contain {listed(missing)}, which the adapter updates.")
    found = {name: base.tensors[stored_as[own]] for name, own in names.items()}
    if quantized := [names[name] for name, tensor in found.items() if tensor.dtype not in WIDE]:
        raise ValueError(f"The base is quantized ({listed(quantized)}); give the unquantized one.")
    return found


def _one_by_one(
    placed: Mapping[str, _Placed], weights: Mapping[str, StoredTensor], tokens: bool, progress: Progress
) -> Iterator[AdapterMatrix]:
    for done, (name, each) in enumerate(placed.items()):
        progress(done, len(placed))
        with _weight_in_place(each.layer, each.adapter.parameter, weights[name]):
            yield from _of_adapter(name, each, tokens=tokens)
    progress(len(placed), len(placed))


@contextmanager
def _weight_in_place(layer: nn.Module, key: str, stored: StoredTensor) -> Iterator[None]:
    """Give a layer of the skeleton its real weight for a while."""
    before = layer._parameters[key]
    layer._parameters[key] = nn.Parameter(stored.read(), requires_grad=False)
    try:
        yield
    finally:
        layer._parameters[key] = before
