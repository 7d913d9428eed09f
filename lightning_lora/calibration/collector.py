"""What adapted layers see while batches pass: hooks that add their inputs and gradients to sums."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeAlias, cast

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from lightning_lora.calibration.starts import NEEDS
from lightning_lora.calibration.statistics import MatrixStatistics, Moments, must_sketch
from lightning_lora.layers import AdapterGroup, ConvAdapter, LoRALayer, LowRankAdapter, base_parameter
from lightning_lora.ops.eager import functorch_is_active
from lightning_lora.sharding import gathered, is_sharded, whole

INPUTS_UNSEEN = "its inputs cannot be seen from outside"
GRADIENTS_UNSEEN = "the gradients of its outputs cannot be seen from outside"  # but its inputs can
NO_GRADIENT = "its weight is computed or quantized, and has no gradient"
IN_TRANSFORM = "it runs inside a transform of torch.func, such as vmap"
UNSEEN = ("", GRADIENTS_UNSEEN, INPUTS_UNSEEN, NO_GRADIENT, IN_TRANSFORM)
FROM_GRADIENT = "lora_ga"  # the start that needs nothing but the gradient of the weight, which every kind of layer has


@dataclass
class Place:
    """An adapter, and the sums from which its start will be computed.

    Attributes:
        label: Its name.
        layer: The layer.
        adapter: The adapter.
        statistics: The sums; of a stack of matrices, those of each.
        unseen: Why the layer's inputs or gradients cannot be seen, one of ``UNSEEN``; empty if they can.
    """

    label: str
    layer: LoRALayer
    adapter: LowRankAdapter
    statistics: list[MatrixStatistics] = field(default_factory=list)
    unseen: str = ""

    @property
    def shape(self) -> tuple[int, int]:
        """``(out, in)`` of the part of the weight that is adapted."""
        return self.adapter.B.shape[-2], self.adapter.A.shape[-1]

    @property
    def is_part(self) -> bool:
        """Whether the layer has several adapters, such as those of slices."""
        return isinstance(self.layer.lora, AdapterGroup)

    @property
    def axes(self) -> tuple[int, ...] | None:
        """Sizes of the ordered axes of what the weight is multiplied with, a kernel's; None if it has none."""
        found = self.adapter.kernel[2:] if isinstance(self.adapter, ConvAdapter) else ()
        return found if math.prod(found) > 1 else None

    @property
    def experts(self) -> int:
        """Number of matrices in a stack; 1 without one."""
        return math.prod(self.adapter.A.shape[:-2])

    @property
    def has_plain_weight(self) -> bool:
        """Whether the values of the weight can be read."""
        weight = base_parameter(self.layer, self.adapter.parameter)
        is_packed = is_traceable_wrapper_subclass(cast(Any, weight)) and not is_sharded(weight)
        return weight.is_floating_point() and not is_packed

    def weight(self, index: int = 0) -> Tensor:
        """Return the adapted part of the weight as ``(out, in)``, of a stack that of one matrix."""
        stored = base_parameter(self.layer, self.adapter.parameter)
        with gathered([stored]):
            matrix = self.adapter.as_matrix(whole(stored.detach()).clone())
        matrix = matrix.index_select(0, self.adapter.index) if self.adapter.spec.rows else matrix
        return matrix.reshape(-1, *self.shape)[index]


