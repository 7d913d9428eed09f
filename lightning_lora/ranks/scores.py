"""What each component of the factors is worth: component ``i`` is row ``a_i`` of ``A`` with column ``b_i`` of ``B``.

A score takes what one step says before the optimizer changes anything (``note``), and counts it once the optimizer has
stepped (``commit``), so that skipped steps do not count. Vectors hold the components of all adapters in a row.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from statistics import median
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from lightning_lora.layers import LoRALayer, LowRankAdapter
from lightning_lora.names import listed
from lightning_lora.sharding import is_sharded, local

BETA = 0.85  # of the running means, as in AdaLoRA


class Averages:
    """The running means of an importance and of its uncertainty.

    Attributes:
        mean: ``I`` of AdaLoRA, eq. 9.
        uncertainty: ``U``, eq. 10.
    """

    def __init__(self, like: Tensor) -> None:
        self.mean = torch.zeros_like(like, dtype=torch.float32)
        self.uncertainty = torch.zeros_like(self.mean)

    def update(self, importance: Tensor, where: Tensor | None = None) -> None:
        """Count one step, whose importance is not negative, where it is finite; ``where`` says of which entries."""
        valid = importance < torch.inf  # also not NaN; isfinite takes four passes over memory
        if where is not None:
            valid &= where
        self.mean.lerp_(torch.where(valid, importance, self.mean), 1 - BETA)
        distance = (importance - self.mean).abs_()
        self.uncertainty.lerp_(torch.where(valid, distance, self.uncertainty), 1 - BETA)

    @property
    def sensitivity(self) -> Tensor:
        """Their product, AdaLoRA's eq. 11."""
        return self.mean * self.uncertainty

    def reorder(self, dimension: int, order: Tensor) -> None:
        """Put the numbers of one dimension into another order."""
        order = order.to(self.mean.device)
        self.mean, self.uncertainty = (t.index_select(dimension, order) for t in (self.mean, self.uncertainty))

    def state(self) -> list[Tensor]:
        """Return copies of both."""
        return [self.mean.cpu().clone(), self.uncertainty.cpu().clone()]

    def load(self, state: Sequence[Tensor]) -> None:
        """Take what ``state`` returned."""
        self.mean, self.uncertainty = (tensor.to(self.mean.device, copy=True) for tensor in state)


