"""Read an adapter as a list of low-rank matrices: from a module, a checkpoint or a PEFT directory."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lightning_lora.adapted_model import AdaptedModel
from lightning_lora.analysis.spectrum import ThinSVD, thin_svd
from lightning_lora.config import LoRAConfig
from lightning_lora.disk.base_folder import WIDE, BaseFolder, open_base
from lightning_lora.disk.skeleton import Fitted, fit_adapter
from lightning_lora.layers import Adapter, LoRALayer, LowRankAdapter, TokenAdapter, base_parameter
from lightning_lora.loading import read_adapter
from lightning_lora.named_adapters import active_adapter, adapter_names
from lightning_lora.names import join, listed, module_names
from lightning_lora.peft_format.directory import PeftFile
from lightning_lora.peft_format.importing import make_import, matching_root
from lightning_lora.planning.planner import make_plan
from lightning_lora.sharding import whole
from lightning_lora.state import check_not_merged, has_base_values
from lightning_lora.storage.adapter_file import StoredLayer, StoredWeight
from lightning_lora.storage.checkpoint import CheckpointFile, adapters_in
from lightning_lora.storage.safetensors import StoredTensor

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
        kernel: What the columns of ``A`` are flattened from, ``(channels, *positions)`` of a convolution's kernel;
            empty if there is none, or the file does not tell.
        writes_kernel: Whether these columns are of the layer's outputs, and the rows of ``B`` of its inputs, as in a
            transposed convolution.
    """

    name: str
    A: Tensor
    B: Tensor
    scaling: float
    weight: Tensor | None = None
    is_rescaled: bool = False
    kernel: tuple[int, ...] = ()
    writes_kernel: bool = False

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


def which_of_several(source: nn.Module | str | PathLike[str]) -> str | None:
    """Return the name of the adapter that is read from a source, its active or its trained one, if it has several."""
    if isinstance(source, nn.Module):
        return active_adapter(source) if len(adapter_names(source)) > 1 else None
    return adapters_in(Path(source))[0]


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
    if base is not None:
        check_not_merged(base, file.merges, lambda: has_base_values(base, file.base))
        layers, rows, weights = _with_weights(file, base)
        return _matrices(layers, rows if tokens else {}, weights)
    names = sorted(file.layers, key=in_order) if isinstance(file, PeftFile) else file.layers
    return _matrices([file.layers[name] for name in names], {}, {})


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


def evenly(items: Sequence[Any], most: int) -> list[Any]:
    """Return at most ``most`` of the items, from the first to the last in even steps."""
    if len(items) <= most:
        return list(items)
    return [items[round(at * (len(items) - 1) / (most - 1))] for at in range(most)]


# --- matrices


def _matrices(
    layers: Collection[StoredLayer], rows: Mapping[str, Tensor], weights: Mapping[str, Tensor | None]
) -> list[AdapterMatrix]:
    """Return the updates of layers, and the changes of trained embedding rows; weights are matrices, by the same names.

    Raises:
        ValueError: Only the model can tell a scaling, or a weight and its update differ in shape.
    """
    found = [matrix for layer in layers for matrix in _of_layer(layer, weights.get(layer.label))]
    for name, trained in rows.items():
        found += _of_rows(name, trained, weights.get(name))
    return found


def _of_layer(layer: StoredLayer, weight: Tensor | None) -> Iterator[AdapterMatrix]:
    """Yield the update of plain factors, or those of each expert of a stack."""
    name, A, B, scaling = layer.label, layer.A, layer.B, layer.scaling
    if scaling is None:
        raise ValueError(
            f"The rank or the scaling of {name!r} depends on the model: patterns match parameters that the file does "
            "not name, or the PEFT that wrote it is unknown. Give the model as base."
        )
    shape = (*B.shape[:-1], A.shape[-1])
    if weight is not None and tuple(weight.shape) != shape:
        raise ValueError(f"{name}: the update is {shape}, the model's weight {tuple(weight.shape)}.")
    is_rescaled = layer.magnitude is not None
    if A.ndim == 2:
        stored = layer.weight
        kernel = stored.shape[1:] if stored.kind == "conv" else stored.kernel
        kernel = kernel if math.prod(kernel) == A.shape[1] else ()
        yield AdapterMatrix(name, A, B, scaling, weight, is_rescaled, kernel, stored.writes_kernel)
        return
    for expert in range(A.shape[0]):
        part = None if weight is None else weight[expert]
        yield AdapterMatrix(f"{name}[{expert}]", A[expert], B[expert], scaling, part, is_rescaled)


