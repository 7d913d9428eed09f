"""PEFT changes names of transformers models while it loads an adapter; our files are spelled so that they fit."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from lightning_lora import LoRAConfig, attach, load_adapter, preflight, save_adapter
from lightning_lora.layers import weight_readers
from lightning_lora.peft_format.names import expert_names, paths_in_file, paths_in_model
from tests.peft_format.models import (
    CLOSE,
    CONVERTED,
    MODELS,
    QUIET,
    VOCABULARY,
    distance,
    in_peft,
    loaded,
    logits,
    of_type,
    peft,
    trained,
    transformers,
)

conversion = pytest.importorskip("transformers.conversion_mapping")
WeightRenaming = pytest.importorskip("transformers.core_model_loading").WeightRenaming
pytestmark = QUIET
LINEAR = ["q_proj", "v_proj", "gate_proj", "up_proj", "down_proj"]
EVERYTHING: dict[str, Any] = {
    "target_modules": "all-linear",
    "target_parameters": ["gate_up_proj", "experts.down_proj"],
}
INKLING = {
    **{"vocab_size": VOCABULARY, "unpadded_vocab_size": VOCABULARY, "hidden_size": 16, "num_hidden_layers": 2},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "eos_token_id": 2, "pad_token_id": 0},
    **{"swa_num_attention_heads": 4, "swa_num_key_value_heads": 2, "swa_head_dim": 8, "d_rel": 4, "rel_extent": 8},
    **{"moe_intermediate_size": 8, "num_experts_per_tok": 2, "n_routed_experts": 4},
    "layer_types": ["hybrid_sliding", "hybrid"],
}
MAMBA = {"vocab_size": VOCABULARY, "hidden_size": 16, "state_size": 4, "num_hidden_layers": 1, "time_step_rank": 4}


@pytest.mark.parametrize("model_type", CONVERTED)
def test_adapter_of_everything_round_trips_through_peft(model_type: str, tmp_path: Path) -> None:
    """Attention, dense layers, shared experts and stacks of experts."""
    ours = trained(of_type(model_type), **EVERYTHING)
    expected = logits(ours)
    assert distance(expected, logits(of_type(model_type))) > 100 * CLOSE
    assert preflight(ours).peft_accepts
    save_adapter(ours, tmp_path)
    assert distance(logits(in_peft(of_type(model_type), tmp_path)), expected) <= CLOSE
    assert distance(logits(loaded(of_type(model_type), tmp_path)), expected) <= CLOSE


@pytest.mark.parametrize("uniform_rank", [False, True])
def test_ranks_and_scalings_of_dense_layers_reach_peft(uniform_rank: bool, tmp_path: Path) -> None:
    patterns = {"rank_pattern": {"0.mlp.up_proj": 3, "q_proj": 1}, "alpha_pattern": {"shared_experts.down_proj": 7}}
    ours = trained(of_type("glm4_moe"), target_modules=LINEAR, **patterns)
    save_adapter(ours, tmp_path, uniform_rank=uniform_rank)
    assert distance(logits(in_peft(of_type("glm4_moe"), tmp_path)), logits(ours)) <= CLOSE
    assert distance(logits(loaded(of_type("glm4_moe"), tmp_path)), logits(ours)) <= CLOSE


@pytest.mark.parametrize("model_type", ["glm4_moe", "laguna"])
def test_model_adapted_alike_loads_the_files_of_dense_layers(model_type: str, tmp_path: Path) -> None:
    ours = trained(of_type(model_type), target_modules=LINEAR)
    save_adapter(ours, tmp_path)
    again = of_type(model_type)
    attach(again, LoRAConfig(rank=2, alpha=3.0, target_modules=LINEAR))
    load_adapter(again, tmp_path)
    assert distance(logits(again), logits(ours)) <= CLOSE


def test_dropout_of_layers_that_peft_adapts_as_parameters_is_left_out_with_a_warning(tmp_path: Path) -> None:
    ours = trained(of_type("glm4_moe"), target_modules=LINEAR, dropout=0.5)
    with pytest.warns(UserWarning, match=r"The files say lora_dropout=0, not 0\.5: PEFT adapts model\.layers\.0\.mlp"):
        save_adapter(ours, tmp_path)
    assert distance(logits(in_peft(of_type("glm4_moe"), tmp_path)), logits(ours.eval())) <= CLOSE


@pytest.mark.parametrize("option", ["use_dora", "lora_bias"])
def test_variants_of_layers_that_peft_adapts_as_parameters_are_refused(option: str, tmp_path: Path) -> None:
    ours = trained(of_type("glm4_moe"), target_modules=LINEAR, **{option: True})
    reasons = {row.name.rpartition(".")[2]: row.peft for row in preflight(ours).rows}
    assert {name for name, reason in reasons.items() if reason == "yes"} == {"q_proj", "v_proj"}
    assert "while PEFT loads adapters of glm4_moe models, it takes 'up_proj' in target_modules" in reasons["up_proj"]
    with pytest.raises(ValueError, match=r"model\.layers\.0\.mlp\.up_proj: while PEFT loads"):
        save_adapter(ours, tmp_path / "adapter")


@pytest.mark.parametrize(
    ("name", "layer", "reason"),
    [
        ("up_proj", torch.nn.Embedding(4, 4), "it takes 'up_proj' in target_modules for experts"),
        (
            "draft",
            MODELS["llama"](),
            "matches target_modules by the ends of names, and 'draft.model.layers.0.self_attn",
        ),
    ],
)
def test_layers_that_no_option_names_alone_are_refused(name: str, layer: torch.nn.Module, reason: str) -> None:
    model = of_type("glm4_moe")
    model.add_module(name, layer)
    targets = ["up_proj" if name == "up_proj" else "model.layers.0.self_attn.q_proj"]
    ours = trained(model, target_modules=targets, exclude_modules=["draft"] if name == "draft" else [])
    assert any(reason in row.peft for row in preflight(ours).rows)


@pytest.mark.parametrize("model_type", ["falcon_mamba", "mamba"])
def test_layers_that_peft_refuses_in_mamba_models_are_refused(model_type: str, tmp_path: Path) -> None:
    ours = trained(of_type(model_type, **MAMBA), target_modules=["in_proj", "out_proj"])
    reasons = {row.name.rpartition(".")[2]: row.peft for row in preflight(ours).rows}
    assert reasons["in_proj"] == "yes"
    assert "Mixer, reads its weight" in reasons["out_proj"]
    with pytest.raises(ValueError, match="leave it out with exclude_modules, or merge the adapter"):
        save_adapter(ours, tmp_path / "adapter")
    with pytest.raises(ValueError, match="Module 'out_proj' is incompatible with Mamba-based models"):
        peft.get_peft_model(of_type(model_type, **MAMBA), peft.LoraConfig(target_modules=["out_proj"]))


def test_other_layers_of_mamba_models_load_in_peft(tmp_path: Path) -> None:
    ours = trained(of_type("falcon_mamba", **MAMBA), target_modules=["in_proj"])
    save_adapter(ours, tmp_path)
    assert distance(logits(in_peft(of_type("falcon_mamba", **MAMBA), tmp_path)), logits(ours)) <= CLOSE


def test_layer_is_written_under_its_name_in_the_checkpoints(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """As in Unlimited OCR, whose smallest model is larger than this one."""
    conversion.get_checkpoint_conversion_mapping("bert")  # makes the cache
    renamings = [WeightRenaming(r"^trunk\.", "encoder."), WeightRenaming(r"(^|bert\.)encoder\.", r"\1bert.encoder.")]
    monkeypatch.setitem(conversion._checkpoint_conversion_mapping_cache, "bert", renamings)
    ours = trained(MODELS["bert"](), target_modules=["query", "classifier"])
    save_adapter(ours, tmp_path)
    keys = {key.removeprefix("base_model.model.") for key in load_file(tmp_path / "adapter_model.safetensors")}
    assert {"trunk.layer.0.attention.self.query.lora_A.weight", "classifier.lora_B.weight"} <= keys
    assert distance(logits(in_peft(MODELS["bert"](), tmp_path)), logits(ours)) <= CLOSE
    assert distance(logits(loaded(MODELS["bert"](), tmp_path)), logits(ours)) <= CLOSE


def test_renamed_layer_without_a_name_that_loads_is_refused(tmp_path: Path) -> None:
    ours = trained(of_type("inkling2_text", **INKLING), target_modules=["o_proj", "weight_proj"])
    with pytest.raises(
        ValueError, match=r"PEFT loads adapters of inkling2_text models, it renames this layer"
    ) as caught:
        save_adapter(ours, tmp_path / "adapter")
    refused = [line.split(":")[0] for line in str(caught.value).splitlines()[1:]]
    assert refused == [f"  - model.layers.1.self_attn.{key}_sconv.weight_proj" for key in "kv"]


# --- PEFT's own code, which these tables and functions follow


def _model(model_type: str) -> Any:
    return SimpleNamespace(config=SimpleNamespace(model_type=model_type))


def test_names_of_experts_are_those_that_peft_moves() -> None:
    from peft.utils.transformers_weight_conversion import _MOE_TARGET_MODULE_MAPPING, _convert_peft_config_moe

    names = {"q_proj", "out_proj", "fc1"}.union(*_MOE_TARGET_MODULE_MAPPING.values())
    moved = {}
    for model_type in transformers.CONFIG_MAPPING:
        config = peft.LoraConfig(target_modules=sorted(names))
        _convert_peft_config_moe(config, _model(model_type))
        moved[model_type] = names - config.target_modules
    assert {kind: set(expert_names(_model(kind))) for kind in moved} == moved
    assert moved["glm4_moe"]


def test_layers_that_peft_refuses_are_read_by_their_parents() -> None:
    from peft.tuners.tuners_utils import _check_lora_target_modules_mamba

    def is_refused(model_type: str, name: str) -> bool:
        try:
            _check_lora_target_modules_mamba(peft.LoraConfig(), _model(model_type), name)
        except ValueError:
            return True
        return False

    refused = {kind for kind in transformers.CONFIG_MAPPING if is_refused(kind, "out_proj")}
    assert "mamba2" in refused
    for kind in refused:
        with torch.device("meta"):
            model = transformers.AutoModelForCausalLM.from_config(transformers.CONFIG_MAPPING[kind]())
        readers = weight_readers(list(model.modules()))
        named = {name: part for name, part in model.named_modules() if is_refused(kind, name.rpartition(".")[2])}
        assert len(named) >= 2
        assert all(id(part) in readers for part in named.values()), kind


def _loaded_by_peft(model: torch.nn.Module, paths: list[str]) -> dict[str, str]:
    """Return where PEFT's own code loads the factors of these paths."""
    from peft.utils.transformers_weight_conversion import convert_peft_adapter_state_dict_for_transformers

    start, end, found = "base_model.model.", ".lora_A.weight", {}
    for path in paths:
        key = {f"{start}{path}{end}": torch.zeros(1)}
        [loaded] = convert_peft_adapter_state_dict_for_transformers(model, peft.LoraConfig(), key)
        found[path] = loaded.removeprefix(start).removesuffix(end)
    return found


