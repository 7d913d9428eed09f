"""One view of an adapted model: its layers, their adapters, everything trained, and the frozen base."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_lora.attachment import Attachment, get_attachment, merge_count
from lightning_lora.layers import Adapter, AdapterGroup, FrozenNorm, LoRALayer, LowRankAdapter
from lightning_lora.names import OTHERS, clean_name, join, listed, module_names, walk
from lightning_lora.ops.turns import turn
from lightning_lora.sharding import unwrapped

F = TypeVar("F", bound=Callable[..., Any])

SEVERAL = "_lora_several"  # the record of several adapters (``named_adapters.py``), on one module


class Root(NamedTuple):
    """A module that was passed to ``attach``, with its name in the model and its record."""

    name: str
    module: nn.Module
    attachment: Attachment

    def trained_modules(self) -> Iterator[nn.Module]:
        """Yield the modules that train in full, with everything below them."""
        if saved := self.attachment.report.saved:
            modules = module_names(self.module)
            for name in saved:
                yield from modules[name][0].modules()

    @torch.inference_mode(False)  # they may train later
    def originals(self, values: Mapping[str, Tensor | None]) -> dict[int, Tensor | None]:
        """Return copies of values, to have them in place of what the module has under their names.

        Returns:
            Identity of a parameter or buffer -> what to have in its place; None for a buffer that had no value.
        """
        tensors, found = AdaptedModel(self.module).tensors if values else {}, dict[int, Tensor | None]()
        for name, value in values.items():
            if (own := tensors.get(name)) is not None:
                copy = None if value is None else value.detach().to(own, copy=True)
                if copy is not None and isinstance(own, nn.Parameter):
                    copy = nn.Parameter(copy, False)
                found[id(own)] = copy
        return found

    @torch.no_grad()
    def put(self, values: Mapping[str, Tensor | None]) -> None:
        """Copy values into the parameters and buffers of these names; buffers may have grown, or come since."""
        tensors, others = AdaptedModel(self.module).tensors if values else {}, dict[str, Tensor | None]()
        for name, value in values.items():
            if value is not None and name in tensors and tensors[name].shape == value.shape:
                tensors[name].copy_(value)
            elif value is not None or name in tensors:
                others[name] = value
        replace_buffers(self.module, others)


class AdaptedModel:
    """A view of a model; it is read in one walk, at the first access.

    All tensors are the model's own. The view is valid until layers are adapted, restored or replaced; then make a new
    one.

    Args:
        module: Any module, also wrapped by Fabric, DDP or ``torch.compile``; one without adapters has empty ``layers``.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = unwrapped(module)

    @functools.cached_property
    def parts(self) -> list[tuple[str, nn.Module]]:
        """Every submodule once, with its first name, which wrappers do not change."""
        return walk(self.module)

    @functools.cached_property
    def roots(self) -> list[Root]:
        """The modules that were passed to ``attach``: usually one, the model itself."""
        found = ((name, part, get_attachment(part)) for name, part in self.parts)
        return [Root(name, part, attachment) for name, part, attachment in found if attachment is not None]

    @functools.cached_property
    def layers(self) -> dict[str, LoRALayer]:
        """The adapted layers: found by type, never by spelling."""
        return {name: part for name, part in self.parts if isinstance(part, LoRALayer)}

    @functools.cached_property
    def adapters(self) -> dict[str, Adapter]:
        """Every adapter, by its layer's name, with the parameter's or slice's name where the layer has several."""
        return {
            join(name, key) if isinstance(layer.lora, AdapterGroup) else name: adapter
            for name, layer in self.layers.items()
            for key, adapter in layer.adapters().items()
        }

    @functools.cached_property
    def trained(self) -> dict[str, Tensor]:
        """Everything that training changes and a checkpoint holds.

        These are the factors, the parameters and buffers of ``modules_to_save``, and the biases and running statistics
        that the config lets move. The names follow from the config alone, never from what happened in training.
        """
        whole = {id(part) for root in self.roots for part in root.trained_modules()}
        whole |= {id(part) for layer in self.layers.values() for part in layer.lora.modules()}
        moving = {join(root.name, name) for root in self.roots for name in root.attachment.base_values}
        found: dict[str, Tensor] = {}
        for path, part in self.parts:
            is_whole = id(part) in whole
            if is_whole or moving:
                for key, tensor in _persistent_tensors(part):
                    if is_whole or join(path, key) in moving:
                        found[join(path, key)] = tensor
        return found

    @functools.cached_property
    def in_full(self) -> dict[str, Tensor]:
        """What of ``trained`` belongs to the model's own modules: all but the adapters' factors."""
        adapters = [part for layer in self.layers.values() for part in layer.lora.modules()]
        own = {id(tensor) for part in adapters for tensor in (*part._parameters.values(), *part._buffers.values())}
        return {name: tensor for name, tensor in self.trained.items() if id(tensor) not in own}

    @functools.cached_property
    def base(self) -> dict[str, Tensor]:
        """The parameters that training does not change, by each of their names."""
        return base_parameters(self.module, self.trained)

    @functools.cached_property
    def tensors(self) -> dict[str, Tensor]:
        """All parameters and buffers, by each of their names."""
        return {
            join(path, key): tensor
            for path, part in walk(self.module, every_name=True)
            for key, tensor in (*part._parameters.items(), *part._buffers.items())
            if tensor is not None
        }

    def changed(self) -> str | None:
        """Return which adapters are no longer in the model as they were attached, and what to do; None if all are."""
        expected = [join(root.name, layer.name) for root in self.roots for layer in root.attachment.report.layers]
        lost = [name for name in expected if name not in self.adapters]
        resized = [
            name
            for name, layer in self.layers.items()
            if not all(a.fits(layer) for a in layer.adapters().values() if isinstance(a, LowRankAdapter))
        ]
        for several in (vars(part)[SEVERAL] for _, part in self.parts if SEVERAL in vars(part)):
            if len(several.adapters) > 1 and (gone := self.gone(several)):
                return gone
        found = f"Replaced after LoRA was attached, so their adapters are gone: {listed(lost)}. " if lost else ""
        if resized:
            found += f"Resized after LoRA was attached, so their adapters do not fit: {listed(resized)}. "
        when = "in __init__, setup or configure_model; without a Trainer, before attach"
        return f"{found}Replace and resize layers earlier: {when}." if found else None

    def gone(self, several: Any) -> str | None:
        """Return what of several adapters is in modules that the model no longer has, and what to do; None if nothing.

        Args:
            several: The record of the adapters.
        """
        there = {part for _, part in self.parts}
        gone = {name: [part for part in each.kept if part not in there] for name, each in several.adapters.items()}
        lost = [f"{type(part).__name__} of {name!r}" for name, parts in gone.items() for part in parts]
        if not lost:
            return None
        return (
            f"Replaced since adapters were added, so what these have learned there would be lost: {listed(lost)}. Keep "
            "the modules: another adapter has values of its own in them, which you can set after set_adapter; or give "
            "each task a head of its own. Otherwise save the adapters, call detach(module), and replace then."
        )

    def check_unchanged(self) -> None:
        """Raise if adapted layers have been replaced or resized since the adapters were attached.

        Raises:
            RuntimeError: Its message names them.
        """
        if changed := self.changed():
            raise RuntimeError(changed)

    def check_started(self) -> None:
        """Raise if adapters still wait for their start, so that there is nothing to train, merge or save.

        Raises:
            RuntimeError: Its message names them.
        """
        if waiting := [name for name, adapter in self.adapters.items() if adapter.is_waiting]:
            start = self.adapters[waiting[0]].spec.init
            raise RuntimeError(
                f"The adapters of {listed(waiting)} wait for their start, init={start!r}: call "
                "calibrate(module, batches), or load an adapter."
            )

    def have_values(self) -> None:
        """Record that all adapters have got values, so that none waits for its start."""
        for adapter in self.adapters.values():
            adapter.have_values()

    def check_not_part(self) -> None:
        """Raise if adapters were attached to a module above this one, which has their record.

        Raises:
            ValueError: Its message says what to call instead.
        """
        for part in self._of_parents():
            raise ValueError(
                f"This {type(self.module).__name__} holds a {type(part).__name__} that was attached to a parent of "
                "it; call this on the module that was passed to attach."
            )

    def _of_parents(self) -> Iterator[nn.Module]:
        """Yield the parts that were changed by an attach to a module above this one."""
        covered = {id(part) for root in self.roots for part in root.module.modules()}
        for _, part in self.parts:
            if isinstance(part, (LoRALayer, FrozenNorm)) and id(part) not in covered:
                yield part

    def check_knows_all(self) -> None:
        """Raise if a module above this one trains something in full here, which that one's record alone can tell.

        Raises:
            ValueError: Its message names what trains.
        """
        trains = [name for name, parameter in self.base.items() if parameter.requires_grad and f"{OTHERS}." not in name]
        if trains and next(self._of_parents(), None) is not None:
            raise ValueError(
                f"{listed(trains)} of this {type(self.module).__name__} train in full, beside adapters that were "
                "attached to a parent of it. Call this on the module that was passed to attach, and take the entries "
                "under the part's name."
            )

    def check_adapted(self, caller: str) -> None:
        """Raise if there is nothing for a function to act on.

        Raises:
            ValueError: The model has no adapters; the message says whether they were merged.
        """
        if not self.layers and not self.roots:
            now = "call attach or load_adapter first."
            if any(OTHERS in part._modules for _, part in self.parts):
                now = "it is the bare base here, inside using(module, None) or routed(module, ...)."
            if self.merges:
                now = (
                    f"they were merged into the weights of {listed(list(self.merges))}, which cannot be undone. Build "
                    "the base anew, or keep the adapters: merged(module) restores the exact weights."
                )
            raise ValueError(f"{caller}: {type(self.module).__name__} has no adapters; {now}")

    @functools.cached_property
    def merges(self) -> dict[str, int]:
        """The number of adapters merged for good into each layer."""
        return {name: count for name, part in self.parts if (count := merge_count(part))}


