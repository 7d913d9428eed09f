"""One reader: the same matrices from the module, from its checkpoint and from its PEFT directory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_lora import (
    LoRACallback,
    LoRAConfig,
    adapter_state_dict,
    attach,
    load_adapter,
    lora_layers,
    merged,
    save_adapter,
)
from lightning_lora.analysis import AdapterMatrix, read_matrices
from lightning_lora.state import describe
from lightning_lora.storage.checkpoint import RECORD_KEY
from tests.contract import assert_unchanged, snapshot
from tests.peft_format.kinds import KINDS, WARNED, seeded
from tests.peft_format.models import trained_by_peft
from tests.toys import Toy, loader, trainer

pytestmark = [*WARNED, pytest.mark.filterwarnings("ignore:These adapters are not smaller.*")]

# What the checkpoint and the module hold besides what PEFT can express.
ONLY_HERE: dict[str, tuple[Any, dict[str, Any]]] = {
    "grouped convolution": (lambda: nn.Sequential(nn.Conv2d(8, 12, 3, groups=2)), {"target_modules": ["0"]}),
    "transposed convolution": (lambda: nn.Sequential(nn.ConvTranspose1d(8, 12, 3)), {"target_modules": ["0"]}),
    "recurrent": (lambda: nn.Sequential(nn.LSTM(8, 6)), {"target_modules": ["0"]}),
    "slices": (
        lambda: nn.Sequential(nn.Linear(8, 24)),
        {"target_modules": [], "target_slices": {"0": {"q": "0:8", "v": "16:24"}}},
    ),
}
EVERY = {name: (build, options) for name, (build, _, options) in KINDS.items()} | ONLY_HERE


def adapted(build: Any, options: dict[str, Any]) -> nn.Module:
    model = seeded(build)
    attach(model, LoRAConfig(**({"rank": 2, "alpha": 3, "target_modules": ["layer"]} | options)))
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for tensor in (p for p in model.parameters() if p.requires_grad):
            tensor.add_(0.2 * torch.randn(tensor.shape, generator=generator))
    return model


def write_checkpoint(model: nn.Module, path: Path) -> Path:
    torch.save({"state_dict": adapter_state_dict(model), RECORD_KEY: describe(model)}, path)
    return path


def assert_same(found: list[AdapterMatrix], expected: list[AdapterMatrix], *, with_weights: bool) -> None:
    assert {m.name for m in found} == {m.name for m in expected}
    by_name = {matrix.name: matrix for matrix in expected}
    for matrix in found:
        other = by_name[matrix.name]
        torch.testing.assert_close(update(matrix), update(other), rtol=1e-5, atol=1e-7)
        assert matrix.is_rescaled == other.is_rescaled
        assert (matrix.weight is not None) is with_weights
        if matrix.weight is not None:
            assert torch.equal(matrix.weight, other.weight)


def update(matrix: AdapterMatrix) -> Tensor:
    return matrix.scaling * matrix.B.double() @ matrix.A.double()


# With DoRA the update is not the product of the factors alone.
PRODUCTS = [kind for kind, (_, options) in EVERY.items() if not options.get("use_dora")]


@pytest.mark.parametrize("kind", PRODUCTS)
def test_the_matrices_of_a_module_add_up_to_its_updates(kind: str):
    build, options = EVERY[kind]
    model = adapted(build, options)
    found = read_matrices(model)
    expected = sum(
        float(layer.delta_weight(name).double().square().sum())
        for layer in lora_layers(model).values()
        for name in layer.adapted_parameters()
        if name != "bias"
    )
    assert sum(float(update(m).square().sum()) for m in found) == pytest.approx(expected, rel=1e-5)
    for matrix in found:
        assert matrix.weight is not None
        assert matrix.shape == tuple(matrix.weight.shape)
        assert matrix.rank == matrix.B.shape[1]


@pytest.mark.parametrize("kind", EVERY)
@pytest.mark.parametrize("with_base", [True, False])
def test_a_checkpoint_holds_the_same_matrices(kind: str, with_base: bool, tmp_path: Path):
    build, options = EVERY[kind]
    model, base = adapted(build, options), seeded(build) if with_base else None
    before = {} if base is None else snapshot(base)
    found = read_matrices(write_checkpoint(model, tmp_path / "a.ckpt"), base)
    assert_same(found, read_matrices(model), with_weights=with_base)
    if base is not None:
        assert_unchanged(base, before)


@pytest.mark.parametrize("kind", KINDS)
def test_a_peft_directory_with_its_base_holds_the_same_matrices(kind: str, tmp_path: Path):
    build, options = EVERY[kind]
    model = adapted(build, options)
    save_adapter(model, tmp_path / "a")
    found, expected = read_matrices(tmp_path / "a", seeded(build)), read_matrices(model)
    if "slices" in kind:  # PEFT has no slices: one update of the whole weight
        [whole] = [matrix for matrix in found if update(matrix).any()]
        blocks = expected
        torch.testing.assert_close(update(whole)[:8], update(blocks[0]))
        torch.testing.assert_close(update(whole)[16:], update(blocks[1]))
        assert not update(whole)[8:16].any()
    elif "its inputs alone" in kind or "its output alone" in kind:  # PEFT adapts both projections: the other by zeros
        assert {m.name for m in found if update(m).any()} == {m.name for m in expected}
    else:
        assert_same(found, expected, with_weights=True)


@pytest.mark.parametrize("kind", KINDS)
def test_a_peft_directory_alone_holds_the_same_updates(kind: str, tmp_path: Path):
    build, options = EVERY[kind]
    model = adapted(build, options)
    save_adapter(model, tmp_path / "a")
    if "target_parameters" in options and "rank_pattern" in options:
        with pytest.raises(ValueError, match="Give it as base"):
            read_matrices(tmp_path / "a")
        return
    # Names are those of the file: it does not say what a parameter is called.
    found, expected = read_matrices(tmp_path / "a"), read_matrices(tmp_path / "a", seeded(build))
    assert all(matrix.weight is None for matrix in found)
    norms = [sorted(float(update(m).norm()) for m in each) for each in (found, expected)]
    assert norms[0] == pytest.approx(norms[1], rel=1e-5)
    if "target_parameters" not in options:
        assert {m.name for m in found} == {m.name for m in expected}


@pytest.mark.parametrize("with_base", [True, False])
def test_a_directory_that_peft_wrote(with_base: bool, tmp_path: Path):
    def build() -> nn.Module:
        return nn.Sequential(nn.Linear(8, 12), nn.Embedding(20, 8), nn.Conv2d(3, 8, 3))

    model = trained_by_peft(
        seeded(build), target_modules=["0", "1", "2"], rank_pattern={"1": 3}, alpha_pattern={"2": 5}
    )
    model.save_pretrained(tmp_path / "a")
    found = read_matrices(tmp_path / "a", seeded(build) if with_base else None)
    assert [m.name for m in found] == ["0", "1", "2"]
    for matrix in found:
        layer = model.base_model.model[int(matrix.name)]
        dense = layer.get_delta_weight("default").double()
        dense = dense.T if matrix.name == "1" else dense.flatten(1)
        torch.testing.assert_close(update(matrix), dense, rtol=1e-5, atol=1e-6)
        if with_base:
            weight = layer.base_layer.weight
            assert torch.equal(matrix.weight, weight.T if matrix.name == "1" else weight.flatten(1))


@pytest.mark.parametrize("kind", ["attention", "experts", "conv3d", "padded embedding", "conv2d with DoRA"])
def test_what_peft_wrote_is_the_same_with_and_without_the_base(kind: str, tmp_path: Path):
    build, options = EVERY[kind]
    options = {"target_modules": ["layer"]} | options
    trained_by_peft(seeded(build), **options).save_pretrained(tmp_path / "a")
    alone, with_base = read_matrices(tmp_path / "a"), read_matrices(tmp_path / "a", seeded(build))
    loaded_here = seeded(build)
    load_adapter(loaded_here, tmp_path / "a")
    assert_same(with_base, read_matrices(loaded_here), with_weights=True)
    norms = [sorted(float(update(m).norm()) for m in each) for each in (alone, with_base)]
    assert norms[0] == pytest.approx(norms[1], rel=1e-5)
    assert min(norms[0]) > 0


def test_a_checkpoint_of_a_run(tmp_path: Path):
    run = trainer(LoRACallback(rank=2), root=tmp_path)
    model = Toy()
    run.fit(model, loader())
    run.save_checkpoint(tmp_path / "run.ckpt")
    assert_same(read_matrices(tmp_path / "run.ckpt", Toy()), read_matrices(model), with_weights=True)
    # A base that carries adapters itself is read without them.
    assert_same(read_matrices(str(tmp_path / "run.ckpt"), model), read_matrices(model), with_weights=True)


def test_tokens_are_rows_that_changed(tmp_path: Path):
    def build() -> nn.Module:
        return nn.Sequential(nn.Embedding(20, 8), nn.Linear(8, 8))

    options = {"target_modules": ["1"], "trainable_token_indices": {"0": [3, 11]}}
    model, base = adapted(build, options), seeded(build)
    change = lora_layers(model)["0"].lora.rows.detach() - base[0].weight.detach()[[3, 11]]
    save_adapter(model, tmp_path / "a")
    checkpoint = write_checkpoint(model, tmp_path / "a.ckpt")
    for source, given in ((model, None), (checkpoint, base), (tmp_path / "a", base)):
        assert [m.name for m in read_matrices(source, given)] == ["1"]
        rows = next(m for m in read_matrices(source, given, tokens=True) if m.name == "0")
        torch.testing.assert_close(update(rows), change.double(), rtol=1e-6, atol=1e-7)
        assert torch.equal(rows.weight, base[0].weight[[3, 11]])
    with pytest.raises(ValueError, match="tokens=True needs the base"):
        read_matrices(checkpoint, tokens=True)


def test_weights_without_memory_are_unknown():
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(8, 8))
    attach(model, LoRAConfig(rank=2))
    assert read_matrices(model)[0].weight is None


def test_what_cannot_be_read_is_refused(tmp_path: Path):
    build, options = EVERY["linear"]
    model = adapted(build, options)
    path = write_checkpoint(model, tmp_path / "a.ckpt")
    with pytest.raises(ValueError, match="has no adapters"):
        read_matrices(seeded(build))
    with pytest.raises(ValueError, match="leave base out"):
        read_matrices(model, seeded(build))
    with merged(model), pytest.raises(RuntimeError, match=r"leave merged\(\) first"):
        read_matrices(model)
    with pytest.raises(ValueError, match="matched no"):
        read_matrices(path, nn.Sequential(nn.Linear(8, 8)))
    with pytest.raises(ValueError, match="the update is"):
        read_matrices(path, nn.ModuleDict({"layer": nn.Linear(9, 9)}))
    with pytest.raises(FileNotFoundError):
        read_matrices(tmp_path / "nothing.ckpt")
    state = torch.load(path, weights_only=True)
    del state["state_dict"]["layer.lora.A"]
    torch.save(state, path)
    with pytest.raises(ValueError, match="no factors of 'layer'"):
        read_matrices(path)
