"""The same laws under every strategy: several processes equal one."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_lora import load_adapter
from tests.distributed import strategy_job
from tests.processes import run_ranks
from tests.trainer.test_checkpoints import assert_same_bits, read

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

TRAINED = {f"net.{layer}.lora.{factor}" for layer in (0, 2) for factor in "AB"} | {"net.4.weight", "net.4.bias"}
TWO = ["ddp", "fsdp1", "fsdp1_policy", "fsdp1_policy_distributed", "fsdp1_wrapped", "fsdp2", "fsdp2_distributed", "tp"]
FOUR = ["tp_fsdp2"]
CLOSE = {"rtol": 0.0, "atol": 1e-9}

each_mode = pytest.mark.parametrize("mode", [*TWO, *FOUR])
Ranks = list[dict[str, Any]]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("strategies")


@pytest.fixture(scope="module")
def single(directory: Path) -> dict[str, Any]:
    """Train in one process on whole batches: the whole run, and half of it."""
    runs = {"whole": (2, False), "half": (1, False), "merged": (2, True)}
    return {
        name: strategy_job.fit(directory, name, "single", 1, epochs, merge=merge)
        for name, (epochs, merge) in runs.items()
    }


@pytest.fixture(scope="module")
def on_a_whole_model(directory: Path) -> dict[bool, dict[str, Any]]:
    """Train in one process on a whole model's checkpoint, with and without DoRA."""
    strategy_job.write_whole_models(directory)
    return {
        dora: strategy_job.started(
            "single", 1, strategy_job.Wide(), strategy_job.LORA | {"use_dora": dora}, directory / "fits.ckpt"
        )
        for dora in (True, False)
    }


@pytest.fixture(scope="module")
def runs(directory: Path, single: dict[str, Any], on_a_whole_model: dict[bool, Any]) -> dict[str, Ranks]:
    """Return the report of each process, by mode."""
    found: dict[str, Ranks] = {}
    for modes, processes in ((TWO, 2), (FOUR, 4)):
        place = directory / str(processes)
        place.mkdir()
        arguments = [place, processes, directory, single["half"]["last"], *modes]
        run_ranks(processes, strategy_job.__file__, *arguments)
        ranks = [torch.load(place / f"rank{rank}.pt", weights_only=False) for rank in range(processes)]
        found |= {mode: [rank[mode] for rank in ranks] for mode in modes}
        found[f"said in {processes}"] = [rank["said"] for rank in ranks]
    return found


def losses(ranks: Ranks, run: str) -> list[float]:
    """Return the mean of the processes' losses, which is the loss of the whole batch."""
    return torch.tensor([rank[run]["losses"] for rank in ranks], dtype=torch.float64).mean(0).tolist()


@each_mode
def test_losses_match_one_process(mode: str, runs: dict[str, Ranks], single: dict[str, Any]) -> None:
    assert losses(runs[mode], "whole") == pytest.approx(single["whole"]["losses"], abs=1e-9)
    assert len(set(single["whole"]["losses"])) == 4


@each_mode
def test_data_parallel_processes_see_different_rows(mode: str, runs: dict[str, Ranks]) -> None:
    seen = {tuple(rank["whole"]["losses"]) for rank in runs[mode]}
    assert len(seen) == (1 if mode == "tp" else 2)


@pytest.mark.parametrize("mode", [mode for mode in [*TWO, *FOUR] if not mode.startswith("fsdp1")])
def test_diagnostics_match_one_process(mode: str, runs: dict[str, Ranks], single: dict[str, Any]) -> None:
    expected = single["whole"]["metrics"]
    assert len(expected) == 2 * 5
    for rank in runs[mode]:
        assert rank["whole"]["metrics"] == pytest.approx(expected, rel=1e-6)
        assert rank["whole"]["metrics"] == runs[mode][0]["whole"]["metrics"]


@each_mode
def test_checkpoint_matches_one_process(mode: str, runs: dict[str, Ranks], single: dict[str, Any]) -> None:
    theirs, ours = read(runs[mode][0]["whole"]["last"]), read(single["whole"]["last"])
    assert theirs["state_dict"].keys() == TRAINED
    for name, tensor in ours["state_dict"].items():
        torch.testing.assert_close(theirs["state_dict"][name], tensor, **CLOSE)
    assert theirs["lightning_lora"] == ours["lightning_lora"]
    [found], [expected] = theirs["optimizer_states"], ours["optimizer_states"]
    assert found["param_groups"] == expected["param_groups"]
    assert found["state"].keys() == expected["state"].keys()
    for index, entry in expected["state"].items():
        for key, value in entry.items():
            torch.testing.assert_close(found["state"][index][key], value, **CLOSE)


@each_mode
def test_resume_is_bit_exact(mode: str, runs: dict[str, Ranks]) -> None:
    for rank in runs[mode]:
        assert rank["half"]["losses"] + rank["resumed"]["losses"] == rank["whole"]["losses"]
    whole, resumed = (read(runs[mode][0][name]["last"]) for name in ("whole", "resumed"))
    for key in ("state_dict", "optimizer_states", "lr_schedulers", "global_step"):
        assert_same_bits(resumed[key], whole[key])


@each_mode
def test_resumes_checkpoint_of_one_process(mode: str, runs: dict[str, Ranks], single: dict[str, Any]) -> None:
    assert losses(runs[mode], "from single") == pytest.approx(single["whole"]["losses"][2:], abs=1e-9)


