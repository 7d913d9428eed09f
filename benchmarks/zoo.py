"""Every architecture that a library offers, tiny and random: does an adapter do on it what it should?

    make zoo                                             # in an environment of its own, .venv-zoo
    python benchmarks/zoo.py --resume                    # goes on where it stopped
    python benchmarks/zoo.py --only 'transformers/*/llama*' --json one.json
    python benchmarks/zoo.py --page                      # writes docs/models.md from benchmarks/zoo.json

Each model runs in a worker process, which reports the phase that it is in: when it dies or takes too long, that is the
model's verdict, and a new worker goes on with the next. ``zoo_checks.py`` says what is asked of a model,
``zoo_models.py`` and ``zoo_transformers.py`` build them.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import fnmatch
import json
import os
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent
RESULTS, PAGE = FOLDER / "zoo.json", FOLDER.parent / "docs" / "models.md"
SECONDS, MEMORY, TURNS = 120.0, 10 << 30, 25  # a worker examines so many models: what they leave behind adds up
VERDICTS = {
    "ok": "ok",
    "refused": "refused",
    "unbuildable": "cannot be built here",
    "wrong": "wrong",
    "crash": "crash",
}
Result = dict[str, Any]


# --- the worker: a name comes in, phases and a result go out, each a line of JSON


def work() -> None:
    """Answer one name after the other, until there are no more."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what models print is no answer
    limit_memory()
    import zoo_models

    def tell(phase: str) -> None:
        print(json.dumps({"phase": phase}), file=answers)

    zoo_models.prepare()
    import zoo_checks  # noqa: F401  # takes seconds, which are no model's

    tell("ready")
    for line in sys.stdin:
        print(json.dumps(zoo_models.examine(json.loads(line), tell)), file=answers)


def limit_memory() -> None:
    """Let a model that turns out huge fail by itself, not with the whole machine."""
    with contextlib.suppress(ImportError):  # not on Windows
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))


