"""What the zoo asks of one model: twelve questions, each answered with a number or with what went wrong."""

from __future__ import annotations

import collections
import contextlib
import copy
import dataclasses
import logging
import random
import re
import tempfile
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lightning_lora import (
    LoRACallback,
    LoRAConfig,
    adapter_state_dict,
    attach,
    detach,
    load_adapter_state_dict,
    lora_layers,
    merge,
    merged,
    preflight,
    save_adapter,
)

RANK, ALPHA, STEPS = 4, 8.0, 3
LARGE, TOO_LARGE = 10_000_000, 150_000_000  # parameters: from here in float32 alone; from there not at all
# Relative to the largest value of an output: what rounding may cost; float64 models have steps in float32 inside.
TOLERANCE = {torch.float64: 1e-5, torch.float32: 2e-3}
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


class Specimen(NamedTuple):
    """A model of the zoo, and the arguments of a call."""

    model: nn.Module
    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = {}


class UnbuildableError(Exception):
    """The model fails by itself, without an adapter."""


class WrongError(Exception):
    """A check found a difference."""


# --- a model and its outputs


def lively(model: nn.Module) -> None:
    """Make weights that start constant or tiny random and of usual size: they would hide mistakes.

    Dropout goes, so that training and evaluation can be compared.
    """
    draw = torch.Generator().manual_seed(0)
    for part in model.modules():
        if isinstance(part, nn.modules.dropout._DropoutNd):
            part.p = 0.0
        for name in ("drop_prob", "dropout", "attention_dropout", "activation_dropout", "layerdrop", "p", "drop"):
            if isinstance(vars(part).get(name), float):
                setattr(part, name, 0.0)
    with torch.no_grad():
        for weight in model.parameters():
            if not weight.is_floating_point() or weight.numel() < 2:
                continue
            usual = 1.0 if weight.ndim < 2 else (weight.numel() / weight.shape[0]) ** -0.5
            spread = float(weight.std())
            if spread == 0.0:
                weight += 0.1 * usual * torch.randn(weight.shape, generator=draw).to(weight)
            elif weight.ndim >= 2 and spread < 0.5 * usual:
                weight *= usual / spread


def tensors_in(value: Any) -> Iterator[Tensor]:
    """Yield the floating-point tensors of an output, whatever it is made of."""
    if isinstance(value, Tensor):
        if value.is_floating_point() or value.is_complex():
            yield value
    elif isinstance(value, Mapping):
        for each in value.values():
            yield from tensors_in(each)
    elif isinstance(value, (list, tuple)):
        for each in value:
            yield from tensors_in(each)
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        yield from tensors_in(list(vars(value).values()))


def run(specimen: Specimen, model: nn.Module) -> list[Tensor]:
    """Return a model's outputs, with the same random numbers in every call."""
    random.seed(0)
    torch.manual_seed(0)
    args, kwargs = copied((specimen.args, dict(specimen.kwargs)))
    return list(tensors_in(model(*args, **kwargs)))


def copied(value: Any) -> Any:
    """Return a copy of arguments: a model may write into them."""
    return copy.deepcopy(value)


def outputs(specimen: Specimen, model: nn.Module, train: bool = False) -> list[Tensor]:
    """Return a model's outputs in one of its modes, without a graph."""
    model.train(train)
    with torch.no_grad():
        found = [tensor.detach().clone() for tensor in run(specimen, model)]
    model.eval()
    return found


def difference(left: list[Tensor], right: list[Tensor]) -> float:
    """Return the largest difference over the largest value, of the worst output."""
    if [tensor.shape for tensor in left] != [tensor.shape for tensor in right]:
        return float("inf")
    worst = 0.0
    for a, b in zip(left, right, strict=True):
        here = torch.isfinite(b)
        if not here.any():
            continue
        if not torch.isfinite(a[here]).all():
            return float("inf")
        scale = float(b[here].abs().max())
        worst = max(worst, float((a - b)[here].abs().max()) / (scale or 1.0))
    return worst


