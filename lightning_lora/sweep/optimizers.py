"""Groups of the user's optimizers for each adapter of a sweep, with its own learning rate, decay and clipping."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.fabric.utilities.rank_zero import rank_zero_warn  # type: ignore[attr-defined]
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.optim import LBFGS, Optimizer
from torch.optim.lr_scheduler import CyclicLR, ReduceLROnPlateau

from lightning_lora.adapted_model import AdaptedModel
from lightning_lora.names import listed
from lightning_lora.optimizers import (
    RATES,
    adopt,
    all_schedulers,
    fast_parameters,
    kept_schedulers,
    names_of_parameters,
    relist,
)
from lightning_lora.sweep.candidates import Candidate
from lightning_lora.switching import using
from lightning_lora.trainer.lightning_patches import overrides

Scale = Callable[[Any], Any]
Parameters = dict[str, nn.Parameter]  # what one adapter trains, by the names that it has while it is active


def parameters_of_adapters(module: nn.Module, names: Sequence[str]) -> dict[str, Parameters]:
    """Return what each adapter trains."""
    found: dict[str, Parameters] = {}
    for name in names:
        with using(module, name):
            trained = AdaptedModel(module).trained.items()
            found[name] = {key: tensor for key, tensor in trained if isinstance(tensor, nn.Parameter)}
    return found


def refuse_coupling(module: nn.Module, optimizers: Sequence[Optimizer], schedulers: Sequence[Any]) -> None:
    """Refuse optimizers and schedulers in which one adapter would change what another one does."""
    for name, kept in kept_schedulers(module, optimizers, schedulers).items():
        raise MisconfigurationException(
            f"LoRASweep does not see the steps of self.{name}, a {type(kept).__name__} that configure_optimizers does "
            "not return, and they would count once for each adapter. Return it beside the optimizer."
        )
    for optimizer in optimizers:
        if isinstance(optimizer, LBFGS):
            raise MisconfigurationException(
                "LoRASweep cannot share LBFGS among adapters: it takes one step for all parameters together. Use an "
                "optimizer that steps each parameter by itself, such as AdamW or SGD."
            )
    for scheduler in all_schedulers(schedulers):
        if isinstance(scheduler, ReduceLROnPlateau):
            raise MisconfigurationException(
                "LoRASweep cannot share ReduceLROnPlateau among adapters: one metric would lower the learning rates of "
                "all. Use a scheduler that depends on the step alone; adapters that lose are stopped by keep."
            )


def warn_of_coupling(module: LightningModule, optimizers: Sequence[Optimizer]) -> None:
    """Name what steps all adapters together and may compute with all of their parameters or gradients at once."""
    steps = [f"step of {type(each).__name__}" for each in optimizers if not _is_known(type(each))]
    steps += [f"optimizer_step of {type(module).__name__}"] if overrides(module, "optimizer_step") else []
    if steps and module.automatic_optimization:
        rank_zero_warn(
            f"LoRASweep: {listed(list(dict.fromkeys(steps)))} runs once for all adapters. If it treats each parameter "
            "by itself, all is well. If it computes something over all of them, such as the norm of all gradients in "
            "SAM, it couples the adapters. With automatic_optimization = False, each adapter takes its steps alone."
        )


def _is_known(kind: type[Optimizer]) -> bool:
    return kind.step.__module__.startswith(("torch.optim", "torchao.", "bitsandbytes."))


def split_groups(
    module: nn.Module,
    optimizers: Sequence[Optimizer],
    schedulers: Sequence[Any],
    chosen: Mapping[str, Candidate],
    first: str,
) -> None:
    """Give every adapter groups of its own, like those of the first, in optimizers that hold that one alone.

    The result is as if the user had built the optimizers and schedulers with the adapter's learning rate.

    Args:
        module: The adapted module.
        optimizers: Changed in place.
        schedulers: Those bound to them; changed in place.
        chosen: The adapters.
        first: The one that the optimizers hold.

    Raises:
        MisconfigurationException: Options do not apply to the optimizer, or it is unclear where a parameter belongs.
    """
    owned = parameters_of_adapters(module, list(chosen))
    labels = names_of_parameters(module)
    names = {id(parameter): name for name, parameter in owned[first].items()}
    lost = {name: dict(each) for name, each in owned.items()}
    for optimizer in optimizers:
        _note_peaks(optimizer, schedulers)
        count = len(optimizer.param_groups)
        bases = [_peak(group) for group in optimizer.param_groups]
        decays = [group.get("weight_decay") for group in optimizer.param_groups]
        places: list[tuple[int, Scale]] = [(0, _unchanged)] * count
        for candidate in (chosen[first], *(each for name, each in chosen.items() if name != first)):
            own = lost[candidate.name]
            for index in range(count):
                source = optimizer.param_groups[index]
                scale = _scale(candidate, bases[index])
                if candidate.name == first:
                    own_group = source
                    places[index] = (index, scale)
                    for parameter in source["params"]:
                        own.pop(names[id(parameter)], None)
                else:
                    held = [names[id(p)] for p in source["params"]]
                    if len(optimizers) == count == 1:  # there is no other place
                        held += [name for name in own if name not in held]
                    wanted = [own.pop(name) for name in held if name in own]
                    own_group = _twin(optimizer, source, wanted, labels)
                    places.append((index, scale))
                _set_decay(own_group, candidate, optimizer, decays[index])
        _split_fast(module, optimizer, chosen, owned, places)
        _finish(optimizer, places, schedulers, _owners(owned))
    if names_lost := [f"{key} of {name!r}" for name, own in lost.items() for key in own]:
        raise MisconfigurationException(
            f"LoRASweep: it is unclear which optimizer group {listed(names_lost)} belongs to, because {first!r}, which "
            "trains the most tensors, does not train it. Let one adapter of the sweep train all that any trains, or "
            "give the optimizer a single group."
        )


def _note_peaks(optimizer: Optimizer, schedulers: Sequence[Any]) -> None:
    """Write the peaks that a CyclicLR keeps for itself into the groups, where a OneCycleLR has them."""
    for scheduler in all_schedulers(schedulers):
        if isinstance(scheduler, CyclicLR) and scheduler.optimizer is optimizer:
            for group, peak in zip(optimizer.param_groups, scheduler.max_lrs, strict=True):
                group["max_lr"] = peak


def _peak(group: Mapping[str, Any]) -> Any:
    """Return the learning rate that an option of the user's set: a cycle's peak, or where a schedule starts."""
    return group.get("max_lr", group.get("initial_lr", group["lr"]))


def _unchanged(rate: Any) -> Any:
    return rate


def _scale(candidate: Candidate, base: Any) -> Scale:
    """Return what makes an adapter's learning rate from one of the optimizer, exactly as if it had been built so."""
    if candidate.lr is None:
        factor = candidate.lr_multiplier
        return _unchanged if factor == 1 else lambda rate: rate * factor
    wanted = candidate.lr
    if not float(base):
        raise MisconfigurationException(
            f"LoRASweep, adapter {candidate.name!r}: lr={wanted:g} cannot replace the optimizer's learning rate of 0, "
            "since schedules are scaled from it. Build the optimizer with a learning rate above 0."
        )

    def scaled(rate: Any) -> Any:
        if isinstance(rate, Tensor):
            return rate / base * wanted
        return wanted if rate == base else rate / base * wanted

    return scaled


