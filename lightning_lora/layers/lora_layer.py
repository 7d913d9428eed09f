"""The adapted layer, and how a layer becomes one.

The whole mechanism::

    # attach: the layer changes its class, and gets a child with the trainable factors
    layer.__class__ = LoRALinear             # made at run time: class LoRALinear(LoRALayer, nn.Linear)
    layer.lora = LinearAdapter(layer, spec)  # A (rank, in) starts random, B (out, rank) at zero

    # forward: what the layer computes, and the update beside it
    def forward(self, x):
        output = super().forward(x)          # W x + b, frozen
        return output + scaling * (dropout(x) @ A.T @ B.T)

    # merge: the update moves into the weight, and the layer is an ordinary one again
    layer.weight += scaling * B @ A

    # detach: the exact base model is back
    del layer.lora
    layer.__class__ = nn.Linear

The layer stays the same object with the same parameters under the same names. Optimizers, tied weights, hooks, FSDP
and state dicts see nothing new but the child ``lora``. Where the update cannot be added to an output, ``weight.py``
has the weight itself read as ``W + scaling * B @ A``. The arithmetic of the forward pass is in ``ops/linear.py``
(``lora_linear``). Merging adds the update block by block (``LoRALayer.fold``, ``LowRankAdapter._add_to`` in
``low_rank.py``); ``LowRankAdapter.combined`` forms the whole sum.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, ClassVar, Literal, NoReturn, TypeAlias, cast

import torch
from torch import Tensor, nn
from typing_extensions import override

from lightning_lora.layers.adapter import Adapter, InBlocks, base_parameter, blocks
from lightning_lora.ops.eager import is_traced, is_unheld
from lightning_lora.sharding import unwrapped, whole

Mode = Literal["active", "disabled", "merged"]

# --- the class swap


class Swapped(nn.Module):
    """Mixin of every class that ``swap_in`` makes; the module's own class comes next in the method order."""

    class_prefix: ClassVar[str]
    base_class: ClassVar[type[nn.Module]]
    mixin: ClassVar[type[Swapped]]
    computed: ClassVar[tuple[str, ...]] = ()  # attributes that the class computes: `read` gives their values

    @override
    def __reduce_ex__(self, protocol: Any) -> Any:
        # A class made at run time cannot be pickled by name: rebuild it from the two that can.
        _, arguments, *state = cast(tuple[Any, ...], super().__reduce_ex__(max(2, int(protocol))))
        return (_rebuild, (self.mixin, self.base_class, self.computed, *arguments[1:]), *state)

    def read(self, name: str) -> Any:
        """Return the value of a computed attribute."""
        raise NotImplementedError

    def restored(self) -> None:
        """Restore what the base class keeps besides its parameters; called after the class is restored."""


Behavior: TypeAlias = tuple[type[Swapped], tuple[str, ...]]  # a mixin, and the attributes that it computes

_classes: dict[tuple[type, type, tuple[str, ...]], type[Swapped]] = {}


def swap_in(module: nn.Module, mixin: type[Swapped], computed: tuple[str, ...] = ()) -> None:
    """Give ``module`` the mixin's behavior on top of its own class.

    Args:
        module: Changed in place.
        mixin: The behavior.
        computed: Attributes whose values ``mixin.read`` computes from now on.
    """
    base = type(module)
    swapped = _swapped_class(mixin, base, computed)
    # Bypasses nn.Module.__setattr__, which would look for a parameter, a module and a buffer of that name.
    try:
        object.__setattr__(module, "__class__", swapped)
    except TypeError:  # Python compares the memory layout of the first bases, which is another after ABC or Generic
        swapped = _classes[mixin, base, computed] = _laid_out_as(base, swapped)
        object.__setattr__(module, "__class__", swapped)


def swap_out(module: Swapped) -> None:
    """Give ``module`` its own class back."""
    cls = type(module)
    object.__setattr__(module, "__class__", _without(cls))
    cls.restored(module)


