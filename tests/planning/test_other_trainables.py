"""Modules that train in full; ``test_biases`` and ``layers/test_embedding`` cover the others."""

from __future__ import annotations

from torch import nn

from tests.contract import raises_and_changes_nothing
from tests.planning.models import TiedModel, report


def test_saved_modules_get_no_adapter(tiny):
    found = report(tiny, target_modules=["q_proj", "head"], modules_to_save=["head", "blocks.1"])
    assert [layer.name for layer in found.layers] == ["blocks.0.q_proj"]
    assert found.left_out == {"blocks.1.q_proj": "in modules_to_save", "head": "in modules_to_save"}
    assert found.saved == {"blocks.1": 16 * 16 * 2 + 16, "head": 16 * 8 + 8}


def test_named_saved_module_without_parameters_is_rejected(tiny):
    with raises_and_changes_nothing(tiny, ValueError, "modules_to_save: 'blocks.0.act' is a GELU with no parameters"):
        report(tiny, modules_to_save=["act"])


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
