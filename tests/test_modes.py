"""``merged`` and ``disabled``: they change the computation inside the block and restore the exact weights after it."""

from __future__ import annotations

import copy
import itertools
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from lightning_lora import (
    LoRAConfig,
    adapter_state_dict,
    attach,
    calibrate,
    detach,
    disabled,
    load_adapter,
    load_adapter_state_dict,
    lora_layers,
    merge,
    merged,
    save_adapter,
    scaled,
)
from tests.contract import assert_same_bits, assert_unchanged, raises_and_changes_nothing, snapshot, train_all

CONFIG = LoRAConfig(rank=2, alpha=3.0, target_modules=["embed", "q_proj", "head"])


@pytest.fixture
def trained(tiny, rng) -> nn.Module:
    """The tiny model with adapters that have an effect, in eval mode."""
    attach(tiny, CONFIG)
    train_all(tiny, rng)
    return tiny.eval()


def base_of(model: nn.Module) -> nn.Module:
    """Return the model without its adapters."""
    twin = copy.deepcopy(model)
    detach(twin)
    return twin


def test_merged_uses_the_weights_that_merge_leaves(trained, tokens):
    output, twin = trained(tokens), copy.deepcopy(trained)
    merge(twin)
    with merged(trained):
        assert_same_bits({n: trained.state_dict()[n] for n in twin.state_dict()}, twin.state_dict())
        assert torch.equal(trained(tokens), twin(tokens))
    assert torch.equal(trained(tokens), output)


def test_disabled_is_the_base_bit_for_bit(trained, tokens):
    base = base_of(trained)
    with disabled(trained):
        assert torch.equal(trained(tokens), base(tokens))
    assert not torch.equal(trained(tokens), base(tokens))


SWITCHES = {"merged": merged, "disabled": disabled}
NESTINGS = [names for depth in (1, 2, 3) for names in itertools.product(SWITCHES, repeat=depth)]


class StopHereError(Exception):
    pass


@pytest.mark.parametrize("nesting", NESTINGS, ids=" in ".join)
@pytest.mark.parametrize("fails", [False, True])
def test_modes_nest_and_restore(nesting: tuple[str, ...], fails: bool, trained, tokens):
    expected = {"active": trained(tokens)}
    for name, switch in SWITCHES.items():
        with switch(trained):
            expected[name] = trained(tokens)
    before = snapshot(trained)

    def descend(state: str, rest: tuple[str, ...]) -> None:
        assert torch.equal(trained(tokens), expected[state])
        if not rest:
            if fails:
                raise StopHereError
            return
        inside = snapshot(trained)
        try:
            with SWITCHES[rest[0]](trained):
                # What is disabled stays so inside merged(); everything else does as it is told.
                descend("disabled" if "disabled" in (state, rest[0]) else "merged", rest[1:])
        finally:
            assert_unchanged(trained, inside)
        assert torch.equal(trained(tokens), expected[state])

    if fails:
        with pytest.raises(StopHereError):
            descend("active", nesting)
    else:
        descend("active", nesting)
    assert_unchanged(trained, before)
    assert torch.equal(trained(tokens), expected["active"])


@pytest.mark.parametrize("switch", SWITCHES.values(), ids=SWITCHES)
def test_mode_of_a_part_leaves_the_rest_alone(switch, trained):
    with switch(trained.blocks):
        modes = {name: layer.lora_mode for name, layer in lora_layers(trained).items()}
    name = switch.__name__
    assert modes == {"embed": "active", "blocks.0.q_proj": name, "blocks.1.q_proj": name, "head": "active"}


@pytest.mark.parametrize("switch", SWITCHES.values(), ids=SWITCHES)
def test_detach_inside_a_mode_restores_the_base(switch, tiny):
    before = snapshot(tiny)
    attach(tiny, CONFIG)
    with switch(tiny):
        detach(tiny)
    assert_unchanged(tiny, before)


@pytest.mark.parametrize("switch", SWITCHES.values(), ids=SWITCHES)
def test_merge_inside_merged_merges_once(switch, trained):
    twin = copy.deepcopy(trained)
    merge(twin)
    with switch(trained):
        merge(trained)
    assert_same_bits(trained.state_dict(), twin.state_dict())


@pytest.mark.parametrize("switch", SWITCHES.values(), ids=SWITCHES)
def test_copy_made_inside_a_mode_works(switch, trained):
    base = base_of(trained)
    with switch(trained):
        twin = copy.deepcopy(trained)
    detach(twin)
    assert_same_bits(twin.state_dict(), base.state_dict())


@pytest.mark.parametrize("switch", SWITCHES.values(), ids=SWITCHES)
def test_modes_work_in_inference_mode(switch, trained, tokens):
    before = snapshot(trained)
    with torch.inference_mode(), switch(trained):
        trained(tokens)
    assert_unchanged(trained, before)
    trained(tokens).sum().backward()


