"""Modules that hold several models alike: an adapter goes back to the one it was trained in, in memory and on disk."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from lightning.pytorch import LightningModule
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lightning_lora import (
    LoRACallback,
    LoRAConfig,
    adapter_names,
    adapter_state_dict,
    add_adapter,
    analysis,
    attach,
    load_adapter,
    lora_layers,
    merge,
    save_adapter,
)
from tests.contract import assert_same_bits, raises_and_changes_nothing, train_all
from tests.files import run, write_checkpoint
from tests.peft_format.kinds import WARNED
from tests.toys import FEATURES, Toy, loader, trainer

pytestmark = WARNED


def _chain() -> nn.Sequential:
    return nn.Sequential(nn.Linear(FEATURES, FEATURES), nn.Tanh(), nn.Linear(FEATURES, FEATURES))


class Halves(Toy):
    """An encoder and a decoder of the same layers, with other values."""

    def build(self) -> None:
        torch.manual_seed(0)
        self.encoder, self.decoder = _chain(), _chain()

    def net(self, x: Tensor) -> Tensor:
        return self.decoder(self.encoder(x))

    forward = net


class Copies(Halves):
    """Two parts that start with the same values, as in self-distillation."""

    def build(self) -> None:
        torch.manual_seed(0)
        self.encoder = _chain()
        self.decoder = copy.deepcopy(self.encoder)


class Lists(Toy):
    """Lists of layers, as graph networks have: no part of it computes anything by itself."""

    def build(self) -> None:
        torch.manual_seed(0)
        self.encoder, self.decoder = nn.ModuleList(_chain()), nn.ModuleList(_chain())

    def net(self, x: Tensor) -> Tensor:
        for layer in (*self.encoder, *self.decoder):
            x = layer(x)
        return x

    forward = net


class SameName(Toy):
    """A layer whose name one has in a part, too."""

    def build(self) -> None:
        torch.manual_seed(0)
        self.fc = nn.Linear(FEATURES, FEATURES)
        self.decoder = nn.Module()
        self.decoder.fc = nn.Linear(FEATURES, FEATURES)

    def net(self, x: Tensor) -> Tensor:
        return self.decoder.fc(self.fc(x).tanh())

    forward = net


class Plain(nn.Module):
    """The parts of a LightningModule in a module that is none."""

    def __init__(self, parts: type[Toy] = Halves) -> None:
        super().__init__()
        for name, part in parts().named_children():
            setattr(self, name, part)

    def forward(self, x: Tensor) -> Tensor:
        return self.decoder(self.encoder(x))


def _equal_parts(*names: str) -> nn.Module:
    """Return a module with equal parts of these names."""
    torch.manual_seed(0)
    part, module = _chain(), nn.Module()
    for name in names:
        setattr(module, name, copy.deepcopy(part))
    return module


ALIKE = [Halves, Copies, Lists, SameName]
TARGETS = {kind: ["decoder.*"] for kind in ALIKE} | {SameName: ["decoder.fc"]}
INPUT = torch.linspace(-1, 1, 3 * FEATURES).view(3, FEATURES)


def trained(model: nn.Module, targets: list[str], rng: torch.Generator) -> nn.Module:
    attach(model, LoRAConfig(rank=2, target_modules=targets))
    train_all(model, rng)
    return model


def base_file(model: nn.Module, path: Path) -> Path:
    save_file({name: tensor.clone() for name, tensor in model.state_dict().items()}, path)
    return path


def assert_written(folder: Path, model: nn.Module) -> None:
    found, expected = load_file(folder / "model.safetensors"), model.state_dict()
    assert_same_bits(dict(sorted(found.items())), dict(sorted(expected.items())))


def forget_root(directory: Path, *, values: bool = True) -> None:
    """Write the directory as a version that recorded no root did, or as PEFT does."""
    path = directory / "adapter_model.safetensors"
    size = int.from_bytes(path.read_bytes()[:8], "little")
    metadata = json.loads(path.read_bytes()[8 : 8 + size])["__metadata__"]
    kept = {"lightning_lora_base": metadata["lightning_lora_base"]} if values else {}
    save_file(load_file(path), path, {"format": "pt"} | kept)


def _load(model: nn.Module, directory: Path) -> None:
    load_adapter(model, directory)


def _add(model: nn.Module, directory: Path) -> None:
    add_adapter(model, "mine", directory)
    assert adapter_names(model) == ["mine"]


def _from_checkpoint(model: nn.Module, directory: Path) -> None:
    assert run("import", directory, directory.parent / "back.ckpt") == 0
    load_adapter(model, directory.parent / "back.ckpt")


WAYS: list[Callable[[nn.Module, Path], None]] = [_load, _add, _from_checkpoint]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", ALIKE)
def test_adapter_of_one_part_is_loaded_into_that_part(kind, way, rng, tmp_path):
    model = trained(kind(), TARGETS[kind], rng)
    save_adapter(model, tmp_path / "peft")
    way(fresh := kind(), tmp_path / "peft")
    assert lora_layers(fresh).keys() == lora_layers(model).keys()
    assert torch.equal(fresh(INPUT), model(INPUT))
    assert not torch.equal(fresh(INPUT), kind()(INPUT))


@pytest.mark.parametrize("kind", ALIKE)
def test_training_starts_from_the_adapter_of_one_part(kind, rng, tmp_path):
    model = trained(kind(), TARGETS[kind], rng)
    save_adapter(model, tmp_path / "peft")
    callback = LoRACallback(rank=2, target_modules=TARGETS[kind], init_from=tmp_path / "peft")
    trainer(callback, max_steps=1).fit(fresh := kind(), loader())
    expected = model.loss(next(iter(loader()))).item()
    assert fresh.losses[0] == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("kind", ALIKE)
def test_analysis_finds_the_weights_of_the_part(kind, rng, tmp_path):
    model = trained(kind(), TARGETS[kind], rng)
    save_adapter(model, tmp_path / "peft")
    found = {each.name: each for each in analysis.adapters.read_matrices(tmp_path / "peft", kind())}
    expected = {each.name: each for each in analysis.adapters.read_matrices(model)}
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name].weight, expected[name].weight) for name in expected)


@pytest.mark.parametrize("from_checkpoint", [False, True])
@pytest.mark.parametrize("kind", ALIKE)
def test_base_on_disk_takes_the_adapter_of_one_part(kind, from_checkpoint, rng, tmp_path):
    model, base = trained(kind(), TARGETS[kind], rng), base_file(kind(), tmp_path / "base.safetensors")
    source = write_checkpoint(model, tmp_path / "last.ckpt") if from_checkpoint else tmp_path / "peft"
    if not from_checkpoint:
        save_adapter(model, source)
    assert run("verify", source, base) == 0
    assert run("merge", source, base, tmp_path / "out") == 0
    merge(model)
    assert_written(tmp_path / "out", model)


@pytest.mark.parametrize("kind", [Halves, Copies])
def test_part_alone_takes_its_adapter_too(kind, rng, tmp_path):
    model = trained(kind(), ["decoder.*"], rng)
    save_adapter(model, tmp_path / "peft")
    load_adapter(part := kind().decoder, tmp_path / "peft")
    assert torch.equal(part(INPUT), model.decoder(INPUT))
    assert run("merge", tmp_path / "peft", base_file(kind().decoder, tmp_path / "b.safetensors"), tmp_path / "out") == 0
    merge(model)
    assert_written(tmp_path / "out", model.decoder)


@pytest.mark.parametrize("kind", ALIKE)
def test_any_base_is_changed_in_the_same_part(kind, rng, tmp_path):
    save_adapter(trained(kind(), TARGETS[kind], rng), tmp_path / "peft")
    other = kind()
    for parameter in other.parameters():
        parameter.data.mul_(3)
    base = base_file(other, tmp_path / "base.safetensors")
    assert run("verify", tmp_path / "peft", base) == 1
    assert run("merge", "--any-base", tmp_path / "peft", base, tmp_path / "out") == 0
    with pytest.raises(ValueError, match="trained on a different base"):
        load_adapter(other, tmp_path / "peft")
    load_adapter(other, tmp_path / "peft", check_base=False)
    assert all(name.startswith("decoder") for name in lora_layers(other))
    merge(other)
    assert_written(tmp_path / "out", other)


def test_values_tell_the_part_where_the_file_does_not_name_it(rng, tmp_path):
    model, base = trained(Halves(), ["decoder.*"], rng), base_file(Halves(), tmp_path / "base.safetensors")
    save_adapter(model, tmp_path / "peft")
    forget_root(tmp_path / "peft")
    for fresh in (Halves(), Plain()):
        load_adapter(fresh, tmp_path / "peft")
        assert torch.equal(fresh(INPUT), model(INPUT))
    assert run("merge", tmp_path / "peft", base, tmp_path / "out") == 0
    merge(model)
    assert_written(tmp_path / "out", model)


def test_a_part_that_nothing_tells_is_asked_for(rng, tmp_path, capsys):
    save_adapter(trained(Halves(), ["decoder.*"], rng), tmp_path / "peft")
    forget_root(tmp_path / "peft", values=False)
    for fresh in (Halves(), Plain()):
        with raises_and_changes_nothing(fresh, ValueError, r"fits several parts .*: encoder, decoder.*model\.encoder"):
            load_adapter(fresh, tmp_path / "peft")
    base = base_file(Halves(), tmp_path / "base.safetensors")
    for arguments in (["verify"], ["merge", "--any-base"]):
        out = [tmp_path / "out"] if arguments[0] == "merge" else []
        assert run(*arguments, tmp_path / "peft", base, *out) != 0
        assert "fits several parts of the base: decoder, encoder" in capsys.readouterr().err
    # What the messages say works.
    assert run("import", tmp_path / "peft", tmp_path / "back.ckpt", "--root", "decoder") == 0
    assert run("merge", "--any-base", tmp_path / "back.ckpt", base, tmp_path / "out") == 0
    changed = load_file(tmp_path / "out" / "model.safetensors")
    before = Halves().state_dict()
    assert {name for name in before if not torch.equal(before[name], changed[name])} == {
        "decoder.0.weight",
        "decoder.2.weight",
    }


@pytest.mark.parametrize("parts", [("teacher", "student"), ("student", "teacher")])
@pytest.mark.parametrize("way", [_load, _add])
def test_parts_of_equal_values_are_asked_for(way, parts, rng, tmp_path):
    """As a policy and its reference are before training: to take the first one would leave the other without effect."""
    truth = trained(_equal_parts("net").net, ["*"], rng)
    save_adapter(truth, tmp_path / "peft")
    fresh = _equal_parts(*parts)
    asked = rf"fits several parts .*: {', '.join(parts)}. Nothing was changed.*load_adapter\(model\.{parts[0]}, \.\.\."
    with raises_and_changes_nothing(fresh, ValueError, asked):
        way(fresh, tmp_path / "peft")
    way(fresh.student, tmp_path / "peft")
    assert torch.equal(fresh.student(INPUT), truth(INPUT))
    assert torch.equal(fresh.teacher(INPUT), _equal_parts("net").net(INPUT))


@pytest.mark.parametrize("from_checkpoint", [False, True])
def test_parts_of_equal_values_on_disk_are_asked_for(from_checkpoint, rng, tmp_path, capsys):
    save_adapter(trained(_equal_parts("net").net, ["*"], rng), tmp_path / "peft")
    source = tmp_path / "peft"
    if from_checkpoint:
        source = write_checkpoint(trained(_equal_parts("net"), ["net.*"], rng), tmp_path / "last.ckpt")
    base = base_file(_equal_parts("teacher", "student"), tmp_path / "base.safetensors")
    assert run("verify", source, base) != 0
    assert run("merge", source, base, tmp_path / "out") != 0
    said = capsys.readouterr().err
    assert said.count("fits several parts of the base: student, teacher") == 2
    assert not (tmp_path / "out").exists()
    # What the message says works.
    if from_checkpoint:
        assert run("export", source, tmp_path / "exported") == 0
    directory = tmp_path / "exported" if from_checkpoint else source
    assert run("import", directory, tmp_path / "back.ckpt", "--root", "student") == 0
    assert run("merge", tmp_path / "back.ckpt", base, tmp_path / "out") == 0
    changed, before = load_file(tmp_path / "out" / "model.safetensors"), load_file(base)
    assert {name for name in before if not torch.equal(before[name], changed[name])} == {
        "student.0.weight",
        "student.2.weight",
    }


def test_one_part_of_two_names_is_no_other_part(rng, tmp_path):
    truth = trained(_equal_parts("net").net, ["*"], rng)
    save_adapter(truth, tmp_path / "peft")
    shared = _equal_parts("student")
    shared.policy = shared.student
    load_adapter(shared, tmp_path / "peft")
    assert torch.equal(shared.policy(INPUT), truth(INPUT))


def test_analysis_asks_for_the_part_of_equal_values(rng, tmp_path):
    save_adapter(trained(_equal_parts("net").net, ["*"], rng), tmp_path / "peft")
    with pytest.raises(ValueError, match=r"fits several parts .*: teacher, student"):
        analysis.adapters.read_matrices(tmp_path / "peft", _equal_parts("teacher", "student"))


class Distilled(Toy):
    """A student that begins as its teacher, and learns what is to be added to it."""

    def build(self) -> None:
        for name, part in _equal_parts("teacher", "student").named_children():
            setattr(self, name, part)

    def net(self, x: Tensor) -> Tensor:
        return self.student(x) + self.teacher(x)

    forward = net


def test_training_takes_the_part_that_it_adapts(rng, tmp_path):
    truth = trained(_equal_parts("net").net, ["*"], rng)
    save_adapter(truth, tmp_path / "peft")
    callback = LoRACallback(rank=2, target_modules=["student.*"], init_from=tmp_path / "peft")
    trainer(callback, max_steps=1).fit(fresh := Distilled(), loader())
    expected = Distilled()
    expected.student = truth
    batch = next(iter(loader()))
    assert fresh.losses[0] == pytest.approx(expected.loss(batch).item(), rel=1e-6)
    assert fresh.losses[0] != pytest.approx(Distilled().loss(batch).item(), rel=1e-3)


def test_training_asks_for_the_part_where_it_adapts_both(rng, tmp_path):
    save_adapter(trained(_equal_parts("net").net, ["*"], rng), tmp_path / "peft")
    callback = LoRACallback(rank=2, target_modules=["student.*", "teacher.*"], init_from=tmp_path / "peft")
    with pytest.raises(ValueError, match="fits several parts of this Distilled: teacher, student"):
        trainer(callback, max_steps=1).fit(Distilled(), loader())
    # What the message says works.
    assert run("import", tmp_path / "peft", tmp_path / "back.ckpt", "--root", "student") == 0
    callback = LoRACallback(rank=2, target_modules=["student.*", "teacher.*"], init_from=tmp_path / "back.ckpt")
    trainer(callback, max_steps=1).fit(Distilled(), loader())


class Layered(LightningModule):
    """Layers in a list, between two others."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inp, self.out = nn.Linear(FEATURES, FEATURES), nn.Linear(FEATURES, 2)
        self.layers = nn.ModuleList(_chain())

    def forward(self, x: Tensor) -> Tensor:
        x = self.inp(x)
        for layer in self.layers:
            x = layer(x)
        return self.out(x)

    training_step = configure_optimizers = None  # by their presence it is one that a Trainer takes


