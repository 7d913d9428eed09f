"""Activation checkpointing over a frozen base: gradients match the whole graph, or missing ones are named."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable
from contextlib import ExitStack, nullcontext
from functools import partial
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader

from lightning_lora import LoRACallback, LoRAConfig, add_adapter, attach, disabled, scaled, set_adapter, using
from tests.contract import train_all
from tests.toys import FEATURES, loader, trainer

WIDTH = 16
REMEDY = "use_reentrant=False"

Runs = Callable[..., Tensor]
plainly: Runs = lambda block, x: block(x)  # noqa: E731
reentrant: Runs = partial(checkpoint, use_reentrant=True)
non_reentrant: Runs = partial(checkpoint, use_reentrant=False)
each_kind = pytest.mark.parametrize("runs", [reentrant, non_reentrant], ids=["reentrant", "non-reentrant"])


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.tanh(self.up(x)))


class Encoder(nn.TransformerEncoderLayer):
    """A block that reads its layers' weights instead of calling the layers."""

    def __init__(self) -> None:
        super().__init__(WIDTH, 2, 2 * WIDTH, dropout=0.0, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.unsqueeze(1)).squeeze(1)


class Stack(LightningModule):
    """A first layer, blocks run by a given function, and a head; in float64."""

    def __init__(self, runs: dict[int, Runs] | Runs = plainly, block: type[nn.Module] = Residual) -> None:
        super().__init__()
        self.runs = runs if isinstance(runs, dict) else dict.fromkeys(range(3), runs)
        with torch.random.fork_rng():
            torch.manual_seed(7)
            self.first = nn.Linear(FEATURES, WIDTH)
            self.blocks = nn.ModuleList(block() for _ in range(3))
            self.head = nn.Linear(WIDTH, FEATURES)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for index, block in enumerate(self.blocks):
            x = self.runs.get(index, plainly)(block, x)
        return self.head(x)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return ((self(batch[0].double()) - batch[1].double()) ** 2).mean()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=1e-2)


class ByHand(Stack):
    """Steps its optimizer itself, bypassing Lightning."""

    def __init__(self, runs: dict[int, Runs] | Runs = plainly) -> None:
        super().__init__(runs)
        self.automatic_optimization = False

    def training_step(self, batch: list[Tensor], batch_idx: int) -> None:
        optimizer = self.optimizers(use_pl_optimizer=False)
        optimizer.zero_grad()
        self.manual_backward(super().training_step(batch, batch_idx))
        optimizer.step()


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def adapted_gradients(model: Stack, **lora: Any) -> dict[str, Tensor]:
    """Return the gradients of a trained adapter on the first batch, without a Trainer."""
    attach(model, LoRAConfig(rank=4, **lora))
    train_all(model, torch.Generator().manual_seed(5))
    model.train()
    torch.manual_seed(9)  # of dropout
    model.training_step(next(iter(loader())), 0).backward()
    return gradients(model)


def assert_equal_gradients(found: dict[str, Tensor], truth: dict[str, Tensor]) -> None:
    assert found.keys() == truth.keys()
    for name, gradient in truth.items():
        assert gradient.any(), name
        torch.testing.assert_close(found[name], gradient, rtol=1e-10, atol=1e-12, msg=name)


# --- gradients match those of the whole graph


@pytest.mark.parametrize("block", [Residual, Encoder])
@pytest.mark.parametrize(
    "lora",
    [
        {"target_modules": ["blocks.*"]},
        {"target_modules": ["blocks.2.*"]},
        {"target_modules": ["blocks.*", "head"], "use_dora": True},
        {"target_modules": ["head"], "modules_to_save": ["blocks.0"]},
    ],
    ids=str,
)
def test_non_reentrant_gradients_match_plain_backward(lora: dict[str, Any], block: type[nn.Module]) -> None:
    truth = adapted_gradients(Stack(block=block), **lora)
    assert_equal_gradients(adapted_gradients(Stack(non_reentrant, block), **lora), truth)


@each_kind
def test_recomputed_block_uses_same_dropout(runs: Runs) -> None:
    lora = {"dropout": 0.5}
    truth = adapted_gradients(Stack(), **lora)
    assert_equal_gradients(adapted_gradients(Stack(runs), **lora), truth)
    undropped = adapted_gradients(Stack())
    assert any(not torch.equal(truth[name], undropped[name]) for name in truth)


@pytest.mark.parametrize("block", [Residual, Encoder])
def test_reentrant_works_when_adapter_comes_first(block: type[nn.Module]) -> None:
    lora = {"target_modules": ["first", "blocks.*"]}
    truth = adapted_gradients(Stack(block=block), **lora)
    assert_equal_gradients(adapted_gradients(Stack(reentrant, block), **lora), truth)


def test_reentrant_works_with_inputs_that_require_grad() -> None:
    model = Stack(reentrant)
    model.first.register_forward_hook(lambda module, args, output: output.requires_grad_())
    lora = {"target_modules": ["blocks.*"]}
    assert_equal_gradients(adapted_gradients(model, **lora), adapted_gradients(Stack(), **lora))


