"""The ``lightning-lora`` command: adapters inspected, compared, verified and merged, without a line of Python."""

from __future__ import annotations

import argparse
import functools
import json
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lightning_lora.cli.colours import BAD, WARNING, highlighted, painted
from lightning_lora.cli.convert import COMMANDS
from lightning_lora.cli.options import add_any_base

OK, PROBLEM, USAGE = 0, 1, 2
_DTYPES = ("float32", "bfloat16", "float16", "float64")
_SHORT = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16", "fp64": "float64"}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        arguments: What follows its name; those of the process if left out.

    Returns:
        0 if all is well, 1 if a problem was found, 2 if the command was misspelt.
    """
    try:
        options = _parser().parse_args(arguments)
    except SystemExit as stop:  # argparse has said why, or has shown the help
        return int(stop.code or OK)
    with warnings.catch_warnings():
        warnings.showwarning = _show_warning
        try:
            code: int = options.run(options)
        except BrokenPipeError:  # whoever read has seen enough, as `head` does
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return PROBLEM
        except (ValueError, RuntimeError, OSError) as error:
            return _fail(error)
        except KeyboardInterrupt:
            print("lightning-lora: interrupted; nothing was written", file=sys.stderr)
            return PROBLEM
    return code


def _fail(error: Exception) -> int:
    said = str(error)
    if isinstance(error, OSError) and error.filename is not None:  # the system's own words open with a number
        said = f"{str(error.filename)!r}: {error.strerror}."
    lines = [line.strip().removeprefix("- ") for line in said.splitlines()]
    text = " ".join(line if line.endswith((":", ".")) else f"{line};" for line in lines).removesuffix(";")
    text = text or type(error).__name__
    print(f"lightning-lora: {painted('error:', BAD, sys.stderr)} {text}", file=sys.stderr)
    return PROBLEM


def _show_warning(message: Warning | str, *_rest: Any, **_options: Any) -> None:
    print(f"lightning-lora: {painted('warning:', WARNING, sys.stderr)} {message}", file=sys.stderr)


def _parser() -> argparse.ArgumentParser:
    import lightning_lora
    from lightning_lora.cli.analysis import add_commands

    parser = argparse.ArgumentParser(
        prog="lightning-lora",
        description="Plan, inspect, compare, verify, convert and merge LoRA adapters: PEFT directories, and the .ckpt "
        "files of LoRACallback runs.",
        epilog="Exit codes: 0 all is well, 1 a problem was found, 2 the command was misspelt.",
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {lightning_lora.__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    inspect = _command(
        commands, "inspect", _inspect, "show what an adapter holds: layers, ranks, scalings, norms, size"
    )
    inspect.add_argument("file", type=Path, metavar="ADAPTER", help="a PEFT directory or a .ckpt")

    merge = _command(commands, "merge", _merge, "write a base model with an adapter merged into it, tensor by tensor")
    merge.add_argument("adapter", type=Path, metavar="ADAPTER", help="a PEFT directory or a .ckpt")
    merge.add_argument("base", type=Path, metavar="BASE", help="a model's folder with safetensors, or one such file")
    merge.add_argument("out", type=Path, metavar="OUT", help="the folder to write; it must not exist, or be empty")
    merge.add_argument(
        "--dtype",
        type=lambda text: _SHORT.get(text, text),
        choices=_DTYPES,
        help="precision of the floating point tensors (default: each keeps its own); bf16, fp16, fp32 for short",
    )

    add_any_base(merge)

    for name, (does, add_arguments, convert) in COMMANDS.items():
        add_arguments(_command(commands, name, functools.partial(_convert, convert), does))

    diff = _command(commands, "diff", _diff, "say how two adapters differ; exit code 1 if they do")
    diff.add_argument("first", type=Path, metavar="A", help="a PEFT directory or a .ckpt")
    diff.add_argument("second", type=Path, metavar="B", help="another one")

    verify = _command(commands, "verify", _verify, "check that an adapter fits a base: names, shapes, finite values")
    verify.add_argument("adapter", type=Path, metavar="ADAPTER", help="a PEFT directory or a .ckpt")
    verify.add_argument("base", type=Path, metavar="BASE", help="a model's folder with safetensors, or one such file")
    add_any_base(verify)

    add_commands(lambda name, run, does: _command(commands, name, run, does))
    return parser


def _command(commands: Any, name: str, run: Callable[[argparse.Namespace], int], does: str) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(name, help=does, description=f"{does[0].upper()}{does[1:]}.")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of text")
    parser.set_defaults(run=run)
    return parser


# --- the commands; each imports what it needs, so that --help is there at once


def _inspect(options: argparse.Namespace) -> int:
    from lightning_lora.cli.inspection import summarize
    from lightning_lora.cli.text import summary_lines, summary_object

    summary = summarize(options.file)
    _print(options, lambda: summary_object(summary), lambda: summary_lines(options.file, summary))
    return OK if all(layer.finite for layer in summary.layers) else PROBLEM


def _diff(options: argparse.Namespace) -> int:
    from lightning_lora.cli.inspection import differences, summarize

    found = list(differences(summarize(options.first), summarize(options.second)))
    _print(options, lambda: {"equal": not found, "differences": found}, lambda: found or ["the adapters are equal"])
    return PROBLEM if found else OK


def _verify(options: argparse.Namespace) -> int:
    from lightning_lora.cli.text import about_base
    from lightning_lora.disk.adapter_fit import fit_adapter
    from lightning_lora.disk.base_folder import open_base
    from lightning_lora.layers import all_adapters

    fitted = fit_adapter(options.adapter, open_base(options.base), check_base=options.check_base)
    layers = sorted(all_adapters(fitted.root))
    found = {"fits": True, "layers": layers, "trained_in_full": sorted(fitted.values), "ignored": fitted.ignored}
    found["base_tensors_compared"] = fitted.compared
    lines = [f"the adapter fits: {len(layers)} layers, {len(fitted.values)} tensors trained in full, all values finite"]
    lines += [about_base(fitted.compared)]
    lines += [f"ignored, without a place in the base: {name}" for name in fitted.ignored]
    _print(options, lambda: found, lambda: lines)
    return OK


def _convert(convert: Callable[[argparse.Namespace], Any], options: argparse.Namespace) -> int:
    found, lines = convert(options)
    _print(options, lambda: found, lambda: lines)
    return OK


def _merge(options: argparse.Namespace) -> int:
    import torch

    from lightning_lora.cli.text import merge_lines, progress_bar
    from lightning_lora.disk.merge import merge_files

    dtype = getattr(torch, options.dtype) if options.dtype else None
    progress = progress_bar(sys.stderr) if sys.stderr.isatty() else None
    how = {"dtype": dtype, "check_base": options.check_base}
    report = merge_files(options.adapter, options.base, options.out, **how, progress=progress)
    _print(
        options, lambda: asdict(report) | {"merged": [m._asdict() for m in report.merged]}, lambda: merge_lines(report)
    )
    return OK


def _print(options: argparse.Namespace, content: Callable[[], Any], lines: Callable[[], Sequence[str]]) -> None:
    if options.json:
        print(json.dumps(content(), indent=2, default=str), flush=True)
    else:
        print("\n".join(highlighted(line, sys.stdout) for line in lines()), flush=True)
