"""Optimizers of an adapted model: they hold exactly the trainable parameters, in groups of LoRA+ if asked for."""

from __future__ import annotations

import copy
import inspect
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from itertools import chain
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_lora.adapted_model import AdaptedModel
from lightning_lora.layers import LoRALayer, LowRankAdapter
from lightning_lora.names import clean_name, listed, parameters_of
from lightning_lora.option_checks import check_positive

RATES = ("lr", "initial_lr", "max_lr", "min_lr")  # of a parameter group
RATE_LISTS = ("base_lrs", "_last_lr", "max_lrs", "min_lrs")  # of a scheduler, one entry a group
_OTHER_LISTS = ("lr_lambdas", "base_momentums", "max_momentums")  # of torch's schedulers, likewise
_USED = "_lora_used"  # the mark of an optimizer that has been part of a fit


def parameter_groups(
    module: nn.Module, lr: float, *, lr_ratio: float = 1.0, weight_decay: float | None = None
) -> list[dict[str, Any]]:
    """Return the optimizer groups of an adapted module: its trainable parameters, split for LoRA+ if asked for.

    Args:
        module: An adapted module.
        lr: Learning rate of every parameter but ``B``.
        lr_ratio: Learning rate of ``B`` over that of ``A``; LoRA+ recommends about 16.
        weight_decay: Weight decay of all groups; None leaves it to the optimizer.

    Returns:
        One group, or two if ``lr_ratio`` is not 1, named ``"lora"`` and ``"lora_B"``.

    Raises:
        ValueError: Nothing is trainable, or ``lr_ratio`` is invalid.

    Source:
        Hayou et al. 2024, "LoRA+", arXiv:2402.12354.
    """
    check_positive("lr_ratio", lr_ratio)
    trainable = [parameter for parameter in parameters_of(module) if parameter.requires_grad]
    if not trainable:
        raise ValueError(f"{type(module).__name__} has no trainable parameters; call attach first.")
    fast = fast_parameters(module) if lr_ratio != 1.0 else set()
    groups = [
        {"name": "lora", "lr": lr, "params": [p for p in trainable if id(p) not in fast]},
        {"name": "lora_B", "lr": lr * lr_ratio, "params": [p for p in trainable if id(p) in fast]},
    ]
    decay = {} if weight_decay is None else {"weight_decay": weight_decay}
    return [group | decay for group in groups if group["params"]]


def repair_optimizers(
    module: nn.Module,
    optimizers: Sequence[Optimizer],
    schedulers: Iterable[Any] = (),
    *,
    lr_ratio: float = 1.0,
    fresh: bool = False,
) -> None:
    """Edit optimizers in place so that they hold exactly the trainable parameters of a module.

    Trainable parameters that no optimizer holds (it may have been built before the adapters) join the group that held
    the frozen weight of their layer, or the only group. Frozen parameters leave. Existing groups keep their number and
    order, so schedulers keep working; LoRA+ groups are appended, and the schedulers extended.

    Args:
        module: The adapted module.
        optimizers: All its optimizers.
        schedulers: The learning rate schedulers bound to them, beside those that attributes of the module hold.
        lr_ratio: Learning rate of ``B`` over that of ``A``; 1 leaves the groups alone.
        fresh: Whether the training is to begin anew.

    Raises:
        ValueError: It is unclear which group a parameter belongs to, or no optimizer holds a trainable one; or an
            optimizer has been used before, and that would count.
    """
    check_positive("lr_ratio", lr_ratio)
    names = names_of_parameters(module)
    _refuse_used(optimizers, {"fresh=True": fresh, f"lr_ratio={lr_ratio:g}": lr_ratio != 1.0})
    _warn_of_strangers(module, optimizers)
    _adopt_unheld(module, optimizers, names)
    for optimizer in optimizers:
        _drop_frozen(optimizer)
        _sort_groups(optimizer, names)
    if not any(group["params"] for optimizer in optimizers for group in optimizer.param_groups):
        raise ValueError("No optimizer holds a trainable parameter; is everything frozen?")
    if lr_ratio != 1.0:
        fast, bound = fast_parameters(module), list(schedulers)
        bound += kept_schedulers(module, optimizers, bound).values()
        for optimizer in optimizers:
            _split_fast(optimizer, fast, lr_ratio, bound)


