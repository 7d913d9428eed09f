"""Small transformers models with random weights, adapted, trained in one step of noise, and compared through PEFT."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_lora import LoRAConfig, adapter_state_dict, attach, load_adapter
from lightning_lora.adapted_model import AdaptedModel

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of PEFT's optional dependencies
    peft = pytest.importorskip("peft")
    transformers = pytest.importorskip("transformers")

CLOSE = 1e-5
VOCABULARY = 32
# What PEFT, transformers and torch say of themselves and of adapters that are as large as these thin layers.
QUIET = [
    pytest.mark.filterwarnings("ignore::UserWarning:peft.*"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning:peft.*"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore:These adapters are not smaller.*"),
]


def _seeded(make: Callable[[], nn.Module]) -> nn.Module:
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        model = make().eval()
        for parameter in model.parameters():
            if parameter.ndim > 1 and parameter.std() < 0.1:
                parameter.mul_(4.0)  # of the usual start so small a model would say much the same whatever it holds
        return model


def gpt2() -> nn.Module:
    config = transformers.GPT2Config(vocab_size=VOCABULARY, n_positions=12, n_embd=16, n_layer=2, n_head=2)
    return _seeded(lambda: transformers.GPT2LMHeadModel(config))


def llama(tied: bool = False) -> nn.Module:
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY, num_hidden_layers=2, max_position_embeddings=12, tie_word_embeddings=tied, **sizes
    )
    return _seeded(lambda: transformers.LlamaForCausalLM(config))


def tied_llama() -> nn.Module:
    return llama(tied=True)


def bert() -> nn.Module:
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "num_hidden_layers": 2}
    config = transformers.BertConfig(vocab_size=VOCABULARY, max_position_embeddings=12, num_labels=5, **sizes)
    return _seeded(lambda: transformers.BertForSequenceClassification(config))


def distilbert() -> nn.Module:
    config = transformers.DistilBertConfig(vocab_size=VOCABULARY, dim=16, hidden_dim=24, n_heads=2, n_layers=1)
    return _seeded(lambda: transformers.DistilBertForSequenceClassification(config))


def t5() -> nn.Module:
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2}
    config = transformers.T5Config(vocab_size=VOCABULARY, decoder_start_token_id=0, **sizes)
    return _seeded(lambda: transformers.T5ForConditionalGeneration(config))


def vit() -> nn.Module:
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "num_hidden_layers": 2}
    config = transformers.ViTConfig(image_size=8, patch_size=4, num_labels=5, **sizes)
    return _seeded(lambda: transformers.ViTForImageClassification(config))


def mixtral() -> nn.Module:
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 4, "num_key_value_heads": 2}
    experts = {"num_local_experts": 4, "num_experts_per_tok": 2}
    config = transformers.MixtralConfig(
        vocab_size=VOCABULARY, num_hidden_layers=2, max_position_embeddings=12, **sizes, **experts
    )
    return _seeded(lambda: transformers.MixtralForCausalLM(config))


MODELS: dict[str, Callable[[], nn.Module]] = {
    model.__name__: model for model in (gpt2, llama, tied_llama, bert, t5, vit, mixtral)
}

SMALL = {
    **{"vocab_size": VOCABULARY, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "moe_intermediate_size": 8, "num_experts_per_tok": 2},
    **{"max_position_embeddings": 12, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
}
SHARED = {"n_routed_experts": 4, "n_shared_experts": 1, "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1}
# Models whose names PEFT changes while it loads an adapter.
CONVERTED: dict[str, dict[str, Any]] = {
    "deepseek_v3": {
        **{**SMALL, **SHARED, "q_lora_rank": 8, "kv_lora_rank": 8, "num_key_value_heads": 4},
        **{"qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8},
    },
    "glm4_moe": {**SMALL, **SHARED},
    "laguna": {**SMALL, "head_dim": 8, "num_experts": 4, "shared_expert_intermediate_size": 8},
    "qwen3_moe": {**SMALL, "head_dim": 8, "num_experts": 4, "mlp_only_layers": [0]},
    "qwen3_next": {
        **{**SMALL, "head_dim": 8, "num_experts": 4, "shared_expert_intermediate_size": 8},
        **{
            "linear_key_head_dim": 8,
            "linear_value_head_dim": 8,
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
        },
        "layer_types": ["linear_attention", "full_attention"],
    },
}


def of_type(model_type: str, **sizes: Any) -> nn.Module:
    """Return a small causal model of one of transformers' types."""
    config = transformers.AutoConfig.for_model(model_type, **(sizes or CONVERTED[model_type]))
    return _seeded(lambda: transformers.AutoModelForCausalLM.from_config(config))


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    """Return what a model, ours or PEFT's, says to fixed inputs."""
    generator = torch.Generator().manual_seed(5)
    tokens = torch.randint(VOCABULARY, (2, 7), generator=generator)
    if "vit" in type(getattr(model, "config", model)).__name__.lower() or hasattr(model, "vit"):
        return model(pixel_values=torch.randn(2, 3, 8, 8, generator=generator)).logits
    if hasattr(model, "decoder"):
        return model(input_ids=tokens, decoder_input_ids=tokens.flip(1)).logits
    return model(input_ids=tokens).logits


@torch.no_grad()
def trained(model: nn.Module, **options: Any) -> nn.Module:
    """Adapt a model, and give everything that trains other values."""
    attach(model, LoRAConfig(**({"rank": 2, "alpha": 3.0} | options)))
    generator = torch.Generator().manual_seed(9)
    for tensor in AdaptedModel(model).trained.values():
        if tensor.is_floating_point():
            tensor.add_(0.2 * torch.randn(tensor.shape, generator=generator))
    AdaptedModel(model).have_values()
    return model


@torch.no_grad()
def trained_by_peft(base: nn.Module, **options: Any) -> Any:
    """Return PEFT's model of a base, with other values for everything that it trains."""
    model = peft.get_peft_model(base, peft.LoraConfig(**({"r": 2, "lora_alpha": 3} | options))).eval()
    generator = torch.Generator().manual_seed(9)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model


def in_peft(base: nn.Module, directory: Path) -> Any:
    """Return PEFT's model of a base with the adapter of a directory; a missing key is an error."""
    config = peft.LoraConfig.from_pretrained(directory)
    model = peft.PeftModel(base, config)
    outcome = model.load_adapter(directory, "default", is_trainable=False)
    assert not outcome.unexpected_keys
    assert not [key for key in outcome.missing_keys if "lora_" in key or "modules_to_save" in key or "token" in key]
    return model.eval()


def loaded(base: nn.Module, directory: Path) -> nn.Module:
    load_adapter(base, directory)
    assert adapter_state_dict(base)
    return base.eval()


def distance(one: Tensor, other: Tensor) -> float:
    return (one - other).abs().max().item()
