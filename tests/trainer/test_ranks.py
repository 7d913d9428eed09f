"""A rank schedule in a Trainer: it decides, resumes, exports, and says what it does."""

from __future__ import annotations

import json
import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import (
    Callback,
    EMAWeightAveraging,
    ModelCheckpoint,
    StochasticWeightAveraging,
    WeightAveraging,
)
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn

from lightning_lora import (
    LoRACallback,
    LoRAConfig,
    adapter_state_dict,
    attach,
    load_adapter,
    lora_layers,
    save_adapter,
)
from lightning_lora.adapted_model import AdaptedModel
from lightning_lora.analysis import analyze
from lightning_lora.analysis.plots import can_draw
from lightning_lora.analysis.reports import analysis_page
from lightning_lora.attachment import get_attachment
from lightning_lora.layers import LowRankAdapter
from lightning_lora.ops import linear as ops
from tests.toys import Toy, loader, snapshot, trainer
from tests.trainer.test_checkpoints import assert_same_bits, read

peft = pytest.importorskip("peft")

STEPS = 40
ONE_BATCH = loader(8)  # so that every step ends an epoch, where a loader is resumed exactly
COSTS = {"net.0": 24, "net.2": 32, "net.4": 24}  # in + out
X = torch.linspace(-1, 1, 24).view(3, 8)


class Slow(Toy):
    """Trains by AdamW, whose states a resumed run needs."""

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=1e-2, weight_decay=0.1)


def callback(**options: Any) -> LoRACallback:
    return LoRACallback(**{"rank": 2, "rank_schedule": {"max_rank": 4}, **options})


def run_of(*callbacks: Callback, steps: int = STEPS, **options: Any) -> Trainer:
    return trainer(*callbacks, max_steps=steps, **{"max_epochs": -1, **options})


def adapters(module: nn.Module) -> dict[str, LowRankAdapter]:
    found = AdaptedModel(module).adapters
    return {name: adapter for name, adapter in found.items() if isinstance(adapter, LowRankAdapter)}


def parameters(ranks: dict[str, int]) -> int:
    return sum(rank * COSTS[name] for name, rank in ranks.items())


class Watch(Callback):
    """Records after each step which components are in use, and asserts that the others are zero."""

    def __init__(self) -> None:
        self.ranks: list[dict[str, int]] = []

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, *_: Any) -> None:
        for adapter in adapters(pl_module).values():
            assert not adapter.B[:, ~adapter.in_use].any()
        self.ranks.append({name: int(adapter.in_use.sum()) for name, adapter in adapters(pl_module).items()})


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the checkpoints of a whole training, after every step."""
    folder = tmp_path_factory.mktemp("ranks")
    module, run = Slow(), run_of(callback(), ModelCheckpoint(folder, "{step}", every_n_train_steps=1, save_top_k=-1))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ops, "_FEW", 0)  # as in each test
        run.fit(module, ONE_BATCH)
    torch.save(snapshot(module), folder / "end.pt")
    return folder


def at(files: Path, step: int) -> Path:
    return files / f"step={step}.ckpt"


# --- deciding


def test_the_budget_is_met_and_the_fit_ends_with_adapters_of_the_ranks_in_use() -> None:
    module, lora, watch = Slow(), callback(), Watch()
    run_of(lora, watch).fit(module, loader())
    assert watch.ranks[0] == {"net.0": 4, "net.2": 4, "net.4": 4}
    used = [parameters(ranks) for ranks in watch.ranks]
    assert used == sorted(used, reverse=True)
    assert used[-1] <= 2 * sum(COSTS.values()) < used[5]
    assert lora.ranks() == watch.ranks[-1]
    assert {name: layer.rank for name, layer in lora_layers(module).items()} == lora.ranks()
    for name, tensor in adapter_state_dict(module).items():
        assert lora.ranks()[name.partition(".lora")[0]] == tensor.shape[0 if name.endswith("A") else 1]


def test_accumulated_batches_count_as_one_step() -> None:
    single, accumulated = Watch(), Watch()
    run_of(callback(), single).fit(Slow(), loader(batch_size=8))
    run_of(callback(), accumulated, accumulate_grad_batches=2).fit(Slow(), loader(batch_size=4))
    assert len(accumulated.ranks) == 2 * STEPS
    assert accumulated.ranks[1::2] == single.ranks


class TwoOptimizers(Slow):
    """Trains its layers by two optimizers, the second at every other batch."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: list[Tensor], batch_idx: int) -> None:  # type: ignore[override]
        first, second = self.optimizers()
        for optimizer in (first, second) if batch_idx % 2 else (first,):
            optimizer.zero_grad()
        self.manual_backward(self.loss(batch))
        first.step()
        if batch_idx % 2:
            second.step()

    def configure_optimizers(self) -> Any:
        parts = (self.net[0].parameters(), [*self.net[2].parameters(), *self.net[4].parameters()])
        return [torch.optim.AdamW(part, lr=1e-2) for part in parts]


