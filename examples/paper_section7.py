"""Section 7 of the LoRA paper on real data: which matrices, which rank, and how the update relates to the weight.

    python examples/paper_section7.py

The vision transformer of ``digits.py`` learns scikit-learn's digits and is then adapted many times to the same digits,
inverted and rotated: with one parameter budget for different matrices (section 7.1 of the paper), and with several
ranks and seeds (7.2). Then the updates are related to the weights (7.3). The findings are generated from the measured
numbers, and say where those of the paper do not show at this size. It takes about two minutes on 2 cores.

It writes ``section7.html`` (one offline page), ``section7.json`` and pictures to ``examples/output/section7``.
Source: Hu et al. 2021, "LoRA", arXiv:2106.09685.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from digits import BASE_RATE, LORA_RATE, OUTPUT, DigitClassifier, Digits, accuracy, quiet_lightning
from lightning.pytorch import Callback, Trainer, seed_everything
from paper_section7_page import write_page
from torch import Tensor, nn
from tqdm import tqdm

from lightning_lora import LoRACallback, LoRAConfig, detach
from lightning_lora.analysis import AdapterAnalysis, AdapterMatrix, analyze, plan_budget, read_matrices
from lightning_lora.analysis.spectrum import (
    own_projection,
    random_baseline,
    relate,
    subspace_similarity,
    update_similarity,
)

WIDTH = 96  # more than in digits.py: in 64 dimensions, random directions overlap too much
KINDS = ("q", "k", "v", "proj", "fc1", "fc2")
SCALING = 2.0  # of every update: alpha is twice the rank


@dataclass(frozen=True)
class Size:
    """The size of the study."""

    base_steps: int = 500
    steps: int = 150
    seeds: tuple[int, ...] = (0, 1, 2)
    budget: int = 6144  # parameters: rank 16 on one kind of attention matrix in both blocks
    groups: tuple[tuple[str, ...], ...] = (
        *(("q",), ("k",), ("v",), ("proj",), ("q", "k"), ("q", "v"), ("q", "k", "v", "proj")),
        *(("fc1",), ("fc1", "fc2"), KINDS),
    )
    ranks: tuple[int, ...] = (1, 2, 4, 8, 32)
    rank_targets: tuple[str, ...] = ("q", "v")
    pair: tuple[int, int] = (8, 32)  # the ranks to compare; seeds are compared at the second
    relation_ranks: tuple[int, int] = (4, 32)


QUICK = Size(
    base_steps=60,
    steps=15,
    seeds=(0, 1),
    groups=(("q",), ("q", "v"), ("q", "k", "v", "proj")),
    ranks=(8, 32),
    relation_ranks=(8, 32),
)


@dataclass
class Run:
    """One trained adapter."""

    targets: tuple[str, ...]
    rank: int
    seed: int
    parameters: int
    accuracy: float
    matrices: dict[str, AdapterMatrix]
    analysis: AdapterAnalysis


@dataclass
class Lab:
    """A base model and its adapters; no adapter is trained twice."""

    base: nn.Module
    data: Digits
    bar: Any
    runs: dict[tuple[tuple[str, ...], int, int], Run] = field(default_factory=dict)

    def run(self, targets: tuple[str, ...], rank: int, seed: int) -> Run:
        key = targets, rank, seed
        if key not in self.runs:
            self.bar.set_description(f"{'+'.join(targets)}, rank {rank}, seed {seed}")
            seed_everything(seed, verbose=False)  # the callback derives A from it
            callback = LoRACallback(rank=rank, alpha=SCALING * rank, target_modules=list(targets))
            fit(self.base, self.data, LORA_RATE, callback)
            size = sum(p.numel() for p in self.base.parameters() if p.requires_grad)
            found = {matrix.name: matrix for matrix in read_matrices(self.base)}
            done = Run(*key, size, accuracy(self.base, self.data), found, analyze(self.base))
            self.runs[key] = done
            detach(self.base)  # restores the exact base for the next run
            self.bar.set_postfix_str(f"{done.accuracy:.1%}")
            self.bar.update()
        return self.runs[key]


def fit(model: Any, data: Digits, rate: float, *callbacks: Callback) -> None:
    model.learning_rate = rate
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=list(callbacks),
    )
    trainer.fit(model, data)


# --- the three studies


def study_budget(lab: Lab, size: Size, ranks: dict[tuple[str, ...], int]) -> list[dict[str, Any]]:
    """7.1: one parameter budget, spent on different matrices."""
    return [row([lab.run(targets, rank, seed) for seed in size.seeds]) for targets, rank in ranks.items()]


def affordable(model: nn.Module, size: Size) -> dict[tuple[str, ...], int]:
    """Return the rank that the budget buys for each group of matrices."""
    plan = plan_budget(model, LoRAConfig(), parameters=size.budget, groups=size.groups)
    found = {choice.targets: choice.rank for choice in plan.choices}
    return {group: found[group] for group in size.groups}


def study_rank(lab: Lab, size: Size) -> list[dict[str, Any]]:
    """7.2, table 6: the same matrices at several ranks."""
    return [row([lab.run(size.rank_targets, rank, seed) for seed in size.seeds]) for rank in size.ranks]


def row(runs: list[Run]) -> dict[str, Any]:
    scores = torch.tensor([run.accuracy for run in runs], dtype=torch.float64)
    first = runs[0]
    return {
        "targets": list(first.targets),
        "rank": first.rank,
        "parameters": first.parameters,
        "accuracies": scores.tolist(),
        "mean": float(scores.mean()),
        "deviation": float(scores.std()),
    }


def study_subspaces(lab: Lab, size: Size) -> tuple[list[dict[str, Any]], dict[str, dict[str, Tensor]]]:
    """7.2, figures 3 and 4: overlap between two ranks, and between two seeds."""
    low, high = size.pair
    # Different seeds, because with one seed, A at the low rank starts as the first rows of A at the high rank.
    pairs = {
        "ranks": (lab.run(size.rank_targets, low, size.seeds[0]), lab.run(size.rank_targets, high, size.seeds[1])),
        "seeds": (lab.run(size.rank_targets, high, size.seeds[0]), lab.run(size.rank_targets, high, size.seeds[1])),
    }
    rows, maps = [], {}
    for what, (one, other) in pairs.items():
        maps[what] = {}
        for name in one.matrices:
            a, b = one.matrices[name], other.matrices[name]
            factors = subspace_similarity(a.A, b.A)
            updates = update_similarity(a.svd(), b.svd())
            maps[what][name] = factors
            numbers = {"factors": factors, "inputs": updates.inputs, "outputs": updates.outputs}
            rows.append({"pair": what, "layer": name, "kind": name.rpartition(".")[2]} | overlaps(numbers, a.shape))
    draws = (torch.randn(rank, WIDTH, generator=torch.Generator().manual_seed(rank)) for rank in (high, high + 1))
    maps["seeds"]["random directions"] = subspace_similarity(*(each[:high] for each in draws))
    return rows, maps


def overlaps(phis: dict[str, Tensor], shape: tuple[int, int]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for what, phi in phis.items():
        chance = random_baseline(*phi.shape, shape[0] if what == "outputs" else shape[1])
        half = [length // 2 for length in phi.shape]  # at the full rank, most directions are A's initial ones
        found[what] = {
            "first": float(phi[0, 0]),
            "half": float(phi[half[0] - 1, half[1] - 1]) if min(half) else float(phi[0, 0]),
            "first_by_chance": float(chance[0, 0]),
            "half_by_chance": float(chance[max(half[0], 1) - 1, max(half[1], 1) - 1]),
        }
    return found


def study_relation(lab: Lab, size: Size) -> list[dict[str, Any]]:
    """7.3, table 7: the weight projected on the directions of the update, of itself, and random ones."""
    rows = []
    for rank in size.relation_ranks:
        run = lab.run(size.rank_targets, rank, size.seeds[0])
        for name, matrix in run.matrices.items():
            assert matrix.weight is not None
            found = relate(matrix.weight, matrix.svd())
            own = own_projection(matrix.weight, rank)
            rows.append({"layer": name, "rank": rank, "own_projection": own} | found._asdict())
    return rows


# --- the job


def run_all(size: Size) -> tuple[dict[str, Any], dict[str, Any]]:
    """Train everything; return the numbers, and the data for the pictures."""
    model, clean = DigitClassifier(width=WIDTH), Digits("clean", steps=size.base_steps)
    data = Digits("shifted", steps=size.steps)
    bought = affordable(model, size)
    settings = {*bought.items(), *((size.rank_targets, rank) for rank in size.ranks)}
    with tqdm(total=1 + len(settings) * len(size.seeds), desc="base model", unit="run", mininterval=0.5) as bar:
        fit(model, clean, BASE_RATE)
        bar.update()
        lab = Lab(model, data, bar)
        base = {"old": accuracy(model, clean), "new": accuracy(model, data)}
        budget, ranks = study_budget(lab, size, bought), study_rank(lab, size)
        subspaces, maps = study_subspaces(lab, size)
        relation = study_relation(lab, size)
        widest = lab.run(size.groups[-1], budget[-1]["rank"], size.seeds[0]).analysis
        bar.set_description("done")
    numbers = {
        "base": base,
        "images": len(data.train),
        "steps": size.steps,
        "seeds": list(size.seeds),
        "budget": size.budget,
        "pair": list(size.pair),
        "7.1 matrices": budget,
        "7.2 ranks": ranks,
        "7.2 subspaces": subspaces,
        "7.3 relation": relation,
    }
    return numbers, {"maps": maps, "widest": widest, "groups": size.groups[-1]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--output", type=Path, default=OUTPUT / "section7", help="folder for page, numbers and pictures"
    )
    parser.add_argument("--quick", action="store_true", help="train less and for a shorter time, with poor results")
    options = parser.parse_args()
    quiet_lightning()
    silence_reports()
    seed_everything(0, verbose=False)
    started = time.perf_counter()
    numbers, pictures = run_all(QUICK if options.quick else Size())
    numbers["seconds"] = time.perf_counter() - started
    options.output.mkdir(parents=True, exist_ok=True)
    numbers["findings"] = write_page(numbers, pictures, options.output)
    (options.output / "section7.json").write_text(json.dumps(numbers, indent=2))
    for finding in numbers["findings"]:
        print(f"\n{finding['section']}  {finding['claim']}\n     {finding['found']}\n     {finding['verdict']}")
    print(f"\n{numbers['seconds']:.0f} seconds of training. Page: {options.output / 'section7.html'}")


def silence_reports() -> None:
    """Suppress LoRA's report, which would be printed for each of dozens of runs."""
    import logging

    logging.getLogger("lightning.pytorch.utilities.rank_zero").setLevel(logging.WARNING)
    logging.getLogger("lightning.pytorch.utilities.rank_zero").propagate = False


if __name__ == "__main__":
    main()
