"""Sums of adapters, in a module or from files alone.

Adapters ``i`` with weights ``w_i`` add up to one adapter, which changes the base by the weighted sum of their changes:

- of a layer's updates, ``sum of w_i * s_i * B_i @ A_i``, where a layer that an adapter lacks counts as zero. Factors
  are stacked, ``A = [A_1; A_2; ...]`` and ``B = [w_1 s_1 B_1, w_2 s_2 B_2, ...]``, which is exact (``"cat"``), and may
  then be decomposed and cut to the best approximation of lower rank (``"svd"``). A sum of the factors themselves,
  ``(B_1 + B_2) @ (A_1 + A_2)``, would hold products of factors that never belonged together;
- of values that replace the base's own, such as those of a head, ``v + sum of w_i * (v_i - v)`` with the base's ``v``.

An adapter is first read as a ``Summand``; then ``_add`` is the arithmetic, and ``_config`` says how to attach the sum.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from functools import reduce
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lightning_lora.adapted_model import AdaptedModel
from lightning_lora.analysis.spectrum import NUMERICAL_ZERO, energy_rank, numerical_rank, thin_svd
from lightning_lora.config import LoRAConfig
from lightning_lora.disk.conversion import imported_together, read_as_peft
from lightning_lora.disk.skeleton import fill
from lightning_lora.fingerprint import Sample, differing_tensors
from lightning_lora.layers import LowRankAdapter, TokenAdapter
from lightning_lora.named_adapters import checked, several_of
from lightning_lora.names import listed, module_names
from lightning_lora.peft_format.config import numbers_for, targets_for
from lightning_lora.peft_format.directory import CONFIG_FILE, PeftFile
from lightning_lora.peft_format.factors import Factors, stacked
from lightning_lora.peft_format.files import exported, write_export
from lightning_lora.several.summand import (
    Summand,
    Update,
    align_slices,
    check_conflicts,
    check_summable,
    merged_options,
    summand_of_file,
    summand_of_module,
    tokens_as_updates,
)
from lightning_lora.state import copy_adapter_state
from lightning_lora.storage.atomic import check_directory
from lightning_lora.surgery import attach, detach
from lightning_lora.switching import beside, using

_METHODS = ("cat", "svd")
_SMALLEST_REST = 1e-9  # of the base's values in a sum: below it, the weights were meant to add up to 1


class CombinedLayer(NamedTuple):
    """One layer of a sum.

    Attributes:
        name: The adapter's name, as in ``AttachReport``.
        stacked: Rank of the stacked factors, before anything was cut.
        rank: Rank of the result; 0 if the updates cancel, and the layer was left out.
        error: Norm of what was cut, relative to that of the exact sum.
    """

    name: str
    stacked: int
    rank: int
    error: float


# --- what users call


def combine(
    module: nn.Module,
    weights: Mapping[str, float],
    *,
    name: str,
    method: str = "cat",
    rank: int | None = None,
    energy: float | None = None,
) -> list[CombinedLayer]:
    """Add the weighted sum of some of a module's adapters to it, as a new named adapter.

    The adapters may differ in rank, scaling and targets; a layer that one of them lacks counts as zero, and a layer
    whose updates cancel is left out. What trains in full, such as heads, biases and token rows, is summed as its
    difference from the base. ``combine(module, {"a": 0.5}, name="half")`` scales an adapter, and with ``method="svd"``
    it truncates one.

    Args:
        module: A module with named adapters. One that was given no name is called ``"default"``.
        weights: Name of an adapter -> its factor in the sum, of any sign.
        name: The new adapter's name. The active adapter stays active.
        method: ``"cat"`` stacks the factors, so ranks add up and the sum is exact; the update of a single adapter with
            the weight 1 keeps every bit. ``"svd"`` decomposes the stacked factors and keeps the largest singular
            values, the best approximation of its rank.
        rank: With ``"svd"``, the highest rank of a layer.
        energy: With ``"svd"``, the share in ``(0, 1]`` of each layer's squared norm to keep. Without rank and energy,
            only what is zero is cut.

    Returns:
        For each layer the ranks before and after, and the relative error of the cut.

    Raises:
        TypeError: A weight or the rank is not a number.
        ValueError: An option is invalid, an adapter is unknown or uses DoRA, one config cannot express the sum, or the
            sum is zero. Nothing was changed.
        RuntimeError: As in ``add_adapter``. Nothing was changed.

    Source:
        Eckart and Young 1936, "The approximation of one matrix by another of lower rank".
    """
    cut = _Cut("combine", method, rank, energy)
    _check_weights("combine", weights)
    several = several_of(module, "combine")
    for each in weights:
        checked(several, each, "combine")
    home = several.home
    roots = {root.module for each in weights for root in several.adapters[each].roots}
    target = roots.pop() if len(roots) == 1 else home
    summands = []
    for each, weight in weights.items():
        with using(home, each):
            summands.append(summand_of_module(target, repr(each), float(weight)))
    with using(home, None):
        tokens_as_updates(summands, target)
    layers = _add(summands, cut)
    with beside(home, name), ExitStack() as undo:
        _attach(target, layers, summands, cut, undo)
        model = AdaptedModel(target)
        copy_adapter_state(model, _state(model, layers, summands))
        undo.pop_all()
    return [layer.summary for layer in layers.values()]


def combine_adapters(
    paths: Sequence[str | PathLike[str]],
    weights: Sequence[float],
    out: str | PathLike[str],
    *,
    method: str = "cat",
    rank: int | None = None,
    energy: float | None = None,
    overwrite: bool = False,
) -> list[CombinedLayer]:
    """Write the weighted sum of adapters on disk as a PEFT directory, without their model.

    The arithmetic is that of ``combine``. No file holds the base's own values, so heads, biases and token rows can only
    be summed where the weights of the adapters that have them add up to 1, as in an average.

    Args:
        paths: The adapters: ``.ckpt`` files written under a ``LoRACallback``, and PEFT directories.
        weights: Their factors in the sum, in the same order.
        out: The directory to write.
        method: As in ``combine``.
        rank: As in ``combine``.
        energy: As in ``combine``.
        overwrite: Replace an adapter that is in the directory; other files beside it stay.

    Returns:
        For each layer the ranks before and after, and the relative error of the cut.

    Raises:
        TypeError: As in ``combine``.
        ValueError: As in ``combine``, or a file cannot be read or does not describe its layers well enough, the
            adapters were trained on different bases, or the directory may not be replaced. Nothing was written.
        FileNotFoundError: An adapter does not exist.
    """
    caller = "combine_adapters"
    cut = _Cut(caller, method, rank, energy)
    if isinstance(paths, (str, PathLike)) or isinstance(weights, Mapping) or len(paths) != len(weights):
        raise ValueError(
            f"{caller}: paths={paths!r} and weights={weights!r} must be two lists of the same length: one weight for "
            "each adapter."
        )
    _check_weights(caller, {str(path): weight for path, weight in zip(paths, weights, strict=True)})
    check_directory(Path(out), marker=CONFIG_FILE, overwrite=overwrite)
    files = [read_as_peft(Path(path)) for path in paths]
    base = _common_base(files)
    skeleton, contents = imported_together(files)
    found = zip(paths, weights, contents, strict=True)
    summands = [summand_of_file(content, repr(str(path)), float(weight)) for path, weight, content in found]
    layers = _add(summands, cut)
    with ExitStack() as undo:
        _attach(skeleton, layers, summands, cut, undo)
        undo.pop_all()  # nobody else has the skeleton
    model = AdaptedModel(skeleton)
    _check_needs_no_base(model, summands, caller)
    fill(skeleton, _state(model, layers, summands))
    export = exported(skeleton, "")
    export.is_partial = True
    task, base_name = (_common(file.options.get(key) for file in files) for key in ("task_type", _BASE_NAME))
    write_export(export, Path(out), base_name, base, overwrite=overwrite, task_type=task)
    return [layer.summary for layer in layers.values()]


_BASE_NAME = "base_model_name_or_path"


class _Cut:
    """What of the exact sum to keep: the options of a call, checked.

    Raises:
        TypeError: The rank is not an integer.
        ValueError: An option is invalid.
    """

    def __init__(self, caller: str, method: str, rank: Any, energy: float | None) -> None:
        self.caller, self.method, self.rank, self.energy = caller, method, rank, energy
        if method not in _METHODS:
            raise ValueError(f"{caller}: method={method!r} is unknown; choose {' or '.join(map(repr, _METHODS))}.")
        if method == "cat" and (rank, energy) != (None, None):
            raise ValueError(
                f"{caller}: rank={rank!r} and energy={energy!r} cut the sum, and method='cat' keeps all of it; set "
                "method='svd', or leave them out."
            )
        if rank is not None and energy is not None:
            raise ValueError(f"{caller}: rank={rank!r} and energy={energy!r} are both set; set one of them.")
        if rank is not None and (not isinstance(rank, int) or isinstance(rank, bool)):
            raise TypeError(f"{caller}: rank must be an integer, got {rank!r}.")
        if rank is not None and rank < 1:
            raise ValueError(f"{caller}: rank must be >= 1, got {rank!r}.")
        if energy is not None and not 0 < energy <= 1:
            raise ValueError(f"{caller}: energy must be above 0 and at most 1, got {energy!r}.")

    def kept(self, values: Tensor) -> int:
        """Return how many of these singular values to keep."""
        known = numerical_rank(values)
        if self.energy is not None:
            return min(known, energy_rank(values, self.energy))
        return known if self.rank is None else min(known, self.rank)


def _check_weights(caller: str, weights: Mapping[str, object]) -> None:
    if not (weights and isinstance(weights, Mapping)):
        raise ValueError(f"{caller}: weights={weights!r} must give at least one adapter its factor in the sum.")
    for name, weight in weights.items():
        if not isinstance(weight, (int, float)) or isinstance(weight, bool):
            raise TypeError(f"{caller}: the weight of {name!r} must be a number, got {weight!r}.")
        if not math.isfinite(weight):
            raise ValueError(f"{caller}: the weight of {name!r} must be finite, got {weight!r}.")


# --- the arithmetic


class Layer(NamedTuple):
    """The sum of the updates of one layer: itself, where it is named, and what became of its rank."""

    update: Update
    summary: CombinedLayer


def _add(summands: Sequence[Summand], cut: _Cut) -> dict[str, Layer]:
    """Return the sum of the low-rank updates, by the names of their adapters.

    Raises:
        ValueError: An adapter cannot be summed, or the sum is zero.
    """
    for each in summands:
        check_summable(each, cut.caller)
    align_slices(summands)
    check_conflicts(summands, cut.caller)
    terms: dict[str, list[tuple[float, Update]]] = {}
    for each in summands:
        for label, update in each.updates.items():
            terms.setdefault(label, []).append((each.weight, update))
    sums = {label: _sum([update.factors.scaled(w) for w, update in found if w]) for label, found in terms.items()}
    _check_rank(sums, cut)
    layers = {label: _layer(label, [update for _, update in terms[label]], sums[label], cut) for label in terms}
    if not any(layer.summary.rank for layer in layers.values()) and not any(e.tokens or e.values for e in summands):
        raise ValueError(
            f"{cut.caller}: the weighted sum of {listed([each.name for each in summands])} is zero in every layer. "
            "That is the base itself, for which no adapter is needed."
        )
    return layers


def _sum(terms: Sequence[Factors]) -> Factors | None:
    """Return the exact sum of updates, as it is if there is one; None if it is zero up to the rounding of its terms."""
    if not terms:
        return None
    total = terms[0] if len(terms) == 1 else stacked(terms)
    is_zero = total.norm <= NUMERICAL_ZERO * sum(each.norm for each in terms)
    return None if is_zero and (total.bias is None or not total.bias.any()) else total


def _check_rank(sums: Mapping[str, Factors | None], cut: _Cut) -> None:
    most = max((total.highest_rank for total in sums.values() if total is not None), default=0)
    if cut.rank is not None and cut.rank > most:
        raise ValueError(f"{cut.caller}: rank={cut.rank} is above {most}, the highest rank that the sum can have.")


def _layer(label: str, updates: Sequence[Update], total: Factors | None, cut: _Cut) -> Layer:
    before, error = sum(update.factors.rank for update in updates), 0.0
    if total is None:
        return Layer(updates[0]._replace(factors=updates[0].factors.zero()), CombinedLayer(label, before, 0, error))
    if cut.method == "svd":
        total, error = _truncated(total, cut)
    else:
        total = total.within(total.highest_rank)
    return Layer(updates[0]._replace(factors=total), CombinedLayer(label, before, total.rank, error))


def _truncated(total: Factors, cut: _Cut) -> tuple[Factors, float]:
    """Return the best approximation of a sum, and its relative error; the experts of a stack keep one rank."""
    is_stack = total.A.ndim == 3
    total = stacked([total])
    pairs = zip(total.A, total.B, strict=True) if is_stack else [(total.A, total.B)]
    found = [thin_svd(A, B) for A, B in pairs]
    rank = max(1, *(cut.kept(each.values) for each in found))  # 1 where only a bias is left
    squares = torch.stack([each.values.square() for each in found])
    error = float((squares[:, rank:].sum() / squares.sum().clamp_min(torch.finfo(torch.float64).tiny)).sqrt())
    A = [each.values[:rank].sqrt().unsqueeze(1) * each.V[:, :rank].T for each in found]
    B = [each.U[:, :rank] * each.values[:rank].sqrt() for each in found]
    return total._replace(A=torch.stack(A) if is_stack else A[0], B=torch.stack(B) if is_stack else B[0]), error


# --- the sum as an adapter


def _attach(
    target: nn.Module, layers: Mapping[str, Layer], summands: Sequence[Summand], cut: _Cut, undo: ExitStack
) -> None:
    """Attach adapters of the ranks and scalings of a sum; ``undo`` takes it back.

    Raises:
        ValueError: One config cannot express them.
    """
    config = _config(target, layers, summands, cut)
    wanted = _in_place(layers, summands, config.bias)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "These adapters are not smaller")  # the ranks follow from the adapters
            attach(target, config)
    except ValueError as error:
        raise ValueError(f"{cut.caller}: no single adapter can hold the sum: {error}") from error
    undo.callback(detach, target)
    made = {name: each for name, each in AdaptedModel(target).adapters.items() if isinstance(each, LowRankAdapter)}
    numbers = {name: (layer.update.factors.rank, layer.update.factors.scaling) for name, layer in wanted.items()}
    wrong = [
        name
        for name in sorted(made.keys() | wanted.keys())
        if name not in made or name not in wanted or not _is_like(made[name], *numbers[name])
    ]
    if wrong:
        raise ValueError(
            f"{cut.caller}: no single config means exactly the layers of the sum: {listed(wrong)} would be adapted "
            "otherwise, because a name is also the end of another one."
        )


def _is_like(adapter: LowRankAdapter, rank: int, scaling: float) -> bool:
    return adapter.spec.rank == rank and math.isclose(adapter.spec.scaling, scaling, rel_tol=1e-12)


def _in_place(layers: Mapping[str, Layer], summands: Sequence[Summand], bias: str) -> dict[str, Layer]:
    """Return the layers to adapt: without those that cancel, unless a config could not name what else is trained."""
    left = {name: layer for name, layer in layers.items() if layer.summary.rank}
    needs_all = bias == "lora_only" or not (left or any(each.tokens for each in summands))
    return dict(layers) if needs_all else left


def _config(target: nn.Module, layers: Mapping[str, Layer], summands: Sequence[Summand], cut: _Cut) -> LoRAConfig:
    """Return the options with which exactly these layers get these ranks and scalings."""
    options = reduce(merged_options, [each.config for each in summands])
    found = _in_place(layers, summands, options.bias)
    is_one = len(summands) == 1 and cut.method == "cat"  # then scalings and precision are those of the adapter
    numbers = numbers_for(
        {name: layer.update.factors for name, layer in found.items()}, use_rslora=is_one and options.use_rslora
    )
    slices: dict[str, dict[str, str]] = {}
    for update in (layer.update for layer in found.values()):
        if update.rows:
            slices.setdefault(update.path, {})[update.part] = update.slices_text
    whole = [layer.update for layer in found.values() if not layer.update.rows]
    by_name = [update.path for update in whole if not update.parameter]
    every = [alias for _, aliases in module_names(target).values() for alias in aliases]
    tokens: dict[str, set[int]] = {}
    for each in summands:
        for name, rows in each.tokens.items():
            tokens.setdefault(name, set()).update(rows)
    return LoRAConfig(
        rank=numbers["r"],
        alpha=numbers["lora_alpha"],
        rank_pattern=numbers["rank_pattern"],
        alpha_pattern=numbers["alpha_pattern"],
        use_rslora=numbers["use_rslora"],
        target_modules=targets_for(by_name, every),
        target_parameters=sorted(update.whole for update in whole if update.parameter),
        target_slices=slices,
        trainable_token_indices={name: sorted(numbers) for name, numbers in sorted(tokens.items())},
        modules_to_save=sorted({name for each in summands for name in each.saved}),
        bias=options.bias,
        lora_bias=options.lora_bias,
        untie_weights=options.untie_weights,
        dropout=options.dropout,
        frozen_norm=options.frozen_norm,
        adapter_dtype=_precision(summands, exact=is_one),
    )


def _precision(summands: Sequence[Summand], *, exact: bool) -> Any:
    """Return the name of the precision of the sum's factors: as it was if ``exact``, else float32 at least."""
    tensors = [update.factors.A for each in summands for update in each.updates.values()]
    tensors += [row for each in summands for rows in each.tokens.values() for row in rows.values()]
    kinds = {tensor.dtype for tensor in tensors} | (set() if exact and tensors else {torch.float32})
    return str(reduce(torch.promote_types, kinds)).removeprefix("torch.")


