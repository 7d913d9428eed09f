"""A new kind of layer: registered from outside, it gets everything that the kinds of the package have."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from typing_extensions import override

from lightning_lora import (
    LoRAConfig,
    adapter_state_dict,
    attach,
    load_adapter,
    lora_layers,
    merge,
    preflight,
    register_adapter,
    save_adapter,
)
from lightning_lora.adapted_model import AdaptedModel
from lightning_lora.cli import main
from lightning_lora.fingerprint import fingerprint, to_plain
from lightning_lora.layers import Adapter, LinearAdapter, adapter_of_kind, adapter_type
from lightning_lora.state import describe
from lightning_lora.storage.checkpoint import RECORD_KEY
from tests.contract import train_all

# --- a new kind, all that there is to write


class GraphLinear(nn.Module):
    """A linear layer as graph libraries have it: no ``nn.Linear``, with names of its own."""

    def __init__(self, channels_in: int, channels_out: int, bias: bool = True) -> None:
        super().__init__()
        self.channels_in, self.channels_out = channels_in, channels_out
        self.weight = nn.Parameter(torch.randn(channels_out, channels_in))
        self.bias = nn.Parameter(torch.zeros(channels_out)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight.T + (0.0 if self.bias is None else self.bias)


class GraphLinearAdapter(LinearAdapter):
    """``y += scaling * x @ A.T @ B.T`` beside it, as beside an ``nn.Linear``."""

    kind = "graph linear"

    @classmethod
    @override
    def matrix_shape(cls, module: nn.Module, parameter: str = "weight") -> tuple[int, int]:
        return module.channels_out, module.channels_in

    @classmethod
    @override
    def stand_in(cls, shape: Sequence[int]) -> nn.Module:
        channels_out, channels_in = shape
        return GraphLinear(channels_in, channels_out, bias=False)


register_adapter(GraphLinear, GraphLinearAdapter)

# --- what it gets for that


class Graph(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.mix, self.head = GraphLinear(6, 8), GraphLinear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.mix(x)))


@pytest.fixture
def trained(rng: torch.Generator) -> Graph:
    model = Graph()
    attach(model, LoRAConfig(rank=2))
    train_all(model, rng)
    return model


@pytest.fixture
def checkpoint(trained: Graph, tmp_path: Path) -> Path:
    record = describe(trained) | {"base": to_plain(fingerprint(AdaptedModel(trained).base))}
    torch.save({"state_dict": adapter_state_dict(trained), RECORD_KEY: record}, tmp_path / "last.ckpt")
    return tmp_path / "last.ckpt"


def test_new_kind_is_in_all_linear_and_starts_unchanged():
    model, x = Graph(), torch.randn(3, 6)
    report = attach(model, LoRAConfig(rank=2))
    assert [layer.name for layer in report.layers] == ["mix", "head"]
    assert torch.equal(model(x), Graph()(x))


def test_new_kind_trains(rng: torch.Generator):
    model, x = Graph(), torch.randn(3, 6, generator=rng)
    attach(model, LoRAConfig(rank=2))
    model(x).square().sum().backward()
    assert all(layer.lora.B.grad.any() for layer in lora_layers(model).values())
    assert model.mix.weight.grad is None


def test_new_kind_merges_to_the_dense_sum(trained: Graph):
    x = torch.randn(3, 6)
    expected, dense = (
        trained(x),
        trained.mix.weight + trained.mix.lora.spec.scaling * (trained.mix.lora.B @ trained.mix.lora.A),
    )
    merge(trained)
    assert type(trained.mix) is GraphLinear
    torch.testing.assert_close(trained.mix.weight, dense)
    torch.testing.assert_close(trained(x), expected)


def test_new_kind_is_saved_and_loaded(trained: Graph, checkpoint: Path):
    model, x = Graph(), torch.randn(3, 6)
    load_adapter(model, checkpoint)
    assert torch.equal(model(x), trained(x))


def test_new_kind_is_inspected(checkpoint: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["inspect", str(checkpoint)]) == 0
    assert "mix" in capsys.readouterr().out


def test_new_kind_is_recorded_by_name_and_shape(trained: Graph):
    record = describe(trained)["layers"]["mix"]
    assert (record["kind"], record["shape"]) == ("graph linear", [8, 6])


@pytest.mark.parametrize("how", ["model", "checkpoint"])
def test_export_refuses_kind_that_peft_lacks(
    how: str, trained: Graph, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    refusal = "PEFT has no adapter for GraphLinear"
    if how == "model":
        assert [row.peft for row in preflight(trained).rows] == [refusal] * 2
        with pytest.raises(ValueError, match=refusal):
            save_adapter(trained, tmp_path / "peft")
    else:
        assert main(["export", str(checkpoint), str(tmp_path / "peft")]) == 1
        assert refusal in capsys.readouterr().err
    assert not (tmp_path / "peft").exists()


class GraphLinearOfANewerRelease(GraphLinear):
    pass


def test_most_specific_class_decides():
    class Other(GraphLinearAdapter):
        pass

    layer = GraphLinearOfANewerRelease(2, 2)
    assert adapter_type(layer) is GraphLinearAdapter
    register_adapter(GraphLinearOfANewerRelease, Other)
    assert adapter_type(layer) is Other
    assert adapter_type(GraphLinear(2, 2)) is GraphLinearAdapter


def test_subclass_has_no_kind_unless_it_states_one():
    class Unnamed(LinearAdapter):
        pass

    assert LinearAdapter.kind == "linear"
    assert Unnamed.kind is None


def test_kind_without_adapter_names_the_remedy():
    with pytest.raises(ValueError, match=r"kind 'tensor product'.*register_adapter"):
        adapter_of_kind("tensor product")


@pytest.mark.parametrize("kind", ["linear", "conv1d", "embedding", "conv"])
def test_stand_in_of_a_kind_takes_its_adapter(kind: str):
    adapter = adapter_of_kind(kind)
    shape = (6, 4, 3) if kind == "conv" else (6, 4)
    layer = adapter.stand_in(shape)
    if kind == "conv1d":
        layer.register_parameter("weight", nn.Parameter(torch.empty(shape)))
    assert issubclass(adapter, Adapter)
    assert adapter_type(layer) is adapter
    assert adapter.matrix_shape(layer) == adapter.matrix_of(shape)


def test_example_in_the_docs_runs(capsys: pytest.CaptureFixture[str]):
    text = (Path(__file__).parents[2] / "docs" / "layers.md").read_text()
    for block in re.findall(r"```python\n(.*?)```", text, flags=re.S):
        exec(block, {"__name__": "docs"})
    assert "all-linear" in capsys.readouterr().out


class Amplified(GraphLinear):
    """Does more than apply its weight, which the adapter that is registered for its class does not say."""

    def forward(self, x: Tensor) -> Tensor:
        return 2.0 * super().forward(x)


class WithEdges(GraphLinear):
    """Takes more than rows, so that nobody can try it."""

    def forward(self, x: Tensor, edges: Tensor) -> Tensor:
        return edges @ super().forward(x)


def test_layer_that_does_more_than_apply_its_weight_is_not_merged() -> None:
    model = nn.Sequential(Amplified(6, 8))
    attach(model, LoRAConfig(rank=2))
    model[0].lora.B.data.fill_(1.0)
    x = torch.ones(1, 6)
    before = model(x)
    with pytest.raises(RuntimeError, match=r"forward of '0' \(Amplified\) does more than apply its weight"):
        merge(model)
    assert torch.equal(model(x), before)


def test_layer_that_cannot_be_tried_is_merged() -> None:
    model = nn.ModuleDict({"mix": WithEdges(6, 8)})
    attach(model, LoRAConfig(rank=2))
    x, edges = torch.ones(3, 6), torch.eye(3)
    model["mix"].lora.B.data.fill_(0.1)
    expected = model["mix"](x, edges)
    merge(model)
    assert torch.allclose(model["mix"](x, edges), expected, atol=1e-5)
