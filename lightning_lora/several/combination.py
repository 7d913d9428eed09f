"""Sums of adapters, in a module or from files alone.

Adapters ``i`` with weights ``w_i`` add up to one adapter, which changes the base by the weighted sum of their changes:

- of a layer's updates, ``sum of w_i * s_i * B_i @ A_i``, where a layer that an adapter lacks counts as zero. Factors
  are stacked, ``A = [A_1; A_2; ...]`` and ``B = [w_1 s_1 B_1, w_2 s_2 B_2, ...]``, which is exact (``"cat"``), and may
  then be decomposed and cut to the best approximation of lower rank (``"svd"``). A sum of the factors themselves,
  ``(B_1 + B_2) @ (A_1 + A_2)``, would hold products of factors that never belonged together;
- of values that replace the base's own, such as those of a head, ``v + sum of w_i * (v_i - v)`` with the base's ``v``.

An adapter is first read as a ``Summand``; then ``add`` is the arithmetic, and ``attach_sum`` attaches what it returns.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_lora.adapted_model import AdaptedModel, in_turn
from lightning_lora.analysis.spectrum import NUMERICAL_ZERO, energy_rank, numerical_rank, thin_svd
from lightning_lora.disk.conversion import imported_together, read_as_peft
from lightning_lora.disk.skeleton import fill
from lightning_lora.fingerprint import Sample, differing_tensors
from lightning_lora.named_adapters import checked, fill_buffers, several_of, undone_on_failure
from lightning_lora.names import listed
from lightning_lora.peft_format.directory import CONFIG_FILE, PeftFile
from lightning_lora.peft_format.factors import Factors, stacked
from lightning_lora.peft_format.files import exported, write_export
from lightning_lora.several.sum_as_adapter import (
    CombinedLayer,
    Layer,
    attach_sum,
    buffers_of_sum,
    check_needs_no_base,
    state_of_sum,
)
from lightning_lora.several.summand import (
    Summand,
    Update,
    align_slices,
    check_conflicts,
    check_summable,
    summand_of_file,
    summand_of_module,
    tokens_as_updates,
)
from lightning_lora.state import copy_adapter_state
from lightning_lora.storage.atomic import check_directory
from lightning_lora.switching import beside, using

_METHODS = ("cat", "svd")


# --- what users call


@in_turn
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
    cut = Cut("combine", method, rank, energy)
    _check_weights("combine", weights)
    with undone_on_failure(module):
        return _combine(module, weights, name, cut)


def _combine(module: nn.Module, weights: Mapping[str, float], name: str, cut: Cut) -> list[CombinedLayer]:
    several = several_of(module, "combine")
    weights = {checked(several, each, "combine"): weight for each, weight in weights.items()}
    home = several.home
    roots = {root.module for each in weights for root in several.adapters[each].roots}
    target = roots.pop() if len(roots) == 1 else home
    summands = []
    for each, weight in weights.items():
        with using(home, each):
            summands.append(summand_of_module(target, repr(each), float(weight), "combine"))
    with using(home, None):
        tokens_as_updates(summands, target)
    layers = add(summands, cut)
    with beside(home, name), ExitStack() as undo:
        attach_sum(target, layers, summands, "combine", undo, is_exact=cut.method == "cat")
        model = AdaptedModel(target)
        buffers = buffers_of_sum(model, summands, "combine")
        copy_adapter_state(model, state_of_sum(model, layers, summands))
        fill_buffers(model, buffers)
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
    cut = Cut(caller, method, rank, energy)
    if isinstance(paths, (str, PathLike)) or isinstance(weights, Mapping) or len(paths) != len(weights):
        shown = str(paths) if isinstance(paths, (str, PathLike)) else [*map(str, paths)]
        raise ValueError(
            f"{caller}: paths={shown!r} and weights={weights!r} must be two lists of the same length: one weight for "
            "each adapter."
        )
    _check_weights(caller, {str(path): weight for path, weight in zip(paths, weights, strict=True)})
    return write_sum(paths, weights, out, cut, overwrite=overwrite)


def write_sum(
    paths: Sequence[str | PathLike[str]],
    weights: Sequence[float],
    out: str | PathLike[str],
    cut: Cut,
    *,
    overwrite: bool,
) -> list[CombinedLayer]:
    """Write the weighted sum of adapters on disk as a PEFT directory; the arguments are those of ``combine_adapters``.

    Raises:
        ValueError: As in ``combine_adapters``. Nothing was written.
        FileNotFoundError: An adapter does not exist.
    """
    check_directory(Path(out), marker=CONFIG_FILE, overwrite=overwrite)
    files = [read_as_peft(Path(path)) for path in paths]
    base = _common_base(files)
    skeleton, contents = imported_together(files)
    found = zip(paths, weights, contents, strict=True)
    summands = [summand_of_file(content, repr(str(path)), float(weight)) for path, weight, content in found]
    layers = add(summands, cut)
    with ExitStack() as undo:
        attach_sum(skeleton, layers, summands, cut.caller, undo, is_exact=cut.method == "cat")
        undo.pop_all()  # nobody else has the skeleton
    model = AdaptedModel(skeleton)
    check_needs_no_base(model, summands, cut.caller)
    fill(skeleton, state_of_sum(model, layers, summands))
    export = exported(skeleton, "")
    export.is_partial, export.recorded_root = True, _common(file.root for file in files)
    task, base_name = (_common(file.options.get(key) for file in files) for key in ("task_type", _BASE_NAME))
    write_export(export, Path(out), base_name, base, overwrite=overwrite, task_type=task)
    return [layer.summary for layer in layers.values()]


_BASE_NAME = "base_model_name_or_path"


class Cut:
    """What of the exact sum to keep: the options of a call, checked.

    Args:
        caller: The function that messages name.
        method: As in ``combine``.
        rank: As in ``combine``.
        energy: As in ``combine``.
        alone: Whether this is a truncation: the sum is one adapter as it is.

    Raises:
        TypeError: The rank is not an integer, or the energy not a number.
        ValueError: An option is invalid.
    """

    def __init__(self, caller: str, method: str, rank: Any, energy: Any, *, alone: bool = False) -> None:
        self.caller, self.method, self.rank, self.energy, self.alone = caller, method, rank, energy, alone
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
        if energy is not None and (not isinstance(energy, (int, float)) or isinstance(energy, bool)):
            raise TypeError(f"{caller}: energy must be a number, got {energy!r}.")
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


def add(summands: Sequence[Summand], cut: Cut) -> dict[str, Layer]:
    """Return the sum of the low-rank updates, by the names of their adapters.

    Raises:
        ValueError: An adapter cannot be summed, or the sum is zero.
    """
    for each in summands:
        check_summable(each, cut.caller, alone=cut.alone)
    align_slices(summands)
    check_conflicts(summands, cut.caller)
    terms: dict[str, list[tuple[float, Update]]] = {}
    for each in summands:
        for label, update in each.updates.items():
            terms.setdefault(label, []).append((each.weight, update))
    sums = {label: _sum([update.factors.scaled(w) for w, update in found if w]) for label, found in terms.items()}
    if all(total is None for total in sums.values()) and not any(each.tokens or each.values for each in summands):
        names = listed([each.name for each in summands])
        what = names if cut.alone else f"the weighted sum of {names}"
        raise ValueError(
            f"{cut.caller}: {what} is zero in every layer. That is the base itself, for which no adapter is needed."
        )
    _check_rank(sums, cut)
    return {label: _layer(label, [update for _, update in terms[label]], sums[label], cut) for label in terms}


def _sum(terms: Sequence[Factors]) -> Factors | None:
    """Return the exact sum of updates, as it is if there is one; None if it is zero up to the rounding of its terms."""
    if not terms:
        return None
    total = terms[0] if len(terms) == 1 else stacked(terms)
    is_zero = total.norm <= NUMERICAL_ZERO * sum(each.norm for each in terms)
    return None if is_zero and (total.bias is None or not total.bias.any()) else total


def _check_rank(sums: Mapping[str, Factors | None], cut: Cut) -> None:
    most = max((total.highest_rank for total in sums.values() if total is not None), default=0)
    if cut.rank is not None and cut.rank > most > 0:
        what = "adapter" if cut.alone else "sum"
        raise ValueError(f"{cut.caller}: rank={cut.rank} is above {most}, the highest rank that the {what} can have.")


def _layer(label: str, updates: Sequence[Update], total: Factors | None, cut: Cut) -> Layer:
    before, error = sum(update.factors.rank for update in updates), 0.0
    if total is None:
        return Layer(updates[0]._replace(factors=updates[0].factors.zero()), CombinedLayer(label, before, 0, error))
    if cut.method == "svd":
        total, error = _truncated(total, cut)
    else:
        total = total.within(total.highest_rank)
    return Layer(updates[0]._replace(factors=total), CombinedLayer(label, before, total.rank, error))


def _truncated(total: Factors, cut: Cut) -> tuple[Factors, float]:
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
