"""Live diagnostics: the numbers equal a dense computation, and reach the loggers at the right steps."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import Logger
from torch import Tensor, nn

from lightning_lora import LoRACallback, LoRAConfig, attach, lora_layers
from lightning_lora.analysis import read_matrices
from lightning_lora.analysis.spectrum import effective_rank
from lightning_lora.trainer import diagnostics
from lightning_lora.trainer.diagnostics import DEAD, Diagnostics, factor_grams, group_of, singular_values
from tests.contract import train_all
from tests.distributed.cpu_fsdp import CPUFSDPStrategy
from tests.peft_format.kinds import Experts
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
def test_off_by_default_and_free(every: int | None, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(diagnostics, "Diagnostics", None)  # would fail if it were made
    assert fit(Toy(), every) == {}


def test_five_metrics_per_group_at_logger_steps():
    found = fit(Toy(), 3, log_every_n_steps=3)
    assert list(found) == [2, 5]  # loggers count from 0
    assert found[2].keys() == {f"lora/net.{layer}/{name}" for layer in (0, 2, 4) for name in EACH}
    assert found[2] != found[5]


def test_last_value_stays_between_measurements():
    found = fit(Toy(), 2)
    assert list(found) == [1, 2, 3, 5]  # steps 0 to 3 are the first epoch
    assert found[1] == found[2] != found[3]


def test_updates_are_measured_after_step():
    module = Toy()
    found = fit(module, 6)
    expected = {f"lora/{name}": value for name, value in Diagnostics(module).metrics().items()}
    assert {name: found[5][name] for name in expected} == pytest.approx(expected)


@pytest.mark.parametrize("options", [{}, {"accumulate_grad_batches": 2}, {"precision": "bf16-mixed"}])
def test_gradients_are_measured_before_clipping(options: dict[str, Any]):
    gradients = Gradients()
    found = fit(Toy(), 2, gradients, gradient_clip_val=1e-3, max_steps=4, **options)
    assert len(gradients.norms) == 4
    assert found[1]["lora/net.0/grad_norm_B"] == pytest.approx(gradients.norms[1])
    assert found[3]["lora/net.0/grad_norm_B"] == pytest.approx(gradients.norms[3])


def test_diagnostics_do_not_change_training():
    measured, plain = Toy(), Toy()
    fit(measured, 1)
    fit(plain, None)
    assert measured.losses == plain.losses


def test_several_optimizers_are_logged_once_per_batch():
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


def test_manual_accumulation_is_measured_at_next_step():
    found = fit(ByHand(), 4, max_steps=3, log_every_n_steps=1)
    assert min(found) == 5  # the fourth batch is due, the sixth steps
    assert found[5].keys() == {f"lora/net.{layer}/{name}" for layer in (0, 2, 4) for name in EACH}


def test_steps_past_lightning_have_no_gradient_norms():
    found = fit(ByHand(past_lightning=True), 3, max_steps=-1, max_epochs=1)
    assert found[2]["lora/net.0/update_over_weight"] > 0
    assert not [name for name in found[2] if "grad" in name]


def test_resumed_run_measures_at_same_steps(tmp_path: Any):
    whole = fit(Toy(), 5, max_steps=10)
    checkpoint = ModelCheckpoint(tmp_path, save_last=True, every_n_train_steps=4)
    fit(Toy(), 5, checkpoint, max_steps=4)
    resumed = fit(Toy(), 5, max_steps=10, ckpt_path=tmp_path / "last.ckpt")
    assert min(resumed) == 4
    assert resumed[9] == whole[9]


def test_model_checkpoint_can_monitor_metrics(tmp_path: Any):
    checkpoint = ModelCheckpoint(tmp_path, monitor="lora/net.0/update_over_weight", every_n_train_steps=4)
    fit(Toy(), 4, checkpoint)
    assert float(checkpoint.best_model_score) > 0


def test_callback_drops_session_after_fit():
    callback = LoRACallback(rank=4, diagnostics_every_n_steps=1)
    trainer(callback).fit(Toy(), loader())
    assert callback._session is None


# --- what is refused


@pytest.mark.parametrize(("value", "kind"), [(True, TypeError), ("5", TypeError), (2.0, TypeError), (-1, ValueError)])
def test_invalid_interval_is_refused(value: Any, kind: type[Exception]):
    with pytest.raises(kind, match=r"LoRACallback\.diagnostics_every_n_steps must be"):
        LoRACallback(diagnostics_every_n_steps=value)


def test_barebones_trainer_is_refused():
    callback = LoRACallback(rank=4, diagnostics_every_n_steps=1)
    options = {"barebones": True, "logger": None, "enable_checkpointing": None, "limit_val_batches": None}
    with pytest.raises(MisconfigurationException, match="barebones Trainer logs nothing"):
        trainer(callback, **options).fit(Toy(), loader())


def test_fsdp_is_refused_before_attaching():
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


def test_model_without_low_rank_adapter_is_refused():
    callback = LoRACallback(target_modules=[], trainable_token_indices=[0, 1], diagnostics_every_n_steps=1)
    with pytest.raises(MisconfigurationException, match="no low-rank adapter to measure"):
        trainer(callback).fit(Tokens(), loader())


# --- the numbers


class Mixed(nn.Module):
    """Two blocks of linear layers, and one layer of each other geometry."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.ModuleDict({"q_proj": nn.Linear(12, 8), "v_proj": nn.Linear(12, 8)}) for _ in range(2)
        )
        self.conv = nn.Conv2d(3, 6, 3)
        self.qkv = nn.Linear(8, 24)
        self.embed = nn.Embedding(20, 8)
        self.experts = Experts()
        self.attention = nn.MultiheadAttention(8, 2)