def test_several_optimizers_of_manual_optimization_share_the_budget() -> None:
    watch = Watch()
    run_of(callback(), watch, steps=-1, max_epochs=10).fit(TwoOptimizers(), loader())
    assert parameters(watch.ranks[-1]) <= 2 * sum(COSTS.values())
    assert len(watch.ranks) == STEPS


class Raw(TwoOptimizers):
    """Steps an optimizer without telling Lightning."""

    def training_step(self, batch: list[Tensor], batch_idx: int) -> None:  # type: ignore[override]
        first, second = self.optimizers(use_pl_optimizer=False)
        self.loss(batch).backward()  # type: ignore[no-untyped-call]
        first.step()
        second.step()


def test_steps_past_lightning_are_refused() -> None:
    with pytest.raises(RuntimeError, match=r"optimizers were stepped past Lightning"):
        run_of(callback(), steps=-1, max_epochs=10).fit(Raw(), loader())


@pytest.mark.parametrize(
    "averaging",
    [
        lambda: EMAWeightAveraging(decay=0.9),
        lambda: WeightAveraging(),
        lambda: StochasticWeightAveraging(1e-2, swa_epoch_start=1),
    ],
    ids=["EMA", "mean", "SWA"],
)
def test_averages_of_the_model_lose_the_same_components(averaging: Any) -> None:
    module, lora = Slow(), callback()
    base = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    run_of(lora, averaging(), steps=-1, max_epochs=10).fit(module, loader())
    assert {name: layer.rank for name, layer in lora_layers(module).items()} == lora.ranks()
    assert parameters(lora.ranks()) <= 2 * sum(COSTS.values())
    for name, tensor in base.items():
        assert torch.equal(module.state_dict()[name], tensor)


@pytest.mark.parametrize("score", ["gate", "energy"])
def test_an_average_equals_that_of_the_products_of_a_training_at_fixed_ranks(score: str) -> None:
    """Of one state, every average is that state, in whatever basis and order its components are."""

    class Still(Slow):
        def configure_optimizers(self) -> Any:
            return torch.optim.AdamW(self.parameters(), lr=0.0, weight_decay=0.0)

    module = Still()

    class Fill(Callback):
        def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
            average = trainer.callbacks[-1]._average_model if trainer.callbacks else None  # type: ignore[attr-defined]
            for each in (pl_module, average.module if average else pl_module):
                for adapter in adapters(each).values():
                    torch.manual_seed(0)
                    with torch.no_grad():
                        adapter.B[:, 3:].normal_()

    products: dict[str, Tensor] = {}

    class Keep(Callback):
        def on_train_batch_end(self, trainer: Trainer, pl_module: Any, *_: Any) -> None:
            if trainer.global_step == 1:
                products.update({n: (a.B @ a.A).detach().clone() for n, a in adapters(pl_module).items()})

    lora = callback(allow_untrained=["*"], rank_schedule={"max_rank": 4, "score": score})
    run_of(lora, Fill(), Keep(), EMAWeightAveraging(decay=0.999)).fit(module, loader())
    for name, adapter in adapters(module).items():
        torch.testing.assert_close((adapter.B @ adapter.A).detach(), products[name], rtol=1e-4, atol=1e-5)


# --- resuming


@pytest.mark.parametrize(
    "step", [3, 4, 5, 6, 20, 27, 28, 35]
)  # before, at and between decisions, and when all is final
def test_a_resumed_training_ends_as_the_whole_one_bit_for_bit(step: int, files: Path) -> None:
    module = Slow()
    run_of(callback() if step % 2 else LoRACallback()).fit(module, ONE_BATCH, ckpt_path=at(files, step))
    assert_same_bits(snapshot(module), torch.load(files / "end.pt"))


@pytest.mark.parametrize("score", ["adalora", "energy"])
def test_every_score_resumes_bit_for_bit(score: str, tmp_path: Path) -> None:
    whole, again = Slow(), Slow()
    options = {"rank_schedule": {"max_rank": 4, "score": score}}
    every = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=19, save_top_k=-1)
    run_of(callback(**options), every).fit(whole, ONE_BATCH)
    run_of(callback(**options)).fit(again, ONE_BATCH, ckpt_path=at(tmp_path, 19))
    assert_same_bits(snapshot(again), snapshot(whole))


