"""Steps of several adapters that meet at the network: one forward pass for all, everything else for each alone.

Each adapter's ``training_step`` runs in a thread of its own, one at a time and in a fixed order. Where it calls the
network it waits. When all have arrived, their inputs are joined along the first dimension and computed together, each
sample with its own adapter (``routed``), and every step goes on with its part of the output::

    training_step of a   ──► inputs ┐                 ┌ outputs ──► loss of a
    training_step of b   ──► inputs ┼──► network ──►  ┼ outputs ──► loss of b
    training_step of c   ──► inputs ┘                 └ outputs ──► loss of c
"""

from __future__ import annotations

import contextvars
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from lightning_lora.adapted_model import AdaptedModel
from lightning_lora.several.routing import routed
from lightning_lora.sweep.steps import Call, Outcome, Step, UnfitError, outcome_of, recorded_logs
from lightning_lora.switching import using


class Meeting:
    """Runs the steps of several adapters with one forward pass of the network.

    Args:
        module: The adapted module.
        names: All adapters of the sweep.
    """

    def __init__(self, module: LightningModule, names: Sequence[str]) -> None:
        self.module = module
        self.network = _network(module, names)

    def run(self, step: Step, calls: Mapping[str, Call]) -> dict[str, Outcome]:
        """Run the step for these adapters; their arguments may differ, also in the number of samples.

        Raises:
            UnfitError: A step does not call the network exactly once, or what goes in or comes out is no batch.
        """
        with recorded_logs(self.module) as logged, _met_at(self.network) as place:
            guests = [_Guest(name, step, call, logged, place) for name, call in calls.items()]
            try:
                for guest in guests:
                    guest.go_on()
                if absent := [guest for guest in guests if guest.inputs is None]:
                    kind = type(self.network).__name__
                    raise UnfitError(
                        f"training_step does not call {kind}, which holds the adapters ({absent[0].name!r})"
                    )
                with _original(self.network, place):
                    outputs = self._compute(guests, place.forward)
                for guest, output in zip(guests, outputs, strict=True):
                    guest.output = output
                    guest.go_on()
                    if not guest.is_done:
                        raise UnfitError(f"training_step calls {type(self.network).__name__} more than once")
            finally:
                for guest in guests:
                    guest.leave()
        return {guest.name: guest.outcome for guest in guests}

    def _compute(self, guests: Sequence[_Guest], forward: Callable[..., Any]) -> list[Any]:
        args, sizes = _joined([guest.inputs for guest in guests])
        samples = [guest.name for guest, size in zip(guests, sizes, strict=True) for _ in range(size)]
        with routed(self.module, samples):
            output = forward(*args[0], **args[1])
        return _parts(output, sizes)


def _network(module: nn.Module, names: Sequence[str]) -> nn.Module:
    """Return the smallest module that holds everything that the adapters train."""
    paths: list[list[str]] = []
    for name in names:
        with using(module, name):
            model = AdaptedModel(module)
            trained = {id(tensor) for tensor in model.trained.values()}
            paths += [path.split(".") for path in model.layers]
            paths += [
                path.split(".") if path else []
                for path, part in model.parts
                if any(id(tensor) in trained for tensor in (*part._parameters.values(), *part._buffers.values()))
            ]
    common: list[str] = []
    for parts in zip(*paths, strict=False):
        if len(set(parts)) > 1:
            break
        common.append(parts[0])
    while common and not _is_callable(module.get_submodule(".".join(common))):
        common.pop()
    return module.get_submodule(".".join(common))


def _is_callable(part: nn.Module) -> bool:
    return type(part).forward is not nn.Module.forward  # not those of ModuleList and ModuleDict


# --- the guests


class _Place:
    """Where the steps meet: a network, and who is calling it now."""

    def __init__(self, network: nn.Module) -> None:
        self.forward = network.forward
        self.guest: _Guest | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        guest = self.guest
        assert guest is not None
        if guest.inputs is not None:
            raise UnfitError("training_step calls the network more than once")
        guest.inputs = (args, kwargs)
        guest.wait()
        return guest.output


@contextmanager
def _met_at(network: nn.Module) -> Iterator[_Place]:
    place, before = _Place(network), vars(network).get("forward")
    vars(network)["forward"] = place
    try:
        yield place
    finally:
        _put_back(network, before)


@contextmanager
def _original(network: nn.Module, place: _Place) -> Iterator[None]:
    """Have the network's own ``forward`` inside the block, as parts of it may call it."""
    own = place.forward if getattr(place.forward, "__self__", None) is not network else None
    _put_back(network, own)
    try:
        yield
    finally:
        vars(network)["forward"] = place


def _put_back(network: nn.Module, forward: Any) -> None:
    if forward is None:
        vars(network).pop("forward", None)
    else:
        vars(network)["forward"] = forward


