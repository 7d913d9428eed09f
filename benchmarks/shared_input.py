"""What layers that read the same input could gain from one product with all their factors A.

    python benchmarks/shared_input.py [--rounds 15] [--layers 2] [--device cuda]

Query, key and value read one x, and so do gate and up. Here their ``h = x A^T`` comes from one product with the stacked
factors, whose backward pass makes all gradients of A in one, too. The package does not do this (docs/decisions.md); the
benchmark shows the price: training steps of the same decoder, each in turn in one process.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from functools import partial
from typing import Any

import gpu
import measuring
import step
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_lora import lora_layers


class Stacked(torch.autograd.Function):
    """``h = x A^T`` of several layers in one product, forward and backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, *factors: Tensor) -> tuple[Tensor, ...]:
        A = torch.cat(factors).to(x.dtype)
        ctx.save_for_backward(x, A)
        ctx.ranks, ctx.dtype = [len(factor) for factor in factors], factors[0].dtype
        return (x.flatten(0, -2) @ A.T).split(ctx.ranks, 1)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, ...]:
        x, A = ctx.saved_tensors
        g = torch.cat(gradients, 1)
        dA = (g.T @ x.flatten(0, -2)).to(ctx.dtype)
        return (g @ A).view(x.shape), *dA.split(ctx.ranks)


class Up(torch.autograd.Function):
    """``x W^T + s h B^T``, with the operations of the package's fast path."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, W: Tensor, h: Tensor, B: Tensor, scaling: float) -> Tensor:
        y = F.linear(x, W)
        y.flatten(0, -2).addmm_(h, B.to(x.dtype).T, alpha=scaling)
        ctx.save_for_backward(W, h, B)
        ctx.scaling = scaling
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        W, h, B = ctx.saved_tensors
        rows = dy.flatten(0, -2)
        g, dB = ctx.scaling * (rows @ B.to(rows.dtype)), ctx.scaling * (h.T @ rows).T.to(B.dtype)
        return dy @ W, None, g, dB, None


def together(x: Tensor, *layers: Any) -> list[Tensor]:
    """Return the outputs of adapted linear layers that read x."""
    hidden = Stacked.apply(x, *(layer.lora.A for layer in layers))
    return [
        Up.apply(x, layer.weight, h, layer.lora.B, layer.lora.spec.scaling)
        for layer, h in zip(layers, hidden, strict=True)
    ]


class Sharing(step.Block):
    def forward(self, x: Tensor) -> Tensor:
        parts = together(self.before(x), self.q, self.k, self.v)
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in parts)
        x = x + self.o(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        gate, up = together(self.between(x), self.gate, self.up)
        return x + self.down(F.silu(gate) * up)


def trained(model: nn.Module) -> nn.Module:
    """Return the model with a B that is not zero, so that every gradient counts."""
    for layer in lora_layers(model).values():
        nn.init.normal_(layer.lora.B, std=0.02)
    return model


def sharing(model: nn.Module) -> nn.Module:
    found = copy.deepcopy(model)
    for block in found.children():
        block.__class__ = Sharing
    return found


def largest_difference(model: nn.Module, other: nn.Module) -> float:
    """Return by how much the gradients of two models differ, relative to the first one's norm."""
    return max(
        float((mine.grad - theirs.grad).norm() / mine.grad.norm())
        for mine, theirs in zip(model.parameters(), other.parameters(), strict=True)
        if mine.grad is not None and theirs.grad is not None
    )


def rows(args: Any, dtype: torch.dtype) -> list[measuring.Row]:
    base = step.decoder(args.layers, args.width, args.hidden).to(args.device, dtype)
    x = torch.randn(args.batch, args.length, args.width, device=args.device, dtype=dtype, requires_grad=True)
    separate = trained(step.ours(copy.deepcopy(base), 0.0))
    models = {
        "separate": separate,
        "shared": sharing(separate),
        "frozen": copy.deepcopy(base).requires_grad_(False),
    }
    jobs = {name: partial(step.step, model, x, step.nullcontext) for name, model in models.items()}
    clock = gpu.device_seconds if args.device == "cuda" else measuring.cpu_seconds
    times = measuring.in_turn(jobs, args.rounds, warmup=step.WARMUP, clock=clock)
    what = f"step, {str(dtype).removeprefix('torch.')}"
    return [
        measuring.ratio(times, "shared", "separate", quantity=f"{what}: shared / separate"),
        measuring.ratio(times, "separate", "frozen", quantity=f"{what}: separate / frozen"),
        measuring.ratio(times, "shared", "frozen", quantity=f"{what}: shared / frozen"),
        measuring.Row(
            f"{what}: the gradients differ by",
            largest_difference(separate, models["shared"]),
            reach=1e-4 if dtype == torch.float32 else 3e-2,
        ),
    ]


def main(argv: Sequence[str] | None = None) -> list[measuring.Row]:
    parser = measuring.parser(__doc__, **step.SIZES)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args(argv)
    if args.smoke:
        vars(args).update(rounds=2, layers=1, width=32, hidden=64, batch=2, length=16)
    if args.device == "cpu":
        torch.set_num_threads(1)
    return measuring.report([row for dtype in (torch.float32, torch.bfloat16) for row in rows(args, dtype)], args)


if __name__ == "__main__":
    main()
