"""An adapter as a list of low-rank matrices, whatever kinds of layers it adapts."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lightning_lora.analysis.spectrum import ThinSVD, thin_svd
from lightning_lora.layers import (
    Adapter,
    LoRALayer,
    LowRankAdapter,
    TokenAdapter,
    all_adapters,
    base_parameter,
    lora_layers,
)
from lightning_lora.names import listed
from lightning_lora.sharding import whole


@dataclass(frozen=True, eq=False)
class AdapterMatrix:
    """One update ``scaling * B @ A`` of one matrix.

    A kernel is read as a matrix by flattening all dimensions but the first; a slice is a matrix of its own; of a stack
    of experts each is one, named ``layer[expert]``.

    Attributes:
        name: The adapter's name, as in ``AttachReport``.
        A: ``(rank, in)``.
        B: ``(out, rank)``.
        scaling: Factor of ``B @ A``.
        weight: The frozen matrix, ``(out, in)``, or None where it is not known; it shares memory with the model.
        is_rescaled: Whether DoRA rescales the rows of the sum besides, which the factors do not say.
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
            ValueError: The factors hold NaN or infinity.
        """
        if not (bool(torch.isfinite(self.A).all()) and bool(torch.isfinite(self.B).all())):
            raise ValueError(f"The factors of {self.name!r} hold NaN or infinity; the training diverged.")
        return thin_svd(self.A, self.B, self.scaling)


@torch.no_grad()
def matrices_of_module(module: nn.Module, *, tokens: bool = False) -> list[AdapterMatrix]:
    """Return the updates that an adapted module carries.

    Args:
        module: The module.
        tokens: Whether trained rows of embeddings are among them.

    Raises:
        ValueError: The module has no adapters.
        RuntimeError: They are folded into the weights, inside ``merged``.
    """
    if not lora_layers(module):
        raise ValueError(f"{type(module).__name__} has no adapters; call attach or load_adapter first.")
    refuse_folded(module)
    found: list[AdapterMatrix] = []
    for name, (adapter, layer) in adapters_with_layers(module).items():
        found += matrices_of_adapter(name, adapter, layer, tokens=tokens)
    return found


def adapters_with_layers(module: nn.Module) -> dict[str, tuple[Adapter, LoRALayer]]:
    """Return every adapter of a module by its name, with the layer that it is in."""
    owners = {id(adapter): layer for layer in lora_layers(module).values() for adapter in layer.adapters().values()}
    return {name: (adapter, owners[id(adapter)]) for name, adapter in all_adapters(module).items()}


@torch.no_grad()
def matrices_of_adapter(
    name: str, adapter: Adapter, layer: LoRALayer, *, tokens: bool = False
) -> Iterator[AdapterMatrix]:
    """Yield the updates of one adapter, with the weight that its layer holds.

    Args:
        name: What to call it.
        adapter: The adapter.
        layer: The layer that it is in.
        tokens: Whether trained rows of an embedding count.
    """
    if isinstance(adapter, LowRankAdapter):
        weight = frozen_matrix(adapter, layer)
        factors = whole(adapter.A).detach(), whole(adapter.B).detach()
        yield from matrices(name, *factors, adapter.spec.scaling, weight, is_rescaled=adapter.spec.use_dora)
    elif isinstance(adapter, TokenAdapter) and tokens:
        yield from token_rows(name, whole(adapter.rows).detach(), frozen_matrix(adapter, layer))


def refuse_folded(module: nn.Module) -> None:
    """Refuse a module whose weights hold updates for the moment: they are not the base's.

    Raises:
        RuntimeError: It is inside ``merged``.
    """
    if folded := [name for name, layer in lora_layers(module).items() if layer.lora_mode == "merged"]:
        raise RuntimeError(f"The adapters of {listed(folded)} are merged into their weights now; leave merged() first.")


@torch.no_grad()
def frozen_matrix(adapter: Adapter, module: nn.Module) -> Tensor | None:
    """Return what an adapter updates, without the update, as ``(out, in)`` or ``(experts, out, in)``.

    Returns:
        Only the rows that are adapted; None where the weights are on the meta device.
    """
    weight = whole(base_parameter(module, adapter.parameter)).detach()
    if weight.is_meta:
        return None
    matrix = adapter.as_matrix(weight) if isinstance(adapter, LowRankAdapter) else weight
    return matrix.index_select(0, adapter.index) if adapter.spec.rows else matrix


def matrices(
    name: str, A: Tensor, B: Tensor, scaling: float, weight: Tensor | None = None, *, is_rescaled: bool = False
) -> Iterator[AdapterMatrix]:
    """Yield the one update of plain factors, or those of the experts of a stack.

    Args:
        name: What to call it.
        A: ``(rank, in)`` or ``(experts, rank, in)``.
        B: ``(out, rank)`` or ``(experts, out, rank)``.
        scaling: Factor of ``B @ A``.
        weight: ``(out, in)`` or ``(experts, out, in)``.
        is_rescaled: Whether DoRA rescales the sum.

    Raises:
        ValueError: The weight has another shape than the update.
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


def token_rows(name: str, rows: Tensor, weight: Tensor | None) -> Iterator[AdapterMatrix]:
    """Yield the change of an embedding's trained rows, ``(tokens, features)``, as an update of those rows.

    Args:
        name: The embedding.
        rows: Its rows after training.
        weight: The rows before; without them the change is unknown, and nothing is yielded.
    """
    if weight is not None:
        dtype = torch.promote_types(rows.dtype, torch.float32)
        change = rows.to(weight.device, dtype) - weight.to(dtype)
        yield AdapterMatrix(name, change, torch.eye(len(rows), dtype=dtype, device=weight.device), 1.0, weight)
