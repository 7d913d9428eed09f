"""FSDP: adapters get units of their own, and each process holds flat slices of their parameters."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any, cast

import torch
import torch.distributed as dist
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule
from lightning.pytorch.strategies import FSDPStrategy, Strategy
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.fsdp.wrap import _ConfigAutoWrap, _Policy, wrap
from torch.optim import Optimizer
from typing_extensions import override

from lightning_lora.adapted_model import AdaptedModel
from lightning_lora.layers import Adapter, LoRALayer
from lightning_lora.names import clean_name, join, listed
from lightning_lora.state import base_samples, tensors_of_others
from lightning_lora.trainer.strategies.base import Key, Layout, module_of, refuse_reading_across

Group = dist.ProcessGroup | None


class FSDPLayout(Layout):
    """FSDP flattens the parameters of each unit and gives every process a slice.

    Adapters get units of their own: in one unit with frozen weights, FSDP would allocate gradients for these and gather
    them at every save.
    """

    divides_weights = True

    def __init__(self, strategy: Strategy) -> None:
        super().__init__(strategy)
        self._shapes: dict[str, torch.Size] = {}  # of the whole parameters, which FSDP hides
        self._slices: dict[str, range] | None = None  # places of this process's elements in the whole
        self._shapes_of: Callable[[], LightningModule | None] = lambda: None
        kwargs = self._fsdp.kwargs
        if not kwargs.get("use_orig_params", True):
            raise MisconfigurationException(
                "LoRACallback needs FSDPStrategy(use_orig_params=True), Lightning's default: without it the names of "
                "the adapters' parameters are lost, and optimizers and checkpoints cannot tell them from frozen ones."
            )
        kwargs["auto_wrap_policy"] = _adapters_apart(kwargs.get("auto_wrap_policy"))
        context = functools.partial(_wrapping, self._fsdp.model_sharded_context, self._call_before_wrapping)
        self._fsdp.model_sharded_context = context  # type: ignore[method-assign]

    @override
    def check_fit(self, *, with_diagnostics: bool, with_schedule: bool) -> None:
        if with_diagnostics:
            raise MisconfigurationException(
                "diagnostics_every_n_steps: under FSDPStrategy a process holds flat slices of the factors and weights, "
                "which do not give ranks and norms. Leave it out and look at checkpoints with "
                "lightning_lora.analysis.analyze, or use DDP or ModelParallelStrategy (FSDP2)."
            )
        if with_schedule:
            raise MisconfigurationException(
                "rank_schedule: under FSDPStrategy a process holds flat slices of the factors, in which their "
                "components cannot be told apart. Use ModelParallelStrategy (FSDP2) or DDP, or train at a fixed rank "
                "and call truncate_adapter."
            )

    @override
    def attached(self, module: LightningModule) -> None:
        refuse_reading_across(module, "FSDPStrategy", "ModelParallelStrategy (FSDP2)")
        if _units_of(module):
            self._complete_wrapping(module)
            return
        self._fsdp.kwargs["auto_wrap_policy"] = _adapters_apart(self._fsdp.kwargs.get("auto_wrap_policy"))
        model = AdaptedModel(module)
        self._shapes_of = weakref.ref(module)
        self._slices, self.base = None, base_samples(model)  # slices do not say which part they are
        self._shapes = {name: tensor.shape for name, tensor in (model.tensors | tensors_of_others(module)).items()}

    def _complete_wrapping(self, module: LightningModule) -> None:
        """Make units of the adapters in layers that ``configure_model`` did not wrap; such layers stay whole."""
        if self._shapes_of() is not module:
            raise MisconfigurationException(
                f"{type(module).__name__} was wrapped by FSDP(...) itself, or by another Trainer's strategy. In "
                "configure_model call lightning_lora.attach(self) and then wrap(...) of torch.distributed.fsdp.wrap, "
                "or leave wrapping to FSDPStrategy(auto_wrap_policy=...); and use a fresh module."
            )
        if late := [name for name in AdaptedModel(module).tensors if name not in self._shapes]:
            raise MisconfigurationException(
                f"Added to {type(module).__name__} after it had wrapped parts of itself, too late for adapters: "
                f"{listed(late)}. In configure_model, build all layers, call lightning_lora.attach(self), then wrap."
            )
        _wrap_adapters(module, wrap)
        if _is_ours_alone(self._fsdp.kwargs.get("auto_wrap_policy")):
            del self._fsdp.kwargs["auto_wrap_policy"]  # Lightning warns that it ignores it

    @override
    def configured(self, module: LightningModule, optimizers: Sequence[Optimizer]) -> None:
        if names := _mixed_adapters(self._model):
            raise MisconfigurationException(
                f"FSDP holds the adapters of {listed(names)} together with frozen weights, so FSDP would allocate "
                "gradients for them. In configure_model use wrap(...) of torch.distributed.fsdp.wrap instead of "
                "FSDP(...): it gives adapters units of their own."
            )
        if names := _trained_outside(self._model):
            raise MisconfigurationException(
                f"{listed(names)} would train without FSDP, differently in each process: configure_model wraps only "
                "other modules, and then FSDPStrategy wraps nothing more. Wrap them too, or wrap the whole model last."
            )

    @override
    def gather(self, values: Mapping[Key, Any], name_of: Callable[[Key], str]) -> dict[Key, Any]:
        """Join the slices of the processes: consecutive ones, in the order of the ranks.

        A process may have nothing of a parameter; then its optimizer has no state for it, and takes others' numbers.
        """
        held = self._held_slices()
        own = {key: value.detach() if isinstance(value, Tensor) else value for key, value in values.items()}
        slices = {key: value.flatten() for key, value in own.items() if _is_slice(value, held.get(name_of(key)))}
        numbers = {key: value for key, value in own.items() if not (isinstance(value, Tensor) and value.ndim)}
        found = {key: value for each in _all_gather_object(numbers, self._group) for key, value in each.items()}
        found |= {key: value for key, value in own.items() if key not in slices}
        for key, parts in _slices_of_all(slices, self.strategy.root_device, self._group).items():
            shape = self._shapes[name_of(key)]
            # With NO_SHARD each process has the whole.
            found[key] = (parts[0] if len(parts[0]) == shape.numel() else torch.cat(parts)).view(shape)
        return found

    @override
    def part(self, value: Tensor, name: str, like: Tensor) -> Tensor:
        held = self._held_slices().get(name)
        if held is None:
            return value.to(like.device)
        return value.flatten()[held.start : held.stop].view(like.shape).to(like.device)

    @override
    @torch.no_grad()
    def fill(self, tensors: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> None:
        """Fill trained tensors slice by slice, and frozen ones with one unit at a time in memory."""
        held = self._held_slices()
        frozen = {n for n, tensor in tensors.items() if isinstance(tensor, nn.Parameter) and n in values} - held.keys()
        module, filled = module_of(self.strategy), set[str]()
        paths = {id(part): clean_name(path) for path, part in module.named_modules()} if frozen else {}
        for unit in _units_of(self._model) if frozen else []:  # the outermost first, or FSDP takes another for it
            with FullyShardedDataParallel.summon_full_params(unit, recurse=False, writeback=True):
                for part in _own_modules(unit):
                    for key, parameter in part._parameters.items():
                        if parameter is not None and (name := join(paths[id(part)], key)) in frozen:
                            parameter.copy_(values[name])
                            filled.add(name)
        super().fill({name: tensor for name, tensor in tensors.items() if name not in filled}, values)

    @override
    def shape(self, name: str, parameter: Tensor) -> torch.Size:
        return self._shapes.get(name, parameter.shape)

    @override
    @contextmanager
    def gathered_layer(self, layer: LoRALayer) -> Iterator[None]:
        units = [
            unit
            for unit in _units_of(self._model)
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

    def _held_slices(self) -> dict[str, range]:
        """Return which elements of each trained parameter this process holds; the first call needs every process."""
        if self._slices is None:
            module = module_of(self.strategy)
            trained = AdaptedModel(module).trained | tensors_of_others(module)
            lengths = {name: tensor.numel() for name, tensor in trained.items() if isinstance(tensor, nn.Parameter)}
            before = _all_gather_object(lengths, self._group)[: dist.get_rank(self._group)]
            self._slices = {}
            for name, length in lengths.items():
                is_whole = length == self._shapes[name].numel()
                start = 0 if is_whole else sum(each[name] for each in before)
                self._slices[name] = range(start, start + length)
        return self._slices

    def _call_before_wrapping(self) -> None:
        if self.before_wrapping is not None:
            self.before_wrapping()

    @property
    def _fsdp(self) -> FSDPStrategy:
        return cast(FSDPStrategy, self.strategy)

    @property
    def _model(self) -> nn.Module:
        """The module or FSDP unit that the strategy runs."""
        assert self._fsdp.model is not None
        return self._fsdp.model

    @property
    def _group(self) -> Group:
        """The process group that shards a unit's parameters."""
        units = _units_of(self._model)
        return units[0].process_group if units else None


