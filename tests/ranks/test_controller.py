"""The engine of a rank schedule in a plain training loop."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from lightning_lora import LoRAConfig, attach
from lightning_lora.layers import LowRankAdapter
from lightning_lora.ranks.controller import RankController, cost_of, scheduled
from lightning_lora.ranks.schedule import Plan, RankSchedule
from lightning_lora.ranks.scores import AdaLoRAScores

Make = Callable[[list[nn.Parameter]], torch.optim.Optimizer]
WIDTH, RANKS = 24, (6, 0, 2, 0)

OPTIMIZERS: dict[str, Make] = {
    "AdamW with decay": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1),
    "fused AdamW": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1, fused=True),
    "Adam with L2": lambda p: torch.optim.Adam(p, lr=0.01, weight_decay=0.1, amsgrad=True),
    "SGD with momentum": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, nesterov=True, weight_decay=0.01),
    "Adafactor": lambda p: torch.optim.Adafactor(p, lr=0.05, weight_decay=0.1),
    "RMSprop": lambda p: torch.optim.RMSprop(p, lr=0.01, momentum=0.9),
}


class Parallel(nn.Module):
    """Linear layers side by side, which should become those of ``targets``: each differs by its own rank."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.layers = nn.ModuleList([nn.Linear(WIDTH, WIDTH, bias=False) for _ in RANKS])
        self.targets = []
        for layer, rank in zip(self.layers, RANKS, strict=True):
            change = torch.randn(WIDTH, rank) @ torch.randn(rank, WIDTH) / WIDTH**0.5
            self.targets.append(layer.weight.detach() + change)

    def loss(self) -> Tensor:
        x = torch.randn(64, WIDTH)
        pairs = zip(self.layers, self.targets, strict=True)
        return 10 * torch.stack([(layer(x) - x @ target.T).square().mean() for layer, target in pairs]).mean()


def controlled(module: nn.Module, steps: int, rank: int = 2, **options: Any) -> RankController:
    schedule = RankSchedule(**{"max_rank": 8, **options})
    config = LoRAConfig(rank=rank, alpha=2.0 * rank, target_modules="all")
    attach(module, schedule.widened(config))
    costs = [cost_of(adapter) for adapter in scheduled(module)[0].values()]
    controller = RankController(
        module,
        schedule,
        Plan.of(schedule, steps, full=schedule.start_rank(config) * sum(costs), budget=rank * sum(costs)),
    )
    controller.begin()
    return controller


def optimizer_of(module: nn.Module, make: Make = OPTIMIZERS["SGD with momentum"]) -> torch.optim.Optimizer:
    return make([parameter for parameter in module.parameters() if parameter.requires_grad])


def train(
    module: Parallel, controller: RankController, optimizer: torch.optim.Optimizer, steps: Iterable[int]
) -> Iterable[bool]:
    """Yield after each step whether the ranks were decided; the data of a step follow from its number."""
    for step in steps:
        torch.manual_seed(1000 + step)
        optimizer.zero_grad()
        module.loss().backward()  # type: ignore[no-untyped-call]
        controller.before_step(optimizer)
        optimizer.step()
        controller.after_step(optimizer)
        yield controller.end_step([optimizer])


@pytest.mark.parametrize(("score", "seed"), [("gate", 0), ("gate", 1), ("adalora", 0), ("energy", 0), ("energy", 1)])
def test_planted_ranks_are_found(score: str, seed: int) -> None:
    module = Parallel(seed)
    controller = controlled(module, 400, score=score)
    # AdaLoRA's own scores depend on the basis, which Adam spreads over all components: not every time with it.
    kind = torch.optim.SGD if score == "adalora" else torch.optim.AdamW
    options = {"lr": 0.1, "momentum": 0.9} if score == "adalora" else {"lr": 0.01}
    optimizer = optimizer_of(module, lambda p: kind(p, **options))  # type: ignore[arg-type]
    for is_event in train(module, controller, optimizer, range(400)):
        if is_event:
            assert controller.parameters() <= controller.plan.budget_at(controller.steps)
            if score == "gate":  # the components are others now
                assert not any(any(values) for values in controller._scores.values().values())
    assert tuple(controller.ranks().values()) == RANKS
    assert float(module.loss().detach()) < 1e-3


