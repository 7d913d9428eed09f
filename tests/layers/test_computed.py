"""A weight that carries its update reads like any other, and refuses to be written to."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_lora import LoRAConfig, attach, disabled, lora_layers, merged
from tests.contract import train_all

pytestmark = pytest.mark.filterwarnings("ignore:These adapters are not smaller")


class Prototypes(nn.Module):
    """Computes with the weight of a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(F.normalize(x), F.normalize(self.layer.weight))


MODELS: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "read by its parent": (Prototypes, "layer.weight"),
    "recurrent": (lambda: nn.LSTM(6, 4), "weight_hh_l0"),
    "attention": (lambda: nn.MultiheadAttention(6, 2), "in_proj_weight"),
    "bilinear": (lambda: nn.Bilinear(6, 4, 4), "weight"),
}


def assign_data(weight: Tensor) -> None:
    weight.data = torch.zeros_like(weight)


def set_row(weight: Tensor) -> None:
    weight[0] = 0.0


def multiply(weight: Tensor) -> None:
    weight *= 2.0


WRITES: dict[str, Callable[[Tensor], object]] = {
    "copy_": lambda weight: weight.copy_(torch.zeros_like(weight)),
    "zero_": lambda weight: weight.zero_(),
    "init": lambda weight: nn.init.zeros_(weight),
    "data.copy_": lambda weight: weight.data.copy_(torch.zeros_like(weight)),
    "data.clamp_": lambda weight: weight.data.clamp_(-0.1, 0.1),
    "data of a row": lambda weight: weight.data[0].fill_(0.0),
    "a row": lambda weight: weight[0].zero_(),
    "a chunk": lambda weight: weight.chunk(2)[1].zero_(),
    "rows": lambda weight: [row.zero_() for row in weight],
    "transposed": lambda weight: weight.mT.zero_(),
    "flat": lambda weight: weight.view(-1).clamp_(-0.1, 0.1),
    "part of data": lambda weight: weight.data.narrow(0, 0, 1).zero_(),
    "data =": assign_data,
    "[0] =": set_row,
    "*=": multiply,
}


def adapted(model: str, rng: torch.Generator) -> tuple[nn.Module, Callable[[], Tensor]]:
    build, path = MODELS[model]
    module = build()
    attach(module, LoRAConfig(rank=2, target_modules="all"))
    train_all(module, rng)
    owner, _, name = path.rpartition(".")
    return module, lambda: getattr(module.get_submodule(owner), name)


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("write", WRITES)
def test_a_write_that_would_be_lost_raises_and_changes_nothing(write: str, model: str, rng: torch.Generator) -> None:
    _, weight = adapted(model, rng)
    before = weight().clone()
    with torch.no_grad(), pytest.raises(RuntimeError, match=r"written to.*would be lost.*modules_to_save.*exclude"):
        WRITES[write](weight())
    assert torch.equal(weight(), before)


def clamp_data(weight: Tensor) -> None:
    weight.data = weight.data.clamp(-100.0, 100.0)


def multiply_data_by_one(weight: Tensor) -> None:
    weight.data *= 1.0


def set_row_to_itself(weight: Tensor) -> None:
    weight[0] = weight[0].clone()


IDLE: dict[str, Callable[[Tensor], object]] = {
    "clamp_": lambda weight: weight.clamp_(-100.0, 100.0),
    "data.clamp_": lambda weight: weight.data.clamp_(-100.0, 100.0),
    "div_ by one": lambda weight: weight.div_(1),
    "a row": lambda weight: weight[0].mul_(1.0),
    "data =": clamp_data,
    "data *=": multiply_data_by_one,
    "[0] =": set_row_to_itself,
}


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("write", IDLE)
def test_a_write_that_changes_no_value_is_accepted(write: str, model: str, rng: torch.Generator) -> None:
    """As of a clamp in every step to bounds that no weight reaches (Gemma 3n's coefficients of AltUp)."""
    _, weight = adapted(model, rng)
    before = weight().clone()
    with torch.no_grad():
        IDLE[write](weight())
    assert torch.equal(weight(), before)
    assert weight().requires_grad


