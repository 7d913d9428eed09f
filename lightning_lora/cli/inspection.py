"""The contents of an adapter file, and how two of them differ; no base is needed."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_lora.analysis.adapters import in_order
from lightning_lora.analysis.spectrum import effective_rank, energy_rank, stable_rank, thin_svd
from lightning_lora.fingerprint import digest, to_plain
from lightning_lora.names import join, with_equal_roots
from lightning_lora.state import wide
from lightning_lora.storage.adapter_file import AdapterFile, StoredLayer
from lightning_lora.storage.checkpoint import CheckpointFile
from lightning_lora.sweep.standings import Table, sweep_in


class LayerSummary(NamedTuple):
    """The update of one layer.

    Rank, scaling and norm are None if a PEFT file adapts several parameters of one module with different ranks or
    alphas: it does not record which update is for which. The used ranks are None then too, and for non-finite factors.

    Attributes:
        name: The layer or the parameter.
        rank: The rank of the update.
        scaling: The factor of ``B @ A``.
        norm: Norm of ``scaling * B @ A``, without the effect of DoRA.
        parameters: Number of adapter parameters.
        dtype: Their precision.
        finite: Whether all are finite.
        effective_rank: How many directions the update uses; for stacked experts, the mean.
        stable_rank: Its squared norm over its squared largest singular value; for stacked experts, the mean.
        suggested_rank: How many directions hold 99 % of the squared norm; for stacked experts, the maximum.
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


class Summary(NamedTuple):
    """The contents of an adapter file.

    Attributes:
        file: The file.
        kind: ``"PEFT directory"`` or ``"Lightning checkpoint"``.
        layers: The low-rank updates.
        others: All other trained tensors.
        sweep: What a sweep has compared, if one wrote the file; else empty.
    """

    file: AdapterFile
    kind: str
    layers: list[LayerSummary]
    others: dict[str, Tensor]
    sweep: Table = Table()

    @property
    def parameters(self) -> int:
        """Number of trained parameters."""
        return sum(layer.parameters for layer in self.layers) + sum(tensor.numel() for tensor in self.others.values())

    def to_dict(self) -> dict[str, Any]:
        """Return the summary as JSON shows it."""
        base = self.file.base
        return {
            "kind": self.kind,
            **({"adapter": self.file.adapter, "adapters": list(self.file.adapters)} if self.file.adapters else {}),
            "bytes": self.file.size,
            "parameters": self.parameters,
            "layers": [layer._asdict() for layer in self.layers],
            "trained_in_full": {name: list(tensor.shape) for name, tensor in self.others.items()},
            "base": {"fingerprint": digest(base), "tensors": to_plain(base)} if base else None,
            "config": self.file.options,
            **({"sweep": list(self.sweep)} if self.sweep else {}),
        }


def summarize(file: AdapterFile) -> Summary:
    """Return the contents of an adapter file.

    Raises:
        ValueError: The file is damaged or holds no adapter.
    """
    if not file.tensors:
        raise ValueError(f"{str(file.path)!r} holds no adapter.")
    is_peft = file.path.is_dir()
    names = sorted(file.layers, key=in_order) if is_peft else list(file.layers)
    kind = "PEFT directory" if is_peft else "Lightning checkpoint"
    sweep = sweep_in(file.path)
    table = Table() if sweep is None else sweep[0].table()
    return Summary(file, kind, [_summary(name, file.layers[name]) for name in names], _others(file), table)


def _summary(name: str, layer: StoredLayer) -> LayerSummary:
    tensors = layer.factors.values()
    finite = all(bool(torch.isfinite(tensor).all()) for tensor in tensors)
    summary = LayerSummary(
        name,
        layer.rank,
        layer.scaling,
        None if layer.scaling is None else math.nan,
        sum(tensor.numel() for tensor in tensors),
        str(layer.A.dtype).removeprefix("torch."),
        finite,
    )
    if not finite or layer.rank is None:
        return summary
    experts = zip(*(factor.reshape(-1, *factor.shape[-2:]) for factor in (layer.A, layer.B)), strict=True)
    spectra = [thin_svd(A, B).values for A, B in experts]
    return summary._replace(
        norm=None if layer.scaling is None else abs(layer.scaling) * float(torch.cat(spectra).norm()),
        effective_rank=sum(map(effective_rank, spectra)) / len(spectra),
        stable_rank=sum(map(stable_rank, spectra)) / len(spectra),
        suggested_rank=max(map(energy_rank, spectra)),
    )


def _others(file: AdapterFile) -> dict[str, Tensor]:
    tokens = {each.key: each.rows for each in file.tokens.values()}
    buffers = file.record.get("buffers", {}) if isinstance(file, CheckpointFile) else {}
    return dict(sorted((file.others | tokens | buffers).items()))


# --- two adapters


def differences(one: AdapterFile, other: AdapterFile, *, root: str | None = None) -> Iterator[str]:
    """Yield the differences between two adapters, one line each; ``root`` as in ``analysis.compare``.

    Names count where both are checkpoints or both are directories, since either loads by its names.
    """
    both, inner = (_everything(one), _everything(other)), (one.path.is_dir(), other.path.is_dir())
    if root is not None or inner[0] != inner[1]:
        both = with_equal_roots(*both, root, inner)
    first, second = ({name: v for name, v in each.items() if isinstance(v, StoredLayer)} for each in both)
    yield from _one_sided(first, second, "layer")
    for name in sorted(first.keys() & second.keys()):
        pair = first[name], second[name]
        for key in ("rank", "scaling"):
            a, b = (getattr(layer, key) for layer in pair)
            if a != b:
                yield f"{name}: {key} {a} and {b}"
        yield from _largest_differences(
            *({join(name, key): factor for key, factor in layer.factors.items()} for layer in pair)
        )
    yield from _largest_differences(*({name: v for name, v in each.items() if isinstance(v, Tensor)} for each in both))


def _everything(file: AdapterFile) -> dict[str, StoredLayer | Tensor]:
    """Return all that an adapter holds, by the names that the model has for it, however the file spells them."""
    labels = {layer.label for layer in file.layers.values()}
    by_label = len(labels) == len(file.layers)
    return {layer.label if by_label else name: layer for name, layer in file.layers.items()} | _others(file)


def _one_sided(first: Mapping[str, object], second: Mapping[str, object], what: str) -> Iterator[str]:
    for which, names in (("first", first.keys() - second.keys()), ("second", second.keys() - first.keys())):
        yield from (f"{name}: {what} only in the {which}" for name in sorted(names))


def _largest_differences(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> Iterator[str]:
    yield from _one_sided(first, second, "tensor")
    for name in sorted(first.keys() & second.keys()):
        a, b = first[name], second[name]
        if a.shape != b.shape:
            yield f"{name}: shape {tuple(a.shape)} and {tuple(b.shape)}"
        elif bool((wide(a) != wide(b)).any()):
            yield f"{name}: largest difference {float((wide(a) - wide(b)).abs().max()):.3g}"
