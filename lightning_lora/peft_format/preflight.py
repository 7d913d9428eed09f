"""What PEFT and vLLM will make of an adapter, before it is saved."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from torch import nn
from typing_extensions import override

from lightning_lora.layers import LoRALayer
from lightning_lora.names import listed
from lightning_lora.peft_format.exporting import Export
from lightning_lora.peft_format.files import exported
from lightning_lora.peft_format.patterns import anchored
from lightning_lora.peft_format.support import vllm_obstacle

YES = "yes"


class PreflightRow(NamedTuple):
    """One layer, module or option: what it is, and whether PEFT and vLLM take it, ``"yes"`` or why not."""

    name: str
    kind: str
    rank: int | None
    scaling: float | None
    peft: str
    vllm: str


@dataclass(frozen=True)
class Preflight:
    """What PEFT and vLLM will accept of an adapter; ``print`` shows a table.

    Attributes:
        root: Name of the model that would be exported; the names in the rows are relative to it.
        rows: Layers, modules and options.
        notes: What else is to be known.
    """

    root: str
    rows: Sequence[PreflightRow]
    notes: Sequence[str] = ()

    @property
    def peft_accepts(self) -> bool:
        """Whether ``save_adapter`` can write it."""
        return all(row.peft == YES for row in self.rows)

    @property
    def vllm_accepts(self) -> bool:
        """Whether vLLM can serve it, if it serves the model and these of its layers with LoRA at all."""
        return all(row.vllm == YES for row in self.rows)

    @override
    def __str__(self) -> str:
        groups: dict[tuple[str, ...], list[str]] = {}
        for row in self.rows:
            rank = "-" if row.rank is None else str(row.rank)
            scaling = "-" if row.scaling is None else f"{row.scaling:g}"
            groups.setdefault((row.kind, rank, scaling, row.peft, row.vllm), []).append(row.name)
        table: list[tuple[str, ...]] = [("layers", "kind", "rank", "scaling", "PEFT", "vLLM")]
        table += [(listed(names, 2), *what) for what, names in groups.items()]
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        lines = [
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in table
        ]
        rule = "  ".join("-" * width for width in widths)
        takes = {
            name: YES if accepts else "no"
            for name, accepts in (("PEFT", self.peft_accepts), ("vLLM", self.vllm_accepts))
        }
        head = f"Export of {repr(self.root) if self.root else 'the module itself'}: " + ", ".join(
            f"{name} {verdict}" for name, verdict in takes.items()
        )
        return "\n".join([head, lines[0], rule, *lines[1:], *self.notes])


def preflight(module: nn.Module, *, export_root: str | None = None) -> Preflight:
    """Say for each layer and option of an adapted module what PEFT and vLLM will and will not accept.

    Args:
        module: An adapted module.
        export_root: As in ``save_adapter``.

    Raises:
        ValueError: The module has no adapters, or the model to export cannot be told.
        RuntimeError: The adapters are folded into the weights, inside ``merged``.
    """
    export = exported(module, export_root)
    rows = [*_layer_rows(export), *_other_rows(export)]
    rows += [PreflightRow(name, "-", None, None, reason, "not in the files") for name, reason in export.refused.items()]
    return Preflight(export.root_name, rows, _notes(export))


def _layer_rows(export: Export) -> list[PreflightRow]:
    numbers = export.numbers()
    patterns = numbers["rank_pattern"].keys() | numbers["alpha_pattern"].keys()
    rows = []
    for layer in export.layers:
        vllm = vllm_obstacle(
            layer.module,
            layer.adapter,
            use_dora=export.use_dora,
            lora_bias=export.lora_bias,
            like_default=anchored(layer.target) not in patterns,
        )
        kind = layer.module.base_class if isinstance(layer.module, LoRALayer) else type(layer.module)
        name = layer.target if layer.by_parameter else layer.name
        rank, scaling = layer.factors.rank, layer.factors.scaling
        if not {name, layer.name} & export.refused.keys():
            rows.append(PreflightRow(name, kind.__name__, rank, scaling, YES, vllm or YES))
    return rows


def _other_rows(export: Export) -> list[PreflightRow]:
    others = [(name, "modules_to_save", "no modules_to_save") for name in export.saved]
    others += [(name, "trained tokens", "no trainable tokens") for name in export.tokens]
    others += [(name, "bias of the base", "no biases") for name in export.biases]
    return [
        PreflightRow(name, kind, None, None, YES, reason) for name, kind, reason in others if name not in export.refused
    ]


def _notes(export: Export) -> list[str]:
    ranks = [layer.factors.rank for layer in export.layers]
    notes = [f"vLLM needs max_lora_rank >= {max(ranks)}."] if ranks else []
    return notes + export.caveats()
