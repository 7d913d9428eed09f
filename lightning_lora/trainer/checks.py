"""Checks of a run: anything that would keep it from training raises, or warns if only a part is affected."""

from __future__ import annotations

import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.fabric.utilities.rank_zero import rank_zero_info, rank_zero_warn  # type: ignore[attr-defined]
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import BaseFinetuning, ModelPruning, StochasticWeightAveraging, WeightAveraging
from lightning.pytorch.strategies import Strategy
from lightning.pytorch.strategies.launchers.multiprocessing import _MultiProcessingLauncher
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_lora.adapted_model import AdaptedModel
from lightning_lora.attachment import DEFAULT, get_attachment
from lightning_lora.config import FAMILIES
from lightning_lora.named_adapters import active_adapter, adapter_names, recorded
from lightning_lora.names import OTHERS, clean_name, is_below, is_glob, join, listed, near_names, selected, unmatched
from lightning_lora.optimizers import unheld_parameters
from lightning_lora.planning.checks import copies_named
from lightning_lora.probe import DeadAdapterError, Witness, blocking_weights, refuse_dead_adapters
from lightning_lora.sharding import anywhere, is_fully_sharded, local
from lightning_lora.trainer.diagnostics import norm_of_updates, to_floats
from lightning_lora.trainer.lightning_patches import import_name, overrides, with_twins
from lightning_lora.trainer.strategies.base import Layout, original_param_groups
from lightning_lora.trainer.strategies.deepspeed import gathered_parameters

AVERAGING = (WeightAveraging, StochasticWeightAveraging)  # they copy the module before its own ``setup`` runs

# --- before attaching: the Trainer and its other callbacks


def check_import_names(trainer: Trainer, module: LightningModule, lora: Callback) -> None:
    """Refuse a Trainer, module and callbacks that come from both ``lightning.pytorch`` and ``pytorch_lightning``."""
    others = [callback for callback in _callbacks(trainer) if not isinstance(callback, type(lora))]
    names = {type(part).__name__: import_name(part) for part in (trainer, module, *others)}
    strays = [f"{kind} from {name}" for kind, name in names.items() if name != import_name(trainer)]
    if strays:
        raise MisconfigurationException(
            f"This Trainer is from {import_name(trainer)}, but it was given {', '.join(strays)}. Each package defines "
            "its own copy of every class and does not recognize the other's. Import everything from one of them; "
            "LoRACallback works with either."
        )


def explain_mixed_import_names(
    exception: BaseException, trainer: Trainer, module: LightningModule, lora: Callback
) -> None:
    """Add to an error that the two packages are mixed, if they are."""
    try:
        check_import_names(trainer, module, lora)
    except MisconfigurationException as mixed:
        if str(mixed) not in str(exception):
            exception.args = (f"{exception}\n{mixed}",)


def check_other_callbacks(trainer: Trainer, lora: Callback) -> None:
    """Refuse callbacks that do not work beside ``LoRACallback``, and tell of copies of the base."""
    callbacks, averaging = _callbacks(trainer), callbacks_of(trainer, *AVERAGING)
    for callback in averaging:
        if callbacks.index(callback) < callbacks.index(lora):
            raise MisconfigurationException(
                f"{type(callback).__name__} is listed before LoRACallback, so it would average a copy without "
                "adapters. List LoRACallback first."
            )
    for callback in callbacks:
        if isinstance(callback, type(lora)) and callback is not lora:
            raise MisconfigurationException(
                "This Trainer has two LoRACallbacks, and a fit trains one adapter. Name the layers of both in one "
                "LoRACallback, call fit once for each LoRACallback(adapter=...), or train several at once by LoRASweep."
            )
        if isinstance(callback, with_twins(BaseFinetuning, ModelPruning)):
            raise MisconfigurationException(
                f"{type(callback).__name__} changes which parameters train, and so does LoRACallback. Remove one "
                "of them; modules_to_save trains whole modules beside the adapters."
            )
    if averaging:
        names = [type(callback).__name__ for callback in averaging]
        rank_zero_info(f"LoRA: {', '.join(names)} keeps a copy of the whole module, the frozen base included.")


