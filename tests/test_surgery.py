"""Attach, detach and merge: each changes what it says and nothing else."""

from __future__ import annotations

import copy
import itertools
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune

from lightning_lora import (
    LoRAConfig,
    adapter_state_dict,
    add_adapter,
    attach,
    detach,
    disabled,
    load_adapter_state_dict,
    lora_layers,
    merge,
    merged,
    save_adapter,
    set_adapter,
    surgery,
)
from lightning_lora.adapted_model import AdaptedModel
from lightning_lora.attachment import get_attachment
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


# --- attach


@pytest.mark.parametrize("options", [{}, {"use_dora": True}, {"modules_to_save": ["head"], "bias": "lora_only"}])
def test_what_is_attached_and_loaded_in_inference_mode_can_train(options, tiny, tokens, rng, tmp_path):
    config = LoRAConfig(rank=2, target_modules=["q_proj"], **options)
    trained = copy.deepcopy(tiny)
    attach(trained, config)
    train_all(trained, rng)
    save_adapter(trained, tmp_path / "saved")
    with torch.inference_mode():
        add_adapter(tiny, "saved", tmp_path / "saved")
        add_adapter(tiny, "another", config)
    assert torch.equal(tiny(tokens), trained(tokens))
    for name in ("saved", "another"):
        set_adapter(tiny, name)
        tiny(tokens).square().sum().backward()
        for parameter in AdaptedModel(tiny).trained.values():
            assert not parameter.is_inference()
            assert parameter.grad is not None


def test_attach_without_options_goes_on_with_those_that_the_module_has(tiny):
    config = LoRAConfig(rank=3, alpha=5.0, target_modules=["q_proj"])
    attach(tiny, config, seed=7)
    before = snapshot(tiny)
    report = attach(tiny)
    assert_unchanged(tiny, before)
    assert [layer.rank for layer in report.layers] == [3, 3]
    with pytest.raises(ValueError, match="already carries adapters with other options"):
        attach(tiny, LoRAConfig())


def test_names_may_come_in_another_order_when_attaching_again(tiny):
    """As those of a directory do, which lists its targets in the order of the alphabet."""
    attach(tiny, LoRAConfig(rank=3, target_modules=["v_proj", "q_proj"], exclude_modules=["blocks.1.*", "head"]))
    before = snapshot(tiny)
    attach(tiny, LoRAConfig(rank=3, target_modules=["q_proj", "v_proj"], exclude_modules=["head", "blocks.1.*"]))
    assert_unchanged(tiny, before)
    with pytest.raises(ValueError, match=r"other options.*target_modules: .* -> "):
        attach(tiny, LoRAConfig(rank=3, target_modules=["q_proj"], exclude_modules=["head", "blocks.1.*"]))


def test_attaching_again_changes_nothing(trained):
    before = snapshot(trained)
    attach(trained, CONFIG)
    assert_unchanged(trained, before)


@pytest.mark.parametrize(
    "layer",
    [nn.LSTM(2, 16), nn.MultiheadAttention(16, 2, kdim=2, vdim=2)],
    ids=lambda layer: type(layer).__name__,
)
def test_attaching_again_leaves_out_the_same_weights_of_a_layer(layer: nn.Module):
    model = copy.deepcopy(nn.ModuleDict({"layer": layer, "head": nn.Linear(16, 16)}))
    config = LoRAConfig(rank=4, target_modules="all")
    first, before = attach(model, config), adapter_state_dict(model)
    second = attach(model, config)
    assert first.left_out
    assert str(second) == str(first)
    assert_same_bits(adapter_state_dict(model), before)


@pytest.mark.parametrize("options", [{}, {"rank": 9}, {"lora_bias": True}], ids=str)
def test_attaching_again_leaves_out_an_embedding_whose_tokens_train(options: dict[str, Any]):
    model = nn.ModuleDict({"words": nn.Embedding(20, 8), "up": nn.Linear(32, 32), "head": nn.Linear(8, 20)})
    if not options:  # a reason of the model instead
        model["head"].weight = model["words"].weight
    config = LoRAConfig(**{"rank": 2} | options, target_modules="all", trainable_token_indices=[1, 3])
    first, before = attach(model, config).left_out, snapshot(model)
    second = attach(model, config).left_out
    assert second.keys() == first.keys()
    assert second["words"] == first["words"]
    assert_unchanged(model, before)


