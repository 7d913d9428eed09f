"""FSDP: adapters in units of their own, and the slices that its processes hold."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import LightningModule
from lightning.pytorch.strategies import FSDPStrategy, Strategy
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.fsdp.wrap import _Policy
from typing_extensions import override

from lightning_lora.attachment import named_tensors
from lightning_lora.fingerprint import fingerprint
from lightning_lora.layers import Adapter, LoRALayer
from lightning_lora.state import adapter_tensors, base_tensors
from lightning_lora.surgery import merge
from lightning_lora.targets import clean_name, join
from lightning_lora.training.layouts import Layout, refuse_reading_across
from lightning_lora.training.process_slices import Key, slices_of_all, told_by_all


class FSDPLayout(Layout):
    """FSDP flattens the parameters of each unit and gives every process a slice.

    Adapters get units of their own: in one unit with the frozen weights, these would be given gradients and be gathered
    at every save.
    """

    def __init__(self, strategy: Strategy) -> None:
        super().__init__(strategy)
        self._shapes: dict[str, torch.Size] = {}  # of the whole parameters, which FSDP hides
        self._slices: dict[str, int] | None = None

    @override
    def prepare(self) -> None:
        kwargs = self._fsdp.kwargs
        if not kwargs.get("use_orig_params", True):
            raise NotImplementedError(
                "LoRACallback needs FSDPStrategy(use_orig_params=True), Lightning's default: without it the names of "
                "the adapters' parameters are lost, and optimizers and checkpoints cannot tell them from frozen ones."
            )
        kwargs["auto_wrap_policy"] = _adapters_apart(kwargs.get("auto_wrap_policy"))

    @override
    def attached(self, module: LightningModule) -> None:
        refuse_reading_across(module, "FSDPStrategy", "ModelParallelStrategy (FSDP2)")
        if any(isinstance(part, FullyShardedDataParallel) for part in module.modules()):
            if not adapter_tensors(module).keys() <= self._shapes.keys():
                raise NotImplementedError(
                    f"This {type(module).__name__} was wrapped by FSDP in configure_model, or by another Trainer's "
                    "strategy. Leave wrapping to FSDPStrategy(auto_wrap_policy=...), which gives adapters units of "
                    "their own, and use a fresh module."
                )
            return
        self._slices, self._base = None, fingerprint(base_tensors(module))  # slices do not say which part they are
        self._shapes = {name: tensor.shape for name, tensor in named_tensors(module).items()}

    @property
    @override
    def divides_weights(self) -> bool:
        return True

    @property
    def _fsdp(self) -> FSDPStrategy:
        assert isinstance(self.strategy, FSDPStrategy)
        return self.strategy

    @override
    def shape(self, name: str, parameter: Tensor) -> torch.Size:
        return self._shapes.get(name, parameter.shape)

    @override
    def gather(self, tensors: Mapping[Key, Tensor], name_of: Callable[[Key], str]) -> dict[Key, Tensor]:
        """Join the slices of the processes: consecutive ones, in the order of the ranks.

        A process may have nothing of a parameter, and then its optimizer has no state for it either.
        """
        starts = self._starts()
        found = {key: tensor.detach() for key, tensor in tensors.items() if name_of(key) not in starts}
        slices = {key: tensor.detach().flatten() for key, tensor in tensors.items() if key not in found}
        for key, parts in slices_of_all(slices, self.strategy.root_device, self._group()).items():
            shape = self._shapes[name_of(key)]
            # NO_SHARD leaves each process the whole.
            found[key] = (parts[0] if len(parts[0]) == shape.numel() else torch.cat(parts)).view(shape)
        return found

    @override
    def agree(self, values: Mapping[Key, Any]) -> dict[Key, Any]:
        return {key: value for each in told_by_all(dict(values), self._group()) for key, value in each.items()}

    @override
    def part(self, value: Tensor, name: str, like: Tensor) -> Tensor:
        start = self._starts().get(name)
        if start is None:
            return value.to(like.device)
        return value.flatten()[start : start + like.numel()].view(like.shape).to(like.device)

    @override
    @torch.no_grad()
    def fill_base(self, tensors: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> None:
        wanted = {name for name, tensor in tensors.items() if isinstance(tensor, nn.Parameter) and name in values}
        paths = {id(part): clean_name(path) for path, part in self.module.named_modules()}
        for unit in self._units() if wanted else []:  # the outermost first, or FSDP takes another for it
            with FullyShardedDataParallel.summon_full_params(unit, recurse=False, writeback=True):
                own = {
                    join(paths[id(part)], key): parameter
                    for part in _own_modules(unit)
                    for key, parameter in part._parameters.items()
                    if parameter is not None
                }
                for name in own.keys() & wanted:
                    own[name].copy_(values[name])
        self.fill({name: tensor for name, tensor in tensors.items() if name not in wanted}, values)

    @override
    def refused_diagnostics(self) -> str | None:
        return (
            "diagnostics_every_n_steps: under FSDPStrategy a process holds flat slices of the factors and of the "
            "weights, which say nothing of ranks and norms. Leave it out and look at checkpoints with "
            "lightning_lora.analysis.analyze, or use DDP or ModelParallelStrategy (FSDP2)."
        )

    @override
    def merge(self) -> None:
        merge(self.module, whole=self._unit_gathered)

    def _starts(self) -> dict[str, int]:
        """Return where this process's slice of each trained parameter starts; the first call needs every process."""
        if self._slices is None:
            tensors = adapter_tensors(self.module)
            lengths = {name: tensor.numel() for name, tensor in tensors.items() if isinstance(tensor, nn.Parameter)}
            before = told_by_all(lengths, self._group())[: dist.get_rank(self._group())]
            whole = {name for name in lengths if lengths[name] == self._shapes[name].numel()}
            self._slices = {name: 0 if name in whole else sum(each[name] for each in before) for name in lengths}
        return self._slices

    def _group(self) -> dist.ProcessGroup | None:
        """Return the processes that a unit's parameters are divided among."""
        units = self._units()
        return units[0].process_group if units else None

    def _units(self) -> list[FullyShardedDataParallel]:
        assert self._fsdp.model is not None
        return FullyShardedDataParallel.fsdp_modules(self._fsdp.model)

    @contextmanager
    def _unit_gathered(self, layer: LoRALayer) -> Iterator[None]:
        """Have the whole of one layer's weight and factors for a while; what is written to them stays."""
        units = [
            unit
            for unit in self._units()
            if any(part is layer for part in _own_modules(unit)) or any(unit is part for part in layer.modules())
        ]
        with ExitStack() as stack:
            for unit in units:
                stack.enter_context(FullyShardedDataParallel.summon_full_params(unit, recurse=False, writeback=True))
            # With one process FSDP leaves frozen weights as plain attributes after a backward pass.
            hidden = {name: vars(layer)[name] for name in layer.adapted_parameters() if name in vars(layer)}
            layer._parameters.update({name: nn.Parameter(tensor.detach(), False) for name, tensor in hidden.items()})
            yield
            for name in hidden:
                del layer._parameters[name]