def callbacks_of(trainer: Trainer, *kinds: type[Callback]) -> list[Callback]:
    """Return the Trainer's callbacks of these kinds."""
    return [callback for callback in _callbacks(trainer) if isinstance(callback, with_twins(*kinds))]


def check_launcher(
    strategy: Strategy, module: LightningModule, name: str | None = None, *, merges: bool = False
) -> None:
    """Refuse launchers that train copies of a module, such as ``ddp_spawn``, if only values come back from them."""
    if not isinstance(strategy.launcher, with_twins(_MultiProcessingLauncher)):
        return
    if merges:
        raise MisconfigurationException(
            "merge_on_teardown=True would merge into the copies that this launcher (spawn, fork or notebook) trains; "
            "the module here would get the merged weights, and keep its adapters, too. Call merge(model) after "
            "trainer.fit, or use strategy='ddp'."
        )
    if name is not None and get_attachment(module) is not None and name != active_adapter(module):
        raise MisconfigurationException(
            f"LoRACallback(adapter={name!r}): with this launcher (spawn, fork or notebook) what is trained comes back "
            f"as the values of the active adapter here, which is {active_adapter(module)!r}. Before trainer.fit, call "
            f"set_adapter(model, {name!r}), after add_adapter if there is none of this name; or use strategy='ddp'."
        )
    if get_attachment(module) is None:
        raise MisconfigurationException(
            "With this launcher (spawn, fork or notebook) the adapters would exist only in the workers and be lost. "
            "Call lightning_lora.attach(model, callback.config) before trainer.fit, or use strategy='ddp'."
        )


def _callbacks(trainer: Trainer) -> list[Callback]:
    return trainer.callbacks  # type: ignore[attr-defined, no-any-return]


# --- before the first step: adapters and optimizers


def check_before_training(module: LightningModule, layout: Layout, optimizers: list[Optimizer]) -> None:
    """Check that exactly what should train is attached, declared and held by an optimizer."""
    model = AdaptedModel(module)
    if get_attachment(module) is None:
        raise MisconfigurationException("LoRACallback attached nothing to this module before fit began.")
    check_unchanged(model, layout, optimizers)
    if any(root.attachment.config.adapter_dtype == "float16" for root in model.roots):
        rank_zero_warn(
            "adapter_dtype='float16': Adam's eps (1e-8) underflows to zero in float16, so its updates become NaN. Use "
            "'float32', which costs little, or an optimizer that does not divide by eps."
        )
    groups = [group for optimizer in optimizers for group in original_param_groups(layout, optimizer)]
    if unheld := unheld_parameters(module, groups):
        message = f"No optimizer holds {listed(unheld)}, so they would not train. Return one from configure_optimizers."
        if module.automatic_optimization:
            raise MisconfigurationException(message)
        rank_zero_warn(message)  # the module may step an optimizer that Lightning does not know


def check_unchanged(model: AdaptedModel, layout: Layout, optimizers: Sequence[Optimizer]) -> None:
    """Refuse layers that plugins, hooks or surgery have replaced or resized, and what would train without being saved.

    What of the base a hook has unfrozen since, and no optimizer holds, does not train.
    """
    if changed := model.changed():
        raise MisconfigurationException(changed)
    held = {id(p) for each in optimizers for group in original_param_groups(layout, each) for p in group["params"]}
    known = {join(root.name, name) for root in model.roots for name in root.attachment.required_grad}
    named = [(clean_name(name), p) for name, p in model.module.named_parameters() if p.requires_grad]
    trainable = [name for name, p in named if id(p) in held or name not in known]
    # Inactive adapters train in a sweep, which saves all.
    if undeclared := [name for name in trainable if name not in model.trained and f"{OTHERS}." not in name]:
        raise MisconfigurationException(
            f"Parameters that would train but not be saved, because they belong to no adapter: {listed(undeclared)}. "
            "Make their modules in __init__, setup or configure_model, before LoRA is attached, and name them in "
            "modules_to_save; or leave them frozen. What needs no saving, such as a head that only measures, may be "
            "kept outside of the module, as an attribute of a callback."
        )


