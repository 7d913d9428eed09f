"""The factors of one layer as plain tensors, and the shapes and keys in which a PEFT file keeps them.

Letters: ``r`` rank, ``E`` experts of a stack. Here, as in the layers, ``A`` is ``(r, in)`` and ``B`` is ``(out, r)``,
or ``(E, r, in)`` and ``(E, out, r)``.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lightning_lora.layers import Adapter, LowRankAdapter, ParameterAdapter, base_parameter
from lightning_lora.layers.conv import ConvAdapter
from lightning_lora.layers.embedding import EmbeddingAdapter
from lightning_lora.names import join


class Geometry(NamedTuple):
    """The sizes that, with the rank, decide the shapes of a layer's factors.

    Attributes:
        out_features: Rows of the weight, read as a matrix.
        in_features: Its columns.
        kernel: The shape of a convolution's kernel without its first dimension.
        experts: How many matrices a stacked parameter holds; 0 if it is not a stack.
        is_embedding: Whether tokens choose the columns of ``A``.
    """

    out_features: int
    in_features: int
    kernel: tuple[int, ...] = ()
    experts: int = 0
    is_embedding: bool = False

    @classmethod
    def of(cls, adapter: type[Adapter], module: nn.Module, parameter: str) -> Geometry:
        """Return the geometry of what an adapter of this kind would update."""
        shape = base_parameter(module, parameter).shape
        is_stack = issubclass(adapter, ParameterAdapter) and len(shape) == 3
        return cls(
            *adapter.matrix_shape(module, parameter),
            kernel=tuple(shape[1:]) if issubclass(adapter, ConvAdapter) else (),
            experts=shape[0] if is_stack else 0,
            is_embedding=issubclass(adapter, EmbeddingAdapter),
        )


class Factors(NamedTuple):
    """One update: ``scaling * B @ A``, with DoRA's magnitude and a bias of ``B`` where there are such."""

    A: Tensor
    B: Tensor
    scaling: float
    magnitude: Tensor | None = None
    bias: Tensor | None = None

    @property
    def rank(self) -> int:
        """Rank of the factors, padding included."""
        return self.A.shape[-2]

    def padded(self, rank: int) -> Factors:
        """Return the same update at a higher rank, with rows and columns of zeros."""
        more = rank - self.rank
        if not more:
            return self
        A = torch.cat([self.A, self.A.new_zeros(*self.A.shape[:-2], more, self.A.shape[-1])], -2)
        B = torch.cat([self.B, self.B.new_zeros(*self.B.shape[:-1], more)], -1)
        return self._replace(A=A, B=B)

    def rescaled(self, scaling: float) -> Factors:
        """Return the same update for another scaling: the ratio moves into ``B`` and its bias."""
        if scaling == self.scaling:
            return self
        ratio = self.scaling / scaling
        bias = None if self.bias is None else self.bias * ratio
        return self._replace(B=self.B * ratio, bias=bias, scaling=scaling)

    def scaled(self, factor: float) -> Factors:
        """Return the update times a factor other than zero: its size goes into the scaling, so nothing is rounded."""
        sign = math.copysign(1.0, factor)
        bias = None if self.bias is None else sign * self.bias
        return self._replace(B=sign * self.B, bias=bias, scaling=abs(factor) * self.scaling)

    def with_positive_scaling(self) -> Factors:
        """Return the same update with a scaling that files may hold, also inside ``scaled`` with 0 or less."""
        if self.scaling > 0:
            return self
        plain = self._replace(scaling=1.0)
        return plain.scaled(self.scaling) if self.scaling else self.zero().padded(self.rank)

    def zero(self) -> Factors:
        """Return an update of zero for the same layer."""
        bias = None if self.bias is None else torch.zeros_like(self.bias)
        return Factors(torch.zeros_like(self.A[..., :1, :]), torch.zeros_like(self.B[..., :1]), 1.0, None, bias)

    @property
    def highest_rank(self) -> int:
        """The highest rank that the update can have."""
        return min(self.rank, self.A.shape[-1], self.B.shape[-2])

    @property
    def norm(self) -> float:
        """The Frobenius norm, of a stack that of all; the product is not formed: ``O((out + in) r^2)``."""
        A, B = self.A.double(), self.B.double()
        return self.scaling * float(((B.mT @ B) * (A @ A.mT)).sum().clamp_min(0.0).sqrt())

    def within(self, rank: int) -> Factors:
        """Return the same update at a rank no higher than this, which must be a dimension of the product."""
        if self.rank <= rank:
            return self
        product = (self.B.double() @ self.A.double()).to(self.B.dtype)
        square = torch.eye(rank, dtype=self.B.dtype, device=self.B.device).expand(*self.B.shape[:-2], -1, -1)
        if self.B.shape[-2] == rank:
            return self._replace(A=product, B=square.contiguous())
        return self._replace(A=square.contiguous(), B=product)


def stacked(terms: Sequence[Factors]) -> Factors:
    """Return the sum of updates of one weight, in float64: factors side by side, and the scalings in ``B``."""
    biases = [each.scaling * each.bias.double() for each in terms if each.bias is not None]
    A = torch.cat([each.A.double() for each in terms], -2)
    B = torch.cat([each.scaling * each.B.double() for each in terms], -1)
    return Factors(A, B, 1.0, None, torch.stack(biases).sum(0) if biases else None)


