"""One cast for all layers that read the same tensor."""

from __future__ import annotations

import gc

import torch

from lightning_lora.ops.autocast import shared_cast

LOW = torch.bfloat16


def test_the_same_tensor_is_cast_once():
    x = torch.randn(3, 4, requires_grad=True)
    first = shared_cast(x, LOW)
    assert shared_cast(x, LOW) is first
    assert shared_cast(x, torch.float32) is x
    assert shared_cast(x, torch.float16).dtype == torch.float16
    torch.testing.assert_close(first, x.to(LOW))


def test_gradients_of_all_who_read_it_arrive():
    x = torch.randn(3, 4, requires_grad=True)
    (shared_cast(x, LOW) * 2 + shared_cast(x, LOW)).sum().backward()
    assert torch.equal(x.grad, torch.full((3, 4), 3.0))


def test_another_tensor_another_value_or_another_mode_is_cast_anew():
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


def test_what_only_autograd_still_holds_is_given_again_and_what_nobody_holds_is_forgotten():
    x, factor = torch.randn(3, 4, requires_grad=True), torch.randn(3, 4, dtype=LOW, requires_grad=True)
    product = shared_cast(x, LOW) * factor  # keeps the cast for backward
    gc.collect()
    kept = shared_cast(x, LOW)
    assert kept.data_ptr() == product.grad_fn._saved_self.data_ptr()
    (product + kept).sum().backward()
    torch.testing.assert_close(x.grad, (factor.detach() + 1.0).float())
