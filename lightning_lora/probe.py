"""The probe: prove on one batch that every adapter changes the output; and see why an adapter gets no gradient."""

from __future__ import annotations

import functools
import inspect
import linecache
import os
import random
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import fields, is_dataclass
from types import FrameType
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from torch.utils.checkpoint import CheckpointFunction

from lightning_lora.adapted_model import AdaptedModel
from lightning_lora.layers import Adapter
from lightning_lora.layers.readers import ENTRANCES, only_asks
from lightning_lora.modes import merged
from lightning_lora.names import join, listed
from lightning_lora.sharding import is_divided, is_sharded

_MODES = ("training", "asked_mode", "is_waiting")  # of any module, a frozen norm, an adapter
_LIBRARIES = ("lightning_lora.", "lightning.", "pytorch_lightning.", "torch.", "deepspeed.")
_OF_MERGED = 0.05  # rounded weights change what deep models compute; a missing update changes much more
_EFFECT = 0.5  # of an adapter that is still at its start: as large as what its layer computes


def dead_adapters(module: nn.Module, batch: object) -> dict[str, str]:
    """Return the adapters without effect on the module's output: name -> in which mode.

    Every adapter is given a random effect. Where the gradient of the output by an adapter vanishes, and where the
    output in evaluation is another one without gradients, as fused paths may pass an adapter by, the adapter is changed
    once more, and has to change the output. Parameters, buffers, gradients, modes and the random state are left as they
    were.

    Args:
        module: An adapted module.
        batch: A tensor, the entries of a tuple or list that ``forward`` requires, or those of a dict that it accepts;
            the dict itself if ``forward`` requires one argument, which is no entry of it.

    Raises:
        DeadAdapterError: All have an effect, but the module computes something else once they are merged.
    """
    args, kwargs = arguments_for(module, batch)
    with left_as_it_was(module), _zeros_filled(module), RandomState() as random_state:
        AdaptedModel(module).have_values()  # those that wait for a start may run
        return _Probe(module, lambda: random_state.repeated(lambda: _outputs(module, args, kwargs))).dead()


class _Probe:
    def __init__(self, module: nn.Module, run: Callable[[], list[Tensor]]) -> None:
        self.module, self.run, self.adapters = module, run, AdaptedModel(module).adapters

    def dead(self) -> dict[str, str]:
        found: dict[str, list[str]] = {}
        for adapter in self.adapters.values():
            _give_effect(adapter)
        for mode, where in ((True, "in training"), (False, "in evaluation")):
            self.module.train(mode)
            with torch.enable_grad():
                outputs = self.run()
                suspects = self._without_gradient(outputs)
                for name in self._without_effect(suspects, outputs):
                    found.setdefault(name, []).append(where)
        with torch.no_grad():
            without = self.run()
            suspects = [] if _close(outputs, without) else [name for name in self.adapters if name not in found]
            for name in self._without_effect(suspects, without):
                found[name] = ["in evaluation without gradients"]
            if not found:
                self._check_merged(without)
        return {name: " and ".join(where) for name, where in found.items()}

    def _check_merged(self, outputs: list[Tensor]) -> None:
        """Refuse a model that computes something else once the updates are in the weights, where they can be."""
        with ExitStack() as stack:
            try:
                stack.enter_context(merged(self.module))
            except (RuntimeError, ValueError):  # quantized, computed by a parametrization, sharded ...
                return
            if not _close(outputs, self.run(), _OF_MERGED):
                raise DeadAdapterError(
                    f"{type(self.module).__name__} computes something else with these adapters than after a merge, so "
                    "some of its code computes with the weight of an adapted layer instead of calling the layer, as "
                    "F.linear(x, layer.weight) does. Name this weight in target_parameters, such as "
                    "['decoder.proj.weight'], and leave its layer out of target_modules."
                )

    def _without_gradient(self, outputs: list[Tensor]) -> list[str]:
        differentiable = [output for output in outputs if output.requires_grad]
        if not differentiable:
            return list(self.adapters)
        generator = torch.Generator().manual_seed(0)
        directions = [torch.randn(output.shape, generator=generator).to(output) for output in differentiable]
        parameters = [parameter for adapter in self.adapters.values() for parameter in adapter.parameters()]
        gradients = iter(torch.autograd.grad(differentiable, parameters, directions, allow_unused=True))
        reached = {
            name
            for name, adapter in self.adapters.items()
            for gradient in [next(gradients) for _ in adapter.parameters()]
            if _is_nonzero(gradient)
        }
        return [name for name in self.adapters if name not in reached]

    def _without_effect(self, suspects: list[str], outputs: list[Tensor]) -> Iterator[str]:
        for name in suspects:
            parameters = list(self.adapters[name].parameters())
            kept = [parameter.detach().clone() for parameter in parameters]
            _give_effect(self.adapters[name])
            changed = self.run()
            put_back(parameters, kept)
            if all(torch.equal(one, other) for one, other in zip(changed, outputs, strict=True)):
                yield name