class Worker:
    """A worker process, seen from the parent."""

    def __init__(self) -> None:
        command = [sys.executable, __file__, "--work"]
        environment = os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONWARNINGS": "ignore"}
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=environment,
            text=True,
            bufsize=1,
        )
        self.answers: queue.Queue[str] = queue.Queue()
        threading.Thread(target=self._listen, daemon=True).start()
        if not self.answers.get():
            raise RuntimeError(f"The worker does not start; {' '.join(command)} says why.")

    def _listen(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.answers.put(line)
        self.answers.put("")  # it is gone

    def examine(self, name: str, seconds: float) -> Result:
        """Return a model's result; after a verdict on the worker itself it is stopped."""
        assert self.process.stdin is not None
        phase, ends = "build", time.monotonic() + seconds
        self.process.stdin.write(json.dumps(name) + "\n")
        while True:
            try:
                line = self.answers.get(timeout=max(0.0, ends - time.monotonic()))
            except queue.Empty:
                return self.lost(phase, f"took longer than {seconds:g} s")
            if not line:
                return self.lost(phase, f"the process ended with code {self.process.wait()}")
            answer: Result = json.loads(line)
            if "phase" not in answer:
                return answer
            phase = answer["phase"]

    def lost(self, phase: str, reason: str) -> Result:
        """Stop the worker and return what that says of the model."""
        self.stop()
        if phase == "build":
            return {"verdict": "unbuildable", "reason": reason}
        problem = {"check": phase, "verdict": "crash", "reason": reason, "where": ""}
        return {"verdict": "crash", "problems": [problem]}

    def stop(self) -> None:
        """End the process."""
        self.process.kill()
        self.process.wait()

    @property
    def is_alive(self) -> bool:
        """Whether it can take another name."""
        return self.process.poll() is None


# --- the run


def examine_all(names: Sequence[str], results: dict[str, Result], file: Path, seconds: float) -> None:
    """Examine model after model; each result is on disk before the next begins."""
    worker = Worker()
    for number, name in enumerate(names, 1):
        if not worker.is_alive or number % TURNS == 0:
            worker.stop()
            worker = Worker()
        started = time.monotonic()
        results[name] = worker.examine(name, seconds) | {"seconds": round(time.monotonic() - started, 1)}
        write(file, results)
        print(f"{number}/{len(names)} {name}: {sentence(results[name])}", flush=True)
    worker.stop()


def sentence(result: Result) -> str:
    """Return a verdict with its reasons, on one line."""
    problems = [f"{each['check']}: {each['reason']}" for each in result.get("problems", ())]
    reasons = "; ".join(problems) or result.get("reason", "")
    return f"{result['verdict']}{' - ' if reasons else ''}{reasons}"


def read(file: Path) -> dict[str, Result]:
    """Return the results of a file, or none."""
    return dict(json.loads(file.read_text(encoding="utf-8"))["results"]) if file.exists() else {}


def write(file: Path, results: dict[str, Result]) -> None:
    """Write all results, a line for each, with what they were measured with; a file is whole at any moment."""
    head = json.dumps({"date": time.strftime("%d %B %Y"), "versions": versions()})[:-1]
    lines = ",\n".join(f"{json.dumps(name)}: {json.dumps(result)}" for name, result in sorted(results.items()))
    new = file.with_suffix(".new")
    new.write_text(f'{head}, "results": {{\n{lines}\n}}}}\n', encoding="utf-8")
    new.replace(file)


def versions() -> dict[str, str]:
    """Return the versions of every library that is here."""
    import zoo_models

    found = {"python": sys.version.split()[0]}
    for package in ("torch", "lightning", "peft", *(library.package for library in zoo_models.LIBRARIES.values())):
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[package] = metadata.version(package)
    return found


def chosen(args: argparse.Namespace) -> list[str]:
    """Return the names that the command line asks for."""
    import zoo_models

    names = zoo_models.names(args.libraries or None)
    if args.only:
        names = [name for name in names if any(fnmatch.fnmatch(name, pattern) for pattern in args.only)]
    index, _, count = args.shard.partition("/")
    return names[int(index) - 1 :: int(count)]


# --- the page


def page(files: Sequence[Path]) -> str:
    """Return the page: counts first, then what is not ok, then a table of each library."""
    contents = [json.loads(file.read_text(encoding="utf-8")) for file in files]
    results = {name: result for content in contents for name, result in content["results"].items()}
    libraries = list(dict.fromkeys(name.split("/")[0] for name in results))
    with_versions = {package: version for content in contents for package, version in content["versions"].items()}
    parts = [
        "# Models",
        "What an adapter does on the architectures of other libraries, measured: a tiny model of each, with random "
        f"weights, examined by [`benchmarks/zoo.py`](../benchmarks/zoo.py) on {contents[-1]['date']}. "
        "`make zoo` repeats it, in an environment of its own; the numbers are in "
        "[`benchmarks/zoo.json`](../benchmarks/zoo.json).",
        "With " + ", ".join(f"{package} {version}" for package, version in with_versions.items()) + ".",
        counts(results, libraries),
        exports(results),
        EXPLANATION,
        *(section(kind, results) for kind in ("wrong", "crash", "refused")),
        *(table(library, results) for library in libraries),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


EXPLANATION = """\
**ok**: all checks held. An adapter changes nothing at its start; every weight that learns without an adapter has an
adapter that learns; training computes what evaluation does; a reloaded, a merged and a detached model are exact;
PEFT computes the same from the exported files, or `preflight` said that it would not; three steps through
`LoRACallback` move every adapter that can learn, and nothing else. **refused**: `attach`, or another function, said
why not. **cannot be built here**: the model does not run by itself, without an adapter. **wrong** and **crash** are
mistakes of this package. Adapted are all linear layers; where a network has more convolutions than those, all
convolutions too; where it has neither, its matrices, by `target_parameters`."""


def counts(results: dict[str, Result], libraries: Iterable[str]) -> str:
    """Return the table of verdicts by library."""
    lines = [row("library", "ran", *VERDICTS.values()), row("---", *["--:"] * (1 + len(VERDICTS)))]
    total: collections.Counter[str] = collections.Counter()
    for library in libraries:
        found = collections.Counter(r["verdict"] for name, r in results.items() if name.split("/")[0] == library)
        total += found
        lines.append(row(library, found.total() - found["unbuildable"], *(found[verdict] for verdict in VERDICTS)))
    lines.append(row("**all**", total.total() - total["unbuildable"], *(total[verdict] for verdict in VERDICTS)))
    return "\n".join(lines)


def exports(results: dict[str, Result]) -> str:
    """Return what PEFT made of the exports, in one sentence."""
    same = sum("PEFT" in result.get("numbers", {}) for result in results.values())
    refused = sum(any("PEFT cannot" in note for note in result.get("notes", ())) for result in results.values())
    return f"PEFT loaded {same:,} of the exports and ran; of {refused:,} models `preflight` had said that it would not."


def section(verdict: str, results: dict[str, Result]) -> str:
    """Return the models of a verdict, together where the reasons are the same."""
    reasons: dict[str, list[str]] = {}
    for name, result in results.items():
        if result["verdict"] == verdict:
            found = [f"{each['check']}: {each['reason']}" for each in result["problems"] if each["verdict"] == verdict]
            reasons.setdefault("; ".join(found), []).append(name)
    if not reasons:
        return ""
    lines = [row("models", "check and reason"), row("---", "---")]
    lines += [row(", ".join(f"`{name}`" for name in names), text(reason)) for reason, names in reasons.items()]
    return f"## {VERDICTS[verdict].capitalize()}\n\n" + "\n".join(lines)


def table(library: str, results: dict[str, Result]) -> str:
    """Return a library's models, by kind and verdict, on few lines."""
    groups: dict[tuple[str, str], list[str]] = {}
    for name, result in results.items():
        owner, *kind, last = name.split("/")
        if owner == library:
            groups.setdefault(("/".join(kind), result["verdict"]), []).append(last)
    lines = [row("kind", "verdict", "models"), row("---", "---", "---")]
    lines += [row(kind, VERDICTS[verdict], len(names), ", ".join(names)) for (kind, verdict), names in groups.items()]
    lines = [row("kind", "verdict", "", "models"), row("---", "---", "--:", "---"), *lines[2:]]
    return f"## {library}\n\n" + "\n".join(lines)


def row(*cells: object) -> str:
    """Return a row of a table."""
    return f"| {' | '.join(str(cell) for cell in cells)} |"


def text(reason: str) -> str:
    """Return a reason as it can stand in a table."""
    return reason.replace("|", "\\|").replace("<", "&lt;")


# --- the command


def parsed(argv: Sequence[str] | None) -> argparse.Namespace:
    """Return the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--library", dest="libraries", action="append", help="this library alone; may be repeated")
    parser.add_argument("--only", action="append", metavar="GLOB", help="models whose names match; may be repeated")
    parser.add_argument("--shard", default="1/1", metavar="I/N", help="every N-th model, beginning with the I-th")
    parser.add_argument("--resume", action="store_true", help="leave out the models that the results hold already")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="what one model may take")
    parser.add_argument("--json", type=Path, action="append", help="file of the results; --page reads several")
    parser.add_argument("--list", action="store_true", help="print the names and do nothing")
    parser.add_argument(
        "--page", action="store_true", help=f"write docs/{PAGE.name} from the results and do nothing else"
    )
    parser.add_argument("--work", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    args = parsed(argv)
    files = args.json or [RESULTS]
    if args.work:
        work()
    elif args.page:
        PAGE.write_text(page(files), encoding="utf-8")
    elif args.list:
        print("\n".join(chosen(args)))
    else:
        results = read(files[0])
        names = [name for name in chosen(args) if not (args.resume and name in results)]
        examine_all(names, results, files[0], args.seconds)
        found = collections.Counter(result["verdict"] for result in results.values())
        print(", ".join(f"{VERDICTS[verdict]} {found[verdict]}" for verdict in VERDICTS))


if __name__ == "__main__":
    main()
