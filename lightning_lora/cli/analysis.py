"""The commands that look inside adapters and plan them: ``report``, ``compare`` and ``plan``."""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_lora.cli.options import add_any_base

if TYPE_CHECKING:
    from lightning_lora.analysis.comparison import KindSimilarity
    from lightning_lora.analysis.page import Page
    from lightning_lora.analysis.report_figures import Figures

_ADAPTER, _BASE = "a PEFT directory or a .ckpt", "a model's folder with safetensors, or one such file"
_UNITS = {"": 1, "k": 1e3, "m": 1e6, "g": 1e9, "b": 1e9, "t": 1e12}
_BYTES = {"": 1, "b": 1, "kb": 1e3, "mb": 1e6, "gb": 1e9, "kib": 2**10, "mib": 2**20, "gib": 2**30}
_DTYPES = ("float32", "bfloat16", "float16")


def add_commands(add: Callable[[str, Callable[[argparse.Namespace], int], str], argparse.ArgumentParser]) -> None:
    """Register the commands.

    Args:
        add: Makes the parser of a command from its name, what runs it and what it does.
    """
    report = add(
        "report", _report, "show what an adapter learned: ranks, sizes, relation to the weights; a page of HTML"
    )
    report.add_argument("adapter", type=Path, metavar="ADAPTER", help=_ADAPTER)
    report.add_argument("--base", type=Path, help=f"{_BASE}: for what the updates are to the weights")
    report.add_argument(
        "--energy",
        type=_share,
        default=0.99,
        help="share of the squared norm that a suggested rank holds (default 0.99)",
    )
    add_any_base(report)
    report.add_argument("--intruders", action="store_true", help="count intruder dimensions; slow, needs --base")
    _add_outputs(report)

    compare = add("compare", _compare, "say what two adapters share, or the layers of one; a page of HTML")
    compare.add_argument("first", type=Path, metavar="A", help=_ADAPTER)
    compare.add_argument("second", type=Path, metavar="B", nargs="?", help="another one; without it, layers within A")
    _add_outputs(compare)

    plan = add("plan", _plan, "say which layers a budget can adapt and at which rank; reads shapes, no weights")
    plan.add_argument("base", type=Path, metavar="BASE", help=_BASE)
    budget = plan.add_mutually_exclusive_group(required=True)
    budget.add_argument("--parameters", type=_count, metavar="N", help="budget in parameters, such as 4.7M")
    budget.add_argument("--bytes", type=_size, metavar="N", help="budget in bytes of the factors, such as 35MB")
    budget.add_argument("--optimizer-bytes", type=_size, metavar="N", help="budget in bytes of the optimizer's state")
    budget.add_argument("--rank", type=_count, metavar="R", help="the other way round: what this rank costs")
    plan.add_argument("--targets", type=_names, metavar="A,B", help="layers to choose from (default: all linear ones)")
    plan.add_argument(
        "--group", type=_names, action="append", metavar="A,B", help="a combination to look at; may be repeated"
    )
    plan.add_argument("--dtype", choices=_DTYPES, default="float32", help="precision of the factors (default float32)")
    plan.add_argument("--bytes-per-state", type=_count, default=8, help="of each parameter in the optimizer (Adam: 8)")


