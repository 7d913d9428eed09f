"""Dropout masks of one bit an element, eight to a byte."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

_STEPS = 1 << 16  # dropping has a probability of so many levels: 16 random bits decide on an element
# Multiplied by it, eight bytes that are 0 or 1 leave their bits side by side in the highest byte.
_GATHER = 0x0102040810204080


def random_bits(like: Tensor, dropout: float) -> Tensor:
    """Return bytes of random bits, each set with the probability of keeping an element.

    Drawn from torch's own generator of the device, as ``F.dropout`` does: it follows seeds, and activation
    checkpointing replays it.

    Args:
        like: ``(rows, bytes)``, gives shape and device.
        dropout: Probability of a bit that is not set; rounded to a multiple of 2**-16.
    """
    rows, width = like.shape
    words = torch.empty(rows, 2 * width, dtype=torch.int64, device=like.device).random_(-(2**63), None)
    is_kept = words.view(torch.int16) >= round(dropout * _STEPS) - _STEPS // 2  # (rows, 8 * bytes)
    return ((is_kept.view(torch.int64) * _GATHER) >> 56).to(torch.uint8)


def alive(bits: Tensor, width: int, dtype: torch.dtype) -> Tensor:
    """Return the mask that the bits ``(rows, bytes)`` say: ones and zeros, ``(rows, width)``, a tensor of its own."""
    rows, length = bits.shape
    mask = _table(dtype, bits.device).index_select(0, bits.flatten().int())  # faster than shifting, by far
    return mask.view(rows, 8 * length)[:, :width]


@functools.cache
def _table(dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return the eight bits of every byte, ``(256, 8)``."""
    bits = torch.arange(256, device=device).unsqueeze(1) >> torch.arange(8, device=device)
    return (bits & 1).to(dtype)
