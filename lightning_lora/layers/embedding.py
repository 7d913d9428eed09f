"""Embeddings: the columns of ``A`` belong to the tokens."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import override

from lightning_lora.layers.initializers import seeded, standard_normal, zeros
from lightning_lora.layers.low_rank import LowRankAdapter


class EmbeddingAdapter(LowRankAdapter):
    """``y += scaling * A[:, token] @ B.T`` beside an ``nn.Embedding`` of ``(tokens, features)``.

    ``A`` is ``(rank, tokens)`` and starts at zero, ``B`` is ``(features, rank)`` and starts standard normal, as in
    loralib and PEFT: a token that never occurs keeps its vector. Token numbers are not dropped, so ``dropout`` has no
    meaning here, as there.
    """

    drops_input = False

    @classmethod
    @override
    def accepts(cls, module: nn.Module) -> bool:
        return isinstance(module, nn.Embedding)

    @classmethod
    @override
    def matrix_shape(cls, module: nn.Module, parameter: str = "weight") -> tuple[int, int]:
        assert isinstance(module, nn.Embedding)
        return module.embedding_dim, module.num_embeddings

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
