"""One adapter per sample: a routed batch computes what each sample computes alone, in one pass of the base."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_lora import (
    LoRAConfig,
    active_adapter,
    adapter_state_dict,
    add_adapter,
    merge,
    merged,
    parameter_groups,
    routed,
    using,
)

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
    "dora and biases": {"target_modules": ["conv", "out"], "rank": 2, "use_dora": True, "bias": "lora_only"},
    "dora and all biases": {
        "target_modules": [],
        "target_slices": {"fused": {"low": "0:8"}},
        "rank": 2,
        "use_dora": True,
        "bias": "all",
    },
    "tokens": {"target_modules": ["out"], "rank": 2, "trainable_token_indices": [1, 3, 7]},
}
BATCHES = {
    "sorted": ["linear", "linear", "conv", "conv", None],
    "mixed": ["dora", None, "embedding", "dora", "slices", "linear", "conv", None, "slices"],
    "heads": ["head", "linear", "biases", "head", None, "biases", "tokens", "head"],
    "biases": [
        "dora and biases",
        "biases",
        "dora and all biases",
        "dora and biases",
        None,
        "dora",
        "dora and all biases",
    ],
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


class Conv1D(nn.Module):
    """A linear layer that is recognized by its name, with a weight of ``(in, out)``."""

    def __init__(self) -> None:
        super().__init__()
        self.nf = WIDTH
        self.weight, self.bias = nn.Parameter(torch.randn(WIDTH, WIDTH)), nn.Parameter(torch.randn(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight + self.bias


LAYERS = {"linear": lambda: nn.Linear(WIDTH, WIDTH), "conv": lambda: nn.Conv1d(WIDTH, WIDTH, 3), "Conv1D": Conv1D}


@pytest.mark.parametrize("bias", ["lora_only", "all"])
@pytest.mark.parametrize("kind", LAYERS)
def test_own_biases_beside_dora_are_those_of_a_dense_model(kind: str, bias: str):
    torch.manual_seed(0)
    net = nn.Sequential(LAYERS[kind]()).double()
    dense, x, names = copy.deepcopy(net), torch.randn(4, WIDTH, WIDTH).double(), ["plain", "dora", "dora", None]
    factors: dict[str, dict[str, Tensor]] = {}
    for name, options in {"plain": {}, "dora": {"use_dora": True, "bias": bias}}.items():
        add_adapter(net, name, LoRAConfig(rank=2, alpha=6.0, target_modules=["0"], **options))
        with using(net, name), torch.no_grad():
            for parameter in parameter_groups(net, 1.0)[0]["params"]:
                parameter.copy_(torch.randn_like(parameter))
            factors[name] = {key: p.clone().requires_grad_() for key, p in adapter_state_dict(net).items()}

    def reference(i: int, name: str | None) -> Tensor:
        own = factors.get(name or "")
        if own is None:
            return dense(x[i : i + 1])[0]
        weight = dense[0].weight.T if kind == "Conv1D" else dense[0].weight.flatten(1)
        weight = weight + 3.0 * own["0.lora.B"] @ own["0.lora.A"]
        if name == "dora":
            weight = weight * (own["0.lora.magnitude"] / weight.detach().norm(dim=1))[:, None]
        weight = weight.T if kind == "Conv1D" else weight.view(dense[0].weight.shape)
        changed = {"0.weight": weight} | {key: own[key] for key in own.keys() & {"0.bias"}}
        return torch.func.functional_call(dense, changed, (x[i : i + 1],))[0]

    expected = torch.stack([reference(i, name) for i, name in enumerate(names)])
    with routed(net, names):
        together = net(x)
    torch.testing.assert_close(together, expected, rtol=1e-12, atol=1e-12)
    together.square().sum().backward()
    expected.square().sum().backward()
    assert factors["dora"].keys() == {"0.bias", "0.lora.A", "0.lora.B", "0.lora.magnitude"}
    for name, own in factors.items():
        with using(net, name):
            for key, tensor in own.items():
                torch.testing.assert_close(net.get_parameter(key).grad, tensor.grad, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("batch", BATCHES)
def test_a_model_compiled_as_one_graph_is_routed(batch: str, model: Net):
    names = BATCHES[batch]
    x, found = samples(len(names)), []
    torch.compiler.reset()
    for run in (model, torch.compile(model, backend="eager", fullgraph=True)):
        with routed(model, names):
            output = run(x)
        output.square().sum().backward()
        found.append((output, gradients(model)))
        model.zero_grad()
    torch.testing.assert_close(found[1], found[0], rtol=1e-10, atol=1e-10)


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
        (lambda: attending(["attention"]), ["a", "b"], r"attention.* carries the update in its weight"),
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


# --- tensors of which adapters have their own, read outside of their layer's forward


class Reading(nn.Module):
    """A model whose head is not called."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.head = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(self.fc(x), self.head.weight, self.head.bias)


