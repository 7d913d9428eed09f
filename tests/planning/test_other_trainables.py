"""Modules that train in full; ``test_biases`` and ``layers/test_embedding`` cover the others."""

from __future__ import annotations

import copy

import torch
from torch import nn

from lightning_lora import LoRAConfig, adapter_state_dict, attach, load_adapter, lora_layers
from lightning_lora.state import describe
from lightning_lora.storage.checkpoint import RECORD_KEY
from tests.contract import raises_and_changes_nothing, train_all
from tests.planning.models import TiedModel, report


def test_saved_modules_get_no_adapter(tiny):
    found = report(tiny, target_modules=["q_proj", "head"], modules_to_save=["head", "blocks.1"])
    assert [layer.name for layer in found.layers] == ["blocks.0.q_proj"]
    assert found.left_out == {"blocks.1.q_proj": "in modules_to_save", "head": "in modules_to_save"}
    assert found.saved == {"blocks.1": 16 * 16 * 2 + 16, "head": 16 * 8 + 8}


def test_named_saved_module_without_parameters_is_rejected(tiny):
    with raises_and_changes_nothing(tiny, ValueError, "modules_to_save: 'blocks.0.act' is a GELU with no parameters"):
        report(tiny, modules_to_save=["act"])


def test_saved_name_skips_modules_without_parameters_of_the_same_name(tiny):
    tiny.body = nn.ModuleDict({"head": nn.Identity()})  # as of a backbone whose own head was taken off
    found = report(tiny, target_modules=["q_proj"], modules_to_save=["head"])
    assert found.saved == {"head": 16 * 8 + 8}


def test_saving_glob_skips_modules_without_parameters(tiny):
    tiny.head = nn.Sequential(nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 8))
    report(tiny, modules_to_save=["head.*"])
    assert all(p.requires_grad for p in tiny.head.parameters())


def test_saving_glob_without_any_parameters_is_rejected(tiny):
    with raises_and_changes_nothing(tiny, ValueError, r"modules_to_save.*'\*.act'"):
        report(tiny, modules_to_save=["*.act"])


def test_parameter_of_two_saved_modules_is_counted_once(tiny):
    tiny.head = nn.Sequential(nn.Linear(16, 8), nn.Linear(8, 8))
    found = report(tiny, modules_to_save=["head", "head.0"])
    assert found.trainable_parameters == sum(p.numel() for p in tiny.parameters() if p.requires_grad)


def test_saved_module_tied_elsewhere_is_rejected():
    model = TiedModel()
    with raises_and_changes_nothing(model, ValueError, r"modules_to_save: 'head.weight' is tied to \['embed.weight'\]"):
        report(model, modules_to_save=["head"])


def test_both_sides_of_a_tie_train_in_full():
    model = TiedModel()
    report(model, modules_to_save=["head", "embed"])
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {"embed.weight", "mix.lora.A", "mix.lora.B"}


# --- modules_to_save="auto"


class Classifier(nn.Module):
    """Shaped as a transformers model for a task: a base model under its prefix, and heads beside it."""

    base_model_prefix = "encoder"

    def __init__(self, scores: int = 8) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
        self.dropout, self.classifier = nn.Dropout(), nn.Linear(8, scores)
        self.words = nn.Linear(8, 32)

    def get_output_embeddings(self) -> nn.Module:
        return self.words


def test_auto_saves_heads_of_task_models_and_layers_too_small_for_the_rank():
    model = nn.ModuleDict({"model": Classifier(), "value": nn.Linear(8, 1), "conv": nn.Conv1d(1, 1, 1)})
    config = LoRAConfig(rank=2, modules_to_save="auto")
    found = attach(model, config)
    assert found.saved == {"model.classifier": 72, "value": 9}
    assert list(lora_layers(model)) == ["model.encoder.0", "model.encoder.1"]
    assert model["value"].weight.requires_grad
    assert "value (in full)" in str(found)
    assert attach(model, config).saved == found.saved


def test_auto_saves_what_is_too_small_for_the_usual_rank_if_data_decide_the_ranks():
    model, usual = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 16), nn.Linear(16, 15)), LoRAConfig().rank
    options = {"rank": "auto", "rank_budget": "10%", "init": "eva"}
    assert usual == 16
    assert [*report(model, modules_to_save="auto", **options).saved] == ["2"]


def test_auto_leaves_what_is_excluded_or_tied_and_may_find_nothing():
    def saved(model: nn.Module, **options: object) -> list[str]:
        return [*report(model, modules_to_save="auto", **options).saved]

    assert saved(Classifier(1), exclude_modules=["classifier"]) == []
    assert saved(nn.Sequential(nn.Linear(8, 8))) == []
    assert saved(TiedModel(), rank=17, rank_pattern={"mix": 2}) == []
    assert saved(nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 3)), rank=4, rank_pattern={"1": 2}) == []


def test_auto_is_recorded_as_names_and_loads_into_a_new_process(tmp_path, rng):
    model, x = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 1)), torch.randn(3, 8, generator=rng)
    base = copy.deepcopy(model)
    attach(model, LoRAConfig(rank=2, modules_to_save="auto"))
    train_all(model, rng)
    torch.nn.init.normal_(model[1].weight, generator=rng)
    record = describe(model)
    assert record["adapters"][0]["config"]["modules_to_save"] == ["1"]
    torch.save({"state_dict": adapter_state_dict(model), RECORD_KEY: record}, tmp_path / "last.ckpt")
    load_adapter(base, tmp_path / "last.ckpt")
    assert torch.equal(base(x), model(x))
    load_adapter(model, tmp_path / "last.ckpt")  # into the model that was attached with "auto"