class Scores:
    """The worth of every component of some adapters.

    Attributes:
        needs_directions: Whether components must be singular directions to be compared.

    Args:
        adapters: The adapters by name.
    """

    needs_directions = False

    def __init__(self, adapters: Mapping[str, Any]) -> None:
        self.adapters = dict(adapters)

    def note(self, held: Collection[int]) -> None:
        """Take what the gradients of the parameters with these identities say."""

    def commit(self) -> None:
        """Count what was noted."""

    def watch(self, layers: Mapping[str, LoRALayer]) -> None:
        """Look at forward passes from now on, until ``rest``: the next event is near."""

    def rest(self) -> None:
        """Stop looking at forward passes."""

    def reset(self) -> None:
        """Begin anew, with other components."""

    def reorder(self, name: str, order: Tensor) -> None:
        """Follow the components of an adapter into another order, if the averages outlive an event."""

    def values(self) -> dict[str, list[float]]:
        """Return the worth of each component, by the names of the adapters."""
        raise NotImplementedError

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint holds."""
        raise NotImplementedError

    def load(self, state: Mapping[str, Any]) -> None:
        """Take what ``state`` returned."""
        raise NotImplementedError


class _Vector(Scores):
    """Scores with one number for each component, gathered from all processes in one vector."""

    def __init__(self, adapters: Mapping[str, LowRankAdapter]) -> None:
        super().__init__(adapters)
        self.sizes = [adapter.spec.rank for adapter in adapters.values()]
        self.device = next(iter(adapters.values())).A.device

    def zeros(self) -> Tensor:
        """Return a number for every component."""
        return torch.zeros(sum(self.sizes), device=self.device)

    def joined(self, parts: Mapping[str, Tensor]) -> tuple[Tensor, Tensor | None]:
        """Return the vector with these parts, and for each component whether it has one; None if all do."""
        vector = torch.cat(
            [
                parts[name].to(self.device, torch.float32) if name in parts else self._none_of(size)
                for name, size in zip(self.adapters, self.sizes, strict=True)
            ]
        )
        if len(parts) == len(self.sizes):
            return self._summed(vector), None
        has = torch.tensor([name in parts for name in self.adapters]).repeat_interleave(torch.tensor(self.sizes))
        return self._summed(vector), has.to(self.device)

    def _none_of(self, size: int) -> Tensor:
        return torch.zeros(size, device=self.device, dtype=torch.float32)  # whatever torch's default is

    def _summed(self, vector: Tensor) -> Tensor:
        """Return the sum over processes that have parts of the factors."""
        factor: Any = next(iter(self.adapters.values())).B
        if is_sharded(factor):
            for group in factor.device_mesh.get_all_groups():
                torch.distributed.all_reduce(vector, group=group)
        return vector

    def by_name(self, vector: Tensor) -> dict[str, list[float]]:
        """Return the parts of a vector."""
        parts = torch.split(vector.double().cpu(), self.sizes)
        return {name: part.tolist() for name, part in zip(self.adapters, parts, strict=True)}


class GateScores(_Vector):
    """Running means of ``|<b_i, dL/db_i>|``, the derivative of the loss by a factor of 1 before the component.

    It equals ``|<a_i, dL/da_i>|``, needs no further parameter, and fits any start of the factors.

    Args:
        adapters: The adapters by name.
        regrows: Whether components that are out of use have a score, too: the norm of their gradient, ``|dL/db_i|``,
            times the median of score over norm of the layer's components in use.
    """

    needs_directions = True

    def __init__(self, adapters: Mapping[str, LowRankAdapter], *, regrows: bool = False) -> None:
        super().__init__(adapters)
        self.regrows = regrows
        self.reset()
        self._noted: dict[str, Tensor] = {}
        self._squares: dict[str, Tensor] = {}

    @override
    def reset(self) -> None:
        self.gates, self.growth = Averages(self.zeros()), Averages(self.zeros())

    @override
    @torch.no_grad()
    def note(self, held: Collection[int]) -> None:
        for name, adapter in self.adapters.items():
            if id(adapter.B) not in held or adapter.B.grad is None:
                continue
            B, gradient = local(adapter.B.detach()).float(), local(adapter.B.grad).float()
            self._noted[name] = _over_rows(B * gradient)
            if self.regrows and adapter.kept is None:
                self._squares[name] = _over_rows(gradient.square())

    @override
    def commit(self) -> None:
        noted, self._noted = self._noted, {}
        squares, self._squares = self._squares, {}
        if noted:
            vector, has = self.joined(noted)
            self.gates.update(vector.abs(), has)
        if squares:
            vector, has = self.joined(squares)
            self.growth.update(vector.sqrt(), has)

    @override
    def values(self) -> dict[str, list[float]]:
        found = self.by_name(self.gates.mean)
        if not self.regrows:
            return found
        growth = self.by_name(self.growth.mean)
        usual = {name: self._usual_gates([name], found, growth) for name in self.adapters}
        of_all = self._usual_gates(list(self.adapters), found, growth)
        for name, adapter in self.adapters.items():
            for number, is_used in enumerate(adapter.in_use.tolist()):
                if not is_used:
                    found[name][number] = growth[name][number] * (usual[name] or of_all or 0.0)
        return found

    def _usual_gates(
        self, names: Sequence[str], gates: Mapping[str, list[float]], growth: Mapping[str, list[float]]
    ) -> float | None:
        """Return the median score of components in use by the norm of their gradient; None without any."""
        ratios = [
            gate / norm
            for name in names
            for gate, norm, is_used in zip(gates[name], growth[name], self.adapters[name].in_use.tolist(), strict=True)
            if is_used and norm > 0
        ]
        return median(ratios) if ratios else None

    @override
    def state(self) -> dict[str, Any]:
        return {"gates": self.gates.state(), "growth": self.growth.state()}

    @override
    def load(self, state: Mapping[str, Any]) -> None:
        self.gates.load(state["gates"])
        self.growth.load(state["growth"])


def _factors(adapter: LowRankAdapter) -> tuple[tuple[Tensor, int], ...]:
    return (adapter.A, -2), (adapter.B, -1)


class AdaLoRAScores(Scores):
    """AdaLoRA's scores: for a component, the mean over the elements of its row and of its column of ``I * U``.

    ``I`` and ``U`` are the running means of ``|w * dL/dw|`` of each element and of its distance from ``I``.

    Args:
        adapters: The adapters by name.
        factors_of: The tensors of an adapter, and which dimension of each counts the components.

    Raises:
        ValueError: The factors are divided over processes.

    Source:
        Zhang et al. 2023, arXiv:2303.10512, eq. 8 to 11.
    """

    def __init__(
        self,
        adapters: Mapping[str, Any],
        factors_of: Callable[[Any], Sequence[tuple[Tensor, int]]] = _factors,
    ) -> None:
        super().__init__(adapters)
        self.factors_of = factors_of
        if any(is_sharded(tensor) for adapter in adapters.values() for tensor, _ in factors_of(adapter)):
            raise ValueError(
                "rank_schedule: score='adalora' keeps numbers of every element, and here processes have parts of the "
                "factors. Use score='gate'."
            )
        self.averages = {name: [Averages(t) for t, _ in factors_of(each)] for name, each in self.adapters.items()}
        self._noted: dict[str, list[Tensor]] = {}

    @override
    @torch.no_grad()
    def note(self, held: Collection[int]) -> None:
        for name, adapter in self.adapters.items():
            tensors = [tensor for tensor, _ in self.factors_of(adapter)]
            if all(id(tensor) in held and tensor.grad is not None for tensor in tensors):
                self._noted[name] = [(t.detach() * t.grad).abs_().float() for t in tensors if t.grad is not None]

    @override
    def commit(self) -> None:
        for name, found in self._noted.items():
            for average, importance in zip(self.averages[name], found, strict=True):
                average.update(importance)
        self._noted = {}

    @override
    def reorder(self, name: str, order: Tensor) -> None:
        for average, (_, dimension) in zip(self.averages[name], self.factors_of(self.adapters[name]), strict=True):
            average.reorder(dimension, order)

    @override
    def values(self) -> dict[str, list[float]]:
        found = {}
        for name, adapter in self.adapters.items():
            total = torch.zeros(())
            for average, (_, dimension) in zip(self.averages[name], self.factors_of(adapter), strict=True):
                each = average.sensitivity.movedim(dimension, 0).flatten(1)
                total = total + each.mean(1).cpu()
            found[name] = total.double().tolist()
        return found

    @override
    def state(self) -> dict[str, Any]:
        return {name: [average.state() for average in each] for name, each in self.averages.items()}

    @override
    def load(self, state: Mapping[str, Any]) -> None:
        for name, each in self.averages.items():
            for average, saved in zip(each, state[name], strict=True):
                average.load(saved)


class EnergyScores(_Vector):
    """The mean square of what a component adds to the output, ``s^2 * |b_i|^2 * mean of (a_i @ x)^2``.

    The inputs ``x`` are those of the training's forward passes in the last steps before an event, of all processes.
    """

    def __init__(self, adapters: Mapping[str, LowRankAdapter]) -> None:
        super().__init__(adapters)
        if any(is_sharded(adapter.B) for adapter in adapters.values()):
            raise ValueError(
                "rank_schedule: score='energy' reads the factors in the forward pass, and here processes have parts of "
                "them. Use score='gate'."
            )
        self.sums, self.counts = self.zeros(), self.zeros()
        self._sums, self._counts = self.zeros(), self.zeros()  # of the step that is being made
        self._hooks: list[Any] = []
        self._unseen: set[str] = set()

    @override
    def watch(self, layers: Mapping[str, LoRALayer]) -> None:
        ends = torch.tensor(self.sizes).cumsum(0).tolist()
        for (name, adapter), end in zip(self.adapters.items(), ends, strict=True):
            place = slice(end - adapter.spec.rank, end)
            hook = layers[name].register_forward_pre_hook(self._seeing(name, adapter, place), with_kwargs=True)
            self._hooks.append(hook)

    def _seeing(self, name: str, adapter: LowRankAdapter, place: slice) -> Callable[..., None]:
        def see(layer: LoRALayer, args: Any, kwargs: Any) -> None:
            if not (layer.training and torch.is_grad_enabled()):
                return
            tokens = adapter.tokens_in(layer, [*args, *kwargs.values()])
            if tokens is None or adapter.A.ndim > 2:
                self._unseen.add(name)
                return
            with torch.no_grad():
                hidden = tokens.detach().flatten(0, -2).to(adapter.A.dtype) @ adapter.A.T
                self._sums[place] += hidden.float().square().sum(0)
                self._counts[place] += len(hidden)

        return see

    @override
    def rest(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    @override
    def commit(self) -> None:
        if not self._hooks:
            return
        step = torch.stack([self._sums, self._counts])
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(step)
        step = torch.where(step.isfinite().all(0), step, 0.0)
        self.sums, self.counts = self.sums + step[0], self.counts + step[1]
        self._sums, self._counts = self.zeros(), self.zeros()

    @override
    @torch.no_grad()
    def values(self) -> dict[str, list[float]]:
        if self._unseen:
            raise ValueError(
                f"rank_schedule: score='energy' cannot see the inputs of {listed(sorted(self._unseen))}. Use "
                "score='gate', or leave them out with exclude_modules."
            )
        pairs = self.adapters.items()
        squares, _ = self.joined({n: a.spec.scaling**2 * _over_rows(a.B.detach().float().square()) for n, a in pairs})
        found = self.by_name(squares * self.sums / self.counts.clamp_min(1))
        self.sums, self.counts = self.zeros(), self.zeros()
        return found

    @override
    def state(self) -> dict[str, Any]:
        return {"sums": self.sums.cpu().clone(), "counts": self.counts.cpu().clone()}

    @override
    def load(self, state: Mapping[str, Any]) -> None:
        self.sums, self.counts = (state[name].to(self.device) for name in ("sums", "counts"))


def scores_of(score: str, adapters: Mapping[str, LowRankAdapter], *, regrows: bool) -> Scores:
    """Return the scores of this name.

    Raises:
        ValueError: They cannot be computed for these adapters.
    """
    if score == "gate":
        return GateScores(adapters, regrows=regrows)
    return AdaLoRAScores(adapters) if score == "adalora" else EnergyScores(adapters)


def _over_rows(values: Tensor) -> Tensor:
    """Return the sum for each component of values in the shape of ``B``."""
    return values.sum(tuple(range(values.ndim - 1)))