class Adding(Reading):
    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x)[..., :3] + self.head.bias


class Asking(Reading):
    """A model that asks what its head is like, as transformers' models do, and calls it."""

    def forward(self, x: Tensor) -> Tensor:
        assert isinstance(self.head.weight, Tensor)
        weight = self.head.weight
        return self.head(self.fc(x).to(weight.device, weight.dtype).view(-1, weight.shape[1]))


class Calling(Reading):
    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.fc(x))


def hooked(how: Callable[[nn.Module], nn.Module]) -> nn.Module:
    net = Calling()
    net.head = how(net.head)
    return net


class Encoding(nn.Module):
    """A model that computes with the weights of its layers in one kernel where it may."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(WIDTH, WIDTH)
        self.layer = nn.TransformerEncoderLayer(WIDTH, 2, 32, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(self.fc(x).unsqueeze(1))


def with_own(net: nn.Module, **options: Any) -> nn.Module:
    """Return a model with two adapters, of which the second has tensors of its own in place of the base's."""
    add_adapter(net, "plain", LoRAConfig(rank=2, target_modules=["fc"]))
    add_adapter(net, "own", LoRAConfig(rank=2, target_modules=["fc"], **options))
    with using(net, "own"), torch.no_grad():
        for parameter in parameter_groups(net, 1.0)[0]["params"]:
            parameter.add_(torch.randn_like(parameter))
    return net.eval()


HEAD: dict[str, Any] = {"modules_to_save": ["head"]}
OUTPUT: dict[str, Any] = {"modules_to_save": ["attention.out_proj"]}


@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
@pytest.mark.parametrize(
    ("build", "options", "where"),
    [
        (Reading, HEAD, r"head\.bias, head\.weight are"),
        (Adding, {"bias": "all"}, r"head\.bias is"),
        (lambda: hooked(nn.utils.weight_norm), HEAD, r"head\.weight_g, head\.weight_v are"),
        (lambda: hooked(nn.utils.spectral_norm), HEAD, r"head\.weight_orig is"),
        (lambda: Attending(batch_first=True), OUTPUT, r"attention\.out_proj\.bias, attention\.out_proj\.weight are"),
    ],
    ids=["weight", "bias", "weight_norm", "spectral_norm", "attention"],
)
def test_own_tensors_read_outside_of_their_layer_are_named(build: Any, options: Any, where: str):
    net, x = with_own(build(), **options), torch.randn(3, 2, WIDTH)
    with routed(net, ["plain", "own", None]), pytest.raises(RuntimeError, match=f"routed: {where} read outside"):
        net(x)
    for name in ("plain", "own", None):
        with using(net, name):
            net(x)


@pytest.mark.parametrize(
    ("build", "options"),
    [(Asking, HEAD), (Encoding, {"modules_to_save": ["layer.linear1"]}), (Encoding, {"modules_to_save": ["norm1"]})],
    ids=["questions", "encoder", "encoder's norm"],
)
def test_own_tensors_may_be_asked_for_their_shape(build: Any, options: Any):
    net, x, names = with_own(build(), **options), torch.randn(4, WIDTH), ["own", "plain", None, "own"]
    with torch.no_grad():
        with routed(net, names):
            together = net(x)
        torch.testing.assert_close(together, one_by_one(net, names, x))


class Counting(nn.Linear):
    """A layer that replaces its buffer."""

    def __init__(self) -> None:
        super().__init__(WIDTH, 3)
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.seen = self.seen + len(x)
        return super().forward(x)


def test_each_adapter_keeps_the_buffers_that_its_samples_replace_and_the_base_its_own():
    net = nn.Sequential(nn.Linear(WIDTH, WIDTH), Counting())
    for name in ("a", "b"):
        add_adapter(net, name, LoRAConfig(rank=2, target_modules=["0"], modules_to_save=["1"]))
    for _ in range(2):
        with routed(net, ["a", "b", None, "b", "b"]):
            net(torch.randn(5, WIDTH))
    seen = {}
    for name in ("a", "b", None):
        with using(net, name):
            seen[name] = int(net[1].seen)
    assert seen == {"a": 2, "b": 6, None: 0}


@pytest.mark.parametrize("how", [copy.deepcopy, pickle.dumps])
def test_a_routed_module_is_not_copied(how: Any, model: Net):
    with routed(model, ["linear", "conv"]), pytest.raises(RuntimeError, match="copied or pickled inside routed"):
        how(model)
    assert type(copy.deepcopy(model).fused).__name__ == "LoRALinear"