class Collector:
    """Adds what passes through adapted layers to their sums, inside ``watching``.

    Args:
        places: The adapters that wait for a start of the same kind.
        start: Which start.
        budget: Bytes for all sums.
        smooth: Whether the positions of kernels have an order that the start regards.

    Raises:
        ValueError: The budget is too small.
    """

    def __init__(self, places: Sequence[Place], start: str, budget: int, *, smooth: bool = False) -> None:
        self.places, self.start, self.mask = places, start, cast("Tensor | None", None)
        needs = NEEDS[start]
        columns = 2 * max(place.adapter.spec.rank for place in places) + _OVERSAMPLING
        shapes = {f"{place.label} {i}": place.shape for place in places for i in range(place.experts)}
        wide = must_sketch(shapes, needs, columns=columns, budget=budget)
        self._inputs = _InputSums()
        for place in places:
            device = _sums_device(place.adapter.A.device)
            for i in range(place.experts):
                sketch = columns if f"{place.label} {i}" in wide else None
                axes = place.axes if smooth and not sketch else None
                own = needs if axes else needs - {"inputs"}  # a kernel's patches are its own
                found = MatrixStatistics(*place.shape, own, sketch=sketch, axes=axes, device=device)
                place.statistics.append(found)
                if own != needs:
                    self._inputs.will_have(found, sketch, device)
        self._hooks: list[Any] = []
        self._is_backward = False
        self._last_of: dict[int, Place] = {}  # of several on one weight, as slices are

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Collect inside the block."""
        watch = self._watch_gradient if self.start == FROM_GRADIENT else self._watch_tokens
        thawed: list[Tensor] = []
        try:
            for place in self.places:
                watch(place, thawed)
            yield
        finally:
            self._inputs.finish()
            for hook in self._hooks:
                hook.remove()
            for weight in thawed:
                weight.requires_grad_(False)
            self._hooks = []

    def next_batch(self, mask: Tensor | None) -> None:
        """Begin a batch, with the mask of its tokens."""
        self._inputs.put()
        self.mask = mask

    @contextmanager
    def backward(self) -> Iterator[None]:
        """Take the gradients inside the block for those of the loss; others are derivatives that the loss holds."""
        self._is_backward = True
        try:
            yield
        finally:
            self._is_backward = False

    # --- the gradient of the weight

    def _watch_gradient(self, place: Place, thawed: list[Tensor]) -> None:
        weight = place.layer._parameters.get(place.adapter.parameter)
        if weight is None or not weight.is_floating_point():
            place.unseen = NO_GRADIENT
            return
        if not weight.requires_grad:
            weight.requires_grad_(True)
            thawed.append(weight)
        self._last_of[id(weight)] = place
        self._hooks.append(cast(Any, weight).register_post_accumulate_grad_hook(self._adding_gradient(place)))

    def _adding_gradient(self, place: Place) -> Callable[[Tensor], None]:
        adapter = place.adapter

        def add(weight: Tensor) -> None:
            assert weight.grad is not None
            matrix = adapter.as_matrix(weight.grad)
            if adapter.spec.rows:
                matrix = matrix.index_select(0, adapter.index)
            for statistics, part in zip(place.statistics, matrix.view(-1, *place.shape), strict=True):
                statistics.add_gradient(part)
            if self._last_of[id(weight)] is place:
                weight.grad = None  # the gradients of all weights at once would take the memory of the model

        return add

    # --- tokens

    def _watch_tokens(self, place: Place, thawed: list[Tensor]) -> None:  # noqa: ARG002 - as of gradients
        seen = "gradients" in NEEDS[self.start]

        def see(layer: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            if functorch_is_active():
                place.unseen = IN_TRANSFORM
                return
            inputs = [*args, *kwargs.values()]
            x = place.adapter.tokens_in(layer, inputs)
            if x is None:
                place.unseen = INPUTS_UNSEEN
                return
            x = x.detach()
            if not seen:
                self._add(place, x)
            elif not isinstance(output, Tensor) or place.adapter.tokens_out(output.detach()) is None:
                place.unseen = GRADIENTS_UNSEEN
                self._add(place, x)
            elif output.requires_grad:
                cast(Any, output).register_hook(lambda gradient: self._add_pair(place, x, gradient))

        if place.experts > 1:
            place.unseen = INPUTS_UNSEEN
        else:
            self._hooks.append(place.layer.register_forward_hook(see, with_kwargs=True))

    def _add_pair(self, place: Place, x: Tensor, gradient: Tensor) -> None:
        if not self._is_backward:
            return
        g = place.adapter.tokens_out(gradient.detach())
        assert g is not None
        self._add(place, x.to(g.device), g)

    def _add(self, place: Place, x: Tensor, g: Tensor | None = None) -> None:
        [statistics] = place.statistics
        mask = self._mask_for(x)
        self._inputs.add(statistics, x, mask)
        statistics.add(x, g, mask)

    def _mask_for(self, x: Tensor) -> Tensor | None:
        """Return the batch's mask, if it is one of these tokens."""
        if self.mask is None:
            return None
        mask, (first, second) = self.mask.to(x.device), x.shape[:2]
        if mask.shape == (second, first) != (first, second):
            mask = mask.T  # tokens come before sequences
        is_flat = 1 in (first, second) and mask.numel() == first * second  # all tokens in one dimension
        return mask.reshape(first, second) if is_flat or mask.shape == (first, second) else None


