"""How a strategy distributes trained tensors over its processes, and gathers them again."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar, cast

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.fabric.utilities.optimizer import _optimizer_to_device
from lightning.fabric.utilities.rank_zero import rank_zero_warn  # type: ignore[attr-defined]
from lightning.pytorch import LightningModule
from lightning.pytorch.strategies import ModelParallelStrategy, Strategy
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.optim import Optimizer
from typing_extensions import override

from lightning_lora.adapted_model import AdaptedModel
from lightning_lora.fingerprint import Fingerprint
from lightning_lora.layers import LoRALayer, WeightLoRALayer
from lightning_lora.names import clean_name, listed
from lightning_lora.optimizers import group_names
from lightning_lora.sharding import is_sharded, laid_out_like, whole

Key = TypeVar("Key")


class GradientNote:
    """Sums the sizes of a parameter's gradients, before the strategy takes them away, until ``stop``."""

    def __init__(self, parameter: nn.Parameter) -> None:
        self.total: Tensor | None = None
        self._hook = parameter.register_post_accumulate_grad_hook(self._note)  # type: ignore[no-untyped-call]

    def _note(self, parameter: Tensor) -> None:
        if parameter.grad is not None:
            size = torch.linalg.vector_norm(parameter.grad, 1)
            self.total = size if self.total is None else self.total + size

    def stop(self) -> None:
        """Take no more notes."""
        self._hook.remove()


