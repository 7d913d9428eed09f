"""Run the code blocks of README.md, in order and unchanged."""

from __future__ import annotations

import dataclasses
import re
import shlex
import shutil
from pathlib import Path
from typing import Any

import lightning.pytorch.cli  # noqa: F401 - before Trainer is replaced for a test
import pytest
import torch
import yaml
from lightning.pytorch import Trainer
from safetensors.torch import load_file, save_file
from torch import nn

from lightning_lora import LoRACallback, load_adapter, lora_layers, merge
from lightning_lora.cli import main
from lightning_lora.storage.checkpoint import RECORD_KEY
from tests.toys import FEATURES, Toy, loader

pytestmark = pytest.mark.filterwarnings("ignore:These adapters are not smaller.*", "ignore:.*args parameter.*")

README = (Path(__file__).parent.parent / "README.md").read_text()
SECTIONS = {part.partition("\n")[0]: part for part in re.split(r"^## ", README, flags=re.M)}


class LitModel(Toy):
    """A model whose layer names appear in the README."""

    def build(self) -> None:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.blocks = nn.ModuleList(nn.ModuleDict(self.block()) for _ in range(2))
            self.head = nn.Linear(FEATURES, FEATURES)

    @staticmethod
    def block() -> dict[str, nn.Module]:
        projections: dict[str, nn.Module] = {name: nn.Linear(FEATURES, FEATURES) for name in ("q_proj", "v_proj")}
        return projections | {"mlp": nn.ModuleDict({"fc1": nn.Linear(FEATURES, FEATURES)})}

    def net(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = x + torch.tanh(block["q_proj"](x)) * block["v_proj"](x) + block["mlp"]["fc1"](x)
        return self.head(x)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net(x)


def code(title: str, language: str = "python") -> str:
    return "\n".join(re.findall(rf"```{language}\n(.*?)```", SECTIONS[title], flags=re.S))


@pytest.fixture
def names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Return the names a reader has before the first line: a module, data, a quiet Trainer and an adapter file."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PL_GLOBAL_SEED", "0")
    monkeypatch.setenv("JSONARGPARSE_DEPRECATION_WARNINGS", "off")
    quiet = {"logger": False, "enable_progress_bar": False, "accelerator": "cpu", "enable_model_summary": False}

    class QuietTrainer(Trainer):
        def __init__(self, **options: Any) -> None:
            super().__init__(**(quiet | {"devices": 1} | {k: v for k, v in options.items() if k != "devices"}))

    monkeypatch.setattr("lightning.pytorch.Trainer", QuietTrainer)
    found = {
        "Trainer": QuietTrainer,
        "LitModel": LitModel,
        "LoRACallback": LoRACallback,
        "model": LitModel(),
        "x": torch.randn(2, FEATURES),
        "train_loader": loader(),
        "test_loader": loader(),
        "trainer": QuietTrainer(max_epochs=1, callbacks=[LoRACallback(rank=2)]),
    }
    source = LitModel()
    found["trainer"].fit(source, loader())
    found["trainer"].save_checkpoint("adapter.ckpt")
    return found


def test_quickstart(names: dict[str, Any]) -> None:
    exec(code("# lightning-lora" if "# lightning-lora" in SECTIONS else next(iter(SECTIONS))), names)
    assert len(names["model"].losses) == 3 * 4
    names["trainer"].save_checkpoint("first.ckpt")
    assert RECORD_KEY in torch.load("first.ckpt", weights_only=True)


def test_choosing_targets(names: dict[str, Any]) -> None:
    exec(code("Choose what to adapt"), names)
    names["Trainer"](max_epochs=1, callbacks=[names["callback"]]).fit(names["model"], loader())
    adapted = {name for name, module in names["model"].named_modules() if type(module).__name__ == "LoRALinear"}
    assert adapted == {"blocks.1.q_proj", "blocks.1.v_proj", "blocks.1.mlp.fc1"}


@pytest.mark.filterwarnings("ignore:.*no last checkpoint available.*")
def test_resume_evaluate_swap(names: dict[str, Any]) -> None:
    names["trainer"] = names["Trainer"](max_epochs=1, callbacks=[LoRACallback(rank=2)])
    exec(code("Resume, evaluate, swap"), names)
    assert not torch.equal(names["base_prediction"], names["model"](names["x"]))
    assert torch.equal(names["base_prediction"], LitModel()(names["x"]))


