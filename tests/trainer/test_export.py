"""``export_dir``: a fit that has succeeded has exported, and what stood there before is never lost without a word."""

from __future__ import annotations

import enum
import errno
import functools
import os
import warnings
from argparse import Namespace
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch import nn

from lightning_lora import LoRACallback, LoRAConfig, adapter_state_dict, attach, detach, load_adapter, save_adapter
from lightning_lora.cli import main
from lightning_lora.storage.checkpoint import adapters_in, plain_record
from lightning_lora.trainer import export
from tests.contract import assert_same_bits
from tests.toys import Toy, digest, loader, trainer


class Color(enum.Enum):
    RED = 1


@dataclass
class Options:
    """Hyper-parameters as users write them: nothing in here is a plain type."""

    @dataclass
    class Inner:
        rate: float = 0.1

    path: Path = Path("here")
    color: Color = Color.RED
    inner: Inner = field(default_factory=Inner)
    size: Any = field(default_factory=lambda: np.float32(0.5))
    call: Any = field(default_factory=lambda: functools.partial(int, base=2))
    space: Any = field(default_factory=lambda: Namespace(rate=0.1))
    counts: Any = field(default_factory=lambda: defaultdict(list, a=[1]))
    tags: Any = field(default_factory=lambda: {"a", "b"})
    head: Any = field(default_factory=lambda: nn.Linear(2, 2))


class WithOptions(Toy):
    def __init__(self, options: Options) -> None:
        super().__init__()
        self.save_hyperparameters()


def test_hyper_parameters_of_any_type_leave_the_checkpoint_readable(tmp_path: Path) -> None:
    checkpoint, target = ModelCheckpoint(tmp_path, monitor="train_loss", mode="max"), tmp_path / "peft"
    callback = LoRACallback(rank=4, export_dir=str(target))
    run = trainer(callback, checkpoint, max_epochs=2, max_steps=-1)
    run.fit(WithOptions(Options()), loader())
    path, exported, loaded, started = checkpoint.best_model_path, Toy(), Toy(), Toy()
    load_adapter(exported, target)
    load_adapter(loaded, path)
    trainer(LoRACallback(rank=4, init_from=path, allow_untrained=["*"]), max_epochs=0).fit(started, loader())
    saved = torch.load(path, weights_only=False)["state_dict"]
    for module in (exported, loaded, started):
        assert_same_bits(adapter_state_dict(module), saved)
    assert main(["inspect", path]) == 0


def test_hyper_parameters_of_any_type_leave_buffers_that_training_changed_readable(tmp_path: Path) -> None:
    class Counts(WithOptions):
        def build(self) -> None:
            super().build()
            self.register_buffer("calls", torch.tensor(0))

        def loss(self, batch: Any) -> Any:
            self.calls += 1
            return super().loss(batch)

    checkpoint = ModelCheckpoint(tmp_path)
    trainer(LoRACallback(rank=4), checkpoint).fit(module := Counts(Options()), loader())
    load_adapter(loaded := Counts(Options()), checkpoint.best_model_path)
    assert digest(loaded) == digest(module)


