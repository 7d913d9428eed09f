"""Small models around every kind of layer that PEFT has."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.contract import CountingLinear
from tests.peft_format.models import QUIET

WARNED = [
    *QUIET,
    pytest.mark.filterwarnings("ignore:PEFT up to.*"),
    pytest.mark.filterwarnings("ignore:In eval mode.*"),
]


class Holder(nn.Module):
    """One layer in a model that calls it, beside a linear layer."""

    def __init__(self, layer: nn.Module, call: Callable[[nn.Module, Tensor], Tensor] | None = None) -> None:
        super().__init__()
        self.layer, self.call = layer, call
        self.side = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) if self.call is None else self.call(self.layer, x)


class Experts(nn.Module):
    """Stacked experts that each see everything, with one plain matrix among them."""

    def __init__(self, transposed: bool = False, experts: int = 3) -> None:
        super().__init__()
        self.is_transposed = transposed
        self.up = nn.Parameter(0.3 * torch.randn((experts, 8, 12) if transposed else (experts, 12, 8)))
        self.mix = nn.Parameter(0.3 * torch.randn(12, 12))
        self.down = nn.Parameter(0.3 * torch.randn((experts, 12, 8) if transposed else (experts, 8, 12)))

    def forward(self, x: Tensor) -> Tensor:
        up, down = (w.transpose(1, 2) if self.is_transposed else w for w in (self.up, self.down))
        hidden = torch.tanh(torch.einsum("bi,eoi->beo", x, up)) @ self.mix.T
        return torch.einsum("bei,eoi->bo", hidden, down)


class Router(nn.Module):
    """A layer of no known kind, with a weight and a bias."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(0.3 * torch.randn(12, 8)), nn.Parameter(torch.randn(12))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight.T + self.bias


def attend(layer: nn.Module, x: Tensor) -> Tensor:
    return layer(x, x, x, need_weights=False)[0]


def vectors() -> Tensor:
    return torch.randn(4, 8)


def sequences() -> Tensor:
    return torch.randn(3, 5, 8)


def tokens() -> Tensor:
    return torch.randint(20, (3, 5))


KINDS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor], dict[str, Any]]] = {
    "linear": (lambda: Holder(nn.Linear(8, 12)), vectors, {}),
    "linear with its own forward": (lambda: Holder(CountingLinear(8, 12)), vectors, {}),
    "embedding": (lambda: Holder(nn.Embedding(20, 8)), tokens, {}),
    "padded embedding": (lambda: Holder(nn.Embedding(20, 8, padding_idx=3)), tokens, {}),
    "conv1d": (lambda: Holder(nn.Conv1d(8, 12, 3, stride=2, padding=1)), lambda: torch.randn(2, 8, 9), {}),
    "conv2d": (lambda: Holder(nn.Conv2d(3, 8, (3, 5), padding="same")), lambda: torch.randn(2, 3, 7, 6), {}),
    "conv3d": (lambda: Holder(nn.Conv3d(3, 8, 2, stride=(1, 2, 1))), lambda: torch.randn(2, 3, 4, 5, 4), {}),
    "conv2d with DoRA": (lambda: Holder(nn.Conv2d(3, 8, 3)), lambda: torch.randn(2, 3, 7, 6), {"use_dora": True}),
    "conv2d with a bias of B": (
        lambda: Holder(nn.Conv2d(3, 8, 3)),
        lambda: torch.randn(2, 3, 7, 6),
        {"lora_bias": True},
    ),
    "embedding with DoRA": (lambda: Holder(nn.Embedding(20, 8)), tokens, {"use_dora": True}),
    "attention": (lambda: Holder(nn.MultiheadAttention(8, 2, batch_first=True), attend), sequences, {}),
    "attention, its inputs alone": (
        lambda: Holder(nn.MultiheadAttention(8, 2, batch_first=True), attend),
        sequences,
        {"exclude_modules": ["out_proj"]},
    ),
    "attention, its output alone": (
        lambda: Holder(nn.MultiheadAttention(8, 2, batch_first=True), attend),
        sequences,
        {"target_modules": ["layer.out_proj"]},
    ),
    "attention, of two ranks and scalings": (
        lambda: Holder(nn.MultiheadAttention(8, 2, batch_first=True), attend),
        sequences,
        {"rank_pattern": {"out_proj": 3}, "alpha_pattern": {"in_proj_weight": 7}, "bias": "all"},
    ),
    "attention, slices of its inputs": (
        lambda: Holder(nn.MultiheadAttention(8, 2, batch_first=True), attend),
        sequences,
        {"target_modules": [], "target_slices": {"layer": {"q": "0:8", "v": "16:24"}}},
    ),
    "attention, slices of its inputs, with their bias": (
        lambda: Holder(nn.MultiheadAttention(8, 2, batch_first=True), attend),
        sequences,
        {"target_modules": [], "target_slices": {"layer": {"q": "0:8"}}, "bias": "lora_only"},
    ),
    "experts": (lambda: Holder(Experts()), vectors, {"target_modules": [], "target_parameters": ["up", "down"]}),
    "transposed experts": (
        lambda: Holder(Experts(True)),
        vectors,
        {"target_modules": [], "target_parameters": ["up", "mix", "down"], "rank_pattern": {"mix": 3}},
    ),
    "one expert": (lambda: Holder(Experts(experts=1)), vectors, {"target_modules": [], "target_parameters": ["up"]}),
    "a parameter of a layer": (
        lambda: Holder(Router()),
        vectors,
        {"target_modules": [], "target_parameters": ["layer.weight"], "bias": "lora_only"},
    ),
}


def seeded(build: Callable[[], nn.Module]) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return build().eval()


@torch.no_grad()
def output(model: nn.Module, inputs: Callable[[], Tensor]) -> Tensor:
    torch.manual_seed(4)
    return model(inputs())