def test_adapter_cannot_be_loaded_inside_merged(trained):
    state = {name: tensor + 1 for name, tensor in adapter_state_dict(trained).items()}
    with merged(trained), raises_and_changes_nothing(trained, RuntimeError, "merged"):
        load_adapter_state_dict(trained, state)


def test_disabled_restores_tracked_statistics(rng):
    model = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8))
    base, x = copy.deepcopy(model).eval(), torch.randn(4, 8, generator=rng)
    attach(model, LoRAConfig(rank=2, frozen_norm="track"))
    train_all(model, rng)
    model.train()(torch.randn(4, 8, generator=rng) + 3)
    moved = snapshot(model.eval())
    assert not torch.equal(model[1].running_mean, base[1].running_mean)
    with disabled(model):
        assert torch.equal(model(x), base(x))
    assert_unchanged(model, moved)


def test_detach_inside_disabled_restores_tracked_statistics(rng):
    model = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8))
    before = snapshot(model)
    attach(model, LoRAConfig(rank=2, frozen_norm="track"))
    model.train()(torch.randn(4, 8, generator=rng))
    with disabled(model):
        detach(model)
    assert_unchanged(model, before)


@pytest.mark.parametrize("bias", ["lora_only", "all"])
@pytest.mark.parametrize("without", [disabled, partial(scaled, factor=0.0)], ids=["disabled", "scaled"])
def test_no_gradient_of_the_bare_base_reaches_trained_biases(without, bias: str, rng):
    model = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8))
    base, x = copy.deepcopy(model), torch.randn(4, 8, generator=rng)
    attach(model, LoRAConfig(rank=2, bias=bias))
    train_all(model, rng)
    own = model[0].bias
    with torch.no_grad():
        own.add_(1.0)
    with without(model):
        reference = model(x)
        assert model[0].bias is not own
    assert torch.equal(reference, base(x))
    assert not reference.requires_grad
    assert model[0].bias is own
    [gradient] = torch.autograd.grad(((model(x) - reference) ** 2).mean(), own)
    [expected] = torch.autograd.grad(((model(x) - base(x).detach()) ** 2).mean(), own)
    assert torch.equal(gradient, expected)


@pytest.mark.parametrize("inside", [detach, merge])
def test_trained_biases_follow_what_is_done_inside_disabled(inside, rng):
    model = nn.Sequential(nn.Linear(8, 8))
    before = model[0].bias.detach().clone()
    attach(model, LoRAConfig(rank=2, bias="all"))
    train_all(model, rng)
    with torch.no_grad():
        model[0].bias.add_(1.0)
    bias, value = model[0].bias, model[0].bias.detach().clone()
    with disabled(model):
        inside(model)
    assert model[0].bias is bias
    assert torch.equal(bias, before if inside is detach else value)


class Checkpointed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Linear(8, 8), nn.BatchNorm1d(8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return checkpoint(lambda x: torch.tanh(self.norm(self.first(x))), x, use_reentrant=False)


def test_a_recomputation_of_the_bare_base_has_its_statistics(rng):
    model = Checkpointed()
    base, x = copy.deepcopy(model).eval(), torch.randn(4, 8, generator=rng).requires_grad_()
    attach(model, LoRAConfig(rank=2, target_modules=["first"], frozen_norm="track"))
    train_all(model, rng)
    model.train()(torch.randn(16, 8, generator=rng) * 2 + 3)
    model.eval()
    with disabled(model):
        output = model(x)
    [gradient] = torch.autograd.grad((output**3).sum(), x)
    [expected] = torch.autograd.grad((base(x) ** 3).sum(), x)
    assert torch.equal(output, base(x))
    assert torch.equal(gradient, expected)


@pytest.mark.parametrize("verb", [merge, lambda model: merged(model).__enter__()])
def test_nothing_is_merged_on_the_meta_device(verb, tiny):
    """It holds no values: an update that lies there would be lost, and one into weights there would add to nothing."""
    whole, factors, weights = (copy.deepcopy(tiny) for _ in range(3))
    attach(whole.to("meta"), CONFIG)
    attach(factors.to("meta"), CONFIG)
    factors.load_state_dict(tiny.state_dict(), assign=True, strict=False)
    attach(weights, CONFIG)
    weights.embed._parameters["weight"] = nn.Parameter(weights.embed.weight.to("meta"), requires_grad=False)
    for model in (whole, factors, weights):
        with pytest.raises(ValueError, match="of 'embed' is on the meta device, which holds no values"):
            verb(model)
        assert lora_layers(model)


@pytest.mark.parametrize("switch", [disabled, merged])
def test_modes_raise_without_adapters_and_after_a_merge(switch, tiny, tokens):
    output, name = tiny(tokens), switch.__name__
    with raises_and_changes_nothing(tiny, ValueError, f"{name}: TinyModel has no adapters; call"), switch(tiny):
        pass
    with switch(tiny, missing_ok=True):
        assert torch.equal(tiny(tokens), output)
    attach(tiny, CONFIG)
    merge(tiny)
    with raises_and_changes_nothing(tiny, ValueError, r"merged into the weights of .*q_proj"), switch(tiny):
        pass


# --- scaled


@pytest.mark.parametrize("factor", [0.5, -1.0, 3, 1])
def test_scaled_multiplies_the_update(factor: float, rng: torch.Generator):
    model = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 4)).double()
    x = torch.randn(3, 6, dtype=torch.float64)
    attach(model, LoRAConfig(rank=1, alpha=2, adapter_dtype="float64", lora_bias=True))
    train_all(model, rng)
    weights = [layer.weight + factor * layer.scaling * layer.lora.B @ layer.lora.A for layer in model]
    biases = [layer.bias + factor * layer.scaling * layer.lora.bias for layer in model]
    expected = (x @ weights[0].T + biases[0]) @ weights[1].T + biases[1]
    before = model(x)
    with scaled(model, factor):
        torch.testing.assert_close(model(x), expected, rtol=1e-12, atol=1e-12)
        with merged(model):
            torch.testing.assert_close(model(x), expected, rtol=1e-12, atol=1e-12)
    assert torch.equal(model(x), before)


