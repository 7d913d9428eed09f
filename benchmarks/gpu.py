"""A training step on one GPU, compared with other libraries: one command, under eight minutes.

    python benchmarks/gpu.py [--budget 420] [--json gpu.json]

First single layers in the shapes of Llama in bfloat16, 8,192 tokens: forward and backward, and peak memory above the
idle level. Then two blocks under a Lightning Trainer: tokens per second and peak memory. The operations of the other
libraries are reimplemented here in torch, so only PEFT must be installed. Whatever does not fit into the budget is
skipped and reported. ``--smoke`` runs everything on the CPU with tiny sizes.
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple
from unittest import mock

import measuring
import step
import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_lora.ops import linear as ops

SHAPES = [(4096, 4096), (4096, 1024), (4096, 14336), (14336, 4096)]
RANKS, DROPOUTS = (16, 64), (0.0, 0.1)
# Targets for the 4096 x 4096 layer with rank 16 and without dropout: ours over each.
REACH = {"frozen": 1.20, "PEFT": 0.80, "PEFT, bf16 adapters": 0.90}
SCALING = 2.0


class Case(NamedTuple):
    """A layer, with factors in the precisions that other libraries use."""

    x: Tensor
    W: Tensor
    A: Tensor
    B: Tensor
    dropout: float

    def low(self) -> Case:
        """Return the same with factors in bfloat16."""
        A, B = (t.detach().to(self.x.dtype).requires_grad_() for t in (self.A, self.B))
        return self._replace(A=A, B=B)


def case(k: int, n: int, rank: int, dropout: float, tokens: int, device: str) -> Case:
    x = torch.randn(tokens, k, device=device, dtype=torch.bfloat16, requires_grad=True)
    W = torch.randn(n, k, device=device, dtype=torch.bfloat16) / k**0.5
    A = (torch.randn(rank, k, device=device) / k**0.5).requires_grad_()
    return Case(x, W, A, torch.randn(n, rank, device=device).requires_grad_(), dropout)


# --- the operations of other libraries


def frozen(c: Case) -> Tensor:
    return F.linear(c.x, c.W)


def full(c: Case) -> Tensor:
    return F.linear(c.x, c.W if c.W.requires_grad else c.W.requires_grad_())


def ours(c: Case) -> Tensor:
    return ops.lora_linear(c.x, c.W, None, c.A, c.B, scaling=SCALING, dropout=c.dropout)


def composed(c: Case) -> Tensor:
    with mock.patch.object(ops, "is_fast", step.never):
        return ours(c)


def without_kernels(c: Case) -> Tensor:
    with mock.patch.object(ops, "_MAY_USE_KERNELS", False):
        return ours(c)


def peft(c: Case) -> Tensor:
    """PEFT's Linear.forward: casts x to the factors' precision, sums in the output's size, casts back."""
    result = F.linear(c.x, c.W)
    x = F.dropout(c.x.to(c.A.dtype), c.dropout) if c.dropout else c.x.to(c.A.dtype)
    return (result + F.linear(F.linear(x, c.A), c.B) * SCALING).to(c.x.dtype)


def torchtune(c: Case) -> Tensor:
    """The operations of torchtune's and torchtitan's LoRALinear.forward."""
    out = F.linear(c.x, c.W)
    x = F.dropout(c.x, c.dropout) if c.dropout else c.x
    return out + SCALING * F.linear(F.linear(x, c.A), c.B)


class UnslothLinear(torch.autograd.Function):
    """The operations of unsloth's fast_lora and axolotl's lora kernels, for one projection.

    The up-projection is added in place, h is computed again in backward; with dropout the dropped x is kept besides x,
    as axolotl does. (unsloth itself writes dx over x, which only its own blocks allow.)
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, dropped: Tensor, W: Tensor, A: Tensor, B: Tensor) -> Tensor:
        out = x @ W.T
        out.addmm_(dropped @ A.T, B.T, alpha=SCALING)
        ctx.save_for_backward(dropped, W, A, B)
        return out

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        dropped, W, A, B = ctx.saved_tensors
        g = dy @ B
        dA, dB = SCALING * (g.T @ dropped), SCALING * (dy.T @ (dropped @ A.T))
        return dy @ W, SCALING * (g @ A), None, dA, dB


def unsloth(c: Case) -> Tensor:
    dropped = F.dropout(c.x, c.dropout) if c.dropout else c.x
    return UnslothLinear.apply(c.x, dropped, c.W, c.A, c.B)


VARIANTS: dict[str, tuple[Callable[[Case], Tensor], bool]] = {  # True: factors in bfloat16
    "frozen": (frozen, False),
    "full fine-tuning": (full, False),
    "ours": (ours, False),
    "ours, composed": (composed, False),
    "ours, without Triton": (without_kernels, False),
    "PEFT": (peft, False),
    "PEFT, bf16 adapters": (peft, True),
    "torchtune": (torchtune, True),
    "unsloth, axolotl": (unsloth, True),
}


def run(function: Callable[[Case], Tensor], c: Case, dy: Tensor) -> None:
    for tensor in (c.x, c.W, c.A, c.B):
        tensor.grad = None
    function(c).backward(dy)
    c.x.grad = c.A.grad = c.B.grad = c.W.grad = None


# --- measuring


def device_seconds(job: Callable[[], object]) -> float:
    """Return the time of a run, including the device's work."""
    if not torch.cuda.is_available():
        return measuring.wall_seconds(job)
    before, after = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    before.record()
    job()
    after.record()
    after.synchronize()
    return before.elapsed_time(after) / 1e3


