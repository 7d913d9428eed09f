"""``lightning-lora export`` and ``import``: conversion between checkpoints and PEFT directories."""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lightning_lora import (
    LoRACallback,
    LoRAConfig,
    adapter_state_dict,
    add_adapter,
    attach,
    load_adapter,
    load_adapter_state_dict,
    lora_layers,
    merge,
    save_adapter,
)
from lightning_lora.storage.checkpoint import RECORD_KEY
from lightning_lora.trainer.warm_start import start_from
from tests.contract import raises_and_changes_nothing
from tests.files import change_tensors, files_of, run, write_checkpoint
from tests.peft_format.kinds import KINDS, WARNED, output, seeded
from tests.peft_format.models import (
    CLOSE,
    bert,
    distance,
    gpt2,
    in_peft,
    llama,
    logits,
    mixtral,
    t5,
    trained,
    trained_by_peft,
    vit,
)
from tests.peft_format.models import MODELS as PEFT_MODELS
from tests.peft_format.test_written import each_directory
from tests.toys import Toy, loader, trainer
from tests.trainer.test_checkpoints import fitted, read

pytestmark = WARNED

MODELS: dict[str, tuple[Callable[[], nn.Module], dict[str, Any]]] = {
    "gpt2": (gpt2, {"use_rslora": True, "rank_pattern": {"*.0.*": 3}, "bias": "lora_only"}),
    "gpt2, DoRA": (gpt2, {"use_dora": True}),
    "gpt2, a bias of B": (gpt2, {"lora_bias": True}),
    "gpt2, slices": (gpt2, {"target_modules": [], "target_slices": {"c_attn": {"q": "0:16", "v": "32:48"}}}),
    "gpt2, tokens": (gpt2, {"target_modules": ["c_attn"], "trainable_token_indices": {"transformer.wte": [5, 2]}}),
    "llama": (llama, {"target_modules": ["q_proj", "down_proj", "embed_tokens"], "alpha_pattern": {"*.1.*": 7}}),
    "llama, a layer of two": (llama, {"target_modules": ["layers.1.self_attn.q_proj"], "modules_to_save": ["lm_head"]}),
    "llama, the last block": (llama, {"layers": [-1]}),
    "bert": (bert, {"target_modules": ["query", "dense"], "modules_to_save": ["classifier"], "bias": "all"}),
    "t5": (t5, {}),
    "vit": (vit, {"modules_to_save": ["classifier"]}),
    "mixtral": (
        mixtral,
        {"target_modules": ["q_proj"], "target_parameters": ["experts.gate_up_proj", "experts.down_proj"]},
    ),
}


def inside(model: nn.Module) -> nn.Module:
    """What a LightningModule with the model as its attribute looks like."""
    return nn.ModuleDict({"model": model})


def with_every_bit(module: nn.Module) -> nn.Module:
    """Return an adapted module with values that use the last bits of their precision."""
    load_adapter_state_dict(module, {name: value / 3 for name, value in adapter_state_dict(module).items()})
    return module


def prefixed(options: dict[str, Any]) -> dict[str, Any]:
    tokens = options.get("trainable_token_indices")
    return options | (
        {"trainable_token_indices": {f"model.{key}": value for key, value in tokens.items()}} if tokens else {}
    )


@pytest.mark.parametrize("case", MODELS)
def test_exported_checkpoint_computes_the_same_in_peft(case: str, tmp_path: Path) -> None:
    make, options = MODELS[case]
    module = trained(inside(make()), **prefixed(options))
    checkpoint = write_checkpoint(module, tmp_path / "last.ckpt")
    assert run("export", checkpoint, tmp_path / "peft") == 0
    assert distance(logits(in_peft(make(), tmp_path / "peft")), logits(module["model"])) <= CLOSE
    again = make()
    load_adapter(again, tmp_path / "peft")
    assert distance(logits(again), logits(module["model"])) <= CLOSE


@pytest.mark.parametrize("case", MODELS)
def test_imported_directory_computes_the_same(case: str, tmp_path: Path) -> None:
    make, options = MODELS[case]
    model = trained(make(), **options)
    save_adapter(model, tmp_path / "peft")
    assert run("import", tmp_path / "peft", tmp_path / "back.ckpt") == 0
    module = inside(make())
    load_adapter(module, tmp_path / "back.ckpt")
    assert distance(logits(module["model"].eval()), logits(model)) <= CLOSE


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("case", MODELS)
def test_round_trip_is_bitwise(case: str, dtype: torch.dtype, tmp_path: Path) -> None:
    make, options = MODELS[case]
    module = with_every_bit(trained(inside(make()).to(dtype), **prefixed(options)))
    checkpoint = write_checkpoint(module, tmp_path / "last.ckpt")
    for source, one, two in ((checkpoint, "one", "back"), (tmp_path / "back.ckpt", "two", "again")):
        assert run("export", source, tmp_path / one) == 0
        assert run("import", tmp_path / one, tmp_path / f"{two}.ckpt") == 0
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    back, before = read(tmp_path / "back.ckpt"), read(checkpoint)
    assert back[RECORD_KEY]["base"] == before[RECORD_KEY]["base"]
    if "target_slices" not in options:  # those become one layer
        assert back["state_dict"].keys() == before["state_dict"].keys()
        assert all(torch.equal(back["state_dict"][name], value) for name, value in before["state_dict"].items())


