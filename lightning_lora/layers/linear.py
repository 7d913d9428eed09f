"""Linear layers: ``nn.Linear`` with its subclasses, and the ``Conv1D`` of transformers' GPT-2."""

from __future__ import annotations

from typing import cast

from torch import Tensor, nn
from typing_extensions import override

from lightning_lora.layers.adapter import base_parameter, base_weight
from lightning_lora.layers.low_rank import LowRankAdapter
from lightning_lora.layers.swap import Swapped
from lightning_lora.ops.linear import lora_add, lora_linear, lora_update

_KNOWN_FORWARD = nn.Linear.forward  # as torch has it: who patches it wants his own called


class LinearAdapter(LowRankAdapter):
    """``y += scaling * dropout(x) @ A.T @ B.T`` beside any ``nn.Linear``."""

    takes_bias = True

    @classmethod
    @override
    def in_all_linear(cls, module: nn.Module) -> bool:
        return True

    @classmethod
    @override
    def accepts(cls, module: nn.Module) -> bool:
        return isinstance(module, nn.Linear)

    @classmethod
    @override
    def matrix_shape(cls, module: nn.Module, parameter: str = "weight") -> tuple[int, int]:
        assert isinstance(module, nn.Linear)
        return module.out_features, module.in_features

    @classmethod
    @override
    def sliced_parameter(cls, module: nn.Module) -> str | None:
        return "weight"

    @override
    def computes_base(self, layer: nn.Module) -> bool:
        return not self.spec.rows and cast(Swapped, layer).base_class.forward is _KNOWN_FORWARD

    @override
    def forward(self, inputs: Tensor, output: Tensor | None, layer: nn.Module, is_ours: bool = False) -> Tensor:
        if output is not None:
            return super().forward(inputs, output, layer, is_ours)
        # Read here, not at attaching: FSDP and whoever loads or moves a model puts other tensors in their places.
        weight, bias = base_weight(layer), cast("Tensor | None", base_parameter(layer, "bias"))
        options = {"scaling": self.spec.scaling, "dropout": self.dropout_now()}
        total = lora_linear(inputs, weight, bias, self.A, self.B, **options)
        return total if self.is_plain else self.with_extras(total, layer)

    @override
    def added(self, inputs: Tensor, output: Tensor, is_ours: bool) -> Tensor:
        options = {"scaling": self.spec.scaling, "dropout": self.dropout_now()}
        return lora_add(output, inputs, self.A, self.B, is_ours=is_ours, **options)

    @override
    def update(self, inputs: Tensor, output: Tensor) -> Tensor:
        return lora_update(inputs, self.A, self.B, scaling=self.spec.scaling, dropout=self.dropout_now())


class Conv1DAdapter(LinearAdapter):
    """The same for transformers' ``Conv1D``, a linear layer that stores its weight as ``(in, out)``."""

    @classmethod
    @override
    def accepts(cls, module: nn.Module) -> bool:
        # By structure, so that transformers need not be installed.
        weight, out_features = getattr(module, "weight", None), getattr(module, "nf", None)
        if not (type(module).__name__.endswith("Conv1D") and isinstance(weight, Tensor)):
            return False
        return weight.ndim == 2 and weight.shape[1] == out_features

    @classmethod
    @override
    def matrix_shape(cls, module: nn.Module, parameter: str = "weight") -> tuple[int, int]:
        in_features, out_features = base_weight(module).shape
        return out_features, in_features

    @override
    def as_matrix(self, weight: Tensor) -> Tensor:
        return weight.T

    @override
    def as_stored(self, matrix: Tensor) -> Tensor:
        return matrix.T