def _without(cls: type[Swapped]) -> type[nn.Module]:
    """Return a swapped class without its mixin, also where ``fully_shard`` has made a class of its own on top."""
    if "base_class" in vars(cls):
        return cls.base_class
    bases = tuple(_without(base) if issubclass(base, Swapped) else base for base in cls.__bases__)
    return type(cls.__name__.replace(cls.class_prefix, "", 1), bases, dict(vars(cls)))


def _swapped_class(mixin: type[Swapped], base: type[nn.Module], computed: tuple[str, ...]) -> type[Swapped]:
    key = (mixin, base, computed)
    if key not in _classes:
        namespace: dict[str, Any] = dict(zip(computed, map(_computed, computed), strict=True))
        namespace |= {
            # The base's module: TransformerEngine's plugin recognizes its layers by it.
            "__module__": base.__module__,
            "__doc__": base.__doc__,
            "base_class": base,
            "mixin": mixin,
            "computed": computed,
        }
        copies_itself: Any = getattr(base, "__deepcopy__", None)
        if copies_itself is not None and copies_itself.__module__ != "torch.nn.utils.parametrize":
            namespace["__deepcopy__"] = _deepcopied  # a class that copies itself would leave out the adapter
        _classes[key] = type(f"{mixin.class_prefix}{base.__name__}", (mixin, base), namespace)
    return _classes[key]


def _laid_out_as(base: type[nn.Module], swapped: type[Swapped]) -> type[Swapped]:
    """Return a swapped class with ``base`` as its first base, and its methods in the order that they had."""
    order = swapped.__mro__[1:]
    meta = type(type(base).__name__, (type(base),), {"mro": lambda cls: [cls, *order]})
    return cast(type[Swapped], meta(swapped.__name__, (base, swapped.mixin), dict(vars(swapped))))


def _deepcopied(module: Swapped, memo: dict[int, Any]) -> Swapped:
    """Return what copying a module whose class has no way of its own would return."""
    make, arguments, state, *_ = module.__reduce_ex__(4)
    twin = memo[id(module)] = make(*arguments)
    twin.__setstate__(copy.deepcopy(state, memo))
    return cast(Swapped, twin)


def _computed(name: str) -> property:
    return property(lambda self: self.read(name))


def _rebuild(mixin: type[Swapped], base: type[nn.Module], computed: tuple[str, ...], *arguments: Any) -> Swapped:
    cls = _swapped_class(mixin, base, computed)
    return cls.__new__(cls, *arguments)


# --- the layer


class AdapterGroup(nn.ModuleDict):
    """The adapters of a layer with several, by the parameter or slice that each updates."""

    replaces: ClassVar[None] = None  # as in Adapter: each one adds to the output of those before it

    def __init__(self, adapters: Mapping[str, Adapter]) -> None:
        super().__init__(dict(adapters))

    @override
    def forward(self, inputs: Tensor, output: Tensor, layer: nn.Module, is_ours: bool = False) -> Tensor:
        for adapter in self._modules.values():
            output = cast(Adapter, adapter)(inputs, output, layer, is_ours)
            is_ours = not is_traced()  # a new sum, which nothing else refers to
        return output


