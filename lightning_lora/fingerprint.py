"""The fingerprint of a base model: a few of its values, to recognize the base that an adapter was trained on.

Values are read at fixed places, never by a pass over all of them, and recorded as they are: a hash could not tell the
same weights in another precision from other weights.
"""

from __future__ import annotations

import functools
import hashlib
import math
import re
import warnings
from collections.abc import Collection, Mapping
from itertools import zip_longest
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from lightning_lora.names import listed
from lightning_lora.sharding import elements, in_parts, is_sharded, local

T = TypeVar("T", int, float)

_TENSORS, _ELEMENTS = 64, 4
_MOST_TENSORS = 4096  # that a file may claim
_NUMBER = re.compile(r"\d+")
_GOLDEN = (math.sqrt(5) - 1) / 2
_PRECISIONS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)  # from coarse to fine
SAMPLED = (*_PRECISIONS, torch.complex64, torch.complex128)  # what a fingerprint looks at; others are quantized
_BY_NAME = {str(dtype).removeprefix("torch."): dtype for dtype in SAMPLED}
_LEAST_FLOAT16 = 2.0**-24
END = "[-1]"  # after the name of an embedding's weight: its last row, which may have been added at random


class Sample(NamedTuple):
    """Some values of one tensor.

    Attributes:
        shape: The tensor's.
        dtype: Its precision.
        values: The elements at ``places(shape)``; of complex numbers the real and the imaginary part in turn.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    values: tuple[float, ...]


Fingerprint = Mapping[str, Sample]


def fingerprint(tensors: Mapping[str, Tensor]) -> dict[str, Sample]:
    """Return the fingerprint of a base: name of a parameter -> some of its values, in the order of the model.

    If there are many parameters, ``chosen_names`` chooses some. Quantized ones and those without values are left out.
    The same values give the same fingerprint on any device and however they are sharded; if they are, every process
    must call this.
    """
    return samples(tensors, chosen_names(tensors))


def chosen_names(tensors: Mapping[str, Tensor]) -> list[str]:
    """Return the names of the parameters that a fingerprint looks at.

    Parameters that differ only in numbers, such as those of repeated blocks, are of one kind. Every kind is looked at,
    so what the model has only once always is: a new head may be all that differs between two bases. The others are
    chosen evenly from the kinds, by a hash of their names: at regular intervals all might be norms.
    """
    kinds: dict[str, list[str]] = {}
    for name in sorted((name for name, tensor in tensors.items() if _is_readable(tensor)), key=_mixed):
        kinds.setdefault(_NUMBER.sub("*", name), []).append(name)
    in_turns = [name for turn in zip_longest(*kinds.values()) for name in turn if name is not None]
    return in_turns[: min(max(_TENSORS, len(kinds)), _MOST_TENSORS)]


def samples(tensors: Mapping[str, Tensor], names: Collection[str]) -> dict[str, Sample]:
    """Return samples of the named tensors that can be read; every process must call this, as for ``fingerprint``."""
    wanted = set(names)
    chosen = {name: tensor for name, tensor in tensors.items() if name in wanted and _is_readable(tensor)}
    chosen |= {f"{name}{END}": t for name, t in tensors.items() if f"{name}{END}" in wanted and _is_readable(t)}
    divided = {name: (tensor, _index(name, tensor)) for name, tensor in chosen.items() if is_sharded(tensor)}
    values = elements(divided) if divided else {}
    values |= {
        name: tensor.detach().take(_places(name, tensor.shape).to(tensor.device))
        for name, tensor in chosen.items()
        if name not in divided
    }
    return {name: sample(_shape(name, t.shape), t.dtype, values[name]) for name, t in chosen.items()}


def sample(shape: Collection[int], dtype: torch.dtype, values: Tensor) -> Sample:
    """Return the values at ``places(shape)``, which may be in parts already; NaN and infinity count as zero."""
    values = in_parts(values).flatten()
    return Sample(tuple(shape), dtype, tuple([each if math.isfinite(each) else 0.0 for each in values.tolist()]))


def places(shape: Collection[int]) -> list[int]:
    """Return which elements of a tensor are sampled, as places in its flattened form: spread out evenly.

    Steps of the golden ratio, since simple fractions would fall into one column of a matrix.
    """
    count = math.prod(shape)
    if count <= _ELEMENTS:
        return list(range(count))
    return [int((k * _GOLDEN) % 1.0 * count) for k in range(1, _ELEMENTS + 1)]


def base_problems(
    recorded: Fingerprint, found: Fingerprint, what: str, *, override: str = "check_base=False"
) -> list[str]:
    """Return how a base differs from the one that an adapter was trained on, in one sentence if it does.

    Only tensors that both fingerprints have are compared. ``what`` names the base that was ``found``, and ``override``
    the option that accepts any. Where only last rows of embeddings differ, this warns.
    """
    differing = differing_tensors(recorded, found)
    if not differing:
        warn_of_other_ends(recorded, found)
        return []
    shared = recorded.keys() & found.keys()
    is_part = len(differing) < len(shared) / 2
    hint = " A new layer with random weights, such as a head, is saved only if modules_to_save names it."
    return [
        f"The adapter was trained on a different base than this {what}: {len(differing)} of {len(shared)} compared "
        f"tensors differ, first {listed(differing, 3)}. Load the base it was trained on; {override} accepts any base."
        f"{hint if is_part else ''}"
    ]


def differing_tensors(recorded: Fingerprint, found: Fingerprint) -> list[str]:
    """Return the tensors that two fingerprints have and that are not the same, whatever their precision."""
    return [
        name if one.shape == found[name].shape else f"{name} {found[name].shape}, not {one.shape}"
        for name, one in recorded.items()
        if name in found and not name.endswith(END) and not _is_same(one, found[name])
    ]


def warn_of_other_ends(recorded: Fingerprint, found: Fingerprint) -> None:
    """Warn if the last row of an embedding is not the one that the adapter was trained with."""
    ends = [name for name in recorded.keys() & found.keys() if name.endswith(END)]
    if other := sorted(name.removesuffix(END) for name in ends if not _is_same(recorded[name], found[name])):
        warnings.warn(
            f"The last rows of {listed(other)} are not those that the adapter was trained with. Rows that "
            "resize_token_embeddings adds are random, and no adapter holds them, so their tokens give other results "
            "here. Train and save such rows with trainable_token_indices; or add them once, and save the base "
            "with them.",
            stacklevel=3,
        )


def _is_same(one: Sample, other: Sample) -> bool:
    """Return whether both may be the same weights, after rounding to other precisions."""
    if one.shape != other.shape or one.dtype.is_complex != other.dtype.is_complex:
        return False
    if one.values == other.values:
        return True
    precisions = [_precision(each.values) for each in (one, other)]
    if one.dtype == other.dtype and precisions[0] == precisions[1]:
        return False
    # Rounding twice, as from float32 over float16 to bfloat16, may end at the next number but one; and near zero
    # float16 has numbers in equal steps only, whatever holds them now.
    coarse = max(torch.finfo(dtype).eps for dtype in (*precisions, one.dtype, other.dtype))
    pairs = zip(one.values, other.values, strict=True)
    return all(math.isclose(a, b, rel_tol=coarse, abs_tol=_LEAST_FLOAT16) for a, b in pairs)


def _precision(values: tuple[float, ...]) -> torch.dtype:
    """Return the coarsest precision that holds these values as they are: a float32 copy may hold bfloat16 numbers."""
    exact = torch.tensor(values, dtype=torch.float64)
    return next(dtype for dtype in _PRECISIONS if torch.equal(exact.to(dtype).double(), exact))


def _is_readable(tensor: Tensor) -> bool:
    """Return whether a tensor holds plain numbers: quantized weights have their own classes or narrow types."""
    part = local(tensor)
    plain = type(part) in (Tensor, nn.Parameter) and not part.is_meta
    return plain and tensor.dtype in SAMPLED


def _mixed(text: str) -> bytes:
    return hashlib.blake2b(text.encode(), digest_size=16).digest()


def _shape(name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(shape[1:]) if name.endswith(END) else tuple(shape)


@functools.lru_cache(maxsize=256)  # a model has many weights and few shapes
def _spread_out(shape: tuple[int, ...], is_end: bool) -> Tensor:
    found = torch.tensor(places(shape[1:] if is_end else shape), dtype=torch.long)
    return found + math.prod(shape) - math.prod(shape[1:]) if is_end else found


def _places(name: str, shape: tuple[int, ...]) -> Tensor:
    """Return which elements are sampled under a name, as places in the flattened tensor."""
    return _spread_out(tuple(shape), name.endswith(END))


def _index(name: str, tensor: Tensor) -> tuple[Tensor, ...]:
    """Return the indices of the samples, a vector for each dimension; torch's own way takes ten times as long."""
    rest, found = _places(name, tensor.shape), list[Tensor]()
    for size in reversed(tensor.shape):
        found.append(rest % size)
        rest = rest // size
    return tuple(reversed(found))


