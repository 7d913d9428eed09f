"""Dropout masks of one bit per element."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

_MOST_BITS = 24
_WHOLE_NUMBERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}  # by the bytes that one takes


def may_draw(dropout: float) -> bool:
    """Return whether the probability can be drawn, to a thousandth of it."""
    return 0.0 < dropout < 1.0 and _digits(dropout) is not None


def kept(dropout: float) -> float:
    """Return the probability with which ``random_bits`` sets a bit: about ``1 - dropout``, to the last digit."""
    digits = _digits(dropout)
    assert digits is not None
    return sum(0.5 ** (place + 1) for place, digit in enumerate(digits) if digit)


@functools.lru_cache(maxsize=64)
def _digits(dropout: float) -> tuple[bool, ...] | None:
    """Return the probability of keeping an element in binary, as few digits as a thousandth of ``dropout`` needs."""
    near = min(dropout, 1.0 - dropout) / 1000
    for length in range(1, _MOST_BITS + 1):
        steps = round((1.0 - dropout) * 2**length)
        if 0 < steps < 2**length and abs(steps / 2**length - (1.0 - dropout)) <= near:
            return tuple(bool(steps >> place & 1) for place in reversed(range(length)))
    return None


def random_bits(like: Tensor, dropout: float) -> Tensor:
    """Return bytes of random bits, each set with the probability of keeping an element.

    Drawn from torch's own generator of the device, as ``F.dropout`` does: it follows seeds, and activation
    checkpointing replays it. A bit is set if a random binary fraction is below the probability; all its digits but the
    first few are the same work for 64 bits at once.

    Args:
        like: Bytes, gives shape and device.
        dropout: Probability of a bit that is not set; ``may_draw`` says which can be.
    """
    digits = _digits(dropout)
    assert digits is not None
    words = torch.empty(len(digits), (like.numel() + 7) // 8, dtype=torch.int64, device=like.device)
    words.random_(-(2**63), None)
    found = words[-1]  # the last digit is a one, and is met with one half
    for digit, word in zip(reversed(digits[:-1]), reversed(words[:-1]), strict=True):
        # A fraction is below another if its first digit is lower, or equal and the rest is below.
        if digit:
            found.bitwise_or_(word)
        else:
            found.bitwise_and_(word)
    return found.view(torch.uint8)[: like.numel()].view(like.shape)


def alive(bits: Tensor, width: int, dtype: torch.dtype) -> Tensor:
    """Return a new mask of ones and zeros, ``(rows, width)``, from bits of shape ``(rows, bytes)``."""
    return _unpacked(bits, width, _table(dtype, bits.device))


def dropped(x: Tensor, bits: Tensor) -> Tensor:
    """Return ``x``, ``(rows, width)``, with zeros where a bit is not set; autograd does not see it."""
    # A bitwise "and" with all ones keeps a number, in a fifth of the time of a product in bfloat16.
    whole_numbers = _WHOLE_NUMBERS[x.element_size()]
    mask = _unpacked(bits, x.shape[1], _table(whole_numbers, bits.device).neg())
    return mask.bitwise_and_(x.view(whole_numbers)).view(x.dtype)


def _unpacked(bits: Tensor, width: int, table: Tensor) -> Tensor:
    rows, length = bits.shape
    mask = table.index_select(0, bits.flatten().int())  # faster than shifting, by far
    return mask.view(rows, 8 * length)[:, :width]


@functools.cache
def _table(dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return the eight bits of every byte, ``(256, 8)``."""
    bits = torch.arange(256, device=device).unsqueeze(1) >> torch.arange(8, device=device)
    return (bits & 1).to(dtype)