# --- units


class _AdaptersApart(_Policy):
    """The user's wrapping policy, if any, plus one unit per adapter."""

    def __init__(self, inner: _Policy | None) -> None:
        self.inner = inner

    @override
    def _run_policy(
        self, root_module: nn.Module, ignored_modules: set[nn.Module], root_kwargs: dict[str, Any]
    ) -> dict[nn.Module, dict[str, Any]]:
        chosen = {} if self.inner is None else self.inner._run_policy(root_module, ignored_modules, root_kwargs)
        adapters = [part for part in root_module.modules() if isinstance(part, Adapter) and part not in ignored_modules]
        return chosen | {part: root_kwargs for part in adapters if part is not root_module}


class _AdaptersApartFunction:
    """The same for a policy that is a function."""

    def __init__(self, policy: Callable[..., bool]) -> None:
        self.policy = policy

    def __call__(self, module: nn.Module, recurse: bool, nonwrapped_numel: int) -> bool:
        return recurse or isinstance(module, Adapter) or bool(self.policy(module, recurse, nonwrapped_numel))


def _adapters_apart(policy: Any) -> Any:
    """Return a wrapping policy that gives adapters units of their own and leaves the rest to the user's."""
    if isinstance(policy, (_AdaptersApart, _AdaptersApartFunction)):
        return policy
    return _AdaptersApart(policy) if policy is None or isinstance(policy, _Policy) else _AdaptersApartFunction(policy)