def _of_rows(name: str, rows: Tensor, weight: Tensor | None) -> Iterator[AdapterMatrix]:
    """Yield the change of an embedding's trained rows, ``(tokens, features)``, if the rows before it are known."""
    if weight is not None:
        dtype = torch.promote_types(rows.dtype, torch.float32)
        change = rows.to(weight.device, dtype) - weight.to(dtype)
        yield AdapterMatrix(name, change, torch.eye(len(rows), dtype=dtype, device=weight.device), 1.0, weight)


@torch.no_grad()
def _frozen_matrix(adapter: Adapter, weight: Tensor) -> Tensor | None:
    """Return the adapted rows of a base weight as ``(out, in)`` or ``(experts, out, in)``; None on the meta device."""
    weight = whole(weight).detach()
    if weight.is_meta:
        return None
    matrix = adapter.as_matrix(weight) if isinstance(adapter, LowRankAdapter) else weight
    return matrix.index_select(0, adapter.index) if adapter.spec.rows else matrix


# --- a module


class _Placed(NamedTuple):
    """An adapter, with the name of its layer and the layer."""

    adapter: Adapter
    path: str
    layer: LoRALayer


def _placed(module: nn.Module) -> dict[str, _Placed]:
    """Return every adapter of a module by its name."""
    view = AdaptedModel(module)
    paths = {id(adapter): path for path, layer in view.layers.items() for adapter in layer.adapters().values()}
    return {
        name: _Placed(adapter, path := paths[id(adapter)], view.layers[path]) for name, adapter in view.adapters.items()
    }


def _of_module(module: nn.Module, *, tokens: bool) -> list[AdapterMatrix]:
    placed = _placed(module)
    if not placed:
        raise ValueError(f"{type(module).__name__} has no adapters; call attach or load_adapter first.")
    _refuse_merged(module)
    return [
        matrix
        for name, (adapter, _, layer) in placed.items()
        for matrix in _of_adapter(name, adapter, base_parameter(layer, adapter.parameter), tokens=tokens)
    ]


def _of_adapter(name: str, adapter: Adapter, weight: Tensor, *, tokens: bool) -> Iterator[AdapterMatrix]:
    """Yield the updates of an adapter in memory, for the base weight of its layer."""
    if isinstance(adapter, LowRankAdapter):
        magnitude = adapter.magnitude if adapter.spec.use_dora else None
        A, B = (factor.detach() for factor in adapter.whole_factors())
        stored = StoredWeight(kernel=adapter.kernel_shape, writes_kernel=adapter.writes_kernel)
        layer = StoredLayer(name, A, B, A.shape[-2], adapter.spec.scaling, magnitude, weight=stored)
        yield from _of_layer(layer, _frozen_matrix(adapter, weight))
    elif isinstance(adapter, TokenAdapter) and tokens:
        yield from _of_rows(name, whole(adapter.rows).detach(), _frozen_matrix(adapter, weight))


def _refuse_merged(module: nn.Module) -> None:
    """Reject a module inside ``merged()``: its weights are not the base's."""
    if merged := [name for name, layer in AdaptedModel(module).layers.items() if layer.lora_mode == "merged"]:
        raise RuntimeError(f"The adapters of {listed(merged)} are merged into their weights; leave merged() first.")


# --- a file, with a base in memory