def test_default_config_adapts_all_linear_layers():
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    attach(model)
    assert {layer.rank for layer in lora_layers(model).values()} == {LoRAConfig().rank}
    assert len(lora_layers(model)) == 2


def test_attaching_again_adapts_new_layers(trained, rng):
    state = adapter_state_dict(trained)
    trained.blocks.append(nn.ModuleDict({"q_proj": nn.Linear(16, 16), "act": nn.GELU(), "v_proj": nn.Linear(16, 16)}))
    report = attach(trained, CONFIG)
    assert "blocks.2.q_proj" in lora_layers(trained)
    assert "blocks.2.q_proj" in [layer.name for layer in report.layers]
    assert not trained.blocks[2]["v_proj"].weight.requires_grad
    found = adapter_state_dict(trained)
    assert_same_bits({name: found[name] for name in state}, state)
    detach(trained)
    assert trained.blocks[2]["v_proj"].weight.requires_grad


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"rank": 3}, "rank: 2 -> 3"),
        ({"alpha": 1.0}, "alpha: 3.0 -> 1.0"),
        ({"target_modules": ("head",)}, "target_modules"),
        ({"frozen_norm": "track"}, "frozen_norm: 'eval' -> 'track'"),
    ],
)
def test_attach_with_other_config_names_the_difference(other, message: str, trained):
    options = CONFIG.to_dict() | other
    with raises_and_changes_nothing(trained, ValueError, f"{message}.*[Dd]etach"):
        attach(trained, LoRAConfig(**options))


def test_attach_with_other_seed_is_rejected(trained):
    with raises_and_changes_nothing(trained, ValueError, "seed: 0 -> 1"):
        attach(trained, CONFIG, seed=1)


@pytest.mark.parametrize("config", [{"rank": 2}, 8])
def test_options_of_another_type_are_rejected(config: object, tiny):
    with raises_and_changes_nothing(tiny, TypeError, f"config must be a LoRAConfig, got a {type(config).__name__}"):
        attach(tiny, config)


@pytest.mark.parametrize("first", ["part", "whole"])
def test_part_and_whole_cannot_both_be_adapted(first: str, tiny):
    config = LoRAConfig(rank=2)
    order = [tiny.blocks, tiny] if first == "part" else [tiny, tiny.blocks]
    attach(order[0], config)
    with raises_and_changes_nothing(tiny, ValueError, "already carry adapters.*[Dd]etach"):
        attach(order[1], config)


def test_two_parts_can_be_adapted_separately(tiny, tokens, rng):
    before, output = snapshot(tiny), tiny(tokens)
    attach(tiny.blocks[0], LoRAConfig(rank=2))
    attach(tiny.blocks[1], LoRAConfig(rank=3), seed=4)
    assert {name: layer.rank for name, layer in lora_layers(tiny).items()} == {
        "blocks.0.q_proj": 2,
        "blocks.0.v_proj": 2,
        "blocks.1.q_proj": 3,
        "blocks.1.v_proj": 3,
    }
    train_all(tiny, rng)
    with disabled(tiny):
        assert torch.equal(tiny(tokens), output)
    assert not torch.equal(tiny(tokens), output)
    detach(tiny)
    assert_unchanged(tiny, before)


def test_only_adapters_and_modules_to_save_require_gradients(tiny):
    tiny.norm.weight.requires_grad_(False)
    attach(tiny, LoRAConfig(rank=2, target_modules=["q_proj"], modules_to_save=["norm", "head"]))
    assert {name for name, p in tiny.named_parameters() if p.requires_grad} == {
        "blocks.0.q_proj.lora.A",
        "blocks.0.q_proj.lora.B",
        "blocks.1.q_proj.lora.A",
        "blocks.1.q_proj.lora.B",
        "norm.weight",
        "norm.bias",
        "head.weight",
        "head.bias",
    }


def test_complex_parameters_of_a_module_to_save_train(tiny, tokens):
    tiny.norm.phase = torch.nn.Parameter(torch.ones(3, dtype=torch.complex64))
    frozen = tiny.blocks[0].q_proj.phase = torch.nn.Parameter(torch.ones(3, dtype=torch.complex64))
    attach(tiny, LoRAConfig(rank=2, target_modules=["q_proj"], modules_to_save=["norm"]))
    assert (tiny.norm.phase.requires_grad, frozen.requires_grad) == (True, False)
    assert "norm.phase" in adapter_state_dict(tiny)


