"""Kernels for CUDA that read x and dy once; off until a GPU has measured them (docs/decisions.md). Needs triton.

Letters: x is ``(M, k)``, a factor F ``(r, k)``, the thin tensors h and g ``(M, r)``. Sums are in float32 and rounded
once. They are made in parts that are added in a fixed order, without atomic additions, so the same inputs give the same
bits. A mask is never stored: Philox makes it anew from a seed, with row and column as its counter.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
HIGHEST_RANK = 128
# Sizes of blocks: guesses from the sizes of registers and caches of an H100, which no GPU has confirmed.
_ROWS, _COLUMNS, _CHUNK = 256, 64, 1024
_ADD_ROWS, _ADD_COLUMNS = 64, 128
_LEAST = 16  # no side of a product may be shorter
_ROUNDS = 7  # timings of each path, of which the fastest counts: the others were disturbed

_choices: dict[tuple[object, ...], bool] = {}


# Whether kernels run in Triton's interpreter, on the CPU; its products know no bfloat16.
_INTERPRETED = bool(triton.knobs.runtime.interpret)


# --- on the device


@triton.jit
def _dot(a, b, WIDE: tl.constexpr):
    """Return a product, summed in float32 and never in the 10 bits of TF32."""
    if WIDE:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, input_precision="ieee")


@triton.jit
def _alive(seed, rows, first, threshold, HEIGHT: tl.constexpr, WIDTH: tl.constexpr):
    """Return which elements of a tile are kept; depends on their rows and columns alone, not on the tile."""
    groups = first // 4 + tl.arange(0, WIDTH // 4)
    row = tl.broadcast_to(rows[:, None], (HEIGHT, WIDTH // 4)).to(tl.uint32)
    group = tl.broadcast_to(groups[None, :], (HEIGHT, WIDTH // 4)).to(tl.uint32)
    zero = row * 0
    a, b, c, d = tl.philox(seed, row, group, zero, zero)  # four numbers for four columns
    numbers = tl.reshape(tl.join(tl.join(a, b), tl.join(c, d)), (HEIGHT, WIDTH))
    return numbers.to(tl.int64) < threshold


@triton.jit
def _read(
    x, F, h, sums, parts, seed, threshold, M, K, R, x_row, x_column, F_rank, F_column, h_row, h_rank,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, CHUNK: tl.constexpr, RANKS: tl.constexpr,
    MASKED: tl.constexpr, DOWN: tl.constexpr, PAIRED: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Read a tile of x once; DOWN: sums of ``mask(x) F^T``; PAIRED: parts of ``mask(x)^T h``."""
    block, piece = tl.program_id(0), tl.program_id(1)
    rows, ranks = block * ROWS + tl.arange(0, ROWS), tl.arange(0, RANKS)
    thin = (rows < M)[:, None] & (ranks < R)[None, :]
    far = rows.to(tl.int64)
    if DOWN:
        total = tl.zeros((ROWS, RANKS), tl.float32)
    if PAIRED:
        held = tl.load(h + far[:, None] * h_row + ranks[None, :] * h_rank, mask=thin, other=0.0)
    if MASKED:
        number = tl.load(seed)
    for done in range(0, CHUNK, COLUMNS):
        first = piece * CHUNK + done
        columns = first + tl.arange(0, COLUMNS)
        inside = columns < K
        tile = tl.load(
            x + far[:, None] * x_row + columns[None, :].to(tl.int64) * x_column,
            mask=(rows < M)[:, None] & inside[None, :],
            other=0.0,
        )
        if MASKED:
            tile = tl.where(_alive(number, rows, first, threshold, ROWS, COLUMNS), tile, 0.0).to(x.dtype.element_ty)
        if DOWN:
            factor = tl.load(
                F + columns[:, None].to(tl.int64) * F_column + ranks[None, :] * F_rank,
                mask=inside[:, None] & (ranks < R)[None, :],
                other=0.0,
            )
            total += _dot(tile, factor, WIDE)
        if PAIRED:
            part = _dot(tl.trans(tile), held, WIDE)
            where = (block.to(tl.int64) * K + columns[:, None]) * R + ranks[None, :]
            tl.store(parts + where, part, mask=inside[:, None] & (ranks < R)[None, :])
    if DOWN:
        tl.store(sums + (piece.to(tl.int64) * M + far[:, None]) * R + ranks[None, :], total, mask=thin)


@triton.jit
def _add(
    y, h, F, seed, threshold, alpha, M, K, R, y_row, y_column, h_row, h_rank, F_rank, F_column,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, RANKS: tl.constexpr, MASKED: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    """Add ``alpha * mask(h F)`` to a tile of y."""
    rows, ranks = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, RANKS)
    first = tl.program_id(1) * COLUMNS
    columns = first + tl.arange(0, COLUMNS)
    far, inside, used = rows.to(tl.int64), columns < K, ranks < R
    held = tl.load(
        h + far[:, None] * h_row + ranks[None, :] * h_rank, mask=(rows < M)[:, None] & used[None, :], other=0.0
    )
    factor = tl.load(
        F + ranks[:, None] * F_rank + columns[None, :].to(tl.int64) * F_column,
        mask=used[:, None] & inside[None, :],
        other=0.0,
    )
    update = alpha * _dot(held, factor, WIDE)
    if MASKED:
        update = tl.where(_alive(tl.load(seed), rows, first, threshold, ROWS, COLUMNS), update, 0.0)
    place = y + far[:, None] * y_row + columns[None, :].to(tl.int64) * y_column
    shown = (rows < M)[:, None] & inside[None, :]
    before = tl.load(place, mask=shown, other=0.0).to(tl.float32)
    tl.store(place, (before + update).to(y.dtype.element_ty), mask=shown)


# --- for the operations


