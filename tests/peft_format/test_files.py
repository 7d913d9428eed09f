"""PEFT directories as files: the same bytes, whole or not there, and names relative to the right model."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn

from lightning_lora import (
    LoRAConfig,
    adapter_state_dict,
    attach,
    detach,
    load_adapter,
    lora_layers,
    merge,
    preflight,
    save_adapter,
)
from lightning_lora.peft_format.export import ExportCollector
from lightning_lora.storage.safetensors import TensorWriter
from tests.contract import assert_same_bits, assert_unchanged, raises_and_changes_nothing, snapshot, train_all

CONFIG = LoRAConfig(rank=2, alpha=3.0, target_modules=["embed", "q_proj"], modules_to_save=["head"])
FILES = ["README.md", "adapter_config.json", "adapter_model.safetensors"]


def trained_from(model: nn.Module, rng: torch.Generator, config: LoRAConfig = CONFIG) -> nn.Module:
    attach(model, config)
    train_all(model, rng)
    return model


def again(model: nn.Module) -> nn.Module:
    """Return a model of this kind with the weights that the fixture's has at first."""
    torch.manual_seed(0)
    return type(model)()


def content(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(directory.iterdir())}


# --- writing


def test_complex_parameters_of_a_module_that_trains_in_full_come_back(tmp_path: Path) -> None:
    def build() -> nn.Module:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
        model[1].phase = nn.Parameter(torch.randn(3, dtype=torch.complex64))
        return model

    model, loaded = build(), build()
    attach(model, LoRAConfig(rank=2, target_modules=["0"], modules_to_save=["1"]))
    train_all(model, torch.Generator().manual_seed(1))
    model[1].phase.data.add_(1j)
    save_adapter(model, tmp_path / "peft")
    load_adapter(loaded, tmp_path / "peft", check_base=False)
    assert torch.equal(loaded[1].phase, model[1].phase)
    assert loaded[1].phase.requires_grad


def test_same_adapter_gives_same_bytes(tiny, rng, tmp_path):
    save_adapter(trained_from(tiny, rng), tmp_path / "one")
    other = again(tiny)
    load_adapter(other, tmp_path / "one")
    save_adapter(other, tmp_path / "two")
    save_adapter(other, tmp_path / "two", overwrite=True)
    assert content(tmp_path / "one") == content(tmp_path / "two")
    assert list(content(tmp_path / "one")) == FILES


def test_saving_changes_nothing(tiny, rng, tmp_path):
    before = snapshot(trained_from(tiny, rng))
    save_adapter(tiny, tmp_path / "adapter")
    assert_unchanged(tiny, before)


def test_module_without_adapters_is_refused(tiny, rng, tmp_path):
    with pytest.raises(ValueError, match="has no adapters; call attach or load_adapter first"):
        save_adapter(tiny, tmp_path / "adapter")
    trained_from(tiny, rng)
    with pytest.raises(ValueError, match="belong to a parent of it; name this part with export_root"):
        save_adapter(tiny.blocks, tmp_path / "adapter")


def test_meta_adapter_is_refused(tiny, tmp_path):
    tiny.to("meta")
    attach(tiny, CONFIG)
    with pytest.raises(ValueError, match="On the meta device"):
        save_adapter(tiny, tmp_path / "adapter")


def test_replacing_keeps_other_files_but_not_bin(tiny, rng, tmp_path):
    save_adapter(trained_from(tiny, rng), tmp_path / "adapter")
    for name in ("README.md", "adapter_model.bin"):
        (tmp_path / "adapter" / name).write_text("old")
    (tmp_path / "adapter" / "runs").mkdir()
    (tmp_path / "adapter" / "runs" / "log").write_text("kept")
    with raises_and_changes_nothing(tiny, ValueError, r"adapter' exists already; .* overwrite=True"):
        save_adapter(tiny, tmp_path / "adapter")
    assert (tmp_path / "adapter" / "adapter_model.bin").read_text() == "old"
    save_adapter(tiny, tmp_path / "adapter", overwrite=True)
    assert sorted(path.name for path in (tmp_path / "adapter").iterdir()) == [*FILES, "runs"]
    assert (tmp_path / "adapter" / "runs" / "log").read_text() == "kept"
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


