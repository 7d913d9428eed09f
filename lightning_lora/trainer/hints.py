"""Hints for the user: settings with which LoRA learns little or diverges, and what torch's gradient errors mean."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from lightning.fabric.utilities.rank_zero import rank_zero_info, rank_zero_warn  # type: ignore[attr-defined]
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.optim import Optimizer

from lightning_lora.adapted_model import AdaptedModel
from lightning_lora.attachment import AttachReport
from lightning_lora.config import LoRAConfig
from lightning_lora.layers import LoRALayer, LowRankAdapter, adapter_type, family_of, has_running_statistics
from lightning_lora.named_adapters import recorded
from lightning_lora.names import OTHERS, clean_name, join, listed, walk
from lightning_lora.optimizers import fast_parameters
from lightning_lora.option_checks import AUTO
from lightning_lora.planning.obstacles import EXCLUDED, TOO_SMALL, wider_targets
from lightning_lora.sharding import is_fully_sharded

# Full fine-tuning of large models runs below it, and LoRA wants about ten times those rates.
LOWEST_RATE = 5e-5
# The default is 2. Published set-ups lie from 0.25 (alpha 16, rank 64) to 32 (alpha 32, rank 1).
LOWEST_SCALING, HIGHEST_SCALING = 0.1, 32.0
HIGHEST_RATIO = 64.0  # LoRA+ recommends about 16
_OFF_RATIO = 0.1  # a floor such as eta_min=1e-6 matters only where rates come near to it
# The query and value projections of a model with grouped queries are 9 % of its linear layers.
SMALLEST_SHARE = 0.05
# Whoever names no layer expects most of the model to learn; a convolutional net's linear layers are its head alone.
SMALLEST_SHARE_UNNAMED = 0.5
_FEWEST, _SAMPLE = 256, 4096  # values of a weight that tell a uniform distribution, and that are enough
_RATES = ("lr", "initial_lr", "max_lr")  # of a group: during warm-up "lr" alone says little

# Words of torch's errors
_UNUSED = "Expected to have finished reduction in the prior iteration"
_TWICE = "mark a variable ready only once"
_SPARSE = "SparseAdam does not support dense gradients"
_CUT = "does not require grad and does not have a grad_fn"
_DOTTED = 't contain "."'  # of a KeyError, which shows its apostrophe escaped


class Coverage(NamedTuple):
    """Share of the adaptable weights that have adapters.

    Attributes:
        trained: Elements of the weights that carry an adapter or train in full.
        total: Elements of all weights that could carry one, without embeddings, which are rarely adapted.
        rest: Kinds of layers without adapters, those with most elements first.
        expected: The share below which the user is told.
        remedy: What ``target_modules`` would have to be to reach the rest; None if no word does.
    """

    trained: int
    total: int
    rest: tuple[str, ...]
    expected: float = SMALLEST_SHARE
    remedy: str | list[str] | None = None


def warn_of_unfrozen(module: nn.Module) -> None:
    """Warn of base parameters that were unfrozen during training: no optimizer holds them, so they stayed the same."""
    model = AdaptedModel(module)
    trained = {id(parameter) for parameter in model.trained.values()}
    named = ((clean_name(name), parameter) for name, parameter in module.named_parameters())
    unfrozen = [name for name, p in named if p.requires_grad and id(p) not in trained and f"{OTHERS}." not in name]
    if unfrozen and model.layers:  # merging and detaching unfreeze, too
        rank_zero_warn(
            f"LoRA: {listed(unfrozen)} were unfrozen during training, but no optimizer holds them, so they stayed as "
            "they are. To train them, name their modules in modules_to_save."
        )


def warn_of_eval_mode(module: nn.Module) -> None:
    """Warn of options that do nothing in eval mode, which Lightning keeps: ``frozen_norm="track"`` and ``dropout``."""
    for root in AdaptedModel(module).roots:
        trained = {id(part) for part in root.trained_modules()}
        still = [
            clean_name(name)
            for name, norm in root.module.named_modules()
            if has_running_statistics(norm) and not norm.training and id(norm) not in trained
        ]
        if still and root.attachment.config.frozen_norm == "track":
            rank_zero_warn(
                f"LoRA: frozen_norm='track' moves no statistics of {listed(still)}, which are in eval mode, and "
                "Lightning keeps the mode. Call model.train() before the fit."
            )
    adapters = AdaptedModel(module).adapters.items()
    dropping = {name: each for name, each in adapters if each.spec.dropout and each.drops_input}
    if idle := [name for name, each in dropping.items() if not each.training]:
        rank_zero_warn(
            f"LoRA: dropout={dropping[idle[0]].spec.dropout:g} drops nothing in the adapters of {listed(idle)}, which "
            "are in eval mode, as from_pretrained leaves a model, and Lightning keeps the mode. Call model.train() "
            "before the fit, or set dropout=0."
        )


def warn_of_missing_heads(config: LoRAConfig, report: AttachReport) -> None:
    """Warn if heads were to be found, and none was."""
    if config.modules_to_save == AUTO and not report.saved:
        rank_zero_warn(
            "LoRA: modules_to_save='auto' found no head, as no linear layer is smaller than the rank. If there is a "
            "new one, name it, such as modules_to_save=['head']: otherwise it keeps its random weights, which no "
            "checkpoint holds."
        )


def warn_of_suspicious_settings(
    module: nn.Module,
    optimizers: Sequence[Optimizer],
    schedulers: Iterable[object],
    lr_ratio: float,
    reach: Coverage | None,
) -> None:
    """Warn once about all suspicious settings of a run, with the numbers and what to do.

    Args:
        module: The adapted module.
        optimizers: Its optimizers, before the first step.
        schedulers: Their learning rate schedulers; the highest known rate counts.
        lr_ratio: Learning rate of ``B`` over that of ``A``.
        reach: The result of ``coverage``, from before the module was wrapped.

    Source:
        Schulman et al. 2025, "LoRA Without Regret" (rate, layers); Hayou et al. 2024, arXiv:2402.12354 (ratio);
        Kalajdzievski 2023, arXiv:2312.03732 (scaling and rank).
    """
    model = AdaptedModel(module)
    found = [*_rates(model, optimizers, list(schedulers)), *_scalings(model), *_ratio(lr_ratio), *_targets(reach)]
    found += [*_small_layers(model), *_new_layers(model), *_first_values(model)]
    if found:
        lines = "\n".join(f"  - {each}" for each in found)
        rank_zero_warn(f"LoRA: this run may learn little, or diverge:\n{lines}")


def warn_of_replaced(before: Mapping[str, Tensor], module: nn.Module) -> None:
    """Warn if hooks have replaced layers since their adapters were trained, as a ``setup`` that builds them anew does.

    Args:
        before: What the adapters held when this run began.
        module: The module, with adapters in the layers that it has now.
    """
    model = AdaptedModel(module)
    if any(map(is_fully_sharded, module.modules())):
        return
    now = model.trained
    lost = [name for name, each in before.items() if isinstance(each, nn.Parameter) and now.get(name) is not each]
    if layers := list(dict.fromkeys(re.split(r"\.lora\.|\.[^.]+$", name)[0] for name in lost)):
        rank_zero_warn(
            f"LoRA: hooks of {type(module).__name__} have replaced {listed(layers)} since they were trained, so what "
            "was learned there is lost, and these start anew. In setup and configure_model, build layers only if they "
            "are not there yet; or pass the trained values as ckpt_path."
        )


def say_changed_dropout(saved: tuple[LoRAConfig, int] | None, config: LoRAConfig) -> None:
    """Dropout is no part of the adapter's state, so a run may go on with another one: not by accident."""
    if saved is not None and saved[0].dropout != config.dropout:
        rank_zero_info(
            f"LoRA: training goes on with dropout={config.dropout:g}; until the checkpoint it was {saved[0].dropout:g}."
        )


