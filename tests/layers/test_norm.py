"""Frozen norms: running statistics stay fixed, or move and are saved; detach restores everything."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn

from lightning_lora import (
    LoRAConfig,
    adapter_state_dict,
    attach,
    detach,
    disabled,
    load_adapter,
    load_adapter_state_dict,
    lora_layers,
    merge,
    save_adapter,
)
from lightning_lora.analysis import analyze
from lightning_lora.layers import FrozenNorm, base_parameter, has_running_statistics, swap_in, swap_out
from lightning_lora.surgery import freeze_norms
from tests.contract import assert_same_bits, assert_unchanged, snapshot

NORMS = {
    "BatchNorm1d": lambda: nn.BatchNorm1d(8),
    "BatchNorm1d without affine": lambda: nn.BatchNorm1d(8, affine=False),
    "BatchNorm1d averaging all batches": lambda: nn.BatchNorm1d(8, momentum=None),
    "InstanceNorm1d": lambda: nn.InstanceNorm1d(8, affine=True, track_running_stats=True),
    "SyncBatchNorm": lambda: nn.SyncBatchNorm(8),
}
each_norm = pytest.mark.parametrize("norm", NORMS.values(), ids=NORMS)
STATISTICS = ["running_mean", "running_var", "num_batches_tracked"]


class Normed(nn.Module):
    """A norm over channels between two linear layers, and another as a part of the head."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.first = nn.Linear(6, 6)
        self.norm = norm
        self.head = nn.Sequential(copy.deepcopy(norm), nn.Linear(6, 4))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.first(x)))


def step(model: nn.Module, rng: torch.Generator) -> Tensor:
    """Train one step in train mode, as Lightning does after every validation."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    loss = model.train()(2 + torch.randn(5, 8, 6, generator=rng)).square().mean()
    loss.backward()
    optimizer.step()
    return loss


def config(**options: object) -> LoRAConfig:
    return LoRAConfig(**{"rank": 2, "target_modules": ["first"], **options})


@each_norm
def test_eval_keeps_the_running_statistics_bit_equal_in_training(norm, rng):
    model = Normed(norm())
    attach(model, config())
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    assert [name.rpartition(".")[2] for name in before] == 2 * STATISTICS
    for _ in range(3):
        step(model, rng)
    assert_same_bits(dict(model.named_buffers()), before)
    assert not [name for name in adapter_state_dict(model) if "lora" not in name]


@each_norm
def test_eval_normalizes_by_the_running_statistics_in_train_mode_too(norm, rng):
    model, x = Normed(norm()), torch.randn(5, 8, 6, generator=rng)
    attach(model, config())
    assert torch.equal(model.train()(x), model.eval()(x))


@each_norm
def test_eval_applies_from_attach_on(norm, rng):
    model = Normed(norm()).train()
    attach(model, config())
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    model(torch.randn(5, 8, 6, generator=rng))  # nobody has called train() or eval() since
    assert_same_bits(dict(model.named_buffers()), before)


@each_norm
@pytest.mark.parametrize("undo", [detach, merge])
@pytest.mark.parametrize("asked", [[], [False], [True], [False, True], [True, False]])
def test_detach_gives_norms_the_last_requested_mode(norm, undo, asked: list[bool]):
    model = Normed(norm()).train()
    before = snapshot(model)
    attach(model, config())
    for mode in asked:
        model.train(mode)
    undo(model)
    after = snapshot(model)
    assert after["classes"] == before["classes"]
    assert after["modes"] == dict.fromkeys(before["modes"], [True, *asked][-1])
    for name in ("norm", "head.0"):
        assert after["attributes"][name] == before["attributes"][name]


@each_norm
@pytest.mark.parametrize("frozen_norm", ["eval", "track"])
def test_detach_restores_every_bit_after_training(norm, frozen_norm: str, rng):
    model = Normed(norm())
    before = snapshot(model)
    attach(model, config(frozen_norm=frozen_norm))
    for _ in range(2):
        step(model, rng)
    detach(model)
    assert_unchanged(model, before)


def statistics(model: nn.Module) -> dict[str, Tensor]:
    return {name: buffer.clone() for name, buffer in model.named_buffers()}


def moved_since(before: dict[str, Tensor], model: nn.Module) -> set[str]:
    return {name for name, buffer in model.named_buffers() if not torch.equal(buffer, before[name])}


def moving(model: nn.Module) -> set[str]:
    """Return the statistics that this kind of norm moves; torch's InstanceNorm does not count batches."""
    counts = not isinstance(model.norm, nn.InstanceNorm1d)
    return {name for name, _ in model.named_buffers() if counts or not name.endswith("num_batches_tracked")}


