"""What PEFT cannot express is refused with the reason, and nothing is written."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_lora import LoRAConfig, attach, load_adapter, merged, preflight, save_adapter
from tests.contract import ScaledEmbedding, raises_and_changes_nothing
from tests.peft_format.kinds import WARNED, Experts, Holder
from tests.peft_format.models import trained, trained_by_peft

pytestmark = WARNED


class Outer(Experts):
    """Parameters beside a module that has its own."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Experts()


class Widened(nn.Conv2d):
    """A convolution that chooses its own sizes."""

    def __init__(self, width: int) -> None:
        super().__init__(width, 2 * width, 3)


class CheckedAttention(nn.Module):
    """Attention among alternatives of other classes."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x)[0] if isinstance(self.attention, nn.MultiheadAttention) else x


class ReadAttention(CheckedAttention):
    """Attention whose projections the parent computes."""

    def forward(self, x: Tensor) -> Tensor:
        return self.attention.out_proj(nn.functional.linear(x, self.attention.in_proj_weight)[..., -8:])


class Uncalled(nn.Module):
    """A parameter that the parent reads."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Parameter(torch.randn(8, 8))


REFUSED: dict[str, tuple[Callable[[], nn.Module], dict[str, Any], str]] = {
    "transposed convolution": (lambda: nn.ConvTranspose2d(4, 4, 3), {}, "layer: PEFT has no adapter for transposed"),
    "grouped convolution": (lambda: nn.Conv2d(4, 8, 3, groups=2), {}, "layer: groups=2"),
    "dilated convolution": (lambda: nn.Conv2d(4, 8, 3, dilation=2), {}, r"layer: dilation=\(2, 2\)"),
    "padding by reflection": (lambda: nn.Conv2d(4, 8, 3, padding_mode="reflect"), {}, "layer: padding_mode='reflect'"),
    "LSTM": (lambda: nn.LSTM(8, 8), {}, "layer.weight_ih_l0: PEFT has no adapter for LSTM"),
    "cell": (lambda: nn.GRUCell(8, 8), {}, "layer.weight_hh: PEFT has no adapter for GRUCell"),
    "bilinear": (lambda: nn.Bilinear(8, 8, 8), {}, "layer.weight: PEFT has no adapter for Bilinear"),
    "bag": (lambda: nn.EmbeddingBag(20, 8), {}, "layer.weight: PEFT has no adapter for EmbeddingBag"),
    "scaled embedding": (lambda: ScaledEmbedding(20, 8), {}, "layer: it has a custom forward"),
    "attention of several sizes": (
        lambda: nn.MultiheadAttention(8, 2, kdim=6),
        {},
        "query, key and value have the same",
    ),
    "DoRA of attention": (
        lambda: nn.MultiheadAttention(8, 2),
        {"use_dora": True},
        "layer: PEFT has no DoRA for attention",
    ),
    "DoRA of a parameter": (
        Experts,
        {"target_modules": [], "target_parameters": ["mix"], "use_dora": True},
        "layer.mix: PEFT has no DoRA for parameters",
    ),
    "DoRA with a bias": (lambda: nn.Linear(8, 8), {"use_dora": True, "lora_bias": True}, "lora_bias with DoRA"),
    "four dimensions": (
        lambda: nn.Conv2d(4, 8, 3),
        {"target_modules": [], "target_parameters": ["layer.weight"]},
        "layer.weight: PEFT adapts parameters of two or three",
    ),
    "weight of a linear layer as a parameter": (
        lambda: nn.Linear(8, 8),
        {"target_modules": [], "target_parameters": ["layer.weight"]},
        "layer.weight: PEFT applies the update of a parameter only while the layer itself runs",
    ),
    "parameter in a dictionary": (
        lambda: nn.ParameterDict({"mix": nn.Parameter(torch.randn(8, 8))}),
        {"target_modules": [], "target_parameters": ["layer.mix"]},
        "layer.mix: PEFT adapts parameters while their module is called, and a ParameterDict never is",
    ),
    "parameter that the parent reads": (
        Uncalled,
        {"target_modules": [], "target_parameters": ["layer.mix"]},
        "layer.mix: PEFT adapts parameters while their module is called, and a Uncalled never is",
    ),
    "parameters inside each other's module": (
        Outer,
        {"target_modules": [], "target_parameters": ["layer.mix", "layer.inner.mix"]},
        "layer.inner.mix: PEFT wraps 'layer' for a parameter of it, and then does not find this one",
    ),
    "convolution with a constructor of its own": (
        lambda: Widened(4),
        {},
        "layer: PEFT calls Widened with the arguments of torch's convolutions",
    ),
    "attention whose class is checked": (
        CheckedAttention,
        {"target_modules": ["out_proj"]},
        "layer.attention: CheckedAttention reads the weights or checks the class of this attention",
    ),
    "attention whose weights are read": (
        ReadAttention,
        {"target_modules": ["layer.attention"]},
        "layer.attention: ReadAttention reads the weights or checks the class of this attention",
    ),
    "one transposed expert": (
        lambda: Experts(True, experts=1),
        {"target_modules": [], "target_parameters": ["up"]},
        "layer.up: PEFT reads a transposed stack of one",
    ),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_inexpressible_adapter_is_refused_with_reason(kind: str, tmp_path: Path) -> None:
    build, options, reason = REFUSED[kind]
    ours = trained(Holder(build()), **({"target_modules": ["layer"]} | options))
    with pytest.raises(ValueError, match="PEFT cannot express this adapter; nothing was written") as caught:
        save_adapter(ours, tmp_path / "adapter")
    assert caught.match(reason)
    assert not any(tmp_path.iterdir())
    found = preflight(ours)
    assert not found.peft_accepts
    assert reason.split(":")[0].replace("\\", "") in str(found)


def test_reasons_are_listed_in_one_error(tmp_path: Path) -> None:
    model = nn.Sequential(nn.ConvTranspose1d(4, 4, 3), nn.Linear(8, 8), nn.LSTM(8, 8), nn.BatchNorm1d(8))
    ours = trained(model, target_modules=["0", "1", "2"], frozen_norm="track")
    with pytest.raises(ValueError, match="transposed") as caught:
        save_adapter(ours, tmp_path / "adapter")
    lines = str(caught.value).splitlines()[1:]
    assert [line.split(":")[0].strip(" -") for line in lines] == [
        *("0", "2.weight_ih_l0", "2.weight_hh_l0"),
        *("3.running_mean", "3.running_var", "3.num_batches_tracked"),
    ]


class Tied(nn.Module):
    """An embedding and a head that share their weight, of which no transformers config tells."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(20, 8), nn.Linear(8, 20, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.embed(x))


def test_tied_token_rows_are_refused(tmp_path: Path) -> None:
    ours = trained(Tied(), target_modules=[], trainable_token_indices={"embed": [1, 2]})
    with pytest.raises(ValueError, match=r"embed: PEFT would train the rows of the embedding alone, not of \['head'\]"):
        save_adapter(ours, tmp_path)


class Shared(nn.Module):
    """One layer under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(8, 8)
        self.second = self.first
        self.head, self.other_head = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.second(torch.relu(self.first(x))))