def _state(model: AdaptedModel, layers: Mapping[str, Layer], summands: Sequence[Summand]) -> dict[str, Tensor]:
    """Return the values of a sum for the adapters just attached for it, where what trains in full has the base's."""
    place = {id(tensor): name for name, tensor in model.trained.items()}
    state = dict[str, Tensor]()
    for name, adapter in model.adapters.items():
        if isinstance(adapter, TokenAdapter):
            rows = zip(adapter.index.tolist(), adapter.rows.detach(), strict=True)
            state[place[id(adapter.rows)]] = torch.stack([_moved(row, _rows(summands, name, t)) for t, row in rows])
            continue
        for key, tensor in adapter.named_parameters():
            value = getattr(layers[name].update.factors, key)
            state[place[id(tensor)]] = torch.zeros_like(tensor) if value is None else value
    return state | {name: _moved(tensor, _values(summands, name)) for name, tensor in model.in_full.items()}


def _rows(summands: Sequence[Summand], name: str, token: int) -> list[tuple[float, Tensor]]:
    return [(each.weight, each.tokens[name][token]) for each in summands if token in each.tokens.get(name, ())]


def _values(summands: Sequence[Summand], name: str) -> list[tuple[float, Tensor]]:
    return [(each.weight, each.values[name]) for each in summands if name in each.values]