def _refuse_used(optimizers: Sequence[Optimizer], options: Mapping[str, bool]) -> None:
    needs_new = [option for option, is_set in options.items() if is_set]
    for optimizer in optimizers:
        if needs_new and vars(optimizer).get(_USED):
            raise ValueError(
                f"configure_optimizers returned an {type(optimizer).__name__} that an earlier fit has used, with its "
                f"state, groups and learning rates. Each fit needs a new one for {' and '.join(needs_new)}: make it in "
                "configure_optimizers, not in __init__."
            )
        vars(optimizer)[_USED] = True


def _warn_of_strangers(module: nn.Module, optimizers: Sequence[Optimizer]) -> None:
    known = {id(p) for part in module.modules() for p in part._parameters.values()}  # whatever parameters() returns
    held = (p for optimizer in optimizers for group in optimizer.param_groups for p in group["params"])
    if shapes := [str(tuple(p.shape)) for p in held if p.requires_grad and id(p) not in known]:
        warnings.warn(
            f"The optimizers hold {len(shapes)} tensors that are no parameters of {type(module).__name__}, of shapes "
            f"{listed(shapes)}: they are not frozen, they train, and no checkpoint holds them. Leave them out of "
            "configure_optimizers, or register the module that they belong to.",
            stacklevel=2,
        )


def unpack_configured(configured: Any) -> tuple[list[Optimizer], list[Any]]:
    """Return the optimizers and schedulers from any form that ``configure_optimizers`` may return."""
    if configured is None:
        return [], []
    if isinstance(configured, dict):
        configured = [configured]
    if not isinstance(configured, (list, tuple)):
        return [configured], []
    if len(configured) == 2 and isinstance(configured[0], list):
        optimizers, schedulers = configured
        schedulers = schedulers if isinstance(schedulers, list) else [schedulers]
    elif all(isinstance(entry, dict) for entry in configured):
        optimizers = [entry["optimizer"] for entry in configured]
        schedulers = [entry["lr_scheduler"] for entry in configured if "lr_scheduler" in entry]
    else:
        optimizers, schedulers = list(configured), []
    return optimizers, [entry["scheduler"] if isinstance(entry, dict) else entry for entry in schedulers]


def kept_schedulers(module: nn.Module, optimizers: Sequence[Optimizer], returned: Sequence[Any]) -> dict[str, Any]:
    """Return the schedulers of these optimizers that a module's attributes hold and it has not returned."""
    known = {id(each) for each in all_schedulers(returned)}
    steps = {name: each for name, each in vars(module).items() if callable(getattr(type(each), "step", None))}
    bound = {name: each for name, each in steps.items() if getattr(each, "optimizer", None) in optimizers}
    return {name: each for name, each in bound.items() if id(each) not in known and not hasattr(each, "param_groups")}


def all_schedulers(schedulers: Iterable[Any]) -> Iterator[Any]:
    """Yield schedulers and those that they are made of."""
    for scheduler in schedulers:
        yield scheduler
        yield from all_schedulers(getattr(scheduler, "_schedulers", ()))


def group_names(module: nn.Module, groups: Iterable[Mapping[str, Any]]) -> list[list[str]]:
    """Return the names of the parameters that an optimizer's groups hold."""
    names = names_of_parameters(module)
    return [[names.get(id(p), "?") for p in group["params"]] for group in groups]


def check_same_groups(theirs: list[list[list[str]]], ours: list[list[list[str]]]) -> None:
    """Refuse the state of optimizers that hold other parameters, by their names.

    Args:
        theirs: The names in a checkpoint: of each group of each optimizer.
        ours: The names here.

    Raises:
        ValueError: They differ; the order in a group does not matter.
    """
    if [list(map(set, groups)) for groups in theirs] == [list(map(set, groups)) for groups in ours]:
        return
    saved, mine = ({*chain(*chain(*names))} for names in (theirs, ours))
    only = {"the checkpoint": saved - mine, "this run": mine - saved}
    differing = "".join(f"; only in {where}: {listed(sorted(names))}" for where, names in only.items() if names)
    raise ValueError(
        "The checkpoint's optimizers hold different parameters from this run's, so optimizer state would be assigned "
        f"to the wrong parameters: {_group_sizes(theirs)} in the checkpoint, {_group_sizes(ours)} here{differing}. Use "
        f"the same {'modules_to_save, ' if differing else ''}configure_optimizers and lr_ratio, or start from the "
        "weights alone."
    )


def _group_sizes(names: list[list[list[str]]]) -> str:
    return "; ".join(f"groups of {[len(group) for group in groups]}" for groups in names) or "none"


