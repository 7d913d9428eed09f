"""The probe of attach: adapters that cannot change the output are named, and asking leaves no trace."""

from __future__ import annotations

import copy
import random
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_lora import LoRAConfig, attach, lora_layers
from tests.contract import assert_same_bits, raises_and_changes_nothing, snapshot
from tests.layers.test_embedding import CHOSEN, Tied, Words
from tests.test_compile import SETUPS, Setup

CONFIG = LoRAConfig(rank=2, target_modules=["first", "odd", "last"])
X = torch.randn(5, 8, generator=torch.Generator().manual_seed(3))
pytestmark = pytest.mark.filterwarnings("ignore:These adapters are not smaller.*")


class Model(nn.Module):
    """Three layers; subclasses say what becomes of the one in the middle."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.odd, self.last = (nn.Linear(8, 8) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(self.middle(self.first(x))))

    def middle(self, x: Tensor) -> Tensor:
        return self.odd(x)

    def functional(self, x: Tensor) -> Tensor:
        """Read the weight past the layer, and so past its adapter."""
        odd = self._modules["odd"]  # the source does not show which layer this is
        return F.linear(x, odd.weight, odd.bias)


class EvaluatesWithoutGradients(Model):
    """Needs no caller to switch gradients off."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.set_grad_enabled(self.training):
            return super().forward(x)


class EvaluatesInInferenceMode(Model):
    def forward(self, x: Tensor) -> Tensor:
        with torch.inference_mode(not self.training):
            return super().forward(x)


def kind(middle: Callable[[Any, Tensor], Tensor], base: type[Model] = Model) -> type[Model]:
    return type("Kind", (base,), {"middle": middle})


def past_in_evaluation(self: Any, x: Tensor) -> Tensor:
    return self.odd(x) if self.training else self.functional(x)


NeverCalled = kind(lambda self, x: x)
DEAD: dict[str, type[Model]] = {
    "never called": NeverCalled,
    "called for nothing": kind(lambda self, x: (self.odd(x), x)[1]),
    "multiplied by zero": kind(lambda self, x: x + 0.0 * self.odd(x)),
    "below a threshold": kind(lambda self, x: x + torch.relu(self.odd(x) - 1e6)),
    "weight read past the layer": kind(lambda self, x: self.functional(x)),
    "weight read past the layer in evaluation": kind(past_in_evaluation),
    "weight read past the layer where no gradients are": kind(past_in_evaluation, EvaluatesWithoutGradients),
    "weight read past the layer without gradients": kind(
        lambda self, x: self.odd(x) if torch.is_grad_enabled() else self.functional(x)
    ),
    "skipped in evaluation": kind(lambda self, x: self.odd(x) if self.training else x),
    "skipped in training": kind(lambda self, x: x if self.training else self.odd(x)),
    "skipped without gradients": kind(lambda self, x: self.odd(x) if torch.is_grad_enabled() else x),
    "skipped among noise": kind(lambda self, x: torch.dropout(x + torch.rand_like(x), 0.5, self.training)),
}


@pytest.mark.parametrize("dead", DEAD)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("training", [True, False])
def test_dead_adapter_is_named(dead: str, dtype: torch.dtype, training: bool):
    for seed in range(4):
        torch.manual_seed(seed)
        model = DEAD[dead]().to(dtype).train(training)
        with raises_and_changes_nothing(model, ValueError, r"\bodd\b") as caught:
            attach(model, CONFIG, probe=X.to(dtype))
        assert not re.search(r"\b(first|last)\b", str(caught.value))
        assert not lora_layers(model)


def test_one_error_names_all_dead_adapters():
    model = NeverCalled()
    model.other = nn.Linear(8, 8)
    with raises_and_changes_nothing(model, ValueError, r"(?s)odd.*other"):
        attach(model, LoRAConfig(rank=2), probe=X)


HALF_DEAD: dict[str, type[Model]] = {
    "by its name": kind(lambda self, x: self.odd(x) + x @ dict(self.named_parameters())["odd.weight"].T),
    "from the state": kind(lambda self, x: self.odd(x) + x @ self.state_dict(keep_vars=True)["odd.weight"].T),
    "in evaluation": kind(
        lambda self, x: self.odd(x) + (0 if self.training else x @ self.get_submodule("odd")._parameters["weight"].T)
    ),
}