def loss_of(found: list[Tensor]) -> Tensor:
    """Return the mean square distance of all outputs from fixed random targets."""
    draw = torch.Generator().manual_seed(1)
    total = torch.zeros((), dtype=torch.float64)
    for tensor in found:
        if tensor.requires_grad:
            tensor = torch.view_as_real(tensor) if tensor.is_complex() else tensor
            tensor = tensor.masked_fill(~torch.isfinite(tensor.detach()), 0.0)
            target = torch.randn(tensor.shape, generator=draw).to(tensor)
            total = total + (tensor - target).square().mean()
    return total


def gradients(specimen: Specimen, model: nn.Module, train: bool) -> dict[str, float]:
    """Return the largest gradient of every parameter that has one other than zero."""
    model.train(train)
    model.zero_grad()
    loss_of(run(specimen, model)).backward()
    model.eval()
    found = {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}
    sizes = {name: float(grad.abs().max()) for name, grad in found.items() if grad.numel()}
    model.zero_grad()
    return {name: size for name, size in sizes.items() if size > 0.0 or size != size}


# --- the examination


class Examination:
    """All checks of one model, in order; what one finds does not stop the next."""

    def __init__(self, specimen: Specimen, tell: Callable[[str], None]) -> None:
        self.specimen, self.tell = specimen, tell
        self.base = specimen.model
        self.numbers: dict[str, float] = {}
        self.problems: list[dict[str, str]] = []
        self.notes: list[str] = []
        self.bypassed: set[str] = set()
        self.expected: dict[str, set[str]] = {}
        self.same_in_both = False
        self.size = 0.5  # of random factors

    def result(self) -> dict[str, Any]:
        """Run everything and return what was found, ready for JSON."""
        try:
            self.prepare()
        except UnbuildableError as error:
            return {"verdict": "unbuildable", "reason": str(error)}
        self.tell("attach")
        try:
            self.adapted = self.attached()
        except Exception as error:
            self.problems.append(problem("attach", error))
        else:
            self.count = len(adapters_of(self.adapted))
            self.examine()
        return self.summary()

    def examine(self) -> None:
        """Run the checks on the adapted model."""
        first = (self.identity, self.live, self.modes, self.reload, self.merging)
        for check in (*first, self.peft, self.detaching, self.fit, self.wider):
            self.tell(check.__name__)
            try:
                check()
            except Exception as error:
                found = problem(check.__name__, error)
                if check == self.wider and found["verdict"] == "refused":
                    self.notes.append(f"more layers are refused: {found['reason']}")
                else:
                    self.problems.append(found)
                if check == self.identity and not isinstance(error, WrongError):
                    return  # it computes nothing at all

    def summary(self) -> dict[str, Any]:
        """Return the verdict with all that belongs to it."""
        kinds = [each["verdict"] for each in self.problems]
        verdict = next((kind for kind in ("wrong", "crash", "refused") if kind in kinds), "ok")
        return {
            "verdict": verdict,
            "class": type(self.base).__name__,
            "precision": str(self.dtype).removeprefix("torch."),
            "parameters": sum(weight.numel() for weight in self.base.parameters()),
            "adapters": getattr(self, "count", 0),
            "targets": self.targets,
            "numbers": self.numbers,
            "problems": self.problems,
            "notes": self.notes,
        }

    def prepare(self) -> None:
        """See that the model runs by itself, in the highest precision that it takes."""
        self.tell("build")
        try:
            lively(self.base)
            self.base.eval().requires_grad_(True)
            self.dtype = self.choose_precision()
            self.tolerance = TOLERANCE[self.dtype]
            self.settle()
            self.before = outputs(self.specimen, self.base)
            if not any(torch.isfinite(each).any() for each in self.before):
                raise UnbuildableError("its outputs hold no finite number")
            if difference(outputs(self.specimen, copy.deepcopy(self.base)), self.before) > self.tolerance:
                raise UnbuildableError("two calls, or two copies, differ")
            if (
                difference(outputs(self.specimen, copy.deepcopy(self.base).requires_grad_(False)), self.before)
                > self.tolerance
            ):
                raise UnbuildableError("frozen, it computes something else by itself")
            self.train = self.trains()
            # An adapted model's norms keep their statistics in training, so that its base in evaluation is its like.
            self.alive = gradients(self.specimen, copy.deepcopy(self.base), self.train and self.same_in_both)
        except UnbuildableError:
            raise
        except Exception as error:
            raise UnbuildableError(f"{type(error).__name__}: {first_line(error)}") from error
        self.targets = self.chosen_targets()

    def choose_precision(self) -> torch.dtype:
        """Turn model and inputs to float64, where the model runs so."""
        single = self.specimen
        size = sum(weight.numel() for weight in self.base.parameters())
        if size > TOO_LARGE:
            raise UnbuildableError(f"{size:,} parameters are too many")
        if size > LARGE:
            outputs(single, single.model)
            return torch.float32
        doubled = copy.deepcopy((self.base, single.args, dict(single.kwargs)))
        model, args, kwargs = doubled
        double = Specimen(model.double(), in_double(args), in_double(kwargs))
        try:
            outputs(double, double.model)
            gradients(double, copy.deepcopy(double.model), False)
        except Exception:
            outputs(single, single.model)
            return torch.float32
        self.specimen, self.base = double, double.model
        return torch.float64

    def settle(self) -> None:
        """Give norms statistics of this input: with those they are made with, signals die or explode."""
        norms = [part for part in self.base.modules() if isinstance(part, nn.modules.batchnorm._BatchNorm)]
        momenta = [norm.momentum for norm in norms]
        for norm in norms:
            norm.momentum = 1.0
        with contextlib.suppress(Exception):  # it does not run in training mode
            outputs(self.specimen, self.base, train=True)
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum

    def trains(self) -> bool:
        """Return whether the model runs in training mode too; with labels alone, some do."""
        try:
            found = outputs(self.specimen, copy.deepcopy(self.base), train=True)
        except Exception as error:
            self.notes.append(f"does not run in training mode by itself: {first_line(error)}")
            return False
        self.same_in_both = difference(found, self.before) <= self.tolerance
        if not self.same_in_both:
            self.notes.append("the base itself computes something else in training")
        return True

    def chosen_targets(self) -> str:
        """Return "all-linear"; "convolutions" where there are more of those, "parameters" where there is neither."""
        parts = list(self.base.modules())
        linear, convolutions = (sum(isinstance(part, kind) for part in parts) for kind in (nn.Linear, CONVOLUTIONS))
        if linear + convolutions == 0 and any(
            min(weight.shape) >= 2 for weight in self.base.parameters() if weight.ndim == 2
        ):
            return "parameters"
        return "convolutions" if convolutions > linear else "all-linear"

    def options(self, prefix: str = "") -> dict[str, Any]:
        """Return what is asked of LoRAConfig, names where "all-linear" would miss the point: all that fits the rank."""
        found: dict[str, Any] = {"rank": RANK, "alpha": ALPHA}
        if self.targets == "convolutions":
            found["target_modules"] = exactly(f"{prefix}{name}" for name in self.layers(nn.Linear, *CONVOLUTIONS))
        elif self.targets == "parameters":
            shapes = {name: weight.shape for name, weight in self.base.named_parameters() if weight.ndim == 2}
            found |= {"rank": 2, "target_modules": []}
            found["target_parameters"] = [f"{prefix}{name}" for name, shape in shapes.items() if min(shape) >= 2]
        return found

    def layers(self, *kinds: type[nn.Module]) -> list[str]:
        """Return the names of all layers of some kinds whose weights fit the rank and are no other layer's too."""
        found = {n: p.weight for n, p in self.base.named_modules() if n and isinstance(p, kinds)}
        parts = self.base.modules()
        uses = collections.Counter(id(weight) for part in parts for weight in part.parameters(recurse=False))
        fits = {name: min(weight.flatten(1).shape) >= RANK for name, weight in found.items()}
        return [name for name, weight in found.items() if fits[name] and uses[id(weight)] == 1]

    def attached(self, filled: bool = False, **options: Any) -> nn.Module:
        """Return an adapted copy of the base, with its factors at their start or at random."""
        model = copy.deepcopy(self.base)
        kinds = [type(part) for part in model.modules()]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                attach(model, LoRAConfig(**self.options() | options))
            except Exception as error:
                if [type(part) for part in model.modules()] != kinds:
                    raise WrongError(f"half attached after {type(error).__name__}: {first_line(error)}") from error
                raise
        if filled:
            draw = torch.Generator().manual_seed(2)
            with torch.no_grad():
                for name, weight in model.named_parameters():
                    if is_factor(name):
                        size = self.size * max(weight.shape[-1], 1) ** -0.5
                        weight.copy_(size * torch.randn(weight.shape, generator=draw))
        return model

    def equal(self, what: str, left: list[Tensor], right: list[Tensor]) -> None:
        """Note how far two outputs are from each other; too far is wrong."""
        self.numbers[what] = found = difference(left, right)
        if not found <= self.tolerance:
            raise WrongError(f"outputs differ by {found:.2g} of their size")

    # --- the checks

    def identity(self) -> None:
        """An adapter changes nothing before it is trained."""
        self.equal("identity", outputs(self.specimen, self.adapted), self.before)

    def live(self) -> None:
        """A weight that has a gradient without an adapter has an adapter that gets one."""
        self.expected = self.dead_or_alive("", self.adapted)

    def dead_or_alive(self, what: str, model: nn.Module) -> dict[str, set[str]]:
        """Return the adapters that should learn, by weight, and their factors; one that does not is wrong."""
        found = gradients(self.specimen, model, self.train and self.same_in_both)
        noise = max(self.alive.values(), default=0.0) * (1e-10 if self.dtype is torch.float64 else 1e-5)
        adapters = adapters_of(model)
        expected = {name: factors for name, factors in adapters.items() if self.alive.get(name, 0.0) > noise}
        self.numbers[f"{what}adapters without use"] = len(adapters) - len(expected)
        silent = {name for name, factors in expected.items() if not factors & found.keys()} - self.bypassed
        self.numbers[f"{what}bypassed"] = len(silent)
        self.bypassed |= silent
        if silent:
            some = ", ".join(described(self.base, name) for name in sorted(silent)[:2])
            self.problems.append(problem("live", WrongError(f"bypassed: {some}, {len(silent)} in all")))
        return expected

    def fill(self) -> None:
        """Make the model whose factors are random, and its outputs."""
        self.filled = self.attached(filled=True)
        self.after = outputs(self.specimen, self.filled)
        self.numbers["effect"] = difference(self.after, self.before)

    def modes(self) -> None:
        """Training computes what evaluation does, where all dropout is off and the base does."""
        self.fill()
        while self.numbers["effect"] > 10.0 and self.size > 0.01:  # an explosion would show rounding alone
            self.size /= 3
            self.fill()
        if self.train and self.same_in_both:
            self.equal("training and evaluation", outputs(self.specimen, self.filled, train=True), self.after)

    def reload(self) -> None:
        """A state loaded into another copy gives the same outputs."""
        self.other = self.attached()
        load_adapter_state_dict(self.other, adapter_state_dict(self.filled))
        self.equal("reload", outputs(self.specimen, self.other), self.after)

    def merging(self) -> None:
        """A merged model computes the same, and is made of the base's classes and keys."""
        merge(self.other)
        self.equal("merge", outputs(self.specimen, self.other), self.after)
        self.unchanged("merge", self.other, values=False)

    def peft(self) -> None:
        """PEFT computes the same from the files, or preflight said that it would not."""
        report = preflight(self.filled)
        if not report.peft_accepts:
            reasons = sorted({row.peft for row in report.rows if row.peft != "yes"})
            self.notes.append(f"PEFT cannot take it: {'; '.join(reasons)[:300]}")
            return
        from peft import PeftModel

        other = copy.deepcopy(self.base)
        with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            save_adapter(self.filled, Path(folder) / "adapter")
            part = other.get_submodule(report.root) if report.root else other
            try:
                PeftModel.from_pretrained(part, str(Path(folder) / "adapter"))
            except Exception as error:
                raise WrongError(f"PEFT does not load it: {type(error).__name__}: {first_line(error)}") from error
        taken = {name for name, layer in part.named_modules() if hasattr(layer, "lora_A")}
        left_out = sorted({row.name for row in report.rows if row.rank is not None} - taken)
        unfilled = sorted({key for each in said for key in re.findall(r"'([\w.]+)\.lora_A", str(each.message))})
        try:
            self.equal("PEFT", outputs(self.specimen, other), self.after)
        except WrongError as error:
            lost = [f"does not adapt {left_out[:3]}, {len(left_out)} in all"] if left_out else []
            lost += [f"finds no values for {unfilled[:3]}, {len(unfilled)} in all"] if unfilled else []
            raise WrongError("; ".join([str(error), *(f"PEFT {each}" for each in lost)])) from None

    def detaching(self) -> None:
        """Detaching gives the exact base back, also after the weights held the update for a while."""
        model = self.attached(filled=True)
        with merged(model):
            pass
        detach(model)
        self.unchanged("detach", model, values=True)

    def wider(self) -> None:
        """The same of embeddings, convolutions and recurrent layers too: start, gradients, merging."""
        adapted = list(lora_layers(self.adapted))
        recurrent = [name for name, part in self.base.named_modules() if name and isinstance(part, nn.RNNBase)]
        more = [name for name in self.layers(nn.Linear, nn.Embedding, *CONVOLUTIONS) if name not in adapted] + recurrent
        if not more or self.targets == "parameters":
            return
        names = exactly([*adapted, *more])
        model = self.attached(target_modules=names)
        self.equal("wider identity", outputs(self.specimen, model), self.before)
        self.dead_or_alive("wider ", model)
        model = self.attached(filled=True, target_modules=names)
        after = outputs(self.specimen, model)
        merge(model)
        if not self.bypassed:
            self.equal("wider merge", outputs(self.specimen, model), after)

    def unchanged(self, what: str, model: nn.Module, values: bool) -> None:
        """Compare classes, keys, gradient flags and, bit for bit, values with the base's."""
        for name, part in self.base.named_modules():
            if type(model.get_submodule(name)) is not type(part):
                raise WrongError(f"{what} leaves {name!r} as {type(model.get_submodule(name)).__name__}")
        mine, base = model.state_dict(), self.base.state_dict()
        if list(mine) != list(base):
            raise WrongError(f"{what} changes the keys: {sorted(mine.keys() ^ base.keys())[:4]}")
        for name, weight in self.base.named_parameters():
            if model.get_parameter(name).requires_grad != weight.requires_grad:
                raise WrongError(f"{what} leaves requires_grad of {name!r} changed")
        if values and (changed := [name for name in base if not same_bits(mine[name], base[name])]):
            raise WrongError(f"{what} leaves other values: {changed[:4]}")

    def fit(self) -> None:
        """Three steps through the callback move every adapter that can learn, and nothing else."""
        from lightning.pytorch import Trainer

        logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
        module = wrapped(self.specimen, copy.deepcopy(self.base), self.train)
        quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            callback = LoRACallback(**self.options("net."))
            trainer = Trainer(accelerator="cpu", max_steps=STEPS, callbacks=[callback], **quiet)
            start = {}
            module.when_started = lambda: start.update(values_of(module.net))
            trainer.fit(module, torch.utils.data.DataLoader(torch.zeros(STEPS, 1)))
        end = values_of(module.net)
        moved = {name for name in end if not same_bits(end[name], start[name])}
        still = [name for name, factors in self.expected.items() if not factors & moved]
        others = sorted(name for name in moved if not is_factor(name))
        self.numbers["moved"] = len([name for name in self.expected if name not in still])
        if still:
            raise WrongError(
                f"a fit does not move {', '.join(described(self.base, n) for n in still[:2])}, {len(still)} in all"
            )
        if wrong := [name for name in others if name in dict(self.base.named_parameters())]:
            raise WrongError(f"a fit moves {wrong[:4]}")
        if others:
            self.notes.append(f"a fit moves buffers: {others[:4]}")