def reordered_state(state: Mapping[str, Any], theirs: list[list[str]], ours: list[list[str]]) -> dict[str, Any]:
    """Return a copy of an optimizer's saved state, reordered for an optimizer that holds the parameters differently.

    Args:
        state: The result of ``Optimizer.state_dict``.
        theirs: The parameter names that it belongs to, one list a group.
        ours: The names that the other optimizer holds: in each group the same, in any order.
    """
    position = {name: index for index, name in enumerate(name for group in ours for name in group)}
    saved = [name for group in theirs for name in group]
    groups = []
    for group, their_names, our_names in zip(state["param_groups"], theirs, ours, strict=True):
        group = {**group, "params": [position[name] for name in our_names]}
        if "param_names" in group:
            labels = dict(zip(their_names, group["param_names"], strict=True))
            group["param_names"] = [labels[name] for name in our_names]
        groups.append(group)
    entries = {position[saved[index]]: dict(entry) for index, entry in state["state"].items()}
    return {**state, "state": entries, "param_groups": groups}


def unheld_parameters(module: nn.Module, groups: Iterable[Mapping[str, Any]]) -> list[str]:
    """Return the names of the trainable parameters that no optimizer group holds."""
    held = {id(p) for group in groups for p in group["params"]}
    return [clean_name(name) for name, p in module.named_parameters() if p.requires_grad and id(p) not in held]


def names_of_parameters(module: nn.Module) -> dict[int, str]:
    """Return the name of each parameter by its identity, without what wrappers add."""
    return {id(parameter): clean_name(name) for name, parameter in module.named_parameters()}


def fast_parameters(module: nn.Module) -> set[int]:
    """Return the factors that LoRA+ trains faster: ``B`` of every layer that starts with ``B = 0``."""
    adapters = [a for a in AdaptedModel(module).adapters.values() if isinstance(a, LowRankAdapter)]
    return {id(a.B) for a in adapters if a.zero_factor() is a.B}


def _adopt_unheld(module: nn.Module, optimizers: Sequence[Optimizer], names: dict[int, str]) -> None:
    places = [(optimizer, group) for optimizer in optimizers for group in optimizer.param_groups]
    place_of = {id(p): index for index, (_, group) in enumerate(places) for p in group["params"]}
    _warn_of_choice(module, place_of, names)
    unheld = []
    for part in module.modules():
        siblings = [*part.parameters(recurse=False)]
        if isinstance(part, LoRALayer):
            siblings += part.lora.parameters()
        for parameter in siblings:
            if not parameter.requires_grad or id(parameter) in place_of:
                continue
            index = _home(part, siblings, place_of, len(places))
            if index is None:
                unheld.append(names[id(parameter)])
                continue
            adopt(*places[index], parameter, names[id(parameter)])
            place_of[id(parameter)] = index
    if unheld:
        names_of_unheld = listed([*dict.fromkeys(unheld)])  # factors are met in the layer, and by themselves
        raise ValueError(
            f"No optimizer holds the trainable {names_of_unheld}, and it is unclear which of the {len(places)} "
            "parameter groups they belong to. Add them in configure_optimizers."
        )


def _warn_of_choice(module: nn.Module, held: Collection[int], names: Mapping[int, str]) -> None:
    """Say that all of the adapters will train where optimizers hold some of their parameters, as if these were chosen.

    Optimizers that hold none were built before the adapters.
    """
    layers = [part for part in module.modules() if isinstance(part, LoRALayer)]
    factors = dict.fromkeys(id(p) for layer in layers for p in layer.lora.parameters() if p.requires_grad)
    left_out = [names[factor] for factor in factors if factor not in held]
    if left_out and len(left_out) < len(factors):
        warnings.warn(
            f"The optimizers hold {len(factors) - len(left_out)} of {len(factors)} trainable parameters of the "
            f"adapters. The others were added, and train: {listed(left_out)}. To keep some as they are, such as A in "
            "LoRA-FA, set their requires_grad to False in configure_optimizers.",
            stacklevel=2,
        )


def _home(part: nn.Module, siblings: list[nn.Parameter], place_of: dict[int, int], places: int) -> int | None:
    weight = part._parameters.get("weight")
    if weight is not None and id(weight) in place_of:
        return place_of[id(weight)]
    found = {place_of[id(sibling)] for sibling in siblings if id(sibling) in place_of}
    if len(found) == 1:
        return found.pop()
    return 0 if places == 1 else None


