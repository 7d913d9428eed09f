"""Threads: what changes a model's adapters for a while is done by one thread after another."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lightning_lora import (
    LoRAConfig,
    active_adapter,
    adapter_names,
    adapter_state_dict,
    add_adapter,
    attach,
    combine,
    detach,
    disabled,
    load_adapter,
    load_adapter_state_dict,
    merge,
    merged,
    remove_adapter,
    routed,
    save_adapter,
    scaled,
    set_adapter,
    using,
)
from lightning_lora.attachment import keeping_starts, keeps_starts
from lightning_lora.layers.starts import seeded
from lightning_lora.loading import _load
from lightning_lora.several.combination import attach_sum
from tests.contract import train_all

CONFIG = LoRAConfig(rank=2, target_modules=["0", "2"])
INPUT = torch.linspace(-1, 1, 4 * 8).view(4, 8)
PATIENCE = 60.0  # seconds until a thread that never comes makes a test fail


@pytest.fixture
def model(rng: torch.Generator) -> nn.Module:
    """Return a model with the trained adapters "a", which is active, "b" and "spare"."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8))
    for name in ("a", "b", "spare"):
        add_adapter(model, name, CONFIG)
        with using(model, name):
            train_all(model, rng)
    return model


class Elsewhere:
    """Something that another thread does, and what became of it."""

    def __init__(self, do: Callable[[], Any]) -> None:
        self.result: Any = None
        self.thread = threading.Thread(target=self._run, args=(do,), daemon=True)
        self.thread.start()

    def _run(self, do: Callable[[], Any]) -> None:
        try:
            self.result = do()
        except BaseException as error:
            self.result = error

    def is_waiting(self) -> bool:
        self.thread.join(0.1)
        return self.thread.is_alive()

    def done(self) -> Any:
        self.thread.join(PATIENCE)
        assert not self.thread.is_alive(), "the other thread waits forever"
        if isinstance(self.result, BaseException):
            raise self.result
        return self.result


BLOCKS: dict[str, Callable[[nn.Module], AbstractContextManager[None]]] = {
    "using": lambda model: using(model, "b"),
    "using the base": lambda model: using(model, None),
    "routed": lambda model: routed(model, ["a", "b", None, "b"]),
    "disabled": disabled,
    "scaled": lambda model: scaled(model, 0.5),
    "merged": merged,
}
CALLS: dict[str, Callable[[nn.Module, Path], Any]] = {
    "set_adapter": lambda model, path: set_adapter(model, "b"),
    "add_adapter": lambda model, path: add_adapter(model, "new", CONFIG),
    "remove_adapter": lambda model, path: remove_adapter(model, "spare"),
    "combine": lambda model, path: combine(model, {"a": 0.5, "b": 0.5}, name="sum"),
    "adapter_state_dict": lambda model, path: adapter_state_dict(model),
    "load_adapter_state_dict": lambda model, path: load_adapter_state_dict(model, torch.load(path / "state.pt")),
    "save_adapter": lambda model, path: save_adapter(model, path / "new"),
    "load_adapter": lambda model, path: load_adapter(model, path / "a"),
    "load_adapter, as another": lambda model, path: load_adapter(model, path / "a", name="again"),
    "merge": lambda model, path: merge(model, "a"),
    "detach": lambda model, path: detach(model),
}


@pytest.mark.parametrize("second", BLOCKS)
@pytest.mark.parametrize("first", BLOCKS)
def test_blocks_of_two_threads_take_turns(first: str, second: str, model: nn.Module) -> None:
    def compute() -> Tensor:
        with BLOCKS[second](model):
            return model(INPUT)

    expected = compute()
    with BLOCKS[first](model):
        mine = model(INPUT)
        other = Elsewhere(compute)
        assert other.is_waiting()
        assert torch.equal(model(INPUT), mine)
    assert torch.equal(other.done(), expected)
    assert active_adapter(model) == "a"