@pytest.mark.parametrize(("model_type", "sizes"), [("laguna", {}), ("qwen3_next", {}), ("inkling2_text", INKLING)])
def test_paths_are_renamed_as_peft_renames_them(model_type: str, sizes: dict[str, Any]) -> None:
    model = of_type(model_type, **sizes)
    paths = [name for name, part in model.named_modules() if name and "experts." not in name]
    assert paths_in_model(model, paths) == _loaded_by_peft(model, paths)
    spelled = {path: spelling for path, spelling in paths_in_file(model, paths).items() if spelling}
    assert _loaded_by_peft(model, list(spelled.values())) == {spelling: path for path, spelling in spelled.items()}


def test_renaming_that_only_removes_a_beginning_is_taken_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """PEFT's own prefix counts as part of the name, and it ends in ``model.``."""
    conversion.get_checkpoint_conversion_mapping("llama")
    renaming = WeightRenaming(r"(^|model\.)layers\.", r"\1model.layers.")
    monkeypatch.setitem(conversion._checkpoint_conversion_mapping_cache, "llama", [renaming])
    paths = ["model.layers.0.self_attn.q_proj", "layers.0.self_attn.q_proj", "lm_head"]
    assert paths_in_model(MODELS["llama"](), paths) == _loaded_by_peft(MODELS["llama"](), paths)