def test_training_changes_only_adapters_and_saved_modules(tiny, tokens):
    attach(tiny, LoRAConfig(rank=2, target_modules=["q_proj"], modules_to_save=["head"]))
    before = {name: p.detach().clone() for name, p in tiny.named_parameters()}
    optimizer = torch.optim.AdamW(tiny.parameters(), lr=0.01, weight_decay=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        tiny(tokens).square().mean().backward()
        optimizer.step()
    moved = {name for name, p in tiny.named_parameters() if not torch.equal(p, before[name])}
    assert moved == set(adapter_state_dict(tiny))


def test_hooks_and_flags_keep_working(tiny, tokens):
    seen = []
    tiny.head.register_forward_hook(lambda module, inputs, output: seen.append(type(module).__name__))
    attach(tiny, CONFIG)
    tiny(tokens)
    detach(tiny)
    tiny(tokens)
    assert seen == ["LoRALinear", "Linear"]


def test_adapters_take_over_eval_mode(tiny):
    attach(tiny.eval(), CONFIG)
    assert not any(part.training for part in tiny.modules())


def test_lora_layers_finds_adapters_by_type(trained):
    trained.lora_head = nn.Linear(4, 4)
    trained.lora_head.lora_A = nn.Linear(4, 4)
    assert list(lora_layers(trained)) == ["embed", "blocks.0.q_proj", "blocks.1.q_proj", "head"]
    assert lora_layers(nn.Linear(4, 4)) == {}


# --- detach


@pytest.mark.parametrize("frozen_norm", ["eval", "track"])
def test_detach_restores_classes_keys_flags_attributes_and_bits(frozen_norm: str, rng):
    model = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, 8, bias=False))
    model[0].weight.requires_grad_(False)
    model[1].bias.requires_grad_(False)
    before = snapshot(model)
    attach(model, LoRAConfig(rank=2, frozen_norm=frozen_norm))
    train_all(model, rng)
    for _ in range(3):
        model(torch.randn(4, 8, generator=rng)).sum().backward()
    detach(model)
    assert_unchanged(model, before)


@pytest.mark.parametrize("frozen_norm", ["eval", "track"])
def test_detach_restores_the_state_before_the_first_attach(frozen_norm: str, rng):
    model = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8))
    model[0].bias.requires_grad_(False)
    before, config = snapshot(model), LoRAConfig(rank=2, frozen_norm=frozen_norm)
    for _ in range(3):
        attach(model, config)
        model(torch.randn(4, 8, generator=rng))
    detach(model)
    assert_unchanged(model, before)


def test_detach_keeps_saved_modules_trained(tiny):
    tiny.head.weight.requires_grad_(False)
    attach(tiny, LoRAConfig(rank=2, target_modules=["q_proj"], modules_to_save=["head"]))
    with torch.no_grad():
        tiny.head.weight.fill_(0.5)
    detach(tiny)
    assert (tiny.head.weight == 0.5).all()
    assert not tiny.head.weight.requires_grad
    assert tiny.head.bias.requires_grad


def test_detach_and_attach_starts_over(tiny):
    attach(tiny, CONFIG)
    start = adapter_state_dict(tiny)
    with torch.no_grad():
        tiny.head.lora.A.zero_()
    detach(tiny)
    attach(tiny, CONFIG)
    assert_same_bits(adapter_state_dict(tiny), start)


def test_detaching_twice_raises(tiny):
    before = snapshot(tiny)
    attach(tiny, CONFIG)
    detach(tiny)
    with pytest.raises(ValueError, match="TinyModel has no adapters; call attach"):
        detach(tiny)
    assert_unchanged(tiny, before)


@pytest.mark.parametrize("verb", [detach, merge])
def test_part_of_adapted_module_cannot_be_detached_or_merged(verb: Callable[[nn.Module], None], trained):
    with raises_and_changes_nothing(trained, ValueError, "attached to a parent"):
        verb(trained.blocks)
    with raises_and_changes_nothing(trained, ValueError, "attached to a parent"):
        verb(trained.head)


def test_frozen_part_cannot_be_detached():
    model = nn.Sequential(nn.Linear(8, 8), nn.Sequential(nn.BatchNorm1d(8)))
    attach(model, LoRAConfig(rank=2))
    before = snapshot(model)
    with pytest.raises(ValueError, match="attached to a parent"):
        detach(model[1])
    assert_unchanged(model, before)


