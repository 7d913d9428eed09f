"""Suspicious settings warn once, with the numbers; torch's gradient errors name the adapters and the remedy."""

from __future__ import annotations

import ast
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import (
    CosineAnnealingLR,
    CosineAnnealingWarmRestarts,
    CyclicLR,
    LambdaLR,
    LinearLR,
    OneCycleLR,
    ReduceLROnPlateau,
    SequentialLR,
    StepLR,
)

from lightning_lora import LoRACallback, LoRAConfig, attach, detach
from lightning_lora.trainer.hints import (
    LOWEST_RATE,
    Coverage,
    coverage,
    explain_torch_error,
    warn_of_suspicious_settings,
)
from tests.distributed import unused_job
from tests.peft_format.kinds import Experts
from tests.processes import run_ranks
from tests.test_callback import Duel
from tests.toys import Toy, loader, network, trainer

ALL = Coverage(1, 1, ())


def adapted(**options: Any) -> nn.Module:
    model = network()
    attach(model, LoRAConfig(**({"rank": 4} | options)))
    return model


def warning(
    model: nn.Module | None = None,
    optimizer: Callable[[Any], Optimizer] = torch.optim.AdamW,
    schedule: Callable[[Optimizer], Any] | None = None,
    lr_ratio: float = 1.0,
    reach: Coverage | None = ALL,
) -> str | None:
    model = adapted() if model is None else model
    made = optimizer([p for p in model.parameters() if p.requires_grad])
    schedulers = [] if schedule is None else [schedule(made)]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        warn_of_suspicious_settings(model, [made], schedulers, lr_ratio, reach)
    return str(caught[0].message) if caught else None


def adam(lr: float) -> Callable[[Any], Optimizer]:
    return lambda parameters: torch.optim.Adam(parameters, lr=lr)


# --- learning rates


@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.AdamW, torch.optim.NAdam, torch.optim.RAdam])
def test_low_learning_rate_suggests_another(kind: Any):
    message = warning(optimizer=lambda parameters: kind(parameters, lr=1e-5))
    assert message is not None
    assert f"learning rate of 1e-05 ({kind.__name__})" in message
    assert "try 0.0001" in message


@pytest.mark.parametrize("rate", [LOWEST_RATE, 1e-4, 2e-4, 1e-3, 1e-2])
def test_usual_learning_rates_are_silent(rate: float):
    assert warning(optimizer=adam(rate)) is None


def test_only_adam_rates_are_judged():
    assert warning(optimizer=lambda parameters: torch.optim.SGD(parameters, lr=1e-5)) is None


SCHEDULES = {
    "warm-up by lambda": (2e-4, lambda o: LambdaLR(o, lambda step: min(1.0, step / 100))),
    "warm-up": (2e-4, lambda o: LinearLR(o, 1e-4, total_iters=100)),
    "warm-up, then steps": (2e-4, lambda o: SequentialLR(o, [LinearLR(o, 1e-4), StepLR(o, 10)], [5])),
    "one cycle": (1e-9, lambda o: OneCycleLR(o, max_lr=2e-4, total_steps=100)),
    "cycles": (1e-9, lambda o: CyclicLR(o, base_lr=1e-6, max_lr=2e-4, cycle_momentum=False)),
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_highest_scheduled_rate_counts(name: str):
    rate, schedule = SCHEDULES[name]
    model = adapted()
    optimizer = adam(rate)([p for p in model.parameters() if p.requires_grad])
    scheduler = schedule(optimizer)
    assert optimizer.param_groups[0]["lr"] < LOWEST_RATE
    assert warn_of_suspicious_settings(model, [optimizer], [scheduler], 1.0, ALL) is None


def test_initial_rate_counts_during_custom_warm_up():
    model = adapted()
    groups = [{"params": [*model[0].lora.parameters()], "lr": 1e-9, "initial_lr": 2e-4}]
    assert warning(model, optimizer=lambda _: torch.optim.AdamW(groups)) is None


@pytest.mark.parametrize("schedule", [lambda o: LinearLR(o, 0.1), lambda o: OneCycleLR(o, 1e-5, total_steps=9)])
def test_schedule_does_not_hide_low_rate(schedule: Callable[[Optimizer], Any]):
    assert "learning rate of 1e-05" in str(warning(optimizer=adam(1e-5), schedule=schedule))


def test_groups_without_adapters_do_not_count():
    model = network()
    attach(model, LoRAConfig(rank=4, target_modules=["0"], modules_to_save=["4"]))
    factors, head = [*model[0].lora.parameters()], [*model[4].parameters()]
    groups = [{"params": factors, "lr": 2e-4}, {"params": head, "lr": 1e-6}]
    assert warning(model, lambda _: torch.optim.AdamW(groups)) is None
    assert warning(model, lambda _: torch.optim.AdamW([{"params": factors, "lr": 0.0}])) is None


# --- scalings, ratios, targets


@pytest.mark.parametrize("options", [{}, {"alpha": 1.0}, {"rank": 1}, {"rank": 2, "use_rslora": True}])
def test_usual_scalings_are_silent(options: dict[str, Any]):
    assert warning(adapted(**options)) is None


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"alpha": 0.25}, "scaling of 0.0625 at rank 4 of 0, 2, 4 is small: 1 to 4 is usual. Raise alpha"),
        ({"alpha": 256.0}, "scaling of 64 at rank 4 of 0, 2, 4 is large: 1 to 4 is usual. Lower alpha"),
        ({"alpha": 256.0, "use_rslora": True}, "scaling of 128 at rank 4"),
        ({"alpha_pattern": {"2": 0.1}}, "scaling of 0.025 at rank 4 of 2 is small"),
    ],
)
def test_extreme_scalings_name_layers(options: dict[str, Any], words: str):
    assert words in str(warning(adapted(**options)))


