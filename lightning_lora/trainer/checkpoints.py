"""Checkpoints that hold only the adapter: one small file, the same under every strategy."""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, cast

from lightning.fabric.utilities.rank_zero import rank_zero_info, rank_zero_warn  # type: ignore[attr-defined]
from lightning.pytorch.strategies import Strategy
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_lora.adapted_model import AdaptedModel, replace_buffers
from lightning_lora.base_buffers import grown_buffers, moved_values
from lightning_lora.fingerprint import Fingerprint, base_problems, samples, to_plain
from lightning_lora.modes import unscaled
from lightning_lora.named_adapters import active_adapter, adapter_names, fill_buffers, of_others
from lightning_lora.names import listed
from lightning_lora.optimizers import check_same_groups, group_names, reordered_state
from lightning_lora.state import (
    check_not_merged,
    check_sound,
    describe,
    extra_state_names,
    extra_states,
    mismatch_message,
    mismatches,
    other_name,
    other_shapes,
    record_problems,
    tensors_of_others,
    trains_otherwise,
    warn_of_other_buffers,
    with_masks,
)
from lightning_lora.storage.checkpoint import (
    ADDED_KEY,
    OTHERS_KEY,
    RECORD_KEY,
    SCORES_KEY,
    SWEEP_KEY,
    added_names,
    checked_checkpoint,
    recorded_base,
)
from lightning_lora.switching import switched
from lightning_lora.trainer.base_checkpoint import factor_names, load_base
from lightning_lora.trainer.checks import check_same_adapters
from lightning_lora.trainer.lightning_patches import INSTALLED, MethodWraps, overrides
from lightning_lora.trainer.metrics import load_states, metric_states
from lightning_lora.trainer.state_hooks import (
    TRAINING_KEY,
    added,
    as_hooks_left,
    complete_average,
    names_restored,
    only_trained,
    restored_names,
    with_clean_names,
    without_own,
)
from lightning_lora.trainer.strategies import layout_of
from lightning_lora.trainer.strategies.base import Layout, module_of, original_param_groups
from lightning_lora.trainer.unsaved import Unsaved, base_fingerprint
from lightning_lora.trainer.writing import written_at_once


class _Saving:
    """A method that saves, as a part of a strategy that can be copied and pickled."""

    def __init__(self, checkpoints: AdapterCheckpoints, name: str) -> None:
        self.checkpoints, self.name = checkpoints, name

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with self.checkpoints.saving():
            return getattr(self.checkpoints, self.name)(*args, **kwargs)


