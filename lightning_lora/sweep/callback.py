"""The Lightning callback of a sweep: connects the hooks to the code beside it."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from torch.optim import Optimizer
from typing_extensions import override

from lightning_lora.callback import LoRACallback
from lightning_lora.config import OPTIONS, LoRAConfig, PositiveFloat, PositiveInt, shown_options
from lightning_lora.option_checks import check_choice, check_known, check_positive
from lightning_lora.option_checks import rank as positive_integer
from lightning_lora.sweep.candidates import Candidate, candidates
from lightning_lora.sweep.session import SweepSession
from lightning_lora.sweep.standings import Standings, Table
from lightning_lora.trainer import checks, lightning_patches, outcome
from lightning_lora.trainer.hints import explain_torch_error


class LoRASweep(Callback):
    """Trains many adapters at once on one frozen base, stops losers early, and keeps the best.

    The LightningModule stays as it is: its ``training_step`` runs for all adapters, each of which gets exactly the
    gradient of its own loss, has optimizer groups, clipping and validation of its own, and ends as it would in a fit of
    its own. ``val_loss`` is the best adapter's and ``val_loss/<name>`` each one's, so other callbacks keep their
    meaning. The best adapter is the active one at the end, and whenever a checkpoint is saved.

    Args:
        adapters: The options of each adapter by its name: ``{"a": {"lr": 1e-4}, "b": {"rank": 64, "seed": 1}}``. They
            are those of ``LoRAConfig``, and ``lr`` (in place of the optimizer's) or ``lr_multiplier``,
            ``weight_decay``, ``lr_ratio``, ``seed`` of the random start, and ``data``: the key of the adapter's own
            part of each batch, for training several tasks on one base.
        grid: Values of options instead, ``{"lr": [1e-4, 1e-3], "rank": [4, 16]}``: each combination is an adapter, with
            a name such as ``"lr=1e-4,rank=4"``.
        monitor: The metric that decides, as the module logs it.
        direction: Whether a smaller value is better (``"min"``) or a larger one (``"max"``). May be left out for a
            loss, that is, if ``monitor`` has ``loss`` in its name: the smallest is the best.
        keep: Share of the adapters that go on after each halving, at least one; 1 stops none. By default a half, and
            all if they have data of their own, whose metrics do not compare. The first tenth of the steps stops none.
        every_n_val: How many validations there are from one halving to the next.
        mode: How the step runs. ``"vmap"`` maps it over all adapters at once. ``"meet"`` runs it for each, with one
            forward pass of the network for all. ``"loop"`` runs it for one adapter after the other: it always fits, and
            needs the memory of one fit. ``"auto"`` takes the first that gives the right gradients on the first batch
            and, on a CPU, saves a quarter of the arithmetic, and says which and why.
        export_dir: Where to write the best adapter as a PEFT directory when the fit has succeeded: that of the best
            checkpoint, if a ModelCheckpoint watched ``monitor``, else of the last state. Adapters with data of their
            own are all written, into ``<export_dir>/<name>``.
        overwrite: Let ``export_dir`` replace adapters that are there.
        check_base: As in ``LoRACallback``.
        lr_ratio: As in ``LoRACallback``, for adapters that have none of their own.
        **lora: The options of ``LoRAConfig`` that all adapters share.

    Raises:
        TypeError: An option has the wrong type or is unknown, or not one of ``adapters`` and ``grid`` is given.
        ValueError: An option has an invalid value.

    Example:
        >>> from lightning_lora import LoRASweep
        >>> list(LoRASweep(grid={"lr": [1e-4, 3e-4], "rank": [4]}).candidates)
        ['lr=1e-4,rank=4', 'lr=3e-4,rank=4']
    """

    __signature__: ClassVar[inspect.Signature | None]

    def __init__(
        self,
        *,
        adapters: Mapping[str, Mapping[str, Any]] | None = None,
        grid: Mapping[str, Sequence[Any]] | None = None,
        monitor: str = "val_loss",
        direction: Literal["min", "max"] | None = None,
        keep: PositiveFloat | None = None,
        every_n_val: PositiveInt = 1,
        mode: Literal["auto", "vmap", "meet", "loop"] = "auto",
        export_dir: str | None = None,
        overwrite: bool = False,
        check_base: bool = True,
        lr_ratio: PositiveFloat = 1.0,
        **lora: Any,
    ) -> None:
        check_known("LoRASweep", lora, {*OPTIONS, *_OWN_OPTIONS})
        self.config = LoRAConfig(**lora)
        check_positive("LoRASweep.lr_ratio", lr_ratio)
        self.candidates: dict[str, Candidate] = candidates(self.config, adapters, grid, float(lr_ratio))
        self.monitor = monitor
        self.direction = _direction(monitor, direction)
        self.mode = check_choice("LoRASweep.mode", mode, of=Literal["auto", "vmap", "meet", "loop"])
        has_tasks = any(each.data is not None for each in self.candidates.values())
        self.keep = _share(keep, has_tasks)
        self.every_n_val = positive_integer("every_n_val", every_n_val)
        if has_tasks and mode == "vmap":
            raise ValueError("LoRASweep.mode='vmap' runs one batch for all adapters, and they have data of their own.")
        self.export_dir, self.overwrite, self.check_base = export_dir, overwrite, check_base
        self._session: SweepSession | None = None
        self._standings: Standings | None = None

    @override
    def __repr__(self) -> str:
        own = {name: getattr(self, name) for name in _OWN_OPTIONS.keys() - {"adapters", "grid", "lr_ratio"}}
        changed = {name: value for name, value in sorted(own.items()) if value != _OWN_OPTIONS[name]}
        names = ", ".join(map(repr, self.candidates))
        return f"{type(self).__name__}(adapters=[{names}], {shown_options(self.config.changed() | changed)})"

    @property
    def best(self) -> str:
        """Name of the adapter with the best latest value of the metric.

        Raises:
            RuntimeError: No adapter has been judged yet.
        """
        if self._standings is None or self._standings.best is None:
            raise RuntimeError("LoRASweep.best is known after the first validation; no adapter was judged yet.")
        return self._standings.best

    def table(self) -> Table:
        """Return a row for each adapter, the best first: its options, latest and best value, and where it stopped."""
        return (self._standings or Standings(self.candidates, self.direction)).table()

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Called when fit, validate, test or predict begins: attach, or arrange to attach once the layers exist."""
        self._close()
        checks.check_import_names(trainer, pl_module, self)
        checks.check_other_callbacks(trainer, self)
        if checks.callbacks_of(trainer, LoRACallback):
            raise MisconfigurationException(
                "This Trainer has a LoRASweep and a LoRACallback, which would both attach adapters. Remove one of them."
            )
        is_fit = stage == TrainerFn.FITTING
        if is_fit:
            checks.check_launcher(trainer.strategy, pl_module)
        self._session = SweepSession(self, trainer, pl_module, is_fit=is_fit)
        if is_fit:
            self._standings = self._session.standings
        self._session.attach()

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Called when fit begins, after the optimizers exist: check that exactly what was asked for will train."""
        self._run.check_fit()

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Called when training begins: take over the steps."""
        self._run.start_training()

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Called before each training batch: at the first one, choose how the step runs."""
        self._run.begin_batch(batch, batch_idx)

    @override
    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Called after each backward pass: add the gradients of earlier ones."""
        self._run.after_backward()

    @override
    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Called before each optimizer step: leave out the adapters that have stopped."""
        self._run.before_step(optimizer)

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Called after each batch: check that learning rates are still the adapters' own."""
        self._run.after_batch(outputs)

    @override
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Called when an epoch of training ends: without validation, judge by what training has logged."""
        self._run.end_epoch()

    @override
    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Called when testing begins."""
        outcome.warn_if_untrained(self._run.session.layout, pl_module)

    @override
    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Called when fit has succeeded: leave the best adapter in place."""
        self._run.succeed()

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Called when a stage ends: remove all wrappers from the module, and export if asked to."""
        if (session := self._close()) is not None:
            session.finish()

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Called when a stage fails: adapters stay, since checkpoints of the exception are written after this."""
        checks.explain_mixed_import_names(exception, trainer, pl_module, self)
        explain_torch_error(exception, pl_module)
        self._close()

    @property
    def _run(self) -> SweepSession:
        assert self._session is not None, "LoRASweep.setup was not called"
        return self._session

    def _close(self) -> SweepSession | None:
        session, self._session = self._session, None
        if session is not None:
            session.close()
        return session


def _direction(monitor: str, direction: str | None) -> str:
    if direction is not None:
        return check_choice("LoRASweep.direction", direction, of=Literal["min", "max"])
    if "loss" not in monitor.lower():  # a wrong guess would keep and export the worst adapter
        raise ValueError(
            f"LoRASweep.monitor={monitor!r} does not say which values are better. Set direction='max' if larger ones "
            "are, as of an accuracy, or 'min'."
        )
    return "min"


def _share(keep: float | None, has_tasks: bool) -> float:
    if keep is None:
        return 1.0 if has_tasks else 0.5
    if isinstance(keep, bool) or not 0 < keep <= 1:
        raise ValueError(f"LoRASweep.keep must be a number above 0 and at most 1, got {keep!r}.")
    if has_tasks and keep < 1:
        raise ValueError(
            f"LoRASweep.keep={keep:g} would stop adapters by comparing them, and they have data of their own. Leave it "
            "out."
        )
    return float(keep)


_OWN_OPTIONS = dict(LoRASweep.__init__.__kwdefaults__ or {})


def _signature() -> inspect.Signature:
    """Return the signature with every option of ``LoRAConfig``, in place of ``**lora``."""
    _, *own, _ = inspect.signature(LoRASweep.__init__).parameters.values()
    default, options = LoRAConfig(), inspect.signature(LoRAConfig).parameters.values()
    return inspect.Signature([*own, *(option.replace(default=getattr(default, option.name)) for option in options)])


LoRASweep.__signature__ = _signature()  # of the class alone, as LoRACallback's
lightning_patches.derive_from_both(LoRASweep)