class Layout:
    """The simplest layout: every process has the whole of each tensor, or all have it as ``DTensor``.

    A new strategy overrides the methods below. The constructor prepares the strategy for adapters, and raises
    ``MisconfigurationException`` if it cannot train them. Every process calls the methods that read or write values.

    Attributes:
        strategy: Lightning's.
        divides_weights: Whether a process may have only a part of a frozen weight.
        base: The fingerprint of the base from when the adapters were attached, if weights cannot be read later.
        original_parameters: The parameters of each group as the module configured them, if the strategy replaces its
            optimizer's.
        noted_gradients: Notes of the adapters' gradients by parameter, if the strategy takes gradients away.
        before_wrapping: Called before ``configure_model`` wraps the first part of the module.
    """

    divides_weights = False

    def __init__(self, strategy: Strategy) -> None:
        self.strategy = strategy
        self.base: Fingerprint | None = None
        self.original_parameters: list[list[nn.Parameter]] | None = None
        self.noted_gradients: dict[int, GradientNote] | None = None
        self.before_wrapping: Callable[[], None] | None = None

    def check_fit(self, *, with_diagnostics: bool, with_schedule: bool) -> None:
        """Refuse to train, to measure or to change ranks while training, with the strategy's settings."""

    def settle(self, module: LightningModule) -> None:
        """Let the module hold its parameters as the strategy keeps them between steps."""

    def attached(self, module: LightningModule) -> None:
        """Record newly attached adapters before the strategy wraps the module; reject what it cannot train."""

    def configured(self, module: LightningModule, optimizers: Sequence[Optimizer]) -> None:
        """Record the optimizers before the strategy takes them over; reject what it cannot use."""

    def gather(
        self,
        values: Mapping[Key, Any],
        name_of: Callable[[Key], str],  # noqa: ARG002 - for strategies that hide shapes
    ) -> dict[Key, Any]:
        """Return whole tensors.

        Args:
            values: What this process has of parameters, or of their optimizer states; plain numbers stay as they are.
            name_of: Gives the name of the parameter that a value belongs to.
        """
        return {key: whole(v.detach()) if isinstance(v, Tensor) else v for key, v in values.items()}

    def part(self, value: Tensor, name: str, like: Tensor) -> Tensor:  # noqa: ARG002
        """Return this process's part of a whole tensor that belongs to the parameter of this name."""
        return laid_out_like(value.to(like.device), like)

    @torch.no_grad()
    def fill(self, tensors: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> None:
        """Copy whole values, which every process has, into the module's tensors of the same names."""
        for name, tensor in tensors.items():
            if name in values:
                tensor.copy_(self.part(values[name], name, tensor))

    def shape(self, name: str, parameter: Tensor) -> torch.Size:  # noqa: ARG002
        """Return the shape of the whole of a parameter."""
        return parameter.shape

    def shapes(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return tensors without memory that have the shapes of the whole ones."""
        return {
            name: torch.empty(self.shape(name, tensor), dtype=tensor.dtype, device="meta")
            for name, tensor in tensors.items()
        }

    def gathered_layer(self, layer: LoRALayer) -> AbstractContextManager[object]:  # noqa: ARG002
        """Gather an adapted layer's weight and factors inside the block; changes persist."""
        return nullcontext()

    def optimizer_state(self, module: nn.Module, optimizer: Any) -> dict[str, Any]:
        """Return an optimizer's state with whole tensors."""
        state = cast(dict[str, Any], Strategy.optimizer_state(self.strategy, optimizer))
        names = [name for group in group_names(module, optimizer.param_groups) for name in group]
        values = {
            (index, key): value for index, entry in state.get("state", {}).items() for key, value in entry.items()
        }
        entries: dict[int, dict[str, Any]] = {}
        for (index, key), value in sorted(self.gather(values, lambda place: names[place[0]]).items()):
            entries.setdefault(index, {})[key] = value
        return {**state, "state": entries} if state else {}

    def load_optimizer_state(self, optimizer: Any, state: dict[str, Any], names: list[str]) -> None:
        """Load what ``optimizer_state`` returned, under any strategy, into an optimizer.

        Args:
            optimizer: One of the strategy's.
            state: Its entries are at the positions of this optimizer's parameters.
            names: The names of these parameters.
        """
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        # Where a process has nothing of a parameter, the optimizer never steps it and has no state for it.
        state["state"] = {index: entry for index, entry in state["state"].items() if parameters[index].numel()}
        for index, entry in state["state"].items():
            for key, value in entry.items():
                if isinstance(value, Tensor) and value.shape == self.shape(names[index], parameters[index]):
                    entry[key] = self.part(value, names[index], parameters[index])
        optimizer.load_state_dict(state)
        _optimizer_to_device(optimizer, self.strategy.root_device)


class ModelParallelLayout(Layout):
    """FSDP2 and tensor parallelism: ``configure_model`` itself makes parameters ``DTensor``."""

    divides_weights = True
    _with_schedule = False

    @override
    def settle(self, module: LightningModule) -> None:
        # After a pass without gradients, as in a validation, the outermost unit still holds its parameters whole, and
        # what reads the module next, in whichever process, divides them again in the middle of its work.
        for part in module.modules():
            if isinstance(part, FSDPModule):
                part.reshard()

    @override
    def check_fit(self, *, with_diagnostics: bool, with_schedule: bool) -> None:
        self._with_schedule = with_schedule

    @override
    def configured(self, module: LightningModule, optimizers: Sequence[Optimizer]) -> None:
        """Reject parameters that each process would train separately, because the module has not sharded them."""
        mesh = cast(ModelParallelStrategy, self.strategy).device_mesh
        data, tensor = mesh["data_parallel"], mesh["tensor_parallel"]
        sizes = f"data_parallel_size={data.size()}, tensor_parallel_size={tensor.size()}"
        divided = [parameter for parameter in module.parameters() if is_sharded(parameter)]
        if mesh.size() > 1 and not divided:
            raise MisconfigurationException(
                f"ModelParallelStrategy({sizes}): configure_model of {type(module).__name__} shards no parameter, so "
                f"each of the {mesh.size()} processes would train separately. Call fully_shard there, with "
                f"data_parallel_size={mesh.size()} and tensor_parallel_size=1, or parallelize_module for tensor "
                "parallelism; or use strategy='ddp'."
            )
        apart = [name for name, p in module.named_parameters() if p.requires_grad and not _spans(p, data)]
        if data.size() > 1 and apart:
            owners = list(dict.fromkeys(clean_name(name).rpartition(".")[0] for name in apart))
            raise MisconfigurationException(
                f"{listed(owners)} would train separately in each process: under ModelParallelStrategy({sizes}) only "
                "what fully_shard has sharded is synchronized. In configure_model call "
                'fully_shard(..., mesh=self.device_mesh["data_parallel"]) on these layers, or last on the whole model.'
            )
        is_parallel = tensor.size() > 1 and any(_spans(parameter, tensor) for parameter in divided)
        if is_parallel and self._with_schedule:
            raise MisconfigurationException(
                f"rank_schedule: ModelParallelStrategy({sizes}) with parallelize_module divides each layer in its own "
                "way, and the components of its factors with it. Use fully_shard alone or DDP, or train at a fixed "
                "rank and call truncate_adapter."
            )
        if tensor.size() > 1 and not is_parallel:
            rank_zero_warn(
                f"LoRA: ModelParallelStrategy({sizes}), but no parameter is sharded for tensor parallelism, so groups "
                f"of {tensor.size()} processes train on the same data. Call parallelize_module in configure_model, or "
                "set tensor_parallel_size=1."
            )


def _spans(parameter: Tensor, mesh: Any) -> bool:
    """Return whether a parameter is distributed over all processes of a mesh, and perhaps over others too."""
    if not is_sharded(parameter):
        return False
    own: Any = parameter
    return set(mesh.mesh.flatten().tolist()) <= set(own.device_mesh.mesh.flatten().tolist())


def module_of(strategy: Strategy) -> LightningModule:
    """Return the module that a strategy trains now."""
    assert strategy.lightning_module is not None
    return strategy.lightning_module


def original_param_groups(layout: Layout, optimizer: Any) -> list[dict[str, Any]]:
    """Return an optimizer's groups with the module's own parameters, even if the strategy replaced them."""
    groups: list[dict[str, Any]] = optimizer.param_groups
    if layout.original_parameters is None:
        return groups
    return [{**group, "params": own} for group, own in zip(groups, layout.original_parameters, strict=True)]


def refuse_reading_across(module: LightningModule, strategy: str, instead: str) -> None:
    """Refuse adapters that one layer reads while another runs: the strategy may have their tensors apart then.

    Args:
        module: An adapted module.
        strategy: The strategy's name.
        instead: What can train them.
    """
    layers = AdaptedModel(module).layers
    reasons = {
        "that the weight itself must carry": [n for n, layer in layers.items() if isinstance(layer, WeightLoRALayer)],
        "that tied layers share": [n for n, layer in layers.items() if not layer.adapters()],
    }
    for what, names in reasons.items():
        if names:
            raise MisconfigurationException(
                f"{strategy} cannot train adapters {what}: {listed(names)}. Leave the layers out with "
                f"exclude_modules, or use {instead}."
            )
