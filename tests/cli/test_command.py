"""The ``lightning-lora`` command: what it writes is what loading and merging gives, and nothing bad gets past it."""

from __future__ import annotations

import io
import json
import random
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lightning_lora import LoRAConfig, adapter_state_dict, attach, load_adapter, lora_layers, merge, save_adapter
from lightning_lora.analysis import analyze
from lightning_lora.cli import main
from lightning_lora.cli.inspection import update_norm
from lightning_lora.cli.text import progress_bar
from lightning_lora.state import describe
from lightning_lora.storage.checkpoint import RECORD_KEY
from tests.contract import train_all
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


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def run(*arguments: object) -> int:
    return main([str(each) for each in arguments])


# --- merge: transformers models

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
def test_merging_on_disk_gives_the_bits_of_merging_in_memory(case: str, dtype: torch.dtype, tmp_path: Path) -> None:
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
def test_adapters_of_peft_are_merged_as_in_memory(
    make: Callable[[], nn.Module], options: dict[str, Any], tmp_path: Path
) -> None:
    base = saved(make(), tmp_path / "base")
    targets = ["c_attn", "c_proj"] if make is gpt2 else ["q_proj", "down_proj"]
    trained_by_peft(make(), target_modules=targets, **options).save_pretrained(tmp_path / "adapter")
    assert run("merge", tmp_path / "adapter", base, tmp_path / "out") == 0
    expected = merged_in_memory(make(), base, tmp_path / "adapter", torch.float32)
    assert_same(reloaded(make(), tmp_path / "out", torch.float32).state_dict(), expected)


@pytest.mark.parametrize("options", [CASES[case][1] for case in CASES if case.startswith("gpt2")], ids=str)
def test_checkpoints_are_merged_as_in_memory(options: dict[str, Any], tmp_path: Path) -> None:
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


def write_checkpoint(module: nn.Module, path: Path) -> None:
    torch.save({"state_dict": adapter_state_dict(module), RECORD_KEY: describe(module)}, path)


def test_an_adapter_of_a_model_with_a_head_fits_the_bare_model(tmp_path: Path) -> None:
    base = saved(gpt2().transformer, tmp_path / "base")
    save_adapter(trained(gpt2()), tmp_path / "adapter")
    assert run("merge", tmp_path / "adapter", base, tmp_path / "out") == 0
    whole = gpt2()
    load_adapter(whole, tmp_path / "adapter")
    merge(whole)
    assert_same(type(whole.transformer).from_pretrained(tmp_path / "out").state_dict(), whole.transformer.state_dict())


def test_a_new_head_is_added(tmp_path: Path) -> None:
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


