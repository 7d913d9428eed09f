"""The preflight says what PEFT and vLLM will make of an adapter, layer by layer."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lightning_lora import LoRAConfig, attach, preflight, save_adapter
from lightning_lora.peft_format.config import parse_config


def test_plain_adapter_is_accepted(tiny):
    attach(tiny, LoRAConfig(rank=2, target_modules=["q_proj", "v_proj"]))
    found = preflight(tiny)
    assert found.peft_accepts
    assert found.vllm_accepts
    assert {row.name for row in found.rows} == {f"blocks.{i}.{key}_proj" for i in (0, 1) for key in "qv"}
    assert str(found).splitlines()[0] == "Export of the module itself: PEFT yes, vLLM yes"
    assert "vLLM needs max_lora_rank >= 2." in str(found)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"rank_pattern": {"0.q_proj": 1}}, "ignores patterns: save with uniform_rank=True"),
        ({"alpha_pattern": {"0.q_proj": 1}}, "ignores patterns: save with uniform_rank=True"),
        ({"use_dora": True}, "no DoRA"),
        ({"lora_bias": True}, "no bias in lora_B"),
        ({"bias": "all"}, "no biases"),
        ({"modules_to_save": ["head"]}, "no modules_to_save"),
        ({"trainable_token_indices": [1]}, "no trainable tokens"),
    ],
)
def test_vllm_obstacles_are_reported(options, reason, tiny):
    attach(tiny, LoRAConfig(**({"rank": 2, "target_modules": ["q_proj"]} | options)))
    found = preflight(tiny)
    assert found.peft_accepts
    assert not found.vllm_accepts
    assert reason in [row.vllm for row in found.rows]
    assert reason in str(found)


def test_peft_obstacles_are_reported_and_not_written(tiny, tmp_path):
    tiny.up = nn.ConvTranspose1d(4, 4, 3)
    attach(tiny, LoRAConfig(rank=2, target_modules=["q_proj", "up"]))
    found = preflight(tiny)
    [refused] = [row for row in found.rows if row.peft != "yes"]
    assert (refused.name, refused.vllm) == ("up", "not in the files")
    assert "PEFT no, vLLM no" in str(found)
    with pytest.raises(ValueError, match=refused.peft):
        save_adapter(tiny, tmp_path)


def test_uniform_rank_pads_all_layers(tiny, tmp_path):
    """As such a loader sees it: one rank, one scaling, and factors whose product is each layer's update."""
    import json

    from safetensors.torch import load_file

    options = {"rank_pattern": {"0.q_proj": 1, "v_proj": 3}, "alpha_pattern": {"1.q_proj": 7}}
    attach(tiny, LoRAConfig(rank=2, alpha=3.0, target_modules=["q_proj", "v_proj"], **options))
    for index in (0, 1):
        for key in ("q_proj", "v_proj"):
            nn.init.normal_(tiny.blocks[index][key].lora.B)
    save_adapter(tiny, tmp_path, uniform_rank=True)
    config, tensors = (
        json.loads((tmp_path / "adapter_config.json").read_text()),
        load_file(tmp_path / "adapter_model.safetensors"),
    )
    assert parse_config(config)[0].rank == 3
    assert (config["rank_pattern"], config["alpha_pattern"]) == ({}, {})
    for index in (0, 1):
        for key in ("q_proj", "v_proj"):
            path = f"base_model.model.blocks.{index}.{key}"
            A, B = (tensors[f"{path}.lora_{factor}.weight"] for factor in "AB")
            assert (A.shape[0], B.shape[1]) == (3, 3)
            update = config["lora_alpha"] / config["r"] * B @ A
            torch.testing.assert_close(update, tiny.blocks[index][key].delta_weight())