def test_parent_of_adapted_module_can_be_detached(tiny):
    before = snapshot(tiny)
    attach(tiny.blocks, LoRAConfig(rank=2))
    detach(tiny)
    assert_unchanged(tiny, before)


# --- merge


def test_merged_model_is_ordinary_and_computes_the_same(trained, tokens):
    output, base = trained(tokens), base_of(trained)
    merge(trained)
    assert torch.allclose(trained(tokens), output, atol=1e-5)
    assert not torch.allclose(trained(tokens), base(tokens), atol=1e-2)
    assert {name: type(part) for name, part in trained.named_modules()} == {
        name: type(part) for name, part in base.named_modules()
    }
    assert list(trained.state_dict()) == list(base.state_dict())
    assert all(p.requires_grad for p in trained.parameters())


def test_merge_changes_only_adapted_weights(trained):
    base, names = base_of(trained), list(lora_layers(trained))
    merge(trained)
    changed = [n for n, tensor in trained.state_dict().items() if not torch.equal(tensor, base.state_dict()[n])]
    assert changed == [f"{name}.weight" for name in names]


def test_merging_twice_raises(trained):
    merge(trained)
    with raises_and_changes_nothing(trained, ValueError, "TinyModel has no adapters"):
        merge(trained)


@pytest.mark.parametrize("change", [merge, detach])
def test_merge_and_detach_without_adapters_raise(change: Callable[[nn.Module], None], tiny):
    with raises_and_changes_nothing(tiny, ValueError, "TinyModel has no adapters; call attach"):
        change(tiny)


def test_detach_after_a_merge_raises(trained):
    merge(trained)
    with raises_and_changes_nothing(trained, ValueError, "merged into the weights of .* cannot be undone"):
        detach(trained)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("factor", ["A", "B"])
@pytest.mark.parametrize("how", ["merge", "merged"])
def test_merge_rejects_non_finite_adapter_before_any_change(value: float, factor: str, how: str, trained):
    with torch.no_grad():
        getattr(trained.head.lora, factor)[0, 0] = value  # the last layer: the others would be merged before it
    del value
    before = {name: p.detach().clone() for name, p in trained.named_parameters() if "lora" not in name}
    with pytest.raises(ValueError, match="'head' holds NaN or infinity"):
        merge(trained) if how == "merge" else merged(trained).__enter__()
    assert_same_bits({n: p for n, p in trained.named_parameters() if "lora" not in n}, before)
    assert len(lora_layers(trained)) == 4


def test_merge_rejects_overflow_before_any_change():
    model = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32)).half()
    attach(model, LoRAConfig(rank=1, alpha=1.0))
    with torch.no_grad():
        model[0].lora.B.fill_(1.0)
        model[1].lora.B.fill_(1e4)
        model[1].lora.A.fill_(1e4)  # 1e8 is finite in float32 and infinite in float16
    with raises_and_changes_nothing(model, ValueError, "'1'"):
        merge(model)


