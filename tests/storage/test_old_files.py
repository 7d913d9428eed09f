"""Files that earlier versions wrote load bit for bit, and the same adapter still gives the same bytes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from lightning_lora import LoRACallback, adapter_state_dict, load_adapter, save_adapter
from lightning_lora.names import join
from tests.contract import assert_same_bits
from tests.storage.old_files import FOLDER, OPTIONS, Module, tokens
from tests.toys import trainer


def values() -> dict[str, torch.Tensor]:
    return torch.load(FOLDER / "values.pt", weights_only=True)


@pytest.mark.parametrize("name", ["adapter.ckpt", "peft"])
def test_old_file_loads_bit_for_bit(name: str):
    module = Module()
    load_adapter(module, FOLDER / name)
    found = adapter_state_dict(module)
    if name == "peft":  # which has one update for a whole weight where the slices have theirs
        assert_same_bits(
            {key: value for key, value in found.items() if "qkv.lora" not in key},
            {key: value for key, value in values().items() if "qkv.lora" not in key},
        )
    else:
        assert_same_bits(found, values())


def test_old_peft_directory_computes_what_the_old_checkpoint_does():
    of_checkpoint, of_directory = Module(), Module()
    load_adapter(of_checkpoint, FOLDER / "adapter.ckpt")
    load_adapter(of_directory, FOLDER / "peft")
    torch.testing.assert_close(of_directory(tokens()), of_checkpoint(tokens()), rtol=0, atol=1e-6)


@pytest.mark.parametrize("file", ["adapter_model.safetensors", "adapter_config.json"])
def test_same_adapter_gives_the_bytes_of_the_old_version(file: str, tmp_path: Path):
    module = Module()
    load_adapter(module, FOLDER / "adapter.ckpt")
    save_adapter(module, tmp_path / "peft")
    found, expected = (tmp_path / "peft" / file).read_bytes(), (FOLDER / "peft" / file).read_bytes()
    if file == "adapter_config.json":  # what has been added since then
        lines = found.decode().splitlines(keepends=True)
        config = json.loads(found)
        assert config.pop("auto_mapping").keys() == {"base_model_class", "parent_library"}
        assert len(lines) == len(expected.decode().splitlines()) + 4
        assert config == json.loads(expected)
    else:
        size, was = (int.from_bytes(each[:8], "little") for each in (found, expected))
        header, old = (json.loads(each[8 : 8 + length]) for each, length in ((found, size), (expected, was)))
        assert header["__metadata__"].pop("lightning_lora_root") == "net"
        bases = [json.loads(each["__metadata__"].pop("lightning_lora_base")) for each in (header, old)]
        assert bases[0].pop("embed.weight[-1]")["shape"] == [8]
        assert bases[0] == bases[1]
        assert (header, found[8 + size :]) == (old, expected[8 + was :])


def test_old_checkpoint_resumes():
    module, data = Module(), DataLoader(TensorDataset(tokens(), torch.arange(6) % 3), 3)
    resumed = trainer(LoRACallback(**OPTIONS), max_steps=6)
    resumed.fit(module, data, ckpt_path=FOLDER / "adapter.ckpt")
    assert resumed.global_step == 6
    [steps] = {int(state["step"]) for state in resumed.optimizers[0].state.values()}
    assert steps == 6


def test_old_checkpoint_gives_its_options_to_a_bare_callback():
    module, data = Module(), DataLoader(tokens(), 3)
    trainer(LoRACallback()).predict(module, data, ckpt_path=FOLDER / "adapter.ckpt")
    assert_same_bits(adapter_state_dict(module), values())


def test_fixture_covers_every_kind_of_trained_tensor():
    names = values()
    wanted = [join("net", name) for name in ("fc.lora.A", "conv.lora.B", "qkv.lora.q.A", "experts.lora.weight.B")]
    wanted += ["net.embed.lora.rows", "net.head.weight", "net.fc.bias"]
    assert set(wanted) <= names.keys()