def _is_ours_alone(policy: Any) -> bool:
    """Return whether a policy makes units of adapters only, because the user gave none."""
    return isinstance(policy, _AdaptersApart) and policy.inner is None


def _units_of(module: nn.Module) -> list[FullyShardedDataParallel]:
    """Return FSDP's units in a module, itself included."""
    return FullyShardedDataParallel.fsdp_modules(module)


def _own_modules(unit: nn.Module) -> Iterator[nn.Module]:
    """Yield the modules whose parameters are in this unit, not in one below it."""
    for part in unit.children():
        if not isinstance(part, FullyShardedDataParallel):
            yield part
            yield from _own_modules(part)


@contextmanager
def _wrapping(context: Callable[[], AbstractContextManager[Any]], before: Callable[[], None]) -> Iterator[None]:
    """Enter a strategy's context for ``wrap``, and let each call make units of the adapters below it first.

    Args:
        context: The strategy's own.
        before: Called when the first module is about to be wrapped.
    """
    to_do = [before]

    def wrapped(module: nn.Module, **options: Any) -> nn.Module:
        while to_do:
            to_do.pop()()
        options["auto_wrap_policy"] = _adapters_apart(options.get("auto_wrap_policy"))
        if _is_ours_alone(options["auto_wrap_policy"]):
            # By hand: FSDP runs no policy on a module with units in it, and wrapping goes from inside to outside.
            options["auto_wrap_policy"] = None
            _wrap_adapters(module, functools.partial(wrapper, **options))
        return wrapper(module, **options)

    with context():
        wrapper = cast(Callable[..., nn.Module], _ConfigAutoWrap.wrapper_cls)
        _ConfigAutoWrap.wrapper_cls = wrapped
        yield