def warn_of_rate_finder(lr_ratio: float) -> None:
    """Warn of a search for the learning rate, by ``Tuner.lr_find`` or the callback, which knows of no ``lr_ratio``."""
    rank_zero_warn(
        "LoRA: Tuner.lr_find and LearningRateFinder use one learning rate for all parameter groups, so "
        f"lr_ratio={lr_ratio:g} has no effect while they search and, with the callback, in the fit that follows. What "
        f"they find is a rate for lr_ratio=1; with lr_ratio, B would train {lr_ratio:g} times as fast. Search without "
        "lr_ratio, and begin with a lower rate when you set it."
    )


class RatioWatch:
    """Warns once when the learning rates of ``B`` and ``A`` no longer have the ratio that ``lr_ratio`` gave them.

    Args:
        module: The adapted module.
        optimizers: Those of the training, with the groups that ``lr_ratio`` has made.
        lr_ratio: The ratio; 1 watches nothing.
    """

    def __init__(self, module: nn.Module, optimizers: Sequence[Optimizer], lr_ratio: float) -> None:
        self._owner, self._ratio = type(module).__name__, lr_ratio
        self._groups: list[tuple[Optimizer, list[int], list[int]]] = []  # with the numbers of the groups of A, and of B
        fast = fast_parameters(module) if lr_ratio != 1.0 else set[int]()
        for optimizer in optimizers if fast else ():
            numbers: tuple[list[int], list[int]] = [], []
            for number, group in enumerate(optimizer.param_groups):
                if group["params"] and not isinstance(group["lr"], Tensor):  # to look at one would wait for its device
                    numbers[any(id(parameter) in fast for parameter in group["params"])].append(number)
            if all(numbers):
                self._groups.append((optimizer, *numbers))

    def check(self) -> None:
        """Look at the rates of now, as the last step, scheduler or hook has left them."""
        for optimizer, slow, fast in self._groups:
            rates = [float(optimizer.param_groups[number]["lr"]) for number in slow]
            for rate in (float(optimizer.param_groups[number]["lr"]) for number in fast):
                if not any(math.isclose(rate, self._ratio * each, rel_tol=_OFF_RATIO) for each in rates):
                    self._groups = []
                    rank_zero_warn(
                        f"LoRA: the learning rate of B is now {rate:.3g} and that of A {listed(_shown(rates))}, so "
                        f"lr_ratio={self._ratio:g} no longer holds. A scheduler, a callback or a hook of {self._owner} "
                        "sets rates without regard to what each group has, as eta_min of CosineAnnealingLR, swa_lrs "
                        "and group['lr'] = ... do. Scale the rate of each group instead, as LambdaLR does, or by "
                        "group['lr'] = factor * group['initial_lr'], which schedulers set."
                    )
                    return


