"""FSDP: adapters in units of their own, and the slices that its processes hold."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, cast

import torch
import torch.distributed as dist
from lightning.pytorch import LightningModule
from lightning.pytorch.strategies import FSDPStrategy, Strategy
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.fsdp.wrap import wrap
from torch.optim import Optimizer
from typing_extensions import override

from lightning_lora.attachment import named_tensors
from lightning_lora.fingerprint import fingerprint
from lightning_lora.layers import LoRALayer
from lightning_lora.names import clean_name, join, listed
from lightning_lora.state import adapter_tensors, base_tensors
from lightning_lora.surgery import merge
from lightning_lora.trainer.process_slices import Key, slices_of_all, told_by_all
from lightning_lora.trainer.strategies.base import Layout, refuse_reading_across
from lightning_lora.trainer.strategies.fsdp_units import (
    adapters_apart,
    is_ours_alone,
    mixed_adapters,
    own_modules,
    trained_outside,
    units_of,
    wrap_adapters,
    wrapping,
)


class FSDPLayout(Layout):
    """FSDP flattens the parameters of each unit and gives every process a slice.

    Adapters get units of their own: in one unit with the frozen weights, these would be given gradients and be gathered
    at every save.
    """

    def __init__(self, strategy: Strategy) -> None:
        super().__init__(strategy)
        self._shapes: dict[str, torch.Size] = {}  # of the whole parameters, which FSDP hides
        self._slices: dict[str, int] | None = None
        self._noted: Callable[[], LightningModule | None] = lambda: None  # whose shapes they are

    @override
    def prepare(self) -> None:
        kwargs = self._fsdp.kwargs
        if not kwargs.get("use_orig_params", True):
            raise NotImplementedError(
                "LoRACallback needs FSDPStrategy(use_orig_params=True), Lightning's default: without it the names of "
                "the adapters' parameters are lost, and optimizers and checkpoints cannot tell them from frozen ones."
            )
        kwargs["auto_wrap_policy"] = adapters_apart(kwargs.get("auto_wrap_policy"))
        context = functools.partial(wrapping, self._fsdp.model_sharded_context, self._tell_wrapping)
        self._fsdp.model_sharded_context = context  # type: ignore[method-assign]

    @override
    def attached(self, module: LightningModule) -> None:
        refuse_reading_across(module, "FSDPStrategy", "ModelParallelStrategy (FSDP2)")
        if self.is_divided(module):
            self._complete_wrapping(module)
            return
        if units_of(module):
            raise NotImplementedError(
                f"{type(module).__name__} was wrapped by FSDP(...) itself, or by another Trainer's strategy. In "
                "configure_model call lightning_lora.attach(self) and then wrap(...) of torch.distributed.fsdp.wrap, "
                "or leave wrapping to FSDPStrategy(auto_wrap_policy=...); and use a fresh module."
            )
        self._fsdp.kwargs["auto_wrap_policy"] = adapters_apart(self._fsdp.kwargs.get("auto_wrap_policy"))
        self._noted = weakref.ref(module)
        self._slices, self._base = None, fingerprint(base_tensors(module))  # slices do not say which part they are
        self._shapes = {name: tensor.shape for name, tensor in named_tensors(module).items()}

    @override
    def is_divided(self, module: LightningModule) -> bool:
        return self._noted() is module and bool(units_of(module))

    @override
    def configured(self, module: LightningModule, optimizers: Sequence[Optimizer]) -> None:
        if names := mixed_adapters(self._model):
            raise NotImplementedError(
                f"FSDP holds the adapters of {listed(names)} together with frozen weights, which would be given "
                "gradients. In configure_model use wrap(...) of torch.distributed.fsdp.wrap instead of FSDP(...): it "
                "gives adapters units of their own."
            )
        if names := trained_outside(self._model):
            raise NotImplementedError(
                f"{listed(names)} would train without FSDP, differently in each process: configure_model wraps other "
                "modules only, and then FSDPStrategy wraps nothing more. Wrap them, too, or the whole model last."
            )

    def _tell_wrapping(self) -> None:
        if self.when_wrapping is not None:
            self.when_wrapping()

    def _complete_wrapping(self, module: LightningModule) -> None:
        """Make units of the adapters in layers that were not wrapped; who wraps by hand has the rest whole."""
        if late := [name for name in named_tensors(module) if name not in self._shapes]:
            raise NotImplementedError(
                f"{listed(late)} came into {type(module).__name__} after it had wrapped a part of itself, too late for "
                "adapters. In configure_model build all layers, call lightning_lora.attach(self), and wrap then."
            )
        wrap_adapters(module, wrap)
        if is_ours_alone(self._fsdp.kwargs.get("auto_wrap_policy")):
            del self._fsdp.kwargs["auto_wrap_policy"]  # Lightning warns that it ignores it

    @property
    @override
    def divides_weights(self) -> bool:
        return True

    @property
    def _fsdp(self) -> FSDPStrategy:
        return cast(FSDPStrategy, self.strategy)

    @property
    def _model(self) -> nn.Module:
        """What the strategy runs: the module, or the unit that it has become."""
        assert self._fsdp.model is not None
        return self._fsdp.model

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
        paths, filled = {id(part): clean_name(path) for path, part in self.module.named_modules()}, set[str]()
        for unit in units_of(self._model) if wanted else []:  # the outermost first, or FSDP takes another for it
            with FullyShardedDataParallel.summon_full_params(unit, recurse=False, writeback=True):
                own = {
                    join(paths[id(part)], key): parameter
                    for part in own_modules(unit)
                    for key, parameter in part._parameters.items()
                    if parameter is not None
                }
                for name in own.keys() & wanted:
                    own[name].copy_(values[name])
                    filled.add(name)
        self.fill({name: tensor for name, tensor in tensors.items() if name not in filled}, values)

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
        return units_of(self._model)

    @contextmanager
    def _unit_gathered(self, layer: LoRALayer) -> Iterator[None]:
        """Have the whole of one layer's weight and factors for a while; what is written to them stays."""
        units = [
            unit
            for unit in self._units()
            if any(part is layer for part in own_modules(unit)) or any(unit is part for part in layer.modules())
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