def new_seed(like: Tensor) -> Tensor:
    """Return a seed for a mask, drawn from torch's generator of the device, which checkpointing replays."""
    return torch.randint(2**62, (1,), dtype=torch.int64, device=like.device)


def dropped_product(x: Tensor, A: Tensor, keep: float, seed: Tensor) -> Tensor:
    """Return ``mask(x) A^T``, ``(M, r)``, in one read of x; each element is kept with probability ``keep``."""
    return _read_once(x, A, None, keep, seed)[0].to(x.dtype)


def gradients(dy: Tensor, B: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
    """Return ``g = dy B``, ``(M, r)``, and ``dy^T h``, ``(n, r)`` in float32, in one read of dy."""
    g, dB = _read_once(dy, B.T, h, 1.0, None)
    return g.to(dy.dtype), dB


def factor_gradient(g: Tensor, x: Tensor, keep: float, seed: Tensor) -> Tensor:
    """Return ``g^T mask(x)``, ``(r, k)`` in float32, with the mask of ``dropped_product``."""
    return _read_once(x, None, g, keep, seed)[1].T


def add_product(y: Tensor, h: Tensor, F: Tensor, alpha: float, keep: float = 1.0, seed: Tensor | None = None) -> Tensor:
    """Add ``alpha * mask(h F)`` to y, ``(M, k)``, in its memory; no mask without a seed."""
    (M, K), R = y.shape, h.shape[1]
    if y.numel():
        grid = (triton.cdiv(M, _ADD_ROWS), triton.cdiv(K, _ADD_COLUMNS))
        _add[grid](
            y, h, F, y if seed is None else seed, _threshold(keep), alpha, M, K, R,
            *y.stride(), *h.stride(), *F.stride(),
            ROWS=_ADD_ROWS, COLUMNS=_ADD_COLUMNS, RANKS=_padded(R), MASKED=seed is not None, WIDE=_INTERPRETED,
        )  # fmt: skip
    return y


def mask_bits(shape: tuple[int, int], dtype: torch.dtype, keep: float, seed: Tensor) -> Tensor:
    """Return the mask that ``dropped_product`` gives an x of this shape, as bits in bytes, ``(M, ceil(k / 8))``."""
    (M, K), one = shape, torch.ones(1, 1, dtype=dtype, device=seed.device)
    length = (K + 7) // 8
    padded = torch.zeros(M, 8 * length, dtype=dtype, device=seed.device)
    add_product(padded[:, :K], one.expand(M, 1), one.expand(1, K), 1.0, keep, seed)
    places = 2 ** torch.arange(8, device=seed.device)
    return (padded.view(M, length, 8).long() * places).sum(-1).to(torch.uint8)


def _read_once(
    x: Tensor, F: Tensor | None, h: Tensor | None, keep: float, seed: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Return ``mask(x) F^T`` and ``mask(x)^T h``, in float32, each where its factor is given."""
    (M, K), R = x.shape, (h.shape[1] if F is None else F.shape[0])  # type: ignore[union-attr]
    height = max(_LEAST, _ROWS * 32 // max(32, _padded(R)))  # so that the sums fit into registers at every rank
    blocks, pieces = triton.cdiv(M, height), triton.cdiv(K, _CHUNK)
    # Empty where a kernel has nothing to do: with no rows, sums over them are zero.
    sums = x.new_empty(pieces, M if F is not None else 0, R, dtype=torch.float32)
    parts = x.new_empty(blocks, K if h is not None else 0, R, dtype=torch.float32)
    if blocks and pieces:
        _read[(blocks, pieces)](
            x, x if F is None else F, x if h is None else h, sums, parts, x if seed is None else seed,
            _threshold(keep), M, K, R, *x.stride(), *_strides(F), *_strides(h),
            ROWS=height, COLUMNS=_COLUMNS, CHUNK=_CHUNK, RANKS=_padded(R),
            MASKED=seed is not None, DOWN=F is not None, PAIRED=h is not None, WIDE=_INTERPRETED,
        )  # fmt: skip
    return sums.sum(0), parts.sum(0)


def _strides(tensor: Tensor | None) -> tuple[int, int]:
    return (0, 0) if tensor is None else (tensor.stride(0), tensor.stride(1))


def _padded(rank: int) -> int:
    return max(_LEAST, int(triton.next_power_of_2(rank)))


def _threshold(keep: float) -> int:
    return round(keep * 2**32)


# --- which path


def is_faster(
    what: str, like: Tensor, rank: int, kernels: Callable[[], object], composed: Callable[[], object]
) -> bool:
    """Return whether kernels were faster than torch's operations here, measured once for each device, shape and dtype.

    Args:
        what: Name of the operation.
        like: Its large input, ``(M, k)``.
        rank: Rank.
        kernels: Computes with kernels, without lasting effect.
        composed: Computes the same with torch's operations.
    """
    key = (what, like.device, tuple(like.shape), tuple(like.stride()), rank, like.dtype)
    found = _choices.get(key)
    if found is None:
        if _may_not_measure():
            return False  # for now: nothing is kept
        with torch.random.fork_rng([like.device] if like.is_cuda else []), torch.no_grad():
            found = _choices[key] = _seconds(kernels) < _seconds(composed)
    return found


def _may_not_measure() -> bool:
    """Return whether a graph is being captured or compiled, which a measurement would become part of."""
    return torch.compiler.is_compiling() or (torch.cuda.is_available() and torch.cuda.is_current_stream_capturing())


def _seconds(job: Callable[[], object]) -> float:
    """Return the time of the device for a job, without compiling."""
    times: list[float] = []
    for _ in range(_ROUNDS):
        before, after = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        before.record()
        job()
        after.record()
        after.synchronize()
        times.append(before.elapsed_time(after) / 1e3)
    return min(times)
