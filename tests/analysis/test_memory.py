from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from lightning_lora import LoRAConfig, attach
from lightning_lora.analysis.memory import MemoryForecast, MemoryUse, forecast_memory
from tests.contract import assert_unchanged, snapshot
from tests.test_quantized import eight_bit
from tests.toys import FEATURES, Toy, loader

RANK, ROWS, IN, HIDDEN, OUT = 2, 32, 8, 64, 4
CONFIG = LoRAConfig(rank=RANK)


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(IN, HIDDEN), nn.Tanh(), nn.Linear(HIDDEN, OUT))


def total(tensors: Any) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def test_weights_gradients_and_optimizer_bytes():
    model = mlp()
    forecast = forecast_memory(model, CONFIG)
    base = total(model.parameters())
    factors = 4 * RANK * ((IN + HIDDEN) + (HIDDEN + OUT))
    assert forecast.full == MemoryUse(base, base, 2 * base, None)  # two averages in the parameters' own float32
    assert forecast.lora == MemoryUse(base + factors, factors, 2 * factors, None)
    assert forecast.lora.total == base + 4 * factors


def test_activations_match_hand_count():
    forecast = forecast_memory(mlp(), CONFIG, torch.randn(ROWS, IN))
    # The inputs of both layers: the batch, and the output of tanh, which tanh needs too.
    assert forecast.full.activations == 4 * ROWS * (IN + HIDDEN)
    # With LoRA also A's output in each layer.
    assert forecast.lora.activations == 4 * ROWS * (IN + HIDDEN + 2 * RANK)


def test_shared_activation_counts_once():
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k = nn.Linear(IN, HIDDEN), nn.Linear(IN, HIDDEN)

        def forward(self, x: Tensor) -> Tensor:
            return self.q(x) + self.k(x[:, :])

    assert forecast_memory(Both(), CONFIG, torch.randn(ROWS, IN)).full.activations == 4 * ROWS * IN


class Live(TorchDispatchMode):
    """Follows every memory that is made, until it is freed."""

    def __init__(self, tensors: list[Tensor]) -> None:
        super().__init__()
        self.storages: dict[int, tuple[StorageWeakRef, int]] = {}
        for tensor in tensors:
            self.follow(tensor)

    def follow(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        self.storages[storage._cdata] = StorageWeakRef(storage), storage.nbytes()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, Tensor):
                self.follow(tensor)
        return result

    @property
    def nbytes(self) -> int:
        return sum(nbytes for storage, nbytes in self.storages.values() if not storage.expired())


class Attends(nn.Module):
    """A block with everything that keeps activations: attention, norms, dropout, a perceptron."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.TransformerEncoderLayer(32, 4, 64, dropout=0.1, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)


def convolutions() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(288, 4))


def normalized() -> nn.Sequential:
    return nn.Sequential(nn.Linear(IN, HIDDEN), nn.BatchNorm1d(HIDDEN), nn.GELU())


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], LoRAConfig]] = {
    "mlp": (mlp, (256, IN), CONFIG),
    "transformer": (Attends, (4, 16, 32), CONFIG),
    "batch norm": (normalized, (128, IN), CONFIG),
    "convolutions": (convolutions, (8, 3, 8, 8), LoRAConfig(rank=RANK, target_modules=["0", "3"])),
}


@pytest.mark.parametrize("in_full", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_total_matches_live_memory_of_real_step(name: str, in_full: bool):
    build, shape, config = MODELS[name]
    model, x = build(), torch.randn(shape)
    forecast = forecast_memory(model, config, x)
    if not in_full:
        attach(model, config)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained)
    with Live([*model.parameters(), *model.buffers(), x]) as live:
        model(x).square().sum().backward()
        optimizer.step()
        output = model(x)  # with the gradients still there: the most that lives at one time
        found = live.nbytes
    expected = forecast.full if in_full else forecast.lora
    assert expected.total == pytest.approx(found - output.nbytes, rel=0.1)


def test_checkpointing_reduces_activations():
    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList(nn.Sequential(mlp(), nn.Linear(OUT, IN)) for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            for block in self.blocks:
                x = checkpoint(block, x, use_reentrant=False)
            return x

    model, x = Checkpointed(), torch.randn(ROWS, IN)
    plain = nn.Sequential(*model.blocks)
    kept = forecast_memory(model, CONFIG, x).lora.activations
    assert kept == pytest.approx(4 * ROWS * IN * 3, rel=0.01)  # each block's input, and a few random states
    assert forecast_memory(plain, CONFIG, x).lora.activations > 5 * kept


def test_meta_device_matches_cpu():
    with torch.device("meta"):
        far, batch = mlp(), torch.empty(ROWS, IN)
    assert forecast_memory(far, CONFIG, batch) == forecast_memory(mlp(), CONFIG, torch.randn(ROWS, IN))


class Everything(nn.Module):
    """Dropout, moving statistics, a frozen weight, a layer in evaluation and a gradient: what a pass could change."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.drop = nn.Linear(IN, HIDDEN), nn.BatchNorm1d(HIDDEN), nn.Dropout(0.5)
        self.last = nn.Linear(HIDDEN, OUT)
        self.drop.eval()
        self.first.weight.requires_grad_(False)
        self.last.weight.grad = torch.ones(OUT, HIDDEN)

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[0] == 1:
            raise RuntimeError("too small")
        return self.last(self.drop(self.norm(self.first(x))))