def test_another_length_is_refused_unless_it_is_stated(files: Path) -> None:
    with pytest.raises(
        MisconfigurationException,
        match=r"made for 40 optimizer steps, and this Trainer will have made 60. Say which you mean: .*'total': 40",
    ):
        run_of(callback(), steps=60).fit(Slow(), ONE_BATCH, ckpt_path=at(files, 20))
    for total, expected in ((40, True), (60, False)):
        lora, watch = callback(rank_schedule={"max_rank": 4, "total": total}), Watch()
        run_of(lora, watch, steps=60).fit(Slow(), ONE_BATCH, ckpt_path=at(files, 8))
        is_final = [parameters(ranks) <= 2 * sum(COSTS.values()) for ranks in watch.ranks]
        assert (8 + is_final.index(True) + 1 <= 28) == expected


def test_other_options_are_refused(files: Path) -> None:
    for lora, message in (
        (callback(rank_schedule={"max_rank": 4, "score": "energy"}), "score='energy' (there 'gate')"),
        (LoRACallback(rank=4), "the checkpoint's training has one, {'max_rank': 4}, and this run has none"),
    ):
        with pytest.raises(MisconfigurationException, match=re.escape(message)):
            run_of(lora).fit(Slow(), ONE_BATCH, ckpt_path=at(files, 20))


def test_a_checkpoint_without_a_schedule_is_refused(tmp_path: Path) -> None:
    run = run_of(LoRACallback(rank=4))
    run.fit(Slow(), ONE_BATCH)
    run.save_checkpoint(tmp_path / "plain.ckpt")
    with pytest.raises(MisconfigurationException, match="the checkpoint's training had no rank_schedule"):
        run_of(callback()).fit(Slow(), ONE_BATCH, ckpt_path=tmp_path / "plain.ckpt")


def test_a_second_fit_asks_what_is_meant() -> None:
    module = Slow()
    run_of(lora := callback()).fit(module, ONE_BATCH)
    first = lora.ranks()
    with pytest.raises(MisconfigurationException, match="an earlier fit has decided the ranks"):
        run_of(callback()).fit(module, ONE_BATCH)
    run_of(LoRACallback(rank=2)).fit(module, ONE_BATCH)
    assert {name: layer.rank for name, layer in lora_layers(module).items()} == first
    run_of(lora := callback(fresh=True)).fit(module, ONE_BATCH)
    assert lora.ranks() == first


def test_a_checkpoint_saved_after_the_fit_resumes_with_the_final_ranks(tmp_path: Path) -> None:
    module, run = Slow(), run_of(lora := callback())
    run.fit(module, ONE_BATCH)
    run.save_checkpoint(tmp_path / "final.ckpt")
    again = Slow()
    run_of(LoRACallback(rank=2), steps=STEPS + 2).fit(again, ONE_BATCH, ckpt_path=tmp_path / "final.ckpt")
    assert {name: layer.rank for name, layer in lora_layers(again).items()} == lora.ranks()
    moments = read(tmp_path / "final.ckpt")["optimizer_states"][0]["state"]
    assert all(entry["exp_avg"].abs().sum() > 0 for entry in moments.values())


# --- what leaves is compact


def test_files_hold_the_ranks_in_use(files: Path) -> None:
    for step, rank in ((2, 4), (40, None)):
        module = Slow()
        load_adapter(module, at(files, step))
        end = torch.load(files / "end.pt")
        for name, layer in lora_layers(module).items():
            assert layer.rank == (rank or end[f"{name}.lora.A"].shape[0])
    assert_same_bits(snapshot(module), torch.load(files / "end.pt"))


def test_export_is_the_best_checkpoint_in_the_ranks_that_it_had(tmp_path: Path) -> None:
    class Rising(Slow):
        def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
            self.log("number", float(self.global_step))
            return super().training_step(batch, batch_idx)

    best = ModelCheckpoint(tmp_path / "ckpt", "{step}", monitor="number", every_n_train_steps=12, save_top_k=1)
    module = Rising()
    run_of(callback(export_dir=str(tmp_path / "out")), best).fit(module, loader())
    exported, loaded = Slow(), Slow()
    load_adapter(exported, tmp_path / "out")
    load_adapter(loaded, best.best_model_path)
    ranks = [{name: layer.rank for name, layer in lora_layers(each).items()} for each in (exported, loaded, module)]
    assert ranks[0] == ranks[1] != ranks[2]
    torch.testing.assert_close(exported.net(X), loaded.net(X))


