"""The same matrices from a module, its checkpoint and its PEFT directory, with the base in memory or on disk."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
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
from lightning_lora.analysis import AdapterMatrix, analyze, read_matrices
from lightning_lora.analysis.adapters import in_order, kind_of, place, stored_matrices
from lightning_lora.layers.starts import DIFFERENCES
from lightning_lora.state import describe
from lightning_lora.storage.checkpoint import RECORD_KEY
from tests.contract import assert_unchanged, snapshot
from tests.peft_format.kinds import KINDS, WARNED, seeded
from tests.peft_format.models import gpt2, tied_llama, trained, trained_by_peft
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
def test_module_matrices_match_delta_weights(kind: str):
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
def test_checkpoint_matrices_match_module(kind: str, with_base: bool, tmp_path: Path):
    build, options = EVERY[kind]
    model, base = adapted(build, options), seeded(build) if with_base else None
    before = {} if base is None else snapshot(base)
    found = read_matrices(write_checkpoint(model, tmp_path / "a.ckpt"), base)
    assert_same(found, read_matrices(model), with_weights=with_base)
    if base is not None:
        assert_unchanged(base, before)


@pytest.mark.parametrize("kind", KINDS)
def test_peft_directory_with_base_matches_module(kind: str, tmp_path: Path):
    build, options = EVERY[kind]
    model = adapted(build, options)
    save_adapter(model, tmp_path / "a")
    found, expected = read_matrices(tmp_path / "a", seeded(build)), read_matrices(model)
    if "slices" in kind:  # PEFT has no slices: one update of the whole weight
        [whole] = [matrix for matrix in found if update(matrix).any()]
        slices = {matrix.name.rpartition(".")[2]: update(matrix) for matrix in expected}
        nothing = torch.zeros_like(update(whole)[:8])
        torch.testing.assert_close(update(whole), torch.cat([slices.get(part, nothing) for part in "qkv"]))
    elif "its inputs alone" in kind or "its output alone" in kind:  # PEFT adapts both projections: the other by zeros
        assert {m.name for m in found if update(m).any()} == {m.name for m in expected}
    else:
        assert_same(found, expected, with_weights=True)


@pytest.mark.parametrize("kind", KINDS)
def test_peft_directory_without_base_matches_norms(kind: str, tmp_path: Path):
    build, options = EVERY[kind]
    model = adapted(build, options)
    save_adapter(model, tmp_path / "a")
    if "target_parameters" in options and "rank_pattern" in options:
        with pytest.raises(ValueError, match="Give the model as base"):
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
def test_directory_written_by_peft(with_base: bool, tmp_path: Path):
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
def test_directory_written_by_peft_with_and_without_base(kind: str, tmp_path: Path):
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


def test_checkpoint_of_fit(tmp_path: Path):
    run = trainer(LoRACallback(rank=2), root=tmp_path)
    model = Toy()
    run.fit(model, loader())
    run.save_checkpoint(tmp_path / "run.ckpt")
    assert_same(read_matrices(tmp_path / "run.ckpt", Toy()), read_matrices(model), with_weights=True)
    # A base that carries adapters itself is read without them.
    assert_same(read_matrices(str(tmp_path / "run.ckpt"), model), read_matrices(model), with_weights=True)


def test_tokens_are_changed_rows(tmp_path: Path):
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


def test_meta_weights_are_unknown():
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(8, 8))
    attach(model, LoRAConfig(rank=2))
    assert read_matrices(model)[0].weight is None


def test_unreadable_sources_raise(tmp_path: Path):
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


# --- a base on disk


def written(model: nn.Module, folder: Path, form: str) -> Path:
    if form == "directory":
        save_adapter(model, folder / "adapter")
        return folder / "adapter"
    torch.save({"state_dict": adapter_state_dict(model), RECORD_KEY: describe(model)}, folder / "last.ckpt")
    return folder / "last.ckpt"


# Of experts, a directory does not hold the order, and is refused as merging refuses it.
@pytest.mark.parametrize(
    ("kind", "form"),
    [("experts", "checkpoint")]
    + [
        (kind, form)
        for kind in ("linear", "conv2d", "padded embedding", "conv2d with DoRA")
        for form in ("directory", "checkpoint")
    ],
)
def test_base_on_disk_matches_module(kind: str, form: str, tmp_path: Path):
    build, _, options = KINDS[kind]
    model = seeded(build)
    save_file(dict(model.state_dict()), tmp_path / "model.safetensors")
    trained(model, **({"target_modules": ["layer"]} | options))
    found = analyze(written(model, tmp_path, form), tmp_path / "model.safetensors")
    assert_same_numbers(found.to_dict(), analyze(model).to_dict())


@pytest.mark.parametrize("options", [{}, {"target_modules": ["lm_head", "q_proj"], "untie_weights": True}], ids=str)
def test_tied_base_in_shards(options: dict[str, Any], tmp_path: Path):
    model = tied_llama()
    model.save_pretrained(tmp_path / "base", max_shard_size="6KB")
    save_adapter(trained(model, **options), tmp_path / "adapter")
    found = analyze(tmp_path / "adapter", str(tmp_path / "base"))
    assert_same_numbers(found.to_dict(), analyze(model).to_dict())


def assert_same_numbers(found: dict[str, Any], expected: dict[str, Any]) -> None:
    ours, theirs = ({layer["name"]: layer for layer in each["layers"]} for each in (found, expected))
    assert ours.keys() == theirs.keys()
    for name, layer in theirs.items():
        assert layer["relation"] is not None
        assert ours[name].pop("relation") == pytest.approx(layer.pop("relation"), rel=1e-9)
        assert ours[name].pop("singular_values") == pytest.approx(layer.pop("singular_values"), rel=1e-9)
        assert {k: round(v, 8) if isinstance(v, float) else v for k, v in ours[name].items()} == {
            k: round(v, 8) if isinstance(v, float) else v for k, v in layer.items()
        }


def test_tokens_with_base_on_disk(tmp_path: Path):
    model = gpt2()
    model.save_pretrained(tmp_path / "base")
    options = {"target_modules": ["c_attn"], "trainable_token_indices": {"transformer.wte": [5, 2]}}
    save_adapter(trained(model, **options), tmp_path / "adapter")
    found = {each.name: each for each in stored_matrices(tmp_path / "adapter", tmp_path / "base", tokens=True)}
    rows = next(each for each in read_matrices(model, tokens=True) if each.name == "transformer.wte")
    torch.testing.assert_close(found["transformer.wte"].A, rows.A)
    assert "transformer.wte" not in {each.name for each in stored_matrices(tmp_path / "adapter", tmp_path / "base")}


@pytest.mark.parametrize("init", DIFFERENCES)
def test_update_from_a_computed_start_is_the_same_with_base_on_disk(init: str, tmp_path: Path):
    model = nn.Sequential(nn.Linear(12, 20))
    save_file(dict(model.state_dict()), tmp_path / "model.safetensors")
    path = write_checkpoint(trained(model, target_modules=["0"], init=init), tmp_path / "last.ckpt")
    (found,) = stored_matrices(path, tmp_path / "model.safetensors", check_base=False)
    state = {name: tensor.double() for name, tensor in adapter_state_dict(model).items()}
    change = state["0.lora.B"] @ state["0.lora.A"] - state["0.lora.B0"] @ state["0.lora.A0"]
    torch.testing.assert_close(update(found), 3 / 2 * change, rtol=1e-5, atol=1e-6)  # alpha / rank of `trained`


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path]:
    model = nn.ModuleList(nn.ModuleDict({"up": nn.Linear(12, 20), "down": nn.Linear(20, 12)}) for _ in range(2))
    save_file(dict(model.state_dict()), tmp_path / "model.safetensors")
    return written(trained(model), tmp_path, "directory"), tmp_path / "model.safetensors"


def test_one_weight_in_memory_and_progress(files: tuple[Path, Path]):
    steps: list[tuple[int, int]] = []
    seen: list[torch.Tensor] = []
    for matrix in stored_matrices(*files, progress=lambda done, todo: steps.append((done, todo))):
        assert matrix.weight is not None
        seen.append(matrix.weight)
    assert steps == [(done, 4) for done in range(5)]
    assert len({weight.data_ptr() for weight in seen}) == 4
    assert all(float(weight.std()) > 0 for weight in seen)


def test_mismatched_base_on_disk_raises_first(files: tuple[Path, Path], tmp_path: Path):
    adapter, _ = files
    with pytest.raises(FileNotFoundError, match="does not exist"):
        stored_matrices(adapter, tmp_path / "nowhere")
    other = {f"{block}.{name}.weight": torch.ones(20, 20) for block in range(2) for name in ("up", "down")}
    save_file(other, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="expected"):
        stored_matrices(adapter, tmp_path / "other.safetensors")
    whole = {"up": (20, 12), "down": (12, 20)}
    quantized = {f"{b}.{n}.weight": torch.ones(*s, dtype=torch.int8) for b in range(2) for n, s in whole.items()}
    save_file(quantized, tmp_path / "small.safetensors")
    with pytest.raises(ValueError, match="quantized"):
        stored_matrices(adapter, tmp_path / "small.safetensors")


def test_module_with_base_on_disk_raises(files: tuple[Path, Path]):
    with pytest.raises(ValueError, match="leave base out"):
        analyze(trained(nn.ModuleDict({"layer": nn.Linear(12, 20)})), files[1])


def test_intruders_with_base_on_disk(files: tuple[Path, Path]):
    found = analyze(*files, intruders=True)
    assert all(layer.intruders is not None for layer in found.layers)
    assert not math.isnan(json.loads(json.dumps(found.to_dict()))["layers"][0]["relation"]["amplification"])


# --- names


@pytest.mark.parametrize(
    ("name", "found", "kind"),
    [
        ("h.3.attn.q", ("h.3", "attn.q"), "attn.q"),
        ("encoder.layers.2.blocks.1.fc1", ("encoder.layers.2", "blocks.1.fc1"), "blocks.1.fc1"),
        ("head", ("", "head"), "head"),
        ("body.head", ("", "body.head"), "body.head"),
        ("0.experts.up[12]", ("0", "experts.up[12]"), "experts.up"),
        ("net.0", ("", "net.0"), "net.0"),
        ("blocks.1.net.2", ("blocks.1", "net.2"), "net.2"),
    ],
)
def test_block_and_kind_of_layer(name: str, found: tuple[str, str], kind: str):
    assert place(name) == found
    assert kind_of(name) == kind


def test_names_sort_by_number():
    names = ["h.10.q", "h.9.v", "h.9.q", "body", "h.1.q", "h.10.down"]
    assert sorted(names, key=in_order) == ["body", "h.1.q", "h.9.q", "h.9.v", "h.10.down", "h.10.q"]