def test_directory_without_adapter_is_not_replaced(tiny, rng, tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(ValueError, match=r"holds other files and no adapter_config\.json; nothing was written"):
        save_adapter(trained_from(tiny, rng), tmp_path)
    with pytest.raises(ValueError, match="is a file; name a directory"):
        save_adapter(tiny, tmp_path / "thesis.tex")
    assert content(tmp_path) == {"thesis.tex": b"years of work"}


def test_symlink_stays_symlink(tiny, rng, tmp_path):
    trained_from(tiny, rng)
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real", target_is_directory=True)
    save_adapter(tiny, tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert list(content(tmp_path / "real")) == FILES


class DiskFullError(OSError):
    """What a full disk would raise."""


def failing_at(step: int, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Make the n-th operation that changes the disk fail, and return the list of those that were tried."""
    tried: list[str] = []

    def guarded(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def operation(*args: Any, **kwargs: Any) -> Any:
            tried.append(name)
            if len(tried) == step:
                raise DiskFullError(f"no space left ({name})")
            return function(*args, **kwargs)

        return operation

    monkeypatch.setattr(TensorWriter, "write", guarded("tensors", TensorWriter.write))
    monkeypatch.setattr(os, "fsync", guarded("fsync", os.fsync))
    for name in ("mkdir", "write_text", "rename"):
        monkeypatch.setattr(Path, name, guarded(name, getattr(Path, name)))
    return tried


@pytest.mark.parametrize("exists", [True, False])
def test_failed_write_leaves_old_directory(exists: bool, tiny, rng, tmp_path):
    place = tmp_path / "adapters" / "mine"
    trained_from(tiny, rng)
    if exists:
        save_adapter(tiny, place)
        (place / "README.md").write_text("mine")
    before = content(place) if exists else None
    train_all(tiny, rng)
    failed, done = [], False
    while not done:
        with pytest.MonkeyPatch.context() as patch:
            tried = failing_at(len(failed) + 1, patch)
            try:
                save_adapter(tiny, place, overwrite=True)
                done = True
            except DiskFullError:
                failed.append(tried[len(failed)])
        assert ((content(place) if place.exists() else None) == before) != done
        if place.parent.exists():
            assert [path.name for path in place.parent.iterdir()] == (["mine"] if exists or done else [])
    assert {"mkdir", "tensors", "write_text", "fsync", "rename"} <= set(failed)
    assert failed.count("rename") == (4 if exists else 1)  # two files out, two in


# --- the model inside


class Wrapping(LightningModule):
    """A LightningModule around one model."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net, self.loss = net, nn.CrossEntropyLoss()

    def training_step(self, batch: Tensor) -> Tensor:
        return self.net(batch).sum()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Pretrained(nn.Module):
    """What a transformers model looks like from outside."""

    config: Any = None

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.config, self.inner = {"model_type": "toy"}, net

    def save_pretrained(self) -> None: ...

    def get_input_embeddings(self) -> nn.Module:
        return self.inner.embed


def keys_in(directory: Path) -> set[str]:
    from safetensors.torch import load_file

    return {key.split(".lora_")[0] for key in load_file(directory / FILES[2]) if ".lora_" in key}


@pytest.mark.parametrize(
    ("wrap", "root", "expected"),
    [
        (lambda net: net, None, "base_model.model.embed"),
        (lambda net: nn.ModuleDict({"part": net}), None, "base_model.model.part.embed"),
        (lambda net: nn.ModuleDict({"part": net}), "part", "base_model.model.embed"),
        (Wrapping, None, "base_model.model.embed"),
        (Wrapping, "", "base_model.model.net.embed"),
        (Pretrained, None, "base_model.model.inner.embed"),
        (lambda net: Wrapping(Pretrained(net)), None, "base_model.model.inner.embed"),
        (lambda net: nn.ModuleDict({"a": Pretrained(net), "b": nn.Linear(2, 2)}), None, "base_model.model.inner.embed"),
    ],
)
def test_names_are_relative_to_inner_model(wrap, root, expected, tiny, rng, tmp_path):
    model = trained_from(wrap(tiny), rng)
    save_adapter(model, tmp_path, export_root=root)
    assert expected in keys_in(tmp_path)
    fresh = wrap(again(tiny))
    load_adapter(fresh, tmp_path)
    assert_same_bits(adapter_state_dict(fresh), adapter_state_dict(model))


def test_unknown_or_ambiguous_root_is_refused(tiny, rng, tmp_path):
    model = nn.ModuleDict({"student": Pretrained(tiny), "teacher": Pretrained(type(tiny)())})
    trained_from(model, rng, LoRAConfig(rank=1, target_modules=["q_proj"]))
    with pytest.raises(ValueError, match=r"'studnet' is not a module of ModuleDict\. Closest names: 'student'"):
        save_adapter(model, tmp_path, export_root="studnet")
    with pytest.raises(ValueError, match="it is outside the exported model"):
        save_adapter(model, tmp_path, export_root="student")


def test_a_named_root_is_exported_without_what_trains_in_full_elsewhere(tiny, rng, tmp_path):
    config = LoRAConfig(rank=1, target_modules=["q_proj"], modules_to_save=["value"])
    model = trained_from(nn.ModuleDict({"policy": Pretrained(tiny), "value": nn.Linear(2, 1)}), rng, config)
    with pytest.raises(ValueError, match=r"value\.weight: it is outside .*, which leaves out what trains in full"):
        save_adapter(model, tmp_path)
    with pytest.warns(UserWarning, match=r"leaves out value\.weight, value\.bias: .* export_root='policy'"):
        save_adapter(model, tmp_path, export_root="policy")
    load_adapter(alone := Pretrained(again(tiny)), tmp_path)
    state = adapter_state_dict(model)
    factors = {name.removeprefix("policy."): each for name, each in state.items() if name.startswith("policy.")}
    assert_same_bits(adapter_state_dict(alone), factors)


def test_adapted_model_among_several_is_exported(tiny, rng, tmp_path):
    model = nn.ModuleDict({"teacher": Pretrained(type(tiny)()), "student": Pretrained(tiny)})
    trained_from(model, rng, LoRAConfig(rank=1, target_modules=["student.inner.blocks.0.q_proj"]))
    save_adapter(model, tmp_path)
    assert keys_in(tmp_path) == {"base_model.model.inner.blocks.0.q_proj"}
    two = nn.ModuleDict({"a": Pretrained(type(tiny)()), "b": Pretrained(type(tiny)())})
    with raises_and_changes_nothing(two, ValueError, r"fits several parts of this ModuleDict: a, b\."):
        load_adapter(two, tmp_path)


# --- reading into models that are adapted already


def test_adapted_model_takes_same_shaped_adapter(tiny, tokens, rng, tmp_path):
    save_adapter(trained_from(tiny, rng), tmp_path)
    expected, state = tiny(tokens), adapter_state_dict(tiny)
    train_all(tiny, rng)
    identities = snapshot(tiny)["identities"]
    load_adapter(tiny, tmp_path)
    assert torch.equal(tiny(tokens), expected)
    assert_same_bits(adapter_state_dict(tiny), state)
    assert snapshot(tiny)["identities"] == identities
    detach(tiny)
    load_adapter(tiny, tmp_path)
    assert torch.equal(tiny(tokens), expected)


@pytest.mark.parametrize("options", [{"rank": 3}, {"alpha": 7.0}, {"target_modules": ["q_proj"]}])
def test_model_with_other_adapter_refuses_file(options, tiny, rng, tmp_path):
    save_adapter(trained_from(again(tiny), rng), tmp_path)
    attach(tiny, LoRAConfig(**(CONFIG.to_dict() | options)))
    with raises_and_changes_nothing(tiny, ValueError, "already has adapters, and their layers, ranks"):
        load_adapter(tiny, tmp_path)


def test_merged_base_refuses_loading_and_warns_on_saving(tiny, rng, tmp_path):
    save_adapter(trained_from(tiny, rng), tmp_path)
    merge(tiny)
    with raises_and_changes_nothing(tiny, RuntimeError, "already merged into embed"):
        load_adapter(tiny, tmp_path)
    trained_from(tiny, rng)
    with pytest.warns(UserWarning, match="belongs to a base with another adapter merged into embed"):
        save_adapter(tiny, tmp_path / "second")


def test_loading_freezes_inner_model(tiny, rng, tmp_path):
    save_adapter(trained_from(tiny, rng), tmp_path)
    fresh = Wrapping(again(tiny))
    report = load_adapter(fresh, tmp_path)
    assert len(report.layers) == len(lora_layers(fresh)) == 3
    assert not fresh.net.embed.weight.requires_grad
    assert fresh.net.head.weight.requires_grad


def test_config_is_readable(tiny, rng, tmp_path):
    save_adapter(trained_from(tiny, rng), tmp_path, base_model_name_or_path="me/tiny")
    config = json.loads((tmp_path / FILES[1]).read_text())
    assert config["base_model_name_or_path"] == "me/tiny"
    assert (config["r"], config["lora_alpha"], config["rank_pattern"]) == (2, 3, {})
    assert config["target_modules"] == ["embed", "q_proj"]
    assert config["modules_to_save"] == ["head"]


def test_model_card_says_what_the_adapter_is(tiny, rng, tmp_path):
    save_adapter(trained_from(tiny, rng), tmp_path, base_model_name_or_path="me/tiny")
    card = (tmp_path / "README.md").read_text()
    assert card.startswith("---\nbase_model: me/tiny\nlibrary_name: peft\n")
    count = sum(tensor.numel() for tensor in adapter_state_dict(tiny).values())
    for words in ("| `r` | `2` |", "`['embed', 'q_proj']`", f"| parameters | {count:,} |", "PeftModel.from_pretrained"):
        assert words in card


def test_local_path_is_no_base_on_a_hub(tiny, rng, tmp_path):
    save_adapter(trained_from(tiny, rng), tmp_path, base_model_name_or_path="/models/tiny")
    assert "base_model: /" not in (tmp_path / "README.md").read_text()


def test_own_model_card_stays_and_a_written_one_follows(tiny, rng, tmp_path):
    save_adapter(trained_from(tiny, rng), tmp_path, base_model_name_or_path="me/first")
    save_adapter(tiny, tmp_path, base_model_name_or_path="me/second", overwrite=True)
    assert "me/second" in (tmp_path / "README.md").read_text()
    (tmp_path / "README.md").write_text("mine")
    save_adapter(tiny, tmp_path, overwrite=True)
    assert (tmp_path / "README.md").read_text() == "mine"


def test_unknown_task_is_refused(tiny, rng, tmp_path):
    with pytest.raises(ValueError, match="task_type='CLS' is unknown to PEFT; choose one of 'CAUSAL_LM'"):
        save_adapter(trained_from(tiny, rng), tmp_path / "new", task_type="CLS")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("kind", [nn.ModuleDict, nn.ModuleList, nn.ParameterDict, nn.ParameterList])
def test_containers_that_peft_cannot_train_in_full_are_refused(kind, tiny, rng, tmp_path):
    part = nn.Linear(3, 3) if kind in {nn.ModuleDict, nn.ModuleList} else nn.Parameter(torch.ones(3))
    tiny.extra = kind([part] if kind in {nn.ModuleList, nn.ParameterList} else {"first": part})
    with pytest.raises(TypeError, match="modules_to_save cannot be applied"):
        peft.get_peft_model(copy.deepcopy(tiny), peft.LoraConfig(target_modules=["q_proj"], modules_to_save=["extra"]))
    attach(tiny, LoRAConfig(rank=2, target_modules=["q_proj"], modules_to_save=["extra"]))
    train_all(tiny, rng)
    with pytest.raises(ValueError, match=f"extra: PEFT wraps no {kind.__name__}; name the modules in it"):
        save_adapter(tiny, tmp_path / "peft")
    assert not preflight(tiny).peft_accepts


@pytest.mark.parametrize("name", ["out", "layer", "A", "vector", "default", "head", "variant"])
def test_names_that_end_as_peft_s_own_are_refused_where_peft_fails(name, tiny, rng, tmp_path):
    setattr(tiny, name, nn.Linear(3, 3))
    attach(tiny, LoRAConfig(rank=2, target_modules=["q_proj"], modules_to_save=[name]))
    train_all(tiny, rng)
    is_accepted = preflight(tiny).peft_accepts
    with pytest.MonkeyPatch.context() as patch:  # written all the same
        patch.setattr(ExportCollector, "_refuse_unclear_names", lambda self: None)
        save_adapter(tiny, tmp_path / "peft")
    setattr(base := again(tiny), name, nn.Linear(3, 3))
    if is_accepted:
        peft.PeftModel.from_pretrained(base, tmp_path / "peft")
    else:
        with pytest.raises((TypeError, KeyError, ValueError)):
            peft.PeftModel.from_pretrained(base, tmp_path / "peft")
        with pytest.raises(ValueError, match=f"{name}: PEFT matches modules_to_save by the ends of names, and its own"):
            save_adapter(tiny, tmp_path / "refused")
