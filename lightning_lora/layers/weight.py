"""Updates that only the weight can carry, because the layer or its parent reads the parameter directly."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, NoReturn, cast

import torch
from torch import Tensor, nn
from typing_extensions import override

from lightning_lora.layers.adapter import Adapter, base_parameter, computed_parameter, register_adapter
from lightning_lora.layers.computed import closed
from lightning_lora.layers.lora_layer import Behavior, LoRALayer, updated
from lightning_lora.layers.low_rank import LowRankAdapter
from lightning_lora.layers.starts import random_start, seeded, zeros
from lightning_lora.ops.eager import is_traced, without_autocast
from lightning_lora.ops.recompute import recomputed, recomputing
from lightning_lora.sharding import is_sharded, whole

# The parameters of attention that are adapted with it; its output projection is a layer of its own.
_ATTENTION = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")
_OWN_KINDS = (nn.MultiheadAttention, nn.RNNBase, nn.RNNCellBase, nn.Bilinear, nn.EmbeddingBag)


class ParameterAdapter(LowRankAdapter):
    """``W + scaling * B @ A`` for any parameter of two or more dimensions, read as a matrix.

    All dimensions but the first are flattened: ``B`` is ``(W.shape[0], rank)``, ``A`` is ``(rank, the rest)``.
    """

    kind = "parameter"

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
    def matrix_of(cls, shape: Sequence[int]) -> tuple[int, int]:
        return (shape[1], shape[2]) if len(shape) == 3 else super().matrix_of(shape)  # three mean a stack of matrices

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
    def tokens_in(self, layer: nn.Module, inputs: Sequence[Any]) -> Tensor | None:
        if isinstance(layer, nn.MultiheadAttention):
            query, key, value = inputs[:3]
            if self.parameter == "in_proj_weight" and not (query is key is value):
                return None  # its rows have different inputs
            found = {"k_proj_weight": key, "v_proj_weight": value}.get(self.parameter, query)
            return _by_sequence(found, batch_first=layer.batch_first)
        if isinstance(layer, nn.RNNBase) and self.parameter.startswith("weight_ih_l0"):
            return _by_sequence(inputs[0], batch_first=layer.batch_first)
        if isinstance(layer, nn.RNNCellBase) and self.parameter == "weight_ih":
            return _by_sequence(inputs[0].unsqueeze(-2), batch_first=True)
        return None

    @override
    def update(self, inputs: Tensor, output: Tensor) -> NoReturn:
        raise NotImplementedError("the layer reads its weight, which holds the update")

    @override
    def as_matrix(self, weight: Tensor) -> Tensor:
        return weight.flatten(1)

    @override
    def as_stored(self, matrix: Tensor) -> Tensor:
        return matrix.view(self.parameter_shape)

    @override
    def record(self, layer: nn.Module) -> dict[str, Any]:
        order = list(layer._parameters).index(self.parameter) if self.parameter in layer._parameters else 0
        found = super().record(layer)
        return found | {"order": order} if found["kind"] else found

    @override
    def recorded_shape(self, layer: nn.Module) -> Sequence[int] | None:
        return None if isinstance(layer, _OWN_KINDS) else self.parameter_shape

    @classmethod
    @override
    def peft_obstacle(cls, layer: nn.Module, parameter: str, *, use_dora: bool, lora_bias: bool) -> str | None:
        is_attention = isinstance(layer, nn.MultiheadAttention)
        if isinstance(layer, _OWN_KINDS) and not is_attention:
            return super().peft_obstacle(layer, parameter, use_dora=use_dora, lora_bias=lora_bias)
        if is_attention and parameter != "in_proj_weight":
            return "PEFT adapts attention only if query, key and value have the same size"
        what = "attention" if is_attention else "parameters"
        if use_dora or lora_bias:
            return f"PEFT has no {'DoRA' if use_dora else 'lora_bias'} for {what}"
        weight = base_parameter(layer, parameter)
        if weight.ndim > 3:
            return f"PEFT adapts parameters of two or three dimensions, not of {weight.ndim}"
        kind: type[nn.Module] = getattr(layer, "base_class", type(layer))
        if kind.forward is nn.Module.forward and kind is not nn.Module:  # as a model on disk knows modules
            return f"PEFT adapts parameters while their module is called, and a {kind.__name__} never is"
        return None


def _by_sequence(found: Any, *, batch_first: bool) -> Tensor | None:
    """Return ``(sequences, tokens, features)``."""
    if not isinstance(found, Tensor) or found.is_nested:
        return None  # packed
    if found.ndim == 2:
        return found.unsqueeze(0)
    return found if batch_first else found.transpose(0, 1)


class BilinearAdapter(ParameterAdapter):
    """The same for ``nn.Bilinear``: one row per output, although its weight has three dimensions."""

    @classmethod
    @override
    def matrix_of(cls, shape: Sequence[int]) -> tuple[int, int]:
        return shape[0], shape[1] * shape[2]


class ExpertsAdapter(ParameterAdapter):
    """``W[e] + scaling * B[e] @ A[e]`` for every expert ``e`` of a stack ``(experts, out, in)``.

    ``A`` is ``(experts, rank, in)`` and ``B`` is ``(experts, out, rank)``.
    """

    kind = "parameter"
    has_output_rows = False
    vllm_takes = True

    @classmethod
    @override
    def accepts(cls, module: nn.Module) -> bool:
        return False  # a stack is named by its parameter, never by its module

    @classmethod
    @override
    def stack(cls, module: nn.Module, parameter: str) -> int:
        return base_parameter(module, parameter).shape[0]

    @override
    def start(self, out_features: int, in_features: int) -> tuple[Tensor, Tensor]:
        experts, rank, generator = self.parameter_shape[0], self.spec.rank, seeded(self.spec.seed)
        A = torch.stack([random_start(self.spec.init)(rank, in_features, generator) for _ in range(experts)])
        return A, zeros(experts * out_features, rank).view(experts, out_features, rank)

    @override
    def as_matrix(self, weight: Tensor) -> Tensor:
        return weight

    @override
    def as_stored(self, matrix: Tensor) -> Tensor:
        return matrix


class TransposedStack(nn.Module):
    """A stand-in for experts whose weights are stored as ``(in, out)``."""

    is_transposed = True


class TransposedExpertsAdapter(ExpertsAdapter):
    """The same for a stack ``(experts, in, out)``, as in transformers modules with ``is_transposed``."""

    kind = "transposed stack"
    vllm_takes = True

    @classmethod
    @override
    def matrix_of(cls, shape: Sequence[int]) -> tuple[int, int]:
        return shape[-1], shape[-2]

    @override
    def as_matrix(self, weight: Tensor) -> Tensor:
        return weight.transpose(1, 2)

    @override
    def as_stored(self, matrix: Tensor) -> Tensor:
        return matrix.transpose(1, 2)

    @classmethod
    @override
    def stand_in(cls, shape: Sequence[int]) -> nn.Module:
        return TransposedStack()

    @classmethod
    @override
    def peft_obstacle(cls, layer: nn.Module, parameter: str, *, use_dora: bool, lora_bias: bool) -> str | None:
        if why := super().peft_obstacle(layer, parameter, use_dora=use_dora, lora_bias=lora_bias):
            return why
        if base_parameter(layer, parameter).shape[0] == 1:
            return "PEFT reads a transposed stack of one expert as a matrix of another shape"
        return None


def parameter_adapter(module: nn.Module, parameter: str) -> type[ParameterAdapter]:
    """Return the adapter for a parameter named by itself."""
    if base_parameter(module, parameter).ndim != 3:
        return ParameterAdapter
    return TransposedExpertsAdapter if getattr(module, "is_transposed", False) else ExpertsAdapter


class WeightLoRALayer(LoRALayer):
    """An adapted layer whose weights read as base plus update; its own forward runs unchanged.

    Exact for any forward that reads the weights, its own or its parent's, in training, evaluation and torch's fused
    fast paths, at the price of forming the weight for every forward pass, and once more for backward instead of keeping
    it. The base stays in place under its own keys.
    """

    @override
    def read(self, name: str) -> Tensor:
        """Return the weight that the layer computes with, bit-equal to the merged weight."""
        base = computed_parameter(self, name)
        if self.lora_mode != "active" or is_sharded(base):  # fully_shard looks for its own parameter between forwards
            return base
        adapters = self.adapters_of(name)
        self._refuse_replaced(name, base, adapters)
        sources = [base, *(cast(Tensor, each) for adapter in adapters for each in adapter._parameters.values())]
        make = partial(_formed, base, adapters)
        found = recomputed((id(self), name), sources, make, partial(_still, base, adapters))
        return found if is_traced() else closed(found)

    def _refuse_replaced(self, name: str, base: Tensor, adapters: Sequence[Adapter]) -> None:
        """Refuse a weight that ``functional_call`` was given without the factors: it may hold the update already."""
        if type(base) is not Tensor or cast(dict[str, Tensor], self._parameters).get(name) is not base:
            return
        factors = [each for adapter in adapters for each in adapter._parameters.values() if each is not None]
        if all(isinstance(factor, nn.Parameter) for factor in factors):
            raise RuntimeError(
                f"functional_call was given another {name!r} for this {self.base_class.__name__}, and not its "
                f"adapter's factors. The {name!r} that is read here has the update in it, which would be added twice. "
                "Call the function of the layer with that, such as F.linear(x, weight, bias); or pass the factors too, "
                "as dict(module.named_parameters()) does."
            )

    @property
    def reset_parameters(self) -> Callable[[], None]:
        """Gives the base new values, as after the meta device; there only if the layer's own class has it."""
        reset: Callable[[], None] = super().reset_parameters  # type: ignore[misc]

        def with_its_own_weights() -> None:
            before = vars(self).get("lora_mode")
            self.lora_mode = "disabled"
            try:
                reset()
            finally:
                vars(self).pop("lora_mode")
                vars(self).update({} if before is None else {"lora_mode": before})

        return with_its_own_weights

    @override
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        for adapter in self.adapters().values():
            if adapter.is_waiting:
                cast(LowRankAdapter, adapter).refuse_to_train()
        if is_traced():
            return super(LoRALayer, self).forward(*args, **kwargs)
        with recomputing():
            return super(LoRALayer, self).forward(*args, **kwargs)


