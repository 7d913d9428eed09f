"""Sums over calibration data from which starts are computed.

Everything that is kept is a sum over sequences. The sums of several processes therefore add up to those of all their
data, in any order and however the data are split; averages never occur before the end.

Letters: ``x`` the input of a layer and ``g`` the gradient of the loss for its output, both per token; ``k`` the width
of either, ``S = sum(x x.T)``, ``n`` the number of tokens.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping, Sequence
from functools import cached_property
from typing import Literal, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_lora.calibration.spectrum import Spectrum, eigenpairs, of_sketch
from lightning_lora.layers.starts import seeded, standard_normal

Need: TypeAlias = Literal["inputs", "gradients", "cross", "permuted"]

EXACT_UP_TO = 1024  # the width up to which sums and decompositions in float64 are cheap
_WIDEST = 8192  # decomposed completely: about a minute on one core, in float32
_ENTRIES_AT_ONCE = 2**24  # of the Gram matrices of several sequences


# --- one side of a layer


class Moments:
    """Sums over the tokens of one input, or of the gradients of one output.

    Sums are float64 up to a width of 1024 and float32 above; counts are always float64.

    Args:
        width: ``k``.
        sketch: Number of columns of the sketch ``S @ Omega`` that is kept instead of ``S``, with a fixed Gaussian
            ``Omega``; None keeps ``S``. It costs ``k * sketch`` numbers instead of ``k * k``, and about ``sketch / 2``
            leading eigenpairs can be relied on.
        halves: Also keep the sums of every other sequence, for ``halves()``.
        seed: Seed of ``Omega``: the same in all processes.
        device: Of the sums; it must know float64.
    """

    def __init__(
        self,
        width: int,
        *,
        sketch: int | None = None,
        halves: bool = False,
        seed: int = 0,
        device: torch.device | str | None = None,
    ) -> None:
        self.width, self.seed = width, seed
        self.sketch = None if sketch is None or sketch >= width else sketch
        dtype = torch.float64 if width <= EXACT_UP_TO else torch.float32
        self._counts = torch.zeros(5, dtype=torch.float64, device=device)  # in the order of the properties below
        self._sum = torch.zeros(width, dtype=dtype, device=device)
        self._second = torch.zeros(width, self.sketch or width, dtype=dtype, device=device)
        self._odd = Moments(width, sketch=sketch, seed=seed, device=device) if halves else None
        self._seen = 0
        self._spectra: dict[tuple[float, ...], Spectrum] = {}

    # --- adding

    @torch.no_grad()
    def add(self, rows: Tensor, mask: Tensor | None = None) -> None:
        """Add the tokens of some sequences.

        Args:
            rows: ``(sequences, tokens, k)``, in any floating-point precision.
            mask: ``(sequences, tokens)``, False for tokens that do not count, whatever their values are. None counts
                all.

        Raises:
            ValueError: The shapes do not fit.
        """
        _require_shapes(rows, mask, self.width)
        with torch.autocast(rows.device.type, enabled=False):
            self._add(counted(rows, mask).to(self._sum.dtype), _lengths(rows, mask))
        if self._odd is not None:
            odd = slice((self._seen + 1) % 2, None, 2)
            self._odd.add(rows[odd], None if mask is None else mask[odd])
        self._seen += len(rows)

    def _add(self, rows: Tensor, lengths: Tensor) -> None:
        flat = rows.reshape(-1, self.width)
        squares = flat.square().sum(dtype=torch.float64)
        counts = (lengths.sum(), (lengths > 0).sum(), lengths.square().sum(), _squared_norms(rows), squares)
        self._counts += torch.stack([count.double() for count in counts])
        self._sum += flat.sum(0)
        self._second += flat.T @ (flat if self.sketch is None else flat @ self._omega)

    @cached_property
    def _omega(self) -> Tensor:
        assert self.sketch is not None
        return standard_normal(self.width, self.sketch, seeded(self.seed)).to(self._second)

    def tensors(self) -> list[Tensor]:
        """Return the sums, always in the same order: add those of other processes to them in place."""
        return [self._counts, self._sum, self._second, *(self._odd.tensors() if self._odd else ())]

    @property
    def nbytes(self) -> int:
        """Bytes that these statistics occupy."""
        own = sum(tensor.nbytes for tensor in (self._counts, self._sum, self._second))
        return own * (2 if self._odd else 1) + (self._second.nbytes if self.sketch else 0)

    # --- what was counted

    @property
    def tokens(self) -> float:
        """Number of tokens, ``n``."""
        return float(self._counts[0])

    @property
    def sequences(self) -> float:
        """Number of sequences with at least one token that counts."""
        return float(self._counts[1])

    @property
    def effective_sequences(self) -> float:
        """Number of sequences of equal length that would say as much: ``n^2 / sum(length^2)``."""
        return self.tokens**2 / float(self._counts[2])

    # --- what follows from it

    def require_data(self) -> None:
        """Raise an error unless there are tokens, and all of them finite.

        Raises:
            ValueError: No token was counted, or a value is NaN or infinite, or too large for float32.
        """
        if not self.tokens:
            raise ValueError("No token was counted: no data were added, or the mask excludes all of them.")
        if not all(bool(tensor.isfinite().all()) for tensor in self.tensors()):
            raise ValueError("The calibration data led to values that are not finite (NaN, or above float32's range).")

    def mean(self) -> Tensor:
        """Return the mean of the tokens, ``(k,)``."""
        self.require_data()
        return self._sum / self.tokens

    def trace(self, *, centre: bool = False) -> float:
        """Return the trace of the second moment, exact also with a sketch; centred, it is the total variance."""
        self.require_data()
        raw = float(self._counts[4]) / self.tokens
        return max(0.0, raw - float(self.mean().double().square().sum())) if centre else raw

    def second_moment(self, *, centre: bool = False) -> Tensor:
        """Return ``S / n``, less the square of the mean if centred, ``(k, k)``.

        Raises:
            ValueError: Only a sketch was kept.
        """
        if self.sketch:
            raise ValueError("The second moment itself was not kept, only its sketch: ask for the spectrum.")
        return self._per_token(centre)

    def spectrum(self, *, centre: bool = False) -> Spectrum:
        """Return the eigenpairs of the second moment: all, or those of its sketch with an isotropic remainder.

        They are kept: a decomposition takes longer than the sums.

        Source:
            For the sketch, Tropp et al. 2017, "Fixed-rank approximation of a positive-semidefinite matrix from
            streaming data", arXiv:1706.05736, section 3; for the remainder, Tipping and Bishop 1999, "Probabilistic
            principal component analysis", section 3.2.
        """
        state = (centre, *self._counts.tolist())
        if state not in self._spectra:
            second = self._per_token(centre)
            if self.sketch:
                self._spectra[state] = of_sketch(second, self._omega, self.trace(centre=centre))
            else:
                values, vectors = eigenpairs(second)
                self._spectra[state] = Spectrum(values.clamp(min=0), vectors, 0.0)
        return self._spectra[state]

    def _per_token(self, centre: bool) -> Tensor:
        """Return ``S / n``, or its sketch."""
        self.require_data()
        second = self._second / self.tokens
        if centre:
            mean = self.mean()
            second -= torch.outer(mean, mean if self.sketch is None else mean @ self._omega)
        return second

    def shrinkage(self) -> float:
        """Return the share of ``mean eigenvalue * identity`` that brings the second moment closest to the true one.

        The tokens of a sequence depend on each other, so sequences are what varies independently. For sequences of one
        token, this is the estimate of Ledoit and Wolf for data with a known mean of zero (``assume_centered`` in
        scikit-learn); taking tokens as independent would shrink too little by far.

        Returns:
            From 0 to 1.

        Raises:
            ValueError: There are fewer than two sequences, which show no variation.

        Source:
            Ledoit and Wolf 2004, "A well-conditioned estimator for large-dimensional covariance matrices", section 3,
            with the sum over samples replaced by one over sequences; lengths enter as ``effective_sequences``.
        """
        self.require_data()
        if self.sequences < 2:
            raise ValueError("One sequence shows no variation: the shrinkage needs at least two.")
        if self.sketch:
            values, _, rest = spectrum = self.spectrum()
            square = float(values.square().sum()) + spectrum.others * rest**2
        else:
            square = float((self._second.double() / self.tokens).square().sum())
        distance = square - self.trace() ** 2 / self.width
        variation = float(self._counts[3]) / self.tokens**2 - square / self.effective_sequences
        return min(1.0, variation / distance) if variation > 0 and distance > 0 else 0.0

    def halves(self) -> tuple[Moments, Moments]:
        """Return the moments of the even and of the odd sequences.

        Raises:
            ValueError: They were not asked for, or one of them has no tokens.
        """
        if self._odd is None:
            raise ValueError("The halves were not kept.")
        even, odd = copy.deepcopy(self), self._odd
        even._odd = None
        for total, part in zip(even.tensors(), odd.tensors(), strict=True):
            total -= part
        if not (even.tokens and odd.tokens):
            raise ValueError("The data cannot be split in two: there must be at least two sequences.")
        return even, odd


def counted(rows: Tensor, mask: Tensor | None) -> Tensor:
    """Return the rows with zeros where the mask is False, NaN or not."""
    return rows.detach() if mask is None else torch.where(mask.unsqueeze(-1), rows.detach(), 0)


def _lengths(rows: Tensor, mask: Tensor | None) -> Tensor:
    if mask is None:
        return torch.full((len(rows),), rows.shape[1], dtype=torch.float64, device=rows.device)
    return mask.sum(1).double()


def _squared_norms(rows: Tensor) -> Tensor:
    """Return the sum over sequences of ``|X.T @ X|^2``, which is ``|X @ X.T|^2``: the smaller of them is formed."""
    side = min(rows.shape[1:])
    total = torch.zeros((), dtype=torch.float64, device=rows.device)
    for part in torch.split(rows, max(1, _ENTRIES_AT_ONCE // max(1, side * side))):
        gram = part @ part.mT if rows.shape[1] < rows.shape[2] else part.mT @ part
        total += gram.square().sum(dtype=torch.float64)
    return total


def _require_shapes(rows: Tensor, mask: Tensor | None, width: int) -> None:
    if rows.ndim != 3 or rows.shape[-1] != width:
        raise ValueError(f"The rows must be (sequences, tokens, {width}), got {tuple(rows.shape)}.")
    if mask is not None and (mask.shape != rows.shape[:2] or mask.dtype != torch.bool):
        found = f"{tuple(mask.shape)}, {mask.dtype}"
        raise ValueError(f"The mask must be {tuple(rows.shape[:2])} and boolean, as the rows; got {found}.")


# --- both sides of a layer


class MatrixStatistics:
    """Sums over the tokens of one adapted weight.

    Args:
        out_features: Width of the gradients ``g``.
        in_features: Width of the inputs ``x``.
        needs: What to keep: the moments of the ``"inputs"`` and of the ``"gradients"``, ``"cross"``, the gradient of
            the weight ``sum(g x.T)``, and ``"permuted"``, the same with each sequence's gradients paired with the
            inputs of another: what it shows is chance.
        sketch: Columns of the sketches that replace second moments wider than that; None keeps these in full.
        axes: Sizes of the trailing axes of the inputs that have an order, such as ``(3, 3)`` for the kernel of a
            convolution with inputs ``(channels, 3, 3)``: starts then prefer smooth directions. None if the features
            have no order.
        seed: Seed of the sketches.
        device: Of the sums.

    Raises:
        ValueError: ``axes`` do not divide the inputs, or are combined with ``sketch``.
    """

    def __init__(
        self,
        out_features: int,
        in_features: int,
        needs: Collection[Need],
        *,
        sketch: int | None = None,
        axes: Sequence[int] | None = None,
        seed: int = 0,
        device: torch.device | str | None = None,
    ) -> None:
        self.out_features, self.in_features = out_features, in_features
        self.axes = None if axes is None else tuple(axes)
        self._require_axes(sketch)
        self.inputs: Moments | None = None
        self.gradients: Moments | None = None
        if "inputs" in needs:
            halves = axes is not None
            self.inputs = Moments(in_features, sketch=sketch, halves=halves, seed=seed, device=device)
        if "gradients" in needs:
            self.gradients = Moments(out_features, sketch=sketch, seed=seed, device=device)
        dtype = torch.float64 if max(out_features, in_features) <= EXACT_UP_TO else torch.float32
        size = (out_features, in_features)
        self.cross = torch.zeros(size, dtype=dtype, device=device) if "cross" in needs else None
        self.permuted = torch.zeros(size, dtype=dtype, device=device) if "permuted" in needs else None
        self._counts = torch.zeros(2, dtype=torch.float64, device=device)  # of tokens, and of pairs of tokens
        self._previous: tuple[Tensor, Tensor] | None = None

    def _require_axes(self, sketch: int | None) -> None:
        size = 1
        for axis in self.axes or ():
            size *= axis
        if self.in_features % size:
            raise ValueError(f"axes={self.axes!r} do not divide the {self.in_features} input features.")
        if self.axes is not None and sketch is not None and sketch < self.in_features:
            raise ValueError(f"axes={self.axes!r} need the complete second moment, and sketch={sketch!r} drops it.")

    @property
    def tokens(self) -> float:
        """Number of tokens that ``cross`` sums over."""
        return float(self._counts[0])

    @property
    def pairs(self) -> float:
        """Number of pairs of tokens that ``permuted`` sums over."""
        return float(self._counts[1])

    @property
    def is_empty(self) -> bool:
        """Whether nothing was added."""
        return not (self.tokens or (self.inputs is not None and self.inputs.tokens))

    @torch.no_grad()
    def add_gradient(self, gradient: Tensor) -> None:
        """Add the gradient of the weight for one batch, ``(out, in)``, instead of its inputs and gradients.

        Batches count equally, whatever their numbers of tokens.
        """
        assert self.cross is not None
        self.cross += gradient.to(self.cross)
        self._counts[0] += 1

    @torch.no_grad()
    def add(self, x: Tensor | None, g: Tensor | None = None, mask: Tensor | None = None) -> None:
        """Add the tokens of some sequences.

        Args:
            x: Inputs, ``(sequences, tokens, in)``; None if nothing that is kept needs them.
            g: Gradients of the loss, summed over tokens, for the outputs, ``(sequences, tokens, out)``; likewise.
            mask: ``(sequences, tokens)``, False for tokens that do not count.

        Raises:
            ValueError: The shapes do not fit.
        """
        if self.inputs is not None and x is not None:
            self.inputs.add(x, mask)
        if self.gradients is not None and g is not None:
            self.gradients.add(g, mask)
        if x is not None and g is not None:
            _require_shapes(x, mask, self.in_features)
            _require_shapes(g, mask, self.out_features)
            with torch.autocast(x.device.type, enabled=False):
                self._add_products(counted(x, mask), counted(g, mask), mask)

    def _add_products(self, x: Tensor, g: Tensor, mask: Tensor | None) -> None:
        present = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device) if mask is None else mask
        if self.cross is not None:
            self._counts[0] += present.sum()
            self.cross += _product(g, x, self.cross.dtype)
        if self.permuted is not None:
            other, its = self._of_another(x, present)
            self._counts[1] += (present & its).sum()
            self.permuted += _product(g, other, self.permuted.dtype)

    def _of_another(self, x: Tensor, present: Tensor) -> tuple[Tensor, Tensor]:
        """Return for each sequence the inputs of the one before it, and where they count.

        The first sequence of a batch takes the last one. A batch of one takes the batch before, kept until then.
        """
        if len(x) != 1:
            return x.roll(1, 0), present.roll(1, 0)
        previous, self._previous = self._previous, (x.clone(), present.clone())
        if previous is None:
            return torch.zeros_like(x), torch.zeros_like(present)
        missing = x.shape[1] - previous[0].shape[1]  # a negative number cuts
        return F.pad(previous[0], (0, 0, 0, missing)), F.pad(previous[1], (0, missing))

    def tensors(self) -> list[Tensor]:
        """Return the sums, always in the same order: add those of other processes to them in place."""
        moments = [part for part in (self.inputs, self.gradients) if part is not None]
        products = [part for part in (self.cross, self.permuted) if part is not None]
        return [tensor for part in moments for tensor in part.tensors()] + [*products, self._counts]

    @property
    def nbytes(self) -> int:
        """Bytes that these statistics occupy."""
        own = sum(part.nbytes for part in (self.cross, self.permuted, self._counts) if part is not None)
        return own + sum(part.nbytes for part in (self.inputs, self.gradients) if part is not None)


def _product(g: Tensor, x: Tensor, dtype: torch.dtype) -> Tensor:
    return g.flatten(0, 1).to(dtype).T @ x.flatten(0, 1).to(dtype)


# --- memory


def bytes_needed(out_features: int, in_features: int, needs: Collection[Need], *, sketch: int | None = None) -> int:
    """Return the bytes that ``MatrixStatistics`` of this shape occupies, without allocating it."""
    return MatrixStatistics(out_features, in_features, needs, sketch=sketch, device="meta").nbytes


def must_sketch(
    shapes: Mapping[str, tuple[int, int]], needs: Collection[Need], *, columns: int, budget: int
) -> frozenset[str]:
    """Return the layers whose second moments must be sketched for the statistics of all to fit in a budget.

    The widest come first, because they save most and their complete decomposition takes longest; those above 8192
    features are sketched in any case.

    Args:
        shapes: ``(out, in)`` of each layer, by name.
        needs: What to keep of each.
        columns: Columns of a sketch.
        budget: Bytes for all layers.

    Raises:
        ValueError: The budget is too small even if all layers are sketched.
    """
    total = sum(bytes_needed(*shape, needs) for shape in shapes.values())
    chosen: set[str] = set()
    for name in sorted(shapes, key=lambda name: (-max(shapes[name]), name)):
        if total <= budget and max(shapes[name]) <= _WIDEST:
            return frozenset(chosen)
        saved = bytes_needed(*shapes[name], needs) - bytes_needed(*shapes[name], needs, sketch=columns)
        if saved > 0:
            total -= saved
            chosen.add(name)
    if total > budget:
        raise ValueError(
            f"The statistics of {len(shapes)} layers need at least {total:,} bytes, with a sketch of {columns} columns "
            f"for each; the budget is {budget:,}. Raise the budget or adapt fewer layers."
        )
    return frozenset(chosen)
