"""Updates that start from factors whose product is not zero: ``scaling * (B @ A - B0 @ A0)``, on an untouched base."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lightning_lora as ll
from lightning_lora.layers import LowRankAdapter
from lightning_lora.layers.starts import pissa
from lightning_lora.loading import read_adapter
from lightning_lora.trainer.warm_start import start_from
from tests.files import run, tensors_of, write_checkpoint


class Model(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Any:
        found = self.layer(x, x, x)[0] if isinstance(self.layer, nn.MultiheadAttention) else self.layer(x)
        return found[0] if isinstance(found, tuple) else found


LAYERS = {
    "linear": (lambda: nn.Linear(6, 5), (2, 3, 6)),
    "conv": (lambda: nn.Conv2d(4, 6, 3, groups=2), (2, 4, 5, 5)),
    "transposed convolution": (lambda: nn.ConvTranspose1d(4, 6, 3), (2, 4, 5)),
    "attention": (lambda: nn.MultiheadAttention(8, 2), (3, 2, 8)),
    "lstm": (lambda: nn.LSTM(6, 5, batch_first=True), (2, 3, 6)),
}
kinds = pytest.mark.parametrize("kind", LAYERS)
OPTIONS: list[dict[str, Any]] = [{}, {"use_dora": True}, {"use_rslora": True}]


def started(kind: str, **options: Any) -> tuple[Model, Tensor]:
    """Return a model whose adapters start from random factors, and an input."""
    torch.manual_seed(0)
    make, shape = LAYERS[kind]
    model = Model(make()).double()
    ll.attach(model, ll.LoRAConfig(rank=2, init="pissa", target_modules=["layer"], **options))
    for adapter in adapters_of(model):
        adapter.put_start(torch.randn_like(adapter.A), torch.randn_like(adapter.B))
        adapter.is_waiting = False
    return model, torch.randn(shape, dtype=torch.float64)


def adapters_of(model: nn.Module) -> list[LowRankAdapter]:
    return [each for each in model.modules() if isinstance(each, LowRankAdapter)]


def trained(model: nn.Module) -> None:
    with torch.no_grad():
        for adapter in adapters_of(model):
            adapter.A.add_(0.3 * torch.randn_like(adapter.A))
            adapter.B.add_(0.3 * torch.randn_like(adapter.B))


@kinds
@pytest.mark.parametrize("options", OPTIONS)
def test_the_start_leaves_the_output_as_it_is_bit_for_bit(kind: str, options: dict[str, Any]):
    if kind == "transposed convolution" and "use_dora" in options:
        options = {}  # which it does not have
    model, x = started(kind, **options)
    base = copy.deepcopy(model)
    ll.detach(base)
    if "use_dora" in options:  # the ratio of norms is 1 up to rounding, as with any start
        torch.testing.assert_close(model(x), base(x))
    else:
        assert torch.equal(model(x), base(x))


@kinds
@pytest.mark.parametrize("options", OPTIONS)
def test_trained_output_and_gradients_equal_the_dense_model(kind: str, options: dict[str, Any]):
    if kind != "linear" and "use_dora" in options:
        options = {}
    model, x = started(kind, **options)
    trained(model)
    dense = copy.deepcopy(model)
    ll.detach(dense)
    leaves, weights = [], {}
    for name, layer in ll.lora_layers(model).items():
        for adapter in layer.adapters().values():
            assert isinstance(adapter, LowRankAdapter)
            A, B = (factor.detach().clone().requires_grad_() for factor in (adapter.A, adapter.B))
            leaves.append((adapter, A, B))
            weight = dense.get_submodule(name).get_parameter(adapter.parameter)
            matrix = adapter.as_matrix(weight.detach())
            total = matrix + adapter.spec.scaling * (B @ A - adapter.B0 @ adapter.A0)
            if adapter.spec.use_dora:
                norms = total.norm(dim=1, keepdim=True).detach()
                total = adapter.magnitude.detach().unsqueeze(1) * total / norms
            weights[f"{name}.{adapter.parameter}"] = adapter.as_stored(total)
    expected = torch.func.functional_call(dense, weights, (x,))
    torch.testing.assert_close(model(x), expected)
    probe = torch.randn_like(expected)
    (model(x) * probe).sum().backward()
    (expected * probe).sum().backward()
    for adapter, A, B in leaves:
        torch.testing.assert_close(adapter.A.grad, A.grad)
        torch.testing.assert_close(adapter.B.grad, B.grad)


@kinds
def test_merging_gives_the_same_function(kind: str):
    model, x = started(kind)
    trained(model)
    expected = model(x)
    with ll.merged(model):
        torch.testing.assert_close(model(x), expected)
    torch.testing.assert_close(model(x), expected)
    ll.merge(model)
    torch.testing.assert_close(model(x), expected)


def test_the_base_is_never_written_and_comes_back():
    model, _ = started("linear")
    before = LAYERS["linear"]
    torch.manual_seed(0)
    weight = before[0]().double().weight
    trained(model)
    assert torch.equal(dict(model.named_parameters())["layer.weight"], weight)
    ll.detach(model)
    assert torch.equal(model.layer.weight, weight)


def test_several_such_adapters_share_one_base():
    model, x = started("linear")
    trained(model)
    first = model(x)
    base = copy.deepcopy(model)
    ll.detach(base)
    ll.add_adapter(model, "b", ll.LoRAConfig(rank=1, init="olora", target_modules=["layer"]))
    ll.set_adapter(model, "b")
    for adapter in adapters_of(model):
        if adapter.spec.rank == 1:
            adapter.put_start(torch.randn_like(adapter.A), torch.randn_like(adapter.B))
            adapter.is_waiting = False
    assert torch.equal(model(x), base(x))
    ll.set_adapter(model, "default")
    assert torch.equal(model(x), first)


@pytest.mark.parametrize("options", [{}, {"use_rslora": True}, {"target_slices": {"layer": {"q": "0:4", "v": "5:9"}}}])
def test_peft_loads_the_export_at_twice_the_rank_with_the_same_output(tmp_path: Path, options: dict[str, Any]):
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    model = Model(nn.Linear(12, 10))
    targets = {"target_modules": []} if "target_slices" in options else {"target_modules": ["layer"]}
    ll.attach(model, ll.LoRAConfig(rank=2, init="pissa", **targets, **options))
    for adapter in adapters_of(model):
        adapter.put_start(torch.randn_like(adapter.A), torch.randn_like(adapter.B))
        adapter.is_waiting = False
    trained(model)
    x = torch.randn(4, 12)
    expected = model(x)
    ll.save_adapter(model, tmp_path)
    ll.detach(model)
    loaded = peft.PeftModel.from_pretrained(model, tmp_path)
    torch.testing.assert_close(loaded(x), expected)


def test_an_adapter_that_trained_is_told_from_one_that_did_not():
    model, _ = started("linear")
    [adapter] = adapters_of(model)
    assert not adapter.has_effect(model.layer.weight)
    trained(model)
    assert adapter.has_effect(model.layer.weight)


def test_a_saved_state_holds_the_start_and_restores_the_function():
    model, x = started("linear")
    trained(model)
    expected, state = model(x), ll.adapter_state_dict(model)
    assert {name.rpartition(".")[2] for name in state} == {"A", "B", "A0", "B0"}
    other, _ = started("linear")
    ll.load_adapter_state_dict(other, state)
    assert torch.equal(other(x), expected)


# --- waiting for the start


def waiting() -> Model:
    model = Model(nn.Linear(6, 5))
    ll.attach(model, ll.LoRAConfig(rank=2, init="eva", target_modules=["layer"]))
    return model


def test_training_without_the_promised_start_is_refused():
    model = waiting()
    with pytest.raises(RuntimeError, match=r"init='eva' is computed before training.*calibrate\(model, batches\)"):
        model(torch.ones(1, 6))


def test_a_model_that_waits_computes_the_base():
    model = waiting().eval()
    base = copy.deepcopy(model)
    ll.detach(base)
    assert torch.equal(model(torch.ones(1, 6)), base(torch.ones(1, 6)))


def test_loading_values_ends_the_wait():
    model, other = waiting(), waiting()
    state = {name: torch.ones_like(tensor) for name, tensor in other.state_dict().items() if ".lora." in name}
    ll.load_adapter_state_dict(model, state)
    model(torch.ones(1, 6))


def test_loading_the_whole_state_ends_the_wait():
    model = waiting()
    model.load_state_dict(waiting().state_dict())
    model(torch.ones(1, 6))


def test_loading_the_base_alone_does_not_end_the_wait():
    model = waiting()
    model.load_state_dict({"layer.weight": torch.ones(5, 6)}, strict=False)
    with pytest.raises(RuntimeError, match="init='eva'"):
        model(torch.ones(1, 6))


@pytest.mark.parametrize("use", [ll.adapter_state_dict, ll.merge, lambda model: ll.save_adapter(model, "never")])
def test_an_adapter_without_its_start_is_neither_saved_nor_merged(use: Any):
    with pytest.raises(RuntimeError, match=r"layer.*init='eva'.*calibrate"):
        use(waiting())


def test_what_peft_can_hold_is_known_before_the_start():
    assert ll.preflight(waiting()).rows


def test_pissa_products_are_the_best_approximation():
    weight = torch.randn(7, 6, dtype=torch.float64)
    A, B = pissa(weight, 2, 2.0)
    U, values, V = torch.linalg.svd(weight, full_matrices=False)
    torch.testing.assert_close(2.0 * B @ A, U[:, :2] @ torch.diag(values[:2]) @ V[:2])


# --- files


def saved(tmp_path: Path) -> tuple[Model, Path]:
    model, _ = started("linear")
    trained(model)
    return model, write_checkpoint(model, tmp_path / "adapter.ckpt")


def test_a_checkpoint_is_loaded_into_the_bare_base(tmp_path: Path):
    model, path = saved(tmp_path)
    x = torch.randn(2, 6, dtype=torch.float64)
    other = copy.deepcopy(model)
    ll.detach(other)
    ll.load_adapter(other, path)
    assert torch.equal(other(x), model(x))


def test_a_checkpoint_read_without_its_model_holds_the_difference(tmp_path: Path):
    model, path = saved(tmp_path)
    [layer] = read_adapter(path).layers.values()
    assert (layer.rank, layer.A.shape, layer.B.shape) == (4, (4, 6), (5, 4))
    assert layer.scaling is not None
    expected = ll.lora_layers(model)["layer"].delta_weight()
    torch.testing.assert_close(layer.scaling * layer.B @ layer.A, expected)


def test_the_command_line_exports_and_compares_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    model, path = saved(tmp_path)
    assert run("export", path, tmp_path / "peft") == 0
    [A, B] = (tensors_of(tmp_path / "peft")[f"base_model.model.layer.lora_{key}.weight"] for key in "AB")
    scaling = ll.lora_layers(model)["layer"].scaling
    expected = ll.lora_layers(model)["layer"].delta_weight()
    torch.testing.assert_close(scaling * B @ A, expected, check_dtype=False)
    capsys.readouterr()
    assert run("inspect", path) == 0
    assert " 4 " in capsys.readouterr().out


def test_its_weighted_sum_is_that_of_the_difference(tmp_path: Path):
    model, path = saved(tmp_path)
    ll.combine_adapters([path, path], [1.0, -0.5], tmp_path / "sum")
    base = copy.deepcopy(model)
    ll.detach(base)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "These adapters are not smaller")
        ll.load_adapter(base, tmp_path / "sum")
    expected = 0.5 * ll.lora_layers(model)["layer"].delta_weight()
    torch.testing.assert_close(ll.lora_layers(base)["layer"].delta_weight(), expected, rtol=1e-5, atol=1e-5)


def test_training_starts_from_it_with_the_same_function(tmp_path: Path):
    model, path = saved(tmp_path)
    x = torch.randn(2, 6, dtype=torch.float64)
    for rank in (2, 3):
        other = copy.deepcopy(model)
        ll.detach(other)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "These adapters are not smaller")
            ll.attach(other, ll.LoRAConfig(rank=rank, alpha=16.0 * rank, init="pissa", target_modules=["layer"]))
        start_from(other, path)
        torch.testing.assert_close(other(x), model(x))


def test_training_of_a_plain_update_does_not_start_from_a_difference(tmp_path: Path):
    model, path = saved(tmp_path)
    ll.detach(model)
    ll.attach(model, ll.LoRAConfig(rank=2, target_modules=["layer"]))
    with pytest.raises(ValueError, match=r"A0: the update there is a difference.*the same init"):
        start_from(model, path)


def test_training_of_a_difference_starts_from_a_plain_update(tmp_path: Path):
    model, _ = started("linear")
    x = torch.randn(2, 6, dtype=torch.float64)
    ll.detach(model)
    ll.attach(model, ll.LoRAConfig(rank=2, target_modules=["layer"]))
    trained(model)
    expected, path = model(x), write_checkpoint(model, tmp_path / "plain.ckpt")
    ll.detach(model)
    ll.attach(model, ll.LoRAConfig(rank=2, init="pissa", target_modules=["layer"]))
    start_from(model, path)
    torch.testing.assert_close(model(x), expected)
