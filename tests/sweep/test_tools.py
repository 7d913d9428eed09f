"""A sweep on the command line: trained by LightningCLI, shown by ``inspect`` and ``report``."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest
import yaml
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_lora import LoRASweep
from lightning_lora.cli import main
from lightning_lora.sweep.standings import standings_of
from tests import cli_app
from tests.sweep.test_callback import Quiet, fit, swept

pytestmark = [
    pytest.mark.filterwarnings("ignore:These adapters are not smaller"),
    pytest.mark.filterwarnings("ignore:.*LightningCLI's args parameter.*", "ignore:.*will be overridden by.*"),
]
GRID = {"lr": [1e-2, 1e-3, 1e-4], "rank": [2, 4]}


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the checkpoint of a sweep."""
    folder = tmp_path_factory.mktemp("sweep")
    saves = ModelCheckpoint(folder, filename="sweep")
    fit(Quiet(), swept(grid=GRID), saves, max_epochs=5, max_steps=-1)
    return folder / "sweep.ckpt"


def test_inspect_shows_the_table(file: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["inspect", str(file)]) == 0
    printed = capsys.readouterr().out
    assert "a sweep of 6 adapters, the best first:" in printed
    assert main(["inspect", str(file), "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["sweep"]
    assert {row["name"] for row in rows} == set(swept(grid=GRID).candidates)
    assert rows[0]["stopped at"] is None
    assert [row["value"] for row in rows] == sorted(row["value"] for row in rows)
    assert all(row["name"] in printed for row in rows)


def test_report_draws_curves_and_rates(file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    pytest.importorskip("matplotlib")
    assert main(["report", str(file), "--out", str(tmp_path / "page.html"), "--pictures", str(tmp_path)]) == 0
    page = (tmp_path / "page.html").read_text()
    assert "The sweep" in page
    assert page.count("lr=1e-3,rank=4") >= 2  # in the legend and the table
    for name in ("sweep_curves", "sweep_rates"):
        head = (tmp_path / f"{name}.png").read_bytes()[:24]
        assert min(struct.unpack(">II", head[16:])) > 400


def test_a_record_gives_the_same_standings_back(file: Path):
    sweep = swept(grid=GRID)
    fit(Quiet(), sweep, max_epochs=5, max_steps=-1)
    standings = sweep._standings
    assert standings is not None
    again = standings_of(json.loads(json.dumps(standings.to_record())))
    assert (again.results, again.best, again.live) == (standings.results, standings.best, standings.live)


@pytest.mark.filterwarnings("ignore:LoRASweep. training_step changes losses in place")
@pytest.mark.parametrize("as_yaml", [False, True])
def test_lightning_cli_takes_a_grid(as_yaml: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PL_GLOBAL_SEED", "0")
    monkeypatch.setenv("JSONARGPARSE_DEPRECATION_WARNINGS", "off")
    quiet: dict[str, Any] = {"logger": False, "enable_progress_bar": False, "accelerator": "cpu", "devices": 1}
    if as_yaml:
        callback = {"class_path": "lightning_lora.LoRASweep", "init_args": {"rank": 2, "grid": {"lr": [1e-3, 1e-4]}}}
        (tmp_path / "config.yaml").write_text(yaml.safe_dump({"trainer": quiet | {"callbacks": [callback]}}))
        arguments = ["--config=config.yaml"]
    else:
        arguments = [f"--trainer.{key}={str(value).lower()}" for key, value in quiet.items()]
        arguments += ["--trainer.callbacks+=lightning_lora.LoRASweep", "--trainer.callbacks.grid.lr=[1e-3,1e-4]"]
        arguments += ["--trainer.callbacks.rank=2"]
    rates = ["--optimizer=torch.optim.AdamW", "--optimizer.lr=0.01", "--trainer.max_epochs=1"]
    cli = cli_app.main(["fit", *arguments, *rates])
    [sweep] = [each for each in cli.trainer.callbacks if isinstance(each, LoRASweep)]
    assert list(sweep.candidates) == ["lr=1e-3", "lr=1e-4"]
    assert [round(each.lr or 0, 9) for each in sweep.candidates.values()] == [1e-3, 1e-4]
    assert sweep.best in sweep.candidates
