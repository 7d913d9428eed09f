"""What the components of an update read from a layer's inputs and write to its outputs."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from os import PathLike
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lightning_lora.analysis.adapters import AdapterMatrix, read_matrices
from lightning_lora.analysis.spectrum import ThinSVD
from lightning_lora.layers.starts import signs_of
from lightning_lora.names import listed, near_names

MOST_COMPONENTS = 4  # of an update, in summaries
_STRONGEST, _LEAST = 3, 0.005  # features that a summary names, and the share that it does not round to zero
_COLORS = 3


class Loadings(NamedTuple):
    """The components of an update: ``sum over i of values[i] * outer(writes[i], reads[i])``, the largest first.

    They do not depend on how the update is split into factors. The largest entry of each row of ``reads`` is positive.
    An update that is zero, as at the start, has one side alone, the rows of ``A`` in their order; the other is zero.

    Attributes:
        name: The update's name, as in ``AttachReport``.
        values: Singular values of the update, ``(q,)``.
        reads: Directions in the space of the inputs, of norm 1, ``(q, in)``.
        writes: Directions in the space of the outputs, of norm 1, ``(q, out)``.
        kernel: What the inputs of a convolution's kernel are flattened from, ``(channels, *positions)``; of a
            transposed convolution, this is said of the outputs. Empty without a kernel.
        writes_kernel: Whether the convolution is a transposed one.
    """

    name: str
    values: Tensor
    reads: Tensor
    writes: Tensor
    kernel: tuple[int, ...] = ()
    writes_kernel: bool = False

    @property
    def shares(self) -> Tensor:
        """Share of each component in the update's squared norm, ``(q,)``; NaN if that is zero."""
        return self.values.square() / self.values.square().sum()


class Component(NamedTuple):
    """A component of an update in short.

    Attributes:
        share: Its share of the update's squared norm; NaN if the update is zero.
        reads: The input features with the largest loadings, and their shares in the direction's squared norm; of a
            kernel, the channels.
        writes: The same of the outputs; empty if the update is zero.
        picture: How the loadings lie in the kernel, ``(height, width)``, or ``(height, width, 3)`` of three channels,
            which are taken for colors. Of more channels, the pattern, of norm 1, that all of them share most, whatever
            its sign. Kernels of three dimensions lie in slices side by side. None without a kernel, or for one of a
            single position.
    """

    share: float
    reads: tuple[tuple[int, float], ...]
    writes: tuple[tuple[int, float], ...]
    picture: Tensor | None = None


def loadings(
    source: nn.Module | str | PathLike[str], base: nn.Module | None = None, *, layer: str | None = None
) -> list[Loadings]:
    """Return what each component of each update reads and writes.

    After training, these are the directions of the data that the adapter uses, and what it does with them; after a
    start from data, those in which it looks for something to use.

    Args:
        source: An adapted module, a ``.ckpt`` written under a ``LoRACallback``, or a PEFT directory.
        base: The base model of a file that cannot be read without it.
        layer: Name of one update, such as ``"h.3.attn.q"``; by default all.

    Raises:
        ValueError: As ``read_matrices``; there is no such update; or the factors are not finite.
        FileNotFoundError: The file does not exist.
    """
    matrices = read_matrices(source, base)
    names = [matrix.name for matrix in matrices]
    if layer is not None and layer not in names:
        near = listed([*map(repr, near_names(layer, names, 3))])
        raise ValueError(f"layer={layer!r} has no update.{f' Closest names: {near}.' if near else ''}")
    return [loadings_of(matrix, matrix.svd()) for matrix in matrices if layer in (None, matrix.name)]


def loadings_of(matrix: AdapterMatrix, svd: ThinSVD) -> Loadings:
    """Return the components of one update, given its decomposition."""
    found = svd.significant()
    if len(found.values):
        rows, columns, values = found.V.T, found.U.T, found.values
    else:
        A = matrix.A.detach().cpu().double()
        rows = nn.functional.normalize(A[A.any(1)], dim=1)
        columns, values = rows.new_zeros(len(rows), matrix.shape[0]), rows.new_zeros(len(rows))
    signs = signs_of(columns.T if matrix.writes_kernel and columns.any() else rows.T).unsqueeze(1)
    rows, columns = signs * rows, signs * columns
    reads, writes = (columns, rows) if matrix.writes_kernel else (rows, columns)
    return Loadings(matrix.name, values, reads, writes, matrix.kernel, matrix.writes_kernel)


def components_of(found: Loadings) -> tuple[Component, ...]:
    """Return the leading components in short."""
    return tuple(_component(found, at) for at in range(min(MOST_COMPONENTS, len(found.values))))


def _component(found: Loadings, at: int) -> Component:
    flat = found.writes[at] if found.writes_kernel else found.reads[at]
    patches = flat.view(found.kernel) if found.kernel else None
    reads, writes = found.reads[at], found.writes[at]
    if patches is not None:
        by_channel = patches.flatten(1).norm(dim=1)
        reads, writes = (reads, by_channel) if found.writes_kernel else (by_channel, writes)
    picture = None if patches is None or patches[0].numel() == 1 else _picture(patches)
    return Component(float(found.shares[at]), _strongest(reads), _strongest(writes), picture)


def _strongest(loadings: Tensor) -> tuple[tuple[int, float], ...]:
    shares = loadings.square()
    values, places = shares.topk(min(_STRONGEST, len(shares)))
    return tuple((at, share) for at, share in zip(places.tolist(), values.tolist(), strict=True) if share > _LEAST)


def _picture(patches: Tensor) -> Tensor:
    """Return ``(channels, *positions)`` as a picture."""
    channels, *positions = patches.shape
    if channels == _COLORS and len(positions) == 2:
        return patches.permute(1, 2, 0)
    leading = torch.linalg.svd(patches.flatten(1), full_matrices=False)[2][:1]
    pattern: Tensor = (leading * signs_of(leading.T)).view(positions)
    if len(positions) == 3:
        return torch.cat(list(pattern), dim=-1)
    return pattern.reshape(-1, positions[-1])


# --- as a table


def component_rows(
    named: Sequence[tuple[str, Sequence[Component]]], most: int = MOST_COMPONENTS
) -> Iterator[tuple[str, ...]]:
    """Yield a table of the leading components of updates, by name: a header, and a row for each."""
    yield ("layer", "component", "share", "reads", "writes")
    for name, components in named:
        for number, each in enumerate(components[:most], 1):
            share = "-" if math.isnan(each.share) else f"{each.share:.0%}"
            yield (name, str(number), share, _said(each.reads), _said(each.writes))


def _said(strongest: Sequence[tuple[int, float]]) -> str:
    return ", ".join(f"{at} ({share:.0%})" for at, share in strongest) or "-"
