"""Which modules become FSDP's units: every adapter is one of its own, whoever wraps the rest."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, cast

from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.fsdp.wrap import _ConfigAutoWrap, _Policy
from typing_extensions import override

from lightning_lora.layers import Adapter, all_adapters
from lightning_lora.names import clean_name


class AdaptersApart(_Policy):
    """The user's wrapping policy, if there is one, and a unit of its own for every adapter."""

    def __init__(self, inner: _Policy | None) -> None:
        self.inner = inner

    @override
    def _run_policy(
        self, root_module: nn.Module, ignored_modules: set[nn.Module], root_kwargs: dict[str, Any]
    ) -> dict[nn.Module, dict[str, Any]]:
        chosen = {} if self.inner is None else self.inner._run_policy(root_module, ignored_modules, root_kwargs)
        adapters = [part for part in root_module.modules() if isinstance(part, Adapter) and part not in ignored_modules]
        return chosen | {part: root_kwargs for part in adapters if part is not root_module}


class _AdaptersToo:
    """The same for a policy that is a function."""

    def __init__(self, policy: Callable[..., bool]) -> None:
        self.policy = policy

    def __call__(self, module: nn.Module, recurse: bool, nonwrapped_numel: int) -> bool:
        return recurse or isinstance(module, Adapter) or bool(self.policy(module, recurse, nonwrapped_numel))


def adapters_apart(policy: Any) -> Any:
    """Return a wrapping policy that gives adapters units of their own, and leaves the rest to the user's."""
    if isinstance(policy, (AdaptersApart, _AdaptersToo)):
        return policy
    return AdaptersApart(policy) if policy is None or isinstance(policy, _Policy) else _AdaptersToo(policy)


def is_ours_alone(policy: Any) -> bool:
    """Return whether a policy makes units of adapters only: the user has none."""
    return isinstance(policy, AdaptersApart) and policy.inner is None


def units_of(module: nn.Module) -> list[FullyShardedDataParallel]:
    """Return FSDP's units in a module, itself included."""
    return FullyShardedDataParallel.fsdp_modules(module)


def own_modules(unit: nn.Module) -> Iterator[nn.Module]:
    """Yield the modules whose parameters are in this unit, not in one below it."""
    for part in unit.children():
        if not isinstance(part, FullyShardedDataParallel):
            yield part
            yield from own_modules(part)


@contextmanager
def wrapping(context: Callable[[], AbstractContextManager[Any]], before: Callable[[], None]) -> Iterator[None]:
    """Be in a strategy's context for ``wrap``, in which each call makes units of the adapters below it first.

    Args:
        context: The strategy's own.
        before: Called when the first module is about to be wrapped.
    """
    to_do = [before]

    def wrapped(module: nn.Module, **options: Any) -> nn.Module:
        while to_do:
            to_do.pop()()
        options["auto_wrap_policy"] = adapters_apart(options.get("auto_wrap_policy"))
        if is_ours_alone(options["auto_wrap_policy"]):
            # By hand: FSDP runs no policy over what has units in it, and wrapping goes from inside to outside.
            options["auto_wrap_policy"] = None
            wrap_adapters(module, functools.partial(wrapper, **options))
        return wrapper(module, **options)

    with context():
        wrapper = cast(Callable[..., nn.Module], _ConfigAutoWrap.wrapper_cls)
        _ConfigAutoWrap.wrapper_cls = wrapped
        yield


def wrap_adapters(module: nn.Module, wrap: Callable[[nn.Module], nn.Module]) -> None:
    """Make units of the adapters in a module that are in no unit yet."""
    inside = {id(part) for unit in units_of(module) for part in own_modules(unit)}
    for parent in list(module.modules()):
        for name, child in parent._modules.items():
            if isinstance(child, Adapter) and id(child) not in inside:
                parent._modules[name] = wrap(child)


def mixed_adapters(module: nn.Module) -> list[str]:
    """Return the names of the adapters that are in one unit with other parameters."""
    units = units_of(module)
    mixed = {id(part) for unit in units for part in own_modules(unit)} - {id(unit.module) for unit in units}
    return [name for name, adapter in all_adapters(module).items() if id(adapter) in mixed]


def trained_outside(module: nn.Module) -> list[str]:
    """Return the names of the modules that train parameters of no unit: nobody averages their gradients."""
    handles = [handle for unit in units_of(module) if (handle := cast(Any, unit)._handle) is not None]
    held = {id(parameter) for handle in handles for parameter in handle.flat_param._params}
    outside = [name for name, p in module.named_parameters() if p.requires_grad and id(p) not in held]
    return list(dict.fromkeys(clean_name(name).rpartition(".")[0] for name in outside))
