"""Tensors that nobody else holds may be changed in place, and layers that read the same tensor share one cast."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import vmap
from torch.utils.checkpoint import checkpoint

from lightning_lora import LoRAConfig, attach
from lightning_lora.ops import eager
from lightning_lora.ops.eager import add, is_unheld, shared_cast

held: list[Any] = []


def new(x: Tensor) -> Tensor:
    return F.linear(x, torch.ones(3, 3))


def kept_by_python(x: Tensor) -> Tensor:
    held.append(new(x))
    return held[-1]


def detached_and_kept(x: Tensor) -> Tensor:
    y = new(x)
    held.append(y.detach())
    return y


def needed_as_an_input(x: Tensor) -> Tensor:
    y = new(x)
    held.append(y.square())
    return y


class KeepsOutput(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        y = x.exp()
        ctx.save_for_backward(y)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Tensor:
        return dy * ctx.saved_tensors[0]


HELD: dict[str, Callable[[Tensor], Tensor]] = {
    "the input": lambda x: x,
    "by python": kept_by_python,
    "a detached one": detached_and_kept,
    "a view": lambda x: new(x)[:1],
    "an output needed for backward": lambda x: new(x).tanh(),
    "an input needed for backward": needed_as_an_input,
    "by a function of one's own": lambda x: KeepsOutput.apply(x),
    "a parameter": lambda x: torch.nn.Parameter(x),
}


@pytest.mark.parametrize("shape", [(2, 3), (2, 4, 3)], ids=str)
@pytest.mark.parametrize("needs", [True, False])
def test_new_tensor_is_unheld(shape, needs):
    output = new(torch.randn(shape, requires_grad=needs))
    assert is_unheld(output)
    with torch.no_grad():
        output = new(torch.randn(shape))
        assert is_unheld(output)


@pytest.mark.parametrize("make", HELD.values(), ids=HELD)
def test_held_tensor_is_known(make):
    held.clear()
    x = torch.randn(2, 3, requires_grad=True)
    output = make(x)
    assert not is_unheld(output)


def test_non_tensor_is_not_unheld():
    assert not is_unheld((torch.ones(1),))


def test_nothing_is_unheld_under_transforms():
    def seen(x: Tensor) -> Tensor:
        output = new(x)
        assert not is_unheld(output)
        return output

    vmap(seen)(torch.randn(2, 3))


@pytest.mark.parametrize("is_ours", [True, False])
def test_add_works_in_place_only_if_ours(is_ours):
    y, update = torch.ones(2, 3, dtype=torch.bfloat16), torch.ones(2, 3)
    found = add(y, update, is_ours)
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, torch.full((2, 3), 2.0, dtype=torch.bfloat16))
    assert (found is y) is is_ours


# --- autocast

LOW = torch.bfloat16


def test_same_tensor_is_cast_once():
    x = torch.randn(3, 4, requires_grad=True)
    first = shared_cast(x, LOW)
    assert shared_cast(x, LOW) is first
    assert shared_cast(x, torch.float32) is x
    assert shared_cast(x, torch.float16).dtype == torch.float16
    torch.testing.assert_close(first, x.to(LOW))


def test_shared_cast_sums_gradients():
    x = torch.randn(3, 4, requires_grad=True)
    (shared_cast(x, LOW) * 2 + shared_cast(x, LOW)).sum().backward()
    assert torch.equal(x.grad, torch.full((3, 4), 3.0))


def test_changed_tensor_or_mode_is_cast_anew():
    x = torch.randn(3, 4)
    first = shared_cast(x, LOW)
    other = shared_cast(x.clone(), LOW)
    assert other is not first
    again = shared_cast(x, LOW)
    x.add_(1.0)
    assert torch.equal(shared_cast(x, LOW), x.to(LOW))
    assert not torch.equal(again, x.to(LOW))
    x.requires_grad_()
    assert shared_cast(x, LOW).requires_grad
    with torch.no_grad():
        assert not shared_cast(x, LOW).requires_grad
    with torch.inference_mode():
        assert shared_cast(torch.randn(2), LOW).dtype == LOW
    assert shared_cast(x, LOW).requires_grad


def test_cast_lives_as_long_as_autograd_holds_it():
    x, factor = torch.randn(3, 4, requires_grad=True), torch.randn(3, 4, dtype=LOW, requires_grad=True)
    product = shared_cast(x, LOW) * factor  # keeps the cast for backward
    gc.collect()
    kept = shared_cast(x, LOW)
    assert kept.data_ptr() == product.grad_fn._saved_self.data_ptr()
    (product + kept).sum().backward()
    torch.testing.assert_close(x.grad, (factor.detach() + 1.0).float())


def test_the_first_forward_pass_of_a_process_may_lie_inside_activation_checkpointing():
    layers = nn.ModuleList([nn.Conv2d(2, 8, 3)])
    attach(layers, LoRAConfig(rank=2, target_modules=["0"]))
    eager._references_of_new.cache_clear()  # as in a new process
    checkpoint(layers[0], torch.randn(1, 2, 8, 8), use_reentrant=False).sum().backward()
    assert layers[0].lora.B.grad is not None