@each_norm
def test_track_moves_and_saves_statistics(norm, rng):
    model, base = Normed(norm()), Normed(norm())
    base.load_state_dict(model.state_dict())
    attach(model, config(frozen_norm="track"))
    before = statistics(model)
    for _ in range(2):
        step(model, rng)
    assert moved_since(before, model) == moving(model)
    state = adapter_state_dict(model)
    assert list(state) == ["first.lora.A", "first.lora.B", *before]
    assert_same_bits({name: state[name] for name in before}, dict(model.named_buffers()))
    attach(base, config(frozen_norm="track"))
    load_adapter_state_dict(base, state)
    x = torch.randn(5, 8, 6, generator=rng)
    assert torch.equal(base.eval()(x), model.eval()(x))


@each_norm
def test_disabled_uses_the_base_statistics(norm, rng):
    model, x = Normed(norm()).eval(), torch.randn(5, 8, 6, generator=rng)
    before = model(x)
    attach(model, config(frozen_norm="track"))
    for _ in range(2):
        step(model, rng)
    trained = model.eval()(x)
    with disabled(model):
        assert torch.equal(model(x), before)
    assert torch.equal(model(x), trained)
    assert not torch.equal(trained, before)


@each_norm
def test_merge_keeps_tracked_statistics(norm, rng):
    model, x = Normed(norm()), torch.randn(5, 8, 6, generator=rng)
    attach(model, config(frozen_norm="track"))
    step(model, rng)
    moved, trained = statistics(model), model.eval()(x)
    merge(model)
    assert_same_bits(dict(model.named_buffers()), moved)
    assert torch.allclose(model(x), trained, atol=1e-5)


@each_norm
@pytest.mark.parametrize("frozen_norm", ["eval", "track"])
def test_norm_in_saved_module_trains_with_its_statistics(norm, frozen_norm: str, rng):
    model = Normed(norm())
    attach(model, config(frozen_norm=frozen_norm, modules_to_save=["head"]))
    before, weights = statistics(model), [p.detach().clone() for p in model.head.parameters()]
    for _ in range(2):
        step(model, rng)
    after = model.head.state_dict()
    assert moved_since(before, model) >= {name for name in moving(model) if name.startswith("head")}
    assert not any(torch.equal(p, old) for p, old in zip(model.head.parameters(), weights, strict=True))
    state = adapter_state_dict(model)
    assert_same_bits({name: state[f"head.{name}"] for name in after}, after)


def test_norms_without_running_statistics_are_left_alone():
    model = nn.Sequential(
        nn.Linear(8, 8), nn.BatchNorm1d(8, track_running_stats=False), nn.LayerNorm(8), nn.InstanceNorm1d(8)
    )
    kinds = [type(part) for part in model]
    attach(model, LoRAConfig(rank=2))
    assert [type(part) for part in model][1:] == kinds[1:]
    assert all(part.training for part in model.train())
    assert not any(p.requires_grad for part in model[1:] for p in part.parameters())


@pytest.mark.parametrize("frozen_norm", ["eval", "track"])
def test_freezing_norms_again_only_freezes_new_ones(frozen_norm: str, rng):
    model = Normed(nn.BatchNorm1d(8))
    attach(model, config(frozen_norm=frozen_norm))
    step(model, rng)
    before = snapshot(model)
    freeze_norms(model)
    assert_unchanged(model, before)
    model.norm = nn.BatchNorm1d(8)  # as sync_batchnorm does
    freeze_norms(model)
    model.train()
    assert model.norm.training is (frozen_norm == "track")


def test_frozen_norm_keeps_its_class_and_survives_copies(rng):
    model = Normed(nn.BatchNorm1d(8))
    attach(model, config())
    twin = copy.deepcopy(model)
    assert isinstance(twin.norm, nn.BatchNorm1d)
    before = statistics(twin)
    step(twin, rng)
    assert_same_bits(dict(twin.named_buffers()), before)
    detach(twin)
    assert type(twin.norm) is nn.BatchNorm1d
    assert type(model.norm) is not nn.BatchNorm1d


