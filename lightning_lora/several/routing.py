"""One adapter per sample of a batch, in one forward pass of the base."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple, NoReturn, TypeAlias

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from typing_extensions import override

from lightning_lora.adapted_model import taking_turns
from lightning_lora.layers import LoRALayer, Swapped, WeightLoRALayer, swap_in, swap_out
from lightning_lora.layers.readers import METADATA
from lightning_lora.named_adapters import (
    TABLES,
    Kept,
    Several,
    buffers_kept,
    checked,
    in_mode_of,
    several_of,
    switch_to,
    undone_on_failure,
)
from lightning_lora.names import OTHERS, join, listed, walk
from lightning_lora.ops.eager import is_traced, is_unheld
from lightning_lora.switching import using

Rows: TypeAlias = slice | Tensor  # the samples of one adapter: neighbors, or their numbers


@contextmanager
def routed(module: nn.Module, names: Sequence[str | None]) -> Iterator[None]:
    """Compute each sample of a batch with an adapter of its own, in one forward pass of the base.

    Each layer runs once for the whole batch, and then adds each adapter's update to its samples; heads that train in
    full run once for each adapter. Samples of one adapter that are neighbors in the batch are not copied, so a sorted
    batch is fastest. Gradients reach every adapter from its own samples, also with activation checkpointing. Blocks of
    several threads take turns, as those of ``using`` do: batches of all requests together are faster.

    Args:
        module: An adapted module.
        names: The adapter of each sample, in the order of the batch; None for the bare base.

    Raises:
        ValueError: There is no adapter of one of these names, or a layer's update cannot be routed: it is carried in
            the weight, or the layer belongs to a module with ``batch_first=False``. Nothing was changed.
        RuntimeError: The adapters cannot be switched now, as in ``set_adapter``. In a forward pass: the first dimension
            of a layer's input is not the batch.
    """
    if isinstance(names, str) or not names:
        raise ValueError(f"routed: name one adapter for each sample of the batch, in a list; got {names!r}.")
    with taking_turns(module), undone_on_failure(module), _routed(module, names):
        yield


@contextmanager
def _routed(module: nn.Module, names: Sequence[str | None]) -> Iterator[None]:
    several = several_of(module, "routed")
    used = dict.fromkeys(name if name is None else checked(several, name, "routed") for name in names)
    if len(used) == 1:
        with using(module, names[0]):
            yield
        return
    rows = {name: _rows([i for i, each in enumerate(names) if each == name]) for name in used}
    parts = dict.fromkeys(part for name in used if name is not None for part in several.adapters[name].kept)
    paths = {part: path for path, part in walk(several.home)}
    _check_routable(several, [name for name in used if name is not None], paths)
    before = several.active
    switch_to(several, None)
    several.again, several.thread = partial(routed, module, names), threading.get_ident()
    try:
        with buffers_kept(several):
            for part in parts:
                groups = [
                    _Group(own, None if name is None else several.adapters[name].kept.get(part))
                    for name, own in rows.items()
                ]
                for group in groups:
                    in_mode_of(part, group.lora)
                vars(part)[_ROUTE] = route = _Route(paths[part], len(names), groups)
                swap_in(part, RoutedLayer, route.own)
            yield
    finally:
        for part in parts:
            if isinstance(part, RoutedLayer):
                swap_out(part)
                del vars(part)[_ROUTE]
        several.again = None
        switch_to(several, before)


_ROUTE = "_lora_route"


class _Group(NamedTuple):
    """The samples of one adapter, and what a layer has under it; None if the adapter leaves the layer as it is."""

    rows: Rows
    kept: Kept | None

    @property
    def lora(self) -> Any:
        """The adapter of the layer, or a group of adapters, or None."""
        return None if self.kept is None else self.kept._modules.get("lora")


class _Route:
    """What one layer does with the samples of a batch.

    Args:
        path: The layer's name.
        samples: Size of the batch.
        groups: Its parts.
    """

    def __init__(self, path: str, samples: int, groups: list[_Group]) -> None:
        self.path, self.samples, self.groups = path, samples, groups
        own = [key for group in groups if group.kept is not None for _, key in group.kept.own]
        self.own = tuple(dict.fromkeys(own))  # the layer's tensors of which adapters have their own
        self.is_apart = False
        self._back: Tensor | None = None

    @contextmanager
    def apart(self, layer: nn.Module, kept: Kept | None) -> Iterator[None]:
        """Have a layer compute with the tensors that it has under an adapter."""
        own = [] if kept is None else kept.own
        base = [vars(layer)[table][key] for table, key in own]
        for table, key in own:
            vars(layer)[table][key] = vars(kept)[table][key]
        self.is_apart = True
        try:
            yield
        finally:
            self.is_apart = False
            for (table, key), value in zip(own, base, strict=True):
                # It may be another tensor now: layers replace buffers.
                vars(kept)[table][key], vars(layer)[table][key] = vars(layer)[table][key], value

    def on(self, device: torch.device) -> None:
        """Move the numbers of the samples to a device, once."""
        if any(isinstance(group.rows, Tensor) and group.rows.device != device for group in self.groups):
            self.groups = [
                group._replace(rows=group.rows.to(device)) if isinstance(group.rows, Tensor) else group
                for group in self.groups
            ]

    def back(self, device: torch.device) -> Tensor:
        """Return where each sample is when the groups are put together one after another."""
        if self._back is None or self._back.device != device:
            numbers = torch.arange(self.samples, device=device)
            self._back = torch.cat([_of(numbers, group.rows) for group in self.groups]).argsort()
        return self._back


class RoutedLayer(Swapped):
    """A layer that computes each sample with the adapter of its own."""

    class_prefix = "Routed"

    @override
    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        # The copy would be routed for ever.
        raise RuntimeError("A module cannot be copied or pickled inside routed(...); leave it first.")

    @override
    def read(self, name: str) -> Any:
        route: _Route = vars(self)[_ROUTE]
        tensor = next(vars(self)[table][name] for table in TABLES if name in vars(self)[table])
        if route.is_apart or tensor is None:
            return tensor
        seen = Tensor._make_subclass(_Ambiguous, tensor.detach(), tensor.requires_grad)
        seen.full_name = join(route.path, name)
        return seen

    @override
    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        route: _Route = vars(self)[_ROUTE]
        inputs = args[0] if args else next(iter(kwargs.values()))
        route.on(inputs.device)
        if route.own:
            return self._apart(route, args, kwargs)
        output: Tensor = super().forward(*args, **kwargs)
        _check_batch(route, inputs, output)
        total = output if is_unheld(output) else output.clone()
        for rows, lora in ((group.rows, group.lora) for group in route.groups):
            if lora is not None:
                part = lora(_of(inputs, rows), _copied(total, rows), self, not is_traced())
                total = _put(total, rows, part)
        return total

    def _apart(self, route: _Route, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor:
        """Run the layer once for each adapter, which has parameters of its own for it."""
        outputs = []
        for rows, kept, lora in ((group.rows, group.kept, group.lora) for group in route.groups):
            own = [_samples(value, rows, route) for value in args]
            named = {key: _samples(value, rows, route) for key, value in kwargs.items()}
            inputs = own[0] if own else next(iter(named.values()))
            with route.apart(self, kept):
                output: Tensor = super().forward(*own, **named)
                outputs.append(output if lora is None else lora(inputs, output, self, is_unheld(output)))
        if sum(map(len, outputs)) != route.samples:
            _check_batch(route, args[0] if args else next(iter(kwargs.values())), torch.cat(outputs))
        return torch.cat(outputs).index_select(0, route.back(outputs[0].device))


class _Ambiguous(Tensor):
    """A tensor of which several adapters of a batch have their own, as code outside of its layer sees it.

    Such code would compute with the base's for all samples. It may ask for the shape and the like.
    """

    full_name: str

    @classmethod
    @override
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.__self__.__name__ if func.__name__ == "__get__" else func.__name__
        if name in METADATA:
            return super().__torch_function__(func, types, args, kwargs or {})  # type: ignore[no-untyped-call]
        found = sorted({each.full_name for each in tree_leaves((args, kwargs)) if isinstance(each, cls)})
        raise RuntimeError(
            f"routed: {listed(found)} {'is' if len(found) == 1 else 'are'} read outside of the layer's forward, by a "
            "hook or another module, and adapters of this batch have values of their own there. Leave the layer out "
            "of what they train in full (modules_to_save, bias), or run the samples of each adapter by themselves, "
            "inside using(module, name)."
        )


# --- samples


def _rows(numbers: list[int]) -> Rows:
    start, stop = numbers[0], numbers[-1] + 1
    return slice(start, stop) if stop - start == len(numbers) else torch.tensor(numbers)


def _of(tensor: Tensor, rows: Rows) -> Tensor:
    return tensor[rows] if isinstance(rows, slice) else tensor.index_select(0, rows)


def _copied(tensor: Tensor, rows: Rows) -> Tensor:
    """Return some samples in memory of their own."""
    return tensor[rows].clone() if isinstance(rows, slice) else tensor.index_select(0, rows)


def _put(total: Tensor, rows: Rows, part: Tensor) -> Tensor:
    if isinstance(rows, slice):
        total[rows] = part
        return total
    return total.index_copy_(0, rows, part)


def _samples(value: Any, rows: Rows, route: _Route) -> Any:
    is_batch = isinstance(value, Tensor) and value.ndim > 0 and len(value) == route.samples
    return _of(value, rows) if is_batch else value


def _check_batch(route: _Route, inputs: Tensor, output: Tensor) -> None:
    for tensor in (inputs, output):
        if tensor.ndim == 0 or len(tensor) != route.samples:
            raise RuntimeError(
                f"routed: {route.samples} adapters are named, one for each sample, and {route.path!r} gets an input of "
                f"shape {tuple(inputs.shape)}, whose first dimension must be the batch. Name one adapter for each "
                "sample; a layer that sees samples joined or transposed must be left out of the adapters."
            )


# --- what cannot be routed


def _check_routable(several: Several, names: Sequence[str], paths: Mapping[nn.Module, str]) -> None:
    kept = [item for name in names for item in several.adapters[name].kept.items()]
    in_weight = dict.fromkeys(paths[part] or "the model" for part, place in kept if _reads_weight(part, place))
    if in_weight:
        raise ValueError(
            f"routed: {listed(list(in_weight))} carries the update in its weight, or holds tensors that an adapter has "
            "for itself, and these are the same for the whole batch. Leave such layers out of the adapters, or run the "
            "samples of each adapter by themselves, inside using(module, name)."
        )
    for parent in paths:
        children = [child for key, child in parent._modules.items() if child is not None and key != OTHERS]
        if any(_batch_first(child) is False for child in (parent, *children)):
            below = {part for _, part in walk(parent)}
            if found := [paths[part] for part, _ in kept if part in below]:
                raise ValueError(
                    f"routed: {listed(list(dict.fromkeys(found)))} may see the batch in the second dimension, since "
                    f"{paths[parent] or 'the model'} ({type(parent).__name__}) has batch_first=False. Build it with "
                    "batch_first=True, or leave these layers out of the adapters."
                )


def _batch_first(part: nn.Module) -> object:
    # Not by getattr, whose failure in nn.Module would take a third of the time of entering.
    return vars(part).get("batch_first", getattr(type(part), "batch_first", None))


def _reads_weight(part: nn.Module, place: Kept) -> bool:
    mixin = part.mixin if isinstance(part, LoRALayer) else place.behavior and place.behavior[0]
    has_children = any(key not in (OTHERS, "lora") for key in part._modules) or isinstance(part, nn.RNNBase)
    return bool(mixin and issubclass(mixin, WeightLoRALayer)) or bool(place.own and has_children)