class Wide(Slow):
    """Has one layer that the target needs, and one that changes nothing."""

    def build(self) -> None:
        super().build()
        with torch.random.fork_rng():
            torch.manual_seed(3)
            self.idle = nn.Linear(8, 16)

    def loss(self, batch: list[Tensor]) -> Tensor:
        return super().loss(batch) + 1e-9 * self.idle(batch[0]).mean()


def test_a_layer_that_nothing_needs_becomes_one_of_the_base_and_stock_peft_agrees(tmp_path: Path) -> None:
    module, lora = Wide(), callback(export_dir=str(tmp_path / "out"))
    run = run_of(lora)
    run.fit(module, loader())
    assert lora.ranks()["idle"] == 0
    assert "idle" not in lora_layers(module)
    assert type(module.idle) is nn.Linear
    run.save_checkpoint(tmp_path / "last.ckpt")
    again, base = Wide(), Wide()
    load_adapter(again, tmp_path / "last.ckpt")
    assert torch.equal(again.net(X), module.net(X))
    theirs = peft.PeftModel.from_pretrained(base, tmp_path / "out")
    torch.testing.assert_close(theirs.base_model.model.net(X), module.net(X))


def test_merged_weights_hold_what_is_in_use() -> None:
    kept, merged = Slow(), Slow()
    run_of(callback()).fit(kept, loader())
    run_of(callback(merge_on_teardown=True)).fit(merged, loader())
    assert not lora_layers(merged)
    torch.testing.assert_close(merged.net(X), kept.net(X))


def test_a_save_in_the_middle_is_compact(tmp_path: Path) -> None:
    class Save(Callback):
        def on_train_batch_end(self, trainer: Trainer, pl_module: Any, *_: Any) -> None:
            if trainer.global_step == 25:
                save_adapter(pl_module, tmp_path / "adapter")
                self.ranks = {name: adapter.rank for name, adapter in adapters(pl_module).items()}
                self.output = pl_module.net(X).detach()

    run_of(callback(), save := Save()).fit(Slow(), loader())
    again = Slow()
    load_adapter(again, tmp_path / "adapter")
    assert {name: layer.rank for name, layer in lora_layers(again).items()} == save.ranks
    torch.testing.assert_close(again.net(X).detach(), save.output)


def test_evaluation_of_a_checkpoint_in_the_module_that_was_trained(files: Path) -> None:
    module, lora = Slow(), callback()
    run = run_of(lora)
    run.fit(module, loader())
    for path in (at(files, 40), at(files, 20)):
        loaded = Slow()
        load_adapter(loaded, path)
        run.test(module, loader(), ckpt_path=path, verbose=False)
        torch.testing.assert_close(module.net(X), loaded.net(X))
        run_of(LoRACallback()).validate(fresh := Slow(), loader(), ckpt_path=path, verbose=False)
        torch.testing.assert_close(fresh.net(X), loaded.net(X))


# --- what a person sees


def test_loggers_get_the_ranks_at_each_decision(tmp_path: Path) -> None:
    lora, watch = callback(), Watch()
    run_of(lora, watch, logger=CSVLogger(tmp_path, name="", version="")).fit(Slow(), loader())
    lines = (tmp_path / "metrics.csv").read_text().splitlines()
    header, rows = lines[0].split(","), [line.split(",") for line in lines[1:]]
    found = {int(row[header.index("step")]): row for row in rows if row[header.index("lora/budget")]}
    assert len(found) > 10
    for step, row in found.items():
        ranks = watch.ranks[max(0, step)]
        assert float(row[header.index("lora/budget")]) == parameters(ranks)
        assert [float(row[header.index(f"lora/rank/{name}")]) for name in ranks] == list(ranks.values())


@pytest.mark.parametrize("step", [20, None])
def test_analysis_and_report_show_how_the_ranks_came_about(step: int | None, files: Path, tmp_path: Path) -> None:
    watch, lora = Watch(), callback()
    run = run_of(lora, watch)
    run.fit(module := Slow(), ONE_BATCH)
    run.save_checkpoint(tmp_path / "final.ckpt")
    found = analyze(at(files, step) if step else tmp_path / "final.ckpt")
    assert found.ranks is not None
    assert found.ranks.steps[0] == 0
    assert found.ranks.steps[-1] == (step or 28)
    for number, decided in enumerate(found.ranks.steps):
        ranks = {name: each[number] for name, each in found.ranks.ranks.items()}
        assert ranks == watch.ranks[max(0, decided - 1)]
        assert parameters(ranks) <= found.ranks.budgets[number]
    assert json.loads(json.dumps(found.to_dict()))["rank_history"]["steps"] == found.ranks.steps
    page = analysis_page(found, "mine")
    assert "How the ranks came about" in page.html()
    assert not can_draw() or "ranks" in page.pictures
    if step is None:
        assert analyze(module).ranks == found.ranks