@each_norm
def test_frozen_statistics_are_not_begun_anew_without_the_layer(norm, rng):
    model = Normed(norm())
    step(model, rng)
    before = copy.deepcopy(model.norm.state_dict())
    attach(model, LoRAConfig(rank=2, target_modules=["first"], modules_to_save=["head.0"]))
    data = [torch.randn(5, 8, 6, generator=rng) for _ in range(3)]
    with pytest.warns(UserWarning, match="frozen norms are those of the pretrained model and stay"):
        model.norm.reset_running_stats()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        update_bn(data, model)
    assert_same_bits(model.norm.state_dict(), before)
    if isinstance(model.head[0], nn.modules.batchnorm._BatchNorm):
        assert model.head[0].num_batches_tracked == len(data)
    model.norm.reset_parameters()  # as where a model is given memory
    assert_same_bits(model.norm.state_dict(), norm().state_dict())


@each_norm
def test_a_frozen_norm_that_is_put_in_train_mode_by_itself_says_that_it_stays(norm, rng):
    model, x = Normed(norm()), torch.randn(5, 8, 6, generator=rng)
    attach(model, LoRAConfig(rank=2, target_modules=["first"]))
    model.train()  # as every loop does: not a word
    with pytest.warns(UserWarning, match=r"stays in eval mode.*Set its attribute training = True.*frozen_norm='track'"):
        model.norm.train()
    assert not model.norm.training
    model.norm.eval()
    model.norm.training = True  # the way that the warning names
    expected = norm().train()(x)
    torch.testing.assert_close(model.norm(x), expected)


SPECTRAL_NORMS = {"spectral_norm": nn.utils.parametrizations.spectral_norm, "older": nn.utils.spectral_norm}
each_spectral_norm = pytest.mark.parametrize("spectral_norm", SPECTRAL_NORMS.values(), ids=SPECTRAL_NORMS)


class Spectral(nn.Module):
    """Weights divided by the largest singular value, which torch follows by one power iteration a step."""

    def __init__(self, spectral_norm) -> None:
        super().__init__()
        self.first = spectral_norm(nn.Linear(6, 6))
        self.norm = spectral_norm(nn.Conv1d(8, 8, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.first(x))


@each_spectral_norm
def test_eval_keeps_spectral_norm_state_of_frozen_weights(spectral_norm, rng):
    model, x = Spectral(spectral_norm), torch.randn(5, 8, 6, generator=rng)
    before = snapshot(model.train())
    with torch.no_grad():  # else the older one leaves a weight that cannot be copied
        base = model.eval()(x)
    buffers = statistics(model)
    attach(model.train(), config(dropout=0.5))
    copies = [copy.deepcopy(model), model]
    for each in copies:
        for _ in range(3):
            step(each, rng)
        assert_same_bits(dict(each.named_buffers()), buffers)
        assert not torch.equal(each.train()(x), each.train()(x))  # the adapter's dropout still knows the mode
        with disabled(each.eval()):
            assert torch.equal(each(x), base)
    detach(model.train())
    assert_unchanged(model, before)
    model(x)
    assert moved_since(buffers, model)  # it follows the weights again


@each_spectral_norm
def test_track_saves_spectral_norm_state(spectral_norm, rng):
    model = Spectral(spectral_norm)
    fresh = copy.deepcopy(model)
    for each in (model, fresh):
        attach(each, config(frozen_norm="track"))
    buffers = statistics(model)
    step(model, rng)
    assert moved_since(buffers, model)
    load_adapter_state_dict(fresh, adapter_state_dict(model))
    x = torch.randn(5, 8, 6, generator=rng)
    assert torch.equal(fresh.eval()(x), model.eval()(x))


@each_spectral_norm
def test_looking_at_weights_in_training_moves_no_spectral_norm_state(spectral_norm, rng):
    model = Spectral(spectral_norm)
    attach(model, config(frozen_norm="track"))
    step(model, rng)
    before, modes = snapshot(model), {name: part.training for name, part in model.named_modules()}
    analyze(model)
    for name, layer in lora_layers(model).items():
        assert layer.delta_weight().shape == base_parameter(layer, "weight").shape, name
    assert_unchanged(model, before)
    assert {name: part.training for name, part in model.named_modules()} == modes


@each_spectral_norm
def test_loading_a_directory_keeps_spectral_norm_state(spectral_norm, rng, tmp_path):
    model = Spectral(spectral_norm)
    fresh, buffers = copy.deepcopy(model).train(), statistics(model)
    attach(model, config())
    save_adapter(model, tmp_path / "adapter")
    load_adapter(fresh, tmp_path / "adapter")
    assert_same_bits(dict(fresh.named_buffers()), buffers)


@each_spectral_norm
def test_spectral_norm_of_saved_module_follows_its_weight(spectral_norm, rng):
    model = Spectral(spectral_norm)
    attach(model, config(modules_to_save=["norm"]))
    buffers = statistics(model)
    step(model, rng)
    moved = moved_since(buffers, model)
    assert moved
    assert all(name.startswith("norm") for name in moved)
    assert set(adapter_state_dict(model)) > {name for name in buffers if name.startswith("norm")}


def test_base_dropout_stays_active():
    model = nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.5))
    attach(model, LoRAConfig(rank=2))
    assert (model.train()(torch.ones(16, 8)) == 0).any()