@pytest.mark.filterwarnings("ignore:LoRASweep. training_step changes losses in place")
def test_try_many_settings(names: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    exec(code("Try many settings in one fit"), names)
    assert names["sweep"].best in capsys.readouterr().out
    assert len(names["sweep"].table()) == 6


def test_merge(names: dict[str, Any]) -> None:
    model = names["model"]
    load_adapter(model, "adapter.ckpt")
    expected = model(names["x"])
    exec(code("Merge"), names)
    torch.testing.assert_close(names["fast_prediction"], expected)
    torch.testing.assert_close(model(names["x"]), expected)
    assert all(type(module).__name__ != "LoRALinear" for module in model.modules())


def test_share_with_peft(names: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    from lightning_lora import adapter_state_dict

    load_adapter(names["model"], "adapter.ckpt")
    exec(code("Share with PEFT and vLLM"), names)
    assert "PEFT yes, vLLM yes" in capsys.readouterr().out
    for directory in ("adapter", "adapter-for-vllm"):
        fresh = LitModel()
        load_adapter(fresh, directory)
        assert adapter_state_dict(fresh).keys() == adapter_state_dict(names["model"]).keys()
        torch.testing.assert_close(fresh(names["x"]), names["model"](names["x"]))
    names["callback"].config = dataclasses.replace(names["callback"].config, rank=4)  # the model is small
    tuned = LitModel()
    names["Trainer"](max_epochs=1, callbacks=[names["callback"]]).fit(tuned, loader())
    again = LitModel()
    load_adapter(again, "tuned")
    torch.testing.assert_close(again(names["x"]), tuned(names["x"]))


def test_command(names: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    Path("base").mkdir()
    save_file(LitModel().state_dict(), "base/model.safetensors")
    Path("base/config.json").write_text('{"model_type": "toy"}')
    shutil.copy("adapter.ckpt", "other.ckpt")
    for line in code("The lightning-lora command", "bash").splitlines():
        program, *arguments = shlex.split(line, comments=True)
        assert (program, main(arguments)) == ("lightning-lora", 0)
    assert "the adapters are equal" in capsys.readouterr().out
    model = names["model"]
    load_adapter(model, "adapter.ckpt")
    merge(model)
    written = load_file("whole/model.safetensors")
    assert [name for name, value in model.state_dict().items() if not torch.equal(written[name], value)] == []


def test_lightning_cli(names: dict[str, Any]) -> None:
    [callback] = yaml.safe_load(code("LightningCLI", "yaml"))["trainer"]["callbacks"]
    assert callback["class_path"] == "lightning_lora.LoRACallback"
    assert LoRACallback(**callback["init_args"]).config.rank == 8
    exec(code("LightningCLI"), names)
    cli = names["CLI"](LitModel, run=False, args=["--lora.rank", "8"], trainer_class=Trainer)
    assert any(isinstance(c, LoRACallback) and c.config.rank == 8 for c in cli.trainer.callbacks)


@pytest.mark.distributed
def test_several_gpus(names: dict[str, Any]) -> None:
    names["LitModel"] = Toy  # whose net is a Sequential
    whole = code("Several GPUs")
    exec(whole[: whole.index("import lightning_lora")], names)
    assert type(names["trainer"].strategy).__name__ == "DDPStrategy"
    try:
        exec(whole, names)
        strategy = names["ModelParallelStrategy"](process_group_backend="gloo")
        trainer = names["Trainer"](max_steps=2, strategy=strategy, callbacks=[LoRACallback(rank=2)])
        trainer.fit(names["sharded"], loader())
        assert len(lora_layers(names["sharded"])) == 3
        assert isinstance(names["sharded"].net, names["FSDPModule"])
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


def test_without_trainer(names: dict[str, Any]) -> None:
    exec(code("Without a Trainer"), names)
    assert [group["lr"] for group in names["optimizer"].param_groups] == pytest.approx([1e-3, 16e-3])
    assert "LoRA: 7 layers adapted" in str(names["report"])


def test_every_python_block_is_tested() -> None:
    tested = re.findall(r'code\("([^"]+)"\)', Path(__file__).read_text())
    with_code = [title for title, part in SECTIONS.items() if "```python" in part]
    assert set(with_code[1:]) <= set(tested)


def test_links_resolve() -> None:
    root = Path(__file__).parent.parent
    missing = [link for link in re.findall(r"\]\(([\w./-]+)(?:#[\w-]+)?\)", README) if not (root / link).exists()]
    assert not missing
