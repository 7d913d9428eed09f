"""Reliability: random sequences of operations, many fits in one process, and fits that are killed.

PYTHONPATH=. python benchmarks/reliability.py --fuzz 2000            # goes on where benchmarks/reliability.json ends
PYTHONPATH=. python benchmarks/reliability.py --soak 200 --kills 10
PYTHONPATH=. python benchmarks/reliability.py --page                 # writes docs/reliability.md
"""

from __future__ import annotations

import argparse
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
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from hypothesis import HealthCheck, Phase, seed, settings
from hypothesis.stateful import run_state_machine_as_test
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_lora import LoRACallback, adapter_state_dict, load_adapter
from tests import fuzz
from tests.toys import Toy, loader, trainer

FOLDER = Path(__file__).parent
RESULTS, PAGE = FOLDER / "reliability.json", FOLDER.parent / "docs" / "reliability.md"
AT_ONCE, STEPS = 20, 8  # sequences of one seed, and operations in each
WARMUP = 20  # fits before memory is compared
EPOCHS = 200  # of the fits that are killed
LAST = "whole.ckpt"


def quiet() -> None:
    warnings.simplefilter("ignore")
    for name in ("lightning.pytorch", "lightning.pytorch.utilities.rank_zero", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)


def fuzzed(number: int) -> dict[str, Any]:
    """Run the sequences of one seed.

    Raises:
        Exception: The first failure, with the shortest sequence that shows it.
    """
    before = fuzz.REFUSED.total()
    machine = seed(number)(type("Sequences", (fuzz.Sequences,), {}))
    options = settings(
        max_examples=AT_ONCE,
        stateful_step_count=STEPS,
        database=None,
        deadline=None,
        phases=[Phase.generate, Phase.shrink],
        suppress_health_check=list(HealthCheck),
    )
    run_state_machine_as_test(machine, settings=options)
    return {"sequences": AT_ONCE, "refused": fuzz.REFUSED.total() - before}


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
    """Fit with a checkpoint after every epoch, from the last one if there is any; this is what is killed."""
    quiet()
    checkpoints = ModelCheckpoint(folder, save_top_k=-1, every_n_epochs=1)
    done = sorted(folder.glob("epoch=*.ckpt"), key=lambda path: path.stat().st_mtime_ns)
    module = Toy()
    run = trainer(LoRACallback(rank=2), checkpoints, root=folder, max_steps=-1, max_epochs=EPOCHS)
    print("begins", flush=True)
    run.fit(module, loader(), ckpt_path=str(done[-1]) if done else None)
    run.save_checkpoint(folder / LAST)


def killed(kills: int) -> dict[str, Any]:
    """Kill a fit at random moments, resume it each time, and compare its end with that of a fit that was not killed."""
    moments, epochs = random.Random(0), []
    with tempfile.TemporaryDirectory() as name:
        whole, broken = Path(name) / "whole", Path(name) / "broken"
        whole.mkdir()
        broken.mkdir()
        process = _start(whole)
        assert process.wait() == 0
        for _ in range(kills):
            process = _start(broken)
            time.sleep(moments.uniform(0.0, 0.6))
            process.send_signal(signal.SIGKILL)
            process.wait()
            epochs.append(len([*broken.glob("epoch=*.ckpt")]))
        assert _start(broken).wait() == 0
        states = []
        for folder in (whole, broken):
            module = Toy()
            load_adapter(module, folder / LAST)
            states.append(adapter_state_dict(module))
    one, other = states
    are_equal = one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)
    return {"kills": kills, "checkpoints_at_each": epochs, "epochs": EPOCHS, "equal_bits": are_equal}


def _start(folder: Path) -> subprocess.Popen[str]:
    process = subprocess.Popen([sys.executable, __file__, "--fit", str(folder)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    while "begins" not in process.stdout.readline():
        assert process.poll() is None
    return process


def page(results: dict[str, Any]) -> str:
    seeds, soak, kills = results["fuzz"], results["soak"], results["kills"]
    sequences = sum(each["sequences"] for each in seeds.values())
    refused = sum(each["refused"] for each in seeds.values())
    outcome = "had the same bits as" if kills["equal_bits"] else "DIFFERED FROM"
    at = ", ".join(map(str, kills["checkpoints_at_each"]))
    return f"""# Reliability

Written by `python benchmarks/reliability.py --page` from
[`benchmarks/reliability.json`](../benchmarks/reliability.json). `make fuzz` and `make soak` repeat the measurements.

## Random sequences of operations

[`tests/fuzz.py`](../tests/fuzz.py) draws one of six small models, float32 or float64, and then up to {STEPS} operations
with random options: attach, add, switch, use, remove, scale, disable, merge for a while and for good, detach, save and
load files and states (also damaged ones), fit, resume, truncate, combine, route, copy and pickle. After each one it
checks the bits of the base, the bits of every trained tensor, and the output against a dense float64 model that torch
alone computes. A refusal must be one that the documentation names, and must leave the model as it was.

- Sequences without a failure: **{sequences:,}**, of {len(seeds)} seeds.
- Operations that were refused, each with the expected error and an unchanged model: {refused:,}.

The runs found four mistakes, which [the changelog](../CHANGELOG.md) lists and which have tests of their own: a tied
weight stayed frozen after `detach`; two functions did not find an adapter that is named by a number; refused calls left
a record on a model with a single adapter; a recurrent layer computed with the biases of another adapter. `make test`
runs a short version.

Not drawn: starts from data, rank schedules, sweeps, quantized bases, low precision, and strategies of several
processes. These have tests of their own.

## {soak["fits"]} fits in one process

After a warm-up of {WARMUP} fits with checkpoints, memory had grown by {soak["growth_mb"]} MB at the end, of
{soak["memory_mb"]} MB, {soak["growth_in_second_half_mb"]} MB of it in the second half. There were
{soak["open_files_more"]} more open files.

## {kills["kills"]} kills

A fit of {kills["epochs"]} epochs with a checkpoint after each was killed (`kill -9`) {kills["kills"]} times at random
moments and resumed from the last checkpoint each time. In the end its adapter {outcome} that of a fit without
interruption. Checkpoints at the kills: {at}.
"""


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--fuzz", type=int, default=0, metavar="SEQUENCES")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="stop the sequences after this time")
    parser.add_argument("--soak", type=int, default=0, metavar="FITS")
    parser.add_argument("--kills", type=int, default=0)
    parser.add_argument("--page", action="store_true")
    parser.add_argument("--fit", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args(arguments)
    quiet()
    if options.fit is not None:
        fit_to_the_end(options.fit)
        return
    results = json.loads(options.results.read_text()) if options.results.exists() else {"fuzz": {}}

    def keep() -> None:
        options.results.write_text(json.dumps(results, indent=1) + "\n")

    end = time.monotonic() + options.seconds
    for number in range(-(-options.fuzz // AT_ONCE)):
        if str(number) not in results["fuzz"] and time.monotonic() < end:
            results["fuzz"][str(number)] = fuzzed(number)
            keep()
    if options.soak:
        results["soak"] = soaked(options.soak)
    if options.kills:
        results["kills"] = killed(options.kills)
    keep()
    if options.page:
        PAGE.write_text(page(results))


if __name__ == "__main__":
    main()
