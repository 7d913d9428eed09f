"""Why a layer cannot be adapted although it is of a kind that can: each reason in half a sentence."""

from __future__ import annotations

from collections.abc import Collection

from torch import nn

from lightning_lora.config import ALL_LINEAR, LoRAConfig
from lightning_lora.layers import Adapter, LoRALayer, taken_names
from lightning_lora.targets import output_embeddings, tied_names

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

    def __init__(self, module: nn.Module, config: LoRAConfig, modules: Collection[nn.Module]) -> None:
        self.config = config
        self.tied = tied_names(module)
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
        self, weight_name: str, module: nn.Module, adapter: type[Adapter], rank: int, shape: tuple[int, int]
    ) -> str | None:
        """Return why this layer cannot be adapted, or None."""
        if reason := adapter.obstacle(module) or _of_instance(module):
            return reason
        if others := self.tied.get(weight_name):
            return f"its weight is tied to {', '.join(map(repr, others))}, which would change with it"
        if self._automatic and id(module) in self._heads:
            return "output embedding of a transformers model"
        if rank > min(shape):
            return f"rank {rank} is above {min(shape)}, the highest rank of its weight; give it less with rank_pattern"
        if self.config.dropout and adapter.drops_input:
            return self._of_dropout(module, adapter)
        return None

    def _of_dropout(self, module: nn.Module, adapter: type[Adapter]) -> str | None:
        if reader := self._readers.get(id(module)):
            return f"its parent, a {reader}, reads the weight, which must carry the update; that needs dropout=0"
        if adapter.needs_weight(module):
            kind = type(module).__name__
            return f"a {kind} has a forward of its own, so its weight must carry the update; that needs dropout=0"
        return None


def _of_instance(module: nn.Module) -> str | None:
    if "forward" in vars(module):
        return "its forward was replaced on the instance, so an adapter would never run"
    if not isinstance(module, LoRALayer) and (taken := taken_names(module)):
        return f"it has attributes of its own named {sorted(taken)}, which an adapted layer needs"
    return None
