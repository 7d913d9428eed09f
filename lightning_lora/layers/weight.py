"""Updates that only the weight itself can carry: the layer, or its parent, reads the parameter and does the rest."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, NoReturn, cast

import torch
from torch import Tensor, nn
from typing_extensions import override

from lightning_lora.layers.adapter import Adapter, base_parameter
from lightning_lora.layers.initializers import INITIALIZERS, seeded, zeros
from lightning_lora.layers.lora_layer import LoRALayer, updated
from lightning_lora.layers.low_rank import LowRankAdapter
from lightning_lora.layers.swap import Behaviour
from lightning_lora.ops.autocast import without_autocast
from lightning_lora.ops.inplace import is_traced
from lightning_lora.ops.recompute import recomputed, recomputing
from lightning_lora.sharding import is_sharded, whole

# What naming a module of these kinds adapts; attention's output projection is a layer of its own.
_ATTENTION = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")


class ParameterAdapter(LowRankAdapter):
    """``W + scaling * B @ A`` for any parameter of two or more dimensions, read as a matrix.

    All dimensions but the first are flattened: ``B`` is ``(W.shape[0], rank)``, ``A`` is ``(rank, the rest)``.
    """

    @classmethod
    @override
    def accepts(cls, module: nn.Module) -> bool:
        return bool(cls.parameters_of(module))

    @classmethod
    @override
    def in_all_linear(cls, module: nn.Module) -> bool:
        return isinstance(module, nn.MultiheadAttention)

    @classmethod
    @override
    def parameters_of(cls, module: nn.Module) -> tuple[str, ...]:
        own = [name for name, parameter in module._parameters.items() if parameter is not None]
        if isinstance(module, nn.MultiheadAttention):
            return tuple(name for name in own if name in _ATTENTION)
        if isinstance(module, (nn.RNNBase, nn.RNNCellBase)):
            return tuple(name for name in own if name.startswith("weight_"))
        return ("weight",) if isinstance(module, (nn.EmbeddingBag, nn.Bilinear)) else ()

    @classmethod
    @override
    def matrix_shape(cls, module: nn.Module, parameter: str = "weight") -> tuple[int, int]:
        shape = base_parameter(module, parameter).shape
        return shape[0], math.prod(shape[1:])

    @classmethod
    @override
    def sliced_parameter(cls, module: nn.Module) -> str | None:
        is_packed = isinstance(module, nn.MultiheadAttention) and module.in_proj_weight is not None
        return "in_proj_weight" if is_packed else None

    @classmethod
    @override
    def obstacle(cls, module: nn.Module) -> str | None:
        if isinstance(module, nn.EmbeddingBag) and (module.max_norm is not None or module.sparse):
            return "with max_norm or sparse=True it needs its weight as a leaf; set them to None and False"
        return None

    @classmethod
    @override
    def needs_weight(cls, module: nn.Module) -> bool:
        return True

    @override
    def prepare(self, module: nn.Module, parameter: str) -> None:
        self.parameter_shape = base_parameter(module, parameter).shape

    @override
    def update(self, inputs: Tensor, output: Tensor) -> NoReturn:
        raise NotImplementedError("the layer reads its weight, which holds the update")

    @override
    def as_matrix(self, weight: Tensor) -> Tensor:
        return weight.flatten(1)

    @override
    def as_stored(self, matrix: Tensor) -> Tensor:
        return matrix.view(self.parameter_shape)


class ExpertsAdapter(ParameterAdapter):
    """``W[e] + scaling * B[e] @ A[e]`` for every expert ``e`` of a stack ``(experts, out, in)``.

    ``A`` is ``(experts, rank, in)`` and ``B`` is ``(experts, out, rank)``. A module whose ``is_transposed`` is true
    stores ``(experts, in, out)``, as some in transformers do.
    """

    has_output_rows = False

    @classmethod
    @override
    def accepts(cls, module: nn.Module) -> bool:
        return False  # a stack is named by its parameter, never by its module

    @classmethod
    @override
    def matrix_shape(cls, module: nn.Module, parameter: str = "weight") -> tuple[int, int]:
        _, out_features, in_features = base_parameter(module, parameter).shape
        return (in_features, out_features) if _is_transposed(module) else (out_features, in_features)

    @classmethod
    @override
    def stack(cls, module: nn.Module, parameter: str) -> int:
        return base_parameter(module, parameter).shape[0]

    @override
    def prepare(self, module: nn.Module, parameter: str) -> None:
        super().prepare(module, parameter)
        self.is_transposed = _is_transposed(module)

    @override
    def start(self, out_features: int, in_features: int) -> tuple[Tensor, Tensor]:
        experts, rank, generator = self.parameter_shape[0], self.spec.rank, seeded(self.spec.seed)
        A = torch.stack([INITIALIZERS[self.spec.init](rank, in_features, generator) for _ in range(experts)])
        return A, zeros(experts * out_features, rank).view(experts, out_features, rank)

    @override
    def as_matrix(self, weight: Tensor) -> Tensor:
        return weight.transpose(1, 2) if self.is_transposed else weight

    @override
    def as_stored(self, matrix: Tensor) -> Tensor:
        return matrix.transpose(1, 2) if self.is_transposed else matrix


def parameter_adapter(module: nn.Module, parameter: str) -> type[ParameterAdapter]:
    """Return the adapter for a parameter named by itself."""
    return ExpertsAdapter if base_parameter(module, parameter).ndim == 3 else ParameterAdapter


def _is_transposed(module: nn.Module) -> bool:
    return bool(getattr(module, "is_transposed", False))


class WeightLoRALayer(LoRALayer):
    """An adapted layer whose weights read as base plus update; its own forward runs unchanged.

    Exact for any forward that reads the weights, its own or its parent's, in training, evaluation and torch's fused
    fast paths, at the price of forming the weight for every forward pass, and once more for backward instead of keeping
    it. The base stays in place under its own keys.
    """

    @override
    def read(self, name: str) -> Tensor:
        """Return the weight that the layer computes with: what merging would leave, to the last bit of the sum."""
        base = base_parameter(self, name)
        if self.lora_mode != "active" or is_sharded(base):  # fully_shard looks for its own parameter between forwards
            return base
        adapters = self.adapters_of(name)
        sources = [base, *(cast(Tensor, each) for adapter in adapters for each in adapter._parameters.values())]
        return recomputed((id(self), name), sources, partial(_formed, base, adapters), partial(_still, base, adapters))

    @override
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if is_traced():
            return super(LoRALayer, self).forward(*args, **kwargs)
        with recomputing():
            return super(LoRALayer, self).forward(*args, **kwargs)


def _formed(base: Tensor, adapters: Sequence[Adapter]) -> Tensor:
    """Return a weight with the updates in it, in its precision."""
    with without_autocast(base.device.type):  # it is for the reader to round, as it does with any weight
        return updated(whole(base), adapters).to(base.dtype)


def _still(base: Tensor, adapters: Sequence[Adapter]) -> Callable[[], Tensor]:
    """Return what ``_formed`` would compute now, for later."""
    return partial(_formed, base.detach(), [adapter.still() for adapter in adapters])


class RecurrentLoRALayer(WeightLoRALayer):
    """The same for LSTM, GRU and RNN, which keep a list of their weights."""

    @override
    def read(self, name: str) -> Any:
        if name != "_flat_weights":
            return super().read(name)
        return [getattr(self, each) for each in cast(Any, self)._flat_weights_names]

    @override
    def __setattr__(self, name: str, value: Any) -> None:
        if name != "_flat_weights":  # computed; torch renews its list whenever the module moves
            super().__setattr__(name, value)

    @override
    def restored(self) -> None:
        module = cast(Any, self)
        module._flat_weights = [getattr(module, name) for name in module._flat_weights_names]
        module.flatten_parameters()


def swapped_as(module: nn.Module, parameters: Iterable[str]) -> Behaviour:
    """Return what ``swap_in`` needs to have this module read the parameters with their updates."""
    computed = tuple(dict.fromkeys(parameters))
    if isinstance(module, nn.RNNBase):
        return RecurrentLoRALayer, (*computed, "_flat_weights")
    return WeightLoRALayer, computed