@pytest.mark.parametrize("regrow", [False, True])
@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_what_is_out_of_use_stays_zero_after_every_step(make: Make, regrow: bool) -> None:
    module = Parallel()
    controller = controlled(module, 40, regrow=regrow)
    optimizer, masked = optimizer_of(module, make), 0
    for _ in train(module, controller, optimizer, range(40)):
        for adapter in controller.adapters.values():
            out = ~adapter.in_use
            masked += int(out.sum())
            assert not adapter.B[:, out].any()
            for state in optimizer.state[adapter.B].values():
                if torch.is_tensor(state) and state.ndim == 2 and state.shape[1] == adapter.B.shape[1]:
                    assert not state[:, out].any()
            assert (adapter.A[out] != 0).any(1).all()  # it could come back
    assert masked > 100


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_a_decision_moves_what_stays_to_the_front_with_all_that_is_known_of_it(make: Make) -> None:
    module, moved = Parallel(), 0
    controller = controlled(module, 40, score="adalora")
    optimizer, scores = optimizer_of(module, make), cast(AdaLoRAScores, controller._scores)

    def known(name: str) -> list[Tensor]:
        """Return all that has the components of an adapter, with these as the first dimension."""
        adapter = controller.adapters[name]
        mine = scores.averages[name]
        found = [(t, 0) for t in (adapter.A, mine[0].mean, mine[0].uncertainty)]
        found += [(t, 1) for t in (adapter.B, mine[1].mean, mine[1].uncertainty)]
        for factor, dimension in ((adapter.A, 0), (adapter.B, 1)):
            states = [t for t in optimizer.state[factor].values() if torch.is_tensor(t) and t.ndim == 2]
            found += [(t, dimension) for t in states if t.shape[dimension] == factor.shape[dimension]]
        return [tensor.detach().movedim(dimension, 0).clone() for tensor, dimension in found]

    decide = controller._decide

    def decide_and_compare(optimizers: Any) -> None:
        nonlocal moved
        before = {name: (known(name), adapter.rank) for name, adapter in controller.adapters.items()}
        values = scores.values()
        decide(optimizers)
        for name, adapter in controller.adapters.items():
            was, rank = before[name]
            best = sorted(range(rank), key=lambda n, own=values[name]: (-own[n], n))[: adapter.rank]  # type: ignore[misc]
            moved += sorted(best) != list(range(adapter.rank))
            for old, new in zip(was, known(name), strict=True):
                assert torch.equal(new[: adapter.rank], old[sorted(best)])
                assert sorted(new.tolist()) == sorted(old.tolist())  # nothing is lost

    controller._decide = decide_and_compare  # type: ignore[method-assign]
    assert sum(train(module, controller, optimizer, range(40))) > 5
    assert moved > 2