@pytest.mark.parametrize("ratio", [1.0, 2.0, 16.0, 64.0])
def test_usual_ratios_are_silent(ratio: float):
    assert warning(lr_ratio=ratio) is None


@pytest.mark.parametrize(("ratio", "how"), [(0.1, "slower than A"), (500.0, "much faster than A")])
def test_extreme_ratios_warn(ratio: float, how: str):
    assert f"lr_ratio={ratio:g} trains B {how}" in str(warning(lr_ratio=ratio))


def test_all_hints_are_one_warning():
    message = warning(adapted(alpha=0.25), adam(1e-5), lr_ratio=0.1, reach=Coverage(1, 1000, ("Conv2d", "Linear")))
    assert str(message).count("\n  - ") == 4
    assert "reach 0.1% of the weights that could carry one; most of the rest are in Conv2d, Linear layers" in message


def test_coverage_counts_adaptable_weights(rng: torch.Generator):
    head = nn.Linear(8, 4)
    model = nn.ModuleDict(
        {
            "embed": nn.Embedding(100, 8),
            "q": nn.Linear(8, 8),
            "conv": nn.Conv1d(8, 16, 3),
            "norm": nn.LayerNorm(8),
            "head": head,
            "experts": Experts(),
        }
    )
    config = LoRAConfig(rank=2, target_modules=["q"], target_parameters=["experts.up"], modules_to_save=["head"])
    attach(model, config)
    trained = 8 * 8 + model["experts"]._parameters["up"].numel() + 4 * 8
    assert coverage(model) == Coverage(trained, trained + 8 * 16 * 3, ("Conv1d",), remedy=["q", "all-conv"])


def test_coverage_skips_head_tied_to_embedding():
    model = nn.ModuleDict({"embed": nn.Embedding(100, 8), "q": nn.Linear(8, 8), "head": nn.Linear(8, 100, bias=False)})
    model["head"].weight = model["embed"].weight
    attach(model, LoRAConfig(rank=2, target_modules=["q"]))
    assert coverage(model) == Coverage(64, 64, ())


def small_resnet() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 32, 3), nn.Flatten(1), nn.Linear(32, 32))