def test_a_training_that_ends_early_says_what_is_missing() -> None:
    class Stop(Callback):
        def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
            trainer.should_stop = trainer.global_step == 10

    with pytest.warns(UserWarning, match=r"training ended after 10 steps, before the ranks were final \(step 28\)"):
        run_of(callback(), Stop()).fit(Slow(), loader())


def test_a_fast_dev_run_decides_nothing() -> None:
    module = Slow()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer(callback(), fast_dev_run=True).fit(module, loader())
    assert {layer.rank for layer in lora_layers(module).values()} == {4}


def test_a_training_without_an_end_is_refused() -> None:
    with pytest.raises(MisconfigurationException, match=r"this Trainer has no end\. Set max_steps or max_epochs"):
        run_of(callback(), steps=-1, max_time={"minutes": 5}).fit(Slow(), loader())


def test_a_budget_may_be_a_share_of_the_base() -> None:
    lora = callback(rank_schedule={"max_rank": 4, "budget": "20%"})
    run_of(lora).fit(Slow(), loader())
    base = sum(parameter.numel() for parameter in Slow().parameters())
    assert 0.2 * base - 32 < parameters(lora.ranks()) <= 0.2 * base


def test_without_a_schedule_there_are_no_ranks_to_tell() -> None:
    lora = LoRACallback(rank=2)
    run_of(lora, steps=2).fit(Slow(), loader())
    assert lora.ranks() == {}


class Narrow(Slow):
    """Ends in a layer that has fewer outputs than the components that a schedule starts with."""

    outputs = 3

    def build(self) -> None:
        super().build()
        self.net.append(nn.Linear(8, self.outputs))

    def loss(self, batch: list[Tensor]) -> Tensor:
        return self.net(batch[0]).square().mean()


class Narrower(Narrow):
    outputs = 2


NAMED = {"rank_schedule": "cubic", "target_modules": ["net.*"]}


@pytest.mark.filterwarnings("ignore:These adapters are not smaller")
def test_a_layer_too_small_for_a_schedule_is_told_what_fits_it() -> None:
    with pytest.raises(
        ValueError, match=r"rank 4 is above 3, .*; set rank_schedule=\{'max_rank': 3\}, or use"
    ) as refused:
        run_of(callback(**NAMED)).fit(Narrow(), loader())
    assert "rank_pattern" not in str(refused.value)
    # What the message says works.
    lora = callback(**NAMED | {"rank_schedule": {"max_rank": 3}})
    run_of(lora).fit(Narrow(), loader())
    assert "net.5" in lora.ranks()


@pytest.mark.filterwarnings("ignore:These adapters are not smaller")
def test_a_layer_too_small_for_the_rank_itself_is_told_both_numbers() -> None:
    with pytest.raises(ValueError, match=r"rank 4 is above 2, .*; set rank=1 and rank_schedule=\{'max_rank': 2\}"):
        run_of(callback(**NAMED)).fit(Narrower(), loader())
    run_of(lora := callback(**NAMED | {"rank": 1, "rank_schedule": {"max_rank": 2}})).fit(Narrower(), loader())
    assert "net.5" in lora.ranks()
    run_of(lora := callback(**NAMED | {"rank_schedule": {"max_rank": 2, "budget": 100}})).fit(Narrower(), loader())
    assert "net.5" in lora.ranks()


def test_a_layer_of_one_output_is_told_that_no_schedule_fits_it() -> None:
    one = Narrow()
    one.net[5] = nn.Linear(8, 1)
    with pytest.raises(ValueError, match=r"rank 4 is above 1, .*; leave it out with exclude_modules, or use"):
        run_of(callback(**NAMED)).fit(one, loader())


def test_the_report_of_a_schedule_says_why_a_layer_was_left_out() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        run_of(callback(rank_schedule="cubic")).fit(module := Narrow(), loader())
    assert "set rank_schedule={'max_rank': 3}" in get_attachment(module).report.left_out["net.5"]
    assert "lower it with rank_pattern" in attach(Narrow(), LoRAConfig(rank=4)).left_out["net.5"]