def test_a_list_of_layers_is_no_model(rng, tmp_path):
    """PEFT wraps what computes something, and must find the layers in it."""
    peft = pytest.importorskip("peft")
    model = trained(Layered(), ["layers.*"], rng)
    save_adapter(model, tmp_path / "peft")
    wrapped = peft.PeftModel.from_pretrained(Layered(), tmp_path / "peft")
    torch.testing.assert_close(wrapped(INPUT), model(INPUT), rtol=1e-5, atol=1e-6)
    assert not torch.allclose(wrapped(INPUT), Layered()(INPUT))
    load_adapter(fresh := Layered(), tmp_path / "peft")
    assert_same_bits(adapter_state_dict(fresh), adapter_state_dict(model))


def test_export_without_the_model_knows_lists_too(rng, tmp_path):
    model = trained(Layered(), ["layers.*"], rng)
    save_adapter(model, tmp_path / "live")
    assert run("export", write_checkpoint(model, tmp_path / "last.ckpt"), tmp_path / "files") == 0
    assert run("import", tmp_path / "files", tmp_path / "back.ckpt") == 0
    assert run("export", tmp_path / "back.ckpt", tmp_path / "again") == 0
    files = [tmp_path / name / "adapter_model.safetensors" for name in ("live", "files", "again")]
    assert len({path.read_bytes() for path in files}) == 1