@pytest.mark.parametrize("dtypes", [("float32",), ("float64",), ("float32", "float64")])
def test_export_writes_the_files_of_save_adapter(dtypes: tuple[str, ...], tmp_path: Path) -> None:
    base = inside(llama())
    for layer, dtype in zip(base["model"].model.layers, dtypes * 2, strict=False):
        layer.to(getattr(torch, dtype))  # each layer keeps its own precision
    module = with_every_bit(trained(base, target_modules=["q_proj"]))
    save_adapter(module, tmp_path / "live", export_root="model")
    assert run("export", write_checkpoint(module, tmp_path / "last.ckpt"), tmp_path / "files") == 0
    live, files = (tmp_path / each / "adapter_model.safetensors" for each in ("live", "files"))
    assert live.read_bytes() == files.read_bytes()
    configs = [json.loads((tmp_path / each / "adapter_config.json").read_text()) for each in ("live", "files")]
    assert configs[1].pop("target_modules") == [f"model.layers.{i}.self_attn.q_proj" for i in range(2)]
    assert configs[0].pop("target_modules") == ["q_proj"]
    assert configs[0].pop("auto_mapping")["base_model_class"] == "LlamaForCausalLM"
    assert configs[1].pop("auto_mapping") is None  # a checkpoint does not name the class of its base
    assert configs[0] == configs[1]


@each_directory
def test_peft_directory_is_imported(model: str, name: str, options: dict[str, Any], tmp_path: Path) -> None:
    make = PEFT_MODELS[model]
    tuned = trained_by_peft(make(), **options)
    tuned.save_pretrained(tmp_path / "peft")
    if options.get("target_parameters") == ["gate_up_proj"]:  # of which module, only the model knows
        assert run("import", tmp_path / "peft", tmp_path / "adapter.ckpt") == 1
        return
    assert run("import", tmp_path / "peft", tmp_path / "adapter.ckpt") == 0
    module = inside(make())
    load_adapter(module, tmp_path / "adapter.ckpt")
    assert distance(logits(module["model"].eval()), logits(tuned)) <= CLOSE


@pytest.mark.parametrize("kind", [kind for kind in KINDS if "attention" not in kind and "expert" not in kind])
def test_each_kind_round_trips(kind: str, tmp_path: Path) -> None:
    build, inputs, options = KINDS[kind]
    model = trained(seeded(build), **({"target_modules": ["layer"]} | options))
    checkpoint = write_checkpoint(model, tmp_path / "last.ckpt")
    assert run("export", checkpoint, tmp_path / "peft", "--root", "") == 0
    assert run("import", tmp_path / "peft", tmp_path / "back.ckpt", "--root", "") == 0
    for path in (tmp_path / "peft", tmp_path / "back.ckpt"):
        again = seeded(build)
        load_adapter(again, path)
        assert torch.equal(output(again.eval(), inputs), output(model, inputs))