def test_merge_rejects_parametrized_weight_before_any_change():
    class Doubled(nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            return 2 * weight

    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    parametrize.register_parametrization(model[1], "weight", Doubled())
    attach(model, LoRAConfig(rank=2))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    with pytest.raises(RuntimeError, match=r"'1'.*parametrization"):
        merge(model)
    assert_same_bits(dict(model.named_parameters()), before)
    assert len(lora_layers(model)) == 2


@pytest.mark.parametrize("norm", ["weight_norm", "spectral_norm"])
@pytest.mark.parametrize("how", ["hook", "parametrization"])
@pytest.mark.filterwarnings("ignore:.*weight_norm.*is deprecated")
def test_computed_weight_merges_after_following_the_advice(norm: str, how: str, rng):
    make = getattr(nn.utils if how == "hook" else nn.utils.parametrizations, norm)
    model, config = nn.Sequential(make(nn.Linear(8, 8)), nn.Linear(8, 8)).eval(), LoRAConfig(rank=2)
    x = torch.randn(3, 8, generator=rng)
    attach(model, config)
    train_all(model, rng)
    expected = model(x)
    with pytest.raises(RuntimeError, match=f"remove_{norm}" if how == "hook" else "remove_parametrizations"):
        merge(model)
    if how == "hook":
        getattr(nn.utils, f"remove_{norm}")(model[0])
    else:
        adapters = adapter_state_dict(model)
        detach(model)
        parametrize.remove_parametrizations(model[0], "weight")
        attach(model, config)
        load_adapter_state_dict(model, adapters)
    merge(model)
    assert type(model[0]) is nn.Linear
    torch.testing.assert_close(model(x), expected)


def test_pruned_weight_merges_after_following_the_advice(rng):
    model, x = nn.Sequential(nn.Linear(8, 8)), torch.randn(3, 8, generator=rng)
    prune.l1_unstructured(model[0], "weight", amount=0.5)
    attach(model, LoRAConfig(rank=2))
    train_all(model, rng)
    expected = model(x)
    with pytest.raises(RuntimeError, match=r"prune\.remove\(layer, 'weight'\)"):
        merge(model)
    prune.remove(model[0], "weight")
    merge(model)
    torch.testing.assert_close(model(x), expected)


def test_complex_weight_is_not_called_quantized(rng):
    model = nn.Sequential(nn.Linear(8, 8, dtype=torch.complex64))
    attach(model, LoRAConfig(rank=2))
    train_all(model, rng)
    with raises_and_changes_nothing(model, RuntimeError, "'0' is complex"):
        merge(model)


def test_dropout_of_a_complex_layer_is_refused():
    model = nn.Sequential(nn.Linear(8, 8, dtype=torch.complex64))
    with raises_and_changes_nothing(
        model, ValueError, "'0' cannot be adapted: torch has no dropout for complex inputs"
    ):
        attach(model, LoRAConfig(rank=2, target_modules=["0"], dropout=0.1))


def test_a_precision_that_safetensors_lacks_is_named(tmp_path):
    model = nn.Sequential(nn.Linear(8, 8, dtype=torch.complex128), nn.Linear(8, 8, dtype=torch.complex128))
    attach(model, LoRAConfig(rank=2, target_modules=["0"], modules_to_save=["1"]))
    with raises_and_changes_nothing(model, ValueError, r"has no such precision: .*1\.weight \(complex128\)"):
        save_adapter(model, tmp_path / "adapter")
    assert list(tmp_path.iterdir()) == []


def test_factors_of_complex_weights_have_their_precision():
    for dtype, real in ((torch.complex64, torch.float32), (torch.complex128, torch.float64)):
        model = nn.Sequential(nn.Linear(8, 8, dtype=dtype))
        attach(model, LoRAConfig(rank=2))
        assert model[0].lora.A.dtype == real


class QuantizedLinear(nn.Linear):
    """A user's eight-bit layer: codes and one step."""

    def __init__(self, *sizes: int) -> None:
        super().__init__(*sizes)
        self.step = self.weight.abs().max().item() / 127
        self.weight = nn.Parameter((self.weight / self.step).round().to(torch.int8), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight * self.step, self.bias)


@pytest.mark.parametrize("how", ["merge", "merged"])
def test_quantized_weight_trains_but_does_not_merge(how: str, rng):
    model, x = nn.Sequential(nn.Linear(8, 8), QuantizedLinear(8, 8)), torch.randn(3, 8, generator=rng)
    attach(model, LoRAConfig(rank=2))
    train_all(model, rng)
    before, output = snapshot(model), model(x)
    with pytest.raises(RuntimeError, match="'1'"):
        merge(model) if how == "merge" else merged(model).__enter__()
    assert_unchanged(model, before)
    assert torch.equal(model(x), output)


def test_merging_ignores_dropout_and_mode(tiny, rng):
    attach(tiny, LoRAConfig(rank=2, target_modules=["q_proj"], dropout=0.5))
    train_all(tiny, rng)
    results = []
    for training in (True, False, True):
        twin = copy.deepcopy(tiny).train(training)
        merge(twin)
        results.append(twin.state_dict())
    assert_same_bits(results[0], results[1])
    assert_same_bits(results[0], results[2])


def test_merged_model_can_be_adapted_again(trained, tokens, rng):
    merge(trained)
    output = trained(tokens)
    attach(trained, CONFIG, seed=1)
    assert torch.equal(trained(tokens), output)
    train_all(trained, rng)
    assert not torch.equal(trained(tokens), output)
    with disabled(trained):
        assert torch.equal(trained(tokens), output)


def test_merged_model_rejects_an_adapter(trained):
    state = adapter_state_dict(trained)
    merge(trained)
    with raises_and_changes_nothing(trained, RuntimeError, "already merged into embed, blocks.0.q_proj"):
        load_adapter_state_dict(trained, state)
    attach(trained, CONFIG)
    with raises_and_changes_nothing(trained, RuntimeError, "already merged"):
        load_adapter_state_dict(trained, state)


def test_merge_count_survives_a_copy(trained):
    state = adapter_state_dict(trained)
    merge(trained)
    with pytest.raises(RuntimeError, match="already merged"):
        load_adapter_state_dict(copy.deepcopy(trained), state)


# --- memory and precision of merge


class Stack(nn.Module):
    """A parameter to be named by itself."""

    def __init__(self, *shape: int, is_transposed: bool = False) -> None:
        super().__init__()
        self.weight, self.is_transposed = nn.Parameter(torch.randn(shape)), is_transposed


class Conv1D(nn.Module):
    """A linear layer as transformers' GPT-2 stores it."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.nf = nn.Parameter(torch.randn(1024, 4096)), 4096


LAYER = {"target_modules": ["0"]}
NAMED = {"target_modules": [], "target_parameters": ["0.weight"]}
SLICED = {"target_modules": [], "target_slices": {"0": {"a": "3:1200", "b": "1300::2"}}}
LARGE: dict[str, tuple[Callable[[], nn.Module], dict[str, Any]]] = {
    "linear": (lambda: nn.Linear(1024, 4096), LAYER),
    "embedding": (lambda: nn.Embedding(4096, 1024), LAYER),
    "slices": (lambda: nn.Linear(1024, 4096), SLICED),
    "slices of a transposed weight": (Conv1D, SLICED),
    "DoRA": (lambda: nn.Linear(1024, 4096), LAYER | {"use_dora": True}),
    "slices with DoRA": (lambda: nn.Linear(1024, 4096), SLICED | {"use_dora": True}),
    "DoRA on a transposed weight": (Conv1D, LAYER | {"use_dora": True}),
    "convolution": (lambda: nn.Conv2d(512, 1024, 3, groups=2), LAYER),
    "transposed convolution": (lambda: nn.ConvTranspose2d(1024, 512, 3, groups=2), LAYER),
    "attention": (lambda: nn.MultiheadAttention(1024, 8), LAYER | {"exclude_modules": ["out_proj"]}),
    "slices of attention": (lambda: nn.MultiheadAttention(1024, 8), SLICED),
    "bilinear": (lambda: nn.Bilinear(64, 64, 1024), LAYER),
    "few experts": (lambda: Stack(2, 1024, 2048), NAMED),
    "many transposed experts": (lambda: Stack(64, 256, 256, is_transposed=True), NAMED),
    "tokens": (lambda: nn.Embedding(4096, 1024), {"target_modules": [], "trainable_token_indices": [3, 700, 4095]}),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", LARGE)
def test_merge_makes_no_tensor_of_the_weights_size(kind, dtype):
    make, options = LARGE[kind]
    model = nn.Sequential(make()).to(dtype)
    attach(model, LoRAConfig(**({"rank": 4} | options)))
    for parameter in [p for p in model.parameters() if p.requires_grad]:
        with torch.no_grad():
            parameter.add_(torch.randn_like(parameter) / 4)
    [name] = model[0].adapted_parameters()
    weight, adapters = model[0]._parameters[name], model[0].adapters_of(name)
    exact = weight.detach().double()
    for adapter in adapters:
        exact = copy.deepcopy(adapter).double().combined(exact).detach()  # whole, as the layers' own tests assert it
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as seen:
        merge(model)
    made = max(event.self_cpu_memory_usage for event in seen.events())
    assert made <= 2**19 + 2**15 < weight.nbytes  # one block of float32; vectors of a row's and a column's length
    assert model[0]._parameters[name] is weight
    assert ((weight - exact).abs() <= torch.finfo(dtype).eps * exact.abs() + 1e-5).all()


@pytest.mark.parametrize("use_dora", [False, True])
@pytest.mark.parametrize("layer", [nn.Linear(16, 24), nn.MultiheadAttention(16, 2)], ids=["linear", "attention"])
def test_merge_under_autocast_gives_the_same_bits(layer, use_dora, rng):
    model = nn.Sequential(copy.deepcopy(layer))
    attach(model, LoRAConfig(rank=2, target_modules=["0"], use_dora=use_dora))
    train_all(model, rng)
    other = copy.deepcopy(model)
    merge(model)
    with torch.autocast("cpu", torch.bfloat16):
        merge(other)
    assert_same_bits(other.state_dict(), model.state_dict())


# --- an attach that fails


class Everything(nn.Module):
    """Something of all that attaching changes: tied and untied weights, norms, biases, tokens, attention."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.out = nn.Embedding(9, 8), nn.Linear(8, 9, bias=False)
        self.out.weight = self.tokens.weight
        self.first, self.second, self.third = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.second.weight = self.first.weight
        self.attention, self.recurrent = nn.MultiheadAttention(8, 2), nn.LSTM(8, 8)
        self.norm = nn.BatchNorm1d(8)
        self.first.weight.requires_grad_(False)


EVERYTHING = {
    "rank": 1,
    "target_modules": ["first", "third", "attention", "recurrent"],
    "untie_weights": True,
    "bias": "lora_only",
    "trainable_token_indices": {"tokens": [1, 2]},
}


def _fail_at(monkeypatch: pytest.MonkeyPatch, name: str, call: int) -> None:
    """Make the given call of a step of ``attach`` raise, after the step."""
    step, calls = getattr(surgery, name), itertools.count()

    def failing(*args: Any) -> Any:
        result = step(*args)
        if next(calls) == call:
            raise KeyboardInterrupt
        return result

    monkeypatch.setattr(surgery, name, failing)


@pytest.mark.parametrize(
    ("name", "call"),
    [
        *(("swap_in", i) for i in range(7)),
        *(("_swap_in_adapters", i) for i in range(6)),
        *((name, 0) for name in ("_set_parameter", "set_attachment", "_freeze_parameters", "freeze_norms")),
    ],
)
def test_attach_that_fails_undoes_itself(name: str, call: int, monkeypatch):
    model, config = Everything(), LoRAConfig(**EVERYTHING)
    with raises_and_changes_nothing(model, KeyboardInterrupt):
        _fail_at(monkeypatch, name, call)
        attach(model, config)
    monkeypatch.undo()
    assert len(attach(model, config).layers) == 7
    model.more = nn.ModuleDict({"third": nn.Linear(8, 8)})  # what a second attach adapts
    values = set(get_attachment(model).base_values)
    with raises_and_changes_nothing(model, KeyboardInterrupt):
        _fail_at(monkeypatch, name if name != "_set_parameter" else "set_attachment", 0)
        attach(model, config)
    assert set(get_attachment(model).base_values) == values


def test_class_that_cannot_be_derived_from_leaves_the_model_unchanged():
    class Final(nn.Linear):
        def __init_subclass__(cls) -> None:
            raise TypeError("Final is final")

    model = nn.Sequential(nn.Linear(4, 4), Final(4, 4), nn.Linear(4, 4))
    with raises_and_changes_nothing(model, TypeError, "Final is final"):
        attach(model, LoRAConfig(rank=1))


# --- transformers models that resize their embeddings


@pytest.mark.parametrize("target", ["embed_tokens", "lm_head"])
def test_resizing_adapted_embeddings_raises_at_once(target: str) -> None:
    model = tiny_llama()
    attach(model, LoRAConfig(rank=2, target_modules=[target]))
    before = snapshot(model)
    for holder in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        with pytest.raises(RuntimeError, match=r"this LlamaForCausalLM carry LoRA adapters.*Resize before"):
            holder.resize_token_embeddings(40)
    with pytest.raises(RuntimeError, match="Resize before attaching"):
        model.resize_token_embeddings(pad_to_multiple_of=8)
    model.resize_token_embeddings(len(model.get_input_embeddings().weight))  # as it is
    assert_unchanged(model, before)
    detach(model)
    model.resize_token_embeddings(40)
    assert model.get_output_embeddings().out_features == 40


def test_embeddings_without_adapters_can_be_resized() -> None:
    model = tiny_llama()
    attach(model, LoRAConfig(rank=2, target_modules=["q_proj"]))
    model.resize_token_embeddings(40)
    assert model(torch.tensor([[39]])).logits.shape[-1] == 40
    assert len(adapter_state_dict(model)) == 2


def tiny_llama() -> Any:
    transformers = pytest.importorskip("transformers")
    sizes = {"vocab_size": 30, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, **heads))