@pytest.mark.parametrize(
    ("model", "targets", "line"),
    [
        (small_resnet(), "all-linear", "set target_modules=['all-linear', 'all-conv']."),
        (nn.Sequential(nn.LSTM(8, 32), nn.Linear(32, 4)), "all-linear", "set target_modules='all'."),
        (nn.Sequential(nn.Linear(8, 8), nn.Linear(64, 64)), ["0"], "set target_modules=['0', 'all-linear']."),
        (nn.Sequential(nn.Linear(8, 8), nn.Linear(64, 64)), "0", "set target_modules='all-linear'."),
    ],
)
def test_narrow_targets_are_told_the_line_that_widens_them(model: nn.Module, targets, line: str):
    attach(model, LoRAConfig(rank=2, target_modules=targets))
    message = warning(model, reach=coverage(model))
    assert message is not None
    assert line in message
    wider = LoRAConfig(rank=2, target_modules=ast.literal_eval(line.partition("=")[2].removesuffix(".")))
    detach(model)
    attach(model, wider)
    assert warning(model, reach=coverage(model)) is None


def test_layers_that_a_word_left_out_for_a_reason_are_not_suggested_again():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(256, 1))
    attach(model, LoRAConfig(rank=2))
    assert "add them to target_modules" in str(warning(model, reach=coverage(model)))


@pytest.mark.parametrize("grouped", [1, 8])
def test_query_and_value_alone_are_silent(grouped: int):
    sizes = {"q": 64, "k": 64 // grouped, "v": 64 // grouped, "o": 64, "up": 224, "gate": 224}
    block = {name: nn.Linear(64, size) for name, size in sizes.items()} | {"down": nn.Linear(224, 64)}
    model = nn.ModuleDict(block)
    attach(model, LoRAConfig(rank=2, target_modules=["q", "v"]))
    assert warning(model, reach=coverage(model)) is None


def test_coverage_ignores_token_training():
    model = nn.ModuleDict({"embed": nn.Embedding(100, 8), "q": nn.Linear(8, 8)})
    attach(model, LoRAConfig(target_modules=[], trainable_token_indices={"embed": [1]}))
    assert warning(model, reach=coverage(model)) is None


@pytest.mark.parametrize("targets", ["all-linear", ["query", "value"]], ids=str)
def test_heads_that_transformers_made_up_are_named(targets, tmp_path):
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    config = transformers.BertConfig(**sizes, vocab_size=30, num_labels=20)
    transformers.BertModel(config).save_pretrained(tmp_path)
    model = transformers.BertForSequenceClassification.from_pretrained(tmp_path, num_labels=20)
    attach(nested := nn.ModuleDict({"bert": model}), LoRAConfig(rank=2, target_modules=targets))
    message = str(warning(nested))
    assert "no values for bert.classifier, so random ones stay, which no checkpoint holds" in message
    assert message.count("modules_to_save=['bert.classifier'] or 'auto'") == message.count("modules_to_save") == 1
    detach(nested)
    attach(nested, LoRAConfig(rank=2, target_modules=targets, modules_to_save="auto"))
    assert model.classifier.weight.requires_grad
    assert warning(nested) is None


def test_small_head_that_transformers_made_up_is_named_once(tmp_path):
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    transformers.BertModel(transformers.BertConfig(**sizes, vocab_size=30)).save_pretrained(tmp_path)
    model = transformers.BertForSequenceClassification.from_pretrained(tmp_path, num_labels=4)
    attach(model, LoRAConfig(rank=8))
    assert str(warning(model)).count("modules_to_save=['classifier'] or 'auto'") == 1


def test_embeddings_that_were_resized_are_not_called_new(tmp_path):
    transformers = pytest.importorskip("transformers")
    sizes = {"n_embd": 32, "n_layer": 1, "n_head": 2, "n_positions": 16, "bos_token_id": 0, "eos_token_id": 0}
    sizes["tie_word_embeddings"] = False
    transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, vocab_size=30)).save_pretrained(tmp_path)
    model = transformers.GPT2LMHeadModel.from_pretrained(tmp_path)
    model.resize_token_embeddings(34)
    attach(model, LoRAConfig(rank=2, trainable_token_indices=[30, 31, 32, 33]))
    assert warning(model) is None


def trained_body(width: int = 64) -> nn.Module:
    """Return a model whose body has other values than a new one, as after training, and whose head is new."""
    model = nn.ModuleDict(
        {"body": nn.Sequential(*(nn.Linear(width, width) for _ in range(3))), "head": nn.Linear(width, 20)}
    )
    with torch.no_grad():
        for parameter in model["body"].parameters():
            parameter.normal_(0, 0.1)
    return model