def test_export_takes_the_best_checkpoint_from_memory_if_it_is_the_last_state(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "peft"
    monkeypatch.setattr(export, "read_checkpoint", lambda path: pytest.fail(f"read {path}"))
    module = Toy()
    run = trainer(LoRACallback(rank=4, export_dir=str(target)), ModelCheckpoint(tmp_path), max_epochs=2, max_steps=-1)
    run.fit(module, loader())
    exported = Toy()
    load_adapter(exported, target)
    assert_same_bits(adapter_state_dict(exported), adapter_state_dict(module))


def exporting(target: Path | str, **options: Any) -> Toy:
    """Fit a module whose adapter is exported."""
    module = Toy()
    callback = LoRACallback(rank=4, export_dir=str(target), overwrite=options.pop("overwrite", False))
    trainer(callback, **options).fit(module, loader())
    return module


def tree(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_existing_export_is_replaced_only_if_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "peft"
    exporting(target)
    before = tree(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(Toy, "training_step", lambda *_: pytest.fail("it trained"))
        with pytest.raises(MisconfigurationException, match=r"export_dir=.*peft' exists already.*overwrite=True"):
            exporting(target, max_steps=5)
    assert tree(tmp_path) == before
    module = exporting(target, max_steps=5, overwrite=True)
    load_adapter(exported := Toy(), target)
    assert_same_bits(adapter_state_dict(exported), adapter_state_dict(module))


@pytest.mark.parametrize("occupied", [False, True])
def test_export_fills_a_folder_that_cannot_be_renamed(
    occupied: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As mount points are; a shell may be in it, too."""
    (target := tmp_path / "peft").mkdir(0o750)
    if occupied:
        exporting(target)
    before, rename = target.stat(), Path.rename

    def move(self: Path, to: Path) -> Path:
        if self == target:
            raise OSError(errno.EBUSY, os.strerror(errno.EBUSY), str(self))
        return rename(self, to)

    monkeypatch.setattr(Path, "rename", move)
    monkeypatch.chdir(target)
    module = exporting(".", max_steps=5, overwrite=True)
    load_adapter(exported := Toy(), ".")
    assert_same_bits(adapter_state_dict(exported), adapter_state_dict(module))
    assert (target.stat().st_mode, target.stat().st_ino) == (before.st_mode, before.st_ino)


@pytest.mark.parametrize("occupied", [False, True])
def test_fast_dev_run_exports_nothing(occupied: bool, tmp_path: Path) -> None:
    if occupied:
        exporting(tmp_path / "peft")
    before = tree(tmp_path)
    exporting(tmp_path / "peft", fast_dev_run=True, overwrite=True)
    exporting(tmp_path / "peft", fast_dev_run=True)
    assert tree(tmp_path) == before


def test_fast_dev_run_leaves_the_base_as_it_was_for_the_real_run() -> None:
    module, callback = Toy(), LoRACallback(rank=4, merge_on_teardown=True)
    before = digest(module)
    trainer(callback, fast_dev_run=True).fit(module, loader())
    detach(module)
    assert digest(module) == before


def test_unusable_export_dir_is_refused_before_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Toy, "training_step", lambda *_: pytest.fail("it trained"))
    (tmp_path / "file").write_text("notes")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "thesis.txt").write_text("notes")
    before = tree(tmp_path)
    places = {
        tmp_path / "file": "is a file",
        tmp_path / "file" / "peft": "cannot be written",
        tmp_path / "folder": "holds other files",
        Path("/proc/peft"): "cannot be written",
    }
    for place, message in places.items():
        with pytest.raises(MisconfigurationException, match=message):
            exporting(place, overwrite=True)
    assert tree(tmp_path) == before


def test_a_home_is_where_a_shell_would_look_for_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("USERPROFILE", str(tmp_path / "home"))
    module = exporting("~/fit")
    save_adapter(module, "~/saved")
    with pytest.raises(MisconfigurationException, match="exists already"):
        exporting("~/fit")
    for place in ("~/fit", "~/saved", tmp_path / "home" / "fit"):
        load_adapter(loaded := Toy(), place)
        assert_same_bits(adapter_state_dict(loaded), adapter_state_dict(module))
    assert not list((tmp_path / "work").iterdir())


class Moves(Callback):
    """Changes the current directory as soon as training begins, as configuration tools do."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        os.chdir(self.folder)


def test_a_relative_place_is_that_of_when_the_run_began(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path)
    callback = LoRACallback(rank=2, export_dir="peft", overwrite=True)
    for _ in range(2):  # the callback keeps what it was given, and a second run begins elsewhere
        begun = Path.cwd()
        trainer(callback, Moves(tmp_path / "work")).fit(module := Toy(), loader())
        load_adapter(exported := Toy(), begun / "peft")
        assert_same_bits(adapter_state_dict(exported), adapter_state_dict(module))
    assert callback.export_dir == "peft"


def test_remote_export_dir_is_refused_before_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # a folder called "s3:" would appear here
    monkeypatch.setattr(Toy, "training_step", lambda *_: pytest.fail("it trained"))
    with pytest.raises(MisconfigurationException, match=r"'s3://bucket/peft' is not on a local disk.*copy it there"):
        exporting("s3://bucket/peft")
    attach(module := Toy(), LoRAConfig(rank=2))
    with pytest.raises(ValueError, match=r"'s3://bucket/peft' is not on a local disk"):
        save_adapter(module, "s3://bucket/peft")
    assert not list(tmp_path.iterdir())


class WorseAfterFirstEpoch(Toy):
    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", float(self.current_epoch))


def test_best_of_remote_checkpoints_is_exported(tmp_path: Path) -> None:
    place = f"memory://{tmp_path.name}"
    best = ModelCheckpoint(place, filename="best", monitor="val_loss")
    callbacks = [LoRACallback(rank=4, export_dir=str(tmp_path / "peft")), best, ModelCheckpoint(tmp_path, filename="0")]
    run = trainer(*callbacks, max_epochs=2, max_steps=-1, limit_val_batches=1)
    run.fit(WorseAfterFirstEpoch(), loader(), loader())
    assert best.best_model_path == f"{place}/best.ckpt"
    exported, expected, started = Toy(), Toy(), Toy()
    load_adapter(exported, tmp_path / "peft")
    load_adapter(expected, best.best_model_path)
    again = LoRACallback(rank=4, init_from=best.best_model_path, allow_untrained=["*"])
    trainer(again, max_epochs=0).fit(started, loader())
    first = Toy()
    trainer(LoRACallback(rank=4), max_epochs=1, max_steps=-1).fit(first, loader())
    for module in (exported, expected, started):
        assert_same_bits(adapter_state_dict(module), adapter_state_dict(first))
    assert main(["inspect", best.best_model_path]) == 0
    assert adapters_in(Path(best.best_model_path)) == (None, {})
    assert plain_record(Path(best.best_model_path))["layers"].keys() == {"net.0", "net.2", "net.4"}


class Scores(Callback):
    """Logs the scores that it was given, one in each epoch."""

    def __init__(self, *scores: float) -> None:
        self.scores = list(scores)

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        pl_module.log("score", self.scores.pop(0))


@pytest.mark.parametrize("fresh", [True, False], ids=["fresh", "another module"])
def test_best_checkpoint_of_an_earlier_fit_is_not_exported(fresh: bool, tmp_path: Path) -> None:
    saves, module = ModelCheckpoint(tmp_path / "saves", monitor="score"), Toy()
    options: dict[str, Any] = {"max_steps": -1, "max_epochs": 1}
    trainer(LoRACallback(rank=2), Scores(0.1), saves, **options).fit(module, loader())
    first = adapter_state_dict(module)
    if not fresh:
        module = Toy()
    callback = LoRACallback(rank=2, fresh=fresh, export_dir=tmp_path / "exported")
    run = trainer(callback, Scores(0.9), saves, **options)
    with pytest.warns(UserWarning, match=r"is of an earlier fit.*last state of this fit is exported.*of its own"):
        run.fit(module, loader(rows=16))
    assert saves.best_model_score == pytest.approx(0.1)
    exported = Toy()
    load_adapter(exported, tmp_path / "exported")
    assert_same_bits(adapter_state_dict(exported), adapter_state_dict(module))
    assert not torch.equal(first["net.0.lora.B"], adapter_state_dict(module)["net.0.lora.B"])


@pytest.mark.parametrize("way", ["again", "resumed"])
def test_best_checkpoint_of_the_same_training_is_exported_after_a_later_fit(way: str, tmp_path: Path) -> None:
    saves, module = ModelCheckpoint(tmp_path / "saves", monitor="score"), Toy()
    options: dict[str, Any] = {"max_steps": -1, "max_epochs": 1}
    trainer(LoRACallback(rank=2), Scores(0.1), saves, **options).fit(module, loader())
    best, path = adapter_state_dict(module), saves.best_model_path
    if way == "resumed":
        module, saves = Toy(), ModelCheckpoint(tmp_path / "saves", monitor="score")
    run = trainer(
        LoRACallback(rank=2, export_dir=tmp_path / "exported"), Scores(0.9, 0.9), saves, **options | {"max_epochs": 2}
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Checkpoint directory|You're resuming|The dirpath has changed")
        run.fit(module, loader(), ckpt_path=path if way == "resumed" else None)
    exported = Toy()
    load_adapter(exported, tmp_path / "exported")
    assert_same_bits(adapter_state_dict(exported), best)


def test_best_checkpoint_that_is_gone_is_named(tmp_path: Path) -> None:
    class Loses(Callback):
        def on_train_end(self, trainer: Any, pl_module: Any) -> None:
            (tmp_path / "best.ckpt").unlink()

    best = ModelCheckpoint(tmp_path, filename="best", monitor="val_loss")
    callbacks = [LoRACallback(rank=4, export_dir=str(tmp_path / "peft")), best, Loses()]
    with pytest.raises(FileNotFoundError, match=r"best\.ckpt', the best checkpoint, is gone.*lightning-lora export"):
        trainer(*callbacks, max_epochs=2, max_steps=-1, limit_val_batches=1).fit(
            WorseAfterFirstEpoch(), loader(), loader()
        )


def test_missing_remote_checkpoint_is_an_error_that_names_it(tmp_path: Path) -> None:
    with pytest.raises(
        FileNotFoundError, match=r"'memory://none/a\.ckpt' does not exist; name a PEFT directory on a local"
    ):
        load_adapter(Toy(), "memory://none/a.ckpt")


WRITERS = {  # what writes into the folder of the export, or below it
    "checkpoints": lambda folder: ([ModelCheckpoint(dirpath=folder)], False),
    "checkpoints below": lambda folder: ([ModelCheckpoint(dirpath=folder / "new" / "checkpoints")], False),
    "logs": lambda folder: ([], CSVLogger(folder.parent, name=folder.name, version="")),
    "logs below": lambda folder: ([], CSVLogger(folder)),
    "checkpoints beside logs": lambda folder: ([ModelCheckpoint()], CSVLogger(folder)),
}


@pytest.mark.parametrize("kind", WRITERS)
@pytest.mark.parametrize("overwrite", [False, True])
def test_place_that_the_run_writes_into_is_refused_before_training(
    kind: str, overwrite: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Toy, "training_step", lambda *_: pytest.fail("it trained"))
    monkeypatch.chdir(tmp_path)
    callbacks, logger = WRITERS[kind](tmp_path / "out")
    lora = LoRACallback(rank=4, export_dir="out", overwrite=overwrite)
    options = {"logger": logger, "enable_checkpointing": bool(callbacks)}
    writer = "ModelCheckpoint" if logger is False else "ModelCheckpoint|CSVLogger"
    with pytest.raises(MisconfigurationException, match=rf"export_dir='.*/out': ({writer}) writes into .*out"):
        trainer(lora, *callbacks, **options).fit(Toy(), loader())


def test_export_may_lie_below_checkpoints_and_logs(tmp_path: Path) -> None:
    lora = LoRACallback(rank=4, export_dir=str(tmp_path / "peft"))
    options = {"logger": CSVLogger(tmp_path, name="", version=""), "enable_checkpointing": True}
    trainer(lora, ModelCheckpoint(dirpath=tmp_path), **options).fit(Toy(), loader())
    assert (tmp_path / "peft" / "adapter_config.json").is_file()


def test_second_fit_on_the_same_module_checks_the_place_too(tmp_path: Path) -> None:
    module, callback = Toy(), LoRACallback(rank=4, export_dir=str(tmp_path / "peft"))
    trainer(callback).fit(module, loader())
    with pytest.raises(MisconfigurationException, match="exists already"):
        trainer(callback).fit(module, loader())
