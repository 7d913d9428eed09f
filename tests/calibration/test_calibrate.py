"""Starts computed from batches: what layers see decides the factors, and nothing else of the module changes."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lightning_lora as ll
from lightning_lora.calibration import calibrate as calibration
from lightning_lora.calibration import statistics
from lightning_lora.calibration.collector import Collector
from lightning_lora.calibration.statistics import Moments
from lightning_lora.layers import LowRankAdapter
from tests.files import write_checkpoint
from tests.test_quantized import EightBit
from tests.toys import SelfAttention

STARTS = ("pissa", "olora", "eva", "corda", "lora_ga", "covariance")


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.LSTM(10, 9, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)[0]


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 10, 12))

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("bti,eoi->bto", x, self.weight)


KINDS: dict[str, tuple[Any, tuple[int, ...], dict[str, Any]]] = {
    "linear": (lambda: nn.Linear(12, 10), (4, 6, 12), {}),
    "slices": (
        lambda: nn.Linear(12, 20),
        (4, 6, 12),
        {"target_modules": [], "target_slices": {"0": {"q": "0:9", "v": "10:20"}}},
    ),
    "conv": (lambda: nn.Conv2d(4, 10, 3, padding=1), (4, 4, 8, 8), {}),
    "grouped conv": (lambda: nn.Conv2d(8, 16, 3, groups=2, dilation=2), (4, 8, 9, 9), {}),
    "transposed conv": (lambda: nn.ConvTranspose1d(12, 10, 3), (4, 12, 8), {}),
    "attention": (SelfAttention, (4, 6, 12), {}),
    "lstm": (Recurrent, (4, 6, 10), {}),
    "experts": (Experts, (4, 6, 12), {"target_modules": [], "target_parameters": ["0.weight"]}),
    "embedding": (lambda: nn.Sequential(nn.Embedding(30, 12), nn.Linear(12, 10)), (4, 6), {}),
}


def model_and_batches(kind: str, start: Any, **options: Any) -> tuple[nn.Module, list[Tensor]]:
    torch.manual_seed(0)
    make, shape, targets = KINDS[kind]
    model = nn.Sequential(make())
    generator = torch.Generator().manual_seed(1)
    batches = [
        torch.randint(30, shape, generator=generator)
        if kind == "embedding"
        else torch.randn(shape, generator=generator)
        for _ in range(5)
    ]
    ll.attach(model, ll.LoRAConfig(**({"rank": 2, "init": start, "target_modules": "all"} | targets | options)))
    return model, batches


def loss_of(model: nn.Module) -> Any:
    return lambda batch: model(batch).square().sum()


def adapters_of(model: nn.Module) -> list[LowRankAdapter]:
    return [each for each in model.modules() if isinstance(each, LowRankAdapter)]


UNSEEN = {(kind, start) for kind in ("transposed conv", "experts") for start in ("eva", "corda", "covariance")}


@pytest.mark.parametrize(("kind", "start"), [(k, s) for k in KINDS for s in STARTS if (k, s) not in UNSEEN])
def test_every_kind_of_layer_gets_the_start_or_says_why_not_and_computes_the_same(kind: str, start: str):
    model, batches = model_and_batches(kind, start)
    base = copy.deepcopy(model)
    ll.detach(base)
    random = {name: tensor.clone() for name, tensor in model.state_dict().items() if name.endswith(".A")}
    report = ll.calibrate(model, batches, loss_of(model))
    assert torch.equal(model(batches[0]), base(batches[0]))
    assert any(not torch.equal(model.state_dict()[name], A) for name, A in random.items())
    assert {each.label for each in report.layers if each.note} == {e.label for e in report.layers if e.start != start}
    assert len(report.layers) == sum(adapter.takes_starts for adapter in adapters_of(model))


@pytest.mark.parametrize(("kind", "start"), sorted(UNSEEN))
def test_a_start_that_no_layer_can_have_is_refused(kind: str, start: str):
    model, batches = model_and_batches(kind, start)
    with pytest.raises(ValueError, match=f"no adapter got its start, init='{start}': its inputs cannot be seen"):
        ll.calibrate(model, batches, loss_of(model))
    assert all(adapter.is_waiting for adapter in adapters_of(model))


@pytest.mark.parametrize("start", ["eva", "corda", "covariance"])
@pytest.mark.parametrize("is_whole", [True, False], ids=["all", "a part"])
def test_what_runs_inside_a_transform_of_torch_func_gets_no_start_of_half_of_the_loss(start: str, is_whole: bool):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 6))
    ll.attach(model, ll.LoRAConfig(rank=2, init=start))

    def loss(x: Tensor) -> Tensor:
        found = torch.func.vmap(model)(x).square().mean()
        return found if is_whole else found + model(x).square().mean()

    with pytest.raises(
        ValueError, match=f"no adapter got its start, init='{start}': it runs inside a transform of torch.f"
    ):
        ll.calibrate(model, [torch.randn(16, 3)], step=loss)
    assert all(adapter.is_waiting for adapter in adapters_of(model))


@pytest.mark.parametrize("kind", ["linear", "conv", "grouped conv", "attention", "lstm"])
def test_eva_finds_the_principal_directions_of_what_the_layer_multiplies(kind: str):
    model, batches = model_and_batches(kind, "eva")
    ll.calibrate(model, batches)
    rows = rows_seen(kind, batches).double()
    centred = rows - rows.mean(0)
    expected = torch.linalg.svd(centred, full_matrices=False)[2][:2]
    name = {"attention": "in_proj_weight", "lstm": "weight_ih_l0"}.get(kind, "weight")
    [adapter] = [each for each in adapters_of(model) if each.parameter == name]
    found = torch.linalg.qr(adapter.A.detach().double().T)[0]
    angles = torch.linalg.svdvals(expected @ found)
    assert (1 - angles).abs().max() < 1e-6
    assert not adapter.B.any()


def rows_seen(kind: str, batches: list[Tensor]) -> Tensor:
    x = torch.cat(batches)
    if kind == "conv":
        return nn.functional.unfold(x, 3, padding=1).transpose(1, 2).flatten(0, 1)
    if kind == "grouped conv":
        parts = [nn.functional.unfold(part, 3, dilation=2).transpose(1, 2).flatten(0, 1) for part in x.chunk(2, 1)]
        return torch.cat(parts)
    return x.flatten(0, 1)


@pytest.mark.parametrize(
    "kind", ["linear", "slices", "conv", "grouped conv", "transposed conv", "attention", "experts"]
)
def test_lora_ga_follows_the_gradient_of_the_whole_weight(kind: str):
    model, batches = model_and_batches(kind, "lora_ga")
    base = copy.deepcopy(model)
    ll.detach(base)
    for parameter in base.parameters():
        parameter.requires_grad_(True)
    sum(base(batch).square().sum() for batch in batches).backward()  # type: ignore[union-attr]
    ll.calibrate(model, batches, loss_of(model))
    for name, layer in ll.lora_layers(model).items():
        for adapter in layer.adapters().values():
            assert isinstance(adapter, LowRankAdapter)
            gradient = base.get_submodule(name).get_parameter(adapter.parameter).grad
            assert gradient is not None
            matrix = adapter.as_matrix(gradient)
            matrix = matrix[adapter.index] if adapter.spec.rows else matrix
            stack = matrix if matrix.ndim == 3 else matrix.unsqueeze(0)
            for G, A in zip(
                stack.double(), adapter.A.detach().double().reshape(-1, *adapter.A.shape[-2:]), strict=True
            ):
                directions = torch.linalg.svd(G)[2][:2]
                found = torch.linalg.qr(A.T)[0]
                assert (1 - torch.linalg.svdvals(directions @ found)).abs().max() < 1e-5


def test_pissa_makes_the_update_the_best_approximation_of_the_weight():
    model, _ = model_and_batches("linear", "pissa")
    ll.calibrate(model)
    [adapter] = adapters_of(model)
    weight = model[0].weight.detach()  # type: ignore[union-attr]
    U, values, V = torch.linalg.svd(weight)
    expected = U[:, :2] @ values[:2].diag() @ V[:2]
    torch.testing.assert_close(adapter.spec.scaling * adapter.B @ adapter.A, expected)


def test_a_weight_of_too_low_a_rank_keeps_the_random_start():
    model = nn.Sequential(nn.Linear(12, 10), nn.Linear(10, 12))
    nn.init.zeros_(model[1].weight)
    ll.attach(model, ll.LoRAConfig(rank=2, init="pissa"))
    report = ll.calibrate(model)
    assert [(each.start, bool(each.note)) for each in report.layers] == [("pissa", False), ("kaiming", True)]
    assert "random start: 1 (rank=2 is above the rank of the weight, 0)" in str(report)


# --- what stays as it was


class Noisy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.drop, self.last = (
            nn.Linear(8, 8),
            nn.BatchNorm1d(8),
            nn.Dropout(0.5),
            nn.Linear(8, 8),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.drop(self.norm(self.first(x))))


@pytest.mark.parametrize("start", ["eva", "lora_ga", "covariance"])
def test_modes_buffers_gradients_flags_and_random_numbers_stay(start: str):
    torch.manual_seed(0)
    model = Noisy()
    ll.attach(model, ll.LoRAConfig(rank=2, init=start, modules_to_save=["norm"], frozen_norm="track"))
    model.train()
    model.drop.eval()
    model.norm.weight.grad = torch.ones(8)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items() if ".lora." not in name}
    modes = {name: part.training for name, part in model.named_modules()}
    flags = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    state = torch.get_rng_state()
    ll.calibrate(model, [torch.randn(6, 8) for _ in range(4)], loss_of(model))
    # The batches above were drawn before: the calibration itself draws nothing that stays.
    expected = torch.Generator().set_state(state)
    for _ in range(4):
        torch.randn(6, 8, generator=expected)
    assert torch.equal(torch.get_rng_state(), expected.get_state())
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in before.items())
    assert {name: part.training for name, part in model.named_modules()} == modes
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == flags
    gradients = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert gradients.keys() == {"norm.weight"}
    assert torch.equal(gradients["norm.weight"], torch.ones(8))
    assert not any(part._forward_hooks for part in model.modules())


def test_only_as_many_batches_as_asked_for_are_read():
    model, batches = model_and_batches("linear", {"name": "eva", "batches": 3})
    stream = iter(batches)
    report = ll.calibrate(model, stream)
    assert report.batches == 3
    assert torch.equal(next(stream), batches[3])


# --- padding


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.head = nn.Linear(12, 12), nn.Linear(12, 3)

    def forward(self, x: Tensor, attention_mask: Tensor) -> Tensor:
        hidden = self.layer(x) * attention_mask.unsqueeze(-1)
        return self.head(hidden.sum(1)).square().sum()


@pytest.mark.parametrize("start", ["eva", "corda", "covariance"])
def test_padded_tokens_change_nothing(start: str):
    def started(padding: float) -> tuple[Tensor, float]:
        torch.manual_seed(0)
        model = Encoder()
        ll.attach(model, ll.LoRAConfig(rank=2, init=start, target_modules=["layer"]))
        generator, batches = torch.Generator().manual_seed(1), []
        for _ in range(4):
            mask = torch.arange(6) < torch.tensor([[6], [3], [4], [5]])
            x = torch.randn(4, 6, 12, generator=generator).masked_fill(~mask.unsqueeze(-1), padding)
            batches.append({"x": x, "attention_mask": mask.long()})
        report = ll.calibrate(model, batches)
        return adapters_of(model)[0].A.detach(), report.tokens

    (one, share), (other, _) = started(0.0), started(100.0)
    assert torch.equal(one, other)
    assert share == 18 / 24


# --- layers with the same input


class Projections(nn.Module):
    """Three layers that read the same tensor, or copies of it, and one that reads something else."""

    WIDTH, NAMES = 24, ("q", "k", "v")

    def __init__(self, *, shared: Callable[[int], bool] = lambda call: True) -> None:
        super().__init__()
        self.shared, self.calls = shared, 0
        self.q, self.k, self.v, self.o = (nn.Linear(self.WIDTH, self.WIDTH) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        is_shared, self.calls = self.shared(self.calls), self.calls + 1
        q, k, v = (layer(x if is_shared else x.clone()) for layer in (self.q, self.k, self.v))
        return self.o(torch.softmax(q @ k.mT, -1) @ v)


def projections(start: str, **options: Any) -> tuple[Projections, list[Tensor]]:
    torch.manual_seed(0)
    model = Projections(**options)
    ll.attach(model, ll.LoRAConfig(rank=2, init=start))
    return model, [torch.randn(4, 6, Projections.WIDTH) for _ in range(5)]


@pytest.mark.parametrize("start", ["eva", "corda", "covariance"])
def test_layers_that_read_the_same_tensor_start_as_if_each_were_looked_at_alone(start: str):
    alone, batches = projections(start, shared=lambda call: False)
    together, _ = projections(start)
    for model in (alone, together):
        ll.calibrate(model, batches, loss_of(model))
    for one, other in zip(adapters_of(alone), adapters_of(together), strict=True):
        assert torch.equal(one.A, other.A)
        assert torch.equal(one.B, other.B)


def test_layers_that_do_not_always_read_the_same_tensor_get_what_each_has_seen():
    alone, batches = projections("eva", shared=lambda call: False)
    mixed, _ = projections("eva", shared=lambda call: call % 2 == 0)
    for model in (alone, mixed):
        ll.calibrate(model, batches)
    for one, other in zip(adapters_of(alone), adapters_of(mixed), strict=True):
        torch.testing.assert_close(one.A, other.A)


def test_a_tensor_that_was_changed_in_place_is_another_one():
    class Changing(nn.Module):
        def __init__(self, *, in_place: bool) -> None:
            super().__init__()
            self.in_place, self.q, self.k = in_place, nn.Linear(12, 12), nn.Linear(12, 12)

        def forward(self, x: Tensor) -> Tensor:
            x = x.clone()
            q, gains = self.q(x), torch.arange(12.0)
            return q + self.k(x.mul_(gains) if self.in_place else x * gains)

    found = []
    for in_place in (False, True):
        torch.manual_seed(0)
        model = Changing(in_place=in_place)
        ll.attach(model, ll.LoRAConfig(rank=2, init="eva"))
        ll.calibrate(model, [torch.randn(8, 12) for _ in range(3)])
        found.append([adapter.A.detach() for adapter in adapters_of(model)])
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))
    assert not torch.allclose(*found[0])


def test_a_tensor_counts_as_often_as_a_layer_reads_it():
    class Twice(nn.Module):
        def __init__(self, *, copied: bool) -> None:
            super().__init__()
            self.copied, self.q = copied, nn.Linear(12, 12)

        def forward(self, x: Tensor) -> Tensor:
            return self.q(x) + self.q(x.clone() if self.copied else x) + self.q(x.square())

    def started(*, copied: bool) -> Tensor:
        torch.manual_seed(0)
        model = Twice(copied=copied)
        ll.attach(model, ll.LoRAConfig(rank=2, init="eva"))
        ll.calibrate(model, [torch.randn(8, 12) for _ in range(3)])
        return adapters_of(model)[0].A.detach()

    assert torch.equal(started(copied=True), started(copied=False))


def test_a_layer_with_a_sketch_shares_no_sums_with_one_without():
    class Unequal(nn.Module):
        def __init__(self, *, copied: bool) -> None:
            super().__init__()
            self.copied, self.q, self.k = copied, nn.Linear(100, 200), nn.Linear(100, 20)

        def forward(self, x: Tensor) -> Tensor:
            return self.q(x)[..., :20] + self.k(x.clone() if self.copied else x)

    def started(*, copied: bool) -> list[Tensor]:
        torch.manual_seed(0)
        model = Unequal(copied=copied)
        ll.attach(model, ll.LoRAConfig(rank=2, init={"name": "eva", "stats_budget": "140kB"}))
        ll.calibrate(model, [torch.randn(8, 100) for _ in range(3)])
        return [adapter.A.detach() for adapter in adapters_of(model)]

    found = started(copied=False)
    assert all(torch.equal(one, other) for one, other in zip(found, started(copied=True), strict=True))
    assert not torch.equal(*found)  # the first is that of a sketch


@pytest.mark.parametrize("start", ["eva", "covariance"])
def test_the_sums_over_an_input_of_three_layers_are_made_and_kept_once(start: str, monkeypatch: pytest.MonkeyPatch):
    added, kept = list[int](), list[int]()
    add, watching = Moments.add, Collector.watching

    @contextmanager
    def noting(self: Collector) -> Iterator[None]:
        with watching(self):
            yield
        tensors = [tensor for place in self.places for each in place.statistics for tensor in each.tensors()]
        kept.append(sum({id(tensor): tensor.nbytes for tensor in tensors}.values()))

    monkeypatch.setattr(Moments, "add", lambda self, rows, mask: (added.append(len(rows)), add(self, rows, mask))[1])
    monkeypatch.setattr(Collector, "watching", noting)

    def cost(*, shared: bool) -> tuple[int, int]:
        model, batches = projections(start, shared=lambda call: shared)
        added.clear()
        ll.calibrate(model, batches, loss_of(model))
        return len(added), kept[-1]

    (added_apart, kept_apart), (added_together, kept_together) = cost(shared=False), cost(shared=True)
    assert added_apart - added_together == 5 * 2  # batches, and layers that need no sums of their own
    assert kept_apart - kept_together == 2 * 8 * (Projections.WIDTH**2 + Projections.WIDTH + 5)


@pytest.mark.parametrize(("start", "sides"), [("eva", 2), ("corda", 2), ("covariance", 2 + 4)])
@pytest.mark.parametrize("options", [{}, {"rank": "auto", "rank_budget": 500}], ids=["rank", "auto"])
def test_every_second_moment_is_decomposed_once(
    start: str, sides: int, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
):
    """Of q, k and v there is one for the inputs; of each layer one for the gradients. Ranks from data ask again."""
    torch.manual_seed(0)
    model = Projections()
    ll.attach(model, ll.LoRAConfig(**({"rank": 2, "init": start} | options)))
    decomposed, eigenpairs = list[int](), statistics.eigenpairs
    monkeypatch.setattr(
        statistics, "eigenpairs", lambda matrix: (decomposed.append(len(matrix)), eigenpairs(matrix))[1]
    )
    target = torch.randn(4, 6, 24)
    ll.calibrate(model, [torch.randn(4, 6, 24) for _ in range(5)], lambda x: (model(x) * x * target).sum())
    assert decomposed == sides * [Projections.WIDTH]


# --- losses that hold derivatives


class Field(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 8), nn.Tanh(), nn.Linear(8, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)

    def residual(self, x: Tensor) -> Tensor:
        x = x.clone().requires_grad_(True)
        [slope] = torch.autograd.grad(self(x).sum(), x, create_graph=True)
        [bend] = torch.autograd.grad(slope.sum(), x, create_graph=True)
        return (slope[:, 0] - bend[:, 1]).square().mean() + self(x).square().mean()


@pytest.mark.parametrize("start", ["eva", "corda", "lora_ga", "covariance"])
def test_losses_with_derivatives_by_the_inputs_are_calibrated(start: str):
    torch.manual_seed(0)
    model, batches = Field(), [torch.randn(20, 6) for _ in range(4)]
    ll.attach(model, ll.LoRAConfig(rank=2, init=start, target_modules=["inner.0", "inner.2"]))
    flags = [parameter.requires_grad for parameter in model.parameters()]
    report = ll.calibrate(model, batches, model.residual)
    assert [each.start for each in report.layers] == [start, start]
    assert [parameter.requires_grad for parameter in model.parameters()] == flags


def test_derivatives_that_a_loss_holds_are_no_gradients_of_it():
    def started(derivative: bool) -> Tensor:
        torch.manual_seed(0)
        model, batches = Field(), [torch.randn(20, 6) for _ in range(4)]
        ll.attach(model, ll.LoRAConfig(rank=2, init="covariance", target_modules=["inner.0"]))

        def step(x: Tensor) -> Tensor:
            x = x.clone().requires_grad_(True)
            loss = model(x).square().mean()
            if derivative:  # of something else, which the loss ignores
                loss = loss + 0 * torch.autograd.grad(model(3 * x).sin().sum(), x)[0].sum()
            return loss

        ll.calibrate(model, batches, step)
        return adapters_of(model)[0].A.detach()

    torch.testing.assert_close(started(True), started(False))


def test_looking_at_inputs_alone_keeps_nothing_for_a_backward_pass():
    model, batches = model_and_batches("linear", "eva")
    outputs = list[Tensor]()
    ll.calibrate(model, batches, lambda batch: outputs.append(model(batch)))
    assert [output.requires_grad for output in outputs] == [False] * 5


class Rearranged(nn.Module):
    def __init__(self, order: str) -> None:
        super().__init__()
        self.order, self.layer = order, nn.Linear(12, 12)

    def forward(self, x: Tensor, attention_mask: Tensor) -> Tensor:
        return self.layer({"tokens first": x.transpose(0, 1), "flat": x.flatten(0, 1)}[self.order])


@pytest.mark.parametrize("order", ["tokens first", "flat"])
def test_padding_is_left_out_however_the_tokens_are_arranged(order: str):
    def started(padding: float) -> Tensor:
        torch.manual_seed(0)
        model = Rearranged(order)
        ll.attach(model, ll.LoRAConfig(rank=2, init="eva"))
        mask = torch.arange(6) < torch.tensor([[6], [3], [4], [5]])
        x = torch.randn(4, 6, 12).masked_fill(~mask.unsqueeze(-1), padding)
        ll.calibrate(model, [{"x": x, "attention_mask": mask}])
        return adapters_of(model)[0].A.detach()

    assert torch.equal(started(0.0), started(100.0))


# --- errors, before anything changes


@pytest.mark.parametrize(
    ("start", "batches", "message"),
    [
        ("eva", [], "needs batches, and there were none"),
        ("eva", [torch.full((2, 3, 12), torch.nan)], "'0': .*not finite"),
        ("eva", [torch.ones(2, 3, 12)], "'0': .*rank"),
        ("lora_ga", [torch.zeros(2, 3, 12)], "'0': .*directions of the gradient.*Lower ranks by rank_pattern"),
    ],
)
def test_data_that_do_not_do_leave_the_adapters_waiting(start: str, batches: list[Tensor], message: str):
    model, _ = model_and_batches("linear", start)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=f"init='{start}'.*{message}" if "none" not in message else message):
        ll.calibrate(model, batches, loss_of(model))
    assert all(adapter.is_waiting for adapter in adapters_of(model))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_every_layer_whose_rank_is_too_high_is_named_with_the_rank_that_does():
    model, batches = planted(rank=3, init="eva")
    names = "'layers.1'.*'layers.2'.*'layers.3'"
    with pytest.raises(ValueError, match=rf"{names}.*rank_pattern=\{{'layers.1': 1, 'layers.2': 2, 'layers.3': 1\}}"):
        ll.calibrate(model, batches)


def test_all_tokens_masked_is_an_error():
    model, batches = model_and_batches("linear", "eva")
    with pytest.raises(ValueError, match=r"no adapter got its start.*all its tokens are masked"):
        ll.calibrate(model, batches, mask=lambda batch: torch.zeros(batch.shape[:2], dtype=torch.bool))


def test_a_step_without_a_loss_is_an_error():
    model, batches = model_and_batches("linear", "lora_ga")
    with pytest.raises(
        ValueError, match=r"needs the gradient of a loss, and the step returned a tensor of shape \(4, 6"
    ):
        ll.calibrate(model, batches)


def test_a_module_without_waiting_adapters_is_an_error():
    model, batches = model_and_batches("linear", "kaiming")
    with pytest.raises(ValueError, match=r"no adapter.*waits for a start; attached with init='kaiming'"):
        ll.calibrate(model, batches)


def test_calibrating_twice_is_an_error():
    model, batches = model_and_batches("linear", "eva")
    ll.calibrate(model, batches)
    with pytest.raises(ValueError, match=r"no adapter.*waits for a start"):
        ll.calibrate(model, batches)


# --- ranks from data


class Planted(nn.Module):
    """Inputs of four layers vary in 6, 1, 2 and 1 directions."""

    WIDTHS = (6, 1, 2, 1)

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(16, 16) for _ in self.WIDTHS)

    def forward(self, x: Tensor) -> Tensor:
        parts = [layer(self.only(x, width)) for layer, width in zip(self.layers, self.WIDTHS, strict=True)]
        return torch.stack(parts).sum(0)

    @staticmethod
    def only(x: Tensor, width: int) -> Tensor:
        return x * (torch.arange(16) < width)


def planted(**options: Any) -> tuple[Planted, list[Tensor]]:
    torch.manual_seed(0)
    model = Planted()
    ll.attach(model, ll.LoRAConfig(**({"rank": "auto", "init": "eva"} | options)))
    return model, [torch.randn(8, 16) for _ in range(8)]


def ranks_of(model: nn.Module) -> list[int]:
    layers = ll.lora_layers(model)
    return [layers[f"layers.{i}"].rank if f"layers.{i}" in layers else 0 for i in range(len(Planted.WIDTHS))]


def test_ranks_follow_the_directions_in_the_data_within_the_budget():
    budget = 10 * 32  # one rank costs 16 + 16 parameters
    model, batches = planted(rank_budget=budget, init={"name": "eva", "rho": 8.0})
    report = ll.calibrate(model, batches)
    assert ranks_of(model) == list(Planted.WIDTHS)
    assert sum(each.rank for each in report.layers) == 10
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) <= budget


@pytest.mark.parametrize("budget", [1, 2, 4, 7, 9])
def test_the_budget_is_never_exceeded_and_the_scaling_is_that_of_the_common_rank(budget: int):
    model, batches = planted(rank_budget=32 * budget)
    ll.calibrate(model, batches)
    assert 0 < sum(ranks_of(model)) <= budget
    uniform = max(1, round(budget / 4))
    assert {layer.scaling for layer in ll.lora_layers(model).values()} == {32.0 / uniform}


@pytest.mark.parametrize("rank_budget", ["15%", "0.6kB"])
def test_a_budget_may_be_a_share_or_a_size(rank_budget: str):
    model, batches = planted(rank_budget=rank_budget)
    parameters = {"15%": 0.15 * 4 * 17 * 16, "0.6kB": 600 / 4}[rank_budget]
    ll.calibrate(model, batches)
    used = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert parameters - 32 < used <= parameters


def test_a_budget_below_one_rank_is_an_error_and_changes_nothing():
    model, batches = planted(rank_budget=31)
    with pytest.raises(ValueError, match="rank_budget=31 is 31 parameters, less than one rank"):
        ll.calibrate(model, batches)
    assert all(adapter.is_waiting for adapter in adapters_of(model))
    assert ranks_of(model) == [1, 1, 1, 1]


def test_data_without_a_direction_above_chance_are_an_error():
    model, batches = planted(rank_budget=320, init="covariance")
    with pytest.raises(ValueError, match="init='covariance' found no direction that stands out from chance"):
        ll.calibrate(model, batches, lambda batch: (model(batch) * torch.randn(8, 16)).sum())


def test_rho_moves_ranks_at_an_equal_number_of_parameters():
    model, batches = planted(rank=2, init={"name": "eva", "rho": 2.0})
    ll.calibrate(model, batches)
    assert ranks_of(model) == [4, 1, 2, 1]
    assert {layer.scaling for layer in ll.lora_layers(model).values()} == {16.0}


def test_ranks_from_data_are_saved_and_loaded_like_any_others(tmp_path: Any):
    model, batches = planted(rank_budget=10 * 32, init={"name": "eva", "rho": 8.0})
    base = Planted()
    base.load_state_dict({k: v for k, v in model.state_dict().items() if ".lora." not in k})
    ll.calibrate(model, batches)
    with torch.no_grad():
        for adapter in adapters_of(model):
            adapter.B.normal_()
    expected = model(batches[0])
    ll.save_adapter(model, tmp_path / "peft")
    checkpoint = write_checkpoint(model, tmp_path / "adapter.ckpt")
    for path in (tmp_path / "peft", checkpoint):
        other = copy.deepcopy(base)
        ll.load_adapter(other, path)
        torch.testing.assert_close(other(batches[0]), expected)


def test_attaching_again_with_the_same_request_keeps_the_ranks():
    model, batches = planted(rank_budget=10 * 32)
    ll.calibrate(model, batches)
    before = ranks_of(model)
    ll.attach(model, ll.LoRAConfig(rank="auto", init="eva", rank_budget=10 * 32))
    assert ranks_of(model) == before
    assert not any(adapter.is_waiting for adapter in adapters_of(model))


def test_heads_found_beside_ranks_from_data_stay_the_same_when_attached_again():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 3))
    config = ll.LoRAConfig(rank="auto", init="eva", rank_budget=640, modules_to_save="auto")
    assert [*ll.attach(model, config).saved] == ["1"]
    ll.calibrate(model, [torch.randn(64, 32)])
    before = {name: layer.rank for name, layer in ll.lora_layers(model).items()}
    assert before["0"] > 1
    assert [*ll.attach(model, config).saved] == ["1"]
    assert {name: layer.rank for name, layer in ll.lora_layers(model).items()} == before
    assert not any(adapter.is_waiting for adapter in adapters_of(model))


def named(*names: str, **options: Any) -> tuple[nn.Module, list[Tensor]]:
    """Return a model of which the last adapter gets its ranks from data, and the others are trained."""
    torch.manual_seed(0)
    model = nn.Sequential(Planted(), nn.Linear(16, 16))
    *others, last = names
    for name in others:
        ll.add_adapter(model, name, ll.LoRAConfig(rank=1, target_modules=["layers.0"], modules_to_save=["1"]))
        ll.set_adapter(model, name)
        for tensor in ll.adapter_state_dict(model).values():
            tensor.data.normal_()
    ranks: dict[str, Any] = {"rank": "auto", "rank_budget": 320, "init": "eva", "exclude_modules": ["1"]}
    ll.add_adapter(model, last, ll.LoRAConfig(**(ranks | options)))
    ll.set_adapter(model, last)
    return model, [torch.randn(8, 16) for _ in range(8)]


def ranks_in(model: nn.Module) -> dict[str, int]:
    return {name: layer.rank for name, layer in ll.lora_layers(model).items()}


@pytest.mark.parametrize("names", [("a",), ("a", "b"), ("a", "b", "c")], ids=len)
@pytest.mark.parametrize("options", [{}, {"modules_to_save": ["1"], "exclude_modules": []}], ids=["", "head"])
def test_ranks_from_data_are_those_of_the_adapter_alone_also_beside_others(
    names: tuple[str, ...], options: dict[str, Any]
):
    alone, batches = named("default", **options)
    ll.calibrate(alone, batches)
    model, _ = named(*names, **options)
    base, before = copy.deepcopy(model), {}
    for name in names[:-1]:
        with ll.using(model, name):
            before[name] = {key: tensor.clone() for key, tensor in ll.adapter_state_dict(model).items()}
    ll.calibrate(model, batches)
    assert ranks_in(model) == ranks_in(alone)
    assert len(set(ranks_in(model).values())) > 1
    assert (ll.adapter_names(model), ll.active_adapter(model)) == ([*names], names[-1])
    for name, state in before.items():
        with ll.using(model, name):
            found = ll.adapter_state_dict(model)
            assert found.keys() == state.keys()
            assert all(torch.equal(found[key], tensor) for key, tensor in state.items())
    for name in (*before, None):
        with ll.using(model, name), ll.using(base, name):
            assert torch.equal(model(batches[0]), base(batches[0]))
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    expected = {name for name, parameter in alone.named_parameters() if parameter.requires_grad}
    assert {name for name in trained if "lora_others" not in name} == expected
    ll.attach(
        model,
        ll.LoRAConfig(**({"rank": "auto", "rank_budget": 320, "init": "eva", "exclude_modules": ["1"]} | options)),
    )
    assert ranks_in(model) == ranks_in(alone)  # the request is known


@pytest.mark.parametrize("names", [("a",), ("a", "b")], ids=len)
def test_detaching_after_ranks_from_data_leaves_the_base_as_it_was(names: tuple[str, ...]):
    model, batches = named(*names)
    plain = nn.Sequential(Planted(), nn.Linear(16, 16))
    flags = {name: parameter.requires_grad for name, parameter in plain.named_parameters()}
    base = copy.deepcopy(model)
    ll.calibrate(model, batches)
    ll.detach(model)
    ll.detach(base)
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == flags
    assert all(torch.equal(tensor, base.state_dict()[name]) for name, tensor in model.state_dict().items())


def test_adapters_keep_their_order_when_ranks_come_from_data():
    model, batches = named("a")
    ll.add_adapter(model, "b", ll.LoRAConfig(rank=1))
    ll.calibrate(model, batches)
    assert (ll.adapter_names(model), ll.active_adapter(model)) == (["a", "b"], "a")


def test_a_failure_to_attach_again_leaves_named_adapters_as_they_were(monkeypatch: pytest.MonkeyPatch):
    model, batches = named("a", "b")
    before = copy.deepcopy(model)

    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("no memory")

    monkeypatch.setattr(calibration, "attach", fail)
    with pytest.raises(RuntimeError, match="no memory"):
        ll.calibrate(model, batches)
    monkeypatch.undo()
    assert (ll.adapter_names(model), ll.active_adapter(model)) == (["a", "b"], "b")
    flags = {name: parameter.requires_grad for name, parameter in before.named_parameters()}
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == flags
    state = before.state_dict()
    assert model.state_dict().keys() == state.keys()
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    ll.calibrate(model, batches)
    assert len(set(ranks_in(model).values())) > 1


def test_parts_that_were_attached_to_separately_have_no_common_budget():
    torch.manual_seed(0)
    model = nn.ModuleDict({"a": nn.Sequential(nn.Linear(16, 16)), "b": nn.Sequential(nn.Linear(16, 16))})
    for part in model.values():
        ll.attach(part, ll.LoRAConfig(rank="auto", init="eva", rank_budget=4 * 32))
    batches = [torch.randn(8, 16) for _ in range(4)]
    with pytest.raises(ValueError, match=r"attached to 'a', 'b' separately. Call calibrate for each"):
        ll.calibrate(model, batches, lambda x: model["b"](model["a"](x)))
    for part in model.values():
        ll.calibrate(part, batches)
    assert set(ranks_in(model).values()) == {4}


# --- learning rates stay comparable


@pytest.mark.parametrize("start", ["eva", "covariance"])
def test_the_first_step_changes_the_output_as_much_as_from_a_random_start(start: str):
    def change(init: str, seed: int) -> float:
        torch.manual_seed(0)
        model = nn.Linear(32, 8)
        model = nn.Sequential(model)
        x, y = torch.randn(256, 1, 32) * torch.logspace(0, -1, 32), torch.randn(256, 1, 8)
        ll.attach(model, ll.LoRAConfig(rank=4, init=init), seed=seed)
        if init != "kaiming":
            batches = list(zip(x.split(16), y.split(16), strict=True))
            ll.calibrate(model, batches, lambda batch: (model(batch[0]) - batch[1]).square().sum())
        before = model(x).detach()
        optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-3)
        (model(x) - y).square().sum().backward()
        optimizer.step()
        return float((model(x) - before).detach().norm())

    random = torch.tensor([change("kaiming", seed) for seed in range(20)]).mean()
    assert abs(change(start, 0) / random - 1) < 0.2


# --- options


def test_a_small_budget_is_met_by_sketches_and_finds_the_same_directions():
    def started(stats_budget: str) -> Tensor:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(200, 200))
        ll.attach(model, ll.LoRAConfig(rank=2, init={"name": "eva", "stats_budget": stats_budget}))
        variances = torch.cat([torch.tensor([30.0, 20.0]), torch.ones(198)])
        ll.calibrate(model, [torch.randn(16, 4, 200) * variances for _ in range(8)])
        return torch.linalg.qr(adapters_of(model)[0].A.detach().double().T)[0]

    exact, sketched = started("1GB"), started("200kB")
    assert not torch.equal(exact, sketched)
    assert torch.linalg.svdvals(exact.T @ sketched).min() > 0.999


def test_a_budget_that_no_sketch_meets_is_an_error_with_the_bytes_needed():
    model, batches = model_and_batches("linear", {"name": "eva", "stats_budget": "0.1kB"})
    with pytest.raises(ValueError, match=r"need at least [\d,]+ bytes.*the budget is 100"):
        ll.calibrate(model, batches)


def test_smooth_directions_of_kernels_recover_a_smooth_truth_better():
    taps = torch.linspace(-1, 1, 15)
    truth = torch.exp(-8 * taps.square())

    def angle(smooth: bool) -> float:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv1d(1, 4, 15))
        ll.attach(model, ll.LoRAConfig(rank=1, target_modules="all", init={"name": "eva", "smooth": smooth}))
        batches = [torch.randn(4, 1, 1) * truth + torch.randn(4, 1, 15) for _ in range(4)]
        ll.calibrate(model, batches)
        found = adapters_of(model)[0].A.detach()[0]
        return float(torch.nn.functional.cosine_similarity(found, truth, dim=0).abs())

    assert angle(smooth=True) > angle(smooth=False) + 0.02


def test_smoothness_without_a_kernel_is_an_error():
    model, batches = model_and_batches("linear", {"name": "eva", "smooth": True})
    with pytest.raises(ValueError, match=r"smooth=True is for convolutions with a kernel"):
        ll.calibrate(model, batches)


@pytest.mark.parametrize(("start", "possible"), [("eva", True), ("pissa", False), ("corda", False), ("lora_ga", False)])
def test_a_quantized_weight_has_the_starts_that_do_not_read_it(start: str, possible: bool):
    torch.manual_seed(0)
    model = nn.Sequential(EightBit(12, 10), nn.Linear(10, 10))
    base = copy.deepcopy(model)
    ll.attach(model, ll.LoRAConfig(rank=2, init=start))
    batches = [torch.randn(4, 6, 12) for _ in range(4)]
    report = ll.calibrate(model, batches, loss_of(model))
    assert (report.layers[0].start == start) == possible
    assert torch.equal(model(batches[0]), base(batches[0]))


def test_a_model_with_quantized_weights_alone_has_no_gradient_of_them():
    model = nn.Sequential(EightBit(12, 10))
    ll.attach(model, ll.LoRAConfig(rank=2, init="lora_ga"))
    with pytest.raises(ValueError, match=r"no adapter got its start, .*: its weight is computed or quantized"):
        ll.calibrate(model, [torch.randn(4, 12)], loss_of(model))


# --- beside other features


def test_a_compiled_model_is_calibrated_and_keeps_no_trace_in_its_graphs():
    model, batches = model_and_batches("linear", "eva")
    expected, _ = model_and_batches("linear", "eva")
    ll.calibrate(expected, batches)
    compiled = torch.compile(model, backend="eager")
    compiled.eval()
    compiled(batches[0])
    ll.calibrate(compiled, batches)
    assert torch.equal(adapters_of(model)[0].A, adapters_of(expected)[0].A)
    torch.testing.assert_close(compiled(batches[0]), model(batches[0]))


def test_adapters_that_wait_can_be_probed():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 10))
    ll.attach(model, ll.LoRAConfig(rank=2, init="pissa"), probe=torch.randn(3, 12))
    assert all(adapter.is_waiting for adapter in adapters_of(model))
    ll.calibrate(model)


def test_modules_to_save_and_other_named_adapters_are_left_alone():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 10), nn.Linear(10, 3))
    ll.add_adapter(model, "default", ll.LoRAConfig(rank=2, target_modules=["0"], modules_to_save=["1"]))
    ll.set_adapter(model, "default")
    first = {name: tensor.clone() for name, tensor in ll.adapter_state_dict(model).items()}
    ll.add_adapter(model, "b", ll.LoRAConfig(rank=2, init="eva", target_modules=["0"]))
    ll.set_adapter(model, "b")
    ll.calibrate(model, [torch.randn(4, 6, 12) for _ in range(4)])
    ll.set_adapter(model, "default")
    assert all(torch.equal(tensor, first[name]) for name, tensor in ll.adapter_state_dict(model).items())
