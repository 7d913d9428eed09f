"""A vision transformer with query and value as slices of one fused layer: train, save, reload."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_lora import LoRACallback, adapter_state_dict, detach, load_adapter, merge
from lightning_lora.adapted_model import AdaptedModel
from tests.contract import error
from tests.test_models import MODELS, Classifier, images
from tests.toys import digest, trainer

DIM, HEADS, DEPTH = 24, 3, 2
QUERY_AND_VALUE = {"attn.qkv": {"q": f"0:{DIM}", "v": f"{2 * DIM}:{3 * DIM}"}}


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Linear(DIM, 3 * DIM), nn.Linear(DIM, DIM)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).view(*x.shape[:2], 3, HEADS, -1).permute(2, 0, 3, 1, 4)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.attn, self.norm2 = nn.LayerNorm(DIM), Attention(), nn.LayerNorm(DIM)
        self.mlp = nn.Sequential(nn.Linear(DIM, 2 * DIM), nn.GELU(), nn.Linear(2 * DIM, DIM))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class ViT(nn.Module):
    """Patches of an 8 x 8 image, a class token, positions, blocks, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.patch_embed, self.head = nn.Conv2d(3, DIM, 2, 2), nn.Linear(DIM, 5)
        self.cls_token = nn.Parameter(0.1 * torch.randn(1, 1, DIM))
        self.pos_embed = nn.Parameter(0.1 * torch.randn(1, 1 + 16, DIM))
        self.blocks, self.norm = nn.Sequential(*(Block() for _ in range(DEPTH))), nn.LayerNorm(DIM)

    def forward(self, x: Tensor) -> Tensor:
        patches = self.patch_embed(x).flatten(2).transpose(1, 2)
        tokens = torch.cat([self.cls_token.expand(len(x), -1, -1), patches], 1) + self.pos_embed
        return self.head(self.norm(self.blocks(tokens))[:, 0])


@pytest.fixture
def make(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Build classifiers around the transformer, always with the same weights."""
    monkeypatch.setitem(MODELS, "vit", (ViT, images, {}, 0))
    return lambda: Classifier("vit")


@pytest.mark.parametrize("options", [{}, {"use_dora": True}, {"target_modules": ["proj"], "dropout": 0.1}], ids=str)
def test_query_and_value_slices_reload_to_same_outputs(options: dict[str, Any], make, tmp_path: Path):
    torch.manual_seed(0)
    x, labels = images(), torch.randint(5, (16,))
    module, fresh = make(), make()
    base, qkv = digest(module), module.net.blocks[1].attn.qkv
    inputs = torch.randn(4, DIM)
    with torch.no_grad():
        before, loss, projected = module(x), F.cross_entropy(module(x), labels), qkv(inputs)
    callback = LoRACallback(**{"rank": 4, "target_modules": [], "target_slices": QUERY_AND_VALUE} | options)
    run = trainer(callback, max_steps=20, max_epochs=-1)
    run.fit(module.train(), DataLoader(TensorDataset(x, labels), batch_size=8))
    slices = {f"net.blocks.{i}.attn.qkv.{name}" for i in range(DEPTH) for name in "qv"}
    plain = {f"net.blocks.{i}.attn.proj" for i in range(DEPTH)} if "target_modules" in options else set()
    assert set(AdaptedModel(module).adapters) == slices | plain
    assert all(adapter.B.count_nonzero() for adapter in AdaptedModel(module).adapters.values())
    run.save_checkpoint(tmp_path / "adapter.ckpt")
    saved = torch.load(tmp_path / "adapter.ckpt", weights_only=True)["state_dict"]
    assert saved.keys() == adapter_state_dict(module).keys()
    module.eval()
    with torch.no_grad():
        after, q_k_v = module(x), qkv(inputs)
        assert F.cross_entropy(after, labels) < loss - 0.01
        assert torch.equal(q_k_v[:, DIM : 2 * DIM], projected[:, DIM : 2 * DIM])
        assert not torch.isclose(q_k_v, projected)[:, [*range(DIM), *range(2 * DIM, 3 * DIM)]].all(0).any()
        load_adapter(fresh, tmp_path / "adapter.ckpt")
        assert torch.equal(fresh.eval()(x), after)
    frozen = {name: bits for name, bits in digest(module).items() if ".lora." not in name}
    assert frozen == base
    detach(module)
    assert digest(module) == base
    with torch.no_grad():
        assert torch.equal(module(x), before)
        merge(fresh)
        assert error(fresh(x), after) <= 1e-5
    changed = {name for name, bits in digest(fresh).items() if bits != base[name]}
    assert changed == {name.removesuffix(".q") + ".weight" for name in slices | plain if not name.endswith(".v")}