class _Guest:
    """One adapter's step, in a thread that runs only while the others wait."""

    def __init__(self, name: str, step: Step, call: Call, logged: list[Any], place: _Place) -> None:
        self.name, self.place = name, place
        self.inputs: tuple[tuple[Any, ...], dict[str, Any]] | None = None
        self.output: Any = None
        self.outcome = Outcome(None)
        self.is_done = False
        self._error: BaseException | None = None
        self._is_leaving = False
        self._log, self._logged = logged, list[Any]()  # of whoever runs; of this step
        self._may_run, self._has_stopped = threading.Semaphore(0), threading.Semaphore(0)
        context, state = contextvars.copy_context(), _ThreadState()

        def run() -> None:
            self._may_run.acquire()
            try:
                if not self._is_leaving:
                    with state.restored():
                        args, kwargs = call
                        self.outcome = outcome_of(context.run(step, *args, **kwargs), self._logged)
            except BaseException as error:  # raised again where the step was called
                self._error = error
            self.is_done = True
            self._has_stopped.release()

        self._thread = threading.Thread(target=run, name=f"LoRASweep {name}", daemon=True)
        self._thread.start()

    def go_on(self) -> None:
        """Run until the step arrives at the network or ends."""
        self.place.guest = self
        self._may_run.release()
        self._has_stopped.acquire()
        self.place.guest = None
        self._logged += self._log
        self._log.clear()
        if self._error is not None and not self._is_leaving:
            raise self._error

    def wait(self) -> None:
        """Let the others run; called in the step's own thread."""
        self._has_stopped.release()
        self._may_run.acquire()
        if self._is_leaving:
            raise _LeavingError

    def leave(self) -> None:
        """End the thread, wherever the step is."""
        if not self.is_done:
            self._is_leaving = True
            self.go_on()
        self._thread.join()


class _LeavingError(BaseException):
    """Ends a step whose outcome nobody needs; not an Exception, so that no step catches it."""


class _ThreadState:
    """What torch keeps for each thread: gradients on or off, autocast, the current device."""

    def __init__(self) -> None:
        self._grad = torch.is_grad_enabled()
        kinds = [kind for kind in ("cpu", "cuda") if torch.amp.is_autocast_available(kind)]
        self._autocast = [(k, torch.is_autocast_enabled(k), torch.get_autocast_dtype(k)) for k in kinds]
        self._device = torch.cuda.current_device() if torch.cuda.is_initialized() else None  # type: ignore[no-untyped-call]

    @contextmanager
    def restored(self) -> Iterator[None]:
        with ExitStack() as stack:
            if self._device is not None:
                torch.cuda.set_device(self._device)
            stack.enter_context(torch.set_grad_enabled(self._grad))
            for kind, enabled, dtype in self._autocast:
                if enabled:
                    stack.enter_context(torch.autocast(kind, dtype))
            yield


# --- batches


def _joined(inputs: Sequence[Any]) -> tuple[Any, list[int]]:
    """Return the inputs of several calls as those of one, and how many samples each has."""
    flat = [tree_flatten(each) for each in inputs]
    if any(spec != flat[0][1] for _, spec in flat):
        raise UnfitError("the adapters call the network with different arguments")
    sizes = [_samples(leaves) for leaves, _ in flat]
    joined: list[Any] = []
    for leaves in zip(*(leaves for leaves, _ in flat), strict=True):
        if all(isinstance(leaf, Tensor) for leaf in leaves) and _are_batches(leaves, sizes):
            try:
                joined.append(torch.cat(leaves))
            except RuntimeError as error:
                raise UnfitError(f"the inputs of the adapters cannot be joined: {error}") from error
        elif _are_equal(leaves):
            joined.append(leaves[0])
        else:
            raise UnfitError("the network's arguments are no batches with the samples in the first dimension")
    return tree_unflatten(joined, flat[0][1]), sizes


def _samples(leaves: Sequence[Any]) -> int:
    sizes = [leaf.shape[0] for leaf in leaves if isinstance(leaf, Tensor) and leaf.ndim]
    if not sizes:
        raise UnfitError("the network is called without a batch")
    return int(sizes[0])


def _are_batches(leaves: Sequence[Tensor], sizes: Sequence[int]) -> bool:
    return all(leaf.ndim and leaf.shape[0] == size for leaf, size in zip(leaves, sizes, strict=True))


def _are_equal(leaves: Sequence[Any]) -> bool:
    first = leaves[0]
    if isinstance(first, Tensor):
        return all(isinstance(leaf, Tensor) and torch.equal(leaf, first) for leaf in leaves)
    return all(leaf is first or leaf == first for leaf in leaves)


def _parts(output: Any, sizes: Sequence[int]) -> list[Any]:
    """Return what comes out for each call."""
    leaves, spec = tree_flatten(output)
    columns: list[Sequence[Any]] = []
    for leaf in leaves:
        if isinstance(leaf, Tensor):
            if not leaf.ndim or leaf.shape[0] != sum(sizes):
                raise UnfitError(f"the network returns a tensor of shape {tuple(leaf.shape)}, not one row per sample")
            columns.append(torch.split(leaf, list(sizes)))
        else:
            columns.append([leaf] * len(sizes))
    return [tree_unflatten([column[index] for column in columns], spec) for index in range(len(sizes))]
