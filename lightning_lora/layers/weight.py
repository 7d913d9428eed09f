"""Updates that only the weight itself can carry: the layer, or its parent, reads the parameter and does the rest."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NoReturn, cast

import torch
from torch import Tensor, nn
from typing_extensions import override

from lightning_lora.initializers import INITIALIZERS, seeded, zeros
from lightning_lora.layers.base import Adapter, LoRALayer, base_parameter

# What naming a module of these kinds adapts; attention's output projection is a layer of its own.
_ATTENTION = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")


class ParameterAdapter(Adapter):
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
    def forward(self, inputs: Tensor, output: Tensor) -> NoReturn:
        raise NotImplementedError("the layer reads its weight, which holds the update")

    @override
    def delta_weight(self) -> Tensor:
        return self.matrix_delta().view(self.parameter_shape)


class ExpertsAdapter(ParameterAdapter):
    """``W[e] + scaling * B[e] @ A[e]`` for every expert ``e`` of a stack ``(experts, out, in)``.

    ``A`` is ``(experts, rank, in)`` and ``B`` is ``(experts, out, rank)``. A module whose ``is_transposed`` is true
    stores ``(experts, in, out)``, as some in transformers do.
    """

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
    def delta_weight(self) -> Tensor:
        delta = self.matrix_delta()
        return delta.transpose(1, 2) if self.is_transposed else delta


def parameter_adapter(module: nn.Module, parameter: str) -> type[ParameterAdapter]:
    """Return the adapter for a parameter named by itself."""
    return ExpertsAdapter if base_parameter(module, parameter).ndim == 3 else ParameterAdapter


def _is_transposed(module: nn.Module) -> bool:
    return bool(getattr(module, "is_transposed", False))


class AdapterGroup(nn.ModuleDict):
    """The adapters of one layer's parameters, by the parameters' names."""

    def __init__(self, adapters: Mapping[str, Adapter]) -> None:
        super().__init__(dict(adapters))


class WeightLoRALayer(LoRALayer):
    """An adapted layer whose weights read as base plus update; its own forward runs unchanged.

    Exact for any forward that reads the weights, its own or its parent's, in training, evaluation and torch's fused
    fast paths, at the price of forming the update at every read. The base stays in place under its own keys.
    """

    @override
    def adapters(self) -> dict[str, Adapter]:
        if isinstance(self.lora, AdapterGroup):
            return {name: cast(Adapter, adapter) for name, adapter in self.lora.items()}
        return super().adapters()

    @override
    def read(self, name: str) -> Tensor:
        """Return the weight that the layer computes with: the very value that merging would leave."""
        base = base_parameter(self, name)
        if self.lora_mode != "active":
            return base
        delta = self.adapters()[name].delta_weight()
        dtype = torch.promote_types(base.dtype, delta.dtype)
        return (base.to(dtype) + delta.to(dtype)).to(base.dtype)

    @override
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return super(LoRALayer, self).forward(*args, **kwargs)


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


def swapped_as(module: nn.Module, parameters: tuple[str, ...], *, in_weight: bool) -> dict[str, Any]:
    """Return what ``swap_in`` needs to make this module an adapted layer."""
    if not in_weight:
        return {"mixin": LoRALayer}
    if isinstance(module, nn.RNNBase):
        return {"mixin": RecurrentLoRALayer, "computed": (*parameters, "_flat_weights")}
    return {"mixin": WeightLoRALayer, "computed": parameters}
