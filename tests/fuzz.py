"""Random sequences of operations on adapted models, each step checked against a model of what should be there.

``Sequences`` is a state machine of Hypothesis: it draws a model, and then operations with their options. Beside the
adapted model it keeps what must be true of it: a copy of the base, and the bits that each adapter has trained. After
each step it checks that

- the tensors of the base have their bits, except those that the active adapter trains in full;
- the active adapter has the bits that it should have, under the names that it should have;
- the output equals that of a dense float64 model, which is made from the base and the factors with torch alone;
- adapters are listed in the right order, and the right one is active.

A step that raises must raise one of the expected errors, and leave the model as it was: classes, tensors by identity
and bits, gradient flags, attributes.
"""

from __future__ import annotations

import copy
import math
import pickle
import re
import shutil
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_lora import (
    LoRACallback,
    LoRAConfig,
    active_adapter,
    adapter_names,
    adapter_state_dict,
    add_adapter,
    attach,
    calibrate,
    combine,
    detach,
    disabled,
    load_adapter,
    load_adapter_state_dict,
    lora_layers,
    merge,
    merged,
    remove_adapter,
    routed,
    save_adapter,
    scaled,
    set_adapter,
    truncate_adapter,
    using,
)
from tests.contract import learn, snapshot

DEFAULT = "default"  # the name of the only adapter, if it was given none
NAMES = ["first", "second", "third"]
STARTS_FROM_WEIGHTS = ("pissa", "olora")
ROWS, WIDTH, WORDS = 4, 8, 20  # three rows, put in order, could not show all mistakes of routing

# --- the models


class Network(LightningModule):
    """A model of one of the kinds; it learns to give zeros."""

    inputs_are_words = False

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(3)
            self.build()
        self.to(dtype)

    def build(self) -> None:
        raise NotImplementedError

    def inputs(self) -> Tensor:
        generator = torch.Generator().manual_seed(5)
        if self.inputs_are_words:
            return torch.randint(WORDS, (ROWS, 4), generator=generator)
        return torch.randn(ROWS, 4, WIDTH, generator=generator).to(self.head.weight.dtype)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self(batch).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


class Perceptron(Network):
    options = {
        "target_modules": ["all-linear", ["fc1", "blocks.*"], r"blocks\.\d", ["blocks.1"]],
        "target_slices": [{}, {"fc1": {"q": "0:4", "v": "8:12"}}],
        "layers": [(), [0], [-1]],
        "exclude_modules": [(), ["blocks.0"]],
        "dropout": [0.0, 0.25],
    }

    def build(self) -> None:
        self.fc1 = nn.Linear(WIDTH, 12)
        self.blocks = nn.ModuleList(nn.Linear(12, 12, bias=bool(i)) for i in range(2))
        self.norm = nn.LayerNorm(12)
        self.head = nn.Linear(12, 6)

    def forward(self, x: Tensor) -> Tensor:
        x = self.fc1(x)
        for block in self.blocks:
            x = x + torch.tanh(block(x))
        return self.head(self.norm(x))


class Words(Network):
    inputs_are_words = True
    options = {
        "target_modules": ["all-linear", "all", ["attention", "up"], ["words"], ["words", "up"]],
        "trainable_token_indices": [(), [1, 3]],
        "target_slices": [{}, {"attention": {"q": "0:8"}}],
    }

    def build(self) -> None:
        self.words = nn.Embedding(WORDS, WIDTH)
        self.attention = nn.MultiheadAttention(WIDTH, 2, batch_first=True)
        self.up = nn.Linear(WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, 6)

    def forward(self, x: Tensor) -> Tensor:
        x = self.words(x)
        x = x + self.attention(x, x, x, need_weights=False)[0]
        return self.head(x + torch.tanh(self.up(x)))


class TiedWords(Network):
    inputs_are_words = True
    options = {
        "target_modules": ["all-linear", "all", ["up"], ["words"], ["head"]],
        "trainable_token_indices": [(), [1, 3]],
        "untie_weights": [False, True, True],
    }

    def build(self) -> None:
        self.words = nn.Embedding(WORDS, WIDTH)
        self.up = nn.Linear(WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, WORDS)
        self.head.weight = self.words.weight

    def forward(self, x: Tensor) -> Tensor:
        x = self.words(x)
        return self.head(x + torch.tanh(self.up(x)))