class PeftLayer(NamedTuple):
    """One update as PEFT sees it.

    Attributes:
        name: The layer's name.
        target: The name that PEFT's patterns are matched with: the layer's, or the parameter's.
        module: The layer.
        adapter: The kind of adapter.
        parameter: The updated parameter.
        factors: The update.
    """

    name: str
    target: str
    module: nn.Module
    adapter: type[Adapter]
    parameter: str
    factors: Factors

    @property
    def by_parameter(self) -> bool:
        """Whether ``target_parameters`` names it."""
        return self.target == join(self.name, self.parameter)

    @property
    def label(self) -> str:
        """The adapter's name in the model."""
        return join(self.name, self.parameter) if issubclass(self.adapter, ParameterAdapter) else self.name


def factors_of(adapter: LowRankAdapter) -> Factors:
    """Return copies of an adapter's factors, on the CPU; where they are computed, as by pruning, their values."""
    kept = {name: tensor.detach().cpu().clone() for name, tensor in adapter.named_parameters()}
    A, B = (factor.detach().cpu().clone() for factor in (adapter.A, adapter.B))
    if adapter.is_difference or adapter.kept is not None:
        A, B = (factor.detach().cpu() for factor in adapter.whole_factors())
    found = Factors(A, B, adapter.spec.scaling, kept.get("magnitude"), kept.get("bias"))
    return found.with_positive_scaling()


def placed(parts: Sequence[tuple[Tensor, Factors]], out_features: int, row_norms: Tensor | None) -> Factors:
    """Return one update of a whole weight that equals updates of parts of its rows: block-diagonal factors.

    Args:
        parts: The rows of each part, and its factors.
        out_features: Rows of the whole weight.
        row_norms: Norms of the weight's rows, which are the magnitudes of rows that no part updates; for DoRA.
    """
    scaling = parts[0][1].scaling
    same = [(rows.cpu(), factors.rescaled(scaling)) for rows, factors in parts]
    A = torch.cat([factors.A for _, factors in same])
    B, at = A.new_zeros(out_features, len(A)), 0
    magnitude = None if row_norms is None else row_norms.cpu().clone()
    bias = None if same[0][1].bias is None else same[0][1].bias.new_zeros(out_features)
    for rows, factors in same:
        B[rows, at : at + factors.rank] = factors.B
        at += factors.rank
        if magnitude is not None and factors.magnitude is not None:
            magnitude[rows] = factors.magnitude.to(magnitude.dtype)
        if bias is not None and factors.bias is not None:
            bias[rows] = factors.bias
    return Factors(A, B, scaling, magnitude, bias)


def to_file(prefix: str, factors: Factors, geometry: Geometry) -> dict[str, Tensor]:
    """Return the tensors of a PEFT file that hold these factors: key -> tensor."""
    ones = (1,) * max(0, len(geometry.kernel) - 1)
    A, B = factors.A, factors.B
    if geometry.experts:  # PEFT counts the experts fastest in B and slowest in A
        A = A.reshape(-1, A.shape[-1])
        B = B.permute(1, 2, 0).reshape(B.shape[1], -1)
    if geometry.is_embedding:
        found = {f"{prefix}.lora_embedding_A": A, f"{prefix}.lora_embedding_B": B}
    else:
        found = {
            f"{prefix}.lora_A.weight": A.reshape(-1, *geometry.kernel) if geometry.kernel else A,
            f"{prefix}.lora_B.weight": B.reshape(*B.shape, *ones),
        }
    if factors.magnitude is not None:
        magnitude = factors.magnitude
        found[f"{prefix}.lora_magnitude_vector"] = magnitude.reshape(1, -1, *ones) if geometry.kernel else magnitude
    if factors.bias is not None:
        found[f"{prefix}.lora_B.bias"] = factors.bias
    return {key: tensor.contiguous() for key, tensor in found.items()}


def from_file(prefix: str, tensors: Mapping[str, Tensor], geometry: Geometry, scaling: float) -> Factors:
    """Return the factors that a PEFT file holds; its keys and shapes must have been checked."""
    A = tensors[f"{prefix}.lora_embedding_A" if geometry.is_embedding else f"{prefix}.lora_A.weight"]
    B = tensors[f"{prefix}.lora_embedding_B" if geometry.is_embedding else f"{prefix}.lora_B.weight"]
    if geometry.experts:
        A = A.reshape(geometry.experts, -1, geometry.in_features)
        B = B.reshape(geometry.out_features, -1, geometry.experts).permute(2, 0, 1).contiguous()
    elif geometry.kernel:
        A, B = A.reshape(-1, geometry.in_features), B.reshape(geometry.out_features, -1)
    magnitude = tensors.get(f"{prefix}.lora_magnitude_vector")
    magnitude = None if magnitude is None else magnitude.reshape(-1)
    return Factors(A, B, scaling, magnitude, tensors.get(f"{prefix}.lora_B.bias"))


def shapes_in_file(
    prefix: str, geometry: Geometry, rank: int, *, use_dora: bool, lora_bias: bool
) -> dict[str, tuple[int, ...]]:
    """Return which keys and shapes the file of such a layer has, without allocating anything."""
    shapes = _shapes(geometry, rank, use_dora, lora_bias)
    return {f"{prefix}{suffix}": shape for suffix, shape in shapes.items()}


@functools.lru_cache(maxsize=256)  # a model has many layers and few shapes
def _shapes(geometry: Geometry, rank: int, use_dora: bool, lora_bias: bool) -> dict[str, tuple[int, ...]]:
    stack = (geometry.experts,) if geometry.experts else ()
    with torch.device("meta"):
        factors = Factors(
            torch.empty(*stack, rank, geometry.in_features),
            torch.empty(*stack, geometry.out_features, rank),
            1.0,
            torch.empty(geometry.out_features) if use_dora else None,
            torch.empty(geometry.out_features) if lora_bias else None,
        )
        return {key: tuple(tensor.shape) for key, tensor in to_file("", factors, geometry).items()}