def test_layer_with_two_names_is_refused_on_save(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="first: the model reaches it by 2 names"):
        save_adapter(trained(Shared(), target_modules=["first"]), tmp_path)


def test_layer_with_two_names_is_refused_on_load(tmp_path: Path) -> None:
    trained_by_peft(Shared(), target_modules=["first"]).save_pretrained(tmp_path)
    model = Shared()
    with raises_and_changes_nothing(model, ValueError, "reaches it by 2 names"):
        load_adapter(model, tmp_path)


def test_module_to_save_that_ends_other_name_is_refused(tmp_path: Path) -> None:
    ours = Shared()
    attach(ours, LoRAConfig(rank=1, target_modules=["other_head"], modules_to_save=["head"]))
    with pytest.raises(ValueError, match="head: PEFT matches modules_to_save by the ends of names, and 'other_head'"):
        save_adapter(ours, tmp_path)


def test_conv1d_with_target_parameters_is_refused(tmp_path: Path) -> None:
    conv1d = pytest.importorskip("transformers.pytorch_utils").Conv1D
    model = nn.ModuleDict({"a": conv1d(8, 8), "b": Experts()})
    ours = trained(model, target_modules=["a"], target_parameters=["up"])
    with pytest.raises(ValueError, match=r"b.up: PEFT cannot combine parameters with transformers' Conv1D"):
        save_adapter(ours, tmp_path)


def test_saving_inside_merged_is_refused(tmp_path: Path) -> None:
    ours = trained(nn.Sequential(nn.Linear(8, 8)))
    with merged(ours), pytest.raises(RuntimeError, match="leave merged"):
        save_adapter(ours, tmp_path / "adapter")
    assert not any(tmp_path.iterdir())


class ReadsWeight(nn.Module):
    """As timm's BEiT: it calls the projection or reads its weight, as the options say."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.qkv(x) if self.qkv.bias is None else nn.functional.linear(x, self.qkv.weight)
        return self.out(x)


def test_layer_whose_parent_reads_its_weight_is_refused(tmp_path: Path) -> None:
    model = trained(ReadsWeight(), target_modules=["qkv", "out"])
    with pytest.raises(ValueError, match=r"qkv: PEFT adds .* its parent, a ReadsWeight, reads its weight"):
        save_adapter(model, tmp_path / "adapter")
    assert not list(tmp_path.iterdir())
