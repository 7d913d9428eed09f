"""Live diagnostics: a few numbers for each group of layers, measured from the thin factors while they train.

Letters: ``r`` rank, ``s`` scaling, ``m`` matrices: one, or the experts of a stack. Only the r x r Gram matrices
``A @ A.T`` and ``B.T @ B`` are formed, never the update; they determine its singular values.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator
from typing import Any, NamedTuple, cast

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.fabric.utilities.rank_zero import rank_zero_info  # type: ignore[attr-defined]
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from lightning_lora.adapted_model import AdaptedModel
from lightning_lora.layers import LoRALayer, LowRankAdapter, base_parameter
from lightning_lora.names import join, listed
from lightning_lora.sharding import is_sharded, whole

_PREFIX = "lora"
DEAD = 0.01  # of the largest singular value: a direction below has less than 1e-4 of that one's squared norm
_BLOCK = 2**20  # elements of a weight that are read at once


class FitDiagnostics:
    """Measures the adapters every N steps, and logs the numbers through the module.

    Steps are those of the loggers, one for each batch after which an optimizer was stepped: ``_batches_that_stepped``
    counts them, as for Lightning's own LearningRateMonitor, and a checkpoint keeps it. If a module steps its optimizers
    itself, the first batch with a step after the time has come is measured; if it does so past Lightning, without
    gradients. Gradients are those that the optimizer is about to use: accumulated, averaged over processes, unscaled
    and not yet clipped. The updates are those after the step.

    Args:
        every_n_steps: Steps between two measurements.
        trainer: The Trainer, when training begins.
        module: The adapted module.
    """

    def __init__(self, every_n_steps: int, trainer: Trainer, module: LightningModule) -> None:
        self.every_n_steps, self.trainer, self.module = every_n_steps, trainer, module
        option = f"diagnostics_every_n_steps={every_n_steps}"
        if trainer.barebones:
            raise MisconfigurationException(
                f"{option}: a barebones Trainer logs nothing. Unset diagnostics_every_n_steps, or use barebones=False."
            )
        self._diagnostics = Diagnostics(module)
        if not self._diagnostics.watched:
            raise MisconfigurationException(f"{option}: the model has no low-rank adapter to measure. Leave it out.")
        if unknown := self._diagnostics.unknown_weights:
            rank_zero_info(f"LoRA: no update_over_weight for {listed(unknown)}: their weights are quantized.")
        self._has_gradients, self._periods = False, self._steps() // every_n_steps  # periods measured so far

    def before_step(self, optimizer: Optimizer) -> None:
        """Record the gradients if a measurement is due."""
        if (self._steps() + 1) // self.every_n_steps > self._periods:
            self._diagnostics.note_gradients(optimizer)
            self._has_gradients = True

    def after_batch(self) -> None:
        """Log the measurement, once for all optimizers that this batch stepped."""
        periods = (self._steps() + 1) // self.every_n_steps
        is_past_lightning = not self.module.automatic_optimization and self.trainer.global_step == 0
        if not (self._has_gradients or (is_past_lightning and periods > self._periods)):
            return
        self._has_gradients, self._periods = False, periods
        metrics = {f"{_PREFIX}/{name}": value for name, value in self._diagnostics.metrics().items()}
        # All processes have computed the same numbers, so nothing is reduced.
        self.module.log_dict(metrics, on_step=True, on_epoch=False, batch_size=1)

    def _steps(self) -> int:
        return self.trainer.fit_loop.epoch_loop._batches_that_stepped


def check_interval(every_n_steps: object) -> None:
    """Refuse an invalid ``diagnostics_every_n_steps``."""
    option = "LoRACallback.diagnostics_every_n_steps"
    if every_n_steps is None:
        return
    if not isinstance(every_n_steps, int) or isinstance(every_n_steps, bool):
        raise TypeError(f"{option} must be an integer or None, got {every_n_steps!r}.")
    if every_n_steps < 0:
        raise ValueError(f"{option} must be >= 0, got {every_n_steps!r}; 0 switches it off.")


class Watched(NamedTuple):
    """An adapter to measure, with its name, its group and its layer."""

    name: str
    group: str
    adapter: LowRankAdapter
    layer: LoRALayer


class Diagnostics:
    """Measures the low-rank adapters of a module, in groups of layers of one kind.

    The metrics of a group are named ``<group>/<metric>``:

    - ``update_over_weight``: Frobenius norm of ``s * B @ A`` over that of the weight, each of all layers of the group
      together. Left out where a weight is quantized, as its norm is not known.
    - ``grad_norm_A`` and ``grad_norm_B``: norm of the gradient of all these factors of the group together.
    - ``effective_rank``: ``exp`` of the entropy of the update's singular values, the mean over the layers; 0 for no
      update.
    - ``dead_share``: share of the rank that does nothing: singular directions of the update whose value is at most
      ``DEAD`` times the largest, however the update is split into factors. An update of zero, as before the first step,
      is all dead.

    An expert of a stack counts as a layer. DoRA's magnitudes, biases and trained tokens are not low-rank updates and
    are not measured.

    Args:
        module: An adapted module. The norms of its frozen weights are computed here, once, in blocks.

    Source:
        Hu et al. 2021, "LoRA", arXiv:2106.09685, section 7.3 (update and weight); Roy and Vetterli 2007, "The effective
        rank", definition 1; Golub and Van Loan, "Matrix Computations", section 5.4 (numerical rank: how many singular
        values are above a threshold, here a coarse one).
    """

    def __init__(self, module: nn.Module) -> None:
        self.watched = list(_watched(module))
        self._weights = {each.name: _weight_square(each) for each in self.watched}
        self._gradients: dict[tuple[str, str], Tensor] = {}

    @property
    def unknown_weights(self) -> list[str]:
        """Names of the adapters with weights whose norm cannot be computed."""
        return [name for name, square in self._weights.items() if math.isnan(square)]

    @torch.no_grad()
    def note_gradients(self, optimizer: Optimizer) -> None:
        """Record the gradients of the factors that an optimizer holds, replacing earlier ones.

        Under FSDP2 and tensor parallelism every process must call this.
        """
        held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        for each in self.watched:
            for factor, parameter in (("A", each.adapter.A), ("B", each.adapter.B)):
                if id(parameter) in held and parameter.grad is not None:
                    self._gradients[each.name, factor] = _square(whole(parameter.grad))

    @torch.no_grad()
    def metrics(self) -> dict[str, float]:
        """Return all numbers, the same in every process, and forget the gradients; every process must call this."""
        found: dict[str, float] = {}
        gradients, self._gradients = self._gradients, {}
        numbers = dict(zip(gradients, to_floats(list(gradients.values())), strict=True))
        for group, spectra in self._spectra().items():
            names = [each.name for each in self.watched if each.group == group]
            weight = sum(self._weights[name] for name in names)
            if weight > 0:  # neither zero nor unknown
                found[f"{group}/update_over_weight"] = math.sqrt(sum(float(s.square().sum()) for s in spectra) / weight)
            for factor in "AB":
                squares = [numbers[name, factor] for name in names if (name, factor) in numbers]
                if squares:
                    found[f"{group}/grad_norm_{factor}"] = math.sqrt(sum(squares))
            found[f"{group}/effective_rank"] = sum(map(_effective_rank, spectra)) / len(spectra)
            found[f"{group}/dead_share"] = sum(map(_dead, spectra)) / sum(map(len, spectra))
        return found

    def _spectra(self) -> dict[str, list[Tensor]]:
        """Return the singular values of every update by group; updates of one rank are decomposed in one call."""
        by_rank: dict[int, list[tuple[str, Tensor]]] = defaultdict(list)
        for each in self.watched:
            grams = factor_grams(each.adapter)
            by_rank[grams.shape[-1]].append((each.group, grams))
        found: dict[str, list[Tensor]] = {each.group: [] for each in self.watched}
        for parts in by_rank.values():
            owners = [group for group, grams in parts for _ in range(grams.shape[1])]
            gram_A, gram_B = torch.cat([grams for _, grams in parts], dim=1).cpu().double()
            for group, values in zip(owners, singular_values(gram_A, gram_B), strict=True):
                found[group].append(values)
        return found


def factor_grams(adapter: LowRankAdapter) -> Tensor:
    """Return ``A @ A.T`` and ``s^2 * B.T @ B``, ``(2, m, r, r)``, in float64 where the device has it."""
    dtype = torch.float32 if adapter.A.device.type == "mps" else torch.float64
    A, B = (factor.to(dtype) for factor in adapter.whole_factors())
    grams = torch.stack([A @ A.mT, adapter.spec.scaling**2 * (B.mT @ B)])
    return grams if A.ndim == 3 else grams.unsqueeze(1)


@torch.no_grad()
def norm_of_updates(module: nn.Module) -> float:
    """Return the Frobenius norm of all updates ``s * B @ A`` together; every process must call this."""
    products = [torch.prod(factor_grams(each.adapter), dim=0).sum() for each in _watched(module)]  # both are symmetric
    return math.sqrt(max(0.0, sum(to_floats(products)))) if products else 0.0


def singular_values(gram_A: Tensor, gram_B: Tensor) -> Tensor:
    """Return the singular values of ``B @ A``, in descending order; NaN where a factor is not finite.

    With ``A @ A.T = Q L Q.T`` they are the roots of the eigenvalues of ``L^(1/2) Q.T (B.T @ B) Q L^(1/2)``. Values
    below about 1e-8 of the largest are rounding.

    Args:
        gram_A: ``A @ A.T``, ``(m, r, r)``, float64.
        gram_B: ``B.T @ B``, the same.

    Returns:
        ``(m, r)``.
    """
    is_finite = (gram_A.isfinite() & gram_B.isfinite()).flatten(1).all(1)[:, None]
    gram_A, gram_B = (torch.where(is_finite[..., None], gram, 0.0) for gram in (gram_A, gram_B))
    squares, Q = torch.linalg.eigh(gram_A)
    half = Q * squares.clamp_min(0).sqrt().unsqueeze(-2)
    values = torch.linalg.eigvalsh(half.mT @ gram_B @ half).clamp_min(0).sqrt().flip(-1)
    return torch.where(is_finite, values, torch.nan)


def group_of(name: str) -> str:
    """Return the name of a layer's group: the last part of its name, with the numbers that follow."""
    parts = name.split(".")
    named = [index for index, part in enumerate(parts) if not part.isdigit()]
    return ".".join(parts[named[-1] if named else 0 :])


