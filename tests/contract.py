"""The layers that every law of an adapted layer is tested on, each with its dense float64 reference.

Letters: ``W`` is the base weight as stored, ``D`` the update ``scaling * B @ A`` as ``(out, in)``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_lora import LoRAConfig, LoRALayer, attach, parameter_groups

IN, OUT, TOKENS, PADDING = 24, 20, 40, 3
RANK, ALPHA = 4, 6.0
SCALING = ALPHA / RANK


class CountingLinear(nn.Linear):
    """A user's Linear: a subclass with its own forward."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.calls = 0

    def forward(self, input: Tensor) -> Tensor:
        self.calls += 1
        return torch.matmul(input, self.weight.T) + self.bias


class LinearLike(nn.Module):
    """A linear layer that is no ``nn.Linear`` and copies itself, as in graph libraries."""

    def __init__(self, channels_in: int, channels_out: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(channels_out, channels_in) / channels_in**0.5)
        self.bias = nn.Parameter(torch.zeros(channels_out))

    def __deepcopy__(self, memo: Any) -> LinearLike:
        twin = LinearLike(*reversed(self.weight.shape)).to(self.weight)
        twin.load_state_dict(self.state_dict(), strict=False)
        return twin

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("...i,oi->...o", x, self.weight) + self.bias


class ScaledEmbedding(nn.Embedding):
    """An embedding with its own forward, as in Bart and Gemma."""

    def forward(self, input: Tensor) -> Tensor:
        return 3.0 * super().forward(input)


