"""LightningCLI: flags, YAML, help and invalid values."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.cli import LightningCLI
from torch import nn

from lightning_lora import LoRACallback, LoRAConfig, detach, lora_layers
from lightning_lora.config import InitOptions
from lightning_lora.ranks.schedule import RankSchedule
from tests import cli_app
from tests.toys import digest, network

ROOT = Path(__file__).parent.parent
RUN = [
    "--trainer.logger=false",
    "--trainer.enable_progress_bar=false",
    "--trainer.enable_model_summary=false",
    "--trainer.accelerator=cpu",
    "--trainer.devices=1",
    "--trainer.max_steps=4",
]
CALLBACK = ["--trainer.callbacks+=lightning_lora.LoRACallback", "--trainer.callbacks.rank=4"]

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*LightningCLI's args parameter.*", "ignore:.*will be overridden by.*", "ignore:`Trainer.fit` stopped.*"
)


@dataclass
class Outcome:
    """The outcome of a command: exit code, output, errors, and the LightningCLI object if created."""

    code: int
    output: str
    errors: str
    cli: LightningCLI | None

    @property
    def model(self) -> nn.Module:
        assert self.cli is not None, self.errors
        return self.cli.model

    @property
    def callback(self) -> LoRACallback:
        assert self.cli is not None, self.errors
        callbacks: list[Callback] = self.cli.trainer.callbacks
        return next(callback for callback in callbacks if isinstance(callback, LoRACallback))

    @property
    def moved(self) -> list[str]:
        return [name for name, layer in lora_layers(self.model).items() if layer.lora.B.any()]

    @property
    def held(self) -> list[list[int]]:
        assert self.cli is not None
        return [[len(group["params"]) for group in o.param_groups] for o in self.cli.trainer.optimizers]


Run = Callable[..., Outcome]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run the script in this process as the command line would."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("PL_GLOBAL_SEED", "0")
    monkeypatch.setenv("JSONARGPARSE_DEPRECATION_WARNINGS", "off")  # Lightning uses an older name

    def run(*args: str, forced: bool = False) -> Outcome:
        monkeypatch.setenv("FORCED", "1" if forced else "")
        cli = None
        try:
            cli, code = cli_app.main(list(args)), 0
        except SystemExit as exit_:
            code = int(exit_.code or 0)
        return Outcome(code, *capsys.readouterr(), cli)

    return run


def test_flags_train_with_cli_optimizer_and_scheduler(run: Run) -> None:
    flags = [*CALLBACK, "--trainer.callbacks.target_modules=[net.0,net.2]", "--trainer.callbacks.lr_ratio=4"]
    rates = ["--optimizer=torch.optim.AdamW", "--optimizer.lr=0.01", "--lr_scheduler=CosineAnnealingLR"]
    outcome = run("fit", *RUN, *flags, *rates, "--lr_scheduler.T_max=5")
    assert outcome.moved == ["net.0", "net.2"]
    assert outcome.held == [[2, 2]]  # A and B of two layers, although LightningCLI built the optimizer before attaching
    assert [type(c.scheduler).__name__ for c in outcome.cli.trainer.lr_scheduler_configs] == ["CosineAnnealingLR"]
    assert outcome.callback.config == LoRAConfig(rank=4, target_modules=["net.0", "net.2"])
    detach(outcome.model)
    assert digest(outcome.model.net) == digest(network())


def test_yaml_trains_and_checkpoint_evaluates_without_options(run: Run, tmp_path: Path) -> None:
    options = {"rank": 2, "alpha": 8.0, "dropout": 0.1, "rank_pattern": {"net.2": 4}, "modules_to_save": ["net.4"]}
    options["target_modules"] = ["all-linear", "net.2"]
    callbacks = [
        {"class_path": "lightning_lora.LoRACallback", "init_args": options},
        {"class_path": "ModelCheckpoint", "init_args": {"dirpath": str(tmp_path), "save_last": True}},
    ]
    trainer = {"accelerator": "cpu", "devices": 1, "max_epochs": 2, "logger": False, "callbacks": callbacks}
    optimizer = {"class_path": "torch.optim.AdamW", "init_args": {"lr": 0.01}}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({"trainer": trainer, "optimizer": optimizer}))
    fit = run("fit", "--config=config.yaml")
    assert fit.moved == ["net.0", "net.2"]
    assert fit.callback.config == LoRAConfig(**options)
    loss = float(fit.cli.trainer.callback_metrics["val_loss"])
    validated = run("validate", "--config=config.yaml", f"--ckpt_path={tmp_path / 'last.ckpt'}")
    assert validated.moved == ["net.0", "net.2"]
    assert float(validated.cli.trainer.callback_metrics["val_loss"]) == pytest.approx(loss)


@pytest.mark.filterwarnings("ignore:.*found no head")
@pytest.mark.parametrize("ranks", [{"rank": 2}, {"rank": "auto", "rank_budget": 120}], ids=["rank", "auto"])
def test_a_start_from_data_in_yaml_trains_and_its_checkpoint_evaluates(
    ranks: dict[str, Any], run: Run, tmp_path: Path
) -> None:
    options = {"init": {"name": "eva", "batches": 2}, "modules_to_save": "auto"} | ranks
    callbacks = [
        {"class_path": "lightning_lora.LoRACallback", "init_args": options},
        {"class_path": "ModelCheckpoint", "init_args": {"dirpath": str(tmp_path), "save_last": True}},
    ]
    trainer = {"accelerator": "cpu", "devices": 1, "max_epochs": 1, "logger": False, "callbacks": callbacks}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({"trainer": trainer}))
    fit = run("fit", "--config=config.yaml", "--optimizer=torch.optim.AdamW", "--optimizer.lr=0.01")
    assert fit.moved
    again = run("validate", "--config=config.yaml", f"--ckpt_path={tmp_path / 'last.ckpt'}")
    assert again.moved == fit.moved
    values = fit.model.state_dict()
    assert all(torch.equal(tensor, values[name]) for name, tensor in again.model.state_dict().items())


def test_options_work_at_top_level(run: Run) -> None:
    flags = ["--lora.rank=3", "--lora.alpha=6", "--lora.target_modules", "net\\.[02]", "--lora.init", "orthogonal"]
    outcome = run("fit", *RUN, *flags, forced=True)
    assert outcome.moved == ["net.0", "net.2"]
    assert outcome.callback.config == LoRAConfig(rank=3, alpha=6.0, target_modules=r"net\.[02]", init="orthogonal")
    assert type(outcome.callback.config.rank) is int  # not jsonargparse's type, which a checkpoint cannot hold


@pytest.mark.filterwarnings("ignore:.*found no head")
@pytest.mark.parametrize(("value", "saved"), [("auto", ()), ("[net.4]", ("net.4",))])
def test_modules_to_save_takes_auto_or_a_list(value: str, saved: tuple[str, ...], run: Run) -> None:
    outcome = run("fit", *RUN, "--lora.rank=4", f"--lora.modules_to_save={value}", forced=True)
    assert outcome.callback.config.modules_to_save == (saved or "auto")
    assert outcome.moved == ["net.0", "net.2", "net.4"][: 2 if saved else 3]


@pytest.mark.parametrize("form", ["flag", "YAML"])
def test_layers_take_numbers_and_slices(form: str, run: Run, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("lora: {rank: 2, layers: [0, -1, '8:16', 0:2]}")
    flags = ["--lora.layers=[0, -1, '8:16', 0:2]"] if form == "flag" else ["--config=config.yaml"]
    printed = run("fit", *flags, "--print_config", forced=True)
    assert yaml.safe_load(printed.output)["lora"]["layers"] == [0, -1, "8:16", "0:2"]


@pytest.mark.parametrize(
    "flags",
    [
        ["--lora.init=eva", "--lora.rank=2"],
        ["--lora.init.name=eva", "--lora.init.batches=3", "--lora.rank=2"],
        ["--lora.init={name: eva, batches: 3}", "--lora.rank=2"],
        ["--lora.rank=auto", "--lora.rank_budget=50%", "--lora.init=eva"],
        [*CALLBACK, "--trainer.callbacks.init.name=eva", "--trainer.callbacks.init.batches=3"],
    ],
)
def test_a_start_from_data_is_given_in_flags(flags: list[str], run: Run, tmp_path: Path) -> None:
    is_group = flags[0].startswith("--lora")
    outcome = run("fit", *RUN, *flags, forced=is_group)
    config = outcome.callback.config
    assert config.start.name == "eva"
    assert config.start.batches == (3 if "batches" in "".join(flags) else 16)
    assert outcome.moved
    printed = run("fit", *flags, "--print_config", forced=is_group)
    (tmp_path / "printed.yaml").write_text(printed.output)
    again = run("fit", "--config=printed.yaml", *RUN, forced=is_group)
    assert again.callback.config == config


@pytest.mark.parametrize(
    "flags",
    [
        ["--lora.rank_schedule=cubic", "--lora.rank=1"],
        ["--lora.rank_schedule.max_rank=3", "--lora.rank_schedule.score=energy", "--lora.rank=1"],
        ["--lora.rank_schedule={max_rank: 3, score: energy}", "--lora.rank=1"],
        [*CALLBACK, "--trainer.callbacks.rank=1", "--trainer.callbacks.rank_schedule.max_rank=3"],
    ],
)
def test_a_rank_schedule_is_given_in_flags(flags: list[str], run: Run, tmp_path: Path) -> None:
    is_group = flags[0].startswith("--lora")
    outcome = run("fit", *RUN, *flags, forced=is_group)
    schedule = outcome.callback.rank_schedule
    assert schedule.start_rank(outcome.callback.config) == (2 if flags[0].endswith("cubic") else 3)
    assert schedule.score == ("energy" if "energy" in "".join(flags) else "gate")
    printed = run("fit", *flags, "--print_config", forced=is_group)
    (tmp_path / "printed.yaml").write_text(printed.output)
    again = run("fit", "--config=printed.yaml", *RUN, forced=is_group)
    assert again.callback.rank_schedule == schedule


def test_help_explains_the_options_of_a_rank_schedule(run: Run) -> None:
    text = " ".join(run("fit", "--lora.rank_schedule.help", forced=True).output.split())
    for option in RankSchedule.__dataclass_fields__:
        assert f"--lora.rank_schedule.{option}" in text
    assert "Share of the training before the budget begins to shrink" in text


def test_help_explains_the_options_of_a_start(run: Run) -> None:
    text = " ".join(run("fit", "--lora.init.help", forced=True).output.split())
    for option in InitOptions.__dataclass_fields__:
        assert f"--lora.init.{option}" in text
    assert "How many training batches" in text


def test_printed_config_can_be_read_back(run: Run, tmp_path: Path) -> None:
    flags = [*CALLBACK, "--trainer.callbacks.rank_pattern={net.0: 2}", "--trainer.callbacks.target_modules=[net.*]"]
    first = run("fit", *flags, "--print_config")
    (tmp_path / "printed.yaml").write_text(first.output)
    second = run("fit", "--config=printed.yaml", "--print_config")
    assert first.code == second.code == 0
    assert yaml.safe_load(second.output) == yaml.safe_load(first.output)
    [callback] = yaml.safe_load(first.output)["trainer"]["callbacks"]
    assert callback["init_args"]["rank_pattern"] == {"net.0": 2}


def test_help_explains_every_option(run: Run) -> None:
    text = " ".join(run("fit", "--help", forced=True).output.split())
    for option in [*LoRAConfig.__dataclass_fields__, "merge_on_teardown", "lr_ratio", "diagnostics_every_n_steps"]:
        assert f"--lora.{option}" in text
    for explanation in (
        "Rank ``r`` of the update",
        "Numerator of the scaling",
        "fold the adapters of its last step into the weights",
    ):
        assert explanation in text


@pytest.mark.parametrize(
    ("flag", "words"),
    [
        ("--lora.rank=abc", ["lora.rank", "abc"]),
        ("--lora.rank=0", ["lora.rank", "0"]),
        ("--lora.alpha=-1", ["lora.alpha", "-1"]),
        ("--lora.init=pisa", ["lora.init", "pisa", "orthogonal"]),
        ("--lora.dropout=1.5", ["lora.dropout", "1.5"]),
        ("--lora.rank_pattern={net.0: 0}", ["lora.rank_pattern", "0"]),
        ("--lora.lr_ratio=0", ["lora.lr_ratio", "0"]),
        ("--lora.diagnostics_every_n_steps=-1", ["lora.diagnostics_every_n_steps", "-1"]),
        ("--lora.diagnostics_every_n_steps=often", ["lora.diagnostics_every_n_steps", "often"]),
        ("--lora.rnak=4", ["rnak"]),
    ],
)
def test_invalid_value_is_usage_error(flag: str, words: list[str], run: Run) -> None:
    outcome = run("fit", flag, forced=True)
    assert outcome.code == 2
    [error] = [line for line in outcome.errors.splitlines() if line.startswith("error: ")]
    for word in words:
        assert word in outcome.errors[outcome.errors.index(error) :]


ANSWERS = {
    "rnak": "LoRACallback has no option 'rnak'. Did you mean 'rank'?",
    "probes": "Did you mean 'probe'?",
    "r": "Did you mean 'rank'?",
    "lora_alpha": "Did you mean 'alpha'?",
    "lora_dropout": "Did you mean 'dropout'?",
    "init_lora_weights": "Did you mean 'init'?",
    "task_type": "call save_adapter(..., task_type=...)",
    "layers_to_transform": "Did you mean 'layers'?",
    "layers_pattern": "The repeated blocks are found without it",
    "config": "LoRACallback.config is for Python. In flags and in YAML, give its options one by one.",
}


class Inherited(LoRACallback):
    """Has no options of its own."""


class Own(LoRACallback):
    """Has options of its own."""

    def __init__(self, size: int = 4) -> None:
        super().__init__(rank=size)


def said(outcome: Outcome) -> str:
    assert outcome.code == 2
    return outcome.errors[outcome.errors.index("\nerror: ") + 1 :].removeprefix("error: ").strip()


@pytest.mark.parametrize("option", ANSWERS)
@pytest.mark.parametrize("form", ["flag of a class", "flag of a group", "YAML of a class", "YAML of a group"])
def test_unknown_option_is_answered_as_in_python(form: str, option: str, run: Run, tmp_path: Path) -> None:
    by_class = {"callbacks": [{"class_path": "lightning_lora.LoRACallback", "init_args": {option: 4}}]}
    content = {"lora": {option: 4}} if "group" in form else {"trainer": by_class}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(content))
    flags = [f"--lora.{option}=4"] if "group" in form else [CALLBACK[0], f"--trainer.callbacks.{option}=4"]
    outcome = run("fit", *(["--config=config.yaml"] if "YAML" in form else flags), forced="group" in form)
    assert ANSWERS[option] in said(outcome)
    assert said(outcome).count("\n") == 0


def test_option_of_config_is_answered_too(run: Run) -> None:
    assert ANSWERS["config"] in said(run("fit", CALLBACK[0], "--trainer.callbacks.config.rank=4"))


def test_config_is_no_flag(run: Run) -> None:
    text = run("fit", "--help", forced=True).output
    assert "--lora.rank" in text
    assert "--lora.config" not in text


@pytest.mark.parametrize(
    ("kind", "answer"), [("Inherited", "Did you mean 'rank'?"), ("Own", "Option 'rnak' is not accepted")]
)
def test_subclass_is_answered_if_it_has_the_same_options(kind: str, answer: str, run: Run) -> None:
    flags = [f"--trainer.callbacks+={__name__}.{kind}", "--trainer.callbacks.rnak=4"]
    assert answer in said(run("fit", *flags))


def test_errors_of_other_options_stay_as_they_are(run: Run) -> None:
    assert said(run("fit", "--trainer.rnak=4")) == "unrecognized arguments: --trainer.rnak=4"
    assert "is not accepted" in said(run("fit", "--trainer.callbacks+=ModelCheckpoint", "--trainer.callbacks.rnak=4"))


UNDER_THE_OTHER_NAME = """
from tests.other_name import under_the_other_name
under_the_other_name("tests.toys")
under_the_other_name("tests.cli_app").main()
"""


@pytest.mark.slow
@pytest.mark.parametrize("script", [["-m", "tests.cli_app"], ["-c", UNDER_THE_OTHER_NAME]])
def test_cli_works_from_shell_with_both_lightning_names(script: list[str], tmp_path: Path) -> None:
    if "-c" in script:
        pytest.importorskip("pytorch_lightning")
    command = [sys.executable, *script, "fit", *RUN, *CALLBACK]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    process = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert process.returncode == 0, process.stderr
    assert "LoRA: 3 layers adapted, 552 base parameters frozen" in process.stderr
