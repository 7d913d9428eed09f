"""Nested tensors: samples of several lengths in one tensor, in both of torch's layouts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_lora import LoRAConfig, attach, parameter_groups

pytestmark = [
    pytest.mark.filterwarnings("ignore:These adapters are not smaller.*"),
    pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype"),
]

WIDTH, TOKENS = 6, 9


class Doubling(nn.Linear):
    """A linear layer with a forward of its own."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(2.0 * x)


LINEAR: dict[str, tuple[Callable[[], nn.Module], dict[str, Any]]] = {
    "plain": (lambda: nn.Linear(WIDTH, 7), {}),
    "without bias": (lambda: nn.Linear(WIDTH, 7, bias=False), {"use_rslora": True}),
    "own forward": (lambda: Doubling(WIDTH, 7), {}),
    "DoRA": (lambda: nn.Linear(WIDTH, 7), {"use_dora": True}),
    "bias of B": (lambda: nn.Linear(WIDTH, 7), {"lora_bias": True}),
}
EMBEDDING: dict[str, tuple[Callable[[], nn.Module], dict[str, Any]]] = {
    "embedding": (lambda: nn.Embedding(TOKENS, WIDTH), {}),
    "embedding, DoRA": (lambda: nn.Embedding(TOKENS, WIDTH), {"use_dora": True}),
}
ONLY_STRIDED: dict[str, tuple[Callable[[], nn.Module], dict[str, Any]]] = {
    "slices": (lambda: nn.Linear(WIDTH, 7), {"target_modules": [], "target_slices": {"0": {"q": "0:3", "v": "5:7"}}}),
    "tokens": (lambda: nn.Embedding(TOKENS, WIDTH), {"target_modules": [], "trainable_token_indices": [1, 4]}),
}
CASES = [
    *((layout, name) for layout in (torch.jagged, torch.strided) for name in LINEAR),
    *((torch.strided, name) for name in (EMBEDDING | ONLY_STRIDED)),
]


def adapted(name: str) -> nn.Module:
    """Return an adapted layer that has learned."""
    build, options = (LINEAR | EMBEDDING | ONLY_STRIDED)[name]
    torch.manual_seed(0)
    net = nn.Sequential(build()).double()
    attach(net, LoRAConfig(**({"rank": 2, "alpha": 6.0, "target_modules": ["0"]} | options)))
    with torch.no_grad():
        for parameter in parameter_groups(net, 1.0)[0]["params"]:
            parameter.add_(torch.randn_like(parameter))
    return net


def pieces_for(net: nn.Module, lengths: tuple[int, ...]) -> list[Tensor]:
    if isinstance(net[0], nn.Embedding):
        return [torch.randint(TOKENS, (length,)) for length in lengths]
    return [torch.randn(length, WIDTH).double() for length in lengths]


@pytest.mark.parametrize("lengths", [(3, 7, 1), (3000, 5, 700)], ids=["small", "large"])
@pytest.mark.parametrize(("layout", "name"), CASES, ids=[f"{name}, {layout}" for layout, name in CASES])
def test_a_nested_tensor_gives_what_its_pieces_give(layout: torch.layout, name: str, lengths: tuple[int, ...]):
    net = adapted(name)
    pieces, trained = pieces_for(net, lengths), parameter_groups(net, 1.0)[0]["params"]
    together = net(torch.nested.nested_tensor(pieces, layout=layout)).unbind()
    apart = [net(piece) for piece in pieces]
    torch.testing.assert_close(together, apart)
    gradients = [torch.autograd.grad(sum(y.square().sum() for y in found), trained) for found in (together, apart)]
    torch.testing.assert_close(*gradients)
    with torch.no_grad():
        torch.testing.assert_close(net(torch.nested.nested_tensor(pieces, layout=layout)).unbind(), together)


@pytest.mark.parametrize("layout", [torch.jagged, torch.strided])
def test_dropout_takes_nested_tensors(layout: torch.layout):
    net = nn.Sequential(nn.Linear(WIDTH, 7))
    attach(net, LoRAConfig(rank=2, dropout=0.5))
    with torch.no_grad():
        net[0].lora.B.fill_(1.0)
    pieces = [torch.randn(length, WIDTH) for length in (3, 7)]
    found = [torch.cat(net(torch.nested.nested_tensor(pieces, layout=layout)).unbind()) for _ in range(2)]
    assert found[0].shape == (10, 7)
    assert not torch.equal(*found)