def adopt(optimizer: Optimizer, group: dict[str, Any], parameter: nn.Parameter, name: str) -> None:
    """Add a parameter to one of an optimizer's groups."""
    group["params"].append(parameter)
    if "param_names" in group:
        group["param_names"].append(name)
    if optimizer.state:  # Adagrad and others create their state when they are built
        options = {key: value for key, value in group.items() if key not in ("params", "param_names")}
        accepted = inspect.signature(type(optimizer)).parameters
        defaults = {key: value for key, value in optimizer.defaults.items() if key in accepted}
        twin = type(optimizer)([{**options, "params": [parameter]}], **defaults)
        if parameter in twin.state:
            optimizer.state[parameter] = twin.state[parameter]


def _drop_frozen(optimizer: Optimizer) -> None:
    for group in optimizer.param_groups:
        _keep(group, [index for index, p in enumerate(group["params"]) if p.requires_grad])
    for parameter in [p for p in optimizer.state if not p.requires_grad]:
        del optimizer.state[parameter]


def _sort_groups(optimizer: Optimizer, names: dict[int, str]) -> None:
    """Sort each group in the model's order, so that a saved state does not depend on how the group was built."""
    order = {identity: index for index, identity in enumerate(names)}
    for group in optimizer.param_groups:
        params = group["params"]
        _keep(group, sorted(range(len(params)), key=lambda i: order.get(id(params[i]), len(order))))


def _keep(group: dict[str, Any], indices: list[int]) -> None:
    for key in ("params", "param_names"):
        if key in group:
            group[key][:] = [group[key][index] for index in indices]  # in place: LBFGS keeps the list itself


def _split_fast(optimizer: Optimizer, fast: set[int], ratio: float, schedulers: list[Any]) -> None:
    count = len(optimizer.param_groups)
    sources: list[int] = []
    for index, group in enumerate(list(optimizer.param_groups)):
        is_fast = [id(p) in fast for p in group["params"]]
        if not any(is_fast):
            continue
        twin = {key: copy.copy(value) for key, value in group.items() if key not in ("params", "param_names")}
        twin |= {key: group[key] * ratio for key in RATES if isinstance(group.get(key), (int, float, Tensor))}
        twin |= {key: list(group[key]) for key in ("params", "param_names") if key in group}
        twin["name"] = f"{group['name']}.lora_B" if "name" in group else f"lora_B{'' if not sources else len(sources)}"
        _keep(group, [i for i, flag in enumerate(is_fast) if not flag])
        _keep(twin, [i for i, flag in enumerate(is_fast) if flag])
        optimizer.param_groups.append(twin)
        sources.append(index)
    places = [(index, _same) for index in range(count)] + [(index, _times(ratio)) for index in sources]
    for scheduler in schedulers:
        relist(scheduler, optimizer, places)


def _same(rate: Any) -> Any:
    return rate


def _times(ratio: float) -> Callable[[Any], Any]:
    return lambda rate: rate * ratio


def relist(scheduler: Any, optimizer: Optimizer, places: Sequence[tuple[int, Callable[[Any], Any]]]) -> None:
    """Rebuild what a scheduler keeps for each of its optimizer's groups, after groups were split.

    Besides the lists that torch's schedulers keep, these are lists of the groups' own learning rates.

    Args:
        scheduler: Changed in place.
        optimizer: Its optimizer, whose earlier groups still have their learning rates.
        places: For each group, the earlier group that it comes from, and what makes its learning rates from that one's.
    """
    count = 1 + max(index for index, _ in places)
    for inner in getattr(scheduler, "_schedulers", ()):  # SequentialLR, ChainedScheduler
        relist(inner, optimizer, places)
    if getattr(scheduler, "optimizer", None) is not optimizer:
        return
    for key, values in vars(scheduler).items():
        if not isinstance(values, list) or len(values) != count:
            continue
        are_rates = key in RATE_LISTS or _are_rates(values, optimizer.param_groups[:count])
        if are_rates or key in _OTHER_LISTS:
            values[:] = [scale(values[i]) if are_rates else copy.copy(values[i]) for i, scale in places]


def _are_rates(values: Sequence[Any], groups: Sequence[Mapping[str, Any]]) -> bool:
    if any(isinstance(value, int) for value in values):  # such as milestones
        return False
    return any(values == [group[key] for group in groups if key in group] for key in RATES)