def _shown(rates: Iterable[float]) -> list[str]:
    return list(dict.fromkeys(f"{rate:.3g}" for rate in rates))


def coverage(module: nn.Module) -> Coverage | None:
    """Return how much of the weights that could carry adapters trains; None without a low-rank adapter."""
    if not any(isinstance(adapter, LowRankAdapter) for adapter in AdaptedModel(module).adapters.values()):
        return None
    roots, missing = AdaptedModel(module).roots, set[str]()
    config = roots[0].attachment.config
    refused = {  # the user has said that these stay as they are
        join(root.name, name)
        for root in roots
        for name, reason in root.attachment.report.left_out.items()
        if reason == EXCLUDED
    }
    embeddings = {id(part._parameters.get("weight")) for part in module.modules() if isinstance(part, nn.Embedding)}
    trained, rest = 0, dict[str, int]()
    for path, part in AdaptedModel(module).parts:
        for name, size in () if path in refused else _weights(part):
            parameter = part._parameters.get(name)
            if parameter is not None and id(parameter) in embeddings:
                continue
            if isinstance(part, LoRALayer) or (parameter is not None and parameter.requires_grad):
                trained += size
            else:
                rest[type(part).__name__] = rest.get(type(part).__name__, 0) + size
                kind = adapter_type(part)
                missing |= {family_of(kind, part)} if kind else set()
    expected = SMALLEST_SHARE_UNNAMED if config.families else SMALLEST_SHARE
    kinds = tuple(sorted(rest, key=lambda kind: -rest[kind]))
    return Coverage(trained, trained + sum(rest.values()), kinds, expected, wider_targets(config, missing))


