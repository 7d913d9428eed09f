"""The parts of ``gpu_visit.sh`` that measure: ``python benchmarks/gpu_visit.py [--smoke] PART ...``.

Each row is appended to ``$OUT/visit.jsonl`` the moment it is known, because a visit may end at any time.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import math
import os
import platform
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict
from functools import partial
from importlib import metadata
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import Any
from unittest import mock

import gpu
import measuring
import shared_input
import step
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.strategies import ModelParallelStrategy
from measuring import Row
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.utils.data import DataLoader

from lightning_lora import LoRACallback, LoRAConfig, attach
from lightning_lora.ops import dropout as masks
from lightning_lora.ops import linear as ops

PACKAGES = ("torch", "triton", "lightning", "pytorch-lightning", "transformers", "peft", "bitsandbytes")
ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
# Llama 3.2 1B, with a random start.
LLAMA = {
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128_256,
    "tie_word_embeddings": True,
}
TINY = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 128,
}
LARGEST_ERROR = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}
LORA = {"rank": 16, "alpha": 32.0}
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
QUIET = {
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}


def sizes(smoke: bool) -> argparse.Namespace:
    if smoke:
        small = {"rounds": 2, "tokens": 16, "width": 32, "hidden": 64, "layers": 1, "steps": 4, "narrow": 32}
        return argparse.Namespace(smoke=True, shapes=[(32, 32)], ranks=(4,), **small)
    large = {"rounds": 11, "tokens": 8192, "width": 4096, "hidden": 14336, "layers": 2, "steps": 10, "narrow": 1024}
    return argparse.Namespace(smoke=False, shapes=gpu.SHAPES, ranks=gpu.RANKS, **large)


# --- environment and single layers


def environment(_: argparse.Namespace) -> Iterator[Row]:
    print(platform.platform(), f"Python {platform.python_version()}, {os.cpu_count()} CPU cores")
    there = {package.metadata["Name"].lower(): package.version for package in metadata.distributions()}
    print(", ".join(f"{name} {there.get(name, 'is absent')}" for name in PACKAGES))
    if ON_GPU:
        found = torch.cuda.get_device_properties(0)
        print(found, torch.version.cuda, torch.cuda.nccl.version())
        yield Row("GPU memory, GiB", found.total_memory / 2**30)
    x = torch.randn(64 if not ON_GPU else 8192, 64 if not ON_GPU else 8192, device=DEVICE, dtype=torch.bfloat16)
    times = [gpu.device_seconds(lambda: x @ x) for _ in range(12)][2:]
    yield measuring.spread("a square product of the largest kind, TFLOP/s", [2 * len(x) ** 3 / t / 1e12 for t in times])
    times = [gpu.device_seconds(x.clone) for _ in range(12)][2:]
    yield measuring.spread("a copy, GB/s read and written", [2 * x.nbytes / t / 1e9 for t in times])


def layers(args: argparse.Namespace) -> Iterator[Row]:
    for rank in args.ranks:
        for dropout in gpu.DROPOUTS:
            for k, n in args.shapes:
                yield from gpu.layer_rows(k, n, rank, dropout, args, DEVICE)


def kernels(args: argparse.Namespace) -> Iterator[Row]:
    """Triton kernels: their errors next to float64, whether the same call gives the same bits, and their speed."""
    if not find_spec("triton"):
        print("triton is absent")
        return
    from lightning_lora.ops import triton_kernels as found

    wrong = 0
    if args.smoke:
        found._seconds, found._ROWS, found._CHUNK = measuring.wall_seconds, 32, 64
    for dtype in found.DTYPES:
        for rows, width, rank in ((300, 264, 8), (1000, 520, 64), (257, 1030, 128)) if ON_GPU else ((20, 40, 3),):
            for row in error_rows(found, rows, width, rank, dtype):
                wrong += row.verdict == "missed" or row.value != row.value
                yield row
    if wrong:
        raise SystemExit("A kernel is wrong, so the parts that follow do not use them.")
    for rank in args.ranks:
        for width in dict.fromkeys(width for shape in args.shapes for width in shape):
            yield from speed_rows(found, args.tokens, width, rank)


def error_rows(found: Any, rows: int, width: int, rank: int, dtype: torch.dtype) -> Iterator[Row]:
    x, A = (torch.randn(shape, device=DEVICE).to(dtype) for shape in ((rows, width), (rank, width)))
    B, h = (torch.randn(shape, device=DEVICE).to(dtype) for shape in ((width, rank), (rows, rank)))
    keep, seed = 0.9, found.new_seed(x)
    mask = masks.alive(found.mask_bits(x.shape, dtype, keep, seed), width, torch.float64)
    exact = x.double() * mask
    calls: dict[str, tuple[Callable[[], Sequence[Tensor]], Sequence[Tensor]]] = {
        "dropout and down": (lambda: [found.dropped_product(x, A, keep, seed)], [exact @ A.double().T]),
        "gradient of A": (lambda: [found.factor_gradient(h, x, keep, seed)], [h.double().T @ exact]),
        "g and dB": (lambda: found.gradients(x, B, h), [x.double() @ B.double(), x.double().T @ h.double()]),
        "adding": (
            lambda: [found.add_product(x.clone(), h, A, 2.0, keep, seed)],
            [x.double() + 2.0 * mask * (h.double() @ A.double())],
        ),
    }
    for name, (call, truth) in calls.items():
        once, again = call(), call()
        error = max(float((a.double() - b).norm() / b.norm()) for a, b in zip(once, truth, strict=True))
        what = f"{name}, {rows} x {width}, rank {rank}, {dtype}"
        yield Row(f"{what}: relative error", error, reach=LARGEST_ERROR[dtype])
        yield Row(f"{what}: bits differ between two calls", float(not all(map(torch.equal, once, again))), reach=0.0)


def speed_rows(found: Any, tokens: int, width: int, rank: int) -> Iterator[Row]:
    """Ask as the operations do, and report what the answer was made of."""
    x, h = (torch.randn(tokens, size, device=DEVICE, dtype=torch.bfloat16) for size in (width, rank))
    A, B = (torch.randn(shape, device=DEVICE, dtype=torch.bfloat16) for shape in ((rank, width), (width, rank)))
    asks = {
        "dropout": lambda: ops._drops(x, A, 0.1),
        "pair": lambda: ops._pairs(x, B, h),
        "add": lambda: ops._adds(x, h, B),
    }
    for what, ask in asks.items():
        times: list[float] = []
        with mock.patch.object(found, "_seconds", lambda job, kept=times, clock=found._seconds: note(kept, clock(job))):
            ask()
        yield Row(f"{what}, {tokens} x {width}, rank {rank}: kernel, ms", 1e3 * times[0])
        yield Row(f"{what}, {tokens} x {width}, rank {rank}: kernel / torch", times[0] / times[1])


def note(kept: list[float], seconds: float) -> float:
    kept.append(seconds)
    return seconds


# --- a language model under a Trainer


class LanguageModel(LightningModule):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def training_step(self, batch: Tensor) -> Tensor:
        return self.model(input_ids=batch, labels=batch).loss

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=1e-4)


def llama(args: argparse.Namespace, *, checkpointing: bool = False) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(DEVICE):
            model = LlamaForCausalLM(LlamaConfig(**(TINY if args.smoke else LLAMA), use_cache=False))
    finally:
        torch.set_default_dtype(before)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model.train()


def fit_rows(what: str, module: LightningModule, args: argparse.Namespace, *callbacks: Any) -> Iterator[Row]:
    clock, vocabulary = gpu.Clock(), (TINY if args.smoke else LLAMA)["vocab_size"]
    length = args.tokens // 4
    data = DataLoader(torch.randint(vocabulary, (4 * args.steps, length)), batch_size=4)
    trainer = Trainer(accelerator="auto", devices=1, max_epochs=1, callbacks=[clock, *callbacks], **QUIET)
    if ON_GPU:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    trainer.fit(module, data)
    yield measuring.spread(f"{what}: tokens/s", [args.tokens / gap for gap in gaps(clock)])
    yield Row(f"{what}: peak, MiB", torch.cuda.max_memory_allocated() / 2**20 if ON_GPU else math.nan)


def gaps(clock: gpu.Clock) -> list[float]:
    """Return the seconds between the ends of steps, without the first two, which warm up."""
    ends = clock.ends[2:] if len(clock.ends) > 4 else clock.ends
    return [after - before for before, after in pairwise(ends)]


def trainer(args: argparse.Namespace) -> Iterator[Row]:
    for checkpointing in (False, True):
        suffix = ", activation checkpointing" if checkpointing else ""
        module = LanguageModel(llama(args, checkpointing=checkpointing))
        yield from fit_rows(f"Llama 1B{suffix}: ours", module, args, LoRACallback(**LORA, target_modules=TARGETS))
        del module
        for name, autocast in (("PEFT", True), ("PEFT, bf16 adapters", False)) if step.HAS_PEFT else ():
            with mock.patch.multiple(step, RANK=LORA["rank"], ALPHA=LORA["alpha"], TARGETS=set(TARGETS)):
                theirs = step.theirs(llama(args, checkpointing=checkpointing), 0.0, autocast_adapter=autocast)
            yield from fit_rows(f"Llama 1B{suffix}: {name}", LanguageModel(theirs), args)
            del theirs


def compiled(args: argparse.Namespace) -> Iterator[Row]:
    for checkpointing in (False,) if args.smoke else (False, True):
        model = llama(args, checkpointing=checkpointing)
        model.compile(backend="eager" if args.smoke else "inductor")
        suffix = ", activation checkpointing" if checkpointing else ""
        started = time.perf_counter()
        lora = LoRACallback(**LORA, target_modules=TARGETS)
        yield from fit_rows(f"Llama 1B, torch.compile{suffix}: ours", LanguageModel(model), args, lora)
        yield Row(
            f"Llama 1B, torch.compile{suffix}: seconds of the fit with compilation", time.perf_counter() - started
        )
        torch.compiler.reset()


# --- strategies and precisions


class Decoder(LightningModule):
    """Blocks of a decoder that shard themselves where the strategy has a mesh, and keep their losses."""

    def __init__(self, args: argparse.Namespace) -> None:
        super().__init__()
        self.args, self.losses = args, []

    def configure_model(self) -> None:
        if not hasattr(self, "model"):
            self.model = step.decoder(2, self.args.narrow, 2 * self.args.narrow)
        if self.device_mesh is None or isinstance(self.model, FSDPModule):
            return
        attach(self)
        for block in self.model:
            fully_shard(block, mesh=self.device_mesh["data_parallel"])
        fully_shard(self.model, mesh=self.device_mesh["data_parallel"])

    def training_step(self, batch: Tensor) -> Tensor:
        loss = (self.model(batch) - 1).square().mean()
        self.losses.append(float(loss))
        return loss

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=1e-3)


def strategies(args: argparse.Namespace) -> Iterator[Row]:
    """One process: single device, DDP (NCCL), FSDP2, and float16 with a gradient scaler."""
    backend = None if ON_GPU else "gloo"
    sharded = partial(
        ModelParallelStrategy, data_parallel_size=1, tensor_parallel_size=1, process_group_backend=backend
    )
    plans: dict[str, tuple[Callable[[], Any], str]] = {
        "one device": (lambda: "auto", "32-true"),
        "DDP": (lambda: "ddp", "32-true"),
        "FSDP2": (sharded, "32-true"),
        "float16, scaled": (lambda: "auto", "16-mixed"),
    }
    if not ON_GPU:
        plans.pop("float16, scaled")  # Lightning has it for GPUs alone
    expected: list[float] = []
    for name, (strategy, precision) in plans.items():
        clock, module = gpu.Clock(), Decoder(args)
        callbacks = [clock, LoRACallback(**LORA)]
        generator = torch.Generator().manual_seed(0)
        data = torch.randn(4 * args.steps, args.tokens // 16, args.narrow, generator=generator)
        options = {"strategy": strategy(), "precision": precision, "use_distributed_sampler": False, **QUIET}
        trainer = Trainer(accelerator="auto", devices=1, max_epochs=1, callbacks=callbacks, **options)
        trainer.fit(module, DataLoader(data, batch_size=4))
        expected = expected or module.losses
        apart = max(abs(a - b) / abs(b) for a, b in zip(module.losses, expected, strict=True))
        yield Row(f"{name}: largest relative difference of losses from one device", apart, reach=1e-2)
        yield measuring.spread(f"{name}: ms a step", [1e3 * gap for gap in gaps(clock)])
        if precision == "16-mixed":
            yield Row(f"{name}: final scale", float(trainer.precision_plugin.scaler.get_scale()))
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


# --- what the CPU does, sweeps, quantized bases


def profile(args: argparse.Namespace) -> Iterator[Row]:
    """Launches and gaps of a step: few tokens, so that the GPU waits for the CPU."""
    base = step.decoder(args.layers, args.width, args.hidden).to(DEVICE, torch.bfloat16)
    for tokens in (args.tokens // 16, args.tokens):
        x = torch.randn(1, tokens, args.width, device=DEVICE, dtype=torch.bfloat16, requires_grad=True)
        for name, model in step.variants(base, 0.0, has_peft=step.HAS_PEFT).items():
            run = step.composed_step if name == "composed" else step.step
            job = partial(run, model, x, contextlib.nullcontext)
            for _ in range(3):
                job()
            yield from profile_rows(f"{tokens} tokens: {name}", job)


def profile_rows(what: str, job: Callable[[], object]) -> Iterator[Row]:
    from torch.profiler import ProfilerActivity

    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if ON_GPU else [])]
    yield measuring.spread(f"{what}: ms of the CPU to enqueue a step", [1e3 * enqueue_seconds(job) for _ in range(5)])
    with torch.profiler.profile(activities=activities) as found:
        job()
        if ON_GPU:
            torch.cuda.synchronize()
    events = list(found.events())
    yield Row(f"{what}: operations", sum(e.name.startswith("aten::") for e in events))
    yield Row(f"{what}: launches", sum("LaunchKernel" in e.name for e in events))
    on_device = [e.time_range for e in events if e.device_type == torch.autograd.DeviceType.CUDA]
    if on_device:
        busy, span = covered((t.start, t.end) for t in on_device), max(t.end for t in on_device)
        span -= min(t.start for t in on_device)
        yield Row(f"{what}: ms of the GPU, first to last kernel", span / 1e3)
        yield Row(f"{what}: share of that in which it waits", 1 - busy / span)


def enqueue_seconds(job: Callable[[], object]) -> float:
    if ON_GPU:
        torch.cuda.synchronize()
    return measuring.wall_seconds(job)


def covered(spans: Iterable[tuple[float, float]]) -> float:
    """Return the length that intervals cover together."""
    total, until = 0.0, -math.inf
    for start, end in sorted(spans):
        total += max(0.0, end - max(start, until))
        until = max(until, end)
    return total


def sweep(args: argparse.Namespace) -> Iterator[Row]:
    """Adapters of one fit mapped over the step, compared with one after the other and with separate fits."""
    import sweep as benchmark

    case = benchmark.Case("digits" if args.smoke else "sentences", steps=8 if args.smoke else 24, accelerator="auto")
    for count in (2,) if args.smoke else (4, 8):
        jobs: dict[str, Callable[[], object]] = {"alone": case.alone}
        jobs |= {mode: partial(case.sweep, count, mode) for mode in ("vmap", "loop")}
        times = measuring.in_turn(jobs, 1 if args.smoke else 3, warmup=0 if args.smoke else 1, clock=synchronized)
        for mode in ("vmap", "loop"):
            ratios = [each / (count * alone) for each, alone in zip(times[mode], times["alone"], strict=True)]
            yield measuring.spread(f"{case.name}: {count} adapters, {mode} / separate fits", ratios)


def synchronized(job: Callable[[], object]) -> float:
    def whole() -> None:
        job()
        if ON_GPU:
            torch.cuda.synchronize()

    return measuring.wall_seconds(whole)


def quantized(args: argparse.Namespace) -> Iterator[Row]:
    if not find_spec("bitsandbytes"):
        print("bitsandbytes is absent")
        return
    import bitsandbytes

    makers: dict[str, Callable[[int, int], nn.Module]] = {
        "bf16": partial(nn.Linear, bias=False, dtype=torch.bfloat16),
        "4 bits": partial(bitsandbytes.nn.Linear4bit, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4"),
        "8 bits": partial(bitsandbytes.nn.Linear8bitLt, bias=False, has_fp16_weights=False),
    }
    x = torch.randn(args.tokens // 4, args.width, device=DEVICE, dtype=torch.bfloat16, requires_grad=True)
    jobs, before = {}, torch.cuda.memory_allocated() if ON_GPU else 0
    for name, make in makers.items():
        model = nn.Sequential(*(make(args.width, args.width) for _ in range(4))).to(DEVICE)
        attach(model, LoRAConfig(**LORA))
        jobs[name] = partial(step.step, model, x, contextlib.nullcontext)
        jobs[name]()
        now = torch.cuda.memory_allocated() if ON_GPU else math.nan
        yield Row(f"four layers in {name}: MiB held", (now - before) / 2**20)
        yield Row(f"four layers in {name}: peak of a step, MiB", gpu.peak_above(jobs[name]))
        before = now
    times = measuring.in_turn(jobs, args.rounds, clock=gpu.device_seconds)
    for name in makers:
        yield measuring.spread(f"four layers in {name}: ms a step", [1e3 * t for t in times[name]])


def shared(args: argparse.Namespace) -> Iterator[Row]:
    """What q, k and v (gate and up) could gain from one product with all their factors A."""
    size = argparse.Namespace(**vars(args) | {"batch": 4, "length": args.tokens // 4, "device": DEVICE})
    yield from shared_input.rows(size, torch.bfloat16)


PARTS: dict[str, Callable[[argparse.Namespace], Iterator[Row]]] = {
    "environment": environment,
    "kernels": kernels,
    "layers": layers,
    "profile": profile,
    "trainer": trainer,
    "strategies": strategies,
    "sweep": sweep,
    "shared": shared,
    "quantized": quantized,
    "compile": compiled,
}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="run with tiny sizes, only to test the script")
    parser.add_argument("parts", nargs="+", choices=PARTS)
    args = parser.parse_args(argv)
    if not (ON_GPU or args.smoke):
        raise SystemExit("No GPU is here; --smoke tries everything on the CPU.")
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    file = Path(os.environ.get("OUT", "."), "visit.jsonl")
    for part in args.parts:
        for row in PARTS[part](sizes(args.smoke)):
            print(row, flush=True)
            with file.open("a", encoding="utf-8") as rows:
                known = {key: value for key, value in asdict(row).items() if value == value}  # JSON has no nan
                rows.write(json.dumps({"part": part, **known}) + "\n")


if __name__ == "__main__":
    main()