def test_model_card_names_the_part(rng, tmp_path):
    save_adapter(trained(Halves(), ["decoder.*"], rng), tmp_path / "part")
    assert "With the module `decoder` of what was trained as `model`:" in (tmp_path / "part" / "README.md").read_text()
    save_adapter(trained(_chain(), ["0"], rng), tmp_path / "whole")
    assert "With the base model as `model`:" in (tmp_path / "whole" / "README.md").read_text()


def test_sum_of_adapters_of_one_part_stays_with_it(rng, tmp_path):
    for name in ("one", "two"):
        save_adapter(trained(Copies(), ["decoder.*"], rng), tmp_path / name)
    assert run("combine", tmp_path / "one", tmp_path / "two", "--weights", "1,1", "--out", tmp_path / "sum") == 0
    load_adapter(model := Copies(), tmp_path / "sum")
    assert all(name.startswith("decoder") for name in lora_layers(model))


def test_a_head_that_the_base_lacks_is_added_to_the_part(rng, tmp_path):
    model = Halves()
    model.decoder.append(nn.Linear(FEATURES, 2))
    attach(
        model, LoRAConfig(rank=2, target_modules=["decoder.*"], exclude_modules=["3"], modules_to_save=["decoder.3"])
    )
    train_all(model, rng)
    save_adapter(model, tmp_path / "peft")
    assert run("merge", tmp_path / "peft", base_file(Halves(), tmp_path / "b.safetensors"), tmp_path / "out") == 0
    merge(model)
    assert_written(tmp_path / "out", model)