class HeldAdapters:
    """What a training began with, to notice if adapters are merged or detached, or the base is trained, while it runs.

    Args:
        module: The adapted module.
        optimizers: Those of the training.
    """

    def __init__(self, module: nn.Module, optimizers: Sequence[Optimizer]) -> None:
        model = AdaptedModel(module)
        self._module, self._roots, self._sizes = module, model.roots, _group_sizes(optimizers)
        self._factors = [p for adapter in model.adapters.values() for p in adapter.parameters()]

    def check(self, optimizers: Sequence[Optimizer]) -> None:
        """Raise if that has changed; looks at records and sizes alone while these are the same, so it costs nothing.

        Raises:
            RuntimeError: The module no longer holds what the optimizers train, or they train more than will be saved.
        """
        if _group_sizes(optimizers) != self._sizes:
            self._check_optimizers(optimizers)
        if all(get_attachment(root.module) is root.attachment for root in self._roots):
            return
        held = {id(parameter) for parameter in self._module.parameters()}  # also those of adapters that wait
        if not all(id(factor) in held for factor in self._factors):
            raise RuntimeError(
                f"The adapters of {type(self._module).__name__} were merged or detached while it trains, so its "
                "optimizers no longer train anything of it. Merge at the end, with merge_on_teardown=True or in "
                "on_train_end. To merge and go on with new adapters, start another fit."
            )
        self._roots = AdaptedModel(self._module).roots

    def _check_optimizers(self, optimizers: Sequence[Optimizer]) -> None:
        held = {id(p) for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]}
        base = base_parameters(self._module, AdaptedModel(self._module).trained).items()
        added = {clean_name(name): p for name, p in base if id(p) in held and f"{OTHERS}." not in name}
        if trained := [name for name, parameter in added.items() if parameter.requires_grad]:
            raise RuntimeError(
                f"{listed(trained)} were unfrozen and given to an optimizer during training, but belong to no adapter, "
                "so no checkpoint would hold what they learn. Name their modules in modules_to_save, which trains and "
                "saves them from the first step on."
            )
        if not added:  # else they may be unfrozen later
            self._sizes = _group_sizes(optimizers)


