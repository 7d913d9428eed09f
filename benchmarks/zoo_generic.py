"""Tiny models of diffusers, torchaudio, speechbrain and pytorch-forecasting for the zoo."""

from __future__ import annotations

import importlib
import inspect
import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

Call = tuple[nn.Module, tuple[Any, ...], dict[str, Any]]

# --- diffusers: constructors with few arguments, and inputs by the names of forward's

DIM, LENGTH, SIDE = 32, 6, 16
SMALL: dict[str, Any] = {
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "num_heads": 2,
    **dict.fromkeys(("num_layers", "n_layers", "depth"), 2),
    **dict.fromkeys(("num_single_layers", "num_refiner_layers", "num_mmdit_layers", "num_single_dit_layers"), 1),
    **dict.fromkeys(("joint_attention_dim", "cross_attention_dim", "caption_channels", "caption_projection_dim"), DIM),
    **dict.fromkeys(("text_embed_dim", "text_dim", "pooled_projection_dim", "hidden_size", "cap_feat_dim"), DIM),
    **dict.fromkeys(
        ("time_embed_dim", "timestep_dim", "embedding_dim", "encoder_hid_dim", "cross_attention_input_dim"), DIM
    ),
    **dict.fromkeys(("ffn_dim", "ff_inner_dim", "intermediate_size"), 2 * DIM),
    "axes_dims_rope": (4, 4, 8),
    "rope_axes_dim": (4, 4, 8),
    "sample_size": SIDE,
    "num_vector_embeds": None,
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "freq_dim": 32,
}
MODELS = [
    "AllegroTransformer3DModel",
    "AsymmetricAutoencoderKL",
    "AuraFlowTransformer2DModel",
    "AutoencoderDC",
    "AutoencoderKL",
    "AutoencoderKLCogVideoX",
    "AutoencoderKLTemporalDecoder",
    "AutoencoderKLWan",
    "AutoencoderKLQwenImage",
    "AutoencoderTiny",
    "AutoencoderKLLTXVideo",
    "AutoencoderKLHunyuanVideo",
    "AutoencoderKLMochi",
    "AutoencoderKLMagvit",
    "AutoencoderOobleck",
    "BriaTransformer2DModel",
    "ChromaTransformer2DModel",
    "CogVideoXTransformer3DModel",
    "CogView3PlusTransformer2DModel",
    "CogView4Transformer2DModel",
    "ConsisIDTransformer3DModel",
    "ControlNetModel",
    "DiTTransformer2DModel",
    "FluxTransformer2DModel",
    "Flux2Transformer2DModel",
    "HunyuanDiT2DModel",
    "HunyuanVideoTransformer3DModel",
    "Kandinsky3UNet",
    "LTXVideoTransformer3DModel",
    "LatteTransformer3DModel",
    "Lumina2Transformer2DModel",
    "LuminaNextDiT2DModel",
    "MochiTransformer3DModel",
    "PixArtTransformer2DModel",
    "PriorTransformer",
    "QwenImageTransformer2DModel",
    "SD3Transformer2DModel",
    "SanaTransformer2DModel",
    "StableAudioDiTModel",
    "T2IAdapter",
    "Transformer2DModel",
    "TransformerTemporalModel",
    "UNet1DModel",
    "UNet2DConditionModel",
    "UNet2DModel",
    "UNet3DConditionModel",
    "UNetMotionModel",
    "UNetSpatioTemporalConditionModel",
    "UVit2DModel",
    "VQModel",
    "WanTransformer3DModel",
]
SPECIAL: dict[str, dict[str, Any]] = {
    "Transformer2DModel": {"in_channels": 32, "norm_num_groups": 8},
    "TransformerTemporalModel": {"in_channels": 32, "norm_num_groups": 8},
    "PixArtTransformer2DModel": {
        "in_channels": 4,
        "patch_size": 2,
        "caption_channels": DIM,
        "cross_attention_dim": DIM,
    },
    "UNet1DModel": {
        "block_out_channels": (32, 32),
        "sample_size": SIDE,
        "extra_in_channels": 64,
        "down_block_types": ("DownBlock1DNoSkip", "DownBlock1D"),
        "up_block_types": ("UpBlock1D", "UpBlock1DNoSkip"),
    },
    "UNet2DModel": {
        "block_out_channels": (32, 64),
        "attention_head_dim": 8,
        "norm_num_groups": 8,
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    },
    "UNet2DConditionModel": {
        "block_out_channels": (32, 64),
        "attention_head_dim": 8,
        "num_attention_heads": None,
        "norm_num_groups": 8,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    },
    "UNet3DConditionModel": {
        "block_out_channels": (32, 64),
        "attention_head_dim": 8,
        "num_attention_heads": None,
        "norm_num_groups": 8,
        "down_block_types": ("CrossAttnDownBlock3D", "DownBlock3D"),
        "up_block_types": ("UpBlock3D", "CrossAttnUpBlock3D"),
    },
    "UNetMotionModel": {
        "block_out_channels": (32, 64),
        "motion_num_attention_heads": 2,
        "norm_num_groups": 8,
        "down_block_types": ("CrossAttnDownBlockMotion", "DownBlockMotion"),
        "up_block_types": ("UpBlockMotion", "CrossAttnUpBlockMotion"),
    },
    "UNetSpatioTemporalConditionModel": {
        "block_out_channels": (32, 64),
        "num_attention_heads": (2, 4),
        "addition_time_embed_dim": 32,
        "projection_class_embeddings_input_dim": 96,
        "down_block_types": ("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
        "up_block_types": ("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"),
    },
    "ControlNetModel": {
        "block_out_channels": (32, 64),
        "conditioning_embedding_out_channels": (16, 32),
        "norm_num_groups": 8,
        "attention_head_dim": 8,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    },
    "AutoencoderKL": {
        "block_out_channels": (32, 64),
        "norm_num_groups": 8,
        "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2,
    },
    "VQModel": {
        "block_out_channels": (32, 64),
        "norm_num_groups": 8,
        "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2,
    },
    "AsymmetricAutoencoderKL": {
        "down_block_out_channels": (32, 64),
        "layers_per_down_block": 1,
        "up_block_out_channels": (32, 64),
        "layers_per_up_block": 1,
        "norm_num_groups": 8,
        "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2,
    },
    "AutoencoderKLWan": {
        "base_dim": 8,
        "z_dim": 4,
        "dim_mult": [1, 2, 2, 2],
        "num_res_blocks": 1,
        "latents_mean": [0.0] * 4,
        "latents_std": [1.0] * 4,
    },
    "AutoencoderKLQwenImage": {
        "base_dim": 8,
        "z_dim": 4,
        "dim_mult": [1, 2, 2, 2],
        "num_res_blocks": 1,
        "latents_mean": [0.0] * 4,
        "latents_std": [1.0] * 4,
    },
    "AutoencoderTiny": {
        "encoder_block_out_channels": (32, 32),
        "decoder_block_out_channels": (32, 32),
        "num_encoder_blocks": (1, 2),
        "num_decoder_blocks": (2, 1),
    },
    "AutoencoderOobleck": {
        "encoder_hidden_size": 12,
        "decoder_channels": 12,
        "decoder_input_channels": 6,
        "audio_channels": 2,
        "downsampling_ratios": [2, 4],
        "channel_multiples": [1, 2],
    },
    "AutoencoderKLTemporalDecoder": {"block_out_channels": (32, 64), "down_block_types": ("DownEncoderBlock2D",) * 2},
    "AutoencoderKLCogVideoX": {"block_out_channels": (8, 8, 8, 8), "norm_num_groups": 2, "latent_channels": 4},
    "SanaTransformer2DModel": {
        "num_cross_attention_heads": 2,
        "cross_attention_head_dim": 16,
        "cross_attention_dim": DIM,
    },
    "SD3Transformer2DModel": {"caption_projection_dim": DIM, "in_channels": 4, "out_channels": 4},
    "UVit2DModel": {
        "hidden_size": DIM,
        "block_out_channels": DIM,
        "encoder_hidden_size": DIM,
        "cond_embed_dim": DIM,
        "micro_cond_encode_dim": 8,
        "micro_cond_embed_dim": 40,
        "vocab_size": 32,
        "codebook_size": 32,
        "num_hidden_layers": 2,
        "block_num_heads": 2,
        "num_attention_heads": 2,
    },
    "LatteTransformer3DModel": {"patch_size": 2, "in_channels": 4, "out_channels": 4},
    "HunyuanDiT2DModel": {"patch_size": 2, "in_channels": 4},
    "PriorTransformer": {"num_embeddings": LENGTH},
    "CogVideoXTransformer3DModel": {
        "sample_height": SIDE,
        "sample_width": SIDE,
        "sample_frames": 17,
        "max_text_seq_length": LENGTH,
    },
    "ConsisIDTransformer3DModel": {
        "sample_height": SIDE,
        "sample_width": SIDE,
        "sample_frames": 17,
        "max_text_seq_length": LENGTH,
    },
    "AutoencoderDC": {
        "encoder_block_out_channels": (16, 16, 32),
        "decoder_block_out_channels": (16, 16, 32),
        "encoder_layers_per_block": (1, 1, 1),
        "decoder_layers_per_block": (1, 1, 1),
        "encoder_block_types": ("ResBlock", "ResBlock", "EfficientViTBlock"),
        "decoder_block_types": ("ResBlock", "ResBlock", "EfficientViTBlock"),
        "encoder_qkv_multiscales": ((), (), (5,)),
        "decoder_qkv_multiscales": ((), (), (5,)),
        "attention_head_dim": 8,
    },
    "AutoencoderKLHunyuanVideo": {"block_out_channels": (8, 8, 8, 8), "norm_num_groups": 4},
    "AutoencoderKLMagvit": {"block_out_channels": (8, 8, 8, 8), "norm_num_groups": 4},
    "AutoencoderKLLTXVideo": {
        "block_out_channels": (8, 8, 8, 8),
        "decoder_block_out_channels": (8, 8, 8, 8),
        "layers_per_block": (1, 1, 1, 1, 1),
        "decoder_layers_per_block": (1, 1, 1, 1, 1),
        "latent_channels": 8,
    },
    "ChromaTransformer2DModel": {
        "approximator_num_channels": 32,
        "approximator_hidden_dim": DIM,
        "approximator_layers": 1,
    },
    "T2IAdapter": {"channels": [16, 16, 32, 32], "num_res_blocks": 1},
}


def diffusers_names() -> list[str]:
    """Return the models whose arguments are known here and which this version has."""
    import diffusers

    return [name for name in MODELS if hasattr(diffusers, name)]


def build_diffusers(name: str) -> Call:
    """Return a model of diffusers: with inputs of the first shape that it takes."""
    import diffusers

    cls = getattr(diffusers, name)
    accepted = inspect.signature(cls.__init__).parameters
    options = {key: value for key, value in SMALL.items() if key in accepted} | SPECIAL.get(name, {})
    model = cls(**options)
    pictures = 3 if "Autoencoder" in name else 4
    channels = getattr(model.config, "in_channels", None) or getattr(model.config, "num_channels_latents", pictures)
    shapes = [
        (2, channels, SIDE, SIDE),
        (2, channels, 5, SIDE, SIDE),
        (2, 5, channels, SIDE, SIDE),
        (2, 16, channels),
        (2, channels, 64),
        (2, channels, 256),
        (2 * 5, channels, SIDE, SIDE),
        (2, channels),
        (2, channels, 64, 64),
        (2, DIM),
    ]
    error: Exception = ValueError("nothing to try")
    times = (torch.tensor([3, 5]), torch.tensor([0.3, 0.5]))
    for shape, time in itertools.product(shapes, times):
        arguments = diffusion_inputs(model, torch.randn(shape), time)
        try:
            with torch.no_grad():
                model.eval()(**arguments)
            return model, (), arguments
        except Exception as raised:
            error = error if isinstance(raised, (ValueError, IndexError)) else raised
    raise error


def diffusion_inputs(model: nn.Module, sample: torch.Tensor, time: torch.Tensor) -> dict[str, Any]:
    """Return the arguments that a model's forward asks for, by their names."""
    known: dict[str, Any] = {
        **dict.fromkeys(("sample", "hidden_states", "x"), sample),
        **dict.fromkeys(("timestep", "timesteps", "t"), time),
        "encoder_hidden_states": torch.randn(2, LENGTH, DIM),
        "encoder_attention_mask": torch.ones(2, LENGTH, dtype=torch.bool),
        "encoder_hidden_states_mask": torch.ones(2, LENGTH, dtype=torch.bool),
        "encoder_mask": torch.ones(2, LENGTH, dtype=torch.bool),
        "pooled_projections": torch.randn(2, DIM),
        "img_ids": torch.zeros(16, 3),
        "txt_ids": torch.zeros(LENGTH, 3),
        "img_shapes": [[(1, 4, 4)]] * 2,
        "class_labels": torch.tensor([1, 2]),
        "proj_embedding": torch.randn(2, DIM),
        "added_time_ids": torch.randn(2, 3),
        "original_size": torch.tensor([[16.0, 16.0]] * 2),
        "target_size": torch.tensor([[16.0, 16.0]] * 2),
        "crop_coords": torch.tensor([[0.0, 0.0]] * 2),
        "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
        "input_ids": torch.randint(0, 32, (2, 4, 4)),
        "pooled_text_emb": torch.randn(2, DIM),
        "micro_conds": torch.randn(2, 5),
        "controlnet_cond": torch.randn(2, 3, 8 * SIDE, 8 * SIDE),
        "image_rotary_emb": None,
        "guidance": torch.tensor([1.0, 2.0]),
        "num_frames": 1,
        "height": 4,
        "width": 4,
    }
    wanted = (
        "encoder_hidden_states",
        "pooled_projections",
        "timestep",
        "img_ids",
        "txt_ids",
        "added_cond_kwargs",
        "encoder_attention_mask",
        "encoder_hidden_states_mask",
        "img_shapes",
        "num_frames",
        "height",
        "width",
    )
    parameters = inspect.signature(model.forward).parameters
    if type(model).__name__ in ("DiTTransformer2DModel",):
        wanted = (*wanted, "class_labels")
    if getattr(model.config, "guidance_embeds", False):
        wanted = (*wanted, "guidance")
    return {
        key: known[key]
        for key, parameter in parameters.items()
        if key in known and (parameter.default is inspect.Parameter.empty or key in wanted)
    }


# --- torchaudio and speechbrain: a line for each model


def sound(*shape: int) -> torch.Tensor:
    """Return a random sound or its features."""
    return torch.randn(*shape)


def lengths(*values: int) -> torch.Tensor:
    """Return how long each sound is."""
    return torch.tensor(values)


def audio_builders() -> dict[str, Callable[[], Call]]:
    """Return the models of torchaudio."""
    from torchaudio import models

    wave = {
        "extractor_mode": "group_norm",
        "extractor_conv_layer_config": [(16, 10, 5), (16, 3, 2), (16, 3, 2)],
        "extractor_conv_bias": False,
        "encoder_embed_dim": DIM,
        "encoder_pos_conv_kernel": 8,
        "encoder_pos_conv_groups": 4,
        "encoder_num_layers": 2,
        "encoder_num_heads": 4,
        "encoder_ff_interm_features": 64,
        "encoder_layer_norm_first": False,
        "encoder_layer_drop": 0.0,
        "aux_num_out": 12,
    } | {f"encoder_{part}dropout": 0.0 for part in ("", "projection_", "attention_", "ff_interm_")}
    buckets = {"encoder_num_buckets": 32, "encoder_max_distance": 64}
    speech = dict.fromkeys(
        ("symbol_embedding_dim", "encoder_embedding_dim", "decoder_rnn_dim", "attention_rnn_dim"), DIM
    )
    spoken = (torch.randint(0, 20, (2, 9)), lengths(9, 9), sound(2, 16, 12), lengths(12, 12))
    made: dict[str, tuple[Callable[[], nn.Module], tuple[torch.Tensor, ...]]] = {
        "Conformer": (lambda: models.Conformer(16, 4, 32, 2, 7), (sound(2, 20, 16), lengths(20, 20))),
        "ConvTasNet": (lambda: models.ConvTasNet(2, 16, 32, 3, 16, 32, 2, 2), (sound(2, 1, 800),)),
        "DeepSpeech": (lambda: models.DeepSpeech(16, 32, 10), (sound(2, 1, 20, 16),)),
        "Emformer": (
            lambda: models.Emformer(16, 4, 32, 2, 4, right_context_length=1),
            (sound(2, 17, 16), lengths(16, 16)),
        ),
        "HDemucs": (lambda: models.HDemucs(["a", "b"], channels=8, nfft=1024, depth=4), (sound(1, 2, 8000),)),
        "Tacotron2": (lambda: models.Tacotron2(n_mels=16, n_symbol=20, postnet_embedding_dim=DIM, **speech), spoken),
        "Wav2Letter": (lambda: models.Wav2Letter(10, "mfcc", 16), (sound(2, 16, 200),)),
        "Wav2Vec2": (lambda: models.wav2vec2_model(**wave), (sound(2, 2000),)),
        "WavLM": (lambda: models.wavlm_model(**wave, **buckets), (sound(2, 2000),)),
        "WaveRNN": (
            lambda: models.WaveRNN([2, 2], 16, 4, 2, 16, 16, 5, 16, 16, 16),
            (sound(2, 1, 32), sound(2, 1, 16, 12)),
        ),
    }
    return {name: lambda model=model, given=given: (model(), given, {}) for name, (model, given) in made.items()}


TDNN = {"channels": [32, 32, 32, 32, 96], "kernel_sizes": [5, 3, 3, 3, 1], "dilations": [1, 2, 3, 4, 1]}
XVECTOR = {"tdnn_channels": [16, 16], "tdnn_kernel_sizes": [3, 1], "tdnn_dilations": [1, 1], "tdnn_blocks": 2}
RECURRENT = {"rnn_layers": 1, "rnn_neurons": 16, "dnn_blocks": 1, "dnn_neurons": 16}
ATTENTION = {"d_model": 32, "nhead": 4, "num_encoder_layers": 2, "d_ffn": 64}
ASR = {"tgt_vocab": 20, "input_size": 16, "num_decoder_layers": 2, **ATTENTION}
RELATIVE = {"normalize_before": True, "attention_type": "RelPosMHAXL", "kernel_size": 5}
BRANCHES = {"encoder_module": "branchformer", "csgu_linear_units": 32}
RESNET = {"channels": [16] * 4, "block_sizes": [1] * 4, "lin_neurons": 16}

CONTEXT = {"out_channels": 16, "conv_channels": [16] * 21}

# Where a model of speechbrain is, its options, and which inputs it takes.
BRAINS: dict[str, tuple[str, dict[str, Any], str]] = {
    "ECAPA_TDNN": (
        "lobes.models.ECAPA_TDNN.ECAPA_TDNN",
        {"input_size": 16, "lin_neurons": 16, "attention_channels": 16, **TDNN},
        "features",
    ),
    "Xvector": ("lobes.models.Xvector.Xvector", {"in_channels": 16, "lin_neurons": 16, **XVECTOR}, "features"),
    "CRDNN": (
        "lobes.models.CRDNN.CRDNN",
        {"input_size": 16, "cnn_blocks": 1, "cnn_channels": [8], **RECURRENT},
        "features",
    ),
    "VanillaNN": (
        "lobes.models.VanillaNN.VanillaNN",
        {"input_shape": [2, 30, 16], "dnn_blocks": 2, "dnn_neurons": 16},
        "features",
    ),
    "ResNet": ("lobes.models.ResNet.ResNet", {"input_size": 16, **RESNET}, "features"),
    "RNNLM": ("lobes.models.RNNLM.RNNLM", {"output_neurons": 20, "embedding_dim": 16, **RECURRENT}, "tokens"),
    "TransformerLM": (
        "lobes.models.transformer.TransformerLM.TransformerLM",
        {"vocab": 20, "num_decoder_layers": 0, **ATTENTION},
        "tokens",
    ),
    "TransformerASR": ("lobes.models.transformer.TransformerASR.TransformerASR", ASR, "both"),
    "ConformerASR": (
        "lobes.models.transformer.TransformerASR.TransformerASR",
        {**ASR, **RELATIVE, "encoder_module": "conformer"},
        "both",
    ),
    "BranchformerASR": (
        "lobes.models.transformer.TransformerASR.TransformerASR",
        {**ASR, **RELATIVE, **BRANCHES},
        "both",
    ),
    "ContextNet": ("lobes.models.ContextNet.ContextNet", {"input_shape": (2, 30, 16), **CONTEXT}, "features"),
    "LSTM": ("nnet.RNN.LSTM", {"hidden_size": 16, "input_size": 16}, "features"),
    "LiGRU": ("nnet.RNN.LiGRU", {"hidden_size": 16, "input_shape": [2, 30, 16]}, "features"),
    "QLSTM": ("nnet.quaternion_networks.q_RNN.QLSTM", {"hidden_size": 16, "input_shape": [2, 30, 16]}, "features"),
}


def brain_names() -> list[str]:
    """Return the models of speechbrain."""
    import speechbrain  # noqa: F401

    return list(BRAINS)


def build_brain(name: str) -> Call:
    """Return a model of speechbrain."""
    path, options, takes = BRAINS[name]
    module, _, cls = path.rpartition(".")
    found = getattr(importlib.import_module(f"speechbrain.{module}"), cls)
    inputs = {"features": sound(2, 30, 16), "tokens": torch.randint(1, 20, (2, 9))}
    return found(**options), tuple(inputs.values()) if takes == "both" else (inputs[takes],), {}


# --- pytorch-forecasting: each network on one small data set


FORECASTERS = (
    "DecoderMLP DeepAR NBeats NBeatsKAN NHiTS RecurrentNetwork TemporalFusionTransformer TiDEModel TimeXer xLSTMTime"
)


def forecasting_names() -> list[str]:
    """Return the networks that this version has."""
    import pytorch_forecasting

    return [name for name in FORECASTERS.split() if hasattr(pytorch_forecasting, name)]


def build_forecasting(name: str) -> Call:
    """Return a network made for a small series, and a batch of it."""
    import pandas
    import pytorch_forecasting as forecasting

    steps = 40
    table = pandas.DataFrame(
        {
            "time": list(range(steps)) * 2,
            "group": ["a"] * steps + ["b"] * steps,
            "value": torch.randn(2 * steps).tolist(),
        }
    )
    shape = {"max_encoder_length": 12, "min_encoder_length": 12, "max_prediction_length": 4, "min_prediction_length": 4}
    data = forecasting.TimeSeriesDataSet(
        table,
        "time",
        "value",
        ["group"],
        time_varying_unknown_reals=["value"],
        target_normalizer=forecasting.EncoderNormalizer(),
        **shape,
    )
    cls = getattr(forecasting, name)
    accepted = inspect.signature(cls.__init__).parameters
    options = {
        key: 8
        for key in ("hidden_size", "hidden_continuous_size", "d_model", "widths")
        if key in accepted and key != "widths"
    }
    batch, _ = next(iter(data.to_dataloader(train=False, batch_size=2)))
    return cls.from_dataset(data, **options), (dict(batch),), {}