class DeadAdapterError(ValueError):
    """Adapters do not change the output of their model."""


def refuse_dead_adapters(module: nn.Module, batch: object) -> None:
    """Raise if an adapter has no effect on the module's output.

    Raises:
        DeadAdapterError: Its message names these adapters, and the modes in which they have no effect.
    """
    if dead := dead_adapters(module, batch):
        lines = "\n".join(f"  - {name}: {where}" for name, where in dead.items())
        raise DeadAdapterError(
            f"These adapters do not change the output of {type(module).__name__} for the probe:\n{lines}\n"
            "Leave the layers out with exclude_modules, or make sure they are called." + _advice_on_zeros(module)
        )


def _advice_on_zeros(module: nn.Module) -> str:
    if zeros := [name for name, weight in _zero_weights(module).items() if not weight.requires_grad]:
        return f" Frozen weights of zero let nothing through: {listed(zeros)}. modules_to_save trains them in full."
    return ""


@torch.no_grad()
def _give_effect(adapter: Adapter) -> None:
    for parameter in adapter.parameters():
        noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0))
        size = float(parameter.float().abs().mean()) or _EFFECT / adapter.spec.scaling
        parameter.add_((size * noise).to(parameter))


@contextmanager
def _zeros_filled(module: nn.Module) -> Iterator[None]:
    """Give weights that train in full and start at zero, such as a new head's, values like a later step's."""
    zeros = [weight for weight in _zero_weights(module).values() if weight.requires_grad]
    generator = torch.Generator().manual_seed(0)
    put_back(zeros, [_EFFECT * torch.randn(weight.shape, generator=generator).to(weight) for weight in zeros])
    try:
        yield
    finally:
        put_back(zeros, list(map(torch.zeros_like, zeros)))


def _zero_weights(module: nn.Module) -> dict[str, Tensor]:
    return {name: weight for name, weight in blocking_weights(module) if not weight.any()}


