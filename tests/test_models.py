"""Models of different families: train, save, reload into a fresh base, compute the same."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_lora import LoRACallback, detach, load_adapter
from lightning_lora.adapted_model import AdaptedModel
from tests.toys import digest, trainer


class Block(nn.Module):
    """The basic block of a ResNet, with batch normalization."""

    def __init__(self, into: int, out: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(into, out, 3, stride, 1, bias=False), nn.BatchNorm2d(out)
        self.conv2, self.bn2 = nn.Conv2d(out, out, 3, 1, 1, bias=False), nn.BatchNorm2d(out)
        self.shortcut = nn.Sequential(nn.Conv2d(into, out, 1, stride, bias=False), nn.BatchNorm2d(out))

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))) + self.shortcut(x))


class Tagger(nn.Module):
    """A bidirectional LSTM over token embeddings; the mean of its outputs is the class."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.lstm = nn.Embedding(30, 12), nn.LSTM(12, 10, 2, bidirectional=True, batch_first=True)
        self.head = nn.Linear(20, 5)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.lstm(self.embed(tokens))[0]).mean(1)


class Experts(nn.Module):
    """A layer of four experts with stacked weights, weighted by a router."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(12, 4)
        self.up, self.down = nn.Parameter(0.3 * torch.randn(4, 16, 12)), nn.Parameter(0.3 * torch.randn(4, 12, 16))

    def forward(self, x: Tensor) -> Tensor:
        hidden = F.gelu(torch.einsum("bi,eoi->beo", x, self.up))
        return torch.einsum("bei,eoi,be->bo", hidden, self.down, self.router(x).softmax(-1))


def resnet() -> nn.Module:
    stem = [nn.Conv2d(3, 8, 3, 1, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU()]
    blocks = [Block(8, 8, 1), Block(8, 16, 2)]
    return nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 5))


def transformer() -> nn.Module:
    layer = nn.TransformerEncoderLayer(12, 3, 24, dropout=0.0, batch_first=True)
    encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    return nn.Sequential(nn.Embedding(30, 12), encoder, nn.Flatten(), nn.Linear(12 * 6, 5))


def mixture() -> nn.Module:
    return nn.Sequential(nn.Linear(8, 12), Experts(), nn.Linear(12, 5))


def gpt2() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    sizes = {"vocab_size": 30, "n_positions": 8, "n_embd": 16, "n_layer": 2, "n_head": 2}
    still = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}  # dropout noise would hide twenty steps
    config = transformers.GPT2Config(num_labels=5, pad_token_id=0, **sizes, **still)
    return transformers.GPT2ForSequenceClassification(config)


def llama() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = transformers.LlamaConfig(vocab_size=30, num_hidden_layers=2, num_labels=5, pad_token_id=0, **sizes)
    return transformers.LlamaForSequenceClassification(config)


def images() -> Tensor:
    return torch.randn(16, 3, 8, 8)


def tokens() -> Tensor:
    return torch.randint(1, 30, (16, 6))


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor], dict[str, Any], int]] = {
    "resnet": (resnet, images, {"target_modules": ["conv1", "conv2", "shortcut.0", "7"], "frozen_norm": "eval"}, 7),
    "resnet, norms tracked": (resnet, images, {"target_modules": ["conv1", "conv2"], "frozen_norm": "track"}, 4),
    "tagger": (Tagger, tokens, {"target_modules": ["embed", "lstm", "head"]}, 10),
    "transformer": (transformer, tokens, {}, 9),
    "mixture": (
        mixture,
        lambda: torch.randn(16, 8),
        {"target_parameters": ["up", "down"], "exclude_modules": ["2"]},
        4,
    ),
    "gpt2": (gpt2, tokens, {"exclude_modules": ["score"]}, 8),
    "llama": (llama, tokens, {"exclude_modules": ["score"]}, 14),
}
# Some layers are as thin as their adapters; the rest comes from transformers and torch.
pytestmark = pytest.mark.filterwarnings("ignore:These adapters are not smaller.*")


class Classifier(LightningModule):
    """Wraps one of the models, always with the same weights."""

    def __init__(self, name: str) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(3)
            self.net = MODELS[name][0]().eval()

    def forward(self, x: Tensor) -> Tensor:
        output = self.net(x)
        return getattr(output, "logits", output)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=1e-2, weight_decay=0.1)


@pytest.mark.parametrize("name", MODELS)
def test_model_reloads_to_same_outputs(name: str, tmp_path: Path) -> None:
    _, make_inputs, lora, count = MODELS[name]
    torch.manual_seed(0)
    x, labels = make_inputs(), torch.randint(5, (16,))
    module, fresh = Classifier(name), Classifier(name)
    base = digest(module)
    with torch.no_grad():
        before, loss = module(x), F.cross_entropy(module(x), labels)
    run = trainer(LoRACallback(rank=2, **lora), max_steps=20, max_epochs=-1)
    run.fit(module.train(), DataLoader(TensorDataset(x, labels), batch_size=8))
    assert len(AdaptedModel(module).adapters) == count
    run.save_checkpoint(tmp_path / "adapter.ckpt")
    module.eval()
    with torch.no_grad():
        after = module(x)
        assert F.cross_entropy(after, labels) < loss - 0.01
        load_adapter(fresh, tmp_path / "adapter.ckpt")
        assert torch.equal(fresh.eval()(x), after)
        for trained in (module, fresh):
            detach(trained)
            assert digest(trained) == base
            assert torch.equal(trained(x), before)
