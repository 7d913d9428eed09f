"""The laws that every adapted layer obeys, whatever its kind and precision."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from torch import nn

from lightning_lora import (
    LoRAConfig,
    LoRALayer,
    adapter_state_dict,
    attach,
    detach,
    disabled,
    load_adapter_state_dict,
    lora_layers,
    merge,
    merged,
)
from tests.contract import (
    CASES,
    PADDING,
    RANK,
    SCALING,
    Case,
    Holder,
    assert_same_bits,
    assert_unchanged,
    each_case,
    error,
    snapshot,
    stored_weight,
    train,
)

FACTORS = ["layer.lora.A", "layer.lora.B"]


@each_case
@pytest.mark.parametrize("training", [True, False])
def test_attach_keeps_output_bit_equal(case: Case, training: bool, rng):
    model, x = case.base().train(training), case.inputs(rng)
    before = model(x)
    attach(model, case.config)
    assert torch.equal(model(x), before)


@each_case
def test_one_factor_starts_at_zero(case: Case):
    lora = case.attached().layer.lora
    zero, random = (lora.A, lora.B) if case.random_factor_is_b else (lora.B, lora.A)
    assert zero.count_nonzero() == 0
    assert random.count_nonzero() == random.numel()
    assert lora.zero_factor() is zero


@each_case
def test_gradients_reach_adapter_only(case: Case, rng):
    model = case.trained(rng)
    model(case.inputs(rng)).float().square().sum().backward()
    assert [name for name, p in model.named_parameters() if p.requires_grad] == FACTORS
    assert [name for name, p in model.named_parameters() if p.grad is not None] == FACTORS
    assert all(p.grad.count_nonzero() > 0 for p in model.layer.lora.parameters())


@each_case
def test_forward_matches_dense_sum(case: Case, rng):
    model, x = case.trained(rng), case.inputs(rng)
    layer, base = model.layer, case.base().layer
    base.load_state_dict(layer.state_dict(), strict=False)
    truth = case.dense(layer, x, layer.lora.A, layer.lora.B)
    found = model(x)
    assert found.dtype == case.dtype
    assert error(found, truth) <= case.tolerance
    assert error(base(x), truth) > 10 * case.tolerance  # the adapter is what makes the difference


@each_case
def test_merged_forward_matches_dense_sum(case: Case, rng):
    model, x = case.trained(rng), case.inputs(rng)
    truth = case.dense(model.layer, x, model.layer.lora.A, model.layer.lora.B)
    with merged(model):
        inside = model(x)
    merge(model)
    assert torch.equal(model(x), inside)
    assert error(inside, truth) <= case.tolerance


@each_case
def test_factor_gradients_match_dense_sum(case: Case, rng):
    model, x = case.trained(rng), case.inputs(rng)
    lora = model.layer.lora
    A, B = (factor.detach().double().requires_grad_() for factor in (lora.A, lora.B))
    truth = case.dense(model.layer, x, A, B)
    cotangent = torch.randn(truth.shape, generator=rng).to(case.dtype)
    truth.backward(cotangent.double())
    model(x).backward(cotangent)
    assert error(lora.A.grad, A.grad) <= case.tolerance
    assert error(lora.B.grad, B.grad) <= case.tolerance
    assert lora.A.grad.dtype == lora.A.dtype


@pytest.mark.parametrize("case", [case for case in CASES if not case.spec.takes_tokens], ids=str)
def test_input_gradient_matches_dense_sum(case: Case, rng):
    model, x = case.trained(rng), case.inputs(rng).requires_grad_()
    twin = x.detach().double().requires_grad_()
    truth = case.dense(model.layer, twin, model.layer.lora.A, model.layer.lora.B)
    cotangent = torch.randn(truth.shape, generator=rng).to(case.dtype)
    truth.backward(cotangent.double())
    model(x).backward(cotangent)
    assert error(x.grad, twin.grad) <= case.tolerance


@each_case
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("grad_mode", [nullcontext, torch.no_grad, torch.inference_mode])
def test_adapter_acts_in_every_mode(case: Case, training: bool, grad_mode, rng):
    model, x = case.trained(rng), case.inputs(rng)
    truth = case.dense(model.layer, x, model.layer.lora.A, model.layer.lora.B)
    with grad_mode():
        output = model.train(training)(x)
    assert error(output, truth) <= case.tolerance


@each_case
def test_detach_leaves_no_trace(case: Case, rng):
    model = case.base()
    model.neighbor.bias.requires_grad_(False)
    before = snapshot(model)
    attach(model, case.config)
    train(model.layer, rng)
    model(case.inputs(rng)).sum().backward()
    detach(model)
    if case.kind == "own forward":
        assert model.layer.calls == 1
    assert_unchanged(model, before)
    assert lora_layers(model) == {}


@each_case
def test_base_keys_and_tensors_stay(case: Case):
    model = case.base()
    keys, tensors = list(model.state_dict()), dict(model.named_parameters())
    attach(model, case.config)
    assert [key for key in model.state_dict() if key in keys] == keys
    assert [key for key in model.state_dict() if key not in keys] == FACTORS
    assert all(parameter is tensors[name] for name, parameter in model.named_parameters() if name in tensors)


@each_case
def test_base_state_dict_loads_into_adapted_model(case: Case, rng):
    state, model = case.base().state_dict(), case.trained(rng)
    outcome = model.load_state_dict(state, strict=False)
    assert (outcome.missing_keys, outcome.unexpected_keys) == (FACTORS, [])
    assert torch.equal(stored_weight(model.layer), state["layer.weight"])


@each_case
def test_adapter_state_round_trip(case: Case, rng):
    model, x = case.trained(rng), case.inputs(rng)
    state = adapter_state_dict(model)
    fresh = case.base()
    fresh.load_state_dict(model.state_dict(), strict=False)
    attach(fresh, case.config)
    assert not torch.equal(fresh(x), model(x))
    load_adapter_state_dict(fresh, state)
    assert torch.equal(fresh(x), model(x))
    assert_same_bits(adapter_state_dict(fresh), state)


@each_case
def test_adapted_layer_keeps_its_class(case: Case):
    kind = type(case.base().layer)
    layer = case.attached().layer
    assert isinstance(layer, kind)
    assert isinstance(layer, LoRALayer)
    assert type(layer).__module__ == kind.__module__


@each_case
@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["deepcopy", "pickle"]
)
def test_deepcopy_is_independent(case: Case, copied, rng):
    model, x = case.trained(rng), case.inputs(rng)
    twin, output = copied(model), model(x)
    assert type(twin.layer) is type(model.layer)
    assert torch.equal(twin(x), output)
    with torch.no_grad():
        twin.layer.lora.A.add_(1.0)
        twin.layer.lora.B.add_(1.0)
    assert not torch.equal(twin(x), output)
    assert torch.equal(model(x), output)
    detach(twin)
    assert type(twin.layer) is type(case.base().layer)
    assert isinstance(model.layer, LoRALayer)


@pytest.mark.slow
@pytest.mark.usual_paths
def test_pickle_works_in_fresh_process(tmp_path: Path, rng):
    models = [case.trained(rng) for case in CASES]
    inputs = [case.inputs(rng) for case in CASES]
    torch.save([models, inputs, [model(x) for model, x in zip(models, inputs, strict=True)]], tmp_path / "models")
    script = """