def peak_above(job: Callable[[], object]) -> float:
    """Return the MiB that a run takes above the idle level; unknown without a GPU."""
    if not torch.cuda.is_available():
        return float("nan")
    torch.cuda.synchronize()
    resting = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    job()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - resting) / 2**20


def layer_rows(
    k: int, n: int, rank: int, dropout: float, args: argparse.Namespace, device: str
) -> Iterator[measuring.Row]:
    base = case(k, n, rank, dropout, args.tokens, device)
    dy = torch.randn(args.tokens, n, device=device, dtype=torch.bfloat16)
    jobs = {}
    for name, (function, is_low) in VARIANTS.items():
        own = base.low() if is_low else base
        own = own._replace(W=own.W.detach().clone()) if function is full else own
        jobs[name] = partial(run, function, own, dy)
    times = measuring.in_turn(jobs, args.rounds, warmup=3, clock=device_seconds)
    what = f"{k}->{n}, rank {rank}, dropout {dropout}"
    is_target = (k, n, rank, dropout) == (4096, 4096, 16, 0.0)
    for other in VARIANTS:
        if other != "ours":
            yield measuring.ratio(
                times, "ours", other, REACH.get(other) if is_target else None, f"{what}: ours / {other}"
            )
    yield measuring.spread(f"{what}: ours, ms", [1e3 * t for t in times["ours"]])
    for name in VARIANTS:
        yield measuring.Row(f"{what}: peak of {name}, MiB", peak_above(jobs[name]))


# --- under a Trainer


class Module(LightningModule):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def training_step(self, batch: Tensor, *_: Any) -> Tensor:
        return self.model(batch.to(torch.bfloat16)).float().square().mean()

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=1e-4)


class Clock(Callback):
    """Records when each step ends."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_train_batch_end(self, *_: Any) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.ends.append(time.perf_counter())


def tokens_per_second(model: nn.Module, args: argparse.Namespace) -> tuple[float, float]:
    """Return the tokens per second of a fit, and its peak memory in MiB."""
    clock, length = Clock(), args.tokens // 4
    data = DataLoader(torch.randn(4 * args.steps, length, args.width), batch_size=4)
    options = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = Trainer(
        accelerator="auto", devices=1, max_epochs=1, enable_model_summary=False, callbacks=[clock], **options
    )
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    trainer.fit(Module(model), data)
    gaps = sorted(after - before for before, after in zip(clock.ends[1:], clock.ends[2:]))  # noqa: B905 - one shorter
    peak = torch.cuda.max_memory_allocated() / 2**20 if torch.cuda.is_available() else float("nan")
    model.cpu()
    return 4 * length / gaps[len(gaps) // 2], peak


def trainer_rows(dropout: float, args: argparse.Namespace) -> Iterator[measuring.Row]:
    with mock.patch.object(step, "RANK", 16):
        base = step.decoder(args.layers, args.width, args.hidden).to(torch.bfloat16)
        makers: dict[str, Callable[[], nn.Module]] = {
            "ours": lambda: step.ours(copy.deepcopy(base), dropout),
            "full fine-tuning": lambda: copy.deepcopy(base),
        }
        if step.HAS_PEFT:
            makers["PEFT"] = lambda: step.theirs(copy.deepcopy(base), dropout)
            makers["PEFT, bf16 adapters"] = lambda: step.theirs(copy.deepcopy(base), dropout, autocast_adapter=False)
        for name, make in makers.items():
            speed, peak = tokens_per_second(make(), args)
            yield measuring.Row(f"Trainer, dropout {dropout}: tokens/s of {name}", speed)
            yield measuring.Row(f"Trainer, dropout {dropout}: peak of {name}, MiB", peak)


def main(argv: Sequence[str] | None = None) -> list[measuring.Row]:
    sizes = {"rounds": 11, "tokens": 8192, "width": 4096, "hidden": 14336, "layers": 2, "steps": 8, "budget": 420}
    args = measuring.parser(__doc__, **sizes).parse_args(argv)
    shapes, ranks, device = SHAPES, RANKS, "cuda"
    if args.smoke:
        vars(args).update(rounds=2, tokens=16, width=32, hidden=64, layers=1, steps=4)
        shapes, ranks, device = [(32, 32)], (4,), "cpu"
    elif not torch.cuda.is_available():
        raise SystemExit("No GPU is here; --smoke tries everything on the CPU.")
    until, rows, left_out = time.monotonic() + args.budget, [], []
    parts: list[tuple[str, Callable[[], Iterator[measuring.Row]]]] = [
        (f"{k}->{n}, rank {rank}, dropout {dropout}", partial(layer_rows, k, n, rank, dropout, args, device))
        for rank in ranks
        for dropout in DROPOUTS
        for k, n in shapes
    ]
    parts[2:2] = [(f"Trainer, dropout {dropout}", partial(trainer_rows, dropout, args)) for dropout in DROPOUTS]
    for name, part in parts:
        if time.monotonic() > until:
            left_out.append(name)
        else:
            rows += part()
    if left_out:
        print(f"left out, for want of time: {'; '.join(left_out)}")
    return measuring.report(rows, args)


if __name__ == "__main__":
    main()
