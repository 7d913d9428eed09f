"""Tiny random models of every architecture of transformers for the zoo: configs shrunk by the names of their fields."""

from __future__ import annotations

import dataclasses
import inspect
import re
from collections.abc import Mapping
from typing import Any

import torch

KINDS = {
    "causal": "CAUSAL_LM",
    "masked": "MASKED_LM",
    "seq2seq": "SEQ_TO_SEQ_CAUSAL_LM",
    "image": "IMAGE_CLASSIFICATION",
    "audio": "AUDIO_CLASSIFICATION",
    "ctc": "CTC",
    "speech": "SPEECH_SEQ_2_SEQ",
    "zero-shot": "ZERO_SHOT_IMAGE_CLASSIFICATION",
    "sequence": "SEQUENCE_CLASSIFICATION",
    "token": "TOKEN_CLASSIFICATION",
    "multimodal": "IMAGE_TEXT_TO_TEXT",
    "video": "VIDEO_CLASSIFICATION",
}
VOCABULARY, IMAGE, TOKENS, HEADS = 128, 64, 12, 4
NEEDED = {
    "head_dim": 8,
    "num_key_value_heads": HEADS,
    "num_experts_per_tok": 2,
    "n_routed_experts": 4,
}  # where a config leaves them out

# What a whole number becomes, by the first expression that matches all of the field's name. None leaves it out.
SIZES: list[tuple[str, int]] = [
    (r".*vocab(_size)?(_base)?|vocab_size_.*|.*num_embeddings", VOCABULARY),
    (r"pad_token_id", 0),
    (r"(bos|decoder_start|cls)_token_id", 1),
    (r"(eos|sep)_token_id", 2),
    (r"mask_token_id", 3),
    (r"(num_)?conv_layers|num_lstm_layers|num_adapter_layers|num_mtp_layers|num_nextn_predict_layers", 1),
    (r"(n|num)_(shared|dense).*|first_k_dense_replace|moe_layer_start_index|no_rope_layer_interval", 1),
    (r"n_groups?|topk_group|mamba_n_groups|num_groups", 1),
    (r"num_experts_per_tok(en)?|moe_k|moe_topk|top_?k(_experts)?|num_selected_experts|.*router_topk", 2),
    (r"(moe_)?(num|n)_(local_|routed_)?experts|zero_expert_num", 4),
    (r".*(num|n)_?(hidden|layer|block|decoder|encoder|spatial|temporal).*layers?|n_layers?|num_layers|depth", 2),
    (r"(num|n)_(.*_)?layers?|.*(encoder|decoder)_layers|num_blocks", 2),
    (r".*(num_)?key_value_heads|(num_)?kv_heads|kv_n_heads|num_key_heads|linear_num_key_heads", 2),
    (r"mamba_n(um)?_heads|mamba_num_heads", 8),
    (r".*(num_|n_)(attention_|value_)?heads?|.*attention_heads|num_self_attention_heads|num_cross.*heads|n_head", 4),
    (r".*head_dim|d_kv|d_head|dim_head|kv_channels|mamba_d_head|attention_head_size|.*attention_head_dim", 8),
    (r"rotary_dim", 4),
    (r".*lora_rank|.*dt_rank|time_step_rank|adapter_rank", 8),
    (r".*(state_size|d_state)|ssm_state_size", 8),
    (r"mamba_d_ssm", 64),
    (r".*(intermediate|ffn|d_ff|dff|dim_ff|mlp_dim|ffn_hidden|feed_forward).*|d_inner|n_inner", 64),
    (r"num_mel_bins|.*input_feat_per_channel|feature_size", 16),
    (r"max_source_positions", 32),
    (r".*(max|num)_.*position.*|n_positions|n_ctx|max_seq_len|context_length|max_length", 128),
    (r"(sliding|attention|local_attention).*window.*|local_attention", 8),
    (r"(image|crop)_size", IMAGE),
    (r".*(chunk_size|block_size)|lsh_.*|local_attn.*", 8),
    (r"codebook_size|hash_.*", 64),
    (r".*(hidden_size|hidden_dim|d_model|n_embd|embed_dim|embd?_dim|embedding_size|embedding_dim|emb_dim).*", 32),
    (r"dim|.*projection_(dim|size)|.*proj_(dim|size)|.*_dim|.*lru_width|.*_hidden_size.*|prediction_head_size", 32),
]
SKIPPED = re.compile(
    r"st(age|em)_.*|.*(ratio|stride|kernel|reduction|dilation|padding|pos_type).*|num_labels|patch_size"
)

