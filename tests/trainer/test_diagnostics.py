"""When a fit is measured, and what reaches the loggers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import Logger
from torch import Tensor, nn

from lightning_lora import LoRACallback, lora_layers
from lightning_lora.trainer import diagnostics
from lightning_lora.trainer.diagnostics import Diagnostics
from tests.distributed.cpu_fsdp import CPUFSDPStrategy
from tests.test_callback import Duel
from tests.toys import FEATURES, Toy, loader, network, trainer

EACH = ("update_over_weight", "grad_norm_A", "grad_norm_B", "effective_rank", "dead_share")


class Remembers(Logger):
    """Keeps what it is given, by step."""

    name = version = "memory"

    def __init__(self) -> None:
        self.found: dict[int, dict[str, float]] = {}

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        ours = {name: value for name, value in metrics.items() if name.startswith("lora/")}
        if ours:
            self.found[int(step or 0)] = ours

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None: ...


class Gradients(Callback):
    """Keeps the norm of the gradient of ``net.0``'s B that each step uses."""

    def __init__(self) -> None:
        self.norms: list[float] = []

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        self.norms.append(float(lora_layers(pl_module)["net.0"].lora.B.grad.norm()))


def fit(module: Any, every: int | None, *callbacks: Callback, **options: Any) -> dict[int, dict[str, float]]:
    """Return what a logger that is told every step has been told, by step."""
    logger = Remembers()
    lora = LoRACallback(rank=4, diagnostics_every_n_steps=every)
    defaults = {"max_steps": 6, "max_epochs": -1, "log_every_n_steps": 1}
    ckpt_path = options.pop("ckpt_path", None)
    run = trainer(lora, *callbacks, logger=logger, **(defaults | options))
    run.fit(module, loader(), ckpt_path=ckpt_path)
    return logger.found