class Images(Network):
    options = {
        "target_modules": ["all-conv", "all", ["conv"], ["back", "conv"]],
        "frozen_norm": ["eval", "track"],
    }

    def build(self) -> None:
        self.conv = nn.Conv1d(4, 6, 3, padding=1, groups=2)
        self.norm = nn.BatchNorm1d(6)
        self.back = nn.ConvTranspose1d(6, 4, 2, stride=2)
        self.head = nn.Linear(2 * WIDTH, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.back(torch.tanh(self.norm(self.conv(x)))))


class Recurrent(Network):
    options = {"target_modules": ["all", ["rnn"], "all-linear"]}

    def build(self) -> None:
        self.rnn = nn.GRU(WIDTH, WIDTH, batch_first=True)
        self.up = nn.Linear(WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.up(self.rnn(x)[0])))


class Experts(Network):
    options = {
        "target_modules": ["all-linear", (), ["up"]],
        "target_parameters": [["experts"], (), ["gate"]],
    }

    def build(self) -> None:
        self.mixture = nn.Module()
        self.mixture.experts = nn.Parameter(torch.randn(2, WIDTH, WIDTH) / 3)
        self.mixture.gate = nn.Parameter(torch.randn(2, WIDTH) / 3)
        self.up = nn.Linear(WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, 6)

    def forward(self, x: Tensor) -> Tensor:
        x = self.up(x)
        chosen = torch.einsum("...i,eoi->...eo", x, self.mixture.experts)
        return self.head((torch.softmax(x @ self.mixture.gate.T, -1).unsqueeze(-1) * torch.tanh(chosen)).sum(-2))


MODELS = [Perceptron, Words, TiedWords, Images, Recurrent, Experts]
TOLERANCE = {torch.float32: 2e-4, torch.float64: 1e-9}  # largest error over largest output

COMMON = {
    "rank": [1, 2, 3],
    "alpha": [1.0, 3.0],
    "dropout": [0.0, 0.0, 0.25],
    "modules_to_save": [(), (), ["head"]],
    "bias": ["none", "lora_only", "all"],
    "use_rslora": [False, True],
    "use_dora": [False, False, True],
    "lora_bias": [False, False, True],
    "init": ["kaiming", "orthogonal", "pissa", "olora"],
    "adapter_dtype": ["float32", "float64"],
    "rank_pattern": [{}, {".*": 1}],
    "alpha_pattern": [{}, {".*": 5.0}],
}


@st.composite
def options_for(draw: Any, kind: type[Network]) -> dict[str, Any]:
    """Draw options: the targets, what few kinds have or few operations show, and up to four others."""
    options = COMMON | kind.options
    targets = [name for name in kind.options if name.startswith("target_")]
    always = [*targets, "modules_to_save", *({"untie_weights", "frozen_norm", "dropout"} & kind.options.keys())]
    always.sort()
    others = draw(st.lists(st.sampled_from([name for name in options if name not in always]), max_size=4, unique=True))
    drawn = {name: draw(st.sampled_from(options[name])) for name in [*always, *others]}
    if not any(drawn[name] for name in targets):
        drawn["target_modules"] = "all-linear"
    return {"rank": 2} | drawn


# --- what should be there


@dataclass
class Expected:
    """One adapter: its options, and the bits of everything that it trains.

    Attributes:
        config: The options; those before a truncation or a sum if there was one.
        values: Name of a tensor -> its value.
        is_computed: Whether a truncation or a sum made it, so that its ranks and scalings are not those of the config.
    """

    config: LoRAConfig
    values: dict[str, Tensor]
    is_computed: bool = False


@dataclass
class Saved:
    """What was in place when a file was written.

    Attributes:
        expected: The adapter.
        base: The bits of the base.
        merges: How often an adapter had been merged into it.
    """

    expected: Expected
    base: dict[str, Tensor]
    merges: int


def is_factor(name: str) -> bool:
    """Return whether a name in a state dict is that of a tensor of the active adapter's factors."""
    parts = name.split(".")
    return "lora" in parts and "lora_others" not in parts


def in_full(model: nn.Module, config: LoRAConfig) -> set[str]:
    """Return the names of the tensors of the base that training may change."""
    names = [name for name in model.state_dict() if not {"lora", "lora_others"} & {*name.split(".")}]
    layers = [path for path, layer in lora_layers(model).items() if layer.adapters()]  # not those tied to trained rows
    found = {name for name in names if name.partition(".")[0] in config.modules_to_save}
    if config.bias != "none":
        biases = [name for name in names if name.rpartition(".")[2].startswith(("bias", "in_proj_bias"))]
        found |= {name for name in biases if config.bias == "all" or name.rpartition(".")[0] in layers}
    if config.frozen_norm == "track":
        found |= {name for name in names if re.search("running_|num_batches", name)}
    return found