def explain_torch_error(exception: BaseException, module: nn.Module) -> None:
    """Add to an error about gradients which adapters it concerns and what helps; leave other errors as they are.

    Args:
        exception: Whatever ended the run.
        module: The adapted module.
    """
    text, model = str(exception), AdaptedModel(module)
    if _UNUSED in text:
        silent = [name for name, each in model.adapters.items() if any(p.grad is None for p in each.parameters())]
        if silent:  # replaces torch's words, which Lightning would replace otherwise
            exception.args = (
                f"DDP waits for gradients that never come: none reached the adapters of {listed(silent)}. Use "
                "exclude_modules for layers that do not always run, or strategy='ddp_find_unused_parameters_true'.",
            )
    elif _TWICE in text:
        exception.args = (
            f"{text}\nLoRA: an adapter, one of {listed(list(model.adapters))}, was used in several backward passes of "
            "one step. With activation checkpointing set use_reentrant=False; with layers that run several times use "
            "DDPStrategy(static_graph=True).",
        )
    elif _SPARSE in text and model.adapters:
        exception.args = (
            f"{text}\nLoRA: the factors of an adapted embedding have dense gradients, also with sparse=True. Use Adam "
            "or AdamW.",
        )
    elif _DOTTED in text and model.adapters:
        exception.args = (
            f"{text}\nLoRA: parallelize_module cannot divide layers that carry adapters already. Call attach(self) "
            "and, for other adapters, add_adapter(self, ...) after it in configure_model.",
        )
    elif _CUT in text and _is_evaluating(module):
        exception.args = (
            f"{text}\nLightning validates, tests and predicts without gradients. Where a step computes derivatives of "
            "its own, such as forces, set Trainer(inference_mode=False) and compute them under torch.enable_grad().",
        )
    elif _CUT in text and (several := recorded(module)) is not None and several.active in several.frozen:
        trained = [repr(name) for name in several.adapters if name not in several.frozen]
        exception.args = (
            f"{text}\nLoRA: the active adapter is {several.active!r}, which stays as it is in this fit; "
            f"{listed(trained)} trains. A hook or step has called set_adapter without putting it back: use `with "
            "using(module, ...)`.",
        )
    elif _CUT in text and model.adapters:
        exception.args = (
            f"{text}\nLoRA: the loss depends on no adapter. If everything it depends on is frozen (for example one of "
            "two networks), adapt a part of it, train a part in full with modules_to_save, or drop this loss. "
            "Reentrant activation checkpointing over frozen inputs also cuts gradients: set use_reentrant=False, or "
            "let the first block's input require a gradient.",
        )


def _is_evaluating(module: nn.Module) -> bool:
    trainer = getattr(module, "_trainer", None)
    return trainer is not None and not trainer.training


# --- suspicious settings


def _weights(part: nn.Module) -> Iterator[tuple[str, int]]:
    """Yield the names and sizes of the weights of one module that carry an adapter or could."""
    if isinstance(part, LoRALayer):
        adapters = [adapter for adapter in part.adapters().values() if isinstance(adapter, LowRankAdapter)]
        for name, adapter in {adapter.parameter: adapter for adapter in adapters}.items():
            yield name, math.prod(adapter.matrix_shape(part, name)) * adapter.stack(part, name)
        return
    kind = adapter_type(part)
    if kind is not None and not isinstance(part, (nn.Embedding, nn.EmbeddingBag)):
        for name in kind.parameters_of(part):
            yield name, math.prod(kind.matrix_shape(part, name))


