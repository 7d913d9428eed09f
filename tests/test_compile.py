"""torch.compile takes an adapted model whole: one graph, no more compilations than the base needs, the same numbers."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

from lightning_lora import (
    LoRAConfig,
    adapter_state_dict,
    attach,
    detach,
    disabled,
    load_adapter_state_dict,
    merged,
)
from tests.contract import ALPHA, KINDS, PADDING, RANK, TOKENS, Case, Holder
from tests.layers.test_embedding import CHOSEN, Tied, train_everything

E = 16
SPEC = {"rank": RANK, "alpha": ALPHA, "target_modules": ["layer"]}
CLOSE = 1e-10


class Attend(Holder):
    """A model whose layer is an attention of the input to itself."""

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x, x, x, need_weights=False)[0]


class First(Holder):
    """A model whose layer returns its states, too."""

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)[0]


class Twice(Holder):
    """A model whose layer takes two inputs."""

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x, x.flip(-1))


class Cell(Holder):
    """A model whose layer reads one step after another."""

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x[1], self.layer(x[0]))


class Experts(nn.Module):
    """Three experts with stacked weights."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Parameter(torch.randn(3, 6, E)), nn.Parameter(torch.randn(3, E, 6))

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(torch.einsum("sbi,eoi->sbeo", x, self.up))
        return torch.einsum("sbei,eoi->sbo", hidden, self.down)


@dataclass(frozen=True)
class Setup:
    """A model, how it is adapted, and the inputs it takes."""

    build: Callable[[], nn.Module]
    options: Mapping[str, Any] = field(default_factory=dict)
    inputs: Callable[[torch.Generator], Tensor] = lambda rng: torch.randn(2, 3, E, generator=rng).double()
    backend: str = "aot_eager"  # traces the backward pass, too, which takes long for unrolled steps

    def model(self, rng: torch.Generator) -> tuple[nn.Module, nn.Module, Tensor]:
        """Return the base, an adapted copy as if it had been trained, and an input."""
        base = self.build().double()
        model = copy.deepcopy(base)
        attach(model, LoRAConfig(**SPEC | dict(self.options)))
        train_everything(model, rng)
        return base, model, self.inputs(rng)


def _kind(kind: str, **options: Any) -> Setup:
    case = Case(kind, torch.float64)
    return Setup(case.base, options, _tokens if case.spec.takes_tokens else case.inputs)


def _tokens(rng: torch.Generator) -> Tensor:
    return torch.cat([torch.tensor(CHOSEN), torch.randint(TOKENS, (9,), generator=rng)]).view(3, 4)


SLICES = {"target_modules": [], "target_slices": {"layer": {"q": "0:4,8:12", "v": "-4:"}}}
ROWS = {"target_modules": [], "trainable_token_indices": CHOSEN}
STACKS = {"target_modules": [], "target_parameters": ["layer.up", "layer.down"]}
PLAIN = [kind for kind in KINDS if not kind.startswith("transposed")]
PLAIN.remove("own forward")  # counts its calls, which the compiler makes a graph of each time
WITH_BIAS = [kind for kind in PLAIN if not KINDS[kind].takes_tokens]
SETUPS: dict[str, Setup] = {
    **{kind: _kind(kind) for kind in KINDS},
    **{f"{kind}, dropout": _kind(kind, dropout=0.3) for kind in ("linear", "conv1d", "convolution 2d")},
    **{f"{kind}, DoRA": _kind(kind, use_dora=True) for kind in PLAIN},
    **{f"{kind}, a bias on B": _kind(kind, lora_bias=True) for kind in WITH_BIAS},
    **{f"{kind}, slices": _kind(kind, **SLICES) for kind in ("linear", "conv1d")},
    "linear, slices with DoRA": _kind("linear", use_dora=True, **SLICES),
    "linear, DoRA with a bias on B": _kind("linear", use_dora=True, lora_bias=True),
    "linear, biases of the base": _kind("linear", bias="lora_only"),
    **{f"{kind}, tokens": _kind(kind, **ROWS) for kind in ("embedding", "padded embedding", "scaled embedding")},
    "tied embedding, tokens": Setup(Tied, ROWS, _tokens),
    "tied embedding, tokens beside LoRA": Setup(
        lambda: Tied("padded embedding"), {**ROWS, "target_modules": ["mix"]}, _tokens
    ),
    "attention": Setup(lambda: Attend(nn.MultiheadAttention(E, 4))),
    "attention, DoRA": Setup(lambda: Attend(nn.MultiheadAttention(E, 4)), {"use_dora": True}),
    "attention, slices": Setup(lambda: Attend(nn.MultiheadAttention(E, 4)), SLICES),
    "attention of other keys": Setup(lambda: Attend(nn.MultiheadAttention(E, 4, kdim=E, vdim=E, bias=False))),
    "encoder": Setup(
        lambda: Holder(nn.TransformerEncoderLayer(E, 4, 24, dropout=0.0)),
        {"target_modules": "all-linear", "exclude_modules": ["neighbor"]},
    ),
    "LSTM": Setup(lambda: First(nn.LSTM(E, 6, bidirectional=True)), backend="eager"),
    "LSTM, DoRA": Setup(lambda: First(nn.LSTM(E, 6)), {"use_dora": True}, backend="eager"),
    "GRU": Setup(lambda: First(nn.GRU(E, 6)), backend="eager"),
    "RNN": Setup(lambda: First(nn.RNN(E, 6)), backend="eager"),
    "GRU cell": Setup(lambda: Cell(nn.GRUCell(E, 6))),
    "bilinear": Setup(lambda: Twice(nn.Bilinear(E, E, 6))),
    "bag of embeddings": Setup(lambda: Holder(nn.EmbeddingBag(TOKENS, 6, padding_idx=PADDING)), {}, _tokens),
    "experts": Setup(lambda: Holder(Experts()), STACKS),
}
each_setup = pytest.mark.parametrize("setup", SETUPS.values(), ids=SETUPS)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:These adapters are not smaller.*"),
    pytest.mark.filterwarnings("ignore:.*:DeprecationWarning:torch.*"),
]


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    """Each test compiles for itself; recurrent layers are compiled where asked for."""
    torch._dynamo.reset()
    with torch._dynamo.config.patch(allow_rnn=True, recompile_limit=32):
        yield
    torch._dynamo.reset()


