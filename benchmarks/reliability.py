"""Reliability: random sequences of operations, many fits in one process, and fits that are killed.

PYTHONPATH=. python benchmarks/reliability.py --fuzz 2000            # goes on where benchmarks/reliability.json ends
PYTHONPATH=. python benchmarks/reliability.py --soak 200 --kills 10
PYTHONPATH=. python benchmarks/reliability.py --mutants 1000          # can the sequences find mistakes?
PYTHONPATH=. python benchmarks/reliability.py --page                 # writes docs/reliability.md
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import logging
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import mutants
import torch
from hypothesis import HealthCheck, Phase, seed, settings
from hypothesis.errors import HypothesisException
from hypothesis.stateful import run_state_machine_as_test
from lightning.pytorch.callbacks import LambdaCallback, ModelCheckpoint

from lightning_lora import LoRACallback, adapter_state_dict, load_adapter
from tests import fuzz
from tests.toys import Toy, loader, trainer

FOLDER = Path(__file__).parent
RESULTS, PAGE = FOLDER / "reliability.json", FOLDER.parent / "docs" / "reliability.md"
AT_ONCE, STEPS = 20, 8  # sequences of one seed, and operations in each
WARMUP = 20  # fits before memory is compared
EPOCHS = 200  # of the fits that are killed
LONGEST = 0.6  # seconds until a kill
LAST, TRAINED = "whole.ckpt", "epochs.txt"


def quiet() -> None:
    warnings.simplefilter("ignore")
    for name in ("lightning.pytorch", "lightning.pytorch.utilities.rank_zero", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)


def sequences(number: int, machine: type[fuzz.Sequences], phases: Sequence[Phase]) -> None:
    """Run the sequences of one seed.

    Raises:
        Exception: The first failure.
    """
    options = settings(
        max_examples=AT_ONCE,
        stateful_step_count=STEPS,
        database=None,
        deadline=None,
        phases=phases,
        report_multiple_bugs=False,
        suppress_health_check=list(HealthCheck),
    )
    run_state_machine_as_test(seed(number)(type("Sequences", (machine,), {})), settings=options)


def fuzzed(number: int) -> dict[str, Any]:
    """Run the sequences of one seed; return how many steps were refused, or the shortest sequence that fails."""
    before = fuzz.REFUSED.total()
    try:
        sequences(number, fuzz.Sequences, [Phase.generate, Phase.shrink])
    except Exception as error:
        traceback.print_exception(error)
        return {"failure": [described(error), *getattr(error, "__notes__", ())]}
    return {"sequences": AT_ONCE, "refused": fuzz.REFUSED.total() - before}


def described(error: BaseException) -> str:
    """Return the line of the checks that saw a failure, and the failure."""
    steps = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename == fuzz.__file__]
    where = f"`{steps[-1].name}`: `{steps[-1].line}`: " if steps else ""
    return f"{where}{type(error).__name__} {error}".strip()


def first_failure(most: int) -> dict[str, Any]:
    """Return after how many sequences the checks see that the package is broken, and what; None if they do not."""
    count, found = 0, dict[str, Any]()

    class Counted(fuzz.Sequences):
        def teardown(self) -> None:
            nonlocal count
            super().teardown()
            error = sys.exc_info()[1]
            is_failure = isinstance(error, Exception) and not isinstance(error, HypothesisException)
            if not found and (error is None or is_failure):  # else Hypothesis gave the sequence up
                count += 1
            if not found and is_failure:
                found.update(sequences=count, seen=described(error))

    number = 0
    while count < most and not found:
        with contextlib.suppress(Exception):
            sequences(number, Counted, [Phase.generate])
        number += 1
    return found or {"sequences": None, "seen": None}


def soaked(fits: int) -> dict[str, Any]:
    """Fit the same small module's copies again and again; return how memory and open files grow after a warm-up."""
    memory, files = [], []
    with tempfile.TemporaryDirectory() as folder:
        for number in range(fits):
            module, callbacks = Toy(), [LoRACallback(rank=2), ModelCheckpoint(f"{folder}/{number % 4}")]
            trainer(*callbacks, root=folder, max_steps=-1, max_epochs=1).fit(module, loader())
            del module, callbacks
            gc.collect()
            memory.append(int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE"))
            files.append(len(os.listdir("/proc/self/fd")))
    kept = memory[min(WARMUP, fits // 2) :]
    half = len(kept) // 2
    return {
        "fits": fits,
        "memory_mb": round(memory[-1] / 2**20, 1),
        "growth_mb": round((kept[-1] - kept[0]) / 2**20, 2),
        "growth_in_second_half_mb": round((kept[-1] - kept[half]) / 2**20, 2),
        "open_files_more": files[-1] - files[min(WARMUP, fits // 2)],
    }


def fit_to_the_end(folder: Path) -> None:
    """Fit with a checkpoint after every epoch, from the last one if there is any; this is what is killed.

    Writes down each epoch that it has trained.
    """
    quiet()
    checkpoints = ModelCheckpoint(folder, save_top_k=-1, every_n_epochs=1)
    done = sorted(folder.glob("epoch=*.ckpt"), key=lambda path: path.stat().st_mtime_ns)
    module = Toy()
    count = LambdaCallback(on_train_epoch_end=lambda run, _: _append(folder / TRAINED, f"{run.current_epoch}\n"))
    run = trainer(LoRACallback(rank=2), checkpoints, count, root=folder, max_steps=-1, max_epochs=EPOCHS)
    print("begins", flush=True)
    run.fit(module, loader(), ckpt_path=str(done[-1]) if done else None)
    run.save_checkpoint(folder / LAST)


def _append(path: Path, text: str) -> None:
    with path.open("a") as file:
        file.write(text)


def killed(kills: int) -> dict[str, Any]:
    """Kill a fit at random moments, resume it each time, and compare it with a fit that was not killed.

    Returns:
        Among others, whether both end with the same bits, and how many epochs were trained more than once: at most one
        for each kill, whose checkpoint was not there yet.
    """
    moments, checkpoints = random.Random(0), []
    with tempfile.TemporaryDirectory() as name:
        whole, broken = Path(name) / "whole", Path(name) / "broken"
        whole.mkdir()
        broken.mkdir()
        assert _start(whole).wait() == 0
        for _ in range(kills):
            process = _start(broken)
            time.sleep(moments.uniform(0.0, LONGEST))
            process.send_signal(signal.SIGKILL)
            assert process.wait() == -signal.SIGKILL, "a fit ended before it was killed"
            checkpoints.append(len([*broken.glob("epoch=*.ckpt")]))
        assert _start(broken).wait() == 0
        again = len((broken / TRAINED).read_text().split()) - EPOCHS
        states = []
        for folder in (whole, broken):
            module = Toy()
            load_adapter(module, folder / LAST)
            states.append(adapter_state_dict(module))
    one, other = states
    are_equal = one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)
    found = {"kills": kills, "checkpoints_at_each": checkpoints, "epochs": EPOCHS}
    return found | {"epochs_again": again, "equal_bits": are_equal}


def _start(folder: Path) -> subprocess.Popen[str]:
    process = subprocess.Popen([sys.executable, __file__, "--fit", str(folder)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    while "begins" not in process.stdout.readline():
        assert process.poll() is None
    return process


def failures(results: dict[str, Any]) -> list[str]:
    """Return what is not as it should be, in sentences."""
    found = [f"Seed {key}: {' '.join(each['failure'])}" for key, each in results["fuzz"].items() if "failure" in each]
    if kills := results.get("kills"):
        if not kills["equal_bits"]:
            found.append("A fit that was killed and resumed ends with other bits than one that was not.")
        if kills["epochs_again"] > kills["kills"]:
            found.append(f"{kills['kills']} kills have lost {kills['epochs_again']} epochs that were trained.")
    return found


def page(results: dict[str, Any]) -> str:
    seeds, soak, kills = results["fuzz"], results["soak"], results["kills"]
    passed = [each for each in seeds.values() if "failure" not in each]
    sequences, refused = (sum(each[key] for each in passed) for key in ("sequences", "refused"))
    problems = "".join(f"**Failed: {problem}**\n\n" for problem in failures(results))
    at = ", ".join(map(str, kills["checkpoints_at_each"]))
    return f"""# Reliability

Written by `python benchmarks/reliability.py --page` from
[`benchmarks/reliability.json`](../benchmarks/reliability.json). `make fuzz`, `make mutants`
and `make soak` repeat the measurements.

{problems}## Random sequences of operations

[`tests/fuzz.py`](../tests/fuzz.py) draws one of six small models, float32 or float64, and then up to {STEPS} operations
with random options: attach, add, switch, use, remove, scale, disable, merge for a while and for good, detach, save and
load files and states (also damaged ones), fit, resume, truncate, combine, route, copy and pickle. After each one it
checks the bits of the base, the bits of every trained tensor, and the output against a dense float64 model that torch
alone computes. A refusal must be one that the documentation names, and must leave the model as it was.

- Sequences without a failure: **{sequences:,}**, of {len(passed)} seeds.
- Operations that were refused, each with the expected error and an unchanged model: {refused:,}.

{HISTORY}

Not drawn: starts from data, rank schedules, sweeps, quantized bases, low precision, and strategies of several
processes. These have tests of their own.

## Can they find mistakes?

{mutants.section(results["mutants"])}

## {soak["fits"]} fits in one process

After a warm-up of {WARMUP} fits with checkpoints, memory had grown by {soak["growth_mb"]} MB at the end, of
{soak["memory_mb"]} MB, {soak["growth_in_second_half_mb"]} MB of it in the second half. There were
{soak["open_files_more"]} more open files.

## {kills["kills"]} kills

A fit of {kills["epochs"]} epochs with a checkpoint after each was killed (`kill -9`) {kills["kills"]} times at random
moments and resumed from the last checkpoint each time. In the end its adapter
{"had the same bits as" if kills["equal_bits"] else "DIFFERED FROM"} that of a fit without interruption. Checkpoints at
the kills: {at}. Epochs that were trained again, because a kill came between an epoch and its checkpoint:
{kills["epochs_again"]}.
"""


HISTORY = """\
The runs found six mistakes, which [the changelog](../CHANGELOG.md) lists and which have tests of their own: a tied
weight stayed frozen after `detach`; two functions did not find an adapter that is named by a number; refused calls left
a record on a model with a single adapter; a recurrent layer computed with the biases of another adapter; `attach` with
the same config once more was refused for an embedding whose tokens train; a directory lacked a bias of attention.
`make test` runs a short version. 2,000 other sequences had passed before the checks were made stronger by what the next
section shows."""


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--fuzz", type=int, default=0, metavar="SEQUENCES")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="stop the sequences after this time")
    parser.add_argument("--mutants", type=int, default=0, metavar="SEQUENCES", help="to give each mistake")
    parser.add_argument("--soak", type=int, default=0, metavar="FITS")
    parser.add_argument("--kills", type=int, default=0)
    parser.add_argument("--page", action="store_true")
    parser.add_argument("--fit", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--first-failure", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args(arguments)
    quiet()
    if options.fit is not None:
        fit_to_the_end(options.fit)
    elif options.first_failure is not None:
        print(json.dumps(first_failure(options.first_failure)))
    else:
        measure(options)


def fuzz_on(results: dict[str, Any], options: argparse.Namespace, keep: Callable[[], None]) -> None:
    """Run the seeds that have not passed yet, up to the first failure: most others would fail in the same way."""
    end = time.monotonic() + options.seconds
    for number in map(str, range(-(-options.fuzz // AT_ONCE))):
        if "sequences" not in results.get(number, ()) and time.monotonic() < end:
            results[number] = fuzzed(int(number))
            keep()
            if "failure" in results[number]:
                break


def measure(options: argparse.Namespace) -> None:
    """Measure what the options ask for, keep it, and end the process with an error if something is wrong."""
    results = json.loads(options.results.read_text()) if options.results.exists() else {"fuzz": {}}

    def keep() -> None:
        part = options.results.with_suffix(".part")
        part.write_text(json.dumps(results, indent=1) + "\n")
        part.replace(options.results)

    fuzz_on(results["fuzz"], options, keep)
    if options.mutants:
        results["mutants"] = {"most": options.mutants, "found": {}}
        for mutant in mutants.MUTANTS:
            results["mutants"]["found"][mutant.mistake] = mutants.found_after(mutant, options.mutants)
            keep()
    if options.soak:
        results["soak"] = soaked(options.soak)
    if options.kills:
        results["kills"] = killed(options.kills)
    keep()
    if options.page:
        PAGE.write_text(page(results))
    if problems := failures(results):
        sys.exit("\n".join(problems))


if __name__ == "__main__":
    main()
