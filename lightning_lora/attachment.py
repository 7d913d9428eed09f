"""Results of an attach: the report for the user, and the record on the module, from which it is saved and undone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from html import escape
from types import MappingProxyType
from typing import Any, NamedTuple

from torch import Tensor, nn
from typing_extensions import override

from lightning_lora.config import LoRAConfig
from lightning_lora.names import listed
from lightning_lora.option_checks import AUTO

DEFAULT = "default"  # the name of an adapter that was given none

Stored = Mapping[str, Sequence[Mapping[str, Any]]]  # the adapters in a file: name -> entries of what was attached where
NONE_STORED: Stored = {}

_ATTACHMENT = "_lora_attachment"
_MERGES = "_lora_merges"
_REQUEST = "_lora_request"
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
    """Report of an attach: what was adapted, trains in full or was left out, shown as a table.

    Attributes:
        layers: The adapted layers.
        saved: Modules of ``modules_to_save`` -> their number of parameters. What several share counts for the first.
        biases: Biases of the base that train -> their sizes. What several share counts for the first.
        untied: Weights that got a copy of their own -> what they were tied to.
        without_parameters: Those of ``saved`` that have buffers or extra states alone.
        left_out: Layers that the targets cover but that carry no adapter -> the reason.
        base_parameters: Number of parameters without adapters, with the copies of ``untied``.
        norms: Number of frozen normalization layers that have running statistics.
        frozen_norm: Their behavior in training, as in ``LoRAConfig``.
    """

    layers: Sequence[AdaptedLayer]
    saved: Mapping[str, int]
    left_out: Mapping[str, str]
    base_parameters: int
    norms: int = 0
    frozen_norm: str = "eval"
    biases: Mapping[str, int] = field(default_factory=dict)
    untied: Mapping[str, str] = field(default_factory=dict)
    without_parameters: Sequence[str] = ()

    @property
    def adapter_parameters(self) -> int:
        """Number of adapter parameters."""
        return sum(layer.parameters for layer in self.layers)

    @property
    def trainable_parameters(self) -> int:
        """Number of parameters that train: adapters, biases and the modules trained in full."""
        return self.adapter_parameters + sum(self.saved.values()) + sum(self.biases.values())

    @override
    def __repr__(self) -> str:
        title, rows, notes = self._content()
        return "\n".join([title, *table_lines(rows), *notes])

    def _repr_html_(self) -> str:
        title, (header, *rows), notes = self._content()
        table = [_html_row("th", header), *(_html_row("td", row) for row in rows)]
        return f"<p>{escape(title)}</p><table>{''.join(table)}</table>" + "".join(f"<p>{escape(n)}</p>" for n in notes)

    def _content(self) -> tuple[str, list[tuple[str, ...]], list[str]]:
        """Return the title, the rows of the table with its header and its totals, and the lines below it."""
        header = ("pattern", "layers", "rank", "scaling", "parameters", "share", "dtype")
        groups: dict[tuple[str, int, float, str], list[AdaptedLayer]] = {}
        for layer in self.layers:
            groups.setdefault((layer.pattern, layer.rank, layer.scaling, layer.dtype), []).append(layer)
        rows = [
            self._row(pattern, len(group), str(rank), f"{scaling:g}", sum(a.parameters for a in group), dtype)
            for (pattern, rank, scaling, dtype), group in groups.items()
        ]
        for name, count in self.saved.items():
            how = "no parameters" if name in self.without_parameters else "tied, counted above"
            how = "in full" if count else f"in full, {how}"
            rows.append(self._row(f"{name} ({how})", 1, "-", "-", count, "-"))
        if self.biases:
            rows.append(self._row("biases", len(self.biases), "-", "-", sum(self.biases.values()), "-"))
        count = len(self.layers) + len(self.saved) + len(self.biases)
        rows.append(self._row("trainable", count, "", "", self.trainable_parameters, ""))
        frozen = self.base_parameters + self.adapter_parameters - self.trainable_parameters
        untied = [f"untied: {name} has a copy of its own, {other} stays" for name, other in self.untied.items()]
        title = f"LoRA: {len(self.layers)} layers adapted, {frozen:,} base parameters frozen"
        return title, [header, *rows], [*self._left_out_lines(), *self._norm_lines(), *untied]

    def _row(self, pattern: str, layers: int, rank: str, scaling: str, parameters: int, dtype: str) -> tuple[str, ...]:
        share = f"{100 * parameters / max(1, self.base_parameters):.2f} %"
        return (pattern, str(layers), rank, scaling, f"{parameters:,}", share, dtype)

    def _norm_lines(self) -> list[str]:
        if not self.norms:
            return []
        fixed = "kept fixed, in eval mode; Lightning will warn of modules in eval mode, which is right for them"
        what = fixed if self.frozen_norm == "eval" else "moving, saved with the adapter"
        return [f"running statistics of {self.norms} frozen norms: {what} (frozen_norm={self.frozen_norm!r})"]

    def _left_out_lines(self) -> list[str]:
        reasons: dict[str, list[str]] = {}
        for name, reason in self.left_out.items():
            reasons.setdefault(reason, []).append(name)
        return [f"left out: {listed(names, _LEFT_OUT_SHOWN)} ({reason})" for reason, names in reasons.items()]


@dataclass
class Attachment:
    """Record of an attach, kept on the module that was attached to.

    Attributes:
        config: The request, with names for the heads that ``modules_to_save="auto"`` found.
        seed: Seed of the random starts.
        report: The result.
        required_grad: Parameter name -> whether it required a gradient before.
        base_values: Original values of the base tensors that the config lets training change: running statistics of
            frozen norms, and biases.
        untied: Weights that got a copy of their own -> what they were tied to.
        starts: Values before training of what trains in full, if it was attached inside ``keeping_starts``.
        moved: Names of buffers of the base that training has changed by itself, such as a queue of negatives.
        buffers: Their values from before; None for one that was not there yet.
        watched: Once it has trained, the values from before of all buffers of the base.
        name: Its name among several adapters; None while it is the only one.
        asked: The request as it was, if data or a truncation have decided the ranks in ``config``.
        calibration: What the data said of each adapter, as plain values, if they decided its start.
        rank_history: The decisions of a rank schedule, as plain values, once it has ended.
        states: The extra states and persistent metrics that its first fit began with.
    """

    config: LoRAConfig
    seed: int
    report: AttachReport
    required_grad: dict[str, bool] = field(default_factory=dict)
    base_values: dict[str, Tensor] = field(default_factory=dict)
    untied: dict[str, str] = field(default_factory=dict)
    starts: dict[str, Tensor] = field(default_factory=dict)
    moved: set[str] = field(default_factory=set)
    buffers: dict[str, Tensor | None] = field(default_factory=dict)
    watched: dict[str, Tensor | None] | None = None
    name: str | None = None
    asked: LoRAConfig | None = None
    calibration: dict[str, Any] = field(default_factory=dict)
    rank_history: dict[str, Any] = field(default_factory=dict)
    states: dict[str, Any] | None = None

    @property
    def first_buffers(self) -> dict[str, Tensor | None]:
        """The values from before training of the buffers of the base that training has changed, or may have."""
        return {**(self.watched or {}), **self.buffers}


def get_attachment(module: nn.Module) -> Attachment | None:
    """Return the record on exactly this module."""
    return vars(module).get(_ATTACHMENT)


def settled(config: LoRAConfig, before: Attachment | None) -> LoRAConfig:
    """Return a config with the heads that ``"auto"`` found and the ranks decided since, of an earlier attach."""
    if before is None:
        return config
    if config.modules_to_save == AUTO:
        config = replace(config, modules_to_save=before.config.modules_to_save)
    return before.config if before.asked == config else config


def is_same_request(config: LoRAConfig, asked: LoRAConfig | None) -> bool:
    """Return whether a config is one whose ranks were decided later, and whose record names the heads it found."""
    if asked is not None and config.modules_to_save == AUTO:
        config = replace(config, modules_to_save=asked.modules_to_save)
    return config == asked


def set_attachment(module: nn.Module, attachment: Attachment | None) -> None:
    """Set, replace or remove the record."""
    if attachment is None:
        vars(module).pop(_ATTACHMENT, None)
    else:
        vars(module)[_ATTACHMENT] = attachment


def request(
    module: nn.Module, config: LoRAConfig | None, seed: int = 0, name: str | None = None, stored: Stored = NONE_STORED
) -> None:
    """Set what ``attach`` without a config passes on to itself or, with a name, to ``attach_named``; or remove it."""
    if config is None:
        vars(module).pop(_REQUEST, None)
    else:
        vars(module)[_REQUEST] = (config, seed, name, stored)


def requested(module: nn.Module) -> tuple[LoRAConfig, int, str | None, Stored] | None:
    """Return what ``request`` left on a module."""
    return vars(module).get(_REQUEST)


_kept_aside: ContextVar[Mapping[str, nn.Module] | None] = ContextVar("_kept_aside", default=None)


@contextmanager
def keeping_starts(aside: Mapping[str, nn.Module] = MappingProxyType({})) -> Iterator[None]:
    """Have every attach inside the block keep the values before training of what trains in full.

    A later fit may start anew from them, and other adapters of the module need the base's own.

    Args:
        aside: Parts of the module that had adapters of their own, which are not in place inside the block, by name.
    """
    token = _kept_aside.set(aside)
    try:
        yield
    finally:
        _kept_aside.reset(token)


def keeps_starts() -> bool:
    """Return whether this runs inside ``keeping_starts``."""
    return _kept_aside.get() is not None


def kept_aside() -> Mapping[str, nn.Module]:
    """Return the parts of the module that had adapters of their own before the block of ``keeping_starts``."""
    return _kept_aside.get() or {}


def merge_count(layer: nn.Module) -> int:
    """Return the number of adapters merged for good into exactly this layer."""
    return int(vars(layer).get(_MERGES, 0))


def count_merge(layer: nn.Module) -> None:
    """Record that an adapter was merged into this layer for good."""
    vars(layer)[_MERGES] = merge_count(layer) + 1


def _html_row(tag: str, cells: Sequence[str]) -> str:
    return f"<tr>{''.join(f'<{tag}>{escape(cell)}</{tag}>' for cell in cells)}</tr>"


def table_lines(rows: Sequence[Sequence[str]]) -> list[str]:
    """Return the lines of a table with a header and a last row of totals, each set off by a rule."""
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