def _group_sizes(optimizers: Sequence[Optimizer]) -> list[int]:
    return [len(group["params"]) for optimizer in optimizers for group in optimizer.param_groups]


def base_parameters(module: nn.Module, trained: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the parameters of a module that do not train, by each of their names.

    Args:
        module: The module.
        trained: Everything that trains, in the whole model where the module is a part of one.
    """
    apart = {id(tensor) for tensor in trained.values()}
    found: dict[str, Tensor] = {}
    for path, part in walk(module, every_name=True):
        own = part._parameters
        if folded := vars(part).get("lora_original"):  # inside of `merged` the weights hold the adapters
            own = own | folded
        for key, tensor in own.items():
            if tensor is not None and id(tensor) not in apart:
                found[join(path, key)] = tensor
    return found


def replace_buffers(module: nn.Module, values: Mapping[str, Tensor | None]) -> None:
    """Put values of other shapes in place of the buffers of these names; what is there, or comes, may be None."""
    for path, part in walk(module, every_name=True) if values else ():
        for key in part._buffers.keys() & {name.rpartition(".")[2] for name in values}:
            if (name := join(path, key)) in values:
                buffer, value = part._buffers[key], values[name]
                copy = None if value is None else value.detach().clone()
                part._buffers[key] = copy if copy is None or buffer is None else copy.to(buffer)


def _persistent_tensors(part: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield the parameters and buffers of one module that its state holds, each once."""
    seen: set[int] = set()
    buffers = ((key, buffer) for key, buffer in part._buffers.items() if key not in part._non_persistent_buffers_set)
    for key, tensor in (*part._parameters.items(), *buffers):
        if tensor is not None and id(tensor) not in seen:
            seen.add(id(tensor))
            yield key, tensor


def names_in_state(module: nn.Module) -> set[str]:
    """Return the names under which a module's parts save tensors, without what wrappers add to them.

    Layers that save more than parameters and buffers, such as quantized ones, are asked.
    """
    found = set[str]()
    for path, part in module.named_modules(remove_duplicate=False):
        state: dict[str, Any] = {key: tensor for key, tensor in part._parameters.items() if tensor is not None}
        state |= {key: each for key, each in part._buffers.items() if each is not None}
        names = state.keys() - part._non_persistent_buffers_set
        if type(part)._save_to_state_dict is not nn.Module._save_to_state_dict:
            own = dict[str, Any]()
            part._save_to_state_dict(own, "", False)
            names |= own.keys()
        found |= {clean_name(join(path, name)) for name in names}
    return found


def home_of(module: nn.Module) -> nn.Module:
    """Return the module that has the record, or would have it: the one with the adapters if they are in one part."""
    module = unwrapped(module)
    if SEVERAL in vars(module):
        return module
    parts = [part for _, part in walk(module)]
    found = [part for part in parts if SEVERAL in vars(part)] or [part for part in parts if get_attachment(part)]
    return found[0] if len(found) == 1 else module


def in_turn(function: F) -> F:
    """Have a function that reads or changes the adapters of its first argument wait for the blocks of other threads."""

    @functools.wraps(function)
    def run(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        with taking_turns(module):
            return function(module, *args, **kwargs)

    return cast(F, run)


def taking_turns(module: nn.Module) -> AbstractContextManager[None]:
    """Have other threads wait that would change this model's adapters, or how it computes with them."""
    return turn(module, ("lora", OTHERS))