class _InputSums:
    """The moments of inputs, summed once for all matrices that are multiplied with the same tensor, such as q, k and v.

    There is one sum for each set of matrices that see a tensor together. A matrix that is in several sets, because it
    does not always have the same input as another, adds theirs up in the end; the others share one object.
    """

    def __init__(self) -> None:
        self._kinds: dict[MatrixStatistics, _Kind] = {}
        self._sums: dict[tuple[MatrixStatistics, ...], Moments] = {}
        self._latest: dict[_Kind, Moments] = {}  # over one tensor; emptied and used again
        self._kind, self._who = cast("_Kind | None", None), list[MatrixStatistics]()
        self._tensor, self._version = cast("Tensor | None", None), 0  # kept, so that no other takes its memory

    def will_have(self, statistics: MatrixStatistics, sketch: int | None, device: torch.device) -> None:
        """Give these statistics moments of their inputs in the end."""
        self._kinds[statistics] = (statistics.in_features, sketch, device)

    def add(self, statistics: MatrixStatistics, x: Tensor, mask: Tensor | None) -> None:
        """Add a tensor, or note that the last one is also for these statistics."""
        kind = self._kinds.get(statistics)
        if kind is None:
            return
        if kind != self._kind or statistics in self._who or not self._is_latest(x):
            self.put()
            if kind not in self._latest:
                self._latest[kind] = _no_moments(kind)
            self._latest[kind].add(x, mask)
            self._kind, self._tensor, self._version = kind, x, 0 if x.is_inference() else x._version
        self._who.append(statistics)

    def _is_latest(self, x: Tensor) -> bool:
        last = self._tensor
        if last is None or x.is_inference():
            return False
        where = [(each.device, each.dtype, each.data_ptr(), each.shape, each.stride()) for each in (x, last)]
        return where[0] == where[1] and x._version == self._version

    def put(self) -> None:
        """Add the last tensor to the sum of those that have seen it."""
        if self._kind is None:
            return
        latest, who = self._latest[self._kind], tuple(self._who)
        if who not in self._sums:
            self._sums[who] = _no_moments(self._kind)
        _add_moments(self._sums[who], latest)
        for tensor in latest.tensors():
            tensor.zero_()
        self._kind, self._tensor, self._who = None, None, []

    def finish(self) -> None:
        """Give all statistics their moments."""
        self.put()
        for statistics, kind in self._kinds.items():
            first, *others = [sums for who, sums in self._sums.items() if statistics in who] or [_no_moments(kind)]
            statistics.inputs = copy.deepcopy(first) if others else first
            for other in others:
                _add_moments(statistics.inputs, other)


_Kind: TypeAlias = tuple[int, int | None, torch.device]  # width, sketch and device


def _no_moments(kind: _Kind) -> Moments:
    width, sketch, device = kind
    return Moments(width, sketch=sketch, device=device)


def _add_moments(total: Moments, other: Moments) -> None:
    for mine, its in zip(total.tensors(), other.tensors(), strict=True):
        mine += its


def unshare_unless_equal(places: Sequence[Place]) -> None:
    """Give each its own moments of the inputs, unless all processes have found the same layers to share them.

    Processes add up what they have in the same order; their batches may take different ways through the model.
    """
    all_statistics = [each for place in places for each in place.statistics]
    first = dict[int, int]()
    numbers = [first.setdefault(id(each.inputs), number) for number, each in enumerate(all_statistics)]
    lowest = torch.tensor(numbers, device=all_statistics[0].tensors()[0].device)
    highest = lowest.clone()
    torch.distributed.all_reduce(lowest, torch.distributed.ReduceOp.MIN)
    torch.distributed.all_reduce(highest, torch.distributed.ReduceOp.MAX)
    if not torch.equal(lowest, highest):
        for each in all_statistics:
            each.inputs = copy.deepcopy(each.inputs)


def _sums_device(device: torch.device) -> torch.device:
    return torch.device("cpu") if device.type == "mps" else device  # which knows no float64


_OVERSAMPLING = 16