class Whole(nn.Module):
    """A model in which a directory's adapter belongs to a part."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.part, self.head = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8)), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.part(x))


@pytest.fixture
def whole(rng: torch.Generator, tmp_path: Path) -> Whole:
    """Return a model with the adapter "a" in its part, from a directory that is left there."""
    module = Whole()
    add_adapter(module.part, "a", CONFIG)
    train_all(module.part, rng)
    save_adapter(module.part, tmp_path / "part")
    module = Whole()
    add_adapter(module, "a", tmp_path / "part")
    return module


def assert_waits(model: nn.Module, function: Callable[..., Any], change: Callable[[], Any], patch: Any) -> None:
    """Check that a block of another thread waits where a function has just given the model another adapter alone."""

    def compute() -> Tensor:
        with using(model, "a"):
            return model(INPUT)

    def interrupted(*args: Any, **options: Any) -> Any:
        found = function(*args, **options)
        others.append(Elsewhere(compute))
        assert others[0].is_waiting()
        return found

    expected, others = compute(), list[Elsewhere]()
    caller = "several.combination" if function is attach_sum else "loading"
    patch.setattr(f"lightning_lora.{caller}.{function.__name__}", interrupted)
    change()
    assert torch.equal(others[0].done(), expected)


def test_a_block_waits_while_an_adapter_is_added_to_a_part(
    whole: Whole, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert_waits(whole, _load, lambda: add_adapter(whole, "b", tmp_path / "part"), monkeypatch)
    assert adapter_names(whole) == ["a", "b"]


def test_a_block_waits_while_a_sum_is_made(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    assert_waits(model, attach_sum, lambda: combine(model, {"a": 0.5, "b": 0.5}, name="sum"), monkeypatch)


def test_blocks_of_a_model_and_of_its_part_take_turns(whole: Whole) -> None:
    def of_part() -> Tensor:
        with using(whole.part, None):
            return whole.part(INPUT)

    def of_whole() -> Tensor:
        with using(whole, "a"):
            return whole(INPUT)

    for here, there, outer in ((whole, of_part, "a"), (whole.part, of_whole, None)):
        expected = there()
        with using(here, outer):
            other = Elsewhere(there)
            assert other.is_waiting()
        assert torch.equal(other.done(), expected)


@pytest.mark.parametrize("number", [0, 1])
def test_a_block_of_a_model_takes_the_turns_of_all_parts_that_had_blocks_before(number: int) -> None:
    module = nn.Sequential(nn.Sequential(nn.Linear(8, 8)), nn.Sequential(nn.Linear(8, 8)))
    for part in module:
        attach(part, LoRAConfig(rank=2))
        with disabled(part):
            pass

    def of_part() -> Tensor:
        with disabled(module[number]):
            return module[number](INPUT)

    with disabled(module):
        other = Elsewhere(of_part)
        assert other.is_waiting()
    other.done()


@pytest.mark.parametrize("call", CALLS)
def test_changes_and_copies_wait_for_the_blocks_of_other_threads(call: str, model: nn.Module, tmp_path: Path) -> None:
    save_adapter(model, tmp_path / "a")
    torch.save(adapter_state_dict(model), tmp_path / "state.pt")
    with using(model, "b"):
        mine, factors = model(INPUT), adapter_state_dict(model)
        other = Elsewhere(lambda: CALLS[call](model, tmp_path))
        assert other.is_waiting()
        assert torch.equal(model(INPUT), mine)
        assert all(torch.equal(value, factors[name]) for name, value in adapter_state_dict(model).items())
    other.done()


def test_what_is_saved_meanwhile_is_the_active_adapter(model: nn.Module) -> None:
    expected = adapter_state_dict(model)
    with using(model, "b"):
        other = Elsewhere(lambda: adapter_state_dict(model))
        assert other.is_waiting()
    found = other.done()
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_adapters_come_and_go_while_others_serve(model: nn.Module) -> None:
    with using(model, "b"):
        expected = model(INPUT)
    answers: list[bool] = []
    rounds = 20

    def serve() -> None:
        for _ in range(rounds):
            with using(model, "b"):
                answers.append(torch.equal(model(INPUT), expected))

    def change() -> None:
        for number in range(rounds):
            add_adapter(model, f"new{number}", CONFIG)
            remove_adapter(model, f"new{number}")

    for other in [Elsewhere(serve), Elsewhere(serve), Elsewhere(change)]:
        other.done()
    assert answers == [True] * (2 * rounds)
    assert adapter_names(model) == ["a", "b", "spare"]


def test_blocks_nest_in_one_thread(model: nn.Module) -> None:
    with using(model, "b"), using(model, "a"), disabled(model):
        inside = Elsewhere(lambda: set_adapter(model, "b"))
        assert inside.is_waiting()
    inside.done()
    assert active_adapter(model) == "b"


def test_other_models_do_not_wait(model: nn.Module) -> None:
    twin = copy.deepcopy(model)
    with using(model, "b"):
        Elsewhere(lambda: set_adapter(twin, "b")).done()
    assert (active_adapter(model), active_adapter(twin)) == ("a", "b")


def test_a_block_may_end_in_another_thread_than_it_began(model: nn.Module) -> None:
    """As services do with what is set up for a request."""
    block = using(model, "b")
    Elsewhere(block.__enter__).done()
    assert active_adapter(model) == "b"
    Elsewhere(lambda: block.__exit__(None, None, None)).done()
    assert active_adapter(model) == "a"
    Elsewhere(lambda: set_adapter(model, "b")).done()


def test_the_next_thread_has_its_turn_after_an_error(model: nn.Module) -> None:
    with pytest.raises(ZeroDivisionError), using(model, "b"):
        raise ZeroDivisionError
    with pytest.raises(ValueError, match="there is no adapter 'c'"):
        set_adapter(model, "c")
    Elsewhere(lambda: set_adapter(model, "b")).done()


def test_a_backward_pass_in_another_thread_computes_blocks_again_without_waiting(model: nn.Module) -> None:
    """As autograd does for a GPU, while the thread with the turn waits for it."""

    def with_b(x: Tensor) -> Tensor:
        with using(model, "b"):
            return model(x)

    inputs = INPUT.clone().requires_grad_()
    with_b(inputs).sum().backward()
    expected, inputs.grad = inputs.grad, None
    with using(model, "a"):
        loss = checkpoint(with_b, inputs, use_reentrant=False).sum()
        Elsewhere(loss.backward).done()
    assert torch.equal(inputs.grad, expected)


def test_backward_passes_in_another_thread_have_the_adapter_of_their_forward_pass_each_time(model: nn.Module) -> None:
    inputs = INPUT.clone().requires_grad_()
    set_adapter(model, "b")
    losses = [checkpoint(model, inputs, use_reentrant=False).sum() for _ in range(2)]
    (expected,) = torch.autograd.grad(model(inputs).sum(), inputs)
    set_adapter(model, "a")
    for loss in losses:
        inputs.grad = None
        Elsewhere(loss.backward).done()
        assert torch.equal(inputs.grad, expected)


@pytest.mark.parametrize("elsewhere", [True, False])
def test_a_block_that_is_computed_again_leaves_a_model_alone_that_another_thread_has_switched(
    model: nn.Module, elsewhere: bool
) -> None:
    """Each thread may train a model of its own; what this one has switched itself is put back for a while."""
    other, seen = copy.deepcopy(model), []

    def looking(x: Tensor) -> Tensor:
        seen.append(active_adapter(other))
        return model(x)

    set_adapter(other, "a")
    loss = checkpoint(looking, INPUT.clone().requires_grad_(), use_reentrant=False).sum()
    switch = partial(set_adapter, other, "b")
    Elsewhere(switch).done() if elsewhere else switch()
    loss.backward()
    assert seen == ["a", "b" if elsewhere else "a"]
    assert active_adapter(other) == "b"


def test_threads_draw_random_starts_of_their_own() -> None:
    def draw(seed: int) -> Tensor:
        return torch.rand(4, generator=seeded(seed))

    expected, generator = draw(1), seeded(1)
    Elsewhere(lambda: draw(2)).done()
    assert torch.equal(torch.rand(4, generator=generator), expected)


def test_first_values_are_kept_for_the_thread_that_has_asked() -> None:
    with keeping_starts():
        assert keeps_starts()
        assert not Elsewhere(keeps_starts).done()


def test_a_part_and_the_whole_take_turns(model: nn.Module) -> None:
    @contextmanager
    def held(module: nn.Module) -> Iterator[Elsewhere]:
        with using(module, "b"):
            yield Elsewhere(lambda: disabled(whole).__enter__())

    whole = nn.ModuleDict({"net": model})
    with held(model) as other:
        assert other.is_waiting()
    other.done()
