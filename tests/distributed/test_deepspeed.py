"""DeepSpeed ZeRO stages 1 to 3: two CPU processes equal one, and checkpoints are interchangeable."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_lora import load_adapter
from lightning_lora.storage.checkpoint import RECORD_KEY
from tests.distributed import deepspeed_job
from tests.distributed.test_every_strategy import TRAINED
from tests.processes import run_ranks
from tests.trainer.test_checkpoints import assert_same_bits, read

pytestmark = [
    pytest.mark.distributed,
    pytest.mark.slow,
    pytest.mark.skipif(not importlib.util.find_spec("deepspeed"), reason="DeepSpeed is not installed"),
]

CLOSE = {"rtol": 1e-5, "atol": 1e-6}  # DeepSpeed computes in float32
WHOLE_STATE = ("state_dict", "optimizer_states", "lr_schedulers", "global_step")

KINDS = {"kinds": deepspeed_job.Kinds, "attention": deepspeed_job.Attends}

each_mode = pytest.mark.parametrize("mode", deepspeed_job.MODES)
Ranks = list[dict[str, Any]]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("deepspeed")


@pytest.fixture(scope="module")
def single(directory: Path) -> dict[str, Any]:
    """Train in one process on whole batches: the whole run, and half of it."""
    runs = {name: deepspeed_job.fit(directory, name, "single", epochs) for name, epochs in (("whole", 2), ("half", 1))}
    for name, kind in KINDS.items():
        runs[name] = deepspeed_job.fit(directory, name, "single", 2, module=kind(), options=kind.OPTIONS)
    deepspeed_job.write_whole_models(directory)
    runs["whole models"] = deepspeed_job.on_whole_models(directory, "single")
    return runs


@pytest.fixture(scope="module")
def ranks(directory: Path, single: dict[str, Any]) -> Ranks:
    """Return the reports of two processes."""
    run_ranks(2, deepspeed_job.__file__, directory, single["half"]["last"])
    return [torch.load(directory / f"rank{rank}.pt", weights_only=False) for rank in range(2)]


def losses(ranks: Ranks, *keys: str) -> list[float]:
    """Return the mean of the processes' losses, which is the loss of the whole batch."""
    found = []
    for rank in ranks:
        for key in keys:
            rank = rank[key]
        found.append(rank["losses"])
    return torch.tensor(found, dtype=torch.float64).mean(0).tolist()


@each_mode
def test_losses_match_one_process(mode: str, ranks: Ranks, single: dict[str, Any]) -> None:
    assert losses(ranks, mode, "whole") == pytest.approx(single["whole"]["losses"], abs=1e-5)
    assert ranks[0][mode]["whole"]["losses"] != ranks[1][mode]["whole"]["losses"]  # they saw different rows


@each_mode
def test_checkpoint_matches_one_process(mode: str, ranks: Ranks, single: dict[str, Any]) -> None:
    place = Path(ranks[0][mode]["whole"]["last"])
    assert place.is_file()
    theirs, ours = read(place), read(single["whole"]["last"])
    assert theirs["state_dict"].keys() == TRAINED
    assert theirs["lightning_lora"] == ours["lightning_lora"]
    for name, tensor in ours["state_dict"].items():
        torch.testing.assert_close(theirs["state_dict"][name], tensor, **CLOSE)
    [found], [expected] = theirs["optimizer_states"], ours["optimizer_states"]
    assert found["param_groups"] == expected["param_groups"]
    for index, entry in expected["state"].items():
        assert found["state"][index].keys() == entry.keys()
        for key, value in entry.items():
            torch.testing.assert_close(found["state"][index][key], value, **CLOSE)


@each_mode
def test_resume_is_bit_exact(mode: str, ranks: Ranks) -> None:
    for rank in ranks:
        assert rank[mode]["half"]["losses"] + rank[mode]["resumed"]["losses"] == rank[mode]["whole"]["losses"]
    whole, resumed = (read(ranks[0][mode][name]["last"]) for name in ("whole", "resumed"))
    for key in WHOLE_STATE:
        assert_same_bits(resumed[key], whole[key])


@pytest.mark.parametrize("mode", ["2", "3"])
def test_optimizer_offload_is_bit_exact(mode: str, ranks: Ranks) -> None:
    for rank in ranks:
        offloaded = rank[f"{mode} offloaded"]
        assert offloaded["whole"]["losses"] == rank[mode]["whole"]["losses"]
        assert rank[mode]["half"]["losses"] + offloaded["resumed"]["losses"] == rank[mode]["whole"]["losses"]
    expected = read(ranks[0][mode]["whole"]["last"])
    for run in ("whole", "resumed"):
        found = read(ranks[0][f"{mode} offloaded"][run]["last"])
        for key in WHOLE_STATE:
            assert_same_bits(found[key], expected[key])


@each_mode
def test_resumes_checkpoint_of_one_process(mode: str, ranks: Ranks, single: dict[str, Any]) -> None:
    assert losses(ranks, mode, "from single") == pytest.approx(single["whole"]["losses"][2:], abs=1e-5)


