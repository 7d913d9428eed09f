"""Run the benchmarks with tiny sizes."""

from __future__ import annotations

import gc
import importlib
import json
import logging
import math
import shutil
import signal
import statistics
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, rule
from scipy import stats

from lightning_lora import LoRACallback, LoRAConfig, attach, lora_layers
from tests.toys import Toy, loader, trainer

FOLDER = Path(__file__).parent.parent / "benchmarks"
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Iterator[ModuleType]:
    pytest.importorskip("peft")
    monkeypatch.syspath_prepend(str(FOLDER))
    level = logging.getLogger("lightning.pytorch").level
    module = importlib.import_module(request.param)
    gc.freeze()  # benchmarks collect garbage in every round, among all that has been imported
    yield module
    gc.unfreeze()
    logging.getLogger("lightning.pytorch").setLevel(level)  # a benchmark may have changed it


@pytest.mark.parametrize(
    "benchmark",
    [
        "step",
        "shared_input",
        "memory",
        "weights",
        "attach",
        "merge",
        "checkpoint",
        "growth",
        "overhead",
        "scaling",
        "quality",
        "ranks",
        "starts",
        "sweep",
        "switch",
        "gpu",
    ],
    indirect=True,
)
def test_benchmark_runs_and_reports(benchmark, tmp_path, capsys):
    rows = benchmark.main(["--smoke", "--json", str(tmp_path / "rows.json")])
    printed, written = capsys.readouterr().out, json.loads((tmp_path / "rows.json").read_text())
    assert rows
    assert [row["quantity"] for row in written["rows"]] == [row.quantity for row in rows]
    assert all(row.quantity in printed for row in rows)


@pytest.mark.parametrize("benchmark", ["memory"], indirect=True)
def test_memory_for_backward_matches_formula(benchmark):
    rows = [row for row in benchmark.main(["--smoke"]) if row.quantity.endswith("ours / formula")]
    assert len(rows) == 4
    assert all(0.99 <= row.value <= row.reach for row in rows)


@pytest.mark.parametrize("benchmark", ["measuring"], indirect=True)
def test_row_shows_target(benchmark):
    row = benchmark.ratio({"a": [1.0, 2.0, 3.0], "b": [2.0, 2.0, 2.0]}, "a", "b", 0.9)
    assert (row.value, row.verdict) == (1.0, "missed")
    assert str(row) == "| a / b | 1.000 [0.500, 1.500] | 0.9 | missed |"


# --- the studies of starts and of rank schedules


def runs(losses: dict[tuple[str, str], list[float]]) -> dict[str, dict[str, Any]]:
    """Return runs of both studies: one pilot, and five seeds with these losses by study and arm."""
    found: dict[str, dict[str, Any]] = {}
    for (study, arm), values in losses.items():
        found[f"{study}/{arm}/0.01/0"] = {"validation": 1.0}
        for seed, value in enumerate(values, 10):
            found[f"{study}/{arm}/0.01/{seed}"] = {str(mark): [value, 0.5] for mark in (10, 30, 100)}
    return found


@pytest.mark.parametrize("benchmark", ["starts", "ranks", "quality_page"], indirect=True)
def test_the_page_shows_the_results_of_the_study(benchmark):
    content = json.loads(benchmark.RESULTS.read_text(encoding="utf-8"))
    assert benchmark.section(content) in benchmark.PAGE.read_text(encoding="utf-8")


@pytest.mark.parametrize("benchmark", ["studies"], indirect=True)
def test_a_difference_is_paired_and_a_tie_if_its_interval_holds_zero(benchmark):
    kaiming = [1.0, 3.0, 2.0, 5.0, 4.0]  # differ far more between seeds than between arms
    eva = [value - 0.1 - noise for value, noise in zip(kaiming, [0.0, 0.01, 0.02, 0.03, 0.04], strict=True)]
    results = runs({("digits", "kaiming"): kaiming, ("digits", "eva"): eva, ("digits", "pissa"): kaiming[::-1]})
    better = benchmark.difference(results, "digits", "eva", "kaiming")
    assert better.mean == pytest.approx(-0.12)
    assert better.margin == pytest.approx(2.776 * statistics.stdev([0.0, 0.01, 0.02, 0.03, 0.04]) / 5**0.5, rel=1e-3)
    assert not better.is_tie
    assert benchmark.difference(results, "digits", "pissa", "kaiming").is_tie


