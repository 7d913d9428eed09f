"""Cost of live diagnostics: one measurement compared with a training step, on a GPT of 24 layers.

    python benchmarks/diagnostics.py

Prints medians of CPU time of one thread, measured in turn in one process.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

from lightning_lora import LoRAConfig, attach
from lightning_lora.trainer.diagnostics import Diagnostics

LAYERS, WIDTH, TOKENS, RANK, ROUNDS, EVERY = 24, 512, 512, 16, 7, 50


class Block(nn.Module):
    """Attention and an MLP, each with a residual."""

    def __init__(self) -> None:
        super().__init__()
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            setattr(self, name, nn.Linear(WIDTH, WIDTH))
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (layer(x).view(1, TOKENS, 8, -1).transpose(1, 2) for layer in (self.q_proj, self.k_proj, self.v_proj))
        mixed = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.o_proj(mixed.transpose(1, 2).reshape(x.shape))
        return x + self.down(nn.functional.gelu(self.up(nn.functional.layer_norm(x, (WIDTH,)))))


def seconds(job: Callable[[], object]) -> float:
    """Return the CPU time of one run."""
    started = time.process_time()
    job()
    return time.process_time() - started


def main() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = nn.Sequential(*(Block() for _ in range(LAYERS)))
    report = attach(model, LoRAConfig(rank=RANK))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    x = torch.randn(1, TOKENS, WIDTH)

    def step() -> None:
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()

    step()
    start = seconds(lambda: Diagnostics(model))
    diagnostics = Diagnostics(model)

    def measure() -> None:
        diagnostics.note_gradients(optimizer)
        diagnostics.metrics()

    measure()
    steps, measurements = zip(*((seconds(step), seconds(measure)) for _ in range(ROUNDS)), strict=True)
    one_step, one = statistics.median(steps), statistics.median(measurements)
    print(f"{len(report.layers)} adapters of rank {RANK}, width {WIDTH}, {TOKENS} tokens, CPU time")
    print(f"a training step           {one_step * 1e3:8.1f} ms")
    print(f"one measurement           {one * 1e3:8.1f} ms, {one / one_step:.3f} of a step")
    print(f"at N = {EVERY}                 {one / EVERY / one_step:8.3%} of the training time")
    print(f"norms of weights, once    {start * 1e3:8.1f} ms")


if __name__ == "__main__":
    main()