def _watched(module: nn.Module) -> Iterator[Watched]:
    for path, layer in AdaptedModel(module).layers.items():
        adapters = layer.adapters()
        for key, adapter in adapters.items():
            if isinstance(adapter, LowRankAdapter):
                name = path if adapters.keys() == {"weight"} else join(path, key)
                yield Watched(name, group_of(name), adapter, layer)


@torch.no_grad()
def _weight_square(watched: Watched) -> float:
    """Return the squared norm of the weight that an adapter updates; NaN if it is packed and cannot be read."""
    adapter, weight = watched.adapter, base_parameter(watched.layer, watched.adapter.parameter)
    is_packed = bool(is_traceable_wrapper_subclass(cast(Any, weight))) and not is_sharded(weight)
    if is_packed or not weight.is_floating_point():
        return math.nan
    if is_sharded(weight):
        weight = whole(weight)  # of one layer at a time, as its forward has it
    matrix = adapter.as_matrix(weight) if adapter.spec.rows else weight
    rows = max(1, _BLOCK * len(matrix) // max(1, matrix.numel()))
    places = torch.split(adapter.index, rows) if adapter.spec.rows else ()
    parts = (matrix.index_select(0, place) for place in places) if places else torch.split(matrix, rows)
    return sum(to_floats([_square(part) for part in parts]))


def _square(tensor: Tensor) -> Tensor:
    dtype = torch.promote_types(tensor.dtype, torch.float32)
    norm: Tensor = torch.linalg.vector_norm(tensor, dtype=dtype)
    return norm.square()


def to_floats(scalars: list[Tensor]) -> list[float]:
    """Return numbers that may be on several devices, waiting for each device once."""
    if len({scalar.device for scalar in scalars}) == 1:
        return [float(value) for value in torch.stack(scalars).tolist()]
    return [float(scalar) for scalar in scalars]


def _effective_rank(values: Tensor) -> float:
    """Return the effective rank, as ``analysis.spectrum`` does; NaN if a factor is not finite."""
    if not values.isfinite().all():
        return math.nan
    total = values.sum()
    return float(torch.special.entr(values / total).sum().exp()) if total > 0 else 0.0


def _dead(values: Tensor) -> float:
    return float((values <= DEAD * values.max()).sum()) if values.isfinite().all() else math.nan