def check_same_adapters(module: nn.Module) -> None:
    """Refuse processes that have other adapters than the rest, or another active one; every process must call this.

    Raises:
        RuntimeError: Its message says, in every process, what each has.
    """
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return
    everywhere: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everywhere, (active_adapter(module), adapter_names(module)))
    if any(each != everywhere[0] for each in everywhere):
        found = [f"rank {rank}: {active!r} of {names}" for rank, (active, names) in enumerate(everywhere)]
        raise RuntimeError(
            f"The processes of this run have different adapters, or different active ones ({listed(found)}). Call "
            "add_adapter, set_adapter and using with the same names, in the same order, in every process."
        )


def check_allowed(entries: Sequence[str], model: AdaptedModel) -> None:
    """Refuse entries of ``allow_untrained`` that name no adapter."""
    if unknown := unmatched(entries, [(name,) for name in model.adapters]):
        near = near_names(unknown[0], model.adapters)
        hint = f"Closest names: {', '.join(near)}." if near else f"Adapters are {listed(list(model.adapters))}."
        raise MisconfigurationException(f"allow_untrained={unknown!r} matched no adapter. {hint}")


def probe_adapters(module: LightningModule, batch: Any) -> None:
    """Prove on a batch that every adapter changes what ``forward`` returns.

    Raises:
        MisconfigurationException: Some do not, or ``forward`` cannot be called with the batch.
    """
    if not overrides(module, "forward"):
        raise MisconfigurationException(
            f"LoRACallback.probe=True calls {type(module).__name__}.forward with the first batch, but forward is not "
            "defined. Define it, or set probe=False."
        )
    try:
        refuse_dead_adapters(module, batch)
    except DeadAdapterError as error:
        raise MisconfigurationException(str(error)) from error


# --- while training: gradients

JUDGED_AT = 50  # steps: enough for weights that start at zero to let gradients through, and for rare branches to run
_UNKNOWN = 0  # stands for the optimizers that a module steps past Lightning