def test_integer_parameters_are_accepted(tiny):
    tiny.codes = nn.Parameter(torch.arange(4), requires_grad=False)
    tiny.head.codes = nn.Parameter(torch.arange(4), requires_grad=False)
    attach(tiny, LoRAConfig(rank=2, target_modules=["q_proj"], modules_to_save=["head"]))
    assert not tiny.head.codes.requires_grad
    assert tiny.head.weight.requires_grad
    assert torch.equal(adapter_state_dict(tiny)["head.codes"], torch.arange(4))


# --- the swapped class


@pytest.mark.parametrize(
    ("norm", "expected"),
    [
        (nn.BatchNorm1d(4), True),
        (nn.BatchNorm2d(4, affine=False), True),
        (nn.SyncBatchNorm(4), True),
        (nn.InstanceNorm2d(4, track_running_stats=True), True),
        (nn.BatchNorm1d(4, track_running_stats=False), False),
        (nn.InstanceNorm1d(4), False),
        (nn.LayerNorm(4), False),
        (nn.GroupNorm(2, 4), False),
        (nn.Linear(4, 4), False),
        (nn.utils.spectral_norm(nn.Linear(4, 4)), True),
        (nn.utils.parametrizations.spectral_norm(nn.Linear(4, 4)).parametrizations.weight[0], True),
        (nn.utils.parametrizations.spectral_norm(nn.Linear(4, 4), name="bias").parametrizations.bias[0], False),
        (nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)).parametrizations.weight[0], False),
    ],
    ids=lambda value: type(value).__name__,
)
def test_has_running_statistics(norm: nn.Module, expected: bool):
    assert has_running_statistics(norm) is expected


def frozen() -> nn.BatchNorm1d:
    norm = nn.BatchNorm1d(4)
    swap_in(norm, FrozenNorm)
    norm.train()
    return norm


def test_frozen_norm_stays_in_eval_mode():
    norm = frozen()
    for mode in (True, False, True):
        assert norm.train(mode) is norm
        assert not norm.training
        assert norm.asked_mode is mode
    assert norm.eval() is norm
    assert norm.asked_mode is False


def test_frozen_statistics_do_not_move():
    norm, before = frozen(), nn.BatchNorm1d(4).state_dict()
    norm(torch.randn(8, 4) + 5)
    assert all(torch.equal(tensor, before[name]) for name, tensor in norm.state_dict().items())


def test_copy_of_frozen_norm_is_frozen_and_keeps_its_mode():
    twin = copy.deepcopy(frozen())
    assert twin.asked_mode is True
    assert not twin.train().training
    swap_out(twin)
    assert twin.train().training


@pytest.mark.parametrize("norm", [nn.utils.weight_norm, nn.utils.spectral_norm])
@pytest.mark.parametrize("mode", [True, False], ids=["train", "eval"])
@pytest.mark.filterwarnings("ignore:.*weight_norm. is deprecated")
def test_weights_that_hooks_compute_are_those_that_were_loaded(norm, mode: bool, rng: torch.Generator):
    """The attribute is computed when the layer runs, so after loading it holds the weight of before."""

    def build() -> nn.Module:
        return nn.Sequential(norm(nn.Linear(4, 6)), norm(nn.Conv1d(5, 3, 1))).double().train(mode)

    trained, model, x = build(), build(), torch.randn(5, 4, generator=rng, dtype=torch.float64)
    model.load_state_dict(trained.state_dict())
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    attach(model, LoRAConfig(rank=2, use_dora=True))
    assert_same_bits({name: b for name, b in model.named_buffers() if "lora" not in name}, buffers)
    assert {p.dtype for p in model.parameters()} == {torch.float64}
    torch.testing.assert_close(model.eval()(x), trained.eval()(x), rtol=1e-12, atol=1e-12)
