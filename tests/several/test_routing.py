"""One adapter per sample: a routed batch computes what each sample computes alone, in one pass of the base."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_lora import LoRAConfig, active_adapter, add_adapter, merge, merged, parameter_groups, routed, using

WIDTH = 24


class Net(nn.Module):
    """Layers of every kind that adds its update to its output."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, WIDTH)
        self.conv = nn.Conv1d(WIDTH, WIDTH, 3, padding=1)
        self.norm = nn.BatchNorm1d(WIDTH)
        self.fused = nn.Linear(WIDTH, 2 * WIDTH)
        self.out = nn.Linear(2 * WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, 6)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.norm(self.conv(self.embed(tokens).transpose(1, 2))).transpose(1, 2)
        return self.head(torch.tanh(self.out(torch.relu(self.fused(x)))))


CONFIGS: dict[str, dict[str, Any]] = {
    "linear": {"target_modules": ["fused", "out"], "rank": 2},
    "conv": {"target_modules": ["conv"], "rank": 3, "lora_bias": True},
    "embedding": {"target_modules": ["embed", "out"], "rank": 4, "use_rslora": True},
    "dora": {"target_modules": ["out", "fused"], "rank": 1, "use_dora": True},
    "slices": {"target_modules": [], "target_slices": {"fused": {"low": "0:8", "high": "24:48:2"}}, "rank": 2},
    "head": {"target_modules": ["out"], "rank": 2, "modules_to_save": ["head"]},
    "biases": {"target_modules": ["out"], "rank": 2, "bias": "lora_only"},
    "tokens": {"target_modules": ["out"], "rank": 2, "trainable_token_indices": [1, 3, 7]},
}
BATCHES = {
    "sorted": ["linear", "linear", "conv", "conv", None],
    "mixed": ["dora", None, "embedding", "dora", "slices", "linear", "conv", None, "slices"],
    "heads": ["head", "linear", "biases", "head", None, "biases", "tokens", "head"],
}


@pytest.fixture
def model() -> Net:
    torch.manual_seed(0)
    net = Net().eval()
    generator = torch.Generator().manual_seed(1)
    for name, options in CONFIGS.items():
        add_adapter(net, name, LoRAConfig(**options))
        with using(net, name), torch.no_grad():
            for parameter in parameter_groups(net, 1.0)[0]["params"]:
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return net.double()


def samples(count: int) -> Tensor:
    return torch.arange(count * 5).reshape(count, 5) % 20


def one_by_one(net: nn.Module, names: Sequence[str | None], x: Tensor) -> Tensor:
    rows = []
    for i, name in enumerate(names):
        with using(net, name):
            rows.append(net(x[i : i + 1]))
    return torch.cat(rows)


def gradients(net: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in net.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("batch", BATCHES)
def test_routed_batch_equals_a_loop_over_samples(batch: str, model: Net):
    names = BATCHES[batch]
    x = samples(len(names))
    with routed(model, names):
        together = model(x)
    torch.testing.assert_close(together, one_by_one(model, names, x), rtol=1e-12, atol=1e-12)
    assert active_adapter(model) == "linear"


@pytest.mark.parametrize("batch", BATCHES)
def test_routed_gradients_equal_those_of_a_loop(batch: str, model: Net):
    names = BATCHES[batch]
    x = samples(len(names))
    with routed(model, names):
        model(x).square().sum().backward()
    together = gradients(model)
    model.zero_grad()
    one_by_one(model, names, x).square().sum().backward()
    apart = gradients(model)
    assert together.keys() == apart.keys()
    for name in apart:
        torch.testing.assert_close(together[name], apart[name], rtol=1e-10, atol=1e-10)


def test_samples_without_adapter_are_the_bare_base_bit_for_bit(model: Net):
    names = BATCHES["mixed"]
    x = samples(len(names))
    with using(model, None):
        bare = model(x)
    with routed(model, names):
        mixed = model(x)
    rows = [i for i, name in enumerate(names) if name is None]
    assert torch.equal(mixed[rows], bare[rows])


def test_one_name_for_all_takes_the_path_of_one_adapter(model: Net):
    x = samples(3)
    with routed(model, ["dora"] * 3):
        together = model(x)
    with using(model, "dora"):
        assert torch.equal(together, model(x))


def test_each_layer_of_the_base_runs_once(model: Net):
    calls: list[str] = []
    model.out.register_forward_hook(lambda *_: calls.append("out"))
    original, rows = nn.Linear.forward, []

    def counted(self: nn.Linear, x: Tensor) -> Tensor:
        rows.append(len(x))
        return original(self, x)

    names = BATCHES["mixed"]
    with pytest.MonkeyPatch.context() as patch, routed(model, names):
        patch.setattr(nn.Linear, "forward", counted)
        model(samples(len(names)))
    assert calls == ["out"]
    assert rows == [len(names)] * 3  # fused, out, head


# --- bad input


class Attending(nn.Module):
    def __init__(self, batch_first: bool) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(WIDTH, 2, batch_first=batch_first)
        self.fc = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.attention(x, x, x)[0])


def attending(targets: list[str], *, batch_first: bool = True) -> nn.Module:
    net = Attending(batch_first)
    for name in ("a", "b"):
        add_adapter(net, name, LoRAConfig(rank=2, target_modules=targets))
    return net


@pytest.mark.parametrize(
    ("net", "names", "message"),
    [
        (lambda: attending(["attention"]), ["a", "b"], r"the weight of attention.* carries the update"),
        (lambda: attending(["fc"], batch_first=False), ["a", "b"], "fc may see the batch in the second dimension"),
        (lambda: attending(["fc"]), ["a", "c"], "no adapter 'c'"),
        (lambda: attending(["fc"]), [], "one adapter for each sample"),
        (lambda: attending(["fc"]), "ab", "one adapter for each sample"),
    ],
    ids=["weight", "second dimension", "unknown", "none", "text"],
)
def test_what_cannot_be_routed_is_named(net: Any, names: Any, message: str):
    module = net()
    with pytest.raises(ValueError, match=message), routed(module, names):
        pass
    assert active_adapter(module) == "a"


def test_a_batch_of_another_size_is_named(model: Net):
    with routed(model, ["linear", None]), pytest.raises(RuntimeError, match=r"2 adapters are named.*'fused'"):
        model(samples(3))
    assert active_adapter(model) == "linear"
    assert type(model.fused).__name__ == "LoRALinear"


def test_a_routed_module_is_not_merged_or_switched(model: Net):
    with routed(model, ["linear", None]):
        with pytest.raises(RuntimeError, match="inside routed"):
            merge(model, "conv")
        with pytest.raises(ValueError, match=r"inside using.* or routed"), merged(model):
            pass
    assert active_adapter(model) == "linear"


class Keeping(nn.Module):
    """A linear layer of another library that keeps its output."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(WIDTH, WIDTH))
        self.last = torch.empty(0)

    def forward(self, x: Tensor) -> Tensor:
        self.last = x @ self.weight.T
        return self.last


def test_an_output_that_the_layer_keeps_is_not_changed():
    net, x = nn.Sequential(Keeping()), torch.randn(2, WIDTH)
    for name in ("a", "b"):
        add_adapter(net, name, LoRAConfig(rank=2))
        with using(net, name), torch.no_grad():
            net[0].lora.B.fill_(1.0)
    with torch.no_grad(), routed(net, ["a", "b"]):
        output = net(x)
    torch.testing.assert_close(net[0].last, x @ net[0].weight.T)
    assert not torch.allclose(output, net[0].last)