import sys, torch
from lightning_lora import detach, lora_layers
for model, x, y in zip(*torch.load(sys.argv[1], weights_only=False), strict=True):
    assert torch.equal(model(x), y)
    assert list(lora_layers(model)) == ["layer"]
    detach(model)
    assert not torch.equal(model(x), y)
"""
    path = {"PYTHONPATH": str(Path(__file__).parents[1]), "OMP_NUM_THREADS": "1", "PATH": ""}
    command = [sys.executable, "-c", script, str(tmp_path / "models")]
    outcome = subprocess.run(command, env=path, capture_output=True, text=True, check=False)
    assert outcome.returncode == 0, outcome.stderr


@each_case
def test_merged_and_disabled_restore_every_bit(case: Case, rng):
    model, x = case.trained(rng), case.inputs(rng)
    before, output = snapshot(model), model(x)
    with merged(model):
        assert not torch.equal(stored_weight(model.layer), before["bits"]["layer.weight"])
    assert_unchanged(model, before)
    with disabled(model):
        base_output = model(x)
    assert_unchanged(model, before)
    assert torch.equal(model(x), output)
    detach(model)
    assert torch.equal(model(x), base_output)
    assert not torch.equal(output, base_output)


@each_case
def test_merged_weight_is_float64_sum_rounded_once(case: Case, rng):
    model = case.trained(rng)
    layer, W = model.layer, stored_weight(model.layer).clone().double()
    A, B = (factor.detach().double() for factor in (layer.lora.A, layer.lora.B))
    terms = case.stored(layer, SCALING * B.abs() @ A.abs())
    truth = W + case.stored(layer, SCALING * B @ A)
    merge(model)
    # The sum is made in float32 (float64 for float64) and then rounded to the weight's own precision. A float32 sum of
    # rank + 1 terms is off by at most that many roundings of its terms, however these cancel.
    sum_dtype = torch.promote_types(case.dtype, torch.float32)
    in_sum = (RANK + 2) * torch.finfo(sum_dtype).eps * (W.abs() + terms)
    in_cast = 0.0 if case.dtype == sum_dtype else torch.finfo(case.dtype).eps / 2 * truth.abs()
    assert ((layer.weight.double() - truth).abs() <= in_sum + in_cast).all()
    if case.dtype == torch.bfloat16:  # all but those that a float32 error carries over the middle
        assert (layer.weight == truth.to(torch.bfloat16)).double().mean() > 0.99


@each_case
def test_delta_weight_is_scaled_product(case: Case, rng):
    layer = case.trained(rng).layer
    D = case.stored(layer, 1.5 * layer.lora.B.detach().double() @ layer.lora.A.detach().double())
    found = layer.delta_weight()
    assert found.shape == layer.weight.shape
    assert found.dtype == (torch.float64 if case.dtype == torch.float64 else torch.float32)
    assert not found.requires_grad
    assert error(found, D) <= 1e-6


@each_case
def test_tied_weight_refused(case: Case):
    model = case.base()
    model.tied = nn.Linear(1, 1)
    model.tied.weight = model.layer.weight
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"'layer' cannot be adapted: its weight is tied to 'tied.weight'"):
        attach(model, case.config)
    assert_unchanged(model, before)


@each_case
def test_start_ignores_other_targets(case: Case):
    alone, beside = case.base(), case.base()
    torch.manual_seed(5)
    attach(alone, case.config)
    attach(beside, LoRAConfig(rank=4, alpha=6.0, target_modules=["neighbor", "layer"]))
    assert_same_bits(alone.layer.lora.state_dict(), beside.layer.lora.state_dict())


@each_case
def test_factors_keep_dtype_when_model_is_cast(case: Case):
    model = case.attached()
    kept = torch.float64 if case.dtype == torch.float64 else torch.float32
    start = {name: factor.clone() for name, factor in model.layer.lora.state_dict().items()}
    for change in (Holder.half, Holder.bfloat16, lambda m: m.to(torch.float16), lambda m: m.to("cpu", torch.bfloat16)):
        change(model)
        assert model.layer.weight.dtype != kept
        assert_same_bits(model.layer.lora.state_dict(), start)
    model.double()
    assert {factor.dtype for factor in model.layer.lora.parameters()} == {torch.float64}
    model.to(case.dtype)
    assert_same_bits(model.layer.lora.state_dict(), start)


@each_case
def test_meta_model_starts_as_real_one(case: Case):
    model = case.attached()
    with torch.device("meta"):
        meta = case.base()
    attach(meta, case.config)
    assert {factor.device.type for factor in meta.layer.lora.parameters()} == {"meta"}
    meta.to_empty(device="cpu")
    for part in meta.modules():
        if hasattr(part, "reset_parameters"):
            part.reset_parameters()
    assert_same_bits(meta.layer.lora.state_dict(), model.layer.lora.state_dict())


@each_case
def test_optimizer_step_moves_adapter_only(case: Case, rng):
    model, x = case.trained(rng), case.inputs(rng)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.1)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    model(x).float().square().sum().backward()
    optimizer.step()
    moved = [name for name, p in model.named_parameters() if not torch.equal(p, before[name])]
    assert moved == FACTORS
    if case.kind == "padded embedding":
        assert model.layer.lora.A[:, PADDING].count_nonzero() == 0