class Noisy(torch.optim.SGD):
    """Moves every parameter, whatever its gradient is, as Langevin dynamics do."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        for parameter in self.param_groups[0]["params"]:
            parameter.add_(0.01 * torch.randn_like(parameter))
        return super().step(closure)


def test_an_optimizer_that_moves_everything_brings_nothing_back() -> None:
    module = Parallel()
    controller, masked = controlled(module, 40), 0
    for _ in train(module, controller, optimizer_of(module, lambda p: Noisy(p, lr=0.05)), range(40)):
        for adapter in controller.adapters.values():
            masked += int((~adapter.in_use).sum())
            assert not adapter.B[:, ~adapter.in_use].any()
    assert masked > 100


def test_a_step_that_is_skipped_does_not_count() -> None:
    module = Parallel()
    controller, optimizer = controlled(module, 40), optimizer_of(module)
    module.loss().backward()  # type: ignore[no-untyped-call]
    optimizer.step()
    for adapter in controller.adapters.values():
        adapter.B.grad = torch.full_like(adapter.B, torch.inf)  # overflow, so that a scaler leaves the step out
    controller.before_step(optimizer)
    assert not controller.end_step([optimizer])
    assert controller.steps == 0
    assert not any(any(values) for values in controller._scores.values().values())
    optimizer.zero_grad()
    module.loss().backward()  # type: ignore[no-untyped-call]
    controller.before_step(optimizer)
    controller.after_step(optimizer)
    controller.end_step([optimizer])
    assert controller.steps == 1
    assert all(value > 0 for value in controller._scores.values()["layers.0"])


@pytest.mark.parametrize("regrow", [False, True])
def test_of_embeddings_the_rows_of_a_stay_zero_with_their_states(regrow: bool) -> None:
    module = nn.Embedding(30, 20)
    controller = controlled(module, 60, regrow=regrow)
    [adapter] = controller.adapters.values()
    optimizer, target, masked = optimizer_of(module, OPTIMIZERS["AdamW with decay"]), torch.randn(30, 20), 0
    for step in range(60):
        torch.manual_seed(step)
        tokens = torch.randint(30, (64,))
        optimizer.zero_grad()
        (module(tokens) - target[tokens]).square().mean().backward()
        controller.before_step(optimizer)
        optimizer.step()
        controller.after_step(optimizer)
        controller.end_step([optimizer])
        out = ~adapter.in_use
        masked += int(out.sum())
        for tensor in (adapter.A, optimizer.state[adapter.A]["exp_avg"], optimizer.state[adapter.A]["exp_avg_sq"]):
            assert not tensor[out].any()
    assert masked > 100
    assert adapter.rank == 2


def test_components_out_of_use_cost_no_multiplications() -> None:
    module = nn.Linear(32, 32)
    attach(module, LoRAConfig(rank=8))
    adapter = scheduled(module)[0][""]

    def flops() -> int:
        with FlopCounterMode(display=False) as counter:
            module(torch.randn(16, 32)).sum().backward()
        return counter.get_total_flops()

    full = flops()
    adapter.keep(2)
    assert full - flops() == (8 - 2) * (full - flops_of_base(module, flops)) // 8


def flops_of_base(module: nn.Module, flops: Callable[[], int]) -> int:
    """Return the operations with no component at all."""
    adapter, kept = scheduled(module)[0][""], scheduled(module)[0][""].rank
    adapter.keep(0)
    found = flops()
    adapter.keep(kept)
    return found


each_kind = pytest.mark.parametrize(
    ("module", "inputs"),
    [
        (nn.Linear(16, 15), torch.randn(3, 16)),
        (nn.Conv2d(3, 6, 3), torch.randn(2, 3, 5, 5)),
        (nn.Conv1d(8, 12, 3, groups=2, padding=1, padding_mode="reflect"), torch.randn(2, 8, 5)),
        (nn.Embedding(9, 6), torch.arange(9)),
        (nn.LSTM(16, 16), torch.randn(4, 2, 16)),
        (nn.MultiheadAttention(16, 2), torch.randn(4, 2, 16)),
        (nn.ConvTranspose1d(4, 6, 3), torch.randn(2, 4, 5)),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)


def output_of(module: nn.Module, inputs: Tensor) -> Tensor:
    found = module(*(inputs,) * (3 if isinstance(module, nn.MultiheadAttention) else 1))
    return found[0] if isinstance(found, tuple) else found


@each_kind
def test_every_kind_of_layer_computes_what_is_in_use(module: nn.Module, inputs: Tensor) -> None:
    module = copy.deepcopy(module).eval()
    attach(module, LoRAConfig(rank=3, target_modules="all"))
    adapters, _ = scheduled(module)
    for adapter in adapters.values():
        nn.init.normal_(adapter.A)
        nn.init.normal_(adapter.B)
        adapter.keep(2)
        zero_component(adapter, 2)
    masked = output_of(module, inputs)
    for adapter in adapters.values():
        adapter.forget_mask()
    assert torch.allclose(masked, output_of(module, inputs), atol=1e-5)


@each_kind
@pytest.mark.parametrize("is_mixed", [False, True], ids=["float32", "mixed"])
def test_every_kind_of_layer_may_have_no_component_in_use_and_trains_on(
    module: nn.Module, inputs: Tensor, is_mixed: bool
) -> None:
    module = copy.deepcopy(module)
    with torch.autocast("cpu", torch.bfloat16, enabled=is_mixed):
        base = output_of(module, inputs).detach()
    attach(module, LoRAConfig(rank=3, target_modules="all"))
    adapters, _ = scheduled(module)
    for adapter in adapters.values():
        nn.init.normal_(adapter.A)
        nn.init.normal_(adapter.B)
        adapter.keep(0)
    with torch.autocast("cpu", torch.bfloat16, enabled=is_mixed):
        output = output_of(module, inputs)
    assert output.dtype == base.dtype
    assert torch.allclose(output, base)
    output.sum().backward()
    for adapter in adapters.values():  # zero, and not missing: every process of DDP waits for them
        assert adapter.A.grad.eq(0).all()
        assert adapter.B.grad.eq(0).all()


@torch.no_grad()
def zero_component(adapter: LowRankAdapter, number: int) -> None:
    adapter.zero_factor().select(-2 if adapter.zero_factor() is adapter.A else -1, number).zero_()


def test_a_training_that_is_cut_in_two_goes_on_bit_for_bit() -> None:
    whole, steps = Parallel(), range(60)
    controller, optimizer = controlled(whole, 60, score="adalora"), optimizer_of(whole, OPTIMIZERS["AdamW with decay"])
    saved: tuple[Any, ...] = ()
    for step, _ in enumerate(train(whole, controller, optimizer, steps)):
        if step == 20:  # two steps after an event, and one before the next
            saved = copied((whole.state_dict(), optimizer.state_dict(), controller.state(), controller.scores()))
    again = Parallel()
    second, other = controlled(again, 60, score="adalora"), optimizer_of(again, OPTIMIZERS["AdamW with decay"])
    again.load_state_dict(saved[0])
    other.load_state_dict(saved[1])
    second.load(*saved[2:])
    second.begin()
    assert sum(train(again, second, other, steps[21:])) > 5
    assert second.history == controller.history
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name]), name


def copied(value: Any) -> Any:
    return copy.deepcopy(value)


class Waits(TorchDispatchMode):
    """Counts operations whose result Python waits for, which stop the queue of an accelerator."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func._overloadpacket.__name__ in ("nonzero", "_local_scalar_dense", "is_nonzero", "equal", "_to_copy"):
            self.found.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("options", [{}, {"score": "adalora"}, {"score": "energy"}, {"regrow": True}], ids=str)
