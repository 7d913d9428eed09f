"""Adapters of whole models travel: from here to PEFT and back, with the same logits at every stop."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from lightning_lora import LoRACallback, adapter_state_dict, load_adapter, lora_layers, save_adapter
from tests.peft_format.models import (
    CLOSE,
    MODELS,
    QUIET,
    VOCABULARY,
    distance,
    distilbert,
    in_peft,
    loaded,
    logits,
    peft,
    trained,
)
from tests.toys import trainer

pytestmark = QUIET

EVERYWHERE: dict[str, dict[str, Any]] = {
    "plain": {},
    "rsLoRA": {"use_rslora": True},
    "DoRA": {"use_dora": True},
    "dropout": {"dropout": 0.1},
}
ATTENTION = {
    "gpt2": ["c_attn"],
    "llama": ["q_proj", "v_proj"],
    "tied_llama": ["q_proj"],
    "bert": ["query", "value"],
    "t5": ["q", "v"],
    "vit": ["q_proj", "v_proj"],
    "mixtral": ["q_proj"],
}
EMBEDDING = {
    "gpt2": "transformer.wte",
    "llama": "model.embed_tokens",
    "tied_llama": "model.embed_tokens",
    "bert": "bert.embeddings.word_embeddings",
    "mixtral": "model.embed_tokens",
}
SPECIAL: list[tuple[str, str, dict[str, Any]]] = [
    ("gpt2", "patterns", {"rank_pattern": {"c_proj": 3, "h.0.mlp.c_fc": 1}, "alpha_pattern": {"1.*": 5.5}}),
    ("llama", "patterns", {"rank_pattern": {"q_proj": 1}, "alpha_pattern": {"v_proj": 7}, "use_rslora": True}),
    ("gpt2", "slices", {"target_slices": {"c_attn": {"q": "0:16", "v": "32:48"}}, "target_modules": ["c_attn"]}),
    (
        "gpt2",
        "slices of other scalings",
        {
            "target_slices": {"c_attn": {"q": "0:16", "v": "32:48"}},
            "target_modules": ["c_attn"],
            "rank_pattern": {"c_attn.q": 3},
            "alpha_pattern": {"c_attn.v": 9.5},
        },
    ),
    (
        "gpt2",
        "slices with DoRA",
        {"target_slices": {"c_attn": {"v": "32:48"}}, "target_modules": ["c_attn"], "use_dora": True},
    ),
    ("gpt2", "biases of the adapted layers", {"bias": "lora_only"}),
    ("gpt2", "all biases", {"bias": "all"}),
    ("bert", "all biases beside a new head", {"bias": "all", "modules_to_save": ["classifier"]}),
    ("gpt2", "bias of B", {"lora_bias": True}),
    ("bert", "new head", {"modules_to_save": ["classifier"]}),
    ("vit", "convolution", {"target_modules": ["projection"]}),
    ("vit", "convolution with DoRA", {"target_modules": ["projection"], "use_dora": True}),
    ("llama", "output head", {"target_modules": ["lm_head", "q_proj"]}),
    ("tied_llama", "untied head", {"target_modules": ["lm_head", "q_proj"], "untie_weights": True}),
    ("tied_llama", "untied embedding", {"target_modules": ["embed_tokens"], "untie_weights": True}),
    ("tied_llama", "tokens of tied embeddings", {"trainable_token_indices": [3, 1, 30], "target_modules": ["q_proj"]}),
    ("llama", "tokens", {"trainable_token_indices": {"embed_tokens": [30, 2]}}),
    ("gpt2", "tokens of tied embeddings", {"trainable_token_indices": [3, 1, 30]}),
    ("mixtral", "experts", {"target_parameters": ["gate_up_proj", "down_proj"], "target_modules": ["q_proj"]}),
    ("mixtral", "one parameter of the experts", {"target_parameters": ["down_proj"], "target_modules": []}),
    (
        "mixtral",
        "experts with patterns",
        {
            "target_parameters": ["gate_up_proj", "down_proj", "gate.weight"],
            "target_modules": [],
            "rank_pattern": {"down_proj": 3},
            "alpha_pattern": {"0.mlp.experts.gate_up_proj": 7},
        },
    ),
]
CASES = [
    *(
        (model, name, {"target_modules": ATTENTION[model]} | options)
        for model in MODELS
        for name, options in EVERYWHERE.items()
    ),
    *((model, "all-linear", {"target_modules": "all-linear"}) for model in MODELS),
    *((model, "embedding", {"target_modules": [name], "untie_weights": True}) for model, name in EMBEDDING.items()),
    *(
        (model, "embedding with DoRA", {"target_modules": [name], "use_dora": True, "untie_weights": True})
        for model, name in EMBEDDING.items()
    ),
    *SPECIAL,
]


@pytest.mark.parametrize("saved", [["pre_classifier", "classifier"], ["classifier"]], ids=["both", "one"])
@pytest.mark.filterwarnings("ignore:The files also hold pre_classifier, with the base's values")
def test_heads_with_the_same_ending_round_trip_through_peft(saved: list[str], tmp_path: Path) -> None:
    ours = trained(distilbert(), target_modules=["q_lin"], modules_to_save=saved)
    expected = logits(ours)
    save_adapter(ours, tmp_path / "ours")
    theirs = in_peft(distilbert(), tmp_path / "ours")
    assert theirs.peft_config["default"].modules_to_save == ["classifier", "pre_classifier"]
    assert distance(logits(theirs), expected) <= CLOSE
    theirs.save_pretrained(tmp_path / "theirs")
    for directory in ("ours", "theirs"):
        again = loaded(distilbert(), tmp_path / directory)
        assert distance(logits(again), expected) <= CLOSE
        save_adapter(again, tmp_path / f"{directory} again")  # what was loaded can be saved


def test_auto_class_of_peft_loads_a_directory(tmp_path: Path) -> None:
    llama = MODELS["llama"]
    llama().save_pretrained(tmp_path / "base")
    ours = trained(llama(), target_modules=["q_proj"])
    save_adapter(ours, tmp_path / "any", base_model_name_or_path=str(tmp_path / "base"))
    save_adapter(ours, tmp_path / "lm", base_model_name_or_path=str(tmp_path / "base"), task_type="CAUSAL_LM")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("peft.auto.check_file_exists_on_hf_hub", lambda **_: False)
        for kind, name in (
            ("AutoPeftModel", "any"),
            ("AutoPeftModelForCausalLM", "any"),
            ("AutoPeftModelForCausalLM", "lm"),
        ):
            theirs = getattr(peft, kind).from_pretrained(tmp_path / name)
            assert distance(logits(theirs.eval()), logits(ours)) <= CLOSE


def test_task_for_which_peft_would_skip_an_adapter_is_refused(tmp_path: Path) -> None:
    ours = trained(distilbert(), target_modules=["q_lin", "classifier"])
    with pytest.raises(ValueError, match=r"PEFT trains modules named classifier and score in full.*of classifier"):
        save_adapter(ours, tmp_path, task_type="SEQ_CLS")


def test_frozen_head_that_joins_the_file_is_reported(tmp_path: Path) -> None:
    ours = trained(distilbert(), target_modules=["q_lin"], modules_to_save=["classifier"])
    with pytest.warns(UserWarning, match="also hold pre_classifier, with the base's values"):
        save_adapter(ours, tmp_path)


@pytest.mark.parametrize(("model", "name", "options"), CASES, ids=[f"{model}: {name}" for model, name, _ in CASES])
def test_adapter_round_trips_through_peft(model: str, name: str, options: dict[str, Any], tmp_path: Path) -> None:
    build = MODELS[model]
    base, ours = logits(build()), trained(build(), **options)
    expected = logits(ours)
    assert distance(expected, base) > 100 * CLOSE
    save_adapter(ours, tmp_path / "ours")
    theirs = in_peft(build(), tmp_path / "ours")
    assert distance(logits(theirs), expected) <= CLOSE
    assert distance(logits(loaded(build(), tmp_path / "ours")), expected) <= CLOSE
    theirs.save_pretrained(tmp_path / "theirs")
    assert distance(logits(loaded(build(), tmp_path / "theirs")), expected) <= CLOSE
    save_adapter(ours, tmp_path / "uniform", uniform_rank=True)
    assert distance(logits(loaded(build(), tmp_path / "uniform")), expected) <= CLOSE
    assert distance(logits(in_peft(build(), tmp_path / "uniform")), expected) <= CLOSE


class Fits(LightningModule):
    """A language model as users hold it."""

    def __init__(self) -> None:
        super().__init__()
        self.model = MODELS["llama"]().train()  # as if it came from a file, it is in evaluation mode

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return self.model(input_ids=batch[0], labels=batch[0]).loss

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


def test_adapter_of_fitted_model_loads_in_peft(tmp_path: Path) -> None:
    module, data = Fits(), TensorDataset(torch.randint(VOCABULARY, (16, 7)))
    trainer(LoRACallback(rank=2, dropout=0.1), max_steps=20, max_epochs=-1).fit(module, DataLoader(data, batch_size=8))
    expected = logits(module.model.eval())
    assert distance(expected, logits(MODELS["llama"]())) > 100 * CLOSE
    save_adapter(module, tmp_path)
    theirs = peft.PeftModel.from_pretrained(MODELS["llama"](), tmp_path).eval()
    assert distance(logits(theirs), expected) <= CLOSE
    fresh = Fits()
    load_adapter(fresh, tmp_path)
    assert distance(logits(fresh.model.eval()), expected) <= CLOSE


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_factors_keep_their_precision(dtype: torch.dtype, tmp_path: Path) -> None:
    ours = trained(MODELS["llama"]().to(dtype))
    save_adapter(ours, tmp_path / "ours")
    theirs = in_peft(MODELS["llama"]().to(dtype), tmp_path / "ours")
    theirs.save_pretrained(tmp_path / "theirs")
    for name in ("ours", "theirs"):
        back = MODELS["llama"]().to(dtype)
        load_adapter(back, tmp_path / name)
        assert all(
            torch.equal(mine, its) or (name == "theirs" and dtype == torch.float64 and distance(mine, its) <= CLOSE)
            for mine, its in zip(adapter_state_dict(back).values(), adapter_state_dict(ours).values(), strict=True)
        )


@pytest.mark.parametrize(("name", "target"), [("llama", "q_proj"), ("bert", "query"), ("gpt2", "c_attn")])
@pytest.mark.parametrize("layers", [[0], [1], [0, 1]], ids=str)
def test_layers_choose_what_peft_transforms(name: str, target: str, layers: list[int], tmp_path: Path) -> None:
    theirs = peft.get_peft_model(MODELS[name](), peft.LoraConfig(target_modules=[target], layers_to_transform=layers))
    ours = trained(MODELS[name](), target_modules=[target], layers=layers)
    adapted = [each for each, module in theirs.base_model.model.named_modules() if hasattr(module, "lora_A")]
    assert list(lora_layers(ours)) == adapted
    save_adapter(ours, tmp_path)
    assert distance(logits(in_peft(MODELS[name](), tmp_path)), logits(ours)) < CLOSE
