"""What an adapter's file holds, without its base: layers, ranks, scalings, and how large the updates are."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_lora.analysis.adapters import in_order
from lightning_lora.analysis.spectrum import effective_rank, energy_rank, stable_rank, thin_svd
from lightning_lora.fingerprint import Fingerprint
from lightning_lora.names import join
from lightning_lora.peft_format.config import PeftConfig
from lightning_lora.peft_format.directory import keys_by_path, read_directory
from lightning_lora.storage.checkpoint import read_checkpoint, recorded_base


class LayerSummary(NamedTuple):
    """One layer's update.

    Rank, scaling and norm are None where a PEFT file does not say which of several parameters of one module, of
    different ranks or alphas, an update is for. The ranks that were used are None as well where factors are not finite.

    Attributes:
        name: The layer, or the parameter.
        rank: Its rank.
        scaling: The factor of ``B @ A``.
        norm: Norm of ``scaling * B @ A``; with DoRA, of that part of the update.
        parameters: How many numbers the adapter has.
        dtype: Their precision.
        finite: Whether all are numbers.
        effective_rank: How many directions the update uses; of a stack of experts, on average.
        stable_rank: Its squared norm over the squared largest singular value; of a stack, on average.
        suggested_rank: How many directions hold 99 % of the squared norm; of a stack, the most of any expert.
    """

    name: str
    rank: int | None
    scaling: float | None
    norm: float | None
    parameters: int
    dtype: str
    finite: bool
    effective_rank: float | None = None
    stable_rank: float | None = None
    suggested_rank: int | None = None


@dataclass
class Summary:
    """What an adapter's file holds.

    Attributes:
        kind: ``"PEFT directory"`` or ``"Lightning checkpoint"``.
        size: Bytes of its tensors, as stored.
        layers: The low-rank updates.
        others: Everything else that was trained: name -> tensor.
        config: The options, as the file has them.
        factors: The tensors of each update by their names, for comparing.
        base: The fingerprint of the base that it was trained on; empty if the file has none.
    """

    kind: str
    size: int
    config: dict[str, Any]
    layers: list[LayerSummary] = field(default_factory=list)
    others: dict[str, Tensor] = field(default_factory=dict)
    factors: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    base: Fingerprint = field(default_factory=dict)


def summarize(path: Path) -> Summary:
    """Return what a PEFT directory or a ``.ckpt`` holds.

    Raises:
        ValueError: It cannot be read, or holds no adapter.
        FileNotFoundError: It is not there.
    """
    if path.is_dir():
        return _of_peft(path)
    record, state = read_checkpoint(path)
    try:
        return _of_checkpoint(record, state)
    except (KeyError, TypeError, AttributeError, IndexError, RuntimeError) as error:
        raise ValueError(
            f"The record of the adapter in {str(path)!r} makes no sense; the file was changed or damaged: "
            f"{type(error).__name__}: {error}"
        ) from error


def update_norm(A: Tensor, B: Tensor, scaling: float) -> float:
    """Return the norm of ``scaling * B @ A`` without forming it, which could be as large as the model's layer.

    Args:
        A: ``(..., r, in)``.
        B: ``(..., out, r)``.
        scaling: The factor.

    Source:
        ``||BA||_F^2 = tr((B^T B) (A A^T))``, in float64, because the trace may cancel.
    """
    A, B = A.double(), B.double()
    squared = ((B.transpose(-1, -2) @ B) * (A @ A.transpose(-1, -2))).sum().clamp_min(0.0)
    return abs(scaling) * float(squared.sqrt())


def _summary(name: str, factors: Mapping[str, Tensor], rank: int | None, scaling: float | None) -> LayerSummary:
    A, B = factors["A"], factors["B"]
    tensors = list(factors.values())
    finite = all(bool(torch.isfinite(tensor).all()) for tensor in tensors)
    return LayerSummary(
        name,
        rank,
        scaling,
        None if scaling is None else update_norm(A, B, scaling),
        sum(tensor.numel() for tensor in tensors),
        str(A.dtype).removeprefix("torch."),
        finite,
        *(_used_ranks(A, B) if finite and rank is not None else ()),
    )


def _used_ranks(A: Tensor, B: Tensor) -> tuple[float, float, int]:
    """Return how much of its rank an update uses, which no scaling changes: effective, stable and suggested rank."""
    # All but the last two dimensions count experts; kernels were flattened before.
    spectra = [
        thin_svd(*pair).values for pair in zip(A.reshape(-1, *A.shape[-2:]), B.reshape(-1, *B.shape[-2:]), strict=True)
    ]
    effective, stable = ([of(values) for values in spectra] for of in (effective_rank, stable_rank))
    return sum(effective) / len(spectra), sum(stable) / len(spectra), max(map(energy_rank, spectra))


# --- a Lightning checkpoint


def _of_checkpoint(record: Mapping[str, Any], state: Mapping[str, object]) -> Summary:
    entries = record["adapters"]
    config: dict[str, Any] = dict(entries[0]["config"]) if len(entries) == 1 else {"adapters": list(entries)}
    tensors = {name: value for name, value in state.items() if isinstance(value, Tensor)}  # metrics may hold others
    size = sum(tensor.nbytes for tensor in tensors.values())
    summary = Summary("Lightning checkpoint", size, config, base=recorded_base(record))
    for name, said in record["layers"].items():
        path, factors = _factors_of(name, tensors)
        if "A" in factors and "B" in factors:
            summary.layers.append(_summary(name, factors, said["rank"], said["scaling"]))
            summary.factors[name] = factors
            for key in factors:
                del tensors[path + key]
    summary.others = tensors
    return summary


def _factors_of(name: str, tensors: Mapping[str, Tensor]) -> tuple[str, dict[str, Tensor]]:
    """Return the beginning of the names of a layer's tensors, and these by their last names."""
    above, _, last = name.rpartition(".")
    for begin in (f"{name}.lora.", join(above, f"lora.{last}.")):
        found = {key: tensors[begin + key] for key in ("A", "B", "magnitude", "bias") if begin + key in tensors}
        if found:
            return begin, found
    return "", {}