def mixed(rng: torch.Generator) -> nn.Module:
    model = Mixed()
    config = LoRAConfig(
        rank=3,
        target_modules=["q_proj", "v_proj", "conv", "embed", "attention"],
        target_parameters=["experts.up"],
        target_slices={"qkv": {"q": "0:8", "v": "16:24"}},
        rank_pattern={"v_proj": 2},
    )
    attach(model, config)
    train_all(model, rng)
    return model


@pytest.fixture
def model(rng: torch.Generator) -> nn.Module:
    return mixed(rng)


def dense_spectra(model: nn.Module) -> dict[str, list[tuple[Tensor, Tensor]]]:
    """Return by group the singular values of each update, padded to its rank, and the weight."""
    found: dict[str, list[tuple[Tensor, Tensor]]] = {}
    for matrix in read_matrices(model):
        assert matrix.weight is not None
        values = torch.linalg.svdvals(matrix.scaling * matrix.B.double() @ matrix.A.double())[: matrix.rank]
        found.setdefault(group_of(matrix.name.partition("[")[0]), []).append((values, matrix.weight.double()))
    return found


def test_metrics_equal_dense_computation(model: nn.Module):
    metrics, truth = Diagnostics(model).metrics(), dense_spectra(model)
    assert {"q_proj", "v_proj", "conv", "embed", "in_proj_weight", "up", "q", "v"} <= truth.keys()
    for group, parts in truth.items():
        update = math.sqrt(sum(float(values.square().sum()) for values, _ in parts))
        weight = math.sqrt(sum(float(W.square().sum()) for _, W in parts))
        ranks = [effective_rank(values) for values, _ in parts]
        assert metrics[f"{group}/update_over_weight"] == pytest.approx(update / weight, rel=1e-5)
        assert metrics[f"{group}/effective_rank"] == pytest.approx(sum(ranks) / len(ranks), rel=1e-5)
        assert metrics[f"{group}/dead_share"] == 0.0
    assert {name.partition("/")[0] for name in metrics} == truth.keys()


def test_metrics_do_not_depend_on_factorization(model: nn.Module, rng: torch.Generator):
    before = Diagnostics(model).metrics()
    for layer in lora_layers(model).values():
        for adapter in layer.adapters().values():
            rank = adapter.A.shape[-2]
            M = torch.eye(rank) + 0.3 * torch.randn(rank, rank, generator=rng)
            adapter.A.data = M @ adapter.A.data
            adapter.B.data = adapter.B.data @ torch.linalg.inv(M)
    assert Diagnostics(model).metrics() == pytest.approx(before, rel=1e-4)


def test_untrained_adapter_is_all_dead():
    model = Mixed()
    attach(model, LoRAConfig(rank=3, target_modules=["q_proj", "conv"]))
    metrics = Diagnostics(model).metrics()
    assert {value for name, value in metrics.items() if name.endswith("dead_share")} == {1.0}
    assert {value for name, value in metrics.items() if not name.endswith("dead_share")} == {0.0}