@pytest.mark.parametrize("kind", [kind for kind in KINDS if "attention" in kind])
def test_attention_is_refused_with_remedy(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    build, _, options = KINDS[kind]
    model = trained(seeded(build), **({"target_modules": ["layer"]} | options))
    assert run("export", write_checkpoint(model, tmp_path / "last.ckpt"), tmp_path / "peft") == 1
    assert "Load the model" in capsys.readouterr().err
    assert not (tmp_path / "peft").exists()
    save_adapter(model, tmp_path / "saved")
    assert run("import", tmp_path / "saved", tmp_path / "back.ckpt") == 1
    assert "Load the model" in capsys.readouterr().err
    assert not (tmp_path / "back.ckpt").exists()


def test_grouped_convolution_and_merged_base_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    grouped = nn.ModuleDict({"conv": nn.Conv2d(4, 4, 3, groups=2)})
    trained(grouped, target_modules=["conv"], rank=1)
    assert run("export", write_checkpoint(grouped, tmp_path / "grouped.ckpt"), tmp_path / "peft") == 1
    assert "does not describe the layers conv" in capsys.readouterr().err
    model = trained(gpt2())
    merge(model)
    trained(model)
    assert run("export", write_checkpoint(model, tmp_path / "second.ckpt"), tmp_path / "peft") == 1
    assert "another adapter merged into it" in capsys.readouterr().err


def test_imported_file_works_as_ckpt_path(tmp_path: Path) -> None:
    run_before, module, path = fitted(tmp_path / "run", modules_to_save=["net.4"])
    [expected] = run_before.test(module, loader(), verbose=False)
    assert run("export", path, tmp_path / "peft") == 0
    assert run("import", tmp_path / "peft", tmp_path / "back.ckpt", "--root", "net") == 0
    [found] = trainer(LoRACallback()).test(Toy(), loader(), ckpt_path=str(tmp_path / "back.ckpt"), verbose=False)
    assert found == expected
    assert run("inspect", tmp_path / "back.ckpt") == 0
    assert run("diff", path, tmp_path / "back.ckpt") == 0


def test_existing_checkpoint_is_never_replaced(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_adapter(trained(gpt2()), tmp_path / "peft")
    (tmp_path / "mine.ckpt").write_text("years of work")
    assert run("import", tmp_path / "peft", tmp_path / "mine.ckpt") == 1
    assert "exists already" in capsys.readouterr().err
    assert (tmp_path / "mine.ckpt").read_text() == "years of work"


@pytest.mark.parametrize("command", ["export", "import"])
def test_overwrite_replaces_what_is_there(command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, second = tmp_path / "first.ckpt", tmp_path / "second"
    write_checkpoint(trained(gpt2()), source)
    save_adapter(trained(gpt2(), rank=3), second)
    arguments = {"export": (source, second), "import": (second, source)}[command]
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert run(command, *arguments) == 1
    assert "exists already; nothing was written" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    assert run(command, *arguments, "--overwrite") == 0
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} != before


def test_numbers_that_are_none_are_neither_written_nor_loaded(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    module = trained(inside(llama()), target_modules=["q_proj"], modules_to_save=["model.lm_head"])
    save_adapter(module, tmp_path / "sound", export_root="model")
    change_tensors(tmp_path / "sound", lambda tensors: tensors["base_model.model.lm_head.weight"][0].fill_(-torch.inf))
    assert run("import", tmp_path / "sound", tmp_path / "mask.ckpt") == 0  # as masks are
    before = files_of(tmp_path / "sound")
    lora_layers(module)["model.model.layers.0.self_attn.q_proj"].lora.B.data[0, 0] = torch.nan
    broken = write_checkpoint(module, tmp_path / "last.ckpt")
    shutil.copytree(tmp_path / "sound", directory := tmp_path / "broken")
    change_tensors(directory, lambda tensors: tensors["base_model.model.lm_head.weight"][0].fill_(torch.nan))
    factor = "The adapter holds NaN or infinity in .*q_proj.*; nothing was "
    with pytest.raises(ValueError, match=f"{factor}written"):
        save_adapter(module, tmp_path / "sound", export_root="model", overwrite=True)
    for is_adapted, call in (
        (False, lambda fresh: load_adapter(fresh, broken)),
        (False, lambda fresh: load_adapter(fresh, directory)),
        (False, lambda fresh: add_adapter(fresh, "new", broken)),
        (True, lambda fresh: load_adapter_state_dict(fresh, adapter_state_dict(module))),
        (True, lambda fresh: start_from(fresh, broken)),
    ):
        fresh = inside(llama())
        if is_adapted:
            attach(fresh, LoRAConfig(rank=2, alpha=3.0, target_modules=["q_proj"], modules_to_save=["model.lm_head"]))
        with raises_and_changes_nothing(fresh, ValueError, "The adapter holds NaN or infinity in .*; nothing was chan"):
            call(fresh)
    for command in (("export", broken, tmp_path / "sound"), ("import", directory, tmp_path / "mask.ckpt")):
        kept = (tmp_path / "mask.ckpt").read_bytes()
        assert run(*command, "--overwrite") == 1
        assert "The adapter holds NaN or infinity in" in capsys.readouterr().err
        assert files_of(tmp_path / "sound") == before
        assert (tmp_path / "mask.ckpt").read_bytes() == kept


def test_full_disk_leaves_no_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_adapter(trained(gpt2()), tmp_path / "peft")

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    assert run("import", tmp_path / "peft", tmp_path / "back.ckpt") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["peft"]


def test_changed_record_gives_no_traceback(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    module = trained(inside(llama()), target_modules=["q_proj"], modules_to_save=["lm_head"])
    content = torch.load(write_checkpoint(module, tmp_path / "last.ckpt"), weights_only=True)
    draw = random.Random(3)
    nonsense = [None, -1, 0, 2**40, "x", [], {}, [2**30, 2**30], [16, 16, 16], 0.5, True, "conv", "embedding"]
    for _ in range(150):
        record = json.loads(json.dumps(content[RECORD_KEY]))
        place: Any = record
        while isinstance(place, (dict, list)) and place:
            keys = list(place) if isinstance(place, dict) else list(range(len(place)))
            key = draw.choice(keys)
            if draw.random() < 0.3 or not isinstance(place[key], (dict, list)) or not place[key]:
                place[key] = draw.choice(nonsense)
                break
            place = place[key]
        torch.save(content | {RECORD_KEY: record}, tmp_path / "odd.ckpt")
        assert run("export", tmp_path / "odd.ckpt", tmp_path / "out") in (0, 1)
        assert "Traceback" not in capsys.readouterr().err


@pytest.mark.parametrize("spectral_norm", [nn.utils.parametrizations.spectral_norm, nn.utils.spectral_norm])
def test_tracked_statistics_are_refused_by_export(
    spectral_norm: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = nn.Sequential(OrderedDict(layer=spectral_norm(nn.Linear(8, 8))))
    trained(model, target_modules=["layer"], frozen_norm="track")
    assert run("export", write_checkpoint(model, tmp_path / "adapter.ckpt"), tmp_path / "peft") == 1
    assert "PEFT does not save running statistics of frozen norms" in capsys.readouterr().err
    assert not (tmp_path / "peft").exists()


def test_checkpoint_equals_its_own_export(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    module = trained(inside(llama()), target_modules=["q_proj", "v_proj"], modules_to_save=["lm_head"])
    checkpoint, directory = write_checkpoint(module, tmp_path / "last.ckpt"), tmp_path / "peft"
    assert run("export", checkpoint, directory) == 0
    for pair in ((checkpoint, directory), (directory, checkpoint)):
        assert run("diff", *pair) == 0
        assert "the adapters are equal" in capsys.readouterr().out
        assert run("compare", *pair, "--json") == 0
        layers = json.loads(capsys.readouterr().out)["layers"]
        assert len(layers) == 4
        assert all(layer["cosine"] == pytest.approx(1.0) for layer in layers)
        assert layers[0]["name"] == "model.layers.0.self_attn.q_proj"


def test_root_tells_what_names_alone_do_not(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    module = inside(llama())
    module.teacher = nn.ModuleDict({"layers": nn.ModuleList([nn.ModuleDict({"q_proj": nn.Linear(8, 8)})])})
    checkpoint = write_checkpoint(trained(module, target_modules=["q_proj"]), tmp_path / "last.ckpt")
    inner = trained(llama(), target_modules=["v_proj", "o_proj"])
    save_adapter(inner, tmp_path / "other")  # no layer in common, so that no name shows the root
    assert run("diff", checkpoint, tmp_path / "other", "--root", "model", "--json") == 1
    found = json.loads(capsys.readouterr().out)["differences"]
    assert {name.partition(":")[0].split(".")[0] for name in found} == {"model", "teacher"}
    save_adapter(trained(llama(), target_modules=["q_proj"]), tmp_path / "same")
    for root in ([], ["--root", "model"]):  # the layers of the other attribute do not get in the way
        assert run("compare", checkpoint, tmp_path / "same", *root, "--json") == 0
        compared = json.loads(capsys.readouterr().out)
        assert len(compared["layers"]) == 2
        assert compared["only_first"] == ["teacher.layers.0.q_proj"]


@pytest.mark.parametrize("command", ["diff", "compare"])
def test_wrong_root_is_named(command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint = write_checkpoint(trained(inside(llama()), target_modules=["q_proj"]), tmp_path / "last.ckpt")
    save_adapter(trained(llama(), target_modules=["q_proj"]), tmp_path / "peft")
    assert run(command, checkpoint, tmp_path / "peft", "--root", "net") == 1
    assert "root='net' holds no layer of the checkpoint: its layers are model.model.layers" in capsys.readouterr().err
    assert run(command, checkpoint, checkpoint, "--root", "model") == 1
    assert "both adapters are relative to a LightningModule" in capsys.readouterr().err
    assert run(command, tmp_path / "peft", tmp_path / "peft", "--root", "model") == 1
    assert "both adapters are PEFT directories" in capsys.readouterr().err


def test_root_of_one_adapter_is_rejected(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("compare", tmp_path, "--root", "model") == 1
    assert "--root needs two adapters" in capsys.readouterr().err