class Holder(nn.Module):
    """A model with the layer under test and another layer that stays unchanged."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer
        self.neighbor = nn.Linear(IN, OUT)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


def _conv1d() -> nn.Module:
    return pytest.importorskip("transformers.pytorch_utils").Conv1D(OUT, IN)


@dataclass(frozen=True)
class Kind:
    """A layer kind: how to build it, and its function of the input and any weight."""

    build: Callable[[], nn.Module]
    function: Callable[[nn.Module, Tensor, Tensor], Tensor]
    takes_tokens: bool = False
    stores_transposed: bool = False
    image: tuple[int, ...] = ()  # the shape of one input, unless it is a vector


def _linear(layer: nn.Module, x: Tensor, W: Tensor) -> Tensor:
    return F.linear(x, W, None if layer.bias is None else layer.bias.to(W.dtype))


def _conv(layer: nn.Module, x: Tensor, W: Tensor) -> Tensor:
    return x @ W + layer.bias.to(W.dtype)


def _embedding(layer: nn.Module, x: Tensor, W: Tensor) -> Tensor:
    return F.embedding(x, W, layer.padding_idx)


def _scaled_embedding(layer: nn.Module, x: Tensor, W: Tensor) -> Tensor:
    return 3.0 * _embedding(layer, x, W)


def _convolution(layer: nn.Module, x: Tensor, W: Tensor) -> Tensor:
    """Compute a convolution by padding, windows and a matrix product, group by group."""
    bias, kernel = layer.bias.to(W.dtype), W.shape[2:]
    mode = {"zeros": "constant"}.get(layer.padding_mode, layer.padding_mode)
    for axis, (size, step) in enumerate(zip(kernel, layer.dilation, strict=True)):
        total = step * (size - 1)
        before = total // 2 if layer.padding == "same" else 0 if layer.padding == "valid" else layer.padding[axis]
        after = total - before if layer.padding == "same" else before
        moved = x.movedim(axis + 2, -1)
        padded = F.pad(moved.reshape(1, -1, moved.shape[-1]), (before, after), mode=mode)
        x = padded.view(*moved.shape[:-1], -1).movedim(-1, axis + 2)
        x = x.unfold(axis + 2, total + 1, layer.stride[axis])[..., ::step]
    places, windows = "xyz"[: len(kernel)], "uvw"[: len(kernel)]
    groups = [
        torch.einsum(f"nc{places}{windows},oc{windows}->no{places}", a, b)
        for a, b in zip(x.chunk(layer.groups, 1), W.chunk(layer.groups, 0), strict=True)
    ]
    return torch.cat(groups, 1) + bias.view(-1, *[1] * len(kernel))


def _transposed_convolution(layer: nn.Module, x: Tensor, W: Tensor) -> Tensor:
    """Compute the gradient of a convolution, the definition of a transposed one."""
    dimensions = W.ndim - 2
    convolve = (F.conv1d, F.conv2d, F.conv3d)[dimensions - 1]
    sizes = zip(
        x.shape[2:], layer.stride, layer.padding, layer.dilation, W.shape[2:], layer.output_padding, strict=True
    )
    shape = [(n - 1) * s - 2 * p + d * (k - 1) + 1 + extra for n, s, p, d, k, extra in sizes]
    point = torch.zeros(x.shape[0], W.shape[1] * layer.groups, *shape, dtype=W.dtype, requires_grad=True)
    forward = convolve(point, W, None, layer.stride, layer.padding, layer.dilation, layer.groups)
    [output] = torch.autograd.grad(forward, point, x, create_graph=True)
    return output + layer.bias.to(W.dtype).view(-1, *[1] * dimensions)


def _conv_kind(kind: type[nn.Module], image: tuple[int, ...], *arguments: Any, **options: Any) -> Kind:
    function = _transposed_convolution if "Transpose" in kind.__name__ else _convolution
    return Kind(lambda: kind(8, 12, *arguments, **options), function, image=image)


KINDS: Mapping[str, Kind] = {
    "linear": Kind(lambda: nn.Linear(IN, OUT), _linear),
    "linear without bias": Kind(lambda: nn.Linear(IN, OUT, bias=False), _linear),
    "own forward": Kind(lambda: CountingLinear(IN, OUT), _linear),
    "conv1d": Kind(_conv1d, _conv, stores_transposed=True),
    "embedding": Kind(lambda: nn.Embedding(TOKENS, OUT), _embedding, True, True),
    "padded embedding": Kind(lambda: nn.Embedding(TOKENS, OUT, padding_idx=PADDING), _embedding, True, True),
    "scaled embedding": Kind(lambda: ScaledEmbedding(TOKENS, OUT), _scaled_embedding, True, True),
    "convolution 1d": _conv_kind(nn.Conv1d, (8, 11), 3, stride=2, padding=1, dilation=2),
    "convolution 2d": _conv_kind(nn.Conv2d, (8, 7, 6), (3, 2), padding="same", groups=2, padding_mode="reflect"),
    "convolution 3d": _conv_kind(nn.Conv3d, (8, 4, 5, 6), (1, 1, 3), padding=(0, 0, 1)),
    "linear-like": Kind(lambda: LinearLike(IN, OUT), _linear),
    "transposed convolution 1d": _conv_kind(nn.ConvTranspose1d, (8, 5), 4, stride=3, padding=1, output_padding=2),
    "transposed convolution 2d": _conv_kind(nn.ConvTranspose2d, (8, 4, 3), (2, 3), stride=2, groups=2, dilation=2),
    "transposed convolution 3d": _conv_kind(nn.ConvTranspose3d, (8, 2, 3, 2), 2, groups=4),
}

# Largest error over largest value. bfloat16 keeps 8 bits, and about five results are rounded on the way.
TOLERANCE = {torch.float64: 1e-10, torch.float32: 2e-6, torch.bfloat16: 5 * 2.0**-9}


@dataclass(frozen=True)
class Case:
    """A layer kind in one precision."""

    kind: str
    dtype: torch.dtype

    def __str__(self) -> str:
        return f"{self.kind}-{str(self.dtype).removeprefix('torch.')}"

    @property
    def tolerance(self) -> float:
        return TOLERANCE[self.dtype]

    @property
    def config(self) -> LoRAConfig:
        return LoRAConfig(rank=RANK, alpha=ALPHA, target_modules=["layer"])

    @property
    def spec(self) -> Kind:
        return KINDS[self.kind]

    @property
    def random_factor_is_b(self) -> bool:
        return self.spec.takes_tokens

    def base(self) -> Holder:
        return Holder(self.spec.build()).to(self.dtype)

    def attached(self) -> Holder:
        model = self.base()
        attach(model, self.config)
        return model

    def trained(self, rng: torch.Generator) -> Holder:
        """Return an adapted model whose adapter has an effect."""
        model = self.attached()
        train(model.layer, rng)
        return model

    def inputs(self, rng: torch.Generator) -> Tensor:
        if self.spec.image:
            return torch.randn(3, *self.spec.image, generator=rng).to(self.dtype)
        if self.spec.takes_tokens:
            return torch.cat([torch.tensor([PADDING]), torch.randint(TOKENS, (29,), generator=rng)]).view(5, 6)
        return torch.randn(5, 6, IN, generator=rng).to(self.dtype)

    def stored(self, layer: nn.Module, D: Tensor) -> Tensor:
        """Return an ``(out, in)`` matrix in the layer's storage layout."""
        return (D.T if self.spec.stores_transposed else D).reshape(stored_weight(layer).shape)

    def dense(self, layer: nn.Module, x: Tensor, A: Tensor, B: Tensor) -> Tensor:
        """Return the float64 output of the base layer with the weight ``W + scaling * B @ A``."""
        W = stored_weight(layer).double() + self.stored(layer, SCALING * B.double() @ A.double())
        return self.spec.function(layer, x if self.spec.takes_tokens else x.double(), W)


