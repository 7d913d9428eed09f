"""Chosen rows of an embedding that train in full, while all other tokens keep theirs."""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import override

from lightning_lora.layers.adapter import Adapter, Block, InBlocks, base_parameter
from lightning_lora.layers.lora_layer import LoRALayer
from lightning_lora.layers.swap import Behaviour
from lightning_lora.layers.weight import WeightLoRALayer
from lightning_lora.sharding import gathered, is_sharded, whole


class TokenAdapter(Adapter):
    """``rows`` in the place of ``W[index]``, for an ``nn.Embedding`` and for layers that share its weight.

    Shapes: ``rows`` is ``(number of tokens, features)``; ``index`` holds the tokens, in ascending order.
    """

    drops_input = False
    has_output_rows = False
    rows: nn.Parameter

    @classmethod
    @override
    def accepts(cls, module: nn.Module) -> bool:
        return False  # chosen by trainable_token_indices, never by target_modules

    @classmethod
    @override
    def matrix_shape(cls, module: nn.Module, parameter: str = "weight") -> tuple[int, int]:
        tokens, features = base_parameter(module, parameter).shape
        return tokens, features

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
        if not inputs.is_floating_point():
            return self._look_up(inputs, output)
        bias = layer._parameters.get("bias")  # the layer is a head: token scores, which the rows' own replace
        rows = self.rows.to(inputs.dtype)
        scores = F.linear(inputs, rows, None if bias is None else bias[self.index])
        return output.index_copy(-1, self.index, scores.to(output.dtype))

    def _look_up(self, tokens: Tensor, output: Tensor) -> Tensor:
        place = torch.searchsorted(self.index, tokens).clamp_max(len(self.index) - 1)
        is_trained = self.index[place] == tokens
        # All other tokens look up one more row, so that scale_grad_by_freq counts the trained ones alone.
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
    def has_effect(self, weight: Tensor) -> bool:
        return not torch.equal(whole(self.rows), whole(weight)[self.index].to(self.rows.dtype))

    @override
    def reset_parameters(self) -> None:
        raise RuntimeError("trainable_token_indices starts from the weights' rows: attach when the weights are there.")

    @override
    def extra_repr(self) -> str:
        return f"tokens={len(self.index)}"


class TiedLoRALayer(LoRALayer):
    """A layer that shares its weight with an embedding whose rows train, and so shares the rows."""

    @override
    def adapters(self) -> dict[str, Adapter]:
        return {}  # the embedding has it


class TiedWeightLoRALayer(WeightLoRALayer):
    """The same for a layer with a forward of its own, which reads the rows from its weight."""

    @override
    def adapters(self) -> dict[str, Adapter]:
        return {}

    @override
    def adapters_of(self, parameter: str) -> list[Adapter]:
        return [self.lora] if parameter == self.lora.parameter else []


def swapped_as_follower(module: nn.Module) -> Behaviour:
    """Return what ``swap_in`` needs to make a tied layer follow its embedding."""
    if TokenAdapter.needs_weight(module):
        return TiedWeightLoRALayer, ("weight",)
    return TiedLoRALayer, ()