def test_outside_of_events_nothing_is_asked_of_the_device(options: dict[str, Any]) -> None:
    module, steps = Parallel(), 400
    controller = controlled(module, steps, **options)
    optimizer, masked = optimizer_of(module), 0
    for step in range(steps):
        module.loss().backward()  # type: ignore[no-untyped-call]
        event = controller.plan.next_event(step)
        with Waits() as waits:
            controller.before_step(optimizer)
            controller.after_step(optimizer)
            is_event = controller.end_step([optimizer])
        is_turned = is_event or controller.steps == controller.plan.first
        assert is_turned or not waits.found, (step, event)
        masked += not is_event and bool(controller._dropped)
    assert masked > steps / 2


@pytest.mark.parametrize("score", ["gate", "adalora"])
def test_no_score_is_taken_once_the_ranks_are_final(score: str) -> None:
    module = Parallel()
    controller = controlled(module, 40, score=score)
    at_last: Any = None
    for _ in train(module, controller, optimizer_of(module), range(40)):
        if controller.steps == controller.plan.last:
            at_last = copy.deepcopy(controller.scores())
    assert controller.steps > controller.plan.last
    for one, other in zip(tree_leaves(at_last), tree_leaves(controller.scores()), strict=True):
        assert torch.equal(one, other)


def test_equal_scores_are_decided_by_name_and_number() -> None:
    module = Parallel()
    controller = controlled(module, 10)
    optimizer = optimizer_of(module)
    for parameter in optimizer.param_groups[0]["params"]:
        parameter.grad = torch.zeros_like(parameter)
    while not controller.is_done:
        controller.before_step(optimizer)
        controller.after_step(optimizer)
        controller.end_step([optimizer])
    assert list(controller.ranks().values()) == [8, 0, 0, 0]
    assert controller.adapters["layers.0"].in_use.all()


def test_lowest_ranks_are_kept() -> None:
    module = Parallel()
    controller = controlled(module, 100, min_rank=1)
    optimizer = optimizer_of(module, lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9))
    assert sum(train(module, controller, optimizer, range(100))) > 5
    assert min(controller.ranks().values()) == 1
    assert sum(controller.ranks().values()) == 8


def test_what_would_be_lost_with_the_last_component_keeps_one() -> None:
    module = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16))
    attach(module, LoRAConfig(rank=4, use_dora=True))
    schedule = RankSchedule(max_rank=4)
    plan = Plan.of(schedule, 10, full=256, budget=96)
    assert set(RankController(module, schedule, plan).floors.values()) == {1}


@pytest.mark.parametrize(
    ("budget", "message"),
    [(10**6, "leaves nothing to decide, since all components together have"), (3, "is too small: the lowest ranks")],
)
def test_a_budget_that_decides_nothing_is_refused(budget: int, message: str) -> None:
    module = Parallel()
    schedule = RankSchedule(max_rank=4)
    attach(module, schedule.widened(LoRAConfig(rank=2)))
    with pytest.raises(ValueError, match=message):
        RankController(module, schedule, Plan.of(schedule, 10, full=768, budget=budget))


def test_steps_without_scores_are_refused_at_the_first_decision() -> None:
    controller = controlled(Parallel(), 10)
    controller.after_step(torch.optim.SGD([nn.Parameter(torch.ones(1))]))
    assert not controller.end_step([])
    controller.after_step(torch.optim.SGD([nn.Parameter(torch.ones(1))]))
    with pytest.raises(RuntimeError, match=r"optimizers were stepped past Lightning.*self.optimizers\(\)"):
        controller.end_step([])
