"""Adapter state: which tensors it holds, that it loads all or nothing, and reading it back from a ``.ckpt``."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torchmetrics import MeanMetric

from lightning_lora import (
    LoRACallback,
    LoRAConfig,
    adapter_state_dict,
    add_adapter,
    attach,
    detach,
    load_adapter,
    load_adapter_state_dict,
    lora_layers,
    merge,
    save_adapter,
)
from lightning_lora.state import describe
from lightning_lora.storage.checkpoint import RECORD_KEY
from tests.contract import assert_same_bits, assert_unchanged, raises_and_changes_nothing, snapshot, train_all
from tests.toys import Toy, loader, network, trainer

CONFIG = LoRAConfig(rank=2, alpha=3.0, target_modules=["embed", "q_proj"], modules_to_save=["head"])
KEYS = [
    "embed.lora.A",
    "embed.lora.B",
    "blocks.0.q_proj.lora.A",
    "blocks.0.q_proj.lora.B",
    "blocks.1.q_proj.lora.A",
    "blocks.1.q_proj.lora.B",
    "head.weight",
    "head.bias",
]


def trained_from(model: nn.Module, rng: torch.Generator) -> nn.Module:
    """Return an adapted copy of a base model, trained."""
    twin = copy.deepcopy(model)
    attach(twin, CONFIG)
    train_all(twin, rng)
    with torch.no_grad():
        twin.head.weight.normal_(generator=rng)
    return twin


# --- in memory


def test_state_holds_exactly_trained_tensors(tiny, rng):
    model = trained_from(tiny, rng)
    state = adapter_state_dict(model)
    assert list(state) == KEYS
    assert set(state) == {name for name, p in model.named_parameters() if p.requires_grad}
    assert_same_bits(state, {name: dict(model.named_parameters())[name] for name in KEYS})


def test_state_holds_copies_without_gradients(tiny, rng):
    model = trained_from(tiny, rng)
    state = adapter_state_dict(model)
    before = {name: tensor.clone() for name, tensor in state.items()}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)
    assert_same_bits(state, before)
    assert not any(tensor.requires_grad or isinstance(tensor, nn.Parameter) for tensor in state.values())


def test_state_of_submodule_uses_its_names(tiny, rng):
    model = trained_from(tiny, rng)
    assert list(adapter_state_dict(model.blocks[0])) == ["q_proj.lora.A", "q_proj.lora.B"]


@pytest.mark.parametrize("options", [{"modules_to_save": ["blocks.0.norm"]}, {"bias": "all"}])
def test_state_of_submodule_refuses_to_leave_out_what_trains_in_full(tiny, options):
    tiny.blocks[0].norm = nn.LayerNorm(4)
    attach(tiny, replace(CONFIG, **options))
    with pytest.raises(ValueError, match=r"norm\.bias.* of this \w+ train in full.*passed to attach"):
        adapter_state_dict(tiny.blocks[0])
    assert "blocks.0.norm.bias" in adapter_state_dict(tiny)


def test_state_holds_only_persistent_buffers(tiny):
    for part in (tiny.head, tiny.norm):
        part.register_buffer("kept", torch.ones(2))
        part.register_buffer("scratch", torch.ones(2), persistent=False)
    attach(tiny, CONFIG)
    assert list(adapter_state_dict(tiny)) == [*KEYS, "head.kept"]


def test_user_module_named_lora_is_not_in_state(tiny):
    tiny.lora = nn.Linear(4, 4)
    attach(tiny, CONFIG)
    assert list(adapter_state_dict(tiny)) == KEYS


def test_a_checkpoint_of_a_module_around_this_one_or_in_it_says_where_it_belongs(tmp_path):
    run = trainer(LoRACallback(rank=2))
    run.fit(Toy(), loader())
    run.save_checkpoint(tmp_path / "whole.ckpt")
    with pytest.raises(ValueError, match=r"net\.4\. The checkpoint's module holds this one as 'net': .*export"):
        load_adapter(network(), tmp_path / "whole.ckpt")
    with pytest.raises(ValueError, match=r"The checkpoint belongs to the part 'model' of this module: load it there"):
        load_adapter(nn.ModuleDict({"model": Toy()}), tmp_path / "whole.ckpt")
    load_adapter(nn.ModuleDict({"model": Toy()}).model, tmp_path / "whole.ckpt")


def test_loaded_state_reproduces_trained_model(tiny, tokens, rng):
    trained = trained_from(tiny, rng)
    attach(tiny, CONFIG)
    identities = snapshot(tiny)["identities"]
    load_adapter_state_dict(tiny, adapter_state_dict(trained))
    assert torch.equal(tiny(tokens), trained(tokens))
    assert snapshot(tiny)["identities"] == identities  # optimizers hold these tensors


def test_state_dicts_swap_tasks_on_one_base(tiny, tokens, rng):
    one, two = trained_from(tiny, rng), trained_from(tiny, rng)
    states, outputs = [adapter_state_dict(m) for m in (one, two)], [m(tokens) for m in (one, two)]
    attach(tiny, CONFIG)
    for index in (0, 1, 0):
        load_adapter_state_dict(tiny, states[index])
        assert torch.equal(tiny(tokens), outputs[index])


def test_loading_converts_to_model_precision(tiny, rng):
    state = adapter_state_dict(trained_from(tiny, rng))
    attach(tiny, CONFIG)
    load_adapter_state_dict(tiny, {name: tensor.double() for name, tensor in state.items()})
    assert_same_bits(adapter_state_dict(tiny), state)


def test_mismatches_are_listed_in_one_error(tiny, rng):
    model = trained_from(tiny, rng)
    state = {name: tensor + 1 for name, tensor in adapter_state_dict(model).items()}
    del state["embed.lora.A"], state["head.bias"]
    state["blocks.0.q_porj.lora.A"] = state["blocks.0.q_proj.lora.A"]
    state["blocks.1.q_proj.lora.A"] = torch.zeros(3, 16)
    state["head.weight"] = torch.zeros(8, 17)
    with raises_and_changes_nothing(model, ValueError, "nothing was changed") as caught:
        load_adapter_state_dict(model, state)
    message = str(caught.value)
    assert "missing from the state: embed.lora.A, head.bias" in message
    assert "unknown to the model: blocks.0.q_porj.lora.A (closest: 'blocks.0.q_proj.lora.A')" in message
    assert "blocks.1.q_proj.lora.A: file (3, 16), model (2, 16)" in message
    assert "head.weight: file (8, 17), model (8, 16)" in message


@pytest.mark.parametrize("name", KEYS)
def test_missing_tensor_is_named(name: str, tiny, rng):
    model = trained_from(tiny, rng)
    state = adapter_state_dict(model)
    del state[name]
    with raises_and_changes_nothing(model, ValueError, name):
        load_adapter_state_dict(model, state)


def test_base_tensor_in_state_is_refused(tiny, rng):
    model = trained_from(tiny, rng)
    state = adapter_state_dict(model) | {"embed.weight": torch.zeros(20, 16)}
    with raises_and_changes_nothing(model, ValueError, "unknown to the model: embed.weight"):
        load_adapter_state_dict(model, state)


@pytest.mark.parametrize("verb", [adapter_state_dict, lambda model: load_adapter_state_dict(model, {})])
def test_model_without_adapters_is_refused(verb, tiny):
    with raises_and_changes_nothing(tiny, ValueError, "has no adapters; call attach"):
        verb(tiny)


# --- a base on the meta device


def _on_meta(tiny: nn.Module) -> nn.Module:
    return copy.deepcopy(tiny).to("meta")


def _directory_into(model: nn.Module, trained: nn.Module, folder: Path) -> None:
    save_adapter(trained, folder / "peft")
    load_adapter(model, folder / "peft")


def _file_into(model: nn.Module, trained: nn.Module, folder: Path) -> None:
    load_adapter(model, saved(checkpoint(trained), folder))


def _named_into(model: nn.Module, trained: nn.Module, folder: Path) -> None:
    add_adapter(model, "mine", saved(checkpoint(trained), folder))


@pytest.mark.parametrize("way", [_directory_into, _file_into, _named_into])
def test_meta_base_takes_no_adapter(way, tiny, rng, tmp_path):
    trained, model = trained_from(tiny, rng), _on_meta(tiny)
    names = list(model.state_dict())
    with pytest.raises(ValueError, match=r"(?s)on the meta device.*Nothing was changed.*to_empty.*assign=True"):
        way(model, trained, tmp_path)
    assert list(model.state_dict()) == names
    assert not lora_layers(model)


@pytest.mark.parametrize("assign", [False, True])
def test_meta_base_that_has_got_its_values_takes_the_adapter(assign, tiny, tokens, rng, tmp_path):
    trained, model = trained_from(tiny, rng), _on_meta(tiny)
    if not assign:
        model.to_empty(device="cpu")
    model.load_state_dict(tiny.state_dict(), assign=assign)
    _directory_into(model, trained, tmp_path)
    assert torch.equal(model(tokens), trained(tokens))


def test_meta_adapter_takes_no_state_until_it_is_filled(tiny, tokens, rng):
    trained, model = trained_from(tiny, rng), _on_meta(tiny)
    attach(model, CONFIG)
    state = adapter_state_dict(trained)
    with pytest.raises(ValueError, match=r"embed\.lora\.A.* on the meta device.*Nothing was changed"):
        load_adapter_state_dict(model, state)
    model.to_empty(device="cpu")
    model.load_state_dict(tiny.state_dict(), strict=False)
    load_adapter_state_dict(model, state)
    assert torch.equal(model(tokens), trained(tokens))


def test_values_for_what_lies_on_meta_alone_are_refused(tiny, rng):
    """Such as a head that trains in full, in a model whose other layers have their values."""
    trained, model = trained_from(tiny, rng), copy.deepcopy(tiny)
    model.head.to("meta")
    attach(model, CONFIG)
    with pytest.raises(ValueError, match=r"head\.weight, head\.bias .* on the meta device"):
        load_adapter_state_dict(model, adapter_state_dict(trained))


# --- from a file


def checkpoint(model: nn.Module, **changes: Any) -> dict[str, Any]:
    """Return what a LoRACallback run writes, as far as an adapter needs it."""
    return {"state_dict": adapter_state_dict(model), RECORD_KEY: describe(model), "epoch": 1, **changes}


def saved(content: object, folder: Path) -> Path:
    path = folder / "adapter.ckpt"
    torch.save(content, path)
    return path


def test_load_adapter_reproduces_trained_model(tiny, tokens, rng, tmp_path):
    trained = trained_from(tiny, rng)
    report = load_adapter(tiny, saved(checkpoint(trained), tmp_path))
    assert torch.equal(tiny(tokens), trained(tokens))
    assert [layer.name for layer in report.layers] == list(lora_layers(trained))
    assert {name for name, p in tiny.named_parameters() if p.requires_grad} == set(KEYS)
    detach(tiny)


def test_path_may_be_string(tiny, tokens, rng, tmp_path):
    trained = trained_from(tiny, rng)
    load_adapter(tiny, str(saved(checkpoint(trained), tmp_path)))
    assert torch.equal(tiny(tokens), trained(tokens))


def test_file_loads_into_model_with_same_adapter(tiny, tokens, rng, tmp_path):
    trained, other = trained_from(tiny, rng), trained_from(tiny, rng)
    path = saved(checkpoint(trained), tmp_path)
    load_adapter(other, path)
    load_adapter(other, path)
    assert torch.equal(other(tokens), trained(tokens))


def test_file_of_adapted_submodule_loads_there(tiny, tokens, rng, tmp_path):
    trained = copy.deepcopy(tiny)
    attach(trained.blocks, LoRAConfig(rank=2), seed=3)
    train_all(trained, rng)
    load_adapter(tiny, saved(checkpoint(trained), tmp_path))
    assert torch.equal(tiny(tokens), trained(tokens))


def test_file_with_two_adapted_submodules(tiny, tokens, rng, tmp_path):
    trained = copy.deepcopy(tiny)
    attach(trained.blocks[0], LoRAConfig(rank=2))
    attach(trained.blocks[1], LoRAConfig(rank=1))
    train_all(trained, rng)
    path, before = saved(checkpoint(trained), tmp_path), snapshot(tiny)
    try:
        load_adapter(tiny, path)
    except ValueError as error:
        refusal = str(error)
    else:
        assert torch.equal(tiny(tokens), trained(tokens))
        return
    assert "unpack" not in refusal
    assert_unchanged(tiny, before)


def test_metric_states_in_file_are_ignored(tiny, tokens, rng, tmp_path):
    tiny.metric = MeanMetric()
    tiny.metric.persistent(True)
    trained = trained_from(tiny, rng)
    content = checkpoint(trained)  # the callback keeps the states of metrics in the file
    content["state_dict"] |= {f"metric.{name}": value for name, value in trained.metric.state_dict().items()}
    assert set(content["state_dict"]) > set(KEYS)
    load_adapter(tiny, saved(content, tmp_path))
    assert torch.equal(tiny(tokens), trained(tokens))


def test_model_with_other_adapter_refuses_file(tiny, rng, tmp_path):
    path = saved(checkpoint(trained_from(tiny, rng)), tmp_path)
    attach(tiny, LoRAConfig(rank=3, target_modules=["q_proj"]))
    with raises_and_changes_nothing(tiny, ValueError, "rank: 3 -> 2"):
        load_adapter(tiny, path)


def other_rank(content: dict[str, Any]) -> None:
    content[RECORD_KEY]["adapters"][0]["config"]["rank"] = 3


def other_alpha(content: dict[str, Any]) -> None:
    content[RECORD_KEY]["adapters"][0]["config"]["alpha"] = 6.0


def other_targets(content: dict[str, Any]) -> None:
    content[RECORD_KEY]["adapters"][0]["config"]["target_modules"] = ["q_proj", "v_proj"]


def unknown_targets(content: dict[str, Any]) -> None:
    content[RECORD_KEY]["adapters"][0]["config"]["target_modules"] = ["q_porj"]


def unknown_option(content: dict[str, Any]) -> None:
    content[RECORD_KEY]["adapters"][0]["config"]["use_qlora"] = True


def other_root(content: dict[str, Any]) -> None:
    content[RECORD_KEY]["adapters"][0]["root"] = "network"


def newer_format(content: dict[str, Any]) -> None:
    content[RECORD_KEY]["format_version"] = 99


def newer_format_of_another_shape(content: dict[str, Any]) -> None:
    content[RECORD_KEY] = {"format_version": 99, "files": []}


def incomplete_record(content: dict[str, Any]) -> None:
    content[RECORD_KEY] = {"format_version": 1}


def tensor_missing(content: dict[str, Any]) -> None:
    del content["state_dict"]["head.bias"]


def tensor_unknown(content: dict[str, Any]) -> None:
    content["state_dict"]["tail.lora.A"] = torch.zeros(2, 2)


def tensor_of_another_shape(content: dict[str, Any]) -> None:
    content["state_dict"]["head.bias"] = torch.zeros(9)


def record_missing(content: dict[str, Any]) -> None:
    del content[RECORD_KEY]


def state_missing(content: dict[str, Any]) -> None:
    del content["state_dict"]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (other_rank, "rank: .*checkpoint 2, here 3"),
        (other_alpha, "scaling.*checkpoint 1.5, here 3"),
        (other_targets, "only on one side: .*embed"),
        (unknown_targets, "q_porj"),
        (unknown_option, "use_qlora"),
        (other_root, "network"),
        (newer_format, "99"),
        (newer_format_of_another_shape, "99"),
        (incomplete_record, "adapter.ckpt"),
        (tensor_missing, "missing from the state: head.bias"),
        (tensor_unknown, "unknown to the model: tail.lora.A"),
        (tensor_of_another_shape, r"head.bias: file \(9,\), model \(8,\)"),
        (record_missing, "holds the weights of an adapter, but not its options"),
        (state_missing, "no 'state_dict'"),
    ],
)
def test_unfitting_file_is_refused(damage, message: str, tiny, rng, tmp_path):
    content = checkpoint(trained_from(tiny, rng))
    damage(content)
    path = saved(content, tmp_path)
    with raises_and_changes_nothing(tiny, ValueError, message):
        load_adapter(tiny, path)
    attach(tiny, CONFIG)
    with raises_and_changes_nothing(tiny, ValueError):
        load_adapter(tiny, path)


def test_a_model_that_has_got_another_layer_can_leave_it_out(tmp_path):
    model, wider = nn.Sequential(layer := nn.Linear(8, 8)), nn.Sequential(copy.deepcopy(layer), nn.Linear(8, 8))
    attach(model, LoRAConfig(rank=2))
    path = saved(checkpoint(model), tmp_path)
    with raises_and_changes_nothing(
        wider, ValueError, "only on one side: 1. To leave these out.*exclude_modules.*init_from"
    ):
        load_adapter(wider, path)
    save_adapter(model, tmp_path / "exported")
    load_adapter(wider, tmp_path / "exported")
    assert list(lora_layers(wider)) == ["0"]


def test_file_for_other_model_is_refused(tiny, rng, tmp_path):
    path = saved(checkpoint(trained_from(tiny, rng)), tmp_path)
    wider = type(tiny)()
    wider.embed, wider.blocks[0]["q_proj"] = nn.Embedding(30, 16), nn.Linear(16, 24)
    with raises_and_changes_nothing(wider, ValueError, r"embed.lora.A: file \(2, 20\), model \(2, 30\)"):
        load_adapter(wider, path)


@pytest.mark.parametrize("share", [0.0, 0.3, 0.9, 0.999])
def test_truncated_file_is_refused_by_name(share: float, tiny, rng, tmp_path):
    path = saved(checkpoint(trained_from(tiny, rng)), tmp_path)
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    with raises_and_changes_nothing(tiny, ValueError, "adapter.ckpt' cannot be read as a Lightning checkpoint"):
        load_adapter(tiny, path)


@pytest.mark.parametrize(
    "content", [b"rank: 4\n", b"PK\x03\x04 but no archive", b"\x80\x02N.", b"\x00" * 64, "größer".encode("latin-1")]
)
def test_file_of_other_format_is_refused_by_name(content: bytes, tiny, tmp_path):
    path = tmp_path / "adapter.ckpt"
    path.write_bytes(content)
    with raises_and_changes_nothing(tiny, ValueError, "adapter.ckpt"):
        load_adapter(tiny, path)


def test_an_empty_path_is_refused(tiny):
    with raises_and_changes_nothing(tiny, ValueError, "best_model_path is when a ModelCheckpoint has kept no file"):
        load_adapter(tiny, "")


@pytest.mark.parametrize("content", [None, [1, 2], {"weight": torch.zeros(2)}, {"state_dict": [1]}, torch.zeros(2)])
def test_torch_file_without_state_dict_is_refused_by_name(content: object, tiny, tmp_path):
    with raises_and_changes_nothing(tiny, ValueError, "adapter.ckpt' is not a Lightning checkpoint"):
        load_adapter(tiny, saved(content, tmp_path))


def test_malicious_pickle_beside_an_adapter_is_not_run(tiny, rng, tmp_path):
    class Payload:
        def __reduce__(self) -> tuple[Any, tuple[str]]:
            return (Path.mkdir, (tmp_path / "run",))  # type: ignore[return-value]

    path = saved(checkpoint(trained_from(tiny, rng), extra=Payload()), tmp_path)
    load_adapter(tiny, path)
    assert lora_layers(tiny)
    assert not (tmp_path / "run").exists()


def test_missing_file_raises_file_not_found(tiny, tmp_path):
    with raises_and_changes_nothing(tiny, FileNotFoundError, "nowhere"):
        load_adapter(tiny, tmp_path / "nowhere.ckpt")


def test_folder_without_adapter_is_refused_by_name(tiny, tmp_path):
    with pytest.raises((ValueError, OSError), match=tmp_path.name):
        load_adapter(tiny, tmp_path)


# --- files and merged models


def test_merged_model_refuses_file(tiny, rng, tmp_path):
    trained = trained_from(tiny, rng)
    path = saved(checkpoint(trained), tmp_path)
    merge(trained)
    with raises_and_changes_nothing(trained, RuntimeError, "already merged into embed, blocks.0.q_proj"):
        load_adapter(trained, path)


def trained_again(model: nn.Module, rng: torch.Generator) -> nn.Module:
    """Return the merged model with a second adapter on top."""
    again = trained_from(model, rng)
    merge(again)
    attach(again, CONFIG)
    train_all(again, rng)
    return again


def test_adapter_of_merged_base_is_refused_by_plain_base(tiny, rng, tmp_path):
    path = saved(checkpoint(trained_again(tiny, rng)), tmp_path)
    with raises_and_changes_nothing(tiny, RuntimeError, "another adapter merged"):
        load_adapter(tiny, path)


def test_adapter_of_merged_base_loads_into_merged_base(tiny, tokens, rng, tmp_path):
    again = trained_again(tiny, rng)
    path, output = saved(checkpoint(again), tmp_path), again(tokens)
    for fresh in (True, False):
        base = copy.deepcopy(again)
        if fresh:
            detach(base)
        load_adapter(base, path)
        assert torch.equal(base(tokens), output)


# --- the record


def test_record_holds_plain_values(tiny, rng, tmp_path):
    model = trained_from(tiny, rng)
    record = describe(model)
    assert torch.load(saved(record, tmp_path), weights_only=True) == record
    [adapter] = record["adapters"]
    assert LoRAConfig.from_dict(adapter["config"]) == CONFIG
    assert (adapter["root"], adapter["seed"]) == ("", 0)
    layers = lora_layers(model)
    kinds = {name: "embedding" if name == "embed" else "linear" for name in layers}
    assert record["layers"] == {
        name: {
            "rank": 2,
            "scaling": 1.5,
            "weight": f"{name}.weight",
            "kind": kinds[name],
            "shape": [*layer.weight.shape],
        }
        for name, layer in layers.items()
    }
    assert record["merges"] == {}
    merge(model)
    assert describe(model)["merges"] == {"embed": 1, "blocks.0.q_proj": 1, "blocks.1.q_proj": 1}


def test_file_of_a_bare_adapter_state_names_the_functions_that_fit(tiny, tmp_path):
    attach(tiny, LoRAConfig(rank=2))
    torch.save(adapter_state_dict(tiny), tmp_path / "adapter.pt")
    with raises_and_changes_nothing(tiny, ValueError, r"load_adapter_state_dict\(module.*save_adapter\(module"):
        load_adapter(tiny, tmp_path / "adapter.pt")
