"""FSDP2 and tensor parallelism: the module divides itself, and what it leaves whole must not train apart."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

from lightning.fabric.utilities.rank_zero import rank_zero_warn  # type: ignore[attr-defined]
from lightning.pytorch import LightningModule
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor
from torch.optim import Optimizer
from typing_extensions import override

from lightning_lora.names import clean_name, listed
from lightning_lora.sharding import is_sharded
from lightning_lora.trainer.strategies.base import Layout


class ModelParallelLayout(Layout):
    """``configure_model`` makes parameters ``DTensor``, by ``fully_shard`` and ``parallelize_module``."""

    @property
    @override
    def divides_weights(self) -> bool:
        return True

    @override
    def configured(self, module: LightningModule, optimizers: Sequence[Optimizer]) -> None:
        """Refuse what each process would train by itself: nobody synchronises what the module has not divided."""
        mesh = cast(ModelParallelStrategy, self.strategy).device_mesh
        data, tensor = mesh["data_parallel"], mesh["tensor_parallel"]
        sizes = f"data_parallel_size={data.size()}, tensor_parallel_size={tensor.size()}"
        divided = [parameter for parameter in module.parameters() if is_sharded(parameter)]
        if mesh.size() > 1 and not divided:
            raise NotImplementedError(
                f"ModelParallelStrategy({sizes}): configure_model of {type(module).__name__} divides no parameter, so "
                f"each of the {mesh.size()} processes would train by itself. Call fully_shard there, with "
                f"data_parallel_size={mesh.size()} and tensor_parallel_size=1, or parallelize_module for tensor "
                "parallelism; or use strategy='ddp'."
            )
        apart = [name for name, p in module.named_parameters() if p.requires_grad and not _spans(p, data)]
        if data.size() > 1 and apart:
            owners = list(dict.fromkeys(clean_name(name).rpartition(".")[0] for name in apart))
            raise NotImplementedError(
                f"{listed(owners)} would train in each process by itself: under ModelParallelStrategy({sizes}) only "
                "what fully_shard has divided is synchronised. In configure_model call "
                'fully_shard(..., mesh=self.device_mesh["data_parallel"]) on these layers, or last on the whole model.'
            )
        if tensor.size() > 1 and not any(_spans(parameter, tensor) for parameter in divided):
            rank_zero_warn(
                f"LoRA: ModelParallelStrategy({sizes}), but no parameter is divided for tensor parallelism, so groups "
                f"of {tensor.size()} processes train on the same data. Call parallelize_module in configure_model, or "
                "set tensor_parallel_size=1."
            )


def _spans(parameter: Tensor, mesh: Any) -> bool:
    """Return whether a parameter lies over all processes of a mesh, which others may be part of, too."""
    if not is_sharded(parameter):
        return False
    own: Any = parameter
    return set(mesh.mesh.flatten().tolist()) <= set(own.device_mesh.mesh.flatten().tolist())