def _share_of_base(terms: Sequence[tuple[float, Tensor]]) -> float:
    """Return the factor of the base's own value in ``v + sum of w_i * (v_i - v)``."""
    rest = 1.0 - math.fsum(weight for weight, _ in terms)
    return 0.0 if abs(rest) < _SMALLEST_REST else rest


def _moved(base: Tensor, terms: Sequence[tuple[float, Tensor]]) -> Tensor:
    parts = [weight * value.double() for weight, value in terms]
    if rest := _share_of_base(terms):
        parts.append(rest * base.detach().cpu().double())
    total = torch.stack(parts).sum(0)
    return total if base.is_floating_point() or base.is_complex() else total.round()


def _check_needs_no_base(model: AdaptedModel, summands: Sequence[Summand], caller: str) -> None:
    """Raise if a sum depends on values of the base, which no file of an adapter holds.

    Raises:
        ValueError: It does, in what trains in full.
    """
    terms = {name: [_values(summands, name)] for name in model.in_full}
    for name, adapter in model.adapters.items():
        if isinstance(adapter, TokenAdapter):
            terms[name] = [_rows(summands, name, token) for token in adapter.index.tolist()]
    if needed := [name for name, each in terms.items() if any(map(_share_of_base, each))]:
        owners = [each.name for each in summands if needed[0] in each.values or needed[0] in each.tokens]
        raise ValueError(
            f"{caller}: {listed(needed)} is trained in full ({needed[0]!r} by {listed(owners)}). Its sum needs the "
            "base's own values, which no file holds, unless the weights of the adapters that have it add up to 1. "
            "Load the adapters into the model with add_adapter, and call combine."
        )


# --- files


def _common_base(files: Sequence[PeftFile]) -> dict[str, Sample]:
    """Return the fingerprint of the base that all files were trained on.

    Raises:
        ValueError: They were trained on different bases.
    """
    found: dict[str, Sample] = {}
    for number, file in enumerate(files):
        for other in files[:number]:
            if differing := differing_tensors(other.base, file.base):
                raise ValueError(
                    f"combine_adapters: {str(other.path)!r} and {str(file.path)!r} were trained on different bases, "
                    f"which differ in {listed(differing, 3)}; the sum of their updates means nothing on either."
                )
        found |= file.base
    return found


def _common(values: Iterable[Any]) -> Any:
    """Return the value that all have, or None."""
    first, *others = values
    return first if all(each == first for each in others) else None