class GradientCheck:
    """Gathers which adapters gradients have reached, and judges it at step 50, or at the end of a shorter fit.

    An adapter is reached by a gradient that is not zero, at any step, in any process. Only those that none has reached
    yet are looked at, without waiting for the device but for a few times in a fit. Steps are counted for each
    optimizer; where a module steps one that Lightning does not know, its batches are counted.

    Args:
        module: The adapted module.
        layout: That of the strategy.
        allowed: Names or globs of adapters that may stay untrained.
        reached: Names of the adapters that had been reached when the checkpoint was saved from which training resumes.

    Attributes:
        silent: Names of the adapters that no gradient had reached when the processes last agreed.
    """

    def __init__(
        self, module: LightningModule, layout: Layout, allowed: Sequence[str] = (), reached: Collection[str] = ()
    ) -> None:
        self.module, self.layout = module, layout
        adapters = AdaptedModel(module).adapters
        self._names, self._unseen = list(adapters), {n: a for n, a in adapters.items() if n not in reached}
        layers = AdaptedModel(module).layers
        self._layers = {name: name if name in layers else name.rpartition(".")[0] for name in adapters}
        self._allowed = {name for name in adapters if selected(allowed, (name,))}
        self.silent = list(self._unseen)
        self._zero, self._called = set[str](), set[str]()  # with gradients of zero; called with gradients
        self._sums: dict[int, Tensor] = {}  # of the sizes of a parameter's gradients
        self._steps = Counter[int]()  # by optimizer
        self._witness: Witness | None = None
        self._has_backward = self._has_warned = False
        self._began: dict[str, tuple[object, ...]] | None = None  # checksums of what trains
        self._batches, self._broken_at = 0, torch.tensor(sys.maxsize)  # the first batch whose loss was not finite

    # --- gathering

    def watch(self, witness: Witness) -> None:
        """Begin with the first batch: training starts from the values of now, and the witness sees which layers run."""
        self._began, self._witness = self._values(), witness

    @property
    def awaits_step(self) -> bool:
        """Whether no optimizer has made the step yet at which the first batches are judged."""
        return bool(self.silent) and not self._steps

    def has_moved(self) -> bool | None:
        """Return whether training has changed any value; None before the first batch. Every process must call this."""
        if self._began is None:
            return None
        return any(anywhere([self._values() != self._began], self.layout.strategy.root_device))

    def _values(self) -> dict[str, tuple[object, ...]]:
        with gathered_parameters(self.module):
            trained = AdaptedModel(self.module).trained.items()
            return {name: checksum(local(tensor)) for name, tensor in trained if tensor.requires_grad}

    def after_backward(self) -> None:
        """Note gradients, if the optimizer may be stepped without Lightning."""
        if not self.module.automatic_optimization and self.silent:
            self._note()
            self._has_backward = True

    def before_step(self, optimizer: Optimizer) -> None:
        """Note gradients, and check the adapters that an optimizer holds at its first step and at step 50."""
        if self.silent:
            self._note()
            self._count(id(optimizer), lambda: self._held_by(optimizer))

    def after_batch(self, outputs: Any) -> None:
        """Note whether the loss is finite, and count a batch that no known optimizer has stepped."""
        self._note_loss(outputs)
        if self._has_backward and not self._steps.keys() - {_UNKNOWN}:
            self._has_backward = False
            self._count(_UNKNOWN, lambda: self._names)

    def _note(self) -> None:
        gradients = {
            id(parameter): parameter.grad
            for adapter in self._unseen.values()
            for parameter in adapter.parameters()
            if parameter.grad is not None
        }
        if not gradients:
            return
        # Sizes are sums of magnitudes, since squares of small numbers vanish; and only added, so that nothing waits.
        parts = [g.coalesce().values() if g.is_sparse else local(g) for g in gradients.values()]
        for key, size in zip(gradients, torch._foreach_norm(parts, 1), strict=True):
            self._sums[key] = size if key not in self._sums else self._sums[key] + size

    def _note_loss(self, outputs: Any) -> None:
        self._batches += 1
        loss = outputs.get("loss") if isinstance(outputs, Mapping) else outputs
        if isinstance(loss, Tensor):
            at = torch.where(loss.detach().isfinite().all(), sys.maxsize, self._batches)
            self._broken_at = torch.minimum(self._broken_at.to(at.device), at)

    def _count(self, optimizer: int, names: Callable[[], Collection[str]]) -> None:
        self._steps[optimizer] += 1
        step = self._steps[optimizer]
        if step in (1, JUDGED_AT):
            self._agree()
            held = names()
            silent = [name for name in self.silent if name in held and name not in self._allowed]
            if silent and step == JUDGED_AT:
                self._judge(silent, f"in {step} steps")
            elif silent:
                rank_zero_warn(
                    f"No gradient reached the adapters of {listed(silent)} in the first step:\n"
                    f"{self._explained(silent)}\nThis is judged at step {JUDGED_AT}, or at the end of a shorter fit."
                )
        elif step & (step - 1) == 0:  # ever more rarely
            self._settle()

    def _held_by(self, optimizer: Optimizer) -> set[str]:
        held = {id(p) for group in original_param_groups(self.layout, optimizer) for p in group["params"]}
        adapters = AdaptedModel(self.module).adapters.items()
        return {name for name, adapter in adapters if any(id(p) in held for p in adapter.parameters())}

    def _settle(self) -> None:
        """Stop looking at the adapters that this process has seen reached; waits for the device."""
        notes = self.layout.noted_gradients
        if notes is not None:
            self._sums = {key: note.total for key, note in notes.items() if note.total is not None}
        sizes = dict(zip(self._sums, to_floats(list(self._sums.values())), strict=True))
        for name, adapter in list(self._unseen.items()):
            keys = list(map(id, adapter.parameters()))
            if any(sizes.get(key) for key in keys):
                del self._unseen[name]
                for key in keys:
                    self._sums.pop(key, None)
                    if notes is not None:
                        notes[key].stop()

    def _agree(self) -> None:
        """Agree with the other processes on what was seen; every process must call this."""
        if not (names := self.silent):
            return
        self._settle()
        adapters, calls = AdaptedModel(self.module).adapters, self._witness.calls if self._witness else {}
        # A process may hold a part of an adapter, or nothing of it, and run other branches.
        seen = [name not in self._unseen for name in names]
        zero = [any(id(p) in self._sums for p in adapters[name].parameters()) for name in names]
        called = [calls.get(self._layers[name]) == "" for name in names]
        if not self.module.automatic_optimization and self._began is not None:
            moved = {name for name, value in self._values().items() if self._began.get(name) != value}
            # By steps inside of backward, which have cleared each gradient before it was seen here.
            seen = [
                has_been or (not is_zero and any(is_below(each, (self._layers[name],)) for each in moved))
                for name, has_been, is_zero in zip(names, seen, zero, strict=True)
            ]
        # Offloaded parameters lie elsewhere.
        agreed = iter(anywhere([*seen, *zero, *called], self.layout.strategy.root_device))
        self.silent = [name for name in names if not next(agreed)]
        self._zero = {name for name in names if next(agreed)}
        self._called = {name for name in names if next(agreed)}
        self._unseen = {name: adapter for name, adapter in self._unseen.items() if name in self.silent}

    # --- judging

    def untrained(self) -> list[str]:
        """Return the adapters that no gradient has reached so far; every process must call this."""
        self._agree()
        return self.silent

    def finish(self) -> None:
        """Judge the whole fit, and repeat what was warned of; every process must call this."""
        if self._steps:
            self._agree()
            silent = [name for name in self.silent if name not in self._allowed]
            self._judge(silent, f"in {max(self._steps.values())} steps")
            self._warn_of_still()

    def _warn_of_still(self) -> None:
        """Warn of what trains in full and has not changed at all; every process must call this."""
        began, now = self._began or {}, self._values() if self._began else {}
        names = [name for name in AdaptedModel(self.module).in_full if name in began.keys() & now.keys()]
        moved = anywhere([began[name] != now[name] for name in names], self.layout.strategy.root_device)
        if still := [name for name, has_moved in zip(names, moved, strict=True) if not has_moved]:
            rank_zero_warn(
                f"LoRA: {listed(still)} should train in full, and did not change in {self.module.trainer.global_step} "
                "steps. Does the loss depend on them? Code that has kept a tensor, such as a loss with the weight of a "
                "head, computes with the base's; let it read module.weight each time. Name in modules_to_save what is "
                "to train, and nothing else."
            )

    def broken_at(self) -> int | None:
        """Return the number of the first batch of this fit whose loss was not finite, if it is known."""
        batch = int(self._broken_at)
        return None if batch == sys.maxsize else batch

    def _judge(self, names: list[str], when: str) -> None:
        """Raise if no adapter at all was reached, or one that was named was not; warn of others."""
        is_all, named = len(self.silent) == len(self._names), _named_adapters(AdaptedModel(self.module))
        if refused := [name for name in names if is_all or name in named]:
            raise MisconfigurationException(
                f"No gradient reached the adapters of {listed(refused)} {when}, so they are untrained:\n"
                f"{self._explained(refused, is_late=True)}\nallow_untrained={refused[:1]} accepts an adapter that "
                "stays untrained; it takes names and globs."
            )
        if names:
            (rank_zero_info if self._has_warned else rank_zero_warn)(
                f"LoRA: {len(self._names) - len(self.silent)} of {len(self._names)} adapters were trained. No gradient "
                f"reached those of {listed(names)} {when}:\n{self._explained(names, is_late=True)}"
            )
            self._has_warned = True

    def _explained(self, names: list[str], *, is_late: bool = False) -> str:
        """Return a line for each likely cause; every process must call this."""
        zeros = self._zero_weights(is_late=is_late) if self._zero.intersection(names) else []
        causes = defaultdict[str, list[str]](list)
        for name in names:
            causes[self._cause(name, zeros)].append(name)
        copies = copies_named(dict.fromkeys(self._layers[name] for name in names), AdaptedModel(self.module).layers)
        return "\n".join(f"  - {listed(some)}: {cause}" for cause, some in causes.items()) + copies

    def _cause(self, name: str, zeros: list[str]) -> str:
        layer, witness = self._layers[name], self._witness
        if (adapter := self._unseen.get(name)) and not any(p.requires_grad for p in adapter.parameters()):
            return "frozen, as after freeze(). Call unfreeze() before the fit, which freezes the base again."
        if name in self._zero:
            if zeros:
                return (
                    f"the gradient is exactly zero, as behind a weight of zero, and these are zero: {listed(zeros)}. "
                    "Train them (modules_to_save, or adapters of their own): once they have moved, gradients pass."
                )
            return "the gradient is exactly zero. Does the loss depend on these layers?"
        if name in self._called:
            return "called, but the loss does not depend on the output: it is unused, detached or out of the graph."
        if witness is None or not witness.watches:
            return "no gradient arrived; calls are not watched in a compiled model. Are these layers used in the loss?"
        if why := witness.calls.get(layer):
            cure = "Set use_reentrant=False." if "reentrant" in why else "Call them with gradients."
            return f"called only {why}. {cure}"
        if where := witness.reads.get(layer):
            return (
                f"never called in the first batch; the weight is read instead, by {where}. An update beside the layer "
                f"has no effect there, but one of the weight has: target_parameters=[{join(layer, 'weight')!r}], and "
                "leave the layer out of target_modules."
            )
        return "never called in the first batch. Use these layers, or leave them out with exclude_modules."

    def _zero_weights(self, *, is_late: bool) -> list[str]:
        """Return the weights that are all zero, and without an adapter that has made up for it since."""
        weights = dict(blocking_weights(self.module))
        moved = anywhere([bool(local(weight).any()) for weight in weights.values()], self.layout.strategy.root_device)
        adapted = {name for name in self._names if name not in self.silent} if is_late else set[str]()
        still = [name for name, has_moved in zip(weights, moved, strict=True) if not has_moved]
        return [name for name in still if name.rpartition(".")[0] not in adapted]