@each_mode
def test_checkpoint_resumes_in_one_process(mode: str, ranks: Ranks, single: dict[str, Any], tmp_path: Path) -> None:
    resumed = deepspeed_job.fit(tmp_path, "resumed", "single", 2, ranks[0][mode]["half"]["last"])
    assert resumed["losses"] == pytest.approx(single["whole"]["losses"][2:], abs=1e-5)


@each_mode
def test_merge_matches_one_process(mode: str, ranks: Ranks, single: dict[str, Any]) -> None:
    for rank in ranks:
        assert (rank[mode]["half"]["adapters"], rank[mode]["whole"]["adapters"]) == (2, 0)
        torch.testing.assert_close(rank[mode]["whole"]["output"], single["whole"]["output"], **CLOSE)


@each_mode
@pytest.mark.parametrize("run", ["whole", "from_single"])
def test_exports_best_checkpoint_and_last_state(
    mode: str, run: str, directory: Path, ranks: Ranks, single: dict[str, Any]
) -> None:
    module = deepspeed_job.Single()
    load_adapter(module, deepspeed_job.exported(directory, mode, run))
    torch.testing.assert_close(module(deepspeed_job.PROBE.float()), single["whole"]["output"], **CLOSE)


@each_mode
def test_frozen_parameters_get_no_gradients_and_are_not_gathered(mode: str, ranks: Ranks) -> None:
    file = read(ranks[0][mode]["whole"]["last"])
    trained = sum(tensor.nbytes for tensor in file["state_dict"].values())
    moments = sum(t.nbytes for entry in file["optimizer_states"][0]["state"].values() for t in entry.values())
    for rank in ranks:
        assert rank[mode]["whole"]["frozen_gradients"] == 0
        assert 0 < max(rank[mode]["whole"]["bytes_at_save"]) <= 2 * (trained + moments)


@each_mode
def test_checkpoint_evaluates_without_options(mode: str, ranks: Ranks, single: dict[str, Any]) -> None:
    expected = deepspeed_job.validation_loss("single", single["half"]["last"])
    for rank in ranks:
        assert rank[mode]["validation"] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("kind", ["kinds", "attention"])
def test_layer_kinds_match_one_process(kind: str, ranks: Ranks, single: dict[str, Any]) -> None:
    """Stage 3, which shards each layer as it is built, and stage 2 for layers whose weight carries the update."""
    assert losses(ranks, kind) == pytest.approx(single[kind]["losses"], abs=1e-5)
    theirs, ours = (read(run["last"])["state_dict"] for run in (ranks[0][kind], single[kind]))
    assert theirs.keys() == ours.keys()
    for name, tensor in ours.items():
        torch.testing.assert_close(theirs[name], tensor, **CLOSE)


@each_mode
def test_fingerprint_matches_one_process(mode: str, ranks: Ranks, single: dict[str, Any]) -> None:
    theirs, ours = (read(run["last"])[RECORD_KEY]["base"] for run in (ranks[0][mode]["whole"], single["whole"]))
    assert theirs == ours
    assert ours


@each_mode
def test_other_base_is_rejected_in_every_process(mode: str, ranks: Ranks) -> None:
    for rank in ranks:
        assert "1 of 4 compared tensors differ, first net.2.weight." in rank[mode]["other base"]


@pytest.mark.parametrize(("mode", "kind"), [*((mode, "net") for mode in deepspeed_job.MODES), ("3", "kinds")])
def test_whole_checkpoint_becomes_base(mode: str, kind: str, ranks: Ranks, single: dict[str, Any]) -> None:
    """Layers built in ``configure_model`` start on the meta device."""
    theirs, ours = ranks[0][mode]["whole models"][kind], single["whole models"][kind]
    assert losses(ranks, mode, "whole models", kind) == pytest.approx(ours["losses"], abs=1e-5)
    found, expected = read(theirs["last"]), read(ours["last"])
    torch.testing.assert_close(found["state_dict"], expected["state_dict"], **CLOSE)
    assert found[RECORD_KEY]["base"] == expected[RECORD_KEY]["base"]


def test_whole_checkpoint_with_wrong_shapes_is_rejected(ranks: Ranks) -> None:
    for rank in ranks:
        assert "net.2.weight: file (17, 16), model (16, 16), net.2.bias: file (17,)" in rank["misfit"]


def test_parameters_left_on_meta_are_rejected(ranks: Ranks) -> None:
    for rank in ranks:
        assert all("built on the meta device: net.0.weight" in text for text in rank["on meta"])


def test_adapter_without_gradient_is_named(ranks: Ranks) -> None:
    assert [text for text in ranks[0]["warned"] if "No gradient reached the adapters of idle in" in text]


@pytest.mark.parametrize("mode", ["2", "3 built late"])
def test_bfloat16_saves_and_resumes_float32_masters(mode: str, ranks: Ranks) -> None:
    whole, resumed = (read(ranks[0][mode]["bf16"][name]["last"]) for name in ("whole", "resumed"))
    for key in WHOLE_STATE:
        assert_same_bits(resumed[key], whole[key])
    B = whole["state_dict"]["net.0.lora.B"]
    assert B.dtype == torch.float32
    assert not torch.equal(B, B.bfloat16().float())