@pytest.mark.parametrize("benchmark", ["starts"], indirect=True)
@pytest.mark.parametrize(("control", "recommended"), [(0.0, True), (-0.2, False)])
def test_a_start_is_recommended_if_it_beats_kaiming_and_its_control_in_both_studies(benchmark, control, recommended):
    kaiming = [1.0, 3.0, 2.0, 5.0, 4.0]
    arms = {"kaiming": 0.0, "eva": -0.1, benchmark.RANDOM: control}
    losses = {
        (study, arm): [value + shift for value in kaiming]
        for study in ("digits", "sentences")
        for arm, shift in arms.items()
    }
    sentence = benchmark.recommendation(runs(losses), ["digits", "sentences"])
    assert ("`eva`" in sentence) is recommended
    only_one = {key: value if key[0] == "digits" else kaiming for key, value in losses.items()}
    assert "`eva`" not in benchmark.recommendation(runs(only_one), ["digits", "sentences"])


@pytest.mark.parametrize("benchmark", ["studies"], indirect=True)
@pytest.mark.parametrize("best", [0.08, 0.0025])
def test_the_grid_grows_until_the_best_rate_is_inside(benchmark, best):
    study = SimpleNamespace(name="digits", rates=(0.01, 0.02), factor=2.0)
    found: dict[str, Any] = {}

    def attempt(arm: str, rate: float, seed: int) -> dict[str, dict[str, Any]]:
        return {arm: {"validation": abs(math.log(rate / best))}}

    benchmark.explore(study, ["kaiming"], attempt, found, lambda: None, seeds=[10])
    assert benchmark.best_rate(found, "digits", "kaiming") == (best, True)
    assert f"digits/kaiming/{best}/10" in found
    tried = {float(name.split("/")[2]) for name in found}
    assert (min(tried), max(tried)) == (min(best / 2, 0.01), max(2 * best, 0.02))


@pytest.mark.parametrize("benchmark", ["studies"], indirect=True)
def test_one_training_may_serve_several_arms_and_each_counts_at_its_own_best_rate(benchmark):
    study = SimpleNamespace(name="digits", rates=(0.01, 0.02, 0.04, 0.08), factor=2.0)
    best, trainings, found = {"whole": 0.02, "cut": 0.04}, list[tuple[float, int]](), dict[str, Any]()

    def attempt(_: str, rate: float, seed: int) -> dict[str, dict[str, Any]]:
        trainings.append((rate, seed))
        return {
            arm: {"100": [rate, 0.5]} if seed >= 10 else {"validation": abs(math.log(rate / own))}
            for arm, own in best.items()
        }

    benchmark.explore(study, [*best], attempt, found, lambda: None, seeds=[10, 11])
    assert len(trainings) == len(set(trainings)) == 4 * 2 + 2 * 2
    for arm, rate in best.items():
        assert benchmark.finals(found, "digits", arm) == {seed: {"100": [rate, 0.5]} for seed in (10, 11)}


@pytest.mark.parametrize("benchmark", ["ranks"], indirect=True)
def test_a_way_to_decide_ranks_is_recommended_if_it_beats_a_fixed_rank_in_both_studies(benchmark):
    fixed = [1.0, 3.0, 2.0, 5.0, 4.0]
    better = [value - 0.1 for value in fixed]
    losses = {(study, "fixed"): fixed for study in ("digits", "sentences")}
    both = losses | {(study, "gate"): better for study in ("digits", "sentences")}
    one = losses | {("digits", "gate"): better, ("sentences", "gate"): fixed}
    studies = ["digits", "sentences"]
    assert "rank for its result: `gate`." in benchmark.recommendation(runs(both), studies)
    assert "nothing is recommended" in benchmark.recommendation(runs(one), studies)


@pytest.mark.parametrize("benchmark", ["ranks"], indirect=True)
def test_nested_training_is_built_only_if_it_is_better_at_some_rank_and_worse_at_none_in_both_studies(benchmark):
    def found(*changes):
        return {
            f"{study}/{arm}/{rate}/{seed}": {"validation": abs(math.log(rate / 0.01))}
            if seed < 2
            else {
                mark: [seed + (change if arm == "nested" else 0.0), 0.5]
                for mark, change in zip(marks, own, strict=True)
            }
            for study, own in zip(studies, changes, strict=True)
            for arm in ("cut", "nested")
            for rate in (0.005, 0.01, 0.02)
            for seed in (0, 1, *range(10, 15))
            if seed < 2 or rate == 0.01
        }

    studies, marks = ("digits", "sentences"), list(benchmark.PREFIXES.values())
    better, tied, mixed = (-0.1, -0.1, 0.0, 0.0), (0.0,) * 4, (-0.1, 0.0, 0.0, 0.1)
    assert benchmark.nested_wins(found(better, better), studies)
    for other in (tied, mixed):
        assert not benchmark.nested_wins(found(better, other), studies)