def _rates(model: AdaptedModel, optimizers: Sequence[Optimizer], schedulers: list[Any]) -> Iterator[str]:
    factors = {id(parameter) for adapter in model.adapters.values() for parameter in adapter.parameters()}
    for optimizer in optimizers:
        kind = type(optimizer).__name__
        groups = [group for group in optimizer.param_groups if any(id(p) in factors for p in group["params"])]
        rates = [rate for group in groups for rate in _numbers(group.get(key) for key in _RATES)]
        if rates:
            rates += [rate for each in schedulers for rate in _peaks(each, optimizer)]
        if "adam" in kind.lower() and 0 < max(rates, default=0.0) < LOWEST_RATE:
            yield (
                f"the learning rate of {max(rates):g} ({kind}) looks like one for full fine-tuning. LoRA needs about "
                f"ten times that: try {max(10 * max(rates), 2 * LOWEST_RATE):g}, or 2e-4 for a language model."
            )


def _peaks(scheduler: Any, optimizer: Optimizer) -> list[float]:
    """Return the rates that a scheduler will reach, as far as its attributes say."""
    inner = [rate for each in getattr(scheduler, "_schedulers", ()) for rate in _peaks(each, optimizer)]
    if getattr(scheduler, "optimizer", None) is not optimizer:
        return inner
    return inner + _numbers(rate for key in ("base_lrs", "max_lrs") for rate in getattr(scheduler, key, None) or ())


def _numbers(values: Iterable[Any]) -> list[float]:
    return [float(value) for value in values if value is not None]


def _scalings(model: AdaptedModel) -> Iterator[str]:
    extreme: dict[tuple[float, int], list[str]] = {}
    for name, adapter in model.adapters.items():
        scaling = adapter.spec.scaling
        if isinstance(adapter, LowRankAdapter) and not LOWEST_SCALING <= scaling <= HIGHEST_SCALING:
            extreme.setdefault((scaling, adapter.spec.rank), []).append(name)
    for (scaling, rank), names in extreme.items():
        how, cure = ("small", "Raise") if scaling < LOWEST_SCALING else ("large", "Lower")
        yield (
            f"the scaling of {scaling:g} at rank {rank} of {listed(names)} is {how}: 1 to 4 is usual. {cure} alpha; "
            "the scaling is alpha / rank, or alpha / sqrt(rank) with use_rslora=True."
        )


def _ratio(lr_ratio: float) -> Iterator[str]:
    if not 1.0 <= lr_ratio <= HIGHEST_RATIO:
        how = "slower than A" if lr_ratio < 1.0 else "much faster than A"
        yield f"lr_ratio={lr_ratio:g} trains B {how}: LoRA+ recommends about 16, and 1 is plain LoRA."


def _targets(reach: Coverage | None) -> Iterator[str]:
    if reach is not None and reach.trained < reach.expected * reach.total:
        remedy = "add them to target_modules" if reach.remedy is None else f"set target_modules={reach.remedy!r}"
        yield (
            f"the adapters reach {reach.trained / reach.total:.1%} of the weights that could carry one; most of the "
            f"rest are in {listed(reach.rest, 2)} layers. Adapting all kinds of layers works better at the same size: "
            f"{remedy}."
        )


def _small_layers(model: AdaptedModel) -> Iterator[str]:
    for root in model.roots:
        modules = {clean_name(name) for name, _ in root.module.named_modules()}
        small = [name for name, reason in root.attachment.report.left_out.items() if TOO_SMALL in reason]
        reason = "because the rank exceeds what these layers can have"
        if layers := [name for name in small if name in modules]:
            remedy = f"Train new heads in full: set modules_to_save={layers} or 'auto'."
            yield f"no part of {listed(layers)} trains, {reason}. {remedy}"
        if weights := [name for name in small if name not in modules]:  # of layers with several, such as an LSTM
            option = "rank_pattern" if root.attachment.asked is None else "the max_rank of rank_schedule"
            yield f"no part of {listed(weights)} trains, {reason}. Give them lower ranks with {option}."