# --- parts


def exactly(names: Iterable[str]) -> str:
    """Return the expression that matches these names and no longer ones that end so."""
    return "|".join(map(re.escape, names))


def is_factor(name: str) -> bool:
    """Return whether a parameter belongs to an adapter."""
    return ".lora." in f".{name}"


def adapters_of(model: nn.Module) -> dict[str, set[str]]:
    """Return the names of each adapter's trained tensors, by the name of the weight that it updates."""
    names = {id(weight): name for name, weight in model.named_parameters()}
    return {
        f"{layer_name}.{adapter.parameter}".lstrip("."): {names[id(factor)] for factor in adapter.parameters()}
        for layer_name, layer in lora_layers(model).items()
        for adapter in layer.adapters().values()
    }


def described(model: nn.Module, weight: str) -> str:
    """Return a weight's name with the classes of its layer and of what holds that."""
    layer = weight.rpartition(".")[0]
    parent = layer.rpartition(".")[0]
    return f"{weight} ({type(model.get_submodule(layer)).__name__} in {type(model.get_submodule(parent)).__name__})"


def values_of(model: nn.Module) -> dict[str, Tensor]:
    """Return copies of all parameters and buffers."""
    found = [*model.named_parameters(), *model.named_buffers()]
    return {name: tensor.detach().clone() for name, tensor in found}


