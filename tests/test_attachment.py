"""What attaching says it did, as numbers that add up and as a table."""

from __future__ import annotations

import re

import pytest
from torch import nn

from lightning_lora import LoRAConfig, adapter_state_dict, attach, lora_layers


def test_report_counts_layers_and_parameters(tiny):
    base = sum(p.numel() for p in tiny.parameters())
    report = attach(tiny, LoRAConfig(rank=2, target_modules=["embed", "v_proj"], modules_to_save=["head"]))
    adapters = sum(p.numel() for layer in lora_layers(tiny).values() for p in layer.lora.parameters())
    assert report.base_parameters == base
    assert report.adapter_parameters == adapters
    assert report.trainable_parameters == sum(p.numel() for p in tiny.parameters() if p.requires_grad)
    assert report.trainable_parameters == sum(tensor.numel() for tensor in adapter_state_dict(tiny).values())
    assert report.saved == {"head": 16 * 8 + 8}
    assert {layer.name: layer.parameters for layer in report.layers} == {
        name: layer.lora.A.numel() + layer.lora.B.numel() for name, layer in lora_layers(tiny).items()
    }


def test_attaching_again_gives_the_same_report(tiny):
    config = LoRAConfig(rank=2, modules_to_save=["head"], exclude_modules=["blocks.1"])
    assert attach(tiny, config) == attach(tiny, config)


@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "head"], r".*_proj|head"])
def test_report_names_pattern_and_dtype_of_each_layer(targets, tiny):
    tiny.head.double()
    report = attach(tiny, LoRAConfig(rank=2, target_modules=targets, adapter_dtype="bfloat16"))
    layers = {layer.name: layer for layer in report.layers}
    entry = {"blocks.0.q_proj": "q_proj", "head": "head"}
    for name, expected in entry.items():
        assert layers[name].pattern == (expected if isinstance(targets, list) else targets)
    assert (layers["blocks.0.q_proj"].dtype, layers["head"].dtype) == ("bfloat16", "float64")


def test_table_shows_rows_totals_and_left_out(tiny):
    config = LoRAConfig(
        rank=2, target_modules=["q_proj", "v_proj"], rank_pattern={"v_proj": 4}, exclude_modules=["0.q_proj"]
    )
    text = str(attach(tiny, config))
    rows = {line.split()[0]: line.split()[1:] for line in text.splitlines()}
    base = sum(p.numel() for name, p in tiny.named_parameters() if "lora" not in name)
    assert rows["q_proj"] == ["1", "2", "16", "64", f"{100 * 64 / base:.2f}", "%", "float32"]
    assert rows["v_proj"] == ["2", "4", "8", "256", f"{100 * 256 / base:.2f}", "%", "float32"]
    assert rows["trainable"] == ["3", "320", f"{100 * 320 / base:.2f}", "%"]
    assert "left out: blocks.0.q_proj (in exclude_modules)" in text
    assert "3 layers adapted" in text


def test_table_is_aligned(tiny):
    lines = str(attach(tiny, LoRAConfig(rank=2, modules_to_save=["embed"]))).splitlines()
    ends = {line.index(" %") for line in lines if " %" in line}
    assert len(ends) == 1


def test_table_counts_frozen_parameters(tiny):
    report = attach(tiny, LoRAConfig(rank=2, modules_to_save=["head"]))
    frozen = sum(p.numel() for p in tiny.parameters() if not p.requires_grad)
    assert f"{frozen:,} base parameters frozen" in str(report)


@pytest.mark.parametrize(
    ("frozen_norm", "says"),
    [
        ("eval", "Lightning will warn of modules in eval mode"),
        ("track", "saved with the adapter"),
    ],
)
def test_table_describes_frozen_norms(frozen_norm: str, says: str):
    model = nn.Sequential(nn.Linear(16, 16), nn.BatchNorm1d(16), nn.BatchNorm1d(16), nn.LayerNorm(16))
    report = attach(model, LoRAConfig(rank=2, frozen_norm=frozen_norm, modules_to_save=["2"]))
    assert report.norms == 1
    assert says in str(report)
    assert f"frozen_norm={frozen_norm!r}" in str(report)


def test_model_without_norms_has_no_norm_line(tiny):
    assert "frozen_norm" not in str(attach(tiny, LoRAConfig(rank=2)))


def test_long_left_out_list_is_shortened():
    model = nn.Sequential(*[nn.Linear(16, 16) for _ in range(12)])
    text = str(attach(model, LoRAConfig(rank=2, exclude_modules=["[3-9]", "10", "11"])))
    [line] = [line for line in text.splitlines() if line.startswith("left out")]
    assert line == "left out: 3, 4, 5, 6 and 5 more (in exclude_modules)"


def test_notebook_shows_the_table(tiny):
    config = LoRAConfig(rank=2, target_modules=["q_proj"], exclude_modules=["blocks.1"])
    report = attach(tiny, config)
    assert repr(report) == str(report)
    page = report._repr_html_()
    cells = [re.findall(r"<t[hd]>(.*?)</t[hd]>", row) for row in re.findall(r"<tr>(.*?)</tr>", page)]
    text = [line.split() for line in str(report).splitlines()]
    assert ["".join(row).replace(" ", "") for row in cells] == ["".join(text[i]) for i in (1, 3, 5)]
    assert "left out: blocks.1.q_proj (in exclude_modules)" in page


def test_notebook_table_escapes_names():
    report = attach(nn.Sequential(nn.Linear(4, 4)), LoRAConfig(rank=1, target_modules="(?P<name>0)"))
    assert "(?P&lt;name&gt;0)" in report._repr_html_()


class Tied(nn.Module):
    """An output layer with the weight of the embedding, and a bias that it shares, as in masked language models."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.body, self.norm, self.head = (
            nn.Embedding(6, 8),
            nn.Linear(8, 8),
            nn.Linear(8, 6),
            nn.Linear(8, 6),
        )
        self.head.weight = self.embed.weight
        self.head.bias = self.norm.bias


@pytest.mark.parametrize(
    "options",
    [
        {"modules_to_save": ["embed", "head", "norm"]},
        {"target_modules": ["body"], "bias": "all"},
        {"target_modules": ["body", "head"], "untie_weights": True},
    ],
    ids=lambda options: ", ".join(options),
)
def test_what_is_tied_is_counted_once(options):
    model = Tied()
    report = attach(model, LoRAConfig(rank=2, **options))
    trains = {flag: sum(p.numel() for p in model.parameters() if p.requires_grad is flag) for flag in (True, False)}
    adapters = sum(p.numel() for layer in lora_layers(model).values() for p in layer.lora.parameters())
    assert report.trainable_parameters == trains[True]
    assert report.base_parameters == trains[True] + trains[False] - adapters
    assert f"{trains[False]:,} base parameters frozen" in str(report)


def test_table_says_what_has_no_parameters():
    class Counts(nn.Module):
        def get_extra_state(self):
            return 1

    report = attach(nn.Sequential(nn.Linear(9, 9), Counts()), LoRAConfig(rank=1, modules_to_save=["1"]))
    assert report.saved == {"1": 0}
    assert "1 (in full, no parameters)" in str(report)
    assert "tied" not in str(report)


def test_table_says_what_is_tied_to_a_module_above():
    report = attach(Tied(), LoRAConfig(rank=2, modules_to_save=["embed", "head", "norm"]))
    assert report.saved == {"embed": 6 * 8, "norm": 8 * 6 + 6, "head": 0}
    assert "head (in full, tied, counted above)" in str(report)
    assert "norm (in full)" in str(report)
