"""Embeddings: the columns of ``A`` belong to the tokens."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import override

from lightning_lora.layers.adapter import register_adapter
from lightning_lora.layers.initializers import seeded, standard_normal, zeros
from lightning_lora.layers.lora_layer import reads_weight
from lightning_lora.layers.low_rank import LowRankAdapter


class EmbeddingAdapter(LowRankAdapter):
    """``y += scaling * A[:, token] @ B.T`` beside an ``nn.Embedding`` of ``(tokens, features)``.

    ``A`` is ``(rank, tokens)`` and starts at zero, ``B`` is ``(features, rank)`` and starts standard normal, as in
    loralib and PEFT: a token that never occurs keeps its vector. Token numbers are not dropped, so ``dropout`` has no
    meaning here, as there.
    """

    kind = "embedding"
    drops_input = False
    vllm_takes = True

    @classmethod
    @override
    def matrix_of(cls, shape: Sequence[int]) -> tuple[int, int]:
        return shape[-1], shape[-2]

    @classmethod
    @override
    def matrix_shape(cls, module: nn.Module, parameter: str = "weight") -> tuple[int, int]:
        assert isinstance(module, nn.Embedding)
        return module.embedding_dim, module.num_embeddings

    @override
    def recorded_shape(self, layer: nn.Module) -> Sequence[int] | None:
        return None if _has_unknown_forward(layer, type(self)) else self.matrix_shape(layer)[::-1]

    @classmethod
    @override
    def stand_in(cls, shape: Sequence[int]) -> nn.Module:
        tokens, features = shape
        return nn.Embedding(tokens, features)

    @classmethod
    @override
    def peft_obstacle(cls, layer: nn.Module, parameter: str, *, use_dora: bool, lora_bias: bool) -> str | None:
        if _has_unknown_forward(layer, cls):
            return "it has a forward of its own, which PEFT's adapter for embeddings does not know"
        return "PEFT's adapter for embeddings has no bias (lora_bias)" if lora_bias else None

    @classmethod
    @override
    def obstacle(cls, module: nn.Module) -> str | None:
        assert isinstance(module, nn.Embedding)
        if module.max_norm is not None:
            return f"max_norm={module.max_norm} rescales the frozen weight in place; set it to None"
        return None

    @classmethod
    @override
    def needs_weight(cls, module: nn.Module) -> bool:
        # Some models' embeddings scale their vectors, so the output is not the weight's row.
        return type(module).forward is not nn.Embedding.forward

    @override
    def prepare(self, module: nn.Module, parameter: str) -> None:
        assert isinstance(module, nn.Embedding)
        self.padding_idx = module.padding_idx
        self.scale_grad_by_freq = module.scale_grad_by_freq

    @override
    def update(self, inputs: Tensor, output: Tensor) -> Tensor:
        # The padding token gets no gradient, so its column of A stays zero.
        hidden = F.embedding(inputs, self.A.T, self.padding_idx, scale_grad_by_freq=self.scale_grad_by_freq)
        B: Tensor = self.B
        if B.dtype != output.dtype and not torch.is_autocast_enabled(output.device.type):
            hidden, B = hidden.to(output.dtype), B.to(output.dtype)  # what was looked up, not a column for every token
        return F.linear(hidden * self.spec.scaling, B)  # (..., rank) -> (..., features)

    @override
    def as_matrix(self, weight: Tensor) -> Tensor:
        return weight.T

    @override
    def as_stored(self, matrix: Tensor) -> Tensor:
        return matrix.T

    @override
    def zero_factor(self) -> nn.Parameter:
        return self.A

    @override
    def start(self, out_features: int, in_features: int) -> tuple[Tensor, Tensor]:
        return zeros(self.spec.rank, in_features), standard_normal(out_features, self.spec.rank, seeded(self.spec.seed))


def _has_unknown_forward(layer: nn.Module, adapter: type[EmbeddingAdapter]) -> bool:
    return reads_weight(layer, adapter) and not hasattr(layer, "embed_scale")  # the one that PEFT knows


register_adapter(nn.Embedding, EmbeddingAdapter)