def _wrap_adapters(module: nn.Module, wrap: Callable[[nn.Module], nn.Module]) -> None:
    """Make units of the adapters in a module that are in no unit yet."""
    inside = {id(part) for unit in _units_of(module) for part in _own_modules(unit)}
    for parent in list(module.modules()):
        for name, child in parent._modules.items():
            if isinstance(child, Adapter) and id(child) not in inside:
                parent._modules[name] = wrap(child)


def _mixed_adapters(module: nn.Module) -> list[str]:
    """Return the names of the adapters that are in one unit with other parameters."""
    units = _units_of(module)
    mixed = {id(part) for unit in units for part in _own_modules(unit)} - {id(unit.module) for unit in units}
    return [name for name, adapter in AdaptedModel(module).adapters.items() if id(adapter) in mixed]


def _trained_outside(module: nn.Module) -> list[str]:
    """Return the names of modules with trainable parameters outside of all units: nothing averages their gradients."""
    handles = [handle for unit in _units_of(module) if (handle := cast(Any, unit)._handle) is not None]
    held = {id(parameter) for handle in handles for parameter in handle.flat_param._params}
    outside = [name for name, p in module.named_parameters() if p.requires_grad and id(p) not in held]
    return list(dict.fromkeys(clean_name(name).rpartition(".")[0] for name in outside))


# --- slices


def _is_slice(value: Any, held: range | None) -> bool:
    """Return whether a value is laid out as this process's elements of a parameter are."""
    return held is not None and isinstance(value, Tensor) and value.ndim > 0 and value.numel() == len(held)


def _all_gather_object(value: Any, group: Group) -> list[Any]:
    """Return the values of all processes, in the order of the ranks; every process must call this."""
    everywhere: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(everywhere, value, group)
    return everywhere


def _slices_of_all(slices: Mapping[Key, Tensor], device: torch.device, group: Group) -> dict[Key, list[Tensor]]:
    """Return the slices that every process holds, in the order of the ranks; every process must call this.

    Args:
        slices: Vectors; a process may have nothing of one that others have.
        device: The device to communicate over.
        group: The processes.
    """
    told = _all_gather_object({key: (len(vector), vector.dtype) for key, vector in slices.items()}, group)
    dtypes = {key: dtype for each in told for key, (_, dtype) in each.items()}
    found: dict[Key, list[Tensor]] = {}
    for dtype in sorted(set(dtypes.values()), key=str):
        keys = [key for key in dtypes if dtypes[key] == dtype]
        lengths = [[each[key][0] if key in each else 0 for key in keys] for each in told]
        mine = [torch.empty(0, dtype=dtype, device=device), *(slices[key] for key in keys if key in slices)]
        vectors = _exchanged(torch.cat(mine), [sum(each) for each in lengths], group)
        split = [torch.split(vector, sizes) for vector, sizes in zip(vectors, lengths, strict=True)]
        found |= {key: [parts[index] for parts in split] for index, key in enumerate(keys)}
    return found


def _exchanged(vector: Tensor, lengths: list[int], group: Group) -> list[Tensor]:
    """Return the vectors of all processes, whose lengths may differ."""
    padded = torch.cat([vector, vector.new_zeros(max(lengths) - len(vector))])
    everywhere = [torch.empty_like(padded) for _ in lengths]
    dist.all_gather(everywhere, padded, group)
    return [each[:length] for each, length in zip(everywhere, lengths, strict=True)]
