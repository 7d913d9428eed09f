"""Linear layers: ``nn.Linear`` with its subclasses, and the ``Conv1D`` of transformers' GPT-2."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import override

from lightning_lora.layers.base import Adapter, base_weight


class LinearAdapter(Adapter):
    """``y += scaling * dropout(x) @ A.T @ B.T`` beside any ``nn.Linear``."""

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

    @override
    def forward(self, inputs: Tensor, output: Tensor) -> Tensor:
        inputs = self.dropped(inputs)
        A, B = self.factors_as(inputs.dtype, inputs.device.type)
        hidden = F.linear(inputs, A) * self.spec.scaling  # (..., in) -> (..., rank), the cheapest place to scale
        return output + F.linear(hidden, B).to(output.dtype)  # (..., rank) -> (..., out)

    @override
    def delta_weight(self) -> Tensor:
        return self.matrix_delta()


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
    def delta_weight(self) -> Tensor:
        return self.matrix_delta().T
