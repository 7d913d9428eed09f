"""What attaching did, as a value and as a table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from typing_extensions import override

from lightning_lora.names import listed

_LEFT_OUT_SHOWN = 4


class AdaptedLayer(NamedTuple):
    """One adapted layer: its name, the entry of the config that chose it, and its adapter."""

    name: str
    pattern: str
    rank: int
    scaling: float
    parameters: int
    dtype: str


@dataclass(frozen=True)
class AttachReport:
    """What was adapted, what trains in full and what was left out; ``print(report)`` shows a table.

    Attributes:
        layers: The adapted layers.
        saved: Modules of ``modules_to_save`` -> their parameters.
        biases: Biases of the base that train -> their sizes.
        untied: Weights that got a copy of their own -> what they were tied to.
        left_out: Layers that the targets cover but that carry no adapter -> the reason.
        base_parameters: Parameters of the model without adapters.
        norms: Frozen normalisation layers that have running statistics.
        frozen_norm: What those do while training, as in ``LoRAConfig``.
    """

    layers: Sequence[AdaptedLayer]
    saved: Mapping[str, int]
    left_out: Mapping[str, str]
    base_parameters: int
    norms: int = 0
    frozen_norm: str = "eval"
    biases: Mapping[str, int] = field(default_factory=dict)
    untied: Mapping[str, str] = field(default_factory=dict)

    @property
    def adapter_parameters(self) -> int:
        """Number of adapter parameters."""
        return sum(layer.parameters for layer in self.layers)

    @property
    def trainable_parameters(self) -> int:
        """Number of parameters that train: adapters, biases and the modules trained in full."""
        return self.adapter_parameters + sum(self.saved.values()) + sum(self.biases.values())

    @override
    def __str__(self) -> str:
        header = ("pattern", "layers", "rank", "scaling", "parameters", "share", "dtype")
        groups: dict[tuple[str, int, float, str], list[AdaptedLayer]] = {}
        for layer in self.layers:
            groups.setdefault((layer.pattern, layer.rank, layer.scaling, layer.dtype), []).append(layer)
        rows = [
            self._row(pattern, len(group), str(rank), f"{scaling:g}", sum(a.parameters for a in group), dtype)
            for (pattern, rank, scaling, dtype), group in groups.items()
        ]
        rows += [self._row(f"{name} (in full)", 1, "-", "-", count, "-") for name, count in self.saved.items()]
        if self.biases:
            rows.append(self._row("biases", len(self.biases), "-", "-", sum(self.biases.values()), "-"))
        count = len(self.layers) + len(self.saved) + len(self.biases)
        rows.append(self._row("trainable", count, "", "", self.trainable_parameters, ""))
        frozen = self.base_parameters + self.adapter_parameters - self.trainable_parameters
        lines = [f"LoRA: {len(self.layers)} layers adapted, {frozen:,} base parameters frozen"]
        lines += table_lines([header, *rows]) + self._left_out_lines() + self._norm_lines()
        return "\n".join(
            lines + [f"untied: {name} has a copy of its own, {other} stays" for name, other in self.untied.items()]
        )

    def _row(self, pattern: str, layers: int, rank: str, scaling: str, parameters: int, dtype: str) -> tuple[str, ...]:
        share = f"{100 * parameters / max(1, self.base_parameters):.2f} %"
        return (pattern, str(layers), rank, scaling, f"{parameters:,}", share, dtype)

    def _norm_lines(self) -> list[str]:
        if not self.norms:
            return []
        what = "kept fixed, in eval mode" if self.frozen_norm == "eval" else "moving, saved with the adapter"
        return [f"running statistics of {self.norms} frozen norms: {what} (frozen_norm={self.frozen_norm!r})"]

    def _left_out_lines(self) -> list[str]:
        reasons: dict[str, list[str]] = {}
        for name, reason in self.left_out.items():
            reasons.setdefault(reason, []).append(name)
        return [f"left out: {listed(names, _LEFT_OUT_SHOWN)} ({reason})" for reason, names in reasons.items()]


def table_lines(rows: Sequence[Sequence[str]]) -> list[str]:
    """Return the lines of a table: a header first, and apart from the rest a last row of sums."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        first, *numbers = (
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        lines.append("  ".join([first, *numbers]).rstrip())
    rule = "  ".join("-" * width for width in widths)
    return [lines[0], rule, *lines[1:-1], rule, lines[-1]]