class LoRALayer(Swapped):
    """A layer with a LoRA update; ``isinstance(module, LoRALayer)`` finds adapted layers.

    Attributes:
        lora: The adapter, with the factors ``lora.A`` and ``lora.B``, or a group of adapters.
        lora_mode: ``"active"`` adds the update in ``forward``, ``"disabled"`` leaves it out, ``"merged"`` means that
            the weight holds it for now (inside ``merged()``).
    """

    class_prefix = "LoRA"
    lora: Any  # an Adapter or an AdapterGroup
    lora_mode: Mode = "active"

    @override
    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        if self.lora_mode != "active":
            return cast(Tensor, super().forward(*args, **kwargs))
        lora, inputs = self.lora, args[0] if args else next(iter(kwargs.values()))
        if lora.replaces is self.base_class.forward:
            return cast(Tensor, lora(inputs, None, self))  # W x + b and the update in one
        output = super().forward(*args, **kwargs)
        if not isinstance(output, Tensor):
            raise TypeError(
                f"The forward of {self.base_class.__name__} returns a {type(output).__name__}, so no update can be "
                "added to its output. Leave such layers out with exclude_modules."
            )
        return cast(Tensor, lora(inputs, output, self, is_unheld(output)))

    def __prepare_scriptable__(self) -> NoReturn:  # called by torch.jit.script
        raise RuntimeError("torch.jit.script cannot compile adapters. Call merge(model) first, or use torch.jit.trace.")

    @property
    def qconfig(self) -> Any:
        """What torch.ao.quantization sets before it replaces layers of the classes that it knows."""
        return vars(self).get("qconfig")

    @qconfig.setter
    def qconfig(self, value: object) -> NoReturn:  # noqa: ARG002 - whatever it is
        raise RuntimeError(
            "torch.ao.quantization would skip adapted layers, because it finds layers by their exact class. Call "
            "merge(model) first, or quantize before attaching."
        )

    def adapters(self) -> dict[str, Adapter]:
        """Return the adapters of this layer by the parameter or the slice that each updates."""
        lora = unwrapped(self.lora)
        if isinstance(lora, AdapterGroup):
            return {key: cast(Adapter, unwrapped(part)) for key, part in lora.items()}
        return {"weight": cast(Adapter, lora)}

    def adapters_of(self, parameter: str) -> list[Adapter]:
        """Return the adapters that update a parameter as a matrix, in their order."""
        return [adapter for adapter in self.adapters().values() if adapter.parameter == parameter]

    def adapted_parameters(self) -> list[str]:
        """Return the names of this layer's parameters that hold the update after merging."""
        adapters = self.adapters().values()
        names = dict.fromkeys(adapter.parameter for adapter in adapters)
        return [*names, "bias"] if any(adapter.spec.lora_bias for adapter in adapters) else list(names)

    def fold(self, parameter: str, value: Tensor, into: Tensor | None = None) -> bool:
        """Add the updates of a parameter to one of its values, without gradients; return False if that is impossible.

        Args:
            parameter: Which one.
            value: The parameter as stored: its precision decides how much is summed at once, and so the last bits.
            into: Where the sum goes, laid out as the value; into the value itself if left out.
        """
        parts = sums(value, self.adapters_of(parameter), copied=into is not None and into is not value)
        for part, total in parts or ():
            target = part if into is None else _same_part(into, part, value)
            if total is not target:
                target.copy_(total)
        return parts is not None

    def sums(self, parameter: str) -> Iterable[Tensor]:
        """Return a parameter with its updates in parts, which may be small; requires no_grad."""
        parts = sums(base_parameter(self, parameter), self.adapters_of(parameter), copied=True)
        return [self.combined(parameter)] if parts is None else (total for _, total in parts)

    def combined(self, parameter: str) -> Tensor:
        """Return a parameter with the updates in it, whole and in its shape; float32, or float64 if either is."""
        value = updated(whole(base_parameter(self, parameter)), self.adapters_of(parameter))
        for adapter in self.adapters().values() if parameter == "bias" else ():
            if (delta := adapter.bias_delta()) is not None:
                value = value.to(torch.promote_types(value.dtype, delta.dtype))
                value = value.index_add(0, adapter.index, delta.to(value.dtype)) if adapter.spec.rows else value + delta
        return value

    @property
    def rank(self) -> int:
        """Rank of the update, for a layer with a single update."""
        return cast(Adapter, self.lora).spec.rank

    @property
    def scaling(self) -> float:
        """Factor of ``B @ A``, for a layer with a single update."""
        return cast(Adapter, self.lora).spec.scaling

    def delta_weight(self, parameter: str = "weight") -> Tensor:
        """Return the update this layer adds to a base weight, in the weight's shape.

        Args:
            parameter: Which weight, of a layer with several.

        Returns:
            Tensor of the weight's shape, float32, or float64 if the factors are.

        Source:
            Hu et al. 2021, arXiv:2106.09685, eq. 3.
        """
        with torch.no_grad():
            weight = whole(base_parameter(self, parameter))
            found = self.adapters_of(parameter)
            if not found:
                raise ValueError(f"{parameter!r} is not adapted; this layer adapts {self.adapted_parameters()}.")
            return torch.stack([adapter.delta_weight(weight) for adapter in found]).sum(0)