class AdapterCheckpoints:
    """Makes a strategy save and load only adapters, in the same small file under every strategy.

    It replaces methods of the strategy object, so that everything that saves obeys: ModelCheckpoint in all its modes,
    the checkpoint of an exception, those of the tuners, and ``trainer.save_checkpoint``. While the module has no
    adapters, the strategy's own methods run. Tensors are saved whole, and optimizer states by the names of their
    parameters, so that any strategy can resume what another has saved.
    """

    _REPLACED = (
        "lightning_module_state_dict",
        "optimizer_state",
        "save_checkpoint",
        "load_checkpoint",
        "load_model_state_dict",
        "load_optimizer_state_dict",
    )

    def __init__(self, strategy: Strategy) -> None:
        self.strategy, self.layout = strategy, layout_of(strategy)
        self.check_base, self.keeps_all = True, False
        self.untrained: Callable[[], list[str]] | None = None  # names of the adapters that no gradient has reached
        self._unsaved = Unsaved(self.layout)
        self.has_loaded = False  # a file, in this run
        self.saved = set[str]()  # the files of this run
        self._trains: str | None = None  # the adapter that the latest fit trains or has trained
        self._is_running = False
        self.ranks: Callable[[], tuple[dict[str, Any], dict[str, Any]]] | None = None  # state and scores of a schedule
        self.loaded_ranks: tuple[Mapping[str, Any], Mapping[str, Any]] | None = None  # the same of a checkpoint
        self.sweep: Callable[[], dict[str, Any]] | None = None  # what a sweep adds to the record
        self._given: dict[str, Any] | None = None  # the state to save, before hooks have seen it
        self._file: dict[str, Any] | None = None  # the state in an adapter's file, before hooks have seen it
        self._has_told_of_extra = False
        self._has_told_of_base = False
        self._has_told = False  # what hooks could not remove
        self.own = {name: getattr(strategy, name) for name in self._REPLACED}
        for name in self._REPLACED:
            setattr(strategy, name, getattr(self, name) if "load" in name else _Saving(self, name))
        setattr(strategy, INSTALLED, self)

    @property
    def _model(self) -> AdaptedModel:
        """The current adapters, which may have been added, removed or merged since the last call."""
        return AdaptedModel(module_of(self.strategy))

    # --- saving

    @contextmanager
    def as_trained(self) -> Iterator[None]:
        """Have the adapter of the fit in place as it trains, whatever a hook of the module computes with meanwhile."""
        module, name = module_of(self.strategy), self._trains
        self.layout.settle(module)
        is_there = name in (None, active_adapter(module)) or name not in adapter_names(module) or self.sweep is not None
        with nullcontext() if is_there else switched(module, name, "LoRACallback"), unscaled(module):
            yield

    @contextmanager
    def saving(self) -> Iterator[None]:
        """The same for saving; warns if that is not the adapter that a user sees."""
        before = active_adapter(module_of(self.strategy))
        with self.as_trained():
            now = active_adapter(module_of(self.strategy))
            if now != before and not self._is_running:
                rank_zero_warn(
                    f"LoRA: this checkpoint holds the adapter {now!r}, which this Trainer has trained, and not "
                    f"{before!r}, which is active. save_adapter(module, directory) writes the active one."
                )
            elif self._trains not in (None, now) and now is not None and self.sweep is None:
                rank_zero_warn(
                    f"LoRA: this Trainer has trained the adapter {self._trains!r}, which the module no longer has. "
                    f"This checkpoint holds {now!r}, which is active, beside the optimizer's state of the other."
                )
            yield

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Return the state to save: adapters, what trains in full, moving statistics, metric and extra states."""
        check_same_adapters(module_of(self.strategy))
        model = self._model
        model.check_unchanged()
        model.check_started()
        if not model.layers:
            state: dict[str, Any] = self.own["lightning_module_state_dict"]()
            return state
        extra, left_out = extra_states(model)
        if left_out and not self._has_told_of_extra:
            self._has_told_of_extra = True
            rank_zero_warn(
                f"LoRA: get_extra_state returns tensors of the frozen base in {listed(left_out)}, so checkpoints leave "
                "these states out: they hold no base. Return the rest alone, or save it in on_save_checkpoint."
            )
        self._given = trained_state(self.layout, model) | metric_states(model) | extra
        return dict(self._given)

    @contextmanager
    def watching_hooks(self) -> Iterator[None]:
        """Undo what the module's ``on_save_checkpoint`` does to names of the adapter, while a checkpoint is made.

        It runs last, so that what callbacks such as WeightAveraging have put in is known.
        """
        module, wraps = module_of(self.strategy), MethodWraps()
        if overrides(module, "on_save_checkpoint"):
            wraps.around(module, "on_save_checkpoint", self._watch)
        try:
            yield
        finally:
            wraps.remove()

    def _watch(self, hook: Callable[[dict[str, Any]], None], checkpoint: dict[str, Any]) -> None:
        model = self._model
        before = with_clean_names(checkpoint.get("state_dict", {})) if model.layers else None
        hook(checkpoint)
        if before is not None:
            self._restore_names(model, before, checkpoint, type(model.module).__name__)

    def _restore_names(
        self, model: AdaptedModel, before: Mapping[str, Any], checkpoint: dict[str, Any], whose: str
    ) -> None:
        after, trained = checkpoint.get("state_dict", {}), model.trained.keys()
        checkpoint["state_dict"] = state = names_restored(
            before, after, trained=trained, needed=trained, with_copies=True
        )
        if not self._has_told and (names := restored_names(only_trained(model, before), after, state)):
            self._has_told = True
            rank_zero_warn(
                f"LoRA: on_save_checkpoint of {whose} removes, renames or exchanges {listed(names)} in the state_dict. "
                "Checkpoints hold these all the same, under their own names, for they are the adapter. The frozen base "
                "is in none of them, so no hook needs to drop it."
            )

    def _added(self, model: AdaptedModel, state: Mapping[str, Any]) -> dict[str, Any]:
        """Return what hooks have added to a state under names of their own."""
        more, left_out = added(model, state, self.layout.base or ())
        if left_out and not self._has_told_of_base:
            self._has_told_of_base = True
            rank_zero_warn(
                f"LoRA: on_save_checkpoint adds {listed(left_out)} to the state_dict: tensors of the frozen base "
                "itself. Checkpoints leave these out, since they hold no base. To keep what they are now, add copies "
                "(tensor.clone())."
            )
        return more

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """Return an optimizer's state, whole."""
        optimizer = getattr(optimizer, "_optimizer", optimizer)  # inside a LightningOptimizer
        model = self._model
        if not model.layers:
            state: dict[str, Any] = self.own["optimizer_state"](optimizer)
            return state
        return self.layout.optimizer_state(model.module, optimizer)

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        """Add the record and write the file."""
        model = self._model
        if not model.layers:
            self.own["save_checkpoint"](checkpoint, filepath, storage_options=storage_options)
            return
        given, self._given = self._given, None
        if given is not None:
            self._restore_names(model, given, checkpoint, "a callback")
        # Callbacks such as WeightAveraging put whole models back in after the state dict was made.
        more = self._added(model, checkpoint.get("state_dict", {}))
        moved = moved_values(model)  # first, since the fingerprint leaves these out
        averages = as_hooks_left(moved, checkpoint)
        for key in ("state_dict", TRAINING_KEY):
            if key in checkpoint:
                checkpoint[key] = only_trained(model, checkpoint[key]) | (moved if key == TRAINING_KEY else more)
        base = base_fingerprint(self.layout, model)
        self._unsaved.warn(model, base)
        record = describe(model.module) | {"base": to_plain(base), "optimizers": self._optimizer_names()}
        record |= {} if self.untrained is None else {"untrained": self.untrained()}
        record |= {} if self.sweep is None else {SWEEP_KEY: self.sweep()}
        others = of_others(model.module, _described) if self.keeps_all else {}
        record["name"] = active_adapter(model.module)
        if others:
            record |= {"adapter": record["name"], "names": adapter_names(model.module), "others": others}
            checkpoint[OTHERS_KEY] = self._others_state(model.module)
        record |= {ADDED_KEY: [*more]} if more else {}
        record |= {"buffers": averages} if moved else {}
        if self.ranks is not None:
            record["rank_schedule"], checkpoint[SCORES_KEY] = self.ranks()
        checkpoint[RECORD_KEY] = record
        self.saved.add(str(filepath))
        with written_at_once(self.strategy, filepath) as place:
            # Not the strategy's own method, which may write a directory of shards: an adapter is small.
            Strategy.save_checkpoint(self.strategy, checkpoint, place, storage_options=storage_options)

    def begin_run(self, *, is_fit: bool, check_base: bool, keeps_all: bool) -> None:
        """Forget what an earlier run of the same Trainer has loaded and watched, and a fit what it has trained."""
        self.check_base, self.keeps_all, self._is_running = check_base, keeps_all, True
        self._trains = None if is_fit else self._trains
        self.ranks = self.loaded_ranks = self.untrained = None
        self._unsaved, self.has_loaded, self.saved = Unsaved(self.layout), False, set()

    def end_run(self) -> None:
        """Expect hooks no longer to compute with another adapter than the trained one."""
        self._is_running = False

    def note_base(self) -> None:
        """Remember the base that training begins with; every process must call this."""
        self.check_late()
        model = self._model
        self._unsaved.begin(model, base_fingerprint(self.layout, model), keeps_all=self.keeps_all)
        self._trains = active_adapter(model.module)

    def check_late(self) -> None:
        """Before the second batch, look again for what came too late to be loaded; every process must call this."""
        if self._unsaved.awaits:
            self._unsaved.check_late(self._model)

    def _others_state(self, module: nn.Module) -> dict[str, dict[str, Tensor]]:
        """Return what adapters beside the trained one hold: adapter -> name -> the whole tensor."""
        found: dict[str, dict[str, Tensor]] = {}
        for place, tensor in self.layout.gather(tensors_of_others(module), lambda place: place).items():
            _, adapter, name = place.split(".", 2)
            found.setdefault(adapter, {})[name] = tensor
        return found

    # --- loading

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """Read the file; raise one clear error if it is not a checkpoint."""
        path = self.strategy.broadcast(checkpoint_path)
        if not self._model.layers:
            read = self.own["load_checkpoint"]
        else:
            read = functools.partial(Strategy.load_checkpoint, self.strategy)
            if Path(path).is_dir():
                raise ValueError(
                    f"{str(path)!r} is a directory: a sharded checkpoint of a whole model, not of an adapter. Nothing "
                    "was changed. To use it as the base, convert it to one file with `python -m "
                    "lightning.pytorch.utilities.consolidate_checkpoint` (for DeepSpeed: lightning.pytorch.utilities."
                    "deepspeed.convert_zero_checkpoint_to_fp32_state_dict), or load it in configure_model."
                )
        checkpoint = checked_checkpoint(path, lambda: read(path, weights_only=weights_only))
        # Files of whole models, in which hooks may have changed names when they were saved, are theirs to change back.
        # So is what they have added themselves.
        self._file = None
        if RECORD_KEY in checkpoint:
            theirs = added_names(checkpoint[RECORD_KEY])
            self._file = {name: each for name, each in checkpoint["state_dict"].items() if name not in theirs}
        return checkpoint

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Load an adapter, strictly for its own keys; or a full checkpoint from before LoRA as the base."""
        try:
            self._load_model(checkpoint, strict)
            if self._must_load_optimizers():
                self.load_optimizer_state_dict(checkpoint)
        except Exception:
            # The Trainer keeps this dict, and would load it again in the next stage, even one without ckpt_path.
            cast(dict[str, Any], checkpoint).clear()
            raise

    def _load_model(self, checkpoint: Mapping[str, Any], strict: bool) -> None:
        model, trained, record = self._model, self._file or (), checkpoint.get(RECORD_KEY)
        state = self._loaded_state(checkpoint)
        if record is not None or any(name in state for name in factor_names(model)):
            self._load_adapter(model, state, record, strict, checkpoint.get(OTHERS_KEY, {}), trained)
            complete_average(checkpoint)
            if record is not None and "rank_schedule" in record:
                self.loaded_ranks = record["rank_schedule"], checkpoint[SCORES_KEY]
        elif model.layers:
            load_base(self.layout, model, state, strict=strict)
            # Loops, optimizers and callbacks of the full run do not apply to training an adapter on its result.
            changed = cast(dict[str, Any], checkpoint)
            changed.update(optimizer_states=[], lr_schedulers=[], callbacks={})
            changed.pop("loops", None)
            rank_zero_info(
                "LoRA: the checkpoint holds no adapter. Its weights become the frozen base, and training starts anew."
            )
        else:
            self.own["load_model_state_dict"](checkpoint, strict=strict)

    def _loaded_state(self, checkpoint: Mapping[str, Any]) -> Mapping[str, Any]:
        """Return the state to load, without what a hook of the module has done to names of the adapter."""
        state, model = checkpoint["state_dict"], self._model
        file, self._file = self._file, None
        if file is None or RECORD_KEY not in checkpoint:
            return cast(Mapping[str, Any], state)
        names = factor_names(model)
        factors = {name: tensor for name, tensor in model.trained.items() if name in names}
        state = names_restored(file, state, trained=model.trained, needed=factors)
        return without_own(state, file, factors)

    def _load_adapter(
        self,
        model: AdaptedModel,
        state: Mapping[str, Any],
        record: Mapping[str, Any] | None,
        strict: bool,
        others: Mapping[str, Mapping[str, Tensor]],
        trained: Collection[str],
    ) -> None:
        model, module = with_masks(model, state), model.module
        recorded = recorded_base(record or {})
        other_base = self._other_base(model, recorded, state)
        is_its_base = not self.check_base or bool(recorded and not other_base)
        check_not_merged(module, (record or {}).get("merges", {}), lambda: is_its_base)
        untrained = {name: tensor for name, tensor in model.tensors.items() if name not in model.trained}
        problems = record_problems(module, record or {"layers": describe(module)["layers"]})
        if (frozen := [name for name in trained if name in untrained]) and trains_otherwise(model, record or {}):
            problems.append(f"modules_to_save, bias or frozen_norm: {listed(frozen)} trained there, frozen here")
        left = [name for name in state if name in added_names(record)]
        known = [*untrained, *metric_states(model), *extra_state_names(module), *(left if strict else state)]
        grown = grown_buffers(model, state)
        problems += mismatches(self.layout.shapes(model.trained) | grown, state, known)
        if strict and left:
            problems.append(
                f"unknown to the model: {listed(left)}, added by on_save_checkpoint when the file was saved, and not "
                "taken out by on_load_checkpoint of the module; strict_loading=False of the module ignores these"
            )
        brought = {name: tensor for name, tensor in untrained.items() if name in state}
        problems += [*other_shapes(self.layout.shapes(brought), state), *other_base]
        beside, values, misfits = self._of_others(module, others, record or {})
        if problems := problems + misfits:
            raise ValueError(mismatch_message(type(module).__name__, problems))
        if SWEEP_KEY not in (record or {}):  # which goes on without those that have diverged
            check_sound({name: state[name] for name in model.trained} | values, "was changed")
        replace_buffers(module, grown)
        self._unsaved.loaded(model, recorded if self.check_base else {})
        self.has_loaded = True
        self.layout.fill(AdaptedModel(module).trained | brought, state)
        model.have_values()
        self.layout.fill(beside, values)
        brought_buffers = (record or {}).get("buffers", {})
        fill_buffers(model, brought_buffers)
        saved = (record or {}).get("others", {})

        def fill_other(part: nn.Module) -> None:
            name = active_adapter(part)
            if name in others:
                AdaptedModel(part).have_values()
            if name in saved:
                fill_buffers(AdaptedModel(part), saved[name].get("buffers", brought_buffers))

        of_others(module, fill_other)
        before = (record or {}).get("untrained")
        self.untrained = None if before is None else functools.partial(list, before)
        load_states(model, state)

    def _of_others(
        self, module: nn.Module, others: Mapping[str, Mapping[str, Tensor]], record: Mapping[str, Any]
    ) -> tuple[dict[str, Tensor], dict[str, Tensor], list[str]]:
        """Return the tensors of other adapters that a checkpoint fills, the values for them, and what does not fit."""
        saved, names = record.get("others", {}), {*others, *record.get("others", {})}
        if not names:
            return {}, {}, []
        found = of_others(module, lambda part: record_problems(part, saved.get(active_adapter(part)) or describe(part)))
        problems = [f"{name!r}: {problem}" for name, each in found.items() for problem in each]
        if lost := [name for name in record["names"] if name not in adapter_names(module)]:
            problems.append(f"this module lacks the adapters {listed([*map(repr, lost)])}")
        there = tensors_of_others(module).items()
        tensors = {place: tensor for place, tensor in there if place.split(".", 2)[1] in names}
        values = {other_name(name, key): value for name, own in others.items() for key, value in own.items()}
        return tensors, values, problems + mismatches(self.layout.shapes(tensors), values)

    def _other_base(self, model: AdaptedModel, recorded: Fingerprint, state: Mapping[str, Any]) -> list[str]:
        """Return how the base differs from the recorded one; what the state itself replaces is not compared."""
        names = [name for name in recorded if name not in state] if self.check_base else []
        base = self.layout.base
        if base is None:
            found: Fingerprint = samples(model.base, names)  # every process must call this
        else:
            found = {name: base[name] for name in names if name in base}
        if names:
            warn_of_other_buffers(model, recorded)
        return base_problems(recorded, found, type(model.module).__name__)

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Load optimizer states by parameter name."""
        record, states = checkpoint.get(RECORD_KEY), checkpoint.get("optimizer_states")
        if states is None:
            raise KeyError(
                "The checkpoint holds weights only (it was saved with save_weights_only=True), so training cannot "
                "resume from it. Load it with lightning_lora.load_adapter and start a new training."
            )
        if record is None or not states:
            self.own["load_optimizer_state_dict"](checkpoint)
            return
        theirs, ours = record["optimizers"], self._optimizer_names()
        check_same_groups(theirs, ours)
        for optimizer, state, their_groups, our_groups in zip(
            self.strategy.optimizers, states, theirs, ours, strict=True
        ):
            names = [name for group in our_groups for name in group]
            self.layout.load_optimizer_state(optimizer, reordered_state(state, their_groups, our_groups), names)

    def _must_load_optimizers(self) -> bool:
        """Return whether to load them together with the model: Lightning leaves it to strategies that shard."""
        if self.strategy.lightning_restore_optimizer:
            return False
        model = self._model
        return module_of(self.strategy).trainer.state.fn == TrainerFn.FITTING and bool(model.layers)

    def _optimizer_names(self) -> list[list[list[str]]]:
        module = module_of(self.strategy)
        return [group_names(module, original_param_groups(self.layout, each)) for each in self.strategy.optimizers]


def _described(module: nn.Module) -> dict[str, Any]:
    """Return the record of an adapter beside the trained one, with the buffers of the base that it has for itself."""
    return describe(module) | {"buffers": moved_values(AdaptedModel(module))}


def install_adapter_checkpoints(strategy: Strategy) -> AdapterCheckpoints:
    """Make a strategy save and load only adapters; safe to repeat.

    Raises:
        MisconfigurationException: The strategy is not supported, or not with these settings.
    """
    found: AdapterCheckpoints | None = vars(strategy).get(INSTALLED)
    return AdapterCheckpoints(strategy) if found is None else found


def trained_state(layout: Layout, model: AdaptedModel) -> dict[str, Tensor]:
    """Return what was trained: name -> the whole tensor; every process must call this."""
    return layout.gather(model.trained, lambda name: name)
