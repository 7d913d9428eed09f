"""The adapter: the child module ``lora`` of an adapted layer, and which class of adapter a layer gets."""

from __future__ import annotations

import functools
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from typing import Any, ClassVar, NamedTuple, cast

import torch
from torch import Tensor, nn
from typing_extensions import override


class AdapterSpec(NamedTuple):
    """The options of one adapter, resolved for its layer.

    Args:
        rank: Rank of the update.
        scaling: Factor of ``B @ A``, resolved once; nothing recomputes it later.
        dropout: Probability of dropping an element of the adapter's input while training.
        init: Name of the start of the random factor.
        dtype: Precision of the factors.
        seed: Seed of the layer's start.
        use_dora: Whether a trained magnitude rescales each row of the weight.
        lora_bias: Whether ``B`` has a bias.
        rows: The rows of the weight that are adapted, as ranges; none means all.
    """

    rank: int
    scaling: float
    dropout: float
    init: str
    dtype: torch.dtype
    seed: int
    use_dora: bool = False
    lora_bias: bool = False
    rows: tuple[range, ...] = ()


class Block(NamedTuple):
    """A part of a matrix: some of its rows or some of its columns; of a stack of matrices, a part of one."""

    member: int | None
    by_columns: bool
    start: int
    length: int

    def of(self, matrix: Tensor) -> Tensor:
        """Return this part, in the matrix's memory."""
        matrix = matrix if self.member is None else matrix[self.member]
        return matrix.narrow(1 if self.by_columns else 0, self.start, self.length)

    def of_factors(self, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
        """Return those parts of the factors that make this part of ``B @ A``."""
        if self.member is not None:
            A, B = A[self.member], B[self.member]
        if self.by_columns:
            return A.narrow(1, self.start, self.length), B
        return A, B.narrow(0, self.start, self.length)

    def rows_of(self, vector: Tensor) -> Tensor:
        """Return what a vector, or a column, has for the rows of this part."""
        return vector if self.by_columns else vector.narrow(0, self.start, self.length)


class InBlocks(NamedTuple):
    """An update of a weight, block by block, in the weight's memory.

    Attributes:
        matrix: The weight, read as a matrix or a stack of them.
        dtype: Precision of the sum.
        add: Updates a block that is given in that precision, in place.
        in_one_pass: Whether ``add`` passes over a block once, and copies nothing of it.
    """

    matrix: Tensor
    dtype: torch.dtype
    add: Callable[[Tensor, Block], object]
    in_one_pass: bool


# Blocks of 0.5 MB of float32 stay in a CPU's caches for a second pass; 16 MB suit a single pass, and GPUs.
_AT_ONCE_IN_CACHE, _AT_ONCE = 1 << 17, 1 << 22

_EMPTY_MODULE = vars(nn.Module())
_TABLES = [(name, table) for name, table in _EMPTY_MODULE.items() if isinstance(table, (dict, set))]


class Adapter(nn.Module, ABC):
    """The trainable update of one layer, as the layer's child module ``lora``.

    A child of its own lets FSDP give the trainable factors units apart from the frozen weight. A subclass states one
    kind of layer: how it uses the factors, and everything else that depends on the kind.

    Attributes:
        kind: Name of the kind in checkpoints. A subclass that states none is recorded without one: its files can be
            loaded into the model, but not used without it.
        spec: The options it was built from.
        parameter: Name of the layer's parameter that it updates.
        index: Numbers of the rows that ``spec.rows`` names.
    """

    kind: ClassVar[str | None] = None
    drops_input: ClassVar[bool] = True  # `dropout` applies to this kind
    has_output_rows: ClassVar[bool] = True  # the rows of the weight, read as a matrix, are the output's features
    takes_bias: ClassVar[bool] = False  # `lora_bias` applies to this kind
    vllm_takes: ClassVar[bool] = False  # vLLM serves this kind, where PEFT can hold it
    replaces: ClassVar[Callable[..., Tensor] | None] = None  # the layers' forward, if `forward` computes it too
    is_waiting: bool = False  # for its start: see LowRankAdapter
    spec: AdapterSpec
    parameter: str
    index: Tensor

    @override
    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        cls.kind = vars(cls).get("kind")  # not inherited: a subclass may store its weight in another way

    def __init__(self, module: nn.Module, spec: AdapterSpec, parameter: str = "weight") -> None:
        # Copied from an empty module: nn.Module.__init__ sets a dozen tables one by one, a tenth of the time of attach.
        own = vars(self)
        own.update(_EMPTY_MODULE)
        for name, table in _TABLES:
            own[name] = table.copy()
        own["training"], own["spec"], own["parameter"] = module.training, spec, parameter
        if spec.rows:
            index = row_numbers(spec.rows, base_parameter(module, parameter).device)
            self.register_buffer("index", index, persistent=False)
        self.prepare(module, parameter)
        self.build(module, parameter)

    def prepare(self, module: nn.Module, parameter: str) -> None:
        """Store what the update needs from the module besides the factors."""

    @abstractmethod
    def build(self, module: nn.Module, parameter: str) -> None:
        """Create the trainable parameters with their initial values."""

    def starts(self, weight: Tensor) -> dict[str, Tensor]:  # noqa: ARG002 - most start without looking at it
        """Return the starts of the parameters that start from a base weight, given whole."""
        return {}

    @abstractmethod
    @override
    def forward(self, inputs: Tensor, output: Tensor, layer: nn.Module, is_ours: bool = False) -> Tensor:
        """Return the layer's ``output`` for ``inputs`` with the update, in its memory if that ``is_ours``.

        If the adapter ``replaces`` the layer's forward, the output is None.
        """

    @abstractmethod
    def combined(self, weight: Tensor) -> Tensor:
        """Return a weight with what was learned in it, in its shape; float32, or float64 if either is."""

    def in_blocks(self, weight: Tensor) -> InBlocks | None:  # noqa: ARG002 - some cannot
        """Return how to turn a weight into what ``combined`` returns, block by block; None if that is impossible."""
        return None

    def rows_in(self, block: Block) -> tuple[Tensor, Tensor]:
        """Return which of the rows in ``index`` a block has, by their place there, and where it has them."""
        if block.by_columns:
            return torch.arange(len(self.index), device=self.index.device), self.index
        at = self.index - block.start
        places = ((at >= 0) & (at < block.length)).nonzero().squeeze(1)
        return places, at[places]

    @property
    def is_difference(self) -> bool:
        """Whether the update is ``scaling * (B @ A - B0 @ A0)``."""
        return "A0" in self._buffers

    def have_values(self) -> None:
        """Record that all tensors have got their values from somewhere."""
        self.is_waiting = False

    def delta_weight(self, weight: Tensor) -> Tensor:
        """Return what is added to a base weight, in its shape; float32, or float64 if the factors are."""
        return self.combined(weight) - weight

    def bias_delta(self) -> Tensor | None:
        """Return what is added to the layer's bias, for every output feature that is adapted, or None."""
        return None

    def still(self) -> Adapter:
        """Return a detached snapshot of this adapter, unaffected by later changes."""
        twin = type(self).__new__(type(self))
        vars(twin).update(vars(self))
        for table in ("_parameters", "_buffers"):
            vars(twin)[table] = {name: None if t is None else t.detach() for name, t in vars(self)[table].items()}
        return twin

    @abstractmethod
    def has_effect(self, weight: Tensor) -> bool:
        """Return whether the layer computes anything other than the base layer with this weight."""

    @abstractmethod
    def reset_parameters(self) -> None:
        """Reset to the initial values; called after a module on the meta device got memory."""

    # --- what planning asks of a kind

    @classmethod
    def accepts(cls, module: nn.Module) -> bool:  # noqa: ARG003 - most kinds take all
        """Return whether a module of the right class can have this adapter."""
        return True

    @classmethod
    def matrix_of(cls, shape: Sequence[int]) -> tuple[int, int]:
        """Return ``(out, in)`` of a weight that is stored with this shape, read as a matrix."""
        return shape[0], math.prod(shape[1:])

    @classmethod
    def matrix_shape(cls, module: nn.Module, parameter: str = "weight") -> tuple[int, int]:
        """Return ``(out, in)`` of the module's weight, read as a matrix."""
        return cls.matrix_of(base_parameter(module, parameter).shape)

    @classmethod
    def stack(cls, module: nn.Module, parameter: str) -> int:  # noqa: ARG003 - most kinds hold one
        """Return how many matrices the parameter is a stack of; each has factors of its own."""
        return 1

    @classmethod
    def in_all_linear(cls, module: nn.Module) -> bool:  # noqa: ARG003 - most kinds are not
        """Return whether ``target_modules="all-linear"`` means such a module."""
        return False

    @classmethod
    def parameters_of(cls, module: nn.Module) -> tuple[str, ...]:  # noqa: ARG003 - most kinds have one
        """Return the parameters that naming such a module adapts."""
        return ("weight",)

    @classmethod
    def sliced_parameter(cls, module: nn.Module) -> str | None:  # noqa: ARG003 - most kinds have none
        """Return the parameter whose output features ``target_slices`` divides, or None."""
        return None

    @classmethod
    def obstacle(cls, module: nn.Module) -> str | None:  # noqa: ARG003 - most kinds have none
        """Return why a module of this kind cannot be adapted, or None."""
        return None

    @classmethod
    def needs_weight(cls, module: nn.Module) -> bool:  # noqa: ARG003 - most kinds do not
        """Return whether the update must be read from such a module's weight, not added to its output."""
        return False

    @classmethod
    def adds_to_output(cls, module: nn.Module) -> bool:  # noqa: ARG003 - most kinds know the forward
        """Return whether the update may go beside such a module; asked only where the weight need not carry it."""
        return True

    # --- the kind in files

    def record(self, layer: nn.Module) -> dict[str, Any]:
        """Return the record of the layer's kind in a checkpoint, with which the file can be used without the model.

        Returns:
            ``kind`` and ``shape``, or a kind of None if they do not describe the layer completely.
        """
        shape = None if self.kind is None else self.recorded_shape(layer)
        return {"kind": None} if shape is None else {"kind": self.kind, "shape": list(shape)}

    def recorded_shape(self, layer: nn.Module) -> Sequence[int] | None:  # noqa: ARG002 - most kinds have none
        """Return the shape of the layer's stored weight, or None if a stand-in cannot represent the layer.

        From attributes, not from the weight itself: FSDP hides its shape, and quantization packs it.
        """
        return None

    @classmethod
    def stand_in(cls, shape: Sequence[int]) -> nn.Module:  # noqa: ARG003 - some kinds need no shape
        """Return a layer of this kind without a bias, which represents one when the model is not available.

        Args:
            shape: The shape from ``recorded_shape``; empty for a kind whose parameters are not called ``weight``.

        Raises:
            ValueError: No weight of this kind has such a shape.
        """
        return nn.Module()

    @classmethod
    def peft_obstacle(
        cls,
        layer: nn.Module,
        parameter: str,  # noqa: ARG003 - of a layer with several
        *,
        use_dora: bool,  # noqa: ARG003 - some adapters in PEFT lack it
        lora_bias: bool,  # noqa: ARG003 - likewise
    ) -> str | None:
        """Return why PEFT has no equivalent adapter for this layer, adapted or not; None if it has one."""
        return f"PEFT has no adapter for {getattr(layer, 'base_class', type(layer)).__name__}"

    @override
    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Adapter:
        """Follow the module to another device, but keep the factors' precision; only float64 is followed."""

        def keep_precision(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            if moved.dtype == tensor.dtype or moved.dtype == torch.float64:
                return moved
            return tensor.to(device=moved.device, dtype=self.kept_dtype(tensor))

        return cast(Adapter, super()._apply(keep_precision, recurse))  # type: ignore[no-untyped-call]

    def kept_dtype(self, tensor: Tensor) -> torch.dtype:
        """Return the precision in which one of the parameters is kept."""
        # In bfloat16, a magnitude would not start at the norm of its row, and attaching would change the model.
        return self.spec.dtype if tensor.ndim > 1 else torch.promote_types(self.spec.dtype, torch.float32)

    @override
    def extra_repr(self) -> str:
        return f"rank={self.spec.rank}, scaling={self.spec.scaling:g}, dropout={self.spec.dropout:g}"


_by_class: dict[type[nn.Module], type[Adapter]] = {}
_by_kind: dict[str, type[Adapter]] = {}
KNOWN_BY_NAME: dict[str, type[Adapter]] = {}  # by the end of a class's name, for libraries that need not be installed
KNOWN_BY_STRUCTURE: list[type[Adapter]] = []  # for classes that nobody registered: asked whether they accept a module


def register_adapter(layer_class: type[nn.Module], adapter_class: type[Adapter]) -> None:
    """Register the adapter for a kind of layer.

    Args:
        layer_class: The class of the layers. Subclasses have the same adapter, unless one is registered for them.
        adapter_class: A subclass of ``LinearAdapter``, or of another adapter in ``lightning_lora.layers``. See
            ``docs/layers.md`` for what it states.
    """
    _by_class[layer_class] = adapter_class
    if adapter_class.kind is not None:
        _by_kind[adapter_class.kind] = adapter_class
    _adapter_of_class.cache_clear()


def adapter_type(module: nn.Module) -> type[Adapter] | None:
    """Return the adapter for this kind of module, or None if the kind cannot be adapted."""
    adapter = _adapter_of_class(type(module))  # type: ignore[arg-type] # for mypy, Module's own hash
    if adapter is None and "weight" in module._parameters:
        return next((each for each in KNOWN_BY_STRUCTURE if each.accepts(module)), None)
    return adapter if adapter is not None and adapter.accepts(module) else None


@functools.cache
def _adapter_of_class(layer_class: type[nn.Module]) -> type[Adapter] | None:
    for each in layer_class.__mro__:
        if each in _by_class:
            return _by_class[each]
    for end, adapter in KNOWN_BY_NAME.items():
        if layer_class.__name__.endswith(end):
            return adapter
    return None


def adapter_of_kind(kind: str) -> type[Adapter]:
    """Return the adapter that uses this kind in its checkpoints.

    Raises:
        ValueError: None is registered.
    """
    if kind not in _by_kind:
        raise ValueError(
            f"No adapter is registered for layers of the kind {kind!r}. Import the package that registers it with "
            "register_adapter."
        )
    return _by_kind[kind]


def base_parameter(module: nn.Module, name: str) -> Tensor:
    """Return a parameter that an adapter of ``module`` updates, without the update; looking changes no state."""
    parameter = module._parameters.get(name)
    if parameter is not None:
        return parameter
    computing = module._modules.get("parametrizations")
    # Such as those of spectral_norm, whose every read in training is a power iteration.
    moving = [] if computing is None else [part for part in computing.modules() if part.training]
    for part in moving:
        part.training = False
    try:
        return computed_parameter(module, name)
    finally:
        for part in moving:
            part.training = True


def computed_parameter(module: nn.Module, name: str) -> Tensor:
    """Return the same as the base computes it in its forward pass, which may change the state of a parametrization."""
    parameter = module._parameters.get(name)
    if parameter is not None:
        return parameter
    if name in getattr(module, "computed", ()):  # by a layer with the update in it; below is what its base computes
        own = next(each for each in type(module).__mro__ if name in vars(each))
        return cast(Tensor, getattr(super(own, module), name))
    return cast(Tensor, getattr(module, name))


def base_weight(module: nn.Module) -> Tensor:
    """Return the weight of ``module`` without the update."""
    return base_parameter(module, "weight")


def row_numbers(rows: Sequence[range], device: torch.device | str = "cpu") -> Tensor:
    """Return the numbers that the ranges hold, one after another."""
    return torch.cat([torch.arange(part.start, part.stop, part.step, device=device) for part in rows])


def at_once(weight: Tensor, *, in_one_pass: bool = False) -> int:
    """Return how many elements of a weight are worked on at a time."""
    return _AT_ONCE_IN_CACHE if weight.is_cpu and not in_one_pass else _AT_ONCE


def blocks(matrix: Tensor, *, in_one_pass: bool) -> Iterator[Block]:
    """Yield the parts of a matrix or of a stack, as they lie in memory, each of about ``at_once`` elements."""
    *stack, rows, columns = matrix.shape
    by_columns = matrix.stride(-2) < matrix.stride(-1)
    width, length = (rows, columns) if by_columns else (columns, rows)
    step = max(1, at_once(matrix, in_one_pass=in_one_pass) // max(1, width))
    for member in range(stack[0]) if stack else (None,):
        for start in range(0, length, step):
            yield Block(member, by_columns, start, min(step, length - start))