def _twin(optimizer: Optimizer, group: Mapping[str, Any], wanted: list[nn.Parameter], labels: Mapping[int, str]) -> Any:
    twin = {key: copy.copy(value) for key, value in group.items() if key not in ("params", "param_names")}
    twin |= {key: [] for key in ("params", "param_names") if key in group}
    optimizer.param_groups.append(twin)
    for parameter in wanted:
        adopt(optimizer, twin, parameter, labels[id(parameter)])
    return twin


def _set_decay(group: dict[str, Any], candidate: Candidate, optimizer: Optimizer, first: Any) -> None:
    if candidate.weight_decay is None:
        if first is not None:  # the group may be a copy of one that has got another adapter's
            group["weight_decay"] = first
        return
    if "weight_decay" not in group:
        raise MisconfigurationException(
            f"LoRASweep, adapter {candidate.name!r}: {type(optimizer).__name__} has no weight_decay; leave it out."
        )
    group["weight_decay"] = candidate.weight_decay


def _split_fast(
    module: nn.Module,
    optimizer: Optimizer,
    chosen: Mapping[str, Candidate],
    owned: Mapping[str, Parameters],
    places: list[tuple[int, Scale]],
) -> None:
    """Split the groups of adapters with LoRA+: their ``B`` gets a group of its own."""
    owners = _owners(owned)
    fast: dict[str, set[int]] = {}
    for name, candidate in chosen.items():
        if candidate.lr_ratio != 1.0:
            with using(module, name):
                fast[name] = fast_parameters(module)
    for group, (index, scale) in list(zip(optimizer.param_groups, places, strict=True)):
        owner = owners.get(id(group["params"][0])) if group["params"] else None
        if owner not in fast:
            continue
        flags = [id(parameter) in fast[owner] for parameter in group["params"]]
        twin = {key: copy.copy(value) for key, value in group.items()}
        for key in ("params", "param_names"):
            if key in group:
                values = group[key]
                twin[key] = [value for value, flag in zip(values, flags, strict=True) if flag]
                group[key] = [value for value, flag in zip(values, flags, strict=True) if not flag]
        optimizer.param_groups.append(twin)
        places.append((index, _after(scale, chosen[owner].lr_ratio)))