@pytest.mark.parametrize("every", [None, 0])
def test_it_is_off_by_default_and_then_costs_nothing(every: int | None, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(diagnostics, "Diagnostics", None)  # would fail if it were made
    assert fit(Toy(), every) == {}


def test_each_group_has_five_numbers_at_the_steps_that_the_logger_takes():
    found = fit(Toy(), 3, log_every_n_steps=3)
    assert list(found) == [2, 5]  # loggers count from 0
    assert found[2].keys() == {f"lora/net.{layer}/{name}" for layer in (0, 2, 4) for name in EACH}
    assert found[2] != found[5]


def test_between_two_measurements_the_last_one_stands():
    found = fit(Toy(), 2)
    assert list(found) == [1, 2, 3, 5]  # steps 0 to 3 are the first epoch
    assert found[1] == found[2] != found[3]


def test_the_numbers_are_those_of_the_module_after_the_step():
    module = Toy()
    found = fit(module, 6)
    expected = {f"lora/{name}": value for name, value in Diagnostics(module).metrics().items()}
    assert {name: found[5][name] for name in expected} == pytest.approx(expected)


@pytest.mark.parametrize("options", [{}, {"accumulate_grad_batches": 2}, {"precision": "bf16-mixed"}])
def test_gradients_are_those_that_the_optimizer_uses_before_clipping(options: dict[str, Any]):
    gradients = Gradients()
    found = fit(Toy(), 2, gradients, gradient_clip_val=1e-3, max_steps=4, **options)
    assert len(gradients.norms) == 4
    assert found[1]["lora/net.0/grad_norm_B"] == pytest.approx(gradients.norms[1])
    assert found[3]["lora/net.0/grad_norm_B"] == pytest.approx(gradients.norms[3])


def test_measuring_does_not_change_the_training():
    measured, plain = Toy(), Toy()
    fit(measured, 1)
    fit(plain, None)
    assert measured.losses == plain.losses


def test_of_several_optimizers_a_batch_is_logged_once_and_completely():
    found = fit(Duel(), 2, max_steps=8)  # two optimizer steps a batch
    assert list(found) == [1, 2, 3]
    groups = {f"lora/{half}.{layer}/grad_norm_A" for half in ("left", "right") for layer in (0, 2, 4)}
    assert {name for name in found[3] if name.endswith("grad_norm_A")} == groups


class ByHand(Toy):
    """Steps its optimizer itself, every third batch."""

    def __init__(self, *, past_lightning: bool = False) -> None:
        super().__init__()
        self.automatic_optimization, self.past_lightning = False, past_lightning

    def training_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.manual_backward(super().training_step(batch, batch_idx))
        self.seen = getattr(self, "seen", 0) + 1
        if self.seen % 3 == 0:
            optimizer = self.optimizers(use_pl_optimizer=not self.past_lightning)
            optimizer.step()
            optimizer.zero_grad()


def test_a_module_that_accumulates_by_itself_is_measured_at_its_next_step():
    found = fit(ByHand(), 4, max_steps=3, log_every_n_steps=1)
    assert min(found) == 5  # the fourth batch is due, the sixth steps
    assert found[5].keys() == {f"lora/net.{layer}/{name}" for layer in (0, 2, 4) for name in EACH}


def test_optimizers_stepped_past_lightning_leave_the_gradients_out():
    found = fit(ByHand(past_lightning=True), 3, max_steps=-1, max_epochs=1)
    assert found[2]["lora/net.0/update_over_weight"] > 0
    assert not [name for name in found[2] if "grad" in name]


def test_a_resumed_run_measures_at_the_same_steps(tmp_path: Any):
    whole = fit(Toy(), 5, max_steps=10)
    checkpoint = ModelCheckpoint(tmp_path, save_last=True, every_n_train_steps=4)
    fit(Toy(), 5, checkpoint, max_steps=4)
    resumed = fit(Toy(), 5, max_steps=10, ckpt_path=tmp_path / "last.ckpt")
    assert min(resumed) == 4
    assert resumed[9] == whole[9]


def test_metrics_can_be_monitored(tmp_path: Any):
    checkpoint = ModelCheckpoint(tmp_path, monitor="lora/net.0/update_over_weight", every_n_train_steps=4)
    fit(Toy(), 4, checkpoint)
    assert float(checkpoint.best_model_score) > 0


def test_nothing_of_the_module_is_kept_after_the_fit():
    callback = LoRACallback(rank=4, diagnostics_every_n_steps=1)
    trainer(callback).fit(Toy(), loader())
    assert callback._session is None


# --- what is refused


@pytest.mark.parametrize(("value", "kind"), [(True, TypeError), ("5", TypeError), (2.0, TypeError), (-1, ValueError)])
def test_nonsense_is_refused_by_name(value: Any, kind: type[Exception]):
    with pytest.raises(kind, match=r"LoRACallback\.diagnostics_every_n_steps must be"):
        LoRACallback(diagnostics_every_n_steps=value)


def test_a_trainer_that_logs_nothing_is_refused():
    callback = LoRACallback(rank=4, diagnostics_every_n_steps=1)
    options = {"barebones": True, "logger": None, "enable_checkpointing": None, "limit_val_batches": None}
    with pytest.raises(MisconfigurationException, match="barebones Trainer logs nothing"):
        trainer(callback, **options).fit(Toy(), loader())


def test_flat_slices_of_fsdp_are_refused_before_anything_is_attached():
    module = Toy()
    callback = LoRACallback(rank=4, diagnostics_every_n_steps=1)
    with pytest.raises(MisconfigurationException, match="diagnostics_every_n_steps: under FSDPStrategy"):
        callback.setup(trainer(callback, strategy=CPUFSDPStrategy()), module, "fit")
    assert not lora_layers(module)


class Tokens(Toy):
    """Learns from token numbers; only rows of its embedding are trained."""

    def build(self) -> None:
        self.embed, self.net = nn.Embedding(4, FEATURES), network()

    def loss(self, batch: list[Tensor]) -> Tensor:
        return self.net(self.embed(torch.zeros(len(batch[0]), dtype=torch.long))).square().mean()


def test_a_model_without_low_rank_adapters_is_refused():
    callback = LoRACallback(target_modules=[], trainable_token_indices=[0, 1], diagnostics_every_n_steps=1)
    with pytest.raises(MisconfigurationException, match="no low-rank adapter to measure"):
        trainer(callback).fit(Tokens(), loader())