def test_scaled_by_zero_is_the_base_bit_for_bit(rng: torch.Generator):
    model = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 4))
    x = torch.randn(3, 6)
    bare = model(x)
    attach(model, LoRAConfig(rank=1, use_dora=True))
    train_all(model, rng)
    with scaled(model, 0):
        assert torch.equal(model(x), bare)
    assert not torch.equal(model(x), bare)


@pytest.mark.parametrize("factor", [0.5, 0, -0.0, -1.0, -2.5, 1e-8])
@pytest.mark.parametrize(
    "options", [{"use_rslora": True}, {"rank_pattern": {"1": 2}, "lora_bias": True}, {"init": "pissa"}], ids=str
)
def test_a_directory_saved_inside_scaled_holds_the_update_times_the_factor(
    options: dict[str, Any], factor: float, rng: torch.Generator, tmp_path: Path
):
    model, x = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 4)).double(), torch.randn(3, 6, dtype=torch.float64)
    base = copy.deepcopy(model)
    attach(model, LoRAConfig(rank=1, alpha=2, adapter_dtype="float64", **options))
    if "init" in options:
        calibrate(model)
    train_all(model, rng)
    with scaled(model, factor):
        save_adapter(model, tmp_path / "scaled")
        expected = model(x)
    load_adapter(base, tmp_path / "scaled")
    torch.testing.assert_close(base(x), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("options", [{"use_dora": True}, {"trainable_token_indices": {"embed": [1]}}], ids=str)
def test_what_scaled_by_zero_cannot_save_is_refused(options: dict[str, Any], tmp_path: Path):
    model = nn.ModuleDict({"embed": nn.Embedding(4, 6), "linear": nn.Linear(6, 8)})
    attach(model, LoRAConfig(rank=1, target_modules=["linear"], **options))
    with scaled(model, 0), pytest.raises(ValueError, match=r"scaled\(module, 0\) has switched it off.*leave the block"):
        save_adapter(model, tmp_path / "scaled")
    assert not (tmp_path / "scaled").exists()
    save_adapter(model, tmp_path / "scaled")


def test_what_is_scaled_by_zero_is_not_merged(rng: torch.Generator):
    model = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 4))
    attach(model, LoRAConfig(rank=1))
    train_all(model, rng)
    with scaled(model, 0), raises_and_changes_nothing(model, RuntimeError, r"scaled\(module, 0\) leaves nothing"):
        merge(model)


@pytest.mark.parametrize(
    ("config", "factor", "message"),
    [
        (LoRAConfig(rank=1, use_dora=True), 0.5, r"the update of 0, 1 is not proportional"),
        (LoRAConfig(rank=1, bias="lora_only"), 0.5, r"the update of 0.bias, 1.bias is not.*combine\(module"),
        (LoRAConfig(rank=1), float("nan"), "finite number, got nan"),
        (None, 2.0, "scaled: Sequential has no adapters"),
    ],
    ids=["dora", "biases", "nan", "bare"],
)
def test_scaled_refuses_what_has_no_meaning(config: LoRAConfig | None, factor: float, message: str):
    model = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 4))
    if config is not None:
        attach(model, config)
    with pytest.raises(ValueError, match=message), scaled(model, factor):
        pass
