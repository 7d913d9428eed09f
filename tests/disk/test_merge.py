"""Merging on disk: the same bits as loading and merging in memory."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lightning_lora import load_adapter, merge, save_adapter
from lightning_lora.layers.starts import DIFFERENCES
from lightning_lora.storage.checkpoint import RECORD_KEY
from tests.files import FACTOR, change_tensors, files_of, run, tensors_of, write_checkpoint
from tests.peft_format.kinds import KINDS, WARNED, seeded
from tests.peft_format.models import (
    bert,
    gpt2,
    llama,
    mixtral,
    t5,
    tied_llama,
    trained,
    trained_by_peft,
    transformers,
    vit,
)

pytestmark = WARNED
transformers.logging.disable_progress_bar()
SMALL_SHARDS = "6KB"


def saved(model: nn.Module, folder: Path) -> Path:
    model.save_pretrained(folder, max_shard_size=SMALL_SHARDS)
    return folder


def reloaded(model: nn.Module, folder: Path, dtype: torch.dtype) -> nn.Module:
    found = type(model).from_pretrained(folder, dtype=dtype)
    for parameter in found.parameters():
        # A mapped file is not aligned as memory is, and with it torch's matrix product rounds otherwise.
        parameter.data = parameter.data.clone()
    return found


def merged_in_memory(model: nn.Module, base: Path, adapter: Path, dtype: torch.dtype) -> dict[str, Tensor]:
    found = reloaded(model, base, dtype)
    load_adapter(found, adapter)
    merge(found)
    return found.state_dict()


def assert_same(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert [name for name in expected if not torch.equal(found[name], expected[name])] == []
    assert {name: tensor.dtype for name, tensor in found.items()} == {n: t.dtype for n, t in expected.items()}


CASES: dict[str, tuple[Callable[[], nn.Module], dict[str, Any]]] = {
    "gpt2": (gpt2, {}),
    "gpt2, patterns and biases": (gpt2, {"use_rslora": True, "rank_pattern": {"*.0.*": 3}, "bias": "lora_only"}),
    "gpt2, DoRA": (gpt2, {"use_dora": True}),
    "gpt2, a bias of B": (gpt2, {"lora_bias": True}),
    "gpt2, slices": (gpt2, {"target_modules": [], "target_slices": {"c_attn": {"q": "0:16", "v": "32:48"}}}),
    "gpt2, its tied head": (gpt2, {"target_modules": ["lm_head", "c_attn"], "untie_weights": True}),
    "gpt2, its tied embedding": (gpt2, {"target_modules": ["wte"], "untie_weights": True}),
    "gpt2, tokens": (gpt2, {"target_modules": ["c_attn"], "trainable_token_indices": {"transformer.wte": [5, 2]}}),
    "gpt2, a norm in full": (gpt2, {"target_modules": ["c_fc"], "modules_to_save": ["transformer.ln_f"]}),
    "llama": (llama, {}),
    "llama, the last block": (llama, {"layers": [-1]}),
    "llama, DoRA": (llama, {"use_dora": True}),
    "llama, embedding and head": (llama, {"target_modules": ["embed_tokens", "lm_head", "q_proj"]}),
    "llama, head in full": (llama, {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}),
    "tied llama": (tied_llama, {}),
    "tied llama, its head": (tied_llama, {"target_modules": ["lm_head"], "untie_weights": True}),
    "bert": (bert, {"target_modules": ["query", "dense"], "modules_to_save": ["classifier"], "bias": "all"}),
    "t5": (t5, {}),
    "mixtral's attention": (mixtral, {"target_modules": ["q_proj", "o_proj"]}),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", CASES)
def test_merge_matches_in_memory(case: str, dtype: torch.dtype, tmp_path: Path) -> None:
    make, options = CASES[case]
    base = saved(make().to(dtype), tmp_path / "base")
    save_adapter(trained(make().to(dtype), **options), tmp_path / "adapter")
    before = files_of(base)
    assert run("merge", tmp_path / "adapter", base, tmp_path / "out") == 0
    expected = merged_in_memory(make(), base, tmp_path / "adapter", dtype)
    assert_same(reloaded(make(), tmp_path / "out", dtype).state_dict(), expected)
    assert files_of(base) == before


@pytest.mark.parametrize("options", [{}, {"use_dora": True}, {"use_rslora": True, "r": 3}], ids=str)
@pytest.mark.parametrize("make", [gpt2, llama], ids=["gpt2", "llama"])
def test_merge_of_peft_adapter_matches_in_memory(
    make: Callable[[], nn.Module], options: dict[str, Any], tmp_path: Path
) -> None:
    base = saved(make(), tmp_path / "base")
    targets = ["c_attn", "c_proj"] if make is gpt2 else ["q_proj", "down_proj"]
    trained_by_peft(make(), target_modules=targets, **options).save_pretrained(tmp_path / "adapter")
    assert run("merge", tmp_path / "adapter", base, tmp_path / "out") == 0
    expected = merged_in_memory(make(), base, tmp_path / "adapter", torch.float32)
    assert_same(reloaded(make(), tmp_path / "out", torch.float32).state_dict(), expected)


@pytest.mark.parametrize("options", [CASES[case][1] for case in CASES if case.startswith("gpt2")], ids=str)
def test_merge_of_checkpoint_matches_in_memory(options: dict[str, Any], tmp_path: Path) -> None:
    base = saved(gpt2(), tmp_path / "base")
    inside = nn.ModuleDict({"model": gpt2()})  # as in a LightningModule
    if "trainable_token_indices" in options:
        options = options | {"trainable_token_indices": {"model.transformer.wte": [2, 5]}}
    if "modules_to_save" in options:
        options = options | {"modules_to_save": ["model.transformer.ln_f"]}
    write_checkpoint(trained(inside, **options), tmp_path / "last.ckpt")
    assert run("merge", tmp_path / "last.ckpt", base, tmp_path / "out") == 0
    expected = nn.ModuleDict({"model": reloaded(gpt2(), base, torch.float32)})
    load_adapter(expected, tmp_path / "last.ckpt")
    merge(expected)
    assert_same(reloaded(gpt2(), tmp_path / "out", torch.float32).state_dict(), expected["model"].state_dict())


def test_adapter_of_model_with_head_fits_bare_model(tmp_path: Path) -> None:
    base = saved(gpt2().transformer, tmp_path / "base")
    save_adapter(trained(gpt2()), tmp_path / "adapter")
    assert run("merge", tmp_path / "adapter", base, tmp_path / "out") == 0
    whole = gpt2()
    load_adapter(whole, tmp_path / "adapter")
    merge(whole)
    assert_same(type(whole.transformer).from_pretrained(tmp_path / "out").state_dict(), whole.transformer.state_dict())


def test_new_head_is_added(tmp_path: Path) -> None:
    model = bert()
    base = saved(model.bert, tmp_path / "base")
    options = {"target_modules": ["bert.encoder.layer.0.attention.self.query"], "modules_to_save": ["classifier"]}
    tuned = trained(model, **options)
    save_adapter(tuned, tmp_path / "adapter")
    assert run("merge", tmp_path / "adapter", base, tmp_path / "out") == 0
    written = tensors_of(tmp_path / "out")
    merge(tuned)
    assert torch.equal(written["classifier.weight"], tuned.classifier.weight)
    name = "encoder.layer.0.attention.self.query.weight"
    assert torch.equal(written[name], tuned.bert.get_parameter(name))


@pytest.mark.parametrize("saved_modules", [["classifier"], ["model.classifier"], "auto", ["*.class*"]], ids=str)
def test_new_head_of_checkpoint_is_added(saved_modules: Any, tmp_path: Path) -> None:
    model = bert()
    base = saved(model.bert, tmp_path / "base")
    inside = nn.ModuleDict({"model": model})  # as in a LightningModule
    tuned = trained(inside, target_modules=["query"], modules_to_save=saved_modules)
    write_checkpoint(tuned, tmp_path / "last.ckpt")
    assert run("verify", tmp_path / "last.ckpt", base) == 0
    assert run("merge", tmp_path / "last.ckpt", base, tmp_path / "out") == 0
    merge(tuned)
    expected = {name.removeprefix("bert."): tensor for name, tensor in model.state_dict().items()}
    assert_same(tensors_of(tmp_path / "out"), expected)


def test_new_head_with_name_of_base_tensor_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = saved(bert(), tmp_path / "base")
    inside = nn.ModuleDict({"model": bert(), "classifier": nn.Linear(4, 2)})
    write_checkpoint(trained(inside, target_modules=["query"], modules_to_save=["classifier"]), tmp_path / "last.ckpt")
    assert run("merge", tmp_path / "last.ckpt", base, tmp_path / "out") != 0
    assert "classifier.weight, classifier.bias: trained in full and not in the base" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_dtype_rounds_once(tmp_path: Path) -> None:
    base = saved(llama(), tmp_path / "base")
    save_adapter(trained(llama()), tmp_path / "adapter")
    assert run("merge", tmp_path / "adapter", base, tmp_path / "out", "--dtype", "bf16") == 0
    expected = merged_in_memory(llama(), base, tmp_path / "adapter", torch.float32)
    assert_same(tensors_of(tmp_path / "out"), {name: tensor.bfloat16() for name, tensor in expected.items()})
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"


def test_merged_folder_is_complete(tmp_path: Path) -> None:
    base = saved(llama(), tmp_path / "base")
    (base / "tokenizer.json").write_text("{}")
    (base / "pytorch_model.bin").write_text("other weights stay behind")
    save_adapter(trained(llama()), tmp_path / "adapter")
    assert run("merge", tmp_path / "adapter", base, tmp_path / "out") == 0
    old, new = files_of(base), files_of(tmp_path / "out")
    assert new.keys() == old.keys() - {"pytorch_model.bin"}
    assert len([name for name in new if name.endswith(".safetensors")]) > 2
    assert new["tokenizer.json"] == old["tokenizer.json"]
    assert new["config.json"] == old["config.json"]
    indices = [json.loads(each["model.safetensors.index.json"]) for each in (old, new)]
    assert indices[0]["weight_map"] == indices[1]["weight_map"]
    assert indices[0]["metadata"]["total_size"] == indices[1]["metadata"]["total_size"]


# PEFT tells parameters of one module apart by an order that no file holds; these have shapes that do not tell either.
UNTOLD = ("experts", "transposed experts")


@pytest.mark.parametrize("kind", UNTOLD)
def test_ambiguous_experts_are_refused(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    build, _, options = KINDS[kind]
    model = seeded(build)
    save_file(dict(model.state_dict()), tmp_path / "model.safetensors")
    save_adapter(trained(model, **options), tmp_path / "adapter")
    assert run("merge", tmp_path / "adapter", tmp_path / "model.safetensors", tmp_path / "out") == 1
    assert "do not tell how the model reads them" in capsys.readouterr().err


@pytest.mark.parametrize("make", [mixtral], ids=["mixtral"])
def test_merge_of_transformers_experts_matches_in_memory(make: Callable[[], nn.Module], tmp_path: Path) -> None:
    model = make()
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    names = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    save_adapter(trained(model, target_modules=["q_proj"], target_parameters=names), tmp_path / "adapter")
    assert run("merge", tmp_path / "adapter", tmp_path / "model.safetensors", tmp_path / "out") == 0
    merge(model)
    assert_same(load_file(tmp_path / "out" / "model.safetensors"), model.state_dict())


def test_renamed_tensors_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = saved(vit(), tmp_path / "base")
    save_adapter(trained(vit()), tmp_path / "adapter")
    if run("merge", tmp_path / "adapter", base, tmp_path / "out"):  # older transformers change nothing
        assert "library renames tensors on loading" in capsys.readouterr().err


@pytest.mark.parametrize("kind", [kind for kind in KINDS if "attention" not in kind and kind not in UNTOLD])
def test_merge_of_each_kind_matches_in_memory(kind: str, tmp_path: Path) -> None:
    build, _, options = KINDS[kind]
    options = {"target_modules": ["layer"]} | options
    model = seeded(build)
    save_file(dict(model.state_dict()), tmp_path / "model.safetensors")
    save_adapter(trained(model, **options), tmp_path / "adapter")
    code = run("merge", tmp_path / "adapter", tmp_path / "model.safetensors", tmp_path / "out")
    assert code == 0
    merge(model)
    assert_same(load_file(tmp_path / "out" / "model.safetensors"), model.state_dict())


@pytest.mark.parametrize("adapter_dtype", ["float32", "float64"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shape", [(600, 900), (2100, 2050)])
def test_merge_of_large_layer_matches_in_memory(
    shape: tuple[int, int], dtype: torch.dtype, adapter_dtype: str, tmp_path: Path
) -> None:
    model = nn.Sequential(nn.Linear(*shape)).to(dtype)
    save_file(dict(model.state_dict()), tmp_path / "model.safetensors")
    write_checkpoint(trained(model, target_modules=["0"], rank=16, adapter_dtype=adapter_dtype), tmp_path / "last.ckpt")
    assert run("merge", tmp_path / "last.ckpt", tmp_path / "model.safetensors", tmp_path / "out") == 0
    merge(model)
    assert_same(load_file(tmp_path / "out" / "model.safetensors"), model.state_dict())


@pytest.mark.parametrize("kind", [kind for kind in KINDS if "attention" not in kind])
def test_merge_of_each_kind_in_checkpoint_matches_in_memory(kind: str, tmp_path: Path) -> None:
    build, _, options = KINDS[kind]
    options = {"target_modules": ["layer"]} | options
    model = seeded(build)
    save_file(dict(model.state_dict()), tmp_path / "model.safetensors")
    write_checkpoint(trained(model, **options), tmp_path / "last.ckpt")
    assert run("merge", tmp_path / "last.ckpt", tmp_path / "model.safetensors", tmp_path / "out") == 0
    merge(model)
    assert_same(load_file(tmp_path / "out" / "model.safetensors"), model.state_dict())


@pytest.mark.parametrize("kind", ["linear", "conv2d", "experts"])
@pytest.mark.parametrize("init", DIFFERENCES)
def test_merge_of_an_update_from_a_computed_start_matches_in_memory(init: str, kind: str, tmp_path: Path) -> None:
    build, _, options = KINDS[kind]
    model = seeded(build)
    save_file(dict(model.state_dict()), tmp_path / "model.safetensors")
    write_checkpoint(trained(model, **{"target_modules": ["layer"], "init": init} | options), tmp_path / "last.ckpt")
    assert run("merge", tmp_path / "last.ckpt", tmp_path / "model.safetensors", tmp_path / "out") == 0
    expected = seeded(build)
    load_adapter(expected, tmp_path / "last.ckpt")
    merge(expected)
    assert_same(load_file(tmp_path / "out" / "model.safetensors"), expected.state_dict())


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind.startswith("attention")])
def test_attention_is_refused(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    build, _, options = KINDS[kind]
    model = seeded(build)
    save_file(dict(model.state_dict()), tmp_path / "model.safetensors")
    save_adapter(trained(model, **options), tmp_path / "adapter")
    assert run("merge", tmp_path / "adapter", tmp_path / "model.safetensors", tmp_path / "out") == 1
    assert "merge it in memory" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("layer", [nn.LSTM(4, 8, 2), nn.GRUCell(4, 8)], ids=["layer", "cell"])
@pytest.mark.parametrize("targets", ["all", ["part", "out"]], ids=str)
@pytest.mark.parametrize("command", ["verify", "merge"])
def test_recurrent_layers_are_refused_with_remedy(
    command: str, targets: Any, layer: nn.Module, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = nn.ModuleDict({"part": copy.deepcopy(layer), "out": nn.Linear(8, 4)})
    save_file(dict(model.state_dict()), tmp_path / "model.safetensors")
    write_checkpoint(trained(model, target_modules=targets), tmp_path / "last.ckpt")
    out = [tmp_path / "out"] if command == "merge" else []
    assert run(command, tmp_path / "last.ckpt", tmp_path / "model.safetensors", *out) == 1
    assert "part: recurrent layers cannot be merged on disk; load the model" in capsys.readouterr().err


@pytest.mark.parametrize("layer", [nn.Linear, transformers.pytorch_utils.Conv1D], ids=["linear", "transposed"])
def test_orientation_of_square_weight_is_in_the_checkpoint(layer: type[nn.Module], tmp_path: Path) -> None:
    model = nn.ModuleDict({"layer": layer(8, 8)})
    save_file(dict(model.state_dict()), tmp_path / "model.safetensors")
    write_checkpoint(trained(model), tmp_path / "last.ckpt")
    assert run("merge", tmp_path / "last.ckpt", tmp_path / "model.safetensors", tmp_path / "out") == 0
    merge(model)
    assert_same(load_file(tmp_path / "out" / "model.safetensors"), model.state_dict())


@pytest.mark.parametrize("width", [8, 12])
def test_record_without_kinds_is_merged_unless_a_weight_is_square(
    width: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = nn.ModuleDict({"layer": nn.Linear(8, width)})
    save_file(dict(model.state_dict()), tmp_path / "model.safetensors")
    content = torch.load(write_checkpoint(trained(model), tmp_path / "last.ckpt"), weights_only=True)
    del content[RECORD_KEY]["layers"]["layer"]["kind"]
    torch.save(content, tmp_path / "last.ckpt")
    code = run("merge", tmp_path / "last.ckpt", tmp_path / "model.safetensors", tmp_path / "out")
    assert code == (width == 8)
    if code:
        assert "does not state how its weight is stored" in capsys.readouterr().err
    else:
        merge(model)
        assert_same(load_file(tmp_path / "out" / "model.safetensors"), model.state_dict())


def test_overflow_leaves_no_files(files: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    change_tensors(files[0], lambda tensors: tensors[FACTOR].mul_(1e6))
    assert run("merge", *files, tmp_path / "out", "--dtype", "fp16") == 1
    assert "Choose a wider precision" in capsys.readouterr().err
    assert {path.name for path in tmp_path.iterdir()} == {"adapter", "base"}


def test_folder_with_files_is_left_alone(files: tuple[Path, Path]) -> None:
    before = files_of(files[1])
    assert run("merge", *files, files[1]) == 1
    assert files_of(files[1]) == before


def test_overwrite_never_replaces_the_base_or_an_adapter(files: tuple[Path, Path], tmp_path: Path) -> None:
    adapter, folder = files
    single = next(folder.glob("*.safetensors"))
    shutil.copytree(adapter, other := tmp_path / "other")
    before = [files_of(each) for each in (adapter, folder, other)]
    for base, out in ((folder, folder), (single, folder), (folder, adapter), (folder, other)):
        assert run("merge", adapter, base, out, "--overwrite") == 1
        assert [files_of(each) for each in (adapter, folder, other)] == before


def test_no_adapter_lies_beside_a_merged_model(
    files: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    adapter, folder = files
    assert run("merge", adapter, folder, tmp_path / "out") == 0
    expected = files_of(tmp_path / "out")
    for path in adapter.iterdir():  # libraries would apply it to whatever model is here
        shutil.copy(path, folder)
        shutil.copy(path, tmp_path / "out")
    before = files_of(tmp_path / "out")
    assert run("merge", adapter, folder, tmp_path / "out", "--overwrite") == 1
    assert "holds an adapter (adapter_config.json)" in capsys.readouterr().err
    assert files_of(tmp_path / "out") == before
    assert run("merge", adapter, folder, tmp_path / "new") == 0
    assert files_of(tmp_path / "new") == expected | {"README.md": (folder / "README.md").read_bytes()}


class Shared(nn.Module):
    """Reaches a layer, and a block with a head, by two names each."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.first = nn.Linear(6, 6)
        self.block = nn.ModuleDict({"fc": nn.Linear(6, 6), "head": nn.Linear(6, 6)})
        self.second, self.twin = self.first, self.block

    def forward(self, x: Tensor) -> Tensor:
        return self.twin["head"](self.block["fc"](self.second(self.first(x))))