@pytest.mark.parametrize("half_dead", HALF_DEAD)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_layer_that_is_called_and_whose_weight_is_read_as_well_is_refused(half_dead: str, dtype: torch.dtype):
    for seed in range(4):
        torch.manual_seed(seed)
        model = HALF_DEAD[half_dead]().to(dtype)
        with raises_and_changes_nothing(
            model, ValueError, "computes something else with these adapters than after a merge"
        ):
            attach(model, CONFIG, probe=X.to(dtype))
        assert not lora_layers(model)
        model.train()
        attach(model, LoRAConfig(rank=2, target_modules=["first", "last"]), probe=X.to(dtype))  # as the message says


class Noisy(Model):
    """Draws numbers, and keeps statistics of what it has seen."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.dropout = nn.BatchNorm1d(8), nn.Dropout(0.5)

    def middle(self, x: Tensor) -> Tensor:
        return self.norm(self.dropout(self.odd(x))) + 0.1 * torch.rand_like(x)


class Stuck(Model):
    """Starts where no gradient passes its last layer: all zeros, as many heads do."""

    def __init__(self) -> None:
        super().__init__()
        nn.init.zeros_(self.last.weight)
        nn.init.zeros_(self.last.bias)


Faint = kind(lambda self, x: x + 1e-2 * self.odd(x))


@pytest.mark.parametrize("living", [Model, EvaluatesWithoutGradients, EvaluatesInInferenceMode, Noisy, Faint, Stuck])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("training", [True, False])
def test_living_adapters_pass(living: type[Model], dtype: torch.dtype, training: bool):
    for seed in range(4):
        torch.manual_seed(seed)
        model = living().to(dtype).train(training)
        attach(model, CONFIG, probe=X.to(dtype))
        assert list(lora_layers(model)) == ["first", "odd", "last"]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("grad_mode", [torch.enable_grad, torch.no_grad])
def test_probe_leaves_no_trace(training: bool, grad_mode: Callable[[], Any]):
    asked, plain = Noisy(), Noisy()
    plain.load_state_dict(asked.state_dict())
    for part in (asked, plain):
        part.train(training).dropout.train(not training)
        part.norm.weight.grad = torch.ones(8)  # trains in full, so it could gather the probe's gradient
    config, state, numbers = replace(CONFIG, modules_to_save=["norm"]), torch.get_rng_state(), X.clone()
    with grad_mode():
        attach(asked, config, probe=X)
        assert torch.is_grad_enabled() == (grad_mode is torch.enable_grad)
    attach(plain, config)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(X, numbers)
    assert_same_bits(dict(asked.state_dict()), dict(plain.state_dict()))
    after, before = snapshot(asked), snapshot(plain)
    for what in ("modes", "flags", "switches", "keys"):
        assert after[what] == before[what], what
    gradients = {name: p.grad for name, p in asked.named_parameters() if p.grad is not None}
    assert_same_bits(gradients, {"norm.weight": torch.ones(8)})


@pytest.mark.parametrize(("draw", "seed"), [(random.random, random.seed), (numpy.random.rand, numpy.random.seed)])
def test_probe_restores_other_generators(draw: Callable[[], float], seed: Callable[[int], None]):
    drawn = []
    for probe in (None, X):
        seed(3)
        attach(kind(lambda self, x: self.odd(x) * (1 + draw()))(), CONFIG, probe=probe)
        drawn.append(draw())
    assert drawn[0] == drawn[1]


@pytest.mark.parametrize("takes", ["dict", "entries"])
def test_a_dict_is_given_as_forward_takes_it(takes: str):
    class OfDict(Model):
        def forward(self, batch: dict[str, Tensor]) -> Tensor:
            return super().forward(batch["x"])

    class OfEntries(Model):
        def forward(self, x: Tensor, scale: float = 2.0) -> Tensor:
            return scale * super().forward(x)

    model = OfDict() if takes == "dict" else OfEntries()
    attach(model, CONFIG, probe={"x": X, "labels": torch.zeros(3)})
    assert lora_layers(model)


def test_error_in_forward_is_raised():
    class Fails(Model):
        def middle(self, x: Tensor) -> Tensor:
            raise KeyError("boom")

    model = Fails()
    with raises_and_changes_nothing(model, KeyError, "boom"):
        attach(model, CONFIG, probe=X)


@pytest.mark.parametrize(
    "options",
    [{"bias": "all", "use_dora": True}, {"lora_bias": True, "modules_to_save": ["last"]}, {"untie_weights": True}],
    ids=str,
)
def test_failed_probe_undoes_attach(options: dict[str, Any]):
    model = NeverCalled()
    model.tied = nn.Linear(8, 8)
    if "untie_weights" in options:
        model.first.weight = model.tied.weight
    with raises_and_changes_nothing(model, ValueError, "odd"):
        attach(model, LoRAConfig(rank=2, target_modules=["first", "odd"], **options), probe=X)


def test_dead_slice_is_named():
    class Half(Model):
        def middle(self, x: Tensor) -> Tensor:
            return torch.cat([self.odd(x)[..., :4], x[..., 4:]], -1)

    slices = {"target_modules": [], "target_slices": {"odd": {"q": "0:4", "v": "4:8"}}}
    model = Half()
    with raises_and_changes_nothing(model, ValueError, r"odd\.v") as caught:
        attach(model, LoRAConfig(rank=2, **slices), probe=X)
    assert "odd.q" not in str(caught.value)


def test_tokens_absent_from_batch_are_dead_unless_tied():
    config = LoRAConfig(target_modules=[], trainable_token_indices={"embed": CHOSEN})
    absent = torch.tensor([[0, 2, 5]])
    with raises_and_changes_nothing(model := Words(), ValueError, "embed"):
        attach(model, config, probe=absent)
    attach(Words(), config, probe=torch.tensor([CHOSEN]))
    attach(Tied(), config, probe=absent)


@pytest.mark.parametrize("setup", SETUPS.values(), ids=SETUPS)
@pytest.mark.parametrize("training", [True, False])
def test_every_kind_and_option_passes(setup: Setup, training: bool, rng):
    asked = setup.build().double().train(training)
    plain = copy.deepcopy(asked)
    config = LoRAConfig(**{"rank": 2, "target_modules": ["layer"]} | dict(setup.options))
    attach(asked, config, probe=setup.inputs(rng))
    attach(plain, config)
    assert_same_bits(dict(asked.state_dict()), dict(plain.state_dict()))


class Pair(NamedTuple):
    x: Tensor
    label: int


@dataclass
class Result:
    logits: Tensor
    name: str = "result"


class Takes(Model):
    """Notes which arguments it was given."""

    def note(self, x: Tensor, **others: Any) -> Tensor:
        assert x is X
        self.given = {"x", *(name for name, value in others.items() if value is not None)}
        return super().forward(x)


class One(Takes):
    def forward(self, x: Tensor, y: Any = None, *, scale: Any = None) -> Tensor:
        return self.note(x, y=y, scale=scale)


class Two(Takes):
    def forward(self, x: Tensor, y: Any, mask: Any = None) -> Tensor:
        return self.note(x, y=y, mask=mask)


class Open(Takes):
    def forward(self, x: Tensor, **others: Any) -> Tensor:
        return self.note(x, **others)


@pytest.mark.parametrize(
    ("takes", "batch", "given"),
    [
        (One, X, "x"),
        (One, (X, 1), "x"),
        (One, [X, 1, 2], "x"),
        (One, Pair(X, 1), "x"),
        (Two, (X, 1), "x y"),
        (Two, [X, 1, 2, "label"], "x y"),
        (One, {"x": X, "label": 1}, "x"),
        (One, {"label": 1, "scale": 2, "x": X, "y": 3}, "x y scale"),
        (Two, {"y": 1, "x": X, "mask": 2, "label": 3}, "x y mask"),
        (Open, {"x": X, "label": 1}, "x label"),
    ],
)
def test_forward_gets_what_it_accepts_of_the_batch(takes: type[Takes], batch: Any, given: str):
    model = takes()
    attach(model, CONFIG, probe=batch)
    assert model.given == set(given.split())


@pytest.mark.parametrize(
    "wrap",
    [
        lambda y: {"logits": y, "text": "a", "nothing": None},
        lambda y: (3, [y.sum()]),
        lambda y: Pair(y, 1),
        lambda y: Result(y),
        lambda y: {"deep": [(Result(y), 2)]},
    ],
    ids=["dict", "tuple", "named tuple", "dataclass", "nested"],
)
def test_nested_outputs_are_read(wrap: Callable[[Tensor], Any]):
    class Wraps(Model):
        def forward(self, x: Tensor) -> Any:
            return wrap(super().forward(x))

    class WrapsDead(NeverCalled, Wraps): ...

    attach(Wraps(), CONFIG, probe=X)
    with raises_and_changes_nothing(model := WrapsDead(), ValueError, "odd"):
        attach(model, CONFIG, probe=X)