@pytest.mark.parametrize("fails", [False, True])
def test_forecast_restores_model(fails: bool):
    model = Everything()
    before, modes = snapshot(model), {name: part.training for name, part in model.named_modules()}
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    random = torch.get_rng_state()
    if fails:
        with pytest.raises(RuntimeError, match="too small"):
            forecast_memory(model, CONFIG, torch.randn(1, IN))
    else:
        forecast_memory(model, CONFIG, torch.zeros(ROWS, IN))
        assert torch.equal(torch.get_rng_state(), random)
    assert_unchanged(model, before)
    assert {name: part.training for name, part in model.named_modules()} == modes
    assert {name: p.requires_grad for name, p in model.named_parameters()} == flags
    assert torch.equal(model.last.weight.grad, torch.ones(OUT, HIDDEN))
    assert model.last.bias.grad is None


def test_step_replaces_forward():
    module, batch = Toy(), next(iter(loader(32, 32)))
    with_loss = forecast_memory(module, CONFIG, batch, step=lambda module, batch: module.loss(batch))
    without = forecast_memory(module.net, CONFIG, batch[0])
    assert with_loss.lora.activations - without.lora.activations == 4 * 32 * FEATURES  # what the square keeps


def test_packed_weights_count_stored_bytes():
    model = nn.Sequential(eight_bit(nn.Linear(64, 64)))
    assert forecast_memory(model, CONFIG).full.weights == total([*model.parameters(), *model.buffers()])


def test_tied_weights_count_once():
    model = nn.ModuleDict({"embed": nn.Embedding(50, 8), "q": nn.Linear(8, 8), "head": nn.Linear(8, 50, bias=False)})
    model["head"].weight = model["embed"].weight
    assert forecast_memory(model, LoRAConfig(rank=2, target_modules=["q"])).full.weights == total(model.parameters())


def test_optimizer_without_state():
    assert forecast_memory(mlp(), CONFIG, bytes_per_state=0).full.optimizer == 0


@pytest.mark.parametrize(
    ("use", "words"),
    [
        (MemoryUse(1, 1, 1, 7), "activations dominate (70%): activation checkpointing would help most"),
        (MemoryUse(7, 1, 1, 1), "weights dominate (70%): a base in bfloat16"),
        (MemoryUse(1, 1, 7, 1), "optimizer dominates (70%)"),
        (MemoryUse(1, 7, 1, 1), "gradients dominate (70%)"),
        (MemoryUse(7, 1, 2, None), "weights dominate (70% of what is known without a batch)"),
    ],
)
def test_verdict_names_largest_part(use: MemoryUse, words: str):
    assert MemoryForecast(use, use).verdict.startswith(words)


def test_table_and_json():
    forecast = forecast_memory(mlp(), CONFIG, torch.randn(4096, IN))
    text = str(forecast)
    assert f"activations   {forecast.lora.activations / 1e6:.1f}" in text
    assert text.splitlines()[-1] == forecast.verdict
    assert forecast.verdict.startswith("activations dominate")
    plain = json.loads(json.dumps(forecast.to_dict()))
    assert plain["lora"]["total"] == forecast.lora.total
    assert str(forecast_memory(mlp(), CONFIG)).splitlines()[6].split() == ["activations", "-", "-"]


# --- what is refused


def test_adapted_model_raises():
    model = mlp()
    attach(model, CONFIG)
    with pytest.raises(ValueError, match="before attach, or detach first"):
        forecast_memory(model, CONFIG)


def test_model_without_forward_raises():
    with pytest.raises(ValueError, match=r"ModuleDict has no forward to run a batch through\. Pass step"):
        forecast_memory(nn.ModuleDict({"q": nn.Linear(8, 8)}), CONFIG, torch.randn(2, 8))


def test_step_without_gradient_raises():
    with pytest.raises(TypeError, match="step returned no tensor with a gradient"):
        forecast_memory(mlp(), CONFIG, torch.randn(2, IN), step=lambda module, batch: batch)