def _named_adapters(model: AdaptedModel) -> set[str]:
    """Return the adapters that the config names, instead of sweeping them up."""
    found = set[str]()
    for root in model.roots:
        targets, entries = root.attachment.config.target_modules, root.attachment.config.named_targets
        plain = () if isinstance(entries, str) else [entry for entry in entries if not is_glob(entry)]
        for layer in root.attachment.report.layers:
            is_swept = layer.pattern in (targets, *FAMILIES) or is_glob(layer.pattern)
            if not is_swept or selected(plain, (layer.name,)):
                found.add(join(root.name, layer.name))
    return found


def goes_beside(module: nn.Module, own: str | None) -> bool:
    """Return whether a checkpoint's adapter is none of the module's, and must not replace what those have learned."""
    names = adapter_names(module)
    if own is None or own in names:
        return False
    if (has_record := recorded(module) is not None) or own == DEFAULT:
        return has_record
    if not names:
        return True
    with gathered_parameters(module):
        return not any(map(is_fully_sharded, module.modules())) and norm_of_updates(module) > 0


def checksum(tensor: Tensor) -> tuple[object, ...]:
    """Return what differs between two values of a tensor, without a copy of it."""
    if tensor.is_meta or tensor.is_quantized or tensor.layout is not torch.strided or not tensor.numel():
        return tuple(tensor.shape), tensor.dtype
    octets = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
    # Alternating parts, so that an exchange of values is seen.
    sums = [int(octets[start::3].sum(dtype=torch.int64)) for start in range(3)]
    return tuple(tensor.shape), tensor.dtype, *sums