def same_bits(left: Tensor, right: Tensor) -> bool:
    """Return whether two tensors hold the same values; NaN equals itself."""
    if left.shape != right.shape or left.dtype != right.dtype:
        return False
    return bool(torch.equal(left, right) or torch.equal(left.nan_to_num(), right.nan_to_num()))


def in_double(value: Any) -> Any:
    """Return arguments with every floating-point tensor in float64."""
    if isinstance(value, Tensor):
        return value.double() if value.is_floating_point() else value
    if isinstance(value, dict):
        return {key: in_double(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(in_double(each) for each in value)
    return value


def first_line(error: BaseException) -> str:
    """Return the beginning of what an exception says."""
    return " ".join(str(error).split())[:300]


def problem(check: str, error: BaseException) -> dict[str, str]:
    """Return what an exception in a check means: wrong, refused by the package in words of its own, or a crash."""
    if isinstance(error, WrongError):
        return {"check": check, "verdict": "wrong", "reason": first_line(error), "where": ""}
    last = traceback.extract_tb(error.__traceback__)[-1]
    if "lightning_lora" in last.filename and (last.line or "").startswith("raise"):
        return {"check": check, "verdict": "refused", "reason": first_line(error), "where": ""}
    where = f"{'/'.join(Path(last.filename).parts[-3:])}:{last.lineno}"
    reason = f"{type(error).__name__}: {first_line(error)}"
    return {"check": check, "verdict": "crash", "reason": reason, "where": where}


def wrapped(specimen: Specimen, net: nn.Module, train: bool) -> Any:
    """Return a LightningModule around a model, whose loss looks at all that the model returns."""
    from lightning.pytorch import LightningModule

    class Wrapped(LightningModule):
        when_started: Callable[[], None]

        def __init__(self) -> None:
            super().__init__()
            self.net = net.train(train)

        def forward(self) -> list[Tensor]:
            return run(specimen, self.net)

        def on_train_start(self) -> None:
            self.when_started()

        def training_step(self, _batch: Tensor) -> Tensor:
            return loss_of(self())

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.Adam(self.parameters(), lr=1e-3)

    return Wrapped()