EFFICIENTNET = {"hidden_dim": 320, "width_coefficient": 0.25, "depth_coefficient": 0.2}
SECTIONS = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}
INDEXER = {"n_heads": 2, "kv_heads": 1, "head_dim": 8, "budget": 8, "compress_ratio": 2}

# What the rules get wrong, by model type; "." leads into a sub-config.
SPECIAL: dict[str, dict[str, Any]] = {
    "align": {f"vision_config.{key}": value for key, value in EFFICIENTNET.items()} | {"projection_dim": 80},
    "cohere_compass_text": {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 10000.0}}},
    "cvt": {"depth": [1, 2, 3]},
    "dbrx": {"attn_config.rope_theta": 10000.0, "attn_config.clip_qkv": 8.0},
    "deepseek_v2": {"topk_method": "greedy"},
    "donut-swin": {"num_heads": [2, 2, 2, 2]},
    "dots1": {"n_shared_experts": 1},
    "efficientnet": EFFICIENTNET,
    "emu3": {"pad_token_id": 0},
    "esm": {"vocab_size": VOCABULARY, "pad_token_id": 0},
    "esmc": {"num_key_value_heads": HEADS},
    "gemma3n": {"text_config.num_kv_shared_layers": 0},
    "gemma3n_text": {"num_kv_shared_layers": 0},
    "gemma4_assistant": {"text_config.hidden_size_per_layer_input": 0},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "hgnet_v2": {"hidden_sizes": [256, 512, 1024, 2048]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "llama4": {"pad_token_id": 0},
    "longcat_flash": {"qk_head_dim": 16},
    "mamba2": {"num_heads": 8, "n_groups": 1},
    "masked/reformer": {"is_decoder": False},
    "moonshine": {"decoder_num_key_value_heads": HEADS, "encoder_num_key_value_heads": HEADS},
    "neomme": {"head_dim": 16, "hidden_size": 64},
    "perceiver": {"d_latents": 32, "d_model": 32, "num_latents": 8, "num_self_attends_per_block": 2},
    "qwen4_exp": {f"text_config.indexer_{key}": value for key, value in INDEXER.items()},
    "qwen4_exp_text": {f"indexer_{key}": value for key, value in INDEXER.items()},
    "reformer": {"is_decoder": True, "axial_pos_shape": [4, 4], "axial_pos_embds_dim": [16, 16]},
    "siglip2": {"vision_config.num_patches": 16},
    "speech_to_text": {"num_conv_layers": 2, "conv_channels": 32},
    "swin": {"num_heads": [2, 2, 2, 2], "embed_dim": 32},
    "swinv2": {"num_heads": [2, 2, 2, 2], "embed_dim": 32},
    "textnet": {"hidden_sizes": [64, 64, 128, 256, 512]},
    "wav2vec2-bert": {"vocab_size": VOCABULARY},
    "wav2vec2-conformer": {"vocab_size": VOCABULARY},
    "xmod": {"default_language": "en_XX"},
    "zamba": {
        "layers_block_type": ["mamba", "mamba", "hybrid"] * 2,
        "num_hidden_layers": 6,
        "attention_hidden_size": 64,
        "attention_head_dim": 16,
    },
    "zamba2": {"layers_block_type": ["mamba", "hybrid"], "num_hidden_layers": 2},
}
SPECIAL |= {
    model_type: {"text_config.rope_parameters": SECTIONS}
    for model_type in ("glm46v", "glm4v", "glm_ocr", "glmga", "paddleocr_vl", "qwen2_5_vl", "qwen2_vl")
}


def names() -> list[str]:
    """Return "kind/model type" of every architecture."""
    from transformers.models.auto import modeling_auto

    return [
        f"{kind}/{model_type}"
        for kind, mapping in KINDS.items()
        for model_type in getattr(modeling_auto, f"MODEL_FOR_{mapping}_MAPPING_NAMES")
    ]