def test_a_write_in_place_returns_the_weight_and_keeps_its_gradients(rng: torch.Generator) -> None:
    module, weight = adapted("read by its parent", rng)
    found = weight()
    with torch.no_grad():
        assert found.clamp_(-100.0, 100.0) is found
    found.sum().backward()
    assert all(factor.grad is not None for name, factor in module.named_parameters() if "lora" in name)


def test_a_write_with_a_gradient_of_its_own_raises_even_where_no_value_changes(rng: torch.Generator) -> None:
    _, weight = adapted("read by its parent", rng)
    with pytest.raises(RuntimeError, match="written to"):
        weight().mul_(torch.ones(1, requires_grad=True))


def test_a_tensor_of_another_shape_is_another_value(rng: torch.Generator) -> None:
    module, weight = adapted("read by its parent", rng)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.fill_(1.0)
        value = weight()[:1].clone()
        assert (weight() == value).all()
        with pytest.raises(RuntimeError, match="written to"):
            weight().data = value


def test_on_the_meta_device_no_write_changes_anything() -> None:
    with torch.device("meta"):
        module = Prototypes()
    attach(module, LoRAConfig(rank=2, target_modules="all"))
    with torch.no_grad():
        assert nn.init.zeros_(module.layer.weight).is_meta


def test_nan_that_is_written_over_nan_changes_nothing(rng: torch.Generator) -> None:
    module, weight = adapted("read by its parent", rng)
    with torch.no_grad():
        next(p for name, p in module.named_parameters() if name.endswith("lora.B")).fill_(float("nan"))
        weight().mul_(1.0)


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("mode", [disabled, merged])
def test_where_the_weight_is_the_bases_own_it_may_be_written_to(mode: Any, model: str, rng: torch.Generator) -> None:
    module, weight = adapted(model, rng)
    with mode(module), torch.no_grad():
        weight().zero_()
        assert not weight().any()


@pytest.mark.parametrize("model", MODELS)
def test_whatever_is_computed_from_it_is_an_ordinary_tensor(model: str, rng: torch.Generator) -> None:
    _, weight = adapted(model, rng)
    for result in (weight() + 1, weight().clone(), weight().detach(), weight()[[0]], weight().double()):
        assert type(result) is Tensor
    changed = weight().clone()
    changed.mul_(2.0)
    torch.testing.assert_close(changed, 2.0 * weight())


def test_it_can_be_saved_and_copied_and_comes_back_as_an_ordinary_tensor(rng: torch.Generator) -> None:
    _, weight = adapted("read by its parent", rng)
    torch.save({"weight": weight().data}, file := io.BytesIO())
    file.seek(0)
    read = torch.load(file, weights_only=True)["weight"]
    assert type(read) is Tensor
    assert torch.equal(read, weight())
    assert torch.equal(copy.deepcopy(weight().data), weight())


@pytest.mark.parametrize("model", ["read by its parent", "recurrent", "bilinear"])
def test_the_base_begins_with_new_values_as_after_the_meta_device(model: str, rng: torch.Generator) -> None:
    module, _ = adapted(model, rng)
    [layer] = lora_layers(module).values()
    own = [parameter for parameter in layer._parameters.values() if parameter is not None]
    with torch.no_grad():
        for parameter in own:
            parameter.fill_(99.0)
    layer.reset_parameters()
    assert all(parameter.abs().max() < 9 for parameter in own)
    assert layer.lora_mode == "active"


def test_a_layer_that_cannot_begin_anew_says_so(rng: torch.Generator) -> None:
    module, _ = adapted("attention", rng)
    assert not hasattr(module, "reset_parameters")


def test_gradients_are_those_of_the_sum(rng: torch.Generator) -> None:
    module, _ = adapted("read by its parent", rng)
    [layer] = lora_layers(module).values()
    x = torch.randn(3, 6, generator=rng)
    module(x).square().sum().backward()
    factors = [layer.lora.A.detach().clone().requires_grad_(), layer.lora.B.detach().clone().requires_grad_()]
    base = dict(layer.named_parameters())["weight"].detach()
    total = F.normalize(base + layer.scaling * factors[1] @ factors[0])
    F.linear(F.normalize(x), total).square().sum().backward()
    torch.testing.assert_close(layer.lora.A.grad, factors[0].grad)
    torch.testing.assert_close(layer.lora.B.grad, factors[1].grad)