def blocking_weights(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield the weights outside of adapters that would let no gradient through if they were zero."""
    model = AdaptedModel(module)
    own = {id(parameter) for adapter in model.adapters.values() for parameter in adapter.parameters()}
    for path, part in model.parts:
        for key, weight in part._parameters.items():
            if weight is None or id(weight) in own or "bias" in key or is_divided(weight):
                continue
            is_packed = is_traceable_wrapper_subclass(cast(Any, weight)) and not is_sharded(weight)
            if weight.is_floating_point() and not is_packed:
                yield join(path, key), weight


def _is_nonzero(gradient: Tensor | None) -> bool:
    return gradient is not None and bool(gradient.any())


def _close(outputs: list[Tensor], others: list[Tensor], tolerance: float = 1e-5) -> bool:
    """Return whether two passes gave the same up to rounding."""
    if [output.shape for output in outputs] != [other.shape for other in others]:
        return False
    return all(
        bool((output - other).norm() <= max(tolerance, 8 * torch.finfo(output.dtype).eps) * other.norm())
        for output, other in zip(outputs, others, strict=True)
    )


def _outputs(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
    found = list(tensors_in(module(*args, **kwargs)))
    if not found:
        raise TypeError(f"probe: {type(module).__name__} returned no tensor of floating point numbers.")
    return found


# --- why an adapter gets no gradient


class Witness:
    """Sees which adapted layers a model calls, and where else their weights are read, until ``close``.

    Models with compiled parts are left alone, since hooks would be compiled into them.

    Attributes:
        watches: Whether it sees anything.
        calls: Names of called layers -> why the calls had no gradients; empty if one of them had.
        reads: Names of layers whose weight other code computed with, outside of the layer's own calls -> where.
    """

    def __init__(self, module: nn.Module) -> None:
        self.calls, self.reads = dict[str, str](), dict[str, str]()
        self.watches = not any(_is_compiled(part) for part in module.modules())
        self._names: dict[int, str] = {}
        self._running = Counter[str]()  # calls that go on
        self._hooks: list[Any] = []
        self._classes: list[tuple[type, str]] = []
        for name, layer in AdaptedModel(module).layers.items() if self.watches else ():
            self._names[id(layer)] = name
            self._hooks.append(layer.register_forward_pre_hook(functools.partial(self._see_call, name)))
            self._hooks.append(
                layer.register_forward_hook(functools.partial(self._see_end, name), prepend=True, always_call=True)
            )
            for adapter in layer.adapters().values():
                if not hasattr(type(layer), adapter.parameter):  # else the class computes it
                    setattr(type(layer), adapter.parameter, _Watched(adapter.parameter, self._see_read))
                    self._classes.append((type(layer), adapter.parameter))

    def close(self) -> None:
        """Stop watching; safe to repeat."""
        for hook in self._hooks:
            hook.remove()
        for kind, parameter in self._classes:
            delattr(kind, parameter)
        self._hooks, self._classes = [], []

    def _see_call(self, name: str, layer: nn.Module, args: Any) -> None:  # noqa: ARG002 - as hooks are called
        self._running[name] += 1
        if torch.is_grad_enabled():
            self.calls[name] = ""
        elif name not in self.calls:
            self.calls[name] = _why_without_gradients()

    def _see_end(self, name: str, layer: nn.Module, args: Any, output: Any) -> None:  # noqa: ARG002
        self._running[name] -= 1

    def _see_read(self, layer: nn.Module, reader: FrameType) -> None:
        name = self._names.get(id(layer))
        if name is None or self._running[name] or name in self.reads:
            return
        if reader.f_code.co_name == "get_parameter" and reader.f_back is not None:
            reader = reader.f_back
        is_library = str(reader.f_globals.get("__name__", "")).startswith(_LIBRARIES)
        if not is_library and not only_asks(reader.f_code, reader.f_lineno) and _is_in_step(reader):
            self.reads[name] = _place(reader)


class _Watched:
    """Reports every read of a parameter; not a data descriptor, so that FSDP may set a plain attribute of its name."""

    def __init__(self, parameter: str, see: Callable[[nn.Module, FrameType], None]) -> None:
        self.parameter, self.see = parameter, see

    def __get__(self, layer: nn.Module | None, owner: type) -> Any:
        if layer is None:
            return self
        if not torch.compiler.is_compiling():
            self.see(layer, sys._getframe(1))
        return layer.__getattr__(self.parameter)


def _is_compiled(part: nn.Module) -> bool:
    is_lightnings = vars(part).get("_compiler_ctx") is not None
    return is_lightnings or part._compiled_call_impl is not None or "_orig_mod" in part._modules


def _place(frame: FrameType) -> str:
    """Return where a frame is, and its line of source."""
    code, owner = frame.f_code, frame.f_locals.get("self")
    where = code.co_name if owner is None else f"{type(owner).__name__}.{code.co_name}"
    line = linecache.getline(code.co_filename, frame.f_lineno).strip()
    return f"{where} ({os.path.basename(code.co_filename)}:{frame.f_lineno}" + (f": {line})" if line else ")")


def _is_in_step(frame: FrameType | None) -> bool:
    """Return whether a frame is part of a forward pass or a step, and not of a hook that only looks at weights."""
    while frame is not None and frame.f_code.co_name not in ENTRANCES:
        frame = frame.f_back
    return frame is not None


def _why_without_gradients() -> str:
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_code is CheckpointFunction.forward.__code__:
            return "inside reentrant activation checkpointing, none of whose inputs needs a gradient"
        frame = frame.f_back
    return "without gradients (torch.no_grad or inference mode)"


# --- a pass that leaves no trace


def arguments_for(module: nn.Module, batch: object) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the positional and keyword arguments with which ``forward`` takes a batch."""
    parameters = inspect.signature(module.forward).parameters.values()
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    required = [p for p in parameters if p.kind in positional and p.default is p.empty]
    if isinstance(batch, Mapping):
        if len(required) == 1 and required[0].name not in batch:
            return (batch,), {}
        takes_all = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters)
        accepted = {parameter.name for parameter in parameters}
        return (), {key: value for key, value in batch.items() if takes_all or key in accepted}
    if not isinstance(batch, (tuple, list)):
        return (batch,), {}
    if any(parameter.kind is parameter.VAR_POSITIONAL for parameter in parameters):
        return tuple(batch), {}
    return tuple(batch[: max(1, len(required))]), {}