def timm_start(head: nn.Linear) -> None:
    nn.init.trunc_normal_(head.weight, std=0.02)
    nn.init.zeros_(head.bias)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("start", [lambda head: None, timm_start], ids=["torch", "timm"])
def test_wide_new_head_is_named_before_it_trains_on_random_weights(start, dtype):
    model = trained_body()
    start(model["head"])
    attach(model.to(dtype), LoRAConfig(rank=2))
    message = str(warning(model))
    assert "the values of head look random" in message
    assert "modules_to_save=['head']" in message
    detach(model)
    attach(model, LoRAConfig(rank=2, modules_to_save=["head"]))
    assert warning(model) is None


@pytest.mark.parametrize("kind", [nn.Conv2d, nn.ConvTranspose2d])
def test_new_head_is_named_beside_convolutions_that_were_trained(kind):
    body = nn.Sequential(*(kind(16, 16, 3, bias=False) for _ in range(3)))
    model = nn.ModuleDict({"body": body, "head": nn.Linear(64, 20)})
    attach(model, LoRAConfig(rank=2, target_modules=["body.*"]))
    assert warning(model) is None  # all is new
    detach(model)
    with torch.no_grad():
        for parameter in body.parameters():
            parameter.normal_(0, 0.1)
    attach(model, LoRAConfig(rank=2, target_modules=["body.*"]))
    assert "the values of head look random" in str(warning(model))


@pytest.mark.filterwarnings("ignore:Complex modules are a new feature")
def test_complex_layers_are_not_asked_whether_they_are_new():
    model = trained_body()
    model["head"].to(torch.cfloat)
    attach(model, LoRAConfig(rank=2))
    assert warning(model) is None


def trained_head(model: nn.Module) -> None:
    with torch.no_grad():
        model["head"].weight.mul_(1.1)  # leaves the range of a new layer


def new_body(model: nn.Module) -> None:
    for part in model["body"]:
        part.reset_parameters()


@pytest.mark.parametrize("change", [trained_head, new_body])
def test_layers_are_called_new_only_beside_a_trained_body(change):
    model = trained_body()
    change(model)
    attach(model, LoRAConfig(rank=2))
    assert warning(model) is None


@pytest.mark.parametrize("options", [{"target_modules": ["body.0"]}, {"exclude_modules": ["head"]}], ids=str)
def test_new_head_that_stays_frozen_is_named_too(options):
    attach(model := trained_body(), LoRAConfig(rank=2, **options))
    assert "modules_to_save=['head']" in str(warning(model))


def test_new_head_that_is_too_small_for_the_rank_is_named_once():
    model = trained_body()
    attach(model, LoRAConfig(rank=24))
    assert str(warning(model)).count("'head'") == 1


def test_layer_without_values_is_not_called_new():
    model = trained_body()
    model["head"].to("meta")
    attach(model, LoRAConfig(rank=2))
    assert warning(model) is None


def test_weights_of_a_layer_too_small_for_the_rank_are_not_suggested_for_training_in_full():
    model = nn.ModuleDict({"rnn": nn.LSTM(2, 8)})
    report = attach(model, LoRAConfig(rank=4, target_modules="all"))
    message = str(warning(model))
    assert "no part of rnn.weight_ih_l0 trains" in message
    assert "rank_pattern" in message
    assert "modules_to_save" not in message + report.left_out["rnn.weight_ih_l0"]


def test_layers_too_small_for_the_rank_are_named_unless_they_train_in_full():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 1))
    attach(model, LoRAConfig(rank=2))
    assert "no part of 1 trains" in str(warning(model))
    detach(model)
    attach(model, LoRAConfig(rank=2, modules_to_save="auto"))
    assert warning(model) is None


# --- in a run


def test_run_says_if_no_head_was_found():
    class Headed(Toy):  # with 4 outputs
        def build(self) -> None:
            self.net = nn.Sequential(*network(), nn.Linear(8, 4), nn.Linear(4, 8))

    options: dict[str, Any] = {"target_modules": ["net.0", "net.2"], "modules_to_save": "auto"}
    with pytest.warns(UserWarning, match="modules_to_save='auto' found no head"):
        trainer(LoRACallback(rank=4, **options)).fit(Headed(), loader())
    trainer(LoRACallback(rank=5, **options)).fit(Headed(), loader())  # any warning would be an error