def _add_outputs(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", type=Path, metavar="PAGE", help="write one page of HTML that needs no other file")
    parser.add_argument("--pictures", type=Path, metavar="FOLDER", help="write each picture as a PNG into this folder")


# --- the commands; each imports what it needs, so that --help is there at once


def _report(options: argparse.Namespace) -> int:
    from lightning_lora.analysis import analyze
    from lightning_lora.analysis.report_figures import analysis_figures
    from lightning_lora.analysis.reports import analysis_page, rank_pattern
    from lightning_lora.analysis.suggestions import findings, suggest_ranks
    from lightning_lora.cli.text import progress_bar

    if options.intruders and options.base is None:
        raise ValueError("--intruders needs the weights: give --base.")
    _check_outputs(options)
    progress = progress_bar(sys.stderr, "analysing", str) if options.base and sys.stderr.isatty() else None
    analysis = analyze(
        options.adapter,
        options.base,
        energy=options.energy,
        intruders=options.intruders,
        progress=progress,
        check_base=options.check_base,
    )
    similarities = _similarities(options.adapter) if options.out or options.pictures else []
    facts = [f"Adapter: {options.adapter}"] + ([f"Base: {options.base}"] if options.base else [])
    _write(
        options,
        lambda: analysis_figures(analysis, similarities),
        lambda figures: analysis_page(
            analysis, options.adapter.name, similarities=similarities, facts=facts, figures=figures
        ),
    )
    suggestions = suggest_ranks(analysis)
    content = analysis.to_dict() | {
        "findings": findings(analysis),
        "suggestions": [each.to_dict() for each in suggestions],
        "rank_pattern": rank_pattern(suggestions),
    }
    _show(options, content, [str(analysis), "", *(f"- {each}" for each in findings(analysis))])
    return 0


def _similarities(adapter: Path) -> list[KindSimilarity]:
    from lightning_lora.analysis import layer_similarity

    try:
        return layer_similarity(adapter)
    except ValueError as error:  # the file alone may not tell its layers apart, where the base did
        print(f"lightning-lora: warning: layers are not compared with each other: {error}", file=sys.stderr)
        return []


def _compare(options: argparse.Namespace) -> int:
    if options.second is None:
        return _compare_layers(options)
    from lightning_lora.analysis import compare
    from lightning_lora.analysis.report_figures import comparison_figures
    from lightning_lora.analysis.reports import comparison_page, likeness

    _check_outputs(options)
    comparison = compare(options.first, options.second)
    names = str(options.first), str(options.second)
    _write(
        options,
        lambda: comparison_figures(comparison),
        lambda figures: comparison_page(comparison, names, figures=figures),
    )
    said = likeness(comparison)
    _show(options, comparison.to_dict() | {"findings": said}, [str(comparison), "", *(f"- {each}" for each in said)])
    return 0


def _compare_layers(options: argparse.Namespace) -> int:
    from lightning_lora.analysis import layer_similarity
    from lightning_lora.analysis.report_figures import layers_figures
    from lightning_lora.analysis.reports import layers_page, similarity_rows
    from lightning_lora.attachment import table_lines

    _check_outputs(options)
    found = layer_similarity(options.first)
    if not found:
        raise ValueError(f"{str(options.first)!r} has no two layers of one kind and shape in different blocks.")
    _write(
        options, lambda: layers_figures(found), lambda figures: layers_page(found, options.first.name, figures=figures)
    )
    rows = list(similarity_rows(found))
    lines = ["between two blocks, the median of all pairs: 0 is chance, 1 the same directions"]
    _show(options, {"kinds": [each.to_dict() for each in found]}, lines + table_lines([*rows, ("",) * 4])[:-2])
    return 0


def _plan(options: argparse.Namespace) -> int:
    from lightning_lora.analysis.budget import plan_budget
    from lightning_lora.analysis.shapes import model_of_shapes
    from lightning_lora.config import LoRAConfig
    from lightning_lora.names import listed

    model = model_of_shapes(options.base)
    left_out = () if options.targets else model.heads
    config = LoRAConfig(
        target_modules=options.targets or "all-linear", exclude_modules=left_out, adapter_dtype=options.dtype
    )
    plan = plan_budget(
        model.module,
        config,
        parameters=options.parameters,
        file_bytes=options.bytes,
        optimizer_bytes=options.optimizer_bytes,
        rank=options.rank,
        bytes_per_state=options.bytes_per_state,
        groups=options.group,
    )
    notes = [f"left out, as output layers: {listed(left_out)}"] if left_out else []
    if model.experts:
        notes.append(f"{model.experts} experts counted as layers; where they load as stacks, name target_parameters")
    content = plan.to_dict() | {"left_out": list(left_out), "experts": model.experts}
    _show(options, content, [str(plan), *notes])
    return 0


# --- what comes out


def _show(options: argparse.Namespace, content: dict[str, Any], lines: Sequence[str]) -> None:
    print(json.dumps(content, indent=2) if options.json else "\n".join(lines), flush=True)


def _check_outputs(options: argparse.Namespace) -> None:
    """Refuse what could not be written, before anything is computed."""
    if options.out and (options.out.is_dir() or not options.out.parent.is_dir()):
        raise ValueError(f"--out={str(options.out)!r} must be a file in a folder that exists.")
    if options.pictures and options.pictures.is_file():
        raise ValueError(f"--pictures={str(options.pictures)!r} is a file; name a folder.")
    if options.pictures and not _can_draw():
        raise RuntimeError("--pictures needs matplotlib: pip install 'lightning-lora[plots]'.")


def _can_draw() -> bool:
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError:
        return False
    return True


def _write(options: argparse.Namespace, draw: Callable[[], Figures], lay_out: Callable[[Figures | None], Page]) -> None:
    if not (options.out or options.pictures):
        return
    figures = draw() if _can_draw() else None
    if options.pictures:
        options.pictures.mkdir(parents=True, exist_ok=True)
        for name, (figure, _, _) in (figures or {}).items():
            figure.savefig(options.pictures / f"{name}.png")
        print(f"lightning-lora: wrote {len(figures or {})} pictures into {options.pictures}", file=sys.stderr)
    if options.out:
        lay_out(figures).write(options.out)
        without = "" if figures is not None else ", without pictures: pip install 'lightning-lora[plots]' for those"
        print(f"lightning-lora: wrote {options.out}{without}", file=sys.stderr)


# --- what goes in


def _names(text: str) -> list[str]:
    return [name for name in re.split(r"[,+\s]+", text) if name]


def _share(text: str) -> float:
    share = float(text)
    if not 0 < share <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not above 0 and at most 1")
    return share


def _count(text: str) -> int:
    return _amount(text, _UNITS)


def _size(text: str) -> int:
    return _amount(text, _BYTES)


def _amount(text: str, units: dict[str, float]) -> int:
    found = re.fullmatch(r"([\d.,_]+(?:e\d+)?)\s*([a-z]*)", text.strip().lower())
    try:
        amount = float(found[1].replace(",", "").replace("_", "")) * units[found[2]] if found else 0
    except (ValueError, KeyError):
        amount = 0
    if amount < 1:
        known = ", ".join(each for each in units if each)
        raise argparse.ArgumentTypeError(f"{text!r} is no amount of 1 or more, such as 4.7M; units are {known}")
    return round(amount)
