"""The spectrum of a second moment: its leading eigenpairs, from all of it or from a sketch."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

_ZERO = {torch.float64: 1e-12, torch.float32: 1e-6}  # of the largest eigenvalue: sums in this precision say less


class Spectrum(NamedTuple):
    """A positive semidefinite matrix by its leading eigenpairs; what they leave out is taken as isotropic.

    Attributes:
        values: Leading eigenvalues in descending order, ``(q,)``.
        vectors: Their directions, one per column, ``(k, q)``.
        rest: The eigenvalue of the ``k - q`` other directions.
    """

    values: Tensor
    vectors: Tensor
    rest: float

    @property
    def others(self) -> int:
        """Number of directions that have the eigenvalue ``rest``."""
        return self.vectors.shape[0] - len(self.values)

    @property
    def rank(self) -> int:
        """Number of eigenvalues that are known and not zero."""
        return int((self.values > self._smallest()).sum())

    def shrunk(self, share: float, level: float) -> Spectrum:
        """Return ``(1 - share) * self + share * level * identity``."""
        kept, added = 1 - share, share * level
        return Spectrum(kept * self.values + added, self.vectors, kept * self.rest + added)

    def power(self, exponent: float, columns: Tensor) -> Tensor:
        """Return this matrix to a power, times ``columns``, ``(k, any)``; zero eigenvalues stay zero in any power."""
        kept = self.values > self._smallest()
        powers = torch.where(kept, self.values, 1.0).pow(exponent) * kept
        rest = self.rest**exponent if self.others and self.rest > self._smallest() else 0.0
        inside = self.vectors.T @ columns
        return self.vectors @ ((powers - rest).unsqueeze(1) * inside) + rest * columns

    def along(self, rows: Tensor) -> Tensor:
        """Return ``a @ self @ a`` for each row ``a``, ``(any, k)``."""
        inside = (rows @ self.vectors).square()
        return inside @ self.values + self.rest * (rows.square().sum(1) - inside.sum(1)) * bool(self.others)

    def _smallest(self) -> float:
        return _ZERO[self.values.dtype] * float(self.values[0]) if len(self.values) else 0.0


def eigenpairs(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Return the eigenvalues of a symmetric matrix in descending order, ``(k,)``, and their vectors, one per column.

    In float32, LAPACK does not converge on some matrices with many equal eigenvalues, such as those of a convolution
    that sees mostly padding. These are decomposed in float64.
    """
    try:
        values, vectors = torch.linalg.eigh(matrix)
    except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
        values, vectors = torch.linalg.eigh(matrix.double())
    return values.flip(0).to(matrix.dtype), vectors.flip(1).to(matrix.dtype)


def of_sketch(sketch: Tensor, omega: Tensor, trace: float) -> Spectrum:
    """Return the spectrum of a matrix from ``matrix @ omega``: ``Y (Omega.T Y)^-1 Y.T``, with ``Y`` the sketch."""
    zero = _ZERO[sketch.dtype]
    Y, omega = sketch.double(), omega.double()
    core = omega.T @ Y
    values, vectors = torch.linalg.eigh((core + core.T) / 2)
    kept = values > zero * values[-1].clamp(min=0)
    U, roots, _ = torch.linalg.svd(Y @ (vectors[:, kept] / values[kept].sqrt()), full_matrices=False)
    values = roots.square()
    others = len(Y) - len(values)
    rest = max(0.0, trace - float(values.sum())) / others
    return Spectrum(values.to(sketch.dtype), U.to(sketch.dtype), rest)