# --- training is correct, or reports missing gradients


class FirstGradients(Callback):
    """Keeps the gradients of the first two batches: in the first, only those of B are nonzero."""

    def __init__(self) -> None:
        self.batches: list[dict[str, Tensor]] = []

    def on_train_batch_end(self, trainer: Any, module: Any, *_: Any) -> None:
        self.batches.append(gradients(module))


def fitted(module: LightningModule, batches: Any, **lora: Any) -> tuple[list[dict[str, Tensor]], str]:
    """Train two steps, and return the gradients of each and all messages."""
    seen, said = FirstGradients(), []
    module.train()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            trainer(LoRACallback(rank=4, **lora), seen, max_epochs=1, max_steps=-1, limit_train_batches=2).fit(
                module, batches
            )
        except Exception as error:
            said = [f"{error}", *getattr(error, "__notes__", [])]
    return seen.batches, "\n".join([*said, *(str(each.message) for each in caught)])


def assert_right_or_said(module: LightningModule, truth: LightningModule, batches: Any, **lora: Any) -> str:
    """Check that a module trains with the true gradients or that a message names the remedy; return which."""
    expected, _ = fitted(truth, batches, **lora)
    found, said = fitted(module, batches, **lora)
    if REMEDY in said:
        return "said"
    assert len(found) == len(expected) == 2, said
    for mine, theirs in zip(found, expected, strict=True):
        assert mine.keys() == theirs.keys(), said
        for name, gradient in theirs.items():
            torch.testing.assert_close(mine[name], gradient, rtol=1e-10, atol=1e-12, msg=name)
    return "right"


BLOCKS = {"target_modules": ["blocks.*"]}


@pytest.mark.parametrize("kind", [Stack, ByHand])
@pytest.mark.parametrize("lora", [BLOCKS, BLOCKS | {"modules_to_save": ["head"]}], ids=["blocks", "and a head"])
@pytest.mark.parametrize("which", [{0, 1, 2}, {0}, {2}, {0, 2}], ids=str)
@each_kind
def test_missing_gradients_are_reported(runs: Runs, which: set[int], lora: dict[str, Any], kind: Any) -> None:
    outcome = assert_right_or_said(kind(dict.fromkeys(which, runs)), kind(), loader(), **lora)
    if runs is non_reentrant or which == {2}:  # block 2 comes after adapters that train
        assert outcome == "right"


@pytest.mark.parametrize("kind", [Stack, ByHand])
def test_lone_adapter_in_reentrant_block_is_reported(kind: type[Stack]) -> None:
    lora = {"target_modules": ["blocks.1.*"], "modules_to_save": ["head"]}
    assert assert_right_or_said(kind({1: reentrant}), kind(), loader(), **lora) in ("right", "said")


# --- transformers


def tokens() -> DataLoader:
    return DataLoader(torch.randint(30, (4, 6), generator=torch.Generator().manual_seed(3)), batch_size=2)


class Language(LightningModule):
    """Return a tiny random transformers language model in float64."""

    def __init__(self, family: str, **checkpointing: Any) -> None:
        super().__init__()
        transformers = pytest.importorskip("transformers")
        with torch.random.fork_rng():
            torch.manual_seed(7)
            if family == "gpt2":
                nothing = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
                config = transformers.GPT2Config(
                    vocab_size=30, n_embd=16, n_layer=2, n_head=2, n_positions=8, **nothing
                )
                self.model = transformers.GPT2LMHeadModel(config).double()
            else:
                sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
                config = transformers.LlamaConfig(vocab_size=30, max_position_embeddings=8, **sizes)
                self.model = transformers.LlamaForCausalLM(config).double()
        self.model.config.use_cache = False
        if checkpointing:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", FutureWarning)  # renamed in newer releases
                self.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=checkpointing)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self.model(input_ids=batch, labels=batch).loss

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=1e-2)


@pytest.mark.parametrize("lora", [{}, {"modules_to_save": ["lm_head"]}], ids=["adapters", "and a head"])
@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("is_reentrant", [True, False])
def test_transformers_checkpointing_trains_or_names_remedy(family: str, is_reentrant: bool, lora: Any) -> None:
    if family == "gpt2" and lora:
        lora = {"modules_to_save": ["ln_f"]}  # its head is tied to the embedding
    module = Language(family, use_reentrant=is_reentrant)
    assert any(getattr(part, "gradient_checkpointing", False) for part in module.modules())
    outcome = assert_right_or_said(module, Language(family), tokens(), **lora)
    assert is_reentrant or outcome == "right"


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_transformers_checkpointing_trains_with_input_grads(family: str) -> None:
    module = Language(family, use_reentrant=True)
    module.model.enable_input_require_grads()
    assert assert_right_or_said(module, Language(family), tokens()) == "right"