def build(name: str) -> tuple[torch.nn.Module, tuple[Any, ...], dict[str, Any]]:
    """Return a tiny random model, and the arguments of a call."""
    import transformers
    from transformers.models.auto import modeling_auto
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    kind, model_type = name.split("/")
    class_name = getattr(modeling_auto, f"MODEL_FOR_{KINDS[kind]}_MAPPING_NAMES")[model_type]
    model_class = getattr(transformers, class_name[0] if isinstance(class_name, tuple) else class_name)
    config = part_for(
        model_class, shrunk(CONFIG_MAPPING[model_type], SPECIAL.get(model_type, {}) | SPECIAL.get(name, {}))
    )
    for part in (config, text_config(config)):
        if getattr(part, "pad_token_id", 0) is None:
            part.pad_token_id = 0
    model = model_class(config)
    return model, (), inputs(model, kind)


# --- configs


def part_for(model_class: Any, config: Any) -> Any:
    """Return a config, or the one of its sub-configs that a model's class wants."""
    wanted = getattr(model_class, "config_class", None)
    if wanted is None or isinstance(config, wanted):
        return config
    parts = (getattr(config, key, None) for key in getattr(config, "sub_configs", {}))
    return next((part for part in parts if isinstance(part, wanted)), config)


def shrunk(cls: type, special: Mapping[str, Any]) -> Any:
    """Return a tiny config of a class: each field by its name, sub-configs in the same way."""
    default = cls()
    layers = layers_needed(default)
    chosen: dict[str, Any] = {}
    parts = getattr(cls, "sub_configs", {})
    for field in dataclasses.fields(cls):
        key, value = field.name, value_of(default, field.name)
        inner = {k.removeprefix(f"{key}."): v for k, v in special.items() if k.startswith(f"{key}.")}
        if key in parts or hasattr(value, "to_dict"):
            if value is not None:
                chosen[key] = shrunk(type(value), inner)
        elif not is_derived(field) or (isinstance(value, int) and not isinstance(value, bool)):
            small = smaller(key, value, default, layers)
            if small != value or not is_derived(field):
                chosen[key] = small
        elif key in NEEDED and value is None:
            chosen[key] = NEEDED[key]
    if "kv_lora_rank" in chosen:  # latent attention
        chosen |= {key: HEADS for key in chosen if key == "num_key_value_heads"}
    chosen |= {key: value for key, value in special.items() if "." not in key}
    chosen = {key: value for key, value in chosen.items() if value is not dataclasses.MISSING}
    return cls(**chosen)


def value_of(config: Any, key: str) -> Any:
    """Return an option of a config; some refuse to say what may differ from layer to layer."""
    try:
        return getattr(config, key, None)
    except Exception:
        return vars(config).get(key)


def is_derived(field: dataclasses.Field[Any]) -> bool:
    """Return whether a config computes a field that is not given."""
    return field.default is None


def layers_needed(config: Any) -> int:
    """Return how many layers show every kind of layer that a config names, between 2 and 8."""
    needed = 2
    for key, value in vars(config).items():
        if isinstance(value, (list, tuple)) and ("types" in key or "type" in key) and value:
            kinds = [str(each) for each in value]
            needed = max(needed, *(kinds.index(kind) + 1 for kind in set(kinds)))
    return min(needed, 8)


def smaller(key: str, value: Any, config: Any, layers: int) -> Any:
    """Return the tiny value of a field."""
    if key == "use_cache":
        return False
    if isinstance(value, float) and re.search("drop", key):
        return 0.0
    if isinstance(value, (list, tuple)) and value:
        return type(value)(smaller_list(key, list(value), config, layers))
    if isinstance(value, bool) or not isinstance(value, int) or SKIPPED.fullmatch(key):
        return value
    for expression, size in SIZES:
        if re.fullmatch(expression, key):
            if size == 2 and ("layer" in key or key in ("depth", "num_blocks")):
                size = layers
            return size if key.endswith("_id") else min(value, size)
    if re.fullmatch(r".*_token_(id|index)", key) and value >= VOCABULARY:
        return 4 + value % 15
    return value