def _after(scale: Scale, ratio: float) -> Scale:
    return lambda rate: scale(rate) * ratio


def _owners(owned: Mapping[str, Parameters]) -> dict[int, str]:
    return {id(parameter): name for name, own in owned.items() for parameter in own.values()}


def _finish(
    optimizer: Optimizer, places: list[tuple[int, Scale]], schedulers: Sequence[Any], owners: Mapping[int, str]
) -> None:
    """Set the learning rates of all groups, in the optimizer and its schedulers, and name the groups."""
    for scheduler in schedulers:
        relist(scheduler, optimizer, places)
    taken: dict[str, int] = {}
    for group, (index, scale) in zip(optimizer.param_groups, places, strict=True):
        for key in RATES:
            if isinstance(group.get(key), (int, float, Tensor)):
                group[key] = scale(group[key])
        owner = owners[id(group["params"][0])] if group["params"] else f"empty{index}"
        before = optimizer.param_groups[index].get("name") if index else None
        label = f"{before}.{owner}" if before else owner
        taken[label] = taken.get(label, 0) + 1
        group["name"] = label if taken[label] == 1 else f"{label}.{taken[label]}"


@contextmanager
def only_gradients_of(parameters: Mapping[str, Parameters], name: str) -> Iterator[None]:
    """Hide the gradients of all adapters but one inside the block."""
    others = [p for other, own in parameters.items() if other != name for p in own.values() if p.grad is not None]
    hidden = [p.grad for p in others]
    for parameter in others:
        parameter.grad = None
    try:
        yield
    finally:
        for parameter, gradient in zip(others, hidden, strict=True):
            parameter.grad = gradient


@contextmanager
def own_groups(optimizers: Sequence[Optimizer], own: Parameters) -> Iterator[None]:
    """Let optimizers show one adapter's groups alone inside the block, for steps and hooks that read or set rates."""
    mine = {id(parameter) for parameter in own.values()}
    every = [(optimizer, optimizer.param_groups) for optimizer in optimizers]
    for optimizer, groups in every:
        optimizer.param_groups = [group for group in groups if group["params"] and id(group["params"][0]) in mine]
    try:
        yield
    finally:
        for optimizer, groups in every:
            optimizer.param_groups = groups