def test_a_layer_with_several_names_is_merged_under_all(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = Shared()
    save_file({name: value.clone() for name, value in model.state_dict().items()}, tmp_path / "base.safetensors")
    trained(model, target_modules=["first", "fc"], modules_to_save=["block.head"])
    checkpoint = write_checkpoint(model, tmp_path / "last.ckpt")
    assert run("merge", checkpoint, tmp_path / "base.safetensors", tmp_path / "out") == 0
    merge(model)
    assert_same(tensors_of(tmp_path / "out"), model.state_dict())
    assert run("export", checkpoint, tmp_path / "peft") == 1
    message = capsys.readouterr().err
    assert "first: the model reaches it by 2 names (first, second), and PEFT adapts one" in message
    assert "block.head: the model reaches it by 2 names (block.head, twin.head)" in message
    assert not (tmp_path / "peft").exists()


def test_overwrite_replaces_a_merged_model(files: tuple[Path, Path], tmp_path: Path) -> None:
    assert run("merge", *files, tmp_path / "out") == 0
    expected = files_of(tmp_path / "out")
    (tmp_path / "out" / "model-00001-of-00002.safetensors").write_text("of an earlier merge")
    (tmp_path / "out" / "README.md").write_text("kept")
    before = (tmp_path / "out").stat().st_ino
    assert run("merge", *files, tmp_path / "out", "--overwrite") == 0
    assert files_of(tmp_path / "out") == expected | {"README.md": b"kept"}
    assert (tmp_path / "out").stat().st_ino == before


def test_overwrite_keeps_tensors_that_belong_to_no_model(files: tuple[Path, Path], tmp_path: Path) -> None:
    assert run("merge", *files, tmp_path / "out") == 0
    expected = files_of(tmp_path / "out")
    mine = {"my_head.safetensors": b"of another project", "notes.safetensors.txt": b"mine"}
    for name, content in mine.items():
        (tmp_path / "out" / name).write_bytes(content)
    assert run("merge", *files, tmp_path / "out", "--overwrite") == 0
    assert files_of(tmp_path / "out") == expected | mine


def test_folder_with_other_tensors_and_no_model_is_no_place_for_one(
    files: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (out := tmp_path / "out").mkdir()
    (out / "embeddings.safetensors").write_bytes(b"of another project")
    for flags in ([], ["--overwrite"]):
        assert run("merge", *files, out, *flags) == 1
        assert "holds other files and no config.json; nothing was written" in capsys.readouterr().err
        assert files_of(out) == {"embeddings.safetensors": b"of another project"}


def test_merging_anew_leaves_no_shard_of_another_division(tmp_path: Path) -> None:
    adapter = trained(gpt2(), rank=2)
    save_adapter(adapter, tmp_path / "adapter")
    few, many = tmp_path / "few", saved(gpt2(), tmp_path / "many")
    gpt2().save_pretrained(few)
    assert len(list(many.glob("*.safetensors"))) > 1
    assert run("merge", tmp_path / "adapter", many, tmp_path / "out") == 0
    assert run("merge", tmp_path / "adapter", few, tmp_path / "out", "--overwrite") == 0
    assert [path.name for path in (tmp_path / "out").glob("*.safetensors*")] == ["model.safetensors"]