def reads_weight(layer: nn.Module, adapter: type[Adapter]) -> bool:
    """Return whether a layer, adapted or not, carries its update in its weight."""
    return bool(layer.computed) if isinstance(layer, LoRALayer) else adapter.needs_weight(layer)


# --- sums of a weight and its updates


def updated(weight: Tensor, adapters: Iterable[Adapter]) -> Tensor:
    """Return a weight with the updates of adapters in it; float32, or float64 if either is."""
    for adapter in adapters:
        weight = adapter.combined(weight)
    return weight


def sums(
    weight: Tensor, adapters: Sequence[Adapter], *, copied: bool = False
) -> Iterator[tuple[Tensor, Tensor]] | None:
    """Return the blocks of a weight, each with its sum with the updates; None if only the whole can be summed.

    A sum is that of all updates, in float32 or better, to be rounded once; the next may take its memory. To be taken
    without gradients.

    Args:
        weight: The weight as it is stored.
        adapters: Those that update it.
        copied: Whether no sum may be made in the weight's own memory, as it is where the weight has its precision.
    """
    updates = [adapter.in_blocks(weight) for adapter in adapters]  # all before anything changes
    if not updates or any(update is None for update in updates):
        return None
    return _sums(cast("list[InBlocks]", updates), copied)


def _sums(updates: list[InBlocks], copied: bool) -> Iterator[tuple[Tensor, Tensor]]:
    matrix, scratch = updates[0].matrix, None
    dtype = functools.reduce(torch.promote_types, (update.dtype for update in updates))
    in_one_pass = dtype is matrix.dtype and len(updates) == 1 and updates[0].in_one_pass
    for block in blocks(matrix, in_one_pass=in_one_pass):
        part = total = block.of(matrix)
        if copied or dtype is not matrix.dtype:
            scratch = torch.empty_like(part, dtype=dtype) if scratch is None else scratch
            total = scratch.narrow(1 if block.by_columns else 0, 0, block.length).copy_(part)
        for update in updates:
            update.add(total, block)
        yield part, total


def _same_part(tensor: Tensor, part: Tensor, whole: Tensor) -> Tensor:
    """Return the part of a tensor that corresponds to a part of another tensor with the same layout."""
    place = tensor.storage_offset() + part.storage_offset() - whole.storage_offset()
    return tensor.as_strided(part.shape, part.stride(), place)


# --- names that an adapted layer needs

_NEEDED = frozenset(
    {"lora", "lora_original", "read"}
    | {name for name in vars(LoRALayer) if not name.startswith("_")} - {"forward", "qconfig"}
)


def taken_names(module: nn.Module) -> frozenset[str]:
    """Return the names of an adapted layer's own attributes that this module already uses for something else."""
    taken = _taken_by_class(type(module))  # type: ignore[arg-type] # for mypy, Module's own hash
    for table in (vars(module), module._parameters, module._buffers, module._modules):
        if not _NEEDED.isdisjoint(table):
            taken |= _NEEDED & table.keys()
    return taken


@functools.cache
def _taken_by_class(layer_class: type) -> frozenset[str]:
    return frozenset(filter(functools.partial(hasattr, layer_class), _NEEDED))