def compiled(model: nn.Module, backend: str) -> tuple[Callable[[Tensor], Tensor], CompileCounterWithBackend]:
    """Return a model compiled as one graph, and the counter of its compilations."""
    counter = CompileCounterWithBackend(backend)
    return torch.compile(model, fullgraph=True, backend=counter), counter


def output(model: nn.Module, call: Callable[[Tensor], Tensor], x: Tensor, seed: int = 3) -> Tensor:
    """Call a model or what was compiled of it with a random state of its own."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return call(x)


def life(model: nn.Module, call: Callable[[Tensor], Tensor], x: Tensor) -> Iterator[Tensor]:
    """Train for three steps, evaluate with gradients and without, and train again; yield all outputs."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    for phase in ("train", "train", "train", "eval", "eval", "no_grad", "no_grad", "train", "eval"):
        model.train(phase == "train")
        with torch.set_grad_enabled(phase != "no_grad"):
            y = output(model, call, x)
        if phase == "train":
            optimizer.zero_grad()
            y.square().sum().backward()
            optimizer.step()
        yield y.detach()


@each_setup
def test_compiled_model_matches_eager_without_more_graphs(setup: Setup, rng):
    base, model, x = setup.model(rng)
    twin, start = copy.deepcopy(model), adapter_state_dict(model)
    base_call, base_counter = compiled(base, setup.backend)
    call, counter = compiled(model, setup.backend)
    lives = zip(life(model, call, x), life(twin, twin, x), life(base, base_call, x), strict=True)
    for found, expected, _ in lives:
        torch.testing.assert_close(found, expected, rtol=CLOSE, atol=CLOSE)
        # Dropout makes two graphs of a module that has it, whoever brought it.
        assert counter.frame_count <= base_counter.frame_count * (2 if "dropout" in setup.options else 1)
    assert counter.frame_count > 0
    state = adapter_state_dict(model)
    for name, trained in adapter_state_dict(twin).items():
        torch.testing.assert_close(state[name], trained, rtol=CLOSE, atol=CLOSE)
        assert not torch.equal(state[name], start[name]), name


SWITCHED = ("linear", "conv1d", "padded embedding", "convolution 2d", "transposed convolution 1d", "linear, DoRA")
SWITCHED += ("linear, a bias on B", "linear, biases of the base", "linear, slices", "tied embedding, tokens")
SWITCHED += ("attention", "encoder", "GRU cell", "bilinear", "experts")


@pytest.mark.parametrize("setup", [SETUPS[name] for name in SWITCHED], ids=SWITCHED)
@pytest.mark.parametrize("grad", [True, False])
def test_modes_merge_and_detach_reach_compiled_model(setup: Setup, grad: bool, rng):
    base, model, x = setup.model(rng)
    call, counter = compiled(model.eval(), setup.backend)
    base.eval()
    tasks = [adapter_state_dict(model)]
    train_everything(model, rng)
    tasks.append(adapter_state_dict(model))
    with torch.set_grad_enabled(grad):
        counts = []
        for task in (0, 1, 0):
            load_adapter_state_dict(model, tasks[task])
            output = model(x)
            assert not torch.allclose(output, base(x))
            for switch, expected in ((nullcontext, output), (disabled, base(x)), (merged, output)):
                with switch(model):
                    torch.testing.assert_close(call(x), expected, rtol=CLOSE, atol=CLOSE)
            counts.append(counter.frame_count)
        assert counts[2] == counts[1] <= 4  # the base, the merged model, the adapted one; and tasks cost nothing
        torch.testing.assert_close(call(x), output, rtol=CLOSE, atol=CLOSE)
        detach(model)
        torch.testing.assert_close(call(x), base(x), rtol=CLOSE, atol=CLOSE)


EXPORTED = ("linear", "linear, slices")
MANY = 1 << 14  # elements; layers compute larger inputs in another way than smaller ones


@pytest.mark.parametrize("setup", [SETUPS[name] for name in EXPORTED], ids=EXPORTED)
def test_exported_model_takes_batches_of_every_size(setup: Setup, rng):
    _, model, x = setup.model(rng)
    exported = torch.export.export(model.eval(), (x,), dynamic_shapes=({0: torch.export.Dim("batch", min=2)},))
    for size in (2, 2 * MANY // x[0].numel()):
        batch = x[:1].repeat(size, *[1] * (x.ndim - 1))
        torch.testing.assert_close(exported.module()(batch), model(batch), rtol=CLOSE, atol=CLOSE)