def test_dead_share_threshold(rng: torch.Generator):
    model = nn.Sequential(nn.Linear(10, 10))
    attach(model, LoRAConfig(rank=4, alpha=4))
    U, V = (torch.linalg.qr(torch.randn(10, 4, generator=rng))[0] for _ in range(2))
    adapter = lora_layers(model)["0"].lora
    adapter.A.data = V.T.contiguous()
    for weakest, dead in ((1.1 * DEAD, 0.25), (0.9 * DEAD, 0.5)):
        adapter.B.data = U * torch.tensor([5.0, 2.0, 5.0 * weakest, 0.0])
        assert Diagnostics(model).metrics()["0/dead_share"] == dead


def test_gradient_norms_cover_group(model: nn.Module, rng: torch.Generator):
    q, v = ([model.blocks[i][name].lora for i in range(2)] for name in ("q_proj", "v_proj"))
    for adapter in (*q, *v):
        adapter.A.grad, adapter.B.grad = (torch.randn(p.shape, generator=rng) for p in (adapter.A, adapter.B))
    measured = Diagnostics(model)
    measured.note_gradients(torch.optim.SGD([p for adapter in q for p in adapter.parameters()], lr=0.1))
    metrics = measured.metrics()
    for factor in "AB":
        all_of_q = torch.cat([getattr(adapter, factor).grad.flatten() for adapter in q])
        assert metrics[f"q_proj/grad_norm_{factor}"] == pytest.approx(float(all_of_q.norm()))
    assert "v_proj/grad_norm_A" not in metrics  # another optimizer's
    assert not [name for name in measured.metrics() if "grad" in name]  # forgotten


def test_weights_are_read_once(model: nn.Module, monkeypatch: pytest.MonkeyPatch):
    counts = {"_weight_square": 0, "factor_grams": 0, "singular_values": 0}
    for name in counts:
        own = getattr(diagnostics, name)

        def counting(*arguments: object, own=own, name=name) -> object:
            counts[name] += 1
            return own(*arguments)

        monkeypatch.setattr(diagnostics, name, counting)
    measured, adapters = Diagnostics(model), len(list(diagnostics._watched(model)))
    for _ in range(3):
        measured.metrics()
    assert counts == {"_weight_square": adapters, "factor_grams": 3 * adapters, "singular_values": 3 * 2}  # two ranks


def test_no_weight_sized_tensor_is_allocated(monkeypatch: pytest.MonkeyPatch):
    class Largest(torch.utils._python_dispatch.TorchDispatchMode):
        elements = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            if isinstance(result, Tensor) and not result._is_view():
                self.elements = max(self.elements, result.numel())
            return result

    monkeypatch.setattr(diagnostics, "_BLOCK", 1000)
    model = nn.Sequential(nn.Linear(200, 300), nn.Linear(300, 200))
    attach(model, LoRAConfig(rank=2, target_modules=["0"], target_slices={"1": {"q": "50:150"}}))
    with Largest() as largest:
        Diagnostics(model).metrics()
    assert largest.elements <= 1000


def test_quantized_weight_has_no_norm(model: nn.Module):
    model.blocks[0]["q_proj"].weight = nn.Parameter(torch.ones(8, 12, dtype=torch.uint8), requires_grad=False)
    measured = Diagnostics(model)
    metrics = measured.metrics()
    assert measured.unknown_weights == ["blocks.0.q_proj"]
    assert "q_proj/update_over_weight" not in metrics
    assert "v_proj/update_over_weight" in metrics
    assert metrics["q_proj/effective_rank"] > 1


def test_non_finite_factors_give_nan(model: nn.Module):
    expected = Diagnostics(model).metrics()
    model.blocks[1]["q_proj"].lora.B.data[0, 0] = math.nan
    metrics = Diagnostics(model).metrics()
    for name in ("update_over_weight", "effective_rank", "dead_share"):
        assert math.isnan(metrics[f"q_proj/{name}"])
        assert metrics[f"conv/{name}"] == expected[f"conv/{name}"]


def test_gram_matrices_give_singular_values(model: nn.Module):
    adapter = model.blocks[0]["q_proj"].lora
    gram_A, gram_B = factor_grams(adapter)
    truth = torch.linalg.svdvals(adapter.spec.scaling * adapter.B.double() @ adapter.A.double())[:3]
    torch.testing.assert_close(singular_values(gram_A, gram_B)[0], truth, rtol=1e-10, atol=0)


@pytest.mark.parametrize(
    ("name", "group"),
    [
        ("net.blocks.11.attn.q_proj", "q_proj"),
        ("blocks.0.mlp.2", "mlp.2"),
        ("qkv.q", "q"),
        ("net.0", "net.0"),
        ("3", "3"),
        ("0.1", "0.1"),
    ],
)
def test_group_names(name: str, group: str):
    assert group_of(name) == group