class _AdaptersApart(_Policy):
    """The user's wrapping policy, and a unit of its own for every adapter."""

    def __init__(self, inner: _Policy | None) -> None:
        self.inner = inner

    @override
    def _run_policy(
        self, root_module: nn.Module, ignored_modules: set[nn.Module], root_kwargs: dict[str, Any]
    ) -> dict[nn.Module, dict[str, Any]]:
        chosen = {} if self.inner is None else self.inner._run_policy(root_module, ignored_modules, root_kwargs)
        adapters = [part for part in root_module.modules() if isinstance(part, Adapter) and part not in ignored_modules]
        return chosen | {part: root_kwargs for part in adapters if part is not root_module}


def _adapters_apart(policy: Any) -> Any:
    """Return a wrapping policy that gives adapters units of their own, and leaves the rest to the user's."""
    if policy is None or isinstance(policy, _Policy):
        return policy if isinstance(policy, _AdaptersApart) else _AdaptersApart(policy)

    def apart(module: nn.Module, recurse: bool, nonwrapped_numel: int) -> bool:
        return recurse or isinstance(module, Adapter) or bool(policy(module, recurse, nonwrapped_numel))

    return apart


def _own_modules(unit: nn.Module) -> Iterator[nn.Module]:
    """Yield the modules whose parameters are in this unit, not in one below it."""
    for part in unit.children():
        if not isinstance(part, FullyShardedDataParallel):
            yield part
            yield from _own_modules(part)