def trained(model: nn.Module, config: LoRAConfig) -> dict[str, Tensor]:
    """Return copies of everything that the active adapter trains, read by name."""
    mine, found = in_full(model, config), {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        is_first = not any(tensor is other for other in found.values())
        if is_first and (name in mine or is_factor(name)):
            found[name] = tensor
    return {name: tensor.detach().clone() for name, tensor in found.items()}


def scaling_of(config: LoRAConfig, path: str, rank: int) -> float:
    """Return ``alpha / rank`` of a layer, or ``alpha / sqrt(rank)``."""
    matching = [value for name, value in config.alpha_pattern.items() if re.fullmatch(rf"(.*\.)?{name}", path)]
    alpha = matching[0] if matching else config.alpha
    return alpha / (math.sqrt(rank) if config.use_rslora else rank)


@torch.no_grad()
def dense(base: nn.Module, model: nn.Module, expected: Expected | None, factor: float = 1.0) -> nn.Module:
    """Return the float64 model of plain torch layers whose weights hold what the active adapter learned."""
    twin = copy.deepcopy(base).double().eval()
    if expected is None:
        return twin
    state = twin.state_dict(keep_vars=True)
    for name, value in expected.values.items():
        if name in state:
            parent = twin.get_submodule(name.rpartition(".")[0])
            table = parent._parameters if name.rpartition(".")[2] in parent._parameters else parent._buffers
            table[name.rpartition(".")[2]].data = value.double()
    parts = dict(twin.named_modules(remove_duplicate=False))
    for path, layer in lora_layers(model).items():
        for key, adapter in layer.adapters().items():
            add_update(parts[path], path, key, adapter, expected, factor)
    return twin


def add_update(part: nn.Module, path: str, key: str, adapter: Any, expected: Expected, factor: float) -> None:
    """Put into a plain layer what one adapter adds to it."""
    config = expected.config
    if hasattr(adapter, "rows"):  # in place: tied layers have them, too
        getattr(part, adapter.parameter)[list(config.trainable_token_indices)] = adapter.rows.double()
        return
    weight = getattr(part, adapter.parameter).detach().clone()
    A, B = adapter.A.double(), adapter.B.double()
    s = factor * (adapter.spec.scaling if expected.is_computed else scaling_of(config, path, A.shape[-2]))
    is_transposed = isinstance(part, nn.Embedding)
    is_stack = A.ndim == 3
    matrix = weight.T if is_transposed else weight if is_stack else weight.flatten(1)
    update = s * (B @ A)
    if config.init in STARTS_FROM_WEIGHTS and not is_transposed and not expected.is_computed:
        update = s * (B @ A - adapter.B0.double() @ adapter.A0.double())
    rows = slice(None)
    if expected.is_computed and adapter.spec.rows:
        rows = torch.tensor([i for each in adapter.spec.rows for i in each])
    elif path in config.target_slices:
        rows = slice(*map(int, config.target_slices[path][key].split(":")))
    total = matrix.clone()
    total[rows] += update
    if "magnitude" in adapter._parameters:
        norms = total[rows].norm(dim=1, keepdim=True)
        total[rows] *= adapter.magnitude.double().unsqueeze(1) / norms
    total = total.T if is_transposed else total.reshape(weight.shape)
    setattr(part, adapter.parameter, nn.Parameter(total.contiguous()))
    if "bias" in adapter._parameters:
        own = torch.zeros(len(weight), dtype=weight.dtype) if part.bias is None else part.bias.detach().clone()
        own[rows] += s * adapter.bias.double()
        part.bias = nn.Parameter(own)


# --- the sequences

REFUSED: Counter[str] = Counter()  # what was refused, by operation and reason, in this process


class Sequences(RuleBasedStateMachine):
    """Operations on one model in random order; see the head of this file."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp(prefix="fuzz_"))
        self.adapters: dict[str, Expected] = {}
        self.active: str | None = None
        self.is_named = False  # the base's own values of what trains in full are kept
        self.files = 0
        self.merges = 0
        self.saved: dict[Path, Saved] = {}

    def teardown(self) -> None:
        shutil.rmtree(self.folder)

    # --- helpers

    @initialize(kind=st.sampled_from(MODELS), dtype=st.sampled_from(list(TOLERANCE)))
    def build(self, kind: type[Network], dtype: torch.dtype) -> None:
        self.kind, self.tolerance = kind, TOLERANCE[dtype]
        self.model = kind(dtype).eval()
        self.base = copy.deepcopy(self.model)
        self.x = self.model.inputs()

    @property
    def expected(self) -> Expected | None:
        return None if self.active is None else self.adapters[self.active]

    def new_file(self, ending: str) -> Path:
        self.files += 1
        return self.folder / f"{self.files}{ending}"

    @contextmanager
    def attempt(self, *patterns: str, keeps: bool = True) -> Iterator[list[Exception]]:
        """Run a step that may be refused for one of these reasons; then it must have changed nothing."""
        model = self.model
        before, refused = snapshot(model) if keeps else None, []
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                yield refused
        except (ValueError, TypeError, RuntimeError, MisconfigurationException) as error:
            pattern = next((each for each in patterns if re.search(each, str(error), flags=re.S)), None)
            if pattern is None:
                raise
            REFUSED[pattern] += 1
            refused.append(error)
            if before is not None:
                assert_unchanged(model, before)

    def attached(self, name: str, config: LoRAConfig, *, learns: bool) -> None:
        self.adapters[name] = Expected(config, started(self.model, name, config, learns=learns))
        self.active = self.active or name

    # --- operations

    @precondition(lambda self: len(self.adapters) < 2)
    @rule(data=st.data(), learns=st.booleans())
    def attach(self, data: Any, learns: bool) -> None:
        config = LoRAConfig(**data.draw(options_for(self.kind)))
        with self.attempt(*NOT_ATTACHED, *(OTHER_OPTIONS if self.adapters else ())) as refused:
            attach(self.model, config)
        if not refused and not self.adapters:
            self.attached(DEFAULT, config, learns=learns)

    @rule(data=st.data(), name=st.sampled_from(NAMES), learns=st.booleans())
    def add(self, data: Any, name: str, learns: bool) -> None:
        config = LoRAConfig(**data.draw(options_for(self.kind)))
        kinds = (*NOT_ATTACHED, *(["There is an adapter"] if name in self.adapters else ()), *self.not_kept())
        with self.attempt(*kinds) as refused:
            add_adapter(self.model, name, config, seed=1)
        if not refused:
            self.is_named = True
            self.attached(name, config, learns=learns)

    def not_kept(self) -> tuple[str, ...]:
        return () if self.is_named else ("base's own values were not kept",)

    @precondition(lambda self: self.adapters)
    @rule(seed=st.integers(0, 9))
    def train(self, seed: int) -> None:
        learn(self.model, seed)
        self.expected.values = trained(self.model, self.expected.config)

    @precondition(lambda self: self.adapters)
    @rule(name=st.sampled_from([DEFAULT, *NAMES]))
    def switch(self, name: str) -> None:
        kinds = () if name in self.adapters else ("there is no adapter",)
        with self.attempt(*kinds, *self.not_kept()) as refused:
            set_adapter(self.model, name)
        if not refused:
            self.is_named = True
            self.active = name

    @precondition(lambda self: self.adapters)
    @rule(name=st.sampled_from([DEFAULT, *NAMES]))
    def remove(self, name: str) -> None:
        kinds = (
            ["there is no adapter"] if name not in self.adapters else ["is the active"] if name == self.active else []
        )
        with self.attempt(*kinds, *self.not_kept()) as refused:
            remove_adapter(self.model, name)
        if not refused:
            del self.adapters[name]
            assert not any(f"lora_others.{name}." in key for key in self.model.state_dict())

    @precondition(lambda self: self.adapters)
    @rule(name=st.sampled_from([None, DEFAULT, *NAMES]))
    def use(self, name: str | None) -> None:
        kinds = () if name is None or name in self.adapters else ("there is no adapter",)
        before = snapshot(self.model)
        with self.attempt(*kinds, *self.not_kept()) as refused, using(self.model, name):
            active, self.active = self.active, name
            try:
                self.check()
            finally:
                self.active = active
        if not refused and self.is_named:
            assert_unchanged(self.model, before)
        self.is_named |= not refused

    @precondition(lambda self: self.adapters)
    @rule(factor=st.sampled_from([0.0, -1.0, 0.5]))
    def scale(self, factor: float) -> None:
        before = snapshot(self.model)
        truth = dense(self.base, self.model, self.expected, factor)
        with self.attempt("is not proportional to its scaling") as refused, scaled(self.model, factor):
            if factor:
                assert self.error(self.output(), truth) < self.tolerance
        parts = adapters_of(self.model)
        is_odd = any(hasattr(part, "rows") or "magnitude" in part._parameters for _, part in parts)
        assert bool(refused) == bool(factor and is_odd)
        assert_unchanged(self.model, before)

    @precondition(lambda self: self.adapters)
    @rule()
    def disable(self) -> None:
        before = snapshot(self.model)
        with disabled(self.model):
            if not self.expected.config.modules_to_save:
                assert torch.equal(self.output(), self.base_output())
        assert_unchanged(self.model, before)

    @precondition(lambda self: self.adapters)
    @rule()
    def fold(self) -> None:
        before = snapshot(self.model)
        with self.attempt(*NOT_MERGEABLE) as refused, merged(self.model):
            assert self.error(self.output(), dense(self.base, self.model, self.expected)) < self.tolerance
        assert bool(refused) == self.has_no_place()
        assert_unchanged(self.model, before)

    @precondition(lambda self: self.adapters)
    @rule()
    def merge(self) -> None:
        kinds = ["there are several adapters"] if len(self.adapters) > 1 else []
        truth = dense(self.base, self.model, self.expected)
        with self.attempt(*NOT_MERGEABLE, *kinds) as refused:
            merge(self.model)
        assert bool(refused) == bool(kinds or self.has_no_place())
        if not refused:
            self.forget()
            self.merges += 1
            self.base = copy.deepcopy(self.model)
            assert self.error(self.output(), truth) < self.tolerance

    def has_no_place(self) -> bool:
        """Return whether the active adapter has a bias where the layer has none to merge it into."""
        return any("bias" in part._parameters and layer.bias is None for layer, part in adapters_of(self.model))

    @precondition(lambda self: self.adapters)
    @rule()
    def detach(self) -> None:
        expected, is_named = self.expected, self.is_named
        detach(self.model)
        if not is_named:  # what trained in full stays
            state = self.base.state_dict()
            for name, value in expected.values.items():
                if name.partition(".")[0] in expected.config.modules_to_save and name in state:
                    state[name].copy_(value)
        self.forget()
        plain, found = snapshot(self.base), snapshot(self.model)
        for key in ("classes", "keys", "flags", "modes"):
            assert found[key] == plain[key], key
        assert ours(found) == ours(plain)
        assert names_of_tensors(self.model) == names_of_tensors(self.base)

    def forget(self) -> None:
        self.adapters, self.active, self.is_named = {}, None, False

    # --- states and files

    @precondition(lambda self: self.adapters)
    @rule(damage=st.sampled_from([None, None, "missing", "unknown", "shape"]))
    def state_in_memory(self, damage: str | None) -> None:
        state = adapter_state_dict(self.model)
        assert state.keys() == self.expected.values.keys()
        name = min(state)
        if damage is None:
            learn(self.model, 4)
        elif damage == "missing":
            del state[name]
        elif damage == "unknown":
            state["nowhere.lora.A"] = state[name]
        else:
            state[name] = state[name].new_zeros(state[name].numel() + 1)
        is_merged = any("_lora_merges" in vars(part) for part in self.base.modules())
        with self.attempt(*(["already merged into"] if is_merged else ["does not fit"] if damage else [])) as refused:
            load_adapter_state_dict(self.model, state)
        assert bool(refused) == bool(damage or is_merged)
        if is_merged:
            self.expected.values = trained(self.model, self.expected.config)

    @precondition(lambda self: self.adapters)
    @rule()
    def whole_state(self) -> None:
        state = {name: value.clone() for name, value in self.model.state_dict().items()}
        learn(self.model, 5)
        self.model.load_state_dict(state)

    @precondition(lambda self: self.adapters)
    @rule()
    def save_directory(self) -> None:
        directory = self.new_file("")
        with self.attempt("PEFT cannot express this adapter") as refused:
            save_adapter(self.model, directory)
        assert directory.exists() != bool(refused)
        if refused:
            return
        other = copy.deepcopy(self.base)
        for part in other.modules():
            vars(part).pop("_lora_merges", None)  # PEFT's files do not say what was merged before
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            load_adapter(other, directory)
        assert self.error(self.output(other), dense(self.base, self.model, self.expected)) < self.tolerance
        detach(other)
        names = in_full(other, self.expected.config)
        for name, value in other.state_dict().items():
            assert name in names or torch.equal(value, self.base.state_dict()[name]), name

    @precondition(lambda self: self.adapters)
    @rule(seed=st.integers(0, 9))
    def fit(self, seed: int) -> None:
        """Train by the Trainer, save, and load the file into another base."""
        path = self.new_file(".ckpt")
        self.model.train()
        with self.attempt(*NOT_TRAINABLE, keeps=False) as refused:
            run = self.trainer(1)
            run.fit(self.model, self.loader())
            run.save_checkpoint(path)
        self.model.trainer = None
        self.model.eval()
        self.expected.values = trained(self.model, self.expected.config)
        if refused:  # it has trained before it found out
            return
        base = {name: value.clone() for name, value in self.base.state_dict().items()}
        self.saved[path] = Saved(copy.deepcopy(self.expected), base, self.merges)
        other = copy.deepcopy(self.base)
        load_adapter(other, path)
        assert_bits(trained(other, self.expected.config), self.expected.values)

    @precondition(lambda self: self.adapters and not self.expected.config.dropout)
    @rule()
    def resume(self) -> None:
        """Two epochs at once equal one, and another one resumed from its file on another base."""
        path = self.new_file(".ckpt")
        whole, half, resumed = (copy.deepcopy(each).train() for each in (self.model, self.model, self.base))
        refused = self.fitted(whole, 2)
        assert bool(refused) == bool(self.fitted(half, 1, save=path))
        if refused:
            return
        self.fitted(resumed, 2, ckpt_path=path)
        config = self.expected.config
        assert_bits(trained(resumed, config), trained(whole, config))

    def fitted(self, model: Network, epochs: int, save: Path | None = None, **options: Any) -> list[Exception]:
        with self.attempt(*NOT_TRAINABLE, keeps=False) as refused:
            run = self.trainer(epochs)
            run.fit(model, self.loader(), **options)
            if save is not None:
                run.save_checkpoint(save)
        model.trainer = None
        return refused

    def trainer(self, epochs: int) -> Trainer:
        expected = self.expected
        name = self.active if self.is_named else None
        return Trainer(
            max_epochs=epochs,
            callbacks=[LoRACallback(expected.config, adapter=name)],
            accelerator="cpu",
            devices=1,
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            enable_checkpointing=False,
        )

    def loader(self) -> DataLoader:
        return DataLoader(list(self.x), batch_size=2)

    @precondition(lambda self: self.saved)
    @rule(data=st.data(), name=st.sampled_from(NAMES), is_damaged=st.booleans())
    def load(self, data: Any, name: str, is_damaged: bool) -> None:
        """Add the adapter in a file to those that are there."""
        path = data.draw(st.sampled_from(sorted(self.saved)))
        saved = self.saved[path]
        kinds = ["There is an adapter"] if name in self.adapters else []
        kinds += ["already merged into", "with another adapter merged", "trained on a different base"]
        if is_damaged:
            content = path.read_bytes()
            path = self.new_file(".ckpt")
            path.write_bytes(content[: len(content) // 2])
            kinds.append("cannot be read as a Lightning checkpoint")
        must_fail = is_damaged or name in self.adapters or saved.merges != self.merges
        is_same = all(torch.equal(value, saved.base[each]) for each, value in self.base.state_dict().items())
        may_fail = must_fail or not is_same or (self.adapters and not self.is_named)
        with self.attempt(*kinds, *self.not_kept()) as refused:
            load_adapter(self.model, path, name=name)
        assert may_fail if refused else not must_fail
        if not refused:
            self.is_named = True
            self.adapters[name] = copy.deepcopy(saved.expected)
            self.active = self.active or name

    # --- arithmetic

    @precondition(lambda self: len(self.adapters) == 1)
    @rule(cut=st.sampled_from([{"rank": 1}, {"energy": 0.9}, {"energy": 1.0}]))
    def truncate(self, cut: dict[str, Any]) -> None:
        before = updates(self.base, self.model, self.expected)
        with self.attempt(*NOT_SUMMABLE, *self.not_kept()) as refused:
            truncate_adapter(self.model, **cut)
        if refused:
            return
        self.expected.is_computed = True
        self.expected.values = trained(self.model, self.expected.config)
        after = updates(self.base, self.model, self.expected)
        for name, update in before.items():
            check_cut(update, after[name], cut, name)

    @precondition(lambda self: len(self.adapters) > 1)
    @rule(data=st.data(), name=st.sampled_from(NAMES), weights=st.tuples(*[st.sampled_from([1.0, -0.5, 2.0])] * 2))
    def combine(self, data: Any, name: str, weights: tuple[float, float]) -> None:
        chosen = data.draw(st.lists(st.sampled_from(sorted(self.adapters)), min_size=1, max_size=2, unique=True))
        used = dict(zip(chosen, weights, strict=False))
        truth: Counter[str] | dict[str, Any] = {}
        for each, weight in used.items():
            with using(self.model, each):
                for key, update in updates(self.base, self.model, self.adapters[each]).items():
                    truth[key] = truth.get(key, 0) + weight * update
        kinds = ["There is an adapter"] if name in self.adapters else []
        summands = [self.adapters[each] for each in used]
        saves_head = any("head" in each.config.modules_to_save for each in summands)
        if saves_head and any(value.startswith("head.lora.") for each in summands for value in each.values):
            kinds.append("is trained in full by .*, and adapted by another adapter")
        with self.attempt(*NOT_SUMMABLE, *kinds) as refused:
            combine(self.model, used, name=name)
        if refused:
            return
        config = self.adapters[chosen[0]].config
        merged_options = [self.adapters[each].config for each in chosen]
        config = replace(
            config,
            modules_to_save=tuple({name for each in merged_options for name in each.modules_to_save}),
            bias=max((each.bias for each in merged_options), key=["none", "lora_only", "all"].index),
            dropout=config.dropout if len({each.dropout for each in merged_options}) == 1 else 0.0,
            frozen_norm=max((each.frozen_norm for each in merged_options), key=["eval", "track"].index),
        )
        with using(self.model, name):
            made = Expected(config, trained(self.model, config), is_computed=True)
            for key, update in updates(self.base, self.model, made).items():
                scale = max(1.0, truth[key].abs().max().item())
                assert (update - truth[key]).abs().max() < 1e-5 * scale, key
            for key in in_full(self.model, config):
                terms = [(w, self.adapters[each].values.get(key)) for each, w in used.items()]
                base = self.base.state_dict()[key].double()
                total = base + sum(w * (value.double() - base) for w, value in terms if value is not None)
                assert (made.values[key].double() - total).abs().max() < 1e-5 * max(1.0, total.abs().max()), key
        self.adapters[name] = made

    @precondition(lambda self: self.is_named)
    @rule(data=st.data())
    def route(self, data: Any) -> None:
        rows = data.draw(st.lists(st.sampled_from([None, *self.adapters]), min_size=ROWS, max_size=ROWS))
        before = snapshot(self.model)
        alone = []
        for name in rows:
            with using(self.model, name):
                alone.append(self.output())
        with self.attempt("carries the update|may see the batch") as refused, routed(self.model, rows):
            found = self.output()
            for i in range(ROWS):
                assert (found[i] - alone[i][i]).abs().max() <= self.tolerance * alone[i].abs().max()
        assert_unchanged(self.model, before)
        assert not refused or self.kind not in (Perceptron, Images)  # there every update is added to an output

    @precondition(lambda self: self.adapters)
    @rule(how=st.sampled_from([copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))]))
    def copy_whole(self, how: Callable[[nn.Module], nn.Module]) -> None:
        """Go on with a copy; the one before is thrown away after it was changed."""
        old = self.model
        self.model = how(old)
        with torch.no_grad():
            for parameter in old.parameters():
                parameter.zero_()

    # --- what must always hold

    def output(self, model: nn.Module | None = None) -> Tensor:
        with torch.no_grad():
            return (self.model if model is None else model).eval()(self.x)

    def base_output(self) -> Tensor:
        """Return the base's output with the gradient flags of the model, on which torch's choice of kernels depends."""
        twin, flags = copy.deepcopy(self.base), dict(self.model.named_parameters())
        for name, parameter in twin.named_parameters():
            parameter.requires_grad_(flags[name].requires_grad)
        return self.output(twin)

    def error(self, found: Tensor, truth: nn.Module) -> float:
        with torch.no_grad():
            expected = truth(self.x if self.kind.inputs_are_words else self.x.double())
        return ((found.double() - expected).abs().max() / expected.abs().max()).item()

    @invariant()
    def check(self) -> None:
        if not hasattr(self, "model"):
            return
        assert adapter_names(self.model) == list(self.adapters)
        assert active_adapter(self.model) == self.active
        expected, state = self.expected, self.model.state_dict()
        values: Mapping[str, Tensor] = {} if expected is None else expected.values
        for name, value in self.base.state_dict().items():
            assert name in values or torch.equal(state[name], value), f"{name} of the base has changed"
        if expected is None:
            assert torch.equal(self.output(), self.base_output())
            return
        assert_bits(trained(self.model, expected.config), values)
        assert self.error(self.output(), dense(self.base, self.model, expected)) < self.tolerance
        for _, part in adapters_of(self.model):
            assert hasattr(part, "rows") or part.spec.dropout == expected.config.dropout


def adapters_of(model: nn.Module) -> list[tuple[Any, Any]]:
    """Return the parts of the active adapter, each with its layer."""
    return [(layer, part) for layer in lora_layers(model).values() for part in layer.adapters().values()]


def started(model: nn.Module, name: str, config: LoRAConfig, *, learns: bool) -> dict[str, Tensor]:
    """Return what a new adapter trains, after its start from the weights if it has one; it may not be active."""
    with nullcontext() if active_adapter(model) == name else using(model, name):
        if any(part.is_waiting for _, part in adapters_of(model)):
            calibrate(model)
        if learns:
            learn(model, 6)
        return trained(model, config)


def ours(found: Mapping[str, Any]) -> dict[str, list[str]]:
    """Return the attributes in a snapshot that this package has set; Lightning sets others, and leaves them."""
    return {name: [each for each in each_of if "lora" in each] for name, each_of in found["attributes"].items()}


def names_of_tensors(model: nn.Module) -> list[list[str]]:
    """Return the names of each parameter, which has several where layers share it."""
    found: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        found.setdefault(id(parameter), []).append(name)
    return [*found.values()]


def assert_unchanged(model: nn.Module, before: Mapping[str, Any]) -> None:
    """Check that a model is as in a snapshot; where adapters that are not active are kept may hold more."""
    after = snapshot(model)
    assert sorted(after["keys"]) == sorted(before["keys"])
    for key in before.keys() - {"bits", "attributes", "keys"}:
        assert after[key] == before[key], (key, differing(after[key], before[key]))
    assert visible(after) == visible(before)
    assert_bits(after["bits"], before["bits"])


def differing(found: Any, expected: Any) -> Any:
    if isinstance(found, dict):
        return {
            name: (found.get(name), expected.get(name))
            for name in found.keys() | expected
            if found.get(name) != expected.get(name)
        }
    return {*found} ^ {*expected}


def visible(found: Mapping[str, Any]) -> dict[str, list[str]]:
    return {name: each for name, each in found["attributes"].items() if "lora_others" not in name}


def assert_bits(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].dtype == value.dtype, name
        assert torch.equal(found[name], value), name


def updates(base: nn.Module, model: nn.Module, expected: Expected) -> dict[str, Tensor]:
    """Return what the adapter adds to each weight that it adapts."""
    own = replace(expected, values={n: v for n, v in expected.values.items() if is_factor(n)})
    before, after = dense(base, model, None).state_dict(), dense(base, model, own).state_dict()
    return {name: after[name] - before[name] for name in before}


def check_cut(before: Tensor, after: Tensor, cut: Mapping[str, Any], name: str) -> None:
    """Check that an update was cut to its best approximation: no more is missing than the discarded singular values."""
    if before.ndim < 2 or not before.any():
        return
    matrices = zip(before, after, strict=True) if before.ndim == 3 and "experts" in name else [(before, after)]
    for one, other in matrices:
        s = torch.linalg.svdvals(one.flatten(1))
        missing = (one - other).norm().item() ** 2
        total = s.square().sum().item()
        allowed = s[cut["rank"] :].square().sum().item() if "rank" in cut else (1 - cut["energy"]) * total
        assert missing <= allowed + 1e-6 * total, name


# --- what may be refused

NOT_ATTACHED = ("cannot be attached to", "already carry adapters")
OTHER_OPTIONS = ("already carries adapters with other options",)
NOT_MERGEABLE = ("cannot take|nothing can be merged|no bias to merge",)
NOT_TRAINABLE = ("No gradient",)
NOT_SUMMABLE = ("uses DoRA", "zero in every layer")