# --- in files


def to_plain(found: Fingerprint) -> dict[str, Any]:
    """Return a fingerprint as plain lists and numbers."""
    return {
        name: {
            "shape": list(each.shape),
            "dtype": str(each.dtype).removeprefix("torch."),
            "values": list(each.values),
        }
        for name, each in found.items()
    }


def from_plain(content: object) -> dict[str, Sample]:
    """Return the fingerprint that a file holds.

    Raises:
        ValueError: It is damaged.
    """
    if not isinstance(content, dict) or len(content) > _MOST_TENSORS:
        raise ValueError("The fingerprint of the base in the adapter's file is invalid; the file is damaged.")
    return {str(name): _read_sample(str(name), each) for name, each in content.items()}


def _read_sample(name: str, content: object) -> Sample:
    options: dict[str, Any] = content if isinstance(content, dict) else {}
    shape = _numbers(int, options.get("shape"), 0, 2**62)
    values = _numbers(float, options.get("values"), -math.inf, math.inf)
    dtype = _BY_NAME.get(str(options.get("dtype")))
    if shape is None or values is None or dtype is None:
        raise ValueError(f"The fingerprint of {name!r} in the adapter's file is invalid; the file is damaged.")
    parts = 2 if dtype.is_complex else 1
    if math.prod(shape) >= 2**62 or len(values) != parts * min(math.prod(shape), _ELEMENTS):
        raise ValueError(f"The fingerprint of {name!r} in the adapter's file is incomplete; the file was damaged.")
    return Sample(shape, dtype, values)


def _numbers(kind: type[T], content: object, least: float, below: float) -> tuple[T, ...] | None:
    """Return a list of numbers of one type and range, or None if it is anything else."""
    numbers: Any = content if isinstance(content, list) and len(content) <= _MOST_TENSORS else [None]
    return tuple(numbers) if all(type(each) is kind and least <= each < below for each in numbers) else None


def digest(found: Fingerprint) -> str:
    """Return a short text that identifies a fingerprint, for comparing by eye."""
    text = repr([(name, each.shape, each.values) for name, each in sorted(found.items())])
    return _mixed(text).hex()[:8]
