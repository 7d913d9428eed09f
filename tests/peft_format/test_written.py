"""Directories that PEFT wrote, with all kinds of options, load here and compute the same."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

from lightning_lora import load_adapter, lora_layers, save_adapter
from tests.contract import raises_and_changes_nothing
from tests.peft_format.models import (
    CLOSE,
    MODELS,
    QUIET,
    distance,
    in_peft,
    loaded,
    logits,
    peft,
    trained,
    trained_by_peft,
)

pytestmark = QUIET

WRITTEN: list[tuple[str, str, dict[str, Any]]] = [
    ("gpt2", "PEFT's own targets", {}),
    ("llama", "ends of names", {"target_modules": ["q_proj", "v_proj"]}),
    ("llama", "a regular expression", {"target_modules": r".*layers\.1\..*(gate|up)_proj"}),
    ("llama", "all-linear", {"target_modules": "all-linear"}),
    ("llama", "excluded modules", {"target_modules": ["q_proj", "o_proj"], "exclude_modules": r".*\.0\..*"}),
    ("llama", "one layer", {"target_modules": ["q_proj"], "layers_to_transform": 1}),
    (
        "llama",
        "layers by pattern",
        {"target_modules": ["q_proj"], "layers_to_transform": [0], "layers_pattern": "layers"},
    ),
    ("llama", "rsLoRA", {"target_modules": ["q_proj"], "use_rslora": True}),
    ("llama", "DoRA", {"target_modules": ["q_proj", "down_proj"], "use_dora": True}),
    (
        "llama",
        "patterns",
        {
            "target_modules": ["q_proj", "k_proj", "up_proj"],
            "rank_pattern": {r"layers\.1\..*": 3, "q_proj": 1},
            "alpha_pattern": {"k_proj": 11, r"model.layers.[01].mlp.up_proj": 0.5},
        },
    ),
    (
        "llama",
        "patterns and rsLoRA",
        {"target_modules": ["q_proj"], "rank_pattern": {"0.self_attn.q_proj": 3}, "use_rslora": True},
    ),
    ("gpt2", "biases of the adapted layers", {"target_modules": ["c_attn"], "bias": "lora_only"}),
    ("gpt2", "all biases", {"target_modules": ["c_attn"], "bias": "all"}),
    (
        "bert",
        "all biases beside a new head",
        {"target_modules": ["query"], "bias": "all", "modules_to_save": ["classifier"]},
    ),
    ("bert", "bias of B", {"target_modules": ["query", "value"], "lora_bias": True}),
    ("bert", "a classifier's task", {"target_modules": ["query"], "task_type": "SEQ_CLS"}),
    ("llama", "new head", {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}),
    ("llama", "embedding and head", {"target_modules": ["embed_tokens", "lm_head"]}),
    ("gpt2", "embedding", {"target_modules": ["wte", "c_fc"]}),
    ("tied_llama", "tied embedding", {"target_modules": ["embed_tokens", "q_proj"]}),
    ("vit", "convolution", {"target_modules": ["projection", "q_proj"]}),
    ("vit", "convolution with DoRA", {"target_modules": ["projection"], "use_dora": True}),
    ("t5", "encoder and decoder", {"target_modules": ["q", "wo"], "task_type": "SEQ_2_SEQ_LM"}),
    (
        "mixtral",
        "experts",
        {"target_modules": ["q_proj"], "target_parameters": ["experts.gate_up_proj", "experts.down_proj"]},
    ),
    (
        "mixtral",
        "experts of one layer",
        {"target_modules": [], "target_parameters": ["layers.1.mlp.experts.down_proj"]},
    ),
    ("mixtral", "the router as a parameter", {"target_modules": [], "target_parameters": ["gate.weight"]}),
    ("tied_llama", "tokens", {"target_modules": ["q_proj"], "trainable_token_indices": [9, 2, 17]}),
    ("llama", "tokens by name", {"target_modules": ["q_proj"], "trainable_token_indices": {"embed_tokens": [4, 3]}}),
    ("llama", "rank above the weight's", {"target_modules": ["q_proj", "k_proj"], "r": 40}),
    ("mixtral", "rank above the experts'", {"target_modules": [], "target_parameters": ["gate_up_proj"], "r": 20}),
    ("llama", "orthogonal start", {"target_modules": ["q_proj"], "init_lora_weights": "orthogonal"}),
    ("llama", "random start", {"target_modules": ["q_proj"], "init_lora_weights": False}),
]
each_directory = pytest.mark.parametrize(
    ("model", "name", "options"), WRITTEN, ids=[f"{model}: {name}" for model, name, _ in WRITTEN]
)


@each_directory
@pytest.mark.parametrize("pickled", [False, True], ids=["safetensors", "bin"])
def test_directory_written_by_peft_round_trips(
    model: str, name: str, options: dict[str, Any], pickled: bool, tmp_path: Path
) -> None:
    build = MODELS[model]
    theirs = trained_by_peft(build(), **options)
    expected = logits(theirs)
    assert distance(expected, logits(build())) > 100 * CLOSE
    theirs.save_pretrained(tmp_path / "theirs", safe_serialization=not pickled)
    ours = loaded(build(), tmp_path / "theirs")
    assert distance(logits(ours), expected) <= CLOSE
    if not pickled:
        save_adapter(ours, tmp_path / "ours")
        assert distance(logits(in_peft(build(), tmp_path / "ours")), expected) <= CLOSE


def written(directory: Path, model: str = "llama", **options: Any) -> Path:
    trained_by_peft(MODELS[model](), **({"target_modules": ["q_proj"]} | options)).save_pretrained(directory)
    return directory


@pytest.mark.parametrize("start", ["pissa", "olora", "pissa_niter_2"])
def test_init_that_changes_base_is_refused(start: str, tmp_path: Path) -> None:
    model = MODELS["llama"]()
    with raises_and_changes_nothing(model, ValueError, f"init_lora_weights='{start}' changes the base model"):
        load_adapter(model, written(tmp_path, init_lora_weights=start))


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("layer_replication", [[0, 1], [0, 2]]),
        ("use_qalora", True),
        ("alora_invocation_tokens", [1, 2]),
        ("ensure_weight_tying", True),
        ("arrow_config", {"top_k": 1}),
        ("kasa_config", {"beta": 0.1}),
        ("use_bdlora", {"nblocks": 2}),
        ("peft_type", "VERA"),
        ("peft_type", "ADALORA"),
        ("peft_type", None),
    ],
)
def test_unsupported_method_is_refused(option: str, value: object, tmp_path: Path) -> None:
    edited(written(tmp_path), **{option: value})
    model = MODELS["llama"]()
    with raises_and_changes_nothing(model, ValueError, option):
        load_adapter(model, tmp_path)


def edited(directory: Path, **changes: object) -> None:
    path = directory / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_unknown_option_warns(tmp_path: Path) -> None:
    edited(written(tmp_path), use_something_new=True, unused_novelty=None)
    with pytest.warns(UserWarning, match="unknown options, which are ignored: use_something_new"):
        load_adapter(MODELS["llama"](), tmp_path)


def test_grown_vocabulary_is_refused(tmp_path: Path) -> None:
    grown = MODELS["llama"]()
    grown.resize_token_embeddings(40)
    trained_by_peft(grown, target_modules=["q_proj"]).save_pretrained(tmp_path, save_embedding_layers=True)
    model = MODELS["llama"]()
    with raises_and_changes_nothing(model, ValueError, r"embed_tokens.weight: file \(40, 16\) float32, expected"):
        load_adapter(model, tmp_path)


def test_embeddings_saved_by_peft_must_match_base(tmp_path: Path) -> None:
    written(tmp_path, target_modules=["embed_tokens"])
    load_adapter(MODELS["llama"](), tmp_path)
    other = MODELS["llama"]()
    with torch.no_grad():
        other.model.embed_tokens.weight[3, 4] += 1
    with raises_and_changes_nothing(other, ValueError, "frozen tensor has different values"):
        load_adapter(other, tmp_path)


def test_tied_modules_with_different_values_are_refused(tmp_path: Path) -> None:
    trained_by_peft(
        MODELS["tied_llama"](), target_modules=["q_proj"], modules_to_save=["embed_tokens", "lm_head"]
    ).save_pretrained(tmp_path)
    model = MODELS["tied_llama"]()
    with raises_and_changes_nothing(model, ValueError, "is tied to a tensor"):
        load_adapter(model, tmp_path)


def test_attention_dropout_is_dropped_with_warning(tmp_path: Path) -> None:
    class Attends(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.attn = nn.MultiheadAttention(8, 2, batch_first=True)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.attn(x, x, x, need_weights=False)[0]

    theirs = peft.get_peft_model(Attends(), peft.LoraConfig(r=2, target_modules=["attn"], lora_dropout=0.1)).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.2)
        x = torch.randn(1, 4, 8)
        expected = theirs(x)
        theirs.save_pretrained(tmp_path)
        model = Attends().eval()
        with pytest.warns(UserWarning, match="lora_dropout=0.1 is left out"):
            load_adapter(model, tmp_path)
        assert distance(model(x), expected) <= CLOSE
    assert sorted(lora_layers(model)) == ["attn", "attn.out_proj"]


def test_a_pruned_factor_is_written_as_it_computes(tmp_path: Path) -> None:
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(8, 6))
    model = trained(copy.deepcopy(base), target_modules=["0"])
    prune.l1_unstructured(model[0].lora, "A", 0.5)
    x = torch.randn(4, 8)
    save_adapter(model, tmp_path / "adapter")
    load_adapter(base, tmp_path / "adapter")
    assert torch.equal(base(x), model(x))
    assert int((base[0].lora.A == 0).sum()) == base[0].lora.A.numel() // 2