CASES = [Case(kind, dtype) for kind in KINDS for dtype in TOLERANCE]
each_case = pytest.mark.parametrize("case", CASES, ids=str)


def stored_weight(layer: nn.Module) -> Tensor:
    """Return the weight as in the state dict: the base's, even if ``weight`` reads as base plus update."""
    return layer.state_dict()["weight"]


@torch.no_grad()
def train(layer: nn.Module, rng: torch.Generator) -> None:
    """Set the factors of an adapted layer to values as after training; the padding token never trains."""
    assert isinstance(layer, LoRALayer)
    for adapter in layer.adapters().values():
        for factor in (adapter.A, adapter.B):
            factor.copy_(0.3 * torch.randn(factor.shape, generator=rng))
    if getattr(layer.lora, "padding_idx", None) is not None:
        layer.lora.A[:, layer.padding_idx] = 0.0


def train_all(model: nn.Module, rng: torch.Generator) -> None:
    """Set the factors of every adapted layer of a model as after training."""
    for part in model.modules():
        if isinstance(part, LoRALayer):
            train(part, rng)


def learn(model: nn.Module, seed: int) -> None:
    """Move everything that the active adapter trains, heads included."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for group in parameter_groups(model, 1.0):
            for parameter in group["params"]:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))


def error(found: Tensor, truth: Tensor) -> float:
    """Return the largest error over the largest true value."""
    return ((found.double() - truth.double()).abs().max() / truth.double().abs().max()).item()


def snapshot(model: nn.Module) -> dict[str, Any]:
    """Return the visible state of a model: classes, tensors by identity and value, flags, attributes."""
    layers = {name: part for name, part in model.named_modules() if isinstance(part, LoRALayer)}
    tensors = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    return {
        "classes": {name: type(part) for name, part in model.named_modules(remove_duplicate=False)},
        "attributes": {
            # The switch may be an attribute of the instance or of the class.
            name: sorted(vars(part).keys() - ({"lora_mode"} if name in layers else set()))
            for name, part in model.named_modules()
        },
        "switches": {name: layer.lora_mode for name, layer in layers.items()},
        "modes": {name: part.training for name, part in model.named_modules()},
        "keys": list(model.state_dict()),
        "identities": {name: id(tensor) for name, tensor in tensors},
        "flags": {name: tensor.requires_grad for name, tensor in tensors},
        "bits": {name: tensor.detach().clone() for name, tensor in tensors},
    }


def assert_unchanged(model: nn.Module, before: dict[str, Any]) -> None:
    """Check that a model is unchanged, bit for bit."""
    after = snapshot(model)
    for key in before.keys() - {"bits"}:
        assert after[key] == before[key], key
    assert_same_bits(after["bits"], before["bits"])


def assert_same_bits(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """Check that two collections hold the same names and the same bits."""
    assert list(found) == list(expected)
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor), name


@contextmanager
def raises_and_changes_nothing(model: nn.Module, kind: type[Exception], match: str | None = None) -> Iterator[Any]:
    """Check that a block raises and leaves the model unchanged."""
    before = snapshot(model)
    with pytest.raises(kind, match=match) as caught:
        yield caught
    assert_unchanged(model, before)