class Slow(Toy):
    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=1e-5)


def warned(module: Any, **options: Any) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer(LoRACallback(rank=4, **options), max_epochs=2, max_steps=-1).fit(module, loader())
    return [str(each.message) for each in caught if "may learn little" in str(each.message)]


def test_run_warns_once():
    [message] = warned(Slow())
    assert "1e-05 (AdamW)" in message


def test_run_checks_all_optimizers_and_lr_ratio():
    class Uneven(Duel):
        def configure_optimizers(self) -> Any:
            return [torch.optim.Adam(half.parameters(), lr) for half, lr in ((self.left, 1e-2), (self.right, 1e-6))]

    [message] = warned(Uneven(), lr_ratio=0.5)
    assert "learning rate of 1e-06 (Adam)" in message
    assert "lr_ratio=0.5" in message


class Warmed(Toy):
    """Warms up as Lightning's documentation does."""

    scales = False

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, closure: Any) -> None:
        optimizer.step(closure=closure)
        for group in optimizer.param_groups:
            begin = group.setdefault("initial_lr", group["lr"]) if self.scales else 1e-3
            group["lr"] = min(1.0, (self.global_step + 1) / 500) * begin


def test_run_names_a_warm_up_that_cancels_lr_ratio():
    with pytest.warns(UserWarning, match="that of A .e-06, so lr_ratio=16 no longer holds.*hook of Warmed sets"):
        trainer(LoRACallback(rank=4, lr_ratio=16.0)).fit(Warmed(), loader())
    trainer(LoRACallback(rank=4)).fit(Warmed(), loader())  # any warning would be an error
    scaled = Warmed()
    scaled.scales = True
    trainer(LoRACallback(rank=4, lr_ratio=16.0)).fit(scaled, loader())


def scheduled(make: Any) -> Toy:
    class Scheduled(Toy):
        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.AdamW(self.parameters(), lr=1e-3)
            return [optimizer], [{"scheduler": make(optimizer), "interval": "step", "monitor": "loss"}]

        def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
            loss = super().training_step(batch, batch_idx)
            self.log("loss", loss)
            return loss

    return Scheduled()


class SetsRatesLate(Callback):
    """Sets one rate for all groups in the fourth step, as SWA does when it begins."""

    def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
        for group in trainer.optimizers[0].param_groups if trainer.global_step == 3 else ():
            group["lr"] = 1e-3


@pytest.mark.parametrize(
    ("make", "callbacks"),
    [
        (lambda optimizer: CosineAnnealingLR(optimizer, 8, eta_min=1e-4), ()),
        (lambda optimizer: CosineAnnealingWarmRestarts(optimizer, 9, eta_min=1e-4), ()),
        (lambda optimizer: StepLR(optimizer, 100), (SetsRatesLate(),)),
    ],
    ids=["cosine", "restarts", "callback"],
)
def test_run_names_what_cancels_lr_ratio_at_any_step(make: Any, callbacks: Any):
    with pytest.warns(UserWarning, match="that of A .*, so lr_ratio=16 no longer holds"):
        trainer(LoRACallback(rank=4, lr_ratio=16.0), *callbacks, max_steps=8).fit(scheduled(make), loader())


@pytest.mark.parametrize(
    "make",
    [
        lambda optimizer: CosineAnnealingLR(optimizer, 8),
        lambda optimizer: OneCycleLR(optimizer, 1e-2, total_steps=9),
        lambda optimizer: ReduceLROnPlateau(optimizer, patience=0, min_lr=1e-4),
        lambda optimizer: LambdaLR(optimizer, lambda step: min(1.0, step / 4)),  # from zero
        lambda optimizer: CosineAnnealingLR(optimizer, 20, eta_min=1e-6),  # far below the rates of now
    ],
    ids=["cosine", "one cycle", "plateau", "warm-up", "low floor"],
)
def test_run_is_silent_while_schedulers_keep_lr_ratio(make: Any):
    run = trainer(LoRACallback(rank=4, lr_ratio=16.0), max_steps=8)
    run.fit(scheduled(make), loader())  # any warning would be an error
    slow, fast = (group["lr"] for group in run.optimizers[0].param_groups)
    assert fast == pytest.approx(16 * slow, rel=0.01)