@torch.no_grad()
def put_back(tensors: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    """Copy values into tensors."""
    for tensor, value in zip(tensors, values, strict=True):
        tensor.copy_(value)


def tensors_in(value: Any) -> Iterator[Tensor]:
    """Yield the floating point tensors in a module's output of any structure."""
    if isinstance(value, Tensor):
        if value.is_floating_point():
            yield value
        return
    if isinstance(value, Mapping):
        value = value.values()
    elif is_dataclass(value):
        value = [getattr(value, each.name) for each in fields(value)]
    elif not isinstance(value, (tuple, list)):
        return
    for each in value:
        yield from tensors_in(each)


@contextmanager
def left_as_it_was(module: nn.Module) -> Iterator[None]:
    """Restore a module's adapters, buffers and modes at the end; gradients stay untouched."""
    modes = [(vars(part), {key: vars(part)[key] for key in _MODES if key in vars(part)}) for part in module.modules()]
    trained = [parameter for adapter in AdaptedModel(module).adapters.values() for parameter in adapter.parameters()]
    tensors = [*trained, *module.buffers()]
    kept = [tensor.detach().clone() for tensor in tensors]
    try:
        yield
    finally:
        put_back(tensors, kept)
        for own, mode in modes:
            own.update(mode)


class RandomState:
    """The state of the random generators: the same for every pass, restored at the end."""

    def __enter__(self) -> RandomState:
        self._fork = torch.random.fork_rng(range(torch.cuda.device_count()))
        self._fork.__enter__()
        self._numpy = sys.modules.get("numpy")  # a model that draws from it has imported it
        self._python, self._numpys = random.getstate(), self._numpy.random.get_state() if self._numpy else None
        return self

    def repeated(self, run: Callable[[], list[Tensor]]) -> list[Tensor]:
        """Return the result of a pass that draws the same random numbers as every other."""
        torch.manual_seed(0)
        self._restore()
        return run()

    def __exit__(self, *error: Any) -> None:
        self._fork.__exit__(*error)
        self._restore()

    def _restore(self) -> None:
        random.setstate(self._python)
        if self._numpy:
            self._numpy.random.set_state(self._numpys)
