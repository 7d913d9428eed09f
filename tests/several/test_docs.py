"""The code blocks of docs/several_adapters.md, run in order and unchanged, do what the page says."""

from __future__ import annotations

import math
import re
import shlex
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter
from torch.nn.functional import log_softmax

from lightning_lora import (
    LoRACallback,
    LoRAConfig,
    adapter_names,
    adapter_state_dict,
    add_adapter,
    disabled,
    load_adapter,
    save_adapter,
    using,
)
from lightning_lora.cli import main
from tests.contract import assert_same_bits, train_all
from tests.files import write_checkpoint
from tests.toys import FEATURES, Toy, loader, trainer

pytestmark = pytest.mark.filterwarnings("ignore:These adapters are not smaller.*")

PAGE = (Path(__file__).parents[2] / "docs" / "several_adapters.md").read_text()
BEFORE, _, ARITHMETIC = PAGE.partition("## Arithmetic")
BLOCKS = re.findall(r"```python\n(.*?)```", BEFORE, flags=re.S)


STATIC = {"force_parameter_static_shapes": True, "force_nn_module_property_static_shapes": True}  # torch's defaults


class LitModel(Toy):
    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


def log_prob(model: nn.Module, x: Tensor) -> Tensor:
    return log_softmax(model(x), dim=-1)[:, 0]


@pytest.fixture(scope="module")
def names(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Return what the page's blocks left, run one after another."""
    quiet = {"logger": False, "enable_progress_bar": False, "enable_checkpointing": False, "accelerator": "cpu"}

    class QuietTrainer(Trainer):
        def __init__(self, **options: Any) -> None:
            super().__init__(**(quiet | {"devices": 1, "enable_model_summary": False} | options))

    folder, other = tmp_path_factory.mktemp("page"), LitModel()
    run = trainer(LoRACallback(rank=3))
    run.fit(other, loader())
    run.save_checkpoint(folder / "adapter.ckpt")
    torch.manual_seed(0)
    found: dict[str, Any] = {"LitModel": LitModel, "german_loader": loader(), "sst2_loader": loader(shuffle=True)}
    found |= {"x": torch.randn(3, FEATURES), "four_samples": torch.randn(4, FEATURES), "log_prob": log_prob}
    found |= {"chosen": torch.randn(5, FEATURES), "rejected": torch.randn(5, FEATURES)}
    torch.compiler.reset()
    found["graphs"] = CompileCounter()
    with pytest.MonkeyPatch.context() as patch, torch._dynamo.config.patch(STATIC):  # which restores what the page sets
        patch.chdir(folder)
        patch.setattr("lightning.pytorch.Trainer", QuietTrainer)
        patch.setattr("torch.compile", partial(torch.compile, backend=found["graphs"]))
        for block in BLOCKS:
            exec(block, found)
    return found


def test_adapters_are_those_that_the_page_lists(names: dict[str, Any]):
    assert adapter_names(names["model"]) == ["german", "sst2", "third", "reference"]
    assert torch.equal(names["base_prediction"], LitModel()(names["x"]))
    with using(names["model"], "sst2"):
        assert torch.equal(names["sst2_prediction"], names["model"](names["x"]))


def test_the_compiled_model_has_two_graphs_for_three_ranks(names: dict[str, Any]):
    assert names["graphs"].frame_count == 2
    with using(names["model"], "third"):
        torch.testing.assert_close(names["prediction"], names["model"](names["x"]))


def test_routed_samples_have_their_adapters(names: dict[str, Any]):
    model, x = names["model"], names["four_samples"]
    for row, name in enumerate(["reference", "sst2", None, "reference"]):  # what german was then
        with using(model, name):
            torch.testing.assert_close(names["predictions"][row], model(x)[row])


def test_first_loss_is_ln_2_and_the_reference_stays(names: dict[str, Any]):
    assert names["first_loss"].item() == pytest.approx(math.log(2), abs=1e-7)
    model = names["model"]
    with using(model, "reference"):
        before = adapter_state_dict(model)
    for _ in range(20):
        names["optimizer"].zero_grad()
        loss = names["dpo_loss"](names["chosen"], names["rejected"])
        loss.backward()
        names["optimizer"].step()
    assert loss.item() < 0.9 * math.log(2)
    with using(model, "reference"):
        assert_same_bits(adapter_state_dict(model), before)


def test_scaled_lies_between(names: dict[str, Any]):
    model, x = names["model"], names["x"]
    with disabled(model):
        bare = model(x)
    assert not torch.equal(names["weaker"], bare)
    assert not torch.equal(names["weaker"], model(x))


def test_sums_are_made_as_the_page_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    model = LitModel()
    for seed, name in enumerate(("german", "sst2")):
        add_adapter(model, name, LoRAConfig(rank=2 + 2 * seed), seed=seed)
        with using(model, name):
            train_all(model, torch.Generator().manual_seed(seed))
            write_checkpoint(model, tmp_path / f"{name}.ckpt")
            save_adapter(model, tmp_path / f"{name}-peft")
    for block in re.findall(r"```python\n(.*?)```", ARITHMETIC, flags=re.S):
        exec(block, {"model": model, "LitModel": LitModel, "add_adapter": add_adapter})
    assert adapter_names(model)[2:] == ["mean", "difference", "half", "small"]
    for line in "".join(re.findall(r"```bash\n(.*?)```", ARITHMETIC, flags=re.S)).splitlines():
        program, *arguments = shlex.split(line, comments=True)
        assert (program, main(arguments)) == ("lightning-lora", 0)
    x, outputs = torch.randn(3, FEATURES), []
    for place in ("sum-peft", "sum"):
        again = LitModel()
        load_adapter(again, place)
        outputs.append(again(x))
    assert torch.equal(*outputs)