class Turns:
    """What a step that steps the optimizers itself finds and leaves, when it runs once for each adapter of a batch.

    Each adapter begins with the learning rates, schedules and step count that the batch began with, and sees no
    gradients but its own, which it may gather over several batches.

    Args:
        trainer: The Trainer, whose module optimizes manually.
        owned: What each adapter trains.
    """

    def __init__(self, trainer: Trainer, owned: Mapping[str, Parameters]) -> None:
        self._owned = owned
        self._groups = [group for optimizer in trainer.optimizers for group in optimizer.param_groups]
        self._schedulers = [config.scheduler for config in trainer.lr_scheduler_configs]
        self._progress = trainer.fit_loop.epoch_loop.manual_optimization.optim_step_progress
        self._begun = self._state()

    @contextmanager
    def of(self, name: str) -> Iterator[None]:
        """Let the step of one adapter run inside the block, as if it were the batch's first."""
        groups, schedules, progress = copy.deepcopy(self._begun)
        for group, options in zip(self._groups, groups, strict=True):
            group.update(options)
        for scheduler, state in zip(self._schedulers, schedules, strict=True):
            scheduler.load_state_dict(state)
        self._progress.load_state_dict(progress)
        own = {*self._owned[name].values()}
        held = [group["params"] for group in self._groups]
        for group, parameters in zip(self._groups, held, strict=True):
            group["params"] = [parameter for parameter in parameters if parameter in own]
        try:
            with only_gradients_of(self._owned, name):
                yield
        finally:
            for group, parameters in zip(self._groups, held, strict=True):
                group["params"] = parameters

    def _state(self) -> tuple[list[dict[str, Any]], list[dict[str, Any]], dict[str, Any]]:
        options = [{key: each for key, each in group.items() if key != "params"} for group in self._groups]
        schedules = [scheduler.state_dict() for scheduler in self._schedulers]
        return copy.deepcopy((options, schedules, self._progress.state_dict()))


def learning_rates(
    optimizers: Sequence[Optimizer], owned: Mapping[str, Parameters], *, peak: bool = False
) -> dict[str, float]:
    """Return the largest learning rate of each adapter's groups now, or the one that its schedule is built on."""
    owners, found = _owners(owned), dict[str, float]()
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            if group["params"] and (owner := owners.get(id(group["params"][0]))) is not None:
                found[owner] = max(found.get(owner, 0.0), float(_peak(group) if peak else group["lr"]))
    return found


def check_rates_differ(module: LightningModule, rates: Mapping[str, float], wanted: Mapping[str, float]) -> None:
    """Refuse a schedule that gives all adapters one learning rate, where other ones were asked for.

    Args:
        module: The module.
        rates: The learning rates now.
        wanted: Those that the optimizers began with.
    """
    if len(set(wanted.values())) > 1 and len(set(rates.values())) == 1 and any(rates.values()):
        raise MisconfigurationException(
            f"LoRASweep: a scheduler or hook of {type(module).__name__} has set the learning rate of every adapter to "
            f"{max(rates.values()):g}, so their own ones have no effect. Use a scheduler that scales each group's "
            "rate, such as LambdaLR."
        )


def step_together(optimizers: Sequence[Optimizer]) -> None:
    """Have torch's optimizers update all tensors of a group at once, unless the user has said how they do it.

    Many adapters have many small factors, and on a CPU torch would update one after the other.
    """
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            if group.get("foreach", False) is None and not group.get("fused") and not group.get("differentiable"):
                group["foreach"] = True


@torch.no_grad()
def drop_gradients(parameters: Parameters) -> None:
    """Leave an adapter out of the next optimizer step, weight decay included."""
    for parameter in parameters.values():
        parameter.grad = None
