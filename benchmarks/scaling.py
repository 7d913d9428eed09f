"""Cost of the adapters as the model grows: by layers, width, rank, sequence length and processes.

    python benchmarks/scaling.py [--only width,rank]

CPU time of a training step in fp32, relative to the frozen model and to PEFT; one size changes at a time. For
processes, the step time of DDP relative to full fine-tuning with as many; only the adapters' gradients are sent.
"""

from __future__ import annotations

import argparse
import copy
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from unittest import mock

import measuring
import step
import torch
from torch import distributed, multiprocessing, nn
from torch.nn.parallel import DistributedDataParallel

SWEEPS = {
    "layers": (1, 2, 4, 8),
    "width": (128, 256, 512, 1024),
    "rank": (4, 16, 64, 128),
    "length": (32, 128, 512),
}
BASE = {"rounds": 5, "layers": 2, "width": 256, "hidden": 704, "batch": 4, "length": 128}


def swept(what: str, sizes: Sequence[int], args: argparse.Namespace) -> Iterator[measuring.Row]:
    for size in sizes:
        now = argparse.Namespace(**(vars(args) | {what: size}))
        if what == "width":
            now.hidden = size * 11 // 4
        with mock.patch.object(step, "RANK", size if what == "rank" else step.RANK):
            times = step.measure("fp32", 0.0, now)
        for other in ("frozen", "PEFT"):
            if other in times:
                yield measuring.ratio(times, "ours", other, None, f"{what} {size}: ours / {other}")


def _worker(rank: int, world: int, place: str, args: argparse.Namespace, results: list[float]) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{place}", rank=rank, world_size=world)
    base, x, context = step.setting("fp32", args)
    models: dict[str, nn.Module] = {"ours": step.ours(copy.deepcopy(base), 0.0), "full": base}
    wrapped = {name: DistributedDataParallel(model) for name, model in models.items()}
    jobs = {name: (lambda model=model: step.step(model, x, context)) for name, model in wrapped.items()}
    times = measuring.in_turn(jobs, args.rounds, clock=measuring.wall_seconds)
    if rank == 0:
        results.extend([a / b for a, b in zip(times["ours"], times["full"], strict=True)])
    distributed.destroy_process_group()


def by_processes(worlds: Sequence[int], args: argparse.Namespace) -> Iterator[measuring.Row]:
    for world in worlds:
        with tempfile.TemporaryDirectory() as folder, multiprocessing.Manager() as manager:
            found = manager.list()
            multiprocessing.spawn(_worker, (world, str(Path(folder) / "meet"), args, found), nprocs=world)
            yield measuring.spread(f"processes {world}: ours / full fine-tuning, wall time", list(found))


def gradient_bytes(args: argparse.Namespace) -> measuring.Row:
    """Return the bytes of gradients to send, relative to full fine-tuning."""
    base = step.decoder(args.layers, args.width, args.hidden)
    full = sum(p.numel() for p in base.parameters())
    ours = sum(p.numel() for p in step.ours(base, 0.0).parameters() if p.requires_grad)
    return measuring.Row("gradients to send: ours / full fine-tuning", ours / full)


def main(argv: Sequence[str] | None = None) -> list[measuring.Row]:
    parser = measuring.parser(__doc__, **BASE)
    parser.add_argument("--only", default=",".join([*SWEEPS, "processes"]))
    args = parser.parse_args(argv)
    sweeps, worlds = dict(SWEEPS), (1, 2)
    if args.smoke:
        vars(args).update(rounds=2, layers=1, width=32, hidden=64, batch=1, length=8)
        sweeps, worlds = {"layers": (1,), "rank": (2,)}, ()
    torch.set_num_threads(1)
    chosen = args.only.split(",")
    rows = [row for what, sizes in sweeps.items() if what in chosen for row in swept(what, sizes, args)]
    rows.append(gradient_bytes(args))
    if "processes" in chosen:
        rows += by_processes(worlds, args)
    return measuring.report(rows, args)


if __name__ == "__main__":
    main()
