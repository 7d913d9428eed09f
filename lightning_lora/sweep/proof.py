"""The proof, on one batch, that a way of running the step gives each adapter the gradient of its own loss."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import cached_property

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from lightning_lora.adapted_model import AdaptedModel
from lightning_lora.layers import LowRankAdapter
from lightning_lora.names import parameters_of
from lightning_lora.probe import RandomState, left_as_it_was
from lightning_lora.state import wide
from lightning_lora.sweep.attributes import (
    changed_attributes,
    changed_in_place,
    contents,
    holds_tensors,
    own_parts,
    plain_attributes,
)
from lightning_lora.sweep.forecast import bytes_kept
from lightning_lora.sweep.optimizers import Parameters
from lightning_lora.sweep.steps import Call, Outcome, Step, UnfitError, run_one
from lightning_lora.switching import using
from lightning_lora.trainer.calibration import untouched

Way = Callable[[Step, Mapping[str, Call]], dict[str, Outcome]]
Found = dict[str, tuple[Tensor, list[Tensor | None]]]  # of each adapter: its loss and its gradients

_CLOSE, _CLOSE_IN_LOW_PRECISION = 1e-4, 5e-2  # relative; a wrong gradient is off by its own size


@dataclass
class Sample:
    """What a training step keeps and changes.

    Attributes:
        kept: The bytes that it keeps for its backward pass; None if that is not known.
        own: The buffers that it changes and that the adapter has for itself.
        shared: Those that all adapters share.
        tensors: The attributes that it sets to tensors.
        plain: Those that it sets to plain values.
        gathered: Those in which it puts tensors, such as lists.
    """

    kept: int | None = None
    own: list[str] = field(default_factory=list)
    shared: list[str] = field(default_factory=list)
    tensors: list[str] = field(default_factory=list)
    plain: list[str] = field(default_factory=list)
    gathered: list[str] = field(default_factory=list)


class Proof:
    """Compares ways of running one batch with running it for each adapter in turn; leaves no trace in the module.

    Every adapter gets a random effect for the time being, since at their start all compute the same.

    Args:
        module: The adapted module, in the mode in which it trains.
        step: Its ``training_step``.
        calls: The arguments of that for each adapter.
        owned: What each adapter trains.
        own_values: Has an adapter's plain attributes in place.
    """

    def __init__(
        self,
        module: LightningModule,
        step: Step,
        calls: Mapping[str, Call],
        owned: Mapping[str, Parameters],
        own_values: Callable[[str], AbstractContextManager[None]],
    ) -> None:
        self.module, self.step, self.calls, self.owned, self.own_values = module, step, calls, owned, own_values
        self._is_random = False
        self._flops = self._flops_of_way = 0

    @cached_property
    def _expected(self) -> Found:
        """What running the batch for each adapter in turn gives."""
        with self._effects():
            with FlopCounterMode(display=False) as counter:
                found = self._in_turn()
            again = self._in_turn(shift=1, most=1)
        self._flops = counter.get_total_flops()
        # What draws random numbers would differ from run to run: such modules are compared in evaluation mode.
        self._is_random = any(not torch.equal(loss, found[name][0]) for name, (loss, _) in again.items())
        if self._is_random:
            with self._effects():
                found = self._in_turn()
        return found

    @property
    def flops(self) -> float | None:
        """The operations of the way that was checked last over those of running in turn; None if nothing is known."""
        return self._flops_of_way / self._flops if self._flops and self._flops_of_way else None

    def check(self, way: Way) -> None:
        """Raise if a way gives other losses or gradients.

        Raises:
            UnfitError: It does; the message names the adapter.
            Exception: Whatever the way itself raises.
        """
        expected = self._expected
        with self._effects(), self._same_draws(), FlopCounterMode(display=False) as counter:
            found = self._gradients(way(self.step, self.calls))
        self._flops_of_way = counter.get_total_flops()
        for name, (loss, gradients) in expected.items():
            own_loss, own = found[name]
            low = loss.dtype not in (torch.float32, torch.float64) or torch.is_autocast_enabled(loss.device.type)
            close = _CLOSE_IN_LOW_PRECISION if low else _CLOSE
            if not _near([own_loss], [loss], close):
                raise UnfitError(f"the loss of {name!r} is {float(own_loss):g} instead of {float(loss):g}")
            if not _near(own, gradients, close):
                raise UnfitError(f"the gradients of {name!r} are not those of its own loss")

    def sample(self) -> Sample:
        """Run the step of the first adapter, and return what it keeps and changes."""
        name, call = next(iter(self.calls.items()))
        shared = [*parameters_of(self.module), *(p for own in self.owned.values() for p in own.values())]
        with using(self.module, name), self._effects(), self._same_draws():
            trained, parts = AdaptedModel(self.module).trained, own_parts(self.module)
            attributes, content = plain_attributes(parts), contents(parts)
            before = {key: buffer.clone() for key, buffer in self.module.named_buffers()}
            with bytes_kept(shared) as kept:
                run_one(self.module, self.step, call, name)
            moved = [key for key, now in self.module.named_buffers() if not torch.equal(now, before.get(key, now))]
            after = plain_attributes(parts)
            found = Sample(
                kept[0], [key for key in moved if key in trained], [key for key in moved if key not in trained]
            )
            filled = changed_in_place(content, contents(parts))
            found.gathered += [key for part, key in filled if holds_tensors(vars(part)[key])]
            for place in changed_attributes(attributes, after):
                (found.tensors if holds_tensors(after[place]) else found.plain).append(place[1])
        return found

    def _in_turn(self, shift: int = 0, most: int | None = None) -> Found:
        found: Found = {}
        for name, call in list(self.calls.items())[:most]:
            with self._same_draws(shift), self.own_values(name):
                found |= self._gradients({name: run_one(self.module, self.step, call, name)})
        return found

    def _gradients(self, outcomes: Mapping[str, Outcome]) -> Found:
        losses = [each.loss for each in outcomes.values() if each.loss is not None and each.loss.requires_grad]
        if len(losses) < len(outcomes):
            raise UnfitError("training_step returned no loss for the first batch")
        parameters = [p for name in outcomes for p in self.owned[name].values()]
        gradients = iter(torch.autograd.grad(torch.stack(losses).sum(), parameters, allow_unused=True))
        return {
            name: (loss.detach(), [next(gradients) for _ in self.owned[name]])
            for (name, _), loss in zip(outcomes.items(), losses, strict=True)
        }

    @contextmanager
    def _same_draws(self, shift: int = 0) -> Iterator[None]:
        with untouched(self.module):
            torch.manual_seed(shift)
            yield

    @contextmanager
    def _effects(self) -> Iterator[None]:
        with ExitStack() as undo:
            undo.enter_context(left_as_it_was(self.module))
            undo.enter_context(RandomState())
            undo.enter_context(torch.enable_grad())
            undo.enter_context(_random_effects(self.module, list(self.calls)))
            if self._is_random:
                self.module.eval()
            yield


@contextmanager
def _random_effects(module: nn.Module, names: Sequence[str]) -> Iterator[None]:
    """Fill the factors that are zero, inside the block."""
    factors: list[Tensor] = []
    for name in names:
        with using(module, name):
            adapters = AdaptedModel(module).adapters.values()
            factors += [each.zero_factor() for each in adapters if isinstance(each, LowRankAdapter)]
    kept = [factor.detach().clone() for factor in factors]
    generator = torch.Generator().manual_seed(0)
    try:
        with torch.no_grad():
            for factor in factors:
                factor.add_((0.02 * torch.randn(factor.shape, generator=generator)).to(factor))
        yield
    finally:
        with torch.no_grad():
            for factor, value in zip(factors, kept, strict=True):
                factor.copy_(value)


def _near(found: Sequence[Tensor | None], expected: Sequence[Tensor | None], close: float) -> bool:
    pairs = [(a, b) for a, b in zip(found, expected, strict=True) if a is not None or b is not None]
    difference = sum(float(wide(_or_zeros(a, b) - _or_zeros(b, a)).abs().square().sum()) for a, b in pairs)
    size = sum(float(wide(b).abs().square().sum()) for _, b in pairs if b is not None)
    return difference <= close**2 * size


def _or_zeros(one: Tensor | None, other: Tensor | None) -> Tensor:
    return one if one is not None else torch.zeros_like(other)  # type: ignore[arg-type] # one of the two is there