def tensors_of(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


def test_one_rounding_to_another_precision(tmp_path: Path) -> None:
    base = saved(llama(), tmp_path / "base")
    save_adapter(trained(llama()), tmp_path / "adapter")
    assert run("merge", tmp_path / "adapter", base, tmp_path / "out", "--dtype", "bf16") == 0
    expected = merged_in_memory(llama(), base, tmp_path / "adapter", torch.float32)
    assert_same(tensors_of(tmp_path / "out"), {name: tensor.bfloat16() for name, tensor in expected.items()})
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"


def test_the_folder_is_complete(tmp_path: Path) -> None:
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


# --- merge: every kind of layer


# PEFT tells parameters of one module apart by an order that no file holds; these have shapes that do not tell either.
UNTOLD = ("experts", "transposed experts")


@pytest.mark.parametrize("kind", UNTOLD)
def test_experts_that_could_be_read_in_two_ways_are_refused(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    build, _, options = KINDS[kind]
    model = seeded(build)
    save_file(dict(model.state_dict()), tmp_path / "model.safetensors")
    save_adapter(trained(model, **options), tmp_path / "adapter")
    assert run("merge", tmp_path / "adapter", tmp_path / "model.safetensors", tmp_path / "out") == 1
    assert "do not tell how the model reads them" in capsys.readouterr().err


@pytest.mark.parametrize("make", [mixtral], ids=["mixtral"])
def test_experts_as_transformers_holds_them_are_merged_as_in_memory(
    make: Callable[[], nn.Module], tmp_path: Path
) -> None:
    model = make()
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    names = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    save_adapter(trained(model, target_modules=["q_proj"], target_parameters=names), tmp_path / "adapter")
    assert run("merge", tmp_path / "adapter", tmp_path / "model.safetensors", tmp_path / "out") == 0
    merge(model)
    assert_same(load_file(tmp_path / "out" / "model.safetensors"), model.state_dict())


def test_names_that_a_library_changes_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = saved(vit(), tmp_path / "base")
    save_adapter(trained(vit()), tmp_path / "adapter")
    if run("merge", tmp_path / "adapter", base, tmp_path / "out"):  # older transformers change nothing
        assert "library renames tensors while loading" in capsys.readouterr().err


@pytest.mark.parametrize("kind", [kind for kind in KINDS if "attention" not in kind and kind not in UNTOLD])
def test_every_kind_of_layer_is_merged_as_in_memory(kind: str, tmp_path: Path) -> None:
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
def test_layers_too_large_to_be_summed_at_once_are_merged_as_in_memory(
    shape: tuple[int, int], dtype: torch.dtype, adapter_dtype: str, tmp_path: Path
) -> None:
    model = nn.Sequential(nn.Linear(*shape)).to(dtype)
    save_file(dict(model.state_dict()), tmp_path / "model.safetensors")
    write_checkpoint(trained(model, target_modules=["0"], rank=16, adapter_dtype=adapter_dtype), tmp_path / "last.ckpt")
    assert run("merge", tmp_path / "last.ckpt", tmp_path / "model.safetensors", tmp_path / "out") == 0
    merge(model)
    assert_same(load_file(tmp_path / "out" / "model.safetensors"), model.state_dict())


@pytest.mark.parametrize("kind", [kind for kind in KINDS if "attention" not in kind])
def test_every_kind_of_layer_of_a_checkpoint_is_merged_as_in_memory(kind: str, tmp_path: Path) -> None:
    build, _, options = KINDS[kind]
    options = {"target_modules": ["layer"]} | options
    model = seeded(build)
    save_file(dict(model.state_dict()), tmp_path / "model.safetensors")
    write_checkpoint(trained(model, **options), tmp_path / "last.ckpt")
    assert run("merge", tmp_path / "last.ckpt", tmp_path / "model.safetensors", tmp_path / "out") == 0
    merge(model)
    assert_same(load_file(tmp_path / "out" / "model.safetensors"), model.state_dict())


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind.startswith("attention")])
def test_attention_is_refused(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    build, _, options = KINDS[kind]
    model = seeded(build)
    save_file(dict(model.state_dict()), tmp_path / "model.safetensors")
    save_adapter(trained(model, **options), tmp_path / "adapter")
    assert run("merge", tmp_path / "adapter", tmp_path / "model.safetensors", tmp_path / "out") == 1
    assert "merge it in memory" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_square_weight_of_an_unknown_model_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = nn.ModuleDict({"layer": nn.Linear(8, 8)})
    save_file(dict(model.state_dict()), tmp_path / "model.safetensors")
    write_checkpoint(trained(model), tmp_path / "last.ckpt")
    assert run("verify", tmp_path / "last.ckpt", tmp_path / "model.safetensors") == 1
    assert "the weight is square" in capsys.readouterr().err


# --- bad input


@pytest.fixture
def files(tiny: nn.Module, rng: torch.Generator, tmp_path: Path) -> tuple[Path, Path]:
    """An adapter and the base that it fits, in two shards."""
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


def change_index(base: Path, name: str, file: str) -> None:
    path = base / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"][name] = file
    path.write_text(json.dumps(index))


def put_header(path: Path, header: object, data: bytes = b"") -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


HUGE = {"dtype": "F32", "shape": [2**40, 2**20], "data_offsets": [0, 2**62]}
WRONG = {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}
DAMAGES: dict[str, tuple[Callable[[Path, Path], Any], str]] = {
    "a shard elsewhere": (lambda a, b: change_index(b, "head.bias", "../b.safetensors"), "outside this folder"),
    "a shard at the root": (lambda a, b: change_index(b, "head.bias", "/b.safetensors"), "outside this folder"),
    "a shard of windows": (lambda a, b: change_index(b, "head.bias", "..\\b.safetensors"), "outside this folder"),
    "a shard of pickles": (lambda a, b: change_index(b, "head.bias", "b.bin"), "outside this folder"),
    "a missing shard": (lambda a, b: (b / "b.safetensors").unlink(), "which its index names"),
    "a name in the wrong shard": (lambda a, b: change_index(b, "head.bias", "a.safetensors"), "in other files than"),
    "a name in no shard": (lambda a, b: change_index(b, "head.more", "a.safetensors"), "do not hold"),
    "an index of nothing": (lambda a, b: (b / "model.safetensors.index.json").write_text("[]"), "not an object"),
    "an index that is cut": (lambda a, b: (b / "model.safetensors.index.json").write_text("{"), "as JSON"),
    "an empty shard": (lambda a, b: (b / "a.safetensors").write_bytes(b""), "cannot be read as safetensors"),
    "a cut shard": (
        lambda a, b: (b / "a.safetensors").write_bytes((b / "a.safetensors").read_bytes()[:-1]),
        "its tensors need",
    ),
    "a long header": (lambda a, b: (b / "a.safetensors").write_bytes(b"\xff" * 9), "longer than the file"),
    "a header of nothing": (lambda a, b: put_header(b / "a.safetensors", b"[]"), "makes no sense"),
    "a deep header": (lambda a, b: put_header(b / "a.safetensors", b"[" * 100_000), "makes no sense"),
    "a huge tensor": (lambda a, b: put_header(b / "a.safetensors", {"x": HUGE}), "makes no sense"),
    "a tensor of another size": (lambda a, b: put_header(b / "a.safetensors", {"x": WRONG}, b"1234"), "does not fit"),
    "no config": (lambda a, b: (a / "adapter_config.json").unlink(), "is not there"),
    "a cut adapter": (lambda a, b: (a / "adapter_model.safetensors").write_bytes(b"1234"), "truncated"),
    "no base": (lambda a, b: shutil.rmtree(b), "is not there"),
    "no adapter": (lambda a, b: shutil.rmtree(a), "is not there"),
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("command", ["merge", "verify"])
def test_bad_files_are_one_line_of_error(
    command: str, damage: str, files: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    do, expected = DAMAGES[damage]
    do(*files)
    assert run(command, *files, *[tmp_path / "out"] * (command == "merge")) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("lightning-lora: error: ")
    assert err.count("\n") == 1
    assert expected in err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["a.safetensors", "model.safetensors.index.json", "config.json"])
def test_changed_bytes_of_a_base_are_no_traceback(
    name: str, files: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    path, draw = files[1] / name, random.Random(1)
    if name == "config.json":
        config = {"architectures": ["ToyForCausalLM"], "tie_word_embeddings": True, "model_type": "toy"}
        path.write_text(json.dumps(config))
    original = path.read_bytes()
    for _ in range(150):
        changed = bytearray(original)
        for _ in range(draw.randint(1, 4)):
            at = draw.randrange(min(len(changed), 700))  # of a shard, the header
            changed[at : at + draw.randint(0, 2)] = draw.choice([b"0", b"9", b"[", b'"', b"{}", b"\xff", b"-", b"null"])
        path.write_bytes(changed)
        assert run("verify", *files) in (0, 1)
    assert "Traceback" not in capsys.readouterr().err


def change_tensors(adapter: Path, change: Callable[[dict[str, Tensor]], Any]) -> None:
    tensors = load_file(adapter / "adapter_model.safetensors")
    change(tensors)
    save_file(tensors, adapter / "adapter_model.safetensors")


Q = "base_model.model.blocks.0.q_proj.lora_A.weight"
MISFITS: dict[str, tuple[Callable[[dict[str, Tensor]], Any], str]] = {
    "a layer that is not there": (
        lambda t: t.update({Q.replace("q_", "k_"): t[Q].clone()}),
        "has no modules blocks.0.k_proj",
    ),
    "another width": (lambda t: t.update({Q: torch.zeros(2, 9)}), "expected (2, 16)"),
    "another rank": (lambda t: t.update({Q: torch.zeros(5, 16)}), "expected (2, 16)"),
    "no number": (lambda t: t[Q].fill_(torch.nan), "NaN or infinity in blocks.0.q_proj"),
    "half a layer": (lambda t: t.pop(Q), "missing from the file"),
}


@pytest.mark.parametrize("misfit", MISFITS)
def test_verify_says_what_does_not_fit(
    misfit: str, files: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    change, expected = MISFITS[misfit]
    assert run("verify", *files) == 0
    assert "the adapter fits: 4 layers" in capsys.readouterr().out
    change_tensors(files[0], change)
    assert run("verify", *files) == 1
    assert expected in capsys.readouterr().err


def test_a_frozen_tensor_of_another_base_is_refused(
    files: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    value = tensors_of(files[1])["embed.weight"]
    change_tensors(files[0], lambda tensors: tensors.update({"base_model.model.embed.weight": value}))
    assert run("verify", *files) == 0
    change_tensors(files[0], lambda tensors: tensors["base_model.model.embed.weight"].add_(1))
    assert run("verify", *files) == 1
    assert "it needs that base" in capsys.readouterr().err


def test_a_sum_that_overflows_leaves_nothing(
    files: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    change_tensors(files[0], lambda tensors: tensors[Q].mul_(1e6))
    assert run("merge", *files, tmp_path / "out", "--dtype", "fp16") == 1
    assert "Choose a wider precision" in capsys.readouterr().err
    assert {path.name for path in tmp_path.iterdir()} == {"adapter", "base"}


def test_a_folder_with_something_in_it_is_left_alone(files: tuple[Path, Path]) -> None:
    before = files_of(files[1])
    assert run("merge", *files, files[1]) == 1
    assert files_of(files[1]) == before


def test_an_adapter_on_a_merged_base_is_refused(
    tiny: nn.Module, files: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    merge(tiny)
    attach(tiny, LoRAConfig(rank=2, target_modules=["q_proj"]))
    write_checkpoint(tiny, tmp_path / "second.ckpt")
    assert run("verify", tmp_path / "second.ckpt", files[1]) == 1
    assert "another adapter merged into it" in capsys.readouterr().err


@pytest.mark.parametrize("part", ["adapters", "layers", "merges"])
@pytest.mark.parametrize("nonsense", [None, 3, "x", [3], {"x": 3}], ids=str)
@pytest.mark.parametrize("command", ["inspect", "verify"])
def test_nonsense_in_a_record_is_no_traceback(
    command: str, part: str, nonsense: Any, tiny: nn.Module, files: tuple[Path, Path], tmp_path: Path
) -> None:
    record = describe(tiny) | {part: nonsense}
    torch.save({"state_dict": adapter_state_dict(tiny), RECORD_KEY: record}, tmp_path / "odd.ckpt")
    assert run(command, tmp_path / "odd.ckpt", *[files[1]] * (command == "verify")) in (0, 1)


# --- inspect and diff


@pytest.mark.parametrize("stack", [(), (3,)], ids=["a layer", "experts"])
def test_the_norm_is_that_of_the_dense_update(stack: tuple[int, ...], rng: torch.Generator) -> None:
    A, B = torch.randn(*stack, 4, 30, generator=rng), torch.randn(*stack, 20, 4, generator=rng)
    assert update_norm(A, B, -0.7) == pytest.approx(float((0.7 * B.double() @ A.double()).norm()))


@pytest.mark.parametrize("kind", [kind for kind in KINDS if "bias" not in kind and "slices" not in kind])
@pytest.mark.parametrize("form", ["directory", "checkpoint"])
def test_inspecting_shows_ranks_scalings_and_norms(
    form: str, kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    build, _, options = KINDS[kind]
    model = trained(seeded(build), **({"target_modules": ["layer"]} | options | {"use_dora": False}))
    path = tmp_path / "adapter"
    (save_adapter if form == "directory" else write_checkpoint)(model, path)
    assert run("inspect", path, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    norms = [layer.delta_weight(key).norm() for layer in lora_layers(model).values() for key in adapted(layer)]
    if form == "directory" and "attention" in kind:
        norms = norms[:1]  # PEFT's file holds half of the other
        found["layers"] = [layer for layer in found["layers"] if "out_proj" not in layer["name"]] or found["layers"]
    if form == "directory" and kind == "transposed experts":  # of several ranks, in an order that the file lacks
        assert {layer["norm"] for layer in found["layers"]} == {None}
    elif kind != "attention, its output alone":
        assert sorted(layer["norm"] for layer in found["layers"]) == pytest.approx(sorted(map(float, norms)), rel=1e-5)
    assert run("inspect", path) == 0
    assert "norm of update" in capsys.readouterr().out


def adapted(layer: Any) -> list[str]:
    return [adapter.parameter for adapter in layer.adapters().values()]


@pytest.mark.parametrize("kind", ["linear", "conv2d", "experts"])
def test_inspecting_says_how_much_of_each_rank_is_used(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    build, _, options = KINDS[kind]
    model = trained(seeded(build), **({"target_modules": ["layer"]} | options))
    save_adapter(model, tmp_path / "adapter")
    assert run("inspect", tmp_path / "adapter", "--json") == 0
    found = json.loads(capsys.readouterr().out)["layers"]
    matrices = analyze(model).layers
    for layer in found if kind != "experts" else []:
        [expected] = [each for each in matrices if each.name == layer["name"]]
        assert layer["effective_rank"] == pytest.approx(expected.effective_rank, rel=1e-5)
        assert layer["stable_rank"] == pytest.approx(expected.stable_rank, rel=1e-5)
        assert layer["suggested_rank"] == expected.suggested_rank
    mean = sum(layer["effective_rank"] for layer in found) / len(found)
    assert mean == pytest.approx(sum(each.effective_rank for each in matrices) / len(matrices), rel=1e-5)
    assert max(layer["suggested_rank"] for layer in found) == max(each.suggested_rank for each in matrices)


def test_inspecting_what_is_not_finite_is_a_problem(files: tuple[Path, Path]) -> None:
    assert run("inspect", files[0]) == 0
    change_tensors(files[0], lambda tensors: tensors[Q].fill_(torch.inf))
    assert run("inspect", files[0]) == 1


def test_what_differs_is_said(files: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = tmp_path / "other"
    shutil.copytree(files[0], other)
    assert run("diff", files[0], other) == 0
    assert capsys.readouterr().out == "the adapters are equal\n"
    change_tensors(other, lambda tensors: tensors[Q].view(-1)[3:4].add_(0.5))
    config = json.loads((other / "adapter_config.json").read_text())
    (other / "adapter_config.json").write_text(json.dumps(config | {"alpha_pattern": {"blocks.1.v_proj": 12}}))
    v = "base_model.model.blocks.0.v_proj"
    change_tensors(other, lambda t: (t.pop(f"{v}.lora_A.weight"), t.pop(f"{v}.lora_B.weight")))
    assert run("diff", files[0], other) == 1
    assert capsys.readouterr().out.splitlines() == [
        "blocks.0.v_proj: layer only in the first",
        "blocks.0.q_proj.A: largest difference 0.5",
        "blocks.1.v_proj: scaling 1.5 and 6.0",
    ]


# --- the command itself


@pytest.mark.parametrize(
    "arguments", [[], ["unknown"], ["merge"], ["inspect"], ["merge", "a", "b", "c", "--dtype", "x"]]
)
def test_misspelt_commands_exit_with_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 2
    assert "usage: lightning-lora" in capsys.readouterr().err


@pytest.mark.parametrize(
    "command",
    [
        "inspect {missing}",
        "merge {missing} {base} {out}",
        "merge {adapter} {missing} {out}",
        "export {missing} {out}",
        "import {missing} {out}",
        "diff {adapter} {missing}",
        "verify {missing} {base}",
        "verify {adapter} {missing}",
        "report {missing}",
        "report {adapter} --base {missing}",
        "compare {adapter} {missing}",
        "plan {missing} --rank 4",
    ],
)
def test_a_missing_file_is_named_in_one_line(
    command: str, files: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    adapter, base = files
    places = {"adapter": adapter, "base": base, "missing": tmp_path / "missing.ckpt", "out": tmp_path / "out"}
    assert main([word.format(**places) for word in command.split()]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(f"lightning-lora: error: '{tmp_path / 'missing.ckpt'}")
    assert "is not there" in err
    assert err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_what_the_system_refuses_is_said_without_its_number(
    files: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied", str(files[0]))

    monkeypatch.setattr("lightning_lora.cli.inspection.summarize", refuse)
    assert run("inspect", files[0]) == 1
    assert capsys.readouterr().err == f"lightning-lora: error: '{files[0]}': Permission denied.\n"


@pytest.mark.parametrize("command", ["inspect", "merge", "export", "import", "diff", "verify"])
def test_every_command_explains_itself(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([command, "--help"]) == 0
    assert "--json" in capsys.readouterr().out


def test_results_are_json_on_request(
    files: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("merge", *files, tmp_path / "out", "--json", "--dtype", "bf16") == 0
    report = json.loads(capsys.readouterr().out)
    assert {entry["name"] for entry in report["merged"]} == {
        f"blocks.{i}.{part}.weight" for i in range(2) for part in ("q_proj", "v_proj")
    }
    assert all(0 < entry["rounding"] < 0.1 * entry["update"] for entry in report["merged"])
    assert run("verify", *files, "--json") == 0
    assert json.loads(capsys.readouterr().out)["fits"]
    assert run("diff", files[0], files[0], "--json") == 0
    assert json.loads(capsys.readouterr().out) == {"equal": True, "differences": []}


def test_progress_is_drawn_to_its_end() -> None:
    stream = io.StringIO()
    draw = progress_bar(stream)
    for done in range(0, 2001):
        draw(done, 2000)
    assert stream.getvalue().count("\r") == 101
    assert stream.getvalue().endswith("100 %  2 kB of 2 kB\n")


def test_the_command_starts_without_lightning(files: tuple[Path, Path]) -> None:
    script = f"""
import sys
from lightning_lora.cli import main
assert main(["inspect", {str(files[0])!r}]) == 0
assert main(["verify", {str(files[0])!r}, {str(files[1])!r}]) == 0
loaded = {{name.partition(".")[0] for name in sys.modules}}
assert not loaded & {{"lightning", "pytorch_lightning", "transformers", "peft"}}, loaded
"""
    outcome = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert outcome.returncode == 0, outcome.stderr


@pytest.mark.skipif(sys.platform == "win32", reason="pipes of POSIX")
def test_a_reader_that_leaves_early_is_no_traceback(files: tuple[Path, Path]) -> None:
    command = [sys.executable, "-m", "lightning_lora", "inspect", str(files[0])]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == b""


def test_the_package_is_the_command() -> None:
    outcome = subprocess.run([sys.executable, "-m", "lightning_lora"], capture_output=True, text=True, check=False)
    assert outcome.returncode == 2
    assert outcome.stderr.startswith("usage: lightning-lora")