# --- a PEFT directory

_NAMES: tuple[tuple[str, str], ...] = (
    *((".lora_A.weight", "A"), (".lora_B.weight", "B"), (".lora_B.bias", "bias")),
    *((".lora_embedding_A", "A"), (".lora_embedding_B", "B"), (".lora_magnitude_vector", "magnitude")),
)


def _of_peft(path: Path) -> Summary:
    file = read_directory(path)
    config, left = file.config, dict(file.tensors)
    summary = Summary("PEFT directory", file.size, dict(file.options), base=file.base)
    for layer, keys in sorted(keys_by_path(left).items(), key=lambda item: in_order(item[0])):
        factors = {short: left.pop(layer + end) for end, short in _NAMES if layer + end in keys}
        if not {"A", "B"} <= factors.keys() or min(factors["A"].ndim, factors["B"].ndim) < 2:
            raise ValueError(f"{str(path)!r}: the update of {layer!r} is incomplete.")
        rank, scaling = _numbers(layer, config)
        matrices = factors | _matrices(factors["A"], factors["B"], rank)
        if matrices["A"].shape[-2] != matrices["B"].shape[-1]:
            raise ValueError(f"{str(path)!r}: the factors of {layer!r} do not fit each other.")
        summary.layers.append(_summary(layer, matrices, rank, scaling))
        summary.factors[layer] = matrices
    if not summary.layers and not left:
        raise ValueError(f"{str(path)!r} holds no adapter.")
    summary.others = left
    return summary


def _numbers(layer: str, config: PeftConfig) -> tuple[int | None, float | None]:
    """Return the rank and the scaling of a layer, or None if they depend on what the file does not say."""
    outer, is_inside, _ = layer.partition(".base_layer.")
    name = outer if is_inside else layer  # of attention's output projection, patterns match the attention's name
    while name.endswith(".base_layer"):
        name = name.removesuffix(".base_layer")
    parameters = [each for each in config.target_parameters if f".{name}".endswith(f".{each.rpartition('.')[0]}")]
    full = [join(name, each.rpartition(".")[2]) for each in parameters] or [name]
    found = {(config.rank_of(each), config.scaling_of(each)) for each in full}
    return found.pop() if len(found) == 1 else (None, None)


def _matrices(A: Tensor, B: Tensor, rank: int | None) -> dict[str, Tensor]:
    """Return the factors as matrices, of experts as stacks of them."""
    A, B = A.flatten(1), B.flatten(1)
    experts = len(A) // rank if rank else 1
    if rank and experts > 1 and len(A) == experts * rank == B.shape[1]:
        return {"A": A.reshape(experts, rank, -1), "B": B.reshape(len(B), rank, experts).permute(2, 0, 1)}
    return {"A": A, "B": B}


# --- two adapters


def differences(one: Summary, other: Summary) -> Iterator[str]:
    """Yield what differs between two adapters, a line each."""
    first, second = ({layer.name: layer for layer in each.layers} for each in (one, other))
    yield from _one_sided(first, second, "layer")
    for name in sorted(first.keys() & second.keys()):
        mine, theirs = first[name], second[name]
        for what in ("rank", "scaling"):
            if getattr(mine, what) != getattr(theirs, what):
                yield f"{name}: {what} {getattr(mine, what)} and {getattr(theirs, what)}"
        yield from _largest_difference(name, one.factors[name], other.factors[name])
    yield from _one_sided(one.others, other.others, "tensor")
    for name in sorted(one.others.keys() & other.others.keys()):
        yield from _largest_difference(name, {"": one.others[name]}, {"": other.others[name]})


def _one_sided(first: Mapping[str, object], second: Mapping[str, object], what: str) -> Iterator[str]:
    for which, names in (("first", first.keys() - second.keys()), ("second", second.keys() - first.keys())):
        yield from (f"{name}: {what} only in the {which}" for name in sorted(names))


def _largest_difference(name: str, first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> Iterator[str]:
    one, other = (
        {join(name, key) if key else name: tensor for key, tensor in each.items()} for each in (first, second)
    )
    yield from _one_sided(one, other, "tensor")
    for key in sorted(one.keys() & other.keys()):
        a, b = one[key], other[key]
        if a.shape != b.shape:
            yield f"{key}: shape {tuple(a.shape)} and {tuple(b.shape)}"
        elif not torch.equal(a.double(), b.double()):
            yield f"{key}: largest difference {float((a.double() - b.double()).abs().max()):.3g}"