@pytest.mark.parametrize("benchmark", ["ranks"], indirect=True)
def test_the_cut_by_energy_has_the_number_of_parameters_nearest_to_that_of_the_rank(benchmark):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(20, 20), torch.nn.Linear(20, 20))
    attach(model, LoRAConfig(rank=4))
    for size, layer in zip((1.0, 3.0), lora_layers(model).values(), strict=True):
        torch.nn.init.normal_(layer.lora.B, std=size)
    found = benchmark.cut_nearest(SimpleNamespace(adapted=lambda model: model), model)
    component = 20 + 20
    assert abs(benchmark.parameters(found) - benchmark.parameters(model) // 2) <= component
    assert benchmark.parameters(model) == 2 * 4 * component


@pytest.mark.parametrize("benchmark", ["starts"], indirect=True)
def test_the_random_control_has_other_directions_but_eva_s_sizes_of_features(benchmark):
    torch.manual_seed(0)
    x = torch.randn(4, 32, 5) * torch.tensor([5.0, 2.0, 1.0, 0.5, 0.1])
    study = SimpleNamespace(
        build=lambda seed: torch.nn.Sequential(torch.nn.Linear(5, 7)),
        adapted=lambda model: model,
        config=LoRAConfig(rank=2),
        logits=lambda model, batch: model(batch["x"]),
        loss=lambda model, batch: model(batch["x"]).square().sum(),
    )
    features = {}
    for arm in ("eva", benchmark.RANDOM):
        model = benchmark.started(study, arm, 0, [{"x": part} for part in x])
        features[arm] = x.flatten(0, 1) @ lora_layers(model)["0"].lora.A.detach().T
    eva, other = features.values()
    torch.testing.assert_close(eva.square().mean(0), other.square().mean(0))
    assert not torch.allclose(eva, other, atol=0.1)


# --- the study of quality


@pytest.mark.parametrize("benchmark", ["quality"], indirect=True)
def test_runs_of_another_plan_are_not_mixed(benchmark, tmp_path):
    assert json.loads(benchmark.RESULTS.read_text(encoding="utf-8"))["plan"] == benchmark.digest()
    other = tmp_path / "runs.json"
    other.write_text(json.dumps({"plan": "other", "commits": [], "runs": {}}))
    with pytest.raises(SystemExit, match="another plan"):
        benchmark.read(other)


@pytest.mark.parametrize("benchmark", ["quality_page"], indirect=True)
def test_the_claims_of_the_study_rest_on_these_tests(benchmark):
    values = [0.3, -0.1, 0.5, 0.2, 0.0, 0.4, -0.2, 0.1]
    assert benchmark.two_sided(values) == pytest.approx(stats.ttest_1samp(values, 0).pvalue)
    above, below = (stats.ttest_1samp(values, at, alternative=side).pvalue for at, side in MARGINS.items())
    assert benchmark.equivalence(values) == pytest.approx(max(above, below))
    assert benchmark.equivalence([0.0] * 8) < 0.05 < benchmark.equivalence([0.5, 0.6] * 4)
    assert benchmark.holm({"a": 0.01, "b": 0.04, "c": 0.03}) == pytest.approx({"a": 0.03, "b": 0.06, "c": 0.06})


MARGINS = {-0.5: "greater", 0.5: "less"}


@pytest.mark.parametrize("benchmark", ["quality_page"], indirect=True)
def test_a_difference_that_is_called_detectable_is_found_four_times_in_five(benchmark):
    generator = torch.Generator().manual_seed(0)
    samples = benchmark.detectable(2.0) + 2.0 * torch.randn(20_000, 8, generator=generator, dtype=torch.float64)
    found = stats.ttest_1samp(samples.numpy(), 0, axis=1).pvalue < 0.05
    assert found.mean() == pytest.approx(0.8, abs=0.01)


@pytest.mark.parametrize("benchmark", ["quality_page"], indirect=True)
def test_the_best_rate_and_the_rates_near_it_are_interpolated(benchmark):
    curve = {rate: (math.log(rate) - math.log(0.013)) ** 2 for rate in (0.0025, 0.005, 0.01, 0.02, 0.04)}
    assert benchmark.vertex(curve) == pytest.approx(0.013)
    assert benchmark.vertex({1.0: 0.1, 2.0: 0.2, 4.0: 0.3}) == 1.0
    width, inside = benchmark.robustness({1.0: 0.1, 2.0: 0.0, 4.0: 0.1})
    assert (width, inside) == (pytest.approx(2.0), True)  # half a step on either side: 0.05 is half of 0.1
    assert benchmark.robustness({1.0: 0.01, 2.0: 0.0, 4.0: 0.1})[1] is False


@pytest.mark.parametrize("benchmark", ["quality"], indirect=True)
def test_peft_learns_the_same_as_ours_from_the_same_factors(benchmark):
    study = next(benchmark.tasks(benchmark.argparse.Namespace(smoke=True)))
    ours, other = (benchmark.run(study, arm, 0.01, 0)["validation"] for arm in (benchmark.LORA, benchmark.PEFT))
    assert ours == pytest.approx(other, abs=1e-5)
    assert ours != benchmark.run(study, benchmark.OTHER, 0.01, 0)["validation"]


# --- reliability

reliability = pytest.mark.parametrize("benchmark", ["reliability"], indirect=True)
SEEDS = 3


class Machine(RuleBasedStateMachine):
    """Stands in for the random sequences: it fails at a multiple of ``wrong``."""

    wrong: int | None = None

    @rule(number=st.integers(1, 9))
    def step(self, number: int) -> None:
        assert self.wrong is None or number % self.wrong, number


def fuzz(benchmark: ModuleType, results: Path) -> dict[str, Any]:
    benchmark.main(["--fuzz", str(SEEDS * benchmark.AT_ONCE), "--results", str(results)])
    return json.loads(results.read_text())["fuzz"]


@reliability
def test_a_failure_of_the_sequences_is_kept_and_ends_the_command_with_an_error(benchmark, tmp_path, monkeypatch):
    broken = type("Broken", (Machine,), {"wrong": 2})
    monkeypatch.setattr(benchmark.fuzz, "Sequences", broken)
    results = tmp_path / "results.json"
    with pytest.raises(SystemExit, match="Seed 0: AssertionError") as stop:
        fuzz(benchmark, results)
    kept = json.loads(results.read_text())["fuzz"]
    assert [*kept] == ["0"]
    assert "step(number=2)" in " ".join(kept["0"]["failure"])  # the shortest sequence
    assert "step(number=2)" in stop.value.code
    content = json.loads(benchmark.RESULTS.read_text()) | {"fuzz": kept}
    assert "**Failed: Seed 0" in benchmark.page(content)
    assert "**0**, of 0 seeds" in benchmark.page(content)
    monkeypatch.setattr(benchmark.fuzz, "Sequences", Machine)  # it was fixed
    assert [*fuzz(benchmark, results)] == ["0", "1", "2"]


@reliability
def test_the_sequences_go_on_where_they_stopped(benchmark, tmp_path, monkeypatch):
    monkeypatch.setattr(benchmark.fuzz, "Sequences", Machine)
    seen: list[int] = []
    whole = benchmark.fuzzed
    monkeypatch.setattr(benchmark, "fuzzed", lambda number: seen.append(number) or whole(number))
    benchmark.main(["--fuzz", str(2 * benchmark.AT_ONCE), "--results", str(tmp_path / "results.json")])
    found = fuzz(benchmark, tmp_path / "results.json")
    assert seen == [0, 1, 2]
    assert found == {str(number): {"sequences": benchmark.AT_ONCE, "refused": 0} for number in range(SEEDS)}


@reliability
def test_the_page_of_reliability_is_that_of_its_results(benchmark):
    content = json.loads(benchmark.RESULTS.read_text())
    assert benchmark.page(content) == benchmark.PAGE.read_text()
    assert benchmark.failures(content) == []


@reliability
def test_a_fit_that_was_stopped_goes_on_and_writes_down_every_epoch(benchmark, tmp_path, monkeypatch):
    for epochs in (2, 5):
        monkeypatch.setattr(benchmark, "EPOCHS", epochs)
        benchmark.fit_to_the_end(tmp_path)
    assert (tmp_path / benchmark.TRAINED).read_text().split() == ["0", "1", "2", "3", "4"]
    assert (tmp_path / benchmark.LAST).exists()


class Fit:
    """Stands in for the process of a fit, of which a kill lets three more epochs through.

    Args:
        benchmark: The benchmark.
        folder: Where the checkpoints are.
        goes_on: Whether it goes on from the last checkpoint, or starts anew.
        end: The adapter that it ends with.
    """

    def __init__(self, benchmark: ModuleType, folder: Path, goes_on: bool, end: Path) -> None:
        self.names, self.folder, self.end, self.is_killed = benchmark, folder, end, False
        self.first = len([*folder.glob("epoch=*.ckpt")]) if goes_on else 0

    def send_signal(self, number: int) -> None:
        self.is_killed = True

    def wait(self) -> int:
        last = self.first + 3 if self.is_killed else self.names.EPOCHS
        for epoch in range(self.first, last):
            (self.folder / f"epoch={epoch}.ckpt").touch()
            self.names._append(self.folder / self.names.TRAINED, f"{epoch}\n")
        if not self.is_killed:
            shutil.copy(self.end, self.folder / self.names.LAST)
        return -signal.SIGKILL if self.is_killed else 0


@reliability
@pytest.mark.parametrize("loses", ["nothing", "epochs", "bits"])
def test_kills_that_lose_work_are_seen(benchmark, loses, tmp_path, monkeypatch):
    ends = {}
    for seed in (0, 1):
        torch.manual_seed(seed)
        run = trainer(LoRACallback(rank=2), max_steps=1 + seed)
        run.fit(Toy(), loader())
        run.save_checkpoint(tmp_path / f"{seed}.ckpt")
        ends[seed] = tmp_path / f"{seed}.ckpt"
    monkeypatch.setattr(benchmark, "LONGEST", 0.0)
    monkeypatch.setattr(
        benchmark,
        "_start",
        lambda folder: Fit(benchmark, folder, loses != "epochs", ends[loses == "bits" and folder.name == "broken"]),
    )
    arguments = ["--kills", "2", "--results", str(tmp_path / "results.json")]
    message = {"epochs": "2 kills have lost 6 epochs", "bits": "ends with other bits"}
    with pytest.raises(SystemExit, match=message[loses]) if loses in message else nullcontext():
        benchmark.main(arguments)
    found = json.loads((tmp_path / "results.json").read_text())["kills"]
    assert (found["equal_bits"], found["epochs_again"]) == (loses != "bits", 6 if loses == "epochs" else 0)
    assert found["checkpoints_at_each"] == ([3, 3] if loses == "epochs" else [3, 6])


@reliability
def test_many_fits_in_one_process_are_measured(benchmark):
    found = benchmark.soaked(2)
    assert found["fits"] == 2
    assert found["open_files_more"] == 0


# --- mistakes made on purpose


@pytest.mark.parametrize("benchmark", ["mutants"], indirect=True)
def test_every_mistake_can_still_be_made_and_stands_on_the_page(benchmark, tmp_path):
    content = json.loads((FOLDER / "reliability.json").read_text())["mutants"]["found"]
    assert [*content] == [mutant.mistake for mutant in benchmark.MUTANTS]
    for number, mutant in enumerate(benchmark.MUTANTS):
        text = benchmark.mutated(mutant, tmp_path / str(number)).read_text()
        compile(text, mutant.file, "exec")
        assert text != (benchmark.ROOT / benchmark.PACKAGE / mutant.file).read_text()


@pytest.mark.parametrize("benchmark", ["mutants"], indirect=True)
def test_a_mistake_whose_lines_are_gone_is_an_error(benchmark, tmp_path):
    gone = benchmark.MUTANTS[0]._replace(old="no such line")
    with pytest.raises(ValueError, match="'no such line' 0 times, not once"):
        benchmark.mutated(gone, tmp_path)


@reliability
@pytest.mark.parametrize("wrong", [None, 2, 1])
def test_sequences_are_counted_until_a_mistake_is_seen(benchmark, wrong, monkeypatch):
    monkeypatch.setattr(benchmark.fuzz, "Sequences", type("Broken", (Machine,), {"wrong": wrong}))
    found = benchmark.first_failure(2 * benchmark.AT_ONCE)
    if wrong is None:
        assert found == {"sequences": None, "seen": None}
    else:
        assert "AssertionError" in found["seen"]
        assert 1 <= found["sequences"] <= (benchmark.AT_ONCE if wrong > 1 else 1)