@each_mode
def test_checkpoint_resumes_in_one_process(
    mode: str, runs: dict[str, Ranks], single: dict[str, Any], tmp_path: Path
) -> None:
    resumed = strategy_job.fit(tmp_path, "resumed", "single", 1, 2, runs[mode][0]["half"]["last"])
    assert resumed["losses"] == pytest.approx(single["whole"]["losses"][2:], abs=1e-9)


@each_mode
def test_checkpoint_evaluates_without_options(mode: str, runs: dict[str, Ranks], single: dict[str, Any]) -> None:
    expected = strategy_job.evaluated("single", 1, single["half"]["last"])
    for rank in runs[mode]:
        assert rank["evaluated"] == pytest.approx(expected, abs=1e-9)


@each_mode
def test_other_base_is_rejected_in_every_process(mode: str, runs: dict[str, Ranks]) -> None:
    for rank in runs[mode]:
        assert "1 of 4 compared tensors differ, first net.2.weight." in rank["other base"]


@pytest.mark.parametrize(
    ("run", "expected"),
    [
        (
            "auto",
            r"data_parallel_size=1, tensor_parallel_size=2\).*shards no parameter.*or parallelize_module .*'ddp'",
        ),
        ("data parallel", r"data_parallel_size=2, tensor_parallel_size=1\).*shards no parameter.*Call fully_shard"),
        ("in part", r"^net\.2\.lora, net\.4 would train separately in each process.*call fully_shard"),
        ("all", r"^$"),
    ],
)
def test_unsynchronized_parameters_are_rejected(run: str, expected: str, runs: dict[str, Ranks]) -> None:
    for rank in runs["said in 2"]:
        assert re.search(expected, rank[run])


def test_processes_on_same_data_cause_warning(runs: dict[str, Ranks]) -> None:
    assert "so groups of 2 processes train on the same data" in runs["said in 4"][0]["two kinds"]


@each_mode
def test_merge_keeps_outputs(mode: str, runs: dict[str, Ranks], single: dict[str, Any]) -> None:
    for rank in runs[mode]:
        assert (rank["whole"]["adapters"], rank["merged"]["adapters"]) == (2, 0)
        assert not [kind for kind in rank["merged"]["kinds"] if "LoRA" in kind]
        for run in ("whole", "merged"):
            torch.testing.assert_close(rank[run]["output"], single["whole"]["output"], **CLOSE)


@each_mode
@pytest.mark.parametrize("run", ["whole", "merged"])
def test_exports_best_checkpoint_and_last_state(
    mode: str, run: str, directory: Path, runs: dict[str, Ranks], single: dict[str, Any]
) -> None:
    module = strategy_job.Wide()
    load_adapter(module, strategy_job.exported(directory / str(len(runs[mode])), mode, run))
    torch.testing.assert_close(module(strategy_job.PROBE), single["whole"]["output"], **CLOSE)


@each_mode
def test_frozen_parameters_get_no_gradients(mode: str, runs: dict[str, Ranks]) -> None:
    assert [rank["whole"]["frozen_gradients"] for rank in runs[mode]] == [0] * len(runs[mode])


@each_mode
def test_save_gathers_at_most_twice_the_trained_bytes(mode: str, runs: dict[str, Ranks]) -> None:
    file = read(runs[mode][0]["whole"]["last"])
    trained = sum(tensor.nbytes for tensor in file["state_dict"].values())
    moments = sum(t.nbytes for entry in file["optimizer_states"][0]["state"].values() for t in entry.values())
    for rank in runs[mode]:
        assert len(rank["whole"]["bytes_at_save"]) == 4  # each epoch's file and last.ckpt
        assert all(count <= 2 * (trained + moments) for count in rank["whole"]["bytes_at_save"])
        assert (max(rank["whole"]["bytes_at_save"]) > 0) == (mode != "ddp")


@pytest.mark.parametrize("mode", strategy_job.ON_META)
def test_module_built_on_meta_trains_after_loading(
    mode: str, runs: dict[str, Ranks], on_a_whole_model: dict[bool, dict[str, Any]]
) -> None:
    truth = on_a_whole_model[False]
    assert losses(runs[mode], "on meta") == pytest.approx(truth["losses"], abs=1e-9)
    for rank in runs[mode]:
        found = rank["on meta"]
        assert_same_bits(found["start"], truth["start"])
        assert_same_bits(found["output"], found["base_output"])


@pytest.mark.parametrize("mode", strategy_job.ON_WHOLE_MODELS)
def test_whole_checkpoint_becomes_base(
    mode: str, runs: dict[str, Ranks], on_a_whole_model: dict[bool, dict[str, Any]]
) -> None:
    truth = on_a_whole_model["tp" not in mode]
    assert losses(runs[mode], "on a whole model") == pytest.approx(truth["losses"], abs=1e-9)
    for rank in runs[mode]:
        found = rank["on a whole model"]
        torch.testing.assert_close(found["output"], truth["base_output"], **CLOSE)
        for name, tensor in truth["end"].items():
            torch.testing.assert_close(found["end"][name], tensor, **CLOSE)


@pytest.mark.parametrize("mode", strategy_job.ON_WHOLE_MODELS)
def test_unfitting_whole_checkpoint_changes_nothing(mode: str, runs: dict[str, Ranks]) -> None:
    for rank in runs[mode]:
        found = rank["on a whole model"]
        assert "net.2.weight: file (17, 16), model (16, 16), net.2.bias: file (17,)" in found["refused"]
        torch.testing.assert_close(found["output of the refused"], strategy_job.Wide()(strategy_job.PROBE), **CLOSE)
