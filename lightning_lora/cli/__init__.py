"""The ``lightning-lora`` command: inspect, compare, verify, convert, merge and plan adapters from the shell."""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning_lora
from lightning_lora.cli.commands import COMMANDS, OK, PROBLEM, Result
from lightning_lora.cli.text import BAD, WARNING, highlighted, say
from lightning_lora.names import listed

READER_LEFT = 141  # as the shell says of a process that SIGPIPE has ended


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command, with the arguments of the process by default.

    Returns:
        0 on success, 1 if a problem was found, 2 if the command line is wrong, 141 if nobody reads the output.
    """
    try:
        options = parser().parse_args(arguments)
    except SystemExit as stop:  # argparse has printed the reason or the help
        return int(stop.code or OK)
    with warnings.catch_warnings():
        warnings.showwarning = _show_warning
        try:
            _tell_of_several(vars(options))
            result: Result = options.run(options)
            if options.json:
                print(json.dumps(_as_json(result.content), indent=2, default=str, allow_nan=False), flush=True)
            else:
                print("\n".join(highlighted(line, sys.stdout) for line in result.lines), flush=True)
        except BrokenPipeError:  # the reader has left, as `head` does
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return READER_LEFT
        except (ValueError, RuntimeError, OSError) as error:
            say("error:", BAD, _in_one_line(error))
            return PROBLEM
        except KeyboardInterrupt:
            print("lightning-lora: interrupted; nothing was written", file=sys.stderr)
            return PROBLEM
    return result.code


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line, from which the reference of the site is made, too."""
    top = argparse.ArgumentParser(
        prog="lightning-lora",
        description="Plan, inspect, compare, verify, convert and merge LoRA adapters: PEFT directories, and .ckpt "
        "files written under LoRACallback.",
        epilog="Exit codes: 0 success, 1 a problem was found, 2 the command line is wrong.",
    )
    top.add_argument("--version", action="version", version=f"%(prog)s {lightning_lora.__version__}")
    commands = top.add_subparsers(metavar="COMMAND", dest="command", required=True)
    for name, (run, added) in COMMANDS.items():
        text = run.__doc__ or ""
        own = commands.add_parser(name, help=text.removesuffix("."), description=text)
        own.set_defaults(run=run)
        for add_option in added:
            add_option(own)
        own.add_argument("--json", action="store_true", help="print one JSON object instead of text")
    return top


def _tell_of_several(options: Mapping[str, Any]) -> None:
    """Say which adapter a command is about, for each checkpoint that holds several."""
    from lightning_lora.storage.checkpoint import adapters_in

    given = [each for value in options.values() for each in (value if isinstance(value, list) else [value])]
    is_said = options["command"] == "inspect" or options.get("named")
    for path in () if is_said else given:
        trained, stored = adapters_in(path) if isinstance(path, Path) and path.is_file() else (None, {})
        if trained is not None:
            names = listed([*map(repr, stored)])
            way = "; --adapter chooses another" if "named" in options else ""
            say("note:", WARNING, f"{path} holds the adapters {names}; this is about {trained!r}, the trained one{way}")


def _as_json(value: Any) -> Any:
    """Return a value with null for NaN and infinity, which JSON does not have."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _as_json(each) for key, each in value.items()}
    return [_as_json(each) for each in value] if isinstance(value, (list, tuple)) else value


def _in_one_line(error: Exception) -> str:
    if isinstance(error, OSError) and error.filename is not None:  # its own text begins with a number
        return f"{str(error.filename)!r}: {error.strerror}."
    lines = [line.strip().removeprefix("- ") for line in str(error).splitlines()]
    text = " ".join(line if line.endswith((":", ".")) else f"{line};" for line in lines).removesuffix(";")
    return text or type(error).__name__


def _show_warning(message: Warning | str, *_rest: Any, **_options: Any) -> None:
    say("warning:", WARNING, message)