@each_kind
def test_gradients_reach_the_adapter_in_use_if_backward_is_inside(runs: Runs) -> None:
    found = []
    for run in (plainly, runs):
        block = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, WIDTH))
        torch.manual_seed(0)
        for parameter in block.parameters():
            nn.init.normal_(parameter)
        for name in ("first", "second"):
            add_adapter(block, name, LoRAConfig(rank=2))
            set_adapter(block, name)
            nn.init.normal_(block[0].lora.B)
            nn.init.normal_(block[2].lora.B)
        set_adapter(block, "first")
        inputs = torch.randn(4, WIDTH, requires_grad=True)
        with using(block, "second"):
            run(block, inputs).square().sum().backward()
            found.append([block[0].lora.A.grad, block[2].lora.B.grad])
        assert block[0].lora.A.grad is None
    torch.testing.assert_close(found[1], found[0])


def a_half(module: nn.Module) -> Any:
    return scaled(module, 0.5)


def neither(_: nn.Module) -> Any:
    return nullcontext()


@each_kind
@pytest.mark.parametrize("of_backward", [neither, disabled, a_half])
@pytest.mark.parametrize("of_forward", [neither, disabled, a_half, "nested", "of another adapter"])
def test_recomputation_has_the_mode_of_the_forward_pass(runs: Runs, of_forward: Any, of_backward: Any) -> None:
    found = []
    scales = {a_half, "nested", "of another adapter"} & {of_forward, of_backward}  # which biases cannot be
    for run in (plainly, runs):
        torch.manual_seed(0)
        block = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, WIDTH)).double()
        for name in ("first", "second"):
            add_adapter(block, name, LoRAConfig(rank=2, bias="none" if scales else "lora_only"))
            with using(block, name):
                train_all(block, torch.Generator().manual_seed(1))
        inputs = torch.randn(4, WIDTH, dtype=torch.float64, requires_grad=True)
        with ExitStack() as stack:
            if of_forward == "nested":
                stack.enter_context(scaled(block, 0.5))
                stack.enter_context(scaled(block, -3.0))
            elif of_forward == "of another adapter":
                stack.enter_context(using(block, "second"))
                stack.enter_context(scaled(block, 0.5))
            else:
                stack.enter_context(of_forward(block))
            loss = run(block, inputs).square().sum()
        if of_forward == "of another adapter" and of_backward is not neither and run is not plainly:
            continue  # the adapters cannot be switched inside a mode
        with of_backward(block):
            loss.backward()
        found.append({name: p.grad for name, p in block.named_parameters()} | {"inputs": inputs.grad})
    assert all(each.keys() == found[0].keys() for each in found)
    for each in found[1:]:
        for name, gradient in found[0].items():
            assert (gradient is None) == (each[name] is None), name
            assert gradient is None or torch.allclose(each[name], gradient), name


def test_a_mode_is_left_as_it_was_entered_when_blocks_are_computed_again() -> None:
    stack, truth = Stack(non_reentrant), Stack(plainly)
    for module in (stack, truth):
        attach(module, LoRAConfig(rank=2))
        train_all(module, torch.Generator().manual_seed(1))
    x = torch.randn(4, FEATURES, dtype=torch.float64)
    with disabled(stack):  # from the first mode on, forward passes are noted
        pass
    loss = stack(x).sum()
    with scaled(stack, 0.5), disabled(stack):
        loss.backward()
        with disabled(truth):
            torch.testing.assert_close(stack(x), truth(x))
    torch.testing.assert_close(stack(x), truth(x))


@each_kind
def test_another_thread_computes_again_in_the_mode_of_the_forward_pass(runs: Runs) -> None:
    found = []
    for run in (plainly, runs):
        torch.manual_seed(0)
        block = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh())
        attach(block, LoRAConfig(rank=2))
        train_all(block, torch.Generator().manual_seed(1))
        inputs = torch.ones(4, WIDTH, requires_grad=True)
        with scaled(block, 0.5):
            loss = run(block, inputs).sum()
            thread = threading.Thread(target=loss.backward)  # as autograd does for a GPU
            thread.start()
            thread.join()
        found.append(inputs.grad)
    torch.testing.assert_close(found[1], found[0])


def test_threads_enter_and_leave_modes_of_their_own_modules() -> None:
    modules = [nn.Linear(WIDTH, WIDTH) for _ in range(2)]
    entered, left = threading.Event(), threading.Event()
    for module in modules:
        attach(module, LoRAConfig(rank=2))
        train_all(module, torch.Generator().manual_seed(1))
    seen: list[str] = []

    def second() -> None:
        with disabled(modules[1]):
            entered.set()
            left.wait(60)
            seen.append(modules[1].lora_mode)

    thread = threading.Thread(target=second)
    with disabled(modules[0]):
        thread.start()
        entered.wait(60)
    left.set()
    thread.join()
    assert seen == ["disabled"]
    assert [module.lora_mode for module in modules] == ["active", "active"]
