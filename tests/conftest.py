"""Shared fixtures: seeded randomness, a tiny model, and its adapter in files."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from lightning_lora import LoRAConfig, attach, save_adapter
from lightning_lora.ops import linear as ops
from lightning_lora.ops import recompute as recomputed
from tests.contract import train_all

if not torch.cuda.is_available():
    # Triton reads it on import, whoever imports it first; only the tests of the kernels use Triton here.
    os.environ.setdefault("TRITON_INTERPRET", "1")


class TinyModel(nn.Module):
    """Maps tokens to class scores; its layer names are common in real models."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 16)
        self.blocks = nn.ModuleList(
            nn.ModuleDict({"q_proj": nn.Linear(16, 16), "act": nn.GELU(), "v_proj": nn.Linear(16, 16, bias=False)})
            for _ in range(2)
        )
        self.norm = nn.LayerNorm(16)
        self.head = nn.Linear(16, 8)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        for block in self.blocks:
            x = x + block["v_proj"](block["act"](block["q_proj"](x)))
        return self.head(self.norm(x))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put files with slow tests first, so that processes that take whole files end at about the same time."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    # Without a GPU, torch.manual_seed formats the stack each time, which is slower than many of the tests.
    torch.default_generator.manual_seed(0)
    if torch.cuda.is_available():
        torch.cuda.manual_seed_all(0)


@pytest.fixture(autouse=True)
def _fast_path_for_small_layers(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Take the fast path, as real models do; the layers of the tests are too small for it."""
    if "usual_paths" not in request.keywords:
        monkeypatch.setattr(ops, "_FEW", 0)
        monkeypatch.setattr(recomputed, "_FEW", 0)


@pytest.fixture(autouse=True)
def _environment_restored() -> Iterator[None]:
    """Restore the environment: Lightning leaves ranks there that would make later tests wait for processes."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture
def importable(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Path], None]]:
    """Return a function after which modules of a folder can be imported, until the test ends.

    Examples have modules of equal names: one that stayed behind would be imported instead of another's.
    """
    folders = []

    def importable(folder: Path) -> None:
        monkeypatch.syspath_prepend(folder)
        folders.append(folder)

    yield importable
    for name, module in list(sys.modules.items()):
        if Path(getattr(module, "__file__", None) or "/").parent in folders:
            del sys.modules[name]


@pytest.fixture
def rng() -> torch.Generator:
    return torch.Generator().manual_seed(7)


@pytest.fixture
def tiny() -> nn.Module:
    return TinyModel()


@pytest.fixture
def tokens(rng: torch.Generator) -> Tensor:
    return torch.randint(20, (3, 6), generator=rng)


@pytest.fixture
def files(tiny: nn.Module, rng: torch.Generator, tmp_path: Path) -> tuple[Path, Path]:
    """Return a PEFT directory and its base in two shards."""
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    base.mkdir()
    state = dict(tiny.state_dict())
    names = list(state)
    parts = {"a.safetensors": names[:3], "b.safetensors": names[3:]}
    for file, mine in parts.items():
        save_file({name: state[name] for name in mine}, base / file, metadata={"format": "pt"})
    where = {name: file for file, mine in parts.items() for name in mine}
    (base / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    attach(tiny, LoRAConfig(rank=2, alpha=3.0, target_modules=["q_proj", "v_proj"]))
    train_all(tiny, rng)
    save_adapter(tiny, adapter)
    return adapter, base