def test_run_checks_coverage():
    class Deep(Toy):
        def build(self) -> None:
            self.net = network()
            self.rest = nn.Sequential(*(nn.Linear(32, 32) for _ in range(8)))

    assert "reach 1.5% of the weights" in warned(Deep(), target_modules=["net.4"])[0]
    assert not warned(Deep(), target_modules=["net.4", "rest.?"])


@pytest.mark.parametrize("options", [{}, {"use_rslora": True}, {"lr_ratio": 16.0}, {"target_modules": ["net.0"]}])
def test_sensible_run_is_silent(options: dict[str, Any]):
    assert not warned(Toy(), **options)


# --- errors of torch


@pytest.mark.distributed
@pytest.mark.slow
def test_ddp_names_layers_that_never_run() -> None:
    printed = run_ranks(2, unused_job.__file__)
    for rank in range(2):
        assert f"caught in rank {rank}: DDP waits for gradients that never come" in printed
    assert printed.count("none reached the adapters of idle. Use exclude_modules") == 2


def test_parameter_ready_twice_suggests_remedy() -> None:
    # The words of torch/csrc/distributed/c10d/reducer.cpp.
    error = RuntimeError("Expected to mark a variable ready only once. This error is caused by one of ...")
    explain_torch_error(error, adapted())
    assert str(error).startswith("Expected to mark a variable ready only once.")
    assert "an adapter, one of 0, 2, 4, was used in several backward passes" in str(error)
    assert "use_reentrant=False" in str(error)


def test_sparse_optimizer_beside_an_adapted_sparse_embedding_suggests_another() -> None:
    model = nn.Sequential(nn.Embedding(9, 8, sparse=True))
    attach(model, LoRAConfig(rank=2, target_modules=["0"]))
    model(torch.tensor([1, 2])).sum().backward()
    with pytest.raises(RuntimeError) as caught:
        torch.optim.SparseAdam([p for p in model.parameters() if p.requires_grad]).step()
    explain_torch_error(caught.value, model)
    assert "does not support dense gradients" in str(caught.value)
    assert "Use Adam or AdamW" in str(caught.value)


def test_loss_without_gradient_suggests_remedy() -> None:
    model = adapted()
    with pytest.raises(RuntimeError) as caught:
        model(torch.ones(1, 8)).sum().detach().backward()
    explain_torch_error(caught.value, model)
    assert "element 0 of tensors does not require grad" in str(caught.value)
    assert "the loss depends on no adapter" in str(caught.value)
    assert "modules_to_save" in str(caught.value)
    assert "use_reentrant=False" in str(caught.value)


def test_validation_that_computes_derivatives_is_told_how():
    class Forces(Toy):
        def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
            positions = batch[0].clone().requires_grad_()
            torch.autograd.grad(self.net(positions).sum(), positions)

    for options in ({}, {"num_sanity_val_steps": 0}):
        run = trainer(LoRACallback(rank=2), limit_val_batches=1, max_steps=4, **options)
        with pytest.raises(RuntimeError, match=r"inference_mode=False\) and compute .* torch.enable_grad\(\)"):
            run.fit(Forces(), loader(), loader())


@pytest.mark.parametrize("message", ["CUDA out of memory", "", "Expected to have finished reduction"])
def test_other_errors_are_unchanged(message: str) -> None:
    error = RuntimeError(message)
    explain_torch_error(error, adapted())
    assert error.args == (message,)


def test_ddp_error_about_other_parameters_is_unchanged() -> None:
    model, message = adapted(), "Expected to have finished reduction in the prior iteration before starting a new one."
    for parameter in model.parameters():
        parameter.grad = parameter.detach().clone()
    error = RuntimeError(message)
    explain_torch_error(error, model)
    assert error.args == (message,)


def test_modules_that_were_excluded_count_as_no_weight_that_could_train() -> None:
    model = nn.ModuleDict({"student": nn.Linear(8, 8), "teacher": nn.Linear(64, 64)})
    attach(model, LoRAConfig(rank=2, exclude_modules=["teacher"]))
    reach = coverage(model)
    assert reach is not None
    assert (reach.trained, reach.total) == (64, 64)