def _formed(base: Tensor, adapters: Sequence[Adapter]) -> Tensor:
    """Return a weight with the updates in it, in its precision."""
    with without_autocast(base.device.type):  # the layer that reads it rounds it, like any weight
        return updated(whole(base), adapters).to(base.dtype)


def _still(base: Tensor, adapters: Sequence[Adapter]) -> Callable[[], Tensor]:
    """Return a function that computes later what ``_formed`` would compute now."""
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
        if name != "_flat_weights":  # computed; torch renews its list whenever the module moves or a weight is replaced
            nn.Module.__setattr__(self, name, value)

    @override
    def restored(self) -> None:
        renew_weight_list(cast(Any, self))
        cast(Any, self).flatten_parameters()


def renew_weight_list(module: nn.Module) -> None:
    """Let a recurrent layer compute with the parameters that it has now: torch keeps a list of them besides."""
    if isinstance(module, nn.RNNBase):
        module._flat_weights = [getattr(module, name) for name in module._flat_weights_names]


def swapped_as(module: nn.Module, parameters: Iterable[str]) -> Behavior:
    """Return what ``swap_in`` needs to have this module read the parameters with their updates."""
    computed = tuple(dict.fromkeys(parameters))
    if isinstance(module, nn.RNNBase):
        return RecurrentLoRALayer, (*computed, "_flat_weights")
    return WeightLoRALayer, computed


for _own in _OWN_KINDS:
    register_adapter(_own, ParameterAdapter)
register_adapter(nn.Bilinear, BilinearAdapter)
register_adapter(TransposedStack, TransposedExpertsAdapter)
