"""The commands, each declared once: its options, its help (the docstring) and what it does.

They import the tools that they need when they run, so that ``--help`` answers at once.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from lightning_lora.attachment import table_lines
from lightning_lora.cli.options import (
    A_BASE,
    ADAPTER,
    AN_ADAPTER,
    ANY_BASE,
    BASE,
    DTYPES,
    NAMED,
    OUT,
    OVERWRITE,
    PICTURES,
    ROOT,
    Option,
    count,
    dtype_name,
    name_list,
    number_list,
    one_of,
    option,
    share,
    size,
    whole_number,
)
from lightning_lora.cli.text import (
    WARNING,
    about_base,
    is_terminal,
    merge_lines,
    progress_bar,
    say,
    sum_lines,
    summary_lines,
)
from lightning_lora.names import listed

if TYPE_CHECKING:
    from lightning_lora.analysis.reports import Page
    from lightning_lora.several.sum_as_adapter import CombinedLayer

OK, PROBLEM = 0, 1


class Result(NamedTuple):
    """The outcome of a command: an object for ``--json``, the same content as text, and the exit code."""

    content: dict[str, Any]
    lines: Sequence[str]
    code: int = OK


Run = Callable[[argparse.Namespace], Result]
COMMANDS: dict[str, tuple[Run, tuple[Option, ...]]] = {}  # the docstring of what runs is the help


def command(*options: Option) -> Callable[[Run], Run]:
    """Register a function as the command of its name."""

    def register(run: Run) -> Run:
        COMMANDS[run.__name__.rstrip("_")] = (run, options)
        return run

    return register


# --- the files of one adapter or two


@command(ADAPTER, NAMED)
def inspect(options: argparse.Namespace) -> Result:
    """Show the contents of an adapter: layers, ranks, scalings, norms and size."""
    from lightning_lora.cli.inspection import summarize
    from lightning_lora.loading import read_adapter

    summary = summarize(read_adapter(options.adapter, options.named))
    code = OK if all(layer.finite for layer in summary.layers) else PROBLEM
    return Result(summary.to_dict(), summary_lines(summary), code)


@command(
    option("first", type=Path, metavar="A", help=AN_ADAPTER),
    option("second", type=Path, metavar="B", help="another adapter"),
    ROOT,
)
def diff(options: argparse.Namespace) -> Result:
    """List how two adapters differ; the exit code is 1 if they do."""
    from lightning_lora.cli.inspection import differences
    from lightning_lora.loading import read_adapter

    found = list(differences(read_adapter(options.first), read_adapter(options.second), root=options.root))
    content = {"equal": not found, "differences": found}
    return Result(content, found or ["the adapters are equal"], PROBLEM if found else OK)


@command(
    option("checkpoint", type=Path, metavar="CKPT", help="a .ckpt written under LoRACallback"),
    option("directory", type=Path, metavar="DIR", help="the directory to write"),
    option(
        "--root",
        metavar="NAME",
        help="attribute of the LightningModule that holds the model; names in the directory are relative to it "
        "(default: the attribute that holds all adapters)",
    ),
    option("--base-name", metavar="NAME", help="name of the base model to record"),
    option("--uniform-rank", action="store_true", help="pad all layers to one rank, for loaders that ignore patterns"),
    NAMED,
    OVERWRITE,
)
def export(options: argparse.Namespace) -> Result:
    """Convert a .ckpt to a PEFT directory, without the model."""
    from lightning_lora.disk.conversion import export_checkpoint

    layers = export_checkpoint(
        options.checkpoint,
        options.directory,
        adapter=options.named,
        root=options.root,
        base_model_name_or_path=options.base_name,
        uniform_rank=options.uniform_rank,
        overwrite=options.overwrite,
    )
    return _converted(options.directory, layers)


@command(
    option("directory", type=Path, metavar="DIR", help="a PEFT directory"),
    option("checkpoint", type=Path, metavar="CKPT", help="the .ckpt to write"),
    option(
        "--root",
        metavar="NAME",
        help='attribute of the LightningModule that holds the model, "" if it is the module itself (default: the one '
        "that DIR records, else model)",
    ),
    OVERWRITE,
)
def import_(options: argparse.Namespace) -> Result:
    """Convert a PEFT directory to a .ckpt, without the model."""
    from lightning_lora.disk.conversion import import_directory

    layers = import_directory(options.directory, options.checkpoint, root=options.root, overwrite=options.overwrite)
    return _converted(options.checkpoint, layers)


def _converted(path: Path, layers: list[str]) -> Result:
    return Result({"wrote": str(path), "layers": layers}, [f"wrote {path}: {len(layers)} layers ({listed(layers, 3)})"])


# --- arithmetic

_RANK = option("--rank", type=count, metavar="R", help="the highest rank of a layer")
_ENERGY = option("--energy", type=share, metavar="E", help="the share of each layer's squared norm to keep")
_INTO = option("--out", type=Path, metavar="DIR", required=True, help="the PEFT directory to write")


@command(
    option("adapters", type=Path, metavar="ADAPTER", nargs="+", help=AN_ADAPTER),
    option(
        "--weights",
        type=number_list,
        metavar="W,W",
        required=True,
        help="factor of each adapter in the sum; --weights=-1,1 if the first is negative",
    ),
    option("--method", choices=("cat", "svd"), default="cat", help="cat: exact (default); svd: cut to a lower rank"),
    *(_RANK, _ENERGY, _INTO, OVERWRITE),
)
def combine(options: argparse.Namespace) -> Result:
    """Write the weighted sum of adapters, without the model."""
    return _sum(options, options.adapters, options.weights, options.method)


@command(ADAPTER, option("factor", type=float, metavar="FACTOR", help="such as 0.5 or -1"), _INTO, OVERWRITE)
def scale(options: argparse.Namespace) -> Result:
    """Write an adapter whose update is that of another one times a factor."""
    return _sum(options, [options.adapter], [options.factor], "cat")


@command(ADAPTER, one_of(_RANK, _ENERGY), _INTO, OVERWRITE)
def truncate(options: argparse.Namespace) -> Result:
    """Write the best approximation of an adapter by one of lower rank."""
    from lightning_lora.several.truncation import truncate_file

    kept = {"energy": options.energy, "rank": options.rank}
    return _written(options, truncate_file(options.adapter, options.out, overwrite=options.overwrite, **kept))


def _sum(options: argparse.Namespace, adapters: list[Path], weights: list[float], method: str) -> Result:
    from lightning_lora.several.combination import combine_adapters

    kept = {name: getattr(options, name, None) for name in ("rank", "energy")}
    layers = combine_adapters(adapters, weights, options.out, method=method, overwrite=options.overwrite, **kept)
    return _written(options, layers)


def _written(options: argparse.Namespace, layers: list[CombinedLayer]) -> Result:
    content = {"wrote": str(options.out), "layers": [layer._asdict() for layer in layers]}
    return Result(content, [f"wrote {options.out}: {len(layers)} layers", *sum_lines(layers)])


# --- an adapter and its base


@command(ADAPTER, BASE, NAMED, ANY_BASE)
def verify(options: argparse.Namespace) -> Result:
    """Check that an adapter fits a base: names, shapes and finite values."""
    from lightning_lora.adapted_model import AdaptedModel
    from lightning_lora.disk.base_folder import open_base
    from lightning_lora.disk.skeleton import fit_adapter

    fitted = fit_adapter(options.adapter, open_base(options.base), options.named, check_base=options.check_base)
    layers = sorted(AdaptedModel(fitted.root).adapters)
    content = {
        "fits": True,
        "layers": layers,
        "trained_in_full": sorted(fitted.values),
        "ignored": fitted.ignored,
        "base_tensors_compared": fitted.compared,
    }
    lines = [
        f"the adapter fits: {len(layers)} layers, {len(fitted.values)} tensors trained in full, all values finite",
        about_base(fitted.compared),
        *(f"ignored, not in the base: {name}" for name in fitted.ignored),
    ]
    return Result(content, lines)


@command(
    ADAPTER,
    BASE,
    option("out", type=Path, metavar="OUT", help="the folder to write"),
    option(
        "--dtype",
        type=dtype_name,
        choices=(*DTYPES, "float64"),
        help="precision of the floating point tensors (default: each keeps its own); short: bf16, fp16, fp32",
    ),
    NAMED,
    ANY_BASE,
    OVERWRITE,
)
def merge(options: argparse.Namespace) -> Result:
    """Write a base model with an adapter merged into it, one tensor at a time."""
    import torch

    from lightning_lora.analysis.spectrum import plain
    from lightning_lora.disk.merge import merge_files

    report = merge_files(
        options.adapter,
        options.base,
        options.out,
        name=options.named,
        dtype=getattr(torch, options.dtype) if options.dtype else None,
        check_base=options.check_base,
        overwrite=options.overwrite,
        progress=progress_bar(sys.stderr) if is_terminal(sys.stderr) else None,
    )
    return Result(plain(report), merge_lines(report))


# --- analysis


@command(
    ADAPTER,
    option("--base", type=Path, help=f"{A_BASE}; adds the relation of the updates to the weights"),
    option(
        "--energy",
        type=share,
        default=0.99,
        help="share of the squared norm that a suggested rank must hold (default: 0.99)",
    ),
    ANY_BASE,
    option("--intruders", action="store_true", help="count intruder dimensions; slow, needs --base"),
    OUT,
    PICTURES,
    OVERWRITE,
)
def report(options: argparse.Namespace) -> Result:
    """Show what an adapter learned: ranks, sizes and relation to the weights; optionally as an HTML page."""
    from lightning_lora.analysis import analyze, findings, layer_similarity, suggest_ranks
    from lightning_lora.analysis.reports import analysis_page, rank_pattern
    from lightning_lora.analysis.spectrum import plain
    from lightning_lora.sweep.picture import add_sweep
    from lightning_lora.sweep.standings import sweep_in

    if options.intruders and options.base is None:
        raise ValueError("--intruders needs the weights: give --base.")
    _check_outputs(options)
    analysis = analyze(
        options.adapter,
        options.base,
        energy=options.energy,
        intruders=options.intruders,
        progress=progress_bar(sys.stderr, "analyzing", str) if options.base and is_terminal(sys.stderr) else None,
        check_base=options.check_base,
    )
    similarities = []
    if options.out or options.pictures:
        try:
            similarities = layer_similarity(options.adapter)
        except ValueError as error:  # the file alone may not tell layers apart that the base did
            say("warning:", WARNING, f"layers are not compared with each other: {error}")
    named = "" if analysis.adapter is None else f" ({analysis.adapter!r})"
    facts = [f"Adapter: {options.adapter}{named}"] + ([f"Base: {options.base}"] if options.base else [])

    def page() -> Page:
        made = analysis_page(analysis, options.adapter.name, similarities=similarities, facts=facts)
        if (sweep := sweep_in(options.adapter)) is not None:
            add_sweep(made, *sweep)
        return made

    _write_outputs(options, page)
    suggestions, found = suggest_ranks(analysis), findings(analysis)
    content = analysis.to_dict() | {
        "findings": found,
        "suggestions": plain(suggestions),
        "rank_pattern": rank_pattern(suggestions),
    }
    return Result(content, [str(analysis), "", *(f"- {each}" for each in found)])


@command(
    option("first", type=Path, metavar="A", help=AN_ADAPTER),
    option("second", type=Path, metavar="B", nargs="?", help="another adapter (default: compare the layers of A)"),
    ROOT,
    OUT,
    PICTURES,
    OVERWRITE,
)
def compare(options: argparse.Namespace) -> Result:
    """Show what two adapters share, or the layers of one; optionally as an HTML page."""
    if options.root is not None and options.second is None:
        raise ValueError("--root needs two adapters: name the second one.")
    _check_outputs(options)
    return _compare_layers(options) if options.second is None else _compare_adapters(options)


def _compare_adapters(options: argparse.Namespace) -> Result:
    from lightning_lora.analysis.comparison import compare, likeness
    from lightning_lora.analysis.reports import comparison_page

    comparison = compare(options.first, options.second, root=options.root)
    names = str(options.first), str(options.second)
    _write_outputs(options, lambda: comparison_page(comparison, names))
    found = likeness(comparison)
    return Result(comparison.to_dict() | {"findings": found}, [str(comparison), "", *(f"- {each}" for each in found)])


def _compare_layers(options: argparse.Namespace) -> Result:
    from lightning_lora.analysis.comparison import layer_similarity, similarity_rows
    from lightning_lora.analysis.reports import layers_page
    from lightning_lora.analysis.spectrum import plain

    found = layer_similarity(options.first)
    if not found:
        raise ValueError(
            f"{str(options.first)!r} needs at least two layers of the same kind and shape in different blocks."
        )
    _write_outputs(options, lambda: layers_page(found, options.first.name))
    table = table_lines([*similarity_rows(found), ("",) * 4])[:-2]
    lines = ["between two blocks, the median of all pairs: 0 is chance, 1 the same directions", *table]
    return Result({"kinds": plain(found)}, lines)


@command(
    BASE,
    one_of(
        option("--parameters", type=count, metavar="N", help="budget in parameters, such as 4.7M"),
        option("--bytes", type=size, metavar="N", help="budget in bytes of the factors, such as 35MB"),
        option("--optimizer-bytes", type=size, metavar="N", help="budget in bytes of optimizer state"),
        option("--rank", type=whole_number, metavar="R", help="no budget: show what this rank costs"),
    ),
    option("--targets", type=name_list, metavar="A,B", help="layers to choose from (default: all linear layers)"),
    option(
        "--group", type=name_list, action="append", metavar="A,B", help="a combination to consider; may be repeated"
    ),
    option("--dtype", choices=DTYPES, default="float32", help="precision of the factors (default: float32)"),
    option(
        "--bytes-per-state",
        type=count,
        default=8,
        help="bytes of optimizer state per parameter (default: 8, as for Adam)",
    ),
)
def plan(options: argparse.Namespace) -> Result:
    """Show which layers a budget can adapt and at which rank; reads shapes, not weights."""
    from lightning_lora.analysis.budget import plan_budget
    from lightning_lora.config import LoRAConfig
    from lightning_lora.disk.skeleton import model_of_shapes

    model = model_of_shapes(options.base)
    left_out = () if options.targets else model.heads
    config = LoRAConfig(
        target_modules=options.targets or "all-linear", exclude_modules=left_out, adapter_dtype=options.dtype
    )
    found = plan_budget(
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
        notes.append(f"{model.experts} experts counted as layers; if they load as stacks, name target_parameters")
    return Result(found.to_dict() | {"left_out": list(left_out), "experts": model.experts}, [str(found), *notes])


# --- pages and pictures


def _check_outputs(options: argparse.Namespace) -> None:
    """Raise before anything is computed if the outputs could not be written."""
    from lightning_lora.analysis.plots import can_draw
    from lightning_lora.storage.atomic import check_apart, check_new

    if options.out and (options.out.is_dir() or not options.out.parent.is_dir()):
        raise ValueError(f"--out={str(options.out)!r} must be a file in a folder that exists.")
    inputs = (vars(options).get(name) for name in ("adapter", "base", "first", "second"))
    if options.out:
        check_apart(options.out, *inputs)
    if options.pictures and options.pictures.is_file():
        raise ValueError(f"--pictures={str(options.pictures)!r} is a file; name a folder.")
    if options.pictures and not can_draw():
        raise RuntimeError("--pictures needs matplotlib: pip install 'lightning-lora[plots]'.")
    for old in (options.out, *(sorted(options.pictures.glob("*.png")) if options.pictures else ())):
        if old is not None:
            check_new(old, overwrite=options.overwrite)


def _write_outputs(options: argparse.Namespace, lay_out: Callable[[], Page]) -> None:
    if not (options.out or options.pictures):
        return
    page = lay_out()
    if options.pictures:
        options.pictures.mkdir(parents=True, exist_ok=True)
        for name, figure in page.pictures.items():
            figure.savefig(options.pictures / f"{name}.png")
        print(f"lightning-lora: wrote {len(page.pictures)} pictures into {options.pictures}", file=sys.stderr)
    if options.out:
        page.write(options.out, overwrite=options.overwrite)
        without = "" if page.pictures else ", without pictures: they need pip install 'lightning-lora[plots]'"
        print(f"lightning-lora: wrote {options.out}{without}", file=sys.stderr)