def _new_layers(model: AdaptedModel) -> Iterator[str]:
    """Yield the frozen layers to which transformers gave random values, as the pretrained files had none for them."""
    said, seen = _too_small(model), set[nn.Module]()
    for name, part in model.parts:
        if part in seen or not _is_of_transformers(part):
            continue
        layers = {join(name, key): layer for key, layer in walk(part)}
        seen |= set(layers.values())
        if not any(map(_is_pretrained, part.parameters())):
            continue  # not loaded from files
        head = part.get_output_embeddings()  # type: ignore[operator]
        new = [
            key
            for key, layer in layers.items()
            if layer is not head  # which is new after the vocabulary was resized
            if (weight := layer._parameters.get("weight")) is not None and not weight.requires_grad
            if not _is_pretrained(weight) and key not in said
        ]
        if new:
            yield (
                f"the pretrained files have no values for {listed(new)}, so random ones stay, which no checkpoint "
                "holds: another process has other ones, and loading will refuse it. Train new heads in full: set "
                f"modules_to_save={new} or 'auto'."
            )


def _first_values(model: AdaptedModel) -> Iterator[str]:
    """Yield the frozen layers that seem to have their first values still, in a model whose others were trained.

    Which layers of a transformers model are new is known (``_new_layers``); of others, only the values can say it.
    """
    layers = {name: part for name, part in model.parts if isinstance(part, (nn.Linear, _ConvNd))}
    verdicts = {name: verdict for name, part in layers.items() if (verdict := _looks_new(part)) is not None}
    if 2 * sum(verdicts.values()) >= len(verdicts):
        return  # nothing was trained here, or much was built anew on purpose
    known = {each for _, part in model.parts if _is_of_transformers(part) for each in part.modules()}
    own = {name: part._parameters["weight"] for name, part in layers.items() if name in verdicts and part not in known}
    frozen = {name for name, weight in own.items() if weight is not None and not weight.requires_grad}
    if new := [name for name, verdict in verdicts.items() if verdict and name in frozen - _too_small(model)]:
        yield (
            f"the values of {listed(new)} look random, as those of a new layer. No checkpoint holds them: another "
            f"process has other ones, and loading will refuse it. Train new heads in full: set modules_to_save={new}."
        )


def _too_small(model: AdaptedModel) -> set[str]:
    """Return the layers that ``_small_layers`` speaks of."""
    reports = [(root.name, root.attachment.report) for root in model.roots]
    return {join(root, name) for root, report in reports for name, why in report.left_out.items() if TOO_SMALL in why}


def _is_of_transformers(part: nn.Module) -> bool:
    return hasattr(part, "base_model_prefix") and hasattr(part, "get_output_embeddings")


def _looks_new(layer: nn.Module) -> bool | None:
    """Return whether a layer has the values of a new one; None if its values cannot say it.

    A new layer of torch is uniform within ``1 / sqrt(inputs)``; timm and others start biases at zero instead.
    """
    weight, bias = layer._parameters.get("weight"), layer._parameters.get("bias")
    plain = [each for each in (weight, bias) if each is not None]
    if weight is None or weight.ndim < 2 or not weight.numel():
        return None  # divided by a strategy, or computed
    if any(each.is_meta or type(each.data) is not Tensor or each.is_complex() for each in plain):
        return None  # without values, or with those of another format
    if bias is not None and not bias.any():
        return True
    inputs = weight[0].numel()  # of one output; torch counts those of a transposed convolution in the same way
    sample = weight.detach()[: math.ceil(_SAMPLE / inputs)].float()
    if sample.numel() < _FEWEST:
        return None
    largest, square = sample.abs().max() * inputs**0.5, 3 * inputs * sample.square().mean()
    return bool(0.98 < largest < 1.01 and 0.7 < square < 1.3)  # five standard deviations of the fewest values


def _is_pretrained(parameter: nn.Parameter) -> bool:
    return getattr(parameter, "_is_hf_initialized", False)  # the mark of transformers on what it loaded