def _with_weights(
    file: PeftFile | CheckpointFile, base: nn.Module
) -> tuple[list[StoredLayer], dict[str, Tensor], dict[str, Tensor | None]]:
    """Return the updates and the trained embedding rows in a file, and the base's matrices for them."""
    if isinstance(file, CheckpointFile):
        configs = {entry["root"]: LoRAConfig.from_dict(entry["config"]) for entry in file.record["adapters"]}
        layers = list(file.layers.values())
        rows = {name: stored.rows for name, stored in file.tokens.items()}
    else:
        module = matching_root(base, file)
        root = next(name for name, (part, _) in module_names(base).items() if part is module)
        content = make_import(module, file)
        configs = {root: content.config}
        found = [(layer.label, layer.factors) for layer in content.layers]
        kernels = {each.label: each.weight for each in file.layers.values()}
        layers = [
            StoredLayer(
                join(root, name), f.A, f.B, f.rank, f.scaling, f.magnitude, weight=kernels.get(name, StoredWeight())
            )
            for name, f in found
        ]
        rows = {join(root, name): values for name, (_, values) in content.tokens.items()}
    weights = {name: weight for root, config in configs.items() for name, weight in _planned(base, root, config)}
    if unknown := [name for name in (*(layer.label for layer in layers), *rows) if name not in weights]:
        raise ValueError(f"{type(base).__name__} is not the model that was adapted: it has no {listed(unknown)}.")
    return layers, rows, weights


def _planned(base: nn.Module, root: str, config: LoRAConfig) -> Iterator[tuple[str, Tensor | None]]:
    """Yield the frozen matrices that a config would adapt, by the adapters' names."""
    modules = module_names(base)
    if root not in modules:
        raise ValueError(f"The adapter was attached to {root!r}, which {type(base).__name__} does not have.")
    module = modules[root][0]
    _refuse_merged(module)
    for layer in make_plan(module, config, 0).layers:
        spec = layer.spec
        if not issubclass(layer.adapter, TokenAdapter):
            # The smallest adapter of the kind, never attached: only it knows how the kind stores its weight.
            spec = spec._replace(rank=1, use_dora=False, lora_bias=False)
        adapter = layer.adapter(layer.module, spec, layer.parameter)
        yield join(root, layer.label), _frozen_matrix(adapter, base_parameter(layer.module, layer.parameter))


# --- a file, with a base on disk


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

    Raises:
        ValueError: The files do not fit each other, or the base is quantized or complex. Nothing was yielded yet.
        FileNotFoundError: The adapter or the base does not exist.
    """
    folder = open_base(Path(base))
    fitted = fit_adapter(Path(adapter), folder, check_base=check_base)
    placed = _placed(fitted.root)
    weights = _stored_weights(placed, fitted, folder)

    def one_by_one() -> Iterator[AdapterMatrix]:
        for done, (name, each) in enumerate(placed.items(), 1):
            yield from _of_adapter(name, each.adapter, weights[name].read(), tokens=tokens)
            if progress:
                progress(done, len(placed))

    if progress:
        progress(0, len(placed))
    return one_by_one()


def _stored_weights(placed: Mapping[str, _Placed], fitted: Fitted, base: BaseFolder) -> dict[str, StoredTensor]:
    """Return where the weight of each adapter lies, by the adapter's name."""
    stored_as = {name: base.tied_heads.get(stored, stored) for name, stored in fitted.names.items()}
    names = {name: join(each.path, each.adapter.parameter) for name, each in placed.items()}
    if missing := [own for own in names.values() if stored_as.get(own) not in base.tensors]:
        raise ValueError(f"The base does not contain {listed(missing)}, which the adapter updates.")
    found = {name: base.tensors[stored_as[own]] for name, own in names.items()}
    if complex_ones := [names[name] for name, tensor in found.items() if tensor.dtype.is_complex]:
        raise ValueError(
            f"The base is complex in {listed(complex_ones)}, and updates can only be compared with real weights. Leave "
            "the base out."
        )
    if quantized := [names[name] for name, tensor in found.items() if tensor.dtype not in WIDE]:
        raise ValueError(f"The base is quantized ({listed(quantized)}); give the unquantized one.")
    return found
