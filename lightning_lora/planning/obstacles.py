"""Why a layer cannot be adapted although it is of a kind that can: each reason in half a sentence."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from torch import nn

from lightning_lora.config import ALL_LINEAR, LoRAConfig
from lightning_lora.layers import Adapter, LoRALayer, base_parameter, taken_names
from lightning_lora.names import output_embeddings
from lightning_lora.sharding import is_sharded

# Parents that read their children's weights, always or in evaluation, so that the weight must carry the update.
_WEIGHT_READERS: dict[type[nn.Module], tuple[str, ...]] = {
    nn.MultiheadAttention: ("out_proj",),
    nn.TransformerEncoderLayer: ("linear1", "linear2"),
}


class Obstacles:
    """What stands between a request and the layers of one model.

    Attributes:
        tied: Parameters that share memory with others -> the others.
    """

    def __init__(
        self,
        config: LoRAConfig,
        modules: Collection[nn.Module],
        parameters: Collection[nn.Parameter],
        tied: Mapping[str, tuple[str, ...]],
    ) -> None:
        self.config, self.tied = config, tied
        kinds, precisions = set(map(type, parameters)), {parameter.dtype for parameter in parameters}
        is_common = kinds <= {nn.Parameter} and all(dtype.is_floating_point for dtype in precisions)
        options = config.dropout or config.lora_bias or config.use_dora
        self._asks_for_more = bool(options) or not is_common
        self._automatic = config.target_modules == ALL_LINEAR
        self._heads = {id(head) for head in output_embeddings(modules)}
        readers = tuple(_WEIGHT_READERS)
        self._readers = {
            id(getattr(parent, child)): type(parent).__name__
            for parent in modules
            if isinstance(parent, readers)
            for kind, children in _WEIGHT_READERS.items()
            if isinstance(parent, kind)
            for child in children
        }

    def is_read_by_parent(self, module: nn.Module) -> bool:
        """Return whether a parent reads this layer's weight instead of calling it."""
        return id(module) in self._readers

    def of(
        self,
        weight_name: str,
        module: nn.Module,
        adapter: type[Adapter],
        rank: int,
        shape: tuple[int, int],
        *,
        named: bool,
    ) -> str | None:
        """Return why this layer cannot be adapted, or None; ``named`` tells a request from a sweep."""
        if isinstance(module, LoRALayer):
            return None  # it was judged when it was adapted
        if reason := adapter.obstacle(module) or self.of_instance(module):
            return reason
        if (others := self.tied.get(weight_name)) and not (named and self.config.untie_weights):
            remedy = "; untie_weights=True gives it a copy of its own" if named else ""
            return f"its weight is tied to {', '.join(map(repr, others))}, which would change with it{remedy}"
        if self._automatic and id(module) in self._heads:
            return "output embedding of a transformers model"
        if rank > shape[0] or rank > shape[1]:
            return f"rank {rank} is above {min(shape)}, the highest rank of its weight; give it less with rank_pattern"
        if self._asks_for_more:
            return self._of_options(weight_name.rpartition(".")[2], module, adapter)
        return None

    def of_instance(self, module: nn.Module) -> str | None:
        """Return what this very module has that an adapted layer cannot have, or None."""
        if "forward" in vars(module):
            return "its forward was replaced on the instance, so an adapter would never run"
        if not isinstance(module, LoRALayer) and (taken := taken_names(module)):
            return f"it has attributes of its own named {sorted(taken)}, which an adapted layer needs"
        return None

    def _of_options(self, parameter: str, module: nn.Module, adapter: type[Adapter]) -> str | None:
        """Return what keeps an option beyond plain LoRA, or an uncommon kind of weight, from working here."""
        weight = base_parameter(module, parameter)
        if not weight.is_floating_point() and (why := self._carried_by_weight(module, adapter)):
            return f"{why}; that needs a weight in floating point, not {weight.dtype}"
        if is_sharded(weight) and (why := self._beyond_tensor_parallel(module, adapter)):
            return f"its weight is divided by tensor parallelism, under which {why}"
        if self.config.dropout and adapter.drops_input and (why := self._carried_by_weight(module, adapter)):
            return f"{why}; that needs dropout=0"
        if self.config.lora_bias:
            if why := self._carried_by_weight(module, adapter):
                return f"{why}; that needs lora_bias=False"
            if not adapter.takes_bias:
                return f"lora_bias has no meaning for a {type(module).__name__}"
        return self._of_dora(parameter, module, adapter) if self.config.use_dora else None

    def _of_dora(self, parameter: str, module: nn.Module, adapter: type[Adapter]) -> str | None:
        weight = base_parameter(module, parameter)
        if not adapter.has_output_rows or isinstance(module, nn.EmbeddingBag):
            return (
                f"use_dora is not defined where {parameter!r} of a {type(module).__name__} has no row for each output"
            )
        if weight.is_meta:
            return "use_dora starts from the weights' norms, and this one is on the meta device; attach later"
        if not weight.is_floating_point():
            return f"use_dora needs a weight in floating point, not {weight.dtype}"
        return None

    def _beyond_tensor_parallel(self, module: nn.Module, adapter: type[Adapter]) -> str | None:
        if not (isinstance(module, nn.Linear) and adapter.takes_bias) or self._carried_by_weight(module, adapter):
            return "only nn.Linear with its own forward is adapted"
        if self.config.use_dora or self.config.lora_bias:
            return "use_dora and lora_bias are not supported"
        return None

    def _carried_by_weight(self, module: nn.Module, adapter: type[Adapter]) -> str | None:
        if reader := self._readers.get(id(module)):
            return f"its parent, a {reader}, reads the weight, which must carry the update"
        if adapter.needs_weight(module):
            return f"a {type(module).__name__} has a forward of its own, so its weight must carry the update"
        return None