def smaller_list(key: str, value: list[Any], config: Any, layers: int) -> list[Any]:
    """Return the tiny value of a list: a number for each stage, or something for each layer."""
    old = next((n for k in ("num_hidden_layers", "n_layer", "num_layers") if (n := getattr(config, k, None))), None)
    if len(value) == old and not hasattr(config, "depths"):
        return value[:layers]
    if not all(type(each) is int for each in value) or SKIPPED.fullmatch(key):
        return [0.0 if isinstance(each, float) and "drop" in key else each for each in value]
    if re.search("depth|num_blocks|layers|blocks", key):
        return [min(each, 2) for each in value]
    if re.search("heads", key):
        return [min(each, 2) for each in value]
    if re.search("hidden|dim|channels|width", key) and min(value) > 16:
        return [16 * each // min(value) // 8 * 8 for each in value]
    return value


# --- inputs


def inputs(model: torch.nn.Module, kind: str) -> dict[str, Any]:
    """Return arguments for a model's forward, from its signature."""
    config: Any = model.config
    accepted = inspect.signature(model.forward).parameters
    main = getattr(model, "main_input_name", "input_ids")
    frames = [getattr(config, "num_frames", 8)] if kind == "video" else []
    known = {
        "input_ids": lambda: tokens(text_config(config), TOKENS).repeat_interleave(
            vars(config).get("num_codebooks", 1), 0
        ),
        "pixel_values": lambda: torch.randn(2, *frames, *image_shape(config)),
        "pixel_values_videos": lambda: torch.randn(2, 4, *image_shape(config)),
        "input_features": lambda: torch.randn(2, *feature_shape(model)),
        "input_values": lambda: torch.randn(2, *sound_shape(config)),
        "inputs": lambda: torch.randn(2, *image_shape(config)) if kind == "image" else tokens(config, TOKENS),
    }
    both = ("input_ids", "pixel_values", "pixel_values_videos") if kind == "zero-shot" else ()
    given: dict[str, Any] = {key: make() for key, make in known.items() if key in (main, *both) and key in accepted}
    if "decoder_input_ids" in accepted and kind in ("seq2seq", "speech", "sequence", "token"):
        given["decoder_input_ids"] = given["input_ids"].clone() if kind == "sequence" else tokens(config, 7)
    if "spatial_shapes" in accepted:  # an image is a list of patches
        given["pixel_values"] = torch.randn(2, 16, 3 * 16 * 16)
        given["pixel_attention_mask"] = torch.ones(2, 16, dtype=torch.long)
        given["spatial_shapes"] = torch.tensor([[4, 4], [2, 8]])
    if "bbox" in accepted:
        given["bbox"] = torch.zeros(2, TOKENS, 4, dtype=torch.long)
    if "use_cache" in accepted:
        given["use_cache"] = False
    return given


def text_config(config: Any) -> Any:
    """Return the part of a config that speaks of text."""
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def tokens(config: Any, length: int) -> torch.Tensor:
    """Return two rows of token numbers that end with the end of a sequence."""
    size = min(int(getattr(config, "vocab_size", VOCABULARY) or VOCABULARY), VOCABULARY)
    found = torch.randint(20, size, (2, length))
    found[:, -1] = 2
    return found


def image_shape(config: Any) -> tuple[int, ...]:
    """Return (channels, height, width) of a model's images."""
    vision = getattr(config, "vision_config", config)
    size = getattr(vision, "image_size", None) or IMAGE
    height, width = size if isinstance(size, (list, tuple)) else (size, size)
    return int(getattr(vision, "num_channels", 3) or 3), height, width


def feature_shape(model: Any) -> tuple[int, ...]:
    """Return (frames, bins) of a model's spectrograms, or (bins, frames) where it counts frames last."""
    config = model.config
    bins = next(
        (
            n
            for key in ("num_mel_bins", "input_feat_per_channel", "feature_projection_input_dim")
            for part in (config, getattr(config, "encoder_config", None), getattr(config, "audio_config", None))
            if (n := getattr(part, key, None))
        ),
        16,
    )
    if getattr(config, "max_source_positions", None) and hasattr(config, "num_mel_bins"):
        return bins, 2 * config.max_source_positions
    return 64, bins


def sound_shape(config: Any) -> tuple[int, ...]:
    """Return the shape of a sound: samples, or a spectrogram."""
    if hasattr(config, "frequency_stride"):
        return config.max_length, config.num_mel_bins
    return (4000,)
