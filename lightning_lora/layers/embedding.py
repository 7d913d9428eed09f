"""Embeddings: low-rank updates, where each column of ``A`` belongs to a token, and chosen tokens trained in full."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import override

from lightning_lora.layers.adapter import Adapter, Block, InBlocks, base_parameter, register_adapter
from lightning_lora.layers.lora_layer import Behavior, LoRALayer, reads_weight
from lightning_lora.layers.low_rank import LowRankAdapter, is_list, piece_by_piece
from lightning_lora.layers.starts import seeded, standard_normal, zeros
from lightning_lora.layers.weight import WeightLoRALayer
from lightning_lora.sharding import gathered, is_sharded, whole


class EmbeddingAdapter(LowRankAdapter):
    """``y += scaling * A[:, token] @ B.T`` beside an ``nn.Embedding`` of ``(tokens, features)``.

    ``A`` is ``(rank, tokens)`` and starts at zero, ``B`` is ``(features, rank)`` and starts standard normal, as in
    loralib and PEFT: a token that never occurs keeps its vector. Token numbers are not dropped, so ``dropout`` has no
    meaning here, as there.
    """

    kind = "embedding"
    drops_input = False
    takes_starts = False
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
            return "it has a custom forward, which PEFT's adapter for embeddings ignores"
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
        if is_list(inputs):
            return piece_by_piece(self.update, inputs, output)
        # The padding token gets no gradient, so its column of A stays zero.
        hidden = F.embedding(inputs, self.A.T, self.padding_idx, scale_grad_by_freq=self.scale_grad_by_freq)
        B: Tensor = self.B
        if self.kept is not None:  # of the looked-up rows, not of the whole table
            hidden, B = hidden.narrow(-1, 0, self.kept), B.narrow(-1, 0, self.kept)
        if B.dtype != output.dtype and not torch.is_autocast_enabled(output.device.type):
            hidden, B = hidden.to(output.dtype), B.to(output.dtype)  # the looked-up rows, not the whole table
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
    return reads_weight(layer, adapter) and not hasattr(
        layer, "embed_scale"
    )  # PEFT supports embeddings with embed_scale


register_adapter(nn.Embedding, EmbeddingAdapter)


# --- chosen tokens, whose rows train in full


class TokenAdapter(Adapter):
    """``rows`` replace ``W[index]``, in an ``nn.Embedding`` and in layers that share its weight.

    Shapes: ``rows`` is ``(number of tokens, features)``; ``index`` holds the tokens, in ascending order.
    """

    kind = "embedding"
    drops_input = False
    has_output_rows = False
    rows: nn.Parameter

    @classmethod
    @override
    def needs_weight(cls, module: nn.Module) -> bool:
        return all(type(module).forward is not kind.forward for kind in (nn.Embedding, nn.Linear))

    @override
    def prepare(self, module: nn.Module, parameter: str) -> None:
        self.scale_grad_by_freq = bool(getattr(module, "scale_grad_by_freq", False))

    @override
    def build(self, module: nn.Module, parameter: str) -> None:
        weight = base_parameter(module, parameter)
        with gathered([weight]):
            self._parameters["rows"] = nn.Parameter(self.starts(weight)["rows"])

    @override
    def starts(self, weight: Tensor) -> dict[str, Tensor]:
        return {"rows": weight.detach()[self.index].to(self.spec.dtype, copy=True)}

    @override
    def forward(self, inputs: Tensor, output: Tensor, layer: nn.Module, is_ours: bool = False) -> Tensor:
        if is_list(inputs):
            return piece_by_piece(lambda x, y: self(x, y, layer), inputs, output)
        if not inputs.is_floating_point():
            return self._look_up(inputs, output)
        bias = layer._parameters.get("bias")  # the layer is a head: token scores, which the rows' own replace
        rows = self.rows.to(inputs.dtype)
        scores = F.linear(inputs, rows, None if bias is None else bias[self.index])
        return output.index_copy(-1, self.index, scores.to(output.dtype))

    def _look_up(self, tokens: Tensor, output: Tensor) -> Tensor:
        place = torch.searchsorted(self.index, tokens).clamp_max(len(self.index) - 1)
        is_trained = self.index[place] == tokens
        # All other tokens look up an extra row, so that scale_grad_by_freq counts only the trained ones.
        table = F.pad(self.rows, (0, 0, 0, 1))
        rows = F.embedding(
            torch.where(is_trained, place, len(self.index)), table, scale_grad_by_freq=self.scale_grad_by_freq
        )
        return torch.where(is_trained.unsqueeze(-1), rows.to(output.dtype), output)

    @override
    def combined(self, weight: Tensor) -> Tensor:
        dtype = torch.promote_types(torch.promote_types(self.rows.dtype, torch.float32), weight.dtype)
        return weight.to(dtype).index_copy(0, self.index, whole(self.rows).to(dtype))

    @override
    def in_blocks(self, weight: Tensor) -> InBlocks | None:
        if is_sharded(weight):
            return None
        rows = whole(self.rows)
        dtype = torch.promote_types(torch.promote_types(rows.dtype, torch.float32), weight.dtype)
        return InBlocks(weight, dtype, partial(self._put_into, rows), in_one_pass=False)

    def _put_into(self, rows: Tensor, total: Tensor, block: Block) -> None:
        places, at = self.rows_in(block)
        rows = block.of(rows) if block.by_columns else rows
        total.index_copy_(0, at, rows[places].to(total.dtype))

    @override
    def recorded_shape(self, layer: nn.Module) -> Sequence[int] | None:
        return (layer.num_embeddings, layer.embedding_dim) if isinstance(layer, nn.Embedding) else None

    @override
    def has_effect(self, weight: Tensor) -> bool:
        return not torch.equal(whole(self.rows), whole(weight)[self.index].to(self.rows.dtype))

    @override
    def reset_parameters(self) -> None:
        raise RuntimeError("trainable_token_indices starts from rows of the weights: attach after they are loaded.")

    @override
    def extra_repr(self) -> str:
        return f"tokens={len(self.index)}"


class TiedLoRALayer(LoRALayer):
    """A layer that shares its weight, and so the trained rows, with an embedding."""

    @override
    def adapters(self) -> dict[str, Adapter]:
        return {}  # the embedding has it


class TiedWeightLoRALayer(WeightLoRALayer):
    """The same for a layer with a custom forward, which reads the rows from its weight."""

    @override
    def adapters(self) -> dict[str, Adapter]:
        return {}

    @override
    def adapters_of(self, parameter: str) -> list[Adapter]:
        return [self.lora] if parameter == self.lora.parameter else []


def swapped_as_follower(*, in_weight: bool) -> Behavior:
    """Return what ``swap_in`` needs to make a tied layer follow its embedding."""
    if in_weight:
        return TiedWeightLoRALayer, ("weight",)
    return TiedLoRALayer, ()
